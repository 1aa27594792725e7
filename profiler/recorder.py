"""`Recorder`: a context manager around any forward pass that keeps which experts every token picked."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from profiler.errors import CoterieError
from profiler.families import MoELayer, find_moe_layers, read_spec
from profiler.profile import DECODE, PREFILL, TokenTrace, ids_dtype


@dataclass
class _Pass:
    """One forward pass in flight: its mask, and the selections that its layers have announced so far."""

    mask: torch.Tensor  # bool (B, S)
    goes_on: bool  # with cached tokens of the same sequences
    selections: dict[int, torch.Tensor]


class Recorder:
    """Record the selected experts of every unmasked token while a model runs.

    Hooks observe and return nothing, so outputs are untouched.  Rows of a batch are sequences; a pass that uses
    cached tokens goes on with the sequences of the pass before it, and is decoding where it adds one token a row.

    Example::

        with Recorder(model) as recorder:
            recorder.domain_id = 0
            model(input_ids=input_ids, attention_mask=attention_mask)
        trace = recorder.trace()

    Attributes:
        spec: the model's MoE layers.
        domain_id: label of the tokens that come next.
    """

    def __init__(self, model: nn.Module, name: str = "model") -> None:
        """Find the model's experts.

        Args:
            model: a transformers model with MoE layers.
            name: what to call it in the recorded `MoESpec`.

        Raises:
            CoterieError: the model has no MoE layers.
        """
        self.spec = read_spec(model, name)
        self.domain_id = 0
        self._model = model
        self._layers = find_moe_layers(model)
        self._handles: list[RemovableHandle] = []
        self._pass: _Pass | None = None
        self._next_sequence = 0
        self._parts: list[TokenTrace] = []

    def __enter__(self) -> Self:
        self._handles.append(self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.hooked.register_forward_hook(self._make_hook(index, layer), with_kwargs=True))
        self._handles.append(self._model.register_forward_hook(self._after_forward))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def trace(self) -> TokenTrace:
        """All tokens recorded so far.

        Raises:
            CoterieError: none was.
        """
        if not self._parts:
            raise CoterieError("no token was recorded: run the model inside the recorder's `with` block")
        return TokenTrace.concatenate(self._parts)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = kwargs.get("input_ids", args[0] if args else None)
        if inputs is None:
            inputs = kwargs["inputs_embeds"]
        batch, length = inputs.shape[:2]
        mask = kwargs.get("attention_mask")
        if mask is None or mask.ndim != 2:
            mask = torch.ones(batch, length, dtype=torch.bool)
        # While decoding the mask also covers the cached tokens; those of this pass are the last ones.
        cache = kwargs.get("past_key_values")
        goes_on = mask.shape[1] > length or (cache is not None and cache.get_seq_length() > 0)
        self._pass = _Pass(mask[:, -length:].bool().cpu(), goes_on and self._next_sequence >= batch, {})

    def _make_hook(self, index: int, layer: MoELayer) -> Any:
        def record_selection(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._pass is not None:
                self._pass.selections[index] = layer.read(args, kwargs, output).ids.detach()

        return record_selection

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        current, self._pass = self._pass, None
        assert current is not None
        batch, length = current.mask.shape
        for index, layer in enumerate(self._layers):
            seen = current.selections.get(index)
            if seen is None or seen.numel() != batch * length * self.spec.top_k:
                found = "nothing" if seen is None else f"shape {tuple(seen.shape)}"
                raise CoterieError(
                    f"{layer.name} announced {found}, expected top-{self.spec.top_k} of {batch * length} tokens: "
                    "this model's experts are called in a way that coterie does not know"
                )
        keep_T = current.mask.flatten().numpy()
        dtype = ids_dtype(self.spec.num_experts)
        ids_LTK = np.stack(
            [
                current.selections[index].reshape(batch * length, -1).to("cpu", torch.int32).numpy().astype(dtype)
                for index in range(len(self._layers))
            ]
        )[:, keep_T]
        decoding = current.goes_on and length == 1
        first = self._next_sequence - batch if current.goes_on else self._next_sequence
        self._next_sequence = first + batch
        sequence_ids = np.repeat(np.arange(first, first + batch, dtype=np.int32), length)[keep_T]
        num_tokens = int(keep_T.sum())
        self._parts.append(
            TokenTrace(
                topk_ids=ids_LTK,
                sequence_ids=sequence_ids,
                domain_ids=np.full(num_tokens, self.domain_id, dtype=np.uint8),
                phase=np.full(num_tokens, DECODE if decoding else PREFILL, dtype=np.uint8),
            )
        )
