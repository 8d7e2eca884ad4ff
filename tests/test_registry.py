"""Parts that a user's own file registers: they are built, trained and saved, and load where that file is not."""

import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import assert_close, build, dataset, tokens
from test_hub import run_elsewhere
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from feedback_transformers import FeedbackConfig, FeedbackForCausalLM, FeedbackModel, register
from feedback_transformers.models import feedback_registry
from feedback_transformers.models.feedback_names import CHOICES
from feedback_transformers.models.feedback_scan import scan, scan_reference
from feedback_transformers.models.feedback_solvers import SOLVERS, Passes, solver_of

CONTRIBUTING = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
LEAKY, TWICE, TURNED = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
PARTS = """
import torch
from torch import nn

from feedback_transformers import register
from feedback_transformers.models.feedback_inputs import Embedded
from feedback_transformers.models.feedback_inputs_text import TokenInput


@register("feedback_connection", "mean")
class Mean(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.signal_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, e, signal):
        return (e + self.signal_proj(signal)) / 2


@register("encoder_type", "scale")
class Scale(nn.Module):
    def __init__(self, config, num_layers, causal=True):
        super().__init__()
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, context):
        return self.out_proj(x)


@register("decoder_type", "scale")
class Same(Scale):
    pass


@register("input_type", "tokens_twice")
class Twice(TokenInput):
    def forward(self, input_ids):
        return Embedded(2 * self.embed_tokens(input_ids))


@register("feedback_type", "plain")
class Plain(Scale):
    def __init__(self, config):
        super().__init__(config, 1)

    def step(self, x, state, context):
        return self(x, context), None
"""
# Runs where feedback_transformers can't be imported; argv: a folder that holds a folder for each model.
ELSEWHERE = """
    import sys, torch
    from pathlib import Path
    sys.modules["feedback_transformers"] = None
    from transformers import AutoModelForCausalLM

    for folder in sorted(Path(sys.argv[1]).iterdir()):
        inputs, expected = torch.load(folder / "case.pt")
        for source, target in ((folder, folder / "again"), (folder / "again", folder / "third")):
            model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
            assert torch.equal(model(inputs).logits, expected)
            model.save_pretrained(target)
        print(model.config.feedback_type, *model.config.plugins)
"""
HERE = """
    import sys, torch
    from feedback_transformers import FeedbackForCausalLM
    from transformers import AutoModelForCausalLM

    inputs, expected = torch.load(sys.argv[1] + "/case.pt")
    try:
        AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    except ValueError as error:
        print(error)
    model = FeedbackForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    assert torch.equal(model(inputs).logits, expected)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(sys.argv[1])(inputs).logits, expected)
"""


@pytest.fixture
def own(tmp_path, monkeypatch, registries):
    """Import a file of that text from a folder of its own; all registries are as before in the end."""
    modules = set(sys.modules)
    monkeypatch.syspath_prepend(str(tmp_path / "mine"))

    def load(name: str, text: str):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - modules:
        if name.rpartition(".")[2] in ("leaky", "parts", "twice", "turned"):
            del sys.modules[name]


def save(model, folder: Path) -> None:
    model.save_pretrained(folder)
    torch.save((tokens(), model(tokens()).logits.detach()), folder / "case.pt")


