"""Trains the cases of test_distributed.py in this process, one of as many as its environment says.

RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python tests/distributed_worker.py out ddp depth
"""

import importlib
import json
import os
import sys
from functools import cache
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments, default_data_collator

from feedback_transformers import FeedbackConfig, FeedbackForCausalLM, FeedbackForSequenceClassification, data
from feedback_transformers.models.feedback_loop import FeedbackLoop
from feedback_transformers.training import SampleFeedbackSteps, StopOnNonFinite

ROWS, STREAMED, BATCH, STEPS = (
    47,
    48,
    8,
    50,
)  # an epoch is five whole batches and one of 7 rows, 4 and 3 on two processes
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 32}
LAYERS = {"num_encoder_layers": 1, "num_feedback_layers": 2, "num_decoder_layers": 1}
TIME = {"feedback_axis": "time"}
JACOBI = {**TIME, "solver": "jacobi", "feedback_type": "transformer"}
LAYER = ["LlamaDecoderLayer"]  # what FSDP shards as a unit, in place of the loop

# Fields of FeedbackConfig; and in capitals what is not one.
CASES = {
    "depth": {"feedback_type": "transformer", "supervision": "all", "SAMPLED": (1, 4), "CHECKPOINTED": True},
    "jacobi": {**JACOBI, "feedback_signal": "output", "supervision": "all", "SAMPLED": (1, 4), "ACCUMULATED": 2},
    "sequential": {**TIME, "feedback_type": "transformer", "ACCUMULATED": 2, "CHECKPOINTED": True},
    "units": {**TIME, "feedback_type": "transformer", "UNITS": LAYER},
    "memory": {**JACOBI, "feedback_connection": "memory", "SAMPLED": (1, 3)},
    "halting": {"feedback_type": "transformer", "halting": "learned", "SAMPLED": (1, 3), "CHECKPOINTED": True},
    "classifier": {"feedback_type": "gru", "feedback_signal": "output", "CLASSIFIER": True, "SAMPLED": (1, 3)},
    "lora": {"feedback_type": "transformer", "SAMPLED": (1, 4), "LORA": True},
    "repeats": {**TIME, "feedback_type": "gru", "REPEATS": True},
}


@cache
def texts(rows: int = ROWS) -> tuple:
    """Shakespeare in blocks of 16 characters, and their tokenizer."""
    plays = data.load("shakespeare")["validation"].select(range(1))
    tokenizer = data.characters(plays["text"])
    return data.blocks(plays, tokenizer, block_size=16).select(range(rows)), tokenizer


def sentences(tokenizer) -> Dataset:
    """Sentences about films, of up to 24 characters."""
    rows = data.load("movie-sentiment")["train"].select(range(ROWS))
    return Dataset.from_list(
        [
            {"input_ids": tokenizer(row["text"])["input_ids"][: 8 + i % 17], "label": row["label"]}
            for i, row in enumerate(rows)
        ]
    )


class Record(TrainerCallback):
    """The feedback steps that each training step is made with."""

    def __init__(self) -> None:
        self.steps: list[int | None] = []

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        self.steps += [module.num_steps for module in model.modules() if isinstance(module, FeedbackLoop)]


