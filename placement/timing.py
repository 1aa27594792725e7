"""`predicted_time`: how long dispatch, experts and combine of a layer take on a topology with known links.
Knows of traffic only what `cost.py` counted.

The model is latency plus volume over speed, each at its busiest place:

    dispatch = startup + max(rows into the busiest rank from its node * bytes / rank bandwidth,
                             rows into the busiest rank or node from other nodes * bytes / network bandwidth)
    combine  = the same with its own start-up and width, since every row goes back
    expert   = startup + max(operations / FLOPs, weights / memory bandwidth) + activations / memory bandwidth

Tokens start on all ranks alike. Once per rank ("per-rank"), a token crosses the network once for each node that it
touches, into that node's ports together, and is handed on inside; once per expert ("per-expert"), every (token, expert)
pair goes straight to its rank through the port of that rank.

What it ignores: where tokens start if not everywhere alike, overlap with computation or of two batches, congestion and
the number of nodes (speeds do not fall with it), how picks spread over the experts of a rank (tiles that are not full,
experts that nobody picks), a fixed time per row, the router, layout and quantization kernels, shared experts, and all
that is outside the MoE layer. `benchmarks/cost_model.py` measures how far off it is. Ratios of two plans on one cluster
are safer than seconds, since they share most of these errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from placement.layer_problem import Objective
from placement.topology import Links, Topology
from profiler.errors import CoterieError
from profiler.spec import MoESpec

if TYPE_CHECKING:
    from placement.cost import Metrics
    from placement.placement_map import PlacementMap

Floats = npt.NDArray[np.float64]

Mode = Literal["per-rank", "per-expert"]
"""How an engine sends a token: once to each rank that serves it, or once for each of its experts."""

FP8_WIDTH = 1 + 4 / 128
"""Bytes of an 8-bit value and its share of the float32 scale of 128 of them, as DeepEP dispatches them."""
BF16_WIDTH = 2.0
"""Bytes of a 16-bit value."""
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
"""Bytes of a weight by torch's name of its type."""


MOST_TOKENS = 2**40
"""On a rank at a time; far more than any memory holds, and little enough to calculate with."""


@dataclass(frozen=True)
class Workload:
    """What a layer is given at a time, and how the engine sends it.

    Attributes:
        tokens_per_rank: n, tokens that start on each rank.
        mode: "per-rank" if a token is sent once to each rank that serves it (DeepEP normal mode, Occult, this
            project's runtime), "per-expert" if once for each expert (Megatron and transformers all-to-all, DeepEP low
            latency).
        dispatch_width: bytes of a value on the way there.
        combine_width: bytes of a value on the way back.
    """

    tokens_per_rank: int
    mode: Mode = "per-rank"
    dispatch_width: float = FP8_WIDTH
    combine_width: float = BF16_WIDTH

    def __post_init__(self) -> None:
        if not 1 <= self.tokens_per_rank <= MOST_TOKENS:
            raise CoterieError(f"tokens_per_rank {self.tokens_per_rank}: must be from 1 to {MOST_TOKENS}")
        if self.mode not in ("per-rank", "per-expert"):
            raise CoterieError(f"mode {self.mode!r}: must be per-rank or per-expert")
        for name in ("dispatch_width", "combine_width"):
            if not getattr(self, name) > 0:
                raise CoterieError(f"{name} {getattr(self, name)}: must be above 0 bytes; 1 for fp8, 2 for bf16")


@dataclass(frozen=True)
class LayerTime:
    """Seconds of each layer; float64 (L,) each."""

    dispatch: Floats
    expert: Floats
    combine: Floats

    @property
    def total(self) -> Floats:
        """float64 (L,), one after the other."""
        return self.dispatch + self.expert + self.combine


