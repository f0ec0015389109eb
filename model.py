"""LLaMA 1/2/3.x, Vicuna, Mistral, Mixtral and Qwen2/3 in one file: static KV caches, any block of new tokens.

    model = Transformer.from_pretrained("checkpoints/SmolLM2-135M-Instruct", dtype=torch.bfloat16)
    model.setup_caches(max_batch_size=1, max_seq_length=1024)
    logits, features = model(tokens, input_pos)

Position and cache slot are arguments of every call and the cache itself knows no length, so forgetting a rejected
draft costs nothing: its slots are written again. Checkpoints are Hugging Face folders as published, or hub ids.

Shapes: B batch, T new tokens, S cache slots, H query heads, K key/value heads, G = H / K, D head dim, E experts,
V vocabulary.
"""
import functools
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


PREFILL_CHUNK = 512  # prompt tokens a pass
NOT_FINITE = -2      # in the place of a token: the logits it was to come from hold NaN or infinity

# On Hopper torch prefers cuDNN's attention, which plans anew for every length it meets: 0.4 s each has been reported
# (FunASR#3704), so a first token would wait for it at every prompt.
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class ModelArgs:
    """What config.json says, under the names of this file. Made by `from_config`, which refuses what is not built."""
    model_type: str
    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    block_size: int                     # tokens of context the model was made for
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None = None    # config.json's own dictionary; None means plain RoPE
    tie_word_embeddings: bool = False
    qkv_bias: bool = False              # Qwen2
    qk_norm: bool = False               # Qwen3
    sliding_window: int | None = None
    n_expert: int = 0                   # Mixtral; 0 means a dense feed-forward
    n_expert_active: int = 0

    @classmethod
    def from_config(cls, config: dict) -> "ModelArgs":
        """Read the dictionary of a config.json, of transformers 4 or 5.

        Raises ValueError naming the key and the value of whatever this file does not implement.
        """
        model_type = config.get("model_type")
        if model_type not in ("llama", "mistral", "mixtral", "qwen2", "qwen3"):
            raise ValueError(f"config.json: model_type {model_type!r} is not supported "
                             "(llama, mistral, mixtral, qwen2 and qwen3 are)")
        for key in ("quantization_config", "attention_bias", "mlp_bias", "transformers_weights"):
            if config.get(key):
                raise ValueError(f"config.json: {key} {config[key]!r} is not supported")
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"config.json: hidden_act {config['hidden_act']!r} is not supported (silu is)")
        config = config | _whole_numbers(config)
        rope = _rope_parameters(config)
        try:
            n_head = config["num_attention_heads"]
            args = cls(
                model_type=model_type,
                dim=config["hidden_size"],
                n_layer=config["num_hidden_layers"],
                n_head=n_head,
                n_kv_head=config.get("num_key_value_heads") or n_head,
                head_dim=config.get("head_dim") or (128 if model_type == "qwen3" else config["hidden_size"] // n_head),
                intermediate_size=config["intermediate_size"],
                vocab_size=config["vocab_size"],
                block_size=_context(config),
                norm_eps=config.get("rms_norm_eps", 1e-5 if model_type == "mixtral" else 1e-6),
                rope_theta=rope.pop("rope_theta"),
                rope_scaling=rope or None,
                tie_word_embeddings=config.get("tie_word_embeddings", False),
                qkv_bias=model_type == "qwen2",
                qk_norm=model_type == "qwen3",
                sliding_window=_sliding_window(config),
                n_expert=config["num_local_experts"] if model_type == "mixtral" else 0,
                n_expert_active=config["num_experts_per_tok"] if model_type == "mixtral" else 0,
            )
        except KeyError as missing:
            raise ValueError(f"config.json has no key {missing}") from None
        except (TypeError, ZeroDivisionError) as error:
            raise ValueError(f"config.json holds a value of the wrong type: {error}") from None
        for name in ("dim", "n_layer", "n_head", "n_kv_head", "head_dim", "intermediate_size", "vocab_size",
                     "block_size", "norm_eps", "rope_theta"):
            value = getattr(args, name)
            if not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"config.json: the value for {name} is {value!r}, not a positive number")
        if args.n_head % args.n_kv_head:
            raise ValueError(f"config.json: {args.n_head} heads cannot share {args.n_kv_head} key/value heads")
        return args


def _whole_numbers(config: dict) -> dict:
    """The sizes that config.json writes as floats, as integers: some converters write 32000.0."""
    whole = {}
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
                "intermediate_size", "max_position_embeddings", "max_sequence_length", "sliding_window",
                "max_window_layers", "num_local_experts", "num_experts_per_tok"):
        value = config.get(key)
        if value is not None and type(value) is not int:
            if not isinstance(value, float) or not value.is_integer():
                raise ValueError(f"config.json: {key} {value!r} is not a whole number")
            whole[key] = int(value)
    return whole


