"""Routing as chance alone would give it: the same loads, no collaboration. Knows no plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from profiler.trace import TokenTrace


def shuffled(tokens: TokenTrace, seed: int, num_rounds: int = 20) -> TokenTrace:
    """Routing without collaboration: every layer's picks dealt anew to the tokens, each expert as often as before.

    In each round tokens meet in random pairs and deal the picks that they do not share out between them at random: the
    curveball trades of Strona et al. (Nature Communications 5, 2014).  Loads and the K distinct picks of a token are
    kept exactly, co-activation is left to chance.
    """
    rng = np.random.default_rng(seed)
    layers = [ids_TK.copy() for ids_TK in tokens.topk_ids]
    for ids_TK, picked_TK in zip(layers, tokens.picked, strict=True):
        whole = np.flatnonzero(picked_TK.all(axis=1))  # tokens with picks of no expert keep theirs
        for _ in range(num_rounds):
            pairs = rng.permutation(whole)[: len(whole) // 2 * 2].reshape(2, -1)
            ids_TK[pairs[0]], ids_TK[pairs[1]] = _trade(ids_TK[pairs[0]], ids_TK[pairs[1]], rng)
    return replace(tokens, topk_ids=np.stack(layers))


def _trade(
    first: npt.NDArray[np.unsignedinteger], second: npt.NDArray[np.unsignedinteger], rng: np.random.Generator
) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.unsignedinteger]]:
    """Shuffle what row i of `first` and row i of `second`, both (pairs, K), do not have in common between the two."""
    same = first[:, :, None] == second[:, None, :]
    kept_first, kept_second = same.any(axis=2), same.any(axis=1)
    both, kept = np.concatenate([first, second], axis=1), np.concatenate([kept_first, kept_second], axis=1)
    keys = np.where(kept, np.inf, rng.random(both.shape))  # shared picks sort behind those to deal
    pool = np.take_along_axis(both, np.argsort(keys, axis=1), axis=1)
    place_first = np.maximum(np.cumsum(~kept_first, axis=1) - 1, 0)
    place_second = (~kept_first).sum(axis=1, keepdims=True) + np.maximum(np.cumsum(~kept_second, axis=1) - 1, 0)
    place_second = np.minimum(place_second, pool.shape[1] - 1)
    return (
        np.where(kept_first, first, np.take_along_axis(pool, place_first, axis=1)),
        np.where(kept_second, second, np.take_along_axis(pool, place_second, axis=1)),
    )
