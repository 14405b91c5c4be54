"""Results of benchmarks: figures with their bounds, merged by part into one JSON file, shown as a table."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.store import write_atomic

#: Committed, so that the figures in the documents can be traced.
FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        name: what was measured; unique in its part.
        unit: `x` for ratios.
        rounds: one value a round, in order; never empty.
        at_least, at_most: the bounds, inclusive; None: none.
        judged: whether missing a bound fails the run. Ratios, counts and bytes are judged; absolute
            times and rates belong to a machine and are only reported beside what is expected.
    """

    name: str
    unit: str
    rounds: tuple[float, ...]
    at_least: float | None = None
    at_most: float | None = None
    judged: bool = True

    @property
    def value(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)

    @property
    def bound(self) -> str | None:
        """The bounds in words, e.g. `>= 0.92`."""
        limits = ((">=", self.at_least), ("<=", self.at_most))
        words = [f"{sign} {limit:g}" for sign, limit in limits if limit is not None]
        return " and ".join(words) or None

    @property
    def holds(self) -> bool | None:
        """Whether the value is within its bounds; None without any."""
        if self.bound is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    def as_json(self) -> dict[str, Any]:
        """The entry of the results file."""
        return {
            "name": self.name,
            "value": _rounded(self.value),
            "unit": self.unit,
            "bound": self.bound,
            "judged": self.judged and self.bound is not None,
            "holds": self.holds,
            "rounds": [_rounded(value) for value in self.rounds],
        }


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def nvidia_smi(field: str, *form: str) -> list[str]:
    """What nvidia-smi tells of each GPU; empty if it cannot be asked."""
    query = ["nvidia-smi", f"--query-gpu={field}", f"--format={','.join(['csv', 'noheader', *form])}"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def describe_machine(libraries: Iterable[str]) -> dict[str, Any]:
    """CPU model, usable cores, memory in bytes, GPUs with their drivers, and versions of Python and `libraries`."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    versions = {"python": platform.python_version()}
    for name in sorted(libraries):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **({"gpus": gpus} if (gpus := nvidia_smi("name,driver_version")) else {}),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }


def save(path: Path, part: str, figures: Iterable[Figure], libraries: Iterable[str]) -> None:
    """Replace one part of a results file; the others stay, each with its own date and machine."""
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    parts[part] = {
        "date": date.today().isoformat(),
        "machine": describe_machine(libraries),
        "figures": [figure.as_json() for figure in figures],
    }
    text = json.dumps({"parts": dict(sorted(parts.items()))}, indent=1, ensure_ascii=False) + "\n"
    write_atomic(path, [text.encode()])


def show(title: str, figures: Iterable[Figure]) -> int:
    """Print the figures as a table on stdout; returns the exit code, 1 where a judged one falls short."""
    table = Table("figure", "value", "unit", "bound", "", "rounds", title=title, title_justify="left")
    for column in table.columns[1:2]:
        column.justify = "right"
    failed = False
    for figure in figures:
        short = figure.holds is False
        failed = failed or (short and figure.judged)
        # A reported figure that misses what was expected is told, and fails nothing.
        verdict = ("SHORT" if figure.judged else "missed") if short else "ok" if figure.holds else ""
        bound = figure.bound or "reported"
        rounds = " ".join(f"{value:.4g}" for value in figure.rounds)
        table.add_row(
            figure.name,
            f"{figure.value:.4g}",
            figure.unit,
            bound if figure.judged else f"({bound})",
            verdict,
            rounds,
        )
    Console(width=None if Console().is_terminal else 160).print(table)
    return int(failed)
