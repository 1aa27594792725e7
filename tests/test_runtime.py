"""The exchange against a walk over tokens, and expert-parallel runs against one process: outputs and gradients."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import tiny_model
from torch.distributed.device_mesh import init_device_mesh

from placement.placement_map import PlacementMap
from placement.runtime.exchange import build_index
from placement.runtime.experts import IMPLEMENTATIONS, build_implementations, installed, local_experts
from placement.runtime.launch import run_on_ranks
from placement.runtime.meter import Meter
from placement.runtime.reference import expected_traffic
from placement.topology import Topology
from profiler import CoterieError, Recorder
from profiler.families import find_moe_layers, read_spec

NUM_RANKS = 2
FAMILIES = ("olmoe", "gpt_oss", "deepseek_v3")
SLOTS_PER_RANK = 4


def random_map(model, seed):
    spec = read_spec(model, "tiny")
    rng = np.random.default_rng(seed)
    ranks = np.stack([rng.permutation(spec.num_experts) // SLOTS_PER_RANK for _ in spec.layer_ids])
    return PlacementMap.from_ranks(spec, Topology(1, NUM_RANKS, SLOTS_PER_RANK), ranks, {"name": "random"})


def slots_of_rank(rank, case):
    """Picks of each rank: ordinary, all on one rank, and none at all on rank 1."""
    rng = np.random.default_rng((case, rank))
    if case == 0:
        return np.stack([rng.permutation(8)[:3] for _ in range(20)])
    if case == 1:
        return np.tile([4, 6, 5], (5, 1))
    return np.empty((0, 3), dtype=np.int64) if rank else np.array([[0, 7, 3]])


def compare_with_one_process(rank, _device, _arguments):
    """On every rank: each family, each implementation; what differs, and what was sent against the reference."""
    mesh = init_device_mesh("cpu", (NUM_RANKS, 1), mesh_dim_names=("ep", "tp"))
    differences, sent = {}, {}
    for family in FAMILIES:
        model = tiny_model(family)
        layers = find_moe_layers(model)
        placement = random_map(model, seed=3)
        input_ids = torch.randint(3, 64, (rank + 1, 9), generator=torch.Generator().manual_seed(rank))
        with torch.no_grad(), Recorder(model) as recorder:
            expected = model(input_ids=input_ids).logits
        for name, make_ep in IMPLEMENTATIONS.items():
            meter = Meter()
            implementations = build_implementations(layers, placement, make_ep, mesh["ep"], mesh["tp"], meter)
            with torch.no_grad(), installed(layers, implementations):
                logits = model(input_ids=input_ids).logits
            differences[f"{family} {name}"] = float((logits - expected).abs().max())
            if name == "coterie":
                sent[family] = {
                    "bytes": meter.bytes_sent,
                    "rows": meter.rows_sent,
                    **expected_sent(recorder, placement),
                }
    for case in range(3):
        slots_TK = slots_of_rank(rank, case)
        index = build_index(torch.from_numpy(slots_TK), SLOTS_PER_RANK, dist.group.WORLD)
        traffic = expected_traffic(slots_TK.tolist(), SLOTS_PER_RANK, NUM_RANKS)
        assert index.token_of_row.tolist() == [token for rows in traffic.rows_to for token in rows]
        assert index.rows.to == [len(rows) for rows in traffic.rows_to]
        assert index.pairs.to == [len(pairs) for pairs in traffic.pairs_to]
        codes = iter(index.pair_codes.tolist())
        for rows, pairs in zip(traffic.rows_to, traffic.pairs_to, strict=True):
            for token, local in pairs:
                assert next(codes) == rows.index(token) * SLOTS_PER_RANK + local
    return {"differences": differences, "sent": sent, "gradients": gradients(rank, mesh)}


def expected_sent(recorder, placement):
    """Rows and pairs that one rank must send to each rank, over all layers, by the walk over tokens."""
    rows_to, pairs_to = np.zeros(NUM_RANKS, dtype=int), np.zeros(NUM_RANKS, dtype=int)
    for layer, ids_TK in enumerate(recorder.trace().topk_ids):
        traffic = expected_traffic(placement.slot_of_expert[layer][ids_TK].tolist(), SLOTS_PER_RANK, NUM_RANKS)
        rows_to += [len(rows) for rows in traffic.rows_to]
        pairs_to += [len(pairs) for pairs in traffic.pairs_to]
    return {"rows_to": rows_to.tolist(), "pairs_to": pairs_to.tolist()}


def gradients(rank, mesh):
    """Largest difference of the gradients of inputs, routing weights and own experts, all ranks' tokens together."""
    experts = find_moe_layers(tiny_model("olmoe"))[0].experts
    placement = random_map(tiny_model("olmoe"), seed=5)
    batches = []
    for source in range(NUM_RANKS):
        generator = torch.Generator().manual_seed(source)
        hidden = torch.randn(7 + source, 32, generator=generator)
        ids = torch.stack([torch.randperm(8, generator=generator)[:2] for _ in hidden])
        batches.append((hidden, ids, torch.rand(len(hidden), 2, generator=generator)))
    leaves = [
        (hidden.clone().requires_grad_(), ids, weights.clone().requires_grad_()) for hidden, ids, weights in batches
    ]
    sum(experts(*leaf).square().sum() for leaf in leaves).backward()
    layer = find_moe_layers(tiny_model("olmoe"))[:1]
    [coterie] = build_implementations(layer, placement, IMPLEMENTATIONS["coterie"], mesh["ep"], mesh["tp"], Meter())
    hidden, ids, weights = batches[rank]
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    coterie(hidden, ids, weights).square().sum().backward()
    mine = placement.physical_to_logical_map[0, rank * SLOTS_PER_RANK : (rank + 1) * SLOTS_PER_RANK]
    local = dict(coterie.experts_forward.__self__.named_parameters())
    return {
        "hidden": float((hidden.grad - leaves[rank][0].grad).abs().max()),
        "weights": float((weights.grad - leaves[rank][2].grad).abs().max()),
        "gate_up_proj": float((local["gate_up_proj"].grad - experts.gate_up_proj.grad[mine]).abs().max()),
        "down_proj": float((local["down_proj"].grad - experts.down_proj.grad[mine]).abs().max()),
    }


