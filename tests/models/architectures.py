"""Twelve architectures with random weights: exported, added by `ruiji model add`, and compared with their libraries.

    make check-models        prints a row for each, on 200 photos of ../shared that are not square

They are made from the libraries' own configurations, with few layers where those allow it.
"""

import io
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.choices import Device
from pipeline.model import Model, load_model
from pipeline.settings import MAX_PIXELS
from workers.decode.images import decode
from workers.encoder import Encoder
from workers.models.architectures import export_open_clip, export_timm
from workers.models.check import Comparison, Pipeline, compare, folder_pipeline, open_clip_pipeline, timm_pipeline
from workers.models.library import add_model

PHOTOS = Path(__file__).parents[3] / "shared" / "data" / "photos"
COUNT = 200
#: Of a vision tower of transformers: as small as it can be and still have every kind of layer.
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 32,
}


@dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes:
        write: puts a graph and its convention into a folder; gives the library's pipeline, None: the folder has it.
        pillow: whether the library resizes with Pillow, so that the pixels are the same.
        least: the cosine that has to be reached with the same pixels.
    """

    name: str
    write: Callable[[Path], Pipeline | None]
    pillow: bool = True
    least: float = 0.99999


def hugging_face(
    kind: str, config: str, prepared_by: str, output: str, folder: Path, half: bool = False, **options: Any
) -> None:
    """A folder as transformers writes it, with a graph that has one output."""
    import torch
    import transformers

    from workers.models.torch_export import export_onnx

    processor_options = options.pop("processor", {})
    network = getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()
    network.save_pretrained(folder)
    prepared = getattr(transformers, prepared_by)(**processor_options)
    (folder / "preprocessor_config.json").write_text(prepared.to_json_string())

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


def clip(folder: Path, half: bool = False) -> None:
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    hugging_face(
        "CLIPModel",
        "CLIPConfig",
        "CLIPImageProcessorPil",
        "image_embeds",
        folder,
        half,
        vision_config={**SMALL, "image_size": 224},
        text_config=text,
        projection_dim=32,
    )


def of_timm(name: str, folder: Path, **options: Any) -> Pipeline:
    import timm

    network = timm.create_model(name, pretrained=False, num_classes=0, **options).eval()
    export_timm(network, folder)
    return timm_pipeline(network)


def of_open_clip(folder: Path, **preprocess: Any) -> Pipeline:
    from open_clip.model import CLIP, set_model_preprocess_cfg

    vision = {"image_size": 224, "layers": 2, "width": 64, "head_width": 16, "patch_size": 32}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    network = CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text).eval()
    set_model_preprocess_cfg(network, {"size": 224, "mode": "RGB", "fill_color": 0, **preprocess})
    export_open_clip(network, folder)
    return open_clip_pipeline(network)


def architectures() -> list[Architecture]:
    siglip = partial(
        hugging_face, "SiglipVisionModel", "SiglipVisionConfig", "SiglipImageProcessorPil", "pooler_output"
    )
    dinov2 = {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}, "resample": 3}
    dino = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 224}
    openai = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
    half = (0.5, 0.5, 0.5)
    return [
        Architecture("CLIP", clip),
        Architecture("SigLIP", lambda folder: siglip(folder, image_size=224, **SMALL)),
        Architecture(
            "SigLIP 2, fixed size",
            lambda folder: siglip(
                folder, image_size=256, processor={"size": {"height": 256, "width": 256}, "resample": 2}, **SMALL
            ),
        ),
        Architecture(
            "DINOv2",
            lambda folder: hugging_face(
                "Dinov2Model",
                "Dinov2Config",
                "BitImageProcessorPil",
                "pooler_output",
                folder,
                processor=dinov2,
                patch_size=14,
                **dino,
            ),
        ),
        Architecture(
            "DINOv3",
            lambda folder: hugging_face(
                "DINOv3ViTModel",
                "DINOv3ViTConfig",
                "DINOv3ViTImageProcessor",
                "pooler_output",
                folder,
                patch_size=16,
                intermediate_size=128,
                **dino,
            ),
            pillow=False,
        ),
        Architecture(
            "MobileCLIP (timm's fastvit_mci0)",
            lambda folder: of_timm("fastvit_mci0", folder, layers=(1, 1, 1, 1), embed_dims=(16, 32, 64, 128)),
        ),
        Architecture(
            "ConvNeXt",
            lambda folder: hugging_face(
                "ConvNextModel",
                "ConvNextConfig",
                "ConvNextImageProcessorPil",
                "pooler_output",
                folder,
                processor={"size": {"shortest_edge": 224}},
                hidden_sizes=[16, 32, 64, 96],
                depths=[1, 1, 2, 1],
            ),
        ),
        Architecture("EfficientNet-B0", lambda folder: of_timm("efficientnet_b0", folder)),
        Architecture(
            "ViT, crop_pct 0.9", lambda folder: of_timm("vit_tiny_patch16_224.augreg_in21k_ft_in1k", folder, depth=2)
        ),
        Architecture("MobileNetV3", lambda folder: of_timm("mobilenetv3_small_100", folder)),
        Architecture(
            "PE-Core's preprocessing",
            lambda folder: of_open_clip(folder, interpolation="bilinear", resize_mode="squash", mean=half, std=half),
        ),
        Architecture(
            "open_clip, longest",
            lambda folder: of_open_clip(folder, interpolation="bicubic", resize_mode="longest", **openai),
        ),
        Architecture("CLIP in float16", lambda folder: clip(folder, half=True), least=0.999),
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
    features = np.concatenate([encoder.encode(decode(file, model.spec, MAX_PIXELS)[np.newaxis]) for file in files])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    return float((unit @ unit.T)[np.triu_indices(len(unit), 1)].mean())


def measured(architecture: Architecture, folder: Path, files: list[io.BytesIO]) -> tuple[Comparison, float]:
    import torch

    torch.manual_seed(0)
    source = folder / "theirs"
    source.mkdir()
    pipeline = architecture.write(source)
    model = load_model(add_model(source, folder / "models").path)
    return compare(model, pipeline or folder_pipeline([source], model.spec), files), alike(model, files[:50])


def main() -> None:
    """Measure all, or those that an argument names."""
    import torch

    files = list(itertools.islice(photos(), COUNT))
    if len(files) < COUNT:
        print(f"not compared: {PHOTOS} has no {COUNT} photos that are not square")
        return
    # Small networks gain nothing from more.
    torch.set_num_threads(1)
    failed = []
    print("| architecture | library | pixels | in the mean | cosine, same pixels | cosine, whole | two photos |")
    print("|---|---|---|---|---|---|---|")
    for architecture in architectures():
        if sys.argv[1:] and architecture.name not in sys.argv[1:]:
            continue
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
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
