"""What vLLM records: the routed experts of each request, in its responses.
Knows how these are encoded, not where responses keep them: `responses.py` does.

Checked against the code of vLLM 0.33.0: `model_executor/layers/fused_moe/routed_experts_capturer.py` fills them with
logical experts of every hidden layer, `entrypoints` returns them in `choices[].routed_experts` as base64 of a .npy
file, (tokens, hidden layers, K), uint8 up to 256 experts and uint16 above.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from profiler.errors import CoterieError, first_line
from profiler.importers.known import Known
from profiler.importers.recording import Recording, find_files
from profiler.importers.responses import EncodedIds, read_responses


def read_vllm(paths: Sequence[Path], known: Known | None = None, *, domain: str = "vllm") -> Recording:
    """Read the JSON responses of a vLLM server.

    Args:
        paths: .json files (a response or a list of them), .jsonl files (one a line), or folders of them.
        known: the model, as far as it is known.

    Raises:
        CoterieError: a file cannot be read or holds no routed experts, or they do not fit each other or `known`.
    """
    files = find_files(paths, (".json", ".jsonl"))
    how = "start vLLM with --enable-return-routed-experts"
    return read_responses(files, known or Known(), domain, "vllm routed_experts", _decode, how)


def _decode(encoded: EncodedIds, known: Known) -> npt.NDArray[np.int64]:
    data = encoded.decode()
    try:
        ids = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python, and so fails in all ways that Python can
        raise CoterieError(
            f"{encoded.where}: routed_experts is no .npy array, or truncated ({first_line(error)})"
        ) from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer) or 0 in ids.shape:
        found = f"{ids.dtype} {ids.shape}" if isinstance(ids, np.ndarray) else "an archive"
        raise CoterieError(f"{encoded.where}: routed_experts is {found}, must be whole numbers (tokens, layers, top-k)")
    return ids.astype(np.int64)
