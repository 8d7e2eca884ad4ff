"""README and docs: the Python of each page runs, block after block, and its commands name what exists."""

import re
from pathlib import Path

import pytest
from test_examples import examples_on_path  # noqa: F401 - a fixture

from feedback_transformers import FeedbackPreTrainedModel, hub

ROOT = Path(__file__).parent.parent
# A notebook is run by `make notebooks`; fragments of the other pages need a model of the reader's.
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.parent.name != "notebooks"]
RUN = [page for page in PAGES if "```python" in page.read_text(encoding="utf-8")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def push_to_folder(model, repository):
    model.save_pretrained(repository)
    if model.sharing is not None:
        hub.complete(model, repository, model.sharing)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch, registries):
    """A folder of the same name stands in for a repository of the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(FeedbackPreTrainedModel, "push_to_hub", push_to_folder)
    namespace: dict = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 600


@pytest.mark.parametrize("page", [page for page in PAGES if "```bash" in page.read_text()], ids=lambda page: page.stem)
def test_commands_of_a_page_name_files_flags_and_targets_that_exist(page, examples_on_path):  # noqa: F811
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    modules = {"benchmarks", "feedback_transformers", "pytest"}
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        for module in re.findall(r"python -m ([\w.]+)", line):
            path = ROOT / module.replace(".", "/")
            assert module in modules or path.with_suffix(".py").exists() or (path / "__main__.py").exists(), line
        if script := re.search(r"(?:examples|tests|docs)/[\w/]+\.py", line):
            source = "".join(
                file.read_text()
                for file in [ROOT / script[0], *(ROOT / "feedback_transformers/training").rglob("*.py")]
            )
            for flag in re.findall(r"--([a-z_]+)", line.split(script[0])[1]):
                assert re.search(rf"\b{flag}\b", source) or flag in TRAINING_FLAGS, f"{line}: --{flag}"


TRAINING_FLAGS = {"output_dir", "do_train", "help", "metric_for_best_model", "resume_from_checkpoint"}


def test_links_of_the_readme_and_other_pages_outside_the_site_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]:
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
