"""Seconds, bytes, rows and pairs of layer calls, counted where they are spent. Knows nothing of maps or models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

PHASES = ("dispatch", "expert", "combine")
"""Of a layer call, in order."""


@dataclass
class Meter:
    """Running totals of one rank since the last `reset`; wall times include waiting for other ranks.

    Attributes:
        seconds: of each phase of the forward pass, call by call.
        index_seconds: the part of dispatch that finds out which rank serves what and how much to expect, but for the
            exchange of these figures.
        bytes_sent: payload and indices sent to other ranks, gradients too; what a rank keeps is not counted.
        network_bytes_sent: the part of it that went to other nodes.
        rows_sent: rows sent to any rank, its own included; with two hops, those of the last.
        rows_away: rows sent to other ranks, on every hop.
        network_rows: the part of them that went to other nodes.
        rows_served: rows that this rank received to run its experts on.
        pairs_served: (token, expert) pairs that it ran.
        align: called before each phase; where ranks wait for each other there, a phase is not charged with what others
            did before it.
    """

    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})
    index_seconds: float = 0.0
    bytes_sent: int = 0
    network_bytes_sent: int = 0
    rows_sent: int = 0
    rows_away: int = 0
    network_rows: int = 0
    rows_served: int = 0
    pairs_served: int = 0
    align: Callable[[], None] | None = None

    def reset(self) -> None:
        """Start from zero."""
        self.seconds = {name: [] for name in PHASES}
        self.index_seconds = 0.0
        self.bytes_sent = self.network_bytes_sent = 0
        self.rows_sent = self.rows_away = self.network_rows = self.rows_served = self.pairs_served = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Take down the time spent inside one phase; waits for the accelerator where there is one."""
        _synchronize()
        if self.align is not None:
            self.align()
        started = time.perf_counter()
        yield
        _synchronize()
        self.seconds[name].append(time.perf_counter() - started)

    @contextmanager
    def indexing(self) -> Iterator[None]:
        """Add the time spent inside to `index_seconds`; does not wait for an accelerator."""
        started = time.perf_counter()
        yield
        self.index_seconds += time.perf_counter() - started

    def count_rows(self, rows_to: Sequence[int], member: int, across_nodes: Sequence[bool]) -> None:
        """Count rows that one hop sends, `rows_to[m]` to each member m of a group by one of them."""
        self.rows_away += sum(rows_to) - rows_to[member]
        self.network_rows += sum(rows for rows, far in zip(rows_to, across_nodes, strict=True) if far)

    def count_served(self, rows_sent: int, rows_served: int, pairs_served: int) -> None:
        """Count the rows that a layer call sent and received in all, and the pairs that it ran."""
        self.rows_sent += rows_sent
        self.rows_served += rows_served
        self.pairs_served += pairs_served

    def count_sent(self, rows_to: Sequence[int], row_bytes: int, member: int, across_nodes: Sequence[bool]) -> None:
        """Count rows of so many bytes, `rows_to[m]` of them sent to each member m of a group by one of them."""
        self.bytes_sent += (sum(rows_to) - rows_to[member]) * row_bytes
        self.network_bytes_sent += sum(rows for rows, far in zip(rows_to, across_nodes, strict=True) if far) * row_bytes


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
