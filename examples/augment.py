"""Pictures of digits as another hand might have written them."""

import torch
from torch.nn import functional


def augment(images: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """Each image turned, slanted, scaled and shifted a little, at random.

    Args:
        images: float32[b, 1, h, w]; what comes in from outside is 0.
        strength: 1 is up to 0.2 radians (11 degrees) of turn and slant, 12 % of size and 10 % of shift.
    """
    count = len(images)

    def between(limit: float) -> torch.Tensor:
        return (torch.rand(count) * 2 - 1) * (limit * strength)

    angle, slant = between(0.2), between(0.2)
    width, height = 1 + between(0.12), 1 + between(0.12)
    cos, sin = torch.cos(angle), torch.sin(angle)
    matrix = torch.zeros(count, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 1] = cos * width, (slant - sin) * width
    matrix[:, 1, 0], matrix[:, 1, 1] = sin * height, (cos + sin * slant) * height
    # The grid spans 2 units over an image: 0.2 is a tenth of its side.
    matrix[:, 0, 2], matrix[:, 1, 2] = between(0.2), between(0.2)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)
