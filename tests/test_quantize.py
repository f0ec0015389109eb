"""Quantised weights: the format, the products, folders, GPTQ, and decoding on a quantised target."""
import datetime
import itertools
import json
import operator
import os
import shutil
import subprocess
import sys
import types
import weakref
from collections import defaultdict
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import library

import quantize
import linears
import runtime
from generate import generate
from checkpoint import iterate_weights
from model import Transformer, _hf_targets
from grid import LEVELS, Format, agreed, dequantize, fit_grid, pack, round_to_nearest, unpack
from linears import QuantLinear, quantize_in_place
from runtime import tune
from tokenizer import Tokenizer
from train_data import read_dialogues
from reference import (VOCAB, assert_close, assert_near_greedy, edited_json, naive_decode, tiny, tokens_of,
                       write_checkpoint)
from test_eagle_lossless import PartlyRightHead, head_of

FORMATS = [Format("int8"), Format("int4", 32), Format("int4", 64)]
ROWS = [1, 2, 3, 7, 8, 16, 26, 33, 60, 64, 65]
# Rows that groups of 32 and 64 divide.
WIDE = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4)


@pytest.fixture(autouse=True)
def kernel_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*argv):
    return quantize.main(quantize.parse_args([str(a) for a in argv]))


def quantized_folder(kind, tmp_path, *options, **overrides):
    """(16-bit folder, quantised folder) of a tiny model."""
    folder, _ = tiny(kind, tmp_path / kind, **WIDE | overrides)
    out = tmp_path / f"{kind}-q"
    assert run("--checkpoint", folder, "--out", out, "--device", "cpu", *options) == 0
    return folder, out


def dense_twin(folder, out):
    """The 16-bit model with the dequantised values of `out`: the reference for every product."""
    stored = {key: tensor for key, tensor, _ in iterate_weights(out)}
    model = Transformer.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    weights = {key: dequantize(tensor, stored[key[:-6] + "scales"].float(), stored.get(key[:-6] + "zeros"))
               if key[:-6] + "scales" in stored else tensor
               for key, tensor in stored.items() if key.endswith("weight")}
    # A quantised LM head is never tied.
    model.output.weight = torch.nn.Parameter(model.output.weight.clone(), requires_grad=False)
    targets = _hf_targets(model) | {"lm_head.weight": model.output.weight}
    for key, tensor in weights.items():
        targets[key].copy_(tensor)
    if "lm_head.weight" not in weights:
        model.output.weight = model.tok_embeddings.weight
    return model


# Numbers


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_pack_then_unpack_gives_every_level_back(format):
    low, high = LEVELS[format.mode]
    q = torch.randint(low, high + 1, (5, 128))
    q[0, :2] = torch.tensor([low, high])
    stored = pack(q.float(), torch.ones(5, 1), torch.zeros(5, 1), format.mode)
    assert torch.equal(unpack(stored["weight"]).long(), q)
    assert stored["weight"].shape == (5, 128 if format.mode == "int8" else 64)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rounding_is_off_by_half_a_step_at_most(format):
    weight = torch.randn(24, 128)
    stored = round_to_nearest(weight, format)
    groups = (weight - dequantize(stored["weight"], stored["scales"].float(), stored.get("zeros"))).unflatten(
        1, (stored["scales"].shape[1], -1))
    # bfloat16 scale and zero are off by 2^-9 each, of up to 8 scales' worth of zero and, at the ends, of 15 steps.
    steps = (groups.abs() / stored["scales"].float()[..., None]).max()
    assert steps <= (0.5 + 127 / 512 if format.mode == "int8" else 0.6)


def test_a_constant_group_survives():
    weight = torch.full((2, 64), 0.125)
    stored = round_to_nearest(weight, Format("int4", 32))
    assert torch.equal(dequantize(stored["weight"], stored["scales"].float(), stored["zeros"]), weight)


@pytest.mark.parametrize("format, shape", [*itertools.product(FORMATS, [(48, 64), (33, 192), (128, 640)]),
                                           (FORMATS[0], (64, 40)), (FORMATS[0], (7, 9))], ids=str)
def test_products_equal_float64_for_every_number_of_rows(format, shape):
    weight = torch.randn(shape)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        linear = QuantLinear.from_weight(weight.to(dtype), format, torch.randn(shape[0]).to(dtype))
        exact = dequantize(linear.q, linear.scales.double(), linear.zeros).T
        for rows in ROWS:
            x = torch.randn(1, rows, shape[1], dtype=dtype)
            theirs = x.double() @ exact + linear.bias.double()
            spaced = torch.cat((x, x), -1)[..., :shape[1]]  # not contiguous, as PackedRMSNorm's rows
            for name in runtime.candidates(linear, rows):
                assert_close(linear.product(name, x).double(), theirs, tolerance)
                assert_close(linear.product(name, spaced).double(), theirs, tolerance)


@pytest.mark.parametrize("format", [Format("int8", 32), Format("int8", 32, int8_zeros=True),
                                    Format("int8", int8_zeros=True), Format("int4", 32, reordered=True),
                                    Format("int8", reordered=True)], ids=str)
