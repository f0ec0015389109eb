"""train_head.py --kind eagle3: the training-time test, and the heads that it writes.

    python -m pytest tests/test_train_eagle3.py -q

The reference is the method of test_eagle3.py, in float64 and row by row: what decoding computes behind each position is
what a step of the training must compute.
"""
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import train_eagle3
import train_head
from checkpoint import read_json
from decoder import generate
from draft_tree import DynamicTree, StaticTree
from eagle_head import EagleHead
from model import Transformer
from reference import assert_close, read_safetensors, write_checkpoint
from scripts import check_head, export_head
from test_eagle3 import WrittenOut, WrittenTarget
from test_train import command, log_of, one_error_line, state_of
from tokenizer import Tokenizer
from train_data import Dialogue, read_dialogues
from train_eagle3 import Eagle3Learner, step_mask
from train_features import Features
from train_init import eagle3_config, new_eagle3
from train_loss import evaluate, level_mask

ROOT = Path(__file__).resolve().parent.parent
LAYERS, CAPTURE = 8, (2, 4, 5)      # 2, L // 2, L - 3
N_ANSWER = 16
TREES = {"chain": StaticTree.chain(4), "static": StaticTree.paper(), "dynamic": DynamicTree(4, 5, 20)}


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A target, ours and transformers', and dialogues that it wrote: its text gives back the very ids it was."""
    import transformers
    folder = write_checkpoint(tmp_path_factory.mktemp("target") / "tiny", merges=0, ascii_only=True, hidden_size=32,
                              num_hidden_layers=LAYERS, num_attention_heads=4, rope_theta=500.0)
    model, tokenizer = Transformer.from_pretrained(folder, dtype=torch.float32), Tokenizer.from_pretrained(folder)
    rng = random.Random(1)
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").float().eval()
    questions = ["".join(rng.choices("abcdefgh", k=3)) for _ in range(20)]
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
    answers = generate(model, prompts, N_ANSWER).tokens
    model.kv_cache = None
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"finish_reason": "length", "tokens": [a], "messages": [
        {"role": "user", "content": q}, {"role": "assistant", "content": tokenizer.decode(a)}]}) + "\n"
        for q, a in zip(questions, answers)))
    (folder / "questions.jsonl").write_text("\n".join(json.dumps({"turns": [q]}) for q in questions))
    return SimpleNamespace(folder=folder, model=model, hf=WrittenTarget(hf), data=data, prompts=prompts,
                           answers=answers, stop_ids=tokenizer.stop_ids,
                           dialogues=read_dialogues(data, tokenizer, model.config.vocab_size, 128))


def small_head(target, ids, lm_head="random", scale=0.3):
    """A head whose weights are large, so that a dropped norm or a wrong position shows."""
    config = eagle3_config(read_json(target.folder / "config.json"), "tiny", len(ids))
    head = new_eagle3(config, target.model, 3, ids, lm_head, seed=0)
    with torch.no_grad():
        for parameter in head.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn_like(parameter))
    return head


