"""Where a worker's processes run: which GPUs of this machine it may have, and which process is on which."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.choices import Device, Role
from workers.devices import LONGEST_PAUSE_S, Gpu, probe

#: An interpreter's lock is held for about 0.6 ms per image, and two cores decode one in 0.7 ms: so many cores a process
#: keep busy, and eight processes 13,000 images/s, more than a GPU is known to encode.
_CORES, _MOST_PROCESSES = 2, 8
#: MB on the GPU that a process takes for CUDA itself, and for a model like MobileNet at work.
_CONTEXT_MB, _MODEL_MB = 512, 1536
#: A reducer takes about 0.2 ms per image, so that one could not follow a GPU.
_CUDA_REDUCERS = 2

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """One process of a worker.

    Attributes:
        role: any but all.
        gpu: where it computes; None: on the CPU.
    """

    role: Role
    gpu: Gpu | None = None

    def variables(self) -> dict[str, str]:
        """What its environment has besides the worker's settings."""
        return {"CUDA_VISIBLE_DEVICES": self.gpu.uuid} if self.gpu is not None else {}


def cores_per_slot(gpus: Sequence[Gpu], slots_per_device: int) -> int:
    """Cores for the processes of one slot: this machine's GPUs share them; without GPUs all of them."""
    return max(1, len(os.sched_getaffinity(0)) // (len(gpus) * slots_per_device or 1))


def place_processes(
    role: Role, gpus: Sequence[Gpu], cores: int, processes: int | None, slots_per_device: int, gpu_memory_mb: int | None
) -> list[Place]:
    """The processes of a worker.

    Args:
        gpus: one for each slot that the worker has; none: the CPU embeds.
        cores: see `cores_per_slot`.
        processes: as asked for, on the CPU or for each slot.
        gpu_memory_mb: limit of one process' arena on CUDA, if there is one.
    """
    if role is Role.compare:
        # One process has all cores for its products, and keeps the gallery's rows on its GPU.
        return [Place(role, gpu) for gpu in gpus or (None,) for _ in range(processes or 1)]
    places = []
    if role is not Role.reduce and not gpus:
        places += [Place(Role.embed)] * (processes or cores)
    for gpu in gpus if role is not Role.reduce else ():
        places += [Place(Role.embed, gpu)] * (processes or _feeding(gpu, cores, slots_per_device, gpu_memory_mb))
    if role is not Role.embed:
        places += [Place(Role.reduce)] * (_CUDA_REDUCERS if role is Role.all and gpus else 1)
    return places


def _feeding(gpu: Gpu, cores: int, slots_per_device: int, gpu_memory_mb: int | None) -> int:
    """How many processes feed one slot of a GPU: as cores and its memory allow, and as it can use."""
    if gpu.exclusive:
        return 1
    share_mb = gpu.total_mb // slots_per_device
    free_mb = share_mb if gpu.free_mb is None else min(share_mb, gpu.free_mb)
    fitting = free_mb // (_CONTEXT_MB + (gpu_memory_mb or _MODEL_MB))
    return max(1, min(cores // _CORES, fitting, _MOST_PROCESSES))


def gpus_for(device: Device) -> tuple[Gpu, ...]:
    """The GPUs on which the model can run, if a device was asked for; none means the CPU, and is told.

    Where `cuda` was asked for, a fault that may pass is waited for.

    Raises:
        UsageError: `cuda` was asked for and there is none.
    """
    if device is Device.cpu:
        return ()
    found, pause = probe(), 1.0
    while device is Device.cuda and found.passes:
        extra = {"event": "waiting_for_gpu"}
        logger.warning("%s; looking again in %g s", found.fault(), pause, extra=extra)
        time.sleep(pause)
        found, pause = probe(), min(2 * pause, LONGEST_PAUSE_S)
    for reason in found.refused if found.usable else ():
        logger.warning("%s; it is left out", reason, extra={"event": "gpu_refused"})
    if not found.usable and device is Device.cuda:
        raise found.fault()
    if not found.usable and found.built:
        logger.warning("%s; the CPU runs the model", found.fault(), extra={"event": "gpu_refused"})
    return found.usable
