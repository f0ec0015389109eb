"""train_head.py, train_loss.py, train_features.py: the loss of EAGLE, the recipe as the optimizer sees it, checkpoints.

    python -m pytest tests/test_train.py -q

On tiny random targets in fp32. Runs that are killed, or that take several processes, are child processes.
"""
import datetime
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quantize
import train_features
import train_head
import train_loss
from draft_tree import StaticTree
from eagle_head import Eagle3Head, EagleHead
from generate import generate
from checkpoint import read_json
from head_config import Eagle3Spec
from model import Transformer
from linears import Format, quantize_in_place
from reference import TEMPLATE, assert_close, edited_json, read_safetensors, tiny, tokens_of, write_checkpoint
from scripts import export_head
from test_eagle import written_out_head
from test_train_data import REASONER
from tokenizer import Tokenizer
from train_data import Dialogue, make_batches, parts_of, read_dialogues, split
from train_features import Batch, Features, shard_layers
from train_init import head_config, new_head
from train_loss import Learner, SoftCrossEntropy, draft_ranks, evaluate, input_noise

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the quick brown fox jumps over lazy dog and then other dogs sleep for rest of day".split()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Not to be written into."""
    return write_checkpoint(tmp_path_factory.mktemp("train") / "tiny")


@pytest.fixture(scope="module")
def model(checkpoint):
    return Transformer.from_pretrained(checkpoint, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """60 dialogues of random words."""
    return write_data(tmp_path_factory.mktemp("data") / "data.jsonl", 60)


def write_data(file, n, seed=0):
    rng = random.Random(seed)
    say = lambda: " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))
    turns = lambda k: [{"role": role, "content": say()} for _ in range(k) for role in ("user", "assistant")]
    file.write_text("".join(json.dumps({"messages": turns(rng.randint(1, 2))}) + "\n" for _ in range(n)))
    return file


def command(checkpoint, data, out, *options):
    return [str(x) for x in ("--checkpoint", checkpoint, "--data", data, "--out", out, "--device", "cpu",
                             "--dtype", "float32", "--batch-size", 2, "--max-length", 128, "--eval-dialogues", 4,
                             "--log-every", 1, *options)]


@pytest.fixture
def train(checkpoint, data, tmp_path, capsys):
    """train(*options) -> (exit status, stderr, output folder)."""

    def train(*options, data=data, out="head"):
        capsys.readouterr()
        try:
            status = train_head.main(train_head.parse_args(command(checkpoint, data, tmp_path / out, *options)))
        except SystemExit as leave:
            status = leave.code
        return status, capsys.readouterr().err, tmp_path / out

    return train


def log_of(out, key):
    return [entry for line in (out / "log.jsonl").read_text().splitlines() if key in (entry := json.loads(line))]


def state_of(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


# ---------------------------------------------------------------------------------------------------------------------
# Loss

@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("draft_vocab", [None, list(range(199, 9, -1))])
def test_the_loss_of_a_batch_is_that_of_eagle_written_out(checkpoint, model, data, draft_vocab, top_k, monkeypatch):
    """L = SmoothL1(f^, f) + w CE(softmax(output(f)), output(f^)) over the answers, in float64, dialogue by dialogue.
    With top_k, the part of CE of the k likeliest tokens once more, as in HASS."""
    monkeypatch.setitem(train_loss.LOGITS_AT_ONCE, "cpu", 700)      # a few rows at a time, the last block a part
    dialogues = read_dialogues(data, Tokenizer.from_pretrained(checkpoint), model.config.vocab_size, 128)[:5]
    config = head_config(read_json(checkpoint / "config.json"), "tiny")
    head = new_head(config, model, None, seed=0)
    with torch.no_grad():
        for p in head.parameters():     # large, so that a dropped bias or norm shows
            p.add_(0.2 * torch.randn_like(p))
    head.set_draft_vocab(draft_vocab)
    batch = Features(model, dialogues).batch(list(range(5)))
    noise = 0.1 * torch.randn(*batch.features[:, 2:].shape)
    losses = Learner(head, autocast=False, cls_weight=0.3, top_k=top_k)(batch, noise)
    losses.loss.backward()

    weights = {key: w.detach().double().requires_grad_() for key, w in head.weights().items()}
    embedding, output = model.tok_embeddings.weight.double(), model.output.weight.double()
    output = output if draft_vocab is None else output[draft_vocab]
    l1, ce, likeliest, same, right = 0.0, 0.0, 0.0, 0, 0
    for row, dialogue in enumerate(dialogues):
        T = len(dialogue.tokens)
        f = model.features(dialogue.tokens[None].long(), torch.arange(T))[0].double()
        f_hat = written_out_head(config, weights, embedding, dialogue.tokens[1:T - 1].long(),
                                 f[:T - 2] + noise[row, :T - 2])            # pair (f_i, t_{i+1}) -> f_{i+1}
        for i in range(T - 2):
            if not dialogue.loss_mask[i + 2]:                                  # f_{i+1} is what says t_{i+2}
                continue
            error = (f_hat[i] - f[i + 1]).abs()
            l1 = l1 + torch.where(error < 1, 0.5 * error ** 2, error - 0.5).mean()
            p, q = output @ f[i + 1], output @ f_hat[i]
            terms = -p.softmax(0) * q.log_softmax(0)
            ce = ce + terms.sum()
            likeliest = likeliest + sum(terms[i] for i in p.argsort(descending=True)[:top_k])
            same += int(p.argmax() == q.argmax())
            right += int((draft_vocab or range(len(output)))[q.argmax()] == dialogue.tokens[i + 2])
    loss = l1 + 0.3 * ce + likeliest
    loss.backward()
    assert losses.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert losses.smooth_l1.item() == pytest.approx(l1.item(), rel=1e-5)
    assert losses.cross_entropy.item() == pytest.approx(ce.item(), rel=1e-5)
    assert losses.agreement.item() == same and losses.top1.item() == right
    assert_close(head.fc.weight.grad, weights["fc.weight"].grad, 1e-5)
    assert_close(head.layer.feed_forward.w2.weight.grad, weights["layers.0.mlp.down_proj.weight"].grad, 1e-5)


def test_no_tensor_of_the_cross_entropy_is_larger_than_the_stated_block(monkeypatch):
    monkeypatch.setitem(train_loss.LOGITS_AT_ONCE, "cpu", 8 * 4096)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                # (16, 4096) is the transposed weight
                if isinstance(t, torch.Tensor) and t.shape[-1:] == (4096,) and t.shape != (16, 4096):
                    largest = max(largest, t.numel())
            return out

    predicted, weight = torch.randn(100, 16, requires_grad=True), torch.randn(4096, 16)
    with Watch():
        SoftCrossEntropy.apply(predicted, torch.randn(100, 16), weight)[0].backward()
    assert largest == 8 * 4096


@torch.no_grad()
def test_deeper_levels_learn_from_what_drafting_would_meet(checkpoint, model, data):
    """Level d at position j: the head fed one pair after the other, true features up to j - d, then its own."""
    dialogue = read_dialogues(data, Tokenizer.from_pretrained(checkpoint), model.config.vocab_size, 128)[0]
    batch, levels = Features(model, [dialogue]).batch([0]), 3
    head = new_head(head_config(read_json(checkpoint / "config.json"), "tiny"), model, None, seed=0)
    for p in head.parameters():
        p.add_(0.2 * torch.randn_like(p))
    losses = Learner(head, False, levels)(batch, None)
    tokens, f = batch.tokens, batch.features
    n_pair, output = tokens.shape[1] - 2, model.output.weight
    l1 = ce = same = 0.0
    for j in range(n_pair):
        if not dialogue.loss_mask[j + 2]:
            continue
        for d in range(min(levels, j + 1)):
            known = f[:, :j - d + 1]
            for n in range(j - d + 1, j + 2):   # n pairs are known; the last output is the next feature
                own = head(tokens[:, 1:n + 1], known, torch.arange(n))[:, -1:]
                known = torch.cat((known, own), dim=1)
            p, q = output @ f[0, j + 1], output @ own[0, 0]
            l1 += F.smooth_l1_loss(own[0, 0], f[0, j + 1]).item() / levels
            ce -= (p.softmax(0) * q.log_softmax(0)).sum().item() / levels
            same += float(p.argmax() == q.argmax()) if d == 0 else 0
    assert losses.smooth_l1.item() == pytest.approx(l1, rel=1e-4)
    assert losses.cross_entropy.item() == pytest.approx(ce, rel=1e-4)
    assert losses.agreement.item() == same


def test_padding_does_not_change_the_loss(model, checkpoint, data):
    dialogues = read_dialogues(data, Tokenizer.from_pretrained(checkpoint), model.config.vocab_size, 128)[:6]
    features = Features(model, dialogues)
    head = new_head(head_config(read_json(checkpoint / "config.json"), "tiny"), model, None, 0)
    learner = Learner(head, autocast=False)
    with torch.no_grad():
        together = torch.stack(learner(features.batch(list(range(6))), None))
        alone = sum(torch.stack(learner(features.batch([i]), None)) for i in range(6))
    assert torch.allclose(together, alone, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# The recipe, on what really happens

def test_noise_is_uniform_fresh_and_on_the_inputs_only(train, monkeypatch):
    seen = []
    forward = Learner.forward

    def spy(self, batch, noise):
        if noise is not None:
            seen.append((batch, noise))
        return forward(self, batch, noise)

    monkeypatch.setattr(Learner, "forward", spy)
    status, err, _ = train("--epochs", 2)
    assert status == 0, err
    inside = torch.cat([noise[row, :n - 2].flatten() for batch, noise in seen
                        for row, n in enumerate((batch.tokens != 0).sum(1).tolist())])
    assert inside.abs().max() <= 0.1 and inside.abs().max() > 0.0999
    assert inside.mean().abs() < 1e-3 and inside.std().item() == pytest.approx(0.2 / math.sqrt(12), rel=0.02)
    firsts = [noise[0, 0] for _, noise in seen]
    assert len({tuple(first.tolist()) for first in firsts}) == len(firsts)     # no two dialogues or epochs alike


def test_noise_reaches_the_heads_input_and_not_its_goal(model, checkpoint, data, monkeypatch):
    dialogues = read_dialogues(data, Tokenizer.from_pretrained(checkpoint), model.config.vocab_size, 128)[:1]
    batch = Features(model, dialogues).batch([0])
    head = new_head(head_config(read_json(checkpoint / "config.json"), "tiny"), model, None, 0)
    inputs = []
    head.register_forward_pre_hook(lambda module, args: inputs.append(args[1]))
    noise = input_noise(batch, [0], [len(dialogues[0].tokens)], 0.1, seed=1)
    goals = []
    original = F.smooth_l1_loss
    monkeypatch.setattr(F, "smooth_l1_loss", lambda a, b, **k: goals.append(b) or original(a, b, **k))
    Learner(head, autocast=False)(batch, noise)
    assert torch.equal(inputs[0], batch.features[:, :-2] + noise)
    assert torch.equal(goals[0], batch.features[:, 1:-1][batch.loss_mask[:, 2:]])


def test_gradients_are_clipped_by_their_norm_and_adamw_has_the_papers_betas(train):
    """After one step AdamW's moments are (1 - 0.9) g and (1 - 0.95) g^2 of the gradient it was given."""
    one_step = "--batch-size", 1000, "--epochs", 1, "--cls-weight", 100
    _, _, free = train(*one_step, "--clip", 1e9, out="free")
    status, err, out = train(*one_step)
    assert status == 0, err
    g = [s["exp_avg"].double() / (1 - 0.9) for s in state_of(free)["optimizer"]["state"].values()]
    clipped = [s["exp_avg"].double() / (1 - 0.9) for s in state_of(out)["optimizer"]["state"].values()]
    norm = torch.cat([x.flatten() for x in g]).norm().item()
    assert norm > 0.6                                                   # there was something to clip
    assert log_of(out, "grad_norm")[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert torch.cat([x.flatten() for x in clipped]).norm().item() == pytest.approx(0.5, rel=1e-4)
    for x, y in zip(g, clipped):
        assert_close(y, x * 0.5 / norm, 1e-4)                           # one factor for all: not clipped value by value
    for s, x in zip(state_of(out)["optimizer"]["state"].values(), clipped):
        assert_close(s["exp_avg_sq"] / (1 - 0.95), x ** 2, 1e-4)


def test_parts_add_up_to_the_gradient_of_one_large_batch(train, monkeypatch):
    """The mean is over the tokens of the whole step, not of means: the parts differ in theirs."""
    rows, forward = [], Learner.forward
    monkeypatch.setattr(Learner, "forward", lambda self, batch, noise: (
        rows.append(len(batch.tokens)) or forward(self, batch, noise)))
    options = ("--epochs", 1, "--clip", 1e9, "--max-length", 200, "--cls-weight", 10, "--levels", 2,
               "--eval-dialogues", 0)
    _, _, whole = train(*options, "--batch-size", 1000, out="whole")
    status, err, parts = train(*options, "--batch-size", 143, "--accumulate", 7, out="parts")
    assert status == 0, err
    assert rows == [60, 9, 9, 9, 9, 8, 8, 8]
    for a, b in zip(state_of(parts)["optimizer"]["state"].values(), state_of(whole)["optimizer"]["state"].values()):
        assert_close(a["exp_avg"], b["exp_avg"], 1e-5)
    for key in ("cross_entropy", "smooth_l1", "agreement", "top1", "grad_norm"):
        assert log_of(parts, "lr")[0][key] == pytest.approx(log_of(whole, "lr")[0][key], rel=1e-4)


@pytest.fixture
def seen(monkeypatch):
    """The examples met, as tuples of ids: {True: in evaluation, False: in training}. Evaluation adds no noise."""
    met, forward = {True: set(), False: set()}, Learner.forward

    def spy(self, batch, noise):
        for row, n in zip(batch.tokens, (batch.tokens != 0).sum(1)):
            met[noise is None].add(tuple(row[:n].tolist()))
        return forward(self, batch, noise)

    monkeypatch.setattr(Learner, "forward", spy)
    return met


def test_held_out_dialogues_are_evaluated_and_never_learnt(train, seen):
    status, err, _ = train("--epochs", 2, "--batch-size", 8)
    assert status == 0, err
    assert len(seen[True]) == 4 and len(seen[False]) == 56 and not seen[True] & seen[False]


def test_the_examples_of_one_line_are_held_out_or_learnt_together(train, tmp_path, seen):
    """Three answers a line, each an example of its own; none of a held-out line's may be learnt from."""
    rng = random.Random(0)
    say = lambda: " ".join(rng.choices(WORDS, k=5))
    turns = lambda: [{"role": role, "content": say()} for _ in range(3) for role in ("user", "assistant")]
    (tmp_path / "turns.jsonl").write_text("".join(json.dumps({"messages": turns()}) + "\n" for _ in range(20)))
    (tmp_path / "reasoner.jinja").write_text(REASONER)
    status, err, _ = train("--epochs", 1, "--batch-size", 16, "--chat-template", tmp_path / "reasoner.jinja",
                           data=tmp_path / "turns.jsonl")
    assert status == 0 and "20 dialogues (60 examples)" in err and "2 dialogues held out" in err, err
    beginnings = [{tokens[:12] for tokens in seen[held]} for held in (True, False)]
    assert [len(seen[True]), len(seen[False]), *map(len, beginnings)] == [6, 54, 2, 18]
    assert not beginnings[0] & beginnings[1]


@pytest.mark.parametrize("n, seed", [(4, 0), (100, 7), (0, 1)])
def test_where_each_line_is_one_example_the_sample_is_of_all_examples(n, seed):
    order = random.Random(seed).sample(range(60), 60)
    k = min(n, 6)
    assert split([3 * i + 1 for i in range(60)], n, seed) == (sorted(order[:k]), sorted(order[k:]))


def test_large_seeds_train_and_small_ones_draw_as_ever(train):
    features = torch.zeros(1, 6, 4)
    batch = Batch(torch.zeros(1, 6, dtype=torch.long), features, torch.ones(1, 6, dtype=torch.bool), features)
    expected = torch.zeros(4, 4).uniform_(-1, 1, generator=torch.Generator().manual_seed(3 * 1_000_003 + 7))
    assert torch.equal(input_noise(batch, [7], [6] * 8, 1.0, 3)[0], expected)
    for seed, status in ((20261126, 0), (2 ** 63 - 1, 0), (2 ** 63, 2)):
        got, err, _ = train("--epochs", 1, "--batch-size", 1000, "--seed", seed, out=str(seed))
        assert got == status and (status == 0 or "--seed" in one_error_line(err)), err


def test_the_rate_warms_up_and_decays_linearly_and_is_what_the_weights_move_by(train):
    status, err, out = train("--epochs", 3, "--warmup", 5, "--lr", 1e-2)
    assert status == 0, err
    rates = [entry["lr"] for entry in log_of(out, "lr")]
    n = len(rates)
    assert n > 12
    assert rates[:5] == pytest.approx([1e-2 * k / 5 for k in (1, 2, 3, 4, 5)])
    assert rates[5:] == pytest.approx([1e-2 * (n - k) / (n - 5) for k in range(5, n)])
    # The first step of Adam moves each weight with a gradient by the rate.
    _, _, one = train("--batch-size", 1000, "--epochs", 1, "--lr", 1e-2, out="one")
    before = torch.Generator().manual_seed(0)
    first = torch.empty(64, 128).normal_(0, 0.02, generator=before)
    moved = (state_of(one)["head"]["fc.weight"] - first).abs()
    assert moved.median().item() == pytest.approx(1e-2, rel=1e-2)


def test_the_defaults_are_the_papers():
    args = train_head.parse_args(["--data", "d", "--out", "o"])
    assert (args.lr, args.clip, args.noise, args.cls_weight, args.levels) == (3e-5, 0.5, 0.1, 0.1, 1)
    assert (args.batch_size, args.max_length, args.epochs, args.dtype) == (4, 2048, 20, "bfloat16")


def test_200_dialogues_are_overfitted(tmp_path, capsys):
    """The target wrote them; its tokenizer gives its text back as the very ids it was."""
    checkpoint = write_checkpoint(tmp_path / "talker", merges=0, ascii_only=True)
    tokenizer, rng = Tokenizer.from_pretrained(checkpoint), random.Random(1)
    questions = [" ".join(rng.choices(WORDS, k=2)) for _ in range(200)]
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
    answers = generate(Transformer.from_pretrained(checkpoint, device="cpu", dtype=torch.float32), prompts, 5).tokens
    data = tmp_path / "200.jsonl"
    data.write_text("".join(json.dumps({"finish_reason": "length", "messages": [
        {"role": "user", "content": q}, {"role": "assistant", "content": tokenizer.decode(a)}]}) + "\n"
        for q, a in zip(questions, answers)))
    argv = command(checkpoint, data, tmp_path / "head", "--epochs", 200, "--lr", 2e-2, "--batch-size", 4,
                   "--cls-weight", 10, "--noise", 0, "--eval-dialogues", 0)
    status = train_head.main(train_head.parse_args(argv))
    assert status == 0, capsys.readouterr().err
    top1 = [entry["top1"] for entry in log_of(tmp_path / "head", "top1")]
    assert sum(top1[:8]) / 8 < 0.5 and sum(top1[-8:]) / 8 > 0.95        # an epoch has 8 steps


def test_bfloat16_trains_fp32_weights_and_the_target_is_left_alone(train, checkpoint, recwarn):
    before = read_safetensors(checkpoint / "model.safetensors")
    status, err, out = train("--epochs", 2, "--dtype", "bfloat16", "--lr", 1e-3)
    assert status == 0, err
    assert all(w.dtype == torch.float32 for w in state_of(out)["head"].values())
    losses = [entry["cross_entropy"] for entry in log_of(out, "cross_entropy")]
    assert losses[-1] < losses[0]
    after = read_safetensors(checkpoint / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not [w for w in recwarn if "fused" in str(w.message)]


# ---------------------------------------------------------------------------------------------------------------------
# What is written

OFFICIAL_KEYS = {"fc.weight", "fc.bias", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.k_proj.weight",
                 "layers.0.self_attn.v_proj.weight", "layers.0.self_attn.o_proj.weight",
                 "layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight", "layers.0.mlp.down_proj.weight",
                 "layers.0.post_attention_layernorm.weight"}
OFFICIAL_FIELDS = {"architectures", "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "intermediate_size",
                   "max_position_embeddings", "model_type", "num_attention_heads", "num_key_value_heads",
                   "num_hidden_layers", "pad_token_id", "rms_norm_eps", "tie_word_embeddings", "torch_dtype",
                   "vocab_size", "bias"}


class OtherHead(nn.Module):
    """The head made of transformers' parts."""

    def __init__(self, config):
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.bias)
        self.layers = nn.ModuleList([LlamaDecoderLayer(config, 0)])
        self.layers[0].input_layernorm = nn.Identity()
        self.__dict__["rotary"] = LlamaRotaryEmbedding(config)

    def forward(self, tokens, features):
        x = self.fc(torch.cat((self.embed_tokens(tokens), features), dim=-1))
        T = tokens.shape[1]
        mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
        out = self.layers[0](x, attention_mask=mask, position_embeddings=self.rotary(x, torch.arange(T)[None]))
        return out[0] if isinstance(out, tuple) else out


def test_the_head_is_in_the_official_format(train, model):
    from transformers import LlamaConfig

    status, err, out = train("--epochs", 1, "--lr", 1e-2)
    assert status == 0, err
    config, weights = read_json(out / "config.json"), read_safetensors(out / "model.safetensors")
    assert set(weights) == OFFICIAL_KEYS and OFFICIAL_FIELDS - set(config) <= {"bos_token_id", "pad_token_id"}
    assert config["num_hidden_layers"] == 1 and config["hidden_size"] == model.config.dim and config["bias"] is True
    other = OtherHead(LlamaConfig(**config, attn_implementation="eager"))
    weights["embed_tokens.weight"] = model.tok_embeddings.weight
    other.load_state_dict(weights, strict=True)
    head = EagleHead.from_pretrained(out, target=model)
    tokens, features = torch.randint(0, 200, (2, 17)), torch.randn(2, 17, model.config.dim)
    with torch.no_grad():
        assert_close(head(tokens, features, torch.arange(17)), other.float()(tokens, features), 1e-4)


def test_a_draft_vocabulary_is_the_answers_commonest_tokens_and_the_head_holds_nothing_of_it(train, checkpoint, data):
    status, err, out = train("--epochs", 1, "--draft-vocab", 20)
    assert status == 0, err
    assert set(read_safetensors(out / "model.safetensors")) == OFFICIAL_KEYS
    assert "draft_output.weight" not in state_of(out)["head"]
    ids = read_json(out / "draft_vocab.json")["ids"]
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    assert len(ids) == 20 and tokenizer.stop_ids <= set(ids)
    said = "".join(m["content"] for line in data.read_text().splitlines() for m in json.loads(line)["messages"]
                   if m["role"] == "assistant")
    assert all(tokenizer.decode([i]) in said for i in ids if i not in tokenizer.stop_ids)


def test_a_head_without_bias_is_what_vllm_takes(train, model, capsys):
    status, err, out = train("--epochs", 1, "--no-bias")
    assert status == 0, err
    assert read_json(out / "config.json")["bias"] is False
    argv = ["--head", str(out), "--for", "vllm", "--out", str(out / "vllm")]
    assert export_head.main(export_head.parse_args(argv)) == 0, capsys.readouterr().err
    ours, theirs = read_safetensors(out / "vllm/model.safetensors"), read_safetensors(out / "model.safetensors")
    assert set(ours) == OFFICIAL_KEYS - {"fc.bias"} and all(torch.equal(ours[key], theirs[key]) for key in ours)
    status, err, _ = train("--init", out, out="other")
    assert status == 2 and "its fc has no bias: train with --no-bias" in one_error_line(err)


def test_init_goes_on_from_another_head(train):
    _, _, first = train("--epochs", 3, "--lr", 3e-3, out="first")
    status, err, out = train("--epochs", 1, "--lr", 1e-9, "--init", first)
    assert status == 0, err
    ours, theirs = read_safetensors(out / "model.safetensors"), read_safetensors(first / "model.safetensors")
    for key in theirs:
        assert_close(ours[key], theirs[key], 1e-5)
    status, err, _ = train("--init", first, "--no-bias", out="other")
    assert status == 2 and "its fc has a bias: train with --bias" in one_error_line(err)


def test_init_from_an_eagle_3_head_is_refused_in_one_line(train, model, checkpoint, tmp_path):
    c = model.config
    spec = Eagle3Spec(replace(c, n_layer=1), c.dim, (c.n_layer,), c.vocab_size, own_embedding=False)
    (tmp_path / "eagle3").mkdir()
    save_file(Eagle3Head(spec, model).weights(), tmp_path / "eagle3/model.safetensors")
    config = head_config(read_json(checkpoint / "config.json"), "target", bias=False) | {"eagle_version": 3}
    (tmp_path / "eagle3/config.json").write_text(json.dumps(config))
    for option in ("--bias", "--no-bias"):
        status, err, _ = train("--init", tmp_path / "eagle3", option)
        assert status == 2 and "is an EAGLE-3 head" in one_error_line(err)


@torch.no_grad()
def test_evaluation_counts_the_leading_drafts_that_are_right_position_by_position(model, checkpoint):
    """n-alpha and the length of a chain of 5, drafted along each dialogue one position after the other. Dialogues of
    three tokens and a draft vocabulary of the same three: a third of the guesses is right."""
    head = new_head(head_config(read_json(checkpoint / "config.json"), "tiny"), model, None, seed=0)
    for p in head.parameters():
        p.add_(0.2 * torch.randn_like(p))
    head.set_draft_vocab([10, 11, 12])
    dialogues = [Dialogue(n, torch.randint(10, 13, (40,), dtype=torch.int32), torch.rand(40) < 0.7) for n in range(2)]
    entry = evaluate(Learner(head, autocast=False), Features(model, dialogues), [0, 1])
    right, leading, n_position, n_token, n_step = [0] * 5, 0, 0, 0, 0
    tree = StaticTree.paper()
    for _, tokens, loss_mask in dialogues:
        free = 0                            # positions that the last step has decoded already
        tokens = tokens[None].long()
        features = model.features(tokens, torch.arange(40))
        for i in range(34):
            if not loss_mask[i + 2]:
                continue
            known, hits, node, at, depth = features[:, :i + 1], [], 0, True, 0
            for n in range(i + 1, i + 6):   # n pairs are known; the last output is the next feature, which says t_{n+1}
                known = torch.cat((known, head(tokens[:, 1:n + 1], known, torch.arange(n))[:, -1:]), dim=1)
                logits = head.draft_logits(known[0, -1])
                hits.append(int(logits.argmax() + 10 == tokens[0, n + 1]))
                rank = int((logits > logits[tokens[0, n + 1] - 10]).sum())
                below = [c for c in range(1, tree.n_node) if tree.parents[c] == node and tree.ranks[c] == rank and at]
                node, at, depth = (below[0], True, depth + 1) if below else (node, False, depth)
            right = [a + b for a, b in zip(right, hits)]
            leading += (hits + [0]).index(0)
            n_position += 1
            if free == 0:                   # a step of the tree: its right drafts and the bonus token
                n_step, n_token, free = n_step + 1, n_token + 1 + depth, 1 + depth
            free -= 1
    assert 0 < right[4] < n_position and leading > 0                    # there is something to count
    alone = Learner(head, autocast=False)(Features(model, dialogues).batch([0, 1]), None)
    assert entry["eval_agreement"] == pytest.approx(alone.agreement.item() / entry["eval_positions"])
    assert entry["eval_n_alpha"] == pytest.approx([r / n_position for r in right], abs=1e-4)
    assert entry["eval_chain_length"] == pytest.approx(1 + leading / n_position)
    assert entry["eval_tree_length"] == pytest.approx(n_token / n_step) and n_token / n_step > 1.5
    assert entry["eval_top1"] == pytest.approx(right[0] / n_position)
    assert entry["eval_top1"] <= entry["eval_top2"] <= entry["eval_top3"]


class Largest(TorchDispatchMode):
    """`size`: elements of the largest tensor that an operator makes."""
    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.size = max(self.size, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("draft_vocab", [None, list(range(10, 200))])
def test_an_evaluation_needs_no_larger_tensors_than_a_training_step(model, checkpoint, monkeypatch, draft_vocab):
    head = new_head(head_config(read_json(checkpoint / "config.json"), "tiny"), model, None, seed=0)
    head.set_draft_vocab(draft_vocab)
    tokens = torch.randint(0, 200, (500,), dtype=torch.int32)
    batch = Features(model, [Dialogue(1, tokens, torch.ones(500, dtype=torch.bool))]).batch([0])
    monkeypatch.setitem(train_loss.LOGITS_AT_ONCE, "cpu", 10 ** 5)
    with Largest() as training:
        Learner(head, autocast=False)(batch, None).loss.backward()
    monkeypatch.setattr(train_loss, "MASK_AT_ONCE", 1)
    rows, draft_logits = [], head.draft_logits
    monkeypatch.setattr(head, "draft_logits", lambda hidden: rows.append(len(hidden)) or draft_logits(hidden))
    with Largest() as evaluation:
        blocks = draft_ranks(head, batch.tokens[0], batch.features[0], 5)
    assert max(rows) * len(draft_vocab or model.output.weight) <= 10 ** 5
    assert evaluation.size <= 1.01 * training.size      # 499 pairs; training has the 498 whose next token is known
    monkeypatch.setattr(train_loss, "MASK_AT_ONCE", 10 ** 9)
    monkeypatch.setitem(train_loss.LOGITS_AT_ONCE, "cpu", 10 ** 9)
    with Largest() as at_once:
        whole = draft_ranks(head, batch.tokens[0], batch.features[0], 5)
    assert at_once.size > 2 * training.size and (blocks != whole).sum() <= 5     # but for near ties


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

def run_in_child(argv, errors):
    torch.set_num_threads(1)
    sys.stderr = open(errors, "a", buffering=1)
    sys.exit(train_head.main(train_head.parse_args(argv)))


def test_killed_ten_times_and_interrupted_once_a_run_ends_in_the_same_bits(forkserver, checkpoint, data, tmp_path):
    out, whole, errors, rng = tmp_path / "killed", tmp_path / "whole", tmp_path / "killed.err", random.Random(0)
    options = "--epochs", 30, "--lr", 1e-2, "--eval-every", 50

    def start(out, *more):
        argv = command(checkpoint, data, out, *options, *more)
        process = forkserver.Process(target=run_in_child, args=(argv, out.with_suffix(".err")))
        process.start()
        return process

    def finish(process, status):
        process.join(120)
        assert process.exitcode == status, errors.read_text()

    saved_at = lambda: (out / "checkpoint.pt").stat().st_mtime_ns if (out / "checkpoint.pt").exists() else 0
    undisturbed = start(whole)
    for life in range(11):
        before = saved_at()
        run = start(out, "--save-minutes", 0, "--resume")   # with nothing there yet, --resume begins
        while run.is_alive() and saved_at() <= before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        assert run.is_alive(), errors.read_text()   # it would have finished: more epochs needed
        os.kill(run.pid, signal.SIGKILL if life < 10 else signal.SIGINT)
        finish(run, -signal.SIGKILL if life < 10 else 130)
        state_of(out), read_safetensors(out / "model.safetensors")  # what stands can be read
    text = errors.read_text()
    assert text.rstrip().endswith("the same command with --resume goes on from there") and "Traceback" not in text
    finish(start(out, "--resume"), 0)
    finish(undisturbed, 0)
    ours, theirs = state_of(out), state_of(whole)
    assert ours["step"] == theirs["step"]
    assert all(torch.equal(ours["head"][key], theirs["head"][key]) for key in theirs["head"])
    for a, b in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values()):
        assert all(torch.equal(a[key], b[key]) for key in b)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [e["cross_entropy"] for e in log_of(out, "lr")] == [e["cross_entropy"] for e in log_of(whole, "lr")]


@pytest.mark.parametrize("options, name", [([], "--out"), (["--init", "nowhere"], "nowhere")])
def test_an_out_that_is_a_file_or_a_missing_init_is_refused_before_the_data_are_read(train, tmp_path, options, name):
    if not options:
        (tmp_path / "head").write_text("a file")
    status, err, out = train("--cache-features", tmp_path / "features", *options)
    assert status == 2 and name in err and err.count("\n") == 1, err
    assert not (tmp_path / "features").exists() and not out.is_dir()


def test_what_was_learnt_is_saved_before_an_evaluation_which_a_resume_makes_up_for(train, monkeypatch):
    options = "--epochs", 2, "--eval-every", 7
    _, _, whole = train(*options, out="whole")
    calls = []

    def too_large(*args):
        calls.append(args)
        if len(calls) in (2, 4):    # at step 14, and then at the last one
            raise torch.OutOfMemoryError("out of memory")
        return evaluate(*args)

    monkeypatch.setattr(train_head, "evaluate", too_large)
    status, err, out = train(*options)
    assert status == 2 and "memory" in one_error_line(err)
    assert state_of(out)["step"] == 14 and [entry["step"] for entry in log_of(out, "eval_top1")] == [7]
    shutil.copytree(out, out.with_name("without"))
    status, err, _ = train(*options, "--resume")
    assert status == 2 and state_of(out)["step"] == state_of(whole)["step"], err
    status, err, _ = train(*options, "--resume")
    assert status == 0, err
    drop_speed = lambda out: [entry | {"tokens_per_second": None} for entry in log_of(out, "step")]
    assert drop_speed(out) == drop_speed(whole)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    status, err, out = train(*options, "--resume", "--eval-every", 0, out="without")
    assert status == 0 and [entry["step"] for entry in log_of(out, "eval_top1")] == [7], err
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def other_target(checkpoint, folder, kind):
    """A folder of the same names, and but for int8 of the same sizes, whose features are others."""
    if kind == "int8":
        argv = ["--checkpoint", str(checkpoint), "--mode", "int8", "--out", str(folder)]
        assert quantize.main(quantize.parse_args(argv)) == 0
        return folder
    shutil.copytree(checkpoint, folder)
    weights = read_safetensors(folder / "model.safetensors")
    if kind == "a merged LoRA":
        for key in weights:
            if key.endswith(("q_proj.weight", "v_proj.weight")):
                weights[key] += 0.1 * torch.randn(weights[key].shape[0], 1) @ torch.randn(1, weights[key].shape[1])
    elif kind == "one embedding":
        weights["model.embed_tokens.weight"][7] *= 2
    if kind == "another RoPE base":
        with edited_json(folder / "config.json") as config:
            config["rope_theta"] *= 2
    else:
        save_file(weights, folder / "model.safetensors")
    return folder


def content_of(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


@pytest.fixture(scope="module")
def others(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    (folder / "shout.jinja").write_text(TEMPLATE.replace("m.content", "m.content | upper"))
    kinds = "a copy", "a merged LoRA", "one embedding", "another RoPE base", "int8"
    targets = {kind: other_target(checkpoint, folder / kind.replace(" ", "-"), kind) for kind in kinds}
    return targets | {"template": folder / "shout.jinja"}


def test_a_resume_and_a_cache_belong_to_their_target_template_and_data(train, others, tmp_path):
    cache = tmp_path / "cache"
    options = "--epochs", 1, "--batch-size", 1000, "--cache-features", cache
    status, err, out = train(*options)
    assert status == 0, err
    kept, features = content_of(out), content_of(cache)
    targets = [(("--checkpoint", other), [str(other)]) for kind, other in others.items()
               if kind not in ("a copy", "template")]
    template = ("--chat-template", others["template"]), ["chat template"]
    for more, names in (*targets, template):
        for again in (("--resume",), ("--out", tmp_path / "new")):
            status, err, _ = train(*options, *more, *again)
            assert status == 2 and all(name in one_error_line(err) for name in names), (more, again, err)
    status, err, _ = train(*options, "--dtype", "bfloat16", "--out", tmp_path / "new")
    assert status == 2 and "float32" in one_error_line(err) and "bfloat16" in err
    assert content_of(out) == kept and content_of(cache) == features and not (tmp_path / "new").exists()
    status, err, _ = train(*options, "--checkpoint", others["a copy"], "--resume")      # times and folder's name differ
    assert status == 0 and content_of(cache) == features, err
    status, err, _ = train(*options, "--checkpoint", others["a copy"], out="new")
    assert status == 0 and content_of(cache) == features, err
    (cache / "features.json").write_text('{"sha256": "x"}')
    status, err, _ = train(*options, out="newer")
    assert status == 2 and str(cache) in one_error_line(err) and "earlier version" in err


@pytest.mark.parametrize("template", [TEMPLATE, "{{ strftime_now('%d %b %Y') }}" + TEMPLATE], ids=["no date", "date"])
def test_a_training_has_one_date(train, tmp_path, monkeypatch, template):
    """A training that goes on the next day ends in the same bits. Features cached on one day serve on another."""
    (tmp_path / "dated.jinja").write_text(template)

    def on(day):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return cls(2026, 11, day)
        monkeypatch.setattr(train_head, "datetime", Clock)

    options = "--epochs", 1, "--eval-dialogues", 0, "--chat-template", tmp_path / "dated.jinja"
    on(26)
    _, _, whole = train(*options, out="whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_head.Stop, "asked", lambda self, world, device: setattr(self, "seen", True) or True)
        status, err, out = train(*options)
    assert status == 130 and state_of(out)["step"] == 1, err
    on(27)
    status, err, _ = train(*options, "--resume")
    assert status == 0 and ("2026-11-26" in err) == ("strftime" in template), err
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    if template == TEMPLATE:
        return
    _, _, other = train(*options, out="other")
    # the date is part of the text
    assert (other / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()
    assert train(*options, "--cache-features", tmp_path / "cache", out="one")[0] == 0
    on(28)
    status, err, two = train(*options, "--cache-features", tmp_path / "cache", out="two")
    assert status == 0 and "2026-11-27" in err, err
    assert (two / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()
    status, err, _ = train(*options, "--cache-features", tmp_path / "cache", "--resume", out="whole")
    assert status == 2 and "--cache-features" in one_error_line(err)


def test_a_training_is_not_overwritten_nor_resumed_with_other_settings(train, tmp_path, monkeypatch):
    assert train("--epochs", 1)[0] == 0
    bytes_of = lambda folder: {file.name: file.read_bytes() for file in folder.iterdir()}
    written = bytes_of(tmp_path / "head")
    changes = {"lr": (1, "3e-05", "1.0"), "epochs": (2,), "noise": (0.2, "0.1"), "seed": (1, "0"), "levels": (2, "1"),
               "cls-weight": (1, "0.1"), "clip": (1, "0.5"), "warmup": (3, "None"), "batch-size": (4,),
               "accumulate": (2, "1"), "max-length": (100,), "draft-vocab": (20,), "eval-dialogues": (0,),
               "dtype": ("bfloat16", "float32")}
    for options, names in (((), ["--resume", "--out"]), (("--resume", "--no-bias"), ["bias", "True", "False"]),
                           (("--resume", "--cache-features", tmp_path / "cache"), ["--cache-features"]),
                           *((("--resume", f"--{key}", now), [key.replace("-", "_"), str(now), *was])
                             for key, (now, *was) in changes.items())):
        status, err, _ = train("--epochs", 1, *options)
        assert status == 2 and all(name in one_error_line(err) for name in names), err
    for name, value, names in (("get_num_threads", lambda: 5, ["1 threads", "OMP_NUM_THREADS=1"]),
                               ("__version__", "2.0", [torch.__version__, "2.0"])):
        with monkeypatch.context() as patch:
            patch.setattr(torch, name, value)
            status, err, _ = train("--epochs", 1, "--resume")
        assert status == 2 and all(name in one_error_line(err) for name in names), err
    status, err, _ = train("--epochs", 1, "--resume", data=write_data(tmp_path / "other.jsonl", 60, seed=5))
    assert status == 2 and "data" in one_error_line(err)
    assert bytes_of(tmp_path / "head") == written and not (tmp_path / "cache").exists()
    state = state_of(tmp_path / "head")
    torch.save(state | {"settings": {"lr": "3e-05"}}, tmp_path / "head/checkpoint.pt")
    assert "earlier version" in one_error_line(train("--epochs", 1, "--resume")[1])
    (tmp_path / "head/checkpoint.pt").write_bytes((tmp_path / "head/checkpoint.pt").read_bytes()[:1000])
    assert "checkpoint.pt is corrupt" in one_error_line(train("--epochs", 1, "--resume")[1])


def test_a_loss_that_is_not_finite_names_the_batch_and_keeps_the_last_checkpoint(train, tmp_path):
    status, err, out = train("--epochs", 3, "--lr", 1e30, "--save-minutes", 0)
    line = one_error_line(err)
    assert status == 2 and "step" in line and "lines" in line
    assert all(w.isfinite().all() for w in read_safetensors(out / "model.safetensors").values())


@pytest.mark.parametrize("kind", ["target", "gradient", "init", "quantised init", "weights"])
def test_what_is_not_finite_never_enters_the_weights(train, checkpoint, tmp_path, monkeypatch, kind):
    options, names, refused_early = [], ["step 0", "lines"], False
    if kind == "target":
        folder = other_target(checkpoint, tmp_path / "nan", "a copy")
        weights = read_safetensors(folder / "model.safetensors")
        weights["model.layers.1.mlp.up_proj.weight"][3, 5] = math.nan
        save_file(weights, folder / "model.safetensors")
        options = ["--checkpoint", folder]
        status, err, _ = train(*options, "--cache-features", tmp_path / "cache", out="cached")
        assert status == 2 and "line " in one_error_line(err) and not list((tmp_path / "cache").glob("*.safetensors"))
    elif kind == "gradient":
        backward = SoftCrossEntropy.backward
        monkeypatch.setattr(SoftCrossEntropy, "backward", staticmethod(lambda ctx, *grads: (
            backward(ctx, *grads)[0] * math.inf, None, None, None, None)))
        names = ["norm of the gradient", *names]
    elif kind == "weights":
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: [
            p.data.fill_(math.nan) for p in self.param_groups[0]["params"]])
        names = ["weights are not finite after step 1"]
    else:
        _, _, first = train("--epochs", 1, "--batch-size", 1000, out="first")
        options, names, refused_early = ["--init", first], ["--init", str(first)], True
        if kind == "quantised init":
            argv = ["--checkpoint", str(first), "--mode", "int8", "--out", str(tmp_path / "int8")]
            assert quantize.main(quantize.parse_args(argv)) == 0
            options, names = ["--init", tmp_path / "int8"], ["--init", "quantised"]
        else:
            weights = read_safetensors(first / "model.safetensors")
            weights["fc.weight"][1, 2] = math.inf
            save_file(weights, first / "model.safetensors")
            names.append("fc.weight")
    status, err, out = train("--epochs", 1, "--save-minutes", 0, *options)
    assert status == 2 and all(name in one_error_line(err) for name in names), err
    assert not (out / "model.safetensors").exists() and (not refused_early or not out.exists())


# ---------------------------------------------------------------------------------------------------------------------
# Processes

@pytest.mark.parametrize("kind, format", [("gqa", None), ("gqa", Format("int4", 32)), ("mixtral", Format("int8"))])
def test_a_sharded_layer_is_whole_while_it_runs_and_a_part_otherwise(tmp_path, monkeypatch, kind, format):
    folder, _ = tiny(kind, tmp_path, hidden_size=64, intermediate_size=64)
    load = lambda: Transformer.from_pretrained(folder, device="cpu", dtype=torch.float32)
    whole, ranks, kept = load(), [load(), load()], []
    for model in (whole, *ranks):
        if format is not None:
            quantize_in_place(model, format)
    held = lambda model: sum(t.nbytes for t in (*model.layers.parameters(), *model.layers.buffers()))
    before = held(ranks[0])
    kept = [shard_layers(model, torch.device("cpu"), rank, 2) for rank, model in enumerate(ranks)]
    parts = [sum(piece.mine.untyped_storage().nbytes() for piece in pieces) for pieces in kept]
    assert parts[0] == parts[1] and 0.5 * before <= parts[0] < 0.55 * before
    assert all(held(model) == 0 for model in ranks)
    running = []

    def gather(out, mine):      # what the other process would send
        n = len(running)
        running.append(held(ranks[0]))
        out.copy_(torch.cat([pieces[n].mine for pieces in kept]))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    tokens = torch.tensor([tokens_of(20)])
    with torch.no_grad():
        for _ in range(2):
            running.clear()
            assert_close(ranks[0].features(tokens, torch.arange(20)), whole.features(tokens, torch.arange(20)), 1e-6)
            assert running == [0] * len(ranks[0].layers)        # the layer before is gone when the next one comes
            assert held(ranks[0]) == 0


def test_ctrl_c_in_one_process_stops_them_all_at_the_same_step(monkeypatch):
    stop, other = train_head.Stop(), 0
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag: flag.add_(other))
    assert not stop.asked(2, torch.device("cpu"))
    other = 1
    assert stop.asked(2, torch.device("cpu")) and stop.seen
    told, mine, other = [], train_head.Stop(), 0
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag: told.append(flag.item()))
    signal.raise_signal(signal.SIGINT)
    assert mine.asked(2, torch.device("cpu")) and told == [1]

@pytest.mark.parametrize("options", [("--batch-size", 500), ("--batch-size", 125, "--accumulate", 4, "--shard-target")],
                         ids=["whole target", "sharded target, in four parts"])
def test_two_processes_have_the_gradients_of_one(checkpoint, data, tmp_path, train, options):
    """The same global batch: half the batch size, twice the processes. The moments tell the gradient, unclipped."""
    settings = "--epochs", 1, "--clip", 1e9, "--warmup", 0
    status, err, one = train(*settings, "--batch-size", 1000, "--max-length", 200, out="one")
    assert status == 0, err
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                          ROOT / "train_head.py",
                          *command(checkpoint, data, tmp_path / "two", *settings, "--max-length", 200, *options)],
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    ours, theirs = state_of(tmp_path / "two"), state_of(one)
    assert ours["step"] == theirs["step"] == 1
    for a, b in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values()):
        assert_close(a["exp_avg"], b["exp_avg"], 1e-5)
    for key in ("cross_entropy", "smooth_l1", "agreement", "top1", "grad_norm"):
        assert log_of(tmp_path / "two", "lr")[0][key] == pytest.approx(log_of(one, "lr")[0][key], rel=1e-4)
    ours, theirs = log_of(tmp_path / "two", "eval_top1")[0], log_of(one, "eval_top1")[0]
    assert ours["eval_positions"] == theirs["eval_positions"]
    assert ours["eval_cross_entropy"] == pytest.approx(theirs["eval_cross_entropy"], rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Data

DIALOGUE = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": " jumps over"},
            {"role": "user", "content": "and then"}, {"role": "assistant", "content": "the dogs sleep"}]


def test_both_formats_of_dialogues_say_the_same(checkpoint, tmp_path):
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    names = {"user": "human", "assistant": "gpt"}
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": DIALOGUE}))
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": "x", "conversations": [
        {"from": names[m["role"]], "value": m["content"]} for m in DIALOGUE]}))
    (a,), (b,) = (read_dialogues(tmp_path / name, tokenizer, 10 ** 6, 128) for name in ("a.jsonl", "b.jsonl"))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.loss_mask, b.loss_mask)


