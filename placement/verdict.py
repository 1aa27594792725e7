"""What the figures mean, in plain words: one answer to each question that people ask of a model and a plan.
Neither measures nor prints.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pandas as pd

from placement.compare import DECISIVE, WORTH_IT_FROM
from placement.insight import Insight
from placement.solvers import options_of
from placement.timing import time_of

Tone = Literal["good", "unsure", "bad", "plain"]

MARKED_MODULARITY = 0.3
"""Mean modularity from which groups are called marked."""

LITTLE_MODULARITY = 0.05
"""Mean modularity below which there are hardly any groups to place together."""

NOTICEABLE_REGRET = 0.05
"""Share of busiest_ingress that the plan may cost a domain, over the domain's own plan, before the answer is unsure."""

MUCH_IMBALANCE = 0.15
"""More imbalance_ratio than the peer's from which less traffic may not pay, where links are not known."""
NAMED = 4
"""Experts and pairs that a sentence lists."""


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        question: what people ask.
        headline: the answer in a few words.
        sentences: what it rests on.
        tone: whether it speaks for the plan.
    """

    question: str
    headline: str
    sentences: tuple[str, ...]
    tone: Tone = "plain"


def answers(insight: Insight) -> dict[str, Answer]:
    """By name: `worth`, `hot`, `together`, `enough`, `domains`."""
    return {
        "worth": _worth(insight),
        "hot": _hot(insight),
        "together": _together(insight),
        "enough": _enough(insight),
        "domains": _domains(insight),
    }


def _worth(insight: Insight) -> Answer:
    peer = "load" if "load" in insight.maps else "linear"
    peer_words = "balancing the load only" if peer == "load" else "experts in file order"
    row, before = insight.interval("plan"), insight.interval("linear")
    options = options_of(insight.plan)
    mode = options.workload.mode
    decisive = insight.interval("plan", DECISIVE[mode])
    gain, low = float(decisive[f"over_{peer}"]), float(decisive[f"over_{peer}_low"])
    times = _layer_times(insight)
    if times:  # how sure it is only the figure tells
        gain = 1 - times["plan"] / times[peer]
    num_sequences = len(np.unique(insight.measured.require_tokens().sequence_ids))
    tone: Tone
    if gain < WORTH_IT_FROM:
        headline, tone = "Not worth it on these links" if times else "Not worth it", "bad"
    elif low >= WORTH_IT_FROM and num_sequences > 1:  # one says nothing about others
        headline, tone = "Worth it", "good"
    else:
        headline, tone = "Perhaps worth it", "unsure"
    imbalance, of_peer = (float(insight.interval(name, "imbalance_ratio")["value"]) for name in ("plan", peer))
    if not times and tone == "good" and imbalance > of_peer + MUCH_IMBALANCE:
        headline, tone = "Less traffic, but uneven work", "unsure"
    if options.domain_weights:
        headline, tone = "Not known: the plan weighs domains, these figures count all tokens alike", "unsure"
    if insight.seen:
        headline, tone = "Not known: measured on what it was planned with", "unsure"
    busiest, of_peer_L = (insight.metrics[name].busiest_ingress for name in ("plan", peer))
    picked = of_peer_L > 0  # a layer may be without picks
    gain_L = 1 - busiest[picked] / of_peer_L[picked]
    ids = np.array(insight.profile.model.layer_ids)[picked]
    fan_out, after = (float(insight.interval(name, "fan_out")["value"]) for name in ("linear", "plan"))
    fewer, *ends = (float(row[f"over_{peer}{end}"]) for end in ("", "_low", "_high"))
    least, most = sorted(ends if fewer >= 0 else (-end for end in ends))  # in the direction that the words name
    sure = f"95% interval {least:+.1%} to {most:+.1%}" if num_sequences > 1 else "one sequence: how sure is not known"
    sentences = [
        f"The busiest rank is reached by {row['value']:.1%} of all tokens: {_less(fewer)} than with {peer_words} "
        f"({sure}) and {_less(float(row['over_linear']))} than in file order "
        f"({before['value']:.1%}).",
        f"The busiest rank does {imbalance:.2f} times the mean work ({of_peer:.2f} with {peer_words}); a token visits "
        f"{after:.2f} ranks, {fan_out:.2f} in file order.",
    ]
    links = insight.plan.topology.links
    if times and links:
        sentences.append(
            f"Predicted for the links of {links.name}: {1e6 * times['plan']:,.0f} µs a layer, "
            f"{1e6 * times[peer]:,.0f} with {peer_words}, {1e6 * times['linear']:,.0f} in file order."
        )
    if len(ids) > 1:
        best, least = int(gain_L.argmax()), int(gain_L.argmin())
        sentences.append(
            f"It gains most in layer {ids[best]} ({gain_L[best]:+.1%}) and least in layer {ids[least]} "
            f"({gain_L[least]:+.1%}), against {peer_words}."
        )
    sentences.extend(_measured(insight))
    known = "that the plan was made with" if insight.seen else "that the plan has not seen"
    sentences.append(
        f"Measured on {insight.measured.require_tokens().num_tokens:,} tokens of {num_sequences:,} sequences {known}. "
        + {
            "per-rank": "Fewer rows save time where an engine sends a token once per rank; where it sends once per "
            "expert, only balance counts.",
            "per-expert": "The plan is for an engine that sends a token once per expert, where only balance counts.",
        }[mode]
    )
    return Answer("Is a plan worth it here?", headline, tuple(sentences), tone)


def _measured(insight: Insight) -> list[str]:
    """What a bench found; of runs that have one plan beside file order, as others do not say which is this one."""
    if insight.bench is None:
        return []
    sentences = []
    for run in insight.bench.on(insight.plan.topology.num_ranks):
        rows = {row.map: row for row in run.rows if row.implementation == "coterie"}
        linear = rows.pop("linear", None)
        if linear is None or len(rows) != 1:
            continue
        (row,) = rows.values()
        total = row.total
        sentences.append(
            f"Measured on {run.num_ranks} ranks ({insight.bench.wire(run)}): {row.bytes_sent / 1e6:.1f} MB sent "
            f"instead of {linear.bytes_sent / 1e6:.1f} in file order; dispatch and combine took "
            f"{row.exchange.median:.1f} ms instead of {linear.exchange.median:.1f}, a whole step "
            f"{total.median:.1f} ms (from {total.least:.1f} to {total.most:.1f}) instead of {linear.total.median:.1f}."
        )
    return sentences


def _layer_times(insight: Insight) -> dict[str, float]:
    """Predicted seconds of a layer by map, mean over layers, for the plan's own workload; empty without links."""
    workload, times = options_of(insight.plan).workload, {}
    for name, placement in insight.maps.items():
        linked = replace(placement, topology=replace(placement.topology, links=insight.plan.topology.links))
        time = time_of(linked, insight.metrics[name], workload)
        if time is not None:
            times[name] = float(time.total.mean())
    return times


