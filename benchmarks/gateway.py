"""What the server adds to a request, beside the engine's own work.

Per request: the time from its first byte in the gateway to `engine.add` in the worker, plus the
time from its first token known in the worker to that token written to the client's socket. Both
ends read CLOCK_MONOTONIC, which is one clock for all processes of a machine; the response's receipt
reports the two. Eight clients run in a closed loop, each streaming 16 tokens from a prompt of 32,
model warm, prefix reuse off. Clients, server and worker share the machine's cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import random

import common
import server as bench_server
from server import Server, deploy, stream_completion

SEED = 20261123
NUM_STREAMS = 8


def added_by_client(server: Server, seed: int, num_requests: int) -> list[tuple[float, float]]:
    """Seconds (in, out) that the gateway added to each of one client's requests."""
    rng = random.Random(seed)
    added = []
    for _ in range(num_requests):
        prompt_ids = [rng.randrange(1000, 20000) for _ in range(32)]
        _, receipt = stream_completion(server, "warm", prompt_ids, max_tokens=16)
        added.append((receipt["gateway_in_s"], receipt["gateway_out_s"]))
    return added


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 requests a client instead of 50")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    args = parser.parse_args()
    num_requests = 10 if args.quick else 50
    with (
        common.demo_model() as model_dir,
        bench_server.running_server() as server,
        concurrent.futures.ThreadPoolExecutor(NUM_STREAMS) as pool,
    ):
        deploy(server, "warm", model_dir, keep_alive_s=3600)
        added_by_client(server, SEED, 3)  # the start of the replica is not counted
        clients = [
            pool.submit(added_by_client, server, SEED + 1 + client, num_requests)
            for client in range(NUM_STREAMS)
        ]
        added = [pair for client in clients for pair in client.result()]
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