def test_products_over_the_grids_of_other_tools_equal_float64(format):
    """Zero points and groups of int8, and columns in an order of their own."""
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        linear = QuantLinear(64, 48, format)
        for kind, tensor in linear.stored().items():
            if kind == "weight":
                tensor.random_(256) if format.mode == "int4" else tensor.random_(-128, 128)
            else:
                tensor.copy_(torch.randperm(64) if kind == "order" else torch.randn(tensor.shape))
        linear.to(dtype)
        q = unpack(linear.q).double().unflatten(1, (linear.scales.shape[1], -1))
        zeros = torch.zeros_like(linear.scales) if linear.zeros is None else linear.zeros
        weight = q * linear.scales[..., None].double() + zeros[..., None].double()
        exact = torch.empty(48, 64, dtype=torch.double)
        exact[:, torch.arange(64) if linear.order is None else linear.order] = weight.flatten(1)
        assert_close(linear.weight.double(), exact, tolerance)
        assert torch.equal(linear.rows(torch.tensor([5, 1])).weight, linear.weight[[5, 1]])
        for rows in (1, 3, 65):
            x = torch.randn(1, rows, 64, dtype=dtype)
            for name in runtime.candidates(linear, rows):
                assert_close(linear.product(name, x).double(), x.double() @ exact.T, tolerance)


def test_each_linear_has_a_format_of_its_own_where_its_parts_agree(tmp_path):
    folder, _ = tiny("gqa", tmp_path / "m", **WIDE)
    names = [key.removesuffix(".weight") for key, tensor, _ in iterate_weights(folder) if tensor.dim() == 2]
    first, second = "model.layers.0.", "model.layers.1."
    int4, int8 = Format("int4", 32), Format("int8", 32)
    formats = {name: int4 for name in names if name.startswith(first)} | {first + "self_attn.k_proj": int8}
    formats |= {second + "mlp.up_proj": int4, second + "mlp.gate_proj": int4, second + "self_attn.q_proj": int4,
                second + "mlp.down_proj": int8, "lm_head": int8}
    with torch.device("meta"):
        model = Transformer(Transformer.from_pretrained(folder).config)
        linears.install_parts(model, agreed(formats, [*names, "lm_head"]))
    assert {name: module.format for name, module in model.named_modules() if isinstance(module, QuantLinear)} == {
        "layers.0.attention.wo": int4, "layers.0.feed_forward.w13": int4, "layers.0.feed_forward.w2": int4,
        "layers.1.feed_forward.w13": int4, "layers.1.feed_forward.w2": int8, "output": int8}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_triton_kernel_equals_float64_for_every_number_of_rows(device):
    """On a CPU in Triton's interpreter, in a process of its own: Triton reads the variable when it is imported."""
    # The interpreter of 3.6 fails with numpy 2.4.
    pytest.importorskip("triton", minversion="3.7" if device == "cpu" else None)
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"}
    environment |= {"TRITON_INTERPRET": "1"} if device == "cpu" else {}
    subprocess.run([sys.executable, "-c", f"from test_quantize import check_triton; check_triton({device!r})"],
                   env=environment, check=True)


def check_triton(device):
    from linears_triton import quant_matmul
    if device == "cpu":
        multiply_bfloat16_in_triton_s_interpreter()
    torch.manual_seed(0)
    # 11 numbers of rows, 12 kernels: over all cases each number comes with each kernel.
    rows = itertools.cycle([1, 2, 3, 15, 16, 17, 31, 33, 60, 63, 64])
    formats, shapes = [*FORMATS, Format("int4", 128)], [(40, 128), (33, 384), (40, 96), (130, 100)]
    for format, shape, dtype in itertools.product(formats, shapes, (torch.float16, torch.bfloat16)):
        N, K = shape
        if K % (format.group_size or 1):
            continue
        linear = QuantLinear.from_weight(torch.randn(shape).to(dtype), format).to(device)
        for name, tensor in linear.stored().items():
            if name != "weight":    # NaN behind the scales and zeros, which must not be read
                setattr(linear, name, torch.cat((tensor, torch.full_like(tensor, torch.nan)))[:N])
        exact = dequantize(*linear.parts()).double().T
        for (block_n, split_k), M in zip(itertools.product((32, 64, 128), (1, 2, 4, 8)), rows):
            x = torch.randn(M, 2 * K, device=device).to(dtype)[:, :K]
            sums = quant_matmul(x, *linear.parts(), block_n, split_k)
            assert sums.shape == (split_k, M, N) and sums.dtype == torch.float32
            truncates = device == "cpu" and dtype == torch.bfloat16     # the interpreter does, where a GPU rounds
            assert_close(sums.sum(0).double(), x.double() @ exact, 1e-2 if truncates else 1e-4)
        ours = linear.product("triton 32 2", x[None])
        assert ours.dtype == dtype
        assert_close(ours[0].double(), x.double() @ exact, 1e-2)
    library.opcheck(quant_matmul, (x, *linear.parts(), 32, 2))


def multiply_bfloat16_in_triton_s_interpreter():
    """Without this, the interpreter multiplies the bits of bfloat16 as whole numbers (triton issue 11584)."""
    from triton import language
    from triton.runtime.interpreter import InterpreterBuilder
    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (self.cast_impl(t, language.float32) if t.dtype.scalar == language.bfloat16 else t for t in (a, b))
        return dot(self, a, b, *rest)
    InterpreterBuilder.create_dot = create_dot


