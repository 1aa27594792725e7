"""What a profile says about the model, each result a pandas DataFrame: load, collaboration, communities, affinity.
Knows no plan.

Layers are named by their number in the model, experts by their number in the layer.  All is counted over all domains;
give a profile of one domain (`Profile.split_by_domain`) for that domain alone.  How two profiles differ is in
`drift.py`.
"""

from __future__ import annotations

import networkx as nx
import numpy as np
import numpy.typing as npt
import pandas as pd

from profiler.errors import CoterieError
from profiler.profile import Profile

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

HOT_FROM = 2.0
"""Load over the layer's mean from which an expert is called hot: one that fills two fair shares of a rank's work."""
COLD_BELOW = 0.5
"""Load over the layer's mean below which an expert is called cold."""
SPECIALIZED_BELOW = 0.5
"""Effective collaborators, as a share of the other experts, below which an expert is called specialized."""


def load_table(profile: Profile) -> pd.DataFrame:
    """How even each layer's load is.

    Returns:
        A row for each layer: `layer`; `expert_imbalance`, the hottest expert's load over the mean (1 is even);
        `hottest`, that expert; `effective_experts`, 2 to the entropy of the load in bits, the number of equally loaded
        experts that would be as uneven (Hill's number of order 1, Ecology 54, 1973); `hot`, `cold`, `dead`, experts of
        each kind as in `expert_table`.
    """
    load_LE = total_load(profile)
    relative_LE = relative_load(load_LE)
    return pd.DataFrame(
        {
            "layer": profile.model.layer_ids,
            "expert_imbalance": relative_LE.max(axis=1),
            "hottest": load_LE.argmax(axis=1),
            "effective_experts": 2.0 ** entropy(load_LE),
            "hot": (relative_LE >= HOT_FROM).sum(axis=1),
            "cold": ((relative_LE < COLD_BELOW) & (load_LE > 0)).sum(axis=1),
            "dead": (load_LE == 0).sum(axis=1),
        }
    )


def expert_table(profile: Profile, top: int | None = None) -> pd.DataFrame:
    """Every expert: how much it does, and with how many others.

    The row of an expert in the co-activation matrix, as shares, says how its partners are spread.  C2R (arXiv
    2504.01337) tells experts that work with many others, *collaborative* ones, from *specialized* ones that keep to
    few; where the line is drawn here (`SPECIALIZED_BELOW`) is this project's.

    Args:
        top: partners that `top_share` counts; the model's top-k less one if None.

    Returns:
        A row for each layer and expert: `layer`, `expert`; `load`, tokens; `share` of all tokens; `relative_load`, over
        the layer's mean; `heat`, one of hot, usual, cold, dead; `collaborators`, 2 to the entropy of the row, as many
        equal partners would be spread as wide; `top_share`, the row's share with its strongest `top` partners;
        `specialization` in bits, the Kullback-Leibler divergence of the row from the partners' loads (0 is chance:
        what is above says how much the expert tells about its company); `role`, collaborative, specialized or none
        (without a partner, as in top-1 models).
    """
    load_LE, pairs_LEE = total_load(profile), total_coactivation(profile)
    num_layers, num_experts = load_LE.shape
    top = max(profile.model.top_k - 1, 1) if top is None else top
    if not top >= 1:
        raise CoterieError(f"top {top}: must be at least 1 partner")
    relative_LE = relative_load(load_LE)
    collaborators_LE = 2.0 ** entropy(pairs_LEE)
    worked_LE = pairs_LEE.sum(axis=2)
    heat = np.select(
        [load_LE == 0, relative_LE >= HOT_FROM, relative_LE < COLD_BELOW], ["dead", "hot", "cold"], "usual"
    )
    few = collaborators_LE < SPECIALIZED_BELOW * (num_experts - 1)
    role = np.select([worked_LE == 0, few], ["none", "specialized"], "collaborative")
    strongest = np.sort(pairs_LEE, axis=2)[:, :, ::-1][:, :, :top].sum(axis=2)
    columns = {
        "load": load_LE,
        "share": load_LE / profile.num_tokens,
        "relative_load": relative_LE,
        "heat": heat,
        "collaborators": np.where(worked_LE > 0, collaborators_LE, 0.0),
        "top_share": strongest / np.maximum(worked_LE, 1),
        "specialization": np.stack([_specialization(*layer) for layer in zip(pairs_LEE, load_LE, strict=True)]),
        "role": role,
    }
    return pd.DataFrame(
        {
            "layer": np.repeat(profile.model.layer_ids, num_experts),
            "expert": np.tile(np.arange(num_experts), num_layers),
            **{name: values.ravel() for name, values in columns.items()},
        }
    )


