"""What is asked and answered, as the OpenAPI document describes it."""

from enum import IntEnum, StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from search.duplicates.decisions import Verdict
from search.options import THRESHOLD, TOP_K, FileFormat, Linkage, Metric, Projection

#: Hits of one search at most.
MOST_HITS = 1000
#: Entries of one page of a list at most.
MOST_LISTED = 1000
#: Objects by chance at most.
MOST_SAMPLED = 100
#: A column with more values than this is not one to choose from.
MOST_VALUES = 500
#: Conditions of one request, characters of one, and characters of words.
_MOST_CONDITIONS, MOST_CHARACTERS = 20, 1000
Condition = Annotated[str, Field(max_length=MOST_CHARACTERS, pattern="^[^=!]+!?=")]


#: Objects of one decision at most.
MOST_DECIDED = 100_000


class FileList(StrEnum):
    """Which files: those that can go, those that are kept, or those that were to go and are not listed."""

    remove = "remove"
    keep = "keep"
    left_out = "left_out"


class Side(IntEnum):
    """The longer side of a small picture, in pixels: for a list, a grid, and one picture."""

    small = 128
    medium = 256
    large = 512


class _Asked(BaseModel):
    # A parameter that is misspelled is refused, not ignored.
    model_config = ConfigDict(extra="forbid")


class Choice(_Asked):
    """Which gallery is asked; by default the only one, or the model's."""

    gallery: str | None = Field(None, description="Name of the gallery, as /healthz lists them.")


class Filtered(Choice):
    """Which objects of a gallery take part."""

    where: list[Condition] = Field(
        [],
        max_length=_MOST_CONDITIONS,
        description="`COLUMN=VALUE` or `COLUMN!=VALUE` of the annotations, or `path=PREFIX`: values of one column are "
        "alternatives, conditions on different columns must all hold.",
    )


class SimilarQuery(Filtered):
    """Which hits of an object are wanted."""

    metric: Metric = Field(Metric.euclidean, description="`cosine` and `angle` have the same order.")
    k: int = Field(TOP_K, ge=1, le=MOST_HITS, description="Number of hits.")
    min_similarity: float | None = Field(
        None, ge=-1, le=1, allow_inf_nan=False, description="Leave out hits below this cosine."
    )
    collapse: float | None = Field(
        None,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="Of hits whose cosine with each other reaches this, give only the first.",
    )


class SentQuery(SimilarQuery):
    """Which hits of a picture or of words are wanted."""

    metric: Metric = Field(Metric.cosine, description="`cosine` and `angle` have the same order.")


class ListQuery(Choice):
    """Which part of a list is wanted."""

    first: int = Field(0, ge=0, le=2**53, description="Place to begin with, from 0.")
    count: int = Field(100, ge=1, le=MOST_LISTED, description="So many at most.")


class SampleQuery(Filtered):
    """How many objects are wanted by chance."""

    count: int = Field(24, ge=1, le=MOST_SAMPLED, description="So many, or all if there are no more.")


class ThumbnailQuery(Choice):
    """Which small picture is wanted."""

    size: Side = Field(Side.medium, description="The longer side, in pixels.")


class MapQuery(Choice):
    """Which map is wanted."""

    projection: Projection | None = Field(
        None, description="By default `umap` if `ruiji map --projection umap` has made it, else `pca`."
    )


class MapObjectsQuery(Choice):
    """Which points of a map are asked about."""

    rows_key: str = Field(description="The `x-ruiji-rows` of the map.", max_length=64)
    rows: str = Field(
        description=f"Gallery rows with commas between, {MOST_LISTED} at most.",
        pattern=rf"^[0-9]{{1,10}}(,[0-9]{{1,10}}){{0,{MOST_LISTED - 1}}}$",
    )


class SimilarImage(BaseModel):
    """One hit."""

    objectId: str  # noqa: N815  The article's key.
    distance: float = Field(description="Euclidean for that metric, else the angle in radians; lower is closer.")
    similarity: float = Field(description="The cosine; higher is closer.")
    rank: int = Field(ge=1)
    path: str | None = Field(description="Relative to the media folder; null if the gallery does not know paths.")
    label: str | None = Field(description="What the annotations say that it shows.")
    others: int | None = Field(description="For how many more objects it stands; null if hits are not collapsed.")


