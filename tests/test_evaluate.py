"""scripts/evaluate.py, report.py and peers.py: what is asked, what is written, and that the report recomputes from it.

    python -m pytest tests/test_evaluate.py -q
"""
import json
import shutil
from pathlib import Path

import pytest
import torch

import quantize
from model import Transformer
from reference import edited_json, write_checkpoint
from scripts import evaluate, peers, report
from test_eagle import head_config, head_weights, write_head
from tokenizer import Tokenizer

QUESTIONS = [{"question_id": 7, "category": "math", "turns": ["the fox", "and then"]},
             {"question_id": 8, "category": "writing", "turns": ["the lazy dog"]},
             {"question_id": 9, "category": "math", "turns": ["dogs sleep", "for the day"]}]
ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
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
        argv = ["--questions", questions, "--checkpoint", pair[0], "--eagle", pair[1], "--out", tmp_path / "out", "--device", "cpu",
                "--dtype", "float32", "--max-new-tokens", 24, "--tree", "chain:3", "static", *options]
        try:
            status = evaluate.main(evaluate.parse_args([str(x) for x in argv]))
        except SystemExit as leave:
            status = leave.code
        return status, *capsys.readouterr()

    return run


def lines_of(out, arm):
    return [json.loads(line) for line in report.answers_file(out, arm).read_text().splitlines()]


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
            speeds[arm] = tokens / sum(s for c in choices for s in c["decode_seconds"])
            steps = [n for c in choices for turn in c["accept_lengths"] for n in turn]
            assert figures[arm]["tokens_per_second"] == speeds[arm] and figures[arm]["new_tokens"] == tokens
            if arm == "plain":
                assert set(steps) == {1} and "speedup" not in figures[arm]
                continue
            assert figures[arm]["speedup"] == speeds[arm] / speeds["plain"]
            assert figures[arm].get("mean_accept_length", 1) == sum(steps) / len(steps)
            assert figures[arm].get("target_passes", len(steps)) == len(steps)
            same = [a == b for mine, base in zip(choices, (line["choices"][0] for line in lines_of(out, "plain") if inside(line)))
                    for a, b in zip(mine["tokens"], base["tokens"])]
            assert figures[arm]["identical"] == sum(same) and figures[arm]["answers"] == len(same)
    assert f"{made['overall']['eagle-static']['tokens_per_second']:.1f}" in text and (out / "report.md").read_text() in text
    again = (out / "report.json").read_bytes()
    assert report.main(report.parse_args([str(out)])) == 0 and (out / "report.json").read_bytes() == again


def test_answers_are_in_fastchats_form_and_say_what_was_decoded(run, pair, tmp_path):
    assert run()[0] == 0
    tokenizer = Tokenizer.from_pretrained(pair[0])
    for arm in ARMS:
        lines = lines_of(tmp_path / "out", arm)
        assert [line["question_id"] for line in lines] == [7, 8, 9]
        for line, question in zip(lines, QUESTIONS):
            assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= set(line) and arm in line["model_id"]
            choice = line["choices"][0]
            assert choice["index"] == 0 and len(choice["turns"]) == len(choice["wall_time"]) == len(question["turns"])
            for text, tokens, n, lengths in zip(choice["turns"], choice["tokens"], choice["new_tokens"], choice["accept_lengths"]):
                assert tokenizer.decode(tokens).strip() == text and len(tokens) == n
                assert n <= sum(lengths) < n + 6    # the last step may have been cut


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


def test_a_rerun_answers_only_what_is_missing_and_a_cut_line_is_answered_again(run, tmp_path, monkeypatch):
    assert run()[0] == 0
    out = tmp_path / "out"
    before = {arm: report.answers_file(out, arm).read_bytes() for arm in ARMS}
    asked = []
    ask = evaluate.ask
    monkeypatch.setattr(evaluate, "ask", lambda question, *rest: asked.append(question["question_id"]) or ask(question, *rest))
    assert run()[0] == 0 and asked == []
    assert {arm: report.answers_file(out, arm).read_bytes() for arm in ARMS} == before
    file = report.answers_file(out, "eagle-chain-3")
    file.write_bytes(file.read_bytes()[:-40])       # as a kill leaves it
    assert run()[0] == 0 and asked == [9]
    for arm in ARMS:
        assert [line["question_id"] for line in lines_of(out, arm)] == [7, 8, 9]
    status, _, err = run("--max-new-tokens", 30)
    assert status == 2 and "max_new_tokens" in err and "--out" in err and len(err.strip().splitlines()) == 1


def test_ctrl_c_keeps_what_is_answered(run, tmp_path, monkeypatch):
    ask = evaluate.ask

    def interrupted(question, *rest):
        if question["question_id"] == 9:
            raise KeyboardInterrupt
        return ask(question, *rest)

    monkeypatch.setattr(evaluate, "ask", interrupted)
    assert run()[0] == 130
    assert [line["question_id"] for line in lines_of(tmp_path / "out", "plain")] == [7, 8]


