"""vLLM's entry point (`vllm.general_plugins`): a static policy that answers with a plan instead of balancing load.

vLLM loads this module in every process of every start, whether a plan is wanted or not.  So it imports nothing of its
own accord, and does nothing unless the environment names a plan.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

PLAN_VARIABLE = "COTERIE_PLAN"
"""Names the placement map to serve with."""


def register() -> None:
    """Put the static policy in the place of vLLM's default one; nothing if `COTERIE_PLAN` is not set.

    vLLM calls it several times in a process.

    Raises:
        CoterieError: the map cannot be read, or has empty slots; vLLM then does not start.
    """
    plan = os.environ.get(PLAN_VARIABLE)
    if not plan:
        return
    from pathlib import Path

    # Known only where vLLM is installed.
    from vllm.distributed.eplb.policy import EPLB_POLICIES  # type: ignore[import-not-found,unused-ignore]

    policy = EPLB_POLICIES["default"]
    EPLB_POLICIES["default"] = make_policy(Path(plan), getattr(policy, "replaced", policy))


def make_policy(plan: Path, replaced: Any) -> Any:
    """A subclass of vLLM's policy whose `rebalance_experts` gives the plan, whatever the load.

    vLLM balances the layers of a draft model (multi-token prediction) by themselves: they are fewer than the plan's,
    and the replaced policy goes on balancing them.

    Args:
        plan: placement map file.
        replaced: vLLM's `DefaultEplbPolicy`, or another subclass of its `AbstractEplbPolicy`.

    Raises:
        CoterieError: the map cannot be read, or has empty slots.
    """
    import logging

    import torch

    from placement.exporters.contract import full_rows
    from placement.placement_map import PlacementMap
    from profiler.errors import CoterieError

    placement = PlacementMap.load_from(plan)
    phy2log = torch.tensor(full_rows(placement, "vLLM"), dtype=torch.int64)
    num_layers, num_experts = placement.model.num_layers, placement.model.num_experts

    class StaticPolicy(replaced):  # type: ignore[misc]
        """Answers with the plan."""

        told = False

        @classmethod
        def rebalance_experts(
            cls,
            weight: torch.Tensor,
            num_replicas: int,
            num_groups: int,
            num_nodes: int,
            num_ranks: int,
            old_global_expert_indices: torch.Tensor | None = None,
        ) -> torch.Tensor:
            """The plan, int64 (L, P) on the CPU; see vLLM's `AbstractEplbPolicy`.

            Raises:
                CoterieError: vLLM runs another model, or other numbers of ranks or slots.
            """
            layers, experts = weight.shape
            if layers < num_layers and experts == num_experts:
                if not cls.told:
                    cls.told = True
                    logging.getLogger("coterie").warning(
                        "%s is for %d MoE layers; vLLM balances %d more by itself, of a draft model as it seems",
                        plan,
                        num_layers,
                        layers,
                    )
                balanced: torch.Tensor = replaced.rebalance_experts(
                    weight, num_replicas, num_groups, num_nodes, num_ranks, old_global_expert_indices
                )
                return balanced
            asked = (layers, experts, num_replicas, num_ranks)
            planned = (num_layers, num_experts, placement.topology.num_slots, placement.topology.num_ranks)
            if asked != planned:
                raise CoterieError(
                    f"{plan}: is for (layers, experts, slots, ranks) {planned}, vLLM runs {asked}; start vLLM as "
                    f"`coterie export --to vllm` says, or unset {PLAN_VARIABLE}"
                )
            return phy2log.clone()

    StaticPolicy.replaced = replaced
    return StaticPolicy