def test_rows_of_a_linear_are_its_rows():
    linear = QuantLinear.from_weight(torch.randn(48, 64), Format("int4", 32))
    index = torch.tensor([40, 3, 17])
    assert torch.equal(linear.rows(index).weight, linear.weight[index])


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_compiled_linear_is_one_graph():
    """With each kernel, and without oneDNN's operators, which inductor knows only in graphs that it makes itself."""
    graphs = []
    cases = [(torch.float32, "dense"), *((torch.bfloat16, name) for name in ("dense", "packed", "reduction"))]
    for dtype, name in cases:
        x = torch.randn(1, 1 if name == "reduction" else 3, 64)
        linear = QuantLinear.from_weight(torch.randn(48, 64).to(dtype), Format("int4", 32))
        linear.kernels = dict.fromkeys(linears.ROWS, name)
        eager = "packed" if name == "packed" else "dense"
        linear.lay_out({eager})
        with torch.inference_mode():
            compiled = torch.compile(linear, fullgraph=True,
                                     backend=lambda graph, _: graphs.append(graph.code) or graph)
            assert_close(compiled(x.to(dtype)), linear.product(eager, x.to(dtype)), 1e-2)
    assert len(graphs) == 4 and not any("mkldnn" in code for code in graphs)


def test_a_kernel_that_does_not_run_is_left_out(monkeypatch, capsys):
    linear = QuantLinear.from_weight(torch.randn(48, 64).bfloat16(), Format("int4", 32))
    for others, best in ((["packed"], "packed"), ([], "dense")):
        monkeypatch.setattr(runtime, "candidates", lambda module, rows: ["triton 32 1", "triton 32 2", *others])
        tune(linear, cache=Path("/dev/null"))
        assert set(linear.kernels.values()) == {best}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 * len(linears.ROWS)
    assert lines[0].startswith("kernel 'triton 32 1' does not run here (1 x (48, 64)): ")


