"""How many processes a worker has, and where: by cores and by the memory of GPUs."""

import os

import pytest

from pipeline.choices import Role
from workers.devices import Gpu
from workers.places import Place, cores_per_slot, place_processes


def gpu(free_mb: int | None = 140_000, total_mb: int = 143_000, exclusive: bool = False) -> Gpu:
    return Gpu("GPU-a", "NVIDIA H200", (9, 0), total_mb, free_mb, exclusive)


def embedding(gpus: list[Gpu], cores: int, slots: int = 1, limit_mb: int | None = None) -> int:
    return len(place_processes(Role.embed, gpus, cores, None, slots, limit_mb))


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 1), (4, 2), (16, 8), (128, 8)])
def test_two_cores_feed_a_process_and_eight_processes_a_gpu(cores: int, processes: int) -> None:
    assert embedding([gpu()], cores) == processes


def test_the_gpus_memory_bounds_them() -> None:
    assert embedding([gpu(7_500, 8_000)], 16) == 3
    assert embedding([gpu(1_000, 8_000)], 16) == 1
    assert embedding([gpu(None, 8_000)], 16) == 3, "it did not answer"
    assert embedding([gpu(7_500, 8_000)], 16, slots=2) == 1, "the other slot needs its half"
    assert embedding([gpu(7_500, 8_000)], 16, limit_mb=500) == 7
    assert embedding([gpu(exclusive=True)], 16) == 1


def test_on_the_cpu_a_process_has_a_core() -> None:
    assert place_processes(Role.all, [], 3, None, 1, None) == [*[Place(Role.embed)] * 3, Place(Role.reduce)]


def test_what_is_asked_for_counts_for_each_slot() -> None:
    one, other = gpu(), Gpu("GPU-b", "NVIDIA H200", (9, 0), 143_000)
    places = place_processes(Role.all, [one, other], 16, 3, 1, None)
    assert places == [*[Place(Role.embed, one)] * 3, *[Place(Role.embed, other)] * 3, *[Place(Role.reduce)] * 2]
    assert place_processes(Role.reduce, [], 16, 3, 1, None) == [Place(Role.reduce)]


def test_comparing_takes_one_process_for_all_cores_or_for_each_slot() -> None:
    one, other = gpu(), Gpu("GPU-b", "NVIDIA H200", (9, 0), 143_000)
    assert place_processes(Role.compare, [], 16, None, 1, None) == [Place(Role.compare)]
    assert place_processes(Role.compare, [], 16, 3, 1, None) == [Place(Role.compare)] * 3
    assert place_processes(Role.compare, [one, other], 16, None, 1, None) == [
        Place(Role.compare, one),
        Place(Role.compare, other),
    ]


def test_the_slots_of_a_machine_share_its_cores() -> None:
    cores = len(os.sched_getaffinity(0))
    assert cores_per_slot([], 2) == cores
    assert cores_per_slot([gpu()], 1) == cores
    assert cores_per_slot([gpu()] * 2 * cores, 2) == 1
