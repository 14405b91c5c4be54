"""Every setting, once: its option, its `RUIJI_…` variable, its default and why.

The command line reads them (option, then environment, then `.env`); everything below it takes plain
values. What decides bytes (model, shard rows, ids, limits) is frozen into the plan when work is
enqueued: on a worker only the machine's own settings count.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import SplitResult, parse_qsl, quote, urlencode, urlsplit, urlunsplit

import typer

from pipeline import layout
from pipeline.choices import Device, LogFormat, ObjectIds
from pipeline.errors import RuijiError, UsageError


def models_dir(given: Path | None = None) -> Path:
    """The folder of the models that were added: as given, of the environment, or the user's data folder.

    Raises:
        UsageError: none is given, and the user has no home folder.
    """
    if named := given or os.environ.get("RUIJI_MODELS"):
        return Path(named)
    return _of_user("XDG_DATA_HOME", "share", "models", "RUIJI_MODELS (--models-dir)") / "models"


def model_file(model: Path) -> Path:
    """The file of a model that is given by its name in the library; any other path as it is."""
    if len(model.parts) != 1 or model.suffix == layout.MODEL_ENDING or model.is_file():
        return model
    added = layout.added_model_file(models_dir(), model.name)
    return added if added.is_file() else model


def model_option(help_text: str) -> Any:
    """The option for a model, of which commands need more or less: its file or its name."""

    def found(model: Path | None) -> Path | None:
        return None if model is None else model_file(model)

    return typer.Option("--model", envvar="RUIJI_MODEL", callback=found, metavar="FILE", help=help_text)


MediaDir = Annotated[
    Path,
    typer.Option(
        "--media-dir", envvar="RUIJI_MEDIA_DIR", metavar="DIR", help="Folder of the images; never written to."
    ),
]
OptionalMediaDir = Annotated[
    Path | None,
    typer.Option(
        "--media-dir",
        envvar="RUIJI_MEDIA_DIR",
        metavar="DIR",
        help="Folder of the images: needed to show or read them, and to print full paths.",
    ),
]
FeatureDir = Annotated[
    Path,
    typer.Option(
        "--feature-dir",
        envvar="RUIJI_FEATURE_DIR",
        metavar="DIR",
        help="Folder of the galleries, one per model.",
    ),
]
ModelFile = Annotated[
    Path,
    model_option(
        "The ONNX model, with a .toml of the same name that says what it expects, or a name of ruiji model list."
    ),
]
ModelsDir = Annotated[
    Path | None,
    typer.Option(
        "--models-dir",
        envvar="RUIJI_MODELS",
        metavar="DIR",
        help="Folder of the models that were added.  [default: ~/.local/share/ruiji/models]",
    ),
]
ListFile = Annotated[
    Path | None,
    typer.Option(
        "--list",
        envvar="RUIJI_LIST",
        metavar="FILE",
        help="The object list. If there is none, ruiji run makes one of its own.  [default: MEDIA_DIR/objects.txt]",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        "--exclude",
        envvar="RUIJI_EXCLUDE",
        metavar="GLOB",
        help="Leave out files and folders of this name, or of this path if it has a /. Repeatable; the variable takes "
        "several, separated by spaces.",
    ),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        "--redis-url",
        envvar="RUIJI_REDIS_URL",
        metavar="URL",
        help="redis:// or rediss://.  [default: the Redis that ruiji redis started]",
    ),
]
RedisPasswordFile = Annotated[
    Path | None,
    typer.Option(
        "--redis-password-file",
        envvar="RUIJI_REDIS_PASSWORD_FILE",
        metavar="FILE",
        help="File with the password, for a --redis-url without one.",
    ),
]
WebPort = Annotated[
    int,
    typer.Option(
        "--port", envvar="RUIJI_WEB_PORT", min=0, max=65535, metavar="N", help="Port to listen on; 0: any free one."
    ),
]
WebTokenFile = Annotated[
    Path | None,
    typer.Option(
        "--web-token-file",
        envvar="RUIJI_WEB_TOKEN_FILE",
        metavar="FILE",
        help="File with the token that every request to the service needs.  [default: none; allowed on loopback]",
    ),
]
ShardRows = Annotated[
    int,
    typer.Option(
        "--shard-rows", envvar="RUIJI_SHARD_ROWS", min=1, max=1_000_000, metavar="N", help="Objects per shard."
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window-segments",
        envvar="RUIJI_WINDOW_SEGMENTS",
        min=1,
        max=64,
        metavar="N",
        help="Segments in the queue at once.  [default: 2; 4 if GPUs embed]",
    ),
]
ObjectId = Annotated[
    ObjectIds,
    typer.Option(
        "--object-id", envvar="RUIJI_OBJECT_ID", help="What an object's id is: its file name, or its relative path."
    ),
]
KeepFeatures = Annotated[
    bool,
    typer.Option(
        "--keep-features/--drop-features",
        envvar="RUIJI_KEEP_FEATURES",
        help="Keep or delete the per-image files once their shard is published.",
    ),
]
MaxPixels = Annotated[
    int,
    typer.Option(
        "--max-pixels",
        envvar="RUIJI_MAX_PIXELS",
        min=1,
        metavar="N",
        help="Images with more pixels than this fail as too-large.",
    ),
]
MaxImageSeconds = Annotated[
    int,
    typer.Option(
        "--max-image-s",
        envvar="RUIJI_MAX_IMAGE_S",
        min=1,
        metavar="S",
        help="Seconds after which an image that is still being decoded fails as timeout.",
    ),
]
MaxImageMegabytes = Annotated[
    int,
    typer.Option(
        "--max-image-mb",
        envvar="RUIJI_MAX_IMAGE_MB",
        min=16,
        metavar="MB",
        help="Memory that decoding may take, for an image that may have killed a worker.",
    ),
]
WorkerDevice = Annotated[
    Device,
    typer.Option(
        "--device",
        envvar="RUIJI_DEVICE",
        help="Where the model runs. auto: on a GPU that can be used, else on the CPU; for ruiji serve on the CPU.",
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(
        "--processes",
        envvar="RUIJI_PROCESSES",
        min=1,
        max=1024,
        metavar="N",
        help="Embed processes; on CUDA per GPU slot.  [default: one per core; on CUDA one per two cores, up to 8]",
    ),
]
BatchImages = Annotated[
    int | None,
    typer.Option(
        "--batch-images",
        envvar="RUIJI_BATCH_IMAGES",
        min=1,
        max=4096,
        metavar="N",
        help="Images per batch; on a CPU, the model still takes them one by one.  [default: 64]",
    ),
]
GpuMemory = Annotated[
    int | None,
    typer.Option(
        "--gpu-memory-mb",
        envvar="RUIJI_GPU_MEMORY_MB",
        min=1,
        metavar="MB",
        help="Limit of what ONNX Runtime allocates on the GPU per process; CUDA itself takes some more.  "
        "[default: none]",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        envvar="RUIJI_THREADS",
        min=1,
        max=1024,
        metavar="N",
        help="CPU threads per process.  [default: cores / processes]",
    ),
]
Slots = Annotated[
    int | None,
    typer.Option(
        "--slots",
        envvar="RUIJI_SLOTS",
        min=1,
        max=1024,
        metavar="N",
        help="GPU slots that the worker takes at most.  [default: all free ones]",
    ),
]
SlotsPerDevice = Annotated[
    int,
    typer.Option(
        "--slots-per-device", envvar="RUIJI_SLOTS_PER_DEVICE", min=1, max=64, metavar="N", help="Slots per GPU."
    ),
]
VisibilityTimeout = Annotated[
    int,
    typer.Option(
        "--visibility-timeout-s",
        envvar="RUIJI_VISIBILITY_TIMEOUT_S",
        min=2,
        metavar="S",
        help="Seconds after which a dead worker's images go to another.",
    ),
]
StateDir = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        envvar="RUIJI_STATE_DIR",
        metavar="DIR",
        help="Folder on this host for the embedded Redis and notes of workers.  [default: ~/.local/state/ruiji]",
    ),
]
LogFormatOption = Annotated[
    LogFormat, typer.Option("--log-format", envvar="RUIJI_LOG_FORMAT", help="How events are written to stderr.")
]

#: The article's shard: 10,000 rows x 1280 float32 = 51 MB, one read.
SHARD_ROWS = 10_000
#: Two segments keep workers busy while one is reduced; each more only costs Redis 12 MB.
WINDOW_SEGMENTS = 2
#: GPUs fill a segment in seconds: two are reduced, by two processes, while two are embedded.
CUDA_WINDOW_SEGMENTS = 4
#: The size from which Pillow itself warns; while it is decoded such an image takes up to 1 GB.
MAX_PIXELS = 89_478_485
#: The largest allowed image takes a few seconds, also on a slow disk; an endless one is given up after this.
MAX_IMAGE_S = 60
#: Twice what the largest allowed image needs.
MAX_IMAGE_MB = 2048
#: Live workers renew their claims every few seconds, so this only has to outlast a pause, not a batch.
VISIBILITY_TIMEOUT_S = 60
#: One worker has as many processes as keep a GPU busy.
SLOTS_PER_DEVICE = 1
#: Looking for lost tasks reads the whole queue; 30 s without any progress is rare enough.
STALL_TIMEOUT_S = 30


def load_dotenv() -> None:
    """Take ruiji's own variables from `.env` in the current folder; those that are set already win.

    No others: a `PATH` or `PYTHONPATH` in a folder of somebody else's would have its programs run.

    Raises:
        UsageError: it is not UTF-8, or docker compose would read it differently. OSError: it cannot be read.
    """
    path = Path(".env")
    if path.exists():
        from pipeline.env_file import read_env_file

        for name, value in read_env_file(path).items():
            os.environ.setdefault(name, value)


def state_folder(state_dir: Path | None) -> Path:
    """The host-local state folder, by the XDG convention unless one is given.

    Raises:
        UsageError: none is given, and the user has no home folder.
    """
    return state_dir or _of_user("XDG_STATE_HOME", "state", "state", "RUIJI_STATE_DIR (--state-dir)")


def _of_user(variable: str, local: str, what: str, option: str) -> Path:
    """Our folder among those that the XDG convention has for a user."""
    if base := os.environ.get(variable):
        return Path(base) / "ruiji"
    try:
        return Path.home() / ".local" / local / "ruiji"
    except RuntimeError:
        raise UsageError(f"this user has no home folder for ruiji's {what}; name a folder with {option}") from None


def make_state_folder(state_dir: Path | None) -> Path:
    """The state folder, made if it is missing, for its owner only: the embedded Redis' password lies in it.

    Raises:
        RuijiError: it cannot be made, or not be written to.
    """
    import tempfile

    folder = state_folder(state_dir)
    doing = "make"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        doing = "write to"
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RuijiError(
            f"cannot {doing} the state folder {folder}: {error.strerror}; name one on this host with "
            "RUIJI_STATE_DIR (--state-dir)"
        ) from None
    return folder


def resolve_redis_url(redis_url: str | None, password_file: Path | None, state_dir: Path | None) -> str:
    """The Redis to use: the given one, else the embedded one that is running.

    A `rediss://` URL may name the CA that signed the server's certificate, as redis-py, kombu and Celery
    spell it: `?ssl_ca_certs=FILE`; without it the system's CAs count. The certificate is always checked,
    unless the URL says `ssl_cert_reqs=none`.

    Raises:
        UsageError: none is given and none was started, the URL has another scheme or cannot be taken apart,
            or the password file or the CA's file cannot be read.
    """
    if redis_url is None:
        try:
            return layout.redis_url_file(state_folder(state_dir)).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise UsageError(
                "no Redis: start one with `ruiji redis` (or make up), or set RUIJI_REDIS_URL (--redis-url)"
            ) from None
    parts = _split(redis_url)
    if parts.scheme == "rediss":
        parts = parts._replace(query=_tls_query(parts.query))
    if password_file is not None and parts.password is None:
        try:
            password = password_file.read_text(encoding="utf-8-sig").strip()
        except OSError as error:
            raise UsageError(f"cannot read the password file {password_file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UsageError(f"the password file {password_file} is not UTF-8") from None
        host = parts.netloc.rpartition("@")[2]
        # A user of Redis' access list stays.
        parts = parts._replace(netloc=f"{parts.username or ''}:{quote(password, safe='')}@{host}")
    return urlunsplit(parts)


def _split(redis_url: str) -> SplitResult:
    try:
        parts = urlsplit(redis_url)
        # An unquoted password ends the host too early: what comes after it is then port, path or nothing.
        whole = parts.hostname and parts.port != 0 and re.fullmatch(r"/?\d*", parts.path)
    except ValueError:
        whole = False
    if not whole or parts.scheme not in ("redis", "rediss"):
        # Without the URL, which may show a password.
        raise UsageError(
            "--redis-url (RUIJI_REDIS_URL) must be redis://:PASSWORD@HOST:PORT/DB or rediss://…; characters like / # ? "
            "in the password must be percent-encoded (/ as %2F), or it comes from --redis-password-file"
        )
    return parts


def _tls_query(query: str) -> str:
    options = dict(parse_qsl(query))
    ca_file = options.get("ssl_ca_certs")
    if ca_file is not None and not (os.path.isfile(ca_file) and os.access(ca_file, os.R_OK)):
        raise UsageError(f"cannot read {ca_file}, the CA that the Redis URL names with ssl_ca_certs")
    # Celery's backend asks for it by name.
    return urlencode({"ssl_cert_reqs": "required", **options}, safe="/")
