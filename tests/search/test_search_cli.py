"""`ruiji search` as a user meets it: formats, exit codes, messages, and what it imports."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from pipeline import layout
from pipeline.arguments import Commands
from pipeline.errors import GalleryMismatch, QueryError, RuijiError, UsageError
from pipeline.model import Model, load_model
from pipeline.settings import MAX_PIXELS
from search.cli import register
from search.gallery.opening import open_gallery
from search.queries import embed_images, load_encoder
from tests.factories import Ruiji, only_line, pictures, tiny_model
from tests.pipeline.test_npy import HOSTILE
from tests.search.galleries import write_article_shard, write_gallery, write_pictures_gallery, write_shard

COUNT = 12


@dataclass
class World:
    """A media folder with its gallery, and the command on it."""

    media: Path
    features: Path
    model: Model
    paths: list[str]

    @property
    def folder(self) -> Path:
        return layout.gallery_folder(self.features, self.model.path)

    def search(self, *arguments: str | Path) -> Result:
        return self.run("search", *arguments)

    def run(self, command: str, *arguments: str | Path) -> Result:
        app = Commands()
        register(app)
        given = [*([command, "info"] if command == "gallery" else [command])]
        given += ["--feature-dir", self.features, "--model", self.model.path, *arguments]
        return CliRunner().invoke(app, [str(argument) for argument in given])

    def refused(self, kind: type[RuijiError], *arguments: str | Path) -> str:
        result = self.search(*arguments)
        assert isinstance(result.exception, kind), result.output
        assert not result.stdout
        return str(result.exception)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    base = tmp_path_factory.mktemp("world")
    paths = pictures(base / "media", COUNT)
    model = load_model(tiny_model(base / "tiny.onnx"))
    queries = embed_images([base / "media" / path for path in paths], model, load_encoder(model, "cpu"), MAX_PIXELS)
    world = World(base / "media", base / "features", model, paths)
    write_gallery(world.folder, model, queries.features, paths, 5)
    return world


@pytest.fixture
def world(made: World) -> World:
    return made


@pytest.fixture
def own_world(made: World, tmp_path: Path) -> World:
    """The same, in a feature folder that the test may change."""
    world = World(made.media, tmp_path / "features", made.model, made.paths)
    queries = embed_images(
        [made.media / path for path in made.paths], made.model, load_encoder(made.model, "cpu"), MAX_PIXELS
    )
    write_gallery(world.folder, made.model, queries.features, made.paths, 5)
    return world


@pytest.mark.parametrize("metric", ["cosine", "angle", "euclidean"])
def test_a_gallery_photo_finds_itself_first(world: World, metric: str) -> None:
    for path in world.paths:
        result = world.search(world.media / path, "--format", "json", "--metric", metric)
        assert result.exit_code == 0
        (found,) = json.loads(result.stdout)
        assert list(found) == ["query", "hits"]
        assert found["query"] == str(world.media / path)
        best = found["hits"][0]
        assert list(best) == ["rank", "object_id", "path", "similarity", "distance"]
        assert best == {
            "rank": 1,
            "object_id": path.rpartition("/")[2],
            "path": path,
            "similarity": 1.0,
            "distance": 0.0,
        }
        assert [hit["rank"] for hit in found["hits"]] == list(range(1, 11))


def test_all_formats_tell_the_same_hits_with_every_digit(world: World) -> None:
    images = [world.media / world.paths[3], world.media / world.paths[7]]
    results = {
        name: world.search(*images, "-k", "4", "--format", name).stdout
        for name in ("json", "jsonl", "csv", "paths", "table")
    }
    flat = [{"query": one["query"], **hit} for one in json.loads(results["json"]) for hit in one["hits"]]
    assert [json.loads(line) for line in results["jsonl"].splitlines()] == flat
    rows = list(csv.DictReader(io.StringIO(results["csv"])))
    assert [{key: str(value) for key, value in hit.items()} for hit in flat] == rows
    assert results["csv"].startswith("query,rank,object_id,path,similarity,distance\n")
    assert results["paths"].splitlines() == [hit["path"] for hit in flat]
    assert any(len(row["similarity"]) > 12 for row in rows)
    assert "\x1b" not in "".join(results.values())


def test_a_table_has_the_columns_in_order_and_names_queries_only_where_there_are_several(world: World) -> None:
    image, other = world.media / world.paths[0], world.media / world.paths[1]
    lines = world.search(image, "-k", "2").stdout.splitlines()
    assert lines[0].split() == ["rank", "object_id", "path", "similarity", "distance"]
    assert lines[1].split() == ["1", world.paths[0].rpartition("/")[2], world.paths[0], "1.000000", "0.000000"]
    assert len(lines) == 3
    lines = world.search(image, other, "-k", "2").stdout.splitlines()
    assert (lines[0], lines[4], lines[5]) == (f"query: {image}", "", f"query: {other}")


def test_paths_are_joined_with_a_media_folder_that_is_given(world: World) -> None:
    result = world.search(world.media / world.paths[0], "-k", "3", "--format", "paths", "--media-dir", world.media)
    assert Path(result.stdout.splitlines()[0]) == world.media / world.paths[0]
    assert all(Path(line).is_file() for line in result.stdout.splitlines())


def test_a_scaled_and_reencoded_copy_finds_its_original_first(world: World, tmp_path: Path) -> None:
    with Image.open(world.media / world.paths[4]) as picture:
        picture.resize((48, 36), Image.Resampling.BICUBIC).save(tmp_path / "copy.jpg", quality=85)
    found = json.loads(world.search(tmp_path / "copy.jpg", "--format", "json").stdout)
    assert found[0]["hits"][0]["path"] == world.paths[4]


def test_an_unreadable_query_is_reported_and_the_others_are_answered(world: World, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    result = world.search(broken, world.media / world.paths[0], tmp_path / "none.jpg", "--format", "json")
    assert result.exit_code == 3
    assert [found["query"] for found in json.loads(result.stdout)] == [str(world.media / world.paths[0])]
    assert f"{broken}: it is not an image in a known format; left out" in result.stderr
    assert f"{tmp_path / 'none.jpg'}: there is no such file; left out" in result.stderr


def test_only_unreadable_queries_are_bad_input(world: World, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    message = world.refused(QueryError, tmp_path / "none.jpg", tmp_path / "pipe.jpg")
    assert "there is no such file" in message
    assert "not a regular file" in message
    assert QueryError.exit_code == 2


def test_a_query_with_a_zero_feature_cannot_be_ranked(world: World, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "black").save(tmp_path / "black.png")
    assert "all zero" in world.refused(QueryError, tmp_path / "black.png")


def test_a_changed_model_is_refused(own_world: World) -> None:
    changed = own_world.model.path.parent / "changed" / "tiny.onnx"
    model = load_model(tiny_model(changed, seed=1))
    own_world.model = model
    message = own_world.refused(GalleryMismatch, own_world.media / own_world.paths[0])
    assert model.fingerprint[:12] in message
    assert GalleryMismatch.exit_code == 4


def test_a_model_whose_toml_has_changed_is_refused(own_world: World) -> None:
    changed = own_world.model.path.parent / "changed-toml" / "tiny.onnx"
    changed.parent.mkdir()
    shutil.copy(own_world.model.path, changed)
    own_world.model = load_model(changed)
    assert own_world.model.contract["toml"] is None
    changed.with_suffix(".toml").write_text("[input]\nresize = 'nearest'\n")
    message = own_world.refused(GalleryMismatch, own_world.media / own_world.paths[0])
    assert "its .toml has changed" in message


def test_a_gallery_that_has_kept_no_contract_is_searched_all_the_same(own_world: World) -> None:
    file = own_world.folder / "gallery.json"
    kept = json.loads(file.read_text())
    assert kept.pop("contract")["spec"]["resize"] == "bicubic"
    file.write_text(json.dumps(kept))
    # It is of a time when there was one way to make pixels.
    for record in own_world.folder.glob("*.json"):
        text = record.read_text().replace(kept["fingerprint"], load_model(own_world.model.path, 1).fingerprint)
        record.write_text(text)
    image = own_world.media / own_world.paths[0]
    assert own_world.search(image, "--format", "paths").stdout.splitlines()[0] == own_world.paths[0]


def test_a_missing_gallery_says_what_to_run(world: World, tmp_path: Path) -> None:
    empty = World(world.media, tmp_path, world.model, world.paths)
    assert "ruiji enqueue" in empty.refused(UsageError, world.media / world.paths[0])


def test_an_articles_gallery_is_searched_and_said_to_be_unverified(world: World, tmp_path: Path) -> None:
    article = World(world.media, tmp_path, world.model, world.paths)
    images = [world.media / path for path in world.paths]
    features = embed_images(images, world.model, load_encoder(world.model, "cpu"), MAX_PIXELS).features
    write_article_shard(article.folder, 0, features, [image.name for image in images])
    result = article.search(images[2], "--format", "json")
    assert result.stderr.count("unverified") == 1
    assert result.stderr.count("\n") == 1
    best = json.loads(result.stdout)[0]["hits"][0]
    assert (best["object_id"], best["path"], best["similarity"]) == (images[2].name, None, 1.0)
    assert "  -  " in article.search(images[2]).stdout
    assert "does not know paths" in article.refused(UsageError, images[2], "--format", "paths")


def test_an_articles_gallery_of_another_length_is_refused(world: World, tmp_path: Path) -> None:
    article = World(world.media, tmp_path, world.model, world.paths)
    write_article_shard(article.folder, 0, np.ones((2, 13), np.float32), ["a.jpg", "b.jpg"])
    assert "length 13" in article.refused(GalleryMismatch, world.media / world.paths[0])


def test_unusable_features_are_counted_on_stderr_and_never_ranked(own_world: World) -> None:
    bad = np.ones((3, 12), np.float32)
    bad[0], bad[1, 1], bad[2, 2] = 0, np.nan, np.inf
    write_shard(own_world.folder, 9, bad, ["x0.jpg", "x1.jpg", "x2.jpg"], own_world.model.fingerprint)
    result = own_world.search(own_world.media / own_world.paths[0], "-k", "100", "--format", "jsonl")
    assert "1 object whose feature is all zero and 2 whose feature has NaN or infinite values" in result.stderr
    assert len(result.stdout.splitlines()) == COUNT


def test_stale_objects_are_left_out_unless_asked_for(own_world: World) -> None:
    mask = np.array([True, False, False, False, False])
    bits = own_world.folder / "run" / "stale" / "0000.bits"
    bits.parent.mkdir(parents=True)
    bits.write_bytes(np.packbits(mask).tobytes())
    image = own_world.media / own_world.paths[0]
    without = own_world.search(image, "-k", "100", "--format", "paths").stdout.splitlines()
    assert own_world.paths[0] not in without
    assert len(without) == COUNT - 1
    assert own_world.search(image, "--include-stale", "--format", "paths").stdout.startswith(own_world.paths[0])


def test_other_library_versions_are_told_where_they_can_change_a_digit(own_world: World) -> None:
    image, name = own_world.media / own_world.paths[0], Path(own_world.paths[0]).name
    records = sorted(own_world.folder.glob("[0-9]*.json"))
    assert len(records) > 1
    assert "made with" not in own_world.search(image).stderr
    for number, record in enumerate(records):
        value = json.loads(record.read_text())
        value["versions"] = {**value["versions"], "numpy": "0.1"}
        record.write_text(json.dumps(value))
        if number == 0:
            assert "made with different library versions" in own_world.search("--id", name).stderr
    # All alike: only a picture that is embedded here can differ from them.
    assert "made with numpy 0.1 (here" in own_world.search(image).stderr
    assert "made with" not in own_world.search("--id", name).stderr


def test_a_record_from_before_a_library_was_compared_counts_as_equal_there(own_world: World) -> None:
    image = own_world.media / own_world.paths[0]
    first, second, *_ = sorted(own_world.folder.glob("[0-9]*.json"))
    value = json.loads(first.read_text())
    assert value["versions"].pop("simplejpeg")
    first.write_text(json.dumps(value))
    assert "made with" not in own_world.search(image).stderr
    value = json.loads(second.read_text())
    value["versions"]["simplejpeg"] = "0.1"
    second.write_text(json.dumps(value))
    assert "made with simplejpeg 0.1 (here" in own_world.search(image).stderr


def test_a_sheet_is_drawn_as_jpeg_or_png_by_its_name(world: World, tmp_path: Path) -> None:
    for name, form in (("out.jpg", "JPEG"), ("out.PNG", "PNG")):
        result = world.search(
            world.media / world.paths[0], "-k", "3", "--sheet", tmp_path / name, "--media-dir", world.media
        )
        assert result.exit_code == 0
        assert f"sheet: {tmp_path / name}" in result.stderr
        with Image.open(tmp_path / name) as sheet:
            assert sheet.format == form


def test_a_sheet_that_cannot_be_made_is_refused_before_any_work(world: World, tmp_path: Path) -> None:
    image = world.media / world.paths[0]
    assert "must end in" in world.refused(UsageError, image, "--sheet", "out.gif", "--media-dir", world.media)
    assert "--media-dir" in world.refused(UsageError, image, "--sheet", tmp_path / "out.jpg")
    message = world.refused(UsageError, image, "-k", "100000", "--sheet", "out.png", "--media-dir", world.media)
    assert "smaller --top-k" in message


def test_a_file_name_that_is_not_utf8_is_still_answered(world: World, tmp_path: Path) -> None:
    image = tmp_path / "caf\udce9.png"
    image.write_bytes((world.media / world.paths[0]).read_bytes())
    result = world.search(image, "--format", "json")
    assert json.loads(result.stdout)[0]["query"].endswith("caf\\xe9.png")


def imported_by(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_command_line_module_imports_nothing_heavy() -> None:
    heavy = {"numpy", "PIL", "onnx", "onnxruntime", "torch", "workers", "celery", "redis"}
    assert not imported_by("import search.cli") & heavy


def test_a_search_on_the_cpu_imports_no_torch_and_reads_no_graph(world: World) -> None:
    arguments = ["search", "--feature-dir", world.features, "--model", world.model.path, world.media / world.paths[0]]
    code = (
        "from pipeline.arguments import Commands\nimport search.cli\n"
        "app = Commands()\n"
        "search.cli.register(app)\n"
        f"app({[str(argument) for argument in arguments]!r}, standalone_mode=False)"
    )
    modules = imported_by(code)
    assert "workers.encoder" in modules
    assert not modules & {"torch", "onnx", "search.ranking.torch_arithmetic", "search.views.sheet", "celery"}


def test_nothing_is_kept_to_be_reported_to_anyone(world: World, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pipeline", "search", "--feature-dir", world.features, "--model", world.model.path]
    # ONNX Runtime does not report where it thinks it is tested, so that nothing else of the environment is passed on.
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "PYTHONPATH": str(root)}
    subprocess.run([*command, world.media / world.paths[0]], check=True, env=environment, capture_output=True)
    # What it would send, and the number it knows this machine by, would lie below ~/.cache.
    assert list(home.rglob("*")) == []


def test_cuda_that_does_not_work_is_an_error_and_no_fallback(world: World) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime offers CUDA here")
    assert "no GPU can be used" in world.refused(UsageError, world.media / world.paths[0], "--device", "cuda")


# Queries that are no single picture


def ids(result: Result) -> list[list[str]]:
    """The object ids of every query's hits, from `--format json`."""
    return [[hit["object_id"] for hit in found["hits"]] for found in json.loads(result.stdout)]