class Similar(BaseModel):
    """The answer of a search, with the article's keys; hits in order, best first."""

    queryObjectId: str | None = Field(  # noqa: N815  The article's key.
        description="null if the query is a picture or words."
    )
    similarImages: list[SimilarImage]  # noqa: N815  The article's key.
    gallery: str
    metric: Metric
    note: str | None = Field(description="What of the query did not count; null if all of it did.")


class Object(BaseModel):
    """An object of the gallery."""

    object_id: str
    path: str | None
    row: int
    annotations: dict[str, str] | None = Field(None, description="Its line of the annotations; null if there is none.")


class Sample(BaseModel):
    """Objects by chance."""

    objects: list[Object]


class Column(BaseModel):
    """A column of the annotations."""

    name: str
    values: list[str] | None = Field(description=f"Sorted; null if there are more than {MOST_VALUES}.")


class Columns(BaseModel):
    """What the annotations have, by which objects can be filtered."""

    columns: list[Column]


class Objects(BaseModel):
    """A part of the gallery, by row."""

    objects: list[Object]
    rows: int = Field(description="Of the whole gallery, those that are not searched among them.")
    next: int | None = Field(description="Where the next part begins; null after the last.")


class MapObjects(BaseModel):
    """The objects of some points."""

    objects: list[Object] = Field(description="In the order asked for; those that left the object list are not there.")


class MapProgress(BaseModel):
    """How far a map is that is being made."""

    done: int = Field(description="Rows gone through.")
    total: int = Field(description="Rows to go through; 0 before it is its turn.")


class GalleryHealth(BaseModel):
    """How one gallery stands."""

    name: str
    objects: int
    unusable: int = Field(description="Objects that cannot be ranked.")
    rows: int
    length: int = Field(description="Of a feature.")
    fingerprint: str | None
    pictures: bool = Field(description="Whether it can be searched with a picture: its model is there.")
    words: bool = Field(description="Whether it can be searched with words: its model has a text tower.")
    paths: bool = Field(description="Whether it knows the paths of its objects.")
    way: dict[Metric, str] = Field(description="Which way one query takes, and why, by metric.")
    problem: str | None = Field(description="Why its newest shards are not searched.")


class Health(BaseModel):
    """How the service stands."""

    status: str
    version: str
    default: str | None = Field(description="The gallery that is asked if none is named.")
    media: bool = Field(description="Whether there are pictures to show: the media folder was given.")
    token: bool = Field(description="Whether it asks for the token.")
    galleries: list[GalleryHealth]
    coming: list[str] = Field(description="Galleries that have no shard yet; each is searched as soon as it has one.")
    refused: dict[str, str] = Field(description="Why a gallery cannot be opened, by name.")


class Failure(BaseModel):
    """A failed object, with the keys of `ruiji failures --format jsonl`."""

    object_id: str
    path: str
    reason: str
    message: str
    shard: int


class Failures(BaseModel):
    """A part of the failed objects."""

    failures: list[Failure]
    total: int
    next: int | None


class Run(BaseModel):
    """How the gallery's run stands."""

    gallery: str
    status: dict[str, Any] = Field(description="As `ruiji status --json` prints it.")
    without_redis: str | None = Field(description="Why the disk alone was asked; null if Redis was asked too.")
    redis_lost: bool = Field(description="Whether there is a Redis, and it does not answer.")


class Retried(BaseModel):
    """What is tried again."""

    objects: int = Field(description="How many; 0 if none failed.")
    plan: str | None = Field(description="The plan that is open with them now; null if none failed.")


class ComparingState(StrEnum):
    """Whether all pairs of a gallery are compared.

    `ready`: they are. `missing`: not all, and nobody does it. `running`: it is being done. `failed`: it ended early.
    """

    ready = "ready"
    missing = "missing"
    running = "running"
    failed = "failed"


class Comparison(BaseModel):
    """How far the comparison of all pairs is."""

    state: ComparingState
    done: int = Field(description="Pairs of objects.")
    total: int = Field(description="Pairs of objects; 0 if it is not known yet.")
    seconds: float | None = Field(description="That are left, as far as can be told.")
    error: str | None = Field(description="Why it ended early.")


class CompareQuery(Choice):
    """Which pairs are compared."""

    threshold: float = Field(THRESHOLD, gt=0, le=1, description="The lowest cosine of a pair.")


