"""Heads as other engines' converters leave them, draft vocabularies and trees as users have them.

    python -m pytest tests/test_head_formats.py -q
"""
import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from checkpoint import load_weights
from draft_tree import load_tree
from eagle_head import EagleHead, official_key
from generate import load_draft_vocab, shipped_head
from test_eagle import head_config, head_weights, load, tiny, write_head, written_out_head


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return load(tiny("gqa", tmp_path_factory.mktemp("target"))[0])


@pytest.fixture
def official(target):
    """config.json and weights of a head in the official format, without fc's bias."""
    torch.manual_seed(0)
    config = head_config(target, bias=False)
    return config, head_weights(config, None)


def drafted(head):
    """Features [8, dim] of the head over a fixed input, without a cache."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(head.config.vocab_size, (1, 8), generator=generator)
    features = torch.randn(1, 8, head.config.dim, generator=generator)
    return tokens[0], features[0], head(tokens, features, torch.arange(8))[0]


def renamed(weights, names):
    for theirs, ours in names:
        weights = {theirs + key.removeprefix(ours) if key.startswith(ours) else key: w for key, w in weights.items()}
    return weights


def nested(config):
    """As the converters for vLLM's EAGLE leave config.json: the official one, inside."""
    return {"model_type": "eagle", "model": config}


def speculators(config):
    inner = {key: value for key, value in config.items() if key not in ("bias", "architectures")}
    return {"architectures": ["EagleSpeculator"], "speculators_model_type": "eagle", "speculators_version": "0.1.0",
            "transformer_layer_architecture": "LlamaDecoderLayer", "transformer_layer_config": inner,
            "layernorms": False, "fusion_bias": "bias" in config and config["bias"],
            "speculators_config": {"algorithm": "eagle", "verifier": {"name_or_path": "target", "architectures": []}}}


SPECULATORS = [("fusion_fc.", "fc."), ("transformer.", "layers.0.")]


@pytest.mark.parametrize("convert, names, bias", [
    (nested, [], None), (nested, [], True), (nested, [("model.layers.", "layers.")], None),
    (lambda config: config, [("model.layers.", "layers."), ("model.fc.", "fc.")], False),
    (lambda config: config, [("model.model.layers.", "layers.")], True),
    (speculators, SPECULATORS, False), (speculators, SPECULATORS, True)],
    ids=["vllm", "vllm, bias", "vllm, prefix", "prefix", "two prefixes", "speculators", "speculators, bias"])
@pytest.mark.parametrize("with_target", [False, True], ids=["alone", "with embedding and LM head"])
def test_a_converted_head_drafts_what_the_official_one_does(target, tmp_path, convert, names, bias, with_target):
    torch.manual_seed(0)
    config = head_config(target, bias=bool(bias))
    weights = head_weights(config, None)
    if bias is None:    # neither key says anything, and the file has none
        del config["bias"]
    elif convert is nested:
        config["eagle_fc_bias"] = config.pop("bias")
    stored = renamed(weights, names)
    if with_target:
        table = target.tok_embeddings.weight
        lm_head = "model.lm_head.weight" if names else "lm_head.weight"
        stored |= {"embed_tokens.weight": table.clone(), lm_head: table.clone()}
    head = EagleHead.from_pretrained(write_head(tmp_path / "head", convert(config), stored), target)
    tokens, features, ours = drafted(head)
    expected = written_out_head(config | {"bias": bool(bias)}, weights, target.tok_embeddings.weight, tokens, features)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-4)


def test_what_is_read_of_a_renamed_weight_goes_by_its_official_name(target, official, tmp_path):
    config, weights = official
    folder = write_head(tmp_path / "head", config, renamed(weights, SPECULATORS))
    head = EagleHead.from_pretrained(folder, target)
    asked = []
    load_weights(head.weights(), folder, rename=official_key,
                 part=lambda key, shape: asked.append(key) or (slice(None),))
    assert sorted(asked) == sorted(weights)


def test_biases_of_attention_as_sglang_has_them(target, tmp_path):
    torch.manual_seed(0)
    config = head_config(target, qkv_bias=True)
    weights = head_weights(config, None)
    zero = {"layers.0.self_attn.o_proj.bias": torch.zeros(target.config.dim)}
    theirs = {key: value for key, value in config.items() if key not in ("bias", "qkv_bias")} | {"attention_bias": True}
    head = EagleHead.from_pretrained(write_head(tmp_path / "head", theirs, weights | zero), target)
    tokens, features, ours = drafted(head)
    expected = written_out_head(config, weights, target.tok_embeddings.weight, tokens, features)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-4)
    save_file(weights | {key: tensor + 1 for key, tensor in zero.items()}, tmp_path / "head/model.safetensors")
    with pytest.raises(ValueError, match=r"o_proj.bias is not zero: a head has no bias there$"):
        EagleHead.from_pretrained(tmp_path / "head", target)


