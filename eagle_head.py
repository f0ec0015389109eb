"""The EAGLE head: one decoder layer that predicts the target's next feature (EAGLE-1 and EAGLE-2).

    head = EagleHead.from_pretrained("yuhuili/EAGLE-Vicuna-7B-v1.3", target=model)
    head.setup_caches(max_batch_size=1, max_seq_length=1024)         # the same as the model's
    next_features = head(tokens, features, input_pos)
    draft = head.to_target_ids(head.draft_logits(next_features[:, -1]).argmax(-1))

A *feature* is the target's hidden state after its final norm. The head sees feature f_i beside token t_{i+1} and
predicts f_{i+1}. The target's own LM head turns that into logits (EAGLE-1, arXiv 2401.15077, section 4.1). EAGLE-2,
arXiv 2406.16858, keeps the head and changes the tree (draft_tree.py).

Shapes: B batch, T new tokens, K key/value heads, S cache slots, V vocabulary, Vd draft vocabulary.
"""
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from checkpoint import iterate_weights, load_weights, read_json, resolve_checkpoint
from config import ModelArgs
from linears import install_quantized, stored
from model import (Transformer, TransformerBlock, attention_bias, block_targets, causal_mask, rope_cos_sin,
                   rope_inv_freq)
from runtime import tune


