"""Swaps judged in closed form: descents on the true objective over token sets, where each expert has one copy.
Knows neither copies (`anneal.py`) nor how a first plan is made.

For experts a on place r and b on place s, what a swap does to the tokens that reach r follows from tallies:

- `lone[a]`: tokens that reach r only through a, and would leave it with a;
- `both[a, b]`: of these, the ones that pick b as well, so that b keeps them there;
- `touched[r, b]`: tokens that pick b and reach r already; the other tokens of b would come to it.

So reached[r] becomes reached[r] - lone[a] + both[a, b] + picked[b] - touched[r, b], likewise for s, and nothing else
changes.  Places are ranks, and nodes where there are several.  After a swap only sets with a or b are tallied anew.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from placement.layer_problem import LayerProblem
from placement.solvers.draws import mean_over_draws

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

DOUBLINGS = (3, 4, 5)
"""Descents take norms with p = 2^3, 2^4 and 2^5: first one that feels several ranks, then ones closer to the maximum.
Of load they take twice these: loads lie so close together that lower powers see little but their sum."""

SWAPS_PER_KICK = 3
"""Random pairs that a kick swaps; those that break the load limit are passed over."""

MUCH = 0.5
"""Share of a sum of powers that a swap takes away, from which on what it leaves is added up anew: the difference of two
large sums may keep no digit of a small one, and a descent that believes it would go round in circles."""


SHARES_OF_LOAD = (1.0, 0.25, 0.0)
"""Where plans are judged on draws, descents take turns in what load counts of its weight: each share finds plans that
the others pass by."""

MANY_KICKS = 30
"""Rounds from which on it pays to look for other starts and other draws."""

RESAMPLED = 9
"""Draws whose tokens descents take turns on besides, where there are many rounds: a plan that is found on one draw and
good on the others owes little to single sequences (sample average approximation: Kleywegt, Shapiro, Homem-de-Mello,
SIAM Journal on Optimization 12, 2002).  They are draws 1 to this; 0 is of one fold, see `draws.OF_ONE_FOLD`."""


@dataclass(frozen=True)
class Effort:
    """How much to search: rounds, and the time by `time.monotonic` after which no new one begins."""

    num_kicks: int
    deadline: float

    def part(self, divisor: int) -> Effort:
        """For a part of the work."""
        return replace(self, num_kicks=self.num_kicks // divisor)


class Tokens(NamedTuple):
    """Token sets as the kernels take them; a fold's weights are shares of its tokens."""

    sets: npt.NDArray[np.int32]  # (U, K)
    folds: Ints  # (U,)
    shares: Floats  # (U,)
    rows: Ints  # rows of the sets that hold an expert, one expert after another
    first_row: Ints  # (E + 1,) where each expert's rows start
    picked: Floats  # (E, F) share of the fold's tokens that pick the expert
    work: Floats  # (E, F) what the expert adds to its rank's load, in picks by a token of the fold
    mean_load: Floats  # (F,) of a rank, in the same unit
    fold_shares: Floats  # (F,) of all tokens
    counts: Floats  # (F + 1,) what each fold, and last all tokens together, count in the objective
    coactivation: Floats  # (E, E) share of all co-activated pairs


class Level(NamedTuple):
    """Tallies for one kind of place, C places, float64, in shares of each fold's tokens."""

    reached: Floats  # (C, F + 1), last of all tokens
    lone: Floats  # (E, F)
    both: Floats  # (E, E, F)
    touched: Floats  # (C, E, F)


class Weights(NamedTuple):
    """Of the objective; see `layer_problem.Objective`."""

    ingress: float
    node_ingress: float
    load: float
    fan_out: float
    collaboration: float


def weights_of(problem: LayerProblem) -> Weights:
    """The objective's weights; one node has no network to weigh."""
    objective = problem.objective
    return Weights(
        objective.ingress,
        objective.node_ingress if problem.topology.num_nodes > 1 else 0.0,
        objective.load,
        objective.fan_out,
        objective.collaboration,
    )


