"""One profile out of several: of the processes of one run, or of several days. Knows no model in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from profiler.errors import CoterieError
from profiler.folder import StoredProfile, open_profile, sources
from profiler.trace import MAX_DOMAINS
from profiler.writer import ProfileWriter

TOLD = ("cannot_tell", "to_get_tokens")
"""What the provenance of counts without pairs says to whoever asks for more."""


def merge(
    folders: Sequence[Path], out: Path, *, seed: int = 0, on_shard: Callable[[], None] = lambda: None
) -> StoredProfile:
    """Write what profiling all the texts in one run would have given; memory does not grow with the tokens.

    Sequences are renumbered so that no two profiles share a number; domains are united by name.  Where a profile holds
    the sets of a sample of its tokens only, all are thinned to the smallest share, so that the sample stays uniform.

    Args:
        seed: of the thinning.
        on_shard: called as each shard is done.

    Raises:
        CoterieError: one is given twice, or with another that was split from it or united of it; the profiles are of
            different models, some have token sets or co-activation and some do not, they have more than 255 domains
            together, or the result cannot be written.
    """
    parts = [open_profile(folder) for folder in folders]
    if not parts:
        raise CoterieError("0 profiles to merge: give at least one")
    first = parts[0]
    for part, other in itertools.permutations(parts, 2):
        if part.digest in sources(other.digest, other.provenance):
            raise CoterieError(
                f"cannot merge {part.folder} with {other.folder}, which has tokens of it (digest {part.digest[:12]}) "
                "that would count twice; leave one out"
            )
    for other in parts[1:]:
        if not first.model.routes_like(other.model):
            raise CoterieError(
                f"cannot merge {other.folder} ({other.model.describe()}) with {first.folder} "
                f"({first.model.describe()}): different models"
            )
    counted_only = [part for part in parts if not part.num_traced_tokens]
    if counted_only and len(counted_only) < len(parts):
        raise CoterieError(
            f"cannot merge {counted_only[0].folder}, which holds counts only, with profiles that hold token sets"
        )
    blind = [part for part in parts if "cannot_tell" in part.provenance]
    if blind and len(blind) < len(parts):
        raise CoterieError(
            f"cannot merge {blind[0].folder}, which holds loads only, with profiles that hold co-activation"
        )
    domains = tuple(dict.fromkeys(domain for part in parts for domain in part.domains))
    if len(domains) > MAX_DOMAINS:
        raise CoterieError(f"{len(domains)} domains together, at most {MAX_DOMAINS} can be told apart; merge fewer")
    writer = ProfileWriter(out, first.model, domains, max_traced_tokens=0 if counted_only else None)
    try:
        _copy(parts, domains, writer, seed, on_shard)
        kept = {key: first.provenance[key] for key in first.provenance if blind and key in TOLD}
        made_from = [digest for part in parts for digest in sources(part.digest, part.provenance)]
        return writer.finish({**kept, "made_from": made_from, "merged": [dict(part.provenance) for part in parts]})
    except BaseException:
        writer.discard()
        raise


def _copy(
    parts: Sequence[StoredProfile],
    domains: tuple[str, ...],
    writer: ProfileWriter,
    seed: int,
    on_shard: Callable[[], None],
) -> None:
    share = min(part.num_traced_tokens / part.num_tokens for part in parts)
    firsts = [next(part.traces(), None) for part in parts]
    all_hold_weights = all(first is not None and first.topk_weights is not None for first in firsts)
    next_sequence = 0
    for number, part in enumerate(parts):
        rng = np.random.default_rng((seed, number))
        index = np.array([domains.index(domain) for domain in part.domains], dtype=np.uint8)
        writer.add_counts(part.counts, index.tolist())
        wanted = share * part.num_tokens / max(part.num_traced_tokens, 1)  # of the tokens that it holds
        highest = -1
        for trace in part.traces():
            highest = max(highest, int(trace.sequence_ids.max()))
            if next_sequence + highest > np.iinfo(np.int32).max:
                raise CoterieError(f"{part.folder}: sequence {highest} is too high a number to renumber")
            moved = replace(
                trace if all_hold_weights else trace.without_weights(),
                sequence_ids=trace.sequence_ids + np.int32(next_sequence),
                domain_ids=index[trace.domain_ids],
            )
            writer.keep(moved if wanted >= 1 else moved.where(rng.random(moved.num_tokens) < wanted))
            on_shard()
        next_sequence += highest + 1
