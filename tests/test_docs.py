"""What the documents name exists: files, headings, commands, options, variables, targets of make."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from pipeline.cli import app
from search import cli as search_cli
from workers import cli as workers_cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
#: These also tell what was: files, commands and options that are gone.
HISTORY = {"CHANGELOG.md", "decisions.md", "performance-log.md", "evaluation-log.md"}
CURRENT = [path for path in DOCUMENTS if path.name not in HISTORY]
#: Options of other programs that the documents show.
OTHERS = {
    *("--build", "--wait", "--scale", "--rm", "--no-deps", "--require-hashes", "--dist", "--from"),
    *("--queries", "--gallery", "--seed", "--quick", "--images"),
}
#: A path of this repository, or a pattern of some.
NAMED_PATH = re.compile(
    r"(?<![\w./-])((?:pipeline|workers|search|tests|benchmarks|examples|deploy|docs|requirements|acceptance|chaos|compose)"
    r"/[\w./*-]*\w)"
)
CODE = re.compile(r"`([^`\n]+)`|^    (.+)$", re.MULTILINE)


@pytest.fixture(scope="module")
def commands() -> dict[str, set[str]]:
    """Each command, groups with their sub-command, and its options."""
    for module in (workers_cli, search_cli):
        module.register(app)
    found = {}

    def walk(command: object, name: str) -> None:
        children = getattr(command, "commands", None)
        if children is None:
            options = {
                option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
            }  # type: ignore[attr-defined]
            found[name] = options | {"--help"}
        elif not name:
            found[""] = {option for parameter in command.params for option in parameter.opts} | {"--help"}  # type: ignore[attr-defined]
        for child, sub in (children or {}).items():
            walk(sub, f"{name} {child}".strip())

    walk(typer.main.get_command(app), "")
    return found


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
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", code):
            assert option in every | OTHERS, f"{path.name}: {option} in {code}"
        for asked in re.findall(r"(?<![\w./{:-])(?<!SETUSER )(?:\.venv/bin/)?ruiji ([^|#;]*)", code):
            words = asked.split()
            name = next((n for n in (" ".join(words[:2]), " ".join(words[:1])) if n in commands), None)
            if words and re.fullmatch(r"[a-z][a-z-]*", words[0]):
                assert name, f"{path.name}: ruiji {asked}"
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", asked):
                assert option in commands[name or ""], f"{path.name}: {option} in {code}"


def test_variables_exist(commands: dict[str, set[str]]) -> None:
    known: set[str] = set()
    for module in ("pipeline", "search", "workers", "deploy"):
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
