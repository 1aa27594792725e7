"""What the documentation says is so: commands parse, names and files exist, the tutorial runs, the reference is up to date."""

import ast
import importlib
import importlib.util
import json
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import safetensors
import torch
from conftest import make_spec, make_trace, random_ids
from test_cli import run
from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM
from typer.main import get_command

from placement import cli
from placement.constraints.config import save
from placement.constraints.pruning import limit_ranks
from placement.constraints.similarity import SimilarityTable
from placement.cost import SUMMARISED
from placement.placement_map import PlacementMap
from placement.runtime.results import BenchResult, BenchRow, BenchRun
from placement.topology import Links, Topology
from profiler import Profile, zoo
from profiler.families import read_spec
from profiler.spec import MoESpec

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")] if path.name != "CHANGELOG.md")
WRITTEN = [path for path in PAGES if "reference" not in path.parts]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page, languages):
    return [text for language, text in FENCED.findall(page.read_text()) if language in languages]


def commands(page):
    """Words of every `coterie ...` line in a page's blocks of code."""
    lines = "\n".join(blocks(page, ("", "sh", "bash"))).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("coterie ")]


def parsed(words):
    """Parse as the command line does, without running anything; the words must be right to the last one."""
    command = get_command(cli.app)
    context = command.make_context("coterie", list(words))
    while hasattr(command, "commands"):
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, list(words), parent=context)
    return context


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_up_to_date(reference):
    for name, text in reference.pages().items():
        assert (reference.FOLDER / name).read_text() == text, "run `make reference`"
    for name, text in reference.tables().items():
        assert (ROOT / name).read_text() == text, "run `make reference`"


def test_nothing_public_is_undocumented(reference):
    """Functions, classes, methods, constants and modules."""
    for package in ("profiler", "placement"):
        for path in reference.public_modules(package):
            tree = ast.parse(path.read_text())
            assert ast.get_docstring(tree), path
            for _, signature, text in reference.public_names(tree):
                assert text, f"{path}: {signature}"


def test_every_command_explains_itself(reference):
    for name, does in reference.every_command():
        text = reference.paragraphs(does)
        examples = [words[4:] for words in text if words.startswith("    coterie ")]
        assert text[0].endswith("."), name
        assert examples, f"{name}: no example"
        for example in examples:
            parsed(shlex.split(example)[1:])
        for row in reference.rows(does):
            assert not row.endswith("|  |"), f"{name}: {row}"


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_commands_in_blocks_parse(page):
    for words in commands(page):
        parsed(words)


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_commands_and_options_in_sentences_exist(page):
    for span in re.findall(r"`coterie ([a-z][^`]*)`", FENCED.sub("", page.read_text())):
        known, words = get_command(cli.app), span.split()
        while words and hasattr(known, "commands") and words[0] in known.commands:
            known = known.commands[words.pop(0)]
        below = getattr(known, "commands", {"": known})
        assert len(words) < len(span.split()), f"{page.name}: {span}: no such command"
        options = {each for command in below.values() for option in command.params for each in option.opts}
        for word in words:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in options, f"{page.name}: {span}"


