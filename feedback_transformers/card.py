"""Write the model card of a feedback model: what it is, how to use it, how it was trained, what was measured.

`model_card` fills card_template.md. A metric is a name and a number. Names that begin with eval_ or test_, as those of
Trainer do, tell the split, and names that end with _step_3 the number of passes.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import EvalResult
from transformers import Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.utils import logging

from .models.configuration_feedback import MODELING, FeedbackConfig
from .models.modeling_feedback import FeedbackPreTrainedModel

logger = logging.get_logger(__name__)

TEMPLATE = Path(__file__).with_name("card_template.md")
THIS_REPOSITORY = "<this repository>"  # replaced by its name as soon as that is known, at the latest by a push
NO_DATASET = "unknown"
PIPELINES = {
    "FeedbackForCausalLM": "text-generation",
    "FeedbackForMaskedLM": "fill-mask",
    "FeedbackForSequenceClassification": "text-classification",
    "FeedbackForTokenClassification": "token-classification",
    "FeedbackForQuestionAnswering": "question-answering",
    "FeedbackForConditionalGeneration": "text2text-generation",
    "FeedbackForImageClassification": "image-classification",
    "FeedbackForVideoClassification": "video-classification",
    "FeedbackForObjectDetection": "object-detection",
    "FeedbackForImageToImage": "image-to-image",
    "FeedbackForTimeSeriesPrediction": "time-series-forecasting",
}
CAPTIONS = "image-to-text"  # what a sequence-to-sequence model with a source of images does
READ_TEXT = 'ids = tokenizer("{text}", return_tensors="pt").input_ids'
GENERATE = "print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))"
USAGE = {  # by pipeline: what a reader does with the model
    "text-generation": (READ_TEXT.format(text="Once upon a time"), GENERATE),
    "text2text-generation": (READ_TEXT.format(text="A sentence."), GENERATE),
    "fill-mask": (
        'ids = tokenizer(f"A {tokenizer.mask_token} sentence.", return_tensors="pt").input_ids',
        "print(tokenizer.decode(model(ids).logits[0].argmax(-1)))",
    ),
    "text-classification": (
        READ_TEXT.format(text="A sentence."),
        "print(model(ids).logits)  # a number for each class of model.config.id2label",
    ),
    "token-classification": (
        READ_TEXT.format(text="A sentence."),
        "print([model.config.id2label[label] for label in model(ids).logits[0].argmax(-1).tolist()])",
    ),
    "question-answering": (
        'ids = tokenizer("A question?", "A text with the answer.", return_tensors="pt").input_ids',
        "outputs = model(ids)",
        "start, end = outputs.start_logits.argmax(), outputs.end_logits.argmax()",
        "print(tokenizer.decode(ids[0, start : end + 1]))",
    ),
    CAPTIONS: (
        'pixels = processor(Image.open("picture.png"), return_tensors="pt").pixel_values',
        "print(tokenizer.decode(model.generate(pixel_values=pixels, max_new_tokens=20)[0]))",
    ),
    "object-detection": (
        'image = Image.open("picture.png").convert("RGB")',
        'outputs = model(processor(image, return_tensors="pt").pixel_values)',
        "print(processor.post_process_object_detection(outputs, 0.5, [image.size[::-1]]))",
    ),
    "image-to-image": (
        "pixels = torch.rand(1, {channels}, 32, 32)  # [images, channels, height, width], from 0 to 1",
        "print(model(pixels).reconstruction.shape)",
    ),
    "video-classification": (
        "pixels = torch.rand(1, 8, {channels}, 32, 32)  # [videos, frames, channels, height, width]",
        "print(model.config.id2label[model(pixels).logits.argmax().item()])",
    ),
    "image-classification": (
        'pixels = processor(Image.open("picture.png"), return_tensors="pt").pixel_values',
        "print(model.config.id2label[model(pixels).logits.argmax().item()])",
    ),
    "time-series-forecasting": (
        "past = torch.randn(1, 48, {channels}).cumsum(1)  # [series, steps, channels]",
        "print(model(past_values=past).prediction_outputs)",
    ),
}
LOWER = {"loss", "perplexity", "mae", "mase", "mse", "rmse", "smape", "error", "wer", "cer"}
HIGHER = {
    *("accuracy", "f1", "precision", "recall", "bleu", "sacrebleu"),
    *("chrf", "rouge1", "rouge2", "rougel", "exact", "psnr"),
}
SPLITS = {"eval": "validation", "test": "test"}
PASSES = re.compile(r"(.+)_step_(\d+)")
FOLDERS = ("--output_dir", "--logging_dir", "--cache_dir")  # places on the author's machine, of no use to a reader

Results = Mapping[str, Any]  # metric -> number, or data set -> metric -> number


def model_card(
    model: FeedbackPreTrainedModel,
    results: Results,
    name: str = "feedback model",
    dataset: str | None = None,
    license: str | None = None,
    language: str | None = None,
    base_model: str | None = None,
    description: str = "",
    good_at: str = "",
    limits: str = "",
    training: Mapping[str, Any] | None = None,
    command: str = "",
    repository: str = THIS_REPOSITORY,
    plots: Sequence[str] = (),
) -> ModelCard:
    """Return a card with the architecture of `model` and the measured `results`.

    Args:
        results: numbers by metric, measured on `dataset`; or, for each data set, such a dictionary.
        dataset: what was measured on, as the Hub calls it.
        license: of the weights, such as apache-2.0. There is no default: only the author knows it.
        language: of the texts, such as en.
        base_model: the model that training started from; the original of a retrofit by default.
        good_at, limits: sentences about what the model does well, and where it fails.
        training: settings by name, such as {"learning rate": 0.001}; `training_facts` reads them from a Trainer.
        command: what trains and measures the model. Folders of this machine are left out, and of other paths only the
            file's name is shown.
        repository: its name on the Hub, for the snippet.
        plots: names of pictures in the folder plots/.
    """
    config, head = model.config, type(model).__name__
    task = pipeline_of(model)
    base_model = base_model or original_of(config)
    if license is None:
        logger.warning_once(
            "The model card names no license: give license='apache-2.0', or another, so that others know whether they "
            "may use the model (`feedback-transformers card --license` adds it to a folder)."
        )
    grouped = by_dataset(results, dataset)
    data = ModelCardData(
        library_name="transformers",
        license=license,
        language=language,
        base_model=base_model,
        pipeline_tag=task,
        tags=["feedback", "feedback_transformers", f"feedback-{config.feedback_axis}"],
        model_name=name,
        eval_results=eval_results(grouped, task) or None,
    )
    autos = [auto for auto, reference in MODELING.items() if reference.endswith(f".{head}")]
    auto = autos[-1] if task == CAPTIONS else autos[0]
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        model_name=name,
        description=description,
        parameters=f"{model.num_parameters():,}",
        loop=loop_sentence(config),
        symbols=symbols(config),
        usage=usage(auto, task, repository, config),
        abilities=[*abilities(model, good_at, limits)],
        training={key: str(value).replace("\n", " ").replace("|", r"\|") for key, value in (training or {}).items()},
        command=public_command(command),
        versions=", ".join(f"{package} {number}" for package, number in versions().items()),
        groups=[*groups(grouped)],
        plots=plots,
    )


def check_card(card: Mapping[str, Any]) -> None:
    """Reject what `model_card` does not take, before a training of hours rather than after it."""
    known = [name for name in signature(model_card).parameters if name not in ("model", "results", "plots")]
    unknown = sorted(set(card) - set(known))
    if unknown:
        raise TypeError(f"A card has no {', '.join(unknown)}; it takes {', '.join(known)}.")


def training_facts(trainer: Trainer) -> dict[str, Any]:
    """Return what a Trainer knows for `model_card`: settings, repository, and the model that it started from."""
    settings = {name.replace("_", " "): value for name, value in extract_hyperparameters_from_trainer(trainer).items()}
    if trainer.state.global_step:
        settings["steps made"] = trainer.state.global_step
    drawn = getattr(trainer.model.config, "trained_feedback_steps", None)  # type: ignore[union-attr]
    if drawn:
        settings["passes in training"] = f"{drawn[0]} to {drawn[1]}"
    facts: dict[str, Any] = {"training": settings}
    repository = getattr(trainer, "hub_model_id", None) or trainer.args.hub_model_id
    if repository:
        facts["repository"] = repository
    started_from = str(trainer.model.name_or_path)  # type: ignore[union-attr]
    if is_repository(started_from) and started_from != repository:
        facts["base_model"] = started_from
    return facts


# What the card says about the model


def original_of(config: FeedbackConfig) -> str | None:
    """Return the repository of the model that a retrofit was made of."""
    name = config.backbone_config.name_or_path if config.retrofitted_from else None
    return name if is_repository(name) else None


def is_repository(name: str | None) -> bool:
    """Return whether `name` is one of the Hub rather than a folder of this machine."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name or "")) and not Path(str(name)).exists()


