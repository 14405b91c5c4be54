"""All pairs of a gallery are compared in a child process of low priority, one at a time: it may take hours."""

import json
import signal
import subprocess
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.children import python_command, start_child
from pipeline.choices import Device
from pipeline.errors import UsageError
from pipeline.logs import clipped
from pipeline.progress import Rate


@dataclass(frozen=True)
class Step:
    """How far a comparison is.

    Attributes:
        done, total: pairs of objects; both 0 until it is known.
        seconds: that are left, as far as can be told.
        failed: why it ended early; None: it did not.
    """

    done: int = 0
    total: int = 0
    seconds: float | None = None
    failed: str | None = None


class _Comparison:
    """One child, and what it said last."""

    def __init__(self, folder: Path, threshold: float, device: Device) -> None:
        self.folder, self.threshold = folder, threshold
        self.step, self.running, self._rate = Step(), True, Rate()
        self._stopped = False
        self._process = start_child(
            python_command("serve.comparer", str(folder), repr(threshold), device.value),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._listening = threading.Thread(target=self._listen, name="comparing", daemon=True)
        self._listening.start()

    def _listen(self) -> None:
        try:
            with self._process as child:
                assert child.stdout is not None and child.stderr is not None
                last_words = deque[bytes](maxlen=1)
                lines = filter(None, map(bytes.strip, child.stderr))
                # Beside the steps: a child whose words nobody takes stands still.
                listening = threading.Thread(target=last_words.extend, args=(lines,), daemon=True)
                listening.start()
                for line in child.stdout:
                    try:
                        self.step = self._step(json.loads(line))
                    except (ValueError, TypeError, KeyError):
                        words = clipped(line.decode(errors="replace").strip())
                        self.step = Step(failed=f"the comparison ended early: it said what cannot be read: {words}")
                        child.kill()
                        break
                listening.join()
            code = child.returncode
            if code != 0 and self.step.failed is None and not self._stopped:
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                why = last_words[0].decode(errors="replace") if last_words else "it may lack memory"
                self.step = Step(failed=f"the comparison ended with {how}: {why}")
        finally:
            self.running = False

    def _step(self, said: dict[str, Any]) -> Step:
        """What the child says of its work."""
        if "error" in said:
            return Step(failed=said["error"])
        done, total = said["done"], said["total"]
        self._rate.add(done)
        return Step(done, total, (total - done) / self._rate.per_s if self._rate.per_s > 0 else None)

    def end(self) -> None:
        """Stop it; what it has compared stays compared."""
        self._stopped = True
        self._process.kill()
        self._listening.join()


class BackgroundComparison:
    """The comparison of a service that runs, or ran last; several threads may use it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._last: _Comparison | None = None

    def start(self, folder: Path, threshold: float) -> None:
        """Begin to compare a gallery, unless that is what is done already.

        Raises:
            UsageError: another comparison is running.
        """
        with self._lock:
            last = self._last
            if last is not None and last.running:
                if (last.folder, last.threshold) == (folder, threshold):
                    return
                raise UsageError(
                    f"the gallery {last.folder.name} is being compared with the threshold {last.threshold:g}: wait "
                    "until that has ended, or stop it"
                )
            self._last = _Comparison(folder, threshold, self._device)

    def stop(self) -> None:
        """End the comparison that runs, if there is one; what it has compared stays compared."""
        with self._lock:
            if self._last is not None and self._last.running:
                self._last.end()
                self._last = None

    def step(self, folder: Path, threshold: float) -> tuple[bool, Step] | None:
        """Whether such a comparison is running, and how far it is or was; None if none was begun."""
        last = self._last
        if last is None or (last.folder, last.threshold) != (folder, threshold):
            return None
        # In this order: what is not running any more has said its last word.
        running = last.running
        return running, last.step
