"""The state of the service itself, for people and for Prometheus."""

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from pipeline.errors import RuijiError
from pipeline.follow import Look
from pipeline.versions import installed_versions
from search.options import Metric
from serve import bodies
from serve.galleries import Resident
from serve.metrics import Now
from serve.routes.common import ERRORS, TheService, answer

router = APIRouter(responses=ERRORS)


@router.get("/healthz", response_model=bodies.Health)
async def health(request: Request, service: TheService) -> Response:
    """State of the service: its galleries, and how each of them computes a query."""
    galleries = await asyncio.to_thread(lambda: [_gallery_health(one) for one in service.galleries.all])
    problem = service.galleries.refused or any(one.problem for one in service.galleries.all)
    body = bodies.Health(
        status="degraded" if problem else "ok",
        version=installed_versions()["ruiji"],
        default=service.galleries.default,
        media=service.media_dir is not None,
        token=request.app.state.access.token is not None,
        galleries=galleries,
        coming=service.galleries.coming,
        refused=service.galleries.refused,
    )
    return answer(body)


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
        words=resident.no_words is None,
        paths=gallery.fingerprint is not None,
        way={metric: gallery.way(1, metric) for metric in Metric},
        problem=resident.problem,
    )


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus' text format.", "content": {"text/plain": {}}}},
)
async def metrics(service: TheService) -> Response:
    """Metrics for Prometheus, among them those that a scaler needs."""
    seen: dict[str, Look] = {}
    for name in service.galleries.names:
        try:
            seen[name] = await service.runs.get(service.galleries.folder(name))
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
