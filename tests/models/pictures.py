"""Pictures and specs of the cases in `tests/data/fit.json`, made of arithmetic alone: the same everywhere."""

from typing import Any

import numpy as np
from PIL import Image

#: Width and height: even and odd, both ways up, square, long, smaller than the model.
SIZES = [(500, 375), (375, 500), (501, 334), (333, 500), (224, 224), (300, 300), (1024, 97), (60, 45), (257, 256)]
#: What is asked of a library, by the keys of a `<model>.toml`.
KINDS: list[dict[str, Any]] = [
    {"fit": "crop", "reference": "torchvision", "resize": "bicubic", "resize_size": 256, "height": 224, "width": 224},
    {"fit": "crop", "reference": "torchvision", "resize": "bilinear", "resize_size": 232, "height": 225, "width": 225},
    {"fit": "crop", "reference": "huggingface", "resize": "bicubic", "resize_size": 224, "height": 224, "width": 224},
    {"fit": "crop", "reference": "huggingface", "resize": "bilinear", "resize_size": 257, "height": 224, "width": 224},
    {"fit": "crop", "reference": "timm", "resize": "bicubic", "resize_size": 248, "height": 224, "width": 224},
    {"fit": "crop", "reference": "timm", "resize": "lanczos", "resize_size": 235, "height": 224, "width": 224},
    {"fit": "pad", "reference": "timm", "resize": "bicubic", "pad_color": [124, 116, 104], "height": 224, "width": 224},
    {"fit": "pad", "reference": "timm", "resize": "bilinear", "pad_color": [0, 0, 0], "height": 225, "width": 225},
]


def picture(width: int, height: int) -> Image.Image:
    """Waves and edges, which a shift by one pixel changes everywhere."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    red = (x * x + 3 * y * y) // 97 % 256
    green = (7 * x + 5 * y) % 256
    blue = np.where((x // 9 + y // 7) % 2 == 0, 255, (x * y) // 31 % 256)
    return Image.fromarray(np.stack([red, green, blue], axis=2).astype(np.uint8))
