"""EAGLE-3 against the method written out row by row, and heads in every dialect that they are published in.

    python -m pytest tests/test_eagle3.py -q

Shapes: t target width, h head width, n captured hidden states, V vocabulary, Vd draft vocabulary.
"""
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
from reference import assert_close, tiny, to_bin, tokens_of, write_checkpoint
from sampling import Sampling
from test_eagle import node_paths, write_head
from test_eagle_lossless import V as FEW_TOKENS
from test_eagle_lossless import chi_square_p, exact, first_three, randomise

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
        residual, rows, out = normed if self.norm_before_residual else g, [], g
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

    def root(self, target, prompt):
        """What a prompt's first tree grows from: the row of the target's own token after it."""
        whole = prompt + target.greedy(prompt, 1)
        return self.start(whole, target.hiddens(whole))

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
        """n tokens or a few more, and the number that each step produced. The first token comes before all steps."""
        whole, lengths = prompt + target.greedy(prompt, n + tree.depth), []
        sequence, hiddens = whole[:len(prompt) + 1], target.hiddens(whole)
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
    """Captured states, fc, first pass, chains of four with the ten likeliest at each level, and the first tree.

    The tree grows from the target's own token after the sequence.
    """
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
    root, k = written.root(hf, sequence), min(10, len(written.ids))
    node = root
    for level, token in zip(seen, drafts[0].tokens[0, 1:].tolist()):
        assert_close(level[0, 0], node.logits.float(), tolerance)
        ids = head.to_target_ids(level[0, 0].topk(k).indices).tolist()
        assert ids == [i for _, i in written.drafts(node, k)] and token == ids[0]
        node = written.behind(node, token)
    paths = written.dynamic_tree(root, tree)
    assert len(set(paths)) == tree.n_node - 1 and set(node_paths(drafts[1], 0)[1:]) == set(paths)
    return captured, ours


def drafted(model, head, sequence, tree):
    setup_caches(model, head, 1, 96)
    step = EagleStep(model, head, tree, 1)
    step.prefill([sequence])
    return step.grow(96)


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


# ---------------------------------------------------------------------------------------------------------------------
# Dialects

def specforge(**changes):
    """SpecForge's config.json, which SGLang reads. Its layer ids count outputs."""
    return head_config(architectures=["LlamaForCausalLMEagle3"], attention_bias=False, attention_dropout=0.0,
                       max_window_layers=48, rope_scaling=None, sliding_window=None, use_sliding_window=False,
                       torch_dtype="bfloat16", rope_theta=500.0, eagle_config=dict(
                           eagle_aux_hidden_state_layer_ids=[1, 3, 4], use_aux_hidden_state=True), **changes)


def modelopt(**changes):
    """What NVIDIA's Model Optimizer exports."""
    config = specforge(mlp_bias=False, pretraining_tp=1, **changes)
    config["eagle_config"] |= dict(use_input_layernorm_in_first_layer=True, use_last_layernorm=True,
                                   use_mtp_layernorm=False, next_layer_regular=True, parallel_draft_step=1,
                                   parallel_draft_heads_num_layers=1, has_lm_head=True)
    return config


def speculators(layer_keys=(), **changes):
    """speculators' config.json, which vLLM reads: the layer's keys stand inside, and ids count inputs."""
    outer = {"architectures", "draft_vocab_size", "torch_dtype", "transformers_version"}
    config = head_config(architectures=["Eagle3DraftModel"], rope_theta=500.0)
    inner = {key: value for key, value in config.items() if key not in outer}
    inner |= dict(attention_bias=False, attention_dropout=0.0, mlp_bias=False, pretraining_tp=1, rope_scaling=None,
                  **dict(layer_keys))
    return {key: config[key] for key in outer} | dict(
        auto_map={"": "eagle3.Eagle3SpeculatorConfig"}, has_no_defaults_at_init=False, tie_word_embeddings=False,
        base_model_ep_plan=None, embed_requires_grad=False, enable_sp_ulysses=False, target_hidden_size=None,
        norm_before_residual=False, norm_before_fc=False, fc_norm=False, norm_output=False,
        eagle_aux_hidden_state_layer_ids=[2, 4, 5], speculators_model_type="eagle3", speculators_version="0.4.0.1",
        speculators_config={"algorithm": "eagle3", "default_proposal_method": "greedy", "proposal_methods": [
            {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 3, "verifier_accept_k": 1}],
            "verifier": {"name_or_path": "owner/target", "architectures": ["LlamaForCausalLM"]}},
        transformer_layer_config=inner) | changes


def flat(config):
    """The keys that the method written out reads, wherever a dialect has them."""
    return config | config.get("transformer_layer_config", {}) | config.get("model", {})


LAYERS0, PREFIX = ("midlayer.", "layers.0."), ("", "model.")
# As transformers writes out the whole of a config, not its differences from the defaults.
WHOLE = dict(_attn_implementation_autoset=True, return_dict=True, output_hidden_states=False, is_decoder=False,
             torchscript=False, id2label={"0": "LABEL_0"}, cross_attention_hidden_size=None, top_k=50)
