"""GGUF, the file format of llama.cpp: what a file states, where its tensors lie, and their numbers.

    header = read_header(Path("model.Q4_0.gguf"))               # all parts of a model that was split
    header.facts["general.architecture"]                        # "llama"
    values(header.tensors["token_embd.weight"])                 # [V, dim] fp32
    on_grid(header.tensors["blk.0.ffn_down.weight"])            # {"weight", "scales", "zeros"} as grid.py has them

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here and not by the gguf
package, which takes seconds for a vocabulary and does not check that tensors lie within the file.

Shapes: N rows and K columns of a weight, G = K / 32 groups of a row.
"""
import functools
import math
import mmap
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grid import Format

# ggml's number of a type -> its name, and the columns and bytes of a block. The gguf package knows the others.
PLAIN = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)}
KEPT = {2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34), 12: ("Q4_K", 256, 144)}
FORMATS = {name: Format("int8" if name == "Q8_0" else "int4", 32) for name, _, _ in KEPT.values()}
IN_FRONT = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2, "Q4_K": 16}     # bytes of a block in front of q
STRETCH = 1 << 18       # weights that are dequantised at a time

SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


# Files


def find_gguf(path: Path) -> Path:
    """The GGUF file that a checkpoint's path means: a file, or the only one in a folder that holds some.

    Of a model in several parts it is the first. Raises ValueError where a folder holds several models.
    """
    if path.is_file():
        return parts_of(path)[0]
    models = {SPLIT.sub(r"\1", file.name): file for file in sorted(path.glob("*.gguf"), reverse=True)}
    if len(models) > 1:
        names = ", ".join(sorted(file.name for file in models.values()))
        raise ValueError(f"{path} holds {len(models)} GGUF models: name the file of one ({names})")
    return parts_of(models.popitem()[1])[0]


