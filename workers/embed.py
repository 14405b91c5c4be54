"""One batch of objects, from paths to feature or error files, as a plain function without Celery."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline import layout
from pipeline.altered import begin_marks, mark
from pipeline.choices import Reason
from pipeline.errors import ImageError, RuijiError, RunFailed
from pipeline.objects import is_bad_name
from pipeline.plans.plan import Plan, Segment
from pipeline.small_files import read_whole
from pipeline.spec import ModelSpec
from pipeline.store import Embedded
from workers.decode.ahead import Decoders, pixels_for
from workers.decode.files import Opened, open_image
from workers.decode.images import Decoded, decode_whole
from workers.decode.media import check_media
from workers.ledger import Ledger
from workers.suspects.alone import ChildDied, decode_alone
from workers.suspects.deaths import MOST_DEATHS, Suspect, clear, note_deaths, read_suspect, suspect_names
from workers.suspects.in_hand import InHand

if TYPE_CHECKING:
    from workers.encoder import Encoder

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

#: What became of one object: a feature was written, a failure was recorded, it was done before, or
#: nothing is wanted of it (its shard is published already).
DONE, FAILED, SKIPPED, LATE = "done", "failed", "skipped", "late"
#: Characters of what a decoder says that go into the log.
_WORDS = 200


class Job(NamedTuple):
    """One object to embed."""

    segment: Segment
    path: str


#: From an open image file to pixels and digest, as `workers.decode.images.decode_whole`.
Decode = Callable[[Opened, ModelSpec, int, list[str], NDArray[np.uint8]], Decoded]


def embed_guarded(
    plan: Plan,
    jobs: Sequence[Job],
    encoder: "Encoder",
    media_dir: Path,
    hand: InHand,
    ledger: Ledger | None = None,
    decoders: Decoders | None = None,
) -> list[str]:
    """As `embed_batch`; suspects run alone, and what runs is told, in case this process dies of it."""
    names = suspect_names(plan)
    suspects = {n for n, job in enumerate(jobs) if layout.suspect_name(job.path) in names} if names else set()
    outcomes = [SKIPPED] * len(jobs)
    ordinary = [n for n in range(len(jobs)) if n not in suspects]
    if ordinary:
        batch = [jobs[n] for n in ordinary]
        image_s = max(plan.limits_of(job.segment).max_image_s for job in batch)
        with hand.hold(plan.plan_id, [job.path for job in batch], image_s):
            done = _embed_ordinary(plan, batch, encoder, media_dir, ledger, decoders)
        for n, outcome in zip(ordinary, done, strict=True):
            outcomes[n] = outcome
    for n in sorted(suspects):
        outcomes[n] = _embed_suspect(plan, jobs[n], encoder, media_dir, hand)
    return outcomes


def _embed_ordinary(
    plan: Plan,
    batch: Sequence[Job],
    encoder: "Encoder",
    media_dir: Path,
    ledger: Ledger | None,
    decoders: Decoders | None,
) -> list[str]:
    try:
        return embed_batch(plan, batch, encoder, media_dir, ledger, decoders)
    except (RuijiError, OSError, MemoryError):
        raise
    except Exception:
        # A bug that one image brings out: the others are done now, so that it alone comes back.
        for job in batch if len(batch) > 1 else ():
            with contextlib.suppress(Exception):
                embed_batch(plan, [job], encoder, media_dir, ledger)
        raise


def _embed_suspect(plan: Plan, job: Job, encoder: "Encoder", media_dir: Path, hand: InHand) -> str:
    """Decode in a disposable child, encode with nothing else in hand; the last death makes it a failed object."""
    encoding = _Alone(encoder, partial(hand.hold, plan.plan_id, [job.path], plan.limits_of(job.segment).max_image_s))
    while True:
        suspect = read_suspect(plan, job.path)
        decode_it = partial(_decode_suspect, plan, job, suspect, media_dir / job.path)
        try:
            (outcome,) = embed_batch(plan, [job], encoding, media_dir, decode_file=decode_it)
        except ChildDied as death:
            extra = {"event": "suspect_died", "path": job.path, "reason": death.reason, "deaths": suspect.deaths + 1}
            logger.warning("an image ended the process that decoded it alone", extra=extra)
            note_deaths(plan, [job.path], death.reason, alone=True)
        else:
            clear(plan, job.path)
            return outcome


class _Alone:
    """An encoder that tells which image alone it has in hand: meanwhile a death of this process is that image's."""

    def __init__(self, encoder: "Encoder", hold: Callable[..., contextlib.AbstractContextManager[None]]) -> None:
        self.model, self.run_images = encoder.model, encoder.run_images
        self.turn, self.prove = encoder.turn, encoder.prove
        self._encoder, self._hold = encoder, hold

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with self._hold(alone=True):
            return self._encoder.encode(pixels)


