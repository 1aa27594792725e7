"""Which tensors of a checkpoint hold something of each expert, and how a plan renames or reorders them.

Goes by names and shapes alone, as checkpoints of the hub have them; where those do not add up to whole MoE layers it
refuses. Opens no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from placement.exporters.shards import INTEGERS, Edit, Tensor
from placement.placement_map import PlacementMap
from profiler.errors import CoterieError

DRAFT_STACKS = re.compile(r"(^|\.)(mtp|nextn)")
"""Stacks of layers for multi-token prediction, which have experts of their own and stay as they are."""

NUMBERED = re.compile(r"(?P<before>(?:.*\.)?experts\.(?:expert_)?)(?P<expert>\d+)(?P<after>\..*)")
"""Names, within a layer, of tensors of one expert: `experts.7.…`, or `experts.expert_7.…`."""

PACKED = re.compile(r"(.*\.)?(experts\..*|(input|output)_linear\.weight)")
"""Names, within a layer, of tensors that may hold all experts: below `experts.`, or JetMoE's linear ones."""

ROUTER_PARTS = {"gate", "router", "router_gate", "wg", "balancing_biases", "expert_bias", "per_expert_scale"}
"""Parts of names of routers, and of biases and scales by expert that belong to them."""

ID_TABLES = {"tid2eid"}
"""Tables that hold expert ids: deepseek_v4's, by token."""


@dataclass(frozen=True)
class Renumbering:
    """One layer's new numbering: expert `old_of_new[p]` becomes p, and e becomes `new_of_old[e]`."""

    old_of_new: tuple[int, ...]
    new_of_old: tuple[int, ...]


