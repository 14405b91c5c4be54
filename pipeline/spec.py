"""How pictures become a model's input, and where its features come out: what a `<model>.toml` can say.

A key that is not given has one meaning, or is read from the graph if that is clear; nothing else is guessed. See
`docs/models.md`.
"""

import json
import math
import struct
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from pipeline.errors import GraphError, ModelError
from pipeline.onnx_graph import Tensor

ARTICLE_INPUT, ARTICLE_OUTPUT = "inputs:0", "feature_vector"
RESIZE_FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
#: The ways from a picture's shape to the model's, and the libraries whose rounding each can follow.
REFERENCES: dict[str, tuple[str, ...]] = {
    "stretch": (),
    "crop": ("torchvision", "huggingface", "timm"),
    "pad": ("timm",),
}
DTYPES = ("float32", "float16", "uint8")
#: How one vector comes out of the graph's output, and the shape that each takes.
POOLINGS = {"none": "[n, d]", "cls": "[n, tokens, d]", "mean": "[n, tokens, d]", "map-mean": "[n, d, h, w]"}
#: Pixels of a side of the input, and of what is cut out of it.
LARGEST_SIDE = 8192
#: What another input of a graph can be given: how `struct` writes it.
_FLOATS = {"float16": "<e", "float32": "<f", "double": "<d"}
_INTEGERS = {f"{sign}int{bits}": (sign, bits) for sign in ("", "u") for bits in (8, 16, 32, 64)}
#: The ways from a file to pixels that there are, see `ModelSpec.pixels`: new galleries get the last one.
PIXELS = (1, 2)
_TOML_KEYS = {
    "input": {
        "name",
        "layout",
        "color",
        "height",
        "width",
        "resize",
        "fit",
        "resize_size",
        "pad_color",
        "reference",
        "divisor",
        "mean",
        "std",
        "exif_orientation",
        "jpeg_draft",
        "pixels",
    },
    "output": {"name", "length", "pooling", "skip_tokens"},
    # See `pipeline.text_spec`.
    "text": {"model", "tokenizer", "output", "length", "pad_id", "padding_side", "reference", "clean"},
}


