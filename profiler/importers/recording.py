"""What all importers end in: a `Recording`, and how it becomes a profile folder. Knows no engine.

Tokens are read again from the files when they are needed again, so that memory does not grow with them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.counts import Counts, Int64s
from profiler.errors import CoterieError
from profiler.folder import StoredProfile
from profiler.profile import Profile
from profiler.spec import MoESpec
from profiler.trace import DECODE, PREFILL, TokenTrace, has_plenty_of_rows, ids_dtype
from profiler.writer import ProfileWriter

TOKENS_TOGETHER = 8_192
"""Passes of few tokens are written together: decoding one sequence would cost a call for each token."""

CANNOT_TELL = ("co-activation", "transitions", "fan_out", "ingress", "domains", "phases", "held-out sequences")
"""What counts of tokens by expert say nothing about."""


@dataclass(frozen=True)
class Recording:
    """Routing that an engine recorded, checked as far as its model's shape.

    Attributes:
        model: what was recorded of.
        domains: names of the domains.
        traces: the tokens, from the beginning whenever it is called; None where only counts were recorded.
        counts: then these, with nothing in `coactivation` and `transition`.
        provenance: where it comes from and what was left out; complete once `traces` has been gone through.
    """

    model: MoESpec
    domains: tuple[str, ...]
    traces: Callable[[], Iterator[TokenTrace]] | None
    counts: Counts | None
    provenance: Mapping[str, Any]


def in_rank_order(folder: Path, pattern: str) -> list[Path]:
    """The files of a folder whose whole name fits a pattern, by the number of the rank that its first group finds."""
    matches = ((re.fullmatch(pattern, path.name), path) for path in folder.iterdir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def experts_of_slots(slots_LTK: npt.NDArray[np.signedinteger], expert_of_slot: Int64s) -> Int64s:
    """The experts in picked slots, int64 (L, T, K), -1 where the slot is -1, out of the map int64 (L, P)."""
    layers = np.arange(len(expert_of_slot))[:, None, None]
    return np.where(slots_LTK < 0, -1, expert_of_slot[layers, np.maximum(slots_LTK, 0)])


def write_recording(recording: Recording, out: Path) -> StoredProfile:
    """Write a recording as a profile, without its warm-up rows; nothing is left behind if that fails.

    Warm-up passes, dummy batches and padding put one token many times behind itself.  A row of picks is left out where
    it is as common as `RowSketch.dummy_tokens` says and stands beside an equal one; `dummy_tokens_dropped` in the
    provenance counts them.  Common rows that stand alone stay: a text's first token is routed alike every time.

    Raises:
        CoterieError: the recording does not fit its model, holds no token, or the folder cannot be written.
    """
    traced = None if recording.traces else 0
    writer = ProfileWriter(out, recording.model, recording.domains, max_traced_tokens=traced)
    try:
        if recording.traces is None:
            assert recording.counts is not None
            writer.add_counts(recording.counts, range(len(recording.domains)))
            return writer.finish(recording.provenance)
        for trace in _together(recording.traces()):
            writer.add(trace)
        rows, num_tokens, dropped = writer.dummy_rows(), writer.num_tokens, 0
        if len(rows):
            writer.discard()
            writer = ProfileWriter(out, recording.model, recording.domains)
            for trace in _without_repeats(_together(recording.traces()), rows):
                writer.add(trace)
            dropped = num_tokens - writer.num_tokens
        if dropped == num_tokens and num_tokens:
            raise CoterieError(f"all {num_tokens} tokens are warm-up or padding rows: record real requests")
        left_out = {**recording.provenance, "dummy_tokens_dropped": dropped}
        return writer.finish({name: value for name, value in left_out.items() if value != 0})
    except BaseException:
        writer.discard()
        raise


def of_profile(profile: Profile) -> Recording:
    """What is in memory already."""
    provenance = {name: value for name, value in profile.provenance.items() if name != "dummy_tokens"}
    tokens = profile.require_tokens()
    return Recording(profile.model, profile.domains, lambda: iter([tokens]), None, provenance)


def _together(traces: Iterator[TokenTrace]) -> Iterator[TokenTrace]:
    held: list[TokenTrace] = []
    num_tokens = 0
    for trace in traces:
        if trace.num_tokens:
            held.append(trace)
            num_tokens += trace.num_tokens
        if num_tokens >= TOKENS_TOGETHER:
            yield TokenTrace.concatenate(held)
            held, num_tokens = [], 0
    if held:
        yield TokenTrace.concatenate(held)


def _without_repeats(traces: Iterator[TokenTrace], rows: npt.NDArray[np.uint64]) -> Iterator[TokenTrace]:
    none: npt.NDArray[np.uint64] = np.empty(0, dtype=np.uint64)
    before = none
    hashed = ((trace, trace.row_hashes()) for trace in traces)
    for (trace, hashes), (_, after) in itertools.pairwise(itertools.chain(hashed, [(None, none)])):
        assert trace is not None
        around = np.concatenate([before, hashes, after[:1]])
        same = around[1:] == around[:-1]  # as its neighbour
        beside = np.zeros(len(around), dtype=np.bool_)
        beside[1:] |= same
        beside[:-1] |= same
        own = slice(len(before), len(before) + len(hashes))
        before = hashes[-1:]
        kept = trace.where(~(beside[own] & np.isin(hashes, rows)))
        if kept.num_tokens:
            yield kept


def narrow(ids_LTK: npt.NDArray[np.signedinteger], num_experts: int) -> npt.NDArray[np.unsignedinteger]:
    """Ids of a trace, all ones where they are negative."""
    dtype = ids_dtype(num_experts)
    return np.where(ids_LTK < 0, np.iinfo(dtype).max, ids_LTK).astype(dtype)


def one_sequence(
    ids_LTK: npt.NDArray[np.signedinteger], model: MoESpec, sequence: int, *, decode: bool, where: str
) -> TokenTrace:
    """Tokens that were recorded together, as a sequence of the only domain.

    Args:
        ids_LTK: negative where a pick went to no expert.
        where: what an error begins with.

    Raises:
        CoterieError: they are no trace of the model.
    """
    num_tokens = ids_LTK.shape[1]
    trace = TokenTrace(
        topk_ids=narrow(ids_LTK, model.num_experts),
        sequence_ids=np.full(num_tokens, sequence, dtype=np.int32),
        domain_ids=np.zeros(num_tokens, dtype=np.uint8),
        phase=np.full(num_tokens, DECODE if decode else PREFILL, dtype=np.uint8),
    )
    try:
        trace.require(model, 1)
    except CoterieError as error:
        raise CoterieError(f"{where}: {error}") from error
    return trace


def count_passes(passes: Int64s, top_k: int) -> tuple[Int64s, int, int]:
    """Loads (L, E), tokens, and dummy tokens left out, of the counts of forward passes, int64 (passes, L, E).

    A pass is a dummy where in every layer all of its tokens, at least two, picked the same `top_k` experts, and chance
    could not have done it.
    """
    used = passes > 0
    tokens = -(-passes.sum(axis=2).max(axis=1, initial=0) // top_k)
    recorded = used.any(axis=2)
    same = (used.sum(axis=2) == top_k) & (passes.max(axis=2, initial=0) == tokens[:, None])
    num_layers = int(recorded.sum(axis=1).max(initial=0))
    dummy = np.all(same | ~recorded, axis=1) & (tokens >= 2) & has_plenty_of_rows(num_layers, passes.shape[2], top_k)
    return passes[~dummy].sum(axis=0), int(tokens[~dummy].sum()), int(tokens[dummy].sum())


def of_loads(
    model: MoESpec, domain: str, load_LE: Int64s, num_tokens: int, provenance: Mapping[str, Any], to_get_tokens: str
) -> Recording:
    """A recording of counts alone.

    Args:
        load_LE: int64 (L, E), tokens that picked each expert.
        to_get_tokens: how the engine records more, for messages.

    Raises:
        CoterieError: nothing was counted, or the loads cannot be those of so many tokens.
    """
    if num_tokens == 0 or load_LE.max() == 0:
        raise CoterieError("no token was counted: record while requests are served")
    if load_LE.max() > num_tokens:
        layer, expert = np.unravel_index(int(load_LE.argmax()), load_LE.shape)
        raise CoterieError(
            f"layer {model.layer_ids[layer]}: expert {expert} was picked {load_LE.max()} times by {num_tokens} tokens; "
            f"top_k {model.top_k} does not fit the recording, give the model's own to --top-k"
        )
    pairs = (model.num_experts, model.num_experts)
    counts = Counts(
        tokens=np.array([num_tokens]),
        load=load_LE[None],
        coactivation=np.zeros((1, model.num_layers, *pairs), dtype=np.int64),
        transition=np.zeros((1, model.num_layers - 1, *pairs), dtype=np.int64),
    )
    what = {"cannot_tell": list(CANNOT_TELL), "to_get_tokens": to_get_tokens}
    return Recording(model, (domain,), None, counts, {**provenance, **what})


def find_files(paths: Sequence[Path], suffixes: Sequence[str]) -> list[Path]:
    """The files that are given, and those in the folders that are.

    Raises:
        CoterieError: there is none, or a file of another kind is given.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if entry.suffix in suffixes and entry.is_file())
            if not inside:
                raise CoterieError(f"{path}: holds no {' or '.join(suffixes)} file; give the folder of a recording")
            found += inside
        elif not path.exists():
            raise CoterieError(f"{path}: no such file or folder; give what the engine has recorded")
        elif path.suffix not in suffixes:
            raise CoterieError(f"{path}: must be a {' or '.join(suffixes)} file, or a folder of them")
        else:
            found.append(path)
    return list(dict.fromkeys(found))
