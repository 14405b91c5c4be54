"""What a worker is told: by the options of `ruiji worker`, by `ruiji run`, and by a worker for its processes.

One object goes into a child's environment as `RUIJI_…` variables, and comes back from there with every value checked.
"""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import msgspec

from pipeline import layout
from pipeline.choices import Device, LogFormat, Transport
from pipeline.errors import UsageError
from pipeline.settings import SLOTS_PER_DEVICE, STALL_TIMEOUT_S, VISIBILITY_TIMEOUT_S

#: Settings for which no command has an option: tests set their variables.
FOR_TESTS = ("stall_timeout_s", "transport")

_Count = Annotated[int, msgspec.Meta(ge=1)]


@dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """What `ruiji worker` and its processes work with.

    Attributes:
        media_dir, feature_dir, model: as the options of these names.
        redis_url: with its password.
        state_dir: folder of this host, resolved.
        processes: embed processes, on CUDA for each GPU slot; None: the worker's choice.
        threads: CPU threads per process; None: cores / processes.
        batch_images: requests per batch; None: the encoder's choice.
        gpu_memory_mb: limit of ONNX Runtime's arena in one process on CUDA; None: none.
        slots_per_device: slots per GPU.
        window_segments: segments in the queue at once; None: the worker's choice.
        visibility_timeout_s: seconds after which a dead worker's messages go to another.
        stall_timeout_s: seconds without progress before lost tasks are looked for; see `FOR_TESTS`.
        transport: likewise.
        in_hand: the file in which one process notes what it works on; None: nobody reads it.
        gpu: UUID of the GPU that one process is for, which was there when its worker started; None: none.
    """

    media_dir: Path
    feature_dir: Path
    model: Path
    redis_url: str
    state_dir: Path
    device: Device = Device.auto
    processes: _Count | None = None
    threads: _Count | None = None
    batch_images: _Count | None = None
    gpu_memory_mb: _Count | None = None
    slots_per_device: _Count = SLOTS_PER_DEVICE
    window_segments: _Count | None = None
    visibility_timeout_s: _Count = VISIBILITY_TIMEOUT_S
    stall_timeout_s: _Count = STALL_TIMEOUT_S
    transport: Transport = Transport.fast
    log_format: LogFormat = LogFormat.text
    in_hand: Path | None = None
    gpu: str | None = None

    @property
    def folder(self) -> Path:
        """The gallery folder."""
        return layout.gallery_folder(self.feature_dir, self.model)

    def environment(self) -> dict[str, str]:
        """The settings as variables; one that is None has none."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {_variable(name): str(value) for name, value in values if value is not None}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "WorkerSettings":
        """The settings that a parent put into the environment.

        Raises:
            UsageError: a variable is missing, or its value cannot be used.
        """
        found = read_variables(environment, (field.name for field in fields(cls)))
        for field in fields(cls):
            if field.default is MISSING and field.name not in found:
                raise UsageError(f"{_variable(field.name)} is not set")
        return cls(**found)


def read_variables(environment: Mapping[str, str], names: Iterable[str]) -> dict[str, Any]:
    """Those of some settings that the environment has, by name; an empty variable is one that is not set.

    Raises:
        UsageError: the value of one cannot be used.
    """
    found = {}
    types = {field.name: field.type for field in fields(WorkerSettings)}
    for name in names:
        if text := environment.get(_variable(name)):
            try:
                found[name] = msgspec.convert(text, types[name], strict=False, dec_hook=_path)
            except msgspec.ValidationError as error:
                raise UsageError(f"{_variable(name)} is {text!r}, which cannot be used: {error}") from None
    return found


def _path(kind: type, value: Any) -> Any:
    return kind(value)


def _variable(name: str) -> str:
    return f"RUIJI_{name.upper()}"
