"""Redis killed, emptied, replaced or cut off: the run goes on by itself and ends with the undisturbed bytes."""

import random
import time

import redis

from pipeline.plans.files import open_plan
from pipeline.queue.connection import connect
from pipeline.queue.keys import unacked_keys
from tests.chaos.conftest import FAST, SHIPPED, Undisturbed, finish
from tests.chaos.harness import Network, Server, progress, sized, wait_for_progress
from tests.factories import Ruiji, wait_until, worker_processes

RNG = random.Random(7)


def test_redis_restarted_emptied_and_replaced_with_shipped_settings(
    disturbed: Ruiji, server: Server, undisturbed: Undisturbed
) -> None:
    disturbed.environment = {**SHIPPED, "RUIJI_REDIS_URL": server.url}
    disturbed("enqueue")
    disturbed.start("worker", "--processes", "2")
    faults = ["restart"] * sized(1, 5) + ["flush"] * sized(1, 2) + ["replace"]
    RNG.shuffle(faults)
    done = 0
    for fault in faults:
        if not wait_for_progress(disturbed):
            break
        time.sleep(RNG.uniform(0, 0.5))
        done += 1
        if fault == "flush":
            connect(server.url).flushall()
        elif fault == "replace":
            server.replace_by_an_empty_one()
        else:
            server.kill()
            time.sleep(RNG.uniform(0, 2))
            server.start()
    assert done == len(faults), "the run was over too soon to be disturbed"
    last = time.monotonic()
    wait_until(lambda: progress(disturbed) is None, timeout_s=600, what="the end of the run")
    assert time.monotonic() - last < 60 + undisturbed.seconds
    finish(disturbed, undisturbed)


def test_the_network_cut_for_a_while(disturbed: Ruiji, server: Server, undisturbed: Undisturbed) -> None:
    network = Network(server.port)
    disturbed("enqueue")
    through = {**disturbed.environment, "RUIJI_REDIS_URL": server.url.replace(str(server.port), str(network.port))}
    direct, disturbed.environment = disturbed.environment, through
    disturbed.start("worker", "--processes", "2")
    disturbed.environment = direct
    assert wait_for_progress(disturbed)
    network.cut_for(sized(12, 60))
    try:
        finish(disturbed, undisturbed)
    finally:
        disturbed.stop_all()
        network.close()


def test_a_clock_that_is_an_hour_ahead_delays_nothing(
    disturbed: Ruiji, server: Server, undisturbed: Undisturbed
) -> None:
    disturbed("enqueue")
    worker = disturbed.start("worker", "--processes", "2")
    assert wait_for_progress(disturbed)
    plan = open_plan(disturbed.gallery)
    assert plan is not None
    worker.kill()
    wait_until(lambda: not worker_processes("embed"), what="the end of the orphans")
    # What the dead one held carries the stamps of its clock: an hour ahead, and for some an hour behind.
    client = connect(server.url)
    index = unacked_keys(plan.gallery_id)["unacked_index_key"]
    tags = client.zrange(index, 0, -1)
    assert tags
    client.zadd(index, {tag: time.time() + (3600 if n % 3 else -3600) for n, tag in enumerate(tags)})
    disturbed.start("worker", "--processes", "2")
    started = time.monotonic()
    finish(disturbed, undisturbed)
    assert time.monotonic() - started < 60 + undisturbed.seconds


def test_two_enqueues_at_once_and_again_publish_every_task_once(
    disturbed: Ruiji, server: Server, undisturbed: Undisturbed
) -> None:
    both = [disturbed.start("enqueue") for _ in range(2)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert "0 tasks published now" in disturbed("enqueue").stderr
    client: redis.Redis = connect(server.url)
    (queue,) = (key for key in client.scan_iter("embed.*") if client.type(key) == "list")
    assert client.llen(queue) == 2 * int(FAST["RUIJI_SHARD_ROWS"]), "a window of two segments, once"
    disturbed.start("worker", "--processes", "2")
    finish(disturbed, undisturbed)
