"""Clients that go away: nothing of theirs may stay behind."""

from __future__ import annotations

import asyncio

import httpx
from tests.e2e.harness import MODEL, Server, chat_body

NUM_CLIENTS = 200


def test_200_clients_that_disconnect_leave_no_block_and_no_lease(server: Server) -> None:
    server.ask(max_tokens=4)
    seen = asyncio.run(disconnect_all(server))
    assert sum(seen) > NUM_CLIENTS // 4, "most of the patient half must have got a token"
    model = server.await_idle()
    assert model["replicas"] >= 1, model["reason"]
    kv = model["kv"]
    assert kv["used"] == 0
    assert kv["used"] + kv["cached"] + kv["free"] == kv["total"]
    assert "Paris" in server.ask(max_tokens=8)
    server.await_idle()
    server.succeed("evict", MODEL, "--tier", "dram")
    assert server.model()["dram_bytes"] == 0
    assert "Paris" in server.ask(max_tokens=8)


async def disconnect_all(server: Server) -> list[bool]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as client:
        return await asyncio.gather(*(disconnect(client, n) for n in range(NUM_CLIENTS)))


async def disconnect(client: httpx.AsyncClient, number: int) -> bool:
    """Leaves after the first token, or (every other client) before anything has come."""
    body = chat_body(
        f"Count to a thousand, starting at {number}.",
        max_tokens=400,
        ignore_eos=True,
        stream=True,
    )
    patience = httpx.Timeout(120) if number % 2 else httpx.Timeout(120, read=0.3)
    try:
        async with client.stream(
            "POST", "/v1/chat/completions", json=body, timeout=patience
        ) as reply:
            assert reply.status_code == 200, await reply.aread()
            async for line in reply.aiter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    return True
    except httpx.ReadTimeout:
        return False
    raise AssertionError("the stream ended before its first token")
