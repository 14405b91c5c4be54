"""From a folder to a list: which files are taken for images, and what is said about all others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import scan
from pipeline.choices import ObjectIds
from pipeline.errors import ObjectListError
from pipeline.objects import Exclude, IdScheme
from pipeline.scan import HEIF_ENDINGS, IMAGE_ENDINGS, Scan, count_unlisted, write_list
from tests.factories import picture


def scanned(folder: Path, exclude: Exclude | None = None) -> tuple[list[str], str]:
    found = Scan(folder, exclude)
    return sorted(found.paths()), "\n".join(found.notes())


def empty(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_a_scan_lists_images_of_any_case_in_order_of_bytes(tmp_path: Path) -> None:
    for name in ("b/2.JPG", "a 'quoted' $(x).png", "é.jpeg", "Z.webp", "notes.txt", "b.jpg/3.png"):
        picture(tmp_path / "media" / name) if not name.endswith("txt") else (tmp_path / "media" / name).write_text("")
    target = tmp_path / "out" / "objects.txt"
    assert write_list(Scan(tmp_path / "media"), target) == (5, ["left out: 1 .txt"])
    assert target.read_text() == "Z.webp\na 'quoted' $(x).png\nb.jpg/3.png\nb/2.JPG\né.jpeg\n"
    assert os.listdir(target.parent) == ["objects.txt"]


def test_every_ending_of_a_format_that_is_decoded_is_listed() -> None:
    from PIL import Image

    from workers.decode import heif, icon
    from workers.decode.images import FORMATS

    Image.init()
    # Cameras write two JPEGs in one file; its first one is decoded.
    known = {end for end, name in Image.registered_extensions().items() if name in FORMATS} | {".mpo"}
    assert known | HEIF_ENDINGS | {".ico"} == IMAGE_ENDINGS and {heif.PLUGIN, icon.PLUGIN} < set(FORMATS)


def test_the_endings_of_heif_are_those_of_its_decoder() -> None:
    # In a process of its own: Pillow would open such files in this one.
    script = (
        "from PIL import Image; from pi_heif import register_heif_opener; register_heif_opener()\n"
        "print(*sorted(end for end, name in Image.EXTENSION.items() if name == 'HEIF'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == HEIF_ENDINGS


def test_heif_is_listed_where_it_is_decoded_and_else_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.HEIC", "b.heif", "c.heic", "d.jpg"):
        empty(tmp_path / name)
    assert scanned(tmp_path) == (["a.HEIC", "b.heif", "c.heic", "d.jpg"], "")
    monkeypatch.setattr(scan, "heif_decoder", lambda: None)
    why = "left out, because pi-heif is not installed here (run make setup, or pip install 'ruiji[heic]'): "
    assert scanned(tmp_path) == (["d.jpg"], f"{why}2 .heic, 1 .heif")


def test_what_is_no_image_is_counted_and_what_systems_keep_is_left_out(tmp_path: Path) -> None:
    for number, ending in enumerate([".CR2", ".cr2", ".xyz", "", ".a", ".b", ".c", ".d", ".e", ".f", ".g"]):
        empty(tmp_path / f"{number}{ending}")
    for name in ("1.jpg", "d/._1.jpg", ".Trash-1000/2.jpg", "@eaDir/1.jpg/x.jpg", "d/.thumbnails/1.png", "Thumbs.db"):
        empty(tmp_path / name)
    for name in ("$RECYCLE.BIN/3.jpg", "lost+found/4.jpg", ".tmp-list-x/raw.jpg", "objects.txt"):
        empty(tmp_path / name)
    paths, notes = scanned(tmp_path)
    assert paths == ["1.jpg"]
    told, system = notes.splitlines()
    assert told.startswith("left out: 2 .cr2, 1 ") and told.endswith("2 others")
    assert sorted(system.removeprefix("left out, of the system: ").split(", ")) == sorted(
        ["1 $RECYCLE.BIN", "1 lost+found", "1 .Trash-1000", "1 @eaDir", "1 .thumbnails", "1 ._*", "1 Thumbs.db"]
    )


def test_links_and_galleries_are_said(tmp_path: Path) -> None:
    media, other = tmp_path / "media", tmp_path / "other"
    for path in (media / "a.jpg", media / "gallery" / "model" / "gallery.json", other / "o.jpg"):
        empty(path)
    empty(media / "gallery" / "model" / "aa" / "sheet.jpg")
    (media / "in.jpg").symlink_to("a.jpg")
    (media / "out.jpg").symlink_to(other / "o.jpg")
    (media / "gone.jpg").symlink_to("nowhere.jpg")
    (media / "loop.jpg").symlink_to("loop.jpg")
    (media / "folder").symlink_to(other)
    paths, notes = scanned(media)
    assert paths == ["a.jpg", "gone.jpg", "in.jpg", "loop.jpg", "out.jpg"]
    assert notes.splitlines() == [
        "left out, galleries of ruiji: gallery/model",
        "left out, links to folders: folder",
        "links that lead out of the media folder, listed, and fail: out.jpg",
        "links that lead nowhere, listed, and fail: gone.jpg, loop.jpg",
    ]


def test_globs_leave_out_files_and_whole_folders(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/2.png", "b/deep/3.jpg", "b/4.jpg", "c.txt"):
        empty(tmp_path / name)
    paths, notes = scanned(tmp_path, Exclude(["deep", "a/*.png"]))
    assert paths == ["a/1.jpg", "b/4.jpg"]
    assert notes.splitlines() == ["left out: 1 .txt", "left out by --exclude: 1 file, 1 folder"]


def test_names_that_no_line_can_hold_are_listed_escaped(tmp_path: Path) -> None:
    media = tmp_path / "media"
    for name in (b"a.jpg", b"caf\xe9.jpg", b"x\ny.png", b"..z.jpg"):
        empty(media / os.fsdecode(name))
    target = tmp_path / "objects.txt"
    lines, notes = write_list(Scan(media), target, IdScheme(ObjectIds.path))
    assert lines == 4
    assert target.read_text() == "..z.jpg\na.jpg\ncaf\\xe9.jpg/\nx\\x0ay.png/\n"
    assert len(notes) == 1 and notes[0].startswith("lines that cannot be used, and fail as bad-name: 2")


def test_a_folder_without_images_and_a_list_that_an_enqueue_refuses_are_refused(tmp_path: Path) -> None:
    media, target = tmp_path / "media", tmp_path / "objects.txt"
    empty(media / "a.cr2")
    with pytest.raises(ObjectListError, match=r"no image files .*; left out: 1 \.cr2"):
        write_list(Scan(media), target)
    with pytest.raises(ObjectListError, match="does not exist"):
        write_list(Scan(tmp_path / "none"), target)
    for name in ("x/same.jpg", "y/same.jpg"):
        empty(media / name)
    with pytest.raises(ObjectListError, match="two objects have the id"):
        write_list(Scan(media), target, IdScheme(ObjectIds.basename))
    assert not target.exists()
    assert write_list(Scan(media), target, IdScheme(ObjectIds.path))[0] == 2


def test_a_list_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "media" / "a.png")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_ino))
    write_list(Scan(tmp_path / "media"), tmp_path / "objects.txt")
    assert synced == [(tmp_path / "objects.txt").stat().st_ino]


def test_images_that_are_not_on_a_list_are_counted(tmp_path: Path) -> None:
    media, listed = tmp_path / "media", tmp_path / "objects.txt"
    for name in (b"a.jpg", b"b/b.jpg", b"..c.jpg", b"\xe9.jpg", "写.jpg".encode(), b"new.jpg"):
        empty(media / os.fsdecode(name))
    listed.write_bytes(b"gone.jpg\r\n./b/b.jpg\r\na.jpg\r\n..c.jpg\n\xe9.jpg\n" + "写.jpg\n".encode())
    for scheme in (IdScheme(ObjectIds.basename), IdScheme(ObjectIds.path)):
        assert count_unlisted(Scan(media), listed, scheme, tmp_path) == 1
    assert count_unlisted(Scan(media, Exclude(["new*"])), listed, IdScheme(ObjectIds.path), tmp_path) == 0
    assert sorted(os.listdir(tmp_path)) == ["media", "objects.txt"]
