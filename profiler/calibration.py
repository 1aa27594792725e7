"""Text with domain labels, turned into batches of tokens. Knows tokenizers, not models.

Text stays where it is until a batch needs it: a `Document` is a place, batches are made one at a time.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import jinja2
import torch
from torch.nn.utils.rnn import pad_sequence

from profiler.errors import CoterieError, first_line
from profiler.trace import MAX_DOMAINS

MAX_BYTES = 2**20
"""A longer text file is several documents, so that one document always fits into memory."""

Chat = list[dict[str, Any]]
"""Turns of a conversation, each with a `role` and a `content`."""


class Source(Protocol):
    """Where documents are kept."""

    def read(self, start: int, stop: int) -> str | Chat:
        """One document.

        Raises:
            CoterieError: it is no longer what `read_documents` saw.
        """

    def place(self, start: int) -> str:
        """One document's place, for messages."""


@dataclass(frozen=True, slots=True)
class Document:
    """The label of a text's domain, and where the text is.

    Attributes:
        start: first byte of a file, or row of a dataset.
        stop: the byte or row after the last.
    """

    domain: str
    source: Source
    start: int = 0
    stop: int = 1

    @classmethod
    def of(cls, domain: str, content: str | Chat) -> Document:
        """A document that is in memory already."""
        return cls(domain, _Memory(content))

    def read(self) -> str | Chat:
        """Its text, or the turns of its conversation.

        Raises:
            CoterieError: it is no longer what `read_documents` saw.
        """
        return self.source.read(self.start, self.stop)

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return self.source.place(self.start)


@dataclass(frozen=True, slots=True)
class _Memory:
    content: str | Chat

    def read(self, start: int, stop: int) -> str | Chat:
        return self.content

    def place(self, start: int) -> str:
        return "a document"


@dataclass(frozen=True, slots=True)
class _File:
    """A file of text, or of JSON lines where there is a text field; `stamp` is its size and time of change."""

    path: Path
    stamp: tuple[int, int]
    text_field: str | None

    def read(self, start: int, stop: int) -> str | Chat:
        try:
            with self.path.open("rb") as file:
                stamp, data = _stamp(file), os.pread(file.fileno(), stop - start, start)
        except OSError as error:
            raise CoterieError(f"{self.path}: can no longer be read ({error.strerror}); start again") from error
        if stamp != self.stamp:
            raise CoterieError(f"{self.path}: has changed since it was checked; leave it as it is and start again")
        if self.text_field is None:
            # As reading in text mode would: every line ends in \n.
            return _decode(data, self.path, start, final=True)[0].replace("\r\n", "\n").replace("\r", "\n")
        return _content(_parse_line(data, self.place(start)), self.text_field, self.place(start))

    def place(self, start: int) -> str:
        return f"{self.path}, byte {start}"


@dataclass(frozen=True, slots=True)
class _Rows:
    """A Hugging Face dataset."""

    name: str
    dataset: Any
    text_field: str

    def read(self, start: int, stop: int) -> str | Chat:
        return self.content(self.dataset[start], start)

    def content(self, record: dict[str, Any], row: int) -> str | Chat:
        if record.get(self.text_field) is None and record.get("messages") is None:
            return ""
        return _content(record, self.text_field, self.place(row))

    def place(self, start: int) -> str:
        return f"{self.name}, row {start}"


def read_documents(
    paths: Sequence[str | Path],
    *,
    text_field: str = "text",
    domain_field: str = "domain",
    split: str = "train",
    seed: int | None = None,
) -> list[Document]:
    """Find and check texts, in one pass that keeps none of them in memory.

    - A UTF-8 text file: its domain is its name without the ending.
    - A file of JSON objects, one a line (`.jsonl`): each is a document.
    - A folder of such files: those in a sub-folder share the sub-folder's name as their domain; hidden ones are left
      out.
    - A Hugging Face dataset: saved in a folder, or `owner/name` or `owner/name:config` on the hub.  Rows without text
      are left out.

    Args:
        text_field: of a JSON object or row.  One without it may have `messages`, the turns of a conversation.
        domain_field: of a JSON object or row; one without it belongs to its file's domain.
        split: of a dataset.
        seed: take the documents of each domain in a random order; None keeps theirs.

    Raises:
        CoterieError: a path is missing, a file is empty or not what its name says, a document has no text, or there are
            more than 255 domains.
    """
    documents: list[Document] = []
    for path in paths:
        documents += _read_path(Path(path), text_field, domain_field, split)
    domains = {domain: number for number, domain in enumerate(dict.fromkeys(document.domain for document in documents))}
    if len(domains) > MAX_DOMAINS:
        raise CoterieError(
            f"{len(domains)} domains, at most {MAX_DOMAINS} can be told apart; "
            "put files into sub-folders, or give a coarser --domain-field"
        )
    if seed is not None:
        random.Random(seed).shuffle(documents)
        documents.sort(key=lambda document: domains[document.domain])  # stable: each domain stays shuffled
    return documents


