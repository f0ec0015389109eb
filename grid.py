"""The grid of quantised weights: which one a checkpoint has, rounding to it, and how it is stored.

    format = Format("int4", group_size=32)
    stored = round_to_nearest(weight, format)                   # {"weight": q, "scales": ..., "zeros": ...}
    dequantize(stored["weight"], stored["scales"], stored["zeros"])

A weight w [N, K] is stored as whole numbers q. Each group of columns of a row has a scale, and in int4 a zero point
too: w = q * scale + zero. A checkpoint stores these under the key of the weight:

    *.weight    int8 [N, K], q from -127 to 127; or uint8 [N, K / 2], two q of -8 to 7 in a byte as q + 8, the even
                column in the low half
    *.scales    [N, G]; quantize.py writes bfloat16, and for int8 one group a row
    *.zeros     [N, G]: int4, and int8 of other tools (hub_formats.py)
    *.order     int64 [K]: column j of the stored weight is column order[j] of w; of other tools only

Shapes: N rows and K columns of a weight, G groups of a row.
"""
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

LEVELS = {"int8": (-127, 127), "int4": (-8, 7)}
GROUP_SIZES = (32, 64, 128)
T = TypeVar("T")


class Format(NamedTuple):
    mode: str
    group_size: int | None = None   # columns; None is the whole row, as int8 of quantize.py always has
    int8_zeros: bool = False        # int8 has zero points; int4 always has
    reordered: bool = False         # the columns of the stored weight stand in an order of their own

    @property
    def has_zeros(self) -> bool:
        return self.mode == "int4" or self.int8_zeros

    @classmethod
    def from_settings(cls, settings: dict, file: Path | str = "quantize.json") -> "Format":
        """The format that a quantize.json names. Raises ValueError for one that this file does not know."""
        mode, group_size = settings.get("mode"), settings.get("group_size")
        if mode not in LEVELS:
            raise ValueError(f"{file}: mode {mode!r} is not supported (int8 and int4 are)")
        if group_size not in ((None,) if mode == "int8" else GROUP_SIZES):
            raise ValueError(f"{file}: group_size {group_size!r} is not supported for {mode} "
                             "(int8 has none; int4 has 32, 64 or 128)")
        if settings.get("lm_head") not in (None, *LEVELS):
            raise ValueError(f"{file}: lm_head {settings['lm_head']!r} is not supported (int8 and int4 are)")
        return cls(mode, group_size)

    def of_lm_head(self, mode: str) -> "Format":
        """The format of an LM head in this mode, in a model whose layers have the format `self`."""
        return Format(mode, None if mode == "int8" else self.group_size or GROUP_SIZES[0])

    def n_group(self, in_features: int) -> int:
        """Groups of a row. Raises ValueError if they do not fill it."""
        group_size = self.group_size or in_features
        if in_features % group_size:
            fits = [size for size in GROUP_SIZES if in_features % size == 0]
            raise ValueError(f"group size {group_size} does not divide a row of {in_features} weights"
                             + (f": {' or '.join(map(str, fits))} does" if fits else ", and neither does any other"))
        return in_features // group_size


# Rounding and storage


def fit_grid(groups: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """groups [..., g] fp32 -> scale, zero [...], rounded to values of bfloat16."""
    if mode == "int8":
        scale = groups.abs().amax(-1) / 127
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        scale = (high - low) / 15
    scale = scale.clamp_min(1e-30).bfloat16().float()   # unclamped, 0 for a group of equal weights
    zero = torch.zeros_like(scale) if mode == "int8" else (low + 8 * scale).bfloat16().float()
    return scale, zero


def to_grid(weight: Tensor, scale: Tensor, zero: Tensor, mode: str) -> Tensor:
    """The nearest q of each weight, fp32; scale and zero broadcast against it."""
    return ((weight - zero) / scale).round().clamp(*LEVELS[mode])


def round_to_nearest(weight: Tensor, format: Format) -> dict[str, Tensor]:
    """weight [..., N, K] -> what a checkpoint stores of it."""
    groups = weight.float().unflatten(-1, (format.n_group(weight.shape[-1]), -1))
    scale, zero = fit_grid(groups, format.mode)
    return pack(to_grid(groups, scale[..., None], zero[..., None], format.mode).flatten(-2), scale, zero, format.mode)


def pack(q: Tensor, scale: Tensor, zero: Tensor, mode: str) -> dict[str, Tensor]:
    """q [..., N, K], scale and zero [..., N, G] -> weight, scales, zeros as stored."""
    if mode == "int8":
        return {"weight": q.to(torch.int8), "scales": scale.bfloat16()}
    return {"weight": pack_nibbles((q + 8).to(torch.uint8)), "scales": scale.bfloat16(), "zeros": zero.bfloat16()}


def pack_nibbles(nibbles: Tensor) -> Tensor:
    """uint8 [..., K] from 0 to 15 -> [..., K / 2], the even column in the low half."""
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4


def unpack(weight: Tensor) -> Tensor:
    """As stored -> q [..., N, K] int8."""
    if weight.dtype == torch.int8:
        return weight
    return torch.stack((weight & 15, weight >> 4), -1).flatten(-2).view(torch.int8) - 8


def dequantize(weight: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """As stored -> [..., N, K] in the dtype of the scales, computed in fp32."""
    groups, scale = unpack(weight).unflatten(-1, (scales.shape[-1], -1)), scales.float()[..., None]
    groups = groups * scale if zeros is None else torch.addcmul(zeros.float()[..., None], groups, scale)
    return groups.flatten(-2).to(scales.dtype)


# Linears of a checkpoint that are one linear here


# The last part of a linear's name in a checkpoint -> its name in model.py. Other linears, routers, are not quantised.
PARTS = {"q_proj": "wqkv", "k_proj": "wqkv", "v_proj": "wqkv", "o_proj": "wo", "gate_proj": "w13", "up_proj": "w13",
         "w1": "w13", "w3": "w13", "down_proj": "w2", "w2": "w2", "lm_head": "output"}


def agreed(formats: dict[str, T], names: Iterable[str]) -> dict[str, T]:
    """Those of `formats` that hold for all parts of a linear: q, k, v; gate, up; the experts of a layer.

    formats   the name of a linear in the checkpoint, "model.layers.0.self_attn.q_proj" -> its format, and anything else
              that the parts must have in common
    names     of all linears in the checkpoint
    """
    found: dict[str, list[T | None]] = {}
    for name in names:
        found.setdefault(linear_of(name), []).append(formats.get(name))
    return {name: format for name, format in formats.items()
            if linear_of(name) and all(other == format for other in found[linear_of(name)])}


def linear_of(name: str) -> str:
    """"model.layers.0.self_attn.q_proj" -> "layers.0.wqkv"; "" for what is never quantised."""
    layer, last = re.search(r"(layers\.\d+\.)?", name.removeprefix("model.")), name.split(".")[-1]
    return (layer[0] if layer else "") + PARTS[last] if last in PARTS else ""
