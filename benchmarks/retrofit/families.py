"""Make families of reasoning tasks whose number of steps can be set, as texts that one more token answers.

    chains  3 steps   Let q = t. X = 2. ... c = 8. t = c. q =                     -> 8
    cups    2 steps   ball 3. swap 2 4. swap 3 1. ball                          -> 1
    sums    2 steps   mod 10: 3 + 8 + 5 =                                       -> 6
    swaps   2 steps   In line: Tom, Ann, Sam, Bob, Eve. swap Ann and Bob. swap Eve and Ann. The second is -> Bob

The texts fit the tokenizer of SmolLM2. It makes two tokens of a space and a digit, but one of " Bob", so a prompt
whose answer is a digit ends with the space. All prompts of a family and a number of steps have the same number of
tokens.

Training and test never share a prompt: a hash of its text sends every fifth prompt to the test. Seeds below TEST_SEED
draw from the prompts for training, the others from those for the test. Prompts may repeat, and do where there are few:
cups and sums with one step have only 100, so the answers in their test are uneven.

Shapes: N examples, T positions.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from benchmarks.tasks.runner import IGNORED, TEST_SEED

CHAINS = 3
NAMES = string.ascii_letters + "&@"  # names of variables: 3 chains of 18 need 54, one token each
CUPS = "12345"
PEOPLE = ("Ann", "Bob", "Eve", "Sam", "Tom")
PLACES = ("first", "second", "third", "fourth", "fifth")


class Example(NamedTuple):
    prompt: str
    answer: str  # one token, right behind the prompt
    states: tuple[tuple[int, str], ...] = ()  # training only: what holds behind so many characters, one token each


@dataclass(frozen=True)
class Family:
    make: Callable[[random.Random, int], Example]  # makes an example with that many steps
    # The accuracy of a guess among the possible answers. To leave cups or people where they began is right more often,
    # in 1/5 + 4/5 / 2**steps of the cases.
    chance: float
    chunk: int = 6  # tokens of about one step
    local: bool = False  # whether the state behind a step follows from the state before it and the step's own text

    def examples(self, steps: int, number: int, seed: int) -> list[Example]:
        """Return `count` examples, the same at every call; from the test where the seed is TEST_SEED or more."""
        if steps < 1:
            raise ValueError(f"steps is {steps}, but must be at least 1.")
        generator = random.Random(f"{steps} {seed}")
        found: list[Example] = []
        while len(found) < number:
            example = self.make(generator, steps)
            if for_test(example.prompt) == (seed >= TEST_SEED):
                found.append(example)
        return found


def for_test(prompt: str) -> bool:
    return zlib.crc32(prompt.encode()) % 5 == 0


def chains(generator: random.Random, steps: int) -> Example:
    """Ask for the value of the last variable of one of 3 chains, each of `steps` assignments, in any order."""
    letters, most = NAMES, len(NAMES) // CHAINS
    if steps > most:
        raise ValueError(f"steps is {steps}, but there are names for {CHAINS} chains of at most {most}.")
    names, values = generator.sample(letters, CHAINS * steps), generator.sample(string.digits, CHAINS)
    statements = []
    for i, value in enumerate(values):
        chain = [value, *names[i * steps : (i + 1) * steps]]
        statements += [f"{name} = {source}." for source, name in pairwise(chain)]
    generator.shuffle(statements)
    return Example(f"Let {' '.join(statements)} {names[steps - 1]} = ", values[0])


def cups(generator: random.Random, steps: int) -> Example:
    """Ask for the cup, one of 5, that holds the ball after `steps` swaps of two cups."""
    start, pairs = generator.choice(CUPS), [generator.sample(CUPS, 2) for _ in range(steps)]
    text = f"ball {start}."
    states = [(len(text), start)]
    for i, (one, other) in enumerate(pairs):
        text += f" swap {one} {other}."
        states.append((len(text), follow(start, pairs[: i + 1])))
    return Example(f"{text} ball ", states[-1][1], tuple(states))


def sums(generator: random.Random, steps: int) -> Example:
    """Ask for the sum modulo 10 of `steps` + 1 digits."""
    digits = [generator.randrange(10) for _ in range(steps + 1)]
    text = f"mod 10: {digits[0]}"
    states = [(len(text), str(digits[0]))]
    for i in range(1, len(digits)):
        text += f" + {digits[i]}"
        states.append((len(text), str(sum(digits[: i + 1]) % 10)))
    return Example(f"{text} = ", states[-1][1], tuple(states))


def swaps(generator: random.Random, steps: int) -> Example:
    """Ask who, of 5 people in a line, stands at a place after `steps` swaps of two people.

    The place is named at the end, so that all places have to be followed up to there.
    """
    line, place = generator.sample(PEOPLE, len(PEOPLE)), generator.randrange(len(PLACES))
    pairs = [generator.sample(PEOPLE, 2) for _ in range(steps)]
    swaps = " ".join(f"swap {one} and {other}." for one, other in pairs)
    return Example(f"In line: {', '.join(line)}. {swaps} The {PLACES[place]} is", f" {follow(line[place], pairs)}")


def follow(at: str, pairs: list[list[str]]) -> str:
    """Return the cup that holds the ball, or the person who stands at a place, after the swaps."""
    for one, other in pairs:
        at = {one: other, other: one}.get(at, at)
    return at


FAMILIES = {
    "chains": Family(chains, chance=1 / CHAINS),
    "cups": Family(cups, chance=1 / len(CUPS), local=True),
    "sums": Family(sums, chance=1 / 10, chunk=3, local=True),
    "swaps": Family(swaps, chance=1 / len(PEOPLE)),
}


def encode(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, with_states: bool = False
) -> dict[str, Tensor]:
    """Encode prompts and answers, padded on the right: `input_ids`, `attention_mask` and `labels`, all [N, T].

    The label of an answer is at its own position, as models with a causal loss expect it. The other labels are
    IGNORED. With states, they are from the first state on what holds behind the token before.
    """
    prompts = tokenizer([example.prompt for example in examples], add_special_tokens=False)["input_ids"]
    wholes = tokenizer([e.prompt + e.answer for e in examples], add_special_tokens=False)["input_ids"]
    for example, prompt, whole in zip(examples, prompts, wholes, strict=True):
        if whole[:-1] != prompt:
            raise ValueError(f"The answer {example.answer!r} is not one token behind {example.prompt!r}.")
    rows = [torch.tensor(whole) for whole in wholes]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    answers = attention_mask.sum(1, keepdim=True) - 1  # [N, 1]
    labels = torch.full_like(input_ids, IGNORED).scatter(1, answers, input_ids.gather(1, answers))
    for row, (prompt, _, states) in enumerate(examples if with_states else ()):
        for length, state in states:
            before = tokenizer(prompt[:length], add_special_tokens=False)["input_ids"]
            [label] = tokenizer(state, add_special_tokens=False)["input_ids"]
            labels[row, len(before) : int(answers[row])] = label  # up to the next one
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@torch.no_grad()
def accuracy(
    model: Any,
    examples: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
    **arguments: Any,
) -> float:
    """Return the share of examples where the answer is the likeliest token of all behind the prompt.

    `arguments` go to the model, `batch` examples at a time. The model does not see the answers.
    """
    right = 0
    for start in range(0, len(examples), batch):
        encoded = encode(examples[start : start + batch], tokenizer).values()
        input_ids, attention_mask, labels = (tensor.to(model.device) for tensor in encoded)
        answers = labels != IGNORED
        seen = {
            "input_ids": input_ids.masked_fill(answers, tokenizer.pad_token_id)[:, :-1],
            "attention_mask": attention_mask.masked_fill(answers, 0)[:, :-1],
        }
        # Only the logits of these positions, which most examples share: all would be 49,152 for each token.
        last, column = (answers.long().argmax(1) - 1).unique(return_inverse=True)
        logits = model(**seen, use_cache=False, logits_to_keep=last, **arguments).logits
        guesses = logits[torch.arange(len(column)), column].argmax(-1)
        right += int((guesses == labels[answers]).sum())
    return right / len(examples)
