"""Many small files in one call: what Python would have done, and at the least oddity left to it untouched."""

import ctypes
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from pipeline import compiled, small_files
from pipeline.errors import MachineFault
from pipeline.store import (
    Embedded,
    read_feature,
    read_features,
    remove_files,
    versions_tag,
    write_feature,
    write_features,
)
from tests.sanitized import run_sanitized
from workers.decode.files import open_image

ROOT = Path(__file__).resolve().parents[2]
TAG, LENGTH = versions_tag({"numpy": "2"}), 5
needs_compiled = pytest.mark.skipif(find_spec("pipeline._small_files") is None, reason="it was not compiled")


@pytest.fixture(params=["compiled", "left to Python"], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled library and without: all tests hold for both."""
    if request.param == "compiled" and find_spec("pipeline._small_files") is None:
        pytest.skip("it was not compiled")
    if request.param != "compiled":
        monkeypatch.setattr(small_files, "_library", lambda: "there was no compiler")
    return str(request.param)


def embedded(number: int) -> Embedded:
    random = np.random.default_rng(number)
    return Embedded(random.normal(size=LENGTH).astype(np.float32), random.bytes(32))


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_it_was_compiled_where_there_is_a_compiler(library: None) -> None:
    assert find_spec("pipeline._small_files"), "install ruiji again: make clean setup"


def test_whole_files_are_read_and_no_others(tmp_path: Path, library: str) -> None:
    media, outside = tmp_path / "média", tmp_path / "média-outside"
    for folder in (media, outside):
        folder.mkdir()
    contents = {"a.jpg": b"a" * 1000, "empty.jpg": b"", "ü.jpg": b"u", "last.jpg": b"z" * 70_000}
    for name, data in contents.items():
        (media / name).write_bytes(data)
    (outside / "x.jpg").write_bytes(b"secret")
    os.mkfifo(media / "pipe.jpg")
    (media / "folder.jpg").mkdir()
    (media / "in.jpg").symlink_to(media / "a.jpg")
    (media / "out.jpg").symlink_to(outside / "x.jpg")
    (media / "large.jpg").write_bytes(bytes(small_files.READ_BYTES))
    odd = ["none.jpg", "pipe.jpg", "folder.jpg", "out.jpg", "large.jpg", "a.jpg/", "../média-outside/x.jpg"]
    names = [*contents, "in.jpg", *odd, "a.jpg"]
    assert small_files.read_whole(["/proc/self/limits"], "/proc") == [None], "it is longer than it said"
    read = small_files.read_whole([f"{media}/{name}" for name in names], str(media))
    expected = [*contents.values(), contents["a.jpg"], *[None] * len(odd), contents["a.jpg"]]
    if library != "compiled":
        expected = [None] * len(names)
    assert [None if one is None else bytes(one) for one in read] == expected
    # As Python does: each one that is read is one that it would have read.
    for name, one in zip(names, read, strict=True):
        if one is not None:
            assert open_image(media / name, str(media)).read() == bytes(one)


@needs_compiled
def test_no_more_is_read_than_there_is_memory_for_and_the_rest_is_left(tmp_path: Path, library: str) -> None:
    if library != "compiled":
        pytest.skip("nothing is read")
    sizes = [small_files.READ_BYTES // 2, small_files.READ_BYTES // 2, 10, small_files.READ_BYTES // 2 - 11, 1]
    for number, size in enumerate(sizes):
        (tmp_path / str(number)).write_bytes(bytes([number]) * size)
    read = small_files.read_whole([f"{tmp_path}/{number}" for number in range(5)], str(tmp_path))
    # One byte more than each has is asked for, in case that it grows.
    assert [one is not None for one in read] == [True, False, True, True, False]
    assert all(one is None or bytes(one) == bytes([n]) * sizes[n] for n, one in enumerate(read))


def test_a_path_that_holds_a_nul_is_left_to_python(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    paths = [f"{tmp_path}/a\0{tmp_path}/a", f"{tmp_path}/a"]
    assert small_files.read_whole(paths, str(tmp_path)) == [None, None]
    assert not small_files.remove(paths).any() and (tmp_path / "a").exists()
    assert not small_files.write_whole(paths, paths, np.zeros((2, 3), np.uint8)).any()
    assert (tmp_path / "a").read_bytes() == b"a"


def test_features_are_written_as_one_by_one_whatever_folders_are_there(tmp_path: Path) -> None:
    wanted = {f"{tmp_path}/{number % 7:02d}/{number:03d}/f.npy": embedded(number) for number in range(600)}
    (tmp_path / "00").mkdir()
    (tmp_path / "01" / "001").mkdir(parents=True)
    (tmp_path / "01" / "001" / "f.npy").write_bytes(b"from before")
    write_features(wanted, TAG)
    for path, each in wanted.items():
        write_feature(tmp_path / "one.npy", each, TAG)
        assert Path(path).read_bytes() == (tmp_path / "one.npy").read_bytes()
    assert len(list(tmp_path.rglob("*"))) == 7 + 600 + 600 + 1, "nothing half-written is left"


def test_a_feature_that_cannot_be_written_is_the_machines_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    wanted = {f"{tmp_path}/{name}/f.npy": embedded(0) for name in ("before", "file", "after")}
    with pytest.raises(MachineFault, match=r"cannot write .*/file/f\.npy"):
        write_features(wanted, TAG)
    (tmp_path / "taken" / "f.npy" / "inside").mkdir(parents=True)
    with pytest.raises(MachineFault, match=r"cannot write .*/taken/f\.npy"):
        write_features({f"{tmp_path}/taken/f.npy": embedded(0)}, TAG)
    assert os.listdir(tmp_path / "taken") == ["f.npy"], "nothing half-written is left"


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/self/mounts").exists(), reason="no disk can be mounted here")
def test_a_disk_that_fills_up_keeps_what_was_whole_and_nothing_else(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", disk], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        with pytest.raises(MachineFault, match="No space left"):
            write_features({f"{disk}/{number}.npy": embedded(number) for number in range(100)}, TAG)
        there = sorted(disk.iterdir(), key=lambda path: int(path.stem))
        assert 0 < len(there) < 100
        assert all(read_feature(path, LENGTH, 32, TAG) is not None for path in there)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_features_are_read_as_one_by_one(tmp_path: Path) -> None:
    paths = [f"{tmp_path}/{number}.npy" for number in range(700)]
    whole = {path: embedded(number) for number, path in enumerate(paths)}
    write_features(whole, TAG)
    original = Path(paths[0]).read_bytes()
    damage: list[bytes | None] = [None, b"", original[:-1], original + b"x", original[:-16], original[:-48]]
    damage += [original[:-17] + b"x" * 17, b"\x93NUMPX" + original[6:], original[:-16] + bytes(16)]
    for number, data in enumerate(damage):
        Path(paths[10 * number]).unlink()
        if data is not None:
            Path(paths[10 * number]).write_bytes(data)
    for number, bad in ((300, np.nan), (301, np.inf)):
        feature, digest = whole[paths[number]]
        write_feature(paths[number], Embedded(np.where(np.arange(LENGTH) == 3, bad, feature), digest), TAG)
    Path(paths[400]).unlink()
    Path(paths[400]).mkdir()
    Path(paths[401]).unlink()
    os.mkfifo(paths[401])
    for digest_bytes, untagged in ((32, False), (32, True), (0, False), (0, True)):
        features, digests, there = read_features(paths, LENGTH, digest_bytes, TAG, untagged)
        assert features.shape == (700, LENGTH) and digests.shape == (700, digest_bytes)
        for row, path in enumerate(paths):
            one = read_feature(path, LENGTH, digest_bytes, TAG, untagged)
            assert there[row] == (one is not None), path
            if one is not None:
                assert (features[row] == one.feature).all() and digests[row].tobytes() == one.digest
    assert there.sum() == 1, "one has no digest and no tag"
    none = read_features([], LENGTH, 32, TAG)
    assert [len(part) for part in none] == [0, 0, 0]


def test_files_are_removed_that_are_there_and_a_fault_is_told(tmp_path: Path) -> None:
    paths = [f"{tmp_path}/{number}" for number in range(600)]
    for path in paths[::2]:
        Path(path).write_bytes(b"")
    remove_files([*paths, f"{tmp_path}/none/x"])
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder").mkdir()
    Path(paths[1]).write_bytes(b"")
    with pytest.raises(IsADirectoryError):
        remove_files([f"{tmp_path}/folder", paths[1]])


@needs_compiled
def test_a_library_of_another_version_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "x.c").write_text("void ruiji_read_file_rows(void) {}")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "x.so", tmp_path / "x.c"], check=True)
    found = find_spec("json")
    assert found is not None
    found.origin = str(tmp_path / "x.so")
    monkeypatch.setattr(compiled, "find_spec", lambda name: found)
    answer = compiled.load("pipeline._small_files", small_files._FUNCTIONS)
    assert isinstance(answer, str) and "install ruiji again" in answer
    assert not isinstance(answer, ctypes.CDLL)


def test_without_the_library_nothing_is_missing() -> None:
    code = (
        "import sys; sys.modules['pipeline._small_files'] = None\n"
        "from pipeline import small_files\n"
        "assert 'no C compiler' in small_files._library()\n"
        "assert small_files.read_whole(['/etc/hostname'], '/etc') == [None]\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_it_is_compiled_without_a_warning_and_reads_and_writes_nothing_else(tmp_path: Path) -> None:
    """Every read and write is checked by the compiler's own sanitizers, with rooms that end with what belongs there."""
    program = """
        #include <stdint.h>
        #include <stdlib.h>
        #include <string.h>
        void ruiji_read_whole_files(int64_t, const char *, const char *, char *, int64_t, int64_t *);
        void ruiji_read_file_rows(int64_t, const char *, char *, int64_t, char *, int64_t, char *, int64_t, int64_t *);
        void ruiji_write_whole_files(int64_t, const char *, const char *, const char *, int64_t, uint8_t *);
        void ruiji_remove_files(int64_t, const char *, uint8_t *);
        static char *copy(const char *from, size_t bytes) { return memcpy(malloc(bytes), from, bytes); }
        int main(int count, char **given) {
            /* The folder that it is given is resolved and ends with a slash. */
            const char raw_names[] = "./deep/a\\0./b\\0./no/such/c", raw_temporaries[] = "./deep/t\\0./u\\0./no/such/v";
            char *names = copy(raw_names, sizeof raw_names), *new = copy(raw_temporaries, sizeof raw_temporaries);
            char *contents = malloc(30), *room = malloc(21), *heads = malloc(9), *rows = malloc(12), *tails = malloc(9);
            int64_t *sizes = malloc(3 * sizeof *sizes);
            uint8_t *flags = malloc(3);
            memset(contents, 7, 30);
            ruiji_write_whole_files(3, new, names, contents, 10, flags);
            if (count != 2 || !flags[0] || !flags[1] || flags[2]) return 1;
            ruiji_read_whole_files(3, names, given[1], room, 21, sizes);
            if (sizes[0] != 10 || sizes[1] != 10 || sizes[2] != -1 || room[19] != 7) return 2;
            ruiji_read_whole_files(3, names, given[1], room, 20, sizes);
            if (sizes[0] != 10 || sizes[1] != -1) return 3;
            ruiji_read_whole_files(3, names, "/elsewhere/", room, 21, sizes);
            if (sizes[0] != -1) return 4;
            ruiji_read_file_rows(3, names, heads, 3, rows, 4, tails, 3, sizes);
            if (sizes[0] != 10 || sizes[2] != -1 || tails[5] != 7) return 5;
            ruiji_remove_files(3, names, flags);
            char *deep = malloc(6000);
            memset(deep, 'd', 6000);
            deep[4999] = '/', deep[5999] = 0;
            ruiji_write_whole_files(1, deep, deep, contents, 10, flags + 1);
            return !flags[0] || flags[1];
        }
        """
    run_sanitized(tmp_path, program, ROOT / "pipeline" / "_small_files.c", arguments=(f"{tmp_path.resolve()}/",))
