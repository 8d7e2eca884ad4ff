"""Offer metrics with the interface of `evaluate` that need no download: `evaluate.load` fetches each from the Hub.

    from feedback_transformers import metrics

    metrics.load("accuracy").compute(predictions=[0, 1], references=[0, 0])  # {"accuracy": 0.5}

Inputs and results are named as in the metrics of the Hub (except perplexity, which there runs a model of its own).
Shapes: N examples, T tokens, V vocabulary, H forecast steps.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Sequence, Value

_LABELS = Features(predictions=Value("int64"), references=Value("int64"))
_TEXTS = [
    Features(predictions=Value("string"), references=Sequence(Value("string"))),
    Features(predictions=Value("string"), references=Value("string")),
]


class OfflineMetric(evaluate.Metric):
    """Describe a metric by its docstring and attributes, which keeps its examples in memory if it has one process."""

    inputs: Features | list[Features]
    source = ""

    def __init__(self, *args: Any, num_process: int = 1, keep_in_memory: bool | None = None, **kwargs: Any):
        # With one process, files and locks in a shared cache directory serve nothing.
        keep_in_memory = num_process == 1 if keep_in_memory is None else keep_in_memory
        super().__init__(*args, num_process=num_process, keep_in_memory=keep_in_memory, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        description = self.__doc__ or ""
        return evaluate.MetricInfo(
            description=description, inputs_description=description, citation=self.source, features=self.inputs
        )

    def _finalize(self) -> None:
        if self.writer is None:
            raise ValueError("There is nothing to compute from: give predictions and references, or add them before.")
        super()._finalize()


class Accuracy(OfflineMetric):
    """Return the share of predictions that equal their reference; `normalize`, `sample_weight` as in scikit-learn."""

    inputs = _LABELS

    def _compute(self, predictions: list[int], references: list[int], **options: Any) -> dict[str, float]:
        from sklearn.metrics import accuracy_score

        return {"accuracy": float(accuracy_score(references, predictions, **options))}


class F1(OfflineMetric):
    """Return the harmonic mean of precision and recall.

    Options: `average` ("binary", the default, "micro", "macro", "weighted", or None: one value per class),
    `pos_label`, `labels` and others of scikit-learn's f1_score.
    """

    inputs = _LABELS

    def _compute(
        self, predictions: list[int], references: list[int], **options: Any
    ) -> dict[str, float | list[float]]:
        from sklearn.metrics import f1_score

        return {"f1": np.asarray(f1_score(references, predictions, **options)).tolist()}


class Perplexity(OfflineMetric):
    """Return exp of the mean negative log-likelihood per token, over all tokens whose label is not -100.

    References are labels [N, T]. Predictions are the logits [N, T, V] or, smaller by a factor of V, the negative
    log-likelihoods in nats [N, T] of these labels. Examples may differ in T. Position t predicts label t; with
    `shift=True` it predicts label t + 1, as the logits of a causal language model do. Returns `perplexity`, `loss`
    (the mean in nats) and `tokens` (how many were counted).
    """

    inputs = [
        Features(predictions=Sequence(Sequence(Value("float32"))), references=Sequence(Value("int64"))),
        Features(predictions=Sequence(Value("float32")), references=Sequence(Value("int64"))),
    ]

    def _compute(self, predictions: list, references: list[list[int]], shift: bool = False) -> dict[str, float]:
        total, tokens = 0.0, 0
        for prediction, reference in zip(predictions, references, strict=True):
            values, labels = np.asarray(prediction, dtype=np.float64), np.asarray(reference, dtype=np.int64)
            if len(values) != len(labels):
                raise ValueError(f"An example has {len(values)} predictions, but {len(labels)} references.")
            if shift:
                values, labels = values[:-1], labels[1:]
            values, labels = values[labels != -100], labels[labels != -100]
            if values.ndim == 2:
                values = np.logaddexp.reduce(values, axis=1) - values[np.arange(len(labels)), labels]
            total += values.sum()
            tokens += len(labels)
        if tokens == 0:
            raise ValueError("No token to compute a perplexity from: every label is -100, or there is none.")
        return {"perplexity": float(np.exp(total / tokens)), "loss": float(total / tokens), "tokens": tokens}


class SacreBLEU(OfflineMetric):
    """Return corpus BLEU [0, 100].

    References: a text, or a list of texts, per prediction. Options: those of sacrebleu.BLEU.
    """

    inputs = _TEXTS
    source = "Post, A Call for Clarity in Reporting BLEU Scores, WMT 2018"

    def _compute(self, predictions: list[str], references: list, **options: Any) -> dict[str, Any]:
        from sacrebleu import BLEU

        result = BLEU(**options).corpus_score(predictions, _streams(references))
        names = ("score", "counts", "totals", "precisions", "bp", "sys_len", "ref_len")
        return {name: getattr(result, name) for name in names}


class ChrF(OfflineMetric):
    """Return corpus chrF [0, 100], an F-score of character n-grams; chrF++ with `word_order=2`.

    References: a text, or a list of texts, per prediction. Options: those of sacrebleu.CHRF.
    """

    inputs = _TEXTS
    source = "Popović, chrF: character n-gram F-score for automatic MT evaluation, WMT 2015"

    def _compute(self, predictions: list[str], references: list, **options: Any) -> dict[str, float]:
        from sacrebleu import CHRF

        result = CHRF(**options).corpus_score(predictions, _streams(references))
        return {name: getattr(result, name) for name in ("score", "char_order", "word_order", "beta")}


class ROUGE(OfflineMetric):
    """Return F-measures [0, 1] of ROUGE: the mean over the examples; with several references, of the best one each.

    References: a text, or a list of texts, per prediction. Options: `rouge_types`, `use_stemmer`. rougeLsum expects
    sentences on lines of their own.
    """

    inputs = _TEXTS
    source = "Lin, ROUGE: A Package for Automatic Evaluation of Summaries, 2004"

    def _compute(
        self,
        predictions: list[str],
        references: list,
        rouge_types: tuple[str, ...] = ("rouge1", "rouge2", "rougeL", "rougeLsum"),
        use_stemmer: bool = False,
    ) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(rouge_types, use_stemmer=use_stemmer)
        scores = [
            scorer.score_multi(_as_list(reference), prediction)
            for prediction, reference in zip(predictions, references, strict=True)
        ]
        return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in rouge_types}


class MASE(OfflineMetric):
    """Return the mean absolute scaled error: below 1, a forecast beats the seasonal naive one on the training series.

    mean over h of |y_h - forecast_h|, divided by the mean over t = m+1..T of |y_t - y_{t-m}| of the training series,
    where m is the `periodicity` (Hyndman & Koehler 2006; 1 = the value before). Predictions and references are
    [N, H]; `training` is the series [T] that all of them continue, or a list of N series, one each. The result is the
    mean over the N forecasts.
    """

    inputs = Features(predictions=Sequence(Value("float64")), references=Sequence(Value("float64")))
    source = "Hyndman & Koehler, Another look at measures of forecast accuracy, Int. J. of Forecasting 22(4), 2006"

    def _compute(
        self, predictions: list[list[float]], references: list[list[float]], training: Any, periodicity: int = 1
    ) -> dict[str, float]:
        errors = []
        for prediction, reference in zip(predictions, references, strict=True):
            if len(prediction) != len(reference):
                raise ValueError(f"A forecast has {len(prediction)} values, but its reference {len(reference)}.")
            errors.append(np.abs(np.subtract(prediction, reference)).mean())
        one_series = np.ndim(training[0]) == 0
        scales = [_seasonal_naive_error(series, periodicity) for series in ([training] if one_series else training)]
        if not one_series and len(scales) != len(errors):
            raise ValueError(f"There are {len(errors)} forecasts, but {len(scales)} training series.")
        return {"mase": float(np.mean(np.divide(errors, scales)))}


def _seasonal_naive_error(series: Any, periodicity: int) -> float:
    values = np.asarray(series, dtype=np.float64)
    if not 0 < periodicity < len(values):
        raise ValueError(
            f"periodicity is {periodicity}, but must be at least 1 and less than the length of the training series, "
            f"{len(values)}."
        )
    error = float(np.abs(values[periodicity:] - values[:-periodicity]).mean())
    if error == 0:
        raise ValueError("The training series repeats itself exactly: MASE would divide by zero.")
    return error


def _as_list(reference: str | list[str]) -> list[str]:
    return [reference] if isinstance(reference, str) else reference


def _streams(references: list) -> list[tuple[Any, ...]]:
    """Return the k-th reference of every prediction, for each k, as sacrebleu wants them; None where one lacks."""
    return list(zip_longest(*map(_as_list, references)))


METRICS: dict[str, type[evaluate.Metric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "perplexity": Perplexity,
    "sacrebleu": SacreBLEU,
    "chrf": ChrF,
    "rouge": ROUGE,
    "mase": MASE,
}


def load(name: str, **options: Any) -> evaluate.Metric:
    """Return the metric `name` of `METRICS`; options are those of `evaluate.Metric` (num_process, process_id, ...)."""
    if name not in METRICS:
        raise ValueError(f"Unknown metric {name!r}: choose one of {', '.join(METRICS)}.")
    return METRICS[name](**options)
