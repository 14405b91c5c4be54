"""The command `ruiji`, and the sub-commands that need no model run: list, enqueue, run, status and the like."""

import atexit
import gc
import importlib
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline import layout, settings, streams
from pipeline.arguments import Commands, Panel
from pipeline.choices import Device, ListFormat, LogFormat, ObjectIds, Reason, Role
from pipeline.errors import EXIT_INCOMPLETE, EXIT_INTERRUPTED, GalleryMismatch, RuijiError, UsageError

if TYPE_CHECKING:
    from pipeline.enqueue import Enqueued
    from pipeline.status import Status

app = Commands(
    name="ruiji",
    rich_markup_mode=None,
    help="Turn a sorted list of images into a searchable gallery of features, and find look-alikes in it.",
    pretty_exceptions_enable=False,
)

#: Commands that take up what an interruption left.
_GO_ON = {"enqueue", "near-duplicates", "retry", "run"}


def main() -> None:
    """Run the command line: errors go to stderr as one line, exit codes are those of `pipeline.errors`."""
    # At its end Python looks through all that was ever loaded, a tenth of the time of a small search: not through this.
    atexit.register(gc.freeze)
    # A SIGTERM ends a command as Ctrl-C does, in order; workers have handlers of their own.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    streams.open_streams()
    atexit.register(streams.drop_unwritten_notes)
    try:
        code, message = _run()
    finally:
        # What is left of an answer after an error: said once, not again when Python ends.
        with suppress(OSError):
            sys.stdout.flush()
    if message:
        streams.note(f"error: {message}")
    sys.exit(code)


def _run() -> tuple[int, str]:
    """Run the command that was asked for; returns its exit code and, if it failed, what to say.

    Only a bug has a traceback: what machine and input can cause is one line.
    """
    try:
        settings.load_dotenv()
        # By name, because the arrows between the packages point the other way.
        for package in ("workers.cli", "search.cli", "serve.cli"):
            importlib.import_module(package).register(app)
        code = app(prog_name="ruiji", standalone_mode=False) or 0
        sys.stdout.flush()
    except RuijiError as error:
        return error.exit_code, str(error)
    except typer.TyperException as error:
        # Choices stand in lines of their own.
        return error.exit_code, re.sub(r"\s*\n\s*", " ", error.format_message())
    except OSError as error:
        return RuijiError.exit_code, _said(error)
    except SystemExit as end:
        # What Typer makes of a pipe that nobody reads any more.
        if isinstance(end.__context__, BrokenPipeError):
            return RuijiError.exit_code, _said(end.__context__)
        raise
    except MemoryError as error:
        return RuijiError.exit_code, ": ".join(filter(None, ("out of memory", str(error))))
    except (KeyboardInterrupt, ImportError) as error:
        # A compiled library that is being loaded makes an ImportError of a Ctrl-C.
        if isinstance(error, ImportError) and not isinstance(error.__cause__, KeyboardInterrupt):
            raise
        code = EXIT_INTERRUPTED
    if code == EXIT_INTERRUPTED and _GO_ON.intersection(sys.argv[1:2]):
        streams.note("interrupted; run it again to continue")
    return code, ""


def _said(error: OSError) -> str:
    if isinstance(error, BrokenPipeError) and error.filename == streams.STDOUT:
        return ""  # Whoever reads has read enough.
    return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)


def _print_versions(wanted: bool) -> None:
    if wanted:
        from pipeline.versions import installed_versions

        for package, version in installed_versions().items():
            streams.tell(f"{package} {version}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_print_versions,
            help="Show the versions of ruiji and of the libraries that decide its results, and exit.",
        ),
    ] = False,
) -> None:
    """Read the options that stand before a command."""


