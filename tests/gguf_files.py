"""Writes GGUF files with the gguf package, as llama.cpp's converter does: the oracle of tests/test_gguf.py.

    folder, hf = tiny("llama2", tmp_path / "hf", hidden_size=64, intermediate_size=128)
    write_gguf(folder, tmp_path / "x.gguf", {"": "Q8_0", "ffn": "Q4_1"})
"""
import json

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, MODEL_ARCH, TokenType, get_tensor_name_map
from gguf.quants import dequantize, quantize

from reference import read_safetensors

ARCHS = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2, "qwen3": MODEL_ARCH.QWEN3}
# Bytes of a block of 256 columns, and where its fp16 scales are: types that the package reads but does not write.
K_QUANTS = {"Q4_K": (144, (0, 2)), "Q6_K": (210, (208,))}


def write_gguf(folder, file, kinds=None, *, facts=None, tokenizer=None, more=None, leave_out=(), split=None):
    """Write the model of a Hugging Face folder as one file, or as several of at most `split` tensors.

    kinds       {beginning of a part of GGUF's name: ggml's type} of weights with two dimensions; the last that fits
    facts       more key-value pairs, or others: numbers, texts, lists
    tokenizer   writes the vocabulary: a function of the writer; default: `default_tokenizer`
    more        {GGUF's name: tensor in fp32}
    leave_out   GGUF's names
    Returns {GGUF's name: (bytes, type)} of what was written.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = config["model_type"] if config["model_type"] != "mistral" else "llama"
    writer = GGUFWriter(file, arch, split_max_tensors=split or 0)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    for name, value in (facts or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, list: writer.add_array}[
            type(value)]
        add(name.replace("{arch}", arch), value)
    (tokenizer or (lambda writer: default_tokenizer(writer, folder)))(writer)
    names, written = get_tensor_name_map(ARCHS[arch], config["num_hidden_layers"]), {}
    for key, weight in read_safetensors(folder / "model.safetensors").items():
        name, data = names.get_name(key, (".weight", ".bias")), weight.float().numpy()
        if name in leave_out:
            continue
        kind = "F32" if data.ndim == 1 else kind_of(name, kinds or {})
        if arch == "llama" and ("attn_q." in name or "attn_k." in name):
            heads = config["num_attention_heads" if "attn_q" in name else "num_key_value_heads"]
            data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        written[name] = (stored(data, kind), GGMLQuantizationType[kind])
    written |= {name: (data, GGMLQuantizationType.F32) for name, data in (more or {}).items()}
    for name, (data, kind) in written.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


@torch.no_grad()
def round_to_file(hf, kinds, arch="llama"):
    """Give a transformers model the numbers that write_gguf stores of it, by the package's dequantisation."""
    names = get_tensor_name_map(ARCHS[arch], hf.config.num_hidden_layers)
    for key, weight in hf.named_parameters():
        kind = kind_of(names.get_name(key, (".weight", ".bias")), kinds)
        if weight.dim() == 2:
            data = stored(weight.numpy(), kind)
            weight.copy_(torch.from_numpy(dequantize(data, GGMLQuantizationType[kind]).reshape(weight.shape)))


def kind_of(name, kinds):
    parts = [name, *name.split(".")]
    return next((kind for start, kind in reversed(kinds.items()) if any(part.startswith(start) for part in parts)),
                "F32")


def stored(data, kind):
    """fp32 [N, K] as the file holds it. K-quants are random, near zero, as the package cannot round to them."""
    if kind not in K_QUANTS:
        return quantize(data, GGMLQuantizationType[kind])
    size, scales = K_QUANTS[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (len(data), data.shape[1] // 256, size), dtype=np.uint8)
    for at in scales:
        scale = (1e-4 * rng.uniform(0.5, 2, blocks.shape[:2])).astype(np.float16)
        blocks[..., at:at + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(len(data), -1)


def default_tokenizer(writer, folder):
    """The folder's vocabulary, or made-up tokens."""
    if (folder / "tokenizer.json").exists():
        return write_bpe(writer, json.loads((folder / "tokenizer.json").read_text()))
    n = json.loads((folder / "config.json").read_text())["vocab_size"]
    vocab = {"a": 0, "b": 1, "ab": 2} | {f"t{i}": i for i in range(3, n)}
    write_bpe(writer, {"model": {"vocab": vocab, "merges": [["a", "b"]]}, "added_tokens": []})


def write_bpe(writer, content, pre="gpt-2", n_unused=0):
    """The vocabulary of a tokenizer.json, byte-level BPE."""
    ids = content["model"]["vocab"] | {token["content"]: token["id"] for token in content["added_tokens"]}
    added = {token["content"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
             for token in content["added_tokens"]}
    tokens = sorted(ids, key=ids.get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens + [f"[PAD{len(tokens) + i}]" for i in range(n_unused)])
    writer.add_token_types([added.get(token, TokenType.NORMAL) for token in tokens] + [TokenType.UNUSED] * n_unused)
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
