"""A small text tower for tests: a real graph, and a tokenizer that is trained here."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["a red car at night", "two blue cats on a sofa", "the beach by day, and the harbour", "rotes Auto, 夜の車"]
#: What `[text]` says of it.
DECLARED = {
    "model": "textual/model.onnx",
    "tokenizer": "textual/tokenizer.json",
    "length": 8,
    "pad_id": 2,
    "reference": "huggingface",
    "clean": "none",
}


def trained_tokenizer() -> Tokenizer:
    """Bytes in pairs, as CLIP's: begin, words, end."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<begin>", "<end>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 0), ("<end>", 1)]
    )
    return tokenizer


def embeddings(length: int = 12) -> np.ndarray:
    """float32[tokens, d]: what each token adds to a feature."""
    return np.random.default_rng(5).normal(size=(400, length)).astype(np.float32)


def text_graph(
    path: Path,
    length: int = 12,
    tokens: int | str = "tokens",
    mask: bool = True,
    kind: int = TensorProto.INT64,
    output: str = "text_embeds",
    scale: float = 1.0,
) -> Path:
    """Write a graph: the sum of what the tokens add, of those of the mask if it has one."""
    inputs = ["input_ids", *(["attention_mask"] if mask else [])]
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["added"])]
    if mask:
        nodes += [
            helper.make_node("Cast", ["attention_mask"], ["kept"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["kept", "last"], ["wide"]),
            helper.make_node("Mul", ["added", "wide"], ["seen"]),
        ]
    nodes.append(helper.make_node("ReduceSum", ["seen" if mask else "added", "first"], [output], keepdims=0))
    graph = helper.make_graph(
        nodes,
        "words",
        [helper.make_tensor_value_info(name, kind, ["n", tokens]) for name in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", length])],
        [
            numpy_helper.from_array(embeddings(length) * np.float32(scale), "table"),
            numpy_helper.from_array(np.array([2], np.int64), "last"),
            numpy_helper.from_array(np.array([1], np.int64), "first"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def with_words(model: Path, /, **changed: object) -> Path:
    """Put a text tower beside a model, and name it in the model's `.toml`; values of None are left out."""
    text_graph(model.parent / "textual" / "model.onnx")
    trained_tokenizer().save(str(model.parent / "textual" / "tokenizer.json"))
    values = {key: value for key, value in (DECLARED | changed).items() if value is not None}
    # Python's quotes are TOML's, for what tests write.
    lines = [f"{key} = {value!r}" for key, value in values.items()]
    toml = model.with_suffix(".toml")
    before = toml.read_text() if toml.exists() else ""
    toml.write_text(before + "\n[text]\n" + "\n".join(lines) + "\n")
    return model
