"""The test mixins of transformers, over our models and over Llama as a yardstick; run by test_transformers_mixins.py.

The mixins are those of the sdist of the installed version, whose folder stands in FEEDBACK_SDIST. An sdist holds no
subfolders of tests/, so the mixins of generation and of export that ModelTesterMixin imports are empty here.
"""

import os
import sys
import unittest
from pathlib import Path
from types import ModuleType

from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
)
from transformers.models.auto import modeling_auto

from feedback_transformers import (
    FeedbackConfig,
    FeedbackForCausalLM,
    FeedbackForQuestionAnswering,
    FeedbackForSequenceClassification,
    FeedbackForTokenClassification,
    FeedbackModel,
    retrofit,
)


def module(name: str, **members: object) -> ModuleType:
    """Put a module with these members where `import` finds it."""
    made = sys.modules[name] = ModuleType(name)
    vars(made).update(members)
    return made


TESTS = Path(os.environ["FEEDBACK_SDIST"]) / "tests"
(TESTS / "__init__.py").touch()  # which a sdist leaves out, and test_configuration_common reads
module("transformers_tests", __path__=[str(TESTS)])
EMPTY = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {"output_hidden_states": True, "chunk_size_feed_forward": 5}
    },
}
for place, members in EMPTY.items():
    module(f"transformers_tests.{place.partition('.')[0]}")
    module(f"transformers_tests.{place}", **members)

from transformers_tests import test_modeling_common  # noqa: E402
from transformers_tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_modeling_common import (  # noqa: E402
    ModelTesterMixin,
    ids_tensor,
    random_attention_mask,
)
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402

# transformers finds out by the names of its own classes which inputs a class takes for training.
for names, added in {
    "MODEL_MAPPING_NAMES": "FeedbackModel",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "FeedbackForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "FeedbackForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "FeedbackForQuestionAnswering",
}.items():
    getattr(modeling_auto, names)["feedback"] = added

# It makes norms insensitive by a field of the config, which ours keeps in backbone_config.
set_norms = test_modeling_common.set_config_for_less_flaky_test
test_modeling_common.set_config_for_less_flaky_test = lambda config: set_norms(
    getattr(config, "backbone_config", config)
)

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class ModelTester:
    """Makes the configs and inputs that the mixins ask for."""

    batch_size, seq_length, is_training = 13, 7, True
    num_hidden_layers, hidden_size, num_attention_heads = 2, SIZES["hidden_size"], SIZES["num_attention_heads"]

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.base_model_class, self.causal_lm_class = parent.all_model_classes[:2]
        if self.causal_lm_class is FeedbackForCausalLM:  # the embeddings, e, h of each pass, and y
            config = parent.make_config()
            self.expected_num_hidden_layers = 3 + (config.num_feedback_steps if config.in_passes else 1)

    def get_config(self):
        return self.parent.make_config()

    def prepare_config_and_inputs_for_common(self) -> tuple:
        ids = ids_tensor([self.batch_size, self.seq_length], SIZES["vocab_size"])
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {"input_ids": ids.clamp(min=3), "attention_mask": mask}


class Suite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    config_class = FeedbackConfig

    def setUp(self) -> None:
        self.model_tester = ModelTester(self)
        self.config_tester = ConfigTester(self, config_class=self.config_class, **self.fields)

    def make_config(self):
        return self.config_class(**self.fields)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


FEEDBACK_HEADS = (
    FeedbackModel,
    FeedbackForCausalLM,
    FeedbackForSequenceClassification,
    FeedbackForTokenClassification,
    FeedbackForQuestionAnswering,
)
LAYERS = {"num_encoder_layers": 1, "num_feedback_layers": 1, "num_decoder_layers": 1, "num_feedback_steps": 2}


class LlamaTest(Suite, unittest.TestCase):
    config_class = LlamaConfig
    fields = {**SIZES, "num_hidden_layers": 2}
    all_model_classes = (
        LlamaModel,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
        LlamaForQuestionAnswering,
    )


class DepthTest(Suite, unittest.TestCase):
    fields = {**SIZES, **LAYERS}
    all_model_classes = FEEDBACK_HEADS


class TimeTest(Suite, unittest.TestCase):
    fields = {**SIZES, **LAYERS, "feedback_axis": "time", "feedback_type": "gru", "decoder_type": "mlp"}
    all_model_classes = FEEDBACK_HEADS


class RetrofitTest(Suite, unittest.TestCase):
    fields = SIZES
    all_model_classes = FEEDBACK_HEADS

    def make_config(self):
        return retrofit(LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2)), encoder_layers=1).config
