"""What the routes share: the service they ask, what a refusal is, and answers that nobody waits for."""

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Path, Request
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from serve import bodies
from serve.replies import json_response
from serve.service import Service

_T = TypeVar("_T")


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(_service)]
ObjectId = Annotated[str, Path(description="The object's id, percent-encoded; it may have slashes.")]
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": bodies.Error, "description": what}
    for status, what in {
        401: "The token is missing or wrong.",
        404: "There is no such object, or no such gallery.",
        409: "The service, as it was started, cannot do this, or not as things stand now.",
        421: "The service is not called by this host.",
        422: "A parameter, the object or the picture cannot be used.",
        503: "The machine or the gallery is at fault.",
    }.items()
}
BUSY: dict[int | str, dict[str, Any]] = {429: {"model": bodies.Error, "description": "Too much is waiting already."}}
UPLOAD: dict[int | str, dict[str, Any]] = {
    400: {"model": bodies.Error, "description": "The body cannot be read."},
    403: {"model": bodies.Error, "description": "It does not come from the service's own page."},
    408: {"model": bodies.Error, "description": "The body did not arrive in time."},
    413: {"model": bodies.Error, "description": "The body is too large."},
    415: {"model": bodies.Error, "description": "The body is not multipart/form-data."},
}
#: Of what is sent as JSON.
SENT: dict[int | str, dict[str, Any]] = {
    **{status: UPLOAD[status] for status in (400, 403, 408, 413)},
    415: {"model": bodies.Error, "description": "The body is not application/json."},
}


def answer(body: BaseModel, status: int = 200) -> Response:
    """An answer as JSON."""
    return json_response(body.model_dump(), status)


async def unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of some work, which is cancelled when nobody waits for it any more.

    Raises:
        HTTPException: the client is gone.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise HTTPException(499, "the client is gone")
        return doing.result()
    finally:
        doing.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
