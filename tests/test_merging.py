"""Merging equals profiling everything in one run."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import make_spec, make_trace, random_ids, traces
from hypothesis import given
from hypothesis import strategies as st

from profiler import CoterieError, Profile, ProfileWriter, merge
from profiler.folder import open_profile
from profiler.trace import TokenTrace

DOMAINS = ["a", "b"]


@given(traces(), st.integers(1, 59))
def test_merging_the_parts_equals_the_whole(tmp_path_factory, case, cut):
    spec, trace = case
    cut = min(cut, trace.num_tokens - 1)
    parts = [trace.where(slice(cut)), trace.where(slice(cut, None))]
    parts[1] = replace(parts[1], sequence_ids=parts[1].sequence_ids + parts[0].sequence_ids.max() + 1)
    whole = Profile.from_tokens(spec, DOMAINS, TokenTrace.concatenate(parts), {})
    parts[1] = replace(parts[1], sequence_ids=parts[1].sequence_ids - parts[0].sequence_ids.max() - 1)
    folder = tmp_path_factory.mktemp("merge")
    for number, part in enumerate(parts):
        Profile.from_tokens(spec, DOMAINS, part, {}).save(folder / str(number))
    merged = merge([folder / "0", folder / "1"], folder / "merged")
    assert merged.digest == whole.digest


def test_merging_more_than_a_shard(tmp_path, monkeypatch):
    for module in ("folder", "writer"):
        monkeypatch.setattr(f"profiler.{module}.TOKENS_PER_SHARD", 70)
    spec = make_spec(2, 8, 3)
    runs = [make_trace(random_ids(seed, 2, 100 * seed, 8, 3)) for seed in (1, 2, 3)]
    for number, run in enumerate(runs):
        Profile.from_tokens(spec, DOMAINS, run, {}).save(tmp_path / str(number))
    renumbered = [replace(run, sequence_ids=run.sequence_ids + 4 * number) for number, run in enumerate(runs)]
    whole = Profile.from_tokens(spec, DOMAINS, TokenTrace.concatenate(renumbered), {})
    assert merge([tmp_path / str(number) for number in range(3)], tmp_path / "merged").digest == whole.digest


def test_domains_are_united_by_name(tmp_path):
    spec, trace = make_spec(2, 8, 2), make_trace(random_ids(0, 2, 40, 8, 2))
    Profile.from_tokens(spec, ["a", "b"], trace, {}).save(tmp_path / "1")
    Profile.from_tokens(spec, ["b", "c"], trace, {}).save(tmp_path / "2")
    counts = merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged").counts
    assert open_profile(tmp_path / "merged").domains == ("a", "b", "c")
    for array in (counts.load, counts.transition, counts.tokens):
        assert array[1].sum() == array[0].sum() + array[2].sum()


def test_samples_are_thinned_to_the_smallest_share(tmp_path):
    spec = make_spec(1, 8, 2)
    for name, kept in (("half", 2_000), ("tenth", 400), ("all", None)):
        writer = ProfileWriter(tmp_path / name, spec, DOMAINS, max_traced_tokens=kept)
        writer.add(make_trace(random_ids(0, 1, 4_000, 8, 2)))
        writer.finish({})
    merged = merge([tmp_path / name for name in ("half", "tenth", "all")], tmp_path / "merged")
    assert merged.num_tokens == 12_000
    assert 1_050 < merged.num_traced_tokens < 1_350
    share = np.bincount(np.concatenate([trace.sequence_ids for trace in merged.traces()]) // 4, minlength=3) / 4_000
    assert (abs(share - 0.1) < 0.02).all()


def test_counts_only_profiles_merge_with_their_like(tmp_path):
    spec = make_spec(1, 8, 2)
    for name, kept in (("1", 0), ("2", 0), ("3", None)):
        writer = ProfileWriter(tmp_path / name, spec, DOMAINS, max_traced_tokens=kept)
        writer.add(make_trace(random_ids(int(name), 1, 40, 8, 2)))
        writer.finish({})
    assert merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged").num_tokens == 80
    with pytest.raises(CoterieError, match="holds counts only"):
        merge([tmp_path / "1", tmp_path / "3"], tmp_path / "mixed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "3", "merged"]


def test_what_loads_alone_cannot_tell_stays_known(tmp_path):
    spec, seen = make_spec(1, 8, 2), {"cannot_tell": ["co-activation"], "to_get_tokens": "record with --all"}
    for name, provenance in (("1", seen), ("2", seen), ("3", {})):
        writer = ProfileWriter(tmp_path / name, spec, DOMAINS, max_traced_tokens=0)
        writer.add(make_trace(random_ids(int(name), 1, 40, 8, 2)))
        writer.finish(provenance)
    provenance = merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged").provenance
    assert {key: provenance[key] for key in seen} == seen
    with pytest.raises(
        CoterieError, match="cannot merge .*1, which holds loads only, with profiles that hold co-activation"
    ):
        merge([tmp_path / "1", tmp_path / "3"], tmp_path / "mixed")


def test_no_token_is_counted_twice(tmp_path):
    for number in (1, 2):
        trace = make_trace(random_ids(number, 1, 40, 8, 2))
        Profile.from_tokens(make_spec(1, 8, 2), DOMAINS, trace, {}).save(tmp_path / str(number))
    both = merge([tmp_path / "1", tmp_path / "2"], tmp_path / "both")
    whole = Profile.load_from(tmp_path / "1")
    for name, half in zip(("even", "odd"), whole.split_by_sequence(), strict=True):
        replace(half, provenance={"made_from": [whole.digest]}).save(tmp_path / name)
    for names in (("1", "1"), ("2", "1", "2"), ("1", "both"), ("both", "2"), ("odd", "1")):
        with pytest.raises(CoterieError, match=r"^cannot merge .*, which has tokens of it .*; leave one out$"):
            merge([tmp_path / name for name in names], tmp_path / "merged")
    assert both.num_tokens == 80
    assert merge([tmp_path / "even", tmp_path / "odd"], tmp_path / "merged").num_tokens == 40


def test_different_models_and_too_many_domains_are_refused(tmp_path):
    trace = make_trace(random_ids(0, 1, 40, 8, 2))
    Profile.from_tokens(make_spec(1, 8, 2), DOMAINS, trace, {}).save(tmp_path / "1")
    Profile.from_tokens(make_spec(1, 16, 2), DOMAINS, trace, {}).save(tmp_path / "2")
    with pytest.raises(CoterieError, match="different models"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "merged")
    for run in ("3", "4"):
        Profile.from_tokens(make_spec(1, 8, 2), [f"{run}-{i}" for i in range(200)], trace, {}).save(tmp_path / run)
    with pytest.raises(CoterieError, match="400 domains together"):
        merge([tmp_path / "3", tmp_path / "4"], tmp_path / "merged")