T3 = dict(theta=500.0)
# name -> config.json, options of head_weights, renamings of keys, and options of WrittenOut: what the file means
DIALECTS = {
    "authors": (head_config(), {}, [], {}),
    "authors, theta at the top": (head_config(rope_theta=500.0), {}, [], T3),
    "theta in rope_parameters": (head_config(rope_parameters=dict(rope_type="default", rope_theta=500.0)), {}, [], T3),
    "theta in rope_scaling": (head_config(rope_scaling=dict(rope_type="default", rope_theta=500.0)), {}, [], T3),
    "theta null": (dict(head_config(), rope_theta=None), {}, [], {}),
    "theta in rope_parameters beside rope_scaling": (head_config(
        rope_parameters=dict(rope_type="default", rope_theta=500.0), rope_scaling=dict(rope_type="default")),
        {}, [], T3),
    "ids null": (dict(head_config(), eagle_aux_hidden_state_layer_ids=None), {}, [], {}),
    "other ids": (head_config(eagle_aux_hidden_state_layer_ids=[2, 3, 8]), {}, [], dict(states=(2, 3, 8))),
    "specforge": (specforge(), {}, [], T3),
    "specforge, fc_norm": (specforge(fc_norm=True), dict(more=["fc_norm"]), [], dict(fc_norm=True, **T3)),
    "specforge, norm_output": (specforge(norm_output=True), {}, [], T3),
    "specforge, no eagle_config": (specforge() | dict(eagle_config=None), {}, [], T3),
    "sglang, Qwen3": (specforge(model_type="qwen3", head_dim=12), dict(more=["qk_norm"], head_dim=12), [PREFIX], T3),
    "modelopt": (modelopt(num_aux_hidden_states=3), {}, [], T3),
    "AngelSlim": (head_config(architectures=["Eagle3LlamaForCausalLM"], tie_word_embeddings=True, use_mrope=False,
                              num_hidden_layers=28, rope_theta=500.0), dict(embed=True), [], T3),
    "speculators": (speculators(), {}, [LAYERS0], T3),
    "speculators, norm_before_residual": (speculators(norm_before_residual=True), {}, [LAYERS0],
                                          dict(norm_before_residual=True, **T3)),
    "speculators, norm_before_fc": (speculators(norm_before_fc=True), dict(more=["norm_before_fc"]), [LAYERS0],
                                    dict(norm_before_fc=True, **T3)),
    "speculators, fc_norm": (speculators(fc_norm=True), dict(more=["fc_norm"]), [LAYERS0], dict(fc_norm=True, **T3)),
    "speculators, norm_output": (speculators(norm_output=True), {}, [LAYERS0], dict(norm_output=True, **T3)),
    "speculators, all flags of 3.1": (
        speculators(norm_before_residual=True, fc_norm=True, norm_output=True), dict(more=["fc_norm"], embed=True),
        [LAYERS0], dict(norm_before_residual=True, fc_norm=True, norm_output=True, **T3)),
    "speculators, Qwen3, theta inside": (
        speculators(dict(model_type="qwen3", head_dim=6, rope_theta=None, rope_parameters=dict(
            rope_type="default", rope_theta=500.0))), dict(more=["qk_norm"], head_dim=6, embed=True), [LAYERS0], T3),
    "speculators, the whole config inside": (speculators(WHOLE), {}, [LAYERS0, PREFIX], T3),
    "vLLM": (head_config(architectures=["Eagle3LlamaForCausalLM"], target_hidden_size=T, num_aux_hidden_states=3,
                         eagle_aux_hidden_state_layer_ids=[2, 4, 5]), {}, [LAYERS0], {}),
    "vLLM, the draft vocabulary under its name": (dict(
        model_type="eagle", architectures=["Eagle3LlamaForCausalLM"], method="eagle3", truncated_vocab_size=VD,
        model=head_config()), {}, [], {}),
    "a truncated vocabulary that is announced": (head_config(truncated_vocab_size=VD), {}, [], {}),
    "vLLM, not truncated": (dict(model_type="eagle", method="eagle3", truncated_vocab_size=V, model=head_config()),
                            {}, [], {}),
    "narrow, its own embedding": (head_config(hidden_size=24, target_hidden_size=T), dict(embed="own"), [], {}),
    "wide heads, no head_dim": (head_config(), dict(head_dim=14), [], {}),
    "an embedding that was trained": (speculators(embed_requires_grad=True), dict(embed="own"), [LAYERS0], T3),
    "another embedding, not announced": (head_config(), dict(embed="own"), [], {}),
    "three layers": (speculators(dict(num_hidden_layers=3)), dict(n_layer=3), [LAYERS0], T3),
    "the final state alone": (specforge() | dict(eagle_config=dict(use_aux_hidden_state=False)), dict(n=1), [],
                              dict(states=(L,), **T3)),
    "five states": (head_config(eagle_aux_hidden_state_layer_ids=[2, 3, 4, 5, 7]), dict(n=5), [],
                    dict(states=(2, 3, 4, 5, 7))),
    "whole vocabulary": (head_config(draft_vocab_size=V), dict(n_draft=V), [], {}),
    "whole vocabulary, not announced": (head_config(architectures=["LlamaForCausalLMEagle3"], draft_vocab_size=None),
                                        dict(n_draft=V), [], {}),
    "whole vocabulary in another order": (head_config(draft_vocab_size=V), dict(n_draft=V, ids=list(range(V))[::-1]),
                                          [], {}),
    "no t2d": (head_config(), dict(t2d=False), [], {}),
}


