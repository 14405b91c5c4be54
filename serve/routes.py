"""What can be asked of a service."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, File, Path, Query, Request, UploadFile
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

import ruiji
from pipeline.choices import Reason
from pipeline.errors import ImageError, RuijiError, UnknownObject, UsageError
from pipeline.follow import Look
from pipeline.streams import to_json
from pipeline.versions import installed_versions
from search.options import Metric
from serve import bodies
from serve.bodies import Choice, ListQuery, PictureQuery, SimilarQuery, ThumbnailQuery
from serve.galleries import Resident
from serve.metrics import Now
from serve.replies import json_response
from serve.searches import Busy, Wanted
from serve.service import Service
from serve.thumbnails import DEADLY

_T = TypeVar("_T")
#: Seconds between looks at a run, and looks after which a listener is told that the connection lives.
_LOOK_S, _QUIET_LOOKS = 1.0, 15
#: Listeners to runs at most.
_MOST_LISTENERS = 64
_PLACEHOLDER = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 256 256" role="img" aria-label="no picture">
<rect width="256" height="256" fill="#8e8e93" fill-opacity=".18"/>
<path d="M72 88h112v80H72zm0 64 32-32 28 28 20-16 32 28" fill="none" stroke="#8e8e93" stroke-width="6"/>
<path d="M60 196 196 60" stroke="#8e8e93" stroke-width="6"/></svg>
"""


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Kept = Annotated[Service, Depends(_service)]
ObjectId = Annotated[str, Path(description="The object's id, percent-encoded; it may have slashes.")]
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": bodies.Error, "description": what}
    for status, what in {
        401: "The token is missing or wrong.",
        404: "There is no such object, or no such gallery.",
        409: "The service, as it was started, cannot do this.",
        421: "The service is not called by this host.",
        422: "A parameter, the object or the picture cannot be used.",
        503: "The machine or the gallery is at fault.",
    }.items()
}
_BUSY: dict[int | str, dict[str, Any]] = {429: {"model": bodies.Error, "description": "Too much is waiting already."}}
_UPLOAD: dict[int | str, dict[str, Any]] = {
    400: {"model": bodies.Error, "description": "The body cannot be read."},
    403: {"model": bodies.Error, "description": "It does not come from the service's own page."},
    408: {"model": bodies.Error, "description": "The body did not arrive in time."},
    413: {"model": bodies.Error, "description": "The body is too large."},
    415: {"model": bodies.Error, "description": "The body is not multipart/form-data."},
}
router = APIRouter(responses=_ERRORS)


@router.get("/healthz", response_model=bodies.Health)
async def health(service: Kept) -> Response:
    """How the service stands: its galleries, and which way a query takes through each."""
    galleries = await asyncio.to_thread(lambda: [_gallery_health(one) for one in service.galleries.all])
    problem = service.galleries.refused or any(one.problem for one in service.galleries.all)
    body = bodies.Health(
        status="degraded" if problem else "ok",
        version=installed_versions()["ruiji"],
        default=service.galleries.default,
        media=service.media_dir is not None,
        galleries=galleries,
        refused=dict(service.galleries.refused),
    )
    return _json(body)


def _gallery_health(resident: Resident) -> bodies.GalleryHealth:
    gallery = resident.gallery
    return bodies.GalleryHealth(
        name=resident.name,
        objects=len(gallery),
        unusable=gallery.unusable,
        rows=gallery.rows,
        length=gallery.length,
        fingerprint=gallery.fingerprint,
        pictures=resident.model is not None,
        way={metric: gallery.way(1, metric) for metric in Metric},
        problem=resident.problem,
    )


@router.get("/similar/{object_id:path}", response_model=bodies.Similar, responses=_BUSY)
async def similar(
    request: Request, service: Kept, object_id: ObjectId, asked: Annotated[SimilarQuery, Query()]
) -> Response:
    """What looks like an object of the gallery; without parameters by the article's Euclidean distance."""
    resident = service.galleries.get(asked.gallery)
    wanted = Wanted(
        gallery=resident.gallery,
        query=object_id,
        top_k=asked.k,
        metric=asked.metric,
        min_similarity=asked.min_similarity,
    )
    return _similar(resident, asked, object_id, await _unless_gone(request, service.searches.hits(wanted)))


@router.post("/search", response_model=bodies.Similar, responses=_BUSY | _UPLOAD)
async def search(
    request: Request,
    service: Kept,
    image: Annotated[UploadFile, File(description="A picture: the bytes of its file.")],
    asked: Annotated[PictureQuery, Query()],
) -> Response:
    """What looks like a picture that is sent along."""
    resident = service.galleries.get(asked.gallery)
    hits = await _unless_gone(request, _picture_hits(service, resident, await image.read(), asked))
    return _similar(resident, asked, None, hits)


async def _picture_hits(
    service: Service, resident: Resident, data: bytes, asked: PictureQuery
) -> tuple[ruiji.Hit, ...]:
    if resident.model is None:
        raise UsageError(f"the model of the gallery {resident.name} is not known: start the service with --model")
    gallery = resident.gallery
    pixels = await service.decoders.pixels(data, await asyncio.to_thread(lambda: gallery.spec))
    feature = (await asyncio.to_thread(gallery.encode, pixels[None]))[0]
    wanted = Wanted(
        gallery=gallery, query=feature, top_k=asked.k, metric=asked.metric, min_similarity=asked.min_similarity
    )
    return await service.searches.hits(wanted)


