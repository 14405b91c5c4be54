"""`ruiji duplicates`: decide about near-duplicates. What it needs beyond typer is imported when it runs."""

import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from pipeline.arguments import Commands, Panel
from pipeline.choices import Device
from pipeline.errors import EXIT_INCOMPLETE, UsageError
from pipeline.settings import FeatureDir, OptionalMediaDir, model_option
from pipeline.streams import counted, exact_stdout, note, tell, to_json
from search.options import THRESHOLD, FileFormat

if TYPE_CHECKING:
    from search.requests.duplicates import DecisionsRequest
    from search.requests.reference import Reference

#: What is read of stdin at once: all that is there, up to this.
_READ_BYTES = 1 << 20
#: So many of these wait at most.
_MOST_READ = 64


DecisionsModel = Annotated[
    Path | None,
    model_option("Its name is the gallery's. Without it, --feature-dir must be a gallery or contain exactly one."),
]
Threshold = Annotated[
    float, typer.Option("--threshold", min=0.0, max=1.0, metavar="COSINE", help="The lowest cosine of a pair.")
]
DecisionsFile = Annotated[
    Path | None,
    typer.Option(
        "--decisions",
        metavar="FILE",
        help="What was decided, for the galleries of all models.  [default: FEATURE_DIR/decisions.jsonl]",
    ),
]

AgainstGallery = Annotated[
    Path | None,
    typer.Option(
        "--against-gallery",
        metavar="FOLDER",
        help="Another gallery of the same model, the reference, for instance of an archive: its FEATURE_DIR or its own "
        "folder. It is only read.",
    ),
]
AgainstMediaDir = Annotated[
    Path | None,
    typer.Option("--against-media-dir", metavar="FOLDER", help="Where the pictures of the reference are."),
]

app = Commands(help="Decide about near-duplicates, and list the files that can go.")


def register(root: Commands) -> None:
    """Add `duplicates` to the root command."""
    root.add_typer(app, name="duplicates", rich_help_panel=Panel.search)


@app.command(
    examples=[
        "ruiji near-duplicates --keep pixels,bytes --format jsonl | ruiji duplicates decide",
        """echo '{"decision": "different", "objects": ["a.jpg", "b.jpg"]}' | ruiji duplicates decide""",
    ]
)
def decide(
    feature_dir: FeatureDir,
    model_path: DecisionsModel = None,
    media_dir: OptionalMediaDir = None,
    decisions: DecisionsFile = None,
    against_gallery: AgainstGallery = None,
    against_media_dir: AgainstMediaDir = None,
) -> None:
    """Record decisions from stdin.

    Each line is a JSON object: {"decision": "different", "objects": [ID, ID]}, {"decision": "same", "keep": ID,
    "remove": [ID]}, or "skip" or "undo" with objects. An object of the reference is {"reference": ID}. Prints a line
    for each decision once it is on the disk.
    """
    from search.requests.duplicates import decide as record

    reference = reference_of(against_gallery, against_media_dir)
    request = _request(feature_dir, model_path, media_dir, decisions, reference)
    out, count = exact_stdout(), 0
    for done in record(request, _batches(sys.stdin.buffer), note):
        count += 1
        value = {"line": done.line, "decision": done.decision, "objects": done.objects}
        print(to_json(value), file=out, flush=True)
    again = "; run ruiji near-duplicates again until it says that nothing is open" if count else ""
    note(f"{counted(count, 'decision')} recorded in {request.file}{again}")


@app.command(examples=["ruiji duplicates undo IMG_0042.jpg", "ruiji duplicates undo IMG_0042.jpg IMG_0043.jpg"])
def undo(
    feature_dir: FeatureDir,
    objects: Annotated[list[str], typer.Argument(metavar="ID...", help="Objects of the gallery.")],
    model_path: DecisionsModel = None,
    decisions: DecisionsFile = None,
) -> None:
    """Undo what was decided about objects.

    About one object: all that was decided about it. About several: what was decided about pairs of them.
    """
    from search.requests.duplicates import undo as take_back

    request = _request(feature_dir, model_path, None, decisions)
    take_back(request, objects, note)
    note(f"undone in {request.file}")


