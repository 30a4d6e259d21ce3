"""The pass over ids, and what is kept of it."""

import numpy as np
import pytest

from cgpt.data.formats import scan as room
from cgpt.data.formats.scan import SCAN_TOKENS, scan
from cgpt.errors import InputError


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Keeps every scan, and counts the passes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(room, "KEPT_BYTES", 0)
    passes, real = [], room._scan
    monkeypatch.setattr(room, "_scan", lambda arrays, eot: passes.append(1) or real(arrays, eot))
    return passes


def write(path, values, dtype="<u2"):
    np.asarray(values, dtype).tofile(path)
    return [np.fromfile(path, dtype)]


def facts(found):
    return found.largest, found.smallest, found.document_ends.tolist()


def test_extremes_and_ends_across_arrays_and_steps():
    first = np.ones(SCAN_TOKENS + 3, dtype="<i4")
    first[[5, SCAN_TOKENS + 1]] = 9, 7
    second = np.array([2, 9, -4, 7], dtype="<i4")
    found = room._scan([first, second], eot=7)
    assert found.largest == (9, 5)
    assert found.smallest == (-4, SCAN_TOKENS + 5)
    assert found.document_ends.tolist() == [SCAN_TOKENS + 2, SCAN_TOKENS + 7]


def test_a_second_opening_reads_nothing(tmp_path, kept):
    path = tmp_path / "a.bin"
    arrays = write(path, [3, 9, 1, 9, 2])
    first = scan(path, arrays, 9)
    again = scan(path, arrays, 9)
    assert facts(first) == facts(again) == ((9, 1), (0, 0), [2, 4])
    assert len(kept) == 1
    scan(path, arrays, 1)  # another EOT is another question
    assert len(kept) == 2


def test_a_change_is_noticed(tmp_path, kept):
    path = tmp_path / "a.bin"
    scan(path, write(path, [3, 9]), 9)
    assert facts(scan(path, write(path, [9, 8]), 9)) == ((9, 0), (0, 0), [1])
    path.with_suffix(".idx").write_bytes(b"an index")
    scan(path, write(path, [9, 8]), 9)
    assert len(kept) == 3


def test_a_pair_opened_by_its_index_is_read_again_after_its_ids_have_changed(tmp_path, kept):
    index = tmp_path / "a.idx"
    index.write_bytes(b"an index")
    scan(index, write(tmp_path / "a.bin", [3, 9]), 9)
    scan(index, [np.array([3, 9], "<u2")], 9)
    assert len(kept) == 1
    assert facts(scan(index, write(tmp_path / "a.bin", [9, 4]), 9)) == ((9, 0), (0, 0), [1])


def test_damage_to_what_was_kept_costs_a_pass(tmp_path, kept):
    path = tmp_path / "a.bin"
    arrays = write(path, [3, 9, 4])
    wanted = facts(scan(path, arrays, 9))
    (own,) = (tmp_path / "cache/cgpt/scans").iterdir()
    whole = own.read_bytes()
    for at in (0, 40, len(whole) - 3):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        for content in (damaged, whole[:at]):
            own.write_bytes(content)
            before = len(kept)
            assert facts(scan(path, arrays, 9)) == wanted
            assert len(kept) == before + 1


def test_a_cache_that_cannot_be_written_to(tmp_path, kept):
    (tmp_path / "cache").write_text("in the way")
    path = tmp_path / "a.bin"
    arrays = write(path, [3, 9, 4])
    for _ in range(2):
        assert facts(scan(path, arrays, 9)) == ((9, 1), (0, 0), [2])
    assert len(kept) == 2


def test_small_files_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a.bin"
    scan(path, write(path, [3, 9]), 9)
    assert not (tmp_path / "cache").exists()


def test_ids_outside_the_vocabulary(tmp_path):
    for values, wanted in (([1, 50257], "got 50257 at position 1$"), ([1, 2, -1], "got -1 at position 2$")):
        with pytest.raises(InputError, match=rf"a\.bin: wanted token ids under 50257, {wanted}"):
            scan(tmp_path / "a.bin", [np.array(values, "<i4")], 0).check(tmp_path / "a.bin", 50257)
