"""GGUF, the file format of llama.cpp: one file of weights, configuration and tokenizer, read as a Hugging Face folder.

    folder = as_folder(Path("model.Q4_0.gguf"))     # config.json, the tokenizer and a link to the file, in the cache
    for key, tensor in read_weights(folder / "model.gguf", lambda key: True): ...

No weight is written a second time. Q4_0, Q4_1 and Q8_0 stay on their own grid, as linears.py stores int4 and int8 in
groups of 32. Other quantised types are dequantised: to 16 bits, in a model of 16 bits.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read here and not by the gguf
package, which takes seconds for a vocabulary and does not check that tensors lie within the file.

Shapes: N rows and K columns of a weight, G = K / 32 groups of a row.
"""
import hashlib
import json
import mmap
import os
import re
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import gguf_tokenizer
from gguf_tokenizer import SPECIAL_IDS, fact

# ggml's number of a type -> its name, and the columns and bytes of a block. The gguf package knows the others.
PLAIN = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2)}
KEPT = {2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34)}
MODES = {"Q4_0": "int4", "Q4_1": "int4", "Q8_0": "int8"}

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
FUSED = (("attn_q", "attn_k", "attn_v"), ("ffn_gate", "ffn_up"))    # one linear of model.py, so of one format
NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
         "output.weight": "lm_head.weight"}
SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


# Files and folders


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a checkpoint's path means: a file, or the only one in a folder without config.json.

    Of a model in several parts it is the first. None means a checkpoint of another kind. Raises ValueError where a
    folder holds several models.
    """
    if path.is_file():
        return parts_of(path)[0]
    if not path.is_dir() or (path / "config.json").exists():
        return None
    models = {SPLIT.sub(r"\1", file.name): file for file in sorted(path.glob("*.gguf"), reverse=True)}
    if len(models) > 1:
        names = ", ".join(sorted(file.name for file in models.values()))
        raise ValueError(f"{path} holds {len(models)} GGUF models: name the file of one ({names})")
    return parts_of(models.popitem()[1])[0] if models else None


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


def as_folder(file: Path) -> Path:
    """A checkpoint's folder made of a GGUF file, in the user's cache: configuration, tokenizer and a link to the file.

    Made once for each state of the file (path, size, time) and of the code that makes it. Raises ValueError and
    FileNotFoundError in one line that names the file.
    """
    parts = [part.resolve() for part in parts_of(file)]
    state = [(str(part), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    code = Path(__file__).read_bytes() + Path(gguf_tokenizer.__file__).read_bytes()
    digest = hashlib.sha256(repr(state).encode() + code).hexdigest()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "eagle-gguf"
    except RuntimeError:
        raise ValueError(f"{file}: its tokenizer needs a place, and this user has no home: set XDG_CACHE_HOME") from None
    folder = cache / f"{file.name.removesuffix('.gguf')}-{digest[:16]}"
    if folder.is_dir():
        return folder
    header = read_header(file)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=made(cache)) as staging:
        whole = Path(staging) / "whole"
        write_folder(header, whole)
        for part in parts:
            name = "model.gguf" if len(parts) == 1 else SPLIT.sub(r"model-\2-of-\3.gguf", part.name)
            (whole / name).symlink_to(part)
        try:
            os.rename(whole, folder)
        except OSError:
            if not folder.is_dir():     # if it is, another process was faster
                raise
    return folder


def made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error.strerror}): set XDG_CACHE_HOME to a folder for it") from None
    return folder


def write_folder(header: "Header", folder: Path) -> None:
    """config.json, generation_config.json and the tokenizer's files. Raises ValueError that names the file."""
    folder.mkdir()
    try:
        write_json(folder / "config.json", model_config(header))
        write_json(folder / "generation_config.json", special_ids(header.facts))
        gguf_tokenizer.write_tokenizer(header.facts, folder)
        write_json(folder / "tokenizer_config.json", gguf_tokenizer.tokenizer_config(header.facts))
    except ValueError as error:
        raise ValueError(f"{header.file}: {error}") from None


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def read_header(file: Path) -> Header:
    """Facts and tensors of a model, of all its parts. Raises ValueError for a damaged file, FileNotFoundError."""
    parts = parts_of(file)
    headers = [read_part(part) for part in parts]
    facts = headers[0].facts
    if facts.get("split.count", 1) not in (0, len(parts)):
        raise ValueError(f"{file} is one of {facts['split.count']} parts: they are found by their names, "
                         "NAME-00001-of-0000N.gguf")
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    if len(tensors) != sum(len(header.tensors) for header in headers):
        raise ValueError(f"{file}: a tensor is there a second time in another part")
    return Header(file, facts, tensors)


