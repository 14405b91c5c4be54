"""What torchvision, transformers, timm and open_clip themselves make of the cases' pictures.

    make check-models                compares what they make here with tests/data/fit.json, as make test does ruiji
    make check-models RECORD=1       writes tests/data/fit.json anew

They need another torch than ruiji's tests, so they live in an environment of their own.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tests.models.pictures import KINDS, SIZES, picture

CASES = Path(__file__).parent.parent / "data" / "fit.json"
#: From a picture to [c, h, w]: the values that the model gets, or (False) pixels from 0 to 255.
Maker = Callable[[Image.Image, bool], NDArray[Any]]
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

    if kind["fit"] == "pad" and kind["height"] != kind["width"]:
        # Whose colour of the bars is the mean; open_clip pads squares alone.
        mean = tuple(value / 255 for value in kind["pad_color"])
        steps = transforms_imagenet_eval(
            (kind["height"], kind["width"]), 1.0, "border", interpolation=kind["resize"], mean=mean, normalize=False
        )
        return np.asarray(steps(image)).transpose(1, 2, 0)
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


def hugging_face_configurations() -> Iterator[tuple[str, dict[str, Any], Maker]]:
    """`preprocessor_config.json` of image processors, as transformers writes it, and what the processor makes."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    dinov2 = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    for processor in (
        CLIPImageProcessorPil(),
        BitImageProcessorPil(**dinov2),
        ViTImageProcessorPil(),
        SiglipImageProcessorPil(),
        SiglipImageProcessorPil(size={"height": 256, "width": 256}, resample=2),
        ConvNextImageProcessorPil(size={"shortest_edge": 224}),
        ConvNextImageProcessorPil(size={"shortest_edge": 384}),
        CLIPImageProcessorPil(size={"height": 224, "width": 224}),
        CLIPImageProcessorPil(size={"height": 200, "width": 168}, do_center_crop=False, resample=5),
        CLIPImageProcessorPil(size={"shortest_edge": 257}, crop_size={"height": 200, "width": 257}, do_normalize=False),
        ViTImageProcessorPil(size={"height": 256, "width": 192}),
    ):
        yield _hugging_face(processor, json.loads(processor.to_json_string()))
    # As people have written it, which is not what transformers would write.
    for kind, changed in (
        (CLIPImageProcessorPil, {"size": 224, "crop_size": 224}),
        (CLIPImageProcessorPil, {"size": [224, 224], "crop_size": [224, 224]}),
        (CLIPImageProcessorPil, {"size": 224, "default_to_square": True}),
        (ViTImageProcessorPil, {"size": 224}),
        (ViTImageProcessorPil, {"size": [224, 192]}),
        (ConvNextImageProcessorPil, {"size": 224, "crop_pct": 0.9, "do_center_crop": False}),
    ):
        written = json.loads(kind().to_json_string()) | changed
        yield _hugging_face(kind.from_dict(written), written)


def _hugging_face(processor: Any, written: dict[str, Any]) -> tuple[str, dict[str, Any], Maker]:
    def make(image: Image.Image, whole: bool) -> NDArray[Any]:
        options = {} if whole else {"do_rescale": False, "do_normalize": False}
        return np.asarray(processor(image, return_tensors="np", **options)["pixel_values"][0])

    return "preprocessor_config.json", written, make