def test_as_many_weights_take_turns_as_no_cache_holds(monkeypatch):
    linears = [QuantLinear.from_weight(torch.randn(48, 64), Format("int4", 32)) for _ in range(5)]
    turns = []
    monkeypatch.setattr(runtime, "COLD", 3 * 48 * 64 // 2)
    monkeypatch.setattr(runtime, "_run", lambda modules, *rest: turns.append(len(modules)))
    runtime.fastest(linears, ["dense"], 1)
    assert set(turns) == {3}


def test_a_block_takes_the_kernel_of_the_next_larger_number_of_rows(monkeypatch):
    linear = QuantLinear.from_weight(torch.randn(48, 64), Format("int4", 32))
    linear.kernels = {rows: str(rows) for rows in linears.ROWS}
    monkeypatch.setattr(QuantLinear, "product", lambda self, name, x, expert: name)
    wanted = {1: "1", 2: "2", 3: "4", 5: "8", 8: "8", 9: "16", 26: "32", 33: "64", 60: "64", 65: "64", 512: "64"}
    assert {rows: linear(torch.ones(1, rows, 64)) for rows in wanted} == wanted
    assert linear(torch.ones(3, 11, 64)) == "64"       # all rows of a batch count


def test_tune_measures_once_and_keeps_what_it_found(tmp_path, monkeypatch):
    linear = QuantLinear.from_weight(torch.randn(48, 64).bfloat16(), Format("int4", 32))
    calls = []
    monkeypatch.setattr(runtime, "fastest", lambda modules, names, rows: calls.append(rows) or names[rows % 2])
    tune(linear)
    assert calls == list(linears.ROWS) and linear.kernels[1] == "packed" and linear.kernels[64] == "dense"
    again = QuantLinear.from_weight(torch.randn(48, 64).bfloat16(), Format("int4", 32))
    tune(again)
    assert calls == list(linears.ROWS) and again.kernels == linear.kernels
    file = tmp_path / "cache/eagle-kernels.json"
    file.write_text("{broken")
    tune(again)
    assert len(calls) == 2 * len(linears.ROWS)
    tune(again)
    assert len(calls) == 2 * len(linears.ROWS)    # the file is valid again
    file.unlink()
    with monkeypatch.context() as rank:
        rank.setattr(torch.distributed, "is_initialized", lambda: True)
        rank.setattr(torch.distributed, "get_rank", lambda: 1)
        rank.setattr(torch.distributed, "broadcast_object_list",
                     lambda chosen: chosen[0].update(dict.fromkeys(chosen[0], "dense")))
        tune(again)
    assert not file.exists() and set(again.kernels.values()) == {"dense"}      # what rank 0 found
    file.mkdir()    # a folder cannot be read
    tune(again)
    monkeypatch.setenv("XDG_CACHE_HOME", "~nobody-of-this-name/cache")     # no home
    tune(again)
    assert len(calls) == 5 * len(linears.ROWS) and again.kernels == linear.kernels


# GPTQ


def written_out_gptq(weight, hessian, size):
    """One column after the other, all later ones corrected by the exact conditional minimum [GPTQ, section 3]."""
    w, q = weight.clone(), torch.zeros_like(weight)
    for j in range(w.shape[1]):
        if j % size == 0:
            scale, zero = fit_grid(w[:, j:j + size].float(), "int4")
            scale, zero = scale.double(), zero.double()
        q[:, j] = ((w[:, j] - zero) / scale).round().clamp(-8, 7) * scale + zero
        error, rest = w[:, j] - q[:, j], hessian[j + 1:, j + 1:]
        if len(rest):   # the best change of the later columns, given the error in this one
            w[:, j + 1:] += error[:, None] * torch.linalg.solve(rest, hessian[j + 1:, j])
    return q


def correlated(K, n=512):
    mix = torch.randn(K, K, dtype=torch.double) / K ** 0.5 + torch.eye(K, dtype=torch.double)
    return torch.randn(n, K, dtype=torch.double) @ mix


def test_gptq_equals_the_written_out_algorithm_in_float64():
    x, weight = correlated(192), torch.randn(12, 192, dtype=torch.double)   # more columns than a block of gptq
    hessian = x.T @ x
    stored = quantize.gptq(weight, hessian, Format("int4", 32), damping=0.0)
    ours = dequantize(stored["weight"], stored["scales"].double(), stored["zeros"])
    assert_close(ours, written_out_gptq(weight, hessian, 32), 1e-6)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gptq_has_a_smaller_output_error_than_rounding(format, act_order):
    x, weight = correlated(128), torch.randn(32, 128)
    hessian = (x.T @ x).float()
    hessian[5] = hessian[:, 5] = 0      # an input that is never active
    x[:, 5] = 0
    error = lambda s: (x @ (dequantize(s["weight"], s["scales"].double(), s.get("zeros")) - weight).T).norm()
    assert error(quantize.gptq(weight, hessian, format, act_order)) < 0.8 * error(round_to_nearest(weight, format))


def test_gptq_damps_more_where_a_hessian_needs_it_and_refuses_one_that_nothing_helps():
    weight, format = torch.randn(8, 32), Format("int4", 32)
    for lowest in (-0.05, -0.5):    # one eigenvalue, the others are 1: 0.01 of damping is too little, for -0.5 0.1 too
        v = torch.nn.functional.normalize(torch.randn(32), dim=0)
        stored = quantize.gptq(weight, torch.eye(32) - (1 - lowest) * v[:, None] * v, format)
        assert_close(dequantize(stored["weight"], stored["scales"].float(), stored["zeros"]), weight, 0.5)
    with pytest.raises(ValueError, match="^fc.weight: GPTQ cannot invert"):
        quantize.quantize_weight("fc.weight", weight, format, {"fc": torch.full((32, 32), torch.nan)}, act_order=True)


# Folders


@pytest.mark.parametrize("options", [("--mode", "int8"), ("--mode", "int4"), ("--mode", "int4", "--lm-head", "int8"),
                                     ("--mode", "int8", "--lm-head", "int4")], ids=str)
@pytest.mark.parametrize("kind", ["gqa", "qwen2_tied", "qwen3", "mixtral", "qwen3_moe", "qwen3_moe_mixed"])
def test_a_folder_loads_as_the_values_it_stores(kind, options, tmp_path):
    folder, out = quantized_folder(kind, tmp_path, *options)
    model, twin = Transformer.from_pretrained(out, dtype=torch.float32), dense_twin(folder, out)
    assert isinstance(model.output, QuantLinear) == ("--lm-head" in options)
    for n in (1, 3, 24, 140):   # each number runs experts in another way
        tokens = torch.tensor([tokens_of(n)])
        assert_close(model(tokens, torch.arange(n))[0], twin(tokens, torch.arange(n))[0], 1e-5)
    stored = {key: tensor for key, tensor, _ in iterate_weights(out)}
    plain = {key: tensor for key, tensor, _ in iterate_weights(folder)}
    kept = [key for key in plain if any(part in key for part in ("norm", "embed", "bias", ".gate.weight"))]
    assert all(torch.equal(stored[key], plain[key]) for key in kept)
    linears = [key for key in plain if "layers." in key and key not in kept]
    assert linears and all(key[:-6] + "scales" in stored for key in linears)


@pytest.mark.parametrize("mode, bound", [("int8", 0.02), ("int4", 0.25)])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_quantised_experts_are_near_the_16_bit_ones(kind, mode, bound, tmp_path):
    folder, out = quantized_folder(kind, tmp_path, "--mode", mode)
    for dtype, rounding in ((torch.float32, 0), (torch.bfloat16, 0.02)):
        ours, exact = (Transformer.from_pretrained(f, dtype=dtype).layers[0].feed_forward for f in (out, folder))
        for n in (1, 3, 24, 140):   # one expert gets all rows or none; packed kernels or the dense product
            x = torch.randn(1, n, 64).to(dtype)
            difference = (ours(x) - exact(x)).float().norm(dim=-1) / exact(x).float().norm(dim=-1)
            assert difference.max() < bound + rounding  # routers keep 16 bits, so the same experts are chosen


@pytest.mark.parametrize("kind", ["gqa", "qwen2", "mixtral", "qwen3_moe", "qwen3_moe_mixed"])
def test_gptq_folder_is_nearer_to_the_model_than_rounding(kind, tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "tok")
    if kind != "gqa":
        vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
        tiny(kind, tmp_path / kind, **WIDE, vocab_size=vocab)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / kind / name).write_bytes((folder / name).read_bytes())
        folder = tmp_path / kind
    else:
        tiny(kind, folder, **WIDE, vocab_size=json.loads((folder / "config.json").read_text())["vocab_size"])
    data = tmp_path / "data.jsonl"
    write_dialogues(data, 24)
    errors = {}
    tokens = torch.tensor([Tokenizer.from_pretrained(folder).encode("the lazy dog sleeps over other dogs and a fox")])
    pos = torch.arange(tokens.shape[1])
    exact = Transformer.from_pretrained(folder, dtype=torch.float32)(tokens, pos)[0]
    for method, options in (("rtn", ()), ("gptq", ("--data", data))):
        out = tmp_path / method
        options += ("--mode", "int4", "--method", method, "--device", "cpu")
        assert run("--checkpoint", folder, "--out", out, *options) == 0
        ours = Transformer.from_pretrained(out, dtype=torch.float32)(tokens, pos)[0]
        errors[method] = (ours - exact).norm().item()
    assert errors["gptq"] < errors["rtn"]
    if n_active := {"mixtral": 2, "qwen3_moe": 3}.get(kind):    # routers that never choose the last experts
        weights = load_file(folder / "model.safetensors")
        for key in weights:
            if key.endswith((".block_sparse_moe.gate.weight", ".mlp.gate.weight")):
                weights[key] = weights[key][:1] * torch.tensor([1, -1, 0.9, -0.9, 0.8, -0.8, 0.1, 0.1])[:, None]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        options = ("--mode", "int4", "--method", "gptq", "--data", data)
        assert run("--checkpoint", folder, "--out", tmp_path / "idle", *options) == 0
        idle = ", ".join(f"{name}.{e}" for name in ("w13", "w2") for e in range(2 * n_active, 8))
        assert f"model.layers.0.: no token reached {idle} with" in capsys.readouterr().err
    else:
        assert "no token reached" not in capsys.readouterr().err


