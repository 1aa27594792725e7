"""`coterie constrain`, `finetune` and `quality`, co-design, and the harness."""

import importlib.machinery
import importlib.util
import json
import re
import shutil
import sys
import weakref
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from test_constraints import random_map

from placement.cli import main
from placement.constraints.codesign import alternate, best
from placement.constraints.config import load, save
from placement.constraints.harness import SUITES, _scores, run_tasks, task_names
from placement.constraints.lists import device_aware_lists
from placement.constraints.pruning import limit_ranks
from placement.cost import evaluate
from placement.placement_map import PlacementMap
from placement.solvers import Options
from placement.solvers import plan as make_plan
from placement.topology import Topology
from profiler import CoterieError, Recorder, zoo
from profiler.documents import Document
from profiler.loading import load_model
from profiler.profile import Profile


def coterie(capsys, monkeypatch, *arguments):
    """Exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["coterie", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def one_model_at_a_time(monkeypatch):
    """Let loading a model fail while one that was loaded before is in memory."""
    before = []

    def load(*arguments, **options):
        assert not any(model() is not None for model in before)
        loaded = load_model(*arguments, **options)
        before.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr("profiler.loading.load_model", load)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A short profile of the embedded model, a similarity table and a map."""
    folder = tmp_path_factory.mktemp("constraints")
    with pytest.MonkeyPatch.context() as patch:
        arguments = ["profile", "--max-tokens", "3000", "-o", folder / "run.profile"]
        arguments += ["--similarity", folder / "alike.safetensors"]
        patch.setattr(sys, "argv", ["coterie", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
    random_map(Profile.load_from(folder / "run.profile").model, ranks=4).save(folder / "plan.json")
    return folder


def test_from_profile_to_quality(made, tmp_path, capsys, monkeypatch):
    def run(*arguments):
        return coterie(capsys, monkeypatch, *arguments)

    one_model_at_a_time(monkeypatch)
    plan = ("--plan", made / "plan.json")
    for arguments, name in (
        (("--method", "c2r", "--top-t", 20), "C2R, T=20"),
        (("--method", "c2r", "--top-t", 20, *plan), "device-aware C2R, T=20"),
        (("--limit", 2, *plan), "router-based pruning, N=2"),
        (("--limit", 1, *plan, "--nodes"), "router-based pruning, N=1 nodes"),
        (
            ("--method", "similarity", "--limit", 1, *plan, "--similarity", made / "alike.safetensors"),
            "similarity-based pruning, N=1",
        ),
    ):
        out = tmp_path / "constraint.safetensors"
        code, shown, _ = run("constrain", made / "run.profile", *arguments, "-o", out, "--json")
        assert code == 0
        assert json.loads(shown)["name"] == load(out).name == name
    quick = ("--held-out-tokens", 1000, "--steps", 2, "--batch-size", 2, "--sequence-length", 64, "--json")
    tuned = tmp_path / "tuned"
    code, shown, _ = run("finetune", "--constraint", out, "-o", tuned, *quick)
    assert code == 0
    rows = json.loads(shown)
    assert list(rows) == [
        "as it was",
        "as it was, similarity-based pruning, N=1",
        "plainly fine-tuned",
        "fine-tuned, similarity-based pruning, N=1",
    ]
    assert rows["as it was"]["all"] < rows["as it was, similarity-based pruning, N=1"]["all"]
    code, shown, _ = run("finetune", "--constraint", out, "-o", tuned, *quick, "--resume")
    assert code == 0
    assert json.loads(shown) == rows
    code, shown, _ = run("quality", tuned, f"{tuned}-plain", "--max-tokens", 1000, "--json")
    assert code == 0
    again = json.loads(shown)
    assert again["tuned, similarity-based pruning, N=1"] == pytest.approx(
        rows["fine-tuned, similarity-based pruning, N=1"]
    )
    assert again["tuned-plain"] == pytest.approx(rows["plainly fine-tuned"])
    assert len(again["tuned-plain"]) > 1
    code, shown, _ = run("quality", tuned, "--constraint", out, "--max-tokens", 200, "--json")
    assert list(json.loads(shown)) == ["tuned, similarity-based pruning, N=1"]  # it is the same
    other = tmp_path / "other.safetensors"
    run("constrain", made / "run.profile", "--limit", 2, *plan, "-o", other)
    code, _, error = run("quality", tuned, "--constraint", other)
    assert code == 1
    assert "tuned: is measured under the constraint in its folder, --constraint is another; leave it out" in error
    code, shown, _ = run("quality", "--constraint", out, "--max-tokens", 500)
    assert code == 0
    assert re.search(r"coterie-zoo\s+│", shown)


def test_codesign_writes_a_plan_and_its_constraint(tmp_path, capsys, monkeypatch):
    quick = ("--max-tokens", 2100, "--rounds", 1, "--json")
    code, shown, _ = coterie(capsys, monkeypatch, "codesign", "--top-t", 31, "-o", tmp_path / "both", *quick)
    assert code == 0
    assert json.loads(shown)["chosen"] == 1
    assert load(tmp_path / "both").name == "device-aware C2R, T=31"
    assert PlacementMap.load_from(tmp_path / "both" / "plan.json").topology.num_ranks == 4


def test_mistakes_are_one_line(made, tmp_path, capsys, monkeypatch):
    run, plan = made / "run.profile", made / "plan.json"
    for arguments, message in (
        (("constrain", run, "--method", "c2r"), "give --top-t from 7 to 63"),
        (("constrain", run, "--method", "c2r", "--top-t", "6"), "T 6: .* between 7 .K-1. and 63"),
        (("constrain", run, "--limit", "2"), "give --plan and --limit"),
        (("constrain", run, "--plan", plan), "router: give --limit"),
        (("constrain", run, "--method", "c2r", "--top-t", "20", "--limit", "1"), "--limit: --method c2r has no use"),
        (("constrain", run, "--plan", plan, "--limit", "2", "--top-t", "9"), "--top-t: --method router has no use"),
        (("codesign",), "give --top-t from 7 to 63"),
        (("finetune", "--seed", "-1"), "seed -1: must be between 0 and 2147483647"),
        (("constrain", run, "--limit", "0", "--plan", plan), "N 0: a token needs at least 1 rank"),
        (("constrain", run, "--method", "similarity", "--limit", "2", "--plan", plan), "give --similarity"),
        (
            ("constrain", run, "--method", "similarity", "--limit", "2", "--plan", plan, "--similarity", plan),
            "not a similarity table",
        ),
        (("finetune", "--constraint", tmp_path / "no"), "no such file; make a constraint"),
        (("finetune", "--steps", "0"), "steps 0: must be at least 1"),
        (("finetune", "-o", "."), r"\.: is no name for a folder; give one to -o"),
        (("codesign", "--ranks", "0"), "0 ranks cannot share 64 experts"),
        (("codesign", "--method", "similarity"), "takes c2r or router"),
        (("quality", "--constraint", plan), "truncated, or not a constraint"),
        (("quality", "--task-limit", "5"), "--task-limit 5: is for tasks; give --task too, or leave it out"),
        (("quality", "--task-folder", "mine"), "--task-folder mine: is for tasks"),
        (("profile", "--similarity", tmp_path / "s", "--resume", "-o", tmp_path / "p"), "leave --resume out"),
    ):
        code, _, error = coterie(capsys, monkeypatch, *arguments)
        assert code == 1, arguments
        assert error.count("\n") == 1, error
        assert re.search(message, error), error


def test_mistakes_are_said_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    refuse_to_load(monkeypatch)
    put_harness(monkeypatch, {"sums": 0.5})
    (tmp_path / "chats.jsonl").write_text('{"text": "no conversation"}')
    for arguments, message in (
        (("finetune", "--data", tmp_path / "no"), "no: no such file"),
        (("finetune", "--sequence-length", "1"), "--sequence-length 1: must be at least 2"),
        (("finetune", "--held-out-tokens", "1"), "--held-out-tokens 1: must be at least 2"),
        (("finetune", "--no-plain"), "--plain and --no-plain: compare with a constraint; give --constraint"),
        (("finetune", "--instructions", tmp_path / "no.jsonl"), "no.jsonl: no such file"),
        (("finetune", "--instructions", tmp_path / "chats.jsonl"), "chats.jsonl, line 1: no conversation"),
        (("quality", "--max-tokens", "1"), "--max-tokens 1: must be at least 2"),
        (("quality", "--task", "sums", "--task-limit", "0"), "--task-limit 0: must be at least 1"),
        (("codesign", "--top-t", "9", "--max-tokens", "1"), "--max-tokens 1: must be at least 2"),
        (("codesign", "--top-t", "9", "--data", tmp_path / "no"), "no: no such file"),
    ):
        code, _, error = coterie(capsys, monkeypatch, *arguments)
        assert code == 1, arguments
        assert error.count("\n") == 1, error
        assert message in error, error


def test_mistakes_are_said_before_a_model_is_run(tmp_path, capsys, monkeypatch):
    for place in ("codesign.perplexity", "quality.perplexity"):
        monkeypatch.setattr(f"placement.constraints.{place}", lambda *_: pytest.fail("runs the model"))
    for arguments, message in (
        (("codesign", "--top-t", "6"), "T 6: .* between 7 .K-1. and 63"),
        (("codesign", "--method", "router", "--limit", "0"), "N 0: a token needs at least 1 rank"),
        (("codesign", "--method", "router", "--limit", "1", "--ranks", "16"), "N 1: so many ranks .* a token takes 8"),
    ):
        code, _, error = coterie(capsys, monkeypatch, *arguments)
        assert code == 1, arguments
        assert error.count("\n") == 1, error
        assert re.search(message, error), error


def test_models_of_one_last_name_are_told_apart(tmp_path, capsys, monkeypatch):
    for name in ("seed0", "seed1"):
        shutil.copytree(zoo.MODEL, tmp_path / name / "tuned")
    models = [tmp_path / name / "tuned" for name in ("seed0", "seed1")]
    code, shown, _ = coterie(capsys, monkeypatch, "quality", *models, "--max-tokens", "256", "--json")
    assert code == 0
    assert list(json.loads(shown)) == ["tuned", str(models[1])]


def test_a_folder_that_is_in_the_way_is_refused_before_training(made, tmp_path, capsys, monkeypatch):
    (tmp_path / "notes").mkdir()
    limit = ("--method", "router", "--limit", "2", "--plan", made / "plan.json", "-o", tmp_path / "two.safetensors")
    assert coterie(capsys, monkeypatch, "constrain", made / "run.profile", *limit)[0] == 0
    code, _, error = coterie(
        capsys, monkeypatch, "finetune", "--constraint", tmp_path / "two.safetensors", "-o", tmp_path / "notes"
    )
    assert code == 1
    assert "exists and is no fine-tuned model" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "two.safetensors"]


def test_the_model_that_is_read_is_not_written_over(made, tmp_path, capsys, monkeypatch):
    refuse_to_load(monkeypatch)
    save(limit_ranks(PlacementMap.load_from(made / "plan.json"), 1), tmp_path / "one.safetensors")
    model = tmp_path / "tuned-plain"
    model.mkdir()
    (model / "finetune.json").write_text("{}")
    for more in (("-o", model), ("--constraint", tmp_path / "one.safetensors", "-o", tmp_path / "tuned")):
        code, _, error = coterie(capsys, monkeypatch, "finetune", model, *more)
        assert code == 1
        assert "tuned-plain: is the model to read, and would be written over; give -o another name" in error


def refuse_to_load(monkeypatch):
    monkeypatch.setattr("profiler.loading.load_model", lambda *_, **__: pytest.fail("loads a model"))


def test_an_interrupted_fine_tuning_is_not_lost(made, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    out = tmp_path / "tuned"
    quick = ["--held-out-tokens", 256, "--steps", 2, "--save-steps", 1, "--batch-size", 1, "--sequence-length", 16]
    with monkeypatch.context() as patch:
        patch.setattr("placement.constraints.finetune.put_in_place", interrupt)
        code, _, error = coterie(capsys, monkeypatch, "finetune", "-o", out, *quick)
    assert code == 130
    assert error.splitlines()[-1] == "stopped; go on from the last checkpoint with --resume"
    with monkeypatch.context() as patch:
        refuse_to_load(patch)
        code, _, error = coterie(capsys, monkeypatch, "finetune", "-o", out, *quick)
        assert code == 1
        assert ".tuned.checkpoints: an unfinished run with 2 steps is there; go on with --resume, or remove" in error
        shutil.copytree(tmp_path / ".tuned.checkpoints", tmp_path / ".limited-plain.checkpoints")
        save(limit_ranks(PlacementMap.load_from(made / "plan.json"), 1), tmp_path / "one.safetensors")
        limited = ("--constraint", tmp_path / "one.safetensors", "-o", tmp_path / "limited")
        code, _, error = coterie(capsys, monkeypatch, "finetune", *limited, *quick)
        assert code == 1
        assert ".limited-plain.checkpoints: an unfinished run with 2 steps" in error
    assert coterie(capsys, monkeypatch, "finetune", "-o", out, *quick, "--resume")[0] == 0
    assert not (tmp_path / ".tuned.checkpoints").exists()


def put_harness(monkeypatch, scores):
    """One that knows some tasks, and fails where a task's score is an error."""

    def evaluate_task(tasks, **_):
        if isinstance(scores[tasks[0]], Exception):
            raise scores[tasks[0]]
        return {"results": {tasks[0]: {"acc,none": scores[tasks[0]]}}}

    for name, members in (
        ("lm_eval", {"simple_evaluate": evaluate_task}),
        ("lm_eval.tasks", {"TaskManager": lambda **_: SimpleNamespace(all_tasks=list(scores))}),
        ("lm_eval.models", {}),
        ("lm_eval.models.huggingface", {"HFLM": lambda **_: None}),
    ):
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)


def test_tasks_are_checked_before_anything_is_measured(capsys, monkeypatch):
    refuse_to_load(monkeypatch)
    put_harness(monkeypatch, {"sums": 0.5})
    code, _, error = coterie(capsys, monkeypatch, "quality", "--task", "sums", "--task", "sum")
    assert code == 1
    assert "task sum: cannot be run, lm-evaluation-harness has none of that name; give another to --task" in error
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    code, _, error = coterie(capsys, monkeypatch, "quality", "--task", "c2r")
    assert code == 1
    assert "pip install 'coterie[lm-eval]'" in error


def test_what_was_measured_is_shown_though_something_fails(tmp_path, capsys, monkeypatch):
    put_harness(monkeypatch, {"sums": 0.5, "broken": OSError("no such data")})
    quick = ("--max-tokens", "256", "--json")
    code, shown, error = coterie(capsys, monkeypatch, "quality", "--task", "sums", "--task", "broken", *quick)
    assert code == 1
    assert "tasks sums, broken: cannot be run (no such data)" in error
    figures = json.loads(shown)[zoo.NAME]
    assert figures["sums"] == 0.5
    assert figures["all"] > 1
    (tmp_path / "empty").mkdir()
    code, shown, error = coterie(capsys, monkeypatch, "quality", zoo.MODEL, tmp_path / "empty", *quick)
    assert code == 1
    assert "empty: cannot be loaded as a model" in error
    assert len(json.loads(shown)) == 1


def test_memory_that_lacks_is_told_of_any_command(capsys, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr("profiler.loading.load_model", full)
    code, _, error = coterie(capsys, monkeypatch, "quality")
    assert code == 1
    assert "where the command has them give a smaller --batch-size or --sequence-length" in error
    assert "else a larger device" in error


def test_codesign_lowers_fan_out_until_it_does_not(capsys):
    loaded = load_model(None, "cpu")
    text = [Document.of(path.stem, path.read_text()[:6000]) for path in sorted(zoo.CALIBRATION.glob("*.txt"))]
    batches = loaded.batches(text, 256, 8, 4096)
    topology = Topology.for_experts(64, 4)
    options = Options(num_kicks=2)

    def plan(profile):
        return make_plan(profile, topology, "metis", options)

    rounds = alternate(loaded, batches, plan, lambda free, placement: device_aware_lists(free, placement, 31))
    assert 2 <= len(rounds) <= 5
    assert all(np.isfinite(one.perplexity) and one.busiest_ingress <= 1 for one in rounds)
    with pytest.raises(CoterieError, match="rounds 0"):
        alternate(loaded, batches, plan, lambda _free, placement: limit_ranks(placement, 2), max_rounds=0)


@pytest.mark.parametrize(
    ("fan_outs", "rounds", "lowest"),
    [([3.0, 2.5, 2.2, 2.199, 1.0], 4, 2.199), ([3.0, 2.0, 2.5, 1.0], 3, 2.0), ([3.0, 2.5, 2.0, 1.5, 1.0], 4, 1.5)],
)
def test_codesign_goes_on_while_fan_out_falls(monkeypatch, fan_outs, rounds, lowest):
    module, following = sys.modules["placement.constraints.codesign"], iter(fan_outs)
    recorder = nullcontext(SimpleNamespace())
    recorder.spec, recorder.trace = None, lambda: None
    profile = SimpleNamespace(require_tokens=lambda: None)
    measured = lambda *_: SimpleNamespace(fan_out=np.array([next(following)]), busiest_ingress=np.array([0.5]))  # noqa: E731
    monkeypatch.setattr(module, "constrain", lambda *_: nullcontext())
    monkeypatch.setattr(module, "Recorder", lambda *_: recorder)
    monkeypatch.setattr(module, "Profile", SimpleNamespace(from_tokens=lambda *_: profile))
    monkeypatch.setattr(module, "perplexity", lambda *_: SimpleNamespace(overall=9.0))
    monkeypatch.setattr(module, "evaluate", measured)
    loaded = SimpleNamespace(model=None, name="made-up", input_device="cpu")
    found = alternate(loaded, None, lambda _: "plan", lambda *_: "constraint", max_rounds=4)
    assert [one.fan_out for one in found] == fan_outs[:rounds]
    assert best(found).fan_out == lowest


def test_suites_name_as_many_tasks_as_the_papers():
    rounds = {"anli_r1", "anli_r2", "anli_r3"}  # of one task, without a name that has a figure
    assert rounds < set(SUITES["occult"])
    assert {name: len(set(tasks) - rounds) for name, tasks in SUITES.items()} == {"c2r": 10, "occult": 22}
    assert task_names(["c2r", "piqa", "mine"]) == [*SUITES["c2r"], "mine"]


def test_without_the_harness_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    with pytest.raises(CoterieError, match=r"pip install 'coterie\[lm-eval\]'"):
        run_tasks(None, None, ["c2r"])


def test_a_task_without_a_figure_of_its_own_stands_for_what_is_in_it():
    of_tag = {"anli_r1": {"alias": "anli_r1", "acc,none": 0.5, "acc_stderr,none": 0.1}, "anli_r2": {"acc,none": 0.25}}
    assert _scores("anli", of_tag) == {"anli_r1": 0.5, "anli_r2": 0.25}
    of_group = {"mmlu": {"acc,none": 0.5}, "mmlu_law": {"acc,none": 0.75, "acc_norm,none": 1.0}}
    assert _scores("mmlu", of_group) == {"mmlu": 0.5}
    assert _scores("sums", {"sums": {"exact_match_stderr,none": 0.1, "exact_match,none": 0.75}}) == {"sums": 0.75}
    assert _scores("both", {"both": {"alias": "both"}, "mmlu_law": {"acc_norm,none": 1.0}}) == {"mmlu_law": 1.0}
    with pytest.raises(CoterieError, match="task both: the harness gives no figure"):
        _scores("both", {"both": {"alias": "both"}})


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs pip install 'coterie[lm-eval]'")
def test_tasks_of_the_harness_run_constrained(made, tmp_path):
    records = [{"question": f"{n} and 1 is", "choices": [f" {n + 1}", " no"], "answer": n % 2} for n in range(6)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "sums.yaml").write_text(TASK.replace("FILE", str(tmp_path / "sums.jsonl")))
    loaded = load_model(None, "cpu")
    seen = []
    limit = limit_ranks(PlacementMap.load_from(made / "plan.json"), 1)
    for constraint in (None, limit):
        with Recorder(loaded.model) as recorder:
            found = run_tasks(loaded, constraint, ["sums"], folder=tmp_path)
        seen.append(evaluate(PlacementMap.load_from(made / "plan.json"), recorder.trace()).fan_out.mean())
        assert 0 <= found["sums"] <= 1
    assert seen[1] == 1 < seen[0]
    tagged = (tmp_path / "sums.yaml").read_text().replace("task: sums", "task: more_sums\ntag: adding")
    (tmp_path / "more_sums.yaml").write_text(tagged)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [sums, more_sums]")
    members = {"sums": found["sums"], "more_sums": found["sums"]}
    for name, expected in (("adding", {"more_sums"}), ("both", members)):
        assert run_tasks(loaded, limit, [name], folder=tmp_path) == {task: members[task] for task in expected}
    with pytest.raises(CoterieError, match="cannot be run"):
        run_tasks(loaded, None, ["no-such-task"], folder=tmp_path)
