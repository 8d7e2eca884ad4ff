"""What all tests share: a real small text, tiny configs, and the combinations that one body is run over."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pydoc_data.topics
from collections import Counter
from itertools import product

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

from feedback_transformers import PRESETS, FeedbackConfig, FeedbackForCausalLM
from feedback_transformers.models import feedback_names, feedback_registry
from feedback_transformers.models.feedback_cells import CELLS
from feedback_transformers.models.feedback_decoders import DECODERS
from feedback_transformers.models.feedback_encoders import ENCODERS

torch.set_num_threads(1)

TEXT = "".join(pydoc_data.topics.topics[name] for name in ("assert", "assignment", "booleans", "comparisons"))
PAD, BOS, EOS, MASK, UNKNOWN = range(5)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<mask>", "<unk>"]
CHARACTERS = [character for character, _ in Counter(TEXT).most_common(45)]
VOCABULARY = {token: i for i, token in enumerate(SPECIAL + CHARACTERS)}
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    """Accelerate keeps the precision of the first Trainer for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def registries():
    """Take back what a test has registered, so that no other test sees it."""
    kept = [
        (registry, dict(registry))
        for registry in (
            *feedback_registry.REGISTRIES.values(),
            *(feedback_registry.RECURRENCES, feedback_names.REGISTERED, feedback_names.CHOICES),
        )
    ]
    lists = feedback_names.RECURRENT_TYPES, feedback_names.SOLVERS_IN_PASSES
    before_lists = [list(names) for names in lists]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)
    for names, held in zip(lists, before_lists, strict=True):
        names[:] = held


def encode(text: str) -> list[int]:
    return [VOCABULARY.get(character, UNKNOWN) for character in text]


def tokens(batch: int = 2, length: int = 13, start: int = 0) -> Tensor:
    """Rows [batch, length] of the text."""
    ids = torch.tensor(encode(TEXT[start : start + batch * length]))
    return ids.view(batch, length)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        mask_token="<mask>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "num_feedback_steps": 3,
    "initializer_range": 0.1,  # large enough that no part of a fresh model can be ignored unnoticed
    "pad_token_id": PAD,
    "bos_token_id": BOS,
}


def tiny(**fields) -> FeedbackConfig:
    return FeedbackConfig(**{**SIZES, **fields})


def build(head=FeedbackForCausalLM, **fields):
    """A fresh model of a tiny config, with no biases that are zero, nor a halting that is, in evaluation mode."""
    torch.manual_seed(0)
    model = head(tiny(**fields))
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "halt_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def with_weights_of(other, **fields):
    model = build(type(other), **fields)
    model.load_state_dict(other.state_dict())
    return model


def gradients(model, batch, **arguments):
    model.zero_grad()
    model(batch, labels=batch, **arguments).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def dataset(rows: int = 32, length: int = 16) -> Dataset:
    ids = tokens(rows, length).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(folder, **fields) -> TrainingArguments:
    fields = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 4,
        "seed": 5,
        "use_cpu": True,
        "disable_tqdm": True,
        **fields,
    }
    return TrainingArguments(output_dir=str(folder), **fields)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def combinations() -> list[dict]:
    """ENCODERS x CELLS x DECODERS x axis, and time by jacobi; the signals, connections and intervals go round, so that
    each meets each cell."""
    chosen = []
    for c, cell in enumerate(CELLS):
        for k, (encoder, decoder, axis) in enumerate(product(ENCODERS, DECODERS, ("time", "depth", "jacobi"))):
            fields = {
                "encoder_type": encoder,
                "feedback_type": cell,
                "decoder_type": decoder,
                "feedback_axis": "depth" if axis == "depth" else "time",
                "feedback_signal": ("state", "output", "none")[(c + k // 3) % 3],
                "feedback_connection": ("gate", "add", "concat")[(c + k // 3 + k // 9) % 3],
            }
            if axis == "jacobi":
                if fields["feedback_signal"] == "none":
                    fields["feedback_signal"] = "state"
                fields.update(solver="jacobi", solver_steps=3)
            if axis != "depth":
                fields["feedback_interval"] = (1, 3)[(c + k // 9 + k) % 2]
            chosen.append(fields)
    return chosen


def name_of(fields: dict) -> str:
    axis = fields.get("solver", fields.get("feedback_axis"))
    if fields.get("feedback_interval", 1) > 1:
        axis += str(fields["feedback_interval"])
    parts = [fields[f"{part}_type"] for part in ("encoder", "feedback", "decoder")]
    return "-".join([*parts, axis, fields["feedback_signal"], fields["feedback_connection"]])


PRESETS_MEMORY = {**PRESETS["shared-memory"], "num_feedback_layers": 2}
COMBINATIONS = combinations()
each_combination = pytest.mark.parametrize("fields", COMBINATIONS, ids=name_of)
each_cell = pytest.mark.parametrize("cell", list(CELLS))
each_axis = pytest.mark.parametrize("axis", ["time", "depth"])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0.0)


def pad(batch: torch.Tensor, lengths: list[int], where: str) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, T] -> each row cut to its length and padded to T + 3, with tokens that would be seen if they were read."""
    rows, masks = [], []
    for row, length in zip(batch, lengths, strict=True):
        mask = torch.zeros(batch.shape[1] + 3, dtype=torch.long)
        if where == "left":
            mask[-length:] = 1
        elif where == "right":
            mask[:length] = 1
        else:
            mask[[1, 2, *range(5, 3 + length)]] = 1
        padded = torch.full_like(mask, EOS)
        padded[mask.bool()] = row[:length]
        rows.append(padded)
        masks.append(mask)
    return torch.stack(rows), torch.stack(masks)
