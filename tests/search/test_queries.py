"""Pictures as queries: the encoder is made for as many as come."""

from pathlib import Path

import pytest

from pipeline.choices import Device
from pipeline.model import load_model
from search.queries import load_encoder, query_encoder
from tests.search.galleries import in_memory
from tests.search.ranking.test_rank import features_of


@pytest.mark.parametrize(("pictures", "at_once"), [(1, 1), (3, 3), (64, 64), (1000, 64)])
def test_a_search_by_few_pictures_computes_no_more_than_they_are(model_path: Path, pictures: int, at_once: int) -> None:
    gallery = in_memory(features_of("random", 3, load_model(model_path).spec.length))
    _, encoder = query_encoder(model_path, gallery, Device.cpu, pictures)
    # On CUDA that is the size of every run, which is filled up to it.
    assert encoder.result().batch_images == at_once
    assert load_encoder(load_model(model_path), Device.cpu).result().batch_images == 64
