"""Retrieval on MNIST, step by step or all at once (`make mnist`): `python -m examples.mnist --help`.

Every step reads and writes below one output folder, and can be run again:

    OUTPUT/data/                    the four files of MNIST
    OUTPUT/mnist_2d.onnx, .toml     the article's network, its training curve beside it (.csv, .png); likewise mnist_64d
    OUTPUT/<q>-<g>-<seed>/media/    a draw of q queries and g gallery images, with its list and annotations
    OUTPUT/<q>-<g>-<seed>/features/ its shards, made by `ruiji run`

Exit codes: 0 done, 1 a step failed or a target is missed, 2 usage, 130 interrupted.
"""

import json
import os
import shutil
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from examples.digits.demo import DemoError, ruiji
from examples.mnist import data, draw
from pipeline.arguments import Commands
from pipeline.errors import RuijiError


class Network(StrEnum):
    """`2d` is the article's, `64d` the better one."""

    two = "2d"
    many = "64d"


#: With 1,000 queries and the other 9,000 test images as gallery, by the recipes of `examples.mnist.train`.
TARGETS = {"2d": {"rank_1": 0.98, "map": 0.98}, "64d": {"rank_1": 0.997, "map": 0.994}}
ARTICLE_DRAW, WHOLE_DRAW = (1, 100), (1000, 9000)
#: Lines of the printed ranking, and pictures on a sheet; the article shows 20.
_SHOWN = 20
_ON_SHEET = 12
_SHARD_ROWS = 2500

Output = Annotated[Path, typer.Option("--output", help="Where everything is.")]
Source = Annotated[Path | None, typer.Option("--from", help="Folder of the four files; else they are downloaded.")]
Mirrors = Annotated[Path, typer.Option(help="TOML with the addresses to download from, and the checksums.")]
Queries = Annotated[int, typer.Option(min=1, help="Images to draw as queries.")]
GalleryImages = Annotated[int, typer.Option("--gallery", min=1, help="Images to draw as gallery.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the draw.")]
Threads = Annotated[int, typer.Option(min=1, help="Of torch; with another number the result differs a little.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Other than the recipe's.")]
Images = Annotated[int | None, typer.Option(min=64, help="Train with so many images only.")]
DEFAULT_OUTPUT = Path("mnist-output")

