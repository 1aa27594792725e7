"""Folds by picks against a dense decomposition, and on routing whose parts are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.solvers.folds import folds_by_picks
from profiler.trace import TokenTrace, ids_dtype


def trace_of(ids_LTK, sequences):
    tokens = len(sequences)
    zeros = np.zeros(tokens, np.uint8)
    return TokenTrace(ids_LTK.astype(np.uint8), np.asarray(sequences, np.int32), zeros, zeros)


def random_trace(seed, num_sequences, num_experts=12, num_layers=2, top_k=2):
    rng = np.random.default_rng(seed)
    sequences = np.repeat(np.arange(num_sequences), rng.integers(1, 30, num_sequences))
    taste = rng.gumbel(size=(num_sequences, num_layers, num_experts))
    scores = taste[sequences] + rng.gumbel(size=(len(sequences), num_layers, num_experts))
    ids = np.argsort(-scores, axis=2)[:, :, :top_k].transpose(1, 0, 2)
    if rng.random() < 0.5:
        ids[:, rng.random(len(sequences)) < 0.3, -1] = np.iinfo(ids_dtype(num_experts)).max
    return trace_of(ids, sequences)


def slow_halves(roots, num_tokens, members):
    """A part in two by a full decomposition, and how far its first axis stands out from the second."""
    here, count = roots[members], num_tokens[members]
    centred = here - (count[:, None] * here).sum(axis=0) / count.sum()
    left, lengths, _ = np.linalg.svd(np.sqrt(count)[:, None] * centred, full_matrices=False)
    places = left[:, 0] / np.sqrt(count)
    farthest = np.argsort(np.abs(places))[-2:]
    places = places / places[farthest[1]]
    order = np.argsort(places, kind="stable")
    middle = np.cumsum(count[order]) - count[order] / 2
    first = members[order[middle < count.sum() / 2]]
    clear = (
        lengths[0] > 1.05 * lengths[1] and np.diff(np.sort(places)).min() > 1e-6 and abs(places[farthest[0]]) < 1 - 1e-6
    )
    return {frozenset(first.tolist()), frozenset(members.tolist()) - frozenset(first.tolist())}, clear


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 12))
def test_one_halving_equals_a_full_decomposition(seed, num_sequences):
    trace = random_trace(seed, num_sequences)
    sequences = trace.sequence_ids
    roots = np.zeros((num_sequences, len(trace.topk_ids) * 12))
    for layer, ids in enumerate(trace.topk_ids):
        for sequence, row in zip(sequences, ids, strict=True):
            for expert in row[row < 12]:
                roots[sequence, layer * 12 + expert] += 1
    roots = np.sqrt(roots / roots.sum(axis=1, keepdims=True))
    num_tokens = np.bincount(sequences).astype(float)
    halves, clear = slow_halves(roots, num_tokens, np.arange(num_sequences))
    if not clear or min(map(len, halves)) == 0:
        return
    folds = folds_by_picks(trace, 1)
    found = {frozenset(np.unique(sequences[folds == fold]).tolist()) for fold in np.unique(folds)}
    assert found == halves


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(0, 3))
def test_folds_are_whole_sequences_and_none_is_empty(seed, num_sequences, halvings):
    trace = random_trace(seed, num_sequences)
    folds = folds_by_picks(trace, halvings)
    assert folds.shape == (trace.num_tokens,)
    assert sorted(set(folds.tolist())) == list(range(folds.max() + 1))
    assert folds.max() < 2**halvings
    for sequence in np.unique(trace.sequence_ids):
        assert len(set(folds[trace.sequence_ids == sequence].tolist())) == 1


def test_parts_that_pick_other_experts_are_told_apart():
    rng = np.random.default_rng(0)
    sequences = np.repeat(np.arange(40), 50)
    kind = np.array([0, 1, 2, 3])[sequences % 4]
    ids = np.stack([(4 * kind + rng.integers(0, 4, len(kind))) for _ in range(3)])[:, :, None]
    folds = folds_by_picks(trace_of(ids, sequences), 2)
    assert len({(a, b) for a, b in zip(folds.tolist(), kind.tolist(), strict=True)}) == 4


def test_a_difference_that_cancels_out_along_the_order_is_seen():
    sequences = np.repeat(np.arange(4), 5)
    ids = np.repeat([3, 7, 7, 3], 5)[None, :, None]
    folds = folds_by_picks(trace_of(ids, sequences), 1)
    assert (folds[ids[0, :, 0] == 3] != folds[ids[0, :, 0] == 7]).all()


def test_more_sequences_than_experts_in_all():
    trace = random_trace(1, 300, num_layers=1)
    tokens_of = np.bincount(folds_by_picks(trace, 2))
    assert len(tokens_of) == 4
    assert np.ptp(tokens_of) < 0.05 * trace.num_tokens


def test_sequences_that_are_alike_keep_their_order():
    sequences = np.repeat(np.arange(4), 5)
    assert folds_by_picks(trace_of(np.ones((2, 20, 1)), sequences), 1).tolist() == [0] * 10 + [1] * 10


def test_nothing_picked_and_one_sequence():
    nothing = np.full((1, 6, 2), 255)
    assert folds_by_picks(trace_of(nothing, [0, 0, 1, 1, 2, 2]), 2).max() <= 2
    assert folds_by_picks(trace_of(np.zeros((1, 6, 1)), [7] * 6), 2).tolist() == [0] * 6


@pytest.mark.parametrize("long", [0, 1, 2])
def test_a_sequence_of_most_tokens_is_no_reason_to_fail(long):
    lengths = [2, 2, 2]
    lengths[long] = 100
    sequences = np.repeat(np.arange(3), lengths)
    ids = np.arange(len(sequences))[None, :, None] % 5
    folds = folds_by_picks(trace_of(ids, sequences), 2)
    assert sorted(set(folds.tolist())) == list(range(folds.max() + 1))
