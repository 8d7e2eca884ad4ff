"""Every metric against a value computed by hand, or by the library that it wraps."""

import math
import socket

import evaluate
import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from feedback_transformers import metrics


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a metric must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_unknown_name():
    with pytest.raises(ValueError, match="Unknown metric 'bleu': choose one of accuracy, .*mase"):
        metrics.load("bleu")


@pytest.mark.parametrize("name", metrics.METRICS)
def test_is_a_metric(name):
    metric = metrics.load(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.description
    with pytest.raises(ValueError, match="nothing to compute"):
        metric.compute()


def test_accuracy():
    compute = metrics.load("accuracy").compute
    assert compute(predictions=[0, 1, 2, 2], references=[0, 1, 1, 2]) == {"accuracy": 0.75}
    assert compute(predictions=np.array([1, 0]), references=torch.tensor([1, 1])) == {"accuracy": 0.5}


def test_batches_and_reuse():
    metric = metrics.load("accuracy")
    for _ in range(2):
        metric.add_batch(predictions=[0, 1], references=[0, 0])
        metric.add(prediction=1, reference=1)
        assert metric.compute() == {"accuracy": pytest.approx(2 / 3)}


def test_combines():
    both = evaluate.combine([metrics.load("accuracy"), metrics.load("f1")])
    assert both.compute(predictions=[0, 1, 1], references=[0, 1, 0]) == {
        "accuracy": pytest.approx(2 / 3),
        "f1": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize("average", ["micro", "macro", "weighted", None])
def test_f1(average):
    predictions, references = [0, 1, 2, 2, 1, 0], [0, 2, 2, 1, 1, 0]
    result = metrics.load("f1").compute(predictions=predictions, references=references, average=average)
    np.testing.assert_allclose(result["f1"], f1_score(references, predictions, average=average))


def test_perplexity_by_hand():
    # two tokens of probability 1/2 and 1/8, one not counted: exp of their mean is sqrt(2 * 8)
    losses = [[math.log(2), 99.0], [math.log(8)]]
    result = metrics.load("perplexity").compute(predictions=losses, references=[[5, -100], [7]])
    assert result == {"perplexity": pytest.approx(4), "loss": pytest.approx(math.log(4)), "tokens": 2}


def test_perplexity_from_logits():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7) * 20, torch.randint(0, 7, (3, 5))
    labels[0, 1] = labels[2, 4] = -100
    metric = metrics.load("perplexity")
    cross_entropy = torch.nn.functional.cross_entropy
    loss = cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert metric.compute(predictions=logits, references=labels)["loss"] == pytest.approx(loss)
    shifted = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
    assert metric.compute(predictions=logits, references=labels, shift=True)["loss"] == pytest.approx(shifted)
    losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 5)
    assert metric.compute(predictions=losses, references=labels)["perplexity"] == pytest.approx(math.exp(loss))


def test_perplexity_errors():
    metric = metrics.load("perplexity")
    with pytest.raises(ValueError, match="every label is -100"):
        metric.compute(predictions=[[1.0]], references=[[-100]])
    with pytest.raises(ValueError, match="2 predictions, but 1 references"):
        metric.compute(predictions=[[1.0, 2.0]], references=[[3]])


def test_sacrebleu_by_hand():
    # 5 of 6 words, 3 of 5 pairs, 2 of 4 triples, 1 of 3 quadruples, no brevity penalty
    result = metrics.load("sacrebleu").compute(
        predictions=["the cat sat on the mat"], references=["the cat sat on a mat"]
    )
    assert result["counts"] == [5, 3, 2, 1] and result["totals"] == [6, 5, 4, 3] and result["bp"] == 1
    assert result["score"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4))


@pytest.mark.parametrize("name", ["sacrebleu", "chrf"])
def test_several_references(name):
    metric = metrics.load(name)
    predictions = ["the cat sat on the mat", "a dog lay on a rug"]
    references = [["no such words here", predictions[0]], [predictions[1]]]  # 2 of the first, 1 of the second
    assert metric.compute(predictions=predictions, references=references)["score"] == pytest.approx(100)


def test_chrf_by_hand():
    # "ab" against "abc": precision 1 and recall 2/3 of letters, 1 and 1/2 of pairs; F2 of the means
    result = metrics.load("chrf").compute(predictions=["ab"], references=["abc"], char_order=2)
    precision, recall = 1, (2 / 3 + 1 / 2) / 2
    assert result["score"] == pytest.approx(100 * 5 * precision * recall / (4 * precision + recall))


def test_rouge_by_hand():
    metric = metrics.load("rouge")
    result = metric.compute(predictions=["the cat", "dog"], references=["the cat sat", "cow"])
    # precision 1, recall 2/3 of words and 1/2 of pairs in the first; nothing right in the second
    expected = {"rouge1": 0.4, "rouge2": 1 / 3, "rougeL": 0.4, "rougeLsum": 0.4}
    assert result == pytest.approx(expected)
    best = metric.compute(predictions=["the cat"], references=[["a dog", "the cat"]], rouge_types=["rouge1"])
    assert best == {"rouge1": 1}


def test_mase_by_hand():
    # errors 1 and 3; the training series differs by 2, 4 and 6 from the value two steps before
    training = [0, 0, 2, 4, 8]
    metric = metrics.load("mase")
    inputs = {"predictions": [[1.0, 5.0]], "references": [[2.0, 2.0]]}
    assert metric.compute(**inputs, training=training, periodicity=2) == {"mase": pytest.approx(2 / 4)}
    # of several series, each has its own scale
    two = {name: values * 2 for name, values in inputs.items()}
    result = metric.compute(**two, training=[training, [0, 0, 1, 1]], periodicity=2)
    assert result == {"mase": pytest.approx((2 / 4 + 2 / 1) / 2)}


def test_mase_of_the_seasonal_naive_forecast_on_its_own_series_is_one():
    series = np.random.default_rng(0).normal(size=40).cumsum()
    result = metrics.load("mase").compute(
        predictions=[series[:-7]], references=[series[7:]], training=series, periodicity=7
    )
    assert result["mase"] == pytest.approx(1)


def test_mase_errors():
    metric = metrics.load("mase")
    inputs = {"predictions": [[1.0]], "references": [[2.0]]}
    with pytest.raises(ValueError, match="periodicity is 3, but must be"):
        metric.compute(**inputs, training=[1, 2, 3], periodicity=3)
    with pytest.raises(ValueError, match="divide by zero"):
        metric.compute(**inputs, training=[1, 2, 1, 2], periodicity=2)
    with pytest.raises(ValueError, match="1 forecasts, but 2 training series"):
        metric.compute(**inputs, training=[[1, 2], [1, 2]])


def test_instances_share_no_file(tmp_path):
    """Hence any number of processes can compute at the same time."""
    one, two = (metrics.load("accuracy", cache_dir=str(tmp_path)) for _ in range(2))
    one.add_batch(predictions=[0, 1], references=[0, 1])
    two.add_batch(predictions=[0, 1], references=[0, 0])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert (one.compute(), two.compute()) == ({"accuracy": 1.0}, {"accuracy": 0.5})
