"""Where a picture goes in the model's input: stretched, cropped or padded.

Libraries agree on the steps and not on the rounding: if the centre of a picture is cut out one pixel further to the
left, its feature is another one. So each rule here is that of a named library, and is compared with the pixels that
this library itself makes (tests/workers/decode/test_fit.py).
"""

from dataclasses import dataclass

from pipeline.spec import ModelSpec


@dataclass(frozen=True)
class Placement:
    """How one picture is brought to the model's size.

    Attributes:
        size: width and height that the whole picture is resized to.
        window: left, top, right and bottom, in the resized picture, of what the model sees. It is as large as the
            model's input. With `pad` it goes beyond the picture's edges.
    """

    size: tuple[int, int]
    window: tuple[int, int, int, int]


def place(width: int, height: int, spec: ModelSpec) -> Placement:
    """The placement of an upright picture of this width and height, in pixels.

    Sources: `_compute_resized_output_size` and `center_crop` of torchvision.transforms.functional,
    `get_resize_output_image_size` and `center_crop` of transformers.image_transforms, `ResizeKeepRatio` and
    `center_crop_or_pad` of timm.data.transforms.
    """
    target = (spec.width, spec.height)
    if spec.fit == "stretch":
        size, corner = target, (0, 0)
    elif spec.fit == "crop":
        assert spec.resize_size is not None
        # All three truncate the longer side.
        longer = int(spec.resize_size * max(width, height) / min(width, height))
        size = (spec.resize_size, longer) if width <= height else (longer, spec.resize_size)
        left, top = (_cut(whole - part, spec.reference) for whole, part in zip(size, target, strict=True))
        corner = (left, top)
    else:
        ratio = max(width / spec.width, height / spec.height)
        # A side of a very long picture would vanish.
        size = (max(1, round(width / ratio)), max(1, round(height / ratio)))
        corner = (-((target[0] - size[0]) // 2), -((target[1] - size[1]) // 2))
    return Placement(size, (*corner, corner[0] + target[0], corner[1] + target[1]))


def _cut(spare: int, reference: str | None) -> int:
    """How many of the pixels that a crop leaves out come before it."""
    # torchvision, and timm with it, round a half to the even number.
    return spare // 2 if reference == "huggingface" else round(spare / 2)
