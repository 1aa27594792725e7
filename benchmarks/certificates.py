"""Plans of recorded routing beside the best that any plan could reach: bounds, gaps and proven optima, all layers."""

import time
from collections.abc import Iterator

import numba
import numpy as np
import numpy.typing as npt

from benchmarks import traces
from benchmarks.record import write
from placement.certify import certify
from placement.solvers.contract import LayerProblem
from placement.topology import Topology

CASES = (
    ("gpt-oss-20b", 16, 1.1, 1),
    ("gpt-oss-20b", 8, 1.1, 1),
    ("gpt-oss-20b", 8, 1.05, 1),
    ("gpt-oss-20b", 4, 1.1, 6),
    ("deepseek-v2-lite", 16, 1.1, 1),
    ("deepseek-v2-lite", 8, 1.1, 1),
)
"""Trace, ranks, load cap, and every how many layers: groups of 8 of 32 experts take gigabytes and half a minute."""

SECONDS = 20.0
"""A layer, both metrics together."""

KICKS = 3


def pairs_problem(coactivation: npt.NDArray[np.int64], num_ranks: int) -> LayerProblem:
    """Top-2 routing known by counts (E, E) only: each pair is a token set.  No load cap."""
    a, b = np.nonzero(np.triu(coactivation, 1))
    return LayerProblem(
        np.column_stack([a, b]).astype(np.int32),
        np.zeros(len(a), dtype=np.int64),
        coactivation[a, b].astype(np.float64),
        len(coactivation),
        Topology.for_experts(len(coactivation), num_ranks),
        load_cap=float(num_ranks),
    )


@numba.njit(cache=True)
def swap_search(
    sets: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float64],
    has: npt.NDArray[np.bool_],
    load: npt.NDArray[np.float64],
    rank_of: npt.NDArray[np.int64],
    num_ranks: int,
    limit: float,
    kicks: int,
    seed: int,
) -> npt.NDArray[np.int64]:
    """Swaps that lower sum ingress^8, tried one after another, with random kicks: a plan to certify, and no more.

    A rank above the load limit costs as if all tokens reached it for each load limit that it is above.
    """
    np.random.seed(seed)  # noqa: NPY002 - numba has no generators to pass in
    num_experts, total = len(rank_of), weights.sum()
    best, best_cost = rank_of.copy(), np.inf
    for kick in range(kicks + 1):
        rank_of = best.copy()
        for _ in range(3 if kick else 0):
            a, b = np.random.randint(num_experts), np.random.randint(num_experts)  # noqa: NPY002
            rank_of[a], rank_of[b] = rank_of[b], rank_of[a]
        on = np.zeros((len(sets), num_ranks), np.int16)
        ingress, rank_load = np.zeros(num_ranks), np.zeros(num_ranks)
        for expert in range(num_experts):
            rank_load[rank_of[expert]] += load[expert]
        for row in range(len(sets)):
            for expert in sets[row]:
                if expert >= 0:
                    on[row, rank_of[expert]] += 1
            for rank in range(num_ranks):
                if on[row, rank]:
                    ingress[rank] += weights[row]
        improved = True
        while improved:
            improved = False
            for a in range(num_experts):
                for b in range(a):
                    r, s = rank_of[a], rank_of[b]
                    if r == s:
                        continue
                    to_r, to_s = 0.0, 0.0
                    for row in range(len(sets)):
                        change = np.int16(has[b, row]) - np.int16(has[a, row])
                        if change:
                            to_r += weights[row] * ((on[row, r] + change > 0) - (on[row, r] > 0))
                            to_s += weights[row] * ((on[row, s] - change > 0) - (on[row, s] > 0))
                    shift = load[b] - load[a]
                    before = (ingress[r] / total) ** 8 + (ingress[s] / total) ** 8
                    before += max(0.0, rank_load[r] / limit - 1) + max(0.0, rank_load[s] / limit - 1)
                    after = ((ingress[r] + to_r) / total) ** 8 + ((ingress[s] + to_s) / total) ** 8
                    after += max(0.0, (rank_load[r] + shift) / limit - 1) + max(0.0, (rank_load[s] - shift) / limit - 1)
                    if after < before * (1 - 1e-9):
                        improved = True
                        rank_of[a], rank_of[b] = s, r
                        rank_load[r] += shift
                        rank_load[s] -= shift
                        ingress[r] += to_r
                        ingress[s] += to_s
                        for row in range(len(sets)):
                            change = np.int16(has[b, row]) - np.int16(has[a, row])
                            on[row, r] += change
                            on[row, s] -= change
        cost = ((ingress / total) ** 8).sum() + np.maximum(0.0, rank_load / limit - 1).sum()
        if cost < best_cost:
            best, best_cost = rank_of, cost
    return best


