"""GGUF files: header, configuration, names, grids and tokenizers, against the gguf package and transformers."""
import json
import os
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from gguf.quants import dequantize

import gguf_header
import quantize
from checkpoint import iterate_weights, list_shapes, quantize_settings, read_json, resolve_checkpoint
from config import ModelArgs
from gguf_files import default_tokenizer, round_to_file, stored, write_bpe, write_gguf
from gguf_format import model_config, unpermute
from gguf_header import Header, Stored, on_grid, read_header, stored_shapes, values
from generate import generate
from grid import Format
from grid import dequantize as grid_values
from model import Transformer
from reference import TEMPLATE, assert_close, expected, naive_decode, tiny, tokens_of, write_checkpoint
from test_eagle_lossless import head_of
from tokenizer import SentencePieceBackend, Tokenizer
from tp import Shard
from train_features import target_stamp

WIDE = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(file):
    return Transformer.from_pretrained(file, dtype=torch.float32)


def logits_of(model, tokens):
    return model(torch.tensor([tokens]), torch.arange(len(tokens)))[0][0]


# --- header -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model with a tokenizer, and its GGUF file in Q8_0 and Q4_0."""
    folder = write_checkpoint(tmp_path_factory.mktemp("hf") / "m", num_hidden_layers=2, intermediate_size=128)
    file = folder.with_name("m.gguf")
    write_gguf(folder, file, {"": "Q8_0", "ffn": "Q4_0"}, facts={"general.name": "Ünï", "{arch}.x": 1.5})
    return file


def test_the_header_is_what_the_gguf_package_reads(whole):
    header, reader = read_header(whole), GGUFReader(whole)
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.facts == theirs and header.facts["general.name"] == "Ünï"
    assert {name: (tensor.kind, list(tensor.shape)) for name, tensor in header.tensors.items()} == \
        {tensor.name: (tensor.tensor_type.name, tensor.shape.tolist()[::-1]) for tensor in reader.tensors}


def test_values_are_those_of_the_gguf_package_to_the_last_bit(whole):
    header = read_header(whole)
    for tensor in GGUFReader(whole).tensors:
        ours = values(header.tensors[tensor.name])
        assert torch.equal(ours, torch.tensor(dequantize(tensor.data, tensor.tensor_type))), tensor.name


@pytest.mark.parametrize("kind", gguf_header.FORMATS)
def test_the_grid_and_its_dequantisation_are_the_package_s_to_the_last_bit(kind, tmp_path, monkeypatch):
    """Of weights of unlike sizes, in stretches and a rest of them."""
    monkeypatch.setattr(gguf_header, "STRETCH", 7 * 512)
    weight = np.random.default_rng(1).normal(size=(60, 512)) * np.logspace(-3, 0, 60)[:, None]
    data = stored(weight.astype(np.float32), kind)
    (tmp_path / "x").write_bytes(bytes(32) + data.tobytes())
    tensor = Stored(kind, weight.shape, tmp_path / "x", 32, 32 + data.nbytes)
    truth, grid = torch.from_numpy(dequantize(data, GGMLQuantizationType[kind])), on_grid(tensor)
    assert torch.equal(values(tensor), truth)
    assert torch.equal(grid_values(grid["weight"], grid["scales"], grid.get("zeros")), truth)
    assert {name: tuple(part.shape) for name, part in grid.items()} == stored_shapes(tensor)


