"""Occult's collaboration pruning (arXiv 2505.13345): a token may visit at most N ranks, or N nodes. Knows no router.

A token opens ranks in the order of its top-k experts until it has N.  Then either the best K experts on those ranks are
taken (router-based), or picks elsewhere are replaced by the experts there that are most similar (similarity-based).
Where experts have copies, a pick opens the rank among theirs that serves most of the token's score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from operator import or_
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from placement.constraints.lists import ranks_held
from placement.placement_map import PlacementMap
from profiler.errors import CoterieError
from profiler.spec import MoESpec

Level = Literal["rank", "node"]

MOST_COMBINATIONS = 1_000_000
"""Of N places, over all layers, that are looked at one by one; takes about a second."""


@dataclass(frozen=True)
class RankLimit:
    """How many places a token may visit.

    Attributes:
        model: the MoE layers that the limit is for.
        held: bool (L, E, G), whether each of G ranks or nodes holds a copy of an expert.
        limit: N; none is needed from min(K, G) on, and nothing changes then.
        level: what the G places are.
        similarity: float32 (L, E, E), for similarity-based pruning; None for router-based.
        source: what it was made of, for people.

    Raises:
        CoterieError: N is below 1, or N places hold fewer than K experts; with copies and more than
            `MOST_COMBINATIONS` of places, also where they might.
    """

    model: MoESpec
    held: npt.NDArray[np.bool_]
    limit: int
    level: Level
    similarity: npt.NDArray[np.float32] | None
    source: Mapping[str, Any]

    def __post_init__(self) -> None:
        layers, experts, top_k = self.model.num_layers, self.model.num_experts, self.model.top_k
        if self.limit < 1:
            raise CoterieError(f"N {self.limit}: a token needs at least 1 {self.level} to go to")
        if self.held.ndim != 3 or self.held.shape[:2] != (layers, experts) or not self.held.any(axis=2).all():
            raise CoterieError(f"held {self.held.shape}: must give a {self.level} to each expert of each layer")
        if self.similarity is not None and self.similarity.shape != (layers, experts, experts):
            raise CoterieError(
                f"similarity {self.similarity.shape}: must be (layers, experts, experts) of {self.model.describe()}"
            )
        fewest, is_bound = self._fewest_experts()
        if fewest < top_k:
            hold = f"hold {fewest} experts for certain" if is_bound else f"may hold {fewest} experts only"
            raise CoterieError(
                f"N {self.limit}: so many {self.level}s {hold}, a token takes {top_k}; give a larger N or place the "
                f"experts on fewer {self.level}s"
            )

    def _fewest_experts(self) -> tuple[int, bool]:
        """The fewest distinct experts that N places hold; or a lower bound of it, and True.

        Where it is at least K, it may be a lower bound as well.
        """
        limit = min(self.limit, self.held.shape[2])
        sizes_LG = np.sort(self.held.sum(axis=1), axis=1)[:, :limit]
        copies = int(self.held.sum(axis=2).max())  # an expert is counted at most so often
        fewest_L = np.maximum(sizes_LG[:, -1], -(-sizes_LG.sum(axis=1) // min(copies, limit)))
        doubtful = np.flatnonzero((fewest_L < self.model.top_k) & (copies > 1))
        if len(doubtful) * math.comb(self.held.shape[2], limit) > MOST_COMBINATIONS:
            return int(fewest_L.min()), True
        for layer in doubtful:
            experts_G = [int.from_bytes(np.packbits(held_E).tobytes()) for held_E in self.held[layer].T]
            fewest_L[layer] = min(reduce(or_, some).bit_count() for some in combinations(experts_G, limit))
        return int(fewest_L.min()), False

    @property
    def name(self) -> str:
        """For tables."""
        how = "router" if self.similarity is None else "similarity"
        return f"{how}-based pruning, N={self.limit}{'' if self.level == 'rank' else ' nodes'}"


def limit_ranks(
    placement: PlacementMap,
    limit: int,
    similarity: npt.NDArray[np.float32] | None = None,
    *,
    level: Level = "rank",
    replica_aware: bool = True,
) -> RankLimit:
    """Let each token visit `limit` ranks, or nodes, of a placement map.

    Args:
        similarity: float32 (L, E, E), see `similarity.py`; None for router-based pruning.
        replica_aware: count all copies of an expert; otherwise only the first one, as engines do that know of no
            others.
    """
    model, topology = placement.model, placement.topology
    held_LER: npt.NDArray[np.bool_] = np.stack(
        [
            ranks_held(slots_P, model.num_experts, topology.slots_per_rank, topology.num_ranks)
            for slots_P in placement.physical_to_logical_map
        ]
    )
    if not replica_aware:
        held_LER[np.cumsum(held_LER, axis=2) > 1] = False
    if level == "node":
        by_node = held_LER.reshape(*held_LER.shape[:2], topology.num_nodes, topology.ranks_per_node)
        held_LER = np.asarray(by_node.any(axis=3))
    source = {"solver": placement.solver["name"], "replica_aware": replica_aware, "ranks": topology.num_ranks}
    return RankLimit(model, held_LER, limit, level, similarity, source)


def open_places(
    ids_TK: torch.Tensor, scores_TK: torch.Tensor, held_EG: torch.Tensor, limit: int, *, has_copies: bool
) -> torch.Tensor:
    """The places that each token may visit, bool (T, G).

    Args:
        ids_TK: the token's own picks, best first.
        scores_TK: their scores, at least 0.
        held_EG: bool, a layer of `RankLimit.held`, on the same device.
        has_copies: whether an expert may be in several places; if not, much is simpler.
    """
    opened_TG = _opened(ids_TK, scores_TK, held_EG, limit, has_copies=has_copies)
    if not has_copies:
        return opened_TG
    # Experts with fewer copies first, a token may need no more places than it may visit; then it keeps its picks.
    order_TK = held_EG[ids_TK].sum(dim=-1).argsort(dim=1, stable=True)
    ids_TK, scores_TK = ids_TK.gather(1, order_TK), scores_TK.gather(1, order_TK)
    needed_TG = _opened(ids_TK, scores_TK, held_EG, held_EG.shape[1], has_copies=True)
    return torch.where(needed_TG.sum(dim=-1, keepdim=True) <= limit, needed_TG, opened_TG)


def _opened(
    ids_TK: torch.Tensor, scores_TK: torch.Tensor, held_EG: torch.Tensor, limit: int, *, has_copies: bool
) -> torch.Tensor:
    """Places opened for one pick after the other, each time that which holds most of what is left, bool (T, G)."""
    held_TKG = held_EG[ids_TK]
    opened_TG = torch.zeros_like(held_TKG[:, 0])
    for k in range(ids_TK.shape[1]):
        mine_TG = held_TKG[:, k]
        if has_copies:
            left_TK = scores_TK.masked_fill((held_TKG & opened_TG[:, None]).any(dim=-1), 0.0)
            gain_TG = torch.einsum("tk,tkg->tg", left_TK, held_TKG.to(left_TK.dtype))
            best_T = gain_TG.masked_fill(~mine_TG, -1.0).argmax(dim=-1)
            new_TG = torch.nn.functional.one_hot(best_T, held_EG.shape[1]).bool()
        else:
            new_TG = mine_TG
        needed_T = ~(mine_TG & opened_TG).any(dim=-1) & (opened_TG.sum(dim=-1) < limit)
        opened_TG = opened_TG | (new_TG & needed_T[:, None])
    return opened_TG


def select_within_limit(
    scores_TE: torch.Tensor,
    held_EG: torch.Tensor,
    limit: int,
    top_k: int,
    similarity_EE: torch.Tensor | None,
    *,
    has_copies: bool,
) -> torch.Tensor:
    """K experts of each token in at most `limit` places, int64 (T, K).

    Args:
        scores_TE: at least 0, such as a softmax.
        similarity_EE: a layer of `RankLimit.similarity`; None takes the best experts by score.
    """
    best = scores_TE.topk(top_k, dim=-1)
    opened_TG = open_places(best.indices, best.values, held_EG, limit, has_copies=has_copies)
    inside_TE = opened_TG.to(scores_TE.dtype) @ held_EG.to(scores_TE.dtype).T > 0
    if similarity_EE is None:
        return scores_TE.masked_fill(~inside_TE, -1.0).topk(top_k, dim=-1).indices
    return _replace_by_similar(best.indices, inside_TE, similarity_EE)


def _replace_by_similar(ids_TK: torch.Tensor, inside_TE: torch.Tensor, similarity_EE: torch.Tensor) -> torch.Tensor:
    stays_TK = inside_TE.gather(1, ids_TK)
    free_TE = inside_TE.scatter(1, ids_TK, False)
    chosen = []
    for k in range(ids_TK.shape[1]):
        similar_TE = similarity_EE[ids_TK[:, k]].masked_fill(~free_TE, -torch.inf)
        chosen.append(torch.where(stays_TK[:, k], ids_TK[:, k], similar_TE.argmax(dim=-1)))
        free_TE = free_TE.scatter(1, chosen[-1][:, None], False)
    return torch.stack(chosen, dim=1)


def select_within_limit_reference(
    scores_TE: list[list[float]],
    held_EG: list[list[bool]],
    limit: int,
    top_k: int,
    similarity_EE: list[list[float]] | None,
) -> list[list[int]]:
    """`select_within_limit`, token by token; ties go to the lower number."""

    def opened_for(picks: list[int], scores: list[float], most: int) -> set[int]:
        opened = set[int]()
        for pick in picks:
            places = [place for place, held in enumerate(held_EG[pick]) if held]
            if opened.intersection(places) or len(opened) == most:
                continue
            left = [other for other in picks if not any(held_EG[other][place] for place in opened)]
            gain = {place: sum(scores[other] for other in left if held_EG[other][place]) for place in places}
            opened.add(max(places, key=lambda place: (gain[place], -place)))
        return opened

    out = []
    for scores in scores_TE:
        by_score = sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))
        picks = by_score[:top_k]
        opened = opened_for(sorted(picks, key=lambda expert: sum(held_EG[expert])), scores, len(held_EG[0]))
        if len(opened) > limit:
            opened = opened_for(picks, scores, limit)
        inside = {expert for expert in by_score if any(held_EG[expert][place] for place in opened)}
        if similarity_EE is None:
            out.append([expert for expert in by_score if expert in inside][:top_k])
            continue
        free = inside - set(picks)
        chosen = []
        for pick in picks:
            if pick not in inside:
                similar = similarity_EE[pick]
                pick = max(free, key=lambda expert: (similar[expert], -expert))
                free.remove(pick)
            chosen.append(pick)
        out.append(chosen)
    return out
