"""Every error that ruiji raises on purpose, and the exit code that each one means.

Exit codes, the same for every command: 0 done, 1 error, 2 usage or bad input, 3 finished but some
objects or queries failed (or a run is not finished), 4 data on disk inconsistent or made by another
model, 5 nothing found where that was asked to be a failure, 130 interrupted.
"""

from typing import ClassVar

from pipeline.choices import Reason

EXIT_INCOMPLETE = 3
EXIT_EMPTY = 5
EXIT_INTERRUPTED = 130


class RuijiError(Exception):
    """Something went wrong; the message says what, with the values, and what to do next."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str = "", *details: object) -> None:
        super().__init__(message or " ".join((type(self).__doc__ or "").split()), *details)

    def __str__(self) -> str:
        return str(self.args[0])


class UsageError(RuijiError):
    """An option, a setting or a file that was given is wrong."""

    exit_code = 2


class ObjectListError(UsageError):
    """The object list has a line that cannot be used; the message names the line."""


class ModelError(UsageError):
    """The model file is missing, cannot be read, or does not fit the model contract."""


class GraphError(ModelError):
    """The graph fits no `.toml`: only another export of the model helps."""


class CannotRunHere(ModelError):
    """This device cannot compute one of the model's operations; another may."""


class RunFailed(ModelError):
    """ONNX Runtime refuses to compute these pixels with this model, and would again."""


class QueryError(UsageError):
    """A query cannot be searched with: not an image, or of another length than the gallery."""


class UnknownObject(QueryError):
    """The gallery has no object of this id."""


class NoShards(UsageError):
    """The gallery has no shard yet: nothing is there to be searched."""


class GalleryMismatch(RuijiError):
    """The feature folder belongs to another model, or its parts contradict each other."""

    exit_code = 4


class FileDamaged(GalleryMismatch):
    """One of our own files is not as it must be."""


class PlanMismatch(RuijiError):
    """Another plan is open in this feature folder."""

    exit_code = 4


class ShardCorrupt(RuijiError):
    """A shard's bytes differ from its record."""

    exit_code = 4


class BrokerUnavailable(RuijiError):
    """Redis cannot be reached."""


class MachineFault(RuijiError):
    """The machine, not the object, is at fault: media folder gone, disk full, I/O error, device lost.

    The only class for which work is given back to the queue: it may succeed unchanged later.
    """


class DeviceFault(MachineFault):
    """A GPU failed or is lost: only another process may find it working again."""


class ImageError(RuijiError):
    """One object cannot be embedded, and it is the object's own fault.

    Args:
        message: our own words, free of host names, times and foreign exception texts, because
            it ends in a shard's record.
        reason: its class; `docs/format.md` explains each.
        attempts: how often it was tried; for the log.
    """

    def __init__(self, message: str = "", reason: Reason = Reason.undecodable, attempts: int = 1) -> None:
        super().__init__(message, reason)
        self.attempts = attempts

    @property
    def reason(self) -> Reason:
        """The reason class."""
        return Reason(self.args[1])
