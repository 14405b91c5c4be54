"""Contact sheets: where things are drawn, and what happens to pictures that cannot be."""

import os
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import RuijiError
from search import queries
from search.views.sheet import SheetHit, SheetLine, write_sheet

MAX_PIXELS = 10_000
#: The centre of the query's tile and of the first two hits' in the first line.
QUERY, FIRST, SECOND = (24 + 88, 24 + 88), (236 + 88, 24 + 88), (424 + 88, 24 + 88)


def plain(path: Path, color: str, size: tuple[int, int] = (8, 8)) -> Path:
    Image.new("RGB", size, color).save(path)
    return path


def draw(target: Path, lines: list[SheetLine]) -> tuple[Image.Image, int]:
    missing = write_sheet(target, lines, MAX_PIXELS)
    with Image.open(target) as sheet:
        return sheet.convert("RGB"), missing


def test_the_query_is_at_the_left_and_hits_follow_in_order(tmp_path: Path) -> None:
    red, blue = plain(tmp_path / "r.png", "red"), plain(tmp_path / "b.png", "blue", (90, 20))
    hits = (SheetHit("b", blue, 0.9), SheetHit("r", red, 0.5))
    sheet, missing = draw(tmp_path / "new" / "out.png", [SheetLine(red, hits), SheetLine(blue, ())])
    assert missing == 0
    assert [sheet.getpixel(at) for at in (QUERY, FIRST, SECOND)] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert sheet.getpixel((QUERY[0], QUERY[1] + 230)) == (0, 0, 255)


def test_small_pictures_are_enlarged_without_blur(tmp_path: Path) -> None:
    dots = Image.new("RGB", (2, 2), "black")
    dots.putpixel((0, 0), (255, 255, 255))
    dots.save(tmp_path / "dots.png")
    sheet, _ = draw(tmp_path / "out.png", [SheetLine(tmp_path / "dots.png", ())])
    tile = sheet.crop((24, 24, 24 + 176, 24 + 176))
    assert set(tile.get_flattened_data()) == {(0, 0, 0), (255, 255, 255)}
    assert tile.getpixel((87, 87)) == (255, 255, 255)
    assert tile.getpixel((88, 87)) == (0, 0, 0)


def test_pictures_that_cannot_be_opened_are_grey_and_counted(tmp_path: Path) -> None:
    good = plain(tmp_path / "good.png", "red")
    (tmp_path / "broken.png").write_bytes(good.read_bytes()[:50])
    too_large = plain(tmp_path / "large.png", "red", (101, 100))
    os.mkfifo(tmp_path / "pipe.png")  # Opened as files are, it would be waited for.
    pictures = (None, tmp_path / "none.png", tmp_path / "broken.png", too_large, tmp_path / "pipe.png", good)
    hits = tuple(SheetHit(f"{i}", picture, 0.5) for i, picture in enumerate(pictures))
    sheet, missing = draw(tmp_path / "out.png", [SheetLine(good, hits)])
    assert missing == 5
    corners = [sheet.getpixel((236 + 188 * i + 20, 40)) for i in range(6)]
    assert corners == [(229, 229, 234)] * 5 + [(255, 0, 0)]


def test_borders_are_green_where_labels_agree_and_red_where_not(tmp_path: Path) -> None:
    red = plain(tmp_path / "r.png", "red")
    hits = (SheetHit("a", red, 0.9, "cat"), SheetHit("b", red, 0.9, "dog"), SheetHit("c", red, 0.9))
    sheet, _ = draw(tmp_path / "out.png", [SheetLine(red, hits, "cat")])
    edges = [sheet.getpixel((left - 2, 100)) for left in (24, 236, 424, 612)]
    assert edges == [(255, 255, 255), (31, 157, 77), (209, 52, 47), (255, 255, 255)]


def test_a_picture_is_opened_once_however_often_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def open_picture(path: Path, max_pixels: int, size: int) -> Image.Image | None:
        opened.append(path)
        return queries.open_picture(path, max_pixels, size)

    monkeypatch.setattr("search.views.sheet.open_picture", open_picture)
    red, none = plain(tmp_path / "r.png", "red"), tmp_path / "none.png"
    hits = (SheetHit("r", red, 0.9, "cat"), SheetHit("n", none, 0.9), SheetHit("r", red, 0.9, "dog"))
    sheet, missing = draw(tmp_path / "out.png", [SheetLine(red, hits, "cat"), SheetLine(none, hits)])
    assert (missing, opened) == (3, [red, none])
    tiles = [sheet.crop((left, top, left + 176, top + 176)).tobytes() for left in (24, 236, 612) for top in (24, 254)]
    assert tiles[1] != tiles[0] and {*tiles[:1], *tiles[2:]} == {tiles[0]}


def test_a_long_or_foreign_name_does_not_break_a_sheet(tmp_path: Path) -> None:
    red = plain(tmp_path / "r.png", "red")
    hits = (SheetHit("x" * 500 + ".jpg", red, 0.9), SheetHit("類似.jpg", red, 0.9), SheetHit("\udce9", red, -0.1))
    assert draw(tmp_path / "out.jpg", [SheetLine(red, hits)])[1] == 0


def test_a_sheet_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RuijiError, match="cannot write"):
        write_sheet(tmp_path / "file" / "out.png", [SheetLine(tmp_path / "none.png", ())], MAX_PIXELS)
