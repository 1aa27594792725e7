"""The command line as a person uses it: the whole chain, and one line for every mistake."""

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_spec, make_trace, random_ids, tiny_model

from placement import cli
from placement.cli.app import progress_bar
from placement.placement_map import PlacementMap
from placement.topology import Topology
from profiler import Profile, zoo


def run(monkeypatch, *arguments) -> int:
    """Run the command line in this process; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["coterie", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Profile, plan, bench and report of the embedded model on a little text; plan and bench in a process of their own."""
    folder = tmp_path_factory.mktemp("chain")

    def alone(*command):
        started = [sys.executable, "-c", "from placement.cli import main; main()", *command]
        done = subprocess.run(started, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def here(*command):
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
            patch.chdir(folder)
            assert run(patch, *command) == 0
        return printed.getvalue()

    outputs = [
        here("profile", "-o", "run.profile", "--max-tokens", "4096", "--json"),
        alone("plan", "run.profile", "--ranks", "2", "-o", "plan.json", "--json"),
        alone("bench", "plan.json", "--repeats", "1", "--sequences-per-rank", "1", "-o", "bench.json", "--json"),
        here("report", "run.profile", "plan.json", "bench.json", "-o", "report.html"),
    ]
    return folder, outputs


def test_the_whole_chain(chain):
    folder, outputs = chain
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "plan.json", "report.html", "run.profile"]
    assert json.loads(outputs[0])["num_tokens"] == 4_096
    metrics = json.loads(outputs[1])["metrics"]
    assert (
        metrics["search"]["held_out"]["busiest_ingress"]["mean"]
        < metrics["linear"]["held_out"]["busiest_ingress"]["mean"]
    )
    (bench,) = json.loads(outputs[2])["runs"]
    rows = bench["rows"]
    assert [(row["implementation"], row["map"]) for row in rows] == [
        ("HF all_to_all", "linear"),
        ("coterie", "linear"),
        ("coterie", "plan"),  # maps are named by their files
    ]
    assert all(row["max_difference"] < 1e-4 for row in rows)
    assert rows[2]["bytes_sent"] < rows[1]["bytes_sent"] < rows[0]["bytes_sent"]


def test_planning_again_gives_the_same_bytes(chain, monkeypatch, tmp_path):
    folder, _ = chain
    assert run(monkeypatch, "plan", folder / "run.profile", "--ranks", 2, "-o", tmp_path / "again.json") == 0
    assert (tmp_path / "again.json").read_bytes() == (folder / "plan.json").read_bytes()


@pytest.fixture
def bad(tmp_path):
    """Things that no command may take."""
    trace = make_trace(random_ids(0, 2, 60, 8, 2))
    Profile.from_tokens(make_spec(2, 8, 2), ["a", "b"], trace, {}).save(tmp_path / "ok.profile")
    Profile.from_tokens(make_spec(2, 8, 2), ["a", "b"], trace, {}).save(tmp_path / "cut.profile")
    shard = tmp_path / "cut.profile" / "tokens-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    PlacementMap.linear(make_spec(2, 16, 2), Topology.for_experts(16, 2)).save(tmp_path / "other.json")
    PlacementMap.linear(make_spec(2, 8, 2), Topology.for_experts(8, 2)).save(tmp_path / "own.json")
    (tmp_path / "sglang.json").write_text(json.dumps({"physical_to_logical_map": [list(range(8))] * 2}))
    (tmp_path / "short.json").write_text(json.dumps({"physical_to_logical_map": [list(range(8))]}))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "some.txt").write_text("text")
    np.savez(tmp_path / "caf\udce9.npz", topk_ids=trace.topk_ids.transpose(1, 0, 2))
    (tmp_path / "broken.json").write_text('{"schema_version": 1, ')
    dense = tmp_path / "dense"
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(dense)
    AutoTokenizer.from_pretrained(zoo.MODEL).save_pretrained(dense)
    for name in ("no-tokenizer", "wrong"):
        tiny_model("olmoe").save_pretrained(tmp_path / name)
    AutoTokenizer.from_pretrained(zoo.MODEL).save_pretrained(tmp_path / "wrong")
    return tmp_path