def shard_on_cpu() -> None:
    """Accelerate turns FSDP on for accelerators only; beyond that check, its code and torch's run on a CPU too."""
    make = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def train(name: str, folder: Path, processes: int = 1, sharded: bool = False) -> Trainer:
    """The case `name`: with the same global batches and weights to begin with, for any number of processes."""
    fields = {"vocab_size": 0, **SIZES, **LAYERS, **CASES[name]}
    options = {key: fields.pop(key) for key in list(fields) if key.isupper()}
    rows, tokenizer = texts()
    collator = default_data_collator
    fields |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    if options.get("CLASSIFIER"):
        model = FeedbackForSequenceClassification(FeedbackConfig(**fields, num_labels=2))
        rows, collator = sentences(tokenizer), DataCollatorWithPadding(tokenizer)
    else:
        model = FeedbackForCausalLM(FeedbackConfig(**fields))
    if options.get("LORA"):
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False))
    if options.get("REPEATS") and processes == 1:  # what accelerate does by default, to fill the last batch
        rows = Dataset.from_list([*rows.to_list(), *rows.select(range(1)).to_list()])
    accumulated = options.get("ACCUMULATED", 1)
    parts = {} if options.get("REPEATS") else {"split_batches": True, "even_batches": False}
    per_device = BATCH // accumulated // (processes if options.get("REPEATS") else 1)
    fsdp = {"reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"}
    if "UNITS" in options:
        fsdp["transformer_layer_cls_to_wrap"] = options["UNITS"]
    arguments = TrainingArguments(
        output_dir=str(folder / name),
        max_steps=STEPS,
        per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulated,
        learning_rate=3e-3,
        activation_checkpointing=bool(options.get("CHECKPOINTED")),
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        seed=5,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential" if options.get("REPEATS") else "random",
        accelerator_config=parts,
        ddp_find_unused_parameters=False,
        **({"fsdp": True, "fsdp_config": fsdp} if sharded else {}),
    )
    record = Record()
    sampled = [SampleFeedbackSteps(*options["SAMPLED"])] if "SAMPLED" in options else []
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=collator,
        processing_class=tokenizer,
        callbacks=[record, *sampled, StopOnNonFinite()],
    )
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"losses": losses, "steps": record.steps}
    (folder / f"{name}-{trainer.args.process_index}.json").write_text(json.dumps(result))
    return trainer


STREAM_STEPS, SAVED = 9, 4  # of 4 rows for each of two processes: an epoch of 48 rows and a half


def stream(name: str, folder: Path) -> None:
    """Trains on a stream, and again from a checkpoint in mid-epoch; writes the rows that this process saw each time.

    `dispatched`: the first process reads for all, which is accelerate's default. `sharded`: each reads shards of its
    own. `split`: a loop of one's own over datasets' split by process, whose place is kept in its state.
    """
    rows = texts(STREAMED)[0].select_columns(["input_ids", "labels"]).to_iterable_dataset(num_shards=2)
    run = stream_split if name == "split" else stream_trainer
    whole, resumed = run(rows, folder / name, name, 0), run(rows, folder / name, name, SAVED)
    rank = os.environ["RANK"]
    (folder / f"{name}-{rank}.json").write_text(json.dumps({"whole": whole, "resumed": resumed}))


def stream_trainer(rows: IterableDataset, folder: Path, name: str, done: int) -> list[list[list[int]]]:
    seen: list[list[list[int]]] = []
    torch.manual_seed(0)
    model = FeedbackForCausalLM(FeedbackConfig(vocab_size=200, **SIZES, feedback_type="mlp"))
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STREAM_STEPS,
        per_device_train_batch_size=4,
        save_steps=SAVED,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        accelerator_config={"dispatch_batches": False} if name == "sharded" else {},
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{done}") if done else None)
    return seen


def stream_split(rows: IterableDataset, folder: Path, name: str, done: int) -> list[list[list[int]]]:
    accelerator = Accelerator(cpu=True)
    mine = split_dataset_by_node(rows, accelerator.process_index, accelerator.num_processes)
    state = folder / f"stream-{accelerator.process_index}.pt"  # a place of its own for each process
    folder.mkdir(exist_ok=True)
    if done:
        mine.load_state_dict(torch.load(state))
    seen, epoch = [], 0
    while done + len(seen) < STREAM_STEPS:
        mine.set_epoch(epoch)
        for batch in DataLoader(mine, batch_size=4, collate_fn=default_data_collator):
            seen.append(batch["input_ids"].tolist())
            if done + len(seen) == SAVED:
                torch.save(mine.state_dict(), state)
            if done + len(seen) == STREAM_STEPS:
                break
        epoch += 1
    return seen


def main(folder: str, engine: str, *names: str) -> None:
    torch.set_num_threads(1)
    if "fsdp" in engine:
        shard_on_cpu()
    if engine == "fsdp-example":
        sys.path.insert(0, str(Path(folder).parent))
        importlib.import_module(Path(folder).stem).main(names)
        return
    for name in names:
        if engine == "stream":
            stream(name, Path(folder))
        else:
            train(name, Path(folder), int(os.environ["WORLD_SIZE"]), sharded=engine == "fsdp")
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
