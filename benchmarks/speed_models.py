"""Measure how fast whole feedback models are: against the same work written by hand, other packages, and themselves.

    python -m benchmarks.speed                     # these and the recurrences
    python -m benchmarks.speed --cases depth-k8

Shapes: B batch, T positions, D hidden size, K passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from feedback_transformer_pytorch import FeedbackTransformer
from tiny_recursive_model import TinyRecursiveModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from x_transformers import Encoder

from benchmarks.timing import Result, at_least, at_most, case, peak_bytes, ratio
from feedback_transformers import PRESETS, FeedbackConfig, FeedbackForCausalLM, FeedbackForMaskedLM

WIDTH, HEADS = 256, 4


def nothing_to_check() -> None:
    """Check nothing: the other network of the case is another function, with no result in common."""


def build(head: Any = FeedbackForCausalLM, **fields: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 688, "vocab_size": 256}
    return head(FeedbackConfig(**{**sizes, "max_position_embeddings": 256, **fields}))


def tokens(batch: int, length: int, vocab_size: int = 256) -> Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
    """Return a forward and backward, which gives the loss and all gradients."""

    def call() -> list[Tensor]:
        model.zero_grad()
        value = loss()
        value.backward()
        return [value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    return call


def same(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=1e-5 * max(1.0, e.abs().max().item()), rtol=0.0)


# A GRU that reads its own prediction, of 1,000 classes, against a loop over nn.GRUCell with the same weights


def output_feedback() -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    fields = {"feedback_axis": "time", "feedback_type": "gru", "feedback_signal": "output", "decoder_type": "mlp"}
    model = build(**fields, feedback_connection="add", num_encoder_layers=0, num_decoder_layers=0, vocab_size=1000)
    model.train()
    ids, loop = tokens(8, 128, 1000), model.model.loop
    cell, source = nn.GRUCell(WIDTH, WIDTH), loop.cell.layers[0][0]
    cell.weight_ih, cell.bias_ih = source.input_proj.weight, source.input_proj.bias
    cell.weight_hh, cell.bias_hh = source.state_proj.weight, source.state_proj.bias

    def by_hand() -> Tensor:
        table = model.get_input_embeddings().weight
        e, h = F.embedding(ids, table), torch.zeros(8, WIDTH)
        fed, logits = torch.zeros_like(h), []
        for t in range(ids.shape[1]):
            h = cell(e[:, t] + loop.connection.signal_proj(loop.connection.norm(fed)), h)
            logits.append(model.lm_head(model.model.norm(h)))
            fed = logits[-1].softmax(-1) @ table
        return F.cross_entropy(torch.stack(logits, dim=1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return training_step(model, lambda: model(ids, labels=ids).loss), training_step(model, by_hand)


def check_output_feedback() -> None:
    ours, theirs = output_feedback()
    same(ours(), theirs())


@case("gru-output", check_output_feedback)
def gru_output() -> Result:
    return at_least("gru-output", "a loop over nn.GRUCell", 1.5, ratio(*output_feedback()))


# Depth: passes against the same layer calls written by hand


def depth() -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    model = build(num_encoder_layers=0, num_feedback_layers=2, num_decoder_layers=0, num_feedback_steps=8).train()
    ids, loop, base = tokens(8, 128), model.model.loop, model.model
    rotary, positions = LlamaRotaryEmbedding(model.config.backbone_config), torch.arange(128)[None]

    def by_hand() -> Tensor:
        e = base.embeddings.embed_tokens(ids)
        h, position = torch.zeros_like(e), rotary(e, positions)
        for _ in range(8):
            h = loop.connection(e, h)
            for layer in loop.cell.layers:
                h = layer(h, position_embeddings=position)
        logits = model.lm_head(base.norm(h))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    return training_step(model, lambda: model(ids, labels=ids).loss), training_step(model, by_hand)


def check_depth() -> None:
    ours, theirs = depth()
    same(ours(), theirs())


@case("depth-k8", check_depth)
def depth_overhead() -> Result:
    return at_most("depth-k8", "16 layer calls by hand", 1.05, ratio(*depth()))


@case("depth-memory", nothing_to_check)
def depth_memory() -> Result:
    """Compare the peak of what torch allocates in a checkpointed training step, 32 passes against 4."""
    peaks = {}
    for passes in (4, 32):
        fields = {"num_encoder_layers": 0, "num_feedback_layers": 2, "num_decoder_layers": 0}
        model = build(**fields, num_feedback_steps=passes).train()
        model.activation_checkpointing_enable()
        ids = tokens(8, 128)
        step = training_step(model, lambda model=model, ids=ids: model(ids, labels=ids).loss)
        step()
        peaks[passes] = peak_bytes(step)
    grown = peaks[32] / peaks[4]
    return Result("depth-memory", "K=4", f"{grown:.2f}x its peak", "<= 1.25x", grown <= 1.25, {"bytes": peaks})


# Other packages, at the same sizes


def shared_memory(**more: Any) -> tuple[Any, Any]:
    """Return two Feedback Transformers of 4 layers: ours, and that of feedback-transformer-pytorch."""
    theirs = FeedbackTransformer(num_tokens=256, dim=WIDTH, depth=4, seq_len=1, mem_len=256, heads=HEADS, dim_head=64)
    fields = {"num_feedback_layers": 4, "intermediate_size": 944, "tie_word_embeddings": False}
    return build(**{**PRESETS["shared-memory"], **fields, **more}), theirs


def feedback_transformer_train(name: str, **solver: Any) -> Result:
    ours, theirs = shared_memory(**solver)
    ids = tokens(4, 256)

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    measured = ratio(
        training_step(ours.train(), lambda: loss(ours(ids).logits)),
        training_step(theirs, lambda: loss(theirs(ids))),
        rounds=5,
    )
    return at_least(name, "feedback-transformer-pytorch", 3.0, measured)


def check_shared_memory() -> None:
    """Check that as many parallel passes as positions equal the walk over them."""
    ids, results = tokens(2, 12), []
    for solver in ("sequential", "jacobi"):
        model = shared_memory(solver=solver, solver_steps=12)[0].train()
        results.append(training_step(model, lambda model=model: model(ids, labels=ids).loss)())
    same(*results)


@case("feedback-transformer-train", check_shared_memory)
def feedback_transformer_in_order() -> Result:
    return feedback_transformer_train("feedback-transformer-train")


@case("feedback-transformer-train-jacobi", check_shared_memory)
def feedback_transformer_in_passes() -> Result:
    """Time our Feedback Transformer in 4 parallel passes."""
    return feedback_transformer_train("feedback-transformer-train-jacobi", solver="jacobi", solver_steps=4)


@case("feedback-transformer-generate", nothing_to_check)
def feedback_transformer_generate() -> Result:
    """Time 64 tokens behind 64, one at a time."""
    ours, theirs = shared_memory()
    ids = tokens(1, 64)

    @torch.no_grad()
    def peer() -> None:
        logits, memory = theirs.eval()(ids, return_memory=True)
        for _ in range(64):
            logits, memory = theirs(logits[:, -1:].argmax(-1), memory=memory, return_memory=True)

    def generate() -> None:
        ours.eval().generate(ids, max_new_tokens=65, do_sample=False, pad_token_id=0)

    measured = ratio(generate, peer, rounds=5)
    return at_least("feedback-transformer-generate", "feedback-transformer-pytorch", 5.0, measured)


@case("tiny-recursive", nothing_to_check)
def tiny_recursive() -> Result:
    """Time 21 calls of a network of two layers, the last 7 with a gradient, over 81 cells of 10 tokens."""
    fields = {"vocab_size": 10, "supervision": "last", "num_feedback_steps": 21, "gradient_steps": 7}
    ours = build(FeedbackForMaskedLM, **{**PRESETS["supervised-loop"], **fields}).train()
    network = Encoder(dim=WIDTH, depth=2, heads=HEADS, attn_dim_head=WIDTH // HEADS)
    theirs = TinyRecursiveModel(dim=WIDTH, num_tokens=10, network=network)
    ids, labels = tokens(16, 81, 10), tokens(16, 81, 10)
    measured = ratio(
        training_step(ours, lambda: ours(ids, labels=labels).loss),
        training_step(theirs, lambda: theirs(ids, *theirs.get_initial(), labels=labels)[0]),
    )
    return at_least("tiny-recursive", "tiny-recursive-model", 1.3, measured)


# Generation


def decoding(model: Any, cache: Any) -> Callable[[], None]:
    """Return a call that reads 16 tokens, one at a time, at wherever `cache` is."""
    token = tokens(1, 1)

    @torch.no_grad()
    def call() -> None:
        for _ in range(16):
            model(token, past_key_values=cache, use_cache=True)

    return call


def recurrent(layers: int = 2, **fields: Any) -> Any:
    shape = {"num_encoder_layers": 0, "decoder_type": "mlp", "num_decoder_layers": 0, "num_feedback_layers": layers}
    return build(feedback_type="gru", feedback_axis="time", **shape, **fields).eval()


@case("generate-4000", nothing_to_check)
def generation_is_constant() -> Result:
    """Compare time and memory of a token behind 4,000 tokens with those of one behind 64."""
    model = recurrent()
    with torch.no_grad():
        caches = [model(tokens(1, length), use_cache=True).past_key_values for length in (4000, 64)]
    measured = ratio(decoding(model, caches[0]), decoding(model, caches[1]), rounds=15)
    result = at_most("generate-4000", "token 64", 1.05, measured)
    sizes = [cache.num_bytes() for cache in caches]
    return result._replace(passed=result.passed and sizes[0] == sizes[1], details={**result.details, "bytes": sizes})


@case("generate-gpt2", nothing_to_check)
def generation_against_gpt2() -> Result:
    """Compare a token behind 2,000, of models of the same size: its time, and the bytes of the cache."""
    shape: dict[str, Any] = {"n_embd": WIDTH, "n_layer": 12, "n_head": HEADS, "n_positions": 4096, "vocab_size": 256}
    gpt2 = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).eval()
    ours = recurrent(layers=6, hidden_size=512)
    with torch.no_grad():
        caches = [model(tokens(1, 2000), use_cache=True).past_key_values for model in (ours, gpt2)]
    measured = ratio(decoding(ours, caches[0]), decoding(gpt2, caches[1]))
    theirs = sum(layer.keys.nbytes + layer.values.nbytes for layer in caches[1].layers)
    result = at_least("generate-gpt2", "GPT-2 of the same size", 2.0, measured)
    smaller = theirs / caches[0].num_bytes()
    details = {"parameters": [m.num_parameters() for m in (ours, gpt2)], "cache": smaller}
    figure = f"{result.figure}, cache 1/{smaller:.0f}"
    passed = result.passed and smaller >= 50
    return Result(*result[:2], figure, ">= 2x, cache <= 1/50", passed, {**result.details, **details})


# Mixed precision


@case("bfloat16", nothing_to_check)
def bfloat16() -> Result:
    """Compare a training step of 10M parameters in bfloat16 autocast with float32, and their losses after 20 steps."""
    losses: dict[bool, list[float]] = {True: [], False: []}
    steps = {}
    for mixed in (True, False):
        shape = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_feedback_layers": 3}
        model = build(**shape, num_encoder_layers=1, num_decoder_layers=1, num_feedback_steps=3).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        ids = tokens(8, 256)

        def step(model: Any = model, optimizer: Any = optimizer, mixed: bool = mixed, ids: Tensor = ids) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
                loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[mixed].append(loss.item())

        steps[mixed] = step
    measured = ratio(steps[True], steps[False], rounds=9)
    result = at_least("bfloat16", "float32", 1.5, measured)
    gap = abs(losses[True][-1] - losses[False][-1]) / losses[False][-1]
    details = {**result.details, "losses": losses}
    return result._replace(
        figure=f"{result.figure}, loss {gap:.1%} apart", passed=result.passed and gap < 0.02, details=details
    )
