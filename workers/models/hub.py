"""Models of a Hugging Face hub: the few files that a model needs, each with the digest that the hub states.

The library huggingface_hub downloads: it shows progress, goes on after a cut connection, and takes a mirror from
`HF_ENDPOINT`. Files are kept until the model is added, so a command that was interrupted starts with the file at which
it was. Nothing that is downloaded is executed, and no file with weights of torch is asked for.
"""

import hashlib
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

from pipeline import layout
from pipeline.errors import ModelError, RuijiError, UsageError
from pipeline.onnx_graph import external_files, load_onnx
from workers.models.conventions import CONVENTIONS, find_convention
from workers.models.source import Source, convention_folders, only_graph
from workers.models.transformers_export import has_weights_alone, is_weights, transformers_source
from workers.models.words import CONFIGURATIONS, SENTENCEPIECE, TOKENIZER, text_files

PREFIX = "hf:"
_GIVEN = re.compile(r"hf:(?P<repository>[^/@:\s]+/[^/@:\s]+)(?:@(?P<revision>[^:\s]+))?(?::(?P<file>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
#: The card, whose head states the licence.
_CARD = "README.md"
#: A configuration or a card that is larger is none.
_MAX_SMALL_BYTES = 1 << 20
_ANSWER_S = 30


class _Files:
    """The files of one commit of a repository, and how they come here."""

    def __init__(self, repository: str, commit: str, stated: dict[str, Any], folder: Path) -> None:
        self.repository, self.commit, self.folder = repository, commit, folder
        self.names = stated.keys()
        self._stated = stated

    def take(self, name: str) -> Path:
        """Download a file, unless it is here.

        Raises:
            ModelError: it is not the file that the hub states.
        """
        from huggingface_hub import hf_hub_download

        stated = self._stated[name]
        path = Path(hf_hub_download(self.repository, name, revision=self.commit, local_dir=self.folder))
        if _digest(path, stated) != (stated.lfs.sha256 if stated.lfs else stated.blob_id):
            path.unlink()
            raise ModelError(f"{name} of {self.repository} is not what the hub says it is, by its digest; try again")
        return path

    def take_small(self, name: str) -> None:
        """Download a configuration or the card, if there is one."""
        if name in self.names and (self._stated[name].size or 0) <= _MAX_SMALL_BYTES:
            self.take(name)


@contextmanager
def hub_source(given: str, models: Path, network: bool = False, output: str | None = None) -> Iterator[Source]:
    """Download what a model needs; if it has no graph, export one.

    Args:
        given: `hf:ORG/REPO[@REVISION][:FILE]`.
        models: the library's folder; downloads are kept in it until the caller is through without an error.
        network: also the weights of the network itself, as safetensors.
        output: of the network that is exported, see `transformers_source`.

    Raises:
        UsageError: huggingface_hub is missing, or there is no such repository, revision or file.
        ModelError: which graph is meant is not clear, its convention cannot be followed, or a file is not what the hub
            states.
        RuijiError: the hub cannot be reached.
    """
    asked = _GIVEN.fullmatch(given)
    if asked is None:
        raise UsageError(f"{given!r} is not hf:ORG/REPO, hf:ORG/REPO@REVISION or hf:ORG/REPO:FILE")
    repository, file = asked["repository"], asked["file"]
    source = given.removesuffix(f":{file}") if file else given
    name = repository.partition("/")[2]
    with _named_errors(source, file), _kept(models, repository):
        files = _listed(repository, asked["revision"], models)
        exports = file is None and has_weights_alone(files.names)
        if exports:
            _take_network(files)
        else:
            graph = file or only_graph(files.names, source, ":")
            if graph not in files.names:
                raise UsageError(f"{source} has no file {graph}")
            path = _taken(files, graph, network)
    facts = {"source": source, "revision": files.commit}
    with _kept(models, repository):
        if exports:
            with transformers_source(files.folder, models, output) as made:
                yield replace(made, name=name, shown=source, facts=made.facts | facts)
        else:
            yield Source(path, name, f"{source}:{graph}", facts | {"graph": graph})
    for folder in _downloads(models, repository):
        shutil.rmtree(folder, ignore_errors=True)


def _downloads(models: Path, repository: str) -> list[Path]:
    """The folders with what came of a repository, of any of its commits."""
    return sorted(models.glob(f".download-{escape(repository.replace('/', '--'))}-{40 * '[0-9a-f]'}"))


@contextmanager
def _kept(models: Path, repository: str) -> Iterator[None]:
    """Say where a download is kept if what comes of it is refused; configurations alone are not worth it."""
    try:
        yield
    except (ModelError, UsageError) as error:
        kept = []
        for folder in _downloads(models, repository):
            sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
            if sum(sizes) > _MAX_SMALL_BYTES:
                kept.append(f"{sum(sizes) / 1e6:.0f} MB in {folder}")
            else:
                shutil.rmtree(folder, ignore_errors=True)
        if not kept:
            raise
        raise type(error)(
            f"{error}. What was downloaded is kept for another try: {', '.join(kept)}; delete it if you make none"
        ) from None


def _listed(repository: str, revision: str | None, models: Path) -> _Files:
    from huggingface_hub import HfApi

    info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_ANSWER_S)
    commit = str(info.sha)
    stated = {file.rfilename: file for file in info.siblings or []}
    for name in stated:
        if not name.isprintable() or "\\" in name or {"", ".", ".."} & {*name.split("/")}:
            raise ModelError(f"{repository} lists a file {name!r}, which no repository can have")
    if not _COMMIT.fullmatch(commit):
        raise ModelError(f"{repository} has the revision {commit!r}, which is no commit")
    return _Files(repository, commit, stated, models / f".download-{repository.replace('/', '--')}-{commit}")