def names(world: World) -> list[str]:
    return [path.rpartition("/")[2] for path in world.paths]


def test_a_gallery_object_is_searched_with_by_id_without_the_model_and_without_itself(world: World) -> None:
    name = names(world)[3]
    by_file = world.search(world.media / world.paths[3], "--format", "json", "-k", "6")
    given = ["search", "--feature-dir", str(world.features), "--id", name, "--format", "json", "-k", "5"]
    app = Commands()
    register(app)
    without = CliRunner().invoke(app, given)
    assert without.exit_code == 0, without.output
    assert json.loads(without.stdout)[0]["query"] == name
    assert ids(by_file)[0] == [name, *ids(without)[0]]
    assert ids(CliRunner().invoke(app, [*given, "--include-self"]))[0][0] == name


def test_a_picture_of_the_media_folder_can_be_kept_out_of_its_own_hits(world: World) -> None:
    image = world.media / world.paths[3]
    out = world.search(image, "--media-dir", world.media, "--exclude-self", "--format", "json", "-k", "100")
    assert len(ids(out)[0]) == COUNT - 1
    assert names(world)[3] not in ids(out)[0]


def test_excluding_a_picture_itself_needs_the_media_folder_that_it_is_known_by(world: World) -> None:
    image = world.media / world.paths[3]
    assert "--media-dir" in world.refused(UsageError, image, "--exclude-self")
    assert world.search(image, "--include-self").exit_code == 0
    assert world.search("--id", names(world)[3], "--exclude-self").exit_code == 0


