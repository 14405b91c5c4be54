"""`ruiji evaluate` as a user meets it: protocols, exclusions, formats, files, exit codes, what it imports."""

import csv
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from pipeline import layout
from pipeline.arguments import Commands
from pipeline.errors import RuijiError, UsageError
from pipeline.model import load_model
from search.cli import register
from search.evaluation.metrics import METRICS
from search.gallery.opening import open_gallery
from search.options import Metric
from search.ranking.rank import rank
from tests.factories import Ruiji, only_line, tiny_model
from tests.search.galleries import write_article_shard, write_gallery, write_pictures_gallery
from tests.search.test_search_cli import imported_by

COLUMNS = ("data_type", "img_name", "img_path", "label", "id", "camera")


@dataclass
class World:
    """A gallery of 12-value features, and an annotation CSV."""

    base: Path
    features: Path
    model: Path
    labels: Path

    def evaluate(self, *arguments: str | Path, labels: bool = True) -> Result:
        app = Commands()
        register(app)
        given = ["evaluate", "--feature-dir", self.features, "--model", self.model, "--bootstrap", "50", *arguments]
        given += ["--labels", self.labels] if labels else []
        return CliRunner().invoke(app, [str(argument) for argument in given])

    def json(self, *arguments: str | Path, labels: bool = True) -> Any:
        result = self.evaluate("--format", "json", *arguments, labels=labels)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def refused(self, *arguments: str | Path, kind: type[RuijiError] = UsageError, labels: bool = True) -> str:
        result = self.evaluate(*arguments, labels=labels)
        assert isinstance(result.exception, kind), result.output
        assert not result.stdout
        return str(result.exception)


def make(base: Path, rows: list[tuple[str, str, str]], features: np.ndarray[Any, Any], extra: str = "") -> World:
    """Rows of (data type, label, camera), one object each."""
    paths = [f"{label or 'x'}/{number:03d}.png" for number, (_, label, _) in enumerate(rows)]
    model = load_model(tiny_model(base / "tiny.onnx"))
    world = World(base, base / "features", model.path, base / "anno.csv")
    write_gallery(layout.gallery_folder(world.features, model.path), model, features, paths, 5)
    with world.labels.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for path, (kind, label, camera) in zip(paths, rows, strict=True):
            writer.writerow((kind, path.rpartition("/")[2], path, label, path[-7:-4], camera))
        file.write(extra)
    return world


def towards(*similarities: float) -> np.ndarray[Any, Any]:
    """float32[1 + n, 12]: a query, and rows with these cosines to it."""
    features = np.zeros((1 + len(similarities), 12), dtype=np.float32)
    features[0, 0] = 1
    features[1:, 0] = similarities
    features[1:, 1] = np.sqrt(1 - np.square(similarities))
    return features


@pytest.fixture
def reference(tmp_path: Path) -> World:
    """One query whose ranking has the relevance 0 1 1 0 1."""
    rows = [("query", "a", "1"), *(("gallery", label, "2") for label in "baaba")]
    return make(tmp_path, rows, towards(0.9, 0.8, 0.7, 0.6, 0.5))


def random_world(base: Path, count: int = 40, queries: int = 8) -> World:
    draw = np.random.default_rng(6)
    rows = [("query" if i < queries else "gallery", "abc"[draw.integers(3)], str(i % 2)) for i in range(count)]
    return make(base, rows, draw.normal(size=(count, 12)).astype(np.float32))


def test_the_reference_case_comes_out_of_shards_and_a_csv(reference: World) -> None:
    found = reference.json()
    figures = {key: round(one["value"], 6) for key, one in found["metrics"].items()}
    assert figures["map"] == 0.588889
    assert figures["map_trapezoid"] == 0.461111
    assert figures["map_at_r"] == 0.388889
    assert figures["r_precision"] == 0.666667
    assert figures["minp"] == 0.6
    assert [figures[f"rank_{k}"] for k in (1, 5, 10)] == [0, 1, 1]
    assert found["queries"] == {"given": 1, "valid": 1, "excluded": {}, "tied": 0}
    assert found["ranked"] == {"objects": 5, "left_out": {}}


