"""`Recorder`: a context manager around any forward pass that keeps which experts every token picked. Knows no files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from profiler.errors import CoterieError
from profiler.families import MoELayer, Selection, find_moe_layers, read_spec
from profiler.trace import DECODE, PREFILL, TokenTrace, ids_dtype


def inputs_and_mask(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a forward pass was given, with tokens in its first two dimensions (B, S), and which of them count.

    While decoding the mask also covers cached tokens, so that it is wider than S; those of this pass are the last ones.
    Of a mask that says who sees whom, (B, 1, S, places), as static caches get it, those count that see themselves: all
    but padding.  Other masks do not say who counts: all do.  A mask of one row is every row's.
    """
    inputs: Any = kwargs.get("input_ids", args[0] if args else None)
    if inputs is None:
        inputs = kwargs["inputs_embeds"]
    mask: Any = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    if isinstance(mask, dict):  # one for each kind of layer; in a sliding window places are others
        tensors = [(kind, part) for kind, part in mask.items() if isinstance(part, torch.Tensor)]
        mask = min(tensors, key=lambda pair: (pair[0] != "full_attention", pair[1].ndim), default=("", None))[1]
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        own = mask[:, 0].diagonal(_num_cached(kwargs), 1, 2)
        mask = (own >= 0 if own.is_floating_point() else own.bool()).expand(len(inputs), -1)
        mask = mask if mask.shape[1] == inputs.shape[1] else None
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
    return inputs, mask.expand(len(inputs), -1) if len(mask) == 1 else mask


