"""model.py against transformers in fp32 on tiny random models: logits, features, caches, masks, and what is refused.

    python -m pytest tests/test_model.py -q

Shapes: B batch, T new tokens, S cache slots, N tree nodes, V vocabulary.
"""
import contextlib
import copy
import functools
import json
import os
import re
import shutil
import types

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint import resolve_checkpoint
from config import ModelArgs
from linears import Format, QuantLinear
from model import Transformer
from reference import (BASE, KINDS, VOCAB, assert_close, edited_json, expected, naive_decode, read_safetensors, tiny,
                       tokens_of)

SLOTS = 64
all_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """zoo(kind) -> folder, hf (the oracle) and model (ours), made once. Do not write into the folder or the weights."""

    @functools.cache
    def load_kind(kind):
        folder, hf = tiny(kind, tmp_path_factory.mktemp(kind))
        return types.SimpleNamespace(folder=folder, hf=hf, model=load(folder))

    return load_kind


@pytest.fixture
def llama(zoo, tmp_path):
    """A private copy of the llama2 checkpoint, to be damaged."""
    return shutil.copytree(zoo("llama2").folder, tmp_path / "llama2")


def load(folder, dtype=torch.float32):
    return Transformer.from_pretrained(folder, device="cpu", dtype=dtype)


def feed(model, tokens, start=0):
    """Logits [T, V] and features [T, dim] of one sequence whose first token stands at position start."""
    logits, features = model(torch.tensor([tokens]), torch.arange(start, start + len(tokens)))
    return logits[0], features[0]


