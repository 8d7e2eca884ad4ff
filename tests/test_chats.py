"""Chats: the template marks the answers, and TRL's SFTTrainer takes the loss there only."""

import json

import pytest
import torch
from conftest import build
from datasets import Dataset
from test_examples import examples_on_path, run  # noqa: F401 - a fixture
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from feedback_transformers import data

CHATS = [
    [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "why"},
        {"role": "assistant", "content": "so"},
    ],
    [{"role": "user", "content": "hi there, you"}, {"role": "assistant", "content": "no"}],
]


def test_the_loss_is_on_the_answers_only(tmp_path):
    """Against cross entropy of the tokens between the tags, and of what ends an answer."""
    import sft

    tokenizer = data.characters(["system: user: assistant: \nbe brief hi there, you why yes so no"])
    tokenizer.chat_template, tokenizer.split_special_tokens = sft.TEMPLATE, False
    model = build(vocab_size=len(tokenizer))
    fields = {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "disable_tqdm": True}
    arguments = SFTConfig(str(tmp_path), assistant_only_loss=True, packing=False, **fields)
    rows = Dataset.from_dict({"messages": CHATS})
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    learned = [tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learned == ["yes</s>so</s>", "no</s>"]
    with torch.no_grad():
        outputs = model.eval()(**batch)
    expected = torch.nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100
    )
    assert outputs.loss.item() == pytest.approx(expected.item(), abs=1e-6)


def write(path, chats) -> str:
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return str(path)


def test_a_file_of_chats(tmp_path):
    run("sft", "--train_file", write(tmp_path / "chats.jsonl", CHATS * 12), "--output_dir", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = tokenizer.apply_chat_template(CHATS[1][:1], add_generation_prompt=True, tokenize=False)
    assert text == "user: hi there, you\nassistant: "
    ended = tokenizer.apply_chat_template(CHATS[1], return_dict=True)["input_ids"]
    assert tokenizer.eos_token_id in ended and tokenizer.model_max_length == 2048
    assert "chats.jsonl" in (tmp_path / "out" / "README.md").read_text()


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="would read each other: leave --packing and --padding_free out"):
        run("sft", "--packing", "true", "--output_dir", tmp_path)
    with pytest.raises(ValueError, match="has no message of the assistant"):
        run("sft", "--train_file", write(tmp_path / "a.jsonl", [CHATS[0][:2]] * 20), "--output_dir", tmp_path)
    (tmp_path / "b.jsonl").write_text('{"chat": []}\n' * 20)
    with pytest.raises(ValueError, match="no column 'messages', only 'chat'"):
        run("sft", "--train_file", tmp_path / "b.jsonl", "--output_dir", tmp_path)
