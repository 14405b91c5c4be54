"""Copies that were rotated by quarters or mirrored, of real files, with a real encoder."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image

import ruiji
from pipeline import layout
from pipeline.choices import Device
from pipeline.errors import UsageError
from pipeline.model import load_model
from pipeline.settings import MAX_PIXELS
from search.duplicates import turned
from search.duplicates.decisions import DecidedObject, Decision, Verdict, append_decisions
from search.duplicates.groups import Group
from search.gallery.opening import open_gallery
from search.queries import embed_images, load_encoder
from search.requests.near_duplicates import NearDuplicatesRequest, near_duplicates
from search.requests.selection import Selection
from search.views.output import GroupFormat, write_groups
from tests.factories import tiny_model
from tests.search.galleries import write_article_shard, write_gallery

THRESHOLD, ORIGINALS = 0.99, 12
TURNS = list(Image.Transpose)


def photo(seed: int) -> Image.Image:
    """A picture that looks like no other, and like itself in one position only."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    return Image.fromarray(noise).resize((150, 110), Image.Resampling.BICUBIC)


def written(picture: Image.Image, path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)  # type: ignore[arg-type]


@pytest.fixture
def request_of(tmp_path: Path) -> NearDuplicatesRequest:
    """Photos, of each an upright copy and one in some other position, re-encoded."""
    media, model = tmp_path / "media", tiny_model(tmp_path / "m.onnx", size=16, length=96)
    for seed in range(ORIGINALS):
        picture = photo(seed)
        written(picture, media / f"{seed:02d}.png")
        written(picture, media / f"{seed:02d}-copy.jpg", quality=60)
        if seed < 7:
            small = picture.transpose(TURNS[seed]).resize((75, 75))
            written(small, media / f"{seed:02d}-turned.jpg", quality=60)
    embed(media, model, tmp_path / "features")
    selection = Selection(feature_dir=tmp_path / "features", model_path=model)
    return NearDuplicatesRequest(
        selection=selection, threshold=THRESHOLD, media_dir=media, turned=True, device=Device.cpu
    )


def embed(media: Path, model: Path, features: Path) -> None:
    names = sorted(path.name for path in media.iterdir())
    loaded = load_model(model)
    made = embed_images([media / name for name in names], loaded, load_encoder(loaded, Device.cpu), MAX_PIXELS)
    write_gallery(layout.gallery_folder(features, model), loaded, made.features, names, 10)


@contextmanager
def progress(unit: str) -> Iterator[object]:
    yield lambda done, total: None


def found(request: NearDuplicatesRequest, said: list[str] | None = None) -> list[Group]:
    say = (lambda line: None) if said is None else said.append
    return list(near_duplicates(request, say, progress).groups)  # type: ignore[arg-type]


def test_rotated_or_mirrored_copies_czkawka_1492(request_of: NearDuplicatesRequest) -> None:
    upright = found(replace(request_of, turned=False))
    assert [len(group.members) for group in upright] == [2] * ORIGINALS
    groups = found(request_of)
    assert [{member.object_id for member in group.members} for group in groups] == [
        {f"{seed:02d}.png", f"{seed:02d}-copy.jpg", *([f"{seed:02d}-turned.jpg"] if seed < 7 else [])}
        for seed in range(ORIGINALS)
    ]
    for group in groups:
        assert group.least_similarity is not None and group.least_similarity >= THRESHOLD
        assert all(member.similarity >= THRESHOLD for member in group.members)
        assert len(group.members) * (len(group.members) - 1) // 2 == group.pairs
    assert request_of.media_dir is not None
    for seed, group in enumerate(groups[:7]):
        first, *_ = group.members
        (other,) = [member for member in group.members if member.turned]
        assert other.object_id == f"{seed:02d}-turned.jpg"
        # What the words say of it is what was done to it.
        assert other.turned == turned._NAMES[TURNS[seed]]
        with Image.open(request_of.media_dir / first.object_id) as one:
            as_said = one.convert("RGB").transpose(TURNS[seed]).resize((75, 75))
        with Image.open(request_of.media_dir / other.object_id) as two:
            off = np.abs(np.asarray(as_said, np.int16) - np.asarray(two.convert("RGB"), np.int16))
        assert off.mean() < 10


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("mirrored", [Image.Transpose.FLIP_LEFT_RIGHT]),
        ("mirrored, rotated 180", [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180]),
        ("rotated 90 left", [Image.Transpose.ROTATE_90]),
        ("rotated 180", [Image.Transpose.ROTATE_180]),
        ("rotated 90 right", [Image.Transpose.ROTATE_270]),
        ("mirrored, rotated 90 left", [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90]),
        ("mirrored, rotated 90 right", [Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_270]),
    ],
)
def test_each_position_has_the_right_words_and_hash(words: str, steps: list[Image.Transpose]) -> None:
    """To rotate to the left is to turn counterclockwise, which is Pillow's ROTATE_90."""
    (turn,) = [turn for turn, name in turned._NAMES.items() if name == words]
    picture = photo(1)
    by_steps = picture
    for step in steps:
        by_steps = by_steps.transpose(step)
    assert by_steps.tobytes() == picture.transpose(turn).tobytes()
    assert by_steps.transpose(turned._BACK[turn]).tobytes() == picture.tobytes()
    grey = Image.fromarray(np.random.default_rng(2).integers(0, 256, (24, 24), np.uint8)).resize((32, 32))
    hashes = np.stack([turned.hash_small(each) for each in (grey, grey.transpose(turn))])
    assert (turned.hash_turned(hashes[:1], turn)[0] != hashes[1]).sum() <= 16
    assert (hashes[0] != hashes[1]).sum() > turned._DIFFERENT_BITS