@app.command(
    panel=Panel.embed,
    examples=[
        "ruiji run --media-dir PHOTOS --feature-dir FEATURES --model MODEL.onnx",
        "ruiji run --exclude '*.thumb.jpg' --workers 4",
    ],
)
def run(
    media_dir: settings.MediaDir,
    feature_dir: settings.FeatureDir,
    model: settings.ModelFile,
    list_path: settings.ListFile = None,
    exclude: settings.Exclude = None,
    workers: Annotated[
        int | None, typer.Option(min=1, max=1024, metavar="N", help="As --processes of ruiji worker.")
    ] = None,
    device: settings.WorkerDevice = Device.auto,
    shard_rows: settings.ShardRows = settings.SHARD_ROWS,
    window_segments: settings.Window = None,
    object_id: settings.ObjectId = ObjectIds.basename,
    keep_features: settings.KeepFeatures = False,
    max_pixels: settings.MaxPixels = settings.MAX_PIXELS,
    max_image_s: settings.MaxImageSeconds = settings.MAX_IMAGE_S,
    max_image_mb: settings.MaxImageMegabytes = settings.MAX_IMAGE_MB,
    visibility_timeout_s: settings.VisibilityTimeout = settings.VISIBILITY_TIMEOUT_S,
    state_dir: settings.StateDir = None,
    log_format: settings.LogFormatOption = LogFormat.text,
) -> None:
    """Embed a folder of images on this machine, all in one.

    Makes the list if there is none, starts the embedded Redis and workers, waits for the end and stops them.
    Interrupted? Run it again to continue. Exit code 3: some images failed, or folders could not be read.
    """
    from pipeline.enqueue import Extraction
    from pipeline.logs import set_up
    from pipeline.objects import Exclude
    from pipeline.plans.planning import PlanSettings
    from pipeline.run import run as run_all

    set_up(log_format)
    frozen = PlanSettings(shard_rows, keep_features, max_pixels, max_image_s, max_image_mb)
    work = Extraction(media_dir, feature_dir, model, object_id, frozen)
    ran = run_all(
        work,
        settings.make_state_folder(state_dir),
        list_path,
        exclude=Exclude(exclude or ()),
        workers=workers,
        device=device,
        window_segments=window_segments,
        visibility_timeout_s=visibility_timeout_s,
        log_format=log_format,
    )
    now = ran.status
    if ran.cancelled:
        streams.note("the plan was cancelled; ruiji run continues with what is left")
    streams.note(f"{now.done} done, {now.failed} failed of {now.objects}: {work.folder}")
    _told_altered(now)
    raise typer.Exit(_exit_code(now) or (EXIT_INCOMPLETE if ran.unread or ran.cancelled else 0))


@app.command(
    "list",
    panel=Panel.embed,
    examples=["ruiji list PHOTOS", "ruiji list PHOTOS --exclude '*.thumb.jpg' --out objects.txt"],
)
def list_objects(
    folder: Annotated[Path, typer.Argument(envvar="RUIJI_MEDIA_DIR", metavar="FOLDER", help="Folder of the images.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file to write.  [default: FOLDER/objects.txt]")
    ] = None,
    exclude: settings.Exclude = None,
    object_id: settings.ObjectId = ObjectIds.basename,
) -> None:
    """Write the sorted list of all images below a folder.

    Reports what it leaves out. Exit code 3: some folders could not be read.
    """
    from pipeline.logs import set_up
    from pipeline.objects import Exclude, IdScheme
    from pipeline.scan import Scan, write_list
    from pipeline.targets import check_targets

    set_up()
    target = out or layout.object_list_file(folder)
    check_targets({"--out": target})
    if target.exists() and not target.is_file():
        raise UsageError(f"--out {target} is not a regular file; name another")
    scan = Scan(folder, Exclude(exclude or ()))
    try:
        # What a link names is replaced, not the link.
        lines, notes = write_list(scan, target.resolve(), IdScheme(object_id))
    except OSError as error:
        raise RuijiError(f"cannot write {target}: {error.strerror}; choose another place with --out") from None
    for told in notes:
        streams.note(told)
    streams.note(f"{streams.counted(lines, 'object')} in {target}")
    raise typer.Exit(EXIT_INCOMPLETE if scan.unread else 0)


