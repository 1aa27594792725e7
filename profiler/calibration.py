"""Text with domain labels, turned into batches of tokens. Knows tokenizers, not models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from profiler.errors import CoterieError
from profiler.trace import MAX_DOMAINS


@dataclass(frozen=True)
class Document:
    """One text and the label of its domain."""

    domain: str
    text: str


@dataclass(frozen=True)
class Batch:
    """Sequences of one domain, padded on the right.

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


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """Read UTF-8 text files and folders of them.

    A file's domain is its name without the ending.  In a folder, files of a sub-folder share the sub-folder's name.

    Raises:
        CoterieError: a path is missing, a file is empty or not UTF-8 text, or there are more than 255 domains.
    """
    documents = []
    for path in paths:
        if not path.exists():
            raise CoterieError(f"{path}: no such file or folder; give text files or folders of them to --data")
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        if not files:
            raise CoterieError(f"{path}: holds no file; give a folder with at least one text file to --data")
        for file in files:
            nested = path.is_dir() and file.parent != path
            documents.append(Document(file.relative_to(path).parts[0] if nested else file.stem, _read_text(file)))
    num_domains = len({document.domain for document in documents})
    if num_domains > MAX_DOMAINS:
        raise CoterieError(
            f"{num_domains} domains, at most {MAX_DOMAINS} can be told apart; put files into sub-folders"
        )
    return documents


def _read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CoterieError(f"{file}: not UTF-8 text (byte {error.start}); give plain text to --data") from error
    except OSError as error:
        raise CoterieError(f"{file}: cannot be read ({error.strerror})") from error
    if not text.strip():
        raise CoterieError(f"{file}: holds 0 characters of text, at least 1 is needed; remove it or fill it")
    return text


def make_batches(
    documents: Sequence[Document], tokenizer: Any, sequence_length: int, batch_size: int, max_tokens: int | None
) -> list[Batch]:
    """Cut documents into sequences and batch them by domain, one batch of each domain in turn.

    Taking turns spreads a token budget over the domains.

    Args:
        tokenizer: a transformers tokenizer.
        sequence_length: tokens in a sequence, except a document's last.
        batch_size: sequences in a batch.
        max_tokens: stop after this many tokens (the last batch is cut short); None for all.

    Raises:
        CoterieError: a size is below 1.
    """
    for name, value in (("sequence length", sequence_length), ("batch size", batch_size), ("token budget", max_tokens)):
        if value is not None and value < 1:
            raise CoterieError(f"{name} {value}: must be at least 1")
    queues: dict[str, list[Batch]] = {}
    for domain in dict.fromkeys(document.domain for document in documents):
        sequences: list[list[int]] = []
        for document in documents:
            if document.domain == domain:
                ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
                sequences += [ids[start : start + sequence_length] for start in range(0, len(ids), sequence_length)]
        queues[domain] = [
            _pad(domain, sequences[start : start + batch_size]) for start in range(0, len(sequences), batch_size)
        ]
    return list(_limit(_take_turns(list(queues.values())), max_tokens))


def _pad(domain: str, sequences: list[list[int]]) -> Batch:
    longest = max(map(len, sequences))
    # What stands in a masked place is never read; 0 is a token of every vocabulary.
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in sequences])
    return Batch(domain, input_ids, mask)


def _take_turns(queues: list[list[Batch]]) -> Iterator[Batch]:
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue):
                yield queue[turn]


def _limit(batches: Iterator[Batch], max_tokens: int | None) -> Iterator[Batch]:
    left = max_tokens
    for batch in batches:
        if left is not None:
            if left <= 0:
                return
            before = (batch.attention_mask.flatten().cumsum(0) - batch.attention_mask.flatten()).view_as(
                batch.input_ids
            )
            mask = batch.attention_mask * (before < left)
            rows = mask.any(dim=1)
            batch = Batch(batch.domain, batch.input_ids[rows], mask[rows])
            left -= batch.num_tokens
        yield batch