def renumberings(placement: PlacementMap, num_groups: int, *, invert: bool) -> dict[int, Renumbering]:
    """By layer number, the numbering that makes linear placement the plan, or undoes that.

    Args:
        num_groups: of the model's router; what it chooses from is E / num_groups consecutive experts.

    Raises:
        CoterieError: the map has redundant experts or empty slots, or takes a router's group apart.
    """
    spec, topology = placement.model, placement.topology
    if topology.num_slots != spec.num_experts:
        spare = topology.num_slots - spec.num_experts
        raise CoterieError(
            f"the map has {topology.num_slots} slots for {spec.num_experts} experts, a permuted checkpoint has as many "
            f"as the model: the other {spare} (redundant experts or empty slots) cannot be; plan without redundant "
            f"experts for a number of ranks that divides {spec.num_experts}"
        )
    out = {}
    size = spec.num_experts // num_groups
    slots_LE = placement.slot_of_expert
    for layer, experts, slots in zip(spec.layer_ids, placement.physical_to_logical_map, slots_LE, strict=True):
        groups = [set((experts[first : first + size] // size).tolist()) for first in range(0, spec.num_experts, size)]
        if any(len(group) > 1 for group in groups):
            raise CoterieError(
                f"layer {layer}: the plan mixes the router's {num_groups} groups of {size} experts, which would change "
                "what it selects; plan with --preserve-groups"
            )
        pair = tuple(experts.tolist()), tuple(slots.tolist())
        out[layer] = Renumbering(*(pair[::-1] if invert else pair))
    return out


def find_edits(
    tensors: Sequence[Tensor], layers: Mapping[int, Renumbering], num_experts: int, num_hidden_layers: int
) -> list[Edit]:
    """What becomes of every tensor of a checkpoint, in the given order.

    Args:
        num_hidden_layers: experts in layers from there on are those of multi-token prediction; 0 where not known.

    Raises:
        CoterieError: a layer of the plan has no experts or router that are known, or another layer has some.
    """
    stack = _stack_of_experts([tensor.name for tensor in tensors])
    edits, seen = [], _Seen({layer: set() for layer in layers}, {layer: {} for layer in layers})
    for tensor in tensors:
        found = re.fullmatch(re.escape(stack) + r"(\d+)\.(.*)", tensor.name)
        if not found:
            edits.append(Edit(tensor.name))
            continue
        layer, rest = int(found[1]), found[2]
        if layer not in layers:
            if (layer < num_hidden_layers or not num_hidden_layers) and (NUMBERED.match(rest) or PACKED.match(rest)):
                raise CoterieError(f"{tensor.name}: the plan has no layer {layer}; plan for this model")
            edits.append(Edit(tensor.name))
            continue
        edits.append(_edit(tensor, rest, layer, layers[layer], num_experts, seen))
    seen.require_all(num_experts)
    return edits


@dataclass(frozen=True)
class _Seen:
    """What every layer was found to have: kinds of tensors, and the experts of each numbered tensor."""

    kinds: dict[int, set[str]]
    experts: dict[int, dict[str, set[int]]]

    def require_all(self, num_experts: int) -> None:
        for layer, kinds in self.kinds.items():
            missing = {"experts", "router"} - kinds
            if missing:
                raise CoterieError(
                    f"layer {layer}: no {' and no '.join(sorted(missing))} of {num_experts} experts under a name that "
                    "coterie knows; this family cannot be permuted"
                )
            for name, experts in self.experts[layer].items():
                if len(experts) != num_experts:
                    raise CoterieError(
                        f"layer {layer}: {len(experts)} experts have {name}, must be {num_experts}; is a shard missing?"
                    )


def _stack_of_experts(names: Iterable[str]) -> str:
    """The part of the names before the number of a decoder layer that has experts."""
    stacks = set()
    for name in names:
        found = re.match(r"((?:.*?\.)?)\d+\.(.*)", name)
        has_experts = found and (NUMBERED.match(found[2]) or PACKED.match(found[2]))
        if found and has_experts and not DRAFT_STACKS.search(found[1]) and not _in_attention(found[2]):
            stacks.add(found[1])
    if len(stacks) != 1:
        what = f"in {len(stacks)} stacks of layers ({', '.join(sorted(stacks))})" if stacks else "nowhere"
        raise CoterieError(f"experts are {what}, must be in one; this family cannot be permuted")
    return stacks.pop()


def _edit(tensor: Tensor, rest: str, layer: int, new: Renumbering, num_experts: int, seen: _Seen) -> Edit:
    """What becomes of a tensor of a planned layer, named `rest` within it."""
    parts = rest.split(".")
    if _in_attention(rest) or any(part.startswith("shared") for part in parts):
        return Edit(tensor.name)
    if parts[-1] in ID_TABLES and tensor.dtype in INTEGERS:
        seen.kinds[layer].add("router")
        return Edit(tensor.name, new_id=new.new_of_old)
    numbered = NUMBERED.fullmatch(rest)
    if numbered:
        expert = int(numbered["expert"])
        if expert >= num_experts:
            raise CoterieError(f"{tensor.name}: the plan is for {num_experts} experts; plan for this model")
        seen.kinds[layer].add("experts")
        seen.experts[layer].setdefault(numbered["after"], set()).add(expert)
        renamed = f"{numbered['before']}{new.new_of_old[expert]}{numbered['after']}"
        return Edit(tensor.name.removesuffix(rest) + renamed)
    whole = [axis for axis, size in enumerate(tensor.shape) if size == num_experts]
    if PACKED.fullmatch(rest) and not ROUTER_PARTS & set(parts):
        if len(tensor.shape) == 1 and any("norm" in part for part in parts):  # of values, which all experts share
            return Edit(tensor.name)
        seen.kinds[layer].add("experts")
        # What has several rows an expert is a matrix; a vector of several values an expert may be anything else.
        stacked = len(tensor.shape) > 1 and tensor.shape[0] and tensor.shape[0] % num_experts == 0
        if stacked or tensor.shape == (num_experts,):
            return Edit(tensor.name, 0, new.old_of_new)
        if all(size == 1 for size in tensor.shape):  # one scale for all experts
            return Edit(tensor.name)
        raise CoterieError(f"{tensor.name}: shape {list(tensor.shape)} is not by expert ({num_experts} of them)")
    if ROUTER_PARTS & set(parts) or parts[-1].endswith("e_score_correction_bias"):
        if len(tensor.shape) > 1:
            if not whole and not parts[-1].endswith("bias"):  # with rows for shared, zero or skip experts, say
                raise CoterieError(
                    f"{tensor.name}: a router of shape {list(tensor.shape)}, must have a row for each of {num_experts} "
                    "experts and no other; this family cannot be permuted"
                )
            seen.kinds[layer].add("router")
        return Edit(tensor.name, whole[0], new.old_of_new) if whole else Edit(tensor.name)
    if whole and parts[0] in ("mlp", "block_sparse_moe", "feed_forward", "moe", "ffn", "mixer"):
        raise CoterieError(
            f"{tensor.name}: {list(tensor.shape)} may be by expert ({num_experts} of them), under a name that coterie "
            "does not know; this family cannot be permuted"
        )
    return Edit(tensor.name)


def _in_attention(rest: str) -> bool:
    return any(part.endswith(("attn", "attention")) for part in rest.split("."))
