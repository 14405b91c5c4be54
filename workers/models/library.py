"""The models that a user has added: one folder each, with the ONNX file, its `.toml` and where they come from."""

import datetime
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from pipeline import layout
from pipeline.choices import Device
from pipeline.errors import GraphError, ModelError, RuijiError, UsageError
from pipeline.model import Model, load_model
from pipeline.onnx_graph import graph_tensors, load_onnx
from pipeline.spec import PIXELS, read_toml, resolve
from pipeline.store import write_atomic
from workers.encoder import Encoder, measured_length
from workers.models import architectures
from workers.models.check import Comparison, check_model, folder_pipeline
from workers.models.conventions import CONVENTIONS, Said, find_convention, one_line, read_object, toml_section
from workers.models.hub import PREFIX, hub_source
from workers.models.source import Source, copy_graph, files_of, local_source
from workers.models.transformers_export import has_weights_alone, transformers_source
from workers.models.words import keep_words

#: Outputs that are one vector per image, the one that its library calls an embedding first.
_EMBEDDINGS = ("image_embeds", "pooler_output", "feature_vector")
#: What classifiers export: a score for each class.
_SCORES = "logits"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_LICENSE = re.compile(r"^license:\s*(\S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Added:
    """A model of the library.

    Attributes:
        name: what `--model` takes.
        path: of its ONNX file.
        source: where it was added from.
        license: as its source states it; None if it states none.
        checked: how near it is to its library, if it was compared now.
        has_words: whether it has a text tower.
        no_words: why it has none although one lies in the source; None if it has one, or the source has none.
    """

    name: str
    path: Path
    source: str
    license: str | None
    checked: Comparison | None = None
    has_words: bool = False
    no_words: str | None = None


def add_model(
    given: str | Path,
    models: Path,
    name: str | None = None,
    output: dict[str, Any] | None = None,
    *,
    article: bool = False,
    check: bool = False,
) -> Added:
    """Copy a model with its external weights, write its `.toml` from the convention beside it, and prove it.

    Nothing is left of a model that is refused, but what was downloaded. A model that was added before stays as it is,
    but for a text tower that it did not have.

    Args:
        given: an ONNX file, a folder with one, `hf:ORG/REPO[@REVISION][:FILE]`, `timm:NAME` or
            `open_clip:NAME/PRETRAINED`.
        models: the library's folder; made if it is not there.
        name: by default that of the source's folder.
        output: keys of `[output]` that the caller gives, which no convention says.
        article: export a network of timm with the article's contract.
        check: compare the model with its own library's pipeline.

    Raises:
        ModelError: there is no model, its convention cannot be followed, or it does not run as it promises.
        UsageError: the name cannot be used, or another model has it; a library is missing.
        RuijiError: a hub cannot be reached, or the library's folder not be written.
    """
    if name is not None:
        _require_name(name)
    if article and check:
        raise UsageError("--check compares with timm's own preprocessing, and --contract article replaces it")
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _opened(str(given), models, article, check, (output or {}).get("name")) as source:
            return _add(source, models, name or source.name, output or {}, check)
    except OSError as error:
        raise RuijiError(f"cannot write the model {given} to {models}: {error.strerror}") from error


def _opened(given: str, models: Path, article: bool, check: bool, output: str | None) -> AbstractContextManager[Source]:
    if article and not given.startswith("timm:"):
        raise UsageError(f"--contract article is for timm:NAME, not for {given}")
    if given.startswith(tuple(architectures.PREFIXES)):
        return architectures.exported_source(given, models, article)
    if given.startswith(PREFIX):
        return hub_source(given, models, check, output)
    folder = Path(given)
    if given and folder.is_dir() and has_weights_alone(files_of(folder)):
        return transformers_source(folder, models, output)
    return nullcontext(local_source(folder))


def _add(source: Source, models: Path, name: str, output: dict[str, Any], check: bool) -> Added:
    _require_name(name)
    declared = layout.toml_file(source.graph)
    said = None if declared.is_file() else find_convention(source.folders)
    if said is None and not declared.is_file():
        # What is no model is not declared either.
        load_onnx(source.graph)
        raise ModelError(
            f"nothing in {' and '.join(map(str, source.folders))} says how pictures are prepared "
            f"({', '.join(CONVENTIONS)}); write it down with ruiji model declare {source.graph} --fit …, and add the "
            "model again"
        )
    if said is None and output:
        raise UsageError(f"{declared} says what comes out of the model; change it there")
    with tempfile.TemporaryDirectory(dir=models, prefix=".adding-") as scratch:
        folder = Path(scratch) / name
        folder.mkdir()
        try:
            model = _copied(source, folder, said, output)
            prove(model)
            checked = _checked(model, source) if check else None
        except ModelError as error:
            # The copy is gone when this is read.
            copy = layout.added_model_file(folder.parent, name)
            words = str(error).replace(str(copy), source.shown).replace(str(layout.toml_file(copy)), str(declared))
            raise type(error)(words) from None
        facts = {
            "license": _license(source.folders),
            **source.facts,
            "added": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        text, no_words = _kept_words(source, model)
        facts["sha256"] = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
        if text:
            # Apart: no feature of a picture depends on it.
            facts["text_sha256"] = text
        if checked is not None:
            facts["check"] = checked.values
        (folder / layout.MODEL_SOURCE).write_text(json.dumps(facts, indent=1) + "\n")
        target = models / name
        if target.exists():
            _complete(target, model, facts)
        else:
            os.rename(folder, target)
    added = _read(target)
    has_words = "text" in read_toml(layout.toml_file(added.path))
    return replace(added, checked=checked, has_words=has_words, no_words=None if has_words else no_words)


def _kept_words(source: Source, model: Model) -> tuple[dict[str, str], str | None]:
    """Keep the text tower that the source has: sha256 of its files by their names, and why one is not kept."""
    folder = model.path.parent
    pictures = set(folder.iterdir())
    try:
        keep_words(source.graph, model, f"the text tower of {source.shown}", source.compare_words)
    except (ModelError, UsageError) as error:
        if "text" in read_toml(layout.toml_file(model.path)):
            # Somebody named it, and means it.
            raise
        return {}, str(error).replace(f"{folder}{os.sep}", "")
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path not in pictures)
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}, source.no_words


