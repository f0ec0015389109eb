"""EAGLE-3 heads in the tools around decoding: quantised, over several processes, planned, evaluated, timed, exported.

    python -m pytest tests/test_eagle3_tools.py -q

The heads are random and tiny, written by `write_eagle3` under the authors' keys.
"""
import functools
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import save_file

import generate as cli
import quantize
import tp
from benchmarks import bench, shapes, timing
from decoder import generate, setup_caches
from draft_tree import DynamicTree, StaticTree
from eagle_head import EagleHead
from head_config import stored_shapes
from linears import Format, QuantLinear, dequantize, round_to_nearest
from model import Transformer
from reference import assert_close, edited_json, naive_decode, read_safetensors, tiny, tokens_of, write_checkpoint
from scripts import demo, evaluate, export_head, plan
from test_tp import FEW, answers, group as group     # a fixture

V, VD, H, F = 96, 40, 64, 96        # vocabularies, width and feed-forward of the heads here
N_LAYER = 8                         # of the target: the default hidden states are 2, 4 and 5
SPECULATORS = {"speculators_model_type": "eagle3", "norm_before_residual": True}


def write_eagle3(folder, target, *, n_draft=VD, n_layer=1, prefix="midlayer.", outer="", shuffled=False,
                 dtype=torch.float32, **changes):
    """A random head for a target's config. `changes` of config.json; norms come with their flags. outer is put before
    all keys."""
    generator = torch.Generator().manual_seed(3)
    n_head, n_kv, D, t = 4, 2, 16, target.dim
    config = dict(architectures=["LlamaForCausalLMEagle3"], model_type="llama", hidden_size=H, intermediate_size=F,
                  num_attention_heads=n_head, num_key_value_heads=n_kv, head_dim=D, vocab_size=target.vocab_size,
                  draft_vocab_size=n_draft, rms_norm_eps=1e-3, max_position_embeddings=256, num_hidden_layers=n_layer,
                  rope_theta=5e4, torch_dtype=str(dtype).removeprefix("torch.")) | changes
    sizes = {"fc.weight": (H, 3 * t), "norm.weight": (H,), "lm_head.weight": (n_draft, H)}
    for i in range(n_layer):
        layer, width = (prefix, 2 * H) if i == 0 else (f"layers.{i}.", H)
        sizes |= {f"{layer}self_attn.q_proj.weight": (n_head * D, width),
                  f"{layer}self_attn.k_proj.weight": (n_kv * D, width),
                  f"{layer}self_attn.v_proj.weight": (n_kv * D, width),
                  f"{layer}self_attn.o_proj.weight": (H, n_head * D), f"{layer}mlp.gate_proj.weight": (F, H),
                  f"{layer}mlp.up_proj.weight": (F, H), f"{layer}mlp.down_proj.weight": (H, F),
                  f"{layer}input_layernorm.weight": (H,), f"{layer}post_attention_layernorm.weight": (H,)}
    sizes[f"{prefix}hidden_norm.weight"] = (H,)
    if config.get("fc_norm"):
        sizes |= {f"fc_norm.{i}.weight": (t,) for i in range(3)}
    if config.get("norm_before_fc"):
        sizes["input_norm.weight"] = (3 * t,)
    if H != t:
        sizes["embed_tokens.weight"] = (target.vocab_size, H)
    weights = {key: 0.25 * torch.randn(size, generator=generator) + (1 if len(size) == 1 else 0)
               for key, size in sizes.items()}
    weights = {key: weight.to(dtype) for key, weight in weights.items()}
    if n_draft < target.vocab_size or shuffled:
        ids = torch.randperm(target.vocab_size, generator=generator)[:n_draft]
        ids = ids if shuffled else ids.sort().values
        weights["d2t"] = ids - torch.arange(n_draft)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({outer + key: weight for key, weight in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def kernel_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    return tiny("gqa", tmp_path_factory.mktemp("target"), num_hidden_layers=N_LAYER)[0]


@pytest.fixture(scope="module")
def target(target_folder):
    return Transformer.from_pretrained(target_folder, dtype=torch.float32)


def drafts(head, target):
    """Outputs of a pass over true hidden states and of one over its own outputs behind it, and draft logits of both."""
    head.kv_cache = target.kv_cache = None
    tokens = torch.tensor([tokens_of(9)])
    _, hiddens = target(tokens, torch.arange(9), capture=head.capture)
    first = head(tokens[:, 1:], hiddens[:, :-1], torch.arange(8))
    second = head(tokens[:, 1:], first, torch.arange(8), is_draft=True)
    return first, second, head.draft_logits(first), head.draft_logits(second)


def assert_same_drafts(ours, theirs, target):
    for a, b in zip(drafts(ours, target), drafts(theirs, target), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.own_ids, theirs.own_ids)


def assert_lossless(head, target, trees=("chain:3", "static", "dynamic:3,4,12")):
    prompt = tokens_of(9)
    wanted = naive_decode(target, prompt, 24)
    for tree in trees:
        result = generate(target, [prompt], 24, head=head, tree=tree)
        assert result.tokens[0] == wanted
    return result


def one_line(capsys):
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


# ---------------------------------------------------------------------------------------------------------------------
# Quantised heads

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
           "mlp.up_proj", "mlp.down_proj")


def quantized(folder, out, *options):
    return quantize.main(quantize.parse_args(["--checkpoint", str(folder), "--out", str(out), "--device", "cpu",
                                              *options]))


@pytest.mark.parametrize("mode, lm_head, head_keys", [
    ("int8", None, {}), ("int4", "int8", dict(n_layer=2)), ("int4", "int4", dict(outer="model.")),
    ("int8", "int4", dict(prefix="layers.0.", fc_norm=True, norm_before_fc=True, **SPECULATORS))], ids=str)
def test_a_quantised_head_drafts_as_the_values_that_it_stores(target, tmp_path, mode, lm_head, head_keys):
    folder = write_eagle3(tmp_path / "head", target.config, **head_keys)
    assert quantized(folder, tmp_path / "out", "--mode", mode, *(["--lm-head", lm_head] if lm_head else [])) == 0
    head = EagleHead.from_pretrained(tmp_path / "out", target)
    quantised = [head.fc, *(linear for layer in head.layers for linear in (
        layer.attention.wqkv, layer.attention.wo, layer.feed_forward.w13, layer.feed_forward.w2))]
    assert all(isinstance(linear, QuantLinear) and linear.format.mode == mode for linear in quantised)
    assert isinstance(head.output, QuantLinear) == (lm_head is not None)
    assert stored_shapes(folder).items() <= stored_shapes(tmp_path / "out").items()

    # The same values in 32 bits, by the format's own definition
    shutil.copytree(folder, tmp_path / "dense")
    weights = read_safetensors(folder / "model.safetensors")
    outer = head_keys.get("outer", "")
    formats = dict.fromkeys([key for key in weights if key.removesuffix(".weight").endswith((*LINEARS, "fc"))],
                            Format(mode, None if mode == "int8" else 32))
    if lm_head:
        formats[f"{outer}lm_head.weight"] = Format(lm_head, None if lm_head == "int8" else 32)
    for key, format in formats.items():
        rounded = round_to_nearest(weights[key], format)
        scales, zeros = rounded["scales"].float(), rounded.get("zeros")
        weights[key] = dequantize(rounded["weight"], scales, None if zeros is None else zeros.float())
    save_file(weights, tmp_path / "dense/model.safetensors")
    dense = EagleHead.from_pretrained(tmp_path / "dense", target)
    for ours, theirs in zip(drafts(head, target), drafts(dense, target), strict=True):
        assert_close(ours, theirs, 1e-5)
    assert_lossless(head, target)
    head.set_draft_vocab(head.own_ids[5:30].tolist())
    assert_lossless(head, target, ["dynamic:3,4,12"])


def test_quantize_refuses_calibration_of_a_head_and_quantised_heads_in_one_line(target, tmp_path, capsys):
    folder = write_eagle3(tmp_path / "head", target.config)
    (tmp_path / "data.jsonl").write_text("")
    capsys.readouterr()
    options = "--mode", "int8", "--method", "gptq", "--data", str(tmp_path / "data.jsonl")
    assert quantized(folder, tmp_path / "out", *options) == 2
    assert "EAGLE-3 head, which has no calibration: --method rtn" in one_line(capsys)
    wide = write_eagle3(tmp_path / "wide", target.config, intermediate_size=F)
    assert quantized(wide, tmp_path / "out", "--mode", "int4", "--group-size", "128") == 2
    assert "group size 128 does not divide a row" in one_line(capsys)


def loaded(folder, target, *options):
    args = cli.parse_args(["--checkpoint", str(folder), "--eagle", str(folder), "--tree", "static", *options])
    args.compile = False
    return cli.load_head(args, target)[0], args


def test_draft_mode_rounds_the_layers_and_leaves_the_lm_head(target, tmp_path):
    folder = write_eagle3(tmp_path / "head", target.config)
    head, args = loaded(folder, target)
    assert args.draft_mode == "off" and not any(isinstance(module, QuantLinear) for module in head.modules())
    for mode in ("int8", "int4"):
        head, _ = loaded(folder, target, "--draft-mode", mode)
        assert {name for name, module in head.named_modules() if isinstance(module, QuantLinear)} == {
            "fc", "layer.attention.wqkv", "layer.attention.wo", "layer.feed_forward.w13", "layer.feed_forward.w2"}
        assert quantized(folder, tmp_path / mode, "--mode", mode) == 0
        assert_same_drafts(head, EagleHead.from_pretrained(tmp_path / mode, target), target)
        with pytest.raises(ValueError, match="this head is quantised already"):
            loaded(tmp_path / mode, target, "--draft-mode", mode)


@pytest.mark.parametrize("dim, mode", [(64, "int4"), (80, "off")])
def test_the_default_draft_mode_on_a_cpu_is_int4_where_all_widths_fit(tmp_path, dim, mode):
    """fc of the second head takes 3 * 80 = 240 columns."""
    folder, _ = tiny("gqa", tmp_path / "target", num_hidden_layers=N_LAYER, hidden_size=dim)
    target = Transformer.from_pretrained(folder, dtype=torch.bfloat16)
    head_folder = write_eagle3(tmp_path / "head", target.config, target_hidden_size=dim)
    head, args = loaded(head_folder, target)
    assert args.draft_mode == mode and isinstance(head.fc, QuantLinear) == (mode == "int4")
    if mode == "off":
        with pytest.raises(ValueError, match="group size 32 does not divide a row of 240 weights"):
            loaded(head_folder, target, "--draft-mode", "int4")


# ---------------------------------------------------------------------------------------------------------------------
# Draft vocabularies

def test_draft_vocab_off_is_the_heads_own_and_n_the_first_of_the_file(target, tmp_path, capsys):
    folder = write_eagle3(tmp_path / "head", target.config)
    own = EagleHead.from_pretrained(folder, target).own_ids.tolist()
    file = own[10:30][::-1]
    (folder / "draft_vocab.json").write_text(json.dumps({"ids": file}))
    for options, ids in (((), file), (("--draft-vocab", "7"), file[:7]), (("--draft-vocab", "off"), own)):
        head, _ = loaded(folder, target, *options)
        assert head.draft_ids.tolist() == ids
        logits = drafts(head, target)[2]
        whole = head.output(head.norm(drafts(head, target)[0]))
        assert_close(logits, whole[..., [own.index(i) for i in ids]], 1e-6)
        assert_lossless(head, target, ["chain:3", "dynamic:3,4,12"])
    (tmp_path / "other.json").write_text(json.dumps([*set(range(V)) - set(own)][:5]))
    with pytest.raises(ValueError, match="different token ids out of its own 40"):
        loaded(folder, target, "--draft-vocab", str(tmp_path / "other.json"))


def test_a_whole_vocabulary_needs_no_tables(target, tmp_path):
    head, _ = loaded(write_eagle3(tmp_path / "head", target.config, n_draft=V), target, "--draft-vocab", "off")
    assert head.draft_ids is None
    assert_lossless(head, target)


# ---------------------------------------------------------------------------------------------------------------------
# Several processes

TREE = DynamicTree(2, 3, 8)
CASES = [(FEW, None, {}), (TREE, None, {}), (StaticTree.chain(3), None, {}),
         (FEW, None, dict(temperature=1.0, top_k=20, seed=4)), (TREE, None, dict(temperature=0.7, seed=5))]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """zoo(kind) -> folders of a target and an EAGLE-3 head."""

    @functools.cache
    def make(kind):
        folder = tmp_path_factory.mktemp("eagle3")
        tied = dict(num_key_value_heads=2, vocab_size=97) if kind == "tied" else {}
        tiny("llama2_tied" if tied else "gqa", folder / "target", **{"num_hidden_layers": N_LAYER} | tied)
        target = Transformer.from_pretrained(folder / "target", dtype=torch.float32)
        write_eagle3(folder / "head", target.config, target_hidden_size=target.config.dim)
        if kind != "int8":
            return str(folder / "target"), str(folder / "head")
        for name, options in (("target", ("--lm-head", "int8")), ("head", ())):
            assert quantized(folder / name, folder / f"{name}-q", "--mode", "int8", *options) == 0
        return str(folder / "target-q"), str(folder / "head-q")

    return make


@pytest.mark.parametrize("kind", ["16 bits", "int8", "tied"])
def test_text_of_two_processes_equals_one(group, zoo, kind):
    """Greedy cases never put all logits together; the ranks compare their tokens after each step."""
    folders, cases = zoo(kind), CASES if kind == "16 bits" else CASES[1:4:2]
    assert group(2)(answers, *folders, cases, (3,)) == [answers(*folders, cases, (3,))] * 2
    if kind == "16 bits":
        own = EagleHead.from_pretrained(folders[1], Transformer.from_pretrained(folders[0])).own_ids.tolist()
        cases = [(TREE, own[30:8:-1], {}), (FEW, own[30:8:-1], dict(temperature=1.0, seed=4))]
        assert group(2)(answers, *folders, cases) == [answers(*folders, cases)] * 2


def test_every_rank_holds_the_whole_head_and_its_part_of_the_targets_embedding(zoo):
    folder, head_folder = zoo("16 bits")
    one = EagleHead.from_pretrained(head_folder, Transformer.from_pretrained(folder, dtype=torch.float32))
    shard = tp.Shard(1, 2)
    model = Transformer.from_pretrained(folder, dtype=torch.float32, shard=shard)
    head = EagleHead.from_pretrained(head_folder, model, shard=shard)
    for ours, theirs in zip(head.parameters(), one.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert head.target.tok_embeddings.weight.shape == (V // 2, H)


# ---------------------------------------------------------------------------------------------------------------------
# The plan

@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", ["16 bits", "int8", "tied"])      # the last has an embedding of its own
def test_the_plan_counts_what_a_rank_allocates(zoo, kind, world):
    folder, head_folder = zoo(kind)
    shard = tp.Shard(0, world)
    model = Transformer.from_pretrained(folder, dtype=torch.float32, shard=shard)
    head = EagleHead.from_pretrained(head_folder, model, shard=shard)
    setup_caches(model, head, 3, 64)
    config, settings = plan.describe(folder)
    planned = plan.make_plan(config, world, head=plan.describe_head(head_folder, config, folder), settings=settings,
                             context=64, batch=3)
    stored = [tensor for module in head.modules() if isinstance(module, QuantLinear)
              for tensor in module.stored().values()]
    stored += [weight for name, weight in head.named_parameters() if ".layouts." not in name]   # of a CPU's kernels
    assert planned.head == sum(tensor.numel() * (2 if tensor.is_floating_point() else 1) for tensor in stored)
    assert planned.caches == 2 * (model.kv_cache.numel() + head.kv_cache.numel())
    without = plan.make_plan(config, world, settings=settings, context=64, batch=3)
    assert planned.weights == without.weights and planned.workspace >= without.workspace + 2 * 3 * 64 * 3 * config.dim


def test_the_plan_of_llama_3_1_8b_recomputed_from_its_shape(capsys):
    """LLaMA-3.1-8B's published head: 4096 wide, three hidden states, 32000 draft tokens, feed-forward of 14336."""
    assert plan.main(plan.parse_args("llama-3.1-8b --world-size 2 --head eagle3 --context 2048".split())) == 0
    lines = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    h = 4096
    head = 3 * h * h + 2 * h * (h + 2 * 1024) + h * h + 3 * h * 14336 + 32000 * h + 4 * h
    assert lines["head"] == f"{2 * head / 1e9:.2f}"
    assert lines["caches"] == f"{(32 / 2 + 1) * 2 * 2048 * 1024 * 2 / 1e9:.2f}"


def test_the_plans_speed_is_what_a_step_reads():
    """accepted length / (1 + (fc + levels * (layer + LM head)) / target), for one process with nothing else to read."""
    config = plan.SHAPES["llama-3.1-8b"]
    h, target = 4096, 2 * (8_030_261_248 - 128256 * 4096)
    fc, layer = 2 * 3 * h * h, 2 * (2 * h * (h + 2 * 1024) + h * h + 3 * h * 14336)
    planned = plan.make_plan(config, 1, head=plan.describe_head("eagle3", config, "llama-3.1-8b"), context=1,
                             accept_length=4.0)
    bound = 4.0 / (1 + (fc + 5 * (layer + 2 * 32000 * h)) / target)
    assert planned.eagle / planned.plain == pytest.approx(bound, rel=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation and demo

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny target with a tokenizer and two layers: its head's hidden states are named by --aux-layers."""
    folder = tmp_path_factory.mktemp("pair")
    write_checkpoint(folder / "tiny", ascii_only=True)
    target = Transformer.from_pretrained(folder / "tiny", dtype=torch.float32)
    return folder / "tiny", write_eagle3(folder / "head", target.config)


def test_evaluate_answers_as_plain_decoding_and_binds_a_run_to_the_heads_options(pair, tmp_path, capsys):
    (tmp_path / "set.jsonl").write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["the fox", "and"]}))
    argv = ["--questions", tmp_path / "set.jsonl", "--checkpoint", pair[0], "--eagle", pair[1], "--out",
            tmp_path / "out", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 16, "--tree", "chain:3",
            "dynamic:3,4,12"]

    def run(*options):
        return evaluate.main(evaluate.parse_args([str(x) for x in (*argv, *options)]))

    assert run("--aux-layers", 0, 1, 2) == 0
    made = json.loads((tmp_path / "out/report.json").read_text())
    assert len(made["arms"]) == 3
    assert all(made["overall"][arm]["identical"] == 2 for arm in made["arms"][1:])
    assert run("--aux-layers", 0, 1, 2) == 0    # finished: it only writes the report again
    for options, names in ((("--aux-layers", 0, 1, 1), "with aux_layers [0, 1, 2], now it is [0, 1, 1]"),
                           (("--aux-layers", 0, 1, 2, "--draft-rope-theta", 1e4), "with draft_rope_theta None"),
                           (("--aux-layers", 0, 1, 2, "--draft-window", 8), "with draft_window None, now it is 8")):
        capsys.readouterr()
        assert run(*options) == 2
        assert names in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("n_new", [12, 1])
def test_the_demo_decodes_with_an_eagle3_head(pair, capsys, n_new):
    """One new token is the prefill's: no step, no speed."""
    argv = ["--checkpoint", str(pair[0]), "--eagle", str(pair[1]), "--prompt", "the fox", "a dog", "--tree", "static",
            "--max-new-tokens", str(n_new), "--dtype", "float32", "--device", "cpu", "--aux-layers", "0", "1", "2"]
    assert demo.main(demo.parse_args(argv)) == 0
    out, err = capsys.readouterr()
    assert "a tree of 25 drafts and 8 copied ones" in err and len(re.findall(r"\(\d+\.\d+x\)", out)) == 3 * (n_new > 1)
    assert "2 of 2 texts equal" in out and "EAGLE-3 head: hidden states 0, 1, 2 (--aux-layers)" in err


# ---------------------------------------------------------------------------------------------------------------------
# Benchmarks

def test_random_eagle3_heads_have_the_published_parameter_counts():
    for name, n in (("llama-3.1-8b", 424_689_664), ("qwen3-8b", 399_523_840)):
        head = shapes.random_head(shapes.meta_model(shapes.SHAPES[name], torch.bfloat16), name, "eagle3")
        assert {(p.device.type, p.dtype) for p in head.parameters()} == {("meta", torch.bfloat16)}
        assert sum(p.numel() for p in head.parameters()) == n and len(head.draft_ids) == 32000
    assert head.capture == (2, 18, 33)


@pytest.mark.parametrize("n_draft", [None, 50])
def test_the_parts_of_an_eagle3_step_are_timed_with_the_bytes_they_read(tmp_path, monkeypatch, n_draft):
    monkeypatch.setattr(bench, "LONG_PROMPT", 40)
    monkeypatch.setattr(bench, "ROUNDS", 1)
    monkeypatch.setitem(timing.BUFFER, "cpu", 1 << 24)
    monkeypatch.setattr(shapes, "DRAFT_VOCAB", 200)
    argv = "--shape tiny --head eagle3 --rows 1 --slots 64 --trees dynamic:3,4,12 --new-tokens 4 --device cpu"
    argv += f" --repeats 1 --json {tmp_path}/report.json" + (f" --draft-vocab {n_draft}" if n_draft else "")
    assert bench.main(bench.parse_args(argv.split())) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    n_byte = {row["part"].removeprefix("dynamic:3,4,12: "): row["bytes"] for row in report["steps"]}
    fc, lm_head, cache = 3 * 64 * 64, (n_draft or 200) * 64, 2 * 64 * 64
    layer = 128 * 3 * 64 + 64 * 64 + 3 * 64 * 128 + 4 * 64      # wqkv, wo, the feed-forward and the norms
    assert n_byte["ingest"] == 2 * (fc + layer + cache)
    assert n_byte["one draft level"] == 2 * (layer + cache + lm_head) == report["eagle"][0]["level_bytes"]
    assert n_byte["draft LM head"] == 2 * lm_head
    assert n_byte["grow"] == n_byte["draft LM head"] + 2 * n_byte["one draft level"]
    assert n_byte["whole step"] == n_byte["ingest"] + n_byte["grow"] + n_byte["verify"]
    assert report["head"] == "eagle3" and report["head_parameters"] == fc + layer + 200 * 64


# ---------------------------------------------------------------------------------------------------------------------
# Export

@pytest.fixture
def export(tmp_path, capsys):
    """export(head, engine, *options) -> (config, weights) of the folder written, or the error."""
    def export(head, engine, *options):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        argv = ["--head", str(head), "--for", engine, "--out", str(tmp_path / "out"), *options]
        capsys.readouterr()
        if export_head.main(export_head.parse_args(argv)):
            return one_line(capsys)
        return (json.loads((tmp_path / "out/config.json").read_text()),
                read_safetensors(tmp_path / "out/model.safetensors"))
    return export


LAYERS = "eagle_aux_hidden_state_layer_ids"
DIALECTS = {    # keys of the head's config.json and weights; the hidden states it reads
    "none named": ({}, (2, 4, 5)),
    "outputs": (dict(eagle_config={LAYERS: [1, 4, 6]}), (2, 5, 7)),
    "inputs": ({LAYERS: [2, 3, 6], "prefix": "layers.0."}, (2, 3, 6)),
    "whole vocabulary": (dict(n_draft=V), (2, 4, 5)),
    "whole vocabulary in another order": (dict(n_draft=V, shuffled=True), (2, 4, 5)),
    "scaled RoPE": (dict(rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                           original_max_position_embeddings=64)), (2, 4, 5)),
    "scaled RoPE, its base apart": (dict(rope_parameters=dict(rope_theta=5e4), rope_scaling=dict(
        rope_type="linear", factor=4.0)), (2, 4, 5)),
    "YaRN": (dict(rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)), (2, 4, 5)),
    "dynamic RoPE": (dict(rope_scaling=dict(type="dynamic", factor=4.0), max_position_embeddings=16), (2, 4, 5)),
    "no theta": (dict(rope_theta=None), (2, 4, 5)),
}


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
@pytest.mark.parametrize("changes, capture", DIALECTS.values(), ids=list(DIALECTS))
def test_an_exported_head_is_read_here_with_equal_drafts(target, tmp_path, export, engine, changes, capture):
    folder = write_eagle3(tmp_path / "head", target.config, **changes)
    with edited_json(folder / "config.json") as config:
        if config["rope_theta"] is None:
            del config["rope_theta"]
    ours = EagleHead.from_pretrained(folder, target)
    config, weights = export(folder, engine)
    theirs = EagleHead.from_pretrained(tmp_path / "out", target)
    assert_same_drafts(ours, theirs, target)
    assert ours.capture == theirs.capture == capture
    named = list(capture) if changes.get("eagle_config") or LAYERS in changes else None
    if engine == "sglang":
        assert config["architectures"] == ["LlamaForCausalLMEagle3"]
        assert config.get("eagle_config", {}).get(LAYERS) == (named and [j - 1 for j in named])
        layer, inner = "midlayer.", config
    else:
        assert config["speculators_model_type"] == "eagle3" and config["norm_before_residual"] is False
        assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 5
        assert config.get(LAYERS) == named
        layer, inner = "layers.0.", config["transformer_layer_config"]
    assert inner["rope_theta"] == (1e4 if "rope_theta" in changes else 5e4) and inner["head_dim"] == 16
    assert config["draft_vocab_size"] == len(weights["lm_head.weight"])
    tables = {"d2t", "t2d"} if "n_draft" not in changes or "shuffled" in changes else set()
    assert set(weights) == {"fc.weight", "norm.weight", "lm_head.weight", f"{layer}hidden_norm.weight"} | tables | {
        f"{layer}{name}.weight" for name in (*LINEARS, "input_layernorm", "post_attention_layernorm")}
    if tables:
        ids = weights["d2t"] + torch.arange(len(weights["d2t"]))
        assert weights["t2d"].nonzero()[:, 0].tolist() == ids.sort().values.tolist()


