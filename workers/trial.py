"""Whether a model runs: one grey picture, encoded before anything is made of the model or any image is taken.

`python -m workers.trial MODEL` writes one line of JSON to stdout: `{}` if it runs; `refused`: why it cannot;
`untried`: why this machine cannot tell. `pipeline.trial` starts it, by name: the arrows between the packages point the
other way.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import redis

from pipeline.choices import Device
from pipeline.errors import CannotRunHere, DeviceFault, GalleryMismatch, MachineFault, ModelError, UsageError
from pipeline.gallery import GalleryInfo
from pipeline.model import Model, load_model, pixels_of, why_another
from pipeline.trial import TRIAL_S
from workers.permanent import stop_unless_begun
from workers.suspects.in_hand import InHand

if TYPE_CHECKING:
    from workers.encoder import Encoder

logger = logging.getLogger(__name__)

#: How long a process waits for a model file that is away, or for memory or a device that its model needs.
MODEL_WAIT_S = 60.0


class _NoModel(ModelError):
    """The file is not what it was: away, or half copied."""


def proven_encoder(
    model_path: Path,
    folder: Path,
    gallery: GalleryInfo,
    client: redis.Redis,
    hand: InHand,
    make: "Callable[[Model], Encoder]",
    patience_s: float = MODEL_WAIT_S,
) -> "Encoder":
    """A worker's encoder, which has encoded a grey picture: what goes wrong until then is no image's fault.

    A model that does not run ends the open plan too, unless another worker has done any of it.

    Args:
        hand: told of the trial, in case this process dies of it.
        make: an encoder of a model.
        patience_s: how long a model file that is away, or a machine that fails, is waited for.

    Raises:
        GalleryMismatch: the gallery belongs to another model.
        ModelError: the file cannot be used, or the model does not run.
        SystemExit: the model does not run, and the plan was stopped for it.
        UsageError: there is no such device, or this machine cannot run the model.
        DeviceFault: the GPU fails now.
    """
    told, until = "", time.monotonic() + patience_s
    while True:
        try:
            with hand.trial(TRIAL_S):
                return _on_trial(model_path, folder, gallery, make)
        except DeviceFault:
            # Only another process may find the device working again.
            raise
        except MachineFault as error:
            if time.monotonic() >= until:
                raise UsageError(
                    f"this machine cannot run the model: {error}. Give it more memory, run fewer processes, or take "
                    "another --device"
                ) from error
            why = str(error)
        except _NoModel as error:
            if time.monotonic() >= until:
                raise
            why = str(error)
        except ModelError as error:
            if stop_unless_begun(folder, client, gallery, str(error)):
                # The reason is told: by this process, or by another before it.
                raise SystemExit(error.exit_code) from error
            raise
        if why != told:
            extra = {"event": "waiting_for_model"}
            logger.warning("%s; waiting up to %g s for what is missing", why, patience_s, extra=extra)
            told = why
        time.sleep(1)


def _on_trial(model_path: Path, folder: Path, gallery: GalleryInfo, make: "Callable[[Model], Encoder]") -> "Encoder":
    try:
        model = load_model(model_path, pixels_of(gallery.contract))
    except ModelError as error:
        raise _NoModel(str(error)) from error
    if model.fingerprint != gallery.fingerprint:
        raise GalleryMismatch(
            f"{folder} belongs to the model {gallery.fingerprint[:12]}, this worker has {model.fingerprint[:12]}: "
            f"{why_another(model, gallery.contract)}"
        )
    encoder = make(model)
    encoder.prove()
    return encoder


def _main() -> None:
    from workers.encoder import Encoder

    answer: dict[str, str] = {}
    try:
        Encoder(load_model(Path(sys.argv[1])), Device.cpu, threads=len(os.sched_getaffinity(0)), many=False).prove()
    except (CannotRunHere, MachineFault) as error:
        answer["untried"] = str(error)
    except ModelError as error:
        answer["refused"] = str(error)
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
