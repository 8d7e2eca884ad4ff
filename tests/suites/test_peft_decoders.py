"""What PEFT's own tests of decoder models find in ours. Each of them that fails is listed here, with its reason."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
import sdist

KNOWN: dict[str, str] = {}  # the id of a test, such as test_generate[IA3Config-config_kwargs1-gru] -> its reason


@pytest.mark.slow
def test_peft_tests_fail_only_where_listed(tmp_path):
    """A listed test that passes fails here too: then it leaves the list."""
    report, here = tmp_path / "report.xml", Path(__file__).parent
    environment = os.environ | {"FEEDBACK_SDIST": str(sdist.unpacked("peft")), "PYTHONPATH": str(here.parents[1])}
    options = ["-q", "-c", os.devnull, "--rootdir", str(here), "-p", "no:cacheprovider", "--junitxml", str(report)]
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", str(here / "peft_decoders.py"), *options],
        cwd=tmp_path,  # where the tiny checkpoints are written
        env=environment,
        capture_output=True,
        text=True,
    )
    assert report.exists(), finished.stdout + finished.stderr
    outcomes = {
        str(test.get("name")): {child.tag for child in test} for test in ElementTree.parse(report).iter("testcase")
    }
    failed = {test for test, outcome in outcomes.items() if outcome & {"failure", "error"}}
    skipped = {test for test, outcome in outcomes.items() if "skipped" in outcome} - failed
    print(Counter(passed=len(outcomes) - len(failed) - len(skipped), failed=len(failed), skipped=len(skipped)))
    assert failed == set(KNOWN), finished.stdout
