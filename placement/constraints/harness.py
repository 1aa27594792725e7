"""Benchmarks of lm-evaluation-harness on a constrained model: the optional extra `coterie[lm-eval]`. Knows no map."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from placement.constraints.constrain import Constraint, constrain
from profiler.errors import CoterieError, first_line
from profiler.loading import LoadedModel

SUITES: dict[str, list[str]] = json.loads((Path(__file__).parent / "tasks.json").read_text())
"""Ten tasks, as many as C2R's paper averages over, and twenty-three, as many as Occult's, one of them in three rounds.

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
        names: suites of `SUITES`, or tasks of the harness; one that has no figure of its own, such as a tag, stands for
            all that is in it.
        folder: of task files of one's own.
        limit: questions of each task; None for all.

    Raises:
        CoterieError: the harness is not installed, or a task cannot be loaded or has no figure.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise CoterieError("tasks need lm-evaluation-harness: pip install 'coterie[lm-eval]'")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = task_names(names)
    found: dict[str, float] = {}
    try:
        with constrain(loaded.model, constraint):
            model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
            manager = TaskManager(include_path=None if folder is None else str(folder))
            for task in tasks:  # one by one, since what is in a tag is known by its results only
                results = simple_evaluate(model=model, tasks=[task], limit=limit, task_manager=manager)["results"]
                found |= _scores(task, results)
    except CoterieError:
        raise
    except Exception as error:  # what a task raises whose data is not there is any library's choice
        raise CoterieError(
            f"tasks {', '.join(tasks)}: cannot be run ({first_line(error)}); give others to --task"
        ) from error
    return found


def _scores(task: str, results: Mapping[str, Mapping[str, object]]) -> dict[str, float]:
    scores = {name: score for name, figures in results.items() if (score := _score(figures)) is not None}
    if not scores:
        raise CoterieError(f"task {task}: the harness gives no figure for it; give another to --task")
    return {task: scores[task]} if task in scores else scores


def _score(figures: Mapping[str, object]) -> float | None:
    for name in ("acc_norm,none", "acc,none"):
        if isinstance(figures.get(name), float):
            return float(str(figures[name]))
    numbers = (float(value) for name, value in figures.items() if isinstance(value, float) and "stderr" not in name)
    return next(numbers, None)
