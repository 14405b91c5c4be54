"""HEIF: turned once, the main picture, its limits, and what is said where nothing decodes it.

`tests/data/heif/make.py` made the files, without loss; here their boxes are changed.
"""

import hashlib
import io
import struct
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.choices import Reason
from pipeline.errors import ImageError, MachineFault
from pipeline.plans.plan import Limits
from search.queries import open_picture
from tests.data.heif.make import HEIGHT, WIDTH, quarters
from tests.workers.decode.test_images import SPEC
from tests.workers.decode.test_pixels import pixels, saved
from workers.decode import heif
from workers.decode.images import decode, load_pixels
from workers.suspects.alone import ChildDied, decode_alone

FILES = Path(__file__).parents[2] / "data" / "heif"
SIZE = (WIDTH, HEIGHT)
#: The value of EXIF's orientation, in Pillow's byte order.
_ORIENTATION = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00"


def data(name: str) -> bytes:
    return (FILES / f"{name}.heic").read_bytes()


def put(file: bytes, box: bytes, content: bytes, skip: int = 0) -> bytes:
    """The file with other bytes in the only box of a kind, after as many."""
    assert file.count(box) == 1
    place = file.index(box) + len(box) + skip
    return file[:place] + content + file[place + len(content) :]


def oriented(file: bytes, orientation: int) -> bytes:
    return put(file, _ORIENTATION, bytes([orientation]))


def refused(file: bytes, max_pixels: int = 10**7) -> tuple[Reason, str]:
    with pytest.raises(ImageError) as caught:
        decode(io.BytesIO(file), SPEC, max_pixels)
    return caught.value.reason, str(caught.value)


@pytest.mark.parametrize("upright", [True, False])
@pytest.mark.parametrize("way", [1, 2])
@pytest.mark.parametrize("exif", [1, 3, 6, 8])
@pytest.mark.parametrize("quarter_turns", range(4))
def test_irot_turns_a_picture_once_whatever_exif_says(quarter_turns: int, exif: int, way: int, upright: bool) -> None:
    file = oriented(put(data("turned"), b"irot", bytes([quarter_turns])), exif)
    # As the standard counts them: to the left.
    shown = np.rot90(quarters(), quarter_turns)
    assert (pixels(file, shown.shape[1::-1], upright, way) == shown).all()


@pytest.mark.parametrize("exif", range(1, 9))
def test_imir_mirrors_a_picture_once_whatever_exif_says(exif: int) -> None:
    stored = quarters()
    file = oriented(data("mirrored"), exif)
    shown = stored.transpose(1, 0, 2)
    assert (pixels(file, shown.shape[1::-1]) == shown).all()
    other = pixels(put(file, b"imir", bytes([1 - file[file.index(b"imir") + 4]])), shown.shape[1::-1])
    assert (other == np.rot90(shown, 2)).all(), "about the other axis"


@pytest.mark.parametrize("way", [1, 2])
def test_of_several_pictures_the_main_one_is_taken(way: int) -> None:
    assert (pixels(data("several"), SIZE, way=way) == quarters()).all()


def test_no_other_picture_stands_in_for_a_main_one_that_cannot_be_decoded() -> None:
    file = data("several")
    kinds = [place for place in range(len(file)) if file.startswith(b"hvc1", place)]
    assert len(kinds) == 3
    broken = file[: kinds[1]] + b"vvc1" + file[kinds[1] + 4 :]
    assert refused(broken) == (Reason.undecodable, "its main picture is of a kind that is not decoded")
    last = file[: kinds[2]] + b"vvc1" + file[kinds[2] + 4 :]
    assert (pixels(last, SIZE) == quarters()).all()


