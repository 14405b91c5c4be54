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
    """The gallery to ask; by default the only one, or the one of the service's model."""

    gallery: str | None = Field(None, description="The gallery's name, from the list in /healthz.")


class Filtered(Choice):
    """The objects to search among."""

    where: list[Condition] = Field(
        [],
        max_length=_MOST_CONDITIONS,
        description="`COLUMN=VALUE` or `COLUMN!=VALUE` of the annotations, or `path=PREFIX`. Several values of one "
        "column are alternatives; conditions on different columns must all hold.",
    )


class SimilarQuery(Filtered):
    """The hits to give for an object."""

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
        description="Of several hits whose cosine with each other is at least this, give only the first.",
    )


class SentQuery(SimilarQuery):
    """The hits to give for a picture or for words."""

    metric: Metric = Field(Metric.cosine, description="`cosine` and `angle` have the same order.")


class ListQuery(Choice):
    """The part of a list to give."""

    first: int = Field(0, ge=0, le=2**53, description="Position of the first entry, from 0.")
    count: int = Field(100, ge=1, le=MOST_LISTED, description="Maximum number of entries.")


class SampleQuery(Filtered):
    """The number of random objects to give."""

    count: int = Field(24, ge=1, le=MOST_SAMPLED, description="Number of objects; all, if there are fewer.")


class ThumbnailQuery(Choice):
    """The thumbnail to give."""

    size: Side = Field(Side.medium, description="Length of the longer side, in pixels.")


class MapQuery(Choice):
    """The map to give."""

    projection: Projection | None = Field(
        None, description="The default is `umap` if `ruiji map --projection umap` has made that map, else `pca`."
    )


class MapObjectsQuery(Choice):
    """The points of a map to describe."""

    rows_key: str = Field(description="The header `x-ruiji-rows` of the map.", max_length=64)
    rows: str = Field(
        description=f"Gallery rows, separated by commas; at most {MOST_LISTED}.",
        pattern=rf"^[0-9]{{1,10}}(,[0-9]{{1,10}}){{0,{MOST_LISTED - 1}}}$",
    )


class SimilarImage(BaseModel):
    """One hit."""

    objectId: str  # noqa: N815  The article's key.
    distance: float = Field(
        description="The Euclidean distance for `euclidean`, else the angle in radians; lower is closer."
    )
    similarity: float = Field(description="The cosine; higher is closer.")
    rank: int = Field(ge=1, description="Position among the hits; 1 is the best.")
    path: str | None = Field(description="Relative to the media folder; null if the gallery does not know paths.")
    label: str | None = Field(description="The object's label, from the annotations.")
    others: int | None = Field(
        description="Number of similar objects that this hit represents; null without `collapse`."
    )


class Similar(BaseModel):
    """The answer to a search, with the article's keys; hits are in order, best first."""

    queryObjectId: str | None = Field(  # noqa: N815  The article's key.
        description="The query; null if it is a picture or words."
    )
    similarImages: list[SimilarImage]  # noqa: N815  The article's key.
    gallery: str
    metric: Metric
    note: str | None = Field(description="The part of the query that was ignored; null if all of it was used.")


class Object(BaseModel):
    """An object of the gallery."""

    object_id: str
    path: str | None
    row: int
    annotations: dict[str, str] | None = Field(
        None, description="The object's line of the annotations; null if there is none."
    )


class Sample(BaseModel):
    """Random objects."""

    objects: list[Object]
    total: int = Field(description="Number of objects that meet the conditions.")


class Column(BaseModel):
    """A column of the annotations."""

    name: str
    values: list[str] | None = Field(description=f"All values, sorted; null if there are more than {MOST_VALUES}.")


class Columns(BaseModel):
    """The columns of the annotations that objects can be filtered by."""

    columns: list[Column]


class Objects(BaseModel):
    """A part of the gallery, by row."""

    objects: list[Object]
    rows: int = Field(description="Rows of the whole gallery, including those that are not searched.")
    next: int | None = Field(description="`first` of the next part; null after the last.")


class MapObjects(BaseModel):
    """The objects of some points of a map."""

    objects: list[Object] = Field(
        description="In the order of the request, without those that have left the object list."
    )


class MapProgress(BaseModel):
    """Progress of a map that is being made."""

    done: int = Field(description="Rows that are processed.")
    total: int = Field(description="Rows to process; 0 before the work on this map has begun.")