@pytest.mark.parametrize("changes, name", [
    (dict(norm_before_residual=True), "norm_before_residual"), (dict(fc_norm=True), "fc_norm"),
    (dict(norm_before_fc=True), "norm_before_fc"), (dict(n_layer=2), "2 layers"),
    (dict(speculators_model_type="eagle3", norm_output=True), "norm_output")])
def test_what_sglang_lacks_is_refused_by_name_and_kept_for_vllm(target, tmp_path, export, changes, name):
    folder = write_eagle3(tmp_path / "head", target.config, **changes)
    assert name in export(folder, "sglang") and not (tmp_path / "out").exists()
    export(folder, "vllm")
    assert_same_drafts(EagleHead.from_pretrained(folder, target), EagleHead.from_pretrained(tmp_path / "out", target),
                       target)


def test_a_narrow_head_keeps_its_own_embedding(tmp_path, export):
    target = Transformer.from_pretrained(tiny("gqa", tmp_path / "target", num_hidden_layers=N_LAYER, hidden_size=32)[0],
                                         dtype=torch.float32)
    folder = write_eagle3(tmp_path / "head", target.config, target_hidden_size=32, dtype=torch.float16)
    for engine in ("sglang", "vllm"):
        config, weights = export(folder, engine, "--context", "4096")
        assert weights["embed_tokens.weight"].shape == (V, H) and weights["fc.weight"].dtype == torch.float16
        assert config["target_hidden_size"] == 32
        assert (config if engine == "sglang" else config["transformer_layer_config"])["max_position_embeddings"] == 4096
        assert_same_drafts(EagleHead.from_pretrained(folder, target),
                           EagleHead.from_pretrained(tmp_path / "out", target), target)


