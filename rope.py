"""RoPE, the rotation by which keys and queries know their positions: plain, and stretched to long contexts.

    inv_freq = rope_inv_freq(args, "cpu")                                       # kept with a model: [D/2]
    rope = rope_cos_sin(input_pos, inv_freq, dtype, args.rope_scaling)          # once a pass
    rotated = apply_rope(x, rope)                                               # in each layer

    linear      all angles are divided by `factor`
    llama3      long wavelengths are stretched by `factor`, short ones are kept
    yarn        the same by another ramp (arXiv 2309.00071), and attention is made sharper
    dynamic     the base grows with the length of the text beyond the original context (NTK)
    longrope    one table of factors for texts within the original context, one beyond (arXiv 2402.13753)

The last two depend on the text's length. A prompt is rotated by its own whole length, a token after it by the length up
to itself, and a key in a cache keeps the rotation that it was stored with. So transformers does it, if the prompt is
one pass and each new token another. A draft counts as a token that ends its text.

Shapes: B batch, T new tokens, D head dim.
"""
import math

import torch
from torch import Tensor

from config import ModelArgs


def rope_inv_freq(args: ModelArgs, device: torch.device | str | None = None) -> Tensor:
    """Angle per position of each of the D/2 planes that RoPE rotates: [D/2] fp32. For longrope [2, D/2], for short and
    for long texts; for dynamic those within the original context."""
    exponent = torch.arange(0, args.head_dim, 2, dtype=torch.int64, device=device).float() / args.head_dim
    inv_freq = 1.0 / args.rope_theta ** exponent
    scaling = args.rope_scaling
    if scaling is None or scaling["rope_type"] == "dynamic":
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    if scaling["rope_type"] == "longrope":
        return inv_freq / torch.tensor([scaling["short_factor"], scaling["long_factor"]], device=device)
    if scaling["rope_type"] == "llama3":
        turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        first, last = yarn_planes(args)
        kept = 1 - ((torch.arange(len(inv_freq), device=device) - first) / (last - first)).clamp(0, 1)
    return inv_freq * (kept + (1 - kept) / scaling["factor"])


def yarn_planes(args: ModelArgs) -> tuple[float, float]:
    """The planes between which YaRN goes over from kept to stretched: those that turn beta_fast and beta_slow times in
    the original context."""
    scaling, D = args.rope_scaling or {}, args.head_dim
    length = scaling["original_max_position_embeddings"]
    first, last = (D * math.log(length / (scaling.get(key) or turns) / (2 * math.pi)) / (2 * math.log(args.rope_theta))
                   for key, turns in (("beta_fast", 32), ("beta_slow", 1)))
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, D - 1)
    return first, last + 0.001 * (first == last)


def attention_factor(scaling: dict) -> float:
    """What cosines and sines are multiplied by: yarn and longrope make attention over long texts sharper."""
    kind = scaling["rope_type"]
    if kind not in ("yarn", "longrope"):
        return 1.0
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    factor = max(scaling["factor"], 1)
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(scaling["original_max_position_embeddings"]))
    sharper = lambda scale: 1 + 0.1 * scale * math.log(factor)
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return sharper(scaling["mscale"]) / sharper(scaling["mscale_all_dim"])
    return sharper(1)


def knows_length(scaling: dict | None) -> bool:
    """Whether the frequencies depend on the length of the text."""
    return scaling is not None and scaling["rope_type"] in ("dynamic", "longrope")


def keys_serve(args: ModelArgs, length: int) -> bool:
    """Whether a token's key is the same in every text of up to so many tokens, so that texts may share a cache."""
    scaling = args.rope_scaling
    return scaling is None or not knows_length(scaling) or length <= scaling["original_max_position_embeddings"]


def rope_cos_sin(input_pos: Tensor, inv_freq: Tensor, dtype: torch.dtype, scaling: dict | None = None,
                 length: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[B, T] positions -> cosines and signed sines [B, T, 1, D] for `apply_rope`.

    inv_freq and scaling as of `rope_inv_freq`. length [B, T] or [B, 1] is that of the text whose frequencies a token
    gets, where they depend on it; by default the text ends with the token itself.
    """
    if scaling is not None and knows_length(scaling):
        length = (input_pos + 1 if length is None else length)[:, :, None, None]
        original = scaling["original_max_position_embeddings"]
        if scaling["rope_type"] == "longrope":
            inv_freq = torch.where(length > original, inv_freq[1], inv_freq[0])             # [B, T or 1, 1, D/2]
        else:   # the plane that turns least is stretched most
            stretch = scaling["factor"] * length.clamp(min=original) / original - (scaling["factor"] - 1)
            last = int(inv_freq.shape[0]) - 1
            inv_freq = inv_freq * stretch ** (torch.arange(last + 1, device=inv_freq.device) / -last)
    # Cosine is even and sine is odd: the first half of the frequencies, negated, gives the signs of apply_rope.
    angle = input_pos[:, :, None, None] * torch.cat((-inv_freq, inv_freq), dim=-1)
    cos, sin = angle.cos(), angle.sin()
    if scaling is not None and (factor := attention_factor(scaling)) != 1:
        cos, sin = cos * factor, sin * factor
    return cos.to(dtype), sin.to(dtype)


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate x [B, T, heads, D] in the planes (i, i + D/2), the pairing of Hugging Face's weights."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(int(x.shape[-1]) // 2, -1), sin)