app = Commands(
    help="Retrieval on MNIST: the article's system on ruiji's pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("data")
def get_data(source: Source = None, mirrors: Mirrors = data.MIRRORS, output: Output = DEFAULT_OUTPUT) -> None:
    """Get the four files of MNIST, checked."""
    data.fetch(output / "data", source, mirrors)
    print(f"MNIST is in {output / 'data'}")


@app.command("draw")
def draw_images(
    queries: Queries = ARTICLE_DRAW[0],
    gallery: GalleryImages = ARTICLE_DRAW[1],
    seed: Seed = 0,
    output: Output = DEFAULT_OUTPUT,
) -> None:
    """Draw queries and gallery from the test set; PNG files and anno.csv."""
    media_dir = draw_dir(output, queries, gallery, seed, new=True) / "media"
    draw.draw(data.load(output / "data", "test"), media_dir, queries, gallery, seed)
    print(f"num query: {queries}, num gallery: {gallery} in {media_dir}")


@app.command("train")
def train_network(
    network: Network,
    epochs: Epochs = None,
    images: Images = None,
    threads: Threads = 2,
    output: Output = DEFAULT_OUTPUT,
) -> None:
    """Train a network, draw its curve, export it as ONNX and compare that with torch.

    Features that an earlier network of this name made below the output folder are removed.
    """
    from dataclasses import replace

    from examples.mnist import show, train
    from workers.models.torch_export import ExportError

    recipe = train.RECIPES[network]
    recipe = replace(recipe, epochs=epochs or recipe.epochs, images=images)
    digits = data.load(output / "data", "train")
    started = time.perf_counter()
    with Progress(transient=True) as progress:
        bar = progress.add_task("train", total=1.0)
        trained, curve = train.train(
            digits, recipe, threads, lambda share, text: progress.update(bar, completed=share, description=text)
        )
    seconds = time.perf_counter() - started
    target = model_file(output, network)
    # Before the file is another one: `ruiji run` refuses to add to the features of another network.
    for features in output.glob(f"*-*-*/features/{target.stem}"):
        shutil.rmtree(features)
    try:
        difference = train.export(trained, data.load(output / "data", "test"), target)
    except ExportError as error:
        # `all` would take what is there for the trained network.
        target.unlink()
        raise RuijiError(
            f"{error}; the file is removed. Is torch that of requirements/torch.txt, and the rest that of "
            "requirements/mnist.lock?"
        ) from None
    train.write_curve(curve, target.with_suffix(".csv"))
    show.curve(target.with_suffix(".png"), curve)
    last = curve[-1]
    print(f"{target}: trained in {seconds:.0f} s with {threads} threads")
    print(f"on held back training images: rank-1 {last.rank_1:.4f}, mAP {last.mean_average_precision:.4f}")
    print(f"largest difference of the ONNX file to torch: {difference:.2g}")


@app.command()
def extract(
    network: Network,
    queries: Queries = ARTICLE_DRAW[0],
    gallery: GalleryImages = ARTICLE_DRAW[1],
    seed: Seed = 0,
    output: Output = DEFAULT_OUTPUT,
) -> None:
    """Turn a draw into shards with `ruiji run`: a Redis, workers, one task per image."""
    folder = draw_dir(output, queries, gallery, seed)
    arguments = ["run", "--media-dir", "media", "--feature-dir", "features", "--shard-rows", str(_SHARD_ROWS)]
    ruiji(folder, [*arguments, "--model", relative_model(output, network, folder)])


@app.command()
def rank(
    network: Network,
    queries: Queries = ARTICLE_DRAW[0],
    gallery: GalleryImages = ARTICLE_DRAW[1],
    seed: Seed = 0,
    output: Output = DEFAULT_OUTPUT,
) -> None:
    """Rank the gallery for the first query: the article's table, label counts and a sheet."""
    from examples.mnist import show
    from search.labels import read_annotations

    folder = draw_dir(output, queries, gallery, seed)
    annotations = read_annotations(folder / "media" / "anno.csv")
    query = next(row for row in annotations.rows if row["data_type"] == "query")
    arguments = ["search", "--feature-dir", "features", "--model", relative_model(output, network, folder)]
    arguments += ["--media-dir", "media", "-k", str(queries + gallery), "--format", "jsonl"]
    found = []
    for line in ruiji(folder, [*arguments, f"media/{query['img_path']}"]).splitlines():
        hit = json.loads(line)
        row = annotations.find(hit["object_id"], hit["path"])
        # Queries are objects of the same shards; the article's ranking is of the gallery.
        if row is not None and row["data_type"] == "gallery":
            found.append(show.Found(hit["distance"], hit["similarity"], row["label"], hit["path"]))
    for line in show.table(query["label"], found, _SHOWN):
        print(line)
    target = folder / f"ranking_{network}.png"
    show.sheet(target, folder / "media", query["img_path"], query["label"], found[:_ON_SHEET])
    print(f"\nLook at it: {target}")


@app.command()
def scatter(
    queries: Queries = WHOLE_DRAW[0],
    gallery: GalleryImages = WHOLE_DRAW[1],
    seed: Seed = 0,
    output: Output = DEFAULT_OUTPUT,
) -> None:
    """Draw the 2-d features as the article's scatter plot."""
    from examples.mnist import show

    folder = draw_dir(output, queries, gallery, seed)
    target = folder / "scatter.png"
    show.scatter(target, folder / "features" / model_file(output, Network.two).stem, folder / "media" / "anno.csv")
    print(f"Look at it: {target}")


@app.command()
def evaluate(
    network: Network,
    queries: Queries = WHOLE_DRAW[0],
    gallery: GalleryImages = WHOLE_DRAW[1],
    seed: Seed = 0,
    output: Output = DEFAULT_OUTPUT,
) -> None:
    """Measure the retrieval with `ruiji evaluate`, with curves and a sheet of the worst queries."""
    print(measure(network, draw_dir(output, queries, gallery, seed), output, "table"), end="")


@app.command("all")
def run_all(
    source: Source = None,
    seed: Seed = 0,
    threads: Threads = 2,
    output: Output = DEFAULT_OUTPUT,
) -> None:
    """Everything: the article's ranking with both networks, then both measured on the whole test set.

    A network that was trained before is used as it is; delete its .onnx file to train it again.
    """
    get_data(source, output=output)
    for network in Network:
        if model_file(output, network).exists():
            print(f"{model_file(output, network)} is there; delete it to train it again")
        else:
            train_network(network, threads=threads, output=output)
    draw_images(*WHOLE_DRAW, seed, output)
    answers = {}
    for network in Network:
        extract(network, *WHOLE_DRAW, seed, output)
        answers[network] = json.loads(measure(network, draw_dir(output, *WHOLE_DRAW, seed), output, "json"))
    scatter(*WHOLE_DRAW, seed, output)
    draw_images(*ARTICLE_DRAW, seed, output)
    for network in Network:
        print(f"\n--- the article's ranking, {network} network", flush=True)
        extract(network, *ARTICLE_DRAW, seed, output)
        rank(network, *ARTICLE_DRAW, seed, output)
    queries, gallery = WHOLE_DRAW
    print(f"\n--- {queries} queries against {gallery} images")
    reached = [judge(network, answer["metrics"]) for network, answer in answers.items()]
    if not all(reached):
        raise typer.Exit(1)


def measure(network: Network, folder: Path, output: Path, form: str) -> str:
    """What `ruiji evaluate` says of a draw; draws its curves and worst queries beside it."""
    arguments = ["evaluate", "--feature-dir", "features", "--model", relative_model(output, network, folder)]
    arguments += ["--labels", "media/anno.csv", "--media-dir", "media", "--format", form]
    return ruiji(folder, [*arguments, "--plot", f"curves_{network}.png", "--sheet", f"worst_{network}.png"])


def judge(network: Network, metrics: dict[str, dict[str, float]]) -> bool:
    """Print how a network stands to its targets; True if it reaches them.

    Args:
        metrics: as `ruiji evaluate --format json` has them.
    """
    reached = True
    for key, target in TARGETS[network].items():
        value = metrics[key]["value"]
        reached &= value >= target
        print(f"{network}: {key} {value:.4f}, target {target}: {'reached' if value >= target else 'MISSED'}")
    return reached


def draw_dir(output: Path, queries: int, gallery: int, seed: int, *, new: bool = False) -> Path:
    """The folder of one draw.

    Raises:
        DataError: it is not there, and is not to be made anew.
    """
    folder = output.absolute() / f"{queries}-{gallery}-{seed}"
    if not new and not folder.is_dir():
        wanted = f"draw --queries {queries} --gallery {gallery} --seed {seed}"
        raise data.DataError(f"there is no {folder}; first run  python -m examples.mnist {wanted}")
    return folder


def model_file(output: Path, network: Network) -> Path:
    """Where a network is exported to."""
    return output / f"mnist_{network}.onnx"


def relative_model(output: Path, network: Network, folder: Path) -> str:
    """The model as a command that runs in `folder` names it."""
    return os.path.relpath(model_file(output, network), folder)


def main() -> None:
    """The command line."""
    try:
        app(prog_name="python -m examples.mnist")
    except (DemoError, RuijiError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; run it again to continue", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
