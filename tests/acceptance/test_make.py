"""The make targets that work with containers too, without an engine; `tests/compose` has what needs a real one."""

import json
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.queue.embedded import free_port
from tests.compose.stack import Stack
from tests.conftest import ROOT
from tests.factories import pictures, wait_until


@pytest.fixture
def stack(tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stack]:
    """A clone whose virtual environment is filled already, where no Docker engine answers."""
    if not (ROOT / ".venv" / "bin" / "ruiji").exists():
        pytest.skip("needs the .venv that make fills")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    pictures(tmp_path / "media", 12)
    (tmp_path / "media" / "objects.txt").unlink()
    stack = Stack(tmp_path / "ruiji", "none", tmp_path / "media", tmp_path / "features", model_path)
    (stack.folder / ".venv").symlink_to(ROOT / ".venv")
    stack.set(RUIJI_STATE_DIR=str(tmp_path / "state"))
    yield stack
    stack.make("down")


def test_without_an_engine_the_same_targets_work_on_this_machine_and_say_so(stack: Stack) -> None:
    assert "nothing is up here" in stack.make("scale", "WORKERS=2", code=2).stderr
    up = stack.make("up", "WORKERS=1").stderr
    assert "on this machine" in up and "1 embed processes" in up
    stack.make("list")
    assert "12 done, 0 failed" in stack.make("enqueue", "ARGS=--wait").stderr
    assert stack.status()["done"] == 12
    query = sorted(stack.media.rglob("*.png"))[3]
    answer = stack.make("-s", "search", f"QUERY={query}", "ARGS=-k 1 --format paths")
    assert answer.stdout.splitlines() == [str(query)] and "on this machine" in answer.stderr
    assert "2 embed processes" in stack.make("scale", "WORKERS=2").stderr
    assert "on this machine" in stack.make("down").stderr
    assert not (stack.folder / ".up").exists() and not (stack.folder.parent / "state" / "redis.url").exists()


def test_the_service_comes_up_before_there_is_a_gallery_and_goes_with_down(stack: Stack) -> None:
    port = free_port()
    stack.set(RUIJI_WEB_PORT=str(port))
    said = stack.make("up", "WORKERS=1", "SERVE=1").stderr
    assert f"the page: http://127.0.0.1:{port}\n" in said

    def health() -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=60) as answer:
            return json.load(answer)

    assert health()["coming"] == ["tiny"]
    stack.make("list")
    stack.make("enqueue", "ARGS=--wait")
    wait_until(lambda: [one["objects"] for one in health()["galleries"]] == [12], what="the gallery")
    pid = (stack.folder / ".up" / "serve.pid").read_text()
    stack.make("up", "WORKERS=1", "SERVE=1")
    assert (stack.folder / ".up" / "serve.pid").read_text() == pid
    stack.make("down")
    with pytest.raises(OSError, match="refused"):
        health()


@pytest.mark.parametrize("workers", ["two", "0", "-1", "2 3", "1e3", "1000", "$(id)", "'"])
def test_a_number_of_workers_that_is_none_is_refused_before_anything_is_ended(stack: Stack, workers: str) -> None:
    (stack.folder / ".up").mkdir()
    (stack.folder / ".up" / "with").write_text("mode=here\n")
    with subprocess.Popen(["sleep", "600"]) as worker:
        try:
            (stack.folder / ".up" / "worker.pid").write_text(f"{worker.pid}\n")
            for target in ("scale", "up", "join"):
                refused = stack.make(target, f"WORKERS={workers.replace('$', '$$')}", code=2).stderr
                assert refused.startswith(f"error: WORKERS must be a number from 1 to 999, not '{workers}'")
            assert worker.poll() is None and (stack.folder / ".up" / "worker.pid").exists()
        finally:
            worker.kill()


def test_workers_go_on_when_others_cannot_start(stack: Stack) -> None:
    stack.make("up", "WORKERS=1")
    worker = (stack.folder / ".up" / "worker.pid").read_text()
    stack.set(RUIJI_THREADS="many")
    refused = stack.make("scale", "WORKERS=2", code=2).stderr
    assert "RUIJI_THREADS" in refused and "the old workers continue" in refused
    assert (stack.folder / ".up" / "worker.pid").read_text() == worker
    stack.set(RUIJI_THREADS="'1'  # quoted")
    stack.make("list")
    assert "12 done" in stack.make("enqueue", "ARGS=--wait").stderr
    assert "2 embed processes" in stack.make("scale", "WORKERS=2").stderr
    assert (stack.folder / ".up" / "worker.pid").read_text() != worker
    wait_until(lambda: not Path(f"/proc/{int(worker)}").exists(), what="the end of the workers of before")


