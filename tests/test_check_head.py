"""check_head.py names the right reading of a head's file. The heads are EAGLE-3 heads that were really trained.

    python -m pytest tests/test_check_head.py -q

A target of random weights writes short answers, and a head learns them by heart. So its drafts are right as far as it
was trained to look ahead, and a wrong reading of its file costs most of them.
"""
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from chat import encode
from decoder import generate
from draft_tree import StaticTree
from eagle_head import Eagle3Head, EagleHead
from head_config import Eagle3Spec
from model import Transformer, rope_inv_freq
from reference import edited_json, naive_decode, write_checkpoint
from scripts import check_head, tree_search, tune_tree
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


def train(target, capture, theta, steps=150, **flags):
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
            str(folder), str(tmp_path / "head"), "--questions", str(folder / "questions.jsonl"), "--max-new-tokens",
            str(LENGTH), "--device", "cpu", "--dtype", "float32", "--json", str(tmp_path / "out.json"), *options])
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
    _, model, prompts, _ = target
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
    assert min(taken["acceptance_by_depth"][:LEVELS]) > 0.9 and taken["accept_length"] > 3.5
    assert all(other["accept_length"] < 0.9 * taken["accept_length"] for other in others)
    for reading in report["readings"][:4]:      # those that generate.py can be told by options
        options = reading["options"]
        head = EagleHead.from_pretrained(
            check.head, model, aux_layers=[*map(int, options[1:])] if "--aux-layers" in options else None,
            rope_theta=float(options[1]) if "--draft-rope-theta" in options else None)
        steps = []
        for of_answer in generate(model, prompts, LENGTH, head=head, tree="chain:5").accept_lengths:
            done = 1    # the prefill's token
            for n in of_answer:
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
    assert lines[-1].startswith("Better: hidden states 1, 3, 4 (one down), ")
    assert lines[-1].endswith("Give --aux-layers 1 3 4; then check again.")
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


def test_what_is_said_of_norm_output_makes_it_so(target, plain_weights, check):
    _, report = check(plain_weights)
    reading = report["readings"][-1]
    assert reading["name"] == "norm_output on" and reading["remedy"] == (
        'Set norm_output to true and speculators_model_type to "eagle3" in the head\'s config.json')
    with edited_json(check.head / "config.json") as content:
        content |= dict(norm_output=True, speculators_model_type="eagle3")
    _, again = check.again()
    assert again["readings"][0]["accept_length"] == reading["accept_length"]


def test_ctrl_c_prints_the_table_of_the_answers_until_then(plain_weights, check, monkeypatch):
    draft_along, calls = check_head.draft_along, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == stop:
            raise KeyboardInterrupt
        draft_along(*args)

    monkeypatch.setattr(check_head, "draft_along", interrupted)
    stop = 4
    lines, report = check(plain_weights, status=130)
    assert report["answers"] == 3 and not report["complete"] and "along 3 answers" in lines[-3]
    assert lines[-1] == report["verdict"] and report["readings"][0]["accept_length"] > 3
    calls, stop = [], 1
    assert check.again(status=130) == ([], None)


def test_it_ends_with_the_answer_during_which_the_time_is_over(plain_weights, check, monkeypatch):
    now, draft_along = [0.0], check_head.draft_along

    def slow(*args):
        now[0] += 25
        draft_along(*args)

    monkeypatch.setattr(check_head, "draft_along", slow)
    monkeypatch.setattr(check_head.time, "monotonic", lambda: now[0])
    assert check(plain_weights, "--minutes", "1")[1]["answers"] == 3
    assert check.again("--minutes", "100")[1]["answers"] == len(QUESTIONS)


def test_decoding_takes_at_most_half_of_the_time(target, monkeypatch):
    _, model, prompts, answers = target
    now = iter(range(1000))
    monkeypatch.setattr(check_head.time, "monotonic", lambda: next(now))
    made = [answer for _, answer in check_head.answers(model, prompts[:1], LENGTH, frozenset(), 20)]
    assert 2 < len(made[0]) <= 10 and made[0] == answers[0][:len(made[0])]


