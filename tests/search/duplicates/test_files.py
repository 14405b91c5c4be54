"""Facts about files: from the header, once, and again only after a change."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pipeline import layout
from search.duplicates.files import FileFacts, Files, _from_line, _to_line, read_facts
from search.gallery.opening import open_gallery
from tests.factories import Ruiji, picture
from tests.search.galleries import write_pictures_gallery
from workers.decode import heif
from workers.decode.images import FORMATS


def test_facts_come_from_the_file_and_its_header(tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", size=(16, 12))
    os.utime(path, ns=(5, 1_000_000_007))
    assert read_facts(path) == FileFacts(path.stat().st_size, 1_000_000_007, 16, 12, "PNG")
    (tmp_path / "link.png").symlink_to(path)
    assert read_facts(tmp_path / "link.png") == read_facts(path)
    Image.new("RGB", (3, 4)).save(tmp_path / "b.jpg")
    assert (read_facts(tmp_path / "b.jpg") or FileFacts(0, 0)).format == "JPEG"


def test_what_is_no_picture_has_no_pixels_and_what_is_no_file_no_facts(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "hostile.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("text.jpg", "hostile.eps"):
        found = read_facts(tmp_path / name)
        assert found is not None and (found.width, found.height, found.format) == (0, 0, "")
    for name in ("pipe.jpg", "none.jpg", "."):
        assert read_facts(tmp_path / name) is None


def test_the_cache_knows_every_format_that_is_decoded() -> None:
    for plugin in FORMATS:
        facts = FileFacts(9, 8, 7, 6, plugin.removeprefix("RUIJI-"))
        assert _from_line(_to_line(facts)) == facts
    # As an older ruiji kept what it had no number for; and one without a decoder.
    assert _from_line(_to_line(FileFacts(9, 8, 7, 6, "new"))) is None
    assert _from_line(_to_line(FileFacts(9, 8, format="HEIF"))) is None
    assert _from_line(_to_line(FileFacts(9, 8))) == FileFacts(9, 8)


def test_a_picture_that_nothing_decodes_is_one_of_unknown_size(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(__file__).parents[2] / "data" / "heif" / "wide.heic"
    if heif.heif_decoder() is not None:
        known = read_facts(path)
        assert known is not None and known.format == "HEIF" and known.width > known.height > 0
    monkeypatch.setattr(heif, "heif_decoder", lambda: None)
    unknown = read_facts(path)
    assert unknown is not None and (unknown.format, unknown.width, unknown.height) == ("HEIF", 0, 0)


def test_a_broken_picture_is_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    picture(path, size=(640, 480))
    path.write_bytes(path.read_bytes()[:200])
    found = read_facts(path)
    assert found is not None and (found.width, found.height) == (640, 480)


def test_a_file_is_opened_once_and_again_after_a_change(ruiji: Ruiji, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_pictures_gallery(ruiji)
    opened: list[str] = []
    real = os.open

    def counted(path: str | Path, *arguments: int) -> int:
        if str(path).startswith(str(ruiji.media)):
            opened.append(Path(path).name)
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", counted)

    def look() -> list[FileFacts | None]:
        opened.clear()
        files = Files(open_gallery(ruiji.gallery), ruiji.media)
        found = [files.facts(row) for row in range(5)]
        files.keep()
        return found

    first = look()
    assert sorted(opened) == sorted(Path(path).name for path in paths)
    assert look() == first and opened == []
    picture(ruiji.media / paths[1], size=(99, 98))
    os.utime(ruiji.media / paths[2], ns=(1, 1))
    (ruiji.media / paths[3]).unlink()
    second = look()
    assert sorted(opened) == [Path(paths[1]).name, Path(paths[2]).name]
    assert second[1] is not None and (second[1].width, second[1].height) == (99, 98)
    assert first[2] is not None and second[2] == replace(first[2], mtime_ns=1)
    assert second[3] is None and (second[0], second[4]) == (first[0], first[4])
    # A damaged cache is read anew.
    (kept,) = layout.cache_folder(ruiji.gallery).glob(f"*.{layout.FACTS}.npy")
    kept.write_bytes(kept.read_bytes()[:-30] + bytes(30))
    assert look() == second and len(opened) == 4