@pytest.mark.parametrize("config, file, names, meaning", DIALECTS.values(), ids=list(DIALECTS))
def test_a_head_of_each_dialect_is_what_its_file_means(target, tmp_path, config, file, names, meaning):
    torch.manual_seed(1)
    file = dict(file)
    embed, has_t2d, n_draft = file.pop("embed", False), file.pop("t2d", True), file.get("n_draft", VD)
    ids = file.pop("ids", None if n_draft == V else IDS)
    weights = head_weights(flat(config), **file)
    stored = renamed(weights, *names)
    if ids is not None:
        stored |= tables(ids)
        stored = stored if has_t2d else {key: x for key, x in stored.items() if key != "t2d"}
    embedding = target.hf.embedding
    if embed:
        if embed == "own":
            embedding = 0.5 * torch.randn(V, flat(config)["hidden_size"])
        stored["embed_tokens.weight"] = embedding.clone()
    head = EagleHead.from_pretrained(save(tmp_path / "head", config, stored), target.model)
    assert isinstance(head, Eagle3Head) and head.kind == "eagle3"
    written = WrittenOut(flat(config), weights, embedding, ids=ids, **meaning)
    assert head.capture == written.states and head.spec.args.rope_theta == written.theta
    compare(target.model, head, written, target.hf, tokens_of(12, seed=2, vocab=V))
    # It says what it took.
    line = head.spec.describe()
    assert "\n" not in line and f"hidden states {', '.join(map(str, written.states))} (" in line
    source = "config.json" if "theta" in meaning else "the default: config.json has none"
    assert f"RoPE base {written.theta:g} ({source})" in line
    assert head.spec.capture_source.startswith("the default") == ("layer_ids': [" not in str(config))
    for flag in ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output"):
        assert (flag in line) == (meaning.get(flag, False) or bool(config.get(flag)))
    assert ("its own embedding" in line) == (embed == "own")
    tree = DynamicTree(3, 6, 20)
    result = generate(target.model, PROMPTS[:2], 12, head=head, tree=tree)
    assert result.tokens == [target.hf.greedy(prompt, 12) for prompt in PROMPTS[:2]]
    if meaning.keys() - {"theta", "norm_before_fc"} or len(written.layers) > 1:
        lengths = [written.decode(target.hf, prompt, 12, tree)[1] for prompt in PROMPTS[:2]]
        assert result.accept_lengths == lengths and max(map(max, lengths)) > 1


def test_a_head_in_fp16_as_pytorch_model_bin_like_the_authors_own(target, fitted, tmp_path):
    weights = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in fitted.weights.items()}
    weights["embed_tokens.weight"] = target.hf.embedding.half()     # rounded, and the target's all the same
    folder = save(tmp_path / "head", fitted.config, weights)
    to_bin(folder)
    head = EagleHead.from_pretrained(folder, target.model)
    assert not head.spec.own_embedding and head.fc.weight.dtype == torch.float32
    rounded = types.SimpleNamespace(config=fitted.config, weights={key: x.float() for key, x in weights.items()})
    compare(target.model, head, written_out(target, rounded), target.hf, PROMPTS[0])


# ---------------------------------------------------------------------------------------------------------------------
# What is refused: one line that names key, value and remedy

KEY = "eagle_aux_hidden_state_layer_ids"


def changed(config, weights, keys=(), **tensors):
    """The head with keys of config.json changed, and weights changed, added or (None) taken away."""
    weights = {key: tensor for key, tensor in (weights | tensors).items() if tensor is not None}
    return config | dict(keys), weights


