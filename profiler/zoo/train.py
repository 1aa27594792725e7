"""Train the embedded model: `python -m profiler.zoo.train` (`make model`), about an hour and a half on two cores.

The run is cut into steps whose batches follow from the seed and the step number alone, so a run that was killed goes on
from its last checkpoint as if it had not been.  The result is a plain Hugging Face folder with a model card, and the
calibration and held-out text beside it.  Not imported by anything else; knows no profile and no plan.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from profiler.zoo import NUM_EXPERTS
from profiler.zoo.corpora import BLOCK_BYTES, CORPORA, Split, read_split

SEED = 0
VOCAB_SIZE = 4096
SEQUENCE_LENGTH = 256
SEQUENCES_PER_DOMAIN = 2
TRAIN_BYTES_PER_DOMAIN = 4 << 20
SHIPPED_BLOCKS = 8  # of calibration and of held-out text, for each domain
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.25  # the last quarter of the steps brings the learning rate linearly to zero
BALANCE_COEFFICIENT = 0.01
"""Weight of the load-balancing loss, as OLMoE was trained (arXiv 2409.02060, section 4.1.6)."""

END_OF_TEXT = "<|endoftext|>"
CONFIG = OlmoeConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=192,
    intermediate_size=40,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_experts=NUM_EXPERTS,
    num_experts_per_tok=8,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    initializer_range=0.04,
    pad_token_id=0,
    bos_token_id=0,
    eos_token_id=0,
)


@dataclass(frozen=True)
class DomainScore:
    """Held-out bits per byte of one domain: the model's, and a unigram model's fitted to the domain's own text."""

    model: float
    unigram: float


def train_tokenizer(splits: dict[str, Split]) -> PreTrainedTokenizerFast:
    """A byte-level BPE over an equal share of each domain's training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fewest = min(len(split.train) for split in splits.values())
    tokenizer.train_from_iterator((block for split in splits.values() for block in split.train[:fewest]), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, blocks: list[str]) -> np.ndarray:
    """All blocks as one row of token ids, int32."""
    encoded = tokenizer(blocks, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.asarray(ids, dtype=np.int32) for ids in encoded])


def batch_of_step(tokens: list[np.ndarray], step: int) -> torch.Tensor:
    """The sequences of one step, the same number of each domain, int64 (sequences, `SEQUENCE_LENGTH`)."""
    rng = np.random.default_rng((SEED, step))
    rows = []
    for domain_tokens in tokens:
        for start in rng.integers(0, len(domain_tokens) - SEQUENCE_LENGTH, SEQUENCES_PER_DOMAIN):
            rows.append(domain_tokens[start : start + SEQUENCE_LENGTH])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, a plateau, and a linear decay to zero."""
    decay_steps = math.ceil(num_steps * DECAY_SHARE)
    return PEAK_LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS, (num_steps - step) / decay_steps)