def simple_plan(problem: LayerProblem, kicks: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """`swap_search` from a random plan."""
    start = np.random.default_rng(seed).permutation(problem.num_experts) % problem.num_ranks
    has = np.zeros((problem.num_experts, len(problem.sets)), dtype=bool)
    for column in problem.sets.T:
        picked = column >= 0
        has[column[picked], np.flatnonzero(picked)] = True
    limit = problem.load_cap * problem.expert_load.sum() / problem.num_ranks
    return swap_search(
        problem.sets, problem.weights, has, problem.expert_load, start, problem.num_ranks, limit, kicks, seed
    )


def cases() -> Iterator[tuple[str, int, str, list[LayerProblem]]]:
    """Trace, ranks, load cap and the problem of each layer, on the sequences that plans are made on."""
    for name, num_ranks, cap, every in CASES:
        planned, _ = traces.load(name, every).split_by_sequence()
        num_experts = planned.model.num_experts
        topology = Topology.for_experts(num_experts, num_ranks)
        ids_LTK = planned.require_tokens().topk_ids
        yield name, num_ranks, f"{cap}", [LayerProblem.from_ids(ids, num_experts, topology, cap) for ids in ids_LTK]
    counts = np.load(traces.FOLDER / "llama-moe-coactivation.npz")["base"]
    for num_ranks in (2, 4):
        yield "LLaMA-MoE", num_ranks, "none", [pairs_problem(layer, num_ranks) for layer in counts]


def main() -> None:
    if not traces.FOLDER.is_dir():
        print(f"no recorded traces at {traces.FOLDER}; set COTERIE_TRACES")
        return
    rows = []
    for name, num_ranks, cap, problems in cases():
        plans = [simple_plan(problem, KICKS) for problem in problems]
        started = time.perf_counter()
        certificates = [certify(problem, plan, SECONDS) for problem, plan in zip(problems, plans, strict=True)]
        seconds = time.perf_counter() - started
        for metric in ("busiest_ingress", "fan_out"):
            bounds = [getattr(certificate, metric) for certificate in certificates]
            value, bound, gap = (
                float(np.mean([getattr(each, of) for each in bounds])) for of in ("value", "bound", "gap")
            )
            exact = sum(each.method in ("set partitioning", "matching") for each in bounds)
            methods = ", ".join(sorted({each.method for each in bounds}))
            rows.append(
                [name, num_ranks, cap, metric, value, bound, f"{gap:.2%}", f"{exact} of {len(bounds)}", methods]
            )
            rows[-1].append(f"{seconds:.0f}")
        print(rows[-2:], flush=True)
    write(
        "certificates",
        "Plans beside the least that any plan could reach",
        "Planned tokens, mean over all layers.  The plans are those of a plain swap search.  A layer is exact where "
        f"its bound is proved to be the optimum; {SECONDS:.0f} s a layer at most, seconds are for both metrics and all "
        "layers.  Where a plan breaks the load cap, its own imbalance stands for it.",
        ("trace", "ranks", "load cap", "metric", "plan", "bound", "mean gap", "layers exact", "method", "seconds"),
        rows,
    )


if __name__ == "__main__":
    main()
