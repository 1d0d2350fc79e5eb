import os

import pytest

from flashserve.store.disk.folder import Folder
from flashserve.store.disk.journal import RECORD_BYTES, Journal

CHECKSUMS = {0: 0, 3: 2**64 - 1, 2: 77}


@pytest.fixture
def folder(tmp_path):
    with Folder.make_root(tmp_path / "f") as made:
        yield made


def opened(folder: Folder, identity: str = "file", num_chunks: int = 10) -> dict[int, int]:
    journal = Journal(folder, "j", identity, num_chunks)
    journal.close()
    return journal.recorded


@pytest.fixture
def written(folder):
    journal = Journal(folder, "j", "file", 10)
    for index, checksum in CHECKSUMS.items():
        journal.append(index, checksum)
    journal.close()
    return folder.path / "j"


def test_records_are_read_back(folder, written):
    assert opened(folder) == CHECKSUMS
    assert written.stat().st_size == 3 * RECORD_BYTES


@pytest.mark.parametrize("torn", range(1, RECORD_BYTES))
def test_a_torn_tail_is_ignored_and_writing_goes_on_aligned(folder, written, torn):
    os.truncate(written, 3 * RECORD_BYTES - torn)
    journal = Journal(folder, "j", "file", 10)
    assert journal.recorded == {0: 0, 3: 2**64 - 1}
    journal.append(5, 55)
    journal.close()
    assert opened(folder) == {0: 0, 3: 2**64 - 1, 5: 55}


@pytest.mark.parametrize("bit", range(8 * RECORD_BYTES))
def test_a_record_with_any_flipped_bit_is_ignored(folder, written, bit):
    data = bytearray(written.read_bytes())
    data[RECORD_BYTES + bit // 8] ^= 1 << bit % 8
    written.write_bytes(data)
    assert opened(folder) == {0: 0, 2: 77}


def test_a_tail_of_zeros_is_ignored(folder, written):
    os.truncate(written, 10 * RECORD_BYTES)
    assert opened(folder) == CHECKSUMS


def test_the_latest_record_of_a_chunk_counts(folder, written):
    journal = Journal(folder, "j", "file", 10)
    journal.append(2, 78)
    journal.close()
    assert opened(folder)[2] == 78


def test_records_of_another_file_or_beyond_its_end_are_ignored(folder, written):
    assert opened(folder, identity="another") == {}
    assert opened(folder, num_chunks=3) == {0: 0, 2: 77}


def test_a_link_in_the_place_of_a_journal_is_not_followed(folder, tmp_path):
    target = tmp_path / "elsewhere"
    (folder.path / "j").symlink_to(target)
    with pytest.raises(OSError, match="symbolic link"):
        Journal(folder, "j", "file", 10)
    assert not target.exists()


def test_a_record_that_does_not_fit_leaves_no_part_of_itself(folder, written, monkeypatch):
    write = os.write
    journal = Journal(folder, "j", "file", 10)
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    with pytest.raises(OSError, match="No space left"):
        journal.append(7, 7)
    monkeypatch.undo()
    journal.append(8, 8)
    journal.close()
    assert opened(folder) == CHECKSUMS | {8: 8}