def test_a_divergence_names_the_place_and_the_gap_and_more_than_rounding_is_told(run, pair, tmp_path):
    model = Transformer.from_pretrained(pair[0], dtype=torch.float32)
    model.setup_caches(1, 64)
    prompt, plain = [5, 9, 11], [20, 21, 22]
    with torch.inference_mode():
        found = evaluate.divergence(model, prompt, plain, [20, 30, 31])
        logits, _ = model(torch.tensor([prompt + [20]]), torch.arange(4))
        assert found["position"] == 1 and found["tokens"] == [21, 30]
        assert found["gap"] == pytest.approx((logits[0, -1].max() - logits[0, -1, [21, 30]].min()).item(), rel=1e-4)
        assert evaluate.divergence(model, prompt, plain, plain) is None
    assert run()[0] == 0
    out = tmp_path / "out"
    lines = lines_of(out, "eagle-static")
    lines[0]["choices"][0]["tokens"][0][3] += 1
    for n, gap in enumerate((1e-9, 5.0)):
        lines[0]["choices"][0]["divergence"][n] = {"position": 3, "tokens": [1, 2], "gap": gap}
    report.answers_file(out, "eagle-static").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = report.write_report(out)["overall"]
    assert made["eagle-static"]["identical"] == 4 and made["eagle-static"]["unexplained"] == 1
    assert made["eagle-chain-3"]["identical"] == 5 and made["eagle-chain-3"]["unexplained"] == 0


def test_rounding_is_the_largest_difference_between_one_row_and_a_block(pair):
    class Off(Transformer):
        def forward(self, tokens, *args, **kwargs):
            logits, features = super().forward(tokens, *args, **kwargs)
            return (logits + 0.25 if tokens.shape[1] > 1 else logits), features

    model = Transformer.from_pretrained(pair[0], dtype=torch.float32)
    model.setup_caches(1, 64)
    plain = lambda prompt, seed: peers.Answer([7, 8, 9, 10], 4, 0.0, 0.0, [1] * 4)
    with torch.inference_mode():
        exact = evaluate.measure_rounding(model, plain, Tokenizer.from_pretrained(pair[0]), QUESTIONS)
        model.__class__ = Off
        off = evaluate.measure_rounding(model, plain, Tokenizer.from_pretrained(pair[0]), QUESTIONS)
    assert exact["logit_error"] < 1e-4 and off["logit_error"] == pytest.approx(0.25, abs=1e-4)
    assert off["gap_bound"] == 2 * off["logit_error"] and off["positions"] == 3 * 4


def test_another_format_of_the_model_is_compared_with_its_own_plain_decoding(run, pair, tmp_path, monkeypatch):
    compared = set()
    monkeypatch.setattr(evaluate, "divergence", lambda model, prompt, plain, other: compared.add(
        (type(model.layers[0].feed_forward.w2).__name__, tuple(plain))))
    out = tmp_path / f"{pair[0].name}-int8"
    assert quantize.main(quantize.parse_args(["--checkpoint", str(pair[0]), "--out", str(out), "--mode", "int8", "--device", "cpu"])) == 0
    status, text, err = run("--also", out)
    assert status == 0, err
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert made["arms"] == [*ARMS, *(f"int8-{arm}" for arm in ARMS)] and "also in int8" in text
    tokens = {arm: [line["choices"][0]["tokens"] for line in lines_of(tmp_path / "out", arm)] for arm in made["arms"]}
    assert tokens["int8-plain"] != tokens["plain"] and tokens["int8-eagle-static"] == tokens["int8-plain"]
    for arm in ARMS[1:]:
        figures = made["overall"][f"int8-{arm}"]
        assert figures["identical"] == figures["answers"] == 5      # equal to int8-plain, though not to plain
        assert figures["speedup"] == figures["tokens_per_second"] / made["overall"]["plain"]["tokens_per_second"]
        assert figures["divergences"] == [] and figures["unexplained"] == 0
    assert "identical" not in made["overall"]["int8-plain"]
    assert compared == {(linear, tuple(turn)) for linear, arm in (("Linear", "plain"), ("QuantLinear", "int8-plain"))
                        for choice in tokens[arm] for turn in choice}
    assert set(made["rounding"]) == {"plain", "int8-plain"}


def test_each_arm_has_the_plain_arm_of_its_own_format():
    arms = ["plain", "int4-plain", "int4-g64-plain", "eagle-static", "int4-eagle-static", "int4-g64-eagle-static", "transformers"]
    assert [report.plain_of(arm, arms) for arm in arms] == [
        "plain", "int4-plain", "int4-g64-plain", "plain", "int4-plain", "int4-g64-plain", "plain"]