def mixed_dialogues(target, n=3):
    """Dialogues of several lengths in which the assistant speaks twice."""
    found = []
    for k, dialogue in enumerate(target.dialogues[:n]):
        tokens = torch.cat((dialogue.tokens, target.dialogues[k + n].tokens))[:17 + 5 * k]
        found.append(Dialogue(k + 1, tokens, torch.rand(len(tokens)) < 0.6))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def written_loss(target, head, dialogues, n_step):
    """(loss, cross-entropy of step 0, agreement, top-1) in float64, and the weights, whose gradients they have.

    Row by row: `behind` is what decoding computes for the next draft of a chain, with only that chain in its cache
    beside the verified rows.
    """
    weights = {key.replace("layers.0.", "midlayer."): weight.detach().double().requires_grad_()
               for key, weight in head.weights().items()}
    ids = head.own_ids.tolist()
    config = {"num_attention_heads": head.config.n_head, "num_key_value_heads": head.config.n_kv_head,
              "rms_norm_eps": head.config.norm_eps}
    embedding = target.hf.embedding.detach()
    written = WrittenOut(config, weights, embedding, states=CAPTURE, theta=head.config.rope_theta, ids=ids)
    loss, first, same, right = 0.0, 0.0, 0, 0
    for dialogue in dialogues:
        tokens, T = dialogue.tokens.tolist(), len(dialogue.tokens)
        with torch.no_grad():
            hiddens = target.hf.hiddens(tokens).double()
            goals = hiddens[:, LAYERS] @ target.hf.hf.lm_head.weight.double().T         # of the token after each
        for i, node in enumerate(written.first_pass(tokens[:-1], hiddens)):
            for step in range(n_step):
                following = i + 2 + step
                if following >= T:
                    break
                if step:
                    node = written.behind(node, tokens[i + 1 + step])
                if not dialogue.loss_mask[following]:
                    continue
                goal = goals[following - 1]
                guess = ids[node.logits.argmax()]
                if step == 0:
                    same += guess == goal.argmax()
                    right += guess == tokens[following]
                if goal.argmax() not in ids:
                    continue
                entropy = -(goal[ids].softmax(0) * node.logits.log_softmax(0)).sum()
                loss = loss + 0.8 ** step * entropy
                first = first + entropy * (step == 0)
    return (loss, first, same, right), weights


@pytest.mark.parametrize("n_step, n_draft", [(1, 60), (4, 60), (7, None)])
def test_the_loss_and_its_gradients_are_those_of_the_method_written_out(target, n_step, n_draft, monkeypatch):
    monkeypatch.setitem(train_eagle3.LOGITS_AT_ONCE, "cpu", 3000)       # a few rows at a time
    monkeypatch.setattr(train_eagle3, "BLOCK", 7)
    dialogues, vocab = mixed_dialogues(target), target.model.config.vocab_size
    said = torch.cat([dialogue.tokens for dialogue in dialogues]).unique().tolist()
    ids = list(range(vocab)) if n_draft is None else sorted(random.Random(3).sample(said, 12) + [*range(n_draft - 12)])
    ids = sorted(set(ids))
    head = small_head(target, ids)
    losses = Eagle3Learner(head, False, n_step)(Features(target.model, dialogues, capture=CAPTURE).batch([0, 1, 2]))
    losses.loss.backward()
    (loss, first, same, right), weights = written_loss(target, head, dialogues, n_step)
    loss.backward()
    assert losses.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    assert losses.cross_entropy.item() == pytest.approx(first.item(), rel=1e-5)
    assert [losses.agreement.item(), losses.top1.item()] == [same, right]
    qkv = torch.cat([weights[f"midlayer.self_attn.{name}_proj.weight"].grad for name in "qkv"])
    for ours, theirs in ((head.layer.attention.wqkv.weight.grad, qkv), *((parameter.grad, weights[key].grad) for
                         key, parameter in (("fc.weight", head.fc.weight), ("lm_head.weight", head.output.weight),
                                            ("norm.weight", head.norm.weight),
                                            ("midlayer.hidden_norm.weight", head.hidden_norm.weight),
                                            ("midlayer.input_layernorm.weight", head.input_norm.weight),
                                            ("midlayer.mlp.down_proj.weight", head.layer.feed_forward.w2.weight),
                                            ("midlayer.self_attn.o_proj.weight", head.layer.attention.wo.weight)))):
        assert_close(ours, theirs, 1e-5)


@torch.no_grad()
def test_agreement_and_top1_are_counted_where_they_happen(target):
    """Few tokens to say, or to draft, so that a random head is right now and then."""
    few = [Dialogue(n, torch.randint(100, 103, (30,), dtype=torch.int32), torch.rand(30) < 0.7) for n in range(3)]
    mixed = mixed_dialogues(target)
    guesses = [target.hf.hf(dialogue.tokens[None].long()).logits[0].argmax(-1) for dialogue in mixed]
    likeliest = torch.cat(guesses).unique().tolist()
    for dialogues, ids, field, place in ((few, [100, 101, 102], "top1", 3), (mixed, likeliest, "agreement", 2)):
        head = small_head(target, ids)
        losses = Eagle3Learner(head, False, 3)(Features(target.model, dialogues, capture=CAPTURE).batch([0, 1, 2]))
        expected, _ = written_loss(target, head, dialogues, 1)
        assert getattr(losses, field).item() == expected[place] > 0


