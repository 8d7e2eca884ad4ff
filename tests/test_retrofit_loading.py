"""Retrofit by name, and what it refuses."""

import pytest
import torch
from conftest import SIZES, assert_close, tokens
from peft import LoraConfig, get_peft_model
from test_retrofit import LAYERS, answer, config_of, original
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertForMaskedLM,
    GPT2DoubleHeadsModel,
    OPTConfig,
    OPTForCausalLM,
)

from feedback_transformers import FeedbackConfig, FeedbackForCausalLM, FeedbackModel, retrofit, unretrofit


def test_from_a_folder(tmp_path):
    before = original("qwen3")
    before.save_pretrained(tmp_path)
    model = retrofit(tmp_path, encoder_layers=2, decoder_layers=0, axis="time")
    assert isinstance(model, FeedbackForCausalLM) and model.config.num_feedback_layers == LAYERS - 2
    assert torch.equal(answer(model, tokens()), answer(before, tokens()))


def test_of_a_name_whose_head_is_not_taken(tmp_path):
    """As BERT and RoBERTa stand on the Hub."""
    before = BertForMaskedLM(config_of("bert")).eval()
    before.save_pretrained(tmp_path)
    model = retrofit(tmp_path, 1, 1)
    assert type(model) is FeedbackModel
    assert_close(model(tokens()).last_hidden_state, before.bert(tokens()).last_hidden_state, 1e-5)


def test_its_name_is_not_that_of_the_original(tmp_path):
    """For PEFT would note it as the base of adapters, which then are loaded onto the original."""
    original("llama").save_pretrained(tmp_path / "original")
    adapted = get_peft_model(retrofit(tmp_path / "original", 1, 1), LoraConfig(r=2, task_type="CAUSAL_LM"))
    assert not adapted.peft_config["default"].base_model_name_or_path


def test_refuses_what_it_cannot_do():
    fields = {"num_hidden_layers": 2, "hidden_size": 32, "ffn_dim": 32, "num_attention_heads": 2, "vocab_size": 50}
    with pytest.raises(ValueError, match="Models of type opt can't be retrofitted; these can: llama"):
        retrofit(OPTForCausalLM(OPTConfig(**fields, word_embed_proj_dim=32)), 1)
    with pytest.raises(ValueError, match="leave 0 of 5"):
        retrofit(original("llama"), 3, 2)
    with pytest.raises(ValueError, match="encoder_layers is '2'; it must be a whole number"):
        retrofit(original("llama"), "2")
    with pytest.raises(ValueError, match="use feedback_axis='depth'"):
        retrofit(original("bert"), 1, axis="time")
    with pytest.raises(ValueError, match="BertForMaskedLM can't be retrofitted"):
        retrofit(BertForMaskedLM(config_of("bert")), 1)
    with pytest.raises(ValueError, match="was not made by retrofit"):
        unretrofit(FeedbackForCausalLM(FeedbackConfig(**SIZES)))
    with pytest.raises(ValueError, match="was not made by retrofit"):
        unretrofit(original("llama"))
    with pytest.raises(ValueError, match="Give a model of transformers, not this Linear"):
        retrofit(torch.nn.Linear(2, 2), 1)
    for auto, other in ((AutoModelForCausalLM, FeedbackModel), (AutoModel, FeedbackForCausalLM)):
        config = retrofit(original("llama", auto), 1).config
        with pytest.raises(ValueError, match="which has another head: load it as a Feedback"):
            unretrofit(other(config))
    with pytest.raises(ValueError, match="are not the 5"):
        FeedbackConfig(**{**retrofit(original("llama"), 1).config.to_dict(), "num_encoder_layers": 2})
    for fields in ({"vocab_size": 60}, {"hidden_size": 64}, {"num_encoder_layers": 2}, {"retrofitted_from": None}):
        with pytest.raises(ValueError, match=f"Leave out {next(iter(fields))}: retrofit takes that from the model"):
            retrofit(original("llama"), 1, **fields)
    for name, value in (("token", "hf_it"), ("dtype", torch.bfloat16), ("attn_implementation", "eager")):
        with pytest.raises(ValueError, match=f"^{name}: no field of FeedbackConfig.*its model to retrofit"):
            retrofit(original("llama"), 1, **{name: value})
    with pytest.raises(ValueError, match="sliding_window is a field .* set it in the config of the model"):
        retrofit(original("llama"), 1, sliding_window=4)
    for fields in ({"use_bidirectional_attention": True}, {"is_causal": False}):
        with pytest.raises(ValueError, match="This gemma3_text reads both sides"):
            retrofit(original("gemma3_text", AutoModel, **fields), 1)
    with pytest.raises(ValueError, match="GPT2DoubleHeadsModel can't be retrofitted"):
        retrofit(GPT2DoubleHeadsModel(config_of("gpt2", num_labels=1)), 1)


def test_refuses_adapters_and_offloaded_weights():
    """Adapters would be saved under names that a load does not know."""
    adapted = original("llama")
    adapted.add_adapter(LoraConfig(r=2))
    for model in (adapted, get_peft_model(original("llama"), LoraConfig(r=2))):
        with pytest.raises(ValueError, match="without adapters, not this (Llama|PeftModel).*merge or unload them"):
            retrofit(model, 1)
    with pytest.raises(ValueError, match="without adapters, not this PeftModel"):
        unretrofit(get_peft_model(retrofit(original("llama"), 1), LoraConfig(r=2)))
    with torch.device("meta"):
        offloaded = AutoModelForCausalLM.from_config(config_of("llama"))
    with pytest.raises(ValueError, match="Weights of this model are offloaded"):
        retrofit(offloaded, 1)


@pytest.mark.parametrize(
    ("family", "architectures", "made"),
    [("llama", None, "FeedbackForCausalLM"), ("bert", None, "FeedbackModel"), ("llama", ["LlamaModel"] * 2, None)],
)
def test_from_a_folder_of_another_class(family, architectures, made, tmp_path):
    before = original(family)
    before.save_pretrained(tmp_path)
    before.config.architectures = architectures
    before.config.save_pretrained(tmp_path)
    if made is None:
        with pytest.raises(ValueError, match="LlamaModel, LlamaModel, which is not one class"):
            retrofit(tmp_path, 1)
    else:
        assert type(retrofit(tmp_path, 1)).__name__ == made
