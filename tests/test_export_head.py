"""scripts/export_head.py: an EAGLE-1 head as vLLM and SGLang read it. EAGLE-3 heads are in test_eagle3_tools.py.

    python -m pytest tests/test_export_head.py -q

The engines are not installed. What they expect is taken from their sources.
"""
import json
import shutil
from pathlib import Path

import pytest
import torch

from eagle_head import EagleHead
from model import Transformer
from reference import edited_json, read_safetensors, tiny
from scripts import export_head
from test_eagle import head_config, head_weights, write_head

OFFICIAL = {"fc.weight", "layers.0.post_attention_layernorm.weight"} | {
    f"layers.0.{name}_proj.weight"
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder, _ = tiny("gqa", tmp_path_factory.mktemp("target"))
    return Transformer.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def export(target, tmp_path, capsys):
    """export(engine, **changes of config.json) -> (status, config, weights, the head's own weights, stderr)."""

    def export(engine, embedding=True, options=(), **changes):
        config = head_config(target, **({"eagle_version": 1, "torch_dtype": "float32"} | changes))
        config["target"] = "someone/tiny"
        weights = head_weights(config, target.tok_embeddings.weight if embedding else None)
        write_head(tmp_path / "head", config, weights)
        argv = ["--head", str(tmp_path / "head"), "--for", engine, "--out", str(tmp_path / "out"), *options]
        status = export_head.main(export_head.parse_args(argv))
        err = capsys.readouterr().err
        if status:
            return status, None, None, weights, err
        config = json.loads((tmp_path / "out/config.json").read_text())
        return status, config, read_safetensors(tmp_path / "out/model.safetensors"), weights, err

    return export


@pytest.mark.parametrize("engine, architecture", [("vllm", "LlamaForCausalLM"), ("sglang", "LlamaForCausalLMEagle")])
def test_keys_values_and_fields_are_the_engines(export, engine, architecture):
    _, config, weights, own, _ = export(engine, bias=False)
    assert config["architectures"] == [architecture]
    assert config["model_type"] == "llama" and config["num_hidden_layers"] == 1
    assert set(weights) == OFFICIAL | ({"fc.bias"} if engine == "sglang" else set())
    for key in OFFICIAL:
        assert torch.equal(weights[key], own[key])
    assert config.get("bias") is (False if engine == "vllm" else None)
    assert not {"qkv_bias", "attention_bias", "eagle_version", "target"} & set(config)
    for key in ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "intermediate_size",
                "rms_norm_eps"):
        assert config[key]


def test_sglang_always_gets_a_bias_of_fc(export):
    assert not export("sglang", bias=False)[2]["fc.bias"].any()
    _, _, weights, own, _ = export("sglang")
    assert torch.equal(weights["fc.bias"], own["fc.bias"]) and own["fc.bias"].any()


def test_vllm_takes_no_bias_of_fc(export):
    status, _, _, _, err = export("vllm")
    assert status == 2 and "no fc.bias" in err and "--no-bias" in err and err.count("\n") == 1


def test_biases_of_q_k_and_v(export):
    _, config, weights, own, _ = export("vllm", bias=False, qkv_bias=True)
    assert config["qkv_bias"] is True and "attention_bias" not in config
    assert "layers.0.self_attn.o_proj.bias" not in weights
    _, config, weights, own, _ = export("sglang", qkv_bias=True)
    assert config["attention_bias"] is True and not weights["layers.0.self_attn.o_proj.bias"].any()
    assert torch.equal(weights["layers.0.self_attn.q_proj.bias"], own["layers.0.self_attn.q_proj.bias"])


def test_the_draft_vocabulary_becomes_sglangs_token_map(export, tmp_path):
    (tmp_path / "head").mkdir()
    (tmp_path / "head/draft_vocab.json").write_text('{"ids": [5, 3, 9]}')
    export("sglang")
    assert torch.load(tmp_path / "out/token_map.pt", weights_only=True) == [5, 3, 9]


def test_an_exported_head_is_still_a_head(export, target, tmp_path):
    """With "bias" put back, which SGLang must not see, it is the same head here."""
    export("sglang")
    with edited_json(tmp_path / "out/config.json") as config:
        config["bias"], config["architectures"] = True, ["LlamaForCausalLM"]
    ours, theirs = (EagleHead.from_pretrained(tmp_path / name, target) for name in ("head", "out"))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_vllm_gets_is_read_here_unchanged(export, target, tmp_path):
    export("vllm", bias=False)
    ours, theirs = (EagleHead.from_pretrained(tmp_path / name, target) for name in ("head", "out"))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_context_is_told_for_sglang_and_raised_on_request(export):
    _, config, _, _, err = export("sglang", max_position_embeddings=2048)
    assert config["max_position_embeddings"] == 2048
    assert "2048" in err and "SGLang refuses" in err and "--context" in err
    assert "refuses" not in export("vllm", bias=False)[4]
    _, config, _, _, err = export("sglang", options=["--context", "32768"], max_position_embeddings=2048)
    assert config["max_position_embeddings"] == 32768 and "refuses" not in err
    for options, changes, word in (("1024", {}, "less than"),
                                   ("4096", dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "dynamic"),
                                   ("4096", dict(rope_parameters={"rope_type": "yarn", "factor": 2.0}), "yarn")):
        status, *_, err = export("sglang", options=["--context", options], max_position_embeddings=2048, **changes)
        assert status == 2 and word in err and err.count("\n") == 1


def test_a_quantised_head_is_refused_by_name(target, tmp_path, capsys):
    config = head_config(target)
    write_head(tmp_path / "head", config, head_weights(config, None))
    (tmp_path / "head/quantize.json").write_text('{"mode": "int8", "group_size": null, "method": "rtn"}')
    argv = ["--head", str(tmp_path / "head"), "--for", "vllm", "--out", str(tmp_path / "out")]
    assert export_head.main(export_head.parse_args(argv)) == 2
    err = capsys.readouterr().err
    assert "quantised head is not exported" in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes, message", [
    (dict(architectures=["LlamaForCausalLMEagle3"]), "an EAGLE-3 head has no biases"),
    (dict(eagle_version=4), "eagle_version 4 is not known"), (dict(intermediate_size=48), "mlp.")])
def test_other_heads_are_refused_in_one_line(export, target, tmp_path, capsys, changes, message):
    export("sglang")
    shutil.rmtree(tmp_path / "out")
    with edited_json(tmp_path / "head/config.json") as config:
        config |= changes
    argv = ["--head", str(tmp_path / "head"), "--for", "sglang", "--out", str(tmp_path / "out")]
    assert export_head.main(export_head.parse_args(argv)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not Path(tmp_path / "out").exists()
