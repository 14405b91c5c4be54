"""The settings of workers: through an environment and back."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from pipeline.choices import Device, LogFormat, Transport
from pipeline.errors import UsageError
from pipeline.worker_settings import WorkerSettings, read_variables

LEAST = WorkerSettings(
    media_dir=Path("/photos"),
    feature_dir=Path("/features"),
    model=Path("/models/m.onnx"),
    redis_url="redis://:a%2Fb@host:6379/0",
    state_dir=Path("/state"),
)
MOST = replace(
    LEAST,
    device=Device.cuda,
    processes=3,
    threads=4,
    batch_images=5,
    gpu_memory_mb=6,
    slots_per_device=7,
    window_segments=8,
    visibility_timeout_s=9,
    stall_timeout_s=10,
    transport=Transport.stock,
    log_format=LogFormat.json,
    in_hand=Path("/state/in-hand/x"),
    gpu="GPU-aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa",
)


@pytest.mark.parametrize("settings", [LEAST, MOST])
def test_settings_come_back_from_an_environment_as_they_went(settings: WorkerSettings) -> None:
    back = WorkerSettings.from_environment({"PATH": "/bin", **settings.environment()})
    assert back == settings
    assert [type(getattr(back, field.name)) for field in fields(back)] == [
        type(getattr(settings, field.name)) for field in fields(settings)
    ]


def test_every_setting_was_changed_on_the_way() -> None:
    named = ("media_dir", "feature_dir", "model", "redis_url", "state_dir")
    assert all(getattr(MOST, field.name) != field.default for field in fields(MOST) if field.name not in named)


def test_the_gallery_folder_follows_from_the_model() -> None:
    assert LEAST.folder == Path("/features/m")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RUIJI_THREADS", "0"),
        ("RUIJI_THREADS", "two"),
        ("RUIJI_BATCH_IMAGES", "1.5"),
        ("RUIJI_DEVICE", "gpu"),
        ("RUIJI_TRANSPORT", "slow"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(variable: str, value: str) -> None:
    with pytest.raises(UsageError, match=f"{variable} is '{value}'"):
        WorkerSettings.from_environment({**LEAST.environment(), variable: value})


def test_a_variable_that_is_missing_or_empty_is_named() -> None:
    environment = LEAST.environment()
    with pytest.raises(UsageError, match="RUIJI_MODEL is not set"):
        WorkerSettings.from_environment({**environment, "RUIJI_MODEL": ""})
    del environment["RUIJI_REDIS_URL"]
    with pytest.raises(UsageError, match="RUIJI_REDIS_URL is not set"):
        WorkerSettings.from_environment(environment)


def test_what_no_option_sets_is_read_alone() -> None:
    found = read_variables({"RUIJI_STALL_TIMEOUT_S": "4", "RUIJI_THREADS": "2"}, ("stall_timeout_s", "transport"))
    assert found == {"stall_timeout_s": 4}