@pytest.mark.parametrize("kind, n_active", [("mixtral", 2), ("qwen3_moe", 3)])
def test_calibration_sums_over_all_dialogues_through_the_quantised_layers_before_and_by_the_routers_choice(
        sound, tmp_path, monkeypatch, kind, n_active):
    tokens_from, data = sound
    folder, out = tmp_path / kind, tmp_path / "q"
    config = json.loads((tokens_from / "config.json").read_text())
    tiny(kind, folder, **WIDE, vocab_size=config["vocab_size"], eos_token_id=config["eos_token_id"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokens_from / name, folder)
    found, hessians = {}, quantize.Calibration.hessians
    monkeypatch.setattr(quantize.Calibration, "hessians", lambda self, unit, tensors:
                        found.setdefault(unit, hessians(self, unit, tensors)))
    assert run("--checkpoint", folder, "--out", out, "--device", "cpu", *GPTQ, data) == 0

    dialogues = read_dialogues(data, Tokenizer.from_pretrained(folder), config["vocab_size"], 512)
    model, quantised = (Transformer.from_pretrained(f, dtype=torch.float32) for f in (folder, out))
    assert len(dialogues) == 4
    for i, layer in enumerate(model.layers):
        inputs = defaultdict(list)
        parts = {"wqkv": layer.attention.wqkv, "wo": layer.attention.wo, "experts": layer.feed_forward}
        for name, module in parts.items():
            module.register_forward_pre_hook(lambda _, x, name=name: inputs[name].append(x[0].flatten(0, 1)))
        for dialogue in dialogues:
            model(dialogue.tokens[None].long(), torch.arange(len(dialogue.tokens)))
        rows = {name: torch.cat(parts) for name, parts in inputs.items()}
        x, ffn = rows.pop("experts"), layer.feed_forward
        chosen = ffn.gate(x).topk(n_active).indices
        for e in range(8):
            to_e = x[(chosen == e).any(1)]
            gate, up = (to_e @ ffn.w13[e].T).chunk(2, -1)
            rows |= {f"w13.{e}": to_e, f"w2.{e}": torch.nn.functional.silu(gate) * up} if len(to_e) else {}
        assert found[f"model.layers.{i}."].keys() - {"gate"} == rows.keys()
        for name, x in rows.items():
            assert_close(found[f"model.layers.{i}."][name], x.T @ x, 1e-4)
        model.layers[i] = quantised.layers[i]


# Broken numbers


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """(folder, file of dialogues) of a tiny model with a tokenizer."""
    folder = write_checkpoint(tmp_path_factory.mktemp("sound") / "m")
    tiny("gqa", folder, **WIDE, vocab_size=json.loads((folder / "config.json").read_text())["vocab_size"])
    return folder, write_dialogues(folder.parent / "data.jsonl", 4)


def write_dialogues(file, n):
    words = "the quick brown fox jumps over a lazy dog and then other dogs sleep for rest of day".split()
    shuffled = lambda: " ".join(words[i] for i in torch.randint(len(words), (12,)).tolist())
    chats = [[{"role": role, "content": shuffled()} for role in ("user", "assistant")] for _ in range(n)]
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return file


def spoiled(folder, copy, change):
    """A copy of a checkpoint in which change(weights) has edited the tensors."""
    shutil.copytree(folder, copy)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    return copy


GPTQ = ("--mode", "int4", "--method", "gptq", "--data")


@pytest.mark.parametrize("key, value, options", [
    ("model.layers.1.mlp.up_proj.weight", "nan", ("--mode", "int8")),
    ("model.layers.0.self_attn.q_proj.weight", "inf", ("--mode", "int4")),
    ("model.layers.1.mlp.down_proj.weight", "3e38", ("--mode", "int4")),
    ("model.layers.1.mlp.up_proj.weight", "nan", GPTQ),
    ("model.embed_tokens.weight", "nan", GPTQ),
    ("model.norm.weight", "-inf", ("--mode", "int8")),
    ("lm_head.weight", "-inf", ("--mode", "int8", "--lm-head", "int8")),
    ("model.layers.0.mlp.down_proj.weight", "-3e38", GPTQ),
    ("fc.weight", "nan", ("--mode", "int8")),
    ("layers.0.post_attention_layernorm.weight", "inf", ("--mode", "int4"))])
def test_weights_that_are_not_finite_are_refused_by_name_and_nothing_is_written(
        sound, key, value, options, tmp_path, capsys):
    folder, data = sound
    if not key.startswith(("model", "lm_head")):
        folder = random_head(tmp_path / "head", Transformer.from_pretrained(folder))
    folder = spoiled(folder, tmp_path / "m", lambda weights: weights[key].view(-1)[3].fill_(float(value)))
    options += (data,) if options is GPTQ else ()
    assert run("--checkpoint", folder, "--out", tmp_path / "q", "--device", "cpu", *options) == 2
    line = capsys.readouterr().err.split("\n")[-2]
    assert line.startswith(f"error: {key} holds ") and "not finite" in line and not list(tmp_path.glob("q*"))


def test_a_loaded_weight_that_is_not_finite_is_refused():
    for format in FORMATS:
        head = torch.nn.ModuleDict({"fc": torch.nn.Linear(64, 8)})
        head["fc"].weight.data[3, 40] = torch.nan
        with pytest.raises(ValueError, match=r"a weight of shape \[8, 64\] holds values that are not finite"):
            quantize_in_place(head, format)


@pytest.mark.parametrize("dtype, advice", [("float16", "try --dtype bfloat16 or float32"),
                                           ("float32", "its weights are broken")])
def test_a_perplexity_that_is_not_finite_is_refused(sound, dtype, advice, tmp_path, capsys):
    """In fp16 the logits overflow; in fp32 they do not, but the perplexity is e to the power of thousands."""
    grow = lambda weights: weights["model.norm.weight"].mul_(1e6)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog.")
    folder = spoiled(sound[0], tmp_path / "m", grow)
    assert run("--checkpoint", folder, "--eval", text, "--dtype", dtype, "--device", "cpu") == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"error: the perplexity is not finite in {dtype}: {advice}\n"


def test_an_eval_text_is_read_with_or_without_a_byte_order_mark(sound, tmp_path, capsys):
    text, found = tmp_path / "text.txt", []
    for mark in (b"", b"\xef\xbb\xbf"):
        text.write_bytes(mark + b"The quick brown fox jumps over the lazy dog.")
        assert run("--checkpoint", sound[0], "--eval", text, "--dtype", "float32") == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] and "perplexity" in found[0]
    text.write_bytes(b"caf\xe9")
    assert run("--checkpoint", sound[0], "--eval", text, "--mode", "int8", "--out", tmp_path / "q") == 2
    assert "is not UTF-8 text: byte 3" in capsys.readouterr().err and not list(tmp_path.glob("q*"))


