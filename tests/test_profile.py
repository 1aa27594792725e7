"""Profiles survive the disk, merge exactly, and refuse what was tampered with."""

import json

import numpy as np
import pytest
from conftest import make_spec, make_trace, random_ids, traces
from hypothesis import given

from profiler import CoterieError, Profile, merge
from profiler.profile import TokenTrace, _header_digest


def same(first: Profile, second: Profile) -> bool:
    return first.digest == second.digest and first.model == second.model and first.num_tokens == second.num_tokens


def test_round_trip(profile, tmp_path):
    profile.save(tmp_path / "run.profile")
    again = Profile.load_from(tmp_path / "run.profile")
    assert same(profile, again)
    assert again.provenance == profile.provenance
    assert [path.name for path in tmp_path.iterdir()] == ["run.profile"]


def test_round_trip_in_several_shards(profile, tmp_path, monkeypatch):
    monkeypatch.setattr("profiler.profile.TOKENS_PER_SHARD", 250)
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
    (tmp_path / "run.profile" / "plan.json").write_text("mine")
    with pytest.raises(CoterieError, match="holds plan.json"):
        profile.save(tmp_path / "run.profile")
    assert (tmp_path / "run.profile" / "plan.json").read_text() == "mine"


def test_merging_too_many_domains_is_refused():
    trace = make_trace(random_ids(0, 1, 40, 8, 2))
    parts = [Profile.from_tokens(make_spec(1, 8, 2), [f"{run}-{i}" for i in range(200)], trace, {}) for run in (1, 2)]
    with pytest.raises(CoterieError, match="400 domains together"):
        merge(parts)


def test_saving_never_replaces_something_else(profile, tmp_path):
    (tmp_path / "notes.txt").write_text("keep me")
    with pytest.raises(CoterieError, match="not a profile"):
        profile.save(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "keep me"


@given(traces(), traces())
def test_merging_equals_profiling_the_concatenation(first, second):
    (spec, trace), (other_spec, other_trace) = first, second
    domains = ["a", "b"]
    if not spec.routes_like(other_spec):
        parts = [Profile.from_tokens(s, domains, t, {}) for s, t in (first, second)]
        with pytest.raises(CoterieError, match="different models"):
            merge(parts)
        return
    _check_merge(spec, trace, other_trace)


def test_merging_two_runs_of_one_model():
    traces_of_runs = [make_trace(random_ids(seed, 2, 90, 8, 3)) for seed in (1, 2)]
    _check_merge(make_spec(2, 8, 3), *traces_of_runs)


def _check_merge(spec, trace, other_trace):
    merged = merge([Profile.from_tokens(spec, ["a", "b"], part, {}) for part in (trace, other_trace)])
    renumbered = TokenTrace(
        other_trace.topk_ids,
        other_trace.sequence_ids + trace.sequence_ids.max() + 1,
        other_trace.domain_ids,
        other_trace.phase,
    )
    whole = Profile.from_tokens(spec, ["a", "b"], TokenTrace.concatenate([trace, renumbered]), {})
    assert merged.digest == whole.digest


def test_merging_unites_domains_by_name():
    spec, trace = make_spec(1, 8, 2), make_trace(random_ids(0, 1, 40, 8, 2))
    merged = merge([Profile.from_tokens(spec, ["a", "b"], trace, {}), Profile.from_tokens(spec, ["b", "c"], trace, {})])
    assert merged.domains == ("a", "b", "c")
    assert merged.load[1].sum() == merged.load[0].sum() + merged.load[2].sum()


def test_split_is_by_sequence_and_complete(profile):
    even, odd = profile.split_by_sequence()
    assert not set(even.tokens.sequence_ids) & set(odd.tokens.sequence_ids)
    assert (even.load + odd.load == profile.load).all()


def test_split_needs_two_sequences():
    trace = make_trace(random_ids(0, 1, 10, 8, 2), num_sequences=1)
    with pytest.raises(CoterieError, match="1 sequence"):
        Profile.from_tokens(make_spec(1, 8, 2), ["a", "b"], trace, {}).split_by_sequence()


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
    header["header_digest"] = _header_digest(header)  # a careful forger
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
