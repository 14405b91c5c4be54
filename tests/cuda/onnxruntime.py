"""ONNX Runtime with a pretended CUDA provider, which computes on the CPU and fails when it is told to.

In a folder on `PYTHONPATH` this file stands before the real package, and loads it. `$PRETENDED_CUDA` is a folder. What
stands in its file `create` is raised when a session is made for CUDA, what stands in `run` when such a session runs.
With a file `absent` such a session runs on the CPU without a word, as where a library is missing. In the file `calls`
stands when a session was made.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any


def pretend(ort: Any) -> None:
    """Give the real package the provider."""
    real_session, real_value = ort.InferenceSession, ort.OrtValue.ortvalue_from_numpy

    def told(name: str) -> str:
        try:
            return (Path(os.environ["PRETENDED_CUDA"]) / name).read_text().strip()
        except OSError:
            return ""

    def fail(name: str) -> None:
        if words := told(name):
            raise RuntimeError(words)

    class Binding:
        def __init__(self, binding: Any) -> None:
            self.real = binding

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def bind_output(self, name: str, device: str = "cpu") -> None:
            self.real.bind_output(name, "cpu")

    class Session(real_session):  # type: ignore[misc]
        def __init__(self, model: Any, sess_options: Any = None, providers: Any = None, **rest: Any) -> None:
            wanted = [provider if isinstance(provider, str) else provider[0] for provider in providers or ()]
            self.on_cuda = "CUDAExecutionProvider" in wanted and not told("absent")
            if self.on_cuda:
                assert rest.get("enable_fallback") == 0, "it would go on on the CPU, and tell only stdout"
                with (Path(os.environ["PRETENDED_CUDA"]) / "calls").open("a") as file:
                    file.write("session\n")
                fail("create")
            super().__init__(model, sess_options=sess_options, providers=["CPUExecutionProvider"], **rest)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"] * self.on_cuda + ["CPUExecutionProvider"]

        def io_binding(self) -> Any:
            return Binding(super().io_binding())

        def run_with_iobinding(self, binding: Any, run_options: Any = None) -> None:
            fail("run")
            super().run_with_iobinding(binding.real, run_options)

    ort.InferenceSession = Session
    ort.OrtValue.ortvalue_from_numpy = staticmethod(lambda array, device="cpu", number=0: real_value(array, "cpu", 0))
    ort.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    ort.preload_dlls = lambda: print("Failed to load libcublasLt.so.13")


if __name__ == "onnxruntime":
    _here = os.path.realpath(os.path.dirname(__file__))
    _path = sys.path[:]
    sys.path[:] = [folder for folder in _path if os.path.realpath(folder or ".") != _here]
    del sys.modules["onnxruntime"]
    pretend(importlib.import_module("onnxruntime"))
    sys.path[:] = _path
