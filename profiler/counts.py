"""Counts of a routing trace: how often experts are picked, alone, together and one layer after another.

All grow with the picked pairs, T*K or T*K*K, never with T*E*E: two experts that no token picks cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from profiler.spec import MoESpec
from profiler.trace import Ids, TokenTrace

Int64s = npt.NDArray[np.int64]


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
        ids, domains = trace.topk_ids, trace.domain_ids
        no_expert = np.iinfo(ids.dtype).max
        np.add.at(self._tokens, domains, 1)
        for layer in range(len(ids)):
            _count_layer(ids[layer], domains, no_expert, self._load[:, layer], self._ordered[:, layer])
            if layer:
                _count_transition(ids[layer - 1], ids[layer], domains, no_expert, self._transition[:, layer - 1])

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
def _count_layer(ids_TK: Ids, domain_T: Ids, no_expert: int, load_DE: Int64s, ordered_DEE: Int64s) -> None:
    num_tokens, top_k = ids_TK.shape
    for token in range(num_tokens):
        domain = domain_T[token]
        for first in range(top_k):
            a = ids_TK[token, first]
            if a == no_expert:
                continue
            load_DE[domain, a] += 1
            for second in range(first + 1, top_k):
                b = ids_TK[token, second]
                if b != no_expert:
                    ordered_DEE[domain, a, b] += 1


@numba.njit(cache=True, nogil=True)
def _count_transition(from_TK: Ids, to_TK: Ids, domain_T: Ids, no_expert: int, transition_DEE: Int64s) -> None:
    num_tokens, top_k = from_TK.shape
    for token in range(num_tokens):
        domain = domain_T[token]
        for first in range(top_k):
            a = from_TK[token, first]
            if a == no_expert:
                continue
            for second in range(top_k):
                b = to_TK[token, second]
                if b != no_expert:
                    transition_DEE[domain, a, b] += 1
