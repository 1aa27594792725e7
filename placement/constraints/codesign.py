"""Co-design: plan for the routing, constrain the routing by the plan, and again, until tokens visit no fewer ranks.
Knows no strategy: plans come from a function that the caller passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from placement.constraints.constrain import Constraint, constrain
from placement.constraints.quality import perplexity
from placement.cost import evaluate
from placement.placement_map import PlacementMap
from profiler.batches import Batches
from profiler.errors import CoterieError
from profiler.loading import LoadedModel
from profiler.profile import Profile
from profiler.recorder import Recorder

SMALLEST_GAIN = 0.005
"""A round that lowers fan_out by a smaller share is the last."""


@dataclass(frozen=True)
class Round:
    """A plan and a constraint that fit each other.

    Attributes:
        placement: planned on the routing of the round before.
        constraint: made of that plan.
        fan_out: of the constrained routing on the plan, mean over layers, on the text that both were made with.
        busiest_ingress: likewise.
        perplexity: of the constrained model on that text.
    """

    placement: PlacementMap
    constraint: Constraint
    fan_out: float
    busiest_ingress: float
    perplexity: float


def alternate(
    loaded: LoadedModel,
    batches: Batches,
    plan: Callable[[Profile], PlacementMap],
    make: Callable[[Profile, PlacementMap], Constraint],
    *,
    max_rounds: int = 5,
    on_round: Callable[[Round], None] = lambda _round: None,
) -> list[Round]:
    """Alternate plans and constraints until `fan_out` stops falling; the best round is the last but perhaps one.

    Args:
        batches: text to run the model on, once freely and once in every round.
        plan: a placement map for a profile.
        make: a constraint from the free profile and a map, such as device-aware lists or a limit of ranks.
        max_rounds: stop after so many.
        on_round: is given each round.

    Raises:
        CoterieError: the model cannot be constrained, or `max_rounds` is below 1.
    """
    if max_rounds < 1:
        raise CoterieError(f"rounds {max_rounds}: must be at least 1")

    def run(constraint: Constraint | None) -> tuple[Profile, float]:
        recorder: Any = Recorder(loaded.model, loaded.name)
        with constrain(loaded.model, constraint), recorder:
            quality = perplexity(loaded.model, batches, loaded.input_device)
        return Profile.from_tokens(recorder.spec, ["all"], recorder.trace(), {"constrained": bool(constraint)}), (
            quality.overall
        )

    free, _ = run(None)
    routing, rounds = free, list[Round]()
    while len(rounds) < max_rounds:
        placement = plan(routing)
        constraint = make(free, placement)
        routing, quality = run(constraint)
        metrics = evaluate(placement, routing.require_tokens())
        figures = float(metrics.fan_out.mean()), float(metrics.busiest_ingress.mean())
        rounds.append(Round(placement, constraint, *figures, quality))
        on_round(rounds[-1])
        if len(rounds) > 1 and rounds[-1].fan_out > rounds[-2].fan_out * (1 - SMALLEST_GAIN):
            break
    return rounds


def best(rounds: list[Round]) -> Round:
    """The round of the lowest fan_out."""
    return min(rounds, key=lambda one: one.fan_out)
