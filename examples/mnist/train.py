"""Training of one network, its curve, and its export as ONNX.

A fixed seed and number of threads give the same result on the same machine.
"""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from examples.augment import augment
from examples.mnist.data import Digits
from examples.mnist.networks import DIGITS, MEAN, STD, ArticleNet, SoftmaxWithCenters, WideNet
from search.evaluation.metrics import METRICS, measure
from workers.models.torch_export import check_export, export_onnx

#: The last of the 60,000 training images are held back: the curve is measured on them, and recipes are chosen by them.
#: The test set is looked at once, at the end, through the pipeline.
VALIDATION_IMAGES = 5000
#: Images that are embedded and ranked at once.
_AT_ONCE = 500
#: How far ONNX Runtime may be from torch; the features of the 2-d network go up to about 60.
_TOLERANCE = 1e-3
_TOML = f"""\
[input]
layout = "NCHW"
color = "L"
mean = [{MEAN}]
std = [{STD}]
exif_orientation = false
[output]
name = "feature_vector"
"""


@dataclass(frozen=True)
class Recipe:
    """What training depends on besides the images and the number of threads.

    Attributes:
        network: `2d` or `64d`.
        learning_rate: the highest of a one-cycle schedule of AdamW.
        strength: of `augment`.
        center_rate: learning rate of the centers, which follow the features by plain gradient steps.
        images: train with the first so many only; None: all but those held back.
    """

    network: str
    epochs: int
    learning_rate: float
    strength: float
    center_rate: float = 0.0
    batch_images: int = 64
    weight_decay: float = 1e-4
    seed: int = 0
    images: int | None = None


@dataclass(frozen=True)
class Epoch:
    """One point of the curve: the mean loss, and how well the held back images are searched."""

    epoch: int
    loss: float
    rank_1: float
    mean_average_precision: float


#: Chosen by the held-back images; what they and others gave stands in docs/evaluation.md and its log.
RECIPES = {
    "2d": Recipe("2d", epochs=2, learning_rate=2e-3, strength=0.3, center_rate=5.0, batch_images=32),
    "64d": Recipe("64d", epochs=4, learning_rate=4e-3, strength=0.8),
    "2d-full": Recipe("2d", epochs=4, learning_rate=1.5e-3, strength=0.4, center_rate=5.0),
    "64d-full": Recipe("64d", epochs=12, learning_rate=4e-3, strength=0.8),
}


def train(
    digits: Digits, recipe: Recipe, threads: int, tick: Callable[[float, str], None]
) -> tuple[nn.Module, list[Epoch]]:
    """Train on MNIST's training images but for those held back; sets torch's global state.

    Args:
        digits: the 60,000 training images.
        tick: called after each step with the share of the work that is done, and a word on it.

    Returns:
        The network, ready to embed, and its curve.
    """
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(recipe.seed)
    images, labels = to_unit(digits.pixels), torch.from_numpy(digits.labels)
    held_back = images[-VALIDATION_IMAGES:], digits.labels[-VALIDATION_IMAGES:]
    images = images[:-VALIDATION_IMAGES][: recipe.images]
    network, loss_of = _make(recipe.network)
    # The layout that torch's convolutions are fastest in on a CPU.
    network.to(memory_format=torch.channels_last)
    centers = [p for name, p in loss_of.named_parameters() if name == "centers"]
    others = [p for name, p in loss_of.named_parameters() if name != "centers"]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([*network.parameters(), *others], lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    ]
    if centers:
        optimizers.append(torch.optim.SGD(centers, lr=recipe.center_rate))
    # The last part of an epoch is left out: a batch of a few images would upset the batch statistics.
    steps = len(images) // recipe.batch_images
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizers[0], max_lr=recipe.learning_rate, total_steps=recipe.epochs * steps
    )
    curve: list[Epoch] = []
    for epoch in range(recipe.epochs):
        network.train()
        total = 0.0
        order = torch.randperm(len(images))[: steps * recipe.batch_images]
        for step, chosen in enumerate(order.reshape(steps, recipe.batch_images), 1):
            # Moved first and normalised then, so that what comes in from outside is paper.
            batch = normalised(augment(images[chosen], recipe.strength)).to(memory_format=torch.channels_last)
            loss = loss_of(network(batch), labels[chosen])
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            schedule.step()
            total += loss.item()
            tick((epoch + step / steps) / recipe.epochs, f"epoch {epoch + 1}, loss {total / step:.3f}")
        curve.append(Epoch(epoch + 1, total / steps, *validate(network, *held_back)))
    return network.eval(), curve


def _make(network: str) -> tuple[nn.Module, nn.Module]:
    """A new network and its loss."""
    if network == "2d":
        return ArticleNet(), SoftmaxWithCenters(center_weight=0.05)
    from pytorch_metric_learning.losses import ArcFaceLoss

    # With ten classes the margin of 20 degrees and the scale of 20 are gentler than those for thousands of faces.
    return WideNet(), ArcFaceLoss(DIGITS, 64, margin=20, scale=20)


def to_unit(pixels: NDArray[np.uint8]) -> torch.Tensor:
    """uint8[b, 28, 28] to float32[b, 1, 28, 28] in [0, 1]."""
    return torch.from_numpy(pixels[:, np.newaxis].astype(np.float32) / 255)


def normalised(images: torch.Tensor) -> torch.Tensor:
    """From [0, 1] to what the networks take, as the model's .toml says it."""
    return (images - MEAN) / STD


def validate(network: nn.Module, images: torch.Tensor, labels: NDArray[np.int64]) -> tuple[float, float]:
    """Rank-1 and mAP by cosine, each image searching in all others."""
    network.eval()
    with torch.inference_mode():
        parts = torch.cat([network(normalised(part)) for part in images.split(_AT_ONCE)])
        features: NDArray[np.float32] = functional.normalize(parts).numpy()
    scores = []
    for first in range(0, len(labels), _AT_ONCE):
        part = slice(first, first + _AT_ONCE)
        similarities = features[part] @ features.T
        # An image does not find itself: it comes last, and the last is left out.
        np.fill_diagonal(similarities[:, first:], -np.inf)
        order = np.argsort(-similarities, axis=1, kind="stable")[:, :-1]
        same = labels[order] == labels[part, np.newaxis]
        scores += [measure(np.flatnonzero(one) + 1) for one in same]
    by_key = dict(zip((metric.key for metric in METRICS), np.mean(scores, axis=0).tolist(), strict=True))
    return by_key["rank_1"], by_key["map"]


def export(network: nn.Module, digits: Digits, target: Path) -> float:
    """Write a network as ONNX with its .toml beside it, and compare the file with torch.

    Args:
        digits: images to compare on.

    Returns:
        The largest absolute difference of a feature value.

    Raises:
        ExportError: the two differ.
    """
    images = normalised(to_unit(digits.pixels))
    network.to(memory_format=torch.contiguous_format)
    export_onnx(network, images[:2], target, input_name="image", output_name="feature_vector")
    target.with_suffix(".toml").write_text(_TOML, encoding="utf-8")
    return check_export(network, target, [images[:1], images[:3], *images.split(1000)], tolerance=_TOLERANCE)


def write_curve(curve: list[Epoch], target: Path) -> None:
    """Write the curve as CSV, one line an epoch."""
    with target.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("epoch", "loss", "validation_rank_1", "validation_map"))
        writer.writerows((one.epoch, one.loss, one.rank_1, one.mean_average_precision) for one in curve)
