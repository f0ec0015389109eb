"""Write an EAGLE head of any kind as a serving engine loads it.

    python scripts/export_head.py --head HEAD --for sglang --out FOLDER
    vllm serve TARGET --speculative-config '{"method": "eagle", "model": "FOLDER", "num_speculative_tokens": 4}'

EAGLE-1 and 2. Both engines read the official keys, and take embedding and LM head from the target. They differ in three
points (read in their sources in November 2026: vLLM's llama_eagle.py and configs/eagle.py, SGLang's llama_eagle.py and
llama.py):

- The architecture is LlamaForCausalLM for vLLM, which puts "Eagle" before it, and LlamaForCausalLMEagle for SGLang.
- In vLLM fc has no bias (train_head.py --no-bias). In SGLang it always has one, random where the file has none.
- The key "bias" of config.json is fc's in the official format, and the attention's in the engines. It is left out for
  SGLang. For vLLM it is false, which is true of both, so that the exported head can be read here as well. Biases of
  q, k and v (Qwen2) are "qkv_bias" in vLLM. SGLang has them only together with a bias of o_proj, which is zero here.

A draft_vocab.json beside the head becomes token_map.pt for SGLang's --speculative-token-map.

EAGLE-3 (llama_eagle3.py in both). SGLang reads the authors' keys, and counts captured layers by their outputs: it says
[1, ...]. It has none of the later norms, so a head with one is refused. vLLM reads what speculators writes: the prefix
`layers.0.`, LLaMA's keys nested in config.json, all flags, and layers counted by their inputs: [2, ...]. A head whose
file names no layers names none afterwards: both engines have the paper's default.

SGLang (0.5.23) refuses a draft whose max_position_embeddings is below its target's context, and vLLM raises the number
by itself. --context N raises it here. Nothing else depends on it where RoPE is not scaled.
"""
import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import root  # noqa: F401
from checkpoint import iterate_weights, load_weights, quantize_settings, read_json, resolve_checkpoint
from config import ModelArgs, rope_type
from console import Parser, command, number, say, whole_or_nothing, write_atomically
from eagle_head import Eagle3Head, EagleHead
from generate import load_draft_vocab
from head_config import (FLAGS, LAYERS_KEY, Eagle3Spec, eagle3_spec, head_kind, official_config, official_key,
                         rope_settings, stored_shapes)

ARCHITECTURE = {"vllm": "LlamaForCausalLM", "sglang": "LlamaForCausalLMEagle"}
KEPT = """hidden_act hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size
          rms_norm_eps max_position_embeddings rope_theta rope_scaling rope_parameters bos_token_id eos_token_id
          pad_token_id torch_dtype dtype""".split()


@command()
def main(args: argparse.Namespace) -> None:
    folder = resolve_checkpoint(args.head)
    config = read_json(folder / "config.json")
    if config.get("quantization_config") or quantize_settings(folder):
        raise ValueError(f"{folder}: a quantised head is not exported; give the 16-bit one that it was made from")
    if head_kind(config, stored_shapes(folder)) == "eagle3":
        spec, weights = read_eagle3(folder, config)
        config = official_config(config)
    else:
        spec, weights = None, read_weights(folder, config)
    if args.context is not None:
        config = with_context(config, args.context)
    if spec is not None:
        config, weights = CONVERT_EAGLE3[args.engine](config, spec, weights)
    else:
        config, weights = CONVERT[args.engine](config, weights)
    write(args.out, config, weights)
    if spec is None and args.engine == "sglang" and (folder / "draft_vocab.json").exists():
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
    if rope_type(config) != "default":
        raise ValueError(f"--context {n}: the head's RoPE is scaled ({rope_type(config)}), "
                         "and may depend on its max_position_embeddings")
    if n < context_of(config):
        raise ValueError(f"--context {n} is less than the head's max_position_embeddings, {context_of(config)}")
    return config | {"max_position_embeddings": n}


def read_weights(folder: Path, config: dict) -> dict[str, Tensor]:
    """The official keys and their tensors as stored, without the target's embedding. Other keys are refused."""
    if config.get("eagle_version", 1) not in (1, 2):
        raise ValueError(f"{folder}: eagle_version {config['eagle_version']!r} is not known")
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


# EAGLE-3


