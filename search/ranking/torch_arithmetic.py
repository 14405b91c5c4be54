"""Arithmetic with torch: for CUDA, and on a CPU with bfloat16 units or units for 8-bit integers.

Only candidates come from here. The bounds on their error are those of `search.ranking.bounds`, and the decision in
float64 is that of `search.ranking.rank`, on the host, so the answer is the same bit for bit.
"""

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import DeviceFault, MachineFault, RuijiError, UsageError
from search.arrays import Float32, Float64, Rows
from search.gallery.codes import integers_of
from search.gallery.norms import is_plain
from search.gallery.shards import Block, Gallery
from search.options import Metric, Precision
from search.ranking.arithmetic import Dense, Listed, Products, Tiles, cpu_tiles, is_dense
from search.ranking.bounds import BFLOAT16_ROUNDOFF, Margin, bfloat16_margin, float32_margin, margin_of, values_of
from search.ranking.codes_scan import NumpyCodesMultiply, codes_scan
from search.ranking.scan import Batch, Candidates, default_block_rows, scanned_rows

#: Rows that are rounded at once, and products that a CPU looks through at once (2.6 MB for d = 1280, and 8 MB, both in
#: bfloat16): they are still in its cache when they are needed, and the threads seldom wait for each other.
_ROUNDED_ROWS, _PRODUCTS = 1024, 1 << 22
#: So many rows of products are looked at by their highest: one quick pass, where comparing all and looking for what
#: that found take two to three times as long. If every eighth group has a hit, all are compared.
_GROUP_ROWS, _GROUP_WORTH = 16, 8
_T = TypeVar("_T")
_SETTINGS = threading.RLock()
_NO_PLACES: tuple[Rows, Rows] = (np.empty(0, np.int64), np.empty(0, np.int64))
#: Far below what a bound on the error of a unit vector's product notices.
_NOTHING = np.float32(1e-30)


@dataclass(frozen=True)
class _Rows:
    """Rows on the device.

    Attributes:
        first: gallery row of the first of them.
        features: [b, d]: as they are, or as unit vectors rounded to bfloat16.
        norms: float32[b], of the features as they are; 1 for rows that are not usable.
        usable: bool[b].
        loss: the largest part of a usable row's norm that rounding can take.
        units: whether the features are unit vectors.
    """

    first: int
    features: torch.Tensor
    norms: torch.Tensor
    usable: torch.Tensor
    loss: float
    units: bool = False

    @classmethod
    def room_for(cls, rows: int, length: int, dtype: torch.dtype, device: torch.device) -> "_Rows":
        """A whole gallery's, nothing in it yet."""
        features = torch.empty((rows, length), dtype=dtype, device=device)
        norms, usable = torch.empty(rows, device=device), torch.empty(rows, dtype=torch.bool, device=device)
        return cls(0, features, norms, usable, 0.0, dtype is torch.bfloat16)

    def keep(self, block: "_Rows") -> "_Rows":
        """Take in a block, rounded where these are; returns it as it is kept, with what rounding took from it."""
        kept = self.part(block.first, block.first + len(block.features))
        kept.norms.copy_(block.norms)
        kept.usable.copy_(block.usable)
        loss = block.loss
        if self.units:
            pieces = zip(block.pieces(_ROUNDED_ROWS), kept.pieces(_ROUNDED_ROWS), strict=True)
            loss = max(_round(piece, into.features) for piece, into in pieces)
        else:
            kept.features.copy_(block.features)
        return replace(kept, loss=loss)

    def part(self, start: int, end: int) -> "_Rows":
        """Some of the rows, counted among these."""
        some = slice(start, end)
        parts = self.features[some], self.norms[some], self.usable[some]
        return _Rows(self.first + start, *parts, self.loss, self.units)

    def pieces(self, rows: int) -> "Iterator[_Rows]":
        """So many rows at once."""
        for start in range(0, len(self.features), rows):
            yield self.part(start, start + rows)

    def doubling(self, rows: int) -> "Iterator[_Rows]":
        """So many rows, then each time as many as all before: what is found in the first keeps most others out."""
        start, end = 0, rows
        while start < len(self.features):
            yield self.part(start, end)
            start, end = end, 2 * end


def _round(rows: _Rows, into: torch.Tensor) -> float:
    """Write rows as unit vectors in bfloat16; returns the largest part of a usable one's norm that this took."""
    units = rows.features / rows.norms[:, None]
    into.copy_(units)
    return _largest_loss(units[rows.usable], into[rows.usable])


