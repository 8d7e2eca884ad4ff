"""generate() and the pipelines. Greedy runs of every combination are in test_modeling.py."""

import copy

import numpy as np
import pytest
import torch
from conftest import BOS, EOS, PAD, VOCABULARY, assert_close, build, each_cell, make_tokenizer, tokens
from torch.nn import functional as F
from transformers import GenerationConfig, TextStreamer, ViTImageProcessorPil, pipeline

from feedback_transformers import (
    FeedbackForCausalLM,
    FeedbackForConditionalGeneration,
    FeedbackForImageClassification,
    FeedbackForMaskedLM,
    FeedbackForSequenceClassification,
    FeedbackForTokenClassification,
)

FIELDS = [
    {"feedback_type": "lstm", "feedback_axis": "time"},
    {"feedback_type": "transformer", "feedback_axis": "time", "feedback_interval": 3},
    {"feedback_type": "gru", "feedback_signal": "output"},
    {"feedback_type": "conv", "encoder_type": "rnn", "decoder_type": "rnn"},
]
each_model = pytest.mark.parametrize("fields", FIELDS, ids=lambda fields: "-".join(map(str, fields.values())))


def left_padded(prompt: torch.Tensor, columns: int = 3) -> dict:
    padded = torch.cat([prompt.new_full((len(prompt), columns), PAD), prompt], dim=1)
    return {"input_ids": padded, "attention_mask": (padded != PAD).long()}


@each_model
@pytest.mark.parametrize(
    "arguments", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True}]
)
def test_strategies(fields, arguments):
    """Beams and samples: the same with a cache, without one, and with padding on the left."""
    model, prompt, new = build(**fields), tokens(2, 6), []
    arguments = {"do_sample": False, "max_new_tokens": 6, **arguments}
    for inputs in ({"input_ids": prompt}, {"input_ids": prompt, "use_cache": False}, left_padded(prompt)):
        torch.manual_seed(3)
        new.append(model.generate(**inputs, **arguments)[:, -6:])
    assert new[0].shape == (2 * arguments.get("num_return_sequences", 1), 6)
    assert torch.equal(new[0], new[1])
    assert torch.equal(new[0], new[2])


@each_model
def test_in_training_with_checkpointing(fields):
    """Where no cache is made."""
    model, prompt = build(**fields), tokens(2, 6)
    expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
    model.activation_checkpointing_enable()
    assert torch.equal(model.train().generate(prompt, max_new_tokens=6, do_sample=False), expected)


@each_model
def test_ragged_batch_is_each_prompt_alone(fields):
    model, prompt = build(**fields), tokens(3, 8)
    batch = torch.full((3, 8), PAD)
    for row, (text, length) in enumerate(zip(prompt, (8, 5, 2), strict=True)):
        batch[row, -length:] = text[:length]
    new = model.generate(batch, attention_mask=(batch != PAD).long(), max_new_tokens=7, do_sample=False)[:, 8:]
    for row, (text, length) in enumerate(zip(prompt, (8, 5, 2), strict=True)):
        alone = model.generate(text[None, :length], max_new_tokens=7, do_sample=False)
        assert torch.equal(new[row], alone[0, length:])


def test_sampling_is_repeatable_and_random():
    model, prompt, runs = build(), tokens(1, 6), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.generate(prompt, max_new_tokens=20, do_sample=True, top_k=20, temperature=1.2))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_end_of_text_stops_a_row():
    """Rows that ended are padded, and the others go on as if alone."""
    model, prompt = build(), tokens(2, 6)
    free = model.generate(prompt, max_new_tokens=8, do_sample=False)
    end = free[0, 8].item()
    stopped = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=end)
    row = stopped[0, 6:].tolist()
    first = row.index(end)
    assert row[:first] == free[0, 6 : 6 + first].tolist()
    assert set(row[first + 1 :]) <= {PAD}