def _similar(resident: Resident, asked: SimilarQuery, object_id: str | None, hits: tuple[ruiji.Hit, ...]) -> Response:
    images = [
        bodies.SimilarImage(
            objectId=hit.object_id, distance=hit.distance, similarity=hit.similarity, rank=rank, path=hit.path
        )
        for rank, hit in enumerate(hits, 1)
    ]
    return _json(
        bodies.Similar(queryObjectId=object_id, similarImages=images, gallery=resident.name, metric=asked.metric)
    )


@router.get("/objects", response_model=bodies.Objects)
async def objects(service: Kept, asked: Annotated[ListQuery, Query()]) -> Response:
    """A part of the gallery, in the order of its rows."""
    gallery = service.galleries.get(asked.gallery).gallery
    found = await asyncio.to_thread(gallery.objects, asked.first, asked.count)
    after = asked.first + asked.count
    listed = [bodies.Object(**asdict(one)) for one in found]
    return _json(bodies.Objects(objects=listed, rows=gallery.rows, next=after if after < gallery.rows else None))


@router.get("/objects/{object_id:path}", response_model=bodies.Object)
async def one_object(service: Kept, object_id: ObjectId, asked: Annotated[Choice, Query()]) -> Response:
    """One object of the gallery."""
    gallery = service.galleries.get(asked.gallery).gallery
    return _json(bodies.Object(**asdict(await asyncio.to_thread(gallery.find, object_id))))


@router.get(
    "/thumbs/{object_id:path}",
    response_class=Response,
    responses={
        200: {
            "description": "A JPEG; a PNG if the picture is small itself; a placeholder if it cannot be shown.",
            "content": {kind: {} for kind in ("image/jpeg", "image/png", "image/svg+xml")},
        },
        **_BUSY,
    },
)
async def thumbnail(
    request: Request, service: Kept, object_id: ObjectId, asked: Annotated[ThumbnailQuery, Query()]
) -> Response:
    """The small picture of an object; of one that failed, too, unless its picture ended its decoder."""
    resident = service.galleries.get(asked.gallery)
    thumbnails = service.thumbnails(resident)
    try:
        path = await _path_of(service, resident, object_id)
        made = await _unless_gone(request, thumbnails.get(path, asked.size))
    except ImageError as error:
        # Its reason is one of ours; what a file says never stands in a header.
        headers = {"x-ruiji-reason": error.reason, "cache-control": "no-store"}
        return Response(_PLACEHOLDER, headers=headers, media_type="image/svg+xml")
    return Response(made.data, headers={"cache-control": "private, max-age=3600"}, media_type=f"image/{made.kind}")


async def _path_of(service: Service, resident: Resident, object_id: str) -> str:
    """Where an object's picture is, relative to the media folder.

    Raises:
        UnknownObject: it is neither in the gallery nor among the failed ones.
        ImageError: nobody may decode it again, or the gallery does not know paths.
    """
    try:
        path = (await asyncio.to_thread(resident.gallery.find, object_id)).path
    except UnknownObject:
        try:
            failed = (await service.failures.get(resident.gallery.folder)).get(object_id)
        except UsageError:
            # A gallery that ruiji did not make has no records of failures.
            failed = None
        if failed is None:
            raise
        if failed.reason in DEADLY:
            raise ImageError(failed.message, Reason(failed.reason)) from None
        path = failed.path
    if path is None:
        raise ImageError("the gallery does not know where its pictures are", Reason.missing)
    return path


@router.get("/failures", response_model=bodies.Failures)
async def failures(service: Kept, asked: Annotated[ListQuery, Query()]) -> Response:
    """The failed objects, with their reasons."""
    found = list((await service.failures.get(service.galleries.get(asked.gallery).gallery.folder)).values())
    after = asked.first + asked.count
    listed = [bodies.Failure(**asdict(one)) for one in found[asked.first : after]]
    return _json(bodies.Failures(failures=listed, total=len(found), next=after if after < len(found) else None))


@router.get("/runs", response_model=bodies.Run)
async def runs(service: Kept, asked: Annotated[Choice, Query()]) -> Response:
    """How the gallery's run stands: from Redis, or from the disk alone."""
    resident = service.galleries.get(asked.gallery)
    return _json(_run(resident, await service.runs.get(resident.gallery.folder)))


@router.get(
    "/runs/events",
    response_class=StreamingResponse,
    responses={200: {"description": "An event for each change.", "content": {"text/event-stream": {}}}, **_BUSY},
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


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}}},
)
async def metrics(service: Kept) -> Response:
    """What Prometheus collects, and a scaler needs."""
    seen: dict[str, Look] = {}
    for resident in service.galleries.all:
        try:
            seen[resident.name] = await service.runs.get(resident.gallery.folder)
        except RuijiError:
            # Of a gallery that ruiji did not make, or whose Redis is away, no run is known.
            continue
    now = Now(
        service.searches.waiting,
        service.decoders.pending,
        service.searches.passes,
        {one.name: len(one.gallery) for one in service.galleries.all},
        seen,
    )
    return Response(service.metrics.text(now), media_type="text/plain; version=0.0.4")


def _json(body: BaseModel) -> Response:
    return json_response(body.model_dump())


async def _unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
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
