"""`coterie import`: routing that another tool or an engine recorded, to a profile.
Knows the sources' names and options, not their file formats: `profiler/importers` does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from placement.cli.app import Json, app, notes, waiting
from placement.cli.profiles import show_profile
from profiler.importers.known import Known, parse_layers

import_app = typer.Typer(no_args_is_help=True, help="Read routing that was recorded elsewhere as a profile.")
app.add_typer(import_app, name="import")

Files = Annotated[list[Path], typer.Argument(help="Recorded files of all ranks, or folders of them.")]
Folder = Annotated[Path, typer.Argument(help="Folder that the engine has written.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Profile folder to write.")]
Decode = Annotated[bool, typer.Option("--decode", help="The tokens were decoded, not prefilled.")]
Domain = Annotated[str | None, typer.Option(help="Label of the tokens; the engine's name if left out.")]

LEFT_OUT = {
    "dummy_tokens_dropped": "left out {} warm-up or padding tokens",
    "records_of_the_same_tokens": "left out {} records of tokens that another rank has recorded",
    "incomplete_steps_left_out": "left out {} steps that do not have all layers alike; record with one pipeline stage",
    "mtp_records_left_out": "left out {} records of layers for multi-token prediction",
    "layers_left_out": "left out layers {}, which are none of the model's MoE layers",
    "rows_not_captured": "left out {} rows of responses that the engine has not filled",
    "rows_of_a_shared_prompt": "counted once {} rows of a prompt that several completions share",
    "ranks_that_counted_each_token": "each token seems to be counted by {} ranks; the counts are divided by that",
    "raw_files": "the files with the picks of each token are {}",
    "approximate": "{}",
}
"""What importers put into the provenance, and how it is said."""


def _model_options(
    model: Annotated[str | None, typer.Option(help="Folder with config.json, or hub id: says all below.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the model.")] = None,
    model_type: Annotated[str | None, typer.Option(help="Its architecture in transformers.")] = None,
    layers: Annotated[str | None, typer.Option(help="Numbers of its MoE layers, such as 3-60.")] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(help="All its layers, dense ones too.", min=1)] = None,
    num_experts: Annotated[
        int | None, typer.Option(help="Experts in a layer, where the recording does not say.", min=1)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts of a token, where the recording does not say.", min=1)
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Values in a hidden state; 0 if not known.", min=0)] = None,
    expert_size: Annotated[
        int | None, typer.Option(help="Intermediate width of one expert; 0 if not known.", min=0)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the model's weights; bfloat16 if left out.")] = None,
) -> Known:
    """What the options say about the model."""
    said = Known(
        name=name,
        model_type=model_type,
        layer_ids=parse_layers(layers) if layers else None,
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=hidden_size,
        expert_size=expert_size,
        dtype=dtype,
        num_hidden_layers=num_hidden_layers,
    )
    if model is None:
        return said
    return replace(Known.of_model(model), **{key: value for key, value in vars(said).items() if value is not None})


def _takes_model(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that describe the model, the same for all sources, and hand it what they say."""
    options = inspect.signature(_model_options, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True).parameters

    @functools.wraps(command)
    def with_model(out: Path, **arguments: Any) -> None:
        from profiler.folder import require_replaceable

        require_replaceable(out)  # before long reading
        known = _model_options(**{name: arguments.pop(name) for name in options})
        command(out=out, known=known, **arguments)

    parameters = [parameter for parameter in own.values() if parameter.name not in ("known", "as_json")]
    parameters = [*parameters, *options.values(), own["as_json"]]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    with_model.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_model.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_model


@import_app.command("sglang")
@_takes_model
def import_sglang(files: Files, out: Out, known: Known, domain: Domain = None, as_json: Json = False) -> None:
    """Read SGLang's expert distribution recordings (.pt, all modes) or responses with routed experts (.json, .jsonl).

    Example: coterie import sglang recordings/ --model ./DeepSeek-V3 -o run.profile
    """
    from profiler.importers.recording import write_recording
    from profiler.importers.sglang import read_sglang

    with waiting("reading SGLang's recording"):
        write_recording(read_sglang(files, known, domain=domain or "sglang"), out)
    _show(out, as_json, "recorded by SGLang")


