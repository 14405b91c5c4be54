"""`ruiji duplicates` as a user meets it: decide, undo, status, and lists that only name what can go."""

import csv
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from pipeline import layout
from pipeline.arguments import Commands
from pipeline.choices import ObjectIds
from pipeline.errors import FileDamaged, RuijiError, UsageError
from pipeline.gallery import claim_gallery
from pipeline.model import Model, load_model
from pipeline.objects import IdScheme
from search.cli import register
from search.duplicates.cli import _batches
from search.duplicates.decisions import append_decisions, read_decisions
from search.duplicates.removal import LeftOut, ListedFile
from search.options import FileFormat
from search.requests.duplicates import DecisionsRequest, file_lines, left_out_lines
from search.requests.duplicates import decide as decide_lines
from search.requests.selection import Selection
from tests.conftest import ROOT
from tests.factories import wait_until
from tests.search.duplicates.test_decisions import different
from tests.search.galleries import forget_digests, write_article_shard, write_shard

#: Of each content so many files: a.png is alone, b1.png and b2.png have the same bytes.
FILES = {"cat/a.png": b"a" * 100, "cat/b1.png": b"b" * 20, "dog/b2.png": b"b" * 20, "dog/c.png": b"c" * 3}


@dataclass
class World:
    """A media folder with its gallery, and the command on it."""

    media: Path
    features: Path
    model: Model
    digests: bool = True

    @property
    def file(self) -> Path:
        return self.features / "decisions.jsonl"

    def run(self, *arguments: str | Path, stdin: str = "", media: bool = True) -> Result:
        app = Commands()
        register(app)
        given = [*arguments, "--feature-dir", self.features, "--model", self.model.path]
        given += ["--media-dir", self.media] if media else []
        return CliRunner().invoke(app, ["duplicates", *map(str, given)], input=stdin)

    def decide(self, *decisions: object) -> Result:
        result = self.run("decide", stdin="".join(json.dumps(one) + "\n" for one in decisions))
        assert result.exit_code == 0, result.output
        return result

    def refused(self, *arguments: str | Path, stdin: str = "", media: bool = True) -> str:
        result = self.run(*arguments, stdin=stdin, media=media)
        assert isinstance(result.exception, RuijiError) and result.exception.exit_code == 2, result.output
        return str(result.exception)

    def listed(self, which: str = "--remove", code: int = 0) -> list[str]:
        result = self.run("list", which)
        assert result.exit_code == code, result.output
        return [str(Path(line).relative_to(self.media)) for line in result.stdout.splitlines()]


@pytest.fixture(params=["digests", "before-digests"])
def world(tmp_path: Path, model_path: Path, request: pytest.FixtureRequest) -> World:
    made = World(tmp_path / "media", tmp_path / "features", load_model(model_path))
    for path, data in FILES.items():
        (made.media / path).parent.mkdir(parents=True, exist_ok=True)
        (made.media / path).write_bytes(data)
    angles = np.radians([0, 1, 1, 40])
    features = np.zeros((4, made.model.spec.length), np.float32)
    features[:, 0], features[:, 1] = np.cos(angles), np.sin(angles)
    folder = layout.gallery_folder(made.features, made.model.path)
    claim_gallery(folder, made.model, IdScheme(ObjectIds.basename))
    digests = np.array([list(hashlib.sha256(data).digest()) for data in FILES.values()], np.uint8)
    for number, rows in enumerate((slice(0, 3), slice(3, 4))):
        paths = list(FILES)[rows]
        write_shard(folder, number, features[rows], paths, made.model.fingerprint, digests=digests[rows])
    if request.param == "before-digests":
        forget_digests(folder)
        made.digests = False
    return made


SAME = {"decision": "same", "keep": "a.png", "remove": ["b1.png", "c.png"]}


