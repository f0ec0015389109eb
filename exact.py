"""Makes a target on a CPU compute a token's bits in any block alike. Greedy EAGLE then gives plain decoding's tokens.

    make_exact(model)       # ValueError where that is not known to hold

What mixes numbers of several rows, or adds in an order that depends on them, is attention (attention.py) and products.
A library may have another kernel for one row than for a block, and others again on another CPU. So random rows go
through attention and each kind of product, alone and in blocks. Where one row alone has bits of its own, it gets a
companion; where large blocks have, they are cut. Where small ones differ there is no promise. Nothing is chosen by
time: another run makes the same choices.

Shapes: T tokens, S cache slots read, K key/value heads, G = H / K query heads each, D head dim.
"""
import torch
from torch import Tensor, nn

from attention import LEAST_SLOTS, MAX_TOKENS, attend, rows_seen
from config import ModelArgs
from linears import ROWS, IntLinear, PackedLinear, QuantLinear
from masks import attention_bias, causal_mask
from model import Transformer
from runtime import candidates

BLOCKS = (1, 2, 3, 4, 5, 8, 12, 16, 26, 32, 60, MAX_TOKENS, 3 * MAX_TOKENS)    # rows; the last are three sequences
CUTS = (32, 16)     # rows to cut blocks to: AMX has another kernel from 33 on
LENGTHS = (40, 100, 400)     # of texts whose last tokens are compared
N_OUTPUT = 1 << 16      # compared for each


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
    by_group = not attention_agrees(model.config, by_group=False)
    if by_group and not attention_agrees(model.config, by_group):
        raise ValueError("exact decoding: on this CPU attention depends on the number of tokens in a block")
    quantised = {module: candidates(module, 1)[-1] for module in model.modules() if isinstance(module, QuantLinear)}
    for module, kernel in quantised.items():
        module.lay_out({kernel})
    products = [part for part in model.modules() if isinstance(part, nn.Linear | PackedLinear | IntLinear)]
    found: dict[tuple, tuple[int, int]] = {}
    limits = {}
    for product in products:
        kind = type(product), product.in_features, product.out_features, getattr(product, "group_size", None)
        if kind not in found:
            found[kind] = rows_alike(product)
        limits[product] = found[kind]
    for product, (at_least, at_most) in limits.items():
        if (at_least, at_most) != (1, 0):
            assert isinstance(product, PackedLinear)
            product.rows_at_least, product.rows_at_most, product.block_at_most = at_least, at_most, MAX_TOKENS
    for module, kernel in quantised.items():
        module.kernels, module.dense_from = dict.fromkeys(ROWS, kernel), MAX_TOKENS + 1
        module.lay_out({kernel, "dense"})
    model.is_exact, model.by_group = True, by_group


def rows_alike(product: nn.Linear | PackedLinear | IntLinear) -> tuple[int, int]:
    """The least and the largest number of rows, 0 for any, between which this product's bits do not depend on it.

    Raises ValueError where that takes more than to pad one row or to cut blocks, which a PackedLinear can do.
    """
    whole = blocks_apart(product, BLOCKS[-1])
    if not whole:
        return 1, 0
    if isinstance(product, PackedLinear):
        if whole == {1}:
            return 2, 0
        for at_most in CUTS:
            if (apart := blocks_apart(product, at_most)) <= {1}:
                return 1 + len(apart), at_most
    raise ValueError(f"exact decoding: on this CPU the product of {product.in_features} columns to "
                     f"{product.out_features} is another for {sorted(whole)} rows")


def blocks_apart(product: nn.Linear | PackedLinear | IntLinear, size: int) -> set[int]:
    """The numbers of rows, up to `size`, for which this product's bits are not those in blocks of that size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BLOCKS[-1], product.in_features, generator=generator).bfloat16()
    if not isinstance(product, IntLinear):
        product, x = mirrored(product, x, generator)
    whole, enough = torch.cat([product(part) for part in x.split(size)]), -(-N_OUTPUT // product.out_features)
    return {n for n in BLOCKS if n <= size and any(not torch.equal(product(x[i:i + n]), whole[i:i + n])
                                                   for i in range(0, min(enough, len(x) - n + 1), n))}


def mirrored(product: nn.Linear | PackedLinear, x: Tensor,
             generator: torch.Generator) -> tuple[nn.Linear | PackedLinear, Tensor]:
    """A product of this kind and size, and rows, whose sums are 0 but for rounding: their bits show the order in which
    they were added, where rounding an ordinary sum to 16 bits hides it in all but one of 10^5."""
    half, odd = divmod(product.in_features, 2)
    weight = torch.randn(product.out_features, half, generator=generator)
    linear = nn.Linear(product.in_features, product.out_features, bias=False, device="meta")
    weight = torch.cat((weight, weight.new_zeros(len(weight), odd), weight.flip(1)), dim=1).bfloat16()
    linear.weight = nn.Parameter(weight, requires_grad=False)
    rows = torch.cat((x[:, :half + odd], -x[:, :half].flip(1)), dim=1)
    return PackedLinear(linear) if isinstance(product, PackedLinear) else linear, rows


def attention_agrees(config: ModelArgs, by_group: bool) -> bool:
    """Whether tokens at the end of a text get the same bits one by one and in blocks, which read more slots."""
    K, D, longest = config.n_kv_head, config.head_dim, max(LENGTHS)
    G = config.n_head // K
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, longest, K * (G + 2), D, generator=generator).bfloat16()
    cache = torch.randn(2, 1, K, longest + 32, D, generator=generator).bfloat16()

    def by_blocks(n: int, n_token: int, room: int) -> Tensor:
        parts = []
        for begin in range(max(n - MAX_TOKENS, 0), n, n_token):
            end = min(begin + n_token, n)
            n_slot = max(-(-(end + room) // 16) * 16, LEAST_SLOTS)
            bias = attention_bias(causal_mask(torch.arange(begin, end)[None], n_slot), G, torch.bfloat16)
            seen = rows_seen(bias, cache, end - begin, n_slot, by_group=by_group)
            parts.append(attend(qkv[:, begin:end].contiguous(), cache[0, :, :, :n_slot], cache[1], seen))
        return torch.cat(parts)

    return all(torch.equal(one_by_one, by_blocks(n, n_token, 16))
               for n in LENGTHS for one_by_one in [by_blocks(n, 1, 0)] for n_token in (2, 5, 12, 26, MAX_TOKENS))
