"""What the server adds to a request, beside the engine's own work.

Per request: the time from its first byte in the gateway to `engine.add` in the worker, plus the
time from its first token known in the worker to that token written to the client's socket. Both
ends read CLOCK_MONOTONIC, which is one clock for all processes of a machine; the response's receipt
reports the two. Eight clients run in a closed loop, each streaming 16 tokens from a prompt of 32,
model warm, prefix reuse off. Clients, server and worker share the machine's cores, so the clients
are as light as can be: one process, one thread, prepared bytes over keep-alive connections.
"""

from __future__ import annotations

import argparse
import asyncio
import random

import httpx
import msgspec

import common
import server as bench_server
from server import completion_body, deploy

SEED = 20261123
NUM_STREAMS = 8
SETTINGS = {"NODE__DRAM_BYTES": "1GiB"}  # soon faulted in, which would take a core for seconds


async def added_by_client(
    url: httpx.URL, seed: int, num_requests: int
) -> list[tuple[float, float]]:
    """Seconds (in, out) that the gateway added to each of one client's requests."""
    rng = random.Random(seed)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    added = []
    for _ in range(num_requests):
        prompt_ids = [rng.randrange(1000, 20000) for _ in range(32)]
        body = msgspec.json.encode(completion_body("warm", prompt_ids, max_tokens=16))
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {url.host}:{url.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b"\r\n0\r\n\r\n")  # the end of a chunked body
        last = answer[answer.rindex(b'data: {"') + 6 :]
        receipt = msgspec.json.decode(last[: last.index(b"\n")])["flashserve"]
        added.append((receipt["gateway_in_s"], receipt["gateway_out_s"]))
    writer.close()
    return added


async def added_by_clients(url: httpx.URL, num_requests: int) -> list[tuple[float, float]]:
    await added_by_client(url, SEED, 3)  # the start of the replica is not counted
    clients = (
        added_by_client(url, SEED + 1 + client, num_requests) for client in range(NUM_STREAMS)
    )
    return [pair for added in await asyncio.gather(*clients) for pair in added]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 requests a client instead of 50")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    args = parser.parse_args()
    num_requests = 10 if args.quick else 50
    with common.demo_model() as model_dir, bench_server.running_server(**SETTINGS) as server:
        deploy(server, "warm", model_dir, keep_alive_s=3600)
        added = asyncio.run(added_by_clients(server.http.base_url, num_requests))
    columns = {
        "request in to engine.add": [into for into, _ in added],
        "token known to socket write": [out for _, out in added],
        "added to first token": [into + out for into, out in added],
    }
    p99_ms = common.percentile(columns["added to first token"], 99) * 1000
    common.write_report(
        "gateway",
        seed=SEED,
        rows=[{"row": name, **common.spread(times)} for name, times in columns.items()],
        ratios={},
        values={
            "added_ttft_p99_ms": {
                "value": p99_ms,
                "unit": "ms",
                "better": "lower",
                "aim": 5.0,
                "met": p99_ms <= 5.0,
            }
        },
        notes=__doc__,
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