def balance_loss(router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Mean over layers of E * sum_e (share of picks of e) * (mean probability of e); 1 when balanced.

    The loss of Switch Transformers (arXiv 2101.03961, equation 4), taken layer by layer: pooled over layers, as the
    model class does it, an expert overloaded in one layer is excused by its idle namesakes in the others.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        picked = probabilities.topk(CONFIG.num_experts_per_tok, dim=-1).indices
        share = torch.bincount(picked.flatten(), minlength=CONFIG.num_experts) / picked.numel()
        losses.append(CONFIG.num_experts * (share * probabilities.mean(dim=0)).sum())
    return torch.stack(losses).mean()


def train(splits: dict[str, Split], work: Path, num_steps: int) -> tuple[OlmoeForCausalLM, PreTrainedTokenizerFast]:
    """Train for `num_steps` steps, going on from the checkpoint in `work` where there is one."""
    console = Console(stderr=True)
    tokenizer = train_tokenizer(splits)
    tokens = [encode(tokenizer, split.train) for split in splits.values()]
    console.print(f"{sum(map(len, tokens)):,} training tokens in {len(tokens)} domains")
    torch.use_deterministic_algorithms(True)  # sums over threads come in any order otherwise
    torch.manual_seed(SEED)
    model = OlmoeForCausalLM(CONFIG)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        fused=True,
    )
    checkpoint = work / "checkpoint.safetensors"
    first = load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else 0
    model.train()
    started = time.monotonic()
    with Progress(console=console) as progress:
        task = progress.add_task("train", total=num_steps, completed=first)
        for step in range(first, num_steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps)
            input_ids = batch_of_step(tokens, step)
            output = model(input_ids=input_ids, labels=input_ids, output_router_logits=True)
            # With output_router_logits the class adds its own pooled balance term; take it out again.
            language_loss = output.loss - model.router_aux_loss_coef * output.aux_loss
            loss = language_loss + BALANCE_COEFFICIENT * balance_loss(output.router_logits)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.advance(task)
            if (step + 1) % 100 == 0:
                rate = (step + 1 - first) * input_ids.numel() / (time.monotonic() - started)
                balance = float(loss - language_loss) / BALANCE_COEFFICIENT
                console.print(f"step {step + 1} loss {language_loss:.3f} balance {balance:.2f} {rate:,.0f} tokens/s")
            if (step + 1) % 200 == 0:
                save_checkpoint(checkpoint, model, optimizer, step + 1)
    return model, tokenizer


def save_checkpoint(path: Path, model: OlmoeForCausalLM, optimizer: torch.optim.AdamW, step: int) -> None:
    """Write weights and both moments, renamed into place when complete."""
    tensors = {"step": torch.tensor(step)}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)


def load_checkpoint(path: Path, model: OlmoeForCausalLM, optimizer: torch.optim.AdamW) -> int:
    """Restore what `save_checkpoint` wrote; returns the number of steps done."""
    tensors = load_file(path)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(tensors[f"weight.{name}"])
        optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return int(tensors["step"])