class TorchScan:
    """A scan on a torch device, for one gallery.

    The gallery is streamed to the device block by block: on CUDA through two pinned buffers, so that the next block
    is copied while one is computed. Of the score matrix only one block's part ever exists.
    """

    def __init__(
        self,
        gallery: Gallery,
        device: str,
        precision: Precision = Precision.float32,
        *,
        resident: bool = False,
        block_rows: int | None = None,
        products_at_once: int | None = None,
        staged: bool | None = None,
    ) -> None:
        """Nothing is read before the first batch.

        Args:
            device: `cuda` or `cpu`.
            precision: what is multiplied; sums are at least float32.
            resident: keep the whole gallery on the device between batches.
            products_at_once: of rows and queries; by default so many as stay in a CPU's cache.
            staged: go through buffers; by default on CUDA, elsewhere the mapped rows serve as they are.

        Raises:
            UsageError: CUDA was asked for and torch has none that works.
        """
        self.gallery, self._resident = gallery, resident
        self._device = torch_device(device)
        self._dtype = torch.bfloat16 if precision is Precision.bfloat16 else torch.float32
        self._block_rows = block_rows or default_block_rows(gallery.length)
        self._products_at_once = products_at_once
        self._staged = self._device.type == "cuda" if staged is None else staged
        self._kept: _Rows | None = None
        # Two threads that come first would put two copies on the device.
        self._keeping = threading.Lock()

    def __call__(self, gallery: Gallery, batch: Batch, cuts: NDArray[np.float64]) -> Iterator[Candidates]:
        """One pass; a `search.ranking.rank.Scan`."""
        assert gallery is self.gallery
        units = torch.from_numpy(batch.units).to(self._device)
        rounded = units.to(self._dtype)
        query_loss = _largest_loss(units, rounded)
        at_once = max(1, (self._products_at_once or _PRODUCTS) // len(units))
        for rows in self._blocks(max(self._block_rows, at_once)):
            margin, unknown = self._margin(rows.loss, query_loss), bool(np.isneginf(cuts).any())
            if self._products_at_once is None and 8 * batch.top_k > at_once and unknown:
                # The k-th of so few rows would keep hardly any of the others out.
                yield _select(batch, rounded, margin, iter([rows]), cuts)
                continue
            for part in rows.doubling(at_once) if unknown else (rows,):
                yield _select(batch, rounded, margin, part.pieces(at_once), cuts)

    @property
    def keeps(self) -> bool:
        """Whether the whole gallery is on the device."""
        return self._kept is not None

    @property
    def kept_bytes(self) -> int:
        """How many bytes it takes there, or is about to."""
        begun = self._kept is not None or self._keeping.locked()
        return self.gallery.rows * self.gallery.length * self._dtype.itemsize if begun else 0

    def _margin(self, row_loss: float, query_loss: float) -> Margin:
        if self._dtype is torch.float32:
            return float32_margin(self.gallery.length)
        return bfloat16_margin(self.gallery.length, row_loss, query_loss)

    def _blocks(self, kept_at_once: int) -> Iterator[_Rows]:
        if not self._resident:
            yield from self._read()
            return
        with self._keeping:
            if self._kept is None:
                kept = _Rows.room_for(self.gallery.rows, self.gallery.length, self._dtype, self._device)
                loss = 0.0
                for rows in self._read():
                    here = kept.keep(rows)
                    loss = max(loss, here.loss)
                    yield here
                # Only a pass that came to its end has all of them.
                self._kept = replace(kept, loss=loss)
                return
        yield from self._kept.pieces(kept_at_once)

    def _read(self) -> Iterator[_Rows]:
        blocks = self.gallery.blocks(self._block_rows)
        for block, features in self._streamed(blocks) if self._staged else self._borrowed(blocks):
            yield self._prepare(block, features)

    def _borrowed(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, torch.Tensor]]:
        for block in blocks:
            yield block, _borrow(block.features).to(self._device)

    def _streamed(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, torch.Tensor]]:
        """Each block on the device, while the next one is on its way."""
        cuda = self._device.type == "cuda"
        # No block is of two shards.
        longest = max((len(shard.features) for shard in self.gallery.shards), default=0)
        shape = (min(self._block_rows, longest), self.gallery.length)
        buffers = [torch.empty(shape, dtype=torch.float32, pin_memory=cuda) for _ in range(2)]
        copies = torch.cuda.Stream(self._device) if cuda else None
        left: list[torch.cuda.Event | None] = [None, None]
        waiting: tuple[Block, torch.Tensor, torch.cuda.Event | None] | None = None
        for number, block in enumerate(blocks):
            slot = number % 2
            if (event := left[slot]) is not None:
                event.synchronize()
            host = buffers[slot][: len(block.features)]
            host.copy_(_borrow(block.features))
            with torch.cuda.stream(copies) if cuda else nullcontext():
                # A copy on every device: the buffer is used again while the rows may be kept.
                features = host.to(self._device, non_blocking=True, copy=True)
                left[slot] = copies.record_event() if copies is not None else None
            if waiting is not None:
                yield self._arrived(*waiting)
            waiting = (block, features, left[slot])
        if waiting is not None:
            yield self._arrived(*waiting)

    def _arrived(
        self, block: Block, features: torch.Tensor, event: "torch.cuda.Event | None"
    ) -> tuple[Block, torch.Tensor]:
        if event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(event)
            # Made on the copying stream, used on this one: its memory must not be given away before.
            features.record_stream(stream)
        return block, features

    def _prepare(self, block: Block, features: torch.Tensor) -> _Rows:
        usable = scanned_rows(block.norms, block.left_out)
        # As `plain_rows` does, on the device.
        if not (plain := is_plain(block.norms)).all():
            features = features.masked_fill(torch.from_numpy(~plain).to(self._device)[:, None], 0)
        norms = torch.from_numpy(np.where(usable, block.norms, np.float32(1))).to(self._device)
        return _Rows(block.first, features, norms, torch.from_numpy(usable).to(self._device), BFLOAT16_ROUNDOFF)


