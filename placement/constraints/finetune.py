"""Fine-tuning under a constraint with transformers' Trainer, so that a model gets used to it. Knows no map."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from placement.constraints.config import FILE_NAME, digest_of, save
from placement.constraints.constrain import Constraint, balance_settings, constrain
from placement.constraints.examples import Examples, collate
from profiler.errors import CoterieError, first_line
from profiler.families import find_moe_layers
from profiler.files import put_in_place, read_json, require_writable_parent, sync, write_json
from profiler.loading import LoadedModel

Part = Literal["all", "experts"]
"""What learns: all weights, or those of experts and routers only, as Occult fine-tunes."""

DTYPES = ("float32", "bfloat16")
"""In which a model may compute while it learns."""

RUN_FILE = "finetune.json"
"""Beside checkpoints the settings of a run, which only an equal run goes on from; beside the model the losses too."""

COMPLETE = "complete"
"""In a checkpoint that Trainer has written whole."""

OnStep = Callable[[int, int, float], None]
"""Called with steps done, steps in all and the mean loss since the last call."""


@dataclass(frozen=True)
class Training:
    """How long and how fast to learn. Occult fine-tuned for 1,000 steps on sequences of 512 tokens.

    Attributes:
        steps: of the optimizer.
        batch_size: sequences in a step.
        micro_batch_size: sequences in one forward pass; `batch_size` where None.
        learning_rate: its peak; a cosine brings it to zero after `warmup_steps` steps.
        part: what learns.
        seed: of the order of the examples and of dropout.
        save_steps: a checkpoint after every so many steps; 0 for none.
        dtype: one of `DTYPES`, in which the model computes; its weights learn in float32.
    """

    steps: int = 1000
    batch_size: int = 16
    micro_batch_size: int | None = None
    learning_rate: float = 2e-5
    warmup_steps: int = 10
    part: Part = "all"
    seed: int = 0
    save_steps: int = 200
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, low in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0), ("save_steps", 0), ("seed", 0)):
            if getattr(self, name) < low:
                raise CoterieError(f"{name.replace('_', ' ')} {getattr(self, name)}: must be at least {low}")
        if self.dtype not in DTYPES:
            raise CoterieError(f"dtype {self.dtype!r}: must be one of {', '.join(DTYPES)}; weights learn in float32")
        if not 0 < self.learning_rate < math.inf:
            raise CoterieError(f"learning rate {self.learning_rate}: must be a number above 0")
        if self.micro_batch_size is not None and (self.micro_batch_size < 1 or self.batch_size % self.micro_batch_size):
            raise CoterieError(
                f"micro batch size {self.micro_batch_size}: must divide the batch size, {self.batch_size}"
            )


def train(
    model: Any,
    examples: Examples,
    constraint: Constraint | None,
    training: Training,
    work: Path,
    *,
    resume: bool = False,
    on_step: OnStep = lambda _step, _steps, _loss: None,
) -> list[float]:
    """Train a model in place, constrained if there is a constraint; returns the loss of each step.

    The auxiliary loss takes part with the model's own coefficient, and follows the constraint; that of a step is the
    mean over its micro-batches.

    Args:
        work: folder for checkpoints.
        resume: go on from the last one in it.

    Raises:
        CoterieError: the constraint does not fit the model, the model cannot learn as it is loaded, there is nothing to
            go on from, or a loss or a gradient is no number.
    """
    from transformers import Trainer, TrainerCallback, TrainerState
    from transformers.trainer_utils import get_last_checkpoint

    _require_trainable(model)
    arguments = _arguments(training, work, on_cpu=next(model.parameters()).device.type == "cpu")

    class TrainerOfExperts(Trainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            # Losses that the model divides by the tokens of the whole batch are summed over its micro-batches.
            summed = self.current_gradient_accumulation_steps if self.model_accepts_loss_kwargs else 1
            with _auxiliary_loss(self.model, summed):
                loss: torch.Tensor = super().training_step(*args, **kwargs)
                return loss

        def autocast_smart_context_manager(self, *_args: Any, **_kwargs: Any) -> torch.autocast:
            # Trainer's own way leaves another forward in the model.
            return torch.autocast(self.args.device.type, torch.bfloat16, enabled=training.dtype == "bfloat16")

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            # Trainer would look for packed experts by name, find none, warn, and go on with the weights it was given.
            _load_weights(self.model, resume_from_checkpoint)

        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            folder = work / f"checkpoint-{self.state.global_step}"
            try:
                super()._save_checkpoint(*args, **kwargs)
                sync(file for file in folder.rglob("*") if file.is_file())
                (folder / COMPLETE).touch()
            except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
                shutil.rmtree(folder, ignore_errors=True)
                raise CoterieError(f"{folder}: cannot be written ({first_line(error)}); free some space") from error

    class Steps(TrainerCallback):  # type: ignore[misc]
        taken = 0

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            self.taken += 1
            if logs and "loss" in logs:
                for name in ("loss", "grad_norm"):
                    if not math.isfinite(logs.get(name, 0.0)):
                        raise CoterieError(
                            f"{name} {logs[name]} at step {state.global_step}: the training diverged; give a smaller "
                            "--learning-rate"
                        )
                on_step(state.global_step, training.steps, logs["loss"])

    checkpoint = None
    if resume and work.is_dir():
        for folder in work.glob("checkpoint-*"):
            if not (folder / COMPLETE).exists():  # the run was killed while it wrote it
                shutil.rmtree(folder)
        checkpoint = get_last_checkpoint(str(work))
    if checkpoint is not None:
        with _readable(checkpoint):
            state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
        if state.global_step >= training.steps:  # killed behind the last step; Trainer would take another one
            _load_weights(model, checkpoint)
            return _losses(state)
    # Trainer turns it off, and it would be off in what is written; models that also see have it elsewhere.
    use_cache = getattr(model.config, "use_cache", None)
    with _trainable(model, training.part), _repeatable(), constrain(model, constraint):
        steps = Steps()
        trainer = TrainerOfExperts(
            model=model, args=arguments, train_dataset=examples, data_collator=collate, callbacks=[steps]
        )
        trainer.remove_callback(_printer())
        # Until the first step is taken: what was read may not fit these weights, which only a step shows.
        with _readable(checkpoint, lambda: checkpoint is not None and not steps.taken):
            trainer.train(resume_from_checkpoint=checkpoint)
    if use_cache is None:
        del model.config.use_cache
    else:
        model.config.use_cache = use_cache
    model.eval()
    return _losses(trainer.state)


def _arguments(training: Training, work: Path, *, on_cpu: bool) -> Any:
    from transformers import TrainingArguments

    micro = training.micro_batch_size or training.batch_size
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=training.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=training.batch_size // micro,
        learning_rate=training.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=training.warmup_steps,
        seed=training.seed,
        data_seed=training.seed,
        save_strategy="steps" if training.save_steps else "no",
        save_steps=training.save_steps or 500,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would log 0 in their place
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    # Trainer would give each device a copy of the model and a batch; constraints keep the selections of one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _require_trainable(model: Any) -> None:
    """Check that a model's weights can learn where they are.

    Raises:
        CoterieError: they are too coarse, or on a device that Trainer would move them from.
    """
    for weight in model.parameters():
        if weight.is_floating_point() and weight.element_size() < 4:
            raise CoterieError(
                f"weights in {str(weight.dtype).removeprefix('torch.')}: steps of fine-tuning are smaller than these "
                "can change by; load the model in float32, it can compute in another dtype"
            )
        if weight.device.index:
            raise CoterieError(
                f"device {weight.device}: Trainer takes a machine's first; give {weight.device.type}:0, or hide the "
                f"others, as CUDA_VISIBLE_DEVICES={weight.device.index} does"
            )


def _losses(state: Any) -> list[float]:
    return [entry["loss"] for entry in state.log_history if "loss" in entry]


def require_own_folder(out: Path, *, resume: bool = False) -> None:
    """Check before long work that a fine-tuned model can be written there.

    Raises:
        CoterieError: it cannot be, something else is there, or a run to go on with that would be lost.
    """
    if not out.name:
        raise CoterieError(f"{out}: is no name for a folder; give one to -o")
    require_writable_parent(out)
    if out.exists() and not (out / RUN_FILE).is_file():
        raise CoterieError(f"{out}: exists and is no fine-tuned model; give another name to -o")
    if not resume and (done := unfinished_steps(out)):
        raise CoterieError(
            f"{checkpoint_folder(out)}: an unfinished run with {done} steps is there; go on with --resume, or remove "
            "that folder"
        )


def finetune(
    loaded: LoadedModel,
    examples: Examples,
    constraint: Constraint | None,
    training: Training,
    out: Path,
    *,
    resume: bool = False,
    on_step: OnStep = lambda _step, _steps, _loss: None,
) -> Path:
    """Fine-tune a model and write it with its constraint, whole or not at all; returns `out`.

    `from_pretrained` loads the folder as any other; `constrain(model, load(folder))` constrains it again.  Until then
    checkpoints are kept in a hidden folder beside it.

    Raises:
        CoterieError: as `train`; `out` cannot be written or is not a fine-tuned model; or there are checkpoints of a
            run with other settings or examples, or of any run if it shall not be resumed.
    """
    require_own_folder(out, resume=resume)
    work = checkpoint_folder(out)
    run = {
        "model": loaded.name,
        "constraint": None if constraint is None else constraint.name,
        "constraint_digest": None if constraint is None else digest_of(constraint),
        "examples": len(examples),
        "examples_digest": examples.digest,
        **asdict(training),
    }
    with constrain(loaded.model, constraint):
        _require_trainable(loaded.model)  # refused before anything is written
    if resume and not (work / RUN_FILE).exists() and out.exists():  # done already
        _require_same_run(out, run, "leave --resume out")
        shutil.rmtree(work, ignore_errors=True)
        _load_weights(loaded.model, out)
        return out
    if resume:
        _require_same_run(work, run, "remove that folder")
    else:
        shutil.rmtree(work, ignore_errors=True)
    unfinished = out.with_name(f".{out.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        write_json(work / RUN_FILE, run)
        losses = train(loaded.model, examples, constraint, training, work, resume=resume, on_step=on_step)
        _write(loaded, constraint, {**run, "losses": losses}, unfinished, out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        # Nothing to go on from; beside an older model the note says that this is another run.
        if not unfinished_steps(out) and not out.exists():
            shutil.rmtree(work, ignore_errors=True)
    (work / RUN_FILE).unlink(missing_ok=True)  # first, so that a run that is killed here is known to be done
    shutil.rmtree(work, ignore_errors=True)
    return out


def _write(
    loaded: LoadedModel, constraint: Constraint | None, run: dict[str, Any], unfinished: Path, out: Path
) -> None:
    """Write a model and what it was made by, and give the folder its name when all of it is there."""
    try:
        loaded.model.save_pretrained(unfinished)
        loaded.tokenizer.save_pretrained(unfinished)
        if constraint is not None:
            save(constraint, unfinished / FILE_NAME)
        write_json(unfinished / RUN_FILE, run)
        sync(file for file in unfinished.rglob("*") if file.is_file())  # before the checkpoints go
        put_in_place(unfinished, out)
    except CoterieError:
        raise
    except Exception as error:  # each library has its own for a disk that is full
        if "memory" in str(error):
            raise
        raise CoterieError(
            f"{out}: cannot be written ({first_line(error)}); free some space, or mend what it names"
        ) from error


def checkpoint_folder(out: Path) -> Path:
    """Where a run that will write `out` keeps its checkpoints."""
    return out.with_name(f".{out.name}.checkpoints")


def unfinished_steps(out: Path) -> int:
    """Steps in the last complete checkpoint of a run that has not written `out`; 0 if there is none."""
    work = checkpoint_folder(out)
    if not (work / RUN_FILE).exists():  # it was removed when the run was done
        return 0
    complete = (file.parent.name.rpartition("-")[2] for file in work.glob(f"checkpoint-*/{COMPLETE}"))
    return max(map(int, complete), default=0)


def _load_weights(model: Any, folder: Path | str) -> None:
    """Those of a saved model, which has experts one by one, into one that may have them packed."""
    with _readable(folder):
        stored, found = type(model).from_pretrained(folder, dtype=model.dtype, output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(f"it has no {min(found['missing_keys'])}")
        model.load_state_dict(stored.state_dict())


@contextmanager
def _readable(folder: Path | str | None, is_at_fault: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Say in one line what any library finds wrong with a folder that training wrote.

    Never of one that is whole: not where memory lacks, or something else is at fault.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (CoterieError, MemoryError)) or "memory" in str(error) or not is_at_fault():
            raise
        raise CoterieError(
            f"{folder}: cannot be read ({first_line(error)}); remove it, and go on or begin anew"
        ) from error


def _require_same_run(work: Path, run: dict[str, Any], anew: str) -> None:
    before = read_json(work / RUN_FILE, "a fine-tuning run", "there is none to go on with; leave --resume out")
    changed = sorted(key for key in run if before.get(key) != run[key])
    if changed:
        raise CoterieError(
            f"{work}: was begun with other {', '.join(changed)} ({changed[0]} {before.get(changed[0])!r}, now "
            f"{run[changed[0]]!r}); give the same, or {anew} to begin anew"
        )


@contextmanager
def _trainable(model: nn.Module, part: Part) -> Iterator[None]:
    """Let only a part of the weights learn."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        if part == "experts":
            model.requires_grad_(False)
            for layer in find_moe_layers(model):
                layer.experts.requires_grad_(True)
                for block in map(model.get_submodule, (layer.name, layer.name.rpartition(".")[0])):
                    for name, module in block.named_children():
                        if name in ("gate", "router"):
                            module.requires_grad_(True)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])


@contextmanager
def _auxiliary_loss(model: Any, summed: int) -> Iterator[None]:
    """Ask the model for its load-balancing loss, where it has one, with a weight for the sum of so many losses."""
    config, settings = model.config.get_text_config(), balance_settings(model)
    before = getattr(config, "output_router_logits", None)
    coefficient = getattr(settings, "router_aux_loss_coef", None)
    if before is None or coefficient is None:
        yield
        return
    config.output_router_logits, settings.router_aux_loss_coef = True, coefficient / summed
    try:
        yield
    finally:
        config.output_router_logits, settings.router_aux_loss_coef = before, coefficient


@contextmanager
def _repeatable() -> Iterator[None]:
    """Sums in a fixed order, so that the same seed gives the same weights."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*pin_memory.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _printer() -> Any:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback
