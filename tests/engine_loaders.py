"""Runs the loaders and recorders of released engines; a process of its own, since it fills sys.modules with stubs.

python engine_loaders.py WHAT SOURCE ARGUMENTS prints what the engine made of a file of ours, or recorded, as JSON. SOURCE is where the
engine's own code was unpacked. Only what its loader imports without using, or asks its runtime for, is a stub.
"""

import ast
import importlib
import json
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def package(name: str, folder: Path | None = None, **attributes: object) -> types.ModuleType:
    """A module without the code of its own file; its submodules are found in the folder."""
    module = types.ModuleType(name)
    module.__path__ = [str(folder)] if folder else []
    vars(module).update(attributes)
    sys.modules[name] = module
    return module


def load_sglang(source: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """`compute_initial_expert_location_metadata` on every rank; the module of either release."""
    import torch

    srt = source / "sglang" / "srt"
    package("sglang", source / "sglang")
    package("sglang.srt", srt)
    package("sglang.srt.eplb", srt / "eplb")
    package("sglang.srt.elastic_ep")
    package(
        "sglang.srt.elastic_ep.elastic_ep", ElasticEPStateManager=None, elastic_expanded_world_enabled=lambda: False
    )

    class Model:
        @staticmethod
        def get_model_config_for_expert_location(_config: Any) -> Any:
            return location.ModelConfigForExpertLocation(asked["num_hidden_layers"], asked["num_experts"], None)

    package("sglang.srt.model_loader", get_model_architecture=lambda _config: (Model, None))
    settings = SimpleNamespace(
        init_expert_location=asked["file"],
        ep_num_redundant_experts=asked["num_redundant_experts"],
        ep_dispatch_algorithm="static",
        moe_a2a_backend="deepep",
        ep_join_mode=None,
        ep_size=asked["num_ranks"],
        nnodes=asked["num_nodes"],
        elastic_ep_initial_size=None,
        device="cpu",
    )
    package(
        "sglang.srt.runtime_context",
        get_exec=lambda: SimpleNamespace(moe=settings),
        get_parallel=lambda: settings,
        get_device=lambda: settings,
        get_resources=lambda: SimpleNamespace(),
    )
    location = importlib.import_module("sglang.srt.eplb.expert_location")
    model_config = SimpleNamespace(hf_config=None)
    out = []
    for rank in range(asked["num_ranks"]):
        torch.distributed.get_rank = lambda rank=rank: rank
        if (srt / "runtime_context.py").exists():  # 0.5.23
            found = location.compute_initial_expert_location_metadata(model_config, rank)
        else:
            found = location.compute_initial_expert_location_metadata(settings, model_config, rank)
        out.append(
            {
                "phy2log": found.physical_to_logical_map.tolist(),
                "dispatch": found.logical_to_rank_dispatch_physical_map.tolist(),
            }
        )
    return out


def record_sglang(source: Path, asked: dict[str, Any]) -> None:
    """Its recorder on passes of tokens, rank by rank; it writes .pt files where its environment variable says."""
    from contextlib import contextmanager

    import numpy as np
    import torch

    class Withable:
        value = None

        @contextmanager
        def with_value(self, value: object) -> Any:
            self.value = value
            yield
            self.value = None

    srt = source / "sglang" / "srt"
    package("sglang", source / "sglang")
    package("sglang.srt", srt)
    package("sglang.srt.eplb", srt / "eplb")
    package("einops", reduce=None)  # of metrics only
    package("sglang.srt.metrics")
    package("sglang.srt.metrics.collector", ExpertDispatchCollector=None)
    package("sglang.srt.observability")
    metrics = {"STAT_LOGGER_ROLE_EXPERT_DISPATCH": None, "resolve_collector_class": None}
    package("sglang.srt.observability.metrics_collector", ExpertDispatchCollector=None, **metrics)
    package("sglang.srt.model_executor")
    package("sglang.srt.model_executor.forward_batch_info", ForwardBatch=None, ForwardMode=None)
    package("sglang.srt.server_args", ServerArgs=None)
    package("sglang.srt.layers")
    package("sglang.srt.layers.moe", get_moe_a2a_backend=None)  # asked on ROCm only
    package("sglang.srt.utils", Withable=Withable, get_int_env_var=None, get_device=lambda: "cpu")
    settings = SimpleNamespace(
        expert_distribution_recorder_mode=asked["mode"],
        expert_distribution_recorder_buffer_size=100,
        eplb_min_rebalancing_utilization_threshold=1.0,
        enable_expert_distribution_metrics=False,
        moe_a2a_backend="deepep",
        deepep_mode="normal",
        chunked_prefill_size=256,
        enable_two_batch_overlap=False,
        is_hip=False,
        device="cpu",
    )
    package(
        "sglang.srt.runtime_context",
        get_device=lambda: settings,
        get_exec=lambda: SimpleNamespace(moe=settings, overlap=settings),
        get_platform=lambda: settings,
        get_schedule=lambda: settings,
        logs_expert_balancedness_to_server_log=lambda: False,
        reports_expert_balancedness=lambda: False,
    )
    module = importlib.import_module("sglang.srt.eplb.expert_distribution")
    zeros = torch.zeros
    torch.zeros = lambda *shape, **options: zeros(*shape, **{**options, "device": "cpu"})  # 0.5.6 says cuda
    torch.cuda.empty_cache = lambda: None
    torch.get_device_module = lambda: SimpleNamespace(empty_cache=lambda: None)
    arrays = np.load(asked["passes"])
    slots_LP = torch.from_numpy(arrays["slots"])
    location = SimpleNamespace(
        num_layers=len(slots_LP),
        num_physical_experts=slots_LP.shape[1],
        num_logical_experts=int(slots_LP.max()) + 1,
        num_local_physical_experts=slots_LP.shape[1] // asked["num_ranks"],
        physical_to_logical_map=slots_LP,
        ep_size=asked["num_ranks"],
    )
    counted: list[Any] = []
    for rank in reversed(range(asked["num_ranks"])):  # the first rank last: it writes what all have counted

        def all_reduce(counts: Any, op: Any, rank: int = rank) -> None:
            counted.append(counts.clone())
            counts.copy_(torch.stack(counted).sum(dim=0))

        torch.distributed.all_reduce = all_reduce
        arguments = (location, rank) if (srt / "runtime_context.py").exists() else (settings, location, rank)
        recorder = module.ExpertDistributionRecorder.init_new(*arguments)
        recorder.start_record()
        for number in range(asked["num_passes"]):
            picked = torch.from_numpy(arrays[f"ids_{number}_{rank}"])  # slots (layers, tokens, K), -1 in dense layers
            positions = torch.from_numpy(arrays[f"positions_{number}"])
            extend = number == 0
            batch = SimpleNamespace(
                input_ids=torch.from_numpy(arrays[f"tokens_{number}"]),
                positions=positions,
                extend_seq_lens_cpu=arrays["lengths"].tolist() if extend else None,
                forward_mode=SimpleNamespace(value=1 if extend else 2),
            )
            with recorder.with_forward_pass(number + 1, batch):
                for layer, ids in enumerate(picked):
                    if (ids >= 0).all():
                        with recorder.with_current_layer(layer):
                            recorder.on_select_experts(topk_ids=ids)
        recorder.stop_record()
        recorder.dump_record()


def load_vllm(source: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """vLLM's plugin loader, then its table of policies: the answer for the model, for a draft, and unless asked."""
    import torch

    vllm = source / "vllm"
    option = next(
        node
        for node in ast.parse((vllm / "config" / "parallel.py").read_text()).body
        if isinstance(node, ast.Assign) and node.targets[0].id == "EPLBPolicyOption"
    )
    scope: dict[str, Any] = {}
    exec("from typing import Literal\n" + ast.unparse(option), scope)
    package("vllm", vllm, envs=package("vllm.envs", VLLM_PLUGINS=None))
    package("vllm.config")
    package("vllm.config.parallel", EPLBPolicyOption=scope["EPLBPolicyOption"])
    package("vllm.distributed", vllm / "distributed")
    package("vllm.distributed.eplb", vllm / "distributed" / "eplb")
    plugins = importlib.import_module("vllm.plugins")
    policies = importlib.import_module("vllm.distributed.eplb.policy")
    sys.path.insert(0, asked["entry_points"])
    plan = os.environ.pop("COTERIE_PLAN")
    plugins.load_general_plugins()
    untouched = {"default": policies.DefaultEplbPolicy} == policies.EPLB_POLICIES
    os.environ["COTERIE_PLAN"] = plan
    plugins.plugins_loaded = False
    plugins.load_general_plugins()
    policy = policies.EPLB_POLICIES["default"]

    def ask(policy: Any, num_layers: int) -> list[list[int]]:
        load = torch.randint(1, 100, (num_layers, asked["num_experts"]), generator=torch.Generator().manual_seed(0))
        old = torch.arange(asked["num_slots"]).repeat(num_layers, 1) % asked["num_experts"]
        answer = policy.rebalance_experts(load, asked["num_slots"], 1, asked["num_nodes"], asked["num_ranks"], old)
        assert answer.device == torch.device("cpu")  # async_worker.py asserts it
        return answer.tolist()

    return {
        "untouched": untouched,
        "is_policy": issubclass(policy, policies.AbstractEplbPolicy),
        "phy2log": ask(policy, asked["num_layers"]),
        "draft": ask(policy, 1),
        "draft_by_default": ask(policies.DefaultEplbPolicy, 1),
        "by_default": ask(policies.DefaultEplbPolicy, asked["num_layers"]),
    }


def load_vllm_ascend(source: Path, asked: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """`init_eplb_config` for every layer and rank."""
    import logging

    import torch

    torch.Tensor.npu = lambda tensor: tensor
    package("vllm")
    package("vllm.logger", logger=logging.getLogger("vllm"))
    for name in ("vllm.model_executor", "vllm.model_executor.layers", "vllm.model_executor.layers.fused_moe"):
        package(name)
    package("vllm.model_executor.layers.fused_moe.expert_map_manager", determine_expert_map=None)
    package("vllm_ascend", source / "vllm_ascend")
    package("vllm_ascend.eplb", source / "vllm_ascend" / "eplb")
    package("vllm_ascend.eplb.core", source / "vllm_ascend" / "eplb" / "core")
    utils = importlib.import_module("vllm_ascend.eplb.core.eplb_utils")
    config = SimpleNamespace(expert_map_path=asked["file"], dynamic_eplb=False, num_redundant_experts=0)
    out = []
    for layer in range(asked["num_layers"]):
        ranks = []
        for rank in range(asked["num_ranks"]):
            moe = SimpleNamespace(num_experts=asked["num_experts"], ep_size=asked["num_ranks"], ep_rank=rank)
            every, local, log2phy, redundant = utils.init_eplb_config(config, layer, moe)
            found = {"every": every.tolist(), "local": local.tolist(), "log2phy": log2phy.tolist()}
            ranks.append({**found, "num_redundant_experts": int(redundant)})
        out.append(ranks)
    return out


if __name__ == "__main__":
    loaders = {
        "sglang": load_sglang,
        "sglang-recorder": record_sglang,
        "vllm": load_vllm,
        "vllm-ascend": load_vllm_ascend,
    }
    print(json.dumps(loaders[sys.argv[1]](Path(sys.argv[2]), json.loads(sys.argv[3]))))