def test_an_unknown_id_is_refused(world: World) -> None:
    assert "no such object" in world.refused(QueryError, "--id", "none.png")
    assert "nothing to search with" in world.refused(UsageError)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_feature_is_refused_in_one_line(world: World, tmp_path: Path, name: str) -> None:
    (tmp_path / "x.npy").write_bytes(HOSTILE[name])
    message = world.refused(QueryError, "--feature", tmp_path / "x.npy")
    assert message.startswith(f"--feature {tmp_path}/x.npy: not a .npy file that can be read (")
    assert "\n" not in message


def test_features_are_searched_with_one_or_many_at_a_time(world: World, tmp_path: Path) -> None:
    images = [world.media / path for path in world.paths[:3]]
    features = embed_images(images, world.model, load_encoder(world.model, "cpu"), MAX_PIXELS).features
    np.save(tmp_path / "one.npy", features[0])
    np.save(tmp_path / "all.npy", features)
    result = world.search("--feature", tmp_path / "one.npy", "--feature", tmp_path / "all.npy", "--format", "json")
    labels = [found["query"] for found in json.loads(result.stdout)]
    assert labels == [str(tmp_path / "one.npy"), *(f"{tmp_path / 'all.npy'}[{i}]" for i in range(3))]
    assert [found[0] for found in ids(result)] == [names(world)[i] for i in (0, 0, 1, 2)]
    np.save(tmp_path / "long.npy", np.ones(13, np.float32))
    assert "float32[12]" in world.refused(QueryError, "--feature", tmp_path / "long.npy")
    np.save(tmp_path / "zero.npy", np.zeros(12, np.float32))
    assert "all zero" in world.refused(QueryError, "--feature", tmp_path / "zero.npy")
    np.save(tmp_path / "huge.npy", np.full(12, 1e300))
    assert "NaN or infinite" in world.refused(QueryError, "--feature", tmp_path / "huge.npy")
    np.save(tmp_path / "none.npy", np.ones((0, 12), np.float32))
    assert "q at least 1" in world.refused(QueryError, "--feature", tmp_path / "none.npy")
    np.savez(tmp_path / "some.npz", features)
    (tmp_path / "empty.npy").touch()
    for name in ("some.npz", "empty.npy", "missing.npy"):
        assert "numpy.save" in world.refused(QueryError, "--feature", tmp_path / name)


