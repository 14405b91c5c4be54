"""`ruiji search`. What it needs beyond the standard library and typer is imported when it runs."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import EXIT_INCOMPLETE, UsageError
from pipeline.settings import MAX_PIXELS, Device, FeatureDir, MaxPixels, ModelFile, OptionalMediaDir
from search import evaluate
from search.options import TOP_K, Metric, OutputFormat

if TYPE_CHECKING:
    from search.gallery import Gallery
    from search.queries import Queries
    from search.ranking import Hit, Ranking

COLUMNS = ("rank", "object_id", "path", "similarity", "distance")

Images = Annotated[list[Path], typer.Argument(metavar="IMAGE", help="The pictures to find look-alikes of.")]
TopK = Annotated[int, typer.Option("--top-k", "-k", min=1, help="Hits per query.")]
MetricOption = Annotated[
    Metric,
    typer.Option(
        "--metric",
        help="The order. cosine and angle: the same order, distance is the angle in radians; "
        "euclidean: between raw features.",
    ),
]
SearchDevice = Annotated[
    Device,
    typer.Option(
        "--device",
        envvar="RUIJI_DEVICE",
        help="cuda: embed and rank on CUDA, the ranking with torch; cpu: numpy. auto is cpu for now. "
        "The ranking is the same.",
    ),
]
Format = Annotated[
    OutputFormat,
    typer.Option("--format", help="table for people; the others have every digit. paths: one path a line."),
]
Sheet = Annotated[
    Path | None,
    typer.Option("--sheet", help="Also draw the hits to this .jpg or .png; needs --media-dir."),
]
IncludeStale = Annotated[bool, typer.Option("--include-stale", help="Also search objects that left the object list.")]


def register(app: typer.Typer) -> None:
    """Add `search` and `evaluate` to the root command."""
    app.command()(search)
    evaluate.register(app)


def search(
    images: Images,
    feature_dir: FeatureDir,
    model_path: ModelFile,
    media_dir: OptionalMediaDir = None,
    top_k: TopK = TOP_K,
    metric: MetricOption = Metric.cosine,
    device: SearchDevice = Device.auto,
    output_format: Format = OutputFormat.table,
    sheet: Sheet = None,
    include_stale: IncludeStale = False,
    max_pixels: MaxPixels = MAX_PIXELS,
) -> None:
    """Rank a gallery's objects by how much they look like IMAGE; exact, ties by object id.

    Exit code 3: some of the images could not be read; the others were searched with.
    """
    from pipeline.model import load_model
    from pipeline.store import gallery_folder
    from search.gallery import open_gallery
    from search.queries import check_model, embed_images

    if sheet is not None:
        from search.sheet import check_target

        if media_dir is None:
            raise UsageError("--sheet shows the pictures of the hits: say where they are with --media-dir")
        check_target(sheet, len(images), top_k)
    gallery = open_gallery(gallery_folder(feature_dir, model_path), include_stale)
    if output_format is OutputFormat.paths and gallery.fingerprint is None:
        raise UsageError("--format paths: this gallery has no gallery.json and does not know paths, only object ids")
    model = load_model(model_path)
    check_model(model, gallery)
    _say_provenance(gallery)
    queries = embed_images(images, model, "cuda" if device is Device.cuda else "cpu", max_pixels)
    for image, reason in queries.failures:
        _say(f"{_label(image)}: {reason}; left out")
    ranking = _rank(gallery, queries, top_k, metric, device)
    _say_unusable(ranking)
    _write(queries, ranking, output_format, media_dir)
    if sheet is not None and media_dir is not None:
        _draw(sheet, queries, ranking, media_dir, max_pixels)
    if queries.failures:
        raise typer.Exit(EXIT_INCOMPLETE)


def _rank(gallery: "Gallery", queries: "Queries", top_k: int, metric: Metric, device: Device) -> "Ranking":
    if device is Device.cuda:
        try:
            from search.ranking_torch import rank_torch
        except ImportError as error:
            raise UsageError(
                f"--device cuda ranks with torch, which cannot be imported ({error}); "
                "set up with make setup ACCEL=gpu, or use --device cpu"
            ) from None
        return rank_torch(gallery, queries.features, top_k, metric)
    from search.ranking import rank

    return rank(gallery, queries.features, top_k, metric)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _label(image: Path) -> str:
    # File names need not be UTF-8; stdout has to be.
    return str(image).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _say_provenance(gallery: "Gallery") -> None:
    from pipeline.plan import library_versions

    if gallery.fingerprint is None:
        _say("warning: unverified gallery: nothing says which model and preprocessing made these shards")
    here = library_versions()
    for versions in gallery.versions:
        changed = [
            f"{name} {made} (here {here.get(name)})" for name, made in versions.items() if here.get(name) != made
        ]
        if changed:
            _say(f"warning: shards were made with {', '.join(changed)}; similarities can differ in their last digits")


def _say_unusable(ranking: "Ranking") -> None:
    if ranking.zero_rows or ranking.nonfinite_rows:
        _say(
            f"warning: left out {ranking.zero_rows} objects whose feature is all zero and "
            f"{ranking.nonfinite_rows} whose feature has NaN or infinite values"
        )
    if not ranking.hits[0]:
        _say("the gallery has no object that can be ranked")


def _write(queries: "Queries", ranking: "Ranking", output_format: OutputFormat, media_dir: Path | None) -> None:
    found = list(zip(map(_label, queries.images), ranking.hits, strict=True))
    if output_format is OutputFormat.table:
        for line in _tables(found):
            typer.echo(line)
    elif output_format is OutputFormat.json:
        value = [
            {"query": query, "hits": [_object(rank, hit) for rank, hit in enumerate(hits, 1)]} for query, hits in found
        ]
        typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
    elif output_format is OutputFormat.jsonl:
        for query, hits in found:
            for rank, hit in enumerate(hits, 1):
                typer.echo(json.dumps({"query": query, **_object(rank, hit)}, ensure_ascii=False))
    elif output_format is OutputFormat.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("query", *COLUMNS))
        for query, hits in found:
            writer.writerows((query, *_object(rank, hit).values()) for rank, hit in enumerate(hits, 1))
    else:
        for _, hits in found:
            for hit in hits:
                assert hit.path is not None
                typer.echo(hit.path if media_dir is None else str(media_dir / hit.path))


def _object(rank: int, hit: "Hit") -> dict[str, int | float | str | None]:
    return dict(zip(COLUMNS, (rank, hit.object_id, hit.path, hit.similarity, hit.distance), strict=True))


def _tables(found: "list[tuple[str, tuple[Hit, ...]]]") -> Iterator[str]:
    for number, (query, hits) in enumerate(found):
        if len(found) > 1:
            yield f"query: {query}" if number == 0 else f"\nquery: {query}"
        rows = [
            (str(rank), hit.object_id, hit.path or "-", f"{hit.similarity:.6f}", f"{hit.distance:.6f}")
            for rank, hit in enumerate(hits, 1)
        ]
        widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
        for row in (COLUMNS, *rows):
            yield "  ".join(
                cell.ljust(width) if 0 < i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )


def _draw(target: Path, queries: "Queries", ranking: "Ranking", media_dir: Path, max_pixels: int) -> None:
    from search.sheet import SheetHit, SheetLine, write_sheet

    lines = [
        SheetLine(
            image,
            tuple(SheetHit(hit.object_id, media_dir / hit.path if hit.path else None, hit.similarity) for hit in hits),
        )
        for image, hits in zip(queries.images, ranking.hits, strict=True)
    ]
    missing = write_sheet(target, lines, max_pixels)
    _say(f"sheet: {target}" + (f" ({missing} pictures could not be opened)" if missing else ""))
