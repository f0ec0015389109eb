"""Checkpoints that other tools quantised: the same values to the last bit, the same logits, and what is refused."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate as cli
import hub_formats
import quantize
import tp
from checkpoint import iterate_weights, quantize_settings
from eagle_head import EagleHead
from exact import make_exact
from foreign import WIDE, WRITERS, order_of, quantise, write_foreign
from generate import generate
from grid import Format, dequantize
from linears import QuantLinear
from model import Transformer
from reference import assert_close, assert_near_greedy, edited_json, expected, naive_decode, tiny, tokens_of, \
    write_checkpoint
from runtime import tune
from scripts import plan
from test_eagle_lossless import head_of
from train_features import shard_layers, target_stamp

CASES = {
    "gptq": ("gptq", {}, Format("int4", 32)),
    "gptq of 64": ("gptq", dict(group_size=64, symmetric=True), Format("int4", 64)),
    "gptq, a group a row": ("gptq", dict(group_size=-1), None),     # of 64 and of 128 columns
    "gptq v2": ("gptq", dict(v2=True), Format("int4", 32)),
    "gptq in order": ("gptq", dict(desc_act=True), Format("int4", 32, reordered=True)),
    "gptq, zero biases, settings beside": ("gptq", dict(bias=True, beside=True), Format("int4", 32)),
    "gptq, 8 bits": ("gptq", dict(bits=8), Format("int8", 32, int8_zeros=True)),
    "gptq, 8 bits in order": ("gptq", dict(bits=8, symmetric=True, desc_act=True),
                              Format("int8", 32, reordered=True)),
    "gptq, 8 bits a row": ("gptq", dict(bits=8, group_size=-1, symmetric=True), Format("int8")),
    "awq": ("awq", {}, Format("int4", 32)),
    "awq of 64": ("awq", dict(group_size=64, dtype=torch.bfloat16), Format("int4", 64)),
    "compressed-tensors": ("pack-quantized", dict(symmetric=True), Format("int4", 32)),
    "compressed-tensors with zeros": ("pack-quantized", dict(dtype=torch.bfloat16), Format("int4", 32)),
    "compressed-tensors in order": ("pack-quantized", dict(desc_act=True), Format("int4", 32, reordered=True)),
    "compressed-tensors, 8 bits": ("pack-quantized", dict(bits=8, group_size=-1, symmetric=True), Format("int8")),
    "compressed-tensors, 8 bits in groups": ("pack-quantized", dict(bits=8, symmetric=True), Format("int8", 32)),
    "compressed-tensors, int8": ("int-quantized", dict(bits=8, group_size=-1, symmetric=True), Format("int8")),
    "compressed-tensors, int8 with zeros": ("int-quantized", dict(bits=8, group_size=-1),
                                            Format("int8", int8_zeros=True)),
}


@pytest.fixture(autouse=True)
def kernel_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def quantised(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def values(folder):
    """The weights of a folder by key, dequantised in the order of the model's columns."""
    stored = {key: tensor for key, tensor, _ in iterate_weights(folder)}
    weights = {}
    for key, tensor in stored.items():
        name, _, kind = key.rpartition(".")
        if kind == "weight" and f"{name}.scales" in stored:
            tensor = dequantize(tensor, stored[f"{name}.scales"], stored.get(f"{name}.zeros"))
            if f"{name}.order" in stored:
                tensor = torch.empty_like(tensor).index_copy_(1, stored[f"{name}.order"], tensor)
        if kind in ("weight", "bias"):
            weights[key] = tensor
    return weights


# Values and logits