def test_decisions_from_stdin_are_confirmed_one_by_one_and_kept_with_paths_and_digests(world: World) -> None:
    result = world.decide(SAME, {"decision": "different", "objects": ["b1.png", "b2.png"], "more": 1})
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"line": 1, "decision": "same", "objects": 3},
        {"line": 2, "decision": "different", "objects": 2},
    ]
    assert result.stderr == (
        f"2 decisions recorded in {world.file}; run ruiji near-duplicates again until it says that nothing is open\n"
    )
    first, second = map(json.loads, world.file.read_text().splitlines())
    assert first["keep"]["path"] == "cat/a.png" and first["object_id"] == "basename"
    assert [one["path"] for one in first["remove"]] == ["cat/b1.png", "dog/c.png"]
    assert second["objects"][0]["sha256"] == first["remove"][0]["sha256"] == second["objects"][1]["sha256"]
    # Of old galleries nobody knows without reading every file.
    alone = ["alone" in one for one in (first["keep"], *first["remove"])]
    assert alone == ([True, False, True] if world.digests else [False] * 3)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["time"])


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("nonsense", "line 2: it is no decision"),
        ('{"decision": "merge", "objects": ["a.png", "c.png"]}', "it is no decision"),
        ('{"decision": "different", "objects": "a.png"}', "it is no decision"),
        ('{"decision": "different", "objects": ["a.png"]}', "two objects or more"),
        ('{"decision": "different", "objects": ["a.png", "a.png"]}', "twice"),
        ('{"decision": "different", "objects": ["a.png", "x.png"]}', "the gallery has no object x.png"),
        ('{"decision": "different", "objects": ["a.png", "b2.png\\u0000"]}', "the gallery has no object b2.png\0"),
        ('{"decision": "same", "keep": "b2.png\\u0000", "remove": ["c.png"]}', "the gallery has no object b2.png\0"),
        ('{"decision": "undo", "objects": ["b2.png\\u0000"]}', "the gallery has no object b2.png\0"),
        ('{"decision": "different", "keep": "a.png", "remove": ["c.png"]}', "neither keep nor remove"),
        ('{"decision": "same", "objects": ["a.png", "c.png"]}', "same has keep"),
        ('{"decision": "same", "keep": "a.png", "remove": []}', "two objects or more"),
        ('{"decision": "same", "keep": "a.png", "remove": ["a.png"]}', "twice"),
        ('{"decision": "skip", "objects": []}', "two objects or more"),
    ],
)
def test_a_line_that_is_no_decision_is_named_and_those_before_it_are_kept(world: World, line: str, told: str) -> None:
    result = world.run("decide", stdin=f"{json.dumps(SAME)}\n{line}\n{json.dumps(SAME)}\n")
    assert isinstance(result.exception, UsageError)
    assert told in str(result.exception) and "line 2" in str(result.exception)
    assert "nothing from this line on is recorded" in str(result.exception)
    assert [json.loads(line)["line"] for line in result.stdout.splitlines()] == [1]
    assert len(read_decisions(world.file)) == 1


def test_a_line_that_others_have_overtaken_stops_and_one_that_says_the_same_does_not(world: World) -> None:
    shown = [{**SAME, "seen": 0}, {"decision": "same", "keep": "b1.png", "remove": ["b2.png"], "seen": 0}]
    world.decide(*shown)
    # After a kill, the same lines are sent again; and what one run decides, it may change.
    world.decide(*shown, {"decision": "skip", "objects": ["b1.png", "b2.png"], "seen": 2})
    world.decide({"decision": "skip", "objects": ["b1.png", "c.png"], "seen": 5}, {**SAME, "seen": 5})
    for late in (
        {"decision": "same", "keep": "c.png", "remove": ["b1.png", "a.png"]},
        {"decision": "same", "keep": "a.png", "remove": ["c.png"]},
        {"decision": "undo", "objects": ["b1.png", "a.png"]},
    ):
        text = "".join(json.dumps(one) + "\n" for one in ({**SAME, "seen": 5}, {**late, "seen": 5}, SAME))
        result = world.run("decide", stdin=text)
        assert isinstance(result.exception, UsageError) and len(result.stdout.splitlines()) == 1
        told = str(result.exception)
        assert told.startswith("line 2: somebody has decided about ") and "since they were shown: same, 20" in told
        assert told.endswith("; run ruiji near-duplicates again; nothing from this line on is recorded")
    world.decide({"decision": "undo", "objects": ["a.png"]})
    world.decide({"decision": "different", "objects": ["a.png", "c.png"], "seen": 5})
    for none in (-1, 99):
        assert f"it has seen {none} decisions" in world.refused("decide", stdin=json.dumps({**SAME, "seen": none}))


