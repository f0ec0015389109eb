"""Weight-only int8 and int4 modules for `model.Transformer` and `eagle_head.EagleHead`: the format, and the products.

    install(model, {"mode": "int4", "group_size": 32})     # empty modules in the place of the linears, then load
    quantize_in_place(model, Format("int8"))               # or round the weights that are there
    tune(model)                                            # measure once which kernel is the fastest, by rows and shape

Format. A weight w [N, K] is kept as whole numbers q with a scale, and for int4 a zero point, in bfloat16 for each group
of columns of a row: w = q * scale + zero. A checkpoint stores it under the key of the weight it stands for:

    *.weight    int8 [N, K], q from -127 to 127; or uint8 [N, K / 2], two q of -8 to 7 in a byte as q + 8, the even
                column in the low half
    *.scales    bfloat16 [N, G]: int8 has one group a row, int4 groups of `group_size` columns
    *.zeros     bfloat16 [N, G], int4 only

Rows stay rows, so q, k, v and gate, up are fused on loading as in a 16-bit checkpoint. Embeddings, norms, biases and
routers keep their 16 bits; the LM head is int8 or int4 (of 32 where the layers are int8) where `quantize.json` says so.

Shapes: M rows of activations, N rows and K columns of a weight, G groups of a row, E experts.
"""
import contextlib
import functools
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from console import device_name, say, write_atomically
from model import MoEFeedForward, PackedLinear, read_json
from replay import capture

LEVELS = {"int8": (-127, 127), "int4": (-8, 7)}
GROUP_SIZES = (32, 64, 128)
LINEARS = ("wqkv", "wo", "w13", "w2", "fc")     # by their names in model.py and eagle_head.py; routers are `gate`
ROWS = (1, 2, 4, 8, 16, 32, 64)                 # kernels are measured for these, and used for what lies below each


class Format(NamedTuple):
    mode: str
    group_size: int | None = None   # None: the whole row, which is what int8 has

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
        return Format(mode, None if mode == "int8" else self.group_size or GROUP_SIZES[0])

    def n_group(self, in_features: int) -> int:
        """Groups of a row. Raises ValueError when they do not fill it."""
        group_size = self.group_size or in_features
        if in_features % group_size:
            fits = [size for size in GROUP_SIZES if in_features % size == 0]
            raise ValueError(f"group size {group_size} does not divide a row of {in_features} weights"
                             + (f": {' or '.join(map(str, fits))} does" if fits else ", and neither does any other"))
        return in_features // group_size


# Numbers


