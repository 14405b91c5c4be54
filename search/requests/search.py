"""The plain function under `ruiji search`."""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pipeline.choices import Device
from pipeline.errors import QueryError, UsageError
from pipeline.settings import MAX_PIXELS
from search.combined import combine
from search.options import TOP_K, Metric
from search.queries import (
    Query,
    embed_images,
    feature_queries,
    gallery_queries,
    image_files,
    image_queries,
    query_encoder,
    query_model,
    text_encoder,
    text_queries,
)
from search.requests.pictures import answer_lines, check_picture_targets, check_pictures
from search.requests.selection import Say, Selection, say_unusable, version_warnings

if TYPE_CHECKING:
    from search.answers import Answer
    from search.views.sheet import SheetLine


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What is searched with, in what, and which hits are wanted.

    Attributes:
        selection: the objects that are ranked.
        images: pictures, folders, lists of pictures (`.txt`, or `.csv` with `img_path`), `-` for a list on stdin.
        ids: objects of the gallery.
        features: `.npy` files, float32[d] or float32[q, d].
        texts: words, for a model with a text tower.
        minus: words that are subtracted; the others are then combined.
        combine: search with the sum of all queries, each brought to norm 1, instead of with each of them.
        media_dir: where the pictures of the gallery are.
        top_k, metric, min_similarity, collapse, exclude_self: as in `search.answers.Criteria`.
        device: where pictures are embedded and rows are ranked; changes speed, never the ranking.
        sheet, html: what will be drawn; checked before any work.
        max_pixels: pictures with more are not decoded.
        explain: say which way the search takes, and why.

    Raises:
        UsageError: there is nothing to search with, or a value is out of its bounds.
    """

    selection: Selection
    images: tuple[Path, ...] = ()
    ids: tuple[str, ...] = ()
    features: tuple[Path, ...] = ()
    texts: tuple[str, ...] = ()
    minus: tuple[str, ...] = ()
    combine: bool = False
    media_dir: Path | None = None
    top_k: int = TOP_K
    metric: Metric = Metric.cosine
    min_similarity: float | None = None
    collapse: float | None = None
    exclude_self: bool | None = None
    device: Device = Device.auto
    sheet: Path | None = None
    html: Path | None = None
    max_pixels: int = MAX_PIXELS
    explain: bool = False

    def __post_init__(self) -> None:
        if not (self.images or self.ids or self.features or self.texts):
            raise UsageError("nothing to search with: give pictures (or folders, lists, -), --id, --feature or --text")
        if not all(text.strip() for text in (*self.texts, *self.minus)):
            raise UsageError("--text and --minus need words")
        if self.combines and self.metric is Metric.euclidean:
            raise UsageError(
                "--metric euclidean compares raw features, and combined queries have none: leave out --metric"
            )
        if self.collapse is not None and not 0 < self.collapse <= 1:
            raise UsageError(f"--collapse must be above 0 and at most 1, not {self.collapse}")

    @property
    def combines(self) -> bool:
        """Whether there is one query of all."""
        return self.combine or bool(self.minus)


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        answers: in the order ids, features, pictures, words, each as they were given; one if they are combined.
        failures: file and reason of each picture that could not be searched with.
        lines: what a sheet or a page shows; empty if none is wanted.
    """

    answers: "tuple[Answer, ...]"
    failures: tuple[tuple[Path, str], ...]
    lines: "tuple[SheetLine, ...]"


def search(request: SearchRequest, say: Say, stdin: TextIO | None = None) -> SearchResult:
    """Rank a gallery's objects by how much they look like each query; exact, ties by object id.

    Args:
        say: called with warnings, and with each picture that is left out.
        stdin: what `-` reads; by default the process' own.

    Raises:
        UsageError: the request contradicts itself or what is on the disk.
        QueryError: a query cannot be searched with; of pictures, if none can.
        ModelError, GalleryMismatch, ShardCorrupt, MachineFault: as their parts raise them.
    """
    selection, media_dir = request.selection, request.media_dir
    check_pictures(request.sheet, request.html, media_dir)
    _check_exclude_self(request)
    files = image_files(list(request.images), stdin or sys.stdin, media_dir)
    read = [selection.labels, *request.images, *files, *request.features]
    check_picture_targets(
        selection, {"--sheet": request.sheet, "--html": request.html}, media_dir, read, request.images
    )
    conditions, annotations = selection.read_filters()
    whole = selection.open(say)
    annotations = annotations and annotations.among(whole.all_paths)
    queries = gallery_queries(whole, list(request.ids), media_dir)
    queries += feature_queries(list(request.features), whole.length)
    count = 1 if request.combines else len(queries) + len(files) + len(request.texts)
    check_pictures(request.sheet, request.html, media_dir, count, request.top_k, whole.rows)
    loading, words = None, (*request.texts, *request.minus)
    said: list[Query] = []
    if (files or words) and selection.model_path is None:
        what = "pictures" if files else "words"
        raise UsageError(f"searching with {what} needs the model that made the gallery: give it as --model")
    if words:
        assert selection.model_path is not None
        # A text tower belongs to a model, so the model has to be the gallery's.
        query_model(selection.model_path, whole)
        said = text_queries(words, text_encoder(selection.model_path, whole.length), say)
    if files:
        assert selection.model_path is not None
        loading = query_encoder(selection.model_path, whole, request.device, len(files))
    # While the model is loaded, all that comes after it is made ready.
    importlib.import_module("search.views.output")
    from search.answers import Criteria, answer
    from search.filters import apply_conditions
    from search.ranking.planner import Planner

    gallery = apply_conditions(whole, conditions, annotations)
    say_unusable(gallery, say)
    failures: tuple[tuple[Path, str], ...] = ()
    if loading is not None:
        embedded = embed_images(files, *loading, request.max_pixels)
        for warning in version_warnings(whole):
            say(f"warning: {warning}")
        failures = embedded.failures
        for image, reason in failures:
            say(f"{image}: {reason}; left out")
        queries += image_queries(embedded, whole, media_dir)
        if failures and request.combines:
            raise QueryError("a query that is to be combined cannot be searched with; leave it out to go on without it")
    queries += said[: len(request.texts)]
    if request.combines:
        queries = [combine(queries, said[len(request.texts) :])]

    planner = Planner(request.device)
    criteria = Criteria(
        top_k=request.top_k,
        metric=request.metric,
        min_similarity=request.min_similarity,
        collapse=request.collapse,
        exclude_self=request.exclude_self,
    )
    answers = answer(gallery, queries, criteria, planner, annotations, say if request.explain else None)
    lines: list[SheetLine] = []
    if media_dir is not None and not (request.sheet is None and request.html is None):
        lines = answer_lines(answers, annotations, media_dir)
    return SearchResult(tuple(answers), failures, tuple(lines))


def _check_exclude_self(request: SearchRequest) -> None:
    if request.exclude_self and request.features:
        raise UsageError(
            "--exclude-self cannot be used with --feature: it is not known which object a feature belongs to. Search "
            "with --id, or leave out --exclude-self"
        )
    if request.exclude_self and request.images and request.media_dir is None:
        raise UsageError(
            "--exclude-self knows the object of a picture by its path in the media folder: say where that is with "
            "--media-dir"
        )
