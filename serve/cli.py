"""`ruiji serve`: the gallery as a service."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline import settings
from pipeline.arguments import Commands, Panel
from pipeline.choices import Device
from pipeline.errors import RuijiError, UsageError
from search.cli import Labels

#: Shorter than a worker's: somebody waits for the answer.
_MAX_IMAGE_S = 10


def register(app: Commands) -> None:
    """Add this package's command to the root command."""
    examples = [
        "ruiji serve --feature-dir FEATURES --media-dir PHOTOS --model MODEL.onnx",
        "ruiji serve --host 0.0.0.0 --web-name gallery.lan --web-token-file token.txt",
    ]
    app.command(panel=Panel.search, examples=examples)(serve)


def serve(
    feature_dir: settings.FeatureDir,
    media_dir: settings.OptionalMediaDir = None,
    model: Annotated[
        Path | None,
        settings.model_option(
            "The ONNX model; its name is that of the gallery that is asked if none is named. Its file is needed only "
            "to search with pictures."
        ),
    ] = None,
    labels: Labels = None,
    list_path: settings.ListFile = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Where to listen; all but loopback needs a token.")] = (
        "127.0.0.1"
    ),
    port: settings.WebPort = 8000,
    web_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name by which the service is reached. Repeatable."),
    ] = None,
    web_token_file: settings.WebTokenFile = None,
    device: settings.WorkerDevice = Device.auto,
    redis_url: settings.RedisUrl = None,
    redis_password_file: settings.RedisPasswordFile = None,
    state_dir: settings.StateDir = None,
    max_pixels: settings.MaxPixels = settings.MAX_PIXELS,
    max_image_s: settings.MaxImageSeconds = _MAX_IMAGE_S,
    max_image_mb: settings.MaxImageMegabytes = settings.MAX_IMAGE_MB,
) -> None:
    """Answer searches over HTTP until stopped (Ctrl-C).

    On loopback every user of this machine can ask, unless there is a token. docs/serve.md has the routes.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise RuijiError(f"ruiji serve needs its extra ({error}): pip install 'ruiji[serve]', or make setup") from None
    from pipeline.logs import set_up
    from pipeline.plans.plan import Limits
    from search.labels import read_annotations
    from serve.galleries import Galleries
    from serve.server import Address
    from serve.server import serve as serve_until_stopped
    from serve.service import Service

    set_up()
    if media_dir is not None and not media_dir.is_dir():
        raise UsageError(f"the media folder {media_dir} does not exist or is not a folder")
    service = Service(
        Galleries(feature_dir, model, device, max_pixels),
        # Whoever downloads a list does not know where the service was started.
        None if media_dir is None else media_dir.absolute(),
        list_path,
        Limits(max_pixels, max_image_s, max_image_mb),
        settings.state_folder(state_dir),
        lambda: settings.resolve_redis_url(redis_url, redis_password_file, state_dir),
        None if labels is None else read_annotations(labels),
    )
    serve_until_stopped(service, Address(host, port, web_name or (), web_token_file))
