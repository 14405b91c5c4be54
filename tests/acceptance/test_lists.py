"""Lists and first runs by the real command: one bad name or folder fails alone, and what is not done is said."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.factories import Ruiji, only_line, picture, pictures


def failed(ruiji: Ruiji) -> dict[str, tuple[str, str]]:
    """Path to reason and message of each failed object."""
    lines = csv.DictReader(io.StringIO(ruiji("failures", "--format", "csv", code=None).stdout))
    return {line["path"]: (line["reason"], line["message"]) for line in lines}


def accounted(ruiji: Ruiji) -> tuple[int, int, int]:
    """Objects, done and failed; their sum has to be the list."""
    status = json.loads(ruiji("status", "--json", code=None).stdout)
    assert status["done"] + status["failed"] == status["objects"]
    return status["objects"], status["done"], status["failed"]


def photos(media: Path, *names: bytes) -> None:
    """The same small picture under each name, which may be any."""
    source = picture(media.parent / "photo.jpg")
    for name in names:
        path = media / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)


def as_a_user(ruiji: Ruiji, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a command without the rights to read what modes forbid."""
    if os.getuid() == 0 and shutil.which("setpriv") is None:
        pytest.skip("needs setpriv to give up root's rights, which is not here")
    rights = "setpriv --bounding-set=-dac_override,-dac_read_search " if os.getuid() == 0 else ""
    return ruiji.shell(f'{rights}"{sys.executable}" -m pipeline "$@"'.replace('"$@"', " ".join(arguments)))


def test_names_that_cannot_be_used_fail_alone(ruiji: Ruiji) -> None:
    long = b"n" * 240 + b".jpg"
    photos(
        ruiji.media, b"good.jpg", b"d/fine.jpg", b"caf\xe9.jpg", b"two\nlines.jpg", b"d/tab\t.jpg", long, b"..dots.jpg"
    )
    listed = ruiji("list", str(ruiji.media), "--out", "list.txt")
    assert "lines that cannot be used, and fail as bad-name: 5; " in listed.stderr
    done = ruiji("run", "--workers", "1", code=3)
    assert "2 done, 5 failed of 7" in done.stderr
    assert accounted(ruiji) == (7, 2, 5)
    found = failed(ruiji)
    assert {reason for reason, _ in found.values()} == {"bad-name"}
    assert {path: message.partition(";")[0] for path, (_, message) in found.items()} == {
        "caf\\xe9.jpg/": "its name is not UTF-8",
        "two\\x0alines.jpg/": "its name has a control character",
        "d/tab\\x09.jpg/": "its name has a control character",
        long.decode() + "/": "its id is longer than 230 bytes",
        "..dots.jpg/": 'its id would make a folder named "." or ".."',
    }
    record = json.loads((ruiji.gallery / "0000.json").read_text())
    assert (record["rows"], len(record["failed"])) == (2, 5)
    ruiji("verify")
    # The list that was written is that of the run, and it is not done again.
    assert "2 done, 5 failed of 7" in ruiji("run", "--workers", "1", "--list", "list.txt", code=3).stderr
    # A name that is mended is another object; what is left out is on the list no more.
    (ruiji.media / os.fsdecode(b"caf\xe9.jpg")).rename(ruiji.media / "café.jpg")
    out = ruiji("run", "--workers", "1", "--exclude", "two*", "--exclude", "d/tab*", code=3)
    assert "left out by --exclude: 2 files" in out.stderr and "3 done, 2 failed of 5" in out.stderr
    assert accounted(ruiji) == (5, 3, 2)
    ruiji("retry", "--reason", "bad-name")
    ruiji("run", "--workers", "1", "--exclude", "two*", "--exclude", "d/tab*", code=3)
    assert accounted(ruiji) == (5, 3, 2)
    ruiji("verify")


