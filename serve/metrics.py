"""What a service tells Prometheus: requests and their latency, what waits, and how each gallery's run stands."""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.follow import Look

#: From a request that is in the cache to a pass over a million rows.
_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.06, 0.1, 0.2, 0.5, 1, 2, 5, 10)
#: Answers that last as long as somebody listens.
_ENDLESS = frozenset({"/runs/events"})


class Metrics:
    """What is counted while requests are answered."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "ruiji_requests", "Requests that were answered.", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "ruiji_request_seconds",
            "From a request to the end of its answer.",
            ["route"],
            buckets=_BUCKETS,
            registry=self._registry,
        )

    def count(self, route: str, status: int, seconds: float) -> None:
        """Note one answer."""
        self._requests.labels(route, str(status)).inc()
        if route not in _ENDLESS:
            self._seconds.labels(route).observe(seconds)

    def text(self, now: "Now") -> bytes:
        """Everything in Prometheus' text format."""
        current = CollectorRegistry()
        current.register(now)
        return generate_latest(self._registry) + generate_latest(current)


class Now:
    """What is read when it is asked for."""

    def __init__(
        self, searches: int, pictures: int, passes: int, objects: dict[str, int], runs: dict[str, Look]
    ) -> None:
        """Take what there is to tell.

        Args:
            searches, pictures: that wait.
            passes: over galleries, so far.
            objects: searched, by gallery.
            runs: by gallery; those that nothing is known of are not there.
        """
        self._waiting = {"searches": searches, "pictures": pictures}
        self._passes, self._objects, self._runs = passes, objects, runs

    def collect(self) -> Iterator[Metric]:
        """Each family, as `prometheus_client` asks for them."""
        waiting = GaugeMetricFamily("ruiji_waiting", "What waits for its turn.", labels=["kind"])
        for kind, number in self._waiting.items():
            waiting.add_metric([kind], number)
        yield waiting
        yield CounterMetricFamily("ruiji_passes", "Passes over a gallery; searches share them.", self._passes)
        objects = GaugeMetricFamily("ruiji_gallery_objects", "Objects that are searched.", labels=["gallery"])
        for gallery, number in self._objects.items():
            objects.add_metric([gallery], number)
        yield objects
        run = GaugeMetricFamily(
            "ruiji_run_objects", "Objects of the list, by how they stand.", labels=["gallery", "state"]
        )
        rate = GaugeMetricFamily(
            "ruiji_worker_images_per_second", "Of late.", labels=["gallery", "host", "pid", "role", "device"]
        )
        for gallery, seen in self._runs.items():
            for state in ("done", "failed", "running", "pending"):
                run.add_metric([gallery, state], getattr(seen.status, state))
            for worker in seen.status.workers:
                labels = [gallery, worker.host, str(worker.pid), worker.role, worker.device]
                rate.add_metric(labels, worker.images_per_s)
        yield run
        yield rate


class Measured:
    """Counts each request, and takes its time."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            # Only routes are labels: whatever a stranger asks for would be others.
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.count(route, status, time.monotonic() - began)
