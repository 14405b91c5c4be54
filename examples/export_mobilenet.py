"""A model for those who have none: timm's MobileNetV3 as ONNX, in the contract that ruiji takes by default.

    pip install timm torch onnxscript
    python -m examples.export_mobilenet --out mobilenetv3_large_100.onnx

The graph takes `inputs:0`, float32[n, 224, 224, 3], RGB in [0, 1], and gives `feature_vector`, float32[n, 1280]: what
the classifier of `mobilenetv3_large_100` would have seen. The normalisation that the weights were trained with is
folded into the graph, so that no `<model>.toml` is needed. After the export ONNX Runtime must compute what torch
computes, to 1e-4; otherwise nothing is written and the exit code is 1.

What was run and what was not: folding, contract and check are tested on small torch modules
(tests/examples/test_export_mobilenet.py), and the command line with a stand-in for timm. Timm itself and its
pretrained weights were **not** run: where this was written, neither could be had.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from examples.onnx_export import ExportError, check_export, export_onnx
from pipeline.errors import ModelError
from pipeline.model import ARTICLE_INPUT, ARTICLE_OUTPUT, load_model

TIMM_MODEL = "mobilenetv3_large_100"
FEATURE_LENGTH = 1280
#: Two sizes, neither the one traced with: a batch dimension that was fixed on the way shows here.
CHECKED_BATCHES = (1, 3)
TOLERANCE = 1e-4


class Folded(nn.Module):
    """A module of normalised NCHW images, made to take NHWC images in [0, 1]."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        """Wrap `module`: float32[n, 3, h, w] in, float32[n, d] out; one mean and std a channel."""
        super().__init__()
        self.module = module
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """float32[n, h, w, 3] to float32[n, d]."""
        features: torch.Tensor = self.module(((images - self.mean) / self.std).permute(0, 3, 1, 2))
        return features


def export(module: nn.Module, path: Path, mean: Sequence[float], std: Sequence[float], size: int) -> float:
    """Write any image module as an ONNX file in the default contract, and prove that it computes the same.

    Args:
        module: float32[n, 3, size, size], normalised, to float32[n, d].
        path: the file to make; it appears only when all checks are passed.
        mean, std: three values each, of pixels in [0, 1].
        size: height and width of the images.

    Returns:
        The largest absolute difference between ONNX Runtime and torch.

    Raises:
        ExportError: the file does not compute what the module does.
        ModelError: the file is not in the contract.
    """
    folded = Folded(module, mean, std).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-export-") as folder:
        unproven = Path(folder, path.name)
        export_onnx(folded, _images(2, size), unproven, input_name=ARTICLE_INPUT, output_name=ARTICLE_OUTPUT)
        check_contract(unproven, size)
        difference = check_export(folded, unproven, [_images(n, size) for n in CHECKED_BATCHES], tolerance=TOLERANCE)
        os.replace(unproven, path)
    return difference


def check_contract(path: Path, size: int) -> None:
    """Check that ruiji takes a file for what it is meant to be, without a `<model>.toml`.

    Raises:
        ModelError: it does not.
    """
    model = load_model(path)
    found = (model.spec.input_name, model.spec.output_name, model.spec.layout, model.spec.color)
    expected = (ARTICLE_INPUT, ARTICLE_OUTPUT, "NHWC", "RGB")
    if found != expected or (model.spec.height, model.spec.width) != (size, size) or model.batch is not None:
        raise ModelError(
            f"{path} has {found}, {model.spec.height} x {model.spec.width}, batch {model.batch or 'any'}; "
            f"expected {expected}, {size} x {size}, batch any"
        )


def _images(count: int, size: int) -> torch.Tensor:
    """float32[count, size, size, 3] in [0, 1); the same at every call."""
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(count))


def main(arguments: Sequence[str] | None = None) -> int:
    """Export timm's model; returns the exit code."""
    parser = argparse.ArgumentParser(description="Export timm's mobilenetv3_large_100 for ruiji.")
    parser.add_argument("--out", type=Path, default=Path(f"{TIMM_MODEL}.onnx"), help="default: %(default)s")
    out: Path = parser.parse_args(arguments).out
    try:
        import timm
    except ImportError:
        print("error: timm is not installed; run: pip install timm", file=sys.stderr)
        return 1
    # num_classes=0 leaves the classifier out and keeps the layer before it.
    module = timm.create_model(TIMM_MODEL, pretrained=True, num_classes=0)
    config = timm.data.resolve_model_data_config(module)
    try:
        difference = export(module, out, config["mean"], config["std"], config["input_size"][1])
        length = load_model(out).spec.length
    except (ExportError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {out.stat().st_size} bytes, {length} values an image, largest difference to torch {difference:.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
