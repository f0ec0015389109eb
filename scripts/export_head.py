"""Write a head as a serving engine loads it: python scripts/export_head.py --head HEAD --for sglang --out FOLDER

    vllm serve TARGET --speculative-config '{"method": "eagle", "model": "FOLDER", "num_speculative_tokens": 4}'
    python -m sglang.launch_server --model TARGET --speculative-algorithm EAGLE --speculative-draft-model-path FOLDER \\
        --speculative-num-steps 5 --speculative-eagle-topk 4 --speculative-num-draft-tokens 26

Both read the official keys and take embedding and LM head from the target, but differ in three points, as their sources
say (vLLM, llama_eagle.py and configs/eagle.py; SGLang, llama_eagle.py and llama.py; read in November 2026):

- the architecture is LlamaForCausalLM for vLLM, which puts "Eagle" before it, and LlamaForCausalLMEagle for SGLang;
- fc has no bias in vLLM (train_head.py --no-bias), and always one in SGLang, which is random where the file has none;
- the key "bias" of config.json, which is fc's in the official format, means the attention's there: it is left out
  for SGLang; for vLLM it is false, true of both, and the head is still read here. Biases of q, k and v (Qwen2) are "qkv_bias" for vLLM; SGLang knows them only together with one of o_proj, here zero.

A draft_vocab.json beside the head becomes token_map.pt, SGLang's --speculative-token-map.

SGLang (0.5.23) refuses a draft whose max_position_embeddings is below its target's context; vLLM raises the number by
itself. --context N raises it here: where RoPE is not scaled, nothing else depends on it.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import root  # noqa: F401
from console import Parser, command, number, say, write_atomically
from eagle_head import EagleHead
from generate import load_draft_vocab
from checkpoint import load_weights, quantize_settings, read_json, resolve_checkpoint
from config import ModelArgs

ARCHITECTURE = {"vllm": "LlamaForCausalLM", "sglang": "LlamaForCausalLMEagle"}
KEPT = """hidden_act hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size rms_norm_eps
          max_position_embeddings rope_theta rope_scaling rope_parameters bos_token_id eos_token_id pad_token_id torch_dtype
          dtype""".split()


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
        # A plain list: SGLang makes a tensor of what it loads.
        torch.save(load_draft_vocab(str(folder / "draft_vocab.json"), folder), args.out / "token_map.pt")
    say(f"wrote {args.out}")
    if args.engine == "sglang" and args.context is None:
        say(f"its max_position_embeddings is {context_of(config)}: SGLang refuses a draft with less than its target's context, "
            "which --context N gives it")


def context_of(config: dict) -> int:
    return config.get("max_position_embeddings") or 2048    # transformers' default for LLaMA


def with_context(config: dict, n: int) -> dict:
    """The same with max_position_embeddings raised to n. Raises ValueError where that is less, or RoPE is scaled by it."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(f"--context {n}: the head's RoPE is scaled ({kind}), and may depend on its max_position_embeddings")
    if n < context_of(config):
        raise ValueError(f"--context {n} is less than the head's max_position_embeddings, {context_of(config)}")
    return config | {"max_position_embeddings": n}


def read_weights(folder: Path, config: dict) -> dict[str, Tensor]:
    """The official keys -> tensors as stored. Strict; the target's embedding, if it is there, is left out."""
    if "Eagle3" in str(config.get("architectures")) or config.get("eagle_version", 1) not in (1, 2):
        raise ValueError(f"{folder} is an EAGLE-3 head: EAGLE-1 and EAGLE-2 heads are exported")
    c = ModelArgs.from_config(config | {"model_type": "llama", "num_hidden_layers": 1})
    head = EagleHead(replace(c, qkv_bias=bool(config.get("qkv_bias"))), target=None, bias=config.get("bias", True))
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
        raise ValueError("vLLM's EAGLE head has no fc.bias, and this head's is not zero: train one with train_head.py --no-bias")
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
    """The weights first: a folder with a config.json is a whole one."""
    from safetensors.torch import save_file
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: not a folder")
    out.mkdir(parents=True, exist_ok=True)
    part = out / "model.safetensors.part"
    save_file(weights, part, metadata={"format": "pt"})
    part.replace(out / "model.safetensors")
    write_atomically(out / "config.json", json.dumps(config, indent=1) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Write an EAGLE-1 or EAGLE-2 head as vLLM or SGLang load it.")
    parser.add_argument("--head", required=True, help="folder or hub id, official format")
    parser.add_argument("--for", required=True, dest="engine", choices=sorted(ARCHITECTURE))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--context", type=number(int, 1), metavar="N", help="raise max_position_embeddings to the target's")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
