"""The scripts around a head: tree search and draft vocabulary."""
import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train_head
from benchmarks import head_alone
from draft_tree import StaticTree, load_tree
from eagle_head import EagleHead
from generate import generate
from generate import parse_args as generate_args
from model import Transformer
from reference import tiny, tokens_of, write_checkpoint
from scripts import ask_about, draft_vocab, generate_data, join_dialogues, tree_search, tune_tree
from scripts.tree_search import Answer, Candidate, accept_lengths, foretell, right_copies
from test_copy import slow_lookup
from tokenizer import Tokenizer
from train_loss import draft_ranks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def pair(tmp_path):
    folder, _ = tiny("gqa", tmp_path / "target")
    model = Transformer.from_pretrained(folder, dtype=torch.float32)
    head = EagleHead(replace(model.config, n_layer=1), model)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model, head


@torch.inference_mode()
@pytest.mark.parametrize("vocab", [None, list(range(5, 60))])
def test_draft_ranks_equal_drafting_position_by_position(pair, vocab):
    model, head = pair
    head.set_draft_vocab(vocab)
    tokens, depth = torch.randint(0, model.config.vocab_size, (14,)).tolist(), 3
    ids = torch.tensor([tokens])
    features = model.features(ids, torch.arange(len(tokens)))
    ranks = draft_ranks(head, ids[0], features[0], depth)
    assert ranks.shape == (depth, len(tokens) - 1 - depth)
    for i in range(ranks.shape[1]):
        known = features[:, :i + 1]
        for d in range(depth):  # pairs (f_0, t_1) .. (f_i, t_{i+1}), then the head's own features
            n = known.shape[1]
            known = torch.cat((known, head(ids[:, 1:n + 1], known, torch.arange(n))[:, -1:]), dim=1)
            guesses = head.to_target_ids(head.draft_logits(known[0, -1]).argsort(descending=True)).tolist()
            true = tokens[i + d + 2]
            assert ranks[d, i] == (guesses.index(true) if true in guesses else model.config.vocab_size)


def test_best_nodes_are_worth_as_much_as_any_connected_tree():
    accept = [[0.5, 0.3, 0.1], [0.6, 0.1, 0.05]]
    paths = [p for d in (1, 2) for p in itertools.product(range(3), repeat=d)]
    worth = {p: torch.tensor([accept[d][r] for d, r in enumerate(p)]).prod().item() for p in paths}
    for n in range(1, 6):
        trees = (t for t in itertools.combinations(paths, n) if all(p[:-1] in t or len(p) == 1 for p in t))
        best = max(sum(worth[p] for p in t) for t in trees)
        found = tree_search.best_nodes(accept, n)
        assert sum(value for value, _ in found) == pytest.approx(best)
        StaticTree.from_paths([path for _, path in found])  # connected, or this raises


WIDE = [[r] for r in range(30)] + [[r, s] for r in range(3) for s in range(30)]


def foreseen_steps(model, head, prompt, paths, n_copy=0):
    """The steps along the target's answer of 100 tokens, and that answer."""
    answer, = tune_tree.answer_all(model, [prompt], 100, frozenset())
    ranks, = tune_tree.measure_ranks(model, head, [prompt], [answer], max_depth=2)
    assert ranks.shape == (2, 98)       # from the answer's first token on
    steps = accept_lengths(set(map(tuple, paths)), list(zip(*ranks.tolist())), right_copies(prompt, answer), n_copy)
    return steps, answer


@pytest.mark.parametrize("paths", [[[0], [0, 0]], WIDE], ids=["chain", "wide"])
def test_steps_foreseen_from_ranks_are_those_that_decoding_takes(pair, paths):
    model, head = pair
    prompt, tree = torch.randint(0, model.config.vocab_size, (9,)).tolist(), StaticTree.from_paths(paths)
    foreseen, _ = foreseen_steps(model, head, prompt, paths)
    taken = generate(model, [prompt], 60, head=head, tree=tree).accept_lengths[0]
    assert foreseen[:len(taken)] == taken and len(taken) > 15
    assert len(paths) == 2 or len(set(foreseen)) > 1


