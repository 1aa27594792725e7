"""Fan-out only: Mt-KaHyPar's partition of the hypergraph of token sets. It knows nothing of load."""

from __future__ import annotations

from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.layer_problem import LayerProblem
from placement.placement_map import slots_of_ranks
from placement.solvers.contract import Slots
from placement.solvers.copies import with_copies
from placement.solvers.equal_sizes import RankOfExpert, equal_sizes, with_best_swaps, with_equal_sizes
from profiler.errors import CoterieError

MAX_PINS = 60_000
"""Sets times their size.  Where tokens picked more distinct sets, only the heaviest count: time grows with them (7,500
sets of 8 on 32 ranks take about 4 s a start)."""

NUM_STARTS = 2
"""Orders of the experts that are partitioned; each may take seconds, see `MAX_PINS`."""

_one_at_a_time = Lock()  # Mt-KaHyPar's seed and threads belong to the process


def hypergraph(problem: LayerProblem, rng: np.random.Generator) -> Slots:
    """Experts are nodes and token sets weighted hyperedges: the connectivity objective (km1) is the fan-out less one.

    Mt-KaHyPar (Gottesbüren et al., 2022) at its preset `DETERMINISTIC_QUALITY`, since `QUALITY` does not always repeat
    itself even on one thread.  Experts weigh one each and no rank may exceed its equal share.  With so little slack its
    local search, which moves one node at a time, has nowhere to go, so that its own seeds differ little: starts differ
    in the order of experts instead, and each result is also tried after swaps that raise the co-activation inside
    ranks.  The least connectivity is taken.

    Raises:
        CoterieError: Mt-KaHyPar is not installed.
    """
    rank_of = _partition(problem.merged(), rng)
    return with_copies(slots_of_ranks(rank_of, problem.topology), problem)


def _partition(problem: LayerProblem, rng: np.random.Generator) -> RankOfExpert:
    """The rank of each expert; Mt-KaHyPar takes at least two parts, and edges of at least two nodes."""
    with _one_at_a_time:
        kahypar, initializer = _library()
    num_experts, num_ranks = problem.num_experts, problem.num_ranks
    sets, weights = _heaviest(problem)
    if num_ranks == 1 or len(sets) == 0:
        return np.repeat(np.arange(num_ranks), equal_sizes(num_experts, num_ranks))
    sizes = equal_sizes(num_experts, num_ranks)
    plans = []
    for _ in range(NUM_STARTS):
        label = rng.permutation(num_experts)
        edges = [label[row[row >= 0]].tolist() for row in sets]
        with _one_at_a_time:
            kahypar.set_seed(int(rng.integers(2**31)))  # read when the context is made
            context = initializer.context_from_preset(kahypar.PresetType.DETERMINISTIC_QUALITY)
            context.logging = False
            context.set_partitioning_parameters(num_ranks, 0.0, kahypar.Objective.KM1)
            context.set_individual_target_block_weights(sizes.tolist())
            unit = [1] * num_experts
            graph = initializer.create_hypergraph(context, num_experts, len(edges), edges, unit, weights.tolist())
            parts = np.array(graph.partition(context).get_partition(), dtype=np.int64)
        # Equal already, unless the partitioner found nothing as balanced as that.
        equal = with_equal_sizes(parts[label], problem.coactivation, num_ranks)
        plans += [equal, with_best_swaps(equal, problem.coactivation, num_ranks)]
    return min(plans, key=lambda plan: _connectivity(plan, sets, weights, num_ranks))


def _connectivity(
    rank_of: RankOfExpert, sets: npt.NDArray[np.int32], weights: npt.NDArray[np.int64], num_ranks: int
) -> int:
    """Ranks that each set touches, weighted and summed."""
    touched = np.zeros((len(sets), num_ranks + 1), dtype=bool)
    rows = np.arange(len(sets))
    for column in sets.T:
        touched[rows, np.where(column >= 0, rank_of[column], num_ranks)] = True
    return int(weights @ touched[:, :num_ranks].sum(axis=1))


def _heaviest(problem: LayerProblem) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Sets of two experts or more, and their weights as whole numbers whose weighted sizes fit 31 bits."""
    several = np.flatnonzero(((problem.sets >= 0).sum(axis=1) > 1) & (problem.weights > 0))
    keep = several[np.argsort(-problem.weights[several], kind="stable")][: MAX_PINS // problem.sets.shape[1]]
    scale = 2**30 / (problem.weights[keep].sum() * problem.sets.shape[1]) if len(keep) else 1.0
    weights = np.rint(problem.weights[keep] * scale).astype(np.int64)
    return problem.sets[keep][weights > 0], weights[weights > 0]


@cache
def _library() -> tuple[Any, Any]:
    """The module and its one initializer."""
    try:
        import mtkahypar
    except ImportError:
        raise CoterieError(
            "strategy 'hypergraph' needs Mt-KaHyPar, which is not installed: pip install 'coterie[hypergraph]'"
        ) from None
    return mtkahypar, mtkahypar.initialize(1, False)