def collaborator_table(profile: Profile, top: int = 8) -> pd.DataFrame:
    """Each expert's partners, the strongest first: the lists that C2R (arXiv 2504.01337) draws Top-T from.

    Returns:
        A row for each layer, expert and one of its first `top` partners: `layer`, `expert`, `place` from 1, `partner`,
        `together` in tokens, `share` of the expert's tokens, `lift`, how many times as often as chance (`lift`).
        Partners that an expert never fires with are left out.
    """
    rows = []
    loads_LE, pairs_LEE = total_load(profile), total_coactivation(profile)
    for layer, load_E, pairs_EE in zip(profile.model.layer_ids, loads_LE, pairs_LEE, strict=True):
        num_experts = len(load_E)
        order = np.argsort(-pairs_EE, axis=1, kind="stable")[:, : min(top, num_experts - 1)]
        together = np.take_along_axis(pairs_EE, order, axis=1)
        frame = pd.DataFrame(
            {
                "layer": layer,
                "expert": np.repeat(np.arange(num_experts), order.shape[1]),
                "place": np.tile(np.arange(1, order.shape[1] + 1), num_experts),
                "partner": order.ravel(),
                "together": together.ravel(),
                "share": (together / np.maximum(load_E, 1)[:, None]).ravel(),
                "lift": np.take_along_axis(lift(pairs_EE, load_E), order, axis=1).ravel(),
            }
        )
        rows.append(frame[frame["together"] > 0])
    return pd.concat(rows, ignore_index=True)