def test_a_line_about_another_picture_than_was_shown_is_refused(world: World) -> None:
    digests = {
        one: hashlib.sha256(FILES[f"{folder}/{one}"]).hexdigest()
        for folder, one in (("cat", "a.png"), ("dog", "c.png"))
    }
    members = [{"object_id": one, "sha256": digest} for one, digest in digests.items()]
    line = {"decision": "different", "objects": ["a.png", "c.png"], "seen": 0, "members": members}
    world.decide(line)
    # As if it had been embedded again since.
    members[1]["sha256"] = "0" * 64
    if world.digests:
        said = (
            "line 1: c.png is another picture now than the one that was shown; run ruiji near-duplicates again; nothing"
        )
        assert said in world.refused("decide", stdin=json.dumps(line))
    else:
        world.decide(line)
    # What is said of others, or of a reference, is not about these.
    members[1] |= {"gallery": "reference"}
    world.decide(line, {**line, "members": [{"object_id": "b1.png", "sha256": "0" * 64, "path": "b1.png"}]})


def test_of_many_at_once_who_have_seen_the_same_one_decides(world: World) -> None:
    def decide(keep: str) -> bool:
        gone = [one for one in ("a.png", "b1.png", "c.png") if one != keep]
        text = json.dumps({"decision": "same", "keep": keep, "remove": gone, "seen": 0})
        lines = decide_lines(request, [[text.encode()]], lambda said: None)
        try:
            return len(list(lines)) == 1
        except UsageError:
            return False

    selection = Selection(feature_dir=world.features, model_path=world.model.path)
    request = DecisionsRequest(selection=selection, media_dir=world.media)
    with ThreadPoolExecutor(3) as threads:
        assert sum(threads.map(decide, ("a.png", "b1.png", "c.png"))) == 1
    assert len(read_decisions(world.file)) == 1