class GalleryHealth(BaseModel):
    """State of one gallery."""

    name: str
    objects: int
    unusable: int = Field(description="Objects that cannot be ranked, because their feature is zero or not finite.")
    rows: int
    length: int = Field(description="Length of a feature.")
    fingerprint: str | None
    pictures: bool = Field(description="Whether the gallery can be searched with a picture: its model is available.")
    words: bool = Field(description="Whether the gallery can be searched with words: its model has a text tower.")
    paths: bool = Field(description="Whether the gallery knows the paths of its objects.")
    way: dict[Metric, str] = Field(description="How a single query is computed, and why, for each metric.")
    problem: str | None = Field(description="Why the newest shards are not searched; null if they are.")


class Health(BaseModel):
    """State of the service."""

    status: str
    version: str
    default: str | None = Field(description="The gallery that is searched if a request names none.")
    media: bool = Field(description="Whether pictures can be shown, because the media folder was given.")
    token: bool = Field(description="Whether requests need the token.")
    galleries: list[GalleryHealth]
    coming: list[str] = Field(description="Galleries without a shard; each can be searched as soon as it has one.")
    refused: dict[str, str] = Field(description="For each gallery that cannot be opened, why.")


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
    """State of the gallery's run."""

    gallery: str
    status: dict[str, Any] = Field(description="As `ruiji status --json` prints it.")
    without_redis: str | None = Field(description="Why only the disk was read; null if Redis was asked as well.")
    redis_lost: bool = Field(description="Whether a Redis is configured but does not answer.")


class Retried(BaseModel):
    """The objects that are tried again."""

    objects: int = Field(description="Number of objects; 0 if none failed.")
    plan: str | None = Field(description="Id of the plan that was opened for them; null if none failed.")


class ComparingState(StrEnum):
    """State of the comparison of all pairs.

    `ready`: it is complete. `missing`: it is not, and is not running. `running`: it is. `failed`: it ended early.
    """

    ready = "ready"
    missing = "missing"
    running = "running"
    failed = "failed"


class Comparison(BaseModel):
    """Progress of the comparison of all pairs."""

    state: ComparingState
    done: int = Field(description="Pairs that are compared.")
    total: int = Field(description="Pairs to compare; 0 if the number is not known yet.")
    seconds: float | None = Field(description="Estimated time left; null if it is not known.")
    error: str | None = Field(description="Why the comparison ended early; null if it did not.")


class CompareQuery(Choice):
    """The pairs to compare."""

    threshold: float = Field(THRESHOLD, gt=0, le=1, description="The lowest cosine of a pair.")


class DuplicatesQuery(CompareQuery):
    """The groups of near-duplicates to give."""

    linkage: Linkage = Field(
        Linkage.complete,
        description="`complete`: every pair of a group is at or above the threshold. `single`: a group is everything "
        "that such pairs connect.",
    )
    keep: str | None = Field(
        None,
        max_length=1000,
        description="Rules of `ruiji near-duplicates --keep`. The default is `pixels,bytes` if the files can be read, "
        "which needs a media folder and a gallery that knows paths.",
    )
    skipped: bool = Field(False, description="Include groups that were skipped.")
    contains: str = Field("", max_length=1000, description="Only groups with a path that contains this.")
    identical: bool = Field(False, description="Only groups with identical files.")
    after: int = Field(-1, ge=-1, le=2**53, description="Start after the group with this name; -1: from the first.")
    count: int = Field(50, ge=1, le=200, description="Maximum number of groups; fewer are given if they are large.")


class DuplicateMember(BaseModel):
    """An object of a group, and its file."""

    object_id: str
    path: str | None
    similarity: float = Field(description="The cosine with the first member.")
    identical_to: str | None = Field(description="Id of the first member whose file has the same bytes.")
    same_file_as: str | None = Field(description="Id of an earlier member that is the same file under another name.")
    sha256: str | None = Field(description="Of the file's bytes; null if it is not known.")
    there: bool | None = Field(description="Whether the file exists; null if files cannot be read.")
    bytes: int | None = Field(description="Size of the file.")
    width: int | None = Field(description="Width in pixels.")
    height: int | None = Field(description="Height in pixels.")
    format: str | None
    modified: str | None = Field(description="Time of the last change of the file: UTC, ISO 8601.")


