"""The model as a function: pixels in, features out, through one ONNX Runtime session."""

import logging

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from pipeline.errors import MachineFault, ModelError, UsageError
from pipeline.model import Model
from workers.images import to_input

logger = logging.getLogger(__name__)

#: Padded batches of one size keep CUDA's arena and its choice of kernels fixed.
CUDA_BATCH_IMAGES = 64


class Encoder:
    """One ONNX Runtime session, made once per process and used by one thread at a time.

    Attributes:
        model: what is computed.
        device: `cpu` or `cuda`: what the session really uses, as it reports it.
        batch_images: how many images are worth collecting for one call of `encode`.
    """

    def __init__(self, model: Model, device: str = "auto", threads: int = 1, batch_images: int | None = None) -> None:
        """Load the model.

        Args:
            device: `cuda` refuses to start without one; `auto` takes CUDA where it works, and logs its choice.
            threads: of one run on the CPU.
            batch_images: images a batch; by default 1 on the CPU and 64 on CUDA.

        Raises:
            UsageError: `cuda` was asked for and the session runs on the CPU.
            ModelError: ONNX Runtime refuses the model.
        """
        self.model = model
        self._session = _session(model, device, threads)
        providers = self._session.get_providers()
        self.device = "cuda" if providers and providers[0] == "CUDAExecutionProvider" else "cpu"
        if device == "cuda" and self.device != "cuda":
            raise UsageError(
                f"--device cuda: ONNX Runtime offers {', '.join(providers)}, not CUDA. Set up with "
                "`make setup ACCEL=gpu` on a machine with an NVIDIA driver, or use --device cpu"
            )
        self.batch_images = batch_images or model.batch or (CUDA_BATCH_IMAGES if self.device == "cuda" else 1)
        # One image a run on the CPU: the fastest there, and the bits of a feature cannot depend on its
        # company. CUDA, and a graph that fixes its batch, get one padded shape.
        self._run_images = model.batch or (self.batch_images if self.device == "cuda" else 1)

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Compute features.

        Args:
            pixels: uint8[b, h, w, c], b >= 1, as `load_pixels` makes them.

        Returns:
            float32[b, d], raw model output, rows in the order given.

        Raises:
            MachineFault: the device failed, for instance because its memory is full.
        """
        parts = [self._run(pixels[i : i + self._run_images]) for i in range(0, len(pixels), self._run_images)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        count = len(pixels)
        if count < self._run_images:
            padding = np.zeros((self._run_images - count, *pixels.shape[1:]), dtype=np.uint8)
            pixels = np.concatenate([pixels, padding])
        spec = self.model.spec
        try:
            (output,) = self._session.run([spec.output_name], {spec.input_name: to_input(pixels, spec)})
        except Exception as error:  # ONNX Runtime has no common base class for what it raises.
            raise MachineFault(f"the model failed on {self.device}: {error}") from error
        features = np.asarray(output, dtype=np.float32).reshape(len(pixels), -1)[:count]
        if features.shape[1] != spec.length:
            raise ModelError(
                f"{self.model.path} gave {features.shape[1]} values an image, its graph or .toml promises {spec.length}"
            )
        return features


def _session(model: Model, device: str, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    providers = ["CPUExecutionProvider"]
    if device != "cpu" and "CUDAExecutionProvider" in ort.get_available_providers():
        # Finds the CUDA libraries that came with torch.
        ort.preload_dlls()
        providers.insert(0, "CUDAExecutionProvider")
    try:
        return ort.InferenceSession(str(model.path), sess_options=options, providers=providers)
    except Exception as error:  # ONNX Runtime has no common base class for what it raises.
        raise ModelError(f"ONNX Runtime refuses the model {model.path}: {error}") from error
