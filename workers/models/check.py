"""Whether a model sees and computes what its own library does, on pictures that are made here."""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.choices import Device
from pipeline.errors import ModelError, UsageError
from pipeline.model import Model
from pipeline.settings import MAX_PIXELS
from pipeline.spec import ModelSpec
from workers.decode.images import decode
from workers.encoder import Encoder, pool, to_input

Floats: TypeAlias = NDArray[np.float32]
#: Below this cosine, or above this mean difference of a picture's pixels, a model is refused. Rounding and resizing on
#: tensors stay within both. A wrong crop can pass the first, if the network takes little notice, and not the second.
LEAST_COSINE, MOST_PIXELS = 0.999, 1.0
#: Of transformers: nothing is downloaded, and nothing executed.
_SAFELY: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
#: Even and odd, both ways up, long.
_SIZES = ((500, 375), (334, 501), (1024, 97), (225, 300))


@dataclass(frozen=True)
class Pipeline:
    """A library's own way from a picture to a feature.

    Attributes:
        library: its name and version.
        prepare: from an RGB picture to float32[c, h, w], the network's input.
        embed: from float32[n, c, h, w] to the network's features, float32[n, d].
    """

    library: str
    prepare: Callable[[Image.Image], Floats]
    embed: Callable[[Floats], Floats]