@pytest.mark.parametrize("change, message", [
    (lambda config: nested(config) | {"truncated_vocab_size": 32}, "truncated_vocab_size 32 is not supported"),
    (lambda config: nested(config | {"add_para_norm": True}), "add_para_norm True, more norms than EAGLE has"),
    (lambda config: speculators(config) | {"layernorms": True}, "layernorms True, more norms than EAGLE has"),
    (lambda config: speculators(config) | {"speculators_model_type": "eagle3"},
     "this EAGLE-3 head has no weight lm_head.weight"),
    (lambda config: speculators(config) | {"speculators_model_type": "mtp"}, "speculators_model_type 'mtp' is not"),
    (lambda config: nested(config | {"architectures": ["LlamaForCausalLMEagle3"]}),
     "this EAGLE-3 head has no weight lm_head.weight"),
    (lambda config: nested(config | {"hidden_size": 16}), "hidden_size is 16 in the head, 64 in the target"),
    (lambda config: nested({}), "no key 'hidden_size'"),
], ids=range(8))
def test_a_converted_head_of_another_kind_is_refused_by_name(target, official, tmp_path, change, message):
    config, weights = official
    with pytest.raises(ValueError, match=message) as raised:
        EagleHead.from_pretrained(write_head(tmp_path / "head", change(config), weights), target)
    assert "\n" not in str(raised.value)


def test_a_weight_that_is_there_under_two_names_is_refused(target, official, tmp_path):
    config, weights = official
    stored = weights | {"model.fc.weight": weights["fc.weight"] + 1}
    with pytest.raises(ValueError, match="fc.weight is there a second time"):
        EagleHead.from_pretrained(write_head(tmp_path / "head", config, stored), target)


def test_heads_that_are_adapters_or_git_lfs_pointers_are_named_as_such(target, official, tmp_path):
    folder = write_head(tmp_path / "head", *official)
    pointer = "version https://git-lfs.github.com/spec/v1\nsize 9\n"
    for name, text, message in [("model.safetensors", pointer, "git lfs pull"),
                                ("adapter_config.json", "{}", "merge it into its base model")]:
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            EagleHead.from_pretrained(folder, target)


# ---------------------------------------------------------------------------------------------------------------------
# Draft vocabularies and trees

IDS = [7, 3, 90, 0]
VOCABULARIES = {
    "list.json": lambda file: file.write_text(json.dumps(IDS)),
    "ids.json": lambda file: file.write_text(json.dumps({"ids": IDS, "counts": [4, 3, 2, 1]})),
    "bom.json": lambda file: file.write_text("\ufeff" + json.dumps({"ids": IDS}), encoding="utf-8"),
    "floats.json": lambda file: file.write_text(json.dumps([float(i) for i in IDS])),
    "list.pt": lambda file: torch.save(IDS, file),
    "tensor.pt": lambda file: torch.save(torch.tensor(IDS), file),
    "int32.bin": lambda file: torch.save(torch.tensor(IDS, dtype=torch.int32), file),
    "old.pt": lambda file: torch.save(torch.tensor(IDS), file, _use_new_zipfile_serialization=False),
    "dictionary.pt": lambda file: torch.save({"ids": torch.tensor(IDS)}, file),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_draft_vocabulary_is_read_in_each_form_in_use(target, official, tmp_path, name):
    VOCABULARIES[name](tmp_path / name)
    ids = load_draft_vocab(str(tmp_path / name), tmp_path)
    assert ids == IDS and all(type(i) is int for i in ids)
    VOCABULARIES[name](tmp_path / "draft_vocab.json")
    assert load_draft_vocab("2", tmp_path) == IDS[:2]


class Harmful:
    def __reduce__(self):
        return open, ("harmed", "w")


@pytest.mark.parametrize("content, message", [
    (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    (b"[1, 2", "neither valid JSON nor a file that torch saved"),
    (b"\xff\xfe1", "neither valid JSON nor a file that torch saved"),
    (b"PK\x03\x04 cut off", "neither valid JSON nor a file that torch saved"),
    (pickle.dumps([Harmful()], protocol=2), "holds more than ids, which could run code"),
    (b'"1, 2"', "a draft vocabulary is a list of token ids"),
    (b'{"tokens": [1]}', "a draft vocabulary is a list of token ids"),
], ids=range(7))
def test_a_file_that_is_no_draft_vocabulary_is_refused_in_one_line(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocabulary").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load_draft_vocab(str(tmp_path / "vocabulary"), tmp_path)
    assert "\n" not in str(raised.value) and "vocabulary" in str(raised.value)
    assert not (tmp_path / "harmed").exists()
    with pytest.raises(FileNotFoundError, match="draft_vocab.json"):
        load_draft_vocab("8", tmp_path)


def test_a_tree_file_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "tree.json").write_text("\ufeff[[0], [0, 0]]\r\n", encoding="utf-8")
    assert load_tree(str(tmp_path / "tree.json")) == load_tree("chain:2")
    (tmp_path / "tree.json").write_bytes(b"\xff[[0]]")
    with pytest.raises(ValueError, match="tree.json is not a tree"):
        load_tree(str(tmp_path / "tree.json"))


def test_no_head_ships_for_a_checkpoint_without_a_name(tmp_path, monkeypatch, target):
    """`--checkpoint .`, and heads whose config.json names no target: nothing equals nothing."""
    import generate
    (tmp_path / "heads/nobody's").mkdir(parents=True)
    (tmp_path / "heads/nobody's/config.json").write_text("{}")
    (tmp_path / "heads/mine").mkdir()
    (tmp_path / "heads/mine/config.json").write_text('{"target": "owner/my-model"}')
    (tmp_path / "my-model").mkdir()
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(generate, "__file__", str(tmp_path / "generate.py"))
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no head ships"):
        shipped_head(".")
    monkeypatch.chdir(tmp_path / "my-model")
    assert shipped_head(".") == str(tmp_path / "heads/mine")
