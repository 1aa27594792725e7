"""Seconds and bytes of each phase of a layer call, counted where they are spent."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

PHASES = ("dispatch", "expert", "combine")


@dataclass
class Meter:
    """Running totals of one rank since the last `reset`.

    Attributes:
        seconds: wall time of each phase; waiting for other ranks is part of it.
        bytes_sent: payload and indices sent to other ranks; what a rank keeps for itself is not counted.
        rows_sent: token copies sent to any rank, its own included.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    bytes_sent: int = 0
    rows_sent: int = 0

    def reset(self) -> None:
        """Start from zero."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.bytes_sent = self.rows_sent = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to one phase; waits for the accelerator where there is one."""
        _synchronize()
        started = time.perf_counter()
        yield
        _synchronize()
        self.seconds[name] += time.perf_counter() - started

    def count_sent(self, tensor: torch.Tensor, rows_to: list[int], rank: int) -> None:
        """Count the bytes of a tensor's rows, `rows_to[r]` of them sent to rank r."""
        elements_per_row = tensor[:1].numel() if len(tensor) else 0
        self.bytes_sent += (sum(rows_to) - rows_to[rank]) * elements_per_row * tensor.element_size()


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