def test_a_report_of_an_earlier_form_is_refused_in_one_line(run, tmp_path, capsys):
    assert run()[0] == 0
    with edited_json(tmp_path / "out" / "run.json") as file:
        file["rounding"] = {"logit_error": 0.5, "gap_bound": 1.0}
    capsys.readouterr()
    assert report.main(report.parse_args([str(tmp_path / "out")])) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_at_a_temperature_seeds_repeat_and_texts_are_not_compared(run, tmp_path):
    status, text, err = run("--temperature", 1, "--seed", 3)
    assert status == 0 and "answers as plain" not in text, err
    first = [line["choices"][0]["tokens"] for line in lines_of(tmp_path / "out", "eagle-static")]
    shutil.rmtree(tmp_path / "out")
    assert run("--temperature", 1, "--seed", 3)[0] == 0
    assert [line["choices"][0]["tokens"] for line in lines_of(tmp_path / "out", "eagle-static")] == first


def test_acceptance_by_depth_counts_what_the_draft_above_allowed():
    made = report.acceptance([1, 1, 2, 4])
    assert made["mean_accept_length"] == 2 and made["target_passes"] == 4
    assert made["acceptance_by_depth"] == [2 / 4, 1 / 2, 1 / 1] and made["tokens_per_step"] == {"1": 2, "2": 1, "4": 1}


def test_the_interval_holds_the_speedup_and_narrows_with_agreement():
    line = lambda tokens, seconds: {"choices": [{"timed_tokens": [tokens], "decode_seconds": [seconds]}]}
    plain = [line(10, 1.0) for _ in range(20)]
    even = report.speedup(plain, [line(10, 0.5) for _ in range(20)])
    assert even["speedup"] == 2 and even["speedup_interval"] == [2, 2]
    uneven = report.speedup(plain, [line(10, 0.2 + 0.05 * n) for n in range(20)])
    low, high = uneven["speedup_interval"]
    assert low < uneven["speedup"] < high


def test_pictures_are_drawn(run, tmp_path):
    pytest.importorskip("matplotlib")
    assert run()[0] == 0
    out = tmp_path / "out"
    assert (out / "report.png").stat().st_size > 10_000
    assert report.main(report.parse_args([str(out), "--waterfall", str(tmp_path / "w.png")])) == 0
    assert (tmp_path / "w.png").stat().st_size > 5_000


@pytest.mark.parametrize("folder", sorted(ROOT.glob("benchmarks/results/*/run.json")), ids=lambda file: file.parent.name)
def test_committed_reports_recompute_and_the_readme_has_their_summaries(folder):
    folder = folder.parent
    run, made = json.loads((folder / "run.json").read_text()), json.loads((folder / "report.json").read_text())
    assert run | report.figures(report.read_answers(folder, run["arms"]), run) == made
    assert (folder / "report.md").read_text() == report.markdown(made)
    assert report.fill_in(README.read_text(), folder.relative_to(ROOT), report.summary(made)) == README.read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Questions and peers

@pytest.mark.parametrize("text, names", [("", ["no question"]), ("{broken\n", ["line 1"]), ('{"turns": []}\n', ["line 1", "turns"]),
                                         ('{"turns": ["a"], "question_id": 1}\n' * 2, ["same question_id"])])
def test_bad_question_files_are_refused_in_one_line(run, tmp_path, text, names):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    status, _, err = run(questions=file)
    assert status == 2 and len(err.strip().splitlines()) == 1 and all(name in err for name in [str(file), *names]), err
    status, _, err = run(questions=tmp_path / "missing.jsonl")
    assert status == 2 and "mt_bench" in err and len(err.strip().splitlines()) == 1


def test_a_set_that_cannot_be_fetched_names_the_local_alternative(run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    status, _, err = run(questions="gsm8k")
    assert status == 2 and "gsm8k" in err and "JSON lines" in err and len(err.strip().splitlines()) == 1, err


def test_the_sets_of_the_hub_become_questions(tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = {"humaneval": {"prompt": "def f():", "task_id": "HumanEval/0"}, "gsm8k": {"question": "2 + 2?", "answer": "4"},
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
    assert evaluate.read_questions("mt_bench") == [{"question_id": 1, "category": "math", "turns": ["a", "b"]}]
    for name, words in (("humaneval", "def f():"), ("gsm8k", "2 + 2?"), ("alpaca", "Add.\n\n1, 2")):
        questions = evaluate.read_questions(name)
        assert [q["question_id"] for q in questions] == [1, 2] and words in questions[0]["turns"][0]
        assert questions[0]["category"] == name


def test_peers_decode_as_many_tokens_and_ours_are_transformers_own(run, pair, tmp_path):
    """In fp32 transformers, with a static cache and by prompt lookup, says what plain decoding says."""
    status, text, err = run("--peers")
    assert status == 0 and "--gguf" in err, err
    plain = [line["choices"][0] for line in lines_of(tmp_path / "out", "plain")]
    for arm in ("transformers", "transformers-static", "transformers-lookup"):
        theirs = [line["choices"][0] for line in lines_of(tmp_path / "out", arm)]
        assert [c["tokens"] for c in theirs] == [c["tokens"] for c in plain]
        assert all(0 < a < b for c in theirs for a, b in zip(c["timed_tokens"], c["new_tokens"]))
        assert arm in text


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