def _read_path(path: Path, text_field: str, domain_field: str, split: str) -> Iterator[Document]:
    # A file missing in a folder that there is was misspelt; asking the hub for it would take long.
    may_be_on_hub = not path.exists() and not path.parent.exists()
    if _is_saved_dataset(path) or (may_be_on_hub and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?", str(path))):
        yield from _scan_dataset(path, text_field, domain_field, split)
        return
    if not path.exists():
        raise CoterieError(f"{path}: no such file or folder; give text files or folders of them to --data")
    files = [path]
    if path.is_dir():
        found = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
        files = sorted(path / file for file in found if not any(part.startswith(".") for part in file.parts))
    if not files:
        raise CoterieError(f"{path}: holds no file; give a folder with at least one text file to --data")
    for file in files:
        domain = file.relative_to(path).parts[0] if path.is_dir() and file.parent != path else file.stem
        try:
            if file.suffix == ".jsonl":
                yield from _scan_lines(file, domain, text_field, domain_field)
            else:
                yield from _scan_text(file, domain)
        except OSError as error:
            raise CoterieError(f"{file}: cannot be read ({error.strerror})") from error


def _scan_text(path: Path, domain: str) -> Iterator[Document]:
    """Documents of at most `MAX_BYTES`, cut at a line break, else at a space, else between characters."""
    start, holds_text = 0, False
    with path.open("rb") as file:
        source = _File(path, _stamp(file), None)
        while block := file.read(MAX_BYTES):
            final = len(block) < MAX_BYTES or start + len(block) == source.stamp[0]
            text, length = _decode(block, path, start, final)
            if not final:
                length = block.rfind(b"\n") + 1 or block.rfind(b" ") + 1 or length
            holds_text = holds_text or not text.isspace()
            yield Document(domain, source, start, start + length)
            start += length
            file.seek(start)
    if not holds_text:
        raise CoterieError(f"{path}: holds 0 characters of text, at least 1 is needed; remove it or fill it")


def _scan_lines(path: Path, domain: str, text_field: str, domain_field: str) -> Iterator[Document]:
    start, holds_text = 0, False
    with path.open("rb") as file:
        source = _File(path, _stamp(file), text_field)
        for number, line in enumerate(file, start=1):
            if line.strip():
                place = f"{path}, line {number}"
                record = _parse_line(line, place)
                if not _holds_text(_content(record, text_field, place)):
                    raise CoterieError(f"{place}: holds 0 characters of text, at least 1 is needed; remove the line")
                holds_text = True
                yield Document(_domain(record, domain_field, domain, place), source, start, start + len(line))
            start += len(line)
    if not holds_text:
        raise CoterieError(f"{path}: holds 0 JSON objects, at least 1 is needed; remove it or fill it")


def _scan_dataset(path: Path, text_field: str, domain_field: str, split: str) -> Iterator[Document]:
    dataset = _open_dataset(path, split)
    # The texts of a hub's dataset are not the user's to mend, so what holds none is left out and not refused.
    wanted = [field for field in (text_field, "messages") if field in dataset.column_names]
    if not wanted:
        raise CoterieError(
            f"{path}: has no column {text_field!r} and no 'messages'; "
            f"give one of {', '.join(dataset.column_names)} to --text-field"
        )
    wanted += [domain_field] if domain_field in dataset.column_names else []
    # Other columns may hold images or the like, which would be decoded.
    source = _Rows(str(path), dataset.select_columns(wanted), text_field)
    holds_text = False
    for row, record in enumerate(source.dataset):
        if _holds_text(source.content(record, row)):
            holds_text = True
            yield Document(_domain(record, domain_field, path.name, source.place(row)), source, row, row + 1)
    if not holds_text:
        raise CoterieError(f"{path}: no row holds text in {wanted[0]!r}; give another column to --text-field")


def _is_saved_dataset(path: Path) -> bool:
    whole = (path / "dataset_dict.json").is_file()
    return whole or all((path / name).is_file() for name in ("dataset_info.json", "state.json"))


def _open_dataset(path: Path, split: str) -> Any:
    """One split, memory-mapped; of the hub's where there is no such folder."""
    missing = "" if path.exists() else "no such file or folder here; as a hub's dataset it "
    try:
        import datasets
        from huggingface_hub.utils.logging import set_verbosity_error
    except ImportError as error:
        raise CoterieError(f"{path}: {missing}needs the datasets library; pip install 'coterie[datasets]'") from error
    datasets.disable_progress_bars()
    set_verbosity_error()  # it would report each retry; the outcome is one line of ours
    name, _, config = str(path).partition(":")
    try:
        # Neither runs code that comes with the data: datasets gave that up in its version 4.
        if missing:
            dataset = datasets.load_dataset(name, config or None, split=split)
        else:
            dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # what loading raises is any library's choice
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CoterieError(
            f"{path}: {missing}cannot be loaded ({reason}); "
            "give an existing path, or a dataset like owner/name or owner/name:config"
        ) from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise CoterieError(f"{path}: has no split {split!r}; give one of {', '.join(dataset)} to --split")
        dataset = dataset[split]
    return dataset


def _stamp(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _decode(data: bytes, path: Path, start: int, final: bool) -> tuple[str, int]:
    """Text and the bytes it took: all of them, or up to an unfinished character where `data` is not the final part."""
    try:
        return codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        raise CoterieError(f"{path}: not UTF-8 text (byte {start + error.start}); give plain text to --data") from error


def _parse_line(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))  # some editors begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise CoterieError(f"{place}: not UTF-8 text (byte {error.start} of the line); save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise CoterieError(
            f"{place}: not JSON ({getattr(error, 'msg', error)}); give one JSON object a line"
        ) from error
    if not isinstance(record, dict):
        raise CoterieError(f"{place}: a {type(record).__name__}, not a JSON object; give one JSON object a line")
    return record


