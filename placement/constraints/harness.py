"""Benchmarks of lm-evaluation-harness on a constrained model: the optional extra `coterie[lm-eval]`. Knows no map."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from placement.constraints.constrain import Constraint, constrain
from profiler.errors import CoterieError
from profiler.loading import LoadedModel

SUITES: dict[str, list[str]] = json.loads((Path(__file__).parent / "tasks.json").read_text())
"""Ten tasks, as many as C2R's paper averages over, and twenty-three, as many as Occult's.

Which ones the papers took could not be looked up; these are common ones of that number. `tasks.json` is there to edit.
"""


def task_names(names: Sequence[str]) -> list[str]:
    """The tasks of suites, and tasks given by name, each once."""
    return list(dict.fromkeys(task for name in names for task in SUITES.get(name, [name])))


def run_tasks(
    loaded: LoadedModel,
    constraint: Constraint | None,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, float]:
    """The accuracy of each task, or its first metric where it has none.

    Args:
        names: suites of `SUITES`, or tasks of the harness.
        folder: of task files of one's own.
        limit: questions of each task; None for all.

    Raises:
        CoterieError: the harness is not installed, or a task cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise CoterieError("tasks need lm-evaluation-harness: pip install 'coterie[lm-eval]'")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = task_names(names)
    try:
        with constrain(loaded.model, constraint):
            model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
            manager = TaskManager(include_path=None if folder is None else str(folder))
            results = simple_evaluate(model=model, tasks=tasks, limit=limit, task_manager=manager)["results"]
    except CoterieError:
        raise
    except Exception as error:  # what a task raises whose data is not there is any library's choice
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CoterieError(f"tasks {', '.join(tasks)}: cannot be run ({reason}); give others to --task") from error
    return {task: _score(results[task]) for task in tasks}


def _score(figures: dict[str, object]) -> float:
    for name in ("acc_norm,none", "acc,none"):
        if isinstance(figures.get(name), float):
            return float(str(figures[name]))
    return next(float(value) for name, value in figures.items() if isinstance(value, float) and "stderr" not in name)
