"""Where everything lies on disk: every folder name, file name and ending of the format, spelled once.

For example, `layout.paths_file(folder, 7)` is `G/0007.paths.txt`, where G is the gallery folder. `docs/format.md` says
what each file holds and when it is written. This module only spells names: it reads and writes nothing.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Final

#: Starts the name of every file or folder that is not finished. A name without it is that of a whole file.
TEMPORARY_PREFIX: Final = ".tmp-"


def temporary_prefix(shard: int) -> str:
    """Starts the names of a shard's unfinished files, and of no others."""
    return f"{TEMPORARY_PREFIX}{shard:04d}."


# The media folder and the model.

#: The object list that lies in a media folder, and the one that a run makes for itself.
OBJECT_LIST: Final = "objects.txt"
MODEL_ENDING: Final = ".onnx"


def object_list_file(media_dir: Path) -> Path:
    """The object list of a media folder, unless another one is given."""
    return media_dir / OBJECT_LIST


def toml_file(model: Path) -> Path:
    """What a model's owner declares about it, beside the model."""
    return model.with_suffix(".toml")


#: Where a model of the library comes from, beside it.
MODEL_SOURCE: Final = "source.json"


def added_model_file(models: Path, name: str) -> Path:
    """The ONNX file of a model that was added to the library under a name."""
    return models / name / (name + MODEL_ENDING)


# The gallery folder G. What is beside `gallery.json`, `run` and `cache` has names of shards, or of two characters.

GALLERY_FILE: Final = "gallery.json"
RUN_FOLDER: Final = "run"
CACHE_FOLDER: Final = "cache"


def gallery_folder(feature_dir: Path, model: Path) -> Path:
    """The gallery folder of a model, named as the model's file without its ending, as in the article.

    Args:
        model: the file, which need not exist, or the name alone, which can have a dot.
    """
    return feature_dir / (model.stem if model.suffix.lower() == MODEL_ENDING else model.name)


def gallery_file(folder: Path) -> Path:
    """The file that makes a folder a gallery of ruiji's."""
    return folder / GALLERY_FILE


# Features and failures of single images, below G/<a>/<b>/; `IdScheme.nested` of `pipeline.objects` makes their names.

FEATURE_ENDING: Final = ".npy"
ERROR_ENDING: Final = ".error.json"
NESTED_ENDINGS: Final = (FEATURE_ENDING, ERROR_ENDING)


def may_be_nested(name: str) -> bool:
    """Whether a folder of G, or of one of these folders, can hold files of single images."""
    return len(name) <= 2


# Shards.

#: The data files of a shard; records of format 1 have no digests. The ids are not `NNNN.npy`, but a tool that globs
#: `*.npy` still meets them.
FEATURES, DIGESTS, OBJECT_IDS, PATHS = SHARD_ENDINGS = (
    "features.npy",
    "digests.npy",
    "object_ids.npy",
    "paths.txt",
)
RECORD: Final = "json"

# Each number has one name: `00007.json` and Arabic digits are none of ours.
_SHARD: Final = "([0-9]{4}|[1-9][0-9]{4,})"
_BROKEN = re.compile(_SHARD)
_SHARD_RECORD = re.compile(rf"{_SHARD}\.{RECORD}")
_SHARD_FEATURES = re.compile(rf"{_SHARD}\.{re.escape(FEATURES)}")
_SHARD_FILE = re.compile(rf"{_SHARD}\.(?:{'|'.join(map(re.escape, (RECORD, *SHARD_ENDINGS)))})")


def shard_name(shard: int) -> str:
    """A shard's number as in its file names, e.g. `0007`; numbers above 9999 have more digits."""
    return f"{shard:04d}"


def shard_file(folder: Path, shard: int, ending: str) -> Path:
    """One file of a shard, e.g. `0007.features.npy`.

    Args:
        ending: `RECORD` or one of `SHARD_ENDINGS`.
    """
    return folder / f"{shard_name(shard)}.{ending}"


def features_file(folder: Path, shard: int) -> Path:
    """A shard's features, e.g. `0007.features.npy`."""
    return shard_file(folder, shard, FEATURES)


def digests_file(folder: Path, shard: int) -> Path:
    """The sha256 of each row's image file, e.g. `0007.digests.npy`."""
    return shard_file(folder, shard, DIGESTS)


