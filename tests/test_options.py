"""Every option of every command arrives: what is given on the command line is what the called function gets.

`ROWS` has the command lines, `STAND_INS` the functions that the commands call.  These are replaced by recorders, so no
model is loaded and nothing is planned; files that are only read are real ones.
"""

import contextlib
import importlib
import inspect
import json
import pkgutil
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import typer
from conftest import make_spec, make_trace, random_ids

import placement
import profiler
from placement import cli
from placement.cli.tables import METRICS
from placement.constraints.codesign import Round
from placement.constraints.pruning import limit_ranks
from placement.exporters.verify import Comparison
from placement.placement_map import PlacementMap
from placement.solvers import STRATEGIES
from placement.topology import Topology
from profiler.importers.known import Known
from profiler.loading import LoadedModel
from profiler.profile import Profile

SPEC = make_spec(2, 8, 2)
PLAN = PlacementMap(SPEC, Topology(1, 4, 2), np.stack([np.arange(8)[::-1]] * 2), {"name": "any"}, metrics={})
LIMIT = limit_ranks(PLAN, 1)
CONFIG = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=100))
LOADED = LoadedModel("tiny", SimpleNamespace(config=CONFIG), None)


@dataclass
class Gathered:
    study: Any = None


@dataclass
class Benched:
    backend = "nccl"
    runs = ()

    def save(self, path: Path) -> None:
        path.touch()


def recorded(called):
    called["on_progress"](1, 2)
    return SimpleNamespace(num_tokens=2)


def one_round(called):
    free = SimpleNamespace(model=SPEC)
    called["plan"](free)
    one = Round(PLAN, called["make"](free, PLAN), 1.0, 1.0, 1.0)
    called["on_round"](one)
    return [one]


