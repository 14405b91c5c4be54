"""What `make demo` runs: the real command line on real images, from files to a ranking.

    python -m examples.digits.demo [--output demo-output] [--serve]

Everything that it makes lies in the output folder; from an earlier run only what that run made is replaced.
Exit codes: 0 the demo is good, 1 a step failed or rank-1 is below 0.95, 2 the output folder holds something else,
130 interrupted.
"""

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from examples.digits.images import write_images

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = Path(__file__).resolve().with_name("digits_embedder.onnx")
#: The model has 0.995; a pipeline that mixes up rows, pixels or ids falls far below this.
LOWEST_RANK_1 = 0.95
SHARD_ROWS = 250
NEIGHBOURS = 10
SHEET_QUERIES = 8
#: Says that a folder is the demo's, so that no other folder is ever emptied.
_MARKER = ".ruiji-demo"
_MADE_HERE = ("media", "features", "state", "sheet.png")
_RUIJI = [sys.executable, "-P", "-m", "pipeline"]


class DemoError(Exception):
    """The demo cannot go on; `exit_code` says whose fault it is."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Answers:
    """The rankings of all queries, with the labels looked up.

    Attributes:
        truth: query → its own label.
        found: query → labels of its hits, best first.
    """

    truth: dict[str, str]
    found: dict[str, list[str]]

    @property
    def missed(self) -> list[str]:
        """Queries whose best hit shows another digit."""
        return [query for query, label in self.truth.items() if self.found[query][0] != label]

    @property
    def rank_1(self) -> float:
        """Share of queries whose best hit shows the same digit."""
        return 1 - len(self.missed) / len(self.truth)


def demo(output: Path, serve: bool = False) -> None:
    """Run all steps.

    Args:
        serve: show the gallery in a browser at the end, until Ctrl-C.

    Raises:
        DemoError: a step failed, or the search is not good enough.
    """
    started = time.perf_counter()
    prepare_folder(output)
    shown = os.path.relpath(output)

    say(1, f"Write scikit-learn's 1,797 handwritten digits as PNG files into {shown}/media.")
    counts = write_images(output / "media")
    print(
        f"   {counts['gallery']} are the gallery and {counts['query']} the queries; the model was trained on neither."
    )
    print(f"   The other {counts['train']} trained it and are not used here. objects.txt lists the gallery.")

    model = os.path.relpath(MODEL, output)
    gallery = ["--feature-dir", "features", "--model", model, "--media-dir", "media"]
    say(2, f"Turn the gallery into shards of {SHARD_ROWS} rows: a Redis, two workers and one task per image.")
    print(f"   (From here on the commands are as typed in {shown}/, with .venv/bin on the PATH.)")
    run = ["run", "--media-dir", "media", "--feature-dir", "features", "--model", model]
    ruiji(output, [*run, "--shard-rows", str(SHARD_ROWS), "--workers", "2"])
    shards = sorted((output / "features" / MODEL.stem).glob("*.features.npy"))
    print(f"   {len(shards)} shards in {shown}/features/{MODEL.stem}: {shards[0].name} to {shards[-1].name}")

    labels, queries = read_labels(output / "media" / "labels.csv")
    say(3, f"Search with all {len(queries)} queries at once and see whether the best hit shows the same digit.")
    search = ["search", *gallery, "-k", str(NEIGHBOURS)]
    answers = judge(ruiji(output, [*search, "--format", "jsonl", *queries], shorten=len(queries)), labels, queries)
    hits = len(queries) - len(answers.missed)
    print(f"   rank-1 {answers.rank_1:.3f} ({hits} of {len(queries)})")

    query = next(q for q in queries if q not in answers.missed)
    say(4, f"One ranking: a {answers.truth[query]} that the model never saw, and the {NEIGHBOURS} most similar.")
    print(ruiji(output, [*search, "--format", "table", query]), end="")
    print(f"   These show: {' '.join(answers.found[query])}")

    say(5, f"A contact sheet of {SHEET_QUERIES} queries" + (", with what went wrong first." if answers.missed else "."))
    chosen = choose(answers)
    sheet = ["--sheet", "sheet.png", "--labels", "media/labels.csv"]
    ruiji(output, [*search, *sheet, "--format", "jsonl", *chosen], shorten=len(chosen))
    print(f"   Look at it: {output / 'sheet.png'} (green: the same digit, red: another)")

    if answers.rank_1 < LOWEST_RANK_1:
        raise DemoError(
            f"rank-1 {answers.rank_1:.3f} is below {LOWEST_RANK_1}: something between file and rank is broken"
        )
    service = ["serve", *gallery, "--labels", "media/labels.csv"]
    print(f"\nAll good, {time.perf_counter() - started:.0f} s.", end=" ")
    if serve:
        print("Look through the gallery in a browser:", flush=True)
        become_service(output, service)
    print("With your own photos:")
    print("   ruiji run --media-dir PHOTOS --feature-dir FEATURES --model MODEL.onnx")
    print("Look through this gallery in a browser:  make demo SERVE=1,  or")
    print(f"   cd {shown} && ruiji {shlex.join(service)}")


def prepare_folder(output: Path) -> None:
    """Make the output folder, or take away what an earlier demo left in it.

    Raises:
        DemoError: the folder has files and is not a demo's.
    """
    marker = output / _MARKER
    if output.exists() and not marker.exists() and (not output.is_dir() or any(output.iterdir())):
        raise DemoError(f"{output} holds something else; give another folder with --output", exit_code=2)
    output.mkdir(parents=True, exist_ok=True)
    marker.touch()
    for name in _MADE_HERE:
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def say(number: int, text: str) -> None:
    """One numbered step."""
    print(f"\n{number}. {text}", flush=True)


def ruiji(folder: Path, arguments: Sequence[str], shorten: int = 0) -> str:
    """Run one command as a user in `folder` would, and show it.

    Args:
        shorten: how many of the last arguments are left out of what is shown, but for the first.

    Returns:
        Its stdout; stderr goes where ours goes.

    Raises:
        DemoError: it did not exit with 0.
    """
    shown = shlex.join(arguments[: len(arguments) - shorten + 1] if shorten else arguments)
    print(f"   $ ruiji {shown}" + (f" … ({shorten} files)" if shorten else ""), flush=True)
    done = subprocess.run(
        [*_RUIJI, *arguments],
        check=False,
        cwd=folder,
        env=_environment(folder),
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        raise DemoError(f"ruiji {arguments[0]} ended with exit code {done.returncode}; the lines above say why")
    return done.stdout


def become_service(folder: Path, service: Sequence[str]) -> NoReturn:
    """Run `ruiji serve` in place of this process, so that Ctrl-C is the service's alone and lets it end in order.

    At any free port: somebody else may be at the usual one.
    """
    os.chdir(folder)
    os.execve(sys.executable, [*_RUIJI, *service, "--port", "0"], _environment(folder))


def _environment(folder: Path) -> dict[str, str]:
    # The demo shows the same on every machine: settings of other work (RUIJI_… or a .env where make runs)
    # stay out of it, and so does the user's state folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RUIJI_")}
    environment["RUIJI_STATE_DIR"] = str(folder / "state")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), environment.get("PYTHONPATH")]))
    return environment


def read_labels(path: Path) -> tuple[dict[str, str], list[str]]:
    """What every file shows, and the queries.

    Returns:
        Path relative to the media folder → label; and the queries' paths relative to the output folder, in file order.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = {row["img_path"]: row["label"] for row in rows}
    return labels, [f"media/{row['img_path']}" for row in rows if row["data_type"] == "query"]


