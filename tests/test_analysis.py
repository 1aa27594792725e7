"""Tables of a profile against slow, obvious counting; drift against profiles that do and do not differ."""

import itertools
import math

import numpy as np
import pytest
from conftest import make_spec, make_trace, random_ids, traces
from hypothesis import given

from profiler import CoterieError, Profile
from profiler.analysis import (
    affinity_table,
    collaborator_table,
    community_table,
    expert_table,
    flow_table,
    lift,
    load_table,
    sharing_table,
)
from profiler.drift import domain_expert_table, domain_table, drift, jensen_shannon


def profile_of(case):
    spec, trace = case
    return Profile.from_tokens(spec, ["a", "b"], trace, {})


@given(traces())
def test_expert_table_counts_what_tokens_picked(case):
    profile = profile_of(case)
    table = expert_table(profile)
    ids = profile.tokens.topk_ids
    for row in table.itertuples():
        layer, mean = row.layer, ids[row.layer].size / profile.model.num_experts
        assert row.load == (ids[layer] == row.expert).sum()
        assert row.relative_load == pytest.approx(row.load / mean)
        assert row.heat == (
            "dead" if not row.load else "hot" if row.load >= 2 * mean else "cold" if row.load < mean / 2 else "usual"
        )
        met = [other for picks in ids[layer] if row.expert in picks for other in picks if other != row.expert]
        share = [met.count(other) / len(met) for other in set(met)]
        bits = -sum(part * math.log2(part) for part in share)
        assert row.collaborators == pytest.approx(2**bits if met else 0)
        top = sorted(share, reverse=True)[: max(profile.model.top_k - 1, 1)]
        assert row.top_share == pytest.approx(sum(top))
        assert (row.role == "none") == (not met)
        assert row.specialization >= 0
    assert (table.groupby("layer")["share"].sum() - profile.model.top_k).abs().max() < 1e-9


@given(traces())
def test_collaborators_are_ranked(case):
    profile = profile_of(case)
    for (layer, expert), rows in collaborator_table(profile, top=3).groupby(["layer", "expert"]):
        counts = profile.counts.coactivation.sum(axis=0)[layer, expert]
        assert rows["together"].tolist() == sorted(counts[counts > 0], reverse=True)[:3]
        assert rows["together"].tolist() == counts[rows["partner"]].tolist()
        assert rows["place"].tolist() == list(range(1, len(rows) + 1))


@given(traces())
def test_intra_and_inter_make_up_all_pairs(case):
    profile = profile_of(case)
    experts = profile.model.num_experts
    ranks = np.tile(np.arange(experts) % 2, (profile.model.num_layers, 1))
    table = sharing_table(profile, ranks)
    for layer, rows in table.groupby("layer"):
        pairs = [pair for picks in profile.tokens.topk_ids[layer] for pair in itertools.permutations(picks.tolist(), 2)]
        assert rows["intra"].sum() == sum(a % 2 == b % 2 for a, b in pairs)
        assert (rows["intra"] + rows["inter"]).sum() == len(pairs)


def test_even_load_has_no_hot_expert():
    ids = np.array([[[0, 1], [2, 3], [0, 2], [1, 3]]], dtype=np.uint8)
    profile = Profile.from_tokens(make_spec(1, 4, 2), ["a", "b"], make_trace(ids), {})
    table = load_table(profile).iloc[0]
    assert table["expert_imbalance"] == pytest.approx(1)
    assert table["effective_experts"] == pytest.approx(4)
    assert (table["hot"], table["cold"], table["dead"]) == (0, 0, 0)


def test_pairs_at_chance_have_a_lift_of_one():
    load = np.array([10, 20, 30, 40])
    together = np.outer(load, load)
    np.fill_diagonal(together, 0)
    found = lift(together, load)
    assert np.allclose(found[~np.eye(4, dtype=bool)], 1)
    assert np.allclose(np.diag(found), 0)


def test_two_cliques_are_two_communities():
    rng = np.random.default_rng(0)
    sides = rng.integers(0, 2, 200)
    ids = np.array([[rng.permutation(4)[:2] + 4 * side for side in sides]], dtype=np.uint8)
    profile = Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], make_trace(ids), {})
    layers, experts = community_table(profile)
    assert layers["communities"].tolist() == [2]
    assert layers["modularity"][0] == pytest.approx(0.5, abs=0.05)
    assert experts.groupby("community")["expert"].apply(list).map(sorted).tolist() in (
        [[0, 1, 2, 3], [4, 5, 6, 7]],
        [[4, 5, 6, 7], [0, 1, 2, 3]],
    )


def test_affinity_is_the_information_that_one_layer_has_about_the_next():
    first = np.random.default_rng(0).integers(0, 8, 4000)
    other = np.random.default_rng(1).integers(0, 8, 4000)
    ids = np.stack([first, (first + 3) % 8, other])[:, :, None].astype(np.uint8)
    profile = Profile.from_tokens(make_spec(3, 8, 1), ["a", "b"], make_trace(ids), {})
    table = affinity_table(profile)
    assert table["affinity"][0] == pytest.approx(3, abs=0.01)
    assert table["affinity"][1] == pytest.approx(table["chance"][1], abs=0.01)
    assert table["top_share"][0] == 1
    flow = flow_table(profile, top=1)
    assert (flow[flow["layer"] == 0]["next_expert"] == (flow[flow["layer"] == 0]["expert"] + 3) % 8).all()