def _less(gain: float) -> str:
    return f"{abs(gain):.1%} {'fewer' if gain >= 0 else 'more'}"


def _hot(insight: Insight) -> Answer:
    experts, loads = insight.experts, insight.loads
    hottest = experts.loc[experts["relative_load"].idxmax()]
    hot, cold, dead = (int(loads[kind].sum()) for kind in ("hot", "cold", "dead"))
    headline = f"{hot} of {len(experts):,} experts are hot" if hot else "No expert is hot"
    uneven = loads.loc[loads["expert_imbalance"].idxmax()]
    others = experts.nlargest(1 + NAMED, "relative_load").iloc[1:]
    return Answer(
        "Which experts are hot?",
        headline,
        (
            f"The hottest is {_name(hottest)}: {hottest['relative_load']:.2f} times the mean load, "
            f"{hottest['share']:.1%} of all tokens. Next come {_listed(others, 'relative_load')}.",
            f"Hot means twice the mean of the layer or more; {cold} are cold (less than half of it), {dead} "
            f"were never picked. The least even layer is {uneven['layer']:.0f}.",
        ),
        "unsure" if hot or dead else "plain",
    )


def _name(row: pd.Series[float]) -> str:
    return f"expert {row['expert']:.0f} of layer {row['layer']:.0f}"


def _listed(rows: pd.DataFrame, figure: str) -> str:
    return ", ".join(f"{_name(row)} ({row[figure]:.2f})" for _, row in rows.iterrows()) or "no others"


