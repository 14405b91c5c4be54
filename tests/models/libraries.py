"""What torchvision, transformers, timm and open_clip themselves make of the cases' pictures.

    make check-models                compares what they make here with tests/data/fit.json, as make test does ruiji
    make check-models RECORD=1       writes tests/data/fit.json anew

They need another torch than ruiji's tests, so they live in an environment of their own.
"""

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.models.pictures import KINDS, SIZES, picture

CASES = Path(__file__).parent.parent / "data" / "fit.json"
LIBRARIES = ("torch", "torchvision", "transformers", "timm", "open_clip_torch", "pillow")


def by_torchvision(image: Image.Image, kind: dict[str, Any]) -> NDArray[np.uint8]:
    """Its evaluation transforms."""
    from torchvision import transforms

    steps = [
        transforms.Resize(kind["resize_size"], transforms.InterpolationMode(kind["resize"])),
        transforms.CenterCrop((kind["height"], kind["width"])),
    ]
    return np.asarray(transforms.Compose(steps)(image))


def by_huggingface(image: Image.Image, kind: dict[str, Any]) -> NDArray[np.uint8]:
    """The image processor of CLIP that uses Pillow."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": kind["resize_size"]},
        crop_size={"height": kind["height"], "width": kind["width"]},
        resample=Image.Resampling[kind["resize"].upper()],
        do_rescale=False,
        do_normalize=False,
    )
    made = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    pixels = made.transpose(1, 2, 0).astype(np.uint8)
    assert (pixels == made.transpose(1, 2, 0)).all()
    return pixels


def by_timm(image: Image.Image, kind: dict[str, Any]) -> NDArray[np.uint8]:
    """What `create_transform` makes for evaluation; it takes the part of the side that the crop keeps."""
    from timm.data.transforms_factory import transforms_imagenet_eval

    if kind["fit"] == "pad":
        return by_open_clip(image, kind)
    part = kind["height"] / kind["resize_size"]
    # It truncates: a part that is too large by a rounding error gives a side too short by one.
    part = np.nextafter(part, 0) if int(kind["height"] / part) != kind["resize_size"] else part
    steps = transforms_imagenet_eval(
        (kind["height"], kind["width"]), crop_pct=part, interpolation=kind["resize"], normalize=False
    )
    return np.asarray(steps(image)).transpose(1, 2, 0)


def by_open_clip(image: Image.Image, kind: dict[str, Any]) -> NDArray[np.uint8]:
    """Its transforms for `longest`, which are timm's; without the steps that come after the pixels."""
    from open_clip.transform import image_transform

    steps = image_transform(
        kind["height"],
        is_train=False,
        interpolation=kind["resize"],
        resize_mode="longest",
        fill_color=tuple(kind["pad_color"]),
        mean=(0.0,) * 3,
        std=(1.0,) * 3,
    )
    return np.rint(np.asarray(steps(image)).transpose(1, 2, 0) * 255).astype(np.uint8)


def made() -> dict[str, Any]:
    """All cases as the installed libraries make them."""
    ways = {"torchvision": by_torchvision, "huggingface": by_huggingface, "timm": by_timm}
    cases = [
        {"kind": kind, "size": size, "sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
        for kind in KINDS
        for size in SIZES
        for pixels in [np.ascontiguousarray(ways[kind["reference"]](picture(*size), kind))]
    ]
    return {"versions": {name: version(name) for name in LIBRARIES}, "cases": cases}


def main() -> None:
    """Record, or compare."""
    now = made()
    if "--record" in sys.argv:
        CASES.write_text(json.dumps(now, indent=1) + "\n")
        print(f"{len(now['cases'])} cases of {now['versions']}")
        return
    kept = json.loads(CASES.read_text())
    differ = [a for a, b in zip(now["cases"], kept["cases"], strict=True) if a != b | {"size": tuple(b["size"])}]
    for case in differ:
        print(f"another result: {case}")
    print(f"{len(now['cases'])} cases, {len(differ)} differ; {now['versions']}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
