"""Models by path, by hub id, or the embedded one. Knows no routing."""

from __future__ import annotations

import contextlib
import os
import re
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from profiler import zoo
from profiler.batches import Batch, Batches, make_batches
from profiler.documents import Document
from profiler.errors import CoterieError, first_line
from profiler.families import read_spec
from profiler.files import temporary_folder
from profiler.spec import MoESpec

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types in which `load_model` takes weights; `auto` is as they were saved."""

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""transformers' names for ways to spread a model over accelerators."""


@dataclass(frozen=True)
class LoadedModel:
    """A transformers causal language model, in evaluation mode, with its tokenizer and the name it goes by."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def input_device(self) -> torch.device:
        """Where the model takes its tokens; its weights may be elsewhere, or on no device until they are used."""
        embeddings = self.model.get_input_embeddings()
        # accelerate brings offloaded weights to this device for each call.
        execution_device = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
        return torch.device(embeddings.weight.device if execution_device is None else execution_device)

    def batches(
        self,
        documents: Sequence[Document],
        sequence_length: int,
        batch_size: int,
        max_tokens: int | None = None,
        *,
        as_chat: bool = False,
        pad_left: bool = False,
    ) -> Batches:
        """`make_batches` with this model's tokenizer, again and again; each batch is checked against its vocabulary.

        Raises:
            CoterieError: a size is below 1, or there is no chat template; when counting or iterating also if the
                tokenizer is not the model's.
        """

        def make(skip: int) -> Iterator[Batch]:
            return make_batches(
                documents,
                self.tokenizer,
                sequence_length,
                batch_size,
                max_tokens,
                as_chat=as_chat,
                pad_left=pad_left,
                skip=skip,
            )

        make(0)  # says at once what is wrong with the arguments; reads nothing
        return Batches(lambda skip: self._checked(make(skip), skip))

    def _checked(self, batches: Iterator[Batch], skipped: int) -> Iterator[Batch]:
        vocab_size = self.model.config.get_text_config().vocab_size
        nothing = not skipped
        for batch in batches:
            nothing = False
            largest = int(batch.input_ids.max())
            if largest >= vocab_size:
                raise CoterieError(
                    f"{self.name}: its tokenizer gives token {largest}, the vocabulary has {vocab_size}; "
                    "put the model's own tokenizer there"
                )
            yield batch
        if nothing:
            raise CoterieError(
                f"{self.name}: its tokenizer makes 0 tokens of the text; add the model's tokenizer files"
            )


def default_device() -> str:
    """The accelerator if this machine has one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)  # a build for CUDA may find no device
    return accelerator.type if accelerator is not None else "cpu"


