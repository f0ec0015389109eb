"""A GGUF file as a Hugging Face folder: configuration, tokenizer, and weights under Hugging Face's names.

    folder = as_folder(Path("model.Q4_0.gguf"))     # in the user's cache, with a link to the file
    for key, tensor, file in read_weights(folder / "model.gguf"): ...

No weight is written a second time. Q4_0, Q4_1, Q4_K and Q8_0 stay on their own grid, as int4 and int8 in groups of 32
(grid.py). Other quantised types are dequantised, to 16 bits in a model of 16 bits.
"""
import hashlib
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gguf_header
import gguf_tokenizer
from gguf_header import FORMATS, SPLIT, Header, Stored, fact, on_grid, parts_of, read_header, stored_shapes, values
from gguf_tokenizer import SPECIAL_IDS
from grid import Format, agreed

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
NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
         "output.weight": "lm_head.weight"}


# Files and folders


def as_folder(file: Path) -> Path:
    """A checkpoint's folder made of a GGUF file, in the user's cache: configuration, tokenizer and a link to the file.

    Made once for each state of the file (path, size, time) and of the code that makes it. Raises ValueError and
    FileNotFoundError in one line that names the file.
    """
    parts = [part.resolve() for part in parts_of(file)]
    state = [(str(part), part.stat().st_size, part.stat().st_mtime_ns) for part in parts]
    code = b"".join(Path(file).read_bytes() for file in (__file__, gguf_header.__file__, gguf_tokenizer.__file__))
    digest = hashlib.sha256(repr(state).encode() + code).hexdigest()
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "eagle-gguf"
    except RuntimeError:
        raise ValueError(f"{file}: this user has no home to keep a tokenizer in: set XDG_CACHE_HOME") from None
    folder = cache / f"{file.name.removesuffix('.gguf')}-{digest[:16]}"
    if folder.is_dir():
        return folder
    header = read_header(file)
    with tempfile.TemporaryDirectory(prefix=".gguf-", dir=made(cache)) as staging:
        whole = Path(staging) / "whole"
        write_folder(header, whole)
        if settings := summary(header):
            write_json(whole / "quantize.json", settings)
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


def write_folder(header: Header, folder: Path) -> None:
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
    for name, plain in (("expert_count", 0), ("rope.dimension_count", head_dim),
                        ("attention.value_length", head_dim), ("rope.scaling.yarn_log_multiplier", 0.0),
                        ("rope.scaling.attn_factor", 1.0), ("rope.scale_linear", 1.0)):
        if facts.get(f"{arch}.{name}", plain) != plain:
            raise ValueError(f"{arch}.{name} {facts[f'{arch}.{name}']!r} is not supported")
    context, theta, n_layer = own("context_length", int), own("rope.freq_base", float, 10000.0), own("block_count", int)
    return {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": dim,
        "intermediate_size": own("feed_forward_length", int),
        "num_hidden_layers": n_layer,
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
        **sliding_window(header, arch, n_layer),
        "torch_dtype": "bfloat16",
    }


