"""Time published architectures here against the same function elsewhere, with the same weights.

    python -m benchmarks.published                   # all cases, on 2 threads
    python -m benchmarks.published --cases ouro-forward

A case is timed only after both sides were found to compute the same. Times are ratios within a run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import HrmTextConfig, HrmTextForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.timing import Result, at_most, case, ratio, run
from feedback_transformers import FeedbackConfig, FeedbackForCausalLM
from feedback_transformers.conversion import convert

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "vocab_size": 256}
BATCH, LENGTH, WRITTEN = 8, 128, 64


def tokens(batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """Return the same random tokens at each call."""
    return torch.randint(1, 256, (batch, length), generator=torch.Generator().manual_seed(1))


def hrm_text() -> tuple[nn.Module, nn.Module]:
    """Return ours and transformers' hrm_text with the same weights, all layers with a gradient."""
    torch.manual_seed(0)
    config = HrmTextConfig(**SIZES, head_dim=64, num_hidden_layers=2, H_cycles=2, L_cycles=3, L_bp_cycles=[3, 3])
    theirs = HrmTextForCausalLM(config).eval()
    return convert(config.to_dict(), theirs.state_dict()).eval(), theirs


class Looped(nn.Module):
    """A stack of Llama's layers that is looped by hand, its final norm after each pass."""

    def __init__(self, llama: LlamaForCausalLM, passes: int) -> None:
        super().__init__()
        self.llama, self.passes = llama, passes

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.llama.model.embed_tokens(input_ids)
        places = torch.arange(x.shape[1])[None]
        tables = self.llama.model.rotary_emb(x, places)
        for _ in range(self.passes):
            for layer in self.llama.model.layers:
                x = layer(x, attention_mask=None, position_ids=places, position_embeddings=tables)
            x = self.llama.model.norm(x)
        return self.llama.lm_head(x)


def nanbeige(passes: int = 4) -> tuple[nn.Module, nn.Module]:
    """Return ours and the loop by hand with the same weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=2, tie_word_embeddings=False)
    llama = LlamaForCausalLM(config).eval()
    ours = convert({**config.to_dict(), "model_type": "nanbeige", "num_loops": passes}, llama.state_dict())
    return ours.eval(), Looped(llama, passes).eval()


def logits(model: nn.Module) -> Callable[[], Tensor]:
    """Return a forward without a gradient."""
    uncached: dict[str, Any] = {} if isinstance(model, Looped) else {"use_cache": False}

    def call() -> Tensor:
        with torch.no_grad():
            made = model(tokens(), **uncached)
        return made if isinstance(made, Tensor) else made.logits

    return call


def training_step(model: nn.Module) -> Callable[[], list[Tensor]]:
    """Return a forward and backward, which gives the loss and the norm of all gradients."""

    def call() -> list[Tensor]:
        model.train()
        model.zero_grad()
        made = model(tokens()) if isinstance(model, Looped) else model(tokens(), use_cache=False).logits
        loss = nn.functional.cross_entropy(made.flatten(0, 1), tokens().flatten())
        loss.backward()
        gradients = [p.grad.norm() for p in model.parameters() if p.grad is not None]
        return [loss.detach(), torch.stack(gradients).norm()]

    return call


def writing(model: Any, batch: int = 1) -> Callable[[], Tensor]:
    """Return the generation of WRITTEN tokens behind 16, with a cache."""
    arguments = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0}

    def call() -> Tensor:
        return model.eval().generate(tokens(batch, 16), attention_mask=torch.ones(batch, 16).long(), **arguments)

    return call


WHAT: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "forward": logits,
    "training": training_step,
    "generate": writing,
}


def compared(pair: Callable[[], tuple[Any, Any]], what: str) -> tuple[Callable[[], None], Callable[[], Any]]:
    """Return a check that both sides give the same, and their ratio of times."""

    def check() -> None:
        ours, theirs = (WHAT[what](model)() for model in pair())
        for here, there in zip(ours, theirs, strict=True):
            assert torch.allclose(here.float(), there.float(), atol=1e-4), f"{(here - there).abs().max()}"

    def timed() -> Any:
        ours, theirs = pair()
        return ratio(WHAT[what](ours), WHAT[what](theirs), rounds=15)

    return check, timed


def enter(name: str, against: str, target: float, pair: Callable[[], tuple[Any, Any]], what: str) -> None:
    """Register a case."""
    check, timed = compared(pair, what)

    def result() -> Result:
        return at_most(name, against, target, timed())

    case(name, check)(result)


for what in ("forward", "training", "generate"):
    enter(f"hrm_text-{what}", "transformers' own hrm_text", 1.0, hrm_text, what)
for what in ("forward", "training"):
    enter(f"nanbeige-{what}", "the same layers looped by hand", 1.03, nanbeige, what)


def official_layout_is_the_same() -> None:
    """Check that the depth model is made of as many layer calls as the Llama: 1 + 2 x 4 + 1 = 10."""
    depth, llama = depth_and_llama()
    config = depth.config
    calls = config.num_encoder_layers + config.num_feedback_layers * config.num_feedback_steps
    assert calls + config.num_decoder_layers == llama.config.num_hidden_layers


def depth_and_llama() -> tuple[Any, Any]:
    """Return a depth model of 1 + 2 x 4 + 1 layer calls, and a Llama of 10 layers."""
    torch.manual_seed(0)
    layers: dict[str, Any] = {"num_encoder_layers": 1, "num_feedback_layers": 2, "num_feedback_steps": 4}
    depth = FeedbackForCausalLM(FeedbackConfig(**SIZES, **layers, num_decoder_layers=1)).eval()
    return depth, LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=10)).eval()


@case("depth-generate", official_layout_is_the_same)
def depth_generation() -> Result:
    """Compare generation by a depth model with that by a Llama of as many layer calls: another function."""
    depth, llama = depth_and_llama()
    return at_most("depth-generate", "a Llama of as many layer calls", 1.05, ratio(writing(depth), writing(llama)))


NAMES = [f"hrm_text-{what}" for what in WHAT] + ["nanbeige-forward", "nanbeige-training", "depth-generate"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=NAMES, default=NAMES, metavar="CASE")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    results = run(arguments.cases, arguments.threads, "published")
    return 0 if all(result.passed for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
