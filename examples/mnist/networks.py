"""The two networks and their losses.

`ArticleNet` is the article's: three blocks of two 5 x 5 convolutions with PReLU and max pooling, and a feature of 2
values that can be drawn as it is; trained with softmax and center loss (Wen et al., "A Discriminative Feature
Learning Approach for Deep Face Recognition", 2016). `WideNet` gives 64 values and costs a fifth of it; trained with
ArcFace (Deng et al., 2019) from pytorch-metric-learning.
"""

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

DIGITS = 10
#: Of MNIST's training pixels in [0, 1], as the article has them.
MEAN, STD = 0.1307, 0.3081


class ArticleNet(nn.Module):
    """float32[b, 1, 28, 28], normalised, to float32[b, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_article_block(1, 32), *_article_block(32, 64), *_article_block(64, 128), nn.Flatten(), nn.Linear(1152, 2)
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embed a batch; the features are not normalised."""
        feature: torch.Tensor = self.body(image)
        return feature


class WideNet(nn.Module):
    """float32[b, 1, 28, 28], normalised, to float32[b, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_block(1, 32),
            nn.MaxPool2d(2),
            *_block(32, 48),
            *_block(48, 48),
            nn.MaxPool2d(2),
            *_block(48, 96),
            *_block(96, 96),
            nn.MaxPool2d(2, padding=1),
            *_block(96, 128),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(128 * 4 * 4, 64),
        )

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Embed a batch; the features are not normalised."""
        feature: torch.Tensor = self.body(image)
        return feature


class SoftmaxWithCenters(nn.Module):
    """The article's loss: a 10-way softmax on the feature, and half the squared distance to the own digit's center.

    The classifier has no bias, so that a digit is a direction, which is what a search by cosine sees. Its directions
    start evenly around the circle: left to chance, some of ten digits begin in the same place of two dimensions, and
    have to find a way past each other.
    """

    def __init__(self, center_weight: float) -> None:
        super().__init__()
        angles = torch.arange(DIGITS) * (2 * math.pi / DIGITS)
        self.directions = nn.Parameter(3 * torch.stack([torch.cos(angles), torch.sin(angles)], dim=1))
        self.centers = nn.Parameter(torch.zeros(DIGITS, 2))
        self.center_weight = center_weight

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean loss of features float32[b, 2] with labels int64[b]."""
        apart = (features - self.centers[labels]).square().sum(dim=1).mean() / 2
        return functional.cross_entropy(features @ self.directions.T, labels) + self.center_weight * apart


def _article_block(inputs: int, outputs: int) -> Iterator[nn.Module]:
    yield nn.Conv2d(inputs, outputs, 5, padding=2)
    yield nn.PReLU()
    yield nn.Conv2d(outputs, outputs, 5, padding=2)
    yield nn.PReLU()
    yield nn.MaxPool2d(2)


def _block(inputs: int, outputs: int) -> Iterator[nn.Module]:
    yield nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    yield nn.BatchNorm2d(outputs)
    yield nn.ReLU()