def loop_sentence(config: FeedbackConfig) -> str:
    """Say in words what the loop does."""
    if config.feedback_signal == "none":
        return "the control without feedback, whose connection reads the present input instead of the past."
    what = {"state": "the state of its cell", "output": "its own prediction"}[config.feedback_signal]
    if config.feedback_axis == "depth":
        return f"it reads the whole input several times, and each pass is given {what} from the pass before."
    if config.in_passes:
        return f"each position is given {what} from the position before, found in several passes over the input."
    return f"it reads one position after the other, and each is given {what} from the position before."


def symbols(config: FeedbackConfig) -> list[tuple[str, str, str]]:
    """Return the symbols of the equation, each with its meaning and with what stands for it in this model."""
    passes = config.num_feedback_steps if config.feedback_axis == "depth" else config.solver_steps
    made = f", found in {passes} passes" if config.in_passes and config.feedback_axis == "time" else ""
    steps = f"{passes} passes over all positions" if config.feedback_axis == "depth" else f"the positions{made}"
    signal = {
        "state": "the cell's state",
        "output": "the prediction, embedded",
        "none": "nothing: the input of the present step",
    }[config.feedback_signal]
    return [
        ("t", "the step", steps),
        ("e_t", "the input, embedded and encoded", layers(config.encoder_type, config.num_encoder_layers)),
        ("φ(y_{t-1})", "the feedback from the step before", signal),
        ("c", "the connection, which joins input and feedback", config.feedback_connection),
        ("f, h_t", "the cell and its state", layers(config.feedback_type, config.num_feedback_layers)),
        ("g, y_t", "the decoder and its output", layers(config.decoder_type, config.num_decoder_layers)),
    ]


