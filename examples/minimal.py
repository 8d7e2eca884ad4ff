"""Train a small feedback language model on Python's own manual and let it write: about a minute on one CPU core.

python examples/minimal.py
"""

from pydoc_data.topics import topics

from feedback_transformers import FeedbackConfig, FeedbackForCausalLM, data
from feedback_transformers.training import SampleFeedbackSteps

import torch

# The text, a token per character, cut into blocks.
from datasets import Dataset
from transformers import Trainer, TrainingArguments

texts = Dataset.from_dict({"text": [text for name, text in sorted(topics.items()) if len(text) > 2000]})
tokenizer = data.characters(texts["text"])
blocks = data.blocks(texts, tokenizer, block_size=64)
split = blocks.train_test_split(test_size=64, seed=0)

# h_t = f(c(e, h_{t-1})): one encoder layer, one layer that runs four times and reads its own last state, one decoder.
config = FeedbackConfig(
    vocab_size=len(tokenizer),
    hidden_size=96,
    num_attention_heads=4,
    feedback_axis="depth",  # a step is one more pass over the whole text
    feedback_type="transformer",
    num_feedback_steps=4,
    pad_token_id=tokenizer.pad_token_id,
)
model = FeedbackForCausalLM(config)
print(f"{model.num_parameters():,} parameters, {len(split['train']):,} blocks of 64 characters")

# Each training step makes another number of passes, so that the model works with any of them.
trainer = Trainer(
    model,
    TrainingArguments("runs/minimal", max_steps=400, learning_rate=4e-3, warmup_steps=20, save_strategy="no"),
    train_dataset=split["train"],
    eval_dataset=split["test"],
    callbacks=[SampleFeedbackSteps(1, 6)],
)
trainer.train()

# More passes, same weights: the loss after each number of them.
model.eval()
held_out = torch.tensor(split["test"]["input_ids"])
for passes in (1, 2, 4, 6):
    with torch.no_grad():
        loss = model(held_out, labels=held_out, num_feedback_steps=passes).loss
    print(f"{passes} passes: validation loss {loss:.3f}")

# Writing, saving and loading are those of every model of transformers.
prompt = tokenizer("The ", return_tensors="pt", return_token_type_ids=False)
written = model.generate(**prompt, max_new_tokens=80, do_sample=True, temperature=0.7, num_feedback_steps=4)
print(tokenizer.decode(written[0]))
model.save_pretrained("runs/minimal")
tokenizer.save_pretrained("runs/minimal")