def test_gptq_rounds_to_nearest_what_gets_nothing_but_zeros(sound, tmp_path, capsys):
    folder, data = sound

    def silence(weights):
        weights["model.layers.0.input_layernorm.weight"].zero_()    # so wo's inputs are zero too
        weights["model.layers.1.mlp.gate_proj.weight"].zero_()
    folder = spoiled(folder, tmp_path / "m", silence)
    assert run("--checkpoint", folder, "--out", tmp_path / "q", "--device", "cpu", *GPTQ, data) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "rounded" in line] == [
        "model.layers.0.: no token reached wo, wqkv with anything but zeros: rounded to nearest",
        "model.layers.1.: no token reached w2 with anything but zeros: rounded to nearest"]
    key, stored = "model.layers.1.mlp.down_proj.", {key: tensor for key, tensor, _ in iterate_weights(tmp_path / "q")}
    nearest = round_to_nearest(load_file(folder / "model.safetensors")[key + "weight"], Format("int4", 32))
    assert all(torch.equal(stored[key + kind], tensor) for kind, tensor in nearest.items())


# Interruptions and refusals


def test_an_interrupted_run_is_never_loadable_and_goes_on(tmp_path, monkeypatch, capsys):
    folder, whole = quantized_folder("gqa", tmp_path, "--mode", "int4", num_hidden_layers=3)
    out, part = tmp_path / "again", tmp_path / "again.part"
    again = lambda mode="int4": run("--checkpoint", folder, "--out", out, "--mode", mode)
    stop, written = "model-layer-002.part", []

    def killable(write):
        def killed(*args, **options):
            write(*args, **options)
            written.append([arg for arg in args if isinstance(arg, Path)][-1].name)
            if written[-1] == stop:
                raise KeyboardInterrupt
        return killed
    for name in ("save_file", "write_atomically", "shutil.copyfile"):
        monkeypatch.setattr(f"quantize.{name}", killable(operator.attrgetter(name)(quantize)))

    assert again() == 130
    assert not out.exists() and len(list(part.glob("*.safetensors"))) == 2
    with pytest.raises((FileNotFoundError, ValueError)):
        Transformer.from_pretrained(part)
    assert again("int8") == 2 and "other settings" in capsys.readouterr().err
    source = folder / "model.safetensors"
    content, times = source.read_bytes(), (source.stat().st_atime_ns, source.stat().st_mtime_ns)
    source.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(source, ns=times)      # name, size and time are as before
    assert again() == 2 and "other weights" in capsys.readouterr().err
    source.write_bytes(content)     # only the time differs now, as in a copy: the run goes on
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "save_file", partial(raise_, SafetensorError("I/O error: No space left on device")))
        assert again() == 2 and capsys.readouterr().err.endswith("error: I/O error: No space left on device\n")
    for name in ("model.safetensors.index.json", "quantize.json", "config.json"):
        stop = name
        assert again() == 130 and not out.exists()
    stop = None
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", partial(raise_, KeyboardInterrupt))
        assert again() == 130 and not out.exists()
    assert again() == 0 and not part.exists() and not (out / "settings.json").exists()
    shards = [name for name in written if name.endswith(".part")]
    once_each = [file.stem + ".part" for file in whole.glob("*.safetensors")]
    assert sorted(shards) == sorted([*once_each, "model-layer-002.part"])
    for file in whole.glob("*.safetensors"):
        ours, theirs = load_file(out / file.name), load_file(file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_resumed_calibration_keeps_its_date_and_is_bound_to_its_tokens_and_config(
        sound, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(sound[0], tmp_path / "m")
    with edited_json(folder / "tokenizer_config.json") as config:
        config["chat_template"] = "{{ strftime_now('%d') }}{{ greeting }}" + config["chat_template"]

    def quantise_on(day, out, *options, stop=False):
        class Clock(datetime.datetime):
            now = classmethod(lambda cls, zone=None: cls(2026, 11, day, tzinfo=zone))
        save = lambda tensors, file, **options: (raise_(KeyboardInterrupt) if stop and "001" in file.name
                                                 else save_file(tensors, file, **options))
        with monkeypatch.context() as patch:
            patch.setattr(quantize, "datetime", types.SimpleNamespace(datetime=Clock))
            patch.setattr(quantize, "save_file", save)
            return run("--checkpoint", folder, "--out", tmp_path / out, "--device", "cpu", *GPTQ, sound[1], *options)
    assert quantise_on(26, "whole") == 0 and quantise_on(27, "other") == 0
    assert quantise_on(26, "q", stop=True) == 130 and (tmp_path / "q.part/model-layer-000.safetensors").exists()
    capsys.readouterr()
    for file, change in (("tokenizer_config.json", lambda c: c.update(chat_template="New: " + c["chat_template"])),
                         ("config.json", lambda c: c.update(rms_norm_eps=1e-5))):
        before = (folder / file).read_text()
        with edited_json(folder / file) as config:
            change(config)
        assert quantise_on(26, "q") == 2
        assert "other weights or other calibration tokens: finish it" in capsys.readouterr().err
        (folder / file).write_text(before)
    assert quantise_on(26, "q", "--template-args", '{"greeting": "Hi"}') == 2
    assert quantise_on(27, "q") == 0
    whole, other, ours = ({key: t for key, t, _ in iterate_weights(tmp_path / out)} for out in ("whole", "other", "q"))
    assert all(torch.equal(ours[key], whole[key]) for key in whole)
    assert not all(torch.equal(other[key], whole[key]) for key in whole)
    assert json.loads((tmp_path / "q/quantize.json").read_text())["calibration"]["date"].startswith("2026-11-26")


def raise_(error, *args, **options):
    raise error


@pytest.mark.parametrize("argv, message", [
    (("--mode", "int4", "--group-size", "128"), "group size 128 does not divide a row of 64 weights: 32 or 64 does"),
    (("--mode", "int8", "--group-size", "32"), "--group-size is for int4"),
    (("--mode", "int4", "--method", "gptq"), "needs --data"),
    (("--mode", "int4", "--method", "gptq", "--data", "nowhere"), "no such file"),
    (("--mode", "int4", "--group-size", "128", "--method", "gptq", "--data", __file__),
     "group size 128 does not divide"),
    (("--mode", "int4", "--method", "gptq", "--data", __file__), "tokenizer"),
    (("--mode", "int4", "--template-args", '{"greeting": "Hi"}'), "for --method gptq"),
])
def test_refusals_are_one_line(argv, message, tmp_path, capsys):
    folder, _ = tiny("gqa", tmp_path / "m", **WIDE)
    assert run("--checkpoint", folder, "--out", tmp_path / "q", *argv) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith("error: ") and message in line and not list(tmp_path.glob("q*"))


def test_a_quantised_folder_is_refused_and_so_is_an_existing_one(tmp_path, capsys):
    folder, out = quantized_folder("gqa", tmp_path, "--mode", "int8")
    assert run("--checkpoint", out, "--out", tmp_path / "twice", "--mode", "int4") == 2
    assert "quantised already" in capsys.readouterr().err
    assert run("--checkpoint", folder, "--out", out, "--mode", "int4") == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    ({"mode": "int3"}, "mode 'int3'"), ({"mode": "int4", "group_size": 48}, "group_size 48"),
    ({"mode": "int4", "group_size": 32}, "quantize.json|shape"), ({"lm_head": "int2"}, "lm_head 'int2'"),
    (None, "unexpected key")])
