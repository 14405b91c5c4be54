"""The compiled resizing gives Pillow's bits, whatever the size, and where it cannot, Pillow is left to it."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.model import RESIZE_FILTERS
from tests.workers.test_images import LIMIT, SPEC
from workers.images import load_pixels
from workers.resize import has_filter, is_compiled, resize

ROOT = Path(__file__).resolve().parent.parent.parent
compiled = pytest.mark.skipif(not is_compiled(), reason="it is not compiled: no compiler, or not x86-64 with AVX2")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Of the extremes too, where filters overshoot and sums have to be clipped."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
    extremes = random.choice(np.array([0, 255], dtype=np.uint8), (height, width, 4))
    return np.where(random.random((height, width, 1)) < 0.5, values, extremes)


def by_pillow(pixels: np.ndarray, width: int, height: int, filter_name: str) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))
    return np.asarray(image.resize((width, height), Image.Resampling[filter_name.upper()]))


@compiled
@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic"])
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    target=st.tuples(st.integers(1, 240), st.integers(1, 240)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=150, deadline=None)
def test_every_size_has_pillows_bits(
    filter_name: str, size: tuple[int, int], target: tuple[int, int], seed: int
) -> None:
    pixels = noise(*size, seed)
    ours = resize(pixels, target[1], target[0], filter_name)
    if ours is None:
        # Only what is smaller than the window of the filter or a vector.
        assert min(*size, target[1]) < 8 or max(size[0] / target[0], size[1] / target[1]) * 4 + 2 > min(size)
    else:
        assert (ours == by_pillow(pixels, target[1], target[0], filter_name)).all()


@compiled
@pytest.mark.parametrize(
    "size", [(375, 500), (500, 375), (500, 333), (224, 224), (224, 500), (500, 224), (100, 80), (3001, 4003), (901, 17)]
)
def test_photos_of_both_orders_of_passes_have_pillows_bits(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    ours = resize(pixels, 224, 224, "bicubic")
    assert ours is not None
    assert (ours == by_pillow(pixels, 224, 224, "bicubic")).all()


@compiled
@pytest.mark.parametrize("size", [(3, 3), (224, 2), (1, 224), (20_000, 40), (40, 60_000)])
def test_what_does_not_fit_its_windows_is_left_to_pillow(size: tuple[int, int], tmp_path: Path) -> None:
    assert resize(noise(*size), 8, 8, "bicubic") is None
    Image.fromarray(noise(*size)[:, :, :3]).save(tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        assert (load_pixels(tmp_path / "x.jpg", SPEC, LIMIT) == np.asarray(image.resize((224, 224)))).all()


@pytest.mark.parametrize("filter_name", RESIZE_FILTERS)
def test_a_jpeg_has_pillows_pixels_with_every_filter(tmp_path: Path, filter_name: str) -> None:
    spec = replace(SPEC, resize=filter_name)
    Image.fromarray(noise(120, 180)[:, :, :3]).save(tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        expected = np.asarray(image.resize((224, 224), Image.Resampling[filter_name.upper()]))
    assert (load_pixels(tmp_path / "x.jpg", spec, LIMIT) == expected).all()


@compiled
def test_pixels_of_another_shape_are_refused() -> None:
    for wrong in (noise(9, 9)[:, :, :3], noise(9, 9)[:, ::2], noise(9, 9).astype(np.float32), noise(9, 9)[0]):
        with pytest.raises(ValueError, match="contiguous"):
            resize(wrong, 8, 8, "bicubic")
    assert not has_filter("lanczos")


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_it_is_compiled_without_a_warning_and_reads_and_writes_nothing_else(tmp_path: Path) -> None:
    """Every read and write is checked by the compiler's own sanitizers, in a program that resizes many sizes."""
    (tmp_path / "main.c").write_text(
        """
        #include <stdlib.h>
        #include <stdint.h>
        int ruiji_resize_supported(void);
        int ruiji_resize(const uint8_t *, int, int, uint8_t *, int, int, int);
        int main(void) {
            for (int n = 0; n < 3000 && ruiji_resize_supported(); n++) {
                int h = 1 + rand() % 90, w = 1 + rand() % 90, oh = 1 + rand() % 50, ow = 1 + rand() % 50;
                uint8_t *in = malloc((size_t)h * w * 4), *out = malloc((size_t)oh * ow * 3);
                for (int i = 0; i < h * w * 4; i++) in[i] = (uint8_t)rand();
                if (ruiji_resize(in, h, w, out, oh, ow, n % 2) > 1) return 1;
                free(in);
                free(out);
            }
            return 0;
        }
        """
    )
    command = [
        "cc",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Werror",
        "-fsanitize=address,undefined",
    ]
    built = subprocess.run(
        [
            *command,
            "-fno-sanitize-recover=all",
            tmp_path / "main.c",
            ROOT / "workers/_resize.c",
            "-lm",
            "-o",
            tmp_path / "x",
        ],
        capture_output=True,
        text=True,
    )
    if "sanitize" in built.stderr or "asan" in built.stderr:
        pytest.skip("the compiler has no sanitizers here")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([tmp_path / "x"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_without_the_compiled_library_pillow_resizes(tmp_path: Path) -> None:
    Image.fromarray(noise(120, 180)[:, :, :3]).save(tmp_path / "x.jpg")
    code = (
        "import sys; sys.modules['workers._resize'] = None\n"
        "from tests.workers.test_images import LIMIT, SPEC\n"
        "from workers.images import load_pixels\n"
        "from workers.resize import is_compiled\n"
        "from pathlib import Path\n"
        "assert not is_compiled()\n"
        f"sys.stdout.buffer.write(load_pixels(Path({str(tmp_path / 'x.jpg')!r}), SPEC, LIMIT).tobytes())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == load_pixels(tmp_path / "x.jpg", SPEC, LIMIT).tobytes()
