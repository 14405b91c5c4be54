"""The model as a function: pixels in, features out, through one ONNX Runtime session."""

import ctypes
import io
import logging
import re
import threading
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeline.choices import Device
from pipeline.errors import CannotRunHere, DeviceFault, MachineFault, ModelError, RuijiError, RunFailed, UsageError
from pipeline.model import Model
from pipeline.spec import POOLINGS, ModelSpec
from workers import devices

logger = logging.getLogger(__name__)

#: Requests that are worth fusing on a CPU, where the model runs them one by one all the same: they share the cost of
#: the queue, and at some 10 ms per image a batch is done soon.
CPU_BATCH_IMAGES = 64
#: Padded batches of one size keep CUDA's arena and its choice of kernels fixed.
CUDA_BATCH_IMAGES = 64
#: A picture's value at the trial: grey, as any picture may be.
_GREY = 128
#: How far a feature may move, of its largest value, if the other pictures of its batch are others. Scales that int8
#: graphs take from the whole batch move it by some per cent. Other kernels do not look at them. But on a GPU some add
#: up in another order each time, which in float16 shows in the fourth digit.
_MOVED = 1e-3
#: What ONNX Runtime says where the machine failed and not the model; its classes of exceptions do not tell.
_MACHINE = re.compile(
    r"bad.?alloc|failed to allocate|out of memory|\bCU[A-Z_]+ failure|CUDA error|cudaError"
    r"|smaller than requested bytes|failed to find a free memory block",
    re.IGNORECASE,
)
#: What CUDA says of a card or a driver that this build is not for; it says so whenever it is asked.
_NO_CODE = re.compile(r"no kernel image is available|driver version is insufficient", re.IGNORECASE)
#: The severity from which ONNX Runtime writes to stderr: its errors come as exceptions, and are told once.
_FATAL = 4
#: Of what ONNX Runtime says, so much of its beginning and of its end is repeated: between them is its own source, and
#: before an error of CUDA. Of that so much is repeated before and after.
_SAID, _BEFORE = 160, 40