@pytest.mark.parametrize("kind", ["gqa", "qwen2"])
@pytest.mark.parametrize("case", CASES)
def test_values_equal_the_reference_to_the_last_bit_and_logits_are_those_of_the_dequantised_model(
        case, kind, tmp_path, capsys):
    method, options, format = CASES[case]
    hf = write_foreign(tmp_path / "m", kind, method, **options)
    model = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32)
    dense = load_file(tmp_path / "m-dense/model.safetensors")
    ours = values(tmp_path / "m")
    assert all(torch.equal(ours[key], dense[key]) for key in dense)
    qkv = torch.cat([dense[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(model.layers[1].attention.wqkv.weight, qkv)
    assert len(quantised(model)) == 8       # all linears of both layers
    if format is not None:
        formats = {name.split(".")[-1]: module.format for name, module in quantised(model).items()}
        assert formats.pop("w2") == format._replace(reordered=False)    # w13 gives it its input in order
        assert set(formats.values()) == {format}
    tokens = tokens_of(20)
    theirs, _ = expected(hf, tokens)
    assert_close(model(torch.tensor([tokens]), torch.arange(20))[0][0], theirs)
    model.setup_caches(1, 40)
    steps = [model(torch.tensor([[token]]), torch.tensor([i]))[0][0] for i, token in enumerate(tokens)]
    assert_close(torch.cat(steps), theirs)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("bits, group_size, symmetric", [(4, 32, True), (4, 64, False), (8, -1, True), (8, 32, False)])
def test_compressed_tensors_writes_and_reads_the_same(bits, group_size, symmetric, tmp_path):
    """Its own compressor of a weight, and transformers' loading of the whole checkpoint."""
    pytest.importorskip("compressed_tensors")
    import transformers
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    write_foreign(tmp_path / "m", "gqa", "pack-quantized", bits=bits, group_size=group_size, symmetric=symmetric,
                  dtype=torch.float32)     # it dequantises to the dtype of the scales
    config = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    scheme = QuantizationScheme(**config["config_groups"]["group_0"])
    weight = torch.randn(64, 128)
    u, s, z, dequantised = quantise(weight, bits, group_size, symmetric, dtype=torch.float32)
    state = {"weight": dequantised, "weight_scale": s,
             "weight_zero_point": (z - 2 ** (bits - 1)).to(torch.int8)}
    theirs = PackedQuantizationCompressor.compress(state, scheme)
    ours = WRITERS["pack-quantized"](u, s, z, bits, symmetric=symmetric)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in ours)

    hf = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, attn_implementation="eager",
        quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    model, tokens = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32), tokens_of(20)
    assert_close(model(torch.tensor([tokens]), torch.arange(20))[0][0], expected(hf, tokens)[0])


def test_gptq_s_zero_points_wrap_around():
    """Stored one lower: 15 stands for 0."""
    stored = {"qweight": torch.zeros(4, 8, dtype=torch.int32), "qzeros": torch.full((1, 1), -1, dtype=torch.int32),
              "scales": torch.ones(1, 8)}
    for layout, zero in (("gptq", 0), ("gptq_v2", 15)):
        found = hub_formats.settings({"quantization_config": dict(
            quant_method="gptq", bits=4, group_size=32, checkpoint_format=layout)})
        parts = hub_formats.find_parts({f"model.layers.0.mlp.down_proj.{key}": list(tensor.shape)
                                        for key, tensor in stored.items()}, found, lambda wanted: [], "")
        part, = parts.values()
        ours = hub_formats.native(dict(stored), part)
        assert (dequantize(ours["weight"], ours["scales"], ours["zeros"]) == -zero).all()


@pytest.mark.parametrize("method", ["gptq", "awq", "pack-quantized"])
def test_what_is_not_quantised_alike_takes_16_bits_and_a_line_says_so(method, tmp_path, capsys):
    """A list of exceptions, and a weight beside one of them."""
    hf = write_foreign(tmp_path / "m", "gqa", method, skip=("0.self_attn.k_proj", "1.mlp.down_proj"))
    model = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32)
    assert quantised(model).keys() == {"layers.0.attention.wo", "layers.0.feed_forward.w13", "layers.0.feed_forward.w2",
                                       "layers.1.attention.wqkv", "layers.1.attention.wo", "layers.1.feed_forward.w13"}
    line = capsys.readouterr().err
    assert line.startswith("2 of 12 quantised weights take 16 bits here") and line.count("\n") == 1
    assert "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.v_proj" in line
    tokens = tokens_of(20)
    assert_close(model(torch.tensor([tokens]), torch.arange(20))[0][0], expected(hf, tokens)[0])


