"""The plugin's rules, against a stand-in for vLLM; tests/test_engines.py has the real policy classes."""

import subprocess
import sys
import tomllib
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_spec

from placement.exporters import vllm_plugin
from placement.placement_map import PlacementMap
from placement.topology import Topology
from profiler.errors import CoterieError

ROOT = Path(__file__).parents[1]


class DefaultPolicy:
    """Balances in file order."""

    @classmethod
    def rebalance_experts(cls, weight, num_replicas, *_rest):
        return torch.arange(num_replicas).repeat(len(weight), 1) % weight.shape[1]


@pytest.fixture
def policies(monkeypatch):
    """vLLM's table of policies, in modules where vLLM has it."""
    table = {"default": DefaultPolicy}
    for name in ("vllm", "vllm.distributed", "vllm.distributed.eplb", "vllm.distributed.eplb.policy"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["vllm.distributed.eplb.policy"].EPLB_POLICIES = table
    return table


@pytest.fixture
def plan(tmp_path, monkeypatch) -> PlacementMap:
    rows = np.stack([np.random.default_rng(seed).permutation(8) for seed in range(3)])
    placement = PlacementMap(make_spec(3, 8, 2), Topology(1, 4, 2), rows, {"name": "any"})
    placement.save(tmp_path / "plan.json")
    monkeypatch.setenv("COTERIE_PLAN", str(tmp_path / "plan.json"))
    return placement


def ask(policy, num_layers=3, num_experts=8, num_replicas=8, num_ranks=4):
    old = torch.arange(num_replicas).repeat(num_layers, 1)
    return policy.rebalance_experts(torch.ones(num_layers, num_experts), num_replicas, 1, 1, num_ranks, old)


def test_the_plan_is_the_answer_to_any_load(policies, plan):
    vllm_plugin.register()
    vllm_plugin.register()  # vLLM does so in every process
    policy = policies["default"]
    assert issubclass(policy, DefaultPolicy)
    assert policy.__mro__[1] is DefaultPolicy
    answer = ask(policy)
    assert answer.dtype == torch.int64
    assert answer.tolist() == plan.physical_to_logical_map.tolist()
    answer.zero_()  # what vLLM does with an answer is not seen in the next
    assert ask(policy).tolist() == plan.physical_to_logical_map.tolist()


def test_layers_of_a_draft_model_are_balanced_as_before(policies, plan):
    vllm_plugin.register()
    assert ask(policies["default"], num_layers=1).tolist() == [list(range(8))]


@pytest.mark.parametrize("odd", [{"num_layers": 4}, {"num_experts": 16}, {"num_replicas": 12}, {"num_ranks": 2}])
def test_another_model_or_size_is_refused(policies, plan, odd):
    vllm_plugin.register()
    with pytest.raises(CoterieError, match="start vLLM as"):
        ask(policies["default"], **odd)


def test_a_broken_plan_stops_vllm_from_starting(policies, tmp_path, monkeypatch):
    monkeypatch.setenv("COTERIE_PLAN", str(tmp_path / "none.json"))
    with pytest.raises(CoterieError, match="no such file"):
        vllm_plugin.register()
    assert policies == {"default": DefaultPolicy}


def test_nothing_happens_and_nothing_is_imported_unless_asked():
    code = (
        "import sys, os; before = set(sys.modules); os.environ.pop('COTERIE_PLAN', None);"
        "from placement.exporters.vllm_plugin import register; register();"
        "print(sorted(name for name in set(sys.modules) - before if not name.startswith('placement')))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True).stdout
    heavy = ("numpy", "torch", "profiler", "vllm", "yaml", "typer")
    assert not any(name.startswith(f"{package}") for package in heavy for name in eval(found)), found


def test_the_entry_point_is_declared():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared["vllm.general_plugins"] == {"coterie": "placement.exporters.vllm_plugin:register"}
