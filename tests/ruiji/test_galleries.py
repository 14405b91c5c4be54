"""The public gallery: every kind of query, the same answers as the command, many threads, new shards."""

import io
import threading
import tracemalloc
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import ruiji
from pipeline import layout
from pipeline.choices import Device
from pipeline.model import Model, load_model
from pipeline.progress import show_steps
from pipeline.settings import MAX_PIXELS
from ruiji.gallery_model import GalleryModel
from search.gallery.shards import Gallery as Shards
from search.gallery.shards import Shard
from search.options import Precision
from search.queries import embed_images, load_encoder
from search.ranking.planner import Library, Purpose, look_at_machine
from search.requests.index import index
from tests.factories import pictures, tiny_model
from tests.search.galleries import brute_force, write_article_shard, write_gallery, write_shard
from workers.decode.images import load_pixels

COUNT, SHARD_ROWS = 12, 5


class World:
    """A media folder, its model, and its features as an ordinary search embeds them."""

    def __init__(self, base: Path) -> None:
        self.media, self.features_dir = base / "media", base / "features"
        self.paths = pictures(self.media, COUNT)
        self.model: Model = load_model(tiny_model(base / "tiny.onnx"))
        images = [self.media / path for path in self.paths]
        self.features = embed_images(images, self.model, load_encoder(self.model, "cpu"), MAX_PIXELS).features
        write_gallery(self.folder, self.model, self.features, self.paths, SHARD_ROWS)

    @property
    def folder(self) -> Path:
        return self.features_dir / "tiny"

    @property
    def ids(self) -> list[str]:
        return [Path(path).name for path in self.paths]

    def open(self) -> ruiji.Gallery:
        return ruiji.open_gallery(self.features_dir, self.model.path)

    def expected(self, query: NDArray[np.float32], k: int, euclidean: bool = False) -> list[str]:
        return [name for name, _ in brute_force(self.features, self.ids, query, euclidean)][:k]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def own_world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_gallery_is_found_by_its_folder_by_its_model_and_alone(world: World) -> None:
    for gallery in (
        world.open(),
        ruiji.open_gallery(world.folder),
        ruiji.open_gallery(str(world.features_dir)),
        ruiji.open_gallery(world.folder, world.model.path),
    ):
        assert gallery.folder == world.folder
        assert (len(gallery), gallery.length, gallery.unusable) == (COUNT, 12, 0)
        assert gallery.fingerprint == world.model.fingerprint


@pytest.mark.parametrize("metric", ["cosine", "angle", "euclidean"])
def test_path_bytes_image_id_and_vector_find_the_same(world: World, metric: str) -> None:
    gallery, path = world.open(), world.media / world.paths[3]
    with Image.open(path) as image:
        answers = [
            gallery.search(path, top_k=4, metric=metric),
            gallery.search(str(path), top_k=4, metric=metric),
            gallery.search(path.read_bytes(), top_k=4, metric=metric),
            gallery.search(image, top_k=4, metric=metric),
            gallery.search_ids(world.ids[3], top_k=4, metric=metric, include_self=True),
            gallery.search_vectors(world.features[3], top_k=4, metric=metric),
            gallery.search_vectors(world.features[3:4].astype(np.float64), top_k=4, metric=metric),
        ]
    expected = world.expected(world.features[3], 4, metric == "euclidean")
    for found in answers:
        assert found.hits == answers[0].hits
        assert [hit.object_id for hit in found.hits] == expected
    assert [one.queries[0].query for one in answers] == [str(path), str(path), "0", "0", world.ids[3], "0", "0"]


def test_an_object_is_left_out_of_its_own_hits(world: World) -> None:
    found = world.open().search_ids(world.ids, top_k=COUNT)
    assert [len(one.hits) for one in found] == [COUNT - 1] * COUNT
    assert all(one.query not in {hit.object_id for hit in one.hits} for one in found)