@pytest.mark.parametrize("method, options", [
    ("gptq", dict(group_size=16)), ("awq", dict(group_size=16)),
    ("gptq", dict(desc_act=True, order=lambda name, *rest: order_of(name, *rest, seed=len(name) + ord(name[-6]))))])
def test_a_grid_that_is_not_ours_is_dequantised_to_16_bits(method, options, tmp_path, capsys):
    """Groups of 16, and orders of columns in which q, k and v differ."""
    hf = write_foreign(tmp_path / "m", "gqa", method, **options)
    model = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32)
    kept = {name.split(".")[-1] for name in quantised(model)}
    assert kept == ({"wo", "w2"} if options.get("desc_act") else set())
    assert "take 16 bits here" in capsys.readouterr().err
    tokens = tokens_of(20)
    assert_close(model(torch.tensor([tokens]), torch.arange(20))[0][0], expected(hf, tokens)[0])


def shared_order(name, K, group_size):
    return order_of("shared", K, group_size)


@pytest.mark.parametrize("kind, options", [
    ("gqa", {}), ("gqa", dict(skip=("gate_proj",))), ("mixtral", dict(order=shared_order))])
def test_the_rows_of_w13_stand_in_the_order_of_w2_s_columns(kind, options, tmp_path):
    """Also where w13 has 16 bits, and of experts. So w2's input needs no order, and the products are the same."""
    hf = write_foreign(tmp_path / "m", kind, "gptq", desc_act=True, **options)
    model, tokens = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32), tokens_of(20)
    orders = {name.split(".", 2)[2]: module.order for name, module in quantised(model).items()}
    assert orders["feed_forward.w2"] is None and orders["attention.wo"] is not None
    assert ("feed_forward.w13" in orders) == ("skip" not in options)
    assert_close(model(torch.tensor([tokens]), torch.arange(20))[0][0], expected(hf, tokens)[0])


def test_groups_of_96_are_kept_in_groups_of_32(tmp_path):
    hf = write_foreign(tmp_path / "m", "gqa", "gptq", group_size=96, hidden_size=96, intermediate_size=192,
                       num_attention_heads=4)
    model, tokens = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32), tokens_of(20)
    assert {module.format for module in quantised(model).values()} == {Format("int4", 32)}
    assert_close(model(torch.tensor([tokens]), torch.arange(20))[0][0], expected(hf, tokens)[0])


@pytest.mark.parametrize("method", ["gptq", "pack-quantized"])
def test_each_linear_has_the_bits_and_groups_that_its_shapes_say(method, tmp_path):
    """GPTQ's `dynamic`, several config_groups."""
    hf = write_foreign(tmp_path / "m", "gqa", method)
    tensors, name = load_file(tmp_path / "m/model.safetensors"), "model.layers.1.self_attn.o_proj"
    linear = hf.model.layers[1].self_attn.o_proj
    u, s, z, linear.weight.data = quantise(linear.weight.data, 8, 64, False)
    tensors |= {f"{name}.{kind}": tensor for kind, tensor in WRITERS[method](u, s, z, 8, symmetric=False).items()}
    save_file(tensors, tmp_path / "m/model.safetensors")
    model, tokens = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32), tokens_of(20)
    assert model.layers[1].attention.wo.format == Format("int8", int8_zeros=True)
    assert model.layers[0].attention.wo.format == Format("int4", 32)
    assert_close(model(torch.tensor([tokens]), torch.arange(20))[0][0], expected(hf, tokens)[0])


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("method, options", [("gptq", {}), ("awq", {}), ("pack-quantized", dict(symmetric=True)),
                                             ("gptq", dict(desc_act=True))])
def test_experts_stay_in_their_grid_unless_their_columns_have_orders_of_their_own(kind, method, options, tmp_path):
    hf = write_foreign(tmp_path / "m", kind, method, **options)
    model, tokens = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32), tokens_of(20)
    assert ("layers.0.feed_forward.w13" in quantised(model)) == ("desc_act" not in options)
    assert "layers.0.attention.wqkv" in quantised(model)
    for rows in (20, 1):
        theirs, _ = expected(hf, tokens[:rows])
        assert_close(model(torch.tensor([tokens[:rows]]), torch.arange(rows))[0][0], theirs)


