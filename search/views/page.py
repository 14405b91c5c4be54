"""One HTML page with queries and their hits: pictures inside, each once, no scripts, nothing loaded from elsewhere."""

import base64
import html
import io
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UsageError
from pipeline.streams import shown
from pipeline.targets import writing
from search.views.sheet import SheetHit, SheetLine
from search.views.thumbnail import make_thumbnail

#: A picture's longer side, in pixels: sharp at twice the size that it is shown in.
_SIDE = 320
#: Places for pictures, which a browser lays out in a few seconds, and pictures, about 20 kB each.
_MAX_PLACES, _MAX_PICTURES = 20_000, 5_000
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c1e; --faint: #6e6e73; --tile: #f5f5f7; --rule: #d2d2d7;
  --right: #1f9d4d; --wrong: #d1342f; }
@media (prefers-color-scheme: dark) { :root { --paper: #1c1c1e; --ink: #f5f5f7; --faint: #98989d; --tile: #2c2c2e;
  --rule: #48484a; } }
body { margin: 2rem; background: var(--paper); color: var(--ink); font: 15px/1.35 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 .25rem; }
header p { margin: 0 0 1.5rem; color: var(--faint); }
section { display: flex; gap: 12px; padding: 1rem 0; border-top: 1px solid var(--rule); overflow-x: auto; }
figure { flex: 0 0 168px; width: 168px; margin: 0; }
figure.query { position: sticky; left: 0; background: var(--paper); padding-right: 12px;
  border-right: 2px solid var(--rule); z-index: 1; }
.tile { height: 168px; display: flex; align-items: center; justify-content: center; background: var(--tile);
  color: var(--faint); border: 4px solid transparent; border-radius: 6px; box-sizing: border-box; }
.right .tile { border-color: var(--right); }
.wrong .tile { border-color: var(--wrong); }
i { width: 100%; height: 100%; background: center / contain no-repeat; print-color-adjust: exact; }
i.small { image-rendering: pixelated; }
figcaption b { display: block; margin-top: 6px; }
figcaption span { display: block; color: var(--faint); font-size: 12px; overflow-wrap: anywhere; }
"""


def check_page(queries: int, top_k: int, objects: int) -> None:
    """Check, before any work, that a page can be looked at.

    Args:
        objects: in the gallery, which bounds the pictures of all hits.

    Raises:
        UsageError: it would be too large.
    """
    hits = min(top_k, objects)
    places, pictures = queries * (1 + hits), queries + min(queries * hits, objects)
    if places > _MAX_PLACES or pictures > _MAX_PICTURES:
        raise UsageError(
            f"a page of {queries} queries with {hits} hits would have up to {pictures} pictures in {places} places, "
            f"more than {_MAX_PICTURES} in {_MAX_PLACES}; search with fewer queries, or a smaller --top-k"
        )


def write_page(target: Path, title: str, about: str, lines: list[SheetLine], max_pixels: int) -> int:
    """Write the page.

    Args:
        max_pixels: pictures with more pixels are not decoded.

    Returns:
        How many pictures could not be opened.

    Raises:
        RuijiError: the file cannot be written.
    """
    numbers = {
        picture: number for number, picture in enumerate(dict.fromkeys(p for p in _places(lines) if p is not None))
    }
    #: Picture → the classes that show it; those that cannot be opened are not there.
    classes: dict[Path, str] = {}
    with writing(target) as binary, io.TextIOWrapper(binary, encoding="utf-8", newline="\n") as file:

        def write(text: str) -> None:
            file.write(text + "\n")

        write("<!doctype html>")
        write(f'<html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>')
        write('<meta name="viewport" content="width=device-width, initial-scale=1">')
        write(f"<style>{_STYLE}")
        # Each picture once, as the background of its class, however many places it is in.
        for picture, number in numbers.items():
            thumbnail = _thumbnail(picture, max_pixels)
            if thumbnail is not None:
                url, small = thumbnail
                classes[picture] = f"p{number} small" if small else f"p{number}"
                write(f".p{number} {{ background-image: url({url}) }}")
        write("</style>")
        write(f"<header><h1>{_text(title)}</h1><p>{_text(about)}</p></header>")
        for line in lines:
            write("<section>")
            fact = "query" if line.label is None else f"query · {line.label}"
            shown_by = classes.get(line.query) if line.query else None
            write(_figure(shown_by, "query", fact, line.title, line.words))
            for rank, hit in enumerate(line.hits, 1):
                label = "" if hit.label is None else f" · {hit.label}"
                fact = f"{rank} · {hit.similarity:.4f}{label}"
                shown_by = classes.get(hit.picture) if hit.picture else None
                write(_figure(shown_by, _verdict(line, hit), fact, hit.object_id))
            if not line.hits:
                write("<p>nothing found</p>")
            write("</section>")
        write("</html>")
    return len(numbers) - len(classes) + sum(picture is None for picture in _places(lines))


def _places(lines: list[SheetLine]) -> Iterator[Path | None]:
    for line in lines:
        if not line.words:
            yield line.query
        for hit in line.hits:
            yield hit.picture


def _verdict(line: SheetLine, hit: SheetHit) -> str:
    if hit.label is None or line.label is None:
        return ""
    return "right" if hit.label == line.label else "wrong"


def _figure(shown_by: str | None, kind: str, fact: str, name: str, words: bool = False) -> str:
    """One place for a picture, with its caption.

    Args:
        shown_by: the classes of its picture; None if there is none.
        words: the name stands where a picture would.
    """
    image = _text(name) if words else "no picture"
    if shown_by is not None:
        image = f'<i class="{shown_by}" role="img" aria-label="{_text(name)}"></i>'
    return (
        f'<figure class="{kind}"><div class="tile">{image}</div>'
        f"<figcaption><b>{_text(fact)}</b><span>{_text(name)}</span></figcaption></figure>"
    )


def _thumbnail(path: Path, max_pixels: int) -> tuple[str, bool] | None:
    """A picture as a URL, and whether it is small: digits and icons are shown pixel by pixel."""
    made = make_thumbnail(path, _SIDE, max_pixels)
    if made is None:
        return None
    return f"data:image/{made.kind};base64,{base64.b64encode(made.data).decode()}", made.small


def _text(value: str) -> str:
    return html.escape(shown(value))