def one_error_line(err):
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, err
    return lines[0]


GOOD = json.dumps({"messages": DIALOGUE})


def test_bad_lines_are_counted_reported_once_and_left_out(train, tmp_path):
    file = tmp_path / "mixed.jsonl"
    bad = ["{broken", "[1, 2]", '{"text": "x"}', '{"messages": [{"role": "user", "content": 3}]}',
           '{"messages": [{"role": "user", "content": "hi"}]}', '{"messages": []}']
    file.write_text("\n".join([GOOD, *bad, "", GOOD.replace("fox", "dog" * 200), GOOD]) + "\n")
    status, err, _ = train("--epochs", 1, data=file)
    assert status == 0, err
    reports = [line for line in err.splitlines() if line.startswith(str(file))]
    assert len(reports) == 1
    assert "2 dialogues" in reports[0] and "4 broken lines" in reports[0]
    assert "2 without an assistant turn" in reports[0]
    assert "1 with no answer within the length" in reports[0]


@pytest.mark.parametrize("text, names", [
    ("", ["no dialogue"]), ("{broken\n", ["no dialogue", "1 broken lines"]),
    ('{"messages": [{"role": "user", "content": "hi"}]}\n', ["1 without an assistant turn"])],
                         ids=["empty", "all broken", "no answer"])
