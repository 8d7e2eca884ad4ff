"""Compute by formula what training costs in memory, communication and time, and check that by runs of four sizes.

python -m benchmarks.scaling            # measures what is missing, prints the tables of docs/guides/machines.md
python -m benchmarks.scaling --report   # prints them from the recorded runs

The formulas are of language models with transformer layers. These feed back their state through a gate, in passes over
all positions (depth, or time by jacobi), and train in float32 or with bfloat16 autocast, with AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import RESULTS, append, machine, peak_bytes
from feedback_transformers import FeedbackConfig, FeedbackForCausalLM

FILE = RESULTS / "scaling.jsonl"
FLOAT, HALF = 4, 2  # bytes
COLLECTIVES = cast(Any, dist)


# The formulas


def parameters(config: FeedbackConfig) -> dict[str, int]:
    """Count the parameters of a layer, the connection, the loop, and the whole model."""
    d, m, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv = d // heads * (config.num_key_value_heads or heads)
    layer = 2 * d * d + 2 * d * kv + 3 * d * m + 2 * d
    connection = 3 * d * d + 2 * d + 1
    loop = connection + config.num_feedback_layers * layer
    outer = config.num_encoder_layers + config.num_decoder_layers
    tables = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    return {"layer": layer, "connection": connection, "loop": loop, "all": loop + outer * layer + tables + d}


def applied(config: FeedbackConfig, passes: int) -> tuple[int, int]:
    """Count how many times a layer is run forward, and how many times the head is."""
    heads = passes if config.supervision == "all" else 1
    layers = config.num_encoder_layers + passes * config.num_feedback_layers + heads * config.num_decoder_layers
    return layers, heads


def flops(config: FeedbackConfig, tokens: int, length: int, passes: int, checkpointing: bool = False) -> int:
    """Count the operations of a forward and backward.

    The backward of a product is two products, and recomputation is another one. Attention is counted in full: a kernel
    may leave out the causal half, but seldom saves all of it.
    """
    d, size = config.hidden_size, parameters(config)
    layers, heads = applied(config, passes)
    one_layer = 2 * (size["layer"] - 2 * d) + 4 * length * d
    in_layers = layers * one_layer + passes * 2 * 3 * d * d
    in_heads = heads * 2 * config.vocab_size * d
    return tokens * ((4 if checkpointing else 3) * in_layers + 3 * in_heads)


def bytes_per_token(config: FeedbackConfig, width: int = FLOAT) -> tuple[int, int, int]:
    """Return what a layer, a pass of the loop and a readout keep for the backward, at `width` bytes a number."""
    d, m, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv = d // heads * (config.num_key_value_heads or heads)
    norms = 2 * d * (FLOAT + 2 * width)  # norms compute in float32
    layer = norms + width * (2 * d + 2 * kv + 4 * m)  # query and output of attention, keys and values, gated MLP
    one_pass = config.num_feedback_layers * layer + width * 7 * d  # the 7 of the connection
    return layer, one_pass, 2 * config.vocab_size * FLOAT  # logits and softmax, always in float32


def activations(config: FeedbackConfig, tokens: int, passes: int, checkpointing: bool, width: int = FLOAT) -> int:
    """Return the bytes that the forward keeps for the backward.

    With checkpointing, a pass keeps its input, and so does a layer outside the loop; what one pass needs is made when
    its turn comes. From 16 passes on, passes are kept in segments.
    """
    layer, one_pass, logits = bytes_per_token(config, width)
    layers, readouts = applied(config, passes)
    outer = layers - passes * config.num_feedback_layers
    if not checkpointing:
        return tokens * (passes * one_pass + outer * layer + readouts * logits)
    inputs = width * (passes + outer) * config.hidden_size
    return tokens * (inputs + max(one_pass, layer) + readouts * logits)


def peak(config: FeedbackConfig, tokens: int, passes: int, checkpointing: bool, width: int = FLOAT) -> int:
    """Return the most bytes beyond the weights in a first step, where gradients are made as activations are freed.

    That is what the forward keeps; or, once head, decoder and one pass are behind it, what is left and all gradients
    but the encoder's, since those of the loop are whole from its first pass on.
    """
    size, kept = parameters(config), activations(config, tokens, passes, checkpointing, width)
    layer, one_pass, logits = bytes_per_token(config, width)
    made = width * (size["all"] - config.num_encoder_layers * size["layer"])
    freed = logits + (0 if checkpointing else config.num_decoder_layers * layer + one_pass)
    return max(kept - tokens * one_pass * checkpointing, kept - tokens * freed + made)


ENGINES = {
    "ddp": "the whole model everywhere, gradients reduced once",
    "fsdp": "in shards; the weights are gathered once, and kept until the backward (reshard_after_forward: false)",
    "fsdp, loop": "the same, but the loop, a unit, is gathered again for its backward (reshard_after_forward: true)",
    "fsdp, layers": "each layer is a unit: those of the loop are gathered at every pass, forward and backward",
}


def states(config: FeedbackConfig, processes: int, engine: str) -> dict[str, float]:
    """Return the bytes on each process: weights, gradients and AdamW's moments in float32, and the weights at work.

    Under FSDP each process has a part of the first ones. The weights at work are whole, in bfloat16. The gradients of
    the loop come whole before they are added to others or scattered, since all passes contribute: in float32 under
    DDP.
    """
    size = parameters(config)
    part = 1 if engine == "ddp" else processes
    kept = {"weights": FLOAT, "gradients": FLOAT, "optimizer": 2 * FLOAT}
    rest = size["all"] - config.num_feedback_layers * size["layer"]
    outer = config.num_encoder_layers + config.num_decoder_layers
    weights = rest - (outer - 1) * size["layer"] if engine == "fsdp, layers" else size["all"]
    looped = size["all"] - rest
    coming = FLOAT * looped if engine == "ddp" else HALF * (looped + size["layer"])
    return {**{name: count * size["all"] / part for name, count in kept.items()}, "whole": HALF * weights + coming}


def communication(config: FeedbackConfig, processes: int, engine: str, passes: int, width: int = FLOAT) -> float:
    """Return the bytes that each process sends in a step, by rings; FSDP sends `width` bytes for each number."""
    size, ring = parameters(config), (processes - 1) / processes
    if engine == "ddp":
        return 2 * ring * FLOAT * size["all"]
    outer = (config.num_encoder_layers + config.num_decoder_layers) * size["layer"]
    again = {
        "fsdp": 0,
        "fsdp, loop": size["loop"],
        "fsdp, layers": outer + (2 * passes - 1) * config.num_feedback_layers * size["layer"],
    }
    return ring * width * (2 * size["all"] + again[engine])  # weights gathered, and gradients scattered


def seconds(work: float, rate: float, sent: float = 0.0, bandwidth: float = 1.0) -> float:
    """Return the time of a step where communication runs beside the computation: the longer of the two."""
    return max(work / rate, sent / bandwidth)


# The runs

WIDTHS = (64, 128, 256, 512)
ROWS, LENGTH, PASSES, PROCESSES = 4, 128, 4, 2


def small(width: int) -> FeedbackConfig:
    """Return a config with one layer before the loop, two in it, and one behind it."""
    fields: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": width // 32}
    fields |= {"num_encoder_layers": 1, "num_feedback_layers": 2, "num_decoder_layers": 1}
    fields |= {"vocab_size": 256, "num_feedback_steps": PASSES, "max_position_embeddings": LENGTH}
    return FeedbackConfig(**fields)


def cpu_seconds(step: Any, rounds: int = 5) -> float:
    """Return the least time of this process after a first call, so that other processes do not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return min(times[1:])


