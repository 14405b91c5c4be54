"""Which way a search, a search for near-duplicates or an evaluation takes, and why: the one place that decides it."""

import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cache
from pathlib import Path

from pipeline.choices import Device
from pipeline.errors import UsageError
from search.gallery.shards import Gallery
from search.options import Metric, Precision
from search.ranking.arithmetic import Arithmetic, Tiles
from search.ranking.codes_scan import default_coded_rows
from search.ranking.compiled import LONGEST_CODES, has_codes, has_matrix_units
from search.ranking.device_memory import can_stay, pair_sizes, scan_sizes
from search.ranking.matrix_units import MAX_ROWS, MatrixUnits
from search.ranking.numpy_arithmetic import NumpyArithmetic
from search.ranking.rank import QUERIES_AT_ONCE
from search.ranking.scan import default_block_rows

#: From so many queries on a bfloat16 product on CUDA costs no more than reading its rows.
_WORTH_TENSOR_CORES = 16
#: The part of the machine's memory that a second copy in bfloat16 may take.
_MEMORY_PART = 0.25


@dataclass(frozen=True)
class Bfloat16Units:
    """What multiplies bfloat16 on a CPU.

    Attributes:
        flag: by which the CPU names them.
        matrix: they multiply matrices, not only vectors.
        products: of queries and rows; below, numpy is done before torch is imported (about a second).
    """

    flag: str
    matrix: bool
    products: int


#: The best first. On AVX-512 the rate is twice that of float32, with AMX five to six times.
_UNITS = (
    Bfloat16Units("amx_bf16", True, 50_000_000),
    Bfloat16Units("bf16", True, 50_000_000),
    Bfloat16Units("avx512_bf16", False, 400_000_000),
)
#: For fewer queries, rounding the gallery to bfloat16 takes as long as numpy's float32: if torch rounds it, or if it is
#: then kept; and if what is compiled rounds it on the way. With matrix units, kept rows are quicker for one query too.
_WORTH_BFLOAT16, _WORTH_ROUNDING = 16, 48
#: What sums products of 8 bits exactly; without, torch saturates them.
_INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8")
#: Up to so many queries codes are quicker than features, unless matrix units have rows that are kept in bfloat16:
#: multiplied by torch; or by what is compiled; or converted by numpy, which takes as long as reading features from
#: memory, but not from a disk.
_CODES_BY_TORCH, _CODES_BY_OTHERS = 128, 64
#: Up to so many queries what is compiled is not slower than torch: it takes little longer than to read the codes.
_CODES_IN_ONE_READING = 16


