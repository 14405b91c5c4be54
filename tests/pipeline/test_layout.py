"""The names on disk: as `docs/format.md` has them, and spelled in one module only."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import layout

ROOT = Path(layout.__file__).parents[1]
G, STATE = Path("G"), Path("STATE")
PLAN = "0123456789abcdef"
SHA1 = "a9993e364706816aba3e25717850c26c9cd0d89d"

#: What each file is called that other versions of ruiji, and other programs, read: none of these may change.
NAMES = {
    layout.object_list_file(Path("MEDIA")): "MEDIA/objects.txt",
    layout.toml_file(Path("m/a.onnx")): "m/a.toml",
    layout.gallery_folder(Path("F"), Path("m/a.b.onnx")): "F/a.b",
    layout.gallery_folder(Path("F"), Path("a.b")): "F/a.b",
    layout.gallery_file(G): "G/gallery.json",
    layout.features_file(G, 7): "G/0007.features.npy",
    layout.object_ids_file(G, 7): "G/0007.object_ids.npy",
    layout.paths_file(G, 12345): "G/12345.paths.txt",
    layout.record_file(G, 7): "G/0007.json",
    layout.cache_file(layout.cache_folder(G), "0007", "89ab", layout.NORMS): "G/cache/0007.89ab.norms.npy",
    layout.cache_file(layout.cache_folder(G), "0007", "89ab", layout.CODES): "G/cache/0007.89ab.codes.npy",
    layout.cache_file(layout.cache_folder(G), "0007", "89ab", layout.SCALES): "G/cache/0007.89ab.scales.npy",
    layout.cache_file(layout.cache_folder(G), "0007", "89ab", layout.FACTS): "G/cache/0007.89ab.facts.npy",
    layout.decisions_file(Path("/F/model")): "/F/decisions.jsonl",
    layout.writer_lock_file(layout.writer_lock_folder(Path("F/d.jsonl")), 7): "F/d.jsonl.lock/000007.json",
    layout.run_list_file(G): "G/run/objects.txt",
    layout.generation_file(G, 7): "G/run/generations/000007.json",
    layout.plan_file(layout.made_folder(G) / "n"): "G/run/made/n/plan.json",
    layout.todo_file(layout.made_folder(G) / "n"): "G/run/made/n/todo.txt",
    layout.stale_bits_file(layout.stale_folder(G), 7): "G/stale/0007.bits",
    layout.stale_ids_file(layout.stale_folder(G), 7): "G/stale/0007.ids.txt",
    layout.stale_failed_file(layout.stale_folder(G)): "G/stale/failed.txt",
    layout.plan_file(layout.closed_folder(G, PLAN)): f"G/run/done/{PLAN}/plan.json",
    layout.emptied_folder(G, PLAN): f"G/run/emptied/{PLAN}",
    layout.suspects_folder(G, PLAN) / layout.suspect_name("abc"): f"G/run/suspects/{PLAN}/{SHA1}.json",
    layout.stopped_file(G, PLAN): f"G/run/stopped/{PLAN}.json",
    layout.probes_file(G): "G/run/probes.json",
    layout.altered_file(G, 7): "G/run/altered/0007.json",
    layout.marks_folder(G) / layout.mark_name("abc", "turned"): f"G/run/altered/marks/{SHA1}.turned",
    layout.record_file(layout.fruitless_folder(G), 7): "G/run/fruitless/0007.json",
    layout.features_file(layout.broken_shard_folder(G, 7), 7): "G/run/broken/0007/0007.features.npy",
    layout.first_plan_file(G): "G/run/plan.json",
    layout.first_todo_file(G, PLAN): f"G/run/{PLAN}.todo.txt",
    layout.first_list_file(G): "G/run/list.json",
    layout.first_stale_folder(G): "G/run/stale",
    layout.redis_folder(STATE): "STATE/redis",
    layout.redis_url_file(STATE): "STATE/redis.url",
    layout.ready_folder(STATE): "STATE/ready",
}


@pytest.mark.parametrize(("path", "name"), NAMES.items(), ids=str)
def test_a_file_of_the_format_has_the_name_that_it_always_had(path: Path, name: str) -> None:
    assert str(path) == name


def test_numbers_are_read_from_the_names_that_carry_them() -> None:
    assert layout.recorded_shard("0007.json") == 7
    assert layout.recorded_shard("12345.json") == 12345
    assert layout.recorded_shard("007.json") is None
    assert layout.recorded_shard("0007.json.bak") is None
    assert layout.featured_shard("0007.features.npy") == 7
    assert layout.featured_shard("0007-features.npy") is None
    assert [layout.shard_of(f"0007.{ending}") for ending in ("json", *layout.SHARD_ENDINGS)] == [7, 7, 7, 7, 7]
    assert layout.shard_of("0007.npy") is None
    assert layout.generation_number("000007.json") == 7
    assert layout.generation_number("0007.json") is None
    assert layout.writer_lock_number("000007.json") == 7
    assert layout.writer_lock_number("000007.json.bak") is None
    assert (layout.bits_shard("0007.bits"), layout.ids_shard("0007.ids.txt")) == (7, 7)
    assert [layout.is_stale_file(name) for name in ("0007.bits", "0007.ids.txt", "failed.txt", "x.txt")] == [
        *(True, True, True, False)
    ]
    assert layout.is_cache_file("0007.89ab-12.norms.npy")
    assert not layout.is_cache_file("0007.89ab.other.npy")
    pairs = layout.pairs_file(layout.cache_folder(G), 7, "0123456789abcdef", 0.95, 2)
    assert pairs == G / "cache" / "pairs.0007.0123456789abcdef.0.95.0002.npy"
    assert layout.is_cache_file(pairs.name)
    assert layout.panel_of(pairs.name) == (7, "0123456789abcdef", 0.95, 2)
    assert layout.panel_of("pairs.0007.0123456789abcdef.0.9.5.0002.npy") is None


def test_no_other_module_spells_a_name_of_the_format() -> None:
    spelled = set(_texts(ROOT / "pipeline" / "layout.py"))
    # Of a name such as `0007.bits` the module has the ending alone.
    names = {text for text in spelled if re.fullmatch(r"[.\w-]*[.-][.\w-]*", text)} - {"."}
    assert {"gallery.json", "features.npy", "todo.txt", ".toml", ".tmp-"} <= names
    folders = {text for text in spelled if re.fullmatch(r"\w+", text)}
    assert {"run", "made", "cache", "stale"} <= folders
    found = []
    for package in ("pipeline", "workers", "search"):
        for module in sorted((ROOT / package).rglob("*.py")):
            if module.name != "layout.py":
                found += [f"{module.name}: {text!r}" for text in _texts(module) if text in names]
                found += [f"{module.name}: / {text!r}" for text in _appended(module) if text in folders]
    assert found == []


def _texts(module: Path) -> Iterator[str]:
    """Every string of a module, but for its docstrings."""
    tree = ast.parse(module.read_text())
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes) and id(node) not in told:
            yield node.value if isinstance(node.value, str) else node.value.decode("latin-1")


def _appended(module: Path) -> Iterator[str]:
    """What a module appends to paths with `/`."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and isinstance(node.right, ast.Constant):
            yield str(node.right.value)
