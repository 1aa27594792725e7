"""Expert-parallel runs against one process and a walk over tokens: outputs, gradients, bytes, the evaluator's figures."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import make_trace, tiny_model
from tiny_models import CONFIGS
from torch.distributed.device_mesh import init_device_mesh

from placement.cost import evaluate
from placement.placement_map import PlacementMap
from placement.runtime.agreement import require_fit, require_same
from placement.runtime.exchange import Pairs, index_hop, make_route, plan_sizes
from placement.runtime.experts import IMPLEMENTATIONS, Options, build_implementations, installed
from placement.runtime.launch import run_on_ranks
from placement.runtime.membership import LONGEST_WAIT
from placement.runtime.meter import Meter
from placement.runtime.reference import expected_traffic
from placement.runtime.sharding import local_experts
from placement.runtime.slots import SlotChoice
from placement.topology import Topology
from profiler import CoterieError, Recorder
from profiler.families import find_moe_layers, read_spec
from profiler.spec import MoESpec

FAMILIES = ("olmoe", "gpt_oss", "deepseek_v3", "nemotron_h", "muse_spark_text", "step3p5")
NOT_SERVED = ("dbrx", "doge", "jetmoe", "llama4_text", "longcat_flash", "switch_transformers")
SIZES = (2, 4)
NUM_EXPERTS = 8
MODES = {
    "flat": Options(),
    "hierarchical": Options(mode="hierarchical"),
    "source": Options(choice="source"),
}


def topology(num_ranks, slots_per_rank):
    return Topology(2, num_ranks // 2, slots_per_rank)


def permutation_map(spec, num_ranks, seed):
    rng = np.random.default_rng(seed)
    slots = np.stack([rng.permutation(spec.num_experts) for _ in spec.layer_ids])
    return PlacementMap(spec, topology(num_ranks, spec.num_experts // num_ranks), slots, {"name": "random"})


def copies_map(spec, num_ranks, seed):
    """Two slots a rank more than needed, most of them filled with copies, some empty."""
    rng = np.random.default_rng(seed)
    per_rank = spec.num_experts // num_ranks + 2
    rows = []
    for _ in spec.layer_ids:
        held = [list(part) for part in np.array_split(rng.permutation(spec.num_experts), num_ranks)]
        for experts in held:
            others = np.setdiff1d(np.arange(spec.num_experts), experts)
            experts += [rng.choice(others), -1]
            rng.shuffle(experts)
        rows.append(np.concatenate(held))
    return PlacementMap(spec, topology(num_ranks, per_rank), np.array(rows), {"name": "copies"})


MAPS = {"permutation": permutation_map, "copies": copies_map}


def first_rank_map(spec, num_ranks, seed):
    """All experts on rank 0, empty slots on the others."""
    row = np.full(num_ranks * spec.num_experts, -1)
    row[: spec.num_experts] = np.random.default_rng(seed).permutation(spec.num_experts)
    return PlacementMap(spec, topology(num_ranks, spec.num_experts), row[None], {"name": "first rank"})


def mesh_of_all():
    return init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("ep", "tp"))


def built(layers, placement, meter, name="coterie", options=None, mesh=None):
    mesh = mesh or mesh_of_all()
    return build_implementations(layers, placement, IMPLEMENTATIONS[name], mesh["ep"], mesh["tp"], meter, options)


def compare_models(rank, _device, _arguments):
    """Each family, implementation, map and mode: what differs from one process, and what was sent and served."""
    num_ranks = dist.get_world_size()
    differences, figures = {}, {}
    for family in FAMILIES:
        model = tiny_model(family)
        layers = find_moe_layers(model)
        spec = read_spec(model, "tiny")
        input_ids = torch.randint(3, 64, (rank + 1, 9), generator=torch.Generator().manual_seed(rank))
        with torch.no_grad(), Recorder(model) as recorder:
            expected = model(input_ids=input_ids, use_cache=False)[0]
        for map_name, make_map in MAPS.items():
            placement = make_map(spec, num_ranks, seed=3)
            for mode, options in MODES.items():
                meter = Meter()
                implementations = built(layers, placement, meter, options=options)
                with torch.no_grad(), installed(layers, implementations):
                    out = model(input_ids=input_ids, use_cache=False)[0]
                key = f"{family} {map_name} {mode}"
                differences[key] = float((out - expected).abs().max())
                figures[key] = {
                    "served": [meter.rows_served, meter.pairs_served],
                    "bytes": [meter.bytes_sent, meter.network_bytes_sent],
                    "ids": recorder.trace().topk_ids.tolist(),
                }
        if family != "step3p5":  # transformers has no expert parallelism for it
            meter = Meter()
            implementations = built(layers, permutation_map(spec, num_ranks, 3), meter, "HF all_to_all")
            with torch.no_grad(), installed(layers, implementations):
                out = model(input_ids=input_ids, use_cache=False)[0]
            differences[f"{family} HF all_to_all"] = float((out - expected).abs().max())
    return {"differences": differences, "figures": figures}


@pytest.fixture(scope="module", params=SIZES)
def models(request):
    return run_on_ranks(compare_models, request.param, {})


def test_outputs_equal_one_process(models):
    for result in models:
        assert len(result["differences"]) == len(FAMILIES) * (len(MAPS) * len(MODES) + 1) - 1
        assert max(result["differences"].values()) < 1e-5, result["differences"]


@pytest.mark.parametrize("map_name", MAPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fan_out_ingress_and_load_are_the_evaluators(models, family, map_name):
    num_ranks = len(models)
    spec = read_spec(tiny_model(family), "tiny")
    placement = MAPS[map_name](spec, num_ranks, seed=3)
    for mode, options in MODES.items():
        figures = [result["figures"][f"{family} {map_name} {mode}"] for result in models]
        ids = [np.array(figure["ids"], dtype=np.uint8) for figure in figures]
        sources = np.repeat(np.arange(num_ranks), [part.shape[1] for part in ids])
        metrics = evaluate(placement, make_trace(np.concatenate(ids, axis=1)), options.choice, sources)
        tokens = len(sources)
        served = np.array([figure["served"] for figure in figures])
        assert served[:, 0].tolist() == np.round(metrics.ingress.sum(axis=0) * tokens).tolist()
        assert served[:, 1].tolist() == metrics.load.sum(axis=0).tolist()
        assert served[:, 0].sum() == round(metrics.fan_out.sum() * tokens)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_bytes_are_those_of_the_walk(models, family):
    """Rows there and back once, 6 bytes a pair there; hierarchical: once a node over the network, then once a rank."""
    num_ranks = len(models)
    spec = read_spec(tiny_model(family), "tiny")
    for map_name, make_map in MAPS.items():
        placement = make_map(spec, num_ranks, seed=3)
        for mode, options in MODES.items():
            rows, pairs = np.zeros((num_ranks, num_ranks), int), np.zeros((num_ranks, num_ranks), int)
            node_rows, node_pairs = np.zeros((num_ranks, 2), int), np.zeros((num_ranks, 2), int)
            for source, result in enumerate(models):
                for layer, ids in enumerate(result["figures"][f"{family} {map_name} {mode}"]["ids"]):
                    slots = SlotChoice(placement, layer, source, options.choice)
                    slots_TK = slots.slots_of(torch.tensor(ids)).tolist()
                    traffic = expected_traffic(slots_TK, slots.slots_per_rank, num_ranks)
                    rows[source] += [len(part) for part in traffic.rows_to]
                    pairs[source] += [len(part) for part in traffic.pairs_to]
                    traffic = expected_traffic(slots_TK, slots.slots_per_rank * num_ranks // 2, 2)
                    node_rows[source] += [len(part) for part in traffic.rows_to]
                    node_pairs[source] += [len(part) for part in traffic.pairs_to]
            node = np.arange(num_ranks) // (num_ranks // 2)
            row_bytes, pair_bytes = spec.hidden_size * 4, 6
            for rank, result in enumerate(models):
                sent, over_network = result["figures"][f"{family} {map_name} {mode}"]["bytes"]
                others = np.arange(num_ranks) != rank
                far = node != node[rank]
                if mode != "hierarchical":
                    both_ways = rows[rank] + rows[:, rank]
                    assert sent == both_ways[others].sum() * row_bytes + pairs[rank][others].sum() * pair_bytes
                    assert over_network == both_ways[far].sum() * row_bytes + pairs[rank][far].sum() * pair_bytes
                else:
                    rail = np.arange(num_ranks) % (num_ranks // 2) == rank % (num_ranks // 2)
                    other = 1 - node[rank]
                    returned = node_rows[rail & far, node[rank]].sum()
                    there = node_rows[rank, other] * row_bytes + node_pairs[rank, other] * pair_bytes
                    assert over_network == there + returned * row_bytes


def bare_experts(hidden_size, dtype, top_k=2, family="olmoe"):
    """An experts module and its layer, random; every value small enough that 16-bit formats keep two digits."""
    heads = {} if family == "step3p5" else {"num_attention_heads": 1, "num_key_value_heads": 1}
    experts = find_moe_layers(tiny_model(family, hidden_size=hidden_size, **heads))[0].experts.to(dtype)
    if family != "step3p5":  # which has one implementation
        experts.config._experts_implementation = "eager"
    spec = MoESpec("bare", "olmoe", (0,), NUM_EXPERTS, top_k, 1, hidden_size, 16, "float32")
    return SimpleNamespace(experts=experts), spec


def batch_of(rank, hidden_size, num_tokens, top_k, dtype, seed=0):
    generator = torch.Generator().manual_seed(100 * seed + rank)
    hidden = torch.randn(num_tokens, hidden_size, generator=generator)
    ids = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(dim=1)[:, :top_k]
    weights = torch.rand(num_tokens, top_k, generator=generator)
    return hidden.to(dtype), ids, weights.to(dtype)


# name: (hidden size, top-k, dtype, tokens of a rank, what becomes of the batch)
ODD = {
    "top-1": (32, 1, torch.float32, 6, None),
    "odd hidden size": (33, 2, torch.float32, 6, None),
    "one value": (1, 2, torch.float32, 6, None),
    "no tokens on rank 1": (32, 2, torch.float32, "not on rank 1", None),
    "tokens on rank 1 only": (32, 2, torch.float32, "on rank 1 only", None),
    "no tokens": (32, 2, torch.float32, 0, None),
    "one expert takes all": (32, 1, torch.float32, 9, "one expert"),
    "one expert of step3p5 takes all": (32, 1, torch.float32, 9, "one expert"),
    "not contiguous": (32, 2, torch.float32, 7, "strided"),
    "no expert": (32, 2, torch.float32, 7, "no expert"),
    "float64": (32, 2, torch.float64, 7, None),
    "bfloat16": (32, 4, torch.bfloat16, 7, None),
    "float16": (32, 4, torch.float16, 7, None),
    "32-bit weights of 16-bit states": (32, 4, torch.bfloat16, 7, "exact weights"),
    "every expert": (32, 8, torch.float32, 7, None),
}
ODD_MAPS = {**MAPS, "first rank": first_rank_map}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def odd_batches(case, num_ranks):
    hidden_size, top_k, dtype, num_tokens, change = ODD[case]
    batches = []
    for rank in range(num_ranks):
        count = {"not on rank 1": 5 * (rank != 1), "on rank 1 only": 5 * (rank == 1)}.get(num_tokens, num_tokens)
        hidden, ids, weights = batch_of(rank, hidden_size, count, top_k, dtype)
        if change == "one expert":
            ids = torch.full_like(ids, 5)
        elif change == "strided":
            hidden, ids, weights = (values.T.contiguous().T for values in (hidden, ids, weights))
            assert not hidden.is_contiguous()
        elif change == "no expert":
            ids = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(rank)) < 0.4, -1, ids)
            ids[0] = NUM_EXPERTS
        elif change == "exact weights":
            weights = weights.float()
        batches.append((hidden, ids, weights))
    return batches


def dense(experts, hidden, ids, weights):
    """Token by token, pick by pick, in the module's own words."""
    out = []
    for token in range(len(hidden)):
        total = hidden.new_zeros(hidden.shape[1], dtype=torch.promote_types(hidden.dtype, torch.float32))
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            if 0 <= expert < NUM_EXPERTS:
                state, one = hidden[token : token + 1], torch.ones_like(weight).view(1, 1).to(hidden.dtype)
                total = total + (experts(state, torch.tensor([[expert]]), one)[0] * weight).to(total.dtype)
        out.append(total)
    return torch.stack(out) if out else hidden * 0.0


