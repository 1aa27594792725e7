"""Which experts a token may pick: lists and limits against their slow references, and what each promises."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_spec, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from placement.constraints import config, pruning
from placement.constraints.constrain import selector
from placement.constraints.lists import (
    CollaboratorLists,
    collaborator_lists,
    device_aware_lists,
    ranks_held,
    select_from_lists,
    select_from_lists_reference,
)
from placement.constraints.pruning import (
    RankLimit,
    limit_ranks,
    open_places,
    select_within_limit,
    select_within_limit_reference,
)
from placement.constraints.similarity import RouterSimilarity, similarity_reference
from placement.placement_map import PlacementMap
from placement.topology import Topology
from profiler import CoterieError, Recorder


def random_map(model, ranks, copies=0, nodes=1, seed=0):
    rng = np.random.default_rng(seed)
    topology = Topology.for_experts(model.num_experts, ranks, nodes, copies)
    rows = []
    for _ in model.layer_ids:
        held = [list(part) for part in np.array_split(rng.permutation(model.num_experts), ranks)]
        for experts in held:
            others = rng.permutation(np.setdiff1d(np.arange(model.num_experts), experts))
            experts += others[: topology.slots_per_rank - len(experts)].tolist()
        rows.append(np.concatenate(held))
    return PlacementMap(model, topology, np.array(rows), {"name": "random"})


@st.composite
def scores(draw, max_experts=16):
    """Distinct scores, so that no tie has two right answers."""
    experts = draw(st.sampled_from([4, 8, max_experts]))
    tokens = draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return torch.tensor(rng.normal(size=(tokens, experts)), dtype=torch.float32).softmax(dim=-1), rng


@given(scores(), st.data())
def test_c2r_equals_its_reference(given_scores, data):
    scores_TE, rng = given_scores
    experts = scores_TE.shape[1]
    top_k = data.draw(st.integers(1, experts - 1))
    size = data.draw(st.integers(max(top_k - 1, 1), experts - 1))
    lists = np.array([rng.permutation(np.delete(np.arange(experts), e))[:size] for e in range(experts)])
    made = CollaboratorLists(make_spec(1, experts, top_k), lists[None], {})
    got = select_from_lists(scores_TE, torch.as_tensor(made.allowed[0]), top_k)
    assert got.tolist() == select_from_lists_reference(scores_TE.tolist(), lists.tolist(), top_k)
    if size == experts - 1:
        assert torch.equal(got, scores_TE.topk(top_k).indices)


@given(scores(), st.data())
def test_pruning_equals_its_reference(given_scores, data):
    scores_TE, rng = given_scores
    experts = scores_TE.shape[1]
    top_k = data.draw(st.integers(1, min(experts // 2, 4)))
    ranks = data.draw(st.sampled_from([2, 4]))
    copies = data.draw(st.sampled_from([0, ranks]))
    limit = data.draw(st.integers(1, 5))
    placement = random_map(make_spec(1, experts, top_k), ranks, copies, seed=int(rng.integers(1000)))
    by_similarity = data.draw(st.booleans())
    similarity = rng.normal(size=(1, experts, experts)).astype(np.float32) if by_similarity else None
    held_by = [set(row) - {-1} for row in placement.physical_to_logical_map[0].reshape(ranks, -1).tolist()]
    fewest = min(len(set().union(*some)) for some in itertools.combinations(held_by, min(limit, ranks)))
    if fewest < top_k:
        with pytest.raises(CoterieError, match="a token takes"):
            limit_ranks(placement, limit, similarity)
        return
    constraint = limit_ranks(placement, limit, similarity)
    got = selector(constraint, 0, top_k)(scores_TE)
    held = constraint.held[0].tolist()
    wanted = select_within_limit_reference(
        scores_TE.tolist(), held, limit, top_k, None if similarity is None else similarity[0].tolist()
    )
    assert got.tolist() == wanted
    for ids in got.tolist():
        assert len(set(ids)) == top_k
        if not copies:
            assert len({np.flatnonzero(held[expert])[0] for expert in ids}) <= limit
    if limit >= min(top_k, ranks):
        assert torch.equal(got, scores_TE.topk(top_k).indices)  # nothing changes where the limit is loose


@given(scores(), st.data())
def test_tokens_within_the_limit_keep_their_picks(given_scores, data):
    scores_TE, rng = given_scores
    experts = scores_TE.shape[1]
    placement = random_map(make_spec(1, experts, 2), 2, seed=int(rng.integers(1000)))
    similarity = rng.normal(size=(1, experts, experts)).astype(np.float32)
    best = scores_TE.topk(2).indices
    rank = torch.as_tensor(placement.rank_of_expert[0])[best]
    inside = rank[:, 0] == rank[:, 1]
    for table in (None, similarity):
        got = selector(limit_ranks(placement, 1, table), 0, 2)(scores_TE)
        assert torch.equal(got[inside], best[inside])
        assert torch.equal(got[:, 0], best[:, 0])  # the first pick opens its rank


def test_a_limit_of_nodes_counts_nodes():
    model = make_spec(2, 16, 4)
    placement = random_map(model, ranks=8, nodes=2)
    scores_TE = torch.rand(200, 16).softmax(dim=-1)
    ids = selector(limit_ranks(placement, 1, level="node"), 0, 4)(scores_TE)
    ranks = placement.rank_of_expert[0][ids.numpy()]
    assert (np.ptp(ranks // 4, axis=1) == 0).all()
    assert len({len(set(row)) for row in ranks.tolist()}) > 1  # ranks of the node are free


def test_copies_leave_more_to_choose_from():
    model = make_spec(1, 16, 4)
    placement = random_map(model, ranks=4, copies=8)
    scores_TE = torch.rand(500, 16).softmax(dim=-1)
    best = scores_TE.topk(4)
    kept = {}
    for aware in (True, False):
        constraint = limit_ranks(placement, 2, replica_aware=aware)
        held = torch.as_tensor(constraint.held[0])
        assert constraint.held.sum() == (24 if aware else 16)
        ids = selector(constraint, 0, 4)(scores_TE)
        opened = open_places(best.indices, best.values, held, 2, has_copies=aware)
        assert int(opened.sum(dim=1).max()) <= 2
        assert (held[ids] & opened[:, None]).any(dim=-1).all()  # every pick has a copy on a rank that is open
        kept[aware] = float(scores_TE.gather(1, ids).sum())
    assert kept[True] > kept[False]


def test_with_copies_too_a_token_that_needs_no_more_keeps_its_picks():
    """Ranks 0 to 2 hold a on 0 and 1, b on 1, c on 2, d and e on 0 and 2: 1 and 2 are enough, by score 0 would be opened."""
    held = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 1], [1, 0, 1], [1, 0, 0]], dtype=torch.bool)
    scores = torch.tensor([[0.25, 0.20, 0.18, 0.17, 0.16, 0.04]])
    ids = select_within_limit(scores, held, 2, 5, None, has_copies=True)
    assert sorted(ids[0].tolist()) == [0, 1, 2, 3, 4]
    assert select_within_limit_reference(scores.tolist(), held.tolist(), 2, 5, None) == ids.tolist()


def test_with_copies_the_experts_of_each_combination_of_ranks_count(monkeypatch):
    slots = np.array([[0, 1, 4, 2, 3, 5, 4, 5, 6, 7, 0, 2]])
    placement = PlacementMap(make_spec(1, 8, 4), Topology(1, 4, 3), slots, {"name": "copies"})
    limit_ranks(placement, 2)  # any two ranks hold 5 or 6 experts
    with pytest.raises(CoterieError, match="N 1: so many ranks may hold 3 experts only, a token takes 4"):
        limit_ranks(placement, 1)
    monkeypatch.setattr(pruning, "MOST_COMBINATIONS", 5)
    with pytest.raises(CoterieError, match="N 2: so many ranks hold 3 experts for certain, a token takes 4"):
        limit_ranks(placement, 2)


def test_lists_rank_collaborators(profile):
    lists = collaborator_lists(profile, 15).lists
    together = profile.counts.coactivation.sum(axis=0)
    for layer in range(2):
        for expert in range(16):
            row = together[layer, expert][lists[layer, expert]]
            assert (np.diff(row) <= 0).all()
            assert sorted([*lists[layer, expert].tolist(), expert]) == list(range(16))
    short = collaborator_lists(profile, 5).lists
    assert (short == lists[:, :, :5]).all()


def test_lists_are_not_made_of_counts_without_pairs(profile):
    counts = replace(profile.counts, coactivation=np.zeros_like(profile.counts.coactivation))
    blind = replace(profile, counts=counts, provenance={"to_get_tokens": "start the engine with --all"})
    for made in (collaborator_lists, lambda *given: device_aware_lists(given[0], random_map(blind.model, 4), given[1])):
        with pytest.raises(CoterieError, match="holds no co-activation.*start the engine with --all"):
            made(blind, 5)


def test_device_aware_lists_fill_rank_by_rank(profile):
    placement = random_map(profile.model, ranks=4)
    aware = device_aware_lists(profile, placement, 7)  # an expert and 7 others: two ranks of 4 slots
    ranks = placement.rank_of_expert
    for layer in range(2):
        for expert in range(16):
            listed = ranks[layer][aware.lists[layer, expert]]
            assert (listed[:3] == ranks[layer, expert]).all()
            assert len(set(listed[3:].tolist())) == 1
    scores_TE = torch.rand(300, 16).softmax(dim=-1)
    ids = selector(aware, 0, 4)(scores_TE).numpy()
    fan_out = [len(set(row)) for row in ranks[0][ids].tolist()]
    blind = selector(collaborator_lists(profile, 7), 0, 4)(scores_TE).numpy()
    assert max(fan_out) <= 2
    assert np.mean(fan_out) < np.mean([len(set(row)) for row in ranks[0][blind].tolist()])


def test_device_aware_lists_know_nodes_and_copies(profile):
    placement = random_map(profile.model, ranks=4, copies=4, nodes=2)
    lists = device_aware_lists(profile, placement, 15).lists
    held = ranks_held(placement.physical_to_logical_map[0], 16, placement.topology.slots_per_rank, 4)
    for expert in range(16):
        on_own = held[lists[0, expert]][:, held[expert]].any(axis=1)
        assert not (np.diff(on_own.astype(int)) > 0).any()  # first all that share a rank, then the others


def test_what_cannot_be_is_refused(profile):
    placement = random_map(profile.model, ranks=8)
    with pytest.raises(CoterieError, match=r"T 2: .* between 3 \(K-1\) and 15"):
        collaborator_lists(profile, 2)
    with pytest.raises(CoterieError, match="T 16"):
        device_aware_lists(profile, placement, 16)
    with pytest.raises(CoterieError, match="N 0: a token needs at least 1 rank"):
        limit_ranks(placement, 0)
    with pytest.raises(CoterieError, match="N 1: so many ranks may hold 2 experts only, a token takes 4"):
        limit_ranks(placement, 1)
    limit_ranks(placement, 2)
    other = random_map(replace(profile.model, num_experts=32), ranks=8)
    with pytest.raises(CoterieError, match="the map is for"):
        device_aware_lists(profile, other, 5)
    with pytest.raises(CoterieError, match="each must name other experts below 16"):
        CollaboratorLists(profile.model, np.zeros((2, 16, 3), dtype=np.int64), {})
    with pytest.raises(CoterieError, match="similarity"):
        limit_ranks(placement, 2, np.zeros((1, 16, 16), dtype=np.float32))


def test_constraints_outlive_the_process(profile, tmp_path):
    placement = random_map(profile.model, ranks=4)
    similarity = np.random.default_rng(0).random((2, 16, 16), dtype=np.float32)
    for constraint in (
        collaborator_lists(profile, 5),
        limit_ranks(placement, 2),
        limit_ranks(placement, 1, similarity),
    ):
        path = tmp_path / "constraint.safetensors"
        config.save(constraint, path)
        again = config.load(tmp_path)
        assert config.digest_of(again) == config.digest_of(constraint)
        assert type(again) is type(constraint)
        assert again.name == constraint.name
    for broken, message in (
        (path.read_bytes()[:100], "truncated, or not a constraint"),
        (b"", "truncated, or not a constraint"),
        (path.read_bytes().replace(b'\\"schema_version\\": 1', b'\\"schema_version\\": 9'), "schema_version 9"),
    ):
        path.write_bytes(broken)
        with pytest.raises(CoterieError, match=message):
            config.load(path)
    with pytest.raises(CoterieError, match="no such file"):
        config.load(tmp_path / "missing")


def test_similarity_is_the_cosine_of_logits_over_all_batches():
    model = tiny_model("olmoe")
    logits, rows = [[], []], [torch.randint(3, 64, (2, 7)), torch.randint(3, 64, (3, 5))]
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    handles = [
        layer.mlp.gate.register_forward_hook(lambda _m, _a, out, kept=kept: kept.append(out[0]))
        for layer, kept in zip(model.model.layers, logits, strict=True)
    ]
    with torch.no_grad(), Recorder(model) as recorder, RouterSimilarity(model) as similarity:
        model(input_ids=rows[0], attention_mask=mask)
        first = similarity.table()
        model(input_ids=rows[1])
    for handle in handles:
        handle.remove()
    table = similarity.table()
    assert table.num_tokens == recorder.trace().num_tokens == 11 + 15
    for layer in range(2):
        kept = torch.cat([logits[layer][0][mask.flatten().bool()], logits[layer][1]])
        np.testing.assert_allclose(table.similarity[layer], similarity_reference(kept.tolist()), atol=1e-5)
    with torch.no_grad(), RouterSimilarity(model) as second:
        model(input_ids=rows[1])
    np.testing.assert_allclose((first + second.table()).similarity, table.similarity, atol=1e-6)
    with pytest.raises(CoterieError, match="no token was seen"):
        RouterSimilarity(model).table()


def test_limit_of_any_shape_is_checked(profile):
    with pytest.raises(CoterieError, match="held"):
        RankLimit(profile.model, np.zeros((2, 16, 4), dtype=bool), 1, "rank", None, {})


def test_selection_runs_without_gradients_and_on_any_device_type():
    scores_TE = torch.rand(5, 8, requires_grad=True).softmax(dim=-1)
    held = torch.as_tensor(np.eye(2, dtype=bool).repeat(4, 0))
    ids = select_within_limit(scores_TE, held, 1, 2, None, has_copies=False)
    assert ids.dtype == torch.int64
    meta = select_within_limit(
        scores_TE.to("meta"), held.to("meta"), 1, 2, torch.rand(8, 8).to("meta"), has_copies=True
    )
    assert meta.shape == (5, 2)  # nothing of it needs to know values on the host
    assert select_from_lists(scores_TE.to("meta"), torch.ones(8, 8, dtype=torch.bool, device="meta"), 2).shape == (5, 2)