def read_part(file: Path) -> Header:
    """One file. Every string, array and tensor is checked to lie within it."""
    with open(file, "rb") as content:
        if content.read(4) != b"GGUF":
            raise ValueError(f"{file} is not a GGUF file")
        data = mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = Cursor(data)
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
    if not isinstance(align, int) or align < 1:
        raise ValueError(f"{file}: general.alignment {align!r} is not a positive number")
    start, tensors = -(-cursor.at // align) * align, {}
    for name, shape, number, offset in found:
        kind, columns, n_byte = block_of(number, file)
        if not shape or min(shape) < 1 or shape[-1] % columns or name in tensors:
            raise ValueError(f"{file}: {name} of shape {list(shape)} in {kind} is damaged or there twice")
        begin = start + offset
        end = begin + int(np.prod(shape, dtype=object)) // columns * n_byte
        if end > len(data):
            raise ValueError(f"{file} is cut short: {name} ends at byte {end}, the file at {len(data)}")
        tensors[name] = Stored(kind, shape, file, begin, end)
    return Header(file, facts, tensors)


class Cursor:
    """Reads a header from its beginning to its end. EOFError or struct.error where it ends too early."""
    NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    TEXT, ARRAY = 8, 9

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 4

    def number(self, format: str) -> Any:
        value, = struct.unpack_from("<" + format, self.data, self.at)
        self.at += struct.calcsize("<" + format)
        return value

    def text(self) -> str:
        return self.bytes(self.number("Q")).decode()

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
            return [self.text() for _ in range(count)]
        if kind not in self.NUMBERS:
            raise ValueError(f"a GGUF array of the unknown type {kind}")
        format = "<" + self.NUMBERS[kind]
        return [value for value, in struct.iter_unpack(format, self.bytes(count * struct.calcsize(format)))]


def block_of(number: int, file: Path) -> tuple[str, int, int]:
    """ggml's number of a type -> its name, and the columns and bytes of a block."""
    if found := (PLAIN | KEPT).get(number):
        return found
    import gguf
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise ValueError(f"{file}: the gguf package knows no tensor of type {number}") from None
    return kind.name, *gguf.GGML_QUANT_SIZES[kind]


# The configuration


def model_config(header: Header) -> dict:
    """config.json. Raises ValueError for what model.py does not implement, or a fact that is missing."""
    facts, tensors = header.facts, header.tensors
    arch = fact(facts, "general.architecture", str)
    if arch not in ARCHITECTURES:
        raise ValueError(f"architecture {arch!r} is not supported ({', '.join(ARCHITECTURES)} are)")

    def own(name: str, kind: type, default: Any = None) -> Any:
        return fact(facts, f"{arch}.{name}", kind, default)

    heads, dim = own("attention.head_count", int), own("embedding_length", int)
    head_dim = own("attention.key_length", int, dim // max(heads, 1))
    if "token_embd.weight" not in tensors:
        raise ValueError("there is no token_embd.weight")
    for name, plain in (("expert_count", 0), ("attention.sliding_window", 0), ("rope.dimension_count", head_dim),
                        ("attention.value_length", head_dim), ("rope.scaling.yarn_log_multiplier", 0.0),
                        ("rope.scaling.attn_factor", 1.0), ("rope.scale_linear", 1.0)):
        if facts.get(f"{arch}.{name}", plain) != plain:
            raise ValueError(f"{arch}.{name} {facts[f'{arch}.{name}']!r} is not supported")
    context, theta = own("context_length", int), own("rope.freq_base", float, 10000.0)
    return {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": dim,
        "intermediate_size": own("feed_forward_length", int),
        "num_hidden_layers": own("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": own("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rope_scaling": rope_scaling(header, arch, theta, head_dim),
        "rms_norm_eps": float(f"{own('attention.layer_norm_rms_epsilon', float):.6g}"),  # fp32 in the file
        "hidden_act": "silu",
        "attention_bias": arch == "llama" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": "output.weight" not in tensors,
        "use_cache": True,
        **special_ids(facts),
        "torch_dtype": "bfloat16",
    }


def special_ids(facts: dict) -> dict:
    """generation_config.json. Tokens that end a turn or a message end an answer too."""
    ids = {key: fact(facts, name, int) for key, name in SPECIAL_IDS.items() if name in facts}
    ends = [facts[f"tokenizer.ggml.{kind}_token_id"] for kind in ("eos", "eot", "eom")
            if f"tokenizer.ggml.{kind}_token_id" in facts]
    return ids | ({"eos_token_id": list(dict.fromkeys(ends))} if len(set(ends)) > 1 else {})


def rope_scaling(header: Header, arch: str, theta: float, head_dim: int) -> dict | None:
    """config.json's rope_scaling. Raises ValueError for what is none that this project knows."""
    prefix = f"{arch}.rope.scaling."
    kind = fact(header.facts, prefix + "type", str, "none")
    if "rope_freqs.weight" in header.tensors:
        if kind != "none":
            raise ValueError(f"rope_freqs.weight beside {prefix}type {kind!r} is not supported")
        return llama3_scaling(values(header.tensors["rope_freqs.weight"]), theta, head_dim)
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ValueError(f"{prefix}type {kind!r} is not supported (none, linear and yarn are)")
    names = {"factor": "factor", "original_max_position_embeddings": "original_context_length",
             "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    return {"rope_type": kind} | {key: header.facts[prefix + name] for key, name in names.items()
                                  if prefix + name in header.facts}


def llama3_scaling(factors: Tensor, theta: float, head_dim: int) -> dict:
    """The parameters of LLaMA 3.x, of which the file holds only what they come to: by how much each wavelength grows.

    factors [D/2]. The published models differ in `factor` alone. Raises ValueError where these do not give the factors.
    """
    low, high, original = 1.0, 4.0, 8192
    factor = round(float(factors.max()), 4)
    turns = original / (2 * torch.pi * theta ** (torch.arange(0, head_dim, 2).double() / head_dim))
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    made = 1 / (kept + (1 - kept) / factor)
    if factors.shape != made.shape or not torch.allclose(factors.double(), made, rtol=1e-3):
        raise ValueError("rope_freqs.weight stretches RoPE in another way than LLaMA 3.1, 3.2 and 3.3 do")
    return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
            "original_max_position_embeddings": original}


# The weights


def hub_prefix(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj. Raises ValueError for a tensor that model.py lacks."""
    if name in OUTER:
        return OUTER[name].removesuffix(".weight")
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in LINEARS | NORMS:
        raise ValueError("the architecture has no such weight")
    return f"model.layers.{match[1]}.{(LINEARS | NORMS)[match[2]]}"


def kept_modes(tensors: dict[str, Stored]) -> dict[str, str]:
    """{name: "int4" or "int8"} of the weights that stay on their grid.

    q, k, v and gate, up become one linear. They stay if all of them have the same mode.
    """
    modes = {name: MODES.get(tensor.kind) for name, tensor in tensors.items()}
    kept = {}
    for name in tensors:
        block, _, kind = name.removesuffix(".weight").rpartition(".")
        group = next((group for group in FUSED if kind in group), (kind,))
        parts = {modes.get(f"{block}.{part}.weight") for part in group}
        if kind in LINEARS and len(tensors[name].shape) == 2 and len(parts) == 1 and None not in parts:
            kept[name] = parts.pop()
    return kept


def said_types(header: Header) -> str:
    """A line that names the quantised types that are not kept; empty if there are none."""
    kept = kept_modes(header.tensors)
    lost = Counter(tensor.kind for name, tensor in header.tensors.items()
                   if name not in kept and name.startswith("blk.") and tensor.kind not in ("F32", "F16", "BF16"))
    counts = ", ".join(f"{count} in {kind}" for kind, count in sorted(lost.items()))
    return f"{header.file.name}: dequantised {counts}" if lost else ""


def read_weights(file: Path, wanted: Callable[[str], bool] = lambda key: True,
                 part: Callable[[str, list[int]], tuple[slice, ...]] | None = None,
                 keep_grid: bool = True) -> Iterator[tuple[str, Tensor, Path]]:
    """Yield (Hugging Face's key, tensor, file). The rest as checkpoint.iterate_weights, which calls this.

    Without keep_grid, all weights are dequantised.
    """
    header = read_header(file)
    kept = kept_modes(header.tensors) if keep_grid else {}
    for name, tensor in header.tensors.items():
        if name == "rope_freqs.weight":     # in config.json
            continue
        try:
            yield from _cut(hub_prefix(name), name.rpartition(".")[2], tensor, heads_of(name, header.facts),
                            kept.get(name), wanted, part)
        except ValueError as error:
            raise ValueError(f"{tensor.file.resolve()}: {name}: {error}") from None


def _cut(prefix: str, last: str, tensor: Stored, heads: int, mode: str | None, wanted: Callable[[str], bool],
         part: Callable[[str, list[int]], tuple[slice, ...]] | None) -> Iterator[tuple[str, Tensor, Path]]:
    """`read_weights` of one tensor. It is read only if something of it is asked for."""
    shapes = stored_shapes(tensor, mode) if mode else {last: tensor.shape}
    slices = {kind: part(f"{prefix}.{kind}", list(shape)) if part else ()
              for kind, shape in shapes.items() if wanted(f"{prefix}.{kind}")}
    empty = {kind: torch.empty(shapes[kind], device="meta")[index] for kind, index in slices.items()}
    if any(cut.numel() for cut in empty.values()):
        whole = on_grid(tensor) if mode else {last: values(tensor)}
        if heads:
            whole = {kind: unpermute(content, heads) for kind, content in whole.items()}
        empty = {kind: whole[kind][index] for kind, index in slices.items()}
    for kind, content in empty.items():
        yield f"{prefix}.{kind}", content, tensor.file.resolve()


def heads_of(name: str, facts: dict) -> int:
    """The number of heads whose rows `unpermute` puts back in order; 0 if the rows are in order."""
    kind, heads = name.split(".")[-2], facts["llama.attention.head_count"] if is_llama(facts) else 0
    if kind == "attn_k" and heads:
        return facts.get("llama.attention.head_count_kv", heads)
    return heads if kind == "attn_q" else 0


def is_llama(facts: dict) -> bool:
    return facts["general.architecture"] == "llama"


def unpermute(weight: Tensor, n_head: int) -> Tensor:
    """Query or key rows [H * D, ...] from llama.cpp's order to Hugging Face's.

    In its architecture "llama", RoPE rotates neighbouring rows (2i, 2i+1) of a head, in Hugging Face's code rows
    (i, i + D/2). llama.cpp's converter therefore interleaves the halves of each head. Without this function the weights
    would load and run all the same, but perplexity on the paragraph in tests/test_download.py would be 45, not 11.
    """
    if len(weight) % (2 * n_head):
        raise ValueError(f"{len(weight)} rows of queries or keys are not {n_head} heads of an even width")
    pairs = weight.unflatten(0, (n_head, -1, 2))    # [H, D/2, 2, ...]
    return pairs.transpose(1, 2).flatten(0, 2)


def stored_shapes(tensor: Stored, mode: str) -> dict[str, tuple[int, ...]]:
    """The shapes of `on_grid`'s tensors."""
    n, k = tensor.shape
    if mode == "int8":
        return {"weight": (n, k), "scales": (n, k // 32)}
    return {"weight": (n, k // 2), "scales": (n, k // 32), "zeros": (n, k // 32)}


def on_grid(tensor: Stored) -> dict[str, Tensor]:
    """A weight in Q4_0, Q4_1 or Q8_0 -> q, scales and zeros as linears.py has them; scales and zeros in fp32.

    A block of 32 columns is d (fp16), in Q4_1 also m, then q: w = d * q, d * (q - 8) in Q4_0, d * q + m in Q4_1.
    The low halves of 16 bytes are columns 0 to 15, the high halves 16 to 31.
    """
    n_half = 2 if tensor.kind == "Q4_1" else 1      # fp16 numbers in front of q
    blocks = raw(tensor).unflatten(-1, (tensor.shape[-1] // 32, -1))                    # [N, G, bytes]
    numbers = blocks[..., :2 * n_half].contiguous().view(torch.float16).float()         # [N, G, 1 or 2]
    q, scales = blocks[..., 2 * n_half:], numbers[..., 0]
    if tensor.kind == "Q8_0":
        return {"weight": q.contiguous().view(torch.int8).flatten(-2), "scales": scales}
    even, odd = q[..., ::2], q[..., 1::2]
    packed = torch.cat((even & 15 | odd << 4, even >> 4 | odd & 240), -1)               # [N, G, 16]
    zeros = numbers[..., 1] + 8 * scales if n_half == 2 else torch.zeros_like(scales)
    return {"weight": packed.flatten(-2), "scales": scales, "zeros": zeros}


def values(tensor: Stored) -> Tensor:
    """The numbers of a tensor: as stored, or dequantised to fp32."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if tensor.kind in dtypes:
        return raw(tensor).view(dtypes[tensor.kind])
    if tensor.kind == "Q8_0":
        stored = on_grid(tensor)
        return (stored["weight"].unflatten(-1, (-1, 32)) * stored["scales"][..., None]).flatten(-2)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize
    try:
        return torch.from_numpy(dequantize(raw(tensor).numpy(), GGMLQuantizationType[tensor.kind]))
    except NotImplementedError:
        raise ValueError(f"the gguf package cannot dequantise {tensor.kind}") from None


def raw(tensor: Stored) -> Tensor:
    """The bytes of a tensor: uint8 [..., bytes of a row]. The file is mapped: a change of them stays in memory."""
    data = np.memmap(tensor.file, np.uint8, "c", tensor.begin, (tensor.end - tensor.begin,))
    return torch.from_numpy(data).view(*tensor.shape[:-1], -1)