def test_queries_are_answered_in_order_and_each_failure_in_its_place(world: World, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    given = [world.media / world.paths[5], broken, b"nothing", world.media / world.paths[2]]
    found = world.open().search(given, top_k=1)
    assert [one.query for one in found] == [str(given[0]), str(broken), "2", str(given[3])]
    assert [one.error for one in found] == [None, *["it is not an image in a known format"] * 2, None]
    assert [[hit.object_id for hit in one.hits] for one in found] == [[world.ids[5]], [], [], [world.ids[2]]]
    with pytest.raises(ruiji.QueryError, match="these are the answers of 4 queries"):
        _ = found.hits
    with pytest.raises(ruiji.QueryError, match=r"broken\.jpg: it is not an image"):
        world.open().search(broken)
    with pytest.raises(ruiji.QueryError, match="there is none"):
        world.open().search([])


@pytest.mark.parametrize(
    ("mode", "size"), [("RGB", (40, 30)), ("L", (40, 30)), ("RGBA", (31, 17)), ("P", (16, 16)), ("1", (9, 9))]
)
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_pillow_image_gives_the_bits_of_its_file(
    world: World, mode: str, size: tuple[int, int], orientation: int
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, size=(size[1], size[0], 4), dtype=np.uint8)
    image = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    (image.convert("RGB") if mode in ("P", "1") else image).convert(mode).save(file, "PNG", exif=exif)
    gallery = world.open()
    with Image.open(io.BytesIO(file.getvalue())) as opened:
        assert (gallery.embed([opened]) == gallery.embed([file.getvalue()])).all()


def test_jpegs_of_all_colors_give_the_bits_of_their_file(world: World) -> None:
    gallery, noise = world.open(), np.random.default_rng(1).integers(0, 256, size=(40, 50, 3), dtype=np.uint8)
    for mode in ("RGB", "L", "CMYK"):
        file = io.BytesIO()
        Image.fromarray(noise).convert(mode).save(file, "JPEG", quality=90)
        with Image.open(io.BytesIO(file.getvalue())) as opened:
            assert (gallery.embed([opened]) == gallery.embed([file.getvalue()])).all(), mode


def test_an_image_of_wide_samples_and_what_is_no_picture_are_refused(world: World) -> None:
    with pytest.raises(ruiji.ImageError, match="mode F does not say which of its values is white"):
        world.open().embed([Image.new("F", (8, 8))])
    with pytest.raises(ruiji.QueryError, match="picture 0 is a int"):
        world.open().search(7)  # type: ignore[arg-type]


def test_embedding_gives_the_bits_of_the_gallery_or_names_each_failure(world: World) -> None:
    images = [world.media / path for path in world.paths]
    for embed in (world.open().embed, ruiji.Embedder(world.model.path).embed):
        features = embed(images)
        assert features.dtype == np.float32
        assert features.tobytes() == world.features.tobytes()
        assert embed([]).shape == (0, 12)
        with pytest.raises(ruiji.ImageError, match=r"1 of 2 pictures cannot be embedded: gone\.png: there is no"):
            embed([images[0], "gone.png"])


def test_one_of_anything_is_as_good_as_a_sequence_of_one(world: World) -> None:
    gallery, image = world.open(), world.media / world.paths[3]
    for embed in (gallery.embed, ruiji.Embedder(world.model.path).embed):
        with Image.open(image) as opened:
            for picture in (image, str(image), image.read_bytes(), opened):
                assert np.array_equal(embed(picture), world.features[3:4])
        with pytest.raises(ruiji.ImageError, match=r"1 of 1 pictures cannot be embedded: gone\.png: there is no"):
            embed("gone.png")
    assert np.array_equal(gallery.features(world.ids[3]), world.features[3:4])
    condition = f"path={world.paths[0]}"
    alone, several = (gallery.near_duplicates(0.01, against=against) for against in (condition, [condition]))
    assert list(alone) == list(several) and alone.groups[0].members[0].object_id == world.ids[0]


def test_pixels_that_are_decoded_already_are_encoded_to_the_same_bits(world: World) -> None:
    gallery = world.open()
    pixels = load_pixels(world.media / world.paths[4], gallery.spec, 10**6)
    assert np.array_equal(gallery.encode(pixels[np.newaxis]), world.features[4:5])
    with pytest.raises(ruiji.UsageError, match="pictures need the model"):
        _ = ruiji.open_gallery(world.folder).spec


def test_objects_are_listed_by_row_and_found_by_id(world: World) -> None:
    gallery = world.open()
    listed = gallery.objects()
    assert [(one.row, one.object_id, one.path) for one in listed] == [
        (row, world.ids[row], world.paths[row]) for row in range(COUNT)
    ]
    for first, count in ((0, 1), (3, 5), (COUNT - 2, 10), (COUNT, 3), (0, 0)):
        assert gallery.objects(first, count) == listed[first : first + count]
    assert gallery.find(world.ids[5]) == listed[5] and gallery.rows == COUNT
    with pytest.raises(ruiji.UnknownObject, match="no object nothing"):
        gallery.find("nothing")
    some = gallery.only(f"path={world.paths[3]}")
    assert some.objects() == [listed[3]] and some.rows == COUNT


def test_a_gallery_says_which_way_a_query_takes(world: World) -> None:
    assert world.open().way(metric="euclidean").startswith("numpy on cpu, float32")
    with pytest.raises(ruiji.UsageError, match="no metric 'dot'"):
        world.open().way(metric="dot")


def test_what_is_asked_wrongly_is_refused_by_name(world: World) -> None:
    gallery = world.open()
    vector = world.features[0]
    for kind, message, ask in (
        (ruiji.UsageError, "no device 'gpu': name one of auto, cuda, cpu", lambda: world_with("gpu")),
        (ruiji.UsageError, "no metric 'l1'", lambda: gallery.search_vectors(vector, metric="l1")),
        (ruiji.UsageError, "top_k must be at least 1", lambda: gallery.search_vectors(vector, top_k=0)),
        (ruiji.UsageError, "top_k must be a whole number, not 2.5", lambda: gallery.search_ids("x", top_k=2.5)),  # type: ignore[arg-type]
        (ruiji.UsageError, "count must be at least 0, not -1", lambda: gallery.sample(-1)),
        (ruiji.UsageError, "count must be a whole number, not '3'", lambda: gallery.sample("3")),  # type: ignore[arg-type]
        (ruiji.UsageError, "^condition label: write COLUMN=VALUE", lambda: gallery.only("label")),
        (
            ruiji.UsageError,
            "^condition label=… asks for a column of an annotation CSV: give one to only as labels$",
            lambda: gallery.only("label=cat"),
        ),
        (
            ruiji.UsageError,
            "^against label=… asks for a column of an annotation CSV: give one to only as labels$",
            lambda: gallery.near_duplicates(against="label=cat"),
        ),
        (
            ruiji.UsageError,
            "^against path=none/ means none of the",
            lambda: gallery.near_duplicates(against="path=none/"),
        ),
        (ruiji.UsageError, "collapse must be", lambda: gallery.search_vectors(vector, collapse=0.0)),
        (ruiji.UsageError, "min_similarity must be", lambda: gallery.search_vectors(vector, min_similarity=np.nan)),
        (
            ruiji.QueryError,
            r"are float32\[3\], the gallery needs",
            lambda: gallery.search_vectors(vector[:3]),
        ),
        (ruiji.QueryError, "vector 0: its feature is all zero", lambda: gallery.search_vectors(0 * vector)),
        (ruiji.QueryError, "the gallery has no object nowhere", lambda: gallery.search_ids(["nowhere"])),
        (ruiji.QueryError, "the gallery has no object nowhere", lambda: gallery.features(["nowhere"])),
        (ruiji.UsageError, "the threshold must be above 0", lambda: gallery.near_duplicates(0)),
        (
            ruiji.UsageError,
            "give it to open_gallery as model",
            lambda: ruiji.open_gallery(world.folder).search("a.png"),
        ),
    ):
        with pytest.raises(kind, match=message):
            ask()
    assert len(gallery.sample(np.int64(3))) == len(gallery.search_vectors(vector, top_k=np.int64(3)).hits) == 3  # type: ignore[arg-type]
    assert gallery.sample(0) == []


def test_a_sample_is_of_what_is_searched_and_lists_no_rows(world: World) -> None:
    part = world.open().only(f"path!={world.paths[0]}")
    assert sorted(one.row for one in part.sample(COUNT)) == [one.row for one in part.objects()] != []
    assert part.only("path=nowhere").sample(3) == []
    rows = 5_000_000
    features, ids = np.broadcast_to(np.float32(1), (rows, 2)), np.broadcast_to(np.array("a.jpg"), rows)
    gallery = ruiji.Gallery(
        Path(), GalleryModel(None, Device.cpu, 1), Device.cpu, False, Shards(2, (Shard("0000", features, ids),))
    )
    gallery.sample(3)
    tracemalloc.start()
    try:
        assert len({one.row for one in gallery.sample(60)}) == 60
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000


def world_with(device: str) -> ruiji.Gallery:
    return ruiji.open_gallery("features", device=device)


def test_another_model_than_the_gallerys_is_refused(world: World, tmp_path: Path) -> None:
    gallery = ruiji.open_gallery(world.folder, tiny_model(tmp_path / "tiny.onnx", seed=1))
    with pytest.raises(ruiji.GalleryMismatch, match="the gallery was made by the model with fingerprint"):
        gallery.search(world.media / world.paths[0])


def test_an_unverified_gallery_is_searched_with_a_warning(tmp_path: Path, world: World) -> None:
    write_article_shard(tmp_path / "article", 0, world.features, world.ids)
    with pytest.warns(ruiji.RuijiWarning, match="unverified gallery") as warned:
        gallery = ruiji.open_gallery(tmp_path / "article")
    # It names the line of the caller, not one of ruiji.
    assert warned[0].filename == __file__
    assert gallery.search_vectors(world.features[0], top_k=1).hits[0].path is None
    for said, ask in (
        ("condition path=…", lambda: gallery.only("path=a/")),
        ("against path=…", lambda: gallery.near_duplicates(against="path=a/")),
        ("not_within_folder", lambda: gallery.near_duplicates(not_within_folder=True)),
    ):
        with pytest.raises(
            ruiji.UsageError, match=f"^{said}: this gallery has no gallery.json and does not know paths"
        ):
            ask()


def test_only_some_objects_are_searched_and_grouped(world: World) -> None:
    gallery, prefix = world.open(), world.paths[0][:10]
    some = gallery.only(f"path={prefix}")
    expected = [name for path, name in zip(world.paths, world.ids, strict=True) if path.startswith(prefix)]
    assert {hit.object_id for hit in some.search_vectors(world.features[0], top_k=COUNT).hits} == set(expected)
    assert (len(some), len(gallery)) == (len(expected), COUNT)
    assert len(gallery.near_duplicates(0.01).groups[0].members) == COUNT
    with pytest.raises(ruiji.UsageError, match="annotation CSV"):
        gallery.only("label=cat")


def test_a_filter_of_a_filtered_gallery_leaves_out_more(own_world: World, tmp_path: Path) -> None:
    world = own_world
    first, second, *_ = world.paths
    labels = tmp_path / "labels.csv"
    labels.write_text("img_path,label\n" + "".join(f"{path},{path[7]}\n" for path in world.paths))
    gallery = world.open()
    some = gallery.only(f"path={first}", f"path={second}", f"path={world.paths[-1]}")
    for parts in (
        some.only(f"path!={second}").only(f"path!={world.paths[-1]}"),
        some.only(f"path={first}"),
        some.only(labels=labels).only(f"path={first}"),
        some.only(f"label={first[7]}", labels=labels).only(f"path!={second}").only("path=object/"),
    ):
        assert [one.path for one in parts.objects()] == [first]
        assert [hit.path for hit in parts.search_vectors(world.features[1]).hits] == [first]
    assert len(gallery.only("path=object/").only("path=new/")) == 0
    # Values of one column are alternatives in one call only.
    assert len(gallery.only(f"path={first}", f"path={second}")) == 2
    assert len(gallery.only(f"path={first}").only(f"path={second}")) == 0
    # Labels that were given once serve near_duplicates, however many filters follow.
    labelled = gallery.only(labels=labels).only("path=object/")
    first_labels = {path for path in world.paths if path[7] == first[7]}
    found = labelled.near_duplicates(0.01, against=f"label={first[7]}")
    assert {one.path for one in found.groups[0].members[: len(first_labels)]} == first_labels
    new = [f"object/{world.paths[0][7]}new.png", "new/0.png"]
    write_shard(world.folder, 3, world.features[:2], new, world.model.fingerprint)
    both = gallery.only("path=object/").only(f"path={new[0]}", "path=new/")
    assert both.refresh() and [one.path for one in both.objects()] == new[:1]


def test_labels_are_of_the_file_that_their_line_is_about(own_world: World, tmp_path: Path) -> None:
    world = own_world
    twin = f"twin/{world.ids[0]}"
    write_shard(world.folder, 3, world.features[:1], [twin], world.model.fingerprint)
    (tmp_path / "labels.csv").write_text(f"img_path,label\n{world.paths[0]},cat\n")
    gallery = world.open()
    cats = gallery.only("label=cat", labels=tmp_path / "labels.csv")
    assert [one.path for one in cats.objects()] == world.paths[:1]
    labels = gallery.labels(tmp_path / "labels.csv")
    assert [labels.label(one.object_id, one.path) for one in gallery.objects()] == ["cat"] + [None] * COUNT
    assert gallery.labels(labels).label(world.ids[0], twin) is None


def test_new_shards_are_taken_up_and_what_is_known_of_the_others_stays(own_world: World) -> None:
    world = own_world
    gallery = world.open()
    some = gallery.only("path=new/")
    assert not gallery.refresh()
    before = gallery._shards.shards
    added = np.random.default_rng(5).normal(size=(3, 12)).astype(np.float32)
    write_shard(world.folder, 3, added, [f"new/{number}.png" for number in range(3)], world.model.fingerprint)
    assert gallery.search_vectors(added[0], top_k=1).hits[0].object_id != "0.png"
    assert gallery.refresh()
    assert not gallery.refresh()
    assert gallery.search_vectors(added[0], top_k=1).hits[0].path == "new/0.png"
    assert all(old is new for old, new in zip(before, gallery._shards.shards, strict=False))
    assert (len(gallery), len(some)) == (COUNT + 3, 0)
    assert some.refresh()
    assert len(some) == 3


def test_a_map_follows_the_objects_that_are_searched_but_no_other_rows(own_world: World) -> None:
    gallery = own_world.open()
    some = gallery.only(f"path={own_world.paths[3]}")
    whole, of_some = gallery.map(), some.map()
    for found, wanted in ((some.updated_map(whole), of_some), (gallery.updated_map(of_some), whole)):
        assert np.array_equal(found.rows, wanted.rows) and np.array_equal(found.positions, wanted.positions)
    write_shard(own_world.folder, 3, own_world.features[:2], own_world.paths[:2], own_world.model.fingerprint)
    gallery.refresh()
    with pytest.raises(ruiji.UsageError, match="load the map again"):
        gallery.updated_map(whole)


def test_pictures_that_got_other_names_are_taken_up(own_world: World) -> None:
    world = own_world
    gallery = world.open()
    some, plane = gallery.only("path=object/"), gallery.map()
    digests = [np.load(path) for path in sorted(world.folder.glob("*.digests.npy"))]
    for path in world.folder.glob("0*.json"):
        path.unlink()
    renamed = [path.replace("object/", "moved/") for path in world.paths]
    for number, own in enumerate(digests):
        rows = slice(number * SHARD_ROWS, (number + 1) * SHARD_ROWS)
        paths = renamed[rows]
        write_shard(world.folder, number, world.features[rows], paths, world.model.fingerprint, digests=own)
    assert gallery.refresh() and some.refresh() and not gallery.refresh()
    assert gallery.search_vectors(world.features[0], top_k=1).hits[0].path == renamed[0]
    assert [one.path for one in gallery.objects()] == renamed and len(some) == 0
    with pytest.raises(ruiji.UsageError, match="load the map again"):
        gallery.objects_at([0], plane.rows_key)
    again = gallery.kept_map()
    assert again is not None and again.rows_key == gallery.rows_key
    assert np.array_equal(again.positions, plane.positions)


def test_a_shard_that_is_damaged_is_refused_and_the_gallery_stays_as_it_was(own_world: World) -> None:
    world = own_world
    gallery = world.open()
    write_shard(world.folder, 3, world.features[:2], world.paths[:2], world.model.fingerprint)
    layout.paths_file(world.folder, 3).unlink()
    with pytest.raises(ruiji.ShardCorrupt, match=r"0003 has a record but no 0003\.paths\.txt"):
        gallery.refresh()
    assert len(gallery.search_vectors(world.features[0], top_k=COUNT + 2).hits) == COUNT


def test_many_threads_search_while_shards_come(own_world: World) -> None:
    world = own_world
    gallery = world.open()
    whole = world.features
    added = np.random.default_rng(6).normal(size=(8, 3, 12)).astype(np.float32)
    done = threading.Event()

    def ask(number: int) -> int:
        asked = 0
        while not done.is_set() or asked < 5:
            row = (number + asked) % COUNT
            by_picture = gallery.search(world.media / world.paths[row], top_k=1)
            by_vector = gallery.search_vectors(whole, top_k=1)
            assert by_picture.hits[0].object_id == world.ids[row]
            assert [one.hits[0].object_id for one in by_vector] == world.ids
            assert len(gallery.near_duplicates(0.999999)) == 0
            asked += 1
        return asked

    with ThreadPoolExecutor(6) as threads:
        running = [threads.submit(ask, number) for number in range(5)]
        for number, features in enumerate(added, 3):
            paths = [f"new/{number}-{row}.png" for row in range(3)]
            write_shard(world.folder, number, features, paths, world.model.fingerprint)
            assert gallery.refresh()
        done.set()
        assert sum(one.result() for one in running) >= 25
    assert len(gallery) == COUNT + 24


@pytest.mark.parametrize("indexed", [False, True])
def test_a_gallery_that_is_warm_answers_the_same(own_world: World, indexed: bool) -> None:
    pytest.importorskip("torch", reason="torch is not installed; `make test-all` installs it")
    world = own_world
    if indexed:
        index(world.folder, show_steps)
    cold, warm = world.open(), world.open()
    warm.warm_up()
    assert warm._model._encoder is not None
    ways = [warm._planner.way(warm._shards, Purpose.hits, queries) for queries in (1, 100)]
    machine = look_at_machine(Device.cpu)
    if indexed and machine.int8:
        # Of 100 queries rows that are kept in bfloat16 are quicker, with matrix units.
        many = Precision.bfloat16 if machine.bfloat16 is not None and machine.bfloat16.matrix else Precision.int8
        assert [way.precision for way in ways] == [Precision.int8, many]
        assert ways[0].library is Library.torch
    elif not indexed and machine.bfloat16 is not None:
        assert [way.resident for way in ways] == [False, True]
        assert ways[0].library is Library.numpy
        assert ways[1].library is (Library.compiled if machine.compiled else Library.torch)
    queries = np.concatenate([world.features] * 5)
    for count in (1, len(queries)):
        for metric in ("cosine", "euclidean"):
            asked = queries[:count]
            assert warm.search_vectors(asked, metric=metric) == cold.search_vectors(asked, metric=metric)
    image = world.media / world.paths[0]
    assert warm.search(image) == cold.search(image)
    write_shard(world.folder, 3, world.features[:2], ["new/0.png", "new/1.png"], world.model.fingerprint)
    assert warm.refresh()
    assert cold.refresh()
    assert warm.search_vectors(queries) == cold.search_vectors(queries)


def test_codes_that_are_kept_later_are_taken_up(own_world: World) -> None:
    gallery = own_world.open()
    some = gallery.only("path=object/")
    before = gallery.search_vectors(own_world.features)
    assert not gallery._shards.coded
    index(own_world.folder, show_steps)
    for one in (gallery, some):
        assert one.refresh()
        assert one._shards.coded
        assert not one.refresh()
        assert one.search_vectors(own_world.features) == before


def test_a_model_that_could_not_be_loaded_is_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Future[object]:
        failed: Future[object] = Future()
        failed.set_exception(ruiji.MachineFault("no memory"))
        return failed

    gallery, image = world.open(), world.media / world.paths[0]
    with monkeypatch.context() as patched:
        patched.setattr("ruiji.gallery_model.load_encoder", fails)
        for _ in range(2):
            with pytest.raises(ruiji.MachineFault, match="no memory"):
                gallery.search(image)
    assert gallery.search(image).hits[0].object_id == world.ids[0]
