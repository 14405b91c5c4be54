"""The one reader of `.npy` files: what it maps, what it refuses, and what it never does."""

import contextlib
import io
import os
import pickle
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from pipeline.errors import MachineFault
from pipeline.npy import NpyError, map_npy, npy_header
from pipeline.store import write_atomic
from tests.properties import damaged, examples


def with_header(text: str, data: bytes = b"", version: int = 1) -> bytes:
    """A file with this header, whatever it says."""
    header = text.encode() + b" " * (-(11 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", len(header)) + header + data


def header(descr: str = "'<f4'", shape: str = "(5, 12)", fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


def _archive() -> bytes:
    made = io.BytesIO()
    np.savez(made, np.ones((5, 12), np.float32))
    return made.getvalue()


_DATA = bytes(4 * 5 * 12)
#: What nobody may be told by a traceback, nor by a machine that has no memory left.
HOSTILE = {
    "empty": b"",
    "magic-only": b"\x93NUMPY\x01\x00",
    "version-9": with_header(header(), _DATA).replace(b"\x01\x00", b"\x09\x00", 1),
    "no-array": b"x" * 1000,
    "archive": _archive(),
    "too-many": with_header(header(shape="(1000000000000, 12)"), _DATA),
    "2^60": with_header(header(shape=f"({2**60}, 12)"), _DATA),
    "2^64": with_header(header(shape=f"({2**64}, 0)")),
    "10^30": with_header(header(shape=f"(5, {10**30})"), _DATA),
    "nothing-of-much": with_header(header(shape=f"(0, {2**62})")),
    "negative": with_header(header(shape="(-5, -12)"), _DATA),
    "bool": with_header(header(shape="(True, 60)"), _DATA),
    "deep": with_header(header(shape="(" + "-" * 4000 + "1,)"), _DATA),
    "deeper": with_header("[" * 3000 + "]" * 3000, _DATA),
    "long-header": with_header(header() + " " * 60000, _DATA),
    "header-of-4-GB": b"\x93NUMPY\x02\x00" + b"\xff" * 4 + _DATA,
    "many-dimensions": with_header(header(shape="(" + "1, " * 300 + "60)"), _DATA),
    "code": with_header(header(descr="__import__('os')"), _DATA),
    "objects": with_header(header(descr="'|O'", shape="(5,)"), pickle.dumps(print)),
    "records": with_header(header(descr="[('a', '<f4'), ('b', '<f4')]", shape="(5, 6)"), _DATA),
    "sub-arrays": with_header(header(descr="('<f4', (12,))", shape="(5,)"), _DATA),
    "no-size": with_header(header(descr="'<U0'", shape="(1000000000000,)")),
    "no-such-type": with_header(header(descr="'<f3'"), _DATA),
    "dates": with_header(header(descr="'<M8[s]'", shape="(30,)"), _DATA),
    "twice": with_header("{'descr': '<f4', 'descr': '<f4', 'shape': (5, 12), }", _DATA),
    "missing": with_header("{'descr': '<f4', 'shape': (5, 12), }", _DATA),
    "extra": with_header("{'x': 1, " + header()[1:], _DATA),
    "truncated": with_header(header(), _DATA[:-1]),
    "trailing": with_header(header(), _DATA + b"x"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_what_it_says_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.npy").write_bytes(HOSTILE[name])
    with pytest.raises(NpyError) as caught:
        map_npy(tmp_path / "x.npy")
    assert 0 < len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(60, dtype="<f4").reshape(5, 12),
        np.asfortranarray(np.arange(60, dtype=">f8").reshape(5, 12)),
        np.array(["a", "\U0010ffff", ""]),
        np.array([True, False]),
        np.float32(3),
        np.empty((0, 12), np.float32),
        np.empty((3, 0), np.int8),
    ],
    ids=lambda array: f"{array.dtype.str}{list(array.shape)}",
)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)], ids=str)
def test_what_numpy_saves_is_read(tmp_path: Path, array: np.ndarray, version: tuple[int, int]) -> None:
    with (tmp_path / "x.npy").open("wb") as file:
        np.lib.format.write_array(file, np.asarray(array), version)
    found = map_npy(tmp_path / "x.npy")
    assert found.array.dtype == array.dtype
    assert np.array_equal(found.array, array)
    assert not found.array.flags.writeable
    assert not len(found.trailer)


def test_a_header_in_other_words_is_read(tmp_path: Path) -> None:
    text = '{"shape":(2L , 3L),"fortran_order":False,"descr":"<f4"}'
    (tmp_path / "x.npy").write_bytes(with_header(text, np.arange(6, dtype="<f4").tobytes()))
    assert map_npy(tmp_path / "x.npy").array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_what_follows_is_read_only_if_asked_for(tmp_path: Path) -> None:
    head = npy_header("<f4", (3,))
    write_atomic(tmp_path / "x.npy", [head, np.arange(3, dtype="<f4").tobytes(), b"trailer"])
    found = map_npy(tmp_path / "x.npy", trailing=True)
    assert (found.array.tolist(), found.header.tobytes(), found.trailer.tobytes()) == ([0, 1, 2], head, b"trailer")
    with pytest.raises(NpyError, match=r"has 147 bytes, its header says 140"):
        map_npy(tmp_path / "x.npy")


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("nothing")
    for place, said in ((tmp_path, "folder"), (tmp_path / "pipe", "regular"), (Path("/dev/zero"), "regular")):
        with pytest.raises(NpyError, match=said):
            map_npy(place)
    with pytest.raises(NpyError, match="cannot be read"):
        map_npy(tmp_path / "loop")
    with pytest.raises(FileNotFoundError):
        map_npy(tmp_path / "nowhere")


def test_what_this_process_cannot_map_is_not_called_damaged(tmp_path: Path) -> None:
    path, rows = tmp_path / "whole.npy", 1 << 32
    path.write_bytes(npy_header("|u1", (rows,)))
    os.truncate(path, path.stat().st_size + rows)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    # As in a process that has as many files mapped as the system allows: mmap has the same error.
    resource.setrlimit(resource.RLIMIT_AS, (in_use + rows // 2, limits[1]))
    try:
        with pytest.raises(MachineFault, match=r"cannot map .*whole\.npy: Cannot allocate memory; .*max_map_count"):
            map_npy(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert map_npy(path).array.shape == (rows,)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(MachineFault, match=r"cannot map .*whole\.npy: Too many open files; raise ulimit -n"):
            map_npy(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_mapping_holds_no_descriptor_and_goes_with_its_array(tmp_path: Path) -> None:
    # Other tests may have left a mapping that Python has not collected yet, of a file of its own.
    path = tmp_path / "x.npy"
    np.save(path, np.arange(4, dtype=np.float32))
    before = len(os.listdir("/proc/self/fd"))
    arrays = [map_npy(path).array for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert Path("/proc/self/maps").read_text().count(str(path)) == 50
    assert all(array.tolist() == [0, 1, 2, 3] for array in arrays)
    del arrays
    assert str(path) not in Path("/proc/self/maps").read_text()


@given(damaged(with_header(header(), _DATA)) | damaged(with_header(header())).map(lambda data: data + _DATA))
@settings(max_examples=examples(200))
def test_any_file_is_an_array_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.npy").write_bytes(data)
    with contextlib.suppress(NpyError):
        assert map_npy(tmp_path / "x.npy").array.tobytes() is not None
