"""Pushing and pulling over HTTP, from a Hub on this machine (hub_server.py): it proves the client's side only.

huggingface_hub reads its settings when it is imported, so the checks run in a process of their own, all with the
package in one and all without it in another; a traceback there is the message of the failed test here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from hub_server import Fault, Files, Hub

ME, READER, OTHER = "hf_" + "m" * 34, "hf_" + "r" * 34, "hf_" + "o" * 34
USERS = {ME: ("me", "write"), READER: ("me", "read"), OTHER: ("other", "write")}


def check_plain_push(hub: Hub, folder: Path) -> None:
    """What `describe` said goes along, to a tag and to main; so does what lies beside a model, while it is true."""
    import torch
    from conftest import build, make_tokenizer, tokens
    from huggingface_hub import HfApi
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from feedback_transformers import hub as sharing

    model = build()
    picture = picture_in(folder)
    sharing.describe(model, make_tokenizer(), {"eval_loss": 1.25, "perplexity": 3.5}, [picture], dataset="me/plays")
    model.push_to_hub("me/plain", token=ME, tags=["mine"])
    files = hub.repos["models/me/plain"].files()
    assert_complete(files, {"eval_loss": 1.25, "perplexity": 3.5}, "me/plays", "plots/picture.png")
    assert "mine" in card_of(files)["tags"] and b'"me/plain", trust_remote_code' in files["README.md"].content
    again = AutoModelForCausalLM.from_pretrained("me/plain", token=ME)
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    assert AutoTokenizer.from_pretrained("me/plain", token=ME)("an").input_ids == make_tokenizer()("an").input_ids

    HfApi(token=ME).create_tag("me/plain", tag="v1")
    first = model(tokens()).logits
    change(model)
    sharing.describe(model, make_tokenizer(), {"eval_loss": 1.0}, [picture], dataset="me/plays")
    model.push_to_hub("me/plain", token=ME)
    assert_complete(hub.repos["models/me/plain"].files(), {"eval_loss": 1.0}, "me/plays", "plots/picture.png")
    for revision, expected in {"v1": first, "main": model(tokens()).logits}.items():
        pulled = AutoModelForCausalLM.from_pretrained("me/plain", revision=revision, token=ME)
        assert torch.equal(pulled(tokens()).logits, expected), revision
    model.push_to_hub("me/plain", token=ME, revision="draft")
    assert set(hub.repos["models/me/plain"].refs) == {"main", "v1", "draft"}

    sharing.export(model, folder / "it", make_tokenizer(), {"eval_loss": 1.0}, [picture], dataset="me/plays")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "it")
    loaded.push_to_hub("me/beside", token=ME)
    assert_complete(hub.repos["models/me/beside"].files(), {"eval_loss": 1.0}, "me/plays", "plots/picture.png")
    change(loaded)
    loaded.push_to_hub("me/changed", token=ME)
    files = hub.repos["models/me/changed"].files()
    assert "model-index" not in card_of(files) and ".eval_results/me_plays.yaml" not in files


def check_trainer_push(hub: Hub, folder: Path) -> None:
    """A checkpoint that Trainer pushes on its way, its last push, and adapters."""
    import torch
    from conftest import build, make_tokenizer, tokens
    from datasets import Dataset
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from feedback_transformers.hub import CardCallback

    data = Dataset.from_dict({"input_ids": tokens(8).tolist(), "labels": tokens(8).tolist()})

    def trainer_of(model: Any, name: str, **settings: Any) -> Trainer:
        settings = {
            "max_steps": 4,
            "save_steps": 2,
            "eval_steps": 2,
            "logging_steps": 1,
            "learning_rate": 1e-2,
        } | settings
        arguments = TrainingArguments(
            folder / name, push_to_hub=True, hub_model_id=f"me/{name}", eval_strategy="steps", use_cpu=True, **settings
        )
        return Trainer(model, arguments, None, data, data, make_tokenizer())

    trainer = trainer_of(build(), "trained", save_steps=4)
    trainer.add_callback(CardCallback(trainer, "me/plays", command="make it"))
    trainer.train()
    files = hub.repos["models/me/trained"].files()  # pushed with the checkpoint, before train() returned
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    assert_complete(files, {"eval_loss": losses[-1]}, "me/plays", "plots/loss.png")
    trainer.push_to_hub()
    files = hub.repos["models/me/trained"].files()
    assert_complete(files, {"eval_loss": losses[-1]}, "me/plays", "plots/loss.png")
    assert b"make it" in files["README.md"].content
    pulled = AutoModelForCausalLM.from_pretrained("me/trained")
    assert torch.equal(pulled(tokens()).logits, trainer.model.eval()(tokens()).logits)
    trainer.model.push_to_hub("me/plainly-after")
    assert_complete(
        hub.repos["models/me/plainly-after"].files(), {"eval_loss": losses[-1]}, "me/plays", "plots/loss.png"
    )

    base = AutoModelForCausalLM.from_pretrained("me/trained")
    trainer = trainer_of(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4)), "adapter")
    trainer.add_callback(CardCallback(trainer, "me/plays"))
    trainer.train()
    trainer.push_to_hub()
    files = hub.repos["models/me/adapter"].files()
    loss = trainer.state.log_history[-2]["eval_loss"]
    assert_results(files, {"eval_loss": loss}, "me/plays")
    assert card_of(files)["base_model"] == "me/trained" and "model.safetensors" not in files
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("me/trained"), "me/adapter")
    assert torch.equal(adapted(tokens()).logits, trainer.model.eval()(tokens()).logits)
    assert not torch.equal(adapted(tokens()).logits, pulled(tokens()).logits)

    trainer = trainer_of(build(), "refused", hub_token=ME)
    assert "hub_token" in str(error_of(ValueError, CardCallback, trainer, "me/plays"))


def check_tokens_and_private_repositories(hub: Hub, folder: Path) -> None:
    import torch
    from conftest import build, tokens
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import AutoModelForCausalLM

    model = build()
    model.push_to_hub("me/private", token=ME, private=True)
    assert hub.repos["models/me/private"].private

    def pull(token: str | bool) -> Any:
        return AutoModelForCausalLM.from_pretrained("me/private", token=token, cache_dir=folder / str(token)[:4])

    for token in (ME, READER):
        assert torch.equal(pull(token)(tokens()).logits, model(tokens()).logits)
    here = {path for _, path, headers in hub.requests if ME in headers.get("Authorization", "")}
    assert here and not any(path.startswith("/objects/") for path in here)  # the storage's host gets no token
    refused = {token: error_of(OSError, pull, token) for token in (False, OTHER, "hf_" + "x" * 34)}
    assert all("me/private" in str(error) for error in refused.values()), refused
    before = dict(hub.repos["models/me/private"].refs)
    pushes = {
        token: error_of(HfHubHTTPError, model.push_to_hub, "me/private", token=token) for token in (READER, OTHER)
    }
    assert [error.response.status_code for error in pushes.values()] == [403, 403]
    assert error_of(HfHubHTTPError, HfApi(token=ME).create_repo, "me/private").response.status_code == 409
    assert error_of(HfHubHTTPError, HfApi(token="hf_" + "x" * 34).whoami).response.status_code == 401
    assert hub.repos["models/me/private"].refs == before
    for error in (*refused.values(), *pushes.values()):
        assert not leaks(repr(error) + str(error.__cause__) + str(error.__context__))


def check_interrupted_push(hub: Hub, folder: Path) -> None:
    """The last revision stays whole, the next push completes."""
    import torch
    from conftest import build, tokens
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import AutoModelForCausalLM

    model = build()
    model.push_to_hub("me/cut", token=ME)
    repo = hub.repos["models/me/cut"]
    before, first = dict(repo.refs), model(tokens()).logits
    faults = {
        "the weights": (Fault("PUT", "/objects/", "cut", times=100), RuntimeError),
        "the commit": (Fault("POST", "/commit/", "cut"), Exception),
        "the server": (Fault("POST", "/commit/", 500), HfHubHTTPError),
        "the limit": (Fault("POST", "/commit/", 429), HfHubHTTPError),
        "a race": (Fault("POST", "/commit/", 409), HfHubHTTPError),
    }
    for name, (fault, kind) in faults.items():
        change(model)
        hub.faults = [fault]
        with no_waiting():
            error_of(kind, model.push_to_hub, "me/cut", token=ME)
        hub.faults = []
        assert repo.refs == before, name
        whole = Path(snapshot_download("me/cut", cache_dir=folder / name))
        assert {str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file()} == set(repo.files())
        assert torch.equal(AutoModelForCausalLM.from_pretrained(whole)(tokens()).logits, first), name
    model.push_to_hub("me/cut", token=ME)
    pulled = AutoModelForCausalLM.from_pretrained("me/cut")
    assert torch.equal(pulled(tokens()).logits, model(tokens()).logits)
    assert not torch.equal(pulled(tokens()).logits, first)

    change(model)
    hub.faults = [Fault("PUT", "/objects/", "cut"), Fault("PUT", "/objects/", 500)]
    hub.faults += [Fault("PUT", "/objects/", 429, headers={"Retry-After": "7"})]
    with no_waiting() as waits:
        model.push_to_hub("me/cut", token=ME)
    assert 8.0 in waits  # what the Hub asked for and a second
    assert not any(fault.times for fault in hub.faults)
    pulled = AutoModelForCausalLM.from_pretrained("me/cut")
    assert torch.equal(pulled(tokens()).logits, model(tokens()).logits)


def check_interrupted_download(hub: Hub, folder: Path) -> None:
    """Goes on where it was cut; nothing half or altered is loaded."""
    import torch
    from conftest import build, tokens
    from huggingface_hub import HfApi, snapshot_download
    from transformers import AutoModelForCausalLM

    model = build()
    model.save_pretrained(folder / "it")
    hub.put_folder("models/me/down", folder / "it")

    def pull(name: str, **settings: Any) -> torch.Tensor:
        settings = {"cache_dir": folder / name, **settings}
        return AutoModelForCausalLM.from_pretrained("me/down", **settings)(tokens()).logits

    expected = model(tokens()).logits
    for fault in (Fault("GET", "/objects/", "cut"), Fault("GET", "/objects/", 429, headers={"Retry-After": "0"})):
        hub.faults, hub.requests[:] = [fault], []
        with no_waiting(), patch("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000):
            assert torch.equal(pull(f"once {fault.kind}"), expected)
        ranges = [headers["Range"] for _, path, headers in hub.requests if "/objects/" in path and "Range" in headers]
        half = len(hub.repos["models/me/down"].files()["model.safetensors"].content) // 2
        assert ranges == ([f"bytes={half // 1000 * 1000}-"] if fault.kind == "cut" else [])  # whole chunks are kept

    hub.faults = [Fault("GET", "/objects/", "cut", times=100)]
    with no_waiting():
        error_of(Exception, pull, "for ever")
    assert not list((folder / "for ever").rglob("*.safetensors"))
    hub.faults = []
    assert torch.equal(pull("for ever"), expected)

    for status in (500, 403):
        hub.faults = [Fault(method, "resolve|objects", status, times=100) for method in ("HEAD", "GET")]
        with no_waiting():
            error = error_of(OSError, pull, f"status {status}")
        assert "me/down" in str(error) or "connect" in str(error), error
    hub.faults = []
    assert "v9" in str(error_of(OSError, pull, "revision", revision="v9"))
    assert "me/nothing" in str(error_of(OSError, AutoModelForCausalLM.from_pretrained, "me/nothing"))

    hub.faults = [Fault("GET", "/objects/", "flip")]
    error = error_of(OSError, pull, "flip")
    assert "SHA-256" in str(error) and "force_download=True" in str(error)
    assert "SHA-256" in str(error_of(OSError, pull, "flip"))  # from the cache too
    assert torch.equal(pull("flip", force_download=True), expected)
    hub.faults = [Fault("GET", "/objects/", "flip")]
    snapshot_download("me/down", cache_dir=folder / "snapshot")  # huggingface_hub itself compares sizes only
    found = HfApi().verify_repo_checksums("me/down", cache_dir=folder / "snapshot")
    assert [mismatch["path"] for mismatch in found.mismatches] == ["model.safetensors"]
    error = error_of(OSError, pull, "snapshot")
    assert "SHA-256" in str(error)


def check_datasets_and_processors(hub: Hub, folder: Path) -> None:
    import numpy as np
    from conftest import TEXT, make_tokenizer
    from datasets import Dataset, load_dataset
    from transformers import AutoImageProcessor, AutoTokenizer
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    rows = [{"text": line} for line in TEXT.splitlines()[:50]]
    hub.put("datasets/me/lines", {"train.jsonl": "\n".join(map(json.dumps, rows)).encode()}, private=True)
    assert load_dataset("me/lines", token=READER)["train"].to_list() == rows
    error_of(Exception, load_dataset, "me/lines", token=False, cache_dir=folder / "other")
    Dataset.from_list(rows).push_to_hub("me/pushed", token=ME)
    assert load_dataset("me/pushed", split="train").to_list() == rows

    tokenizer = make_tokenizer()
    tokenizer.push_to_hub("me/tokenizer", token=ME)
    pulled = AutoTokenizer.from_pretrained("me/tokenizer")
    assert pulled(TEXT).input_ids == tokenizer(TEXT).input_ids
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.3] * 3, image_std=[0.7] * 3)
    processor.push_to_hub("me/processor", token=ME)
    image = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    pulled = AutoImageProcessor.from_pretrained("me/processor", use_fast=False)
    assert np.array_equal(pulled(image).pixel_values[0], processor(image).pixel_values[0])


def check_command_line(hub: Hub, folder: Path) -> None:
    import contextlib
    import io

    import torch
    from conftest import build, make_tokenizer, tokens
    from transformers import AutoModelForCausalLM

    from feedback_transformers import cli
    from feedback_transformers import hub as sharing

    model = build()
    sharing.describe(model, make_tokenizer())
    model.push_to_hub("me/cli", token=ME)
    (folder / "metrics.json").write_text('{"accuracy": 0.75}')
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        cli.main(["info", "me/cli"])
        target = str(folder / "out")
        cli.main(["export", "me/cli", target, "--results", str(folder / "metrics.json"), "--dataset", "me/plays"])
        cli.main(["info", "me/cli"])
    assert f"{model.num_parameters():,}" in shown.getvalue() and "announced SHA-256" in shown.getvalue()
    assert torch.equal(AutoModelForCausalLM.from_pretrained(target)(tokens()).logits, model(tokens()).logits)
    hub.put_folder("models/me/exported", folder / "out")
    assert_complete(hub.repos["models/me/exported"].files(), {"accuracy": 0.75}, "me/plays")


def check_elsewhere(hub: Hub, folder: Path) -> None:
    """Where the package is not: pull, push again, pull that; adapters; an altered download."""
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

    inputs, expected, adapted, ids = torch.load(folder.parent / "expected.pt")
    hub.put_folder("models/me/it", folder.parent / "it")
    hub.put_folder("models/me/adapter", folder.parent / "adapter")
    hub.repos["models/me/it"].private = True

    def pull(auto: Any, name: str, **settings: Any) -> Any:
        return auto.from_pretrained(name, trust_remote_code=True, token=ME, **settings)

    hub.faults = [Fault("GET", "/objects/", "flip")]
    assert "SHA-256" in str(error_of(OSError, pull, AutoModelForCausalLM, "me/it"))
    model = pull(AutoModelForCausalLM, "me/it", force_download=True)
    assert type(model).__module__.startswith("transformers_modules.")
    assert torch.equal(model(inputs).logits, expected)
    assert type(pull(AutoModel, "me/it")).__name__ == "FeedbackModel"
    tokenizer = pull(AutoTokenizer, "me/it")
    assert tokenizer("an").input_ids == ids
    assert len(pipeline("text-generation", model, tokenizer=tokenizer)("an", max_new_tokens=2)) == 1
    model.push_to_hub("me/again", token=ME)
    pushed, original = hub.repos["models/me/again"].files(), hub.repos["models/me/it"].files()
    for path in [path for path in original if path.endswith((".py", "config.json", ".safetensors"))]:
        if path != "tokenizer_config.json" and path != "config.json":
            assert pushed[path].content == original[path].content, path
    maps = [json.loads(files["config.json"].content)["auto_map"] for files in (pushed, original)]
    assert maps[0] == {auto: f"me/it--{reference}" for auto, reference in maps[1].items()} or maps[0] == maps[1]
    assert torch.equal(pull(AutoModelForCausalLM, "me/again")(inputs).logits, expected)
    assert torch.equal(PeftModel.from_pretrained(model, "me/adapter")(inputs).logits, adapted)


HERE = [
    check_plain_push,
    check_trainer_push,
    check_tokens_and_private_repositories,
    check_interrupted_push,
    check_interrupted_download,
    check_datasets_and_processors,
    check_command_line,
]
ELSEWHERE = [check_elsewhere]


def test_with_the_package(tmp_path: Path) -> None:
    run_checks(HERE, tmp_path)


def test_without_the_package(tmp_path: Path) -> None:
    import torch
    from conftest import build, make_tokenizer, tokens
    from peft import LoraConfig, get_peft_model

    from feedback_transformers import hub as sharing

    model = build()
    sharing.export(model, tmp_path / "it", make_tokenizer())
    expected = model(tokens()).logits.detach()
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    saved = (tokens(), expected, adapted(tokens()).logits.detach(), make_tokenizer()("an").input_ids)
    torch.save(saved, tmp_path / "expected.pt")
    run_checks(ELSEWHERE, tmp_path)


# What the checks share


def assert_complete(files: Files, results: dict[str, float], dataset: str, plot: str | None = None) -> None:
    """Code, auto_map, processor, generation_config, plot, and a card that says what was measured."""
    from feedback_transformers.models import configuration_feedback

    code = [file for file in Path(configuration_feedback.__file__).parent.glob("*.py") if file.name != "__init__.py"]
    assert len(code) > 15
    for file in code:
        assert files[file.name].content == file.read_bytes()
    assert json.loads(files["config.json"].content)["auto_map"] == configuration_feedback.AUTO_MAP
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"} <= set(files)
    assert plot is None or (files[plot].content[:4] == b"\x89PNG" and plot.encode() in files["README.md"].content)
    assert_results(files, results, dataset)


def assert_results(files: Files, results: dict[str, float], dataset: str) -> None:
    (index,) = card_of(files)["model-index"]
    measured = {
        metric["name"]: metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
        if result["dataset"]["type"] == dataset
    }
    results = {metric: float(f"{value:.4g}") for metric, value in results.items()}
    assert measured == results
    entries = yaml.safe_load(files[f".eval_results/{dataset.replace('/', '_')}.yaml"].content)
    assert {entry["dataset"]["task_id"]: entry["value"] for entry in entries} == results
    assert {entry["dataset"]["id"] for entry in entries} == {dataset}


def card_of(files: Files) -> dict[str, Any]:
    return yaml.safe_load(files["README.md"].content.decode().split("---")[1])


def picture_in(folder: Path) -> Path:
    from matplotlib.figure import Figure

    Figure((1, 1)).savefig(folder / "picture.png")
    return folder / "picture.png"


def change(model: Any, amount: Iterator[int] = count(1)) -> None:  # noqa: B008  # never to the same weights
    model.get_input_embeddings().weight.data += 0.01 * next(amount)


def error_of(kind: type[BaseException], function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    try:
        function(*arguments, **settings)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__} from {function}")


@contextmanager
def no_waiting() -> Iterator[list[float]]:
    """The seconds that the retries within would have waited."""
    waits: list[float] = []
    with patch("huggingface_hub.utils._http.time.sleep", waits.append):
        yield waits


def leaks(text: str | bytes) -> bool:
    text = text.encode() if isinstance(text, str) else text
    return any(token.encode() in text for token in USERS)


def run_checks(checks: list[Callable[[Hub, Path], None]], folder: Path) -> None:
    """Runs them in another process, everything logged, and looks for tokens in what it printed and wrote."""
    names = [check.__name__ for check in checks]
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
    environment |= {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "TRANSFORMERS_VERBOSITY": "debug"}
    done = subprocess.run(
        [sys.executable, __file__, str(folder), *names],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    said = done.stdout.splitlines()
    assert [line for line in said if line.startswith("passed ")] == [
        f"passed {name}" for name in (*names, "no token was pushed")
    ], "\n".join(line for line in said if not line.startswith("passed")) + done.stderr[-2000:]
    assert "Send: curl" in done.stdout + done.stderr  # the requests were logged
    assert not leaks(done.stdout + done.stderr)
    written = [file for file in folder.rglob("*") if file.is_file()]
    assert written and not [file for file in written if leaks(file.read_bytes())]


def main(folder: Path, names: list[str]) -> None:
    """In the other process: one check after the other, each in a folder of its own."""
    if names == [check.__name__ for check in ELSEWHERE]:
        sys.modules["feedback_transformers"] = None  # type: ignore[assignment]
    with Hub(USERS) as hub:
        os.environ.update(HF_ENDPOINT=hub.url, HF_TOKEN=ME)
        import torch
        import transformers  # noqa: F401  # reads the environment, before conftest changes it

        torch.set_num_threads(1)  # as where the logits were computed that are compared
        for name in names:
            start, hub.faults = time.time(), []
            (folder / name).mkdir()
            try:
                globals()[name](hub, folder / name)
            except Exception:
                traceback.print_exc(file=sys.stdout)
            else:
                print("passed", name, flush=True)
            print(f"seconds {time.time() - start:.1f} {name}")
        pushed = [
            blob.content for repo in hub.repos.values() for files in repo.commits.values() for blob in files.values()
        ]
        assert not any(map(leaks, pushed))
        print("passed", "no token was pushed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