def test_a_file_cut_at_any_place_is_refused_by_name(whole, tmp_path):
    content, file = whole.read_bytes(), tmp_path / "cut.gguf"
    for size in [0, 3, 4, 10, 23, *range(24, len(content) - 1, len(content) // 50), len(content) - 1]:
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut.gguf is (cut short|not a GGUF file)") as caught:
            resolve_checkpoint(file)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at,value,message", [
    (0, b"GGML", "is not a GGUF file"),
    (4, struct.pack("<I", 1), "version 1 of GGUF"),
    (4, struct.pack(">I", 3), "version 50331648 of GGUF, of which 2 and 3 are read, little-endian"),
    (8, struct.pack("<Q", 1 << 62), "is cut short|damaged"),
    (16, struct.pack("<Q", 1 << 62), "is cut short|damaged"),
    (24, struct.pack("<Q", 1 << 63), "is cut short"),
])
def test_a_damaged_header_is_refused(whole, tmp_path, at, value, message):
    file, content = tmp_path / "bad.gguf", bytearray(whole.read_bytes())
    content[at:at + len(value)] = value
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        resolve_checkpoint(file)
    assert "bad.gguf" in str(caught.value) and "\n" not in str(caught.value)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_unpermute_takes_even_rows_of_each_head_first():
    weight = torch.arange(12)[:, None].expand(12, 5)    # 2 heads of 6 rows
    assert unpermute(weight, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_unpermuted_rows_under_rotate_half_score_as_gguf_rows_under_interleaved_rotation():
    """The law behind unpermute: llama.cpp rotates rows (2i, 2i+1), Hugging Face rows (i, i + D/2)."""
    rng = np.random.default_rng(0)
    n_head, head_dim, dim = 3, 8, 24
    q, k = rng.normal(size=(2, n_head * head_dim, dim))  # as a GGUF file holds them
    x, y = rng.normal(size=(2, dim))
    frequencies = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)

    def interleaved(v, position):   # [H * D] -> [H, D/2] complex
        pairs = v.reshape(n_head, head_dim // 2, 2)
        return (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * position * frequencies)

    def rotate_half(v, position):
        halves = v.reshape(n_head, 2, head_dim // 2)
        return (halves[:, 0] + 1j * halves[:, 1]) * np.exp(1j * position * frequencies)

    def scores(rotate, q, k):       # [H]
        return (rotate(q @ x, 7).conj() * rotate(k @ y, 3)).real.sum(-1)

    truth = scores(interleaved, q, k)
    ours = [unpermute(torch.from_numpy(rows), n_head).numpy() for rows in (q, k)]
    np.testing.assert_allclose(scores(rotate_half, *ours), truth)
    assert not np.allclose(scores(rotate_half, q, k), truth)    # without it, attention differs


@pytest.mark.parametrize("kind", ["llama2", "llama2_tied", "head_dim", "mistral", "qwen2", "qwen2_tied", "qwen3"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_logits_equal_transformers_on_the_weights_of_the_file(kind, dtype, tmp_path):
    folder, hf = tiny(kind, tmp_path / "hf", **WIDE)
    write_gguf(folder, tmp_path / "x.gguf", {"": dtype})
    round_to_file(hf, {"": dtype}, "llama" if kind == "mistral" else hf.config.model_type)
    tokens = tokens_of(24)
    assert_close(logits_of(load(tmp_path / "x.gguf"), tokens), expected(hf, tokens)[0])


MIXES = {
    "all Q4_0": {"": "Q4_0"},
    "all Q4_1": {"": "Q4_1"},
    "all Q8_0": {"": "Q8_0"},
    "as published": {"": "Q4_0", "ffn_down": "Q4_1", "token_embd": "Q8_0", "output": "Q8_0"},
    "v other than q and k": {"": "Q4_0", "attn_v": "Q8_0"},
    "types that are dequantised": {"": "Q4_0", "ffn_gate": "Q5_0", "ffn_down": "Q5_1"},
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kind", ["llama2", "qwen2_tied", "qwen3"])
def test_quantised_weights_equal_the_packages_dequantised_ones_to_the_last_bit(mix, kind, tmp_path):
    """In fp32, kept on their grid or not, and so do the logits of transformers on them."""
    folder, hf = tiny(kind, tmp_path / "hf", **WIDE)
    write_gguf(folder, tmp_path / "x.gguf", MIXES[mix])
    round_to_file(hf, MIXES[mix], hf.config.model_type)
    model = load(tmp_path / "x.gguf")
    D, truth = model.config.head_dim, dict(hf.named_parameters())
    for i, block in enumerate(model.layers):
        parts = dict(zip("qkv", block.attention.wqkv.weight.split([4 * D, *2 * [model.config.n_kv_head * D]])))
        parts |= dict(zip(("gate", "up"), block.feed_forward.w13.weight.chunk(2)))
        parts |= {"o": block.attention.wo.weight, "down": block.feed_forward.w2.weight}
        for name, weight in parts.items():
            key = f"model.layers.{i}.{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj.weight"
            assert torch.equal(weight, truth[key]), key
    assert torch.equal(model.output.weight, truth.get("lm_head.weight", truth["model.embed_tokens.weight"]))
    tokens = tokens_of(24)
    assert_close(logits_of(model, tokens), expected(hf, tokens)[0])


def kept(model, layer=0):
    """{name of a linear: its format, or None for 16 bits} of a layer, and of the LM head."""
    block = model.layers[layer]
    linears = {"wqkv": block.attention.wqkv, "wo": block.attention.wo, "w13": block.feed_forward.w13,
               "w2": block.feed_forward.w2, "output": model.output}
    return {name: getattr(linear, "format", None) for name, linear in linears.items()}


def test_what_has_a_grid_here_keeps_it_and_one_line_names_the_rest(tmp_path, capsys):
    folder, _ = tiny("llama2", tmp_path / "hf", **WIDE)
    int4, int8 = Format("int4", 32), Format("int8", 32)

    def kept_of(kinds):
        write_gguf(folder, tmp_path / "x.gguf", kinds)
        capsys.readouterr()
        found = kept(load(tmp_path / "x.gguf"))
        return list(found.values()), capsys.readouterr().err
    assert kept_of({"": "Q4_0", "attn_v": "Q4_1", "output": "Q8_0"}) == ([int4, int4, int4, int4, int8], "")
    assert kept_of({"": "F16"}) == ([None] * 5, "")
    assert kept_of({"": "Q4_0", "attn_v": "Q8_0", "ffn_down": "Q5_0", "output": "F32"}) == (
        [None, int4, int4, None, None], "GGUF: weights that are dequantised: 4 in Q4_0, 2 in Q5_0, 2 in Q8_0\n")
    assert quantize_settings(resolve_checkpoint(tmp_path / "x.gguf")) == {
        "mode": "int4", "group_size": 32, "tool": "gguf", "source": "x"}


def test_q4_k_keeps_its_grid_and_other_k_quants_are_dequantised(tmp_path, capsys):
    """As in a file Q4_K_M: some layers have Q6_K for v, which takes q and k with it, and for down."""
    kinds = {"": "F32", "attn": "Q4_K", "ffn": "Q4_K", "blk.1.attn_v": "Q6_K", "blk.1.ffn_down": "Q6_K"}
    folder, hf = tiny("qwen2", tmp_path / "hf", hidden_size=256, intermediate_size=256, head_dim=64)
    write_gguf(folder, tmp_path / "x.gguf", kinds)
    round_to_file(hf, kinds, "qwen2")
    model, int4 = load(tmp_path / "x.gguf"), Format("int4", 32)
    assert capsys.readouterr().err == "GGUF: weights that are dequantised: 2 in Q4_K, 2 in Q6_K\n"
    assert list(kept(model, 0).values()) == [int4, int4, int4, int4, None]
    assert list(kept(model, 1).values()) == [None, int4, int4, None, None]
    for block, theirs in zip(model.layers, hf.model.layers):
        own, mlp = theirs.self_attn, theirs.mlp
        assert torch.equal(block.attention.wqkv.weight,
                           torch.cat([part.weight for part in (own.q_proj, own.k_proj, own.v_proj)]))
        assert torch.equal(block.feed_forward.w2.weight, mlp.down_proj.weight)
    tokens = tokens_of(24)
    assert_close(logits_of(model, tokens), expected(hf, tokens)[0])
    assert quantize_settings(resolve_checkpoint(tmp_path / "x.gguf"))["mode"] == "int4"


def test_quantize_py_refuses_a_file_that_keeps_its_grid_and_takes_one_in_16_bits(tmp_path, capsys):
    folder, _ = tiny("llama2", tmp_path / "hf", **WIDE)
    run = lambda: quantize.main(quantize.parse_args([
        "--checkpoint", str(tmp_path / "x.gguf"), "--mode", "int4", "--out", str(tmp_path / "q"), "--device", "cpu"]))
    write_gguf(folder, tmp_path / "x.gguf", MIXES["as published"])
    assert run() == 2 and "is quantised already by gguf: start from its 16-bit checkpoint" in capsys.readouterr().err
    write_gguf(folder, tmp_path / "x.gguf", {"": "F16"})
    assert run() == 0 and set(kept(load(tmp_path / "q")).values()) == {Format("int4", 32), None}


@pytest.mark.parametrize("mix", ["as published", "all Q8_0"])
def test_greedy_eagle_over_a_gguf_target_equals_plain_decoding(mix, tmp_path):
    folder, _ = tiny("llama2", tmp_path / "hf", **WIDE)
    write_gguf(folder, tmp_path / "x.gguf", MIXES[mix])
    model, prompt = load(tmp_path / "x.gguf"), tokens_of(9)
    plain = naive_decode(load(tmp_path / "x.gguf"), prompt, 24)
    head = head_of(model)
    head.tell([prompt + plain])
    for tree in ("static", "dynamic:3,4,8", "chain:3"):
        drafted = generate(model, [prompt], 24, head=head, tree=tree)
        assert drafted.tokens[0] == plain and drafted.mean_accept_length > 1.2


def test_each_rank_of_a_tensor_parallel_model_reads_its_slices(tmp_path):
    folder, _ = tiny("llama2", tmp_path / "hf", **WIDE)
    write_gguf(folder, tmp_path / "x.gguf", MIXES["as published"])
    whole = load(tmp_path / "x.gguf")
    ranks = [Transformer.from_pretrained(tmp_path / "x.gguf", dtype=torch.float32, shard=Shard(rank, 2))
             for rank in range(2)]
    for name in ("wo", "w2"):
        cut = [(rank.layers[0].attention.wo[0] if name == "wo" else rank.layers[0].feed_forward.w2[0]).weight
               for rank in ranks]
        own = whole.layers[0].attention.wo if name == "wo" else whole.layers[0].feed_forward.w2
        assert torch.equal(torch.cat(cut, 1), own.weight)
    gates = [rank.layers[0].feed_forward.w13.weight.chunk(2) for rank in ranks]
    assert torch.equal(torch.cat([torch.cat(part) for part in zip(*gates)]), whole.layers[0].feed_forward.w13.weight)


# --- configuration ----------------------------------------------------------------------------------------------------


def header_of(facts, tensors=(), arch="llama"):
    """A made-up header with the facts that every file has."""
    own = {"attention.head_count": 4, "embedding_length": 64, "context_length": 256, "feed_forward_length": 128,
           "block_count": 2, "attention.layer_norm_rms_epsilon": 1e-5}
    facts = {"general.architecture": arch} | {f"{arch}.{name}": value for name, value in own.items()} | facts
    embedding = Stored("F32", (96, 64), Path("x.gguf"), 0, 0)
    return Header(Path("x.gguf"), facts, {"token_embd.weight": embedding} | dict(tensors))


@pytest.mark.parametrize("kind", ["llama2", "llama2_tied", "gqa", "head_dim", "qwen2", "qwen3"])
def test_the_configuration_is_that_of_the_folder_and_of_transformers_own_reader(kind, tmp_path):
    import transformers
    folder, _ = tiny(kind, tmp_path / "hf", hidden_size=64)
    write_gguf(folder, tmp_path / "x.gguf", facts={"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 5})
    ours = read_json(resolve_checkpoint(tmp_path / "x.gguf") / "config.json")
    source, theirs = (ModelArgs.from_config(config) for config in (
        read_json(folder / "config.json"),
        transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="x.gguf").to_dict()))
    assert ModelArgs.from_config(ours) == source
    # transformers keeps the fp32 of the file, and takes no head_dim for Qwen3.
    assert theirs.norm_eps == pytest.approx(source.norm_eps)
    assert replace(theirs, norm_eps=source.norm_eps, head_dim=source.head_dim) == source
    assert ours["eos_token_id"] == [2, 5]
    assert ours["architectures"] == read_json(folder / "config.json")["architectures"]


@pytest.mark.parametrize("facts,scaling", [
    ({}, None),
    ({"type": "none"}, None),
    ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"type": "yarn", "factor": 4.0, "original_context_length": 64},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}),
])
def test_rope_scaling_is_taken_over(facts, scaling):
    header = header_of({f"llama.rope.scaling.{name}": value for name, value in facts.items()})
    assert model_config(header)["rope_scaling"] == scaling


@pytest.mark.parametrize("facts,message", [
    ({"general.architecture": "gemma3"}, "architecture 'gemma3' is not supported .llama, qwen2, qwen3 are"),
    ({"general.architecture": 3}, "general.architecture is '3', not of the kind str"),
    ({"llama.embedding_length": None}, "the file has no llama.embedding_length"),
    ({"llama.attention.head_count_kv": [2, 4]}, r"head_count_kv is '\[2, 4\]', not of the kind int"),
    ({"llama.expert_count": 8}, "llama.expert_count 8 is not supported"),
    ({"llama.rope.dimension_count": 8}, "rope.dimension_count 8 is not supported"),
    ({"llama.rope.scaling.type": "longrope"}, "rope.scaling.type 'longrope' is not supported"),
    ({"llama.rope.scaling.attn_factor": 1.2}, "attn_factor 1.2 is not supported"),
    ({"llama.attention.sliding_window": 4096, "llama.attention.sliding_window_pattern": [True, False]},
     r"llama.attention.sliding_window 4096 with .*_pattern \[True, False\] is not supported: in which of 2 layers"),
])
def test_what_the_model_lacks_is_refused_by_name(facts, message):
    with pytest.raises(ValueError, match=message):
        model_config(header_of(facts))


@pytest.mark.parametrize("pattern", [None, 2, [True], [0, 1]])
def test_a_window_of_qwen_is_refused_unless_each_layer_says_whether_it_has_it(pattern):
    facts = {"qwen3.attention.sliding_window": 16, "qwen3.attention.sliding_window_pattern": pattern}
    with pytest.raises(ValueError, match="sliding_window 16 with .* is not supported: in which of 2 layers is it"):
        model_config(header_of(facts, arch="qwen3"))


@pytest.mark.parametrize("kind, keys, pattern", [
    ("mistral", dict(sliding_window=8), None),
    ("qwen3", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), [False, True]),
])
def test_a_sliding_window_is_taken_over(kind, keys, pattern, tmp_path):
    folder, hf = tiny(kind, tmp_path / "hf", **WIDE, **keys)
    facts = {"{arch}.attention.sliding_window": 8} | (
        {"{arch}.attention.sliding_window_pattern": pattern} if pattern else {})
    write_gguf(folder, tmp_path / "x.gguf", facts=facts)
    ours = ModelArgs.from_config(read_json(resolve_checkpoint(tmp_path / "x.gguf") / "config.json"))
    assert ours == ModelArgs.from_config(read_json(folder / "config.json")) and ours.sliding_window == 8
    tokens = tokens_of(24)
    assert_close(logits_of(load(tmp_path / "x.gguf"), tokens), expected(hf, tokens)[0])


def test_llama3_scaling_is_found_from_its_factors_and_other_factors_are_refused(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    rope = dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)
    folder, hf = tiny("llama3.1", tmp_path / "hf", rope=rope, **WIDE)
    plain = 1 / 5e5 ** (torch.arange(0, 16, 2) / 16)
    factors = plain / ROPE_INIT_FUNCTIONS["llama3"](hf.config, "cpu")[0]
    assert len(factors.unique()) == 3       # kept, divided, and one between
    write_gguf(folder, tmp_path / "x.gguf", more={"rope_freqs.weight": factors.numpy()})
    config = read_json(resolve_checkpoint(tmp_path / "x.gguf") / "config.json")
    assert config["rope_scaling"] == read_json(folder / "config.json")["rope_scaling"] == rope
    tokens = tokens_of(200)
    assert_close(logits_of(load(tmp_path / "x.gguf"), tokens), expected(hf, tokens)[0])

    factors[3] = 1.5
    write_gguf(folder, tmp_path / "y.gguf", more={"rope_freqs.weight": factors.numpy()})
    with pytest.raises(ValueError, match="y.gguf: rope_freqs.weight stretches RoPE in another way"):
        resolve_checkpoint(tmp_path / "y.gguf")


# --- files and folders ------------------------------------------------------------------------------------------------


def test_a_folder_with_one_file_is_a_checkpoint_and_one_with_several_is_not(whole, tmp_path):
    shutil.copy(whole, tmp_path / "a.gguf")
    folder = resolve_checkpoint(tmp_path)
    assert folder == resolve_checkpoint(tmp_path / "a.gguf") and (folder / "model.gguf").samefile(tmp_path / "a.gguf")
    shutil.copy(whole, tmp_path / "b.gguf")
    with pytest.raises(ValueError, match="holds 2 GGUF models: name the file of one .a.gguf, b.gguf"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert resolve_checkpoint(tmp_path) == tmp_path


def test_a_file_that_changes_gets_a_new_folder_and_other_weights_another_stamp(whole, tmp_path):
    file, content = tmp_path / "a.gguf", bytearray(whole.read_bytes())
    file.write_bytes(content)
    first, stamp = resolve_checkpoint(file), target_stamp(resolve_checkpoint(file))
    os.utime(file, ns=(1, 1))
    assert resolve_checkpoint(file) != first and target_stamp(resolve_checkpoint(file)) == stamp
    content[-1] ^= 1
    file.write_bytes(content)
    assert target_stamp(resolve_checkpoint(file)) != stamp


def test_a_model_in_parts_is_read_whole_by_any_of_them_and_refused_if_one_is_missing(tmp_path):
    folder, hf = tiny("llama2", tmp_path / "hf", **WIDE)
    (tmp_path / "parts").mkdir()
    write_gguf(folder, tmp_path / "parts" / "x.gguf", split=8)
    files = sorted((tmp_path / "parts").glob("*.gguf"))
    assert [file.name for file in files] == [f"x-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    tokens = tokens_of(24)
    for name in (tmp_path / "parts", *files):
        assert_close(logits_of(load(name), tokens), expected(hf, tokens)[0])
    shutil.copy(files[0], tmp_path / "renamed.gguf")
    with pytest.raises(ValueError, match="renamed.gguf is one of 3 parts"):
        load(tmp_path / "renamed.gguf")
    files[1].unlink()
    for name in (tmp_path / "parts", files[0], files[2]):
        with pytest.raises(FileNotFoundError, match="x-00002-of-00003.gguf is missing: the model is in 3 parts"):
            load(name)


def test_a_tensor_that_the_model_lacks_or_that_is_missing_is_refused(tmp_path):
    folder, _ = tiny("llama2", tmp_path / "hf", **WIDE)
    write_gguf(folder, tmp_path / "more.gguf", more={"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)})
    with pytest.raises(ValueError, match="more.gguf: blk.0.ffn_gate_inp.weight: the architecture has no such weight"):
        load(tmp_path / "more.gguf")
    write_gguf(folder, tmp_path / "less.gguf", leave_out=["blk.1.ffn_up.weight"])
    with pytest.raises(ValueError, match="1 of 21 weights are missing, first 'model.layers.1.mlp.up_proj.weight'"):
        load(tmp_path / "less.gguf")


def test_a_cache_that_cannot_be_written_is_one_line(whole, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set XDG_CACHE_HOME"):
        resolve_checkpoint(whole)


def test_shapes_are_listed_without_reading_values(whole, monkeypatch):
    truth = {key: list(tensor.shape) for key, tensor, _ in iterate_weights(resolve_checkpoint(whole))}
    monkeypatch.setattr(gguf_header, "raw", lambda tensor: pytest.fail("a tensor was read"))
    assert list_shapes(resolve_checkpoint(whole)) == truth


# --- tokenizers -------------------------------------------------------------------------------------------------------

TEXTS = [
    "Hello, world!", " two  spaces   and more\n\n\n  indented\ttabs \r\n", "I'm sure they'LL say it's fine; we'd've",
    "1234567 apples² in 1984, 10⁵ or ٣٤٥", "日本語とΣ ελληνικά, naïve café", "e\u0301 is é decomposed",
    "😀👍🏽 <b>x</b>",
    "def f(x):\n    return x ** 2  # square\n", "<|user|>Hi<|end|> <|assistant|><think>", "a|b == c; $5 <= ^6 + ~7", "",
]


SPECIAL = ["<|begin|>", "<|user|>", "<|assistant|>", "<|end|>"]


def bpe_with(pre_tokenizer, normalizer=None, ignore_merges=False):
    """A byte-level BPE trained on TEXTS, whose merges run across all that the split lets stand together."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        bpe.normalizer = normalizer
    bpe.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL]))
    bpe.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return bpe


def gguf_of(bpe, folder, pre, **facts):
    """A file with this tokenizer; its model is of no use."""
    tiny("llama2_tied", folder / "hf", vocab_size=bpe.get_vocab_size() + 3)
    content = json.loads(bpe.to_str())

    def write(writer):
        write_bpe(writer, content, pre, n_unused=3)
        for name, value in facts.items():
            getattr(writer, f"add_{name}")(value)
    write_gguf(folder / "hf", folder / "x.gguf", tokenizer=write)
    return folder / "x.gguf"


def split_by(*words):
    from tokenizers import Regex, pre_tokenizers
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(word), "isolated") for word in words),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_a_byte_level_tokenizer_gives_the_ids_and_texts_of_the_one_it_was_made_of(pre, tmp_path):
    import transformers
    from tokenizers import normalizers, pre_tokenizers
    from transformers.integrations.gguf import gguf_tokenizer_mapping as theirs
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = bpe_with({
        "gpt-2": level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]),
        "llama-bpe": split_by(theirs._LLAMA3_SPLIT),
        "qwen2": split_by(transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX),
    }[pre], normalizers.NFC() if pre == "qwen2" else None, ignore_merges=pre == "llama-bpe")
    file = gguf_of(bpe, tmp_path, pre, bos_token_id=0, eos_token_id=3)
    tokenizer = Tokenizer.from_pretrained(file)
    for text in TEXTS:
        ids = bpe.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == bpe.decode([i for i in ids if i > 3], skip_special_tokens=False)
    assert tokenizer.special_ids == {0, 1, 2, 3} and tokenizer.bos_id == 0 and tokenizer.stop_ids == {3}
    assert tokenizer.vocab_size == bpe.get_vocab_size()     # unused tokens have no text
    assert tokenizer.adds_bos == (pre == "llama-bpe")
    reference = transformers.AutoTokenizer.from_pretrained(resolve_checkpoint(file))
    assert [reference.encode(text) for text in TEXTS] == [
        tokenizer.encode(text, bos=tokenizer.adds_bos) for text in TEXTS]
    if pre not in ("smollm", "qwen2"):      # transformers' own reader of GGUF does not know these two entirely
        reader = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
        assert [reader.encode(text, add_special_tokens=False) for text in TEXTS] == [*map(tokenizer.encode, TEXTS)]


def test_the_default_split_is_llama_cpp_s_one_step_after_the_other(tmp_path):
    bpe = bpe_with(split_by(r"[\p{P}\$\+<=>\^~\|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|"
                            r"\s+(?!\S)", r"\p{N}+", "[0-9][0-9][0-9]"))
    tokenizer = Tokenizer.from_pretrained(gguf_of(bpe, tmp_path, "default"))
    for text in TEXTS:
        assert tokenizer.encode(text) == bpe.encode(text).ids, text
    assert tokenizer.bos_id is None and not tokenizer.adds_bos


def test_a_template_and_its_variants_come_from_the_file(tmp_path):
    file = gguf_of(bpe_with(split_by(r"\s+")), tmp_path, "gpt-2", eos_token_id=3, bos_token_id=0, add_bos_token=True,
                   chat_template=[{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "T"}])
    tokenizer = Tokenizer.from_pretrained(file)
    chat = [{"role": "user", "content": "Hello"}]
    assert tokenizer.render_chat(chat) == "<|user|>Hello<|end|><|assistant|>" and tokenizer.adds_bos
    assert Tokenizer.from_pretrained(file, chat_template="tool_use").render_chat(chat) == "T"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model like LLaMA's: BPE with byte fallback."""
    import sentencepiece
    folder = tmp_path_factory.mktemp("spm")
    (folder / "text").write_text("\n".join(text for text in TEXTS * 3 if text))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "m"), vocab_size=420, model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.98, minloglevel=2, user_defined_symbols=["<think>"],
        control_symbols=["<|user|>", "<|assistant|>", "<|end|>"])
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_gives_the_ids_and_texts_of_the_model_it_was_made_of(pieces, prefix, tmp_path):
    import sentencepiece
    import transformers
    n = pieces.get_piece_size()
    tiny("llama2_tied", tmp_path / "hf", vocab_size=n)
    kinds = [TokenType.UNKNOWN if pieces.is_unknown(i) else TokenType.CONTROL if pieces.is_control(i) else
             TokenType.BYTE if pieces.is_byte(i) else
             TokenType.USER_DEFINED if pieces.id_to_piece(i) == "<think>" else TokenType.NORMAL for i in range(n)]

    def write(writer):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([pieces.id_to_piece(i).encode() for i in range(n)])
        writer.add_token_scores([pieces.get_score(i) for i in range(n)])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(pieces.bos_id())
        writer.add_eos_token_id(pieces.eos_id())
        writer.add_unk_token_id(pieces.unk_id())
        writer.add_add_space_prefix(prefix)
    write_gguf(tmp_path / "hf", tmp_path / "x.gguf", tokenizer=write)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "x.gguf")
    model = pieces
    if not prefix:
        bare = sentencepiece.SentencePieceProcessor(
            model_proto=pieces.serialized_model_proto() + SentencePieceBackend.NO_PREFIX)
        model = bare
    for text in TEXTS:
        if "<|" not in text:    # sentencepiece itself has no control tokens in a text
            assert tokenizer.encode(text) == model.encode(text), text
            assert tokenizer.decode(model.encode(text)) == model.decode(model.encode(text))
    user, end = (pieces.piece_to_id(token) for token in ("<|user|>", "<|end|>"))
    assert tokenizer.encode("<|user|>Hi<|end|>") == [user, *model.encode("Hi"), end]
    assert tokenizer.bos_id == 1 and tokenizer.adds_bos and tokenizer.stop_ids == {2}
    assert {0, 1, 2, user, end} <= tokenizer.special_ids
    if prefix:
        reader = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="x.gguf")
        for text in TEXTS:
            if "<" not in text and text[:1] != " ":     # it has no prefix before a space, unlike sentencepiece
                assert reader.encode(text, add_special_tokens=False) == tokenizer.encode(text), text


@pytest.mark.parametrize("change,message", [
    (lambda w: w.add_tokenizer_pre("tekken"), "tokenizer.ggml.pre 'tekken' is not supported .gpt-2, smollm, default"),
    (lambda w: w.add_tokenizer_model("t5"), "tokenizer.ggml.model 't5' is not supported .gpt2 and llama are"),
    (lambda w: w.add_tokenizer_model("llama"), "the file has no tokenizer.ggml.scores"),
    (lambda w: w.add_bos_token_id(9999), "bos_token_id 9999 is beyond the vocabulary"),
    (lambda w: w.add_token_merges(["a b", "a qq"]), "tokenizer.ggml.merges do not fit the vocabulary"),
    (lambda w: w.add_token_types([1, 1]), "token_type do not make a vocabulary of 96 tokens"),
])
def test_a_tokenizer_that_cannot_be_right_is_refused(change, message, tmp_path):
    folder, _ = tiny("llama2_tied", tmp_path / "hf")

    def write(writer):
        default_tokenizer(writer, folder)
        change(LastWins(writer))
    write_gguf(folder, tmp_path / "x.gguf", tokenizer=write)
    with pytest.raises(ValueError, match=message) as caught:
        resolve_checkpoint(tmp_path / "x.gguf")
    assert str(caught.value).startswith(f"{tmp_path / 'x.gguf'}: ") and "\n" not in str(caught.value)


class LastWins:
    """A GGUFWriter whose value replaces one that is there."""

    def __init__(self, writer):
        self.writer = writer

    def __getattr__(self, name):
        def add(value):
            data, self.writer.kv_data = self.writer.kv_data, [{}]
            getattr(self.writer, name)(value)
            self.writer.kv_data = [data[0] | self.writer.kv_data[0]]
        return add


def test_the_demo_s_tokenizer_has_its_bytes(demo_folder, tmp_path):
    content = json.loads((demo_folder / "tokenizer.json").read_text())
    tiny("llama2_tied", tmp_path / "hf", vocab_size=8)
    write_gguf(tmp_path / "hf", tmp_path / "x.gguf", tokenizer=lambda writer: write_bpe(writer, content, "smollm"))
    assert (resolve_checkpoint(tmp_path / "x.gguf") / "tokenizer.json").read_bytes() == \
        (demo_folder / "tokenizer.json").read_bytes()
