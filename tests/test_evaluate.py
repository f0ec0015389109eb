"""scripts/evaluate.py, report.py and peers.py: what is asked, what is written, and that the report recomputes from it.

    python -m pytest tests/test_evaluate.py -q
"""
import datetime
import json
import os
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch

import quantize
from eagle_step import EagleStep
from model import Transformer
from reference import edited_json, naive_decode, read_safetensors, write_checkpoint
from scripts import evaluate, generate_data, peers, report, tune_tree
from scripts.figures import (acceptance, answers_file, figures, figures_of_arms, is_rounding, plain_of, read_answers,
                             speedup)
from scripts.tables import markdown, rest_text, summary
from test_eagle import head_config, head_weights, write_head
from tokenizer import Tokenizer

QUESTIONS = [{"question_id": 7, "category": "math", "turns": ["the fox", "and then"]},
             {"question_id": 8, "category": "writing", "turns": ["the lazy dog"]},
             {"question_id": 9, "category": "math", "turns": ["dogs sleep", "for the day"]}]
ROOT = Path(__file__).resolve().parent.parent
README, DOC = ROOT / "README.md", ROOT / "docs/evaluation.md"
COPYING = ROOT / "benchmarks/copying.jsonl"
ARMS = ["plain", "eagle-chain-3", "eagle-static"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny target and head. Not to be written into."""
    folder = tmp_path_factory.mktemp("evaluate")
    checkpoint = write_checkpoint(folder / "tiny", ascii_only=True)
    config = head_config(Transformer.from_pretrained(checkpoint, dtype=torch.float32))
    torch.manual_seed(0)
    return checkpoint, write_head(folder / "head", config, head_weights(config, None))


@pytest.fixture
def run(pair, tmp_path, capsys):
    """run(*options) -> (exit status, stdout, stderr); answers go to tmp_path/out."""
    questions = tmp_path / "set.jsonl"
    questions.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))

    def run(*options, questions=questions):
        capsys.readouterr()
        argv = ["--questions", questions, "--checkpoint", pair[0], "--eagle", pair[1], "--out", tmp_path / "out",
                "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 24, "--tree", "chain:3", "static",
                *options]
        try:
            status = evaluate.main(evaluate.parse_args([str(x) for x in argv]))
        except SystemExit as leave:
            status = leave.code
        return status, *capsys.readouterr()

    return run


def lines_of(out, arm):
    return [json.loads(line) for line in answers_file(out, arm).read_text().splitlines()]


def test_the_report_recomputes_from_the_answers_file(run, tmp_path):
    status, text, err = run()
    assert status == 0, err
    out = tmp_path / "out"
    made = json.loads((out / "report.json").read_text())
    assert made["arms"] == ARMS and made["questions"] == 3 and made["turns"] == 5
    for name, inside in [("overall", lambda q: True), ("math", lambda q: q["category"] == "math"),
                         ("writing", lambda q: q["category"] == "writing")]:
        figures = made["overall"] if name == "overall" else made["categories"][name]
        speeds = {}
        for arm in ARMS:    # by hand, from the lines alone
            choices = [line["choices"][0] for line in lines_of(out, arm) if inside(line)]
            tokens = sum(n for c in choices for n in c["new_tokens"])
            timed = sum(n for c in choices for n in c["timed_tokens"])
            assert timed == tokens - sum(len(c["new_tokens"]) for c in choices)     # the first is the prefill's
            speeds[arm] = timed / sum(s for c in choices for s in c["decode_seconds"])
            steps = [n for c in choices for turn in c["accept_lengths"] for n in turn]
            assert figures[arm]["tokens_per_second"] == speeds[arm] and figures[arm]["new_tokens"] == tokens
            if arm == "plain":
                assert set(steps) == {1} and "speedup" not in figures[arm]
                continue
            assert figures[arm]["speedup"] == speeds[arm] / speeds["plain"]
            assert figures[arm].get("mean_accept_length", 1) == sum(steps) / len(steps)
            assert figures[arm].get("target_passes", len(steps)) == len(steps)
            plain = [line["choices"][0] for line in lines_of(out, "plain") if inside(line)]
            same = [a == b for mine, base in zip(choices, plain) for a, b in zip(mine["tokens"], base["tokens"])]
            assert figures[arm]["identical"] == sum(same) and figures[arm]["answers"] == len(same)
    assert f"{made['overall']['eagle-static']['tokens_per_second']:.1f}" in text
    assert (out / "report.md").read_text() in text
    again = (out / "report.json").read_bytes()
    assert report.main(report.parse_args([str(out)])) == 0 and (out / "report.json").read_bytes() == again


def test_the_page_of_a_run_holds_its_questions_and_answers(run, tmp_path):
    assert run()[0] == 0
    out = tmp_path / "out"
    kept = {"question_id", "category", "turns"}
    assert [{key: q[key] for key in kept} for q in evaluate.read_questions(str(out / "questions.jsonl"))] == QUESTIONS
    text = (out / "report.html").read_text()
    assert all(turn in text for q in QUESTIONS for turn in q["turns"])
    assert all(f"<th>{arm}</th>" in text for arm in ARMS)
    assert not (out / "pages").exists() and 'href="pages' not in text
    assert json.loads((out / "run.json").read_text())["recorded"] is None


def shown_in(file):
    """{name of an answer: its tokens} of a page of a question."""
    data = json.loads(re.search(r"<script[^>]*json[^>]*>(.*?)</script>", file.read_text(), re.S)[1])
    return {answer["name"]: answer["tokens"] for answer in data["answers"]}


def test_with_page_each_question_has_one_with_every_turn_of_our_drafting_arms(run, pair, tmp_path):
    status, text, err = run("--page", "--peers")
    assert status == 0 and "steps recorded" in text, err
    out = tmp_path / "out"
    assert json.loads((out / "run.json").read_text())["recorded"] is True
    for n, question in enumerate(QUESTIONS):
        answers = {arm: lines_of(out, arm)[n]["choices"][0]["tokens"] for arm in ARMS[1:]}
        assert shown_in(out / f"pages/{question['question_id']}.html") == {
            f"{arm}, turn {turn + 1}": tokens[turn] for turn in range(len(question["turns"]))
            for arm, tokens in answers.items()}
        assert f'href="pages/{question["question_id"]}.html"' in (out / "report.html").read_text()
    assert "recorded" not in lines_of(out, "eagle-static")[0]["choices"][0]


def test_a_recorded_run_that_is_interrupted_goes_on_and_each_answered_question_has_its_page(run, tmp_path, monkeypatch):
    ask, out, append = evaluate.ask, tmp_path / "out", evaluate.append_answer

    def interrupted(folder, arm, question, *rest):
        if question["question_id"] == 8 and arm == ARMS[1]:     # after its page, in the middle of its answers
            raise KeyboardInterrupt
        append(folder, arm, question, *rest)

    monkeypatch.setattr(evaluate, "append_answer", interrupted)
    assert run("--page")[0] == 130
    assert {file.name for file in out.glob("pages/*")} == {"7.html", "8.html"}
    first = (out / "pages/7.html").read_bytes()
    (out / "pages/8.html").write_text("old")
    monkeypatch.setattr(evaluate, "append_answer", append)
    status, _, err = run()
    assert status == 2 and "with recorded True, now it is None" in err and "--out" in err
    asked = []
    monkeypatch.setattr(evaluate, "ask", lambda question, *rest: asked.append(question["question_id"])
                        or ask(question, *rest))
    assert run("--page")[0] == 0 and asked == [8, 9]
    assert (out / "pages/7.html").read_bytes() == first and len(shown_in(out / "pages/8.html")) == 2
    assert {file.name for file in out.glob("pages/*")} == {"7.html", "8.html", "9.html"}


def test_answers_are_in_fastchats_form_and_say_what_was_decoded(run, pair, tmp_path):
    assert run()[0] == 0
    tokenizer = Tokenizer.from_pretrained(pair[0])
    for arm in ARMS:
        lines = lines_of(tmp_path / "out", arm)
        assert [line["question_id"] for line in lines] == [7, 8, 9]
        for line, question in zip(lines, QUESTIONS):
            assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= set(line)
            assert arm in line["model_id"]
            choice = line["choices"][0]
            assert choice["index"] == 0 and len(choice["turns"]) == len(choice["wall_time"]) == len(question["turns"])
            for text, tokens, n, lengths in zip(*(choice[key] for key in ("turns", "tokens", "new_tokens",
                                                                          "accept_lengths"))):
                assert tokenizer.decode(tokens).strip() == text and len(tokens) == n
                assert n - 1 <= sum(lengths) < n + 9    # the first is the prefill's, the last step may have been cut


def test_in_fp32_every_greedy_answer_is_plain_decodings_and_turns_follow_it(run, pair, tmp_path):
    assert run()[0] == 0
    tokenizer = Tokenizer.from_pretrained(pair[0])
    plain = [line["choices"][0] for line in lines_of(tmp_path / "out", "plain")]
    for arm in ARMS[1:]:
        theirs = [line["choices"][0] for line in lines_of(tmp_path / "out", arm)]
        assert [c["tokens"] for c in theirs] == [c["tokens"] for c in plain]
        assert all(d is None for c in theirs for d in c["divergence"])
    for choice, question in zip(plain, QUESTIONS):
        messages = []
        for turn, n in zip(question["turns"], choice["prompt_tokens"]):
            messages.append({"role": "user", "content": turn})
            assert len(tokenizer.apply_chat_template(messages)) == n
            messages.append({"role": "assistant", "content": tokenizer.decode(choice["tokens"][len(messages) // 2])})


def test_a_system_message_stands_in_front_of_every_question(run, pair, tmp_path):
    status, text, err = run("--system", "be brief", "--tree", "chain:3")
    assert status == 0 and "with a system message" in text, err
    tokenizer, system = Tokenizer.from_pretrained(pair[0]), {"role": "system", "content": "be brief"}
    for line, question in zip(lines_of(tmp_path / "out", "plain"), QUESTIONS):
        messages, choice = [system], line["choices"][0]
        for turn, tokens, n in zip(question["turns"], choice["tokens"], choice["prompt_tokens"]):
            messages.append({"role": "user", "content": turn})
            assert len(tokenizer.apply_chat_template(messages)) == n > len(tokenizer.apply_chat_template(messages[1:]))
            messages.append({"role": "assistant", "content": tokenizer.decode(tokens)})
    shutil.rmtree(tmp_path / "out")
    longest = {"question_id": "long", "turns": ["the fox " * 10]}
    (tmp_path / "long.jsonl").write_text(json.dumps(longest))
    room = len(tokenizer.apply_chat_template([{"role": "user", "content": longest["turns"][0]}])) + 1
    assert run("--max-seq-length", room, questions=tmp_path / "long.jsonl")[0] == 0
    shutil.rmtree(tmp_path / "out")
    status, _, err = run("--max-seq-length", room, "--system", "be brief", questions=tmp_path / "long.jsonl")
    assert status == 2 and "question long has" in err
    status, _, err = run("--system", "\ud83d")
    assert status == 2 and "--system is not UTF-8 text" in err and err.count("\n") == 1


def test_a_rerun_answers_only_what_is_missing_and_a_cut_line_is_answered_again(run, tmp_path, monkeypatch):
    assert run()[0] == 0
    out = tmp_path / "out"
    before = {arm: answers_file(out, arm).read_bytes() for arm in ARMS}
    asked = []
    ask = evaluate.ask
    monkeypatch.setattr(evaluate, "ask", lambda question, *rest: asked.append(question["question_id"])
                        or ask(question, *rest))
    assert run()[0] == 0 and asked == []
    assert {arm: answers_file(out, arm).read_bytes() for arm in ARMS} == before
    file = answers_file(out, "eagle-chain-3")
    file.write_bytes(file.read_bytes()[:-40])       # as a kill leaves it
    assert run()[0] == 0 and asked == [9]
    for arm in ARMS:
        assert [line["question_id"] for line in lines_of(out, arm)] == [7, 8, 9]
    status, _, err = run("--max-new-tokens", 30)
    assert status == 2 and "max_new_tokens" in err and "--out" in err and len(err.strip().splitlines()) == 1


def test_an_interruption_changes_no_answer(run, tmp_path, monkeypatch):
    """At a temperature: what a question draws depends on its place in the set."""
    options = ["--temperature", 1, "--tree", "chain:3"]
    assert run(*options)[0] == 0
    out = tmp_path / "out"
    whole = {arm: [line["choices"][0]["tokens"] for line in lines_of(out, arm)] for arm in ARMS[:2]}
    assert len({str(tokens) for tokens in whole["plain"]}) == 3
    shutil.rmtree(out)
    ask = evaluate.ask

    def interrupted(question, *rest):
        if question["question_id"] == 8:
            raise KeyboardInterrupt
        return ask(question, *rest)

    monkeypatch.setattr(evaluate, "ask", interrupted)
    assert run(*options)[0] == 130
    assert [line["question_id"] for line in lines_of(out, "plain")] == [7]
    monkeypatch.setattr(evaluate, "ask", ask)
    assert run(*options)[0] == 0
    assert {arm: [line["choices"][0]["tokens"] for line in lines_of(out, arm)] for arm in ARMS[:2]} == whole


def test_a_run_that_goes_on_names_a_new_commit_once(run, tmp_path):
    def commit_after(before):
        change(tmp_path / "out/run.json", commit=before)
        answers_file(tmp_path / "out", "plain").write_text("")
        assert run("--limit", 1)[0] == 0
        return json.loads((tmp_path / "out/run.json").read_text())["commit"]

    assert run("--limit", 1)[0] == 0
    commit = json.loads((tmp_path / "out/run.json").read_text())["commit"]
    assert [commit_after(before) for before in (commit, "old", f"old, then {commit}")] == [
        commit, f"old, then {commit}", f"old, then {commit}"]


@pytest.fixture(scope="module")
def answered(pair, tmp_path_factory):
    """A run of one question that is done, and its options, with a pair and a template that may be written into."""
    folder = tmp_path_factory.mktemp("answered")
    for source, name in zip(pair, ("tiny", "head")):
        shutil.copytree(source, folder / name)
    (folder / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ strftime_now('%d %m') }}")
    (folder / "set.jsonl").write_text(json.dumps(QUESTIONS[1]) + "\n")
    (folder / "tree.json").write_text('[[0], [0, 0]]')
    argv = ["--questions", folder / "set.jsonl", "--checkpoint", folder / "tiny", "--eagle", folder / "head",
            "--out", folder / "out", "--device", "cpu", "--dtype", "float32", "--max-new-tokens", 4,
            "--tree", folder / "tree.json", "--chat-template", folder / "t.jinja"]
    argv = [str(x) for x in argv]
    assert evaluate.main(evaluate.parse_args(argv)) == 0
    return folder, argv


CHANGES = {    # what has changed since the answers were given, and the word that names it
    "max_seq_length": lambda folder, argv: argv + ["--max-seq-length", "99"],
    "max_new_tokens": lambda folder, argv: argv + ["--max-new-tokens", "5"],
    "seed": lambda folder, argv: argv + ["--seed", "1"],
    "system": lambda folder, argv: argv + ["--system", "be brief"],
    "recorded": lambda folder, argv: argv + ["--page"],
    "threads": lambda folder, argv: change(folder / "out/run.json", threads=99) or argv,
    "compiled": lambda folder, argv: change(folder / "out/run.json", compiled=True) or argv,
    "draft vocab": lambda folder, argv: (folder / "head/draft_vocab.json").write_text('{"ids": [5, 6]}') and argv,
    "head": lambda folder, argv: flip(folder / "head/model.safetensors") or argv,
    "target": lambda folder, argv: flip(folder / "tiny/model.safetensors") or argv,
    "template": lambda folder, argv: (folder / "t.jinja").write_text("{{ messages[0].content }}") and argv,
    "another template": lambda folder, argv: argv + ["--template-args", '{"enable_thinking": false}'],
    "trees": lambda folder, argv: (folder / "tree.json").write_text("[[0]]") and argv,
    "questions": lambda folder, argv: (folder / "set.jsonl").write_text(
        json.dumps(QUESTIONS[1] | {"turns": ["other"]})) and argv,
}


def change(file, **values):
    with edited_json(file) as content:
        content |= values


def flip(file):
    """One bit of the last weight."""
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_goes_on_only_with_what_it_was_begun_with(answered, tmp_path, capsys, what):
    shutil.copytree(answered[0], tmp_path / "copy")
    argv = [text.replace(str(answered[0]), str(tmp_path / "copy")) for text in answered[1]]
    with edited_json(tmp_path / "copy/out/run.json") as content:
        content |= {key: content[key].replace(str(answered[0]), str(tmp_path / "copy"))
                    for key in ("checkpoint", "eagle")}
        content["tree"] = [content["tree"][0].replace(str(answered[0]), str(tmp_path / "copy"))]
    before = {file: file.read_bytes() for file in (tmp_path / "copy/out").rglob("*.json*") if file.name != "run.json"}
    argv = CHANGES[what](tmp_path / "copy", argv)
    capsys.readouterr()
    assert evaluate.main(evaluate.parse_args(argv)) == 2
    err = capsys.readouterr().err
    assert what in err and "--out" in err and err.count("\n") == 1, err
    assert before == {file: file.read_bytes() for file in before}


def test_a_run_goes_on_the_next_day_with_the_date_that_its_template_was_told(answered, tmp_path, monkeypatch):
    tomorrow = datetime.datetime.now() + datetime.timedelta(days=1)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return tomorrow

    folder, argv = answered
    for arm in ("plain", "eagle-tree"):
        shutil.copy(answers_file(folder / "out", arm), tmp_path)
        answers_file(folder / "out", arm).write_text("")
    monkeypatch.setattr(datetime, "datetime", Tomorrow)
    assert evaluate.main(evaluate.parse_args(argv)) == 0
    for arm in ("plain", "eagle-tree"):
        before, after = (json.loads(file.read_text())["choices"][0] for file in (
            tmp_path / f"{arm}.jsonl", answers_file(folder / "out", arm)))
        assert before["tokens"] == after["tokens"] and before["prompt_tokens"] == after["prompt_tokens"]


@pytest.fixture(scope="module")
def arms(pair):
    """Plain decoding and two trees over the tiny pair in fp32."""
    args = evaluate.parse_args(["--questions", "", "--checkpoint", str(pair[0]), "--eagle", str(pair[1]),
                                "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "12"])
    args.tree = None
    model, head, tokenizer, _ = evaluate.cli.load(args)
    return evaluate.our_arms(args, model, head, tokenizer, ["chain:3", "static"], 128)


def answer(tokens, lengths, kind="plain"):
    return peers.Answer(tokens, len(tokens) - 1, 0.1, 0.1, lengths, [0] * len(lengths), [kind] * len(lengths))


@torch.inference_mode()
def test_a_divergence_names_the_place_and_the_gap_and_how_much_the_passes_differ_there(arms, monkeypatch):
    model = arms["plain"].decoder.model
    prompt, plain, other = [5, 9, 11], answer([20, 21, 22, 23], [1] * 3), answer([20, 21, 30, 31], [1, 2], "tree")
    assert evaluate.divergence(arms["plain"], arms["eagle-static"], prompt, plain, plain) is None
    logits, _ = model(torch.tensor([prompt + [20, 21]]), torch.arange(5))
    gap = (logits[0, -1].max() - logits[0, -1, [22, 30]].min()).item()
    for arm in ARMS[1:]:
        found = evaluate.divergence(arms["plain"], arms[arm], prompt, plain, other)
        assert (found["position"], found["tokens"]) == (2, [22, 30]) and found["gap"] == pytest.approx(gap, rel=1e-4)
        assert found["error"] < 1e-4
    forward, rows = model.forward, []

    def off(tokens, *args, **kwargs):
        rows.append(tokens.shape[1])
        logits, features = forward(tokens, *args, **kwargs)
        return (logits + 0.25 if tokens.shape[1] == 26 else logits), features

    monkeypatch.setattr(model, "forward", off)
    found = evaluate.divergence(arms["plain"], arms["eagle-static"], prompt, plain, other)
    assert found["error"] == pytest.approx(0.25, abs=1e-4)
    assert rows == [1, 1, 26, 26]       # the passes that the arms made up to there; the first token is the prefill's
    assert not is_rounding({"gap": 0.6, "error": 0.25}, None)
    assert is_rounding({"gap": 0.4, "error": 0.25}, None)
    ended = evaluate.divergence(arms["plain"], arms["eagle-static"], prompt, plain, answer([20, 21], [1], "tree"))
    assert ended["gap"] is None and not is_rounding(ended, None)
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: (forward(*args, **kwargs)[0] * torch.nan, None))
    with pytest.raises(ValueError, match="not finite in float32"):
        evaluate.divergence(arms["plain"], arms["eagle-static"], prompt, plain, other)


def test_an_answer_that_differs_in_exact_decoding_is_a_failure_by_name(run, tmp_path, monkeypatch):
    options = "--dtype", "bfloat16", "--exact", "--tree", "chain:3"
    assert run(*options)[0] == 0
    shutil.rmtree(tmp_path / "out")
    parted = {"position": 4, "tokens": [7, 9], "logits": [2.5, 2.25], "gap": 0.25, "error": 0.5}
    monkeypatch.setattr(evaluate, "divergence", lambda *args: parted)
    status, _, err = run(*options)
    assert status == 2 and "5 answers of eagle-chain-3 differ" in err and "Traceback" not in err
    assert "question 7, turn 1, token 5, tokens [7, 9] with logits [2.5, 2.25]" in err


def in_int8(checkpoint, folder):
    out = folder / f"{checkpoint.name}-int8"
    argv = ["--checkpoint", str(checkpoint), "--out", str(out), "--mode", "int8", "--device", "cpu"]
    assert quantize.main(quantize.parse_args(argv)) == 0
    return out


@pytest.mark.parametrize("too_far", [0, 1])
def test_in_16_bits_rounding_is_told_from_drafts_verified_one_position_too_far(run, tmp_path, pair, monkeypatch,
                                                                               too_far):
    verify = EagleStep.verify
    monkeypatch.setattr(EagleStep, "verify", lambda self, draft, n_slot: verify(
        self, draft._replace(depths=draft.depths + too_far), n_slot))
    status, text, err = run("--dtype", "bfloat16", "--no-exact", "--also", in_int8(pair[0], tmp_path))
    assert status == 0, err
    made = json.loads((tmp_path / "out/report.json").read_text())["overall"]
    for arm in (f"{form}{arm}" for form in ("", "int8-") for arm in ARMS[1:]):
        parted, unexplained = made[arm].get("divergences", []), made[arm].get("unexplained", 0)
        assert unexplained > len(parted) / 2 if too_far else unexplained == 0, (arm, parted)
        assert not too_far or len(parted) >= 3


def test_another_format_of_the_model_is_compared_with_its_own_plain_decoding(run, pair, tmp_path, monkeypatch):
    compared = set()
    monkeypatch.setattr(evaluate, "divergence", lambda plain_arm, arm, prompt, plain, other: compared.add(
        (type(arm.decoder.model.layers[0].feed_forward.w2).__name__, tuple(plain.tokens))))
    status, text, err = run("--also", in_int8(pair[0], tmp_path))
    assert status == 0, err
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert made["arms"] == [*ARMS, *(f"int8-{arm}" for arm in ARMS)] and "also in int8" in text
    tokens = {arm: [line["choices"][0]["tokens"] for line in lines_of(tmp_path / "out", arm)] for arm in made["arms"]}
    assert tokens["int8-plain"] != tokens["plain"] and tokens["int8-eagle-static"] == tokens["int8-plain"]
    for arm in ARMS[1:]:
        figures = made["overall"][f"int8-{arm}"]
        assert figures["identical"] == figures["answers"] == 5      # equal to int8-plain, though not to plain
        assert figures["speedup"] == figures["tokens_per_second"] / made["overall"]["plain"]["tokens_per_second"]
        own = figures["tokens_per_second"] / made["overall"]["int8-plain"]["tokens_per_second"]
        assert figures["own_speedup"] == own and f" {own:.2f}x |" in text and "over its own plain" in text
        assert figures["divergences"] == [] and figures["unexplained"] == 0
        assert "own_speedup" not in made["overall"][arm]
    assert "identical" not in made["overall"]["int8-plain"] and "own_speedup" not in made["overall"]["int8-plain"]
    in_fp32 = "PackedLinear" if torch.backends.mkldnn.is_available() else "Linear"
    assert compared == {(linear, tuple(turn)) for linear, arm in ((in_fp32, "plain"), ("QuantLinear", "int8-plain"))
                        for choice in tokens[arm] for turn in choice}


def test_each_arm_has_the_plain_arm_of_its_own_format():
    arms = ["plain", "int4-plain", "int4-g64-plain", "eagle-static", "int4-eagle-static", "int4-g64-eagle-static",
            "transformers"]
    assert [plain_of(arm, arms) for arm in arms] == [
        "plain", "int4-plain", "int4-g64-plain", "plain", "int4-plain", "int4-g64-plain", "plain"]


def test_answers_of_an_earlier_run_are_read_and_what_it_did_not_measure_is_said(run, tmp_path, capsys):
    assert run()[0] == 0
    out = tmp_path / "out"
    with edited_json(out / "run.json") as file:
        for key in ("stamps", "drafting", "left_out", "template_date"):
            del file[key]
        file["rounding"] = {"plain": {"logit_error": 0.5, "gap_bound": 1.0}}
    lines = lines_of(out, "eagle-static")
    lines[0]["choices"][0]["divergence"] = [{"position": 3, "tokens": [1, 2], "gap": gap} for gap in (0.9, 1.1)]
    lines[0]["choices"][0]["tokens"][0][3] += 1
    answers_file(out, "eagle-static").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert report.main(report.parse_args([str(out)])) == 0, capsys.readouterr().err
    made, text = json.loads((out / "report.json").read_text())["overall"], (out / "report.md").read_text()
    assert made["eagle-static"]["identical"] == 4 and made["eagle-static"]["unexplained"] == 1
    assert "| 2 of 5 | 1.1, 1.1 | up to 0.5 | 1 |" in text and "not measured where" in text


def test_at_a_temperature_seeds_repeat_and_texts_are_not_compared(run, tmp_path):
    status, text, err = run("--temperature", 1, "--seed", 3)
    assert status == 0 and "answers as plain" not in text, err
    first = [line["choices"][0]["tokens"] for line in lines_of(tmp_path / "out", "eagle-static")]
    shutil.rmtree(tmp_path / "out")
    assert run("--temperature", 1, "--seed", 3)[0] == 0
    assert [line["choices"][0]["tokens"] for line in lines_of(tmp_path / "out", "eagle-static")] == first


def test_acceptance_by_depth_counts_what_the_draft_above_allowed():
    made = acceptance([1, 1, 2, 4])
    assert made["mean_accept_length"] == 2 and made["target_passes"] == 4
    assert made["acceptance_by_depth"] == [2 / 4, 1 / 2, 1 / 1] and made["tokens_per_step"] == {"1": 2, "2": 1, "4": 1}


def test_the_interval_holds_the_speedup_and_narrows_with_agreement():
    line = lambda tokens, seconds: {"choices": [{"timed_tokens": [tokens], "decode_seconds": [seconds]}]}
    plain = [line(10, 1.0) for _ in range(20)]
    even = speedup(plain, [line(10, 0.5) for _ in range(20)])
    assert even["speedup"] == 2 and even["speedup_interval"] == [2, 2]
    uneven = speedup(plain, [line(10, 0.2 + 0.05 * n) for n in range(20)])
    low, high = uneven["speedup_interval"]
    assert low < uneven["speedup"] < high


def test_looping_and_empty_answers_are_counted_and_the_figures_of_the_rest_given():
    def lines(texts, tokens, seconds, lengths):
        return [{"question_id": n, "category": "c", "choices": [{
            "turns": [text], "tokens": [ids], "new_tokens": [len(ids)], "timed_tokens": [len(ids)],
            "decode_seconds": [s], "accept_lengths": [steps]}]}
            for n, (text, ids, s, steps) in enumerate(zip(texts, tokens, seconds, lengths))]

    loop, fine = [1, 2, 3, 4, 5, 6, 7, 8] * 3, list(range(24))
    plain = lines("abcde", [fine, fine, fine, fine, loop], [2, 2, 2, 2, 2], [[1] * 24] * 5)
    fast = lines(["a", "", "c", "d", "e"], [loop, [9], fine, fine, fine], [0.5, 0.1, 1, 2, 0.1],
                 [[4] * 6, [1], [2] * 12, [1] * 24, [6] * 4])
    made = figures_of_arms({"plain": plain, "fast": fast}, {"temperature": 1, "drafting": ["fast"]})
    assert (made["plain"]["looping"], made["plain"]["empty"], made["plain"]["answers"]) == (1, 0, 5)
    assert (made["fast"]["looping"], made["fast"]["empty"]) == (1, 1)
    rest = made["fast"]["without_flaws"]
    assert rest["answers"] == 2 and rest["tokens_per_second"] == 48 / 3 and rest["mean_accept_length"] == 48 / 36
    assert rest["speedup"] == pytest.approx(48 / 3 / (48 / 4))
    assert made["plain"]["without_flaws"]["tokens_per_second"] == 96 / 8
    assert rest_text(rest) == "16.0, 1.33x, 1.33"


def test_a_head_of_which_nothing_is_accepted_is_shown_with_length_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(EagleStep, "grow", reject_all(EagleStep.grow))
    status, text, err = run("--tree", "chain:3+off")
    figures = json.loads((tmp_path / "out/report.json").read_text())["overall"]["eagle-chain-3+off"]
    assert status == 0 and figures["mean_accept_length"] == 1 and figures["acceptance_by_depth"] == [0.0], err
    assert figures["target_passes"] == figures["new_tokens"] - 5 and "| 1.00 |" in text      # of 5 answers


def reject_all(grow):
    """Drafts of a token that the target never says, the end of its turn."""
    def wrong(self, *args):
        draft = grow(self, *args)
        end = torch.full_like(draft.tokens[:, 1:], 2)
        return draft._replace(tokens=torch.cat((draft.tokens[:, :1], end), dim=1))
    return wrong


def test_empty_answers_are_told(run, pair, tmp_path, monkeypatch):
    load = evaluate.cli.load

    def ends_at_once(args):
        model, head, tokenizer, made = load(args)
        tokenizer.stop_ids = frozenset(range(300))
        tokenizer.special_ids = tokenizer.special_ids | tokenizer.stop_ids
        return model, head, tokenizer, made

    monkeypatch.setattr(evaluate.cli, "load", ends_at_once)
    status, text, err = run("--tree", "chain:3")
    assert status == 0, err
    assert "plain: 5 of 5 answers are empty." in text and "eagle-chain-3: 5 of 5 answers are empty." in text


def test_pictures_are_drawn(run, tmp_path):
    pytest.importorskip("matplotlib")
    assert run()[0] == 0
    out = tmp_path / "out"
    assert (out / "report.png").stat().st_size > 10_000
    assert report.main(report.parse_args([str(out), "--waterfall", str(tmp_path / "w.png")])) == 0
    assert (tmp_path / "w.png").stat().st_size > 5_000


def write_data(options, out):
    target = [option for n, option in enumerate(options) if "--eagle" not in options[max(0, n - 1):n + 1]]
    return generate_data.main(generate_data.parse_args([
        *target, "--prompts", str(out.parent.parent / "set.jsonl"), "--out", str(out), "--batch-size", "2",
        "--max-new-tokens", "8"]))


def as_rank(rank, store, options, folder):
    """evaluate.py, tune_tree.py, generate_data.py as one of two ranks; rank 1 has its own folders and another clock."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", EAGLE_TP_CHECK="1")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    measure_costs = tune_tree.measure_costs
    if rank == 1:
        tune_tree.measure_costs = lambda *args: measure_costs(*args) | {
            "target_by_rows": {1: 1.0, 2: 1.0, 3: 99.0, 4: 99.0}}
    folder.mkdir()
    out, questions = ["--out", str(folder / "out")], ["--questions", str(folder.parent / "set.jsonl")]
    statuses = [evaluate.main(evaluate.parse_args([*options, *out, *more])) for more in (
        [*questions, "--max-new-tokens", "12", "--tree", "chain:3", "--limit", "1", "--page"], [*questions, "--peers"])]
    statuses.append(tune_tree.main(tune_tree.parse_args([
        *options, *questions, "--out", str(folder / "tree.json"), "--max-new-tokens", "16", "--used-slots", "16",
        "--repeats", "3", "--max-nodes", "3", "--max-depth", "2"])))
    statuses.append(write_data(options, folder / "data.jsonl"))
    (folder / "statuses").write_text(str(statuses))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_under_torchrun_rank_0_writes_what_one_process_writes(run, pair, tmp_path, forkserver):
    assert run("--tree", "chain:3", "--limit", 1, "--max-new-tokens", 12)[0] == 0
    options = ["--checkpoint", str(pair[0]), "--eagle", str(pair[1]), "--device", "cpu", "--dtype", "float32"]
    (tmp_path / "one").mkdir()
    assert write_data(options, tmp_path / "one/data.jsonl") == 0
    processes = [forkserver.Process(target=as_rank, args=(rank, tmp_path / "store", options, tmp_path / f"rank{rank}"))
                 for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    assert [(tmp_path / f"rank{rank}/statuses").read_text() for rank in range(2)] == ["[0, 2, 0, 0]"] * 2
    for arm in ARMS[:2]:
        ours, theirs = ([line["choices"][0]["tokens"] for line in lines_of(out, arm)]
                        for out in (tmp_path / "out", tmp_path / "rank0/out"))
        assert ours == theirs
    assert len(json.loads((tmp_path / "rank0/tree.json").read_text())["paths"]) <= 3
    assert (tmp_path / "rank0/data.jsonl").read_text() == (tmp_path / "one/data.jsonl").read_text() > ""
    assert [file.name for file in (tmp_path / "rank1").iterdir()] == ["statuses"]
    assert [*shown_in(tmp_path / "rank0/out/pages/7.html")] == ["eagle-chain-3, turn 1", "eagle-chain-3, turn 2"]


COMMITTED = sorted(file.parent for file in ROOT.glob("benchmarks/results/*/run.json"))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_reports_recompute_and_documents_have_their_tables(folder):
    run, made = (json.loads((folder / name).read_text()) for name in ("run.json", "report.json"))
    assert run | figures(read_answers(folder, run["arms"]), run) == made
    assert (folder / "report.md").read_text() == markdown(made)
    name = str(folder.relative_to(ROOT))
    assert f"<!-- {name} -->" in DOC.read_text()
    for file in (DOC, README):
        assert report.fill_in(file.read_text(), {name: made}) == file.read_text()


def test_the_readme_has_one_table_of_chosen_arms_and_every_mark_in_documents_is_of_a_committed_report():
    folders = {str(folder.relative_to(ROOT)) for folder in COMMITTED}
    marks = {file: [*report.MARK.finditer(file.read_text())] for file in (DOC, README)}
    for file, found in marks.items():
        assert len(found) == file.read_text().count("<!-- end -->") and {mark["folder"] for mark in found} <= folders
        assert all(mark["content"] for mark in found)
    assert [mark["arms"] is not None for mark in marks[README]] == [True]
    arms = marks[README][0]["arms"].split()
    assert {"plain", "eagle-tuned", "int4-plain", "int4-eagle-tuned"} <= set(arms)


def test_tables_are_written_between_their_marks_and_nothing_else_changes(run, tmp_path, capsys):
    assert run()[0] == 0
    out, doc, readme = tmp_path / "out", tmp_path / "doc.md", tmp_path / "readme.md"
    doc.write_text(f"one\n<!-- {out} -->\nold\n<!-- end -->\ntwo\n<!-- elsewhere -->\nkept\n<!-- end -->\n")
    readme.write_text(f"<!-- {out}, arms: eagle-chain-3 plain -->\n<!-- end -->\nthree\n")
    argv = [str(out), "--doc", str(doc), str(readme)]
    for _ in range(2):
        assert report.main(report.parse_args(argv)) == 0, capsys.readouterr().err
        made = json.loads((out / "report.json").read_text())
        assert doc.read_text() == (f"one\n<!-- {out} -->\n{summary(made)}<!-- end -->\ntwo\n<!-- elsewhere -->\n"
                                   "kept\n<!-- end -->\n")
    text = readme.read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[0] for row in rows] == ["| EAGLE, chain-3 in float32", "| plain decoding in float32"]
    speeds = [made["overall"][arm]["tokens_per_second"] for arm in ("eagle-chain-3", "plain")]
    assert [row[1] for row in rows] == [f"{speed:.1f}" for speed in speeds]
    assert f"--eagle {made['eagle']} --tree chain:3" in rows[0][-1] and "--eagle" not in rows[1][-1]
    assert text.endswith("<!-- end -->\nthree\n") and made["command"] in text
    for wrong, name in (("<!-- other -->\n<!-- end -->", str(out)), (f"<!-- {out} -->\nno end", str(out)),
                        (f"<!-- {out}, arms: bush -->\n<!-- end -->", "bush")):
        readme.write_text(wrong)
        assert report.main(report.parse_args([str(out), "--doc", str(readme)])) == 2
        assert name in (err := capsys.readouterr().err) and err.count("\n") == 1
        assert readme.read_text() == wrong


