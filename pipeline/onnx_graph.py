"""What an ONNX file says of itself: its inputs, its outputs and the files of its weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError


@dataclass(frozen=True)
class Tensor:
    """A graph input or output; unknown dimensions are None."""

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        shape = "?" if self.shape is None else ", ".join("?" if n is None else str(n) for n in self.shape)
        return f"{self.name} {self.dtype}[{shape}]"


def load_graph(path: Path) -> Any:
    """An ONNX file's graph, without weights that lie outside of the file.

    Raises:
        ModelError: there is none, it cannot be read, or is no model; a name in it is no text.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ModelError(f"no model at {path}; give an .onnx file, or a name of ruiji model list")
    try:
        # Without the format, it would take the file's ending for one.
        graph = onnx.load_model(path, format="protobuf", load_external_data=False).graph
    except DecodeError:
        graph = None
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
    if graph is None or not graph.output:
        raise ModelError(f"{path} is not an ONNX model")
    # What is not UTF-8 comes as bytes.
    if not all(isinstance(value.name, str) for value in (*graph.input, *graph.output, *graph.initializer)):
        raise ModelError(f"{path} is not an ONNX model: the name of a tensor is not UTF-8")
    return graph


def graph_tensors(graph: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs (without initializers) and outputs of an ONNX graph."""
    import onnx

    constants = {tensor.name for tensor in graph.initializer}

    def tensor(value: Any) -> Tensor:
        kind = value.type.tensor_type
        names = onnx.TensorProto.DataType
        known = kind.elem_type in names.values()
        dtype = names.Name(kind.elem_type).lower() if known else f"of type {kind.elem_type}"
        shape = None
        if kind.HasField("shape"):
            shape = tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim)
        # ONNX calls the 32-bit type just FLOAT.
        return Tensor(value.name, "float32" if dtype == "float" else dtype, shape)

    return [tensor(v) for v in graph.input if v.name not in constants], [tensor(v) for v in graph.output]


def external_files(graph: Any) -> set[str]:
    """Files that hold weights outside the .onnx file, also those of subgraphs (If, Loop, Scan).

    Raises:
        ModelError: a name is none that a file can have.
    """
    import onnx

    names: set[Any] = set()
    pending = [graph]
    while pending:
        current = pending.pop()
        tensors = list(current.initializer)
        for node in current.node:
            for attribute in node.attribute:
                tensors += [attribute.t, *attribute.tensors]
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending += attribute.graphs
        for tensor in tensors:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                names.update(entry.value for entry in tensor.external_data if entry.key == "location")
    # What is not UTF-8 comes as bytes.
    if bad := [name for name in names if not isinstance(name, str) or "\0" in name]:
        raise ModelError(f"the model names {bad[0]!r} as a file of its weights, which no file can be called")
    return names
