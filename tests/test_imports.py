"""The one-way street: profiler knows no placement, solvers and runtime do not know each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "profiler": ("placement",),
    "placement/solvers": ("placement.runtime", "placement.report", "placement.cli", "placement.compare"),
    "placement/runtime": ("placement.solvers", "placement.report", "placement.cli", "placement.compare"),
    "placement/exporters": (
        "placement.solvers",
        "placement.runtime",
        "placement.report",
        "placement.cli",
        "placement.compare",
    ),
    "placement/constraints": ("placement.solvers", "placement.runtime", "placement.report", "placement.compare"),
    "placement/report": ("placement.solvers", "placement.cli", "placement.compare"),
}
NO_TORCH = (
    "profiler/spec.py",
    "profiler/counts.py",
    "profiler/profile.py",
    "profiler/analysis.py",
    "placement/solvers",
)


def imported_names(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def files_of(place: str) -> list[Path]:
    path = ROOT / place
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_point_one_way(place):
    for file in files_of(place):
        for name in imported_names(file):
            assert not name.startswith(FORBIDDEN[place]), f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("place", NO_TORCH)
def test_planning_needs_no_torch(place):
    for file in files_of(place):
        assert not any(name.split(".")[0] in ("torch", "transformers") for name in imported_names(file)), file


def test_what_vllm_loads_at_every_start_imports_nothing():
    for place in ("placement/__init__.py", "placement/exporters/__init__.py"):
        assert not imported_names(ROOT / place)
    plugin = ast.parse((ROOT / "placement/exporters/vllm_plugin.py").read_text())
    imports = [node for node in plugin.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(node).split()[1] for node in imports} == {"__future__", "os", "typing"}


def test_only_the_command_line_sees_everything():
    for file in [*files_of("profiler"), *files_of("placement")]:
        if ROOT / "placement/cli" not in file.parents:
            assert "placement.cli" not in imported_names(file), file
