"""Contact sheets: one line for each query, its picture at the left, then its hits in order."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

from pipeline.errors import UsageError
from pipeline.streams import shown
from pipeline.targets import writing
from search.queries import open_picture

ENDINGS = (".jpg", ".jpeg", ".png")
#: JPEG cannot be larger, and no viewer shows more.
_MAX_SIDE = 65_000
_MAX_SHEET_PIXELS = 300_000_000

_TILE = 176
_GAP = 12
_BORDER = 4
_CAPTION = 42
#: Lines of words in a tile.
_WORD_LINES = 8
_MARGIN = 24
#: Between the query and its hits, with a rule in its middle.
_DIVIDE = 36
_CELL_HEIGHT = _TILE + _CAPTION
#: Pictures up to this size (digits, icons) are enlarged in whole steps, so that each pixel stays a square.
_SMALL = _TILE // 2

#: Of near-duplicates a sheet shows so many groups, and so many members beside the first.
GROUP_LINES, GROUP_HITS = 100, 12

_PAPER, _INK, _FAINT, _RULE, _EMPTY = "#ffffff", "#1c1c1e", "#6e6e73", "#d2d2d7", "#e5e5ea"
_RIGHT, _WRONG = "#1f9d4d", "#d1342f"

#: Picture → left and top of its first tile, and whether it could not be opened.
_Drawn: TypeAlias = dict[Path | None, tuple[int, int, bool]]


@dataclass(frozen=True)
class SheetHit:
    """One hit of a line.

    Attributes:
        picture: its image file, or None if that is not known.
        label: what it shows, where labels are known.
    """

    object_id: str
    picture: Path | None
    similarity: float
    label: str | None = None


@dataclass(frozen=True)
class SheetLine:
    """One query, or one group, and its hits, best first.

    Attributes:
        query: its picture, or None if there is none.
        words: whether its name is what is searched with, and stands where a picture would.
        label: what the query shows, where labels are known.
        name: written below the query's picture; by default its file's.
    """

    query: Path | None
    hits: tuple[SheetHit, ...]
    label: str | None = None
    name: str = ""
    words: bool = False

    @property
    def title(self) -> str:
        """What is written below the query's picture."""
        return self.name or ("" if self.query is None else self.query.name)


def check_target(target: Path, queries: int, top_k: int) -> None:
    """Check, before any work, that a sheet can be written.

    Raises:
        UsageError: its ending is not that of a JPEG or PNG, or it would be too large.
    """
    if target.suffix.lower() not in ENDINGS:
        raise UsageError(f"cannot write a sheet to {target}: its name must end in {', '.join(ENDINGS)}")
    width, height = _size(queries, top_k)
    if max(width, height) > _MAX_SIDE or width * height > _MAX_SHEET_PIXELS:
        raise UsageError(
            f"a sheet of {queries} queries with {top_k} hits would have {width} x {height} pixels; "
            "search with fewer queries, or a smaller --top-k"
        )


