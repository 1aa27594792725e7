"""Fine-tuning under a constraint: it learns, repeats itself, goes on where it was stopped, and writes what loads again."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from test_constrain import SEEING, seeing_model, tight
from test_constraints import random_map
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM

from placement.constraints.config import load
from placement.constraints.constrain import balance_settings, constrain
from placement.constraints.examples import (
    NO_LABEL,
    Example,
    Examples,
    collate,
    instruction_examples,
    read_conversations,
    text_examples,
)
from placement.constraints.finetune import (
    Training,
    _arguments,
    _readable,
    _require_trainable,
    _trainable,
    checkpoint_folder,
    finetune,
    train,
)
from placement.constraints.quality import Perplexity, perplexity
from placement.cost import evaluate
from profiler import CoterieError, Recorder, zoo
from profiler.documents import Document
from profiler.families import find_moe_layers, read_spec
from profiler.loading import LoadedModel, load_model


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(None, "cpu").tokenizer


def examples(num=12, length=10):
    rows = torch.randint(3, 64, (num, length), generator=torch.Generator().manual_seed(5))
    return Examples([Example(row, row.clone()) for row in rows])


SHORT = Training(steps=6, batch_size=4, learning_rate=3e-3, warmup_steps=1, save_steps=2, seed=3)


class StopError(BaseException):
    pass


@pytest.mark.parametrize("which", range(4))
def test_training_learns_under_every_constraint(which, tmp_path):
    model = tiny_model("olmoe")
    constraint = tight(model)[which]
    long = Training(steps=30, batch_size=6, learning_rate=1e-2, warmup_steps=2, save_steps=0)
    losses = train(model, examples(), constraint, long, tmp_path / "work")
    assert len(losses) == 30
    assert losses[-1] < losses[0] - 0.3
    if which >= 2:
        with torch.no_grad(), constrain(model, constraint), Recorder(model) as recorder:
            model(input_ids=examples()[0].input_ids[None])
        assert (evaluate(random_map(read_spec(model, "tiny"), ranks=4), recorder.trace()).fan_out == 1).all()


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "mixtral", "deepseek_v2"])
def test_families_train(family, tmp_path):
    groups = {"n_group": 1, "topk_group": 1, "topk_method": "greedy"} if family == "deepseek_v2" else {}
    model = tiny_model(family, **groups)
    assert len(train(model, examples(), tight(model)[2], SHORT, tmp_path)) == 6


@pytest.mark.parametrize("family", ["olmoe", "qwen3_vl_moe"])  # the second does not divide by the batch's tokens
def test_micro_batches_add_up_to_the_batch(family, tmp_path):
    """The load-balancing loss of like sequences is that of one, so that all of a step's loss has to be the same."""
    rows = Examples([examples()[0]] * 6)  # the second step of an epoch has two sequences only
    losses = {}
    for micro, coefficient in ((None, 0.0), (None, 1.0), (2, 1.0), (1, 1.0)):
        model = seeing_model(family) if family in SEEING else tiny_model(family)
        settings = balance_settings(model)
        settings.router_aux_loss_coef = coefficient
        steps = Training(**{**SHORT.__dict__, "save_steps": 0, "micro_batch_size": micro})
        losses[micro, coefficient] = train(model, rows, tight(model)[2], steps, tmp_path)
        assert settings.router_aux_loss_coef == coefficient
        assert not model.config.get_text_config().output_router_logits
    assert losses[None, 1.0][0] > losses[None, 0.0][0] + 1
    for micro in (2, 1):
        assert losses[micro, 1.0] == pytest.approx(losses[None, 1.0], abs=2e-3)


def test_weights_of_32_bits_learn_while_it_computes_in_16(tokenizer, tmp_path):
    """A model of 16 bits would come out as it went in, all but its smallest weights."""
    coarse = LoadedModel("tiny", tiny_model("olmoe").bfloat16(), tokenizer)
    with pytest.raises(CoterieError, match="weights in bfloat16: steps of fine-tuning are smaller .* in float32"):
        finetune(coarse, examples(), None, SHORT, tmp_path / "out")
    assert not any(tmp_path.iterdir())
    with pytest.raises(CoterieError, match="dtype 'auto': must be one of float32, bfloat16"):
        Training(dtype="auto")
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = tiny_model("olmoe")
        before = {name: weight.clone() for name, weight in model.named_parameters()}
        steps = Training(**{**SHORT.__dict__, "learning_rate": 2e-5, "save_steps": 0, "dtype": dtype})
        losses[dtype] = train(model, examples(), tight(model)[2], steps, tmp_path)
        for name, weight in model.named_parameters():
            assert weight.dtype == torch.float32
            assert (weight != before[name]).float().mean() > 0.5, name
        with torch.no_grad():
            assert model(input_ids=examples()[0].input_ids[None]).logits.dtype == torch.float32
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-2)


