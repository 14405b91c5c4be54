"""Pictures and specs of the cases in `tests/data/fit.json`, made of arithmetic alone: the same everywhere."""

from typing import Any

from workers.models.check import picture

__all__ = ["KINDS", "SIZES", "picture"]

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
    {"fit": "crop", "reference": "torchvision", "resize": "bicubic", "resize_size": 257, "height": 225, "width": 192},
    {"fit": "crop", "reference": "huggingface", "resize": "hamming", "resize_size": 256, "height": 193, "width": 256},
    {"fit": "pad", "reference": "timm", "resize": "bicubic", "pad_color": [9, 8, 7], "height": 225, "width": 160},
]
