"""The doctor: whether this machine can do its part, and whether its features agree with the gallery's."""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import redis

from pipeline import layout, small_files
from pipeline.choices import Device
from pipeline.errors import GalleryMismatch, ImageError, RuijiError, ShardCorrupt, UsageError
from pipeline.folding import folds
from pipeline.gallery import gallery_model, read_gallery
from pipeline.model import Model, why_another
from pipeline.npy import NpyError, map_npy
from pipeline.objects import read_lines
from pipeline.pictures import file_digest
from pipeline.plans.files import open_plan
from pipeline.plans.published import published_shards
from pipeline.queue.connection import connect, public_url
from pipeline.queue.embedded import find_server
from pipeline.settings import WINDOW_SEGMENTS
from pipeline.status import StatusReader
from pipeline.store import DIGEST_BYTES, read_record, sync_folder, write_atomic
from pipeline.streams import counted
from pipeline.versions import library_versions, other_versions
from workers.decode.images import load_pixels
from workers.decode.resize import NO_INSTRUCTIONS, why_not
from workers.devices import probe
from workers.encoder import Encoder

#: Rows that are embedded again, spread over the gallery.
SAMPLE_ROWS = 12
#: The same libraries on the same device give the same bits; others must come this close.
LEAST_COSINE = 0.99999
#: Between a CPU and a GPU, or two GPUs.
LEAST_COSINE_CUDA = 0.9999
#: Smallest unit in which most file systems give out space.
_BLOCK_BYTES = 4096
_CLOCK_TOLERANCE_S = 5.0


@dataclass(frozen=True)
class Check:
    """What one look found: `ok`, `warn` (works, but not as it should), `bad` or `wrong` (features disagree)."""

    state: str
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.state:<5} {self.name:<10} {self.detail}"


def examine(
    media_dir: Path, feature_dir: Path, model_path: Path, redis_url: str | None, device: Device
) -> Iterator[Check]:
    """Look at everything a run needs, one check after the other; a problem ends its check, not the doctor.

    Args:
        redis_url: None if no Redis is set or running.
    """
    yield _redis(redis_url)
    yield _media(media_dir)
    folder = layout.gallery_folder(feature_dir, model_path)
    yield _atomic(folder)
    try:
        model = gallery_model(folder, model_path)
    except RuijiError as error:
        yield Check("bad", "model", str(error))
        return
    yield Check("ok", "model", f"{model_path.name}, d = {model.spec.length}, fingerprint {model.fingerprint[:12]}")
    yield _examined("space", lambda: _space(folder, model))
    yield _examined("libraries", lambda: _versions(folder))
    try:
        encoder = Encoder(model, device)
        encoder.prove()
    except RuijiError as error:
        yield Check("bad", "device", str(error))
        return
    yield _device(encoder, device)
    yield _resizing()
    yield _small_files()
    yield _examined("features", lambda: _sample(folder, media_dir, encoder))


def _examined(name: str, look: Callable[[], Check]) -> Check:
    """What a look finds at the gallery, even if that is too damaged to look."""
    try:
        return look()
    except (RuijiError, OSError, ValueError) as error:
        return Check("bad", name, f"cannot be examined: {error}; see ruiji verify")


def _redis(url: str | None) -> Check:
    if url is None:
        return _no_redis()
    try:
        client = connect(url)
        info = client.info()
        seconds, micros = client.time()
    except (RuijiError, redis.RedisError) as error:
        return Check("bad", "redis", str(error))
    problems = []
    version = str(info["redis_version"])
    if not info.get("aof_enabled"):
        problems.append("it keeps no append-only file: set appendonly yes, or a restart loses what is in flight")
    if info.get("aof_last_write_status", "ok") != "ok":
        problems.append("it cannot write its append-only file: is its disk full?")
    if info.get("maxmemory") and info.get("maxmemory_policy") != "noeviction":
        problems.append("it drops messages when its memory is full: set maxmemory-policy noeviction")
    if _answers_without_password(url):
        problems.append("it answers without a password: set requirepass")
    ahead = time.time() - (seconds + micros / 1e6)
    if abs(ahead) > _CLOCK_TOLERANCE_S:
        problems.append(f"this machine's clock differs from Redis' by {ahead:+.0f} s: work may be done twice, or late")
    # Valkey tells the version of Redis that it stands for as well.
    where = f"{public_url(url)}, " + (f"Valkey {info['valkey_version']}" if "valkey_version" in info else version)
    return Check("warn", "redis", f"{where}: {'; '.join(problems)}") if problems else Check("ok", "redis", where)


