"""Imports point one way, and nobody pays for what they do not use."""

import ast
import functools
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"numpy", "torch", "onnxruntime", "onnx", "celery", "PIL", "redis", "fastapi", "pydantic", "uvicorn"}


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['ruiji', '--help']\n"
        "from pipeline.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    for command in (
        "list",
        "enqueue",
        "run",
        "worker",
        "status",
        "search",
        "cancel",
        "redis",
        "model",
        "retry",
        "doctor",
    ):
        assert command in done.stdout
    assert "worker-process" not in done.stdout


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("pipeline", {"workers", "search", "ruiji", "serve", "onnxruntime", "torch"}),
        ("workers", {"search", "ruiji", "serve"}),
        ("search", {"ruiji", "serve"}),
        ("ruiji", {"serve", "torch", "onnxruntime", "celery"}),
        ("serve", {"torch", "onnxruntime", "celery", "kombu"}),
    ],
)
def test_packages_import_only_what_lies_below_them(package: str, forbidden: set[str]) -> None:
    for module in modules():
        if module.partition(".")[0] == package:
            assert not {name.partition(".")[0] for name in imported(module)} & forbidden, module


def test_torch_is_imported_by_what_exports_and_checks_networks_alone() -> None:
    assert {module for module in modules() if module.startswith("workers") and uses(module, "torch")} == {
        "workers.models.torch_export",
        "workers.models.text_export",
        "workers.models.transformers_export",
        "workers.models.check",
    }
    for module in ("workers.models.check", "workers.models.text_export", "workers.models.transformers_export"):
        assert not {name for name in imported(module, late=False) if name.startswith("torch")}, module
    for module in modules():
        assert "workers.models.torch_export" not in imported(module, late=False), module


def test_the_families_of_search_import_one_way() -> None:
    families = (
        *("search.gallery", "search.ranking", "search.maps", "search.duplicates", "search.evaluation"),
        "search.requests",
    )
    for lower, family in enumerate(families):
        for module in modules():
            if module.startswith(family) and not module.endswith(".cli"):
                found = {name for name in imported(module) if name.startswith(families[lower + 1 :])}
                assert not found, module
    known = {module for module in modules() if module.startswith("search") and uses(module, "typer")}
    assert known == {"search.cli", "search.duplicates.cli", "search.evaluation.cli"}


def test_the_families_of_workers_import_one_way() -> None:
    families = {"workers.decode": (), "workers.suspects": ("workers.decode",)}
    for family, lower in families.items():
        inside = [module for module in modules() if module.startswith(family + ".")]
        assert inside
        for module in inside:
            found = {name for name in imported(module) if name.startswith("workers.")}
            assert {name for name in found if not name.startswith((family, *lower))} == set(), module


def test_the_python_api_loads_numpy_and_nothing_heavier() -> None:
    script = f"import sys, ruiji\nprint(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy']"


def test_search_reaches_the_workers_in_two_places() -> None:
    assert {module for module in modules() if module.startswith("search") and uses(module, "workers")} == {
        "search.duplicates.comparer",
        "search.queries",
    }


def test_the_service_imports_nothing_that_is_not_asked_for_by_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["serve"]]
    asked = {re.split(r"[=>[]", line)[0].replace("-", "_") for line in named}
    # What FastAPI is made of, and passes on.
    asked |= {"pydantic", "starlette"}
    for module in modules():
        if module.startswith("serve."):
            found = {name.partition(".")[0] for name in imported(module)}
            assert found - set(PACKAGES) - sys.stdlib_module_names <= asked, module


def test_every_role_is_found_by_its_name() -> None:
    from pipeline.choices import Role
    from workers.process import ROLES
    from workers.work import Work

    assert set(ROLES) == set(Role) - {Role.all}
    for module, name in ROLES.values():
        assert issubclass(getattr(importlib.import_module(module), name), Work)


def test_only_the_queue_knows_celery_and_kombu() -> None:
    # The class serves others for annotations, and makes nothing happen.
    public = {"celery", "celery.Celery"}
    users = {
        module: found
        for module in modules()
        if not module.startswith("pipeline.queue")
        and (found := {n for n in imported(module) if n.partition(".")[0] in ("celery", "kombu")} - public)
    }
    assert users == {}


def test_the_queue_knows_nothing_of_plans_and_of_the_disk() -> None:
    known = {"pipeline", "pipeline.errors"}
    # The embedded server is a child process, and has a folder.
    known |= {"pipeline.children", "pipeline.children.start_child", "pipeline.layout"}
    known |= {"pipeline.choices"}
    # Ids are checked as on the disk, and what Redis says as what a file says.
    known |= {
        "pipeline.plans.generations",
        "pipeline.plans.generations.is_plan_id",
        "pipeline.store",
        "pipeline.store.as_type",
    }
    for module in modules():
        if module.startswith("pipeline.queue"):
            ours = {name for name in imported(module) if name.startswith(PACKAGES)}
            others = {
                name
                for name in ours
                if not name.startswith(("pipeline.queue", "pipeline.errors.", "pipeline.choices."))
            }
            assert others <= known, module


def test_no_two_modules_need_each_other() -> None:
    graph = {
        module: {name for name in imported(module, late=False) if name in modules()} - {module} for module in modules()
    }
    while leaves := {module for module, needed in graph.items() if not needed & graph.keys()}:
        graph = {module: needed for module, needed in graph.items() if module not in leaves}
    assert graph == {}


PACKAGES = ("pipeline", "workers", "search", "ruiji", "serve")


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the packages, by its full name."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


def imported(module: str, late: bool = True) -> set[str]:
    """What a module imports: modules, and names as `module.name`.

    `late` counts what is imported by a function when it is called, or for annotations only.
    """
    tree = modules()[module]
    found = set()
    for node in ast.walk(tree) if late else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None and not node.level, f"a relative import in {module}"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def uses(module: str, package: str) -> bool:
    return any(name.partition(".")[0] == package for name in imported(module))
