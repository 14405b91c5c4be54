"""Look-alikes of an object, of a picture that is sent along, and of words."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from starlette.responses import Response

import ruiji
from pipeline.errors import QueryError, UsageError
from search.arrays import Float32
from serve import bodies
from serve.bodies import SentQuery, SimilarQuery
from serve.galleries import Resident
from serve.routes.common import BUSY, ERRORS, UPLOAD, ObjectId, TheService, answer, unless_gone
from serve.searches import WantedSearch
from serve.service import Service

router = APIRouter(responses=ERRORS)


@router.get("/similar/{object_id:path}", response_model=bodies.Similar, responses=BUSY)
async def similar(
    request: Request, service: TheService, object_id: ObjectId, asked: Annotated[SimilarQuery, Query()]
) -> Response:
    """What looks like an object of the gallery; without parameters by the article's Euclidean distance.

    The object itself need not meet the conditions.
    """
    resident = service.galleries.get(asked.gallery)

    async def query() -> str:
        return object_id

    hits = await unless_gone(request, _hits(service, resident, query, asked))
    return await asyncio.to_thread(_similar, service, resident, asked, hits, object_id)


@router.post("/search", response_model=bodies.Similar, responses=BUSY | UPLOAD)
async def search(
    request: Request,
    service: TheService,
    asked: Annotated[SentQuery, Query()],
    image: Annotated[UploadFile | None, File(description="A picture: the bytes of its file.")] = None,
    text: Annotated[
        str | None, Form(max_length=bodies.MOST_CHARACTERS, description="Words instead, for a model with a text tower.")
    ] = None,
) -> Response:
    """What looks like a picture that the request contains, or like what its words describe."""
    resident = service.galleries.get(asked.gallery)
    said: list[str] = []
    if (image is None) == (text is None or not text.strip()):
        raise QueryError("send a picture as image, or words as text")
    sent = await request.form()
    if len(sent.getlist("image")) > 1 or len(sent.getlist("text")) > 1:
        raise QueryError("send one picture, or words once: there is one answer")

    async def query() -> Float32:
        if image is not None:
            return await _picture_feature(service, resident, await image.read())
        assert text is not None
        return await _words_feature(resident, text, said.append)

    hits = await unless_gone(request, _hits(service, resident, query, asked))
    return await asyncio.to_thread(_similar, service, resident, asked, hits, note="; ".join(said) or None)


async def _hits(
    service: Service, resident: Resident, query: Callable[[], Awaitable[str | Float32]], asked: SimilarQuery
) -> tuple[ruiji.Hit, ...]:
    # Before a picture is decoded: what is filtered by may not be there. Without conditions there is nothing to do.
    gallery = resident.gallery
    if asked.where:
        gallery = await asyncio.to_thread(resident.only, asked.where, service.annotations)
    wanted = WantedSearch(
        gallery=gallery,
        query=await query(),
        top_k=asked.k,
        metric=asked.metric,
        min_similarity=asked.min_similarity,
        collapse=asked.collapse,
    )
    return await service.searches.hits(wanted)


async def _picture_feature(service: Service, resident: Resident, data: bytes) -> Float32:
    if resident.no_pictures is not None:
        raise UsageError(resident.no_pictures)
    gallery = resident.gallery
    pixels = await service.decoders.pixels(data, await asyncio.to_thread(lambda: gallery.spec))
    feature: Float32 = (await asyncio.to_thread(gallery.encode, pixels[None]))[0]
    return feature


async def _words_feature(resident: Resident, text: str, say: Callable[[str], None]) -> Float32:
    if resident.no_words is not None:
        raise UsageError(resident.no_words)
    return await asyncio.to_thread(resident.gallery.encode_text, text, say)


def _similar(
    service: Service,
    resident: Resident,
    asked: SimilarQuery,
    hits: tuple[ruiji.Hit, ...],
    object_id: str | None = None,
    note: str | None = None,
) -> Response:
    known = resident.labels(service.annotations)
    images = [
        bodies.SimilarImage(
            objectId=hit.object_id,
            distance=hit.distance,
            similarity=hit.similarity,
            rank=rank,
            path=hit.path,
            label=None if known is None else known.label(hit.object_id, hit.path),
            others=hit.others,
        )
        for rank, hit in enumerate(hits, 1)
    ]
    return answer(
        bodies.Similar(
            queryObjectId=object_id, similarImages=images, gallery=resident.name, metric=asked.metric, note=note
        )
    )
