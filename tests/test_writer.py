"""A profile written bit by bit is the one written at once, whatever kills the run on the way."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_spec, make_trace, random_ids
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as to_safetensors

import profiler.files
from profiler import CoterieError, Profile, ProfileWriter, zoo
from profiler.counts import Tally
from profiler.documents import Document, read_documents
from profiler.folder import open_profile
from profiler.loading import load_model
from profiler.profiling import profile_model
from profiler.trace import RowSketch, TokenTrace
from profiler.writer import Reservoir, discard_unfinished, unfinished_folder

SPEC = make_spec(2, 16, 4)
TRACE = make_trace(random_ids(0, 2, 1000, 16, 4), num_sequences=20)
DOMAINS = ["prose", "code"]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    for module in ("folder", "writer"):
        monkeypatch.setattr(f"profiler.{module}.TOKENS_PER_SHARD", 150)


def feed(writer, steps=range(10_000), checkpoint_every=1):
    """Add the trace in passes of 37 tokens, from where the writer stands."""
    for step in steps:
        part = TRACE.where(slice(37 * step, 37 * step + 37))
        if part.num_tokens == 0:
            break
        if step < writer.position.get("step", 0):
            continue
        writer.add(part)
        if step % checkpoint_every == 0:
            writer.checkpoint({"step": step + 1})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix == ".safetensors"}


def test_writing_in_passes_is_saving_at_once(tmp_path):
    writer = ProfileWriter(tmp_path / "passes", SPEC, DOMAINS)
    feed(writer)
    stored = writer.finish({"made": "up"})
    Profile.from_tokens(SPEC, DOMAINS, TRACE, {"made": "up"}).save(tmp_path / "at-once")
    assert contents(tmp_path / "passes") == contents(tmp_path / "at-once")
    assert stored.digest == open_profile(tmp_path / "at-once").digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["at-once", "passes"]


@given(st.integers(0, 27), st.integers(1, 5), st.sampled_from([None, 0, 100, 5000]))
def test_killed_anywhere_and_resumed_ends_with_the_same_bytes(
    tmp_path_factory, killed_at, checkpoint_every, max_traced_tokens
):
    folder = tmp_path_factory.mktemp("killed")
    options = {"max_traced_tokens": max_traced_tokens, "seed": 3}
    whole = ProfileWriter(folder / "whole", SPEC, DOMAINS, **options)
    feed(whole)
    whole.finish({})
    killed = ProfileWriter(folder / "killed", SPEC, DOMAINS, **options)
    feed(killed, range(killed_at), checkpoint_every)
    killed.close()  # as the end of its process would
    resumed = ProfileWriter(folder / "killed", SPEC, DOMAINS, resume=True, **options)
    feed(resumed, checkpoint_every=checkpoint_every)
    resumed.finish({})
    assert contents(folder / "killed") == contents(folder / "whole")


def test_a_run_that_is_at_work_is_left_alone(tmp_path):
    writer = ProfileWriter(tmp_path / "run", SPEC, DOMAINS)
    for steps in (range(1, 5), range(5, 10)):  # before its first checkpoint and after it
        feed(writer, steps, checkpoint_every=5)
        for resume in (False, True):
            with pytest.raises(CoterieError, match=r"run\.partial: another run is writing there; wait .* another name"):
                ProfileWriter(tmp_path / "run", SPEC, DOMAINS, resume=resume)
        discard_unfinished(tmp_path / "run")
    assert writer.finish({}).num_tokens == 9 * 37
    ProfileWriter(tmp_path / "run", SPEC, DOMAINS).discard()
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_folders_that_cannot_be_locked_are_written_all_the_same(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # of a folder on NFS

    monkeypatch.setattr("profiler.files.fcntl.flock", refuse)
    writer = ProfileWriter(tmp_path / "run", SPEC, DOMAINS)
    feed(writer)
    assert writer.finish({}).num_tokens == 1000


def test_many_small_passes_take_no_longer_each(tmp_path, monkeypatch):
    """Each is looked at a few times, however many came before it."""
    parts, looks, num_tokens = [TRACE.where(slice(1))] * 400, [], TokenTrace.num_tokens.fget
    writer = ProfileWriter(tmp_path / "run", SPEC, DOMAINS)
    monkeypatch.setattr("profiler.writer.TOKENS_PER_SHARD", 10_000)
    monkeypatch.setattr(TokenTrace, "num_tokens", property(lambda trace: looks.append(0) or num_tokens(trace)))
    for part in parts:
        writer.add(part)
    assert len(looks) < 20 * len(parts)


def test_an_unfinished_run_is_not_overwritten(tmp_path):
    feed(ProfileWriter(tmp_path / "run", SPEC, DOMAINS), range(5))
    with pytest.raises(CoterieError, match="unfinished recording is there; go on with --resume"):
        ProfileWriter(tmp_path / "run", SPEC, DOMAINS)
    with pytest.raises(CoterieError, match="unfinished recording; finish it"):
        open_profile(unfinished_folder(tmp_path / "run"))


def test_only_the_same_run_may_go_on(tmp_path):
    feed(ProfileWriter(tmp_path / "run", SPEC, DOMAINS, run={"sequence_length": 256}), range(5))
    with pytest.raises(CoterieError, match="sequence_length was 256, now it is 512"):
        ProfileWriter(tmp_path / "run", SPEC, DOMAINS, run={"sequence_length": 512}, resume=True)
    with pytest.raises(CoterieError, match="domains was"):
        ProfileWriter(tmp_path / "run", SPEC, ["prose", "verse"], run={"sequence_length": 256}, resume=True)


@pytest.mark.parametrize("harm", [{"pending.spare": np.zeros(3)}, {"tally.load": None}, {"note": b"[]"}])
def test_checkpoints_of_another_version_are_refused(tmp_path, harm):
    feed(ProfileWriter(tmp_path / "run", SPEC, DOMAINS), range(5))
    path = unfinished_folder(tmp_path / "run") / "checkpoint"
    arrays = parse_safetensors(path.read_bytes()[32:])
    for name, value in harm.items():
        arrays[name] = np.frombuffer(value, dtype=np.uint8) if isinstance(value, bytes) else value
    data = to_safetensors({name: array for name, array in arrays.items() if array is not None})
    path.write_bytes(hashlib.sha256(data).digest() + data)
    with pytest.raises(
        CoterieError, match="checkpoint: written by another version of coterie .*; go on with"
    ) as caught:
        ProfileWriter(tmp_path / "run", SPEC, DOMAINS, resume=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["checkpoint", "tokens-00001.safetensors"])
@pytest.mark.parametrize("harm", ["truncated", "flipped"])
def test_harmed_unfinished_runs_are_refused(tmp_path, name, harm):
    feed(ProfileWriter(tmp_path / "run", SPEC, DOMAINS), range(20))
    path = unfinished_folder(tmp_path / "run") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if harm == "flipped" else data[:100])
    with pytest.raises(CoterieError, match=f"{name}: truncated or edited"):
        ProfileWriter(tmp_path / "run", SPEC, DOMAINS, resume=True)


def test_a_refused_pass_is_not_counted(tmp_path):
    writer = ProfileWriter(tmp_path / "run", SPEC, DOMAINS)
    writer.add(TRACE)
    bad = TRACE.where(np.arange(10))
    bad.topk_ids[1, 4] = 99
    with pytest.raises(CoterieError, match="layer 1: expert 99, must be below 16"):
        writer.add(bad)
    assert writer.finish({}).num_tokens == 1000


def test_a_full_disk_is_one_line_and_keeps_what_was_complete(tmp_path, monkeypatch):
    writer = ProfileWriter(tmp_path / "run", SPEC, DOMAINS)
    feed(writer, range(10))

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(profiler.files.os, "fsync", full)
        with pytest.raises(
            CoterieError, match=r"(safetensors|checkpoint): cannot be written \(No space left.*free some"
        ):
            feed(writer, checkpoint_every=13)
    writer.close()
    resumed = ProfileWriter(tmp_path / "run", SPEC, DOMAINS, resume=True)
    assert resumed.position == {"step": 10}
    feed(resumed)
    assert resumed.finish({}).num_tokens == 1000


def test_a_disk_that_fails_is_not_called_full(tmp_path, monkeypatch):
    writer = ProfileWriter(tmp_path / "run", SPEC, DOMAINS)
    feed(writer, range(10), checkpoint_every=20)

    def fail(_descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(profiler.files.os, "fsync", fail)
    with pytest.raises(CoterieError, match=r"tokens-00000.* \(Input/output error\); give a writable path to -o"):
        writer.checkpoint({})


def test_what_a_kill_at_the_very_end_leaves_goes_when_the_run_is_found_complete(tmp_path):
    loaded, text = load_model(None, "cpu"), [Document.of("a", "some words of text, and some more")]
    profile_model(loaded, text, tmp_path / "run")
    before = {path.name for path in (tmp_path / "run").iterdir()}
    (tmp_path / "run" / "checkpoint").write_bytes(b"of the run")
    (tmp_path / ".run.replaced").mkdir()
    profile_model(loaded, text, tmp_path / "run", resume=True)
    assert {path.name for path in (tmp_path / "run").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_full_disk_at_the_end_keeps_the_run(tmp_path, monkeypatch):
    writer = ProfileWriter(tmp_path / "run", SPEC, DOMAINS, max_traced_tokens=100)
    feed(writer)
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        )
        with pytest.raises(CoterieError, match="No space left"):
            writer.finish({})
    assert writer.finish({}).num_traced_tokens == 100


def test_a_sample_is_uniform_and_does_not_depend_on_the_cut():
    samples = []
    for step in (1, 64, 1000):
        reservoir = Reservoir(200, seed=1)
        for start in range(0, 1000, step):
            reservoir.add(TRACE.where(slice(start, start + step)))
        samples.append(reservoir.trace())
    for sample in samples:
        assert (sample.topk_ids == samples[0].topk_ids).all()
        assert (np.diff(sample.sequence_ids) >= 0).all()
    assert samples[0].num_tokens == 200
    hits = np.zeros(20)
    for seed in range(200):
        reservoir = Reservoir(100, seed)
        reservoir.add(TRACE)
        hits += np.bincount(reservoir.trace().sequence_ids, minlength=20)
    assert abs(hits / 200 - 5).max() < 0.75  # 5 of each sequence's 50; the mean of 200 has a spread of 0.14


def test_common_rows_are_found_in_any_order():
    rng = np.random.default_rng(0)
    hashes = rng.permutation(np.concatenate([rng.integers(0, 2**63, 50_000), np.full(900, 7), np.full(2_000, 8)]))
    sketch = RowSketch.empty()
    for start in range(0, len(hashes), 512):
        sketch = sketch.add(hashes[start : start + 512].astype(np.uint64))
    counted = dict(zip(sketch.hashes.tolist(), sketch.counts.tolist(), strict=True))
    assert 900 - len(hashes) / 1024 <= counted[7] <= 900
    assert 2000 - len(hashes) / 1024 <= counted[8] <= 2000


def test_dummy_rows_are_reported(tmp_path):
    spec = make_spec(12, 64, 8)
    ids = random_ids(1, 12, 500, 64, 8)
    ids[:, 100:130] = ids[:, 100:101]
    for name, picks, expected in (("clean", random_ids(1, 12, 500, 64, 8), None), ("dummies", ids, 30)):
        writer = ProfileWriter(tmp_path / name, spec, DOMAINS)
        writer.add(make_trace(picks))
        assert writer.finish({}).provenance.get("dummy_tokens") == expected


RUN_TO_KILL = """
import sys
from pathlib import Path
import profiler.writer
sys.path.insert(0, "tests")
from test_writer import record_embedded_model
profiler.writer.CHECKPOINT_SECONDS, profiler.writer.CHECKPOINT_SHARE = 0.0, 1e9
record_embedded_model(Path(sys.argv[1]))
"""


def record_embedded_model(folder, resume=False, max_tokens=3_000):
    texts = folder.with_name("texts")
    texts.mkdir(exist_ok=True)
    for path in sorted(zoo.HELD_OUT.iterdir())[:2]:
        (texts / path.name).write_text(path.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    documents = read_documents([str(texts)])
    sizes = {"max_tokens": max_tokens, "sequence_length": 64, "batch_size": 2}
    return profile_model(load_model(None), documents, folder, resume=resume, **sizes)


def test_a_killed_process_resumes(tmp_path, monkeypatch):
    monkeypatch.undo()  # shards as large as those of the other process
    whole = record_embedded_model(tmp_path / "whole")
    running = subprocess.Popen([sys.executable, "-c", RUN_TO_KILL, str(tmp_path / "killed")])
    checkpoint = unfinished_folder(tmp_path / "killed") / "checkpoint"
    while running.poll() is None and not checkpoint.exists():
        time.sleep(0.01)
    time.sleep(0.1)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    assert not (tmp_path / "killed").exists()
    resumed = record_embedded_model(tmp_path / "killed", resume=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert resumed.digest == whole.digest


def test_stopped_while_a_checkpoint_counts(tmp_path, monkeypatch):
    """What was half counted then is not kept: the run goes on from the checkpoint before."""
    monkeypatch.setattr("profiler.writer.CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("profiler.writer.CHECKPOINT_SHARE", 1e9)
    whole = record_embedded_model(tmp_path / "whole", max_tokens=1_000)
    count_all, calls = Tally.add, iter(range(1000))

    def interrupted(tally, trace):
        if next(calls) == 3:
            count_all(tally, trace.where(slice(20)))
            raise KeyboardInterrupt
        count_all(tally, trace)

    with monkeypatch.context() as patch:
        patch.setattr("profiler.writer.Tally.add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            record_embedded_model(tmp_path / "cut", max_tokens=1_000)
    assert unfinished_folder(tmp_path / "cut").exists()
    assert record_embedded_model(tmp_path / "cut", resume=True, max_tokens=1_000).digest == whole.digest


def test_other_weights_do_not_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("profiler.writer.CHECKPOINT_SECONDS", 0.0)
    shutil.copytree(zoo.MODEL, tmp_path / "model")
    loaded, documents = load_model(str(tmp_path / "model"), "cpu"), read_documents([zoo.HELD_OUT])
    out, sizes = tmp_path / "run", {"max_tokens": 500, "sequence_length": 50, "batch_size": 2}

    def stop(done, _total):
        if done >= 300:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_model(loaded, documents, out, on_progress=stop, **sizes)
    stamp = os.stat(tmp_path / "model" / "model.safetensors")
    os.utime(tmp_path / "model" / "model.safetensors", ns=(0, stamp.st_mtime_ns + 1))
    with pytest.raises(CoterieError, match="model_weights was .*, now it is .*; go on with the same, or remove it"):
        profile_model(loaded, documents, out, resume=True, **sizes)
    os.utime(tmp_path / "model" / "model.safetensors", ns=(0, stamp.st_mtime_ns))
    assert profile_model(loaded, documents, out, resume=True, **sizes).num_tokens == 500


@pytest.mark.parametrize("change", ["dtype", "config"])
def test_another_dtype_or_config_is_another_run(tmp_path, change):
    documents, sizes = read_documents([zoo.HELD_OUT]), {"max_tokens": 100, "sequence_length": 50, "batch_size": 2}
    out, loaded = tmp_path / "run", load_model(None, "cpu")
    first = profile_model(loaded, documents, out, **sizes)
    assert profile_model(loaded, documents, out, resume=True, **sizes).provenance == first.provenance
    if change == "dtype":
        loaded.model.bfloat16()
    else:
        loaded.model.config.rms_norm_eps = 0.1
    second = profile_model(loaded, documents, out, resume=True, **sizes)
    assert {key for key in first.provenance if first.provenance[key] != second.provenance[key]} - {"created"} == {
        change
    }


def test_logits_that_are_no_numbers_cannot_be_decoded(tmp_path):
    loaded, documents = load_model(None, "cpu"), read_documents([zoo.HELD_OUT])
    loaded.model.lm_head.register_forward_hook(lambda _module, _args, output: output * torch.nan)
    sizes = {"max_tokens": 100, "sequence_length": 50, "batch_size": 2}
    with pytest.raises(CoterieError, match=r"no finite numbers .* torch.float32.*; give another --dtype"):
        profile_model(loaded, documents, tmp_path / "run", decode_tokens=2, **sizes)


def test_decoding_is_the_models_own_whatever_its_generation_config_says(tmp_path):
    loaded, documents = load_model(None, "cpu"), read_documents([zoo.HELD_OUT])
    sizes = {"max_tokens": 100, "sequence_length": 20, "batch_size": 3, "decode_tokens": 3}
    expected = profile_model(loaded, documents, tmp_path / "plain", **sizes)
    own = loaded.model.generation_config
    odd = {"use_cache": False, "temperature": 0.1, "repetition_penalty": 9.0, "num_beams": 2, "num_return_sequences": 2}
    for name, value in {**odd, "min_p": 0.5, "cache_implementation": "static", "no_repeat_ngram_size": 1}.items():
        setattr(own, name, value)
    assert profile_model(loaded, documents, tmp_path / "odd", **sizes).digest == expected.digest
    assert loaded.model.generation_config is own
    phases = Profile.load_from(tmp_path / "odd").split_by_phase()
    assert (phases["prefill"].num_tokens, phases["decode"].num_tokens > 0) == (100, True)


def test_going_on_keeps_what_others_put_there(tmp_path):
    feed(ProfileWriter(tmp_path / "run", SPEC, DOMAINS), range(5))
    (unfinished_folder(tmp_path / "run") / "mine").mkdir()
    for name in ("mine.txt", "weights.safetensors", ".mine.partial"):
        (unfinished_folder(tmp_path / "run") / name).write_text("mine")
    resumed = ProfileWriter(tmp_path / "run", SPEC, DOMAINS, resume=True)
    feed(resumed)
    assert resumed.finish({}).num_tokens == 1000
    assert (tmp_path / "run" / "mine").is_dir()
    for name in ("mine.txt", "weights.safetensors", ".mine.partial"):
        assert (tmp_path / "run" / name).read_text() == "mine"
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_link_is_written_through(tmp_path):
    """Another disk, say; the unfinished folder is beside the profile, so that it can be renamed."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk" / "profile")
    for _ in range(3):
        writer = ProfileWriter(tmp_path / "run", SPEC, DOMAINS)
        feed(writer, range(5))
        assert [path.name for path in (tmp_path / "disk").glob("*.partial")] == ["profile.partial"]
        assert writer.finish({}).folder == tmp_path / "run"
        Profile.from_tokens(SPEC, DOMAINS, TRACE, {}).save(tmp_path / "run")
    assert (tmp_path / "run").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "run"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["profile"]


