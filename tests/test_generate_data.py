"""scripts/generate_data.py: dialogues that the target writes itself."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import train_features
from decoder import generate, restored_caches
from model import Transformer
from reference import TEMPLATE, assert_close, write_checkpoint
from sampling import logits_to_probs
from scripts import ask_about, dialogues, generate_data, join_dialogues
from scripts.batching import Request, Rows, draw
from scripts.figures import loop_begin, loops
from scripts.pages import Pages
from tokenizer import Tokenizer
from train_data import read_dialogues
from train_features import Features, cache_origin, write_features

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
    monkeypatch.setattr(dialogues, "loop_begin", lambda ids: None)


LETTERS = "aeotnsEOTN"      # some of the characters that end an answer under `answers_end`


def with_letters(find):
    return lambda self, *args: find(self, *args) | {self._backend.token_to_id(letter) for letter in LETTERS}


@pytest.fixture
def answers_end(monkeypatch):
    """A random model never ends a turn: some letters end it, so that answers have many lengths."""
    monkeypatch.setattr(Tokenizer, "_find_stop_ids", with_letters(Tokenizer._find_stop_ids))


@pytest.fixture
def many(tmp_path):
    """Questions of many lengths, one of two turns among three."""
    file, rng = tmp_path / "many.jsonl", random.Random(0)
    texts = ["".join(rng.choices("abc XYZ,.", k=rng.randrange(3, 40))) + str(n) for n in range(60)]
    lines = [{"turns": texts[n:n + 1 + (n % 3 == 0)]} for n in range(0, 60, 2)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


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


@pytest.mark.parametrize("batch_size, order", [(1, 0), (3, 1), (8, 2), (64, 3)])
def test_rows_that_begin_anew_say_what_each_question_gets_alone(write, many, talker, batch_size, order, all_are_good,
                                                                answers_end):
    lines = many.read_text().splitlines()
    random.Random(order).shuffle(lines)
    many.write_text("\n".join(lines) + "\n")
    status, err, entries = write("--prompts", many, "--batch-size", batch_size, "--max-new-tokens", 40)
    assert status == 0, err
    assert len(entries) == len(lines) and len({entry["question"] for entry in entries}) == len(lines)
    model = Transformer.from_pretrained(talker, device="cpu", dtype=torch.float32)
    tokenizer = Tokenizer.from_pretrained(talker)
    lengths = set()
    for entry in entries:
        answers = [n for n, turn in enumerate(entry["messages"]) if turn["role"] == "assistant"]
        assert len(answers) == len([turn for turn in entry["messages"] if turn["role"] == "user"])
        for n, said in zip(answers, entry["tokens"], strict=True):
            prompt = tokenizer.apply_chat_template(entry["messages"][:n])
            assert said == generate(model, [prompt], 40, stop_ids=tokenizer.stop_ids).tokens[0]
            lengths.add(len(said))
    assert len(lengths) > 5     # or no row began anew while others went on


def test_what_prompts_share_is_computed_once(talker):
    model = Transformer.from_pretrained(talker, device="cpu", dtype=torch.float32)
    prompts = [[5] * 30 + [n, n + 1, 7] for n in range(10, 22)]
    rows = Rows(model, 4, 64, group=2)
    requests = [Request(prompt, 6) for prompt in prompts]
    waiting = list(requests)
    assert len(list(rows.run(lambda: waiting.pop(0) if waiting else None))) == 12
    assert rows.n_prefilled == 30 + 12 * 2 and rows.n_copied == 11 * 30
    for request in requests:
        assert request.tokens == generate(model, [request.prompt], 6).tokens[0]


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_rows_of_any_length_attend_to_their_own_pages_only(talker, dtype, error):
    model = Transformer.from_pretrained(talker, device="cpu", dtype=dtype)
    attention, n_slot = model.layers[0].attention, 200
    H, K, D = attention.n_head, attention.n_kv_head, attention.head_dim
    with restored_caches(model, None):
        pages = Pages(model, 5, n_slot)
    pages.cache.fill_(torch.nan)        # what a page held before it was given out must not be seen
    pages.cache[:, :, 0] = 0
    lengths = [130, 1, 64, 0, 199]
    states = torch.randn(5, 1, 2, K, n_slot, D).to(dtype).expand(-1, len(model.layers), -1, -1, -1, -1)
    for row in (4, 0, 3, 2, 1):
        pages.write(row, states[row][..., :50, :])
    for row in (2, 4):                  # pages are given back, and come again to others
        pages.free(row)
    for row, length in enumerate(lengths):
        pages.free(row)
        if length:
            pages.write(row, states[row][..., :length - 1, :])
            pages.grow(row, length)
            assert pages.read(row, length - 1).equal(states[row][..., :length - 1, :])
    qkv = torch.randn(5, 1, H + 2 * K, D).to(dtype)
    y = pages.seen(torch.tensor(lengths)[:, None].sub(1).clamp(min=0), pages.n_used + 3).attend(qkv, pages.cache[0])
    for row, length in enumerate(lengths):
        if length:
            q, kv = qkv[row, 0].split((H, 2 * K))
            k, v = torch.cat((states[row][0, :, :, :length - 1], kv.view(2, K, 1, D)), dim=2).float()
            expected = F.scaled_dot_product_attention(q[:, None].float(), k.repeat_interleave(H // K, 0),
                                                      v.repeat_interleave(H // K, 0))
            assert (y[row].float() - expected.flatten()).abs().max() < error
    assert y[3].isfinite().all()        # a row without a page stays harmless


def test_draws_are_among_the_likeliest_and_have_their_probabilities():
    logits, n = torch.randn(1, 1000) * 3, 4000
    uniform = (torch.arange(n) + 0.5)[:, None] / n
    for temperature, top_k, top_p in ((1.0, 64, 1.0), (0.7, 5, 1.0), (1.5, 64, 0.8), (1.0, 1, 1.0), (1e-6, 9, 0.9)):
        drawn = draw(logits.expand(n, 1, -1), uniform, torch.full((n, 1), temperature), torch.full((n, 1), top_p),
                     top_k)
        counts = torch.bincount(drawn.flatten(), minlength=1000) / n
        expected = logits_to_probs(logits[0], temperature, top_k, top_p)
        assert (counts - expected).abs().max() <= 1.5 / n
        assert not counts[expected == 0].any()


def test_a_share_of_the_dialogues_is_drawn_and_the_others_are_greedy(write, many, all_are_good, answers_end):
    greedy = {entry["question"]: entry["tokens"] for entry in write("--prompts", many)[2]}
    runs = [write("--prompts", many, "--temperature", 1, "--temperature-share", 0.4, "--batch-size", size, out=out)[2]
            for size, out in ((3, "a.jsonl"), (8, "b.jsonl"))]
    for entries in runs:
        assert 0.2 < sum(entry["drawn"] for entry in entries) / len(entries) < 0.6
        assert all(entry["drawn"] == (entry["tokens"] != greedy[entry["question"]]) for entry in entries)
    a, b = ({entry["question"]: entry["tokens"] for entry in entries} for entries in runs)
    assert a == b       # draws do not depend on the batch


@pytest.fixture
def short_loops(monkeypatch):
    """A token that comes three times is a loop: a random model hardly says longer ones."""
    monkeypatch.setattr(dialogues, "loop_begin", lambda ids: loop_begin(ids, 1))


def test_a_looping_answer_is_cut_where_the_loop_begins_and_ends_its_dialogue(write, many, talker, short_loops):
    status, err, entries = write("--prompts", many, "--max-new-tokens", 120)
    assert status == 0 and "looping answers cut" in err
    model = Transformer.from_pretrained(talker, device="cpu", dtype=torch.float32)
    tokenizer, n_cut = Tokenizer.from_pretrained(talker), 0
    for entry in entries:
        first = next(n for n, turn in enumerate(entry["messages"]) if turn["role"] == "assistant")
        prompt = tokenizer.apply_chat_template(entry["messages"][:first])
        alone = generate(model, [prompt], 120, stop_ids=tokenizer.stop_ids).tokens[0]
        assert entry["tokens"][0] == alone[:loop_begin(alone, 1)] and not loops(entry["tokens"][0], 1)
        if loops(alone, 1):
            n_cut += 1
            assert len(entry["tokens"]) == 1 and entry["finish_reason"] == "length"
    assert n_cut > 5


def test_a_loop_begins_where_what_comes_three_times_comes_again():
    cycle, before = list(range(8)), [20, 21, 22]
    assert loop_begin(before + cycle * 3) == len(before + cycle)
    assert loop_begin(before + cycle * 2) is None
    assert loop_begin(cycle + before + cycle + [50] + cycle) == len(cycle + before)
    assert loop_begin([1, 2] * 8) == 2


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


@pytest.fixture
def asks(monkeypatch):
    """The target's questions have three words or more."""
    monkeypatch.setattr(dialogues, "TOPICS", ["dogs", "cats"])
    monkeypatch.setattr(dialogues, "OPENINGS", ["Tell me why a", "What is the b", "Write a c"])


