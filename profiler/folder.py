"""The profile folder on disk: what its files hold, and how they are checked, written and put in place.
Knows no model in memory.

`profile.json`, `counts.safetensors`, and `tokens-00000.safetensors` onward where token sets were kept.  Every file's
hash is in `profile.json`, so that a byte that changed is found and named.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as to_safetensors

from profiler.counts import Counts
from profiler.errors import CoterieError
from profiler.files import (
    behind_link,
    parse_json,
    put_in_place,
    remove_replaced,
    require_text,
    require_writable_parent,
    sync,
    write_bytes,
)
from profiler.spec import MoESpec
from profiler.trace import TokenTrace

SCHEMA_VERSION = 1
"""Of `profile.json`; another one is refused."""

TOKENS_PER_SHARD = 65_536
"""Tokens whose sets one file holds; the last file may hold fewer."""

CHECKPOINT = "checkpoint"
"""In the folder of an unfinished recording: all that it needs to go on."""


@dataclass(frozen=True)
class StoredProfile:
    """A checked profile folder; its token sets are read shard by shard.

    Attributes:
        folder: where it is.
        model: the model's MoE layers.
        domains: names of the D domains.
        counts: over all tokens.
        shards: names of the files with token sets, in order.
        num_traced_tokens: tokens in them.
        provenance: how the profile was made.
        digest: of the content.
    """

    folder: Path
    model: MoESpec
    domains: tuple[str, ...]
    counts: Counts
    shards: tuple[str, ...]
    num_traced_tokens: int
    provenance: Mapping[str, Any]
    digest: str

    @property
    def num_tokens(self) -> int:
        """Tokens that were counted."""
        return int(self.counts.tokens.sum())

    def traces(self) -> Iterator[TokenTrace]:
        """The token sets, one shard in memory at a time.

        Raises:
            CoterieError: a shard does not fit the model.
        """
        for name in self.shards:
            try:
                trace = TokenTrace(**parse_safetensors((self.folder / name).read_bytes()))
                trace.require(self.model, len(self.domains))
            except (OSError, TypeError, AttributeError, IndexError, SafetensorError, CoterieError) as error:
                raise CoterieError(f"{self.folder / name}: not readable ({error}); profile again") from error
            yield trace


def open_profile(folder: Path) -> StoredProfile:
    """Read a profile folder's header and counts, and check every file against its hash.

    Raises:
        CoterieError: it is missing, unfinished, truncated, edited, or of another schema version; the message names the
            file.
    """
    if not (folder / "profile.json").is_file():
        if (folder / CHECKPOINT).is_file():
            raise CoterieError(f"{folder}: an unfinished recording; finish it with `coterie profile ... --resume`")
        raise CoterieError(f"{folder}: not a profile (it has no profile.json); make one with `coterie profile`")
    try:
        header = parse_json((folder / "profile.json").read_text(encoding="utf-8"))
        if header["schema_version"] != SCHEMA_VERSION:
            version = header["schema_version"]
            raise CoterieError(
                f"{folder}: schema_version {version!r}, this coterie reads {SCHEMA_VERSION}; use the one that made it"
            )
        if header["header_digest"] != header_digest(header):
            raise CoterieError(f"{folder / 'profile.json'}: edited since it was recorded; profile again")
        traced, domains = header["num_traced_tokens"], header["domains"]
        if type(traced) is not int or traced < 0 or not isinstance(header["provenance"], dict):
            raise CoterieError(f"{folder / 'profile.json'}: num_traced_tokens {traced!r} or provenance; profile again")
        if not isinstance(domains, list) or not all(isinstance(domain, str) for domain in domains):
            raise CoterieError(f"{folder / 'profile.json'}: domains {domains!r} must be names; profile again")
        for name, expected in header["files"].items():
            if Path(name).name != name:
                raise CoterieError(f"{folder / 'profile.json'}: names {name!r}, which is no file of its own")
            require_hash(folder / name, expected)
        arrays = parse_safetensors((folder / "counts.safetensors").read_bytes())
        stored = StoredProfile(
            folder=folder,
            model=MoESpec.from_json(header["model"]),
            domains=tuple(domains),
            counts=_read_counts(arrays),
            shards=tuple(sorted(name for name in header["files"] if name.startswith("tokens-"))),
            num_traced_tokens=traced,
            provenance=header["provenance"],
            digest=header["digest"],
        )
        expected_digest = content_digest(stored.model, stored.domains, header["files"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise CoterieError(
            f"{folder}: not a readable profile ({type(error).__name__}: {error}); profile again"
        ) from error
    _check_counts(stored)
    if stored.digest != expected_digest:
        raise CoterieError(f"{folder}: its content does not match its digest, it was edited; profile again")
    return stored


def require_replaceable(folder: Path) -> None:
    """Check that a profile may be written there.

    Raises:
        CoterieError: something that is not a profile has that name, or no folder can be made there.
    """
    if not folder.name or folder.name == "..":
        raise CoterieError(f"{folder}: is no name for a profile; give one such as run.profile to -o")
    if folder.exists() and not (folder / "profile.json").is_file():
        raise CoterieError(f"{folder}: exists and is not a profile; give another name to -o")
    others = strangers(folder)
    if others:
        raise CoterieError(f"{folder}: holds {others[0].name}, which replacing would delete; give another name to -o")
    require_writable_parent(behind_link(folder))


def sources(digest: str, provenance: Mapping[str, Any]) -> list[str]:
    """Digests of a profile and of those that it was split from or united of, as its provenance names them."""
    made_from = provenance.get("made_from")
    return [digest, *(made_from if isinstance(made_from, list) else [])]


def strangers(folder: Path) -> list[Path]:
    """What is in the folder of a profile, complete or not, and never was written by coterie."""
    name = r"(profile\.json|checkpoint|counts\.safetensors|tokens-\d{5,}\.safetensors)"
    own = re.compile(rf"{name}|\.{name}\.partial")
    return [path for path in folder.glob("*") if not own.fullmatch(path.name)]


def write_shard(unfinished: Path, number: int, trace: TokenTrace) -> tuple[str, str]:
    """Write one shard of at most `TOKENS_PER_SHARD` tokens, not yet surely on the disk; returns its name and hash.

    Raises:
        CoterieError: it cannot be written.
    """
    name, data = shard_name(number), shard_bytes(trace)
    write_bytes(unfinished / name, data, to_disk=False)  # waiting would hold up each pass that completes a shard
    return name, hashlib.sha256(data).hexdigest()


def finish(
    unfinished: Path,
    folder: Path,
    model: MoESpec,
    domains: Sequence[str],
    counts: Counts,
    shard_hashes: Mapping[str, str],
    num_traced_tokens: int,
    provenance: Mapping[str, Any],
) -> None:
    """Add counts and header to a folder of shards, and give it its name; a profile of that name is replaced.

    Raises:
        CoterieError: something cannot be written, or a name is no text; what was there before still is then.
    """
    require_text([model.to_json(), list(domains), dict(provenance)])  # else what was written could not be read
    folder = behind_link(folder)
    sync(unfinished / name for name in shard_hashes)
    data = counts_bytes(counts)
    write_bytes(unfinished / "counts.safetensors", data)
    files = {"counts.safetensors": hashlib.sha256(data).hexdigest(), **shard_hashes}
    header = {
        "schema_version": SCHEMA_VERSION,
        "model": model.to_json(),
        "domains": list(domains),
        "num_tokens": int(counts.tokens.sum()),
        "num_traced_tokens": num_traced_tokens,
        "provenance": dict(provenance),
        "files": files,
        "digest": content_digest(model, domains, files),
    }
    header["header_digest"] = header_digest(header)
    write_bytes(unfinished / "profile.json", (json.dumps(header, indent=2) + "\n").encode())
    put_in_place(unfinished, folder)
    remove_remains(folder, files)  # last, so that a run that is killed before can still go on


def remove_remains(folder: Path, files: Iterable[str]) -> None:
    """Remove what a run leaves that is killed when its profile, of these tensor files, has got its name."""
    remove_replaced(folder)
    kept = {"profile.json", *files, *(path.name for path in strangers(folder))}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink()


def shard_name(number: int) -> str:
    """Of the shard with this number, from 0."""
    return f"tokens-{number:05}.safetensors"


def shard_bytes(trace: TokenTrace) -> bytes:
    """What the file of a shard holds."""
    return to_safetensors({name: np.ascontiguousarray(array) for name, array in trace.arrays().items()})


def counts_bytes(counts: Counts) -> bytes:
    """What `counts.safetensors` holds: transitions over all domains, and of each where there are several."""
    arrays = counts.arrays()
    by_domain = arrays.pop("transition")
    several = {"domain_transition": by_domain} if len(by_domain) > 1 else {}
    return to_safetensors({**arrays, "transition": by_domain.sum(axis=0), **several})


def _read_counts(arrays: Mapping[str, Any]) -> Counts:
    by_domain = arrays["domain_transition"] if len(arrays["tokens"]) > 1 else arrays["transition"][None]
    return Counts(arrays["tokens"], arrays["load"], arrays["coactivation"], by_domain)


def _check_counts(stored: StoredProfile) -> None:
    domains, layers, experts = len(stored.domains), stored.model.num_layers, stored.model.num_experts
    expected = {
        "tokens": (domains,),
        "load": (domains, layers, experts),
        "coactivation": (domains, layers, experts, experts),
        "transition": (domains, layers - 1, experts, experts),
    }
    for name, array in stored.counts.arrays().items():
        if array.shape != expected[name] or array.dtype != np.int64:
            raise CoterieError(
                f"{stored.folder / 'counts.safetensors'}: {name} is {array.dtype} {array.shape}, must be int64 "
                f"{expected[name]}; profile again"
            )


def content_digest(model: MoESpec, domains: Sequence[str], files: Mapping[str, str]) -> str:
    """SHA-256 over the model, the domains and the hashes of all tensor files: what a plan names as its source."""
    content = [model.to_json(), list(domains), dict(files)]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def header_digest(header: Mapping[str, Any]) -> str:
    """SHA-256 over everything else in `profile.json`."""
    rest = {name: value for name, value in header.items() if name != "header_digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def require_hash(path: Path, expected: str) -> None:
    """Check that a file holds what was written.

    Raises:
        CoterieError: it is not there, or a byte of it has changed.
    """
    try:
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == expected
    except OSError as error:
        raise CoterieError(f"{path}: cannot be read ({error.strerror}); profile again") from error
    if not same:
        raise CoterieError(f"{path}: truncated or edited since it was recorded; profile again")
