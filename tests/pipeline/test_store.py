"""Files on disk, byte by byte: what is here literally is the format, and a change is a change of format."""

import contextlib
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.errors import FileDamaged, GalleryMismatch, MachineFault, ShardCorrupt
from pipeline.objects import IdScheme
from pipeline.store import (
    Embedded,
    Failure,
    Record,
    check_shard,
    read_error,
    read_feature,
    read_json,
    read_record,
    recorded_shards,
    shard_contents,
    to_json,
    versions_tag,
    write_atomic,
    write_error,
    write_feature,
    write_record,
)
from tests.properties import changed, damaged, examples, to_text

ROOT = Path(__file__).resolve().parents[2]
BASENAME = IdScheme(ObjectIds.basename)


def npy(header: str, data: bytes) -> bytes:
    """An `.npy` file of version 1.0: the header padded with spaces to a multiple of 64."""
    length = -(len(header) + 11) % 64 + len(header) + 1
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + header.ljust(length - 1).encode() + b"\n" + data


TAG = versions_tag({"numpy": "2"})
DIGEST = bytes(range(32))
FEATURE = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", bytes.fromhex("0000803f000000c00000003f"))


@pytest.mark.parametrize("digest", [b"", DIGEST], ids=["format 1", "format 2"])
def test_a_feature_file_is_these_bytes(tmp_path: Path, digest: bytes) -> None:
    path = tmp_path / "aa" / "bb" / "f.npy"
    write_feature(path, Embedded(np.array([1, -2, 0.5], np.float32), digest), TAG)
    assert path.read_bytes() == FEATURE + digest + TAG
    # What follows the array is in nobody's way, so kept features are read as they always were.
    assert np.load(path, allow_pickle=False).tolist() == [1, -2, 0.5]
    embedded = read_feature(path, 3, len(digest), TAG)
    assert embedded is not None
    assert (embedded.feature.tolist(), embedded.digest) == ([1, -2, 0.5], digest)
    assert read_feature(path, 3, 32 - len(digest), TAG) is None, "a feature of the other format"


def whole(contents: dict[str, list[bytes | memoryview]]) -> dict[str, bytes]:
    """Each file's chunks in one piece."""
    return {ending: b"".join(chunks) for ending, chunks in contents.items()}


def test_a_shard_is_these_bytes() -> None:
    features, digests = np.array([[1], [2]], np.float32), np.arange(64, dtype=np.uint8).reshape(2, 32)
    contents = whole(shard_contents(features, digests, ["a", "é1"], ["x/a", "x/é1"]))
    assert contents["digests.npy"] == npy(
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 32), }", bytes(range(64))
    )
    before = whole(shard_contents(features, None, ["a", "é1"], ["x/a", "x/é1"]))
    assert before == {ending: content for ending, content in contents.items() if ending != "digests.npy"}
    assert contents["features.npy"] == npy(
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1), }", bytes.fromhex("0000803f00000040")
    )
    assert contents["object_ids.npy"] == npy(
        "{'descr': '<U2', 'fortran_order': False, 'shape': (2,), }", "a\0é1".encode("utf-32-le")
    )
    assert contents["paths.txt"] == "x/a\nx/é1\n".encode()