def test_one_device_learns(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    arguments = _arguments(SHORT, tmp_path, on_cpu=False)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, SHORT.batch_size)
    weight = SimpleNamespace(device=torch.device("cuda", 1), is_floating_point=lambda: True, element_size=lambda: 4)
    with pytest.raises(CoterieError, match="device cuda:1: Trainer takes a machine's first; give cuda:0, or hide"):
        _require_trainable(SimpleNamespace(parameters=lambda: [weight]))


def test_experts_and_routers_only(tmp_path):
    model = tiny_model("olmoe")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, examples(), tight(model)[2], Training(**{**SHORT.__dict__, "part": "experts"}), tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".experts." not in name and ".gate." not in name), name
        assert parameter.requires_grad
    assert not model.config.output_router_logits


@pytest.mark.parametrize("family", CONFIGS)
def test_routers_learn_with_their_experts(family):
    model = tiny_model(family)
    with _trainable(model, "experts"):
        learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for layer in find_moe_layers(model):
        block = layer.name.rpartition(".")[0]
        parts = [name.split(".") for name in learning if name.startswith(block)]
        assert any({"gate", "router", "router_gate"} & {*of_name} for of_name in parts), layer.name


def weights_after(tokenizer, out, training=SHORT, **options):
    model = tiny_model("olmoe")
    loaded = LoadedModel("tiny", model, tokenizer)
    finetune(loaded, examples(), tight(model)[3], training, out, **options)
    return (out / "model.safetensors").read_bytes()


def test_same_seed_same_bytes_and_resuming_changes_nothing(tokenizer, tmp_path):
    whole = weights_after(tokenizer, tmp_path / "whole")
    assert weights_after(tokenizer, tmp_path / "again") == whole

    def stop_at_5(step, _steps, _loss):
        if step == 5:
            raise StopError

    out = tmp_path / "stopped"
    with pytest.raises(StopError):
        weights_after(tokenizer, out, on_step=stop_at_5)
    assert not out.exists()
    assert (checkpoint_folder(out) / "checkpoint-4").is_dir()
    (checkpoint_folder(out) / "checkpoint-6").mkdir()  # as a run that is killed while it writes one leaves it
    with pytest.raises(CoterieError, match="an unfinished run with 4 steps is there; go on with --resume, or remove"):
        weights_after(tokenizer, out)
    steps = []
    assert weights_after(tokenizer, out, resume=True, on_step=lambda step, *_: steps.append(step)) == whole
    assert steps == [5, 6]
    assert weights_after(tokenizer, out, resume=True, on_step=stop_at_5) == whole  # nothing is left to do
    assert not checkpoint_folder(out).exists()
    assert len(json.loads((out / "finetune.json").read_text())["losses"]) == 6


def test_another_run_over_an_older_model_goes_on_from_its_very_beginning(tokenizer, tmp_path):
    longer = weights_after(tokenizer, tmp_path / "longer", training=replace(SHORT, steps=8, save_steps=4))
    out = tmp_path / "out"
    weights_after(tokenizer, out)

    def stop(*_):
        raise StopError

    with pytest.raises(StopError):  # before its first checkpoint
        weights_after(tokenizer, out, training=replace(SHORT, steps=8, save_steps=4), on_step=stop)
    assert weights_after(tokenizer, out, training=replace(SHORT, steps=8, save_steps=4), resume=True) == longer
    assert not checkpoint_folder(out).exists()


