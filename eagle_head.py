"""The EAGLE heads: a decoder layer that drafts from what the target has computed (EAGLE-1, EAGLE-2, EAGLE-3).

    head = EagleHead.from_pretrained("yuhuili/EAGLE-Vicuna-7B-v1.3", target=model)
    head.setup_caches(max_batch_size=1, max_seq_length=1024)         # the same as the model's
    next_features = head(tokens, features, input_pos)
    draft = head.to_target_ids(head.draft_logits(next_features[:, -1]).argmax(-1))

EAGLE-1 (arXiv 2401.15077, section 4.1): a *feature* is the target's hidden state after its final norm. The head sees
feature f_i beside token t_{i+1} and predicts f_{i+1}. The target's own LM head turns that into logits. EAGLE-2, arXiv
2406.16858, keeps the head and changes the tree (draft_tree.py). EAGLE-3 (arXiv 2503.01840, section 3): the features are
several hidden states of the target, the LM head is the head's own. Its own outputs stand for features of drafts.

Shapes: B batch, T new tokens, K key/value heads, S cache slots, V vocabulary, Vd draft vocabulary, n captured hidden
states, t target width, h head width.
"""
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import iterate_weights, load_weights, read_json, resolve_checkpoint
from config import ModelArgs
from head_config import (Eagle3Spec, eagle3_spec, head_args, head_kind, official_config, official_key,
                         refuse_output_bias, stored_shapes)
from linears import install_quantized, stored
from masks import attention_bias, causal_mask
from model import RMSNorm, Transformer, TransformerBlock, block_targets
from rope import knows_length, rope_cos_sin, rope_inv_freq
from runtime import tune


