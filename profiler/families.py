"""Where a model keeps its experts and announces which ones each token picked. Records nothing itself.
Only this module and, for routers, `placement/constraints/routers.py` tell one model family from another.

transformers hands the router's selection to the experts module as an argument, so one hook on that call sees the true
selection in most families: after bias correction, group limits and whatever else the router does.  The top-k of the
router's logits would not.  Families that announce it elsewhere have a `Family` of their own in `FAMILIES`; the list of
all that are proved, and how, is `docs/families.md`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from profiler.errors import CoterieError
from profiler.spec import MoESpec

SELECTION_ARGUMENTS = ("top_k_index", "router_indices")
"""Names under which experts modules take the selection, int64 (tokens, K); the second is gpt_oss's."""

WEIGHT_ARGUMENTS = ("top_k_weights", "routing_weights")
"""Names under which they take its weights, float (tokens, K)."""

TOP_K_NAMES = ("top_k", "num_experts_per_tok", "top_k_experts")
"""Names under which a router, or else the config, keeps K."""


@dataclass(frozen=True)
class Selection:
    """The experts of the tokens of one call.

    Attributes:
        ids: int64 (tokens, K); negative where a pick is no expert: a dropped token, or a pick that costs nothing
            because it stands for a zero, identity or skip expert, which has no weights and lives on no rank.
        weights: float (tokens, K), as applied to the experts' outputs; None where the module does not announce them.
            They mean nothing where the id is negative.
    """

    ids: torch.Tensor
    weights: torch.Tensor | None


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model.

    Attributes:
        layer_id: the global number of the decoder layer that it sits in; see `find_moe_layers`.
        name: dotted name in the model of the module that its family is known by, for messages.
        hooked: the module whose forward announces the selection.
        experts: what holds the experts' weights; it may be the same module.
        read: the selection, out of (args, kwargs, output) of one forward call of `hooked`.
    """

    layer_id: int
    name: str
    hooked: nn.Module
    experts: nn.Module
    read: Callable[[tuple[Any, ...], dict[str, Any], Any], Selection]


def packed_shape(experts: nn.Module) -> tuple[int, int, int]:
    """(E, H, I) of experts packed in `down_proj`: (E, H, I), or (E, I, H) where all weights are transposed.

    Weights of 4 bits are (E, H, I / 2) bytes, as transformers keeps those of `FP8Experts` and `Mxfp4GptOssExperts`.

    Raises:
        CoterieError: they are kept in another way.
    """
    weights = dict(experts.named_parameters())
    down, up = weights.get("down_proj"), weights.get("gate_up_proj", weights.get("up_proj"))
    if down is not None and up is not None and down.ndim == up.ndim == 3:
        num_experts, first, second = down.shape
        if up.shape[2] == first:
            return num_experts, first, second
        if up.dtype in (torch.int8, torch.uint8) and 2 * up.shape[2] == first:
            return num_experts, first, 2 * second
        if up.shape[1] == second:
            return num_experts, second, first
    raise CoterieError(
        f"{type(experts).__name__} keeps its experts in a way that coterie does not know: "
        "give their sizes to profiler.families.register_family (docs/families.md)"
    )


@dataclass(frozen=True)
class Family:
    """How to watch one class of module. Paths are dotted and start at the module of that class, "" is itself.

    Attributes:
        read: the `Selection`, out of (module, args, kwargs, output): the module of that class, then one forward call
            of the hooked one.
        hooked: path of the module whose forward announces the selection.
        experts: path of the module that holds the experts' weights.
        shape: (E, H, I) of that module: experts, values that one takes and gives, its intermediate width.
        top_k: K where neither the router nor the config has it under one of `TOP_K_NAMES`.
    """

    read: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Selection]
    hooked: str = ""
    experts: str = ""
    shape: Callable[[nn.Module], tuple[int, int, int]] = packed_shape
    top_k: int | None = None


def read_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Selection:
    """The selection where a module takes it as arguments, as nearly all experts modules of transformers do."""
    values = {**dict(zip(_forward_parameters(module), args, strict=False)), **kwargs}
    ids = next(values[name] for name in SELECTION_ARGUMENTS if name in values)
    weights = next((values[name] for name in WEIGHT_ARGUMENTS if name in values), None)
    return Selection(ids.long(), weights)


def _read_doge(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Selection:
    # An expert is one neuron, looked up in two embeddings: what is looked up is the selection.
    return Selection(args[0], None)


def _read_jetmoe(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Selection:
    # (token, pick) pairs sorted by expert, with the number of pairs of each expert: undo the sorting.
    order, _tokens, sorted_weights, pairs_of_expert, _logits = output
    sizes = torch.tensor(pairs_of_expert, device=order.device)
    ids = torch.empty_like(order)
    ids[order] = torch.arange(len(sizes), device=order.device).repeat_interleave(sizes)
    weights = torch.empty_like(sorted_weights)
    weights[order] = sorted_weights
    return Selection(ids.view(-1, module.router.top_k), weights.view(-1, module.router.top_k))


def _read_llama4(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Selection:
    # Every expert runs on every token, with zeros for those that did not pick it. The scores can underflow to such
    # zeros, so the router's own top-k is repeated. They scale the experts' inputs, hence no weights of outputs.
    _scores, logits = output
    return Selection(torch.topk(logits, module.top_k, dim=1).indices, None)


def _read_longcat(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Selection:
    # Ids past the routed experts are zero experts, which hand the token back as it is.
    selection = read_arguments(module, args, kwargs, output)
    return Selection(selection.ids.masked_fill(selection.ids >= module.num_routed_experts, -1), selection.weights)


def _read_switch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Selection:
    # One-hot (tokens, 1, E), all zeros for a token that its expert had no capacity left for.
    _hidden, one_hot, weights = args
    return Selection(torch.where(one_hot.any(dim=-1), one_hot.argmax(dim=-1), -1), weights)


def _read_zaya(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Selection:
    # The router writes the skip expert as expert 0 with weight 0.
    selection = read_arguments(module, args, kwargs, output)
    assert selection.weights is not None
    return Selection(selection.ids.masked_fill(selection.weights == 0, -1), selection.weights)


def _shape_of_dbrx(experts: Any) -> tuple[int, int, int]:
    rows, hidden_size = experts.mlp.w2.shape  # all experts below each other
    return experts.num_experts, hidden_size, rows // experts.num_experts


def _shape_of_doge(experts: Any) -> tuple[int, int, int]:
    return *experts.up_embed.weight.shape, 1


def _shape_of_jetmoe(experts: Any) -> tuple[int, int, int]:
    num_experts, hidden_size, width = experts.output_linear.weight.shape
    return num_experts, hidden_size, width


def _shape_of_switch(experts: Any) -> tuple[int, int, int]:
    return len(experts), *experts["expert_0"].wo.weight.shape


FAMILIES: dict[str, Family] = {
    "DbrxExperts": Family(read_arguments, shape=_shape_of_dbrx),
    "DogeCDMoE": Family(_read_doge, hooked="down_embed", shape=_shape_of_doge),
    "JetMoeMoE": Family(_read_jetmoe, hooked="router", shape=_shape_of_jetmoe),
    "Llama4TextMoe": Family(_read_llama4, hooked="router", experts="experts"),
    "LongcatFlashExperts": Family(_read_longcat),
    "SwitchTransformersExperts": Family(_read_switch, shape=_shape_of_switch, top_k=1),
    "ZayaExperts": Family(_read_zaya),
}
"""Module classes that are watched in a way of their own; all others are known by their arguments."""

NO_TEXT = (".vision_moe.",)
"""Parts of the names of experts that no text token ever reaches: those for image patches in ernie4_5_vl_moe."""


def register_family(class_name: str, family: Family) -> None:
    """Teach coterie the MoE modules of a class that it does not know; `docs/families.md` has an example."""
    FAMILIES[class_name] = family


def _forward_parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]  # without self


def _family_of(module: nn.Module) -> Family | None:
    for cls in type(module).__mro__:  # wrappers such as FSDP subclass
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    takes_selection = any(argument in SELECTION_ARGUMENTS for argument in _forward_parameters(module))
    return Family(read_arguments) if takes_selection else None


def _find(model: nn.Module) -> tuple[list[tuple[MoELayer, Family]], int]:
    # The MoE layers, and how many layers their stacks have in all, dense ones included.
    found: list[tuple[MoELayer, Family]] = []
    first_of_stack: dict[str, int] = {}  # the id of layer 0 of each stack of layers
    num_stacked = 0
    for name, module in model.named_modules():
        family = _family_of(module)
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        if family is None or number is None or any(part in f".{name}." for part in NO_TEXT):
            continue
        stack = name[: number.start()]
        if stack not in first_of_stack:
            first_of_stack[stack] = num_stacked
            num_stacked += sum(1 for _ in model.get_submodule(stack).children())
        layer = MoELayer(
            layer_id=first_of_stack[stack] + int(number[1]),
            name=name,
            hooked=module.get_submodule(family.hooked),
            experts=module.get_submodule(family.experts),
            read=partial(family.read, module),
        )
        found.append((layer, family))
    if not found:
        classes = sorted({type(module).__name__ for module in model.modules() if next(module.children(), None)})
        raise CoterieError(
            f"{type(model).__name__} has no MoE layers that coterie knows: give a Mixture-of-Experts model, or teach "
            f"it with profiler.families.register_family (docs/families.md; modules seen: {', '.join(classes)})"
        )
    found.sort(key=lambda pair: pair[0].layer_id)
    for (one, _), (other, _) in pairwise(found):
        if one.layer_id == other.layer_id:
            raise CoterieError(
                f"{one.name} and {other.name} are two sets of experts in one layer: "
                "give the part of the model that has one a layer"
            )
    return found, num_stacked


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers of a model in layer order.

    A layer's id is its number in its stack, the list of layers that it sits in.  Where a model has MoE layers in
    several stacks, such as an encoder and a decoder, the numbers of each go on where those of the one before it end,
    in the order of the model's modules: behind an encoder of 12 layers, layer 1 of the decoder is 13.

    Raises:
        CoterieError: there is none, the message names the module classes that were seen; or one layer has two sets
            of experts.
    """
    return [layer for layer, _ in _find(model)[0]]