def timm_configurations() -> Iterator[tuple[str, dict[str, Any], Maker]]:
    """`config.json` of timm's models, as timm writes it for a hub, and what its transforms make."""
    import timm
    from timm.data import create_transform, resolve_model_data_config

    addresses = ("url", "hf_hub_id", "origin_url")
    changes: list[tuple[str, dict[str, Any]]] = [
        ("resnet18", {}),
        ("vit_tiny_patch16_224", {}),
        ("efficientnet_b0", {}),
        ("mobilenetv3_small_100", {"crop_pct": 0.95}),
        ("mobilenetv3_small_100", {}),
        ("fastvit_mci0", {}),
        ("resnet18", {"crop_mode": "squash", "crop_pct": 1.0}),
        ("resnet18", {"crop_mode": "border", "crop_pct": 1.0}),
    ]
    for name, changed in changes:
        model = timm.create_model(name, pretrained=False)
        model.pretrained_cfg.update(changed)
        kept = {key: value for key, value in model.pretrained_cfg.items() if value is not None and key not in addresses}
        written = {"architecture": name, "pretrained_cfg": kept}

        def make(image: Image.Image, whole: bool, model: Any = model) -> NDArray[Any]:
            steps = create_transform(**resolve_model_data_config(model), is_training=False, normalize=whole)
            return np.asarray(steps(image))

        yield "config.json", json.loads(json.dumps(written)), make


def open_clip_configurations() -> Iterator[tuple[str, dict[str, Any], Maker]]:
    """What open_clip's and immich's models have beside them, and what open_clip makes of it."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    sized: dict[str, Any] = {"size": (224, 224), "interpolation": "bicubic", "fill_color": 114}
    half = (0.5, 0.5, 0.5)
    # The last is PE-Core's.
    for given in (
        *(PreprocessCfg(resize_mode=mode, **sized) for mode in ("shortest", "longest", "squash")),
        PreprocessCfg(size=(224, 224), resize_mode="squash", interpolation="bilinear", mean=half, std=half),
    ):

        def make(image: Image.Image, whole: bool, given: Any = given) -> NDArray[Any]:
            plain = {} if whole else {"mean": (0.0,) * 3, "std": (1.0,) * 3}
            made = np.asarray(image_transform_v2(replace(given, **plain), is_train=False)(image))
            return made if whole else np.rint(made * 255)

        yield "preprocess_cfg.json", json.loads(json.dumps(asdict(given))), make


def conventions() -> Iterator[dict[str, Any]]:
    """Each configuration with the digests of the pixels, and the mean of the values, of some pictures."""
    for made_by in (hugging_face_configurations, timm_configurations, open_clip_configurations):
        for name, written, make in made_by():
            seen = []
            for size in SIZES[:4]:
                pixels = make(picture(*size), False)
                bytes_of = np.ascontiguousarray(pixels.transpose(1, 2, 0).astype(np.uint8))
                assert (bytes_of == pixels.transpose(1, 2, 0)).all()
                mean = float(make(picture(*size), True).mean(dtype=np.float64))
                seen.append(
                    {"size": size, "sha256": hashlib.sha256(bytes_of.tobytes()).hexdigest(), "mean": round(mean, 5)}
                )
            yield {"file": name, "written": written, "seen": seen}


def made() -> dict[str, Any]:
    """All cases as the installed libraries make them."""
    ways = {"torchvision": by_torchvision, "huggingface": by_huggingface, "timm": by_timm}
    cases = [
        {"kind": kind, "size": size, "sha256": hashlib.sha256(pixels.tobytes()).hexdigest()}
        for kind in KINDS
        for size in SIZES
        for pixels in [np.ascontiguousarray(ways[kind["reference"]](picture(*size), kind))]
    ]
    return {
        "versions": {name: version(name) for name in LIBRARIES},
        "cases": cases,
        "conventions": list(conventions()),
    }


def main() -> None:
    """Record, or compare."""
    # As JSON has it.
    now = json.loads(json.dumps(made()))
    if "--record" in sys.argv:
        CASES.write_text(json.dumps(now, indent=1) + "\n")
        print(f"{len(now['cases'])} cases of {now['versions']}")
        return
    kept = json.loads(CASES.read_text())
    pairs = [pair for key in ("cases", "conventions") for pair in zip(now[key], kept[key], strict=True)]
    differ = [a for a, b in pairs if a != b]
    for case in differ:
        print(f"another result: {case}")
    print(f"{len(pairs)} cases, {len(differ)} differ; {now['versions']}")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