def _taken(files: _Files, graph: str, network: bool) -> Path:
    """The graph with its external weights and all that says how its pictures are prepared."""
    folders = convention_folders(Path(graph))
    for folder in folders:
        for name in (*CONVENTIONS, _CARD):
            files.take_small((folder / name).as_posix())
    files.take_small(layout.toml_file(Path(graph)).as_posix())
    if not layout.toml_file(files.folder / graph).is_file():
        # What cannot be followed is refused before gigabytes have come.
        find_convention([files.folder / folder for folder in folders])
    path = files.take(graph)
    for name in sorted(external_files(load_onnx(path))):
        # Whatever else it names is refused where it is copied.
        if (beside := (folders[0] / name).as_posix()) in files.names:
            files.take(beside)
    if network:
        for name in sorted(files.names):
            if Path(name).parent in folders and name.endswith((".safetensors", ".safetensors.index.json")):
                files.take(name)
    _take_words(files, graph)
    return path


def _take_network(files: _Files) -> None:
    """What transformers loads a network and its words of: no code, and no weights but safetensors."""
    for name in (*CONVENTIONS, _CARD, *CONFIGURATIONS):
        files.take_small(name)
    # What cannot be followed is refused before gigabytes have come.
    find_convention([files.folder])
    for name in sorted(files.names):
        if is_weights(name) or name in (TOKENIZER, SENTENCEPIECE):
            files.take(name)


def _take_words(files: _Files, graph: str) -> None:
    """The text tower of a graph, if the repository has one, and what it needs."""
    for name in text_files(Path(graph), files.names):
        path = files.take(name)
        if name.endswith(layout.MODEL_ENDING):
            for weights in sorted(external_files(load_onnx(path))):
                if (beside := (Path(name).parent / weights).as_posix()) in files.names:
                    files.take(beside)


def _digest(path: Path, stated: Any) -> str:
    """As the hub states it: sha256 of a large file, and git's name of a small one."""
    with path.open("rb") as file:
        if stated.lfs:
            return hashlib.file_digest(file, "sha256").hexdigest()
        begun = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        return hashlib.file_digest(file, begun.copy).hexdigest()


@contextmanager
def _named_errors(source: str, file: str | None) -> Iterator[None]:
    """What the library raises, as one line that says what to do."""
    try:
        from huggingface_hub import constants, errors
        from huggingface_hub.utils import disable_progress_bars
    except ModuleNotFoundError:
        raise UsageError(f"{source} needs huggingface_hub; run: pip install huggingface_hub") from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    elsewhere = f"Or copy the folder here by other means, and run: ruiji model add FOLDER{f'/{file}' if file else ''}"
    try:
        yield
    except RuijiError:
        raise
    except errors.HFValidationError as error:
        raise UsageError(f"{source}: {error}") from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{source}: there is no such revision") from None
    except errors.RepositoryNotFoundError:
        raise UsageError(
            f"{constants.ENDPOINT} has no {source} for you; if it is gated, accept its terms there and run: hf auth "
            f"login. {elsewhere}"
        ) from None
    except (errors.HTTPError, OSError) as error:
        why = " ".join(str(error.__cause__ or error).split())
        raise RuijiError(f"{source} cannot be had from {constants.ENDPOINT}: {why}. Try again. {elsewhere}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RuijiError(
            f"what answers at {constants.ENDPOINT} is no Hugging Face hub ({error}); look at HF_ENDPOINT"
        ) from None
