"""`TokenTrace`: which experts each token picked. Knows neither models nor files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from profiler.errors import CoterieError
from profiler.spec import MoESpec

PREFILL = 0
"""In `TokenTrace.phase`: a token of a prompt."""

DECODE = 1
"""In `TokenTrace.phase`: a token that was generated."""

MAX_DOMAINS = 255
"""Domain labels are stored in 8 bits."""

Ids = npt.NDArray[np.unsignedinteger]


def ids_dtype(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """The narrowest type for expert ids that keeps its all-ones value free for "no expert"."""
    return np.uint8 if num_experts <= 255 else np.uint16


@dataclass(frozen=True)
class TokenTrace:
    """Which experts each token picked, in every MoE layer.

    Attributes:
        topk_ids: uint8 or uint16 (L, T, K), distinct logical experts of one token in one layer; all-ones where a pick
            went to no expert, such as a token that its expert had no room for.
        sequence_ids: int32 (T,), at least 0; tokens of one sequence share a number.
        domain_ids: uint8 (T,), index into the profile's domains.
        phase: uint8 (T,), 0 prefill, 1 decode.
        topk_weights: float16 (L, T, K), by which the picked experts' outputs are multiplied; None if not recorded.
    """

    topk_ids: Ids
    sequence_ids: npt.NDArray[np.int32]
    domain_ids: npt.NDArray[np.uint8]
    phase: npt.NDArray[np.uint8]
    topk_weights: npt.NDArray[np.float16] | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.topk_ids.shape[1])

    @property
    def picked(self) -> npt.NDArray[np.bool_]:
        """Which picks went to an expert, bool (L, T, K)."""
        mask: npt.NDArray[np.bool_] = self.topk_ids != np.iinfo(self.topk_ids.dtype).max
        return mask

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The arrays that there are, by name; the token is the second dimension of (L, T, K) and else the first."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: array for name, array in named.items() if array is not None}

    def where(self, keep_T: npt.NDArray[np.bool_] | npt.NDArray[np.int64] | slice) -> TokenTrace:
        """The tokens that a mask, positions or a slice keep."""
        return TokenTrace(
            **{name: array[:, keep_T] if array.ndim == 3 else array[keep_T] for name, array in self.arrays().items()}
        )

    def without_weights(self) -> TokenTrace:
        """The same tokens, ids only."""
        return replace(self, topk_weights=None)

    @staticmethod
    def concatenate(traces: Sequence[TokenTrace]) -> TokenTrace:
        """All tokens of several traces, in order; sequence numbers are taken as they are."""
        if len(traces) == 1:
            return traces[0]
        parts: list[Mapping[str, npt.NDArray[Any]]] = [trace.arrays() for trace in traces]
        assert len({frozenset(part) for part in parts}) == 1, "either all traces hold weights or none"
        return TokenTrace(
            **{
                name: np.concatenate([part[name] for part in parts], axis=1 if array.ndim == 3 else 0)
                for name, array in parts[0].items()
            }
        )

    def require(self, model: MoESpec, num_domains: int) -> None:
        """Check that the trace is one of this model and can be counted.

        Raises:
            CoterieError: a shape does not fit, an expert or a domain is out of range, or a token picked an expert
                twice; the message names the layer.
        """
        expected = (model.num_layers, self.num_tokens, model.top_k)
        if self.topk_ids.shape != expected:
            raise CoterieError(f"topk_ids {self.topk_ids.shape}: must be (layers, tokens, top-k) = {expected}")
        if self.topk_weights is not None and self.topk_weights.shape != expected:
            raise CoterieError(f"topk_weights {self.topk_weights.shape}: must have the shape of topk_ids, {expected}")
        if self.topk_ids.dtype != ids_dtype(model.num_experts):
            wanted = np.dtype(ids_dtype(model.num_experts))
            raise CoterieError(f"topk_ids {self.topk_ids.dtype}: must be {wanted} for {model.num_experts} experts")
        for name in ("sequence_ids", "domain_ids", "phase"):
            if getattr(self, name).shape != (self.num_tokens,):
                raise CoterieError(f"{name} {getattr(self, name).shape}: must be ({self.num_tokens},)")
        if self.num_tokens == 0:
            return
        if int(self.domain_ids.max()) >= num_domains:
            raise CoterieError(f"domain_ids: domain {int(self.domain_ids.max())}, must be below {num_domains}")
        if int(self.sequence_ids.min()) < 0:
            raise CoterieError(f"sequence_ids: sequence {int(self.sequence_ids.min())}, must be at least 0")
        for layer_id, ids_TK in zip(model.layer_ids, self.topk_ids, strict=True):
            token = _first_bad_token(ids_TK, model.num_experts, np.iinfo(ids_TK.dtype).max)
            if token >= 0:
                ids = ids_TK[token].tolist()
                highest = max((expert for expert in ids if expert != np.iinfo(ids_TK.dtype).max), default=0)
                if highest >= model.num_experts:
                    raise CoterieError(
                        f"topk_ids of layer {layer_id}: expert {highest}, must be below {model.num_experts}"
                    )
                raise CoterieError(
                    f"topk_ids of layer {layer_id}: token {token} picked {ids}, an expert twice; picks must differ"
                )

    def row_hashes(self) -> npt.NDArray[np.uint64]:
        """A number for what each token picked in all layers, uint64 (T,): equal picks, equal numbers."""
        return _row_hashes(self.topk_ids)


@numba.njit(cache=True, nogil=True)
def _first_bad_token(ids_TK: Ids, num_experts: int, no_expert: int) -> int:
    """The first token with an expert out of range or picked twice, -1 if there is none."""
    picked_last_by = np.full(num_experts, -1)
    for token in range(len(ids_TK)):
        for expert in ids_TK[token]:
            if expert == no_expert:
                continue
            if expert >= num_experts or picked_last_by[expert] == token:
                return token
            picked_last_by[expert] = token
    return -1


@numba.njit(cache=True, nogil=True)
def _row_hashes(ids_LTK: Ids) -> npt.NDArray[np.uint64]:
    """FNV-1a (Fowler, Noll, Vo) over each token's ids, layer after layer."""
    num_layers, num_tokens, top_k = ids_LTK.shape
    out = np.full(num_tokens, np.uint64(0xCBF29CE484222325))
    for layer in range(num_layers):
        for token in range(num_tokens):
            state = out[token]
            for k in range(top_k):
                state = (state ^ np.uint64(ids_LTK[layer, token, k])) * np.uint64(0x100000001B3)
            out[token] = state
    return out