def test_folders_lists_and_stdin_stand_for_their_pictures(world: World, tmp_path: Path) -> None:
    images = [str(world.media / path) for path in world.paths]
    (tmp_path / "some.txt").write_text("\n".join(images[2:5]))
    rows = [f"gallery,,{world.paths[0]},a", f"query,,{world.paths[5]},a", f"query,,{world.paths[6]},b"]
    (tmp_path / "anno.csv").write_text("data_type,img_name,img_path,label\n" + "\n".join(rows) + "\n")

    def queries(*arguments: str | Path, stdin: str = "") -> list[str]:
        app = Commands()
        register(app)
        given = ["search", "--feature-dir", world.features, "--model", world.model.path, "--format", "json", *arguments]
        result = CliRunner().invoke(app, [str(argument) for argument in given], input=stdin)
        assert result.exit_code == 0, result.output
        return [found["query"] for found in json.loads(result.stdout)]

    assert queries(world.media) == images
    assert queries(tmp_path / "some.txt") == images[2:5]
    assert queries(world.media / "objects.txt") == images
    assert queries(tmp_path / "anno.csv", "--media-dir", world.media) == images[5:7]
    assert queries("-", stdin=f"{images[1]}\n{images[0]}\n") == [images[1], images[0]]
    (tmp_path / "empty").mkdir()
    assert "names no image" in world.refused(UsageError, tmp_path / "empty")
    (tmp_path / "names.csv").write_text("img_name,label\na.png,a\n")
    assert "give it a column img_path" in world.refused(UsageError, tmp_path / "names.csv")