BAD = {
    # layers
    "ids from neither 1 nor 2": (dict({KEY: [0, 3, 4]}), {}, rf"{KEY} \[0, 3, 4\] begins with .*--aux-layers J J J"),
    "ids of the last layers": (dict({KEY: [6, 7, 8]}), {}, rf"{KEY} \[6, 7, 8\] begins with .*--aux-layers J J J"),
    "ids inside eagle_config": (dict(eagle_config={KEY: [3, 4, 5]}), {}, rf"{KEY} \[3, 4, 5\] begins with"),
    "two lists of ids": (dict({KEY: [2, 4, 5], "eagle_config": {KEY: [1, 3, 4]}}), {}, rf"{KEY} is \[2, 4, 5\], and"),
    "ids no list": (dict({KEY: "1,3,4"}), {}, rf"{KEY} '1,3,4' is no list of layers\. .*--aux-layers J J J"),
    "ids empty": (dict({KEY: []}), {}, rf"{KEY} \[\] is no list of layers"),
    "ids no integers": (dict({KEY: [1, 3.5, 4]}), {}, rf"{KEY} \[1, 3.5, 4\] is no list of layers"),
    "two ids": (dict({KEY: [2, 4]}), {}, rf"takes 3 hidden states, and {KEY} names 2: \[2, 4\]\. .*--aux-layers J J"),
    "an id past the target": (dict({KEY: [1, 4, 8]}), {}, r"hidden states \[2, 5, 9\] .* within the target's 8 layers"),
    "ids under another name": (dict(target_layer_ids=[1, 3, 4]), {}, r"target_layer_ids \[1, 3, 4\] .*--aux-layers J"),
    "another count of states": (dict(num_aux_hidden_states=4), {}, "num_aux_hidden_states 4, .* takes 3 hidden states"),
    "the final state announced": (dict(eagle_config=dict(use_aux_hidden_state=False)), {}, "aux_hidden_state False"),
    "two states, not named": ({}, {"fc.weight": torch.ones(T, 2 * T)}, "takes 2 hidden states, .* --aux-layers J J$"),
    "fc of another width": ({}, {"fc.weight": torch.ones(T, 3 * T + 1)}, "fc.weight takes 97 columns, .* width 32"),
    # flags and norms
    "a flag": (dict(use_second_norm=True), {}, "use_second_norm True is not known"),
    "a true": (dict(quick=True), {}, "quick True is not known"),
    "a flag inside eagle_config": (dict(eagle_config=dict(return_hidden_post_norm=True)), {}, "return_hidden_post"),
    "a flag that is no bool": (dict(norm_output="yes"), {}, "norm_output 'yes' is neither true nor false"),
    "no norm of the embedding": (dict(eagle_config=dict(use_input_layernorm_in_first_layer=False)), {},
                                 "use_input_layernorm_in_first_layer False is not supported: it is True"),
    "a norm of MTP": (dict(eagle_config=dict(use_mtp_layernorm=True)), {}, "use_mtp_layernorm True is not supported"),
    "parallel drafts": (dict(parallel_draft_step=4), {}, "parallel_draft_step 4 is not supported: it is 1"),
    "P-EAGLE": (dict(parallel_drafting=True), {}, "parallel_drafting True is not known"),
    "a scaled embedding": (dict(embedding_multiplier=12.0), {}, "embedding_multiplier 12.0 is not known"),
    "scaled logits": (dict(logit_scale=0.0625), {}, "logit_scale 0.0625 is not supported"),
    "eagle_config a list": (dict(eagle_config=[1]), {}, r"eagle_config \[1\] is not an object"),
    "fc_norm without weights": (dict(fc_norm=True), {}, "weights are missing, first 'fc_norm.0.weight'"),
    "norm_before_fc without one": (dict(norm_before_fc=True), {}, "weights are missing, first 'input_norm.weight'"),
    "fc_norm false beside weights": (dict(fc_norm=False), {f"fc_norm.{i}.weight": torch.ones(T) for i in range(3)},
                                     "fc_norm is false, and the weights hold fc_norm.0.weight"),
    "an unknown norm": ({}, {"midlayer.mlp_norm.weight": torch.ones(T)}, "unexpected key 'layers.0.mlp_norm.weight'"),
    # layers of the head
    "a kind of layers": (dict(model_type="gemma3_text"), {}, "model_type 'gemma3_text' is not supported"),
    "an activation": (dict(hidden_act="gelu"), {}, "hidden_act 'gelu' is not supported"),
    "a window": (dict(use_sliding_window=True, sliding_window=512), {}, "sliding_window 512 .* --draft-window N"),
    "a window by layer_types": (dict(layer_types=["sliding_attention"], sliding_window=128), {}, "sliding_window 128"),
    "layer_types no list": (dict(layer_types={"0": "sliding_attention"}), {}, "sliding_window None of the head's own"),
    "attention_bias": (dict(attention_bias=True), {}, "attention_bias True: an EAGLE-3 head has no biases"),
    "bias": (dict(bias=True), {}, "bias True: an EAGLE-3 head has no biases"),
    "mlp_bias": (dict(mlp_bias=True), {}, "mlp_bias True: an EAGLE-3 head has no biases"),
    "a bias": ({}, {"midlayer.self_attn.q_proj.bias": torch.ones(T)}, "unexpected key '.*q_proj.bias'"),
    "a bias of fc": ({}, {"fc.bias": torch.ones(T)}, "unexpected key 'fc.bias'"),
    "quantised elsewhere": (dict(quantization_config=dict(bits=4)), {}, "quantization_config .* is not supported"),
    "heads that do not divide": (dict(num_attention_heads=5), {}, "num_attention_heads 5 does not divide the 32 rows"),
    "no number of heads": (dict(num_attention_heads=None), {}, "num_attention_heads None does not divide"),
    "an unknown RoPE": (dict(rope_scaling=dict(rope_type="su", factor=2.0)), {}, "rope_type 'su' is not supported"),
    "a RoPE base of zero": (dict(rope_theta=0), {}, "rope_theta 0 is not a positive number"),
    "a RoPE base that is text": (dict(rope_parameters=dict(rope_theta="1e6")), {}, "rope_theta '1e6' is not a p"),
    "two RoPE bases": (dict(rope_theta=1e6, rope_parameters=dict(rope_theta=1e4)), {},
                       "names several RoPE bases: rope_theta 1000000.0, rope_parameters.rope_theta 10000.0"),
    # weights
    "no fc": ({}, {"fc.weight": None}, "no weight fc.weight"),
    "no LM head": ({}, {"lm_head.weight": None}, "no weight lm_head.weight"),
    "no hidden_norm": ({}, {"midlayer.hidden_norm.weight": None}, "missing, first 'layers.0.hidden_norm.weight'"),
    "no norm": ({}, {"norm.weight": None}, "1 of 14 weights are missing, first 'norm.weight'"),
    "half a q/k norm": ({}, {"midlayer.self_attn.q_norm.weight": torch.ones(8)}, "first 'layers.0.self_attn.k_norm"),
    "a layer left out": ({}, {"layers.2.input_layernorm.weight": torch.ones(T)}, "missing, first 'layers.1"),
    "an extra weight": ({}, {"mask_hidden": torch.ones(1, T)}, "unexpected key 'mask_hidden'"),
    "another expert": ({}, {"midlayer.mlp.experts.0.w1.weight": torch.ones(8, T)}, "unexpected key 'layers.0.mlp.exp"),
    "q_proj one width": ({}, {"midlayer.self_attn.q_proj.weight": torch.ones(T, T)}, r"q_proj.weight .* \[32, 32\]"),
    # vocabularies
    "draft_vocab_size": (dict(draft_vocab_size=32), {}, "draft_vocab_size 32 is not the 24 rows of lm_head.weight"),
    "truncated_vocab_size": (dict(truncated_vocab_size=32), {}, "truncated_vocab_size 32 is not the 24 rows of lm_"),
    "no d2t": ({}, {"d2t": None}, "24 rows, the target 40 tokens, and the head has no table d2t"),
    "d2t too short": ({}, {"d2t": torch.zeros(VD - 1, dtype=torch.long)}, r"d2t has shape \[23\]"),
    "d2t beyond": ({}, {"d2t": torch.full((VD,), 20)}, "d2t does not name 24 different tokens .* vocabulary of 40"),
    "d2t below": ({}, {"d2t": torch.full((VD,), -1)}, "d2t does not name 24 different tokens"),
    "d2t with the ids": ({}, {"d2t": torch.tensor(IDS)}, "d2t does not name 24 different tokens"),
    "d2t twice the same": ({}, {"d2t": -torch.arange(VD)}, "d2t does not name 24 different tokens"),
    "t2d of another size": ({}, {"t2d": torch.ones(V + 1, dtype=torch.bool)}, r"t2d has shape \[41\]"),
    "another vocabulary": (dict(vocab_size=128), {}, "vocab_size is 128 in the head, 40 in the target"),
    # widths
    "another target": (dict(target_hidden_size=64), {}, "target_hidden_size is 64 in the head, 32 in the target"),
    "a width that is text": (dict(target_hidden_size="32"), {}, "target_hidden_size is '32' in the head, 32 in the"),
    "another width": (dict(hidden_size=48), {}, "hidden_size is 48 in the head, 32 by its weights"),
    "narrow without embedding": (dict(hidden_size=24), {"fc.weight": torch.ones(24, 3 * T)}, "no embed_tokens.weight"),
    "an embedding of another size": ({}, {"embed_tokens.weight": torch.ones(V + 1, T)}, r"embed_tokens.* \[41, 32\]"),
}