def predicted_time(
    ingress_LR: Floats,
    node_ingress_LN: Floats,
    load_LR: Floats,
    spec: MoESpec,
    topology: Topology,
    workload: Workload,
) -> LayerTime:
    """Predict each layer's time from what a plan does to it.

    Args:
        ingress_LR: share of all tokens that each rank serves, as in `Metrics.ingress`.
        node_ingress_LN: share of all tokens that some rank of each node serves, wherever they start.
        load_LR: (token, expert) pairs that each rank serves / all tokens; a row's sum is top_k.

    Raises:
        CoterieError: sizes of the model or links of the topology are not known.
    """
    links, row_values, weight_bytes = _known(spec, topology)
    within, across = _busiest_rows(ingress_LR, node_ingress_LN, load_LR, topology, workload)
    several = topology.num_nodes > 1
    dispatch, combine = (
        exchange_seconds(links, within, across, row_values * width, startup + several * links.network_startup)
        for width, startup in (
            (workload.dispatch_width, links.dispatch_startup),
            (workload.combine_width, links.combine_startup),
        )
    )
    num_tokens = workload.tokens_per_rank * topology.num_ranks
    rows = num_tokens * load_LR.max(axis=1)
    sizes = spec.hidden_size, spec.expert_size, weight_bytes
    active = active_share(spec, num_tokens) * topology.slots_per_rank
    expert = product_seconds(links, rows, active, *sizes) + activation_seconds(links, rows, *sizes[:2])
    return LayerTime(dispatch, expert, combine)


def has_times(spec: MoESpec, topology: Topology) -> bool:
    """Whether links, sizes and the width of weights are known, which times need."""
    return bool(topology.links and spec.hidden_size and spec.expert_size and spec.dtype in WEIGHT_BYTES)


def time_of(placement: PlacementMap, metrics: Metrics, workload: Workload) -> LayerTime | None:
    """The predicted time of each layer; None where it has none, see `has_times`."""
    model, topology = placement.model, placement.topology
    if not has_times(model, topology):
        return None
    # Pairs over tokens: what no expert takes is no load.
    load_LR = metrics.load_share * model.top_k * metrics.picked_share[:, None]
    return predicted_time(metrics.ingress, metrics.node_ingress, load_LR, model, topology, workload)


def linear_costs(spec: MoESpec, topology: Topology, workload: Workload) -> Objective:
    """The slope of `predicted_time` where load is equal and experts are picked independently of one another.

    A search that minimises their weighted sum minimises the time, as long as what is busiest stays so: an exchange has
    a slope only in the one of its two links that bounds it there, and the experts' products only where computing them
    takes longer than reading their weights.

    Once per expert only the load has costs.

    Returns:
        Seconds per `busiest_ingress`, per share of tokens that touch the busiest node, and per `imbalance_ratio`.

    Raises:
        CoterieError: sizes of the model or links of the topology are not known.
    """
    links, row_values, weight_bytes = _known(spec, topology)
    num_tokens = workload.tokens_per_rank * topology.num_ranks
    load = spec.top_k / topology.num_ranks
    within, across = (
        float(rows[0])
        for rows in _busiest_rows(
            np.array([[touching_share(spec, topology.num_ranks)]]),
            np.array([[touching_share(spec, topology.num_nodes)]]),
            np.array([[load]]),
            topology,
            workload,
        )
    )
    width = row_values * (workload.dispatch_width + workload.combine_width)
    bound_within = within / links.rank_bandwidth >= across / links.network_bandwidth
    bound_within_s = within * width / links.rank_bandwidth if bound_within else 0.0
    bound_across_s = 0.0 if bound_within else across * width / links.network_bandwidth
    rows = num_tokens * load
    sizes = spec.hidden_size, spec.expert_size
    compute = float(_operations(rows, *sizes) / _flops(links, weight_bytes))
    reading = _weights(active_share(spec, num_tokens) * topology.slots_per_rank, *sizes, weight_bytes)
    expert_s = float(activation_seconds(links, rows, *sizes))
    if compute >= reading / links.memory_bandwidth:
        expert_s += compute
    # Every part is proportional to its share, so that its slope is its value over the share.
    if workload.mode == "per-expert":
        return Objective(load=expert_s + bound_within_s + bound_across_s)
    return Objective(
        ingress=bound_within_s / touching_share(spec, topology.num_ranks),
        node_ingress=bound_across_s / touching_share(spec, topology.num_nodes),
        load=expert_s,
    )


def touching_share(spec: MoESpec, num_places: int) -> float:
    """Share of tokens that touch one of so many places with equally many experts, if all sets of top_k are as likely.

    Hypergeometric: one less the share of sets without an expert of the place.
    """
    elsewhere = spec.num_experts * (1 - 1 / num_places)
    picks = np.arange(spec.top_k)
    return 1 - float(np.prod(np.maximum(elsewhere - picks, 0) / (spec.num_experts - picks)))