@app.command(panel=Panel.embed, examples=["ruiji enqueue --wait", "ruiji enqueue --list new.txt --shard-rows 1000"])
def enqueue(
    media_dir: settings.MediaDir,
    feature_dir: settings.FeatureDir,
    model: settings.ModelFile,
    list_path: settings.ListFile = None,
    redis_url: settings.RedisUrl = None,
    redis_password_file: settings.RedisPasswordFile = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    shard_rows: settings.ShardRows = settings.SHARD_ROWS,
    object_id: settings.ObjectId = ObjectIds.basename,
    keep_features: settings.KeepFeatures = False,
    max_pixels: settings.MaxPixels = settings.MAX_PIXELS,
    max_image_s: settings.MaxImageSeconds = settings.MAX_IMAGE_S,
    max_image_mb: settings.MaxImageMegabytes = settings.MAX_IMAGE_MB,
    state_dir: settings.StateDir = None,
    log_format: settings.LogFormatOption = LogFormat.text,
) -> None:
    """Plan the work, and publish one task per image.

    Objects that are done already are left out. Interrupted? Run it again to continue.
    """
    from pipeline.enqueue import Extraction
    from pipeline.enqueue import enqueue as enqueue_list
    from pipeline.logs import set_up
    from pipeline.plans.planning import PlanSettings

    set_up(log_format)
    url = settings.resolve_redis_url(redis_url, redis_password_file, state_dir)
    frozen = PlanSettings(shard_rows, keep_features, max_pixels, max_image_s, max_image_mb)
    work = Extraction(media_dir, feature_dir, model, object_id, frozen)
    while True:
        done = enqueue_list(work, url, list_path)
        _tell_enqueued(done, "all {} objects are in shards")
        if not wait:
            raise typer.Exit(EXIT_INCOMPLETE if done.list_waits else 0)
        now = _follow(work.folder, url)
        if not done.list_waits:
            raise typer.Exit(_exit_code(_told_altered(now)))


def _follow(folder: Path, redis_url: str) -> "Status":
    """Wait until no plan is open.

    Raises:
        PlanStopped: the last one was stopped.
    """
    from pipeline.follow import follow
    from pipeline.plans.stops import PlanStopped
    from pipeline.queue.connection import connect

    now = follow(folder, connect(redis_url))
    if now.stopped is not None:
        _told_altered(now)
        raise PlanStopped(now.stopped)
    return now


def _told_altered(now: "Status") -> "Status":
    if now.altered is not None:
        streams.note(str(now.altered))
    return now


def _tell_enqueued(done: "Enqueued", nothing: str) -> None:
    for note in done.notes:
        streams.note(note)
    if done.plan is None:
        streams.note(f"nothing to do: {nothing.format(done.objects)}")
        return
    verb = "continues" if done.resumed else "opened"
    published = streams.counted(done.published, "task")
    tasks = "another process is publishing its tasks" if done.elsewhere else f"{published} published now"
    objects = streams.counted(done.objects, "object")
    shards = streams.counted(len(done.plan.segments), "shard")
    streams.note(f"plan {done.plan.plan_id} {verb}: {done.plan.lines} of {objects} to do in {shards}, {tasks}")
    if done.list_waits:
        what = "makes lost shards" if done.plan.repair else "tries failed objects"
        streams.note(f"this plan {what} again, and nothing of the list: enqueue the list again when it is done")