@pytest.mark.parametrize("keys, tensors, message", BAD.values(), ids=list(BAD))
def test_a_file_that_is_not_understood_is_refused_in_one_line(target, fitted, tmp_path, keys, tensors, message):
    folder = save(tmp_path / "head", *changed(fitted.config, fitted.weights, keys, **tensors))
    with pytest.raises(ValueError, match=message) as raised:
        EagleHead.from_pretrained(folder, target.model)
    assert "\n" not in str(raised.value)


def test_the_same_under_speculators_keys(target, fitted, tmp_path):
    for config, message in (
            (speculators(dict(use_second_norm=True)), "use_second_norm True"),
            (speculators(norm_output=1), "norm_output 1 is neither"),
            (speculators(speculators_model_type="peagle"), "speculators_model_type 'peagle' is not supported"),
            (speculators(dict(vocab_size=128)), "vocab_size is 128 in the head"),
            (speculators(**{KEY: [33, 35, 36]}), rf"{KEY} \[33, 35, 36\] begins with neither")):
        with pytest.raises(ValueError, match=message):
            EagleHead.from_pretrained(save(tmp_path / "head", config, renamed(fitted.weights, LAYERS0)), target.model)


def test_a_weight_twice_a_config_that_says_nothing_and_a_shallow_target(target, fitted, tmp_path):
    twice = fitted.weights | {"model.fc.weight": fitted.weights["fc.weight"] + 1}
    with pytest.raises(ValueError, match="fc.weight is there a second time"):
        EagleHead.from_pretrained(save(tmp_path / "twice", fitted.config, twice), target.model)
    # config.json says nothing of EAGLE-3: the weights do.
    config = {key: value for key, value in fitted.config.items() if key != "draft_vocab_size"}
    assert EagleHead.from_pretrained(save(tmp_path / "bare", config, fitted.weights), target.model).kind == "eagle3"
    # A target with too few layers for the defaults.
    folder, _ = tiny("gqa", tmp_path / "shallow", vocab_size=V, hidden_size=T, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"hidden states \[2, 1, -1\] \(the default\) do not lie .*--aux-layers"):
        EagleHead.from_pretrained(fitted.folder, Transformer.from_pretrained(folder, dtype=torch.float32))