# ---------------------------------------------------------------------------------------------------------------------
# Questions and peers

@pytest.mark.parametrize("text, names", [
    ("", ["no question"]), ("{broken\n", ["line 1"]), ('{"turns": []}\n', ["line 1", "turns"]),
    ('{"turns": ["a"], "question_id": 1}\n' * 2, ["same question_id"]),
    ('{"turns": ["a"]}\n{"turns": ["\\ud83d"]}\n', ["line 2", "surrogate"])])
def test_bad_question_files_are_refused_in_one_line(run, tmp_path, text, names):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    status, _, err = run(questions=file)
    assert status == 2 and len(err.strip().splitlines()) == 1 and all(name in err for name in [str(file), *names]), err
    status, _, err = run(questions=tmp_path / "missing.jsonl")
    assert status == 2 and "mt_bench" in err and len(err.strip().splitlines()) == 1


def test_questions_are_read_however_the_file_is_written(tmp_path):
    turns, file = ["one\u2028two", "three\u0085"], tmp_path / "set.json"
    plain = json.dumps({"turns": turns}, ensure_ascii=False)
    for text in (plain, "\ufeff" + plain + "\r\n", f"[{plain}]", "\ufeff[\n" + plain + "\n]"):
        file.write_bytes(text.encode())
        assert [q["turns"] for q in evaluate.read_questions(str(file))] == [turns]