def test_one_layer_has_no_affinity():
    profile = Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], make_trace(random_ids(0, 1, 60, 8, 2)), {})
    assert affinity_table(profile).empty
    assert flow_table(profile).empty


def test_divergence_is_between_none_and_one_bit():
    assert jensen_shannon(np.array([1.0, 2]), np.array([2.0, 4])) == pytest.approx(0)
    assert jensen_shannon(np.array([1.0, 0]), np.array([0.0, 5])) == pytest.approx(1)


def sequences(seed, shift=0.0, num=40, length=20):
    """Sequences with a taste of their own, so that tokens of one resemble each other; `shift` makes expert 0 hotter."""
    rng = np.random.default_rng(seed)
    taste = rng.normal(size=(num, 1, 16)) + np.where(np.arange(16) == 0, shift, 0.0)
    scores = (taste + rng.gumbel(size=(num, length, 16))).reshape(1, num * length, 16)
    ids = np.argsort(-scores, axis=-1)[..., :2].astype(np.uint8)
    return Profile.from_tokens(make_spec(1, 16, 2), ["a", "b"], make_trace(ids, num_sequences=num), {})


def test_drift_is_told_from_noise():
    found = drift(sequences(0), sequences(1, shift=1.5))
    assert found.drifted
    assert found.experts.loc[found.experts["z"].idxmax(), "expert"] == 0
    assert not any(drift(sequences(seed), sequences(seed + 100), seed=seed).drifted for seed in range(10))


def test_p_values_are_fair_under_no_drift():
    """Half of all p should be below a half; tokens dealt one by one would call nearly everything drift."""
    small = [drift(sequences(s), sequences(s + 50), 99, s).layers.iloc[-1]["load_p"] < 0.5 for s in range(40)]
    assert 8 <= sum(small) <= 32


def test_drift_repeats_itself_and_refuses_what_it_cannot_compare(profile):
    first, second = profile.split_by_sequence()
    assert drift(first, second, 20).layers.equals(drift(first, second, 20).layers)
    with pytest.raises(CoterieError, match="compare one model"):
        drift(profile, sequences(0))
    one = profile.tokens.where(profile.tokens.sequence_ids == 0)
    with pytest.raises(CoterieError, match="at least 2 of each"):
        drift(profile, Profile.from_tokens(profile.model, profile.domains, one, {}))


def test_domains_that_differ_are_named():
    first, second = sequences(0), sequences(1, shift=2.5)
    ids = np.concatenate([first.tokens.topk_ids, second.tokens.topk_ids], axis=1)
    trace = make_trace(ids, num_sequences=80)
    trace.domain_ids[:] = np.arange(ids.shape[1]) >= ids.shape[1] // 2
    profile = Profile.from_tokens(make_spec(1, 16, 2), ["a", "b"], trace, {})
    table = domain_table(profile)
    assert table["drifted"].tolist() == [True, True]
    assert table["hottest"][1].startswith("layer 0 expert 0 (")
    shares = domain_expert_table(profile)
    assert shares.groupby("domain")["share"].sum().tolist() == pytest.approx([1, 1])


def test_a_domain_that_picked_no_expert_stands_out_nowhere():
    trace = make_trace(random_ids(0, 1, 60, 8, 2))
    trace.topk_ids[:, trace.domain_ids == 1] = 255
    table = domain_table(Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], trace, {}), 20)
    assert table["hottest"].tolist()[1] == "none"
    assert table["tokens"].tolist() == [30, 30]


def test_domains_of_one_sequence_each_are_told_nothing_about():
    trace = make_trace(random_ids(0, 1, 60, 8, 2), num_sequences=2)
    trace.domain_ids[:] = trace.sequence_ids
    profile = Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], trace, {})
    table = domain_table(profile, 20)
    assert table["load_p"].isna().all()
    assert not table["drifted"].any()


@pytest.mark.parametrize(("num_sequences", "known"), [(6, False), (8, False), (12, True)])
def test_sides_of_few_sequences_have_a_noise_and_no_p(num_sequences, known):
    """20 deals of 6 sequences, 70 of 8: the farthest of them is not rare enough to be called drift, whatever it is."""
    ids = np.zeros((1, 120, 2), np.uint8)
    ids[0, :60], ids[0, 60:] = [0, 1], [2, 3]
    trace = make_trace(ids, num_sequences=num_sequences)
    trace.domain_ids[:] = np.arange(120) >= 60
    table = domain_table(Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], trace, {}))
    assert table["load_p"].notna().tolist() == [known] * 2
    assert table["drifted"].tolist() == [known] * 2
    assert table["load_noise"].notna().all()


def test_an_expert_that_one_domain_alone_picks_is_only_there():
    ids = np.tile(np.array([[0, 1], [2, 3]], np.uint8), (40, 1))[None]
    ids[0, 40:, 0] = 5
    trace = make_trace(ids, num_sequences=8)
    trace.domain_ids[:] = np.arange(80) >= 40
    table = domain_table(Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], trace, {}), 20)
    assert table["hottest"].tolist()[1] == "layer 0 expert 5 (only here)"


def test_one_domain_has_nothing_to_differ_from():
    trace = make_trace(random_ids(0, 1, 60, 8, 2), num_domains=1)
    assert domain_table(Profile.from_tokens(make_spec(1, 8, 2), ["a"], trace, {})).empty
