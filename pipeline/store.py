"""Feature, error, shard, record and gallery files: written atomically, read with checks.

Every write is a temporary file in the same folder and a rename (or a hard link, where only one may
win), so that a half-written file never has a final name. The layout is specified in `docs/format.md`.
"""

import errno
import hashlib
import itertools
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from pipeline import layout, small_files
from pipeline.choices import Reason
from pipeline.errors import FileDamaged, GalleryMismatch, MachineFault, ShardCorrupt
from pipeline.npy import npy_header

#: Version of what is on disk, unless it has one of its own as records have; a newer one is refused.
FORMAT = 1
#: Version of records, of the shards that they describe, and of features on their way there. Since 2 they have digests.
RECORD_FORMAT = 2
#: Length of the digest of an image's file, a sha256.
DIGEST_BYTES = 32
#: Length of the tag that a feature file ends with.
TAG_BYTES = 16
#: For fewer files than this, one after the other is quicker: to lay them out for one call takes as long as some ten.
_MANY = 16
#: Features that are read and checked at once.
_ROWS = 1024
#: A record of a million objects that all failed has some 400 MB.
_LARGEST_JSON = 1 << 30

_T = TypeVar("_T")
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
# Names of temporary files: of this process and no other on any host, then counted.
_WRITER = secrets.token_hex(8)
_writes = itertools.count()


@contextmanager
def machine_faults(doing: str) -> Iterator[None]:
    """Turn an `OSError` of writing (disk full, I/O error, no permission, …) into `MachineFault`."""
    try:
        yield
    except OSError as error:
        raise MachineFault(f"{doing}: {error.strerror}") from error


def write_atomic(
    path: str | Path,
    chunks: Iterable[bytes | memoryview],
    *,
    exclusive: bool = False,
    sync: bool = False,
    prefix: str = layout.TEMPORARY_PREFIX,
    before_naming: Callable[[], object] | None = None,
) -> bool:
    """Write a file so that it appears whole under its name, or not at all.

    Args:
        exclusive: leave an existing file alone (the first writer wins).
        sync: fsync the file before it gets its name; the folder is the caller's to sync.
        prefix: what the temporary file's name begins with.
        before_naming: called once the temporary file is whole; if it raises, the file gets no name.

    Returns:
        False where `exclusive` found the name taken.

    Raises:
        MachineFault: no space, no permission, I/O error.
    """
    # Plain strings: this runs once per image, and paths as objects would cost as much as the writing.
    folder = os.path.dirname(path) or "."
    temporary = _temporary(folder, prefix)
    try:
        descriptor = _create(temporary, folder)
        try:
            for chunk in chunks:
                _write_all(descriptor, chunk)
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if before_naming is not None:
            before_naming()
        if not exclusive:
            os.replace(temporary, path)
            return True
        try:
            os.link(temporary, path)
        except FileExistsError:
            # A network folder may repeat a call that had succeeded: whose file it is tells, not the answer. Another
            # one's may be gone by now.
            with suppress(FileNotFoundError):
                return os.path.samefile(temporary, path)
            return False
        finally:
            os.unlink(temporary)
        return True
    except BaseException as error:
        with suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise MachineFault(f"cannot write {path}: {error.strerror}") from error
        raise


def _temporary(folder: str, prefix: str = layout.TEMPORARY_PREFIX) -> str:
    """A name that nobody has, for a file that is being written."""
    return f"{folder}/{prefix}{_WRITER}-{next(_writes)}"


def _create(path: str, folder: str) -> int:
    # Descriptors, because a file object asks the system for more than it needs; twice, because a plan that ends removes
    # empty folders.
    for _ in range(2):
        try:
            return os.open(path, _NEW_FILE, 0o666)
        except FileNotFoundError:
            pass
        try:
            # Mostly only the last one is missing.
            os.mkdir(folder)
        except OSError:
            os.makedirs(folder, exist_ok=True)
    return os.open(path, _NEW_FILE, 0o666)