def test_heads_that_neither_engine_reads_are_refused_in_one_line(target, tmp_path, export):
    folder = write_eagle3(tmp_path / "head", target.config)
    with edited_json(folder / "config.json") as config:
        config["hidden_norm_after"] = True
    assert "hidden_norm_after" in export(folder, "vllm")
    single = write_eagle3(tmp_path / "single", target.config)
    weights = read_safetensors(single / "model.safetensors")
    save_file(weights | {"fc.weight": weights["fc.weight"][:, :H].contiguous()}, single / "model.safetensors")
    assert "takes 1 hidden states" in export(single, "sglang")
    assert quantized(write_eagle3(tmp_path / "plain", target.config), tmp_path / "q", "--mode", "int8") == 0
    assert "a quantised head is not exported" in export(tmp_path / "q", "vllm")


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
@pytest.mark.parametrize("is_copy", [True, False])
def test_an_embedding_on_file_is_kept(target, tmp_path, export, engine, is_copy):
    """Without the target a copy of its table is not told from one of the head's own."""
    folder = write_eagle3(tmp_path / "head", target.config)
    weights = read_safetensors(folder / "model.safetensors")
    table = target.tok_embeddings.weight.clone() if is_copy else torch.randn(V, H)
    save_file(weights | {"embed_tokens.weight": table}, folder / "model.safetensors")
    assert torch.equal(export(folder, engine)[1]["embed_tokens.weight"], table)
    ours, theirs = (EagleHead.from_pretrained(tmp_path / name, target) for name in ("head", "out"))
    assert ours.spec.own_embedding == theirs.spec.own_embedding == (not is_copy)
    assert_same_drafts(ours, theirs, target)