@pytest.mark.parametrize("paths", [[[0]], [[0], [1], [2], [0, 0], [2, 0]]], ids=["one node", "wide"])
@pytest.mark.parametrize("n_copy", [1, 3, 16])
def test_steps_foreseen_with_a_copied_branch_are_those_that_decoding_takes(tmp_path, paths, n_copy):
    """A target over twelve tokens and a text that repeats itself: exactly the same steps, of the same kinds."""
    model = Transformer.from_pretrained(tiny("gqa", tmp_path / "target", vocab_size=12)[0], dtype=torch.float32)
    head = EagleHead(replace(model.config, n_layer=1), model)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    kinds, from_head, from_copy = set(), 0, 0
    for seed in range(6):
        start = tokens_of(6, seed=seed, vocab=12)
        prompt = start + tune_tree.answer_all(model, [start], 30, frozenset())[0] + start[:seed]
        foreseen, answer = foreseen_steps(model, head, prompt, paths, n_copy)
        result = generate(model, [prompt], 80, head=head, tree=StaticTree.from_paths(paths), copy=n_copy)
        assert result.tokens == [answer[:80]] and foreseen[:len(result.kinds)] == result.accept_lengths[0]
        matches = [n >= 0 for n in right_copies(prompt, answer)]
        begins = itertools.accumulate(foreseen[:len(result.kinds) - 1], initial=0)
        assert result.kinds == ["copy" if matches[i] else "tree" for i in begins]
        kinds.update(result.kinds)
        from_copy += sum(result.copied[0])
        from_head += sum(result.accept_lengths[0]) - len(result.kinds) - sum(result.copied[0])
    assert kinds == {"tree", "copy"} and from_head > 5 and from_copy > 5


def test_a_step_goes_as_deep_as_the_ranks_are_nodes_and_the_next_begins_behind_the_bonus_token():
    ranks, tree = [(0, 2), (0, 1), (5, 0), (0, 1), (0, 0), (0, 0), (3, 0), (0, 9)], {(0,), (0, 1), (3,)}
    assert accept_lengths(tree, ranks) == [2, 1, 3, 2]
    # With a branch of 3 steps begin at 0, where it has one right and the tree one; at 2, nothing; at 3, three of five.
    assert accept_lengths(tree, ranks, [1, 9, -1, 5, 9, 9, 9, 0], 3) == [2, 1, 4, 2]


def test_right_copies_by_hand():
    a, b, c, x, y = range(5)
    # After "a b" the prompt had "c x": one is right. After "a b c" it had x, but y comes. Then the latest "a b" counts.
    assert right_copies([a, b, c, x], [a, b, c, y, a, b, c, x], 4) == [-1, 1, 0, -1, -1, 1, 0, 0]
    # A copy that reaches the end goes on in itself.
    assert right_copies([a, b], [a, b] * 4, 4) == [-1, 4, 4, 4, 3, 2, 1, 0]


@pytest.mark.parametrize("n_token", [2, 3, 5])
def test_right_copies_are_those_of_a_slow_lookup(n_token):
    rng, seen = random.Random(n_token), set()
    for _ in range(30):
        prompt, answer = ([rng.randrange(n_token) for _ in range(rng.randrange(1, 40))] for _ in range(2))
        wanted = []
        for n in range(1, len(answer) + 1):
            copied, rest = slow_lookup(prompt + answer[:n], 6), answer[n:]
            wanted.append(-1 if copied is None else next(
                (k for k, (ours, theirs) in enumerate(zip(copied, rest)) if ours != theirs), min(6, len(rest))))
        assert right_copies(prompt, answer, 6) == wanted
        seen.update(wanted)
    assert {-1, 0, 1, 2} <= seen


FREE_ROWS = {"target_by_rows": {1: 10.0, 64: 10.0}, "draft_level": 0.1, "first_level": 0.1, "rest": 0.1,
             "rest_without_match": 0.2, "rest_by_copy": dict.fromkeys(tree_search.COPY_LENGTHS[1:], 0.3)}
DEAR_ROWS = FREE_ROWS | {"target_by_rows": {1: 10.0, 64: 640.0}}