def object_ids_file(folder: Path, shard: int) -> Path:
    """A shard's object ids, e.g. `0007.object_ids.npy`."""
    return shard_file(folder, shard, OBJECT_IDS)


def paths_file(folder: Path, shard: int) -> Path:
    """A shard's paths, e.g. `0007.paths.txt`."""
    return shard_file(folder, shard, PATHS)


def record_file(folder: Path, shard: int) -> Path:
    """A shard's record, e.g. `0007.json`: the shard exists once this exists."""
    return shard_file(folder, shard, RECORD)


def recorded_shard(name: str) -> int | None:
    """The shard whose record has this file name."""
    return _number(_SHARD_RECORD, name)


def featured_shard(name: str) -> int | None:
    """The shard whose features have this file name."""
    return _number(_SHARD_FEATURES, name)


def shard_of(name: str) -> int | None:
    """The shard that a file of this name belongs to, of whichever kind."""
    return _number(_SHARD_FILE, name)


def _number(pattern: re.Pattern[str], name: str) -> int | None:
    match = pattern.fullmatch(name)
    return int(match[1]) if match else None


# What searches keep, in G/cache.

#: Kinds of arrays: norms of the rows, rows in 8 bits, what scales these, facts about the rows' files,
#: and perceptual hashes of their pictures.
NORMS, CODES, SCALES, FACTS, HASHES = CACHE_KINDS = ("norms", "codes", "scales", "facts", "hashes")

_CACHE_FILE = re.compile(rf"{_SHARD}\.[0-9a-f-]+\.(?:{'|'.join(CACHE_KINDS)})\.npy")


def cache_folder(folder: Path) -> Path:
    """What a search keeps for the next one."""
    return folder / CACHE_FOLDER


def cache_file(cache: Path, shard: str, key: str, kind: str) -> Path:
    """One array that was made of a shard, e.g. `0007.0123456789abcdef.norms.npy`.

    Args:
        cache: the cache folder.
        shard: its name.
        key: changes whenever the shard's rows do.
        kind: one of `CACHE_KINDS`.
    """
    return cache / f"{cache_prefix(shard, key)}{kind}.npy"


def cache_prefix(shard: str, key: str) -> str:
    """How the names of all arrays start that were made of the same rows."""
    return f"{shard}.{key}."


def cached_shard(name: str) -> str:
    """The name of the shard that a file of the cache folder belongs to."""
    return name.partition(".")[0]


_PAIRS_FILE = re.compile(rf"pairs\.{_SHARD}\.([0-9a-f]{{16}})\.([0-9][0-9e.-]*)\.{_SHARD}\.npy")


def pairs_file(cache: Path, panel: int, key: str, threshold: float, part: int) -> Path:
    """Pairs of a panel's rows, e.g. `pairs.0007.0123456789abcdef.0.95.0000.npy`.

    Args:
        cache: the cache folder.
        panel: its number.
        key: changes whenever the rows do that it compares.
        threshold: the least similarity of its pairs.
        part: its number; the pairs of most panels are one file.
    """
    return cache / f"pairs.{panel:04d}.{key}.{threshold!r}.{part:04d}.npy"


def panel_of(name: str) -> tuple[int, str, float, int] | None:
    """Panel, key, threshold and part of a file of pairs; None for any other name."""
    match = _PAIRS_FILE.fullmatch(name)
    try:
        return (int(match[1]), match[2], float(match[3]), int(match[4])) if match else None
    except ValueError:
        return None


#: Pairs with objects of other galleries, in the cache.
_AGAINST_FOLDER: Final = "against"


def against_folder(cache: Path, gallery_id: str) -> Path:
    """The pairs with objects of another gallery.

    Args:
        cache: the cache folder.
        gallery_id: of the other one.
    """
    return cache / _AGAINST_FOLDER / gallery_id


def against_folders(cache: Path) -> list[Path]:
    """Those that there are."""
    return sorted((cache / _AGAINST_FOLDER).glob("*/"))


_MAP_FILE = re.compile(r"map\.[0-9a-f]{16}\.([a-z]+)\.npy")


def map_file(cache: Path, key: str, projection: str) -> Path:
    """Where all rows are on a plane, e.g. `map.0123456789abcdef.pca.npy`.

    Args:
        cache: the cache folder.
        key: changes whenever the rows do.
        projection: the method's name.
    """
    return cache / f"map.{key}.{projection}.npy"