def test_a_decision_is_confirmed_while_the_next_is_still_to_come(world: World) -> None:
    command = [sys.executable, "-m", "pipeline", "duplicates", "decide", "--feature-dir", world.features]
    process = subprocess.Popen(
        [*command, "--media-dir", world.media], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    for number in (1, 2):
        process.stdin.write(json.dumps(SAME) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["line"] == number
        assert len(read_decisions(world.file)) == number
    process.kill()
    process.communicate()
    process.stdin.close()
    assert len(read_decisions(world.file)) == 2
    assert not list(world.features.glob(f"{layout.TEMPORARY_PREFIX}*"))


def test_a_line_that_is_no_decision_ends_the_command_while_others_are_still_to_come(world: World) -> None:
    command = [sys.executable, "-m", "pipeline", "duplicates", "decide", "--feature-dir", world.features]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(f"{json.dumps(SAME)}\nnothing\n")
        process.stdin.flush()
        assert process.wait(60) == 2
        assert "error: line 2: " in process.stderr.read().splitlines()[-1]


def test_lines_that_come_while_others_are_worked_on_are_few_batches() -> None:
    # Each batch looks through the whole gallery, and a pipe holds 64 KiB.
    lines = [b"x" * 999 for _ in range(1000)]
    reading, writing = os.pipe()
    with open(reading, "rb") as stdin, open(writing, "wb", buffering=0) as out:
        batches = _batches(stdin)
        out.write(b"first\nsec")
        assert next(batches) == [b"first"]
        writer = Thread(target=out.write, args=(b"ond\n" + b"\n".join(lines),), daemon=True)
        writer.start()
        writer.join(60)
        assert not writer.is_alive()
        out.close()
        rest = list(batches)
    assert [line for batch in rest for line in batch] == [b"second", *lines]
    assert len(rest) < 8


def test_a_damaged_file_is_not_written_to(world: World) -> None:
    world.file.write_text("holiday notes\n")
    result = world.run("decide", stdin=json.dumps(SAME))
    assert isinstance(result.exception, FileDamaged)
    assert world.file.read_text() == "holiday notes\n"


def test_the_file_can_be_elsewhere_but_not_among_the_pictures(world: World, tmp_path: Path) -> None:
    assert world.run("decide", "--decisions", tmp_path / "mine.jsonl", stdin=json.dumps(SAME)).exit_code == 0
    assert len(read_decisions(tmp_path / "mine.jsonl")) == 1 and not world.file.exists()
    assert "media folder" in world.refused("decide", "--decisions", world.media / "d.jsonl", stdin=json.dumps(SAME))


def test_lists_name_what_can_go_and_what_is_kept(world: World) -> None:
    world.decide(SAME)
    assert world.listed() == ["cat/b1.png", "dog/c.png"]
    assert world.listed("--keep") == ["cat/a.png"]
    zeros = world.run("list", "--remove", "-0").stdout
    assert zeros == "".join(f"{world.media / path}\0" for path in ("cat/b1.png", "dog/c.png"))
    rows = list(csv.DictReader(io.StringIO(world.run("list", "--remove", "--format", "csv").stdout)))
    lines = [json.loads(line) for line in world.run("list", "--remove", "--format", "jsonl").stdout.splitlines()]
    assert rows == [{key: str(value) for key, value in line.items()} for line in lines]
    assert [(row["path"], row["bytes"], row["kept"]) for row in rows] == [
        ("cat/b1.png", "20", "cat/a.png"),
        ("dog/c.png", "3", "cat/a.png"),
    ]
    assert all((world.media / path).read_bytes() == data for path, data in FILES.items()), "nothing is touched"


def test_no_listed_path_can_be_taken_for_an_option(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("-a.png", "-b.png")}
    found = [ListedFile(name, 1, "00", "-a.png", "") for name in files]
    left_out = [LeftOut(name, "it changed") for name in files]
    for media_dir, paths in (
        (Path(), ["./-a.png", "./-b.png"]),
        (Path("-pictures"), ["./-pictures/-a.png", "./-pictures/-b.png"]),
        (tmp_path, [str(path) for path in files.values()]),
    ):
        for null, end in ((False, "\n"), (True, "\0")):
            assert list(file_lines(found, FileFormat.paths, media_dir, null)) == [path + end for path in paths]
            assert list(left_out_lines(left_out, FileFormat.paths, media_dir, null)) == [path + end for path in paths]
        # What is no list of arguments has each name as it is.
        (_, first, _) = file_lines(found, FileFormat.csv, media_dir)
        assert first.startswith("-a.png,1,")


def test_what_changed_or_lost_its_kept_file_is_left_out_and_named(world: World) -> None:
    world.decide(SAME)
    (world.media / "dog/c.png").write_bytes(b"edited")
    result = world.run("list", "--remove")
    assert (result.exit_code, result.stdout) == (3, f"{world.media / 'cat/b1.png'}\n")
    assert "left out: dog/c.png: it changed since it was decided" in result.stderr
    (world.media / "cat/a.png").unlink()
    result = world.run("list", "--remove")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "left out: cat/b1.png: of the file that is kept for it, cat/a.png: " in result.stderr


def test_what_was_removed_is_only_counted(world: World) -> None:
    world.decide(SAME)
    (world.media / "dog/c.png").unlink()
    result = world.run("list", "--remove")
    assert (result.exit_code, result.stdout) == (0, f"{world.media / 'cat/b1.png'}\n")
    assert "1 file is gone already" in result.stderr


def test_lists_are_refused_where_the_files_cannot_be_looked_at(world: World) -> None:
    world.decide(SAME)
    assert "--media-dir" in world.refused("list", "--remove", media=False)
    assert "--remove or --keep" in world.refused("list")
    assert "--remove or --keep" in world.refused("list", "--remove", "--keep")
    assert "-0 needs" in world.refused("list", "--remove", "-0", "--format", "csv")
    world.media.rename(world.media.with_name("unmounted"))
    assert "no media folder" in world.refused("list", "--remove")


def test_without_files_and_digests_a_decision_is_kept_by_path_and_names_nothing(world: World) -> None:
    result = world.run("decide", stdin=json.dumps(SAME), media=False)
    assert result.exit_code == 0
    if world.digests:
        assert "warning" not in result.stderr and world.listed() == ["cat/b1.png", "dog/c.png"]
        return
    assert "warning: the bytes of a.png" not in result.stderr and "warning: the bytes of cat/a.png" in result.stderr
    assert "not known, since --media-dir was not given: " in result.stderr
    assert world.listed(code=3) == []
    world.decide(SAME)
    assert world.listed() == ["cat/b1.png", "dog/c.png"]


def test_undoing_is_one_command(world: World) -> None:
    world.decide(SAME)
    assert world.run("undo", "a.png", "b1.png", media=False).stderr == f"undone in {world.file}\n"
    assert world.listed() == ["dog/c.png"]
    assert "nothing is decided" in world.refused("undo", "b1.png", media=False)
    assert world.run("undo", "a.png", media=False).exit_code == 0
    assert world.listed() == []
    assert "no object x.png" in world.refused("undo", "x.png", media=False)
    world.decide(SAME, {"decision": "undo", "objects": ["c.png"]})
    assert world.listed() == ["cat/b1.png"]


def test_an_object_that_left_the_gallery_can_be_undone(world: World) -> None:
    append_decisions(world.file, [different("gone")])
    assert world.run("undo", "gone.jpg", media=False).exit_code == 0
    assert "nothing is decided" in world.refused("undo", "gone.jpg", media=False)


def test_status_counts_what_is_open_decided_kept_and_to_remove(world: World) -> None:
    before = json.loads(world.run("status", "--json").stdout)
    assert (before["open"], before["decided"], before["to_remove"], before["frees_bytes"]) == (1, 0, 0, 0)
    world.decide({"decision": "same", "keep": "a.png", "remove": ["b1.png", "b2.png"]}, SAME)
    os.link(world.media / "dog/c.png", world.media / "link.png")
    now = json.loads(world.run("status", "--json").stdout)
    assert {
        name: now[name] for name in ("decided", "same", "different", "skip", "kept", "to_remove", "frees_bytes", "gone")
    } == {
        "decided": 2,
        "same": 2,
        "different": 0,
        "skip": 0,
        "kept": 1,
        "to_remove": 3,
        "frees_bytes": 40,
        "gone": 0,
    }
    shown = world.run("status").stdout
    assert re.search(r"^to_remove +3$", shown, re.MULTILINE) and re.search(r"^frees_bytes +40$", shown, re.MULTILINE)


def test_a_renamed_file_is_known_by_its_digest(world: World) -> None:
    if not world.digests:
        pytest.skip("this gallery has no digests")
    world.decide(SAME)
    new = {"cat/kept.png": FILES["cat/a.png"], "cat/gone.png": FILES["dog/c.png"]}
    for path, data in new.items():
        (world.media / path).write_bytes(data)
    for path in ("cat/a.png", "dog/c.png"):
        (world.media / path).unlink()
    # As after a new extraction: the old names are gone.
    folder = layout.gallery_folder(world.features, world.model.path)
    shutil.rmtree(folder)
    claim_gallery(folder, world.model, IdScheme(ObjectIds.basename))
    files = {**new, "cat/b1.png": FILES["cat/b1.png"], "dog/b2.png": FILES["dog/b2.png"]}
    digests = np.array([list(hashlib.sha256(data).digest()) for data in files.values()], np.uint8)
    features = np.eye(4, world.model.spec.length, dtype=np.float32)
    write_shard(folder, 0, features, list(files), world.model.fingerprint, digests=digests)
    result = world.run("list", "--remove", "--format", "jsonl")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["path"], line["kept"]) for line in lines] == [
        ("cat/b1.png", "cat/kept.png"),
        ("cat/gone.png", "cat/kept.png"),
    ]


