"""`Profile`, the record of one model's routing, and its folder on disk. Knows neither models nor placements.

The folder: `profile.json`, `counts.safetensors`, and `tokens-00000.safetensors` onward where token sets were kept.
It is written under a temporary name and renamed when complete; every file's hash is in `profile.json` and is checked
when the folder is read.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from profiler import counts
from profiler.errors import CoterieError
from profiler.files import require_writable_parent
from profiler.spec import MoESpec

SCHEMA_VERSION = 1
TOKENS_PER_SHARD = 262_144
PREFILL, DECODE = 0, 1
MAX_DOMAINS = 255
"""Domain labels are stored in 8 bits."""


def ids_dtype(num_experts: int) -> type[np.uint8] | type[np.uint16]:
    """The narrowest type for expert ids that keeps its all-ones value free for "no expert"."""
    return np.uint8 if num_experts <= 255 else np.uint16


@dataclass(frozen=True)
class TokenTrace:
    """Which experts each token picked, in every MoE layer.

    Attributes:
        topk_ids: uint8 or uint16 (L, T, K), distinct logical experts of one token in one layer.
        sequence_ids: int32 (T,), tokens of one sequence share a number.
        domain_ids: uint8 (T,), index into the profile's domains.
        phase: uint8 (T,), 0 prefill, 1 decode.
    """

    topk_ids: npt.NDArray[np.unsignedinteger]
    sequence_ids: npt.NDArray[np.int32]
    domain_ids: npt.NDArray[np.uint8]
    phase: npt.NDArray[np.uint8]

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.topk_ids.shape[1])

    def where(self, keep_T: npt.NDArray[np.bool_]) -> TokenTrace:
        """The tokens for which `keep_T` (bool (T,)) holds."""
        return TokenTrace(
            self.topk_ids[:, keep_T], self.sequence_ids[keep_T], self.domain_ids[keep_T], self.phase[keep_T]
        )

    @staticmethod
    def concatenate(traces: Sequence[TokenTrace]) -> TokenTrace:
        """All tokens of several traces, in order; sequence numbers are taken as they are."""
        return TokenTrace(
            np.concatenate([trace.topk_ids for trace in traces], axis=1),
            np.concatenate([trace.sequence_ids for trace in traces]),
            np.concatenate([trace.domain_ids for trace in traces]),
            np.concatenate([trace.phase for trace in traces]),
        )


@dataclass(frozen=True)
class Profile:
    """What one model did on one set of texts.

    Attributes:
        model: the model's MoE layers.
        domains: names of the D domains.
        load: int64 (D, L, E), tokens that picked each expert.
        coactivation: int64 (D, L, E, E), tokens that picked both, zero diagonal.
        transition: int64 (L-1, E, E), from one MoE layer to the next.
        tokens: the token sets; None in a counts-only profile.
        provenance: how it was made: data, seed, versions, date.
    """

    model: MoESpec
    domains: tuple[str, ...]
    load: npt.NDArray[np.int64]
    coactivation: npt.NDArray[np.int64]
    transition: npt.NDArray[np.int64]
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
        _check_tokens(tokens, model, len(domains))
        ids, experts = tokens.topk_ids, model.num_experts
        parts = [ids[:, tokens.domain_ids == domain] for domain in range(len(domains))]
        return cls(
            model=model,
            domains=tuple(domains),
            load=np.stack([counts.load(part, experts) for part in parts]),
            coactivation=np.stack([counts.coactivation(part, experts) for part in parts]),
            transition=counts.transition(ids, experts),
            tokens=tokens,
            provenance=provenance,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that were counted."""
        return int(self.load[:, 0].sum()) // self.model.top_k

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the model, the domains and all arrays: what a plan names as its source."""
        state = hashlib.sha256(json.dumps([self.model.to_json(), self.domains], sort_keys=True).encode())
        for array in [*self._counts().values(), *(self._token_arrays().values() if self.tokens else ())]:
            state.update(np.ascontiguousarray(array).data)
        return state.hexdigest()

    def split_by_sequence(self) -> tuple[Profile, Profile]:
        """Two profiles: even positions in the list of sequences to plan with, odd ones to measure on.

        Raises:
            CoterieError: there are no token sets, or fewer than two sequences.
        """
        tokens = self.require_tokens()
        sequences, position = np.unique(tokens.sequence_ids, return_inverse=True)
        if len(sequences) < 2:
            raise CoterieError("the profile holds 1 sequence, a held-out half needs at least 2: profile more text")
        first, second = (tokens.where(position % 2 == parity) for parity in (0, 1))
        return (
            type(self).from_tokens(self.model, self.domains, first, {**self.provenance, "part": "even sequences"}),
            type(self).from_tokens(self.model, self.domains, second, {**self.provenance, "part": "odd sequences"}),
        )

    def require_tokens(self) -> TokenTrace:
        """The token sets.

        Raises:
            CoterieError: this is a counts-only profile.
        """
        if self.tokens is None:
            raise CoterieError("the profile holds counts only, and ingress and fan_out need token sets: record them")
        return self.tokens

    def _counts(self) -> dict[str, npt.NDArray[np.int64]]:
        return {"load": self.load, "coactivation": self.coactivation, "transition": self.transition}

    def _token_arrays(self) -> dict[str, npt.NDArray[Any]]:
        assert self.tokens is not None
        return {name: getattr(self.tokens, name) for name in TokenTrace.__dataclass_fields__}

    def save(self, folder: Path) -> None:
        """Write the folder, replacing a profile of that name; nothing is left behind if writing fails.

        Raises:
            CoterieError: something that is not a profile already has that name, or the folder cannot be written.
        """
        require_replaceable(folder)
        temporary, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "replaced"))
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            save_file(self._counts(), temporary / "counts.safetensors")
            for shard, start in enumerate(range(0, self.tokens.num_tokens if self.tokens else 0, TOKENS_PER_SHARD)):
                part = slice(start, start + TOKENS_PER_SHARD)
                arrays = {
                    name: np.ascontiguousarray(array[:, part] if name == "topk_ids" else array[part])
                    for name, array in self._token_arrays().items()
                }
                save_file(arrays, temporary / f"tokens-{shard:05}.safetensors")
            header = {
                "schema_version": SCHEMA_VERSION,
                "model": self.model.to_json(),
                "domains": list(self.domains),
                "num_tokens": self.num_tokens,
                "num_traced_tokens": self.tokens.num_tokens if self.tokens else 0,
                "provenance": dict(self.provenance),
                "files": {path.name: _file_hash(path) for path in sorted(temporary.glob("*.safetensors"))},
                "digest": self.digest,
            }
            header["header_digest"] = _header_digest(header)
            (temporary / "profile.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
            if folder.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                folder.replace(replaced)
            temporary.replace(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        except OSError as error:
            if replaced.exists() and not folder.exists():
                replaced.replace(folder)
            raise CoterieError(
                f"{folder}: cannot be written ({error.strerror}); give a writable folder to -o"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    @classmethod
    def load_from(cls, folder: Path) -> Self:
        """Read and check a profile folder.

        Raises:
            CoterieError: it is missing, truncated, edited, or of another schema version.
        """
        if not (folder / "profile.json").is_file():
            raise CoterieError(f"{folder}: not a profile (it has no profile.json); make one with `coterie profile`")
        try:
            header = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
            if header["schema_version"] != SCHEMA_VERSION:
                version = header["schema_version"]
                raise CoterieError(f"{folder}: schema_version {version!r}, this coterie reads {SCHEMA_VERSION}")
            if header["header_digest"] != _header_digest(header):
                raise CoterieError(f"{folder / 'profile.json'}: edited since it was recorded; profile again")
            for name, expected in header["files"].items():
                if Path(name).name != name or _file_hash(folder / name) != expected:
                    raise CoterieError(f"{folder / name}: truncated or edited since it was recorded; profile again")
            arrays = load_file(folder / "counts.safetensors")
            shards = [load_file(folder / name) for name in sorted(header["files"]) if name.startswith("tokens-")]
            profile = cls(
                model=MoESpec.from_json(header["model"]),
                domains=tuple(header["domains"]),
                load=arrays["load"],
                coactivation=arrays["coactivation"],
                transition=arrays["transition"],
                tokens=TokenTrace.concatenate([TokenTrace(**shard) for shard in shards]) if shards else None,
                provenance=header["provenance"],
            )
            expected_digest = header["digest"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise CoterieError(
                f"{folder}: not a readable profile ({type(error).__name__}: {error}); profile again"
            ) from error
        if profile.tokens is not None:
            _check_tokens(profile.tokens, profile.model, len(profile.domains))
        if profile.digest != expected_digest:
            raise CoterieError(f"{folder}: its content does not match its digest, it was edited; profile again")
        return profile


def require_replaceable(folder: Path) -> None:
    """Check that a profile may be written there.

    Raises:
        CoterieError: something that is not a profile has that name, or no folder can be made there.
    """
    if not folder.name or folder.name == "..":
        raise CoterieError(f"{folder}: is no name for a profile; give one such as run.profile to -o")
    if folder.exists() and not (folder / "profile.json").is_file():
        raise CoterieError(f"{folder}: exists and is not a profile; give another name to -o")
    strangers = [path for path in folder.glob("*") if path.name != "profile.json" and path.suffix != ".safetensors"]
    if strangers:
        raise CoterieError(
            f"{folder}: holds {strangers[0].name}, which replacing would delete; give another name to -o"
        )
    require_writable_parent(folder)


def merge(profiles: Sequence[Profile]) -> Profile:
    """One profile of several runs of one model: what profiling the concatenated texts would have given.

    Sequences are renumbered so that none of two runs share a number; domains are united by name.

    Raises:
        CoterieError: the profiles are of different models, or some have token sets and some do not.
    """
    first = profiles[0]
    for other in profiles[1:]:
        if not first.model.routes_like(other.model):
            raise CoterieError(f"cannot merge {first.model.describe()} with {other.model.describe()}: different models")
    if len({profile.tokens is None for profile in profiles}) > 1:
        raise CoterieError("cannot merge counts-only profiles with profiles that hold token sets")
    domains = tuple(dict.fromkeys(domain for profile in profiles for domain in profile.domains))
    if len(domains) > MAX_DOMAINS:
        raise CoterieError(f"{len(domains)} domains together, at most {MAX_DOMAINS} can be told apart; merge fewer")
    load = np.zeros((len(domains), *first.load.shape[1:]), dtype=np.int64)
    coactivation = np.zeros((len(domains), *first.coactivation.shape[1:]), dtype=np.int64)
    traces = []
    next_sequence = 0
    for profile in profiles:
        index = np.array([domains.index(domain) for domain in profile.domains])
        load[index] += profile.load
        coactivation[index] += profile.coactivation
        if profile.tokens is not None:
            _, sequence = np.unique(profile.tokens.sequence_ids, return_inverse=True)
            traces.append(
                replace(
                    profile.tokens,
                    sequence_ids=(sequence + next_sequence).astype(np.int32),
                    domain_ids=index[profile.tokens.domain_ids].astype(np.uint8),
                )
            )
            next_sequence += int(sequence.max()) + 1
    return Profile(
        model=first.model,
        domains=domains,
        load=load,
        coactivation=coactivation,
        transition=np.sum([profile.transition for profile in profiles], axis=0),
        tokens=TokenTrace.concatenate(traces) if traces else None,
        provenance={"merged": [dict(profile.provenance) for profile in profiles]},
    )


def _header_digest(header: Mapping[str, Any]) -> str:
    """SHA-256 over everything else in `profile.json`."""
    rest = {name: value for name, value in header.items() if name != "header_digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_tokens(tokens: TokenTrace, model: MoESpec, num_domains: int) -> None:
    expected = (model.num_layers, tokens.num_tokens, model.top_k)
    if tokens.topk_ids.shape != expected:
        raise CoterieError(f"topk_ids {tokens.topk_ids.shape}: must be (layers, tokens, top-k) = {expected}")
    if tokens.num_tokens == 0:
        raise CoterieError("no token was recorded: give text with at least one token")
    for name in ("sequence_ids", "domain_ids", "phase"):
        if getattr(tokens, name).shape != (tokens.num_tokens,):
            raise CoterieError(f"{name} {getattr(tokens, name).shape}: must be ({tokens.num_tokens},)")
    if int(tokens.topk_ids.max()) >= model.num_experts:
        raise CoterieError(f"topk_ids: expert {int(tokens.topk_ids.max())}, must be below {model.num_experts}")
    if int(tokens.domain_ids.max()) >= num_domains:
        raise CoterieError(f"domain_ids: domain {int(tokens.domain_ids.max())}, must be below {num_domains}")
