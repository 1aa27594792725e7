"""Counting co-activation: pairs in a compiled loop, against a dense one-hot product and a loop in Python."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.record import spread, write
from profiler.counts import count
from profiler.spec import MoESpec
from profiler.trace import TokenTrace, ids_dtype

NUM_EXPERTS, TOP_K, NUM_TOKENS = 256, 8, 65_536
TOKENS_OF_THE_LOOP = 2_048
REPEATS = 15


def one_hot_product(ids_TK: torch.Tensor) -> torch.Tensor:
    """Dense: which experts each token picked as a float32 (T, E) matrix, times itself, on all cores."""
    picked_TE = torch.zeros(len(ids_TK), NUM_EXPERTS).scatter_(1, ids_TK, 1.0)
    together = picked_TE.T @ picked_TE
    return together.fill_diagonal_(0)


def python_loop(ids_TK: list[list[int]]) -> np.ndarray:
    """Token by token and pair by pair, as research code does."""
    together = np.zeros((NUM_EXPERTS, NUM_EXPERTS), dtype=np.int64)
    for picks in ids_TK:
        for first, a in enumerate(picks):
            for b in picks[first + 1 :]:
                together[a, b] += 1
                together[b, a] += 1
    return together


def timed(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def main() -> None:
    rng = np.random.default_rng(0)
    scores = rng.gumbel(size=(NUM_TOKENS, NUM_EXPERTS)) + rng.normal(size=NUM_EXPERTS)
    ids_TK = np.argsort(-scores, axis=1)[:, :TOP_K].astype(ids_dtype(NUM_EXPERTS))
    zeros = np.zeros(NUM_TOKENS, dtype=np.uint8)
    trace = TokenTrace(ids_TK[None], zeros.astype(np.int32), zeros, zeros)
    spec = MoESpec("made-up", "made-up", (0,), NUM_EXPERTS, TOP_K, 1, 0, 0, "float32")
    dense_ids, few = torch.from_numpy(ids_TK.astype(np.int64)), ids_TK[:TOKENS_OF_THE_LOOP].tolist()

    ours = count(trace, spec, 1).coactivation[0, 0]
    assert (ours == one_hot_product(dense_ids).numpy()).all()
    assert (count(trace.where(slice(TOKENS_OF_THE_LOOP)), spec, 1).coactivation[0, 0] == python_loop(few)).all()
    contenders = {
        "one-hot product (float32, all cores)": (lambda: one_hot_product(dense_ids), NUM_TOKENS),
        "loop in Python": (lambda: python_loop(few), TOKENS_OF_THE_LOOP),
        "coterie, loads included (1 core)": (lambda: count(trace, spec, 1), NUM_TOKENS),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(REPEATS):
        for name, (function, tokens) in contenders.items():
            times[name].append(timed(function) / tokens * 1e9)
    own = np.array(times["coterie, loads included (1 core)"])
    write(
        "coactivation",
        "Counting co-activation",
        f"{NUM_EXPERTS} experts, top-{TOP_K}, {NUM_TOKENS:,} tokens ({TOKENS_OF_THE_LOOP:,} for the loop in Python), "
        f"one layer; results equal. Nanoseconds a token, median of {REPEATS} runs in turns (least to most), and the "
        f"median of the runs' ratios to coterie's; torch on {torch.get_num_threads()} threads.",
        ("method", "ns a token", "times as long"),
        [[name, spread(values), float(np.median(np.array(values) / own))] for name, values in times.items()],
    )


if __name__ == "__main__":
    main()