def community_table(profile: Profile, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Groups of experts that fire together more than their loads explain.

    Louvain's method (Blondel et al., Journal of Statistical Mechanics P10008, 2008) on the co-activation graph;
    modularity (Newman and Girvan, Physical Review E 69, 026113, 2004) is the share of co-activations inside the
    communities less what chance would put there.

    Returns:
        By layer: `layer`, `communities` of two experts or more, `largest` (experts), `modularity` (0 to 1; below 0.05
        there is little to place together, above 0.3 the communities are marked).  By expert: `layer`, `expert`,
        `community`, numbered by their load from 0.
    """
    of_layers, of_experts = [], []
    loads_LE, pairs_LEE = total_load(profile), total_coactivation(profile)
    for layer, load_E, pairs_EE in zip(profile.model.layer_ids, loads_LE, pairs_LEE, strict=True):
        graph = nx.from_numpy_array(pairs_EE)
        parts = nx.community.louvain_communities(graph, weight="weight", seed=seed) if pairs_EE.any() else []
        found = sorted(parts, key=lambda part: (-load_E[sorted(part)].sum(), min(part)))
        community_E = np.arange(len(load_E)) if not found else np.empty(len(load_E), dtype=np.int64)
        for number, part in enumerate(found):
            community_E[sorted(part)] = number
        of_layers.append(
            {
                "layer": layer,
                "communities": sum(len(part) > 1 for part in found),
                "largest": max((len(part) for part in found), default=1),
                "modularity": nx.community.modularity(graph, found, weight="weight") if found else 0.0,
            }
        )
        of_experts.append(pd.DataFrame({"layer": layer, "expert": np.arange(len(load_E)), "community": community_E}))
    return pd.DataFrame(of_layers), pd.concat(of_experts, ignore_index=True)


def affinity_table(profile: Profile) -> pd.DataFrame:
    """How much the experts of one MoE layer tell about those of the next one, which ExFlow (arXiv 2401.08383) uses.

    Returns:
        A row for each pair of adjacent MoE layers: `layer`, `next_layer`; `affinity` in bits, the mutual information of
        a token's expert here and there; `chance` in bits, about what that many tokens would show without any affinity
        (Miller's correction, 1955); `top_share`, the share of transitions that lead to an expert's commonest
        successor, and `top_share_chance`, what it would be if successors followed their loads alone.
    """
    rows = []
    ids = profile.model.layer_ids
    for layer, following, counts_EE in zip(ids, ids[1:], profile.counts.transition.sum(axis=0), strict=False):
        total = max(counts_EE.sum(), 1)
        out_E, in_E = counts_EE.sum(axis=1), counts_EE.sum(axis=0)
        bits = entropy(out_E) + entropy(in_E) - entropy(counts_EE.ravel())
        freedom = (counts_EE > 0).sum() - (out_E > 0).sum() - (in_E > 0).sum() + 1
        rows.append(
            {
                "layer": layer,
                "next_layer": following,
                "affinity": max(float(bits), 0.0),
                "chance": max(float(freedom), 0.0) / (2 * np.log(2) * total),
                "top_share": counts_EE.max(axis=1).sum() / total,
                "top_share_chance": in_E.max() / total,
            }
        )
    columns = ["layer", "next_layer", "affinity", "chance", "top_share", "top_share_chance"]
    return pd.DataFrame(rows, columns=columns)


def flow_table(profile: Profile, top: int = 3) -> pd.DataFrame:
    """Where each expert's tokens go in the next MoE layer.

    Returns:
        A row for each layer but the last, expert, and one of its `top` commonest successors: `layer`, `expert`,
        `next_layer`, `next_expert`, `tokens`, `share` of the expert's tokens, `lift` over what the successor's load
        alone would give.
    """
    rows = []
    ids, loads_LE = profile.model.layer_ids, total_load(profile)
    for index, counts_EE in enumerate(profile.counts.transition.sum(axis=0)):
        load_E, next_E = loads_LE[index], loads_LE[index + 1]
        order = np.argsort(-counts_EE, axis=1, kind="stable")[:, :top]
        tokens = np.take_along_axis(counts_EE, order, axis=1)
        share = tokens / np.maximum(load_E, 1)[:, None]
        chance = np.maximum(next_E, 1) / profile.num_tokens
        frame = pd.DataFrame(
            {
                "layer": ids[index],
                "expert": np.repeat(np.arange(len(load_E)), order.shape[1]),
                "next_layer": ids[index + 1],
                "next_expert": order.ravel(),
                "tokens": tokens.ravel(),
                "share": share.ravel(),
                "lift": (share / chance[order]).ravel(),
            }
        )
        rows.append(frame[frame["tokens"] > 0])
    columns = ["layer", "expert", "next_layer", "next_expert", "tokens", "share", "lift"]
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=columns)


def sharing_table(profile: Profile, rank_of_expert: Int64s) -> pd.DataFrame:
    """How much of each expert's collaboration stays on its rank: intra and inter of Occult (arXiv 2505.13345).

    Args:
        rank_of_expert: int64 (L, E).

    Returns:
        A row for each layer and expert: `layer`, `expert`, `rank`, `intra` and `inter` in co-activated pairs,
        `intra_share`.  A layer's own share is the sum of `intra` over that of both.

    Raises:
        CoterieError: the ranks are not of this model's layers and experts.
    """
    pairs_LEE = total_coactivation(profile)
    if rank_of_expert.shape != pairs_LEE.shape[:2]:
        raise CoterieError(
            f"ranks of {rank_of_expert.shape} (layers, experts): the profile has {pairs_LEE.shape[:2]}; give its map"
        )
    same_LEE = rank_of_expert[:, :, None] == rank_of_expert[:, None, :]
    intra_LE, all_LE = (pairs_LEE * same_LEE).sum(axis=2), pairs_LEE.sum(axis=2)
    num_layers, num_experts = intra_LE.shape
    return pd.DataFrame(
        {
            "layer": np.repeat(profile.model.layer_ids, num_experts),
            "expert": np.tile(np.arange(num_experts), num_layers),
            "rank": rank_of_expert.ravel(),
            "intra": intra_LE.ravel(),
            "inter": (all_LE - intra_LE).ravel(),
            "intra_share": (intra_LE / np.maximum(all_LE, 1)).ravel(),
        }
    )


def collaboration_graph(coactivation_EE: Int64s, load_E: Int64s, edges_per_expert: int = 3) -> nx.Graph[int]:
    """The strongest collaborations of one layer: each expert joined to those it fires with most.

    Nodes carry `load`; edges carry `weight`, the pair's co-activations over the layer's largest, as Occult (arXiv
    2505.13345) normalises its collaboration graph.

    Args:
        edges_per_expert: partners that each expert names; an edge is kept where either end names the other.
    """
    graph: nx.Graph[int] = nx.Graph()
    for expert, load in enumerate(load_E.tolist()):
        graph.add_node(expert, load=load)
    largest = max(int(coactivation_EE.max()), 1)
    for expert, row in enumerate(coactivation_EE):
        for partner in np.argsort(-row, kind="stable")[:edges_per_expert].tolist():
            if row[partner] > 0:
                graph.add_edge(expert, partner, weight=float(row[partner]) / largest)
    return graph


def total_load(profile: Profile) -> Int64s:
    """Tokens that picked each expert, over all domains, int64 (L, E)."""
    total: Int64s = profile.counts.load.sum(axis=0)
    return total


def total_coactivation(profile: Profile) -> Int64s:
    """Tokens that picked both experts, over all domains, int64 (L, E, E)."""
    total: Int64s = profile.counts.coactivation.sum(axis=0)
    return total


def relative_load(load_LE: Int64s) -> Floats:
    """Load over the layer's mean, float64 (L, E); all zero where a layer has no load."""
    relative: Floats = load_LE / np.maximum(load_LE.mean(axis=1, keepdims=True), 1e-300)
    return relative


def lift(coactivation_EE: Int64s, load_E: Int64s) -> Floats:
    """How many times as often pairs fire together as they would by their loads alone, float64 (E, E).

    Chance gives a pair the product of its two loads, scaled so that all pairs have as many co-activations as were
    counted.  0 where one of the two is never picked, and for an expert with itself.
    """
    chance = np.outer(load_E, load_E).astype(np.float64)
    np.fill_diagonal(chance, 0.0)
    chance *= coactivation_EE.sum() / max(chance.sum(), 1.0)
    return np.divide(coactivation_EE, chance, out=np.zeros_like(chance), where=chance > 0)


def entropy(counts: npt.NDArray[np.int64] | Floats) -> Floats:
    """Bits of the distribution along the last axis; 0 where all counts are 0."""
    total = counts.sum(axis=-1, keepdims=True)
    share = np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
    bits: Floats = -(share * np.log2(share, out=np.zeros_like(share), where=share > 0)).sum(axis=-1)
    return bits


def _specialization(pairs_EE: Int64s, load_E: Int64s) -> Floats:
    """Divergence of each row from the other experts' loads, bits, float64 (E,)."""
    rows = pairs_EE.sum(axis=1, keepdims=True)
    share = np.divide(pairs_EE, rows, out=np.zeros(pairs_EE.shape), where=rows > 0)
    others = (load_E.sum() - load_E)[:, None]
    chance = np.divide(load_E[None, :], others, out=np.zeros(pairs_EE.shape), where=others > 0)
    ratio = np.divide(share, chance, out=np.ones(pairs_EE.shape), where=(share > 0) & (chance > 0))
    bits: Floats = (share * np.log2(ratio)).sum(axis=1)
    return bits.clip(min=0.0)