def _decode_suspect(
    plan: Plan,
    job: Job,
    suspect: Suspect,
    path: Path,
    file: Opened,
    spec: ModelSpec,
    max_pixels: int,
    altered: list[str],
    room: NDArray[np.uint8],
) -> Decoded:
    """Decode from the path, not from the file that this process has open."""
    limits = plan.limits_of(job.segment)
    if suspect.deaths >= MOST_DEATHS:
        raise suspect.failure(limits)
    return decode_alone(path, spec, limits, altered)


def embed_batch(
    plan: Plan,
    jobs: Sequence[Job],
    encoder: "Encoder | _Alone",
    media_dir: Path,
    ledger: Ledger | None = None,
    decoders: Decoders | None = None,
    decode_file: Decode = decode_whole,
) -> list[str]:
    """Embed a batch; afterwards every object has a feature file, an error file or a published shard.

    Args:
        jobs: of one plan.
        encoder: of the plan's model.
        ledger: told where the time goes.
        decoders: threads that decode the whole batch ahead of the encoder; None: one image after the other, here.

    Returns:
        One of DONE, FAILED, SKIPPED, LATE for each job, in order.

    Raises:
        MachineFault: media folder gone, disk full, device failed. Some objects of the batch may be
            done; running it again does the rest.
        ModelError: the model does not give what it declares; running it again is of no use.
    """
    ledger = ledger or Ledger()
    published = _published(plan, jobs)
    settled = plan.are_done(jobs)
    outcomes = [
        LATE if job.segment.shard in published else SKIPPED if is_settled else DONE
        for job, is_settled in zip(jobs, settled, strict=True)
    ]
    waiting = [(number, job) for number, job in enumerate(jobs) if outcomes[number] == DONE]
    if encoder.model.spec.pixels == 1 and waiting:
        begin_marks(plan)
    images = _Images(plan, media_dir, encoder.model.spec, ledger, decode_file)
    # Where they are decoded one after the other, only as many as the encoder runs at once: so a feature is on disk as
    # soon as it can be.
    step = encoder.run_images if decoders is None else max(1, len(waiting))
    for start in range(0, len(waiting), step):
        part = waiting[start : start + step]
        for number, outcome in _embed_part(images, part, encoder, decoders):
            outcomes[number] = outcome
    if waiting and not plan.keep_features:
        published = _published(plan, jobs)
        # A task that came twice and late: its shard was published between the two looks.
        late = [(number, job) for number, job in waiting if job.segment.shard in published]
        plan.forget(job.path for _, job in late)
        for number, _ in late:
            outcomes[number] = LATE
    return outcomes


class _Images:
    """The images of a batch, from paths to pixels."""

    def __init__(self, plan: Plan, media_dir: Path, spec: ModelSpec, ledger: Ledger, decode_file: Decode) -> None:
        self.plan, self.spec, self.ledger = plan, spec, ledger
        self._media_dir, self._media_root, self._decode_file = media_dir, os.path.realpath(media_dir), decode_file

    def read_some(self, jobs: list[Job]) -> list[memoryview | None]:
        """The contents of some, as `read_whole`; None of each that `decode` is to read at its turn."""
        with self.ledger.busy("read"):
            # Nothing is opened for a bad name.
            paths = [f"{self._media_dir}/{job.path}" for job in jobs if not is_bad_name(job.path)]
            read = iter(read_whole(paths, self._media_root))
            return [None if is_bad_name(job.path) else next(read) for job in jobs]

    def decode(self, job: Job, room: NDArray[np.uint8], contents: memoryview | None) -> bytes | ImageError:
        """Put the pixels of one into `room`, uint8[h, w, c]; returns its file's digest, or why it has none."""
        file = self._read(job) if contents is None else contents
        if isinstance(file, ImageError):
            return file
        altered: list[str] = []
        with file, self.ledger.busy("decode"):
            max_pixels = self.plan.limits_of(job.segment).max_pixels
            decoded = self._surely(partial(self._decode_file, file, self.spec, max_pixels, altered, room))
            if isinstance(decoded, ImageError):
                return decoded
            if decoded.pixels is not room:
                room[...] = decoded.pixels
        if altered:
            # Before its feature is there: what is done is not looked at again.
            mark(self.plan, job.path, altered)
        return decoded.digest

    def _read(self, job: Job) -> BinaryIO | ImageError:
        """Open the image of one object; returns it, read unless it is very large, or why there is none."""
        if (problem := self.plan.scheme.bad_name(job.path)) is not None:
            return ImageError(problem, Reason.bad_name)
        with self.ledger.busy("read"):
            return self._surely(partial(open_image, f"{self._media_dir}/{job.path}", self._media_root))

    def _surely(self, look: Callable[[], _T]) -> _T | ImageError:
        """What a look at an image gives; an image counts as missing only while the media folder is there."""
        try:
            try:
                return look()
            except ImageError as error:
                if error.reason not in (Reason.missing, Reason.unreadable, Reason.outside_media):
                    return error
                check_media(self.plan, self._media_dir)
            # The folder is there now, but may have come back since: only a second look tells.
            return look()
        except ImageError as error:
            return error


