"""What a map does to traffic and balance: the metrics of every table, exact on token sets.
Knows no solver, no links and no seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from placement.choice import Choice, choose, choose_ranks, first_load, nearest_ranks, ranks_of_experts
from placement.placement_map import PlacementMap
from profiler.trace import TokenTrace

FloatsL = npt.NDArray[np.float64]
FloatsLR = npt.NDArray[np.float64]


FIGURES = ("busiest_ingress", "fan_out", "imbalance_ratio")
"""Attributes of `Metrics` that plans are judged by, as means over layers."""

SUMMARISED = ("fan_out", "busiest_ingress", "imbalance_ratio", "intra_share", "node_fan_out", "busiest_node_ingress")
"""Attributes of `Metrics` that its summary has, in the order of tables."""


@dataclass(frozen=True)
class Metrics:
    """Figures of one map on one trace.

    Attributes:
        fan_out: float64 (L,), mean over tokens of the distinct ranks that serve a token.
        ingress: float64 (L, R), share of all tokens with at least one expert on the rank.
        load: float64 (L, R), (token, expert) pairs served by the rank.
        intra_share: float64 (L,), co-activated pairs on one rank / all of them; NaN for top-1 models, which have none.
        node_fan_out: float64 (L,), mean over tokens of the distinct nodes that serve a token.
        node_ingress: float64 (L, N), share of all tokens with at least one expert on the node.
        picked_share: float64 (L,), picks that went to an expert / all picks.
    """

    fan_out: FloatsL
    ingress: FloatsLR
    load: FloatsLR
    intra_share: FloatsL
    node_fan_out: FloatsL
    node_ingress: FloatsLR
    picked_share: FloatsL

    @property
    def busiest_ingress(self) -> FloatsL:
        """float64 (L,), the largest ingress of a rank."""
        busiest: FloatsL = self.ingress.max(axis=1)
        return busiest

    @property
    def busiest_node_ingress(self) -> FloatsL:
        """float64 (L,), the largest ingress of a node."""
        busiest: FloatsL = self.node_ingress.max(axis=1)
        return busiest

    @property
    def load_share(self) -> FloatsLR:
        """float64 (L, R), share of all (token, expert) pairs that the rank serves; 0 in a layer without any."""
        share: FloatsLR = self.load / np.maximum(self.load.sum(axis=1, keepdims=True), 1)
        return share

    @property
    def imbalance_ratio(self) -> FloatsL:
        """float64 (L,), the largest load of a rank over the mean load, at least 1; 1 in a layer without picks."""
        return imbalance(self.load)

    def summary(self) -> dict[str, dict[str, float | None]]:
        """For each metric its mean over layers and its worst layer; None where it is not defined."""
        return {
            name: summarise(getattr(self, name), np.min if name == "intra_share" else np.max) for name in SUMMARISED
        }


def imbalance(load: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The largest load over the mean of the last axis, R ranks, float64; 1 where there is none."""
    most, mean = load.max(axis=-1), load.mean(axis=-1)
    return np.where(mean > 0, most / np.where(mean > 0, mean, 1), 1.0)


def summarise(values_L: FloatsL, worst: Any = np.max) -> dict[str, float | None]:
    """Mean over layers and the worst layer; None where they are not defined."""
    return {"mean": _finite(np.mean(values_L)), "worst": _finite(worst(values_L))}


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def evaluate(
    placement: PlacementMap,
    tokens: TokenTrace,
    choice: Choice = "token",
    batch_of_token: npt.NDArray[np.int64] | None = None,
) -> Metrics:
    """Measure a map on token sets.

    Args:
        choice: who chooses among the copies of an expert.  Under "source" each token counts as coming from every rank
            equally.
        batch_of_token: int64 (T,), which tokens one rank sent together, as a run does; batch b is one of rank b % R,
            its tokens choose in their order.  Makes a difference to maps with redundant experts only; None where it is
            not known: then all tokens choose in a mixed order.
    """
    topology, num_experts = placement.topology, placement.model.num_experts
    num_ranks, no_expert = topology.num_ranks, np.iinfo(tokens.topk_ids.dtype).max
    layers: list[Mapping[str, Any]] = []
    for ids_TK, slots_P in zip(tokens.topk_ids, placement.physical_to_logical_map, strict=True):
        ranks_EX = ranks_of_experts(slots_P, num_experts, topology.slots_per_rank)
        several = ranks_EX.shape[1] > 1
        per_source = nearest_ranks(ranks_EX, topology)[:, :, None] if choice == "source" and several else ranks_EX[None]
        together = ids_TK[mixed_order(len(ids_TK))] if several else ids_TK
        parts = [(together, ranks, np.zeros(num_ranks)) for ranks in per_source]
        repeats = len(parts)
        if batch_of_token is not None and several:
            parts, repeats = [], 1
            for batch in np.unique(batch_of_token):
                source = int(batch) % num_ranks
                ranks = per_source[source % len(per_source)]
                parts.append((ids_TK[batch_of_token == batch], ranks, first_load(source, num_ranks)))
        sums = [
            _walk(ids, no_expert, np.ascontiguousarray(ranks), topology.num_nodes, topology.ranks_per_node, load)
            for ids, ranks, load in parts
        ]
        reached, load, node_reached, intra, pairs = (np.sum(part, axis=0) / repeats for part in zip(*sums, strict=True))
        layers.append(
            {
                "fan_out": reached.sum() / len(ids_TK),
                "ingress": reached / len(ids_TK),
                "load": load,
                "intra_share": intra / pairs if pairs else np.nan,
                "node_fan_out": node_reached.sum() / len(ids_TK),
                "node_ingress": node_reached / len(ids_TK),
                "picked_share": load.sum() / ids_TK.size,
            }
        )
    return Metrics(**{name: np.array([layer[name] for layer in layers]) for name in layers[0]})


