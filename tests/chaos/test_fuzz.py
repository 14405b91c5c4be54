"""Decoding of damaged files, for a bounded time: pixels or an `ImageError`, never anything else."""

import io
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.choices import Reason
from pipeline.errors import ImageError
from pipeline.spec import PIXELS
from tests.chaos.harness import LONG, sized
from tests.conftest import ROOT, SHARED
from tests.workers.decode.test_images import SPEC
from workers.decode import heif, icon
from workers.decode.images import FORMATS, load_pixels

#: Small, so that an example takes a millisecond and no large header gets far.
LIMIT_PIXELS = 10**6
#: Larger files of the nasty set are left out: there are enough small ones of every format.
LARGEST_BYTES = 50_000


def seeds() -> list[bytes]:
    """A sound file of every format, and the nasty set where it is at hand."""
    found = []
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for kind in sorted(set(FORMATS) - {"DIB", heif.PLUGIN, icon.PLUGIN} | {"ICO"}):
        for mode in ("RGB", "L", "P", "LA", "RGBA", "I;16", "CMYK"):
            buffer = io.BytesIO()
            with suppress(OSError, ValueError):  # Not every format has every mode.
                image.convert("L" if mode == "I;16" else mode).convert(mode).save(buffer, kind)
                found.append(buffer.getvalue())
    # Pillow does not write HEIF.
    found += [path.read_bytes() for path in sorted((ROOT / "tests" / "data" / "heif").glob("*.heic"))]
    nasty = SHARED / "nasty"
    found += [
        path.read_bytes()
        for path in sorted(nasty.rglob("*"))
        if path.is_file() and 0 < path.stat().st_size <= LARGEST_BYTES
    ]
    return found


SEEDS = seeds()


@given(data=st.data())
@settings(max_examples=sized(1500, 50_000), derandomize=not LONG)
def test_damaged_files_end_as_pixels_or_as_a_reason(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 10))):
        # Headers decide most, so half of the damage is near the beginning.
        last = len(content) - 1
        place = data.draw(st.one_of(st.integers(0, min(63, last)), st.integers(0, last)))
        content[place] = data.draw(st.integers(0, 255))
    (tmp_path / "x").write_bytes(content[: data.draw(st.integers(1, len(content)))])
    failure, spec = None, replace(SPEC, pixels=data.draw(st.sampled_from(PIXELS)))
    try:
        assert load_pixels(tmp_path / "x", spec, LIMIT_PIXELS).shape == (224, 224, 3)
    except ImageError as error:
        failure = error
    assert failure is None or (failure.reason in set(Reason) and str(tmp_path) not in str(failure))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the nasty set is not here")
def test_the_nasty_set_is_among_the_seeds() -> None:
    assert len(SEEDS) > 150