STAND_INS = {  # by the name that ROWS uses: what is replaced, and what it gives back, or a function of its arguments
    # the model and its texts
    "read_documents": ("profiler.documents.read_documents", lambda called: called["paths"]),
    "load_model": ("profiler.loading.load_model", LOADED),
    "batches": ("profiler.loading.LoadedModel.batches", [SimpleNamespace(input_ids=torch.zeros(1, 3))]),
    "read_spec": ("profiler.families.read_spec", SPEC),
    # profiles
    "profile_model": ("profiler.profiling.profile_model", recorded),
    "merge": ("profiler.merging.merge", None),
    "show_profile": ("placement.cli.profiles.show_profile", None),
    # importers
    "read_sglang": ("profiler.importers.sglang.read_sglang", None),
    "read_vllm": ("profiler.importers.vllm.read_vllm", None),
    "read_tensorrt_llm": ("profiler.importers.tensorrt_llm.read_tensorrt_llm", None),
    "read_megatron": ("profiler.importers.megatron.read_megatron", None),
    "read_arrays": ("profiler.importers.arrays.read_arrays", None),
    "of_profile": ("profiler.importers.recording.of_profile", None),
    "of_model": ("profiler.importers.known.Known.of_model", Known(name="of the config", num_groups=4)),
    "write_recording": ("profiler.importers.recording.write_recording", None),
    "show_import": ("placement.cli.imports._show", None),
    # plans
    "plan_and_compare": ("placement.compare.plan_and_compare", PLAN),
    "certify_plan": ("placement.compare.certify_plan", PLAN),
    "domain_regret": ("placement.compare.domain_regret", {}),
    "verdict": ("placement.compare.verdict", []),
    "has_hypergraph": ("placement.cli.plans._has_hypergraph", False),
    "measure": ("placement.compare.measure", {"fan_out": {"mean": 1.0}}),
    "evaluate_map": ("placement.cost.evaluate", SimpleNamespace(**dict.fromkeys(METRICS, np.ones(2)))),
    # inspect and report
    "gather": ("placement.insight.gather", Gathered()),
    "study_data": ("placement.insight.study_data", "a study"),
    "answers": ("placement.verdict.answers", {}),
    "load_bench": ("placement.runtime.results.BenchResult.load_from", "a bench"),
    "write_report": ("placement.report.write_report", None),
    # export
    "read_text_config": (
        "placement.exporters.checkpoint.read_text_config",
        {"num_hidden_layers": 9, "num_nextn_predict_layers": 1},
    ),
    "write_export": ("placement.exporters.contract.write_export", SimpleNamespace(start="so", remarks=())),
    "permute_checkpoint": ("placement.exporters.checkpoint.permute_checkpoint", None),
    "read_permuted_map": ("placement.exporters.checkpoint.read_permuted_map", PLAN),
    "random_tokens": ("placement.exporters.verify.random_tokens", None),
    "compare": ("placement.exporters.verify.compare", Comparison(100, 0.0, 1.0, 1.0)),
    "agrees": ("placement.exporters.verify.Comparison.agrees", True),
    # bench and demo
    "bench": ("placement.runtime.bench.bench", Benched()),
    "draw_bench": ("placement.report.bench_picture.draw_bench", b"a figure"),
    "demo_profile": ("placement.cli.runs.profile", None),
    "demo_plan": ("placement.cli.runs.plan", None),
    "demo_bench": ("placement.cli.runs.bench", None),
    "demo_report": ("placement.cli.runs.report", None),
    # constraints
    "collaborator_lists": ("placement.constraints.lists.collaborator_lists", LIMIT),
    "device_aware_lists": ("placement.constraints.lists.device_aware_lists", LIMIT),
    "limit_ranks": ("placement.constraints.pruning.limit_ranks", LIMIT),
    "load_similarity": (
        "placement.constraints.similarity.SimilarityTable.load_from",
        SimpleNamespace(model=SPEC, similarity="how similar"),
    ),
    "load_constraint": ("placement.constraints.config.load", LIMIT),
    "alternate": ("placement.constraints.codesign.alternate", one_round),
    "make_plan": ("placement.solvers.plan", PLAN),
    "text_examples": ("placement.constraints.examples.text_examples", []),
    "read_conversations": ("placement.constraints.examples.read_conversations", ["two conversations"]),
    "instruction_examples": ("placement.constraints.examples.instruction_examples", []),
    "finetune": ("placement.constraints.finetune.finetune", None),
    "constrained": ("placement.constraints.constrain.constrain", contextlib.nullcontext()),
    "perplexity": ("placement.constraints.quality.perplexity", SimpleNamespace(overall=2.0, of_domain={})),
    "known_tasks": ("placement.constraints.harness.known_tasks", None),
    "run_tasks": ("placement.constraints.harness.run_tasks", None),
}