def fit_grid(groups: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """groups [..., g] fp32 -> scale, zero [...], with the values that bfloat16 will keep of them."""
    if mode == "int8":
        scale, zero = groups.abs().amax(-1) / 127, None
    else:
        low, high = groups.amin(-1), groups.amax(-1)
        scale = (high - low) / 15
    scale = scale.clamp_min(1e-30).bfloat16().float()   # a group of equal weights has no width
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
    nibbles = (q + 8).to(torch.uint8)
    return {"weight": nibbles[..., ::2] | nibbles[..., 1::2] << 4, "scales": scale.bfloat16(), "zeros": zero.bfloat16()}


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


def dense_product(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    return F.linear(x, dequantize(q, scales, zeros))


def row_product(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """`dense_product` of one row x [1, K] as inductor makes one reduction of it, with no weight in memory.

    Even and odd columns of int4 are summed apart: where they are stacked first, it writes all N x K products in fp32.
    """
    if zeros is None:
        return dense_product(x, q, scales, zeros)
    scale, zero = scales.float()[..., None], zeros.float()[..., None]                       # [N, G, 1]
    q = q.unflatten(-1, (scales.shape[-1], -1))                                             # [N, G, g / 2]
    even, odd = x.float().unflatten(-1, (scales.shape[-1], -1, 2)).unbind(-1)               # [1, G, g / 2]
    low, high = ((half.float() - 8) * scale + zero for half in (q & 15, q >> 4))
    return (low * even + high * odd).sum((-2, -1))[None].to(x.dtype)


@functools.cache
def reduction() -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """`row_product`, compiled."""
    # All shapes of a model and its head are compilations of one function.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    return torch.compile(row_product, dynamic=False, options={"coordinate_descent_tuning": True})


# Modules


class QuantLinear(nn.Module):
    """A linear, or a stack of n_expert of them, over quantised weights.

    One row and a block of rows may take different kernels, which read the same q, scales and zeros: "dense", a product
    with the dequantised weight; on a GPU "reduction" for one row, and "triton N S" of N rows a block and S splits; on a
    CPU "packed". In fp32 there is only "dense", so that EAGLE and plain decoding agree to the token.
    """

    def __init__(self, in_features: int, out_features: int, format: Format, bias: bool = False,
                 n_expert: int | None = None):
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        lead = (out_features,) if n_expert is None else (n_expert, out_features)
        n_group, halves = format.n_group(in_features), format.mode == "int4"
        self.register_buffer("q", torch.empty(*lead, in_features // 2, dtype=torch.uint8) if halves
                             else torch.empty(*lead, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(*lead, n_group))
        self.register_buffer("zeros", torch.empty(*lead, n_group) if halves else None)
        self.register_buffer("bias", torch.empty(out_features) if bias else None)
        self.kernels: dict[int, str] = {}       # rows -> the kernel that `tune` found; none: the dense product
        self.layouts = nn.ModuleDict()          # what CPU kernels made of the weight, by kernel and expert

    @classmethod
    def from_weight(cls, weight: Tensor, format: Format, bias: Tensor | None = None) -> "QuantLinear":
        """weight [N, K] or [E, N, K], rounded to nearest. Raises ValueError where it holds NaN or infinity."""
        n_expert = weight.shape[0] if weight.dim() == 3 else None
        with torch.device("meta"):
            linear = cls(weight.shape[-1], weight.shape[-2], format, bias is not None, n_expert)
        stored = round_to_nearest(weight, format)
        if not stored["scales"].isfinite().all():
            raise ValueError(f"a weight of shape {list(weight.shape)} holds values that are not finite")
        linear.q, linear.scales, linear.bias = stored["weight"], stored["scales"].to(weight.dtype), bias
        linear.zeros = stored["zeros"].to(weight.dtype) if "zeros" in stored else None
        return linear

    def stored(self) -> dict[str, Tensor]:
        """The last part of a checkpoint's key -> the tensor it fills."""
        parts = {"weight": self.q, "scales": self.scales, "zeros": self.zeros, "bias": self.bias}
        return {kind: tensor for kind, tensor in parts.items() if tensor is not None}

    def rows(self, index: Tensor) -> "QuantLinear":
        """The linear of some rows only, which is what a draft vocabulary takes of an LM head."""
        with torch.device("meta"):
            linear = QuantLinear(self.in_features, len(index), self.format)
        linear.q, linear.scales = self.q[index], self.scales[index]
        linear.zeros = None if self.zeros is None else self.zeros[index]
        tune(linear)
        return linear

    def parts(self, expert: int | Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """q, scales and zeros: all, or those of one or several experts."""
        if expert is None:
            return self.q, self.scales, self.zeros
        return self.q[expert], self.scales[expert], None if self.zeros is None else self.zeros[expert]

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """Weights of experts in ordinary layout: a copy."""
        return dequantize(*self.parts(expert))

    @property
    def weight(self) -> Tensor:
        """The weight in ordinary layout [N, K]: a copy."""
        return dequantize(*self.parts())

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.q.shape[:-1], self.in_features

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        """x [..., K] -> [..., N], of one of the experts where there are any."""
        rows = x.numel() // self.in_features
        if rows == 0:   # an expert that no token goes to
            return x.new_empty(*x.shape[:-1], self.out_features)
        name = self.kernels.get(next((n for n in ROWS if rows <= n), ROWS[-1]), "dense")
        if x.is_cuda and rows > ROWS[-1]:
            name = "dense"
        return self.product(name, x, expert)

    def product(self, name: str, x: Tensor, expert: int | None = None) -> Tensor:
        """`forward` by the kernel of this name."""
        rows = x.reshape(-1, self.in_features)
        if name.startswith("triton"):
            from quantized_triton import quant_matmul
            block_n, split_k = map(int, name.split()[1:])
            y = quant_matmul(rows, *self.parts(expert), block_n, split_k).sum(0).to(x.dtype)
        elif name == "reduction":   # a compiled layer compiles it with all the rest
            y = (row_product if torch.compiler.is_compiling() else reduction())(rows, *self.parts(expert))
        elif x.is_cuda or (name == "dense" and torch.compiler.is_compiling()):  # inductor fails on a PackedLinear
            y = dense_product(rows, *self.parts(expert))    # dequantised anew each time
        else:
            y = self._layout(name, expert)(rows)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def lay_out(self, names: set[str]) -> None:
        """Make ready for these kernels, and forget what others made: inside a compiled layer it would be too late."""
        if self.q.device.type == "cpu":
            self.layouts = nn.ModuleDict({f"{name} {expert}": self._layout(name, expert) for name in names for expert in (
                [None] if self.q.dim() == 2 else range(self.q.shape[0]))})

    def _layout(self, name: str, expert: int | None) -> nn.Module:
        """The product over the weight as a CPU kernel wants it, made once."""
        key = f"{name} {expert}"
        if key not in self.layouts:
            if name == "packed":
                made = IntLinear(*self.parts(expert))
            else:
                made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
                made.weight = nn.Parameter(dequantize(*self.parts(expert)), requires_grad=False)
                if made.weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
                    made = PackedLinear(made)
            self.layouts[key] = made
        return self.layouts[key]


class IntLinear(nn.Module):
    """torch's product of bf16 rows [M, K] with int8 or int4 weights on a CPU, in the layout that it wants."""

    def __init__(self, q: Tensor, scales: Tensor, zeros: Tensor | None):
        super().__init__()
        self.group_size = None if zeros is None else 2 * q.shape[1] // scales.shape[1]
        if zeros is None:
            scales = scales.flatten()
        else:
            q = torch.ops.aten._convert_weight_to_int4pack_for_cpu((unpack(q) + 8).int(), 1)
            scales = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous()  # [G, N, 2]
        self.register_buffer("q", q, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.group_size is None:
            return torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.q, self.scales)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.q, self.group_size, self.scales)


class QuantMoEFeedForward(MoEFeedForward):
    """Mixtral's experts over quantised weights; the router stays as it is."""
    routes_on_host = True   # on a CPU, where it saves the gathering of weights

    def __init__(self, gate: nn.Linear, n_expert_active: int, w13: QuantLinear, w2: QuantLinear):
        nn.Module.__init__(self)    # not MoEFeedForward's: it would allocate the 16-bit experts
        self.gate, self.n_expert_active, self.w13, self.w2 = gate, n_expert_active, w13, w2

    def _gathered(self, rows: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        if rows.is_cuda:
            return super()._gathered(rows, weights, experts)
        return torch.stack([sum(w * self._expert(e, row[None])[0] for w, e in zip(row_weights, row_experts.tolist()))
                            for row, row_weights, row_experts in zip(rows, weights, experts)])

    def _expert(self, e: int, rows: Tensor) -> Tensor:
        gate, up = self.w13(rows, e).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * up, e)


def install(model: nn.Module, settings: dict, file: Path | str = "quantize.json") -> None:
    """Put empty quantised modules in the place of the linears of a model that is on the meta device.

    settings  the content of a checkpoint's quantize.json; ValueError when it names what is not known here
    """
    def empty(weight: Tensor, bias: Tensor | None, format: Format) -> QuantLinear:
        return QuantLinear(weight.shape[-1], weight.shape[-2], format, bias is not None,
                           weight.shape[0] if weight.dim() == 3 else None)
    _replace(model, Format.from_settings(settings, file), settings.get("lm_head"), empty)


@torch.no_grad()
def quantize_in_place(model: nn.Module, format: Format, lm_head: str | None = None) -> None:
    """Round the weights of a loaded model to nearest, one module after the other."""
    _replace(model, format, lm_head, lambda weight, bias, format: QuantLinear.from_weight(weight.data, format, bias))


def _replace(model: nn.Module, format: Format, lm_head: str | None,
             make: Callable[[Tensor, Tensor | None, Format], QuantLinear]) -> None:
    for module in model.modules():      # no list, which would hold the old weights of all until the end
        for name, child in module.named_children():
            if type(child) is nn.Linear and name in LINEARS:
                setattr(module, name, make(child.weight, child.bias, format))
            elif type(child) is nn.Linear and name == "output" and lm_head:
                setattr(module, name, make(child.weight, child.bias, format.of_lm_head(lm_head)))
            elif type(child) is MoEFeedForward:
                setattr(module, name, QuantMoEFeedForward(child.gate, child.n_expert_active, make(child.w13, None, format),
                                                          make(child.w2, None, format)))


# Kernels, by measurement


COLD = 1 << 28  # bytes of quantised weights to go through in turn, so that no cache holds what is measured


@torch.no_grad()
def tune(model: nn.Module, cache: Path | None = None) -> None:
    """Find the fastest kernel for each number of rows and shape of weight, by measurement, and note it in the modules.

    The weights of one shape take turns. What was found is kept in `cache`, ~/.cache/eagle-kernels.json by default,
    for this device, torch, and Triton or the number of threads: two runs then take the same kernels and give the same
    text. Of several ranks the first writes it.
    """
    found, peers = {}, defaultdict(list)
    with contextlib.suppress(OSError, ValueError, RuntimeError):    # not there, not to be read, broken, no home: measured anew
        cache = cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "eagle-kernels.json"
        found = read_json(cache)
    before = dict(found)
    is_first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    for module in model.modules():
        if isinstance(module, QuantLinear):
            peers[module.format, module.shape, module.scales.dtype].append(module)
    keys = defaultdict(dict)    # of the modules of a shape: rows -> the key of what was found
    for peer, modules in tqdm(peers.items(), "choosing kernels", delay=2, leave=False, disable=None if is_first else True):
        format, shape, dtype = peer
        for rows in ROWS:
            names = candidates(modules[0], rows)
            if len(names) == 1:
                continue
            key = f"{place(modules[0])}, {format.mode} {format.group_size} {dtype}, {rows} x {'x'.join(map(str, shape))}"
            keys[peer][rows] = key
            if found.get(key) not in names:
                found[key] = fastest(modules, names, rows)
        for module in modules:
            module.lay_out(set())   # one shape's copies at a time
    if torch.distributed.is_initialized():  # what several ranks compute alike must be the same to the bit
        chosen = [found]
        torch.distributed.broadcast_object_list(chosen)
        found |= chosen[0]
    for peer, modules in peers.items():
        for module in modules:
            module.kernels = {rows: found[key] for rows, key in keys[peer].items()}
            module.lay_out(set(module.kernels.values()) or {"dense"})
    if found != before and is_first and cache is not None:
        with contextlib.suppress(OSError):  # nowhere to keep it: the next run measures again
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, json.dumps(found, indent=1) + "\n")


def candidates(module: QuantLinear, rows: int) -> list[str]:
    """Names of the kernels that can run this module as it is placed."""
    dtype, device = module.scales.dtype, module.q.device.type
    if device == "cuda" and dtype != torch.float32:
        with contextlib.suppress(ImportError):
            import triton  # noqa: F401
            return ["reduction" if rows == 1 else "dense",
                    *(f"triton {block_n} {split_k}" for block_n in (32, 64, 128) for split_k in (1, 2, 4, 8))]
    # torch packs int4 rows by sixteens; its int8 product reads columns by sixteens, beyond the end where they do not divide.
    by_sixteen = module.in_features if module.format.mode == "int8" else module.out_features
    if device == "cpu" and dtype == torch.bfloat16 and by_sixteen % 16 == 0:
        return ["dense", "packed"]
    return ["dense"]


def place(module: QuantLinear) -> str:
    """What a measurement holds for."""
    where = f"{device_name(module.q.device)}, torch {torch.__version__}"
    if module.q.is_cuda:
        import triton
        return f"{where}, triton {triton.__version__}"
    return f"{where}, {torch.get_num_threads()} threads"


def fastest(modules: list[QuantLinear], names: list[str], rows: int, repeats: int = 3) -> str:
    """The kernel that takes these modules, all of one shape, through `rows` rows in the least time.

    One that does not run here is left out, with a line on stderr; "dense" where none does.
    """
    module, is_cuda = modules[0], modules[0].q.is_cuda
    expert = 0 if module.q.dim() == 3 else None
    x = torch.randn(rows, module.in_features, dtype=module.scales.dtype, device=module.q.device)
    modules = modules[:max(2, COLD // module.parts(expert)[0].nbytes)]
    runs = {}
    for name in names:
        run = functools.partial(_run, modules, name, x, expert)
        try:
            run()   # compiles, and makes the layouts
            runs[name] = capture(run).replay if is_cuda else run    # device time alone, without launches
        except Exception as error:      # of a compiler or a driver, whatever its class: the others will do
            say(f"kernel {name!r} does not run here ({rows} x {module.shape}): {' '.join(str(error).split())[:200]}")
    times = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            times[name].append(_seconds(run, is_cuda))
    return min(times, key=lambda name: statistics.median(times[name][1:]), default="dense")


def _run(modules: list[QuantLinear], name: str, x: Tensor, expert: int | None) -> None:
    for module in modules:
        module.product(name, x, expert)


def _seconds(run: Callable[[], object], is_cuda: bool) -> float:
    if is_cuda:
        torch.cuda.synchronize()    # sync: on loading only
    begin = time.perf_counter()
    run()
    if is_cuda:
        torch.cuda.synchronize()    # sync: on loading only
    return time.perf_counter() - begin