def _no_redis() -> Check:
    told = "none is set or running; start one with ruiji redis (or make up), or set RUIJI_REDIS_URL"
    try:
        find_server()
    except RuijiError as error:
        return Check("bad", "redis", f"{told}. For ruiji redis and ruiji run, {error}")
    return Check("warn", "redis", f"{told}. ruiji run starts its own")


def _answers_without_password(url: str) -> bool:
    try:
        redis.Redis.from_url(public_url(url), socket_connect_timeout=5).ping()
    except redis.RedisError:
        return False
    return True


def _media(media_dir: Path) -> Check:
    try:
        with os.scandir(media_dir) as entries:
            empty = next(entries, None) is None
    except OSError as error:
        return Check("bad", "media", f"{media_dir} cannot be read: {error.strerror}")
    if empty:
        return Check("bad", "media", f"{media_dir} is empty; is it mounted?")
    return Check("ok", "media", str(media_dir))


def _existing(folder: Path) -> Path:
    """The folder, or where it would be made."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _atomic(folder: Path) -> Check:
    """Whether a file can be renamed over another, and linked so that the first wins, where the gallery is or comes."""
    place = _existing(folder)
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=f"{layout.TEMPORARY_PREFIX}doctor-") as name:
            file = Path(name, "x")
            write_atomic(file, [b"1"], sync=True)
            write_atomic(file, [b"2"], sync=True)
            sync_folder(file.parent)
            folded = folds(file.parent)
            again = write_atomic(file, [b"3"], exclusive=True)
            if again or file.read_bytes() != b"2" or os.listdir(name) != ["x"]:
                return Check(
                    "bad", "folder", f"{place} does not keep what is renamed or linked; use another file system"
                )
    except (RuijiError, OSError) as error:
        return Check("bad", "folder", f"{place} cannot be written to as needed: {error}")
    if folded:
        return Check(
            "warn",
            "folder",
            f"{place} takes names for one that differ only in case or in Unicode's normal form; a list with two such "
            "ids is refused",
        )
    return Check("ok", "folder", f"{place}: written, renamed and linked atomically, synced")


def _space(folder: Path, model: Model) -> Check:
    try:
        status = StatusReader(folder, None).read()
        left = status.running + status.pending
    except UsageError:
        left = 0  # Nothing was enqueued yet.
    plan = open_plan(folder)
    row = 4 * model.spec.length
    flying = min(left, WINDOW_SEGMENTS * plan.shard_rows) if plan is not None else 0
    if plan is not None and plan.keep_features:
        flying = left
    need = left * row + flying * -(-(row + 128) // _BLOCK_BYTES) * _BLOCK_BYTES
    stat = os.statvfs(_existing(folder))
    free = stat.f_bavail * stat.f_frsize
    detail = f"{free / 1e9:.1f} GB free, about {need / 1e9:.1f} GB needed for {counted(left, 'object')}"
    if stat.f_files and stat.f_favail < flying:
        return Check("bad", "space", f"{detail}; {stat.f_favail} files can be made, {flying} are needed at once")
    return Check("ok" if free > need else "bad", "space", detail)


def _device(encoder: Encoder, asked: Device) -> Check:
    told = f"{encoder.device} (asked for: {asked})"
    if asked == Device.cpu:
        return Check("ok", "device", told)
    found = probe()
    cards = [
        f"{gpu}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, {gpu.free_mb} of {gpu.total_mb} MB free"
        for gpu in found.usable
    ]
    told = "; ".join([told, *cards, *found.refused])
    if encoder.device is Device.cpu and found.built:
        return Check("warn", "device", f"{told}; no GPU: {found.problem or 'see above'}")
    return Check("warn" if found.refused else "ok", "device", told)


def _resizing() -> Check:
    reason = why_not()
    if reason is None:
        return Check("ok", "resizing", "compiled, with Pillow's pixels")
    told = f"by Pillow, which takes three times as long for the same pixels: {reason}"
    return Check("ok" if reason == NO_INSTRUCTIONS else "warn", "resizing", told)


def _small_files() -> Check:
    reason = small_files.why_not()
    if reason is None:
        return Check("ok", "small files", "many in one call, compiled")
    return Check("warn", "small files", f"read and written one by one, which takes more CPU: {reason}")


def _versions(folder: Path) -> Check:
    ours = library_versions()
    told = ", ".join(f"{name} {version}" for name, version in sorted(ours.items()))
    plan = open_plan(folder)
    if plan is not None and other_versions(plan.versions):
        return Check(
            "bad", "libraries", f"{told}; the open plan wants {plan.versions}: this machine takes none of its tasks"
        )
    shards = published_shards(folder)
    if shards and other_versions(made := read_record(folder, shards[-1]).versions):
        return Check("warn", "libraries", f"{told}; the latest shard was made with {made}")
    return Check("ok", "libraries", told)


def _sample(folder: Path, media_dir: Path, encoder: Encoder) -> Check:
    gallery = read_gallery(folder)
    shards = [shard for shard in published_shards(folder) if read_record(folder, shard).rows] if gallery else []
    if gallery is None or not shards:
        return Check("ok", "features", "no shard yet to compare with")
    if gallery.fingerprint != encoder.model.fingerprint:
        raise GalleryMismatch(f"the gallery belongs to another model: {why_another(encoder.model, gallery.contract)}")
    compared: list[tuple[float, str]] = []
    skipped, changed = 0, list[str]()
    for shard, row in _spread(folder, shards):
        path, stored, digest = _row(folder, shard, row, encoder.model.spec.length)
        try:
            pixels = load_pixels(media_dir / path, encoder.model.spec, max_pixels=1 << 62)
        except ImageError:
            skipped += 1
            continue
        file = None if digest is None else file_digest(media_dir / path)
        if file is not None and file[1] != digest:
            changed.append(path)
        else:
            compared.append((_cosine(encoder.encode(pixels[np.newaxis])[0], stored), path))
    worst, where = min(compared, key=lambda one: one[0], default=(1.0, ""))
    least = LEAST_COSINE if encoder.device is Device.cpu else LEAST_COSINE_CUDA
    # Written so that NaN is not alike either.
    alike = all(cosine >= least for cosine, _ in compared)
    detail = f"{counted(len(compared), 'object')} embedded again, cosine at least {worst:.7f}"
    detail += f", {counted(skipped, 'image is', 'images are')} gone" if skipped else ""
    if changed:
        words = counted(len(changed), "picture is not the one that was", "pictures are not those that were")
        detail += f"; {words} embedded, first {changed[0]}: ruiji verify --pictures finds all"
    if not alike:
        detail += f" ({where}): another picture, or other libraries than the gallery's"
    if changed or not alike:
        return Check("wrong", "features", detail)
    return Check("ok" if compared else "warn", "features", detail)


def _row(folder: Path, shard: int, row: int, length: int) -> tuple[str, np.ndarray, bytes | None]:
    """Path, feature and digest of one row of a shard; no digest if none was kept."""
    record, digest = read_record(folder, shard), None
    features = _array(layout.features_file(folder, shard), (record.rows, length))
    if record.format > 1:
        digest = _array(layout.digests_file(folder, shard), (record.rows, DIGEST_BYTES))[row].tobytes()
    return list(read_lines(layout.paths_file(folder, shard)))[row], features[row], digest


def _array(file: Path, shape: tuple[int, int]) -> np.ndarray:
    """A shard's array, as its record says."""
    try:
        array = map_npy(file).array
    except (FileNotFoundError, NpyError) as error:
        raise ShardCorrupt(f"{file} is damaged: {error}") from None
    if array.shape != shape:
        raise ShardCorrupt(f"{file} has the shape {list(array.shape)}, not {list(shape)} as recorded")
    return array


def _spread(folder: Path, shards: list[int]) -> Iterator[tuple[int, int]]:
    """(shard, row) of rows spread evenly over the gallery."""
    chosen = [shards[n * len(shards) // SAMPLE_ROWS] for n in range(SAMPLE_ROWS)]
    for shard in dict.fromkeys(chosen):
        rows, count = read_record(folder, shard).rows, chosen.count(shard)
        for row in sorted({n * rows // count for n in range(count)}):
            yield shard, row


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    left, right = a.astype(np.float64), b.astype(np.float64)
    norms = float(np.linalg.norm(left) * np.linalg.norm(right))
    # Two zero features agree; one alone does not.
    return float(left @ right) / norms if norms else float(not left.any() and not right.any())
