"""What `coterie bench` runs on each rank: a model on text, or recorded routing through experts of random weights.
Knows no map, and times nothing.

A workload has one or more steps: one forward pass over all tokens (prefill), or many over a few (decode).  All ranks
have tokens of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

from placement.runtime.experts import HasExperts
from profiler.errors import CoterieError
from profiler.families import find_moe_layers
from profiler.spec import MoESpec
from profiler.trace import TokenTrace

EXPERTS_SHIFT = 37
"""Values between the first weights of two experts of a replay; a prime, so that no two rows line up."""


class Workload(Protocol):
    """What is timed."""

    steps: int
    dense: list[nn.Parameter]
    """Parameters outside the experts, which every rank holds."""

    @property
    def layers(self) -> Sequence[HasExperts]:
        """The MoE layers."""

    def reset(self) -> None:
        """Before each pass, not timed."""

    def forward(self) -> torch.Tensor:
        """All steps: what is compared with one process."""

    def loss(self, outputs: torch.Tensor) -> torch.Tensor:
        """What training minimises."""


class TextWorkload:
    """A transformers model on sequences of this rank's own."""

    def __init__(self, model: Any, input_ids: torch.Tensor, decoded: int = 0) -> None:
        """Take sequences, int64 (B, S).

        Args:
            decoded: 0 for one forward pass over all of them; else as many tokens at each sequence's end, one after the
                other, with the keys and values of all before.
        """
        self.model, self.input_ids, self.steps = model, input_ids, decoded or 1
        self.layers = find_moe_layers(model)
        of_experts = {id(parameter) for layer in self.layers for parameter in layer.experts.parameters()}
        self.dense = [parameter for parameter in model.parameters() if id(parameter) not in of_experts]
        self._of_prompt: Any = None
        self._cache: Any = None
        if decoded:
            with torch.no_grad():
                prompt = input_ids[:, :-decoded]
                self._of_prompt = model(input_ids=prompt, use_cache=True).past_key_values

    def reset(self) -> None:
        """Forget all behind the prompt."""
        self._cache = copy.deepcopy(self._of_prompt)

    def forward(self) -> torch.Tensor:
        """Logits: (B, S, V) of all tokens, or (B, steps, V) of those at the end."""
        if self._of_prompt is None:
            logits: torch.Tensor = self.model(input_ids=self.input_ids, use_cache=False).logits
            return logits
        parts = []
        for token in self.input_ids[:, -self.steps :].split(1, dim=1):
            out = self.model(input_ids=token, past_key_values=self._cache, use_cache=True)
            parts.append(out.logits)
        return torch.cat(parts, dim=1)

    def loss(self, outputs: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each next token."""
        return functional.cross_entropy(outputs[:, :-1].flatten(0, 1).float(), self.input_ids[:, 1:].flatten())


class ReplayWorkload:
    """MoE layers with nothing between them but a norm: routing as it was recorded, weights made up.

    The experts' matrices are windows into one stretch of random values that start a little apart: all are different,
    and together take little more memory than one.  Ranks cut their own out of them.
    """

    def __init__(self, spec: MoESpec, tokens: TokenTrace, steps: int, device: torch.device, seed: int) -> None:
        """Take this rank's tokens, T = steps x tokens of a step; sizes are those of `spec`."""
        config = OlmoeConfig(
            hidden_size=spec.hidden_size, intermediate_size=spec.expert_size, num_experts=spec.num_experts
        )
        config._experts_implementation = "grouped_mm"  # as models are loaded
        with torch.device("meta"):
            empty = OlmoeExperts(config)
        weights = {name: _windows(tuple(weight.shape), device) for name, weight in empty.named_parameters()}
        self.layers: list[HasExperts] = []
        for _ in spec.layer_ids:  # the same values in all of them, each with gradients of its own
            experts = copy.copy(empty)
            experts._parameters = {name: nn.Parameter(weight) for name, weight in weights.items()}
            self.layers.append(SimpleNamespace(experts=experts))
        self.dense: list[nn.Parameter] = []
        self.steps = steps
        generator = torch.Generator().manual_seed(seed)
        self._hidden = torch.randn(tokens.num_tokens, spec.hidden_size, generator=generator).to(device)
        ids = torch.from_numpy(tokens.topk_ids.astype(np.int64)).to(device)
        self._ids = torch.where(ids < spec.num_experts, ids, -1)
        # Recorded weights may be probabilities before they are normalised; any will do.
        self._weights = torch.rand(ids.shape, generator=generator).to(device) / spec.top_k

    def reset(self) -> None:
        """There is nothing to forget."""

    def forward(self) -> torch.Tensor:
        """Hidden states behind the last layer, (T, H)."""
        parts = []
        per_step = len(self._hidden) // self.steps
        for start in range(0, len(self._hidden), per_step):
            at = slice(start, start + per_step)
            hidden = self._hidden[at]
            for layer, ids, weights in zip(self.layers, self._ids, self._weights, strict=True):
                normed = functional.rms_norm(hidden, hidden.shape[1:])
                hidden = hidden + layer.experts(normed, ids[at], weights[at])
            parts.append(hidden)
        return torch.cat(parts)

    def loss(self, outputs: torch.Tensor) -> torch.Tensor:
        """Any smooth function of all outputs."""
        return outputs.square().mean()


def cut_replay(spec: MoESpec, tokens: TokenTrace, num_tokens: int, num_layers: int | None, seed: int) -> TokenTrace:
    """The first tokens of a recording with its sequences in a mixed order, and layers at equal distances.

    Tokens of which an expert had no room are left out, since transformers' exchange knows none.

    Raises:
        CoterieError: there are not as many.
    """
    layers = replayed_layers(spec, num_layers)
    whole = tokens.without_weights().where(np.flatnonzero(tokens.picked[layers].all(axis=(0, 2))))
    if whole.num_tokens < num_tokens:
        raise CoterieError(
            f"the profile has {whole.num_tokens:,} whole tokens, this replay needs {num_tokens:,}; "
            "take fewer or shorter sequences"
        )
    _, sequence = np.unique(whole.sequence_ids, return_inverse=True)
    place = np.random.default_rng(seed).permutation(sequence.max() + 1)[sequence]
    kept = whole.where(np.argsort(place, kind="stable")[:num_tokens])
    return replace(kept, topk_ids=kept.topk_ids[layers])


def replayed_layers(spec: MoESpec, num_layers: int | None) -> list[int]:
    """So many of a model's MoE layers, by position.

    Raises:
        CoterieError: it has not as many.
    """
    if num_layers is None:
        return list(range(spec.num_layers))
    if not 1 <= num_layers <= spec.num_layers:
        raise CoterieError(f"--layers {num_layers}: must be from 1 to the {spec.num_layers} of the model")
    chosen: list[int] = np.linspace(0, spec.num_layers - 1, num_layers).round().astype(int).tolist()
    return chosen


def _windows(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    num_experts, rows, columns = shape
    generator = torch.Generator().manual_seed(rows * columns)
    values = torch.randn(num_experts * EXPERTS_SHIFT + rows * columns, generator=generator) * columns**-0.5
    windows: torch.Tensor = values.to(device).as_strided(shape, (EXPERTS_SHIFT, columns, 1))
    return windows