def test_lists_may_have_a_byte_order_mark_or_null_characters(ruiji: Ruiji) -> None:
    paths = [str(ruiji.media / path) for path in write_pictures_gallery(ruiji)]
    base = ruiji.media.parent
    (base / "marked.txt").write_bytes("\ufeff".encode() + "\r\n".join(paths).encode())
    (base / "marked.csv").write_bytes("\ufeffimg_path\n".encode() + "\n".join(paths).encode())
    (base / "null.txt").write_bytes(b"".join(f"{path}\0".encode() for path in paths))
    (base / "wide.txt").write_text(paths[0], encoding="utf-16")
    (base / "odd.csv").write_bytes(b"img_path\na\0b.png\n")

    def queries(words: str) -> list[str]:
        done = ruiji.shell(f"{words} --format json")
        assert done.returncode == 0, done.stderr
        return [found["query"] for found in json.loads(done.stdout)]

    for words in ("ruiji search marked.txt", "ruiji search marked.csv", "ruiji search null.txt"):
        assert queries(words) == paths
    for words in ("cat marked.txt |", "cat null.txt |", "find media -print0 | grep -z png | sort -z |"):
        assert [Path(path).name for path in queries(f"{words} ruiji search -")] == [Path(path).name for path in paths]
    for words, told in (
        ("ruiji search wide.txt", "is UTF-16"),
        ("ruiji search odd.csv", "null character"),
        ("ruiji search - <&-", "cannot read the list stdin"),
        ("ruiji search - < /dev/null", "stdin names no image"),
        (r"printf '\377.png\n' | ruiji search -", r"\xff.png: there is no such file"),
        (f"ruiji search {'x' * 5000}", "no query can be searched with"),
        (f"ruiji search {'x' * 5000}.txt", "cannot read the list"),
    ):
        done = ruiji.shell(words)
        assert done.returncode == 2
        assert told in only_line(done.stderr)


def test_excluding_itself_is_refused_for_a_feature_of_nobody_knows_what(world: World, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.ones(12, np.float32))
    assert "--feature" in world.refused(UsageError, "--feature", tmp_path / "one.npy", "--exclude-self")
    assert world.search("--feature", tmp_path / "one.npy", "--include-self").exit_code == 0


# Filters


@pytest.fixture
def labels(world: World, tmp_path: Path) -> Path:
    """Six cats, then six dogs."""
    rows = [f"{path},{'cat' if number < 6 else 'dog'},{number}" for number, path in enumerate(world.paths)]
    (tmp_path / "labels.csv").write_text("img_path,label,number\n" + "\n".join(rows) + "\n")
    return tmp_path / "labels.csv"


def test_where_keeps_objects_by_their_columns_and_paths(world: World, labels: Path) -> None:
    def found(*where: str) -> list[int]:
        options = [option for text in where for option in ("--where", text)]
        result = world.search(
            world.media / world.paths[0], "--labels", labels, *options, "-k", "50", "--format", "jsonl"
        )
        hits = [json.loads(line) for line in result.stdout.splitlines()]
        assert all(list(hit)[-1] == "label" for hit in hits)
        return sorted(world.paths.index(hit["path"]) for hit in hits)

    everything = list(range(COUNT))
    assert found() == everything
    assert found("label=dog") == everything[6:]
    assert found("label!=dog") == everything[:6]
    assert found("number=1", "number=8") == [1, 8]
    assert found("number=1", "number=8", "label=cat") == [1]
    prefix = world.paths[4].rpartition("/")[0]
    assert found(f"path={prefix}") == [4]
    assert found("label=bird") == []
    refused = world.refused(UsageError, "--id", names(world)[0], "--labels", labels, "--where", "color=red")
    assert "no column color; it has img_path, label, number" in refused
    assert "--labels" in world.refused(UsageError, "--id", names(world)[0], "--where", "label=cat")
    assert "COLUMN=VALUE" in world.refused(UsageError, "--id", names(world)[0], "--where", "label")
    # Of the others nothing is asked that their lines would have to agree on.
    labels.write_text(f"img_name,label\n{names(world)[9]},cat\n{names(world)[9]},dog\n")
    assert found(f"path={prefix}") == [4]


