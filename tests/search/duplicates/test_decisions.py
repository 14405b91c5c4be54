"""The decisions file: literal bytes, torn lines, damage, writers at once and killed ones."""

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.errors import FileDamaged, GalleryMismatch, MachineFault, RuijiError, UsageError
from search.duplicates.decisions import (
    DecidedObject,
    Decision,
    DecisionsFile,
    Verdict,
    append_decisions,
    read_decisions,
)
from tests.chaos.harness import sized
from tests.conftest import ROOT
from tests.factories import wait_until
from tests.properties import changed, damaged, examples, to_text
from tests.search.galleries import write_article_shard

TIME = "2026-11-29T08:00:00Z"
#: The objects that deciders are told about.
TOLD = [f"{number:04d}" for number in range(2000)]
A = DecidedObject("cat/a.jpg", sha256="5f" * 32)
B = DecidedObject("cat/ä b.jpg", sha256="c0" * 32, alone=True)
C = DecidedObject("c.jpg")
LINES = (
    Decision(Verdict.same, (A, B, C), TIME, ObjectIds.basename),
    Decision(Verdict.different, (A, C), TIME, ObjectIds.path),
    Decision(Verdict.undo, (DecidedObject(id="\udc80.jpg"),), TIME),
)
BYTES = (
    '{"format": 1, "time": "2026-11-29T08:00:00Z", "decision": "same", "object_id": "basename", '
    f'"keep": {{"path": "cat/a.jpg", "sha256": "{"5f" * 32}"}}, '
    f'"remove": [{{"path": "cat/ä b.jpg", "sha256": "{"c0" * 32}", "alone": true}}, {{"path": "c.jpg"}}]}}\n'
    '{"format": 1, "time": "2026-11-29T08:00:00Z", "decision": "different", "object_id": "path", '
    f'"objects": [{{"path": "cat/a.jpg", "sha256": "{"5f" * 32}"}}, {{"path": "c.jpg"}}]}}\n'
    '{"format": 1, "time": "2026-11-29T08:00:00Z", "decision": "undo", "object_id": null, '
    '"objects": [{"id": "\\udc80.jpg"}]}\n'
).encode()


def different(name: str) -> Decision:
    return Decision(Verdict.different, (DecidedObject(f"{name}.jpg"), DecidedObject("other.jpg")), TIME)


def names(file: Path) -> list[str]:
    return [one.objects[0].name.removesuffix(".jpg") for one in read_decisions(file)]