def test_a_table_names_every_metric_with_its_convention_and_each_label_on_request(reference: World) -> None:
    plain, full = reference.evaluate().stdout, reference.evaluate("--per-class").stdout
    for metric in METRICS:
        assert any(line.startswith(metric.name) and line.endswith(metric.convention) for line in plain.splitlines())
    assert "minimum" not in plain
    assert full.startswith(plain.rstrip("\n"))
    assert full.splitlines()[-1].split() == ["a", "1", "0.0000", "0.5889", "0.6000", "0.6667"]
    assert "\x1b" not in full


def test_json_and_csv_have_the_same_numbers_and_the_seed_decides_them(tmp_path: Path) -> None:
    world = random_world(tmp_path)
    found = world.json("--seed", "3")
    assert world.json("--seed", "3") == found
    assert world.json("--seed", "4") != found
    rows = list(csv.DictReader(io.StringIO(world.evaluate("--seed", "3", "--format", "csv").stdout)))
    overall = {row["metric"]: row for row in rows if not row["label"]}
    for key, one in found["metrics"].items():
        assert {name: float(overall[key][name]) for name in one if name != "convention"} == {
            name: value for name, value in one.items() if name != "convention"
        }
        assert one["low"] <= one["value"] <= one["high"]
    by_label = {(row["label"], row["metric"]): float(row["value"]) for row in rows if row["label"]}
    for label in found["classes"]:
        assert by_label[label["label"], "map"] == label["map"]
    weighted = sum(one["map"] * one["queries"] for one in found["classes"]) / found["queries"]["valid"]
    assert weighted == pytest.approx(found["metrics"]["map"]["value"])


def test_a_tie_that_touches_the_outcome_is_printed_with_its_range(tmp_path: Path) -> None:
    rows = [("query", "a", ""), *(("gallery", label, "") for label in "babab")]
    world = make(tmp_path, rows, towards(0.5, 0.5, 0.5, 0.5, 0.5))
    found = world.json()
    assert found["queries"]["tied"] == 1
    average = found["metrics"]["map"]
    assert average["lowest"] == pytest.approx(0.325)
    assert average["highest"] == 1
    # By id: 0 1 0 1 0.
    assert average["value"] == pytest.approx(0.5)
    assert average["lowest"] < average["expected"] < average["highest"]
    table = world.evaluate().stdout
    assert "1 query has matches and others at exactly the same similarity" in table
    assert ["mAP", "0.3250", f"{average['expected']:.4f}", "1.0000"] in [line.split() for line in table.splitlines()]


def test_every_query_and_row_that_does_not_take_part_is_counted_with_its_reason(tmp_path: Path) -> None:
    rows = [
        ("query", "a", ""),
        ("query", "alone", ""),
        ("query", "junk", ""),
        ("query", "", ""),
        ("query", "a", ""),  # its feature is all zero
        ("gallery", "a", ""),
        ("gallery", "junk", ""),
        ("gallery", "", ""),
        ("gallery", "b", ""),  # NaN
        ("train", "a", ""),
        ("gallery", "b", ""),
    ]
    features = np.random.default_rng(1).normal(size=(len(rows), 12)).astype(np.float32)
    features[4], features[8, 3] = 0, np.nan
    world = make(tmp_path, rows, features, "query,gone.png,a/gone.png,a,9,\n")
    found = world.json("--junk-label", "junk")
    assert found["queries"] == {
        "given": 6,
        "valid": 1,
        "excluded": {
            "feature all zero, or not finite": 1,
            "junk label junk": 1,
            "no label": 1,
            "no match in the gallery": 1,
            "not in the gallery's shards": 1,
        },
        "tied": 0,
    }
    assert found["ranked"] == {
        "objects": 2,
        "left_out": {
            "data_type neither query nor gallery": 1,
            "feature all zero, or not finite": 1,
            "junk label junk": 1,
            "no label": 1,
        },
    }
    assert "6, 1 valid; excluded: 1 feature all zero, or not finite, " in world.evaluate("--junk-label", "junk").stdout


