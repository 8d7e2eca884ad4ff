"""Two processes train as one does: DDP, FSDP 2, streamed data; and the ready configs of accelerate."""

import importlib
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile

import distributed_worker as worker
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from conftest import assert_close, build, tokens
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from feedback_transformers import FeedbackForCausalLM, FeedbackForSequenceClassification, data

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIGS = EXAMPLES / "accelerate"
PROCESSES = 2


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def launch(*arguments: str, script: str = worker.__file__) -> None:
    """`script` in two processes that meet on a free port, as torchrun starts them, without torchrun's own start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as files:  # not pipes: one that is full would hold up both processes
        errors = [files.enter_context(TemporaryFile("w+")) for _ in range(PROCESSES)]
        started = []
        for rank, error in enumerate(errors):
            environment = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, script, *map(str, arguments)]
            started.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=error))
        try:
            codes = [process.wait() for process in started]
        finally:  # also where pytest's own timeout ends the waiting
            for process in started:
                process.kill()
        for code, error in zip(codes, errors, strict=True):
            error.seek(0)
            assert code == 0, error.read()[-3000:]


def results(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}-{rank}.json").read_text())


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    file = "adapter_model.safetensors" if "LORA" in worker.CASES[name] else "model.safetensors"
    return load_file(folder / name / file)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a case that one process has trained."""
    folder, trained = tmp_path_factory.mktemp("alone"), set()

    def train(name: str) -> Path:
        if name not in trained:
            worker.train(name, folder)
            trained.add(name)
        return folder

    return train


def compare(engine: str, names: list[str], alone, folder: Path) -> None:
    launch(folder, engine, *names)
    for name in names:
        one, first, second = results(alone(name), name), results(folder, name), results(folder, name, 1)
        assert len(one["losses"]) == worker.STEPS and one["losses"][-1] < one["losses"][0], name
        assert first["losses"] == pytest.approx(one["losses"], abs=1e-4, rel=0), (engine, name)
        assert first["steps"] == second["steps"] == one["steps"], "every process draws the same number of steps"
        expected, actual = weights(alone(name), name), weights(folder, name)
        assert actual.keys() - expected.keys() <= {"lm_head.weight"}, "FSDP writes a tied readout too"
        apart = {key: (actual[key] - expected[key]).abs().max().item() for key in expected}
        assert max(apart.values()) < 1e-4, (engine, name, {key: value for key, value in apart.items() if value > 1e-4})


QUICK = {engine: ["depth"] for engine in ("ddp", "fsdp")}


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(engine, alone, tmp_path):
    compare(engine, QUICK[engine], alone, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "depth")
    assert model.num_parameters() == sum(p.numel() for p in weights(alone("depth"), "depth").values())


@pytest.mark.slow
@pytest.mark.parametrize("engine", QUICK)
def test_all_cases(engine, alone, tmp_path):
    compare(engine, [name for name in worker.CASES if name not in QUICK[engine]], alone, tmp_path)


# Streams


@pytest.mark.slow
def test_streams_have_no_repeats_and_no_gaps(tmp_path):
    launch(tmp_path, "stream", "dispatched", "sharded", "split")
    rows = list(worker.texts(worker.STREAMED)[0]["input_ids"])
    for name in ("dispatched", "sharded", "split"):
        both = [results(tmp_path, name, rank) for rank in range(PROCESSES)]
        if name == "dispatched":  # the rows of a step, in order
            first = [row for parts in zip(*(one["whole"] for one in both), strict=True) for p in parts for row in p]
            assert first == (rows + rows)[: len(first)], name
        else:
            halves = [rows[:24], rows[24:]]
            for one, half in zip(both, halves, strict=True):
                seen = [row for batch in one["whole"] for row in batch]
                assert seen == (half + half)[: len(seen)], name
        for one in both:
            assert len(one["whole"]) == worker.STREAM_STEPS
            assert one["resumed"] == one["whole"][worker.SAVED :], f"{name}: goes on in the middle of an epoch"


def test_a_streamed_text_has_the_blocks_of_the_loaded_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    run_clm = importlib.import_module("run_clm")
    for name in ("train", "validation"):
        (tmp_path / f"{name}.txt").write_text("".join(f"line {i} of the {name} text\n" for i in range(200)))
    files = {f"{name}_file": str(tmp_path / f"{name}.txt") for name in ("train", "validation")}
    given = run_clm.StreamArguments(**files, block_size=16, streaming=True)
    tokenizer = data.characters([given.load()["train"][0]["text"], *"0123456789validation"])
    blocks = run_clm.stream_blocks(given.stream(), tokenizer, given)
    loaded = data.blocks(given.load(), tokenizer, block_size=16)
    assert [row["input_ids"] for row in blocks["validation"]] == loaded["validation"]["input_ids"][:]
    shuffled = [row["input_ids"] for row in blocks["train"]]
    assert shuffled != loaded["train"]["input_ids"][:]
    assert sorted(shuffled) == sorted(loaded["train"]["input_ids"])
    with pytest.raises(ValueError, match="A stream can't be split: give --train_file and --validation_file"):
        run_clm.StreamArguments(train_file=files["train_file"]).stream()