def write_sheet(target: Path, lines: list[SheetLine], max_pixels: int, role: str = "query") -> int:
    """Draw a sheet and write it, as JPEG or PNG by its ending.

    Hits have a green border if their label is the query's and a red one if it is another; none without labels.

    Args:
        max_pixels: pictures with more pixels are not decoded.
        role: what the picture at the left is called.

    Returns:
        How many pictures could not be opened and are grey.

    Raises:
        RuijiError: the file cannot be written.
    """
    sheet = Image.new("RGB", _size(len(lines), max((len(line.hits) for line in lines), default=0)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    missing = 0
    drawn: _Drawn = {}
    for index, line in enumerate(lines):
        top = _MARGIN + index * (_CELL_HEIGHT + _GAP)
        if line.words:
            _write_words(draw, line.name, _MARGIN, top)
        else:
            missing += _picture(sheet, line.query, _MARGIN, top, max_pixels, drawn)
        _caption(draw, _MARGIN, top, line.title, role if line.label is None else f"{role} · {line.label}")
        rule = _MARGIN + _TILE + _DIVIDE // 2
        draw.line([(rule, top), (rule, top + _TILE)], fill=_RULE, width=2)
        for rank, hit in enumerate(line.hits, 1):
            left = _MARGIN + _TILE + _DIVIDE + (rank - 1) * (_TILE + _GAP)
            missing += _picture(sheet, hit.picture, left, top, max_pixels, drawn)
            label = "" if hit.label is None else f" · {hit.label}"
            _caption(draw, left, top, hit.object_id, f"{rank} · {hit.similarity:.4f}{label}")
            if hit.label is not None and line.label is not None:
                color = _RIGHT if hit.label == line.label else _WRONG
                box = [left - _BORDER, top - _BORDER, left + _TILE + _BORDER - 1, top + _TILE + _BORDER - 1]
                draw.rectangle(box, outline=color, width=_BORDER)
    with writing(target) as file:
        sheet.save(file, "PNG" if target.suffix.lower() == ".png" else "JPEG", quality=90)
    return missing


def _size(lines: int, hits: int) -> tuple[int, int]:
    width = 2 * _MARGIN + _TILE + _DIVIDE + hits * (_TILE + _GAP) - _GAP
    return width, 2 * _MARGIN + lines * (_CELL_HEIGHT + _GAP) - _GAP


def _picture(sheet: Image.Image, path: Path | None, left: int, top: int, max_pixels: int, drawn: _Drawn) -> bool:
    """Paste a picture into its tile; True if there is none and the tile is grey.

    Args:
        drawn: the tiles so far, from which one that is there already is copied.
    """
    if path not in drawn:
        drawn[path] = left, top, _draw_tile(sheet, path, left, top, max_pixels)
    first_left, first_top, missing = drawn[path]
    if (first_left, first_top) != (left, top):
        sheet.paste(sheet.crop((first_left, first_top, first_left + _TILE, first_top + _TILE)), (left, top))
    return missing


def _draw_tile(sheet: Image.Image, path: Path | None, left: int, top: int, max_pixels: int) -> bool:
    picture = None if path is None else open_picture(path, max_pixels, _TILE)
    draw = ImageDraw.Draw(sheet)
    draw.rectangle([left, top, left + _TILE - 1, top + _TILE - 1], fill=_EMPTY if picture is None else "#f5f5f7")
    if picture is None:
        draw.text((left + _TILE // 2, top + _TILE // 2), "no picture", fill=_FAINT, font=_font(13), anchor="mm")
        return True
    longest = max(picture.size)
    if longest <= _SMALL:
        step = _TILE // longest
        picture = picture.resize((picture.width * step, picture.height * step), Image.Resampling.NEAREST)
    else:
        scale = _TILE / longest
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(picture, (left + (_TILE - picture.width) // 2, top + (_TILE - picture.height) // 2))
    return False


def _write_words(draw: ImageDraw.ImageDraw, words: str, left: int, top: int) -> None:
    """Words in a tile, a line for as many as fit beside each other; the last lines of many are left out."""
    draw.rectangle([left, top, left + _TILE - 1, top + _TILE - 1], fill="#f5f5f7")
    font, lines = _font(15), [""]
    for word in shown(words).split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= _TILE - 2 * _GAP:
            lines[-1] = longer
        else:
            lines.append(word)
    kept = lines if len(lines) <= _WORD_LINES else [*lines[: _WORD_LINES - 1], "…"]
    text = "\n".join(_shortened(line, font) for line in kept)
    draw.multiline_text((left + _TILE // 2, top + _TILE // 2), text, fill=_INK, font=font, anchor="mm", align="center")


def _caption(draw: ImageDraw.ImageDraw, left: int, top: int, name: str, fact: str) -> None:
    """Two lines below a tile: the fact in ink, the name below it, shortened in its middle."""
    bold, small = _font(15), _font(12)
    draw.text((left, top + _TILE + 6), shown(fact), fill=_INK, font=bold)
    draw.text((left, top + _TILE + 25), _shortened(name, small), fill=_FAINT, font=small)


def _shortened(name: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    # The ending tells formats apart and the beginning tells ids apart, so the middle goes.
    name = shown(name)
    if font.getlength(name) <= _TILE:
        return name
    kept = len(name)
    while kept > 8 and font.getlength(short := f"{name[: kept - 8]}…{name[-8:]}") > _TILE:
        kept -= 1
    return short


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