def test_the_copying_questions_are_24_of_4_kinds():
    questions = evaluate.read_questions(str(COPYING))
    kinds = [q["category"] for q in questions]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(("shorten", "code", "passage", "convert"), 6)
    assert len({q["question_id"] for q in questions}) == 24
    assert len({turn for q in questions for turn in q["turns"]}) == sum(len(q["turns"]) for q in questions)
    assert COPYING.stat().st_size < 60_000


def test_the_copying_questions_leave_room_for_their_answers(demo_folder):
    """All turns, each answered with 256 tokens, fit a context of 2048 of the demo model."""
    tokenizer = Tokenizer.from_pretrained(demo_folder)
    for question in evaluate.read_questions(str(COPYING)):
        messages = [{"role": "user", "content": turn} for turn in question["turns"]]
        talk = [m for message in messages for m in (message, {"role": "assistant", "content": ""})][:-1]
        n = len(tokenizer.apply_chat_template(talk)) + 256 * len(messages)
        assert n <= 2048, f"question {question['question_id']} comes to {n} tokens"


def test_a_limit_takes_the_first_of_each_category_then_the_second():
    questions = [{"place": n, "category": c} for n, c in enumerate("aaabbbccd")]
    places = lambda limit: [q["place"] for q in evaluate.choose(questions, limit)]
    assert places(2) == [0, 3] and places(4) == [0, 3, 6, 8] and places(6) == [0, 1, 3, 4, 6, 8]
    assert places(8) == [0, 1, 2, 3, 4, 6, 7, 8] and places(None) == places(99) == list(range(9))


