"""Which way a search takes, and why: the one place that decides it."""

import importlib.util
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import UsageError
from pipeline.settings import Device
from search.gallery.shards import Gallery
from search.options import Metric, Precision
from search.ranking.rank import QUERIES_AT_ONCE, Scan, default_block_rows, numpy_scan

if TYPE_CHECKING:
    from search.near_duplicates import Multiply

#: From so many queries on a bfloat16 product on CUDA costs no more than reading its rows.
_WORTH_TENSOR_CORES = 16
#: The part of a device's free memory that rows may take; the rest is for cosines and candidates.
_DEVICE_PART = 0.7
#: The part of the machine's memory that a second copy in bfloat16 may take.
_MEMORY_PART = 0.25
#: Large blocks keep a GPU's launches and the host's part rare; two pinned buffers of this size exist.
_CUDA_BLOCK_BYTES = 256 << 20
#: One pass over PCIe costs the same for one query and for thousands.
_CUDA_QUERIES_AT_ONCE = 4096


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


#: The best first. Measured on AVX-512: a twofold rate; the others are taken to be ten times as fast as float32.
_UNITS = (
    Bfloat16Units("amx_bf16", True, 50_000_000),
    Bfloat16Units("bf16", True, 50_000_000),
    Bfloat16Units("avx512_bf16", False, 400_000_000),
)
#: For fewer queries, rounding the gallery to bfloat16 on the way takes as long as numpy's float32.
_WORTH_BFLOAT16 = 16
#: What sums products of 8 bits exactly; without, torch saturates them.
_INT8_FLAGS = ("avx512_vnni", "avx_vnni", "amx_int8")
#: Longer rows of 8 bits could overflow the 32 bits that their products are summed in.
_INT32_LENGTH = 1 << 17
#: Up to so many queries codes are quicker than features: multiplied by torch; and converted by numpy, which takes as
#: long as reading features from memory, but not from a disk.
_CODES_BY_TORCH, _CODES_BY_NUMPY = 128, 64


@dataclass(frozen=True)
class Work:
    """What is asked: n rows of length d, q queries.

    Attributes:
        coded: the rows' codes are kept.
        in_memory: so are their features, or they seem to be.
    """

    rows: int
    length: int
    queries: int
    metric: Metric
    coded: bool = False
    in_memory: bool = True


@dataclass(frozen=True)
class Machine:
    """What there is to answer with.

    Attributes:
        device: as asked for.
        torch: whether it is installed.
        torch_loaded: whether this process has imported it already.
        bfloat16: what the CPU has to multiply bfloat16 with; None: nothing.
        int8: whether the CPU multiplies 8 bits exactly.
        memory_bytes: of the machine.
        device_free_bytes: free memory of the CUDA device; None where CUDA is not asked for.
    """

    device: Device
    torch: bool
    torch_loaded: bool
    bfloat16: Bfloat16Units | None
    int8: bool
    memory_bytes: int
    device_free_bytes: int | None = None


@dataclass(frozen=True)
class Plan:
    """The way to take.

    Attributes:
        torch: scan with torch, else with numpy.
        device: `cpu` or `cuda`.
        resident: the gallery stays on the device between passes.
        queries_at_once: queries that share one pass.
        why: one sentence for people.
    """

    torch: bool
    device: str
    precision: Precision
    resident: bool
    block_rows: int
    queries_at_once: int
    why: str

    def scan(self, gallery: Gallery) -> Scan:
        """The scan to search `gallery` with."""
        if self.precision is Precision.int8:
            return _codes_scan(self.torch, gallery.length, self.block_rows)
        if not self.torch:
            return numpy_scan(self.block_rows)
        from search.ranking.torch_scan import TorchScan

        return TorchScan(gallery, self.device, self.precision, resident=self.resident, block_rows=self.block_rows)

    def __str__(self) -> str:
        way = f"{'torch' if self.torch else 'numpy'} on {self.device}, {self.precision.value}"
        kept = ", gallery kept on the device" if self.resident else ""
        at_once = f"blocks of {self.block_rows:,} rows, up to {self.queries_at_once:,} queries a pass"
        return f"{way}{kept}, {at_once}: {self.why}"