class AlsoSimilar(BaseModel):
    """The most similar pair of a member and an object of another group; the two are in no group together."""

    member: str
    object_id: str
    path: str | None
    similarity: float
    pairs: int = Field(description="Number of such pairs between the two groups.")


class DuplicateGroup(BaseModel):
    """A group of near-duplicates; the rules keep its first member."""

    name: int = Field(
        description="The lowest gallery row of the members; it does not change when other groups are decided."
    )
    members: list[DuplicateMember]
    reason: str | None = Field(description="Why the first member is kept; null if files cannot be read.")
    pairs: int = Field(description="Number of pairs at or above the threshold.")
    least_similarity: float | None
    see_also: list[AlsoSimilar] = Field(description="Up to five, most similar first.")


class Duplicates(BaseModel):
    """Some groups; none unless all pairs are compared."""

    gallery: str
    comparison: Comparison
    groups: list[DuplicateGroup]
    total: int = Field(description="Number of open groups that match the request.")
    open: int = Field(description="Number of all open groups, whether they match or not.")
    next: int | None = Field(description="`after` of the next part; null after the last.")
    gone: int = Field(description="Number of groups left out of this part because none of their files exists.")
    seen: int = Field(description="Number of decisions that the groups follow: the `seen` of decisions about them.")


class SeenMember(_Asked):
    """A member of a group, as it was shown."""

    object_id: str
    sha256: str | None = None


class AskedDecision(_Asked):
    """A decision, as a line for `ruiji duplicates decide`: `same` needs `keep` and `remove`, the others `objects`."""

    decision: Verdict
    objects: list[str] = Field([], max_length=MOST_DECIDED)
    keep: str | None = None
    remove: list[str] = Field([], max_length=MOST_DECIDED)
    members: list[SeenMember] = Field(
        [],
        max_length=MOST_DECIDED,
        description="The objects as they were shown. If one has another `sha256` now, status 409 refuses the request.",
    )
    seen: int | None = Field(
        None,
        ge=0,
        le=2**53,
        description="As the answer had it that showed these objects. If somebody has decided something else about two "
        "of them since, the request is refused with status 409. Without it, the last decision counts.",
    )


class AskedDecisions(_Asked):
    """Decisions to record: all of them or, if one is refused, none."""

    decisions: list[AskedDecision] = Field(min_length=1, max_length=1000)


class Recorded(BaseModel):
    """The decisions were written to disk."""

    recorded: int
    warnings: list[str]
    seen: int = Field(description="Number of decisions, these included: the `seen` of an `undo` of one of these.")


class DecidedObject(BaseModel):
    """An object of a decision; its id is null if the gallery does not have it, or no longer."""

    object_id: str | None
    path: str | None
    gallery: str | None = Field(
        description="Id of the other gallery that the object belongs to; null if it is of this one."
    )


class DecisionInForce(BaseModel):
    """A decision that is in force, at least for some of its objects."""

    decision: Verdict
    time: str
    objects: list[DecidedObject] = Field(
        description="The objects that it is in force for; in `same` the kept one comes first."
    )


class Decisions(BaseModel):
    """Some decisions, the latest first."""

    decisions: list[DecisionInForce]
    total: int
    next: int | None
    seen: int = Field(description="Number of decisions that were ever made: the `seen` of an `undo` of one of these.")


class DecisionsStatus(BaseModel):
    """Progress of a clean-up, with the keys of `ruiji duplicates status --json`."""

    decided: int
    different: int
    same: int
    skip: int
    kept: int | None = Field(
        description="Files that are kept; this and the following are null if files cannot be read."
    )
    to_remove: int | None
    frees_bytes: int | None
    gone: int | None = Field(description="Files to remove that no longer exist.")


class FilesQuery(Choice):
    """The list of files to give, and its format."""

    list: FileList = Field(
        FileList.remove,
        description="`remove`, `keep`, or `left_out`: the files that are not listed for removal, and why.",
    )
    format: FileFormat = FileFormat.paths
    null: bool = Field(False, description="With `paths`: end each path with a null character, for `xargs -0`.")


class Login(_Asked):
    """The fields of the login form."""

    token: str


class Error(BaseModel):
    """A refusal or a failure: what happened, and what to do."""

    error: str