def hash_before(picture: Image.Image) -> np.ndarray:
    """What was kept before ImageHash made the hashes: by two products, uint64[4]."""
    grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR))
    cosines = np.cos(np.pi * np.arange(16)[:, np.newaxis] * (2 * np.arange(32) + 1) / 64)
    frequencies = np.round(cosines @ grey @ cosines.T, 6)
    return np.packbits(frequencies > np.median(frequencies)).view(np.uint64)


def test_hashes_have_the_bits_that_were_kept_before() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    pictures = [Image.fromarray(each).resize((50, 32), Image.Resampling.BICUBIC) for each in noise]
    pictures += [Image.new("L", (32, 32), color) for color in (0, 77, 255)]
    hashes = turned._words(np.stack([turned.hash_small(turned.small(each)) for each in pictures]))
    assert (hashes == np.stack([hash_before(each) for each in pictures])).all()


def test_hashes_that_were_kept_before_are_used(
    request_of: NearDuplicatesRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, media = request_of.selection.model_path, tmp_path / "two"
    assert model is not None
    pictures = [photo(0), photo(0).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    for name, picture in zip("ab", pictures, strict=True):
        written(picture, media / f"{name}.png")
    embed(media, model, tmp_path / "other")
    selection = replace(request_of.selection, feature_dir=tmp_path / "other")
    (shard,) = open_gallery(selection.folder).shards
    assert shard.cache is not None
    files = [os.stat(media / f"{name}.png") for name in "ab"]
    lines = [
        [file.st_size, file.st_mtime_ns, *hash_before(picture).tolist()]
        for file, picture in zip(files, pictures, strict=True)
    ]
    shard.cache.write(layout.HASHES, np.array(lines, np.uint64))
    monkeypatch.setattr(imagehash, "phash", lambda *_, **__: pytest.fail("a picture was hashed again"))
    (group,) = found(replace(request_of, selection=selection, media_dir=media))
    assert [member.turned for member in group.members] == [None, "mirrored"]


def test_candidates_are_those_of_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turned, "_BEFORE", 50)
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (30, 16, 16)).astype(bool)[rng.integers(0, 30, 300)]
    for place, turn in enumerate(rng.permutation(np.arange(300) % 8)):
        if turn < 7:
            bits[place] = turned.hash_turned(bits[place : place + 1], TURNS[turn])[0]
    bits ^= rng.random(bits.shape) < rng.choice([0.02, 0.15, 0.2], (300, 1, 1))
    wanted = set()
    for turn in TURNS:
        back = turned.hash_turned(bits, turned._BACK[turn])
        for other in range(300):
            off = bits[:other] != back[other]
            near = (off.sum(axis=(1, 2)) <= turned._DIFFERENT_BITS) & (
                off[:, ::2, ::2].sum(axis=(1, 2)) <= turned._DIFFERENT_EVEN_BITS
            )
            wanted |= {(some, other, int(turn)) for some in np.flatnonzero(near).tolist()}
    columns = [np.concatenate(column) for column in zip(*turned._candidates(turned._words(bits)), strict=True)]
    found = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(wanted) > 500 and len(found) == len(wanted) and set(found) == wanted


