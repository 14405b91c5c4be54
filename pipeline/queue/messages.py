"""What a message must look like before kombu and Celery touch it.

Whoever can write to Redis can put anything into a queue. Neither of them expects that: a header of another type ends
the process that reads it, again and again, because the message is never acknowledged. So each message is held against
what ruiji's own producers send; what differs is dropped, with one line.

`written` and `opened` are the two ends of nearly every embed task: one as Celery would have sent it, in a twentieth of
the time, and the strict reading of exactly that. What `opened` does not take is no fault yet: the checks decide.
"""

import binascii
import json
import logging
import re
import secrets
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from celery.app.task import Context
from celery.utils.nodenames import anon_nodename

from pipeline.plans.generations import is_plan_id
from pipeline.queue.keys import (
    COMPARE_TASK,
    EMBED_TASK,
    REDUCE_TASK,
    embed_queue,
    gallery_of,
    reduce_queue,
    task_id,
    task_of,
)

logger = logging.getLogger(__name__)

#: Ids and the like: printable, without what a log or a Redis client could stumble over.
_WORD = re.compile(r"[!-~]{1,255}")
_NONE: tuple[Any, ...] = (None,)
_EMPTY: tuple[Any, ...] = (None, "", 0, [], {}, [None, None])
#: Which Celery parses unless they are None.
_TIMES = ("eta", "expires")
#: Of the headers that Celery writes these carry something; the others are empty in ruiji's messages.
_KNOWN = {"lang", "task", "id", "root_id", "parent_id", "group", "group_index", "retries", "origin", "ignore_result"}
_KNOWN |= {"argsrepr", "kwargsrepr", "redelivered"}
#: The types of each task's arguments.
_ARGUMENTS = {EMBED_TASK: (str, int, str), REDUCE_TASK: (str, int), COMPARE_TASK: (int, int, int, str, float)}
#: What Celery would take from a header of that name.
_CELERYS = frozenset(name for name in dir(Context) if not name.startswith("__"))


class Task(NamedTuple):
    """What a worker needs of an embed task; also what Celery's chords need of a member.

    Attributes:
        args: plan id, index of the segment, path.
        group, group_index, chord: None in a task that belongs to no chord.
    """

    id: str
    args: tuple[str, int, str]
    group: str | None
    group_index: int | None
    chord: dict[str, Any] | None


# Written and read as they are on nearly every message.

_Index = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]


class _Headers(msgspec.Struct, forbid_unknown_fields=True):
    lang: str
    task: str
    id: str
    group: str
    group_index: _Index
    retries: Literal[0]
    root_id: str
    origin: str
    ignore_result: bool


class _Route(msgspec.Struct, forbid_unknown_fields=True):
    exchange: Literal[""]
    routing_key: str


class _Properties(msgspec.Struct, forbid_unknown_fields=True):
    correlation_id: str
    reply_to: str
    delivery_mode: int
    delivery_info: _Route
    priority: Literal[0]
    body_encoding: Literal["base64"]
    delivery_tag: str


