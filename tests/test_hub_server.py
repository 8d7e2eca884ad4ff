"""`python tests/hub_server.py`: a Hub on this machine for people who want to try a push."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

PUSH_AND_PULL = """
import torch
from transformers import AutoModelForCausalLM
from feedback_transformers import FeedbackConfig, FeedbackForCausalLM
model = FeedbackForCausalLM(FeedbackConfig(vocab_size=9, hidden_size=8, num_attention_heads=2)).eval()
model.push_to_hub("me/my-model")
again = AutoModelForCausalLM.from_pretrained("me/my-model")
ids = torch.arange(9)[None]
assert torch.equal(model(ids).logits, again(ids).logits)
"""


def test_what_the_server_prints_is_enough_to_push_and_pull(tmp_path):
    root = Path(__file__).parents[1]
    server = subprocess.Popen(
        [sys.executable, str(root / "tests" / "hub_server.py")],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
    )
    try:
        said = ""
        while "from_pretrained" not in said and server.poll() is None:
            said += server.stdout.readline()
        settings = dict(pair.split("=") for pair in re.search("export (.+)", said)[1].split())
        outside = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        outside |= settings | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", PUSH_AND_PULL], cwd=tmp_path, env=outside, check=True, timeout=120)
        server.send_signal(signal.SIGINT)
        assert "The Hub has ended." in server.communicate(timeout=30)[0]
    finally:
        server.kill()