def compare_odd(rank, _device, _arguments):
    """Each odd input with each map and mode: outputs, and gradients of inputs, routing weights and experts."""
    num_ranks = dist.get_world_size()
    found = {}
    for case, (hidden_size, top_k, dtype, _, _) in ODD.items():
        layer, spec = bare_experts(hidden_size, dtype, top_k, "step3p5" if "step3p5" in case else "olmoe")
        reference = copy.deepcopy(layer.experts)
        batches = odd_batches(case, num_ranks)
        leaves = [(h.detach().clone().requires_grad_(), i, w.detach().clone().requires_grad_()) for h, i, w in batches]
        outputs = [dense(reference, *leaf) for leaf in leaves]
        sum(out.float().square().sum() for out in outputs).backward()
        for map_name, make_map in ODD_MAPS.items():
            for mode, options in MODES.items():
                placement = make_map(spec, num_ranks, seed=5)
                [implementation] = built([layer], placement, Meter(), options=options)
                hidden, ids, weights = batches[rank]
                if ODD[case][-1] == "strided":
                    hidden, weights = (values.requires_grad_() for values in (hidden.detach(), weights.detach()))
                else:
                    hidden, weights = (values.detach().clone().requires_grad_() for values in (hidden, weights))
                out = implementation(hidden, ids, weights)
                assert out.dtype == dtype
                out.float().square().sum().backward()
                mine = implementation.slots.logical_of_rank[rank]
                parts = {
                    "out": (out, outputs[rank]),
                    "hidden": (hidden.grad, leaves[rank][0].grad),
                    "weights": (weights.grad, torch.zeros_like(weights) if not len(ids) else leaves[rank][2].grad),
                }
                for name, parameter in implementation.experts.named_parameters():
                    expected = dict(reference.named_parameters())[name].grad
                    if expected is not None:
                        parts[name] = (parameter.grad, expected[mine])
                    else:
                        parts[name] = (parameter.grad, torch.zeros_like(parameter))
                for name, (got, expected) in parts.items():
                    got, expected = got.detach(), expected.detach()
                    scale = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
                    difference = float((got.float() - expected.float()).abs().max()) if expected.numel() else 0.0
                    found[f"{case}, {map_name}, {mode}: {name}"] = difference / scale
                hidden.grad = weights.grad = None
    return {"found": found}


