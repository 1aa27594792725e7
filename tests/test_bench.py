"""Benches of replayed routing: exact, bytes as the walk has them, and every workload, way to exchange and mistake."""

import math
import subprocess
import sys
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_spec, make_trace, random_ids, tiny_model
from test_report import bench_result
from torch.distributed.device_mesh import init_device_mesh

from placement.cli import main
from placement.cost import evaluate
from placement.placement_map import PlacementMap
from placement.runtime import bench as bench_module
from placement.runtime import trials
from placement.runtime.bench import Settings, bench
from placement.runtime.experts import IMPLEMENTATIONS, build_implementations, installed
from placement.runtime.launch import run_on_ranks
from placement.runtime.meter import Meter
from placement.runtime.results import BenchResult
from placement.runtime.summary import _counted
from placement.runtime.trials import Case, Trainer, _difference, _Reference, _require_exact
from placement.runtime.workloads import TextWorkload, cut_replay, replayed_layers
from placement.topology import Topology
from profiler import CoterieError, Profile, zoo
from profiler.documents import read_documents
from profiler.families import read_spec
from profiler.loading import load_model

SPEC = replace(make_spec(3, 8, 2), hidden_size=24, expert_size=16)
SMALL = Settings(sequences_per_rank=(1, 3), sequence_length=8, repeats=1)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded") / "run.profile"
    Profile.from_tokens(SPEC, ["a", "b"], make_trace(random_ids(0, 3, 400, 8, 2), num_sequences=10), {}).save(folder)
    return folder


