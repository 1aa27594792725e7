"""Collaboration only: spectral clustering of the co-activation graph into equal parts. It knows nothing of load."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.layer_problem import LayerProblem
from placement.placement_map import slots_of_ranks
from placement.solvers.contract import Slots
from placement.solvers.copies import with_copies
from placement.solvers.equal_sizes import RankOfExpert, equal_sizes, intra_weight

NUM_STARTS = 24
"""Starts of k-means; the best is taken."""

MAX_ROUNDS = 30
"""Of k-means, for a start that does not settle before."""

Floats = npt.NDArray[np.float64]


def spectral(problem: LayerProblem, rng: np.random.Generator) -> Slots:
    """Cluster experts in the space of the leading eigenvectors of the normalised co-activation.

    The embedding is that of Ng, Jordan and Weiss (2002): the R leading eigenvectors of D^-1/2 A D^-1/2, rows at unit
    length; each vector is scaled by the root of its eigenvalue, as in the kernel that makes k-means a normalised cut
    (Dhillon, Guan and Kulis, 2004).  Clusters are k-means with equal sizes: an optimal assignment of experts to as many
    places round each centre as the rank has (Malinen and Fränti, 2014), then new centres.  Of several starts the one
    with most co-activation inside ranks is taken.
    """
    collaboration = problem.coactivation
    sizes = equal_sizes(problem.num_experts, problem.num_ranks)
    points = _embedding(collaboration, problem.num_ranks)
    plans = [_balanced_clusters(points, sizes, rng) for _ in range(NUM_STARTS)]
    rank_of = max(plans, key=lambda plan: intra_weight(plan, collaboration))
    return with_copies(slots_of_ranks(rank_of, problem.topology), problem)


def _embedding(coactivation: Floats, dimensions: int) -> Floats:
    """A point for each expert, float64 (E, dimensions), of unit length, or zero for experts that nothing touches."""
    degree = coactivation.sum(axis=1)
    scale = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    values, vectors = np.linalg.eigh(scale[:, None] * coactivation * scale)
    leading: Floats = (vectors * np.sqrt(np.maximum(values, 0)))[:, ::-1][:, :dimensions]
    norm = np.linalg.norm(leading, axis=1, keepdims=True)
    points: Floats = np.where((degree > 0)[:, None], leading / np.where(norm > 0, norm, 1), 0)
    return points


def _balanced_clusters(points: Floats, sizes: npt.NDArray[np.int64], rng: np.random.Generator) -> RankOfExpert:
    """The rank of each point; centres start far apart, each new one with chances by squared distance (k-means++)."""
    from scipy.optimize import linear_sum_assignment  # takes a third of a second

    centres = points[rng.integers(len(points))][None]
    while len(centres) < len(sizes):
        away = _squared_distances(points, centres).min(axis=1)
        chances = away / away.sum() if away.sum() > 0 else np.full(len(points), 1 / len(points))
        centres = np.concatenate([centres, points[rng.choice(len(points), p=chances)][None]])
    rank_of_place = np.repeat(np.arange(len(sizes)), sizes)
    rank_of = np.full(len(points), -1, dtype=np.int64)
    for _ in range(MAX_ROUNDS):
        _, place = linear_sum_assignment(_squared_distances(points, centres)[:, rank_of_place])
        if (rank_of_place[place] == rank_of).all():
            break
        rank_of = rank_of_place[place]
        members = rank_of == np.arange(len(sizes))[:, None]
        centres = members @ points / np.maximum(sizes, 1)[:, None]
    return rank_of


def _squared_distances(points: Floats, centres: Floats) -> Floats:
    """Float64 (points, centres), at least 0."""
    products = points @ centres.T
    squares: Floats = (points**2).sum(axis=1)[:, None] + (centres**2).sum(axis=1) - 2 * products
    return np.maximum(squares, 0.0)
