"""Weights that other tools quantised to 4 or 8 bits: GPTQ, AWQ and compressed-tensors, read into the grid of grid.py.

    found = settings(config)                        # what config.json says, or a refusal; None for 16 bits
    parts = find_parts(shapes, found, read, file)   # the quantised linears among the keys of a checkpoint, by name
    native(tensors, parts[name])                    # {"weight": q, "scales": ..., "zeros": ...} as grid.py stores them

Each of these formats has w = (u - z) * s, with whole numbers u and z of 4 or 8 bits and a scale s for each group of
columns. So q = u - 8 (or u - 128), scale = s and zero = (8 - z) * s: the same values, to the last bit. Which linears
are quantised, with how many bits and in groups of which size, follows from the keys and shapes in the files.

    GPTQ                  qweight [K / n, N], qzeros [G, N / n], scales [G, N], g_idx [K]
    AWQ                   qweight [K, N / n], qzeros [G, N / n], scales [G, N]
    compressed-tensors    weight_packed [N, K / n], weight_scale [N, G], weight_zero_point [N / n, G], weight_g_idx [K],
      pack-quantized      weight_shape [2]
      int-quantized       weight int8 [N, K], weight_scale [N, G], weight_zero_point int8 [N, G]

Shapes: N rows and K columns of a weight, G groups of a row, n numbers in an int32.
"""
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from grid import GROUP_SIZES, Format, agreed, dequantize, pack_nibbles

METHODS = ("gptq", "awq", "compressed-tensors")
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]    # the nibble of an int32 in which each of 8 neighbouring rows lies
# The keys of a linear: the one that shows it, those it needs, and those it may have.
KEYS = {
    "gptq": ("qweight", ("qzeros", "scales"), ("g_idx", "bias")),
    "awq": ("qweight", ("qzeros", "scales"), ("bias",)),
    "pack-quantized": ("weight_packed", ("weight_scale", "weight_shape"),
                       ("weight_zero_point", "weight_g_idx", "bias")),
    "int-quantized": ("weight_scale", ("weight",), ("weight_zero_point", "weight_g_idx", "bias")),
}


class Settings(NamedTuple):
    """What a config.json says of a quantised checkpoint."""
    method: str
    layout: str         # a key of KEYS
    bits: int           # of most linears
    group_size: int     # of most; -1 is a whole row
    zero_offset: int    # what GPTQ adds to its stored zero points
    sym: bool           # GPTQ's zero points are all in the middle


class Part(NamedTuple):
    """A quantised linear of a checkpoint."""
    settings: Settings
    keys: tuple[str, ...]       # the last parts of its keys
    bits: int
    size: tuple[int, int]       # N, K
    n_group: int
    has_zeros: bool
    order: Tensor | None        # [K] the columns, sorted by group
    format: Format | None       # None if grid.py has none for it
    is_kept: bool = True        # in its format; else it is dequantised


# What config.json says


def settings(config: dict, beside: dict | None = None) -> Settings | None:
    """config: the content of config.json; beside: that of a quantize_config.json. None for a checkpoint in 16 bits.

    Raises ValueError that names the key and the value of what this file does not read.
    """
    said = config.get("quantization_config") or config.get("compression_config") or beside
    if not said:
        return None
    if not isinstance(said, dict):
        refuse("", said)
    method = said.get("quant_method", said.get("method", "gptq" if "bits" in said else None))
    if method not in METHODS:
        refuse("quant_method", method, f"{METHODS[0]}, {METHODS[1]} and {METHODS[2]} are")
    if method == "compressed-tensors":
        return compressed_tensors(said)
    bits: Any = said.get("bits")
    group_size = said.get("group_size", -1)
    if bits not in ((4, 8) if method == "gptq" else (4,)):
        refuse("bits", bits, "4 and 8 are" if method == "gptq" else "4 is")
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        refuse("group_size", group_size)
    layout = str(said.get("checkpoint_format") or said.get("format") or said.get("version") or "").lower()
    if method == "awq":
        layout = str(said.get("version") or layout or "gemm").lower()
        if layout != "gemm":
            refuse("version", layout, "gemm is")
        return Settings("awq", "awq", bits, group_size, 0, False)
    if said.get("is_marlin_format"):
        refuse("is_marlin_format", True, "give the checkpoint before its conversion to a kernel's layout")
    if layout not in ("", "gptq", "gptq_v2"):
        refuse("checkpoint_format", layout, "gptq and gptq_v2 are")
    return Settings("gptq", "gptq", bits, group_size, int(layout != "gptq_v2"), said.get("sym") is True)