# What transformers takes where config.json says nothing: max_position_embeddings of each model_type.
POSITIONS = {"llama": 2048, "mistral": 131072, "mixtral": 131072, "qwen2": 32768, "qwen3": 32768}


def _context(config: dict) -> int:
    """Tokens of context. Under linear scaling max_position_embeddings counts positions before they are stretched."""
    rope = _rope_parameters(config)
    positions = config.get("max_position_embeddings", POSITIONS[config["model_type"]])
    if _rope_type(config) == "dynamic":
        # Scaling changes the base past these positions: the angle of a token would depend on the length, and keys
        # already in a cache would be wrong.
        return positions
    # Vicuna-16k states the length it was trained for too.
    stated = config.get("max_sequence_length") or 0
    if rope.get("rope_type") != "linear":
        return max(positions, stated)
    return max(positions, stated, int(rope.get("original_max_position_embeddings", positions) * rope["factor"]))


def _sliding_window(config: dict) -> int | None:
    """The window of the layers that have one; None where no layer has."""
    model_type = config["model_type"]
    window = config.get("sliding_window", None if model_type == "mixtral" else 4096)
    if model_type in ("mistral", "mixtral"):
        return window
    if model_type not in ("qwen2", "qwen3") or not config.get("use_sliding_window"):
        return None
    full = config.get("max_window_layers", 28)  # these many layers, the first ones, see everything
    kinds = config.get("layer_types")
    windowed = "sliding_attention" in kinds if kinds else full < config["num_hidden_layers"]
    return window if windowed else None


def _rope_settings(config: dict) -> dict:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_scaling {rope!r} is not an object")
    return rope


def _rope_type(config: dict) -> str:
    rope = _rope_settings(config)
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_parameters(config: dict) -> dict:
    """RoPE settings of either generation of config.json: {"rope_theta"} alone, or with "rope_type" and its keys."""
    rope_type = _rope_type(config)
    rope = {key: value for key, value in _rope_settings(config).items() if key not in ("type", "rope_type")}
    rope.setdefault("rope_theta", config.get("rope_theta") or (1e6 if config["model_type"] == "mixtral" else 1e4))
    if rope_type == "llama3":
        before = config.get("original_max_position_embeddings")
        before = before or rope.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        rope["original_max_position_embeddings"] = before
    if rope_type not in ("default", "linear", "dynamic", "llama3"):
        raise ValueError(f"config.json: rope_type {rope_type!r} is not supported (linear, dynamic and llama3 are)")
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor",
                                               "original_max_position_embeddings"]}
    for key in needed.get(rope_type, []):
        if not isinstance(rope.get(key), (int, float)) or not 0 < rope[key] < 1e9:
            raise ValueError(f"config.json: rope_type {rope_type!r} needs a number under the key {key!r}")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    if rope_type in ("default", "dynamic"):  # dynamic scaling begins where _context ends
        return {"rope_theta": rope["rope_theta"]}
    return {"rope_type": rope_type, **rope}


def rope_inv_freq(args: ModelArgs, device: torch.device | str | None = None) -> Tensor:
    """Angle per position of each of the D/2 rotation planes: [D/2] fp32."""
    exponent = torch.arange(0, args.head_dim, 2, dtype=torch.int64, device=device).float() / args.head_dim
    inv_freq = 1.0 / args.rope_theta ** exponent
    scaling = args.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    # llama3: long wavelengths are stretched by `factor`, short ones kept, those between interpolated.
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq * (kept + (1 - kept) / scaling["factor"])