@dataclass(frozen=True)
class ModelSpec:
    """How pixels become the model's input, and where its features come out.

    Attributes:
        layout: `NHWC` or `NCHW`.
        color: `RGB` (3 channels) or `L` (grey, 1 channel), as Pillow's `convert` makes them.
        resize: name of Pillow's filter.
        divisor, mean, std: the input is `(pixel / divisor - mean) / std`, one mean and std a channel.
        exif_orientation: whether a picture is turned upright before it is resized.
        jpeg_draft: whether a large JPEG may be decoded at a half, quarter or eighth of its size: faster, and not quite
            the same pixels.
        length: d, the number of float32 values of one feature.
        pixels: which rules turn a file into pixels. 1: the article's, by which wide samples clip, transparency is
            dropped and TIFFs are turned twice; also of a gallery that says none, being older. 2: see
            `workers.decode.images`.
        fit: how a picture comes to `width` x `height`, see `workers.decode.fit`. `stretch`: to that size, whatever its
            shape, as in the article. `crop`: its shorter side to `resize_size`, then the centre. `pad`: as large as
            fits, then filled up with `pad_color`, one value from 0 to 255 per channel.
        reference: the library whose rounding `crop` and `pad` follow, one of `REFERENCES[fit]`.
        dtype: of the graph's input. `uint8` takes pixels as they are; divisor, mean and std are then 1, 0 and 1.
        pooling: of the graph's output, see `POOLINGS`. `cls`: the first token. `mean`: the mean of the tokens but the
            first `skip_tokens`. `map-mean`: the mean over height and width.
        constants: what the graph's other inputs are given at every run, by name: numbers, or nested lists of them.
    """

    input_name: str
    output_name: str
    layout: str
    color: str
    height: int
    width: int
    resize: str
    divisor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    exif_orientation: bool
    jpeg_draft: bool
    length: int
    pixels: int = 1
    fit: str = "stretch"
    resize_size: int | None = None
    pad_color: tuple[int, ...] | None = None
    reference: str | None = None
    dtype: str = "float32"
    pooling: str = "none"
    skip_tokens: int = 0
    constants: dict[str, Any] | None = None

    @property
    def values(self) -> dict[str, Any]:
        """For JSON; without the fields that have a default and equal it, as it was before there were such fields."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> "ModelSpec":
        """Of `values`, as JSON has them: with lists for tuples.

        Raises:
            ModelError: a newer ruiji wrote them, and they say what this one cannot do.
        """
        unknown = sorted(values.keys() - {field.name for field in fields(cls)})
        for name, allowed in (("fit", REFERENCES), ("dtype", DTYPES), ("pooling", POOLINGS)):
            if values.get(name, next(iter(allowed))) not in allowed:
                unknown.append(f"{name} = {values[name]!r}")
        if unknown:
            raise ModelError(
                f"a newer ruiji recorded how pictures are prepared, and this one does not know {', '.join(unknown)}; "
                "install a newer ruiji"
            )
        spec: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**spec)

    @property
    def channels(self) -> int:
        """1 or 3."""
        return 1 if self.color == "L" else 3


def read_toml(path: Path) -> dict[str, dict[str, Any]]:
    """The sections of a `<model>.toml`; none if there is no such file.

    Raises:
        ModelError: it cannot be read, or has a section or a key that is not known.
    """
    import tomllib

    if not path.exists():
        return {}
    try:
        declared = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
    for section, values in declared.items():
        if section == "constants" and isinstance(values, dict):
            continue
        known = _TOML_KEYS.get(section)
        if known is None or not isinstance(values, dict):
            raise ModelError(
                f"{path}: unknown section {section!r}; there are [input], [output], [constants] and [text]"
            )
        for key in values:
            if key not in known:
                raise ModelError(f"{path}: unknown key {key!r} in [{section}]; known: {', '.join(sorted(known))}")
    return declared


def resolve(
    inputs: list[Tensor], outputs: list[Tensor], declared: dict[str, dict[str, Any]], pixels: int
) -> tuple[ModelSpec, int | None]:
    """The spec of a graph, and the batch size that it fixes, if any.

    Args:
        declared: as `read_toml` returns it.
        pixels: `ModelSpec.pixels` if the .toml says nothing of it.

    Raises:
        ModelError: the graph or what was declared does not fit; says why.
    """
    given, wanted = declared.get("input", {}), declared.get("output", {})
    constants = declared.get("constants", {})
    images = [tensor for tensor in inputs if tensor.name not in constants]
    source = _pick(images, _text(given, "name"), ARTICLE_INPUT, "input")
    target = _pick(outputs, _text(wanted, "name"), ARTICLE_OUTPUT, "output")
    _check_constants(constants, inputs, source)
    if source.shape is None:
        raise GraphError(f"its input {source} has no shape; export it with one")
    if len(source.shape) != 4:
        raise GraphError(f"its input {source} is not an image batch with 4 dimensions")
    if source.dtype not in DTYPES:
        raise GraphError(f"its input {source} is not one of {', '.join(DTYPES)}; export it with float32 or float16")
    article = source.name == ARTICLE_INPUT and target.name == ARTICLE_OUTPUT
    layout = _text(given, "layout") or ("NHWC" if article else _layout(source))
    if layout not in ("NHWC", "NCHW"):
        raise ModelError(f"layout {layout!r} is neither NHWC nor NCHW")
    batch, *rest = source.shape
    height, width, channels = rest if layout == "NHWC" else (rest[1], rest[2], rest[0])
    color = _text(given, "color") or ("L" if channels == 1 else "RGB")
    if color not in ("RGB", "L"):
        raise ModelError(f"color {color!r} is neither RGB nor L")
    expected = 1 if color == "L" else 3
    if channels not in (None, expected):
        raise ModelError(f"its input {source} has {channels} channels in layout {layout}, {color} has {expected}")
    default = 224 if article else None
    if source.dtype == "uint8" and (scaled := sorted({"divisor", "mean", "std"} & given.keys())):
        raise ModelError(
            f"its input {source} takes pixels as they are, and the .toml has {', '.join(scaled)}; remove that"
        )
    pooling, skip_tokens = _pooling(wanted)
    spec = ModelSpec(
        input_name=source.name,
        output_name=target.name,
        layout=layout,
        color=color,
        height=_size("height", height, given.get("height"), default),
        width=_size("width", width, given.get("width"), default),
        resize=_text(given, "resize") or "bicubic",
        divisor=_number("divisor", given.get("divisor", 1 if source.dtype == "uint8" else 255)),
        mean=_per_channel("mean", given.get("mean", 0.0), expected),
        std=_per_channel("std", given.get("std", 1.0), expected),
        exif_orientation=_truth(given, "exif_orientation", True),
        jpeg_draft=_truth(given, "jpeg_draft", False),
        length=_length(target, wanted.get("length"), pooling),
        pixels=given.get("pixels", pixels),
        **_fit(given, expected),
        dtype=source.dtype,
        pooling=pooling,
        skip_tokens=skip_tokens,
        constants=constants or None,
    )
    if spec.resize_size is not None and spec.resize_size < max(spec.height, spec.width):
        raise ModelError(
            f"resize_size {spec.resize_size} is less than the {spec.width} x {spec.height} that are cut out of the "
            "resized picture"
        )
    if spec.fit == "crop" and spec.reference == "timm" and spec.height != spec.width:
        # It resizes to what covers the window's shape, which no resize_size says.
        raise ModelError(
            f'reference "timm" crops squares alone, and the input is {spec.width} x {spec.height}; to resize the '
            'shorter side, take "torchvision"'
        )
    if type(spec.pixels) is not int or spec.pixels not in PIXELS:
        refuse_pixels(spec.pixels)
    if spec.resize not in RESIZE_FILTERS:
        raise ModelError(f"resize {spec.resize!r} is not one of {', '.join(RESIZE_FILTERS)}")
    # A negative one turns light into dark, which some models of digits want.
    if spec.divisor == 0 or 0 in spec.std:
        raise ModelError("divisor and std may not be 0")
    return spec, batch


def _fit(given: dict[str, Any], channels: int) -> dict[str, Any]:
    """The fields of `ModelSpec` that say how a picture's shape becomes the model's; nothing of them is guessed."""
    fit = _text(given, "fit") or "stretch"
    if fit not in REFERENCES:
        raise ModelError(f"fit {fit!r} is not one of {', '.join(REFERENCES)}")
    needed = {"stretch": set(), "crop": {"resize_size", "reference"}, "pad": {"pad_color", "reference"}}[fit]
    for key in ("resize_size", "pad_color", "reference"):
        if (key in given) != (key in needed):
            verb = "needs" if key in needed else "has no"
            raise ModelError(f'fit = "{fit}" {verb} {key}; see docs/models.md')
    values: dict[str, Any] = {"fit": fit}
    if "reference" in needed:
        values["reference"] = _text(given, "reference")
        if values["reference"] not in REFERENCES[fit]:
            raise ModelError(
                f'reference {values["reference"]!r} is none whose rounding fit = "{fit}" can follow: '
                f"{', '.join(REFERENCES[fit])}"
            )
    if "resize_size" in needed:
        values["resize_size"] = _size("resize_size", None, given["resize_size"], None)
    if "pad_color" in needed:
        color = given["pad_color"] if isinstance(given["pad_color"], list) else [given["pad_color"]] * channels
        if len(color) != channels or any(type(value) is not int or not 0 <= value <= 255 for value in color):
            raise ModelError(f"pad_color {given['pad_color']!r} is not a number from 0 to 255, or {channels} of them")
        values["pad_color"] = tuple(color)
    return values


def describe_spec(spec: ModelSpec) -> list[tuple[str, str]]:
    """A spec as (name, value) pairs for people."""
    return [
        ("layout", spec.layout),
        ("image", f"{spec.color} {spec.width} x {spec.height} (width x height), {_fit_words(spec)}, {spec.resize}"),
        ("input value", _scaling_words(spec)),
        ("EXIF rotation", "applied" if spec.exif_orientation else "ignored"),
        ("large JPEGs", "decoded at reduced size" if spec.jpeg_draft else "decoded whole"),
        ("pixels", f"{spec.pixels} in a new gallery; one that exists keeps its own, and with it its fingerprint"),
        ("feature", f"{spec.output_name}, d = {spec.length}{_pooling_words(spec)}"),
        *([("constants", json.dumps(spec.constants))] if spec.constants else []),
    ]


def _fit_words(spec: ModelSpec) -> str:
    return {
        "stretch": "stretched",
        "crop": f"the centre after the shorter side was resized to {spec.resize_size} as {spec.reference} does it",
        "pad": f"resized to fit and padded with {spec.pad_color} as {spec.reference} does it",
    }[spec.fit]


def refuse_pixels(value: object) -> NoReturn:
    """Raise the error for `pixels` of a newer ruiji, or none at all."""
    raise ModelError(f"pixels {value!r} is neither 1 nor 2, which are all that this ruiji knows")


def _text(given: dict[str, Any], key: str) -> str | None:
    value = given.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise ModelError(f"{key} {value!r} is not a name in quotes")
    return value


def _truth(given: dict[str, Any], key: str, default: bool) -> bool:
    value = given.get(key, default)
    if not isinstance(value, bool):
        raise ModelError(f"{key} {value!r} is not true or false, which are written without quotes")
    return value


def _pick(tensors: list[Tensor], name: str | None, article: str, kind: str) -> Tensor:
    listed = "; ".join(map(str, tensors)) or "none"
    if name is not None:
        for tensor in tensors:
            if tensor.name == name:
                return tensor
        raise ModelError(f"it has no {kind} {name!r}, only: {listed}")
    if kind == "input" and len(tensors) != 1:
        raise ModelError(
            f"it has {len(tensors)} inputs ({listed}); name that of the images in <model>.toml ([input] name = …), and "
            "give the others a value in [constants]"
        )
    for tensor in tensors:
        if tensor.name == article:
            return tensor
    if len(tensors) == 1:
        return tensors[0]
    raise ModelError(f"it has several {kind}s ({listed}); name one in <model>.toml: [{kind}] name = …")


def _layout(source: Tensor) -> str:
    assert source.shape is not None
    _, first, _, last = source.shape
    if (last in (1, 3)) != (first in (1, 3)):
        return "NHWC" if last in (1, 3) else "NCHW"
    raise ModelError(f'the layout of its input {source} is not clear; say [input] layout = "NHWC" or "NCHW"')


def _size(what: str, in_graph: int | None, given: Any, default: int | None) -> int:
    if given is not None and (type(given) is not int or not 0 < given <= LARGEST_SIDE):
        raise ModelError(f"{what} {given!r} is not a size in pixels, from 1 to {LARGEST_SIDE}")
    if in_graph is not None and in_graph > LARGEST_SIDE:
        raise ModelError(f"{what} is {in_graph} in its graph, and the largest that ruiji makes is {LARGEST_SIDE}")
    if in_graph is not None and given not in (None, in_graph):
        raise ModelError(f"{what} is {in_graph} in its graph and {given} in the .toml")
    size = in_graph or given or default
    if size is None:
        raise ModelError(f"its graph leaves the {what} open; say [input] {what} = … in <model>.toml")
    return int(size)


def _check_constants(constants: dict[str, Any], inputs: list[Tensor], source: Tensor) -> None:
    """Refuse values of inputs that there are not, or not of their shape, and an input that gets none."""
    named = {tensor.name: tensor for tensor in inputs if tensor.name != source.name}
    for name, value in constants.items():
        if name not in named:
            raise ModelError(f"[constants] {name}: the graph has no such input beside the images")
        shape, wanted = _shape(name, value, named[name].dtype), named[name].shape
        if wanted is not None and (
            len(wanted) != len(shape) or any(n not in (None, m) for n, m in zip(wanted, shape, strict=True))
        ):
            raise ModelError(f"[constants] {name} has the shape {list(shape)}, its input is {named[name]}")
    if missing := [str(tensor) for name, tensor in named.items() if name not in constants]:
        raise ModelError(f"its inputs {'; '.join(missing)} get no value; give them one in <model>.toml: [constants]")


def _shape(name: str, value: Any, dtype: str) -> tuple[int, ...]:
    if isinstance(value, list):
        shapes = {_shape(name, part, dtype) for part in value}
        if len(shapes) != 1:
            raise ModelError(f"[constants] {name} is empty, or its lists have different lengths")
        return (len(value), *shapes.pop())
    if not isinstance(value, bool | int | float):
        raise ModelError(f"[constants] {name}: {value!r} is not a number")
    if dtype in _INTEGERS:
        sign, bits = _INTEGERS[dtype]
        least = 0 if sign else -1
        # numpy would cut off what follows the point.
        if isinstance(value, float) or not least << (bits - 1) <= value < 1 << (bits + least):
            raise ModelError(f"[constants] {name}: {value!r} is no {dtype}, which its input takes")
    elif dtype in _FLOATS:
        _number(f"[constants] {name}:", int(value) if isinstance(value, bool) else value, dtype)
    elif dtype != "bool" or value not in (0, 1):
        raise ModelError(f"[constants] {name}: {value!r} is no {dtype}, which its input takes")
    return ()


def _pooling(wanted: dict[str, Any]) -> tuple[str, int]:
    pooling, skipped = _text(wanted, "pooling") or "none", wanted.get("skip_tokens", 0)
    if pooling not in POOLINGS:
        raise ModelError(f"pooling {pooling!r} is not one of {', '.join(POOLINGS)}")
    if type(skipped) is not int or skipped < 0:
        raise ModelError(f"skip_tokens {skipped!r} is not a number of tokens")
    if skipped and pooling != "mean":
        raise ModelError(f'skip_tokens is of pooling = "mean", not of "{pooling}"')
    return pooling, skipped


def _pooling_words(spec: ModelSpec) -> str:
    skipped = f" without the first {spec.skip_tokens}" if spec.skip_tokens else ""
    words = {"none": "", "cls": ", its first token", "mean": f", the mean of its tokens{skipped}"}
    return words.get(spec.pooling, ", the mean of its map")


def _scaling_words(spec: ModelSpec) -> str:
    if spec.dtype == "uint8":
        return "pixels as they are, uint8"
    return f"(pixel / {spec.divisor:g} - {list(spec.mean)}) / {list(spec.std)}, {spec.dtype}"


def _length(target: Tensor, given: Any, pooling: str) -> int:
    shape = target.shape
    if given is not None and (type(given) is not int or given < 1):
        raise ModelError(f"length {given!r} does not fit its output {target}")
    if shape is None:
        # A run shows whether it is true.
        if given is None:
            raise ModelError(f"its output {target} has no shape; say [output] length = … in <model>.toml")
        return int(given)
    if len(shape) not in (2, 3, 4):
        raise GraphError(f"its output {target} is not one vector per image, and no pooling makes one of it")
    # A trailing [.., 1, 1] is a pooled feature map that was not flattened: the same values in the same order.
    ranks = {"none": (2, 4), "cls": (3,), "mean": (3,), "map-mean": (4,)}[pooling]
    if len(shape) not in ranks or (pooling == "none" and shape[2:] not in ((), (1, 1))):
        advice = [f'"{name}" takes {takes}' for name, takes in POOLINGS.items() if name != pooling]
        raise ModelError(
            f"its output {target} is not one vector per image; say [output] pooling = … in <model>.toml: "
            f"{', '.join(advice)}"
        )
    if pooling == "map-mean" and shape[1] == shape[2] != shape[3]:
        # Taken as [n, d, h, w], it would become as many values as it has rows.
        raise GraphError(
            f'its output {target} has its channels last, and "map-mean" takes {POOLINGS[pooling]}; export it with a '
            "global pooling, or transposed"
        )
    at = 2 if len(shape) == 3 else 1
    if given is not None and shape[at] not in (None, given):
        raise ModelError(f"length {given!r} does not fit its output {target}")
    length = shape[at] or given
    if length is None:
        raise ModelError(f"the length of its output {target} is open; say [output] length = … in <model>.toml")
    return int(length)


def _number(what: str, value: Any, dtype: str = "float32") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ModelError(f"{what} {value!r} is not a number")
    try:
        # What it is in the model's input: too large for that, or too close to 0, it is another number there.
        (held,) = struct.unpack(_FLOATS[dtype], struct.pack(_FLOATS[dtype], value))
    except (OverflowError, struct.error):
        held = math.inf
    if not math.isfinite(held) or (held == 0) != (value == 0):
        raise ModelError(f"{what} {value!r} is not a finite number that {dtype} can hold")
    return float(value)


def _per_channel(what: str, value: Any, channels: int) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value] * channels
    if len(values) != channels:
        raise ModelError(f"{what} has {len(values)} values for {channels} channels")
    return tuple(_number(what, v) for v in values)
