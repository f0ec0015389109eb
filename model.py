"""LLaMA, Vicuna, Mistral, Mixtral, Qwen2, Qwen3 and Qwen3-MoE in one file: static KV caches, any block of new tokens.

    model = Transformer.from_pretrained("checkpoints/SmolLM2-135M-Instruct", dtype=torch.bfloat16)
    model.setup_caches(max_batch_size=1, max_seq_length=1024)
    logits, features = model(tokens, input_pos)

Position and cache slot are arguments of every call. The cache itself knows no length, so forgetting a rejected draft
costs nothing: its slots are written again. Checkpoints are Hugging Face folders as published, or hub ids.

Shapes: B batch, T new tokens, S cache slots, H query heads, K key/value heads, G = H / K, D head dim, E experts,
V vocabulary.
"""
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import MAX_TOKENS, OwnCache, Seen, attend, rows_seen
from checkpoint import load_weights, read_json, resolve_checkpoint
from config import ModelArgs
from linears import Experts, fold_orders, install_quantized, stored, stored_parts
from masks import attention_bias, bucket, causal_mask, hide_outside, slot_positions
from rope import apply_rope, knows_length, rope_cos_sin, rope_inv_freq
from runtime import tune

PREFILL_CHUNK = 512  # prompt tokens a pass

# On Hopper torch prefers cuDNN's attention, which makes a plan for every new length. A plan was reported to take 0.4 s
# (FunASR#3704): each prompt would wait that long for its first token.
torch.backends.cuda.enable_cudnn_sdp(False)


