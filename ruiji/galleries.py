"""A gallery that is opened once and searched many times, from several threads."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.choices import Device
from pipeline.errors import ImageError, QueryError, UnknownObject, UsageError
from pipeline.settings import MAX_PIXELS, model_file
from ruiji.arguments import criteria_of, named, texts_of, whole
from ruiji.embedding import Picture, embed_all, inputs, name_of, several_of
from ruiji.gallery_model import GalleryModel
from ruiji.results import GalleryObject, NearDuplicates, QueryResult, SearchResults
from ruiji.warning import warn
from search.answers import Criteria, answer
from search.arrays import Float32
from search.combined import combine as combine_queries
from search.duplicates.cleanup import open_groups
from search.duplicates.decided import decided_in
from search.duplicates.decisions import read_decisions
from search.duplicates.linkage import Rules
from search.duplicates.matches import Settled, find_matches
from search.duplicates.sides import Compared
from search.filters import Condition, Wording, apply_conditions, parse_conditions
from search.gallery.opening import find_gallery, is_gallery
from search.gallery.opening import open_gallery as open_shards
from search.gallery.shards import Gallery as Shards
from search.labels import Annotations, read_annotations
from search.maps.store import GalleryMap, make_map, read_map, updated_map
from search.options import THRESHOLD, TOP_K, Linkage, Metric, Projection
from search.queries import Query, embed_pictures, encode_pixels, text_queries
from search.ranking.exact import are_usable, unusable
from search.ranking.planner import Planner, Purpose
from search.requests.near_duplicates import turned_copies
from search.requests.reference import put_together
from search.requests.selection import provenance_warnings

if TYPE_CHECKING:
    from pipeline.spec import ModelSpec
    from search.duplicates.turned import TurnedCopies
    from search.ranking.arithmetic import Arithmetic


#: What messages call the arguments here.
_ARGUMENTS = Wording("condition", "against", "not_within_folder", "give one to only as labels")


def shards_of(gallery: "Gallery") -> Shards:
    """What is searched of a gallery now, for what is built on the same: the clean-up of the service."""
    return gallery._shards


@dataclass(frozen=True)
class _Filter:
    """What one call of `only` asks for; conditions on one column are alternatives within it alone."""

    conditions: tuple[Condition, ...]
    annotations: Annotations | None


class Gallery:
    """All features of one model, mapped into memory; `open_gallery` opens it.

    Several threads may search one gallery at once. Each search sees the shards that were there when it began;
    `refresh` takes up new ones.
    """

    def __init__(
        self,
        folder: Path,
        model: GalleryModel,
        device: Device,
        include_stale: bool,
        whole: Shards,
        filters: tuple[_Filter, ...] = (),
    ) -> None:
        self._folder, self._model, self._device, self._include_stale = folder, model, device, include_stale
        self._filters = filters
        self._whole, self._shards = whole, self._filtered(whole)
        self._refreshing = threading.Lock()
        self._planner = Planner(device)

    @property
    def folder(self) -> Path:
        """Where its shards lie."""
        return self._folder

    @property
    def fingerprint(self) -> str | None:
        """Of the model that made the features; None if nothing says it."""
        return self._shards.fingerprint

    @property
    def length(self) -> int:
        """d, of a feature."""
        return self._shards.length

    def __len__(self) -> int:
        """Objects that are searched; those that cannot be ranked are among them."""
        return self._shards.searched_rows

    @property
    def unusable(self) -> int:
        """How many of them cannot be ranked, because their feature is zero or not finite."""
        return sum(self._shards.unusable_rows)

    def only(self, *conditions: str, labels: str | os.PathLike[str] | Annotations | None = None) -> "Gallery":
        """The same gallery with fewer objects.

        Args:
            conditions: each `COLUMN=VALUE`, `COLUMN!=VALUE` or `path=PREFIX`, as `ruiji search --where` takes them:
                values of one column are alternatives, different columns must all hold. What an earlier call left
                out stays left out.
            labels: the annotation CSV that has the columns, or what was read of it.

        Raises:
            UsageError: a condition cannot be read, or asks for what is not there.
        """
        annotations = labels if labels is None or isinstance(labels, Annotations) else read_annotations(Path(labels))
        wanted = _Filter(tuple(parse_conditions(conditions, _ARGUMENTS.where)), annotations)
        shared = self._folder, self._model, self._device, self._include_stale, self._whole
        return Gallery(*shared, (*self._filters, wanted))

    def labels(self, labels: str | os.PathLike[str] | Annotations) -> Annotations:
        """What an annotation CSV says of the objects: `label` and `find` of it take an object's id and path.

        Args:
            labels: the file, or what was read of it.

        Raises:
            UsageError: it cannot be read.
        """
        annotations = labels if isinstance(labels, Annotations) else read_annotations(Path(labels))
        return annotations.among(self._whole.all_paths)

    def _filtered(self, shards: Shards) -> Shards:
        for wanted in self._filters:
            shards = apply_conditions(shards, wanted.conditions, wanted.annotations, _ARGUMENTS)
        return shards

    def search(
        self,
        pictures: "Picture | Sequence[Picture]" = (),
        *,
        text: str | Sequence[str] = (),
        minus: str | Sequence[str] = (),
        combine: bool = False,
        top_k: int = TOP_K,
        metric: str = Metric.cosine,
        min_similarity: float | None = None,
        collapse: float | None = None,
    ) -> SearchResults:
        """Find what looks like a picture or like what words say, or like each of several.

        Args:
            pictures: files, bytes of files, or Pillow images of 8 bits a sample; one, or a sequence of them.
            text: words, for a model with a text tower; one text, or a sequence of them.
            minus: words that are subtracted; all others are then combined.
            combine: search with the sum of all, each brought to norm 1, instead of with each of them.
            top_k: hits of each query, at least 1.
            metric: `cosine` and `angle` give one order, and the angle in radians as distance; `euclidean` is between
                raw features.
            min_similarity: hits below this cosine are left out.
            collapse: of hits whose cosine with each other reaches this, only the first is given; `hit.others` says how
                many more it stands for.

        Returns:
            One answer for each picture, then for each text; a single one if they are combined. One of several pictures
            that cannot be embedded has `error` instead of hits, unless they are combined.

        Raises:
            QueryError: none of the pictures can be searched with, or not all of what is combined.
            UsageError: the gallery was opened without its model, or its model has no text tower.
            GalleryMismatch, ModelError, MachineFault: the model is another than the gallery's, or fails.
        """
        several, shards = several_of(pictures), self._shards
        criteria = criteria_of(top_k, metric, min_similarity, collapse)
        texts, less = texts_of(text), texts_of(minus)
        names = [name_of(picture, number) for number, picture in enumerate(several)]
        queries = self._embedded(shards, several, names) if several or not texts else []
        said = text_queries([*texts, *less], self._model.words(shards), warn) if texts or less else []
        names += texts
        queries += said[: len(texts)]
        if combine or less:
            if criteria.metric is Metric.euclidean:
                raise UsageError("euclidean compares raw features, and combined queries have none: take another metric")
            combined = _combined(names, queries, said[len(texts) :])
            names, queries = [combined.name], [combined]
        return self._answer(shards, names, queries, criteria)

    def _embedded(self, shards: Shards, pictures: "list[Picture]", names: list[str]) -> list[Query | str]:
        """A query of each picture, or why there is none."""
        model, encoder = self._model.encoder(shards)
        outcomes = embed_pictures(inputs(pictures), model, encoder, self._model.max_pixels)
        return [
            str(outcome) if isinstance(outcome, ImageError) else unusable(outcome) or Query(name, outcome)
            for name, outcome in zip(names, outcomes, strict=True)
        ]

    def search_ids(
        self,
        object_ids: str | Sequence[str],
        *,
        top_k: int = TOP_K,
        metric: str = Metric.cosine,
        min_similarity: float | None = None,
        collapse: float | None = None,
        include_self: bool = False,
    ) -> SearchResults:
        """Find what looks like an object of the gallery, or like each of several; no model is needed.

        Args:
            include_self: whether an object is among its own hits.
            top_k, metric, min_similarity, collapse: as `search` takes them.

        Raises:
            QueryError: there is no such object, or it cannot be ranked.
        """
        criteria = criteria_of(top_k, metric, min_similarity, collapse, not include_self)
        shards, names = self._shards, texts_of(object_ids)
        rows = shards.rows_of(names)
        features = _features(shards, names, rows)
        queries: list[Query | str] = []
        for name, feature in zip(names, features, strict=True):
            if problem := unusable(feature):
                raise QueryError(f"object {name}: {problem}")
            queries.append(Query(name, feature, None, name, shards.path(rows[name][0]), by_id=True))
        return self._answer(shards, names, queries, criteria)

    def search_vectors(
        self,
        vectors: NDArray[np.floating[Any]],
        *,
        top_k: int = TOP_K,
        metric: str = Metric.cosine,
        min_similarity: float | None = None,
        collapse: float | None = None,
    ) -> SearchResults:
        """Find what is nearest to a feature, or to each of several; one pass over the gallery serves many.

        Args:
            vectors: float[d] or float[q, d], raw model output or anything of its length; taken as float32.
            top_k, metric, min_similarity, collapse: as `search` takes them.

        Raises:
            QueryError: one is of another length than the gallery's features, zero, or not finite.
        """
        criteria = criteria_of(top_k, metric, min_similarity, collapse)
        shards, given = self._shards, np.asarray(vectors)
        if given.dtype.kind != "f" or given.ndim not in (1, 2) or given.shape[-1] != shards.length or not len(given):
            raise QueryError(
                f"the vectors are {given.dtype}{list(given.shape)}, the gallery needs float32[{shards.length}] or "
                f"float32[q, {shards.length}], q at least 1"
            )
        with np.errstate(over="ignore", under="ignore"):
            features = np.atleast_2d(given).astype(np.float32)
        for number in np.flatnonzero(~are_usable(features)).tolist():
            raise QueryError(f"vector {number}: {unusable(features[number])}")
        names = [str(number) for number in range(len(features))]
        queries = list(map(Query, names, features))
        return self._answer(shards, names, queries, criteria)

    def features(self, object_ids: str | Sequence[str]) -> Float32:
        """The features of an object, or of several, float32[n, d], raw model output, in the order given.

        Raises:
            QueryError: there is no such object.
        """
        shards, names = self._shards, texts_of(object_ids)
        return _features(shards, names, shards.rows_of(names))

    def find(self, object_id: str) -> GalleryObject:
        """One object; its first row, if shards repeat its id.

        Raises:
            UnknownObject: there is no such object.
        """
        shards = self._shards
        rows = shards.rows_of([object_id])[object_id]
        if not rows:
            raise _unknown(object_id)
        return GalleryObject(rows[0], object_id, shards.path(rows[0]))

    def objects(self, first: int = 0, count: int | None = None) -> list[GalleryObject]:
        """The objects of some gallery rows, in their order; those that are not searched are left out.

        Args:
            first: row to begin with.
            count: so many rows, those that are left out among them; None: all that follow.
        """
        found = []
        for shard, start in zip(self._shards.shards, self._shards.firsts, strict=True):
            end = len(shard.features) if count is None else min(len(shard.features), first + count - start)
            local = slice(max(0, first - start), max(0, end))
            for row, object_id in enumerate(shard.ids(local), local.start):
                if shard.left_out is None or not shard.left_out[row]:
                    path = None if shard.paths is None else shard.paths[row]
                    found.append(GalleryObject(start + row, object_id, path))
        return found

    def objects_at(self, rows: Sequence[int], rows_key: str | None = None) -> list[GalleryObject]:
        """The objects of some gallery rows, in the order given; those that are not searched are left out.

        Args:
            rows_key: of the gallery, or of a map of it, when it had these rows.

        Raises:
            QueryError: the gallery has no such row.
            UsageError: the rows have other numbers since.
        """
        found, shards = [], self._shards
        if rows_key is not None:
            _check_rows_key(shards, rows_key)
        for row in rows:
            if not 0 <= row < shards.rows:
                raise QueryError(f"the gallery has no row {row}, only 0 to {shards.rows - 1}")
            if shards.is_searched(row):
                found.append(GalleryObject(row, shards.object_id(row), shards.path(row)))
        return found

    def map(self, projection: str = Projection.pca, progress: Callable[[int, int], None] | None = None) -> GalleryMap:
        """Where the objects are on a plane, so that those that look alike are near each other.

        A map is kept in the gallery's cache, and made again when the gallery has new rows. It is that of the whole
        gallery: of a part, as `only` gives it, the positions are the same.

        Args:
            projection: `pca`, the first two principal components of unit rows, or `umap`, which needs the extra `map`.
            progress: called with how many rows were gone through, and how many will be.

        Raises:
            UsageError: there is no such projection, or there are too few objects for UMAP.
            RuijiError: UMAP is not installed.
        """
        return make_map(self._shards, named(Projection, projection), progress or (lambda done, total: None))

    def kept_map(self, projection: str = Projection.pca) -> GalleryMap | None:
        """The map that is kept already; None if it would have to be made.

        Raises:
            UsageError: there is no such projection.
        """
        return read_map(self._shards, named(Projection, projection))

    def updated_map(self, earlier: GalleryMap) -> GalleryMap:
        """An earlier map with the objects that are searched now: those that left the list since are not on it.

        Raises:
            UsageError: the rows have other numbers since; load the map again.
        """
        shards = self._shards
        _check_rows_key(shards, earlier.rows_key)
        return updated_map(shards, earlier)

    @property
    def rows_key(self) -> str:
        """Changes whenever a gallery row can be another object, as after a `refresh` that found new shards."""
        return self._shards.rows_key

    def sample(self, count: int) -> list[GalleryObject]:
        """Some of the objects that are searched, by chance, none twice; all, if there are no more.

        Args:
            count: how many, at least 0.
        """
        count = whole(count, "count")
        if count < 0:
            raise UsageError(f"count must be at least 0, not {count}")
        shards = self._shards
        searched = [
            len(shard.features) if shard.left_out is None else int((~shard.left_out).sum()) for shard in shards.shards
        ]
        ends = np.cumsum(searched)
        # Numbers of objects, not their rows: a list of all rows would take gigabytes.
        numbers = np.random.default_rng().choice(ends[-1], min(count, int(ends[-1])), replace=False)
        owners = np.searchsorted(ends, numbers, side="right")
        places = numbers - (ends - searched)[owners]
        chosen = []
        for owner, place in zip(owners.tolist(), places.tolist(), strict=True):
            left_out = shards.shards[owner].left_out
            local = place if left_out is None else int(np.flatnonzero(~left_out)[place])
            chosen.append(shards.firsts[owner] + local)
        return [GalleryObject(row, shards.object_id(row), shards.path(row)) for row in chosen]

    @property
    def rows(self) -> int:
        """Gallery rows, those among them that are not searched."""
        return self._shards.rows

    def near_duplicates(
        self,
        threshold: float = THRESHOLD,
        progress: Callable[[int, int], None] | None = None,
        *,
        linkage: str = Linkage.complete,
        against: str | Sequence[str] = (),
        against_gallery: "Gallery | None" = None,
        not_within_folder: bool = False,
        turned: bool = False,
        media_dir: "str | os.PathLike[str] | None" = None,
        decisions: "str | os.PathLike[str] | None" = None,
    ) -> NearDuplicates:
        """Find all groups of near-identical objects.

        Args:
            threshold: the least similarity of a pair, above 0, at most 1.
            linkage: with `complete` every pair of a group reaches the threshold; with `single` a group is everything
                that is connected by such pairs.
            against: conditions, as `only` takes them, one or a sequence of them: objects that meet them are only
                compared with those that do not, and come first in each group. Columns are those of the labels that
                `only` was given last.
            against_gallery: another gallery of the same model, the reference. Each object that has near-duplicates
                there is a group with them, and `member.reference` says which these are. Objects that the decisions
                beside the other gallery's folder want removed take no part. It goes with `decisions` only.
            not_within_folder: compare only objects of different folders.
            turned: also find copies that were rotated by quarters or mirrored; the gallery needs its model then, and
                `media_dir`, where its pictures are. Pictures that cannot be read are a `RuijiWarning`.
            progress: called with how many pairs are compared, and how many there are.
            decisions: a decisions file, as `ruiji duplicates decide` writes it: what is decided or skipped is left out.

        Raises:
            GalleryMismatch: the decisions file is damaged, or a newer ruiji wrote it.
            UsageError: the threshold is out of its bounds, a condition cannot be read or leaves nothing to compare,
                more objects are connected, and not each with each other, than can be put in order, or something is
                missing that turned copies need.
            ModelError, MachineFault: the model is needed and fails.
        """
        shards = self._shards
        arithmetic = self._planner.arithmetic(self._planner.way(shards, Purpose.pairs, shards.rows))
        linked = named(Linkage, linkage)
        if against_gallery is not None:
            if against or not_within_folder or turned or linked is not Linkage.complete:
                raise UsageError("against, not_within_folder, turned and linkage do not go with against_gallery")
            return self._matches(against_gallery, threshold, arithmetic, progress, decisions)
        labels = (one.annotations for one in reversed(self._filters) if one.annotations is not None)
        compared = Compared(shards, texts_of(against), next(labels, None), not_within_folder, _ARGUMENTS)
        rules, step = Rules(linked, sides=compared.sides), progress or (lambda done, total: None)
        decided = decided_in(shards, [] if decisions is None else read_decisions(Path(decisions)))
        said: list[str] = []
        copies = self._turned_copies(shards, media_dir, said.append) if turned else None
        groups = open_groups(shards, decided, threshold, rules, arithmetic, step, turned=copies)
        for warning in said:
            warn(warning)
        return NearDuplicates(tuple(compared.reference_first(groups)))

    def _matches(
        self,
        other: "Gallery",
        threshold: float,
        arithmetic: "Arithmetic",
        progress: Callable[[int, int], None] | None,
        decisions: "str | os.PathLike[str] | None",
    ) -> NearDuplicates:
        file = None if decisions is None else Path(decisions)
        both = put_together(self._folder, self._shards, other._folder, other._shards, file)
        decided = decided_in(both.gallery, [] if file is None else read_decisions(file))
        step = progress or (lambda done, total: None)
        return NearDuplicates(
            tuple(find_matches(both.gallery, threshold, Settled(decided, both.gone), arithmetic, step))
        )

    def _turned_copies(
        self, shards: Shards, media_dir: "str | os.PathLike[str] | None", say: Callable[[str], None]
    ) -> "TurnedCopies":
        if media_dir is None:
            raise UsageError("turned=True looks at the pictures: say where they are with media_dir")
        return turned_copies(shards, Path(media_dir), lambda: self._model.encoder(shards), self._model.max_pixels, say)

    def embed(self, pictures: "Picture | Sequence[Picture]") -> Float32:
        """Embed pictures with the gallery's model; on the CPU each feature has the very bits that a worker writes.

        Args:
            pictures: as `search` takes them.

        Returns:
            float32[n, d], raw model output, a row for each picture in the order given.

        Raises:
            ImageError: a picture cannot be embedded; names each that cannot.
            UsageError: the gallery was opened without its model.
            GalleryMismatch, ModelError, MachineFault: the model is another than the gallery's, or fails.
        """
        return embed_all(pictures, *self._model.encoder(self._shards), self._model.max_pixels)

    @property
    def spec(self) -> "ModelSpec":
        """How pictures are prepared for the gallery's model.

        Raises:
            UsageError: the gallery was opened without its model.
            GalleryMismatch, ModelError: the model is another than the gallery's, or cannot be used.
        """
        return self._model.encoder(self._shards)[0].spec

    def encode(self, pixels: NDArray[np.uint8]) -> Float32:
        """Encode pictures that are decoded already, by `workers.decode` and for `spec`; the rest of `embed`.

        Args:
            pixels: uint8[b, h, w, c].

        Returns:
            float32[b, d], raw model output.

        Raises:
            UsageError: the gallery was opened without its model.
            GalleryMismatch, ModelError, MachineFault: the model is another than the gallery's, or fails.
        """
        return encode_pixels(pixels, self._model.encoder(self._shards)[1])

    def encode_text(self, text: str, say: Callable[[str], None] | None = None) -> Float32:
        """Encode words with the model's text tower; the rest of a search with `text`.

        Args:
            say: called with what is left out of words that are too long; None: a warning says it.

        Returns:
            float32[d], raw model output.

        Raises:
            QueryError: nothing of the words is left as a token, or their feature cannot be ranked.
            UsageError: the gallery was opened without its model, or its model has no text tower.
            GalleryMismatch, ModelError: the model is another than the gallery's, or fails.
        """
        return text_queries([text], self._model.words(self._shards), say or warn)[0].feature

    def way(self, queries: int = 1, metric: str = Metric.cosine) -> str:
        """Which way so many queries take through the gallery, and why: for people.

        Raises:
            UsageError: there is no such metric, or CUDA was asked for and does not work.
        """
        wanted = criteria_of(1, metric, None, None).metric
        return str(self._planner.way(self._shards, Purpose.hits, queries, wanted))

    def warm_up(self) -> None:
        """Make ready, in a process that stays, whatever makes later searches quicker.

        The model is loaded, if there is one, and the norms of all rows. If torch is installed and quicker here, it is
        imported. From then on few queries are answered by the rows in 8 bits, if `ruiji index` has kept them, on CPUs
        with matrix units (AMX) only until 16 queries come at once; many by rows in bfloat16, which stay in memory if
        they take less than a quarter of it; on CUDA all by rows that stay on the device. Rows that stay are this
        gallery's alone: what `only` gives shares norms and codes, and has to be warmed up itself for the rest.

        Raises:
            UsageError: CUDA was asked for and does not work.
            GalleryMismatch, ModelError, MachineFault: the model is another than the gallery's, or fails.
        """
        shards = self._shards
        planner = Planner(self._device, lasting=True)
        planner.load(shards)
        if self._model.path is not None:
            self._model.encoder(shards)[1].result()
        _ = shards.unusable_rows
        self._planner = planner

    def refresh(self) -> bool:
        """Take up what changed since: new shards, objects that left the list, what `ruiji index` kept.

        Searches in flight go on as they began.

        Returns:
            Whether anything changed.

        Raises:
            UsageError, GalleryMismatch, ShardCorrupt: as `open_gallery`; the gallery is then as it was.
        """
        with self._refreshing:
            whole = _open(self._folder, self._include_stale, self._whole)
            if whole is self._whole:
                return False
            # Searches take this once each: whatever is assigned, they see one or the other.
            self._whole, self._shards = whole, self._filtered(whole)
            return True

    def _answer(
        self, shards: Shards, names: Sequence[str], queries: Sequence[Query | str], criteria: Criteria
    ) -> SearchResults:
        """The answers of queries; a text among them is why there is none."""
        usable = [query for query in queries if isinstance(query, Query)]
        if not usable:
            reasons = "; ".join(f"{name}: {why}" for name, why in zip(names, queries, strict=True))
            raise QueryError(f"no query can be searched with: {reasons or 'there is none'}")
        answers = iter(answer(shards, usable, criteria, self._planner))
        return SearchResults(
            tuple(
                QueryResult(name, next(answers).hits) if isinstance(query, Query) else QueryResult(name, (), query)
                for name, query in zip(names, queries, strict=True)
            )
        )


def _combined(names: Sequence[str], queries: Sequence[Query | str], minus: Sequence[Query]) -> Query:
    """One query of all, none of which may be missing."""
    whole = [query for query in queries if isinstance(query, Query)]
    if not whole or len(whole) < len(queries):
        missing = [f"{name}: {why}" for name, why in zip(names, queries, strict=True) if isinstance(why, str)]
        raise QueryError(f"no combined query can be made: {'; '.join(missing) or 'there is nothing to add'}")
    return combine_queries(whole, minus)


def open_gallery(
    path: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    include_stale: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Gallery:
    """Open a gallery to search it.

    Args:
        path: a gallery's folder, or a FEATURE_DIR: with a model, the gallery of its name in it; without, the only one.
        model: the ONNX file that made the gallery, or its name in `ruiji model list`, for searches with pictures; it is
            loaded when the first one comes.
        device: `cpu`, `cuda`, or `auto`, which is the CPU. It changes speed, never the order of hits.
        include_stale: also objects that left the object list.
        max_pixels: pictures with more are not decoded.

    Raises:
        UsageError: there is no gallery, or it is not clear which one is meant. NoShards: it has no shard yet.
        GalleryMismatch: shards of different models or lengths; names the shard.
        ShardCorrupt: a file is missing, damaged, or differs from its record.

    Warns:
        RuijiWarning: nothing says which model made the features, or library versions differ.
    """
    where, chosen = Path(path), named(Device, device)
    file = None if model is None else model_file(Path(model))
    # A gallery's own folder counts, whatever the model is called.
    folder = find_gallery(where, None if is_gallery(where) else file, "the argument model")
    own = GalleryModel(file, chosen, max_pixels)
    return Gallery(folder, own, chosen, include_stale, _open(folder, include_stale))


def _open(folder: Path, include_stale: bool, before: Shards | None = None) -> Shards:
    shards = open_shards(folder, include_stale, before)
    for warning in provenance_warnings(shards):
        warn(warning)
    # Asked now, so that codes that are kept later are noticed by a refresh.
    _ = shards.coded
    return shards


def _features(shards: Shards, object_ids: Sequence[str], rows: dict[str, list[int]]) -> Float32:
    for object_id in object_ids:
        if not rows[object_id]:
            raise _unknown(object_id)
    return shards.take(np.array([rows[object_id][0] for object_id in object_ids], np.int64))


def _unknown(object_id: str) -> UnknownObject:
    return UnknownObject(f"the gallery has no object {object_id}")


def _check_rows_key(shards: Shards, rows_key: str) -> None:
    if rows_key != shards.rows_key:
        raise UsageError("the gallery has changed and its rows have other numbers now: load the map again")
