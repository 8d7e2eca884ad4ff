"""Train a small model on the characters of Shakespeare, for the benchmarks that need a trained one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from feedback_transformers import FeedbackConfig, FeedbackForCausalLM, data
from feedback_transformers.training import draw_steps

# The same for all models, found on a small feed-forward one; the search is in benchmarks/LOG.md.
RECIPE = {"batch": 8, "adamw_lr": 3e-3, "muon_lr": 7e-3, "weight_decay": 0.1, "warmup": 0.05, "embedding_std": 0.5}


def build(seed: int = 0, **fields: Any) -> FeedbackForCausalLM:
    """Return a model of characters: two layers of width 64 in the loop, one before it."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "tie_word_embeddings": False}
    layers = {"num_encoder_layers": 1, "num_feedback_layers": 2, "num_decoder_layers": 0}
    vocab_size = characters()[2]
    model = FeedbackForCausalLM(
        FeedbackConfig(**{**shape, **layers, "vocab_size": vocab_size, "max_position_embeddings": 512, **fields})
    )
    nn.init.normal_(cast(Tensor, model.get_input_embeddings().weight), std=RECIPE["embedding_std"])
    return model


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside, and AdamW for embeddings, readout, gains and biases."""
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    flat: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            flat.append(parameter)
        else:
            (outer if "embed" in name or "lm_head" in name else inner).append(parameter)
    decay = RECIPE["weight_decay"]
    muon = torch.optim.Muon(inner, lr=RECIPE["muon_lr"], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    groups = [{"params": outer, "weight_decay": decay}, {"params": flat, "weight_decay": 0.0}]
    return [muon, torch.optim.AdamW(groups, lr=RECIPE["adamw_lr"], betas=(0.9, 0.95))]


def schedule(step: int, total: int) -> float:
    """Return the learning rate's share: a linear warm-up, then a cosine to zero."""
    warmup = max(1, int(RECIPE["warmup"] * total))
    return (step + 1) / warmup if step < warmup else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup))


def characters() -> tuple[Tensor, Tensor, int]:
    """Return training and validation characters as ids, and how many kinds there are."""
    texts = data.load("shakespeare")
    train, rest = (
        "".join(part) for part in (texts["train"]["text"], [*texts["validation"]["text"], *texts["test"]["text"]])
    )
    ids = {character: i for i, character in enumerate(sorted(set(train + rest)))}
    return torch.tensor([ids[c] for c in train]), torch.tensor([ids[c] for c in rest]), len(ids)


def train(
    model: Any,
    steps: int,
    length: int,
    batch: int = 8,
    sampled: tuple[int, int] | None = None,
    seed: int = 0,
    callback: Callable[[int, float], None] | None = None,
) -> float:
    """Train in place by RECIPE; return the seconds that it took."""
    data, both = characters()[0], optimizers(model.train())
    generator, start = torch.Generator().manual_seed(1000 + seed), time.time()
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in both]
    for step in tqdm(range(steps), mininterval=10):
        starts = torch.randint(0, len(data) - length - 1, (batch,), generator=generator)
        rows = data[starts[:, None] + torch.arange(length + 1)]
        drawn = {} if sampled is None else {"num_feedback_steps": draw_steps(step, *sampled, seed)}
        loss = model(
            rows[:, :-1], shift_labels=rows[:, 1:].contiguous(), labels=rows[:, 1:], use_cache=False, **drawn
        ).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lrs in zip(both, rates, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * schedule(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        if callback is not None:
            callback(step, loss.item())
    model.eval()
    return time.time() - start


def held_out(length: int, sequences: int) -> Tensor:
    """Return rows [sequences, length + 1] spread evenly over the held-out tenth."""
    rest = characters()[1]
    starts = torch.linspace(0, len(rest) - length - 2, sequences).long()
    return rest[starts[:, None] + torch.arange(length + 1)]


@torch.no_grad()
def evaluate(model: Any, rows: Tensor, **arguments: Any) -> tuple[float, float | None]:
    """Return the mean nats per character of rows [N, T + 1], and the mean number of passes where these may halt."""
    losses, steps = [], []
    for part in rows.split(16):
        outputs = model(part[:, :-1], use_cache=False, **arguments)
        losses.append(
            nn.functional.cross_entropy(outputs.logits.flatten(0, 1), part[:, 1:].flatten()).item() * len(part)
        )
        if getattr(outputs, "num_feedback_steps", None) is not None:
            steps.append(outputs.num_feedback_steps.float().mean().item() * len(part))
    return sum(losses) / len(rows), sum(steps) / len(rows) if steps else None
