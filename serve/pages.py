"""The page and what it loads, and the form that exchanges the token for a session."""

import time
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pipeline.errors import UsageError
from serve import bodies
from serve.access import SESSION_S, Access

_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
router = APIRouter()


def _add(file: Traversable) -> None:
    # In memory, so that no path of a request reaches the disk.
    data = file.read_bytes()
    stem, _, ending = file.name.rpartition(".")

    async def page() -> Response:
        return Response(data, headers={"cache-control": "no-cache"}, media_type=_KINDS[ending])

    route = f"/{file.name}" if ending != "html" else "/" if stem == "index" else f"/{stem}"
    router.add_api_route(route, page, methods=["GET"], include_in_schema=False)


for _file in (files("serve") / "page").iterdir():
    _add(_file)


_WRONG_REQUEST: dict[int | str, dict[str, Any]] = {
    415: {"model": bodies.Error, "description": "The body is not application/json."},
    421: {"model": bodies.Error, "description": "The service is not called by this host."},
}


@router.post(
    "/login",
    status_code=204,
    responses={
        403: {"model": bodies.Error, "description": "The token is wrong, or this is not the service's own page."},
        409: {"model": bodies.Error, "description": "The service needs no token."},
        **_WRONG_REQUEST,
        422: {"model": bodies.Error, "description": "The body is not what it must be."},
    },
)
async def log_in(request: Request, given: Annotated[bodies.Login, Body()]) -> Response:
    """Exchange the token for a cookie that scripts cannot read."""
    access: Access = request.app.state.access
    if access.token is None:
        raise UsageError("this service needs no token")
    if not access.is_token(given.token):
        raise HTTPException(403, "this is not the token of this service")
    return _with_cookie(request, access.session(time.time()), SESSION_S)


@router.post(
    "/logout",
    status_code=204,
    responses={
        401: {"model": bodies.Error, "description": "The token is missing or wrong."},
        403: {"model": bodies.Error, "description": "It does not come from the service's own page."},
        **_WRONG_REQUEST,
    },
)
async def log_out(request: Request) -> Response:
    """Forget the cookie."""
    return _with_cookie(request, "", 0)


def _with_cookie(request: Request, value: str, age_s: int) -> Response:
    response = Response(status_code=204)
    # The browser says itself whether it came by TLS, whatever stands between.
    secure = request.headers.get("origin", "").startswith("https://")
    response.set_cookie(request.app.state.cookie, value, max_age=age_s, secure=secure, httponly=True, samesite="strict")
    return response
