"""The tree of errors: messages, exit codes, and survival of a trip between processes."""

import pickle

import pytest

from pipeline import errors
from pipeline.errors import ImageError, RuijiError

CLASSES = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, RuijiError)]


@pytest.mark.parametrize("cls", CLASSES)
def test_every_error_has_a_message_an_exit_code_and_survives_pickling(cls: type[RuijiError]) -> None:
    assert str(cls())
    assert cls.exit_code in (1, 2, 4)
    again = pickle.loads(pickle.dumps(cls("what happened")))
    assert (type(again), str(again)) == (cls, "what happened")


def test_an_image_error_keeps_its_reason() -> None:
    assert pickle.loads(pickle.dumps(ImageError("gone", "missing"))).reason == "missing"
