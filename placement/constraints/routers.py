"""Routers whose selection can be constrained: where a model keeps them, and the weights that they give to a selection.
Knows no constraint.

C2R and collaboration pruning are defined for routers that score experts by a softmax and let every token take the best
K.  All routers here return (logits (T, E), weights (T, K), ids (T, K)).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from profiler.errors import CoterieError
from profiler.families import find_moe_layers

WeightRule = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
"""The weights (T, K) that a router gives to experts `ids` (T, K), from (router, logits (T, E), ids)."""


@dataclass(frozen=True)
class Router:
    """The router of one MoE layer.

    Attributes:
        layer_id: the number of the decoder layer, as in `MoESpec.layer_ids`.
        module: its forward returns (logits, weights, ids).
        top_k: K.
        weights_of: the model's own rule for the weights of a selection.
    """

    layer_id: int
    module: nn.Module
    top_k: int
    weights_of: WeightRule


def scores_of(logits_TE: torch.Tensor) -> torch.Tensor:
    """What experts are ranked by: float32 (T, E), the softmax of the logits."""
    return logits_TE.softmax(dim=-1, dtype=torch.float32)


def _as_configured(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    weights = scores_of(logits).gather(1, ids)
    if router.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights.to(logits.dtype)


def _normalised(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    weights = scores_of(logits).gather(1, ids)
    return (weights / weights.sum(dim=-1, keepdim=True)).to(logits.dtype)


def _normalised_float32(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    weights = scores_of(logits).gather(1, ids)
    return weights / weights.sum(dim=-1, keepdim=True)


def _scaled(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    weights: torch.Tensor = scores_of(logits).gather(1, ids) * router.routed_scaling_factor
    return weights


def _softmax_of_picked(router: Any, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return logits.gather(1, ids).softmax(dim=-1)


RULES: dict[str, WeightRule] = {
    "DeepseekV2TopkRouter": _scaled,
    "FlexOlmoTopKRouter": _as_configured,
    "GptOssTopKRouter": _softmax_of_picked,
    "MiniMaxTopKRouter": _normalised_float32,
    "MixtralTopKRouter": _normalised_float32,
    "OlmoeTopKRouter": _as_configured,
    "Qwen2MoeTopKRouter": _as_configured,
    "Qwen3MoeTopKRouter": _as_configured,
    "Qwen3NextTopKRouter": _as_configured,
    "Qwen3VLMoeTextTopKRouter": _normalised,
    "Qwen3_5MoeTopKRouter": _normalised,
}
"""Router classes of transformers 5.23 by their rule; `tests/test_constrain.py` holds each to its own output."""


def find_routers(model: nn.Module) -> list[Router]:
    """The routers of a model in layer order.

    Raises:
        CoterieError: there are no MoE layers, or a router for which constraints are not defined; the message says why.
    """
    return [_router_of(model, layer.layer_id, layer.name) for layer in find_moe_layers(model)]


def _router_of(model: nn.Module, layer_id: int, experts_name: str) -> Router:
    block = model.get_submodule(experts_name.rpartition(".")[0])
    for module in block.children():
        known = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in RULES), None)
        if known is not None:
            router: Any = module
            _require_no_groups(layer_id, router)
            return Router(layer_id, module, int(router.top_k), RULES[known])
    experts = model.get_submodule(experts_name)
    has_router = {"gate", "router"} & dict(experts.named_children()).keys()  # it is the whole block
    raise CoterieError(_why_not(layer_id, experts if has_router else block))


def _require_no_groups(layer_id: int, router: Any) -> None:
    if "group" in str(getattr(router, "topk_method", "")) and (router.num_group or 1) > 1:
        raise CoterieError(
            f"layer {layer_id}: {type(router).__name__} first takes {router.topk_group} of {router.num_group} groups "
            "(group-limited); C2R and pruning are defined for routers that take the best of all experts: give another "
            "model"
        )


def _why_not(layer_id: int, block: nn.Module) -> str:
    """Why no rule fits the router that sits in a block, as far as it can be told."""
    children: dict[str, Any] = dict(block.named_children())
    router = next((children[name] for name in ("gate", "router") if name in children), block)
    name = type(router).__name__
    source = "".join(_source(type(module)) for module in (router, block))
    groups = [getattr(place, key, None) for place in (router, block) for key in ("num_group", "n_group")]
    if "sigmoid" in source:
        reason = "scores each expert by a sigmoid of its own"
    elif any(isinstance(value, int) and value > 1 for value in groups):
        reason = "first takes groups of experts (group-limited)"
    elif any(hasattr(place, key) for place in (router, block) for key in ("expert_capacity", "capacity_factor")):
        reason = "gives experts a capacity, so that experts choose tokens (expert-choice)"
    else:
        reason = "is not one that coterie knows"
    return (
        f"layer {layer_id}: {name} {reason}; C2R and pruning are defined for routers that score by a softmax and take "
        f"each token's best: {', '.join(sorted(RULES))}"
    )


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # made in an interactive session
        return ""