def measure(width: int) -> dict[str, Any]:
    """Measure one size on this machine: parameters, operations, peak bytes beyond the weights, and CPU seconds."""
    torch.manual_seed(0)
    config = small(width)
    ids = torch.randint(0, config.vocab_size, (ROWS, LENGTH))
    model = FeedbackForCausalLM(config).train()

    def step() -> None:
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()

    def peak() -> int:
        model.zero_grad()
        return peak_bytes(step)

    measured: dict[str, Any] = {"width": width, "parameters": model.num_parameters()}
    measured["seconds"] = cpu_seconds(step)
    measured["memory"] = peak()
    with FlopCounterMode(display=False) as counted, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        step()
    measured["flops"] = counted.get_total_flops()
    model.activation_checkpointing_enable()
    measured["checkpointed"] = peak()
    model.activation_checkpointing_disable()
    model.bfloat16()
    measured["bfloat16"] = peak()
    x, product = torch.randn(ROWS * LENGTH, width, requires_grad=True), nn.Linear(width, 2 * width, bias=False)
    work = 3 * 2 * ROWS * LENGTH * 2 * width**2
    measured["matmul rate"] = work / cpu_seconds(lambda: product(x).sum().backward(), 20)
    return measured


def formulas(width: int) -> dict[str, float]:
    """Return what `measure` and `sent` should find."""
    config, tokens = small(width), ROWS * LENGTH
    return {
        "parameters": parameters(config)["all"],
        "flops": flops(config, tokens, LENGTH, PASSES),
        "memory": peak(config, tokens, PASSES, False),
        "checkpointed": peak(config, tokens, PASSES, True),
        "bfloat16": peak(config, tokens, PASSES, False, HALF),
        **{engine: communication(config, PROCESSES, engine, PASSES) for engine in ENGINES},
    }