@import_app.command("vllm")
@_takes_model
def import_vllm(files: Files, out: Out, known: Known, domain: Domain = None, as_json: Json = False) -> None:
    """Read responses of vLLM with routed experts (.json, or .jsonl with one a line).

    Example: coterie import vllm responses.jsonl --model ./Qwen3-30B-A3B -o run.profile
    """
    from profiler.importers.recording import write_recording
    from profiler.importers.vllm import read_vllm

    with waiting("reading vLLM's responses"):
        write_recording(read_vllm(files, known, domain=domain or "vllm"), out)
    _show(out, as_json, "recorded by vLLM")


@import_app.command("tensorrt-llm")
@_takes_model
def import_tensorrt_llm(
    folder: Folder,
    out: Out,
    known: Known,
    load_balancer: Annotated[
        Path | None, typer.Option(help="YAML file of the static load balancer that was on while recording.")
    ] = None,
    decode: Decode = False,
    domain: Domain = None,
    as_json: Json = False,
) -> None:
    """Read a folder of expert statistics that TensorRT-LLM wrote to EXPERT_STATISTIC_PATH.

    Example: coterie import tensorrt-llm expert_statistic/ --model ./DeepSeek-V3 -o run.profile
    """
    from profiler.importers.recording import write_recording
    from profiler.importers.tensorrt_llm import read_tensorrt_llm

    with waiting(f"reading {folder}"):
        recording = read_tensorrt_llm(
            folder, known, domain=domain or "tensorrt-llm", load_balancer=load_balancer, decode=decode
        )
        write_recording(recording, out)
    _show(out, as_json, "recorded by TensorRT-LLM")


@import_app.command("megatron")
@_takes_model
def import_megatron(
    folder: Folder, out: Out, known: Known, decode: Decode = False, domain: Domain = None, as_json: Json = False
) -> None:
    """Read the router trace that Megatron-LM wrote to --moe-routing-trace-path.

    Example: coterie import megatron trace_dir/ --num-experts 128 -o run.profile
    """
    from profiler.importers.megatron import read_megatron
    from profiler.importers.recording import write_recording

    with waiting(f"reading {folder}"):
        write_recording(read_megatron(folder, known, domain=domain or "megatron", decode=decode), out)
    _show(out, as_json, "recorded by Megatron-LM")


@import_app.command("numpy")
@_takes_model
def import_numpy(
    file: Annotated[Path, typer.Argument(help=".npz with topk_ids (T, L, K) and what goes with it, or .npy.")],
    out: Out,
    known: Known,
    decode: Decode = False,
    as_json: Json = False,
) -> None:
    """Read numpy arrays: topk_ids (T, L, K), and optional weights, sequences, domains, phases and layer numbers.

    Example: coterie import numpy routing.npz --hidden-size 2880 --expert-size 2880 -o run.profile
    """
    from profiler.importers.arrays import read_arrays
    from profiler.importers.recording import of_profile, write_recording

    with waiting(f"reading {file}"):
        write_recording(of_profile(read_arrays(file, known, decode=decode)), out)
    _show(out, as_json, f"read from {file}")


def _show(out: Path, as_json: bool, how: str) -> None:
    from profiler.folder import open_profile

    stored = open_profile(out)
    show_profile(stored, as_json, how)
    said = stored.provenance
    if said.get("num_experts_from"):
        notes.print(f"{stored.model.num_experts} experts, the highest id and 1: give --num-experts or --model if more")
    for name, sentence in LEFT_OUT.items():
        value = said.get(name)
        if value:
            shown = f"{value:,}" if isinstance(value, int) else value
            notes.print(sentence.format(shown), highlight=False)
    if said.get("cannot_tell"):
        notes.print(
            f"counts only: they give load and imbalance, not {', '.join(said['cannot_tell'])}; for those "
            f"{said['to_get_tokens']}"
        )
