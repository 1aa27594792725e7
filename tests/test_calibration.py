"""Texts become batches: labels, budgets, and what is refused."""

import pytest

from profiler import CoterieError, zoo
from profiler.calibration import Document, make_batches, read_documents


class Letters:
    """A tokenizer with one token a character."""

    def __call__(self, text, **_options):
        return {"input_ids": [ord(character) for character in text]}


def test_domains_are_file_names_and_subfolders(tmp_path):
    (tmp_path / "prose.txt").write_text("one")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("two")
    (tmp_path / "code" / "b.py").write_text("three")
    documents = read_documents([tmp_path])
    assert sorted((document.domain, document.text) for document in documents) == [
        ("code", "three"),
        ("code", "two"),
        ("prose", "one"),
    ]
    assert read_documents([tmp_path / "prose.txt"]) == [Document("prose", "one")]


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "0 characters"), (b" \n", "0 characters"), (b"\xff\xfe\x00", "not UTF-8 text")]
)
def test_files_without_text_are_refused(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(CoterieError, match=message):
        read_documents([tmp_path / "bad.txt"])


def test_missing_paths_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(CoterieError, match="no such file"):
        read_documents([tmp_path / "nowhere"])
    with pytest.raises(CoterieError, match="holds no file"):
        read_documents([tmp_path])


def test_batches_hold_every_token_once():
    documents = [Document("a", "x" * 25), Document("b", "y" * 7), Document("a", "z" * 3)]
    batches = make_batches(documents, Letters(), sequence_length=10, batch_size=2, max_tokens=None)
    assert [batch.domain for batch in batches] == ["a", "b", "a"]  # domains take turns
    assert sum(batch.num_tokens for batch in batches) == 35
    letters = "".join(chr(i) for batch in batches for i in batch.input_ids[batch.attention_mask.bool()].tolist())
    assert sorted(letters) == sorted("x" * 25 + "y" * 7 + "z" * 3)


@pytest.mark.parametrize("budget", [1, 9, 10, 11, 20, 25, 34, 100])
def test_token_budget_is_kept_exactly(budget):
    documents = [Document("a", "x" * 25), Document("b", "y" * 10)]
    batches = make_batches(documents, Letters(), sequence_length=10, batch_size=2, max_tokens=budget)
    assert sum(batch.num_tokens for batch in batches) == min(budget, 35)
    assert all(batch.attention_mask.any(dim=1).all() for batch in batches)


@pytest.mark.parametrize("sizes", [(0, 1, None), (1, 0, None), (1, 1, 0)])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(CoterieError, match="must be at least 1"):
        make_batches([Document("a", "x")], Letters(), *sizes)


def test_embedded_texts_have_the_same_domains_and_share_nothing():
    calibration, held_out = read_documents([zoo.CALIBRATION]), read_documents([zoo.HELD_OUT])
    assert [document.domain for document in calibration] == [document.domain for document in held_out]
    assert len(calibration) >= 6
    for first, second in zip(calibration, held_out, strict=True):
        lines = {line for line in first.text.splitlines() if len(line) > 60}
        repeated = [line for line in second.text.splitlines() if line in lines]
        assert len(repeated) < 0.1 * len(second.text.splitlines())
