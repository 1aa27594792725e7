"""Texts and conversations as examples to fine-tune on. Knows no constraint."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from profiler.documents import Chat, Document
from profiler.errors import CoterieError, first_line
from profiler.files import parse_json
from profiler.loading import LoadedModel

NO_LABEL = -100
"""Where nothing is to be learned, as transformers' losses take it."""

ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""What some data sets call the two."""


@dataclass(frozen=True)
class Example:
    """One sequence: int64 (S,) each, labels `NO_LABEL` where nothing is to be learned."""

    input_ids: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Examples:
    """What a training run reads, by number."""

    rows: Sequence[Example]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Example:
        return self.rows[number]

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex of all rows."""
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(len(row.input_ids).to_bytes(8, "little"))
            digest.update(row.input_ids.numpy().tobytes() + row.labels.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Conversation:
    """A conversation and the place that it was read from, for messages."""

    place: str
    chat: Chat


def collate(rows: Sequence[Example]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right with masked tokens."""
    mask = pad_sequence([torch.ones_like(row.input_ids) for row in rows], batch_first=True)
    input_ids = pad_sequence([row.input_ids for row in rows], batch_first=True)
    labels = pad_sequence([row.labels for row in rows], batch_first=True, padding_value=NO_LABEL)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def text_examples(loaded: LoadedModel, documents: Sequence[Document], sequence_length: int) -> Examples:
    """Every token of the texts once, in sequences of `sequence_length`; all of it is learned.

    Raises:
        CoterieError: there is no sequence of 2 tokens.
    """
    batches = loaded.batches(documents, sequence_length, batch_size=1)
    rows = [Example(batch.input_ids[0], batch.input_ids[0].clone()) for batch in batches if batch.num_tokens > 1]
    if not rows:
        raise CoterieError("the text has no sequence of 2 tokens, so nothing can be learned; give more to --data")
    return Examples(rows)


def read_conversations(paths: Sequence[Path]) -> list[Conversation]:
    """All conversations of JSON-lines files, which need no model to be read.

    A line is an object with `messages` (turns with role and content), `conversations` (such turns with from and value,
    or plain texts of user and assistant in turn), or `instruction`, perhaps `input`, and `output`.

    Raises:
        CoterieError: a file or a line is not so.
    """
    found = []
    for path in paths:
        for number, record in _lines(path):
            place = f"{path}, line {number}"
            found.append(Conversation(place, _turns(record, place)))
    return found


def instruction_examples(loaded: LoadedModel, conversations: Sequence[Conversation], sequence_length: int) -> Examples:
    """One example for each conversation, cut to `sequence_length` tokens; only the answers are learned.

    Raises:
        CoterieError: the chat template refuses one, or no answer is left.
    """
    if sequence_length < 2:
        raise CoterieError(f"sequence length {sequence_length}: must be at least 2")
    rows = []
    for one in conversations:
        try:
            row = _example(one.chat, loaded.tokenizer, sequence_length)
        except CoterieError:
            raise
        except Exception as error:  # a template is a program, which fails in all ways
            raise CoterieError(
                f"{one.place}: the model's chat template refuses it ({first_line(error)}); mend it or leave it out"
            ) from error
        if bool((row.labels[1:] != NO_LABEL).any()):
            rows.append(row)
    if not rows:
        raise CoterieError(f"no answer within {sequence_length} tokens; give longer sequences or other conversations")
    return Examples(rows)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    record = parse_json(line)
                    if not isinstance(record, dict):
                        raise CoterieError(f"{path}, line {number}: must be a JSON object, is {type(record).__name__}")
                    yield number, record
    except FileNotFoundError:
        raise CoterieError(f"{path}: no such file; give JSON lines of conversations") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CoterieError(f"{path}: not JSON lines of conversations ({error}); mend it") from error


def _turns(record: dict[str, Any], place: str) -> Chat:
    if isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str):
        more = record.get("input")
        if more is None or isinstance(more, str):
            asked = "\n\n".join(part for part in (record["instruction"], more) if part)
            return [{"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]
    turns = record.get("messages", record.get("conversations"))
    if isinstance(turns, list) and turns:
        if all(isinstance(turn, str) for turn in turns):
            roles = itertools.cycle(("user", "assistant"))
            return [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
        named: list[dict[str, Any]] = [
            {"role": str(turn.get("role", turn.get("from"))), "content": turn.get("content", turn.get("value"))}
            for turn in turns
            if isinstance(turn, dict)
        ]
        if len(named) == len(turns) and all(isinstance(turn["content"], str) for turn in named):
            return [{**turn, "role": ROLES.get(turn["role"], turn["role"])} for turn in named]
    raise CoterieError(
        f"{place}: no conversation; an object needs messages, conversations, or instruction and output "
        f"({', '.join(map(str, record)) or 'it has no field'})"
    )


def _example(chat: Chat, tokenizer: Any, sequence_length: int) -> Example:
    ids: list[int] = []
    labels: list[int] = []
    for part_ids, is_answer in _pieces(chat, tokenizer):
        ids += part_ids
        labels += part_ids if is_answer else [NO_LABEL] * len(part_ids)
    return Example(torch.tensor(ids[:sequence_length]), torch.tensor(labels[:sequence_length]))


def _pieces(chat: Chat, tokenizer: Any) -> Iterator[tuple[list[int], bool]]:
    """Token ids of a conversation piece by piece, and whether each is an answer."""
    if getattr(tokenizer, "chat_template", None) is None:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        for turn in chat:
            is_answer = turn["role"] == "assistant"
            yield tokenizer(f"{turn['role']}:\n", add_special_tokens=False)["input_ids"], False
            text = tokenizer(f"{turn['content']}\n", add_special_tokens=False)["input_ids"]
            yield text + (end if is_answer else []), is_answer
        return
    before = ""
    for number, turn in enumerate(chat):
        is_answer = turn["role"] == "assistant"
        if is_answer:  # what the template puts before an answer is asked, not learned
            asked = tokenizer.apply_chat_template(chat[:number], tokenize=False, add_generation_prompt=True)
            yield _ids(tokenizer, asked, before), False
            before = asked
        elif number + 1 < len(chat) and chat[number + 1]["role"] == "assistant":
            continue
        told = tokenizer.apply_chat_template(chat[: number + 1], tokenize=False)
        yield _ids(tokenizer, told, before), is_answer
        before = told


def _ids(tokenizer: Any, text: str, before: str) -> list[int]:
    """Token ids of what a conversation's text has beyond that of its beginning."""
    if not text.startswith(before):
        raise CoterieError(
            "the model's chat template writes earlier turns anew as a conversation goes on, so that answers cannot be "
            "told from questions; give conversations of one question and one answer"
        )
    ids: list[int] = tokenizer(text[len(before) :], add_special_tokens=False)["input_ids"]
    return ids
