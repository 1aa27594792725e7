"""Counts against sums that must hold, and against one-hot matrices."""

import numpy as np
from conftest import traces
from hypothesis import given

from profiler import counts


@given(traces())
def test_loads_sum_to_picks(case):
    spec, trace = case
    load = counts.load(trace.topk_ids, spec.num_experts)
    assert (load.sum(axis=1) == spec.top_k * trace.num_tokens).all()


@given(traces())
def test_coactivation_rows_sum_to_the_other_picks_of_the_expert(case):
    spec, trace = case
    load = counts.load(trace.topk_ids, spec.num_experts)
    coactivation = counts.coactivation(trace.topk_ids, spec.num_experts)
    assert (coactivation.sum(axis=2) == (spec.top_k - 1) * load).all()
    assert (coactivation == coactivation.transpose(0, 2, 1)).all()
    assert (coactivation.diagonal(axis1=1, axis2=2) == 0).all()


@given(traces())
def test_counts_agree_with_one_hot_products(case):
    spec, trace = case
    picked_LTE = np.eye(spec.num_experts, dtype=np.int64)[trace.topk_ids].sum(axis=2)
    together = picked_LTE.transpose(0, 2, 1) @ picked_LTE
    load = np.diagonal(together, axis1=1, axis2=2)
    assert (counts.load(trace.topk_ids, spec.num_experts) == load).all()
    expected = together - np.eye(spec.num_experts, dtype=np.int64) * load[:, None]
    assert (counts.coactivation(trace.topk_ids, spec.num_experts) == expected).all()
    onward = picked_LTE[:-1].transpose(0, 2, 1) @ picked_LTE[1:]
    assert (counts.transition(trace.topk_ids, spec.num_experts) == onward).all()