class EagleHead(nn.Module):
    """The draft model of EAGLE-1 and EAGLE-2: fc over (embedding, feature), then one decoder layer."""
    target: Transformer
    inv_freq: Tensor            # [head_dim / 2]
    kv_cache: Tensor            # see setup_caches; None before it is called
    draft_ids: Tensor | None    # [Vd] target ids of the draft vocabulary; None is the whole vocabulary

    def __init__(self, config: ModelArgs, target: Transformer, bias: bool = True):
        super().__init__()
        self.config = config
        # Not a submodule: the target's embedding and LM head are neither saved nor trained with the head.
        self.__dict__["target"] = target
        self.fc = nn.Linear(2 * config.dim, config.dim, bias=bias)
        self.layer = TransformerBlock(config, attention_norm=False)
        self.register_buffer("inv_freq", rope_inv_freq(config, "cpu").to(self.fc.weight.device), persistent=False)
        self.register_buffer("kv_cache", None, persistent=False)
        self.draft_output: nn.Module | None = None                  # LM head over the draft vocabulary
        self.register_buffer("draft_ids", None, persistent=False)
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, target: Transformer, shard: Any = None) -> "EagleHead":
        """Load a head from a folder or hub id, to the target's device and dtype.

        Heads in the official format are read, and what the converters of vLLM, SGLang and speculators make of them
        (`official_config`, `official_key`). shard is the target's tp.Shard, if it has one. Raises FileNotFoundError
        or ValueError; a head that does not fit its target is told with both sizes.
        """
        folder = resolve_checkpoint(checkpoint)
        config = official_config(read_json(folder / "config.json"))
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

    def weights(self) -> dict[str, Tensor]:
        """The official key -> our parameter, or the part of our parameter that it fills."""
        layer = {f"layers.0.{key}": part for key, part in block_targets(self.layer, self.config).items()}
        return {f"fc.{kind}": tensor for kind, tensor in stored(self.fc).items()} | layer

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        """Allocate `kv_cache` [2, B, K, S, head_dim], S as in the target's."""
        c, weight = self.config, self.target.norm.weight
        self.kv_cache = torch.zeros(2, max_batch_size, c.n_kv_head, max_seq_length, c.head_dim,
                                    dtype=weight.dtype, device=weight.device)

    def set_draft_vocab(self, ids: list[int] | None) -> None:
        """Draft only these tokens, the likeliest first (FR-Spec, arXiv 2502.14856): a small LM head costs less.

        Verification stays over the whole vocabulary. The output does not change, only how often drafts are right.
        """
        self.draft_ids, self.draft_output = None, None
        if ids is None:
            return
        vocab = self.config.vocab_size
        if not (isinstance(ids, list) and ids and all(type(i) is int and 0 <= i < vocab for i in ids)
                and len(set(ids)) == len(ids)):
            raise ValueError(f"a draft vocabulary is a list of different token ids below {vocab}")
        self.draft_ids = torch.tensor(ids, device=self.target.norm.weight.device)
        take_rows = getattr(self.target.output, "rows", None)   # of a QuantLinear or a tp.ShardedOutput
        if take_rows is not None:
            output = take_rows(self.draft_ids)
            tune(output)
        else:
            rows = self.target.output.weight[self.draft_ids]
            output = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta", dtype=rows.dtype)
            output.weight = nn.Parameter(rows, requires_grad=False)
        self.draft_output = output

    def forward(self, tokens: Tensor, features: Tensor, input_pos: Tensor, cache_pos: Tensor | None = None,
                mask: Tensor | None = None, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Next features [B, T, dim] from tokens t_{i+1} [B, T], features f_i [B, T, dim], positions i [B, T] or [T].

        cache_pos and mask as in `Transformer.forward`; rope is `rope_cos_sin` of the positions, if already computed.
        Before `setup_caches` the block attends to itself alone.
        """
        input_pos = input_pos.expand(tokens.shape)
        cache_pos = input_pos if cache_pos is None else cache_pos.expand(tokens.shape)
        x = self.fc(torch.cat((self.target.tok_embeddings(tokens), features), dim=-1))
        if mask is None:
            mask = causal_mask(input_pos, None if self.kv_cache is None else self.kv_cache.shape[3])
        bias = attention_bias(mask, self.config.n_head // self.config.n_kv_head, x.dtype)
        rope = rope_cos_sin(input_pos, self.inv_freq, x.dtype) if rope is None else rope
        return self.layer(x, rope, bias, cache_pos, self.kv_cache)

    def draft_logits(self, features: Tensor) -> Tensor:
        """[..., dim] -> [..., Vd]: the target's LM head, over the draft vocabulary where there is one."""
        return (self.draft_output or self.target.output)(features)

    def to_target_ids(self, draft_ids: Tensor) -> Tensor:
        return draft_ids if self.draft_ids is None else self.draft_ids[draft_ids]

    def to_target_probs(self, probs: Tensor) -> Tensor:
        """[..., Vd] -> [..., V]: no mass on tokens outside the draft vocabulary."""
        if self.draft_ids is None:
            return probs
        out = probs.new_zeros(*probs.shape[:-1], self.config.vocab_size)
        return out.index_copy_(-1, self.draft_ids, probs)


def official_config(config: dict) -> dict:
    """A head's config.json with the keys of the official format. Two other formats nest and rename them:

    vLLM's converters   {"model_type": "eagle", "model": {...}, "eagle_fc_bias": bool, "truncated_vocab_size": int}
    speculators         {"speculators_model_type": "eagle", "transformer_layer_config": {...}, "fusion_bias": bool}

    Raises ValueError, naming key and value, for a head of another kind.
    """
    outer = dict(config)
    places = [outer.pop(key, None) for key in ("model", "transformer_layer_config")]
    nested = next((place for place in places if isinstance(place, dict)), {})
    flat = {**outer, **nested, "architectures": [outer.get("architectures"), nested.get("architectures")]}
    if flat.get("speculators_model_type", "eagle") not in ("eagle", "eagle3"):
        raise ValueError(f"the head's config.json: speculators_model_type {flat['speculators_model_type']!r} is not "
                         "supported (eagle is)")
    if flat.get("speculators_model_type") == "eagle3":
        flat["eagle_version"] = 3
    for key in ("layernorms", "add_para_norm"):
        if flat.get(key):
            raise ValueError(f"the head's config.json: {key} {flat[key]!r}, more norms than EAGLE has: not supported")
    if flat.get("truncated_vocab_size") not in (None, flat.get("vocab_size")):
        raise ValueError("the head's config.json: truncated_vocab_size "
                         f"{flat['truncated_vocab_size']} is not supported: its LM head is not the target's")
    for key in ("eagle_fc_bias", "fusion_bias"):
        if key in flat:
            flat.setdefault("bias", bool(flat[key]))
    if nested:
        flat.setdefault("bias", False)
    return flat


def official_key(key: str) -> str:
    """The official name of a head's weight. vLLM's loader puts "model." before it, speculators renames two modules."""
    while key.startswith("model."):
        key = key.removeprefix("model.")
    for theirs, ours in (("fusion_fc.", "fc."), ("transformer.", "layers.0.")):
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
    return key


def refuse_output_bias(folder: Path) -> None:
    """Raise ValueError for a bias of o_proj that is not zero: SGLang's format has one of zeros beside q, k and v's."""
    for key, tensor, file in iterate_weights(folder, wanted=lambda key: key.endswith("o_proj.bias")):
        if tensor.any():
            raise ValueError(f"{file}: {key} is not zero: a head has no bias there")


def head_args(config: dict, target: ModelArgs) -> ModelArgs:
    """ModelArgs of a head from its config.json, compared with its target's."""
    config = official_config(config)
    for key, ours in (("hidden_size", target.dim), ("vocab_size", target.vocab_size)):
        if key not in config:
            raise ValueError(f"the head's config.json has no key {key!r}")
        if config[key] != ours:
            raise ValueError(f"this head does not fit its target: {key} is {config[key]} in the head, "
                             f"{ours} in the target")
    if config.get("eagle_version", 1) not in (1, 2) or "Eagle3" in str(config.get("architectures")):
        raise ValueError("this is an EAGLE-3 head: EAGLE-1 and EAGLE-2 heads are supported")
    try:
        # A head is a dense LLaMA layer whatever its target is, at most with Qwen2's biases.
        args = ModelArgs.from_config(config | {"model_type": "llama", "num_hidden_layers": 1, "attention_bias": False})
    except ValueError as error:
        raise ValueError(f"the head's {error}") from None
    return replace(args, qkv_bias=bool(config.get("qkv_bias") or config.get("attention_bias")))