def _embed_part(
    images: _Images, part: list[tuple[int, Job]], encoder: "Encoder | _Alone", decoders: Decoders | None
) -> Iterator[tuple[int, str]]:
    """Decode and encode some jobs' images and write what becomes of them; yields the jobs' numbers and outcomes."""
    count = len(part)
    room = contextlib.nullcontext(pixels_for(images.spec, count)) if decoders is None else decoders.batch(count)
    with room as pixels:

        def read_some(places: list[int]) -> list[memoryview | None]:
            return images.read_some([part[place][1] for place in places])

        def decode(place: int, contents: memoryview | None) -> bytes | ImageError:
            return images.decode(part[place][1], pixels[place], contents)

        if decoders is None:
            loaded = [decode(place, None) for place in range(count)]
        else:
            loaded = decoders.run(read_some, decode, count)
        yield from _embed(images.plan, part, loaded, pixels, encoder, images.ledger)


def _embed(
    plan: Plan,
    part: list[tuple[int, Job]],
    loaded: list[bytes | ImageError],
    pixels: NDArray[np.uint8],
    encoder: "Encoder | _Alone",
    ledger: Ledger,
) -> Iterator[tuple[int, str]]:
    """Encode what was loaded and write what becomes of it, as `_embed_part`.

    Args:
        loaded: of each the digest of its file, or why it has no pixels.
        pixels: uint8[len(part), h, w, c]; anything where there are none.
    """
    ready: list[tuple[int, Job, bytes]] = []
    for (number, job), digest in zip(part, loaded, strict=True):
        if isinstance(digest, ImageError):
            yield number, _fail(plan, job, digest)
        else:
            ready.append((number, job, digest))
    if not ready:
        return
    if len(ready) < len(part):
        pixels = pixels[[not isinstance(digest, ImageError) for digest in loaded]]
    features = _encode(encoder, pixels, ledger)
    finite: list[bool]
    if isinstance(features, np.ndarray):
        # All at once, which takes numpy as long as a few of them.
        finite = list(map(bool, np.all(np.isfinite(features), axis=1)))
    else:
        finite = [not isinstance(feature, ImageError) and bool(np.isfinite(feature).all()) for feature in features]
    with ledger.busy("write"):
        made: dict[int, list[tuple[int, Job, Embedded]]] = {}
        for (number, job, digest), feature, good in zip(ready, features, finite, strict=True):
            if isinstance(feature, ImageError):
                yield number, _fail(plan, job, feature)
            elif good:
                made.setdefault(job.segment.index, []).append((number, job, Embedded(feature, digest)))
            else:
                error = ImageError("the model gives values that are not finite", Reason.not_finite)
                yield number, _fail(plan, job, error)
        for some in made.values():
            segment = some[0][1].segment
            plan.write_features(segment, {plan.scheme.object_id(job.path): embedded for _, job, embedded in some})
            yield from ((number, DONE) for number, _, _ in some)


def _encode(
    encoder: "Encoder | _Alone", batch: NDArray[np.uint8], ledger: Ledger
) -> NDArray[np.float32] | list[NDArray[np.float32] | ImageError]:
    """Features of uint8[b, h, w, c]; if the model runs on other pixels and not on these, why an image has none."""
    try:
        with encoder.turn, ledger.encoding():
            return encoder.encode(batch)
    except RunFailed as error:
        if len(batch) > 1:
            return [_encode(encoder, pixels[np.newaxis], ledger)[0] for pixels in batch]
        # Where a grey picture fails too, it is the model's fault.
        encoder.prove()
        failure = ImageError("the model does not run on its pixels", Reason.model_failed)
        failure.__cause__ = error
        return [failure]


def _published(plan: Plan, jobs: Iterable[Job]) -> set[int]:
    """Those of the jobs' shards of which nothing more is wanted."""
    segments = {job.segment.index: job.segment for job in jobs}
    return {segment.shard for segment in segments.values() if plan.published(segment)}


def _fail(plan: Plan, job: Job, error: ImageError) -> str:
    plan.keep_error(plan.scheme.object_id(job.path), error.reason, str(error))
    extra = {"event": "object_failed", "path": job.path, "reason": error.reason, "attempts": error.attempts}
    if error.__cause__ is not None:
        # The decoder's own words: for the log only, they differ between releases and machines.
        extra["decoder"] = f"{type(error.__cause__).__name__}: {error.__cause__}"[:_WORDS]
    logger.warning("%s", error, extra=extra)
    return FAILED