def test_any_command_runs_through_make(stack: Stack) -> None:
    assert "near-duplicates" in stack.make("-s", "ruiji").stdout
    assert "no image files" in stack.make("ruiji", "ARGS=list /nowhere", code=2).stderr


def test_after_a_reboot_the_numbers_of_old_processes_are_strangers(stack: Stack) -> None:
    notes = stack.folder / ".up"
    notes.mkdir()
    (notes / "with").write_text("mode=here\n")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "ruiji"]) as stranger:
        try:
            for name in ("redis", "worker"):
                (notes / f"{name}.pid").write_text(f"{stranger.pid}\n")
            assert "1 embed processes" in stack.make("up", "WORKERS=1").stderr
            stack.make("list")
            assert "12 done" in stack.make("enqueue", "ARGS=--wait").stderr
            stack.make("down")
            assert stranger.poll() is None
        finally:
            stranger.kill()


#: Takes down what it is asked, and answers as an engine does that runs the containers of $RUNS.
DOCKER = """#!{python}
import os, re, sys
import dotenv
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(arguments) + "\\n")
runs = os.environ.get("RUNS", "")
if "--images" in arguments:
    values = dict(COMPOSE_PROJECT_NAME="not-set") | dotenv.dotenv_values(".env") | dict(os.environ)
    for name in re.findall(r"image: '(\\w+)=", sys.stdin.read()):
        print(f"{{name}}={{values.get(name, '')}}")
elif arguments[0] == "ps" and runs:
    project, folder = runs.split()
    asked = " ".join(arguments)
    if f"working_dir={{folder}} " in asked:
        print(project)
    elif f"project={{project}} " in asked:
        print(folder)
elif arguments[:2] == ["compose", "up"] and "DAMAGED" in os.environ:
    sys.exit(1)
elif "workers.slots" in arguments:
    print(os.environ["SLOTS"])
elif arguments[:3] == ["compose", "ps", "-q"]:
    print("" if "INTERRUPTED" in os.environ else "0123abcd")
elif arguments[:2] == ["compose", "run"] and "INTERRUPTED" in os.environ:
    sys.exit("Error response from daemon: No such image: ruiji:cpu")
elif arguments[:2] == ["compose", "ps"]:
    print("redis unhealthy\\nworker \\nreducer ")
elif arguments[:2] == ["compose", "logs"]:
    print("# Bad file format reading the append only file appendonly.aof.1.incr.aof")
"""


@pytest.fixture
def engine(stack: Stack) -> Stack:
    """The same clone, where a pretended engine answers."""
    docker = stack.folder.parent / "bin" / "docker"
    docker.write_text(DOCKER.format(python=ROOT / ".venv" / "bin" / "python", log=str(stack.folder.parent / "asked")))
    stack.settings.pop("COMPOSE_PROJECT_NAME")
    stack.set()
    return stack


def asked(stack: Stack) -> list[str]:
    """The commands that the pretended engine got."""
    return (stack.folder.parent / "asked").read_text().splitlines()


def project(stack: Stack) -> str:
    """The name under which `make up` starts containers here."""
    return stack.make("up").stderr.partition(" project ")[2].partition(",")[0]


def test_the_service_is_a_profile_with_a_token_of_its_own_until_down(engine: Stack) -> None:
    engine.make("up")
    assert not (engine.folder / "secrets" / "web_token").exists()
    assert "COMPOSE_PROFILES" not in (engine.folder / ".up" / "with").read_text()
    said = engine.make("up", "SERVE=1", "RUIJI_WEB_PORT=8123").stderr
    assert "the page: http://127.0.0.1:8123; its token is in secrets/web_token" in said
    token = engine.folder / "secrets" / "web_token"
    assert len(token.read_text()) > 20 and token.stat().st_mode & 0o077 == 0
    before = token.read_text()
    # A later one without it leaves it up.
    assert "the page: " in engine.make("up").stderr
    assert "export COMPOSE_PROFILES='serve'" in (engine.folder / ".up" / "with").read_text()
    assert token.read_text() == before
    engine.make("down")
    assert asked(engine)[-1] == "compose --profile serve --profile compare down"
    assert "the page: " not in engine.make("up").stderr


def test_clones_in_folders_of_one_name_have_projects_of_their_own(engine: Stack, tmp_path: Path) -> None:
    name = project(engine)
    assert name.startswith("ruiji-") and project(engine) == name
    other = Stack(tmp_path / "other" / "ruiji", "none", engine.media, engine.features, engine.model)
    other.settings.pop("COMPOSE_PROJECT_NAME")
    other.set()
    assert project(other).startswith("ruiji-") and project(other) != name
    engine.make("down")
    engine.set(COMPOSE_PROJECT_NAME='"chosen"')
    assert project(engine) == "chosen"