def test_questions_and_turns_beyond_the_context_are_left_out_by_name(run, tmp_path):
    long = [*QUESTIONS, {"question_id": "long", "category": "math", "turns": ["the fox " * 40]}]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in long))
    status, text, err = run("--max-seq-length", 34, questions=file)
    made = json.loads((tmp_path / "out/report.json").read_text())
    assert status == 0 and made["questions"] == 3 and [q["question_id"] for q in made["left_out"]] == ["long"], err
    assert "questions long (" in text and "question long has" in err
    asked = sum(len(line["choices"][0]["turns"]) for line in lines_of(tmp_path / "out", "plain"))
    assert asked + made["turns_not_asked"] == 5 and made["turns_not_asked"] > 0
    assert f"the context of 34: {made['turns_not_asked']}." in text
    shutil.rmtree(tmp_path / "out")
    file.write_text(json.dumps(long[-1]))
    status, _, err = run("--max-seq-length", 34, questions=file)
    assert status == 2 and "no question" in err and "--max-seq-length" in err
    assert not (tmp_path / "out/run.json").exists()


def test_logits_that_are_not_finite_end_the_run_without_a_report(run, pair, tmp_path):
    """fp16 overflows in this model; bf16 does not."""
    from safetensors.torch import save_file
    shutil.copytree(pair[0], tmp_path / "hot")
    weights = read_safetensors(tmp_path / "hot/model.safetensors")
    hot = {key: w * 60 if "layers.0.mlp" in key else w for key, w in weights.items()}
    save_file(hot, tmp_path / "hot/model.safetensors")
    status, _, err = run("--checkpoint", tmp_path / "hot", "--dtype", "float16")
    assert status == 2 and "not finite in float16" in err and "bfloat16" in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()
    assert run("--checkpoint", tmp_path / "hot", "--dtype", "bfloat16", "--limit", 1, "--tree", "chain:3")[0] == 0
    peer = peers.transformers_peers(tmp_path / "hot", torch.device("cpu"), torch.float16, 64)["transformers"]
    with pytest.raises(ValueError, match="not finite in float16"):
        peer([5, 9, 11], 4)