def test_the_masks_of_the_steps():
    """Rows of three positions. Step 0 is causal; then each row sees step 0 up to its own, and its own later steps."""
    causal, own = [[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    for step in range(3):
        expected = [causal[row] + step * own[row] for row in range(3)]
        assert step_mask(0, 3, step)[0].int().tolist() == expected
        # the last two of four rows, by themselves
        expected = [[1, 1, 1, 0] + step * [1, 0], [1, 1, 1, 1] + step * [0, 1]]
        assert step_mask(2, 4, step)[0].int().tolist() == expected


def test_the_masks_are_those_of_decoding_seen_from_the_row_that_begins_a_draft():
    n, n_level = 9, 5
    whole = level_mask(n, n_level, torch.device("cpu"))[0]      # level d of position j began at j - d
    for step in range(n_level):
        rows, mask = torch.arange(n - step), step_mask(0, n - step, step)[0]
        slots = torch.cat([level * n + rows + level for level in range(step + 1)])
        of_step = whole[step * n + rows + step]
        assert torch.equal(of_step[:, slots], mask)
        assert torch.equal(of_step.sum(1), mask.sum(1))         # and nothing else is seen


@torch.no_grad()
def test_padding_does_not_change_the_loss(target):
    dialogues = mixed_dialogues(target, 4)
    features = Features(target.model, dialogues, capture=CAPTURE)
    learner = Eagle3Learner(small_head(target, list(range(100))), False, 5)
    together = torch.stack(learner(features.batch([0, 1, 2, 3])))
    alone = sum(torch.stack(learner(features.batch([i]))) for i in range(4))
    assert torch.allclose(together, alone, rtol=1e-5)


@torch.no_grad()
def test_steps_that_have_no_row_in_the_text_are_left_out(target):
    """A text of three tokens has one row, which has step 0 alone."""
    dialogue = Dialogue(1, target.dialogues[0].tokens[:3], torch.ones(3, dtype=torch.bool))
    batch = Features(target.model, [dialogue], capture=CAPTURE).batch([0])
    head = small_head(target, list(range(target.model.config.vocab_size)))
    one, seven = (Eagle3Learner(head, False, n)(batch) for n in (1, 7))
    assert torch.equal(torch.stack(one), torch.stack(seven)) and one.loss > 0


def test_frozen_rows_get_no_gradient_and_are_the_targets(target):
    ids = list(range(20, 90))
    head = small_head(target, ids, "frozen")
    Eagle3Learner(head, False, 3)(Features(target.model, target.dialogues, capture=CAPTURE).batch([0])).loss.backward()
    assert head.output.weight.grad is None and head.norm.weight.grad.abs().sum() > 0
    assert torch.equal(head.output.weight, target.model.output.weight[ids])
    start = new_eagle3(eagle3_config(read_json(target.folder / "config.json"), "tiny", 70), target.model, 3, ids,
                       "target", seed=0)
    assert torch.equal(start.output.weight, target.model.output.weight[ids]) and start.output.weight.requires_grad
    assert torch.equal(start.norm.weight, target.model.norm.weight)


@torch.no_grad()
def test_evaluation_is_of_one_step_and_counts_what_a_chain_drafts(target):
    """eval_agreement is that of training; eval_top1 and the chain's length are counted along the text by the method."""
    dialogues, head = mixed_dialogues(target), small_head(target, list(range(60)) + list(range(97, 110)))
    features = Features(target.model, dialogues, capture=CAPTURE)
    entry = evaluate(Eagle3Learner(head, False, 5), features, [0, 1, 2])
    (_, first, same, _), weights = written_loss(target, head, dialogues, 1)
    assert entry["eval_agreement"] == pytest.approx(int(same) / entry["eval_positions"])
    assert entry["eval_cross_entropy"] == pytest.approx(first.item() / entry["eval_positions"], rel=1e-5)
    assert entry["eval_positions"] == sum(int(dialogue.loss_mask[2:].sum()) for dialogue in dialogues)
    assert {"eval_top1", "eval_n_alpha", "eval_chain_length"} < entry.keys() and "eval_loss" not in entry


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture
def train(target, tmp_path, capsys):
    """train(*options) -> (exit status, stderr, output folder)."""

    def train(*options, out="head", data=target.data):
        capsys.readouterr()
        try:
            status = train_head.main(train_head.parse_args(command(
                target.folder, data, tmp_path / out, "--kind", "eagle3", "--eval-dialogues", 2, *options)))
        except SystemExit as leave:
            status = leave.code
        return status, capsys.readouterr().err, tmp_path / out

    return train


LEARN = ("--epochs", 150, "--lr", 2e-2, "--batch-size", 2, "--eval-dialogues", 0, "--levels", 4, "--draft-vocab", 100)


@pytest.fixture(scope="module")
def trained(target, tmp_path_factory):
    """A head that has learnt the dialogues by heart."""
    out = tmp_path_factory.mktemp("trained") / "head"
    assert train_head.main(train_head.parse_args(command(target.folder, target.data, out, "--kind", "eagle3",
                                                         *LEARN))) == 0
    return out


def accept_length(target, head, tree=TREES["chain"]):
    result = generate(target.model, target.prompts, N_ANSWER, head=head, tree=tree)
    target.model.kv_cache = None
    assert result.tokens == target.answers
    return sum(map(sum, result.accept_lengths)) / sum(map(len, result.accept_lengths))


@pytest.mark.parametrize("tree", TREES.values(), ids=list(TREES))
def test_a_trained_head_decodes_losslessly_and_accepts_more_than_an_untrained_one(target, trained, train, tree):
    status, err, untrained = train("--epochs", 1, "--lr", 1e-9, "--draft-vocab", 100)
    assert status == 0, err
    before, after = (accept_length(target, EagleHead.from_pretrained(folder, target.model), tree)
                     for folder in (untrained, trained))
    assert before < 2 and after > before + 1, (before, after)


def test_what_is_logged_of_learnt_and_of_held_out_data_is_the_same_figure(train):
    status, err, out = train("--epochs", 3, "--draft-vocab", 100)
    assert status == 0, err
    learnt, held_out = log_of(out, "lr"), log_of(out, "eval_top1")
    assert {"loss", "cross_entropy", "agreement", "top1"} < learnt[0].keys() and "smooth_l1" not in learnt[0]
    assert {"eval_cross_entropy", "eval_agreement", "eval_chain_length"} < held_out[0].keys() and len(held_out) == 3


def test_the_written_head_is_the_method_of_the_golden_check(target, trained):
    """In the authors' keys, read by the reference: it drafts and accepts in every step what ours does."""
    config, weights = read_json(trained / "config.json"), read_safetensors(trained / "model.safetensors")
    layer = ("input_layernorm", "hidden_norm", "post_attention_layernorm",
             *(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
    assert set(weights) == {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d",
                            *(f"midlayer.{name}.weight" for name in layer)}
    ids = (weights["d2t"] + torch.arange(100)).tolist()
    assert weights["d2t"].dtype == torch.int64 and weights["t2d"].dtype == torch.bool and ids == sorted(ids)
    assert weights["t2d"].nonzero()[:, 0].tolist() == ids
    assert config["draft_vocab_size"] == 100 and "bias" not in config and "qkv_bias" not in config
    head = EagleHead.from_pretrained(trained, target.model)
    assert head.kind == "eagle3" and head.capture == CAPTURE and head.spec.capture_source == "the default"
    assert head.config.rope_theta == 500.0
    floats = {key: tensor.float() for key, tensor in weights.items() if key not in ("d2t", "t2d")}
    written = WrittenOut(config, floats, target.hf.embedding, theta=500.0, ids=ids, states=CAPTURE)
    for name in ("static", "dynamic"):
        for prompt in target.prompts[:2]:
            ours = generate(target.model, [prompt], N_ANSWER, head=head, tree=TREES[name])
            with torch.no_grad():
                tokens, lengths = written.decode(target.hf, prompt, N_ANSWER, TREES[name])
            assert ours.tokens[0] == tokens[:N_ANSWER] and ours.accept_lengths[0] == lengths and max(lengths) > 2
    target.model.kv_cache = None


def test_check_head_finds_the_reading_taken_the_best(target, trained, tmp_path, capsys):
    options = ["--questions", str(target.folder / "questions.jsonl"), "--max-new-tokens", "16", "--device", "cpu",
               "--dtype", "float32", "--json", str(tmp_path / "out.json")]
    assert check_head.main(check_head.parse_args([str(target.folder), str(trained), *options])) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["verdict"] == "The reading taken is the best.", capsys.readouterr().out
    assert result["readings"][0]["accept_length"] > 2


def test_a_trained_head_goes_to_both_engines(trained, tmp_path, capsys):
    for engine in ("vllm", "sglang"):
        argv = ["--head", str(trained), "--for", engine, "--out", str(tmp_path / engine)]
        assert export_head.main(export_head.parse_args(argv)) == 0, capsys.readouterr().err
        assert torch.equal(read_safetensors(tmp_path / engine / "model.safetensors")["d2t"],
                           read_safetensors(trained / "model.safetensors")["d2t"])


def test_the_draft_vocabulary_is_the_answers_commonest_tokens_filled_up(target, train):
    answers = [dialogue.tokens[dialogue.loss_mask] for dialogue in target.dialogues]
    said = set(torch.cat(answers).tolist()) | target.stop_ids
    ids_of = lambda out: EagleHead.from_pretrained(out, target.model).own_ids.tolist()
    status, err, few = train("--epochs", 1, "--draft-vocab", 10, "--eval-dialogues", 0, out="few")
    assert status == 0 and "draft vocabulary 10 of" in err, err
    counts = torch.cat(answers).bincount(minlength=target.model.config.vocab_size)
    chosen = [i for i in ids_of(few) if i not in target.stop_ids]
    assert target.stop_ids < set(ids_of(few)) and counts[chosen].min() >= counts[list(said - set(ids_of(few)))].max()
    n = len(said) + 7
    _, _, many = train("--epochs", 1, "--draft-vocab", n, "--eval-dialogues", 0, out="many")
    ids = ids_of(many)
    assert len(ids) == n and said < set(ids) and ids == sorted(ids)
    assert set(ids) - said == set([i for i in range(n) if i not in said][:7])
    _, _, whole = train("--epochs", 1, "--eval-dialogues", 0, out="whole")
    assert not {"d2t", "t2d"} & read_safetensors(whole / "model.safetensors").keys()
    assert EagleHead.from_pretrained(whole, target.model).draft_ids is None
    assert not (few / "draft_vocab.json").exists()


@pytest.mark.parametrize("states", [(2, 3, 7), (2, LAYERS), (LAYERS,)])
def test_other_hidden_states_are_named_in_the_file(target, train, states):
    status, err, out = train("--epochs", 1, "--aux-layers", *states)
    assert status == 0 and f"hidden states {', '.join(map(str, states))} (" in err, err
    head = EagleHead.from_pretrained(out, target.model)
    assert head.capture == states
    assert accept_length(target, head) >= 1


def test_the_lm_head_begins_as_asked(target, train):
    heads = {}
    for lm_head in ("random", "target", "frozen"):
        status, err, out = train("--epochs", 2, "--lr", 1e-2, "--lm-head", lm_head, "--draft-vocab", 50, out=lm_head)
        assert status == 0, err
        heads[lm_head] = EagleHead.from_pretrained(out, target.model)
        assert ("output.weight" in state_of(out)["head"]) == (lm_head != "frozen")
    rows = target.model.output.weight[heads["frozen"].own_ids].bfloat16().float()
    far = {name: (head.output.weight - rows).abs().mean().item() for name, head in heads.items()}
    assert far["frozen"] == 0 < far["target"] < 0.1 < far["random"], far


def test_init_goes_on_from_an_eagle_3_head_with_its_vocabulary(target, train, trained, tmp_path):
    status, err, out = train("--epochs", 1, "--lr", 1e-9, "--init", trained)
    assert status == 0, err
    ours, theirs = (read_safetensors(folder / "model.safetensors") for folder in (out, trained))
    assert ours.keys() == theirs.keys()
    for key in theirs:
        assert_close(ours[key].float(), theirs[key].float(), 1e-5)
    for option in (("--draft-vocab", 9), ("--aux-layers", 2, 3, 4), ("--lm-head", "frozen")):
        status, err, _ = train("--init", trained, *option, out="other")
        assert status == 2 and option[0] in one_error_line(err)
    status, err, one = train("--kind", "eagle1", "--epochs", 1, out="one")
    assert status == 0, err
    status, err, _ = train("--init", one, out="other", data=target.data)
    assert status == 2 and "is an EAGLE-1 or 2 head: train it with --kind eagle1" in one_error_line(err)
    stored = theirs | {"embed_tokens.weight": torch.randn(target.model.config.vocab_size, 32)}
    (tmp_path / "own").mkdir()
    save_file(stored, tmp_path / "own/model.safetensors")
    (tmp_path / "own/config.json").write_text((trained / "config.json").read_text())
    status, err, _ = train("--init", tmp_path / "own", out="other")
    assert status == 2 and "an embedding of its own" in one_error_line(err)


def stopped(train, monkeypatch, *options, out, step=5):
    """Stop a training after some steps, as Ctrl-C does, and go on."""
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(train_head.Stop, "asked", lambda self, world, device: (
            asked.append(1) or len(asked) == step and setattr(self, "seen", True)) or self.seen)
        status, err, folder = train(*options, out=out)
    assert status == 130 and state_of(folder)["step"] == step, err
    return train(*options, "--resume", out=out)


@pytest.mark.parametrize("options", [("--draft-vocab", 50), ("--lm-head", "frozen", "--ema", 0.9, "--keep", "best"),
                                     ("--init", "trained")], ids=["plain", "frozen, average, best", "init"])
def test_a_training_that_was_stopped_ends_in_the_same_bits(train, trained, monkeypatch, options):
    options = [trained if option == "trained" else option for option in options]
    options = ("--epochs", 3, "--lr", 1e-2, "--batch-size", 1, "--max-length", 64, "--eval-every", 4, *options)
    status, err, whole = train(*options, out="whole")
    assert status == 0 and state_of(whole)["step"] > 8, err
    status, err, again = stopped(train, monkeypatch, *options, out="again")
    assert status == 0, err
    ours, theirs = state_of(again), state_of(whole)
    for part in ("head", "average"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][key], theirs[part][key]) for key in theirs[part])
    for a, b in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values()):
        assert all(torch.equal(a[key], b[key]) for key in b)
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    drop_speed = lambda out: [entry | {"tokens_per_second": None} for entry in log_of(out, "step")]
    assert drop_speed(again) == drop_speed(whole)


@pytest.mark.parametrize("options", [("--batch-size", 500), ("--batch-size", 125, "--accumulate", 4, "--shard-target")],
                         ids=["whole target", "sharded target, in four parts"])
def test_two_processes_have_the_gradients_of_one(target, tmp_path, train, options):
    settings = "--epochs", 1, "--clip", 1e9, "--warmup", 0, "--draft-vocab", 60, "--levels", 3
    status, err, one = train(*settings, "--batch-size", 1000, "--max-length", 200, out="one")
    assert status == 0, err
    argv = command(target.folder, target.data, tmp_path / "two", "--kind", "eagle3", "--eval-dialogues", 2, *settings,
                   "--max-length", 200, *options)
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                          ROOT / "train_head.py", *argv], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    ours, theirs = state_of(tmp_path / "two"), state_of(one)
    assert ours["step"] == theirs["step"] == 1
    for a, b in zip(ours["optimizer"]["state"].values(), theirs["optimizer"]["state"].values()):
        assert_close(a["exp_avg"], b["exp_avg"], 1e-5)
    for key in ("loss", "cross_entropy", "agreement", "top1", "grad_norm"):
        assert log_of(tmp_path / "two", "lr")[0][key] == pytest.approx(log_of(one, "lr")[0][key], rel=1e-4)
    for key in ("eval_positions", "eval_agreement", "eval_cross_entropy", "eval_chain_length"):
        ours, theirs = (log_of(out, "eval_top1")[0][key] for out in (tmp_path / "two", one))
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_bfloat16_trains_fp32_weights(train):
    status, err, out = train("--epochs", 4, "--dtype", "bfloat16", "--lr", 3e-3, "--draft-vocab", 60)
    assert status == 0, err
    assert all(weight.dtype == torch.float32 for weight in state_of(out)["head"].values())
    losses = [entry["loss"] for entry in log_of(out, "lr")]
    assert losses[-1] < losses[0]


