"""Parts of the sequences that pick other experts than each other.  Knows neither objective nor plan."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array, csr_array
from scipy.sparse.linalg import LinearOperator, svds

from profiler.trace import TokenTrace

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

LAYERS_READ = 8
"""What a sequence is about shows in a few layers, spread evenly over the model."""


def folds_by_picks(tokens: TokenTrace, halvings: int) -> Ints:
    """Halve the sequences again and again where they differ most.

    A sequence is described by the roots of the shares of its picks that go to each expert, so that distances are
    Hellinger's, in which rare experts and frequent ones count alike.  The sequences of a part are ordered along their
    first principal axis, tokens counting alike, and cut where half of the tokens lie on either side.

    Args:
        halvings: a part that is one sequence, or mostly one, is not halved.

    Returns:
        The part of each token, int64 (T,), 0 to 2^halvings - 1 at most; none is empty.
    """
    _, sequence_T = np.unique(tokens.sequence_ids, return_inverse=True)
    shares = _shares(tokens, sequence_T)
    num_tokens = np.bincount(sequence_T).astype(np.float64)
    parts = [np.arange(len(num_tokens))]
    for _ in range(halvings):
        parts = [half for part in parts for half in _halves(shares[part], num_tokens[part], part)]
    part_of = np.empty(len(num_tokens), dtype=np.int64)
    for number, part in enumerate(parts):
        part_of[part] = number
    return part_of[sequence_T]


def _shares(tokens: TokenTrace, sequence_T: Ints) -> csr_array:
    """Roots of the shares of each sequence's picks, float64 (sequences, layers read times experts)."""
    layers = np.unique(np.linspace(0, len(tokens.topk_ids) - 1, LAYERS_READ).round().astype(np.int64))
    no_expert = int(np.iinfo(tokens.topk_ids.dtype).max)
    rows, columns = [], []
    for place, layer in enumerate(layers):
        ids_TK = tokens.topk_ids[layer]
        picked = ids_TK != no_expert
        rows.append(np.repeat(sequence_T, picked.sum(axis=1)))
        columns.append(place * no_expert + ids_TK[picked].astype(np.int64))
    row, column = np.concatenate(rows), np.concatenate(columns)
    picks = np.maximum(np.bincount(row, minlength=int(sequence_T.max()) + 1), 1)
    counts = coo_array((1.0 / picks[row], (row, column)), shape=(len(picks), len(layers) * no_expert)).tocsr()
    return counts.sqrt()


def _halves(shares: csr_array, num_tokens: Floats, part: Ints) -> list[Ints]:
    """The part in two, or as it is."""
    if len(part) < 2:
        return [part]
    order = np.argsort(_first_axis(shares, num_tokens), kind="stable")
    middle = np.cumsum(num_tokens[order]) - num_tokens[order] / 2
    left = middle < num_tokens.sum() / 2
    halves = [part[order[left]], part[order[~left]]]
    return halves if min(map(len, halves)) else [part]


def _first_axis(shares: csr_array, num_tokens: Floats) -> Floats:
    """Where each sequence lies on the axis along which sequences differ most, float64 (sequences,); all 0 if alike."""
    mean = (num_tokens @ shares) / num_tokens.sum()
    weight = np.sqrt(num_tokens)

    def forth(axis: Floats) -> Floats:
        out: Floats = weight * (shares @ axis.ravel() - mean @ axis.ravel())
        return out

    def back(places: Floats) -> Floats:
        weighted = weight * places.ravel()
        out: Floats = shares.T @ weighted - mean * weighted.sum()
        return out

    start = back(np.random.default_rng(0).normal(size=len(weight)))  # at random, so that no difference cancels out
    if not np.abs(start).max() > 1e-12 * weight.max():
        return np.zeros(len(weight))
    centred = LinearOperator(shares.shape, matvec=forth, rmatvec=back, dtype=np.float64)
    _, _, axes = svds(centred, k=1, v0=start if len(weight) > shares.shape[1] else forth(start))
    places = forth(axes[0]) / weight
    # The axis has two directions, and threads may add up in another order: the farthest is at 1, to nine places.
    farthest = float(places[np.abs(places).argmax()])
    return np.asarray(np.round(places / (farthest or 1.0), 9), dtype=np.float64)
