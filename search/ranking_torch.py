"""Scans with torch: for CUDA, and for many queries on a CPU with bfloat16 matrix units.

Only candidates come from here. The bounds on their error are those of `search.bounds`, and the decision in float64 is
that of `search.ranking`, on the host, so the answer is the same bit for bit.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.errors import UsageError
from search.bounds import Margin, bfloat16_margin, float32_margin, margin_of, values_of
from search.gallery import Block, Gallery
from search.near_duplicates import Multiply, Pairs
from search.options import Metric, Precision
from search.ranking import Batch, Candidates, default_block_rows, usable_rows

#: Rows that a CPU rounds at once: what comes up on the way, 2.6 MB for d = 1280, stays in its cache.
_CACHED_ROWS = 512


@dataclass(frozen=True)
class _Rows:
    """A block on the device.

    Attributes:
        first: gallery row of its first row.
        features: [b, d]: as they are in float32, or unit rows in bfloat16.
        norms: float32[b], 1 for rows that are not usable.
        usable: bool[b].
        loss: the largest norm of what bfloat16 took from a unit row; 0 in float32.
    """

    first: int
    features: torch.Tensor
    norms: torch.Tensor
    usable: torch.Tensor
    loss: float


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
        staged: bool | None = None,
    ) -> None:
        """Nothing is read before the first batch.

        Args:
            device: `cuda` or `cpu`.
            precision: what is multiplied; sums are at least float32.
            resident: keep the whole gallery on the device between batches.
            staged: go through buffers; by default on CUDA, elsewhere the mapped rows serve as they are.

        Raises:
            UsageError: CUDA was asked for and torch has none that works.
        """
        self._gallery, self._precision, self._resident = gallery, precision, resident
        self._device = torch_device(device)
        self._block_rows = block_rows or default_block_rows(gallery.length)
        self._staged = self._device.type == "cuda" if staged is None else staged
        self._kept: list[_Rows] = []

    def __call__(self, gallery: Gallery, batch: Batch, cuts: NDArray[np.float64]) -> Iterator[Candidates]:
        """One pass; a `search.ranking.Scan`."""
        assert gallery is self._gallery
        units = torch.from_numpy(batch.units).to(self._device)
        query_loss = 0.0
        if self._precision is Precision.bfloat16:
            units, query_loss = _rounded(units)
        for rows in self._blocks():
            yield _select(batch, _cosines(units, rows), self._margin(rows.loss, query_loss), rows, cuts)

    def _margin(self, row_loss: float, query_loss: float) -> Margin:
        if self._precision is Precision.float32:
            return float32_margin(self._gallery.length)
        return bfloat16_margin(self._gallery.length, row_loss, query_loss)

    def _blocks(self) -> Iterator[_Rows]:
        if self._kept:
            yield from self._kept
            return
        made: list[_Rows] = []
        blocks = self._gallery.blocks(self._block_rows)
        for block, features in self._streamed(blocks) if self._staged else self._borrowed(blocks):
            rows = self._prepare(block, features)
            if self._resident:
                made.append(rows)
            yield rows
        # Only a pass that came to its end has all of them.
        self._kept = made

    def _borrowed(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, torch.Tensor]]:
        for block in blocks:
            yield block, _borrow(block.features).to(self._device)

    def _streamed(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, torch.Tensor]]:
        """Each block on the device, while the next one is on its way."""
        cuda = self._device.type == "cuda"
        shape = (self._block_rows, self._gallery.length)
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
        usable = usable_rows(block.norms, block.left_out)
        norms = torch.from_numpy(np.where(usable, block.norms, np.float32(1))).to(self._device)
        mask = torch.from_numpy(usable).to(self._device)
        if self._precision is Precision.float32:
            return _Rows(block.first, features, norms, mask, 0.0)
        rounded, loss = _rounded(features, norms, mask)
        return _Rows(block.first, rounded, norms, mask, loss)


class TorchMultiply(Multiply):
    """Products of tiles with torch, in bfloat16."""

    def __init__(self, device: str) -> None:
        """Only names the device."""
        self._device = torch_device(device)

    def prepare(self, units: NDArray[np.float32]) -> tuple[object, Margin]:
        """Unit rows on the device."""
        rounded, loss = _rounded(torch.from_numpy(units).to(self._device))
        # Both sides are rounded rows; the larger loss of the two counts for both.
        return rounded, bfloat16_margin(units.shape[1], loss, loss)

    def pairs(self, some: object, others: object, least: float) -> Pairs:
        """Pairs of rows whose computed cosine is `least` or more; only they leave the device."""
        a, b = cast(torch.Tensor, some), cast(torch.Tensor, others)
        if 1 in (len(a), len(b)):
            # The routine for a single vector need not sum in float32, that for matrices does.
            a, b = a.float(), b.float()
        with _full_sums():
            cosines = a @ b.T
        # A bfloat16 is compared as the float32 that it is.
        chosen = (cosines.float() >= least).nonzero()
        picked = cosines[chosen[:, 0], chosen[:, 1]].double().cpu().numpy()
        pairs = chosen.cpu().numpy()
        return Pairs(pairs[:, 0], pairs[:, 1], picked)


def free_bytes(device: str) -> int:
    """Free memory of a CUDA device.

    Raises:
        UsageError: torch has no CUDA that works.
    """
    return int(torch.cuda.mem_get_info(torch_device(device))[0])


def torch_device(name: str) -> torch.device:
    """A torch device that works.

    Raises:
        UsageError: CUDA was asked for and torch has none that works.
    """
    if name == "cuda":
        try:
            torch.zeros(1, device="cuda")
        except (RuntimeError, AssertionError) as error:
            raise UsageError(
                f"--device cuda: torch {torch.__version__} has no CUDA device that works "
                f"({str(error).splitlines()[0]}); use --device cpu, or set up with make setup ACCEL=gpu"
            ) from None
    return torch.device(name)


def _borrow(rows: NDArray[np.float32]) -> torch.Tensor:
    with warnings.catch_warnings():
        # Torch warns that a mapped shard is read-only; nothing here writes to it.
        warnings.simplefilter("ignore")
        return torch.from_numpy(rows)


def _rounded(
    rows: torch.Tensor, norms: torch.Tensor | None = None, usable: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """Unit rows in bfloat16, and the largest norm of what the rounding took from one.

    Args:
        rows: float32[b, d].
        norms: float32[b], what to divide them by.
        usable: bool[b]; for the others, which would spoil the loss, 0 is taken.
    """
    unusable = None if usable is None or bool(usable.all()) else ~usable
    rounded = torch.empty(rows.shape, dtype=torch.bfloat16, device=rows.device)
    losses = [torch.zeros((), device=rows.device)]
    at_once = _CACHED_ROWS if rows.device.type == "cpu" else max(1, len(rows))
    for start in range(0, len(rows), at_once):
        some = slice(start, start + at_once)
        part = rows[some] if norms is None else rows[some] / norms[some, None]
        if unusable is not None:
            part[unusable[some]] = 0
        rounded[some] = part
        losses.append(torch.linalg.vector_norm(part - rounded[some], dim=1).max())
    return rounded, float(torch.stack(losses).max())


@contextmanager
def _full_sums() -> Iterator[None]:
    # TensorFloat-32 has 10 bits of mantissa, and sums in bfloat16 have 7: either would break the error bound.
    precision = torch.get_float32_matmul_precision()
    reduced = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced


def _cosines(units: torch.Tensor, rows: _Rows) -> torch.Tensor:
    with _full_sums():
        if len(units) > 1:
            dots = (units @ rows.features.T).float()
        elif units.dtype == torch.float32:
            dots = torch.mv(rows.features, units[0])[None]
        else:
            # The routine for a single vector need not sum in float32, that for matrices does.
            dots = (units.expand(2, -1) @ rows.features.T)[:1].float()
    if rows.features.dtype == torch.float32:
        dots /= rows.norms
    return dots


def _select(batch: Batch, cosines: torch.Tensor, margin: Margin, rows: _Rows, cuts: NDArray[np.float64]) -> Candidates:
    """As the numpy way does, on the device; only what is chosen leaves it."""
    query_norms = torch.from_numpy(batch.norms).to(cosines.device)
    if batch.metric is Metric.euclidean:
        # Squares of norms from anywhere in float32 fit in float64 only.
        cosines = cosines.double()
    values = values_of(batch.metric, cosines, rows.norms, query_norms)
    margin = margin_of(batch.metric, margin, rows.norms.double(), query_norms)
    values[:, ~rows.usable] = -torch.inf
    cut = torch.from_numpy(cuts).to(cosines.device)[:, None]
    # Minus infinity would also let the rows in that are not usable.
    reach = cut.clamp(min=torch.finfo(values.dtype).min / 4)
    if torch.isneginf(cut).any() and batch.top_k < values.shape[1]:
        reach = torch.maximum(reach, torch.topk(margin.lower(values), batch.top_k, dim=1).values[:, -1:].double())
    chosen = (values >= margin.least(reach).to(values.dtype)).nonzero()
    picked = values[chosen[:, 0], chosen[:, 1]].double()
    if batch.metric is Metric.euclidean:
        margin = Margin(margin.absolute[chosen[:, 0], chosen[:, 1]])
    pairs = chosen.cpu().numpy()
    return Candidates(
        pairs[:, 0], rows.first + pairs[:, 1], margin.lower(picked).cpu().numpy(), margin.upper(picked).cpu().numpy()
    )