# ---------------------------------------------------------------------------------------------------------------------
# Which head is written


def test_the_best_head_is_kept_and_not_the_last(train, monkeypatch):
    """Evaluations that say: 1.5, then 2.0, then 1.9."""
    lengths, heads = iter((1.5, 2.0, 1.9)), []

    def say(learner, *args):
        heads.append(learner.head.fc.weight.detach().bfloat16())
        return evaluate(learner, *args) | {"eval_chain_length": next(lengths)}

    monkeypatch.setattr(train_head, "evaluate", say)
    status, err, out = train("--epochs", 3, "--lr", 1e-2, "--keep", "best", "--save-minutes", 0, "--draft-vocab", 50)
    assert status == 0 and "a chain of 5 accepts 2.00" in err, err
    assert torch.equal(read_safetensors(out / "model.safetensors")["fc.weight"], heads[1])
    assert not torch.equal(heads[1], heads[2])
    assert torch.equal(state_of(out)["head"]["fc.weight"].bfloat16(), heads[2])     # a resume goes on from the last


def test_the_average_is_what_is_evaluated_and_written(train, monkeypatch):
    """a <- d a + (1 - d) w after each step, with d = min(0.9, (1 + n) / (10 + n)) after step n."""
    weights, seen, step = [], [], torch.optim.AdamW.step

    def spy(self):
        weights.append([w.detach().clone() for w in self.param_groups[0]["params"]])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    monkeypatch.setattr(train_head, "evaluate", lambda learner, *args: seen.append(
        [w.detach().clone() for w in learner.head.parameters()]) or evaluate(learner, *args))
    status, err, out = train("--epochs", 4, "--lr", 1e-2, "--ema", 0.4, "--draft-vocab", 50)
    assert status == 0, err
    weights = [*weights[1:], list(state_of(out)["head"].values())], weights[0]
    for k, average in enumerate(weights[1]):
        for n, after in enumerate(weights[0], start=1):
            decay = min(0.4, (1 + n) / (10 + n))
            average = decay * average + (1 - decay) * after[k]
        assert_close(seen[-1][k], average, 1e-5)
    written = read_safetensors(out / "model.safetensors")["fc.weight"]
    assert torch.equal(written, state_of(out)["average"]["fc.weight"].bfloat16())
    assert not torch.equal(written, state_of(out)["head"]["fc.weight"].bfloat16())


