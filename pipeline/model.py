"""A model: one ONNX file, the spec of its pictures and features, and the fingerprint of both.

Without a `<model>.toml` beside it, a model with the article's two names is the article's: `inputs:0`, NHWC, RGB in
[0, 1], 224 x 224, to `feature_vector`. Any other is understood as far as its graph is clear, and makes no new gallery.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.layout import toml_file
from pipeline.onnx_graph import external_files, graph_tensors, load_onnx
from pipeline.spec import (
    ARTICLE_INPUT,
    ARTICLE_OUTPUT,
    PIXELS,
    ModelSpec,
    describe_spec,
    read_toml,
    refuse_pixels,
    resolve,
)
from pipeline.text_spec import read_text_spec

#: Part of every fingerprint: raise it when the meaning of a spec's field or of a preprocessing step changes.
_FINGERPRINT_FORMAT = 1


@dataclass(frozen=True)
class Model:
    """One ONNX file, its declared spec and the fingerprint of all that changes a feature.

    Attributes:
        batch: the batch size that the graph fixes, or None if it takes any.
        fingerprint: sha256 (hex) over the model's bytes, its external data and the spec.
        external: names of the files that hold weights outside the .onnx file, sorted.
        toml: sha256 (hex) of `<model>.toml`; None if there is none.
    """

    path: Path
    spec: ModelSpec
    batch: int | None
    fingerprint: str
    external: tuple[str, ...]
    toml: str | None

    @property
    def declared(self) -> bool:
        """Whether somebody said how pictures are prepared: in a .toml, or with the article's two names."""
        if (self.spec.input_name, self.spec.output_name) == (ARTICLE_INPUT, ARTICLE_OUTPUT):
            return True
        # What is said of words says nothing of pictures.
        return self.toml is not None and read_toml(toml_file(self.path)).keys() != {"text"}

    @property
    def contract(self) -> dict[str, Any]:
        """All that was read of it but the fingerprint, for JSON: what `recall_model` takes."""
        return {"spec": self.spec.values, "batch": self.batch, "external": self.external, "toml": self.toml}


def load_model(path: Path, pixels: int | None = None) -> Model:
    """Read a model's graph and its `<model>.toml`, and compute the fingerprint.

    Args:
        pixels: those of the gallery that the model is for, see `pixels_of`; None: there is none yet. What the .toml
            says counts more, and then gives another fingerprint than the gallery's.

    Raises:
        ModelError: the file is missing, is not ONNX, or does not fit the contract; says why.
    """
    onnx_model = load_onnx(path)
    inputs, outputs = graph_tensors(onnx_model)
    declared = read_toml(toml_file(path))
    try:
        spec, batch = resolve(inputs, outputs, declared, PIXELS[-1] if pixels is None else pixels)
    except ModelError as error:
        raise type(error)(f"{path} does not fit: {error}") from None
    external = tuple(sorted(external_files(onnx_model)))
    return Model(path, spec, batch, _fingerprint(path, external, spec), external, _toml_digest(path))


def recall_model(path: Path, contract: dict[str, Any], fingerprint: str) -> Model | None:
    """What `load_model` returned before, without reading the graph, which takes longer than a search.

    Returns:
        The model with this fingerprint and `Model.contract`; None if the file at `path` or its .toml is another
        one now, or not there.

    Raises:
        ModelError: a file that the model needs cannot be read; the gallery is of a newer ruiji.
    """
    if not path.is_file() or _toml_digest(path) != contract["toml"]:
        return None
    spec = ModelSpec.from_values(contract["spec"])
    if spec.pixels not in PIXELS:
        refuse_pixels(spec.pixels)
    external = tuple(contract["external"])
    if _fingerprint(path, external, spec) != fingerprint:
        return None
    return Model(path, spec, contract["batch"], fingerprint, external, contract["toml"])


def require_declared(model: Model) -> None:
    """Refuse a model whose preprocessing would be a guess: a wrong one gives no error, only worse hits.

    Raises:
        ModelError: nobody declared it; says how to.
    """
    if not model.declared:
        raise ModelError(
            f"nothing says how pictures are prepared for {model.path}: ruiji model declare {model.path} --fit … "
            "writes it down (see its --help), and ruiji model add reads it from the folder that the model came in"
        )


def pixels_of(contract: dict[str, Any] | None) -> int:
    """`ModelSpec.pixels` of the gallery that has this `Model.contract`; None: of one that keeps none."""
    return 1 if contract is None else int(contract["spec"].get("pixels", 1))


def why_another(model: Model, contract: dict[str, Any] | None) -> str:
    """Why a model has another fingerprint than the gallery with this `Model.contract`."""
    kept = pixels_of(contract)
    if model.spec.pixels == kept:
        return "the model file or its .toml has changed"
    return (
        f"{toml_file(model.path)} says pixels = {model.spec.pixels}, the gallery has pixels = {kept}; "
        "remove that line to continue with this gallery"
    )


def describe_model(model: Model) -> list[tuple[str, str]]:
    """What a model expects and gives, as (name, value) pairs for people."""
    inputs, outputs = graph_tensors(load_onnx(model.path))
    return [
        ("model", str(model.path)),
        ("inputs", "; ".join(map(str, inputs))),
        ("outputs", "; ".join(map(str, outputs))),
        *describe_spec(model.spec),
        ("batch", "any" if model.batch is None else f"fixed at {model.batch}"),
        ("text tower", _described_words(model.path)),
        ("declared", "yes" if model.declared else "no, so no gallery is made with it; see ruiji model declare --help"),
        ("fingerprint", model.fingerprint),
    ]


def _described_words(path: Path) -> str:
    spec = read_text_spec(path)
    if spec is None:
        return "none"
    return f"{spec.model}, {spec.length} tokens, words cleaned as {spec.reference} does ({spec.clean})"


def _toml_digest(path: Path) -> str | None:
    toml = toml_file(path)
    return _file_digest(toml) if toml.exists() else None


def _fingerprint(path: Path, external: tuple[str, ...], spec: ModelSpec) -> str:
    parts = {
        "format": _FINGERPRINT_FORMAT,
        "model": _file_digest(path),
        "external": {name: _file_digest(path.parent / name) for name in external},
        "spec": spec.values,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path}, which the model needs: {error.strerror}") from None