def projection_of(name: str) -> str | None:
    """The projection of the map that a file of this name holds; None for any other name."""
    match = _MAP_FILE.fullmatch(name)
    return match[1] if match else None


def is_cache_file(name: str) -> bool:
    """Whether a file of the cache folder has a name that ruiji gives."""
    return _CACHE_FILE.fullmatch(name) is not None or panel_of(name) is not None or projection_of(name) is not None


#: Small pictures that `ruiji serve` keeps, in G/cache.
THUMBNAILS_FOLDER: Final = "thumbnails"


def thumbnails_folder(folder: Path) -> Path:
    """The small pictures of a gallery's objects."""
    return cache_folder(folder) / THUMBNAILS_FOLDER


def thumbnail_file(thumbnails: Path, digest: str) -> Path:
    """One small picture.

    Args:
        digest: of all that it was made of.
    """
    return thumbnails / digest[:2] / digest


# G/run: what is to do and how it goes on.


def run_folder(folder: Path) -> Path:
    """All that is not the answer itself."""
    return folder / RUN_FOLDER


def run_list_file(folder: Path) -> Path:
    """The object list that `ruiji run` makes if the media folder has none."""
    return run_folder(folder) / OBJECT_LIST


_GENERATION = re.compile(r"([0-9]{6}|[1-9][0-9]{6,})\.json")


def generations_folder(folder: Path) -> Path:
    """The accepted object lists, numbered."""
    return run_folder(folder) / "generations"


def generation_file(folder: Path, number: int) -> Path:
    """The file whose link commits a generation, e.g. `000007.json`."""
    return generations_folder(folder) / f"{number:06d}.json"


def generation_number(name: str) -> int | None:
    """The number of the generation that a file of this name commits."""
    return _number(_GENERATION, name)


def made_folder(folder: Path) -> Path:
    """What is made for generations, committed or not: a folder each."""
    return run_folder(folder) / "made"


def plan_file(place: Path) -> Path:
    """The plan in a folder below `run/made` or `run/done`."""
    return place / "plan.json"


def todo_file(place: Path) -> Path:
    """The plan's todo list beside it, one path per line."""
    return place / "todo.txt"


_BITS = re.compile(rf"{_SHARD}\.bits")
_IDS = re.compile(rf"{_SHARD}\.ids\.txt")
_FAILED: Final = "failed.txt"


def stale_folder(made: Path) -> Path:
    """Which rows are no longer on the list, in what was made for a generation."""
    return made / "stale"


def stale_bits_file(stale: Path, shard: int) -> Path:
    """The stale rows of a shard."""
    return stale / f"{shard_name(shard)}.bits"


def stale_ids_file(stale: Path, shard: int) -> Path:
    """The stale objects of a shard that is made again."""
    return stale / f"{shard_name(shard)}.ids.txt"


def stale_failed_file(stale: Path) -> Path:
    """The failed objects that are no longer on the list."""
    return stale / _FAILED


def bits_shard(name: str) -> int | None:
    """The shard whose stale rows have this file name."""
    return _number(_BITS, name)


def ids_shard(name: str) -> int | None:
    """The shard whose stale objects have this file name."""
    return _number(_IDS, name)


def is_stale_file(name: str) -> bool:
    """Whether a file of this name says what is no longer on the list."""
    return name == _FAILED or bits_shard(name) is not None or ids_shard(name) is not None


def done_folder(folder: Path) -> Path:
    """The closed plans, a folder each."""
    return run_folder(folder) / "done"


def closed_folder(folder: Path, plan_id: str) -> Path:
    """A closed plan."""
    return done_folder(folder) / plan_id


def emptied_folder(folder: Path, plan_id: str) -> Path:
    """Where an open plan notes the segments whose per-image files are gone."""
    return run_folder(folder) / "emptied" / plan_id


def suspects_folder(folder: Path, plan_id: str) -> Path:
    """Where a plan's objects and segments are noted that were in hand when a worker process died."""
    return run_folder(folder) / "suspects" / plan_id


def suspect_name(path: str) -> str:
    """The name of the file that notes one such object."""
    return f"{_path_digest(path)}.json"


_TROUBLE = re.compile(r"segment-([0-9]+)\.json")


def segment_trouble_file(folder: Path, plan_id: str, index: int) -> Path:
    """What is held against one segment of a plan."""
    return suspects_folder(folder, plan_id) / f"segment-{index}.json"


