"""Every strategy on one profile, side by side, with the figures of the traffic that none of them has seen.
Besides the command line the only one that plans. Knows no engine, and writes no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from placement.choice import Choice
from placement.cost import evaluate, summarise
from placement.placement_map import PlacementMap
from placement.solvers import ALWAYS_COMPARED, Options, layer_problems, plan, plan_layers, require_strategy
from placement.timing import Mode, Workload, time_of
from placement.topology import Topology
from profiler.errors import CoterieError
from profiler.profile import Profile
from profiler.spec import MoESpec
from profiler.trace import TokenTrace

LOSS_TO_WARN_OF = 0.05
"""Share by which busiest_ingress may be higher on unseen sequences than on planned ones before text is too little."""

WORTH_IT_FROM = 0.03
"""A plan that is not this much better than load-only on traffic it has not seen is not worth deploying."""

KEEP_GROUPS = ("search", "linear")
"""Strategies whose plans keep a router's groups together where that is wanted."""

DECISIVE: dict[Mode, str] = {"per-rank": "busiest_ingress", "per-expert": "imbalance_ratio"}
"""The figure that tells whether a plan is worth it where times are not known, and how sure that is where they are."""


def plan_and_compare(
    profile: Profile,
    topology: Topology,
    strategy: str = "search",
    options: Options | None = None,
    *,
    strategies: Sequence[str] = ALWAYS_COMPARED,
    held_out: Profile | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> PlacementMap:
    """The plan of one strategy, with `metrics` that compare all of them.

    Args:
        strategies: whose figures to give; `strategy` is added to them.
        held_out: measure on this profile; where None, plan with the even sequences and measure on the odd ones.
        on_layer: called as each layer of each strategy is done.

    Raises:
        CoterieError: as `plan` does, or the two profiles are of different models.
    """
    options = options or Options()
    if options.preserve_groups and profile.model.num_groups > 1 and strategy not in KEEP_GROUPS:
        raise CoterieError(f"strategy {strategy!r} takes groups apart; {' and '.join(KEEP_GROUPS)} keep them")
    source = profile.digest
    profile, held_out = planned_and_unseen(profile, held_out)
    held_out.require_tokens()  # said before anything is planned
    metrics = {}
    # The one that was asked for comes first: if it cannot be, no time is lost on the others.
    names = dict.fromkeys([strategy, *strategies])
    for name in names:
        require_strategy(name)
    problems = layer_problems(profile, topology, options)
    maps = {name: plan_layers(profile, topology, problems, name, options, on_layer) for name in names}
    for name in dict.fromkeys([*strategies, strategy]):
        metrics[name] = {
            "train": measure(maps[name], profile.require_tokens(), options.workload),
            "held_out": measure(maps[name], held_out.require_tokens(), options.workload),
            "tokens_planned_on": profile.require_tokens().num_tokens,
            "tokens_measured_on": held_out.require_tokens().num_tokens,
        }
    return replace(maps[strategy], metrics=metrics, profile_digest=source)


def planned_and_unseen(profile: Profile, held_out: Profile | None) -> tuple[Profile, Profile]:
    """What to plan with and what to measure on.

    Raises:
        CoterieError: the two are of different models, or one profile cannot be split.
    """
    if held_out is None:
        return profile.split_by_sequence()
    if not profile.model.routes_like(held_out.model):
        raise CoterieError(
            f"the profile is of {profile.model.describe()}, the held-out one of {held_out.model.describe()}; "
            "record both on one model"
        )
    return profile, held_out


def measure(
    placement: PlacementMap, tokens: TokenTrace, workload: Workload, choice: Choice = "token"
) -> dict[str, dict[str, float | None]]:
    """All metrics over layers, and `predicted_time` in seconds where the links and the model's sizes are known."""
    metrics = evaluate(placement, tokens, choice)
    figures = metrics.summary()
    time = time_of(placement, metrics, workload)
    if time is not None:
        figures["predicted_time"] = summarise(time.total)
    return figures


def verdict(
    metrics: Mapping[str, Any], strategy: str, options: Options | None = None, *, seen: bool = False
) -> list[str]:
    """What a person should know before deploying the plan, a sentence each; empty where all is well.

    Args:
        options: what it was planned with.
        seen: whether what was planned with is among what was measured on.
    """
    options = options or Options()
    mine, mode = metrics[strategy], options.workload.mode
    sentences = []
    highest = mine["train"]["imbalance_ratio"]["worst"]
    weighted = options.domain_weights or options.worst_domain  # metrics count all tokens alike
    if options.load_cap is not None and not weighted and highest > options.load_cap * (1 + 1e-9):
        sentences.append(
            f"the load cap of {options.load_cap:g} is not kept: on the tokens planned with, imbalance_ratio is up to "
            f"{highest:.2f}; give redundant experts or a higher cap"
        )
    if seen:
        sentences.append("these figures are of routing that the plan has seen, so no verdict is given; give other text")
        return sentences
    if options.domain_weights:
        sentences.append("these figures count all tokens alike, whatever their domain counts; so no verdict is given")
        return sentences
    if "load" in metrics and strategy != "load":
        name = "predicted_time" if "predicted_time" in mine["held_out"] else DECISIVE[mode]
        own, other = (metrics[which]["held_out"][name]["mean"] for which in (strategy, "load"))
        gain = 1 - own / other if other else 0.0
        if other and gain < WORTH_IT_FROM:
            because = {
                "per-rank": "the routing has too little structure, or this hardware too little to gain from it",
                "per-expert": "sent once per expert, only balance counts, and engines can balance themselves",
            }
            sentences.append(
                f"not worth it: on unseen sequences the plan's {name} is {abs(gain):.1%} "
                f"{'below' if gain >= 0 else 'above'} that of balancing the load only; {because[mode]}"
            )
    train, unseen = (mine[part]["busiest_ingress"]["mean"] for part in ("train", "held_out"))
    loss = unseen / train - 1 if train else 0.0
    if loss > LOSS_TO_WARN_OF:
        sentences.append(
            f"planned on {mine['tokens_planned_on']:,} tokens, too few: busiest_ingress is {loss:.1%} higher on "
            "sequences that the plan has not seen; record more text"
        )
    return sentences


def require_provable(topology: Topology, model: MoESpec, options: Options) -> None:
    """Check that a plan could be certified.

    Raises:
        CoterieError: there are redundant or empty slots, or domains are weighted, which no proof covers yet.
    """
    if options.domain_weights:
        raise CoterieError("certificates are for tokens that count alike; plan without --certify or --domain-weight")
    if topology.num_slots != model.num_experts:
        raise CoterieError(
            f"{topology.num_slots} slots for {model.num_experts} experts: certificates are for plans with a slot for "
            "each expert; plan without --certify"
        )


def certify_plan(
    profile: Profile,
    placement: PlacementMap,
    options: Options,
    seconds_per_layer: float,
    held_out: Profile | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> PlacementMap:
    """The plan with a certificate for each layer: how far it is from the best on the tokens that it was planned with.

    Raises:
        CoterieError: no proof covers such a plan, see `require_provable`.
    """
    require_provable(placement.topology, placement.model, options)
    from placement.certify import certify  # networkx, pandas and scipy take most of a second, and are seldom needed

    planned, _ = planned_and_unseen(profile, held_out)
    certificates = {}
    problems = layer_problems(planned, placement.topology, options)
    for layer_id, problem, ranks in zip(placement.model.layer_ids, problems, placement.rank_of_expert, strict=True):
        certificates[str(layer_id)] = certify(problem.merged(), ranks, seconds_per_layer).to_json()
        on_layer()
    return replace(placement, certificate=certificates)


def domain_regret(
    profile: Profile,
    placement: PlacementMap,
    options: Options,
    held_out: Profile | None = None,
    on_layer: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, float]]:
    """For each domain: what this plan costs on its unseen sequences, and what a plan for the domain alone would.

    Returns:
        By domain `busiest_ingress` and `imbalance_ratio` of this plan, `own_busiest_ingress` and `own_imbalance_ratio`
        of the domain's own, means over layers, and `regret`, the first over the third less 1.  Domains without
        sequences in both halves are left out.
    """
    planned, unseen = planned_and_unseen(profile, held_out)
    own_parts, unseen_parts = planned.split_by_domain(), unseen.split_by_domain()
    out = {}
    for domain in own_parts:
        if domain not in unseen_parts:
            continue
        if not (own_parts[domain].require_tokens().num_tokens and unseen_parts[domain].require_tokens().num_tokens):
            continue  # a sample of the tokens may hold none of a small domain
        # A cap that the mixture keeps may be out of reach in one domain.
        alone = replace(options, domain_weights=None, worst_domain=False, load_cap=None)
        own = plan(own_parts[domain], placement.topology, "search", alone, on_layer=on_layer)
        tokens = unseen_parts[domain].require_tokens()
        this, best = evaluate(placement, tokens), evaluate(own, tokens)
        out[domain] = {
            "busiest_ingress": float(np.mean(this.busiest_ingress)),
            "imbalance_ratio": float(np.mean(this.imbalance_ratio)),
            "own_busiest_ingress": float(np.mean(best.busiest_ingress)),
            "own_imbalance_ratio": float(np.mean(best.imbalance_ratio)),
            "regret": float(np.mean(this.busiest_ingress) / max(float(np.mean(best.busiest_ingress)), 1e-300) - 1),
        }
    return out
