"""Models that pass a look at their graph, and then do not run as it promises; all take 8 x 8 RGB."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_WEIGHTS = numpy_helper.from_array(np.random.default_rng(0).normal(size=(192, 12)).astype(np.float32), "w")
_FEATURES = [
    helper.make_node("Flatten", ["inputs:0"], ["flat"], axis=1),
    helper.make_node("MatMul", ["flat", "w"], ["f"]),
]
#: 0 for a grey picture, 1 for any other that is not nearly so.
_MOOD = [
    helper.make_node("Sub", ["inputs:0", "grey"], ["away"]),
    helper.make_node("Abs", ["away"], ["far"]),
    helper.make_node("ReduceMax", ["far"], ["farthest"], keepdims=0),
    helper.make_node("Greater", ["farthest", "tolerance"], ["colourful"]),
    helper.make_node("Cast", ["colourful"], ["mood"], to=TensorProto.INT64),
]
_MOOD_CONSTANTS = [
    numpy_helper.from_array(np.float32(128 / 255), "grey"),
    numpy_helper.from_array(np.float32(0.01), "tolerance"),
]


def odd_model(path: Path, kind: str, batch: int | str = "n") -> Path:
    """Write a model.

    Args:
        batch: of its input and output.
        kind: `longer` promises 16 values and gives 12; `second-input` needs one more; `fails` does so on every run;
            `sometimes-fails`, `sometimes-shorter` and `sometimes-endless` are so on all but grey pictures;
            `other-rank` gives a matrix an image; `no-cpu` has an operation that only GPUs have; `large` takes 3 GB of
            memory; `dynamic` is quantised with a scale that it takes from the whole batch.
    """
    inputs = [helper.make_tensor_value_info("inputs:0", TensorProto.FLOAT, [batch, 8, 8, 3])]
    length: int | str = 12
    nodes, constants, toml = [*_FEATURES], [_WEIGHTS], ""
    node = helper.make_node

    def constant(name: str, value: object) -> None:
        constants.append(numpy_helper.from_array(np.asarray(value), name))

    if kind == "longer":
        length, toml = "d", "[output]\nlength = 16\n"
        nodes.append(node("Identity", ["f"], ["feature_vector"]))
    elif kind == "second-input":
        inputs.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1]))
        toml = '[input]\nname = "inputs:0"\n'
        nodes.append(node("Add", ["f", "other"], ["feature_vector"]))
    elif kind == "fails":
        constant("shape", np.array([1, 13], np.int64))
        length, toml = "d", "[output]\nlength = 12\n"
        nodes.append(node("Reshape", ["f", "shape"], ["feature_vector"]))
    elif kind == "sometimes-fails":
        constant("shape", np.array([1, 12], np.int64))
        length, toml = "d", "[output]\nlength = 12\n"
        nodes += [
            *_MOOD,
            node("Add", ["shape", "mood"], ["wanted"]),
            node("Reshape", ["f", "wanted"], ["feature_vector"]),
        ]
        constants += _MOOD_CONSTANTS
    elif kind == "sometimes-shorter":
        constant("zero", np.array([0], np.int64))
        constant("all", np.array([12], np.int64))
        constant("axis", np.array([1], np.int64))
        length, toml = "d", "[output]\nlength = 12\n"
        nodes += [
            *_MOOD,
            node("Sub", ["all", "mood"], ["end"]),
            node("Slice", ["f", "zero", "end", "axis"], ["feature_vector"]),
        ]
        constants += _MOOD_CONSTANTS
    elif kind == "sometimes-endless":
        constant("zeros", np.zeros((1, 12), np.float32))
        body = helper.make_graph(
            [node("Identity", ["going"], ["go_on"]), node("Identity", ["sum"], ["next_sum"])],
            "body",
            [
                helper.make_tensor_value_info("round", TensorProto.INT64, []),
                helper.make_tensor_value_info("going", TensorProto.BOOL, []),
                helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1, 12]),
            ],
            [
                helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
                helper.make_tensor_value_info("next_sum", TensorProto.FLOAT, [1, 12]),
            ],
        )
        nodes += [
            *_MOOD,
            node("Loop", ["", "colourful", "zeros"], ["nothing"], body=body),
            node("Add", ["f", "nothing"], ["feature_vector"]),
        ]
        constants += _MOOD_CONSTANTS
    elif kind == "other-rank":
        constant("shape", np.array([1, 4, 3], np.int64))
        nodes.append(node("Reshape", ["f", "shape"], ["feature_vector"]))
    elif kind == "no-cpu":
        nodes = [
            nodes[0],
            node("Cast", ["flat"], ["flat16"], to=TensorProto.BFLOAT16),
            node("Cast", ["w"], ["w16"], to=TensorProto.BFLOAT16),
            node("MatMul", ["flat16", "w16"], ["f16"]),
            node("Cast", ["f16"], ["feature_vector"], to=TensorProto.FLOAT),
        ]
    elif kind == "dynamic":
        nodes += [
            node("DynamicQuantizeLinear", ["f"], ["quantised", "scale", "zero"]),
            node("DequantizeLinear", ["quantised", "scale", "zero"], ["feature_vector"]),
        ]
    elif kind == "large":
        constant("one", np.ones((1, 1), np.float32))
        constant("shape", np.array([20000, 20000], np.int64))
        constant("none", np.float32(0))
        nodes += [
            node("Expand", ["one", "shape"], ["big"]),
            node("Exp", ["big"], ["bigger"]),
            node("ReduceMean", ["bigger"], ["mean"], keepdims=0),
            node("Mul", ["mean", "none"], ["nothing"]),
            node("Add", ["f", "nothing"], ["feature_vector"]),
        ]
    else:
        raise ValueError(kind)
    output = helper.make_tensor_value_info("feature_vector", TensorProto.FLOAT, [batch, length])
    graph = helper.make_graph(nodes, "odd", inputs, [output], constants)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    if toml:
        path.with_suffix(".toml").write_text(toml)
    return path
