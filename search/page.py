"""One HTML page with queries and their hits: pictures inside, no scripts, nothing loaded from elsewhere."""

import base64
import html
import io
from pathlib import Path

from pipeline.errors import RuijiError
from search.queries import open_picture
from search.sheet import SheetHit, SheetLine

#: A picture's longer side, in pixels: sharp at twice the size that it is shown in.
_SIDE = 320
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
img { max-width: 100%; max-height: 100%; object-fit: contain; }
img.small { width: 100%; height: 100%; image-rendering: pixelated; }
figcaption b { display: block; margin-top: 6px; }
figcaption span { display: block; color: var(--faint); font-size: 12px; overflow-wrap: anywhere; }
"""


def write_page(target: Path, title: str, about: str, lines: list[SheetLine], max_pixels: int) -> int:
    """Write the page.

    Args:
        max_pixels: pictures with more pixels are not decoded.

    Returns:
        How many pictures could not be opened.

    Raises:
        RuijiError: the file cannot be written.
    """
    missing = 0
    parts = [
        "<!doctype html>",
        f'<html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style>",
        f"<header><h1>{_text(title)}</h1><p>{_text(about)}</p></header>",
    ]
    for line in lines:
        parts.append("<section>")
        fact = "query" if line.label is None else f"query · {line.label}"
        missing += _figure(parts, line.query, "query", fact, line.title, max_pixels)
        for rank, hit in enumerate(line.hits, 1):
            label = "" if hit.label is None else f" · {hit.label}"
            fact = f"{rank} · {hit.similarity:.4f}{label}"
            missing += _figure(parts, hit.picture, _verdict(line, hit), fact, hit.object_id, max_pixels)
        if not line.hits:
            parts.append("<p>nothing found</p>")
        parts.append("</section>")
    parts.append("</html>\n")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise RuijiError(f"cannot write the page {target}: {error.strerror}") from None
    return missing


def _verdict(line: SheetLine, hit: SheetHit) -> str:
    if hit.label is None or line.label is None:
        return ""
    return "right" if hit.label == line.label else "wrong"


def _figure(parts: list[str], picture: Path | None, kind: str, fact: str, name: str, max_pixels: int) -> bool:
    """Add one picture with its caption; True where there is no picture."""
    source = None if picture is None else _data_url(picture, max_pixels)
    image = "no picture" if source is None else f'<img {source[1]}src="{source[0]}" alt="{_text(name)}">'
    parts.append(
        f'<figure class="{kind}"><div class="tile">{image}</div>'
        f"<figcaption><b>{_text(fact)}</b><span>{_text(name)}</span></figcaption></figure>"
    )
    return source is None


def _data_url(path: Path, max_pixels: int) -> tuple[str, str] | None:
    picture = open_picture(path, max_pixels, _SIDE)
    if picture is None:
        return None
    buffer = io.BytesIO()
    # Small pictures (digits, icons) are shown pixel by pixel, so nothing of them may be lost.
    small = max(picture.size) <= _SIDE // 4
    picture.thumbnail((_SIDE, _SIDE))
    picture.save(buffer, "PNG" if small else "JPEG", quality=85)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", 'class="small" ' if small else ""


def _text(value: str) -> str:
    return html.escape(value.encode("utf-8", "replace").decode())