def trouble_segment(name: str) -> int | None:
    """The segment's index that such a file's name tells; None if it is another file."""
    match = _TROUBLE.fullmatch(name)
    return int(match[1]) if match is not None else None


def stopped_file(folder: Path, plan_id: str) -> Path:
    """Why a plan was closed before its end."""
    return run_folder(folder) / "stopped" / f"{plan_id}.json"


def probes_file(folder: Path) -> Path:
    """Images that were readable when an open plan was enqueued again."""
    return run_folder(folder) / "probes.json"


def altered_folder(folder: Path) -> Path:
    """How many rows of each shard show a picture otherwise than people see it."""
    return run_folder(folder) / "altered"


def altered_file(folder: Path, shard: int) -> Path:
    """The counts of one shard."""
    return record_file(altered_folder(folder), shard)


def marks_folder(folder: Path) -> Path:
    """Marks of such pictures that are not counted yet."""
    return altered_folder(folder) / "marks"


def mark_name(path: str, kind: str) -> str:
    """The name of the file that marks an object."""
    return f"{_path_digest(path)}.{kind}"


def fruitless_folder(folder: Path) -> Path:
    """Records of retries of which every object failed again: shards without rows are not made of them."""
    return run_folder(folder) / "fruitless"


def broken_folder(folder: Path) -> Path:
    """Broken shards that were set aside to be made again, each in a folder of its number."""
    return run_folder(folder) / "broken"


def broken_shard_folder(folder: Path, shard: int) -> Path:
    """The files of one broken shard."""
    return broken_folder(folder) / shard_name(shard)


def broken_shard(name: str) -> int | None:
    """The shard whose broken files lie in a folder of this name."""
    return _number(_BROKEN, name)


def _path_digest(path: str) -> str:
    return hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()


# G/run of a ruiji from before there were generations.


def first_plan_file(folder: Path) -> Path:
    """Its open plan; since then a note that makes such a ruiji refuse the gallery."""
    return plan_file(run_folder(folder))


#: Finds such todo lists in G/run.
FIRST_TODO_GLOB: Final = "*.todo.txt"


def first_todo_file(folder: Path, plan_id: str) -> Path:
    """The todo list of its open plan."""
    return run_folder(folder) / FIRST_TODO_GLOB.replace("*", plan_id)


def first_list_file(folder: Path) -> Path:
    """The figures of its object list."""
    return run_folder(folder) / "list.json"


def first_stale_folder(folder: Path) -> Path:
    """Which rows were no longer on that list."""
    return stale_folder(run_folder(folder))


# Decisions about duplicates, beside the galleries: one file for those of all models.

DECISIONS_FILE: Final = "decisions.jsonl"


def decisions_file(folder: Path) -> Path:
    """What people decided about duplicates, beside a gallery folder."""
    return folder.absolute().parent / DECISIONS_FILE


def writer_lock_folder(file: Path) -> Path:
    """Who may write to a file that many hosts append to."""
    return file.with_name(f"{file.name}.lock")


def writer_lock_file(folder: Path, number: int) -> Path:
    """The file whose link takes such a lock, e.g. `000007.json`."""
    return folder / f"{number:06d}.json"


def writer_lock_number(name: str) -> int | None:
    """The number that a file of this name takes."""
    return _number(_GENERATION, name)


# The state folder: what belongs to this host alone.


def redis_folder(state_dir: Path) -> Path:
    """The data of the Redis that `ruiji redis` runs."""
    return state_dir / "redis"


def redis_url_file(state_dir: Path) -> Path:
    """Where that Redis leaves its address, password included."""
    return state_dir / "redis.url"


def own_run_folder(state_dir: Path, folder: Path) -> Path:
    """What `ruiji run` keeps for a gallery folder."""
    return state_dir / "runs" / _folder_digest(folder)


def lock_file(place: Path) -> Path:
    """Held while a Redis, or a `ruiji run`, works in its folder below the state folder."""
    return place / "lock"


#: Starts the names of the folders of a run's own Redis.
OWN_REDIS_PREFIX: Final = "redis-"


def in_hand_folder(state_dir: Path, folder: Path) -> Path:
    """What the worker processes of this host have in hand of a gallery folder, a file each."""
    return state_dir / "in-hand" / _folder_digest(folder)


def ready_folder(state_dir: Path) -> Path:
    """Which worker processes of this host can take a task, a file each."""
    return state_dir / "ready"


def _folder_digest(folder: Path) -> str:
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