def prepare(problem: LayerProblem) -> Tokens:
    """Index the token sets."""
    num_folds, top_k = problem.num_folds, problem.sets.shape[1]
    fold_weight = np.bincount(problem.folds, problem.weights, minlength=num_folds)
    shares = problem.weights / np.maximum(fold_weight, 1e-300)[problem.folds]
    experts = problem.sets.ravel()
    order = np.argsort(experts, kind="stable")[int((experts < 0).sum()) :]
    held = np.bincount(experts[experts >= 0], minlength=problem.num_experts)
    picked = np.zeros((problem.num_experts, num_folds))
    for column in problem.sets.T:
        there = column >= 0
        np.add.at(picked, (column[there], problem.folds[there]), shares[there])
    work = picked if problem.work is None else problem.work
    pairs = problem.coactivation.sum() / 2 if problem.objective.collaboration else 0.0
    return Tokens(
        sets=problem.sets,
        folds=problem.folds,
        shares=shares,
        rows=order // top_k,
        first_row=np.concatenate([[0], np.cumsum(held)]),
        picked=picked,
        work=work,
        mean_load=np.maximum(work.sum(axis=0) / problem.num_ranks, 1e-300),
        fold_shares=fold_weight / max(fold_weight.sum(), 1e-300),
        counts=np.append(np.full(num_folds, (1 - problem.together) / num_folds), problem.together),
        coactivation=problem.coactivation / pairs if pairs else np.zeros((problem.num_experts, problem.num_experts)),
    )


def improve(
    problem: LayerProblem, tokens: Tokens, starts: list[Ints], zone_of: Ints, rng: np.random.Generator, effort: Effort
) -> Ints:
    """The best plan found by a descent from each start, then by kicks; only experts of one zone change places.

    The best is what has the lowest objective on the draws, of plans that a descent passes by as well; without draws,
    what the last descent gives the lowest value.  Starts that break the load cap by more than the first are passed
    over.
    """
    topology, weights = problem.topology, weights_of(problem)
    load = problem.expert_load
    highest = [np.bincount(start, load, minlength=topology.num_ranks).max() for start in starts]
    limit = max(problem.load_cap * load.sum() / topology.num_ranks, highest[0]) * (1 + 1e-12)
    starts = [start for start, most in zip(starts, highest, strict=True) if most <= limit]
    turns = _turns(problem, weights, effort, rng)
    tokens_of_draw = {0: tokens}
    best, best_value = starts[0], np.inf
    for attempt in range(len(starts) + effort.num_kicks):
        kick = attempt >= len(starts)
        if time.monotonic() > effort.deadline and attempt:
            break
        rank_of = best.copy() if kick else starts[attempt].copy()
        if kick:
            _kick(rank_of, load, zone_of, limit, topology.num_ranks, rng)
        draw, weights_of_turn = turns[attempt % len(turns)]
        if draw not in tokens_of_draw:  # only now, since time may run out before
            tokens_of_draw[draw] = prepare(_resampled(problem, draw))
        for doublings in DOUBLINGS:
            value = descend(
                tokens_of_draw[draw],
                rank_of,
                zone_of,
                load,
                limit,
                (topology.num_nodes, topology.ranks_per_node, topology.slots_per_rank),
                weights_of_turn,
                doublings,
                problem.worst_fold,
                rng.permutation(problem.num_experts),
            )
            if problem.draws is not None:
                value = mean_over_draws(problem.draws, rank_of, topology, problem.objective)
            elif doublings != DOUBLINGS[-1]:
                continue
            if value < best_value * (1 - 1e-12):
                best, best_value = rank_of.copy(), value
    return best


def _turns(
    problem: LayerProblem, weights: Weights, effort: Effort, rng: np.random.Generator
) -> list[tuple[int, Weights]]:
    """What descents take turns on, if plans are judged on draws: a draw's tokens, or all for 0, and the weights."""
    if problem.draws is None or not weights.ingress or not effort.num_kicks:
        return [(0, weights)]
    shares = [weights._replace(load=share * weights.load) for share in SHARES_OF_LOAD]
    turns = [(0, share) for share in shares]
    if effort.num_kicks >= MANY_KICKS:
        turns += [(draw, shares[draw % len(shares)]) for draw in range(1, RESAMPLED + 1)]
    return [turns[turn] for turn in rng.permutation(len(turns))]


