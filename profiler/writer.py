"""`ProfileWriter`: a profile that grows on disk while memory stays constant, and survives being killed.
Knows no models.

Tokens are counted as they come.  Their sets go into shards of a fixed size, or into a reservoir of a fixed size.  From
time to time a checkpoint is written: the counts, the tokens that no complete shard holds yet, and how far the run has
come.  A run that goes on from it writes the same bytes as one that was never killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as parse_safetensors
from safetensors.numpy import save as to_safetensors

from profiler.counts import Counts, Tally
from profiler.errors import CoterieError
from profiler.files import behind_link, locked, require_text, sync, write_bytes
from profiler.folder import (
    CHECKPOINT,
    TOKENS_PER_SHARD,
    StoredProfile,
    finish,
    open_profile,
    require_hash,
    require_replaceable,
    strangers,
    write_shard,
)
from profiler.spec import MoESpec
from profiler.trace import RowSketch, TokenTrace

CHECKPOINT_SECONDS = 10.0
"""Age of the last checkpoint, in seconds, from which another is written."""

CHECKPOINT_SHARE = 0.02
"""Of the time, what goes into checkpoints at most."""

TOKENS_PER_COUNT = 16_384
"""Passes are counted together: the counters come into the fastest memory once for all of them."""

Arrays = dict[str, npt.NDArray[Any]]


class Reservoir:
    """A uniform sample of a stream of tokens: each gets a pseudo-random number, those with the smallest stay.

    Which tokens stay depends on the seed and on their places in the stream only, not on how the stream was cut.
    """

    def __init__(self, capacity: int, seed: int) -> None:
        """Empty.

        Args:
            capacity: tokens to keep, at least 1.
        """
        self.capacity, self.seed = capacity, seed
        self.seen = 0
        self._limit = np.uint64(2**64 - 1)  # numbers above it cannot be among the smallest any more
        self._places: list[npt.NDArray[np.int64]] = []
        self._traces: list[TokenTrace] = []
        self._held = 0

    def add(self, trace: TokenTrace) -> None:
        """Offer the next tokens of the stream."""
        places = np.arange(self.seen, self.seen + trace.num_tokens)
        keep = self._numbers(places) <= self._limit
        self.seen += trace.num_tokens
        if keep.any():
            self._places.append(places[keep])
            self._traces.append(trace.where(keep))
            self._held += int(keep.sum())
        if self._held > self.capacity * 5 // 4 + TOKENS_PER_SHARD:
            self._shrink()

    def trace(self) -> TokenTrace | None:
        """The sample in the order of the stream; None if there was no token."""
        self._shrink()
        if not self._traces:
            return None
        self._places, self._traces = [np.concatenate(self._places)], [TokenTrace.concatenate(self._traces)]
        return self._traces[0]

    def state(self) -> Arrays:
        """The arrays to go on from."""
        trace = self.trace()
        return {} if trace is None else {"places": self._places[0], **trace.arrays()}

    def restore(self, seen: int, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Go on from what `state` gave after `seen` tokens."""
        self.seen = seen
        if state:
            arrays = dict(state)
            self._places = [arrays.pop("places")]
            self._traces = [TokenTrace(**arrays)]
            if self._places[0].shape != (self._traces[0].num_tokens,):
                raise ValueError(f"places {self._places[0].shape} of {self._traces[0].num_tokens} tokens")
            self._held = len(self._places[0])
            self._shrink()

    def _shrink(self) -> None:
        if self._held <= self.capacity:
            return
        numbers = np.concatenate([self._numbers(places) for places in self._places])
        self._limit = np.partition(numbers, self.capacity - 1)[self.capacity - 1]
        # Part by part: all together a second time would double the memory.
        for part, places in enumerate(self._places):
            keep = self._numbers(places) <= self._limit
            self._places[part], self._traces[part] = places[keep], self._traces[part].where(keep)
        self._held = self.capacity

    def _numbers(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """SplitMix64 (Steele, Lea and Flood, 2014): distinct places get distinct numbers."""
        state = (places.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        state += np.uint64(np.random.SeedSequence(self.seed).generate_state(1, np.uint64)[0])
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


class ProfileWriter:
    """Counts and keeps tokens in `<folder>.partial` until `finish` gives the profile its name.

    That folder is locked until then, or until `close` or `discard`, so that no other run writes there.

    Attributes:
        position: what the last checkpoint was told: how far the run has come.  Empty at the start of a run.
        num_tokens: counted so far.
    """

    def __init__(
        self,
        folder: Path,
        model: MoESpec,
        domains: Sequence[str],
        *,
        max_traced_tokens: int | None = None,
        seed: int = 0,
        run: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        """Begin, or go on with what a killed run has left.

        Args:
            folder: the profile to be.
            domains: names of the domains that tokens may have.
            max_traced_tokens: keep the sets of so many tokens, a uniform sample; None for all, 0 for counts only.
            seed: of the sample.
            run: what determines the tokens, JSON; only a run that is the same may go on.
            resume: go on from the checkpoint, if there is one.

        Raises:
            CoterieError: the folder cannot be written, a name is no text, an unfinished run is there and `resume` is
                not set, it was another run, or one that is still at work.
        """
        require_replaceable(folder)
        require_text([model.to_json(), list(domains)])
        if max_traced_tokens is not None and max_traced_tokens < 0:
            raise CoterieError(f"traced tokens {max_traced_tokens}: must be at least 0")
        self.position: dict[str, Any] = {}
        self._folder, self._unfinished = folder, unfinished_folder(folder)
        self._model, self._domains = model, tuple(domains)
        self._tally = Tally(model, len(domains))
        self._sketch = RowSketch.empty()
        self._reservoir = Reservoir(max_traced_tokens, seed) if max_traced_tokens else None
        self._keeps_all = max_traced_tokens is None
        self._uncounted: list[TokenTrace] = []
        self._pending: list[TokenTrace] = []  # not in a shard yet
        self._num_uncounted = self._num_pending = 0  # tokens in them
        self._hashes: dict[str, str] = {}
        self._synced = 0  # shards that are surely on the disk
        self._traced = 0
        self._run = {"model": model.to_json(), "domains": list(domains), "max_traced_tokens": max_traced_tokens}
        self._run |= {"seed": seed, **(run or {})}
        self._checkpointed_at, self._pause = time.monotonic(), CHECKPOINT_SECONDS
        self._let_go = weakref.finalize(self, _hold(self._unfinished).close)
        try:
            self._begin(resume)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let others write there; what is unfinished stays."""
        self._let_go()

    def discard(self) -> None:
        """Remove what is unfinished."""
        self.close()
        discard_unfinished(self._folder)

    def _begin(self, resume: bool) -> None:
        if not (self._unfinished / CHECKPOINT).is_file() and not strangers(self._unfinished):
            _clear(self._unfinished)  # killed before its first checkpoint: there is nothing to go on from
        elif not resume:
            raise CoterieError(
                f"{self._unfinished}: an unfinished recording is there; go on with --resume, or remove it"
            )
        else:
            try:
                self._restore()
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise CoterieError(
                    f"{self._unfinished / CHECKPOINT}: written by another version of coterie "
                    f"({type(error).__name__}: {error}); go on with that one, or remove {self._unfinished}"
                ) from error

    @property
    def num_tokens(self) -> int:
        """Counted so far."""
        self._count()
        return int(self._tally.state()["tokens"].sum())

    def dummy_rows(self) -> npt.NDArray[np.uint64]:
        """Rows so common among what was added that they are no text; see `RowSketch.dummy_tokens`."""
        num_tokens = self.num_tokens  # counts what is not counted yet
        return self._sketch.dummy_rows(self._model, num_tokens)

    def add(self, trace: TokenTrace) -> None:
        """Count tokens and keep their sets.

        Raises:
            CoterieError: they do not fit the model, and none of them is counted; or a shard cannot be written, and
                the run has to go on from its last checkpoint.
        """
        trace.require(self._model, len(self._domains))
        self._uncounted.append(trace)
        self._num_uncounted += trace.num_tokens
        if self._num_uncounted >= TOKENS_PER_COUNT:
            self._count()
        self.keep(trace)

    def _count(self) -> None:
        if self._uncounted:
            trace = TokenTrace.concatenate(self._uncounted)
            self._uncounted, self._num_uncounted = [], 0
            self._tally.add(trace)
            self._sketch = self._sketch.add(trace.row_hashes())

    def add_counts(self, counts: Counts, domains: Sequence[int]) -> None:
        """Add counts of tokens whose sets come through `keep` or not at all; domain d of theirs is `domains[d]`."""
        self._tally.add_counts(counts, list(domains))

    def keep(self, trace: TokenTrace) -> None:
        """Keep token sets without counting them."""
        if self._reservoir:
            self._reservoir.add(trace)
        elif self._keeps_all:
            self._pending.append(trace)
            self._num_pending += trace.num_tokens
            if self._num_pending >= TOKENS_PER_SHARD:
                self._write_shards(last=False)

    def checkpoint_if_due(self, position: Mapping[str, Any]) -> None:
        """Write a checkpoint if the last one is old; a run that is killed later goes on from `position`."""
        if time.monotonic() - self._checkpointed_at >= self._pause:
            self.checkpoint(position)

    def checkpoint(self, position: Mapping[str, Any]) -> None:
        """Write a checkpoint now.

        Raises:
            CoterieError: it cannot be written; the one before it stays.
        """
        started = time.monotonic()
        self._count()
        sync(self._unfinished / name for name in list(self._hashes)[self._synced :])
        self._synced = len(self._hashes)
        note = {
            "run": self._run,
            "position": dict(position),
            "hashes": self._hashes,
            "traced": self._traced,
            "seen": self._reservoir.seen if self._reservoir else 0,
        }
        pending = TokenTrace.concatenate(self._pending).arrays() if self._pending else {}
        groups: dict[str, Mapping[str, npt.NDArray[Any]]] = {
            "tally": self._tally.state(),
            "sketch": {"hashes": self._sketch.hashes, "counts": self._sketch.counts},
            "pending": pending,
            "reservoir": self._reservoir.state() if self._reservoir else {},
        }
        arrays = {
            f"{group}.{name}": np.ascontiguousarray(array)
            for group, named in groups.items()
            for name, array in named.items()
        }
        arrays["note"] = np.frombuffer(json.dumps(note).encode(), dtype=np.uint8)
        data = to_safetensors(arrays)
        write_bytes(self._unfinished / CHECKPOINT, hashlib.sha256(data).digest(), data)
        self.position = dict(position)
        self._checkpointed_at = time.monotonic()
        self._pause = max(CHECKPOINT_SECONDS, (self._checkpointed_at - started) / CHECKPOINT_SHARE)

    def finish(self, provenance: Mapping[str, Any]) -> StoredProfile:
        """Complete the profile and give it its name.

        Raises:
            CoterieError: there was no token, or something cannot be written; the unfinished run stays then.
        """
        self._count()
        counts = self._tally.counts()
        if counts.tokens.sum() == 0:
            raise CoterieError("no token was recorded: give text with at least one token")
        if self._reservoir:
            sample = self._reservoir.trace()
            self._hashes, self._traced, self._synced = {}, 0, 0
            self._pending = [] if sample is None else [sample]
        self._write_shards(last=True)
        dummy = self._sketch.dummy_tokens(self._model, self.num_tokens)
        provenance = {**provenance, **({"dummy_tokens": dummy} if dummy else {})}
        self._unfinished.mkdir(parents=True, exist_ok=True)
        finish(
            self._unfinished,
            self._folder,
            self._model,
            self._domains,
            counts,
            self._hashes,
            self._traced,
            provenance,
        )
        self.close()
        return open_profile(self._folder)

    def _write_shards(self, last: bool) -> None:
        if not self._pending:
            return
        rest = TokenTrace.concatenate(self._pending)
        while rest.num_tokens >= TOKENS_PER_SHARD or (last and rest.num_tokens):
            full = rest.where(slice(TOKENS_PER_SHARD))
            name, digest = write_shard(self._unfinished, len(self._hashes), full)
            self._hashes[name] = digest
            self._traced += full.num_tokens
            rest = rest.where(slice(TOKENS_PER_SHARD, None))
            self._pending, self._num_pending = [rest] if rest.num_tokens else [], rest.num_tokens

    def _restore(self) -> None:
        path = self._unfinished / CHECKPOINT
        try:
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() != data[:32]:
                raise CoterieError(f"{path}: truncated or edited; remove {self._unfinished} and record again")
            arrays = parse_safetensors(data[32:])
            note = json.loads(arrays["note"].tobytes())
        except (OSError, SafetensorError) as error:
            raise CoterieError(f"{path}: cannot be read ({error}); record again") from error
        own = json.loads(json.dumps(self._run))
        if missing := own.keys() - note["run"].keys():
            raise KeyError(min(missing))  # of another version
        for key in sorted(own.keys() | note["run"].keys()):
            if own.get(key) != note["run"].get(key):
                before, now = (json.dumps(run.get(key)) for run in (note["run"], own))
                if len(before) + len(now) > 200:
                    before, now = "one thing", "another"
                raise CoterieError(
                    f"{self._unfinished}: {key} was {before}, now it is {now}; go on with the same, or remove it"
                )

        def group(name: str) -> Arrays:
            return {key.partition(".")[2]: array for key, array in arrays.items() if key.startswith(f"{name}.")}

        self.position = note["position"]
        self._hashes, self._traced = note["hashes"], note["traced"]
        self._synced = len(self._hashes)
        for name, expected in self._hashes.items():
            require_hash(self._unfinished / name, expected)
        self._tally.restore(group("tally"))
        self._sketch = RowSketch(**group("sketch"))
        if self._sketch.hashes.ndim != 1 or self._sketch.hashes.shape != self._sketch.counts.shape:
            raise ValueError(f"hashes {self._sketch.hashes.shape} of {self._sketch.counts.shape} rows")
        pending = group("pending")
        self._pending = [TokenTrace(**pending)] if pending else []
        for part in self._pending:
            part.require(self._model, len(self._domains))
        self._num_pending = sum(part.num_tokens for part in self._pending)
        if self._reservoir:
            self._reservoir.restore(note["seen"], group("reservoir"))


def unfinished_folder(folder: Path) -> Path:
    """Where a recording lies until it is complete."""
    target = behind_link(folder)
    return target.with_name(f"{target.name}.partial")


def discard_unfinished(folder: Path) -> None:
    """Remove what a killed run has left, unless another run is at work on it."""
    unfinished = unfinished_folder(folder)
    with contextlib.suppress(CoterieError), contextlib.ExitStack() as held:
        if unfinished.is_dir():
            held.enter_context(_hold(unfinished))
            _clear(unfinished)
            with contextlib.suppress(OSError):  # somebody's own files are there
                unfinished.rmdir()


def _clear(unfinished: Path) -> None:
    """Remove all that coterie wrote there."""
    others = strangers(unfinished)
    for path in unfinished.glob("*"):
        if path not in others:
            with contextlib.suppress(OSError):
                path.unlink()


def _hold(unfinished: Path) -> contextlib.ExitStack:
    """Make the folder if it is not there, and lock it until the stack is closed, or this process ends.

    Raises:
        CoterieError: it cannot be made, or another run has locked it.
    """
    held = contextlib.ExitStack()
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        held.enter_context(locked(unfinished))
    except BlockingIOError as error:
        raise CoterieError(
            f"{unfinished}: another run is writing there; wait until it is done, or give another name to -o"
        ) from error
    except OSError as error:
        if not unfinished.is_dir():  # else it is on a file system that locks no folders, as some of networks
            raise CoterieError(
                f"{unfinished}: cannot be written ({error.strerror}); give a writable folder to -o"
            ) from error
    return held