def sent() -> dict[str, list[float]]:
    """Measure the bytes that each of two processes sends in a step, by engine, at each width.

    They are what it hands to the collectives, times the share of it that rings send.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = torch.multiprocessing.get_context("spawn").SimpleQueue()
    context: Any = spawn(one_process, (port, queue), nprocs=PROCESSES, join=False)
    while not context.join():
        pass
    return queue.get()


class Counted:
    """Count the bytes that collectives send by rings, from when it is made until `stop`."""

    def __init__(self) -> None:
        self.bytes, self.ring = 0.0, (PROCESSES - 1) / PROCESSES
        self.gather, self.scatter = COLLECTIVES.all_gather_single, COLLECTIVES.reduce_scatter_single
        COLLECTIVES.all_gather_single, COLLECTIVES.reduce_scatter_single = self.gathered, self.scattered

    def stop(self) -> float:
        COLLECTIVES.all_gather_single, COLLECTIVES.reduce_scatter_single = self.gather, self.scatter
        return self.bytes

    def gathered(self, output: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.bytes += self.ring * output.nbytes
        return self.gather(output, *args, **kwargs)

    def scattered(self, output: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.bytes += self.ring * input.nbytes
        return self.scatter(output, input, *args, **kwargs)

    def reduced(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Do what DDP does itself: take the mean over the processes."""
        self.bytes += 2 * self.ring * bucket.buffer().nbytes
        work: Any = dist.all_reduce(bucket.buffer().div_(PROCESSES), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


def one_process(rank: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    found: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for width in WIDTHS:
        for engine in ENGINES:
            torch.manual_seed(0)
            model: Any = FeedbackForCausalLM(small(width)).train()
            ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH))
            counted = Counted()
            if engine == "ddp":
                model = DistributedDataParallel(model)
                model.register_comm_hook(None, lambda state, bucket, to=counted: to.reduced(bucket))
            else:
                body = model.model
                outer = [*body.encoder.layers, *body.decoder.layers, *body.loop.cell.layers]
                for unit in outer if engine == "fsdp, layers" else [body.loop]:
                    fully_shard(unit, reshard_after_forward=engine != "fsdp")
                fully_shard(model)  # the parts in no unit stay gathered
            model(ids, labels=ids, use_cache=False).loss.backward()
            found[engine].append(counted.stop())
    if rank == 0:
        queue.put(found)
    dist.destroy_process_group()


