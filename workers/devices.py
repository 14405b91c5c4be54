"""GPUs, asked of the NVIDIA driver itself: which there are, and why one cannot be used.

ONNX Runtime's list of providers tells only what it was built with, and what it says of a GPU that does not work goes to
a stream that nobody reads. `python -m workers.devices` prints what `probe` returns, as JSON.
"""

import ctypes
import functools
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec

from pipeline.children import python_command
from pipeline.errors import DeviceFault, RuijiError, UsageError

#: The driver's library.
_LIBRARY = "libcuda.so.1"
#: The architectures that `onnxruntime-gpu` 1.31 has code for, by compute capability. It has no PTX, from which a driver
#: could make code for others. Code for 7.5 and 8.x runs on later minor versions too, that for 9.0 and 12.0 does not.
_FAMILIES = ((7, 5), (8, 0), (8, 6), (8, 9))
_EXACT = ((9, 0), (12, 0))
#: As the driver writes versions: it has to serve CUDA 13.0, for which the libraries are built.
_LEAST_CUDA = 13_000
_LEAST_DRIVER = 580
#: Results of the driver with which nothing will change until somebody repairs the machine: a stub in the library's
#: place, a driver that is too old, no device, no such device, driver and kernel module that differ, a card that an
#: upgraded library does not serve.
_STAY = (34, 35, 100, 101, 803, 804)
_NO_DEVICE = 100
#: Attributes of a device, and a value of the second: no process may use it.
_COMPUTE_MODE, _MAJOR, _MINOR, _PROHIBITED = 20, 75, 76, 2
_EXCLUSIVE = 3
#: A flag of a device's context: who waits for the device sleeps.
_BLOCKING_SYNC = 4
#: Exit code of a worker process whose GPU failed, or could not be had, before the process had done an image. Only its
#: supervisor sees it.
DEVICE_FAILED = 75
#: What may pass is tried again after 1, 2, 4 … at most this many seconds.
LONGEST_PAUSE_S = 300.0
#: A driver that does not answer for so long hangs.
_PROBE_S = 120.0


@dataclass(frozen=True)
class Gpu:
    """One device, or one MIG instance, that can be used.

    Attributes:
        uuid: as `CUDA_VISIBLE_DEVICES` takes it.
        name: of the card.
        capability: its compute capability.
        total_mb: its memory.
        free_mb: what is free of that; None if nobody looked, or if the device does not answer now.
        exclusive: whether it serves one process at a time.
    """

    uuid: str
    name: str
    capability: tuple[int, int]
    total_mb: int
    free_mb: int | None = None
    exclusive: bool = False

    def __str__(self) -> str:
        return f"{self.name} ({self.uuid})"


@dataclass(frozen=True)
class Gpus:
    """What a look at this machine found.

    Attributes:
        usable: in CUDA's order.
        refused: for each other card why it cannot be used.
        problem: why none is usable; empty if one is.
        passes: whether that may be otherwise later.
        built: whether the installed ONNX Runtime has CUDA at all.
    """

    usable: tuple[Gpu, ...] = ()
    refused: tuple[str, ...] = ()
    problem: str = ""
    passes: bool = False
    built: bool = True

    def fault(self) -> RuijiError:
        """The problem, as an error: a DeviceFault if it may pass, else a `NoGpu`."""
        return (DeviceFault if self.passes else NoGpu)(f"no GPU can be used: {self.problem}")


class NoGpu(UsageError):
    """No GPU can be used, until somebody repairs the machine."""


class _CudaError(Exception):
    """The driver refused: its own words, and whether that may pass."""

    def __init__(self, words: str, result: int) -> None:
        super().__init__(words)
        self.result, self.passes = result, result not in _STAY


