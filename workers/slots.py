"""GPU slots: workers that all start alike spread over the devices of their machine, or one takes them all.

Every replica of a compose service sees the same devices, in the same order (docker/compose#11863), and would take the
first. So each worker leases slots in Redis and shows each of its processes one device. A slot is named by the device's
UUID, not by host and number: containers have host names of their own, and several machines share one Redis.

`python -m workers.slots` prints how many workers it takes for all slots of this machine.
"""

import logging
import math
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial

import redis
from redis.lock import Lock

from pipeline.errors import BrokerUnavailable
from pipeline.queue.connection import connect
from pipeline.queue.keys import slot_key
from pipeline.queue.leases import lease, renewed
from pipeline.settings import SLOTS_PER_DEVICE
from pipeline.worker_settings import read_variables
from workers.devices import Gpu, probe

logger = logging.getLogger(__name__)

#: A dead worker's slot is free again after this long.
LEASE_S = 30.0
#: How often a waiting worker looks for a free slot.
_LOOK_S = 2.0


@contextmanager
def leased_gpus(redis_url: str, gpus: Sequence[Gpu], slots_per_device: int, most: int | None) -> Iterator[list[Gpu]]:
    """Lease slots of some GPUs for a worker's processes for as long as the block takes; see `device_slots`.

    Yields:
        One GPU for each slot. All as they are, where `CUDA_VISIBLE_DEVICES` says already which are to be used.
    """
    if not gpus or "CUDA_VISIBLE_DEVICES" in os.environ:
        yield list(gpus)
        return
    by_uuid, since = {gpu.uuid: gpu for gpu in gpus}, time.monotonic()
    with (
        closing(connect(redis_url)) as client,
        device_slots(client, list(by_uuid), slots_per_device, most) as devices,
    ):
        if time.monotonic() - since > _LOOK_S:
            # Who had the slot had its memory too.
            by_uuid |= {gpu.uuid: gpu for gpu in probe().usable}
        yield [by_uuid[device] for device in devices]


@contextmanager
def device_slots(
    client: redis.Redis, devices: list[str], slots_per_device: int, most: int | None = None
) -> Iterator[list[str]]:
    """Hold the free slots of some devices for as long as the block takes; wait for one while all are taken.

    Each time the device with the fewest workers gives one. The leases are renewed by threads. Where one was lost (this
    process stood still, or Redis was away) it is taken again; if another worker has it by then, this process gets a
    SIGTERM, ends in order and can be started again for other slots.

    Args:
        devices: UUIDs, at least one.
        most: how many slots to take; None: all that are free.

    Yields:
        A device's UUID for each slot.

    Raises:
        BrokerUnavailable: Redis went away.
    """
    held: list[str] = []
    with ExitStack() as stack:
        try:
            taken: tuple[Lock, str] | None = _wait_for_one(client, devices, slots_per_device)
            while taken is not None:
                slot, device = taken
                stack.callback(_give_back, slot)
                stack.enter_context(renewed(slot, partial(_regained, slot)))
                logger.info("device leased", extra={"event": "slot_taken", "device": device, "slot": slot.name})
                held.append(device)
                full = most is not None and len(held) >= most
                taken = None if full else _take(client, devices, slots_per_device)
        except redis.RedisError as error:
            raise BrokerUnavailable(f"Redis went away during the search for a GPU slot: {error}") from None
        yield held


def _give_back(slot: Lock) -> None:
    with suppress(redis.RedisError):
        slot.release()


def _slots(client: redis.Redis, device: str, slots_per_device: int) -> list[Lock]:
    return [lease(client, slot_key(device, number), LEASE_S) for number in range(slots_per_device)]


def _wait_for_one(client: redis.Redis, devices: list[str], slots_per_device: int) -> tuple[Lock, str]:
    """A slot and its device, once one is free."""
    told = False
    while (taken := _take(client, devices, slots_per_device)) is None:
        if not told:
            keys = [slot.name for device in devices for slot in _slots(client, device, slots_per_device)]
            held = sorted(str(holder).rpartition(":")[0] for holder in client.mget(keys) if holder is not None)
            words = f"all {len(keys)} GPU slots are taken ({slots_per_device} per device), by {', '.join(held)}"
            words += "; waiting for one (start fewer workers, or set RUIJI_SLOTS_PER_DEVICE)"
            logger.warning("%s", words, extra={"event": "slot_waiting"})
            told = True
        time.sleep(_LOOK_S)
    if told:
        # A worker that ends gives its slots back one after the other; the next takes them all.
        time.sleep(_LOOK_S)
    return taken


def _take(client: redis.Redis, devices: list[str], slots_per_device: int) -> tuple[Lock, str] | None:
    """A free slot of the device with the fewest workers, and that device; None while all are taken."""
    slots = {device: _slots(client, device, slots_per_device) for device in devices}
    # The token is what the key holds: it tells who has the slot.
    token = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"
    while True:
        holders = {device: [client.get(slot.name) for slot in slots[device]] for device in devices}
        free = [device for device in devices if None in holders[device]]
        if not free:
            return None
        device = min(free, key=lambda name: sum(holder is not None for holder in holders[name]))
        slot = slots[device][holders[device].index(None)]
        if slot.acquire(token=token):
            return slot, device
        # Another worker was faster; the counts are old.


def _regained(slot: Lock) -> bool:
    # Free: Redis was emptied, or away for longer than the lease.
    if slot.acquire(token=slot.local.token):
        return True
    logger.error("another worker took this one's GPU slot", extra={"event": "slot_lost"})
    os.kill(os.getpid(), signal.SIGTERM)
    return False


def _main() -> None:
    found = probe()
    if not found.usable:
        print(f"error: {found.fault()}", file=sys.stderr)
        raise SystemExit(found.fault().exit_code)
    slots_per_device = read_variables(os.environ, ("slots_per_device",)).get("slots_per_device", SLOTS_PER_DEVICE)
    slots = len(found.usable) * slots_per_device
    # A worker refuses what is no number; without one it takes all that are free.
    most = os.environ.get("RUIJI_SLOTS", "")
    print(math.ceil(slots / int(most)) if most.isdecimal() and int(most) else 1)


if __name__ == "__main__":
    _main()
