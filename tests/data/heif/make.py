"""Makes the files of this folder again: `pip install pillow-heif==1.8.1`, whose encoder ruiji does without."""

from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
#: Nothing is lost: no subsampling, and red, green and blue as they are.
LOSSLESS = {"quality": -1, "chroma": 444, "matrix_coefficients": 0}
WIDTH, HEIGHT = 64, 48


def quarters() -> np.ndarray:
    """uint8[h, w, 3]: four quarters of four colors."""
    picture = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    for row, column, color in ((0, 0, "f81414"), (0, 1, "14f814"), (1, 0, "1414f8"), (1, 1, "c8c828")):
        part = np.s_[row * HEIGHT // 2 : (row + 1) * HEIGHT // 2, column * WIDTH // 2 : (column + 1) * WIDTH // 2]
        picture[part] = tuple(bytes.fromhex(color))
    return picture


def main() -> None:
    import pillow_heif

    pillow_heif.register_heif_opener()
    picture = Image.fromarray(quarters())
    for name, orientation in (("turned", 6), ("mirrored", 5)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        # Becomes irot (and imir), and stays in EXIF too.
        picture.save(HERE / f"{name}.heic", exif=exif.tobytes(), **LOSSLESS)
    half = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    half[:, WIDTH // 2 :] = 0
    Image.fromarray(np.concatenate([quarters(), half], axis=2)).save(HERE / "transparent.heic", **LOSSLESS)
    first, last = Image.new("RGB", (32, 32), "magenta"), Image.new("RGB", (96, 64), "cyan")
    first.save(HERE / "several.heic", save_all=True, append_images=[picture, last], primary_index=1, **LOSSLESS)
    # Of 10 bits, in the upper ones of 16.
    wide = quarters().astype("<u2") << 8
    for name, mode, data in (("wide", "RGB;16", wide), ("wide-grey", "L;16", wide[:, :, 0])):
        with (HERE / f"{name}.heic").open("wb") as file:
            pillow_heif.encode(mode, (WIDTH, HEIGHT), data.tobytes(), file, **LOSSLESS)


if __name__ == "__main__":
    main()