@app.command(panel=Panel.embed, examples=["ruiji retry --wait", "ruiji retry --reason missing"])
def retry(
    media_dir: settings.MediaDir,
    feature_dir: settings.FeatureDir,
    model: settings.ModelFile,
    list_path: settings.ListFile = None,
    redis_url: settings.RedisUrl = None,
    redis_password_file: settings.RedisPasswordFile = None,
    reason: Annotated[Reason | None, typer.Option(help="Only objects whose last failure had this reason.")] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Follow the run to its end.")] = False,
    shard_rows: settings.ShardRows = settings.SHARD_ROWS,
    object_id: settings.ObjectId = ObjectIds.basename,
    keep_features: settings.KeepFeatures = False,
    max_pixels: settings.MaxPixels = settings.MAX_PIXELS,
    max_image_s: settings.MaxImageSeconds = settings.MAX_IMAGE_S,
    max_image_mb: settings.MaxImageMegabytes = settings.MAX_IMAGE_MB,
    state_dir: settings.StateDir = None,
    log_format: settings.LogFormatOption = LogFormat.text,
) -> None:
    """Try the failed objects again, and nothing else.

    Those that succeed become new shards.
    """
    from pipeline.enqueue import Extraction
    from pipeline.enqueue import retry as enqueue_failed
    from pipeline.logs import set_up
    from pipeline.plans.planning import PlanSettings
    from pipeline.plans.stops import stopped

    set_up(log_format)
    url = None
    try:
        url = settings.resolve_redis_url(redis_url, redis_password_file, state_dir)
    except UsageError:
        # On one machine `ruiji run` has a Redis of its own, and takes up the plan that this leaves on the disk.
        if redis_url is not None or wait:
            raise
    frozen = PlanSettings(shard_rows, keep_features, max_pixels, max_image_s, max_image_mb)
    work = Extraction(media_dir, feature_dir, model, object_id, frozen)
    done = enqueue_failed(work, url, list_path, reason)
    _tell_enqueued(done, f"none of the {{}} objects failed{f' as {reason}' if reason else ''}")
    if done.plan is None and stopped(work.folder) is not None:
        streams.note("the last run was stopped: ruiji enqueue, or ruiji run, goes on with what it did not do")
    if done.plan is not None and url is None:
        streams.note("no Redis is running; ruiji run carries out the plan")
    if wait and url is not None:
        raise typer.Exit(_exit_code(_told_altered(_follow(work.folder, url))))


@app.command(panel=Panel.check, examples=["ruiji failures", "ruiji failures --format csv > failed.csv"])
def failures(
    feature_dir: settings.FeatureDir,
    model: settings.ModelFile,
    form: Annotated[ListFormat, typer.Option("--format", help="How they are written to stdout.")] = ListFormat.table,
) -> None:
    """List the failed objects with their reasons.

    Exit code 3: there are some.
    """
    from pipeline.failures import failed_objects, write_failures

    out = sys.stdout if form is ListFormat.table else streams.exact_stdout()
    count = write_failures(failed_objects(layout.gallery_folder(feature_dir, model)), form, out)
    raise typer.Exit(EXIT_INCOMPLETE if count else 0)


@app.command(
    panel=Panel.check, examples=["ruiji verify", "ruiji verify --repair", "ruiji verify --pictures --media-dir PHOTOS"]
)
def verify(
    feature_dir: settings.FeatureDir,
    model: settings.ModelFile,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove leftovers, and plan broken and lost shards again.")
    ] = False,
    pictures: Annotated[
        bool,
        typer.Option(
            "--pictures",
            help="Also read every picture, and report those that changed since they were embedded; needs --media-dir. "
            "With --repair the shards that have such pictures are planned again.",
        ),
    ] = False,
    media_dir: settings.OptionalMediaDir = None,
) -> None:
    """Compare every byte of a gallery with its records.

    Exit code 4: something is broken, or a picture changed.
    """
    from pipeline.logs import set_up
    from pipeline.verify import check

    set_up()
    if pictures and media_dir is None:
        raise UsageError("--pictures needs --media-dir: the folder of the images")
    found = check(
        layout.gallery_folder(feature_dir, model),
        streams.tell,
        streams.note,
        repair_it=repair,
        media_dir=media_dir if pictures else None,
    )
    if not repair and any(finding.repairable for finding in found.findings):
        streams.note(f"ruiji verify{' --pictures' if pictures else ''} --repair repairs what can be repaired")
    streams.note(f"findings: {len(found.findings)}; broken{' still' if repair else ''}: {len(found.broken)}")
    raise typer.Exit(GalleryMismatch.exit_code if found.broken else 0)


