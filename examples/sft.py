"""Teach a feedback language model to answer in chats, by TRL's SFTTrainer, which takes it as it is.

    python examples/sft.py --smoke
    python examples/sft.py --model_name_or_path runs/clm --train_file chats.jsonl

A line of chats.jsonl is one chat: {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}.
The loss is taken on the answers only (`assistant_only_loss`). For that the chat template marks them with
{% generation %} tags. Needs `pip install feedback_transformers[train,chats]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from feedback_transformers import data
from feedback_transformers.training import StopOnNonFinite, scripts

from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

RECIPE = scripts.recipes.CHATS
# Each message is a line that begins with its role. What stands between the generation tags is learned.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}"
    "assistant: {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}{{ message.role }}: {{ message.content }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@dataclass
class ChatConfig(SFTConfig):
    """TRL's flags, without the one that ModelArguments has too."""

    trust_remote_code: bool = field(default=False, init=False)


def sums() -> DatasetDict:
    """Make chats about sums, for a run without data of your own."""
    chats = [
        [{"role": "user", "content": f"{a} + {b}"}, {"role": "assistant", "content": str(a + b)}]
        for a in range(20)
        for b in range(20)
    ]
    return Dataset.from_dict({"messages": chats}).train_test_split(0.1, seed=0)


def check_chats(rows: Dataset, split: str) -> None:
    """Check that each row is a chat with an answer.

    Raises:
        ValueError: the column `messages` is missing, or a chat has no answer.
    """
    scripts.check_columns({split: rows}, texts=False, messages="messages")
    for i, chat in enumerate(rows["messages"]):
        if not any(message.get("role") == "assistant" and message.get("content") for message in chat or []):
            raise ValueError(f"Chat {i} of the {split} data has no message of the assistant: leave it out.")


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    types = (scripts.ModelArguments, scripts.DataArguments, ChatConfig)
    model_args, chat_args, training_args = scripts.parse(types, arguments, RECIPE.training, RECIPE.smoke)
    if training_args.packing or training_args.padding_free:
        raise ValueError("Several chats in one row would read each other: leave --packing and --padding_free out.")
    set_seed(training_args.seed)

    if chat_args.train_file or chat_args.dataset_name:
        chats = chat_args.load()
    else:
        chats = DatasetDict(dict(zip(("train", "validation"), sums().values(), strict=True)))
    chats = chat_args.limit(chats.select_columns("messages") if "messages" in chats["train"].column_names else chats)
    for split, rows in chats.items():
        check_chats(rows, split)

    checkpoint, options = model_args.model_name_or_path, model_args.hub_options
    if checkpoint:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, **options)
        model = model_args.load(AutoModelForCausalLM)
    else:
        written = [message["content"] for chat in chats["train"]["messages"] for message in chat]
        tokenizer = data.characters([*written, "system: user: assistant: \n"])
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        language_model = scripts.recipes.LANGUAGE_MODEL
        fields = {**language_model.sizes, "vocab_size": len(tokenizer), **ids}
        model = AutoModelForCausalLM.from_config(model_args.config(language_model.architecture, **fields))
    if "{% generation %}" not in (tokenizer.chat_template or ""):
        tokenizer.chat_template = TEMPLATE
    tokenizer.split_special_tokens = False  # the template writes the token that ends an answer
    scripts.set_max_length(tokenizer, model)
    print(f"{model.num_parameters():,} parameters, {len(chats['train']):,} chats")

    trainer = SFTTrainer(
        model,
        training_args,
        train_dataset=chats["train"],
        eval_dataset=chats["validation"],
        processing_class=tokenizer,
        callbacks=[*scripts.drawn_passes(model_args, model, training_args.do_train), StopOnNonFinite()],
    )
    metrics: dict[str, Any] = {}
    if training_args.do_train:
        scripts.record(trainer, "train", scripts.train(trainer))
    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["perplexity"] = math.exp(metrics["eval_loss"])
        trainer.args.prediction_loss_only = True
        metrics |= scripts.measure_passes(
            trainer, "perplexity", lambda: math.exp(trainer.predict(trainer.eval_dataset).metrics["test_loss"])
        )
        scripts.record(trainer, "eval", metrics)
        question = [message for message in chats["validation"][0]["messages"] if message["role"] != "assistant"]
        prompt = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        written = model.eval().generate(**prompt, max_new_tokens=40, do_sample=False)
        print(tokenizer.decode(written[0]))

    scripts.publish(
        trainer,
        tokenizer,
        {name: value for name, value in metrics.items() if name == "eval_loss" or name.startswith("perplexity")},
        name="Feedback chat model",
        dataset=chat_args.source if chat_args.train_file or chat_args.dataset_name else "sums",
        description="Answers in chats. The perplexity is that of the answers alone.",
        command=scripts.command(__file__, arguments),
    )
    return metrics


if __name__ == "__main__":
    main()
