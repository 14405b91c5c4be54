"""What there is to choose between, in options, in files and in code: an enum each."""

from enum import StrEnum


class Device(StrEnum):
    """Where ONNX Runtime or torch computes."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class Contract(StrEnum):
    """What an exported model takes and gives, if not what its library has."""

    article = "article"


class ObjectIds(StrEnum):
    """What an object's id is made from."""

    basename = "basename"
    path = "path"


class Role(StrEnum):
    """What a worker, or one of its processes, does; all is embed and reduce, by processes of their own."""

    embed = "embed"
    reduce = "reduce"
    compare = "compare"
    all = "all"


class LogFormat(StrEnum):
    """How events are written to stderr."""

    text = "text"
    json = "json"


class ListFormat(StrEnum):
    """How a list is written to stdout."""

    table = "table"
    csv = "csv"
    jsonl = "jsonl"


class Reason(StrEnum):
    """Why an object failed; `docs/format.md` explains each."""

    bad_name = "bad-name"
    missing = "missing"
    unreadable = "unreadable"
    not_a_file = "not-a-file"
    outside_media = "outside-media"
    too_large = "too-large"
    truncated = "truncated"
    undecodable = "undecodable"
    memory = "memory"
    timeout = "timeout"
    crashed_worker = "crashed-worker"
    not_finite = "not-finite"
    model_failed = "model-failed"


class Transport(StrEnum):
    """How a worker takes messages from Redis: many at once, or as kombu does it; only tests choose."""

    fast = "fast"
    stock = "stock"


class Fit(StrEnum):
    """The ways from a picture's shape to the model's, see `pipeline.spec.REFERENCES`."""

    stretch = "stretch"
    crop = "crop"
    pad = "pad"
