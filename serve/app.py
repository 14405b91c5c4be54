"""The application: its routes behind their guard, and how errors are answered."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Lifespan

from pipeline.errors import ImageError, ModelError, PlanMismatch, QueryError, RuijiError, UnknownObject, UsageError
from pipeline.versions import installed_versions
from search.requests.duplicates import NoDecision
from serve import pages
from serve.access import Access, Guard
from serve.galleries import NoGallery
from serve.metrics import Measured
from serve.replies import error_response
from serve.routes import duplicates, health, maps, objects, runs, searches
from serve.searches import Busy
from serve.service import Service

logger = logging.getLogger(__name__)

#: The first that fits counts; whatever else is raised on purpose is the machine's fault, or the gallery's.
_STATUS: tuple[tuple[type[RuijiError], int], ...] = (
    (UnknownObject, 404),
    (NoGallery, 404),
    (Busy, 429),
    (ImageError, 422),
    (QueryError, 422),
    (NoDecision, 422),
    (ModelError, 503),
    (UsageError, 409),
    (PlanMismatch, 409),
)


def make_app(service: Service, access: Access, cookie: str, lifespan: Lifespan[FastAPI]) -> ASGIApp:
    """The application of a service.

    Args:
        cookie: the name of the session's cookie.
        lifespan: what runs as long as it answers.
    """
    app = FastAPI(
        title="ruiji",
        version=installed_versions()["ruiji"],
        description="Look-alikes and near-duplicates in a gallery of pictures.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.state.access, app.state.cookie = access, cookie
    for family in (health, maps, objects, runs, searches, duplicates, pages):
        app.include_router(family.router)
    app.exception_handler(RuijiError)(_ruiji_error)
    app.exception_handler(HTTPException)(_http_error)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(Exception)(_bug)
    return Measured(Guard(app, access, cookie), service.metrics)


async def _ruiji_error(request: Request, error: Exception) -> Response:
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 503)
    return error_response(status, str(error), {"retry-after": "1"} if status == 429 else {})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = error.detail
    if error.status_code == 404 and said == "Not Found":
        # A person who mistyped an address gets a page; a script is told.
        if "text/html" in request.headers.get("accept", ""):
            return pages.missing(request.scope["path"])
        said = f"there is no route {request.url.path}; /openapi.json has all"
    elif error.status_code == 400 and error.__cause__ is not None:
        # FastAPI's own words are that there was an error.
        said = f"the body cannot be read: {error.__cause__}"
    return error_response(error.status_code, said, error.headers)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(422, "; ".join(map(_fault, error.errors())))


def _fault(one: Mapping[str, Any]) -> str:
    """What is wrong with a request, of one of pydantic's errors."""
    place, said = one["loc"], one["msg"]
    if one["type"] == "json_invalid":
        return f"the body is not JSON: {one['ctx']['error']} at character {place[-1]}"
    if "UploadFile" in said:
        said = "send it as a file, with a filename"
    return f"{' '.join(map(str, place[1:])) or place[0]}: {said}"


async def _bug(request: Request, error: Exception) -> Response:
    # Starlette raises it again once this is answered; uvicorn writes the traceback.
    return error_response(500, "ruiji failed; its log says how")
