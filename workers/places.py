"""Where a worker's processes run: which GPUs of this machine it may have, and which process is on which."""

import logging
import time
from dataclasses import dataclass

from pipeline.choices import Device, Role
from workers.devices import LONGEST_PAUSE_S, Gpu, probe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """One process of a worker.

    Attributes:
        role: embed or reduce.
        gpu: where it embeds; None: on the CPU.
    """

    role: Role
    gpu: Gpu | None = None

    def variables(self) -> dict[str, str]:
        """What its environment has besides the worker's settings."""
        return {"CUDA_VISIBLE_DEVICES": self.gpu.uuid} if self.gpu is not None else {}


def gpus_for(device: Device) -> tuple[Gpu, ...]:
    """The GPUs on which the model can run, where a device was asked for; none means the CPU, and is told.

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
