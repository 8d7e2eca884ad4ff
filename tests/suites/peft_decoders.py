"""PEFT's own tests of decoder models, over a tiny checkpoint of each cell; run by test_peft_decoders.py.

They come from the sdist of the installed version, whose folder stands in FEEDBACK_SDIST, and are left as they are, but
for the models they load: tiny checkpoints in the working directory, in place of those on the Hub. Tests that name a
model of the Hub themselves are left out.
"""

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from feedback_transformers import FeedbackConfig, FeedbackForCausalLM, retrofit

diffusers = ModuleType("diffusers")  # of which PEFT's tests import one class, to ask whether a model is one
diffusers.__spec__ = ModuleSpec("diffusers", None)
diffusers.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
sys.modules["diffusers"] = diffusers
peft_tests = sys.modules["peft_tests"] = ModuleType("peft_tests")
peft_tests.__path__ = [str(Path(os.environ["FEEDBACK_SDIST"]) / "tests")]
from peft_tests import test_decoder_models  # noqa: E402

del sys.modules["diffusers"]

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = {"num_encoder_layers": 2, "num_feedback_layers": 1, "num_decoder_layers": 1, "num_feedback_steps": 2}
TIME = {**SIZES, **LAYERS, "feedback_axis": "time"}
DEPTH = {**SIZES, **LAYERS, "feedback_axis": "depth"}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=4)),
    "retrofit": lambda: retrofit(MODELS["llama"](), encoder_layers=2, decoder_layers=1, num_feedback_steps=2),
    "transformer": lambda: FeedbackForCausalLM(FeedbackConfig(**DEPTH, feedback_type="transformer")),
    "mlp": lambda: FeedbackForCausalLM(FeedbackConfig(**DEPTH, feedback_type="mlp")),
    "conv": lambda: FeedbackForCausalLM(FeedbackConfig(**TIME, feedback_type="conv")),
    "gru": lambda: FeedbackForCausalLM(FeedbackConfig(**TIME, feedback_type="gru")),
    "lstm": lambda: FeedbackForCausalLM(FeedbackConfig(**TIME, feedback_type="lstm")),
    "diagonal_gru": lambda: FeedbackForCausalLM(FeedbackConfig(**TIME, feedback_type="diagonal_gru")),
    "min_gru": lambda: FeedbackForCausalLM(FeedbackConfig(**TIME, feedback_type="min_gru")),
}
# Of the 47 configurations of PEFT: those by which people adapt decoders. tests/test_peft_retrofit.py has all methods.
CONFIGS = [
    (config, fields)
    for config, fields in test_decoder_models.ALL_CONFIGS
    if config.__name__ in ("IA3Config", "LoraConfig", "OFTConfig", "PromptTuningConfig")
    and fields.get("alora_invocation_tokens") != [1000]  # which is never invoked
]
HUB = ("test_prompt_learning_with_gradient_checkpointing",)  # which reads a data set of the Hub
LISTS = {"model_id": [name for name in MODELS if name != "llama"], "config_cls,config_kwargs": CONFIGS}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def over_our_models(test):
    """Give a test of PEFT our models and CONFIGS for its own lists; None where it names a model of the Hub itself."""
    marks = getattr(test, "pytestmark", [])
    if not any(mark.args and mark.args[0] == "model_id" for mark in marks):
        return None
    whole = test_decoder_models.ALL_CONFIGS
    test.pytestmark = [
        pytest.mark.parametrize(mark.args[0], LISTS[mark.args[0]]).mark
        if mark.args and (mark.args[0] == "model_id" or mark.args[1] is whole)
        else mark
        for mark in marks
    ]
    return test


class TestDecoders(test_decoder_models.TestDecoderModels):
    pass


for name, make in MODELS.items():
    if not Path(name).exists():
        torch.manual_seed(0)
        make().save_pretrained(name)
        words = Tokenizer(WordLevel({str(i): i for i in range(99)}, unk_token="0"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", eos_token="2").save_pretrained(name)
for name, test in vars(test_decoder_models.TestDecoderModels).items():
    if name.startswith("test_"):  # pytest leaves out what is None
        setattr(TestDecoders, name, None if name in HUB else over_our_models(test))
