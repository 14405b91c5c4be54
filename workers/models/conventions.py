"""What lies beside a model's weights and says how its pictures are prepared, as the keys of a `<model>.toml`.

The conventions of three libraries are read. What they can say and ruiji cannot do is refused by its name, never
approximated: a wrong value gives no error, only worse hits.
"""

import json
import math
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.spec import LARGEST_SIDE

#: A convention has some hundred bytes.
_MAX_BYTES = 1 << 20
#: What a crop keeps of a side; with less than this nothing of a picture would be left.
_LEAST_PART = 1 / 1024
#: Pillow's numbers for its filters, which transformers keeps.
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
#: Image processors of transformers that crop unless they are told not to, those that stretch, and one that does either.
_CROPPING = ("CLIPImageProcessor", "CLIPFeatureExtractor", "BitImageProcessor")
_STRETCHING = ("ViTImageProcessor", "ViTFeatureExtractor", "SiglipImageProcessor", "DINOv3ViTImageProcessor")
_CONVNEXT = ("ConvNextImageProcessor", "ConvNextFeatureExtractor")
_PROCESSORS = (*_CROPPING, *_STRETCHING, *_CONVNEXT)
#: Those to which one number as the size means both sides; to the others it means the shorter one.
_SQUARE = ("ViTImageProcessor", "ViTFeatureExtractor", "DINOv3ViTImageProcessor")
#: Up to this side ConvNext's processor crops; from it on, it stretches.
_CONVNEXT_STRETCHES = 384
#: Keys that change no pixel, for us: channels are always converted, and tensors are our own.
_NEUTRAL = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "do_convert_rgb", "data_format"),
    *(
        "input_data_format",
        "return_tensors",
        "device",
        "disable_grouping",
        "_valid_processor_keys",
    ),
    "image_seq_length",
}


@dataclass(frozen=True)
class Said:
    """One value of a convention.

    Attributes:
        value: as a `<model>.toml` has it.
        origin: where it comes from, for people.
    """

    value: Any
    origin: str


