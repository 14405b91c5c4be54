"""The objects of a gallery, what is known of them, and their small pictures."""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

import ruiji
from pipeline.choices import Reason
from pipeline.errors import ImageError, UnknownObject, UsageError
from search.labels import Annotations
from search.views.thumbnail import Thumbnail
from serve import bodies
from serve.bodies import Choice, ListQuery, SampleQuery, ThumbnailQuery
from serve.galleries import NoGallery, Resident
from serve.routes.common import BUSY, ERRORS, ObjectId, TheService, answer, unless_gone
from serve.service import Service
from serve.thumbnails import DEADLY

_PLACEHOLDER = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 256 256" role="img" aria-label="no picture">
<rect width="256" height="256" fill="#8e8e93" fill-opacity=".18"/>
<path d="M72 88h112v80H72zm0 64 32-32 28 28 20-16 32 28" fill="none" stroke="#8e8e93" stroke-width="6"/>
<path d="M60 196 196 60" stroke="#8e8e93" stroke-width="6"/></svg>
"""
router = APIRouter(responses=ERRORS)


@router.get("/objects", response_model=bodies.Objects)
async def objects(service: TheService, asked: Annotated[ListQuery, Query()]) -> Response:
    """A part of the gallery, in the order of its rows."""
    resident = service.galleries.get(asked.gallery)
    gallery = resident.gallery
    found = await asyncio.to_thread(gallery.objects, asked.first, asked.count)
    after = asked.first + asked.count
    listed = await asyncio.to_thread(_objects, service, resident, found)
    return answer(bodies.Objects(objects=listed, rows=gallery.rows, next=after if after < gallery.rows else None))


@router.get("/objects/{object_id:path}", response_model=bodies.Object)
async def one_object(service: TheService, object_id: ObjectId, asked: Annotated[Choice, Query()]) -> Response:
    """One object of the gallery."""
    resident = service.galleries.get(asked.gallery)
    found = await asyncio.to_thread(resident.gallery.find, object_id)
    (one,) = await asyncio.to_thread(_objects, service, resident, [found])
    return answer(one)


def _objects(service: Service, resident: Resident, found: Sequence[ruiji.GalleryObject]) -> list[bodies.Object]:
    labels = resident.labels(service.annotations)
    lines = [None if labels is None else labels.find(one.object_id, one.path) for one in found]
    return [
        bodies.Object(**asdict(one), annotations=dict(line) if line else None)
        for one, line in zip(found, lines, strict=True)
    ]


@router.get("/sample", response_model=bodies.Sample)
async def sample(service: TheService, asked: Annotated[SampleQuery, Query()]) -> Response:
    """Some random objects to start with."""
    resident = service.galleries.get(asked.gallery)
    gallery = await asyncio.to_thread(resident.only, asked.where, service.annotations)
    found = await asyncio.to_thread(gallery.sample, asked.count)
    objects = await asyncio.to_thread(_objects, service, resident, found)
    return answer(bodies.Sample(objects=objects, total=len(gallery)))


@router.get("/columns", response_model=bodies.Columns)
async def columns(service: TheService) -> Response:
    """The columns of the annotations that objects can be filtered by; none if there are no annotations."""
    return answer(bodies.Columns(columns=await asyncio.to_thread(_columns, service.annotations)))


def _columns(annotations: Annotations | None) -> list[bodies.Column]:
    if annotations is None:
        return []
    found = []
    for name in annotations.columns:
        values = annotations.values(name)
        found.append(bodies.Column(name=name, values=values if len(values) <= bodies.MOST_VALUES else None))
    return found


@router.get(
    "/thumbs/{object_id:path}",
    response_class=Response,
    responses={
        200: {
            "description": "A JPEG; a PNG if the picture is small itself; a placeholder if it cannot be shown.",
            "content": {kind: {} for kind in ("image/jpeg", "image/png", "image/svg+xml")},
        },
        304: {"description": "It is still the one of the `ETag` that `If-None-Match` names."},
        **BUSY,
    },
)
async def thumbnail(
    request: Request, service: TheService, object_id: ObjectId, asked: Annotated[ThumbnailQuery, Query()]
) -> Response:
    """The thumbnail of an object; failed objects have one too, unless their picture crashed a decoder."""
    try:
        made = await unless_gone(request, _small(service, asked, object_id))
    except ImageError as error:
        # Its reason is one of ours; what a file says never stands in a header.
        headers = {"x-ruiji-reason": error.reason, "cache-control": "no-store"}
        return Response(_PLACEHOLDER, headers=headers, media_type="image/svg+xml")
    # Asked again each time: one address has another picture once its file is replaced, or another gallery is served.
    tag = f'"{hashlib.sha256(made.data).hexdigest()[:32]}"'
    headers = {"cache-control": "private, no-cache", "etag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(made.data, headers=headers, media_type=f"image/{made.kind}")


async def _small(service: Service, asked: ThumbnailQuery, object_id: str) -> Thumbnail:
    """The small picture of an object; a gallery without shards has failed objects too.

    Raises:
        UnknownObject: it is neither in the gallery nor among the failed ones. NoGallery: of one that is not open.
        ImageError: nobody may decode it again, or the gallery does not know paths; or as `Thumbnails.get`.
        UsageError, MachineFault, Busy: as `Service.thumbnails` and `Thumbnails.get`.
    """
    folder = service.galleries.folder(asked.gallery)
    thumbnails = service.thumbnails(folder)
    try:
        gallery = service.galleries.get(asked.gallery).gallery
        return await thumbnails.get(lambda: _known(gallery.find(object_id).path), asked.size)
    except (UnknownObject, NoGallery):
        try:
            failed = (await service.failures.get(folder)).get(object_id)
        except UsageError:
            # A gallery that ruiji did not make has no records of failures.
            failed = None
        if failed is None:
            raise
        if failed.reason in DEADLY:
            raise ImageError(failed.message, Reason(failed.reason)) from None
        path = failed.path
    return await thumbnails.get(lambda: _known(path), asked.size)


def _known(path: str | None) -> str:
    if path is None:
        raise ImageError("the gallery does not know where its pictures are", Reason.missing)
    return path