def test_a_query_is_counted_once_however_often_its_line_stands_and_refused_where_lines_differ(tmp_path: Path) -> None:
    rows = [("query", "a", ""), *(("gallery", label, "") for label in "ba")]
    again = "query,000.png,a/000.png,a,000,\n"
    gone = 2 * "query,gone.png,a/gone.png,a,9,\n"
    found = make(tmp_path, rows, towards(0.9, 0.8), again + gone).json()
    assert found["queries"]["given"] == 2
    assert found["queries"]["excluded"] == {"not in the gallery's shards": 1}
    world = make(tmp_path / "other", rows, towards(0.9, 0.8), "gallery,000.png,a/000.png,b,000,\n")
    assert "several lines for a/000.png that differ" in world.refused()


def test_a_gallery_is_found_by_its_name_with_a_dot_in_it(tmp_path: Path) -> None:
    world = random_world(tmp_path)
    model = world.model.rename(tmp_path / "tiny.v1.onnx")
    layout.gallery_folder(world.features, world.model).rename(layout.gallery_folder(world.features, model))
    world.model = model
    by_file = world.json()
    world.model = Path("tiny.v1")
    assert world.json() == by_file


def test_the_camera_rule_leaves_out_matches_only(tmp_path: Path) -> None:
    rows = [("query", "a", "1"), *(("gallery", label, camera) for label, camera in ("a1", "b1", "a2", "b2"))]
    world = make(tmp_path, rows, towards(0.9, 0.8, 0.7, 0.6))
    # Without the rule 1 0 1 0; with it the first is neither right nor wrong: 0 1 0.
    assert world.json()["metrics"]["map"]["value"] == pytest.approx((1 + 2 / 3) / 2)
    assert world.json("--camera-column", "camera")["metrics"]["map"]["value"] == 0.5
    assert "no column cam" in world.refused("--camera-column", "cam")


def test_leave_one_out_by_csv_and_by_folder_are_the_same(tmp_path: Path) -> None:
    world = random_world(tmp_path)
    by_csv = world.json("--leave-one-out")
    assert by_csv["queries"]["given"] == by_csv["ranked"]["objects"] == 40
    assert world.json("--labels-from-folder", labels=False) == by_csv


