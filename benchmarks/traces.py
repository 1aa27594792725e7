"""Recorded routing of real models, which the project does not ship: `COTERIE_TRACES` names the folder with it."""

import os
from dataclasses import replace
from pathlib import Path

from profiler.importers.arrays import read_arrays
from profiler.importers.known import Known
from profiler.profile import Profile

FOLDER = Path(os.environ.get("COTERIE_TRACES", Path(__file__).parents[2] / "shared" / "traces"))
SHAPES = {"gpt-oss-20b": ("gpt_oss", 2880, 2880), "deepseek-v2-lite": ("deepseek_v2", 2048, 1408)}
"""Architecture, hidden and expert size of the models whose token traces there are."""


def load(name: str, every_nth_layer: int = 1) -> Profile:
    """Read `<name>.npz` as a profile, all its layers or every n-th."""
    model_type, hidden_size, expert_size = SHAPES[name]
    known = Known(model_type=model_type, hidden_size=hidden_size, expert_size=expert_size)
    whole = read_arrays(FOLDER / f"{name}.npz", known, decode=True)
    if every_nth_layer == 1:
        return whole
    model = replace(whole.model, layer_ids=whole.model.layer_ids[::every_nth_layer])
    tokens = whole.require_tokens().without_weights()
    return Profile.from_tokens(
        model, whole.domains, replace(tokens, topk_ids=tokens.topk_ids[::every_nth_layer]), whole.provenance
    )