MISTAKES = {
    "missing model": (["profile", "{bad}/nowhere", "-o", "{bad}/out"], "no such model folder"),
    "name without a model": (["profile", "nowhere", "-o", "{bad}/out"], "no such model folder"),
    "folder without a model": (["profile", "{bad}/ok.profile", "-o", "{bad}/out"], "cannot be loaded as a model"),
    "model without a tokenizer": (["profile", "{bad}/no-tokenizer", "-o", "{bad}/out"], "makes 0 tokens of the text"),
    "tokenizer of another model": (["profile", "{bad}/wrong", "-o", "{bad}/out"], "the vocabulary has 64"),
    "dense model": (["profile", "{bad}/dense", "--data", "{bad}/some.txt", "-o", "{bad}/out"], "has no MoE layers"),
    "empty data": (["profile", "--data", "{bad}/empty.txt", "-o", "{bad}/out"], "0 characters of text"),
    "missing data": (["profile", "--data", "{bad}/no.txt", "-o", "{bad}/out"], "no such file or folder"),
    "output is something else": (["profile", "--max-tokens", "9", "-o", "{bad}/dense"], "is not a profile"),
    "model's name that is no text": (
        ["import", "numpy", "{bad}/caf\udce9.npz", "-o", "{bad}/ok.profile"],
        "error: 'caf\\udce9' is no UTF-8 text",
    ),
    "file's name that is no text": (
        ["import", "numpy", "{bad}/caf\udce9.npz", "--name", "cafe", "-o", "{bad}/ok.profile"],
        "is no UTF-8 text, which names of models, domains and files must be; rename it",
    ),
    "missing profile": (["plan", "{bad}/nowhere", "--ranks", "2", "-o", "{bad}/out"], "not a profile"),
    "truncated profile": (["plan", "{bad}/cut.profile", "--ranks", "2", "-o", "{bad}/out"], "truncated or edited"),
    "more ranks than experts": (
        ["plan", "{bad}/ok.profile", "--ranks", "9", "-o", "{bad}/out"],
        "give --ranks from 1 to 8",
    ),
    "unknown links": (
        ["plan", "{bad}/ok.profile", "--ranks", "2", "--links", "smoke", "-o", "{bad}/out"],
        "links 'smoke': not known; give one of h100",
    ),
    "domain weight without a number": (
        ["plan", "{bad}/ok.profile", "--ranks", "2", "--domain-weight", "a", "-o", "{bad}/out"],
        "must be a domain and a number",
    ),
    "unknown domain": (
        ["plan", "{bad}/ok.profile", "--ranks", "2", "--domain-weight", "c=1", "-o", "{bad}/out"],
        "domain 'c': the profile has a, b",
    ),
    "map that is none": (["evaluate", "{bad}/some.txt", "{bad}/ok.profile"], "not known as a map"),
    "map without ranks": (["evaluate", "{bad}/sglang.json", "{bad}/ok.profile"], "give --ranks"),
    "map of other layers": (["evaluate", "{bad}/short.json", "{bad}/ok.profile", "--ranks", "2"], "1 rows"),
    "map to evaluate of another model": (["evaluate", "{bad}/other.json", "{bad}/ok.profile"], "the map is for"),
    "no ranks": (["plan", "{bad}/ok.profile", "--ranks", "0", "-o", "{bad}/out"], "0 ranks cannot share"),
    "unwritable output": (
        ["plan", "{bad}/ok.profile", "--ranks", "2", "-o", "{bad}/some.txt/out"],
        "cannot be written",
    ),
    "negative seed": (["plan", "{bad}/ok.profile", "--ranks", "2", "--seed", "-1", "-o", "{bad}/out"], "seed -1"),
    "negative seed of a sample": (
        ["profile", "--seed", "-1", "--max-traced-tokens", "10", "-o", "{bad}/out"],
        "seed -1: must be between 0 and 2147483647",
    ),
    "seed that is too large": (
        ["profile", "--seed", "99999999999999999999", "-o", "{bad}/out"],
        "must be between 0 and 2147483647",
    ),
    "certificate with copies": (
        [
            *("plan", "{bad}/ok.profile", "--ranks", "2", "--redundant-experts", "2", "--certify", "1"),
            *("-o", "{bad}/out"),
        ],
        "certificates are for plans with a slot for each expert",
    ),
    "nodes that the map has not": (
        ["evaluate", "{bad}/own.json", "{bad}/ok.profile", "--nodes", "2"],
        "is for 1; leave it out",
    ),
    "no seconds to prove in": (
        ["plan", "{bad}/ok.profile", "--ranks", "2", "--certify", "nan", "-o", "{bad}/out"],
        "--certify nan: must be a number of seconds above 0",
    ),
    "endless planning": (
        ["plan", "{bad}/ok.profile", "--ranks", "2", "--time-budget", "inf", "-o", "{bad}/out"],
        "time budget inf: must be a number above 0",
    ),
    "more tokens than there are": (
        ["plan", "{bad}/ok.profile", "--ranks", "2", "--tokens-per-rank", "1" + 400 * "0", "-o", "{bad}/out"],
        "must be from 1 to",
    ),
    "weight given twice": (
        ["plan", "{bad}/ok.profile", "--ranks", "2", *2 * ["--domain-weight", "a=1"], "-o", "{bad}/out"],
        "a has a weight already",
    ),
    "groups that nobody knows": (
        ["plan", "{bad}/ok.profile", "--ranks", "2", "--preserve-groups", "-o", "{bad}/out"],
        "the profile knows of none",
    ),
    "collaboration of the worst domain": (
        ["plan", "{bad}/ok.profile", "--ranks", "2", "--robust", "--objective", "collaboration", "-o", "{bad}/out"],
        "leave --robust out",
    ),
    "proof with weights": (
        ["plan", "{bad}/ok.profile", "--ranks", "2", "--certify", "1", "--domain-weight", "a=2", "-o", "{bad}/out"],
        "certificates are for tokens that count alike",
    ),
    "text to measure no plan on": (
        ["inspect", "{bad}/ok.profile", "--held-out", "{bad}/nowhere"],
        "is to measure a plan on",
    ),
    "study of no plan": (["inspect", "{bad}/ok.profile", "--no-study"], "--study and --no-study: are of a plan"),
    "report over the plan": (
        ["report", "{bad}/ok.profile", "{bad}/own.json", "-o", "{bad}/own.json"],
        "would be written over",
    ),
    "layers of a checkpoint": (
        [
            *("export", "{bad}/own.json", "--to", "checkpoint", "--model", "{bad}/wrong", "--num-hidden-layers", "3"),
            *("-o", "{bad}/out"),
        ],
        "a checkpoint's config says it",
    ),
    "no load cap": (
        ["plan", "{bad}/ok.profile", "--ranks", "2", "--load-cap", "nan", "-o", "{bad}/out"],
        "load cap nan",
    ),
    "no nodes": (["plan", "{bad}/ok.profile", "--ranks", "2", "--nodes", "0", "-o", "{bad}/out"], "0 nodes"),
    "output is a folder": (["plan", "{bad}/ok.profile", "--ranks", "2", "-o", "{bad}"], "is a folder"),
    "unknown device": (["profile", "--device", "abacus", "-o", "{bad}/out"], "device 'abacus'"),
    "name too long": (["plan", "x" * 300, "--ranks", "2", "-o", "{bad}/out"], "File name too long"),
    "no name": (["profile", "-o", "/"], "is no name for a profile"),
    "times of an all-gather": (
        ["evaluate", "{bad}/own.json", "{bad}/ok.profile", "--engine", "vllm", "--links", "h100"],
        "times are not modelled there",
    ),
    "unknown engine": (
        ["evaluate", "{bad}/own.json", "{bad}/ok.profile", "--engine", "vllm-pigeon"],
        "--engine vllm-pigeon: not known; give one of vllm",
    ),
    "engine and dispatch": (
        ["evaluate", "{bad}/own.json", "{bad}/ok.profile", "--engine", "vllm", "--dispatch", "per-rank"],
        "leave one of them out",
    ),
    "export of no map": (["export", "{bad}/some.txt", "--to", "vllm", "-o", "{bad}/out.json"], "truncated, or not"),
    "export without layers": (
        ["export", "{bad}/own.json", "--to", "sglang", "-o", "{bad}/out.json"],
        "give --num-hidden-layers",
    ),
    "export to a name that the engine refuses": (
        ["export", "{bad}/own.json", "--to", "tensorrt-llm", "-o", "{bad}/out.json"],
        "takes .yaml or .yml",
    ),
    "export over the plan": (
        ["export", "{bad}/own.json", "--to", "vllm", "-o", "{bad}/own.json"],
        "is read, and would be written over",
    ),
    "inverse of a file": (
        ["export", "{bad}/own.json", "--to", "eplb", "-o", "{bad}/out.safetensors", "--invert"],
        "--invert is for checkpoints",
    ),
    "checkpoint of no model": (["export", "{bad}/own.json", "--to", "checkpoint", "-o", "{bad}/out"], "give --model"),
    "checkpoint of another model": (
        ["export", "{bad}/own.json", "--to", "checkpoint", "--model", "{bad}/dense", "-o", "{bad}/out"],
        "is a llama",
    ),
    "checkpoint into a full folder": (
        ["export", "{bad}/own.json", "--to", "checkpoint", "--model", "{bad}/wrong", "-o", "{bad}/dense"],
        "not an empty folder",
    ),
    "seed of no random tokens": (
        ["export", "verify", "{bad}/wrong", "{bad}/wrong", "--data", "texts", "--seed", "1"],
        "--seed 1: is of random tokens",
    ),
    "verification of an original": (["export", "verify", "{bad}/wrong", "{bad}/wrong"], "coterie did not permute it"),
    "missing map": (["bench", "{bad}/nowhere.json"], "no such file"),
    "truncated map": (["bench", "{bad}/broken.json"], "truncated, or not a placement map"),
    "map of another model": (["bench", "{bad}/other.json"], "the map is for made-up"),
    "ranks that the map has not": (["bench", "{bad}/other.json", "--ranks", "4"], "the plan is for 2"),
    "report of another model": (
        ["report", "{bad}/ok.profile", "{bad}/other.json", "-o", "{bad}/out"],
        "the map is for",
    ),
    "report without its bench": (
        ["report", "{bad}/ok.profile", "{bad}/other.json", "{bad}/no.json", "-o", "{bad}/out"],
        "no such file",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(monkeypatch, capsys, bad, mistake):
    arguments, message = MISTAKES[mistake]
    before = sorted(path for path in bad.rglob("*"))
    assert run(monkeypatch, *(argument.format(bad=bad) for argument in arguments)) == 1
    output = capsys.readouterr()
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output.err
    assert message in errors[0]
    assert output.err.strip().splitlines()[-1] == errors[0]
    assert output.out == ""
    assert sorted(path for path in bad.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", [["plan"], ["profile", "--no-such-flag"], ["nonsense"], ["plan", "x", "--ranks", "two"]]
)
def test_wrong_usage_exits_with_two(monkeypatch, arguments):
    assert run(monkeypatch, *arguments) == 2


@pytest.mark.parametrize("arguments", ["--help", "plan --help", "import sglang --help"])
def test_help_is_quick_to_import(arguments):
    """By what is imported, since seconds depend on the machine: 0.2 s of processor for these, 2 to 5 s for the rest."""
    heavy = "accelerate jinja2 matplotlib networkx numba numpy pandas pymetis safetensors scipy torch transformers yaml"
    code = (
        "import sys, contextlib, placement.cli\n"
        f"sys.argv = 'coterie {arguments}'.split()\n"
        "with contextlib.suppress(SystemExit): placement.cli.main()\n"
        f"assert not set('{heavy}'.split()) & set(sys.modules), set('{heavy}'.split()) & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1], capture_output=True)


def test_a_read_only_installation_and_home_are_enough(monkeypatch):
    """Numba raises an error where it has no place for what it compiled."""
    places = []
    monkeypatch.setattr(cli, "can_be_written", lambda _: False)
    monkeypatch.setattr(
        cli, "app", lambda: places.append(Path(os.environ["NUMBA_CACHE_DIR"]) / "made") or places[0].mkdir()
    )
    assert run(monkeypatch, "plan") == 0
    assert not places[0].exists()
    assert "NUMBA_CACHE_DIR" not in os.environ


def test_every_command_shows_an_example():
    named = {command.callback.__name__: command for command in cli.app.registered_commands}
    for group in cli.app.registered_groups:
        for command in group.typer_instance.registered_commands:
            named[f"{group.name} {command.name or command.callback.__name__}"] = command
    named["profile"] = named.pop("profile record")
    named["export"] = named.pop("export plan")
    assert set(named) >= {
        "profile",
        "profile merge",
        "profile split",
        "import megatron",
        "import numpy",
        "import sglang",
        "import tensorrt-llm",
        "import vllm",
        "plan",
        "export",
        "export verify",
        "bench",
        "report",
        "demo",
    }
    for name, command in named.items():
        assert f"Example: coterie {name} " in command.callback.__doc__


def test_profiles_are_split_and_merged(monkeypatch, capsys, bad):
    folder = bad / "parts"
    assert run(monkeypatch, "profile", "split", bad / "ok.profile", "--by", "domain", "-o", folder) == 0
    parts = sorted(folder.iterdir())
    assert [part.name for part in parts] == ["a.profile", "b.profile"]
    assert "30" in capsys.readouterr().out
    assert run(monkeypatch, "profile", "merge", *parts, "-o", bad / "merged.profile", "--json") == 0
    merged = json.loads(capsys.readouterr().out)
    assert (merged["num_tokens"], merged["num_traced_tokens"]) == (60, 60)
    original, again = (Profile.load_from(bad / name).counts for name in ("ok.profile", "merged.profile"))
    assert all((array == again.arrays()[name]).all() for name, array in original.arrays().items())


def test_parts_stay_inside_their_folder_and_apart(monkeypatch, capsys, tmp_path):
    trace = make_trace(random_ids(0, 2, 40, 8, 2), num_domains=3)
    spec = make_spec(2, 8, 2)
    Profile.from_tokens(spec, ["../../up", "a b", ".."], trace, {}).save(tmp_path / "a" / "run.profile")
    monkeypatch.chdir(tmp_path / "a")
    assert run(monkeypatch, "profile", "split", "run.profile", "--by", "domain", "-o", "parts") == 0
    made = {path.name for path in (tmp_path / "a" / "parts").iterdir()}
    assert made == {"..-..-up.profile", "...profile", "a-b.profile"}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    Profile.from_tokens(spec, ["a/b", "a b", "c"], trace, {}).save(tmp_path / "a" / "run.profile")
    capsys.readouterr()
    assert run(monkeypatch, "profile", "split", "run.profile", "--by", "domain", "-o", "more") == 1
    assert "'a/b' and 'a b' would both be" in capsys.readouterr().err
    assert not (tmp_path / "a" / "more").exists()


def test_a_profile_is_resumed(monkeypatch, capsys, tmp_path):
    """Stopped by the keyboard at the third batch, then gone on with: what an undisturbed run gives."""
    from profiler import recorder

    arguments = ["profile", "--data", zoo.HELD_OUT, "--max-tokens", 900, "--sequence-length", 50, "--batch-size", 4]
    arguments += ["--decode-tokens", 3, "--max-traced-tokens", 500, "--weights", "--seed", 5]
    assert run(monkeypatch, *arguments, "-o", tmp_path / "whole") == 0
    after_forward, passes = recorder.Recorder._after_forward, iter(range(1000))

    def interrupt(*arguments):
        if next(passes) == 10:
            raise KeyboardInterrupt
        after_forward(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(recorder.Recorder, "_after_forward", interrupt)
        assert run(monkeypatch, *arguments, "-o", tmp_path / "cut") == 130
    assert "--resume" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "-o", tmp_path / "cut") == 1
    assert "unfinished recording" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "-o", tmp_path / "cut", "--resume") == 0
    whole, resumed = (Profile.load_from(tmp_path / name) for name in ("whole", "cut"))
    assert whole.digest == resumed.digest
    assert whole.tokens.num_tokens == 500
    assert whole.tokens.topk_weights is not None
    assert set(whole.split_by_phase()) == {"prefill", "decode"}


def test_the_rate_of_a_resumed_run_is_its_own(monkeypatch, capsys, bad):
    """The first 45 of 60 tokens were recorded by the run that was stopped; 10 seconds for the rest."""
    from profiler.folder import open_profile

    def go_on(*_, on_progress, **__):
        on_progress(45, 60)
        on_progress(60, 60)
        return open_profile(bad / "ok.profile")

    monkeypatch.setattr("profiler.loading.load_model", lambda *_, **__: None)
    monkeypatch.setattr("profiler.profiling.profile_model", go_on)
    monkeypatch.setattr(cli.profiles, "time", SimpleNamespace(perf_counter=iter([0.0, 10.0]).__next__))
    assert run(monkeypatch, "profile", "--data", bad / "some.txt", "-o", bad / "new", "--resume") == 0
    assert "60 tokens, 2 tokens/s" in " ".join(capsys.readouterr().err.split())


def test_bars_show_the_rate_since_they_began(monkeypatch):
    shown = []
    monkeypatch.setattr("rich.progress.Progress.update", lambda *_, **fields: shown.append(fields["rate"]))
    with progress_bar("tokens") as advance_to:
        clock = SimpleNamespace(perf_counter=iter([5.0, 5.0, 7.0]).__next__)
        monkeypatch.setattr(sys.modules["placement.cli.app"], "time", clock)
        advance_to(900, 1000)
        advance_to(1000, 1000)
    assert shown == ["", "50 tokens/s"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_too_little_memory_is_one_line(monkeypatch, capsys, device):
    import torch

    def need_more():
        if device == "cpu":
            torch.empty(10**15)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee more.")

    monkeypatch.setattr(cli, "app", need_more)
    assert run(monkeypatch, "profile") == 1
    said = capsys.readouterr().err
    assert said.startswith("error: not enough memory (")
    assert said.count("\n") == 1
    assert "llocate" in said
    assert "give a smaller --batch-size or --sequence-length" in said


def test_other_errors_of_the_runtime_come_out_as_they_are(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        run(monkeypatch, "profile")


def test_arrays_are_imported(monkeypatch, capsys, tmp_path):
    np.savez(tmp_path / "routing.npz", topk_ids=random_ids(0, 2, 40, 8, 2).transpose(1, 0, 2))
    assert run(monkeypatch, "import", "numpy", tmp_path / "routing.npz", "-o", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["num_tokens"] == 40
    assert run(monkeypatch, "import", "numpy", tmp_path / "nothing.npz", "-o", tmp_path / "out") == 1


def test_recordings_of_engines_are_imported(monkeypatch, capsys, tmp_path):
    """Counts alone say what they cannot give, before and when something asks for it."""
    import torch

    passes = np.stack([np.bincount(row.ravel(), minlength=8) for row in random_ids(0, 2, 40, 8, 2)])[None]
    torch.save({"rank": 0, "logical_count": torch.from_numpy(passes.astype(np.int32))}, tmp_path / "r.pt")
    out = tmp_path / "run.profile"
    arguments = ["--top-k", 2, "--layers", "0-1", "--name", "mine", "--hidden-size", 64]
    assert run(monkeypatch, "import", "sglang", tmp_path / "r.pt", *arguments, "-o", out, "--json") == 0
    output = capsys.readouterr()
    printed = json.loads(output.out)
    assert (printed["num_tokens"], printed["num_traced_tokens"]) == (40, 0)
    assert (printed["model"]["name"], printed["model"]["hidden_size"]) == ("mine", 64)
    assert "counts only" in output.err
    assert run(monkeypatch, "plan", out, "--ranks", 2, "-o", tmp_path / "plan.json") == 1
    assert "per_token" in capsys.readouterr().err
    assert run(monkeypatch, "import", "sglang", tmp_path / "r.pt", "--top-k", 2, "--layers", "0", "-o", out) == 1
    assert "layer 1 is recorded" in capsys.readouterr().err
    assert run(monkeypatch, "import", "vllm", tmp_path, "-o", out) == 1
    assert run(monkeypatch, "import", "megatron", tmp_path, "-o", out) == 1
    assert run(monkeypatch, "import", "tensorrt-llm", tmp_path, "-o", out) == 1
    assert run(monkeypatch, "import", "sglang", tmp_path / "r.pt", "--top-k", 2, "-o", tmp_path) == 1
    assert run(monkeypatch, "import", "sglang", tmp_path / "r.pt", "--model", tmp_path, "-o", out) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.pt", "run.profile"]


def test_foreign_maps_are_evaluated_like_ours(monkeypatch, capsys, bad):
    """The same slots as SGLang's JSON, as EPLB's tensor in three kinds of file, and as our own map."""
    import torch
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    slots = np.stack([rng.permutation(8), rng.permutation(8)])
    (bad / "map.json").write_text(json.dumps({"physical_to_logical_map": slots.tolist()}))
    np.save(bad / "map.npy", slots)
    save_file({"phy2log": slots}, bad / "map.safetensors")
    torch.save({"phy2log": torch.from_numpy(slots)}, bad / "map.pt")
    PlacementMap(make_spec(2, 8, 2), Topology(1, 2, 4), slots, {"name": "any"}).save(bad / "own.json")
    figures = []
    for name in ("map.json", "map.npy", "map.safetensors", "map.pt"):
        assert run(monkeypatch, "evaluate", bad / name, bad / "ok.profile", "--ranks", 2, "--json") == 0
        figures.append(list(json.loads(capsys.readouterr().out)["metrics"].values())[-1])
    assert run(monkeypatch, "evaluate", bad / "own.json", bad / "ok.profile", "--layers", "--json") == 0
    own = json.loads(capsys.readouterr().out)
    assert all(figure == own["metrics"]["any"] for figure in figures)
    assert len(own["layers"]["fan_out"]) == 2
    assert run(monkeypatch, "evaluate", bad / "own.json", bad / "ok.profile", "--layers", "--links", "h100") == 0
    assert "busiest" in capsys.readouterr().out


def test_planning_with_everything(monkeypatch, capsys, bad):
    arguments = ["plan", bad / "ok.profile", "--ranks", 4, "--nodes", 2, "--redundant-experts", 4, "--links", "h800"]
    arguments += ["--compare", "--regret", "--robust", "--kicks", 2, "-o", bad / "plan.json"]
    assert run(monkeypatch, *arguments) == 0
    output = capsys.readouterr().out
    for word in ("occult", "metis", "spectral", "quadratic", "search", "predicted", "regret"):
        assert word in output
    assert run(monkeypatch, "evaluate", bad / "plan.json", bad / "ok.profile", "--choice", "source") == 0


@pytest.mark.parametrize("choice", ["token", "source"])
def test_both_maps_are_measured_with_the_same_choice(monkeypatch, capsys, bad, choice):
    spec = Profile.load_from(bad / "ok.profile").model
    copied = PlacementMap.linear(spec, Topology.for_experts(8, 4, num_redundant=4), 4)
    replace(copied, solver={"name": "copied"}).save(bad / "copied.json")
    assert run(monkeypatch, "evaluate", bad / "copied.json", bad / "ok.profile", "--choice", choice, "--json") == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert metrics["linear"] == metrics["copied"]


@pytest.mark.parametrize(
    ("engine", "sends", "rows"),
    [("vllm", "to-all", 2.0), ("vllm-deepep-low-latency", "per-expert", 2.0), ("coterie", "per-rank", None)],
)
def test_figures_are_those_of_the_engine(monkeypatch, capsys, bad, engine, sends, rows):
    arguments = ["evaluate", bad / "own.json", bad / "ok.profile", "--engine", engine]
    assert run(monkeypatch, *arguments, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    fan_out = value["metrics"]["linear"]["fan_out"]["mean"]
    assert (value["engine"], value["sends"]) == (engine, sends)
    assert value["rows_per_token"]["linear"] == (fan_out if rows is None else rows)
    assert run(monkeypatch, *arguments) == 0
    assert "rows sent for a token" in capsys.readouterr().err


def test_times_are_those_of_the_engines_mode(monkeypatch, capsys, bad):
    arguments = ["evaluate", bad / "own.json", bad / "ok.profile", "--links", "h100", "--json"]
    assert run(monkeypatch, *arguments, "--engine", "vllm-deepep-low-latency") == 0
    engine = json.loads(capsys.readouterr().out)["metrics"]
    assert run(monkeypatch, *arguments, "--dispatch", "per-expert") == 0
    assert engine == json.loads(capsys.readouterr().out)["metrics"]
    assert run(monkeypatch, *arguments) == 0
    assert engine != json.loads(capsys.readouterr().out)["metrics"]


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("sglang", "a.json"),
        ("tensorrt-llm", "a.yaml"),
        ("vllm", "b.json"),
        ("vllm-ascend", "c.json"),
        ("eplb", "a.safetensors"),
    ],
)
def test_exports_are_evaluated_like_the_plan(monkeypatch, capsys, bad, to, name):
    out = bad / "exports" / name
    assert run(monkeypatch, "export", bad / "own.json", "--to", to, "--num-hidden-layers", 2, "-o", out, "--json") == 0
    written = json.loads(capsys.readouterr().out)
    assert written["start"]
    assert sorted(path.name for path in out.parent.iterdir()) == [name, f"{name}.provenance.json"]
    ranks = [] if to in ("vllm", "vllm-ascend") else ["--ranks", 2]
    assert run(monkeypatch, "evaluate", out, bad / "ok.profile", *ranks, "--json") == 0
    metrics = json.loads(capsys.readouterr().out)["metrics"]
    assert next(iter(metrics.values())) == list(metrics.values())[-1]  # own.json is the linear map


def test_a_plan_is_evaluated_for_what_it_was_planned_for(monkeypatch, capsys, tmp_path):
    """Workload, links and copies: `plan` and `evaluate` agree on the same tokens."""
    spec = replace(make_spec(2, 16, 2), hidden_size=512, expert_size=256)
    for name in ("run", "other"):
        trace = make_trace(random_ids(len(name), 2, 400, 16, 2), num_sequences=8)
        Profile.from_tokens(spec, ["a", "b"], trace, {}).save(tmp_path / name)
    for options in (["--tokens-per-rank", 65536, "--dispatch", "per-expert"], ["--redundant-experts", 8]):
        plan = [
            "plan",
            tmp_path / "run",
            "--ranks",
            4,
            "--links",
            "h100",
            "--held-out",
            tmp_path / "other",
            "--kicks",
            1,
        ]
        assert run(monkeypatch, *plan, *options, "-o", tmp_path / "plan.json", "--json") == 0
        planned = json.loads(capsys.readouterr().out)["metrics"]
        assert run(monkeypatch, "evaluate", tmp_path / "plan.json", tmp_path / "other", "--json") == 0
        measured = json.loads(capsys.readouterr().out)["metrics"]
        for name in ("linear", "search"):
            assert measured[name] == planned[name]["held_out"]


def test_routing_that_the_plan_has_seen_gives_no_verdict(monkeypatch, capsys, bad):
    plan = ["plan", bad / "ok.profile", "--ranks", 2, "--kicks", 1, "-o", bad / "plan.json", "--json"]
    assert run(monkeypatch, *plan, "--held-out", bad / "ok.profile") == 0
    (said,) = json.loads(capsys.readouterr().out)["verdict"]
    assert "routing that the plan has seen, so no verdict" in said


def test_weights_whose_type_has_no_width_have_no_times(monkeypatch, capsys, tmp_path):
    spec = replace(make_spec(2, 8, 2), hidden_size=64, expert_size=32)
    trace = make_trace(random_ids(0, 2, 60, 8, 2))
    for dtype in ("bfloat16", "uint8"):
        Profile.from_tokens(replace(spec, dtype=dtype), ["a", "b"], trace, {}).save(tmp_path / dtype)
    plan = ["--ranks", 2, "--links", "h100", "--kicks", 1, "-o", tmp_path / "plan.json"]
    assert run(monkeypatch, "plan", tmp_path / "bfloat16", *plan) == 0
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", tmp_path / "plan.json", tmp_path / "uint8", "--json") == 0
    assert "predicted_time" not in json.loads(capsys.readouterr().out)["metrics"]["linear"]
    assert run(monkeypatch, "plan", tmp_path / "uint8", *plan) == 1
    assert "the width of weights, which uint8 does not say" in capsys.readouterr().err


def test_the_embedded_model_is_permuted_and_proved(monkeypatch, capsys, tmp_path):
    """Record, plan, permute, verify, go back; as docs/engines.md has it."""
    profile, plan = tmp_path / "run.profile", tmp_path / "plan.json"
    assert run(monkeypatch, "profile", "--max-tokens", 600, "-o", profile) == 0
    assert run(monkeypatch, "plan", profile, "--ranks", 4, "--kicks", 1, "-o", plan) == 0
    assert PlacementMap.load_from(plan).model.num_hidden_layers == 4
    assert run(monkeypatch, "export", plan, "--to", "sglang", "-o", tmp_path / "experts.json") == 0
    capsys.readouterr()
    to_checkpoint = ["export", plan, "--to", "checkpoint", "--model"]
    planned, back = tmp_path / "planned", tmp_path / "back"
    assert run(monkeypatch, *to_checkpoint, zoo.MODEL, "-o", planned, "--json") == 0
    assert "export verify" in json.loads(capsys.readouterr().out)["remarks"][0]
    assert run(monkeypatch, "export", "verify", zoo.MODEL, planned, "--num-tokens", 100, "--json") == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["agrees"]
    assert proof["tokens"] == 100
    assert proof["same_selection"] > 0.99
    assert run(monkeypatch, "export", "verify", zoo.MODEL, planned, "--data", zoo.HELD_OUT, "--num-tokens", 50) == 0
    assert "largest difference" in capsys.readouterr().out
    assert run(monkeypatch, "export", "verify", zoo.MODEL, planned, "--tolerance", 0, "--seed", 1) == 1
    assert "do not serve it" in capsys.readouterr().err
    assert run(monkeypatch, *to_checkpoint, planned, "-o", back, "--invert") == 0
    before, after = (dict(tensors_of(folder)) for folder in (zoo.MODEL, back))
    assert before == after


def tensors_of(folder):
    """Names and bytes of a checkpoint's tensors."""
    from placement.exporters.shards import read_header

    for path in sorted(Path(folder).glob("*.safetensors")):
        header = read_header(path)
        data = path.read_bytes()[header.data_start :]
        yield from ((tensor.name, data[tensor.start : tensor.end]) for tensor in header.tensors)


def test_resuming_a_complete_recording_leaves_it_as_it_is(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    once = ["profile", "--max-tokens", "600", "--resume"]
    for said, more in (("tokens/s", []), ("complete already", []), ("tokens/s", ["--sequence-length", "64"])):
        assert run(monkeypatch, *once, *more) == 0
        printed = capsys.readouterr()
        assert said in printed.out + printed.err
    done = Profile.load_from(Path("run.profile"))
    told = {key: value for key, value in done.provenance.items() if key not in ("dtype", "config")}
    replace(done, provenance=told).save(Path("run.profile"))  # as older versions did
    assert run(monkeypatch, *once, "--sequence-length", "64") == 0
    printed = capsys.readouterr()
    assert "complete already" in printed.out + printed.err


def test_the_version_is_told(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("coterie ")


def test_a_recording_of_another_model_is_not_replaced(monkeypatch, capsys, tmp_path):
    trace = make_trace(random_ids(0, 2, 60, 8, 2))
    Profile.from_tokens(make_spec(2, 8, 2), ["a", "b"], trace, {}).save(tmp_path / "run.profile")
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "profile") == 1
    assert "run.profile: is a recording of made-up, not of coterie-zoo" in capsys.readouterr().err
    assert Profile.load_from(tmp_path / "run.profile").model.name == "made-up"


def test_plans_say_what_was_asked_for(monkeypatch, capsys, tmp_path):
    trace = make_trace(random_ids(0, 2, 400, 8, 2), num_sequences=8)
    Profile.from_tokens(make_spec(2, 8, 2), ["prose", "code"], trace, {}).save(tmp_path / "run.profile")
    monkeypatch.chdir(tmp_path)
    plan = ["plan", "run.profile", "--ranks", "4", "--nodes", "2", "--kicks", "1"]
    assert run(monkeypatch, *plan, "--certify", "5", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)["certificate"]) == {"0", "1"}
    assert run(monkeypatch, "evaluate", "plan.json", "run.profile") == 0
    assert "node" in capsys.readouterr().out
    assert run(monkeypatch, *plan, "--domain-weight", "code=1", "--json") == 0
    (said,) = json.loads(capsys.readouterr().out)["verdict"]
    assert "count all tokens alike" in said
