"""Whose a gallery folder is: `gallery.json`, made once by the first enqueue, rebuilt from the plans if it is lost."""

import json
import logging
import os
import re
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.errors import FileDamaged, GalleryMismatch, MachineFault, RuijiError, UsageError
from pipeline.model import Model, load_model, pixels_of, require_declared, why_another
from pipeline.objects import IdScheme
from pipeline.plans.files import closed_plans, open_plan
from pipeline.plans.generations import current
from pipeline.plans.plan import Plan
from pipeline.queue.keys import place_key
from pipeline.reduce import nested_folders
from pipeline.spec import PIXELS, ModelSpec
from pipeline.store import (
    FORMAT,
    as_type,
    feature_shards,
    read_json,
    recorded_shards,
    sync_folder,
    to_json,
    write_atomic,
)

if TYPE_CHECKING:
    import redis

logger = logging.getLogger(__name__)

#: It becomes part of the names of queues and keys.
_GALLERY_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")
#: A gallery that nobody worked on for so long may turn up elsewhere without a word.
_PLACE_S = 14 * 24 * 3600


@dataclass(frozen=True)
class GalleryInfo:
    """What `gallery.json` says: the folder belongs to one model, and has a name of its own.

    Attributes:
        gallery_id: random; names the queues, so that two galleries never share tasks.
        fingerprint: of the model and its spec.
        length: d.
        model: file name stem of the model.
        object_id: what its ids are made from.
        contract: `Model.contract` of the model; None in a gallery that was begun before it was kept.
    """

    gallery_id: str
    fingerprint: str
    length: int
    model: str
    object_id: ObjectIds
    contract: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Contract:
    """What `GalleryInfo.contract` must be."""

    spec: ModelSpec
    batch: int | None
    external: list[str]
    toml: str | None


