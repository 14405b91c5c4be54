"""A model for people without one: timm's MobileNetV3-Large with ImageNet weights, as one ONNX file.

    pip install torch onnx onnxscript onnxruntime timm
    python -m examples.export_mobilenet mobilenet_v3_large.onnx

The file has the contract that ruiji takes without a .toml: `inputs:0` float32[n, 224, 224, 3], RGB in [0, 1], to
`feature_vector` float32[n, 1280], what timm computes just before its classifier. Turning NHWC into NCHW and
subtracting timm's mean and dividing by its std are part of the graph.
After the export ONNX Runtime and torch are compared on random batches of 1 and 3; where a value is off by
more than 1e-4, nothing is written and the exit code is 1.

What was run: everything but timm. Tests export small torch modules through the same functions and check the folding,
the contract and the refusal of a file that computes something else; `mobilenet()` and the command line ran with a
stand-in for timm. What was **not** run: timm itself and its weights, because neither could be had where this was
written; it was written against timm 1.0.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

from examples.onnx_export import ExportError, check_export, export_onnx
from pipeline.errors import ModelError
from pipeline.model import load_model
from pipeline.spec import ARTICLE_INPUT, ARTICLE_OUTPUT

TIMM_MODEL = "mobilenetv3_large_100"
FEATURE_LENGTH = 1280
TOLERANCE = 1e-4


class Normalised(nn.Module):
    """A module that takes plain RGB: float32[b, h, w, 3] in [0, 1] to float32[b, d].

    `module` takes float32[b, 3, h, w] normalised as `(rgb - mean) / std`.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        """Normalise, bring into NCHW, embed."""
        feature: torch.Tensor = self.module(((rgb - self.mean) / self.std).permute(0, 3, 1, 2))
        return feature


def export(module: nn.Module, path: Path, mean: Sequence[float], std: Sequence[float], size: int) -> float:
    """Write a module with the article's contract, and check the file.

    Args:
        module: float32[b, 3, size, size], normalised with mean and std, to float32[b, d].
        mean, std: one value a channel, for RGB in [0, 1].

    Returns:
        The largest absolute difference between ONNX Runtime and torch.

    Raises:
        ExportError: the difference is above `TOLERANCE`; `path` is as it was.
    """
    whole = Normalised(module, mean, std).eval()
    # Of its own generator: the caller's random numbers stay as they were.
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(count, size, size, 3, generator=generator) for count in (1, 3)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-export-") as folder:
        unproven = Path(folder, path.name)
        # Traced with 2 and checked with others: a batch dimension that got fixed on the way shows.
        example = torch.rand(2, size, size, 3, generator=generator)
        export_onnx(whole, example, unproven, input_name=ARTICLE_INPUT, output_name=ARTICLE_OUTPUT)
        difference = check_export(whole, unproven, batches, tolerance=TOLERANCE)
        os.replace(unproven, path)
    return difference


def mobilenet() -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    """Timm's model without its classifier, and how it wants its input; downloads the weights.

    Returns:
        The module (float32[b, 3, 224, 224] to float32[b, 1280]), mean, std and the size in pixels.
    """
    import timm

    # num_classes=0 takes the classifier away and nothing else: what is left is forward_features and
    # forward_head(pre_logits=True), that is pooling, the 1280 channels of conv_head and its activation.
    model = cast(nn.Module, timm.create_model(TIMM_MODEL, pretrained=True, num_classes=0))
    config = timm.data.resolve_model_data_config(model)
    _, height, width = config["input_size"]
    if height != width:
        raise ExportError(f"{TIMM_MODEL} wants {width} x {height} pixels, not a square")
    return model, tuple(config["mean"]), tuple(config["std"]), int(height)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line.

    Args:
        arguments: instead of the process's own.
    """
    parser = argparse.ArgumentParser(description=f"Export timm's {TIMM_MODEL} for ruiji.")
    parser.add_argument("path", type=Path, metavar="MODEL.onnx")
    path: Path = parser.parse_args(arguments).path
    try:
        model, mean, std, size = mobilenet()
        difference = export(model, path, mean, std, size)
        spec = load_model(path).spec
        if (spec.layout, spec.height, spec.width, spec.length) != ("NHWC", size, size, FEATURE_LENGTH):
            raise ExportError(
                f"{path} gives {spec.length} values an image, expected {FEATURE_LENGTH}; ruiji sees {spec}"
            )
    except ModuleNotFoundError as error:
        print(f"error: {error.name} is not installed; run: pip install {error.name}", file=sys.stderr)
        sys.exit(1)
    except (ExportError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{path}: {path.stat().st_size} bytes, d = {spec.length}, largest difference to torch {difference:.2g}")


if __name__ == "__main__":
    main()
