"""Where a worker's processes run: which GPUs of this machine it may have."""

import logging
import time

from pipeline.choices import Device
from workers.devices import LONGEST_PAUSE_S, Gpu, probe

logger = logging.getLogger(__name__)


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