def test_what_replaces_a_link_can_be_replaced(tmp_path):
    """Folders that are put in place without asking what is behind a link."""
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    for number in range(3):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / str(number)).touch()
        profiler.files.put_in_place(tmp_path / "new", tmp_path / "run")
        assert [path.name for path in tmp_path.rglob("*")] == ["run", str(number)]


def test_names_that_are_no_text_cost_no_profile(tmp_path):
    """Bytes that are no UTF-8, in names of files, or half a character in JSON."""
    with pytest.raises(CoterieError, match=r"caf\\udce9.*is no UTF-8 text.*rename it"):
        ProfileWriter(tmp_path / "run", SPEC, ["prose", "caf\udce9"])
    with pytest.raises(CoterieError, match="is no UTF-8 text"):
        ProfileWriter(tmp_path / "run", replace(SPEC, name="caf\udce9"), DOMAINS)
    for _ in range(2):
        writer = ProfileWriter(tmp_path / "run", SPEC, DOMAINS)
        writer.add(TRACE)
        if (tmp_path / "run").exists():
            with pytest.raises(CoterieError, match="is no UTF-8 text"):
                writer.finish({"imported_from": "caf\udce9.npz"})
        else:
            writer.finish({})
    assert open_profile(tmp_path / "run").num_tokens == 1000


def test_a_recording_that_fails_before_its_first_checkpoint_leaves_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        unfinished_folder(tmp_path / "run").mkdir(exist_ok=True)
        raise CoterieError("No space left on device")

    monkeypatch.setattr("profiler.writer.write_shard", full)
    monkeypatch.setattr("profiler.writer.write_bytes", full)
    with pytest.raises(CoterieError, match="No space left"):
        record_embedded_model(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_what_a_killed_import_left_is_no_recording_to_go_on_with(tmp_path):
    writer = ProfileWriter(tmp_path / "run", SPEC, DOMAINS)
    writer.add(TRACE)
    assert [path.suffix for path in unfinished_folder(tmp_path / "run").iterdir()].count(".safetensors") > 0
    writer.close()  # as the end of its process would
    again = ProfileWriter(tmp_path / "run", SPEC, DOMAINS)
    feed(again)
    assert again.finish({}).num_tokens == 1000
    (unfinished_folder(tmp_path / "run")).mkdir()
    (unfinished_folder(tmp_path / "run") / "mine.txt").touch()
    with pytest.raises(CoterieError, match="unfinished recording"):
        ProfileWriter(tmp_path / "run", SPEC, DOMAINS)