def test_min_similarity_leaves_hits_out_and_nothing_found_can_be_a_failure(world: World) -> None:
    image = world.media / world.paths[0]
    every = json.loads(world.search(image, "-k", "50", "--format", "json").stdout)[0]["hits"]
    middle = every[5]["similarity"]
    kept = json.loads(world.search(image, "-k", "50", "--min-similarity", repr(middle), "--format", "json").stdout)
    assert kept[0]["hits"] == every[:6]
    alone = ("--id", names(world)[0], "--min-similarity", "1")
    empty = world.search(*alone)
    assert (empty.exit_code, "nothing found" in empty.stderr) == (0, True)
    assert world.search(*alone, "--fail-if-empty").exit_code == 5
    assert "none of the gallery's objects meets the conditions" in world.search(*alone, "--where", "path=x/").stderr
    assert world.search(image, "--fail-if-empty").exit_code == 0


def test_paths_can_end_in_null_characters(world: World) -> None:
    result = world.search("--id", names(world)[0], "-k", "3", "--format", "paths", "-0")
    assert result.stdout.endswith("\0")
    assert "\n" not in result.stdout
    assert set(result.stdout.split("\0")[:-1]) < set(world.paths)
    assert "--format paths" in world.refused(UsageError, "--id", names(world)[0], "-0")


def test_no_path_can_be_taken_for_an_option(own_world: World) -> None:
    features = open_gallery(own_world.folder).take(np.array([0]))
    write_shard(own_world.folder, 9, np.repeat(features, 2, axis=0), ["-0.png", "-1.png"], own_world.model.fingerprint)
    query = ("--id", "-0.png", "-k", "2", "--format", "paths")
    assert set(own_world.search(*query).stdout.splitlines()) == {"./-1.png", own_world.paths[0]}
    media = ("--media-dir", own_world.media)
    assert f"{own_world.media}/-1.png" in own_world.search(*query, *media).stdout.splitlines()
    groups = own_world.run("near-duplicates", "--threshold", "0.99999", "--format", "paths").stdout
    assert {"./-0.png", "./-1.png"} < set(groups.splitlines())


def test_explain_says_the_way_and_why(world: World) -> None:
    result = world.search("--id", names(world)[0], "--explain", "--format", "json")
    assert "plan: numpy on cpu, float32" in result.stderr
    assert "plan" not in result.stdout


# What people look at


