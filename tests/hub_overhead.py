"""What a push and a pull of a model cost; the figures of docs/guides/share.md.

python tests/hub_overhead.py
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from hub_server import Hub

ME, ROUNDS = "hf_" + "m" * 34, 5


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main(hub: Hub, folder: Path) -> None:
    # huggingface_hub reads the address of the Hub when it is imported.
    os.environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder), "HF_TOKEN": ME, "HF_HUB_OFFLINE": "0"}
    os.environ |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM

    from feedback_transformers import FeedbackConfig, FeedbackForCausalLM
    from feedback_transformers.models import feedback_files

    model = FeedbackForCausalLM(FeedbackConfig(vocab_size=32_000, hidden_size=512, num_feedback_layers=4))
    print(f"{model.num_parameters():,} parameters")
    first = seconds(lambda: model.push_to_hub("me/it"))
    files = {name: len(blob.content) for name, blob in hub.repos["models/me/it"].files().items()}
    code = sum(size for name, size in files.items() if name.endswith(".py"))
    size = sum(files.values())
    print(f"push: {first:.1f} s, {len(hub.requests)} requests, {size / 1e6:.0f} MB, {code / 1e6:.2f} MB of it code")
    hub.requests.clear()
    again = seconds(lambda: model.push_to_hub("me/it"))
    uploads = sum(method == "PUT" for method, _, _ in hub.requests)
    print(f"the same once more: {again:.1f} s, {len(hub.requests)} requests, {uploads} uploads of weights")
    print(f"snapshot_download: {seconds(lambda: snapshot_download('me/it')):.1f} s")

    load = partial(AutoModelForCausalLM.from_pretrained, "me/it")
    load()
    (weights,) = folder.glob("hub/models--me--it/snapshots/*/model.safetensors")
    times = [(seconds(load), seconds(partial(feedback_files.sha256, weights))) for _ in range(ROUNDS)]
    total, share = map(statistics.median, zip(*times, strict=True))
    print(f"from_pretrained from the cache: {total:.2f} s; the SHA-256 of the weights, a part of it: {share:.2f} s")


if __name__ == "__main__":
    with Hub({ME: ("me", "write")}) as server, tempfile.TemporaryDirectory() as temporary:
        main(server, Path(temporary))
