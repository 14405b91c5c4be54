"""How well the shipped model searches, without the pipeline: ONNX Runtime and numpy only.

Run `python -m examples.digits.evaluate`; it compares with a search by the bare pixels.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from examples.digits.images import load_splits

MODEL = Path(__file__).with_name("digits_embedder.onnx")


@dataclass(frozen=True)
class Retrieval:
    """What a search by cosine gives.

    Attributes:
        rank_1: share of queries whose first hit has their label.
        mean_average_precision: over the full ranking of the gallery, mean of all queries.
    """

    rank_1: float
    mean_average_precision: float


def embed(model: Path, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Features of images.

    Args:
        pixels: uint8[n, 8, 8].

    Returns:
        float32[n, d].
    """
    import onnxruntime as ort

    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    images = pixels[:, np.newaxis].astype(np.float32) / np.float32(255)
    return np.asarray(session.run(["feature_vector"], {"image": images})[0], dtype=np.float32)


def retrieval(
    queries: NDArray[np.float32],
    query_labels: NDArray[np.int64],
    gallery: NDArray[np.float32],
    gallery_labels: NDArray[np.int64],
) -> Retrieval:
    """Rank the gallery for every query by cosine and score the rankings.

    Args:
        queries: float32[q, d].
        query_labels: int64[q].
        gallery: float32[n, d].
        gallery_labels: int64[n].
    """
    order = np.argsort(-(_unit(queries) @ _unit(gallery).T), axis=1, kind="stable")
    same = gallery_labels[order] == query_labels[:, np.newaxis]
    found = np.cumsum(same, axis=1)
    precision = found / np.arange(1, same.shape[1] + 1)
    average = (precision * same).sum(axis=1) / same.sum(axis=1)
    return Retrieval(float(same[:, 0].mean()), float(average.mean()))


def _unit(features: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = features.astype(np.float64)
    return np.asarray(wide / np.linalg.norm(wide, axis=1, keepdims=True))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure the shipped model on the held-out digits.")
    parser.add_argument("--model", type=Path, default=MODEL)
    model: Path = parser.parse_args().model
    splits = load_splits()
    query, gallery = splits["query"], splits["gallery"]
    result = retrieval(embed(model, query.pixels), query.labels, embed(model, gallery.pixels), gallery.labels)
    pixels = retrieval(_flat(query.pixels), query.labels, _flat(gallery.pixels), gallery.labels)
    print(f"this model:       rank-1 {result.rank_1:.4f}, mAP {result.mean_average_precision:.4f}")
    print(f"the pixels alone: rank-1 {pixels.rank_1:.4f}, mAP {pixels.mean_average_precision:.4f}")


def _flat(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    return pixels.reshape(len(pixels), -1).astype(np.float32)


if __name__ == "__main__":
    main()
