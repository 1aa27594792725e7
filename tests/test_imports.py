"""The one-way street: profiler knows no placement, solvers and runtime do not know each other.

And what first docstrings promise: that each module says what it must not know, and does not import that.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

ABOVE = ("placement.cli", "placement.compare", "placement.insight", "placement.report", "placement.verdict")
"""What compares, gathers, shows and explains plans: what these are made of does not know them."""
FORBIDDEN = {
    "profiler": ("placement",),
    "placement/solvers": (*ABOVE, "placement.runtime", "placement.exporters", "placement.constraints"),
    "placement/runtime": (*ABOVE, "placement.solvers", "placement.exporters", "placement.constraints"),
    "placement/exporters": (*ABOVE, "placement.solvers", "placement.runtime", "placement.constraints"),
    "placement/constraints": (*ABOVE, "placement.solvers", "placement.runtime", "placement.exporters"),
    "placement/report": (
        "placement.solvers",
        "placement.cli",
        "placement.compare",
        "placement.exporters",
        "placement.constraints",
    ),
    "placement/backends.py": ("placement",),
    "placement/bootstrap.py": (*ABOVE, "placement.solvers"),
    "placement/certify.py": (*ABOVE, "placement.solvers", "placement.runtime", "placement.exporters"),
    "placement/choice.py": (*ABOVE, "placement.cost", "placement.solvers", "placement.runtime"),
    "placement/columns.py": (*ABOVE, "placement.solvers", "placement.certify", "placement.partition"),
    "placement/compare.py": ("placement.cli", "placement.report", "placement.runtime", "placement.exporters"),
    "placement/cost.py": (*ABOVE, "placement.solvers", "placement.timing", "placement.topology"),
    "placement/foreign.py": (*ABOVE, "placement.solvers", "placement.runtime"),
    "placement/insight.py": ("placement.cli", "placement.report", "placement.solvers", "placement.compare"),
    "placement/layer_problem.py": (*ABOVE, "placement.solvers", "placement.placement_map", "profiler"),
    "placement/partition.py": (*ABOVE, "placement.solvers", "placement.certify", "profiler"),
    "placement/placement_map.py": (*ABOVE, "placement.cost", "placement.solvers", "placement.exporters"),
    "placement/sufficiency.py": (*ABOVE, "placement.solvers"),
    "placement/timing.py": (*ABOVE, "placement.choice", "placement.solvers", "placement.runtime", "profiler.trace"),
    "placement/topology.py": ("placement", "profiler.spec"),
    "placement/verdict.py": ("placement.cli", "placement.report", "placement.runtime"),
    "placement/constraints/finetune.py": ("placement.placement_map",),
    "placement/constraints/harness.py": ("placement.placement_map",),
    "placement/constraints/lists.py": ("placement.constraints",),
    "placement/constraints/pruning.py": ("placement.constraints.routers",),
    "placement/constraints/quality.py": ("placement",),
    "placement/constraints/routers.py": ("placement",),
    "placement/exporters/shards.py": ("placement", "profiler.spec"),
    "placement/runtime/exchange.py": ("placement.placement_map", "placement.runtime.experts"),
    "placement/runtime/grouped.py": ("placement.placement_map", "torch.distributed"),
    "placement/runtime/meter.py": ("placement", "profiler"),
    "placement/runtime/membership.py": ("placement", "profiler.spec"),
    "placement/runtime/network.py": ("placement", "profiler.spec"),
    "placement/runtime/probe.py": ("placement.placement_map",),
    "placement/runtime/reference.py": ("placement", "profiler"),
    "placement/runtime/sharding.py": ("placement.placement_map", "profiler.trace"),
    "placement/runtime/workloads.py": ("placement.placement_map",),
    "placement/solvers/contract.py": ("placement.solvers", "placement.placement_map", "profiler"),
    "placement/solvers/equal_sizes.py": ("placement", "profiler"),
    "profiler/errors.py": ("profiler",),
    "profiler/importers/load_balancer.py": ("profiler.trace", "profiler.importers"),
    "profiler/zoo/corpora.py": ("profiler", "torch", "tokenizers"),
}
ENGINES = {
    "profiler/importers": ("megatron", "sglang", "tensorrt_llm", "vllm"),
    "placement/exporters": ("sglang", "tensorrt_llm", "vllm", "vllm_ascend"),
}
ENGINE_FREE = {
    "profiler/importers": ("arrays", "known", "recording", "responses"),
    "placement/exporters": ("checkpoint", "contract", "eplb", "permutation", "shards", "verify"),
}
NO_TORCH = (
    "profiler/spec.py",
    "profiler/counts.py",
    "profiler/profile.py",
    "profiler/analysis.py",
    "placement/cost.py",
    "placement/placement_map.py",
    "placement/solvers",
    "placement/timing.py",
    "placement/topology.py",
    "placement/exporters/checkpoint.py",
    "placement/runtime/reference.py",
    "placement/runtime/results.py",
)
WORDS_OF_IGNORANCE = {"no", "not", "nothing", "neither", "none", "only", "without", "never"}


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
    found = [path] if path.is_file() else sorted(path.rglob("*.py"))
    assert found, f"{place}: no such file"
    return found


def is_in(name: str, module: str) -> bool:
    """Whether an imported name is a module, or something in it or in one of its submodules."""
    return name == module or name.startswith(f"{module}.")


def require_ignorance(place: str, forbidden: tuple[str, ...]) -> None:
    for file in files_of(place):
        for name in imported_names(file):
            assert not any(is_in(name, module) for module in forbidden), f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_point_one_way(place):
    require_ignorance(place, FORBIDDEN[place])


@pytest.mark.parametrize("package", ENGINES)
def test_engines_do_not_know_each_other(package):
    modules = {name: f"{package.replace('/', '.')}.{name}" for name in ENGINES[package]}
    for name in ENGINES[package]:
        require_ignorance(f"{package}/{name}.py", tuple(modules[other] for other in modules if other != name))
    for name in ENGINE_FREE[package]:
        require_ignorance(f"{package}/{name}.py", tuple(modules.values()))


@pytest.mark.parametrize("place", NO_TORCH)
def test_these_import_no_torch(place):
    require_ignorance(place, ("torch", "transformers"))


def test_what_vllm_loads_at_every_start_imports_nothing():
    for place in ("placement/__init__.py", "placement/exporters/__init__.py"):
        assert not imported_names(ROOT / place)
    plugin = ast.parse((ROOT / "placement/exporters/vllm_plugin.py").read_text())
    imports = [node for node in plugin.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(node).split()[1] for node in imports} == {"__future__", "os", "typing"}


def test_only_the_command_line_sees_everything():
    for file in [*files_of("profiler"), *files_of("placement")]:
        if ROOT / "placement/cli" not in file.parents:
            assert not any(is_in(name, "placement.cli") for name in imported_names(file)), file


def test_only_families_and_routers_tell_model_families_apart():
    """As `profiler/families.py` says: nothing else asks of which class the modules of a model are."""
    asking = {
        str(file.relative_to(ROOT))
        for file in [*files_of("profiler"), *files_of("placement")]
        if re.search(r"\.(named_modules|__mro__)\b", file.read_text())
    }
    assert asking == {"profiler/families.py", "placement/constraints/routers.py"}


@pytest.mark.parametrize("place", ["profiler", "placement"])
def test_first_docstrings_say_what_a_module_does_not_know(place):
    silent = []
    for file in files_of(place):
        docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
        _what_it_is_for, *others = re.split(r"(?<=[.?!])\s+", docstring)
        if not any(WORDS_OF_IGNORANCE & set(re.findall(r"[a-z]+", sentence.lower())) for sentence in others):
            silent.append(str(file.relative_to(ROOT)))
    assert not silent, f"say in a second sentence what these do not know, or do not do: {silent}"
