"""Documents turned into batches of tokens, one at a time. Knows tokenizers, not models."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from profiler.documents import Document
from profiler.errors import CoterieError, first_line


@dataclass(frozen=True)
class Batch:
    """Sequences of one domain, padded on one side.

    Attributes:
        domain: their label.
        input_ids: int64 (B, S).
        attention_mask: int64 (B, S), 0 where padded.
    """

    domain: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask.sum())


@dataclass(frozen=True)
class Batches:
    """Batches that are made anew each time they are iterated over, the same ones every time.

    How many there are takes a pass over the text, when it is first asked for.

    Attributes:
        make: makes all batches but so many at the start.
    """

    make: Callable[[int], Iterator[Batch]]

    def __iter__(self) -> Iterator[Batch]:
        return self.make(0)

    def start_at(self, number: int) -> Iterator[Batch]:
        """The batches from this one on, counted from 0."""
        return self.make(number)

    @property
    def num_batches(self) -> int:
        """Batches in all."""
        return self._totals[0]

    @property
    def num_tokens(self) -> int:
        """Tokens in all, without padding."""
        return self._totals[1]

    @property
    def digest(self) -> str:
        """SHA-256 in hex of all that a model and its recorder see: domains, token ids, masks, in batches."""
        return self._totals[2]

    @cached_property
    def _totals(self) -> tuple[int, int, str]:
        num_batches = num_tokens = 0
        digest = hashlib.sha256()
        for batch in self:
            num_batches += 1
            num_tokens += batch.num_tokens
            digest.update(json.dumps([batch.domain, *batch.input_ids.shape]).encode())
            digest.update(batch.input_ids.numpy().tobytes() + batch.attention_mask.numpy().tobytes())
        return num_batches, num_tokens, digest.hexdigest()


def make_batches(
    documents: Sequence[Document],
    tokenizer: Any,
    sequence_length: int,
    batch_size: int,
    max_tokens: int | None = None,
    *,
    as_chat: bool = False,
    pad_left: bool = False,
    skip: int = 0,
) -> Iterator[Batch]:
    """Cut documents into sequences and batch them by domain, one batch of each domain in turn.

    Taking turns spreads a token budget over the domains.  Documents are read as their turn comes; in memory is one of
    each domain.

    Args:
        tokenizer: a transformers tokenizer.
        sequence_length: tokens in a sequence, except a document's last.
        batch_size: sequences in a batch.
        max_tokens: stop after this many tokens (the last batch is cut short); None for all.
        as_chat: put each text through the tokenizer's chat template, as one message of a user.  Conversations always go
            through it.
        pad_left: pad on the left, as generating needs.
        skip: leave out so many batches at the start; their tokens count.

    Raises:
        CoterieError: a size is below 1, or there is no chat template; while iterating also if a document has changed or
            the chat template refuses it.
    """
    for name, value in (("sequence length", sequence_length), ("batch size", batch_size), ("token budget", max_tokens)):
        if value is not None and value < 1:
            raise CoterieError(f"{name} {value}: must be at least 1")
    if as_chat:
        _require_template(tokenizer)
    of_domain: dict[str, list[Document]] = {}
    for document in documents:
        of_domain.setdefault(document.domain, []).append(document)
    queues = {
        domain: _groups(_sequences(its_documents, tokenizer, sequence_length, as_chat), batch_size)
        for domain, its_documents in of_domain.items()
    }
    groups = itertools.islice(_limit(_take_turns(queues), max_tokens), skip, None)
    return (_pad(domain, sequences, pad_left) for domain, sequences in groups)


def _sequences(
    documents: Sequence[Document], tokenizer: Any, sequence_length: int, as_chat: bool
) -> Iterator[torch.Tensor]:
    for document in documents:
        ids = torch.tensor(_token_ids(document, tokenizer, as_chat), dtype=torch.int32)
        if len(ids):
            yield from ids.split(sequence_length)


def _token_ids(document: Document, tokenizer: Any, as_chat: bool) -> list[int]:
    content = document.read()
    if isinstance(content, str) and not as_chat:
        try:
            encoded = tokenizer(content, add_special_tokens=False, verbose=False)
        except Exception as error:  # what a broken tokenizer raises is any library's choice
            raise CoterieError(
                f"{document.place}: the model's tokenizer fails on it ({first_line(error)}); is its folder whole?"
            ) from error
    else:
        _require_template(tokenizer)
        chat = [{"role": "user", "content": content}] if isinstance(content, str) else content
        try:
            encoded = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)
        except Exception as error:  # a template is a program, which fails in all ways that one can
            raise CoterieError(
                f"{document.place}: the model's chat template refuses it ({first_line(error)}); mend it"
            ) from error
    ids: list[int] = encoded["input_ids"]
    return ids


def _require_template(tokenizer: Any) -> None:
    if getattr(tokenizer, "chat_template", None) is None:
        raise CoterieError(
            "the tokenizer has no chat template, conversations need one; "
            "give plain texts without --chat, or a model with a chat template"
        )


def _groups(sequences: Iterator[torch.Tensor], batch_size: int) -> Iterator[list[torch.Tensor]]:
    while group := list(itertools.islice(sequences, batch_size)):
        yield group


def _take_turns(queues: dict[str, Iterator[list[torch.Tensor]]]) -> Iterator[tuple[str, list[torch.Tensor]]]:
    while queues:
        for domain in list(queues):
            group = next(queues[domain], None)
            if group is None:
                del queues[domain]
            else:
                yield domain, group


def _limit(
    groups: Iterator[tuple[str, list[torch.Tensor]]], max_tokens: int | None
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    if max_tokens is None:
        yield from groups
        return
    left = max_tokens
    for domain, group in groups:
        kept = []
        for sequence in group:
            kept.append(sequence[:left])
            left -= len(kept[-1])
            if left == 0:
                break
        yield domain, kept
        if left == 0:  # before the next document is read
            return


def _pad(domain: str, sequences: list[torch.Tensor], pad_left: bool) -> Batch:
    side = "left" if pad_left else "right"
    # What stands in a masked place is never read; 0 is a token of every vocabulary.
    input_ids = pad_sequence(sequences, batch_first=True, padding_side=side).long()
    mask = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in sequences], True, padding_side=side)
    return Batch(domain, input_ids, mask)