def _routing(model: nn.Module, name: str, family: Family, config: Any) -> tuple[int | None, int]:
    # K and the number of groups. The routers know them best, since configs may list K for each layer and name groups
    # that nothing uses; a router sits beside the experts or inside the block that holds both.
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    places: list[Any] = [module, *module.children(), parent, *parent.children()]
    top_ks = (getattr(place, key, None) for place in [*places, config] for key in TOP_K_NAMES)
    top_k = family.top_k or next((value for value in top_ks if isinstance(value, int)), None)
    groups = (getattr(place, "num_group", None) for place in places if getattr(place, "topk_method", None) != "greedy")
    return top_k, next((value for value in groups if isinstance(value, int)), 1)


def read_spec(model: nn.Module, name: str) -> MoESpec:
    """Describe a loaded model. Sizes come from the shapes of the experts' weights, which may be on the meta device.

    `hidden_size` is what an expert takes in: the latent width where a layer projects its tokens down first.

    Raises:
        CoterieError: the model has no MoE layers, they differ in their sizes, or nothing says how many experts a token
            picks.
    """
    found, num_hidden_layers = _find(model)
    whole_config: Any = getattr(model, "config", None)
    config: Any = whole_config.get_text_config() if hasattr(whole_config, "get_text_config") else whole_config
    layer_of_sizes: dict[tuple[int, int, int, int, int], str] = {}
    for layer, family in found:
        top_k, num_groups = _routing(model, layer.name, family, config)
        if top_k is None:
            raise CoterieError(
                f"{name}: its config has no num_experts_per_tok, so top-k is unknown; add it to config.json, "
                "or `top_k` to its Family (docs/families.md)"
            )
        layer_of_sizes.setdefault((*family.shape(layer.experts), top_k, num_groups), layer.name)
    if len(layer_of_sizes) > 1:
        (sizes, layer_name), (other_sizes, other_name) = list(layer_of_sizes.items())[:2]
        raise CoterieError(
            f"{name}: (experts, hidden size, expert size, top-k, groups) are {sizes} in {layer_name} "
            f"and {other_sizes} in {other_name}: give the part of the model whose MoE layers are alike"
        )
    num_experts, hidden_size, expert_size, top_k, num_groups = next(iter(layer_of_sizes))
    return MoESpec(
        name=name,
        model_type=str(getattr(config, "model_type", type(model).__name__)),
        layer_ids=tuple(layer.layer_id for layer, _ in found),
        num_experts=num_experts,
        top_k=top_k,
        num_groups=num_groups,
        hidden_size=hidden_size,
        expert_size=expert_size,
        dtype=str(next(found[0][0].experts.parameters()).dtype).removeprefix("torch."),
        num_hidden_layers=num_hidden_layers,
    )