def make_plan(work: Work, machine: Machine) -> Plan:
    """Choose the way; a pure function.

    Raises:
        UsageError: CUDA is asked for and torch is not installed.
    """
    if machine.device is Device.cuda:
        return _cuda_plan(work, machine)
    rows = default_block_rows(work.length)
    if work.coded and work.metric is not Metric.euclidean:
        torch = machine.int8 and machine.torch_loaded and work.length <= _INT32_LENGTH
        if torch and work.queries <= _CODES_BY_TORCH:
            why = "the kept codes are a quarter of the bytes"
            return Plan(True, "cpu", Precision.int8, False, rows, QUERIES_AT_ONCE, why)
        if not work.in_memory and work.queries <= _CODES_BY_NUMPY:
            why = "the features are not in memory, and the kept codes are a quarter of the bytes"
            return Plan(False, "cpu", Precision.int8, False, rows, QUERIES_AT_ONCE, why)
    if why := _why_numpy(work, machine):
        return Plan(False, "cpu", Precision.float32, False, rows, QUERIES_AT_ONCE, why)
    why = f"{work.queries:,} queries are worth the CPU's bfloat16 units"
    fits = 2 * work.rows * work.length <= _MEMORY_PART * machine.memory_bytes
    resident = work.queries > QUERIES_AT_ONCE and fits
    return Plan(True, "cpu", Precision.bfloat16, resident, rows, QUERIES_AT_ONCE, why)


def _codes_scan(torch: bool, length: int, block_rows: int) -> Scan:
    from search.ranking.codes_scan import NumpyCodesMultiply, codes_scan

    if torch:
        from search.ranking.torch_scan import TorchCodesMultiply, sums_integers

        if sums_integers(length):
            return codes_scan(TorchCodesMultiply, block_rows)
    return codes_scan(NumpyCodesMultiply, block_rows)


def _why_numpy(work: Work, machine: Machine) -> str:
    """Why torch would not help on this CPU; empty where it would."""
    if work.metric is Metric.euclidean:
        return "Euclidean distances need float32, where numpy is as fast"
    units = machine.bfloat16
    if units is None:
        return "this CPU has no bfloat16 units, and without them numpy is as fast as torch"
    if not machine.torch:
        return "torch is not installed"
    if work.queries < _WORTH_BFLOAT16:
        return "for so few queries rounding the gallery to bfloat16 costs more than it saves"
    if not machine.torch_loaded and work.queries * work.rows < units.products:
        return "this is done before torch would be imported"
    return ""


def _cuda_plan(work: Work, machine: Machine) -> Plan:
    if not machine.torch:
        raise UsageError(
            "--device cuda ranks with torch, which is not installed; set up with make setup ACCEL=gpu, "
            "or use --device cpu"
        )
    assert machine.device_free_bytes is not None
    matrix = work.queries >= _WORTH_TENSOR_CORES and work.metric is not Metric.euclidean
    precision = Precision.bfloat16 if matrix else Precision.float32
    needed = work.rows * work.length * (2 if matrix else 4)
    passes = -(-work.queries // _CUDA_QUERIES_AT_ONCE)
    resident = passes > 1 and needed <= _DEVICE_PART * machine.device_free_bytes
    why = "CUDA was asked for; "
    if passes == 1:
        why += "one pass, so the gallery is streamed through"
    else:
        why += f"{passes} passes over {needed / 1e9:.1f} GB, " + ("which fit" if resident else "which do not fit")
    rows = max(1, _CUDA_BLOCK_BYTES // (4 * max(1, work.length)))
    return Plan(True, "cuda", precision, resident, rows, _CUDA_QUERIES_AT_ONCE, why)


def choose_multiply(gallery: Gallery, device: Device) -> "tuple[Multiply, str]":
    """How the tiles of a search for near-duplicates are multiplied, and why.

    Raises:
        UsageError: CUDA is asked for and does not work.
    """
    # Every row is a query here.
    plan = make_plan(Work(gallery.rows, gallery.length, gallery.rows, Metric.cosine), look_at_machine(device))
    if not plan.torch:
        from search.near_duplicates import Multiply

        return Multiply(), f"tiles with numpy in float32: {plan.why}"
    from search.ranking.torch_scan import TorchMultiply

    return TorchMultiply(plan.device), f"tiles with torch on {plan.device} in bfloat16: {plan.why}"


def look_at_machine(device: Device) -> Machine:
    """What this machine has; imports torch only where CUDA is asked for.

    Raises:
        UsageError: CUDA is asked for and does not work.
    """
    installed = importlib.util.find_spec("torch") is not None
    free = None
    if device is Device.cuda and installed:
        from search.ranking.torch_scan import free_bytes

        free = free_bytes(device.value)
    int8 = not _cpu_flags().isdisjoint(_INT8_FLAGS)
    return Machine(device, installed, "torch" in sys.modules, bfloat16_units(), int8, _memory_bytes(), free)


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
