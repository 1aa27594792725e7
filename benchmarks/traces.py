"""Recorded routing of real models, which the project does not ship: `COTERIE_TRACES` names the folder with it."""

import os
from pathlib import Path

import numpy as np

from profiler.profile import DECODE, Profile, TokenTrace
from profiler.spec import MoESpec

FOLDER = Path(os.environ.get("COTERIE_TRACES", Path(__file__).parents[2] / "shared" / "traces"))
SHAPES = {"gpt-oss-20b": ("gpt_oss", 2880, 2880), "deepseek-v2-lite": ("deepseek_v2", 2048, 1408)}
"""Architecture, hidden and expert size of the models whose token traces there are."""


def load(name: str, every_nth_layer: int = 1) -> Profile:
    """Read `<name>.npz` as a profile, all its layers or every n-th."""
    recorded = np.load(FOLDER / f"{name}.npz", allow_pickle=False)
    model_type, hidden_size, expert_size = SHAPES[name]
    layers = slice(None, None, every_nth_layer)
    ids_LTK = np.ascontiguousarray(recorded["topk_ids"].transpose(1, 0, 2)[layers])
    spec = MoESpec(
        name=name,
        model_type=model_type,
        layer_ids=tuple(recorded["layer_ids"][layers].tolist()),
        num_experts=int(recorded["num_experts"]),
        top_k=ids_LTK.shape[2],
        num_groups=1,
        hidden_size=hidden_size,
        expert_size=expert_size,
        dtype="bfloat16",
    )
    phase = np.full(ids_LTK.shape[1], DECODE, dtype=np.uint8)
    trace = TokenTrace(ids_LTK, recorded["sequence_ids"], recorded["domain_ids"], phase)
    return Profile.from_tokens(spec, [str(domain) for domain in recorded["domain_names"]], trace, {"trace": name})
