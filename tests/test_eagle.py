"""eagle_head.py, draft_tree.py, eagle_step.py: against EAGLE written out, what is refused, and the command line.

    python -m pytest tests/test_eagle.py -q             # that EAGLE changes no token: tests/test_eagle_lossless.py

Shapes: B batch, N tree nodes including the root, R children of a node, S cache slots, V vocabulary.
"""
import contextlib
import functools
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode

import decoder as decode_loop
import draft_tree
import eagle_head
import eagle_step
import generate as cli
import model as model_file
import quantize
from benchmarks.shapes import TINY
from chat import Printer, StopTexts
from decoder import Decoder, setup_caches
from draft_tree import Draft, DynamicTree, StaticTree, ancestor_mask, load_tree, plan_static
from eagle_head import EagleHead
from eagle_step import EagleStep, accept_sampled
from generate import generate
from model import Transformer
from reference import VOCAB, assert_close, edited_json, naive_decode, read_safetensors, tiny, to_bin, tokens_of
from sampling import NOT_FINITE, Sampling

ROOT = Path(__file__).resolve().parent.parent
GAPS = StaticTree.from_paths([[1], [3], [1, 0], [1, 2], [3, 1], [1, 2, 1]])  # ranks that skip some
TREES = {"chain": StaticTree.chain(4), "paper": StaticTree.paper(), "gaps": GAPS,
         "one level": StaticTree.from_paths([[0], [1]]), "dynamic": DynamicTree(4, 3, 12),
         "dynamic, all nodes": DynamicTree(3, 2, 11), "dynamic, one level": DynamicTree(1, 4, 4)}
all_trees = pytest.mark.parametrize("tree", TREES.values(), ids=list(TREES))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints

@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """zoo(kind) -> a tiny target of this kind: folder, weights on file, and model. Do not write into them."""

    @functools.cache
    def load_kind(kind, **overrides):
        folder, _ = tiny(kind, tmp_path_factory.mktemp(kind), **overrides)
        weights = read_safetensors(folder / "model.safetensors")
        return types.SimpleNamespace(folder=folder, weights=weights, model=load(folder))

    return load_kind


def load(folder):
    return Transformer.from_pretrained(folder, device="cpu", dtype=torch.float32)


def head_config(target, **changes):
    """A head's config.json, as the official ones: `changes` with None take a key away."""
    c = target.config
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", num_hidden_layers=1,
                  hidden_size=c.dim, vocab_size=c.vocab_size, num_attention_heads=c.n_head, intermediate_size=40,
                  num_key_value_heads=c.n_kv_head, max_position_embeddings=256, rms_norm_eps=1e-3, bias=True) | changes
    return {key: value for key, value in config.items() if value is not None}


def head_weights(config, embedding, scale=0.25):
    """Random weights under the official keys."""
    d, heads, hidden = config["hidden_size"], config["num_attention_heads"], config["intermediate_size"]
    q, kv = d, d // heads * config.get("num_key_value_heads", heads)
    shapes = {"fc.weight": (d, 2 * d), "layers.0.self_attn.q_proj.weight": (q, d),
              "layers.0.self_attn.k_proj.weight": (kv, d), "layers.0.self_attn.v_proj.weight": (kv, d),
              "layers.0.self_attn.o_proj.weight": (d, q),
              "layers.0.mlp.gate_proj.weight": (hidden, d), "layers.0.mlp.up_proj.weight": (hidden, d),
              "layers.0.mlp.down_proj.weight": (d, hidden), "layers.0.post_attention_layernorm.weight": (d,)}
    if config.get("bias", True):
        shapes["fc.bias"] = (d,)
    if config.get("qkv_bias"):
        shapes |= {f"layers.0.self_attn.{name}_proj.bias": (size,) for name, size in zip("qkv", (q, kv, kv))}
    weights = {key: scale * torch.randn(shape) for key, shape in shapes.items()}
    weights["layers.0.post_attention_layernorm.weight"] += 1
    return weights if embedding is None else weights | {"embed_tokens.weight": embedding.clone()}


def write_head(folder, config, weights, *, dtype=torch.float32, binary=False):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: tensor.to(dtype).contiguous() for key, tensor in weights.items()}, folder / "model.safetensors")
    if binary:
        to_bin(folder)
    return folder


@pytest.fixture
def fitting_head(zoo, tmp_path):
    """A head that fits zoo("gqa"), with its embedding on file, to be damaged."""
    torch.manual_seed(1)
    config = head_config(zoo("gqa").model)
    return write_head(tmp_path / "head", config, head_weights(config, zoo("gqa").model.tok_embeddings.weight))


# ---------------------------------------------------------------------------------------------------------------------
# The head, written out from the paper and the authors' code in fp64, over a whole sequence; nothing is from model.py

