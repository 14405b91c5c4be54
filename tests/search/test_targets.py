"""What may be written where: nothing is overwritten by a slip, and no file is half written."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from tests.factories import Ruiji, only_line, picture
from tests.search.galleries import write_pictures_gallery


@pytest.fixture
def world(ruiji: Ruiji) -> Ruiji:
    """A gallery, and beside the media folder queries, labels, a list, a feature, and links to them."""
    paths = write_pictures_gallery(ruiji)
    base = ruiji.media.parent
    picture(base / "q.png", 1)
    picture(base / "queries" / "one.png", 2)
    (base / "labels.csv").write_text("img_path,label\n" + "".join(f"{path},cat\n" for path in paths))
    (base / "list.txt").write_text("q.png\n")
    (base / "plain").write_bytes((base / "q.png").read_bytes())
    (base / "link.html").symlink_to(base / "plain")
    os.link(base / "plain", base / "hard.html")
    os.link(base / "labels.csv", base / "hard.csv")
    (base / "loop.html").symlink_to("media/cat/new.html")
    (base / "folder.html").mkdir()
    os.mkfifo(base / "pipe")  # Stands for every device: a test had better not try its luck with those.
    (base / "features" / "other").mkdir()
    (base / "features" / "other" / "gallery.json").write_text("{}")
    return ruiji


def everything(base: Path) -> dict[str, str]:
    files = [path for path in sorted(base.rglob("*")) if path.is_file() and "cache" not in path.parts]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


REFUSED = {
    "a query": "search q.png --html q.png",
    "a query, drawn": "search q.png --sheet q.png",
    "a query, spelled otherwise": "search q.png --sheet ./queries/../q.png",
    "a query without ending": "search plain --html plain",
    "a link to a query": "search plain --html link.html",
    "a hard link to a query": "search plain --html hard.html",
    "a query of a list": "search list.txt --sheet q.png",
    "a query of a folder": "search queries --sheet queries/one.png",
    "a query to be": "search queries --sheet queries/new.png",
    "the list": "search list.txt --html list.txt",
    "the list on stdin": "search - --html list.txt < list.txt",
    "where stdout goes": "search q.png --html out.html > out.html",
    "the labels": "search q.png --labels labels.csv --html labels.csv",
    "the model": 'search q.png --html "$RUIJI_MODEL"',
    "a picture": "search q.png --html other.JPG",
    "a picture of no known format": "search q.png --html other.heic",
    "the media folder": "search q.png --html media/new/out.html",
    "the media folder by a link": "search q.png --html loop.html",
    "the media folder, drawn": "search q.png --sheet media/cat/0.png",
    "the gallery": "search q.png --html features/tiny/gallery.json",
    "another gallery": "search q.png --html features/other/gallery.json",
    "a folder": "search q.png --html folder.html",
    "one file twice": "evaluate --labels labels.csv --leave-one-out --plot x.png --sheet ./new/../x.png",
    "a picture of the groups": "near-duplicates --sheet media/cat/0.png",
    "the groups' labels": "near-duplicates --labels labels.csv --sheet features/tiny/x.png",
    "the evaluated labels": "evaluate --labels labels.csv --leave-one-out --trec labels.csv",
    "a hard link to them": "evaluate --labels labels.csv --leave-one-out --trec hard.csv",
    "a picture as a run": "evaluate --labels labels.csv --leave-one-out --trec q.png",
    "a run among the pictures": "evaluate --labels labels.csv --leave-one-out --trec media/run.txt",
    "curves in the gallery": "evaluate --labels labels.csv --leave-one-out --plot features/tiny/curves.png",
    "a list as a picture": "list media --out media/cat/0.png",
    "a list in a gallery": "list media --out features/tiny/objects.txt",
    "a list on a pipe": "list media --out pipe",
}


@pytest.mark.parametrize("command", REFUSED.values(), ids=REFUSED.keys())
def test_what_must_not_be_overwritten_is_refused_before_any_work(world: Ruiji, command: str) -> None:
    base = world.media.parent
    before = everything(base)
    done = world.shell(f"ruiji {command}")
    told = only_line(done.stderr)
    assert done.returncode == 2, told
    assert "--" in told and not done.stdout
    after = everything(base)
    assert after.pop(str(base / "out.html"), None) in (None, hashlib.sha256(b"").hexdigest())
    assert after == before


ALLOWED = {
    "old.html": "search q.png --html old.html",
    "queries/new.html": "search queries --html queries/new.html",
    "new/x.JPG": "search q.png --sheet new/x.JPG",
    "old.trec": "evaluate --labels labels.csv --leave-one-out --trec old.trec",
    "curves.png": "evaluate --labels labels.csv --leave-one-out --plot curves.png --sheet worst.png",
    "features/hits.html": "search q.png --html features/hits.html",
    "groups.png": "near-duplicates --threshold 0.5 --sheet groups.png",
    "media/objects.txt": "list media",
    "lists/a.txt": "list media --out lists/a.txt",
}


@pytest.mark.parametrize(("target", "command"), ALLOWED.items(), ids=ALLOWED.values())
def test_other_files_are_written_and_overwritten(world: Ruiji, target: str, command: str) -> None:
    base = world.media.parent
    for old in ("old.html", "old.trec"):
        (base / old).write_text("old")
        (base / old).chmod(0o640)
    done = world.shell(f"ruiji {command}")
    assert done.returncode == 0, done.stderr
    written = base / target
    assert len(written.read_bytes()) > 10
    if target.startswith("old"):
        assert written.stat().st_mode & 0o777 == 0o640
    assert not list(base.rglob(".tmp-*"))


def test_pipes_and_links_to_other_files_are_written_through(world: Ruiji) -> None:
    base = world.media.parent
    (base / "there.html").write_text("old")
    (base / "pointer.html").symlink_to("there.html")
    assert world.shell("ruiji search q.png --html pointer.html").returncode == 0
    assert (base / "pointer.html").is_symlink() and "<!doctype" in (base / "there.html").read_text()
    done = world.shell(
        "ruiji evaluate --labels labels.csv --leave-one-out --trec >(wc -l) --format csv | tail -1; wait"
    )
    assert b"20\n" in done.stdout
    done = world.shell("wc -l pipe & ruiji evaluate --labels labels.csv --leave-one-out --trec pipe; wait")
    assert b"20 pipe\n" in done.stdout
    assert (base / "pipe").is_fifo()


def test_a_file_whose_writing_fails_stays_as_it_was(world: Ruiji) -> None:
    base = world.media.parent
    (base / "run.txt").write_text("old")
    # An id with white space cannot stand in a TREC run; it is met in the middle of it.
    (base / "odd").mkdir()
    world.media = base / "odd"
    world.features = base / "odd-features"
    write_pictures_gallery(world)
    paths = world.gallery / "0000.object_ids.npy"
    ids = np.load(paths)
    ids[3] = "a b"
    np.save(paths, ids)
    done = world("evaluate", "--labels-from-folder", "--trec", str(base / "run.txt"), code=2)
    assert "white space" in only_line(done.stderr)
    assert (base / "run.txt").read_text() == "old"
    assert not list(base.rglob(".tmp-*"))