class TorchArithmetic:
    """An `Arithmetic` on a torch device; several threads may use it."""

    def __init__(
        self,
        device: str,
        precision: Precision,
        *,
        resident: bool = False,
        block_rows: int | None = None,
        products_at_once: int | None = None,
        tiles: Tiles | None = None,
    ) -> None:
        """Nothing is read before the first question.

        Args:
            device: `cuda` or `cpu`.
            precision: what a scan multiplies; `int8`: the codes. Tiles are multiplied in bfloat16, evaluations in
                float64.
            resident: keep the gallery that was scanned last on the device.
            block_rows, products_at_once: as `TorchScan` takes them.
            tiles: of a comparison of all pairs; by default what suits a CPU.

        Raises:
            UsageError: CUDA was asked for and torch has none that works.
        """
        self._device, self._precision = torch_device(device), precision
        self._resident, self._block_rows, self._products_at_once = resident, block_rows, products_at_once
        self._tiles = tiles
        self._scanned: TorchScan | None = None

    def scan(self, gallery: Gallery, batch: Batch, cuts: Float64) -> Iterator[Candidates]:
        """As `Arithmetic` says."""
        if self._precision is Precision.int8:
            multiply = TorchCodesMultiply if sums_integers(gallery.length) else NumpyCodesMultiply
            return codes_scan(multiply, self._block_rows)(gallery, batch, cuts)
        scan = self._scanned
        if scan is None or scan.gallery is not gallery:
            scan = TorchScan(
                gallery,
                self._device.type,
                self._precision,
                resident=self._resident,
                block_rows=self._block_rows,
                products_at_once=self._products_at_once,
            )
            self._scanned = scan if self._resident else None
        return _guarded(scan(gallery, batch, cuts))

    def keeps(self, gallery: Gallery) -> bool:
        """As `Arithmetic` says."""
        scan = self._scanned
        return scan is not None and scan.gallery is gallery and scan.keeps

    def holds(self, gallery: Gallery) -> bool:
        """As `Arithmetic` says."""
        scan = self._scanned
        return scan is not None and scan.gallery is gallery

    def kept_bytes(self) -> int:
        """As `Arithmetic` says."""
        scan = self._scanned
        return 0 if scan is None else scan.kept_bytes

    def tiles(self, length: int) -> Tiles:
        """As `Arithmetic` says."""
        return self._tiles or cpu_tiles(2 * length)

    def prepare(self, units: Float32) -> tuple[object, Margin]:
        """As `Arithmetic` says."""
        with _device_faults():
            exact = torch.from_numpy(units).to(self._device)
            rounded = exact.bfloat16()
            # Both sides are rounded rows; the larger loss of the two counts for both.
            loss = _largest_loss(exact, rounded)
        return rounded, bfloat16_margin(units.shape[1], loss, loss)

    def near(self, some: object, others: object, least: float) -> Iterator[Listed | Dense]:
        """As `Arithmetic` says; only near pairs leave the device, or all if many are."""
        return _guarded(self._near(some, others, least))

    def _near(self, some: object, others: object, least: float) -> Iterator[Listed | Dense]:
        a, b = cast(torch.Tensor, some), cast(torch.Tensor, others)
        at_once = max(1, (self._products_at_once or _PRODUCTS) // max(1, len(b)))
        for number, part in enumerate(a.split(at_once)):
            cosines = _products(part, b)
            found = _near(cosines, least)
            if found is None:
                near = ~(cosines < torch.tensor([least], device=cosines.device))
                yield Dense(number * at_once, cosines.float().cpu().numpy(), near.cpu().numpy())
            elif len(found[0]):
                i, j = found
                yield Listed(number * at_once + i, j, _at(cosines, i, j))

    def products(self, units: Float64) -> Products:
        """As `Arithmetic` says."""
        with _device_faults():
            queries = torch.from_numpy(units).to(self._device)

        def multiply(rows: Float32) -> Float64:
            with _device_faults():
                # A copy: torch warns about read-only arrays such as a mapped shard. It is widened on the device.
                block = torch.from_numpy(np.array(rows)).to(self._device).double()
                dots: Float64 = (queries @ block.T).cpu().numpy()
                return dots

        return multiply


class TorchCodesMultiply:
    """Integers are multiplied as they are, by two digits of a query; a `search.ranking.codes_scan.CodesMultiply`."""

    def __init__(self, units: NDArray[np.float32]) -> None:
        """Split the queries, float32[q, d]."""
        first, steps, _ = integers_of(units)
        rest = units - first * steps[:, np.newaxis]
        # What the first digit holds wholly leaves nothing to divide by.
        rest[np.abs(rest).max(axis=1) < _NOTHING] = _NOTHING
        second, second_steps, losses = integers_of(rest)
        self.query_loss = float(losses.max())
        digits = np.concatenate([first, second])
        self._digits, self._wide = torch.from_numpy(digits), digits.astype(np.float64)
        self._steps = torch.from_numpy(np.stack([steps, second_steps])[:, :, np.newaxis])

    def __call__(self, parts: Sequence[NDArray[np.int8]]) -> NDArray[np.float32]:
        """As `CodesMultiply` says.

        Raises:
            RuijiError: torch gave wrong sums; it says nothing where oneDNN refuses the shapes.
        """
        return np.concatenate([self._products(integers) for integers in parts], axis=1)

    def _products(self, integers: NDArray[np.int8]) -> NDArray[np.float32]:
        sums = _integer_products(self._digits, _borrow(integers))
        if (sums[:, 0].numpy() != self._wide @ integers[0]).any():
            raise RuijiError(
                f"torch {torch.__version__} multiplies integers wrongly on this machine (rows of {integers.shape[1]}): "
                "use another version, or delete *.codes.npy in the gallery's folder cache"
            )
        first, second = sums.chunk(2)
        products: NDArray[np.float32] = (first * self._steps[0]).addcmul_(second, self._steps[1]).numpy()
        return products


@cache
def sums_integers(length: int) -> bool:
    """Whether torch multiplies rows of so many integers exactly on this CPU.

    Without instructions for it the sums saturate, and rows of one value are not multiplied at all.
    """
    most = torch.full((32, length), 127, dtype=torch.int8)
    return all(bool((_integer_products(most, sign * most) == sign * 127 * 127 * length).all()) for sign in (1, -1))


def free_bytes(device: str) -> int:
    """Memory of a CUDA device that is free, or that torch holds in this process without a use for it.

    Raises:
        UsageError: torch has no CUDA that works.
    """
    on = torch_device(device)
    return int(torch.cuda.mem_get_info(on)[0] + torch.cuda.memory_reserved(on) - torch.cuda.memory_allocated(on))


def multiplies_bfloat16(device: str) -> bool:
    """Whether a CUDA device has units for bfloat16; before compute capability 8.0 it is emulated, slower than float32.

    Raises:
        UsageError: torch has no CUDA that works.
    """
    return tuple(torch.cuda.get_device_capability(torch_device(device))) >= (8, 0)


def torch_device(name: str) -> torch.device:
    """A torch device that works.

    Raises:
        UsageError: CUDA was asked for and torch has none that works; a RuntimeError is its cause if the device refused.
    """
    if name == "cuda":
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"--device cuda: torch {torch.__version__} has no CUDA device that works "
                f"({_first_line(error)}); use --device cpu, or set up with make setup ACCEL=gpu"
            ) from error
    return torch.device(name)