@pytest.fixture(scope="module", params=SIZES)
def odd(request):
    return run_on_ranks(compare_odd, request.param, {})


@pytest.mark.parametrize("case", ODD)
def test_odd_inputs_and_gradients_equal_a_dense_loop(odd, case):
    tolerance = TOLERANCE.get(ODD[case][2], 1e-5)
    for result in odd:
        found = {name: value for name, value in result["found"].items() if name.startswith(f"{case},")}
        assert len(found) == len(ODD_MAPS) * len(MODES) * 5
        assert all(value <= tolerance for value in found.values()), found


def slots_of_rank(rank, case):
    """Ordinary picks, all on one rank, none at all on other ranks, and some that go nowhere."""
    rng = np.random.default_rng((case, rank))
    if case == 0:
        return np.stack([rng.permutation(NUM_EXPERTS)[:3] for _ in range(20)])
    if case == 1:
        return np.tile([1, 0, 1], (5, 1))
    if case == 2:
        return np.empty((0, 3), dtype=np.int64) if rank else np.array([[0, 7, 3]])
    return rng.integers(-2, NUM_EXPERTS, (30, 3))


def index_and_walk(rank, _device, _arguments):
    num_ranks = dist.get_world_size()
    per_rank = NUM_EXPERTS // num_ranks
    route = make_route(dist.group.WORLD, num_ranks, hierarchical=False, wire_dtype=None, meter=Meter())
    route = route.with_slots(per_rank)
    for case in range(4):
        slots_TK = torch.from_numpy(slots_of_rank(rank, case))
        token = torch.arange(len(slots_TK)).repeat_interleave(3)
        [sizes] = plan_sizes(slots_TK, route)
        index = index_hop(Pairs(token, slots_TK.flatten(), torch.ones(slots_TK.numel())), route.hops[0], sizes)
        traffic = expected_traffic(slots_TK.tolist(), per_rank, num_ranks)
        assert index.row_sent.tolist() == [row for rows in traffic.rows_to for row in rows]
        assert sizes.rows.to == [len(rows) for rows in traffic.rows_to]
        assert sizes.pairs.to == [len(pairs) for pairs in traffic.pairs_to]
        pairs = [pair for of_rank in traffic.pairs_to for pair in of_rank]
        assert (index.codes >> 1).tolist() == [local for _, local in pairs]
        assert token[index.pair_sent].tolist() == [row for row, _ in pairs]
        starts = [[at > 0 and part[at][0] == part[at - 1][0] for at in range(len(part))] for part in traffic.pairs_to]
        assert (index.codes & 1).tolist() == [int(not same) for part in starts for same in part]
        for source, (rows, pairs) in enumerate(zip(sizes.rows.received, sizes.pairs.received, strict=True)):
            theirs = expected_traffic(slots_of_rank(source, case).tolist(), per_rank, num_ranks)
            assert (rows, pairs) == (len(theirs.rows_to[rank]), len(theirs.pairs_to[rank]))
    route = make_route(dist.group.WORLD, num_ranks // 2, hierarchical=True, wire_dtype=None, meter=Meter())
    of_a_mesh = dist.new_group()
    linear = PlacementMap.linear(bare_experts(32, torch.float32)[1], topology(num_ranks, per_rank))
    require_same(linear, Options(), of_a_mesh)
    for group in (dist.group.WORLD, of_a_mesh, *(hop.group for hop in route.hops)):
        assert group._get_backend(torch.device("cpu")).options._timeout == LONGEST_WAIT
    return {}


@pytest.mark.parametrize("num_ranks", SIZES)
def test_the_index_is_the_walks(num_ranks):
    run_on_ranks(index_and_walk, num_ranks, {})


@pytest.mark.parametrize("family", NOT_SERVED)
def test_other_families_are_refused_in_one_line(family):
    experts = find_moe_layers(tiny_model(family))[0].experts
    with pytest.raises(CoterieError, match="the runtime moves experts packed in weights"):
        local_experts(experts, [5, 2])


@pytest.mark.parametrize("family", sorted(set(CONFIGS) - set(NOT_SERVED)))
def test_local_experts_leave_the_original_alone(family):
    experts = find_moe_layers(tiny_model(family))[0].experts
    before = {name: parameter.clone() for name, parameter in experts.named_parameters()}
    local = local_experts(experts, [5, 2])
    assert local.num_experts == 2
    assert experts.num_experts >= 8
    for name, parameter in experts.named_parameters():
        assert torch.equal(parameter, before[name])
        if name in experts._parameters:  # what children hold, all experts share
            assert torch.equal(dict(local.named_parameters())[name], parameter[[5, 2]])


def test_maps_that_do_not_fit_are_refused():
    _, spec = bare_experts(32, torch.float32)
    placement = permutation_map(spec, 2, 0)
    for num_layers, num_ranks, message in (
        (1, 4, "for 2 ranks, this run has 4"),
        (2, 2, "has 1 MoE layers, the model 2"),
    ):
        with pytest.raises(CoterieError, match=message):
            require_fit(placement, num_layers, num_ranks)


def other_map_on_rank_one(rank, _device, _arguments):
    layer, spec = bare_experts(32, torch.float32)
    built([layer], permutation_map(spec, 2, seed=rank), Meter())
    return {}


def test_a_map_that_differs_between_ranks_is_refused():
    message = "rank 1 has the placement map [0-9a-f]{8}, rank 0 has [0-9a-f]{8}; give all"
    with pytest.raises(CoterieError, match=message):
        run_on_ranks(other_map_on_rank_one, 2, {})


def other_options_on_rank_one(rank, _device, _arguments):
    layer, spec = bare_experts(32, torch.float32)
    built([layer], permutation_map(spec, 2, seed=1), Meter(), options=Options("hierarchical" if rank else "flat"))
    return {}


def test_options_that_differ_between_ranks_are_refused():
    message = r"rank 1 has other options than rank 0, such as rank [01]'s Options\(mode=.*\); give all ranks the same"
    with pytest.raises(CoterieError, match=message):
        run_on_ranks(other_options_on_rank_one, 2, {})


def wire_in_16_bits(rank, _device, _arguments):
    layer, spec = bare_experts(32, torch.float32)
    hidden, ids, weights = batch_of(rank, 32, 40, 2, torch.float32)
    found = {}
    for name, dtype in (("exact", None), ("bfloat16", torch.bfloat16)):
        meter = Meter()
        [implementation] = built([layer], permutation_map(spec, 2, seed=1), meter, options=Options(wire_dtype=dtype))
        with torch.no_grad():
            out = implementation(hidden, ids, weights)
        difference = float((out - layer.experts(hidden, ids, weights)).abs().max().detach())
        found[name] = {"difference": difference / float(out.abs().max()), "bytes": meter.bytes_sent}
    return found


def test_bfloat16_on_the_wire_halves_the_rows():
    for result in run_on_ranks(wire_in_16_bits, 2, {}):
        assert result["exact"]["difference"] < 1e-5
        assert 1e-5 < result["bfloat16"]["difference"] < 2e-2
        assert result["bfloat16"]["bytes"] < 0.6 * result["exact"]["bytes"]


def train_copies(rank, _device, _arguments):
    """Three steps of plain descent: copies stay equal to the last bit, and equal to the single process's expert."""
    num_ranks = dist.get_world_size()
    layer, spec = bare_experts(32, torch.float32)
    reference = copy.deepcopy(layer.experts)
    placement = PlacementMap(spec, Topology(1, num_ranks, 8), np.tile(np.arange(8), num_ranks)[None], {"name": "all"})
    [implementation] = built([layer], placement, Meter())
    for step in range(3):
        batches = [batch_of(source, 32, 9, 2, torch.float32, seed=step) for source in range(num_ranks)]
        for module, run, part in (
            (reference, reference, batches),
            (implementation.experts, implementation, batches[rank : rank + 1]),
        ):
            module.zero_grad()
            sum(run(*batch).square().sum() for batch in part).backward()
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.1 * parameter.grad
    weights = {name: value.detach() for name, value in implementation.experts.named_parameters()}
    differences = [float((weights[name] - value).detach().abs().max()) for name, value in reference.named_parameters()]
    return {"difference": max(differences), "bits": [value.double().sum().item().hex() for value in weights.values()]}


@pytest.mark.parametrize("num_ranks", SIZES)
def test_copies_stay_alike_in_training(num_ranks):
    results = run_on_ranks(train_copies, num_ranks, {})
    assert all(result["difference"] < 1e-5 for result in results)
    assert len({tuple(result["bits"]) for result in results}) == 1