def _together(insight: Insight) -> Answer:
    question = "Which experts belong together?"
    if insight.profile.model.top_k == 1:
        return Answer(question, "None: a token picks one expert", ("Top-1 models have no co-activation.",))
    communities = insight.communities
    mean = float(communities["modularity"].mean())
    words = "marked" if mean >= MARKED_MODULARITY else "little" if mean < LITTLE_MODULARITY else "clear"
    headline = {"marked": "Marked groups", "clear": "Groups that overlap", "little": "Hardly any groups"}[words]
    most = communities.loc[communities["modularity"].idxmax()]
    listed = ", ".join(
        f"{pair.expert} and {pair.partner} of layer {pair.layer} ({pair.lift:.1f} times chance, in {pair.share:.0%} of "
        "the former's tokens)"
        for pair in insight.pairs.head(NAMED).itertuples()
    )
    roles = insight.experts["role"].value_counts()
    specialized, collaborative, alone = (int(roles.get(role, 0)) for role in ("specialized", "collaborative", "none"))
    after, before = (float(np.nanmean(insight.metrics[name].intra_share)) for name in ("plan", "linear"))
    return Answer(
        question,
        headline,
        (
            f"A layer falls into {communities['communities'].median():.0f} communities (median), modularity {mean:.2f} "
            f"on average and {most['modularity']:.2f} in layer {most['layer']:.0f} (0 is chance).",
            f"The pairs that meet most beyond chance: {listed}.",
            f"The plan keeps {after:.1%} of all co-activated pairs on one rank, file order {before:.1%}. "
            f"{specialized} of {len(insight.experts):,} experts are specialized, {collaborative} work with many"
            + (f", {alone} with no other." if alone else "."),
        ),
        "plain",
    )


def _enough(insight: Insight) -> Answer:
    question = "How much data was enough?"
    if insight.study is None:
        return Answer(
            question, "Not studied", ("Left out, or fewer than 4 sequences to plan from parts of them.",), "unsure"
        )
    found, halves = insight.study.recommendation, insight.study.halves
    headline = f"{found.tokens:,} tokens" if found.tokens is not None else "Perhaps too little text"
    apart = float((halves["second"] / halves["first"] - 1).abs().mean())
    alike = float(halves["coactivation_correlation"].mean())
    return Answer(
        question,
        headline,
        (
            found.sentence,
            f"Two plans from two halves of the text differ by {apart:.1%} in held-out busiest_ingress"
            + (f"; the halves' co-activations correlate with r = {alike:.2f}." if np.isfinite(alike) else "."),
        ),
        "good" if found.tokens is not None else "bad",
    )


def _domains(insight: Insight) -> Answer:
    question, domains = "What changes between domains?", insight.domains
    if not len(domains):
        return Answer(question, "One domain only", ("Profile texts of several domains to see.",))
    if domains["load_p"].isna().all():
        told = (
            "So few sequences can be dealt in too few ways to tell a difference from chance; profile more text of each."
        )
        return Answer(question, "Not known: too few sequences", (told,), "unsure")
    drifted = domains[domains["drifted"]]
    own = {0: "No domain routes its own way", 1: f"1 of {len(domains)} domains routes its own way"}
    headline = own.get(len(drifted), f"{len(drifted)} of {len(domains)} domains route their own way")
    sentences = []
    if len(drifted):
        odd = drifted.loc[drifted["load_distance"].idxmax()]
        sentences.append(
            f"Farthest of them from the others is {odd['domain']} (expert loads {odd['load_distance']:.3f} bits apart, "
            f"sampling noise {odd['load_noise']:.3f}); there {odd['hottest']} stands out."
        )
    tone: Tone = "plain"
    across = insight.study.transfer if insight.study else None
    if across is not None and len(across):
        own = across[
            ~across["planned_on"].isin(["linear", "this plan"]) & (across["planned_on"] != across["measured_on"])
        ]
        ours = across[across["planned_on"] == "this plan"]
        worst, worst_own = (part.loc[part["regret"].idxmax()] for part in (ours, own))
        sentences.append(
            f"Planning on the wrong domain costs {own['regret'].mean():+.1%} busiest_ingress on average, at worst "
            f"{worst_own['regret']:+.1%} ({worst_own['planned_on']} for {worst_own['measured_on']})."
        )
        if insight.seen:  # which the domains' own plans have not
            sentences.append("What this plan costs is not known: it has seen what is measured on.")
            tone = "unsure"
        else:
            sentences.append(
                f"This plan costs {worst['regret']:+.1%} at worst, on {worst['measured_on']}, against a plan of that "
                "domain's own."
            )
            tone = "unsure" if worst["regret"] > NOTICEABLE_REGRET else "good"
    return Answer(question, headline, tuple(sentences) or ("Differences are within sampling noise.",), tone)
