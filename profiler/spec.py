"""What the rest of the project needs to know about one Mixture-of-Experts model. Knows nothing of torch or files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from profiler.errors import CoterieError

MAX_EXPERTS = 65_535
"""Expert ids are stored in at most 16 bits, all-ones meaning "no expert"."""

UNNAMED = "unknown"
"""Name, or architecture, of a model that a recording does not name."""


@dataclass(frozen=True)
class MoESpec:
    """The shape of one model's MoE layers.

    Attributes:
        name: what people call the model; not used to tell models apart.
        model_type: the architecture's name in transformers, such as `olmoe`; `UNNAMED` where not known.
        layer_ids: global layer numbers of the L MoE layers, ascending; dense layers are left out.
        num_experts: E, logical experts in each MoE layer.
        top_k: K, experts that a token picks in each layer.
        num_groups: groups that group-limited routing chooses from; 1 where there is none.
        hidden_size: values that an expert takes in; 0 where not known.
        expert_size: intermediate width of one expert; 0 where not known.
        dtype: of the weights as recorded, such as `bfloat16`.
        num_hidden_layers: decoder layers, dense ones included, which some engines want a row for; 0 where not known.
    """

    name: str
    model_type: str
    layer_ids: tuple[int, ...]
    num_experts: int
    top_k: int
    num_groups: int
    hidden_size: int
    expert_size: int
    dtype: str
    num_hidden_layers: int = 0

    def __post_init__(self) -> None:
        if not self.layer_ids or list(self.layer_ids) != sorted(set(self.layer_ids)) or self.layer_ids[0] < 0:
            raise CoterieError(f"layer_ids {list(self.layer_ids)}: must be distinct layer numbers, ascending")
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise CoterieError(f"num_experts {self.num_experts}: must be between 1 and {MAX_EXPERTS}")
        if not 1 <= self.top_k <= self.num_experts:
            raise CoterieError(f"top_k {self.top_k}: must be between 1 and num_experts ({self.num_experts})")
        if not 1 <= self.num_groups <= self.num_experts:
            raise CoterieError(f"num_groups {self.num_groups}: must be between 1 and num_experts ({self.num_experts})")
        if self.num_hidden_layers and self.num_hidden_layers <= self.layer_ids[-1]:
            raise CoterieError(
                f"num_hidden_layers {self.num_hidden_layers}: must be above the last MoE layer ({self.layer_ids[-1]}), "
                "or 0 where not known"
            )

    @property
    def num_layers(self) -> int:
        """L, the number of MoE layers."""
        return len(self.layer_ids)

    def routes_like(self, other: MoESpec) -> bool:
        """Whether a plan for one of the two models means the same thing on the other, as far as is known of both."""

        def known(spec: MoESpec) -> tuple[object, ...]:
            model_type = None if spec.model_type == UNNAMED else spec.model_type
            return model_type, spec.hidden_size or None, spec.expert_size or None

        def shape(spec: MoESpec) -> tuple[object, ...]:
            return spec.layer_ids, spec.num_experts, spec.top_k

        both = zip(known(self), known(other), strict=True)
        return shape(self) == shape(other) and all(None in pair or pair[0] == pair[1] for pair in both)

    def describe(self) -> str:
        """One phrase for messages and tables; sizes that are not known are left out."""
        width = f" of {self.hidden_size}x{self.expert_size}" if self.hidden_size and self.expert_size else ""
        layers = f"{self.num_layers} MoE layer{'s' if self.num_layers > 1 else ''}"
        return f"{self.name} ({self.model_type}: {layers}, {self.num_experts} experts{width}, top-{self.top_k})"

    def to_json(self) -> dict[str, Any]:
        """The form in which `profile.json` and placement maps hold it; without `num_hidden_layers` where not known."""
        value = asdict(self)
        if not self.num_hidden_layers:
            del value["num_hidden_layers"]  # so that files from before it was recorded keep their digest
        return value

    @classmethod
    def from_json(cls, value: object) -> MoESpec:
        """Read what `to_json` wrote.

        Raises:
            CoterieError: a field is missing, unknown, or of the wrong kind.
        """
        if not isinstance(value, Mapping):
            raise CoterieError("model: must be an object that describes the MoE layers")
        kinds = {field.name: field.type for field in fields(cls)}
        if "num_hidden_layers" not in value:
            value = {**value, "num_hidden_layers": 0}
        if set(value) != set(kinds):
            odd = sorted(set(value) ^ set(kinds))
            raise CoterieError(f"model: missing or unknown fields {', '.join(map(str, odd))}")
        for name, kind in kinds.items():
            if (kind == "int" and type(value[name]) is not int) or (kind == "str" and not isinstance(value[name], str)):
                raise CoterieError(
                    f"model.{name}: {value[name]!r} is not {'a whole number' if kind == 'int' else 'text'}"
                )
        layer_ids = value["layer_ids"]
        if not isinstance(layer_ids, list | tuple) or any(type(layer) is not int for layer in layer_ids):
            raise CoterieError(f"model.layer_ids: {layer_ids!r} is not a list of layer numbers")
        return cls(**{**value, "layer_ids": tuple(layer_ids)})
