"""What the documents name exists: files, headings, commands, options, variables, targets of make."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline import cli
from pipeline.arguments import Commands
from search import cli as search_cli
from serve import cli as serve_cli
from workers import cli as workers_cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
#: These also tell what was: files, commands and options that are gone.
HISTORY = {"CHANGELOG.md", "decisions.md", "performance-log.md", "evaluation-log.md"}
CURRENT = [path for path in DOCUMENTS if path.name not in HISTORY]
#: Options of other programs that the documents show.
OTHERS = {
    *("--build", "--wait", "--scale", "--profile", "--rm", "--no-deps", "--require-hashes", "--dist", "--from"),
    *("--queries", "--gallery", "--seed", "--quick", "--images", "--rows", "--backup"),
}
#: A path of this repository, or a pattern of some.
NAMED_PATH = re.compile(
    r"(?<![\w./-])((?:pipeline|workers|search|serve|tests|benchmarks|examples|deploy|docs|requirements|acceptance|chaos|compose)"
    r"/[\w./*-]*\w)"
)
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]+")
CODE = re.compile(r"`([^`\n]+)`|^    (.+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    """Each command and group by its name, "" the root; sub-commands with their group's name before theirs."""
    root = Commands()
    for module in (workers_cli, search_cli, serve_cli):
        module.register(root)
    found: dict[str, Any] = {}

    def walk(command: Any, name: str) -> None:
        if not command.hidden:
            found[name] = command
            for child, sub in getattr(command, "commands", {}).items():
                walk(sub, f"{name} {child}".strip())

    walk(typer.main.get_command(root), "")
    walk(typer.main.get_command(cli.app), "")
    return found


@pytest.fixture(scope="module")
def commands(tree: dict[str, Any]) -> dict[str, set[str]]:
    """Each command's options."""
    return {
        name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        | {"--help"}
        for name, command in tree.items()
    }


def check_command_lines(code: str, commands: dict[str, set[str]], where: str) -> None:
    """Each `ruiji …` in it is a command, and has the options that it is shown with."""
    for asked in re.findall(r"(?<![\w./{:-])(?<!SETUSER )(?:\.venv/bin/)?ruiji ([^|#;]*)", code):
        words = asked.split()
        name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in commands), None)
        if words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
            assert name, f"{where}: ruiji {asked}"
        for option in OPTION.findall(asked):
            assert option in commands[name or ""], f"{where}: {option} in {code}"


def code_of(path: Path) -> Iterator[str]:
    for span, line in CODE.findall(path.read_text()):
        yield span or line


def slugs(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    text = path.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in slugs(there), f"{path.name}: {target}"


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    text = path.read_text()
    for name in NAMED_PATH.findall(text):
        assert any(ROOT.glob(name)) or any(ROOT.glob(f"tests/{name}")), f"{path.name} names {name}"
    tests = "".join(source.read_text() for source in (ROOT / "tests").rglob("test_*.py"))
    for name in re.findall(r"::(test_\w+)", text):
        assert f"def {name}(" in tests, f"{path.name} names {name}"


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: path.name)
def test_commands_and_options_exist(path: Path, commands: dict[str, set[str]]) -> None:
    every = set.union(*commands.values())
    for code in code_of(path):
        code = code.replace('make ruiji ARGS="', "ruiji ")
        for option in OPTION.findall(code):
            assert option in every | OTHERS, f"{path.name}: {option} in {code}"
        check_command_lines(code, commands, path.name)


def test_every_command_has_examples_that_are_its_own(tree: dict[str, Any], commands: dict[str, set[str]]) -> None:
    for name, command in tree.items():
        if hasattr(command, "commands"):
            continue
        assert command.epilog, f"ruiji {name} --help shows no example"
        for line in command.epilog.replace("\\\n", "").splitlines():
            assert f"ruiji {name}" in line
            check_command_lines(line, commands, name)


def test_help_lists_each_command_in_one_whole_sentence(tree: dict[str, Any]) -> None:
    for name, group in tree.items():
        if hasattr(group, "commands"):
            said = group.get_help(typer.Context(group, info_name=f"ruiji {name}", terminal_width=80))
            assert "..." not in said.partition("\n\n")[2], said


def test_variables_exist(commands: dict[str, set[str]]) -> None:
    known: set[str] = set()
    for module in ("pipeline", "search", "serve", "workers", "deploy"):
        for source in (ROOT / module).rglob("*"):
            if source.suffix in {".py", ".sh"}:
                known.update(re.findall(r"RUIJI_[A-Z_]+[A-Z]", source.read_text()))
    for path in [*CURRENT, ROOT / ".env.example", *ROOT.glob("docker-compose*.yml")]:
        for variable in re.findall(r"RUIJI_[A-Z_]+[A-Z]", path.read_text()):
            assert variable in known, f"{path.name}: {variable}"


@pytest.mark.parametrize("path", CURRENT, ids=lambda path: path.name)
def test_targets_of_make_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in code_of(path):
        for target in re.findall(r"(?<!git )\bmake ([a-z-]+)", code):
            assert target in targets, f"{path.name}: {code}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