def test_lines_that_leave_the_media_folder_fail_alone_and_open_nothing(ruiji: Ruiji) -> None:
    photos(ruiji.media, b"a.jpg", b"b.jpg")
    photos(ruiji.media.parent / "other", b"secret.jpg")
    pipe = ruiji.media.parent / "other" / "pipe.jpg"
    os.mkfifo(pipe)
    lines = ["a.jpg", "../other/secret.jpg", str(pipe), "../other/pipe.jpg", "b.jpg", "x//y.jpg", "a.jpg/"]
    (ruiji.media / "objects.txt").write_text("".join(f"{line}\n" for line in lines))
    done = ruiji("run", "--workers", "1", code=3)
    assert (
        "lines that cannot be used, and fail as bad-name: 4; the first is line 2, '../other/secret.jpg'" in done.stderr
    )
    assert accounted(ruiji) == (6, 2, 4)
    assert {reason for reason, _ in failed(ruiji).values()} == {"bad-name"}
    (ruiji.media / "objects.txt").write_text("/etc/passwd\n../x.jpg\n")
    refused = ruiji("run", "--workers", "1", code=2).stderr.splitlines()[-1]
    assert "no line of the object list can be used; the first is line 1, '/etc/passwd': it is absolute" in refused


def test_deep_folders_and_wide_characters_need_no_short_paths(ruiji: Ruiji) -> None:
    deep = "/".join(["旅行の写真" * 4] * 6) + "/一枚目.jpg"
    photos(ruiji.media, deep.encode(), b"x/a.jpg", b"y/a.jpg", "y/ü".encode() * 60 + b".cr2")
    refused = ruiji("list", str(ruiji.media), code=2).stderr
    assert "two objects have the id 'a.jpg'" in refused and not (ruiji.media / "objects.txt").exists()
    assert "left out: 1 .cr2" in ruiji("list", str(ruiji.media), "--object-id", "path").stderr
    ruiji("run", "--workers", "1", "--object-id", "path")
    assert accounted(ruiji) == (3, 3, 0)
    assert deep in ruiji("search", "--id", "x/a.jpg", "-k", "3", "--format", "paths").stdout
    ruiji("verify")


def test_a_folder_that_cannot_be_read_is_said_and_the_rest_done(ruiji: Ruiji) -> None:
    photos(ruiji.media, b"a.jpg", b"closed/b.jpg", b"open/c.jpg")
    (ruiji.media / "closed").chmod(0)
    try:
        listed = as_a_user(ruiji, "list", "media", "--out", "list.txt")
        said = "folders that cannot be read, whose images are not listed: closed/ (Permission denied)"
        assert listed.returncode == 3, listed.stderr
        assert said in listed.stderr.decode()
        assert (ruiji.media.parent / "list.txt").read_text() == "a.jpg\nopen/c.jpg\n"
        done = as_a_user(ruiji, "run", "--workers", "1")
        assert done.returncode == 3, done.stderr
        assert said in done.stderr.decode() and "2 done, 0 failed of 2" in done.stderr.decode()
        without = as_a_user(ruiji, "run", "--workers", "1", "--exclude", "closed")
        assert without.returncode == 0, without.stderr
        ruiji.media.chmod(0)
        assert "not readable" in only_line(as_a_user(ruiji, "list", "media", "--out", "list.txt").stderr)
    finally:
        ruiji.media.chmod(0o755)
        (ruiji.media / "closed").chmod(0o755)