def wait_asleep() -> None:
    """Have torch's threads sleep while they wait for each other, in a process that compares, unless its user chose.

    OpenMP lets them spin. To wake one takes 6 us, eight times for a tile that takes 13 ms; to spin took half of the CPU
    beside other work. The runtime reads this once, when torch is loaded: it must be called before.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


class Library(Enum):
    """What multiplies; `compiled` stands for matrix units, which `search.ranking.compiled` uses."""

    numpy = "numpy"
    torch = "torch"
    compiled = "matrix units"


class Purpose(Enum):
    """What is looked for."""

    hits = "hits"
    pairs = "pairs"
    places = "places"


@dataclass(frozen=True)
class Question:
    """What is asked: n rows of length d, q queries.

    Attributes:
        purpose: the best hits of each query; all pairs of rows that are near; or the places of matches in whole
            rankings, of an evaluation.
        coded: the rows' codes are kept.
        codes_in_memory: and most of them are in memory, or seem to be.
        in_memory: so are their features, or they seem to be.
        lasting: more questions about the same rows will come, so that what is kept for them pays.
        kept: the rows are kept already, as unit vectors in bfloat16.
    """

    rows: int
    length: int
    queries: int
    metric: Metric = Metric.cosine
    coded: bool = False
    codes_in_memory: bool = True
    in_memory: bool = True
    purpose: Purpose = Purpose.hits
    lasting: bool = False
    kept: bool = False


@dataclass(frozen=True)
class Machine:
    """What there is to answer with.

    Attributes:
        device: as asked for.
        torch: whether it is installed.
        torch_loaded: whether this process has imported it already.
        bfloat16: what the CPU has to multiply bfloat16 with; None: nothing.
        int8: whether the CPU multiplies 8 bits exactly.
        compiled: whether what is compiled for matrix units can use those of the CPU.
        codes: whether what is compiled for codes can multiply them.
        memory_bytes: of the machine.
        device_free_bytes: free memory of the CUDA device; None if CUDA is not asked for.
        device_bfloat16: whether that device has units for bfloat16.
    """

    device: Device
    torch: bool
    torch_loaded: bool
    bfloat16: Bfloat16Units | None
    int8: bool
    memory_bytes: int
    compiled: bool = False
    codes: bool = False
    device_free_bytes: int | None = None
    device_bfloat16: bool = True


@dataclass(frozen=True)
class Way:
    """The way to take.

    Attributes:
        library: what multiplies.
        device: `cpu` or `cuda`.
        precision: of a scan, or of tiles, or of an evaluation's products.
        resident: the gallery stays on the device between passes.
        queries_at_once: queries that share one pass.
        products_at_once: products of rows and queries that are looked through at once; None: what a CPU's cache holds.
        tiles: of pairs; None: what suits a CPU.
        why: one sentence for people.
    """

    library: Library
    device: Device
    precision: Precision
    resident: bool
    block_rows: int = field(compare=False)
    queries_at_once: int = field(compare=False)
    why: str = field(compare=False)
    purpose: Purpose = Purpose.hits
    products_at_once: int | None = field(default=None, compare=False)
    tiles: Tiles | None = field(default=None, compare=False)

    def arithmetic(self) -> Arithmetic:
        """What multiplies on this way.

        Raises:
            UsageError: CUDA is asked for and does not work.
        """
        if self.library is Library.numpy:
            return NumpyArithmetic(self.block_rows, codes=self.precision is Precision.int8)
        if self.library is Library.compiled:
            return MatrixUnits(resident=self.resident, block_rows=self.block_rows)
        from search.ranking.torch_arithmetic import TorchArithmetic

        return TorchArithmetic(
            self.device,
            self.precision,
            resident=self.resident,
            block_rows=self.block_rows,
            products_at_once=self.products_at_once,
            tiles=self.tiles,
        )

    def __str__(self) -> str:
        library = self.library.value
        if self.purpose is Purpose.pairs:
            on = f" on {self.device}" if self.library is Library.torch else ""
            return f"tiles with {library}{on} in {self.precision.value}: {self.why}"
        kept = ", gallery kept on the device" if self.resident else ""
        at_once = f"blocks of {self.block_rows:,} rows, up to {self.queries_at_once:,} queries a pass"
        return f"{library} on {self.device}, {self.precision.value}{kept}, {at_once}: {self.why}"


class Planner:
    """Chooses a way for every question of one process, and keeps what stays resident; several threads may use it."""

    def __init__(self, device: Device, lasting: bool = False) -> None:
        """Nothing is looked at before the first question.

        Args:
            lasting: more questions about the same galleries will come.
        """
        self._device, self._lasting = device, lasting
        self._kept: dict[Way, Arithmetic] = {}

    def way(self, gallery: Gallery, purpose: Purpose, queries: int, metric: Metric = Metric.cosine) -> Way:
        """The way to answer some queries.

        Raises:
            UsageError: CUDA is asked for and does not work.
        """
        hits = purpose is Purpose.hits
        coded = hits and gallery.coded
        by_codes = coded and queries <= _CODES_BY_TORCH and metric is not Metric.euclidean
        by_codes = by_codes and self._device is not Device.cuda
        question = Question(
            gallery.rows,
            gallery.length,
            queries,
            metric,
            coded,
            not by_codes or gallery.codes_in_memory(),
            not hits or gallery.in_memory(),
            purpose,
            self._lasting,
            any(one.keeps(gallery) for one in tuple(self._kept.values())),
        )
        machine = look_at_machine(self._device)
        way = choose_way(question, machine)
        # With the sizes that were planned when there was room for it.
        for kept, arithmetic in tuple(self._kept.items()):
            begins = way.resident and not arithmetic.kept_bytes()
            if kept == replace(way, resident=True) and (begins or arithmetic.holds(gallery)):
                return kept
        # The copy of another gallery goes, and with it what has that one's sizes.
        gone = self._kept.pop(replace(way, resident=True), None)
        if machine.device_free_bytes is None or gone is None:
            return way
        free = machine.device_free_bytes + gone.kept_bytes()
        return choose_way(question, replace(machine, device_free_bytes=free))

    def arithmetic(self, way: Way) -> Arithmetic:
        """What multiplies on a way; the same one again if the gallery stays resident.

        Raises:
            UsageError: CUDA is asked for and does not work.
        """
        if not way.resident:
            return way.arithmetic()
        return self._kept.setdefault(way, way.arithmetic())

    def load(self, gallery: Gallery) -> None:
        """Import torch if some question about a gallery would then be answered by it.

        Raises:
            UsageError: CUDA is asked for and does not work.
        """
        machine = replace(look_at_machine(self._device), torch_loaded=True)
        question = Question(gallery.rows, gallery.length, 1, coded=gallery.coded, lasting=self._lasting)
        counts = (1, _CODES_BY_TORCH, QUERIES_AT_ONCE)
        ways = (choose_way(replace(question, queries=queries), machine) for queries in counts)
        if any(way.library is Library.torch for way in ways):
            importlib.import_module("search.ranking.torch_arithmetic")


def choose_way(question: Question, machine: Machine) -> Way:
    """Choose the way; a pure function.

    Raises:
        UsageError: CUDA is asked for and torch is not installed.
    """
    return replace(_choose(question, machine), purpose=question.purpose)


def _choose(question: Question, machine: Machine) -> Way:
    if machine.device is Device.cuda:
        return _on_cuda(question, machine)
    rows = default_block_rows(question.length)
    if question.purpose is Purpose.places:
        why = "whole rankings are multiplied in float64, where numpy is as fast as torch"
        return Way(Library.numpy, Device.cpu, Precision.float64, False, rows, QUERIES_AT_ONCE, why)
    # What is compiled keeps whole tiles of 32 values.
    fits = 2 * question.rows * -(-question.length // 32) * 32 <= _MEMORY_PART * machine.memory_bytes
    stays = question.purpose is Purpose.hits and (question.lasting or question.queries > QUERIES_AT_ONCE) and fits
    if by_codes := _by_codes(question, machine, stays):
        library, why = by_codes
        rows = default_coded_rows(question.length)
        return Way(library, Device.cpu, Precision.int8, False, rows, QUERIES_AT_ONCE, why)
    if why := _why_numpy(question, machine, stays):
        return Way(Library.numpy, Device.cpu, Precision.float32, False, rows, QUERIES_AT_ONCE, why)
    why = f"{question.queries:,} queries are worth the CPU's bfloat16 units"
    if stays:
        why = "the CPU's bfloat16 units multiply rows that are rounded once"
    library = Library.compiled if _compiled(question, machine) else Library.torch
    return Way(library, Device.cpu, Precision.bfloat16, stays, rows, QUERIES_AT_ONCE, why)


def _by_codes(question: Question, machine: Machine, stays: bool) -> tuple[Library, str] | None:
    """What multiplies the kept codes, and why; None if features are quicker."""
    if not question.coded or question.metric is Metric.euclidean:
        return None
    units = machine.bfloat16
    matrix = units is not None and units.matrix and question.lasting and stays
    matrix = matrix and (machine.torch or _compiled(question, machine))
    # Rows that are neither kept nor in memory would have to be read to be kept.
    if matrix and _worth_bfloat16(question, machine, stays) and (question.kept or question.in_memory):
        return None
    why = "the kept codes are a quarter of the bytes"
    fits = question.length <= LONGEST_CODES
    torch = fits and machine.int8 and machine.torch_loaded
    # Features in memory are sooner there than codes that are not; but these are there the next time.
    near = question.codes_in_memory or question.lasting or not question.in_memory
    most = _WORTH_ROUNDING - 1 if _compiled(question, machine) else _CODES_BY_OTHERS
    if fits and machine.codes and near and question.queries <= (_CODES_IN_ONE_READING if torch else most):
        return Library.numpy, f"{why}, and what is compiled multiplies them"
    if torch and near and question.queries <= _CODES_BY_TORCH:
        return Library.torch, why
    if not question.in_memory and question.queries <= _CODES_BY_OTHERS:
        return Library.numpy, f"the features are not in memory, and {why}"
    return None


def _compiled(question: Question, machine: Machine) -> bool:
    return machine.compiled and question.purpose is Purpose.hits and question.rows < MAX_ROWS


def _worth_bfloat16(question: Question, machine: Machine, stays: bool) -> bool:
    on_the_way = _compiled(question, machine) and not stays
    enough = question.queries >= (_WORTH_ROUNDING if on_the_way else _WORTH_BFLOAT16)
    return enough or (question.kept and machine.bfloat16 is not None and machine.bfloat16.matrix)


def _why_numpy(question: Question, machine: Machine, stays: bool) -> str:
    """Why bfloat16 would not help on this CPU; empty if it would."""
    if question.metric is Metric.euclidean:
        return "Euclidean distances need float32, where numpy is as fast"
    units = machine.bfloat16
    if units is None:
        return "this CPU has no bfloat16 units, and without them numpy is as fast as torch"
    compiled = _compiled(question, machine)
    if not (machine.torch or compiled):
        return "torch is not installed"
    if not _worth_bfloat16(question, machine, stays):
        return "for so few queries rounding the gallery to bfloat16 costs more than it saves"
    if not (machine.torch_loaded or compiled) and question.queries * question.rows < units.products:
        return "this takes less time than importing torch"
    return ""


def _on_cuda(question: Question, machine: Machine) -> Way:
    if not machine.torch:
        raise UsageError(
            "--device cuda ranks with torch, which is not installed; set up with make setup ACCEL=gpu, "
            "or use --device cpu"
        )
    assert machine.device_free_bytes is not None
    free, why = machine.device_free_bytes, "CUDA was asked for"
    if question.purpose is Purpose.places:
        rows = default_block_rows(question.length)
        return Way(Library.torch, Device.cuda, Precision.float64, False, rows, QUERIES_AT_ONCE, why)
    if question.purpose is Purpose.pairs:
        tiles, products = pair_sizes(free, question.rows, question.length)
        why += "; all rows stay on the device" if question.rows <= tiles.kept_rows else "; not all rows fit"
        at_once = tiles.tile_rows, QUERIES_AT_ONCE
        return Way(
            Library.torch, Device.cuda, Precision.bfloat16, False, *at_once, why, products_at_once=products, tiles=tiles
        )
    # Rows that stay take half the memory in bfloat16, and a pass over them half the time, also for one query.
    matrix = machine.device_bfloat16 and (question.queries >= _WORTH_TENSOR_CORES or question.lasting)
    precision = Precision.bfloat16 if matrix and question.metric is not Metric.euclidean else Precision.float32
    needed = question.rows * question.length * (2 if precision is Precision.bfloat16 else 4)
    streamed = _sized(precision, False, free, question.length, why)
    passes = -(-question.queries // streamed.queries_at_once)
    if passes == 1 and not question.lasting:
        return replace(streamed, why=f"{why}; one pass, so the gallery is streamed through")
    many = "many" if question.lasting else f"{passes}"
    why += f"; {many} passes over {needed / 1e9:.1f} GB, "
    if not can_stay(needed, free):
        return replace(streamed, why=f"{why}which do not fit")
    return _sized(precision, True, free - needed, question.length, f"{why}which fit")


def _sized(precision: Precision, resident: bool, free_bytes: int, length: int, why: str) -> Way:
    """A way on CUDA whose blocks and products fit into so much memory."""
    sizes = scan_sizes(free_bytes, length, precision)
    at_once = sizes.block_rows, sizes.queries_at_once
    return Way(Library.torch, Device.cuda, precision, resident, *at_once, why, products_at_once=sizes.products_at_once)


def check_cuda() -> None:
    """Find out whether torch can compare on CUDA here.

    Raises:
        UsageError: it cannot.
    """
    choose_way(Question(1, 1, 1, purpose=Purpose.pairs), look_at_machine(Device.cuda))


def look_at_machine(device: Device) -> Machine:
    """What this machine has; imports torch only where CUDA is asked for.

    Raises:
        UsageError: CUDA is asked for and does not work.
    """
    installed = _has_torch()
    free, bfloat16 = None, True
    if device is Device.cuda and installed:
        from search.ranking.torch_arithmetic import free_bytes, multiplies_bfloat16

        free, bfloat16 = free_bytes(device.value), multiplies_bfloat16(device.value)
    int8 = not _cpu_flags().isdisjoint(_INT8_FLAGS)
    units = bfloat16_units()
    compiled = units is not None and units.matrix and has_matrix_units()
    loaded = "torch" in sys.modules
    return Machine(device, installed, loaded, units, int8, _memory_bytes(), compiled, has_codes(), free, bfloat16)


@cache
def _has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@cache
def bfloat16_units() -> Bfloat16Units | None:
    """The best that this CPU's flags name (AMX, ARM's BF16, AVX-512)."""
    return next((units for units in _UNITS if units.flag in _cpu_flags()), None)


@cache
def _cpu_flags() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith(("flags", "Features")))
    return frozenset(next(lines, "").split())
