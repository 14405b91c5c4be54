"""From a folder to an object list: which files are images, and what else lies there."""

import errno
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pipeline import layout
from pipeline.choices import ObjectIds
from pipeline.errors import ObjectListError
from pipeline.objects import Exclude, IdScheme, clean_list, escaped, prepare, read_lines, sort_lines
from pipeline.progress import StillAt
from pipeline.streams import counted
from pipeline.versions import heif_decoder

#: Endings of what only pi-heif decodes.
HEIF_ENDINGS = frozenset((".heic", ".heics", ".heif", ".heifs", ".hif"))
#: File name endings that `ruiji list` takes for images, compared in lower case: those of the formats that are decoded.
IMAGE_ENDINGS = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".png", ".apng"),
        *(".webp", ".avif", ".avifs", ".gif", ".tif", ".tiff", ".bmp", ".dib", ".ico", ".tga", ".icb", ".vda", ".vst"),
        *(".pbm", ".pgm", ".ppm", ".pnm", ".pfm"),
        *HEIF_ENDINGS,
    }
)
#: What systems and programs keep beside photos, in lower case: what was deleted, thumbnails, older versions.
SYSTEM_FOLDERS = frozenset(
    {
        *(".trash", ".trashes", "$recycle.bin", "recycler", "#recycle", "@recycle", ".dtrash", "lost+found"),
        *(".thumbnails", "@eadir", ".@__thumb", ".picasaoriginals", "__macosx", ".appledouble"),
        *(".snapshot", ".snapshots", "#snapshot", "@recently-snapshot", ".zfs", ".stversions"),
        *("system volume information", ".spotlight-v100", ".fseventsd", ".temporaryitems", ".documentrevisions-v100"),
    }
)
_TRASH_OF_A_USER = ".trash-"
#: Of macOS: what belongs to a file beside it, under the file's name.
_COMPANION = "._"
_SYSTEM_FILES = frozenset((".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini"))
#: In a list's folder while it is written.
_SCRATCH = f"{layout.TEMPORARY_PREFIX}list-"
#: Of one folder alone; anything else can be a disk or network that is away, and most of the images with it.
_OF_ONE_FOLDER = (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
#: How many endings, folders or names are told one by one.
_TOLD = 8
#: After so many images there is a look whether to tell how many there are.
_TOLD_EVERY = 1_000


class Scan:
    """The images below a folder, and what is not listed.

    Attributes:
        unread: how many folders could not be read; their images are not listed.
    """

    def __init__(self, folder: Path, exclude: Exclude | None = None) -> None:
        self.unread = 0
        self.folder = folder
        self._real_top = os.path.realpath(folder)
        self._exclude = exclude or Exclude()
        self._decodes_heif = heif_decoder() is not None
        self._others: Counter[str] = Counter()
        self._heif: Counter[str] = Counter()
        self._system: Counter[str] = Counter()
        self._excluded: Counter[str] = Counter()
        self._unread: list[str] = []
        self._galleries: list[str] = []
        self._linked: list[str] = []
        self._lead_out: list[str] = []
        self._lead_nowhere: list[str] = []

    def paths(self) -> Iterator[str]:
        """Paths of all images, relative to the folder, in no order; links to files count, linked folders do not.

        Raises:
            ObjectListError: the folder does not exist, or it or the disk below it cannot be read.
        """
        if not self.folder.is_dir():
            raise ObjectListError(f"the media folder {self.folder} does not exist or is not a folder")
        folders = [""]
        while folders:
            prefix = folders.pop()
            try:
                with os.scandir(os.path.join(self.folder, prefix)) as entries:
                    for entry in entries:
                        path = prefix + entry.name
                        if _is_folder(entry):
                            if self._is_wanted(entry, path):
                                folders.append(path + "/")
                        elif self._is_image(entry, path):
                            yield path
            except OSError as error:
                if not prefix or error.errno not in _OF_ONE_FOLDER:
                    raise ObjectListError(
                        f"cannot read the folder {os.path.join(self.folder, prefix)}: {error.strerror}"
                    ) from None
                self.unread += 1
                self._unread.append(f"{prefix} ({error.strerror})")

    def _is_wanted(self, entry: os.DirEntry[str], path: str) -> bool:
        name = entry.name.lower()
        if name in SYSTEM_FOLDERS or name.startswith(_TRASH_OF_A_USER):
            self._system[entry.name] += 1
        elif name.startswith(_SCRATCH):
            return False
        elif self._exclude.takes(path):
            self._excluded["folder"] += 1
        elif entry.is_symlink():
            self._linked.append(path)
        elif os.path.exists(layout.gallery_file(Path(entry.path))):
            self._galleries.append(path)
        else:
            return True
        return False

    def _is_image(self, entry: os.DirEntry[str], path: str) -> bool:
        ending = os.path.splitext(entry.name)[1].lower()
        if entry.name.startswith(_COMPANION):
            self._system[f"{_COMPANION}*"] += 1
        elif entry.name.lower() in _SYSTEM_FILES:
            self._system[entry.name] += 1
        elif self._exclude.takes(path):
            self._excluded["file"] += 1
        elif ending not in IMAGE_ENDINGS:
            if path != layout.OBJECT_LIST:
                self._others[ending or "without an ending"] += 1
        elif ending in HEIF_ENDINGS and not self._decodes_heif:
            self._heif[ending] += 1
        else:
            if entry.is_symlink():
                self._follow(entry.path, path)
            return True
        return False

    def _follow(self, link: str, path: str) -> None:
        if not os.path.exists(link):
            self._lead_nowhere.append(path)
        elif not os.path.realpath(link).startswith(self._real_top.rstrip("/") + "/"):
            self._lead_out.append(path)

    def notes(self) -> list[str]:
        """What was met beside images, for people; after `paths` has ended."""
        told = [
            ("left out: {}", _commonest(self._others)),
            (
                "left out, because pi-heif is not installed here (run make setup, or pip install 'ruiji[heic]'): {}",
                _commonest(self._heif),
            ),
            ("left out, of the system: {}", _commonest(self._system)),
            ("left out by --exclude: {}", ", ".join(counted(n, what) for what, n in sorted(self._excluded.items()))),
            ("left out, galleries of ruiji: {}", _named(self._galleries)),
            ("left out, links to folders: {}", _named(self._linked)),
            ("links that lead out of the media folder, listed, and fail: {}", _named(self._lead_out)),
            ("links that lead nowhere, listed, and fail: {}", _named(self._lead_nowhere)),
            ("folders that cannot be read, whose images are not listed: {}", _named(self._unread)),
        ]
        return [words.format(what) for words, what in told if what]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link that leads to itself.
        return False


def _commonest(counts: Counter[str]) -> str:
    told = sorted(counts, key=lambda what: (-counts[what], what))[:_TOLD]
    rest = counts.total() - sum(counts[what] for what in told)
    return ", ".join([*(f"{counts[what]} {what}" for what in told), *([counted(rest, "other")] if rest else [])])


def _named(names: list[str]) -> str:
    more = [f"and {len(names) - _TOLD} more"] if len(names) > _TOLD else []
    return ", ".join([*sorted(names)[:_TOLD], *more])


def write_list(scan: Scan, target: Path, scheme: IdScheme | None = None) -> tuple[int, list[str]]:
    """Write the sorted list of the images that a scan finds; returns the number of lines, and what to say.

    A name that no line can hold is written escaped.

    Args:
        scheme: refuse what an enqueue would refuse.

    Raises:
        ObjectListError: no image is there, the folder cannot be read, or an enqueue would refuse the list.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_SCRATCH) as name:
        scratch = Path(name)
        lines = _write_sorted(scan, scratch, scratch / "list")
        notes = scan.notes()
        if not lines:
            found = "; ".join(["", *notes])
            raise ObjectListError(f"no image files ({' '.join(sorted(IMAGE_ENDINGS))}) below {scan.folder}{found}")
        if scheme is not None:
            notes += prepare(scratch / "list", scratch, scheme).notes
        # A plan that is open is carried on with the list that it was made of: that must be there after a power cut too.
        with (scratch / "list").open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch / "list", target)
    return lines, notes


def _write_sorted(scan: Scan, scratch: Path, target: Path) -> int:
    any_scheme = IdScheme(ObjectIds.path)
    lines = 0
    still = StillAt(f"looking for images below {scan.folder}")
    with (scratch / "raw").open("wb") as out:
        for path in scan.paths():
            if lines % _TOLD_EVERY == 0:
                still(f"{lines:,} found")
            line = os.fsencode(path)
            out.write((escaped(line).encode() if any_scheme.problem(line) else line) + b"\n")
            lines += 1
    sort_lines(scratch / "raw", target)
    return lines


def count_unlisted(scan: Scan, listed: Path, scheme: IdScheme, beside: Path) -> int:
    """How many images of a folder are not on an object list.

    Args:
        beside: a folder with room for some copies of the list.

    Raises:
        ObjectListError: the folder or the list cannot be read.
    """
    with tempfile.TemporaryDirectory(dir=beside, prefix=_SCRATCH) as name:
        scratch = Path(name)
        if not _write_sorted(scan, scratch, scratch / "found"):
            return 0
        cleaned = []
        for part, source in (("of-list", listed), ("of-folder", scratch / "found")):
            (scratch / part).mkdir()
            cleaned.append(clean_list(source, scratch / part, scheme)[0])
        lines, unlisted = read_lines(cleaned[0]), 0
        line = next(lines, None)
        for path in read_lines(cleaned[1]):
            # In order of bytes, which is that of code points.
            while line is not None and line < path:
                line = next(lines, None)
            unlisted += line != path
    return unlisted
