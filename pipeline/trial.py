"""The trial of a model that nothing was made with yet: a child process has it encode one grey picture.

In a child, because a model can crash or exhaust the process that runs it, and so that enqueuing loads no ONNX Runtime.
"""

import json
import signal
import subprocess

from pipeline.children import python_command, start_child
from pipeline.errors import ModelError
from pipeline.model import Model

#: A model that takes so long for one picture, after it was read, is of no use.
TRIAL_S = 600.0


def prove_model(model: Model) -> str | None:
    """Refuse a model that does not run; what only a GPU or a larger machine can run is left to the first worker.

    Returns:
        Why it could not be tried on this machine; None: it runs.

    Raises:
        ModelError: it does not run, or gives something else than its graph or .toml promises.
    """
    command = python_command("workers.trial", str(model.path))
    with start_child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            said, noise = child.communicate(timeout=TRIAL_S)
        except subprocess.TimeoutExpired:
            raise ModelError(f"the model {model.path} takes longer than {TRIAL_S:g} s for one image") from None
        finally:
            child.kill()
    if child.returncode == -signal.SIGKILL:
        # The kernel's way of ending what takes too much memory.
        return f"the model {model.path} could not be tried here: its process was killed; is there too little memory?"
    try:
        answer = json.loads(said)
    except ValueError:
        raise ModelError(
            f"the model {model.path} ends the process that runs it with {_how(child.returncode, noise)}"
        ) from None
    if "refused" in answer:
        raise ModelError(answer["refused"])
    return f"not tried here: {answer['untried']}" if "untried" in answer else None


def _how(status: int, noise: str) -> str:
    if status < 0:
        return signal.Signals(-status).name
    return f"status {status}: {(noise.strip().splitlines() or ['nothing was said'])[-1]}"