@pytest.fixture(scope="module")
def results():
    return run_on_ranks(compare_with_one_process, NUM_RANKS, {})


def test_outputs_equal_one_process(results):
    for result in results:
        assert len(result["differences"]) == len(FAMILIES) * len(IMPLEMENTATIONS)
        assert max(result["differences"].values()) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_and_bytes_sent_are_the_references(results, family):
    row_bytes, pair_bytes = 32 * 4, 4 + 4
    for rank, other in ((0, 1), (1, 0)):
        sent, others = results[rank]["sent"][family], results[other]["sent"][family]
        assert sent["rows"] == sum(sent["rows_to"])
        dispatched = sent["rows_to"][other] * row_bytes + sent["pairs_to"][other] * pair_bytes
        returned = others["rows_to"][rank] * row_bytes
        assert sent["bytes"] == dispatched + returned


def test_gradients_equal_one_process(results):
    for result in results:
        assert max(result["gradients"].values()) < 1e-4, result["gradients"]


def fail_on_rank_one(rank, _device, _arguments):
    if rank == 1:
        raise ValueError("the cable is out")
    return {}


def test_a_failing_rank_is_one_line():
    with pytest.raises(CoterieError, match="rank 1 of 2 failed: ValueError: the cable is out"):
        run_on_ranks(fail_on_rank_one, 2, {})


def test_local_experts_leave_the_original_alone():
    experts = find_moe_layers(tiny_model("gpt_oss"))[0].experts
    before = {name: parameter.clone() for name, parameter in experts.named_parameters()}
    local = local_experts(experts, [5, 2])
    assert local.num_experts == 2
    assert experts.num_experts == 8
    for name, parameter in experts.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(dict(local.named_parameters())[name], parameter[[5, 2]])