def _resampled(problem: LayerProblem, draw: int) -> LayerProblem:
    """The problem of the tokens of one draw, in one fold."""
    draws = problem.draws
    assert draws is not None
    counted = draws.times[draw][draws.sequence] * draws.weights
    held = counted > 0
    sets = LayerProblem.from_ids(
        draws.ids[held], problem.num_experts, problem.topology, problem.load_cap, weights_T=counted[held]
    )
    return replace(problem, sets=sets.sets, folds=sets.folds, weights=sets.weights)


def _kick(rank_of: Ints, load: Floats, zone_of: Ints, limit: float, num_ranks: int, rng: np.random.Generator) -> None:
    """Swap a few random pairs in place, passing over those that break the load limit."""
    rank_load = np.bincount(rank_of, load, minlength=num_ranks)
    for a, b in rng.integers(0, len(rank_of), (SWAPS_PER_KICK, 2)):
        r, s = rank_of[a], rank_of[b]
        shift = load[b] - load[a]
        if r != s and zone_of[a] == zone_of[b] and rank_load[r] + shift <= limit and rank_load[s] - shift <= limit:
            rank_of[a], rank_of[b] = s, r
            rank_load[r] += shift
            rank_load[s] -= shift


@numba.njit(cache=True, nogil=True)
def power(value: float, doublings: int) -> float:
    """The value to the power 2^doublings."""
    for _ in range(doublings):
        value *= value
    return value


@numba.njit(cache=True, nogil=True)
def root(value: float, doublings: int) -> float:
    """Its inverse."""
    for _ in range(doublings):
        value = math.sqrt(value)
    return value


@numba.njit(cache=True, nogil=True)
def root_at_least(change: float, doublings: int) -> float:
    """A lower bound of root(1 + change) without taking roots: most swaps are passed over by it alone.

    The second-order series lies below the root of a growing value.  Of a shrinking one the terms left out add less than
    1.3 of the second, as long as a quarter is left.
    """
    if change <= -0.75:
        return 0.0
    slope = 1.0 / (1 << doublings)
    bend = slope * (1.0 - slope) / 2
    return 1.0 + change * slope - (1.0 if change > 0 else 2.3) * bend * change * change


@numba.njit(cache=True, nogil=True)
def _powers_but(values: Floats, fold: int, first: int, second: int, doublings: int) -> float:
    """The sum of the powers of a fold's places but two."""
    total = 0.0
    for place in range(len(values)):
        if place != first and place != second:
            total += power(values[place, fold], doublings)
    return total


@numba.njit(cache=True, nogil=True)
def _tally(
    experts: npt.NDArray[np.int32],
    fold: int,
    share: float,
    share_of_all: float,
    place_of: Ints,
    counted: npt.NDArray[np.bool_],
    seen: Ints,
    level: Level,
) -> None:
    """Add one token set, `share` times, to the tallies of the places that are `counted`; `seen` is all zeros around."""
    for expert in experts:
        if expert >= 0:
            seen[place_of[expert]] += 1
    for expert in experts:
        if expert >= 0 and seen[place_of[expert]] > 0:
            place = place_of[expert]
            lone = seen[place] == 1
            seen[place] = 0
            if not counted[place]:
                continue
            level.reached[place, fold] += share
            level.reached[place, -1] += share_of_all
            for other in experts:
                if other >= 0:
                    level.touched[place, other, fold] += share
            if lone:
                level.lone[expert, fold] += share
                for other in experts:
                    if other >= 0:
                        level.both[expert, other, fold] += share


@numba.njit(cache=True, nogil=True)
def _new_level(num_places: int, num_experts: int, num_folds: int) -> Level:
    return Level(
        np.zeros((num_places, num_folds + 1)),
        np.zeros((num_experts, num_folds)),
        np.zeros((num_experts, num_experts, num_folds)),
        np.zeros((num_places, num_experts, num_folds)),
    )


@numba.njit(cache=True, nogil=True)
def _with_all(values: Floats, fold_shares: Floats) -> Floats:
    """A last column of the sum of the others by their shares."""
    out = np.zeros((values.shape[0], values.shape[1] + 1))
    for fold in range(values.shape[1]):
        out[:, fold] = values[:, fold]
        out[:, -1] += values[:, fold] * fold_shares[fold]
    return out


@numba.njit(cache=True, nogil=True)
def _after(level: Level, picked: Floats, a: int, b: int, place: int, fold: int) -> float:
    """Share of the fold's tokens that reach `place` when a leaves it and b (none if negative) comes."""
    value = float(level.reached[place, fold] - level.lone[a, fold])
    if b >= 0:
        value += level.both[a, b, fold] + picked[b, fold] - level.touched[place, b, fold]
    return max(value, 0.0)


