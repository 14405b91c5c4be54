"""Running a service: its socket, its start, and its end."""

import asyncio
import gc
import logging
import socket
import warnings
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from starlette.types import Lifespan

from pipeline.errors import UsageError
from pipeline.streams import note
from serve.access import access_for
from serve.app import make_app
from serve.galleries import Galleries
from serve.service import Service

logger = logging.getLogger(__name__)

#: Seconds between looks for new shards and galleries.
_LOOK_S = 5.0
#: Seconds that answers in flight have when the service ends.
_GRACE_S = 10
#: Connections at once; each costs little, and the searches among them have a bound of their own.
_MOST_CONNECTIONS = 1000


@dataclass(frozen=True)
class Address:
    """Where a service listens, and who may ask.

    Attributes:
        port: 0: any that is free.
        names: other names by which the service is reached.
        token_file: has the token; needed unless the host is loopback.
    """

    host: str
    port: int
    names: Sequence[str] = ()
    token_file: Path | None = None


def serve(service: Service, address: Address) -> None:
    """Answer until SIGTERM or Ctrl-C; requests in flight are answered first.

    Raises:
        UsageError: the address cannot be listened at, or needs a token; there is no gallery.
        RuijiError: no gallery can be opened.
    """
    access = access_for(address.host, address.names, address.token_file)
    with _listen(address) as listener:
        port = listener.getsockname()[1]
        warnings.showwarning = lambda message, *_: note(f"warning: {message}")
        service.galleries.open()
        host = f"[{address.host}]" if ":" in address.host else address.host
        config = uvicorn.Config(
            make_app(service, access, f"ruiji-{port}", _lifespan(service, f"http://{host}:{port}")),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            access_log=False,
            log_level="warning",
            proxy_headers=False,
            server_header=False,
            limit_concurrency=_MOST_CONNECTIONS,
            timeout_graceful_shutdown=_GRACE_S,
        )
        server = uvicorn.Server(config)
        service.closing = lambda: server.should_exit
        # uvicorn ends in order, and then sends itself the signal once more.
        with suppress(KeyboardInterrupt):
            server.run([listener])


def _lifespan(service: Service, url: str) -> Lifespan[FastAPI]:
    """What runs as long as the service answers."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.decoders.start()
        # Else each full collection goes through all that was ever loaded: 60 to 80 ms, every two seconds under load, in
        # which nothing is answered.
        gc.collect()
        gc.freeze()
        looking = asyncio.create_task(_keep_looking(service.galleries))
        note(f"{url} answers; Ctrl-C stops it")
        try:
            yield
        finally:
            looking.cancel()
            await service.close()

    return lifespan


async def _keep_looking(galleries: Galleries) -> None:
    failed = ""
    while True:
        await asyncio.sleep(_LOOK_S)
        try:
            await asyncio.to_thread(galleries.look)
        except Exception as error:
            # What is open goes on, whatever it was, and the next look may do better.
            why = f"{type(error).__name__}: {error}"
            if why != failed:
                # Of a bug nothing else says where it is.
                bug = not isinstance(error, OSError)
                extra = {"event": "looking_failed"}
                logger.error("looking for new shards fails; trying again: %s", error, exc_info=bug, extra=extra)
            failed = why
        else:
            if failed:
                logger.info("looking for new shards works again", extra={"event": "looking_works"})
            failed = ""


def _listen(address: Address) -> socket.socket:
    try:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((address.host, address.port), family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(
            f"cannot listen at {address.host} port {address.port}: {why}; choose others with --host and --port"
        ) from None
    # Connections inherit it; asyncio sets it only on sockets that name their protocol. Without it the end of an answer
    # waits for the client to confirm its beginning, which takes 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
