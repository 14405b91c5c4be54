"""A gallery of look-alikes with features of one's choice, and how a service is asked to clean it up."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.gallery import claim_gallery
from pipeline.model import load_model
from pipeline.objects import IdScheme
from pipeline.store import recorded_shards
from tests.factories import Ruiji, wait_until
from tests.search.galleries import write_shard
from tests.serve.conftest import Answer, Served

LENGTH = 12


def look_alikes(groups: int, members: int = 2, seed: int = 0) -> NDArray[np.float32]:
    """Features of groups, float32[groups * members, d]: within one all but equal, of two far apart."""
    random = np.random.default_rng(seed)
    found: list[NDArray[np.float64]] = []
    while len(found) < groups:
        one = random.normal(size=LENGTH)
        one /= np.linalg.norm(one)
        if not found or np.max(np.stack(found) @ one) < 0.9:
            found.append(one)
    near = np.repeat(np.stack(found), members, axis=0)
    return (near + random.normal(size=near.shape) * 0.002).astype(np.float32)


def draw(path: Path, number: int, side: int) -> None:
    """A picture that a person can tell from others, the larger the sharper."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hue = number * 47 % 360
    image = Image.new("RGB", (side * 4 // 3, side), f"hsl({hue}, 45%, 30%)")
    drawn = ImageDraw.Draw(image)
    for n in range(4):
        x, y, r = (number * 31 + n * 97) % 100, (number * 17 + n * 61) % 100, 12 + (number * 7 + n * 11) % 20
        box = [image.width * (x - r) / 100, side * (y - r) / 100, image.width * (x + r) / 100, side * (y + r) / 100]
        drawn.ellipse(box, fill=f"hsl({(hue + 60 * (n + 1)) % 360}, 70%, {45 + 10 * n}%)")
    image.save(path, quality=85)


def write_look_alikes(
    ruiji: Ruiji, groups: int, members: int = 2, pictures: bool = True, shard_rows: int = 1000
) -> list[list[str]]:
    """A gallery whose groups are `NNN/large.jpg`, `NNN/small1.jpg`, …; returns their paths. The first has most pixels.

    Without `pictures`, each file has a few bytes that are no picture.
    """
    named = [
        [f"{n:03d}/{n:03d}-{'large' if m == 0 else f'small{m}'}.jpg" for m in range(members)] for n in range(groups)
    ]
    paths = [path for group in named for path in group]
    for n, group in enumerate(named):
        for m, path in enumerate(group):
            if pictures:
                draw(ruiji.media / path, n, 96 // (m + 1))
            else:
                (ruiji.media / path).parent.mkdir(parents=True, exist_ok=True)
                (ruiji.media / path).write_bytes(path.encode())
    add_rows(ruiji, paths, look_alikes(groups, members), shard_rows)
    return named


def add_rows(ruiji: Ruiji, paths: list[str], features: NDArray[np.float32], shard_rows: int = 1000) -> None:
    """Write the shards of files that are there."""
    model = load_model(ruiji.model)
    folder = layout.gallery_folder(ruiji.features, ruiji.model)
    claim_gallery(folder, model, IdScheme(ObjectIds.basename))
    digests = [hashlib.sha256((ruiji.media / path).read_bytes()).digest() for path in paths]
    made = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
    first = len(recorded_shards(folder))
    for number, start in enumerate(range(0, len(paths), shard_rows), first):
        rows = slice(start, start + shard_rows)
        write_shard(folder, number, features[rows], paths[rows], model.fingerprint, digests=made[rows])


def send(served: Served, path: str, body: Any = None, **headers: str) -> Answer:
    given = {"Origin": served.origin, "Content_Type": "application/json", **headers}
    return served.ask("POST", path, json.dumps({} if body is None else body).encode(), **given)


def compare(served: Served, query: str = "") -> None:
    """Have all pairs compared."""
    assert send(served, f"/duplicates/compare{query}").status == 202
    wait_until(lambda: look(served, query)["comparison"]["state"] in ("ready", "failed"), 120, "the comparison")
    assert look(served, query)["comparison"]["state"] == "ready"


def look(served: Served, query: str = "") -> Any:
    answer = served.get(f"/duplicates{query}")
    assert answer.status == 200, answer.error
    return answer.json()


def comparers(served: Served) -> list[int]:
    """The children that compare."""
    found = []
    for child in served.decoders():
        try:
            if b"serve.comparer" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(child)
        except OSError:
            continue
    return found