@numba.njit(cache=True, nogil=True)
def _joined(level: Level, picked: Floats, a: int, place: int, fold: int) -> float:
    """Share of the fold's tokens that reach `place` when a comes and nothing leaves."""
    return float(level.reached[place, fold] + picked[a, fold] - level.touched[place, a, fold])


@numba.njit(cache=True, nogil=True)
def over_folds(values: Floats, counts: Floats, worst_fold: bool) -> float:
    """The weighted mean over folds and all tokens together, the last value, or a smooth maximum over folds."""
    total = 0.0
    if not worst_fold:
        for fold in range(len(values)):
            total += counts[fold] * values[fold]
        return total
    for value in values[:-1]:
        total += power(value, 4)
    return root(total, 4)


@numba.njit(cache=True, nogil=True)
def descend(
    tokens: Tokens,
    rank_of: Ints,
    zone_of: Ints,
    load: Floats,
    limit: float,
    shape: tuple[int, int, int],
    weights: Weights,
    doublings: int,
    worst_fold: bool,
    order: Ints,
) -> float:
    """Give each expert its best swap, or move to a free slot, until none helps; changes `rank_of`, returns the value.

    Args:
        load: float64 (E,), and `limit`: the largest load of a rank, in the same unit.
        shape: nodes, ranks a node, slots a rank.
        doublings: norms have p = 2^doublings, of load twice that.
        order: in which experts take turns.
    """
    of_load = doublings + 1
    num_nodes, ranks_per_node, slots_per_rank = shape
    num_ranks = num_nodes * ranks_per_node
    num_experts, num_folds = tokens.picked.shape
    by_node = weights.node_ingress > 0
    node_of = rank_of // ranks_per_node
    ranks = _new_level(num_ranks, num_experts, num_folds)
    nodes = _new_level(num_nodes if by_node else 0, num_experts if by_node else 0, num_folds)
    seen = np.zeros(num_ranks, np.int64)
    at_rank, at_node = np.ones(num_ranks, np.bool_), np.ones(num_nodes, np.bool_)
    for row in range(len(tokens.sets)):
        fold, share = tokens.folds[row], tokens.shares[row]
        of_all = share * tokens.fold_shares[fold]
        _tally(tokens.sets[row], fold, share, of_all, rank_of, at_rank, seen, ranks)
        if by_node:
            _tally(tokens.sets[row], fold, share, of_all, node_of, at_node, seen, nodes)
    # The last column, of all tokens together, is the folds' by their shares.
    picked, work = _with_all(tokens.picked, tokens.fold_shares), _with_all(tokens.work, tokens.fold_shares)
    mean_load = np.empty(num_folds + 1)
    mean_load[:num_folds] = tokens.mean_load
    mean_load[num_folds] = (tokens.mean_load * tokens.fold_shares).sum()
    parts = num_folds + (1 if tokens.counts[num_folds] > 0 else 0)
    rank_load, count = np.zeros(num_ranks), np.zeros(num_ranks, np.int64)
    fold_load = np.zeros((num_ranks, num_folds + 1))
    with_rank = np.zeros((num_experts, num_ranks))
    for expert in range(num_experts):
        rank_load[rank_of[expert]] += load[expert]
        count[rank_of[expert]] += 1
        fold_load[rank_of[expert]] += work[expert] / mean_load
        if weights.collaboration > 0:
            with_rank[:, rank_of[expert]] += tokens.coactivation[:, expert]
    # For each fold, and last for all tokens: sums of powers and norms as they are, and powers after a swap.
    reach_powers, node_powers, load_powers = np.zeros(parts), np.zeros(parts), np.zeros(parts)
    reach_norm, node_norm, load_norm = np.zeros(parts), np.zeros(parts), np.zeros(parts)
    new_reach, new_node, new_load = np.zeros(parts), np.zeros(parts), np.zeros(parts)
    fan_out, new_fan_out, trial = np.zeros(parts), np.zeros(parts), np.zeros(num_folds + 1)
    value = 0.0
    quiet, turn = 0, 0
    stale = True
    while quiet < num_experts:
        if stale:
            for fold in range(parts):
                reach_powers[fold], node_powers[fold], load_powers[fold], fan_out[fold] = 0.0, 0.0, 0.0, 0.0
                for rank in range(num_ranks):
                    reach_powers[fold] += power(ranks.reached[rank, fold], doublings)
                    load_powers[fold] += power(fold_load[rank, fold], of_load)
                    fan_out[fold] += ranks.reached[rank, fold]
                for node in range(len(nodes.reached)):
                    node_powers[fold] += power(nodes.reached[node, fold], doublings)
                reach_powers[fold] = max(reach_powers[fold], 1e-300)  # a fold without picks
                load_powers[fold] = max(load_powers[fold], 1e-300)
                node_powers[fold] = max(node_powers[fold], 1e-300)
                reach_norm[fold] = weights.ingress * root(reach_powers[fold], doublings)
                load_norm[fold] = weights.load * root(load_powers[fold], of_load)
                node_norm[fold] = weights.node_ingress * root(node_powers[fold], doublings) if by_node else 0.0
                trial[fold] = reach_norm[fold] + load_norm[fold] + node_norm[fold] + weights.fan_out * fan_out[fold]
            value = over_folds(trial, tokens.counts, worst_fold)
            stale = False
        a = order[turn % num_experts]
        turn += 1
        r = rank_of[a]
        best, best_b, best_s = value - 1e-10 * abs(value) - 1e-15, -1, -1
        for candidate in range(num_experts + num_ranks):
            b = candidate if candidate < num_experts else -1
            s = rank_of[b] if b >= 0 else candidate - num_experts
            if s == r or (b >= 0 and zone_of[a] != zone_of[b]) or (b < 0 and count[s] >= slots_per_rank):
                continue
            shift = (load[b] if b >= 0 else 0.0) - load[a]
            if (shift > 0 and rank_load[r] + shift > limit) or (shift < 0 and rank_load[s] - shift > limit):
                continue
            if b < 0 and zone_of.max() > 0:  # zones keep their places
                continue
            gain = 0.0
            if weights.collaboration > 0:
                gain = with_rank[a, s] - with_rank[a, r]
                if b >= 0:
                    gain += with_rank[b, r] - with_rank[b, s] - 2 * tokens.coactivation[a, b]
            u, v = r // ranks_per_node, s // ranks_per_node
            at_least, to_r, to_s, to_u, to_v = 0.0, 0.0, 0.0, 0.0, 0.0
            for fold in range(parts):
                counted = tokens.counts[fold]
                old_r, old_s = ranks.reached[r, fold], ranks.reached[s, fold]
                if fold < num_folds:
                    new_r = _after(ranks, picked, a, b, r, fold)
                    new_s = _after(ranks, picked, b, a, s, fold) if b >= 0 else _joined(ranks, picked, a, s, fold)
                    to_r += tokens.fold_shares[fold] * new_r
                    to_s += tokens.fold_shares[fold] * new_s
                else:
                    new_r, new_s = to_r, to_s
                if weights.ingress > 0:
                    change = power(new_r, doublings) + power(new_s, doublings)
                    change -= power(old_r, doublings) + power(old_s, doublings)
                    new_reach[fold] = reach_powers[fold] + change
                    if change < -MUCH * reach_powers[fold]:
                        new_reach[fold] = power(new_r, doublings) + power(new_s, doublings)
                        new_reach[fold] += _powers_but(ranks.reached, fold, r, s, doublings)
                    at_least += counted * reach_norm[fold] * root_at_least(change / reach_powers[fold], doublings)
                if weights.fan_out > 0:
                    new_fan_out[fold] = fan_out[fold] + new_r + new_s - old_r - old_s
                    at_least += counted * weights.fan_out * new_fan_out[fold]
                if weights.load > 0:
                    gained = ((work[b, fold] if b >= 0 else 0.0) - work[a, fold]) / mean_load[fold]
                    old_r, old_s = fold_load[r, fold], fold_load[s, fold]
                    change = power(old_r + gained, of_load) + power(old_s - gained, of_load)
                    change -= power(old_r, of_load) + power(old_s, of_load)
                    new_load[fold] = load_powers[fold] + change
                    if change < -MUCH * load_powers[fold]:
                        new_load[fold] = power(old_r + gained, of_load) + power(old_s - gained, of_load)
                        new_load[fold] += _powers_but(fold_load, fold, r, s, of_load)
                    at_least += counted * load_norm[fold] * root_at_least(change / load_powers[fold], of_load)
                if by_node:
                    change, new_u, new_v = 0.0, 0.0, 0.0
                    if u != v:
                        if fold < num_folds:
                            new_u = _after(nodes, picked, a, b, u, fold)
                            new_v = (
                                _after(nodes, picked, b, a, v, fold) if b >= 0 else _joined(nodes, picked, a, v, fold)
                            )
                            to_u += tokens.fold_shares[fold] * new_u
                            to_v += tokens.fold_shares[fold] * new_v
                        else:
                            new_u, new_v = to_u, to_v
                        change = power(new_u, doublings) + power(new_v, doublings)
                        change -= power(nodes.reached[u, fold], doublings) + power(nodes.reached[v, fold], doublings)
                    new_node[fold] = node_powers[fold] + change
                    if change < -MUCH * node_powers[fold]:
                        new_node[fold] = power(new_u, doublings) + power(new_v, doublings)
                        new_node[fold] += _powers_but(nodes.reached, fold, u, v, doublings)
                    at_least += counted * node_norm[fold] * root_at_least(change / node_powers[fold], doublings)
            if not worst_fold and at_least - weights.collaboration * gain >= best:
                continue
            for fold in range(parts):
                trial[fold] = weights.fan_out * new_fan_out[fold]
                if weights.ingress > 0:
                    trial[fold] += weights.ingress * root(max(new_reach[fold], 0.0), doublings)
                if weights.load > 0:
                    trial[fold] += weights.load * root(max(new_load[fold], 0.0), of_load)
                if by_node:
                    trial[fold] += weights.node_ingress * root(max(new_node[fold], 0.0), doublings)
            found = over_folds(trial, tokens.counts, worst_fold) - weights.collaboration * gain
            if found < best:
                best, best_b, best_s = found, b, s
        if best_s < 0:
            quiet += 1
            continue
        quiet, stale = 0, True
        b, s = best_b, best_s
        at_rank[:], at_node[:] = False, False
        at_rank[r], at_rank[s] = True, True
        at_node[r // ranks_per_node], at_node[s // ranks_per_node] = True, True
        for sign in (-1.0, 1.0):
            for expert in (a, b):
                if expert < 0:
                    continue
                for row in tokens.rows[tokens.first_row[expert] : tokens.first_row[expert + 1]]:
                    experts = tokens.sets[row]
                    if expert == b and _holds(experts, a):
                        continue  # sets with both are tallied once
                    fold, share = tokens.folds[row], sign * tokens.shares[row]
                    of_all = share * tokens.fold_shares[fold]
                    _tally(experts, fold, share, of_all, rank_of, at_rank, seen, ranks)
                    if by_node:
                        _tally(experts, fold, share, of_all, node_of, at_node, seen, nodes)
            if sign < 0:
                rank_of[a], node_of[a] = s, s // ranks_per_node
                if b >= 0:
                    rank_of[b], node_of[b] = r, r // ranks_per_node
        shift = (load[b] if b >= 0 else 0.0) - load[a]
        rank_load[r] += shift
        rank_load[s] -= shift
        if b < 0:
            count[r] -= 1
            count[s] += 1
        for fold in range(num_folds + 1):
            change = ((work[b, fold] if b >= 0 else 0.0) - work[a, fold]) / mean_load[fold]
            fold_load[r, fold] += change
            fold_load[s, fold] -= change
        if weights.collaboration > 0:
            with_rank[:, r] -= tokens.coactivation[:, a]
            with_rank[:, s] += tokens.coactivation[:, a]
            if b >= 0:
                with_rank[:, r] += tokens.coactivation[:, b]
                with_rank[:, s] -= tokens.coactivation[:, b]
    apart = 0.0
    if weights.collaboration > 0:
        for expert in range(num_experts):
            apart -= with_rank[expert, rank_of[expert]] / 2
    return value + weights.collaboration * (1.0 + apart)


@numba.njit(cache=True, nogil=True)
def _holds(experts: npt.NDArray[np.int32], expert: int) -> bool:
    found = False
    for other in experts:
        found = found or other == expert
    return found