@app.command(panel=Panel.check, examples=["ruiji status --watch", "ruiji status --json | jq .failed"])
def status(
    feature_dir: settings.FeatureDir,
    model: settings.ModelFile,
    redis_url: settings.RedisUrl = None,
    redis_password_file: settings.RedisPasswordFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow until nothing is left to do.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Look at every file instead of Redis' counters.")] = False,
    state_dir: settings.StateDir = None,
) -> None:
    """Show what is done, failed, running and pending.

    Exit code 3: some objects failed or are not done; 1: the run was stopped.
    """
    from pipeline.follow import look
    from pipeline.logs import set_up

    set_up()
    seen = look(
        layout.gallery_folder(feature_dir, model),
        settings.state_folder(state_dir),
        lambda: settings.resolve_redis_url(redis_url, redis_password_file, state_dir),
        watch=watch,
        exact=exact,
    )
    if seen.without_redis is not None:
        streams.note(f"counted from the disk alone ({seen.without_redis})")
    now = seen.status
    if as_json:
        print(streams.to_json(now.as_json()), file=streams.exact_stdout())
    else:
        _print_status(now)
    raise typer.Exit(_exit_code(now))


def _print_status(now: "Status") -> None:
    streams.tell(f"{'shard':>7}  {'state':<8} {'objects':>9} {'done':>9} {'failed':>7}")
    for shard in now.shards:
        streams.tell(f"{shard.shard:>7}  {shard.state:<8} {shard.objects:>9} {shard.done:>9} {shard.failed:>7}")
    if now.comparing:
        streams.tell(f"near-duplicates: {now.comparing} panels left to compare")
    if now.starting:
        streams.tell("starting: no object list was accepted yet")
        return
    objects = streams.counted(now.objects, "object")
    streams.tell(
        f"{objects}: {now.done} done, {now.failed} failed, {now.running} running, {now.pending} pending"
        + (f"; {streams.counted(now.stale, 'stale row')} besides" if now.stale else "")
    )
    streams.tell(f"plan {now.plan} is open" if now.plan else "no plan is open")
    if now.altered is not None:
        streams.tell(str(now.altered))
    if now.stopped is not None:
        streams.tell(f"the run was stopped: {now.stopped}")
    for worker in now.workers:
        images = streams.counted(worker.images, "image")
        rate = f"{images}, {worker.images_per_s}/s" if worker.role == Role.embed else ""
        name = f"{worker.role} {worker.host}:{worker.pid} on {worker.device}"
        streams.tell(f"{name}: {worker.state} {rate}".rstrip())
        if worker.images:
            split = "  ".join(f"{stage} {ms:g}" for stage, ms in worker.ms_per_image.items())
            streams.tell(f"    ms per image: {split}")


@app.command(panel=Panel.embed, examples=["ruiji cancel"])
def cancel(feature_dir: settings.FeatureDir, model: settings.ModelFile) -> None:
    """Close the open plan; what is done stays done.

    The next enqueue plans the rest.
    """
    from pipeline.plans.closing import cancel as cancel_plan

    plan = cancel_plan(layout.gallery_folder(feature_dir, model))
    streams.note(f"plan {plan.plan_id} closed" if plan else "no plan is open")


@app.command(panel=Panel.embed, examples=["ruiji redis"])
def redis(state_dir: settings.StateDir = None) -> None:
    """Run the embedded Redis until stopped (Ctrl-C).

    The other commands of this user find it by themselves.
    """
    import threading

    from pipeline.queue.connection import public_url
    from pipeline.queue.embedded import embedded_redis, write_private

    folder = settings.make_state_folder(state_dir)
    url_file = layout.redis_url_file(folder)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with embedded_redis(layout.redis_folder(folder)) as (url, check):
        try:
            write_private(url_file, url + "\n")
            streams.note(f"Redis at {public_url(url)}, address and password in {url_file}; Ctrl-C stops it")
            while not stop.wait(1):
                check()
        finally:
            url_file.unlink(missing_ok=True)


def _exit_code(now: "Status") -> int:
    if now.stopped is not None:
        return RuijiError.exit_code
    return 0 if now.finished and now.failed == 0 else EXIT_INCOMPLETE