class _Envelope(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    body: bytes
    content_encoding: Literal["utf-8"]
    content_type: Literal["application/json"]
    headers: _Headers
    properties: _Properties


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Embed(msgspec.Struct, forbid_unknown_fields=True):
    callbacks: None
    errbacks: None
    chain: None
    chord: msgspec.Raw


_Body = tuple[tuple[str, int, str], _Nothing, _Embed]
_envelopes = msgspec.json.Decoder(_Envelope)
_bodies = msgspec.json.Decoder(_Body)


def written(
    rows: Iterable[tuple[int, int, str]], plan_id: str, segment: int, group: str, gallery_id: str
) -> Iterator[bytes]:
    """The messages of embed tasks, the members of one chord, as Celery and kombu would put them into the queue.

    Args:
        rows: of each task its place in the group, its row in the todo list, and its path.
    """
    quoted = msgspec.json.encode
    chord = quoted(chord_body(group, plan_id, segment, gallery_id))
    ending = b'],{},{"callbacks":null,"errbacks":null,"chain":null,"chord":%b}]' % chord
    queue, origin, ours = quoted(embed_queue(gallery_id)), quoted(anon_nodename()), secrets.token_hex(8)
    for index, row, path in rows:
        body = b'[["%b",%d,%b%b' % (plan_id.encode(), segment, quoted(path), ending)
        name = quoted(task_id(group, row))
        yield (
            b'{"body":"%b","content-encoding":"utf-8","content-type":"application/json","headers":{"lang":"py",'
            b'"task":"%b","id":%b,"group":%b,"group_index":%d,"retries":0,"root_id":%b,"origin":%b,'
            b'"ignore_result":true},"properties":{"correlation_id":%b,"reply_to":"","delivery_mode":2,'
            b'"delivery_info":{"exchange":"","routing_key":%b},"priority":0,"body_encoding":"base64",'
            b'"delivery_tag": "%b-%d"}}'
        ) % (
            *(binascii.b2a_base64(body, newline=False), EMBED_TASK.encode(), name, quoted(group), index),
            *(name, origin, name, queue, ours.encode(), row),
        )


def opened(raw: bytes, tag: bytes, queue: str) -> Task | None:
    """An embed task of one of ruiji's producers, checked as `envelope_fault` and `task_fault` would; None: ask them.

    Args:
        tag: under which the message was booked.
        queue: from which it was taken.
    """
    try:
        envelope = _envelopes.decode(raw)
        args, _, embed = _bodies.decode(envelope.body)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    headers, properties = envelope.headers, envelope.properties
    chord = _chord(headers.group, args[0], args[1], bytes(embed.chord), queue)
    if (
        chord is None
        or headers.task != EMBED_TASK
        or properties.delivery_info.routing_key != queue
        or not headers.ignore_result
        or properties.delivery_tag.encode() != tag
        or not (_WORD.fullmatch(properties.delivery_tag) and _WORD.fullmatch(headers.id))
        or headers.root_id != headers.id
    ):
        return None
    return Task(headers.id, args, headers.group, headers.group_index, chord)


@lru_cache(maxsize=64)
def _chord(group: str, plan_id: str, segment: int, raw: bytes, queue: str) -> dict[str, Any] | None:
    """The chord of a segment's tasks, if it is the segment's; the same for all of them."""
    if (
        task_of(queue) != EMBED_TASK
        or not is_plan_id(plan_id)
        or not group.startswith(f"{plan_id}.{segment}.")
        or not _is_word(group)
    ):
        return None
    try:
        chord = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    expected = chord_body(group, plan_id, segment, gallery_of(queue))
    return expected if chord == expected and repr(chord) == repr(expected) else None


# Checks of what may have been made up.


def envelope_fault(message: Any, queue: str, tag: str | None = None) -> str | None:
    """Why kombu could not make a message of this, or None.

    Args:
        message: what the JSON in the queue says.
        tag: under which it was booked, if it was.
    """
    try:
        headers, properties = message["headers"], message["properties"]
        if not isinstance(headers, dict) or headers.get("compression") is not None:
            return "it has no headers, or is compressed"
        own = properties["delivery_tag"]
        if not _is_word(own) or own != (tag or own):
            return "its delivery tag cannot be used"
        route = properties["delivery_info"]
        if route["exchange"] != "" or route["routing_key"] != queue:
            return "it was sent to another queue"
        if type(properties.get("priority", 0)) is not int:
            return "its priority is not a number"
        if message["content-type"] != "application/json" or message["content-encoding"] != "utf-8":
            return "it is not JSON in UTF-8"
        if properties["body_encoding"] != "base64":
            return "its body is not in base64"
        binascii.a2b_base64(message["body"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        return f"its envelope is not a message's ({type(error).__name__})"
    return None


def task_fault(headers: dict[str, Any], payload: Any, task: str, gallery_id: str) -> str | None:
    """Why Celery could not work on this as one of ruiji's tasks, or None.

    Args:
        payload: the decoded body.
        task: name of the one task that the queue is for.
    """
    if headers.get("task") != task:
        return "it is not for the task of this queue"
    for name in ("id", "root_id", "parent_id", "group"):
        if not _is_word(value := headers.get(name)) and (value is not None or name == "id"):
            return f"its {name} is not an id"
    if headers.get("ignore_result") not in (None, True) or not _is_count(headers.get("retries") or 0):
        return "its headers ask for what ruiji does not do"
    for name, value in headers.items():
        if name in _CELERYS and name not in _KNOWN and value not in (_EMPTY if name not in _TIMES else _NONE):
            return f"its header {name!r} is not empty"
    return _body_fault(headers, payload, task, gallery_id)


def task_in(headers: dict[str, Any], payload: Any) -> Task:
    """What an embed task says of which `task_fault` finds nothing."""
    args, _, embed = payload
    return Task(headers["id"], tuple(args), headers.get("group"), headers.get("group_index"), embed.get("chord"))


def _body_fault(headers: dict[str, Any], payload: Any, task: str, gallery_id: str) -> str | None:
    if not isinstance(payload, list) or len(payload) != 3:
        return "its body is not a task's"
    args, kwargs, embed = payload
    # Celery lets the third part replace any part of the request.
    if kwargs != {} or not isinstance(embed, dict) or embed.keys() - {"callbacks", "errbacks", "chain", "chord"}:
        return "its body is not a task's"
    if not isinstance(args, list) or tuple(map(type, args)) != _ARGUMENTS[task]:
        return "its arguments are wrong"
    if task != COMPARE_TASK and not is_plan_id(args[0]):
        return "its arguments are wrong"
    group, chord = headers.get("group"), embed.get("chord")
    if embed.get("callbacks") or embed.get("errbacks") or embed.get("chain"):
        return "it asks for what ruiji does not do"
    if group is None:
        return None if chord is None else "it belongs to a chord but to no group"
    if (
        task == COMPARE_TASK
        or not group.startswith(f"{args[0]}.{args[1]}.")
        or chord != chord_body(group, args[0], args[1], gallery_id)
    ):
        return "its chord is not its segment's"
    return None if _is_count(headers.get("group_index")) else "its place in the group is not a number"


def chord_body(group: str, plan_id: str, index: int, gallery_id: str) -> dict[str, Any]:
    """The task that follows the members of a group: what reduces their segment."""
    return {
        "task": REDUCE_TASK,
        "args": [plan_id, index],
        "kwargs": {},
        "options": {"task_id": task_id(group, None), "queue": reduce_queue(gallery_id)},
        "subtask_type": None,
        "immutable": True,
    }


def sent_id(message: str | bytes) -> str:
    """The id of the task in a message as Redis holds it, queued or in hand; empty if it is no message."""
    try:
        content: Any = json.loads(message)
        # In hand it stands with its place.
        content = content[0] if isinstance(content, list) else content
        return str(content["headers"]["id"])
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return ""


def report_dropped(queue: str, fault: str) -> None:
    """Say that a message that ruiji did not send is dropped."""
    extra = {"event": "message_dropped", "queue": queue}
    logger.warning("a message that ruiji did not send is dropped: %s", fault, extra=extra)


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53
