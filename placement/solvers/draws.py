"""Plans judged on sequences drawn anew with replacement (Efron, Annals of Statistics 7, 1979).
Knows neither how plans are found nor the norms that descents take.

Of plans that are equally good on the planned tokens, one may owe it to a few sequences.  Drawn anew, these come twice
or not at all, and the plan's busiest rank is another one: the mean over draws of the busiest rank says more of traffic
that is yet to come than the busiest rank of the tokens themselves.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from placement.layer_problem import Draws, Objective
from placement.topology import Topology

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NUM_DRAWS = 200
"""Draws of the sequences: enough for the mean over them to tell plans apart, and few beside a descent."""

OF_ONE_FOLD = 10
"""One draw in so many is of one fold's sequences only, so that plans are also judged on another mixture of traffic."""

MOST_PARTS = 1024
"""Where there are more sequences, so many parts of them are drawn."""


def drawn_parts(sequence_T: Ints, fold_T: Ints, seed: int) -> tuple[Ints, Floats]:
    """Draws with replacement of as many sequences as there are.

    Args:
        sequence_T: int64 (T,), the sequence of each token, 0 .. S-1.
        fold_T: int64 (T,), the fold of each token, the same for all tokens of a sequence.

    Returns:
        The part of each token, int64 (T,): its sequence, or where there are more than `MOST_PARTS` one of so many parts
        of sequences of one fold; and how often each draw holds each part, float64 (B, parts).
    """
    _, first = np.unique(sequence_T, return_index=True)
    fold_S = fold_T[first]
    num_folds = int(fold_S.max()) + 1
    part_S = np.empty(len(fold_S), dtype=np.int64)
    fold_of_part: list[int] = []
    for fold in range(num_folds):
        members = np.flatnonzero(fold_S == fold)
        parts = min(len(members), max(1, MOST_PARTS * len(members) // len(fold_S)))
        part_S[members] = len(fold_of_part) + np.arange(len(members)) * parts // len(members)
        fold_of_part += parts * [fold]
    num_parts = len(fold_of_part)
    rng = np.random.default_rng(seed)
    times = np.empty((NUM_DRAWS, num_parts))
    for draw in range(NUM_DRAWS):
        fold = draw // OF_ONE_FOLD % num_folds
        held = np.array(fold_of_part) == fold if draw % OF_ONE_FOLD == 0 else np.ones(num_parts, dtype=np.bool_)
        times[draw] = rng.multinomial(held.sum(), held / held.sum())
    return part_S[sequence_T], times


def mean_over_draws(draws: Draws, rank_of: Ints, topology: Topology, objective: Objective) -> float:
    """The objective of a plan without copies, mean over draws; of pairs that are not on one rank it knows nothing.

    Args:
        rank_of: int64 (E,).
    """
    times_BS = draws.times
    reached_SR, load_SR = _by_sequence(draws, rank_of, topology.num_ranks)
    tokens_S = np.bincount(draws.sequence, draws.weights, minlength=times_BS.shape[1])
    tokens_B = np.maximum(times_BS @ tokens_S, 1e-300)
    reached_BR = times_BS @ reached_SR
    value = objective.ingress * _busiest(reached_BR, tokens_B)
    value += objective.fan_out * float((reached_BR.sum(axis=1) / tokens_B).mean())
    if objective.node_ingress and topology.num_nodes > 1:
        node_of = rank_of // topology.ranks_per_node
        reached_SN, _ = _by_sequence(draws, node_of, topology.num_nodes)
        value += objective.node_ingress * _busiest(times_BS @ reached_SN, tokens_B)
    load_BR = times_BS @ load_SR
    return value + objective.load * _busiest(load_BR, np.maximum(load_BR.mean(axis=1), 1e-300))


def _busiest(values_BR: Floats, of_B: Floats) -> float:
    """The largest value of each draw as a share of it, mean over draws."""
    return float((values_BR.max(axis=1) / of_B).mean())


def _by_sequence(draws: Draws, place_of: Ints, num_places: int) -> tuple[Floats, Floats]:
    """Tokens of each sequence that reach each place, and their picks there, float64 (S, places) both."""
    reached, load = np.zeros((2, draws.times.shape[1], num_places))
    _count(draws.ids, draws.sequence, draws.weights, place_of, reached, load)
    return reached, load


@numba.njit(cache=True, nogil=True)
def _count(
    ids_TK: npt.NDArray[np.unsignedinteger],
    sequence_T: Ints,
    weights_T: Floats,
    place_of: Ints,
    reached: Floats,
    load: Floats,
) -> None:
    last = np.full(reached.shape[1], -1, np.int64)  # the last token that came to each place
    for token in range(len(ids_TK)):
        sequence, weight = sequence_T[token], weights_T[token]
        for expert in ids_TK[token]:
            if expert < len(place_of):
                place = place_of[expert]
                load[sequence, place] += weight
                if last[place] != token:
                    last[place] = token
                    reached[sequence, place] += weight
