"""Counts of a routing trace: how often experts are picked, alone, together and one layer after another. Knows no files.

All grow with the picked pairs, T*K or T*K*K, never with T*E*E: two experts that no token picks cost nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from profiler.spec import MoESpec
from profiler.trace import Ids, TokenTrace

Int64s = npt.NDArray[np.int64]

TOKENS_WORTH_THREADS = 8_192
"""Fewer are counted sooner than threads are started."""


@dataclass(frozen=True)
class Counts:
    """Exact counts over all tokens of each of D domains.

    Attributes:
        tokens: int64 (D,).
        load: int64 (D, L, E), tokens that picked each expert.
        coactivation: int64 (D, L, E, E), tokens that picked both, symmetric with zero diagonal.
        transition: int64 (D, L-1, E, E), tokens that picked the row's expert in one MoE layer and the column's in the
            next one.
    """

    tokens: Int64s
    load: Int64s
    coactivation: Int64s
    transition: Int64s

    def arrays(self) -> dict[str, Int64s]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def of_domains(self, domains: list[int]) -> Counts:
        """Of some domains only, in the given order."""
        return Counts(**{name: array[domains] for name, array in self.arrays().items()})


class Tally:
    """Counts in the making: memory does not grow with the tokens that are added."""

    def __init__(self, model: MoESpec, num_domains: int) -> None:
        """All zero."""
        domains, layers, experts = num_domains, model.num_layers, model.num_experts
        self._tokens = np.zeros(domains, dtype=np.int64)
        self._load = np.zeros((domains, layers, experts), dtype=np.int64)
        self._ordered = np.zeros((domains, layers, experts, experts), dtype=np.int64)  # each pair in the order picked
        self._transition = np.zeros((domains, max(layers - 1, 0), experts, experts), dtype=np.int64)

    def add(self, trace: TokenTrace) -> None:
        """Count more tokens; the trace must have passed `TokenTrace.require`."""
        domains = np.unique(trace.domain_ids).tolist()
        for domain in domains:
            ids = trace.topk_ids if len(domains) == 1 else trace.topk_ids[:, trace.domain_ids == domain]
            self._tokens[domain] += ids.shape[1]
            sums = self._load[domain], self._ordered[domain], self._transition[domain]
            count_layer = partial(_count_layer, ids, np.iinfo(ids.dtype).max, *sums)
            if ids.shape[1] < TOKENS_WORTH_THREADS:
                for layer in range(len(ids)):
                    count_layer(layer)
            else:
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    list(pool.map(count_layer, range(len(ids))))

    def add_counts(self, counts: Counts, domains: list[int]) -> None:
        """Add what was counted elsewhere; its domain d is domain `domains[d]` here."""
        for own, other in zip(domains, range(len(counts.tokens)), strict=True):
            self._tokens[own] += counts.tokens[other]
            self._load[own] += counts.load[other]
            self._ordered[own] += np.triu(counts.coactivation[other])
            self._transition[own] += counts.transition[other]

    def counts(self) -> Counts:
        """What has been counted so far, copied."""
        together = self._ordered + self._ordered.swapaxes(2, 3)
        return Counts(self._tokens.copy(), self._load.copy(), together, self._transition.copy())

    def state(self) -> dict[str, Int64s]:
        """The arrays to go on from, not copied."""
        return {
            "tokens": self._tokens,
            "load": self._load,
            "ordered": self._ordered,
            "transition": self._transition,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        for name, array in self.state().items():
            array[...] = state[name]


def count(trace: TokenTrace, model: MoESpec, num_domains: int) -> Counts:
    """Counts of one trace that is in memory."""
    tally = Tally(model, num_domains)
    tally.add(trace)
    return tally.counts()


@numba.njit(cache=True, nogil=True)
def _count_layer(
    ids_LTK: Ids, no_expert: int, load_LE: Int64s, ordered_LEE: Int64s, transition_LEE: Int64s, layer: int
) -> None:
    _, num_tokens, top_k = ids_LTK.shape
    num_experts = load_LE.shape[1]
    # Half as wide as the sums, so that they stay in the fastest memory.
    pairs = np.zeros((num_experts, num_experts), np.uint32)
    onward = np.zeros((num_experts, num_experts), np.uint32)
    for token in range(num_tokens):
        for first in range(top_k):
            a = ids_LTK[layer, token, first]
            if a == no_expert:
                continue
            load_LE[layer, a] += 1
            for second in range(first + 1, top_k):
                b = ids_LTK[layer, token, second]
                if b != no_expert:
                    pairs[a, b] += np.uint32(1)
            if layer:
                for second in range(top_k):
                    b = ids_LTK[layer - 1, token, second]
                    if b != no_expert:
                        onward[b, a] += np.uint32(1)
    ordered_LEE[layer] += pairs
    if layer:
        transition_LEE[layer - 1] += onward