class Transformer(nn.Module):
    """The decoder. Weights are frozen: this project trains heads beside targets, never targets."""

    def __init__(self, config: ModelArgs):
        super().__init__()
        self.config = config
        # On the meta device normal_ and pow would import torch's compiler, which takes a second.
        embedding = torch.empty(config.vocab_size, config.dim)
        self.tok_embeddings = nn.Embedding.from_pretrained(embedding if embedding.is_meta else embedding.normal_())
        self.layers = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("inv_freq", rope_inv_freq(config, "cpu").to(self.norm.weight.device), persistent=False)
        self.register_buffer("kv_cache", None, persistent=False)
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, device: torch.device | str = "cpu",
                        dtype: torch.dtype = torch.bfloat16, shard: "tp.Shard | None" = None,
                        choose_kernels: bool = True) -> "Transformer":
        """Load a Hugging Face folder, or a hub id, one tensor at a time, straight to `device` and `dtype`.

        With a `shard`, only the slices of its rank are read, and the model is that rank's (tp.py). Kernels of a
        quantised model are measured, by all ranks together, unless told not to: products are dense ones then. Raises
        FileNotFoundError or ValueError with one line that names the file, key or value at fault.
        """
        folder = resolve_checkpoint(checkpoint)
        config = ModelArgs.from_config(read_json(folder / "config.json"))
        with torch.device("meta"):
            model = cls(config) if shard is None else shard.build_target(config)
            is_quantized = install_quantized(model, folder)
        model.to(dtype).to_empty(device=device)
        tied = config.tie_word_embeddings and isinstance(model.output, nn.Linear)
        if tied:  # to_empty gives each name memory of its own
            model.output.weight = model.tok_embeddings.weight
        model.inv_freq = rope_inv_freq(config, device)
        optional = {"lm_head.weight": model.output.weight} if tied else {}
        part = None if shard is None else shard.part(config)
        load_weights(_hf_targets(model), folder, optional, part)  # a tied model may carry its one matrix twice
        if is_quantized and choose_kernels:
            from quantized import tune
            tune(model)
        return (model if shard is None else shard.connect(model)).eval()

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        """Allocate `kv_cache` [n_layer, 2, B, K, S, D] for S = max_seq_length slots a row.

        Raises ValueError when S passes the model's context or a sliding window that would begin to matter.
        """
        c = self.config
        if min(max_batch_size, max_seq_length) < 1:
            raise ValueError(f"caches of {max_batch_size} rows and {max_seq_length} slots: at least 1 of each is needed")
        if max_seq_length > c.block_size:
            raise ValueError(f"max_seq_length {max_seq_length} is beyond the model's context of {c.block_size} tokens")
        if c.sliding_window is not None and max_seq_length > c.sliding_window:
            raise ValueError(f"max_seq_length {max_seq_length} is beyond sliding_window {c.sliding_window}, "
                             "past which windowed attention would be needed; it is not supported")
        weight = self.norm.weight
        self.kv_cache = torch.zeros(c.n_layer, 2, max_batch_size, c.n_kv_head, max_seq_length, c.head_dim,
                                    dtype=weight.dtype, device=weight.device)

    def forward(self, tokens: Tensor, input_pos: Tensor, cache_pos: Tensor | None = None,
                mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One pass over a block of new tokens.

        tokens     [B, T] int64
        input_pos  [B, T] or [T] int64: position of each token in its sequence, for RoPE
        cache_pos  [B, T] or [T] int64: cache slot each token's key and value go to; input_pos when None
        mask       [B, T, S] bool: the slots each token may see, its own among them. Only the first S slots are
                   read, S <= those allocated, so a narrow mask makes a short conversation in a long cache cheap.
                   None means causal: every slot up to the token's position.
        Returns logits [B, T, V] and features [B, T, dim], the hidden state after the final norm. Before
        `setup_caches` the block attends to itself alone.
        """
        features = self.features(tokens, input_pos, cache_pos, mask)
        return self.output(features), features

    def features(self, tokens: Tensor, input_pos: Tensor, cache_pos: Tensor | None = None,
                 mask: Tensor | None = None) -> Tensor:
        """`forward` without the LM head: features [B, T, dim]."""
        check_block(tokens, self.kv_cache)
        input_pos = input_pos.expand(tokens.shape)
        cache_pos = input_pos if cache_pos is None else cache_pos.expand(tokens.shape)
        x = self.tok_embeddings(tokens)
        rope = rope_cos_sin(input_pos, self.inv_freq, x.dtype)
        if mask is None:
            mask = causal_mask(input_pos, None if self.kv_cache is None else self.kv_cache.shape[4])
        bias = attention_bias(mask, self.config.n_head // self.config.n_kv_head, x.dtype)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, bias, cache_pos, None if self.kv_cache is None else self.kv_cache[i])
        return self.norm(x)


def check_block(tokens: Tensor, kv_cache: Tensor | None) -> None:
    """Raises ValueError unless tokens are [B, T] integers and fit into kv_cache [..., B, K, S, D], where there is one."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.long, torch.int):
        raise ValueError(f"tokens are [B, T] int64, not {list(tokens.shape)} {tokens.dtype}")
    if kv_cache is not None and (tokens.shape[0] > kv_cache.shape[-4] or tokens.shape[1] > kv_cache.shape[-2]):
        raise ValueError(f"{tokens.shape[0]} rows of {tokens.shape[1]} tokens do not fit into caches of "
                         f"{kv_cache.shape[-4]} rows and {kv_cache.shape[-2]} slots: call setup_caches")


def causal_mask(input_pos: Tensor, n_slot: int | None) -> Tensor:
    """[B, T] positions -> [B, T, S] bool: slots at or before each position; without a cache, the block's own rows."""
    slots = input_pos[:, None, :] if n_slot is None else torch.arange(n_slot, device=input_pos.device)
    return slots <= input_pos[:, :, None]


def bucket(length: int, n_slot: int) -> int:
    """Cache slots to look at for `length` used ones: 128, 192, 256, 384, 512, 768, ... up to n_slot.

    Few enough for one captured graph each, near enough that attention follows the used length.
    """
    size = 128
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, n_slot)