@dataclass(frozen=True)
class Comparison:
    """How near a model is to its library.

    Attributes:
        library: its name and version.
        pictures: how many were compared.
        pixels: the largest difference of what the network is given, in pixel values from 0 to 255.
        mean_pixels: the same, as the mean over a picture; of the picture where it is largest.
        same_pixels: the least cosine of the features, if the library is given ruiji's pixels.
        whole: the least cosine of the features, each with its own pixels.
    """

    library: str
    pictures: int
    pixels: float
    mean_pixels: float
    same_pixels: float
    whole: float

    def __str__(self) -> str:
        return (
            f"as {self.library}: cosine at least {self.whole:.6f}, given the same pixels {self.same_pixels:.6f}; "
            f"pixels off by at most {self.pixels:.2f} of 255, in the mean {self.mean_pixels:.2f}; on {self.pictures} "
            "pictures"
        )

    @property
    def values(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def picture(width: int, height: int) -> Image.Image:
    """Waves and edges, which a shift by one pixel changes everywhere."""
    y, x = np.mgrid[:height, :width].astype(np.int64)
    red = (x * x + 3 * y * y) // 97 % 256
    green = (7 * x + 5 * y) % 256
    blue = np.where((x // 9 + y // 7) % 2 == 0, 255, (x * y) // 31 % 256)
    return Image.fromarray(np.stack([red, green, blue], axis=2).astype(np.uint8))


def check_model(model: Model, pipeline: Pipeline) -> Comparison:
    """Compare on built-in pictures, none of them square.

    Raises:
        ModelError: they differ by more than a library's rounding.
    """
    files = []
    for size in _SIZES:
        files.append(io.BytesIO())
        picture(*size).save(files[-1], "png")
    comparison = compare(model, pipeline, files)
    # Written so that a NaN is refused too.
    if not (comparison.whole >= LEAST_COSINE and comparison.mean_pixels <= MOST_PIXELS):
        raise ModelError(f"{model.path} does not compute what its library does: {comparison}")
    return comparison


def compare(model: Model, pipeline: Pipeline, files: Iterable[io.BytesIO]) -> Comparison:
    """Compare on pictures, each read by ruiji and by Pillow."""
    spec, encoder = model.spec, Encoder(model, Device.cpu)
    if spec.dtype == "uint8":
        raise UsageError(f"{model.path} scales its pixels itself, so its library cannot be given them")
    unit = (np.asarray(spec.std) * spec.divisor).reshape(-1, 1, 1)
    pixels, means, same, whole = [], [], [], []
    for file in files:
        seen = decode(file, spec, MAX_PIXELS)[np.newaxis]
        feature = encoder.encode(seen)
        own = to_input(seen, replace(spec, dtype="float32", layout="NCHW"))
        theirs = pipeline.prepare(Image.open(file).convert("RGB"))[np.newaxis]
        if own.shape != theirs.shape:
            raise ModelError(f"{model.path} takes {own.shape[1:]}, {pipeline.library} prepares {theirs.shape[1:]}")
        apart = np.abs((own - theirs) * unit)
        pixels.append(float(apart.max()))
        means.append(float(apart.mean()))
        same.append(_cosine(feature, pipeline.embed(own)))
        whole.append(_cosine(feature, pipeline.embed(theirs)))
    return Comparison(pipeline.library, len(whole), max(pixels), max(means), min(same), min(whole))


def timm_pipeline(network: Any) -> Pipeline:
    """The evaluation transforms of a network of timm, and the network."""
    from timm.data import create_transform, resolve_model_data_config

    steps = create_transform(**resolve_model_data_config(network), is_training=False)
    return Pipeline(f"timm {version('timm')}", lambda image: np.asarray(steps(image)), _running(network))


def open_clip_pipeline(network: Any) -> Pipeline:
    """The evaluation transforms of a network of open_clip, and its image tower."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    steps = image_transform_v2(PreprocessCfg(**network.visual.preprocess_cfg), is_train=False)
    library = f"open_clip {version('open_clip_torch')}"
    return Pipeline(library, lambda image: np.asarray(steps(image)), _running(network.visual))


def folder_pipeline(folders: list[Path], spec: ModelSpec) -> Pipeline:
    """That of the library whose convention and weights lie in a folder. Only safetensors are loaded, and no code.

    Raises:
        UsageError: there are no such weights, or the library is missing.
        ModelError: it does not have the output that the graph has.
    """
    for folder in folders:
        if any(folder.glob("*.safetensors")):
            with _named_packages():
                if any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
                    return _transformers_pipeline(folder, spec)
                if (folder / "open_clip_config.json").is_file():
                    import open_clip

                    return open_clip_pipeline(open_clip.create_model(f"local-dir:{folder}").eval())
                import timm

                return timm_pipeline(timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval())
    raise UsageError(
        f"--check loads the network itself, and there is no .safetensors with its weights in "
        f"{' or '.join(map(str, folders))}; nothing else is loaded"
    )


def load_transformers(folder: Path, output: str | None = None) -> Any:
    """The network of a folder of transformers: of its safetensors alone, and without code of the folder.

    Args:
        output: what is wanted of it; None: its embedding.

    Raises:
        ModelError: the folder lacks weights, which transformers would make up at random.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder, **_SAFELY)
    named = getattr(transformers, next(iter(config.architectures or []), ""), transformers.AutoModel)
    network, told = named.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **_SAFELY)
    missing = sorted(told["missing_keys"])
    if output not in (None, "pooler_output"):
        missing = [name for name in missing if "pooler" not in name]
    if missing:
        raise ModelError(
            f"{folder} has no weights for {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''} of "
            f"{type(network).__name__}; if it is a pooler alone, take --output last_hidden_state --pooling cls"
        )
    # Many weights are kept in float16 or bfloat16, which transformers keeps and a CPU hardly calculates with.
    return network.eval().float()


def transformers_feature(network: Any, values: Any, name: str) -> Any:
    """One output of a network for torch's float32[n, 3, h, w]; None if it has none of this name."""
    if hasattr(network, "get_image_features"):
        # Of two towers; alone, that of pictures has no embedding.
        if name == "image_embeds":
            found = network.get_image_features(pixel_values=values)
            return getattr(found, "pooler_output", found)
        network = getattr(network, "vision_model", network)
    found = network(pixel_values=values)
    if hasattr(found, "logits"):
        # A classifier's own output has only its classes.
        found = getattr(network, "vision_model", network.base_model)(pixel_values=values)
    return getattr(found, name, None)


def _transformers_pipeline(folder: Path, spec: ModelSpec) -> Pipeline:
    """The image processor of a folder, with Pillow if there is one, and its network."""
    import torch
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil", **_SAFELY)
    network = load_transformers(folder, spec.output_name)

    def embed(values: Floats) -> Floats:
        with torch.inference_mode():
            found = transformers_feature(network, torch.from_numpy(values), spec.output_name)
        feature = None if found is None else pool(found.numpy(), spec)
        if feature is None:
            kind = type(network).__name__
            raise ModelError(f"{kind} of transformers has no {spec.output_name} as the graph gives it")
        return feature

    def prepare(image: Image.Image) -> Floats:
        return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])

    return Pipeline(f"{type(processor).__name__} of transformers {version('transformers')}", prepare, embed)


def _running(network: Any) -> Callable[[Floats], Floats]:
    import torch

    def embed(values: Floats) -> Floats:
        with torch.inference_mode():
            return np.asarray(network(torch.from_numpy(values)).numpy(), np.float32)

    return embed


@contextmanager
def _named_packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        needed = "torch torchvision and transformers, timm or open_clip_torch, whichever the model is of"
        raise UsageError(f"--check needs {needed}, installed with pip: {error}") from None


def _cosine(first: Floats, second: Floats) -> float:
    a, b = first.ravel().astype(np.float64), second.ravel().astype(np.float64)
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
