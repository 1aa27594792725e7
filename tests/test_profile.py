"""Profiles survive the disk, merge exactly, and refuse what was tampered with."""

import itertools
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from conftest import make_spec, make_trace, random_ids

from profiler import CoterieError, Profile
from profiler.drift import _sequence_counts
from profiler.folder import header_digest


def same(first: Profile, second: Profile) -> bool:
    return first.digest == second.digest and first.model == second.model and first.num_tokens == second.num_tokens


def test_round_trip(profile, tmp_path):
    profile.save(tmp_path / "run.profile")
    again = Profile.load_from(tmp_path / "run.profile")
    assert same(profile, again)
    assert again.provenance == profile.provenance
    assert [path.name for path in tmp_path.iterdir()] == ["run.profile"]


def test_round_trip_in_several_shards(profile, tmp_path, monkeypatch):
    monkeypatch.setattr("profiler.folder.TOKENS_PER_SHARD", 250)
    profile.save(tmp_path / "run.profile")
    assert len(list((tmp_path / "run.profile").glob("tokens-*"))) == 3
    assert same(profile, Profile.load_from(tmp_path / "run.profile"))


def test_saving_again_replaces(profile, tmp_path):
    profile.save(tmp_path / "run.profile")
    half, _ = profile.split_by_sequence()
    half.save(tmp_path / "run.profile")
    assert same(half, Profile.load_from(tmp_path / "run.profile"))


def test_saving_again_never_deletes_other_files(profile, tmp_path):
    profile.save(tmp_path / "run.profile")
    for name in ("plan.json", "model.safetensors", "tokens-1.safetensors", ".plan.json.partial"):
        (tmp_path / "run.profile" / name).write_text("mine")
        with pytest.raises(CoterieError, match=f"holds {name}"):
            profile.save(tmp_path / "run.profile")
        assert (tmp_path / "run.profile" / name).read_text() == "mine"
        (tmp_path / "run.profile" / name).unlink()


def test_saving_never_replaces_something_else(profile, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(CoterieError, match="not a profile"):
        profile.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep me"


def test_split_is_by_sequence_and_complete(profile):
    even, odd = profile.split_by_sequence()
    assert not set(even.tokens.sequence_ids) & set(odd.tokens.sequence_ids)
    assert (even.counts.load + odd.counts.load == profile.counts.load).all()


def of_sequences(*domains):
    """A profile of sequences of 10 tokens, each of the domain given."""
    trace = make_trace(random_ids(0, 2, 10 * len(domains), 16, 4), num_sequences=len(domains))
    domain_ids = np.repeat(np.array(domains, dtype=np.uint8), 10)
    names = [f"domain {number}" for number in range(max(domains) + 1)]
    return Profile.from_tokens(make_spec(2, 16, 4), names, replace(trace, domain_ids=domain_ids), {})


@pytest.mark.parametrize(
    ("domains", "odd"),
    [
        ([0, 1] * 4, [1, 2, 5, 6]),  # in turn, one sequence a batch: every second one is all of domain 1
        ([0, 1] * 2 + [0], [1, 2]),
        ([2, 2, 2, 0, 0, 0, 0, 1], [1, 3, 5, 7]),  # in blocks
        ([0, 0, 1, 1, 0, 0, 1], [1, 3, 5]),  # two a batch
        ([0, 1, 2], [1]),
    ],
)
def test_both_halves_hold_every_domain(domains, odd):
    parts = of_sequences(*domains).split_by_sequence()
    assert sorted(set(parts[1].tokens.sequence_ids.tolist())) == odd
    for domain in set(domains):
        halves = [len(np.unique(part.tokens.sequence_ids[part.tokens.domain_ids == domain])) for part in parts]
        assert abs(halves[0] - halves[1]) <= 1
    assert sum(part.num_tokens for part in parts) == 10 * len(domains)


def test_split_needs_two_sequences():
    trace = make_trace(random_ids(0, 1, 10, 8, 2), num_sequences=1)
    with pytest.raises(CoterieError, match="1 sequence"):
        Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], trace, {}).split_by_sequence()