@pytest.mark.slow
def test_the_example_on_two_processes_with_a_stream(tmp_path):
    """From a checkpoint in mid-epoch too, with the losses of the whole run."""
    flags = ["--smoke", "--streaming", "true", "--use_cpu", "true", "--disable_tqdm", "true", "--output_dir"]
    script = str(EXAMPLES / "run_clm.py")
    launch(*flags, tmp_path / "whole", script=script)
    resume = ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-2"]
    launch(*flags, tmp_path / "again", *resume, script=script)
    states = [json.loads((tmp_path / run / "trainer_state.json").read_text()) for run in ("whole", "again")]
    losses = [[entry["loss"] for entry in state["log_history"] if "loss" in entry] for state in states]
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "whole").config.hidden_size == 32


@pytest.mark.slow
def test_the_example_in_shards_leaves_a_whole_model(tmp_path):
    """And evaluates as with whole models. Without Muon: Trainer takes no optimizer of one's own with shards."""
    script = str(EXAMPLES / "run_clm.py")
    flags = ["--smoke", "--use_cpu", "true", "--disable_tqdm", "true", "--muon_learning_rate", "0"]
    flags += ["--save_strategy", "no", "--output_dir"]
    launch(*flags, tmp_path / "ddp", script=script)
    launch(script, "fsdp-example", *flags, tmp_path / "fsdp", "--fsdp")
    losses = [json.loads((tmp_path / run / "all_results.json").read_text())["eval_loss"] for run in ("ddp", "fsdp")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    batch = torch.arange(40).view(2, 20)
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(tmp_path / run).eval() for run in ("ddp", "fsdp")]
        logits = [model(batch).logits for model in models]
    assert_close(logits[1], logits[0])


# Every weight


@pytest.mark.parametrize(
    "fields",
    [
        {"halting": "learned"},
        {"feedback_axis": "time", "solver": "jacobi", "feedback_connection": "memory"},
        {"CLASSIFIER": True, "feedback_signal": "output"},
    ],
    ids=["halting", "memory", "classifier"],
)
def test_a_single_pass_gives_every_weight_a_gradient(fields):
    """DDP waits for all of them, and what only a second pass reads has a gradient of zero."""
    classifier = "CLASSIFIER" in fields
    fields = {name: value for name, value in fields.items() if not name.isupper()}
    head = FeedbackForSequenceClassification if classifier else FeedbackForCausalLM
    model, batch = build(head, feedback_type="transformer", **fields).train(), tokens(2, 7)
    labels = torch.tensor([0, 1]) if classifier else batch
    model(batch, labels=labels, num_feedback_steps=1).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_the_losses_of_unequal_parts_add_up_to_that_of_the_batch(problem):
    model, batch = build(FeedbackForSequenceClassification, problem_type=problem, num_labels=3), tokens(5, 7)
    labels = torch.tensor([0, 1, 2, 1, 0])
    if problem != "single_label_classification":
        labels = torch.nn.functional.one_hot(labels, 3).float()
    whole = model(batch, labels=labels).loss
    items = {"num_items_in_batch": labels.numel()}
    parts = [model(batch[rows], labels=labels[rows], **items).loss for rows in (slice(0, 3), slice(3, 5))]
    assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-6)


# Configs


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_configs_load(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8 * config.num_machines
    assert config.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    launched(path)  # what `accelerate launch` checks


def launched(path: Path):
    """The arguments of `accelerate launch --config_file path`, read and checked by accelerate itself."""
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    arguments, config, _ = _validate_launch_command(arguments)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    return arguments


def test_fsdp_config_shards_the_loop_as_one_unit(monkeypatch):
    """As the processes that accelerate starts read it: the loop's weights are gathered once, not at every pass."""
    for name, value in prepare_multi_gpu_env(launched(CONFIGS / "fsdp2.yaml")).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, False)
    plugin.set_auto_wrap_policy(model := build(feedback_type="transformer"))
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert [name for name, module in model.named_modules() if policy(module)] == ["model.loop"]


def test_deepspeed_config_is_zero_3(monkeypatch):
    for name, value in prepare_deepspeed_cmd_env(launched(CONFIGS / "deepspeed_zero3.yaml"))[1].items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 3 and plugin.hf_ds_config.is_zero3() and not plugin.hf_ds_config.is_offload()
    plugin.set_mixed_precision("bf16")
    sizes = {"train_micro_batch_size_per_gpu": 4, "train_batch_size": 32, "gradient_clipping": 1.0}
    plugin.deepspeed_config_process(must_match=False, **sizes)  # refuses what is left at "auto"
    assert plugin.deepspeed_config["bf16"] == {"enabled": True} and plugin.deepspeed_config["train_batch_size"] == 32


def test_every_config_is_described():
    readme = (CONFIGS.parent / "README.md").read_text()
    names = {path.name for path in CONFIGS.glob("*.yaml")}
    assert names == {"single_node.yaml", "several_nodes.yaml", "fsdp2.yaml", "deepspeed_zero3.yaml"}
    assert all(f"accelerate/{name}" in readme for name in names)