@app.command(examples=["ruiji duplicates status", "ruiji duplicates status --json | jq .to_remove"])
def status(
    feature_dir: FeatureDir,
    model_path: DecisionsModel = None,
    media_dir: OptionalMediaDir = None,
    decisions: DecisionsFile = None,
    against_gallery: AgainstGallery = None,
    against_media_dir: AgainstMediaDir = None,
    threshold: Threshold = THRESHOLD,
    device: Annotated[
        Device,
        typer.Option("--device", envvar="RUIJI_DEVICE", help="Where pairs are compared; the groups are the same."),
    ] = Device.auto,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show how far a clean-up is.

    Groups that are open, decisions, files that are kept and that can go, the bytes that removing these would free, and
    files that are gone already.
    With --against-gallery, the groups are of objects with what the reference has of them.
    """
    from pipeline.progress import show_steps
    from search.ranking.planner import wait_asleep
    from search.requests.duplicates import standing
    from search.requests.near_duplicates import NearDuplicatesRequest, near_duplicates

    reference = reference_of(against_gallery, against_media_dir)
    request = _request(feature_dir, model_path, media_dir, decisions, reference)
    now = standing(request, note)
    wanted = NearDuplicatesRequest(
        selection=request.selection, threshold=threshold, device=device, decisions=request.file, reference=reference
    )
    wait_asleep()
    groups = near_duplicates(wanted, note, show_steps).groups
    facts = {
        "open": len(groups),
        "decided": now.decided,
        **now.by_verdict,
        "kept": now.totals.kept,
        "to_remove": now.totals.remove,
        "frees_bytes": now.totals.frees_bytes,
        "gone": now.totals.gone,
    }
    if as_json:
        print(to_json(facts), file=exact_stdout())
        return
    for name, value in facts.items():
        tell(f"{name:<12} {value:>15,}")


@app.command(
    "list",
    examples=[
        "ruiji duplicates list --remove",
        "ruiji duplicates list --remove --format paths -0 | xargs -0r mv --backup=numbered -t TRASH",
        "ruiji duplicates list --keep --format csv",
    ],
)
def list_files(
    feature_dir: FeatureDir,
    model_path: DecisionsModel = None,
    media_dir: OptionalMediaDir = None,
    decisions: DecisionsFile = None,
    against_gallery: AgainstGallery = None,
    against_media_dir: AgainstMediaDir = None,
    remove: Annotated[bool, typer.Option("--remove", help="List the files that can go.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="List the files that are kept.")] = False,
    form: Annotated[FileFormat, typer.Option("--format", help="How they are written to stdout.")] = FileFormat.paths,
    null: Annotated[
        bool,
        typer.Option("--null", "-0", help="With --format paths: end each path with a null character, for xargs -0."),
    ] = False,
) -> None:
    """List the files that can go, or that are kept.

    Reads all of them again. Names a file to remove only if its bytes are those that were decided about, and if the file
    that is kept for it is there with its own; says which files it leaves out and why. ruiji itself removes nothing. A
    file that is kept in another gallery is looked for there, with --against-gallery and --against-media-dir.
    Exit code 3: some files are left out, other than those that are gone or are a kept file under another name.
    """
    from search.requests.duplicates import SomeLeftOut, file_lines, listed, lists

    if remove == keep:
        raise UsageError("say which files: --remove or --keep")
    if null and form is not FileFormat.paths:
        raise UsageError("-0 needs --format paths")
    reference = reference_of(against_gallery, against_media_dir)
    request = _request(feature_dir, model_path, media_dir, decisions, reference)
    found, out = lists(request, note), exact_stdout()
    try:
        files = listed(found.to_remove() if remove else found.to_keep(), note)
        for line in file_lines(files, form, request.media, null):
            out.write(line)
    except SomeLeftOut:
        raise typer.Exit(EXIT_INCOMPLETE) from None


def _batches(stdin: BinaryIO) -> Iterator[list[bytes]]:
    """Lines as they come, all at once that came while the ones before were worked on.

    For each batch all ids and digests of the gallery are looked through. A pipe holds but 64 KiB, so whoever only reads
    between batches looks through a large gallery for every fifty groups.
    """
    read: Queue[bytes | BaseException] = Queue(_MOST_READ)
    # Below the buffer: who waits there holds a lock on stdin that a process needs to end.
    source = getattr(stdin, "raw", stdin)

    def read_on() -> None:
        try:
            while data := source.read(_READ_BYTES):
                read.put(data)
            read.put(b"")
        except BaseException as error:
            read.put(error)

    Thread(target=read_on, name="stdin", daemon=True).start()
    rest, ended = b"", False
    while not ended:
        came = [read.get(), *(read.get() for _ in range(read.qsize()))]
        ended = not isinstance(came[-1], bytes) or not came[-1]
        *lines, rest = b"".join([rest, *(data for data in came if isinstance(data, bytes))]).split(b"\n")
        if lines:
            yield lines
        if isinstance(came[-1], BaseException):
            raise came[-1]
    if rest:
        yield [rest]


def reference_of(folder: Path | None, media_dir: Path | None) -> "Reference | None":
    """What `--against-gallery` and `--against-media-dir` name; None if there is no reference."""
    from search.requests.reference import Reference

    if folder is None and media_dir is not None:
        raise UsageError("--against-media-dir has the pictures of a second gallery: name that with --against-gallery")
    return None if folder is None else Reference(feature_dir=folder, media_dir=media_dir)


def _request(
    feature_dir: Path,
    model_path: Path | None,
    media_dir: Path | None,
    decisions: Path | None,
    reference: "Reference | None" = None,
) -> "DecisionsRequest":
    from search.requests.duplicates import DecisionsRequest
    from search.requests.selection import Selection

    selection = Selection(feature_dir=feature_dir, model_path=model_path)
    return DecisionsRequest(selection=selection, decisions=decisions, media_dir=media_dir, reference=reference)
