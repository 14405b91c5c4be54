"""The compiled resizing gives Pillow's bits, whatever the size, and where it cannot, Pillow is left to it."""

import ctypes
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pipeline import compiled as compiled_libraries
from pipeline.spec import RESIZE_FILTERS
from tests.properties import examples
from tests.sanitized import run_sanitized
from tests.workers.decode.test_images import LIMIT, SPEC
from workers.decode import images
from workers.decode import resize as resizing
from workers.decode.images import load_pixels
from workers.decode.resize import has_filter, resize, why_not

ROOT = Path(__file__).resolve().parents[3]
CPU = Path("/proc/cpuinfo")
HAS_AVX2 = platform.machine() == "x86_64" and CPU.exists() and "avx2" in CPU.read_text()
# Not `why_not`, which finds fault with wrong pixels too: those have to fail here.
compiled = pytest.mark.skipif(
    find_spec("workers._resize") is None or not HAS_AVX2, reason="it was not compiled, or the processor has no AVX2"
)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Of the extremes too, where filters overshoot and sums have to be clipped."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (height, width, 4), dtype=np.uint8)
    extremes = random.integers(0, 2, (height, width, 4), dtype=np.uint8) * np.uint8(255)
    return np.where(random.integers(0, 2, (height, width, 1), dtype=np.uint8), values, extremes)


def by_pillow(pixels: np.ndarray, width: int, height: int, filter_name: str) -> np.ndarray:
    image = Image.fromarray(np.ascontiguousarray(pixels[:, :, :3]))
    return np.asarray(image.resize((width, height), Image.Resampling[filter_name.upper()]))


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_it_was_compiled_where_there_is_a_compiler() -> None:
    assert find_spec("workers._resize"), "install ruiji again: make clean setup"


@compiled
def test_it_is_used_for_color_jpegs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not() is None
    Image.fromarray(noise(120, 180)[:, :, :3]).save(tmp_path / "x.jpg")
    used: list[tuple[int, ...]] = []
    monkeypatch.setattr(images, "resize", lambda pixels, *rest: used.append(pixels.shape) or resize(pixels, *rest))
    load_pixels(tmp_path / "x.jpg", SPEC, LIMIT)
    assert used == [(120, 180, 4)]


@compiled
@pytest.mark.parametrize("filter_name", ["bilinear", "bicubic"])
@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    target=st.tuples(st.integers(1, 240), st.integers(1, 240)),
    crop=st.tuples(*[st.floats(0, 1)] * 4),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=examples(300))
def test_every_window_of_every_size_has_pillows_bits(
    filter_name: str, size: tuple[int, int], target: tuple[int, int], crop: tuple[float, ...], seed: int
) -> None:
    pixels = noise(*size, seed)
    height, width = target
    left, top = int(crop[0] * (width - 1)), int(crop[1] * (height - 1))
    right, bottom = left + 1 + int(crop[2] * (width - 1 - left)), top + 1 + int(crop[3] * (height - 1 - top))
    ours = resize(pixels, (width, height), (left, top, right, bottom), filter_name)
    if ours is None:
        # Only what is smaller than the window of the filter or a vector.
        assert min(*size, right - left) < 8 or max(size[0] / height, size[1] / width) * 4 + 2 > min(size)
    else:
        assert (ours == by_pillow(pixels, width, height, filter_name)[top:bottom, left:right]).all()


@compiled
@pytest.mark.parametrize("window", [(-1, 0, 8, 8), (0, 0, 9, 8), (0, 0, 8, 9), (4, 0, 4, 8), (0, 5, 8, 4)])
def test_a_window_that_lies_outside_is_refused(window: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="does not lie within"):
        resize(noise(40, 40), (8, 8), window, "bicubic")


@compiled
@pytest.mark.parametrize(
    "size", [(375, 500), (500, 375), (500, 333), (224, 224), (224, 500), (500, 224), (100, 80), (3001, 4003), (901, 17)]
)
def test_photos_of_both_orders_of_passes_have_pillows_bits(size: tuple[int, int]) -> None:
    pixels = noise(*size)
    ours = resize(pixels, (224, 224), (0, 0, 224, 224), "bicubic")
    assert ours is not None
    assert (ours == by_pillow(pixels, 224, 224, "bicubic")).all()


