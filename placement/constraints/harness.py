"""Benchmarks of lm-evaluation-harness on a constrained model: the optional extra `coterie[lm-eval]`. Knows no map."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

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


def known_tasks(names: Sequence[str], folder: Path | None = None) -> Any:
    """The harness's TaskManager; checks, before long work, that it has tasks of all these names.

    Raises:
        CoterieError: the harness is not installed, or it knows no task of a name.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise CoterieError("tasks need lm-evaluation-harness: pip install 'coterie[lm-eval]'")
    from lm_eval.tasks import TaskManager

    try:
        manager = TaskManager(include_path=None if folder is None else str(folder))
        known = set(manager.all_tasks)
    except Exception as error:  # what a broken task file raises is any library's choice
        raise CoterieError(f"tasks: cannot be listed ({first_line(error)}); mend those in --task-folder") from error
    for name in task_names(names):
        if name not in known and not Path(name).is_file():  # it takes a task's file too
            raise CoterieError(
                f"task {name}: cannot be run, lm-evaluation-harness has none of that name; give another to --task, or "
                "the folder of its file to --task-folder"
            )
    return manager


def run_tasks(
    loaded: LoadedModel,
    constraint: Constraint | None,
    names: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    on_figures: Callable[[dict[str, float]], None] = lambda _figures: None,
) -> dict[str, float]:
    """The accuracy of each task, or its first metric where it has none.

    Args:
        names: suites of `SUITES`, or tasks of the harness; one that has no figure of its own, such as a tag, stands for
            all that is in it.
        folder: of task files of one's own.
        limit: questions of each task; None for all.
        on_figures: is given those of each task when it is done.

    Raises:
        CoterieError: as `known_tasks`, or a task cannot be loaded or has no figure.
    """
    manager = known_tasks(names, folder)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tasks = task_names(names)
    found: dict[str, float] = {}
    try:
        with constrain(loaded.model, constraint):
            model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
            for task in tasks:  # one by one, since what is in a tag is known by its results only
                results = simple_evaluate(model=model, tasks=[task], limit=limit, task_manager=manager)["results"]
                figures = _scores(task, results)
                found |= figures
                on_figures(figures)
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