def read_gallery(folder: Path) -> GalleryInfo | None:
    """The folder's `gallery.json`, or None if there is none.

    Raises:
        FileDamaged: it is not as it must be. GalleryMismatch: a newer ruiji wrote it.
    """
    path = layout.gallery_file(folder)
    try:
        info = as_type(read_json(path), GalleryInfo, path)
        if info.contract is not None:
            as_type(info.contract, _Contract, path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except FileDamaged as error:
        raise FileDamaged(f"{error}; ruiji enqueue (or ruiji run) with its model writes it again") from None
    if not _GALLERY_ID.fullmatch(info.gallery_id) or info.length < 1:
        raise FileDamaged(f"{path} is damaged; ruiji enqueue (or ruiji run) with its model writes it again")
    return info


def require_gallery(folder: Path) -> GalleryInfo:
    """The folder's `gallery.json`.

    Raises:
        UsageError: nothing was ever enqueued into this folder. FileDamaged, GalleryMismatch: as `read_gallery`.
    """
    if (gallery := read_gallery(folder)) is None:
        raise no_gallery(folder)
    return gallery


def no_gallery(folder: Path) -> UsageError:
    """What to raise if a folder is no gallery."""
    return UsageError(
        f"no gallery in {folder.absolute()}: nothing was enqueued there. Run ruiji run (or ruiji enqueue and "
        "ruiji worker) first, or check --feature-dir and --model, whose file name is the folder's"
    )


def gallery_model(folder: Path, path: Path) -> Model:
    """The model of a gallery, or of the one that is to be made in the folder, with that gallery's pixels.

    Raises:
        GalleryMismatch: a newer ruiji wrote the gallery.
        ModelError: as `load_model`; the gallery would be a new one, and nobody declared the model.
    """
    try:
        found = read_gallery(folder)
    except FileDamaged:
        found = None
    if found is not None:
        kept = pixels_of(found.contract)
        return load_model(path, None if kept != PIXELS[-1] and _unused(folder) else kept)
    model = load_model(path)
    plan = _any_plan(folder) if folder.is_dir() else None
    if plan is None:
        # A gallery that exists has declared its model.
        require_declared(model)
    if plan is not None and plan.fingerprint != model.fingerprint:
        # What is lost with gallery.json, the plan's fingerprint tells.
        older = load_model(path, 1)
        return older if older.fingerprint == plan.fingerprint else model
    return model


def claim_gallery(folder: Path, model: Model, scheme: IdScheme) -> GalleryInfo:
    """Make the folder this model's gallery, or check that it is; rebuild a `gallery.json` that is lost or damaged.

    Raises:
        GalleryMismatch: another model's features, other ids, or an article's shards are in it.
        UsageError: the folder lies in a gallery.
        RuijiError: the folder cannot be written.
    """
    wanted = GalleryInfo(
        secrets.token_hex(8), model.fingerprint, model.spec.length, model.path.stem, scheme.kind, model.contract
    )
    if layout.gallery_file(folder.parent).exists():
        raise UsageError(
            f"{folder.parent} is a gallery itself: --feature-dir (RUIJI_FEATURE_DIR) is the folder that galleries lie "
            f"in, {folder.parent.parent}"
        )
    try:
        found = read_gallery(folder)
    except FileDamaged:
        found = None
    if found is not None and _differs(found, wanted) and _unused(folder):
        # Of a first enqueue that ended before it made a plan.
        found = _write(folder, wanted)
    plan = _any_plan(folder) if folder.is_dir() else None
    # Looked at after the claim: a plan that was committed meanwhile decides whose the folder is.
    if found is None or (plan is not None and plan.gallery_id != found.gallery_id):
        found = _made(folder, wanted, model, plan)
    if found.fingerprint != wanted.fingerprint:
        raise GalleryMismatch(
            f"{folder} belongs to the model with fingerprint {found.fingerprint[:12]}, {model.path} has "
            f"{wanted.fingerprint[:12]}: {why_another(model, found.contract)}. Choose another --feature-dir, "
            "or give the changed model a name of its own"
        )
    if found.object_id != wanted.object_id:
        raise GalleryMismatch(
            f"{folder} was made with --object-id {found.object_id}, not {wanted.object_id}; give the same one"
        )
    return found


def _differs(found: GalleryInfo, wanted: GalleryInfo) -> bool:
    return (found.fingerprint, found.object_id) != (wanted.fingerprint, wanted.object_id)


def keep_gallery(folder: Path, gallery: GalleryInfo) -> None:
    """Make a gallery whose plan was just committed this one, whatever was claimed before the commit."""
    try:
        if read_gallery(folder) == gallery:
            return
    except FileDamaged:
        pass
    _write(folder, gallery)


def _made(folder: Path, wanted: GalleryInfo, model: Model, plan: Plan | None) -> GalleryInfo:
    """Write the `gallery.json` of a folder that has none to read, or none of its plan's."""
    if plan is not None:
        if plan.fingerprint != wanted.fingerprint:
            raise GalleryMismatch(
                f"{layout.gallery_file(folder)} is lost or damaged, and its plans are of the model with fingerprint "
                f"{plan.fingerprint[:12]}, {model.path} has {wanted.fingerprint[:12]}: give the gallery's own model, "
                "which writes it again, or restore it from a copy"
            )
        rebuilt = GalleryInfo(
            plan.gallery_id, plan.fingerprint, plan.length, wanted.model, plan.object_id, wanted.contract
        )
        logger.warning("gallery.json was lost or damaged; written again", extra={"event": "gallery_rebuilt"})
        return _write(folder, rebuilt)
    if folder.is_dir() and recorded_shards(folder):
        raise GalleryMismatch(
            f"{layout.gallery_file(folder)} is lost or damaged, and no plan says what was in it; restore it from a copy"
        )
    if folder.is_dir() and feature_shards(folder):
        raise GalleryMismatch(
            f"{folder} holds shards that ruiji did not make: nothing says which model and preprocessing they "
            "came from, so nothing is added to them (ruiji search reads them). Choose another --feature-dir"
        )
    return _write(folder, wanted, exclusive=not layout.gallery_file(folder).exists())


def _write(folder: Path, info: GalleryInfo, exclusive: bool = False) -> GalleryInfo:
    """Write a `gallery.json`; returns what is there then, as it is read."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = [to_json({"format": FORMAT, **asdict(info)})]
        write_atomic(layout.gallery_file(folder), content, exclusive=exclusive, sync=True)
        sync_folder(folder)
    except (OSError, MachineFault) as error:
        raise RuijiError(f"cannot write the feature folder {folder}: {error}") from None
    found = read_gallery(folder)
    assert found is not None
    return found


def _any_plan(folder: Path) -> Plan | None:
    """The open plan, else one of the closed ones; all of a folder are of one gallery."""
    plan = open_plan(folder)
    return plan if plan is not None else next((closed.plan for closed in closed_plans(folder)), None)


def _unused(folder: Path) -> bool:
    """Whether nothing was made in a gallery yet: no plan, no shard, no feature."""
    return not (
        current(folder).number
        or current(folder).plan_id
        or layout.generations_folder(folder).exists()
        or any(closed_plans(folder))
        or recorded_shards(folder)
        or feature_shards(folder)
        or any(nested_folders(folder))
    )


@dataclass(frozen=True)
class _Place:
    """Where a gallery was last worked on.

    Attributes:
        inode: of its `gallery.json`: the same under every path and mount, and another one in a copy.
    """

    host: str
    folder: str
    inode: int


def check_place(folder: Path, gallery: GalleryInfo, client: "redis.Redis") -> None:
    """Refuse a copy of a gallery whose original is there too: on one Redis both would share their queues.

    A gallery that was moved, or is mounted elsewhere, is none: only an original that this host can see proves a copy.

    Raises:
        GalleryMismatch: the folder is a copy.
    """
    key = place_key(gallery.gallery_id)
    here = _Place(socket.gethostname(), str(folder.resolve()), layout.gallery_file(folder).stat().st_ino)
    try:
        noted = as_type(json.loads(client.get(key) or "null"), _Place, Path(key))
    except (ValueError, FileDamaged):
        noted = here
    if noted.inode != here.inode and _is_at(noted, gallery):
        raise GalleryMismatch(
            f"{folder} is a copy of the gallery {noted.folder}: on one Redis they would share their queues. Remove one "
            "of them, or give this one a Redis database of its own (RUIJI_REDIS_URL=redis://HOST:PORT/1)"
        )
    client.set(key, json.dumps(asdict(here)), ex=_PLACE_S)


def _is_at(place: _Place, gallery: GalleryInfo) -> bool:
    try:
        other = Path(place.folder)
        found = read_gallery(other)
        return (
            found is not None
            and found.gallery_id == gallery.gallery_id
            and os.stat(layout.gallery_file(other)).st_ino == place.inode
        )
    except (OSError, RuijiError):
        return False