def test_a_quantize_json_that_does_not_fit_is_refused(change, message, tmp_path):
    _, out = quantized_folder("gqa", tmp_path, "--mode", "int8")
    file = out / "quantize.json"
    if change is None:
        file.unlink()
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Transformer.from_pretrained(out)


def test_eval_prints_perplexity_before_and_after(tmp_path, capsys):
    folder = write_checkpoint(tmp_path / "m")
    tiny("gqa", folder, **WIDE, vocab_size=json.loads((folder / "config.json").read_text())["vocab_size"])
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    options = ("--mode", "int8", "--eval", text, "--dtype", "float32")
    assert run("--checkpoint", folder, "--out", tmp_path / "q", *options) == 0
    before, after = capsys.readouterr().out.strip().split("\n")
    value = lambda line: float(line.split("perplexity ")[1].split()[0])
    assert "32.00 bits" in before and "8.30 bits" in after and abs(value(after) / value(before) - 1) < 0.1


def test_sliding_window_scores_each_token_once_with_what_precedes_it(tmp_path):
    folder, _ = tiny("gqa", tmp_path / "m", **WIDE)
    model, tokens = Transformer.from_pretrained(folder, dtype=torch.float32), tokens_of(50)
    losses = []
    for n in range(1, 50):      # windows of 16 that move by 8: token n is in the first window that reaches it
        begin = 0 if n < 16 else 8 * ((n - 8) // 8)
        logits, _ = model(torch.tensor([tokens[begin:n]]), torch.arange(n - begin))
        losses.append(-logits[0, -1].log_softmax(-1)[tokens[n]].item())
    expected = torch.tensor(losses).mean().exp().item()
    assert quantize.perplexity(model, tokens, window=16) == pytest.approx(expected, rel=1e-4)


# Decoding


def random_head(folder, target):
    """A head of random weights in the official format."""
    c = target.config
    torch.manual_seed(1)
    args = dict(model_type="llama", hidden_size=c.dim, intermediate_size=128, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=c.vocab_size, num_hidden_layers=1, rms_norm_eps=1e-5,
                max_position_embeddings=256, bias=True)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(args))
    shapes = {"fc.weight": (64, 128), "fc.bias": (64,), "layers.0.post_attention_layernorm.weight": (64,),
              "layers.0.self_attn.q_proj.weight": (64, 64), "layers.0.self_attn.k_proj.weight": (32, 64),
              "layers.0.self_attn.v_proj.weight": (32, 64), "layers.0.self_attn.o_proj.weight": (64, 64),
              "layers.0.mlp.gate_proj.weight": (128, 64), "layers.0.mlp.up_proj.weight": (128, 64),
              "layers.0.mlp.down_proj.weight": (64, 128)}
    save_file({key: 0.2 * torch.randn(shape) for key, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("options", [("--mode", "int8", "--lm-head", "int4"), ("--mode", "int4")], ids=str)
@pytest.mark.parametrize("kind", ["gqa", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("draft_vocab", [None, 40])
def test_greedy_eagle_with_a_quantised_head_equals_plain_decoding_of_the_quantised_target(
        kind, options, draft_vocab, tmp_path):
    _, out = quantized_folder(kind, tmp_path, *options)
    model = Transformer.from_pretrained(out, dtype=torch.float32)
    head_out = tmp_path / "head-q"
    assert run("--checkpoint", random_head(tmp_path / "head", model), "--out", head_out, "--mode", "int4") == 0
    head = PartlyRightHead.from_pretrained(head_out, model)
    assert isinstance(head.fc, QuantLinear) and head.fc.bias is not None
    prompt = tokens_of(9)
    wanted = naive_decode(model, prompt, 24)
    head.tell([prompt + wanted])
    head.set_draft_vocab(None if draft_vocab is None else [*dict.fromkeys([*wanted, *range(VOCAB)])][:draft_vocab])
    for tree in ("static", "chain:3", "dynamic:3,4,12"):
        result = generate(model, [prompt], 24, head=head, tree=tree)
        assert result.tokens[0] == wanted and result.mean_accept_length > 1.2


@pytest.mark.parametrize("one, block", [("dense", "packed"), ("packed", "dense")])
def test_eagle_in_bf16_is_greedy_but_for_near_ties_where_rows_and_blocks_take_different_kernels(one, block, tmp_path):
    _, out = quantized_folder("gqa", tmp_path, "--mode", "int4", "--lm-head", "int8")
    model = Transformer.from_pretrained(out, dtype=torch.bfloat16)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.kernels = dict.fromkeys(linears.ROWS, block) | {1: one}
            module.lay_out({one, block})
    head = head_of(model).bfloat16()
    quantize_in_place(head, Format("int8"))
    prompt = tokens_of(9)
    plain = generate(model, [prompt], 40)
    head.tell([prompt + plain.tokens[0]])
    for tree in ("static", "dynamic:3,4,12"):
        result = generate(model, [prompt], 40, head=head, tree=tree)
        assert max(result.accept_lengths[0]) > 2
        for tokens in (plain.tokens[0], result.tokens[0]):
            assert_near_greedy(model, prompt, tokens)


def test_quantize_in_place_gives_what_the_folder_gives(tmp_path, monkeypatch):
    folder, out = quantized_folder("mixtral", tmp_path, "--mode", "int4", "--lm-head", "int8")
    model = Transformer.from_pretrained(folder, dtype=torch.float32)
    old, is_there = weakref.ref(model.layers[0].attention.wqkv), []
    with monkeypatch.context() as patch:
        patch.setattr(linears, "round_to_nearest",
                      lambda *args: is_there.append(old() is not None) or round_to_nearest(*args))
        quantize_in_place(model, Format("int4", 32), "int8")
    assert is_there[0] and not is_there[-1]     # each weight is freed when it is rounded, not at the end
    tokens = torch.tensor([tokens_of(5)])
    theirs = Transformer.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(model(tokens, torch.arange(5))[0], theirs(tokens, torch.arange(5))[0])


# The document


def test_the_table_of_the_document_has_the_figures_of_the_log_and_of_the_run():
    root = Path(__file__).parents[1]
    table, log = table_of(root / "docs/quantisation.md", 6), table_of(root / "dev/log.md", 4)
    run = table_of(root / "benchmarks/results/cpu-2core-smollm2-peers/report.md", 8)
    for row, logged, arm in (("bf16", "16 bits", ""), ("int8, LM head int8", "int8, LM head int8", "int8-"),
                             ("int4 of 32, LM head int8", "int4 of 32", "int4-"),
                             ("the same by GPTQ", "int4 of 32, GPTQ", None)):
        megabytes, bits, perplexity, plain, eagle = table[row]
        assert log[logged] == [perplexity, megabytes, bits]
        measured = ["", ""] if arm is None else [run[arm + name][0] for name in ("plain", "eagle-tuned")]
        assert [plain, eagle] == measured


def table_of(file, n_column):
    """{first cell: the other cells} of all table rows with n_column columns, without bold."""
    rows = [line.replace("**", "").split("|")[1:-1] for line in file.read_text().splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows if len(cells) == n_column}
