"""Quantised weights: the format, the products, folders, GPTQ, and decoding on a quantised target."""
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantize
import quantized
from eagle_head import EagleHead
from generate import generate
from model import Transformer, _hf_targets, iterate_weights
from quantized import Format, QuantLinear, dequantize, pack, quantize_in_place, round_to_nearest, tune, unpack
from tokenizer import Tokenizer
from reference import assert_close, naive_decode, read_safetensors, tiny, tokens_of, write_checkpoint

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
    """The 16-bit model with the values of the quantised one: what every product is compared with."""
    stored = {key: tensor for key, tensor, _ in iterate_weights(out)}
    model = Transformer.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    weights = {key: dequantize(tensor, stored[key[:-6] + "scales"].float(), stored.get(key[:-6] + "zeros"))
               if key[:-6] + "scales" in stored else tensor
               for key, tensor in stored.items() if key.endswith("weight")}
    model.output.weight = torch.nn.Parameter(model.output.weight.clone(), requires_grad=False)     # a quantised LM head is never tied
    targets = _hf_targets(model) | {"lm_head.weight": model.output.weight}
    for key, tensor in weights.items():
        targets[key].copy_(tensor)
    if "lm_head.weight" not in weights:
        model.output.weight = model.tok_embeddings.weight
    return model


