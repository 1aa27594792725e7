"""How far off is the predicted time? Fits the constants of `PRESETS` on some measured times, checks them on the rest.

The measurements (aiconfigurator's collection for H100 and A100) are not part of the project: `COTERIE_HARDWARE` names
the folder with them. How they were taken decides what a row means:

- DeepEP's benchmark routes uniformly random scores, over the 4 best nodes where there are more. On several nodes it
  timed kernels, the handshake of ranks ("notify") apart, on one node whole calls: so transmit and notify are added.
- The expert rows time the first of so many expert-parallel ranks that all see all tokens: products of its own experts'
  rows, but activations of every row. Skewed loads are drawn from a truncated power law; the rank with most is first.

Fitted are even rows, but none with hidden size 4096 and, for DeepEP normal mode, none on 8 nodes; errors are those of
the rounded constants in `PRESETS` on all other rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import least_squares

from benchmarks.record import write
from placement.timing import BF16_WIDTH, FP8_WIDTH, activation_seconds, exchange_seconds, product_seconds
from placement.topology import PRESETS, Links

FOLDER = Path(os.environ.get("COTERIE_HARDWARE", Path(__file__).parents[2] / "shared" / "hardware"))
NUM_SMS = 20
"""Of the 132 that DeepEP may use: its default; more hardly help, fewer are slower."""
UNFITTED_HIDDEN_SIZE = 4096
GPUS_PER_NODE = 8
NCCL_STARTUP = {"h100": 9e-6, "a100": PRESETS["a100"].dispatch_startup}
"""s. NCCL starts faster than DeepEP does, so `PRESETS["h100"]` has no figure for it."""
COLUMNS = ("measured", "of", "rows", "median error", "90th percentile")

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Measured:
    """Times of one kind.

    Attributes:
        name: for the table.
        seconds: float64 (parts, n), measured; dispatch and combine are parts, constants are fitted on each, errors are
            those of their sum.
        predict: predictions for these rows, float64 (parts, n), from links.
        fitted: bool (n,), rows that constants were fitted on.
        slices: rows to report, bool (n,), by what they have in common.
    """

    name: str
    seconds: Floats
    predict: Callable[[Links], Floats]
    fitted: Bools
    slices: dict[str, Bools]

    def errors(self, links: Links) -> Iterator[list[Any]]:
        """Rows of the table: relative errors of rows that were not fitted."""
        off = np.abs(self.predict(links).sum(axis=0) / self.seconds.sum(axis=0) - 1)
        for name, rows in self.slices.items():
            rows = rows & ~self.fitted
            if rows.any():
                median, most = float(np.median(off[rows])), float(np.quantile(off[rows], 0.9))
                yield [self.name, name, int(rows.sum()), median, most]


@cache
def expected_shares(num_experts: int, top_k: int, num_nodes: int, best_nodes: int = 4) -> tuple[float, float]:
    """Share of tokens that reach a rank, and that touch a node, as DeepEP's benchmark draws them (20,000 draws)."""
    scores = np.random.default_rng(0).random((20_000, num_experts), dtype=np.float32)
    best = scores.reshape(len(scores), num_nodes, -1).max(axis=2)
    threshold = np.sort(best, axis=1)[:, -min(best_nodes, num_nodes)]
    scores[np.repeat(best < threshold[:, None], num_experts // num_nodes, axis=1)] = -1
    ids = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    touched = np.zeros((len(scores), num_nodes * GPUS_PER_NODE), dtype=bool)
    np.put_along_axis(touched, ids * touched.shape[1] // num_experts, True, axis=1)
    return float(touched.mean()), float(touched.reshape(len(scores), num_nodes, -1).any(axis=2).mean())


@cache
def busiest_load(num_experts: int, top_k: int, num_ranks: int, num_tokens: int, exponent: float) -> float:
    """Expected (token, expert) pairs of the busiest rank where loads follow a truncated power law (20 draws)."""
    least, most = (1, 0.8 * num_tokens) if num_tokens * top_k > num_experts else (0.01, 2)
    uniform = np.random.default_rng(0).random((20, num_experts))
    low, high = least ** (1 - exponent), most ** (1 - exponent)
    load = (low + (high - low) * uniform) ** (1 / (1 - exponent))
    load *= num_tokens * top_k / load.sum(axis=1, keepdims=True)
    for _ in range(5):  # no expert gets a token twice: what is too much goes to the others
        spare = np.clip(num_tokens - load, 0, None)
        excess = np.clip(load - num_tokens, 0, None).sum(axis=1, keepdims=True)
        load = np.minimum(load, num_tokens) + excess * spare / np.maximum(spare.sum(axis=1, keepdims=True), 1e-9)
    return float(load.reshape(20, num_ranks, -1).sum(axis=2).max(axis=1).mean())


def read(pattern: str) -> pd.DataFrame:
    """All files that match, one below the other."""
    return pd.concat(map(pd.read_parquet, sorted(FOLDER.glob(pattern))), ignore_index=True)


def exchanges(mode: str, added: bool = False) -> Measured:
    """DeepEP's dispatch and combine; mode "normal" or "ll" (low latency); `added`: links one after the other."""
    table = read(f"h100_sxm__comm__sglang__*__wideep_deepep_{mode}_perf.parquet")
    if mode == "normal":
        table = table[table.dispatch_sms == NUM_SMS].reset_index(drop=True)
        microseconds = [table[f"{part}_transmit_us"] + table[f"{part}_notify_us"] for part in ("dispatch", "combine")]
    else:
        microseconds = [table[f"{part}_avg_t_us"] for part in ("dispatch", "combine")]
    nodes, tokens, hidden = (table[name].to_numpy(float) for name in ("node_num", "num_token", "hidden_size"))
    ranks = nodes * GPUS_PER_NODE
    if mode == "normal":
        keys = zip(table.num_experts, table.num_topk, table.node_num, strict=True)
        reach, touch = np.array([expected_shares(*map(int, key)) for key in keys]).T
        within = tokens * ranks * reach * (GPUS_PER_NODE - 1) / GPUS_PER_NODE
        across = tokens * ranks * touch * (nodes - 1) / nodes / GPUS_PER_NODE
    else:
        load = table.num_topk.to_numpy(float) / ranks
        within, across = tokens * (GPUS_PER_NODE - 1) * load, tokens * (ranks - GPUS_PER_NODE) * load

    def predict(links: Links) -> Floats:
        network = np.where(nodes > 1, links.network_startup, 0)
        parts = []
        for width, startup in ((FP8_WIDTH, links.dispatch_startup), (BF16_WIDTH, links.combine_startup)):
            if added:
                first = exchange_seconds(links, within, 0 * across, width * hidden, startup + network)
                parts.append(first + exchange_seconds(links, 0 * within, across, width * hidden, 0))
            else:
                parts.append(exchange_seconds(links, within, across, width * hidden, startup + network))
        return np.array(parts)

    fitted = (np.arange(len(table)) % 2 == 0) & (hidden != UNFITTED_HIDDEN_SIZE)
    if mode == "normal":
        fitted &= nodes < 8
    slices = {f"{count} node{'s' * (count > 1)}": nodes == count for count in (1, 2, 4, 8)}
    fair = nodes < 8 if mode == "normal" else nodes > 0
    which = " of up to 4 nodes" if mode == "normal" else ""
    slices |= {
        f"{low} to {high} tokens a rank{which}": fair & (tokens >= low) & (tokens <= high)
        for low, high in ((1, 48), (64, 512), (1024, 8192), (16384, 131072))
    }
    slices[f"hidden size {UNFITTED_HIDDEN_SIZE}, never fitted"] = hidden == UNFITTED_HIDDEN_SIZE
    slices["8 or 16 experts"] = table.num_experts.to_numpy() <= 16
    if added:
        slices = {"up to 4 nodes": nodes < 8, **{name: slices[name] for name in ("1 node", "2 nodes", "4 nodes")}}
    name = {"normal": "DeepEP normal", "ll": "DeepEP low latency"}[mode] + ", links one after the other" * added
    return Measured(name, np.array(microseconds) * 1e-6, predict, fitted, slices)


def all_to_all(device: str) -> Measured:
    """NCCL's all-to-all in one node."""
    table = read(f"{device}_sxm__comm__nccl__*.parquet")
    table = table[table.op_name == "alltoall"].reset_index(drop=True)
    gpus = table.num_gpus.to_numpy(float)
    # Sizes are in elements: a size of 16-bit elements takes as long as twice the size of bytes.
    size = table.message_size.to_numpy(float) * np.where(table.nccl_dtype == "half", 2, 1)
    sent = size * (gpus - 1) / gpus

    def predict(links: Links) -> Floats:
        return exchange_seconds(links, sent, 0 * sent, 1, NCCL_STARTUP[device])[None]

    slices = {f"{count} GPUs": gpus == count for count in (2, 4, 8)}
    slices |= {"up to 64 KiB": size <= 1 << 16, "64 KiB to 16 MiB": (size > 1 << 16) & (size <= 1 << 24)}
    slices["above 16 MiB"] = size > 1 << 24
    fitted = np.arange(len(table)) % 2 == 0
    return Measured(f"NCCL {device}", table.latency.to_numpy()[None] * 1e-3, predict, fitted, slices)


def experts(activations: bool = True) -> Measured:
    """Grouped products of SGLang's Triton kernel, predicted with or without the time of activations."""
    table = read("h100_sxm__moe__*.parquet")
    kernel = (table.kernel_source == "sglang_fused_moe_triton") & table.moe_dtype.isin(["bfloat16", "fp8_block"])
    table = table[kernel & (table.moe_tp_size == 1)].reset_index(drop=True)
    tokens, hidden, inter, top_k, num_experts, ranks = (
        table[name].to_numpy(float)
        for name in ("num_tokens", "hidden_size", "inter_size", "topk", "num_experts", "moe_ep_size")
    )
    even = (table.distribution == "balanced").to_numpy()
    eight_bit = (table.moe_dtype == "fp8_block").to_numpy()
    pairs = tokens * top_k
    rows = pairs / ranks
    for index in np.flatnonzero(~even & (ranks > 1)):
        sizes = (int(value[index]) for value in (num_experts, top_k, ranks, tokens))
        rows[index] = busiest_load(*sizes, float(table.distribution[index].rpartition("_")[2]))
    active = np.minimum(num_experts, pairs) / ranks

    def predict(links: Links) -> Floats:
        narrow, wide = (product_seconds(links, rows, active, hidden, inter, width) for width in (1, 2))
        products = np.where(eight_bit, narrow, wide)
        return (products + activations * activation_seconds(links, pairs, hidden, inter))[None]

    fitted = even & (np.arange(len(table)) % 2 == 0) & (hidden != UNFITTED_HIDDEN_SIZE)
    slices = {"fp8, equal load": even & eight_bit, "bf16, equal load": even & ~eight_bit}
    slices |= {
        f"{low} to {high} tokens, equal load": even & (tokens >= low) & (tokens <= high)
        for low, high in ((1, 16), (32, 256), (320, 2048), (3072, 20480))
    }
    slices |= {
        f"{f'{low} to {high} ranks' if low < high else '1 rank'}, {name} load": (even == (name == "equal"))
        & (ranks >= low)
        & (ranks <= high)
        for name in ("equal", "skewed")
        for low, high in ((1, 1), (2, 8), (16, 256))
    }
    slices[f"hidden size {UNFITTED_HIDDEN_SIZE}, equal load, never fitted"] = even & (hidden == UNFITTED_HIDDEN_SIZE)
    if not activations:
        slices = {name: rows for name, rows in slices.items() if "rank" in name and "equal" in name}
    name = "experts" if activations else "experts, no activations"
    return Measured(name, table.latency.to_numpy()[None] * 1e-3, predict, fitted, slices)


def published() -> Measured:
    """Bandwidths in DeepEP's README (H800; 4,096 tokens of 7,168 values, 8 of 256 experts on 4 best nodes), as times.

    Its bandwidths count what stays on the rank (8 ranks: NVLink) or the node (more: RDMA).
    """
    figures = {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}
    seconds, within, across, width = [], [], [], []
    for ranks, bandwidths in figures.items():
        nodes = ranks // GPUS_PER_NODE
        reach, touch = expected_shares(256, 8, nodes)
        rows = 4096 * (reach * ranks if nodes == 1 else touch * nodes)
        for bandwidth, value_bytes in zip(bandwidths, (FP8_WIDTH, BF16_WIDTH), strict=True):
            seconds.append(rows * 7168 * value_bytes / (bandwidth * 1e9))
            within.append(4096 * ranks * reach * 7 / 8)
            across.append(4096 * touch * (nodes - 1))
            width.append(7168 * value_bytes)

    def predict(links: Links) -> Floats:
        startup = np.tile([links.dispatch_startup, links.combine_startup], 4)
        startup[2:] += links.network_startup
        return exchange_seconds(links, np.array(within), np.array(across), np.array(width), startup)[None]

    slices = {f"EP{ranks}": np.repeat(np.array(list(figures)) == ranks, 2) for ranks in figures}
    return Measured("DeepEP's README, H800", np.array([seconds]), predict, np.zeros(8, dtype=bool), slices)


def measurements() -> list[tuple[Measured, Links]]:
    """All of them, each with the constants that predict it."""
    h100 = PRESETS["h100"]
    return [
        (exchanges("normal"), h100),
        (exchanges("ll"), PRESETS["h100-low-latency"]),
        (experts(), h100),
        (all_to_all("h100"), h100),
        (all_to_all("a100"), PRESETS["a100"]),
        (published(), PRESETS["h800"]),
    ]


def fit(measured: Measured, start: Links, names: tuple[str, ...]) -> Links:
    """Constants that bring predictions of the fitted rows nearest in ratio, few large errors counting little."""
    scale = np.array([getattr(start, name) for name in names])

    def links(logarithms: Floats) -> Links:
        return replace(start, **dict(zip(names, map(float, scale * np.exp(logarithms)), strict=True)))

    def residuals(logarithms: Floats) -> Floats:
        return np.log(measured.predict(links(logarithms)) / measured.seconds)[:, measured.fitted].ravel()

    return links(least_squares(residuals, np.zeros(len(names)), loss="soft_l1", f_scale=0.1).x)


EXCHANGE = ("rank_bandwidth", "network_bandwidth", "dispatch_startup", "combine_startup", "network_startup")
FITTED = {
    "DeepEP normal": EXCHANGE,
    "DeepEP low latency": EXCHANGE,
    "experts": ("flops", "flops_8bit", "memory_bandwidth", "expert_startup"),
    "NCCL a100": ("rank_bandwidth",),
}


def main() -> None:
    if not FOLDER.is_dir():
        print(f"no measured times at {FOLDER}; set COTERIE_HARDWARE")
        return
    constants, rows = [], []
    for measured, links in measurements():
        rows += measured.errors(links)
        if names := FITTED.get(measured.name):
            fitted = fit(measured, links, names)
            constants.append(f"{measured.name}: " + ", ".join(f"{name} {getattr(fitted, name):.4g}" for name in names))
    # Simpler or other shapes, with constants of their own.
    others = (
        (exchanges("normal", added=True), EXCHANGE),
        (exchanges("ll", added=True), EXCHANGE),
        (experts(activations=False), FITTED["experts"]),
    )
    for other, names in others:
        rows += other.errors(fit(other, PRESETS["h100"], names))
    write(
        "cost_model",
        "Predicted against measured times",
        "Relative error of predictions with the constants of `PRESETS` on rows that they were not fitted on; but H800 "
        "is the mean of EP8, EP32 and EP64 of DeepEP's README, NCCL on H100 has a start-up of its own, and the rows "
        "with links one after the other or without activations have constants fitted anew. Fitted (bytes/s, s, "
        "FLOP/s): " + "; ".join(constants) + ".",
        COLUMNS,
        rows,
    )


if __name__ == "__main__":
    main()