def by_name(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments by the names that `forward` has for them; wrappers take any, as most do: ids, then a mask."""
    parameters = inspect.signature(forward).parameters.values()
    names = [part.name for part in parameters if part.kind in (part.POSITIONAL_ONLY, part.POSITIONAL_OR_KEYWORD)]
    return {**dict(zip(names or ("input_ids", "attention_mask"), args, strict=False)), **kwargs}


def _num_cached(kwargs: dict[str, Any]) -> int:
    """Tokens of each row that a forward pass finds in its cache."""
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


@dataclass
class _Pass:
    """One forward pass in flight: its mask, and the selections that its layers have announced so far."""

    keep: torch.Tensor  # bool (B, S)
    num_cached: int  # tokens of each row that ran before
    first: int  # number of the sequence in its first row
    selections: dict[int, Selection]


class Recorder:
    """Record the selected experts of every unmasked token while a model runs.

    Hooks observe and return nothing, so outputs are untouched.  Rows of a batch are sequences; a pass that uses
    cached tokens is decoding where it adds one token a row, and goes on with the sequences of the pass before it if
    that was recorded and has as many tokens as are cached.
    Left out: tokens whose attention mask is 0, what `generate` feeds to rows that have ended, and all that runs inside
    `paused`, such as warm-up passes.

    Example::

        with Recorder(model) as recorder:
            recorder.domain_id = 0
            model(input_ids=input_ids, attention_mask=attention_mask)
        trace = recorder.trace()

    Attributes:
        spec: the model's MoE layers.
        domain_id: label of the tokens that come next.
        next_sequence: number of the sequence that comes next.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str = "model",
        *,
        weights: bool = False,
        ends: Collection[int] | None = None,
        on_tokens: Callable[[TokenTrace], None] | None = None,
    ) -> None:
        """Find the model's experts.

        Args:
            model: a transformers model with MoE layers.
            name: what to call it in the recorded `MoESpec`.
            weights: record `topk_weights` too.
            ends: tokens that end a row while decoding, such as `generate` is given as `eos_token_id`, and what it fills
                up with after them; None takes the model's own generation config, which a part of a model has not.
            on_tokens: is given the tokens of each pass, which are then not kept in memory; None keeps them for `trace`.

        Raises:
            CoterieError: the model has no MoE layers, or is an encoder and a decoder.
        """
        self._layers = find_moe_layers(model)
        if {"encoder", "decoder"} <= {part for layer in self._layers for part in layer.name.split(".")}:
            raise CoterieError(
                f"{name}: its encoder and decoder see other tokens; record model.encoder or model.decoder"
            )
        self.spec = read_spec(model, name)
        self.domain_id = 0
        self.next_sequence = 0
        self._model = model
        self._weights = weights
        self._ends = ends
        self._handles: list[RemovableHandle] = []
        self._pass: _Pass | None = None
        self._paused = False
        self._last: tuple[int, int, int] | None = None  # pass: its first sequence, its rows, tokens of each so far
        self._kept: list[TokenTrace] = []
        self._on_tokens = on_tokens or self._kept.append

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
        self._pass = self._last = None  # what runs between two `with` blocks is not seen

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside: warm-up passes, dummy batches."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def trace(self) -> TokenTrace:
        """All tokens recorded so far, where no `on_tokens` took them.

        Raises:
            CoterieError: there is none.
        """
        if not self._kept:
            raise CoterieError("no token was recorded: run the model inside the recorder's `with` block")
        return TokenTrace.concatenate(self._kept)

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._pass = None
        last, self._last = self._last, None
        if self._paused:
            return
        given = by_name(module.forward, args, kwargs)
        if given.get("cu_seq_lens_q") is not None:
            raise CoterieError(
                f"{self.spec.name}: sequences are packed into one row (cu_seq_lens_q), as generate_batch does, and "
                "cannot be told apart; run one sequence a row with an attention mask, as generate does"
            )
        inputs, mask = inputs_and_mask(args[:1], given)
        batch, length = inputs.shape[:2]
        num_cached = mask.shape[1] - length or _num_cached(given)
        keep = mask[:, -length:].bool()
        if num_cached and length == 1 and inputs.ndim == 2:
            keep = keep & ~self._ended(inputs)
        first = last[0] if last and last[1:] == (batch, num_cached) else self.next_sequence
        self._pass = _Pass(keep, num_cached, first, {})

    def _ended(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Rows that `generate` feeds only because others are not done: their token is the end, or fills up after it."""
        config = getattr(self._model, "generation_config", None)
        ends: Any = getattr(config, "eos_token_id", None)
        padding = getattr(config, "pad_token_id", None)
        ended = [*(ends if isinstance(ends, list) else [ends]), padding] if self._ends is None else self._ends
        numbers = torch.tensor([token for token in ended if token is not None], device=input_ids.device)
        return torch.isin(input_ids, numbers.to(input_ids.dtype))

    def _make_hook(self, index: int, layer: MoELayer) -> Any:
        def record_selection(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._pass is not None:
                if index in self._pass.selections:
                    raise CoterieError(
                        f"{layer.name} ran twice in one pass, and a token has one selection a layer; record a model "
                        "that runs each of its layers once"
                    )
                self._pass.selections[index] = layer.read(args, kwargs, output)

        return record_selection

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        current, self._pass = self._pass, None
        if current is None:
            return
        batch, length = current.keep.shape
        keep_T = current.keep.flatten()
        num_tokens = int(keep_T.sum())
        if num_tokens:
            ids_LTK, weights_LTK = self._gather(current.selections, keep_T, num_tokens)
            sequence_ids = np.repeat(np.arange(current.first, current.first + batch, dtype=np.int32), length)
            decoding = current.num_cached > 0 and length == 1
            self._on_tokens(
                TokenTrace(
                    topk_ids=ids_LTK,
                    sequence_ids=sequence_ids[keep_T.cpu().numpy()],
                    domain_ids=np.full(num_tokens, self.domain_id, dtype=np.uint8),
                    phase=np.full(num_tokens, DECODE if decoding else PREFILL, dtype=np.uint8),
                    topk_weights=weights_LTK,
                )
            )
        self.next_sequence = max(self.next_sequence, current.first + batch)
        self._last = current.first, batch, current.num_cached + length

    def _gather(
        self, selections: dict[int, Selection], keep_T: torch.Tensor, num_kept: int
    ) -> tuple[npt.NDArray[np.unsignedinteger], npt.NDArray[np.float16] | None]:
        """The kept tokens' picks and, if wanted, weights, (L, T, K), checked and copied to the host once.

        Raises:
            CoterieError: a layer did not run, announced other than top-k of every token, an expert that it does not
                have, or weights that are no numbers.
        """
        chosen, weights = [], []
        everything = num_kept == len(keep_T)
        for index, layer in enumerate(self._layers):
            seen = selections.get(index)
            if seen is None or seen.ids.numel() != len(keep_T) * self.spec.top_k:
                found = "nothing" if seen is None else f"shape {tuple(seen.ids.shape)}"
                raise CoterieError(
                    f"{layer.name} announced {found}, expected top-{self.spec.top_k} of {len(keep_T)} tokens: this "
                    "model's experts are called in a way that coterie does not know: compiled by torch.compile (record "
                    "without it), or see profiler.families"
                )
            ids_TK, weights_TK = seen.ids.detach().reshape(len(keep_T), -1), seen.weights
            if weights_TK is not None:
                weights_TK = weights_TK.detach().reshape(len(keep_T), -1)
            if not everything:
                ids_TK = ids_TK[keep_T.to(ids_TK.device)]
                weights_TK = weights_TK if weights_TK is None else weights_TK[keep_T.to(weights_TK.device)]
            chosen.append(ids_TK)
            weights.append(weights_TK)
        # A sum is finite where all its parts are: weights are far from the largest numbers.
        sums = [torch.zeros(()) if part is None else part.sum(dtype=torch.float32) for part in weights]
        device = chosen[-1].device
        # Two copies to the host for all layers: waiting for an accelerator costs more than the bytes.
        not_finite_L = (~torch.stack([part.to(device) for part in sums]).isfinite()).tolist()
        if device.type != "cpu":
            chosen = list(torch.stack([ids_TK.to(device) for ids_TK in chosen]).cpu())
        wide = [ids_TK.cpu().numpy() for ids_TK in chosen]
        checks = ([int(ids_TK.min()) for ids_TK in wide], [int(ids_TK.max()) for ids_TK in wide], not_finite_L)
        for layer, low, high, not_finite in zip(self._layers, *checks, strict=True):
            if not_finite:
                raise CoterieError(
                    f"{layer.name}: its router gave weights that are no finite numbers (NaN or infinite), so its "
                    "selection means nothing; check the model's weights and dtype"
                )
            if low < -1 or high >= self.spec.num_experts:
                raise CoterieError(
                    f"{layer.name}: announced expert {high if high >= self.spec.num_experts else low}, "
                    f"must be below {self.spec.num_experts}"
                )
        ids_LTK = np.empty((len(wide), *wide[0].shape), dtype=ids_dtype(self.spec.num_experts))
        for narrow_TK, wide_TK in zip(ids_LTK, wide, strict=True):
            narrow_TK[:] = wide_TK.astype(ids_LTK.dtype)  # -1 becomes all ones
        if not self._weights:
            return ids_LTK, None
        missing = [
            layer.name for layer, layer_weights in zip(self._layers, weights, strict=True) if layer_weights is None
        ]
        if missing:
            raise CoterieError(f"{missing[0]} does not announce its weights; record without them")
        stacked = torch.stack([part.to(device) for part in weights if part is not None])
        return ids_LTK, stacked.to(torch.float16).cpu().numpy()
