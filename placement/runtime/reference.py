"""The slow, obvious account of one dispatch: what the exchange must send, token by token, on one process.
Knows neither torch nor the exchange that tests hold against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ExpectedTraffic:
    """For one source rank: tokens in the order in which each rank gets them, and (token, local slot) pairs likewise."""

    rows_to: list[list[int]]
    pairs_to: list[list[tuple[int, int]]]


def expected_traffic(slots_TK: Sequence[Sequence[int]], slots_per_rank: int, num_ranks: int) -> ExpectedTraffic:
    """Walk over the tokens and their picks in order; a negative slot serves nothing."""
    rows_to: list[list[int]] = [[] for _ in range(num_ranks)]
    pairs_to: list[list[tuple[int, int]]] = [[] for _ in range(num_ranks)]
    for token, slots in enumerate(slots_TK):
        for slot in slots:
            if slot < 0:
                continue
            rank, local = divmod(slot, slots_per_rank)
            if not rows_to[rank] or rows_to[rank][-1] != token:
                rows_to[rank].append(token)
            pairs_to[rank].append((token, local))
    return ExpectedTraffic(rows_to, pairs_to)
