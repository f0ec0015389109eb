"""Write an EAGLE-1 or EAGLE-2 head as a serving engine loads it.

    python scripts/export_head.py --head HEAD --for sglang --out FOLDER
    vllm serve TARGET --speculative-config '{"method": "eagle", "model": "FOLDER", "num_speculative_tokens": 4}'

Both engines read the official keys, and take embedding and LM head from the target. They differ in three points (read
in their sources in November 2026: vLLM's llama_eagle.py and configs/eagle.py, SGLang's llama_eagle.py and llama.py):

- The architecture is LlamaForCausalLM for vLLM, which puts "Eagle" before it, and LlamaForCausalLMEagle for SGLang.
- In vLLM fc has no bias (train_head.py --no-bias). In SGLang it always has one, random where the file has none.
- The key "bias" of config.json is fc's in the official format, and the attention's in the engines. It is left out for
  SGLang. For vLLM it is false, which is true of both, so that the exported head can be read here as well. Biases of
  q, k and v (Qwen2) are "qkv_bias" in vLLM. SGLang has them only together with a bias of o_proj, which is zero here.

A draft_vocab.json beside the head becomes token_map.pt for SGLang's --speculative-token-map.

SGLang (0.5.23) refuses a draft whose max_position_embeddings is below its target's context, and vLLM raises the number
by itself. --context N raises it here. Nothing else depends on it where RoPE is not scaled.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import root  # noqa: F401
from checkpoint import load_weights, quantize_settings, read_json, resolve_checkpoint
from config import ModelArgs
from console import Parser, command, number, say, whole_or_nothing, write_atomically
from eagle_head import EagleHead
from generate import load_draft_vocab

ARCHITECTURE = {"vllm": "LlamaForCausalLM", "sglang": "LlamaForCausalLMEagle"}
KEPT = """hidden_act hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size
          rms_norm_eps max_position_embeddings rope_theta rope_scaling rope_parameters bos_token_id eos_token_id
          pad_token_id torch_dtype dtype""".split()


@command()
def main(args: argparse.Namespace) -> None:
    folder = resolve_checkpoint(args.head)
    config = read_json(folder / "config.json")
    if quantize_settings(folder) or config.get("quantization_config"):
        raise ValueError(f"{folder}: a quantised head is not exported; give the 16-bit one that it was made from")
    weights = read_weights(folder, config)
    if args.context is not None:
        config = with_context(config, args.context)
    config, weights = CONVERT[args.engine](config, weights)
    write(args.out, config, weights)
    if args.engine == "sglang" and (folder / "draft_vocab.json").exists():
        # A plain list: SGLang makes a tensor of it.
        torch.save(load_draft_vocab(str(folder / "draft_vocab.json"), folder), args.out / "token_map.pt")
    say(f"wrote {args.out}")
    if args.engine == "sglang" and args.context is None:
        say(f"its max_position_embeddings is {context_of(config)}: SGLang refuses a draft with less than its target's "
            "context, which --context N gives it")


def context_of(config: dict) -> int:
    return config.get("max_position_embeddings") or 2048    # transformers' default for LLaMA


def with_context(config: dict, n: int) -> dict:
    """The config with max_position_embeddings raised to n. Raises ValueError if that is less, or if RoPE is scaled."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(f"--context {n}: the head's RoPE is scaled ({kind}), "
                         "and may depend on its max_position_embeddings")
    if n < context_of(config):
        raise ValueError(f"--context {n} is less than the head's max_position_embeddings, {context_of(config)}")
    return config | {"max_position_embeddings": n}


def read_weights(folder: Path, config: dict) -> dict[str, Tensor]:
    """The official keys and their tensors as stored, without the target's embedding. Other keys are refused."""
    if "Eagle3" in str(config.get("architectures")) or config.get("eagle_version", 1) not in (1, 2):
        raise ValueError(f"{folder} is an EAGLE-3 head: EAGLE-1 and EAGLE-2 heads are exported")
    c = ModelArgs.from_config(config | {"model_type": "llama", "num_hidden_layers": 1})
    target: Any = None      # only the head's own weights are wanted
    head = EagleHead(replace(c, qkv_bias=bool(config.get("qkv_bias"))), target, bias=config.get("bias", True))
    dtype = getattr(torch, str(config.get("torch_dtype", config.get("dtype", "float32"))), torch.float32)
    targets = head.to(dtype).weights()
    load_weights(targets, folder, {"embed_tokens.weight": torch.empty(c.vocab_size, c.dim, device="meta")})
    return {key: tensor.contiguous().clone() for key, tensor in targets.items()}


def common_config(config: dict, engine: str) -> dict:
    return {"architectures": [ARCHITECTURE[engine]], "model_type": "llama", "num_hidden_layers": 1,
            "tie_word_embeddings": False} | {key: config[key] for key in KEPT if config.get(key) is not None}


def for_vllm(config: dict, weights: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    bias = weights.pop("fc.bias", None)
    if bias is not None and bias.any():
        raise ValueError("vLLM's EAGLE head has no fc.bias, and this head's is not zero: "
                         "train one with train_head.py --no-bias")
    extra = {"bias": False} | ({"qkv_bias": True} if config.get("qkv_bias") else {})
    return common_config(config, "vllm") | extra, weights


def for_sglang(config: dict, weights: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    dim, dtype = weights["fc.weight"].shape[0], weights["fc.weight"].dtype
    weights.setdefault("fc.bias", torch.zeros(dim, dtype=dtype))
    if not config.get("qkv_bias"):
        return common_config(config, "sglang"), weights
    weights["layers.0.self_attn.o_proj.bias"] = torch.zeros(dim, dtype=dtype)
    return common_config(config, "sglang") | {"attention_bias": True}, weights


CONVERT = {"vllm": for_vllm, "sglang": for_sglang}


def write(out: Path, config: dict, weights: dict[str, Tensor]) -> None:
    """config.json is written last: a folder that has one is complete."""
    from safetensors.torch import save_file
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: not a folder")
    out.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(out / "model.safetensors", ".part") as part:
        save_file(weights, part, metadata={"format": "pt"})
    write_atomically(out / "config.json", json.dumps(config, indent=1) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Write an EAGLE-1 or EAGLE-2 head as vLLM or SGLang load it.")
    parser.add_argument("--head", required=True, help="folder or hub id, official format")
    parser.add_argument("--for", required=True, dest="engine", choices=sorted(ARCHITECTURE))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--context", type=number(int, 1), metavar="N",
                        help="raise max_position_embeddings to the target's")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