def feed_ragged(model, rows, starts):
    """Rows of different length, right-padded; per-row positions [B, T]. Returns the valid part of each row."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])  # [B, T]
    logits, features = model(tokens, torch.tensor(starts)[:, None] + torch.arange(width))
    return [(logits[b, :len(row)], features[b, :len(row)]) for b, row in enumerate(rows)]


def assert_equal_outputs(ours, theirs):
    for mine, reference in zip(ours, theirs, strict=True):  # logits, features
        assert_close(mine, reference)


# ---------------------------------------------------------------------------------------------------------------------
# logits and features equal transformers

@all_kinds
def test_whole_prompt_equals_transformers(zoo, kind):
    z, tokens = zoo(kind), tokens_of(48)
    z.model.setup_caches(1, SLOTS)
    assert_equal_outputs(feed(z.model, tokens), expected(z.hf, tokens))


@all_kinds
def test_a_prompt_as_long_as_the_context_equals_transformers(zoo, kind):
    z = zoo(kind)
    tokens = tokens_of(z.model.config.block_size)
    z.model.setup_caches(1, len(tokens))
    assert_equal_outputs(feed(z.model, tokens), expected(z.hf, tokens))


@all_kinds
def test_prompt_in_chunks_equals_transformers(zoo, kind):
    z, tokens = zoo(kind), tokens_of(48)
    z.model.setup_caches(1, SLOTS)
    cuts = [0, 17, 18, 34, 48]
    chunks = [feed(z.model, tokens[a:b], start=a) for a, b in zip(cuts, cuts[1:])]
    assert_equal_outputs(map(torch.cat, zip(*chunks)), expected(z.hf, tokens))


@all_kinds
def test_one_token_cached_steps_equal_transformers(zoo, kind):
    z, tokens = zoo(kind), tokens_of(48)
    z.model.setup_caches(1, SLOTS)
    parts = [feed(z.model, tokens[:20])] + [feed(z.model, tokens[i:i + 1], start=i) for i in range(20, 48)]
    assert_equal_outputs(map(torch.cat, zip(*parts)), expected(z.hf, tokens))


@all_kinds
def test_each_row_of_a_ragged_batch_gets_what_it_gets_alone(zoo, kind):
    z, lengths, steps = zoo(kind), [9, 23, 14], 6
    rows = [tokens_of(n + steps, seed=n) for n in lengths]
    z.model.setup_caches(3, SLOTS)
    parts = [feed_ragged(z.model, [row[:n] for row, n in zip(rows, lengths)], starts=[0, 0, 0])]
    for step in range(steps):  # the first steps overwrite the padding of the shorter rows
        starts = [n + step for n in lengths]
        parts.append(feed_ragged(z.model, [row[s:s + 1] for row, s in zip(rows, starts)], starts))
    for b, row in enumerate(rows):
        assert_equal_outputs(map(torch.cat, zip(*(part[b] for part in parts))), expected(z.hf, row))


# Node i hangs below PARENTS[i], or below the last token of the prefix where that is -1: [B][N]
PARENTS = [[-1, -1, -1, 0, 0, 1, 3, 3, 5, 8], [-1, 0, 1, 2, 3, 3, 1, -1, 7, 8]]


def path_to(parents, node):
    return path_to(parents, parents[node]) + [node] if node >= 0 else []


def tree_inputs(parents, prefix_lengths, width):
    """Positions [B, N] = length + depth, slots [B, N] = length + i, mask [B, N, S]: the prefix and the ancestors."""
    N = len(parents[0])
    lengths = torch.tensor(prefix_lengths)[:, None]  # [B, 1]
    depths = torch.tensor([[len(path_to(p, i)) - 1 for i in range(N)] for p in parents])
    mask = torch.zeros(len(parents), N, width, dtype=torch.bool)
    for b, length in enumerate(prefix_lengths):
        mask[b, :, :length] = True
        for i in range(N):
            mask[b, i, [length + j for j in path_to(parents[b], i)]] = True
    return lengths + depths, lengths + torch.arange(N), mask


@all_kinds
def test_tree_mask_rows_equal_transformers_on_each_path(zoo, kind):
    z, parents = zoo(kind), PARENTS[0]
    prefix, nodes = tokens_of(19, seed=1), tokens_of(len(parents), seed=2)
    theirs = [expected(z.hf, prefix + [nodes[j] for j in path_to(parents, i)]) for i in range(len(nodes))]
    theirs = [torch.stack([out[-1] for out in outs]) for outs in zip(*theirs)]
    for width in (19 + len(nodes), 40, SLOTS):  # the mask covers any prefix of the slots
        z.model.setup_caches(1, SLOTS)
        feed(z.model, prefix)
        input_pos, cache_pos, mask = tree_inputs([parents], [len(prefix)], width)
        logits, features = z.model(torch.tensor([nodes]), input_pos, cache_pos=cache_pos, mask=mask)
        assert_equal_outputs((logits[0], features[0]), theirs)


@all_kinds
def test_trees_of_a_ragged_batch_equal_transformers_on_each_path(zoo, kind):
    z, lengths = zoo(kind), [9, 17]
    prefixes = [tokens_of(n, seed=n) for n in lengths]
    nodes = [tokens_of(len(PARENTS[0]), seed=3), tokens_of(len(PARENTS[1]), seed=4)]
    z.model.setup_caches(2, SLOTS)
    feed_ragged(z.model, prefixes, starts=[0, 0])
    input_pos, cache_pos, mask = tree_inputs(PARENTS, lengths, width=32)
    logits, features = z.model(torch.tensor(nodes), input_pos, cache_pos=cache_pos, mask=mask)
    for b in range(2):
        for i in range(len(nodes[b])):
            path = [nodes[b][j] for j in path_to(PARENTS[b], i)]
            theirs = expected(z.hf, prefixes[b] + path)
            assert_equal_outputs((logits[b, i], features[b, i]), [out[-1] for out in theirs])


@pytest.mark.parametrize("kind", ["llama2", "llama2_tied", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_of_features_is_logits_bit_for_bit(zoo, kind, dtype):
    model = load(zoo(kind).folder, dtype)
    model.setup_caches(2, SLOTS)
    for start, T in (0, 20), (20, 1), (21, 4):
        tokens = torch.tensor([tokens_of(T, seed=1), tokens_of(T, seed=2)])
        logits, features = model(tokens, torch.arange(start, start + T))
        assert logits.shape == (2, T, VOCAB) and features.shape == (2, T, model.config.dim)
        assert torch.equal(model.output(features), logits)


@all_kinds
def test_captured_hidden_states_equal_those_of_transformers(zoo, kind):
    """Each index alone, and several at once in the order asked for: a block after a prefill, and a prefill."""
    z, tokens = zoo(kind), tokens_of(20)
    theirs = z.hf(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    n_layer = z.model.config.n_layer
    assert len(theirs) == n_layer + 1
    for capture in [(i,) for i in range(n_layer + 1)] + [(n_layer, 0, n_layer - 1)]:
        z.model.setup_caches(1, SLOTS)
        wanted = torch.cat([theirs[i][0] for i in capture], dim=-1)
        for start, end in (0, 16), (16, 20):
            block, pos = torch.tensor([tokens[start:end]]), torch.arange(start, end)
            logits, captured = z.model(block, pos, capture=capture)
            assert_equal_outputs((logits[0], captured[0]), (expected(z.hf, tokens)[0][start:end], wanted[start:end]))
            assert torch.equal(captured, z.model.features(block, pos, capture=capture))


def test_a_captured_index_beyond_the_layers_is_refused(zoo):
    for capture in (3,), (0, -1):
        with refused("capture", capture, "2, the number of layers"):
            zoo("gqa").model(torch.tensor([[1]]), torch.arange(1), capture=capture)


def test_greedy_decoding_equals_transformers_generate(zoo):
    z, prompt = zoo("gqa"), tokens_of(12)
    theirs = z.hf.generate(torch.tensor([prompt]), max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert naive_decode(z.model, prompt, 32) == theirs[0, 12:].tolist()


def test_a_long_context_equals_transformers_wherever_a_cache_view_may_end(tmp_path):
    folder, hf = tiny("gqa", tmp_path, max_position_embeddings=2048)
    model, tokens = load(folder), tokens_of(1100)
    model.setup_caches(1, 2048)
    parts, done = [], 0
    for edge in (64, 128, 256, 512, 1024):  # one chunk up to the edge, then one token at a time across it
        for start, end in [(done, edge - 2)] + [(i, i + 1) for i in range(edge - 2, edge + 2)]:
            parts.append(feed(model, tokens[start:end], start))
        done = edge + 2
    parts.append(feed(model, tokens[done:], done))
    assert_equal_outputs(map(torch.cat, zip(*parts)), expected(hf, tokens))


def test_bf16_weights_give_close_finite_logits(zoo):
    for kind in "llama2", "llama3.1", "qwen2", "qwen3":
        z, tokens = zoo(kind), tokens_of(48)
        model = load(z.folder, torch.bfloat16)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        model.setup_caches(1, SLOTS)
        logits, features = feed(model, tokens)
        assert features.dtype == torch.bfloat16
        assert_close(logits, expected(z.hf, tokens)[0], tolerance=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# caches know no length

def test_a_rejected_draft_costs_nothing(zoo):
    z, tokens = zoo("gqa"), tokens_of(30)
    theirs = expected(z.hf, tokens)
    z.model.setup_caches(1, SLOTS)
    feed(z.model, tokens[:20])
    feed(z.model, tokens_of(7, seed=9), start=20)  # a chain of garbage in slots 20..26
    input_pos, cache_pos, mask = tree_inputs(PARENTS[:1], [20], width=SLOTS)
    z.model(torch.tensor([tokens_of(10, seed=8)]), input_pos, cache_pos=cache_pos, mask=mask)  # a tree in 20..29
    parts = [feed(z.model, tokens[i:i + 1], start=i) for i in range(20, 30)]
    assert_equal_outputs(map(torch.cat, zip(*parts)), [out[20:] for out in theirs])


def test_slots_beyond_the_mask_are_not_read(zoo):
    """NaN in a slot outside the mask's width would reach the logits even with weight zero, were the slot read."""
    model, prefix, draft = load(zoo("llama2").folder), tokens_of(10, vocab=VOCAB - 1), [3, 4, 5]
    expected_logits = expected(zoo("llama2").hf, prefix + draft)[0][10:]
    model.tok_embeddings.weight[VOCAB - 1] = float("nan")
    model.setup_caches(1, SLOTS)
    feed(model, prefix)
    logits, _ = feed(model, [VOCAB - 1] * 8, start=16)
    assert logits.isnan().all()
    mask = torch.ones(3, 16, dtype=torch.bool).tril(10)[None]
    logits, _ = model(torch.tensor([draft]), 10 + torch.arange(3), cache_pos=10 + torch.arange(3)[None], mask=mask)
    assert_close(logits[0], expected_logits)