def test_data_without_a_dialogue_is_refused(train, tmp_path, text, names):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    status, err, out = train(data=file)
    assert status == 2 and all(name in one_error_line(err) for name in [str(file), *names])
    assert not out.exists()


def test_a_missing_file_and_bad_options_are_refused_in_one_line(train, tmp_path):
    for options, names in ((("--epochs", 0), ["--epochs"]), (("--lr", 0), ["--lr"]),
                           (("--batch-size", "x"), ["--batch-size"]),
                           (("--shard-target",), ["--shard-target", "torchrun"]),
                           (("--init", tmp_path / "none"), ["none"])):
        status, err, _ = train(*options)
        assert status == 2 and all(name in one_error_line(err) for name in names), err
    status, err, _ = train(data=tmp_path / "missing.jsonl")
    assert status == 2 and "missing.jsonl" in one_error_line(err)


def test_a_tokenizer_of_another_vocabulary_is_refused(checkpoint, data):
    with pytest.raises(ValueError, match=r"line 1: token \d+, but the target's vocabulary has 50"):
        read_dialogues(data, Tokenizer.from_pretrained(checkpoint), 50, 128)


def test_a_dialogue_longer_than_the_length_is_cut_and_counted(checkpoint, tmp_path, capsys):
    file = tmp_path / "long.jsonl"
    answer = {"role": "assistant", "content": "the dogs sleep " * 50}
    file.write_text(json.dumps({"messages": [DIALOGUE[0], answer]}) + "\n" + GOOD)
    long, short = read_dialogues(file, Tokenizer.from_pretrained(checkpoint), 10 ** 6, 40)
    assert len(long.tokens) == 40 and long.loss_mask.any() and len(short.tokens) <= 40
    assert "cut at 40 tokens" in capsys.readouterr().err