def test_scaled_rope_is_transformers_and_is_said(target, fitted, tmp_path):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=64)
    config = fitted.config | dict(rope_theta=5e5, rope_scaling=scaling)
    head = EagleHead.from_pretrained(save(tmp_path / "head", config, fitted.weights), target.model)
    theirs = LlamaConfig(hidden_size=T, num_attention_heads=4, rope_parameters=scaling | dict(rope_theta=5e5))
    inv_freq, scale = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    torch.testing.assert_close(head.inv_freq, inv_freq)
    plain = 5e5 ** -(torch.arange(len(inv_freq)) / len(inv_freq))
    assert scale == 1 and not torch.allclose(head.inv_freq, plain)
    assert "RoPE base 500000 (config.json), scaled as llama3, draft vocabulary" in head.spec.describe()


def test_options_override_the_file(target, fitted, tmp_path):
    sequence = tokens_of(12, seed=2, vocab=V)
    for keys in ({}, {KEY: [7, 7, 7]}, dict(target_layer_ids=[1, 2, 3]),
                 dict(rope_theta=1e6, rope_parameters=dict(rope_theta=1e4))):
        folder = save(tmp_path / "head", *changed(fitted.config, fitted.weights, keys))
        head = EagleHead.from_pretrained(folder, target.model, aux_layers=[0, 3, L], rope_theta=77.0)
        assert head.capture == (0, 3, L)
        assert "hidden states 0, 3, 8 (--aux-layers)" in head.spec.describe()
        assert "RoPE base 77 (--draft-rope-theta)" in head.spec.describe()
        compare(target.model, head, written_out(target, fitted, states=(0, 3, L), theta=77.0), target.hf, sequence)
    for wrong, message in (([2, 4], "--aux-layers names 2: .*Name 3 between 0 and 8"), ([0, 1, 9], "--aux-layers")):
        with pytest.raises(ValueError, match=message):
            EagleHead.from_pretrained(fitted.folder, target.model, aux_layers=wrong)


def test_the_width_of_the_features_tells_whose_they_are(target, head):
    ids, pos = torch.tensor([tokens_of(6, seed=4, vocab=V)]), torch.arange(5)
    _, hiddens = target.model(ids[:, :-1], pos, capture=head.capture)
    first = head(ids[:, 1:], hiddens, pos)
    assert torch.equal(first, head(ids[:, 1:], hiddens, pos, is_draft=False))
    assert torch.equal(head(ids[:, 1:], first, pos), head(ids[:, 1:], first, pos, is_draft=True))


def test_a_draft_vocabulary_is_a_part_of_the_heads_own(target, fitted, head):
    hidden = torch.randn(1, 3, T)
    whole, ids = head.draft_logits(hidden), [IDS[i] for i in (9, 2, 20)]
    head.set_draft_vocab(ids)
    assert_close(head.draft_logits(hidden), whole[..., [9, 2, 20]], 1e-6)
    assert head.to_target_ids(torch.arange(3)).tolist() == ids
    probs = head.to_target_probs(torch.tensor([0.5, 0.3, 0.2]))
    assert probs[ids].tolist() == pytest.approx([0.5, 0.3, 0.2]) and probs.sum() == pytest.approx(1)
    head.set_draft_vocab(None)
    assert head.to_target_ids(torch.arange(VD)).tolist() == IDS and torch.equal(head.draft_logits(hidden), whole)
    unknown = min(set(range(V)) - set(IDS))
    for wrong in ([unknown], [IDS[0], IDS[0]], [], [V], "all"):
        with pytest.raises(ValueError, match="different token ids out of its own 24"):
            head.set_draft_vocab(wrong)
    head.set_draft_vocab(ids)
    with pytest.raises(ValueError, match="4 children of a node, the draft vocabulary has 3 tokens"):
        generate(target.model, PROMPTS[:1], 4, head=head, tree="static")


