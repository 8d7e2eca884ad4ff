"""GGUF files: what is in them, read back with gguf, and llama.cpp's own logits where it can be loaded."""

import gguf
import numpy as np
import pytest
import torch
from conftest import build
from test_published import filled
from transformers import HrmTextConfig, HrmTextForCausalLM, LlamaConfig, LlamaForCausalLM

from feedback_transformers import cli, data
from feedback_transformers.conversion import convert, to_official
from feedback_transformers.conversion.gguf import write_gguf
from feedback_transformers.conversion.mapping import PairedRows

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SIZES |= {"max_position_embeddings": 128}
IDS = [3, 9, 27, 5, 44, 12, 60, 7]


def nanbeige(tied: bool = False):
    config = LlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=2, rms_norm_eps=1e-5, rope_theta=7e4)
    config.tie_word_embeddings = tied
    llama = filled(LlamaForCausalLM(config))
    return convert({**config.to_dict(), "model_type": "nanbeige", "num_loops": 3}, llama.state_dict()).eval()


def hrm_text():
    official = filled(
        HrmTextForCausalLM(HrmTextConfig(**SIZES, head_dim=16, num_hidden_layers=2, embedding_scale=3.0))
    )
    return convert(official.config.to_dict(), official.state_dict()).eval()


MODELS = {"nanbeige": nanbeige, "hrm_text": hrm_text}
FIELDS = {
    "nanbeige": {"block_count": 2, "attention.head_count_kv": 2, "num_loops": 3, "skip_loop_final_norm": False},
    "hrm_text": {"block_count": 16, "hrm.layers_per_stack": 2, "hrm.h_cycles": 2, "hrm.l_cycles": 3},
}
NAMES = {  # of a layer, in the file and in the published layout
    **{f"attn_{a}": f"self_attn.{b}_proj" for a, b in zip(("q", "k", "v", "output"), "qkvo", strict=True)},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
EXTRA = {
    "nanbeige": {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
    "hrm_text": {"attn_gate": "self_attn.gate_proj"},
}


@pytest.mark.parametrize("layout", MODELS)
def test_read_back(layout, tmp_path):
    model = MODELS[layout]()
    assert write_gguf(model, tmp_path / "it.gguf") == layout
    reader = gguf.GGUFReader(tmp_path / "it.gguf")
    read = {name: field.contents() for name, field in reader.fields.items()}
    assert read["general.architecture"] == layout and read["tokenizer.ggml.model"] == "no_vocab"
    expected = {"embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4, **FIELDS[layout]}
    assert {key: read[f"{layout}.{key}"] for key in expected} == expected
    eps, theta = (1e-5, 7e4) if layout == "nanbeige" else (1e-6, 1e4)
    assert read[f"{layout}.attention.layer_norm_rms_epsilon"] == pytest.approx(eps)
    assert read[f"{layout}.rope.freq_base"] == pytest.approx(theta)
    held = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    weights, seen = to_official(model, layout)[1], {"token_embd.weight", "output.weight"}
    stacks = ["model.layers."] if layout == "nanbeige" else ["model.L_module.layers.", "model.H_module.layers."]
    assert torch.equal(held["token_embd.weight"], weights["model.embed_tokens.weight"])
    assert torch.equal(held["output.weight"], weights["lm_head.weight"])
    for block in range(2 * len(stacks)):
        for theirs, ours in (NAMES | EXTRA[layout]).items():
            name = f"blk.{block}.{theirs}.weight"
            weight, expected = held[name], weights[f"{stacks[block // 2]}{block % 2}.{ours}.weight"]
            if layout == "nanbeige" and theirs in ("attn_q", "attn_k"):
                weight = PairedRows(len(weight), head_dim=16, rotated=1).halves(weight)
            assert torch.equal(weight, expected), name
            seen.add(name)
    seen.add("output_norm.weight" if layout == "nanbeige" else "hrm.z_l_init")
    assert held.keys() == seen


def test_tied_embeddings_are_written_twice(tmp_path):
    write_gguf(nanbeige(tied=True), tmp_path / "it.gguf")
    held = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "it.gguf").tensors}
    assert np.array_equal(held["output.weight"], held["token_embd.weight"])


def test_a_byte_level_tokenizer_goes_along(tmp_path):
    tokenizer = data.subwords(["to be or not to be, that is the question"] * 3, vocab_size=300)
    model = nanbeige()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    cli.main(["export", str(tmp_path / "model"), str(tmp_path / "it.gguf"), "--format", "gguf"])
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "it.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id


def test_another_function_is_refused_with_what_differs(tmp_path):
    with pytest.raises(
        ValueError, match="llama.cpp runs no such model. A nanbeige has num_encoder_layers=0, and this"
    ):
        write_gguf(build(), tmp_path / "it.gguf")
    assert not (tmp_path / "it.gguf").exists()


@pytest.mark.parametrize("layout", MODELS)
def test_llama_cpp_computes_the_same(layout, tmp_path):
    """It was run by hand where its library loads: 2.4e-6 for nanbeige, 2.1e-4 for hrm_text."""
    try:
        from llama_cpp_py_sync import _cffi_bindings as bindings

        library, ffi = bindings.get_lib(), bindings.get_ffi()
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"llama.cpp can't be loaded here (its wheel needs glibc 2.38): {error}")
    model = MODELS[layout]()
    write_gguf(model, tmp_path / "it.gguf")
    library.llama_backend_init()
    loaded = library.llama_model_load_from_file(
        str(tmp_path / "it.gguf").encode(), library.llama_model_default_params()
    )
    settings = library.llama_context_default_params()
    settings.n_ctx, settings.type_k, settings.type_v, settings.flash_attn_type = 64, 0, 0, 0  # float32 all through
    context, logits = library.llama_init_from_model(loaded, settings), []
    for token in IDS:
        batch = library.llama_batch_get_one(ffi.new("llama_token[]", [token]), 1)
        assert library.llama_decode(context, batch) == 0
        made = ffi.buffer(library.llama_get_logits(context), 64 * 4)
        logits.append(torch.frombuffer(bytearray(made), dtype=torch.float32))
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0]
    assert (torch.stack(logits) - expected).abs().max() < (1e-5 if layout == "nanbeige" else 1e-3)
