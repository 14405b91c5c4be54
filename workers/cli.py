"""`ruiji worker`: the processes that embed and reduce."""

import os
import signal
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import layout, settings, streams
from pipeline.arguments import Commands, Panel
from pipeline.choices import Device, Fit, LogFormat, Role

Pooling = Annotated[
    str | None,
    typer.Option("--pooling", metavar="KIND", help="One vector from tokens or a map: cls, mean or map-mean."),
]
SkipTokens = Annotated[
    int | None,
    typer.Option("--skip-tokens", min=0, metavar="N", help="With --pooling mean: leave out the first N tokens."),
]

model_app = Commands(help="Add models, and look at them.")


def register(app: Commands) -> None:
    """Add this package's commands to the root command."""
    workers = ["ruiji worker --processes 4", "ruiji worker --role embed --device cuda", "ruiji worker --role reduce"]
    app.command(panel=Panel.embed, examples=workers)(worker)
    app.command(panel=Panel.check, examples=["ruiji doctor"])(doctor)
    app.command("worker-process", hidden=True)(worker_process)
    app.add_typer(model_app, name="model", rich_help_panel=Panel.check)


def worker(
    media_dir: settings.MediaDir,
    feature_dir: settings.FeatureDir,
    model: settings.ModelFile,
    redis_url: settings.RedisUrl = None,
    redis_password_file: settings.RedisPasswordFile = None,
    role: Annotated[Role, typer.Option(help="Run processes that embed, processes that reduce, or both.")] = Role.all,
    processes: settings.Processes = None,
    device: settings.WorkerDevice = Device.auto,
    batch_images: settings.BatchImages = None,
    gpu_memory_mb: settings.GpuMemory = None,
    threads: settings.Threads = None,
    slots_per_device: settings.SlotsPerDevice = settings.SLOTS_PER_DEVICE,
    window_segments: settings.Window = settings.WINDOW_SEGMENTS,
    visibility_timeout_s: settings.VisibilityTimeout = settings.VISIBILITY_TIMEOUT_S,
    state_dir: settings.StateDir = None,
    log_format: settings.LogFormatOption = LogFormat.text,
) -> None:
    """Embed images and reduce shards until stopped.

    Start any number, on any machine, at any time. Ctrl-C and SIGTERM let it finish what it has in hand.
    """
    from pipeline.errors import BrokerUnavailable, UsageError
    from pipeline.logs import set_up
    from pipeline.queue.connection import connect
    from pipeline.worker_settings import FOR_TESTS, WorkerSettings, read_variables
    from workers.slots import one_device
    from workers.supervisor import Supervisor

    set_up(log_format)
    if not media_dir.is_dir():
        raise UsageError(f"the media folder {media_dir} does not exist or is not a folder")
    if not os.access(model, os.R_OK):
        raise UsageError(f"no readable model at {model}; give an .onnx file with --model or RUIJI_MODEL")
    url = settings.resolve_redis_url(redis_url, redis_password_file, state_dir)
    # One that is away is waited for by each process; one that cannot be used is refused here, in one line.
    with suppress(BrokerUnavailable):
        connect(url).close()
    cores = len(os.sched_getaffinity(0))
    cuda = role is not Role.reduce and _uses_cuda(device)
    embed_processes = processes or (1 if cuda else cores)
    roles = [Role.embed] * embed_processes if role is not Role.reduce else []
    roles += [Role.reduce] if role is not Role.embed else []
    told = WorkerSettings(
        media_dir=media_dir,
        feature_dir=feature_dir,
        model=model,
        redis_url=url,
        state_dir=settings.make_state_folder(state_dir),
        device=device,
        processes=embed_processes,
        threads=threads or max(1, cores // embed_processes),
        batch_images=batch_images,
        gpu_memory_mb=gpu_memory_mb,
        slots_per_device=slots_per_device,
        window_segments=window_segments,
        visibility_timeout_s=visibility_timeout_s,
        log_format=log_format,
        **read_variables(os.environ, FOR_TESTS),
    )
    shown: AbstractContextManager[dict[str, str]] = one_device(url, slots_per_device) if cuda else nullcontext({})
    with shown as variables:
        raise typer.Exit(Supervisor(roles, told, variables).run())


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


@model_app.command(
    examples=["ruiji model add clip-vit-base-patch32", "ruiji model add FOLDER --name clip --output image_embeds"]
)
def add(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="An .onnx file, or a folder with one, as Hugging Face, timm, open_clip or immich publish it.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="The name for --model.  [default: the folder's name]")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="NAME", help="The graph's output with the features.")
    ] = None,
    pooling: Pooling = None,
    skip_tokens: SkipTokens = None,
    models_dir: settings.ModelsDir = None,
) -> None:
    """Copy a model, write its .toml, and prove that it runs.

    Reads how pictures are prepared from preprocessor_config.json, timm's config.json, open_clip_config.json or
    preprocess_cfg.json beside the model. What ruiji cannot do is refused by its name. Then: ruiji run --model NAME
    """
    from workers.models.library import add_model

    wanted = _given({"name": output, "pooling": pooling, "skip_tokens": skip_tokens})
    added = add_model(source, settings.models_dir(models_dir), name, wanted)
    _show(layout.toml_file(added.path))
    streams.note(
        f"added {added.name}, licence: {added.license or 'not stated'}; every command takes --model {added.name}"
    )


@model_app.command(
    examples=[
        "ruiji model declare siglip.onnx --fit stretch --mean 0.5 --std 0.5",
        "ruiji model declare resnet.onnx --fit crop --resize-size 256 \\",
        "    --reference torchvision --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
    ]
)
def declare(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    fit: Annotated[Fit, typer.Option(help="stretch resizes both sides, crop takes the centre, pad adds bars.")],
    resize_size: Annotated[
        int | None,
        typer.Option(
            "--resize-size", min=1, metavar="PIXELS", help="With crop: the length of the shorter side after resizing."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option("--reference", metavar="LIBRARY", help="With crop and pad: torchvision, huggingface or timm."),
    ] = None,
    pad_color: Annotated[
        str | None, typer.Option("--pad-color", metavar="COLOR", help="With pad: a value, or R,G,B, from 0 to 255.")
    ] = None,
    mean: Annotated[
        str, typer.Option("--mean", metavar="MEAN", help="A number, or R,G,B: input = (pixel / 255 - mean) / std.")
    ] = "0",
    std: Annotated[str, typer.Option("--std", metavar="STD", help="A number, or R,G,B.")] = "1",
    resize: Annotated[str, typer.Option("--resize", metavar="FILTER", help="One of Pillow's filters.")] = "bicubic",
    height: Annotated[
        int | None,
        typer.Option("--height", min=1, metavar="PIXELS", help="Height of the input, if the graph leaves it open."),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option("--width", min=1, metavar="PIXELS", help="Width of the input, if the graph leaves it open."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", metavar="NAME", help="The graph's output with the features.")
    ] = None,
    pooling: Pooling = None,
    skip_tokens: SkipTokens = None,
) -> None:
    """Write down how pictures are prepared for a model.

    Writes MODEL.toml beside it. docs/models.md has all keys and more examples.
    """
    from workers.models.library import declare_model

    given = {
        "fit": fit.value,
        "resize_size": resize_size,
        "reference": reference,
        "pad_color": None if pad_color is None else _numbers("--pad-color", pad_color, int),
        "resize": resize,
        "mean": _numbers("--mean", mean, float),
        "std": _numbers("--std", std, float),
        "height": height,
        "width": width,
    }
    came_out = {"name": output, "pooling": pooling, "skip_tokens": skip_tokens}
    written = declare_model(model, _given(given), _given(came_out))
    _show(written)


@model_app.command("list", examples=["ruiji model list"])
def list_models(models_dir: settings.ModelsDir = None) -> None:
    """List the models that were added."""
    from workers.models.library import added_models

    added = list(added_models(settings.models_dir(models_dir)))
    width = max((len(model.name) for model in added), default=0)
    for model in added:
        streams.tell(f"{model.name:<{width}}  {model.license or '-':<12}  {model.source}")
    if not added:
        streams.note("no model was added; see ruiji model add --help")


@model_app.command(
    examples=["ruiji model inspect MODEL.onnx", "ruiji model inspect MODEL.onnx --picture photo.jpg --out seen.png"]
)
def inspect(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Also write what the model sees of this picture; needs --out."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The .png file to write for --picture.")
    ] = None,
    max_pixels: settings.MaxPixels = settings.MAX_PIXELS,
) -> None:
    """Show what a model expects and returns, and its fingerprint.

    With --picture, a wrong crop or color shows at a glance. A model that does not fit is refused, with the reason.
    """
    from pipeline.errors import UsageError
    from pipeline.model import describe_model, load_model
    from pipeline.targets import check_targets

    if (picture is None) != (out is None):
        raise UsageError("--picture and --out belong together: the picture to look at, and the .png file to write")
    if out is not None and out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: the name of a .png file is needed, which keeps every pixel as it is")
    check_targets({"--out": out}, [model, picture], pictures={"--out"})
    for name, value in describe_model(model):
        streams.tell(f"{name:<14} {value}")
    if picture is not None and out is not None:
        from workers.decode.images import write_seen

        write_seen(picture, load_model(model).spec, max_pixels, out)
        streams.note(f"{out}: what the model sees of {picture}, before its values are scaled")


def _show(file: Path) -> None:
    for line in file.read_text(encoding="utf-8").splitlines():
        streams.tell(line)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any] | int | float:
    """One number, or several with commas between them."""
    from pipeline.errors import UsageError

    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a number, nor numbers with commas between them") from None
    return values if len(values) > 1 else values[0]


def _uses_cuda(device: Device) -> bool:
    if device is Device.auto:
        import onnxruntime

        return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return device is Device.cuda


def worker_process(role: Annotated[Role, typer.Option()]) -> None:
    """One process of `ruiji worker`, which starts it with its settings in the environment."""
    # Nothing is in hand until Celery starts and listens itself; an exception in the midst of an import would be shown.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    from pipeline.logs import set_up
    from pipeline.worker_settings import WorkerSettings
    from workers.process import run_process

    told = WorkerSettings.from_environment(os.environ)
    set_up(told.log_format)
    raise typer.Exit(run_process(role, told))
