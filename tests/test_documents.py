"""Texts of every kind become batches: labels, budgets, turns, and what is refused."""

import json
import os
import sys
import tracemalloc
from types import SimpleNamespace

import jinja2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from profiler import CoterieError, zoo
from profiler.batches import Batches, make_batches
from profiler.documents import MAX_BYTES, Document, read_documents

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


class Letters:
    """A tokenizer with one token a character; its chat template writes `u:hi;a:ho;`."""

    chat_template = "yes"

    def __call__(self, text, **_options):
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, turns, **_options):
        if turns[0]["role"] != "user":
            raise jinja2.TemplateError("a user speaks first")
        return self("".join(f"{turn['role'][0]}:{turn['content']};" for turn in turns))


def texts_of(batches):
    """The unmasked characters of each sequence."""
    return [
        "".join(map(chr, ids[mask.bool()].tolist()))
        for batch in batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def contents(documents):
    return [(document.domain, document.read()) for document in documents]


# Kinds of data


def test_domains_are_file_names_and_subfolders(tmp_path):
    (tmp_path / "prose.txt").write_text("one")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("two")
    (tmp_path / "code" / "b.py").write_text("three")
    write_lines(tmp_path / "code" / "c.jsonl", {"text": "four"}, {"text": "five", "domain": "maths"})
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_bytes(b"\xff")
    expected = [("code", "two"), ("code", "three"), ("code", "four"), ("maths", "five"), ("prose", "one")]
    assert contents(read_documents([tmp_path])) == expected
    assert contents(read_documents([str(tmp_path / "prose.txt")])) == [("prose", "one")]


def test_marks_and_suffixes_that_some_systems_write(tmp_path):
    """A byte order mark is no text, and what stands behind it is read from its place."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.TXT").write_bytes(b"\xef\xbb\xbf" + b"x" * (MAX_BYTES + 5))
    write_lines(tmp_path / "c.JSONL", {"text": "three"})
    assert contents(read_documents([tmp_path])) == [
        ("a", "one"), ("b", "x" * MAX_BYTES), ("b", "x" * 5), ("c", "three")
    ]  # fmt: skip
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(CoterieError, match="d.txt: holds 0 characters"):
        read_documents([tmp_path])


@pytest.mark.parametrize("name", ["a.json", "a.JSON"])
def test_json_that_may_be_lines_or_text_is_asked_about(tmp_path, name):
    write_lines(tmp_path / name, {"text": "one"})
    with pytest.raises(CoterieError, match=rf"{name}: is neither text nor JSON lines .*; call it \.jsonl"):
        read_documents([tmp_path])


def test_json_lines_hold_texts_and_conversations(tmp_path):
    path = tmp_path / "mixed.jsonl"
    lines = [{"text": "größer"}, {"messages": CHAT, "topic": "talk"}, {"text": None, "messages": CHAT}]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode())
    documents = read_documents([path], domain_field="topic")
    assert contents(documents) == [("mixed", "größer"), ("talk", CHAT), ("mixed", CHAT)]
    path = write_lines(tmp_path / "other.jsonl", {"body": "x", "text": 3, "domain": 7})
    assert contents(read_documents([path], text_field="body")) == [("7", "x")]


def test_lines_end_as_in_text_mode(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert read_documents([tmp_path / "a.txt"])[0].read() == (tmp_path / "a.txt").read_text()


@pytest.mark.parametrize("unit", ["a line of text\n", "words without breaks ", "größer", "x"])
def test_long_files_are_cut_and_lose_nothing(tmp_path, unit):
    text = unit * (5 * MAX_BYTES // 2 // len(unit.encode()))
    (tmp_path / "long.txt").write_text(text)
    documents = read_documents([tmp_path / "long.txt"])
    parts = [document.read() for document in documents]
    assert len(parts) == 3
    assert "".join(parts) == text
    assert all(part.endswith(unit[-1]) or unit == "größer" for part in parts)
    (tmp_path / "long.txt").write_text("x" * MAX_BYTES)
    assert len(read_documents([tmp_path / "long.txt"])) == 1


def test_datasets_saved_on_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", " ", None, "two"], "domain": ["a", "a", "a", None]})
    rows.save_to_disk(tmp_path / "plain")
    assert contents(read_documents([tmp_path / "plain"])) == [("a", "one"), ("plain", "two")]
    datasets.DatasetDict({"train": rows.select([0]), "test": rows.select([3])}).save_to_disk(tmp_path / "both")
    assert contents(read_documents([tmp_path / "both"], split="test")) == [("both", "two")]
    with pytest.raises(CoterieError, match="no split 'dev'; give one of train, test"):
        read_documents([tmp_path / "both"], split="dev")
    with pytest.raises(CoterieError, match="no column 'body' and no 'messages'; give one of text, domain"):
        read_documents([tmp_path / "plain"], text_field="body")
    rows.select([1, 2]).save_to_disk(tmp_path / "empty")
    with pytest.raises(CoterieError, match="no row holds text in 'text'"):
        read_documents([tmp_path / "empty"])
    datasets.Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:1]}]).save_to_disk(tmp_path / "chat")
    assert contents(read_documents([tmp_path / "chat"])) == [("chat", CHAT), ("chat", CHAT[:1])]
    datasets.Dataset.from_dict({"text": [1]}).save_to_disk(tmp_path / "numbers")
    with pytest.raises(CoterieError, match="numbers, row 0: field 'text' holds a int"):
        read_documents([tmp_path / "numbers"])
    (tmp_path / "plain" / "state.json").write_text("{")
    with pytest.raises(CoterieError, match="plain: cannot be loaded"):
        read_documents([tmp_path / "plain"])


def test_datasets_of_the_hub(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": ["one"], "picture": [b"\0"]})

    with pytest.raises(CoterieError, match="nobody/nothing: no such file or folder here; as a hub's dataset it cannot"):
        read_documents(["nobody/nothing"])  # there is no network in tests: HF_HUB_OFFLINE
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_documents(["some-one/data.set:en-v1.0", "some-one/data.set"], split="test")
    assert contents(found) == [("data.set:en-v1.0", "one"), ("data.set", "one")]
    assert asked == [("some-one/data.set", "en-v1.0", "test"), ("some-one/data.set", None, "test")]
    assert found[0].place == "some-one/data.set:en-v1.0, row 0"


def test_the_datasets_library_is_optional(monkeypatch, tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    for path in (tmp_path, "owner/name"):
        with pytest.raises(CoterieError, match=r"pip install 'coterie\[datasets\]'"):
            read_documents([path])


# What is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 characters"),
        (b" \n", "0 characters"),
        (b"\xff\xfe\x00", r"not UTF-8 text \(byte 0\)"),
        (b"x" * (MAX_BYTES - 3) + b"\n\xf0\x9f\x98", rf"not UTF-8 text \(byte {MAX_BYTES - 2}\)"),
        (b"x\n" * MAX_BYTES + b"\xff", rf"not UTF-8 text \(byte {2 * MAX_BYTES}\)"),
    ],
)
def test_files_without_text_are_refused(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(CoterieError, match=message):
        read_documents([tmp_path / "bad.txt"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: not JSON"),
        (b"[" * 100_000, "line 2: not JSON"),
        (b"[]", "line 2: a list, not a JSON object"),
        (b'{"text": "\xff"}', r"line 2: not UTF-8 text \(byte 10 of the line\)"),
        (b'{"body": "x", "id": 1}', r"line 2: has no field 'text' and no 'messages'.*\(body, id\)"),
        (b"{}", "line 2: has no field"),
        (b'{"text": null}', "line 2: field 'text' holds a NoneType"),
        (b'{"text": 5}', "line 2: field 'text' holds a int"),
        (b'{"text": " "}', "line 2: holds 0 characters"),
        (b'{"text": "\\ud800"}', "line 2: not text"),
        (b'{"messages": []}', "line 2: holds 0 characters"),
        (b'{"messages": "hi"}', "line 2: 'messages' must be"),
        (b'{"messages": [{"role": "user"}]}', "line 2: 'messages' must be"),
        (b'{"text": "x", "domain": []}', "line 2: domain"),
        (b'{"text": "x", "domain": ""}', "line 2: domain"),
        (b'{"text": "x", "domain": "\\ud800"}', r"bad.jsonl, byte 17: domain '\\ud800' is no UTF-8 text"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(CoterieError, match=message) as caught:
        read_documents([tmp_path])
    assert "\n" not in str(caught.value)


def test_names_of_files_that_are_no_text_are_refused_as_domains(tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9.txt")
    odd.write_text("text")
    with pytest.raises(CoterieError, match=r"byte 0: domain 'caf\\udce9' is no UTF-8 text; rename it"):
        read_documents([tmp_path])
    (tmp_path / "cafe").mkdir()
    odd.rename(tmp_path / "cafe" / odd.name)  # then it names no domain
    assert contents(read_documents([tmp_path])) == [("cafe", "text")]


def test_missing_paths_and_empty_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    for path in (tmp_path / "nowhere", "no-file.txt", f"{tmp_path.name}/misspelt"):
        with pytest.raises(CoterieError, match="no such file or folder; give"):
            read_documents([path])
    with pytest.raises(CoterieError, match="holds no file"):
        read_documents([tmp_path])
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(CoterieError, match="0 JSON objects"):
        read_documents([tmp_path])


def test_too_many_domains_are_refused(tmp_path):
    records = [{"text": "x", "domain": number} for number in range(256)]
    with pytest.raises(CoterieError, match="256 domains, at most 255"):
        read_documents([write_lines(tmp_path / "a.jsonl", *records)])
    assert len(read_documents([write_lines(tmp_path / "a.jsonl", *records[:255])])) == 255


def test_files_that_change_after_the_check_are_refused(tmp_path):
    for path in (tmp_path / "a.txt", write_lines(tmp_path / "a.jsonl", {"text": "x"})):
        path.write_text(path.read_text() if path.exists() else "x")
        (document,) = read_documents([path])
        os.utime(path, ns=(0, 0))
        with pytest.raises(CoterieError, match="has changed since it was checked"):
            document.read()
        path.unlink()
        with pytest.raises(CoterieError, match="can no longer be read"):
            document.read()


@pytest.mark.parametrize("sizes", [(0, 1, None), (1, 0, None), (1, 1, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(CoterieError, match="must be at least 1"):
        make_batches([Document.of("a", "x")], Letters(), *sizes)


# Order


def test_a_seed_shuffles_within_domains(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", *({"text": f"{n}.", "domain": "ab"[n % 2]} for n in range(40)))
    in_order, once, again, other = (contents(read_documents([path], seed=seed)) for seed in (None, 0, 0, 1))
    assert [text for _, text in in_order] == [f"{n}." for n in range(40)]
    assert once == again != other
    assert sorted(once) == sorted(in_order)
    assert list(dict(once)) == list(dict(in_order)) == ["a", "b"]  # domains keep their numbers


# Batches


def test_batches_hold_every_token_once():
    documents = [Document.of("a", "x" * 25), Document.of("b", "y" * 7), Document.of("a", "z" * 3)]
    batches = list(make_batches(documents, Letters(), sequence_length=10, batch_size=2))
    assert [batch.domain for batch in batches] == ["a", "b", "a"]  # domains take turns
    assert texts_of(batches) == ["x" * 10, "x" * 10, "y" * 7, "x" * 5, "z" * 3]


def all_at_once(documents, tokenizer, sequence_length, batch_size, max_tokens):
    """Slow and obvious: tokenize everything, list every domain's batches, deal them out, cut at the budget."""
    queues = {}
    for document in documents:
        ids = tokenizer(document.read())["input_ids"]
        cut = [ids[start : start + sequence_length] for start in range(0, len(ids), sequence_length)]
        queues.setdefault(document.domain, []).extend(cut)
    turns = max(len(sequences) for sequences in queues.values())
    dealt = []
    for turn in range(turns):
        for domain, sequences in queues.items():
            dealt += [(domain, sequence) for sequence in sequences[turn * batch_size : (turn + 1) * batch_size]]
    left, kept = max_tokens or 10**9, []
    for domain, sequence in dealt:
        if left > 0:
            kept.append((domain, sequence[:left]))
        left -= len(sequence)
    return kept


@given(
    texts=st.lists(st.tuples(st.sampled_from("abc"), st.text("xyz", min_size=1, max_size=40)), min_size=1, max_size=8),
    sequence_length=st.integers(1, 12),
    batch_size=st.integers(1, 4),
    budget=st.none() | st.integers(1, 120),
    pad_left=st.booleans(),
    skip=st.integers(0, 4),
)
def test_lazy_batches_equal_those_made_all_at_once(texts, sequence_length, batch_size, budget, pad_left, skip):
    documents = [Document.of(*pair) for pair in texts]

    def make(skip):
        return make_batches(documents, Letters(), sequence_length, batch_size, budget, pad_left=pad_left, skip=skip)

    batches = Batches(make)
    made = list(batches)
    expected = all_at_once(documents, Letters(), sequence_length, batch_size, budget)
    sequences = [(batch.domain, text) for batch in made for text in texts_of([batch])]
    assert sequences == [(domain, "".join(map(chr, ids))) for domain, ids in expected]
    total = sum(len(text) for _, text in texts)
    assert batches.num_batches == len(made)
    assert batches.num_tokens == sum(batch.num_tokens for batch in made) == min(budget or total, total)
    for batch in made:
        steps = batch.attention_mask.diff(dim=1)
        assert (steps >= 0).all() if pad_left else (steps <= 0).all()
        assert batch.attention_mask.any(dim=0).all()  # no column is all padding
    later = list(batches.start_at(skip))
    assert len(later) == max(len(made) - skip, 0)
    assert all(torch.equal(one.input_ids, two.input_ids) for one, two in zip(made[skip:], later, strict=True))


def test_the_digest_tells_data_apart():
    def digest(*pairs, **options):
        sizes = {"sequence_length": 6, "batch_size": 2, **options}
        return Batches(
            lambda skip: make_batches([Document.of(*pair) for pair in pairs], Letters(), skip=skip, **sizes)
        ).digest

    pair = ("a", "x" * 9)
    assert digest(pair) == digest(pair) == digest(pair, max_tokens=9)
    different = [digest(pair), digest(("b", "x" * 9)), digest(("a", "x" * 8 + "y")), digest(("a", "x" * 10))]
    different += [digest(pair, **{name: value}) for name, value in (("sequence_length", 5), ("batch_size", 1))]
    different += [digest(pair, **{name: value}) for name, value in (("max_tokens", 8), ("pad_left", True))]
    assert len(set(different)) == len(different)


def test_nothing_is_read_before_its_turn_or_after_the_budget():
    read = []

    class Noting:
        def read(self, start, stop):
            read.append(start)
            return "x" * 10

    documents = [Document("ab"[number % 2], Noting(), number) for number in range(8)]
    batches = make_batches(documents, Letters(), sequence_length=10, batch_size=1, max_tokens=30)
    assert read == []
    next(batches)
    assert read == [0]
    list(batches)
    assert read == [0, 1, 2]


def test_memory_does_not_grow_with_the_text(tmp_path):
    peaks = []
    for megabytes in (4, 16):
        (tmp_path / "long.txt").write_text("a line of text\n" * (megabytes * 2**20 // 15))
        tracemalloc.start()
        documents = read_documents([tmp_path / "long.txt"])
        for document in documents:
            document.read()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 8 * 2**20


# Conversations


def test_conversations_go_through_the_chat_template():
    documents = [Document.of("a", CHAT), Document.of("b", "text")]
    assert texts_of(make_batches(documents, Letters(), 100, 1)) == ["u:hi;a:ho;", "text"]
    assert texts_of(make_batches(documents, Letters(), 100, 1, as_chat=True)) == ["u:hi;a:ho;", "u:text;"]


def test_chat_templates_that_are_missing_or_refuse(tmp_path):
    plain = SimpleNamespace(chat_template=None)
    with pytest.raises(CoterieError, match="no chat template"):
        make_batches([Document.of("a", "x")], plain, 10, 1, as_chat=True)
    with pytest.raises(CoterieError, match="no chat template"):
        list(make_batches([Document.of("a", CHAT)], plain, 10, 1))
    path = write_lines(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": CHAT[1:]})
    with pytest.raises(CoterieError, match=r"a.jsonl, byte \d\d+: the model's chat template refuses it \(a user"):
        list(make_batches(read_documents([path]), Letters(), 10, 1))


@pytest.mark.parametrize("error", [TypeError("can only join\nan iterable"), ValueError(""), KeyError("role")])
def test_chat_templates_that_fail_as_programs_do(error):
    def fail(*_, **__):
        raise error

    tokenizer = SimpleNamespace(chat_template="{{ ... }}", apply_chat_template=fail)
    with pytest.raises(CoterieError, match="a document: the model's chat template refuses it") as caught:
        list(make_batches([Document.of("a", CHAT)], tokenizer, 10, 1))
    assert "\n" not in str(caught.value)


def test_embedded_texts_have_the_same_domains_and_share_nothing():
    calibration, held_out = read_documents([zoo.CALIBRATION]), read_documents([zoo.HELD_OUT])
    assert [document.domain for document in calibration] == [document.domain for document in held_out]
    assert len(calibration) >= 6
    for first, second in zip(calibration, held_out, strict=True):
        lines = {line for line in first.read().splitlines() if len(line) > 60}
        repeated = [line for line in second.read().splitlines() if line in lines]
        assert len(repeated) < 0.1 * len(second.read().splitlines())