def judge(jsonl: str, labels: dict[str, str], queries: Sequence[str]) -> Answers:
    """Put labels on the rankings.

    Args:
        jsonl: what `ruiji search --format jsonl` prints: one hit a line.

    Raises:
        DemoError: a query has no full ranking.
    """
    ranked: dict[str, dict[int, str]] = {query: {} for query in queries}
    for line in jsonl.splitlines():
        hit = json.loads(line)
        ranked[hit["query"]][hit["rank"]] = labels[hit["path"]]
    for query, hits in ranked.items():
        if sorted(hits) != list(range(1, NEIGHBOURS + 1)):
            raise DemoError(f"the search gave ranks {sorted(hits)} for {query}, expected 1 to {NEIGHBOURS}")
    return Answers(
        truth={query: labels[query.removeprefix("media/")] for query in queries},
        found={query: [hits[rank] for rank in sorted(hits)] for query, hits in ranked.items()},
    )


def choose(answers: Answers) -> list[str]:
    """Queries for the contact sheet: at most two that went wrong, then one of each digit."""
    chosen = answers.missed[:2]
    seen = {answers.truth[query] for query in chosen}
    for query, label in answers.truth.items():
        if label not in seen:
            chosen.append(query)
            seen.add(label)
    return chosen[:SHEET_QUERIES]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="ruiji on handwritten digits, from files to a ranking.")
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="[default: demo-output]")
    parser.add_argument("--serve", action="store_true", help="then show the gallery in a browser, until Ctrl-C")
    arguments = parser.parse_args()
    try:
        demo(arguments.output.absolute(), arguments.serve)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted; run it again to start afresh", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
