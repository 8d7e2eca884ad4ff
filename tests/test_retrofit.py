"""Retrofit: one body over every family and axis: exact at birth, for any number of steps, and able to learn."""

import pytest
import torch
from conftest import SIZES, assert_close, pad, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)

from feedback_transformers import (
    FeedbackForSequenceClassification,
    FeedbackModel,
    retrofit,
    unretrofit,
)
from feedback_transformers.models.feedback_names import BIDIRECTIONAL_TYPES, RETROFIT_TYPES

LAYERS = 5
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
SLIDING = {"sliding_window": 6}
SCALED = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
OWN: dict[str, dict] = {  # what makes a family special
    "llama": {**SCALED, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2": {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 2, **SLIDING},
    "qwen3": GROUPED,
    "mistral": {**GROUPED, **SLIDING},
    "gemma2": {**GROUPED, **SLIDING, "final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.2},
    "gemma3_text": {**GROUPED, **SLIDING, "sliding_window_pattern": 2},
    "phi3": {"num_key_value_heads": 2, **SLIDING},
    "smollm3": {"num_key_value_heads": 2},
}
CAUSAL = [name for name in RETROFIT_TYPES if name not in BIDIRECTIONAL_TYPES]
CASES = [*((f, "depth") for f in RETROFIT_TYPES), *((f, "time") for f in CAUSAL)]
each_family_and_axis = pytest.mark.parametrize(("family", "axis"), CASES)
each_causal = pytest.mark.parametrize(("family", "axis"), [(f, axis) for f in CAUSAL for axis in ("depth", "time")])
LLAMA = [("llama", "depth"), ("llama", "time")]


def config_of(family: str, **fields):
    sizes = {name: SIZES[name] for name in ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id")}
    if family == "gpt2":
        sizes.update(n_embd=32, n_layer=LAYERS, n_head=4, n_positions=96)
    else:
        sizes.update({name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")})
        sizes.update(num_hidden_layers=LAYERS, max_position_embeddings=96)
    return AutoConfig.for_model(family, **{**sizes, **OWN.get(family, {}), **fields})


def original(family: str, auto=None, **fields):
    torch.manual_seed(0)
    auto = auto or (AutoModel if family in BIDIRECTIONAL_TYPES else AutoModelForCausalLM)
    return auto.from_config(config_of(family, **fields)).eval()


def answer(model, batch, **arguments) -> torch.Tensor:
    with torch.no_grad():
        outputs = model(batch, **arguments)
    return outputs.last_hidden_state if outputs.get("logits") is None else outputs.logits


def base(model) -> FeedbackModel:
    return model if isinstance(model, FeedbackModel) else model.model


def opened(model):
    """The same model, whose connection is not closed any more."""
    torch.nn.init.normal_(base(model).loop.connection.signal_proj.weight, std=0.3)
    return model


@pytest.mark.parametrize(
    ("family", "axis", "connection"),
    [
        *(case + ("gate",) for case in CASES),
        *((f, axis, c) for f in ("llama", "gpt2") for axis in ("depth", "time") for c in ("add", "concat")),
    ],
)
def test_exact_at_birth_and_able_to_open(family, axis, connection):
    before, batch = original(family), tokens(2, 19)
    expected = answer(before, batch)
    model = retrofit(before, 1, 2, 3, axis, feedback_connection=connection)
    for steps in (1, 2, 5):
        assert_close(answer(model, batch, num_feedback_steps=steps), expected)
    outputs = model.train()(batch)
    (outputs.last_hidden_state if isinstance(model, FeedbackModel) else outputs.logits).square().mean().backward()
    assert base(model).loop.connection.signal_proj.weight.grad.abs().max() > 0
    changed = answer(opened(model.eval()), batch)
    assert (changed - expected).abs().max() > 1e-3


@each_family_and_axis
def test_shares_its_weights_and_gives_them_back(family, axis):
    before, batch = original(family), tokens(2, 19)
    model = retrofit(before, 1, 2, 3, axis)
    pointers = {parameter.data_ptr() for parameter in before.parameters()}
    new = [name for name, parameter in model.named_parameters() if parameter.data_ptr() not in pointers]
    assert new and all("loop.connection." in name for name in new)
    again = unretrofit(model)
    assert type(again) is type(before)
    assert again.config.to_dict() == before.config.to_dict()
    assert {k: v.data_ptr() for k, v in again.state_dict().items()} == {
        k: v.data_ptr() for k, v in before.state_dict().items()
    }
    assert torch.equal(answer(again, batch), answer(before, batch))
    assert not any(tensor.is_meta for tensor in (*again.parameters(), *again.buffers()))


@each_family_and_axis
def test_saves_and_loads(family, axis, tmp_path):
    before, batch = original(family), tokens(2, 19)
    model = opened(retrofit(before, 1, 2, 3, axis))
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(answer(loaded, batch), answer(model, batch))
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert (answer(loaded, batch).float() - answer(model, batch)).abs().max() < 0.1
    assert torch.equal(answer(unretrofit(model), batch), answer(before, batch))


@each_family_and_axis
def test_fresh_and_missing_weights_are_initialised_as_the_family_does(family, axis, tmp_path):
    before = original(family)
    model = retrofit(before, 1, 2, 3, axis)
    fresh = type(model)(model.config)
    assert {k: v.shape for k, v in fresh.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert fresh.num_parameters() == model.num_parameters()
    norm = {"gpt2": "loop.cell.layers.0.ln_1", "bert": "embedding_norm", "roberta": "embedding_norm"}
    part = base(fresh).get_submodule(
        norm.get(
            family,
            "loop.cell.layers.0.input_layernorm"
            if family != "olmo2"
            else "loop.cell.layers.0.post_attention_layernorm",
        )
    )
    assert (part.weight == (0.0 if family.startswith("gemma") else 1.0)).all()


@each_causal
def test_generates_as_before(family, axis):
    before, model = (m := original(family)), retrofit(m, 1, 2, 3, axis)
    batch = tokens(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = before.generate(batch, **options)
    for steps in (1, 3):
        assert torch.equal(model.generate(batch, num_feedback_steps=steps, **options), expected)


@each_causal
def test_cached_padded_and_chunked(family, axis):
    """Once open, the three ways to compute the same logits agree."""
    model, batch = opened(retrofit(original(family), 1, 2, 3, axis)), tokens(2, 19)
    full = answer(model, batch)
    with torch.no_grad():
        first = model(batch[:, :11], use_cache=True)
        rest = [first.logits]
        for column in range(11, 19):
            step = model(batch[:, column : column + 1], past_key_values=first.past_key_values)
            rest.append(step.logits)
    assert_close(torch.cat(rest, dim=1), full)
    for where in ("left", "right"):
        padded, mask = pad(batch, [19, 12], where)
        logits = answer(model, padded, attention_mask=mask)
        assert_close(logits[0][mask[0].bool()], full[0])
        assert_close(logits[1][mask[1].bool()], answer(model, batch[1:, :12])[0])


@pytest.mark.parametrize(
    ("family", "fields"), [("llama", {}), ("llama", {"solver": "sequential", "feedback_interval": 3}), ("qwen2", {})]
)
def test_a_window_given_to_a_finished_model(family, fields, tmp_path):
    """Attention of the layers behind the encoder may be narrowed, as in training, and widened again."""
    model, batch = opened(retrofit(original(family), 1, 1, 3, "time", **fields)), tokens(2, 19)
    backbone, everything = model.config.backbone_config, answer(model, batch)
    before = getattr(backbone, "sliding_window", None), getattr(backbone, "layer_types", None)
    backbone.sliding_window, backbone.layer_types = 4, ["full_attention", *["sliding_attention"] * (LAYERS - 1)]
    narrow = answer(model, batch)
    assert_close(narrow[:, :4], everything[:, :4], 1e-5)
    assert (narrow[:, 8:] - everything[:, 8:]).abs().max() > 1e-2
    with torch.no_grad():
        first = model(batch[:, :11], use_cache=True)
        rest = model(batch[:, 11:], past_key_values=first.past_key_values)
    assert_close(torch.cat([first.logits, rest.logits], dim=1), narrow)
    model.save_pretrained(tmp_path)
    assert_close(answer(AutoModelForCausalLM.from_pretrained(tmp_path), batch), narrow, 1e-5)
    if family == "llama":
        with pytest.raises(ValueError, match="LlamaForCausalLM has no sliding attention"):
            unretrofit(model)
    backbone.sliding_window, backbone.layer_types = before
    assert torch.equal(answer(model, batch), everything)


@each_causal
def test_batched_generation_equals_single(family, axis):
    """Also where a sliding window is shorter than what stands before it."""
    model, batch = opened(retrofit(original(family), 1, 2, 3, axis)), tokens(2, 19)
    padded, mask = pad(batch, [19, 12], "left")
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    together = model.generate(padded, attention_mask=mask, **options)[:, padded.shape[1] :]
    for row, length in enumerate((19, 12)):
        alone = model.generate(batch[row : row + 1, :length], **options)[0, length:]
        assert torch.equal(together[row], alone)


@each_family_and_axis
def test_lora_on_every_part(family, axis, tmp_path):
    model, batch = retrofit(original(family), 1, 2, 3, axis), tokens(2, 19)
    expected = answer(model, batch)
    task = None if isinstance(model, FeedbackModel) else "CAUSAL_LM"
    adapted = get_peft_model(model, LoraConfig(r=2, task_type=task, modules_to_save=["connection"]))
    assert_close(answer(adapted, batch), expected)
    outputs = adapted.train()(input_ids=batch)
    (outputs.last_hidden_state if task is None else outputs.logits).square().mean().backward()
    gradients = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad}
    assert all(
        gradient is not None and gradient.abs().max() > 0
        for name, gradient in gradients.items()
        if "lora_B" in name and "pooler" not in name  # which a base model's states don't pass
    )
    for part in ("encoder", "loop.cell", "decoder"):
        assert any(f"{part}.layers" in name for name in gradients)
    assert any("loop.connection.modules_to_save" in name and "signal_proj" in name for name in gradients)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    changed = answer(adapted.eval(), batch)
    assert (changed - expected).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(retrofit(original(family), 1, 2, 3, axis), tmp_path)
    assert_close(answer(again, batch), changed)
    assert_close(answer(again.merge_and_unload(), batch), changed)


def test_a_padding_token_that_is_none(tmp_path):
    """-1, as in the configs of the first Llamas."""
    before, batch = original("llama", pad_token_id=-1), tokens(2, 19)
    model = retrofit(before, 1, 1)
    assert model.config.pad_token_id is None
    assert_close(answer(model, batch), answer(before, batch))
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(type(model).from_pretrained(tmp_path), batch), answer(model, batch))
    assert torch.equal(answer(unretrofit(model), batch), answer(before, batch))


@pytest.mark.parametrize("connection", ["gate", "add", "concat"])
def test_adapters_alone_find_the_same_model_again(connection, tmp_path):
    """Without the connection among the modules to save: a closed one is always the same."""
    logits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = retrofit(original("llama"), 1, 2, 3, feedback_connection=connection)
        if seed == 0:
            adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
            for parameter in filter(lambda p: p.requires_grad, adapted.parameters()):
                torch.nn.init.normal_(parameter, std=0.2)
            adapted.save_pretrained(tmp_path)
        else:
            adapted = PeftModel.from_pretrained(model, tmp_path)
        logits.append(answer(adapted.eval(), tokens(2, 19)))
    assert_close(*logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_classifier_without_a_mask(family):
    """Padding, also within the text, is read as the original reads it."""
    before = original(family, AutoModelForSequenceClassification, num_labels=3)
    batch = tokens(3, 19)
    batch[0, 5], batch[1, -4:] = SIZES["pad_token_id"], SIZES["pad_token_id"]
    assert_close(answer(retrofit(before, 1, 2, 3), batch), answer(before, batch))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_classifier_of_a_text_that_ends_with_the_padding_token(family):
    """As where that is the token that ends a text: the mask says that it is real."""
    before = original(family, AutoModelForSequenceClassification, num_labels=3)
    batch, mask = tokens(2, 19), torch.ones(2, 19, dtype=torch.long)
    batch[0, -1] = batch[1, 15:] = SIZES["pad_token_id"]
    mask[1, 16:] = 0
    given = {"attention_mask": mask}
    assert_close(answer(retrofit(before, 1, 2, 3), batch, **given), answer(before, batch, **given))


@pytest.mark.parametrize("family", [name for name in CAUSAL if name not in ("smollm3", "olmo2")])
def test_classifier(family):
    torch.manual_seed(0)
    before = AutoModelForSequenceClassification.from_config(config_of(family, num_labels=3)).eval()
    model, batch = retrofit(before, 1, 2, 3), tokens(3, 19)
    assert isinstance(model, FeedbackForSequenceClassification)
    assert_close(answer(model, batch), answer(before, batch))
    again = unretrofit(model)
    assert torch.equal(answer(again, batch), answer(before, batch))
    torch.nn.init.ones_(model.classifier.bias)
    with pytest.raises(ValueError, match="learned a bias"):
        unretrofit(model)


@pytest.mark.parametrize("family", BIDIRECTIONAL_TYPES)
def test_classifier_of_an_encoder(family):
    before = original(family, AutoModelForSequenceClassification, num_labels=3)
    model = retrofit(before, 1, 2, 3)
    batch, mask = pad(tokens(2, 19), [19, 12], "right")
    batch = batch.masked_fill(mask == 0, SIZES["pad_token_id"])
    kinds = (torch.arange(batch.shape[1]) > 7).long().expand_as(batch) if family == "bert" else None
    given = {"attention_mask": mask, "token_type_ids": kinds}
    assert_close(answer(model, batch, **given), answer(before, batch, **given))
    assert torch.equal(answer(unretrofit(model), batch, **given), answer(before, batch, **given))
    trained = []
    for each, steps in ((before.train(), {}), (model.train(), {"num_feedback_steps": 1})):
        torch.manual_seed(0)
        trained.append(answer(each, batch, **given, **steps))
    assert_close(*trained)
    assert (trained[0] - answer(before.eval(), batch, **given)).abs().max() > 1e-2, "dropout was at work"


@pytest.mark.parametrize(("family", "axis"), LLAMA)
def test_resized_and_checkpointed(family, axis):
    model = opened(retrofit(original(family), 1, 1, 20, axis)).train()
    model.resize_token_embeddings(60)
    assert unretrofit(model).config.vocab_size == 60
    batch, gradients = tokens(2, 19), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(batch, labels=batch).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert_close(again, plain, 1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_saves_and_loads_resized_embeddings(family, tmp_path):
    model = opened(retrofit(original(family), 1, 2, 3))
    model.resize_token_embeddings(60)
    expected = answer(model, tokens(2, 19))
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(AutoModelForCausalLM.from_pretrained(tmp_path), tokens(2, 19)), expected)


@pytest.mark.parametrize("fields", [{"halting": "act"}, {"axis": "time", "solver": "sequential"}])
def test_of_a_checkpointed_model(fields):
    """Whose layers, within the loop, would lose what the loop keeps for them."""
    plain, checkpointed = original("llama"), original("llama")
    checkpointed.activation_checkpointing_enable()
    models = [opened(retrofit(before, 1, 2, 3, **fields)).train() for before in (plain, checkpointed)]
    assert models[1].model.loop.gradient_checkpointing
    assert unretrofit(models[1]).model.gradient_checkpointing
    models[1].load_state_dict(models[0].state_dict())
    batch = tokens(2, 9)
    if "halting" in fields:
        with pytest.raises(ValueError, match="can't be trained with gradient checkpointing"):
            models[1](batch)
        models[1].activation_checkpointing_disable()
    losses = [model(batch, labels=batch).loss for model in models]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert_close(other.grad, one.grad)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bert"])
def test_drops_out_as_before(family):
    rates = dict.fromkeys(("embd_pdrop", "hidden_dropout", "hidden_dropout_prob"), 0.5)
    before, batch = original(family, **rates).train(), tokens(2, 9)
    model, answers = retrofit(before, 1, 2, 1), []
    for each in (before, model):
        torch.manual_seed(0)
        answers.append(answer(each, batch))
    assert_close(*answers)


@pytest.mark.parametrize("axis", ["depth", "time"])
def test_a_text_that_outgrows_its_short_factors(axis):
    """Phi-3 reads it anew with the long ones; with a cache, generation does so too."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.0], "original_max_position_embeddings": 12}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0, **factors}
    before = original("phi3", rope_parameters=rope, original_max_position_embeddings=12, sliding_window=None)
    model = retrofit(before, 1, 2, 2, axis)
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    for batch in (tokens(2, 9), tokens(2, 16)):
        expected = before.generate(batch, **asked)
        assert torch.equal(model.generate(batch, **asked), expected)


def test_rotary_positions_go_on():
    """Beyond max_position_embeddings, as the original does."""
    before = original(
        "llama", max_position_embeddings=8, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    )
    assert_close(answer(retrofit(before, 1, 2, 3), tokens(2, 19)), answer(before, tokens(2, 19)))


def test_shared_step_cache():
    """Later tokens read the last pass: the cache is that of one pass, and closed it is exact."""
    before, batch = original("llama"), tokens(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    sizes = {}
    for shared in (False, True):
        model = retrofit(before, 1, 2, 4, shared_step_cache=shared)
        made = model.generate(batch, **options)
        assert torch.equal(made.sequences, before.generate(batch, **options).sequences)
        sizes[shared] = made.past_key_values.num_bytes()
    assert sizes[False] / sizes[True] == (1 + 4 * 2 + 2) / LAYERS
    model = opened(retrofit(before, 1, 2, 4, shared_step_cache=False))
    cache = model(batch, use_cache=True).past_key_values
    model.config.shared_step_cache = True  # from the next text on
    with pytest.raises(ValueError, match="shared: False.*shared: True.*leave past_key_values out"):
        model(batch, past_key_values=cache)
    assert_close(answer(model, batch), answer(opened_like(model, before), batch))  # without a cache, as ever
    with torch.no_grad():
        whole = model(batch, use_cache=True).logits
        first = model(batch[:, :5], use_cache=True)
        rest = model(batch[:, 5:], past_key_values=first.past_key_values).logits
    assert_close(whole, answer(model, batch))
    assert (rest - whole[:, 5:]).abs().max() > 1e-4, "what differs is what later tokens read"


def opened_like(model, before):
    """A retrofit with a slot a step, and the connection of `model`."""
    other = retrofit(before, 1, 2, 4)
    other.model.loop.connection.load_state_dict(model.model.loop.connection.state_dict())
    return other


@pytest.mark.parametrize("shared", [False, True])
def test_stops_when_converged(shared):
    model = retrofit(original("llama"), 1, 2, 6, halting="converged", shared_step_cache=shared)
    outputs = model(tokens(2, 9))
    assert (outputs.num_feedback_steps == 2).all(), "a closed loop has converged once it was repeated"
    made = model.generate(tokens(2, 9), max_new_tokens=5, do_sample=False, eos_token_id=None)
    expected = original("llama").generate(tokens(2, 9), max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_positions_that_are_given(family):
    before, batch = original(family), tokens(2, 19)
    positions = torch.arange(19)[None] + 5
    assert_close(
        answer(retrofit(before, 1, 2, 3), batch, position_ids=positions), answer(before, batch, position_ids=positions)
    )


def test_lora_on_positions():
    model, batch = retrofit(original("roberta"), 1, 2, 3), tokens(2, 19)
    expected = answer(model, batch)
    assert_close(answer(get_peft_model(model, LoraConfig(r=2, target_modules=["positions"])), batch), expected)