def test_a_gallery_that_knows_no_paths_keeps_decisions_by_id(tmp_path: Path) -> None:
    write_article_shard(tmp_path / "shards", 0, np.eye(3, 4, dtype=np.float32), ["a", "b", "c"])
    app = Commands()
    register(app)
    given = ["--feature-dir", str(tmp_path / "shards")]
    decision = json.dumps({"decision": "different", "objects": ["a", "b"]})
    assert CliRunner().invoke(app, ["duplicates", "decide", *given], input=decision).exit_code == 0
    (line,) = read_decisions(tmp_path / "decisions.jsonl")
    assert [one.id for one in line.objects] == ["a", "b"] and line.object_id is None


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_decider_frees_the_lock(world: World, kill: signal.Signals) -> None:
    command = [sys.executable, "-m", "pipeline", "duplicates", "decide", "--feature-dir", world.features]
    process = subprocess.Popen(
        [*command, "--media-dir", world.media], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(SAME) + "\n")
    process.stdin.flush()
    process.stdout.readline()
    process.send_signal(kill)
    process.communicate()
    assert process.returncode == 130
    begun = time.monotonic()
    world.decide(SAME)
    wait_until(lambda: len(read_decisions(world.file)) == 2)
    assert time.monotonic() - begun < 25, "no waiting for a dead one"
