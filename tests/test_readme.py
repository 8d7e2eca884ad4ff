"""The README's Python runs, block after block, in an empty folder; a folder of the same name stands in for the Hub."""

import re
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

README = Path(__file__).parent.parent / "README.md"


def push_to_folder(self, repo_id, **kwargs):
    self.save_pretrained(repo_id)


def test_snippets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PreTrainedModel, "push_to_hub", push_to_folder)
    monkeypatch.setattr(PreTrainedTokenizerBase, "push_to_hub", push_to_folder)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), namespace)
    for name in ("again", "anywhere"):
        assert namespace[name].num_parameters() > 0