def test_slot_and_position_are_independent_arguments(zoo):
    z, tokens = zoo("llama3.1"), tokens_of(20)
    z.model.setup_caches(1, SLOTS)
    slots = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:20]  # a sequence scattered over the cache
    mask = torch.zeros(1, 20, 32, dtype=torch.bool)
    for i in range(20):
        mask[0, i, slots[:i + 1]] = True
    logits, features = z.model(torch.tensor([tokens]), torch.arange(20), cache_pos=slots[None], mask=mask)
    assert_equal_outputs((logits[0], features[0]), expected(z.hf, tokens))


def test_fewer_rows_than_the_cache_was_made_for_are_served(zoo):
    z, tokens = zoo("gqa"), tokens_of(20)
    z.model.setup_caches(4, SLOTS)
    first = feed(z.model, tokens[:12])
    second = feed(z.model, tokens[12:], start=12)
    assert_equal_outputs(map(torch.cat, zip(first, second)), expected(z.hf, tokens))


def test_positions_without_a_batch_axis_hold_for_every_row(zoo):
    z, rows = zoo("gqa"), [tokens_of(16, seed=b) for b in range(3)]
    z.model.setup_caches(3, SLOTS)
    logits, features = z.model(torch.tensor(rows), torch.arange(16))
    for b, row in enumerate(rows):
        assert_equal_outputs((logits[b], features[b]), expected(z.hf, row))


def test_setup_caches_again_forgets_and_resizes(zoo):
    z, tokens = zoo("gqa"), tokens_of(40)
    for batch, slots in (1, 16), (2, 48), (1, 40):
        z.model.setup_caches(batch, slots)
        n = min(slots, 40)
        assert_equal_outputs(feed(z.model, tokens[:n]), [out[:n] for out in expected(z.hf, tokens)])


def test_caches_are_not_part_of_the_checkpoint(zoo):
    model = load(zoo("llama2").folder)
    before = set(model.state_dict())
    model.setup_caches(2, SLOTS)
    assert set(model.state_dict()) == before


def test_the_whole_context_can_be_allocated_and_not_one_slot_more(zoo):
    for kind in KINDS:
        model = zoo(kind).model
        context = model.config.block_size
        model.setup_caches(1, context)
        with pytest.raises(ValueError) as error:
            model.setup_caches(1, context + 1)
        assert {str(context), str(context + 1)} <= set(re.findall(r"\d+", str(error.value)))


# ---------------------------------------------------------------------------------------------------------------------
# config.json

@all_kinds
def test_config_fields_are_those_of_config_json(zoo, kind):
    ours, theirs = zoo(kind).model.config, zoo(kind).hf.config
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.dim, ours.n_layer, ours.n_head, ours.n_kv_head, ours.head_dim) == (
        theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.num_key_value_heads, head_dim)
    assert (ours.intermediate_size, ours.vocab_size) == (theirs.intermediate_size, theirs.vocab_size)
    if ours.n_expert:
        size = getattr(theirs, "moe_intermediate_size", theirs.intermediate_size)
        assert (ours.n_expert, ours.n_expert_active, ours.expert_size) == (
            theirs.num_local_experts, theirs.num_experts_per_tok, size)
        assert ours.norm_topk_prob is getattr(theirs, "norm_topk_prob", True)
        dense = [i for i, layer in enumerate(zoo(kind).hf.model.layers) if not hasattr(layer.mlp, "experts")]
        assert list(ours.dense_layers) == dense and (len(dense) == 3) == (kind == "qwen3_moe_mixed")
    stretched = 4 if kind == "llama_linear" else 1
    assert ours.block_size == theirs.max_position_embeddings * stretched