def test_what_is_transparent_lies_on_white() -> None:
    shown = quarters().copy()
    shown[:, WIDTH // 2 :] = 255
    assert (pixels(data("transparent"), SIZE) == shown).all()
    altered: list[str] = []
    decode(io.BytesIO(data("transparent")), replace(SPEC, pixels=1), 10**7, altered)
    assert altered == ["ground"]


def test_ten_bits_become_eight() -> None:
    assert (pixels(data("wide"), SIZE) == quarters()).all()
    grey = pixels(data("wide-grey"), SIZE)
    assert (grey == grey[:, :, :1]).all()
    assert np.abs(grey[:, :, 0] - quarters()[:, :, 0].astype(int)).max() == 1


def test_a_name_that_heif_and_avif_share_decides_nothing() -> None:
    assert (pixels(data("several").replace(b"ftypheix", b"ftypmif1"), SIZE) == quarters()).all()
    avif = saved(Image.fromarray(quarters()), "AVIF", quality=100, subsampling="4:4:4")
    renamed = avif.replace(b"ftypavif", b"ftypmif1")
    assert renamed != avif and (pixels(renamed, SIZE) == pixels(avif, SIZE)).all()


def test_a_file_that_is_cut_fails() -> None:
    file = data("turned")
    for length in [*range(0, len(file) - 4, 37), len(file) - 4]:
        # Before that it has not said what it is.
        expected = Reason.truncated if length >= 12 else Reason.undecodable
        assert refused(file[:length])[0] == expected, length


def test_too_many_pixels_are_refused_by_the_header(tmp_path: Path) -> None:
    assert refused(data("turned"), 48 * 64 - 1) == (
        Reason.too_large,
        "48 x 64 pixels are more than the limit of 3071",
    )
    # What is seen of it stays 48 x 64, and all of it would be decoded.
    hidden = put(data("turned"), b"ispe", struct.pack(">II", 30_000, 20_000), skip=4)
    assert refused(hidden) == (Reason.too_large, "30000 x 20000 pixels are more than the limit of 10000000")
    (tmp_path / "x.heic").write_bytes(hidden)
    assert open_picture(tmp_path / "x.heic", 10**7, 100) is None
    (tmp_path / "x.heic").write_bytes(data("turned"))
    assert open_picture(tmp_path / "x.heic", 10**7, 100) is not None


@pytest.mark.parametrize("length", [0, 1, 7])
def test_boxes_of_odd_lengths_are_walked_to_an_end(length: int) -> None:
    file = data("turned")
    place = file.index(b"iprp") - 4
    assert list(heif._sizes(memoryview(file), heif._TO_SIZES)) == [(64, 64)]
    odd = file[:place] + struct.pack(">I", length) + file[place + 4 :]
    with suppress(struct.error):
        assert list(heif._sizes(memoryview(odd), heif._TO_SIZES)) in ([(64, 64)], [])


def test_a_suspect_is_decoded_alone_within_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.heic"
    path.write_bytes(data("turned"))
    limits = Limits(max_pixels=10**7, max_image_s=60, max_image_mb=512)
    decoded = decode_alone(path, SPEC, limits)
    assert (decoded.pixels == load_pixels(path, SPEC, 10**7)).all()
    assert decoded.digest == hashlib.sha256(data("turned")).digest()
    with pytest.raises((ImageError, ChildDied)) as caught:
        decode_alone(path, SPEC, replace(limits, max_image_mb=1))
    assert caught.value.reason in (Reason.memory, Reason.crashed_worker)


def test_without_a_decoder_the_failure_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heif, "heif_decoder", lambda: None)
    reason, said = refused(data("turned"))
    assert reason is Reason.undecodable
    assert said == "it is a HEIF picture, and pi-heif is not installed: run make setup, or pip install 'ruiji[heic]'"


def test_a_decoder_that_cannot_be_loaded_fails_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_pi_heif", None)
    with pytest.raises(MachineFault, match="pi-heif is installed and cannot be loaded"):
        decode(io.BytesIO(data("turned")), SPEC, 10**7)


def test_damage_that_ends_the_process_of_the_plugin_for_pillow_does_not_end_ours() -> None:
    file = data("turned")
    # The kind of the item that EXIF lies in is no longer text.
    place = file.index(b"Exif") + 2
    assert file.index(b"infe") < place < file.index(b"iprp")
    damaged = file[:place] + b"\x89" + file[place + 1 :]
    assert (pixels(damaged, (HEIGHT, WIDTH)) == np.rot90(quarters(), 3)).all()


def test_what_a_program_has_registered_for_heif_stays() -> None:
    script = (
        "import workers.decode.images; from PIL import Image\n"
        "assert 'HEIF' not in Image.OPEN and 'RUIJI-HEIF' not in Image.ID"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_nobody_loads_the_decoder_for_other_pictures() -> None:
    script = (
        "import io, sys; from PIL import Image; from workers.decode.images import FORMATS; out = io.BytesIO()\n"
        "Image.new('RGB', (8, 8)).save(out, 'PNG'); Image.open(out, formats=FORMATS).load()\n"
        "assert '_pi_heif' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