def load_model(
    model: str | None,
    device: str | None = None,
    *,
    device_map: str | Mapping[str, str | int] | None = None,
    dtype: str | None = None,
    with_tokenizer: bool = True,
) -> LoadedModel:
    """Load a model for inference, without running code that comes with it.

    Args:
        model: a folder or a hub id; None for the embedded model.
        device: such as `cpu` or `cuda:0`; None for the accelerator if there is one.
        device_map: spread the model over accelerators, then host memory, then the disk: `auto`, another of
            `DEVICE_MAPS`, or a device for each module as transformers takes it.  Weights that go to the disk are
            written to the folder for temporary files (TMPDIR) and removed with the model.
        dtype: one of `DTYPES`, `auto` for weights as they were saved; None for float32 on the CPU and `auto` elsewhere.
        with_tokenizer: False where no text is to be read; the model's folder then needs none.

    Raises:
        CoterieError: there is no such model, it cannot be loaded, or both a device and a device map are given.
    """
    # Importing transformers takes seconds: only where a model is really loaded.
    from huggingface_hub.utils.logging import set_verbosity_error
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, Mxfp4Config
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    set_verbosity_error()  # it would report each retry; the outcome is one line of ours
    source = str(zoo.MODEL) if model is None else model
    if not Path(source).is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise CoterieError(
            f"{source}: no such model folder; give a folder with config.json, or a hub id like owner/name"
        )
    if device is not None and device_map is not None:
        raise CoterieError(f"device {device!r} and device map {device_map!r}: give one of them")
    if isinstance(device_map, str) and device_map not in DEVICE_MAPS:
        raise CoterieError(f"device map {device_map!r}: must be one of {', '.join(DEVICE_MAPS)}")
    if dtype is not None and dtype not in DTYPES:
        raise CoterieError(f"dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    device = device or default_device()
    if device.partition(":")[0] == "meta":
        raise CoterieError(f"device {device!r}: holds no weights, so nothing can run; give one such as cpu or cuda:0")
    dtype = dtype or ("float32" if device.partition(":")[0] == "cpu" else "auto")
    offloading = contextlib.ExitStack()
    offload_folder = None if device_map is None else offloading.enter_context(temporary_folder())
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False) if with_tokenizer else None
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        auto = _auto_class(config, AutoModelForCausalLM, AutoModelForImageTextToText)
        if auto is None:
            raise CoterieError(
                f"{source}: a model of {type(config).__name__} is not loaded here; load it in Python and record with "
                "profiler.Recorder (docs/families.md)"
            )
        options: dict[str, Any] = {}
        if (getattr(config, "quantization_config", None) or {}).get("quant_method") == "mxfp4":
            # Its kernels would route on their own, past all hooks.
            options["quantization_config"] = Mxfp4Config(dequantize=True)
        loaded, found = auto.from_pretrained(
            source,
            dtype=dtype,
            device_map=device_map,
            offload_folder=offload_folder,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
        if found["missing_keys"]:
            raise CoterieError(
                f"{source}: lacks {len(found['missing_keys'])} of the model's weights, such as "
                f"{min(found['missing_keys'])}, which would be random numbers; download it again"
            )
    except CoterieError:
        offloading.close()
        raise
    except Exception as error:  # what loading a broken folder raises is any library's choice
        offloading.close()
        raise CoterieError(
            f"{source}: cannot be loaded as a model ({first_line(error)}); give a model folder or hub id"
        ) from error
    if offload_folder is not None:
        weakref.finalize(loaded, offloading.close)
    else:
        try:
            loaded = loaded.to(device)
        except (AssertionError, RuntimeError) as error:
            if "out of memory" in str(error):
                raise CoterieError(
                    f"device {device!r}: lacks memory for the model ({first_line(error)}); spread it with --device-map "
                    "auto where the command has it, or take cpu or a larger device"
                ) from error
            raise CoterieError(
                f"device {device!r}: cannot be used ({first_line(error)}); give one such as cpu or cuda:0"
            ) from error
    return LoadedModel(zoo.NAME if model is None else _name_of(source), loaded.eval(), tokenizer)


def _auto_class(config: Any, *classes: Any) -> Any:
    """The first of transformers' auto classes that has a model for a config; None if none has."""
    return next((auto for auto in classes if type(config) in auto._model_mapping), None)


def _name_of(source: str) -> str:
    """A folder's own name, also where it is given as `.`; a hub id as it is."""
    return Path(os.path.abspath(source)).name if Path(source).is_dir() else source


def read_shape(model: str) -> MoESpec:
    """The MoE layers of a model, from its config alone.

    The model is built without memory for its weights, so that any size takes seconds and no weights need to be there.

    Args:
        model: a folder with config.json, or a hub id.

    Raises:
        CoterieError: there is no such config, or it is of no MoE model that coterie knows.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        auto = _auto_class(config, AutoModelForCausalLM, AutoModelForImageTextToText) or AutoModel
        with torch.device("meta"):
            empty = auto.from_config(config, dtype=getattr(config, "dtype", None), trust_remote_code=False)
    except Exception as error:  # what a broken config raises is any library's choice
        raise CoterieError(
            f"{model}: its config cannot be read ({first_line(error)}); give a folder with config.json or a hub id, or "
            "leave --model out and give --num-experts, --top-k and the sizes"
        ) from error
    return read_spec(empty, _name_of(model))