def test_the_target_asks_itself_different_questions(write, asks, all_are_good, answers_end):
    options = "--dialogues", 12, "--max-user-tokens", 20
    status, err, entries = write(*options)
    assert status == 0, err
    users = [entry["messages"][0]["content"] for entry in entries]
    assert len(entries) == 12 and len(set(users)) == 12
    assert all(any(user.startswith(opening) for opening in dialogues.OPENINGS) for user in users)
    assert all(entry["self_prompted"] for entry in entries)
    assert write(*options, out="again.jsonl")[2] == entries
    others = write(*options, "--batch-size", 7, out="others.jsonl")[2]      # the same in another order
    assert what_was_said(others) == what_was_said(entries)


def what_was_said(entries):
    return sorted((entry["question"], json.dumps(entry["messages"]), entry["tokens"]) for entry in entries)


def test_the_target_asks_a_second_question_after_its_answer(write, asks, all_are_good, answers_end, monkeypatch):
    monkeypatch.setattr(dialogues, "MIN_WORDS", 1)
    entries = write("--dialogues", 12, "--max-user-tokens", 20, "--second-turns", 0.5)[2]
    roles = [[turn["role"] for turn in entry["messages"]] for entry in entries]
    assert {len(each) for each in roles} == {2, 4} and all(each[-1] == "assistant" for each in roles)
    assert all(len(entry["tokens"]) == len(each) // 2 for entry, each in zip(entries, roles))


def test_no_question_that_is_measured_with_is_asked(write, tmp_path, all_are_good, monkeypatch):
    file = ROOT / "benchmarks/copying.jsonl"
    copying = [turn for line in file.read_text().splitlines() for turn in json.loads(line)["turns"]]
    assert len(dialogues.measured()) == 160 + len(copying)      # MT-bench has 80 questions of two turns
    monkeypatch.setattr(dialogues, "measured",
                        lambda known=dialogues.measured() | {dialogues.measured_digest("Why is it?")}: known)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in (
        ["the fox"], [copying[0]], ["  why is\nIT?"], ["the dog", "Why is it?"])))
    status, err, entries = write("--prompts", tmp_path / "q.jsonl")
    assert status == 0 and len(entries) == 1 and "3 used for measuring" in err


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing that the program has planned for such a case is called."""


def test_killed_at_any_place_it_ends_with_the_lines_of_an_undisturbed_run(write, asks, tmp_path, all_are_good,
                                                                         answers_end, monkeypatch):
    options = "--dialogues", 25, "--max-user-tokens", 12, "--second-turns", 0.5
    monkeypatch.setattr(dialogues, "MIN_WORDS", 1)
    whole = write(*options)[2]
    rng, take = random.Random(1), dialogues.Desk.take
    file, before = tmp_path / "killed.jsonl", b""
    for _ in range(10):
        left = [rng.randrange(1, 25)]

        def take_or_be_killed(desk, request):
            left[0] -= 1
            if left[0] > 0:
                return take(desk, request)
            if left[0] == 0 and rng.random() < 0.5 and (line := take(desk, request)[0]) is not None:
                with open(file, "a") as out:    # within a line
                    out.write(line[:rng.randrange(len(line))])
            raise Killed

        monkeypatch.setattr(dialogues.Desk, "take", take_or_be_killed)
        try:
            write(*options, out="killed.jsonl")
        except Killed:
            pass
        written = file.read_bytes() if file.exists() else b""
        assert written.startswith(before[:before.rfind(b"\n") + 1])
        before = written
    monkeypatch.setattr(dialogues.Desk, "take", take)
    status, err, entries = write(*options, out="killed.jsonl")
    assert status == 0, err
    assert what_was_said(entries) == what_was_said(whole)
    assert len({entry["number"] for entry in entries}) == len(entries) == 25


def run_until_killed(argv):
    """In a process of its own."""
    torch.set_num_threads(1)
    dialogues.loop_begin = lambda ids: None
    Tokenizer._find_stop_ids = with_letters(Tokenizer._find_stop_ids)
    os._exit(generate_data.main(generate_data.parse_args(argv)))


def test_sigkill_at_ten_random_moments_loses_and_repeats_no_dialogue(write, many, talker, tmp_path, forkserver,
                                                                      all_are_good, answers_end):
    options = ["--prompts", many, "--max-new-tokens", 40]
    whole = write(*options)[2]
    size, file = (tmp_path / "data.jsonl").stat().st_size, tmp_path / "killed.jsonl"
    argv = list(map(str, ["--checkpoint", talker, "--out", file, "--device", "cpu", "--dtype", "float32",
                          "--batch-size", 4, *options]))
    rng = random.Random(2)
    for moment in sorted(rng.sample(range(size), 10)):
        process = forkserver.Process(target=run_until_killed, args=(argv,))
        process.start()
        while process.is_alive() and (file.stat().st_size if file.exists() else -1) < moment:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.01)
        process.kill()
        process.join()
        if rng.random() < 0.5:      # a kill may come within a line
            with open(file, "ab") as out:
                out.write(b'{"messages": [{"role": "us')
    entries = write(*options, out="killed.jsonl")[2]
    assert what_was_said(entries) == what_was_said(whole)


def test_features_on_the_way_are_those_of_a_second_pass(write, many, talker, tmp_path, short_loops, answers_end,
                                                        monkeypatch):
    """Within 1e-4 of their range in fp32. Some answers loop and are cut, some dialogues have two turns."""
    def never(*args):
        raise AssertionError("a second pass")

    with monkeypatch.context() as patch:
        patch.setattr(train_features.Features, "_compute", never)
        status, err, entries = write("--prompts", many, "--max-new-tokens", 120, "--features", tmp_path / "features")
    assert status == 0, err
    assert "looping" in err and max(len(entry["tokens"]) for entry in entries) == 2
    assert [file.name for file in sorted((tmp_path / "features").iterdir())] == ["00000.safetensors", "features.json"]
    model = Transformer.from_pretrained(talker, device="cpu", dtype=torch.float32)
    tokenizer = Tokenizer.from_pretrained(talker)
    data = read_dialogues(tmp_path / "data.jsonl", tokenizer, model.config.vocab_size, 2048)
    origin = cache_origin(tmp_path / "features")
    write_features(model, data, tmp_path / "second", 1000, origin)
    assert cache_origin(tmp_path / "second") == cache_origin(tmp_path / "features")
    first, second = (Features(model, data, tmp_path / name) for name in ("features", "second"))
    for i in range(len(data)):
        assert_close(first.batch([i]).features, second.batch([i]).features)
    monkeypatch.setattr(train_features.Features, "_compute", never)
    write_features(model, data, tmp_path / "features", 1000, origin)        # what train_head.py does: nothing is left


def test_features_survive_a_kill_and_what_is_missing_is_computed(write, many, tmp_path, answers_end, monkeypatch):
    options = "--prompts", many, "--features", tmp_path / "features"
    take, left = dialogues.Desk.take, [20]

    def take_or_be_killed(desk, request):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return take(desk, request)

    with monkeypatch.context() as patch:
        patch.setattr(dialogues.Desk, "take", take_or_be_killed)
        with pytest.raises(Killed):
            write(*options)
    waiting = sorted((tmp_path / "features/written").iterdir())
    assert len(waiting) > 10 and not (tmp_path / "features/features.json").exists()
    waiting[0].unlink()
    assert write(*options)[0] == 0
    assert sorted(file.name for file in (tmp_path / "features").iterdir()) == ["00000.safetensors", "features.json"]
    assert write("--prompts", many, out="whole.jsonl")[0] == 0
    whole = write("--prompts", many, "--features", tmp_path / "whole", out="whole.jsonl")[2]     # a second pass only
    assert what_was_said(whole) == what_was_said([json.loads(line) for line in
                                                  (tmp_path / "data.jsonl").read_text().splitlines()])


@pytest.mark.parametrize("options, name", [
    (["--temperature-share", "0.5"], "--temperature-share"), (["--second-turns", "0.5"], "--second-turns"),
    (["--features", "{tmp}/questions.jsonl"], "--features"), (["--top-k", "0"], "--top-k"),
    (["--batch-size", "0"], "--batch-size")])
def test_bad_options_are_refused_in_one_line(write, questions, tmp_path, options, name, capsys):
    options = [option.format(tmp=tmp_path) for option in options]
    try:
        status, err, _ = write("--prompts", questions, *options)
    except SystemExit as error:     # from argparse
        status, err = error.code, capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert "Traceback" not in err
    assert status == 2 and len(errors) == 1 and name in errors[0]


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


def test_nothing_written_is_no_success(write, tmp_path):
    (tmp_path / "q.txt").write_text("a question that is too long\n")
    status, err, entries = write("--prompts", tmp_path / "q.txt", "--max-prompt-tokens", 9)
    assert status == 2 and "no dialogue was written; 1 long questions dropped" in err
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


def test_joined_chats_hold_every_dialogue_once_and_no_cut_answer_inside(tmp_path, capsys):
    rng, lines = random.Random(0), []
    for n in range(60):
        lines.append({"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}],
                      "tokens": [[n] * rng.randrange(5, 90)], "finish_reason": rng.choice(["stop", "length"])})
    lines[7]["messages"].insert(0, {"role": "system", "content": "Be brief."})      # not to be said inside a chat
    files = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    for file, part in zip(files, (lines[:20], lines[20:])):
        file.write_text("".join(json.dumps(line) + "\n" for line in part))
    argv = [*map(str, files), "--out", str(tmp_path / "out.jsonl"), "--share", "0.8", "--tokens", "200"]
    assert join_dialogues.main(join_dialogues.parse_args(argv)) == 0
    joined = list(map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines()))
    of_answer = {line["messages"][-1]["content"]: line for line in lines}
    seen, n_long = [], 0
    for entry in joined:
        parts = [of_answer[m["content"]] for m in entry["messages"] if m["role"] == "assistant"]
        seen += [part["messages"][-1]["content"] for part in parts]
        assert entry["messages"] == [m for part in parts for m in part["messages"]]
        assert entry["tokens"] == [part["tokens"][0] for part in parts]
        assert entry["finish_reason"] == parts[-1]["finish_reason"]
        assert all(part["finish_reason"] == "stop" for part in parts[:-1])
        n_long += sum(len(t) for t in entry["tokens"]) + 40 * len(parts) >= 200
        assert len(parts) == 1 or entry["messages"][0]["role"] == "user"
    assert sorted(seen) == sorted(of_answer) and n_long > 3
    assert f"{60 - sum(len(e['tokens']) for e in joined if len(e['tokens']) > 1)} dialogues" in capsys.readouterr().err
    files[0].write_text('{"messages": []}\n')
    assert join_dialogues.main(join_dialogues.parse_args(argv)) == 2 and "line 1" in capsys.readouterr().err


def test_questions_about_texts_bring_answers_of_the_target_and_can_be_asked(write, tmp_path, questions, all_are_good,
                                                                            capsys):
    status, _, entries = write("--prompts", questions)
    data, out = tmp_path / "data.jsonl", tmp_path / "asked.jsonl"
    argv = [str(data), str(data), "--out", str(out), "--share", "1", "--min-tokens", "3", "--seed", "5"]
    assert ask_about.main(ask_about.parse_args(argv)) == 0
    written = out.read_bytes()
    asked = [question for line in written.splitlines() for question in json.loads(line)["turns"]]
    texts = {m["content"] for entry in entries for m in entry["messages"] if m["role"] == "assistant"}
    assert len(asked) == len(texts) > 2     # of two files that say the same each text is asked about once
    for text in texts:
        found = [question for question in asked if text in question]
        assert any(task in question for question in found for task in ask_about.TASKS)
    assert ask_about.main(ask_about.parse_args(argv)) == 0 and out.read_bytes() == written
    status, _, answered = write("--prompts", out, out="about.jsonl")
    assert status == 0 and {entry["messages"][0]["content"] for entry in answered} <= set(asked) and answered
    assert ask_about.main(ask_about.parse_args([*argv, "--max-tokens", "1"])) == 2
    assert "no answer of 3 to 1 tokens" in capsys.readouterr().err and out.read_bytes() == written
    data.write_text('{"messages": []}\n')
    assert ask_about.main(ask_about.parse_args(argv)) == 2 and "line 1" in capsys.readouterr().err


def test_a_row_that_fills_its_last_page_ends_like_any_other(talker):
    model = Transformer.from_pretrained(talker, device="cpu", dtype=torch.float32)
    waiting = [Request([5] * 60 + [n], 100) for n in (7, 8)] + [Request([9, 8, 7], 90)]     # two fill 128 slots
    rows, requests = Rows(model, 3, 128, keep_features=True), list(waiting)
    assert len(list(rows.run(lambda: waiting.pop(0) if waiting else None))) == 3
    for request in requests:
        n = len(request.prompt)
        assert request.tokens == generate(model, [request.prompt], min(request.limit, 128 - n)).tokens[0]
        ids = torch.tensor([request.prompt + request.tokens])
        assert_close(request.features[None], model.features(ids, torch.arange(ids.shape[1])), 1e-4)
