"""The linear layers that models are built of: packed for a CPU, stacked as experts, and weight-only int8 and int4.

    install(model, {"mode": "int4", "group_size": 32})     # empty quantised modules replace the linears; then load
    quantize_in_place(model, Format("int8"))               # or round the weights of a loaded model
    runtime.tune(model)                                    # choose the fastest kernel by measurement

grid.py has the format. Rows stay rows, so q, k, v and gate, up are fused on loading as in a 16-bit checkpoint.
Embeddings, norms, biases and routers keep 16 bits. The LM head is quantised where quantize.json says so: int8, or int4
(groups of 32 if the layers are int8).

Shapes: M rows of activations, N rows and K columns of a weight, G groups of a row, E experts.
"""
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import foreign_formats, quantize_settings
from console import say
from grid import GROUP_SIZES, Format, dequantize, linear_of, pack_nibbles, round_to_nearest

LINEARS = ("wqkv", "wo", "w13", "w2", "fc")     # names of the modules that are quantised; routers (`gate`) are not
ROWS = (1, 2, 4, 8, 16, 32, 64)                 # a kernel is chosen for up to each of these numbers of rows


def dense_product(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """x [M, K] by a weight as stored -> [M, N]."""
    return F.linear(x, dequantize(q, scales, zeros))


def in_order(rows: Tensor, order: Tensor) -> Tensor:
    """The columns of rows [M, K] by index. `index_select` of columns takes up to three times as long (dev/log.md)."""
    if len(rows) == 1:
        return rows[0].index_select(0, order)[None]
    return rows.gather(1, order.expand(len(rows), -1))


def row_product(x: Tensor, q: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """`dense_product` of one row x [1, K], written so that inductor makes one reduction and no dequantised weight.

    Even and odd columns of int4 are summed apart. If they were stacked, inductor would write N x K products in fp32.
    """
    if zeros is None or q.dtype == torch.int8:
        return dense_product(x, q, scales, zeros)
    scale, zero = scales.float()[..., None], zeros.float()[..., None]                       # [N, G, 1]
    q = q.unflatten(-1, (scales.shape[-1], -1))                                             # [N, G, g / 2]
    even, odd = x.float().unflatten(-1, (scales.shape[-1], -1, 2)).unbind(-1)               # [1, G, g / 2]
    low, high = ((half.float() - 8) * scale + zero for half in (q & 15, q >> 4))
    return (low * even + high * odd).sum((-2, -1))[None].to(x.dtype)


@functools.cache
def reduction() -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """`row_product`, compiled."""
    # Each shape of weight in a model and its head is one more compilation of this function.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    return torch.compile(row_product, dynamic=False, options={"coordinate_descent_tuning": True})


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN has a packed product for this weight: on a CPU in fp32, and in bf16 if the processor knows it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16
                                             and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """A linear in fp32 or bf16 for inference. oneDNN reorders its weight once, not at every call (dev/log.md)."""
    packed: Tensor
    rows_at_least, rows_at_most = 1, 0      # of a product; 0 is any number (exact.py)
    block_at_most = 0       # tokens of a sequence up to which that holds

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
        if not self.block_at_most or int(x.shape[-2]) > self.block_at_most:
            return self.product(x)
        n_row = int(x.shape[:-1].numel())       # a constant of a trace
        if n_row < self.rows_at_least:
            return self.product(x.expand(2, *x.shape[1:]))[:1]
        if not self.rows_at_most or n_row <= self.rows_at_most:
            return self.product(x)
        parts = [part if len(part) >= self.rows_at_least else part.expand(2, -1)
                 for part in x.flatten(0, -2).split(self.rows_at_most)]
        return torch.cat([self.product(part) for part in parts])[:n_row].view(*x.shape[:-1], -1)

    def product(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # the tracer cannot record the empty list: it has no type
            return _scripted_linear()(x, self.packed, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


@functools.cache
def _scripted_linear() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    return torch.jit.CompilationUnit("""
def packed_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    scalars = torch.jit.annotate(List[Optional[Union[complex, float, int]]], [])
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", scalars, "")
""").packed_linear


class Experts(nn.Module):
    """E linears of one shape without bias, in 16 or 32 bits: weight [E, N, K]."""
    routes_on_host = False

    def __init__(self, n_expert: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, out_features, in_features))

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """The weights of one or several experts."""
        return self.weight[expert]

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """x [..., K] -> [..., N] by one expert."""
        return F.linear(x, self.weight[expert])


class QuantLinear(nn.Module):
    """A linear, or a stack of n_expert of them, over quantised weights.

    All kernels read the same q, scales and zeros. "dense" is a product with the dequantised weight. A GPU also has
    "reduction" for one row, and "triton N S" for blocks of rows: N output rows a program, S splits of the columns. A
    CPU in bf16 also has "packed". In fp32 there is only "dense", so that EAGLE and plain decoding agree to the token.
    """
    q: Tensor               # as grid.py describes them; of experts all but `order` have E in front
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None
    order: Tensor | None    # [K] the column of x that goes to each column of q

    def __init__(self, in_features: int, out_features: int, format: Format, bias: bool = False,
                 n_expert: int | None = None):
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        lead = (out_features,) if n_expert is None else (n_expert, out_features)
        n_group = format.n_group(in_features)
        self.register_buffer("q", torch.empty(*lead, in_features // 2, dtype=torch.uint8) if format.mode == "int4"
                             else torch.empty(*lead, in_features, dtype=torch.int8))
        self.register_buffer("scales", torch.empty(*lead, n_group))
        self.register_buffer("zeros", torch.empty(*lead, n_group) if format.has_zeros else None)
        self.register_buffer("order", torch.empty(in_features, dtype=torch.long) if format.reordered else None)
        self.register_buffer("bias", torch.empty(out_features) if bias else None)
        self.kernels: dict[int, str] = {}       # rows -> the kernel that runtime.tune chose; empty means dense
        self.dense_from: int | None = None      # so many rows of one sequence take the dense kernel in any case
        self.layouts = nn.ModuleDict()          # the weight in the layouts of CPU kernels, by kernel and expert

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
        parts = {"weight": self.q, "scales": self.scales, "zeros": self.zeros, "bias": self.bias, "order": self.order}
        return {kind: tensor for kind, tensor in parts.items() if tensor is not None}

    def rows(self, index: Tensor) -> "QuantLinear":
        """The linear of these rows only: an LM head over a draft vocabulary."""
        with torch.device("meta"):
            linear = QuantLinear(self.in_features, len(index), self.format)
        (linear.q, linear.scales, linear.zeros), linear.order = self.parts(index), self.order
        return linear

    @property
    def routes_on_host(self) -> bool:
        """Whether the host chooses the experts row by row: on a CPU that saves gathering their weights."""
        return self.q.dim() == 3 and not self.q.is_cuda

    def parts(self, index: int | Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """q, scales and zeros: all, or those of one or several experts (without experts: rows)."""
        if index is None:
            return self.q, self.scales, self.zeros
        return self.q[index], self.scales[index], None if self.zeros is None else self.zeros[index]

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        """Weights of experts in ordinary layout: a copy."""
        weight = dequantize(*self.parts(expert))
        return weight if self.order is None else weight[..., self.order.argsort()]

    @property
    def weight(self) -> Tensor:
        """The weight in ordinary layout [N, K] or [E, N, K]: a copy."""
        weight = dequantize(*self.parts())
        return weight if self.order is None else weight[..., self.order.argsort()]

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.q.shape[:-1], self.in_features

    def forward(self, x: Tensor, expert: int | None = None) -> Tensor:
        """x [..., K] -> [..., N]. With experts, by the one that is named."""
        rows = x.numel() // self.in_features
        if rows == 0:   # an expert that no token goes to
            return x.new_empty(*x.shape[:-1], self.out_features)
        name = self.kernels.get(next((n for n in ROWS if rows <= n), ROWS[-1]), "dense")
        if x.is_cuda and rows > ROWS[-1]:
            name = "dense"
        if self.dense_from is not None and x.shape[-2] >= self.dense_from:
            name = "dense"
        return self.product(name, x, expert)

    def product(self, name: str, x: Tensor, expert: int | None = None) -> Tensor:
        """`forward` by the kernel of this name."""
        rows = x.flatten(0, -2) if x.dim() > 1 else x[None]
        if self.order is not None:
            rows = in_order(rows, self.order)
        if name.startswith("triton"):
            from linears_triton import quant_matmul
            block_n, split_k = map(int, name.split()[1:])
            y = quant_matmul(rows, *self.parts(expert), block_n, split_k).sum(0).to(x.dtype)
        elif name == "reduction":   # inside a compiled layer it is compiled with the layer
            y = (row_product if torch.compiler.is_compiling() else reduction())(rows, *self.parts(expert))
        elif x.is_cuda or (name == "dense" and torch.compiler.is_compiling()):  # inductor fails on a PackedLinear
            y = dense_product(rows, *self.parts(expert))    # dequantised at each call
        else:
            y = self._layout(name, expert)(rows)
        # len is a constant of a trace, a size would be asked for at each step
        y = y.view(len(x), -1, self.out_features) if x.dim() == 3 else y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def lay_out(self, names: set[str]) -> None:
        """Make the layouts of these kernels and drop all others, before any layer is compiled.

        A dense one that only prompts from `dense_from` on take is made at the first of them.
        """
        if self.dense_from is not None and "dense" not in self.kernels.values():
            names = names - {"dense"}
        if self.q.device.type == "cpu":
            experts = [None] if self.q.dim() == 2 else range(self.q.shape[0])
            self.layouts = nn.ModuleDict({f"{name} {expert}": self._layout(name, expert)
                                          for name in names for expert in experts})

    def _layout(self, name: str, expert: int | None) -> nn.Module:
        """A module that holds the weight in the layout of a CPU kernel. Made once."""
        key = f"{name} {expert}"
        if key not in self.layouts:
            with torch.inference_mode(False), torch.no_grad():  # made for a prompt it may serve training too
                self.layouts[key] = self._new_layout(name, expert)
        return self.layouts[key]

    def _new_layout(self, name: str, expert: int | None) -> nn.Module:
        if name == "packed":
            return IntLinear(*self.parts(expert))
        made = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight = nn.Parameter(dequantize(*self.parts(expert)), requires_grad=False)
        return PackedLinear(made) if can_pack(made.weight) else made


class IntLinear(nn.Module):
    """torch's product of bf16 rows [M, K] by int8 or int4 weights on a CPU, over weights in the layout it needs.

    It knows int8 with one scale a row only. Other int8 is multiplied as int4 of twice as many columns.
    """
    q: Tensor
    scales: Tensor

    def __init__(self, q: Tensor, scales: Tensor, zeros: Tensor | None):
        super().__init__()
        self.is_split = q.dtype == torch.int8 and (zeros is not None or scales.shape[1] > 1)
        if self.is_split:
            q, scales, zeros = split_int8(q, scales, zeros)
        n_column = q.shape[1] * (1 if zeros is None else 2)
        self.out_features, self.in_features = q.shape[0], n_column // (1 + self.is_split)
        self.group_size = None if zeros is None else n_column // scales.shape[1]
        if zeros is None:
            scales = scales.flatten()
        else:
            q = torch.stack((q & 15, q >> 4), -1).flatten(-2).int()     # from 0 to 15
            q = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
            scales = torch.stack((scales, zeros), -1).transpose(0, 1).contiguous()  # [G, N, 2]
        self.register_buffer("q", q, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.group_size is None:
            return torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.q, self.scales)
        if self.is_split:
            x = torch.cat((x, x), -1)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.q, self.group_size, self.scales)


def split_int8(q: Tensor, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """int8 in groups, or with zero points, as int4 [N, 2K] that is to be multiplied by x and x: q = 16 high + low."""
    size = q.shape[1] // scales.shape[1]
    repeats = size // next(fit for fit in reversed(GROUP_SIZES) if size % fit == 0)
    zeros = torch.zeros_like(scales) if zeros is None else zeros
    scales, zeros = (part.repeat_interleave(repeats, 1) for part in (scales, zeros))
    u = q.view(torch.uint8) ^ 128       # q + 128; its low half is not shifted by 8, as int4 is
    return (pack_nibbles(torch.cat((u >> 4, u & 15), 1)), torch.cat((16 * scales, scales), 1),
            torch.cat((zeros, 8 * scales), 1))


def install(model: nn.Module, settings: dict, file: Path | str = "quantize.json") -> None:
    """Replace the linears of a model on the meta device by empty quantised modules.

    settings is the content of a checkpoint's quantize.json. Raises ValueError for a format that grid.py lacks.
    """
    _replace(model, _alike(Format.from_settings(settings, file), settings.get("lm_head")), _empty)


def install_parts(model: nn.Module, formats: dict[str, Format]) -> None:
    """`install` where each linear has a format of its own; without one it keeps 16 bits.

    formats   the name of a linear in the checkpoint, such as "model.layers.0.self_attn.q_proj" -> its format. The parts
              of a fused linear have one format (grid.agreed).
    """
    by_linear = {linear_of(name): format for name, format in formats.items()}
    _replace(model, lambda path, name: by_linear.get(".".join([*path.split(".")[:2], name]).lstrip(".")), _empty)


@torch.no_grad()
def quantize_in_place(model: nn.Module, format: Format, lm_head: str | None = None) -> None:
    """Round the weights of a loaded model to nearest, one module after the other."""
    _replace(model, _alike(format, lm_head),
             lambda weight, bias, format: QuantLinear.from_weight(weight.data, format, bias))


def _alike(format: Format, lm_head: str | None) -> Callable[[str, str], Format | None]:
    return lambda path, name: (format if name in LINEARS else
                               format.of_lm_head(lm_head) if name == "output" and lm_head else None)


def _empty(weight: Tensor, bias: Tensor | None, format: Format) -> QuantLinear:
    return QuantLinear(weight.shape[-1], weight.shape[-2], format, bias is not None,
                       weight.shape[0] if weight.dim() == 3 else None)


def _replace(model: nn.Module, format_of: Callable[[str, str], Format | None],
             make: Callable[[Tensor, Tensor | None, Format], QuantLinear]) -> None:
    """format_of   the path of a module and the name of a child ("layers.0.attention", "wqkv") -> the child's format"""
    for path, module in model.named_modules():      # not list(...), which would hold all old weights until the end
        for name, child in module.named_children():
            format = format_of(path, name)
            if format and type(child) is nn.Linear:
                setattr(module, name, make(child.weight, child.bias, format))
            elif format and type(child) is Experts:
                setattr(module, name, make(child.weight, None, format))


def install_quantized(model: nn.Module, folder: Path) -> None:
    """`install` for the checkpoint in this folder, if it is a quantised one."""
    settings, (formats, line) = quantize_settings(folder), foreign_formats(folder)
    if line:
        say(line)
    if formats:
        install_parts(model, formats)
    elif settings and "tool" not in settings:
        install(model, settings, folder / "quantize.json")


@torch.no_grad()
def fold_orders(model: nn.Module) -> None:
    """Where the columns of a w2 have an order of their own, put the rows of w13, which w2 reads, into that order.

    For a loaded model. The product of w2 then takes its input as it is. The other inputs come from norms and attention.
    """
    for module in model.modules():
        w13, w2 = getattr(module, "w13", None), getattr(module, "w2", None)
        if w13 is None or not isinstance(w2, QuantLinear) or w2.order is None:
            continue
        rows = torch.cat((w2.order, w2.order + len(w2.order)))      # of gate, of up
        for tensor in stored(w13).values():
            if tensor is not getattr(w13, "order", None):
                tensor.copy_(tensor.index_select(-2, rows))
        w2.order, w2.format = None, w2.format._replace(reordered=False)


def stored(linear: nn.Module) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds for a linear or for stacked experts, by the last part of their keys."""
    return linear.stored() if isinstance(linear, QuantLinear) else dict(linear.named_parameters())


def stored_parts(linear: nn.Module, sizes: Sequence[int], expert: int | None = None) -> dict[str, Sequence[Tensor]]:
    """`stored` of the parts, so many rows each, that a linear or one of its experts is fused of."""
    def split(tensor: Tensor) -> Sequence[Tensor]:
        return (tensor if expert is None else tensor[expert]).split(list(sizes))
    return {kind: [tensor] * len(sizes) if kind == "order" else split(tensor)
            for kind, tensor in stored(linear).items()}


def weight_bytes(module: nn.Module) -> int:
    """Of all weights, in 16 bits or quantised; tied weights are counted once."""
    quantised = [part for part in module.modules() if isinstance(part, QuantLinear)]
    return (sum(tensor.nbytes for part in quantised for tensor in part.stored().values())
            + sum(parameter.nbytes for parameter in module.parameters()))
