"""`constrain`: a model whose routers select under a constraint, until the `with` block ends.
Knows no map, and makes no constraint itself: `lists.py` and `pruning.py` do.

A hook on each router takes its logits and puts another selection, with the model's own weights for it, in the place of
the router's: the model's code and weights stay as they are, and what runs after the routers (transformers' experts, the
bundled runtime) sees the constrained selection.  A hook on the model lets the auxiliary loss follow it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from placement.constraints.lists import CollaboratorLists, select_from_lists
from placement.constraints.pruning import RankLimit, select_within_limit
from placement.constraints.routers import Router, find_routers, scores_of
from profiler.errors import CoterieError
from profiler.families import read_spec

Constraint = CollaboratorLists | RankLimit
"""What a model can be constrained by."""

Select = Callable[[torch.Tensor], torch.Tensor]
"""From scores (T, E) the experts of each token, int64 (T, K)."""


@contextmanager
def constrain(model: nn.Module, constraint: Constraint | None) -> Iterator[None]:
    """Constrain a model's routing inside a `with` block; on leaving it, by an exception too, it routes as before.

    Args:
        model: a transformers model; one that is sharded for expert parallelism too.
        constraint: None leaves the model as it is.

    Raises:
        CoterieError: the constraint is for another model, the model is constrained already, or its routers are of a
            kind that constraints are not defined for; the model is left untouched.
    """
    handles = apply(model, constraint) if constraint is not None else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if handles:
            _forget_compiled()


def apply(model: nn.Module, constraint: Constraint) -> list[RemovableHandle]:
    """Constrain a model until the returned handles are removed; `constrain` does that by itself.

    After removing them, a model that is compiled stays constrained until `torch.compiler.reset()`.

    Raises:
        CoterieError: as `constrain`.
    """
    routers = find_routers(model)
    spec = read_spec(model, constraint.model.name)
    if not constraint.model.routes_like(spec):
        raise CoterieError(
            f"the constraint is for {constraint.model.describe()}, this model is {spec.describe()}; make one for it "
            "with `coterie constrain`"
        )
    if any(isinstance(hook, _Selection) for router in routers for hook in router.module._forward_hooks.values()):
        raise CoterieError("the model is constrained already; leave that `with` block before entering another")
    selections = [_Selection(router, constraint, layer) for layer, router in enumerate(routers)]
    handles = [
        router.module.register_forward_hook(selection) for router, selection in zip(routers, selections, strict=True)
    ]
    handles.append(model.register_forward_hook(_AuxiliaryLoss(selections), with_kwargs=True))
    _forget_compiled()
    return handles


def _forget_compiled() -> None:
    """Let models be compiled anew, if any is: code that was compiled before does not see that hooks came or went."""
    if "torch._dynamo" in sys.modules:  # which takes a second to import
        torch.compiler.reset()


class _Selection:
    """Replaces one router's selection."""

    def __init__(self, router: Router, constraint: Constraint, layer: int) -> None:
        self._router, self._constraint, self._layer = router, constraint, layer
        self._select_on: dict[torch.device, Select] = {}  # tables are copied to a device once
        self.ids: torch.Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits, _weights, _ids = output
        with torch.no_grad():
            select = self._select_on.get(logits.device)
            if select is None:
                select = selector(self._constraint, self._layer, self._router.top_k, logits.device)
                self._select_on[logits.device] = select
            self.ids = select(scores_of(logits))
        return logits, self._router.weights_of(module, logits, self.ids), self.ids


def selector(constraint: Constraint, layer: int, top_k: int, device: torch.device | str = "cpu") -> Select:
    """The selection of one layer under a constraint, with its tables on a device.

    Args:
        layer: index among the MoE layers.
    """
    if isinstance(constraint, CollaboratorLists):
        allowed_EE = torch.as_tensor(constraint.allowed[layer], device=device)
        return lambda scores_TE: select_from_lists(scores_TE, allowed_EE, top_k)
    held_EG = torch.as_tensor(constraint.held[layer], device=device)
    has_copies = bool((constraint.held[layer].sum(axis=1) > 1).any())
    similarity = constraint.similarity
    similarity_EE = None if similarity is None else torch.as_tensor(similarity[layer], device=device)
    limit = constraint.limit
    return lambda scores_TE: select_within_limit(scores_TE, held_EG, limit, top_k, similarity_EE, has_copies=has_copies)


class _AuxiliaryLoss:
    """Puts the load-balancing loss of the constrained selection in the place of that of the routers' top-k."""

    def __init__(self, selections: Sequence[_Selection]) -> None:
        self._selections = selections

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        ids = [selection.ids for selection in self._selections]
        for selection in self._selections:
            selection.ids = None
        before = getattr(output, "aux_loss", None)
        if not isinstance(before, torch.Tensor):
            return output
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        loss = balance_loss(output.router_logits, [part for part in ids if part is not None], mask)
        if output.loss is not None:
            coefficient = balance_settings(model).router_aux_loss_coef
            output.loss = output.loss + coefficient * (loss - before).to(output.loss.device)
        output.aux_loss = loss
        return output


def balance_settings(model: Any) -> Any:
    """What keeps `router_aux_loss_coef`, if the model has one: itself, or where it also sees the config of its text."""
    return model if hasattr(model, "router_aux_loss_coef") else model.config.get_text_config()


def balance_loss(
    logits_LTE: Sequence[torch.Tensor], ids_LTK: Sequence[torch.Tensor], attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """E * sum_e (tokens that picked e / tokens) * (mean probability of e), pooled over layers as transformers does it.

    The loss of Switch Transformers (arXiv 2101.03961, equations 4 to 6) for any selection, not only the top-k.

    Args:
        logits_LTE: of each layer.
        ids_LTK: the experts that tokens went to.
        attention_mask: (B, S), 0 for tokens to leave out; None for none.
    """
    device, num_experts = logits_LTE[0].device, logits_LTE[0].shape[-1]
    tokens_L = [len(logits) for logits in logits_LTE]
    keep_T = None if attention_mask is None else attention_mask.reshape(-1).to(device, torch.float32)
    picked_E = torch.zeros(num_experts, device=device)
    probability_E = torch.zeros(num_experts, device=device)
    rows: torch.Tensor | float = 0.0
    for num_tokens, logits_TE, ids_TK in zip(tokens_L, logits_LTE, ids_LTK, strict=True):
        keep = torch.ones(num_tokens, device=device) if keep_T is None else keep_T
        flat = ids_TK.to(device).flatten()
        picked_E = picked_E.scatter_add(0, flat, keep.repeat_interleave(ids_TK.shape[1]))
        probability_TE = logits_TE.to(device).float().softmax(dim=-1)
        probability_E = probability_E + (keep[:, None] * probability_TE).sum(dim=0)  # autocast would round a product
        rows = rows + keep.sum()
    return num_experts * (picked_E / rows * (probability_E / rows)).sum()