def test_a_list_of_windows_is_read_and_utf16_refused(ruiji: Ruiji) -> None:
    paths = pictures(ruiji.media, 3)
    text = "".join(f"{path}\r\n" for path in paths)
    (ruiji.media / "objects.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    ruiji("run", "--workers", "1")
    assert accounted(ruiji) == (3, 3, 0)
    (ruiji.media / "objects.txt").write_bytes(text.encode("utf-16"))
    assert "objects.txt is UTF-16; write it as UTF-8" in ruiji("run", "--workers", "1", code=2).stderr


def test_images_that_a_standing_list_lacks_are_said_and_not_taken_up(ruiji: Ruiji) -> None:
    paths = pictures(ruiji.media, 3)
    assert "not on" not in ruiji("run", "--workers", "1").stderr
    photos(ruiji.media, b"new.jpg", b"d/new2.jpg", b"@eaDir/thumb.jpg")
    before = (ruiji.media / "objects.txt").read_bytes()
    done = ruiji("run", "--workers", "1").stderr
    assert f"images of {ruiji.media} that are not on {ruiji.media}/objects.txt: 2; " in done
    assert f"ruiji list {ruiji.media} writes it again" in done and "3 done, 0 failed of 3" in done
    assert (ruiji.media / "objects.txt").read_bytes() == before
    assert "not on" not in ruiji("run", "--workers", "1", "--list", str(ruiji.media / "objects.txt")).stderr
    assert "5 objects" in ruiji("list", str(ruiji.media)).stderr
    done = ruiji("run", "--workers", "1").stderr
    assert "not on" not in done and "5 done, 0 failed of 5" in done
    assert not list((ruiji.gallery / "run").glob(".tmp*")) and len(paths) == 3


def test_a_gallery_in_the_media_folder_is_not_listed(ruiji: Ruiji) -> None:
    photos(ruiji.media, b"a.jpg", b"b.tga")
    ruiji.features = ruiji.media / "features"
    ruiji("run", "--workers", "1", code=None)
    shutil.copy(ruiji.media / "a.jpg", ruiji.gallery / "sheet.jpg")
    out = ruiji("list", str(ruiji.media), "--out", "list.txt").stderr
    assert "left out, galleries of ruiji: features/tiny" in out and "2 objects" in out
    assert (ruiji.media.parent / "list.txt").read_text() == "a.jpg\nb.tga\n"


def test_lines_of_a_standing_list_are_left_out_and_counted(ruiji: Ruiji) -> None:
    photos(ruiji.media, b"a1.jpg", b"a2.jpg", b"b/c.jpg", b"b/d.jpg", b"new.jpg")
    (ruiji.media / "objects.txt").write_text("a1.jpg\na2.jpg\nb/c.jpg\nb/d.jpg\n")
    ruiji.environment = {"RUIJI_EXCLUDE": "a2* b/c*"}
    done = ruiji("run", "--workers", "1").stderr
    assert "lines left out by --exclude: 2" in done and "objects.txt: 1; " in done
    assert accounted(ruiji) == (2, 2, 0)
    ruiji.environment = {}
    ruiji("run", "--workers", "1")
    assert accounted(ruiji) == (4, 4, 0)
    refused = ruiji("run", "--exclude", "/", code=2).stderr
    assert "--exclude '/' names nothing" in only_line(refused)


def test_heif_photos_are_listed_embedded_and_searched_with(ruiji: Ruiji, tmp_path: Path) -> None:
    photos(ruiji.media, b"a.jpg", b"b.jpg")
    for name in ("turned", "several"):
        shutil.copy(ROOT / "tests" / "data" / "heif" / f"{name}.heic", ruiji.media / f"{name}.HEIC")
    (ruiji.media / "cut.heif").write_bytes((ruiji.media / "turned.HEIC").read_bytes()[:-40])
    ruiji("run", "--workers", "1", code=3)
    assert accounted(ruiji) == (5, 4, 1)
    assert set(failed(ruiji)) == {"cut.heif"}
    assert json.loads((ruiji.gallery / "0000.json").read_text())["versions"]["pi-heif"] == metadata.version("pi-heif")
    found = ruiji(
        "search", str(ruiji.media / "turned.HEIC"), "--format", "paths", "--sheet", str(tmp_path / "sheet.png")
    )
    assert found.stdout.startswith(f"{ruiji.media}/turned.HEIC\n")
    assert "could not be opened" not in found.stderr
