"""`ruiji worker`: the processes that embed and reduce."""

import logging
import os
import signal
from contextlib import suppress
from dataclasses import replace
from typing import Annotated

import typer

from pipeline import settings, streams
from pipeline.arguments import Commands, Panel
from pipeline.choices import Device, LogFormat, Role
from workers.models import cli as models

logger = logging.getLogger(__name__)


def register(app: Commands) -> None:
    """Add this package's commands to the root command."""
    workers = [
        "ruiji worker --processes 4",
        "ruiji worker --role embed --device cuda",
        "ruiji worker --role reduce",
        "ruiji worker --role compare",
    ]
    app.command(panel=Panel.embed, examples=workers)(worker)
    app.command(panel=Panel.check, examples=["ruiji doctor"])(doctor)
    app.command("worker-process", hidden=True)(worker_process)
    models.register(app)


def worker(
    media_dir: settings.MediaDir,
    feature_dir: settings.FeatureDir,
    model: settings.ModelFile,
    redis_url: settings.RedisUrl = None,
    redis_password_file: settings.RedisPasswordFile = None,
    role: Annotated[
        Role,
        typer.Option(
            help="Run processes that embed, processes that reduce, or both (all). compare: look for what ruiji "
            "near-duplicates --distributed asks for; needs neither images nor the model's file."
        ),
    ] = Role.all,
    processes: settings.Processes = None,
    device: settings.WorkerDevice = Device.auto,
    batch_images: settings.BatchImages = None,
    gpu_memory_mb: settings.GpuMemory = None,
    threads: settings.Threads = None,
    slots: settings.Slots = None,
    slots_per_device: settings.SlotsPerDevice = settings.SLOTS_PER_DEVICE,
    window_segments: settings.Window = None,
    visibility_timeout_s: settings.VisibilityTimeout = settings.VISIBILITY_TIMEOUT_S,
    state_dir: settings.StateDir = None,
    log_format: settings.LogFormatOption = LogFormat.text,
) -> None:
    """Embed images and reduce shards until stopped, or compare features.

    Start any number, on any machine, at any time. Ctrl-C and SIGTERM let it finish what it has in hand.
    """
    from pipeline.errors import BrokerUnavailable, UsageError
    from pipeline.logs import set_up
    from pipeline.queue.connection import connect
    from pipeline.worker_settings import FOR_TESTS, WorkerSettings, read_variables
    from workers.places import cores_per_slot, gpus_for, place_processes
    from workers.slots import leased_gpus
    from workers.supervisor import Supervisor

    set_up(log_format)
    comparing = role is Role.compare
    if not comparing and not media_dir.is_dir():
        raise UsageError(f"the media folder {media_dir} does not exist or is not a folder")
    if role in (Role.all, Role.embed) and not os.access(model, os.R_OK):
        raise UsageError(f"no readable model at {model}; give an .onnx file with --model or RUIJI_MODEL")
    url = settings.resolve_redis_url(redis_url, redis_password_file, state_dir)
    # One that is away is waited for by each process; one that cannot be used is refused here, in one line.
    with suppress(BrokerUnavailable):
        connect(url).close()
    told = WorkerSettings(
        media_dir=media_dir,
        feature_dir=feature_dir,
        model=model,
        redis_url=url,
        state_dir=settings.make_state_folder(state_dir),
        processes=processes,
        batch_images=batch_images,
        gpu_memory_mb=gpu_memory_mb,
        slots_per_device=slots_per_device,
        visibility_timeout_s=visibility_timeout_s,
        log_format=log_format,
        **read_variables(os.environ, FOR_TESTS),
    )
    gpus = gpus_for(device) if role is not Role.reduce else ()
    cores = cores_per_slot(gpus, slots_per_device)
    with leased_gpus(url, gpus, slots_per_device, slots) as held:
        places = place_processes(role, held, cores, processes, slots_per_device, gpu_memory_mb)
        # Those that compute; a reducer takes little.
        computing = sum(place.role is not Role.reduce for place in places)
        told = replace(
            told,
            device=device if gpus else Device.cpu,
            threads=threads or max(1, cores * max(1, len(held)) // max(1, computing)),
            window_segments=window_segments or (settings.CUDA_WINDOW_SEGMENTS if held else settings.WINDOW_SEGMENTS),
        )
        raise typer.Exit(Supervisor(places, told).run())


def doctor(
    media_dir: settings.MediaDir,
    feature_dir: settings.FeatureDir,
    model: settings.ModelFile,
    redis_url: settings.RedisUrl = None,
    redis_password_file: settings.RedisPasswordFile = None,
    device: settings.WorkerDevice = Device.auto,
    state_dir: settings.StateDir = None,
) -> None:
    """Check Redis, folders, device, libraries and features.

    Embeds a sample of the gallery again. Exit code 1: this machine cannot do the work; 4: features disagree.
    """
    from pipeline.errors import GalleryMismatch, RuijiError, UsageError
    from pipeline.logs import set_up
    from workers.doctor import examine

    set_up()
    try:
        url = settings.resolve_redis_url(redis_url, redis_password_file, state_dir)
    except UsageError:
        if redis_url is not None:
            raise
        url = None
    states = set()
    for check in examine(media_dir, feature_dir, model, url, device):
        streams.tell(check)
        states.add(check.state)
    code = GalleryMismatch.exit_code if "wrong" in states else RuijiError.exit_code if "bad" in states else 0
    raise typer.Exit(code)


def worker_process(role: Annotated[Role, typer.Option()]) -> None:
    """One process of `ruiji worker`, which starts it with its settings in the environment."""
    # Nothing is in hand until Celery starts and listens itself; an exception in the midst of an import would be shown.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    from pipeline.children import CRASHED
    from pipeline.errors import RuijiError
    from pipeline.logs import set_up
    from pipeline.worker_settings import WorkerSettings

    told = WorkerSettings.from_environment(os.environ)
    set_up(told.log_format)
    try:
        from workers.process import run_process

        status = run_process(role, told)
    except (RuijiError, OSError):
        raise
    except Exception:
        logger.exception("a worker process failed", extra={"event": "process_failed"})
        status = CRASHED
    raise typer.Exit(status)