class DuplicatesQuery(CompareQuery):
    """Which groups of near-duplicates are wanted."""

    linkage: Linkage = Field(
        Linkage.complete, description="Whether all pairs of a group reach the threshold, or enough to connect it."
    )
    keep: str | None = Field(
        None,
        max_length=1000,
        description="Rules as `ruiji near-duplicates --keep` has them. By default `pixels,bytes`, if files can be "
        "looked at: there is a media folder, and the gallery knows paths.",
    )
    skipped: bool = Field(False, description="Also groups that were skipped.")
    contains: str = Field("", max_length=1000, description="Only groups with a path that has this in it.")
    identical: bool = Field(False, description="Only groups with identical files.")
    after: int = Field(-1, ge=-1, le=2**53, description="The name of the group to begin after; -1: none.")
    count: int = Field(50, ge=1, le=200, description="So many groups at most; fewer if they are large.")


class DuplicateMember(BaseModel):
    """An object of a group, and what is known of its file."""

    object_id: str
    path: str | None
    similarity: float = Field(description="The cosine with the first one.")
    identical_to: str | None = Field(description="Id of the first member whose file has the same bytes.")
    same_file_as: str | None = Field(description="Id of an earlier member that is the same file under another name.")
    there: bool | None = Field(description="Whether there is a file; null: nobody can look.")
    bytes: int | None
    width: int | None = Field(description="In pixels.")
    height: int | None
    format: str | None
    modified: str | None = Field(description="In UTC, as ISO 8601.")


class AlsoSimilar(BaseModel):
    """The most similar pair of a group's object and one outside that no group has together."""

    member: str
    object_id: str
    path: str | None
    similarity: float
    pairs: int = Field(description="How many such pairs there are between the two groups.")


class DuplicateGroup(BaseModel):
    """A group of near-duplicates; the first member is the one that the rules keep."""

    name: int = Field(description="The least gallery row of its members: stays while other groups are decided.")
    members: list[DuplicateMember]
    reason: str | None = Field(description="Why the first one is kept; null if files cannot be looked at.")
    pairs: int = Field(description="That reach the threshold.")
    least_similarity: float | None
    see_also: list[AlsoSimilar] = Field(description="The five most similar.")


class Duplicates(BaseModel):
    """Some groups, if all pairs are compared."""

    gallery: str
    comparison: Comparison
    groups: list[DuplicateGroup]
    total: int = Field(description="Open groups that are asked for.")
    open: int = Field(description="Open groups, those that the filters leave out among them.")
    next: int | None = Field(description="`after` of the next part; null after the last.")
    gone: int = Field(description="Groups that are left out of this part, because none of their files is there.")


class AskedDecision(_Asked):
    """A decision, as a line of `ruiji duplicates decide`: `same` has `keep` and `remove`, the others `objects`."""

    decision: Verdict
    objects: list[str] = Field([], max_length=MOST_DECIDED)
    keep: str | None = None
    remove: list[str] = Field([], max_length=MOST_DECIDED)


class AskedDecisions(_Asked):
    """Decisions that are recorded together, or none of them."""

    decisions: list[AskedDecision] = Field(min_length=1, max_length=1000)


class Recorded(BaseModel):
    """Decisions that are on the disk."""

    recorded: int
    warnings: list[str]


class DecidedObject(BaseModel):
    """An object of a decision; without an id if the gallery does not have it any more, or never had it."""

    object_id: str | None
    path: str | None
    gallery: str | None = Field(description="Of an object of another gallery that gallery's id.")


class DecisionInForce(BaseModel):
    """A decision of which something counts."""

    decision: Verdict
    time: str
    objects: list[DecidedObject] = Field(description="Those that it counts for; of `same` the kept one first.")


class Decisions(BaseModel):
    """Some decisions, the last one first."""

    decisions: list[DecisionInForce]
    total: int
    next: int | None


class DecisionsStatus(BaseModel):
    """How far a clean-up is, with the keys of `ruiji duplicates status --json`."""

    decided: int
    different: int
    same: int
    skip: int
    kept: int | None = Field(description="Files; this and the next ones are null if nobody can look at them.")
    to_remove: int | None
    frees_bytes: int | None
    gone: int | None = Field(description="Files that were decided to go and are not there any more.")


class FilesQuery(Choice):
    """Which list of files is wanted, and how."""

    list: FileList = Field(FileList.remove, description="`left_out`: what is not listed to be removed, and why.")
    format: FileFormat = FileFormat.paths
    null: bool = Field(False, description="With `paths`: end each with a null character, for `xargs -0`.")


class Login(_Asked):
    """What the form sends."""

    token: str


class Error(BaseModel):
    """A refusal or a failure: what happened, and what to do."""

    error: str