def test_search_takes_the_tree_that_pays_on_the_device():
    accept = [[0.8, 0.1], [0.8, 0.1], [0.8, 0.1]]
    rng = torch.Generator().manual_seed(0)
    draw = lambda: tuple(torch.multinomial(torch.tensor([0.8, 0.1, 0.1]), 3, replacement=True, generator=rng).tolist())
    answers = [Answer([draw()], [-1]) for _ in range(2000)]     # each of one step: every node met adds to the mean
    best, *others = tree_search.search(accept, answers, FREE_ROWS, max_nodes=14)
    assert len(best.paths) == 14 and max(map(len, best.paths)) == 3 and best.n_copy == 0    # nothing to copy
    assert len(others) == 14 * len(tree_search.COPY_LENGTHS) - 1
    assert best.rate == pytest.approx(best.accept_length / 10.4) and best.rate >= max(other.rate for other in others)
    dear_levels = FREE_ROWS | {"draft_level": 20.0}
    assert {len(path) for path in tree_search.search(accept, answers, dear_levels, max_nodes=14)[0].paths} == {1}
    assert len(tree_search.search(accept, answers, DEAR_ROWS, max_nodes=14)[0].paths) == 1


def test_search_takes_the_branch_that_pays():
    accept = [[0.3, 0.1], [0.3, 0.1]]
    answers = [Answer([(9, 9)] * 12, [8, *[-1] * 11]) for _ in range(5)]    # 8 tokens copied, then three steps of one
    found = tree_search.search(accept, answers, FREE_ROWS, max_nodes=3)
    assert found[0].n_copy in (8, 12, 16) and found[0].accept_length == 12 / 4
    assert {pair.accept_length for pair in found if pair.n_copy == 5} == {12 / 7}
    assert tree_search.search(accept, answers, DEAR_ROWS, max_nodes=3)[0].n_copy == 8      # none longer than needed
    never_right = [Answer([(9, 9)] * 12, [0] * 12)]
    assert tree_search.search(accept, never_right, FREE_ROWS, max_nodes=3)[0].n_copy == 0


def test_a_pair_is_foretold_by_the_steps_that_it_takes_and_what_each_kind_costs():
    answer = Answer([(1,), (0,), (1,), (1,), (1,)], [-1, 0, 3, 1, -1])
    costs = {"target_by_rows": {1: 8.0, 2: 10.0, 3: 11.0, 5: 29.0}, "draft_level": 50.0, "first_level": 1.0,
             "rest": 1.0, "rest_without_match": 2.0, "rest_by_copy": {2: 3.0}}
    alone, beside = foretell([[0]], [answer, answer], costs, (0, 2))
    assert alone == (5 / 48, 5 / 4, [[0]], 0)           # steps of 1, 2, 1, 1 tokens: 1 + 10 + 1 each
    # 1 token where nothing matches, 1 + 10 + 2; 2 by the head and 2 by the branch, 1 + 20 + 3 each.
    assert beside == (5 / (13 + 2 * 24), 5 / 3, [[0]], 2)


def test_the_best_trees_without_a_branch_are_always_among_the_finalists():
    shape = lambda n: [[0] * d for d in range(1, n + 1)]
    candidates = [Candidate(9.0 - n / 10 - (n_copy == 0), 2.0, shape(n), n_copy) for n in range(1, 6)
                  for n_copy in (8, 5, 3, 0)]
    chosen = tree_search.choose_finalists(sorted(candidates, reverse=True))
    assert [(len(pair.paths), pair.n_copy) for pair in chosen] == [
        (1, 8), (1, 5), (2, 8), (2, 5), (3, 8), (1, 0), (2, 0)]
    alone = [pair for pair in candidates if not pair.n_copy]
    assert tree_search.choose_finalists(alone) == alone     # none twice