@pytest.mark.parametrize("version", [1, 2])
def test_a_record_is_these_bytes(tmp_path: Path, version: int) -> None:
    failure = Failure("b", "x/b", "missing", "there is no such file")
    sums = {"features.npy": "f", "object_ids.npy": "o", "paths.txt": "p"} | (
        {"digests.npy": "d"} if version > 1 else {}
    )
    record = Record(7, 2, 1, "float32", sums, "fp", "plan", 3, {"numpy": "2"}, (failure,), format=version)
    assert write_record(tmp_path, record)
    assert (tmp_path / "0007.json").read_text() == (
        "{\n"
        ' "dtype": "float32",\n'
        ' "failed": [\n'
        "  {\n"
        '   "message": "there is no such file",\n'
        '   "object_id": "b",\n'
        '   "path": "x/b",\n'
        '   "reason": "missing"\n'
        "  }\n"
        " ],\n"
        ' "fingerprint": "fp",\n'
        f' "format": {version},\n'
        ' "length": 1,\n'
        ' "plan": "plan",\n'
        ' "retry": false,\n'
        ' "rows": 2,\n'
        ' "segment": 3,\n'
        ' "sha256": {\n' + ('  "digests.npy": "d",\n' if version > 1 else "") + '  "features.npy": "f",\n'
        '  "object_ids.npy": "o",\n'
        '  "paths.txt": "p"\n'
        " },\n"
        ' "shard": 7,\n'
        ' "versions": {\n'
        '  "numpy": "2"\n'
        " }\n"
        "}\n"
    )
    assert read_record(tmp_path, 7) == record
    assert not write_record(tmp_path, record), "the first record stays"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        FEATURE,
        FEATURE + TAG,
        FEATURE + DIGEST[1:] + TAG,
        FEATURE + DIGEST + TAG[:-1],
        FEATURE + DIGEST + TAG + b"\0",
        FEATURE + DIGEST + versions_tag({"numpy": "3"}),
        FEATURE[:-4] + bytes.fromhex("0000c07f") + DIGEST + TAG,
        FEATURE[:-4] + bytes.fromhex("0000807f") + DIGEST + TAG,
        FEATURE.replace(b"<f4", b"<i4") + DIGEST + TAG,
        FEATURE.replace(b"(3,)", b"(2,)") + DIGEST + TAG,
    ],
    ids=[
        "empty",
        "untagged",
        "no digest",
        "short digest",
        "truncated",
        "longer",
        "libraries",
        "NaN",
        "infinite",
        "dtype",
        "shape",
    ],
)
def test_a_feature_file_that_is_not_whole_does_not_count(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f.npy").write_bytes(FEATURE + DIGEST + TAG)
    assert read_feature(tmp_path / "f.npy", 3, 32, TAG) is not None
    (tmp_path / "f.npy").write_bytes(data)
    assert read_feature(tmp_path / "f.npy", 3, 32, TAG) is None
    # Plans from before tags take features without one, and no other kind of damage.
    assert (read_feature(tmp_path / "f.npy", 3, 0, TAG, untagged=True) is not None) == (
        data in (FEATURE, FEATURE + TAG)
    )


def test_what_is_no_file_is_no_feature(tmp_path: Path) -> None:
    assert read_feature(tmp_path / "none.npy", 3, 32, TAG) is None
    assert read_feature(tmp_path, 3, 32, TAG) is None
    (tmp_path / "f.npy").write_bytes(FEATURE + TAG)
    assert read_feature(tmp_path / "f.npy", 4, 0, TAG) is None
    os.mkfifo(tmp_path / "pipe.npy")
    assert read_feature(tmp_path / "pipe.npy", 3, 32, TAG) is None, "a pipe is not waited for"
    writer = os.open(tmp_path / "pipe.npy", os.O_RDWR)
    assert read_feature(tmp_path / "pipe.npy", 3, 32, TAG) is None, "nor if somebody writes into it"
    os.close(writer)


def test_error_files_come_back_to_their_plan_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    write_error(tmp_path / "e.json", "missing", "there is no such file", "0" * 16)
    assert read_error(tmp_path / "e.json", "0" * 16) == ("missing", "there is no such file")
    assert read_error(tmp_path / "e.json", "1" * 16) is None
    assert read_error(tmp_path / "e.json", "1" * 16, unnamed=True) is None
    (tmp_path / "e.json").write_text('{"format": 1, "message": "m", "reason": "missing"}')
    assert read_error(tmp_path / "e.json", "1" * 16) is None
    assert read_error(tmp_path / "e.json", "1" * 16, unnamed=True) == ("missing", "m"), "as they were written before"
    for text in ("{", "[]", '{"format": 1}', '{"format": 9}'):
        (tmp_path / "e.json").write_text(text)
        assert read_error(tmp_path / "e.json", "0" * 16) is None


def test_a_write_that_fails_leaves_nothing_and_is_the_machines_fault(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from pipeline.store import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_atomic(Path(sys.argv[1]), [bytes(999), bytes(999)])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "f")], cwd=ROOT, capture_output=True, text=True)
    assert "MachineFault" in done.stderr
    assert os.listdir(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_an_exclusive_write_leaves_the_first_file(tmp_path: Path) -> None:
    assert write_atomic(tmp_path / "f", [b"first"], exclusive=True)
    assert not write_atomic(tmp_path / "f", [b"second"], exclusive=True)
    assert (tmp_path / "f").read_bytes() == b"first"
    assert write_atomic(tmp_path / "f", [b"third"])
    assert os.listdir(tmp_path) == ["f"]


def test_an_exclusive_write_whose_winner_is_gone_again_has_not_won(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(*names: object) -> None:
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", taken)
    assert not write_atomic(tmp_path / "f", [b"late"], exclusive=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", layout.SHARD_ENDINGS)
def test_one_flipped_bit_of_a_shard_is_found(tmp_path: Path, ending: str) -> None:
    import hashlib

    contents = whole(shard_contents(np.ones((1, 2), np.float32), np.zeros((1, 32), np.uint8), ["a"], ["a"]))
    for name, data in contents.items():
        layout.shard_file(tmp_path, 0, name).write_bytes(data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    record = Record(0, 1, 2, "float32", digests, "fp", "plan", 0, {}, ())
    check_shard(tmp_path, record)
    path = layout.shard_file(tmp_path, 0, ending)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardCorrupt, match=path.name):
        check_shard(tmp_path, record)
    path.unlink()
    with pytest.raises(ShardCorrupt, match=f"no {path.name}"):
        check_shard(tmp_path, record)


def test_shards_are_listed_by_number_also_above_9999(tmp_path: Path) -> None:
    for number in (2, 10000, 999):
        layout.record_file(tmp_path, number).write_text("{}")
    (tmp_path / "gallery.json").write_text("{}")
    assert recorded_shards(tmp_path) == [2, 999, 10000]


ODD = {
    "empty": b"",
    "text": b"{",
    "list": b"[]",
    "no object": b"3",
    "no format": b"{}",
    "other format": b'{"format": "1"}',
    "bool format": b'{"format": true}',
    "deep": b"[" * 100_000,
    "not UTF-8": b'{"format": 1, "a": "\xff"}',
    "NaN": b'{"format": 1, "a": NaN}',
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD.keys())
def test_json_that_is_not_as_it_must_be_is_damaged_in_one_line(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(FileDamaged, match=r"x\.json is damaged"):
        read_json(tmp_path / "x.json")


def test_what_is_no_regular_file_is_read_and_waited_for_by_nobody(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "dangling.json").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.json")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("folder", "loop", "dangling", "pipe"):
        with pytest.raises(FileDamaged, match=f"{name}.json is not a file"):
            read_json(tmp_path / f"{name}.json")
    assert len(os.listdir("/proc/self/fd")) == before, "no descriptor stays open"
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FileDamaged, match=r"huge\.json is too large"):
        read_json(tmp_path / "huge.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": "2"},
        {"rows": -1},
        {"rows": 1e30},
        {"length": 0},
        {"shard": 8},
        {"shard": True},
        {"sha256": None},
        {"sha256": {}},
        {"sha256": {"paths.txt": "p"}},
        {"sha256": {"features.npy": "f", "object_ids.npy": "o", "paths.txt": "p"}},
        {"format": 1},
        {"sha256": {"../x": "f"}},
        {"versions": {"numpy": 2}},
        {"failed": [{"path": "x"}]},
        {"failed": {}},
        {"failed": [None]},
        {"fingerprint": 3},
        {"plan": ["x"]},
    ],
    ids=str,
)
def test_a_record_of_other_types_is_damaged(tmp_path: Path, change: dict[str, object]) -> None:
    record = Record(7, 2, 1, "float32", dict.fromkeys(layout.SHARD_ENDINGS, "f"), "fp", "plan", 3, {"numpy": "2"}, ())
    write_record(tmp_path, record)
    path = tmp_path / "0007.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FileDamaged, match=r"0007\.json is damaged.*ruiji verify --repair"):
        read_record(tmp_path, 7)


def test_a_record_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    record = Record(7, 2, 1, "float32", dict.fromkeys(layout.SHARD_ENDINGS, "f"), "fp", "plan", 3, {"numpy": "2"}, ())
    write_record(tmp_path, replace(record, format=3))
    with pytest.raises(GalleryMismatch, match=r"0007\.json has format 3.*up to 2; update ruiji"):
        read_record(tmp_path, 7)


def test_a_record_that_lacks_a_field_is_damaged_and_one_with_more_is_read(tmp_path: Path) -> None:
    record = Record(7, 2, 1, "float32", dict.fromkeys(layout.SHARD_ENDINGS, "f"), "fp", "plan", 3, {"numpy": "2"}, ())
    write_record(tmp_path, record)
    path = tmp_path / "0007.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "surprise": 1}))
    assert read_record(tmp_path, 7) == record
    del value["fingerprint"]
    path.write_text(json.dumps(value))
    with pytest.raises(FileDamaged, match="fingerprint"):
        read_record(tmp_path, 7)


def test_a_folder_in_the_way_is_reported(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(MachineFault, match="directory"):
        write_atomic(tmp_path / "f", [b"x"])
    assert os.listdir(tmp_path) == ["f"]


RECORD = Record(
    7,
    2,
    1,
    "float32",
    dict.fromkeys(layout.SHARD_ENDINGS, "d"),
    "fp",
    "plan",
    3,
    {"numpy": "2"},
    (Failure("b", "x/b", "missing", "there is no such file"),),
)


@given(changed(json.loads(to_json(asdict(RECORD)))).map(to_text) | damaged(to_json(asdict(RECORD))))
@settings(max_examples=examples(200))
def test_any_record_is_read_or_damaged(tmp_path: Path, data: bytes) -> None:
    layout.record_file(tmp_path, 7).write_bytes(data)
    with contextlib.suppress(GalleryMismatch):
        assert read_record(tmp_path, 7).shard == 7


def test_a_number_has_one_name(tmp_path: Path) -> None:
    for name in ("0002.json", "00002.json", "\u0660\u0660\u0660\u0662.json", "0002.json.json"):
        (tmp_path / name).write_text("{}")
    assert recorded_shards(tmp_path) == [2]


def test_a_pipe_in_the_place_of_a_shards_file_is_waited_for_by_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0007.features.npy")
    with pytest.raises(ShardCorrupt, match=r"no 0007\.features\.npy"):
        check_shard(tmp_path, RECORD)