@all_kinds
def test_old_and_new_style_config_json_give_the_same_config(tmp_path, kind):
    old, _ = tiny(kind, tmp_path / "old", old_style=True)
    new, _ = tiny(kind, tmp_path / "new", old_style=False)
    assert "rope_theta" in json.loads((old / "config.json").read_text())
    assert "rope_parameters" in json.loads((new / "config.json").read_text())
    assert load(old).config == load(new).config


def test_the_context_of_vicuna_16k_is_max_sequence_length(tmp_path):
    """Its config.json has max_position_embeddings 4096, linear scaling by 4 and max_sequence_length 16384."""
    folder, hf = tiny("llama_linear", tmp_path, max_position_embeddings=32)
    with edited_json(folder / "config.json") as config:
        config["max_sequence_length"] = 128
    model, tokens = load(folder), tokens_of(128)
    assert model.config.block_size == 128
    model.setup_caches(1, 128)
    assert_equal_outputs(feed(model, tokens), expected(hf, tokens))


@pytest.mark.parametrize("rope, keys, context", [
    (dict(type="linear", factor=4.0), {}, 4 * 256),         # positions before they are stretched, as vLLM reads it too
    (dict(rope_type="linear", factor=2.5), {}, 640),
    (dict(rope_type="linear", factor=4.0, original_max_position_embeddings=64), {}, 256),
    (dict(rope_type="linear", factor=4.0), dict(max_sequence_length=4096), 4096),
    (dict(type="dynamic", factor=4.0), {}, 256),            # past it the angles of all tokens would change
    (dict(type="dynamic", factor=4.0), dict(max_sequence_length=1024), 256),
    (dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
          original_max_position_embeddings=64), {}, 256),
    (None, dict(max_sequence_length=300), 300),
], ids=str)
def test_the_context_under_each_scaling_of_rope(zoo, rope, keys, context):
    config = json.loads((zoo("llama2").folder / "config.json").read_text()) | keys
    assert ModelArgs.from_config(config | {"rope_scaling": rope}).block_size == context
    if rope:
        rope = {"rope_type": rope.get("type"), **rope, "rope_theta": 1e4}
        assert ModelArgs.from_config(config | {"rope_scaling": None, "rope_parameters": rope}).block_size == context


def test_where_two_keys_scale_rope_transformers_takes_rope_scaling(tmp_path):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    folder, _ = tiny("llama_linear", tmp_path)
    with edited_json(folder / "config.json") as config:
        config["rope_parameters"] = dict(rope_type="linear", factor=2.0, rope_theta=1e4)
    theirs = AutoConfig.from_pretrained(folder).rope_parameters["factor"]
    assert load(folder).config.rope_scaling["factor"] == theirs == 4.0
    llama3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    for keys in ({}, {"original_max_position_embeddings": 64}):     # beside rope_scaling, or max_position_embeddings
        with edited_json(folder / "config.json") as config:
            config.pop("rope_parameters", None)
            config.update(rope_scaling=llama3, **keys)
        theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq
        assert_close(load(folder).inv_freq, theirs)


