"""Models by their shape alone: the published targets, each with its published EAGLE head, on random weights or on none.

    model = random_model(SHAPES["llama-2-7b"], torch.device("cuda"), torch.bfloat16)
    head = random_head(model, "llama-2-7b")                 # or random_head(model, "llama-3.1-8b", "eagle3")

What a step costs does not depend on the values of the weights, so nothing has to be fetched to time it.
"""
import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch

from config import ModelArgs
from eagle_head import Eagle3Head, EagleHead
from head_config import Eagle3Spec
from model import Transformer
from linears import install


def shape(dim: int, n_layer: int, n_head: int, n_kv_head: int, intermediate_size: int, vocab_size: int,
          block_size: int, **others) -> ModelArgs:
    facts = {"model_type": "llama", "head_dim": dim // n_head, "norm_eps": 1e-5, "rope_theta": 1e4} | others
    return ModelArgs(dim=dim, n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, intermediate_size=intermediate_size,
                     vocab_size=vocab_size, block_size=block_size, **facts)


SHAPES = {  # from the published config.json files; Vicuna-7B and 13B are LLaMA's
    "llama-2-7b": shape(4096, 32, 32, 32, 11008, 32000, 4096),
    "llama-2-13b": shape(5120, 40, 40, 40, 13824, 32000, 4096),
    "llama-2-70b": shape(8192, 80, 64, 8, 28672, 32000, 4096),
    "llama-3-8b": shape(4096, 32, 32, 8, 14336, 128256, 8192, rope_theta=5e5),
    "llama-3-70b": shape(8192, 80, 64, 8, 28672, 128256, 8192, rope_theta=5e5),
    "llama-3.1-8b": shape(4096, 32, 32, 8, 14336, 128256, 131072, rope_theta=5e5, rope_scaling={
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}),
    "qwen3-8b": shape(4096, 36, 32, 8, 12288, 151936, 40960, rope_theta=1e6, norm_eps=1e-6, model_type="qwen3",
                      qk_norm=True),
    "vicuna-33b": shape(6656, 60, 52, 52, 17920, 32000, 2048, norm_eps=1e-6),
    "mixtral-8x7b": shape(4096, 32, 32, 8, 14336, 32000, 32768, rope_theta=1e6, model_type="mixtral", n_expert=8,
                          n_expert_active=2),
    "qwen3-30b-a3b": shape(2048, 48, 32, 4, 6144, 151936, 40960, head_dim=128, norm_eps=1e-6, rope_theta=1e6,
                           model_type="qwen3_moe", qk_norm=True, n_expert=128, n_expert_active=8,
                           moe_intermediate_size=768),
    "smollm2-135m": shape(576, 30, 9, 3, 1536, 49152, 8192, rope_theta=1e5, tie_word_embeddings=True),
}
TINY = shape(64, 2, 8, 8, 128, 256, 4096)     # for dry runs of the scripts

# Where a published head is other than a dense layer of its target's shape and an fc with a bias: from its config.json.
HEADS = {
    "llama-3-8b": {"bias": False}, "llama-3-70b": {"bias": False},
    "vicuna-33b": {"n_kv_head": 13}, "mixtral-8x7b": {"n_kv_head": 32},
}
# Tokens in the draft vocabulary of EAGLE-3 heads: of the published ones; the demo model's is its draft_vocab.json's.
DRAFT_VOCAB, DRAFT_VOCABS = 32000, {"smollm2-135m": 8192}


def meta_model(config: ModelArgs, dtype: torch.dtype, settings: dict | None = None) -> Transformer:
    """A model without memory, to count parameters and bytes; `settings`, as in quantize.json, quantise it."""
    with torch.device("meta"):
        model = Transformer(config)
        if settings is not None:
            install(model, settings)
        return model.to(dtype)


def random_model(config: ModelArgs, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Random weights, made on the device in this dtype: no copy on the host, none in another dtype."""
    with default_dtype(dtype), device:
        model = Transformer(config)
    for weight in model.parameters():
        if weight.dim() == 3:  # experts, which have no initialisation of their own
            weight.normal_(std=0.02)
    return model.eval()


def head_shape(target: ModelArgs, name: str | None = None) -> tuple[ModelArgs, bool]:
    """Config and bias of the head published for this target; without a known name, one dense layer of its shape."""
    others = {"bias": True} | HEADS.get(name or "", {})
    bias = others.pop("bias")
    return replace(target, n_layer=1, n_expert=0, n_expert_active=0, qk_norm=False, rope_scaling=None, **others), bias


def eagle3_shape(target: ModelArgs, name: str | None = None) -> Eagle3Spec:
    """The EAGLE-3 head of this target: three captured states, one layer of its shape and a draft vocabulary."""
    args = replace(head_shape(target)[0], qkv_bias=False, rope_theta=1e4, tie_word_embeddings=False)
    capture = (min(2, target.n_layer), target.n_layer // 2, max(target.n_layer - 3, 0))
    n_draft = min(DRAFT_VOCABS.get(name or "", DRAFT_VOCAB), target.vocab_size)
    return Eagle3Spec(args, target.dim, capture, n_draft, own_embedding=False)


def random_head(target: Transformer, name: str | None = None, kind: str = "eagle1") -> EagleHead:
    """kind as EagleHead.kind: "eagle1" or "eagle3"."""
    config, bias = head_shape(target.config, name)
    weight = target.norm.weight
    with default_dtype(weight.dtype), weight.device:
        if kind == "eagle1":
            return EagleHead(config, target, bias).eval()
        spec = eagle3_shape(target.config, name)
        head = Eagle3Head(spec, target)
        head.own_ids = torch.arange(spec.draft_vocab_size)
        head.set_draft_vocab(None)
        return head.eval()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The dtype in which modules are made."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