# Numbers


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_pack_then_unpack_gives_every_level_back(format):
    low, high = quantized.LEVELS[format.mode]
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


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (33, 192), (128, 576 // 9 * 10)])
def test_products_equal_float64_for_every_number_of_rows(format, shape):
    weight = torch.randn(shape)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        linear = QuantLinear.from_weight(weight.to(dtype), format, torch.randn(shape[0]).to(dtype))
        exact = dequantize(linear.q, linear.scales.double(), linear.zeros).T
        for rows in ROWS:
            x = torch.randn(1, rows, shape[1], dtype=dtype)
            theirs = x.double() @ exact + linear.bias.double()
            for name in quantized.candidates(linear):
                assert_close(linear.product(name, x).double(), theirs, tolerance)
            spaced = torch.cat((x, x), -1)[..., :shape[1]]  # as PackedRMSNorm's rows lie
            for name in quantized.candidates(linear):
                assert_close(linear.product(name, spaced).double(), theirs, tolerance)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_triton_kernel_equals_float64_for_every_number_of_rows(device):
    """On a CPU in Triton's interpreter, in a process of its own: Triton reads the variable when it is imported."""
    pytest.importorskip("triton")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{tests}:{tests.parent}"} | ({"TRITON_INTERPRET": "1"} if device == "cpu" else {})
    subprocess.run([sys.executable, "-c", f"from test_quantize import check_triton; check_triton({device!r})"],
                   env=environment, check=True)


def check_triton(device):
    from quantized_triton import quant_matmul
    torch.manual_seed(0)
    for format, (N, K) in itertools.product([*FORMATS, Format("int4", 128)], [(48, 128), (33, 384)]):
        for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
            if device == "cpu" and dtype == torch.bfloat16:
                continue    # the interpreter multiplies the bits of a bfloat16 as whole numbers
            linear = QuantLinear.from_weight(torch.randn(N, K).to(dtype), format).to(device)
            exact = dequantize(linear.q, linear.scales.double(), linear.zeros).T
            for rows, split_k in ((1, 1), (2, 4), (16, 1), (17, 2), (60, 8), (64, 1)):
                x = torch.randn(rows, K, device=device).to(dtype)
                ours = quant_matmul(x, *linear.parts(), 32, split_k)
                assert ours.dtype == dtype
                assert_close(ours.double(), x.double() @ exact, tolerance)


def test_rows_of_a_linear_are_its_rows():
    linear = QuantLinear.from_weight(torch.randn(48, 64), Format("int4", 32))
    index = torch.tensor([40, 3, 17])
    assert torch.equal(linear.rows(index).weight, linear.weight[index])


def test_a_compiled_linear_is_one_graph():
    x = torch.randn(1, 3, 64)
    for dtype in (torch.float32, torch.bfloat16):
        linear = QuantLinear.from_weight(torch.randn(48, 64).to(dtype), Format("int4", 32))
        tune(linear)
        with torch.inference_mode():
            compiled = torch.compile(linear, fullgraph=True, backend="eager")
            assert torch.equal(compiled(x.to(dtype)), linear(x.to(dtype)))


def test_tune_measures_once_and_keeps_what_it_found(tmp_path, monkeypatch):
    linear = QuantLinear.from_weight(torch.randn(48, 64).bfloat16(), Format("int4", 32))
    calls = []
    monkeypatch.setattr(quantized, "fastest", lambda modules, names, rows: calls.append(rows) or names[rows % 2])
    tune(linear)
    assert calls == list(quantized.ROWS) and linear.kernels[1] == "packed" and linear.kernels[64] == "dense"
    again = QuantLinear.from_weight(torch.randn(48, 64).bfloat16(), Format("int4", 32))
    tune(again)
    assert calls == list(quantized.ROWS) and again.kernels == linear.kernels
    (tmp_path / "cache/eagle-kernels.json").write_text("{broken")
    monkeypatch.setenv("RANK", "1")         # torchrun's processes would overwrite each other's: the first writes
    tune(again)
    assert len(calls) == 2 * len(quantized.ROWS) and (tmp_path / "cache/eagle-kernels.json").read_text() == "{broken"


# GPTQ


def written_out_gptq(weight, hessian, size):
    """One column after the other, all later ones corrected by the exact conditional minimum [GPTQ, section 3]."""
    w, q = weight.clone(), torch.zeros_like(weight)
    for j in range(w.shape[1]):
        if j % size == 0:
            scale, zero = quantized.fit_grid(w[:, j:j + size].float(), "int4")
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
    x, weight = correlated(192), torch.randn(12, 192, dtype=torch.double)   # more columns than a block has
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


# Folders


@pytest.mark.parametrize("options", [("--mode", "int8"), ("--mode", "int4"), ("--mode", "int4", "--lm-head", "int8"),
                                     ("--mode", "int8", "--lm-head", "int4")], ids=str)
@pytest.mark.parametrize("kind", ["gqa", "qwen2_tied", "qwen3", "mixtral"])
def test_a_folder_loads_as_the_values_it_stores(kind, options, tmp_path):
    folder, out = quantized_folder(kind, tmp_path, *options)
    model, twin = Transformer.from_pretrained(out, dtype=torch.float32), dense_twin(folder, out)
    assert isinstance(model.output, QuantLinear) == ("--lm-head" in options)
    for n in (1, 3, 24, 140):   # experts are run in another way for each
        tokens = torch.tensor([tokens_of(n)])
        assert_close(model(tokens, torch.arange(n))[0], twin(tokens, torch.arange(n))[0], 1e-5)
    stored = {key: tensor for key, tensor, _ in iterate_weights(out)}
    plain = {key: tensor for key, tensor, _ in iterate_weights(folder)}
    kept = [key for key in plain if any(part in key for part in ("norm", "embed", "bias", ".gate.weight"))]
    assert all(torch.equal(stored[key], plain[key]) for key in kept)


@pytest.mark.parametrize("mode, bound", [("int8", 0.02), ("int4", 0.25)])
def test_quantised_experts_are_near_the_16_bit_ones(mode, bound, tmp_path):
    folder, out = quantized_folder("mixtral", tmp_path, "--mode", mode)
    for dtype, rounding in ((torch.float32, 0), (torch.bfloat16, 0.02)):
        ours, exact = (Transformer.from_pretrained(f, dtype=dtype).layers[0].feed_forward for f in (out, folder))
        for n in (1, 3, 24, 140):   # of one expert's rows or none, by the packed kernels or the dense product
            x = torch.randn(1, n, 64).to(dtype)
            difference = (ours(x) - exact(x)).float().norm(dim=-1) / exact(x).float().norm(dim=-1)
            assert difference.max() < bound + rounding  # the router has its 16 bits: the same experts are chosen


@pytest.mark.parametrize("kind", ["gqa", "qwen2", "mixtral"])
def test_gptq_folder_is_nearer_to_the_model_than_rounding(kind, tmp_path):
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
    words = "the quick brown fox jumps over a lazy dog and then other dogs sleep for rest of day".split()
    shuffled = lambda: " ".join(words[i] for i in torch.randint(len(words), (12,)).tolist())
    data.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": shuffled()}, {"role": "assistant", "content": shuffled()}]}) + "\n" for _ in range(24)))
    errors = {}
    tokens = torch.tensor([Tokenizer.from_pretrained(folder).encode(shuffled())])
    pos = torch.arange(tokens.shape[1])
    exact = Transformer.from_pretrained(folder, dtype=torch.float32)(tokens, pos)[0]
    for method, options in (("rtn", ()), ("gptq", ("--data", data))):
        out = tmp_path / method
        assert run("--checkpoint", folder, "--out", out, "--mode", "int4", "--method", method, "--device", "cpu", *options) == 0
        ours = Transformer.from_pretrained(out, dtype=torch.float32)(tokens, pos)[0]
        errors[method] = (ours - exact).norm().item()
    assert errors["gptq"] < errors["rtn"]


def test_an_interrupted_run_is_never_loadable_and_goes_on(tmp_path, monkeypatch):
    folder, whole = quantized_folder("gqa", tmp_path, "--mode", "int4", num_hidden_layers=3)
    out, part = tmp_path / "again", tmp_path / "again.part"
    saved, n_call = quantize.save_file, 0

    def killed(tensors, file, **options):
        nonlocal n_call
        n_call += 1
        saved(tensors, file, **options)
        if n_call == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(quantize, "save_file", killed)
    assert run("--checkpoint", folder, "--out", out, "--mode", "int4") == 130
    assert not out.exists() and len(list(part.glob("*.safetensors"))) == 2
    with pytest.raises((FileNotFoundError, ValueError)):
        Transformer.from_pretrained(part)
    assert run("--checkpoint", folder, "--out", out, "--mode", "int8") == 2      # other settings
    n_call = 10
    assert run("--checkpoint", folder, "--out", out, "--mode", "int4") == 0
    assert n_call == 12 and not part.exists()      # two of the four shards were there
    for file in whole.glob("*.safetensors"):
        ours, theirs = load_file(out / file.name), load_file(file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("argv, message", [
    (("--mode", "int4", "--group-size", "128"), "group size 128 does not divide a row of 64 weights: 32 or 64 does"),
    (("--mode", "int8", "--group-size", "32"), "--group-size is for int4"),
    (("--mode", "int4", "--method", "gptq"), "needs --data"),
    (("--mode", "int4", "--method", "gptq", "--data", "nowhere"), "no such file"),
])
def test_refusals_are_one_line(argv, message, tmp_path, capsys):
    folder, _ = tiny("gqa", tmp_path / "m", **WIDE)
    assert run("--checkpoint", folder, "--out", tmp_path / "q", *argv) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith("error: ") and message in line and not (tmp_path / "q").exists()
    assert run("--checkpoint", folder, "--out", tmp_path / "q", "--mode", "int8") == 0     # nothing is in the way now


def test_a_quantised_folder_is_refused_and_so_is_an_existing_one(tmp_path, capsys):
    folder, out = quantized_folder("gqa", tmp_path, "--mode", "int8")
    assert run("--checkpoint", out, "--out", tmp_path / "twice", "--mode", "int4") == 2
    assert "quantised already" in capsys.readouterr().err
    assert run("--checkpoint", folder, "--out", out, "--mode", "int4") == 2
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    ({"mode": "int3"}, "mode 'int3'"), ({"mode": "int4", "group_size": 48}, "group_size 48"),
    ({"mode": "int4", "group_size": 32}, "quantize.json|shape"), ({"lm_head": "int2"}, "lm_head 'int2'"), (None, "unexpected key")])
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
    assert run("--checkpoint", folder, "--out", tmp_path / "q", "--mode", "int8", "--eval", text, "--dtype", "float32") == 0
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
    args = dict(model_type="llama", hidden_size=c.dim, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=c.vocab_size, num_hidden_layers=1, rms_norm_eps=1e-5, max_position_embeddings=256, bias=True)
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
@pytest.mark.parametrize("kind", ["gqa", "mixtral"])
@pytest.mark.parametrize("draft_vocab", [None, 40])
def test_greedy_eagle_with_a_quantised_head_equals_plain_decoding_of_the_quantised_target(kind, options, draft_vocab, tmp_path):
    _, out = quantized_folder(kind, tmp_path, *options)
    model = Transformer.from_pretrained(out, dtype=torch.float32)
    head_out = tmp_path / "head-q"
    assert run("--checkpoint", random_head(tmp_path / "head", model), "--out", head_out, "--mode", "int4") == 0
    head = EagleHead.from_pretrained(head_out, model)
    assert isinstance(head.fc, QuantLinear) and head.fc.bias is not None
    head.set_draft_vocab(None if draft_vocab is None else list(range(draft_vocab)))
    prompt = tokens_of(9)
    for tree in ("static", "chain:3", "dynamic:3,4,12"):
        result = generate(model, [prompt], 24, head=head, tree=tree)
        assert result.tokens[0] == naive_decode(model, prompt, 24)


def test_quantize_in_place_gives_what_the_folder_gives(tmp_path):
    folder, out = quantized_folder("mixtral", tmp_path, "--mode", "int4", "--lm-head", "int8")
    model = Transformer.from_pretrained(folder, dtype=torch.float32)
    quantize_in_place(model, Format("int4", 32), "int8")
    tokens = torch.tensor([tokens_of(5)])
    theirs = Transformer.from_pretrained(out, dtype=torch.float32)
    assert torch.equal(model(tokens, torch.arange(5))[0], theirs(tokens, torch.arange(5))[0])