# ---------------------------------------------------------------------------------------------------------------------
# The cache, and mistakes


def test_cached_states_train_to_the_same_and_belong_to_their_kind(target, train, tmp_path):
    options = "--epochs", 2, "--lr", 1e-2, "--draft-vocab", 50
    cache, other = tmp_path / "cache", tmp_path / "other"
    _, _, plain = train(*options, out="plain")
    status, err, cached = train(*options, "--cache-features", cache, out="cached")
    assert status == 0, err
    for key, weight in read_safetensors(plain / "model.safetensors").items():
        assert_close(read_safetensors(cached / "model.safetensors")[key].float(), weight.float(), 2e-2)
    rows = read_safetensors(cache / "00000.safetensors")
    assert rows["0"].shape == (len(target.dialogues[0].tokens), 4 * 32)
    status, err, _ = train("--kind", "eagle1", "--cache-features", cache, out="new")
    assert status == 2 and str(cache) in one_error_line(err) and "2 4 5 final" in err
    status, err, _ = train(*options, "--aux-layers", 2, 3, 5, "--cache-features", cache, out="new")
    assert status == 2 and "2 4 5 final" in one_error_line(err) and "2 3 5 final" in err
    assert train("--kind", "eagle1", "--epochs", 1, "--cache-features", other, out="one")[0] == 0
    stamp = json.loads((other / "features.json").read_text())
    assert stamp.pop("states") == "final"
    for content in (stamp, stamp | {"states": "final"}):        # an earlier version wrote no such key
        (other / "features.json").write_text(json.dumps(content))
        status, err, _ = train(*options, "--cache-features", other, out="new")
        assert status == 2 and str(other) in one_error_line(err) and "2 4 5 final" in err
        assert train("--kind", "eagle1", "--epochs", 1, "--cache-features", other, out=f"of {len(content)}")[0] == 0
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("options, names", [
    (("--draft-vocab", 1000), ["--draft-vocab 1000", "259 tokens"]),
    (("--kind", "eagle1", "--draft-vocab", 1000), ["--draft-vocab 1000", "259 tokens"]),
    (("--cls-weight", 1), ["--cls-weight", "--kind eagle3"]), (("--noise", 0.1), ["--noise", "--kind eagle3"]),
    (("--top-k-loss", 10), ["--top-k-loss", "--kind eagle3"]), (("--no-bias",), ["--bias", "--kind eagle3"]),
    (("--kind", "eagle1", "--lm-head", "frozen"), ["--lm-head", "--kind eagle1"]),
    (("--kind", "eagle1", "--aux-layers", 2, 4, 5), ["--aux-layers", "--kind eagle1"]),
    (("--kind", "eagle2",), ["--kind", "eagle2"]),
    (("--aux-layers", 1, 3, 4), ["--aux-layers 1 3 4", "begins with 2"]),
    (("--aux-layers", 0, 3, 4), ["--aux-layers 0 3 4", "begins with 2"]),
    (("--aux-layers", 2, 3, 9), ["[2, 3, 9]", "8 layers"]),
    (("--keep", "best", "--eval-every", 0), ["--keep best", "--eval-every"]),
    (("--keep", "best", "--eval-dialogues", 0), ["--keep best", "--eval-dialogues"]),
    (("--ema", 1.5), ["--ema"]), (("--init", "nowhere"), ["nowhere"])])
