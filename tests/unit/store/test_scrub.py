import contextlib
import threading

import pytest
import xxhash

from flashserve.store.scrub import Scrubber, ScrubPiece

RATE = 1000


class Chunk:
    """One chunk, and whether it is held just now."""

    def __init__(self, tag: str, data: bytes) -> None:
        self.tag = tag
        self.data = bytearray(data)
        self.checksum = xxhash.xxh3_64_intdigest(data)
        self.is_held = False

    @contextlib.contextmanager
    def view(self):
        self.is_held = True
        with memoryview(self.data) as view:
            yield view
        self.is_held = False

    def piece(self) -> ScrubPiece[str]:
        return ScrubPiece(self.view(), self.checksum, self.tag)


@pytest.fixture
def chunks() -> list[Chunk]:
    return [Chunk(name, name.encode() * size) for name, size in (("a", 500), ("b", 2000))]


def scrubber_of(chunks: list[Chunk], damaged: list[str]) -> Scrubber[str]:
    pieces = iter(chunks)

    def next_piece() -> ScrubPiece[str] | None:
        chunk = next(pieces, None)
        return chunk.piece() if chunk else None

    return Scrubber(next_piece, RATE, damaged.append)


def test_bytes_that_are_as_they_were_are_not_reported(chunks):
    damaged: list[str] = []
    scrubber = scrubber_of(chunks, damaged)
    assert [scrubber.step(), scrubber.step()] == [0.5, 2.0]
    assert damaged == []


@pytest.mark.parametrize("bit", [0, 7, 8 * 1999])
def test_one_flipped_bit_is_reported_with_its_tag(chunks, bit):
    chunks[1].data[bit // 8] ^= 1 << bit % 8
    damaged: list[str] = []
    scrubber = scrubber_of(chunks, damaged)
    scrubber.step()
    assert damaged == []
    scrubber.step()
    assert damaged == ["b"]


def test_nothing_is_held_while_damage_is_told(chunks):
    """Who is told frees the bytes, which a view would forbid."""
    chunks[0].data[0] ^= 1
    held: list[bool] = []
    Scrubber(chunks[0].piece, RATE, lambda _: held.append(chunks[0].is_held)).step()
    assert held == [False]


def test_with_nothing_to_compare_it_waits_and_looks_again(chunks):
    damaged: list[str] = []
    assert scrubber_of([], damaged).step() > 0
    answers = iter([None, chunks[0].piece()])
    scrubber = Scrubber(lambda: next(answers), RATE, damaged.append)
    assert scrubber.step() > 0
    assert scrubber.step() == 0.5


def test_the_thread_goes_on_after_damage_and_ends_at_once(chunks):
    """Between two pieces it would wait for longer than any test takes."""
    num_threads = threading.active_count()
    seen = threading.Event()
    chunks[0].data[0] ^= 1
    pieces = iter([ScrubPiece(contextlib.nullcontext(memoryview(b"")), 0, "empty")])

    def next_piece() -> ScrubPiece[str]:
        if piece := next(pieces, None):
            return piece
        return ScrubPiece(chunks[0].view(), chunks[0].checksum, "flipped")

    tags: list[str] = []

    def told(tag: str) -> None:
        tags.append(tag)
        if tag == "flipped":
            seen.set()

    scrubber = Scrubber(next_piece, 1, told)
    scrubber.start()
    seen.wait()
    scrubber.stop()
    assert tags == ["empty", "flipped"]
    assert threading.active_count() == num_threads


def test_one_that_was_never_started_can_be_stopped(chunks):
    scrubber_of(chunks, []).stop()