def parts_of(file: Path) -> list[Path]:
    """All files of a model that llama.cpp's gguf-split has cut, by any one of them. Raises FileNotFoundError."""
    match = SPLIT.fullmatch(file.name)
    if match is None:
        return [file]
    parts = [file.with_name(f"{match[1]}-{n:05}-of-{match[3]}.gguf") for n in range(1, int(match[3]) + 1)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise FileNotFoundError(f"{file.parent / missing[0]} is missing: the model is in {len(parts)} parts, "
                                f"of which {len(missing)} are not here")
    return parts or [file]


# The header


class Stored(NamedTuple):
    """A tensor as it lies in a file."""
    kind: str               # ggml's name of its type
    shape: tuple[int, ...]  # rows first, as torch has it
    file: Path
    begin: int              # bytes
    end: int


class Header(NamedTuple):
    file: Path                      # the first, of several parts
    facts: dict[str, Any]
    tensors: dict[str, Stored]      # by GGUF's names


def read_header(file: Path, vocabulary: bool = True) -> Header:
    """Facts and tensors of a model, of all its parts. Without `vocabulary`, lists of texts are passed over: [].

    Raises ValueError for a damaged file, FileNotFoundError.
    """
    parts = parts_of(file)
    headers = [read_part(part, vocabulary, (part.stat().st_size, part.stat().st_mtime_ns)) for part in parts]
    facts = headers[0].facts
    if facts.get("split.count", 1) not in (0, len(parts)):
        raise ValueError(f"{file} is one of {facts['split.count']} parts: they are found by their names, "
                         "NAME-00001-of-0000N.gguf")
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    if len(tensors) != sum(len(header.tensors) for header in headers):
        raise ValueError(f"{file}: a tensor is there a second time in another part")
    return Header(file, facts, tensors)


@functools.lru_cache(maxsize=64)    # a load asks twice
def read_part(file: Path, vocabulary: bool, state: tuple[int, int]) -> Header:
    """One file in this state. Every string, array and tensor is checked to lie within it."""
    with open(file, "rb") as content:
        if content.read(4) != b"GGUF":
            raise ValueError(f"{file} is not a GGUF file")
        data = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = Cursor(data, vocabulary)
    try:
        version, n_tensor, n_fact = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
        if version not in (2, 3):
            raise ValueError(f"{file} has version {version} of GGUF, of which 2 and 3 are read, little-endian")
        facts = {}
        for _ in range(n_fact):
            name = cursor.text()
            facts[name] = cursor.value(cursor.number("I"))
        found = []
        for _ in range(n_tensor):
            name = cursor.text()
            shape = tuple(reversed([cursor.number("Q") for _ in range(cursor.number("I"))]))
            found.append((name, shape, cursor.number("I"), cursor.number("Q")))
    except (struct.error, EOFError):
        raise ValueError(f"{file} is cut short: its header goes on behind byte {len(data)}") from None
    except ValueError as error:     # a text that is not UTF-8 too
        raise ValueError(f"{file} is damaged: {error}") from None
    align = facts.get("general.alignment", 32)
    if not isinstance(align, int) or align < 8 or align % 8:
        raise ValueError(f"{file}: general.alignment {align!r} is not a multiple of 8")
    start, tensors = -(-cursor.at // align) * align, {}
    for name, shape, number, offset in found:
        kind, columns, n_byte = block_of(number, file)
        if not shape or min(shape) < 1 or shape[-1] % columns or offset % align or name in tensors:
            raise ValueError(f"{file}: {name} of shape {list(shape)} in {kind} is damaged or there twice")
        begin = start + offset
        end = begin + math.prod(shape) // columns * n_byte
        if end > len(data):
            raise ValueError(f"{file} is cut short: {name} ends at byte {end}, the file at {len(data)}")
        tensors[name] = Stored(kind, shape, file, begin, end)
    return Header(file, facts, tensors)


class Cursor:
    """Reads a header from its beginning to its end. EOFError or struct.error where it ends too early."""
    NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    TEXT, ARRAY = 8, 9

    def __init__(self, data: mmap.mmap, vocabulary: bool):
        self.data, self.at, self.vocabulary = data, 4, vocabulary

    def number(self, format: str) -> Any:
        value, = struct.unpack_from("<" + format, self.data, self.at)
        self.at += struct.calcsize("<" + format)
        return value

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode()

    def texts(self, count: int) -> list[str]:
        """`text`, count times: a vocabulary has 100,000 of them."""
        data, at, size, length = self.data, self.at, len(self.data), struct.Struct("<Q").unpack_from
        ends = []
        for _ in range(count):
            at += 8 + length(data, at)[0]
            if at > size:
                raise EOFError
            ends.append(at)
        begins, self.at = [self.at, *ends], at
        return [data[begin + 8:end].decode() for begin, end in zip(begins, ends)] if self.vocabulary else []

    def bytes(self, count: int) -> bytes:
        self.at += count
        if self.at > len(self.data):
            raise EOFError
        return self.data[self.at - count:self.at]

    def value(self, kind: int) -> Any:
        """A number, a text, or a list of either. Raises ValueError for an unknown kind."""
        if kind in self.NUMBERS:
            return self.number(self.NUMBERS[kind])
        if kind == self.TEXT:
            return self.text()
        if kind != self.ARRAY:
            raise ValueError(f"a GGUF value of the unknown type {kind}")
        kind, count = self.number("I"), self.number("Q")
        if kind == self.TEXT:
            return self.texts(count)
        if kind not in self.NUMBERS:
            raise ValueError(f"a GGUF array of the unknown type {kind}")
        format = "<" + self.NUMBERS[kind]
        return [value for value, in struct.iter_unpack(format, self.bytes(count * struct.calcsize(format)))]


def block_of(number: int, file: Path) -> tuple[str, int, int]:
    """ggml's number of a type -> its name, and the columns and bytes of a block."""
    if found := (PLAIN | KEPT).get(number):
        return found
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{file}: tensors of type {number} need the gguf package: pip install gguf") from None
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"{file}: the gguf package knows no tensor of type {number}") from None
    return kind.name, *gguf.GGML_QUANT_SIZES[kind]


def fact(facts: dict, name: str, kind: type, default: Any = None) -> Any:
    """A value of the header. Raises ValueError where it is missing without a default, or of another kind."""
    value = facts.get(name, default)
    if value is None:
        raise ValueError(f"the file has no {name}")
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{name} is {str(value)[:80]!r}, not of the kind {kind.__name__}")
    return value


# The numbers


def stored_shapes(tensor: Stored) -> dict[str, tuple[int, ...]]:
    """The shapes of `on_grid`'s tensors."""
    n, k = tensor.shape
    if tensor.kind == "Q8_0":
        return {"weight": (n, k), "scales": (n, k // 32)}
    return {"weight": (n, k // 2), "scales": (n, k // 32), "zeros": (n, k // 32)}


def on_grid(tensor: Stored) -> dict[str, Tensor]:
    """A weight of a type in FORMATS -> q, scales and zeros as grid.py has them; scales and zeros in fp32."""
    q, scales, least = read_blocks(tensor)
    if least is None:
        return {"weight": q.flatten(-2), "scales": scales}
    pairs = q.view(torch.int16)     # the bytes of two neighbouring columns, and of two others in their high halves
    halves = [join_nibbles(part).view(torch.int64) for part in (pairs, pairs >> 4)]
    weight = torch.stack(halves, -2).view(torch.uint8)                                  # [N, ..., 2, n / 2]
    return {"weight": weight.flatten(1), "scales": scales, "zeros": least + 8 * scales}


def join_nibbles(pairs: Tensor) -> Tensor:
    """int16 [...], a number in the low half of each byte -> uint8 [...] of the two numbers, the first one low."""
    pairs = pairs & 0x0F0F
    return pairs.bitwise_or_(pairs >> 4).to(torch.uint8)


def read_blocks(tensor: Stored) -> tuple[Tensor, Tensor, Tensor | None]:
    """The numbers of a weight of a type in FORMATS: q, and the scale and least value of each group, fp32 [N, G].

    Q8_0                w = scale * q: int8 [N, G, 32], no least value
    Q4_0, Q4_1, Q4_K    w = scale * q + least, q from 0 to 15: uint8 [N, ..., n] whose low halves are n columns, and the
                        high ones the next n; n is 16, in Q4_K 32

    fp32 holds every scale and least value, and all products of scale and q.
    """
    _, n_column, n_byte = next(block for block in KEPT.values() if block[0] == tensor.kind)
    blocks = raw(tensor).view(torch.int16).view(-1, tensor.shape[-1] // n_column, n_byte // 2)     # [N, blocks, int16]
    numbers, q = (part.contiguous() for part in blocks.tensor_split([IN_FRONT[tensor.kind] // 2], -1))
    if tensor.kind == "Q4_K":
        return q.view(torch.uint8).unflatten(-1, (-1, 32)), *group_scales(numbers)
    numbers = numbers.view(torch.float16).float()
    scales = numbers[..., 0]
    if tensor.kind == "Q8_0":
        return q.view(torch.int8), scales, None
    return q.view(torch.uint8), scales, numbers[..., 1] if tensor.kind == "Q4_1" else -8 * scales


def group_scales(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """int16 [N, blocks, 8] in front of a Q4_K block -> scale and least value of its 8 groups, [N, G] each.

    They are two fp16 numbers by whole numbers of 6 bits, which lie in 12 bytes: of the groups 0 to 3 in the low bits of
    4 bytes (scales) and 4 more (least values), whose high bits belong, above those of the last 4, to groups 4 to 7.
    """
    d, d_least = numbers[..., :2].contiguous().view(torch.float16).float().unbind(-1)   # [N, blocks]
    scale, least, rest = numbers[..., 2:].contiguous().view(torch.uint8).unflatten(-1, (3, 4)).unbind(-2)
    scale = torch.cat((scale & 63, rest & 15 | scale >> 2 & 48), -1)                    # [N, blocks, 8]
    least = torch.cat((least & 63, rest >> 4 | least >> 2 & 48), -1)
    return (d[..., None] * scale).flatten(-2), -(d_least[..., None] * least).flatten(-2)


def values(tensor: Stored) -> Tensor:
    """The numbers of a tensor: as stored, or dequantised to fp32."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if tensor.kind in dtypes:
        return raw(tensor).view(dtypes[tensor.kind])
    if tensor.kind in FORMATS:
        return dequantised(*read_blocks(tensor)).view(tensor.shape)
    from gguf import GGMLQuantizationType, quants
    try:
        return torch.from_numpy(quants.dequantize(raw(tensor).numpy(), GGMLQuantizationType[tensor.kind]))
    except NotImplementedError:
        raise ValueError(f"the gguf package cannot dequantise {tensor.kind}") from None


def dequantised(q: Tensor, scales: Tensor, least: Tensor | None) -> Tensor:
    """What `read_blocks` gives -> [N, G, 32] in fp32, so many rows at a time that the processor's cache holds them."""
    weight, step = torch.empty(*scales.shape, 32), max(STRETCH // scales.shape[1] // 32, 1)
    for begin in range(0, len(weight), step):
        rows = slice(begin, begin + step)
        scale, out = scales[rows, :, None], weight[rows]
        if least is None:
            torch.mul(q[rows], scale, out=out)
        else:
            columns = torch.stack((q[rows] & 15, q[rows] >> 4), -2).view(out.shape)
            torch.addcmul(least[rows, :, None], columns, scale, out=out)
    return weight


def raw(tensor: Stored) -> Tensor:
    """The bytes of a tensor: uint8 [..., bytes of a row]. The file is mapped: a change of them stays in memory."""
    data = torch.from_file(str(tensor.file), shared=False, size=tensor.end, dtype=torch.uint8)
    return data[tensor.begin:].view(*tensor.shape[:-1], -1)
