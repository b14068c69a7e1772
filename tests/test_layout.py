"""The rooms: packaging lists every package, imports point inward, and cheap commands stay cheap."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OUTER = ("stores", "adapters", "cli")


def packages_on_disk() -> set[str]:
    found = set()
    for file in ROOT.glob("prefmw/**/__init__.py"):
        if not any(part in OUTER for part in file.relative_to(ROOT).parts[1:2]):
            found.add(".".join(file.parent.relative_to(ROOT).parts))
    for room in OUTER:
        for file in ROOT.glob(f"{room}/**/__init__.py"):
            found.add(".".join(("prefmw", *file.parent.relative_to(ROOT).parts)))
    return found


def test_every_package_on_disk_is_in_the_wheel():
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_every_python_file_lies_in_a_package():
    folders = {file.parent for room in ("prefmw", *OUTER) for file in ROOT.glob(f"{room}/**/*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_trainings_ask_for_their_processes_in_one_place():
    asking = [file.name for file in ROOT.glob("prefmw/**/*.py") if "PartialState(" in file.read_text()]
    assert asking == ["runs.py"]  # which tells accelerate of processes on CPUs


@pytest.mark.parametrize("room", OUTER)
def test_link_lets_tools_that_read_the_tree_find_the_room(room: str):
    link = ROOT / "prefmw" / room
    assert link.is_symlink()
    assert os.readlink(link) == f"../{room}"


@pytest.mark.parametrize("room", OUTER)
def test_direct_import_of_an_outer_room_is_banned(room: str):
    assert room in PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]


def modules() -> list[tuple[str, Path]]:
    found = []
    for file in (*ROOT.glob("prefmw/**/*.py"), *(file for room in OUTER for file in ROOT.glob(f"{room}/**/*.py"))):
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "prefmw" and len(parts) > 1 and parts[1] in OUTER:
            continue  # the link
        found.append((".".join(parts if parts[0] == "prefmw" else ("prefmw", *parts)), file))
    return found


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"relative import in {file}"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


ARROWS = {
    # room: what it may import of prefmw, beside itself and the errors
    "prefmw.preferences": (),
    "prefmw.alignment": (),
    "prefmw.decoding": ("prefmw.alignment",),
    "prefmw.models": ("prefmw.preferences", "prefmw.at_hand", "prefmw.decoding.products"),
    "prefmw.training": (
        "prefmw.preferences",
        "prefmw.models",
        "prefmw.decoding",
        "prefmw.alignment",
        "prefmw.arithmetic",
        "prefmw.rewards",
        "prefmw.evaluation.content",
        "prefmw.evaluation.oracles",
    ),
    "prefmw.evaluation": (
        "prefmw.choices",
        "prefmw.preferences",
        "prefmw.alignment",
        "prefmw.decoding",
        "prefmw.models",
        "prefmw.training",
        "prefmw.guidance",
        "prefmw.arithmetic",
        "prefmw.rewards",
        "prefmw.plans",
        "prefmw.steering",
        "prefmw.scoring",
    ),
    "prefmw.settings": ("prefmw.preferences",),
    "prefmw.errors": (),
    "prefmw.embedded": (),
    "prefmw.at_hand": ("prefmw.embedded",),
    "prefmw.plans": ("prefmw.preferences", "prefmw.decoding", "prefmw.models"),
    "prefmw.reply": ("prefmw.plans", "prefmw.decoding", "prefmw.models"),
    "prefmw.hearing": ("prefmw.preferences",),
    "prefmw.steering": (
        "prefmw.preferences",
        "prefmw.plans",
        "prefmw.alignment",
        "prefmw.decoding",
        "prefmw.models",
        "prefmw.guidance",
        "prefmw.arithmetic",
    ),
    "prefmw.personalizer": (
        "prefmw.preferences",
        "prefmw.plans",
        "prefmw.hearing",
        "prefmw.steering",
        "prefmw.reply",
        "prefmw.decoding",
        "prefmw.models",
        "prefmw.guidance",
        "prefmw.arithmetic",
    ),
    "prefmw.rewards": ("prefmw.preferences", "prefmw.decoding", "prefmw.models"),
    "prefmw.arithmetic": (
        "prefmw.preferences",
        "prefmw.alignment",
        "prefmw.decoding",
        "prefmw.models",
        "prefmw.guidance",
        "prefmw.rewards",
    ),
    "prefmw.checkpoints": ("prefmw.embedded", "prefmw.preferences", "prefmw.settings", "prefmw.models"),
    "prefmw.guidance": ("prefmw.preferences", "prefmw.alignment", "prefmw.decoding", "prefmw.models"),
    "prefmw.scoring": (
        "prefmw.preferences",
        "prefmw.decoding",
        "prefmw.models",
        "prefmw.plans",
        "prefmw.steering",
    ),
    "prefmw.explanation": (
        "prefmw.preferences",
        "prefmw.alignment",
        "prefmw.decoding",
        "prefmw.models",
        "prefmw.plans",
        "prefmw.steering",
    ),
    "prefmw.choices": (
        "prefmw.preferences",
        "prefmw.decoding",
        "prefmw.plans",
        "prefmw.steering",
        "prefmw.scoring",
    ),
    "prefmw.bootstrap": ("prefmw",),
    "prefmw.stores": ("prefmw.preferences",),
    "prefmw.adapters": (
        "prefmw.alignment",
        "prefmw.decoding",
        "prefmw.preferences",
        "prefmw.personalizer",
        "prefmw.plans",
        "prefmw.steering",
        "prefmw.reply",
        "prefmw.bootstrap",
        "prefmw.settings",
    ),
    "prefmw.cli": ("prefmw",),
}


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


@pytest.mark.parametrize(("module", "file"), modules(), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_inward(module: str, file: Path):
    if module in {"prefmw", "prefmw.__init__", "prefmw._version"}:
        return
    room = next(room for room in ARROWS if within(module, room))
    allowed = ("prefmw.errors", "prefmw._version", "prefmw.__version__", room, *ARROWS[room])
    for name in imports(file):
        if within(name, "prefmw") and name != "prefmw":
            assert any(within(name, target) for target in allowed), f"{module} imports {name}"


@pytest.mark.parametrize("room", ["prefmw.preferences", "prefmw.alignment", "prefmw.decoding", "prefmw.models"])
def test_core_rooms_need_torch_and_transformers_alone(room: str):
    ours = {"sqlalchemy", "alembic", "pydantic", "pydantic_settings", "typer", "rich", "langchain_core"}
    for module, file in modules():
        if within(module, room):
            assert not {name.split(".")[0] for name in imports(file)} & ours, module


def imported_by(code: str) -> set[str]:
    """Top-level modules in memory after ``code`` ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint('MODULES', *{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(result.stdout.split("MODULES", 1)[1].split())


def test_help_imports_no_sqlalchemy_and_no_torch():
    loaded = imported_by("from prefmw.cli.main import run; run(['--help']); run(['chat', '--help'])")
    assert "typer" in loaded
    assert not loaded & {"sqlalchemy", "torch", "transformers", "pydantic_settings", "langchain_core"}


@pytest.mark.parametrize(
    "command",
    [
        ["users", "list"],
        ["users", "add", "bob", "--persona", "x", "--method", "linear", "--strength", "3"],
        ["db", "current"],
        ["models", "list"],
    ],
    ids=" ".join,
)
def test_command_that_needs_no_model_imports_no_torch(command: list[str]):
    loaded = imported_by(f"from prefmw.cli.main import run; assert run({command!r}) == 0")
    assert not loaded & {"torch", "transformers", "langchain_core"}


def test_opening_an_existing_database_imports_no_alembic(home: Path):
    from prefmw.cli.main import run

    assert run(["users", "add", "bob"]) == 0
    assert "alembic" not in imported_by("from prefmw.cli.main import run; assert run(['users', 'list']) == 0")


def test_supported_transformers_stand_in_pyproject_too():
    from prefmw.models.chat_model import TRANSFORMERS_BELOW, TRANSFORMERS_MIN

    low, high = (".".join(map(str, bound)) for bound in (TRANSFORMERS_MIN, TRANSFORMERS_BELOW))
    assert f"transformers>={low},<{high.removesuffix('.0')}" in PYPROJECT["project"]["dependencies"]


def test_constraints_pin_every_dependency():
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    asked = [*PYPROJECT["project"]["dependencies"]]
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        asked += extra
    names = {re.split(r"[\[<>=]", line)[0].lower() for line in asked} - {"prefmw"}
    assert names <= {name.replace("_", "-") for name in pinned}


def test_dev_extra_holds_all_the_others():
    extras = PYPROJECT["project"]["optional-dependencies"]
    (all_of_them,) = (line for line in extras["dev"] if line.startswith("prefmw["))
    assert set(all_of_them.removeprefix("prefmw[").removesuffix("]").split(",")) == set(extras) - {"dev"}
