"""Look-alikes of an object, and of a picture that is sent along."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, File, Query, Request, UploadFile
from starlette.responses import Response

import ruiji
from pipeline.errors import UsageError
from serve import bodies
from serve.bodies import PictureQuery, SimilarQuery
from serve.galleries import Resident
from serve.routes.common import BUSY, ERRORS, UPLOAD, Kept, ObjectId, answer, unless_gone
from serve.searches import Wanted
from serve.service import Service

router = APIRouter(responses=ERRORS)


@router.get("/similar/{object_id:path}", response_model=bodies.Similar, responses=BUSY)
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
    return _similar(resident, asked, object_id, await unless_gone(request, service.searches.hits(wanted)))


@router.post("/search", response_model=bodies.Similar, responses=BUSY | UPLOAD)
async def search(
    request: Request,
    service: Kept,
    image: Annotated[UploadFile, File(description="A picture: the bytes of its file.")],
    asked: Annotated[PictureQuery, Query()],
) -> Response:
    """What looks like a picture that is sent along."""
    resident = service.galleries.get(asked.gallery)
    hits = await unless_gone(request, _picture_hits(service, resident, await image.read(), asked))
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
    return answer(
        bodies.Similar(queryObjectId=object_id, similarImages=images, gallery=resident.name, metric=asked.metric)
    )
