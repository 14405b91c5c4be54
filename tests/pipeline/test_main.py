"""The command line as a whole: one line for what machine and input can cause, streams that are closed, full or odd."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from pipeline import cli
from pipeline.model import load_model
from pipeline.settings import load_dotenv
from pipeline.streams import csv_writer, shown, to_json
from pipeline.versions import library_versions
from tests.factories import Ruiji, only_line, picture
from tests.search.galleries import write_gallery, write_pictures_gallery


@pytest.fixture
def gallery(ruiji: Ruiji) -> list[str]:
    """A gallery of five pictures; their paths."""
    return write_pictures_gallery(ruiji)


def name(gallery: list[str]) -> str:
    return gallery[0].rpartition("/")[2]


EMPTY = [
    ("search", ""),
    ("search", "a.png", ""),
    ("search", "--id", ""),
    ("search", "--id="),
    ("search", "--feature", ""),
    ("search", "--id", "x", "--where", ""),
    ("search", "--id", "x", "--labels", ""),
    ("search", "--id", "x", "--html", ""),
    ("near-duplicates", "--sheet", ""),
    ("evaluate", "--labels", ""),
    ("evaluate", "--labels-from-folder", "--trec", ""),
    ("run", "--media-dir", ""),
    ("run", "--list", ""),
    ("run", "--state-dir", ""),
    ("enqueue", "--redis-url", ""),
    ("worker", "--media-dir="),
    ("status", "--feature-dir", ""),
    ("verify", "--model", ""),
    ("gallery", "info", "--feature-dir", ""),
    ("model", "inspect", ""),
    ("list", ""),
    ("list", "media", "--out", ""),
    ("redis", "--state-dir", ""),
]


@pytest.mark.parametrize("arguments", EMPTY, ids=" ".join)
def test_an_empty_argument_is_bad_input(ruiji: Ruiji, gallery: list[str], arguments: tuple[str, ...]) -> None:
    done = ruiji(*arguments, code=2)
    assert "is empty" in only_line(done.stderr)
    assert not done.stdout
    assert not (ruiji.media.parent / "objects.txt").exists()


def test_an_empty_variable_is_one_that_is_not_set(ruiji: Ruiji, gallery: list[str]) -> None:
    ruiji.environment["RUIJI_MEDIA_DIR"] = ""
    assert "Missing option '--media-dir'" in only_line(ruiji("run", code=2).stderr)


@pytest.mark.parametrize(
    "arguments",
    [("run", "--feature-dir=~/f"), ("gallery", "info", "--feature-dir", "~"), ("search", "~/a.png")],
    ids=" ".join,
)
def test_a_tilde_that_no_shell_replaced_is_bad_input(
    ruiji: Ruiji, gallery: list[str], arguments: tuple[str, ...]
) -> None:
    assert "${HOME}" in only_line(ruiji(*arguments, code=2).stderr)


def test_a_tilde_in_a_variable_is_bad_input_and_a_folder_of_that_name_is_not(ruiji: Ruiji, tmp_path: Path) -> None:
    ruiji.environment["RUIJI_STATE_DIR"] = "~/state"
    assert "write ${HOME}/state, or ./~/state" in only_line(ruiji("redis", code=2).stderr)
    assert "/~/f/tiny: nothing was enqueued" in only_line(
        ruiji("gallery", "info", "--feature-dir", "./~/f", code=2).stderr
    )


@pytest.mark.parametrize("value", ["nan", "-nan", "NaN", "inf", "-inf"])
@pytest.mark.parametrize("arguments", [("near-duplicates", "--threshold"), ("search", "--id", "x", "--min-similarity")])
def test_a_number_that_is_none_is_bad_input(
    ruiji: Ruiji, gallery: list[str], arguments: tuple[str, ...], value: str
) -> None:
    assert f"'{arguments[-1]}'" in only_line(ruiji(*arguments, value, code=2).stderr)


@pytest.mark.parametrize("digits", [10, 20, 400, 5000])
def test_a_number_that_is_too_large_is_bad_input(ruiji: Ruiji, gallery: list[str], digits: int) -> None:
    for command, option in (("enqueue", "--max-pixels"), ("worker", "--processes"), ("search", "--top-k")):
        assert f"'{option}'" in only_line(ruiji(command, option, "9" * digits, code=2).stderr)


def test_what_the_command_line_cannot_read_is_one_line(ruiji: Ruiji) -> None:
    for arguments in (["search", "--nope"], ["nope"], ["search", "--top-k", "many"], ["run", "--device", "tpu"]):
        only_line(ruiji(*arguments, code=2).stderr)
    said = only_line(ruiji("model", "declare", "x.onnx", code=2).stderr)
    assert "Choose from: stretch, crop, pad" in said


def test_no_command_shows_the_help_and_is_bad_input(ruiji: Ruiji) -> None:
    for group in ([], ["gallery"], ["model"]):
        done = ruiji(*group, code=2)
        assert done.stderr == ruiji(*group, "--help").stdout and not done.stdout


def test_help_shows_defaults_and_whole_variables_at_80_columns(ruiji: Ruiji) -> None:
    ruiji.environment["COLUMNS"] = "80"
    said = ruiji("enqueue", "--help").stdout
    assert max(map(len, said.splitlines())) <= 80
    assert "[default:" in said and "MEDIA_DIR/objects.txt]" in said
    assert "RUIJI_REDIS_PASSWORD_FILE" in said


def test_version_says_what_decides_results_and_loads_none_of_it(ruiji: Ruiji) -> None:
    script = (
        "import sys; sys.argv = ['ruiji', '--version']\n"
        "from pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'numpy', 'torch', 'onnxruntime', 'PIL', 'simplejpeg'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    said = dict(line.split(" ") for line in done.stdout.splitlines())
    assert said["ruiji"] == metadata.version("ruiji")
    assert said.items() >= library_versions().items()
    assert ruiji("--version").stdout == done.stdout


def test_the_shell_completes_commands_and_values(ruiji: Ruiji) -> None:
    def completed(words: str) -> list[str]:
        asked = {"_RUIJI_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        return ruiji.shell("ruiji", **asked).stdout.decode().split()

    assert completed("ruiji near") == ["near-duplicates"]
    assert completed("ruiji search --format j") == ["json", "jsonl"]


COMMANDS = {
    "search": "search --id NAME",
    "csv": "search --id NAME --format csv",
    "jsonl": "search --id NAME --format jsonl",
    "paths": "search --id NAME --format paths",
    "near-duplicates": "near-duplicates --threshold 0.01",
    "evaluate": "evaluate --labels-from-folder",
    "info": "gallery info --json",
    "status": "status",
    "inspect": 'model inspect "$RUIJI_MODEL"',
    "doctor": "doctor",
    "help": "search --help",
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_an_answer_that_cannot_be_written_is_one_line(ruiji: Ruiji, gallery: list[str], command: str) -> None:
    command = command.replace("NAME", name(gallery))
    full = ruiji.shell(f"ruiji {command} > /dev/full")
    assert full.returncode == 1
    errors = full.stderr.decode()
    assert "Traceback" not in errors and errors.endswith("error: stdout: No space left on device\n")
    closed = ruiji.shell(f"ruiji {command} >&-")
    assert closed.returncode == 1
    assert closed.stderr.decode().endswith("error: stdout: Bad file descriptor\n")


def test_a_reader_that_has_read_enough_is_no_error(ruiji: Ruiji, gallery: list[str]) -> None:
    done = ruiji.shell(f"ruiji search --id {name(gallery)} --format jsonl | true; exit ${{PIPESTATUS[0]}}")
    assert done.stderr == b""


def test_notes_never_get_into_the_answer(ruiji: Ruiji, gallery: list[str]) -> None:
    done = ruiji.shell(f"ruiji search --id {name(gallery)} --explain --format json 2>&-")
    assert done.returncode == 0
    json.loads(done.stdout)
    assert ruiji.shell(f"ruiji search --id {name(gallery)} --explain 2> /dev/full").returncode == 0


def test_odd_names_are_escaped_for_people_and_exact_for_programs(ruiji: Ruiji, gallery: list[str]) -> None:
    odd = "日本 \x1b[31m\u202e\r.png"
    paths = [odd, *gallery[1:]]
    write_gallery(ruiji.features / "odd", load_model(ruiji.model), np.eye(5, 12, dtype=np.float32), paths, 5)
    asked = f"--model odd --id {name(gallery[1:])} -k 9"

    def said(form: str, **environment: str) -> bytes:
        done = ruiji.shell(f"ruiji search {asked} --format {form}", **environment)
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout

    assert "日本 \\x1b[31m\\u202e\\r.png" in said("table").decode()
    for locale in ({"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}):
        said("table", **locale).decode("ascii")
        for form in ("json", "jsonl", "csv", "paths"):
            assert said(form, **locale) == said(form)
    assert odd in [hit["path"] for hit in json.loads(said("json"))[0]["hits"]]
    assert f'"{odd}"'.encode() in said("csv")
    assert f"{odd}\n".encode() in said("paths")


def test_shown_text_has_nothing_that_a_terminal_obeys_or_hides() -> None:
    assert shown("a\u00a0日本 e\u0301 👩\u200d👧") == "a\u00a0日本 e\u0301 👩\u200d👧"
    assert shown("a\nb\tc\x9b\u2028\u200b\ufeff\udce9\ud800") == r"a\nb\tc\x9b\u2028\u200b\ufeff\xe9\ud800"
    assert json.loads(to_json("é\ud800")) == "é\ud800"
    assert to_json("é") == '"é"'


def test_a_csv_row_is_one_record_to_every_reader() -> None:
    from io import StringIO

    out = StringIO()
    csv_writer(out)(["a\rb", "c\nd", 'e"f', "g\r\n", "h"])
    assert out.getvalue() == '"a\rb","c\nd","e""f","g\r\n",h\n'


@pytest.mark.parametrize("command", ["redis", "run", "worker"])
def test_a_state_folder_that_cannot_be_used_is_one_line(ruiji: Ruiji, gallery: list[str], command: str) -> None:
    # Nobody may write there, root neither.
    ruiji.environment["RUIJI_REDIS_URL"] = "redis://127.0.0.1:1"
    assert "cannot write to the state folder /proc" in only_line(ruiji(command, "--state-dir", "/proc", code=1).stderr)
    ruiji.model.with_suffix(".txt").touch()
    told = only_line(ruiji(command, "--state-dir", str(ruiji.model.with_suffix(".txt")), code=1).stderr)
    assert "cannot make the state folder" in told


def test_a_broken_picture_is_one_line_of_the_log(ruiji: Ruiji) -> None:
    whole = picture(ruiji.media / "whole.jpg", size=(256, 256)).read_bytes()
    (ruiji.media / "cut.jpg").write_bytes(whole[: len(whole) * 3 // 4])
    (ruiji.media / "text.jpg").write_text("no image")
    done = ruiji("run", "--workers", "1", "--device", "cpu", code=3)
    told = [line for line in done.stderr.splitlines() if " object_failed " in line]
    assert len(told) == 2 and "Traceback" not in done.stderr
    assert sum("decoder=ValueError: Premature end of JPEG file" in line for line in told) == 1


def test_a_dotenv_may_have_a_byte_order_mark_and_has_to_be_utf8(
    ruiji: Ruiji, gallery: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUIJI_LIST", "")
    monkeypatch.delenv("RUIJI_LIST")
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_bytes(b"\xef\xbb\xbfRUIJI_LIST=x\n")
    load_dotenv()
    assert os.environ["RUIJI_LIST"] == "x"
    (tmp_path / ".env").write_bytes(b"RUIJI_LIST=\xff\n")
    assert ".env is not UTF-8" in only_line(ruiji("gallery", "info", code=2).stderr)


def test_an_error_of_the_disk_or_of_memory_is_one_line(ruiji: Ruiji, gallery: list[str]) -> None:
    long = "x" * 5000
    told = only_line(ruiji("gallery", "info", "--feature-dir", long, code=1).stderr)
    assert re.search(r"x/.*: File name too long$", told)


def _listen() -> None:
    """Take Ctrl-C as in a terminal, also if the tests run in the background of a script, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_while_the_command_is_loaded_shows_no_traceback(tmp_path: Path) -> None:
    # The first module that the command line needs of others stands for the half second that all of them take.
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "pipeline", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False, preexec_fn=_listen)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def run_instead(monkeypatch: pytest.MonkeyPatch, command: Callable[[], object]) -> tuple[int, str]:
    monkeypatch.setattr(cli, "app", lambda **_: command())
    monkeypatch.setattr(importlib, "import_module", lambda _: cli)
    monkeypatch.setattr(cli, "register", lambda _: None, raising=False)
    return cli._run()


def test_too_little_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    code, message = run_instead(monkeypatch, lambda: np.empty(1 << 60, np.uint8))
    assert (code, message.partition(":")[0]) == (1, "out of memory")


def test_ctrl_c_while_a_compiled_library_is_loaded_is_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise ImportError("initialization failed") from KeyboardInterrupt()  # As pybind11 does.

    assert run_instead(monkeypatch, load) == (130, "")