@pytest.mark.parametrize("kind", ["mixtral", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_what_config_json_leaves_out_is_what_transformers_takes(zoo, kind):
    from transformers import AutoConfig
    config = json.loads((zoo(kind).folder / "config.json").read_text())
    if kind == "qwen3_moe":
        for key in ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers", "head_dim"):
            del config[key]
        ours, theirs = ModelArgs.from_config(config), AutoConfig.for_model(**config)
        assert (ours.norm_topk_prob, ours.dense_layers) == (theirs.norm_topk_prob, ()) == (False, ())
        assert theirs.decoder_sparse_step == 1 and theirs.mlp_only_layers == [] and ours.head_dim == 32 // 4
    for key in ("max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling", "sliding_window"):
        config.pop(key, None)
    ours, theirs = ModelArgs.from_config(config), AutoConfig.for_model(**config)
    assert (ours.block_size, ours.norm_eps, ours.rope_theta, ours.sliding_window) == (
        theirs.max_position_embeddings, theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"],
        theirs.sliding_window)


def test_whole_numbers_may_be_written_as_floats(zoo):
    config = json.loads((zoo("mixtral").folder / "config.json").read_text())
    keys = [key for key, value in config.items() if type(value) is int and not key.endswith("token_id")]
    assert {"vocab_size", "num_local_experts", "max_position_embeddings"} <= set(keys)
    args = ModelArgs.from_config(config | {key: float(config[key]) for key in keys})
    assert args == ModelArgs.from_config(config) and type(args.n_head) is type(args.block_size) is int
    for key, wrong in [("vocab_size", 96.5), ("hidden_size", "32"), ("num_hidden_layers", True), ("head_dim", 1e400)]:
        with refused(key, repr(wrong), "whole number"):
            ModelArgs.from_config(config | {key: wrong})


def test_absent_optional_keys_take_the_defaults_of_transformers(zoo, tmp_path):
    """LLaMA-1 and Vicuna v1.3 say nothing of KV heads, head_dim, rope or biases."""
    folder, hf = tiny("llama2", tmp_path, rms_norm_eps=1e-6)
    with edited_json(folder / "config.json") as config:
        for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias",
                    "tie_word_embeddings", "pretraining_tp", "rms_norm_eps", "hidden_act"):
            del config[key]
    model, tokens = load(folder), tokens_of(40)
    model.setup_caches(1, SLOTS)
    assert_equal_outputs(feed(model, tokens), expected(hf, tokens))


@contextlib.contextmanager
def refused(*names, error=ValueError):
    """The block raises, in one line that holds every name."""
    with pytest.raises(error) as raised:
        yield
    message = str(raised.value)
    assert all(str(name) in message for name in names), message
    assert "\n" not in message, message


YARN = dict(factor=4.0, original_max_position_embeddings=64)


@pytest.mark.parametrize("kind, changes, names", [
    ("llama2", dict(architectures=["GPT2LMHeadModel"], model_type="gpt2"), ["model_type", "gpt2"]),
    ("llama2", dict(rope_scaling=dict(YARN, rope_type="yarn")), ["rope", "yarn"]),
    ("llama2", dict(rope_scaling=dict(YARN, type="yarn")), ["rope", "yarn"]),
    ("llama2", dict(rope_parameters=dict(YARN, rope_type="yarn", rope_theta=1e4)), ["rope", "yarn"]),
    ("llama2", dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
    ("llama2", dict(mlp_bias=True), ["mlp_bias", "True"]),
    ("llama2", dict(quantization_config=dict(quant_method="hqq", bits=4)), ["quantization_config", "hqq"]),
    ("mixtral", dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
    ("qwen2", dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
    ("qwen3_moe", dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
    ("qwen3_moe", dict(num_experts=0), ["num_experts_per_tok 3", "num_experts 0"]),
    ("qwen3_moe", dict(num_experts=8.5), ["num_experts", "8.5"]),
    ("qwen3_moe", dict(num_local_experts=4), ["num_experts 8", "num_local_experts 4"]),
    ("qwen3_moe", dict(num_experts_per_tok=9), ["num_experts_per_tok 9", "num_experts 8"]),
    ("mixtral", dict(num_experts_per_tok=0), ["num_experts_per_tok 0", "num_local_experts 8"]),
    ("qwen3_moe", dict(moe_intermediate_size=0), ["moe_intermediate_size", "0"]),
    ("qwen3_moe", dict(decoder_sparse_step=0), ["decoder_sparse_step", "0"]),
    ("qwen3_moe", dict(mlp_only_layers="0"), ["mlp_only_layers", "'0'"]),
    ("qwen3_moe", dict(mlp_only_layers=[0.5]), ["mlp_only_layers", "0.5"]),
    ("qwen3_moe", dict(norm_topk_prob="yes"), ["norm_topk_prob", "yes"]),
    ("qwen3_moe", dict(attention_bias=True), ["attention_bias", "True"]),
    ("qwen3_moe", dict(model_type="qwen3_next"), ["model_type", "qwen3_next", "qwen3 and qwen3_moe are"]),
], ids=lambda value: str(value)[:40])
def test_an_unknown_feature_is_refused_by_key_and_value(zoo, tmp_path, kind, changes, names):
    folder = shutil.copytree(zoo(kind).folder, tmp_path / "copy")
    with edited_json(folder / "config.json") as config:
        config.update(changes)
    with refused(*names):
        load(folder)


@pytest.mark.parametrize("kind", ["llama2", "qwen3"])
def test_attention_bias_is_either_computed_or_refused_by_name(tmp_path, kind):
    """transformers then gives o_proj a bias too, which Qwen2 has not."""
    folder, hf = tiny(kind, tmp_path, attention_bias=True)
    try:
        model = load(folder)
    except ValueError as error:
        assert "attention_bias" in str(error)
        return
    tokens = tokens_of(40)
    model.setup_caches(1, SLOTS)
    assert_equal_outputs(feed(model, tokens), expected(hf, tokens))


def test_a_sliding_window_is_refused_only_where_it_matters(tmp_path):
    folder, hf = tiny("mistral", tmp_path, sliding_window=16)
    model, tokens = load(folder), tokens_of(16)
    model.setup_caches(1, 16)
    assert_equal_outputs(feed(model, tokens), expected(hf, tokens))
    with refused("sliding_window", 16):
        model.setup_caches(1, 17)


def test_a_sliding_window_that_qwen2_does_not_use_is_ignored(tmp_path):
    folder, hf = tiny("qwen2", tmp_path, use_sliding_window=False)
    with edited_json(folder / "config.json") as config:  # as published: the number is there, the switch is off
        config["sliding_window"] = 16
    model, tokens = load(folder), tokens_of(40)
    model.setup_caches(1, SLOTS)
    assert_equal_outputs(feed(model, tokens), expected(hf, tokens))


@pytest.mark.parametrize("kind, keys", [
    ("qwen2", dict(max_window_layers=1)), ("qwen3", dict(max_window_layers=0)), ("qwen3_moe", {}),
    ("qwen2", dict(max_window_layers=2, layer_types=["full_attention", "sliding_attention"]))], ids=str)
def test_a_sliding_window_that_qwen_uses_in_some_layers_is_refused(tmp_path, kind, keys):
    folder, _ = tiny(kind, tmp_path, use_sliding_window=True, sliding_window=16, **keys)
    with refused("sliding_window", 16):
        load(folder).setup_caches(1, 17)


@pytest.mark.parametrize("kind, keys", [
    ("qwen2", dict(max_window_layers=2)), ("qwen3", dict(max_window_layers=28)),
    ("qwen3", dict(max_window_layers=0, layer_types=["full_attention", "full_attention"]))], ids=str)
def test_a_sliding_window_that_no_layer_of_qwen_has_is_ignored(tmp_path, kind, keys):
    folder, hf = tiny(kind, tmp_path, use_sliding_window=True, sliding_window=16, **keys)
    with edited_json(folder / "config.json") as config:
        if keys["max_window_layers"]:
            config.pop("layer_types", None)     # as published
    model, tokens = load(folder), tokens_of(40)
    model.setup_caches(1, SLOTS)
    assert_equal_outputs(feed(model, tokens), expected(hf, tokens))


def test_mistral_has_a_window_whatever_the_switch_of_qwen_says(zoo):
    config = json.loads((zoo("mistral").folder / "config.json").read_text()) | {"use_sliding_window": False}
    assert ModelArgs.from_config(config).sliding_window == 4096


# ---------------------------------------------------------------------------------------------------------------------
# loading

@pytest.mark.parametrize("kind", ["llama2_tied", "mixtral", "qwen2", "qwen3", "qwen3_moe_mixed"])
def test_every_file_layout_gives_the_same_weights(zoo, tmp_path, kind):
    reference = zoo(kind).model.state_dict()
    for sharded, binary in (True, False), (False, True), (True, True):
        folder, _ = tiny(kind, tmp_path / f"{sharded}-{binary}", sharded=sharded, binary=binary)
        assert not list(folder.glob("*.safetensors" if binary else "*.bin"))
        assert len(list(folder.glob("*.bin" if binary else "*.safetensors"))) > 1 or not sharded
        weights = load(folder).state_dict()
        assert weights.keys() == reference.keys()
        assert all(torch.equal(weights[key], reference[key]) for key in weights)


def test_a_path_may_be_a_string(zoo):
    folder = zoo("llama2").folder
    assert Transformer.from_pretrained(str(folder), device="cpu", dtype=torch.float32).config == load(folder).config


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    weights = read_safetensors(file)
    change(weights)
    save_file(weights, file)


DAMAGE = {  # the key that the message must name -> what happens to the tensors
    "model.layers.1.mlp.up_proj.weight": lambda w, key: w.pop(key),
    "model.layers.0.self_attn.k_proj.weight": lambda w, key: w.pop(key),
    "model.norm.weight": lambda w, key: w.pop(key),
    "lm_head.weight": lambda w, key: w.pop(key),
    "model.layers.0.self_attn.zz_proj.weight": lambda w, key: w.update({key: torch.zeros(4)}),
    "model.layers.2.mlp.up_proj.weight": lambda w, key: w.update({key: torch.zeros(56, 32)}),  # there are 2 layers
    "model.layers.0.self_attn.q_proj.bias": lambda w, key: w.update({key: torch.zeros(32)}),
    "model.layers.1.self_attn.q_proj.weight": lambda w, key: w.update({key: w[key][:24].clone()}),
    "model.layers.1.mlp.down_proj.weight": lambda w, key: w.update({key: w[key].T.contiguous()}),
    "model.embed_tokens.weight": lambda w, key: w.update({key: torch.zeros(VOCAB + 1, 32)}),
}


@pytest.mark.parametrize("key", DAMAGE)
def test_a_missing_unexpected_or_misshapen_tensor_is_refused_by_name(llama, key):
    edit_weights(llama, lambda weights: DAMAGE[key](weights, key))
    with refused(key):
        load(llama)


def test_benign_extra_tensors_are_allowed(zoo, tmp_path):
    folder = shutil.copytree(zoo("llama2_tied").folder, tmp_path / "copy")

    def add_what_old_checkpoints_carry(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        for i in range(3):
            weights[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(folder, add_what_old_checkpoints_carry)
    reference = zoo("llama2_tied").model.state_dict()
    assert all(torch.equal(value, reference[key]) for key, value in load(folder).state_dict().items())


@pytest.mark.parametrize("bytes_left", [0, 5, 600, -64])
def test_a_truncated_safetensors_file_is_refused_by_name(llama, bytes_left):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_left])
    with refused("model.safetensors"):
        load(llama)


@pytest.mark.parametrize("bytes_left", [0, 600, -64])
def test_a_truncated_bin_file_is_refused_by_name(tmp_path, bytes_left):
    folder, _ = tiny("llama2", tmp_path, binary=True)
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:bytes_left])
    with refused("pytorch_model.bin"):
        load(folder)


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), {"model.norm.weight": 3}], ids=["list", "tensor", "int"])
def test_a_bin_file_that_holds_no_named_tensors_is_refused_by_name(tmp_path, content):
    folder, _ = tiny("llama2", tmp_path, binary=True)
    torch.save(content, folder / "pytorch_model.bin")
    with refused("pytorch_model.bin"):
        load(folder)


