"""The families of benchmarks/retrofit against simulations of their text, with tokenizers made here."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from benchmarks.retrofit.families import FAMILIES, Example, accuracy, encode, for_test
from benchmarks.tasks.runner import IGNORED, TEST_SEED
from feedback_transformers import data

each_family = pytest.mark.parametrize("family", FAMILIES)
STEPS = [1, 2, 3, 8, 18]
ANSWERS = {name: [*"0123456789"] for name in ("chains", "sums")} | {
    "cups": [*"12345"],
    "swaps": [" Ann", " Bob", " Eve", " Sam", " Tom"],
}


def chains(prompt: str) -> tuple[str, int]:
    """The answer and the number of steps to it, as for the other families."""
    statements, asked = re.fullmatch(r"Let ((?:\S = \S\. )+)(\S) = ", prompt).groups()
    pairs = re.findall(r"(\S) = (\S)", statements)
    sources = dict(pairs)
    assert len(sources) == len(pairs)
    ends = sources.keys() - set(sources.values())
    reached = {}
    for name in ends:
        at, steps = name, 0
        while not at.isdigit():
            at, steps = sources[at], steps + 1
        reached[name] = at, steps
    assert len(ends) == 3 and len({value for value, _ in reached.values()}) == 3
    assert len({steps for _, steps in reached.values()}) == 1
    return reached[asked]


def cups(prompt: str) -> tuple[str, int]:
    assert re.fullmatch(r"ball [1-5]\. (swap [1-5] [1-5]\. )+ball ", prompt)
    balls = [str(cup) in prompt[:6] for cup in range(1, 6)]
    moves = re.findall(r"swap (\d) (\d)", prompt)
    for one, other in moves:
        assert one != other
        i, j = int(one) - 1, int(other) - 1
        balls[i], balls[j] = balls[j], balls[i]
    return str(balls.index(True) + 1), len(moves)


def sums(prompt: str) -> tuple[str, int]:
    expression = re.fullmatch(r"mod 10: (\d(?: \+ \d)+) = ", prompt)[1]
    return str(eval(expression) % 10), expression.count("+")


def swaps(prompt: str) -> tuple[str, int]:
    line, moves, place = re.fullmatch(r"In line: (.+?)\. (.+\.) The (\w+) is", prompt).groups()
    standing = line.split(", ")
    assert sorted(standing) == ["Ann", "Bob", "Eve", "Sam", "Tom"]
    pairs = re.findall(r"swap (\w+) and (\w+)\.", moves)
    for one, other in pairs:
        assert one != other
        i, j = standing.index(one), standing.index(other)
        standing[i], standing[j] = other, one
    return " " + standing[["first", "second", "third", "fourth", "fifth"].index(place)], len(pairs)


SIMULATIONS = {"chains": chains, "cups": cups, "sums": sums, "swaps": swaps}


@each_family
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("seed", [0, TEST_SEED])
def test_answers(family, steps, seed):
    for prompt, answer, _ in FAMILIES[family].examples(steps, 200, seed):
        assert SIMULATIONS[family](prompt) == (answer, steps)


@pytest.mark.parametrize(("family", "ending"), [("cups", " ball "), ("sums", " = ")])
def test_states_are_the_answers_of_shorter_prompts(family, ending):
    for prompt, answer, states in FAMILIES[family].examples(6, 50, 0):
        told = [SIMULATIONS[family](prompt[:length] + ending) for length, _ in states[1:]]
        assert told == [(state, steps) for steps, (_, state) in enumerate(states[1:], start=1)]
        assert len(told) == 6 and told[-1][0] == answer
        assert prompt[: states[0][0]].rstrip(".").endswith(states[0][1])


def test_labels_of_states():
    tokenizer = tokenizer_of("sums")
    [example] = FAMILIES["sums"].examples(3, 1, 0)
    [labels] = encode([example], tokenizer, with_states=True)["labels"]
    told = [tokenizer.decode(label) if label != IGNORED else "" for label in labels]  # a token a character
    starts = [length for length, _ in example.states]
    expected = ["" if i < starts[0] else "".join(s for n, s in example.states if n <= i)[-1] for i in range(len(told))]
    assert told == expected and len(starts) == 4


@each_family
def test_examples_are_seeded(family):
    one, same, other = (FAMILIES[family].examples(5, 50, seed) for seed in (3, 3, 4))
    assert one == same != other
    assert FAMILIES[family].examples(5, 20, 3) == one[:20]


@each_family
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_training_and_test_share_no_prompt(family, steps):
    train, test = ({e.prompt for e in FAMILIES[family].examples(steps, 1000, seed)} for seed in (1, TEST_SEED + 1))
    assert train and test and train.isdisjoint(test)
    assert not any(map(for_test, train)) and all(map(for_test, test))


@each_family
@pytest.mark.parametrize("seed", [0, TEST_SEED])
def test_answers_are_uniform(family, seed):
    counts = Counter(example.answer for example in FAMILIES[family].examples(6, 3000, seed))
    assert sorted(counts) == ANSWERS[family]
    assert all(abs(count * len(counts) / 3000 - 1) < 0.25 for count in counts.values())


def test_order_and_digits_of_chains_do_not_tell_the_answer():
    ranks: dict[str, Counter] = {"in the text": Counter(), "by value": Counter()}
    for prompt, answer, _ in FAMILIES["chains"].examples(4, 1500, 0):
        digits = re.findall(r"\d", prompt)
        ranks["in the text"][digits.index(answer)] += 1
        ranks["by value"][sorted(digits).index(answer)] += 1
    for counts in ranks.values():
        assert all(abs(counts[rank] / 1500 - FAMILIES["chains"].chance) < 0.05 for rank in range(3))


@pytest.mark.parametrize("family", ["cups", "swaps"])
@pytest.mark.parametrize("steps", [2, 6])
def test_leaving_it_where_it_was_is_right_as_often_as_documented(family, steps):
    examples, right = FAMILIES[family].examples(steps, 3000, 0), 0
    for prompt, answer, _ in examples:
        unmoved = re.sub(r"swap.*?\. ", "", prompt)
        if family == "cups":
            right += unmoved[5] == answer
        else:
            place = ["first", "second", "third", "fourth", "fifth"].index(unmoved.split()[-2])
            right += re.findall("[A-Z]..", unmoved.partition(":")[2])[place] == answer.strip()
    assert right / 3000 == pytest.approx(1 / 5 + 4 / 5 / 2**steps, abs=0.04)


@each_family
def test_chance(family):
    assert FAMILIES[family].chance == 1 / {"chains": 3}.get(family, len(ANSWERS[family]))


@pytest.mark.parametrize(("family", "steps", "message"), [("sums", 0, "at least 1"), ("chains", 19, "at most 18")])
def test_steps_out_of_range(family, steps, message):
    with pytest.raises(ValueError, match=f"steps is {steps}, but .*{message}"):
        FAMILIES[family].examples(steps, 1, 0)


def tokenizer_of(family: str):
    """Of characters, or of words where the answers are some."""
    texts = [e.prompt + e.answer for e in FAMILIES[family].examples(4, 50, 0)]
    return data.subwords(texts, 320) if family == "swaps" else data.characters(texts)


def mixed(family: str) -> list[Example]:
    """Of different lengths, the longest in the middle."""
    return [example for steps in (2, 5, 3) for example in FAMILIES[family].examples(steps, 4, TEST_SEED)]


@each_family
def test_encode(family):
    tokenizer, examples = tokenizer_of(family), mixed(family)
    encoded = encode(examples, tokenizer)
    assert list(encoded) == ["input_ids", "attention_mask", "labels"]
    assert len({tensor.shape for tensor in encoded.values()}) == 1
    for (prompt, answer, _), ids, mask, labels in zip(examples, *encoded.values(), strict=True):
        length = int(mask.sum())
        assert mask[:length].all() and not mask[length:].any()
        assert tokenizer.decode(ids[:length]) == prompt + answer
        assert (ids[length:] == tokenizer.pad_token_id).all()
        assert (labels != IGNORED).nonzero().tolist() == [[length - 1]]
        assert tokenizer.decode(labels[length - 1 : length]) == answer


def test_encode_wants_answers_of_one_token():
    with pytest.raises(ValueError, match="The answer ' Eve' is not one token behind 'The first is'"):
        encode([Example("The first is", " Eve")], data.characters(["The first is Eve"]))


class Oracle:
    """Answers, at the last position of a prompt, what it is told to; elsewhere always the same."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, examples: list[Example]) -> None:
        self.tokenizer, self.answers, self.given = tokenizer, {e.prompt: e.answer for e in examples}, []

    def __call__(self, input_ids, attention_mask, use_cache, logits_to_keep, **arguments):
        assert use_cache is False
        self.given.append((len(input_ids), arguments))
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for row, mask, scores in zip(input_ids, attention_mask, logits, strict=True):
            length = int(mask.sum())
            answer = self.answers[self.tokenizer.decode(row[:length])]  # the answer itself must not be among them
            assert (row[length:] == self.tokenizer.pad_token_id).all()
            scores[length - 1, self.tokenizer(answer)["input_ids"][0]] = 1.0
        return SimpleNamespace(logits=logits[:, logits_to_keep])


@each_family
@pytest.mark.parametrize("wrong", [0, 3])
def test_accuracy(family, wrong):
    tokenizer, examples = tokenizer_of(family), mixed(family)
    answers = ANSWERS[family]
    changed = [Example(prompt, answers[answers.index(answer) - 1]) for prompt, answer, _ in examples[:wrong]]
    oracle = Oracle(tokenizer, changed + examples[wrong:])
    assert accuracy(oracle, examples, tokenizer, batch=5, num_feedback_steps=7) == 1 - wrong / len(examples)
    assert oracle.given == [(rows, {"num_feedback_steps": 7}) for rows in (5, 5, 2)]
