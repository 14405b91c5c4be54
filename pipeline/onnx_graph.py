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


def load_onnx(path: Path) -> Any:
    """An ONNX file's `ModelProto`, without weights that lie outside of the file.

    Raises:
        ModelError: there is none, it cannot be read, or is no model; a name in it is no text.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not path.is_file():
        raise ModelError(f"no model at {path}; give an .onnx file, or a name of ruiji model list")
    try:
        # Without the format, it would take the file's ending for one.
        model = onnx.load_model(path, format="protobuf", load_external_data=False)
    except DecodeError:
        model = None
    except OSError as error:
        raise ModelError(f"cannot read the model {path}: {error.strerror}") from None
    if model is None or not model.graph.output:
        raise ModelError(f"{path} is not an ONNX model")
    graph = model.graph
    # What is not UTF-8 comes as bytes.
    if not all(isinstance(value.name, str) for value in (*graph.input, *graph.output, *graph.initializer)):
        raise ModelError(f"{path} is not an ONNX model: the name of a tensor is not UTF-8")
    return model


def graph_tensors(model: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs (without initializers) and outputs of an ONNX model's graph."""
    import onnx

    graph = model.graph
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


def external_files(model: Any) -> set[str]:
    """Files that hold weights outside the .onnx file, wherever in it they are named.

    That is among the graph's weights, dense and sparse, in its nodes, and in those of subgraphs and functions.

    Raises:
        ModelError: a name is none that a file can have.
    """
    import onnx
    from google.protobuf.message import Message

    names: set[Any] = set()
    pending = [model]
    while pending:
        current = pending.pop()
        if isinstance(current, onnx.TensorProto):
            if current.data_location == onnx.TensorProto.EXTERNAL:
                names.update(entry.value for entry in current.external_data if entry.key == "location")
            continue
        for field, value in current.ListFields():
            if field.message_type is not None:
                pending += [value] if isinstance(value, Message) else value
    # What is not UTF-8 comes as bytes.
    if bad := [name for name in names if not isinstance(name, str) or "\0" in name]:
        raise ModelError(f"the model names {bad[0]!r} as a file of its weights, which no file can be called")
    return names
