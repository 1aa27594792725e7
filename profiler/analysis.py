"""What a routing trace says about the model: who works with whom, and what chance alone would give."""

from __future__ import annotations

from dataclasses import replace

import networkx as nx
import numpy as np
import numpy.typing as npt

from profiler.profile import TokenTrace


def collaboration_graph(
    coactivation_EE: npt.NDArray[np.int64], load_E: npt.NDArray[np.int64], edges_per_expert: int = 3
) -> nx.Graph[int]:
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


def shuffled(tokens: TokenTrace, seed: int) -> TokenTrace:
    """Routing without collaboration: every layer's picks dealt anew to the tokens, each expert as often as before.

    Picks are permuted over all tokens of a layer; where a token then holds an expert twice, one of the two is exchanged
    with a pick drawn at random until none does.  Loads are kept exactly, co-activation is left to chance.
    """
    rng = np.random.default_rng(seed)
    layers = []
    for ids_TK in tokens.topk_ids:
        dealt = rng.permutation(ids_TK.ravel()).reshape(ids_TK.shape)
        while len(clashes := _doubled(dealt)):
            partners = rng.integers(0, dealt.size, len(clashes))
            for clash, partner in zip(clashes, partners, strict=True):  # in turn: two may name the same partner
                dealt.flat[[clash, partner]] = dealt.flat[[partner, clash]]
        layers.append(dealt)
    return replace(tokens, topk_ids=np.stack(layers))


def _doubled(ids_TK: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.int64]:
    """Flat positions of picks that repeat an earlier pick of the same token."""
    order = np.argsort(ids_TK, axis=1, kind="stable")
    ordered = np.take_along_axis(ids_TK, order, axis=1)
    rows, columns = np.nonzero(ordered[:, 1:] == ordered[:, :-1])
    flat: npt.NDArray[np.int64] = rows * ids_TK.shape[1] + order[rows, columns + 1]
    return flat