def written_out_head(config, weights, embedding, tokens, features):
    """tokens t_1..t_n, features f_0..f_{n-1} [n, d] -> [n, d]: the pair (f_i, t_{i+1}) stands at position i."""
    w = {key: tensor.double() for key, tensor in weights.items()}
    heads, n, d = config["num_attention_heads"], len(tokens), config["hidden_size"]
    kv_heads, size = config.get("num_key_value_heads", heads), d // heads

    def project(name):
        out = x @ w[f"layers.0.self_attn.{name}_proj.weight"].T
        return out + w[f"layers.0.self_attn.{name}_proj.bias"] if config.get("qkv_bias") else out

    def rotate(vectors):    # [n, size]: plane j is (j, j + size/2), its angle at position i is i * theta^(-2j/size)
        turned = torch.empty_like(vectors)
        for j in range(size // 2):
            angle = torch.arange(n).double() * config.get("rope_theta", 10000.0) ** (-2 * j / size)
            a, b = vectors[:, j], vectors[:, j + size // 2]
            turned[:, j] = a * angle.cos() - b * angle.sin()
            turned[:, j + size // 2] = b * angle.cos() + a * angle.sin()
        return turned

    x = torch.cat((embedding.double()[tokens], features.double()), dim=1) @ w["fc.weight"].T
    if config.get("bias", True):
        x = x + w["fc.bias"]
    q, k, v = project("q"), project("k"), project("v")      # no norm before attention
    attended = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        own, theirs = slice(h * size, (h + 1) * size), slice(g * size, (g + 1) * size)
        scores = rotate(q[:, own]) @ rotate(k[:, theirs]).T / math.sqrt(size)
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        attended.append(scores.softmax(-1) @ v[:, theirs])
    x = x + torch.cat(attended, dim=1) @ w["layers.0.self_attn.o_proj.weight"].T
    y = x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt()
    y = y * w["layers.0.post_attention_layernorm.weight"]
    gate, up = y @ w["layers.0.mlp.gate_proj.weight"].T, y @ w["layers.0.mlp.up_proj.weight"].T
    return x + (gate / (1 + (-gate).exp()) * up) @ w["layers.0.mlp.down_proj.weight"].T     # no final norm


HEADS = {
    "as LLaMA-2's, fp32 bin": ("llama2", dict(), dict(binary=True)),
    "as LLaMA-3's, fp16, no bias": ("gqa", dict(bias=False, rope_theta=500000.0),
                                    dict(dtype=torch.float16, binary=True)),
    "bf16, no bias key": ("llama2", dict(bias=None), dict(dtype=torch.bfloat16)),
    "bf16 bin, without embed_tokens": ("llama2", dict(), dict(dtype=torch.bfloat16, binary=True, embed=False)),
    "GQA head, GQA target": ("gqa", dict(), dict()),
    "GQA head, MHA target, as Vicuna-33B's": ("llama2", dict(num_key_value_heads=2), dict()),
    "MHA head, GQA target": ("gqa", dict(num_key_value_heads=8), dict(embed=False)),
    "MHA head, no key for it": ("gqa", dict(num_key_value_heads=None), dict()),
    "as Qwen2's": ("qwen2", dict(model_type="qwen2", qkv_bias=True, rope_theta=1e6), dict(dtype=torch.float16)),
    "as Mixtral's, dense": ("mixtral", dict(rope_theta=1e6), dict()),
    "tied target": ("qwen3", dict(num_attention_heads=2, num_key_value_heads=1), dict()),
    "other eps, other width": ("llama2", dict(rms_norm_eps=0.1, intermediate_size=72), dict()),
}


@pytest.mark.parametrize("kind, changes, file", HEADS.values(), ids=list(HEADS))
def test_features_and_draft_logits_are_those_of_eagle_written_out(zoo, tmp_path, kind, changes, file):
    z = zoo(kind)
    config, dtype = head_config(z.model, **changes), file.get("dtype", torch.float32)
    embedding = z.weights["model.embed_tokens.weight"]
    weights = head_weights(config, embedding if file.get("embed", True) else None)
    write_head(tmp_path, config, weights, dtype=dtype, binary=file.get("binary", False))
    head = EagleHead.from_pretrained(tmp_path, target=z.model)
    tokens, features = torch.tensor(tokens_of(40)), torch.randn(40, z.model.config.dim)
    rounded = {key: tensor.to(dtype) for key, tensor in weights.items()}
    expected = written_out_head(config, rounded, embedding, tokens, features)
    ours = head(tokens[None], features[None], torch.arange(40))[0]
    assert_close(ours, expected.float(), 1e-5)
    output = z.weights["lm_head.weight" if "lm_head.weight" in z.weights else "model.embed_tokens.weight"]
    assert_close(head.draft_logits(ours), (expected @ output.double().T).float(), 1e-5)
    ids = tokens_of(60, seed=1)[:20]
    ids = list(dict.fromkeys(ids))
    head.set_draft_vocab(ids)
    assert_close(head.draft_logits(ours), (expected @ output.double()[ids].T).float(), 1e-5)
    assert head.to_target_ids(torch.arange(len(ids))).tolist() == ids


def test_the_embedding_on_file_is_not_read_and_not_kept(zoo, fitting_head):
    target = zoo("gqa").model
    plain = EagleHead.from_pretrained(fitting_head, target=target)
    weights = read_safetensors(fitting_head / "model.safetensors")
    save_file(weights | {"embed_tokens.weight": torch.full_like(weights["embed_tokens.weight"], torch.nan)},
              fitting_head / "model.safetensors")
    other = EagleHead.from_pretrained(fitting_head, target=target)
    args = torch.tensor([tokens_of(9)]), torch.randn(1, 9, target.config.dim), torch.arange(9)
    assert torch.equal(plain(*args), other(*args))
    sizes = sum(p.numel() for p in plain.parameters())
    assert sizes == sum(w.numel() for key, w in weights.items() if key != "embed_tokens.weight")


# ---------------------------------------------------------------------------------------------------------------------
# Drafting with caches

@pytest.fixture(scope="module")
def narrow(tmp_path_factory):
    """Target and head over a vocabulary of 12, where a random head is right now and then; both as files too."""
    torch.manual_seed(3)
    folder, _ = tiny("gqa", tmp_path_factory.mktemp("narrow"), vocab_size=12, seed=3)
    target, oracle = load(folder), load(folder)
    config = head_config(target, intermediate_size=48, rope_theta=300.0)
    weights = head_weights(config, None, scale=0.1)
    head = EagleHead.from_pretrained(write_head(folder / "head", config, weights), target=target)
    return types.SimpleNamespace(folder=folder, model=target, head=head, oracle=oracle, config=config, weights=weights)


class SlowDraft:
    """The head of one sequence on any path below it, without cache: everything again for every path."""

    def __init__(self, narrow, sequence, ids):
        self.n, self.sequence, self.ids = narrow, sequence, ids     # ids: the draft vocabulary, as target ids
        # No cache was ever set up in `oracle`.
        _, self.features = narrow.oracle(torch.tensor([sequence]), torch.arange(len(sequence)))
        self.known = {}

    def feature(self, path):
        """f̂ after the path's tokens: [d] fp64."""
        if path not in self.known:
            own = [self.feature(path[:k]) for k in range(len(path))]
            tokens = torch.tensor([*self.sequence[1:], *path])
            features = torch.stack([*self.features[0, :-1].double(), *own])
            embedding = self.n.model.tok_embeddings.weight
            self.known[path] = written_out_head(self.n.config, self.n.weights, embedding, tokens, features)[-1]
        return self.known[path]

    def log_probs(self, path):
        """[(log q, token), ...] likeliest first."""
        logits = self.feature(path) @ self.n.model.output.weight.double()[self.ids].T
        return sorted(zip(logits.log_softmax(-1).tolist(), self.ids), reverse=True)

    def static(self, tree):
        """Paths of the nodes, and of the expanded ones in the order of nodes."""
        paths = [()]
        for parent, rank in zip(tree.parents[1:], tree.ranks[1:]):
            paths.append((*paths[parent], self.log_probs(paths[parent])[rank][1]))
        return paths, [paths[n] for n in sorted(set(tree.parents))]

    def dynamic(self, tree):
        """EAGLE-2 (arXiv 2406.16858, section 4): expand the K best of every level, keep the best of all."""
        level, candidates, expanded = [(0.0, ())], [], []
        for _ in range(tree.depth):
            expanded += [path for _, path in level]
            drafted = [(score + log_q, (*path, token)) for score, path in level
                       for log_q, token in self.log_probs(path)[:tree.n_child]]
            candidates += drafted
            level = sorted(drafted, reverse=True)[:tree.n_child]
        kept = sorted(candidates, reverse=True)[:tree.n_node - 1]
        return [(), *(path for _, path in kept)], expanded


def node_paths(draft, b):
    paths = [()]
    for token, parent in zip(draft.tokens[b, 1:].tolist(), draft.parents[b, 1:].tolist()):
        assert parent < len(paths), "a parent precedes its children"
        paths.append((*paths[parent], token))
    return paths


def brute_force_ancestors(parents):
    """[N] -> [N, N] bool"""
    seen = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for node in range(len(parents)):
        above = node
        while not seen[node, above]:
            seen[node, above] = True
            above = parents[above]
    return seen


def drafted(step, n_slot, monkeypatch):
    """The next draft, and the features [B, E, d] of its expanded nodes; the step's state stays as it is."""
    features = []
    with monkeypatch.context() as patch:
        original = step.head.draft_logits
        patch.setattr(step.head, "draft_logits", lambda hidden: features.append(hidden) or original(hidden))
        draft = step.grow(n_slot)
    return draft, torch.cat(features, dim=1)


@pytest.mark.parametrize("ids", [None, [7, 2, 11, 0, 5, 9]], ids=["all tokens", "draft vocabulary"])
@all_trees
def test_cached_level_by_level_drafts_equal_the_head_without_cache_on_each_path(narrow, tree, ids, monkeypatch):
    """Positions, slots and masks of the draft, in a prompt prefilled in chunks and in the steps after it."""
    monkeypatch.setattr(eagle_step, "prefill", functools.partial(model_file.prefill, chunk=3))
    sequences = [tokens_of(n, seed=n, vocab=12) for n in (9, 2, 5, 1)]
    n_slot = 64
    setup_caches(narrow.model, narrow.head, 4, n_slot)
    narrow.head.set_draft_vocab(ids)
    step = EagleStep(narrow.model, narrow.head, tree, 4)
    step.prefill(sequences)
    sequences, lengths = [sequence + new[:1] for sequence, new in zip(sequences, step.produced.tolist())], []
    for _ in range(4):
        draft, features = drafted(step, n_slot, monkeypatch)
        for b, sequence in enumerate(sequences):
            parents = draft.parents[b].tolist()
            paths = node_paths(draft, b)
            assert len(set(paths)) == tree.n_node == len(paths), "siblings differ"
            assert draft.depths[b].tolist() == [len(path) for path in paths]
            assert torch.equal(draft.ancestors[b], brute_force_ancestors(parents))
            assert step.pos[b] == len(sequence) - 1 and draft.tokens[b, 0] == sequence[-1]
            slow = SlowDraft(narrow, sequence, ids or list(range(12)))
            wanted, expanded = (slow.dynamic if isinstance(tree, DynamicTree) else slow.static)(tree)
            assert (sorted(paths) == sorted(wanted)) if isinstance(tree, DynamicTree) else (paths == wanted)
            if isinstance(tree, DynamicTree):   # the last levels are not drafted where they cannot matter
                expanded = expanded[:features.shape[1]]
            assert_close(features[b], torch.stack([slow.feature(path) for path in expanded]).float(), 3e-5)
        step(n_slot)
        produced = [[i for i in row if i >= 0] for row in step.produced.tolist()]
        sequences = [sequence + new for sequence, new in zip(sequences, produced)]
        lengths += map(len, produced)
    assert len(set(lengths)) > 1 or tree.n_node < 20, "rows should advance by different amounts here"


def test_a_level_that_cannot_matter_is_not_drafted_and_changes_no_draft(narrow, monkeypatch):
    """Alone, and in a batch, where it must not matter for any row."""
    narrow.head.set_draft_vocab(None)
    setup_caches(narrow.model, narrow.head, 3, 64)
    skipped = 0
    for tree, n_row, sharp in itertools.product((DynamicTree(6, 3, 7), DynamicTree(5, 4, 30)), (1, 3), (1, 8)):
        step = EagleStep(narrow.model, narrow.head, tree, n_row)
        for seed in range(6):
            step.prefill([tokens_of(5 + n, seed=3 * seed + n, vocab=12) for n in range(n_row)])
            drafts, passes = [], []
            for look in (True, False):
                with monkeypatch.context() as patch:
                    original, count = narrow.head.draft_logits, [0]
                    patch.setattr(narrow.head, "draft_logits", lambda hidden: count.__setitem__(0, count[0] + 1)
                                  or sharp * original(hidden))
                    if not look:
                        patch.setattr(draft_tree, "cannot_matter", lambda *args: False)
                    drafts.append(step.grow(64))
                passes.append(count[0])
            assert all(torch.equal(a, b) for a, b in zip(drafts[0][:4], drafts[1][:4]))
            assert passes[1] == tree.depth >= passes[0]
            skipped += passes[1] - passes[0]
    assert skipped > 10


def test_a_dynamic_tree_is_connected_when_the_head_is_certain_of_everything(narrow):
    """Probabilities of 1 and of 0 tie; a child must still never outrank its parent."""
    setup_caches(narrow.model, narrow.head, 2, 64)
    narrow.head.set_draft_vocab(None)
    root_hidden = 1e6 * torch.randn(2, 1, narrow.model.config.dim)
    for tree in (DynamicTree(6, 3, 7), DynamicTree(6, 3, 20), DynamicTree(8, 4, 40), DynamicTree(8, 3, 9)):
        step = EagleStep(narrow.model, narrow.head, tree, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(narrow.head, "draft_logits", lambda hidden: 1e6 * narrow.model.output(hidden))
            step.root_hidden.copy_(root_hidden)
            draft = step.grow(64)
        for b in range(2):
            assert len(set(node_paths(draft, b))) == tree.n_node
            assert draft.depths[b].tolist() == [len(path) for path in node_paths(draft, b)]


# ---------------------------------------------------------------------------------------------------------------------
# Trees

def test_the_paper_tree_has_25_nodes_4_8_8_3_2():
    tree = StaticTree.paper()
    assert tree.n_node == 26 and tree.depth == 5 and tree.n_child == 4 and not tree.is_chain
    assert [tree.depths.count(depth) for depth in range(6)] == [1, 4, 8, 8, 3, 2]
    assert load_tree("static") == tree


@pytest.mark.parametrize("tree", [StaticTree.paper(), StaticTree.chain(1), StaticTree.chain(7), GAPS])
def test_static_parents_precede_children_and_ancestors_are_those_of_brute_force(tree):
    assert tree.parents[0] == tree.depths[0] == 0
    for node in range(1, tree.n_node):
        assert tree.parents[node] < node and tree.depths[node] == tree.depths[tree.parents[node]] + 1
    parents = torch.tensor([tree.parents])
    assert torch.equal(ancestor_mask(parents, tree.depth)[0], brute_force_ancestors(tree.parents))


def test_ancestors_of_random_trees_are_those_of_brute_force():
    parents = torch.tensor([[0] + [int(torch.randint(n, ())) for n in range(1, 30)] for _ in range(8)])
    for row, seen in zip(parents.tolist(), ancestor_mask(parents, 30)):
        assert torch.equal(seen, brute_force_ancestors(row))


def test_paths_in_any_order_make_the_same_tree():
    paths = [[0], [1], [0, 0], [0, 2], [1, 0], [0, 2, 1]]
    assert StaticTree.from_paths(paths) == StaticTree.from_paths(paths[::-1])


def test_a_chain_is_the_tree_with_one_path(tmp_path):
    chain = StaticTree.chain(3)
    assert chain == StaticTree.from_paths([[0], [0, 0], [0, 0, 0]]) == load_tree("chain:3") and chain.is_chain
    assert load_tree("chain").is_chain


def test_a_tree_is_named_by_kind_and_numbers_or_by_a_file_of_paths(tmp_path):
    assert load_tree("dynamic:3,4,9") == DynamicTree(3, 4, 9) and load_tree("dynamic") == DynamicTree()
    for content in ([[0], [0, 1]], {"paths": [[0], [0, 1]], "speed": 1.0}):
        (tmp_path / "tree.json").write_text(json.dumps(content))
        assert load_tree(str(tmp_path / "tree.json")) == StaticTree.from_paths([[0], [0, 1]])


@pytest.mark.parametrize("text, names", [
    ("[[0], [0", []), ("", []), ("{}", []), ("[]", []), ("7", []), ('"static"', []), ("null", []), ("[0, 1]", []),
    ("[[]]", []), ('[["0"]]', []), ("[[0.0]]", []), ("[[-1]]", []), ("[[true]]", []), ("[[0], [false, 0]]", []),
    ('{"paths": 3}', []), ("[[0], [1], [0]]", ["twice"]), ("[[0], [1, 0]]", ["[1, 0]", "[1]"]), ("[[0, 0]]", ["[0]"]),
    ("\xff", []),
])
def test_a_malformed_tree_file_is_refused_in_one_line_by_name(tmp_path, text, names):
    file = tmp_path / "my tree.json"
    file.write_bytes(text.encode("latin-1"))
    error = refusal(ValueError, lambda: load_tree(str(file)))
    assert all(name in error for name in [str(file), *names]), error


@pytest.mark.parametrize("spec", ["chain:0", "chain:-1", "chain:2,3", "chain:x", "dynamic:1,2", "dynamic:1,2,3,4",
                                  "static:3", "tree", "no/such/tree.json", "dynamic:a,b,c", "", "chain:1.5", "auto"])
def test_an_unknown_tree_is_refused_in_one_line_by_name(spec):
    assert repr(spec) in refusal(FileNotFoundError, lambda: load_tree(spec))


@pytest.mark.parametrize("depth, n_child, n_node",
                         [(2, 2, 8), (3, 2, 3), (0, 2, 2), (2, 0, 3), (6, 10, 512), (1, 5, 1)])
def test_a_dynamic_tree_of_more_nodes_than_drafted_or_fewer_than_deep_is_refused(depth, n_child, n_node):
    error = refusal(ValueError, lambda: load_tree(f"dynamic:{depth},{n_child},{n_node}"))
    assert str(n_node) in error and str(depth) in error


@pytest.mark.parametrize("tree", [StaticTree.from_paths([[3]]), DynamicTree(2, 4, 6)])
def test_a_tree_wider_than_the_draft_vocabulary_is_refused(narrow, tree):
    narrow.head.set_draft_vocab([1, 5, 8])
    error = refusal(ValueError, lambda: EagleStep(narrow.model, narrow.head, tree, 1))
    assert "4" in error and "3" in error
    narrow.head.set_draft_vocab([1, 5, 8, 9])
    EagleStep(narrow.model, narrow.head, tree, 1)


@pytest.mark.parametrize("tree, temperature", [(DynamicTree(2, 2, 4), 1.0), (StaticTree.chain(2), 0.0)])
def test_drafts_are_drawn_only_for_static_trees_at_a_temperature(narrow, tree, temperature):
    narrow.head.set_draft_vocab(None)
    refusal(ValueError, lambda: EagleStep(narrow.model, narrow.head, tree, 1, Sampling(temperature), draw_drafts=True))
    assert not EagleStep(narrow.model, narrow.head, tree, 1, Sampling(temperature)).draw_drafts
    assert EagleStep(narrow.model, narrow.head, StaticTree.chain(2), 1, Sampling(1.0)).draw_drafts


@pytest.mark.parametrize("ids", [[], [3, 4, 3], [0, 12], [-1], [1.0, 2], [True, 2], ["1"], [[1], [2]], [None],
                                 {"a": 1}], ids=str)
def test_a_draft_vocabulary_of_repeated_absent_or_no_ids_is_refused(narrow, ids):
    assert "12" in refusal(ValueError, lambda: narrow.head.set_draft_vocab(ids))


# ---------------------------------------------------------------------------------------------------------------------
# Heads that are refused

def refusal(kind, call):
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message and message.strip(), repr(caught.value)
    return message


@pytest.mark.parametrize("changes, names", [
    (dict(hidden_size=32), ["hidden_size", "32", "64"]),
    (dict(vocab_size=97), ["vocab_size", "97", str(VOCAB)]),
    (dict(hidden_size=None), ["hidden_size"]),
    (dict(vocab_size=None), ["vocab_size"]),
    (dict(num_attention_heads=None), ["num_attention_heads"]),
    (dict(intermediate_size=None), ["intermediate_size"]),
    (dict(num_key_value_heads=3), ["8", "3"]),
    (dict(hidden_act="gelu"), ["hidden_act", "gelu"]),
    (dict(architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=32), ["EAGLE-3"]),
    (dict(eagle_version=3), ["EAGLE-3"]),
])
def test_a_head_whose_config_does_not_fit_is_refused_naming_both_values(zoo, fitting_head, changes, names):
    with edited_json(fitting_head / "config.json") as config:
        config |= changes
        for key in [key for key, value in changes.items() if value is None]:
            del config[key]
    error = refusal(ValueError, lambda: EagleHead.from_pretrained(fitting_head, target=zoo("gqa").model))
    assert all(name in error for name in names), error


EAGLE3 = {"midlayer.input_layernorm.weight": (64,), "fc.weight": (64, 192), "norm.weight": (64,),
          "lm_head.weight": (32, 64), "d2t": (32,), "t2d": (96,), "midlayer.self_attn.q_proj.weight": (64, 128)}


@pytest.mark.parametrize("edit, names", [
    (lambda w: w.pop("fc.weight"), ["'fc.weight'"]),
    (lambda w: w.pop("fc.bias"), ["'fc.bias'"]),
    (lambda w: w.pop("layers.0.mlp.up_proj.weight"), ["'layers.0.mlp.up_proj.weight'"]),
    (lambda w: w.update({"layers.0.input_layernorm.weight": torch.ones(64)}), ["'layers.0.input_layernorm.weight'"]),
    (lambda w: w.update({"norm.weight": torch.ones(64)}), ["'norm.weight'"]),
    (lambda w: w.update({"layers.1.mlp.up_proj.weight": torch.ones(40, 64)}), ["'layers.1.mlp.up_proj.weight'"]),
    (lambda w: w.update({"layers.0.self_attn.q_proj.bias": torch.ones(64)}), ["'layers.0.self_attn.q_proj.bias'"]),
    (lambda w: w.update({"fc.weight": torch.ones(64, 192)}), ["fc.weight", "[64, 192]", "[64, 128]"]),
    (lambda w: w.update({"layers.0.mlp.down_proj.weight": torch.ones(64, 41)}), ["down_proj", "[64, 41]", "[64, 40]"]),
    (lambda w: w.update({"layers.0.self_attn.k_proj.weight": torch.ones(64, 64)}), ["k_proj", "[64, 64]", "[16, 64]"]),
    (lambda w: w.update({"embed_tokens.weight": torch.ones(97, 64)}), ["embed_tokens.weight", "[97, 64]", "[96, 64]"]),
    (lambda w: (w.clear(), w.update({key: torch.ones(shape) for key, shape in EAGLE3.items()})), []),
])
def test_a_head_whose_weights_do_not_fit_is_refused_by_key_and_shape(zoo, fitting_head, edit, names):
    file = fitting_head / "model.safetensors"
    weights = read_safetensors(file)
    edit(weights)
    save_file(weights, file)
    error = refusal(ValueError, lambda: EagleHead.from_pretrained(fitting_head, target=zoo("gqa").model))
    assert all(name in error for name in [str(fitting_head), *names]), error


def test_a_head_folder_without_config_or_weights_is_a_file_not_found(zoo, fitting_head, tmp_path):
    for file in ("model.safetensors", "config.json"):
        (fitting_head / file).unlink()
        error = refusal(FileNotFoundError, lambda: EagleHead.from_pretrained(fitting_head, target=zoo("gqa").model))
        assert str(fitting_head) in error
    refusal(FileNotFoundError, lambda: EagleHead.from_pretrained(tmp_path / "none", target=zoo("gqa").model))


# ---------------------------------------------------------------------------------------------------------------------
# Acceptance of drawn drafts, where rounding bites

def accept_once(p, q, children, rows=4096):
    """accept_sampled for a root with these children, all rows alike: the first token produced, [rows]."""
    children = torch.as_tensor(children)                              # [rows, R] or [R]
    n = children.shape[-1] + 1
    tokens = torch.cat((torch.zeros(rows, 1, dtype=torch.long), children.expand(rows, -1)), dim=1)
    plan = plan_static(StaticTree.from_paths([[rank] for rank in range(n - 1)]), rows, tokens.device, torch.float)
    draft = Draft(tokens, *(part.expand(rows, *part.shape[1:]) for part in (plan.parents, plan.depths, plan.seen)),
                  q.float().expand(rows, 1, -1))
    head = types.SimpleNamespace(to_target_probs=lambda probs: probs)
    accepted = accept_sampled(p.log().float().expand(rows, n, -1), draft, plan, Sampling(1.0), head)
    assert ((accepted.n_accepted == 0) | (accepted.n_accepted == 1)).all()
    assert ((accepted.bonus >= 0) & (accepted.bonus < len(p))).all()
    drafts = tokens.gather(1, accepted.path[:, 1:])
    return torch.where(accepted.n_accepted == 1, drafts, accepted.bonus)[:, 0], accepted


def test_equal_distributions_accept_every_draft():
    p = torch.tensor([0.5, 0.3, 0.2, 0.0])
    for child in range(3):
        tokens, accepted = accept_once(p, p, [child])
        assert (accepted.n_accepted == 1).all() and (tokens == child).all()


@pytest.mark.parametrize("p, q, children", [
    ([0.5, 0.3, 0.2, 0.0], [0.5, 0.3, 0.2, 0.0], [0, 1, 2]),        # p = q: no residual mass
    ([0.25] * 4, [0.25] * 4, [3, 2, 1, 0]),
    ([0.0, 0.0, 1.0, 0.0], [0.5, 0.3, 0.2, 0.0], [0, 1]),           # one-hot target, among the rest
    ([0.0, 0.0, 1.0, 0.0], [0.5, 0.3, 0.2, 0.0], [0, 1, 2]),
    ([0.0, 0.0, 0.0, 1.0], [0.5, 0.3, 0.2, 0.0], [0, 1, 2]),        # one-hot where the draft has no mass
    ([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [2, 0, 1, 3]),     # fewer tokens in q than children
    ([0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0, 3, 2, 1]),
    ([1.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0, 1, 2, 3]),
    ([1e-30, 1.0, 0.0, 0.0], [1.0, 1e-30, 0.0, 0.0], [0, 1]),       # all but underflowing
    ([0.2, 0.3, 0.5, 0.0], [0.2 + 1e-7, 0.3, 0.5 - 1e-7, 0.0], [0, 2, 1]),
])
def test_no_nan_and_no_token_without_probability(p, q, children):
    p, q = torch.tensor(p), torch.tensor(q)
    tokens, _ = accept_once(p, q, children)
    assert (p[tokens] > 0).all(), tokens.unique()


@pytest.mark.parametrize("p", [[0.5, 0.3, 0.15, 0.05], [0.0, 0.0, 0.0, 1.0], [0.05, 0.05, 0.1, 0.8]])
@pytest.mark.parametrize("q", [[0.1, 0.2, 0.3, 0.4], [0.9, 0.1, 0.0, 0.0], [0.25] * 4, [0.0, 0.0, 1.0, 0.0]])
def test_tokens_follow_the_target_whatever_the_draft(p, q):
    """Four children a node, more than some q have tokens: frequencies within five standard errors."""
    p, q, rows = torch.tensor(p), torch.tensor(q), 40000
    children = (q / torch.empty(rows, 4).exponential_()).topk(4, dim=-1).indices   # drawn without replacement
    for n_child in (1, 2, 4):
        tokens, _ = accept_once(p, q, children[:, :n_child], rows)
        frequency = torch.bincount(tokens, minlength=4) / rows
        assert ((frequency - p).abs() <= 5 * (p * (1 - p) / rows).sqrt()).all(), (n_child, frequency)


def test_children_are_drawn_without_replacement_in_the_order_of_draws():
    """The pair of the first two has probability q(a) q(b) / (1 - q(a))."""
    q, rows = torch.tensor([0.4, 0.3, 0.2, 0.1]), 100000
    children, probs = draft_tree.draw_children(q.log().expand(rows, -1), 2, Sampling(1.0))
    torch.testing.assert_close(probs[0], q)
    for a in range(4):
        for b in range(4):
            expected = q[a] * q[b] / (1 - q[a]) if a != b else torch.tensor(0.0)
            found = ((children[:, 0] == a) & (children[:, 1] == b)).float().mean()
            assert (found - expected).abs() <= 5 * (expected * (1 - expected) / rows).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# One step: nothing waits for the device, and a compiler takes the whole of it

class NoHostRead(TorchDispatchMode):
    """Fails where the host would wait for the device, and where a constant would be copied to it."""
    FORBIDDEN = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_unique2", "equal",
                 "item", "argwhere")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in self.FORBIDDEN, f"{name} inside the step"
        assert name != "lift_fresh" or args[0].dim() == 0, "torch.tensor([...]) inside the step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tree, sampling, draw", [
    *((tree, Sampling(), False) for tree in TREES.values()),
    *((tree, Sampling(0.7, 5, 0.9), False) for tree in TREES.values()),
    *((tree, Sampling(0.7, 5, 0.9), True) for tree in (TREES["chain"], TREES["paper"])),
])
def test_a_step_never_waits_for_the_device(narrow, tree, sampling, draw, batch, monkeypatch):
    monkeypatch.setattr(draft_tree, "cannot_matter", lambda *args: False)      # a CPU looks, which waits for nothing
    setup_caches(narrow.model, narrow.head, batch, 64)
    for ids in (None, [7, 2, 11, 0]):
        narrow.head.set_draft_vocab(ids)
        step = EagleStep(narrow.model, narrow.head, tree, batch, sampling, draw)
        step.prefill([[1, 2, 3]] * batch)
        with NoHostRead():
            step(64)


@pytest.mark.parametrize("kind", ["qwen2", "mixtral", "llama3.1", "qwen3", "qwen3_moe_mixed"])
def test_a_step_of_a_large_batch_never_waits_for_the_device(zoo, kind):
    """B * N rows: more than a prefill has, but it is a decode step all the same."""
    z = zoo(kind)
    head = random_head(z.model)
    setup_caches(z.model, head, 6, 64)
    step = EagleStep(z.model, head, StaticTree.paper(), 6)
    step.prefill([[1, 2, 3]] * 6)
    with NoHostRead():
        step(64)


class CountedOperators(TorchDispatchMode):
    """Operators outside the decoder layers of these modules. A view is none: nothing is computed."""
    VIEWS = {"view", "_unsafe_view", "expand", "slice", "select", "unsqueeze", "squeeze", "permute", "transpose", "t",
             "alias", "detach", "as_strided", "split", "unbind", "unfold"}

    def __init__(self, layers):
        super().__init__()
        self.n, self.n_inside = 0, 0
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: self.enter(1))
            layer.register_forward_hook(lambda *_: self.enter(-1))

    def enter(self, n):
        self.n_inside += n

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += self.n_inside == 0 and func.__name__.split(".")[0] not in self.VIEWS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, 20, 0.9)],
                         ids=["greedy", "T 1", "top-k, top-p"])