def test_an_lm_head_may_be_quantised_too(tmp_path):
    hf = write_foreign(tmp_path / "m", "gqa", "gptq")
    u, s, z, weight = quantise(hf.lm_head.weight.data, 4, 32, False)
    tensors = load_file(tmp_path / "m/model.safetensors")
    del tensors["lm_head.weight"]
    tensors |= {f"lm_head.{kind}": tensor for kind, tensor in WRITERS["gptq"](u, s, z, 4).items()}
    save_file(tensors, tmp_path / "m/model.safetensors")
    hf.lm_head.weight.data = weight
    model, tokens = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32), tokens_of(20)
    assert model.output.format == Format("int4", 32)
    assert_close(model(torch.tensor([tokens]), torch.arange(20))[0][0], expected(hf, tokens)[0])


def test_shards_may_part_the_tensors_of_a_linear(tmp_path):
    write_foreign(tmp_path / "m", "gqa", "gptq", desc_act=True)
    tensors = load_file(tmp_path / "m/model.safetensors")
    split_by_turns(tmp_path / "m", tensors)
    dense = load_file(tmp_path / "m-dense/model.safetensors")
    ours = values(tmp_path / "m")
    assert dense.keys() == ours.keys() and all(torch.equal(ours[key], dense[key]) for key in dense)


def test_a_file_of_gptq_s_older_tools_is_found_by_its_name(tmp_path):
    """With quantize_config.json beside it, whole or in shards. Two of them are refused."""
    hf = write_foreign(tmp_path / "m", "gqa", "gptq", beside=True)
    file, tokens = tmp_path / "m/gptq_model-4bit-32g.safetensors", tokens_of(20)
    (tmp_path / "m/model.safetensors").rename(file)
    assert_close(Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32)(
        torch.tensor([tokens]), torch.arange(20))[0][0], expected(hf, tokens)[0])
    tensors, stamp = load_file(file), target_stamp(tmp_path / "m")
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, file)
    assert target_stamp(tmp_path / "m") != stamp
    shutil.copy(file, tmp_path / "m/gptq_model-8bit.safetensors")
    with pytest.raises(ValueError, match="holds 2 models, gptq_model-4bit-32g.safetensors, gptq_model-8bit.safetens"):
        Transformer.from_pretrained(tmp_path / "m")
    (tmp_path / "m/gptq_model-4bit-32g.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(tensors, "gptq_model-8bit.safetensors")}))
    Transformer.from_pretrained(tmp_path / "m")


def split_by_turns(folder, tensors):
    """Two shards, the tensors dealt out in turn."""
    shards = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(sorted(tensors.items()))[i::2]) for i in range(2)}
    for name, part in shards.items():
        save_file(part, folder / name)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# Decoding


@pytest.mark.parametrize("kind, method, options", [
    ("gqa", "gptq", dict(desc_act=True)), ("gqa", "awq", {}), ("qwen2", "pack-quantized", dict(bits=8)),
    ("gqa", "int-quantized", dict(bits=8, group_size=-1, symmetric=True)), ("mixtral", "gptq", {})])
def test_greedy_eagle_equals_plain_decoding(kind, method, options, tmp_path):
    write_foreign(tmp_path / "m", kind, method, **options)
    model = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32)
    head, prompt = head_of(model), tokens_of(9)
    wanted = naive_decode(model, prompt, 24)
    head.tell([prompt + wanted])
    for tree in ("static", "chain:3", "dynamic:3,4,12"):
        result = generate(model, [prompt], 24, head=head, tree=tree)
        assert result.tokens[0] == wanted and result.mean_accept_length > 1.2