class _Keys:
    """The keys of one JSON object, each taken at most once; what is left over was not understood."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self._left = dict(values)

    def refuse(self, words: str) -> ModelError:
        return ModelError(f"{self.path}: {words}")

    def take(self, key: str, default: Any = ...) -> Any:
        """A value, null if it is absent and has a default.

        Raises:
            ModelError: it is absent and has none, since that of the library may change.
        """
        value = self._left.pop(key, None)
        if value is None and default is ...:
            raise self.refuse(f"it has no {key}, and what the library takes instead is not written there; add it")
        return default if value is None else value

    def number(self, key: str, default: Any = ...) -> float:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(f"{key} is {value!r}, not a number")
        return float(value)

    def truth(self, key: str) -> bool:
        """True, which is meant if it is absent, or false.

        Null is refused: it is the default to one release of a library, and false to another.
        """
        value = self._left.pop(key, True)
        if not isinstance(value, bool):
            raise self.refuse(f"{key} is {json.dumps(value)}, neither true nor false")
        return value

    def part(self, key: str, default: Any = ...) -> float:
        """How much of a side a crop keeps."""
        value = self.number(key, default)
        if not _LEAST_PART <= value <= 1:
            raise self.refuse(f"{key} is {value:g}, and the part of a side that is kept is from {_LEAST_PART:g} to 1")
        return value

    def side(self, key: str, value: Any) -> int:
        if isinstance(value, list) and len(set(map(str, value))) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_SIDE:
            raise self.refuse(
                f"{key} is {value!r}; ruiji takes one whole number of pixels, at most {LARGEST_SIDE}, or the same one "
                "twice"
            )
        return value

    def sides(self, key: str, value: Any, square: Any) -> dict[str, int]:
        """A size by the names of its sides, as `get_size_dict` of transformers has it.

        Args:
            square: whether one number means both sides, and not the shorter one.
        """
        if not isinstance(square, bool):
            raise self.refuse(f"default_to_square is {square!r}, neither true nor false")
        if isinstance(value, dict):
            return {name: self.side(f"{key}.{name}", side) for name, side in value.items() if side is not None}
        if isinstance(value, list) and len(value) == 2:
            return {"height": self.side(key, value[0]), "width": self.side(key, value[1])}
        side = self.side(key, value)
        return {"height": side, "width": side} if square else {"shortest_edge": side}

    def only(self, key: str, allowed: Any) -> None:
        """Refuse all values of a key but one, which is also meant if it is absent."""
        value = self.take(key, allowed)
        if type(value) is not type(allowed) or value != allowed:
            raise self.refuse(f"{key} is {value!r}, and ruiji can only do {allowed!r}")

    def end(self, neutral: set[str]) -> None:
        """Refuse what is left and could change a pixel."""
        for key, value in self._left.items():
            not_done = value is None or (value is False and key.startswith("do_"))
            if key not in neutral and not not_done:
                raise self.refuse(f"{key} is {value!r}, which ruiji does not know how to follow")


def toml_section(name: str, values: dict[str, Said]) -> list[str]:
    """The lines of one section of a `<model>.toml`, with the origin of each value.

    Raises:
        ModelError: a value is none that TOML has.
    """
    # JSON's strings, numbers and lists are TOML's; its null, NaN and halves of surrogate pairs are not.
    written = {key: f"{key} = {json.dumps(value.value)}" for key, value in values.items()}
    for key, line in written.items():
        try:
            tomllib.loads(line)
        except ValueError:
            origin = one_line(values[key].origin)
            raise ModelError(f"{key} is {values[key].value!r} ({origin}), which ruiji cannot follow") from None
    width = max(map(len, written.values()), default=0)
    return [f"[{name}]", *(f"{line:<{width}}  # {one_line(values[key].origin)}" for key, line in written.items())]


def one_line(text: str) -> str:
    """What somebody else wrote, without what is not to be printed."""
    return "".join(char if char.isprintable() else "?" for char in text)


def find_convention(folders: list[Path]) -> dict[str, Said] | None:
    """The keys of `[input]` that the conventions in some folders say; None if there is none.

    Raises:
        ModelError: two contradict each other, or one says what cannot be followed.
    """
    found: list[tuple[Path, dict[str, Said]]] = []
    for folder in folders:
        for name, read in _READERS.items():
            path = folder / name
            if path.is_file() and (said := read(path, read_object(path))) is not None:
                found.append((path, said))
    if not found:
        return None
    first, said = found[0]
    for other, differently in found[1:]:
        for key in said.keys() | differently.keys():
            values = [each[key].value if key in each else None for each in (said, differently)]
            if values[0] != values[1] and key != "reference":
                raise ModelError(f"{first} and {other} contradict each other in {key}; remove the one that is wrong")
    return said


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: it cannot be read, or has something else or more.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        value = json.loads(data, parse_int=_whole) if len(data) <= _MAX_BYTES else None
        # Halves of surrogate pairs are no text.
        json.dumps(value, ensure_ascii=False).encode()
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} is not one JSON object of less than 1 MB")
    return value


def _whole(digits: str) -> int:
    """A whole number that a float can hold: who calculates with it need not ask."""
    value = int(digits)
    float(value)
    return value


def inner_object(values: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    """The JSON object under a key; empty if there is none.

    Args:
        name: the file, for the message.

    Raises:
        ModelError: it is something else.
    """
    value = values.get(key)
    if value is not None and not isinstance(value, dict):
        raise ModelError(f"{name}: {key} is {value!r}, not an object")
    return value or {}


def _colors(keys: _Keys, mean: str, std: str) -> Iterator[tuple[str, Said]]:
    for name, key in (("mean", mean), ("std", std)):
        values = keys.take(key)
        if not isinstance(values, list) or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
            raise keys.refuse(f"{key} is {values!r}, not a list of numbers")
        yield name, Said(values, f"{keys.path.name}: {key}")


def _hugging_face(path: Path, values: dict[str, Any]) -> dict[str, Said]:
    """`preprocessor_config.json`, of transformers' image processors."""
    keys = _Keys(path, values)
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type"))
    family = kind.removesuffix("Fast").removesuffix("Pil")
    if kind == "None":
        raise keys.refuse("it does not say its image_processor_type, and so not what is done to pictures; add it")
    if "auto_map" in values:
        raise keys.refuse("it names code of its own (auto_map), which ruiji does not run")
    if family not in _PROCESSORS:
        raise keys.refuse(f"the image processor {kind} is none of those that ruiji knows: {', '.join(_PROCESSORS)}")
    for key in ("do_resize", "do_rescale"):
        if not keys.truth(key):
            raise keys.refuse(f"{key} is false, and ruiji can only do true")
    if not math.isclose(factor := keys.number("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-6):
        raise keys.refuse(f"rescale_factor is {factor}, and ruiji can only do 1/255")
    resample = keys.take("resample")
    if type(resample) is not int or resample not in _RESAMPLE:
        raise keys.refuse(f"resample is {resample!r}, none of Pillow's filters")
    said = {"resize": Said(_RESAMPLE[resample], f"{path.name}: resample {resample}")}
    said |= _hugging_face_fit(keys, kind, family)
    normalizes = keys.truth("do_normalize")
    if normalizes:
        said |= dict(_colors(keys, "image_mean", "image_std"))
    # Configurations have these also if nothing uses them.
    keys.end({*_NEUTRAL, *(() if normalizes else ("image_mean", "image_std")), "crop_pct", "crop_size"})
    return said


def _hugging_face_fit(keys: _Keys, kind: str, family: str) -> dict[str, Said]:
    """How a picture's shape becomes the model's."""
    size = keys.take("size")
    sides = keys.sides("size", size, keys.take("default_to_square", family in _SQUARE))
    crops = keys.truth("do_center_crop") if family in _CROPPING else keys.take("do_center_crop", False)
    # Many configurations have one that nothing uses.
    crop = keys.take("crop_size", None)
    if crops and crop is None:
        raise keys.refuse("it crops and has no crop_size, and what the library takes instead is not written there")
    window = keys.sides("crop_size", crop, True) if crops else None
    file = keys.path.name
    if sides.keys() == {"shortest_edge"} and family in _CONVNEXT and not crops:
        side, part = sides["shortest_edge"], keys.part("crop_pct", 224 / 256)
        shape = {"height": Said(side, f"{file}: size"), "width": Said(side, f"{file}: size")}
        if side >= _CONVNEXT_STRETCHES:
            return {"fit": Said("stretch", f"{kind} resizes both sides from {_CONVNEXT_STRETCHES} on"), **shape}
        return _hugging_face_crop(kind, Said(int(side / part), f"{file}: size / crop_pct {part:g}"), shape)
    if window and sides.keys() == {"shortest_edge"} and window.keys() == {"height", "width"} and family in _CROPPING:
        shape = {name: Said(side, f"{file}: crop_size") for name, side in window.items()}
        return _hugging_face_crop(kind, Said(sides["shortest_edge"], f"{file}: size"), shape)
    # A crop to the size that a picture has already leaves it as it is.
    if sides.keys() == {"height", "width"} and window in (None, sides) and family not in _CONVNEXT:
        shape = {name: Said(side, f"{file}: size") for name, side in sides.items()}
        return {"fit": Said("stretch", f"{kind} resizes both sides"), **shape}
    raise keys.refuse(f"{kind} with size {size!r} and do_center_crop {crops!r} is not one of the ways that ruiji knows")


def _hugging_face_crop(kind: str, resize_size: Said, shape: dict[str, Said]) -> dict[str, Said]:
    return {
        "fit": Said("crop", f"{kind} crops the centre"),
        "resize_size": resize_size,
        "reference": Said("huggingface", f"{kind}, as transformers does it with Pillow"),
        **shape,
    }


def _processor(path: Path, values: dict[str, Any]) -> dict[str, Said] | None:
    """`processor_config.json`, into which transformers 5 writes the image processor of a model with two towers."""
    inner = values.get("image_processor")
    return _hugging_face(path, inner) if isinstance(inner, dict) else None


def _timm(path: Path, values: dict[str, Any]) -> dict[str, Said] | None:
    """`config.json` of timm; None if it is another library's."""
    if not isinstance(values.get("pretrained_cfg"), dict):
        return None
    keys = _Keys(path, values["pretrained_cfg"])
    shape = keys.take("input_size")
    if not isinstance(shape, list) or len(shape) != 3:
        raise keys.refuse(f"input_size is {shape!r}, not [channels, height, width]")
    side = keys.side("input_size", shape[1:])
    part, mode = keys.part("crop_pct"), keys.take("crop_mode", "center")
    interpolation = keys.take("interpolation")
    if interpolation not in _RESAMPLE.values():
        raise keys.refuse(f"interpolation is {interpolation!r}, which ruiji does not know how to follow")
    said = {
        "height": Said(side, f"{path.name}: input_size"),
        "width": Said(side, f"{path.name}: input_size"),
        "resize": Said(interpolation, f"{path.name}: interpolation"),
        **dict(_colors(keys, "mean", "std")),
    }
    if mode == "center":
        return said | {
            "fit": Said("crop", f"{path.name}: crop_mode center"),
            "resize_size": Said(math.floor(side / part), f"{path.name}: input_size / crop_pct {part:g}"),
            "reference": Said("timm", "timm's own transforms"),
        }
    if part != 1:
        raise keys.refuse(f"crop_mode {mode!r} with crop_pct {part} is not one of the ways that ruiji knows")
    if mode == "squash":
        return said | {"fit": Said("stretch", f"{path.name}: crop_mode squash")}
    if mode != "border":
        raise keys.refuse(f"crop_mode is {mode!r}, none of center, squash and border")
    return said | {
        "fit": Said("pad", f"{path.name}: crop_mode border"),
        "pad_color": Said([round(255 * value) for value in said["mean"].value], f"{path.name}: mean"),
        "reference": Said("timm", "timm's own transforms"),
    }


def _open_clip(path: Path, values: dict[str, Any]) -> dict[str, Said]:
    """`open_clip_config.json`, and immich's `preprocess_cfg.json`, which is its inner part."""
    inner = values.get("preprocess_cfg", values)
    keys = _Keys(path, inner if isinstance(inner, dict) else {})
    network = values.get("model_cfg")
    vision = network.get("vision_cfg") if isinstance(network, dict) else None
    of_network = vision.get("image_size") if isinstance(vision, dict) else None
    side = keys.side("size", keys.take("size", of_network))
    # open_clip goes by its network.
    if of_network is not None and keys.side("image_size", of_network) != side:
        raise keys.refuse(f"preprocess_cfg has the size {side}, and vision_cfg the image_size {of_network}")
    mode, interpolation = keys.take("resize_mode", "shortest"), keys.take("interpolation", "bicubic")
    if interpolation not in ("bicubic", "bilinear"):
        raise keys.refuse(f"interpolation is {interpolation!r}, which ruiji does not know how to follow")
    keys.only("mode", "RGB")
    color = keys.take("fill_color", 0)
    said = {
        "height": Said(side, f"{path.name}: size"),
        "width": Said(side, f"{path.name}: size"),
        "resize": Said(interpolation, f"{path.name}: interpolation"),
        **dict(_colors(keys, "mean", "std")),
    }
    keys.end(set())
    if mode == "squash":
        return said | {"fit": Said("stretch", f"{path.name}: resize_mode squash")}
    if mode == "shortest":
        return said | {
            "fit": Said("crop", f"{path.name}: resize_mode shortest"),
            "resize_size": Said(side, f"{path.name}: size"),
            "reference": Said("torchvision", "open_clip crops with torchvision"),
        }
    if mode != "longest":
        raise keys.refuse(f"resize_mode is {mode!r}, none of shortest, squash and longest")
    return said | {
        "fit": Said("pad", f"{path.name}: resize_mode longest"),
        "pad_color": Said(color, f"{path.name}: fill_color"),
        "reference": Said("timm", "open_clip pads as timm does"),
    }


_READERS: dict[str, Callable[[Path, dict[str, Any]], dict[str, Said] | None]] = {
    "preprocess_cfg.json": _open_clip,
    "open_clip_config.json": _open_clip,
    "preprocessor_config.json": _hugging_face,
    "processor_config.json": _processor,
    "config.json": _timm,
}
#: The names of the files that are read.
CONVENTIONS = tuple(_READERS)
