"""`Topology`: the nodes, ranks and slots that experts are placed on, and `Links`: how fast they are.
Knows no model and no map.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from profiler.errors import CoterieError


@dataclass(frozen=True)
class Links:
    """How fast ranks exchange tokens and compute their experts: what they reach, not what data sheets promise.

    Attributes:
        name: of the preset, or what people call the cluster.
        rank_bandwidth: bytes/s into a rank from the other ranks of its node.
        network_bandwidth: bytes/s into a rank from other nodes, its share where ranks share a port.
        dispatch_startup: s, a dispatch of no tokens within a node.
        combine_startup: s, a combine of no tokens within a node.
        network_startup: s more for each of the two where there are several nodes.
        expert_startup: s, the experts' kernels on no tokens.
        flops: FLOP/s of the experts' matrix products with 16-bit weights.
        flops_8bit: the same with 8-bit weights.
        memory_bandwidth: bytes/s from a rank's own memory.
    """

    name: str
    rank_bandwidth: float
    network_bandwidth: float
    dispatch_startup: float
    combine_startup: float
    network_startup: float
    expert_startup: float
    flops: float
    flops_8bit: float
    memory_bandwidth: float

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise CoterieError(f"links.name {self.name!r}: must be text")
        for name, value in asdict(self).items():
            if name == "name":
                continue
            is_number = type(value) in (int, float) and math.isfinite(value)
            if not is_number or value < 0 or (value == 0 and not name.endswith("_startup")):
                unit = "seconds, 0 or more" if name.endswith("_startup") else "bytes or operations a second, above 0"
                raise CoterieError(f"links.{name} {value!r}: must be a number of {unit}")

    @classmethod
    def preset(cls, name: str) -> Links:
        """One of `PRESETS`.

        Raises:
            CoterieError: there is none of this name.
        """
        if name not in PRESETS:
            raise CoterieError(f"links {name!r}: not known; give one of {', '.join(PRESETS)}")
        return PRESETS[name]

    @classmethod
    def from_json(cls, value: object) -> Links:
        """Read what `Topology.to_json` wrote.

        Raises:
            CoterieError: a field is missing, unknown or not a fitting number.
        """
        expected = {field.name for field in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != expected:
            raise CoterieError(f"topology.links: must be an object with {', '.join(sorted(expected))}")
        return cls(**value)


@dataclass(frozen=True)
class Topology:
    """Where physical experts can live.

    Attributes:
        num_nodes: N, hosts.
        ranks_per_node: processes of the expert-parallel group on each host.
        slots_per_rank: positions for a physical expert on each rank.
        links: how fast the ranks are, needed to predict times; None where not known.
    """

    num_nodes: int
    ranks_per_node: int
    slots_per_rank: int
    links: Links | None = None

    def __post_init__(self) -> None:
        for name in ("num_nodes", "ranks_per_node", "slots_per_rank"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise CoterieError(f"topology.{name} {value!r}: must be a whole number of at least 1")

    @property
    def num_ranks(self) -> int:
        """R, over all nodes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def num_slots(self) -> int:
        """P, over all ranks."""
        return self.num_ranks * self.slots_per_rank

    @classmethod
    def for_experts(
        cls, num_experts: int, num_ranks: int, num_nodes: int = 1, num_redundant: int = 0, links: Links | None = None
    ) -> Topology:
        """As many slots on every rank as the experts need; where they do not divide, some slots stay empty.

        Args:
            num_redundant: copies beyond one of each expert.

        Raises:
            CoterieError: there are more ranks than experts, or the ranks do not divide by the nodes.
        """
        physical = num_experts + num_redundant
        if not 1 <= num_ranks <= physical:
            raise CoterieError(f"{num_ranks} ranks cannot share {physical} experts; give --ranks from 1 to {physical}")
        if num_redundant < 0 or num_redundant > num_experts * (num_ranks - 1):
            most = num_experts * (num_ranks - 1)
            raise CoterieError(
                f"{num_redundant} redundant experts: must be between 0 and {most}, a copy of each on every rank"
            )
        if num_nodes < 1 or num_ranks % num_nodes:
            raise CoterieError(f"{num_nodes} nodes cannot share {num_ranks} ranks equally; give --nodes a divisor")
        return cls(num_nodes, num_ranks // num_nodes, -(-physical // num_ranks), links)

    def to_json(self) -> dict[str, Any]:
        """The form in which placement maps hold it; without `links` where they are not known."""
        value = asdict(self)
        if self.links is None:
            del value["links"]
        return value

    @classmethod
    def from_json(cls, value: object) -> Topology:
        """Read what `to_json` wrote.

        Raises:
            CoterieError: a field is missing, unknown or not a positive whole number.
        """
        expected = {field.name for field in fields(cls)} - {"links"}
        if not isinstance(value, Mapping) or set(value) - {"links"} != expected:
            raise CoterieError(f"topology: must be an object with {', '.join(sorted(expected))}, and links if known")
        sizes: Mapping[str, Any] = {name: value[name] for name in expected}
        return cls(**sizes, links=Links.from_json(value["links"]) if "links" in value else None)


# Fit: printed by `python -m benchmarks.cost_model`, beside how far off predictions are, from measured times (DeepEP
# normal mode with 20 SMs and its handshake for dispatch and combine, SGLang's Triton kernel for experts, NCCL).
# Data sheet: NVIDIA's of the SXM module, without sparsity, each way.
_H100 = Links(
    name="h100",
    rank_bandwidth=254e9,  # fit; data sheet: NVLink 450e9
    network_bandwidth=39e9,  # fit on 2 and 4 nodes (on 8 it was a third to a half of that); ConnectX-7 port: 50e9
    dispatch_startup=27e-6,  # fit
    combine_startup=42e-6,  # fit
    network_startup=58e-6,  # fit
    expert_startup=33e-6,  # fit
    flops=207e12,  # fit; data sheet: bf16 989e12
    flops_8bit=573e12,  # fit; data sheet: fp8 1979e12
    memory_bandwidth=2.5e12,  # fit; data sheet: 3.35e12
)
_A100 = replace(
    _H100,  # what is not named here was measured on an H100 only
    name="a100",
    rank_bandwidth=154e9,  # fit to NCCL; data sheet: NVLink 300e9
    network_bandwidth=25e9 * 39 / 50,  # HDR InfiniBand port, 200 Gbit/s, as well used as an H100's
    dispatch_startup=14e-6,  # NCCL's of small messages
    combine_startup=14e-6,  # the same
    flops=312e12 * 207 / 989,  # data sheet: bf16 312e12, as well used as an H100's
    flops_8bit=624e12 * 573 / 1979,  # data sheet: int8 624e12, likewise
    memory_bandwidth=2.039e12 * 2.5 / 3.35,  # data sheet: 2.039e12 (80 GB), likewise
)
PRESETS = {
    links.name: links
    for links in (
        _H100,
        replace(  # fit to DeepEP's low-latency mode
            _H100,
            name="h100-low-latency",
            rank_bandwidth=226e9,
            network_bandwidth=47e9,
            dispatch_startup=12e-6,
            combine_startup=12e-6,
            network_startup=14e-6,
        ),
        # An H100 with fewer NVLinks (200e9). DeepEP's README has EP8 at 153 and 158e9, of which 7/8 leave a rank, and
        # EP32 and EP64 at 58, 57, 51 and 50e9, of which 3/4 and 7/8 leave a node; means of these.
        replace(_H100, name="h800", rank_bandwidth=136e9, network_bandwidth=44e9),
        _A100,
        # A100s behind a 25 Gbit/s port (IEEE 802.3by) a rank, as well used as an H100's; the start-up is a guess.
        replace(_A100, name="ethernet", network_bandwidth=25e9 / 8 * 39 / 50, network_startup=100e-6),
    )
}
"""Links by name: a cluster with one network port a rank, and the library that exchanges tokens on it."""