@pytest.mark.parametrize("method, options", [("gptq", dict(desc_act=True)), ("awq", {}), ("gptq", dict(bits=8))])
def test_in_bf16_the_measured_kernels_decode_near_greedily_and_exact_py_gives_plain_decoding_s_tokens(
        method, options, tmp_path):
    write_foreign(tmp_path / "m", "gqa", method, **options)
    model = Transformer.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    for module in quantised(model).values():
        module.kernels = dict.fromkeys((1, 2, 4, 8, 16, 32, 64), "packed")
    prompt = tokens_of(9)
    assert_near_greedy(model, prompt, generate(model, [prompt], 30).tokens[0])
    tune(model)
    try:
        make_exact(model)
    except ValueError as error:
        pytest.skip(str(error))
    plain = generate(model, [prompt], 40)
    head = head_of(model).bfloat16()
    head.tell([prompt + plain.tokens[0]])
    assert generate(model, [prompt], 40, head=head, tree="dynamic:3,4,12").tokens == plain.tokens


def test_exact_decoding_dequantises_at_the_first_long_prompt(tmp_path):
    write_foreign(tmp_path / "m", "gqa", "awq")
    model = Transformer.from_pretrained(tmp_path / "m", dtype=torch.bfloat16, choose_kernels=False)
    try:
        make_exact(model)
    except ValueError as error:
        pytest.skip(str(error))
    for length, layouts in ((20, {"packed None"}), (90, {"packed None", "dense None"})):
        generate(model, [tokens_of(length)], 4)
        assert {name for module in quantised(model).values() for name in module.layouts} == layouts
    assert not any(buffer.is_inference() for module in quantised(model).values() for buffer in module.buffers())


def test_training_reads_the_features_of_such_a_target_whole_and_in_pieces(tmp_path):
    write_foreign(tmp_path / "m", "gqa", "gptq", desc_act=True)
    model = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32, choose_kernels=False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    shard_layers(model, torch.device("cpu"), 0, 1)
    ids, pos = torch.tensor([tokens_of(20)]), torch.arange(20)
    wanted = Transformer.from_pretrained(tmp_path / "m", dtype=torch.float32).features(ids, pos)
    try:
        assert_close(model.features(ids, pos), wanted, 1e-6)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method, options, settings, tree", [
    ("awq", dict(group_size=64), {"mode": "int4", "group_size": 64}, "tree-int4.json"),
    ("gptq", dict(group_size=-1, hidden_size=128), {"mode": "int4", "group_size": 128}, "tree-int4.json"),
    ("gptq", dict(bits=8), {"mode": "int8", "group_size": None}, "tree-int8.json"),
    ("gptq", dict(group_size=16), {}, "tree.json")])
def test_tree_and_plan_know_the_mode(method, options, settings, tree, tmp_path, capsys):
    write_foreign(tmp_path / "m", "gqa", method, **options)
    assert quantize_settings(tmp_path / "m") == settings | {"tool": method}
    assert cli.tree_name(str(tmp_path / "m")) == tree
    argv = [str(tmp_path / "m"), "--world-size", "1", "--context", "128"]
    assert plan.main(plan.parse_args(argv)) == 0
    assert f"1 ranks, {settings.get('mode', 'bf16')}" in capsys.readouterr().out


# Refusals


@pytest.fixture
def text_folder(tmp_path):
    """A quantised checkpoint with a tokenizer."""
    folder = write_checkpoint(tmp_path / "text")
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    write_foreign(tmp_path / "m", "gqa", "gptq", vocab_size=vocab)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(folder / file, tmp_path / "m" / file)
    return tmp_path / "m"


def refusal(folder, capsys, *options):
    argv = ["--checkpoint", str(folder), "--prompt", "fox", "--raw", "--dtype", "float32", "--device", "cpu", *options]
    status = cli.main(cli.parse_args(argv))
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), (status, lines)
    return lines[0]


GROUPS = dict(group_0=dict(targets=["Linear"], weights=dict(num_bits=4, type="int", strategy="group", group_size=32)))
CT = dict(quant_method="compressed-tensors", format="pack-quantized", config_groups=GROUPS)