def test_a_page_is_whole_in_itself(world: World, labels: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.html"
    result = world.search(
        "--id", names(world)[0], "--labels", labels, "--html", target, "--media-dir", world.media, "-k", "11"
    )
    assert result.exit_code == 0, result.output
    assert f"page: {target}" in result.stderr
    text = target.read_text()
    assert text.count("url(data:image/") == 12 == text.count('role="img"')
    assert "<script" not in text
    assert "http" not in text
    assert text.count('class="right"') == 5
    assert text.count('class="wrong"') == 6
    assert "--media-dir" in world.refused(UsageError, "--id", names(world)[0], "--html", target)


def test_a_page_has_each_picture_once_however_often_it_is_seen(world: World, tmp_path: Path) -> None:
    target = tmp_path / "out.html"
    result = world.search(world.media, "--html", target, "--media-dir", world.media, "-k", "100")
    assert result.exit_code == 0, result.output
    text = target.read_text()
    assert text.count("url(data:image/") == COUNT
    assert text.count('role="img"') == COUNT * (1 + COUNT)
    assert [text.count(f'class="p{number} small"') for number in range(COUNT)] == [1 + COUNT] * COUNT


def test_a_page_that_nobody_could_look_at_is_refused_before_any_work(world: World, tmp_path: Path) -> None:
    (tmp_path / "many.txt").write_text(f"{world.media / world.paths[0]}\n" * 2000)
    told = world.refused(UsageError, tmp_path / "many.txt", "--html", tmp_path / "o.html", "--media-dir", world.media)
    assert "22000 places, more than" in told and "smaller --top-k" in told


def frames(world: World, image: str | Path, labels: Path, target: Path) -> tuple[int, int]:
    """How many hits of a query, an id or a picture, are framed green, and how many red."""
    query = ["--id", image] if isinstance(image, str) else [image]
    result = world.search(*query, "--labels", labels, "--html", target, "--media-dir", world.media, "--format", "json")
    assert result.exit_code == 0, result.output
    text = target.read_text()
    return text.count('class="right"'), text.count('class="wrong"')


def test_a_query_has_the_label_of_its_own_line_and_of_no_other(own_world: World, tmp_path: Path) -> None:
    world = own_world
    world.media = shutil.copytree(world.media, tmp_path / "media")
    name, page = names(world)[0], tmp_path / "out.html"
    # A picture of the gallery; one that is not, but in the CSV; one of the same name that is in neither.
    image, beside, other = world.media / world.paths[0], world.media / "queries" / "q.png", world.media / "new" / name
    outside = tmp_path / "new" / name
    for target in (beside, other, outside):
        target.parent.mkdir()
        shutil.copy(image, target)
    lines = [f"{path},{'cat' if number < 6 else 'dog'}" for number, path in enumerate(world.paths)]
    by_path, by_name = tmp_path / "by_path.csv", tmp_path / "by_name.csv"
    by_path.write_text("\n".join(["img_path,label", *lines, "queries/q.png,dog"]) + "\n")
    by_name.write_text("\n".join(["img_name,label", *(line.rpartition("/")[2] for line in lines), "q.png,dog"]) + "\n")
    for labels in (by_path, by_name):
        green, red = frames(world, image, labels, page)
        assert green and red and green + red == 10
        assert frames(world, beside, labels, page) == (red, green)
        assert sum(frames(world, name, labels, page)) == 10
        assert frames(world, outside, labels, page) == (0, 0)
    assert frames(world, other, by_path, page) == (0, 0)


def test_labels_that_contradict_each_other_are_refused_before_there_is_an_answer(world: World, tmp_path: Path) -> None:
    name = names(world)[0]
    (tmp_path / "labels.csv").write_text(f"img_path,label\n{world.paths[0]},cat\n{world.paths[0]},dog\n")
    # Its own line is asked for only to draw it: it is not among its hits.
    asked = ["--id", name, "--labels", tmp_path / "labels.csv", "--media-dir", world.media]
    assert world.search(*asked).exit_code == 0
    assert "that differ" in world.refused(UsageError, *asked, "--html", tmp_path / "out.html")
    drawn = ["--labels", tmp_path / "labels.csv", "--media-dir", world.media, "--sheet", tmp_path / "groups.png"]
    groups = world.run("near-duplicates", "--threshold", "0.5", *drawn)
    assert isinstance(groups.exception, UsageError)
    assert not groups.stdout
    # A picture that has no more than the name of both is none of them.
    shutil.copy(world.media / world.paths[5], tmp_path / "new.png")
    (tmp_path / "labels.csv").write_text("img_path,label\nx/new.png,cat\ny/new.png,dog\n")
    assert frames(world, tmp_path / "new.png", tmp_path / "labels.csv", tmp_path / "out.html") == (0, 0)


# The other commands


def test_collapsed_hits_say_for_how_many_others_they_stand(own_world: World) -> None:
    features = embed_images(
        [own_world.media / own_world.paths[0]], own_world.model, load_encoder(own_world.model, "cpu"), MAX_PIXELS
    ).features
    copies = np.concatenate([features * 2, features * 3])
    write_shard(own_world.folder, 9, copies, ["c/0.png", "c/1.png"], own_world.model.fingerprint)
    query = "--id", own_world.paths[0].rpartition("/")[2]
    found = own_world.search(*query, "--include-self", "-k", "2", "--collapse", "0.9999", "--format", "json")
    (first, second) = json.loads(found.stdout)[0]["hits"]
    assert (first["others"], second["others"]) == (2, 0)
    assert (
        own_world.search(*query, "--collapse", "0.9999", "--format", "csv").stdout.splitlines()[0].endswith(",others")
    )
    assert "others" not in own_world.search(*query).stdout
    assert "--collapse must be above 0" in own_world.refused(UsageError, *query, "--collapse", "0")


def test_near_duplicates_are_told_in_every_format(own_world: World, tmp_path: Path) -> None:
    features = embed_images(
        [own_world.media / path for path in own_world.paths[:2]],
        own_world.model,
        load_encoder(own_world.model, "cpu"),
        MAX_PIXELS,
    )
    copies = np.concatenate([features.features[:1] * 1.0001, features.features])
    digests = np.random.default_rng(1).integers(0, 256, (3, 32), dtype=np.uint8)
    digests[1] = list(open_gallery(own_world.folder).digest(0) or b"")
    added = ["c/0.png", "c/1.png", "c/2.png"]
    write_shard(own_world.folder, 9, copies, added, own_world.model.fingerprint, digests=digests)

    def found(form: str, *more: str | Path) -> Result:
        result = own_world.run("near-duplicates", "--threshold", "0.9999", "--format", form, *more)
        assert result.exit_code == 0, result.output
        return result

    groups = json.loads(found("json").stdout)
    assert [[member["path"] for member in group["members"]] for group in groups] == [
        [own_world.paths[0], "c/0.png", "c/1.png"],
        [own_world.paths[1], "c/2.png"],
    ]
    assert [group["pairs"] for group in groups] == [3, 1]
    # A file with the same bytes is told from one that only looks the same.
    first = groups[0]["members"][0]["object_id"]
    assert [[member["identical_to"] for member in group["members"]] for group in groups] == [
        [None, None, first],
        [None, None],
    ]
    assert [member["sha256"] for member in groups[0]["members"]][1:] == [
        digests[0].tobytes().hex(),
        digests[1].tobytes().hex(),
    ]
    assert [json.loads(line) for line in found("jsonl").stdout.splitlines()] == groups
    assert found("paths").stdout == f"{own_world.paths[0]}\nc/0.png\nc/1.png\n\n{own_world.paths[1]}\nc/2.png\n"
    # xargs -0 would take an empty record for a path.
    members = [own_world.paths[0], "c/0.png", "c/1.png", own_world.paths[1], "c/2.png"]
    assert found("paths", "-0").stdout == "".join(f"{path}\0" for path in members)
    assert (
        found("csv").stdout.splitlines()[0]
        == "group,object_id,path,similarity,least_similarity,identical_to,turned,sha256"
    )
    assert found("csv").stdout.splitlines()[3].endswith(f",{first},,{digests[1].tobytes().hex()}")
    table = found("table")
    assert "group 1: 3 objects, 3 pairs" in table.stdout
    columns = [line.split() for line in table.stdout.splitlines() if line.startswith("object_id")]
    assert columns == [["object_id", "path", "similarity", "identical_to"], ["object_id", "path", "similarity"]]
    assert "digest" not in table.stderr
    sheet = tmp_path / "groups.png"
    assert "(3 pictures could not be opened)" in found("json", "--sheet", sheet, "--media-dir", own_world.media).stderr
    none = own_world.run("near-duplicates", "--where", f"path={own_world.paths[5]}", "--fail-if-empty")
    assert none.exit_code == 5


def test_index_keeps_norms_and_codes_and_info_tells_what_there_is(own_world: World) -> None:
    bad = np.ones((3, 12), np.float32)
    bad[0], bad[1, 1], bad[2, 2] = 0, np.nan, np.inf
    write_shard(own_world.folder, 9, bad, ["x0.jpg", "x1.jpg", "x2.jpg"], own_world.model.fingerprint)
    indexed = own_world.run("index")
    assert "15 objects in 4 shards; 3 cannot be ranked" in indexed.stderr
    facts = json.loads(own_world.run("gallery", "--json").stdout)
    assert list(facts)[:4] == ["folder", "model", "fingerprint", "object_id"]
    assert (facts["objects"], facts["shards"], facts["length"]) == (15, 4, 12)
    assert (facts["zero"], facts["not_finite"], facts["failed"], facts["norms_kept"]) == (1, 2, 0, 4)
    assert facts["codes_kept"] == 4
    assert facts["digests"] == 15
    assert "no digest" not in own_world.run("gallery").stderr
    assert facts["fingerprint"] == own_world.model.fingerprint
    assert "not_finite      2" in own_world.run("gallery").stdout


def test_an_indexed_gallery_that_is_not_in_memory_gives_the_same_hits(
    own_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search() -> Result:
        return own_world.search("--id", names(own_world)[0], "--explain", "--format", "json")

    before = search()
    own_world.run("index")
    monkeypatch.setattr("search.gallery.shards.row_in_memory", lambda _: False)
    after = search()
    assert "float32" in before.stderr and "int8" in after.stderr
    assert after.stdout == before.stdout


def test_an_index_that_cannot_be_kept_is_an_error(own_world: World) -> None:
    # A file in the folder's place stands for a read-only disk: root may write anywhere.
    shutil.rmtree(own_world.folder / "cache", ignore_errors=True)
    (own_world.folder / "cache").touch()
    result = own_world.run("index")
    assert result.exit_code != 0
    assert "nothing is kept of 3 shards" in str(result.exception)


def test_which_gallery_is_meant_must_be_clear(world: World, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_article_shard(tmp_path / name, 0, np.ones((1, 4), np.float32), ["a"])
    app = Commands()
    register(app)
    result = CliRunner().invoke(app, ["gallery", "info", "--feature-dir", str(tmp_path)])
    assert "several galleries: one, two" in str(result.exception)
    assert CliRunner().invoke(app, ["gallery", "info", "--feature-dir", str(tmp_path / "one")]).exit_code == 0


def test_a_search_by_id_imports_neither_torch_nor_the_encoder(world: World) -> None:
    arguments = ["search", "--feature-dir", str(world.features), "--id", names(world)[0]]
    code = (
        "from pipeline.arguments import Commands\nimport search.cli\napp = Commands()\nsearch.cli.register(app)\n"
        f"app({arguments!r}, standalone_mode=False)"
    )
    assert not imported_by(code) & {"torch", "onnx", "onnxruntime", "PIL", "celery", "redis", "workers.encoder"}
