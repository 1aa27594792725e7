"""Ten million tokens through a profile writer: does memory stay where it is?"""

import shutil
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.record import peak_memory, write
from profiler.spec import MoESpec
from profiler.trace import TokenTrace, ids_dtype
from profiler.writer import ProfileWriter

NUM_TOKENS, NUM_LAYERS, NUM_EXPERTS, TOP_K = 10_000_000, 24, 64, 8
TOKENS_OF_A_PASS = 8_192


def main() -> None:
    rows = []
    for kept, max_traced_tokens in (("all", None), ("a sample of 500,000", 500_000), ("none", 0)):
        with get_context("spawn").Pool(1) as pool:
            rows.append([kept, *pool.apply(stream, (max_traced_tokens,))])
    write(
        "streaming",
        "Ten million tokens through a profile writer",
        f"{NUM_TOKENS:,} synthetic tokens x {NUM_LAYERS} layers, {NUM_EXPERTS} experts, top-{TOP_K}, passes of "
        f"{TOKENS_OF_A_PASS:,} tokens; peak resident memory of the process until the profile is complete and checked, "
        "checkpoints included, less its memory after the first pass. Each row is a process of its own.",
        ("token sets kept", "peak memory grew by, MB", "seconds", "tokens/s", "MB on disk"),
        rows,
    )


def stream(max_traced_tokens: int | None) -> list[float]:
    """Growth in MB, seconds, tokens/s and MB on disk of one run."""
    spec = MoESpec("made-up", "made-up", tuple(range(NUM_LAYERS)), NUM_EXPERTS, TOP_K, 1, 0, 0, "float32")
    pool = passes(spec)
    folder = Path(tempfile.mkdtemp())
    try:
        writer = ProfileWriter(folder / "run.profile", spec, ["text"], max_traced_tokens=max_traced_tokens)
        writer.add(pool[0])
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before, started = peak_memory(), time.perf_counter()
        seen, number = pool[0].num_tokens, 1
        while seen < NUM_TOKENS:
            part = pool[number % len(pool)].where(slice(NUM_TOKENS - seen))
            writer.add(part)
            writer.checkpoint_if_due({"batches": number})
            seen, number = seen + part.num_tokens, number + 1
        stored = writer.finish({})
        assert stored.num_tokens == NUM_TOKENS
        seconds = time.perf_counter() - started
        on_disk = sum(path.stat().st_size for path in stored.folder.iterdir()) / 1e6
        return [round((peak_memory() - before) / 1e6), round(seconds), round(NUM_TOKENS / seconds), round(on_disk)]
    finally:
        shutil.rmtree(folder)


def passes(spec: MoESpec) -> list[TokenTrace]:
    """Some passes to send through again and again; making all tokens anew would take longer than counting them."""
    rng = np.random.default_rng(0)
    out = []
    for number in range(8):
        scores = rng.gumbel(size=(NUM_LAYERS, TOKENS_OF_A_PASS, NUM_EXPERTS)).astype(np.float32)
        ids = np.argpartition(-scores, TOP_K, axis=-1)[..., :TOP_K].astype(ids_dtype(NUM_EXPERTS))
        zeros = np.zeros(TOKENS_OF_A_PASS, dtype=np.uint8)
        out.append(TokenTrace(ids, np.full(TOKENS_OF_A_PASS, number, dtype=np.int32), zeros, zeros))
    return out


if __name__ == "__main__":
    main()
