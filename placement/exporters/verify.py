"""Does a permuted checkpoint compute what the original does? Both models run on the same tokens, one by one.
Reads no checkpoint: models come from functions that the caller passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from placement.placement_map import PlacementMap
from profiler.errors import CoterieError
from profiler.recorder import Recorder


@dataclass(frozen=True)
class Comparison:
    """What two models made of the same tokens.

    Attributes:
        num_tokens: that both ran.
        max_difference: largest difference of two logits.
        largest_logit: of the original, without its sign.
        same_selection: share of tokens whose routers picked the same experts, by the plan, in every layer.
    """

    num_tokens: int
    max_difference: float
    largest_logit: float
    same_selection: float

    def agrees(self, tolerance: float) -> bool:
        """Whether logits differ by at most `tolerance` of the largest one; never if one is no number."""
        return self.max_difference <= tolerance * self.largest_logit


def compare(
    load_original: Callable[[], Any],
    load_permuted: Callable[[], Any],
    placement: PlacementMap,
    input_ids: torch.Tensor,
) -> Comparison:
    """Run both models; only one is in memory at a time.

    Args:
        load_original: makes a transformers causal language model in evaluation mode; `load_permuted` too.
        placement: that the second was permuted by.
        input_ids: int64 (B, S), no padding.

    Raises:
        CoterieError: the models are not of the plan's kind, or give logits of different shapes.
    """
    logits, ids_LTK = _run(load_original, placement, input_ids)
    permuted_logits, permuted_LTK = _run(load_permuted, placement, input_ids)
    if logits.shape != permuted_logits.shape:
        raise CoterieError(f"logits {tuple(logits.shape)} and {tuple(permuted_logits.shape)}: these are two models")
    no_expert = np.iinfo(ids_LTK.dtype).max
    expected = np.empty(ids_LTK.shape, dtype=np.int64)
    for ids_TK, slot_of_expert, out in zip(ids_LTK, placement.slot_of_expert, expected, strict=True):
        picked = ids_TK != no_expert
        out[...] = no_expert
        out[picked] = slot_of_expert[ids_TK[picked]]
    same = np.sort(expected, axis=2) == np.sort(permuted_LTK.astype(np.int64), axis=2)
    return Comparison(
        num_tokens=input_ids.numel(),
        max_difference=float((logits - permuted_logits).abs().max()),
        largest_logit=float(logits.abs().max()),
        same_selection=float(same.all(axis=(0, 2)).mean()),
    )


def random_tokens(vocab_size: int, num_tokens: int, seed: int) -> torch.Tensor:
    """int64 (1, num_tokens): any token of the vocabulary, as a test that needs no tokenizer."""
    return torch.randint(vocab_size, (1, num_tokens), generator=torch.Generator().manual_seed(seed))


def _run(
    load: Callable[[], Any], placement: PlacementMap, input_ids: torch.Tensor
) -> tuple[torch.Tensor, npt.NDArray[Any]]:
    model = load()
    recorder = Recorder(model)
    placement.require_model(recorder.spec)
    device = model.get_input_embeddings().weight.device
    with recorder, torch.no_grad():
        output = model(input_ids=input_ids.to(device), use_cache=False)
    logits = getattr(output, "logits", None)
    outcome = output.last_hidden_state if logits is None else logits
    return outcome.float().cpu(), recorder.trace().topk_ids