@contextmanager
def _device_faults() -> Iterator[None]:
    """What CUDA reports in a search, as ruiji's errors.

    Raises:
        MachineFault: the GPU's memory does not suffice now. DeviceFault: the GPU failed.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MachineFault(
            f"--device cuda: the GPU's memory does not suffice ({_first_line(error)}); end what else uses the GPU, or "
            "use --device cpu"
        ) from error
    except torch.AcceleratorError as error:
        raise DeviceFault(f"--device cuda: the GPU failed ({_first_line(error)})") from error


def _guarded(parts: Iterator[_T]) -> Iterator[_T]:
    with _device_faults():
        yield from parts


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _borrow(rows: NDArray[Any]) -> torch.Tensor:
    with warnings.catch_warnings():
        # Torch warns that a mapped shard is read-only; nothing here writes to it.
        warnings.simplefilter("ignore")
        return torch.from_numpy(rows)


@contextmanager
def _full_sums() -> Iterator[None]:
    # TensorFloat-32 has 10 bits of mantissa, and sums in bfloat16 have 7: either would break the error bound. The
    # settings are the process': another thread that sets them back must wait.
    with _SETTINGS:
        cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        # Of each by itself: the word for all of them cannot be asked for once somebody chose for one.
        before = cuda.fp32_precision, cpu.fp32_precision, cuda.allow_bf16_reduced_precision_reduction
        cuda.fp32_precision = cpu.fp32_precision = "ieee"
        cuda.allow_bf16_reduced_precision_reduction = False
        try:
            yield
        finally:
            cuda.fp32_precision, cpu.fp32_precision, cuda.allow_bf16_reduced_precision_reduction = before


def _largest_loss(units: torch.Tensor, rounded: torch.Tensor) -> float:
    """The largest norm of what rounding took from unit vectors."""
    return float(torch.linalg.vector_norm(units - rounded, dim=1).max()) if len(units) else 0.0


def _products(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Dot products of rows, [b, d], and others, [q, d], in the type of the others: [b, q]."""
    with _full_sums():
        if len(others) == 1 and others.dtype == torch.float32:
            return torch.mv(rows, others[0])[:, None]
        if rows.dtype == others.dtype or rows.device.type != "cpu":
            return _matrix_product(rows.to(others.dtype), others)
        parts = [_matrix_product(part.to(others.dtype), others) for part in rows.split(_ROUNDED_ROWS)]
        return torch.cat(parts)


