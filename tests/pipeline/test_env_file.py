"""`.env` is read as docker compose reads it, or refused."""

import contextlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.env_file import read_env_file
from pipeline.errors import UsageError

#: What a line makes of RUIJI_LIST.
READ = {
    "RUIJI_LIST=x": "x",
    "  export  RUIJI_LIST =  x  # said": "x",
    "RUIJI_LIST='x y' # said": "x y",
    'RUIJI_LIST="x \\"y\\""': 'x "y"',
    "RUIJI_LIST='$x#y'": "$x#y",
    "RUIJI_LIST=x#y": "x#y",
    "RUIJI_LIST=#y": "#y",
    "RUIJI_LIST=x # costs $5": "x",
    "RUIJI_LIST=": "",
    "RUIJI_LIST=''": "",
    "RUIJI_LIST='x'\r": "x",
    "RUIJI_LIST=x'y'": "x'y'",
    "RUIJI_LIST=x\\ny": "x\\ny",
    "RUIJI_LIST=[::1]": "[::1]",
    "RUIJI_LIST=é": "é",
    "\ufeffRUIJI_LIST=x": "x",
    "RUIJI_LIST=x\nRUIJI_LIST=y": "y",
    "B='1'\nC=${B}2\nRUIJI_LIST=${C}/${NONE}3": "12/3",
    'export B=1\r\nRUIJI_LIST="${B}"\r': "1",
    "SHELLS=file\nRUIJI_LIST=${SHELLS}": "shell",
    "#RUIJI_LIST=y$z\nRUIJI_LIST=x": "x",
    "OTHER=$of #somebody's\nRUIJI_LIST=x": "x",
}
#: What docker compose and python-dotenv read in two ways, or one of them not at all.
REFUSED = [
    *("RUIJI_LIST=a$b", 'RUIJI_LIST="a$b"', "RUIJI_LIST=a$$b", "RUIJI_LIST=a\\$b", "B=1\nRUIJI_LIST='${B}'"),
    *("RUIJI_LIST=${B:-d}", "RUIJI_LIST=${B-d}", "RUIJI_LIST=${B:+d}", "RUIJI_LIST=${B:?no}", "RUIJI_LIST=${B"),
    *("RUIJI_LIST: x", "RUIJI_LIST x", "RUIJI_LIST='x", 'RUIJI_LIST="x', "RUIJI_LIST='x'y", "RUIJI_LIST='x' y"),
    *("RUIJI_LIST= #c", "RUIJI_LIST=x\t#c", "RUIJI_LIST='x'#c", "RUIJI_LIST=x\u00a0#c", "RUIJI_LIST='a\\\\b'"),
    *("RUIJI_LIST=x\rB=2", "'RUIJI_LIST'=x", "EXPORT RUIJI_LIST=x", "B=$x\nRUIJI_LIST=${B}"),
]


@pytest.fixture
def env_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHELLS", "shell")
    return tmp_path / ".env"


@pytest.mark.parametrize("line", READ)
def test_a_line_is_read(env_file: Path, line: str) -> None:
    env_file.write_bytes(f"{line}\n".encode())
    assert read_env_file(env_file) == {"RUIJI_LIST": READ[line]}


@pytest.mark.parametrize("line", REFUSED)
def test_a_line_that_compose_reads_differently_is_refused_with_its_number(env_file: Path, line: str) -> None:
    env_file.write_bytes(f"A=1\n\n{line}\n".encode())
    first = 3 if line.startswith(("RUIJI", "'RUIJI", "EXPORT")) or "$x" in line else 4
    with pytest.raises(UsageError, match=rf"\.env, line {first}: ruiji and docker compose"):
        read_env_file(env_file)


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs the docker command line")
def test_docker_compose_reads_all_of_them_alike(env_file: Path) -> None:
    settings = 'services: {x: {image: x, environment: {VALUE: "${RUIJI_LIST-}"}}}'
    command = ["docker", "compose", "-f", "-", "-p", "x", "config", "--format", "json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RUIJI_", "COMPOSE_"))}
    for line, expected in READ.items():
        env_file.write_bytes(f"{line}\n".encode())
        answer = subprocess.run(command, input=settings, capture_output=True, text=True, env=environment)
        if "unknown" in answer.stderr or "is not a docker command" in answer.stderr:
            pytest.skip("this docker has no compose")
        assert answer.returncode == 0, (line, answer.stderr)
        value = json.loads(answer.stdout)["services"]["x"]["environment"]["VALUE"]
        assert value.replace("$$", "$") == expected, line


@given(
    st.lists(st.text() | st.text("RUIJI_XB=${}'\"\\# \t\r\n\0\x0b\u2028\u00e9") | st.just("RUIJI_X="), max_size=6).map(
        "".join
    )
)
def test_any_text_is_refused_or_gives_variables_that_an_environment_can_hold(tmp_path: Path, text: str) -> None:
    file = tmp_path / "any.env"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(UsageError):
        for name, value in read_env_file(file).items():
            os.environb[os.fsencode(name)] = os.fsencode(value)
            del os.environ[name]


@pytest.mark.parametrize("line", ["RUIJI_LIST=a\0b", "RUIJI_LIST='\0'", "B=\0\nRUIJI_LIST=${B}"])
def test_a_null_character_is_refused(env_file: Path, line: str) -> None:
    env_file.write_text(line)
    with pytest.raises(UsageError, match="differently"):
        read_env_file(env_file)