def read_eagle3(folder: Path, config: dict) -> tuple[Eagle3Spec, dict[str, Tensor]]:
    """What the head is, and its weights as stored, with `layers.0.` for `midlayer.`. Strict, as in decoding."""
    flat, shapes = official_config(config), stored_shapes(folder)
    t = flat.get("target_hidden_size") or flat.get("hidden_size")
    if not isinstance(t, int) or not isinstance(flat.get("vocab_size"), int):
        raise ValueError(f"{folder}: config.json has no whole number under hidden_size or vocab_size")
    # Of the target only its sizes are wanted. How many layers it has is not known here: only the default depends on it.
    sizes: Any = SimpleNamespace(dim=t, vocab_size=flat["vocab_size"], n_layer=UNKNOWN)
    spec = eagle3_spec(config, shapes, sizes)
    # Without the target a copy of its embedding is not told from a table of the head's own: what is there is written.
    spec = replace(spec, own_embedding="embed_tokens.weight" in shapes)
    if len(spec.capture) != 3:
        raise ValueError(f"{folder} takes {len(spec.capture)} hidden states: both engines give a head three")
    *_, (_, stored, _) = iterate_weights(folder, lambda key: official_key(key) == "fc.weight")
    target: Any = SimpleNamespace(config=sizes, norm=SimpleNamespace(weight=stored))
    head = Eagle3Head.load(folder, spec, target)
    weights = {key: tensor.contiguous().clone() for key, tensor in head.weights().items()}
    if spec.has_table:
        weights["d2t"] = head.own_ids - torch.arange(spec.draft_vocab_size)
        weights["t2d"] = torch.zeros(spec.args.vocab_size, dtype=torch.bool).index_fill_(0, head.own_ids, True)
    return spec, weights


UNKNOWN = 1 << 20   # layers of a target that is not there


def named_layers(spec: Eagle3Spec) -> list[int] | None:
    """The captured hidden states, counted as transformers does, where the head's file names them."""
    return list(spec.capture) if max(spec.capture) < UNKNOWN // 2 else None


def layer_config(config: dict, spec: Eagle3Spec, model_type: str = "llama") -> dict:
    """LLaMA's keys, with the sizes and the RoPE base that were found, whether or not the file says them."""
    c = spec.args
    kept = {key: config[key] for key in KEPT if config.get(key) is not None and not key.startswith("rope_")}
    rope = {"rope_scaling": c.rope_scaling or rope_settings(config, c.rope_theta)[0]}   # c has no dynamic scaling
    scaling = {} if rope_type(rope) == "default" else rope
    return {"model_type": model_type, "hidden_act": "silu"} | kept | scaling | {
        "hidden_size": c.dim, "num_hidden_layers": c.n_layer, "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_kv_head, "head_dim": c.head_dim, "intermediate_size": c.intermediate_size,
        "vocab_size": c.vocab_size, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
        "tie_word_embeddings": False}


def eagle3_for_sglang(config: dict, spec: Eagle3Spec, weights: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    lacking = [flag for flag in FLAGS if getattr(spec, flag)] + ["q_norm and k_norm"] * spec.args.qk_norm
    lacking += [f"{spec.args.n_layer} layers"] * (spec.args.n_layer > 1)
    if lacking:
        raise ValueError(f"SGLang's EAGLE-3 head has no {', '.join(lacking)}: it would drop what this head needs")
    names = named_layers(spec)
    eagle = {} if names is None else {"eagle_config": {LAYERS_KEY: [j - 1 for j in names],
                                                       "use_aux_hidden_state": True}}
    config = {"architectures": ["LlamaForCausalLMEagle3"]} | layer_config(config, spec) | eagle | {
        "draft_vocab_size": spec.draft_vocab_size, "target_hidden_size": spec.target_dim}
    if names is not None and names[0] != 2:
        say(f"SGLang counts outputs. To read this folder here: --aux-layers {' '.join(map(str, names))}")
    return config, {key.replace("layers.0.", "midlayer."): tensor for key, tensor in weights.items()}


def eagle3_for_vllm(config: dict, spec: Eagle3Spec, weights: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    names = named_layers(spec)
    flags = {flag: True for flag in FLAGS if getattr(spec, flag)} | {
        "norm_before_residual": spec.norm_before_residual}      # without the key vLLM takes it to be true
    method = {"proposal_type": "greedy", "speculative_tokens": 5}
    given = config.get("speculators_config")
    verifier = {"name_or_path": str(config.get("target") or ""), "architectures": []}
    return {
        "architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_version": "0.3.0",
        "draft_vocab_size": spec.draft_vocab_size, "target_hidden_size": spec.target_dim, **flags,
        **({} if names is None else {LAYERS_KEY: names}), "tie_word_embeddings": False,
        "transformer_layer_config": layer_config(config, spec, "qwen3" if spec.args.qk_norm else "llama"),
        "speculators_config": given or {"algorithm": "eagle3", "default_proposal_method": "greedy",
                                        "proposal_methods": [method], "verifier": verifier},
    }, weights


CONVERT_EAGLE3 = {"vllm": eagle3_for_vllm, "sglang": eagle3_for_sglang}


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
    parser = Parser(description="Write an EAGLE head as vLLM or SGLang load it.")
    parser.add_argument("--head", required=True, help="folder or hub id")
    parser.add_argument("--for", required=True, dest="engine", choices=sorted(ARCHITECTURE))
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--context", type=number(int, 1), metavar="N",
                        help="raise max_position_embeddings to the target's")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
