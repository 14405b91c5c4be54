"""Planted groups of real pictures, really embedded: altered copies, decoys below the threshold, chains, strangers."""

import io
import itertools
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.choices import Device
from pipeline.model import load_model
from pipeline.settings import MAX_PIXELS
from search.queries import embed_pictures, load_encoder
from tests.chaos.harness import sized
from tests.factories import tiny_model
from tests.search.duplicates.test_clean_up import THRESHOLD, Home, near_pairs

Features: TypeAlias = dict[str, NDArray[np.float32]]
SIZE = (90, 70)


def photo(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), np.uint8)
    return Image.fromarray(noise).resize(SIZE, Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def copies(picture: Image.Image, seed: int) -> Iterator[tuple[str, bytes]]:
    """Some altered copies, as people and programs make them."""
    width, height = picture.size
    marked = picture.copy()
    ImageDraw.Draw(marked).line((5, height // 2, width - 5, height // 2), "white", 3)
    turn = list(Image.Transpose)[seed % 7]
    kinds = {
        "encoded": encoded(picture, 50),
        "scaled": encoded(picture.resize((width // 2, height // 2))),
        "cropped": encoded(picture.crop((1, 1, width - 1, height - 1))),
        "marked": encoded(marked),
        "turned": encoded(picture.transpose(turn), 70),
    }
    for name in random.Random(seed).sample(sorted(kinds), 2 + seed % 4):
        yield name, kinds[name]


class Camera:
    """Embeds pictures as workers do."""

    def __init__(self, model: Path) -> None:
        self.model = load_model(model)
        self._encoder = load_encoder(self.model, Device.cpu)

    def features(self, pictures: Mapping[str, "bytes | Image.Image"]) -> Features:
        made = embed_pictures(list(pictures.values()), self.model, self._encoder, MAX_PIXELS)
        found: Features = {}
        for name, feature in zip(pictures, made, strict=True):
            assert isinstance(feature, np.ndarray)
            found[name] = feature
        return found

    def decoy(self, picture: Image.Image, seed: int) -> bytes:
        """A picture that is as like another one as it can be below the threshold, within a step."""
        steps = {f"{step}": encoded(Image.blend(picture, photo(seed), step / 40)) for step in range(41)}
        made = self.features({"": encoded(picture), **steps})
        feature = made.pop("")
        similar = {step: cosine(feature, other) for step, other in made.items()}
        return steps[max((step for step in steps if similar[step] < THRESHOLD), key=lambda step: similar[step])]


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def planted(camera: Camera, groups: int, alone: int, chains: int) -> dict[str, bytes]:
    files = {}
    for seed in range(groups):
        picture = photo(seed)
        files[f"g{seed}.jpg"] = encoded(picture)
        files |= {f"g{seed}-{name}.jpg": data for name, data in copies(picture, seed)}
        files[f"g{seed}-decoy.jpg"] = camera.decoy(picture, 10**6 + seed)
    for chain in range(chains):
        ends = [photo(2 * 10**6 + 11 * chain + end) for end in range(11)]
        # From one picture to the next in five steps: each is like the next one, and none like the fourth.
        for step in range(50):
            picture = Image.blend(ends[step // 5], ends[step // 5 + 1], step % 5 / 5)
            files[f"chain{chain}-{step:02d}.jpg"] = encoded(picture)
    return files | {f"alone{seed}.jpg": encoded(photo(3 * 10**6 + seed)) for seed in range(alone)}


def test_cropped_copies_czkawka_1575(tmp_path: Path) -> None:
    """A copy without its margins, a tenth of each side: found by its feature, beside the decoy that is not."""
    camera = Camera(tiny_model(tmp_path / "m.onnx", size=16, length=64))
    home = Home(tmp_path / "media", tmp_path / "features", camera.model)
    width, height = SIZE
    margins = (width // 20, height // 20, width - width // 20, height - height // 20)
    files = {}
    for seed in range(12):
        picture = photo(seed)
        files[f"{seed}.jpg"] = encoded(picture)
        files[f"{seed}-cropped.jpg"] = encoded(picture.crop(margins))
        files[f"{seed}-decoy.jpg"] = camera.decoy(picture, 10**6 + seed)
    home.add(camera.features(files), files)
    groups = home.found()
    for seed in range(12):
        (group,) = [one for one in groups if f"{seed}.jpg" in one]
        assert f"{seed}-cropped.jpg" in group and f"{seed}-decoy.jpg" not in group


def test_planted_copies_of_real_pictures_are_decided_once_and_new_ones_all_appear(tmp_path: Path) -> None:
    decide_planted(tmp_path, groups=7, alone=10, chains=1, new=5)


@pytest.mark.chaos
def test_a_thousand_planted_groups_of_real_pictures_are_decided_once(tmp_path: Path) -> None:
    decide_planted(tmp_path, groups=sized(40, 1000), alone=sized(80, 13_500), chains=sized(1, 20), new=sized(20, 500))


def decide_planted(tmp_path: Path, groups: int, alone: int, chains: int, new: int) -> None:
    """Decide about all that is shown, add copies and new pictures, and hold both against a brute force."""
    camera = Camera(tiny_model(tmp_path / "m.onnx", size=16, length=64))
    home, choice = Home(tmp_path / "media", tmp_path / "features", camera.model), random.Random(0)
    files = planted(camera, groups, alone, chains)
    photos = camera.features(files)
    home.add(photos, files)
    settled: set[frozenset[str]] = set()
    # Each round settles pairs, so it ends; a chain of 50 takes dozens of rounds.
    while found := home.groups("--turned", "--keep", "pixels,bytes"):
        decisions = []
        for group in found:
            ids = [member["object_id"] for member in group["members"]]
            different = choice.random() < 0.3
            decisions.append({"decision": "different", "objects": ids} if different else group)
            asked = {frozenset(both) for both in itertools.combinations(ids, 2)}
            assert asked, "each group asks about a pair"
            assert not asked & settled, "no decided pair comes back"
            assert least_turned(camera, files, group["members"]) >= THRESHOLD - 1e-6
            settled |= asked
        home.decide_all(decisions)
    assert near_pairs(photos) <= settled, "every pair at or above the threshold was decided"
    assert turned_copies(camera, files) <= settled, "and every copy that was turned"

    base = choice.sample(range(groups), min(new, groups))
    more = {f"new{seed}.jpg": encoded(photo(seed), 80) for seed in base}
    more |= {f"fresh{seed}.jpg": encoded(photo(4 * 10**6 + seed)) for seed in range(new)}
    made = camera.features(more)
    home.add(made, more)
    every = near_pairs(photos | made)
    shown: set[str] = set()
    for group in home.groups("--turned"):
        ids = [member["object_id"] for member in group["members"]]
        assert not {frozenset(both) for both in itertools.combinations(ids, 2)} & settled, "no decided pair comes back"
        assert least_turned(camera, files | more, group["members"]) >= THRESHOLD - 1e-6
        shown |= {*ids, *(other["object_id"] for other in group["see_also"])}
    appear = {name for pair in every - settled for name in pair if name in more}
    assert appear <= shown and {f"new{seed}.jpg" for seed in base} <= appear, "every new copy appears"
    named = set(home.to_remove())
    assert named and not named & more.keys()


def least_turned(camera: Camera, files: Mapping[str, bytes], members: list[dict[str, str]]) -> float:
    """The least similarity of two members, each pair in the position that it is most similar in."""
    pictures = {}
    for member in members:
        name = member["object_id"]
        with Image.open(io.BytesIO(files[name])) as file:
            picture = file.convert("RGB")
        pictures |= {f"{name}/{turn}": picture.transpose(turn) for turn in Image.Transpose}
        pictures[name] = picture
    made = camera.features(pictures)
    least = 1.0
    for one, other in itertools.combinations([member["object_id"] for member in members], 2):
        ways = [cosine(made[one], made[name]) for name in made if name.partition("/")[0] == other]
        ways += [cosine(made[other], made[name]) for name in made if name.partition("/")[0] == one]
        least = min(least, max(ways))
    return least


def turned_copies(camera: Camera, files: Mapping[str, bytes]) -> set[frozenset[str]]:
    """The planted originals and their turned copies, where the copy reaches the threshold once it is turned back."""
    found = set()
    for name in files:
        if name.endswith("-turned.jpg"):
            original = name.replace("-turned", "")
            pair = [{"object_id": original}, {"object_id": name}]
            if least_turned(camera, files, pair) >= THRESHOLD + 0.005:
                found.add(frozenset((original, name)))
    assert found
    return found
