"""Where a model keeps its experts and announces which ones each token picked. The only module that looks inside models.

transformers hands the router's selection to the experts module as an argument, so one hook on that argument sees the
true selection in most families: after bias correction, group limits and whatever else the router does.  The top-k of
the router's logits would not.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from profiler.errors import CoterieError
from profiler.spec import MoESpec

SELECTION_ARGUMENTS = ("top_k_index", "router_indices")
"""Names under which experts modules take the selection, int64 (tokens, K); the second is gpt_oss's."""


@dataclass(frozen=True)
class MoELayer:
    """One experts module of a model.

    Attributes:
        layer_id: the global number of the decoder layer that it sits in.
        name: its dotted name in the model.
        experts: the module; its parameters' first dimension is the expert.
        argument: name of the forward argument that carries the selection.
        position: index of that argument where it is passed by position.
    """

    layer_id: int
    name: str
    experts: nn.Module
    argument: str
    position: int

    def selection(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The selected expert ids, int64 (tokens, K), out of one call's arguments."""
        value = kwargs[self.argument] if self.argument in kwargs else args[self.position]
        assert isinstance(value, torch.Tensor)
        return value


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The experts modules of a model in layer order.

    Raises:
        CoterieError: there is none; the message names the module classes that were seen.
    """
    layers = []
    for name, module in model.named_modules():
        parameters = list(inspect.signature(type(module).forward).parameters)[1:]  # without self
        argument = next((argument for argument in SELECTION_ARGUMENTS if argument in parameters), None)
        number = re.search(r"\.(\d+)(?:\.|$)", f".{name}")
        if argument is not None and number is not None and hasattr(module, "num_experts"):
            layers.append(MoELayer(int(number[1]), name, module, argument, parameters.index(argument)))
    if not layers:
        classes = sorted({type(module).__name__ for module in model.modules() if next(module.children(), None)})
        raise CoterieError(
            f"{type(model).__name__} has no MoE layers that coterie knows: give a Mixture-of-Experts model "
            f"(modules seen: {', '.join(classes)})"
        )
    return sorted(layers, key=lambda layer: layer.layer_id)


def read_spec(model: nn.Module, name: str) -> MoESpec:
    """Describe a loaded transformers model.

    Raises:
        CoterieError: the model has no MoE layers, or its config does not say how many experts a token picks.
    """
    layers = find_moe_layers(model)
    whole_config: Any = model.config
    config: Any = whole_config.get_text_config()
    top_k: Any = getattr(config, "num_experts_per_tok", None) or getattr(config, "top_k", None)
    num_groups: Any = getattr(config, "n_group", None) or 1
    if top_k is None:
        raise CoterieError(f"{name}: its config has no num_experts_per_tok, so top-k is unknown; add it to config.json")
    width: Any = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", 0)
    return MoESpec(
        name=name,
        model_type=str(config.model_type),
        layer_ids=tuple(layer.layer_id for layer in layers),
        num_experts=len(next(layers[0].experts.parameters())),
        top_k=int(top_k),
        num_groups=int(num_groups),
        hidden_size=int(config.hidden_size),
        expert_size=int(width),
        dtype=str(next(layers[0].experts.parameters()).dtype).removeprefix("torch."),
    )
