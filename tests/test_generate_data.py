"""scripts/generate_data.py: dialogues that the target writes itself."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from generate import generate
from model import Transformer
from reference import TEMPLATE, write_checkpoint
from scripts import generate_data
from scripts.generate_data import loops
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("data") / "talker", merges=0, ascii_only=True)


@pytest.fixture
def write(talker, tmp_path, capsys):
    """write(*options) -> (exit status, stderr, the dialogues)."""

    def write(*options, out="data.jsonl"):
        capsys.readouterr()
        argv = ["--checkpoint", talker, "--out", tmp_path / out, "--device", "cpu", "--dtype", "float32",
                "--batch-size", 4, "--max-new-tokens", 12, *options]
        status = generate_data.main(generate_data.parse_args(list(map(str, argv))))
        lines = (tmp_path / out).read_text().splitlines() if (tmp_path / out).exists() else []
        return status, capsys.readouterr().err, [json.loads(line) for line in lines]

    return write


@pytest.fixture
def questions(tmp_path):
    file = tmp_path / "questions.jsonl"
    lines = [{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the fox"}]},
             {"conversations": [{"from": "human", "value": "the dog"}, {"from": "gpt", "value": "what?"}]},
             {"question_id": 81, "turns": ["and then", "why"]}, {"turns": ["the fox"]}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return file


@pytest.fixture
def all_are_good(monkeypatch):
    """A random model repeats itself soon."""
    monkeypatch.setattr(generate_data, "loops", lambda ids: False)


def test_answers_are_what_greedy_decoding_says_and_the_settings_stand_beside_them(write, questions, talker,
                                                                                  all_are_good):
    status, err, entries = write("--prompts", questions)
    assert status == 0, err
    texts = [[turn["content"] for turn in entry["messages"] if turn["role"] != "assistant"] for entry in entries]
    assert sorted(texts) == [["Be brief.", "the fox"], ["and then", "why"], ["the dog"], ["the fox"]]
    model = Transformer.from_pretrained(talker, device="cpu", dtype=torch.float32)
    tokenizer = Tokenizer.from_pretrained(talker)
    for entry in entries:
        answers = [n for n, turn in enumerate(entry["messages"]) if turn["role"] == "assistant"]
        for n, said in zip(answers, entry["tokens"], strict=True):
            prompt = tokenizer.apply_chat_template(entry["messages"][:n])      # behind its own earlier answers
            assert said == generate(model, [prompt], 12, stop_ids=tokenizer.stop_ids).tokens[0]
            assert entry["messages"][n]["content"] == tokenizer.decode(said).strip()
        assert entry["finish_reason"] == "length" and entry["seed"] == 0 and entry["temperature"] == 0.0
        assert entry["self_prompted"] is False and entry["max_new_tokens"] == 12


def test_answers_at_a_temperature_depend_on_the_seed_and_on_nothing_else(write, questions, all_are_good):
    runs = [write("--prompts", questions, "--temperature", 1, "--seed", seed, out=out)[2]
            for seed, out in ((1, "a.jsonl"), (1, "b.jsonl"), (2, "c.jsonl"))]
    assert runs[0] == runs[1]
    assert [e["messages"] for e in runs[0]] != [e["messages"] for e in runs[2]]


def test_looping_answers_are_dropped_and_counted(write, questions, monkeypatch):
    verdicts = iter([False, True, False, False, True])      # the second dialogue, and the second turn of the third
    monkeypatch.setattr(generate_data, "loops", lambda ids: next(verdicts))
    status, err, entries = write("--prompts", questions)
    assert status == 0 and "2 looping answers dropped" in err
    assert [entry["messages"][-2]["content"] for entry in entries] == ["the fox", "the fox", "and then"]


def test_a_loop_is_an_8_gram_that_comes_three_times():
    cycle = list(range(8))
    assert loops(cycle * 3) and not loops(cycle * 2) and not loops([])
    assert loops([1, 2] * 8) and not loops([1, 2] * 4)
    assert not loops(list(range(500)))
    assert loops([*cycle, 50, *cycle, 60, 61, *cycle])


def test_a_run_that_was_cut_goes_on_without_repeating_a_question(write, questions, tmp_path, all_are_good):
    whole = write("--prompts", questions, "--batch-size", 1)[2]
    file = tmp_path / "cut.jsonl"
    lines = (tmp_path / "data.jsonl").read_text().splitlines(keepends=True)
    file.write_text(lines[0] + lines[1][:20])               # killed within a line
    status, err, entries = write("--prompts", questions, "--batch-size", 1, out="cut.jsonl")
    assert status == 0, err
    assert [e["messages"] for e in entries] == [e["messages"] for e in whole]
    before = file.read_bytes()
    assert write("--prompts", questions, "--batch-size", 1, out="cut.jsonl")[0] == 0 and file.read_bytes() == before
    status, err, _ = write("--prompts", questions, "--temperature", 0.5, out="cut.jsonl")
    assert status == 2 and "temperature" in err and "Traceback" not in err and file.read_bytes() == before


def test_the_target_asks_itself_different_questions(write, monkeypatch, all_are_good):
    monkeypatch.setattr(generate_data, "TOPICS", ["dogs", "cats"])
    # A random model never ends a turn: take whatever it wrote.
    ask = generate_data.ask

    def ask_all(decoder, *args):
        generate_method = decoder.generate
        decoder.generate = lambda *a, **k: (r := generate_method(*a, **k), setattr(r, "finish_reason", ["stop"] * 4))[0]
        try:
            return [text + " in short words" for text in ask(decoder, *args)]
        finally:
            decoder.generate = generate_method

    monkeypatch.setattr(generate_data, "ask", ask_all)
    status, err, entries = write("--dialogues", 6, "--max-user-tokens", 6)
    assert status == 0, err
    users = [entry["messages"][0]["content"] for entry in entries]
    assert len(entries) >= 6 and len(set(users)) == len(users)
    assert all(any(user.startswith(opening) for opening in generate_data.OPENINGS) for user in users)
    assert all(entry["self_prompted"] for entry in entries)
    again = write("--dialogues", 6, "--max-user-tokens", 6, out="again.jsonl")[2]
    assert again == entries


@pytest.mark.parametrize("text, names", [('{"turns": []}\n', ["line 1"]), ('{"turns": ["a"]}\n{oops\n', ["line 2"]),
                                         ("\xff", ["UTF"])],
                         ids=["no turn", "broken", "no text"])
def test_bad_questions_are_refused_in_one_line(write, tmp_path, text, names):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(text.encode("latin-1"))
    status, err, entries = write("--prompts", file)
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert status == 2 and len(errors) == 1 and "Traceback" not in err and not entries
    assert all(name.lower() in errors[0].lower() for name in names)


def test_ctrl_c_keeps_what_was_written(talker, tmp_path):
    file, out = tmp_path / "many.txt", tmp_path / "data.jsonl"
    file.write_text("".join(f"question {n}\n" for n in range(5000)))
    run = subprocess.Popen([sys.executable, ROOT / "scripts/generate_data.py", "--checkpoint", talker, "--out", out,
                            "--prompts", file, "--device", "cpu", "--dtype", "float32", "--batch-size", "4",
                            "--max-new-tokens", "9"],
                           stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    run.send_signal(signal.SIGINT)
    err = run.communicate(timeout=30)[1]
    assert run.returncode == 130 and "goes on from here" in err and "Traceback" not in err
    assert [json.loads(line) for line in out.read_text().splitlines()]


def test_files_are_read_by_what_they_hold_and_bad_lines_are_counted(write, tmp_path, all_are_good):
    entries = [{"messages": [{"role": "user", "content": f"q\u2028{n}"}]} for n in range(5)]
    lines = [json.dumps(entry, ensure_ascii=n % 2 > 0) for n, entry in enumerate(entries)]
    half = '{"turns": ["half an emoji \\ud83d"]}'
    for name, text in (("a.json", "[" + ",\n".join(lines) + "]"), ("b.txt", "[\n" + ",\n".join([*lines, half]) + "\n]"),
                       ("c.ndjson", "\ufeff" + "\n".join([*lines, half]))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        for _ in range(2):      # the second finds all done
            status, err, entries = write("--prompts", tmp_path / name, "--max-new-tokens", 3, out=f"{name}.jsonl")
            assert status == 0 and len(entries) == 5, err
            assert name == "a.json" or "1 not valid text (line 6: half a character" in err


def test_nothing_written_is_no_success(write, tmp_path, monkeypatch):
    monkeypatch.setattr(generate_data, "loops", lambda ids: True)
    (tmp_path / "q.txt").write_text("the fox\n")
    status, err, entries = write("--prompts", tmp_path / "q.txt")
    assert status == 2 and "no dialogue was written; 1 looping answers dropped" in err
    assert not (tmp_path / "data.jsonl").exists()


def test_a_file_is_bound_to_what_made_it(write, talker, questions, tmp_path, all_are_good):
    assert write("--prompts", questions)[0] == 0
    file = tmp_path / "data.jsonl"
    before = file.read_bytes()
    other = write_checkpoint(tmp_path / "other", merges=0)
    (tmp_path / "q.txt").write_text("the fox\n")
    for options, name in ((("--checkpoint", other), "another target"), (("--system", "S"), "answers other questions"),
                          (("--template-args", '{"a": 1}'), "another chat template"),
                          (("--dtype", "bfloat16"), "dtype"), (("--prompts", tmp_path / "q.txt"), "other questions"),
                          (("--seed", 1), "seed")):
        status, err, _ = write("--prompts", questions, *options)
        assert status == 2 and name in err and file.read_bytes() == before, err


def test_one_date_holds_for_a_whole_file(write, tmp_path, questions, all_are_good):
    (tmp_path / "t.jinja").write_text("{{ strftime_now('%S') }}" + TEMPLATE)
    options = "--prompts", questions, "--chat-template", tmp_path / "t.jinja"
    status, err, entries = write(*options)
    assert status == 0 and len({entry["date"] for entry in entries}) == 1
    file = tmp_path / "data.jsonl"
    first = file.read_text().splitlines()[0].replace(entries[0]["date"], "2020-01-01T00:00:00")
    file.write_text(first + "\n")
    status, err, entries = write(*options)
    assert status == 0 and {entry["date"] for entry in entries} == {"2020-01-01T00:00:00"} and len(entries) == 4