def compressed_tensors(said: dict) -> Settings:
    if said.get("quantization_status", "compressed") not in ("compressed", "frozen"):
        refuse("quantization_status", said["quantization_status"], "compressed is")
    for key in ("kv_cache_scheme", "transform_config"):
        if said.get(key):
            refuse(key, said[key])
    sparsity = said.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        refuse("sparsity_config", sparsity)
    groups = said.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        refuse("config_groups", groups)
    found = []
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            refuse(f"config_groups.{name}", group)
        layout, weights = group.get("format") or said.get("format"), group["weights"]
        if layout not in ("pack-quantized", "int-quantized"):
            refuse("format", layout, "pack-quantized and int-quantized are")
        for key in ("input_activations", "output_activations"):
            if group.get(key):
                refuse(f"config_groups.{name}.{key}", "quantised activations", "weights alone are")
        bits, size, strategy = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy")
        if weights.get("type", "int") != "int":
            refuse(f"config_groups.{name}.weights.type", weights["type"], "int is")
        if bits not in ((4, 8) if layout == "pack-quantized" else (8,)):
            refuse(f"config_groups.{name}.weights.num_bits", bits, "4 and 8 are")
        if strategy not in (None, "group", "channel", "tensor"):
            refuse(f"config_groups.{name}.weights.strategy", strategy, "group, channel and tensor are")
        if size is not None and (type(size) is not int or size < -1 or size == 0):
            refuse(f"config_groups.{name}.weights.group_size", size)
        found.append(Settings("compressed-tensors", layout, bits, size or -1, 0, False))
    if len({one.layout for one in found}) > 1:
        refuse("config_groups", "several formats")
    return found[0]


def refuse(key: str, value: object, remedy: str = "") -> NoReturn:
    where = "quantization_config" + (f": {key}" if key else "")
    raise ValueError(f"config.json: {where} {str(value)[:80]!r} is not supported" + (f" ({remedy})" if remedy else ""))


def summary(found: Settings) -> dict:
    """About what a quantize.json would say, for those who choose a tree or plan memory, and the `tool`. No mode where
    the weights take 16 bits here."""
    size = GROUP_SIZES[-1] if found.group_size == -1 else kept_size(found.group_size)
    if size is None:
        return {"tool": found.method}
    return {"mode": f"int{found.bits}", "group_size": size if found.bits == 4 else None, "tool": found.method}


# The linears


def find_parts(shapes: dict[str, list[int]], found: Settings,
               read: Callable[[Callable[[str], bool]], Iterable[tuple[str, Tensor]]], file: object) -> dict[str, Part]:
    """The name of each quantised linear ("model.layers.0.self_attn.q_proj") -> how it lies in the files.

    shapes   of all tensors by key
    read     the tensors whose keys are wanted
    file     that errors name

    Raises ValueError for keys that are missing and shapes that do not fit together.
    """
    shown, needed, optional = KEYS[found.layout]
    kinds: dict[str, list[str]] = {}
    for key in shapes:
        name, _, kind = key.rpartition(".")
        kinds.setdefault(name, []).append(kind)
    names = [name for name in kinds if shown in kinds[name]]
    if not names:
        raise ValueError(f"{file}: config.json says {found.method}, and there is no weight of it: no key *.{shown}")
    for name in names:
        for kind in needed:
            if kind not in kinds[name]:
                raise ValueError(f"{file}: {name}.{shown} is there, {name}.{kind} is missing: "
                                 "the checkpoint is incomplete, fetch it again")
    said = dict(read(lambda key: key.endswith(("g_idx", ".weight_shape"))))
    parts = {}
    for name in names:
        keys = tuple(kind for kind in (shown, *needed, *optional) if kind in kinds[name])
        try:
            parts[name] = find_part({kind: shapes[f"{name}.{kind}"] for kind in keys}, found,
                                    {kind: said[f"{name}.{kind}"] for kind in keys if f"{name}.{kind}" in said})
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}") from None
    kept = agreed({name: (part.format, None if part.order is None else part.order.numpy().tobytes())
                   for name, part in parts.items() if part.format},
                  [name for name in kinds if name in parts or "weight" in kinds[name]])
    return {name: part._replace(is_kept=name in kept) for name, part in parts.items()}