class Encoder:
    """One ONNX Runtime session, made once per process.

    Attributes:
        model: what is computed.
        device: what the session really uses, as it reports it.
        batch_images: how many images are worth collecting before `encode` is called.
        run_images: how many of them one run of the session computes.
        turn: to be held while `encode` is called, which one thread may do at a time.
    """

    def __init__(
        self,
        model: Model,
        device: Device = Device.auto,
        threads: int = 1,
        batch_images: int | None = None,
        gpu_memory_mb: int | None = None,
        many: bool = True,
    ) -> None:
        """Load the model.

        Args:
            device: `cuda` refuses to start without one; `auto` takes CUDA where it works, and logs its choice.
            threads: of one run on the CPU.
            batch_images: images per batch; by default 64.
            gpu_memory_mb: limit of the session's arena on CUDA; None: what the device has.
            many: make the graph quicker first, which takes as long as a hundred images save.

        Raises:
            UsageError: `cuda` was asked for, and there is none that can be used.
            ModelError: ONNX Runtime refuses the model; `CannotRunHere` if only this device does.
            MachineFault: the memory does not suffice; `DeviceFault`: the GPU failed, and another process may have it.
        """
        self.model = model
        self.turn = threading.Lock()
        bound = _on_cuda(model, device, model.batch or batch_images or CUDA_BATCH_IMAGES, gpu_memory_mb)
        self._bound = bound
        self.device = Device.cpu if bound is None else Device.cuda
        self.batch_images = batch_images or model.batch or (CUDA_BATCH_IMAGES if bound else CPU_BATCH_IMAGES)
        # One image a run on the CPU: the fastest there, and the bits of a feature cannot depend on its
        # company. CUDA, and a graph that fixes its batch, get one padded shape.
        self.run_images = model.batch or (self.batch_images if bound else 1)
        self._session = bound.session if bound is not None else _session(model, threads, None, many)
        self._pixels_input = _pixels_input(self._session, model.spec)
        self._constants = _constants(self._session, model.spec)

    def prove(self) -> None:
        """Encode one grey picture: a model that cannot do that cannot do anything, here or, mostly, anywhere.

        Raises:
            ModelError, MachineFault: as `encode`; `DeviceFault` on a GPU, which has run the model when it was loaded.
                `ModelError` too if the graph fixes a batch in which the feature of a picture depends on the others.
        """
        spec = self.model.spec
        try:
            with self.turn:
                self.encode(np.full((1, spec.height, spec.width, spec.channels), _GREY, dtype=np.uint8))
                # A GPU's session was looked at when it was made.
                if self._bound is None and (moved := _moved(self._run, spec, self.run_images)) > _MOVED:
                    raise ModelError(
                        f"{_depends(self.model, moved)}; export it with an open batch, or a batch of 1: those are "
                        "computed one image at a time"
                    )
        except RunFailed as error:
            if self.device is Device.cuda:
                raise DeviceFault(f"the GPU runs the model no longer: {error}") from error
            raise

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute features.

        Args:
            pixels: uint8[b, h, w, c], b >= 1, as `load_pixels` makes them.

        Returns:
            float32[b, d], raw model output, rows in the order given.

        Raises:
            MachineFault: the device failed, for instance because its memory is full.
            ModelError: the model does not give what it declares; `RunFailed` if it gives nothing.
        """
        parts = [self._run(pixels[i : i + self.run_images]) for i in range(0, len(pixels), self.run_images)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = len(pixels)
        if count < self.run_images:
            padding = np.zeros((self.run_images - count, *pixels.shape[1:]), dtype=np.uint8)
            pixels = np.concatenate([pixels, padding])
        spec = self.model.spec
        try:
            if self._bound is not None:
                output = self._bound.run(pixels)
            else:
                values = pixels if self._pixels_input else to_input(pixels, spec)
                fed = {self._pixels_input or spec.input_name: values, **self._constants}
                (output,) = self._session.run([spec.output_name], fed)
        except Exception as error:  # ONNX Runtime has no common base class for what it raises.
            raise _fault(self.model, self.device, error) from error
        pooled = pool(output, spec) if isinstance(output, np.ndarray) and output.dtype.kind in "fiu" else None
        if pooled is None or pooled.shape != (len(pixels), spec.length):
            given = f"{output.dtype}{list(output.shape)}" if isinstance(output, np.ndarray) else type(output).__name__
            promised = POOLINGS[spec.pooling].replace("n", str(len(pixels)), 1).replace("d", str(spec.length), 1)
            raise ModelError(
                f"the model {self.model.path} gives {given} for {len(pixels)} image(s), its graph or .toml promises "
                f"float32{promised}; correct [output] length in its .toml, or the graph"
            )
        return pooled[:count]


def _moved(run: Callable[[NDArray[np.uint8]], Any], spec: ModelSpec, images: int) -> float:
    """How far the first row of a batch moves, of its largest value, if the other pictures become white.

    Args:
        run: from uint8[images, h, w, c] to the output.
    """
    pixels = np.zeros((images, spec.height, spec.width, spec.channels), dtype=np.uint8)
    # Dark, so that white ones widen what a scale of the whole batch has to hold.
    pixels[0] = np.resize(np.arange(61, dtype=np.uint8), pixels.shape[1:])
    rows = []
    for company in (0, 255) if images > 1 else ():
        pixels[1:] = company
        output = run(pixels)
        if isinstance(output, np.ndarray) and output.ndim > 1:
            rows.append(np.array(output[0], dtype=np.float64))
    # What gives anything else, or no finite numbers, is told of where its features are taken.
    if len(rows) < 2 or rows[0].shape != rows[1].shape or not np.isfinite(rows).all() or not np.any(rows):
        return 0.0
    return float(np.abs(rows[0] - rows[1]).max() / np.abs(rows).max())


def _depends(model: Model, moved: float) -> str:
    return (
        f"the model {model.path} gives a picture another feature if the other pictures of its batch are others (by "
        f"{moved:.2%} of the largest value), as graphs do that are quantised dynamically"
    )


def _fault(model: Model, device: Device, error: Exception) -> RuijiError:
    """What an exception of ONNX Runtime means, in one line."""
    if isinstance(error, RuijiError):
        return error
    # In all of it: what CUDA says stands behind a signature of some hundred characters.
    no_code, machine, kind = _NO_CODE.search(str(error)), _MACHINE.search(str(error)), type(error).__name__
    said = _said(error, no_code or machine)
    if device is Device.cuda and no_code:
        return UsageError(f"this GPU cannot run the model: {said}")
    if isinstance(error, MemoryError) or kind == "NoSuchFile" or machine:
        return (DeviceFault if device is Device.cuda else MachineFault)(f"the model failed on {device}: {said}")
    if kind == "NotImplemented":
        return CannotRunHere(f"the model {model.path} cannot run on {device}: {said}")
    return RunFailed(f"the model {model.path} does not run: {said}")


def _said(error: Exception, what: re.Match[str] | None = None) -> str:
    """What an exception says, in one line.

    Args:
        what: the part of it that matters.
    """
    whole = str(error)
    words = " ".join(whole.split()).removeprefix("[ONNXRuntimeError] : ") or type(error).__name__
    if len(words) <= 2 * _SAID:
        return words
    if what is None:
        return f"{words[:_SAID]} … {words[-_SAID:]}"
    start = max(0, what.start() - _BEFORE)
    return f"… {' '.join(whole[start : what.end() + 2 * _SAID].split())} …"


def pool(output: NDArray[Any], spec: ModelSpec) -> NDArray[np.float32] | None:
    """One vector per image of what the graph gives; see `ModelSpec.pooling`.

    Means are taken in float64, so that they are the same on every device.

    Returns:
        float32[b, d]; None: the output has not the shape that the pooling takes, or no token is left for a mean.
    """
    if spec.pooling == "none":
        flat = output.ndim == 2 or (output.ndim == 4 and output.shape[2:] == (1, 1))
        pooled = output.reshape(len(output), -1) if flat else None
    elif spec.pooling == "map-mean":
        pooled = output.mean(axis=(2, 3), dtype=np.float64) if output.ndim == 4 and output.size else None
    elif output.ndim != 3 or output.shape[1] <= spec.skip_tokens:
        pooled = None
    elif spec.pooling == "cls":
        pooled = output[:, 0]
    else:
        pooled = output[:, spec.skip_tokens :].mean(axis=1, dtype=np.float64)
    return None if pooled is None else np.ascontiguousarray(pooled, dtype=np.float32)


def measured_length(path: Path, spec: ModelSpec, batch: int) -> int:
    """How many values a graph gives for one grey picture, by a run on the CPU.

    Args:
        spec: of the graph, but for the length.
        batch: how many pictures it takes.

    Raises:
        ModelError: it does not run, or gives no vector per picture.
    """
    model = Model(path, spec, batch, "", (), None)
    session = _session(model, 1, None, many=False)
    grey = np.full((batch, spec.height, spec.width, spec.channels), _GREY, dtype=np.uint8)
    try:
        fed = {spec.input_name: to_input(grey, spec), **_constants(session, spec)}
        (output,) = session.run([spec.output_name], fed)
    except Exception as error:  # ONNX Runtime has no common base class for what it raises.
        raise _fault(model, Device.cpu, error) from error
    pooled = pool(output, spec)
    if pooled is None:
        raise ModelError(f"the model {path} gives {output.dtype}{list(output.shape)}, which is no vector per picture")
    return int(pooled.shape[1])


def to_input(pixels: NDArray[np.uint8], spec: ModelSpec) -> NDArray[Any]:
    """Scale a batch of pixels and bring it into the model's layout and dtype.

    Args:
        pixels: uint8[b, h, w, c].

    Returns:
        [b, h, w, c] or [b, c, h, w] of the spec's dtype; for the article's spec exactly `pixels / 255`. float16 is
        rounded from float32, and uint8 is not scaled.
    """
    if spec.dtype == "uint8":
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) if spec.layout == "NCHW" else pixels
    values = pixels.astype(np.float32)
    values /= np.float32(spec.divisor)
    if any(spec.mean):
        values -= np.asarray(spec.mean, dtype=np.float32)
    if any(std != 1 for std in spec.std):
        values /= np.asarray(spec.std, dtype=np.float32)
    if spec.layout == "NCHW":
        values = np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    return values.astype(spec.dtype, copy=False)


class BoundSession:
    """A session whose input stays in the device's memory; runs batches of one size.

    Attributes:
        session: the session.
    """

    def __init__(self, session: ort.InferenceSession, model: Model, run_images: int, device: str) -> None:
        """Allocate the input, and run once, so that kernels are chosen before work is taken.

        Args:
            session: of `taking_pixels(model)`, or of the model itself where that cannot be had.
            device: of ONNX Runtime's memory, `cuda` or `cpu`.
        """
        spec = model.spec
        self.session, self._spec = session, spec
        self._binding = session.io_binding()
        self._pixels_input = _pixels_input(session, spec)
        pixels = np.zeros((run_images, spec.height, spec.width, spec.channels), dtype=np.uint8)
        self._input = ort.OrtValue.ortvalue_from_numpy(self._values(pixels), device, 0)
        self._binding.bind_ortvalue_input(self._pixels_input or spec.input_name, self._input)
        for name, value in _constants(session, spec).items():
            self._binding.bind_cpu_input(name, value)
        self._binding.bind_output(spec.output_name, device)
        self.run(pixels)

    def _values(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        return pixels if self._pixels_input else to_input(pixels, self._spec)

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute uint8[b, h, w, c], b as bound, to the model's output on the host."""
        self._input.update_inplace(self._values(pixels))
        self.session.run_with_iobinding(self._binding)
        output: NDArray[np.float32] = self._binding.copy_outputs_to_cpu()[0]
        return output


