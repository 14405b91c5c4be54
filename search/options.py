"""The words that search takes as options; free of heavy imports, because the command line needs them."""

from enum import StrEnum


class Metric(StrEnum):
    """What neighbours are ordered by, and what their distance means.

    `cosine` and `angle` have the same order and the same distance, the angle in radians. `euclidean` is the
    article's: between raw features, lower is closer.
    """

    cosine = "cosine"
    angle = "angle"
    euclidean = "euclidean"


class Projection(StrEnum):
    """How objects come onto the plane of a map."""

    #: Principal components.
    pca = "pca"
    umap = "umap"


class Linkage(StrEnum):
    """Which pairs of a group of near-duplicates reach the threshold: all, or enough to connect it."""

    complete = "complete"
    single = "single"


class Precision(StrEnum):
    """What a scan multiplies. The answer is the same; the less exact, the more rows have to be decided in float64."""

    #: Of an evaluation only.
    float64 = "float64"
    float32 = "float32"
    bfloat16 = "bfloat16"
    #: The gallery's codes.
    int8 = "int8"


class OutputFormat(StrEnum):
    """How hits are written to stdout."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    paths = "paths"


class GroupFormat(StrEnum):
    """How groups of near-duplicates are written to stdout; `paths` as fdupes does, an empty line between groups."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    paths = "paths"


class FileFormat(StrEnum):
    """How a list of files is written."""

    paths = "paths"
    csv = "csv"
    jsonl = "jsonl"


class ReportFormat(StrEnum):
    """How an evaluation is written to stdout."""

    table = "table"
    json = "json"
    csv = "csv"


TOP_K = 10
THRESHOLD = 0.95
#: Of an evaluation: hits of each query in a TREC run file, and queries on a sheet.
RUN_DEPTH, SHEET_QUERIES = 1000, 10