def layers(kind: str, number: int) -> str:
    return "none" if number == 0 else f"{kind}, {number} layer" + ("s" if number > 1 else "")


def pipeline_of(model: Any) -> str:
    """Return the name that the Hub has for what a model does."""
    if getattr(model.config, "source_type", "tokens") == "images":
        return CAPTIONS
    return PIPELINES.get(type(model).__name__, "feature-extraction")


def usage(auto: str, task: str, repository: str, config: FeedbackConfig) -> str:
    """Return the lines of Python that load the model and use it once."""
    steps = USAGE.get(task, ())
    steps = tuple(step.replace("{channels}", str(getattr(config.input_config, "num_channels", 1))) for step in steps)
    used = "\n".join(steps)
    readers = {"processor": "AutoImageProcessor", "tokenizer": "AutoTokenizer"}
    readers = {name: reader for name, reader in readers.items() if re.search(rf"\b{name}\b", used)}
    load = [f'model = {auto}.from_pretrained("{repository}", trust_remote_code=True)']
    load += [f'{name} = {reader}.from_pretrained("{repository}")' for name, reader in readers.items()]
    others = {"torch.": "import torch", "Image.": "from PIL import Image"}
    imports = [line for name, line in others.items() if name in used]
    names = ", ".join(sorted([auto, *readers.values()]))
    return "\n".join([*imports, f"from transformers import {names}", "", *load, *steps])


def abilities(model: FeedbackPreTrainedModel, good_at: str, limits: str) -> Iterator[str]:
    config = model.config
    yield from (f"Good at: {good_at}",) if good_at else ()
    yield from (f"Limits: {limits}",) if limits else ()
    trained = config.trained_feedback_steps
    if trained and trained[0] != trained[1]:
        yield (
            f"It was trained with {trained[0]} to {trained[1]} passes. Another number can be asked for with "
            "`num_feedback_steps`; outside of this range the predictions may be worse."
        )
    if config.feedback_axis == "depth" and config.feedback_signal != "none":
        yield "Each further pass costs about as much time as running the cell once more."
    elif not config.in_passes:
        yield "It reads one position after the other, so that long inputs take longer than in a transformer."
    if model.can_generate():
        yield "Assisted decoding, static caches and continuous batching are not supported."
    yield "It may be wrong on inputs that differ from those of its training, and it repeats the biases of that data."


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that training and loading depend on."""
    found = {}
    for package in ("feedback_transformers", "transformers", "torch", "tokenizers", "datasets", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def public_command(command: str) -> str:
    """Return `command` without places of this machine: no output folders, and of other paths the last part alone."""
    parts = []
    for part in re.split(r"(\s*(?:;|&&)\s*)", command)[::2]:
        shown, option = list[str](), ""
        for word in shlex.split(part):
            flag, equals, value = word.partition("=")
            option = flag if word.startswith("-") else option
            if option in FOLDERS:
                continue
            if word.startswith("-") and equals:
                shown.append(f"{flag}={public_path(value, option)}")
            else:
                shown.append(public_path(word, option))
        parts.append(shlex.join(shown))
    return "\n".join(parts)


def public_path(word: str, option: str) -> str:
    """Return the last part of a path of this machine; repositories and scripts named before any option stay."""
    path = Path(word)
    local = path.is_absolute() or word.startswith(("~", "./", "../")) or option.endswith(("_file", "_files"))
    return path.name if local or (option and "/" in word and path.exists()) else word


# Results


class Group(NamedTuple):
    """The results of one split of one data set, as the template shows them."""

    where: str
    sentences: list[str]
    passes: dict[str, Any]  # metrics and rows of a table by the number of passes, or nothing


def numbers(results: Results) -> dict[str, Any]:
    """Return the results as plain numbers, by metric, or by data set and metric; reject all else."""
    plain: dict[str, Any] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            plain[name] = numbers(value)
        elif isinstance(value, Real):
            plain[name] = value if isinstance(value, int) else float(value)
        else:
            raise TypeError(f"results holds {name}={value!r}, which is not a number.")
    return plain


def by_dataset(results: Results, dataset: str | None) -> dict[str, dict[str, float]]:
    """Return the results by data set and metric; those without a data set of their own are of `dataset`."""
    grouped: dict[str, dict[str, float]] = {}
    for name, value in results.items():
        if isinstance(value, Mapping):
            grouped.setdefault(name, {}).update(value)
        else:
            grouped.setdefault(dataset or NO_DATASET, {})[name] = value
    return grouped


def split_of(metric: str) -> tuple[str, str | None]:
    """Return the metric's own name and its split: eval_accuracy -> accuracy, validation."""
    prefix, _, name = metric.partition("_")
    return (name, SPLITS[prefix]) if prefix in SPLITS and name else (metric, None)


