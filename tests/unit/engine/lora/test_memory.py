"""Adapters of mixed ranks in one memory, again and again."""

from __future__ import annotations

import random

from tests.unit.engine.lora.support import Arena, make_adapter, make_memory

from flashserve.engine.lora.memory import Placed


def test_mixed_ranks_fill_free_and_refill_the_memory_with_what_they_hold() -> None:
    """Above 90 % of its bytes are weights of adapters, however it was filled and freed before."""
    draw = random.Random(0)
    adapters = {rank: make_adapter(f"r{rank}", rank) for rank in (4, 8, 16, 32, 64)}
    memory = make_memory(Arena(), num_bytes=16 << 20)
    held: list[tuple[int, Placed]] = []
    for _ in range(6):
        num_refused = 0
        while num_refused < 10:
            rank = draw.choice(list(adapters))
            placed = memory.place(adapters[rank].image)
            if placed is None:
                num_refused += 1
            else:
                held.append((rank, placed))
        num_bytes = sum(
            tensor.nbytes for rank, _ in held for tensor in adapters[rank].tensors.values()
        )
        assert num_bytes > 0.9 * memory.pool.nbytes
        draw.shuffle(held)
        for _ in range(draw.randrange(1, len(held))):
            memory.release(held.pop()[1])