def test_the_command_line_prints_what_it_took_and_ends_with_2_in_one_line(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "target")
    model = Transformer.from_pretrained(checkpoint, dtype=torch.float32)
    c = model.config
    config = head_config(hidden_size=c.dim, vocab_size=c.vocab_size)
    torch.manual_seed(0)
    weights = head_weights(config | dict(num_attention_heads=4))
    weights["fc.weight"] = 0.1 * torch.randn(c.dim, 3 * c.dim)
    weights["d2t"] = torch.arange(VD)       # draft id i is token 2i
    folder = save(tmp_path / "head", config, weights)

    def run(*options):
        status = cli.main(cli.parse_args([
            "--checkpoint", str(checkpoint), "--eagle", str(folder), "--prompt", "the dog", "--max-new-tokens", "8",
            "--dtype", "float32", *options]))
        return status, capsys.readouterr()

    status, plain = run("--aux-layers", "0", "1", "2", "--draft-rope-theta", "500", "--tree", "chain:2",
                        "--draft-window", "4")
    assert status == 0
    assert ("EAGLE-3 head: hidden states 0, 1, 2 (--aux-layers), norms as in the paper, RoPE base 500 "
            f"(--draft-rope-theta), draft vocabulary 24 of {c.vocab_size}\n") in plain.err
    for options, message in (
            ((), r"hidden states [2, 1, -1] (the default) do not lie within the target's 2 layers. Name the 3"),
            (("--aux-layers", "1", "2"), "--aux-layers names 2"), (("--aux-layers", "0", "1", "9"), "[0, 1, 9]")):
        status, out = run(*options)
        assert status == 2 and message in out.err and out.err.count("\n") == 1 and not out.out
    # The line that says what was taken comes after all that may be wrong with the options.
    for options, message in ((("--tree", "dynamic:99,10,60"), "a dynamic tree of depth 99"),
                             (("--draft-vocab", "5"), "draft_vocab.json is missing"),
                             (("--max-seq-length", "2"), "leaves no room")):
        status, out = run("--aux-layers", "0", "1", "2", *options)
        assert status == 2 and message in out.err and out.err.count("\n") == 1 and not out.out
    (folder / "config.json").write_text("{}")
    status, out = run("--aux-layers", "0", "1", "2")
    assert status == 2 and "num_attention_heads None" in out.err and out.err.count("\n") == 1
    with pytest.raises(ValueError, match="are for EAGLE-3 heads; this is an EAGLE-1 or 2 head"):
        from test_scripts import write_head as write_eagle1
        eagle1 = write_eagle1(EagleHead(replace(c, n_layer=1), model), tmp_path / "eagle1")
        EagleHead.from_pretrained(eagle1, model, aux_layers=[0, 1, 2])


# ---------------------------------------------------------------------------------------------------------------------
# Lossless, compiled, traced, in a chat, with a window; and what it costs those who have no head

def test_greedy_tokens_are_plain_decodings_compiled_too(target, head):
    """A backend that runs the graphs as they are: what is compiled is tested, not the compiler."""
    plain = [target.hf.greedy(prompt, N_NEW) for prompt in PROMPTS]
    eager = generate(target.model, PROMPTS, N_NEW, head=head, tree=TREES["static"])
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        compile = torch.nn.Module.compile
        patch.setattr(torch.nn.Module, "compile", lambda self, **options: compile(self, backend="eager"))
        compiled = generate(target.model, PROMPTS, N_NEW, head=head, tree=TREES["static"], compile=True)
    assert compiled.tokens == eager.tokens == plain and compiled.accept_lengths == eager.accept_lengths
    for layer in (*target.model.layers, head.layer):
        layer._compiled_call_impl = None
    torch._dynamo.reset()


@all_trees
def test_a_traced_step_is_the_step_and_rows_go_on_to_the_last_slot_of_the_cache(target, head, tree):
    prompt, n_slot = PROMPTS[0], 90
    setup_caches(target.model, head, 1, n_slot)
    results = []
    for traced in (False, True):
        decoder = Decoder(target.model, 1, head=head, tree=tree)
        assert decoder.can_trace
        decoder.can_trace = traced
        results.append(decoder.generate([prompt], 99))
        assert set(decoder.traces) == ({"tree"} if traced else set())
    assert results[0].tokens == results[1].tokens == [target.hf.greedy(prompt, n_slot - len(prompt))]
    assert results[0].accept_lengths == results[1].accept_lengths and max(results[0].accept_lengths[0]) > 2


@pytest.fixture(scope="module")
def small():
    """A target and heads of FEW_TOKENS tokens, and the exact distribution of the first three."""
    from config import ModelArgs
    with torch.no_grad():
        torch.manual_seed(5)
        model = Transformer(ModelArgs(model_type="llama", dim=8, n_layer=1, n_head=1, n_kv_head=1, head_dim=8,
                                      vocab_size=FEW_TOKENS, intermediate_size=8, block_size=64, norm_eps=1e-5,
                                      rope_theta=100.0))
        randomise(model, 0.5)
        heads = []
        for ids in (None, [0, 2, 5, 7, 9, 12, 14]):
            spec = Eagle3Spec(replace(model.config, rope_theta=1e4), 8, (0, 1), FEW_TOKENS if ids is None else len(ids),
                              own_embedding=False)
            heads.append(Eagle3Head(spec, model))
            randomise(heads[-1], 0.5)
            if ids is not None:
                heads[-1].own_ids = torch.tensor(ids)
                heads[-1].set_draft_vocab(None)
        return model, heads, {sampling: exact(model, sampling) for sampling in SAMPLINGS}


SAMPLINGS = Sampling(1.0), Sampling(0.7, 5, 0.9)
WIDE = StaticTree.from_paths([[0], [1], [2], [0, 0]])