def active_share(spec: MoESpec, num_tokens: int) -> float:
    """Share of the experts that any of so many tokens picks, if tokens pick independently: others are not read."""
    return 1 - (1 - spec.top_k / spec.num_experts) ** num_tokens


def exchange_seconds(links: Links, within: Floats, across: Floats, row_bytes: float, startup: float) -> Floats:
    """Seconds in which rows reach the busiest rank: `within` from its node, `across` from other nodes, at once."""
    volume: Floats = np.maximum(within / links.rank_bandwidth, across / links.network_bandwidth) * row_bytes
    return startup + volume


def product_seconds(
    links: Links,
    rows: Floats,
    active_experts: Floats | float,
    hidden_size: Floats | int,
    expert_size: Floats | int,
    weight_bytes: int,
) -> Floats:
    """Seconds of the gate, up and down projections of (token, expert) rows, or of reading their weights."""
    compute = _operations(rows, hidden_size, expert_size) / _flops(links, weight_bytes)
    reading = _weights(active_experts, hidden_size, expert_size, weight_bytes) / links.memory_bandwidth
    slower: Floats = np.maximum(compute, reading)
    return links.expert_startup + slower


def activation_seconds(
    links: Links, rows: Floats | float, hidden_size: Floats | int, expert_size: Floats | int
) -> Floats:
    """Seconds of moving what the projections of (token, expert) rows hand on, in values of 2 bytes.

    Two of hidden size (an output, written and read for the weighted sum), three of expert size (gate, up, product).
    """
    return np.asarray(rows * (4 * hidden_size + 6 * expert_size) / links.memory_bandwidth)


def _busiest_rows(
    ingress_LR: Floats, node_ingress_LN: Floats, load_LR: Floats, topology: Topology, workload: Workload
) -> tuple[Floats, Floats]:
    """Rows into the busiest rank from its own node and from other nodes, float64 (L,) each."""
    num_nodes, ranks_per_node, num_ranks = topology.num_nodes, topology.ranks_per_node, topology.num_ranks
    tokens = workload.tokens_per_rank
    if workload.mode == "per-expert":
        load = load_LR.max(axis=1)
        return tokens * (ranks_per_node - 1) * load, tokens * (num_ranks - ranks_per_node) * load
    # What comes from other nodes is spread over the node's ports and handed on within it.
    within = tokens * num_ranks * (ranks_per_node - 1) / ranks_per_node * ingress_LR.max(axis=1)
    across = tokens * num_ranks * (num_nodes - 1) / num_nodes / ranks_per_node * node_ingress_LN.max(axis=1)
    return within, across


def _known(spec: MoESpec, topology: Topology) -> tuple[Links, int, int]:
    """Links, values in a row and bytes of a weight."""
    for name in ("hidden_size", "expert_size"):
        if getattr(spec, name) < 1:
            flag = "--" + name.replace("_", "-")
            raise CoterieError(
                f"{name} {getattr(spec, name)} (not known): a time needs at least 1; give {flag} to "
                "`coterie import numpy`"
            )
    if spec.dtype not in WEIGHT_BYTES:
        raise CoterieError(f"dtype {spec.dtype!r}: a time needs the width of weights, one of {', '.join(WEIGHT_BYTES)}")
    if topology.links is None:
        raise CoterieError("topology.links: not given, a time needs them; plan with the links of the cluster")
    return topology.links, spec.hidden_size, WEIGHT_BYTES[spec.dtype]


def _operations(rows: Floats | float, hidden_size: Floats | int, expert_size: Floats | int) -> Floats | float:
    return 6 * rows * hidden_size * expert_size  # three projections, a multiplication and an addition each


def _weights(
    experts: Floats | float, hidden_size: Floats | int, expert_size: Floats | int, weight_bytes: int
) -> Floats | float:
    return 3 * experts * hidden_size * expert_size * weight_bytes


def _flops(links: Links, weight_bytes: int) -> float:
    return links.flops_8bit if weight_bytes == 1 else links.flops * 2 / weight_bytes
