"""What a constraint costs: perplexity by domain on text that nothing was made with.
Knows no constraint: it measures the model that it is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from profiler.batches import Batch
from profiler.errors import CoterieError


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        nats: of each domain, the sum over predicted tokens of -ln p.
        tokens: of each domain, the predicted tokens.
    """

    nats: dict[str, float]
    tokens: dict[str, int]

    @property
    def of_domain(self) -> dict[str, float]:
        """Exp of the mean nats of each domain."""
        return {domain: _exp(nats / self.tokens[domain]) for domain, nats in self.nats.items()}

    @property
    def overall(self) -> float:
        """Exp of the mean nats over all tokens."""
        return _exp(sum(self.nats.values()) / sum(self.tokens.values()))


def _exp(nats: float) -> float:
    """Infinite from some 700 nats on, as of a model that a constraint has broken."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


@torch.no_grad()
def perplexity(
    model: Any,
    batches: Iterable[Batch],
    device: torch.device | str,
    on_batch: Callable[[int], None] = lambda _tokens: None,
) -> Perplexity:
    """Score every token but the first of each sequence; padding is left out.

    Args:
        model: a causal language model, constrained or not.  It is put into evaluation mode for the time.
        on_batch: is given the tokens of each batch.

    Raises:
        CoterieError: no token can be predicted.
    """
    nats: dict[str, torch.Tensor] = {}
    tokens: dict[str, int] = {}
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            input_ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
            logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            targets = input_ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100).to(logits.device)
            sum_of_batch = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), reduction="sum"
            ).double()
            nats[batch.domain] = nats.get(batch.domain, torch.zeros_like(sum_of_batch)) + sum_of_batch
            tokens[batch.domain] = tokens.get(batch.domain, 0) + int(batch.attention_mask[:, 1:].sum())
            on_batch(batch.num_tokens)
    finally:
        model.train(was_training)
    scored = {domain: float(value) for domain, value in nats.items() if tokens[domain]}
    if not scored:
        raise CoterieError("the text has no sequence of 2 tokens, so nothing can be predicted; give more to --data")
    return Perplexity(scored, {domain: tokens[domain] for domain in scored})
