"""A model as it lies on this disk before it is added: its graph, and what is known of where it comes from."""

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import layout
from pipeline.errors import ModelError, UsageError
from pipeline.onnx_graph import external_files, load_onnx

if TYPE_CHECKING:
    from workers.models.check import Pipeline
    from workers.words import TextEncoder

#: Graphs that embed words, as immich, optimum and transformers.js name them.
_WORDS = re.compile(r"(^|/)(textual/|text_)")
#: How many graphs a refusal lists.
_LISTED = 20


@dataclass(frozen=True)
class Source:
    """A model on this disk.

    Attributes:
        graph: its ONNX file.
        name: what it is called if nobody gives it a name.
        shown: the graph, as messages call it.
        facts: what `source.json` says of where it is from; `source` is among them.
        pipeline: of the library that the graph was exported from; None: what lies beside the graph says which it is.
        compare_words: compares the text tower with that of the library, and raises ModelError.
        no_words: why the library's text tower was not exported; None if it was, or there is none.
    """

    graph: Path
    name: str
    shown: str
    facts: dict[str, Any] = field(default_factory=dict)
    pipeline: "Callable[[], Pipeline] | None" = None
    compare_words: "Callable[[TextEncoder], None] | None" = None
    no_words: str | None = None

    @property
    def folders(self) -> list[Path]:
        """Where a convention is looked for."""
        return convention_folders(self.graph)


def local_source(given: Path) -> Source:
    """A file or a folder of this machine.

    Raises:
        ModelError: there is none, it has no graph, or several.
    """
    if not given.parts:
        raise UsageError("give the folder or the file of a model")
    if given.is_file():
        graph = given
    elif given.is_dir():
        graph = given / only_graph(files_of(given), f"{given}", "/")
    else:
        raise ModelError(f"there is no file or folder {given}{_elsewhere(given)}")
    folder = given if given.is_dir() else convention_folders(graph)[-1]
    return Source(graph, folder.resolve().name, str(graph), {"source": str(given), "graph": str(graph)})


def files_of(folder: Path) -> set[str]:
    """The names of all files of a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _elsewhere(given: Path) -> str:
    """What was perhaps meant: a repository, or its page."""
    parts = given.parts[2:4] if given.parts[0] in ("https:", "http:") else given.parts
    if len(parts) != 2 or parts[0] in ("/", ".", ".."):
        return ""
    known = parts[0] in ("timm", "open_clip")
    return f"; did you mean {parts[0]}:{parts[1]}?" if known else f"; a repository is hf:{'/'.join(parts)}"


def convention_folders(graph: Path) -> list[Path]:
    """Where a graph's convention can lie; exporters put the graph into a folder of its own below it."""
    return [graph.parent, *([graph.parent.parent] if graph.parent.name in ("onnx", "visual") else [])]


def copy_graph(found: Path, target: Path, shown: str, reserved: Iterable[str] = ()) -> Any:
    """Copy a graph and its external weights into another folder; returns its `ModelProto`.

    Args:
        shown: the graph, as messages call it.
        reserved: names that no file of weights may have.

    Raises:
        ModelError: it is no model, or its weights are not files beside it.
    """
    model = load_onnx(found)
    shutil.copyfile(found, target)
    for name in sorted(external_files(model)):
        # A graph of a stranger's names the files that are read beside it; some exporters write ./ before them.
        beside = name.removeprefix("./")
        if Path(beside).name != beside or beside in (target.name, *reserved):
            raise ModelError(f"{shown} has weights in {name!r}, which is not a file beside it")
        if not (found.parent / beside).is_file():
            raise ModelError(f"{shown} has weights in {name}, which is not there; copy it beside the model")
        shutil.copyfile(found.parent / beside, target.with_name(beside))
    return model


def only_graph(names: Iterable[str], source: str, joint: str) -> str:
    """The one graph among the names of files that embeds pictures.

    Args:
        source, joint: what is given to `ruiji model add`, and what stands between it and a file of it.

    Raises:
        ModelError: there is none, or several, which may be other models or the same one in other precisions.
    """
    found = sorted(name for name in names if name.endswith(layout.MODEL_ENDING) and not _WORDS.search(name))
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelError(
            f"{source} has no {layout.MODEL_ENDING} file, and not all that one is exported from: config.json, "
            "preprocessor_config.json and .safetensors; timm:NAME and open_clip:NAME/PRETRAINED are exported too"
        )
    listed = ", ".join(found[:_LISTED]) + (" …" if len(found) > _LISTED else "")
    raise ModelError(f"{source} has several models ({listed}); give one: ruiji model add {source}{joint}{found[0]}")