@torch.no_grad()
def bits_per_byte(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, blocks: list[str]) -> float:
    """Mean over the text of -log2 p, in windows of `SEQUENCE_LENGTH` that share one token."""
    model.eval()
    tokens = torch.from_numpy(encode(tokenizer, blocks).astype(np.int64))
    nats = 0.0
    stride = SEQUENCE_LENGTH - 1
    windows = tokens[: (len(tokens) - 1) // stride * stride + 1].unfold(0, SEQUENCE_LENGTH, stride)
    for batch in torch.split(windows, 16):
        logits = model(input_ids=batch).logits[:, :-1]
        nats += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    scored: str = tokenizer.decode(tokens[1 : windows.shape[0] * stride + 1])
    return nats / math.log(2) / len(scored.encode())


def unigram_bits_per_byte(tokenizer: PreTrainedTokenizerFast, train: list[str], held_out: list[str]) -> float:
    """The same for a unigram token model with add-one smoothing, fitted to the training text."""
    counts = Counter(encode(tokenizer, train).tolist())
    total = sum(counts.values()) + VOCAB_SIZE
    tokens = encode(tokenizer, held_out).tolist()
    nats = -sum(math.log((counts[token] + 1) / total) for token in tokens)
    return nats / math.log(2) / sum(len(block.encode()) for block in held_out)


def spread(blocks: list[str], count: int) -> list[str]:
    """`count` blocks at equal distances."""
    return [blocks[index * len(blocks) // count] for index in range(count)]


def model_card(scores: dict[str, DomainScore], num_steps: int, num_parameters: int, train_tokens: int) -> str:
    """The Markdown of the model's README."""
    rows = "\n".join(f"| {domain} | {score.model:.3f} | {score.unigram:.3f} |" for domain, score in scores.items())
    standard_library = f"the standard library of CPython {platform.python_version()}"
    packages = {
        corpus.domain: ", ".join(f"{name} {version}" for _, name, version in corpus.packages) for corpus in CORPORA
    }
    sources = "\n".join(f"| {domain} | {source or standard_library} |" for domain, source in packages.items())
    sequences = len(CORPORA) * SEQUENCES_PER_DOMAIN
    tokens = num_steps * sequences * SEQUENCE_LENGTH
    return f"""---
license: apache-2.0
tags: [mixture-of-experts, olmoe]
---
# coterie-zoo: a small Mixture-of-Experts language model

OLMoE architecture: {CONFIG.num_hidden_layers} layers, {CONFIG.num_experts} experts, top-{CONFIG.num_experts_per_tok},
hidden size {CONFIG.hidden_size}, expert width {CONFIG.intermediate_size}, {num_parameters:,} parameters in bfloat16.
Plain `from_pretrained` loads it. It exists so that expert placement can be tried on routing that was learned, on any
machine, without a download. It is of no use for writing text.

Trained by `make model` (`profiler/zoo/train.py`): {num_steps:,} steps of {sequences} sequences of
{SEQUENCE_LENGTH} tokens, the same number of each domain. That is {tokens:,} tokens, {tokens / train_tokens:.1f} times
the {train_tokens:,} that there are. AdamW, peak learning rate {PEAK_LEARNING_RATE:g}, linear decay over the last
{DECAY_SHARE:.0%} of the steps, load-balancing loss {BALANCE_COEFFICIENT:g}, seed {SEED}.

## Held-out bits per byte

On {SHIPPED_BLOCKS} blocks of {BLOCK_BYTES // 1024} KiB of each domain that were not trained on (they ship in
`../text/held_out`), in windows of {SEQUENCE_LENGTH} tokens. The unigram model is fitted to the domain's own training
text, over the same tokens.

| domain | this model | unigram |
| --- | --- | --- |
{rows}

That its routing has structure that placement can use is measured in `benchmarks/results/routing_structure.md`.

## Data and licences

| domain | source |
| --- | --- |
{sources}

Every source's licence allows its text and weights made from it to be passed on; `../LICENCES.md` has their terms. The
weights are under Apache-2.0.
"""


def write_result(
    model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, splits: dict[str, Split], out: Path, num_steps: int
) -> dict[str, DomainScore]:
    """Write the folder that ships: `model/` and `text/{calibration,held_out}/<domain>.txt`; score what was written."""
    for name in ("model", "text"):
        shutil.rmtree(out / name, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    for domain, split in splits.items():
        for part in ("calibration", "held_out"):
            path = out / "text" / part / f"{domain}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(spread(getattr(split, part), SHIPPED_BLOCKS)), encoding="utf-8")
    shipped = OlmoeForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    scores = {
        domain: DomainScore(
            bits_per_byte(shipped, tokenizer, spread(split.held_out, SHIPPED_BLOCKS)),
            unigram_bits_per_byte(tokenizer, split.train, spread(split.held_out, SHIPPED_BLOCKS)),
        )
        for domain, split in splits.items()
    }
    train_tokens = sum(len(encode(tokenizer, split.train)) for split in splits.values())
    card = model_card(scores, num_steps, shipped.num_parameters(), train_tokens)
    (out / "model" / "README.md").write_text(card, encoding="utf-8")
    return scores


def main(
    out: Annotated[Path, typer.Option(help="Where model/ and text/ are written.")] = Path(__file__).parent,
    work: Annotated[Path, typer.Option(help="Downloads and the checkpoint.")] = Path("build/zoo"),
    num_steps: Annotated[int, typer.Option(help="Steps of 4,096 tokens.")] = 3000,
) -> None:
    """Fetch the text, train the embedded model, write it with its card."""
    splits = {corpus.domain: read_split(corpus, work / "packages", TRAIN_BYTES_PER_DOMAIN, SEED) for corpus in CORPORA}
    model, tokenizer = train(splits, work, num_steps)
    scores = write_result(model, tokenizer, splits, out, num_steps)
    print(json.dumps({domain: [score.model, score.unigram] for domain, score in scores.items()}, indent=2))


if __name__ == "__main__":
    typer.run(main)
