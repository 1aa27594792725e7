"""TensorRT-LLM's load balancer file: which expert each slot of each layer holds. Read for recordings and as a map.
Knows neither ranks nor tokens.

Checked against class `MoeLoadBalancerConfig` (`tensorrt_llm/llmapi/llm_args.py`), which takes no other key.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from profiler.errors import CoterieError, first_line

MAX_BYTES = 2**20
"""Of the largest file that is parsed: 288 slots in 200 layers take 270 KB, which take seconds to read as YAML.

libyaml is faster, but its composer overflows the C stack on deep nesting, which ends the process.
"""
KEYS = {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
"""All that the file may have; `layer_updates_per_iter` may be missing."""


@dataclass(frozen=True)
class LoadBalancer:
    """One file.

    Attributes:
        num_slots: P.
        assignments: by global layer number, the expert of each of the P slots.
        moves: whether experts move while the engine runs.
    """

    num_slots: int
    assignments: dict[int, list[int]]
    moves: bool

    @classmethod
    def read(cls, path: Path) -> LoadBalancer:
        """Read and check a file.

        Raises:
            CoterieError: it is missing, truncated, or says other than which expert each slot holds.
        """
        try:
            if path.stat().st_size > MAX_BYTES:
                raise CoterieError(f"{path}: {path.stat().st_size:,} bytes, at most {MAX_BYTES:,} are read as YAML")
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CoterieError(f"{path}: no such file; give the load balancer's YAML file") from None
        except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
            raise CoterieError(f"{path}: truncated, or not YAML ({first_line(error)})") from error
        if not isinstance(value, dict) or not KEYS - {"layer_updates_per_iter"} <= set(value) <= KEYS:
            raise CoterieError(
                f"{path}: not a load balancer configuration of TensorRT-LLM, which has {', '.join(sorted(KEYS))}"
            )
        num_slots, rows = value["num_slots"], value["initial_global_assignments"]
        if type(num_slots) is not int or not isinstance(rows, dict):
            raise CoterieError(f"{path}: num_slots must be a whole number and initial_global_assignments have layers")
        for layer, row in rows.items():
            # Looked at before numpy does: lists that share their parts can stand for more than any memory holds.
            if type(layer) is not int or not isinstance(row, list) or any(type(expert) is not int for expert in row):
                raise CoterieError(f"{path}: initial_global_assignments: {layer!r} must be a row of whole numbers")
            if len(row) != num_slots or not all(0 <= expert < num_slots for expert in row):
                raise CoterieError(
                    f"{path}: layer {layer}: a row of {len(row)}, num_slots is {num_slots}: must be as many experts, "
                    "each from 0 and below that"
                )
        return cls(num_slots, rows, bool(value.get("layer_updates_per_iter", 0)))

    def rows(self, path: Path, layers: list[int]) -> list[list[int]]:
        """Of these layers.

        Raises:
            CoterieError: it has no row for one.
        """
        missing = [layer for layer in layers if layer not in self.assignments]
        if missing:
            raise CoterieError(
                f"{path}: initial_global_assignments has no layer {missing[0]}, a MoE layer of the model"
            )
        return [self.assignments[layer] for layer in layers]
