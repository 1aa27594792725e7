"""Routed experts in the JSON responses of a server, as SGLang and vLLM return them with each request.

Both give every hidden layer, and zeros for those without experts.  The last token of a response was never run.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from profiler.errors import CoterieError
from profiler.importers.known import Known
from profiler.importers.recording import Recording, narrow
from profiler.spec import UNNAMED
from profiler.trace import DECODE, PREFILL, TokenTrace

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class EncodedIds:
    """The routed experts of one completion.

    Attributes:
        where: file and line, for messages.
        text: base64.
        response: number of the response it is in; completions of one prompt share it.
        num_tokens: that were run, if the response says; None if not.
        num_decoded: of these, by decoding.
    """

    where: str
    text: str
    response: int
    num_tokens: int | None
    num_decoded: int | None

    def decode(self) -> bytes:
        """What the base64 stands for.

        Raises:
            CoterieError: it is no base64, or nothing.
        """
        try:
            data = base64.b64decode(self.text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise CoterieError(f"{self.where}: routed_experts is no base64 ({error}); truncated?") from error
        if not data:
            raise CoterieError(f"{self.where}: routed_experts is empty; leave such responses out")
        return data


Decode = Callable[[EncodedIds, Known], Ids]
"""Ids (tokens, hidden layers, K) of one completion, or a `CoterieError`."""


def read_responses(
    files: Sequence[Path], known: Known, domain: str, kind: str, decode: Decode, how_to_record: str
) -> Recording:
    """Read responses, of which .jsonl files hold one a line and .json files one or a list.

    Args:
        kind: of recording, for the provenance.
        how_to_record: for messages.

    Raises:
        CoterieError: a file cannot be read or holds no routed experts, or they do not fit each other or `known`.
    """
    shape: tuple[int, ...] | None = None
    first = ""
    used, highest, completions = np.empty(0, dtype=np.bool_), -1, 0
    for encoded in _find_all(files):
        ids = decode(encoded, known)
        if shape is None:
            shape, first, used = ids.shape[1:], encoded.where, np.zeros(ids.shape[1], dtype=np.bool_)
        if ids.shape[1:] != shape:
            raise CoterieError(
                f"{encoded.where}: (layers, top-k) {ids.shape[1:]}, {first} has {shape}: responses of two models; "
                "import them apart"
            )
        if known.num_experts is not None and ids.max(initial=-1) >= known.num_experts:
            raise CoterieError(f"{encoded.where}: expert {ids.max()}, must be below {known.num_experts}")
        used |= (ids > 0).any(axis=(0, 2))
        highest, completions = max(highest, int(ids.max(initial=-1))), completions + 1
    if shape is None:
        raise CoterieError(f"{files[0]}: no response has routed_experts; {how_to_record}")
    num_hidden_layers, top_k = shape
    if known.num_hidden_layers not in (None, num_hidden_layers):
        raise CoterieError(
            f"{first}: {num_hidden_layers} layers, the model has {known.num_hidden_layers}; give the one recorded"
        )
    # A layer of zeros has no experts, where a token picks several: it cannot pick one twice.
    recorded = list(known.layer_ids or range(num_hidden_layers)) if top_k == 1 else np.flatnonzero(used).tolist()
    if not recorded or recorded[-1] >= num_hidden_layers:
        raise CoterieError(f"{first}: {num_hidden_layers} layers, no such layer as the model's; give the one recorded")
    model = known.to_spec(UNNAMED, recorded, top_k, None, highest)
    provenance: dict[str, Any] = {"imported_from": [file.name for file in files], "format": kind}
    if known.num_experts is None:
        provenance["num_experts_from"] = "the highest id"

    def traces() -> Iterator[TokenTrace]:
        provenance["rows_not_captured"] = provenance["rows_of_a_shared_prompt"] = 0
        response, prompt = -1, np.empty((0, model.num_layers, top_k), dtype=np.int64)
        for encoded in _find_all(files):
            ids_TLK = decode(encoded, known)[:, list(model.layer_ids)]
            decoded = min(encoded.num_decoded or 0, len(ids_TLK))
            phase = np.full(len(ids_TLK), PREFILL, dtype=np.uint8)
            phase[len(ids_TLK) - decoded :] = DECODE
            shared = _shared_rows(prompt, ids_TLK) if encoded.response == response else 0
            if encoded.response != response:
                response, prompt = encoded.response, ids_TLK
            # Zeros in all layers are what the buffers hold before a token is run.
            captured: npt.NDArray[np.bool_] = np.any((ids_TLK > 0) | (top_k == 1), axis=(1, 2))
            provenance["rows_not_captured"] += int((~captured[shared:]).sum())
            provenance["rows_of_a_shared_prompt"] += shared
            captured[:shared] = False
            trace = TokenTrace(
                topk_ids=narrow(ids_TLK.transpose(1, 0, 2), model.num_experts),
                sequence_ids=np.full(len(ids_TLK), encoded.response, dtype=np.int32),
                domain_ids=np.zeros(len(ids_TLK), dtype=np.uint8),
                phase=phase,
            ).where(captured)
            try:
                trace.require(model, 1)
            except CoterieError as error:
                raise CoterieError(f"{encoded.where}: {error}") from error
            yield trace

    return Recording(model, (domain,), traces, None, provenance)


def _shared_rows(first: Ids, second: Ids) -> int:
    """Leading rows that two completions share: those of one prompt, which was run once."""
    shorter = min(len(first), len(second))
    differ = (first[:shorter] != second[:shorter]).any(axis=(1, 2))
    return int(differ.argmax()) if differ.any() else shorter


def _find_all(files: Sequence[Path]) -> Iterator[EncodedIds]:
    response = 0
    for path in files:
        for where, value in _documents(path):
            for item in value if isinstance(value, list) else [value]:
                yield from _find(item, where, response, {})
                response += 1


def _documents(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".json":
                yield str(path), json.load(file)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path} line {number}", json.loads(line)
    except (OSError, ValueError, RecursionError) as error:
        raise CoterieError(f"{path}: truncated, or not JSON ({error}); save the server's responses again") from error


def _find(value: Any, where: str, response: int, usage: dict[str, Any], depth: int = 0) -> Iterator[EncodedIds]:
    """Every text named routed_experts, however deep: engines put it in the choice, its meta_info or beside all."""
    if depth > 20 or not isinstance(value, dict | list):
        return
    if isinstance(value, list):
        for item in value:
            yield from _find(item, where, response, usage, depth + 1)
        return
    choices = value.get("choices")
    if isinstance(value.get("usage"), dict) and isinstance(choices, list) and len(choices) == 1:
        usage = value["usage"]
    if isinstance(value.get("routed_experts"), str):
        own = {**usage, **value}
        prompt, completion = own.get("prompt_tokens"), own.get("completion_tokens")
        if isinstance(value.get("token_ids"), list):  # of vLLM's choices
            completion = len(value["token_ids"])
        decoded = completion - 1 if type(completion) is int and completion > 0 else None
        num_tokens = prompt + decoded if type(prompt) is int and decoded is not None else None
        yield EncodedIds(where, value["routed_experts"], response, num_tokens, decoded)
    for name, inner in value.items():
        if name != "routed_experts":
            yield from _find(inner, where, response, usage, depth + 1)