def declare_model(path: Path, given: dict[str, Any], output: dict[str, Any]) -> Path:
    """Write the `.toml` of a model from values that a person gives, if they fit.

    Args:
        given: keys of `[input]`. output: keys of `[output]`.

    Raises:
        ModelError: the values do not fit the model.
        UsageError: there is a `.toml` already.
    """
    inputs, outputs = graph_tensors(load_onnx(path))
    try:
        resolve(inputs, outputs, {"input": given, "output": output}, PIXELS[-1])
    except ModelError as error:
        raise ModelError(f"{path} does not fit: {error}") from None
    target = layout.toml_file(path)
    said = {
        section: {key: Said(value, "declared") for key, value in values.items()}
        for section, values in (("input", given), ("output", output))
    }
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(_toml(path, said["input"], said["output"]))
    except FileExistsError:
        raise UsageError(f"{target} exists already; change it, or remove it first") from None
    except OSError as error:
        raise RuijiError(f"cannot write {target}: {error.strerror}") from error
    return target


def added_models(models: Path) -> Iterator[Added]:
    """The models of the library, by name."""
    if models.is_dir():
        for folder in sorted(models.iterdir()):
            if not folder.name.startswith(".") and (folder / layout.MODEL_SOURCE).is_file():
                yield _read(folder)


def leftovers(models: Path) -> list[tuple[Path, int]]:
    """Folders that commands left in the library, which failed, were ended or run now, and their bytes."""
    folders = sorted(models.glob(".*-*/")) if models.is_dir() else []
    return [(folder, sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())) for folder in folders]


def prove(model: Model) -> None:
    """Encode pictures of noise: features are finite, differ between pictures, and are the same bits at a second time.

    Raises:
        ModelError: they are not; or as `Encoder.prove`.
    """
    encoder, spec = Encoder(model, Device.cpu), model.spec
    encoder.prove()
    noise = np.random.default_rng(0).integers(0, 256, (3, spec.height, spec.width, spec.channels), dtype=np.uint8)
    first, second = encoder.encode(noise), encoder.encode(noise)
    if not np.isfinite(first).all():
        raise ModelError(f"{model.path} gives features that are not finite; was it exported in float16?")
    if (first == first[0]).all():
        raise ModelError(f"{model.path} gives all pictures the same feature; take another output with --output")
    if (first != second).any():
        raise ModelError(
            f"{model.path} gives the same picture another feature the second time; was it exported with dropout?"
        )


def _checked(model: Model, source: Source) -> Comparison:
    pipeline = source.pipeline() if source.pipeline else folder_pipeline(source.folders, model.spec)
    return check_model(model, pipeline)


def _require_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name a model, only letters, digits, dots, _ and - can; give one with --name")


