"""Train adapters on pretrained models, with or without feedback, for a number of seconds."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from feedback_transformers import retrofit

PROJECTIONS = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|query|key|value|dense"
RATE, WARMUP, DECAY = 1e-3, 20, 0.3  # peak rate, steps up to it, share of the time down to a tenth
FASTER = 4.0  # the learning rate of a connection, which begins at zero and has full rank, over that of the adapters


def adapted(model: PreTrainedModel, rank: int, feedback: dict[str, Any] | None, task: str = "CAUSAL_LM") -> PeftModel:
    """Add adapters to all layers of `model`; with feedback, to those from the loop on, and train the connection."""
    parts, kept = r"layers?\.", None
    if feedback is not None:
        model, parts, kept = retrofit(model, **feedback), r"(cell|decoder)\.layers\.", ["connection"]
    targets = rf".*{parts}.*\.({PROJECTIONS})"
    config = LoraConfig(task_type=task, r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=kept)
    return cast(PeftModel, get_peft_model(to_bfloat16(model), config).train())


def to_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    return cast(Any, model).to(torch.bfloat16)


def trained_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def train(
    model: nn.Module, batches: Iterator[Any], loss: Callable[[Any], Tensor], seconds: float, faster: float = FASTER
) -> tuple[int, list[float]]:
    """Make steps of AdamW until one thread has computed for so long; return their number and their losses.

    The time is that of the processor, so that other programs on the machine take nothing away from either side.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    connection = [parameter for name, parameter in trained if "connection" in name]
    rest = [parameter for name, parameter in trained if "connection" not in name]
    groups = [{"params": rest, "rate": RATE}, {"params": connection, "rate": faster * RATE}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    losses: list[float] = []
    start, said = time.process_time(), time.time()
    while (passed := (time.process_time() - start) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (len(losses) + 1) / WARMUP, max(0.1, (1 - passed) / DECAY))
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(next(batches))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
        if time.time() - said > 30:
            said = time.time()
            print(f"{passed:.0%}  step {len(losses)}  loss {sum(losses[-20:]) / len(losses[-20:]):.3f}", flush=True)
    return len(losses), losses


def draws(seed: int) -> Iterator[random.Random]:
    """Yield a generator of random numbers for every step, the same whichever model is trained."""
    step = 0
    while True:
        yield random.Random(f"{seed}:{step}")
        step += 1