def probe() -> Gpus:
    """Look at the GPUs and their free memory, in a child process: a driver can crash or hang who asks it."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if len(names) < 2 or not all(name.startswith("MIG-") for name in names):
        return _probe(os.environ)
    # Of several instances of cut cards CUDA shows a process only the first.
    found = [_probe({**os.environ, "CUDA_VISIBLE_DEVICES": name}) for name in names]
    usable = tuple(gpu for one in found for gpu in one.usable)
    refused = tuple(reason for one in found for reason in (one.refused or (one.problem,)) if not one.usable)
    problem = "" if usable else "; ".join(dict.fromkeys(refused))
    return Gpus(usable, refused, problem, any(one.passes for one in found), all(one.built for one in found))


def _probe(environment: Mapping[str, str]) -> Gpus:
    try:
        command = python_command("workers.devices")
        child = subprocess.run(command, capture_output=True, timeout=_PROBE_S, env=environment)
        return msgspec.json.decode(child.stdout.rpartition(b"\n")[2], type=Gpus)
    except subprocess.TimeoutExpired:
        return Gpus(problem=f"the NVIDIA driver does not answer within {_PROBE_S:g} s", passes=True)
    except msgspec.DecodeError:
        said = (child.stderr.decode(errors="replace").strip().splitlines() or ["nothing was said"])[-1]
        problem = f"the look for GPUs ended with status {child.returncode}: {said}"
        return Gpus(problem=problem, passes=True)


def look(memory: bool = False) -> Gpus:
    """Look at the GPUs from this process; see `probe`.

    Args:
        memory: ask for what is free too, which takes a moment and a context on each device.
    """
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        problem = "this ONNX Runtime was built without CUDA; make clean setup ACCEL=gpu installs the one with it"
        return Gpus(problem=problem, built=False)
    try:
        driver = _driver()
    except OSError as error:
        return Gpus(problem=f"there is no NVIDIA driver here ({error}); containers need NVIDIA's container toolkit")
    try:
        version = ctypes.c_int()
        _check(driver, driver.cuDriverGetVersion(ctypes.byref(version)))
        if version.value < _LEAST_CUDA:
            served = f"{version.value // 1000}.{version.value % 1000 // 10}"
            needed = f"ONNX Runtime needs {_LEAST_CUDA // 1000}.0: install driver {_LEAST_DRIVER} or later"
            return Gpus(problem=f"the NVIDIA driver serves CUDA up to {served}, and {needed}")
        _check(driver, driver.cuInit(0))
        count = ctypes.c_int()
        _check(driver, driver.cuDeviceGetCount(ctypes.byref(count)))
        if not count.value:
            _check(driver, _NO_DEVICE)
        found = [_device(driver, number, memory) for number in range(count.value)]
    except _CudaError as error:
        return Gpus(problem=f"the NVIDIA driver says {error}{_shown(error)}", passes=error.passes)
    usable = tuple(gpu for gpu in found if isinstance(gpu, Gpu))
    refused = tuple(reason for reason in found if isinstance(reason, str))
    return Gpus(usable, refused, "" if usable else "; ".join(refused))


def _shown(error: _CudaError) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f" (CUDA_VISIBLE_DEVICES is {visible!r})" if error.result == _NO_DEVICE and visible is not None else ""


def sleep_while_waiting() -> None:
    """Let this process sleep while it waits for its first device; else CUDA may spin on a core until a batch is done.

    To be called after `look` found a device, and before anything is computed there.

    Raises:
        DeviceFault: the driver refuses.
    """
    driver, device = _driver(), ctypes.c_int()
    try:
        _check(driver, driver.cuDeviceGet(ctypes.byref(device), 0))
        _check(driver, driver.cuDevicePrimaryCtxSetFlags_v2(device, _BLOCKING_SYNC))
    except _CudaError as error:
        raise DeviceFault(f"the NVIDIA driver says {error}") from None


@functools.cache
def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(name)


def _driver() -> ctypes.CDLL:
    return _library(_LIBRARY)


def _check(driver: ctypes.CDLL, result: int) -> None:
    if result:
        words = []
        for told in (driver.cuGetErrorName, driver.cuGetErrorString):
            text = ctypes.c_char_p()
            told(result, ctypes.byref(text))
            words.append(text.value.decode() if text.value else f"error {result}")
        raise _CudaError(": ".join(dict.fromkeys(words)), result)


def _device(driver: ctypes.CDLL, number: int, memory: bool) -> Gpu | str:
    """A device that can be used, or why it cannot."""
    device, uuid = ctypes.c_int(), ctypes.create_string_buffer(16)
    name, total = ctypes.create_string_buffer(256), ctypes.c_size_t()
    _check(driver, driver.cuDeviceGet(ctypes.byref(device), number))
    _check(driver, driver.cuDeviceGetName(name, len(name), device))
    # Of the instance where the device is cut into several.
    _check(driver, driver.cuDeviceGetUuid_v2(uuid, device))
    _check(driver, driver.cuDeviceTotalMem_v2(ctypes.byref(total), device))
    card = name.value.decode(errors="replace")
    capability = _attribute(driver, _MAJOR, device), _attribute(driver, _MINOR, device)
    mode = _attribute(driver, _COMPUTE_MODE, device)
    kind, digits = "MIG" if "MIG" in card.split() else "GPU", uuid.raw.hex()
    cuts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    gpu = Gpu(f"{kind}-{'-'.join(cuts)}", card, capability, total.value >> 20, exclusive=mode == _EXCLUSIVE)
    if not has_code(capability):
        served = ", ".join(f"{major}.{minor}" for major, minor in (*_FAMILIES, *_EXACT))
        major, minor = capability
        return f"{gpu} has compute capability {major}.{minor}; this ONNX Runtime has code for {served} only"
    if mode == _PROHIBITED:
        return f"{gpu} is closed to all processes: nvidia-smi -c DEFAULT opens it"
    return replace(gpu, free_mb=_free_mb(driver, device)) if memory else gpu


def has_code(capability: tuple[int, int]) -> bool:
    """Whether ONNX Runtime's code runs on cards of a compute capability."""
    major, minor = capability
    return capability in _EXACT or any(major == family and minor >= least for family, least in _FAMILIES)


def _attribute(driver: ctypes.CDLL, attribute: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _check(driver, driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
    return value.value


def _free_mb(driver: ctypes.CDLL, device: ctypes.c_int) -> int | None:
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    try:
        _check(driver, driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        _check(driver, driver.cuCtxSetCurrent(context))
        _check(driver, driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)))
    except _CudaError:
        # Busy or ill for now. Its processes find out, and say why.
        return None
    finally:
        if context:
            driver.cuDevicePrimaryCtxRelease_v2(device)
    return free.value >> 20


if __name__ == "__main__":
    print(msgspec.json.encode(look(memory=True)).decode(), end="")
