"""A gallery folder with a plan, and features in it, without any worker."""

import hashlib
from pathlib import Path

import numpy as np

from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.gallery import claim_gallery, gallery_model
from pipeline.objects import IdScheme, prepare
from pipeline.plans.plan import Plan, Segment
from pipeline.plans.planning import PlanSettings, Retry, plan_list
from pipeline.store import Embedded
from tests.factories import pictures

SCHEME = IdScheme(ObjectIds.basename)


def plan_for(
    tmp_path: Path,
    model_path: Path,
    paths: list[str],
    shard_rows: int = 4,
    keep_features: bool = False,
    retry: Retry | None = None,
    max_pixels: int = 10**8,
) -> Plan | None:
    """Make (or find) the open plan for a list, as enqueue does."""
    folder = layout.gallery_folder(tmp_path / "features", model_path)
    model = gallery_model(folder, model_path)
    gallery = claim_gallery(folder, model, SCHEME)
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    (scratch / "list").write_text("".join(f"{path}\n" for path in paths))
    objects = prepare(scratch / "list", scratch, SCHEME)
    settings = PlanSettings(shard_rows, keep_features, max_pixels, max_image_s=2, max_image_mb=256)
    return plan_list(folder, tmp_path / "media", gallery, objects, settings, retry)


def new_plan(tmp_path: Path, model_path: Path, count: int, shard_rows: int = 4, keep_features: bool = False) -> Plan:
    """Pictures, and a plan over all of them."""
    plan = plan_for(tmp_path, model_path, pictures(tmp_path / "media", count), shard_rows, keep_features)
    assert plan is not None
    return plan


def feature_of(path: str) -> np.ndarray:
    """float32[12] that only this path has."""
    return np.random.default_rng(list(path.encode())).normal(size=12).astype(np.float32)


def digest_of(path: str) -> bytes:
    """The digest of a file that only this path has."""
    return hashlib.sha256(path.encode()).digest()


def embed(plan: Plan, paths: list[str]) -> None:
    """Write the features of some objects."""
    for path in paths:
        write(plan, path, feature_of(path))


def write(plan: Plan, path: str, feature: np.ndarray) -> None:
    """Write one object's feature."""
    plan.write_features(segment_of(plan, path), {plan.scheme.object_id(path): Embedded(feature, digest_of(path))})


def segment_of(plan: Plan, path: str) -> Segment:
    """The segment that an object is in."""
    (segment,) = (segment for segment in plan.segments if path in plan.paths(segment))
    return segment


def is_done(plan: Plan, path: str) -> bool:
    """Whether an object of a plan is settled."""
    return plan.is_done(segment_of(plan, path), path)


def fail(plan: Plan, path: str, reason: str = "undecodable") -> None:
    """Record one object as failed."""
    plan.keep_error(plan.scheme.object_id(path), reason, "in our words")


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder's top level that belongs to a shard, with its bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name[:4].isdigit()}
