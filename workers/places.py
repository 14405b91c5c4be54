"""Where a worker's processes run: which GPUs of this machine it may have."""

import logging

from pipeline.choices import Device
from workers.devices import Gpu, probe

logger = logging.getLogger(__name__)


def gpus_for(device: Device) -> tuple[Gpu, ...]:
    """The GPUs on which the model can run, where a device was asked for; none means the CPU, and is told.

    Raises:
        UsageError, DeviceFault: `cuda` was asked for and there is none; the latter may pass.
    """
    if device is Device.cpu:
        return ()
    found = probe()
    for reason in found.refused if found.usable else ():
        logger.warning("%s; it is left out", reason, extra={"event": "gpu_refused"})
    if not found.usable and device is Device.cuda:
        raise found.fault()
    if not found.usable and found.built:
        logger.warning("%s; the CPU runs the model", found.fault(), extra={"event": "gpu_refused"})
    return found.usable
