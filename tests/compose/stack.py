"""One installation in a clone of its own, driven with `make` and `docker compose` as its user would."""

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pipeline.plans.files import open_plan
from pipeline.status import StatusReader
from tests.conftest import ROOT
from tests.factories import wait_until


def clone(target: Path) -> None:
    """What `git clone` would bring, with this working tree's changes."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


class Stack:
    """A clone, its `.env` and the containers that it starts."""

    def __init__(self, folder: Path, project: str, media: Path, features: Path, model: Path) -> None:
        self.folder, self.media, self.features, self.model = folder, media, features, model
        clone(folder)
        compose = folder / "docker-compose.yml"
        # What no user sets, so that no container gets it.
        passed = "    RUIJI_STALL_TIMEOUT_S:\n    RUIJI_LOG_FORMAT:\n"
        compose.write_text(compose.read_text().replace("    RUIJI_LOG_FORMAT:\n", passed, 1))
        self.settings = {
            "RUIJI_MEDIA_DIR": str(media),
            "RUIJI_FEATURE_DIR": str(features),
            "MODEL_DIR": str(model.parent),
            "RUIJI_MODEL": f"${{MODEL_DIR}}/{model.name}",
            "COMPOSE_PROJECT_NAME": project,
        }
        self.set()

    def set(self, **settings: str) -> None:
        """Add lines to `.env`."""
        self.settings |= settings
        (self.folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in self.settings.items()))

    @property
    def gallery(self) -> Path:
        """The gallery folder."""
        return self.features / self.model.stem

    def run(self, *command: str, code: int | None = 0, timeout_s: float = 300) -> "subprocess.CompletedProcess[str]":
        """Run a command in the clone, and check its exit code."""
        ours = ("MAKE", "MFLAGS", "RUIJI_", "COMPOSE_", "REDIS_", "CONTAINER_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout_s
        )
        assert code is None or done.returncode == code, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def make(self, *arguments: str, code: int | None = 0) -> "subprocess.CompletedProcess[str]":
        """`make …`"""
        return self.run("make", *arguments, code=code)

    def compose(self, *arguments: str, code: int | None = 0) -> str:
        """`docker compose …`, with the files that `make up` took; returns stdout."""
        command = '[ ! -e .up/with ] || . ./.up/with; exec docker compose "$@"'
        return self.run("sh", "-c", command, "sh", *arguments, code=code).stdout

    def status(self) -> dict[str, Any]:
        """What `make status` says."""
        answer = self.make("-s", "status", "ARGS=--json", code=None)
        found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
        return found

    def embedded(self, total: int) -> dict[str, int]:
        """How many of a finished run's images each container says that it embedded, once all have told."""

        def told() -> dict[str, int]:
            return {
                worker["host"]: worker["images"] for worker in self.status()["workers"] if worker["role"] == "embed"
            }

        # Each tells every two seconds what it has done: the run may be at its end before the last have.
        wait_until(lambda: sum(told().values()) == total, what=f"all {total} images in the workers' reports")
        return told()

    def containers(self, service: str) -> list[dict[str, Any]]:
        """`docker inspect` of a service's running containers."""
        ids = self.compose("ps", "-q", service).split()
        found: list[dict[str, Any]] = json.loads(self.run("docker", "inspect", *ids).stdout) if ids else []
        return found

    def running(self) -> bool:
        """Whether a plan is open; only a look at the folder, so that it can be asked often."""
        return open_plan(self.gallery) is not None

    def wait_for_progress(self) -> None:
        """Wait until a few more objects are done than now; the run may not be over by then."""
        reader = StatusReader(self.gallery, None)
        before = reader.read().done
        wait_until(lambda: reader.read().done > before + 5, what="progress", timeout_s=120)
        assert self.running(), "there is still something to disturb"

    def shard_digests(self) -> dict[str, str]:
        """sha256 of every file of every shard, records included, by name."""
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.gallery.iterdir())
            if path.is_file() and path.name[:4].isdigit()
        }

    def remove(self) -> None:
        """Stop everything; its Redis too is lost."""
        self.compose(
            "--profile",
            "cli",
            "--profile",
            "serve",
            "down",
            "--volumes",
            "--remove-orphans",
            "--timeout",
            "20",
            code=None,
        )
