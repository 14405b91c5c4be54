"""A gallery folder on which actors can be stopped before any step that others see, or killed there.

A step is a link, rename or unlink of a file with a final name, or the listing of a folder. The functions are the real
ones, on a real folder; only `sort` is done in this process, and decoding and encoding are arithmetic.
"""

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline import layout
from pipeline import objects as objects_module
from pipeline.choices import ObjectIds
from pipeline.errors import ImageError, MachineFault, PlanMismatch, RuijiError
from pipeline.gallery import GalleryInfo
from pipeline.objects import IdScheme, ObjectList, prepare
from pipeline.plans import planning
from pipeline.plans.closing import cancel_plan
from pipeline.plans.files import closed_plans, open_plan
from pipeline.plans.generations import current
from pipeline.plans.plan import Plan, Segment
from pipeline.plans.planning import PlanSettings, Retry, check_matches, plan_list
from pipeline.plans.published import published_shards
from pipeline.segments import finish_plan, reduce_segment
from pipeline.status import StatusReader
from pipeline.store import FORMAT, check_shard, read_record, to_json, write_atomic
from pipeline.verify import Finding, repair, verify
from workers.decode.images import Decoded
from workers.embed import Job, embed_batch

LENGTH = 2
#: What is too large under the small limit, and what never decodes.
BIG, BAD = "big.png", "bad.png"
SMALL, LARGE = 10, 1000
GALLERY = GalleryInfo("0123456789abcdef", "fingerprint", LENGTH, "model", ObjectIds.basename)


class Killed(BaseException):
    """The actor is dead: nothing of it runs any more, no clean-up either."""


@dataclass
class Stepper:
    """Runs one action in a thread, and something else in its middle.

    Attributes:
        at: the number of the step, or how the name ends that the step is about.
        kill: whether the action ends there.
    """

    at: int | str
    kill: bool
    steps: int = 0
    reached: bool = False
    dead: bool = False
    _there: threading.Event = field(default_factory=threading.Event)
    _go: threading.Event = field(default_factory=threading.Event)

    def step(self, name: str) -> None:
        """Called by the actor before each step."""
        if self.dead:
            raise Killed
        here = name.endswith(self.at) if isinstance(self.at, str) else self.steps == self.at
        if here and not self.reached:
            self.reached = True
            self._there.set()
            assert self._go.wait(180)
            self.steps += 1
            if self.kill:
                self.dead = True
                raise Killed
            return
        self.steps += 1

    def run(self, action: Callable[[], object], meanwhile: Callable[[], object]) -> bool:
        """Run an action, and `meanwhile` once it is at its step; False if it has fewer steps."""
        errors: list[BaseException] = []

        def body() -> None:
            _actor.stepper = self
            try:
                action()
            except Killed:
                pass
            except BaseException as error:
                errors.append(error)
            finally:
                _actor.stepper = None
                self._there.set()

        thread = threading.Thread(target=body)
        thread.start()
        assert self._there.wait(180)
        if self.reached:
            meanwhile()
            self._go.set()
        thread.join(60)
        assert not thread.is_alive()
        if errors:
            raise errors[0]
        return self.reached


_actor = threading.local()


def _stepped(real: Callable[..., Any], place: int) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        stepper = getattr(_actor, "stepper", None)
        if stepper is not None:
            name = os.fspath(arguments[place]) if len(arguments) > place else "."
            if stepper.dead:
                raise Killed
            # What has no final name is nobody else's; a deleted file descriptor's folder is scratch.
            if isinstance(name, str) and "/.tmp-" not in name and options.get("dir_fd") is None:
                stepper.step(name)
        return real(*arguments, **options)

    return call


