"""How the run of a gallery stands, and what failed in it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query
from starlette.responses import Response, StreamingResponse

from pipeline.errors import RuijiError
from pipeline.follow import Look
from pipeline.streams import to_json
from serve import bodies
from serve.bodies import Choice, ListQuery
from serve.galleries import Resident
from serve.routes.common import BUSY, ERRORS, Kept, answer
from serve.searches import Busy
from serve.service import Service

#: Seconds between looks at a run, and looks after which a listener is told that the connection lives.
_LOOK_S, _QUIET_LOOKS = 1.0, 15
#: Listeners to runs at most.
_MOST_LISTENERS = 64
router = APIRouter(responses=ERRORS)


@router.get("/failures", response_model=bodies.Failures)
async def failures(service: Kept, asked: Annotated[ListQuery, Query()]) -> Response:
    """The failed objects, with their reasons."""
    found = list((await service.failures.get(service.galleries.get(asked.gallery).gallery.folder)).values())
    after = asked.first + asked.count
    listed = [bodies.Failure(**asdict(one)) for one in found[asked.first : after]]
    return answer(bodies.Failures(failures=listed, total=len(found), next=after if after < len(found) else None))


@router.get("/runs", response_model=bodies.Run)
async def runs(service: Kept, asked: Annotated[Choice, Query()]) -> Response:
    """How the gallery's run stands: from Redis, or from the disk alone."""
    resident = service.galleries.get(asked.gallery)
    return answer(_run(resident, await service.runs.get(resident.gallery.folder)))


@router.get(
    "/runs/events",
    response_class=StreamingResponse,
    responses={200: {"description": "An event for each change.", "content": {"text/event-stream": {}}}, **BUSY},
)
async def run_events(service: Kept, asked: Annotated[Choice, Query()]) -> Response:
    """The same, whenever it changes: server-sent events, each with the body of `/runs`, or an event `error`."""
    resident = service.galleries.get(asked.gallery)
    # What cannot be told at all is an answer of its own, not an event.
    await service.runs.get(resident.gallery.folder)
    if service.listeners >= _MOST_LISTENERS:
        raise Busy(f"{_MOST_LISTENERS} listeners are there already; ask /runs")
    return StreamingResponse(_events(service, resident), media_type="text/event-stream")


async def _events(service: Service, resident: Resident) -> AsyncIterator[bytes]:
    said, quiet = "", 0
    service.listeners += 1
    try:
        while not service.closing():
            try:
                seen = await service.runs.get(resident.gallery.folder)
                event = f"data: {to_json(_run(resident, seen).model_dump())}\n\n"
            except RuijiError as error:
                event = f"event: error\ndata: {to_json({'error': str(error)})}\n\n"
            quiet = 0 if event != said else quiet + 1
            if event != said:
                said = event
                yield event.encode()
            elif quiet % _QUIET_LOOKS == 0:
                yield b":\n\n"
            await asyncio.sleep(_LOOK_S)
    finally:
        service.listeners -= 1


def _run(resident: Resident, seen: Look) -> bodies.Run:
    return bodies.Run(gallery=resident.name, status=seen.status.as_json(), without_redis=seen.without_redis)