def test_batches_hold_everything_once_within_their_size_with_little_padding():
    rng = random.Random(0)
    lengths = [min(2048, int(rng.lognormvariate(5.5, 0.8)) + 10) for _ in range(3000)]
    batches = make_batches(lengths, 4 * 2048, random.Random(1))
    assert sorted(i for batch in batches for i in batch) == list(range(3000))
    padded = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    assert max(padded) <= 4 * 2048
    assert 1 - sum(lengths) / sum(padded) < 0.1
    assert batches != make_batches(lengths, 4 * 2048, random.Random(2))
    dealt = make_batches(lengths, 4 * 2048, random.Random(1), n_part=3)
    parts = [part for batch in dealt for rank in range(3) for part in parts_of(batch, rank, 3, 1)]
    assert sorted(i for part in parts for i in part) == list(range(3000))
    assert 4 * 2048 * 0.9 < max(len(part) * max(lengths[i] for i in part) for part in parts if part) <= 4 * 2048


def test_cached_features_train_to_the_same_bits_and_a_cut_cache_is_completed(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_features, "SHARD", 16)
    assert train("--epochs", 2, out="plain")[0] == 0
    cache = tmp_path / "cache"
    status, err, cached = train("--epochs", 2, "--cache-features", cache, out="cached")
    assert status == 0 and "GB" in err, err
    plain, again = (read_safetensors(out / "model.safetensors") for out in (tmp_path / "plain", cached))
    for key in plain:       # rows of other batches: equal but for rounding
        assert_close(again[key], plain[key], 2e-2)
    shards = sorted(cache.glob("*.safetensors"))
    assert len(shards) == 4
    content, old = shards[1].read_bytes(), shards[0].stat().st_mtime_ns
    shards[1].unlink()
    (cache / "00001.safetensors.part").write_bytes(content[:100])                   # as a kill leaves it
    status, err, resumed = train("--epochs", 2, "--cache-features", cache, out="resumed")
    assert status == 0, err
    assert shards[1].read_bytes() == content and shards[0].stat().st_mtime_ns == old
    assert (resumed / "model.safetensors").read_bytes() == (cached / "model.safetensors").read_bytes()
    other = write_data(tmp_path / "other.jsonl", 60, seed=5)
    status, err, _ = train("--cache-features", cache, data=other, out="other")
    assert status == 2 and str(cache) in one_error_line(err)
