"""From what is known about a plan to the page: fills the template. Computes no figure."""

from __future__ import annotations

from pathlib import Path

import jinja2
import numpy as np

from placement.insight import Insight
from placement.report.payload import payload, to_script
from placement.verdict import answers
from profiler.files import write_text


def write_report(insight: Insight, path: Path) -> None:
    """Write the page.

    Raises:
        CoterieError: the page cannot be written.
    """
    write_text(path, render(insight))


def render(insight: Insight) -> str:
    """The page's HTML: it needs nothing from outside."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("placement.report", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    plan = insight.plan
    tokens = insight.measured.require_tokens()
    source = environment.loader
    assert source
    style, script = (source.get_source(environment, name)[0] for name in ("page.css", "page.js"))
    return environment.get_template("page.html.jinja").render(
        style=style,
        script=script,
        payload=to_script(payload(insight)),
        insight=insight,
        model=plan.model,
        plan=plan,
        answers=answers(insight),
        num_tokens=insight.profile.num_tokens,
        num_measured=tokens.num_tokens,
        num_sequences=len(np.unique(tokens.sequence_ids)),
        bench=insight.bench,
        runs=insight.bench.on(plan.topology.num_ranks) if insight.bench else (),
    )