def test_a_lead_that_a_few_answers_make_is_called_chance():
    def reading(name, *lengths):
        return check_head.Reading(name, None, None, "Do that", lengths=[*lengths])

    taken = reading("as read", *[[2, 3, 2]] * 8)
    best, line = check_head.verdict([taken, reading("other", *[[2, 3, 2]] * 6, [3, 3], [3, 2])])
    assert best.name == "other" and line.startswith("The reading taken is as good as any: other is ahead by 0.0")
    best, line = check_head.verdict([taken, reading("other", *[[4, 3]] * 8), reading("more", *[[4, 4]] * 8)])
    assert line == "Better: more, 4.00 tokens a step against 2.33. Do that; then check again."
    best, line = check_head.verdict([taken, reading("other", *[[2, 3, 2]] * 8)])
    assert best is taken and line == "The reading taken is the best."
    assert check_head.verdict([reading("as read", [1, 1, 1, 2, 1, 1, 1])])[1].endswith("may be for another target.")


def random_head(model, n_state=3, **flags):
    spec = Eagle3Spec(replace(model.config, n_layer=1), model.config.dim, tuple(range(2, 2 + n_state)),
                      model.config.vocab_size, own_embedding=False, **flags)
    head = Eagle3Head(spec, model)
    for name, parameter in head.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    head.own_ids = torch.arange(model.config.vocab_size)
    return head


def test_norms_are_turned_over_where_the_head_has_their_weights(target):
    model = target[1]
    names = lambda head: [reading.name for reading in check_head.all_readings(head, head.spec)]
    assert {"fc_norm on", "norm_before_fc on"}.isdisjoint(names(random_head(model)))
    head = random_head(model, fc_norm=True, norm_before_fc=True, norm_output=True)
    readings = check_head.all_readings(head, head.spec)
    assert [reading.name for reading in readings[-4:]] == ["norm_before_residual on", "norm_output off", "fc_norm off",
                                                           "norm_before_fc off"]
    tokens, states = torch.randint(0, 90, (1, 5)), torch.randn(1, 5, 96)

    def second_drafts(head):
        drafts = head(tokens, states, torch.arange(5))
        return head.draft_logits(head(tokens, drafts, torch.arange(1, 6), is_draft=True))

    outputs = []
    for reading in readings:
        with check_head.read_as(head, reading):
            assert head.spec == reading.spec and head.capture == reading.capture
            outputs.append(second_drafts(head))
        other = Eagle3Head(reading.spec, model)     # the same weights in a head that was built so
        weights = head.state_dict()
        other.load_state_dict({name: weights[name] for name in other.state_dict()})     # some readings have fewer norms
        other.inv_freq = rope_inv_freq(reading.args)
        assert torch.equal(outputs[-1], second_drafts(other))
    assert torch.equal(outputs[0], second_drafts(head))     # as before
    shifted = {reading.name for reading in readings if "hidden states" in reading.name}
    assert all(not torch.equal(outputs[0], out) for reading, out in zip(readings[1:], outputs[1:])
               if reading.name not in shifted)


def test_readings_of_layers_and_of_rope_lie_within_the_target_and_differ_from_the_one_taken(target):
    model = target[1]
    head = random_head(model, n_state=1)
    head.spec = replace(head.spec, capture=(8,))      # the final state alone: there is none above
    assert [r.name for r in check_head.all_readings(head, head.spec)][1:3] == ["hidden states 7 (one down)",
                                                                               "RoPE base 10000 (the default)"]
    scaling = {"rope_type": "linear", "factor": 2.0}
    scaled = replace(head.config, rope_theta=1e6, rope_scaling=scaling)
    head.config, head.spec = scaled, replace(head.spec, args=scaled)
    readings = check_head.all_readings(head, replace(head.spec, args=replace(scaled, rope_theta=7e5)))
    assert [reading.name for reading in readings[2:-2]] == [
        "RoPE base 700000 (the file's)", "RoPE base 10000 (the default)", "RoPE base 500 (the target's)",
        "no RoPE scaling"]
    assert all(reading.args.rope_scaling == scaling for reading in readings[2:5])
    head.config = replace(scaled, rope_scaling=None)
    model.config, kept = scaled, model.config
    last = check_head.all_readings(head, head.spec)[-3]
    model.config = kept
    assert last.name == "the target's RoPE, with its scaling" and last.args.rope_scaling == scaling


