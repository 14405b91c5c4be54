"""Every name in Redis: of tasks, queues and keys. `pipeline/queue/__init__.py` says who writes and reads them."""

EMBED_TASK = "ruiji.embed"
REDUCE_TASK = "ruiji.reduce"
COMPARE_TASK = "ruiji.compare"
#: Version of the messages; part of the queues' names, so that a worker of another age never sees them.
PROTOCOL = 1
#: Celery counts a group's members in `.j` and `.d`, holds its size in `.s`, claims its body in `.c`.
_CHORD_ENDINGS = ("j", "d", "t", "s", "c")


def embed_queue(gallery_id: str) -> str:
    """The queue of one gallery's embed tasks."""
    return f"embed.{gallery_id}.p{PROTOCOL}"


def reduce_queue(gallery_id: str) -> str:
    """The queue of one gallery's reduce tasks."""
    return f"reduce.{gallery_id}.p{PROTOCOL}"


def compare_queue(gallery_id: str) -> str:
    """The queue of one gallery's panels of near-duplicates."""
    return f"compare.{gallery_id}.p{PROTOCOL}"


def task_of(queue: str) -> str:
    """The one task that is in a queue."""
    return {"embed": EMBED_TASK, "reduce": REDUCE_TASK, "compare": COMPARE_TASK}[queue.partition(".")[0]]


def gallery_of(queue: str) -> str:
    """The gallery that a queue belongs to."""
    return queue.split(".")[1]


def unacked_keys(gallery_id: str) -> dict[str, str]:
    """The hash, index and mutex of a gallery's messages in hand, by the names of kombu's transport options."""
    return {f"unacked{part}_key": f"ruiji:{gallery_id}:unacked{part}" for part in ("", "_index", "_mutex")}


def chord_keys(group: str) -> dict[str, str]:
    """Celery's keys for one chord, by their last letter."""
    return {ending: f"celery-taskset-meta-{group}.{ending}" for ending in _CHORD_ENDINGS}


def plan_key(gallery_id: str, plan_id: str) -> str:
    """The hash of a plan's armed segments; with `*` as the plan a pattern for all of a gallery."""
    return f"ruiji:{gallery_id}:plan:{plan_id}"


def failed_key(gallery_id: str, plan_id: str, segment: int) -> str:
    """The set of a segment's failed objects."""
    return f"{plan_key(gallery_id, plan_id)}:failed:{segment}"


def compare_key(gallery_id: str, what: str) -> str:
    """Of a gallery's panels those that are `asked` for, how often each was `begun`, or their last `faults`."""
    return f"ruiji:{gallery_id}:compare:{what}"


def comparing_key(gallery_id: str, panel: str) -> str:
    """How far a worker is with a panel."""
    return f"ruiji:{gallery_id}:comparing:{panel}"


def lease_key(gallery_id: str, what: str) -> str:
    """The lease on one piece of a gallery's work: `arm`, `close`, `reduce.<segment>` or `compare`."""
    return f"ruiji:{gallery_id}:lease:{what}"


def place_key(gallery_id: str) -> str:
    """Where a gallery was last worked on."""
    return f"ruiji:{gallery_id}:place"


def worker_key(gallery_id: str, process: str) -> str:
    """What one process, `<host>:<pid>`, reports; with `*` a pattern for all of a gallery."""
    return f"ruiji:{gallery_id}:worker:{process}"


def slot_key(device: str, number: int) -> str:
    """The lease on one GPU slot; devices are shared by all galleries."""
    return f"ruiji:slot:{device}:{number}"


def task_id(group: str, row: int | None) -> str:
    """The id of a group's task: of one row, or of the body that follows them all."""
    return f"{group}.{'r' if row is None else row}"


def group_id(plan_id: str, segment: int, digest: str) -> str:
    """The id of a group of tasks: those rows of a segment, and of which gallery, that `digest` stands for."""
    return f"{plan_id}.{segment}.{digest}"


def segment_of(task_id: str, plan_id: str) -> int:
    """The segment of a task; -1 if it is none of this plan's."""
    plan, _, rest = task_id.partition(".")
    segment = rest.partition(".")[0]
    return int(segment) if plan == plan_id and segment.isascii() and segment.isdigit() else -1