def _pixels_input(session: ort.InferenceSession, spec: ModelSpec) -> str | None:
    """The name of the input that `taking_pixels` gave a graph; None if it takes what `to_input` makes of pixels."""
    names = [str(value.name) for value in session.get_inputs()]
    return None if spec.input_name in names else names[0]


def _constants(session: ort.InferenceSession, spec: ModelSpec) -> dict[str, NDArray[Any]]:
    """The values of the graph's other inputs, in their dtypes."""
    types = {value.name: str(value.type).removeprefix("tensor(").removesuffix(")") for value in session.get_inputs()}
    numpy_names = {"float": "float32", "double": "float64"}
    return {
        name: np.asarray(value, dtype=numpy_names.get(types[name], types[name]))
        for name, value in (spec.constants or {}).items()
    }


def _on_cuda(model: Model, device: Device, run_images: int, gpu_memory_mb: int | None) -> BoundSession | None:
    """A session on the first GPU that has run once; None if the CPU is to run the model.

    Raises:
        UsageError, ModelError, DeviceFault: as `Encoder`, where `cuda` was asked for.
    """
    found = devices.look() if device != Device.cpu else None
    if found is None or (device == Device.auto and not found.built):
        return None
    try:
        if not found.usable:
            raise found.fault()
        return _cuda_session(model, run_images, gpu_memory_mb)
    except RuijiError as error:
        if device == Device.cuda:
            raise
        # Whatever it is: where the model is at fault, the CPU will say so.
        logger.warning("%s; the CPU runs the model", error, extra={"event": "gpu_refused"})
        return None