@pytest.mark.parametrize("page", [page for page in WRITTEN if page.name != "log.md"], ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    text = FENCED.sub("", page.read_text())
    links = [link.partition("#")[0] for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", text)]
    assert all((page.parent / link).exists() for link in links), links
    folders = "benchmarks|docs|notebooks|placement|profiler|tests"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+?)/?`", text):
        assert (ROOT / name).exists(), f"{page.name}: {name}"
    for module in re.findall(r"python -m (benchmarks\.\w+)", page.read_text()):
        assert importlib.util.find_spec(module), f"{page.name}: {module}"


def test_snippets_are_python_that_imports_what_there_is():
    for page in WRITTEN:
        for text in blocks(page, ("python",)):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, name.name) for name in node.names), f"{page.name}: {ast.unparse(node)}"


def test_formats_name_every_field_and_metric(tmp_path):
    text = (ROOT / "docs" / "formats.md").read_text()
    stored = (MoESpec, Topology, Links, PlacementMap, SimilarityTable, BenchResult, BenchRun, BenchRow)
    names = [field.name for of in stored for field in fields(of)]
    trace = make_trace(random_ids(0, 2, 20, 8, 2))
    Profile.from_tokens(make_spec(2, 8, 2), ["a", "b"], trace, {}).save(tmp_path / "run.profile")
    names += json.loads((tmp_path / "run.profile" / "profile.json").read_text())
    for path in (tmp_path / "run.profile").glob("*.safetensors"):
        with safetensors.safe_open(path, "numpy") as tensors:
            names += tensors.keys()
    for name in (*SUMMARISED, "predicted_time", *names):
        assert f"`{name}`" in text, name


def test_the_comparison_says_what_was_measured(reference):
    for of in reference.peers().values():
        fan_out, busiest, imbalance = ({name: figures[place] for name, figures in of.items()} for place in range(3))
        assert min(busiest, key=busiest.get) == "search"
        assert fan_out["metis"] < fan_out["search"]
        assert imbalance["load"] < imbalance["search"]


def test_recorded_plans_reach_what_was_asked_of_them(reference):
    """busiest_ingress and imbalance_ratio, held out, mean of four seeds."""
    wanted = {
        ("gpt-oss-20b", 4): (0.60, 1.07),
        ("gpt-oss-20b", 8): (0.42, 1.12),
        ("deepseek-v2-lite", 4): (0.655, 1.08),
        ("deepseek-v2-lite", 8): (0.485, 1.12),
        ("deepseek-v2-lite", 16): (0.36, 1.18),
    }
    found = reference.peers()
    assert found.keys() == wanted.keys()
    for cell, (most_ingress, most_imbalance) in wanted.items():
        _, ingress, imbalance = found[cell]["search"]
        assert ingress <= most_ingress, cell
        assert imbalance <= most_imbalance, cell


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a tokenizer, as a folder of somebody's own."""
    folder = tmp_path_factory.mktemp("own") / "model"
    tokenizer = AutoTokenizer.from_pretrained(zoo.MODEL)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    routing = {"num_experts": 8, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    OlmoeForCausalLM(OlmoeConfig(vocab_size=len(tokenizer), **sizes, **routing)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def texts(folder):
    folder.mkdir()
    for name in ("novels", "python"):
        (folder / f"{name}.txt").write_text((zoo.CALIBRATION / f"{name}.txt").read_text()[:30_000])


def test_the_tutorial_runs(model, tmp_path, monkeypatch, capsys):
    """Every command but the bench, which starts processes and which tests/test_cli.py runs; then every snippet."""
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "texts")
    page = ROOT / "docs" / "tutorial.md"
    assert [words[0] for words in commands(page)].count("export") == 6
    for words in commands(page):
        here = [str(model) if word == "MODEL" else "4000" if word == "200000" else word for word in words]
        if here[0] == "bench":
            continue
        here = [word for word in here if word != "bench.json"]
        assert run(monkeypatch, *here) == 0, f"{here}: {capsys.readouterr().err}"
    assert json.loads((tmp_path / "sglang.json").read_text()).keys() == {"physical_to_logical_map"}
    for text in blocks(page, ("python",)):
        exec(compile(text, page.name, "exec"), {})
    assert "(2, 8)" in capsys.readouterr().out


def test_snippets_run(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "texts")
    (tmp_path / "chats.jsonl").write_text('{"text": "Hello"}\n')
    loaded = OlmoeForCausalLM.from_pretrained(model)
    input_ids = torch.randint(0, 64, (2, 8))
    given = {"model": loaded, "input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    (snippet,) = blocks(ROOT / "README.md", ("python",))
    exec(snippet, given)
    assert given["profile"].num_tokens == 16

    (snippet,) = blocks(ROOT / "docs" / "calibration.md", ("python",))
    exec(snippet.replace("PATH-OR-HUB-ID", str(model)).replace('device_map="auto"', 'device="cpu"'), {})

    spec = read_spec(loaded, "own")
    limited = limit_ranks(PlacementMap.linear(spec, Topology.for_experts(8, 4)), 1)
    tuned = tmp_path / "tuned"
    shutil.copytree(model, tuned)
    save(limited, tuned / "constraint.safetensors")
    (snippet,) = blocks(ROOT / "docs" / "constraints.md", ("python",))
    exec(snippet.replace("generate(...)", "generate(ids, max_new_tokens=2)"), {"ids": input_ids})