class Payload:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_code_in_a_pickle_is_not_run(tmp_path):
    folder, _ = tiny("llama2", tmp_path / "model", binary=True)
    victim = tmp_path / "victim"
    torch.save({"model.norm.weight": Payload(str(victim))}, folder / "pytorch_model.bin")
    with refused("pytorch_model.bin"):
        load(folder)
    assert not victim.exists()


@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_a_missing_shard_or_index_is_refused_by_name(tmp_path, binary):
    folder, _ = tiny("llama2", tmp_path, sharded=True, binary=binary)
    index = next(folder.glob("*.index.json"))
    shard = json.loads(index.read_text())["weight_map"]["model.norm.weight"]

    (folder / shard).rename(folder / "away")
    with refused(shard, error=FileNotFoundError):
        load(folder)
    (folder / "away").rename(folder / shard)

    index.unlink()
    with refused(folder, "index", error=FileNotFoundError):
        load(folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": ["model.safetensors"]}', '{"weight_map": {"a": 5}}'])
def test_a_broken_index_is_refused_by_name(tmp_path, text):
    folder, _ = tiny("llama2", tmp_path, sharded=True)
    (folder / "model.safetensors.index.json").write_text(text)
    with refused("model.safetensors.index.json"):
        load(folder)


def test_files_that_the_index_does_not_name_are_not_read(zoo, tmp_path):
    """Mistral's folders carry consolidated.safetensors, LLaMA's carry original/*.pth beside the shards."""
    folder, _ = tiny("llama2", tmp_path, sharded=True)
    (folder / "consolidated.safetensors").write_bytes(b"not read")
    (folder / "pytorch_model.bin").write_bytes(b"safetensors are preferred")
    reference = zoo("llama2").model.state_dict()
    assert all(torch.equal(value, reference[key]) for key, value in load(folder).state_dict().items())


def test_one_file_counts_before_an_index_as_in_transformers(zoo, tmp_path):
    """As left by whoever merged the shards: the index is stale, and so may the shards be."""
    from transformers import AutoModelForCausalLM
    for binary in (False, True):
        folder, _ = tiny("llama2", tmp_path / str(binary), sharded=True, binary=binary, seed=1)
        whole, _ = tiny("llama2", tmp_path / f"{binary} whole", binary=binary, seed=2)
        file = whole / ("pytorch_model.bin" if binary else "model.safetensors")
        shutil.copy(file, folder)
        ours, theirs = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        assert torch.equal(ours.norm.weight, theirs.model.norm.weight)
        assert torch.equal(ours.norm.weight, load(whole).norm.weight)


def test_adapters_and_other_formats_are_refused_by_name(llama):
    (llama / "adapter_config.json").write_text("{}")
    (llama / "adapter_model.safetensors").write_bytes(b"")
    with refused("adapter_config.json", "merge it"):
        load(llama)
    (llama / "adapter_config.json").unlink()
    with edited_json(llama / "config.json") as config:
        config["transformers_weights"] = "other.safetensors"
    with refused("transformers_weights", "other.safetensors"):
        load(llama)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json",
                                  "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_named_as_such(llama, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"
    if name != "config.json":
        (llama / "model.safetensors").unlink()
    (llama / name).write_text(pointer)
    with refused(name, "Git LFS pointer", "git lfs pull"):
        load(llama)


def test_an_empty_variable_puts_no_cache_into_the_working_directory(tmp_path, monkeypatch):
    import sys
    monkeypatch.chdir(tmp_path)
    for variable in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, "")
    seen = types.SimpleNamespace(env={})
    seen.snapshot_download = lambda *args, **options: seen.env.update(os.environ) or tmp_path
    monkeypatch.setitem(sys.modules, "huggingface_hub", seen)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", types.SimpleNamespace(
        GatedRepoError=KeyError, LocalEntryNotFoundError=KeyError, RepositoryNotFoundError=KeyError))
    assert resolve_checkpoint("owner/name", weights=False) == tmp_path
    assert not {"HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"} & set(seen.env)

    import runtime
    looked_at = []
    monkeypatch.setattr(runtime, "read_json", lambda file: looked_at.append(file) or {})
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    runtime.tune(QuantLinear(32, 8, Format("int8")))
    assert looked_at == [tmp_path / "home/.cache/eagle-kernels.json"]
    monkeypatch.setattr("pathlib.Path.expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    with refused("~/model", "home directory"):
        resolve_checkpoint("~/model")


def test_missing_folder_config_or_weights_is_a_file_not_found(llama, tmp_path):
    with refused(tmp_path / "nothing", error=FileNotFoundError):
        load(tmp_path / "nothing")
    (llama / "model.safetensors").unlink()
    with refused(llama, "safetensors", error=FileNotFoundError):
        load(llama)
    (llama / "config.json").unlink()
    with refused("config.json", error=FileNotFoundError):
        load(llama)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "llama"}'])
