"""The embedded model loads as any other, learned something, and routes with structure."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM

from placement.compare import plan_and_compare
from placement.topology import Topology
from profiler import Profile, zoo
from profiler.chance import shuffled
from profiler.documents import read_documents
from profiler.loading import load_model
from profiler.profiling import profile_model
from profiler.zoo import train


@pytest.fixture(scope="module")
def loaded():
    return load_model(None, "cpu")


def test_it_loads_with_plain_from_pretrained_and_is_small():
    model = AutoModelForCausalLM.from_pretrained(zoo.MODEL)
    AutoTokenizer.from_pretrained(zoo.MODEL)
    assert model.dtype == torch.bfloat16
    assert 5e6 <= model.num_parameters() <= 8e6
    assert sum(path.stat().st_size for path in zoo.MODEL.iterdir()) <= 16e6


def test_its_card_matches_what_it_does(loaded):
    """Held-out bits per byte of one domain, in windows as training measured them, against the model card."""
    card = (zoo.MODEL / "README.md").read_text()
    rows = {line.split("|")[1].strip(): line.split("|")[2:4] for line in card.splitlines() if line.count("|") == 4}
    documents = {document.domain: document.read() for document in read_documents([zoo.HELD_OUT])}
    assert set(documents) <= set(rows)
    for domain in documents:
        model, unigram = (float(value) for value in rows[domain])
        assert model < unigram
    text = documents["scripture"]
    tokens = torch.tensor(loaded.tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = tokens[: (len(tokens) - 1) // 255 * 255 + 1].unfold(0, 256, 255)
    with torch.no_grad():
        logits = loaded.model(input_ids=windows).logits[:, :-1]
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")
    scored = loaded.tokenizer.decode(tokens[1 : len(windows) * 255 + 1])
    measured = float(nats) / 0.6931471805599453 / len(scored.encode())
    assert measured == pytest.approx(float(rows["scripture"][0]), abs=0.02)


def test_its_routing_has_structure_that_shuffling_destroys(loaded, tmp_path):
    parts = []
    for texts in (zoo.CALIBRATION, zoo.HELD_OUT):
        profile_model(loaded, read_documents([texts]), tmp_path / texts.name, max_tokens=8_000)
        parts.append(Profile.load_from(tmp_path / texts.name))
    dealt = [Profile.from_tokens(part.model, part.domains, shuffled(part.tokens, 0), {}) for part in parts]
    shares = []
    for planned, unseen in (parts, dealt):
        placement = plan_and_compare(planned, Topology.for_experts(64, 8), held_out=unseen)
        shares.append(placement.metrics["search"]["held_out"]["intra_share"]["mean"])
    assert shares[0] > 1.5 * shares[1]


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    def fresh():
        torch.manual_seed(0)
        model = OlmoeForCausalLM(train.CONFIG)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(model, optimizer, number):
        tokens = [torch.arange(600).numpy() % 97 + domain for domain in range(2)]
        input_ids = train.batch_of_step(tokens, number)
        output = model(input_ids=input_ids, labels=input_ids, output_router_logits=True)
        (output.loss + train.balance_loss(output.router_logits)).backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = fresh()
    step(model, optimizer, 0)
    train.save_checkpoint(tmp_path / "checkpoint.safetensors", model, optimizer, 1)
    step(model, optimizer, 1)
    again, its_optimizer = fresh()
    assert train.load_checkpoint(tmp_path / "checkpoint.safetensors", again, its_optimizer) == 1
    step(again, its_optimizer, 1)
    for expected, parameter in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(expected, parameter)
