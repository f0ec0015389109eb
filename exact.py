"""Makes a target on a CPU compute a token's bits in any block alike. Greedy EAGLE then gives plain decoding's tokens.

    make_exact(model)       # ValueError where that is not known to hold

What mixes numbers of several rows, or adds in an order that depends on them, is attention (attention.py) and products.
A library may have another kernel for one row than for a block, and others again on another CPU. So random rows go
through attention and each kind of product, alone and in blocks. Where one row alone has bits of its own, it gets a
companion. Where blocks differ there is no promise. Nothing is chosen by time: another run makes the same choices.

Shapes: T tokens, S cache slots read, K key/value heads, G = H / K query heads each, D head dim.
"""
import torch
from torch import nn

from attention import MAX_TOKENS, attend, rows_seen
from config import ModelArgs
from linears import ROWS, IntLinear, PackedLinear, QuantLinear
from model import Transformer, attention_bias, causal_mask
from runtime import candidates

BLOCKS = (1, 2, 3, 4, 5, 8, 12, 16, 26, 32, 60, MAX_TOKENS, 3 * MAX_TOKENS)    # rows; the last are three sequences
N_OUTPUT = 1 << 16      # compared for each: of a kernel with an order of its own, one output in 3,000 is another


@torch.no_grad()
def make_exact(model: Transformer) -> None:
    """Raises ValueError on a GPU, in fp32 and fp16, for a mixture of experts, for a part of a model, and where sums on
    this CPU depend on the size of a block. The model then decodes as before."""
    weight = model.tok_embeddings.weight
    if weight.device.type != "cpu":
        raise ValueError("exact decoding is not available on a GPU: it has not been measured there")
    if weight.dtype != torch.bfloat16:
        raise ValueError("exact decoding is for targets in bfloat16, int8 and int4, not in "
                         f"{str(weight.dtype).removeprefix('torch.')}")
    if model.config.n_expert or torch.distributed.is_initialized():
        raise ValueError("exact decoding is for dense models in one process")
    if not attention_agrees(model.config):
        raise ValueError("exact decoding: on this CPU attention depends on the number of tokens in a block")
    quantised = {module: candidates(module, 1)[-1] for module in model.modules() if isinstance(module, QuantLinear)}
    for module, kernel in quantised.items():
        module.lay_out({kernel})
    products = [part for part in model.modules() if isinstance(part, nn.Linear | PackedLinear | IntLinear)]
    found, padded = {}, []
    for product in products:
        kind = type(product), product.in_features, product.out_features, getattr(product, "group_size", None)
        if kind not in found:
            found[kind] = blocks_apart(product)
        if found[kind] == {1} and isinstance(product, PackedLinear):
            padded.append(product)
        elif found[kind]:
            raise ValueError(f"exact decoding: on this CPU the product of {product.in_features} columns to "
                             f"{product.out_features} is another for {sorted(found[kind])} rows")
    for product in padded:
        product.pads_one_row = True
    for module, kernel in quantised.items():
        module.kernels, module.dense_from = dict.fromkeys(ROWS, kernel), MAX_TOKENS + 1
        module.lay_out({kernel, "dense"})
    model.is_exact = True


def blocks_apart(product: nn.Linear | PackedLinear | IntLinear) -> set[int]:
    """The numbers of rows for which this product's bits are not those of the largest block."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BLOCKS[-1], product.in_features, generator=generator).bfloat16()
    whole, enough = product(x), -(-N_OUTPUT // product.out_features)
    return {n for n in BLOCKS if any(not torch.equal(product(x[i:i + n]), whole[i:i + n])
                                     for i in range(0, min(enough, len(x) - n + 1), n))}


def attention_agrees(config: ModelArgs) -> bool:
    """Whether tokens at the end of 400 get the same bits one by one and in blocks, which read more slots."""
    K, D, n = config.n_kv_head, config.head_dim, 400
    G, first = config.n_head // K, n - MAX_TOKENS
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, n, K * (G + 2), D, generator=generator).bfloat16()
    cache = torch.randn(2, 1, K, n + 32, D, generator=generator).bfloat16()

    def by_blocks(n_token: int, room: int) -> torch.Tensor:
        parts = []
        for begin in range(first, n, n_token):
            end = min(begin + n_token, n)
            n_slot = -(-(end + room) // 16) * 16
            bias = attention_bias(causal_mask(torch.arange(begin, end)[None], n_slot), G, torch.bfloat16)
            seen = rows_seen(bias, cache, end - begin, n_slot)
            parts.append(attend(qkv[:, begin:end].contiguous(), cache[0, :, :, :n_slot], cache[1], seen))
        return torch.cat(parts)
    one_by_one = by_blocks(1, 0)
    return all(torch.equal(one_by_one, by_blocks(n_token, 16)) for n_token in (2, 5, 12, 26, MAX_TOKENS))