def rounded(value: float) -> float:
    """Return `value` with four significant digits, and a large one as a whole number."""
    if isinstance(value, int) or not math.isfinite(value):
        return value
    return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")


def groups(results: Mapping[str, Mapping[str, float]]) -> Iterator[Group]:
    """Return the results in words, by data set and split."""
    for dataset, metrics in results.items():
        named = "a data set that the author has not named" if dataset == NO_DATASET else f"`{dataset}`"
        parts: dict[str | None, dict[str, float]] = {}
        for metric, value in metrics.items():
            name, split = split_of(metric)
            parts.setdefault(split, {})[name] = value
        for split, found in parts.items():
            where = named if split is None else f"the {split} split of {named}"
            steps = {name: match for name in found if (match := PASSES.fullmatch(name))}
            plain = {name: value for name, value in found.items() if name not in steps}
            yield Group(where, in_words(plain), passes_table(found, steps))


def passes_table(found: Mapping[str, float], steps: Mapping[str, re.Match[str]]) -> dict[str, Any]:
    metrics = list(dict.fromkeys(match[1] for match in steps.values()))
    numbers = sorted({int(match[2]) for match in steps.values()})
    rows = [[str(n), *(shown(found.get(f"{metric}_step_{n}")) for metric in metrics)] for n in numbers]
    return {"metrics": [metric.replace("_", " ") for metric in metrics], "rows": rows} if rows else {}


def in_words(metrics: Mapping[str, float]) -> list[str]:
    """Return sentences such as: accuracy is 0.75 (higher is better). The direction is said once."""
    sentences, said = [], set[str | None]()
    for name, value in metrics.items():
        words = set(re.findall(r"[a-z0-9]+", name.lower()))
        better = "lower" if words & LOWER else "higher" if words & HIGHER else None
        direction = f" ({better} is better)" if better and better not in said else ""
        sentences.append(f"{name.replace('_', ' ')} is {shown(value)}{direction}.")
        said.add(better)
    return sentences


def shown(value: float | None) -> str:
    return "" if value is None else f"{rounded(value):,}"


def eval_results(results: Mapping[str, Mapping[str, float]], task: str) -> list[EvalResult]:
    """Return the results by data set as the model-index of a card."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split_of(metric)[1],
            metric_type=split_of(metric)[0],
            metric_name=metric,
            metric_value=rounded(value),
        )
        for dataset, metrics in results.items()
        for metric, value in metrics.items()
        if math.isfinite(value)
    ]


def save_eval_results(folder: Path, results: Results, card: Mapping[str, Any]) -> None:
    """Write the results as the Hub reads them, .eval_results/<dataset>.yaml; without a data set they have no place."""
    for dataset, metrics in by_dataset(results, card.get("dataset")).items():
        entries = [
            EvalResultEntry(
                dataset_id=dataset,
                task_id=metric,
                value=rounded(value),
                notes=public_command(card.get("command", "")) or None,
            )
            for metric, value in metrics.items()
            if math.isfinite(value)
        ]
        if dataset == NO_DATASET or not entries:
            continue
        (folder / ".eval_results").mkdir(exist_ok=True)
        file = folder / ".eval_results" / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', dataset)}.yaml"
        file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
