"""`ruiji model`: add models, say how their pictures are prepared, and look at them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline import layout, settings, streams
from pipeline.arguments import Commands, Panel
from pipeline.choices import Contract, Fit

Pooling = Annotated[
    str | None,
    typer.Option("--pooling", metavar="KIND", help="How tokens or a map become one vector: cls, mean or map-mean."),
]
SkipTokens = Annotated[
    int | None,
    typer.Option("--skip-tokens", min=0, metavar="N", help="With --pooling mean: leave out the first N tokens."),
]

Output = Annotated[str | None, typer.Option("--output", metavar="NAME", help="The graph's output with the features.")]

model_app = Commands(help="Add models, and look at them.")


def register(app: Commands) -> None:
    """Add the group to the root command."""
    app.add_typer(model_app, name="model", rich_help_panel=Panel.check)


@model_app.command(
    examples=[
        "ruiji model add clip-vit-base-patch32",
        "ruiji model add FOLDER/onnx/vision_model.onnx --name clip --output image_embeds",
        "ruiji model add hf:ORG/REPO:onnx/model.onnx",
        "ruiji model add timm:mobilenetv3_large_100.ra_in1k",
    ]
)
def add(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="An .onnx file, or a folder as Hugging Face, timm, open_clip or immich publish it, with an .onnx file "
            "or only with .safetensors of transformers, which are exported; or hf:ORG/REPO[@REVISION][:FILE], to "
            "download it; or timm:NAME or open_clip:NAME/PRETRAINED, to export it.",
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="The name for --model.  [default: that of the folder, or REPO]"),
    ] = None,
    output: Output = None,
    pooling: Pooling = None,
    skip_tokens: SkipTokens = None,
    contract: Annotated[
        Contract | None,
        typer.Option(help="With timm:NAME: article, a graph that takes stretched RGB in [0, 1] and needs no .toml."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Also compare it with transformers, timm or open_clip, whichever it comes from."),
    ] = False,
    models_dir: settings.ModelsDir = None,
) -> None:
    """Copy a model, write its .toml, and prove that it runs.

    Reads how pictures are prepared from preprocessor_config.json, timm's config.json, open_clip_config.json or
    preprocess_cfg.json next to the model. If ruiji cannot do something, the refusal names it. Then: ruiji run --model
    NAME
    """
    from workers.models.library import add_model

    wanted = _given({"name": output, "pooling": pooling, "skip_tokens": skip_tokens})
    models = settings.models_dir(models_dir)
    added = add_model(source, models, name, wanted, article=contract is not None, check=check)
    _show(layout.toml_file(added.path))
    if added.checked is not None:
        streams.note(added.checked)
    if added.no_words is not None:
        streams.note(f"without its text tower, so it cannot be searched with words: {added.no_words}")
    words = ", and ruiji search takes --text" if added.has_words else ""
    streams.note(
        f"added {added.name}, licence: {added.license or 'not stated'}; every command takes --model {added.name}{words}"
    )


@model_app.command(
    examples=[
        "ruiji model declare siglip.onnx --fit stretch --resize bicubic --mean 0.5 --std 0.5",
        "ruiji model declare resnet.onnx --fit crop --resize bilinear --resize-size 256 \\",
        "    --reference torchvision --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225",
    ]
)
def declare(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The .onnx file.")],
    fit: Annotated[Fit, typer.Option(help="stretch resizes both sides, crop takes the centre, pad adds bars.")],
    resize: Annotated[
        str,
        typer.Option("--resize", metavar="FILTER", help="One of Pillow's filters, mostly bilinear or bicubic."),
    ],
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
    height: Annotated[
        int | None,
        typer.Option("--height", min=1, metavar="PIXELS", help="Height of the input, if the graph leaves it open."),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option("--width", min=1, metavar="PIXELS", help="Width of the input, if the graph leaves it open."),
    ] = None,
    output: Output = None,
    pooling: Pooling = None,
    skip_tokens: SkipTokens = None,
) -> None:
    """Write down how pictures are prepared for a model.

    Writes MODEL.toml next to it. docs/models.md explains all keys, with more examples.
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
    from workers.models.library import added_models, leftovers

    added = list(added_models(settings.models_dir(models_dir)))
    width = max((len(model.name) for model in added), default=0)
    for model in added:
        streams.tell(f"{model.name:<{width}}  {model.license or '-':<12}  {model.source}")
    if not added:
        streams.note("no model was added; see ruiji model add --help")
    for folder, size in leftovers(settings.models_dir(models_dir)):
        streams.note(f"{folder}: {size / 1e6:.0f} MB of a command that failed or was ended; delete it if none runs now")


@model_app.command(
    examples=["ruiji model inspect MODEL.onnx", "ruiji model inspect MODEL.onnx --picture photo.jpg --out seen.png"]
)
def inspect(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="The .onnx file, or a name that ruiji model list shows.")
    ],
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
    model = settings.model_file(model)
    check_targets({"--out": out}, [model, picture], pictures={"--out"})
    loaded = load_model(model)
    for name, value in describe_model(loaded):
        streams.tell(f"{name:<14} {value}")
    if picture is not None and out is not None:
        from workers.decode.images import write_seen

        write_seen(picture, loaded.spec, max_pixels, out)
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