@pytest.mark.parametrize("fields", [{"feedback_axis": "time"}, {"feedback_axis": "depth"}], ids=["time", "depth"])
def test_a_registered_recurrence(fields, own, tmp_path):
    """It equals the formula, trains, generates with a cache, and needs no kernel."""
    leaky = own("leaky", LEAKY)
    model = build(feedback_type="leaky", feedback_signal="none", **fields)
    cell = model.model.loop.cell.layers[0][0]
    assert isinstance(cell, leaky.Leaky) and model.config.plugins == ["leaky.py"]
    x = torch.randn(2, 5, 32)
    h = torch.zeros(2, 32)
    for t in range(5):
        candidate = torch.tanh(
            x[:, t] @ cell.input_proj.weight.T + cell.input_proj.bias + h @ cell.state_proj.weight.T
        )
        h = h + torch.sigmoid(cell.leak) * (candidate - h)
    for function in (scan, scan_reference):
        assert_close(function(cell, x, cell.initial_state(x[:, 0]))[1].h, h, 1e-6)
    written = [
        model.generate(tokens(1), max_new_tokens=4, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    ]
    assert torch.equal(*written)
    args = TrainingArguments(
        tmp_path, max_steps=8, learning_rate=1e-2, logging_steps=1, use_cpu=True, report_to="none"
    )
    trainer = Trainer(model, args, train_dataset=dataset())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1 and cell.leak.abs().max() > 0


def test_the_code_travels(own, tmp_path):
    """A checkpoint loads without the package and without the file, and so does what is saved there."""
    own("leaky", LEAKY)
    own("parts", PARTS)
    save(build(feedback_type="leaky", feedback_axis="time"), tmp_path / "models" / "1")
    others = {"feedback_connection": "mean", "encoder_type": "scale", "decoder_type": "scale"}
    save(build(feedback_type="plain", **others), tmp_path / "models" / "2")
    save(build(feedback_type="leaky", **others), tmp_path / "models" / "3")
    assert "from .feedback_registry import register" in (tmp_path / "models" / "1" / "leaky.py").read_text()
    printed = run_elsewhere(ELSEWHERE, tmp_path / "models", folder=tmp_path).splitlines()
    assert printed == ["leaky leaky.py", "plain parts.py", "leaky leaky.py parts.py"]
    twice = build(FeedbackModel, input_config="tokens_twice").embeddings
    assert torch.equal(twice(tokens()).x, 2 * twice.embed_tokens(tokens()))


@pytest.mark.parametrize("field", feedback_registry.REGISTRIES)
def test_the_config_knows_the_names_of_all_parts(field):
    other = {"halting": {"fixed"}}.get(field, set())  # for which there is nothing to build
    assert set(CHOICES[field]) == set(feedback_registry.REGISTRIES[field]) | other


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_config_knows_which_solvers_make_passes(solver):
    kind = {"feedback_type": "min_gru", "feedback_signal": "none"} if solver == "newton" else {}
    config = FeedbackConfig(feedback_axis="time", solver=solver, **kind)
    assert config.in_passes == SOLVERS[solver].makes_passes == solver_of(config).makes_passes


def test_a_registered_solver_makes_passes(registries):
    @register("solver", "mine")
    class Mine(Passes):
        pass

    config = FeedbackConfig(feedback_axis="time", solver="mine", solver_steps=5, vocab_size=99)
    assert config.in_passes
    ours, jacobi = build(feedback_axis="time", solver="mine"), build(feedback_axis="time", solver="jacobi")
    assert torch.equal(ours(tokens()).logits, jacobi(tokens()).logits)


def test_a_registered_recursion_and_halting(own, tmp_path):
    """They equal what their examples say, and travel."""
    own("twice", TWICE)
    own("turned", TURNED)
    model = build(feedback_recursion="twice", num_feedback_steps=1, feedback_connection="add")
    base, e = model.model, torch.randn(2, 13, 32)
    context, _ = base.make_context(e, None, None, None)
    zeros = torch.zeros_like(e)
    first = base.loop.cell(base.loop.connect(e, zeros, context), context)
    expected = base.loop.cell(base.loop.connect(e, first, context), context)
    assert_close(base.loop.step(e, None, None, context, 0)[0], expected, 1e-6)
    cached = model.generate(tokens(1), max_new_tokens=4, do_sample=False)
    assert torch.equal(cached, model.generate(tokens(1), max_new_tokens=4, do_sample=False, use_cache=False))

    shape = {"is_causal": False, "initializer_range": 0.5}  # so that no position reads what another halted at
    before, h = build(FeedbackModel, num_feedback_steps=2, **shape)(tokens(), output_hidden_states=True).hidden_states[
        2:4
    ]
    alike = torch.cosine_similarity(h, before, dim=-1)
    halting = build(
        FeedbackModel, halting="turned", halting_threshold=alike.median().item(), num_feedback_steps=6, **shape
    )
    assert torch.equal(halting(tokens()).num_feedback_steps == 2, alike >= alike.median())
    halting = build(halting="turned", halting_threshold=0.9, num_feedback_steps=6)
    save(model, tmp_path / "models" / "1")
    save(halting, tmp_path / "models" / "2")
    assert run_elsewhere(ELSEWHERE, tmp_path / "models", folder=tmp_path).splitlines() == [
        "transformer twice.py",
        "transformer turned.py",
    ]


def test_where_the_package_is_its_code_needs_trust(own, tmp_path):
    own("leaky", LEAKY)
    save(build(feedback_type="leaky"), tmp_path / "it")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HERE), str(tmp_path / "it")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Its code came along in leaky.py: import that file, or load the model with trust_remote_code" in done.stdout


def test_a_checkpoint_without_registered_parts_is_as_before(tmp_path):
    build().save_pretrained(tmp_path)
    assert "PLUGINS: tuple[str, ...] = ()" in (tmp_path / "feedback_plugins.py").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.plugins is None


def test_what_cannot_be_registered_is_refused(own, tmp_path, caplog):
    with pytest.raises(ValueError, match="There are no parts for 'num_labels'; choose one of input_type"):
        register("num_labels", "mine")
    with pytest.raises(ValueError, match="There is a feedback_type 'gru' already: choose another name"):
        own("leaky", LEAKY.replace('"leaky"', '"gru"'))
    own("parts", PARTS.replace("import torch\n", "from feedback_transformers import hub\n", 1))
    assert "parts.py says `from feedback_transformers import hub`: write" in caplog.text
    model = build(feedback_connection="mean")  # which is of use here all the same
    model.save_pretrained(tmp_path / "it")
    assert model.config.plugins is None and not (tmp_path / "it" / "parts.py").exists()
    with pytest.raises(ValueError, match=r"plugins names '../x.py', which is not a Python file beside"):
        feedback_registry.check_name("../x.py")
    assert FeedbackForCausalLM.from_pretrained(tmp_path / "it").config.feedback_connection == "mean"
