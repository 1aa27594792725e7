"""`Profile`, the record of one model's routing, in memory. How it lies on disk is in `folder.py`. Knows no plan."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from profiler import folder as on_disk
from profiler.counts import Counts, count
from profiler.errors import CoterieError
from profiler.files import behind_link
from profiler.spec import MoESpec
from profiler.trace import DECODE, PREFILL, TokenTrace


@dataclass(frozen=True)
class Profile:
    """What one model did on one set of texts.

    Attributes:
        model: the model's MoE layers.
        domains: names of the D domains.
        counts: exact over all tokens.
        tokens: the token sets, of all tokens or of a sample; None in a counts-only profile.
        provenance: how it was made: data, seed, versions, date.
    """

    model: MoESpec
    domains: tuple[str, ...]
    counts: Counts
    tokens: TokenTrace | None
    provenance: Mapping[str, Any]

    @classmethod
    def from_tokens(
        cls, model: MoESpec, domains: Sequence[str], tokens: TokenTrace, provenance: Mapping[str, Any]
    ) -> Self:
        """Count a trace, domain by domain.

        Raises:
            CoterieError: the trace is empty or does not fit the model or the domains.
        """
        if tokens.num_tokens == 0:
            raise CoterieError("no token was recorded: give text with at least one token")
        tokens.require(model, len(domains))
        return cls(model, tuple(domains), count(tokens, model, len(domains)), tokens, provenance)

    @property
    def num_tokens(self) -> int:
        """Tokens that were counted."""
        return int(self.counts.tokens.sum())

    @cached_property
    def digest(self) -> str:
        """Of the content, as `profile.json` gives it: what a plan names as its source."""
        files = {"counts.safetensors": _hash(on_disk.counts_bytes(self.counts))}
        for number, shard in enumerate(self._shards()):
            files[on_disk.shard_name(number)] = _hash(on_disk.shard_bytes(shard))
        return on_disk.content_digest(self.model, self.domains, files)

    @property
    def sources(self) -> list[str]:
        """Its digest, and those of profiles that it was split from or united of."""
        return on_disk.sources(self.digest, self.provenance)

    def require_tokens(self) -> TokenTrace:
        """The token sets.

        Raises:
            CoterieError: this is a counts-only profile.
        """
        if self.tokens is None:
            remedy = self.provenance.get("to_get_tokens", "record them")
            raise CoterieError(f"the profile holds counts only, and ingress and fan_out need token sets: {remedy}")
        return self.tokens

    def split_by_sequence(self) -> tuple[Profile, Profile]:
        """Two profiles: even positions in the list of sequences to plan with, odd ones to measure on.

        Where that gives one of them more of a domain than the other, by over one sequence, every second sequence of
        each domain goes to each; a sequence of several domains counts as of its first token's.

        Raises:
            CoterieError: there are no token sets, or fewer than two sequences.
        """
        tokens = self.require_tokens()
        sequences, first, position = np.unique(tokens.sequence_ids, return_index=True, return_inverse=True)
        if len(sequences) < 2:
            raise CoterieError("the profile holds 1 sequence, a held-out half needs at least 2: profile more text")
        odd_T = _odd_sequences(tokens.domain_ids[first])[position]
        return self._part(~odd_T, "even sequences"), self._part(odd_T, "odd sequences")

    def split_by_domain(self) -> dict[str, Profile]:
        """One profile for each domain that has tokens; counts stay exact where the token sets are a sample."""
        parts = {}
        for index, domain in enumerate(self.domains):
            if self.counts.tokens[index]:
                trace = self.tokens and self.tokens.where(self.tokens.domain_ids == index)
                if trace:
                    trace.domain_ids[:] = 0
                provenance = {**self.provenance, "part": f"domain {domain}"}
                parts[domain] = Profile(self.model, (domain,), self.counts.of_domains([index]), trace, provenance)
        return parts

    def split_by_phase(self) -> dict[str, Profile]:
        """The traced tokens of prefill and of decoding, as far as there are any.

        Raises:
            CoterieError: there are no token sets.
        """
        phase = self.require_tokens().phase
        named = {"prefill": PREFILL, "decode": DECODE}
        return {name: self._part(phase == value, name) for name, value in named.items() if (phase == value).any()}

    def _part(self, keep_T: Any, name: str) -> Profile:
        provenance = {**self.provenance, "part": name}
        return Profile.from_tokens(self.model, self.domains, self.require_tokens().where(keep_T), provenance)

    def _shards(self) -> Iterator[TokenTrace]:
        for start in range(0, self.tokens.num_tokens if self.tokens else 0, on_disk.TOKENS_PER_SHARD):
            yield self.require_tokens().where(slice(start, start + on_disk.TOKENS_PER_SHARD))

    def save(self, folder: Path) -> None:
        """Write the folder, replacing a profile of that name; nothing is left behind if writing fails.

        Raises:
            CoterieError: something that is not a profile already has that name, or the folder cannot be written.
        """
        on_disk.require_replaceable(folder)
        target = behind_link(folder)
        unfinished = target.with_name(f".{target.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            hashes = dict(on_disk.write_shard(unfinished, number, part) for number, part in enumerate(self._shards()))
            traced = self.tokens.num_tokens if self.tokens else 0
            on_disk.finish(unfinished, folder, self.model, self.domains, self.counts, hashes, traced, self.provenance)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    @classmethod
    def load_from(cls, folder: Path) -> Self:
        """Read and check a profile folder, all of its token sets.

        Raises:
            CoterieError: it is missing, truncated, edited, or of another schema version.
        """
        stored = on_disk.open_profile(folder)
        traces = list(stored.traces())
        tokens = TokenTrace.concatenate(traces) if traces else None
        if (tokens.num_tokens if tokens else 0) != stored.num_traced_tokens:
            raise CoterieError(
                f"{folder}: holds other than num_traced_tokens {stored.num_traced_tokens}; profile again"
            )
        return cls(stored.model, stored.domains, stored.counts, tokens, stored.provenance)


def _odd_sequences(domain_S: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Which sequences to measure on, given the domain of each, in order."""
    odd_S: npt.NDArray[np.bool_] = np.arange(len(domain_S)) % 2 == 1
    of_domain = [np.flatnonzero(domain_S == domain) for domain in np.unique(domain_S)]
    if any(abs(2 * int(odd_S[places].sum()) - len(places)) > 1 for places in of_domain):
        # With batches of one sequence, an even number of domains that take turns would go to one half each.
        for places in of_domain:
            odd_S[places] = (places[0] + np.arange(len(places))) % 2 == 1
    return odd_S


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
