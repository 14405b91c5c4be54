"""From a torch module to an ONNX file with chosen names, and the proof that both compute the same.

Made with the exporter that torch 2.13 calls "dynamo"; it needs onnxscript.
"""

import logging
import os
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from pipeline.errors import ModelError

#: Written by every ONNX Runtime since 1.14, read by all later ones.
OPSET = 18
#: How far one value of a feature may be off.
TOLERANCE = 1e-4
#: Weights of more bytes are a file of their own: protobuf, and so one ONNX file, ends at 2 GiB.
ONE_FILE_BYTES = 1 << 30


class ExportError(ModelError):
    """The exported file is not what the module was."""


class Scaled(nn.Module):  # type: ignore[misc]
    """A module that takes plain RGB: float32[b, h, w, 3] in [0, 1] to float32[b, d].

    `module` takes float32[b, 3, h, w], scaled as `(rgb - mean) / std`.
    """

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.module = module
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, rgb: torch.Tensor) -> torch.Tensor:
        """Scale, bring into NCHW, embed."""
        return self.module(((rgb - self.mean) / self.std).permute(0, 3, 1, 2))


def export(module: nn.Module, shape: tuple[int, ...], path: Path, names: tuple[str, str]) -> float:
    """Write a module as an ONNX file, and compare the file with it, on random batches of 1 and 3.

    Args:
        module: float32[b, *shape] in [0, 1) to float32[b, d].
        names: of the graph's input and output.

    Returns:
        The largest absolute difference between ONNX Runtime and torch.

    Raises:
        ExportError: it is above `TOLERANCE`, see `check_export`; `path` is as it was.
    """
    # Of its own generator: the caller's random numbers stay as they were.
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(count, *shape, generator=generator) for count in (1, 3)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp-export-") as folder:
        unproven = Path(folder, path.name)
        # Traced with 2 and checked with others: a batch dimension that got fixed on the way shows.
        example = torch.rand(2, *shape, generator=generator)
        export_onnx(module, example, unproven, input_name=names[0], output_name=names[1])
        difference = check_export(module, unproven, batches)
        # The graph comes last: it names the file of its weights.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file == unproven):
            os.replace(file, path.with_name(file.name))
    return difference


def export_onnx(
    module: torch.nn.Module, example: torch.Tensor, path: Path, *, input_name: str, output_name: str
) -> None:
    """Export a module as a graph whose first dimension, the batch, is open.

    The same module gives the same bytes: what the exporter notes about this machine (source
    paths, stack traces) is taken out. Weights of more than `ONE_FILE_BYTES` lie beside it, in `NAME.onnx.data`.

    Args:
        module: one tensor in, float32[b, d] out.
        example: [2 or more, …], an input to trace with.
        input_name, output_name: names in the graph; any text, also such as `inputs:0`.
    """
    module.eval()
    # It warns of every operator of torchvision that it does without; nothing here comes from there.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # The exporter uses what torch itself has deprecated; nothing that a caller could change.
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["feature"],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )
    assert program is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    program.save(path, external_data=sum(weight.nbytes for weight in module.state_dict().values()) > ONE_FILE_BYTES)
    model = onnx.load_model(path, load_external_data=False)
    # The exporter takes its names for identifiers of a program; ONNX itself allows any text.
    _rename(model.graph, {model.graph.input[0].name: input_name, model.graph.output[0].name: output_name})
    _strip(model)
    path.write_bytes(model.SerializeToString(deterministic=True))
    # By its path: a model with weights beside it does not fit into memory's protobuf.
    onnx.checker.check_model(str(path), full_check=True)


def check_export(
    module: torch.nn.Module, path: Path, batches: Iterable[torch.Tensor], *, tolerance: float = TOLERANCE
) -> float:
    """Compare a file with the module that it was made from.

    Args:
        batches: float32 inputs, for instance of several batch sizes.
        tolerance: how far one value may be off: absolute, and of the largest one if that is above 1.

    Returns:
        The largest absolute difference seen.

    Raises:
        ExportError: a shape is another, a value is not finite, or a difference is above the tolerance.
    """
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (source,), (target,) = session.get_inputs(), session.get_outputs()
    worst = 0.0
    module.eval()
    for batch in batches:
        with torch.inference_mode():
            expected: NDArray[np.float32] = module(batch).numpy()
        found = np.asarray(session.run([target.name], {source.name: batch.numpy()})[0])
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise ExportError(
                f"the exported graph gives {found.dtype}{list(found.shape)}, torch gives "
                f"{expected.dtype}{list(expected.shape)}"
            )
        difference = float(np.abs(found - expected).max())
        allowed = tolerance * max(1.0, float(np.abs(expected).max()))
        # Written so that a NaN, which compares as false, is refused too.
        if not difference <= allowed:
            raise ExportError(
                f"the exported graph differs from torch by {difference:.3g} in a batch of {len(batch)}; allowed are "
                f"{allowed:.3g}"
            )
        worst = max(worst, difference)
    return worst


def _rename(graph: Any, names: dict[str, str]) -> None:
    for value in [*graph.input, *graph.output, *graph.value_info]:
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]


def _strip(model: Any) -> None:
    """Remove notes for debugging from a model: they name files of the machine that exported it."""
    graph = model.graph
    for part in [model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        part.ClearField("doc_string")
        part.ClearField("metadata_props")
    del graph.value_info[:]
