"""What is known of a model besides the recording of its routing, and whether the two agree. Knows no file format."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from profiler.errors import CoterieError
from profiler.spec import UNNAMED, MoESpec


@dataclass(frozen=True)
class Known:
    """What the user says about the model; None where the recording has to say, or nobody knows.

    Attributes:
        name: what people call the model.
        model_type: the architecture's name in transformers.
        layer_ids: global numbers of the MoE layers, ascending.
        num_experts: E.
        top_k: K.
        num_groups: groups that group-limited routing chooses from.
        hidden_size: values in one token's hidden state.
        expert_size: intermediate width of one expert.
        dtype: of the weights.
        num_hidden_layers: all layers, dense ones included.
    """

    name: str | None = None
    model_type: str | None = None
    layer_ids: tuple[int, ...] | None = None
    num_experts: int | None = None
    top_k: int | None = None
    num_groups: int | None = None
    hidden_size: int | None = None
    expert_size: int | None = None
    dtype: str | None = None
    num_hidden_layers: int | None = None

    @classmethod
    def of_model(cls, model: str) -> Known:
        """All of it, from a model's config.

        Raises:
            CoterieError: there is no such config, or it is of no MoE model that coterie knows.
        """
        from profiler.loading import read_shape  # torch takes seconds, and not every import needs it

        return cls(**read_shape(model).to_json())

    def to_spec(
        self, name: str, layer_ids: Collection[int], top_k: int, num_experts: int | None, highest_id: int = -1
    ) -> MoESpec:
        """The model of a recording.

        Args:
            name: where none is known.
            layer_ids: layers that were recorded.
            top_k: experts that a token was recorded with.
            num_experts: E if the recording says it; None takes what is known, or else the highest id and 1.
            highest_id: expert that was recorded.

        Raises:
            CoterieError: the recording is of another model than the one that is known.
        """
        found = tuple(sorted(layer_ids))
        if self.layer_ids is not None and found != self.layer_ids:
            odd = sorted(set(found) ^ set(self.layer_ids))[0]
            how = "is recorded, and is no MoE layer of the model" if odd in found else "of the model is not recorded"
            raise CoterieError(f"layer {odd} {how} (recorded: {_ranges(found)}); give the --model that was recorded")
        if self.top_k not in (None, top_k):
            raise CoterieError(f"top-{top_k} is recorded, the model has top-{self.top_k}; give the one recorded")
        if num_experts is None:
            num_experts = highest_id + 1 if self.num_experts is None else self.num_experts
        elif self.num_experts not in (None, num_experts):
            raise CoterieError(
                f"{num_experts} experts are recorded, the model has {self.num_experts}; give the one recorded"
            )
        if highest_id >= num_experts:
            raise CoterieError(f"expert {highest_id} is recorded, must be below num_experts ({num_experts})")
        return MoESpec(
            name=self.name or name,
            model_type=self.model_type or UNNAMED,
            layer_ids=found,
            num_experts=num_experts,
            top_k=top_k,
            num_groups=self.num_groups or 1,
            hidden_size=self.hidden_size or 0,
            expert_size=self.expert_size or 0,
            dtype=self.dtype or "bfloat16",
            num_hidden_layers=self.num_hidden_layers or 0,
        )

    def require_top_k(self, source: str) -> int:
        """K, for recordings that do not say it.

        Raises:
            CoterieError: nobody does.
        """
        if self.top_k is None:
            raise CoterieError(f"{source}: does not say how many experts a token picks; give --top-k or --model")
        return self.top_k


def parse_layers(text: str) -> tuple[int, ...]:
    """Layer numbers such as `3-60` or `1,3,5`.

    Raises:
        CoterieError: it is none.
    """
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(first + last) > 10:
            raise CoterieError(f"layers {text!r}: must be numbers and ranges such as 3-60 or 1,3,5")
        if dash and int(last) - int(first) > 100_000:
            raise CoterieError(f"layers {text!r}: no model has so many; give the numbers of its MoE layers")
        # A range that runs backwards is empty; its ends are not ascending.
        layers += range(int(first), int(last if dash else first) + 1) or (int(first), int(last))
    if layers != sorted(set(layers)):
        raise CoterieError(f"layers {text!r}: must be distinct and ascending")
    return tuple(layers)


def _ranges(layers: tuple[int, ...]) -> str:
    """As `parse_layers` takes them."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts) or "none"