@pytest.mark.parametrize("tree", [StaticTree.chain(4), StaticTree.paper(), DynamicTree()],
                         ids=["chain", "paper", "dynamic"])
def test_a_step_is_few_operators_outside_the_layers(tree, sampling):
    """Each is a launch of microseconds on a GPU."""
    can_draw = isinstance(tree, StaticTree) and sampling.temperature > 0
    for ids, draw in itertools.product((None, list(range(100))), {can_draw, False}):
        model = Transformer(TINY)
        head = EagleHead(TINY, model)
        head.set_draft_vocab(ids)
        setup_caches(model, head, 1, 200)
        step = EagleStep(model, head, tree, 1, sampling, draw)
        step.prefill([[1, 2, 3]])
        with CountedOperators([*model.layers, head.layer]) as counted:
            step(128)
        assert counted.n < (200 if sampling.temperature == 0 else 350), (ids is not None, draw)


@pytest.mark.parametrize("tree", [TREES["chain"], TREES["paper"], TREES["dynamic"]], ids=["chain", "paper", "dynamic"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.7, 5, 0.9)],
                         ids=["greedy", "T 1", "top-k, top-p"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_logits_that_are_not_finite_are_told_and_spoil_no_other_row(narrow, tree, sampling, bad):
    """One logit in the last row; all of its node for -inf, of which single ones are merely impossible tokens."""
    narrow.head.set_draft_vocab(None)
    for draw in {False, sampling.temperature > 0 and isinstance(tree, StaticTree)}:
        setup_caches(narrow.model, narrow.head, 3, 64)
        step = EagleStep(narrow.model, narrow.head, tree, 3, sampling, draw)
        step.prefill([[1, 2, 3], [4, 5], [6, 7, 8]])
        draft = step.grow(64)
        logits, features = step.verify(draft, 64)
        logits[0, :, 3] = -math.inf
        logits[2, 0, 4 if bad != -math.inf else slice(None)] = bad     # at the root alone, which is visited always
        step.commit(draft, features, step.accept(logits, draft), 64)
        assert step.produced[2, 0] == NOT_FINITE and (step.produced[:2, 0] >= 0).all()
        assert (step.tokens >= 0).all() and step.root_hidden.isfinite().all()


def test_a_node_that_is_not_visited_may_have_any_logits(narrow):
    narrow.head.set_draft_vocab(None)
    setup_caches(narrow.model, narrow.head, 1, 64)
    for sampling in (Sampling(), Sampling(1.0, 1)):
        step = EagleStep(narrow.model, narrow.head, TREES["paper"], 1, sampling, False)
        step.prefill([[1, 2, 3]])
        draft = step.grow(64)
        logits, _ = step.verify(draft, 64)
        logits[0, 0] = 0
        logits[0, 0, draft.tokens[0, 2]] = 9        # the second child of the root
        logits[0, 2] = 0
        logits[0, 2, 0] = 9
        wanted = step.accept(logits, draft)
        spoilt = logits.clone()
        unseen = [n for n in range(step.tree.n_node) if n not in (*wanted.path[0, :wanted.n_accepted + 1].tolist(),)]
        spoilt[0, unseen] = math.nan
        found = step.accept(spoilt, draft)
        assert wanted.n_accepted >= 1 and all(torch.equal(a, b) for a, b in zip(wanted[:3], found))


def test_a_used_step_begins_as_a_fresh_one(narrow):
    """Nothing of the last text is left, not for a prompt of one token either."""
    narrow.head.set_draft_vocab(None)
    setup_caches(narrow.model, narrow.head, 2, 64)
    fresh, used = (EagleStep(narrow.model, narrow.head, replace(TREES["paper"], n_copy=3), 2) for _ in range(2))
    used.prefill([[1, 2, 3], [4, 5]])
    used(64)
    states = []
    for step in (fresh, used):
        step.prefill([[5], [7]])
        states.append([tensor.clone() for tensor in (*step.state, step.report, step.grow(64).tokens)])
    assert all(map(torch.equal, *states))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_head_is_fed_normed_features_in_every_dtype(narrow, dtype):
    model = Transformer.from_pretrained(narrow.folder, dtype=dtype)
    head = EagleHead.from_pretrained(narrow.folder / "head", target=model)
    setup_caches(model, head, 1, 64)
    step = EagleStep(model, head, StaticTree.chain(2), 1)
    fed, whole = [], head.forward
    head.forward = lambda tokens, features, *args, **kwargs: fed.append(features) or whole(
        tokens, features, *args, **kwargs)
    step.prefill([[1, 2, 3, 4]])
    _, features = narrow.oracle(torch.tensor([[1, 2, 3, 4]]), torch.arange(4))
    torch.testing.assert_close(fed[0].float(), features, rtol=0.1, atol=0.1)
    torch.testing.assert_close(fed[-1].float(), features[:, -1:], rtol=0.1, atol=0.1)
    text = [1, 2, 3, 4, step.tokens.item()]
    step(64)
    _, features = narrow.oracle(torch.tensor([text]), torch.arange(5))
    torch.testing.assert_close(fed[-1][:, :1].float(), features[:, -1:], rtol=0.1, atol=0.1)


def random_head(target, cls=EagleHead, scale=0.25):
    config = head_config(target)
    head = cls(eagle_head.head_args(config, target.config), target)
    for parameter in head.parameters():
        parameter.normal_(0, scale)
    head.layer.ffn_norm.weight.add_(1)
    return head


@pytest.mark.parametrize("tree, batch", [(StaticTree.from_paths([[0], [1], [2], [0, 0], [1, 0]]), 2),
                                         (DynamicTree(2, 3, 8), 1)])
def test_the_whole_step_compiles_as_one_graph_and_gives_the_same_tokens(narrow, tree, batch):
    narrow.head.set_draft_vocab([3, 1, 8, 10, 0, 5])
    prompts = [tokens_of(n, seed=n, vocab=12) for n in (5, 8)][:batch]
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        setup_caches(narrow.model, narrow.head, batch, 64)
        step = EagleStep(narrow.model, narrow.head, tree, batch)
        step.prefill(prompts)
        call = torch.compile(step.__call__, fullgraph=True, dynamic=False, backend="aot_eager") if compiled else step
        runs.append([])
        for _ in range(4):
            call(64)
            runs[-1].append(step.produced.tolist())
    assert runs[0] == runs[1]
    assert any(row[1] >= 0 for produced in runs[0] for row in produced), "some draft should be accepted here"


def test_a_compiled_decoder_gives_the_tokens_of_the_eager_one(narrow):
    """Inductor, as `--compile` on a CPU; and aot_eager, which compiles faster, for a batch and a tree."""
    narrow.head.set_draft_vocab(None)
    # 4 tokens: prefill, ingest and verification then have one shape, and inductor has less to compile.
    prompts = [tokens_of(n, seed=n, vocab=12) for n in (4, 8)]
    for tree, batch, backend in ((StaticTree.chain(2), 1, None), (DynamicTree(3, 3, 8), 2, "aot_eager")):
        results = []
        for compiled in (False, True):
            torch._dynamo.reset()
            model, head = load(narrow.folder), None
            head = EagleHead.from_pretrained(narrow.folder / "head", target=model)
            setup_caches(model, head, batch, 64)
            with pytest.MonkeyPatch.context() as patch:
                if backend is not None:
                    patch.setattr(decode_loop, "compile_layers", lambda layers: [
                        layer.compile(dynamic=False, backend=backend) for layer in layers])
                decoder = Decoder(model, batch, compile=compiled, head=head, tree=tree)
                results.append(decoder.generate(prompts[:batch], 20))
        assert results[0].tokens == results[1].tokens
        assert results[0].accept_lengths == results[1].accept_lengths


# ---------------------------------------------------------------------------------------------------------------------
# Lifted into another project

def test_model_and_eagle_head_alone_decode_and_import_no_compiler(narrow, tmp_path):
    """The files of a model, a head and its step copied into an empty folder, without the rest of this repository.

    Importing torch's compiler takes a second. Loading did so when it initialised weights on the meta device.
    """
    for name in ("console.py", "checkpoint.py", "hub_formats.py", "grid.py", "config.py", "sampling.py", "linears.py",
                 "runtime.py", "attention.py", "masks.py", "rope.py", "model.py", "head_config.py", "eagle_head.py",
                 "draft_tree.py", "copy_branch.py", "recorder.py", "eagle_step.py"):
        shutil.copy(ROOT / name, tmp_path)
    prompt = tokens_of(7, seed=7, vocab=12)
    wanted = naive_decode(load(narrow.folder), prompt, 24)
    program = f"""
import sys, torch
from model import Transformer
from eagle_head import EagleHead
from eagle_step import EagleStep
from draft_tree import load_tree
try:
    import generate
    raise SystemExit("generate.py is within reach")
except ImportError:
    pass
model = Transformer.from_pretrained({str(narrow.folder)!r}, dtype=torch.float32)
head = EagleHead.from_pretrained({str(narrow.folder / "head")!r}, target=model)
for name in ("chain:3", "static", "dynamic:3,3,8"):
    tree = load_tree(name)
    model.setup_caches(1, 80)
    head.setup_caches(1, 80)
    step = EagleStep(model, head, tree, batch_size=1)
    step.prefill([{prompt}])
    tokens = step.produced[0, :1].tolist()
    while len(tokens) < 24:
        step(n_slot=80)
        tokens += [i for i in step.produced[0].tolist() if i >= 0]
    print(tokens[:24])
print("torch._dynamo" in sys.modules)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [str(wanted)] * 3 + ["False"]


# ---------------------------------------------------------------------------------------------------------------------
# Command line

class RightHead(EagleHead):
    """Drafts what `known` says follows, by position, except after every fifth: most drafts are accepted."""
    known = []

    def forward(self, tokens, features, input_pos, *rest, **kwargs):
        out = super().forward(tokens, features, input_pos, *rest, **kwargs)
        pos = input_pos.expand(tokens.shape)                            # the pair at position i drafts token i + 2
        following = torch.tensor(self.known)[(pos + 2).clamp(max=len(self.known) - 1)]
        rows = self.target.output.weight[following]
        return torch.where((pos % 5 < 4)[..., None], 20 * rows / rows.norm(dim=-1, keepdim=True), out)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny target with a tokenizer, and below it `head`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder, _ = tiny("gqa", tmp_path_factory.mktemp("checkpoint"), vocab_size=320)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    bpe.train_from_iterator(["the quick brown fox jumps over the lazy dog, and the dog sleeps"] * 3, trainer)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": None}))
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            with edited_json(folder / name) as config:
                config["eos_token_id"] = None
    torch.manual_seed(2)
    target = load(folder)
    config = head_config(target)
    write_head(folder / "head", config, head_weights(config, target.tok_embeddings.weight))
    return folder


@pytest.fixture
def shell(checkpoint, tmp_path, capsys):
    """shell("--tree", "chain") -> exit status, stdout, stderr, the JSON object; shell.head may be damaged."""
    head = shutil.copytree(checkpoint / "head", tmp_path / "head")

    def run(*options, prompts=("the quick",), max_new_tokens=20):
        file = tmp_path / "out.json"
        file.unlink(missing_ok=True)
        capsys.readouterr()
        status = cli.main(cli.parse_args([
            "--checkpoint", str(checkpoint), "--eagle", str(head), "--prompt", *prompts, "--raw", "--device", "cpu",
            "--dtype", "float32", "--max-new-tokens", str(max_new_tokens), "--json", str(file), "--no-compile",
            *options]))
        captured = capsys.readouterr()
        report = json.loads(file.read_text()) if file.exists() else None
        return types.SimpleNamespace(status=status, out=captured.out, err=captured.err, report=report)

    run.head, run.checkpoint, run.folder = head, checkpoint, tmp_path
    return run


@pytest.fixture
def right_head(checkpoint, monkeypatch):
    """Makes the command line draft well for this prompt."""
    from tokenizer import Tokenizer
    tokenizer = Tokenizer.from_pretrained(checkpoint)
    prompt = tokenizer.encode("the quick")
    monkeypatch.setattr(RightHead, "known", prompt + naive_decode(load(checkpoint), prompt, 60))
    monkeypatch.setattr(cli, "EagleHead", RightHead)
    return tokenizer


FIELDS = """checkpoint eagle device device_name dtype torch compiled tree temperature top_k top_p seed prompt_tokens
new_tokens tokens text finish_reason target_passes accept_lengths mean_accept_length load_seconds compile_seconds
prefill_seconds decode_seconds tokens_per_second peak_memory_bytes""".split()


@pytest.mark.parametrize("tree", ["static", "chain:3", "dynamic:3,3,8"])
def test_the_json_report_is_complete_and_consistent(shell, right_head, tree):
    prompts = "the quick", "a lazy dog jumps", "fox"
    run = shell("--tree", tree, prompts=prompts)
    assert run.status == 0, run.err
    report = run.report
    assert set(report) >= set(FIELDS)
    assert report["eagle"] == str(shell.head) and report["tree"] == tree and report["compiled"] is False
    model = load(shell.checkpoint)
    encoded = [right_head.encode(text) for text in prompts]
    assert report["prompt_tokens"] == [len(ids) for ids in encoded]
    assert report["tokens"] == [naive_decode(model, ids, 20) for ids in encoded]
    assert report["new_tokens"] == [len(ids) for ids in report["tokens"]] == [20] * 3
    assert report["text"] == [right_head.decode(ids) for ids in report["tokens"]]
    assert report["finish_reason"] == ["length"] * 3
    lengths = report["accept_lengths"]
    assert max(map(len, lengths)) == report["target_passes"]
    for row, new in zip(lengths, report["new_tokens"]):  # the last step may have given more than the limit took
        assert 1 + sum(row[:-1]) < new <= 1 + sum(row)   # the first token came from the prefill
    assert report["copy"] == 8 and [*map(len, report["copied"])] == [*map(len, lengths)]
    assert all(n in (0, length - 1) for row, of in zip(report["copied"], lengths) for n, length in zip(row, of))
    total, passes = sum(map(sum, lengths)), sum(map(len, lengths))
    assert report["mean_accept_length"] == pytest.approx(total / passes) and len(lengths[0]) < 20
    assert report["tokens_per_second"] == pytest.approx(sum(report["new_tokens"]) / report["decode_seconds"])
    assert "tokens per target pass" in run.err


def test_color_marks_the_accepted_drafts_and_nothing_else(shell, right_head):
    plain, colored = shell("--tree", "chain:3", "--no-color"), shell("--tree", "chain:3", "--color")
    assert "\033" not in plain.out and "\033[32m" in colored.out
    stream, ids = right_head.stream(), iter(colored.report["tokens"][0])
    expected = stream.push([next(ids)])
    for length, copied in zip(colored.report["accept_lengths"][0], colored.report["copied"][0]):
        drafts = stream.push([i for _, i in zip(range(length - 1), ids)])
        expected += f"\033[{36 if copied else 32}m{drafts}\033[0m" if drafts else ""
        expected += stream.push([i for _, i in zip(range(1), ids)])
    assert colored.out == expected + stream.flush() + "\n"
    assert re.sub("\033\\[(32|36|0)m", "", colored.out) == plain.out


def test_copied_drafts_have_a_colour_of_their_own(right_head, capsys):
    source = types.SimpleNamespace(n_copied=[0])
    printer = Printer(StopTexts(right_head), [[]], source)
    ids = right_head.encode("the quick fox")
    for source.n_copied[0] in (0, 2):
        printer(0, ids[:3], 2)
    colored = capsys.readouterr().out
    assert re.findall("\033\\[3.m", colored) == ["\033[32m", "\033[36m"] and colored.count("\033[0m") == 2


def test_color_needs_a_head(shell, checkpoint, capsys):
    capsys.readouterr()
    assert cli.main(cli.parse_args(["--checkpoint", str(checkpoint), "--prompt", "fox", "--raw", "--dtype", "float32",
                                    "--max-new-tokens", "4", "--color", "--device", "cpu"])) == 0
    assert "\033" not in capsys.readouterr().out


def test_a_cpu_without_bf16_instructions_is_told_of_fp32_once(shell, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    for dtype, n_line in (("bfloat16", 1), ("float32", 0), ("float16", 0)):
        run = shell("--tree", "chain", "--dtype", dtype, max_new_tokens=2)
        assert run.status == 0 and run.err.count("--dtype float32") == n_line
    run = shell("--tree", "nowhere.json", "--dtype", "bfloat16")    # a mistake stays one line
    assert run.status == 2 and len(run.err.splitlines()) == 1


def test_the_tree_and_the_draft_vocabulary_beside_the_head_are_taken_up(shell, monkeypatch):
    (shell.head / "tree.json").write_text('{"paths": [[0], [1], [0, 0]], "copy": 3}')
    (shell.head / "draft_vocab.json").write_text(json.dumps({"ids": list(range(300, 200, -1))}))
    (shell.folder / "mine.json").write_text(json.dumps({"ids": [5, 9, 2, 4]}))
    seen = []
    original = EagleStep.__init__

    def spy(self, model, head, tree, *rest):
        original(self, model, head, tree, *rest)
        seen.append((tree, None if head.draft_ids is None else head.draft_ids.tolist()))

    monkeypatch.setattr(EagleStep, "__init__", spy)
    own = replace(StaticTree.from_paths([[0], [1], [0, 0]]), n_copy=3)
    for options, tree, ids in (
            ([], own, list(range(300, 200, -1))),
            (["--draft-vocab", "off"], own, None),
            (["--draft-vocab", "10"], own, list(range(300, 290, -1))),
            (["--draft-vocab", str(shell.folder / "mine.json")], own, [5, 9, 2, 4]),
            (["--copy", "off"], replace(own, n_copy=0), list(range(300, 200, -1))),
            (["--tree", "chain:2"], replace(StaticTree.chain(2), n_copy=cli.N_COPY), list(range(300, 200, -1)))):
        run = shell(*options, max_new_tokens=3)
        assert run.status == 0, run.err
        assert seen.pop() == (tree, ids), options
    (shell.head / "tree-int4.json").write_text("[[0]]")
    with monkeypatch.context() as patch:
        patch.setattr(cli, "quantize_settings", lambda checkpoint: {"mode": "int4"})
        assert shell(max_new_tokens=3).status == 0 and seen.pop()[0] == StaticTree.chain(1)
        patch.setattr(cli, "quantize_settings", lambda checkpoint: {"mode": "int8"})
        assert shell(max_new_tokens=3).status == 0 and seen.pop()[0] == own
    (shell.head / "tree.json").unlink()
    (shell.head / "draft_vocab.json").unlink()
    assert shell(max_new_tokens=3).status == 0 and seen.pop() == (replace(StaticTree.paper(), n_copy=cli.N_COPY), None)


@pytest.mark.parametrize("dtype, option, width, mode", [
    ("bfloat16", None, 64, "int4"), ("bfloat16", "off", 64, "off"), ("bfloat16", "int8", 40, "int8"),
    ("bfloat16", None, 40, "off"),      # groups of 32 do not divide it
    ("float32", None, 64, "off"), ("float32", "int4", 64, "int4"), ("float32", "int8", 40, "int8")])
def test_the_head_is_rounded_on_loading_and_the_text_stays_the_targets(checkpoint, tmp_path, dtype, option, width,
                                                                       mode):
    folder, _ = tiny("gqa", tmp_path, vocab_size=320, hidden_size=width, num_attention_heads=4)
    shutil.copy(checkpoint / "tokenizer.json", folder)
    target = load(folder)
    config = head_config(target, intermediate_size=width)
    write_head(folder / "head", config, head_weights(config, target.tok_embeddings.weight))
    args = cli.parse_args(["--checkpoint", str(folder), "--eagle", str(folder / "head"), "--device", "cpu",
                           "--dtype", dtype, *(["--draft-mode", option] if option else [])])
    model, head, _, report = cli.load(args)
    assert report["draft_mode"] == mode
    layer = head.layer
    linears = [head.fc, layer.attention.wqkv, layer.attention.wo, layer.feed_forward.w13, layer.feed_forward.w2]
    assert [getattr(linear, "format", ("off",))[0] for linear in linears] == [mode] * 5
    if dtype == "float32":
        assert generate(model, [[5, 9, 2]], 24, head=head).tokens == [naive_decode(target, [5, 9, 2], 24)]


def test_a_head_that_is_stored_quantised_keeps_its_format(shell):
    out = shell.folder / "int8"
    args = ["--checkpoint", str(shell.head), "--out", str(out), "--mode", "int8", "--device", "cpu"]
    assert quantize.main(quantize.parse_args(args)) == 0
    run = shell("--eagle", str(out), "--dtype", "bfloat16")
    assert run.status == 0 and run.report["draft_mode"] == "off", run.err
    run = shell("--eagle", str(out), "--draft-mode", "int4")
    assert run.status == 2 and "quantised already" in run.err
    run = shell("--draft-mode", "int4")
    assert run.status == 2 and "does not divide a row of 40" in run.err


def test_a_head_ships_for_the_model_that_a_quantised_one_was_made_of(tmp_path):
    for name, settings, found in (("SmolLM2-135M-Instruct", None, True), ("mine", None, False),
                                  ("mine-int4", {"mode": "int4", "source": "some/SmolLM2-135M-Instruct"}, True)):
        (tmp_path / name).mkdir()
        if settings is not None:
            write_json(tmp_path / name / "quantize.json", settings)
        with contextlib.nullcontext() if found else pytest.raises(FileNotFoundError, match="no head ships"):
            assert Path(cli.shipped_head(str(tmp_path / name))).name == "SmolLM2-135M-Instruct"


def write_json(file, content):
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def drop_key(folder, key):
    with edited_json(folder / "config.json") as config:
        del config[key]


@pytest.mark.parametrize("damage, options, names", [
    (None, ["--eagle", "no/such/head/folder"], ["no/such/head/folder"]),
    (lambda head: shutil.rmtree(head), [], ["head"]),
    (lambda head: (head / "model.safetensors").unlink(), [], ["model.safetensors"]),
    (lambda head: (head / "model.safetensors").write_bytes(b"xyz"), [], ["model.safetensors"]),
    (lambda head: (head / "config.json").write_text("{"), [], ["config.json"]),
    (lambda head: drop_key(head, "hidden_size"), [], ["hidden_size"]),
    (lambda head: drop_key(head, "intermediate_size"), [], ["intermediate_size"]),
    (lambda head: write_json(head / "tree.json", "[[0], "), [], ["tree.json"]),
    (lambda head: write_json(head / "tree.json", "[[0, 1]]"), [], ["tree.json"]),
    (None, ["--tree", "chain:0"], ["chain:0"]),
    (None, ["--tree", "dynamic:2,2,9"], ["9"]),
    (None, ["--tree", "dynamic:1,400,20"], ["400", "320"]),
    (None, ["--draft-vocab", "8"], ["draft_vocab.json"]),
    (None, ["--draft-vocab", "none.json"], ["none.json"]),
    (lambda head: write_json(head / "draft_vocab.json", {"ids": [1, 1]}), [], ["320"]),
    (lambda head: write_json(head / "draft_vocab.json", {"ids": [1, 320]}), [], ["320"]),
    (lambda head: write_json(head / "draft_vocab.json", {"ids": []}), [], ["draft vocabulary"]),
    (lambda head: write_json(head / "draft_vocab.json", {"ids": [[1], [2]]}), [], ["draft vocabulary"]),
    (lambda head: write_json(head / "draft_vocab.json", {"tokens": [1]}), [], ["draft_vocab.json"]),
    (lambda head: write_json(head / "draft_vocab.json", "1, 2"), [], ["draft_vocab.json"]),
    # The paper's tree is wider than this vocabulary.
    (lambda head: write_json(head / "draft_vocab.json", {"ids": [4, 5, 6]}), [], ["4", "3"]),
    (lambda head: write_json(head / "draft_vocab.json", {"ids": [4, 5, 6]}), ["--draft-vocab", "0"],
     ["draft vocabulary"]),
    (None, ["--draw-drafts"], ["temperature"]),
    (None, ["--draw-drafts", "--temperature", "1", "--tree", "dynamic"], ["static"]),
])
def test_what_the_user_can_mend_is_one_line_and_exit_status_2(shell, damage, options, names):
    if damage is not None:
        damage(shell.head)
    run = shell(*options)
    assert run.status == 2 and run.report is None and run.out == ""
    errors = [line for line in run.err.splitlines() if not line.startswith("loaded ")]
    assert len(errors) == 1 and errors[0].startswith("error: "), run.err
    assert all(name in errors[0] for name in names), errors[0]


def test_an_eagle3_head_is_refused_by_name_on_the_command_line(shell):
    with edited_json(shell.head / "config.json") as config:
        config["architectures"] = ["LlamaForCausalLMEagle3"]
    run = shell()
    assert run.status == 2 and run.err.startswith("error: ") and "EAGLE-3" in run.err and run.err.count("\n") == 1
