"""The page and what it loads, and the form that exchanges the token for a session."""

import time
from html import escape
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from pipeline.errors import UsageError
from pipeline.streams import shown
from serve import bodies
from serve.access import SESSION_S, Access

_KINDS = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
#: What the header of a page leads to, in this order.
_TITLES = {"index": "Find", "clean": "Clean up", "map": "Map", "run": "Run"}
_HEADER = """<header>
  <a class="brand" href="/">ruiji</a>
  <nav aria-label="Pages">{links}</nav>
  <label id="galleries" hidden>Gallery <select id="gallery"></select></label>
  <button id="logout" type="button" hidden>Log out</button>
</header>"""
_FOLDER = files("serve") / "page"
router = APIRouter()


def _route(name: str) -> str:
    return "/" if name == "index" else f"/{name}"


def _page(name: str) -> bytes:
    """A page with the header that all have."""
    links = "".join(
        f'<a href="{_route(other)}"{" aria-current=page" * (other == name)}>{title}</a>'
        for other, title in _TITLES.items()
    )
    text = (_FOLDER / f"{name}.html").read_text(encoding="utf-8")
    return text.replace("<header></header>", _HEADER.format(links=links), 1).encode()


def _add(file: Traversable) -> None:
    stem, _, ending = file.name.rpartition(".")
    # In memory, so that no path of a request reaches the disk.
    data = _page(stem) if ending == "html" else file.read_bytes()

    async def page() -> Response:
        return Response(data, headers={"cache-control": "no-cache"}, media_type=_KINDS[ending])

    route = _route(stem) if ending == "html" else f"/{file.name}"
    router.add_api_route(route, page, methods=["GET"], include_in_schema=False)


for _file in _FOLDER.iterdir():
    if _file.name != "missing.html":
        _add(_file)
_MISSING = _page("missing").decode()


def missing(path: str) -> Response:
    """What a person sees at an address that has nothing."""
    text = _MISSING.replace("<code></code>", f"<code>{escape(shown(path))}</code>", 1)
    return Response(text, 404, media_type="text/html")


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