def test_an_out_that_is_no_folder_is_refused_before_anything_is_asked(run, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("mine")
    monkeypatch.setattr(evaluate, "ask", None)
    status, _, err = run()
    assert status == 2 and "is no folder that can be written to" in err and err.count("\n") == 1, err
    assert (tmp_path / "out").read_text() == "mine"


def test_a_report_of_another_scripts_run_is_refused(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"tokens": [[1]]}')
    assert report.main(report.parse_args([str(tmp_path)])) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/run.json names no arms: it is not of scripts/evaluate.py\n"


@pytest.mark.parametrize("options, said", [
    (["--gguf", "README.md"], "--gguf needs --peers"),
    (["--peers", "--gguf", "nothing.gguf"], "--gguf nothing.gguf: no such file")])
def test_a_gguf_file_that_would_not_be_used_is_refused(run, tmp_path, options, said):
    assert run(*options) == (2, "", f"error: {said}\n") and not (tmp_path / "out").exists()


def test_arms_take_turns_and_peers_come_after_plain(run, pair, monkeypatch):
    order, generate = [], evaluate.cli.Decoder.generate
    monkeypatch.setattr(evaluate.cli.Decoder, "generate", lambda self, *args, **kwargs: order.append(
        "plain" if self.eagle is None else f"{self.eagle.tree.n_node}") or generate(self, *args, **kwargs))
    assert run()[0] == 0
    plain, chain, static = "plain", "4", "26"
    assert [order[n:n + 3] for n in range(0, 15, 3)] == [
        [plain, chain, static]] * 2 + [[chain, static, plain]] + [[static, plain, chain]] * 2
    order.clear()
    decodes = lambda name: lambda prompt, seed_or_count: order.append(name) or answer([65, 66], [1, 1])
    args, tokenizer = evaluate.parse_args(["--questions", "", "--temperature", "1"]), Tokenizer.from_pretrained(pair[0])
    ours, theirs = ({name: decodes(name) for name in names} for names in (("plain", "a"), ("p", "q")))
    for place in range(4):
        evaluate.ask(QUESTIONS[1] | {"place": place}, args, tokenizer, ours, theirs, 64)
    assert "".join(name[-1] for name in order) == "napq" "anpq" "npqa" "nqap"    # n: plain


def test_a_set_that_cannot_be_fetched_names_the_local_alternative(run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    status, _, err = run(questions="gsm8k")
    assert status == 2 and "gsm8k" in err and "JSON lines" in err and len(err.strip().splitlines()) == 1, err


def test_the_sets_of_the_hub_become_questions(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"humaneval": {"prompt": "def f():", "task_id": "HumanEval/0"},
            "gsm8k": {"question": "2 + 2?", "answer": "4"},
            "alpaca": {"instruction": "Add.", "input": "1, 2", "output": "3"}}

    def hf_hub_download(repository, path, repo_type):
        assert repo_type == "dataset"
        file = tmp_path / Path(path).name
        name = next(name for name, entry in evaluate.HUB_SETS.items() if entry[:2] == (repository, path))
        if name == "mt_bench":
            file.write_text(json.dumps({"prompt": ["a", "b"], "category": "math"}) + "\n")
        else:
            parquet.write_table(pyarrow.Table.from_pylist([rows[name]] * 2), file)
        return str(file)

    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert evaluate.read_questions("mt_bench") == [
        {"question_id": 1, "category": "math", "turns": ["a", "b"], "place": 0}]
    for name, words in (("humaneval", "def f():"), ("gsm8k", "2 + 2?"), ("alpaca", "Add.\n\n1, 2")):
        questions = evaluate.read_questions(name)
        assert [q["question_id"] for q in questions] == [1, 2] and words in questions[0]["turns"][0]
        assert questions[0]["category"] == name


PROCESSORS = {"do_sample": True, "temperature": 0.6, "top_k": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 1,
              "bad_words_ids": [[i] for i in range(40, 60)], "suppress_tokens": list(range(60, 90)),
              "begin_suppress_tokens": [70], "forced_bos_token_id": 5, "forced_eos_token_id": 6, "min_length": 3,
              "num_beams": 2, "sequence_bias": [[[50], 9.0]],
              "exponential_decay_length_penalty": [1, 2.0], "eos_token_id": list(range(30, 60)), "max_time": 0.001}


def test_peers_decode_as_many_tokens_and_ours_are_transformers_own(run, pair, tmp_path):
    """In fp32 transformers, with a static cache and by prompt lookup, says what plain decoding says, whatever the
    checkpoint's generation_config.json asks for."""
    shutil.copytree(pair[0], tmp_path / "tiny")
    (tmp_path / "tiny/generation_config.json").write_text(json.dumps(PROCESSORS | {"eos_token_id": 2}))
    status, text, err = run("--peers", "--checkpoint", tmp_path / "tiny")
    assert status == 0 and "--gguf" in err, err
    plain = [line["choices"][0] for line in lines_of(tmp_path / "out", "plain")]
    for arm in ("transformers", "transformers-static", "transformers-lookup"):
        theirs = [line["choices"][0] for line in lines_of(tmp_path / "out", arm)]
        assert [c["tokens"] for c in theirs] == [c["tokens"] for c in plain]
        assert all(0 < a < b for c in theirs for a, b in zip(c["timed_tokens"], c["new_tokens"]))
        assert arm in text
    made = json.loads((tmp_path / "out/report.json").read_text())["overall"]
    assert made["transformers-lookup"]["mean_accept_length"] >= 1 and "mean_accept_length" not in made["transformers"]


def test_a_peer_goes_past_stop_tokens_and_its_prefill_is_not_decoding(pair, tmp_path, monkeypatch):
    """By a clock that shows 100 s for the prefill and 1 s for each pass after it."""
    shutil.copytree(pair[0], tmp_path / "tiny")
    (tmp_path / "tiny/generation_config.json").write_text(json.dumps(PROCESSORS))
    shown = []
    monkeypatch.setattr(peers, "clock", lambda device: shown.append(0) or (0 if len(shown) == 1 else 98 + len(shown)))
    found = peers.transformers_peers(tmp_path / "tiny", torch.device("cpu"), torch.float32, 64)
    oracle = Transformer.from_pretrained(pair[0], dtype=torch.float32)
    tokens = naive_decode(oracle, [5, 9, 11], 8)
    for name in ("transformers", "transformers-lookup"):
        shown.clear()
        answer = found[name]([5, 9, 11], 8)
        assert answer.tokens == tokens and answer.prefill_seconds == 100 and sum(answer.accept_lengths) == 8
        assert answer.decode_seconds == len(answer.accept_lengths) - 1
        assert answer.timed_tokens == 8 - answer.accept_lengths[0]

    class Llama:
        def __init__(self, file, **options):
            pass

        def generate(self, prompt, **options):
            yield from range(20)

    monkeypatch.setitem(sys.modules, "llama_cpp", types.SimpleNamespace(Llama=Llama))
    monkeypatch.setattr(peers.time, "perf_counter", lambda: peers.clock(None))
    shown.clear()
    (tmp_path / "m.gguf").write_bytes(b"")
    answer = peers.llama_cpp_peer(tmp_path / "m.gguf", 64)([5, 9, 11], 8)
    assert (answer.prefill_seconds, answer.decode_seconds, answer.timed_tokens) == (100, 7, 7)


def test_a_peer_that_is_not_installed_is_told(pair, monkeypatch, tmp_path):
    gguf = tmp_path / "m.Q4_1.gguf"
    gguf.write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    found, absent = peers.find_peers(pair[0], torch.device("cpu"), torch.float32, 64, gguf)
    assert found == {} and len(absent) == 2 and "transformers" in absent[0] and "llama-cpp-python" in absent[1]


def test_peers_need_greedy_decoding(run):
    status, _, err = run("--peers", "--temperature", 1)
    assert status == 2 and "--peers" in err