SKETCH_SIZE = 1024
"""Rows that are counted at a time; one that more than 1 in 1,024 tokens has is never missed."""

ROW_IS_DUMMY_FROM = 0.01
"""Share of all tokens from which one row of picks is taken for dummy tokens."""

_PLENTY_OF_ROWS = 40.0  # bits


def has_plenty_of_rows(num_layers: int, num_experts: int, top_k: int) -> bool:
    """Whether a token can pick in so many ways that two of a text hardly ever pick the same."""
    return num_layers * math.log2(max(math.comb(num_experts, top_k), 1)) >= _PLENTY_OF_ROWS


@dataclass(frozen=True)
class RowSketch:
    """The commonest rows of a stream of tokens in constant memory: the counters of Misra and Gries (1982).

    A row that more than one token in 1,024 has is never missed; its count is at most that share of tokens too low.

    Attributes:
        hashes: uint64 (up to 1,024,), rows by `TokenTrace.row_hashes`.
        counts: int64, tokens seen with each.
    """

    hashes: npt.NDArray[np.uint64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def empty(cls) -> RowSketch:
        """Of no token."""
        return cls(np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64))

    def add(self, hashes_T: npt.NDArray[np.uint64]) -> RowSketch:
        """With more tokens."""
        new, new_counts = np.unique(hashes_T, return_counts=True)
        hashes, where = np.unique(np.concatenate([self.hashes, new]), return_inverse=True)
        counts = np.zeros(len(hashes), dtype=np.int64)
        np.add.at(counts, where, np.concatenate([self.counts, new_counts]))
        if len(hashes) > SKETCH_SIZE:
            counts -= np.partition(counts, -SKETCH_SIZE - 1)[-SKETCH_SIZE - 1]
        return RowSketch(hashes[counts > 0], counts[counts > 0])

    def dummy_tokens(self, model: MoESpec, num_tokens: int) -> int:
        """Tokens whose picks are the same in every layer as those of at least 1% of all tokens.

        Text does not do that where there are many ways to pick; warm-up passes, padding without a mask and dummy
        batches do.  0 where the model has so few ways to pick that chance could.
        """
        return int(self.counts[self._is_dummy(model, num_tokens)].sum())

    def dummy_rows(self, model: MoESpec, num_tokens: int) -> npt.NDArray[np.uint64]:
        """The rows that `dummy_tokens` counts, by `TokenTrace.row_hashes`, ascending."""
        return self.hashes[self._is_dummy(model, num_tokens)]

    def _is_dummy(self, model: MoESpec, num_tokens: int) -> npt.NDArray[np.bool_]:
        mask: npt.NDArray[np.bool_] = self.counts >= max(2, ROW_IS_DUMMY_FROM * num_tokens)
        return mask & has_plenty_of_rows(model.num_layers, model.num_experts, model.top_k)
