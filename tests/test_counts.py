"""Counts against sums that must hold, and against one-hot matrices."""

from dataclasses import replace

import numpy as np
from conftest import make_spec, make_trace, random_ids, traces
from hypothesis import given

from profiler.counts import Tally, count


def one_hot(trace, num_experts):
    """Which experts each token picked, int64 (L, T, E): the slow, obvious way, where all-ones is no expert."""
    expert_of_id = np.minimum(trace.topk_ids, num_experts)
    return np.eye(num_experts + 1, num_experts, dtype=np.int64)[expert_of_id].sum(axis=2)


@given(traces())
def test_sums(case):
    spec, trace = case
    counts = count(trace, spec, 2)
    assert counts.tokens.sum() == trace.num_tokens
    assert (counts.load.sum(axis=(0, 2)) == spec.top_k * trace.num_tokens).all()
    assert (counts.coactivation.sum(axis=3) == (spec.top_k - 1) * counts.load).all()
    assert (counts.coactivation == counts.coactivation.swapaxes(2, 3)).all()
    assert (counts.coactivation.diagonal(axis1=2, axis2=3) == 0).all()
    assert (counts.transition.sum(axis=(0, 2, 3)) == spec.top_k**2 * trace.num_tokens).all()


def check_against_one_hot(spec, trace):
    counts = count(trace, spec, 2)
    for domain in range(2):
        picked_LTE = one_hot(trace.where(trace.domain_ids == domain), spec.num_experts)
        together = picked_LTE.transpose(0, 2, 1) @ picked_LTE
        load = np.diagonal(together, axis1=1, axis2=2)
        assert (counts.load[domain] == load).all()
        assert (counts.coactivation[domain] == together - np.eye(spec.num_experts, dtype=int) * load[:, None]).all()
        assert (counts.transition[domain] == picked_LTE[:-1].transpose(0, 2, 1) @ picked_LTE[1:]).all()


@given(traces())
def test_counts_agree_with_one_hot_products(case):
    check_against_one_hot(*case)


def test_picks_of_no_expert_are_not_counted():
    spec, trace = make_spec(3, 16, 4), make_trace(random_ids(0, 3, 50, 16, 4))
    dropped = np.random.default_rng(0).random(trace.topk_ids.shape) < 0.3
    check_against_one_hot(spec, replace(trace, topk_ids=np.where(dropped, np.uint8(255), trace.topk_ids)))


def test_more_than_256_experts():
    check_against_one_hot(make_spec(2, 300, 8), make_trace(random_ids(0, 2, 200, 300, 8)))


@given(traces())
def test_counting_in_parts_is_counting_at_once(case):
    spec, trace = case
    tally = Tally(spec, 2)
    for start in range(0, trace.num_tokens, 7):
        tally.add(trace.where(slice(start, start + 7)))
    for name, array in tally.counts().arrays().items():
        assert (array == count(trace, spec, 2).arrays()[name]).all()
