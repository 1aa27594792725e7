"""Routed experts in the JSON responses of a server, as SGLang and vLLM return them with each request.
What the base64 in them holds it does not know: `sglang.py` and `vllm.py` decode it.

Both give every hidden layer, and zeros for those without experts.  The last token of a response was never run.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import itertools
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
from profiler.trace import DECODE, PREFILL, TokenTrace, has_plenty_of_rows

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
        num_prompt: tokens of the prompt, or of all prompts if the response has several.
        num_completed: tokens of all completions of the response.
    """

    where: str
    text: str
    response: int
    num_tokens: int | None
    num_decoded: int | None
    num_prompt: int | None
    num_completed: int | None

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
        raise CoterieError(
            f"{first}: {num_hidden_layers} layers, no such layer as the model's; give the one recorded, or record with "
            "SGLang's --moe-runner-backend triton if it routed inside its kernel"
        )
    model = known.to_spec(UNNAMED, recorded, top_k, None, highest)
    provenance: dict[str, Any] = {"imported_from": [file.name for file in files], "format": kind}
    if known.num_experts is None:
        provenance["num_experts_from"] = "the highest id"

    def in_turn() -> Iterator[tuple[EncodedIds, Ids, int, int]]:
        """All completions with their ids, rows that were decoded, and rows of a prompt that came before."""
        prefixes = _Prefixes()
        for _, completions in itertools.groupby(_find_all(files), key=lambda encoded: encoded.response):
            if not has_plenty_of_rows(model.num_layers, model.num_experts, top_k):
                prefixes = _Prefixes()  # other requests may begin alike by chance
            together = [(encoded, decode(encoded, known)[:, list(model.layer_ids)]) for encoded in completions]
            for (encoded, ids_TLK), decoded in zip(together, _num_decoded(together), strict=True):
                yield encoded, ids_TLK, decoded, min(prefixes.known(ids_TLK), len(ids_TLK) - decoded)

    def traces() -> Iterator[TokenTrace]:
        provenance["rows_not_captured"] = provenance["rows_of_a_shared_prompt"] = 0
        for encoded, ids_TLK, decoded, shared in in_turn():
            phase = np.full(len(ids_TLK), PREFILL, dtype=np.uint8)
            phase[len(ids_TLK) - decoded :] = DECODE
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


def _num_decoded(completions: Sequence[tuple[EncodedIds, Ids]]) -> list[int]:
    """Of each completion of one response, the rows that were decoded; 0 where it does not say."""
    rows = sum(len(ids) for _, ids in completions)
    numbers = []
    for encoded, ids in completions:
        decoded, prompt, completed = encoded.num_decoded, encoded.num_prompt, encoded.num_completed
        if decoded is None and prompt is not None:
            # Of a list of prompts the response gives the sum, which tells nothing of each.
            one_prompt = completed is None or completed == rows - len(completions) * (prompt - 1)
            decoded = len(ids) - prompt if one_prompt else None
        numbers.append(min(max(decoded or 0, 0), len(ids)))
    return numbers


class _Prefixes:
    """Rows that a completion begins with and an earlier one had before it: engines keep these and run them once.

    Completions of one prompt share it, chats their system prompt, and a turn all turns before.  What is kept is a
    number of 8 bytes for each row, of the row and all before it.
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def known(self, ids_TLK: Ids) -> int:
        """How many leading rows were there before; all of them are from now on."""
        so_far, places = b"", []
        for row in np.ascontiguousarray(ids_TLK):
            so_far = hashlib.blake2b(so_far + row.tobytes(), digest_size=8).digest()
            places.append(so_far)
        known = next((number for number, place in enumerate(places) if place not in self._seen), len(places))
        self._seen.update(places[known:])
        return known


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
    choices, totals = value.get("choices"), value.get("usage")
    if isinstance(totals, dict) and isinstance(choices, list):
        # Of several choices these are the tokens of all of them.
        of_one_or_all = "completion_tokens" if len(choices) == 1 else "of_all_choices"
        usage = {"prompt_tokens": totals.get("prompt_tokens"), of_one_or_all: totals.get("completion_tokens")}
    if isinstance(value.get("routed_experts"), str):
        own = {key: number for key, number in {**usage, **value}.items() if type(number) is int and number >= 0}
        prompt, completion, of_all = (own.get(k) for k in ("prompt_tokens", "completion_tokens", "of_all_choices"))
        if isinstance(value.get("token_ids"), list):  # of vLLM's choices
            completion = len(value["token_ids"])
        decoded = completion - 1 if completion is not None and completion > 0 else None
        num_tokens = None if prompt is None or decoded is None else prompt + decoded
        yield EncodedIds(where, value["routed_experts"], response, num_tokens, decoded, prompt, of_all)
    for name, inner in value.items():
        if name != "routed_experts":
            yield from _find(inner, where, response, usage, depth + 1)