def test_what_is_written_and_said_tells_copying_from_the_tree_and_looping_answers_from_others(tmp_path, capsys):
    finalists = [Candidate(0.2, 3.0, [[0], [1]], 2), Candidate(0.1, 1.5, [[0]], 0),
                 Candidate(0.1, 1.4, [[0], [0, 0]], 0)]
    answers = [Answer([(9,)] * 6, [2] * 6, is_looping=True), Answer([(0,)] * 6, [-1] * 6)]
    decoded = tune_tree.Decoded(        # arms: plain, and the three finalists
        tokens=np.full((4, 2), 60), seconds=np.array([[6.0, 6], [2, 4], [5, 4], [6, 4]]),
        steps=np.array([[59, 59], [20, 30], [50, 30], [55, 31]]), produced=np.full((4, 2), 60))
    args = tune_tree.parse_args(["--eagle", str(tmp_path), "--out", str(tmp_path / "tree.json")])
    tune_tree.write_tree(args, finalists, decoded, answers, {"costs_ms": FREE_ROWS})
    made = json.loads((tmp_path / "tree.json").read_text())
    assert (made["paths"], made["copy"], made["expected_speedup"]) == ([[0], [1]], 2, 2.0)
    assert load_tree(str(tmp_path / "tree.json")) == replace(StaticTree.from_paths([[0], [1]]), n_copy=2)
    looping, others = made["figures"]["looping"], made["figures"]["others"]
    assert (looping["expected_accept_length"], looping["expected_accept_length_without_copying"]) == (3, 1)
    assert others["expected_accept_length"] == others["expected_accept_length_without_copying"] == 2
    assert looping["foretold_speedup"] == pytest.approx(3 / 10.4 * 10) and looping["speedup"] == 3
    assert looping["best_without_copying"] == {"accept_length": 60 / 50, "speedup": 6 / 5}
    assert made["finalists"][0]["foretold_tokens_per_second"] == 200 and made["plain_tokens_per_second"] == 10
    assert capsys.readouterr().err == (
        "2 nodes below the root, depth 1, a copied branch of 2: 2.40 tokens a step, 2.00x plain decoding (without "
        "copying 1.50, 1.33x) on these questions and this device; copying is 67% of the gain; 1 looping answers: 3.00 "
        "tokens a step, 3.00x plain decoding (without copying 1.20, 1.20x); 1 others: 2.00 tokens a step, 1.50x plain "
        f"decoding (without copying 2.00, 1.50x); wrote {tmp_path / 'tree.json'}\n")


