"""EAGLE-3 against the method written out row by row, and heads in every dialect that they are published in.

    python -m pytest tests/test_eagle3.py -q

Shapes: t target width, h head width, n captured hidden states, V vocabulary, Vd draft vocabulary.
"""
import functools
import math
import types
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import generate as cli
from decoder import Decoder, generate, setup_caches
from draft_tree import DynamicTree, StaticTree
from eagle_head import Eagle3Head, EagleHead
from eagle_step import EagleStep
from head_config import Eagle3Spec
from model import Transformer, attention_bias, causal_mask, rope_cos_sin
from reference import assert_close, tiny, tokens_of, write_checkpoint
from sampling import Sampling
from test_eagle import node_paths, write_head
from test_eagle_lossless import PROMPT, V as FEW_TOKENS, chi_square_p, exact, first_three, randomise

L, V, VD, T = 8, 40, 24, 32         # of the target and its heads here
DEFAULT = (2, 4, 5)                 # 2, L // 2, L - 3, as transformers counts hidden states
TREES = {"chain": StaticTree.chain(4), "static": StaticTree.paper(), "dynamic": DynamicTree(4, 5, 20)}
all_trees = pytest.mark.parametrize("tree", TREES.values(), ids=list(TREES))


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ---------------------------------------------------------------------------------------------------------------------
# The method, written out in fp64 for one sequence: no cache of ours, no function of ours

class Node(NamedTuple):
    """One row of the head, and all that a row behind it needs."""
    feedback: torch.Tensor      # [h] what stands for the hidden state of the next row
    logits: torch.Tensor        # [Vd]
    rows: list                  # of each layer: keys and values [rows, K, D] of this row and those it has seen
    pos: int