def test_what_was_written_loads_with_its_constraint(tokenizer, tmp_path):
    model = tiny_model("olmoe")
    constraint = tight(model)[2]
    finetune(LoadedModel("tiny", model, tokenizer), examples(), constraint, SHORT, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = examples()[0].input_ids[None]
    with torch.no_grad(), constrain(model, constraint), constrain(loaded, load(tmp_path / "out")):
        assert torch.equal(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.mark.parametrize("harm", ["nan", "inf"])
def test_a_run_that_diverges_is_an_error_and_writes_nothing(harm, tokenizer, tmp_path):
    model = tiny_model("olmoe")

    def break_it(step, _steps, _loss):
        if step == 1:
            with torch.no_grad():
                model.lm_head.weight[5] = float(harm)

    loaded, out = LoadedModel("tiny", model, tokenizer), tmp_path / "out"
    with pytest.raises(CoterieError, match="^loss (nan|inf) at step 2: .*; give a smaller --learning-rate$"):
        finetune(loaded, examples(), None, SHORT, out, on_step=break_it)
    assert not list(tmp_path.iterdir())


def test_a_perplexity_beyond_all_numbers_is_infinite():
    found = Perplexity({"a": 1e5, "b": 10.0}, {"a": 10, "b": 10})
    assert found.overall == found.of_domain["a"] == float("inf")
    assert found.of_domain["b"] == pytest.approx(math.e)


def test_runs_that_do_not_fit_are_refused(tokenizer, tmp_path):
    model = tiny_model("olmoe")
    loaded = LoadedModel("tiny", model, tokenizer)
    out = tmp_path / "out"
    with pytest.raises(CoterieError, match="leave --resume out"):
        finetune(loaded, examples(), None, SHORT, out, resume=True)

    def stop(step, *_):
        if step in last:
            raise StopError

    for last in ([1], [3]):
        with pytest.raises(StopError):
            finetune(loaded, examples(), None, SHORT, out, on_step=stop)
        assert checkpoint_folder(out).exists() == (last == [3])  # else there is no checkpoint yet, and nothing is lost
    with pytest.raises(CoterieError, match="was begun with other seed .* or remove that folder to begin anew"):
        finetune(loaded, examples(), None, Training(**{**SHORT.__dict__, "seed": 4}), out, resume=True)
    with pytest.raises(CoterieError, match="examples_digest"):
        finetune(loaded, examples(length=9), None, SHORT, out, resume=True)
    finetune(loaded, examples(), None, SHORT, out, resume=True)
    (tmp_path / "mine").mkdir()
    with pytest.raises(CoterieError, match="is no fine-tuned model"):
        finetune(loaded, examples(), None, SHORT, tmp_path / "mine")
    other = tight(tiny_model("mixtral"))[0]
    with pytest.raises(CoterieError, match="the constraint is for"):
        finetune(loaded, examples(), other, SHORT, tmp_path / "fresh")
    assert not checkpoint_folder(tmp_path / "fresh").exists()
    for wrong in ({"steps": 0}, {"learning_rate": 0.0}, {"batch_size": 4, "micro_batch_size": 3}):
        with pytest.raises(CoterieError, match="must"):
            Training(**{**SHORT.__dict__, **wrong})


def test_conversations_teach_answers_only(tokenizer, tmp_path):
    loaded = LoadedModel("zoo", tiny_model("olmoe", vocab_size=4096), tokenizer)
    path = tmp_path / "chats.jsonl"
    records = [
        {"instruction": "Add these.", "input": "1 and 2", "output": "three"},
        {"conversations": ["How are you?", "well, thanks", "And now?", "still well"]},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "good day"}]},
        {"messages": [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": "farewell"}]},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    learned = []
    for row in instruction_examples(loaded, read_conversations([path]), 64):
        learned.append(tokenizer.decode(row.labels[row.labels != NO_LABEL], skip_special_tokens=True).split("\n"))
    assert learned == [["three", ""], ["well, thanks", "still well", ""], ["good day", ""], ["farewell", ""]]
    tokenizer_with_template = load_model(None, "cpu").tokenizer
    tokenizer_with_template.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with_template = LoadedModel("zoo", loaded.model, tokenizer_with_template)
    rows = instruction_examples(with_template, read_conversations([path]), 64)
    texts = [tokenizer.decode(row.labels[row.labels != NO_LABEL]) for row in rows]
    assert texts == ["three</>", "well, thanks</>still well</>", "good day</>", "farewell</>"]
    assert tokenizer.decode(rows[1].input_ids) == (
        "<user>How are you?</><assistant>well, thanks</><user>And now?</><assistant>still well</>"
    )
    turns = [{"role": role, "content": "x"} for role in ("assistant", "user", "assistant", "assistant")]
    tokenizer_with_template.chat_template = (
        "{% for m in messages %}{% if m.role != ('user', 'assistant')[loop.index0 % 2] %}"
        "{{ raise_exception('roles must\\nalternate') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    for chat, message in ((turns[:2], "empty conversation.*"), (turns[1:], "roles must")):
        path.write_text(f"\n{json.dumps({'messages': chat})}")
        with pytest.raises(
            CoterieError, match=rf"line 2: the model's chat template refuses it \(.*{message}\); mend it"
        ):
            instruction_examples(with_template, read_conversations([path]), 64)
    with pytest.raises(CoterieError, match="sequence length -5: must be at least 2"):
        instruction_examples(loaded, [path], -5)
    path.write_text('{"text": "no conversation"}')
    with pytest.raises(CoterieError, match="line 1: no conversation"):
        instruction_examples(loaded, read_conversations([path]), 64)
    path.write_text("{")
    with pytest.raises(CoterieError, match="not JSON lines"):
        instruction_examples(loaded, read_conversations([path]), 64)
    with pytest.raises(CoterieError, match="no such file"):
        read_conversations([Path("missing.jsonl")])


def test_text_is_learned_once_and_padding_never(tokenizer):
    loaded = LoadedModel("zoo", tiny_model("olmoe", vocab_size=4096), tokenizer)
    text = (zoo.HELD_OUT / "novels.txt").read_text()[:2000]
    rows = text_examples(loaded, [Document.of("novels", text)], 50)
    whole = torch.cat([row.input_ids for row in rows])
    assert whole.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"][: len(whole)]
    batch = collate([rows[0], rows[len(rows) - 1]])
    assert (batch["labels"][batch["attention_mask"] == 0] == NO_LABEL).all()


def test_perplexity_is_that_of_each_token(tokenizer):
    model = tiny_model("olmoe", vocab_size=4096)
    loaded = LoadedModel("zoo", model, tokenizer)
    documents = [
        Document.of("a", "some words of one domain, and then a few more"),
        Document.of("a", "short"),
        Document.of("b", "another domain"),
    ]
    found = perplexity(model, loaded.batches(documents, 8, 4), "cpu")
    nats, tokens = {"a": 0.0, "b": 0.0}, {"a": 0, "b": 0}
    for document in documents:
        ids = torch.tensor(tokenizer(document.read(), add_special_tokens=False)["input_ids"])
        for sequence in ids.split(8):
            with torch.no_grad():
                log_p = model(input_ids=sequence[None]).logits[0].log_softmax(dim=-1)
            for place, token in enumerate(sequence[1:]):
                nats[document.domain] -= float(log_p[place, token])
                tokens[document.domain] += 1
    assert found.tokens == tokens
    for domain in nats:
        assert found.nats[domain] == pytest.approx(nats[domain], rel=1e-4)
    assert found.overall == pytest.approx(
        float(torch.tensor(sum(nats.values()) / sum(tokens.values())).exp()), rel=1e-4
    )
    with pytest.raises(CoterieError, match="nothing can be predicted"):
        perplexity(model, [], "cpu")


def test_killed_behind_the_last_step_no_other_is_taken(tokenizer, tmp_path, monkeypatch):
    whole = weights_after(tokenizer, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("placement.constraints.finetune.put_in_place", lambda *_: (_ for _ in ()).throw(StopError))
        with pytest.raises(StopError):
            weights_after(tokenizer, tmp_path / "out")
    assert weights_after(tokenizer, tmp_path / "out", resume=True) == whole
    assert len(json.loads((tmp_path / "out" / "finetune.json").read_text())["losses"]) == 6


def test_a_full_disk_is_one_line_and_leaves_whole_checkpoints(tokenizer, tmp_path, monkeypatch):
    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 33490560 vs 33490448")

    monkeypatch.setattr("transformers.Trainer._save_optimizer_and_scheduler", full)
    with pytest.raises(CoterieError, match=r"checkpoint-2: cannot be written .*; free some space"):
        weights_after(tokenizer, tmp_path / "out")
    assert not checkpoint_folder(tmp_path / "out").exists()


def test_a_checkpoint_is_only_blamed_for_its_own_faults():
    def fail(error, is_at_fault=True):
        with _readable("checkpoint-2", lambda: is_at_fault):
            raise error

    with pytest.raises(CoterieError, match=r"checkpoint-2: cannot be read \(no such key\); remove it"):
        fail(ValueError("no such key"))
    for other in (RuntimeError("CUDA out of memory"), MemoryError(), CoterieError("loss nan at step 3")):
        with pytest.raises(type(other)) as caught:
            fail(other)
        assert caught.value is other  # removing the checkpoint would not help
    with pytest.raises(ValueError, match="later"):
        fail(ValueError("later"), is_at_fault=False)
