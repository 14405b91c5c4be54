"""Twelve architectures with random weights: exported, added by `ruiji model add`, and compared with their libraries.

    make check-models                prints a row for each, on 200 photos of ../shared that are not square
    make check-models RECORD=1       writes tests/data/architectures.zip anew

They are made from the libraries' own configurations, with few layers where those allow it. The zip file has each one
still smaller, as a folder that can be added, and the features that its library gave four pictures: with it `make test`
proves the same without the libraries.
"""

import io
import itertools
import json
import logging
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.choices import Device
from pipeline.model import Model, load_model
from pipeline.settings import MAX_PIXELS
from tests.models.pictures import SIZES, picture
from workers.decode.images import decode
from workers.encoder import Encoder
from workers.models.architectures import export_open_clip, export_timm
from workers.models.check import Comparison, Pipeline, compare, folder_pipeline, open_clip_pipeline, timm_pipeline
from workers.models.conventions import CONVENTIONS
from workers.models.library import add_model

KEPT = Path(__file__).parent.parent / "data" / "architectures.zip"
KEPT_FEATURES = "features.json"
LIBRARIES = ("torch", "torchvision", "transformers", "timm", "open_clip_torch", "onnxscript", "pillow")
PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
COUNT = 200
#: Of a vision tower of transformers: as small as it can be and still have every kind of layer.
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 32,
}
#: The same for what is kept.
KEPT_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 16,
}


@dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes:
        write: puts a graph and its convention into a folder, as it is measured or (True) as it is kept; gives the
            library's pipeline, None: the folder has it.
        pillow: whether the library resizes with Pillow, so that the pixels are the same.
        least: the cosine that has to be reached with the same pixels.
    """

    name: str
    write: Callable[[Path, bool], Pipeline | None]
    pillow: bool = True
    least: float = 0.99999


def few_values(network: Any) -> None:
    """Weights of few values, which pack into a few kB, and of a size by which pictures get different features."""
    import torch

    source = np.random.default_rng(20)
    for name, weight in network.state_dict().items():
        if not weight.is_floating_point() or not weight.numel() or "running_" in name:
            continue
        if weight.numel() == max(weight.shape, default=1):
            values = source.integers(-1, 2, weight.shape) / 4 + (0 if name.endswith("bias") else 1)
        else:
            scale = 2.0 ** -round(np.log2(2 * weight.numel() / weight.shape[0]) / 2)
            values = source.integers(-2, 3, weight.shape) * scale
        weight.copy_(torch.as_tensor(values, dtype=weight.dtype))


def hugging_face(
    kind: str,
    config: str,
    prepared_by: str,
    output: str,
    folder: Path,
    kept: bool,
    half: bool = False,
    processor: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """A folder as transformers writes it. Only what is kept or of half precision has a graph: else it is exported."""
    import torch
    import transformers

    from workers.models.torch_export import export_onnx

    network = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
    if kept:
        few_values(network)
    network.save_pretrained(folder)
    prepared = getattr(transformers, prepared_by)(**(processor or {}))
    (folder / "preprocessor_config.json").write_text(prepared.to_json_string())
    if not kept and not half:
        return

    class Tower(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, values: Any) -> Any:
            if output == "image_embeds":
                return self.network.get_image_features(pixel_values=values).pooler_output
            return getattr(self.network(pixel_values=values), output)

    size = options.get("image_size") or options.get("vision_config", {}).get("image_size") or 224
    example = torch.rand(2, 3, size, size)
    tower = Tower()
    if half:
        tower, example = tower.half(), example.half()
    export_onnx(tower, example, folder / "model.onnx", input_name="pixel_values", output_name=output)


def clip(folder: Path, kept: bool, half: bool = False) -> None:
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    hugging_face(
        "CLIPModel",
        "CLIPConfig",
        "CLIPImageProcessorPil",
        "image_embeds",
        folder,
        kept,
        half,
        vision_config={**(KEPT_TOWER if kept else TOWER), "image_size": 224},
        text_config=text,
        projection_dim=16 if kept else 32,
    )


def siglip(size: int, folder: Path, kept: bool) -> None:
    processor = {"size": {"height": size, "width": size}, "resample": 3 if size == 224 else 2}
    names = ("SiglipVisionModel", "SiglipVisionConfig", "SiglipImageProcessorPil", "pooler_output")
    hugging_face(*names, folder, kept, processor=processor, image_size=size, **(KEPT_TOWER if kept else TOWER))


def dino(version: int, folder: Path, kept: bool) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} if kept else {}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 224, **sizes}
    if version == 2:
        dinov2 = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3}
        names = ("Dinov2Model", "Dinov2Config", "BitImageProcessorPil", "pooler_output")
        hugging_face(*names, folder, kept, processor=dinov2, patch_size=14, **sizes)
        return
    names = ("DINOv3ViTModel", "DINOv3ViTConfig", "DINOv3ViTImageProcessor", "pooler_output")
    hugging_face(*names, folder, kept, patch_size=16, intermediate_size=32 if kept else 128, **sizes)


def convnext(folder: Path, kept: bool) -> None:
    sizes: dict[str, Any] = {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 2, 1]}
    if kept:
        sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1]}
    names = ("ConvNextModel", "ConvNextConfig", "ConvNextImageProcessorPil", "pooler_output")
    hugging_face(*names, folder, kept, processor={"size": {"shortest_edge": 224}}, **sizes)


def of_timm(
    name: str, folder: Path, kept: bool, small: dict[str, Any], blocks: list[list[str]] | None = None, **options: Any
) -> Pipeline:
    """A network of timm.

    Args:
        small: options of what is kept. blocks: its stages, of a network that has its own for each name.
    """
    import timm
    from timm.models._builder import build_model_with_cfg
    from timm.models._efficientnet_builder import decode_arch_def

    if not kept or blocks is None:
        network = timm.create_model(name, pretrained=False, num_classes=0, **{**options, **(small if kept else {})})
    else:
        kind = getattr(timm.models, "MobileNetV3" if name.startswith("mobilenetv3") else "EfficientNet")
        small = {**small, "block_args": decode_arch_def(blocks), "num_classes": 0}
        network = build_model_with_cfg(kind, name, False, **small)
    network = network.eval()
    if kept:
        few_values(network)
    export_timm(network, folder)
    return timm_pipeline(network)


def of_open_clip(folder: Path, kept: bool, **preprocess: Any) -> Pipeline:
    from open_clip.model import CLIP, set_model_preprocess_cfg

    vision = {"image_size": 224, "layers": 2, "width": 64, "head_width": 16, "patch_size": 32}
    if kept:
        vision |= {"layers": 1, "width": 16, "head_width": 8, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    network = CLIP(embed_dim=16 if kept else 32, vision_cfg=vision, text_cfg=text).eval()
    if kept:
        few_values(network)
    set_model_preprocess_cfg(network, {"size": 224, "mode": "RGB", "fill_color": 0, **preprocess})
    export_open_clip(network, folder)
    return open_clip_pipeline(network)


def architectures() -> list[Architecture]:
    openai = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    half = (0.5, 0.5, 0.5)
    squash = {"interpolation": "bilinear", "resize_mode": "squash", "mean": half, "std": half}
    longest = {"interpolation": "bicubic", "resize_mode": "longest", **openai}
    # Of a size by which a picture makes a difference: it starts as 0.00001.
    fastvit: dict[str, Any] = {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128), "layer_scale_init_value": 1.0}
    narrow = {"embed_dims": (8, 16, 32, 32)}
    b0 = [["ds_r1_k3_s2_e1_c8_se0.25"], ["ir_r1_k3_s2_e3_c16_se0.25"], ["ir_r1_k5_s2_e3_c16_se0.25"]]
    v3 = [["ds_r1_k3_s2_e1_c8_se0.25_nre"], ["ir_r1_k3_s2_e3_c16_nre"], ["ir_r1_k5_s2_e3_c16_se0.25"]]
    vit = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    return [
        Architecture("CLIP", clip),
        Architecture("SigLIP", partial(siglip, 224)),
        Architecture("SigLIP 2, fixed size", partial(siglip, 256)),
        Architecture("DINOv2", partial(dino, 2)),
        Architecture("DINOv3", partial(dino, 3), pillow=False),
        Architecture("MobileCLIP (timm's fastvit_mci0)", partial(of_timm, "fastvit_mci0", small=narrow, **fastvit)),
        Architecture("ConvNeXt", convnext),
        Architecture(
            "EfficientNet-B0",
            partial(of_timm, "efficientnet_b0", small={"stem_size": 8, "num_features": 16}, blocks=b0),
        ),
        Architecture(
            "ViT, crop_pct 0.9",
            partial(of_timm, vit, small={"depth": 1, "embed_dim": 16, "num_heads": 2}, depth=2),
        ),
        Architecture(
            "MobileNetV3",
            partial(of_timm, "mobilenetv3_small_100", small={"stem_size": 8, "num_features": 16}, blocks=v3),
        ),
        Architecture("PE-Core's preprocessing", partial(of_open_clip, **squash)),
        Architecture("open_clip, longest", partial(of_open_clip, **longest)),
        Architecture("CLIP in float16", partial(clip, half=True), least=0.999),
    ]


def photos() -> Iterator[io.BytesIO]:
    """Those that are not square, in the order of their names."""
    for path in sorted(PHOTOS.rglob("*.jpg")):
        with Image.open(path) as image:
            square = image.width == image.height
        if not square:
            yield io.BytesIO(path.read_bytes())


def alike(model: Model, files: list[io.BytesIO]) -> float:
    """The mean cosine between features of different photos: if it is 1, a cosine of 1 says nothing."""
    encoder = Encoder(model, Device.cpu)
    return alike_of(
        np.concatenate([encoder.encode(decode(file, model.spec, MAX_PIXELS)[np.newaxis]) for file in files])
    )


def measured(architecture: Architecture, folder: Path, files: list[io.BytesIO]) -> tuple[Comparison, float]:
    import torch

    torch.manual_seed(0)
    source = folder / "theirs"
    source.mkdir()
    pipeline = architecture.write(source, False)
    model = load_model(add_model(source, folder / "models").path)
    return compare(model, pipeline or folder_pipeline([source], model.spec), files), alike(model, files[:50])


def library_features(architecture: Architecture, source: Path) -> list[list[float]]:
    """Write what is kept of an architecture, and give the features that its library gives the pictures."""
    pipeline = architecture.write(source, True)
    if pipeline is None:
        added = add_model(source, source.with_name("models"))
        pipeline = folder_pipeline([source], load_model(added.path).spec)
    made = [pipeline.embed(pipeline.prepare(picture(*size))[np.newaxis])[0] for size in SIZES[:4]]
    return [[float(f"{value:.6g}") for value in feature] for feature in made]


def record() -> None:
    """Write the zip file: a folder for each architecture, and the libraries' features."""
    kept, features = {}, {}
    for architecture in architectures():
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "theirs"
            source.mkdir()
            features[architecture.name] = library_features(architecture, source)
            for name in ("model.onnx", *CONVENTIONS):
                if (source / name).is_file():
                    kept[f"{architecture.name}/{name}"] = (source / name).read_bytes()
        print(f"kept {architecture.name}, two pictures {alike_of(features[architecture.name]):.3f}", flush=True)
    versions = {name: version(name) for name in LIBRARIES}
    kept[KEPT_FEATURES] = json.dumps({"versions": versions, "sizes": SIZES[:4], "features": features}).encode()
    write_zip(KEPT, kept)


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    """Write files by their names; the same ones always make the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, data in files.items():
            # Without a date.
            file.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    print(f"{path.name}: {path.stat().st_size} bytes")


def compare_kept() -> list[str]:
    """Names of those that their libraries give other features now than were kept."""
    with zipfile.ZipFile(KEPT) as file:
        features = json.loads(file.read(KEPT_FEATURES))["features"]
    differ = []
    for architecture in architectures():
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "theirs"
            source.mkdir()
            now = library_features(architecture, source)
        if not (cosines(now, features[architecture.name]) >= 0.99999).all():
            differ.append(architecture.name)
    print(f"{len(features)} kept architectures, {len(differ)} give other features now")
    return differ


def cosines(first: Any, second: Any) -> Any:
    """float64[n]: of each row of float[n, d] and its counterpart."""
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    return (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))


def alike_of(features: Any) -> float:
    """The mean cosine between different rows."""
    unit = np.asarray(features) / np.linalg.norm(features, axis=1, keepdims=True)
    return float((unit @ unit.T)[np.triu_indices(len(unit), 1)].mean())


def main() -> None:
    """Measure all, or those that an argument names; record, or compare with what is kept."""
    import torch
    import transformers

    # Of what they write, only what is wrong.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    names = [argument for argument in sys.argv[1:] if argument != "--record"]
    if "--record" in sys.argv:
        record()
        return
    files = list(itertools.islice(photos(), COUNT))
    if len(files) < COUNT:
        print(f"not compared: {PHOTOS} has no {COUNT} photos that are not square")
        return
    # Small networks gain nothing from more.
    torch.set_num_threads(1)
    failed = [] if names else compare_kept()
    print("| architecture | library | pixels | in the mean | cosine, same pixels | cosine, whole | two photos |")
    print("|---|---|---|---|---|---|---|")
    for architecture in architectures():
        if names and architecture.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found, other = measured(architecture, Path(folder), files)
        row = (
            f"{found.pixels:.3f} | {found.mean_pixels:.3f} | {found.same_pixels:.7f} | {found.whole:.7f} | {other:.3f}"
        )
        print(f"| {architecture.name} | {found.library} | {row} |", flush=True)
        # Values are scaled in another order: a thousandth of a pixel is that.
        same = found.pixels < 0.001 and found.whole >= architecture.least
        if not (found.same_pixels >= architecture.least and (same if architecture.pillow else found.whole >= 0.999)):
            failed.append(architecture.name)
    print(f"{len(failed)} failed: {', '.join(failed)}" if failed else f"all as their libraries, on {COUNT} photos")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