def run() -> list[dict[str, Any]]:
    """Run all four sizes; write a line of the results for each."""
    torch.set_num_threads(1)
    travelled = sent()
    runs = []
    for i, width in enumerate(WIDTHS):
        runs.append({**measure(width), **{engine: travelled[engine][i] for engine in ENGINES}})
        append(FILE, {**runs[-1], "machine": machine(), "threads": 1})
    return runs


def check(runs: list[dict[str, Any]]) -> None:
    """Print what the formulas say as a share of what was measured, with a column for each width."""
    expected = [formulas(run["width"]) for run in runs]
    rows = {
        name: [f"{e[name] / run[name]:.3f}" for e, run in zip(expected, runs, strict=True)] for name in expected[0]
    }
    rows["CPU seconds"] = [f"{run['seconds']:.3f}" for run in runs]
    rates = [e["flops"] / run["seconds"] / run["matmul rate"] for e, run in zip(expected, runs, strict=True)]
    rows["of the rate of its products"] = [f"{rate:.2f}" for rate in rates]
    print("| width |", " | ".join(str(run["width"]) for run in runs), "|")
    print("|" + "---|" * (len(runs) + 1))
    for name, cells in rows.items():
        print(f"| {name} |", " | ".join(cells), "|")


# The plan

SIZES: dict[str, dict[str, Any]] = {
    "1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16},
    "10B": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}
LAYERS = {"1B": (4, 10, 4), "10B": (8, 28, 8)}
PLAN = {"tokens in a batch": 2**21, "length": 4096, "rows on a device": 1, "passes": 4}
PEAK, REACHED = 1e15, 0.4  # bfloat16 of a large accelerator, and the share that training reaches: assumptions
BANDWIDTH = 50e9  # bytes a second out of each device, between machines: an assumption


def planned(name: str) -> FeedbackConfig:
    encoder, loop, decoder = LAYERS[name]
    layers = {"num_encoder_layers": encoder, "num_feedback_layers": loop, "num_decoder_layers": decoder}
    fields: dict[str, Any] = {**layers, **SIZES[name], "max_position_embeddings": PLAN["length"]}
    return FeedbackConfig(vocab_size=32768, tie_word_embeddings=False, **fields)


def plan() -> None:
    """Print, for each size and number of devices, memory and communication of each device and the time of a step."""
    passes, length = PLAN["passes"], PLAN["length"]
    tokens = PLAN["rows on a device"] * length  # on a device at a time; the rest of the batch is accumulated
    print("| model | devices | engine | states, GB | activations, GB | sent in a step, GB | seconds of a step |")
    print("|" + "---|" * 7)
    for name in SIZES:
        config = planned(name)
        work = flops(config, PLAN["tokens in a batch"], length, passes, checkpointing=True)
        kept = activations(config, tokens, passes, True, HALF) / 1e9
        for devices in (8, 64, 512):
            parts = PLAN["tokens in a batch"] // tokens // devices
            for engine in ENGINES:
                held = sum(states(config, devices, engine).values()) / 1e9
                travels = communication(config, devices, engine, passes, HALF) * (1 if engine == "ddp" else parts)
                step = seconds(work / devices, PEAK * REACHED, travels, BANDWIDTH)
                cells = [f"{held:.1f}", f"{kept:.1f}", f"{travels / 1e9:.1f}", f"{step:.2f}"]
                print("|", " | ".join([name, str(devices), engine, *cells]), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    runs = [json.loads(line) for line in lines][-len(WIDTHS) :]
    check(runs if parser.parse_args().report or len(runs) == len(WIDTHS) else run())
    print()
    plan()


if __name__ == "__main__":
    main()
