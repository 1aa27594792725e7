"""`Topology`: the nodes, ranks and slots that experts are placed on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from profiler.errors import CoterieError


@dataclass(frozen=True)
class Topology:
    """Where physical experts can live.

    Attributes:
        num_nodes: N, hosts.
        ranks_per_node: processes of the expert-parallel group on each host.
        slots_per_rank: positions for a physical expert on each rank.
    """

    num_nodes: int
    ranks_per_node: int
    slots_per_rank: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
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
    def for_experts(cls, num_experts: int, num_ranks: int, num_nodes: int = 1) -> Topology:
        """One slot for each expert, the same number on every rank.

        Raises:
            CoterieError: the experts do not divide by the ranks, or the ranks by the nodes.
        """
        if num_ranks < 1 or num_experts % num_ranks:
            fitting = ", ".join(str(ranks) for ranks in range(1, num_experts + 1) if num_experts % ranks == 0)
            raise CoterieError(
                f"{num_ranks} ranks cannot share {num_experts} experts equally; give --ranks one of {fitting}"
            )
        if num_nodes < 1 or num_ranks % num_nodes:
            raise CoterieError(f"{num_nodes} nodes cannot share {num_ranks} ranks equally; give --nodes a divisor")
        return cls(num_nodes, num_ranks // num_nodes, num_experts // num_ranks)

    def to_json(self) -> dict[str, int]:
        """The form in which placement maps hold it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Topology:
        """Read what `to_json` wrote.

        Raises:
            CoterieError: a field is missing, unknown or not a positive whole number.
        """
        expected = set(cls.__dataclass_fields__)
        if not isinstance(value, Mapping) or set(value) != expected:
            raise CoterieError(f"topology: must be an object with {', '.join(sorted(expected))}")
        fields: Mapping[str, Any] = value
        return cls(**fields)
