"""The model's graph with our first nodes: it takes pixels as they are, and scales them in the quickest order.

The arithmetic is that of `workers.encoder.to_input` and of the model, value for value, so that not a bit of a feature
changes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from pipeline.model import Model

#: Name of the input that takes the place of the model's: uint8[b, h, w, c].
PIXELS_INPUT = "ruiji_pixels"
#: A larger model is not copied: where it runs so long, its first nodes do not matter.
_COPIED_BYTES = 500 << 20
_ARITHMETIC = ("Add", "Sub", "Mul", "Div")
_TO_PLANES = [0, 3, 1, 2]


@dataclass(frozen=True)
class _Step:
    """One operation on the pixels.

    Attributes:
        constant: a number, or one for each channel; None for a cast.
        to: ONNX's number of the type that a cast gives.
        constant_first: it is the left operand.
    """

    operator: str
    constant: NDArray[np.float32] | None = None
    constant_first: bool = False
    to: int | None = None


def taking_pixels(model: Model, always: bool) -> bytes | None:
    """The model with `to_input` as its first nodes.

    A model that takes its channels last often scales them before it brings them to the front. Arithmetic with one
    number for each channel is 20 times as slow there, for ONNX Runtime's inner loop is then 3 values long: on
    MobileNetV3 it is a sixth of the whole. So pixels are brought into planes first.

    Args:
        always: even if nothing but the size of the input changes, which pays if it has to cross to a device.

    Returns:
        The ONNX file, or None: the model is taken as it is. So are those with weights outside the file, or too large.
    """
    if model.external or model.path.stat().st_size > _COPIED_BYTES or model.spec.dtype == "uint8":
        return None
    whole = onnx.load_model(model.path)
    graph, spec = whole.graph, model.spec
    steps = [_Step("Cast", to=TensorProto.FLOAT), _Step("Div", np.asarray(spec.divisor, dtype=np.float32))]
    if any(spec.mean):
        steps.append(_Step("Sub", np.asarray(spec.mean, dtype=np.float32)))
    if any(std != 1 for std in spec.std):
        steps.append(_Step("Div", np.asarray(spec.std, dtype=np.float32)))
    if spec.dtype == "float16":
        steps.append(_Step("Cast", to=TensorProto.FLOAT16))
    planes, output = spec.layout == "NCHW", spec.input_name
    if not planes and spec.dtype == "float32" and (found := _scaling_before_planes(graph, output)) is not None:
        nodes, own_steps = found
        steps, planes, output = steps + own_steps, True, nodes[-1].output[0]
        for node in nodes:
            graph.node.remove(node)
        # Constants that nothing uses any more, of which ONNX Runtime would warn.
        spare = {name for node in nodes for name in node.input} - {name for node in graph.node for name in node.input}
        for tensor in [tensor for tensor in graph.initializer if tensor.name in spare]:
            graph.initializer.remove(tensor)
    elif not always:
        return None
    (old,) = [value for value in graph.input if value.name == spec.input_name]
    graph.input.remove(old)
    shape = [model.batch or "n", spec.height, spec.width, spec.channels]
    graph.input.insert(0, helper.make_tensor_value_info(PIXELS_INPUT, TensorProto.UINT8, shape))
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*_nodes(graph, steps, planes, output), *rest])
    return bytes(whole.SerializeToString())


def _scaling_before_planes(graph: Any, name: str) -> tuple[list[NodeProto], list[_Step]] | None:
    """The nodes from an input to its transposition, and what those before that do; None if it is another graph."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants.update((node.output[0], held.t) for held in node.attribute if held.name == "value")
    # An initializer that is also an input can be given another value from outside.
    for value in graph.input:
        constants.pop(value.name, None)
    # The body of a loop or a branch can use any tensor without naming it among its inputs.
    if any(attribute.type == onnx.AttributeProto.GRAPH for node in graph.node for attribute in node.attribute):
        return None
    nodes: list[NodeProto] = []
    steps: list[_Step] = []
    while True:
        users = [node for node in graph.node if name in node.input]
        if len(users) != 1 or users[0].domain or any(name == value.name for value in graph.output):
            return None
        (node,) = users
        nodes.append(node)
        if node.op_type == "Transpose":
            (perm,) = [list(attribute.ints) for attribute in node.attribute] or [[]]
            return (nodes, steps) if perm == _TO_PLANES and steps else None
        if node.op_type not in _ARITHMETIC:
            return None
        constant_first = node.input[1] == name
        constant = constants.get(node.input[0 if constant_first else 1])
        values = None if constant is None else _for_channels(numpy_helper.to_array(constant))
        if values is None:
            return None
        steps.append(_Step(node.op_type, values, constant_first))
        name = node.output[0]


def _for_channels(constant: NDArray[Any]) -> NDArray[np.float32] | None:
    """A constant as one number, or as one for each value of the last of four axes; None if it is neither."""
    if constant.dtype != np.float32 or constant.ndim > 4 or constant.size != (constant.shape or (1,))[-1]:
        return None
    return constant.reshape(-1) if constant.ndim else constant


def _nodes(graph: Any, steps: list[_Step], planes: bool, output: str) -> list[NodeProto]:
    """The steps as nodes from the pixels to `output`, whose constants become the graph's."""
    nodes: list[NodeProto] = []
    name = PIXELS_INPUT
    if planes:
        nodes.append(helper.make_node("Transpose", [name], ["ruiji_planes"], perm=_TO_PLANES))
        name = "ruiji_planes"
    for number, step in enumerate(steps):
        inputs, name = [name], f"ruiji_scaled_{number}"
        attributes = {} if step.to is None else {"to": step.to}
        if step.constant is not None:
            constant = step.constant.reshape(-1, 1, 1) if planes and step.constant.ndim else step.constant
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(constant), f"{name}_by"))
            inputs.insert(0 if step.constant_first else 1, f"{name}_by")
        nodes.append(helper.make_node(step.operator, inputs, [name], **attributes))
    nodes[-1].output[0] = output
    return nodes
