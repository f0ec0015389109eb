"""check_head.py names the right reading of a head's file. The heads are EAGLE-3 heads that were really trained.

    python -m pytest tests/test_check_head.py -q

A target of random weights writes short answers, and a head learns them by heart. So its drafts are right as far as it
was trained to look ahead, and a wrong reading of its file costs most of them.
"""
import contextlib
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from chat import encode
from decoder import generate
from eagle_head import Eagle3Head, EagleHead
from head_config import Eagle3Spec
from model import Transformer, rope_inv_freq
from reference import edited_json, naive_decode, read_safetensors, write_checkpoint
from scripts import check_head, tune_tree
from test_scripts import write_head
from tokenizer import Tokenizer
from train_loss import draft_ranks, level_mask

QUESTIONS = ["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op"]
LENGTH = 24     # of an answer
LEVELS = 3      # that a head is trained to look ahead


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Folder, model, prompts and answers. Eight layers, and another RoPE base than the usual one."""
    folder = write_checkpoint(tmp_path_factory.mktemp("target"), ascii_only=True, num_hidden_layers=8, hidden_size=32,
                              num_attention_heads=4, rope_theta=500.0)
    (folder / "questions.jsonl").write_text("\n".join(json.dumps({"turns": [text]}) for text in QUESTIONS))
    model = Transformer.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_pretrained(folder)
    prompts = [encode(text, tokenizer, raw=False) for text in QUESTIONS]
    answers = generate(model, prompts, LENGTH).tokens
    return folder, model, prompts, answers


def train(target, capture, theta, steps=140, **flags):
    """Weights under the authors' keys of a head that has learned the answers. Its draft vocabulary is theirs."""
    _, model, prompts, answers = target
    torch.manual_seed(0)
    texts = torch.tensor([prompt + answer for prompt, answer in zip(prompts, answers)])
    ids = torch.tensor(answers).unique()        # sorted
    rows = torch.full((model.config.vocab_size,), -1)
    rows[ids] = torch.arange(len(ids))
    args = replace(model.config, n_layer=1, rope_theta=theta)
    head = Eagle3Head(Eagle3Spec(args, model.config.dim, capture, len(ids), own_embedding=False, **flags), model)
    for name, parameter in head.named_parameters():
        parameter.requires_grad_(True)
        if "norm" not in name:      # large enough for attention to look at positions
            torch.nn.init.normal_(parameter, std=0.25 if "wqkv" in name else 0.15)
    model.kv_cache = None
    features = model.features(texts, torch.arange(texts.shape[1]), capture=capture)[:, :-2]
    n_pair, first = texts.shape[1] - 2, len(prompts[0]) - 2      # the pair whose draft is the first token of the answer
    mask, pos = level_mask(n_pair, LEVELS, texts.device), torch.arange(n_pair).repeat(LEVELS)

    def outputs(inputs):
        n = inputs.shape[1]
        return head(texts[:, 1:-1].repeat(1, n // n_pair), inputs, pos[:n], mask=mask[:, :n, :n], is_draft=True)

    optimizer = torch.optim.AdamW(head.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 6e-3 * (1 - step / steps) + 1e-4
        inputs = head.fuse(features)
        for _ in range(LEVELS - 1):     # a level's inputs are the outputs of the one before, a position further on
            with torch.no_grad():
                own = outputs(inputs)[:, -n_pair:]
            inputs = torch.cat((inputs, own[:, :1], own[:, :-1]), dim=1)
        loss = 0
        for level, own in enumerate(outputs(inputs).split(n_pair, dim=1)):
            labels = rows[texts[:, 2 + first + level:]]
            loss = loss + F.cross_entropy(head.draft_logits(own[:, first + level:]).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {key.replace("layers.0.", "midlayer."): tensor.detach().clone() for key, tensor in head.weights().items()}
    return weights | {"d2t": ids - torch.arange(len(ids))}


@pytest.fixture(scope="module")
def plain_weights(target):
    return train(target, (2, 4, 5), 1e4)


@pytest.fixture(scope="module")
def other_weights(target):
    return train(target, (1, 3, 4), 500.0, norm_before_residual=True)


@pytest.fixture
def check(target, tmp_path, capsys):
    """Write a head with these keys of config.json, and run check_head.py: the lines of stdout, and the JSON."""
    folder, model, _, _ = target

    def run(weights, *options, status=0, **config):
        (tmp_path / "head").mkdir(exist_ok=True)
        c = model.config
        (tmp_path / "head/config.json").write_text(json.dumps({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1, "hidden_size": c.dim,
            "vocab_size": c.vocab_size, "num_attention_heads": c.n_head, "num_key_value_heads": c.n_kv_head,
            "intermediate_size": c.intermediate_size, "rms_norm_eps": c.norm_eps, "hidden_act": "silu",
            "draft_vocab_size": len(weights["lm_head.weight"]), **config}))
        save_file(weights, tmp_path / "head/model.safetensors")
        return again(*options, status=status)

    def again(*options, status=0):
        args = check_head.parse_args([
            str(folder), str(tmp_path / "head"), "--dtype", "float32", "--max-new-tokens", str(LENGTH), "--questions",
            str(folder / "questions.jsonl"), "--json", str(tmp_path / "out.json"), *options])
        capsys.readouterr()
        assert check_head.main(args) == status
        out, err = capsys.readouterr()
        run.err, run.head = err, tmp_path / "head"
        return out.splitlines(), json.loads((tmp_path / "out.json").read_text()) if out else None

    run.again = again
    return run


def best_of(report):
    best, = [reading for reading in report["readings"] if reading["best"]]
    return best


def test_a_head_read_as_it_was_trained_is_the_best_and_the_table_is_what_decoding_takes(target, plain_weights, check):
    _, model, prompts, answers = target
    lines, report = check(plain_weights)
    assert lines[0] == report["resolution"] == EagleHead.from_pretrained(check.head, model).spec.describe()
    assert "hidden states 2, 4, 5 (the default)" in lines[0] and lines[0] in check.err
    assert lines[-1] == report["verdict"] == "The reading taken is the best."
    assert report["answers"] == len(QUESTIONS) and report["complete"]
    names = ["as read", "hidden states 1, 3, 4 (one down)", "hidden states 3, 5, 6 (one up)", "RoPE base 500 "
             "(the target's)", "norm_before_residual on", "norm_output on"]
    table = lines[2:3 + len(names)]
    assert [reading["name"] for reading in report["readings"]] == names
    assert all(line.startswith(name) for name, line in zip(names, table[1:]))
    assert ["*" in line for line in table[1:]] == [True] + 5 * [False]
    taken, *others = report["readings"]
    assert min(taken["acceptance_by_depth"][:LEVELS]) > 0.95 and taken["accept_length"] > 3.5
    assert all(other["accept_length"] < 0.9 * taken["accept_length"] for other in others)
    for reading in report["readings"][:4]:      # those that generate.py can be told by options
        options = reading["options"]
        head = EagleHead.from_pretrained(
            check.head, model, aux_layers=[*map(int, options[1:])] if "--aux-layers" in options else None,
            rope_theta=float(options[1]) if "--draft-rope-theta" in options else None)
        steps = []
        for prompt, answer in zip(prompts, answers):
            done = 0
            for n in generate(model, [prompt], LENGTH, head=head, tree="chain:5").accept_lengths[0]:
                if done < LENGTH - 4:       # later steps look past the end
                    steps.append(n)
                done += n
        assert reading["accept_length"] == pytest.approx(sum(steps) / len(steps))
        reached = [sum(n > depth for n in steps) for depth in range(6)]
        assert reading["acceptance_by_depth"] == pytest.approx(
            [deep / above if above else 0 for above, deep in zip(reached, reached[1:])])
        figures = [f"{value:.3f}" for value in (reading["accept_length"], *reading["acceptance_by_depth"])]
        assert table[1 + names.index(reading["name"])].split()[-6:] == figures


@pytest.mark.parametrize("config, options", [
    (dict(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}), []),       # outputs of layers
    (dict(rope_theta=1e4, eagle_aux_hidden_state_layer_ids=[2, 4, 5]), []),
    (dict(rope_theta=1e6), ["--draft-rope-theta", "10000"]), ({}, ["--aux-layers", "2", "4", "5"])])
def test_other_files_that_mean_the_same_are_read_right(plain_weights, check, config, options):
    lines, report = check(plain_weights, *options, **config)
    assert lines[-1] == "The reading taken is the best." and report["readings"][0]["accept_length"] > 3.5


def test_a_list_of_outputs_that_was_meant_as_inputs(other_weights, check):
    config = dict(norm_before_residual=True, rope_theta=500.0, eagle_aux_hidden_state_layer_ids=[1, 3, 4])
    lines, report = check(other_weights, **config)
    assert lines[-1].startswith("Better: hidden states 1, 3, 4 (one down), ") and "Give --aux-layers 1 3 4;" in lines[-1]
    assert best_of(report)["options"] == ["--aux-layers", "1", "3", "4"]
    lines, report = check.again(*best_of(report)["options"])
    assert lines[-1] == "The reading taken is the best." and report["readings"][0]["accept_length"] > 3.5
    assert "hidden states 2, 4, 5 (the file's)" in [reading["name"] for reading in report["readings"]]
    lines, report = check.again("--aux-layers", "0", "2", "3")
    assert "Give --aux-layers 1 3 4;" in lines[-1] and best_of(report)["name"].endswith("(one up)")


@pytest.mark.parametrize("weights, config, base, source", [
    ("plain_weights", dict(rope_theta=1e6), "10000", "the default"),
    ("plain_weights", dict(rope_parameters={"rope_theta": 500.0, "rope_type": "default"}), "10000", "the default"),
    ("other_weights", dict(norm_before_residual=True), "500", "the target's")])
def test_a_wrong_rope_base(check, request, weights, config, base, source):
    capture = ["--aux-layers", *("1 3 4" if weights == "other_weights" else "2 4 5").split()]
    lines, report = check(request.getfixturevalue(weights), *capture, **config)
    assert lines[-1].startswith(f"Better: RoPE base {base} ({source}), ")
    assert f"Give --draft-rope-theta {base}; then check again." in lines[-1]
    lines, report = check.again(*capture, *best_of(report)["options"])
    assert lines[-1] == "The reading taken is the best." and report["readings"][0]["accept_length"] > 3.5


@pytest.mark.parametrize("weights, config, flag, value", [
    ("plain_weights", dict(norm_before_residual=True), "norm_before_residual", False),
    ("plain_weights", dict(norm_output=True, speculators_model_type="eagle3"), "norm_output", False),
    ("other_weights", dict(rope_theta=500.0), "norm_before_residual", True)])
def test_a_wrong_flag(check, request, weights, config, flag, value):
    options = ["--aux-layers", "1", "3", "4"] if weights == "other_weights" else []
    lines, report = check(request.getfixturevalue(weights), *options, **config)
    assert lines[-1].startswith(f"Better: {flag} {'on' if value else 'off'}, ")
    assert f"{flag} in the head's config.json is wrong: set it to {json.dumps(value)};" in lines[-1]
    with edited_json(check.head / "config.json") as content:
        content[flag] = value
    lines, report = check.again(*options)
    assert lines[-1] == "The reading taken is the best." and report["readings"][0]["accept_length"] > 3.5
