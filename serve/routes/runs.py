"""The state of a gallery's run, and what failed in it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response, StreamingResponse

from pipeline.errors import RuijiError
from pipeline.follow import Look
from pipeline.streams import to_json
from serve import bodies
from serve.bodies import Choice, ListQuery
from serve.routes.common import BUSY, ERRORS, TheService, answer
from serve.searches import Busy
from serve.service import Service

#: Seconds between looks at a run, and looks after which a listener is told that the connection lives.
_LOOK_S, _QUIET_LOOKS = 1.0, 15
#: Seconds after which a look is late: Redis stands still, or the disk does.
_LATE_S = 5.0
#: Listeners to runs at most.
_MOST_LISTENERS = 64
router = APIRouter(responses=ERRORS)


@router.get("/failures", response_model=bodies.Failures)
async def failures(service: TheService, asked: Annotated[ListQuery, Query()]) -> Response:
    """The failed objects, with their reasons."""
    found = list((await service.failures.get(service.galleries.folder(asked.gallery))).values())
    after = asked.first + asked.count
    listed = [bodies.Failure(**asdict(one)) for one in found[asked.first : after]]
    return answer(bodies.Failures(failures=listed, total=len(found), next=after if after < len(found) else None))


@router.get("/runs", response_model=bodies.Run)
async def runs(service: TheService, asked: Annotated[Choice, Query()]) -> Response:
    """State of the gallery's run, from Redis or from the disk alone."""
    folder = service.galleries.folder(asked.gallery)
    return answer(_run(folder, await service.runs.get(folder)))


@router.get(
    "/runs/events",
    response_class=StreamingResponse,
    responses={200: {"description": "An event for each change.", "content": {"text/event-stream": {}}}, **BUSY},
)
async def run_events(service: TheService, asked: Annotated[Choice, Query()]) -> Response:
    """The state of the run whenever it changes: server-sent events with the body of `/runs`, or one of two others.

    `unknown` has an `error` that says why nothing can be told: no run has begun. `late` comes while Redis or the disk
    does not answer; what was told before may be over.
    """
    folder = service.galleries.folder(asked.gallery)
    if service.listeners >= _MOST_LISTENERS:
        raise Busy(f"{_MOST_LISTENERS} listeners are there already; ask /runs")
    return StreamingResponse(_events(service, folder), media_type="text/event-stream")


@router.post(
    "/retry",
    response_model=bodies.Retried,
    responses={
        403: {"model": bodies.Error, "description": "It does not come from the service's own page."},
        415: {"model": bodies.Error, "description": "The body is not application/json."},
    },
)
async def retry(service: TheService, asked: Annotated[Choice, Query()]) -> Response:
    """Enqueue the failed objects of the list again, and nothing else, as `ruiji retry` does; needs a Redis.

    They are tried with the settings of the last plan. Asked twice, they are tried once.
    """
    done = await service.retry(service.galleries.folder(asked.gallery))
    lines = 0 if done.plan is None else done.plan.lines
    return answer(bodies.Retried(objects=lines, plan=None if done.plan is None else done.plan.plan_id))


async def _events(service: Service, folder: Path) -> AsyncIterator[bytes]:
    said, quiet, looking = "", 0, None
    service.listeners += 1
    try:
        while not service.closing():
            looking = asyncio.create_task(service.runs.get(folder))
            if not (await asyncio.wait({looking}, timeout=_LATE_S))[0]:
                said = "event: late\ndata: {}\n\n"
                yield said.encode()
            try:
                seen = await looking
                event = f"data: {to_json(_run(folder, seen).model_dump())}\n\n"
            except RuijiError as error:
                event = f"event: unknown\ndata: {to_json({'error': str(error)})}\n\n"
            quiet = 0 if event != said else quiet + 1
            if event != said:
                said = event
                yield event.encode()
            elif quiet % _QUIET_LOOKS == 0:
                yield b":\n\n"
            await asyncio.sleep(_LOOK_S)
    finally:
        service.listeners -= 1
        if looking is not None:
            looking.cancel()


def _run(folder: Path, seen: Look) -> bodies.Run:
    return bodies.Run(
        gallery=folder.name, status=seen.status.as_json(), without_redis=seen.without_redis, redis_lost=seen.lost
    )
