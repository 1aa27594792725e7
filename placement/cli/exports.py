"""`coterie export`: a placement map to what an engine loads, or to a permuted checkpoint, and the proof of that one.
Knows what targets are called, not what their files look like: `placement/exporters` does.
"""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from placement.cli.app import (
    Data,
    Device,
    Json,
    app,
    group_with_default,
    notes,
    print_json,
    progress_bar,
    seed_option,
    tables,
    waiting,
)
from profiler.errors import CoterieError
from profiler.files import require_writable

if TYPE_CHECKING:
    from placement.exporters.contract import Engine, ServedModel
    from placement.placement_map import PlacementMap


class Target(StrEnum):
    """What to write."""

    SGLANG = "sglang"
    TENSORRT_LLM = "tensorrt-llm"
    VLLM = "vllm"
    VLLM_ASCEND = "vllm-ascend"
    EPLB = "eplb"
    CHECKPOINT = "checkpoint"


export_app = typer.Typer(
    cls=group_with_default("plan"), help="Write a plan as engines load it; verify a permuted checkpoint."
)
app.add_typer(export_app, name="export")


@export_app.command("plan", epilog="See also: coterie export verify --help")
def export(
    plan: Annotated[Path, typer.Argument(help="Placement map.")],
    to: Annotated[Target, typer.Option(help="What is to load it.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write; a new folder for a checkpoint.")],
    model: Annotated[
        Path | None,
        typer.Option(help="Folder of the model: to permute, to count its layers, to name it in the engine's command."),
    ] = None,
    num_hidden_layers: Annotated[
        int | None, typer.Option(help="All decoder layers, where neither the plan nor --model says.")
    ] = None,
    num_mtp_layers: Annotated[
        int | None, typer.Option(help="Layers for multi-token prediction that will be served, if --model does not say.")
    ] = None,
    invert: Annotated[
        bool, typer.Option("--invert", help="Restore the original of a checkpoint permuted by this plan.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write what an engine loads to serve with the plan, and say how to start it.

    Example: coterie export plan.json --to sglang -o experts.json
    """
    from placement.placement_map import PlacementMap

    placement = PlacementMap.load_from(plan)
    if to is Target.CHECKPOINT:
        if model is None:
            raise CoterieError("--to checkpoint rewrites a model: give --model with the folder of the original")
        for option, value in (("hidden", num_hidden_layers), ("mtp", num_mtp_layers)):
            if value is not None:
                raise CoterieError(f"--num-{option}-layers {value}: a checkpoint's config says it; leave it out")
        _write_checkpoint(placement, model, out, invert)
        start = f"in any engine that places experts in file order: give it {out} in place of {model}"
        proof = f"prove it with: coterie export verify {shlex.quote(str(model))} {shlex.quote(str(out))}"
        written: dict[str, Any] = {"engine": to.value, "out": str(out), "start": start, "remarks": [proof]}
        if invert:
            written |= {"start": f"{out} has the experts of {model} in their first order again", "remarks": []}
    else:
        from placement.exporters.contract import write_export

        if invert:
            raise CoterieError(f"--invert is for checkpoints; leave it out for {to.value}")
        require_writable(out, plan)
        engine = _engine(to)
        served = _served_model(placement, model, num_hidden_layers, num_mtp_layers)
        exported = write_export(engine, placement, out, served)
        written = {"engine": engine.name, "out": str(out), "checked_against": engine.checked_against}
        written |= {"start": exported.start, "remarks": list(exported.remarks)}
    if as_json:
        print_json(written)
    else:
        print(written["start"])  # not through rich, which would wrap a line that is to be copied
        for remark in written["remarks"]:
            notes.print(remark, highlight=False, soft_wrap=True)
    notes.print(f"wrote {out} for {written['engine']}", highlight=False, soft_wrap=True)


def _engine(to: Target) -> Engine:
    from placement.exporters import eplb, sglang, tensorrt_llm, vllm, vllm_ascend

    return {
        Target.SGLANG: sglang.ENGINE,
        Target.TENSORRT_LLM: tensorrt_llm.ENGINE,
        Target.VLLM: vllm.ENGINE,
        Target.VLLM_ASCEND: vllm_ascend.ENGINE,
        Target.EPLB: eplb.ENGINE,
    }[to]


def _served_model(
    placement: PlacementMap, model: Path | None, num_hidden_layers: int | None, num_mtp_layers: int | None
) -> ServedModel:
    """From the options, else the plan, which counted the layers themselves, else the model's config."""
    from placement.exporters.checkpoint import read_text_config, whole_number
    from placement.exporters.contract import ServedModel

    config = read_text_config(model) if model else {}
    known = placement.model.num_hidden_layers or whole_number(config, "num_hidden_layers", "num_layers")
    total = known if num_hidden_layers is None else num_hidden_layers
    drafts = whole_number(config, "num_nextn_predict_layers", "mtp_num_hidden_layers")
    num_mtp = drafts if num_mtp_layers is None else num_mtp_layers
    return ServedModel(total, num_mtp, str(model or ""), str(config.get("model_type") or ""))


def _write_checkpoint(placement: PlacementMap, model: Path, out: Path, invert: bool) -> None:
    from placement.exporters.checkpoint import permute_checkpoint

    with progress_bar("bytes") as advance_to:
        permute_checkpoint(model, out, placement, invert=invert, on_bytes=advance_to)


@export_app.command()
def verify(
    original: Annotated[Path, typer.Argument(help="Folder of the original checkpoint.")],
    permuted: Annotated[Path, typer.Argument(help="Folder that `coterie export --to checkpoint` wrote.")],
    data: Data = None,
    num_tokens: Annotated[int, typer.Option(help="Tokens to compare on; random ones if there is no --data.")] = 256,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference of logits that counts as equal, over the largest logit.")
    ] = 1e-4,
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="float32 shows errors that coarser types hide in rounding.")] = "float32",
    seed: Annotated[int | None, seed_option("Of random tokens; 0 if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Prove that a permuted checkpoint computes what the original does: same logits, same experts by the plan.

    Example: coterie export verify ./OLMoE-1B-7B ./OLMoE-planned --data texts/
    """
    import torch

    from placement.exporters.checkpoint import read_permuted_map
    from placement.exporters.verify import compare, random_tokens
    from profiler.documents import read_documents
    from profiler.loading import load_model

    if num_tokens < 1 or not tolerance >= 0:
        raise CoterieError(f"{num_tokens} tokens and tolerance {tolerance}: must be at least 1 and 0")
    if data and seed is not None:
        raise CoterieError(f"--seed {seed}: is of random tokens; leave it or --data out")
    placement = read_permuted_map(permuted)

    def load(folder: Path) -> Any:
        with waiting(f"loading {folder}"):
            return load_model(str(folder), device, dtype=dtype, with_tokenizer=bool(data))

    first = load(original)
    if data:
        documents = read_documents(data)  # as many of them, in a row, as it takes; no name holds the model's batches
        input_ids = torch.cat([batch.input_ids for batch in first.batches(documents, num_tokens, 1, num_tokens)], dim=1)
    else:
        input_ids = random_tokens(first.model.config.get_text_config().vocab_size, num_tokens, seed or 0)
    models = [first.model]
    del first  # so that the second model finds its place free
    comparison = compare(models.pop, lambda: load(permuted).model, placement, input_ids)
    agrees = comparison.agrees(tolerance)
    if as_json:
        value = {"agrees": agrees, "tokens": comparison.num_tokens, "max_difference": comparison.max_difference}
        value |= {"largest_logit": comparison.largest_logit, "same_selection": comparison.same_selection}
        print_json(value)
    else:
        table = Table("tokens", "largest difference", "largest logit", "tokens with the same experts")
        figures = (
            f"{comparison.max_difference:.1e}",
            f"{comparison.largest_logit:.3g}",
            f"{comparison.same_selection:.1%}",
        )
        table.add_row(f"{comparison.num_tokens:,}", *figures)
        tables.print(table)
    if not agrees:
        bound = tolerance * comparison.largest_logit
        raise CoterieError(
            f"{permuted}: logits differ by {comparison.max_difference:.1e}, at most {bound:.1e} may be; do not serve it"
        )
    notes.print(f"{permuted} computes what {original} does", highlight=False, soft_wrap=True)