def _write_all(descriptor: int, chunk: bytes | memoryview) -> None:
    view = memoryview(chunk).cast("B")
    # Mostly in one call.
    while view and (written := os.write(descriptor, view)) < len(view):
        view = view[written:]


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any) -> bytes:
    """Readable JSON with a fixed key order, so that equal contents are equal bytes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def read_json(path: str | Path, newest: int = FORMAT) -> dict[str, Any]:
    """Parse one of our own JSON files; what is in it is for `as_type` to check.

    Args:
        newest: the latest format that the caller can read.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not there.
        FileDamaged: it is not a regular file, or cannot be parsed.
        GalleryMismatch: a newer ruiji wrote it.
    """
    try:
        # O_NONBLOCK: a pipe of this name would block here for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ELOOP and not (error.errno == errno.ENOENT and os.path.islink(path)):
            raise
        raise FileDamaged(f"{path} is not a file") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_JSON:
        os.close(descriptor)
        raise FileDamaged(f"{path} is not a file" if status.st_size <= _LARGEST_JSON else f"{path} is too large")
    with open(descriptor, "rb") as file:
        data = file.read()
    try:
        value = msgspec.json.decode(data)
        version = value["format"]
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, RecursionError):
        raise FileDamaged(f"{path} is damaged") from None
    if type(version) is not int or version < 1:
        raise FileDamaged(f"{path} is damaged: its format is not a number")
    if version > newest:
        raise GalleryMismatch(f"{path} has format {version}, this ruiji reads formats up to {newest}; update ruiji")
    checked: dict[str, Any] = value
    return checked


def as_type(value: Any, kind: type[_T], path: str | Path) -> _T:
    """What was read, as a value of a type, with every field checked; fields that the type lacks are left out.

    Raises:
        FileDamaged: it has not the fields of the type, or they are of other types.
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeEncodeError, OverflowError, RecursionError) as error:
        raise FileDamaged(f"{path} is damaged ({error})") from None


# Features and errors of single objects


class Embedded(NamedTuple):
    """What workers make of one object.

    Attributes:
        feature: float32[d].
        digest: the sha256 of the bytes that it was made of, 32 bytes; empty if none is kept.
    """

    feature: NDArray[np.float32]
    digest: bytes


def versions_tag(versions: dict[str, str]) -> bytes:
    """16 bytes that stand for a set of library versions; a feature file ends with them."""
    return hashlib.sha256(json.dumps(versions, sort_keys=True).encode()).digest()[:TAG_BYTES]


def write_feature(path: str | Path, embedded: Embedded, tag: bytes) -> None:
    """Write one feature as `.npy`, with digest and tag behind the array. Not fsynced: a lost feature is made again.

    Args:
        tag: the `versions_tag` of the libraries that made it.
    """
    data = np.ascontiguousarray(embedded.feature, dtype="<f4")
    # In one piece, which is one call less to the system per image.
    write_atomic(path, [npy_header("<f4", data.shape) + data.tobytes() + embedded.digest + tag])


def write_features(embedded: Mapping[str, Embedded], tag: bytes) -> None:
    """As `write_feature`, of many by path: those with which all goes well are written without Python in between.

    Args:
        embedded: all of one length, and all with digests or all without.
    """
    paths = list(embedded)
    if len(paths) < _MANY:
        for path in paths:
            write_feature(path, embedded[path], tag)
        return
    data = np.stack([feature for feature, _ in embedded.values()]).astype("<f4", copy=False)
    header = np.frombuffer(npy_header("<f4", data.shape[1:]), np.uint8)
    heads = np.broadcast_to(header, (len(data), len(header)))
    tails = np.frombuffer(b"".join(digest + tag for _, digest in embedded.values()), np.uint8).reshape(len(data), -1)
    contents = np.concatenate([heads, data.view(np.uint8), tails], axis=1)
    written = small_files.write_whole([_temporary(os.path.dirname(path) or ".") for path in paths], paths, contents)
    for row in np.flatnonzero(~written).tolist():
        write_feature(paths[row], embedded[paths[row]], tag)


def read_feature(
    path: str | Path,
    length: int,
    digest_bytes: int,
    tag: bytes,
    untagged: bool = False,
) -> Embedded | None:
    """One feature; None if the file is missing, truncated, foreign, not finite or of other libraries.

    Args:
        length: d.
        digest_bytes: how long the digest is that it must have: `DIGEST_BYTES`, or 0.
        tag: the `versions_tag` that it must have.
        untagged: whether a file without any tag counts, as ruiji wrote them before it tagged features.
    """
    header = npy_header("<f4", (length,))
    array_end = len(header) + 4 * length
    whole = array_end + digest_bytes
    feature = np.empty(length, "<f4")
    start, end = bytearray(len(header)), bytearray(digest_bytes + TAG_BYTES + 1)
    # One call each to open, read and close, where a file object asks for more.
    try:
        # O_NONBLOCK: a pipe of this name would block here for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        size = os.readv(descriptor, [start, feature.data, end])
    except (IsADirectoryError, BlockingIOError):
        return None
    finally:
        os.close(descriptor)
    if (
        size < whole
        or start != header
        or not (end[digest_bytes : size - array_end] == tag or (untagged and size == whole))
    ):
        return None
    return Embedded(feature, bytes(end[:digest_bytes])) if np.isfinite(feature).all() else None


def read_features(
    paths: Sequence[str], length: int, digest_bytes: int, tag: bytes, untagged: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.bool_]]:
    """As `read_feature`, of many: those with which all goes well are read without Python in between.

    Returns:
        The features, float32[n, d]; their digests, uint8[n, digest_bytes]; and which there are, bool[n]. In rows of
        others stands anything.
    """
    features = np.empty((len(paths), length), "<f4")
    digests = np.empty((len(paths), digest_bytes), np.uint8)
    there = np.empty(len(paths), np.bool_)
    # In pieces, so that what is needed besides does not grow with the shard.
    for start in range(0, len(paths), _ROWS):
        some = slice(start, start + _ROWS)
        digests[some], there[some] = _read_piece(paths[some], features[some], digest_bytes, tag, untagged)
    return features, digests, there


def _read_piece(
    paths: Sequence[str], features: NDArray[np.float32], digest_bytes: int, tag: bytes, untagged: bool
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """As `read_features`, into the rows of `features`; returns the rest."""
    length = features.shape[1]
    header = np.frombuffer(npy_header("<f4", (length,)), np.uint8)
    heads = np.empty((len(paths), len(header)), np.uint8)
    tails = np.empty((len(paths), digest_bytes + TAG_BYTES + 1), np.uint8)
    sizes = small_files.read_rows(paths, [heads, features, tails])
    digests, tags = tails[:, :digest_bytes], tails[:, digest_bytes:-1]
    there = sizes == len(header) + 4 * length + digest_bytes + TAG_BYTES
    there &= (heads == header).all(axis=1) & (tags == np.frombuffer(tag, np.uint8)).all(axis=1)
    there &= np.isfinite(features).all(axis=1)
    for row in np.flatnonzero(~there).tolist():
        embedded = read_feature(paths[row], length, digest_bytes, tag, untagged)
        if embedded is not None:
            features[row], there[row] = embedded.feature, True
            digests[row] = np.frombuffer(embedded.digest, np.uint8)
    return digests, there


def remove_files(paths: Sequence[str]) -> None:
    """Delete files, those of them that are there."""
    for row in np.flatnonzero(~small_files.remove(paths)).tolist():
        with suppress(FileNotFoundError):
            os.unlink(paths[row])


def write_error(path: Path, reason: Reason, message: str, plan_id: str) -> None:
    """Record that one object failed, under the limits of one plan."""
    write_atomic(path, [to_json({"format": FORMAT, "message": message, "plan": plan_id, "reason": reason})])


def read_error(path: str | Path, plan_id: str, unnamed: bool = False) -> tuple[str, str] | None:
    """(reason, message) of an object that failed; None if there is no readable error file of this plan.

    Args:
        unnamed: whether a file that names no plan counts, as ruiji wrote them before.
    """
    try:
        told = as_type(read_json(path), _Told, path)
    except (FileNotFoundError, NotADirectoryError, GalleryMismatch):
        return None
    if plan_id != (told.plan if told.plan is not None or not unnamed else plan_id):
        return None
    return told.reason, told.message


@dataclass(frozen=True)
class _Told:
    """What an error file says."""

    reason: str
    message: str
    plan: str | None = None


# Shards


@dataclass(frozen=True)
class Failure:
    """One object of a segment that has no row, because it cannot be embedded."""

    object_id: str
    path: str
    reason: str
    message: str


@dataclass(frozen=True)
class Record:
    """A shard's record; the shard exists once this exists.

    Attributes:
        shard: its number.
        rows: rows of the shard, in the order of the object list.
        length: d.
        sha256: hex digest of each of the shard's data files, by ending.
        plan, segment: which plan made it, and which of its segments it is.
        versions: of the libraries that can change a feature's bits.
        failed: the segment's objects that have no row.
        retry: whether all its objects had failed in earlier shards, whose failures it replaces.
        format: 1, or 2 since shards have digests. A shard that is made again keeps its format.
    """

    shard: int
    rows: int
    length: int
    dtype: str
    sha256: dict[str, str]
    fingerprint: str
    plan: str
    segment: int
    versions: dict[str, str]
    failed: tuple[Failure, ...]
    retry: bool = False
    format: int = RECORD_FORMAT


def recorded_shards(folder: Path) -> list[int]:
    """Numbers of all shards that have a record, ascending."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(shard for name in names if (shard := layout.recorded_shard(name)) is not None)


def feature_shards(folder: Path) -> list[int]:
    """Numbers of all shards that have a features array, with or without a record, ascending."""
    return sorted(shard for name in os.listdir(folder) if (shard := layout.featured_shard(name)) is not None)


def read_record(folder: Path, shard: int) -> Record:
    """A shard's record.

    Raises:
        FileNotFoundError: the shard does not exist.
        GalleryMismatch: the record is damaged or of a newer format.
    """
    path = layout.record_file(folder, shard)
    advice = "restore it from a copy, or run ruiji verify --repair"
    try:
        record = as_type(read_json(path, RECORD_FORMAT), Record, path)
    except FileDamaged as error:
        raise FileDamaged(f"{error}; {advice}") from None
    # A retry of which all failed again has no files.
    files = () if folder.name == layout.fruitless_folder(folder).name else shard_endings(record.format)
    if record.shard != shard or record.rows < 0 or record.length < 1 or set(record.sha256) != set(files):
        raise FileDamaged(f"{path} is damaged: it is not the record of shard {shard:04d}; {advice}")
    return record


def shard_endings(record_format: int) -> tuple[str, ...]:
    """The endings of the data files that a shard of this format has."""
    return tuple(ending for ending in layout.SHARD_ENDINGS if record_format > 1 or ending != layout.DIGESTS)


def shard_contents(
    features: NDArray[np.float32], digests: NDArray[np.uint8] | None, object_ids: list[str], paths: list[str]
) -> dict[str, list[bytes | memoryview]]:
    """The exact bytes of a shard's data files, by ending, in chunks: features are not copied.

    Args:
        features: float32[rows, d].
        digests: uint8[rows, 32]; None for a shard of format 1, which has none.
    """
    ids = np.array(object_ids, dtype=np.str_) if object_ids else np.empty(0, "<U1")
    return {
        layout.FEATURES: _npy(features.astype("<f4", copy=False)),
        **({layout.DIGESTS: _npy(digests)} if digests is not None else {}),
        layout.OBJECT_IDS: _npy(ids),
        layout.PATHS: ["".join(f"{path}\n" for path in paths).encode()],
    }


def _npy(array: NDArray[Any]) -> list[bytes | memoryview]:
    array = np.ascontiguousarray(array)
    return [npy_header(array.dtype.str, array.shape), array.reshape(-1).view(np.uint8).data]


def digest_of(chunks: Iterable[bytes | memoryview]) -> str:
    """The sha256 (hex) of a file that is written in these chunks."""
    total = hashlib.sha256()
    for chunk in chunks:
        total.update(chunk)
    return total.hexdigest()


def write_record(folder: Path, record: Record, before_naming: Callable[[], object] | None = None) -> bool:
    """Commit a shard; durable when this returns. False if it had a record already."""
    content = to_json(asdict(record))
    written = write_atomic(
        layout.record_file(folder, record.shard),
        [content],
        exclusive=True,
        sync=True,
        prefix=layout.temporary_prefix(record.shard),
        before_naming=before_naming,
    )
    sync_folder(folder)
    return written


def check_shard(folder: Path, record: Record) -> None:
    """Compare a shard's files with its record, reading every byte.

    Raises:
        ShardCorrupt: a file is missing or its bytes differ.
    """
    for ending in shard_endings(record.format):
        path = layout.shard_file(folder, record.shard, ending)
        # A pipe of this name would block for ever.
        if not path.is_file():
            raise ShardCorrupt(f"shard {record.shard:04d} has a record but no {path.name}")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != record.sha256[ending]:
            raise ShardCorrupt(
                f"{path} differs from its record: sha256 {digest[:12]}, not {record.sha256[ending][:12]}"
            )