@each_cell
def test_more_thinking(cell):
    """num_feedback_steps in generate is that of every forward."""
    model, prompt = build(feedback_type=cell), tokens(1, 6)
    arguments = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    default = torch.stack(model.generate(prompt, **arguments).scores)
    assert torch.equal(torch.stack(model.generate(prompt, num_feedback_steps=3, **arguments).scores), default)
    more = model.generate(prompt, num_feedback_steps=6, **arguments)
    assert not torch.equal(torch.stack(more.scores), default)
    full = model(more.sequences[:, :-1], num_feedback_steps=6).logits[:, -4:].transpose(0, 1)
    assert_close(torch.stack(more.scores), full)
    given = GenerationConfig(num_feedback_steps=6, **arguments)
    assert torch.equal(torch.stack(model.generate(prompt, generation_config=given).scores), torch.stack(more.scores))


def test_continues_from_a_cache():
    """The cache that generate returns continues the text, in one more call or in chunks."""
    model, prompt = build(feedback_axis="time", feedback_type="gru"), tokens(1, 6)
    whole = model.generate(prompt, max_new_tokens=9, do_sample=False)
    first = model.generate(prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = copy.deepcopy(first.past_key_values)
    second = model.generate(first.sequences, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(second, whole)


@pytest.mark.parametrize("fields", [{}, {"feedback_axis": "time", "feedback_type": "lstm"}], ids=["depth", "time"])
@pytest.mark.parametrize("held", [6, 12])
@torch.no_grad()
def test_a_cache_that_has_read_the_whole_prompt(fields, held):
    """Nothing is left to predict from; a longer prompt goes on, and gives what it gives without the cache."""
    model, text = build(**fields), tokens(2, 12)
    cache = model(text[:, :held], use_cache=True).past_key_values
    for prompt in ({"inputs": text[:, :6]}, {"inputs_embeds": model.get_input_embeddings()(text[:, :6])}):
        with pytest.raises(ValueError, match=f"The cache holds {held} positions and the prompt has no more, 6: give"):
            model.generate(**prompt, past_key_values=copy.deepcopy(cache), max_new_tokens=4)
    longer, greedy = tokens(2, 13)[:, : held + 1], {"max_new_tokens": 4, "do_sample": False}
    cache = model(longer[:, :held], use_cache=True).past_key_values
    assert torch.equal(model.generate(longer, past_key_values=cache, **greedy), model.generate(longer, **greedy))


@each_model
def test_a_text_goes_on_behind_its_padding(fields):
    """Rows that are padded on the right: as each row alone, once it has read what was predicted at the padding."""
    model, rows, lengths = build(**fields), tokens(3, 7), [1, 3, 7]
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    given = rows.masked_fill(mask == 0, PAD)
    greedy = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(given, attention_mask=mask, **greedy)
    assert torch.equal(model.generate(given, attention_mask=mask, use_cache=False, **greedy), cached)
    for row, length, new in zip(rows, lengths, cached[:, 7:], strict=True):
        read = torch.cat([row[:length], new[:1]])[None]
        real = torch.ones_like(read)  # also where the token that pads was predicted
        alone = model.generate(read, attention_mask=real, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(alone[0, length + 1 :], new[1:])


@pytest.mark.parametrize("cell", ["gru", "lstm", "diagonal_gru", "mlp", "conv"])
@pytest.mark.parametrize("signal", ["state", "output"])
def test_memory_is_independent_of_the_length(cell, signal):
    model = build(
        feedback_type=cell, feedback_axis="time", feedback_signal=signal, encoder_type="cnn", decoder_type="mlp"
    )
    sizes = []
    for length in (5, 200):
        outputs = model.generate(
            tokens(2, 4), max_new_tokens=length, min_new_tokens=length, do_sample=False, return_dict_in_generate=True
        )
        assert outputs.past_key_values.get_seq_length() == length + 3
        sizes.append(outputs.past_key_values.num_bytes())
    assert 0 < sizes[0] == sizes[1]
    grown = build(feedback_type="transformer", feedback_axis="time")
    short, long = (grown(tokens(1, length), use_cache=True).past_key_values.num_bytes() for length in (5, 50))
    assert long > 5 * short


def test_inputs_embeds_and_streaming(capsys):
    model, prompt, tokenizer = build(), tokens(1, 6), make_tokenizer()
    expected = model.generate(prompt, max_new_tokens=5, do_sample=False)[:, 6:]
    embedded = model.get_input_embeddings()(prompt)
    assert torch.equal(model.generate(inputs_embeds=embedded, max_new_tokens=5, do_sample=False), expected)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    model.generate(prompt, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out.strip() == tokenizer.decode(expected[0]).strip()


@pytest.mark.parametrize("arguments", [{"assistant_model": True}, {"prompt_lookup_num_tokens": 3}])
def test_assisted_decoding_is_refused(arguments):
    model = build()
    if "assistant_model" in arguments:
        arguments = {"assistant_model": build()}
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(tokens(1, 6), max_new_tokens=3, **arguments)


# Sequence to sequence


def seq2seq(**fields) -> FeedbackForConditionalGeneration:
    return build(
        FeedbackForConditionalGeneration,
        is_encoder_decoder=True,
        decoder_start_token_id=BOS,
        eos_token_id=EOS,
        **fields,
    )


@each_cell
@pytest.mark.parametrize("axis", ["time", "depth"])
def test_seq2seq(cell, axis):
    """Loss by hand, source padding, cached = uncached, greedy and beams, and every step reads the source."""
    model = seq2seq(feedback_type=cell, feedback_axis=axis, decoder_type="mlp", feedback_signal="output")
    source, target = tokens(2, 9), tokens(2, 7, start=50)
    labels = target.clone()
    labels[1, 4:] = -100
    start = torch.cat([torch.full((2, 1), BOS), target[:, :-1]], dim=1)
    outputs = model(source, labels=labels)
    with torch.no_grad():
        assert_close(outputs.loss, F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten()), 1e-6)
        full = model(source, decoder_input_ids=start).logits
        assert_close(full[0], outputs.logits[0], 1e-5)

        alone = model(source[1:, :6], decoder_input_ids=start[1:]).logits
        assert (full[1:] - alone).abs().max() > 1e-3
        for kept in (range(6), range(3, 9), (0, 1, 4, 5, 7, 8)):
            mask, padded = torch.ones_like(source), source.clone()
            mask[1], padded[1] = 0, 7
            mask[1, list(kept)], padded[1, list(kept)] = 1, source[1, :6]
            logits = model(padded, attention_mask=mask, decoder_input_ids=start).logits
            assert_close(logits, torch.cat([full[:1], alone]))

        encoded, cache, logits = model.get_encoder()(source), None, []
        for t in range(7):
            step = model(
                encoder_outputs=encoded, decoder_input_ids=start[:, t : t + 1], past_key_values=cache, use_cache=True
            )
            cache = step.past_key_values
            logits.append(step.logits)
        assert_close(torch.cat(logits, 1), full)

        changed = source.clone()
        changed[:, 5] = torch.where(changed[:, 5] == 7, 8, 7)
        assert ((model(changed, decoder_input_ids=start).logits - full).abs().amax((0, 2)) > 1e-5).all()


@pytest.mark.parametrize(
    "fields", [{"feedback_type": "gru", "feedback_axis": "time"}, {"feedback_type": "transformer"}]
)
@pytest.mark.parametrize("beams", [1, 3])
def test_seq2seq_generates(fields, beams):
    model, source = seq2seq(**fields), tokens(2, 9)
    arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    cached = model.generate(source, **arguments)
    assert torch.equal(model.generate(source, use_cache=False, **arguments), cached)
    assert torch.equal(model.generate(**left_padded(source), **arguments), cached)
    single = model.generate(source[:1], **arguments)
    assert torch.equal(single[0], cached[0, : single.shape[1]])
    assert (cached[:, 0] == BOS).all()


def test_seq2seq_learns_to_copy():
    model = seq2seq(feedback_type="gru", feedback_axis="time").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        text = torch.randint(5, 10, (32, 4), generator=generator)
        return torch.cat([torch.full((32, 1), BOS), text, torch.full((32, 1), EOS)], dim=1), text

    losses = []
    for _ in range(120):
        source, text = draw()
        loss = model(source, labels=text).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 < 1.5 < losses[0]  # ln 5 = 1.6: nothing but the source tells the target
    source, text = draw()
    copied = model.eval().generate(source, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, 1:]
    assert (copied == text).float().mean() > 0.8


# Pipelines


def test_text_generation_pipeline():
    model, tokenizer = build(max_position_embeddings=64), make_tokenizer()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    arguments = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    prompts = ["an assert", "is", "the expression"]
    single = [generate(prompt, **arguments)[0]["generated_text"] for prompt in prompts]
    batched = [result[0]["generated_text"] for result in generate(prompts, batch_size=3, **arguments)]
    assert single == batched
    ids = tokenizer(prompts[0], return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert single[0] == tokenizer.decode(expected, skip_special_tokens=True)


def test_text_classification_pipeline():
    model = build(FeedbackForSequenceClassification, id2label={0: "good", 1: "bad", 2: "so so"})
    classify = pipeline("text-classification", model=model, tokenizer=make_tokenizer())
    texts = ["an assert", "is"]
    results = classify(texts, batch_size=2, top_k=3)
    for text, result in zip(texts, results, strict=True):
        scores = model(**make_tokenizer()(text, return_tensors="pt")).logits.softmax(-1)[0]
        for entry in result:
            index = {"good": 0, "bad": 1, "so so": 2}[entry["label"]]
            assert entry["score"] == pytest.approx(scores[index].item(), abs=1e-5)


def test_token_classification_pipeline():
    model = build(FeedbackForTokenClassification, num_labels=3, is_causal=False)
    entities = pipeline("token-classification", model=model, tokenizer=make_tokenizer(), ignore_labels=[])("an assert")
    logits = model(**make_tokenizer()("an assert", return_tensors="pt")).logits[0]
    assert [entity["entity"] for entity in entities] == [f"LABEL_{i}" for i in logits.argmax(-1).tolist()]


def test_fill_mask_pipeline():
    model, tokenizer = build(FeedbackForMaskedLM, is_causal=False), make_tokenizer()
    results = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=4)("an as<mask>ert")
    inputs = tokenizer("an as<mask>ert", return_tensors="pt")
    position = (inputs.input_ids[0] == VOCABULARY["<mask>"]).nonzero().item()
    scores = model(**inputs).logits[0, position].softmax(-1).topk(4)
    assert [result["token"] for result in results] == scores.indices.tolist()


def test_image_classification_pipeline():
    model = build(
        FeedbackForImageClassification,
        input_config="images",
        is_causal=False,
        num_labels=4,
    )
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8))
    (best, *_) = pipeline("image-classification", model=model, image_processor=processor)(image)
    logits = model(processor(image, return_tensors="pt").pixel_values).logits[0]
    assert best["label"] == f"LABEL_{logits.argmax().item()}"


def test_what_generate_collects():
    model = build(FeedbackForConditionalGeneration, is_encoder_decoder=True, decoder_start_token_id=BOS)
    options = {"max_new_tokens": 3, "return_dict_in_generate": True}
    assert len(model.generate(tokens(), output_hidden_states=True, **options).decoder_hidden_states) == 3
    for each in (model, build()):
        with pytest.raises(ValueError, match="Attention weights are not returned"):
            each.generate(tokens(), output_attentions=True, **options)


def test_generate_is_of_the_heads_that_write():
    assert build(FeedbackForCausalLM).can_generate()
    assert seq2seq().can_generate()
    assert not build(FeedbackForMaskedLM, is_causal=False).can_generate()
