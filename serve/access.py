"""Who may ask: the host that is meant, the page that a request comes from, the token, and how much may be sent.

Every request passes `Guard` before anything else sees it.
"""

import asyncio
import hashlib
import hmac
import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import quote, unquote

from h11 import LocalProtocolError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import UsageError
from pipeline.streams import shown
from serve.replies import error_response

#: Names under which only this machine reaches a service.
LOOPBACK = ("127.0.0.1", "localhost", "::1")
#: A token shorter than this can be guessed.
_LEAST_TOKEN = 16
#: A session of the page, in seconds.
SESSION_S = 12 * 3600
#: Bytes of an upload, and seconds in which it has to be here.
MOST_UPLOAD_BYTES, _UPLOAD_S = 64 << 20, 60.0
#: Of decisions, which may name each object of a large group; and of any other request's body.
_MOST_DECISIONS_BYTES, _MOST_BODY_BYTES = 16 << 20, 1 << 20
#: What can be had without the token: the form that asks for it.
_OPEN = frozenset({"/login", "/login.js", "/style.css", "/icon.svg"})
_MULTIPART_PATHS = frozenset({"/search"})
_TOO_LARGE = "the request has more than {} MB"
_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::\d+)?")

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        names: hosts by which this service may be asked for, lower case, without ports.
        token: that every request needs; None: none does.
    """

    names: frozenset[str]
    token: str | None = None

    def knows_host(self, host: str) -> bool:
        """Whether a request's `Host` is one of our names."""
        match = _HOST.fullmatch(host.lower())
        return match is not None and match[1].strip("[]") in self.names

    def is_token(self, given: str) -> bool:
        """Whether this is the token; takes the same time for every wrong one."""
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())

    def session(self, now: float) -> str:
        """What stands for the token in a cookie, until some hours from now."""
        expires = str(int(now) + SESSION_S)
        return f"{expires}.{self._signed(expires)}"

    def is_session(self, given: str, now: float) -> bool:
        """Whether this is a session's cookie that has not expired."""
        expires, _, signature = given.partition(".")
        sound = hmac.compare_digest(signature.encode(), self._signed(expires).encode())
        return sound and expires.isdecimal() and now < int(expires)

    def _signed(self, expires: str) -> str:
        assert self.token is not None
        return hmac.new(self.token.encode(), f"ruiji session {expires}".encode(), hashlib.sha256).hexdigest()


def access_for(host: str, names: Sequence[str], token_file: Path | None) -> Access:
    """Who may ask a service that listens on a host.

    Args:
        names: other names by which it is reached.
        token_file: has the token; on loopback there need not be one.

    Raises:
        UsageError: the host is not loopback and there is no token; or the token cannot be read, or is too short.
    """
    token = None if token_file is None else _read_token(token_file)
    if token is None and host not in LOOPBACK:
        raise UsageError(
            f"--host {host} can be reached from other machines: write a token into a file and give it as "
            "--web-token-file (RUIJI_WEB_TOKEN_FILE), and put TLS before the service (docs/serve.md)"
        )
    return Access(frozenset(name.lower() for name in (*LOOPBACK, host, *names)), token)


def _read_token(file: Path) -> str:
    try:
        token = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"cannot read the token file {file}: {why}") from None
    if re.fullmatch(rf"[!-~]{{{_LEAST_TOKEN},}}", token) is None:
        raise UsageError(
            f"the token in {file} must be at least {_LEAST_TOKEN} ASCII characters without spaces; make one with  "
            f"python3 -c 'import secrets; print(secrets.token_urlsafe())' > {file}"
        )
    return token


class Guard:
    """Refuses what may not be asked, and adds the headers that keep a browser from giving answers to others."""

    def __init__(self, app: ASGIApp, access: Access, cookie: str) -> None:
        """Guard an application.

        Args:
            cookie: the name of the session's cookie.
        """
        self._app, self._access, self._cookie = app, access, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # Object ids are names of files, which need not be UTF-8.
        scope["path"] = unquote(scope["raw_path"].decode("ascii"), errors="surrogateescape")

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-store")
            # The rest of the request was no HTTP, and the server has said so already.
            with suppress(LocalProtocolError):
                await send(message)

        headers = Headers(scope=scope)
        refused = self._refusal(scope["method"], scope["path"], headers)
        if refused is not None:
            status, why = refused
            extra = {"www-authenticate": "Bearer"} if status == 401 else {}
            # A person who opens a page gets the form; a script is told.
            if status == 401 and "text/html" in headers.get("accept", ""):
                status, extra = 303, {"location": _login(scope)}
            await error_response(status, why, extra)(scope, receive, send_guarded)
            return
        body = _Body(receive, _most_bytes(scope["path"]))
        await self._app(scope, body.receive, send_guarded)

    def _refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        """Status and reason, if a request is refused by its headers alone."""
        host = headers.get("host", "").lower()
        if not self._access.knows_host(host):
            return 421, f"this service is not called {shown(host) or 'nothing'}; start it with --web-name to add a name"
        if method not in _SAFE:
            origins = (f"http://{host}", f"https://{host}")
            if headers.get("origin", "").lower() not in origins:
                return (
                    403,
                    f"it must come from this service's own page, or have the header  Origin: {origins[0]}",
                )
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json" and not (kind == "multipart/form-data" and path in _MULTIPART_PATHS):
                wanted = "multipart/form-data" if path in _MULTIPART_PATHS else "application/json"
                return 415, f"the body must be {wanted}"
        if self._access.token is not None and path not in _OPEN and not self._is_known(headers):
            return 401, "give the token: Authorization: Bearer TOKEN, or log in at /login"
        # The server has made sure that it is a number.
        if int(headers.get("content-length", "0")) > _most_bytes(path):
            return 413, _TOO_LARGE.format(_most_bytes(path) >> 20)
        return None

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._access.is_token(given.strip()):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return False
        return cookie is not None and self._access.is_session(cookie.value, time.time())


def _login(scope: Scope) -> str:
    """The form's address, which leads on to what was asked for."""
    query = scope["query_string"]
    asked = scope["raw_path"] + (b"?" + query if query else b"")
    return "/login" if asked == b"/" else f"/login?to={quote(asked, safe='')}"


def _most_bytes(path: str) -> int:
    """The largest body that a path takes."""
    if path in _MULTIPART_PATHS:
        return MOST_UPLOAD_BYTES
    return _MOST_DECISIONS_BYTES if path == "/decisions" else _MOST_BODY_BYTES


class _Body:
    """A request's body, within its bounds; after its end, whatever else the client says.

    Raises:
        HTTPException: it is too large, or does not arrive.
    """

    def __init__(self, receive: Receive, most_bytes: int) -> None:
        self._receive, self._most_bytes = receive, most_bytes
        self._bytes, self._whole = 0, False
        self._deadline = time.monotonic() + _UPLOAD_S

    async def receive(self) -> Message:
        if self._whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._deadline - time.monotonic()))
        except TimeoutError:
            raise HTTPException(408, f"the request's body did not arrive within {_UPLOAD_S:g} s") from None
        self._bytes += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._bytes > self._most_bytes:
            raise HTTPException(413, _TOO_LARGE.format(self._most_bytes >> 20))
        return message