def _copied(source: Source, folder: Path, said: dict[str, Said] | None, output: dict[str, Any]) -> Model:
    found = source.graph
    path = folder / (folder.name + layout.MODEL_ENDING)
    copied = copy_graph(found, path, source.shown, {layout.toml_file(path).name, layout.MODEL_SOURCE})
    if said is None:
        shutil.copyfile(layout.toml_file(found), layout.toml_file(path))
        return load_model(path)
    outputs = [value.name for value in copied.graph.output]
    best = next((name for name in _EMBEDDINGS if name in outputs), None)
    lines = {key: Said(value, "given on the command line") for key, value in output.items()}
    if "name" not in lines and outputs == [_SCORES]:
        raise ModelError(
            f"{source.shown} gives only {_SCORES}, a score for each class of a classifier, and no feature; take an "
            f"export without the classifier, or --output {_SCORES} to compare pictures by their scores"
        )
    if "name" not in lines and len(outputs) > 1:
        if best is None:
            raise ModelError(f"{source.shown} has several outputs ({', '.join(outputs)}); name one with --output")
        lines["name"] = Said(best, f"the graph's embedding among {', '.join(outputs)}")
    try:
        said, lines = _filled_in(path, copied, said, lines)
        layout.toml_file(path).write_text(_toml(found, said, lines), encoding="utf-8")
        return load_model(path)
    except GraphError:
        raise
    except ModelError as error:
        origin = next(iter(said.values())).origin.partition(":")[0]
        # A graph that was made or downloaded here is gone, or nobody's to write beside.
        is_ours = found.is_relative_to(folder.parent.parent)
        other = "" if is_ours else f", or write {layout.toml_file(found)} yourself"
        raise ModelError(
            f"{error}. Its .toml was made of {origin}, --output and --pooling: change those{other}, and add the model "
            "again"
        ) from None


def _filled_in(
    path: Path, model: Any, said: dict[str, Said], output: dict[str, Said]
) -> tuple[dict[str, Said], dict[str, Said]]:
    """The keys of `[input]` and `[output]` with what a graph of open dimensions leaves out, and its run shows."""
    inputs, outputs = graph_tensors(model)
    if any(tensor.shape is not None and tensor.shape[1:] == (None, None, None) for tensor in inputs):
        said = {**said, "layout": Said("NCHW", "the graph leaves it open; its library has channels first")}
    target = next((tensor for tensor in outputs if tensor.name == output.get("name", Said(None, "")).value), outputs[0])
    at = 2 if target.shape is not None and len(target.shape) == 3 else 1
    if target.shape is None or (len(target.shape) > at and target.shape[at] is None):
        values = {key: value.value for key, value in output.items()}
        declared = {"input": {key: value.value for key, value in said.items()}, "output": {**values, "length": 1}}
        spec, batch = resolve(inputs, outputs, declared, PIXELS[-1])
        length = measured_length(path, spec, batch or 1)
        output = {**output, "length": Said(length, "the graph leaves it open; it gave so many for a picture")}
    return said, output


def _toml(found: Path, said: dict[str, Said], output: dict[str, Said]) -> str:
    lines = [f"# How pictures are prepared for {found.name}, and where each value comes from; see docs/models.md."]
    for section, values in (("input", said), ("output", output)):
        lines += ["", *toml_section(section, values)] if values else []
    return "\n".join(lines) + "\n"


def _license(folders: list[Path]) -> str | None:
    for folder in folders:
        readme = folder / "README.md"
        if readme.is_file() and (stated := _LICENSE.search(readme.read_text("utf-8", errors="replace")[:100_000])):
            return one_line(stated[1].strip())[:200]
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _complete(target: Path, again: Model, facts: dict[str, Any]) -> None:
    """Move into a model's folder what it lacks of the same model, added again: its text tower.

    The `.toml`, which names the tower, comes after it, and is exchanged as a whole: from then on there is a search with
    words. A command that is ended before leaves the model as it was.

    Raises:
        UsageError: another model has the name, or the same one has another text tower.
    """
    path, source = layout.added_model_file(target.parent, target.name), again.path.parent
    kept = _facts(target)
    if load_model(path).fingerprint != again.fingerprint:
        raise UsageError(
            f"another model has the name {target.name} in {target.parent}; give this one another with --name"
        )
    text, had = facts.get("text_sha256"), kept.get("text_sha256")
    if text and had and text != had:
        raise UsageError(f"{target.name} has another text tower in {target.parent}; give this one a name with --name")
    if text and "text" not in read_toml(layout.toml_file(path)):
        for part in sorted({PurePath(name).parts[0] for name in text}):
            left = target / part
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
            os.rename(source / part, left)
        os.replace(layout.toml_file(again.path), layout.toml_file(path))
        kept |= {"sha256": facts["sha256"], "text_sha256": text}
    if "check" in facts:
        kept["check"] = facts["check"]
    write_atomic(target / layout.MODEL_SOURCE, [(json.dumps(kept, indent=1) + "\n").encode()])


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / layout.MODEL_SOURCE
    try:
        return read_object(path)
    except ModelError as error:
        raise ModelError(f"{error}; remove {folder} and add the model again") from None


def _read(folder: Path) -> Added:
    facts = _facts(folder)
    stated = facts.get("license")
    return Added(
        folder.name,
        layout.added_model_file(folder.parent, folder.name),
        str(facts.get("source")),
        None if stated is None else str(stated),
    )
