"""What transformers' own tests find in our models. Each of them that fails is listed here, with its reason."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import sdist

ATTENTIONS = "Attention weights are not returned."
LOOP = "The loop checkpoints whole passes, so the layers inside it do not checkpoint again."
REENTRANT = "use_reentrant=True is refused: the loop would be recomputed with a graph of its own."
SUMS = "The test overwrites the weights of a checkpoint, which SHA256SUMS is there to notice."
PARALLEL = "Tensor parallelism has no plan yet."

FEEDBACK = {
    "test_attention_outputs": ATTENTIONS,
    "test_model_outputs_equivalence": ATTENTIONS,
    "test_retain_grad_hidden_states_attentions": ATTENTIONS,
    "test_training_gradient_checkpointing_use_reentrant_true": REENTRANT,
    "test_model_weights_reload_no_missing_tied_weights": SUMS,
    "test_tied_head_has_a_tp_plan_entry": PARALLEL,
    "test_tp_plan_matches_params": PARALLEL,
}
CHECKPOINTED = {
    "test_gradient_checkpointing_enable_disable": LOOP,
    "test_peft_gradient_checkpointing_enable_disable": LOOP,
}
KNOWN: dict[str, dict[str, str]] = {
    "LlamaTest": {},
    "DepthTest": FEEDBACK | CHECKPOINTED,
    "TimeTest": FEEDBACK,
    "RetrofitTest": FEEDBACK | CHECKPOINTED,
}


@pytest.mark.slow
@pytest.mark.parametrize("suite", KNOWN)
def test_transformers_tests_fail_only_where_listed(suite, tmp_path):
    """A listed test that passes fails here too: then it leaves the list."""
    report = tmp_path / "report.xml"
    environment = os.environ | {"FEEDBACK_SDIST": str(sdist.unpacked("transformers"))}
    here = Path(__file__).parent
    options = ["-q", "-c", os.devnull, "--rootdir", str(here), "-p", "no:cacheprovider", "--junitxml", str(report)]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", f"{here / 'transformers_mixins.py'}::{suite}", *options],
        cwd=here.parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert report.exists(), finished.stdout + finished.stderr
    outcomes: dict[str, set[str]] = {}
    for test in ElementTree.parse(report).iter("testcase"):
        outcomes.setdefault(str(test.get("name")), set()).update(child.tag for child in test)
    failed = {test for test, outcome in outcomes.items() if outcome & {"failure", "error"}}
    skipped = {test for test, outcome in outcomes.items() if "skipped" in outcome} - failed
    print(suite, Counter(pass_=len(outcomes) - len(failed) - len(skipped), fail=len(failed), skip=len(skipped)))
    assert failed == set(KNOWN[suite]), finished.stdout