def reversed_map(num_ranks=2, num_nodes=1):
    slots = np.tile(np.arange(8)[::-1], (3, 1))
    return PlacementMap(SPEC, Topology(num_nodes, num_ranks // num_nodes, 8 // num_ranks), slots, {"name": "reversed"})


def test_one_decoded_token_is_decoded():
    model = tiny_model("olmoe")
    ids = torch.arange(12).reshape(2, 6)
    workload = TextWorkload(model, ids, decoded=1)
    workload.reset()
    with torch.no_grad():
        last, whole = workload.forward(), TextWorkload(model, ids).forward()
    assert last.shape == (2, 1, whole.shape[2])
    assert torch.allclose(last[:, 0], whole[:, -1], atol=1e-5)


def test_each_decoding_step_chooses_its_copies_anew(recorded):
    """What is evaluated is what was run, among copies too."""
    slots = np.tile([0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7], (3, 1))
    copied = PlacementMap(SPEC, Topology(1, 2, 6), slots, {"name": "copied"})
    settings = replace(SMALL, kind="decode", steps=5, sequences_per_rank=(7,))
    for row in bench({"copied": copied}, replay=recorded, settings=settings).runs[0].rows:
        if row.implementation == "coterie":
            assert row.rows_per_token == pytest.approx(row.fan_out, abs=1e-12)


def test_rows_are_exact_and_bytes_are_those_of_the_tokens(recorded, tmp_path):
    maps = {"reversed": reversed_map(), "other": reversed_map()}
    result = bench(maps, replay=recorded, settings=replace(SMALL, modes=("flat", "bf16"), num_layers=2))
    assert [run.tokens_per_rank for run in result.runs] == [8, 24]
    profile = Profile.load_from(recorded)
    for run in result.runs:
        names = [(row.implementation, row.map) for row in run.rows]
        ways = [(way, name) for way in ("coterie", "coterie bf16") for name in ("linear", "reversed", "other")]
        assert names == [("HF all_to_all", "linear"), *ways]
        tokens = cut_replay(SPEC, profile.tokens, 2 * run.tokens_per_rank, 2, 0)
        source = np.repeat([0, 1], run.tokens_per_rank)
        ranks_LTK = tokens.topk_ids // 4
        away = (ranks_LTK != source[None, :, None]).any(axis=2)
        pairs_away = (ranks_LTK != source[None, :, None]).sum()
        layers = replayed_layers(SPEC, 2)
        kept = replace(SPEC, layer_ids=tuple(layers))
        metrics = evaluate(PlacementMap.linear(kept, Topology(1, 2, 4)), tokens)
        peer, linear = run.rows[:2]
        assert linear.fan_out == pytest.approx(metrics.fan_out.mean())
        assert linear.rows_per_token == pytest.approx(linear.fan_out)
        assert linear.remote_rows_per_token == pytest.approx(away.mean())
        assert linear.least_bytes == away.sum() * 24 * 4 * 2
        assert linear.bytes_sent == linear.wire_bytes == linear.least_bytes + pairs_away * 6
        assert peer.rows_per_token == 2
        assert peer.bytes_sent == pairs_away * 24 * 4 * 2
        for row in run.rows:
            assert row.max_difference < (1e-4 if "bf16" not in row.implementation else 0.1)
            assert row.least_bytes <= row.bytes_sent
        assert run.rows[4].least_bytes == linear.least_bytes / 2
        assert set(run.correlations) >= {"fan_out, exchange"} or linear.fan_out == run.rows[2].fan_out
    result.save(tmp_path / "bench.json")
    assert BenchResult.load_from(tmp_path / "bench.json") == result
    (tmp_path / "bench.json").write_text((tmp_path / "bench.json").read_text().replace('"fan_out": ', '"fun": '))
    with pytest.raises(CoterieError, match="not a bench result"):
        BenchResult.load_from(tmp_path / "bench.json")


@pytest.mark.parametrize("kind", ["decode", "training"])
def test_other_workloads_are_exact(recorded, kind):
    settings = replace(SMALL, kind=kind, sequences_per_rank=(2,), steps=4, modes=("flat", "hierarchical"))
    [run] = bench({"reversed": reversed_map(4, 2)}, replay=recorded, settings=settings).runs
    assert run.num_ranks == 4
    assert run.tokens_per_rank == (2 if kind == "decode" else 16)
    assert len(run.rows) == 5
    assert all(row.max_difference < 1e-4 for row in run.rows)
    assert run.rows[1].predicted_layer is None  # flat, over the network to each rank of the other node
    assert run.rows[3].predicted_layer > 0


class Bare(TextWorkload):
    """A model without a head."""

    def forward(self):
        return self.model(input_ids=self.input_ids, use_cache=False).last_hidden_state

    def loss(self, outputs):
        return outputs[..., :3].square().mean()  # of all it would be what the last norm makes of any


def gradients_differ(rank, device, arguments):
    """How much they do under coterie's and under transformers' exchange; a step of training runs as well."""
    model, mesh = tiny_model(**arguments["model"]), init_device_mesh("cpu", (2, 1), mesh_dim_names=("ep", "tp"))
    spec, group = read_spec(model, "shared norm"), mesh["ep"].get_group()
    linear = PlacementMap.linear(spec, Topology(1, 2, spec.num_experts // 2))
    turned = replace(linear, physical_to_logical_map=linear.physical_to_logical_map[:, ::-1].copy())
    kind = TextWorkload if hasattr(model, "lm_head") else Bare
    workload = kind(model, torch.arange(24).reshape(2, 12) + rank)
    reference, found = _Reference(workload, True, group), []
    for make in IMPLEMENTATIONS.values():
        held = build_implementations(workload.layers, turned, make, mesh["ep"], mesh["tp"], Meter())
        with installed(workload.layers, held):
            found += reference.differences(workload, held)
            Trainer(workload, held, group).step()
        workload.model.zero_grad()
    return {"differences": found}


@pytest.mark.parametrize(
    "model",
    [
        {"family": "muse_spark_text"},  # whose experts share a norm
        {"family": "mixtral", "num_experts_per_tok": 1},  # whose routers' gradients are zero but for rounding
    ],
    ids=lambda model: model["family"],
)
def test_gradients_are_those_of_one_process(model):
    for of_rank in run_on_ranks(gradients_differ, 2, {"model": model}):
        assert max(of_rank["differences"]) < 1e-4


def warm_optimizers(rank, device, arguments):
    """For each timed action of a training bench, whether its optimizer has state already."""
    warm = []

    def look(action, _device):
        if isinstance(getattr(action, "__self__", None), Trainer):
            warm.append(bool(action.__self__.optimizer.state))
        action()
        return 1.0

    trials._seconds = look
    trials.run_task(rank, device, arguments)
    return {"warm": warm}


def test_the_first_timed_step_makes_no_optimizer_state(recorded, monkeypatch):
    tasks = []
    monkeypatch.setattr(bench_module, "_run", lambda task, *_: tasks.append(task))
    settings = replace(SMALL, kind="training", sequences_per_rank=(1,))
    assert bench({"reversed": reversed_map()}, replay=recorded, settings=settings) is None
    for of_rank in run_on_ranks(warm_optimizers, 2, {"task": tasks[0]}):
        assert of_rank["warm"] == [True] * 3


def test_interfaces_are_not_compared_where_hosts_are_not_the_plans_nodes():
    sent = dict.fromkeys(("bytes_sent", "network_bytes_sent", "rows_sent", "rows_away", "network_rows"), 8)
    task, case = SimpleNamespace(steps=1, training=False), Case("coterie", "flat", "linear")
    for num_nodes, hosts, expected in (
        (1, "aaaa", 5),  # one interface, such as the loopback
        (2, "aabb", 10),
        (4, "abcd", 20),
        (2, "aaaa", None),  # a plan for two nodes, tried on one machine
        (1, "aabb", None),
        (2, "abab", None),
    ):
        placement = PlacementMap.linear(SPEC, Topology(num_nodes, 4 // num_nodes, 2))
        of_ranks = [{**sent, "interface": 5} for _ in hosts]
        counted = _counted(task, case, of_ranks, list(hosts), SimpleNamespace(num_tokens=4), placement)
        assert counted["interface_bytes"] == expected


def test_maps_for_other_ranks_are_runs_of_their_own(recorded):
    result = bench({"two": reversed_map(2), "four": reversed_map(4)}, replay=recorded, settings=SMALL)
    assert [(run.num_ranks, run.tokens_per_rank) for run in result.runs] == [(2, 8), (2, 24), (4, 8), (4, 24)]


def test_copies_and_empty_slots_are_benched_beside_the_peer(recorded):
    slots = np.tile([0, 1, 2, 3, 4, -1, 4, 5, 6, 7, 0, 1], (3, 1))
    copies = PlacementMap(SPEC, Topology(1, 2, 6), slots, {"name": "copies"})
    [run] = bench({"copies": copies}, replay=recorded, settings=replace(SMALL, sequences_per_rank=(2,))).runs
    assert [row.map for row in run.rows] == ["linear", "linear", "copies"]
    assert run.rows[2].rows_per_token == pytest.approx(run.rows[2].fan_out)
    assert run.rows[2].fan_out < run.rows[1].fan_out


def test_outputs_that_differ_are_not_trusted(recorded, monkeypatch):
    monkeypatch.setattr(bench_module, "MAX_DIFFERENCE", 1e-12)
    with pytest.raises(CoterieError, match=r"HF all_to_all on the linear map: differs by .* do not trust this run"):
        # Long before the last repeat.
        bench({"reversed": reversed_map()}, replay=recorded, settings=replace(SMALL, repeats=10**6))


def test_what_is_wrong_with_any_run_is_said_before_the_first(recorded, monkeypatch):
    monkeypatch.setattr(bench_module, "_run", lambda *_: pytest.fail("is run"))
    maps = {"two": reversed_map(2), "four": reversed_map(4)}
    with pytest.raises(CoterieError, match="400 whole tokens, this replay needs 640"):
        bench(maps, replay=recorded, settings=replace(SMALL, sequences_per_rank=(20,)))


def test_the_model_that_texts_were_cut_for_is_gone_when_ranks_load_theirs(monkeypatch):
    models = []

    def load(*arguments):
        loaded = load_model(*arguments)
        models.append(weakref.ref(loaded.model))
        return loaded

    def run(*_):
        raise CoterieError(f"models: {[model() for model in models]}")

    monkeypatch.setattr(bench_module, "load_model", load)
    monkeypatch.setattr(bench_module, "run_on_ranks", run)
    linear = PlacementMap.linear(read_spec(load_model(None, "cpu").model, zoo.NAME), Topology(1, 2, 32))
    with pytest.raises(CoterieError, match=r"models: \[None\]"):
        bench({"same": linear}, documents=read_documents([zoo.HELD_OUT]), settings=SMALL)


def test_lost_gradients_and_values_that_are_no_numbers_are_not_trusted():
    some, nothing = torch.tensor([0.0, 2.0]), torch.zeros(2)
    assert _difference(some, some) == _difference(None, nothing) == _difference(None, None) == 0
    assert _difference(None, some[:0]) == _difference(some[:0], some[:0]) == 0
    assert _difference(some * 1.5, some) == 0.5
    assert _difference(None, some) == _difference(some, None) == math.inf
    assert math.isnan(_difference(some / 0, some))
    assert _difference(some * 1.5, some, least=100.0) == pytest.approx(0.01)
    assert _difference(some * 1.5, some, least=0.01) == 0.5
    result = bench_result()
    peer, linear, planned = result.runs[0].rows
    rows = (peer, replace(linear, max_difference=math.nan), planned)
    assert math.isnan(replace(result, runs=(replace(result.runs[0], rows=rows),)).max_difference)
    for mode, difference, largest, trusted in (
        ("flat", 1e-6, 1, True),
        ("flat", 1e-2, 1, False),
        ("flat", math.nan, 1, False),
        ("bf16", 1e-2, 1, True),
        ("bf16", math.nan, 1, False),
        ("bf16", math.inf, 1, False),
        ("flat", 9e-5, 0.01, True),
        ("flat", 9e-3, 100, True),
        ("flat", 2e-2, 100, False),
        ("flat", math.nan, math.nan, False),
    ):
        for replay, hint in ((None, r" \(a token whose .* other text, or --replay\)"), ("run.profile", "")):
            task, case = SimpleNamespace(tolerance=1e-4, replay=replay), Case("coterie", mode, "linear")
            with nullcontext() if trusted else pytest.raises(CoterieError, match=f"do not trust this run{hint}$"):
                _require_exact(task, case, (difference, 0.0), largest)
            with (
                nullcontext()
                if trusted and (difference < 1e-4 or mode == "bf16")  # gradients' are relative
                else pytest.raises(CoterieError, match="do not trust this run")
            ):
                _require_exact(task, case, (0.0, difference), largest)


MISTAKES = {
    "no repeats": ({"repeats": 0}, "repeats 0: must be at least 1"),
    "no sequences": ({"sequences_per_rank": (2, 0)}, "sequences per rank 0: must be at least 1"),
    "too many tokens": ({"sequence_length": 10_000}, "the profile has 400 whole tokens, this replay needs"),
    "more layers than there are": ({"num_layers": 4}, "--layers 4: must be from 1 to the 3"),
    "another mode": ({"modes": ("fast",)}, "mode 'fast': must be one of flat, hierarchical"),
    "no rate": ({"network": "fast"}, "network rate 'fast'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(recorded, mistake):
    changes, message = MISTAKES[mistake]
    with pytest.raises(CoterieError, match=message):
        bench({"reversed": reversed_map()}, replay=recorded, settings=replace(SMALL, **changes))


def test_as_many_steps_as_tokens_are_refused_of_text_only(recorded):
    settings = replace(SMALL, kind="decode", steps=8, sequences_per_rank=(1,))
    with pytest.raises(CoterieError, match="8 steps: must be fewer than the 8 tokens of a sequence"):
        bench({"reversed": reversed_map()}, "no such model", settings=settings)
    [run] = bench({"reversed": reversed_map()}, replay=recorded, settings=settings).runs
    assert run.tokens_per_rank == 1


@pytest.mark.parametrize(
    ("num_ranks", "num_nodes", "message"),
    [(4, 1, "reversed has 1 node, where"), (4, 4, "reversed has 4 nodes of 1 rank, where")],
)
def test_two_hops_that_would_be_one_are_refused(recorded, num_ranks, num_nodes, message):
    for network in (None, "400mbit"):
        settings = replace(SMALL, modes=("flat", "hierarchical-bf16"), network=network)
        with pytest.raises(CoterieError, match=f"--mode hierarchical-bf16: the plan {message}.*; plan with --nodes"):
            bench({"reversed": reversed_map(num_ranks, num_nodes)}, replay=recorded, settings=settings)


@pytest.mark.parametrize("option", ["--layers", "--hidden-size", "--expert-size", "--seed", "--steps"])
def test_options_that_would_be_ignored_are_refused_at_any_value(option, tmp_path, monkeypatch, capsys):
    reversed_map().save(tmp_path / "plan.json")
    monkeypatch.setattr(sys, "argv", ["coterie", "bench", str(tmp_path / "plan.json"), option, "0"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    wanted = "of decoding; give --workload decode" if option == "--steps" else "of a replay; give --replay"
    assert f"{option} 0: is {wanted}, or leave it out" in capsys.readouterr().err


def test_maps_of_other_models_and_profiles_without_sizes_are_refused(recorded, tmp_path):
    other = replace(SPEC, hidden_size=48)
    with pytest.raises(CoterieError, match="the map is for"):
        bench({"other": replace(reversed_map(), model=other)}, replay=recorded, settings=SMALL)
    unknown = replace(SPEC, hidden_size=0)
    Profile.from_tokens(unknown, ["a"], make_trace(random_ids(0, 3, 40, 8, 2), num_domains=1), {}).save(tmp_path / "p")
    with pytest.raises(CoterieError, match="give --hidden-size and --expert-size"):
        bench({"other": replace(reversed_map(), model=unknown)}, replay=tmp_path / "p", settings=SMALL)


def under_torchrun(code, recorded, tmp_path, *options):
    reversed_map().save(tmp_path / "plan.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options, "--no-python"]
    arguments = ["bench", "plan.json", "--replay", str(recorded), "--sequence-length", "8", "--repeats", "1", "--json"]
    return subprocess.run(
        [*command, sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )


LOADS_JOINED = """
import torch.distributed as dist
from profiler.profile import Profile

load = Profile.load_from

def load_joined(path):
    assert dist.is_initialized(), "others would wait for this one's loading, and not for long"
    return load(path)

Profile.load_from = load_joined
from placement.cli import main
main()
"""


def test_under_torchrun_the_first_rank_has_the_result(recorded, tmp_path):
    done = under_torchrun(LOADS_JOINED, recorded, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"workload": "prefill"') == 1


DIES_ONCE = """
import os
from placement.runtime import trials

measure = trials.measure_links

def dies_once(*arguments):
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(3)
    return measure(*arguments)

trials.measure_links = dies_once
from placement.cli import main
main()
"""


def test_torchrun_starts_all_ranks_again_where_one_died(recorded, tmp_path):
    done = under_torchrun(DIES_ONCE, recorded, tmp_path, "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"workload": "prefill"') == 1


def test_recorded_benches_can_be_read():
    files = sorted((Path(__file__).parents[1] / "benchmarks" / "runtime").glob("*-[0-9].json"))
    assert len(files) == 16
    for path in files:
        assert BenchResult.load_from(path).runs