class EagleHead(nn.Module):
    """The draft model of EAGLE-1 and EAGLE-2: fc over (embedding, feature), then one decoder layer."""
    kind = "eagle1"
    capture: tuple[int, ...] = ()   # hidden states of the target that are its features; () is the final one, normed
    window: int | None = None       # cache slots that the head attends to when it drafts, the last ones; None is all
    target: Transformer
    inv_freq: Tensor            # [head_dim / 2]
    kv_cache: Tensor            # see setup_caches; None before it is called
    draft_ids: Tensor | None    # [Vd] target ids of the draft vocabulary; None is the whole vocabulary

    def __init__(self, config: ModelArgs, target: Transformer, bias: bool = True):
        self.init_shared(config, target)
        self.fc = nn.Linear(2 * config.dim, config.dim, bias=bias)
        self.layer = TransformerBlock(config, attention_norm=False)
        self.requires_grad_(False)

    def init_shared(self, config: ModelArgs, target: Transformer) -> None:
        """Set what heads of every kind hold."""
        super().__init__()
        self.config = config
        # Not a submodule: the target's embedding and LM head are neither saved nor trained with the head.
        self.__dict__["target"] = target
        inv_freq = rope_inv_freq(config, "cpu").to(torch.empty(0).device)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("kv_cache", None, persistent=False)
        self.draft_output: nn.Module | None = None                  # LM head over a smaller draft vocabulary
        self.register_buffer("draft_ids", None, persistent=False)

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, target: Transformer, shard: Any = None, *,
                        aux_layers: Sequence[int] | None = None, rope_theta: float | None = None) -> "EagleHead":
        """Load a head of any kind from a folder or hub id, to the target's device and dtype.

        Heads in the official formats are read, and what vLLM, SGLang, SpecForge, AngelSlim and speculators make of
        them (head_config.py). shard is the target's tp.Shard, if it has one. aux_layers and rope_theta override what
        an EAGLE-3 head's file says (`eagle3_spec`). Raises FileNotFoundError or ValueError; for a
        head that does not fit its target, the message has both sizes.
        """
        folder = resolve_checkpoint(checkpoint)
        raw, shapes = read_json(folder / "config.json"), stored_shapes(folder)
        if head_kind(raw, shapes) == "eagle3":
            spec = eagle3_spec(raw, shapes, target.config, aux_layers=aux_layers, rope_theta=rope_theta)
            if "embed_tokens.weight" in shapes and not spec.own_embedding:
                spec = replace(spec, own_embedding=not is_embedding_of(target, folder))
            head = Eagle3Head.load(folder, spec, target)
            if shard is not None:   # every rank holds the whole head, beside its part of the target's embedding
                shard.connect(head)
            return head
        if aux_layers is not None or rope_theta is not None:
            raise ValueError("--aux-layers and --draft-rope-theta are for EAGLE-3 heads; this is an EAGLE-1 or 2 head")
        config = official_config(raw)
        args = head_args(config, target.config)
        if config.get("attention_bias"):
            refuse_output_bias(folder)
        weight = target.norm.weight
        with torch.device("meta"):
            build = cls if shard is None else shard.build_head
            head = build(args, target, bias=config.get("bias", True))
            install_quantized(head, folder)
        head.to(weight.dtype).to_empty(device=weight.device)
        head.inv_freq = rope_inv_freq(args, weight.device)
        # Official files hold a copy of the target's embedding, converted ones a copy of its LM head too.
        embedding = target.tok_embeddings.weight
        optional = {"embed_tokens.weight": embedding, "lm_head.weight": embedding}
        if config.get("attention_bias"):
            optional["layers.0.self_attn.o_proj.bias"] = torch.empty(args.dim, device="meta")
        load_weights(head.weights(), folder, optional, None if shard is None else shard.part(args), official_key)
        if shard is not None:
            shard.connect(head)
        tune(head)
        return head.eval()

    @property
    def layers(self) -> list[TransformerBlock]:
        """The decoder layers, which `Decoder` compiles."""
        return [self.layer]

    def weights(self) -> dict[str, Tensor]:
        """The official key -> our parameter, or the part of our parameter that it fills."""
        layer = {f"layers.0.{key}": part for key, part in block_targets(self.layer, self.config).items()}
        return {f"fc.{kind}": tensor for kind, tensor in stored(self.fc).items()} | layer

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        """Allocate `kv_cache` [n_layer, 2, B, K, S, head_dim], S as in the target's."""
        c, weight = self.config, self.target.norm.weight
        self.kv_cache = torch.zeros(c.n_layer, 2, max_batch_size, c.n_kv_head, max_seq_length, c.head_dim,
                                    dtype=weight.dtype, device=weight.device)

    def set_draft_vocab(self, ids: list[int] | None) -> None:
        """Draft only these tokens, the likeliest first (FR-Spec, arXiv 2502.14856): a small LM head costs less.

        Verification stays over the whole vocabulary. The output does not change, only how often drafts are right.
        """
        self.draft_ids, self.draft_output = None, None
        if ids is None:
            return
        check_ids(ids, range(self.config.vocab_size), f"below {self.config.vocab_size}")
        self.draft_ids = torch.tensor(ids, device=self.target.norm.weight.device)
        self.draft_output = rows_of(self.target.output, self.draft_ids)

    def forward(self, tokens: Tensor, features: Tensor, input_pos: Tensor, cache_pos: Tensor | None = None,
                mask: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None,
                is_draft: bool | None = None, rope_length: Tensor | None = None) -> Tensor:
        """Next features [B, T, h] from tokens t_{i+1} [B, T], features of i [B, T, ...], positions i [B, T] or [T].

        features are the target's (EAGLE-1: [B, T, t], EAGLE-3: the captured hidden states side by side [B, T, n * t]),
        or the head's own outputs [B, T, h] for the rows before. is_draft says which; by default their width does, which
        fails only if n * t = h. cache_pos, mask and rope_length as in `Transformer.forward`; rope is `rope_cos_sin` of
        the positions, if already computed. Before `setup_caches` the block attends to itself alone.
        """
        input_pos = input_pos.expand(tokens.shape)
        cache_pos = input_pos if cache_pos is None else cache_pos.expand(tokens.shape)
        if mask is None:
            mask = causal_mask(input_pos, None if self.kv_cache is None else self.kv_cache.shape[4])
            if rope_length is None and knows_length(self.config.rope_scaling):
                rope_length = input_pos.amax(-1, keepdim=True) + 1
        bias = attention_bias(mask, self.config.n_head // self.config.n_kv_head, features.dtype)
        if rope is None:
            rope = rope_cos_sin(input_pos, self.inv_freq, features.dtype, self.config.rope_scaling, rope_length)
        return self.run_layers(tokens, features, rope, bias, cache_pos, is_draft)

    def run_layers(self, tokens: Tensor, features: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor,
                   cache_pos: Tensor, is_draft: bool | None) -> Tensor:
        """`forward` with RoPE and the attention's bias computed: the layers' output, [B, T, h]."""
        x = self.fc(torch.cat((self.target.tok_embeddings(tokens), features), dim=-1))
        return self.layer(x, rope, bias, cache_pos, None if self.kv_cache is None else self.kv_cache[0])

    def draft_logits(self, features: Tensor) -> Tensor:
        """[..., h] -> [..., Vd]: by the target's LM head, over the draft vocabulary where there is one."""
        return (self.draft_output or self.target.output)(features)

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids if self.draft_ids is None else self.draft_ids[draft_ids]

    def to_target_probs(self, probs: Tensor) -> Tensor:
        """[..., Vd] -> [..., V]: no mass on tokens outside the draft vocabulary."""
        if self.draft_ids is None:
            return probs
        out = probs.new_zeros(*probs.shape[:-1], self.config.vocab_size)
        return out.index_copy_(-1, self.draft_ids, probs)


def check_ids(ids: object, known: Container[int], which: str) -> None:
    if not (isinstance(ids, list) and ids and all(type(i) is int and i in known for i in ids)
            and len(set(ids)) == len(ids)):
        raise ValueError(f"a draft vocabulary is a list of different token ids {which}")


def rows_of(linear: nn.Module, ids: Tensor) -> nn.Module:
    """An LM head with these rows of `linear`, quantised or split over ranks as `linear` is."""
    take_rows = getattr(linear, "rows", None)   # of a QuantLinear or a tp.ShardedOutput
    if take_rows is not None:
        output = take_rows(ids)
        tune(output)
        return output
    assert isinstance(linear.weight, Tensor)
    rows = linear.weight[ids]
    output = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta", dtype=rows.dtype)
    output.weight = nn.Parameter(rows, requires_grad=False)
    return output


def is_embedding_of(target: Transformer, folder: Path) -> bool:
    """Whether a head's embed_tokens.weight is its target's table, up to the rounding of a 16-bit file."""
    is_table = lambda key: official_key(key) == "embed_tokens.weight"
    for _, table, _ in iterate_weights(folder, wanted=is_table):
        if table.shape != (target.config.vocab_size, target.config.dim):
            return True     # loading says what is wrong
        for ids, ours in zip(torch.arange(len(table)).split(4096), table.split(4096)):
            theirs = target.tok_embeddings(ids.to(target.norm.weight.device)).float().cpu()
            if not torch.allclose(ours.float(), theirs, 0.01, 1e-4):
                return False
    return True


class Eagle3Head(EagleHead):
    """The draft model of EAGLE-3 in all its published variants (Eagle3Spec).

    One pass for the token after position i, with its embedding e and g = fc(captured hidden states), or the head's own
    output for the row before:

        x = cat(input_norm(e), hidden_norm(g))
        a = g + attention(x)
        out = a + feed_forward(ffn_norm(a))         # further layers are plain ones
        logits = output(norm(out))
    """
    kind = "eagle3"
    own_ids: Tensor     # [Vd] target ids of all rows of `output`

    def __init__(self, spec: Eagle3Spec, target: Transformer):
        c, n = spec.args, len(spec.capture)
        self.init_shared(c, target)
        self.spec, self.capture = spec, spec.capture
        norm = lambda dim: RMSNorm(dim, c.norm_eps)
        self.embedding = nn.Embedding(c.vocab_size, c.dim) if spec.own_embedding else None
        self.fc_norm = nn.ModuleList(norm(spec.target_dim) for _ in range(n)) if spec.fc_norm else None
        self.fc_input_norm = norm(n * spec.target_dim) if spec.norm_before_fc else None
        self.fc = nn.Linear(n * spec.target_dim, c.dim, bias=False)
        self.input_norm, self.hidden_norm = norm(c.dim), norm(c.dim)
        self.layer = TransformerBlock(c, attention_norm=False, in_dim=2 * c.dim)
        self.more_layers = nn.ModuleList(TransformerBlock(c) for _ in range(c.n_layer - 1))
        self.norm = norm(c.dim)
        self.output = nn.Linear(c.dim, spec.draft_vocab_size, bias=False)
        self.register_buffer("own_ids", torch.zeros(spec.draft_vocab_size, dtype=torch.long), persistent=False)
        self.requires_grad_(False)

    @property
    def layers(self) -> list[TransformerBlock]:
        return [self.layer, *(layer for layer in self.more_layers if isinstance(layer, TransformerBlock))]

    @classmethod
    def load(cls, folder: Path, spec: Eagle3Spec, target: Transformer) -> "Eagle3Head":
        """A head with the weights of a folder. Raises ValueError for a weight or a table that does not fit spec."""
        weight = target.norm.weight
        with torch.device("meta"):
            head = cls(spec, target)
            install_quantized(head, folder)
        head.to(weight.dtype).to_empty(device=weight.device)
        head.inv_freq = rope_inv_freq(spec.args, weight.device)
        offsets = torch.zeros(spec.draft_vocab_size, dtype=torch.long)
        meta = lambda *shape: torch.empty(*shape, device="meta")
        optional = {"t2d": meta(spec.args.vocab_size)}
        if not spec.own_embedding:      # a copy of the target's
            optional["embed_tokens.weight"] = meta(spec.args.vocab_size, spec.target_dim)
        targets = head.weights()
        if spec.has_table:
            targets["d2t"] = offsets
        load_weights(targets, folder, optional, rename=official_key)
        ids = torch.arange(spec.draft_vocab_size) + offsets
        if ids.min() < 0 or ids.max() >= spec.args.vocab_size or len(ids.unique()) < len(ids):
            raise ValueError(f"{folder}: d2t does not name {len(ids)} different tokens of the target's vocabulary of "
                             f"{spec.args.vocab_size}: the head is for another target")
        head.own_ids = ids.to(weight.device)
        head.set_draft_vocab(None)
        tune(head)
        return head.eval()

    def weights(self) -> dict[str, Tensor]:
        targets = {"layers.0.input_layernorm.weight": self.input_norm.weight, "norm.weight": self.norm.weight,
                   "layers.0.hidden_norm.weight": self.hidden_norm.weight}
        for name, linear in (("fc", self.fc), ("lm_head", self.output)):
            targets |= {f"{name}.{kind}": tensor for kind, tensor in stored(linear).items()}
        for i, layer in enumerate(self.layers):
            targets |= {f"layers.{i}.{key}": part for key, part in block_targets(layer, self.config).items()}
        for i, norm in enumerate(self.fc_norm or ()):
            assert isinstance(norm, RMSNorm)
            targets[f"fc_norm.{i}.weight"] = norm.weight
        if self.fc_input_norm is not None:
            targets["input_norm.weight"] = self.fc_input_norm.weight
        if self.embedding is not None:
            targets["embed_tokens.weight"] = self.embedding.weight
        return targets

    def set_draft_vocab(self, ids: list[int] | None) -> None:
        """Draft only these of the head's own tokens, the likeliest first; None is all of them."""
        self.draft_ids, self.draft_output = self.own_ids if self.spec.has_table else None, None
        if ids is None:
            return
        row = {token: i for i, token in enumerate(self.own_ids.tolist())}
        check_ids(ids, row, f"out of its own {len(row)}")
        device = self.own_ids.device
        self.draft_ids = torch.tensor(ids, device=device)
        self.draft_output = rows_of(self.output, torch.tensor([row[i] for i in ids], device=device))

    def fuse(self, hiddens: Tensor) -> Tensor:
        """Captured hidden states [B, T, n * t] -> [B, T, h]."""
        if self.fc_norm is not None:
            parts = hiddens.split(self.spec.target_dim, -1)
            hiddens = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts)], -1)
        return self.fc(hiddens if self.fc_input_norm is None else self.fc_input_norm(hiddens))

    def run_layers(self, tokens: Tensor, features: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor,
                   cache_pos: Tensor, is_draft: bool | None) -> Tensor:
        if is_draft is None:
            is_draft = features.shape[-1] != self.fc.in_features
        g = features if is_draft else self.fuse(features)
        normed = self.hidden_norm(g)
        x = torch.cat((self.input_norm((self.embedding or self.target.tok_embeddings)(tokens)), normed), dim=-1)
        caches = self.kv_cache if self.kv_cache is not None else [None] * self.config.n_layer
        x = self.layer(x, rope, bias, cache_pos, caches[0], normed if self.spec.norm_before_residual else g)
        for layer, cache in zip(self.more_layers, caches[1:]):
            x = layer(x, rope, bias, cache_pos, cache)
        return self.norm(x) if self.spec.norm_output else x

    def draft_logits(self, features: Tensor) -> Tensor:
        """[..., h] -> [..., Vd]: by the head's own norm and LM head."""
        return (self.draft_output or self.output)(features if self.spec.norm_output else self.norm(features))