@compiled
@pytest.mark.parametrize("size", [(3, 3), (224, 2), (1, 224), (20_000, 40), (40, 60_000)])
def test_what_does_not_fit_its_windows_is_left_to_pillow(size: tuple[int, int], tmp_path: Path) -> None:
    pixels = noise(*size)
    assert resize(pixels, (8, 8), (0, 0, 8, 8), "bicubic") is None
    Image.fromarray(pixels[:, :, :3]).save(tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        assert (load_pixels(tmp_path / "x.jpg", SPEC, LIMIT) == np.asarray(image.resize((224, 224)))).all()


@pytest.mark.parametrize("filter_name", RESIZE_FILTERS)
def test_a_jpeg_has_pillows_pixels_with_every_filter(tmp_path: Path, filter_name: str) -> None:
    spec = replace(SPEC, resize=filter_name)
    Image.fromarray(noise(120, 180)[:, :, :3]).save(tmp_path / "x.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        expected = np.asarray(image.resize((224, 224), Image.Resampling[filter_name.upper()]))
    assert (load_pixels(tmp_path / "x.jpg", spec, LIMIT) == expected).all()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_grey_model_sees_a_color_jpeg_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    spec = replace(SPEC, color="L", mean=(0.5,), std=(0.25,))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(120, 180)[:, :, :3]).save(tmp_path / "x.jpg", exif=exif)
    with Image.open(tmp_path / "x.jpg") as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("L").resize((224, 224)))
    assert (load_pixels(tmp_path / "x.jpg", spec, LIMIT)[:, :, 0] == expected).all()


@compiled
def test_pixels_of_another_shape_are_refused() -> None:
    for wrong in (noise(9, 9)[:, :, :3], noise(9, 9)[:, ::2], noise(9, 9).astype(np.float32), noise(9, 9)[0]):
        with pytest.raises(ValueError, match="contiguous"):
            resize(wrong, (8, 8), (0, 0, 8, 8), "bicubic")
    assert not has_filter("lanczos")


@pytest.mark.skipif(shutil.which("cc") is None or not HAS_AVX2, reason="there is no C compiler, or no AVX2")
def test_it_is_compiled_without_a_warning_and_reads_and_writes_nothing_else(tmp_path: Path) -> None:
    """Every read and write is checked by the compiler's own sanitizers, in a program that resizes many sizes."""
    program = """
        #include <stdlib.h>
        #include <stdint.h>
        int ruiji_resize_window(const uint8_t *, int, int, int, int, uint8_t *, int, int, int, int, int);
        static int one(int h, int w, int oh, int ow, int filter, int whole) {
            uint8_t *in = malloc((size_t)h * w * 4), *out = malloc((size_t)oh * ow * 3);
            for (int i = 0; i < h * w * 4; i++) in[i] = (uint8_t)rand();
            /* The memory ends with the window, and so it does in the whole. */
            int top = rand() % oh, left = rand() % ow, wh = 1 + rand() % (oh - top), ww = 1 + rand() % (ow - left);
            if (whole) top = left = 0, wh = oh, ww = ow;
            out = realloc(out, (size_t)wh * ww * 3);
            int outcome = ruiji_resize_window(in, h, w, oh, ow, out, top, left, wh, ww, filter);
            free(in);
            free(out);
            return outcome;
        }
        int main(void) {
            int small = 0;
            for (int n = 0; n < 3000; n++)
                small += !one(1 + rand() % 90, 1 + rand() % 90, 1 + rand() % 50, 1 + rand() % 50, n % 2, !(n % 3));
            /* As many taps as there may be, in either direction; and a result that no memory holds. */
            if (one(2540, 40, 10, 20, 1, 1) || one(40, 2540, 20, 10, 1, 1) || one(2550, 2550, 10, 10, 1, 1)) return 1;
            return small < 1000 || ruiji_resize_window(0, 1 << 30, 8, 8, 1 << 30, 0, 0, 0, 8, 1 << 30, 1) != 1;
        }
        """
    run_sanitized(tmp_path, program, ROOT / "workers" / "_resize.c")


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_library_of_another_version_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.c").write_text("int ruiji_resize_supported(void) { return 1; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "x.so", tmp_path / "x.c"], check=True)
    found = find_spec("json")
    assert found is not None
    found.origin = str(tmp_path / "x.so")
    monkeypatch.setattr(compiled_libraries, "find_spec", lambda name: found)
    answer = resizing._library.__wrapped__()
    assert isinstance(answer, str) and "install ruiji again" in answer


@pytest.mark.parametrize("wrong", ["zeros", "declined"])
def test_a_library_with_other_pixels_is_not_used(wrong: str) -> None:
    class Library:
        @staticmethod
        def ruiji_resize_window(
            pixels: int, h: int, w: int, resized_h: int, resized_w: int, out: int, *window: int
        ) -> int:
            if wrong == "zeros":
                ctypes.memset(out, 0, window[2] * window[3] * 3)
            return int(wrong == "declined")

    assert not resizing._has_pillows_bits(Library())


def test_without_the_compiled_library_pillow_resizes(tmp_path: Path) -> None:
    Image.fromarray(noise(120, 180)[:, :, :3]).save(tmp_path / "x.jpg")
    code = (
        "import sys; sys.modules['workers._resize'] = None\n"
        "from tests.workers.decode.test_images import LIMIT, SPEC\n"
        "from workers.decode.images import load_pixels\n"
        "from workers.decode.resize import why_not\n"
        "from pathlib import Path\n"
        "assert 'no C compiler' in why_not()\n"
        f"sys.stdout.buffer.write(load_pixels(Path({str(tmp_path / 'x.jpg')!r}), SPEC, LIMIT).tobytes())\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == load_pixels(tmp_path / "x.jpg", SPEC, LIMIT).tobytes()