@pytest.mark.parametrize("theta", [None, 500.0])
def test_eagle_1_heads_have_readings_of_rope_alone(target, check, tmp_path, theta):
    model = target[1]
    head = EagleHead(replace(model.config, n_layer=1), model)
    write_head(head, tmp_path / "head")
    with edited_json(tmp_path / "head/config.json") as config:
        config |= {} if theta is None else {"rope_theta": theta}
    lines, report = check.again()
    source = "the default: config.json has none" if theta is None else "config.json"
    base, other = ("10000", "500 (the target's)") if theta is None else ("500", "10000 (the default)")
    assert lines[0] == ("EAGLE-1 or 2 head: the final hidden state, biases of fc, RoPE base "
                        f"{base} ({source}), whole vocabulary")
    assert check.err.count(lines[0]) == 1
    assert [reading["name"] for reading in report["readings"]] == ["as read", f"RoPE base {other}"]
    assert "rope_theta in the head's config.json is wrong" in report["readings"][1]["remedy"]
    assert lines[-1].endswith("No reading drafts well: the head may be for another target.")


@pytest.mark.parametrize("options, culprit", [
    (["--questions", "nowhere.jsonl"], "nowhere.jsonl"), (["--json", "missing/out.json"], "--json missing/out.json"),
    (["--aux-layers", "2", "4"], "--aux-layers names 2"), (["--minutes", "0"], "--minutes"),
    (["--max-new-tokens", "16", "--minutes", "1e-9"], "the answers are too short to draft 5 tokens along them")])
def test_bad_input_is_one_line(plain_weights, check, options, culprit, capsys):
    try:
        assert check(plain_weights, *options, status=2) == ([], None)
        err = check.err
    except SystemExit as error:
        assert error.code == 2
        err = capsys.readouterr().err
    errors = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and culprit in errors[0]


def test_a_list_that_says_nothing_of_how_it_counts_is_read_with_aux_layers(plain_weights, check):
    config = dict(eagle_aux_hidden_state_layer_ids=[3, 5, 6])
    assert check(plain_weights, status=2, **config) == ([], None) and "--aux-layers" in check.err
    lines, report = check.again("--aux-layers", "3", "5", "6")
    assert "Give --aux-layers 2 4 5;" in lines[-1]


# What tune_tree.py and training's evaluation have of the same


@torch.inference_mode()
@pytest.mark.parametrize("n_state, flags", [(3, {}), (1, dict(norm_output=True))])     # one is as wide as the head
@pytest.mark.parametrize("window", [None, 3])
def test_draft_ranks_of_eagle_3_are_the_steps_that_decoding_takes(target, n_state, flags, window):
    _, model, prompts, _ = target
    head = random_head(model, n_state, **flags)
    head.window = window
    answer = naive_decode(model, prompts[0], 60)
    head.set_draft_vocab(torch.tensor(answer).unique()[:24].tolist())
    wide = [[r] for r in range(20)] + [[r, s] for r in range(8) for s in range(20)]
    ranks, = tune_tree.measure_ranks(model, head, prompts[:1], [answer], max_depth=2)
    foreseen = tree_search.accept_lengths(set(map(tuple, wide)), list(zip(*ranks.tolist())))
    taken = generate(model, prompts[:1], 60, head=head, tree=StaticTree.from_paths(wide)).accept_lengths[0]
    assert foreseen[:-1] == taken[:len(foreseen) - 1] and len(foreseen) > 15 and set(foreseen) == {1, 2, 3}
    ids, features = tune_tree.features_of(model, prompts[0] + answer, head.capture)
    whole = draft_ranks(head, ids, features, 2)
    assert torch.equal(whole[:, len(prompts[0]) - 1:], ranks)       # as from there alone


def test_a_tree_is_tuned_for_an_eagle_3_head(target, plain_weights, check, capsys, monkeypatch):
    folder = target[0]
    check(plain_weights)
    monkeypatch.setattr(tune_tree, "can_trace", lambda model: False)    # what it times does not matter here
    (check.head / "one.jsonl").write_text(json.dumps({"turns": QUESTIONS[:1]}))
    args = tune_tree.parse_args(["--checkpoint", str(folder), "--eagle", str(check.head), "--max-new-tokens", "16",
                                 "--max-depth", "3", "--max-nodes", "3", "--repeats", "3", "--dtype", "float32",
                                 "--max-rank", "1", "--device", "cpu", "--questions", str(check.head / "one.jsonl")])
    assert tune_tree.main(args) == 0, capsys.readouterr().err
    made = json.loads((check.head / "tree.json").read_text())
    assert made["accept_by_depth_and_rank"][0][0] > 0.9 and made["accept_by_depth_and_rank"][2][0] > 0.9