def test_mistakes_are_one_line(train, options, names):
    status, err, out = train(*options)
    assert status == 2 and all(name in one_error_line(err) for name in names), err
    assert not out.exists()


def test_a_best_of_nothing_held_out_and_a_shallow_target_are_refused(train, target, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(target.data.read_text().splitlines(keepends=True)[:5]))
    status, err, _ = train("--keep", "best", data=few)
    assert status == 2 and "--keep best" in one_error_line(err) and "ten" in err
    shallow = write_checkpoint(tmp_path / "shallow")
    status, err, _ = train("--checkpoint", shallow)
    assert status == 2 and "[2, 1, -1]" in one_error_line(err) and "--aux-layers" in err


def test_a_training_does_not_go_on_as_another_kind_or_with_other_options(train):
    assert train("--epochs", 1, "--draft-vocab", 50)[0] == 0
    for options, names in ((("--kind", "eagle1"), ["2 4 5 final"]), (("--levels", 3), ["levels", "'7'", "'3'"]),
                           (("--lm-head", "frozen"), ["lm_head", "random", "frozen"]), (("--ema", 0.9), ["ema"]),
                           (("--aux-layers", 2, 4, 6), ["2 4 5 final", "2 4 6 final"]), (("--keep", "best"), ["keep"])):
        status, err, _ = train("--epochs", 1, "--draft-vocab", 50, "--resume", *options)
        assert status == 2 and all(name in one_error_line(err) for name in names), err


def test_the_defaults_are_the_papers():
    args = train_head.parse_args(["--data", "d", "--out", "o", "--kind", "eagle3"])
    assert (args.lr, args.clip, args.levels, args.lm_head) == (5e-5, 0.5, 7, "random")
    assert (args.ema, args.keep) == (None, "last")
    assert train_eagle3.DECAY == 0.8