def _content(record: dict[str, Any], text_field: str, place: str) -> str | Chat:
    """The text of a JSON object or row, else its conversation."""
    field = "messages" if record.get(text_field) is None and "messages" in record else text_field
    if field not in record:
        raise CoterieError(
            f"{place}: has no field {text_field!r} and no 'messages'; "
            f"give one of its fields to --text-field ({', '.join(map(str, record)) or 'it has none'})"
        )
    content: str | Chat = record[field]
    if field == "messages":
        known = isinstance(content, list) and all(
            isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("role", "content"))
            for turn in content
        )
        if not known:
            raise CoterieError(f"{place}: 'messages' must be a list of objects with a role and a content, both text")
    elif not isinstance(content, str):
        raise CoterieError(
            f"{place}: field {field!r} holds a {type(content).__name__}, must be text; give another to --text-field"
        )
    try:
        for part in _parts(content):
            part.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, \ud800
        raise CoterieError(f"{place}: not text (half a character at position {error.start}); mend it") from error
    return content


def _parts(content: str | Chat) -> Iterable[str]:
    return [content] if isinstance(content, str) else (turn["content"] for turn in content)


def _holds_text(content: str | Chat) -> bool:
    return any(part.strip() for part in _parts(content))


def _domain(record: dict[str, Any], domain_field: str, default: str, place: str) -> str:
    value = record.get(domain_field)
    if value is None:
        return default
    if not isinstance(value, str | int) or value == "":
        raise CoterieError(f"{place}: domain {value!r} in field {domain_field!r}, must be a name or a whole number")
    return sys.intern(str(value))  # one name, not one a document


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
        except jinja2.TemplateError as error:
            raise CoterieError(f"{document.place}: the model's chat template refuses it ({error}); mend it") from error
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