def test_a_head_alone_accepts_along_an_answer_what_decoding_accepted(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "target")
    model = Transformer.from_pretrained(checkpoint, dtype=torch.float32)
    head = EagleHead(replace(model.config, n_layer=1), model)
    folder = write_head(head, tmp_path / "head")
    head = EagleHead.from_pretrained(folder, target=model)
    tokenizer, rows, questions, n_token, n_step = Tokenizer.from_pretrained(checkpoint), [], [], 0, 0
    texts = "the fox", "the dog", "and then"
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
    counts = Counter(i for prompt in prompts for i in generate(model, [prompt], 60).tokens[0])
    ids = [i for i, _ in counts.most_common(8)]
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    head.set_draft_vocab(ids)       # of few tokens, so that a random head is right at times
    for number, (text, prompt) in enumerate(zip(texts, prompts)):
        result = generate(model, [prompt], 60, head=head, tree="static")
        i = 0
        for length in result.accept_lengths[0]:     # a step whose drafts would go past the end is not counted
            if i < len(result.tokens[0]) - head_alone.DEPTH:
                i, n_step = i + length, n_step + 1
        n_token += i
        questions.append({"question_id": number, "category": "c", "turns": [text]})
        rows.append({"question_id": number, "category": "c", "choices": [{"turns": ["?"], "tokens": result.tokens}]})
    for name, lines in (("questions", questions), ("answers", rows)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = ["--checkpoint", checkpoint, "--eagle", folder, "--dtype", "float32", "--far", 40, "--answers",
            tmp_path / "answers", "--questions", tmp_path / "questions", "--out", tmp_path / "out.json",
            "--draft-vocab", tmp_path / "ids.json"]
    args = head_alone.parse_args(list(map(str, argv)))
    assert head_alone.main(args) == 0, capsys.readouterr().err
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert n_token > 1.15 * n_step and figures["all"] == pytest.approx(n_token / n_step)
    assert figures["up to position 40, in the categories beyond"] == pytest.approx(figures["up to position 40"])
    assert "beyond position 40" in figures and figures["first turns, c"] == figures["all"]
    (tmp_path / "questions").write_text(json.dumps(questions[0]) + "\n")
    assert head_alone.main(args) == 2 and "line 2" in capsys.readouterr().err


def test_tuned_tree_is_written_where_generate_finds_it(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "target")
    model = Transformer.from_pretrained(checkpoint)
    head = EagleHead(replace(model.config, n_layer=1), model)
    folder = write_head(head, tmp_path / "head")
    args = tune_tree.parse_args(["--checkpoint", str(checkpoint), "--eagle", str(folder), "--max-new-tokens", "16",
                                 "--max-depth", "2", "--max-nodes", "4", "--repeats", "3"])
    assert tune_tree.main(args) == 0, capsys.readouterr().err
    made = json.loads((folder / "tree.json").read_text())
    speeds = {(str(pair["paths"]), pair["copy"]): pair["tokens_per_second"] for pair in made["finalists"]}
    assert 5 <= len(speeds) <= 7 and speeds[str(made["paths"]), made["copy"]] == max(speeds.values())
    assert sum(n_copy == 0 for _, n_copy in speeds) >= 2
    tree = load_tree(str(folder / "tree.json"))
    assert tree.n_node <= 5 and tree.n_copy == made["copy"]
    costs = made["costs_ms"]
    assert list(costs["target_by_rows"])[-1] == "21"    # as many rows as the largest tree and branch
    assert list(map(int, costs["rest_by_copy"])) == list(tree_search.COPY_LENGTHS[1:])
    assert sum(made["figures"][name]["answers"] for name in made["figures"] if name != "all") == 24
    assert generate_args(["--eagle", str(folder)]).tree is None  # so that load_head takes tree.json


def test_a_tree_of_one_node_is_found_and_bad_input_is_refused_before_the_work(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "target")
    model = Transformer.from_pretrained(checkpoint)
    folder = write_head(EagleHead(replace(model.config, n_layer=1), model), tmp_path / "head")
    options = ["--checkpoint", str(checkpoint), "--eagle", str(folder), "--max-new-tokens", "16", "--max-depth", "2",
               "--repeats", "3"]
    for name, text in (("none", ""), ("number", '{"turns": [5]}'), ("broken", "{"),
                       ("half", '{"turns": ["\\ud83d"]}'), ("list", "[7]")):
        file = tmp_path / name
        file.write_text(text)
        assert tune_tree.main(tune_tree.parse_args([*options, "--questions", str(file)])) == 2
        err = capsys.readouterr().err
        assert str(file) in err and err.count("\n") == 1 and ("line 1" in err or name == "none")
    assert tune_tree.main(tune_tree.parse_args([*options, "--out", str(tmp_path / "missing" / "tree.json")])) == 2
    assert "--out" in capsys.readouterr().err
    file.write_text(json.dumps({"turns": ["the fox " * 300]}))
    assert tune_tree.main(tune_tree.parse_args([*options, "--questions", str(file)])) == 2
    assert "question 1 has" in (err := capsys.readouterr().err) and "no question leaves room" in err
    line = json.dumps({"turns": ["one\u2028two\u0085"]}, ensure_ascii=False)
    for text in (line, "\ufeff" + line + "\r\n", f"[{line}]"):
        file.write_bytes(text.encode())
        assert [question["turns"] for question in tune_tree.read_questions(str(file))] == [["one\u2028two\u0085"]]
    assert tune_tree.main(tune_tree.parse_args([*options, "--max-nodes", "1"])) == 0, capsys.readouterr().err
    assert load_tree(str(folder / "tree.json")).n_node == 2


def write_head(head, folder):
    from safetensors.torch import save_file
    c = head.config
    folder.mkdir()
    save_file({key: torch.randn_like(part, dtype=torch.float32) * 0.02 for key, part in head.weights().items()},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_size": c.dim, "vocab_size": c.vocab_size, "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head, "intermediate_size": c.intermediate_size, "rms_norm_eps": c.norm_eps}))
    return folder


def test_draft_vocabulary_holds_the_commonest_tokens_first(tmp_path, demo_folder, capsys):
    from tokenizer import Tokenizer
    tok = Tokenizer.from_pretrained(demo_folder)
    data = tmp_path / "data.jsonl"
    question = {"role": "user", "content": "dog dog dog dog dog dog dog"}       # what only the user says does not count
    answers = ({"role": "assistant", "content": text} for text in ("so the the the cat", "so the cat"))
    data.write_text("\n".join(json.dumps({"id": "dog_17", "messages": [question, answer]}) for answer in answers))
    out = tmp_path / "draft_vocab.json"
    args = draft_vocab.parse_args(["--checkpoint", str(demo_folder), "--data", str(data), "--size", "4",
                                   "--out", str(out)])
    assert draft_vocab.main(args) == 0, capsys.readouterr().err
    ids = json.loads(out.read_text())["ids"]
    assert len(ids) == 4 and set(tok.stop_ids) <= set(ids)
    words = [i for i in ids if i not in tok.stop_ids]
    assert tok.decode(words[:1]) == " the" and "dog" not in tok.decode(words)
    (tmp_path / "data.txt").write_text("so the the cat\nso the cat\n")
    args.data = tmp_path / "data.txt"
    assert draft_vocab.main(args) == 0
    assert tok.decode([i for i in json.loads(out.read_text())["ids"] if i not in tok.stop_ids][:1]) == " the"


