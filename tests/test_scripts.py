"""The scripts around a head: tree search and draft vocabulary."""
import itertools
import json
from dataclasses import replace

import pytest
import torch

from draft_tree import StaticTree, load_tree
from eagle_head import EagleHead
from generate import generate
from generate import parse_args as generate_args
from model import Transformer
from reference import tiny, write_checkpoint
from scripts import draft_vocab, tune_tree
from train_loss import draft_ranks


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
        found = tune_tree.best_nodes(accept, n)
        assert sum(value for value, _ in found) == pytest.approx(best)
        StaticTree.from_paths([path for _, path in found])  # connected, or this raises


WIDE = [[r] for r in range(30)] + [[r, s] for r in range(3) for s in range(30)]


@pytest.mark.parametrize("paths", [[[0], [0, 0]], WIDE], ids=["chain", "wide"])
def test_steps_foreseen_from_ranks_are_those_that_decoding_takes(pair, paths):
    model, head = pair
    prompt, tree = torch.randint(0, model.config.vocab_size, (9,)).tolist(), StaticTree.from_paths(paths)
    ranks, = tune_tree.measure_ranks(model, head, [prompt], 60, frozenset(), max_depth=2)
    foreseen = tune_tree.accept_lengths(set(map(tuple, paths)), list(zip(*ranks.tolist())))
    taken = generate(model, [prompt], 60, head=head, tree=tree).accept_lengths[0]
    assert foreseen[:-1] == taken[:len(foreseen) - 1] and len(foreseen) > 15    # the last may be cut
    assert len(paths) == 2 or len(set(foreseen)) > 1


def test_a_step_goes_as_deep_as_the_ranks_are_nodes_and_the_next_begins_behind_the_bonus_token():
    ranks = [(0, 2), (0, 1), (5, 0), (0, 1), (0, 0), (0, 0), (3, 0), (0, 9)]
    assert tune_tree.accept_lengths({(0,), (0, 1), (3,)}, ranks) == [2, 1, 3, 2]


def test_search_takes_the_tree_that_pays_on_the_device():
    accept = [[0.8, 0.1], [0.8, 0.1], [0.8, 0.1]]
    rng = torch.Generator().manual_seed(0)
    draw = lambda: tuple(torch.multinomial(torch.tensor([0.8, 0.1, 0.1]), 3, replacement=True, generator=rng).tolist())
    answers = [[draw()] for _ in range(2000)]     # each of one step, so that every node that is met adds to the mean
    free_rows = {"target_by_rows": {1: 10.0, 64: 10.0}, "draft_level": 0.1, "first_level": 0.1, "rest": 0.1}
    best, *others = tune_tree.search(accept, answers, free_rows, max_nodes=14)
    assert len(best.paths) == 14 and max(map(len, best.paths)) == 3 and len(others) == 13
    assert best.rate == pytest.approx(best.accept_length / 10.4) and best.rate >= max(other.rate for other in others)
    dear_levels = free_rows | {"draft_level": 20.0}
    assert {len(path) for path in tune_tree.search(accept, answers, dear_levels, max_nodes=14)[0].paths} == {1}
    dear_rows = free_rows | {"target_by_rows": {1: 10.0, 64: 640.0}}
    assert len(tune_tree.search(accept, answers, dear_rows, max_nodes=14)[0].paths) == 1


def test_tuned_tree_is_written_where_generate_finds_it(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "target")
    model = Transformer.from_pretrained(checkpoint)
    head = EagleHead(replace(model.config, n_layer=1), model)
    folder = write_head(head, tmp_path / "head")
    args = tune_tree.parse_args(["--checkpoint", str(checkpoint), "--eagle", str(folder), "--max-new-tokens", "16",
                                 "--max-depth", "2", "--max-nodes", "4", "--repeats", "3"])
    assert tune_tree.main(args) == 0, capsys.readouterr().err
    made = json.loads((folder / "tree.json").read_text())
    speeds = {str(finalist["paths"]): finalist["tokens_per_second"] for finalist in made["finalists"]}
    assert len(speeds) == 4 and speeds[str(made["paths"])] == max(speeds.values())
    assert load_tree(str(folder / "tree.json")).n_node <= 5
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