@pytest.mark.parametrize("said, message", [
    (dict(quant_method="bitsandbytes", load_in_4bit=True), "quant_method 'bitsandbytes' is not supported"),
    (dict(quant_method="eetq"), "quant_method 'eetq'"), (dict(quant_method="hqq"), "quant_method 'hqq'"),
    (dict(quant_method="fp8"), "quant_method 'fp8'"), (dict(quant_method="quanto"), "quant_method 'quanto'"),
    (dict(quant_method="fbgemm_fp8"), "'fbgemm_fp8' is not supported (gptq, awq and compressed-tensors are)"),
    (dict(load_in_8bit=True), "quant_method 'None'"), ("4 bits", "'4 bits' is not supported"),
    (dict(quant_method="gptq", bits=3), "bits '3' is not supported (4 and 8 are)"),
    (dict(quant_method="gptq", bits=2), "bits '2'"), (dict(quant_method="gptq"), "bits 'None'"),
    (dict(quant_method="gptq", bits=4, is_marlin_format=True), "is_marlin_format"),
    (dict(quant_method="gptq", bits=4, checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
    (dict(quant_method="gptq", bits=4, checkpoint_format="exllama"), "checkpoint_format 'exllama'"),
    (dict(quant_method="gptq", bits=4, group_size=0), "group_size '0'"),
    (dict(quant_method="awq", bits=8, version="gemm"), "bits '8' is not supported (4 is)"),
    (dict(quant_method="awq", bits=4, version="gemv"), "version 'gemv' is not supported (gemm is)"),
    (dict(quant_method="awq", bits=4, version="marlin"), "version 'marlin'"),
    (CT | dict(format="marlin-24"), "format 'marlin-24'"), (CT | dict(format="float-quantized"), "'float-quantized'"),
    (CT | dict(format="nvfp4-pack-quantized"), "'nvfp4-pack-quantized'"),
    (CT | dict(kv_cache_scheme=dict(num_bits=8)), "kv_cache_scheme"),
    (CT | dict(sparsity_config=dict(format="sparse-24-bitmask")), "sparsity_config"),
    (CT | dict(config_groups=dict(a=dict(weights=dict(num_bits=3)))), "weights.num_bits '3'"),
    (CT | dict(config_groups=dict(a=dict(weights=dict(num_bits=4, type="float")))), "weights.type 'float'"),
    (CT | dict(config_groups=dict(a=dict(weights=dict(num_bits=4), input_activations=dict(num_bits=8)))),
     "input_activations 'quantised activations' is not supported (weights alone are)"),
    (CT | dict(sparsity_config="2:4"), "sparsity_config '2:4'"),
    (CT | dict(config_groups=dict(a=dict(weights=dict(num_bits=4, group_size="32")))), "weights.group_size '32'"),
    (CT | dict(config_groups={}), "config_groups"), (CT | dict(config_groups=dict(W4A16=["Linear"])), "W4A16"),
    (CT | dict(quantization_status="calibration"), "quantization_status 'calibration'"),
    (dict(quant_method="awq", bits=4, version="gemm"), "qweight has shape"),    # what is there is GPTQ's
    (CT, "no key *.weight_packed"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_other_tools_and_layouts_are_refused_by_name(said, message, text_folder, capsys):
    with edited_json(text_folder / "config.json") as config:
        config["quantization_config"] = said
    assert message in refusal(text_folder, capsys)


def without(key):
    return lambda tensors: tensors.pop(key)


def changed(key, change):
    return lambda tensors: tensors.update({key: change(tensors[key])})


O_PROJ = "model.layers.1.self_attn.o_proj."


@pytest.mark.parametrize("damage, message", [
    (without(O_PROJ + "qzeros"), "o_proj.qweight is there, model.layers.1.self_attn.o_proj.qzeros is missing"),
    (without(O_PROJ + "qweight"), "unexpected key 'model.layers.1.self_attn.o_proj"),
    (changed(O_PROJ + "g_idx", lambda g: g.clamp(max=0)), "g_idx does not put 32 columns in each of 2 groups"),
    (changed(O_PROJ + "g_idx", lambda g: g - 5), "g_idx does not put 32 columns"),
    (changed(O_PROJ + "qweight", lambda q: q[:4].clone()), "g_idx does not put"),
    (changed(O_PROJ + "qweight", lambda q: q[:, :32].clone()), "qweight has shape [8, 32], scales have [2, 64]"),
    (changed(O_PROJ + "qweight", torch.flatten), "qweight has shape [512], not two axes"),
    (changed(O_PROJ + "qzeros", lambda q: q[:, :3].clone()), "are neither 4 bits nor 8"),
    (changed(O_PROJ + "scales", lambda s: torch.cat((s, s[:1]))), "are neither 4 bits nor 8"),
    (lambda tensors: [changed(O_PROJ + kind, lambda t: t[[0, 1, 1]])(tensors) for kind in ("scales", "qzeros")],
     "group size 32 does not divide a row of 64 weights"),
    (lambda tensors: tensors.update({O_PROJ + "bias": torch.ones(64)}), "unexpected key '" + O_PROJ + "bias'"),
    (lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(O_PROJ)],
     "weights are missing, first 'model.layers.1.self_attn.o_proj.weight'"),
    (lambda tensors: tensors.update({O_PROJ + "weight": torch.ones(64, 64)}), "o_proj.weight has shape [64, 64]"),
])
def test_a_checkpoint_that_does_not_fit_together_is_refused_in_one_line(damage, message, text_folder, capsys):
    tensors = load_file(text_folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, text_folder / "model.safetensors")
    assert message in refusal(text_folder, capsys)


def test_half_a_shard_and_a_missing_one_are_refused_in_one_line(text_folder, capsys):
    split_by_turns(text_folder, load_file(text_folder / "model.safetensors"))
    shard = text_folder / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:len(content) // 2])
    assert "corrupt, truncated or not a weights file" in refusal(text_folder, capsys)
    shard.unlink()
    assert "is missing: the checkpoint is incomplete" in refusal(text_folder, capsys)


def test_zero_points_that_contradict_sym_are_refused(tmp_path):
    write_foreign(tmp_path / "m", "gqa", "gptq", bits=8)
    with edited_json(tmp_path / "m/config.json") as config:
        config["quantization_config"]["sym"] = True
    with pytest.raises(ValueError, match="sym is true, and its zero points are not all in the middle"):
        Transformer.from_pretrained(tmp_path / "m")


def test_what_does_not_take_such_a_folder_says_so_by_name(text_folder, tmp_path, capsys):
    argv = ["--checkpoint", str(text_folder), "--out", str(tmp_path / "q"), "--mode", "int8"]
    assert quantize.main(quantize.parse_args(argv)) == 2
    assert "is quantised already by gptq: start from its 16-bit checkpoint" in capsys.readouterr().err
    for load in (lambda: Transformer.from_pretrained(text_folder, shard=tp.Shard(0, 2)),
                 lambda: tp.check_memory(str(text_folder), 2, 10 ** 9)):
        with pytest.raises(ValueError, match="weights quantised by gptq are not split over processes"):
            load()
    folder, _ = tiny("gqa", tmp_path / "head", **WIDE, num_hidden_layers=1, vocab_size=299)
    with edited_json(folder / "config.json") as config:
        config["quantization_config"] = dict(quant_method="gptq", bits=4)
    with pytest.raises(ValueError, match="the head's config.json: quantization_config .* is not supported"):
        EagleHead.from_pretrained(folder, Transformer.from_pretrained(text_folder))


def test_size_and_perplexity_of_such_a_folder(text_folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    lines = []
    for folder in (text_folder, tmp_path / "m-dense"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tmp_path / "text" / file, folder / file)
        argv = ["--checkpoint", str(folder), "--eval", str(text), "--dtype", "float32", "--device", "cpu"]
        assert quantize.main(quantize.parse_args(argv)) == 0
        lines.append(capsys.readouterr().out)
    perplexity = [float(line.split(" perplexity ")[1].split()[0]) for line in lines]
    assert perplexity[0] == pytest.approx(perplexity[1], rel=1e-4)
    assert " 5.09 bits per weight" in lines[0]      # 4, scale and zero point of 32 columns, norms
