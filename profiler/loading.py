"""Models by path, by hub id, or the embedded one; and a whole profile from a model and its texts."""

from __future__ import annotations

import datetime
import importlib.metadata
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from profiler import zoo
from profiler.calibration import Batch, Document, make_batches
from profiler.errors import CoterieError
from profiler.profile import Profile
from profiler.recorder import Recorder


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal language model, in evaluation mode, with its tokenizer and the name it goes by."""

    name: str
    model: Any
    tokenizer: Any

    def batches(
        self, documents: Sequence[Document], sequence_length: int, batch_size: int, max_tokens: int | None = None
    ) -> list[Batch]:
        """`make_batches` with this model's tokenizer, checked against its vocabulary.

        Raises:
            CoterieError: a size is below 1, or the tokenizer is not the model's.
        """
        batches = make_batches(documents, self.tokenizer, sequence_length, batch_size, max_tokens)
        if not batches:
            raise CoterieError(
                f"{self.name}: its tokenizer makes 0 tokens of the text; add the model's tokenizer files"
            )
        largest = max(int(batch.input_ids.max()) for batch in batches)
        vocab_size = self.model.config.get_text_config().vocab_size
        if largest >= vocab_size:
            raise CoterieError(
                f"{self.name}: its tokenizer gives token {largest}, the vocabulary has {vocab_size}; "
                "put the model's own tokenizer there"
            )
        return batches


def default_device() -> str:
    """The accelerator if this machine has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator.type if accelerator is not None else "cpu"


def load_model(model: str | None, device: str | None = None) -> LoadedModel:
    """Load a model for inference, without running code that comes with it.

    Args:
        model: a folder or a hub id; None for the embedded model.
        device: such as `cpu` or `cuda:0`; None for the accelerator if there is one.  On the CPU weights are taken in
            float32, elsewhere as they were saved.

    Raises:
        CoterieError: there is no such model or it cannot be loaded.
    """
    # Importing transformers takes seconds: only where a model is really loaded.
    from huggingface_hub.utils.logging import set_verbosity_error
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    set_verbosity_error()  # it would report each retry; the outcome is one line of ours
    source = str(zoo.MODEL) if model is None else model
    if not Path(source).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise CoterieError(
            f"{source}: no such model folder; give a folder with config.json, or a hub id like owner/name"
        )
    device = device or default_device()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        loaded = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32 if device == "cpu" else "auto")
    except Exception as error:  # what loading a broken folder raises is any library's choice
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CoterieError(
            f"{source}: cannot be loaded as a model ({reason}); give a model folder or hub id"
        ) from error
    try:
        loaded = loaded.to(device)
    except (AssertionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CoterieError(f"device {device!r}: cannot be used ({reason}); give one such as cpu or cuda:0") from error
    name = zoo.NAME if model is None else Path(source).name if Path(source).is_dir() else source
    return LoadedModel(name, loaded.eval(), tokenizer)


@torch.no_grad()
def profile_model(
    loaded: LoadedModel,
    documents: Sequence[Document],
    *,
    sequence_length: int = 256,
    batch_size: int = 16,
    max_tokens: int | None = None,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Profile:
    """Run a model over texts and record which experts each token picked.

    Args:
        on_progress: called with tokens done and tokens in all, after every batch.

    Raises:
        CoterieError: the model has no MoE layers, or a size is below 1.
    """
    recorder = Recorder(loaded.model, loaded.name)
    batches = loaded.batches(documents, sequence_length, batch_size, max_tokens)
    domains = list(dict.fromkeys(document.domain for document in documents))
    total, done = sum(batch.num_tokens for batch in batches), 0
    on_progress(done, total)
    with recorder:
        for batch in batches:
            recorder.domain_id = domains.index(batch.domain)
            loaded.model(
                input_ids=batch.input_ids.to(loaded.model.device),
                attention_mask=batch.attention_mask.to(loaded.model.device),
                use_cache=False,
            )
            done += batch.num_tokens
            on_progress(done, total)
    provenance = {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "max_tokens": max_tokens,
        "model_revision": getattr(loaded.model.config, "_commit_hash", None),
        "versions": {package: importlib.metadata.version(package) for package in ("torch", "transformers")},
    }
    return Profile.from_tokens(recorder.spec, domains, recorder.trace(), provenance)