def test_a_broken_config_json_is_refused_by_name(llama, text):
    (llama / "config.json").write_text(text)
    with refused("config.json"):
        load(llama)


def test_a_hub_id_without_network_is_refused_in_one_line(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with refused("nobody/no-such-model", error=(OSError, ValueError)):
        Transformer.from_pretrained("nobody/no-such-model", device="cpu", dtype=torch.float32)


def test_host_memory_while_loading_stays_near_one_shard(tmp_path):
    """Peak resident memory (VmHWM, which Linux lets a process reset) of loading eight shards of 32 MB."""
    try:
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
    except OSError:
        pytest.skip("needs a writable /proc/self/clear_refs")
    MB, keys = 1 << 20, dict(hidden_size=256, intermediate_size=20480 // 8 * 4, num_hidden_layers=8,
                             num_key_value_heads=4, vocab_size=128)
    (tmp_path / "config.json").write_text(json.dumps(
        BASE | keys | dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu")))
    width, shapes = keys["intermediate_size"], {"model.embed_tokens.weight": (128, 256), "model.norm.weight": (256,),
                                                "lm_head.weight": (128, 256)}
    shards = [shapes]
    for i in range(8):
        shards.append({f"model.layers.{i}.{name}.weight": shape for name, shape in {
            "input_layernorm": (256,), "post_attention_layernorm": (256,), "mlp.down_proj": (256, width),
            "mlp.gate_proj": (width, 256), "mlp.up_proj": (width, 256),
            **{f"self_attn.{p}_proj": (256, 256) for p in "qkvo"}}.items()})
    for n, shard in enumerate(shards):
        save_file({key: torch.ones(shape) for key, shape in shard.items()}, tmp_path / f"model-{n}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {key: f"model-{n}.safetensors" for n, shard in enumerate(shards) for key in shard}}))

    def resident(field):
        with open("/proc/self/status") as status:
            return int(re.search(rf"{field}:\s+(\d+) kB", status.read()).group(1)) << 10

    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = resident("VmRSS")
    model = load(tmp_path)
    extra = resident("VmHWM") - before - sum(p.nbytes for p in model.parameters())
    shard_size = (tmp_path / "model-1.safetensors").stat().st_size
    assert extra < 2 * shard_size, f"{extra / MB:.0f} MB beyond the weights; a shard has {shard_size / MB:.0f} MB"


# ---------------------------------------------------------------------------------------------------------------------
# Mixtral and Qwen3-MoE read few experts

@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "qwen3_moe_mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_router_chooses_and_weighs_as_in_transformers(zoo, monkeypatch, kind, dtype):
    """To the bit: logits in the model's dtype, their softmax in fp32. Weights add up to 1 where config.json says so."""
    router = copy.deepcopy(zoo(kind).hf.model.layers[-1].mlp.gate).to(dtype)
    ours = load(zoo(kind).folder, dtype).layers[-1].feed_forward
    x, seen = torch.randn(1, 100, 32, generator=torch.Generator().manual_seed(0)).to(dtype), []
    monkeypatch.setattr(ours, "_every_expert", lambda rows, *chosen: seen.extend(chosen) or rows)
    ours(x)
    (weights, experts), (_, their_weights, their_experts) = seen, router(x[0])
    assert torch.equal(experts, their_experts) and torch.equal(weights, their_weights.to(dtype))
    total = weights.float().sum(-1)
    assert total.max() < 0.999 if kind == "qwen3_moe_mixed" else torch.allclose(total, torch.ones(100), atol=1e-2)


def routed_experts(hf, tokens):
    """[layer][T, k]: the experts to which transformers sends each token."""
    chosen = []
    hooks = [layer.mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
             for layer in hf.model.layers]
    expected(hf, tokens)
    for hook in hooks:
        hook.remove()
    return chosen


@pytest.mark.parametrize("kind, n_active", [("mixtral", 2), ("qwen3_moe", 3)])
def test_one_token_reads_only_its_routed_experts(zoo, tmp_path, kind, n_active):
    """Every other expert is NaN in the checkpoint; zero times NaN would reach the logits."""
    z = zoo(kind)
    for token in (5, 50, 90):
        folder = shutil.copytree(z.folder, tmp_path / str(token))
        routed = [set(experts.flatten().tolist()) for experts in routed_experts(z.hf, [token])]
        assert all(len(experts) == n_active for experts in routed)

        def poison(weights):
            for key in weights:
                found = re.search(r"layers\.(\d+)\..*\.experts\.(\d+)", key)
                if found and int(found[2]) not in routed[int(found[1])]:
                    weights[key].fill_(float("nan"))

        edit_weights(folder, poison)
        model = load(folder)
        model.setup_caches(1, SLOTS)
        assert_equal_outputs(feed(model, [token]), expected(z.hf, [token]))


class ExpertReads(TorchDispatchMode):
    """Counts the elements of expert weights read by each operation that is not a view, however they are stored.

    Expert weights are the parameters with the width of an expert in their shape. Indexing reads what it returns.
    """

    def __init__(self, model):
        super().__init__()
        sizes = {model.config.expert_size, 2 * model.config.expert_size}
        weights = [p for p in model.parameters() if sizes & set(p.shape)]
        self.storages = {p.untyped_storage().data_ptr() for p in weights}
        self.total = sum(p.numel() for p in weights)
        self.read = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        weights = [x for x in tensors if x.untyped_storage().data_ptr() in self.storages]
        outs = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        is_view = any(x.untyped_storage().data_ptr() in self.storages for x in outs)
        gathers = func.overloadpacket.__name__ in ("index", "index_select", "gather", "embedding")
        if weights and not is_view:
            self.read += outs[0].numel() if gathers else sum(x.numel() for x in weights)
        return out


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (1, 6), (2, 7), (1, 26), (3, 1), (3, 50), (1, 150)], ids=str)
@pytest.mark.parametrize("kind, n_active", [("mixtral", 2), ("qwen3_moe", 3)])
def test_a_pass_reads_each_expert_at_most_once_and_one_token_reads_its_own(zoo, shape, kind, n_active):
    """Reads per pass in whole experts, of 8: k for one token, at most k T below k T = 8, at most 8 from there on."""
    z, (B, T) = zoo(kind), shape
    z.model.setup_caches(B, max(T, SLOTS))
    tokens = torch.tensor([tokens_of(T, seed=b) for b in range(B)])
    with ExpertReads(z.model) as count:
        logits, features = z.model(tokens, torch.arange(T))
    assert 0 < count.read <= count.total * min(n_active * B * T, 8) // 8
    for b in range(B):
        assert_equal_outputs((logits[b], features[b]), expected(z.hf, tokens[b].tolist()))
