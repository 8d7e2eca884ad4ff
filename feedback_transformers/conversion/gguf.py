"""Write a model as a GGUF file that an unmodified llama.cpp runs, in the layouts `nanbeige` and `hrm_text`.

Its rotary positions turn neighbouring rows in `nanbeige` and halves of a head in `hrm_text`. Needs the package gguf.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
from torch import Tensor

from .convert import to_official
from .families import Official
from .mapping import PairedRows, Weights

LAYOUTS = ("nanbeige", "hrm_text")
ATTENTION = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def write_gguf(model: Any, path: str | Path, tokenizer: Any = None) -> str:
    """Write a FeedbackForCausalLM to a .gguf file, in float32; return its layout.

    Args:
        model: one that computes what a Nanbeige or an HRM-Text computes.
        path: the file.
        tokenizer: a byte-level BPE goes along; of other kinds nothing does, and llama.cpp then takes token ids only.

    Raises:
        ValueError: the model computes another function; the sentence names what differs from each layout.
    """
    refusals = []
    for layout in LAYOUTS:
        try:
            official, weights = to_official(model, layout)
        except ValueError as error:
            refusals.append(str(error))
            continue
        except (AttributeError, TypeError, KeyError) as error:
            refusals.append(f"Its layers are not those of {layout}: {error}.")
            continue
        rope = official.get("rope_parameters") or {}
        if official["hidden_act"] != "silu" or rope.get("rope_type", "default") != "default":
            raise ValueError("llama.cpp runs these layers with hidden_act='silu' and plain rotary positions only.")
        writer = gguf.GGUFWriter(str(path), layout)
        describe(writer, layout, official)
        describe_tokenizer(writer, tokenizer, official["vocab_size"])
        for name, tensor in tensors(layout, official, weights):
            writer.add_tensor(name, tensor.detach().float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return layout
    raise ValueError("llama.cpp runs no such model. " + " ".join(refusals))


def describe(writer: gguf.GGUFWriter, layout: str, official: Official) -> None:
    """Write the sizes."""
    heads = official["num_attention_heads"]
    size = official.get("head_dim") or official["hidden_size"] // heads
    levels = layout == "hrm_text"
    rope = official["rope_parameters"]["rope_theta"] if levels else official["rope_theta"]
    writer.add_context_length(official["max_position_embeddings"])
    writer.add_embedding_length(official["hidden_size"])
    writer.add_block_count(official["num_hidden_layers"])
    writer.add_feed_forward_length(official["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(official.get("num_key_value_heads") or heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(official["rms_norm_eps"])
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rope)
    writer.add_vocab_size(official["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if levels:
        writer.add_uint32("hrm_text.hrm.layers_per_stack", official["num_layers_per_stack"])
        writer.add_uint32("hrm_text.hrm.h_cycles", official["H_cycles"])
        writer.add_uint32("hrm_text.hrm.l_cycles", official["L_cycles"])
        writer.add_float32("hrm_text.embedding_scale", official["embedding_scale"])
        writer.add_bool("hrm_text.prefix_lm", official["prefix_lm"])
    else:
        writer.add_uint32("nanbeige.num_loops", official["num_loops"])
        writer.add_bool("nanbeige.skip_loop_final_norm", False)


def tensors(layout: str, official: Official, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and the weights of the file."""
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output.weight", weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    if layout == "nanbeige":
        yield "output_norm.weight", weights["model.norm.weight"]
        names = {**ATTENTION, "attn_output": "self_attn.o_proj", **MLP, **NORMS}
        stacks, count = ["model.layers."], official["num_hidden_layers"]
        heads = official["num_attention_heads"]
        size = official.get("head_dim") or official["hidden_size"] // heads
    else:
        yield "hrm.z_l_init", weights["model.z_L_init"]
        names = {**ATTENTION, "attn_gate": "self_attn.gate_proj", "attn_output": "self_attn.o_proj", **MLP}
        stacks, count, size = ["model.L_module.layers.", "model.H_module.layers."], official["num_layers_per_stack"], 0
    for number, stack in enumerate(stacks):
        for layer in range(count):
            for theirs, ours in names.items():
                weight = weights[f"{stack}{layer}.{ours}.weight"]
                if size and theirs in ("attn_q", "attn_k"):
                    weight = PairedRows(len(weight), head_dim=size, rotated=1).pairs(weight)
                yield f"blk.{number * count + layer}.{theirs}.weight", weight


def describe_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    """Write a byte-level BPE, filled up to the rows of the model; of other tokenizers that there is none."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    state = {} if model is None else json.loads(tokenizer.backend_tokenizer.to_str())
    before = state.get("pre_tokenizer") or {}
    if state.get("model", {}).get("type") != "BPE" or before.get("type") != "ByteLevel":
        writer.add_tokenizer_model("no_vocab")
        return
    vocabulary = {**state["model"]["vocab"], **{each["content"]: each["id"] for each in state["added_tokens"]}}
    special = {each["content"] for each in state["added_tokens"]}
    by_id = {number: token for token, number in vocabulary.items()}
    ordered = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(ordered)
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_token_types([kinds[t in special] if t in vocabulary else gguf.TokenType.UNUSED for t in ordered])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]])
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