@pytest.mark.parametrize("num_sequences", [1, 64, 2000])
def test_sequences_are_counted_for_drift_in_little_memory(num_sequences):
    rng = np.random.default_rng(0)
    sequence_T = rng.permutation(np.arange(4 * num_sequences) % num_sequences)
    experts_TK = np.where(rng.random((len(sequence_T), 8)) < 0.1, 64, random_ids(0, 1, len(sequence_T), 64, 8)[0])
    tracemalloc.start()
    load_SE, pairs_SX = _sequence_counts(experts_TK.astype(np.int64), sequence_T, num_sequences, 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    both = (experts_TK[:, :, None] < 64) & (experts_TK[:, None, :] < 64) & ~np.eye(8, dtype=bool)
    per_token = both.sum(axis=(1, 2)) // 2
    assert (load_SE.sum(axis=1) == np.bincount(sequence_T, weights=(experts_TK < 64).sum(axis=1))).all()
    assert (pairs_SX.sum(axis=1) == np.bincount(sequence_T, weights=per_token)).all()
    pairs = sorted(
        tuple(sorted(pair)) for ids in experts_TK.tolist() for pair in itertools.combinations(ids, 2) if max(pair) < 64
    )
    assert pairs_SX.sum(axis=0).tolist() == [len(list(same)) for _, same in itertools.groupby(pairs)]
    if num_sequences == 2000:
        assert peak < 2 * pairs_SX.nbytes


@pytest.mark.parametrize("name", ["profile.json", "counts.safetensors", "tokens-00000.safetensors"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "flipped"])
def test_harmed_files_are_refused(profile, tmp_path, name, harm):
    folder = tmp_path / "run.profile"
    profile.save(folder)
    data = bytearray((folder / name).read_bytes())
    if harm == "missing":
        (folder / name).unlink()
    elif harm == "truncated":
        (folder / name).write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
    with pytest.raises(CoterieError) as caught:
        Profile.load_from(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"files": {"../outside": "0"}},
        {"files": []},
        {"model": {}},
        {"model": None},
        {"domains": ["only one"]},
        {"digest": "0"},
    ],
)
def test_edited_headers_are_refused(profile, tmp_path, change):
    folder = tmp_path / "run.profile"
    profile.save(folder)
    header = json.loads((folder / "profile.json").read_text())
    header |= change
    header["header_digest"] = header_digest(header)  # a careful forger
    (folder / "profile.json").write_text(json.dumps(header))
    with pytest.raises(CoterieError):
        Profile.load_from(folder)


def test_expert_out_of_range_is_refused():
    ids = random_ids(0, 1, 10, 8, 2)
    ids[0, 0, 0] = 8
    with pytest.raises(CoterieError, match="expert 8, must be below 8"):
        Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], make_trace(ids), {})


def test_empty_trace_is_refused():
    empty = make_trace(random_ids(0, 1, 10, 8, 2)).where(np.zeros(10, dtype=bool))
    with pytest.raises(CoterieError, match="no token"):
        Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], empty, {})


def test_an_expert_picked_twice_is_refused_and_the_layer_named():
    ids = random_ids(0, 2, 10, 8, 2)
    ids[1, 3] = 5
    with pytest.raises(CoterieError, match=r"layer 1: token 3 picked \[5, 5\]"):
        Profile.from_tokens(make_spec(2, 8, 2), ["a", "b"], make_trace(ids), {})


def test_picks_of_no_expert_survive_the_disk(profile, tmp_path):
    ids = random_ids(0, 1, 40, 8, 3)
    ids[0, ::4, 1:] = 255
    first = Profile.from_tokens(make_spec(1, 8, 3), ["a", "b"], make_trace(ids), {})
    first.save(tmp_path / "run.profile")
    again = Profile.load_from(tmp_path / "run.profile")
    assert same(first, again)
    assert again.num_tokens == 40


def test_weights_survive_the_disk(profile, tmp_path):
    weights = np.random.default_rng(0).random((2, 600, 4)).astype(np.float16)
    trace = replace(profile.tokens, topk_weights=weights)
    Profile.from_tokens(profile.model, profile.domains, trace, {}).save(tmp_path / "run.profile")
    assert (Profile.load_from(tmp_path / "run.profile").tokens.topk_weights == weights).all()


def test_split_by_domain_keeps_counts(profile):
    parts = profile.split_by_domain()
    assert list(parts) == ["prose", "code"]
    for number, part in enumerate(parts.values()):
        recounted = Profile.from_tokens(part.model, part.domains, part.tokens, {})
        for name, array in recounted.counts.arrays().items():
            assert (array == part.counts.arrays()[name]).all()
            assert (array[0] == profile.counts.arrays()[name][number]).all()


def test_split_by_phase(profile):
    phase = (np.arange(600) % 3 == 0).astype(np.uint8)
    mixed = Profile.from_tokens(profile.model, profile.domains, replace(profile.tokens, phase=phase), {})
    parts = mixed.split_by_phase()
    assert {name: part.num_tokens for name, part in parts.items()} == {"prefill": 400, "decode": 200}
    assert list(profile.split_by_phase()) == ["prefill"]
