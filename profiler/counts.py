"""Counts of a routing trace: how often experts are picked, alone, together and one layer after another.

All three grow with the picked pairs, T*K or T*K*K, never with T*E*E.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IdsLTK = npt.NDArray[np.unsignedinteger]
CountsLE = npt.NDArray[np.int64]
CountsLEE = npt.NDArray[np.int64]


def load(topk_ids_LTK: IdsLTK, num_experts: int) -> CountsLE:
    """Tokens that picked each expert, int64 (L, E). Each row sums to K*T."""
    return np.stack([np.bincount(layer.ravel(), minlength=num_experts) for layer in topk_ids_LTK]).astype(np.int64)


def coactivation(topk_ids_LTK: IdsLTK, num_experts: int) -> CountsLEE:
    """Tokens that picked both experts of a pair in one layer, int64 (L, E, E), symmetric with zero diagonal.

    Each row sums to (K-1) times that expert's load.
    """
    top_k = topk_ids_LTK.shape[2]
    out = np.zeros((len(topk_ids_LTK), num_experts, num_experts), dtype=np.int64)
    for layer, ids_TK in enumerate(topk_ids_LTK.astype(np.int64)):
        for first in range(top_k):
            for second in range(first + 1, top_k):
                out[layer] += _pair_counts(ids_TK[:, first], ids_TK[:, second], num_experts)
    return out + out.transpose(0, 2, 1)


def transition(topk_ids_LTK: IdsLTK, num_experts: int) -> CountsLEE:
    """Tokens that picked the row's expert in one MoE layer and the column's in the next, int64 (L-1, E, E)."""
    top_k = topk_ids_LTK.shape[2]
    ids = topk_ids_LTK.astype(np.int64)
    out = np.zeros((max(len(ids) - 1, 0), num_experts, num_experts), dtype=np.int64)
    for layer in range(len(ids) - 1):
        for first in range(top_k):
            for second in range(top_k):
                out[layer] += _pair_counts(ids[layer, :, first], ids[layer + 1, :, second], num_experts)
    return out


def _pair_counts(rows: npt.NDArray[np.int64], columns: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    return np.bincount(rows * size + columns, minlength=size * size).reshape(size, size)