def test_draft_vocabulary_refuses_bad_data_in_one_line(tmp_path, demo_folder, capsys):
    data, out = tmp_path / "data.jsonl", tmp_path / "out.json"
    for content, culprit in ((b'{"a": "b"}\n{broken', "line 2"), (b"", "no text"), (b"\xff\xfe", "UTF-8")):
        data.write_bytes(content)
        args = draft_vocab.parse_args(["--checkpoint", str(demo_folder), "--data", str(data), "--out", str(out)])
        assert draft_vocab.main(args) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and culprit in errors[0]
    assert not out.exists()


def test_the_recipe_of_the_shipped_head_is_made_of_valid_commands_and_ends_where_one_fails(tmp_path):
    (tmp_path / "C").mkdir()
    (tmp_path / "C-int4").mkdir()
    stub = tmp_path / "python"
    stub.write_text(f"""#!{sys.executable}
import json, pathlib, sys
script, *options = sys.argv[1:]
if script == "-m":
    script, *options = sys.argv[sys.argv.index("train_head.py"):]
if script == "-c":
    sys.exit(1)     # there is no GPU
with open({str(tmp_path / 'calls')!r}, "a") as calls:
    calls.write(json.dumps([script, options]) + "\\n")
if script.endswith("generate_data.py"):
    out = pathlib.Path(options[options.index("--out") + 1])
    out.write_text(out.name + "\\n")
    sys.exit(pathlib.Path({str(tmp_path / 'fails')!r}).exists())
""")
    stub.chmod(0o755)

    def run():
        (tmp_path / "calls").unlink(missing_ok=True)
        settings = {"PYTHON": str(stub), "CHECKPOINT": str(tmp_path / "C"), "WRITERS": "2", "DIALOGUES": "10"}
        status = subprocess.run(["bash", ROOT / "scripts/train_demo_head.sh", tmp_path / "out"],
                                env=os.environ | settings).returncode
        return status, list(map(json.loads, (tmp_path / "calls").read_text().splitlines()))

    status, calls = run()
    assert status == 0
    assert sorted(script for script, _ in calls[:2]) == ["scripts/generate_data.py"] * 2
    assert sorted(script for script, _ in calls[2:6]) == ["scripts/ask_about.py"] * 2 + ["scripts/generate_data.py"] * 2
    assert [script for script, _ in calls[6:]] == ["scripts/join_dialogues.py", "train_head.py", "scripts/tune_tree.py",
                                                   "scripts/tune_tree.py"]
    parsers = {"scripts/generate_data.py": generate_data, "scripts/ask_about.py": ask_about,
               "scripts/join_dialogues.py": join_dialogues, "train_head.py": train_head,
               "scripts/tune_tree.py": tune_tree}
    parsed = [parsers[script].parse_args(options) for script, options in calls]
    *_, joined, trained, tuned, tuned_int4 = parsed
    written = sorted((args for args in parsed[:6] if "prompts" in args), key=lambda args: args.seed)
    assert [(args.seed, args.dialogues) for args in written[:2]] == [(201, 5), (202, 5)]
    assert sorted(args.out for args in parsed[2:6] if "prompts" not in args) == [args.prompts for args in written[2:]]
    assert [args.out for args in written] == joined.data and joined.out == trained.data and trained.resume
    assert [tuned.checkpoint, tuned_int4.checkpoint] == [str(tmp_path / "C"), str(tmp_path / "C-int4")]

    (tmp_path / "fails").touch()
    status, calls = run()
    assert status != 0 and {script for script, _ in calls} == {"scripts/generate_data.py"}
    assert subprocess.run(["bash", ROOT / "scripts/train_demo_head.sh"], capture_output=True).returncode == 2