def _cuda_session(model: Model, run_images: int, gpu_memory_mb: int | None) -> BoundSession:
    devices.sleep_while_waiting()
    # Finds the CUDA libraries that came with torch. What is missing it tells stdout, which is for answers, and ONNX
    # Runtime tells stderr in colours; it is told below.
    with redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    ort.set_default_logger_severity(_FATAL)
    try:
        session = _session(model, 1, _cuda_options(gpu_memory_mb))
        if session.get_providers()[0] != "CUDAExecutionProvider":
            raise UsageError(
                f"ONNX Runtime cannot load its CUDA provider: {_why_not_loaded()}. CUDA's libraries come with torch: "
                "make clean setup ACCEL=gpu"
            )
        try:
            bound = BoundSession(session, model, run_images, Device.cuda)
            moved = _moved(bound.run, model.spec, run_images)
        except Exception as error:  # ONNX Runtime has no common base class for what it raises.
            raise _fault(model, Device.cuda, error) from error
        if moved > _MOVED:
            raise UsageError(f"{_depends(model, moved)}; the CPU computes it one image at a time: take --device cpu")
        return bound
    except ModelError as error:
        # A CPU has run it, or nobody could try it: what this GPU says ends no other worker.
        raise UsageError(f"this GPU cannot run the model: {error}") from error
    except DeviceFault as error:
        if gpu_memory_mb is None:
            raise
        limit = f"its arena may take {gpu_memory_mb} MB here (RUIJI_GPU_MEMORY_MB)"
        raise DeviceFault(f"{error}; {limit}") from error


def _why_not_loaded() -> str:
    """What the linker says of the provider's library, which ONNX Runtime tells only its log."""
    library = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as error:
        return str(error)
    return "it does not say why"


def _cuda_options(gpu_memory_mb: int | None) -> dict[str, str]:
    options = {
        # The arena grows by what is asked for, not to the next power of two: batches have one size.
        "arena_extend_strategy": "kSameAsRequested",
        # No kernel is tried out: the word chooses cuDNN's heuristic B, and `HEURISTIC` chooses A.
        # Which is faster was not measured yet.
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        # TensorFloat-32 has 10 bits of mantissa; features of CPU and GPU workers stand in one gallery. If cuDNN has no
        # other kernel, ONNX Runtime takes it all the same: a test on golden features and `ruiji doctor` would show it.
        "use_tf32": "0",
    }
    return options | ({"gpu_mem_limit": str(gpu_memory_mb << 20)} if gpu_memory_mb else {})


def _session(model: Model, threads: int, cuda: dict[str, str] | None, many: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL
    source: str | bytes | None = None
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    if cuda is not None:
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    if cuda is not None or many:
        # Loads the reader of graphs, which a search for one picture has no use for.
        from workers.graph import taking_pixels

        # To a device a quarter of the bytes then crosses.
        source = taking_pixels(model, always=cuda is not None)
    try:
        # Else it goes on on the CPU where a session cannot be made or fails, and says so on stdout alone.
        return ort.InferenceSession(
            source or str(model.path), sess_options=options, providers=providers, enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime has no common base class for what it raises.
        fault = _fault(model, Device.cuda if cuda is not None else Device.cpu, error)
        if isinstance(fault, RunFailed):
            fault = ModelError(f"ONNX Runtime refuses the model {model.path}: {_said(error)}")
        raise fault from error