def sliding_window(header: Header, arch: str, n_layer: int) -> dict:
    """The keys of config.json for `attention.sliding_window`: of all layers in LLaMA's architecture, which is Mistral's
    then; in Qwen's of those that the pattern names. Raises ValueError where that does not say which layers have it."""
    key = f"{arch}.attention.sliding_window"
    window, pattern = fact(header.facts, key, int, 0), header.facts.get(f"{key}_pattern")
    if window < 1:
        return {}
    if arch == "llama" and pattern in (None, [True] * n_layer):
        return {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    if arch == "llama" or not isinstance(pattern, list) or [type(has) for has in pattern] != [bool] * n_layer:
        raise ValueError(f"{key} {window} with {key}_pattern {str(pattern)[:80]} is not supported: in which of "
                         f"{n_layer} layers is it?")
    return {"sliding_window": window, "use_sliding_window": True,
            "layer_types": ["sliding_attention" if has else "full_attention" for has in pattern]}


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


def linears_of(tensors: dict[str, Stored]) -> dict[str, str]:
    """{GGUF's name of a weight: Hugging Face's name of its linear}, the LM head included."""
    names = re.compile(rf"blk\.\d+\.({'|'.join(LINEARS)})\.weight|output\.weight")
    return {name: hub_prefix(name) for name in tensors if names.fullmatch(name) and len(tensors[name].shape) == 2}


def formats_of(tensors: dict[str, Stored]) -> dict[str, Format]:
    """{Hugging Face's name of a linear: its format}, of those that stay on their grid. A tied LM head does not.

    q, k, v and gate, up become one linear. They stay if all of them have the same format.
    """
    linears = linears_of(tensors)
    return agreed({linear: FORMATS[tensors[name].kind] for name, linear in linears.items()
                   if tensors[name].kind in FORMATS}, linears.values())


def kept_formats(file: Path) -> tuple[dict[str, Format], str]:
    """`formats_of` a file, and a line that names the types of the linears that are dequantised instead."""
    tensors = read_header(file, vocabulary=False).tensors
    formats = formats_of(tensors)
    lost = Counter(tensors[name].kind for name, linear in linears_of(tensors).items() if linear not in formats)
    counts = [f"{count} in {kind}" for kind, count in sorted(lost.items()) if kind not in ("F32", "F16", "BF16")]
    return formats, f"GGUF: weights that are dequantised: {', '.join(counts)}" if counts else ""


def summary(header: Header) -> dict:
    """What a quantize.json says, for those who choose a tree or plan memory; {} if no weight stays on its grid."""
    formats = Counter(formats_of(header.tensors).values())
    if not formats:
        return {}
    mode = formats.most_common(1)[0][0].mode
    match = SPLIT.fullmatch(header.file.name)
    name = match[1] if match else header.file.name.removesuffix(".gguf")
    return {"mode": mode, "group_size": 32 if mode == "int4" else None, "tool": "gguf",
            "source": re.sub(r"(?i)[.-](i?q\d\w*|b?f16|f32)$", "", name)}


def read_weights(file: Path, wanted: Callable[[str], bool] = lambda key: True,
                 part: Callable[[str, list[int]], tuple[slice, ...]] | None = None,
                 keep_grid: bool = True) -> Iterator[tuple[str, Tensor, Path]]:
    """Yield (Hugging Face's key, tensor, file). The rest as checkpoint.iterate_weights, which calls this.

    Without keep_grid, all weights are dequantised.
    """
    header = read_header(file, vocabulary=False)
    kept = formats_of(header.tensors) if keep_grid else {}
    files = {part: part.resolve() for part in parts_of(file)}
    for name, tensor in header.tensors.items():
        if name == "rope_freqs.weight":     # in config.json
            continue
        try:
            prefix, last = hub_prefix(name), name.rpartition(".")[2]
            for key, content in _cut(prefix, last, tensor, heads_of(name, header.facts),
                                     prefix in kept and last == "weight", wanted, part):
                yield key, content, files[tensor.file]
        except ValueError as error:
            raise ValueError(f"{files[tensor.file]}: {name}: {error}") from None


def _cut(prefix: str, last: str, tensor: Stored, heads: int, is_kept: bool, wanted: Callable[[str], bool],
         part: Callable[[str, list[int]], tuple[slice, ...]] | None) -> Iterator[tuple[str, Tensor]]:
    """`read_weights` of one tensor, without the file. It is read only if something of it is asked for."""
    shapes = stored_shapes(tensor) if is_kept else {last: tensor.shape}
    slices = {kind: part(f"{prefix}.{kind}", list(shape)) if part else ()
              for kind, shape in shapes.items() if wanted(f"{prefix}.{kind}")}
    empty = {kind: torch.empty(shapes[kind], device="meta")[index] for kind, index in slices.items()}
    if any(cut.numel() for cut in empty.values()):
        whole = on_grid(tensor) if is_kept else {last: values(tensor)}
        if heads:
            whole = {kind: unpermute(content, heads) for kind, content in whole.items()}
        empty = {kind: whole[kind][index] for kind, index in slices.items()}
    for kind, content in empty.items():
        yield f"{prefix}.{kind}", content


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
