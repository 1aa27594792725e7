"""A model and its texts in, a profile folder out: the run that `coterie profile` makes. Keeps nothing itself."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from profiler.batches import Batch
from profiler.documents import Document
from profiler.errors import CoterieError
from profiler.files import behind_link
from profiler.folder import StoredProfile, open_profile, remove_remains
from profiler.loading import LoadedModel
from profiler.recorder import Recorder
from profiler.trace import TokenTrace
from profiler.writer import ProfileWriter, unfinished_folder

_NEW_NOTES = ("dtype", "config")  # which complete recordings of older versions are without


@torch.no_grad()
def profile_model(
    loaded: LoadedModel,
    documents: Sequence[Document],
    out: Path,
    *,
    sequence_length: int = 256,
    batch_size: int = 16,
    max_tokens: int | None = None,
    decode_tokens: int = 0,
    as_chat: bool = False,
    max_traced_tokens: int | None = None,
    weights: bool = False,
    seed: int = 0,
    resume: bool = False,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> StoredProfile:
    """Run a model over texts and record which experts each token picks.

    Memory does not grow with the texts.  A run that was killed goes on with `resume` and ends with the same counts; one
    that is complete stays as it is.

    Args:
        out: the profile folder.
        max_tokens: stop after so many tokens of text.
        decode_tokens: after each sequence let the model go on, sampling from its own distribution, and record so many
            tokens of decoding.
        as_chat: put plain text through the tokenizer's chat template.
        max_traced_tokens: keep the sets of so many tokens, a uniform sample; None for all.
        weights: record `topk_weights` too.
        seed: of the sample and of decoding.
        on_progress: called with tokens done and tokens of text in all, after every batch.

    Raises:
        CoterieError: the model has no MoE layers or its router gives no numbers, a size is below 1, or the folder
            cannot be written or is a recording of another model.
    """
    _require_same_model(out, loaded.name)
    if decode_tokens < 0:
        raise CoterieError(f"decode tokens {decode_tokens}: must be at least 0")
    batches = loaded.batches(
        documents, sequence_length, batch_size, max_tokens, as_chat=as_chat, pad_left=decode_tokens > 0
    )
    domains = list(dict.fromkeys(document.domain for document in documents))
    of_batch: list[TokenTrace] = []
    recorder = Recorder(loaded.model, loaded.name, weights=weights, on_tokens=of_batch.append)
    run = {
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "decode_tokens": decode_tokens,
        "weights": weights,
        "text": batches.digest,
        "model_weights": _identity(loaded.model),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "config": _config_digest(loaded.model),
    }
    told = {**run, "seed": seed, "max_traced_tokens": max_traced_tokens}
    done = _stored(out) if resume and not unfinished_folder(out).exists() else None
    if done is not None and told.items() <= {**{key: run[key] for key in _NEW_NOTES}, **done.provenance}.items():
        remove_remains(behind_link(out), ["counts.safetensors", *done.shards])
        on_progress(batches.num_tokens, batches.num_tokens)
        return done
    writer = ProfileWriter(
        out,
        recorder.spec,
        domains,
        max_traced_tokens=max_traced_tokens,
        seed=seed,
        run=run,
        resume=resume,
    )
    with contextlib.closing(writer):
        start = {"batches": 0, "tokens": 0, "next_sequence": 0}
        position = writer.position or start
        if [type(position.get(name)) for name in start] != [int] * len(start):
            raise CoterieError(f"{out}: its checkpoint says it is at {position}, no place to go on from; remove it")
        recorder.next_sequence = position["next_sequence"]
        counting = False
        try:
            on_progress(position["tokens"], batches.num_tokens)
            with recorder:
                first = position["batches"]
                for number, batch in enumerate(batches.start_at(first), first):
                    recorder.domain_id = domains.index(batch.domain)
                    _run(loaded, batch, decode_tokens, seed * 1_000_003 + number)
                    counting = True
                    if of_batch:
                        writer.add(TokenTrace.concatenate(of_batch))
                        of_batch.clear()
                    position = {
                        "batches": number + 1,
                        "tokens": position["tokens"] + batch.num_tokens,
                        "next_sequence": recorder.next_sequence,
                    }
                    writer.checkpoint_if_due(position)  # counts what is not counted yet
                    counting = False
                    on_progress(position["tokens"], batches.num_tokens)
        except BaseException:
            if position["batches"] and not counting:  # what was counted ends with a whole batch
                with contextlib.suppress(CoterieError):
                    writer.checkpoint(position)
            if not writer.position:  # no checkpoint, so nothing to go on from
                writer.discard()
            raise
        try:
            return writer.finish({**_provenance(loaded), **told})
        except CoterieError:
            with contextlib.suppress(CoterieError):
                writer.checkpoint(position)
            if not writer.position:
                writer.discard()
            raise


def _require_same_model(out: Path, name: str) -> None:
    """Check that no recording of another model would be replaced, such as by a command that was left its defaults.

    Raises:
        CoterieError: there is one.
    """
    there = _stored(out)
    if there is not None and there.model.name != name:
        raise CoterieError(
            f"{out}: is a recording of {there.model.name}, not of {name}; give another name to -o, or remove it"
        )


def _stored(folder: Path) -> StoredProfile | None:
    """The complete recording of that name, if there is one that can be read."""
    try:
        return open_profile(folder)
    except CoterieError:
        return None


def _run(loaded: LoadedModel, batch: Batch, decode_tokens: int, seed: int) -> None:
    inputs = {
        "input_ids": batch.input_ids.to(loaded.input_device),
        "attention_mask": batch.attention_mask.to(loaded.input_device),
    }
    if not decode_tokens:
        loaded.model(**inputs, use_cache=False)
        return
    from transformers import GenerationConfig  # takes seconds, and the model has it loaded already

    own = loaded.model.generation_config
    ends = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # What else a model's own may ask for would bend its distribution, run a prompt several times or keep no cache.
    loaded.model.generation_config = GenerationConfig(do_sample=True, top_k=0, use_cache=True, **ends)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            loaded.model.generate(**inputs, max_new_tokens=decode_tokens + 1)  # the last one that is made is not run
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise CoterieError(
            f"{loaded.name}: its logits are no finite numbers (NaN or infinite) in {loaded.model.dtype}, so it cannot "
            "go on with a text; give another --dtype, or --decode-tokens 0"
        ) from error
    finally:
        loaded.model.generation_config = own


def _identity(model: Any) -> str | dict[str, list[int]] | None:
    """What tells a model's weights from others: the hub's revision, or size and time of change of a folder's files."""
    revision: str | None = getattr(model.config, "_commit_hash", None)
    folder = Path(model.name_or_path)
    if revision or not model.name_or_path or not folder.is_dir():
        return revision
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _config_digest(model: Any) -> str:
    """SHA-256 in hex of a model's config, whatever transformers wrote it."""
    config = json.loads(model.config.to_json_string())
    config.pop("transformers_version", None)
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _provenance(loaded: LoadedModel) -> dict[str, Any]:
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model_revision": getattr(loaded.model.config, "_commit_hash", None),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
    }