def imported(reader: str, own: dict[str, tuple[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options of one source, and those of every import."""
    return {
        **{words: {f"{reader}.{place}": value} for words, (place, value) in own.items()},
        "-o made.profile": {"write_recording.out": "made.profile", "show_import.out": "made.profile"},
        "--model some/model": {"of_model.model": "some/model", f"{reader}.known.num_groups": 4},
        "--name a-name": {f"{reader}.known.name": "a-name"},  # rather than the config's
        "--model-type olmoe": {f"{reader}.known.model_type": "olmoe"},
        "--layers 3-5": {f"{reader}.known.layer_ids": [3, 4, 5]},
        "--num-hidden-layers 61": {f"{reader}.known.num_hidden_layers": 61},
        "--num-experts 64": {f"{reader}.known.num_experts": 64},
        "--top-k 6": {f"{reader}.known.top_k": 6},
        "--hidden-size 2048": {f"{reader}.known.hidden_size": 2048},
        "--expert-size 1408": {f"{reader}.known.expert_size": 1408},
        "--dtype float16": {f"{reader}.known.dtype": "float16"},
        "--json": {"show_import.as_json": True},
    }


# By command, and what is special about a second line of it: words of the command line -> where they arrive -> as what.
# A place is a stand-in, its argument, and attributes or keys of that; the last call counts.  "printed" is the JSON on
# stdout, "written" what is new in the folder.  The values of a line differ from each other, so that two that are swapped show.
ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "profile record": {
        "some/model": {"load_model.model": "some/model"},
        "-o made.profile": {"profile_model.out": "made.profile"},
        "--data texts --data more": {"read_documents.paths": ["texts", "more"], "profile_model.documents.1": "more"},
        "--text-field body": {"read_documents.text_field": "body"},
        "--domain-field topic": {"read_documents.domain_field": "topic"},
        "--split validation": {"read_documents.split": "validation"},
        "--chat": {"profile_model.as_chat": True},
        "--sequence-length 33": {"profile_model.sequence_length": 33},
        "--batch-size 5": {"profile_model.batch_size": 5},
        "--max-tokens 700": {"profile_model.max_tokens": 700},
        "--decode-tokens 9": {"profile_model.decode_tokens": 9},
        "--max-traced-tokens 600": {"profile_model.max_traced_tokens": 600},
        "--weights": {"profile_model.weights": True},
        "--seed 3": {"read_documents.seed": 3, "profile_model.seed": 3},
        "--resume": {"profile_model.resume": True},
        "--device cuda:1": {"load_model.device": "cuda:1"},
        "--device-map auto": {"load_model.device_map": "auto"},
        "--dtype bfloat16": {"load_model.dtype": "bfloat16"},
        "--json": {"show_profile.as_json": True},
    },
    "profile merge": {
        "a.profile b.profile": {"merge.folders": ["a.profile", "b.profile"]},
        "-o made.profile": {"merge.out": "made.profile"},
        "--json": {"show_profile.as_json": True},
    },
    "profile split": {
        "a.profile": {"printed": {"parts/prefill.profile": 20, "parts/decode.profile": 20}},
        "--by phase": {"written": ["parts", "parts/decode.profile", "parts/prefill.profile"]},
        "-o parts": {"written": ["parts", "parts/decode.profile", "parts/prefill.profile"]},
        "--json": {"printed": {"parts/prefill.profile": 20, "parts/decode.profile": 20}},
    },
    "profile split, sequences": {
        "b.profile": {"printed": {"parts/even.profile": 18, "parts/odd.profile": 18}},
        "--by sequence": {"written": ["parts", "parts/even.profile", "parts/odd.profile"]},
        "-o parts": {"written": ["parts", "parts/even.profile", "parts/odd.profile"]},
        "--json": {"printed": {"parts/even.profile": 18, "parts/odd.profile": 18}},
    },
    "profile split, domains": {
        "a.profile": {"printed": {"parts/prose.profile": 20, "parts/code.profile": 20}},
        "--by domain": {"written": ["parts", "parts/code.profile", "parts/prose.profile"]},
        "-o parts": {"written": ["parts", "parts/code.profile", "parts/prose.profile"]},
        "--json": {"printed": {"parts/prose.profile": 20, "parts/code.profile": 20}},
    },
    "import sglang": imported(
        "read_sglang", own={"a.pt b.pt": ("paths", ["a.pt", "b.pt"]), "--domain chats": ("domain", "chats")}
    ),
    "import vllm": imported(
        "read_vllm", own={"a.json b.json": ("paths", ["a.json", "b.json"]), "--domain chats": ("domain", "chats")}
    ),
    "import tensorrt-llm": imported(
        "read_tensorrt_llm",
        own={
            "statistics": ("folder", "statistics"),
            "--load-balancer static.yaml": ("load_balancer", "static.yaml"),
            "--decode": ("decode", True),
            "--domain chats": ("domain", "chats"),
        },
    ),
    "import megatron": imported(
        "read_megatron",
        own={"traces": ("folder", "traces"), "--decode": ("decode", True), "--domain chats": ("domain", "chats")},
    ),
    "import numpy": imported("read_arrays", own={"r.npz": ("path", "r.npz"), "--decode": ("decode", True)}),
    "inspect": {
        "a.profile": {"gather.profile.provenance.made": "a"},
        "placed.json": {"gather.placement.solver.name": "any"},
        "--held-out b.profile": {"gather.held_out.provenance.made": "b"},
        "--no-study": {"answers.insight.study": None},
        "--json": {"printed": {}},
    },
    "inspect, studied": {
        "a.profile": {"study_data.profile.provenance.made": "a"},
        "placed.json": {"study_data.placement.solver.name": "any", "answers.insight.study": "a study"},
        "--held-out b.profile": {"study_data.held_out.provenance.made": "b"},
        "--json": {"printed": {}},
    },
    "report": {
        "a.profile": {"gather.profile.provenance.made": "a"},
        "placed.json": {"gather.placement.solver.name": "any"},
        "bench.json": {"load_bench.path": "bench.json", "gather.bench": "a bench"},
        "-o made.html": {"write_report.path": "made.html"},
        "--held-out b.profile": {"gather.held_out.provenance.made": "b"},
        "--no-study": {"write_report.insight.study": None},
    },
    "report, studied": {
        "a.profile": {"study_data.profile.provenance.made": "a"},
        "placed.json": {"study_data.placement.solver.name": "any", "write_report.insight.study": "a study"},
        "--held-out b.profile": {"study_data.held_out.provenance.made": "b"},
    },
    "plan": {
        "a.profile": {"plan_and_compare.profile.provenance.made": "a"},
        "--ranks 4": {"plan_and_compare.topology.num_ranks": 4},
        "-o made.json": {"written": ["made.json"]},
        "--nodes 2": {"plan_and_compare.topology.num_nodes": 2},
        "--redundant-experts 8": {
            "plan_and_compare.topology.slots_per_rank": 4,
            "plan_and_compare.options.num_redundant": 8,
        },
        "--objective fan-out": {"plan_and_compare.options.objective": "fan-out"},
        "--links h800": {"plan_and_compare.topology.links.name": "h800"},
        "--tokens-per-rank 77": {"plan_and_compare.options.workload.tokens_per_rank": 77},
        "--dispatch per-expert": {"plan_and_compare.options.workload.mode": "per-expert"},
        "--strategy occult": {"plan_and_compare.strategy": "occult", "verdict.strategy": "occult"},
        "--compare": {
            "plan_and_compare.strategies": [name for name in STRATEGIES if name not in ("hypergraph", "partitioning")]
        },
        "--held-out b.profile": {
            "plan_and_compare.held_out.provenance.made": "b",
            "domain_regret.held_out.provenance.made": "b",
        },
        "--load-cap 1.25": {"plan_and_compare.options.load_cap": 1.25},
        "--robust": {"plan_and_compare.options.worst_domain": True},
        "--regret": {"printed.regret": {}},
        "--preserve-groups": {"plan_and_compare.options.preserve_groups": True},
        "--kicks 12": {"plan_and_compare.options.num_kicks": 12},
        "--time-budget 1.5": {"plan_and_compare.options.time_budget": 1.5},
        "--seed 5": {"plan_and_compare.options.seed": 5, "domain_regret.options.seed": 5, "verdict.options.seed": 5},
        "--json": {"printed.plan": "made.json", "printed.strategy": "occult"},
    },
    "plan, certified": {
        "a.profile": {"certify_plan.profile.provenance.made": "a"},
        "--ranks 4": {"plan_and_compare.topology.num_ranks": 4},
        "--held-out b.profile": {"certify_plan.held_out.provenance.made": "b"},
        "--certify 2.5": {"certify_plan.seconds_per_layer": 2.5},
        "--seed 5": {"certify_plan.options.seed": 5},
        "--json": {"printed.plan": "plan.json"},
    },
    "plan, of a mixture": {
        "a.profile": {"plan_and_compare.profile.provenance.made": "a"},
        "--ranks 4": {"plan_and_compare.topology.num_ranks": 4},
        "--domain-weight code=2 --domain-weight prose=3": {
            "plan_and_compare.options.domain_weights": {"code": 2.0, "prose": 3.0}
        },
        "--json": {"printed.plan": "plan.json"},
    },
    "evaluate": {
        "map.npy": {"measure.placement.solver.name": "EPLB map"},
        "b.profile": {"measure.tokens.num_tokens": 36},
        "--ranks 4": {"measure.placement.topology.num_ranks": 4},
        "--nodes 2": {"measure.placement.topology.num_nodes": 2},
        "--links h800": {"measure.placement.topology.links.name": "h800"},
        "--tokens-per-rank 77": {"measure.workload.tokens_per_rank": 77},
        "--dispatch per-expert": {"measure.workload.mode": "per-expert"},
        "--choice source": {"measure.choice": "source", "evaluate_map.choice": "source"},
        "--layers": {"evaluate_map.tokens.num_tokens": 36, "printed.layers.fan_out": [1.0, 1.0]},
        "--json": {"printed.tokens": 36},
    },
    "evaluate, for an engine": {
        "placed.json": {"measure.placement.solver.name": "any"},
        "b.profile": {"measure.tokens.num_tokens": 36},
        "--engine vllm-deepep-low-latency": {
            "measure.workload.mode": "per-expert",
            "printed.engine": "vllm-deepep-low-latency",
        },
        "--json": {"printed.tokens": 36},
    },
    "export plan": {
        "placed.json": {"write_export.placement.solver.name": "any"},
        "--to tensorrt-llm": {"write_export.engine.name": "TensorRT-LLM"},
        "-o made.yaml": {"write_export.path": "made.yaml"},
        "--model some/model": {"write_export.served.path": "some/model"},
        "--num-hidden-layers 61": {"write_export.served.total": 61},
        "--num-mtp-layers 3": {"write_export.served.num_mtp": 3},
        "--json": {"printed.out": "made.yaml"},
    },
    "export plan, layers of the model's config": {
        "placed.json": {"write_export.placement.solver.name": "any"},
        "--to sglang": {"write_export.engine.name": "SGLang"},
        "-o made.json": {"write_export.path": "made.json"},
        "--model some/model": {
            "read_text_config.source": "some/model",
            "write_export.served.total": 9,
            "write_export.served.num_mtp": 1,
        },
    },
    "export plan, checkpoint": {
        "placed.json": {"permute_checkpoint.placement.solver.name": "any"},
        "--to checkpoint": {"permute_checkpoint.placement.solver.name": "any"},
        "--model some/model": {"permute_checkpoint.source": "some/model"},
        "-o made": {"permute_checkpoint.target": "made"},
        "--invert": {"permute_checkpoint.invert": True},
    },
    "export verify": {
        "some/model": {"load_model.model": "some/model"},
        "permuted": {"read_permuted_map.folder": "permuted"},
        "--num-tokens 99": {"random_tokens.num_tokens": 99},
        "--tolerance 0.5": {"agrees.tolerance": 0.5},
        "--device cuda:1": {"load_model.device": "cuda:1"},
        "--dtype bfloat16": {"load_model.dtype": "bfloat16"},
        "--seed 5": {"random_tokens.seed": 5},
        "--json": {"printed.tokens": 100},
    },
    "export verify, on texts": {
        "some/model": {"load_model.model": "some/model"},
        "permuted": {"read_permuted_map.folder": "permuted"},
        "--data texts": {"batches.documents": ["texts"], "load_model.with_tokenizer": True},
        "--num-tokens 99": {"batches.max_tokens": 99, "batches.sequence_length": 99},
    },
    "bench": {
        "placed.json": {"bench.maps.placed.solver.name": "any"},
        "--model some/model": {"bench.model": "some/model"},
        "--workload decode": {"bench.settings.kind": "decode"},
        "--mode hierarchical --mode bf16": {"bench.settings.modes": ["hierarchical", "bf16"]},
        "--network 400mbit": {"bench.settings.network": "400mbit"},
        "--data texts": {"bench.documents": ["texts"]},
        "--sequences-per-rank 3 --sequences-per-rank 1": {"bench.settings.sequences_per_rank": [3, 1]},
        "--sequence-length 64": {"bench.settings.sequence_length": 64},
        "--steps 7": {"bench.settings.steps": 7},
        "--repeats 4": {"bench.settings.repeats": 4},
        "-o made.json": {"written": ["made.json", "made.png"]},
        "--figure made.png": {"written": ["made.json", "made.png"]},
        "--json": {"printed": {}},
    },
    "bench, replayed": {
        "placed.json": {"bench.maps.placed.solver.name": "any"},
        "--replay a.profile": {"bench.replay": "a.profile"},
        "--workload training": {"bench.settings.kind": "training"},
        "--hidden-size 96": {"bench.settings.hidden_size": 96},
        "--expert-size 48": {"bench.settings.expert_size": 48},
        "--layers 2": {"bench.settings.num_layers": 2},
        "--seed 5": {"bench.settings.seed": 5},
    },
    "constrain": {
        "a.profile": {"limit_ranks.placement.solver.name": "any"},
        "--plan placed.json": {"limit_ranks.placement.solver.name": "any"},
        "--limit 3": {"limit_ranks.limit": 3},
        "--nodes": {"limit_ranks.level": "node"},
        "-o made.safetensors": {"written": ["made.safetensors"]},
        "--json": {"printed.constraint": "made.safetensors"},
    },
    "constrain, by similarity": {
        "a.profile": {"limit_ranks.placement.solver.name": "any"},
        "--plan placed.json": {"limit_ranks.placement.solver.name": "any"},
        "--method similarity": {"limit_ranks.similarity": "how similar"},
        "--limit 3": {"limit_ranks.limit": 3},
        "--similarity alike.safetensors": {"load_similarity.path": "alike.safetensors"},
    },
    "constrain, to lists": {
        "a.profile": {"device_aware_lists.profile.provenance.made": "a"},
        "--plan placed.json": {"device_aware_lists.placement.solver.name": "any"},
        "--method c2r": {"device_aware_lists.placement.solver.name": "any"},
        "--top-t 5": {"device_aware_lists.size": 5},
    },
    "codesign": {
        "some/model": {"load_model.model": "some/model"},
        "--ranks 8": {"make_plan.topology.num_ranks": 8},
        "--nodes 2": {"make_plan.topology.num_nodes": 2},
        "--top-t 6": {"device_aware_lists.size": 6},
        "--data texts": {"batches.documents": ["texts"]},
        "--max-tokens 700": {"batches.max_tokens": 700},
        "--rounds 3": {"alternate.max_rounds": 3},
        "--seed 5": {"make_plan.options.seed": 5},
        "-o made": {"written": ["made", "made/constraint.safetensors", "made/plan.json"]},
        "--device cuda:1": {"load_model.device": "cuda:1"},
        "--json": {"printed.chosen": 1},
    },
    "codesign, by router scores": {
        "--method router": {"limit_ranks.limit": 3, "limit_ranks.similarity": None},
        "--limit 3": {"limit_ranks.limit": 3},
    },
    "finetune": {
        "some/model": {"load_model.model": "some/model"},
        "-o made": {"finetune.out": "made"},
        "--constraint limit.safetensors": {
            "load_constraint.path": "limit.safetensors",
            "finetune.constraint.name": LIMIT.name,
            "constrained.constraint.name": LIMIT.name,
        },
        "--data texts": {"text_examples.documents": ["texts"]},
        "--steps 40": {"finetune.training.steps": 40},
        "--batch-size 6": {"finetune.training.batch_size": 6},
        "--micro-batch-size 3": {"finetune.training.micro_batch_size": 3},
        "--sequence-length 33": {"text_examples.sequence_length": 33},
        "--learning-rate 0.125": {"finetune.training.learning_rate": 0.125},
        "--warmup-steps 4": {"finetune.training.warmup_steps": 4},
        "--what experts": {"finetune.training.part": "experts"},
        "--no-plain": {
            "printed": {
                run: {"all": 2.0} for run in ("as it was", f"as it was, {LIMIT.name}", f"fine-tuned, {LIMIT.name}")
            }
        },
        "--save-steps 20": {"finetune.training.save_steps": 20},
        "--resume": {"finetune.resume": True},
        "--seed 5": {"finetune.training.seed": 5},
        "--held-out unseen": {"batches.documents": ["unseen"]},
        "--held-out-tokens 700": {"batches.max_tokens": 700},
        "--device cuda:1": {"load_model.device": "cuda:1"},
        "--dtype bfloat16": {"finetune.training.dtype": "bfloat16"},
        "--json": {"printed.as it was": {"all": 2.0}},
    },
    "finetune, on conversations": {
        "--instructions a.jsonl --instructions b.jsonl": {
            "read_conversations.paths": ["a.jsonl", "b.jsonl"],
            "instruction_examples.conversations": ["two conversations"],
        },
        "--sequence-length 33": {"instruction_examples.sequence_length": 33},
    },
    "quality": {
        "some/model": {"load_model.model": "some/model"},
        "--constraint limit.safetensors": {
            "load_constraint.path": "limit.safetensors",
            "constrained.constraint.name": LIMIT.name,
            "run_tasks.constraint.name": LIMIT.name,
        },
        "--data unseen": {"batches.documents": ["unseen"]},
        "--max-tokens 700": {"batches.max_tokens": 700},
        "--task c2r --task arc": {"known_tasks.names": ["c2r", "arc"], "run_tasks.names": ["c2r", "arc"]},
        "--task-folder tasks": {"known_tasks.folder": "tasks", "run_tasks.folder": "tasks"},
        "--task-limit 9": {"run_tasks.limit": 9},
        "--device cuda:1": {"load_model.device": "cuda:1"},
        "--json": {"printed.tiny": {"all": 2.0}},
    },
    "demo": {
        "-o made": {
            "demo_profile.out": "made/held-out.profile",
            "demo_plan.run": "made/calibration.profile",
            "demo_plan.held_out": "made/held-out.profile",
            "demo_plan.out": "made/plan.json",
            "demo_bench.plan_files": ["made/plan.json"],
            "demo_bench.out": "made/bench.json",
            "demo_report.held_out": "made/held-out.profile",
            "demo_report.out": "made/report.html",
        },
        "--ranks 2": {"demo_plan.ranks": 2},
    },
}

ELSEWHERE = {  # options that no row gives: who would notice
    ("profile record", "--similarity"): "test_constraints_cli.py prunes by the table that it wrote",
    ("bench", "--ranks"): "test_cli.py: the plan has to agree with it; it goes nowhere else",
}

NOTHING = object()
INPUTS = ("a.profile", "b.profile", "placed.json", "map.npy")  # none has the name that a command writes by default


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two profiles and two maps of one model."""
    made = tmp_path_factory.mktemp("options")
    for name, num_tokens in (("a", 40), ("b", 36)):
        trace = make_trace(random_ids(0, 2, num_tokens, 8, 2))
        trace.phase[num_tokens // 2 :] = 1
        Profile.from_tokens(SPEC, ["prose", "code"], trace, {"made": name}).save(made / f"{name}.profile")
    PLAN.save(made / "placed.json")
    np.save(made / "map.npy", PLAN.physical_to_logical_map)
    # A module that is imported for the first time while its neighbours are replaced would keep the stand-ins.
    for package in (placement, profiler):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.startswith("profiler.zoo."):
                importlib.import_module(found.name)
    return made


@pytest.fixture
def calls(folder, monkeypatch):
    """The arguments of the last call of each stand-in, by name."""
    heard: dict[str, Any] = {}

    def replace(name, target, gives):
        real = pkgutil.resolve_name(target)
        signature = inspect.signature(real)

        def stand_in(*arguments, **options):
            bound = signature.bind(*arguments, **options)  # as the real one would take them
            bound.apply_defaults()
            heard[name] = bound.arguments
            return gives(bound.arguments) if inspect.isfunction(gives) else gives

        monkeypatch.setattr(target, staticmethod(stand_in) if inspect.ismethod(real) else stand_in)

    for name, (target, gives) in STAND_INS.items():
        replace(name, target, gives)
    monkeypatch.setattr(LoadedModel, "input_device", "cpu")
    monkeypatch.chdir(folder)
    return heard


def line_of(name, without=None):
    """The words of a row, as a person types them."""
    command = name.partition(",")[0]
    return [*command.split(), *(word for words in ROWS[name] if words != without for word in words.split())]


def note_outcome(calls, capsys):
    """Add to the calls what was printed, if it is JSON, and what was written; remove that. Returns stderr."""
    out, err = capsys.readouterr()
    with contextlib.suppress(json.JSONDecodeError):
        calls["printed"] = json.loads(out)
    new = [path for path in Path().iterdir() if path.name not in INPUTS]
    calls["written"] = sorted(str(each) for path in new for each in (path, *(path.iterdir() if path.is_dir() else ())))
    for path in new:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return err


def arrived(calls, place):
    """What is at a place, `NOTHING` if there is no such place."""
    value: Any = calls
    for part in place.split("."):
        if isinstance(value, Mapping):
            value = value.get(part, NOTHING)
        elif isinstance(value, list | tuple):
            value = value[int(part)] if int(part) < len(value) else NOTHING
        else:
            value = getattr(value, part, NOTHING)
    return plain(value)


def plain(value):
    """Paths as text and tuples as lists, as ROWS has them."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


@pytest.mark.parametrize("name", ROWS)
def test_every_option_arrives(name, calls, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["coterie", *line_of(name)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    err = note_outcome(calls, capsys)
    assert stop.value.code == 0, err
    expected = {place: value for places in ROWS[name].values() for place, value in places.items()}
    assert {place: arrived(calls, place) for place in expected} == expected


@pytest.mark.parametrize("name", ROWS)
def test_what_arrives_is_no_default(name, calls, capsys):
    """What a row expects of an option does not hold without it: else nobody would notice that it is ignored."""
    command = typer.main.get_command(cli.app)
    for words, places in ROWS[name].items():
        calls.clear()
        with contextlib.suppress(Exception):  # others may need it
            command.main(line_of(name, without=words), standalone_mode=False)
        note_outcome(calls, capsys)
        assert places, words
        for place, value in places.items():
            assert arrived(calls, place) != value, f"{words}: {place} is {value!r} without it"


@pytest.mark.parametrize("name", ROWS)
def test_values_of_a_row_differ(name):
    values = [word for word in line_of(name) if not word.startswith("-")]
    assert len(set(values)) == len(values), "two that are alike would hide that they are swapped"


def commands(group, path=()):
    """Every command by what a person types for it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


def test_every_option_is_in_a_row():
    given: dict[str, set[str]] = {}
    for name, row in ROWS.items():
        given.setdefault(name.partition(",")[0], set()).update(words.split()[0] for words in row)
    found = dict(commands(typer.main.get_command(cli.app)))
    assert sorted(given) == sorted(found)
    options = {
        (name, option.opts[-1]): {*option.opts, *option.secondary_opts}
        for name, command in found.items()
        for option in command.params
        if option.param_type_name == "option"
    }
    missing = {(name, shown) for (name, shown), ways in options.items() if not ways & given[name]}
    assert missing == set(ELSEWHERE), "options without a row, or an excuse for one that has a row"