def test_similarities_are_those_of_the_picture_turned_back(request_of: NearDuplicatesRequest, tmp_path: Path) -> None:
    """By brute force: the copy turned back by hand, as a lossless file, and embedded like any picture."""
    assert request_of.selection.model_path is not None and request_of.media_dir is not None
    model = load_model(request_of.selection.model_path)
    for seed, group in enumerate(found(request_of)[:7]):
        first, *_ = group.members
        (other,) = [member for member in group.members if member.turned]
        with Image.open(request_of.media_dir / other.object_id) as file:
            file.convert("RGB").transpose(turned._BACK[TURNS[seed]]).save(tmp_path / "back.png")
        paths = [request_of.media_dir / first.object_id, tmp_path / "back.png"]
        a, b = embed_images(paths, model, load_encoder(model, Device.cpu), MAX_PIXELS).features.astype(np.float64)
        assert other.similarity == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)


def test_a_copy_whose_exif_says_how_it_is_turned_is_upright_czkawka_1540(
    request_of: NearDuplicatesRequest, tmp_path: Path
) -> None:
    """It looks upright, so nothing is turned; the model is told to see it so."""
    assert request_of.media_dir is not None
    model = tiny_model(tmp_path / "upright.onnx", size=16, length=96, seed=3)
    layout.toml_file(model).write_text("[input]\nexif_orientation = true\n")
    media = tmp_path / "one"
    written(photo(40), media / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    written(photo(40).transpose(Image.Transpose.ROTATE_90), media / "b.jpg", quality=90, exif=exif)
    embed(media, model, tmp_path / "other")
    selection = Selection(feature_dir=tmp_path / "other", model_path=model)
    (group,) = found(replace(request_of, selection=selection, media_dir=media))
    assert [member.turned for member in group.members] == [None, None]
    assert group.members == found(replace(request_of, selection=selection, media_dir=media, turned=False))[0].members


def test_decided_pairs_stay_away(request_of: NearDuplicatesRequest, tmp_path: Path) -> None:
    pairs = [("00.png", "00-turned.jpg"), ("00-copy.jpg", "00-turned.jpg")]
    append_decisions(
        tmp_path / "d.jsonl",
        [Decision(Verdict.different, (DecidedObject(path=a), DecidedObject(path=b))) for a, b in pairs],
    )
    group, *others = found(replace(request_of, decisions=tmp_path / "d.jsonl"))
    assert {member.object_id for member in group.members} == {"00.png", "00-copy.jpg"} and not group.see_also
    assert len(others) == ORIGINALS - 1


def test_pictures_are_read_once(request_of: NearDuplicatesRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, opened = found(request_of), []
    open_picture = turned.open_picture
    monkeypatch.setattr(
        turned,
        "open_picture",
        lambda path, *given, **more: opened.append(path.name) or open_picture(path, *given, **more),
    )
    assert found(request_of) == groups
    # One of each pair of candidates is embedded again, of other pictures nothing is read.
    assert opened and {name[:2] for name in opened} == {f"{seed:02d}" for seed in range(7)}
    assert request_of.media_dir is not None
    opened.clear()
    path = request_of.media_dir / "11.png"
    written(photo(0).transpose(Image.Transpose.ROTATE_180), path)
    os.utime(path, (1, 1))
    found(request_of)
    assert "11.png" in opened


def test_a_picture_that_is_gone_is_said(request_of: NearDuplicatesRequest) -> None:
    assert request_of.media_dir is not None
    (request_of.media_dir / "00-turned.jpg").unlink()
    (request_of.media_dir / "01-turned.jpg").write_bytes(b"no picture")
    said: list[str] = []
    groups = found(request_of, said)
    assert [len(group.members) for group in groups[:3]] == [2, 2, 3]
    assert any("2 pictures could not be read" in line for line in said)


def test_chosen_and_reference_members_keep_how_they_are_turned(request_of: NearDuplicatesRequest) -> None:
    from search.duplicates.keep import parse_rules

    first, *_ = found(replace(request_of, keep=parse_rules("path=02-turned,bytes")))[2:]
    assert first.members[0].object_id == "02-turned.jpg" and first.members[0].turned is None
    # The other way round: what was rotated to the left is kept, so the others are rotated to the right.
    assert [member.turned for member in first.members[1:]] == ["rotated 90 right"] * 2
    assert all(member.similarity >= THRESHOLD for member in first.members)


def test_output_says_how_a_copy_is_turned(
    request_of: NearDuplicatesRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = found(request_of)
    write_groups(groups[:1], GroupFormat.table, request_of.media_dir, null=False)
    table = capsys.readouterr().out
    assert "turned" in table.splitlines()[1] and "mirrored" in table
    write_groups(groups[-1:], GroupFormat.table, request_of.media_dir, null=False)
    assert "turned" not in capsys.readouterr().out
    write_groups(groups[:1], GroupFormat.jsonl, request_of.media_dir, null=False)
    members = json.load(io.StringIO(capsys.readouterr().out))["members"]
    assert [member["turned"] for member in members].count("mirrored") == 1


def test_python_finds_the_same(request_of: NearDuplicatesRequest) -> None:
    selection, media = request_of.selection, request_of.media_dir
    gallery = ruiji.open_gallery(selection.feature_dir, model=selection.model_path)
    duplicates = gallery.near_duplicates(THRESHOLD, turned=True, media_dir=media)
    assert list(duplicates) == found(request_of)
    assert "mirrored" in duplicates.to_arrow().column("turned").to_pylist()
    with pytest.raises(UsageError, match="say where they are with media_dir"):
        gallery.near_duplicates(THRESHOLD, turned=True)
    with pytest.raises(UsageError, match="give it to open_gallery as model"):
        ruiji.open_gallery(selection.feature_dir).near_duplicates(THRESHOLD, turned=True, media_dir=media)
    assert media is not None
    (media / "00-turned.jpg").unlink()
    with pytest.warns(ruiji.RuijiWarning, match="1 picture could not be read"):
        gallery.near_duplicates(THRESHOLD, turned=True, media_dir=media)


def test_what_it_needs_is_said(request_of: NearDuplicatesRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="--media-dir"):
        replace(request_of, media_dir=None)
    with pytest.raises(UsageError, match="--model"):
        replace(request_of, selection=replace(request_of.selection, model_path=None))
    with pytest.raises(UsageError, match="--decided"):
        replace(request_of, decided=True)
    assert request_of.media_dir is not None
    with pytest.raises(UsageError, match="no media folder"):
        found(replace(request_of, media_dir=request_of.media_dir / "nowhere"))
    for missing in ("imagehash", "scipy.fftpack"):
        monkeypatch.delitem(sys.modules, "search.duplicates.turned", raising=False)
        with monkeypatch.context() as without:
            without.setitem(sys.modules, missing, None)
            with pytest.raises(
                UsageError, match=rf"need the extra turned .*{missing}.* make setup, or .*'ruiji\[turned\]'"
            ):
                found(request_of)


def test_only_who_asks_for_turned_copies_loads_what_they_need(request_of: NearDuplicatesRequest) -> None:
    script = (
        "import sys\nfrom pipeline.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code\n"
        "print(sorted({'imagehash', 'scipy', 'pywt'} & set(sys.modules)), file=sys.stderr)"
    )
    selection, media = request_of.selection, str(request_of.media_dir)
    command = [sys.executable, "-c", script, "near-duplicates", "--feature-dir", str(selection.feature_dir)]
    command += ["--model", str(selection.model_path), "--media-dir", media, "--threshold", str(THRESHOLD)]
    for more, loaded in (([], "[]"), (["--turned"], "['imagehash', 'scipy']")):
        done = subprocess.run([*command, *more], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr.splitlines()[-1] == loaded, done.stderr


def test_a_gallery_without_paths_has_no_pictures(request_of: NearDuplicatesRequest, tmp_path: Path) -> None:
    assert request_of.selection.model_path is not None
    folder = layout.gallery_folder(tmp_path / "g", request_of.selection.model_path)
    write_article_shard(folder, 0, np.eye(3, 96, dtype=np.float32), ["a", "b", "c"])
    selection = replace(request_of.selection, feature_dir=tmp_path / "g")
    with pytest.raises(UsageError, match="does not know paths"):
        found(replace(request_of, selection=selection))
