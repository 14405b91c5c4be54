"""The map of a gallery: positions as numbers, and the objects that they are of."""

import asyncio
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query
from starlette.responses import Response

import ruiji
from serve import bodies
from serve.bodies import MapObjectsQuery, MapQuery
from serve.maps import Making
from serve.replies import json_response
from serve.routes.common import ERRORS, TheService, answer

_POINTS = "Little-endian: uint32 m; uint32[m], gallery rows, ascending; float32[m, 2], their positions, of any scale."
_HEADERS: dict[str, Any] = {
    "x-ruiji-projection": {"description": "What made the map: `pca` or `umap`.", "schema": {"type": "string"}},
    "x-ruiji-rows": {"description": "What `/map/objects` needs to know as `rows_key`.", "schema": {"type": "string"}},
    "x-ruiji-unplaced": {
        "description": "Objects that cannot be ranked and are not on the map.",
        "schema": {"type": "integer"},
    },
}
router = APIRouter(responses=ERRORS)


@router.get(
    "/map/points",
    response_class=Response,
    responses={
        200: {"description": _POINTS, "headers": _HEADERS, "content": {"application/octet-stream": {}}},
        202: {"model": bodies.MapProgress, "description": "The map is being made: ask again in a moment."},
    },
)
async def map_points(service: TheService, asked: Annotated[MapQuery, Query()]) -> Response:
    """Positions of a gallery's objects on a plane, where objects that look alike are close together."""
    found = await service.maps.get(service.galleries.get(asked.gallery), asked.projection)
    if isinstance(found, Making):
        body = bodies.MapProgress(done=found.done, total=found.total)
        return json_response(body.model_dump(), 202, {"retry-after": "1"})
    headers = {
        "x-ruiji-projection": found.projection,
        "x-ruiji-rows": found.rows_key,
        "x-ruiji-unplaced": str(found.unplaced),
    }
    return Response(_packed(found), headers=headers, media_type="application/octet-stream")


def _packed(found: ruiji.GalleryMap) -> bytes:
    count = np.array([len(found.rows)], "<u4")
    return b"".join([count.tobytes(), found.rows.astype("<u4").tobytes(), found.positions.astype("<f4").tobytes()])


@router.get("/map/objects", response_model=bodies.MapObjects)
async def map_objects(service: TheService, asked: Annotated[MapObjectsQuery, Query()]) -> Response:
    """The objects of some points; 409 if the gallery has changed since the map was loaded."""
    gallery = service.galleries.get(asked.gallery).gallery
    rows = [int(row) for row in asked.rows.split(",")]
    found = await asyncio.to_thread(gallery.objects_at, rows, asked.rows_key)
    return answer(bodies.MapObjects(objects=[bodies.Object(**asdict(one)) for one in found]))