def serving_ranks(placement: PlacementMap, tokens: TokenTrace) -> Iterator[npt.NDArray[np.int64]]:
    """The rank that serves each pick, for each layer int64 (T, K), -1 for no expert; copies as `evaluate` has it.

    One layer at a time: all of them take eight times the memory of the profile.
    """
    topology = placement.topology
    order = mixed_order(tokens.num_tokens)
    layers = zip(tokens.topk_ids, tokens.picked, placement.physical_to_logical_map, strict=True)
    for ids_TK, picked_TK, slots_P in layers:
        ranks_EX = ranks_of_experts(slots_P, placement.model.num_experts, topology.slots_per_rank)
        experts_TK = np.where(picked_TK, ids_TK.astype(np.int64), -1)[order]  # -1 does not fit the ids' own type
        load = np.zeros(topology.num_ranks)
        out_TK = np.empty(ids_TK.shape, dtype=np.int64)
        out_TK[order] = choose_ranks(experts_TK, np.ascontiguousarray(ranks_EX), topology.ranks_per_node, load)
        yield out_TK


def fan_out_counts(placement: PlacementMap, tokens: TokenTrace) -> npt.NDArray[np.int64]:
    """Tokens by the number of distinct ranks that serve them, int64 (L, 1 + min(K, R)); a row's sum is T."""
    most = min(placement.model.top_k, placement.topology.num_ranks)
    rows = []
    for ranks_TK in serving_ranks(placement, tokens):
        ranks_TK = np.sort(ranks_TK, axis=1)
        distinct_T = (ranks_TK[:, :1] >= 0).sum(axis=1) + (
            (ranks_TK[:, 1:] != ranks_TK[:, :-1]) & (ranks_TK[:, 1:] >= 0)
        ).sum(axis=1)
        rows.append(np.bincount(distinct_T, minlength=1 + most))
    return np.stack(rows)


def mixed_order(num_tokens: int) -> npt.NDArray[np.int64]:
    """The order in which tokens choose among copies, int64 (T,).

    Ties go by the load so far.  A batch mixes sequences, while a file holds one domain after another, so that in its
    order the last ones could not make good what the first ones piled up.
    """
    return np.random.default_rng(0).permutation(num_tokens)


@numba.njit(cache=True, nogil=True)
def _walk(
    ids_TK: npt.NDArray[np.unsignedinteger],
    no_expert: int,
    ranks_EX: npt.NDArray[np.int64],
    num_nodes: int,
    ranks_per_node: int,
    load_so_far: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64], float, float]:
    """Tokens that reach each rank, pairs that each serves, tokens that reach each node, intra pairs, all pairs."""
    num_tokens, top_k = ids_TK.shape
    num_ranks = num_nodes * ranks_per_node
    reached, load, node_reached = np.zeros(num_ranks), np.zeros(num_ranks), np.zeros(num_nodes)
    served, node_served = np.zeros(num_ranks, np.int64), np.zeros(num_nodes, np.int64)
    experts, chosen = np.empty(top_k, np.int64), np.empty(top_k, np.int64)
    intra, pairs = 0.0, 0.0
    for token in range(num_tokens):
        picks = 0
        for k in range(top_k):
            expert = np.int64(ids_TK[token, k])
            experts[k] = -1 if expert == no_expert else expert
            picks += expert != no_expert
        pairs += picks * (picks - 1) / 2
        choose(experts, ranks_EX, ranks_per_node, load_so_far, served, node_served, chosen)
        for rank in chosen:
            if rank >= 0:
                load[rank] += 1
                load_so_far[rank] += 1
                if served[rank]:
                    reached[rank] += 1
                    intra += served[rank] * (served[rank] - 1) / 2
                    served[rank] = 0
                if node_served[rank // ranks_per_node]:
                    node_reached[rank // ranks_per_node] += 1
                    node_served[rank // ranks_per_node] = 0
    return reached, load, node_reached, intra, pairs