@contextlib.contextmanager
def stepped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the calls that others see steps."""
    with monkeypatch.context() as patch:
        for name, place in (("link", 1), ("replace", 1), ("rename", 1), ("unlink", 0), ("rmdir", 0), ("listdir", 0)):
            patch.setattr(os, name, _stepped(getattr(os, name), place))
        patch.setattr(planning, "sort_lines", _sort_lines)
        patch.setattr(objects_module, "sort_lines", _sort_lines)
        patch.setattr("pipeline.verify.sort_lines", _sort_lines)
        # What the compiled library does in one call is a step for each file too.
        patch.setattr("pipeline.small_files._library", lambda: "each call is a step")
        # Nothing is killed by a power cut here.
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def _sort_lines(source: Path, target: Path, *, unique: bool = False, by_first_field: bool = False) -> None:
    lines = source.read_bytes().splitlines(keepends=True)
    lines.sort(key=(lambda line: (line.split(b"\t")[0], line)) if by_first_field else None)
    target.write_bytes(b"".join(dict.fromkeys(lines) if unique else lines))


def feature_of(path: str, versions: dict[str, str]) -> np.ndarray:
    """float32[2] that only this path has under these versions."""
    digest = hashlib.sha256(f"{path} {sorted(versions.items())}".encode()).digest()
    return np.frombuffer(digest[:2], dtype=np.uint8).astype(np.float32)


def digest_of(path: str) -> bytes:
    """The sha256 of its file, which has its name in it."""
    return hashlib.sha256(path.encode()).digest()


@dataclass
class World:
    """One gallery folder, its media folder, and what actors do with them."""

    root: Path
    versions: dict[str, str] = field(default_factory=lambda: {"numpy": "1"})
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.media.is_dir():
            return
        self.media.mkdir(parents=True)
        for name in ("a.png", "b.png", "c.png", "d.png", BIG, BAD):
            (self.media / name).write_bytes(name.encode())
        write_atomic(self.folder / "gallery.json", [to_json({"format": FORMAT, **vars(GALLERY)})])

    @property
    def media(self) -> Path:
        return self.root / "media"

    @property
    def folder(self) -> Path:
        return self.root / "features" / "model"

    def objects(self, names: list[str]) -> ObjectList:
        """A checked list, as `prepare` makes it."""
        scratch = self.root / f".tmp-{threading.get_ident()}"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        (scratch / "list").write_text("".join(f"{name}\n" for name in names))
        return prepare(scratch / "list", scratch, IdScheme(ObjectIds.basename))

    def enqueue(self, names: list[str], max_pixels: int = LARGE, retry: Retry | None = None) -> Plan | None:
        """As `ruiji enqueue`, up to publishing; what is refused changes nothing."""
        listed = self.objects(names)
        settings = PlanSettings(2, False, max_pixels, 60, 256)
        plan = open_plan(self.folder)
        if plan is None:
            plan = plan_list(self.folder, self.media, GALLERY, listed, settings, retry)
        if plan is not None:
            with contextlib.suppress(PlanMismatch):
                check_matches(plan, listed, GALLERY, 2)
        return plan

    def cancel(self) -> None:
        plan = open_plan(self.folder)
        if plan is not None:
            cancel_plan(plan)

    def embed(self, plan: Plan, segment: Segment) -> None:
        """One batch, by a worker that has read its plan."""

        def encode(pixels: Any) -> Any:
            return np.ascontiguousarray(pixels[:, 0, 0, :]).view(np.float32)

        # A picture's pixels are the bytes of its feature.
        encoder: Any = SimpleNamespace(run_images=8, turn=threading.Lock(), encode=encode)
        encoder.model = SimpleNamespace(spec=SimpleNamespace(pixels=2, height=1, width=1, channels=4 * LENGTH))

        def decode(file: Any, spec: Any, max_pixels: int, altered: list[str], room: Any) -> Any:
            name = file.read().decode()
            if name == BAD:
                raise ImageError("broken", "undecodable")
            if name == BIG and max_pixels < LARGE:
                raise ImageError("too large", "too-large")
            return Decoded(feature_of(name, plan.versions).view(np.uint8).reshape(room.shape), digest_of(name))

        jobs = [Job(segment, path) for path in plan.paths(segment)]
        # A late duplicate can lose the file that it writes; it is given back, and dropped at its next try.
        with contextlib.suppress(MachineFault):
            embed_batch(plan, jobs, encoder, self.media, decode_file=decode)

    def reduce(self, plan: Plan, segment: Segment) -> None:
        """A reducer that holds no lease: the worst there can be."""
        with contextlib.suppress(MachineFault):
            reduce_segment(plan, segment, lambda: None)

    def finish(self, plan: Plan) -> None:
        """The watchdog, at a plan of which all is published."""
        if plan.all_published():
            finish_plan(plan, lambda segment: contextlib.nullcontext())

    def work(self) -> None:
        """All that is left of the open plan."""
        for _ in range(5):
            plan = open_plan(self.folder)
            if plan is None:
                return
            for segment in plan.unpublished():
                self.embed(plan, segment)
                self.reduce(plan, segment)
            self.finish(plan)
        raise AssertionError("the plan does not end")

    def flip(self, shard: int) -> None:
        """Damage a shard's features."""
        path = layout.features_file(self.folder, shard)
        if path.exists():
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)

    def lose_record(self, shard: int) -> None:
        """Leave a shard's arrays without their record."""
        layout.record_file(self.folder, shard).unlink()

    def lose(self, shard: int) -> None:
        for path in self.folder.glob(f"{shard:04d}.*"):
            path.unlink()

    def verify(self) -> list[Finding]:
        return verify(self.folder)

    def repair(self) -> None:
        with contextlib.suppress(RuijiError):
            repair(self.folder, verify(self.folder))

    def check(self, names: list[str], tidy: bool) -> None:
        """Bring everything to its end with this list, and look whether every object counts once, rightly.

        Args:
            tidy: whether no per-image file may be left of an object that is in a shard.
        """
        for number in range(5):
            self.work()
            if number == 0:
                findings = self.verify()
                assert not tidy or not [found for found in findings if "in a shard" in found.message], findings
            self.repair()
            self.work()
            self._check_figures(names)
            if self.enqueue(names) is None:
                break
        else:
            raise AssertionError("there is always something left to do")
        plans = {closed.plan.plan_id: closed.plan for closed in closed_plans(self.folder)}
        rows: list[str] = []
        for shard in published_shards(self.folder):
            record = read_record(self.folder, shard)
            check_shard(self.folder, record)
            paths = layout.paths_file(self.folder, shard).read_text().split()
            features = np.load(layout.features_file(self.folder, shard), allow_pickle=False)
            assert record.format == plans[record.plan].record_format, "made again in another format"
            assert layout.digests_file(self.folder, shard).exists() == (record.format > 1)
            if record.format > 1:
                digests = np.load(layout.digests_file(self.folder, shard), allow_pickle=False)
                assert digests.tolist() == [list(digest_of(path)) for path in paths], "another file's digest"
            for path, feature in zip(paths, features, strict=True):
                assert feature.tolist() == feature_of(path, record.versions).tolist(), f"{path} by other libraries"
            for failure in record.failed:
                small = plans[record.plan].limits.max_pixels < LARGE
                assert failure.path == BAD or (failure.path == BIG and small), f"{failure} under other limits"
            rows += paths
        assert len(rows) == len(set(rows)), f"objects with two rows: {sorted(rows)}"
        assert set(names) - {BIG, BAD} <= set(rows), "an object has no row"
        assert StatusReader(self.folder, None).read().pending == 0
        self._check_figures(names)
        repair(self.folder, [finding for finding in self.verify() if finding.kind == "leftover"])
        assert [finding for finding in self.verify() if finding.kind != "foreign"] == []
        left = [path for path in self.folder.glob("??/**/*") if path.is_file()]
        assert left == [], left

    def _check_figures(self, names: list[str]) -> None:
        """The accounting, if this is the accepted list and all of its plan is done."""
        now = current(self.folder)
        if now.objects is None or now.objects.digest != self.objects(names).digest:
            return
        rows = [
            path
            for shard in published_shards(self.folder)
            for path in layout.paths_file(self.folder, shard).read_text().split()
        ]
        status = StatusReader(self.folder, None).read()
        assert (status.objects, status.running, status.plan) == (len(names), 0, None)
        assert status.done == len(set(names) & set(rows)), status
        assert status.stale == len(set(rows) - set(names)), status
