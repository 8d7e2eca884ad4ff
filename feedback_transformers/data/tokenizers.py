"""Make tokenizers from a text, and the blocks of tokens that a language model trains on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    AnyDataset = TypeVar("AnyDataset", Dataset, DatasetDict)

SPECIAL_TOKENS = ["<pad>", "<unk>", "<s>", "</s>"]


def characters(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per character of `texts`, after the special tokens <pad>, <unk>, <s>, </s>."""
    from tokenizers import Tokenizer, decoders, models

    alphabet = sorted(set().union(*texts))
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS + alphabet)}
    # BPE without merges leaves characters, at twice the speed of a split into words of one letter.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return _fast(tokenizer)


def subwords(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on `texts`, with the special tokens of `characters`: no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}, but the bytes and the special tokens alone are {smallest}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _fast(tokenizer)


def _fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,  # a text which happens to spell "<s>" is still only text
    )


def blocks(
    dataset: AnyDataset, tokenizer: PreTrainedTokenizerBase, block_size: int, column: str = "text"
) -> AnyDataset:
    """Join the tokens of all texts and cut them into `input_ids` [block_size], with `attention_mask` and `labels`.

    The labels are the input_ids: causal models of transformers shift them. Unlike the `group_texts` of run_clm.py it
    drops tokens only once, at the end, and not once per 1,000 rows.
    """
    from datasets import Dataset, DatasetDict

    if isinstance(dataset, DatasetDict):
        return DatasetDict({name: blocks(part, tokenizer, block_size, column) for name, part in dataset.items()})
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"Give a data set with a column of texts, not a {type(dataset).__name__}: "
            f"datasets.Dataset.from_dict({{'{column}': texts}}) makes one of a list."
        )
    if block_size < 1:
        raise ValueError(f"block_size is {block_size}, but must be at least 1.")
    split = f" {dataset.split}" if dataset.split else ""
    if len(dataset) == 0:
        raise ValueError(f"The{split} data set is empty: there is nothing to cut into blocks.")
    tokens = np.concatenate(
        [np.asarray(tokenizer(text, verbose=False)["input_ids"], dtype=np.int64) for text in dataset[column]]
    )
    count = len(tokens) // block_size
    if count == 0:
        raise ValueError(
            f"The{split} texts have {len(tokens)} tokens, less than one block of {block_size}: "
            "choose a smaller block_size or give more text."
        )
    input_ids = tokens[: count * block_size].reshape(count, block_size)
    columns = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids, dtype=np.int8), "labels": input_ids}
    return Dataset.from_dict(columns, split=dataset.split)
