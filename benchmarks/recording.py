"""What recording adds to a forward pass: the same pass with and without it, in turns."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, OlmoeConfig

from benchmarks.record import spread, write
from profiler.loading import load_model
from profiler.recorder import Recorder
from profiler.trace import TokenTrace
from profiler.writer import ProfileWriter

PAIRS = {"embedded": (75, 4), "OLMoE-shaped": (41, 1)}
"""Pairs, and passes in each half of one: the writer counts several short passes together."""
OLMOE_SHAPED = OlmoeConfig(
    hidden_size=1024,
    intermediate_size=1024,
    num_experts=64,
    num_experts_per_tok=8,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=16,
    vocab_size=1024,
)


def main() -> None:
    torch.manual_seed(0)
    models = {
        "embedded (4 layers, 64 experts, top-8, hidden 192)": (load_model(None, "cpu").model, (16, 256)),
        "OLMoE-shaped (4 layers, 64 experts, top-8, hidden 1024)": (
            AutoModelForCausalLM.from_config(OLMOE_SHAPED).eval(),
            (4, 256),
        ),
    }
    rows = []
    for name, (model, shape) in models.items():
        pairs, passes = PAIRS[name.split()[0]]
        without, recorded, end = measure(model, torch.randint(0, 1024, shape), pairs, passes)
        added = np.sort((recorded / without - 1) * 100)
        # Where the median of such pairs lies 19 times out of 20, by the sign test.
        half = 0.98 * len(added) ** 0.5
        low, high = added[int(len(added) / 2 - half) - 1], added[int(len(added) / 2 + half) + 1]
        overall = (recorded.sum() + end / passes) / without.sum() - 1
        rows.append(
            [
                name,
                len(without),
                f"{shape[0]} x {shape[1]}",
                spread(without * 1e3),
                spread(recorded * 1e3),
                f"{np.median(added):.2f} ({low:.2f} to {high:.2f})",
                f"{100 * overall:.2f}",
            ]
        )
    write(
        "recording",
        "What recording adds to a forward pass",
        "Median (least to most); pairs of one pass, or of four short ones, in turns, float32 on the CPU. Loads, "
        "co-activation and transitions are counted every 16,384 tokens and token sets written every 65,536, so that "
        "most pairs hold the hooks and some the counting; over all pairs and the end of the recording all is included.",
        (
            "model",
            "pairs",
            "batch",
            "ms without",
            "ms with recording",
            "added, %, median of pairs (95% interval)",
            "over all",
        ),
        rows,
    )


@torch.no_grad()
def measure(
    model: torch.nn.Module, input_ids: torch.Tensor, repeats: int, passes: int
) -> tuple[np.ndarray, np.ndarray, float]:
    """Seconds of passes without and with recording, the two of a pair in alternating order, and of the end."""
    of_pass: list[TokenTrace] = []
    recorder = Recorder(model, on_tokens=of_pass.append)
    times: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        writer = ProfileWriter(Path(folder) / "run.profile", recorder.spec, ["text"])

        def run(recording: bool) -> None:
            started = time.perf_counter()
            for _ in range(passes):
                if recording:
                    with recorder:
                        model(input_ids=input_ids, use_cache=False)
                    writer.add(of_pass.pop())
                else:
                    model(input_ids=input_ids, use_cache=False)
            times[recording].append((time.perf_counter() - started) / passes)

        for pair in range(repeats + 3):
            for recording in (False, True) if pair % 2 else (True, False):
                run(recording)
        started = time.perf_counter()
        writer.finish({})
        end = time.perf_counter() - started
    return np.array(times[False][3:]), np.array(times[True][3:]), end


if __name__ == "__main__":
    main()