def find_part(shapes: dict[str, list[int]], found: Settings, said: dict[str, Tensor]) -> Part:
    """shapes of the tensors, and the values that say how they lie, by the last part of the key. Raises ValueError where
    they do not fit together."""
    bits, g_idx = 8, said.get("g_idx", said.get("weight_g_idx"))
    for kind in ("qweight", "qzeros", "scales", "weight_packed", "weight"):
        if len(shapes.get(kind, [0, 0])) != 2:
            raise ValueError(f"{kind} has shape {shapes[kind]}, not two axes")
    if found.method == "compressed-tensors":
        n_group = shapes["weight_scale"][1] if len(shapes["weight_scale"]) == 2 else 1
        if found.layout == "pack-quantized":
            (N, K), packed = said["weight_shape"].tolist(), shapes["weight_packed"]
            bits = packed[1] * 32 // K if K else 0
            if bits not in (4, 8) or packed != [N, K * bits // 32]:
                raise ValueError(f"weight_packed has shape {packed}, which is neither 4 bits nor 8 of {N} x {K}")
        else:
            N, K = shapes["weight"]
        has_zeros = "weight_zero_point" in shapes
    else:
        (n_group, N), packed, zeros = shapes["scales"], shapes["qweight"], shapes["qzeros"]
        bits = zeros[1] * 32 // N if N else 0
        if bits not in (4, 8) or zeros != [n_group, N * bits // 32]:
            raise ValueError(f"qzeros of shape {zeros} and scales of shape {shapes['scales']} are neither 4 bits nor 8")
        K = packed[0] * (32 // bits if found.method == "gptq" else 1)
        if packed[1] * (1 if found.method == "gptq" else 32 // bits) != N:
            raise ValueError(f"qweight has shape {packed}, scales have {shapes['scales']}")
        has_zeros = not (found.sym and bits == 8)
    if n_group == 0 or K % n_group or (found.method != "compressed-tensors" and g_idx is None
                                       and found.group_size > 0 and K % found.group_size):
        raise ValueError(f"group size {found.group_size} does not divide a row of {K} weights")
    order = None
    if g_idx is not None:
        counts = g_idx.long().bincount(minlength=n_group) if len(g_idx) and g_idx.min() >= 0 else None
        if counts is None or counts.tolist() != [K // n_group] * n_group:
            raise ValueError(f"g_idx does not put {K // n_group} columns in each of {n_group} groups")
        order = g_idx.argsort(stable=True)
        if torch.equal(order, torch.arange(K)):
            order = None
    format, size = None, kept_size(K // n_group)
    if bits == 8 and (n_group == 1 or size):
        format = Format("int8", None if n_group == 1 else size, has_zeros, order is not None)
    elif bits == 4 and size:
        format = Format("int4", size, reordered=order is not None)
    return Part(found, tuple(shapes), bits, (N, K), n_group, has_zeros, order, format)


def kept_size(size: int) -> int | None:
    """The largest group size of grid.py that divides this one: its groups share their scale. None if there is none."""
    return next((kept for kept in reversed(GROUP_SIZES) if size % kept == 0), None)


# Their values


def native(tensors: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
    """The tensors of a linear by the last part of their keys -> what grid.py stores, scales and zeros in fp32; or the
    dequantised weight, where the part is not kept."""
    u, scale, z = READ[part.settings.layout](tensors, part)
    scale, middle = scale.float(), 8 if part.bits == 4 else 128
    if part.order is not None:
        u = u[:, part.order]
    stored = {"weight": pack_nibbles(u) if part.bits == 4 else (u ^ 128).view(torch.int8), "scales": scale}
    if part.has_zeros or part.bits == 4:
        stored["zeros"] = torch.zeros_like(scale) if z is None else (middle - z) * scale
    elif z is not None and (z != middle).any():
        raise ValueError("sym is true, and its zero points are not all in the middle")
    if part.is_kept and part.format is not None:
        if part.format.group_size:
            repeats = part.size[1] // part.n_group // part.format.group_size
            stored |= {kind: stored[kind].repeat_interleave(repeats, 1)
                       for kind in ("scales", "zeros") if kind in stored}
        if part.order is not None:
            stored["order"] = part.order
    else:
        weight = dequantize(stored["weight"], scale, stored.get("zeros"))
        if part.order is not None:
            weight = weight[:, part.order.argsort()]
        stored = {"weight": weight}
    if "bias" in tensors:
        stored["bias"] = tensors["bias"]
    return stored


def read_gptq(tensors: dict[str, Tensor], part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """u [N, K] uint8, scale [N, G], z [N, G]."""
    z = unpack_int32(tensors["qzeros"], part.bits).int() + part.settings.zero_offset
    return unpack_int32(tensors["qweight"].T, part.bits), tensors["scales"].T, (z & (2 ** part.bits - 1)).T


def read_awq(tensors: dict[str, Tensor], part: Part) -> tuple[Tensor, Tensor, Tensor]:
    u, z = (unpack_int32(tensors[kind], 4).unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1).T
            for kind in ("qweight", "qzeros"))
    return u, tensors["scales"].T, z.int()


def read_packed(tensors: dict[str, Tensor], part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
    z = tensors.get("weight_zero_point")
    if z is not None:
        z = unpack_int32(z.T, part.bits)[:, :part.size[0]].T.int()
    return unpack_int32(tensors["weight_packed"], part.bits), row_scales(tensors, part), z


def read_int8(tensors: dict[str, Tensor], part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
    z = tensors.get("weight_zero_point")
    return (tensors["weight"].view(torch.uint8) ^ 128, row_scales(tensors, part),
            None if z is None else z.int().view(-1, part.n_group).expand(part.size[0], -1) + 128)


def row_scales(tensors: dict[str, Tensor], part: Part) -> Tensor:
    """[N, G], also of one scale for the whole tensor."""
    return tensors["weight_scale"].view(-1, part.n_group).expand(part.size[0], -1)


READ: dict[str, Callable[[dict[str, Tensor], Part], Any]] = {
    "gptq": read_gptq, "awq": read_awq, "pack-quantized": read_packed, "int-quantized": read_int8}


def unpack_int32(packed: Tensor, bits: int) -> Tensor:
    """int32 [R, C] -> uint8 [R, C * 32 / bits], the lowest bits first."""
    values = packed.contiguous().view(torch.uint8)      # little-endian, as safetensors is
    return values if bits == 8 else torch.stack((values & 15, values >> 4), -1).flatten(1)


def convert(stream: Iterable[tuple[str, Tensor, Any]], parts: dict[str, Part]) -> Iterator[tuple[str, Tensor, Any]]:
    """A stream of (key, tensor, file) with the quantised linears as grid.py stores them. All else passes."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for key, tensor, file in stream:
        name, _, kind = key.rpartition(".")
        part = parts.get(name)
        if part is None or kind not in part.keys:
            yield key, tensor, file
            continue
        tensors = waiting.setdefault(name, {})
        tensors[kind] = tensor
        if len(tensors) < len(part.keys):
            continue
        try:
            stored = native(waiting.pop(name), part)
        except ValueError as error:
            raise ValueError(f"{file}: {name}: {error}") from None
        yield from ((f"{name}.{kind}", tensor, file) for kind, tensor in stored.items())