def _integer_products(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Dot products of rows of int8, summed in int32: [b, d] and [q, d] to [b, q]."""
    # The name says that torch may change it; nothing public multiplies integers on a CPU.
    return torch._int_mm(rows, others.T)


def _matrix_product(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    # The routine for a single vector need not sum bfloat16 in float32, that for matrices does.
    some = rows.expand(2, -1) if len(rows) == 1 else rows
    some_others = others.expand(2, -1) if len(others) == 1 else others
    return (some @ some_others.T)[: len(rows), : len(others)]


def _chosen(mask: torch.Tensor) -> tuple[Rows, Rows]:
    """Where a mask, bool[b, q], is true: its rows, ascending, and their columns."""
    # On a CPU by numpy, and flat: torch takes several times as long, and numpy with two dimensions as well.
    flat = mask.flatten()
    places = np.flatnonzero(flat.numpy()) if mask.device.type == "cpu" else flat.nonzero()[:, 0].cpu().numpy()
    return np.divmod(places, max(1, mask.shape[1]))


def _near(cosines: torch.Tensor, least: float) -> tuple[Rows, Rows] | None:
    """The rows and columns of cosines that are not below `least`; None if there are so many that all are wanted."""
    # Often there is none, and then this is the only look. A value that is none makes the highest none.
    if float(cosines.max()) < least:
        return _NO_PLACES
    # Of one dimension: beside a bfloat16 a number of none would be rounded to one.
    cut = torch.tensor([least], device=cosines.device)
    rows, _ = _chosen(~(cosines.amax(1, keepdim=True) < cut))
    near = ~(cosines[torch.from_numpy(rows).to(cosines.device)] < cut)
    if is_dense(int(near.sum()), cosines.numel()):
        return None
    members, columns = _chosen(near)
    return rows[members], columns


def _reaching(values: torch.Tensor, least: torch.Tensor) -> tuple[Rows, Rows]:
    """The rows, ascending, and columns of values, [b, q], that are not below `least`: [q] or [b, q]."""
    # A value that is none is not below either.
    return _by_groups(values, least) or _chosen(~(values < least))


def _by_groups(values: torch.Tensor, least: torch.Tensor) -> tuple[Rows, Rows] | None:
    """As `_reaching`, by looking only into groups of rows whose highest value is not below; None if that is no use."""
    count, width = values.shape
    if least.ndim > 1 or count < _GROUP_ROWS:
        return None
    whole = count // _GROUP_ROWS * _GROUP_ROWS
    # A value that is none makes the highest of its group none.
    highest = values[:whole].reshape(-1, _GROUP_ROWS, width).amax(1)
    groups, columns = _chosen(~(highest < least))
    if len(groups) * _GROUP_WORTH > highest.numel():
        return None
    rows = groups[:, np.newaxis] * _GROUP_ROWS + np.arange(_GROUP_ROWS)
    some, others = torch.from_numpy(rows).to(values.device), torch.from_numpy(columns).to(values.device)[:, None]
    members, inside = _chosen(~(values[some, others] < least[others]))
    rest, rest_columns = _chosen(~(values[whole:] < least))
    places = np.sort(rows[members, inside] * width + columns[members])
    return np.divmod(np.concatenate([places, (whole + rest) * width + rest_columns]), width)


def _at(values: torch.Tensor, rows: Rows, columns: Rows) -> NDArray[np.float64]:
    device = values.device
    chosen: NDArray[np.float64] = (
        values[torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)].double().cpu().numpy()
    )
    return chosen


def _kth(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th largest of each row, [q, b] to [q]; what is no number is not among the large ones."""
    highest = torch.topk(values, k, dim=1).values
    if not (highest[:, 0] < torch.inf).all():
        highest = torch.topk(values.where(values < torch.inf, -torch.inf), k, dim=1).values
    return highest[:, -1]


def _lower_kth(values: torch.Tensor, margin: Margin, k: int) -> torch.Tensor:
    """What k rows reach for certain, of values, [b, q]: float64[q]."""
    if torch.is_tensor(margin.absolute):
        return _kth(margin.lower(values).T.contiguous(), k).double()
    # The least that the truth can be then rises with the value.
    kth: torch.Tensor = margin.lower(_kth(values.T.contiguous(), k).double())
    return kth


def _select(
    batch: Batch, units: torch.Tensor, margin: Margin, pieces: Iterator[_Rows], cuts: NDArray[np.float64]
) -> Candidates:
    """As the numpy way does, on the device and by columns; only what is chosen leaves it."""
    query_norms = torch.from_numpy(batch.norms.T).to(units.device)
    # Squares of norms from anywhere in float32 fit in float64 only.
    dtype = torch.float64 if batch.metric is Metric.euclidean else torch.float32
    # Minus infinity would also let the rows in that are not usable.
    reach = torch.from_numpy(cuts).to(units.device).clamp(min=torch.finfo(dtype).min / 4)
    unknown = bool(np.isneginf(cuts).any())
    found = []
    for rows in pieces:
        norms = rows.norms[:, None]
        # A bfloat16 is compared as the float32 that it is.
        values = _products(rows.features, units)
        if not rows.units:
            values = values.float()
            values /= norms
        if batch.metric is Metric.euclidean:
            values = values_of(batch.metric, values.to(dtype), norms.to(dtype), query_norms)
        here = margin_of(batch.metric, margin, norms.to(dtype), query_norms)
        if not rows.usable.all():
            values[~rows.usable] = -torch.inf
        if unknown and batch.top_k < len(values):
            reach = torch.maximum(reach, _lower_kth(values, here, batch.top_k))
        numbers, queries = _reaching(values, here.least(reach).to(dtype))
        chosen = _at(values, numbers, queries)
        if batch.metric is Metric.euclidean:
            here = Margin(_at(here.absolute, numbers, queries))
        found.append((queries, rows.first + numbers, *here.both(chosen)))
    queries, places, lower, upper = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.argsort(queries, kind="stable")
    return Candidates(queries[order], places[order], lower[order], upper[order])