def attention_bias(mask: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """bool [B, T, S] -> additive [B, 1, G*T, S], once a pass, with a row for each query head of a key/value group.

    What is additive already is taken as it is.
    """
    if mask.is_floating_point():
        return mask
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
    return bias.repeat(1, group, 1)[:, None]


def rope_cos_sin(input_pos: Tensor, inv_freq: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[B, T] positions -> cosines and signed sines [B, T, 1, D] for `apply_rope`."""
    # Cosine is even and sine odd: the first half of the frequencies negated gives both at full width and with their signs.
    angle = input_pos[:, :, None, None] * torch.cat((-inv_freq, inv_freq))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [B, T, heads, D] in the planes (i, i + D/2), the pairing of Hugging Face's weights."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class TransformerBlock(nn.Module):
    """Pre-norm decoder layer. EAGLE's draft layer is this one with `attention_norm` off (EAGLE, section 4.1)."""

    def __init__(self, config: ModelArgs, attention_norm: bool = True):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = MoEFeedForward(config) if config.n_expert else FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps) if attention_norm else nn.Identity()
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor, cache_pos: Tensor,
                kv_cache: Tensor | None) -> Tensor:
        """x [B, T, dim], bias [B, 1, G*T, S], cache_pos [B, T], kv_cache [2, B, K, slots, D] -> [B, T, dim]."""
        x = x + self.attention(self.attention_norm(x), rope, bias, cache_pos, kv_cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Attention(nn.Module):
    def __init__(self, config: ModelArgs):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        rows = (config.n_head + 2 * config.n_kv_head) * config.head_dim
        self.wqkv = nn.Linear(config.dim, rows, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_head * config.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor, cache_pos: Tensor,
                kv_cache: Tensor | None) -> Tensor:
        B, T, _ = x.shape
        H, K, D = self.n_head, self.n_kv_head, self.head_dim
        qkv = self.wqkv(x).view(B, T, H + 2 * K, D)
        rotated = qkv[:, :, :H + K]
        if self.q_norm is not None:
            rotated = torch.cat((self.q_norm(rotated[:, :, :H]), self.k_norm(rotated[:, :, H:])), dim=2)
        qkv[:, :, :H + K] = apply_rope(rotated, rope)  # in place, so that keys and values stay one block to write
        q, kv = qkv[:, :, :H], qkv[:, :, H:].unflatten(2, (2, K))
        if kv_cache is None:
            k, v = kv.permute(2, 0, 3, 1, 4)                                  # [B, K, T, D]
        else:
            k, v = write_cache(kv_cache, cache_pos, kv, bias.shape[-1])       # [B, K, S, D]
        # The G query heads that share a key/value head become rows of it: keys and values are read once, and no
        # kernel has to know about grouped queries.
        q = q.view(B, T, K, H // K, D).permute(0, 2, 3, 1, 4).reshape(B, K, H // K * T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)           # [B, K, G*T, D]
        y = y.view(B, K, H // K, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H * D)
        return self.wo(y)


def write_cache(kv_cache: Tensor, cache_pos: Tensor, kv: Tensor, n_slot: int) -> Tensor:
    """Put kv [B, T, 2, K, D] into kv_cache [2, B, K, slots, D] at cache_pos [B, T]; return a view [2, B, K, n_slot, D]."""
    B = kv.shape[0]
    if B == 1:  # a third of the general form's time on a CPU
        kv_cache[:, :1].index_copy_(3, cache_pos[0], kv.permute(2, 0, 3, 1, 4))
    else:
        kv_cache[:, torch.arange(B, device=kv.device)[:, None], :, cache_pos] = kv
    return kv_cache[:, :B, :, :n_slot]


class FeedForward(nn.Module):
    def __init__(self, config: ModelArgs):
        super().__init__()
        self.w13 = nn.Linear(config.dim, 2 * config.intermediate_size, bias=False)  # gate rows, then up rows
        self.w2 = nn.Linear(config.intermediate_size, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class MoEFeedForward(nn.Module):
    """Mixtral: each token goes to its top experts, weighted by a softmax over the chosen ones.

    Three ways to the same sum, by the number of rows: gather the routed experts' weights while they are fewer than
    all; else run every expert over all rows, each read once and no shape depending on the routing; in a long
    prefill, where arithmetic counts, only over the rows routed to it.
    """
    PREFILL_ROWS = 128  # more tokens of one sequence than any tree of drafts has

    def __init__(self, config: ModelArgs):
        super().__init__()
        E, dim, hidden = config.n_expert, config.dim, config.intermediate_size
        self.n_expert_active = config.n_expert_active
        self.gate = nn.Linear(dim, E, bias=False)
        self.w13 = nn.Parameter(torch.empty(E, 2 * hidden, dim))
        self.w2 = nn.Parameter(torch.empty(E, dim, hidden))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])                                       # [N, dim]
        probs = self.gate(rows).softmax(-1, dtype=torch.float)
        weights, experts = probs.topk(self.n_expert_active, dim=-1)             # [N, k]
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        if experts.numel() < self.w2.shape[0]:
            out = self._gathered(rows, weights, experts)
        elif x.shape[1] <= self.PREFILL_ROWS:
            out = self._every_expert(rows, weights, experts)
        else:
            out = self._routed_rows(rows, weights, experts)
        return out.view_as(x)

    def _gathered(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        gate, up = torch.einsum("nd,nkhd->nkh", rows, self.w13[experts]).chunk(2, dim=-1)
        return torch.einsum("nk,nkh,nkdh->nd", weights, F.silu(gate) * up, self.w2[experts])

    def _every_expert(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        dense = rows.new_zeros(rows.shape[0], self.w2.shape[0]).scatter_(1, experts, weights)  # [N, E]
        return sum(dense[:, e, None] * self._expert(e, rows) for e in range(self.w2.shape[0]))

    def _routed_rows(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for e in range(self.w2.shape[0]):
            n, k = torch.where(experts == e)  # sync: prefill only, never inside a decode step
            out.index_add_(0, n, weights[n, k, None] * self._expert(e, rows[n]))
        return out

    def _expert(self, e: int, rows: Tensor) -> Tensor:
        gate, up = F.linear(rows, self.w13[e]).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.w2[e])


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def prefill(model: Transformer, prompts: list[list[int]], n_cached: int = 0,
            chunk: int = PREFILL_CHUNK) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Fill the cache with all but the last token of each prompt, which is the first step's input.

    The first n_cached tokens are in the cache already. Yields per chunk (pos [B, T], next_tokens [B, T], features
    [B, T, dim], mask [B, T, S]), next_tokens being the token after each position. Rows are padded on the right: what
    padding leaves in the cache lies past the row's end, and no token sees it before the row has grown over it.
    """
    device = model.inv_freq.device
    length, n_slot = max(map(len, prompts)), model.kv_cache.shape[4]
    padded = torch.tensor([prompt + [0] * (length - len(prompt)) for prompt in prompts], device=device)
    for begin in range(n_cached, length - 1, chunk):
        end = min(begin + chunk, length - 1)
        pos = torch.arange(begin, end, device=device).expand(len(prompts), -1)
        mask = causal_mask(pos, bucket(end, n_slot))
        yield pos, padded[:, begin + 1:end + 1], model.features(padded[:, begin:end], pos, mask=mask), mask


# From logits to tokens


class Sampling(NamedTuple):
    """Options of sampling; temperature 0 is greedy decoding."""
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self) -> None:
        """Raises ValueError, naming the option and its value, for one that is out of range."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} is not a number of 0 or more")
        if self.top_k is not None and not self.top_k >= 1:
            raise ValueError(f"top_k {self.top_k} is not a number of 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not a number above 0, up to 1")


def logits_to_probs(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                    top_p: float | None = None) -> Tensor:
    """The distribution that is sampled from, [..., V] -> [..., V] fp32, for decoding, drafting and verification alike.

    Temperature, then the top_k largest logits, then the smallest set of tokens whose probability reaches top_p, as
    transformers orders them. Temperature 0 is the limit: all mass on the largest logit.
    """
    if not isinstance(logits, Tensor):
        logits = logits.full()  # tp.ShardedLogits
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # shifted first: no overflow however cold it is
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        # On a GPU a sort is quick, and nothing may be decided by values; nor in a graph of torch.compile.
        by_values = probs.is_cpu and not torch.compiler.is_compiling()
        probs = (nucleus_by_the_likeliest if by_values else nucleus)(probs, top_p)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens that holds top_p keeps its probabilities, the rest has none: [..., V]."""
    ordered, tokens = torch.sort(probs, dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # mass of the likelier tokens: 0 for the first, which always stays
    return torch.zeros_like(probs).scatter(-1, tokens, ordered.masked_fill(before >= top_p, 0))


@torch.jit.script_if_tracing
def nucleus_by_the_likeliest(probs: Tensor, top_p: float) -> Tensor:
    """`nucleus`, to the bit, by the few likeliest tokens of each row that they hold top_p in; other rows are sorted.

    On a CPU a sort of the whole vocabulary takes 20 times as long. TorchScript keeps the decisions in a trace.
    """
    V, n = probs.shape[-1], 256
    if V <= n:
        return nucleus(probs, top_p)
    rows = probs.reshape(-1, V)
    out, waiting = torch.zeros_like(rows), torch.arange(rows.shape[0])
    # In fp64 there is room to tell equals apart, the lower token first: by less than fp32 numbers differ at least, 2^-24.
    order = 1 - torch.arange(V, dtype=torch.double) * 2.0 ** -44
    while n < V and len(waiting) > 0:
        some = rows[waiting]
        tokens = (some.double() * order).topk(n, dim=-1).indices
        ordered = some.gather(-1, tokens)
        before = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(some).scatter(-1, tokens, ordered.masked_fill(before >= top_p, 0))
        holds = before[:, -1] >= top_p + 1e-5       # more than sums in another order may differ by
        out[waiting[holds]] = kept[holds]
        waiting = waiting[~holds]
        n = n * 16
    if len(waiting) > 0:
        out[waiting] = nucleus(rows[waiting], top_p)
    return out.view_as(probs)


def sample(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token a row, [..., V] -> [...], by a race of exponential clocks: no host synchronisation.

    NOT_FINITE where a row holds NaN.
    """
    clocks = torch.empty_like(probs).exponential_(generator=generator).clamp_min_(1e-30)
    return tokens_of_finite((probs / clocks).max(-1))


def next_tokens(logits: Tensor, sampling: Sampling) -> Tensor:
    """[..., V] -> [...]: the largest logit at temperature 0, else a draw from torch's own generator.

    NOT_FINITE for a row that holds NaN or +inf, or nothing but -inf; single tokens at -inf are merely impossible.
    """
    if sampling.temperature == 0:
        return tokens_of_finite(logits.max(-1))  # argmax takes four times as long on a CPU in bf16
    return sample(logits_to_probs(logits, *sampling))


def tokens_of_finite(largest: "torch.return_types.max") -> Tensor:
    """Indices of the largest values, NOT_FINITE for those that are NaN or infinite: torch's max is NaN where one value is."""
    return largest.indices.masked_fill(largest.values - largest.values != 0, NOT_FINITE)


# Loading


def resolve_checkpoint(checkpoint: str | Path, weights: bool = True) -> Path:
    """The local folder of a checkpoint: itself, or the hub's copy fetched into huggingface-hub's cache, with or without weights.

    Raises FileNotFoundError or ValueError in one line for a repository that is missing, gated or out of reach.
    """
    try:
        folder = Path(checkpoint).expanduser()
    except RuntimeError:
        raise ValueError(f"{checkpoint}: ~ stands for a home directory, and this user has none") from None
    if folder.is_dir():
        return folder
    name = str(checkpoint)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise FileNotFoundError(f"{checkpoint}: no such folder (a hub id has the form owner/name)")
    for variable in ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):  # empty, they put the cache into the working directory
        if not os.environ.get(variable, "unset"):
            del os.environ[variable]
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
    patterns = ["*.json", "tokenizer.model", "merges.txt", "*.jinja"]
    try:
        wanted = [*patterns, "model*.safetensors"] if weights else patterns
        # No folder but additional_chat_templates/.
        local = snapshot_download(name, allow_patterns=wanted, ignore_patterns=["[!a]*/*"])
        if weights and find_weights(Path(local)) is None:
            local = snapshot_download(name, allow_patterns=["pytorch_model*.bin"], ignore_patterns=["*/*"])
    except GatedRepoError:
        raise ValueError(f"{name} is gated: accept its licence on its hub page, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"{name}: neither a folder here nor a repository on the hub") from None
    except LocalEntryNotFoundError:
        raise FileNotFoundError(f"{name}: not a folder here, not in the hub's cache, and the hub cannot be reached; "
                                "give a local folder or restore the network") from None
    except OSError as error:  # httpx and requests failures are both OSError or wrapped in it by huggingface-hub
        raise ValueError(f"{name}: fetching from the hub failed: {_one_line(error)}") from None
    return Path(local)


def install_quantized(model: nn.Module, folder: Path) -> bool:
    """Where the folder holds quantize.json, put empty quantised modules into a model on the meta device."""
    settings = quantize_settings(folder)
    if settings:
        from quantized import install
        install(model, settings, folder / "quantize.json")
    return bool(settings)


def quantize_settings(folder: Path) -> dict:
    """What quantize.json says; empty where there is none."""
    return read_json(folder / "quantize.json", absent={})


Part = Callable[[str, list[int]], tuple[slice, ...]]  # a key and the shape stored under it -> the slice to read


@torch.no_grad()
def load_weights(targets: dict[str, Tensor], folder: Path, optional: dict[str, Tensor] = {},
                 part: Part | None = None, rename: Callable[[str], str] = str) -> None:
    """Copy every tensor of a checkpoint to its place. Strict: all keys, all shapes, nothing left over, nothing twice.

    targets   the file's key -> the tensor to fill
    optional  keys that may be there too, of these shapes; their values are not read
    part      which slice of each stored tensor to take, where not the whole
    rename    the file's key -> the one used here, where a file has names of its own
    """
    missing = set(targets)
    renamed_part = part and (lambda key, shape: part(rename(key), shape))
    for key, tensor, file in iterate_weights(folder, part=renamed_part):
        key = rename(key)
        if key.endswith("rotary_emb.inv_freq"):  # old conversions saved RoPE's constants
            continue
        target = targets.get(key, optional.get(key))
        if target is None:
            raise ValueError(f"{file}: unexpected key {key!r}: config.json describes no such weight")
        if tensor.shape != target.shape:
            raise ValueError(f"{file}: {key} has shape {list(tensor.shape)}, config.json makes it {list(target.shape)}")
        if key in targets:
            if key not in missing:
                raise ValueError(f"{file}: {key} is there a second time, under another name or in another shard")
            target.copy_(tensor)
            missing.discard(key)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(targets)} weights are missing, first {min(missing)!r}")


def _hf_targets(model: Transformer) -> dict[str, Tensor]:
    """Hugging Face's key -> the part of our parameter it fills (q, k, v and gate, up are fused here)."""
    c = model.config
    targets = {"model.embed_tokens.weight": model.tok_embeddings.weight, "model.norm.weight": model.norm.weight}
    if not c.tie_word_embeddings or not isinstance(model.output, nn.Linear):  # a quantised LM head is never tied
        targets |= {f"lm_head.{kind}": tensor for kind, tensor in stored(model.output).items()}
    for i, block in enumerate(model.layers):
        targets |= {f"model.layers.{i}.{key}": part for key, part in block_targets(block, c).items()}
    return targets


def block_targets(block: TransformerBlock, config: ModelArgs) -> dict[str, Tensor]:
    """`_hf_targets` of one layer, keys relative to it. EAGLE heads hold one layer under the same names."""
    attention, ffn = block.attention, block.feed_forward
    q_rows, kv_rows = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    targets = {"post_attention_layernorm.weight": block.ffn_norm.weight}
    targets |= {f"self_attn.o_proj.{kind}": tensor for kind, tensor in stored(attention.wo).items()}
    for kind, tensor in stored(attention.wqkv).items():
        parts = tensor.split((q_rows, kv_rows, kv_rows))
        targets |= {f"self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts)}
    if isinstance(block.attention_norm, RMSNorm):
        targets["input_layernorm.weight"] = block.attention_norm.weight
    if config.qk_norm:
        targets["self_attn.q_norm.weight"] = attention.q_norm.weight
        targets["self_attn.k_norm.weight"] = attention.k_norm.weight
    if not config.n_expert:
        for kind, tensor in stored(ffn.w13).items():
            targets[f"mlp.gate_proj.{kind}"], targets[f"mlp.up_proj.{kind}"] = tensor.chunk(2)
        return targets | {f"mlp.down_proj.{kind}": tensor for kind, tensor in stored(ffn.w2).items()}
    targets["block_sparse_moe.gate.weight"] = ffn.gate.weight
    for e in range(config.n_expert):
        prefix = f"block_sparse_moe.experts.{e}"
        for kind, tensor in stored(ffn.w13).items():
            targets[f"{prefix}.w1.{kind}"], targets[f"{prefix}.w3.{kind}"] = tensor[e].chunk(2)
        targets |= {f"{prefix}.w2.{kind}": tensor[e] for kind, tensor in stored(ffn.w2).items()}
    return targets


def stored(part: nn.Module | Tensor) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds of a linear, or of stacked experts, by the last part of their keys."""
    if isinstance(part, Tensor):
        return {"weight": part}
    return dict(part.named_parameters()) if isinstance(part, nn.Linear) else part.stored()


def iterate_weights(folder: Path, wanted: Callable[[str], bool] = lambda key: True,
                    part: Part | None = None) -> Iterator[tuple[str, Tensor, Path]]:
    """Yield (key, tensor, file) over all shards of a folder, safetensors preferred, one shard open at a time.

    Only tensors whose key is `wanted` are read, of each the `part` or the whole.
    """
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} holds an adapter (adapter_config.json): merge it into its base model")
    file = find_weights(folder)
    if file is None:
        raise FileNotFoundError(f"{folder} has no weights: neither model.safetensors nor pytorch_model.bin, "
                                "nor an index of shards of them")
    if file.suffix != ".json":
        yield from _read_shard(file, wanted, part)
        return
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or {type(name) for name in weight_map.values()} != {str}:
        raise ValueError(f"{file} has no weight_map: it does not say which shard holds which weight")
    for name in sorted(set(weight_map.values())):
        yield from _read_shard(folder / name, wanted, part)


def find_weights(folder: Path) -> Path | None:
    """The file of weights, or the index of its shards, that counts where several lie there: as in transformers."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return next((folder / name for name in names if (folder / name).exists()), None)


def _read_shard(file: Path, wanted: Callable[[str], bool], part: Part | None) -> Iterator[tuple[str, Tensor, Path]]:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: the checkpoint is incomplete, fetch it again")
    refuse_lfs_pointer(file)
    from safetensors import SafetensorError, safe_open
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as shard:
                for key in filter(wanted, shard.keys()):
                    if part is None:
                        yield key, shard.get_tensor(key), file
                    else:
                        whole = shard.get_slice(key)
                        yield key, whole[part(key, whole.get_shape())], file
        else:
            mmap = zipfile.is_zipfile(file)  # files older than PyTorch 1.6 are read whole
            content = torch.load(file, map_location="cpu", mmap=mmap, weights_only=True)
            if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
                raise RuntimeError("it does not hold a dictionary of tensors")
            for key in filter(wanted, content):
                yield key, content[key] if part is None else content[key][part(key, list(content[key].shape))], file
    except pickle.UnpicklingError:  # torch's own words advise to let the file run code
        raise ValueError(f"{file} is corrupt, or holds more than tensors, which could run code: not read") from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file} is corrupt, truncated or not a weights file: {_one_line(error)}") from None


def read_json(file: Path, absent: dict | None = None) -> dict:
    """Parse a JSON object, with one-line errors. `absent` is what stands for a file that is not there, if it may be."""
    if not file.exists():
        if absent is not None:
            return absent
        raise FileNotFoundError(f"{file} is missing")
    refuse_lfs_pointer(file)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    return content


def read_ids(file: Path) -> list[int]:
    """Token ids of a file: JSON, a list or {"ids": list}, or a list or tensor that torch saved, as SGLang's token maps are.

    Raises FileNotFoundError or ValueError in one line.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    refuse_lfs_pointer(file)
    with open(file, "rb") as content:
        is_torch = content.read(2) in (b"PK", b"\x80\x02")  # a zip archive, or a pickle, as before PyTorch 1.6
    try:
        content = torch.load(file, map_location="cpu", weights_only=True) if is_torch else json.loads(file.read_text(encoding="utf-8-sig"))
    except pickle.UnpicklingError:
        raise ValueError(f"{file} is corrupt, or holds more than ids, which could run code: it is not read") from None
    except (ValueError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is neither valid JSON nor a file that torch saved: {_one_line(error)}") from None
    ids = content.get("ids") if isinstance(content, dict) else content
    ids = ids.tolist() if isinstance(ids, Tensor) else ids
    if not isinstance(ids, list):
        raise ValueError(f"{file}: a draft vocabulary is a list of token ids, or a JSON object with one under \"ids\"")
    return [int(i) if isinstance(i, float) and i.is_integer() else i for i in ids]


def refuse_lfs_pointer(file: Path) -> None:
    """Git without LFS leaves three lines of text in the place of a large file."""
    with open(file, "rb") as content:
        if content.read(64).startswith(b"version https://git-lfs.github.com/spec/"):
            raise ValueError(f"{file} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`")


def _one_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


# Modules laid out for the CPU


class PackedLinear(nn.Module):
    """bf16 linear whose weight oneDNN has reordered once, instead of at every call: 1.6x a plain linear at one row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(linear.weight.data, 8), persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight in ordinary layout [out, in]: a copy."""
        return self.packed.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # the tracer cannot record the empty list, which has no type
            return _scripted_linear()(x, self.packed, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


@functools.cache
def _scripted_linear() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return torch.jit.CompilationUnit("""
def packed_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    scalars = torch.jit.annotate(List[Optional[Union[complex, float, int]]], [])
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", scalars, "")
""").packed_linear


class PackedRMSNorm(nn.Module):
    """RMSNorm as the layer norm of (x, -x), whose mean is zero: one fused kernel where F.rms_norm runs ten."""

    def __init__(self, norm: RMSNorm):
        super().__init__()
        self.eps = norm.eps
        self.register_buffer("weight", torch.cat((norm.weight.data, norm.weight.data)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(torch.cat((x, -x), -1), self.weight.shape, self.weight, None, self.eps)[..., :x.shape[-1]]


def pack_for_cpu(model: nn.Module) -> nn.Module:
    """Replace every bf16 linear and RMS norm of a model on the CPU by its packed form, where the processor gains."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return model
    packed = {nn.Linear: PackedLinear, RMSNorm: PackedRMSNorm}
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in packed and child.weight.dtype == torch.bfloat16 and child.weight.device.type == "cpu":
                setattr(module, name, packed[type(child)](child))
    return model