class Transformer(nn.Module):
    """The decoder. Its weights are frozen: this project trains EAGLE heads, never the target model."""
    inv_freq: Tensor    # [D/2], see rope_inv_freq
    kv_cache: Tensor    # see setup_caches; None before it is called
    is_exact = False    # a token gets the same bits in any block of up to MAX_TOKENS: see exact.py
    by_group = False    # for that, its attention multiplies rows by groups

    def __init__(self, config: ModelArgs):
        super().__init__()
        self.config = config
        # On the meta device `normal_` here, and `pow` in rope_inv_freq, would import torch's compiler: a second.
        embedding = torch.empty(config.vocab_size, config.dim)
        self.tok_embeddings = nn.Embedding.from_pretrained(embedding if embedding.is_meta else embedding.normal_())
        self.layers = nn.ModuleList(TransformerBlock(config.layer(i)) for i in range(config.n_layer))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("inv_freq", rope_inv_freq(config, "cpu").to(self.norm.weight.device), persistent=False)
        self.register_buffer("kv_cache", None, persistent=False)
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, device: torch.device | str = "cpu",
                        dtype: torch.dtype = torch.bfloat16, shard: Any = None,
                        choose_kernels: bool = True) -> "Transformer":
        """Load a Hugging Face folder, or a hub id, one tensor at a time, straight to `device` and `dtype`.

        shard           a tp.Shard: load the slices of its rank only; the model is that rank's part
        choose_kernels  of a quantised model, by measurement (runtime.tune); without it all products are dense

        Raises FileNotFoundError or ValueError with one line that names the file, key or value at fault.
        """
        folder = resolve_checkpoint(checkpoint)
        config = ModelArgs.from_config(read_json(folder / "config.json"))
        with torch.device("meta"):
            model = cls(config) if shard is None else shard.build_target(config)
            install_quantized(model, folder)
        model.to(dtype).to_empty(device=device)
        tied = config.tie_word_embeddings and isinstance(model.output, nn.Linear)
        if tied:  # to_empty gave the two names separate memory
            model.output.weight = model.tok_embeddings.weight
        model.inv_freq = rope_inv_freq(config, device)
        optional = {"lm_head.weight": model.output.weight} if tied else {}
        part = None if shard is None else shard.part(config)
        load_weights(_hf_targets(model), folder, optional, part)  # the file of a tied model may hold the matrix twice
        fold_orders(model)
        if shard is not None:
            shard.connect(model)    # all ranks wait for the one that reads slowest
        if choose_kernels:
            tune(model)
        return model.eval()

    def setup_caches(self, max_batch_size: int, max_seq_length: int) -> None:
        """Allocate `kv_cache` [n_layer, 2, B, K, S, D] for S = max_seq_length slots a row.

        Raises ValueError when S passes the model's context.
        """
        c = self.config
        if min(max_batch_size, max_seq_length) < 1:
            raise ValueError(f"caches of {max_batch_size} rows and {max_seq_length} slots: "
                             "at least 1 of each is needed")
        if max_seq_length > c.block_size:
            raise ValueError(f"max_seq_length {max_seq_length} is beyond the model's context of {c.block_size} tokens")
        weight = self.norm.weight
        self.kv_cache = torch.zeros(c.n_layer, 2, max_batch_size, c.n_kv_head, max_seq_length, c.head_dim,
                                    dtype=weight.dtype, device=weight.device)

    def forward(self, tokens: Tensor, input_pos: Tensor, cache_pos: Tensor | None = None,
                mask: Tensor | Seen | OwnCache | None = None, capture: tuple[int, ...] = (),
                rope_length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One pass over a block of new tokens.

        tokens     [B, T] int64
        input_pos  [B, T] or [T] int64: position of each token in its sequence, for RoPE
        cache_pos  [B, T] or [T] int64: cache slot each token's key and value go to; input_pos when None
        mask       [B, T, S] bool: the slots each token may see, its own among them. Only the first S slots are
                   read, S <= those allocated, so a narrow mask makes a short conversation in a long cache cheap.
                   None means causal: every slot up to the token's position. Or what `rows_seen` made (attention.py).
                   A sliding window narrows it further where a layer has one.
        capture    return the hidden states of these indices in the place of the features (EAGLE-3, section 3.1): j is
                   the residual stream before layer j, n_layer the state after the final norm
        rope_length  [B, T] or [B, 1]: the text's length, for RoPE that depends on it (rope.py). By default the text
                   ends with the last token where there is no mask, and with each token itself where there is one.

        Returns logits [B, T, V] and features [B, T, dim], the hidden state after the final norm, or the captured
        hidden states side by side, [B, T, len(capture) * dim]. Before `setup_caches` the block attends to itself alone.
        """
        last, captured = self.hidden_states(tokens, input_pos, cache_pos, mask, capture, rope_length)
        return self.output(last), captured

    def features(self, tokens: Tensor, input_pos: Tensor, cache_pos: Tensor | None = None,
                 mask: Tensor | Seen | OwnCache | None = None, capture: tuple[int, ...] = (),
                 rope_length: Tensor | None = None) -> Tensor:
        """The second value of `forward`, without the LM head."""
        return self.hidden_states(tokens, input_pos, cache_pos, mask, capture, rope_length)[1]

    def hidden_states(self, tokens: Tensor, input_pos: Tensor, cache_pos: Tensor | None,
                      mask: Tensor | Seen | OwnCache | None, capture: tuple[int, ...],
                      rope_length: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The hidden state after the final norm [B, T, dim], and the features that `forward` returns."""
        check_block(tokens, self.kv_cache)
        if not all(0 <= i <= len(self.layers) for i in capture):
            raise ValueError(f"capture {capture} does not lie within 0 and {len(self.layers)}, the number of layers")
        input_pos = input_pos.expand(tokens.shape)
        cache_pos = input_pos if cache_pos is None else cache_pos.expand(tokens.shape)
        x = self.tok_embeddings(tokens)
        if mask is None:
            mask = causal_mask(input_pos, None if self.kv_cache is None else self.kv_cache.shape[4])
            if rope_length is None and knows_length(self.config.rope_scaling):
                rope_length = input_pos.amax(-1, keepdim=True) + 1
        rope = rope_cos_sin(input_pos, self.inv_freq, x.dtype, self.config.rope_scaling, rope_length)
        bias, in_window = self.shown(mask, input_pos, cache_pos, x.dtype)
        states = {}
        for i, layer in enumerate(self.layers):
            if i in capture:
                states[i] = x
            shown = bias if layer.window is None else in_window
            x = layer(x, rope, shown, cache_pos, None if self.kv_cache is None else self.kv_cache[i])
        states[len(self.layers)] = last = self.norm(x)
        return last, torch.cat([states[i] for i in capture], dim=-1) if capture else last

    def shown(self, mask: Tensor | Seen | OwnCache, input_pos: Tensor, cache_pos: Tensor,
              dtype: torch.dtype) -> tuple[Any, Any]:
        """What layers with full attention get for a mask, and what those with a sliding window get."""
        if not isinstance(mask, Tensor):
            return mask, mask.in_window or mask
        window, kv_cache, n_token = self.config.sliding_window, self.kv_cache, input_pos.shape[1]
        n_all = n_token if kv_cache is None else kv_cache.shape[4]
        both: list[Any] = [attention_bias(mask, self.config.n_head // self.config.n_kv_head, dtype)]
        if window is not None and int(n_all) > window:
            pos = slot_positions(input_pos, None if kv_cache is None else cache_pos, n_all, both[0].shape[-1])
            both.append(hide_outside(both[0], pos, input_pos, window))
        if self.is_exact and kv_cache is not None and n_token <= MAX_TOKENS:
            both = [rows_seen(bias, kv_cache, n_token, bias.shape[-1], by_group=self.by_group) for bias in both]
        return both[0], both[-1]


def check_block(tokens: Tensor, kv_cache: Tensor | None) -> None:
    """Raise ValueError unless tokens are [B, T] integers that fit into kv_cache [..., B, K, S, D], if there is one."""
    if tokens.dim() != 2 or tokens.dtype not in (torch.long, torch.int):
        raise ValueError(f"tokens are [B, T] int64, not {list(tokens.shape)} {tokens.dtype}")
    if kv_cache is not None and (tokens.shape[0] > kv_cache.shape[-4] or tokens.shape[1] > kv_cache.shape[-2]):
        raise ValueError(f"{tokens.shape[0]} rows of {tokens.shape[1]} tokens do not fit into caches of "
                         f"{kv_cache.shape[-4]} rows and {kv_cache.shape[-2]} slots: call setup_caches")


class TransformerBlock(nn.Module):
    """Pre-norm decoder layer. EAGLE's draft layer is this one with `attention_norm` off (EAGLE, section 4.1).

    EAGLE-3's layer reads an input of width in_dim and adds its output to another tensor, the `residual`.
    """

    def __init__(self, config: ModelArgs, attention_norm: bool = True, in_dim: int | None = None):
        super().__init__()
        self.window = config.sliding_window     # the model hides what lies outside of it
        self.attention = Attention(config, in_dim)
        self.feed_forward = MoEFeedForward(config) if config.n_expert else FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps) if attention_norm else nn.Identity()
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor | Seen | OwnCache, cache_pos: Tensor,
                kv_cache: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """x [B, T, dim or in_dim], bias [B, 1, G*T, S], cache_pos [B, T], kv_cache [2, B, K, slots, D],
        residual [B, T, dim] (default: x) -> [B, T, dim]."""
        y = self.attention(self.attention_norm(x), rope, bias, cache_pos, kv_cache)
        x = (x if residual is None else residual) + y
        return x + self.feed_forward(self.ffn_norm(x))


class Attention(nn.Module):
    def __init__(self, config: ModelArgs, in_dim: int | None = None):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        rows = (config.n_head + 2 * config.n_kv_head) * config.head_dim
        self.wqkv = nn.Linear(in_dim or config.dim, rows, bias=config.qkv_bias)
        self.wo = nn.Linear(config.n_head * config.head_dim, config.dim, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor | Seen | OwnCache, cache_pos: Tensor,
                kv_cache: Tensor | None) -> Tensor:
        H, K, D = self.n_head, self.n_kv_head, self.head_dim
        qkv = self.wqkv(x).unflatten(2, (H + 2 * K, D))                           # [B, T, H + 2K, D]
        rotated = mixed = qkv.narrow(2, 0, H + K)
        if self.q_norm is not None and self.k_norm is not None:
            mixed = torch.cat((self.q_norm(mixed.narrow(2, 0, H)), self.k_norm(mixed.narrow(2, H, K))), dim=2)
        rotated.copy_(apply_rope(mixed, rope))  # in place, so that keys and values stay one block to write
        kv = qkv.narrow(2, H, 2 * K).unflatten(2, (2, K))
        if not isinstance(bias, (Tensor, Seen)):
            assert kv_cache is not None
            return self.wo(bias.attend(qkv, kv_cache))
        if kv_cache is None:
            k, v = kv.permute(2, 0, 3, 1, 4)                                      # [B, K, T, D]
        else:
            n_slot = bias.n_slot if isinstance(bias, Seen) else bias.shape[-1]
            k, v = write_cache(kv_cache, cache_pos, kv, n_slot)                   # [B, K, S, D]
        if isinstance(bias, Seen):
            assert kv_cache is not None
            return self.wo(attend(qkv, k, kv_cache[1], bias).view(len(x), -1, H * D))
        # The G query heads of a key/value head become G*T rows of one head. Keys and values are read once, and no
        # kernel needs to know about grouped queries.
        q = qkv.narrow(2, 0, H).unflatten(2, (K, H // K)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)               # [B, K, G*T, D]
        return self.wo(y.unflatten(2, (H // K, -1)).permute(0, 3, 1, 2, 4).flatten(2))


def write_cache(kv_cache: Tensor, cache_pos: Tensor, kv: Tensor, n_slot: int) -> Tensor:
    """Write kv [B, T, 2, K, D] into kv_cache [2, B, K, slots, D] at cache_pos [B, T].

    Returns a view of the first n_slot slots: [2, B, K, n_slot, D].
    """
    B = len(kv)
    if B == 1:  # takes a CPU a third of the general form's time
        kv_cache.narrow(1, 0, 1).index_copy_(3, cache_pos[0], kv.permute(2, 0, 3, 1, 4))
    else:
        kv_cache[:, torch.arange(B, device=kv.device)[:, None], :, cache_pos] = kv
    return kv_cache.narrow(1, 0, B).narrow(3, 0, n_slot)


class FeedForward(nn.Module):
    def __init__(self, config: ModelArgs):
        super().__init__()
        self.w13 = nn.Linear(config.dim, 2 * config.intermediate_size, bias=False)  # gate rows, then up rows
        self.w2 = nn.Linear(config.intermediate_size, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up)


class MoEFeedForward(nn.Module):
    """Mixtral, Qwen3-MoE: each token goes to its top experts, weighted by the router's probabilities.

    There are three ways to the same sum. For few rows: gather the weights of the chosen experts. For a block of drafts:
    run every expert over all rows, so that it is read once and no shape depends on the routing. For a long prefill,
    where arithmetic costs most: run each expert over the rows that chose it.
    """
    PREFILL_ROWS: int = 128  # more tokens of one sequence than any tree of drafts has

    def __init__(self, config: ModelArgs):
        super().__init__()
        E, dim, hidden = config.n_expert, config.dim, config.expert_size
        self.n_expert_active, self.norm_topk_prob = config.n_expert_active, config.norm_topk_prob
        self.gate = nn.Linear(dim, E, bias=False)
        self.w13 = Experts(E, dim, 2 * hidden)
        self.w2 = Experts(E, hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])                                       # [N, dim]
        probs = self.gate(rows).softmax(-1, dtype=torch.float)
        weights, experts = probs.topk(self.n_expert_active, dim=-1)             # [N, k]
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        if experts.numel() < self.w2.shape[0]:
            out = self._gathered(rows, weights, experts)
        elif x.shape[1] <= self.PREFILL_ROWS:
            out = self._every_expert(rows, weights, experts)
        else:
            out = self._routed_rows(rows, weights, experts)
        return out.view_as(x)

    def _gathered(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        if self.w13.routes_on_host:
            return torch.stack([functools.reduce(torch.add, (w * self._expert(e, row[None])[0] for w, e in zip(ws, es)))
                                for row, ws, es in zip(rows, weights, experts.tolist())])
        gate, up = torch.einsum("nd,nkhd->nkh", rows, self.w13[experts]).chunk(2, dim=-1)
        return torch.einsum("nk,nkh,nkdh->nd", weights, F.silu(gate) * up, self.w2[experts])

    def _every_expert(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        dense = rows.new_zeros(rows.shape[0], self.w2.shape[0]).scatter_(1, experts, weights)  # [N, E]
        parts = (dense[:, e, None] * self._expert(e, rows) for e in range(self.w2.shape[0]))
        return functools.reduce(torch.add, parts)

    def _routed_rows(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for e in range(self.w2.shape[0]):
            n, k = torch.where(experts == e)  # sync: prefill only, never inside a decode step
            out.index_add_(0, n, weights[n, k, None] * self._expert(e, rows[n]))
        return out

    def _expert(self, e: int, rows: Tensor) -> Tensor:
        gate, up = self.w13(rows, e).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up, e)


class RMSNorm(nn.RMSNorm):
    """Its weight may be wider than x: it is in fp32 while a head trains in 16 bits."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Chunk(NamedTuple):
    """A stretch of the prompts in the cache."""
    pos: Tensor         # [B, T]
    following: Tensor   # [B, T] the token after each position; 0 after the last one
    hidden: Tensor      # [B, T, dim] after the final norm
    features: Tensor    # [B, T, ...] as of `Transformer.features`
    mask: Tensor        # [B, T, S] bool

    def at(self, pos: Tensor, values: Tensor, earlier: Tensor | None) -> Tensor:
        """values [B, T, n] at position pos [B, 1]: [B, 1, n]. Before the chunk: what `earlier` chunks gave."""
        index = (pos - self.pos[:, :1])[:, :, None]
        found = values.gather(1, index.clamp(0, values.shape[1] - 1).expand(-1, -1, values.shape[2]))
        return found if earlier is None else torch.where(index < 0, earlier, found)


def prefill(model: Transformer, prompts: list[list[int]], n_cached: int = 0, chunk: int = PREFILL_CHUNK,
            capture: tuple[int, ...] = ()) -> Iterator[Chunk]:
    """Fill the cache with the prompts, whose first n_cached tokens are in it already, chunk by chunk.

    Rows are padded on the right. The padding's keys and values lie past the row's end and are overwritten before any
    token sees them.
    """
    device = model.inv_freq.device
    length, n_slot = max(map(len, prompts)), model.kv_cache.shape[4]
    lengths = torch.tensor([[len(prompt)] for prompt in prompts], device=device)
    padded = torch.tensor([prompt + [0] * (length + 1 - len(prompt)) for prompt in prompts], device=device)
    for begin in range(n_cached, length, chunk):
        end = min(begin + chunk, length)
        pos = torch.arange(begin, end, device=device).expand(len(prompts), -1)
        mask = causal_mask(pos, bucket(end, n_slot))
        hidden, features = model.hidden_states(padded[:, begin:end], pos, None, mask, capture, lengths)
        yield Chunk(pos, padded[:, begin + 1:end + 1], hidden, features, mask)


# Hugging Face's names of the weights


def _hf_targets(model: Transformer) -> dict[str, Tensor]:
    """Hugging Face's key -> the part of our parameter it fills (q, k, v and gate, up are fused here)."""
    c = model.config
    targets = {"model.embed_tokens.weight": model.tok_embeddings.weight, "model.norm.weight": model.norm.weight}
    if not c.tie_word_embeddings or not isinstance(model.output, nn.Linear):  # a quantised LM head is never tied
        targets |= {f"lm_head.{kind}": tensor for kind, tensor in stored(model.output).items()}
    for i, block in enumerate(model.layers):
        assert isinstance(block, TransformerBlock)
        targets |= {f"model.layers.{i}.{key}": part for key, part in block_targets(block, c).items()}
    return targets


def block_targets(block: TransformerBlock, config: ModelArgs) -> dict[str, Tensor]:
    """`_hf_targets` of one layer, without "model.layers.N.". EAGLE heads hold their layer under the same names."""
    attention, ffn = block.attention, block.feed_forward
    q_rows, kv_rows = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    targets = {"post_attention_layernorm.weight": block.ffn_norm.weight}
    targets |= {f"self_attn.o_proj.{kind}": tensor for kind, tensor in stored(attention.wo).items()}
    for kind, parts in stored_parts(attention.wqkv, (q_rows, kv_rows, kv_rows)).items():
        targets |= {f"self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts)}
    if isinstance(block.attention_norm, RMSNorm):
        targets["input_layernorm.weight"] = block.attention_norm.weight
    if attention.q_norm is not None and attention.k_norm is not None:
        targets["self_attn.q_norm.weight"] = attention.q_norm.weight
        targets["self_attn.k_norm.weight"] = attention.k_norm.weight
    if isinstance(ffn, FeedForward):
        for kind, parts in stored_parts(ffn.w13, [config.intermediate_size] * 2).items():
            targets[f"mlp.gate_proj.{kind}"], targets[f"mlp.up_proj.{kind}"] = parts
        return targets | {f"mlp.down_proj.{kind}": tensor for kind, tensor in stored(ffn.w2).items()}
    is_qwen = config.model_type == "qwen3_moe"
    moe, *names = ("mlp", "gate_proj", "up_proj", "down_proj") if is_qwen else ("block_sparse_moe", "w1", "w3", "w2")
    targets[f"{moe}.gate.weight"] = ffn.gate.weight
    for e in range(config.n_expert):
        gate, up, down = (f"{moe}.experts.{e}.{name}" for name in names)
        for kind, parts in stored_parts(ffn.w13, [config.expert_size] * 2, e).items():
            targets[f"{gate}.{kind}"], targets[f"{up}.{kind}"] = parts
        targets |= {f"{down}.{kind}": part for kind, (part,) in stored_parts(ffn.w2, [config.dim], e).items()}
    return targets