def test_the_file_has_these_bytes_and_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "new" / "decisions.jsonl"
    file.parent.mkdir()
    append_decisions(file, LINES[:1])
    append_decisions(file, LINES[1:])
    append_decisions(file, [])
    assert file.read_bytes() == BYTES
    assert tuple(read_decisions(file)) == LINES
    assert read_decisions(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("twice", [False, True], ids=["cut", "cut-twice"])
def test_a_line_cut_at_any_byte_counts_for_nothing_and_no_other_is_lost(tmp_path: Path, twice: bool) -> None:
    file = tmp_path / "decisions.jsonl"
    lines = (Decision(Verdict.skip, (DecidedObject("ä"), C)), Decision(Verdict.same, (C, DecidedObject("b"))))
    append_decisions(file, lines)
    data = file.read_bytes()
    ends = list(itertools.accumulate(len(line) + 1 for line in data.splitlines()))
    for cut in range(len(data) + 1):
        whole = sum(end <= cut for end in ends)
        file.write_bytes(data[:cut])
        assert tuple(read_decisions(file)) == lines[:whole], cut
        if twice:
            # The one that ended it was killed too, in the middle of its mark or of its line.
            append_decisions(file, [different("lost")])
            os.truncate(file, cut + random.Random(cut).randrange(1, file.stat().st_size - cut))
        append_decisions(file, [different("next")])
        assert tuple(read_decisions(file)) == (*lines[:whole], different("next")), cut


def test_zeros_of_a_power_cut_are_a_line_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "decisions.jsonl"
    file.write_bytes(BYTES + b"\0" * 500)
    assert tuple(read_decisions(file)) == LINES
    append_decisions(file, [different("next")])
    assert tuple(read_decisions(file)) == (*LINES, different("next"))


def line(decision: str, rest: str) -> bytes:
    return f'{{"format": 1, "time": "", "decision": "{decision}", {rest}}}'.encode()


@pytest.mark.parametrize(
    ("damaged", "kind", "told"),
    [
        (b"{", FileDamaged, "line 2 of .* is damaged; restore"),
        (b"[]", FileDamaged, "damaged"),
        (b"\xff", FileDamaged, "damaged"),
        (b'{"format": 2, "decision": "merged"}', GalleryMismatch, "line 2 of .*format 2.*update ruiji"),
        (b'{"format": true}', FileDamaged, "not a number"),
        (line("maybe", '"objects": []'), FileDamaged, "decision"),
        (line("skip", '"objects": [{"path": "a"}]'), FileDamaged, "two objects"),
        (line("undo", '"objects": []'), FileDamaged, "one object"),
        (line("skip", '"objects": [{"path": "a"}, {}]'), FileDamaged, "neither path"),
        (line("same", '"keep": {"path": "a"}, "remove": [{"path": "a"}]'), FileDamaged, "twice"),
        (line("same", '"remove": [{"path": "a"}]'), FileDamaged, "two objects"),
        (line("same", '"keep": {"path": "a"}, "remove": [{"path": "../b"}]'), FileDamaged, "outside"),
        (line("same", '"keep": {"path": "a"}, "remove": [{"path": "/b"}]'), FileDamaged, "absolute"),
        (line("skip", '"objects": [{"path": "a", "sha256": "5F"}, {"path": "b"}]'), FileDamaged, "no sha256"),
        (b"[" * 100_000, FileDamaged, "damaged"),
    ],
)
def test_a_damaged_line_is_said_and_nothing_is_guessed(
    tmp_path: Path, damaged: bytes, kind: type[RuijiError], told: str
) -> None:
    file = tmp_path / "decisions.jsonl"
    file.write_bytes(BYTES.splitlines(keepends=True)[0] + damaged + b"\n" + BYTES)
    with pytest.raises(kind, match=told):
        read_decisions(file)


def test_a_file_that_is_read_again_is_what_it_is_now(tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    file = DecisionsFile(path)
    assert file.read() == []
    append_decisions(path, LINES)
    first = file.read()
    assert tuple(first) == LINES
    with path.open("ab") as torn:
        torn.write(BYTES[:30])
    append_decisions(path, [different("next")])
    again = file.read()
    assert again == [*first, different("next")] == read_decisions(path)
    # What was known is not parsed anew; and what somebody changed, or took away, is.
    assert all(one is other for one, other in zip(first, again, strict=False))
    path.write_bytes(path.read_bytes().replace(b"next", b"last"))
    assert file.read() == [*first, different("last")]
    path.write_bytes(BYTES[: BYTES.index(b"\n") + 1])
    assert file.read() == first[:1]
    path.unlink()
    assert file.read() == []


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", tmp_path):
        with pytest.raises(UsageError, match="not a regular file"):
            read_decisions(place)
        with pytest.raises(UsageError, match="not a regular file"):
            append_decisions(place, LINES)


def test_a_full_disk_is_said_and_nothing_that_was_there_is_lost(tmp_path: Path) -> None:
    file = tmp_path / "decisions.jsonl"
    append_decisions(file, LINES)
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.search.duplicates.test_decisions import BYTES, different\n"
        "from search.duplicates.decisions import append_decisions\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (len(BYTES) + 20,) * 2)\n"
        "append_decisions(Path(sys.argv[1]), [different('full')])\n"
    )
    done = subprocess.run([sys.executable, "-c", script, file], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("pipeline.errors.MachineFault: cannot write")
    assert file.read_bytes().startswith(BYTES) and tuple(read_decisions(file)) == LINES
    append_decisions(file, [different("next")])
    assert tuple(read_decisions(file)) == (*LINES, different("next"))


def test_bytes_that_are_not_there_when_they_are_read_back_are_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "decisions.jsonl"
    append_decisions(file, LINES)
    real = os.fsync

    def overwritten(descriptor: int) -> None:
        with file.open("r+b") as other:
            other.seek(len(BYTES) + 5)
            other.write(b"?")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", overwritten)
    with pytest.raises(MachineFault, match="another process wrote"):
        append_decisions(file, [different("mine")])


def test_a_writer_that_was_taken_for_dead_before_it_wrote_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "decisions.jsonl"
    append_decisions(file, LINES)
    real = os.pread

    def slept(descriptor: int, length: int, offset: int) -> bytes:
        layout.writer_lock_file(layout.writer_lock_folder(file), 99).write_bytes(b"")
        return real(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", slept)
    with pytest.raises(MachineFault, match="slept"):
        append_decisions(file, [different("mine")])
    assert file.read_bytes() == BYTES


def test_writers_at_once_lose_nothing_of_each_other(tmp_path: Path) -> None:
    file = tmp_path / "decisions.jsonl"

    def work(writer: int) -> None:
        for number in range(20):
            append_decisions(file, [different(f"{writer}-{number}-{part}") for part in "ab"])

    threads = [threading.Thread(target=work, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = names(file)
    assert sorted(found) == sorted(
        f"{writer}-{number}-{part}" for writer in range(4) for number in range(20) for part in "ab"
    )
    for writer in "0123":
        mine = [name for name in found if name.startswith(writer)]
        assert mine == [f"{writer}-{number}-{part}" for number in range(20) for part in "ab"], "in their order"


@pytest.mark.chaos
def test_killed_deciders_lose_no_decision_that_was_confirmed_and_invent_none_in_the_long_form(tmp_path: Path) -> None:
    kill_deciders(shards(tmp_path), tmp_path, sized(20, 200))


def test_killed_deciders_lose_no_decision_that_was_confirmed_and_invent_none(tmp_path: Path) -> None:
    kill_deciders(shards(tmp_path), tmp_path, 20)


def shards(tmp_path: Path) -> Path:
    """A gallery of all objects that deciders are told about."""
    write_article_shard(tmp_path / "shards", 0, np.ones((len(TOLD), 2), np.float32), TOLD)
    return tmp_path / "shards"


def kill_deciders(
    folder: Path,
    tmp_path: Path,
    kills: int,
    options: Sequence[str | Path] = (),
    decision: Callable[[str, str], dict[str, Any]] = lambda one, other: {
        "decision": "different",
        "objects": [one, other],
    },
) -> list[Decision]:
    """Two commands decide at a time; one after the other is killed at a random moment.

    Args:
        folder: of the gallery, whose objects are `TOLD`.
        options: of the command.
        decision: about two objects; the first one is the gallery's.

    Returns:
        What is decided in the end.
    """
    file, rng = layout.decisions_file(folder), random.Random(0)
    command = [sys.executable, "-m", "pipeline", "duplicates", "decide", "--feature-dir", folder, *options]

    def start(number: int) -> tuple["subprocess.Popen[bytes]", threading.Thread, Path]:
        out = tmp_path / f"{number}.out"
        with out.open("wb") as stdout:
            process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.DEVNULL
            )
        thread = threading.Thread(target=feed, args=(process, number))
        thread.start()
        return process, thread, out

    def feed(process: "subprocess.Popen[bytes]", number: int) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            for other in range(1000, 2000):
                process.stdin.write(json.dumps(decision(f"{number:04d}", f"{other}")).encode() + b"\n")
                if rng.random() < 0.2:
                    process.stdin.flush()
                    threading.Event().wait(0.002)

    confirmed: dict[int, int] = {}
    deciders = [start(0)]
    for number in range(kills):
        deciders.append(start(number + 1))
        process, thread, out = deciders.pop(0)
        wait_until(lambda out=out: out.stat().st_size, what="its first decision")  # type: ignore[misc]
        threading.Event().wait(rng.random() * 0.1)
        process.kill()
        process.wait()
        thread.join()
        confirmed[number] = out.read_bytes().count(b"\n")
    process, thread, _ = deciders.pop()
    process.kill()
    process.wait()
    thread.join()
    decided = read_decisions(file)
    found = [[one.name for one in sorted(each.objects, key=lambda one: one.gallery or "")] for each in decided]
    for number, count in confirmed.items():
        own = [other for one, other in found if one == f"{number:04d}"]
        assert own == TOLD[1000 : 1000 + len(own)], "only what was asked for, once, in its order"
        assert len(own) >= count > 0, "none is lost that was confirmed"
    return decided


SOUND = json.loads(BYTES.splitlines()[0])


@given(changed(SOUND).map(to_text) | damaged(to_text(SOUND)))
@settings(max_examples=examples(200))
def test_any_line_is_a_decision_or_damaged(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "decisions.jsonl"
    file.write_bytes(to_text(SOUND) + b"\n")
    before = read_decisions(file)
    file.write_bytes(to_text(SOUND) + b"\n" + data + b"\n")
    with contextlib.suppress(GalleryMismatch):
        assert read_decisions(file)[:1] == before