class WrittenOut:
    """A head as arXiv 2503.01840 has it, and its published variants. Weights go by the authors' keys.

    states  the captured hidden states, as transformers counts them
    ids     the target's ids of the draft vocabulary
    window  a row sees so many rows of verified positions
    """

    def __init__(self, config, weights, embedding, *, states=DEFAULT, theta=1e4, ids=None, fc_norm=False,
                 norm_before_fc=False, norm_before_residual=False, norm_output=False, window=None):
        self.w = {key: tensor.double() for key, tensor in weights.items()}
        self.embedding = embedding.double()
        self.states, self.theta, self.window = states, theta, window
        self.ids = list(range(len(weights["lm_head.weight"]))) if ids is None else ids
        self.fc_norm, self.norm_before_fc = fc_norm, norm_before_fc
        self.norm_before_residual, self.norm_output = norm_before_residual, norm_output
        self.n_head, self.eps = config["num_attention_heads"], config["rms_norm_eps"]
        self.n_kv = config["num_key_value_heads"]
        self.layers = ["midlayer."] + sorted({key[:9] for key in weights if key.startswith("layers.")})

    def norm(self, x, key):
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * self.w[key]

    def rotate(self, vectors, pos):
        """Plane j of a vector of size D is (j, j + D/2), its angle pos * theta^(-2j/D)."""
        size = vectors.shape[-1]
        turned = torch.empty_like(vectors)
        for j in range(size // 2):
            angle = pos * self.theta ** (-2 * j / size)
            a, b = vectors[:, j], vectors[:, j + size // 2]
            turned[:, j] = a * math.cos(angle) - b * math.sin(angle)
            turned[:, j + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return turned

    def fuse(self, hiddens):
        """n hidden states [t] of one position -> [h]"""
        if self.fc_norm:
            hiddens = [self.norm(x, f"fc_norm.{i}.weight") for i, x in enumerate(hiddens)]
        x = torch.cat(hiddens)
        return self.w["fc.weight"] @ (self.norm(x, "input_norm.weight") if self.norm_before_fc else x)

    def attend(self, x, layer, pos, seen):
        """x [2h or h] -> [h], and the keys and values with this row's own."""
        project = lambda name: (self.w[f"{layer}self_attn.{name}_proj.weight"] @ x)
        q, k, v = project("q").view(self.n_head, -1), project("k").view(self.n_kv, -1), project("v")
        if f"{layer}self_attn.q_norm.weight" in self.w:
            q, k = (self.norm(y, f"{layer}self_attn.{name}_norm.weight") for y, name in ((q, "q"), (k, "k")))
        q, k, v = self.rotate(q, pos), self.rotate(k, pos)[None], v.view(1, self.n_kv, -1)
        keys, values = (k, v) if seen is None else (torch.cat((seen[0], k)), torch.cat((seen[1], v)))
        attended = []
        for i in range(self.n_head):
            j = i // (self.n_head // self.n_kv)
            scores = keys[:, j] @ q[i] / math.sqrt(q.shape[1])
            attended.append(scores.softmax(0) @ values[:, j])
        return self.w[f"{layer}self_attn.o_proj.weight"] @ torch.cat(attended), (keys, values)

    def row(self, token, g, pos, seen):
        normed = self.norm(g, "midlayer.hidden_norm.weight")
        x = torch.cat((self.norm(self.embedding[token], "midlayer.input_layernorm.weight"), normed))
        residual, rows = normed if self.norm_before_residual else g, []
        for i, layer in enumerate(self.layers):
            if i:
                residual, x = out, self.norm(out, f"{layer}input_layernorm.weight")
            y, own = self.attend(x, layer, pos, seen[i])
            rows.append(own)
            a = residual + y
            x = self.norm(a, f"{layer}post_attention_layernorm.weight")
            gate, up = (self.w[f"{layer}mlp.{name}_proj.weight"] @ x for name in ("gate", "up"))
            out = a + self.w[f"{layer}mlp.down_proj.weight"] @ (gate / (1 + (-gate).exp()) * up)
        normed = self.norm(out, "norm.weight")
        return Node(normed if self.norm_output else out, self.w["lm_head.weight"] @ normed, rows, pos)

    def first_pass(self, sequence, hiddens):
        """The rows of the pairs (hidden states of i, token i + 1). hiddens [positions, all states, t]."""
        nodes, seen = [], [None] * len(self.layers)
        for i, token in enumerate(sequence[1:]):
            g = self.fuse([hiddens[i, j].double() for j in self.states])
            nodes.append(self.row(token, g, i, seen))
            n_seen = len(sequence) if self.window is None else self.window - 1
            seen = [tuple(x[max(0, len(x) - n_seen):] for x in rows) for rows in nodes[-1].rows]
        return nodes

    def start(self, sequence, hiddens):
        """The last row. What is drafted behind it sees `window` rows of verified positions, and drafts."""
        return self.first_pass(sequence, hiddens)[-1]

    def behind(self, node, token):
        return self.row(token, node.feedback, node.pos + 1, node.rows)

    def drafts(self, node, k):
        """[(log q, target's id), ...], likeliest first."""
        log_q = node.logits.log_softmax(-1)
        return [(log_q[i].item(), self.ids[i]) for i in log_q.topk(k).indices.tolist()]

    def static_tree(self, root, tree):
        nodes, paths = [root], [()]
        for parent, rank in zip(tree.parents[1:], tree.ranks[1:]):
            if nodes[parent] is None:
                nodes[parent] = self.behind(nodes[tree.parents[parent]], paths[parent][-1])
            paths.append((*paths[parent], self.drafts(nodes[parent], rank + 1)[rank][1]))
            nodes.append(None)
        return paths[1:]

    def dynamic_tree(self, root, tree):
        """EAGLE-2's growth: expand the K best of a level, keep the best of all."""
        level, candidates = [(0.0, (), root)], []
        for depth in range(tree.depth):
            children = [(score + log_q, (*path, token), node) for score, path, node in level
                        for log_q, token in self.drafts(node, tree.n_child)]
            candidates += [child[:2] for child in children]
            best = sorted(children, key=lambda child: child[0], reverse=True)[:tree.n_child]
            if depth < tree.depth - 1:
                level = [(score, path, self.behind(node, path[-1])) for score, path, node in best]
        return [path for _, path in sorted(candidates, reverse=True)[:tree.n_node - 1]]

    def tree(self, root, tree):
        return (self.static_tree if isinstance(tree, StaticTree) else self.dynamic_tree)(root, tree)

    def decode(self, target, prompt, n, tree):
        """n tokens or a few more, and the number that each step produced."""
        sequence, lengths = list(prompt), []
        whole = prompt + target.greedy(prompt, n + tree.depth)
        hiddens = target.hiddens(whole)
        while len(sequence) < len(prompt) + n:
            paths = set(self.tree(self.start(sequence, hiddens), tree))
            accepted = ()
            while (*accepted, whole[len(sequence) + len(accepted)]) in paths:
                accepted = (*accepted, whole[len(sequence) + len(accepted)])
            lengths.append(len(accepted) + 1)
            sequence = whole[:len(sequence) + lengths[-1]]
        return sequence[len(prompt):], lengths


class WrittenTarget:
    """transformers, the whole sequence at once."""

    def __init__(self, hf):
        self.hf, self.embedding = hf, hf.model.embed_tokens.weight
        self.known = {}

    def hiddens(self, sequence):
        """[positions, L + 1, t]"""
        states = self.hf(torch.tensor([sequence]), output_hidden_states=True, use_cache=False).hidden_states
        return torch.stack([x[0] for x in states], dim=1)

    def greedy(self, prompt, n):
        tokens = self.known.setdefault(tuple(prompt), [])
        while len(tokens) < n:
            logits = self.hf(torch.tensor([prompt + tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
        return tokens[:n]


# ---------------------------------------------------------------------------------------------------------------------
# Heads on file

def head_config(**changes):
    """A config.json as the authors', which names no RoPE base. `changes` with None take a key away."""
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", hidden_size=T,
                  intermediate_size=40, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
                  vocab_size=V, draft_vocab_size=VD, max_position_embeddings=256, rms_norm_eps=1e-2, pad_token_id=0,
                  bos_token_id=1, eos_token_id=2, initializer_range=0.02, torch_dtype="float16", use_cache=True,
                  tie_word_embeddings=False, transformers_version="4.47.1") | changes
    return {key: value for key, value in config.items() if value is not None}


def head_weights(config, *, n=3, n_layer=1, n_draft=VD, more=(), head_dim=None, scale=0.25):
    """Random weights under the authors' keys; `more` names norms beside the paper's."""
    h, width = config["hidden_size"], head_dim or config["hidden_size"] // config["num_attention_heads"]
    q, kv, f = config["num_attention_heads"] * width, config["num_key_value_heads"] * width, config["intermediate_size"]
    shapes = {"fc.weight": (h, n * T), "norm.weight": (h,), "lm_head.weight": (n_draft, h),
              "midlayer.hidden_norm.weight": (h,)}
    for layer in ("midlayer.", *(f"layers.{i}." for i in range(1, n_layer))):
        x = 2 * h if layer == "midlayer." else h
        shapes |= {f"{layer}input_layernorm.weight": (h,), f"{layer}post_attention_layernorm.weight": (h,),
                   f"{layer}self_attn.q_proj.weight": (q, x), f"{layer}self_attn.k_proj.weight": (kv, x),
                   f"{layer}self_attn.v_proj.weight": (kv, x), f"{layer}self_attn.o_proj.weight": (h, q),
                   f"{layer}mlp.gate_proj.weight": (f, h), f"{layer}mlp.up_proj.weight": (f, h),
                   f"{layer}mlp.down_proj.weight": (h, f)}
        if "qk_norm" in more:
            shapes |= {f"{layer}self_attn.{name}_norm.weight": (width,) for name in "qk"}
    if "fc_norm" in more:
        shapes |= {f"fc_norm.{i}.weight": (T,) for i in range(n)}
    if "norm_before_fc" in more:
        shapes["input_norm.weight"] = (n * T,)
    return {key: 1 + 0.3 * torch.randn(shape) if "norm" in key else scale * torch.randn(shape)
            for key, shape in shapes.items()}


IDS = sorted(torch.randperm(V, generator=torch.Generator().manual_seed(9))[:VD].tolist())


def tables(ids):
    """d2t and t2d as files have them: offsets, and which tokens are in the draft vocabulary."""
    t2d = torch.zeros(V, dtype=torch.bool)
    t2d[ids] = True
    return {"d2t": torch.tensor(ids) - torch.arange(len(ids)), "t2d": t2d}


def renamed(weights, *names):
    for ours, theirs in names:
        weights = {theirs + key.removeprefix(ours) if key.startswith(ours) else key: x for key, x in weights.items()}
    return weights


def save(folder, config, weights):
    """write_head casts to one dtype; tables keep theirs."""
    from safetensors.torch import save_file
    write_head(folder, config, {})
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """Our target and transformers', of L layers. Its RoPE base is not the head's."""
    folder, hf = tiny("gqa", tmp_path_factory.mktemp("target"), num_hidden_layers=L, vocab_size=V, hidden_size=T,
                      num_attention_heads=4, num_key_value_heads=2, rope_theta=300.0)
    return types.SimpleNamespace(folder=folder, hf=WrittenTarget(hf), model=Transformer.from_pretrained(
        folder, dtype=torch.float32))


PROMPTS = [tokens_of(n, seed=n, vocab=V) for n in (9, 5, 13)]
N_NEW = 26


@pytest.fixture(scope="module")
def fitted(target, tmp_path_factory):
    """Folder, config and weights of a head in the authors' dialect that is right often, but not always.

    Its LM head is fitted by least squares to what the target says after rows of the head, drafted ones too.
    """
    torch.manual_seed(2)
    config = head_config()
    weights = head_weights(config, n_draft=V, scale=0.1)
    with torch.no_grad():
        written, rows, following = WrittenOut(config, weights, target.hf.embedding), [], []
        for prompt in [*PROMPTS, tokens_of(8, seed=3, vocab=V)]:
            whole = prompt + target.hf.greedy(prompt, N_NEW + 6)
            nodes = written.first_pass(whole[:-4], target.hf.hiddens(whole))
            for i, node in enumerate(nodes):
                for depth in range(3):
                    rows.append(written.norm(node.feedback, "norm.weight"))
                    following.append(whole[i + 2 + depth])
                    node = written.behind(node, whole[i + 2 + depth])
        x, wanted = torch.stack(rows), torch.nn.functional.one_hot(torch.tensor(following), V).double()
        fit = torch.linalg.solve(x.T @ x + 0.3 * torch.eye(T), x.T @ wanted).T
        weights["lm_head.weight"] = (8 * fit[IDS]).float()
    weights |= tables(IDS)
    folder = save(tmp_path_factory.mktemp("fitted"), config, weights)
    return types.SimpleNamespace(folder=folder, config=config, weights=weights)


def written_out(target, fitted, **options):
    return WrittenOut(fitted.config, fitted.weights, target.hf.embedding, **{"ids": IDS} | options)


@pytest.fixture
def head(target, fitted):
    return EagleHead.from_pretrained(fitted.folder, target.model)


# ---------------------------------------------------------------------------------------------------------------------
# Against the method written out

def compare(model, head, written, hf, sequence, tolerance=1e-4):
    """Captured states, fc, first pass, chains of four with the ten likeliest at each level, and the first tree."""
    head.setup_caches(1, 96)
    model.kv_cache, head.kv_cache = None, None
    tokens, pos = torch.tensor([sequence]), torch.arange(len(sequence))
    hiddens = hf.hiddens(sequence)
    logits, captured = model(tokens, pos, capture=head.capture)
    assert_close(captured[0], torch.cat([hiddens[:, j] for j in written.states], dim=1), tolerance)
    fused = torch.stack([written.fuse([x[j].double() for j in written.states]) for x in hiddens])
    assert_close(head.fuse(captured)[0], fused.float(), tolerance)
    nodes = written.first_pass(sequence, hiddens)
    ours = head(tokens[:, 1:], captured[:, :-1], pos[:-1])
    assert_close(ours[0], torch.stack([node.feedback for node in nodes]).float(), tolerance)
    assert_close(head.draft_logits(ours)[0], torch.stack([node.logits for node in nodes]).float(), tolerance)

    seen, draft_logits = [], head.draft_logits
    head.draft_logits = lambda hidden: seen.append(draft_logits(hidden)) or seen[-1]
    chain, tree = StaticTree.chain(4), DynamicTree(4, 10, 30)
    drafts = [drafted(model, head, sequence, shape) for shape in (chain, tree)]
    del head.draft_logits
    node, k = nodes[-1], min(10, len(written.ids))
    for level, token in zip(seen, drafts[0].tokens[0, 1:].tolist()):
        assert_close(level[0, 0], node.logits.float(), tolerance)
        ids = head.to_target_ids(level[0, 0].topk(k).indices).tolist()
        assert ids == [i for _, i in written.drafts(node, k)] and token == ids[0]
        node = written.behind(node, token)
    paths = written.dynamic_tree(nodes[-1], tree)
    assert len(set(paths)) == tree.n_node - 1 and set(node_paths(drafts[1], 0)[1:]) == set(paths)
    return captured, ours


def drafted(model, head, sequence, tree):
    setup_caches(model, head, 1, 96)
    step = EagleStep(model, head, tree, 1)
    step.prefill([sequence])
    return step.grow(step.ingest(96), 96)


@pytest.mark.parametrize("length", [2, 14, 23])
def test_hidden_states_fc_first_pass_chains_and_the_first_tree_are_those_of_the_method(target, fitted, head, length):
    sequence = tokens_of(length, seed=length, vocab=V)
    assert head.kind == "eagle3" and head.capture == DEFAULT
    compare(target.model, head, written_out(target, fitted), target.hf, sequence)


@all_trees
@pytest.mark.parametrize("few", [False, True], ids=["all drafts", "draft vocabulary"])
def test_18_greedy_generations_have_the_tokens_and_accepted_lengths_of_the_method(target, fitted, head, tree, few):
    """Three prompts, alone and in a batch. Lengths vary, so a wrong hidden state anywhere would show."""
    rows = list(range(3, 19)) if few else range(VD)
    written = written_out(target, fitted, ids=[IDS[i] for i in rows])
    written.w["lm_head.weight"] = written.w["lm_head.weight"][list(rows)]
    head.set_draft_vocab(written.ids if few else None)
    expected = [written.decode(target.hf, prompt, N_NEW, tree) for prompt in PROMPTS]
    together = generate(target.model, PROMPTS, N_NEW, head=head, tree=tree)
    for row, (prompt, (tokens, lengths)) in enumerate(zip(PROMPTS, expected)):
        alone = generate(target.model, [prompt], N_NEW, head=head, tree=tree)
        assert alone.tokens[0] == together.tokens[row] == tokens[:N_NEW] == target.hf.greedy(prompt, N_NEW)
        assert alone.accept_lengths[0] == together.accept_lengths[row] == lengths
    all_lengths = {n for _, lengths in expected for n in lengths}
    assert len(all_lengths) >= 3 and 1 in all_lengths, all_lengths
