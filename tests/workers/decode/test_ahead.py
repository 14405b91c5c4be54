"""Decoding a batch by several threads into one array."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.factories import picture
from tests.workers.decode.test_images import LIMIT, SPEC
from workers.decode.ahead import Decoders
from workers.decode.files import open_image
from workers.decode.images import decode, load_pixels
from workers.decode.resize import has_filter, resize


def names(numbers: list[int]) -> list[str]:
    return list(map(str, numbers))


def test_each_place_gets_its_own_whichever_thread_comes() -> None:
    decoders = Decoders(3, SPEC)
    all_three = threading.Barrier(3)

    def square(number: int, file: str) -> tuple[int, str]:
        if number in (40, 44, 48):  # The first that each of them reads at the end.
            all_three.wait(180)
        return number * number, file

    for count in (0, 1, 50):
        expected = [(number * number, str(number)) for number in range(count)]
        assert decoders.run(names, square, count) == expected


def test_what_one_thread_raises_is_raised_once_all_have_ended() -> None:
    decoders = Decoders(3, SPEC)
    at_work: set[int] = set()
    begun: list[int] = []

    def load(number: int, _: str) -> None:
        begun.append(number)
        at_work.add(number)
        time.sleep(0.02 if number != 1 else 0)
        at_work.discard(number)
        if number == 1:
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        decoders.run(names, load, 100)
    assert not at_work, "the memory is used again"
    assert len(begun) < 100
    assert decoders.run(names, lambda number, _: number, 3) == [0, 1, 2]


def test_a_thread_reads_a_few_images_before_it_decodes_them() -> None:
    done: list[object] = []

    def read(numbers: list[int]) -> list[str]:
        done.append(numbers)
        return names(numbers)

    def used(number: int, file: str) -> int:
        done.append(file)
        return number

    assert Decoders(1, SPEC).run(read, used, 6) == list(range(6))
    assert done == [[0, 1, 2, 3], *"0123", [4, 5], *"45"]


def test_batches_at_once_have_memory_of_their_own_and_later_ones_use_it_again() -> None:
    decoders = Decoders(1, SPEC)
    with decoders.batch(4) as first, decoders.batch(3) as second:
        assert first.shape == (4, 224, 224, 3) and second.shape == (3, 224, 224, 3)
        assert not np.shares_memory(first, second)
    with decoders.batch(4) as third, decoders.batch(2) as fourth:
        assert np.shares_memory(third, first) and np.shares_memory(fourth, second)


@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_pixels_that_go_into_a_given_place_are_the_same(tmp_path: Path, name: str) -> None:
    path, room = picture(tmp_path / name, size=(300, 200)), np.zeros((2, 224, 224, 3), np.uint8)
    with open_image(path) as file:
        pixels = decode(file, SPEC, LIMIT, None, room[1])
    assert (pixels == load_pixels(path, SPEC, LIMIT)).all()
    assert (pixels is room[1] or np.shares_memory(pixels, room)) == (name == "x.jpg" and has_filter(SPEC.resize))
    assert not room[0].any()


def test_a_place_of_another_shape_is_refused() -> None:
    pixels = np.zeros((300, 200, 4), np.uint8)
    for room in (np.zeros((223, 224, 3), np.uint8), np.zeros((224, 224, 3), np.int8), np.zeros((3, 224, 224)).T):
        with pytest.raises(ValueError, match="room"):
            resize(pixels, (224, 224), (0, 0, 224, 224), "bicubic", room)