def test_containers_of_before_go_on_under_their_name_and_those_of_another_clone_are_left_alone(
    engine: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNS", f"old {engine.folder.resolve()}")
    assert project(engine) == "old"
    monkeypatch.setenv("RUNS", f"old {tmp_path}")
    for target in ("up", "down", "scale", "status"):
        refused = engine.make(target, "WORKERS=2", code=2).stderr
        assert f"containers of the project old are those of {tmp_path}" in refused
    assert not any(command.endswith(" down") for command in asked(engine))
    monkeypatch.setenv("RUNS", f"old {tmp_path}/moved-away")
    engine.make("down")
    assert "compose --profile serve --profile compare down" in asked(engine)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"GPU": "yes"}, "GPU must be 1 or 0, not 'yes'"),
        ({"CONTAINER_USER": "tester"}, "CONTAINER_USER must be numbers, like 1000:1000, not 'tester'"),
        ({"RUIJI_MEDIA_DIR": "media"}, "RUIJI_MEDIA_DIR must be an absolute path"),
        ({"RUIJI_MODEL": "/elsewhere/model.onnx"}, "must be in MODEL_DIR"),
        ({"REDIS_HOST": "localhost"}, "means each container itself"),
        ({"REDIS_HOST": "gpu-a"}, "no secrets/redis_ca: make certificates REDIS_HOST=gpu-a makes it"),
    ],
)
def test_what_containers_cannot_use_is_said_before_any_starts(
    engine: Stack, settings: dict[str, str], words: str
) -> None:
    assert words in engine.make("up", *(f"{name}={value}" for name, value in settings.items()), code=2).stderr
    assert not any(command.startswith(("compose build", "compose up")) for command in asked(engine))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_settings_in_quotes_are_those_that_compose_reads_and_the_certificate_has_to_fit(engine: Stack) -> None:
    engine.set(REDIS_HOST='"192.0.2.7"', CONTAINER_USER="'1234:1234' # not mine")
    engine.make("certificates", "REDIS_HOST=192.0.2.7")
    assert "as 1234:1234" in engine.make("up", "REDIS_PORT=7000").stderr
    assert any(" --entrypoint sh cli " in command for command in asked(engine)), "a look from inside"
    note = (engine.folder / ".up" / "with").read_text()
    assert "export REDIS_PORT='7000'" in note and "docker-compose.hosts.yml" in note
    assert "is not for 192.0.2.8" in engine.make("up", "REDIS_HOST=192.0.2.8", code=2).stderr


def test_with_gpus_as_many_workers_start_as_there_are_slots(engine: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTS", "3")
    engine.make("up", "GPU=1")
    engine.make("up", "GPU=1", "WORKERS=1")
    engine.make("up")
    scaled = [command.rpartition("worker=")[2] for command in asked(engine) if command.startswith("compose up")]
    assert scaled == ["3", "1", "2"]
    # Where no GPU can be used, that is said, and nothing starts.
    monkeypatch.delenv("SLOTS")
    engine.make("up", "GPU=1", code=2)
    assert len([command for command in asked(engine) if command.startswith("compose up")]) == 3


def test_without_an_engine_gpus_are_asked_for_by_name(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a machine whose GPU does not work would embed on its CPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refused = stack.make("up", "GPU=1", code=2).stderr
    assert "no GPU can be used" in refused


def test_a_damaged_queue_is_shown_with_the_way_out(engine: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    name = project(engine)
    monkeypatch.setenv("DAMAGED", "1")
    said = engine.make("up", code=2).stderr
    assert "# Bad file format reading the append only file" in said
    assert f"make down && docker volume rm {name}_redis && make up && make enqueue" in said


def test_a_command_that_fails_after_an_interrupted_up_says_to_run_it_again(
    engine: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    project(engine)
    assert "interrupted" not in engine.make("-s", "enqueue").stderr
    monkeypatch.setenv("INTERRUPTED", "1")
    for target in ("enqueue", "list", "search", "status"):
        said = engine.make("-s", target, code=2).stderr
        # The last line is make's own.
        assert said.splitlines()[-2].endswith("as after a make up that was interrupted: run make up again")


def test_files_that_a_container_would_lose_are_told_of(engine: Stack) -> None:
    project(engine)
    assert "written below RUIJI_FEATURE_DIR only" in engine.make("search", "QUERY=x.jpg").stderr
    assert "RUIJI_FEATURE_DIR (RUIJI_LIST" in engine.make("list").stderr
