"""The architecture, read from the sources: floors, quiet imports, lazy torch, complete commands."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from l4cli.cli import COMMANDS
from l4cli.model import load_preset, preset_names

ROOT = Path(__file__).parents[1]
FLOORS: dict[str, float] = {
    "cli": 7,
    "__main__": 8,
    "commands": 6,
    "evals": 5,
    "posttraining": 5,
    "training": 4,
    "inference": 4,
    "checkpoint": 3,
    "distributed": 3,
    "planning": 3,
    "data": 2,
    "model": 2,
    "quantization": 2,
    "text": 1,
    "ops": 1,
    "errors": 0,
    "terminal": 0.5,
    "": 9,  # `import l4cli` itself: the lazy doors of the Python interface
}


def modules(package: str) -> list[Path]:
    return sorted(ROOT.joinpath(package).rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "l4cli").with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(path: Path) -> list[str]:
    """Every imported module of a file, also inside functions, `from a import b` as `a.b`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@pytest.mark.parametrize("path", modules("l4cli"), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_only_go_down(path: Path) -> None:
    room = room_of(path)
    for name in imports(path):
        if not name.startswith("l4cli."):
            continue
        other = name.split(".")[1]
        if other == "__version__" or other == room:
            continue
        assert other in FLOORS, f"{path} imports `{name}`, which has no floor"
        assert FLOORS[other] < FLOORS[room], f"`{room}` may not import `{name}`"


def test_no_command_imports_another() -> None:
    names = {command.module for command in COMMANDS}
    for path in modules("l4cli/commands"):
        own = "l4cli.commands." + path.stem
        for name in imports(path):
            module = name if name in names else name.rpartition(".")[0]
            assert module == own or module not in names, (path, name)


def test_kernels_import_nothing_of_the_house() -> None:
    for path in modules("src_kernels"):
        assert not any(name.startswith("l4cli") for name in imports(path)), path


def test_nothing_imports_click() -> None:
    for path in modules("l4cli"):
        assert not any(name.split(".")[0] == "click" for name in imports(path)), path


def test_floor_zero_needs_rich_at_most() -> None:
    for name in ("errors", "terminal"):
        for imported in imports(ROOT / "l4cli" / f"{name}.py"):
            root = imported.split(".")[0]
            assert root in {*sys.stdlib_module_names, "rich", "l4cli"}, (name, imported)


def test_text_needs_no_torch() -> None:
    for path in modules("l4cli/text"):
        assert not any(name.split(".")[0] == "torch" for name in imports(path)), path


ALLOWED_CALLS = {"TypeVar", "frozenset", "compile", "getLogger", "namedtuple", "Typer", "field"}


@pytest.mark.parametrize("path", modules("l4cli"), ids=lambda p: str(p.relative_to(ROOT)))
def test_importing_does_nothing_loud(path: Path) -> None:
    """No statement at module level prints, reads the environment, seeds or sets global state."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Expr):
            is_docstring = isinstance(node.value, ast.Constant)
            assert is_docstring, f"{path}:{node.lineno} runs something when imported"
        if isinstance(node, ast.Assign | ast.AnnAssign):
            text = ast.unparse(node)
            for word in ("os.environ", "getenv", "manual_seed", "set_num_threads", "open("):
                assert word not in text, f"{path}:{node.lineno} {text}"


def python(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT)


CHECK_TORCH = """
import sys
from l4cli.cli import main
code = main(sys.argv[1:])
assert code == 0, code
for name in ("torch", "transformers"):
    assert name not in sys.modules, name
"""


@pytest.mark.parametrize("command", ["", *(command.name for command in COMMANDS)])
def test_help_imports_no_torch(command: str) -> None:
    args = [command, "--help"] if command else ["--help"]
    done = python("-c", CHECK_TORCH, *args)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


def test_help_takes_less_than_half_a_second_of_cpu_time() -> None:
    before = os.times()
    assert python("-m", "l4cli", "--help").returncode == 0
    after = os.times()
    used = after.children_user + after.children_system
    assert used - before.children_user - before.children_system < 0.5


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c.name)
def test_every_command_has_help_with_examples_a_test_and_an_example(command: object) -> None:
    name = command.name.replace("-", "_")
    shown = python("-m", "l4cli", command.name, "--help").stdout
    assert "examples:" in shown
    assert f"l4 {command.name}" in shown
    assert (ROOT / "tests" / "cli" / f"test_{name}.py").exists()
    assert (ROOT / "examples" / f"{name}.sh").exists()


def test_options_mean_something() -> None:
    """Every option of every command says in its help what it does."""
    import importlib

    import typer

    for command in COMMANDS:
        module = importlib.import_module(command.module)
        app = typer.Typer(add_completion=False)
        app.command()(getattr(module, command.name.replace("-", "_")))
        for parameter in typer.main.get_command(app).params:
            assert getattr(parameter, "help", "x"), (command.name, parameter.name)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads(name: str) -> None:
    assert load_preset(name).text.num_hidden_layers > 0


def test_sources_are_plain_ascii() -> None:
    for package in ("l4cli", "src_kernels"):
        for path in modules(package):
            assert path.read_bytes().isascii(), path


def test_python_dash_m_is_the_same_door() -> None:
    assert python("-m", "l4cli", "--version").stdout.strip() == "0.1.0"


def test_torchrun_can_start_it() -> None:
    done = python("-m", "torch.distributed.run", "--nproc-per-node=1", "-m", "l4cli", "--version")
    assert "0.1.0" in done.stdout, done.stderr
