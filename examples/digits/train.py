"""Train the demo's digit embedder and export it as ONNX; the same machine gives the same bytes.

    python -m examples.digits.train [--out examples/digits/digits_embedder.onnx]

A small convolutional net turns an 8 x 8 digit into 32 numbers. It learns by a softmax over cosines with a margin:
every digit has one direction, and an image must lie closer to its own than to any other by that margin, which is
what a search by cosine wants. It sees the train split of `examples.digits.images` and nothing else; the gallery and
the queries are looked at once, after the export, through ONNX Runtime as the pipeline does it.

Needs torch and onnxscript, and about a minute of one core.
"""

import argparse
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from examples.augment import augment
from examples.digits.evaluate import embed, retrieval
from examples.digits.images import Digits, load_splits
from workers.models.torch_export import check_export, export_onnx

MODEL = Path(__file__).with_name("digits_embedder.onnx")
FEATURE_LENGTH = 32


@dataclass(frozen=True)
class Recipe:
    """What training depends on besides the images.

    Attributes:
        scale: the factor before the softmax; with cosines alone it could never become sure.
        margin: cosine that the own digit must win by.
    """

    seed: int = 0
    epochs: int = 120
    batch_images: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-3
    scale: float = 16.0
    margin: float = 0.2


class Embedder(nn.Module):
    """float32[b, 1, 8, 8] in [0, 1] to float32[b, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_block(1, 24),
            *_block(24, 48),
            nn.MaxPool2d(2),
            *_block(48, 48),
            nn.Flatten(),
            nn.Linear(48 * 4 * 4, FEATURE_LENGTH),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embed a batch; the features are not normalised."""
        feature: torch.Tensor = self.body(image)
        return feature


def _block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()


class MarginSoftmax(nn.Module):
    """Cross entropy over cosines to one learned direction a digit, the own cosine lowered by a margin."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.directions = nn.Parameter(torch.randn(10, FEATURE_LENGTH))
        self.scale, self.margin = recipe.scale, recipe.margin

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of features float32[b, 32] with labels int64[b]."""
        cosines = functional.normalize(features) @ functional.normalize(self.directions).T
        own = functional.one_hot(labels, 10).to(cosines.dtype)
        return functional.cross_entropy(self.scale * (cosines - self.margin * own), labels)


def train(digits: Digits, recipe: Recipe) -> Embedder:
    """Train on these images; sets torch's global state so that every run is the same."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)
    images, labels = to_tensor(digits.pixels), torch.from_numpy(digits.labels)
    model = Embedder()
    loss_of = MarginSoftmax(recipe)
    optimizer = torch.optim.AdamW(
        [*model.parameters(), *loss_of.parameters()], lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    # The last part of an epoch is left out: a batch of a few images would upset the batch statistics.
    steps_per_epoch = len(images) // recipe.batch_images
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.learning_rate, total_steps=recipe.epochs * steps_per_epoch
    )
    model.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images))[: steps_per_epoch * recipe.batch_images]
        for chosen in order.reshape(steps_per_epoch, recipe.batch_images):
            loss = loss_of(model(augment(images[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def to_tensor(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """uint8[b, 8, 8] to float32[b, 1, 8, 8] in [0, 1], as the model's .toml says it."""
    return torch.from_numpy(pixels[:, np.newaxis].astype(np.float32) / 255)


def main() -> None:
    """Train, export, check and measure."""
    parser = argparse.ArgumentParser(description="Train the demo's digit embedder and export it as ONNX.")
    parser.add_argument("--out", type=Path, default=MODEL)
    out: Path = parser.parse_args().out
    splits = load_splits()
    started = time.perf_counter()
    model = train(splits["train"], Recipe())
    print(f"trained on {len(splits['train'].labels)} images in {time.perf_counter() - started:.0f} s")

    held_out = [to_tensor(splits[name].pixels) for name in ("query", "gallery")]
    export_onnx(model, held_out[0][:2], out, input_name="image", output_name="feature_vector")
    difference = check_export(model, out, [held_out[0][:1], held_out[0][:3], *held_out], tolerance=1e-4)
    print(f"{out}: {out.stat().st_size} bytes, largest difference to torch {difference:.2g}")
    print(f"sha256 {hashlib.sha256(out.read_bytes()).hexdigest()}")

    result = retrieval(
        embed(out, splits["query"].pixels),
        splits["query"].labels,
        embed(out, splits["gallery"].pixels),
        splits["gallery"].labels,
    )
    print(f"held out: rank-1 {result.rank_1:.4f}, mAP {result.mean_average_precision:.4f}")


if __name__ == "__main__":
    main()
