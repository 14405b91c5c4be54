"""The table of keys is whole, and the same wherever it stands."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pipeline.queue
from pipeline.queue.connection import connect
from pipeline.queue.keys import segment_of
from tests.conftest import ROOT
from tests.factories import Ruiji, pictures, wait_until

#: What the letters of the table stand for.
LETTERS = {"G": "[0-9a-f]{16}", "P": "[0-9a-f]{16}", "S": r"\d+", "R": r"[0-9a-f]{16}\.\d+\.[0-9a-f]{8}"}
LETTERS |= {"HOST": "[^:]+", "PID": r"\d+", "DEVICE": "GPU-.+", "N": r"\d+", "PANEL": r"\d{4,}\.[0-9a-f]{16}\.[\d.e-]+"}
#: Keys of near-duplicates on many machines.
COMPARING = {"compare.G.p1", "ruiji:G:lease:compare", "ruiji:G:comparing:PANEL"}
COMPARING |= {f"ruiji:G:compare:{what}" for what in ("asked", "begun", "faults")}
#: Keys that a run without a GPU, in which nothing is amiss, never has: Celery only reads the `.t`.
NEVER = {"ruiji:slot:DEVICE:N", "celery-taskset-meta-R.t"}


def rows(text: str) -> list[str]:
    return re.findall(r"^\| `[a-z]+[.:-].+ \|$", text, re.MULTILINE)


def pattern(key: str) -> re.Pattern[str]:
    letters = sorted(LETTERS, key=len, reverse=True)
    return re.compile(
        "".join(LETTERS.get(part, re.escape(part)) for part in re.split(rf"\b({'|'.join(letters)})\b", key))
    )


def table() -> dict[str, re.Pattern[str]]:
    keys = [row.split("`")[1] for row in rows(pipeline.queue.__doc__ or "")]
    return {key: pattern(key) for key in keys}


def test_the_rooms_docstring_and_the_documentation_have_one_table() -> None:
    documented = (ROOT / "docs" / "format.md").read_text().partition("## In Redis")[2].partition("\n## ")[0]
    assert rows(documented) == rows(pipeline.queue.__doc__ or "")
    assert len(rows(documented)) == 24


def test_a_run_writes_the_keys_of_the_table_and_no_other(ruiji: Ruiji, redis_url: str) -> None:
    pictures(ruiji.media, 12)
    with (ruiji.media / "objects.txt").open("a") as file:
        file.write("zz-is-not-there.png\n")
    ruiji.environment = {"RUIJI_REDIS_URL": redis_url, "RUIJI_SHARD_ROWS": "5", "RUIJI_VISIBILITY_TIMEOUT_S": "4"}
    with written_keys(redis_url) as written:
        ruiji("enqueue")
        ruiji.start("worker", "--processes", "1")
        ruiji("enqueue", "--wait", code=3)
        wait_until(lambda: any(":worker:" in key for key in written), what="a report")
        ruiji.stop_all()
    keys = table()
    assert {key for key in written if not any(known.fullmatch(key) for known in keys.values())} == set()
    assert {name for name, known in keys.items() if not any(map(known.fullmatch, written))} == NEVER | COMPARING


@contextmanager
def written_keys(redis_url: str) -> Iterator[set[str]]:
    """Every key that is written while the block runs."""
    client = connect(redis_url)
    client.config_set("notify-keyspace-events", "KA")
    listener, written, ended = client.pubsub(), set[str](), threading.Event()
    listener.psubscribe("__keyspace@0__:*")
    assert listener.get_message(timeout=5)

    def listen() -> None:
        while (message := listener.get_message(timeout=0.5)) is not None or not ended.is_set():
            if message is not None:
                written.add(message["channel"].partition(":")[2])

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        yield written
    finally:
        ended.set()
        thread.join()
        listener.close()
        client.config_set("notify-keyspace-events", "")
        client.close()


def test_a_task_id_tells_its_segment() -> None:
    plan = "0123456789abcdef"
    assert segment_of(f"{plan}.7.01234567.12", plan) == 7
    assert segment_of(f"{plan}.7.01234567.r", plan) == 7
    for other in (plan, f"{plan}.x.y", f"{plan}.-1.y", f"{plan[::-1]}.7.01234567.r", ""):
        assert segment_of(other, plan) == -1
