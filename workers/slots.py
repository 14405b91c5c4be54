"""GPU slots: workers that all start alike spread over the devices of their machine.

Every replica of a compose service sees the same devices, in the same order (docker/compose#11863), and
would take the first. So each worker leases a slot of one device in Redis and shows only that device to its
processes. A slot is named by the device's UUID, not by host and number: containers have host names of their
own, and several machines share one Redis.
"""

import logging
import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress

import redis
from redis.lock import Lock

from pipeline.errors import BrokerUnavailable
from pipeline.queue.connection import connect
from pipeline.queue.keys import slot_key
from pipeline.queue.leases import lease, renewed
from workers.devices import Gpu

logger = logging.getLogger(__name__)

#: A dead worker's slot is free again after this long.
LEASE_S = 30.0
#: How often a waiting worker looks for a free slot.
_LOOK_S = 2.0


@contextmanager
def one_device(redis_url: str, gpus: Sequence[Gpu], slots_per_device: int) -> Iterator[Gpu]:
    """Lease one of some devices for a worker's processes for as long as the block takes.

    Args:
        gpus: at least one.

    Raises:
        UsageError, BrokerUnavailable: see `device_slot`, `connect`.
    """
    with (
        closing(connect(redis_url)) as client,
        device_slot(client, [gpu.uuid for gpu in gpus], slots_per_device) as device,
    ):
        yield next(gpu for gpu in gpus if gpu.uuid == device)


@contextmanager
def device_slot(client: redis.Redis, devices: list[str], slots_per_device: int) -> Iterator[str]:
    """Hold a slot on the device with the fewest workers for as long as the block takes; wait while all are taken.

    The lease is renewed by a thread. Where it was lost (this process stood still, or Redis was away) it is
    taken again; where another worker has it by then, this process gets a SIGTERM, ends in order and can be
    started again for another slot.

    Args:
        devices: UUIDs, at least one.

    Yields:
        The device's UUID.

    Raises:
        BrokerUnavailable: Redis went away.
    """
    try:
        slot, device = _take(client, devices, slots_per_device)
    except redis.RedisError as error:
        raise BrokerUnavailable(f"Redis went away during the search for a GPU slot: {error}") from None
    logger.info("device leased", extra={"event": "slot_taken", "device": device, "slot": slot.name})
    try:
        with renewed(slot, lambda: _regained(slot)):
            yield device
    finally:
        with suppress(redis.RedisError):
            slot.release()


def _slots(client: redis.Redis, device: str, slots_per_device: int) -> list[Lock]:
    return [lease(client, slot_key(device, number), LEASE_S) for number in range(slots_per_device)]


def _take(client: redis.Redis, devices: list[str], slots_per_device: int) -> tuple[Lock, str]:
    slots = {device: _slots(client, device, slots_per_device) for device in devices}
    # The token is what the key holds: it tells who has the slot.
    token = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
    told = False
    while True:
        holders = {device: [client.get(slot.name) for slot in slots[device]] for device in devices}
        free = [device for device in devices if None in holders[device]]
        if free:
            device = min(free, key=lambda name: sum(holder is not None for holder in holders[name]))
            slot = slots[device][holders[device].index(None)]
            if slot.acquire(token=token):
                return slot, device
            continue  # Another worker was faster; the counts are old.
        held = sorted(str(holder).rpartition(":")[0] for taken in holders.values() for holder in taken)
        words = f"all {len(held)} GPU slots are taken ({slots_per_device} per device), by {', '.join(held)}"
        if not told:
            words += "; waiting for one (start fewer workers, or set RUIJI_SLOTS_PER_DEVICE)"
            logger.warning("%s", words, extra={"event": "slot_waiting"})
            told = True
        time.sleep(_LOOK_S)


def _regained(slot: Lock) -> bool:
    # Free: Redis was emptied, or away for longer than the lease.
    if slot.acquire(token=slot.local.token):
        return True
    logger.error("another worker took this one's GPU slot", extra={"event": "slot_lost"})
    os.kill(os.getpid(), signal.SIGTERM)
    return False