def test_the_articles_shards_are_evaluated_by_name(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny.onnx")
    world = World(tmp_path, tmp_path / "features", model, tmp_path / "anno.csv")
    folder = layout.gallery_folder(world.features, model)
    folder.mkdir(parents=True)
    names = ["q.png", "x.png", "y.png"]
    write_article_shard(folder, 0, towards(0.9, 0.1), names)
    world.labels.write_text("data_type,img_name,label\nquery,q.png,a\ngallery,x.png,b\ngallery,y.png,a\n")
    assert world.json()["metrics"]["map"]["value"] == 0.5
    assert "does not know paths" in world.refused("--labels-from-folder", labels=False)


def test_a_trec_run_has_the_rankings_of_a_search(tmp_path: Path) -> None:
    world = random_world(tmp_path)
    assert world.evaluate("--trec", tmp_path / "run" / "out.trec", "--leave-one-out").exit_code == 0
    lines = [line.split(" ") for line in (tmp_path / "run" / "out.trec").read_text().splitlines()]
    assert len(lines) == 40 * 39
    gallery = open_gallery(layout.gallery_folder(world.features, world.model))
    features = np.concatenate([shard.features for shard in gallery.shards])
    for row, ranking in enumerate(rank(gallery, features, 40, Metric.cosine)):
        query = gallery.object_id(row)
        expected = [(hit.object_id, repr(hit.similarity)) for hit in ranking if hit.row != row]
        mine = [line for line in lines if line[0] == query]
        assert [(line[2], line[4]) for line in mine] == expected
        assert [line[3] for line in mine] == [str(number) for number in range(1, 40)]


def test_the_sheet_shows_the_worst_queries_first(tmp_path: Path) -> None:
    world = random_world(tmp_path)
    for shard in open_gallery(layout.gallery_folder(world.features, world.model)).shards:
        for path in shard.paths or ():
            target = tmp_path / "media" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40), "orange").save(target)
    result = world.evaluate("--sheet", tmp_path / "worst.png", "--media-dir", tmp_path / "media")
    assert result.exit_code == 0, result.output
    assert "written:" in result.stderr and "could not" not in result.stderr
    with Image.open(tmp_path / "worst.png") as sheet:
        colors = {color for _, color in sheet.convert("RGB").getcolors(1 << 24) or []}
    assert {(0x1F, 0x9D, 0x4D), (0xD1, 0x34, 0x2F), (255, 165, 0)} <= colors
    assert "--media-dir" in world.refused("--sheet", tmp_path / "worst.png")


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    world = random_world(tmp_path)
    assert world.evaluate("--plot", tmp_path / "curves.png").exit_code == 0
    with Image.open(tmp_path / "curves.png") as curves:
        assert curves.size == (1500, 630)
    assert "must end in" in world.refused("--plot", tmp_path / "curves.gif")


def test_curves_without_matplotlib_are_refused_before_any_work(
    reference: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in reference.refused("--plot", "curves.png")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("gallery", "a", ""), ("gallery", "a", "")], "no row can serve as query"),
        ([("query", "a", ""), ("query", "a", "")], "no row can serve as gallery"),
        ([("query", "a", ""), ("gallery", "b", "")], "none of 1 queries has a match"),
    ],
)
def test_an_evaluation_without_queries_gallery_or_matches_says_so(
    tmp_path: Path, rows: list[tuple[str, str, str]], said: str
) -> None:
    assert said in make(tmp_path, rows, towards(0.5)).refused()


def test_labels_are_given_in_one_way(reference: World) -> None:
    assert "either --labels FILE or --labels-from-folder" in reference.refused("--labels-from-folder")
    assert "either --labels FILE or --labels-from-folder" in reference.refused(labels=False)
    reference.labels.write_text("img_name,label\n000.png,a\n001.png,a\n")
    assert "--leave-one-out does without" in reference.refused()


def test_an_evaluation_on_the_cpu_imports_neither_torch_nor_the_workers_nor_matplotlib(reference: World) -> None:
    arguments = ["evaluate", "--feature-dir", reference.features, "--model", reference.model]
    arguments += ["--labels", reference.labels]
    code = (
        "from pipeline.arguments import Commands\nimport search.cli\n"
        "app = Commands()\n"
        "search.cli.register(app)\n"
        f"app({[str(argument) for argument in arguments]!r}, standalone_mode=False)"
    )
    assert not imported_by(code) & {"torch", "onnxruntime", "onnx", "workers.encoder", "matplotlib", "celery"}


def test_cuda_that_does_not_work_is_an_error_and_no_fallback(reference: World) -> None:
    try:
        import torch
    except ImportError:
        pass
    else:
        if torch.cuda.is_available():
            pytest.skip("CUDA works here")
    assert "--device cuda" in reference.refused("--device", "cuda")


def test_rows_that_take_no_part_are_counted_once(ruiji: Ruiji) -> None:
    paths = write_pictures_gallery(ruiji)
    done = ruiji("evaluate", "--labels-from-folder", "--junk-label", "cat", code=2)
    assert only_line(done.stderr).endswith(f"no row can serve as query ({len(paths)} junk label cat)")
