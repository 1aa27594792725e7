"""Text with domain labels, where it is and how it is read. Knows no tokenizer and no model.

Text stays where it is until somebody needs it: a `Document` is a place.
"""

from __future__ import annotations

import codecs
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from profiler.errors import CoterieError
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
        CoterieError: a path is missing, a file is empty or not what its name says, a document has no text, a domain's
            name is no text, or there are more than 255 domains.
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
    for domain in domains:
        try:
            domain.encode()
        except UnicodeEncodeError as error:  # a file's name can hold other bytes, JSON half a character
            place = next(document.place for document in documents if document.domain == domain)
            raise CoterieError(f"{place}: domain {domain!r} is no UTF-8 text; rename it") from error
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
            if file.suffix.lower() == ".json":
                raise CoterieError(
                    f"{file}: is neither text nor JSON lines by its name; call it .jsonl if it has one JSON object a "
                    "line, else .txt"
                )
            if file.suffix.lower() == ".jsonl":
                yield from _scan_lines(file, domain, text_field, domain_field)
            else:
                yield from _scan_text(file, domain)
        except OSError as error:
            raise CoterieError(f"{file}: cannot be read ({error.strerror})") from error


def _scan_text(path: Path, domain: str) -> Iterator[Document]:
    """Documents of at most `MAX_BYTES`, cut at a line break, else at a space, else between characters."""
    holds_text = False
    with path.open("rb") as file:
        source = _File(path, _stamp(file), None)
        start = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        file.seek(start)
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
