"""C2R (arXiv 2504.01337): the first expert is free, the others of a token come from its list of collaborators.
Knows no router.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from placement.choice import ranks_of_experts
from placement.placement_map import PlacementMap
from profiler.errors import CoterieError
from profiler.profile import Profile
from profiler.spec import MoESpec

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CollaboratorLists:
    """Which experts may join a token's first one.

    Attributes:
        model: the MoE layers that the lists are for.
        lists: int64 (L, E, T), the collaborators of each expert, best first; never the expert itself.
        source: what they were made of, for people: the profile's digest, whether they know a placement.

    Raises:
        CoterieError: a list is shorter than K-1, or names an expert twice, itself, or one that there is not.
    """

    model: MoESpec
    lists: Int64s
    source: Mapping[str, Any]

    def __post_init__(self) -> None:
        experts = self.model.num_experts
        if self.lists.ndim != 3 or self.lists.shape[:2] != (self.model.num_layers, experts):
            raise CoterieError(f"lists {self.lists.shape}: must be (layers, experts, T) of {self.model.describe()}")
        require_size(self.lists.shape[2], self.model)
        with_self = np.concatenate([self.lists, np.arange(experts)[None, :, None].repeat(len(self.lists), 0)], axis=2)
        in_order = np.sort(with_self, axis=2)
        if in_order.min() < 0 or in_order.max() >= experts or (in_order[..., 1:] == in_order[..., :-1]).any():
            raise CoterieError(
                f"lists: each must name other experts below {experts}, each once; make them with `coterie constrain`"
            )

    @property
    def size(self) -> int:
        """T, the collaborators of each expert."""
        return int(self.lists.shape[2])

    @property
    def name(self) -> str:
        """For tables."""
        return f"{'device-aware ' if self.source.get('device_aware') else ''}C2R, T={self.size}"

    @cached_property
    def allowed(self) -> npt.NDArray[np.bool_]:
        """Bool (L, E, E): whether the column's expert may join the row's; the diagonal is set."""
        allowed = np.eye(self.model.num_experts, dtype=np.bool_)[None].repeat(self.model.num_layers, 0)
        np.put_along_axis(allowed, self.lists, True, axis=2)
        return allowed


def require_size(size: int, model: MoESpec) -> None:
    """Check that lists may have T experts.

    Raises:
        CoterieError: T is below K-1 or above E-1.
    """
    low, high = max(model.top_k - 1, 0), model.num_experts - 1
    if not low <= size <= high:
        raise CoterieError(
            f"T {size}: a token's other {low} experts come from a list of T, so it must be between {low} (K-1) and "
            f"{high} (all others)"
        )


def _coactivation(profile: Profile) -> Int64s:
    """Over all domains, int64 (L, E, E)."""
    together: Int64s = profile.counts.coactivation.sum(axis=0)
    if profile.model.top_k > 1 and not together.any():
        remedy = profile.provenance.get("to_get_tokens", "record token sets")
        raise CoterieError(f"the profile holds no co-activation, which lists of collaborators are made of: {remedy}")
    return together


def collaborator_lists(profile: Profile, size: int) -> CollaboratorLists:
    """The `size` experts that fired most often together with each one, over all domains; ties go to the lower number.

    Raises:
        CoterieError: `size` is below K-1 or above E-1, or the profile holds no co-activation.
    """
    require_size(size, profile.model)
    together = _coactivation(profile)
    together[:, np.arange(together.shape[1]), np.arange(together.shape[1])] = -1  # itself comes last
    lists = np.argsort(-together, axis=2, kind="stable")[:, :, :size]
    return CollaboratorLists(profile.model, lists, {"profile": profile.digest, "device_aware": False})


def device_aware_lists(profile: Profile, placement: PlacementMap, size: int) -> CollaboratorLists:
    """Lists that fill up rank by rank: an expert's own ranks, then those of its node, then the others.

    Among them the rank whose experts fired most often together with it comes first, and likewise among the experts of
    a rank.  So a list of T reaches as few ranks as T experts can be on, and a token's first expert decides which.

    Raises:
        CoterieError: `size` is below K-1 or above E-1, the map is for another model, or the profile holds no
            co-activation.
    """
    require_size(size, profile.model)
    placement.require_model(profile.model)
    together_LEE = _coactivation(profile)
    lists = np.stack(
        [
            _fill_rank_by_rank(together_EE, slots_P, placement)[:, :size]
            for together_EE, slots_P in zip(together_LEE, placement.physical_to_logical_map, strict=True)
        ]
    )
    source = {"profile": profile.digest, "device_aware": True, "solver": placement.solver["name"]}
    return CollaboratorLists(profile.model, lists, source)


def _fill_rank_by_rank(together_EE: Int64s, slots_P: Int64s, placement: PlacementMap) -> Int64s:
    """One layer's order of all others for each expert, int64 (E, E-1)."""
    experts, topology = len(together_EE), placement.topology
    on_rank = ranks_held(slots_P, experts, topology.slots_per_rank, topology.num_ranks)
    with_rank_ER = together_EE @ on_rank.astype(np.int64)
    node_of_rank = np.arange(topology.num_ranks) // topology.ranks_per_node
    lists = np.empty((experts, experts - 1), dtype=np.int64)
    for expert in range(experts):
        own = on_rank[expert]
        on_own_node = np.isin(node_of_rank, node_of_rank[own])
        ranks = np.lexsort((np.arange(topology.num_ranks), -with_rank_ER[expert], ~on_own_node, ~own))
        best_first = np.argsort(-together_EE[expert], kind="stable")
        in_order = [other for rank in ranks for other in best_first[on_rank[best_first, rank]].tolist()]
        lists[expert] = [other for other in dict.fromkeys(in_order) if other != expert]
    return lists


def ranks_held(slots_P: Int64s, num_experts: int, slots_per_rank: int, num_ranks: int) -> npt.NDArray[np.bool_]:
    """Whether each rank holds a copy of each expert, bool (E, R)."""
    ranks_EX = ranks_of_experts(slots_P, num_experts, slots_per_rank)
    held = np.zeros((num_experts, num_ranks + 1), dtype=np.bool_)  # the last column takes the padding
    np.put_along_axis(held, ranks_EX, True, axis=1)
    return held[:, :num_ranks]


def select_from_lists(scores_TE: torch.Tensor, allowed_EE: torch.Tensor, top_k: int) -> torch.Tensor:
    """The best expert of each token and the best `top_k` - 1 that may join it, int64 (T, K), best first.

    Args:
        scores_TE: at least 0, such as a softmax.
        allowed_EE: bool, a layer of `CollaboratorLists.allowed`, on the same device.
    """
    first_T = scores_TE.argmax(dim=-1)
    return scores_TE.masked_fill(~allowed_EE[first_T], -1.0).topk(top_k, dim=-1).indices


def select_from_lists_reference(scores_TE: list[list[float]], lists_ET: list[list[int]], top_k: int) -> list[list[int]]:
    """`select_from_lists`, token by token; ties go to the lower number."""
    out = []
    for scores in scores_TE:
        first = max(range(len(scores)), key=lambda expert: (scores[expert], -expert))
        others = sorted(lists_ET[first], key=lambda expert: (-scores[expert], expert))
        out.append([first, *others[: top_k - 1]])
    return out