@pytest.mark.parametrize("sampling, draw_drafts, cases", [
    (SAMPLINGS[0], True, [(StaticTree.chain(2), 0), (WIDE, 1)]), (SAMPLINGS[1], True, [(WIDE, 0)]),
    (SAMPLINGS[0], False, [(DynamicTree(2, 2, 4), 1)]), (SAMPLINGS[1], False, [(WIDE, 1)])],
    ids=["drawn, T 1", "drawn, T 0.7, top-k, top-p", "likeliest, T 1", "likeliest, T 0.7, top-k, top-p"])
def test_sampled_tokens_have_the_distribution_of_plain_sampling(small, sampling, draw_drafts, cases):
    model, heads, distribution = small
    torch.manual_seed(1)
    for tree, which in cases:
        counts = first_three(model, heads[which], tree, sampling, draw_drafts, rows=5000, runs=3)
        assert chi_square_p(counts, distribution[sampling]) > 1e-3, (tree, which)


@all_trees
def test_a_chat_with_kept_caches_goes_on_as_from_a_fresh_prefill(target, head, tree):
    """Tokens and accepted lengths, which tell whether the head's cache and its last feature are the same."""
    setup_caches(target.model, head, 1, 150)
    caches = target.model.kv_cache, head.kv_cache
    chat, cached, lengths = Decoder(target.model, 1, head=head, tree=tree), [], []
    for n, drop in enumerate((0, 0, 3, 0)):       # tokens of the cache that the next turn does not share
        target.model.kv_cache, head.kv_cache = caches
        cached = cached[:len(cached) - drop]
        prompt = cached + (PROMPTS[0] if n == 0 else tokens_of(3, seed=n, vocab=V))
        result = chat.generate([prompt], 14, n_cached=len(cached))
        again = generate(target.model, [prompt], 14, head=head, tree=tree)
        assert result.tokens == again.tokens == [target.hf.greedy(prompt, 14)]
        assert result.accept_lengths == again.accept_lengths, n
        lengths += result.accept_lengths[0]
        cached = prompt + result.tokens[0][:-1]
    assert max(lengths) > 1


@pytest.mark.parametrize("tree, window", [("chain", 1), ("chain", 8), ("static", 3), ("dynamic", 3)])
def test_a_window_is_the_method_with_fewer_rows_seen(target, fitted, head, tree, window):
    written = written_out(target, fitted, window=window)
    head.window = window
    results = [written.decode(target.hf, prompt, 16, TREES[tree]) for prompt in PROMPTS[1:]]
    ours = generate(target.model, PROMPTS[1:], 16, head=head, tree=TREES[tree])
    assert ours.accept_lengths == [lengths for _, lengths in results]
    assert ours.tokens == [tokens[:16] for tokens, _ in results]
    check_window(target, head, written, written_out(target, fitted))


def test_in_a_window_the_rows_that_a_prompt_leaves_behind_have_seen_no_more_than_it(target, tmp_path):
    """With several layers: the second one's keys come out of the first one's attention."""
    torch.manual_seed(1)
    config, weights = head_config(), head_weights(head_config(), n_layer=2)
    folder = save(tmp_path / "head", config, weights | tables(IDS))
    head = EagleHead.from_pretrained(folder, target.model)
    head.window = 3
    written, whole = (WrittenOut(config, weights, target.hf.embedding, ids=IDS, window=n) for n in (3, None))
    check_window(target, head, written, whole)


def check_window(target, head, written, whole):
    """A chain behind the longest prompt is the method's, and another one than without a window."""
    sequence = PROMPTS[2]
    seen, draft_logits = [], head.draft_logits
    head.draft_logits = lambda hidden: seen.append(draft_logits(hidden)) or seen[-1]
    draft = drafted(target.model, head, sequence, StaticTree.chain(4))
    node, other = written.root(target.hf, sequence), whole.root(target.hf, sequence)
    assert (node.logits - other.logits).abs().max() > 0.01
    for level, token in zip(seen, draft.tokens[0, 1:].tolist()):
        assert_close(level[0, 0], node.logits.float())
        node = written.behind(node, token)


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_what_is_captured_costs_one_concatenation_and_nothing_without_a_head(target):
    model, tokens, pos = target.model, torch.tensor([PROMPTS[0]]), torch.arange(len(PROMPTS[0]))[None]
    model.kv_cache = None

    def plain():
        """The decoder without any thought of a head."""
        x = model.tok_embeddings(tokens)
        rope = rope_cos_sin(pos, model.inv_freq, x.dtype)
        bias = attention_bias(causal_mask(pos, None), 2, x.dtype)
        for layer in model.layers:
            x = layer(x, rope, bias, pos, None)
        return model.output(model.norm(x))

    def operators(call):
        with Operators() as seen:
            out = call()
        return sorted(name for name in seen.names if "expand" not in name), out

    bare, expected = operators(plain)
    with_none, (logits, features) = operators(lambda: model(tokens, pos))
    assert with_none == bare and torch.equal(logits, expected) and features.shape[-1] == T
    with_three, (logits, features) = operators(lambda: model(tokens, pos, capture=DEFAULT))
    assert with_three == sorted([*bare, "cat.default"]) and torch.equal(logits, expected)
    assert features.shape[-1] == 3 * T
    with pytest.raises(ValueError, match=r"capture \(2, 9\) does not lie within 0 and 8"):
        model(tokens, pos, capture=(2, 9))
