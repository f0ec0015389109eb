"""Writes tiny checkpoints as GPTQ's, AWQ's and compressed-tensors' tools do, from the descriptions of the formats.

    hf = write_foreign(folder, "gqa", "gptq", bits=4, group_size=32)    # transformers' model of the dequantised weights

Written for clarity: values are packed one by one, and a weight is dequantised by w = (u - z) * s, element by element.
"""
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from reference import edited_json, tiny

# Rows that groups of 32 and 64 divide.
WIDE = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)    # the column in each nibble of an int32, lowest first
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def pack_int32(values, bits, order=None):
    """Whole numbers [R, C] below 2^bits -> int32 [R, C * bits / 32]."""
    n = 32 // bits
    packed = torch.zeros(len(values), values.shape[1] // n, dtype=torch.int64)
    for i, column in enumerate(order or range(n)):
        packed |= values[:, column::n].long() << bits * i
    return torch.where(packed >= 2 ** 31, packed - 2 ** 32, packed).int()


def quantise(weight, bits, group_size, symmetric, g_idx=None, dtype=torch.float16):
    """weight [N, K] -> u [N, K], s [N, G] in dtype, z [N, G], and the dequantised weight in fp32."""
    (N, K), middle, top = weight.shape, 2 ** (bits - 1), 2 ** bits - 1
    group_size = K if group_size == -1 else group_size
    groups = torch.arange(K) // group_size if g_idx is None else g_idx.long()
    s, z = torch.zeros(N, K // group_size), torch.full((N, K // group_size), middle)
    for g in range(K // group_size):
        columns = weight[:, groups == g]
        if symmetric:
            s[:, g] = columns.abs().amax(1) / (middle - 1)
        else:
            low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
            s[:, g] = (high - low) / top
            z[:, g] = (-low / s[:, g]).round().clamp(1, top)
    s = s.to(dtype)
    u = (weight / s.float()[:, groups] + z[:, groups]).round().clamp(0, top).int()
    dequantised = torch.stack([(u[:, k] - z[:, groups[k]]) * s[:, groups[k]].float() for k in range(K)], dim=1)
    return u, s, z, dequantised


def gptq_tensors(u, s, z, bits, g_idx=None, *, v2=False, **_):
    K, G = u.shape[1], s.shape[1]
    return {"qweight": pack_int32(u, bits).T.contiguous(),
            "qzeros": pack_int32(z.T - (0 if v2 else 1), bits), "scales": s.T.contiguous(),
            "g_idx": (torch.arange(K) // (K // G) if g_idx is None else g_idx).int()}


def awq_tensors(u, s, z, bits, g_idx=None, **_):
    return {"qweight": pack_int32(u.T, bits, AWQ_ORDER), "qzeros": pack_int32(z.T, bits, AWQ_ORDER),
            "scales": s.T.contiguous()}


def packed_tensors(u, s, z, bits, g_idx=None, *, symmetric=True, **_):
    tensors = {"weight_packed": pack_int32(u, bits), "weight_scale": s, "weight_shape": torch.tensor(u.shape)}
    if not symmetric:
        tensors["weight_zero_point"] = pack_int32(z.T, bits).T.contiguous()
    return tensors if g_idx is None else tensors | {"weight_g_idx": g_idx.int()}


def int8_tensors(u, s, z, bits, g_idx=None, *, symmetric=True, **_):
    tensors = {"weight": (u - 128).to(torch.int8), "weight_scale": s}
    return tensors if symmetric else tensors | {"weight_zero_point": (z - 128).to(torch.int8)}


WRITERS = {"gptq": gptq_tensors, "awq": awq_tensors, "pack-quantized": packed_tensors, "int-quantized": int8_tensors}


def settings_of(method, bits, group_size, symmetric, desc_act, v2):
    """What the tools write as quantization_config."""
    if method == "gptq":
        return dict(quant_method="gptq", bits=bits, group_size=group_size, sym=symmetric, desc_act=desc_act,
                    damp_percent=0.01, true_sequential=True) | (dict(checkpoint_format="gptq_v2") if v2 else {})
    if method == "awq":
        return dict(quant_method="awq", bits=bits, group_size=group_size, version="gemm", zero_point=True,
                    modules_to_not_convert=None)
    weights = dict(num_bits=bits, type="int", symmetric=symmetric, strategy="channel" if group_size == -1 else "group",
                   group_size=None if group_size == -1 else group_size, dynamic=False)
    group = dict(targets=["Linear"], weights=weights, input_activations=None, output_activations=None)
    return dict(quant_method="compressed-tensors", format=method, quantization_status="compressed", ignore=["lm_head"],
                kv_cache_scheme=None, config_groups={"group_0": group})


def order_of(name, K, group_size, seed=0):
    """g_idx [K] of activation order: that of the inputs, which q, k, v and gate, up share."""
    shared = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj")
    generator = torch.Generator().manual_seed(sum(shared.encode()) + seed)
    return torch.randperm(K, generator=generator) // (K if group_size == -1 else group_size)


@torch.no_grad()
def write_foreign(folder, kind, method, *, bits=4, group_size=32, symmetric=False, desc_act=False, v2=False,
                  beside=False, skip=(), dtype=torch.float16, order=order_of, bias=False, **overrides):
    """Write a checkpoint; return transformers' model with the dequantised weights, in fp32, of folder-dense.

    beside   GPTQ's settings are in quantize_config.json
    skip     names that end so keep 16 bits
    order    with desc_act: a linear's name, K and group size -> g_idx
    bias     every linear has a bias of zeros, as some tools write it
    """
    import transformers
    folder, dense = Path(folder), Path(f"{folder}-dense")
    tiny(kind, folder, **WIDE | overrides)
    dense.mkdir()
    (dense / "config.json").write_bytes((folder / "config.json").read_bytes())
    weights, written = load_file(folder / "model.safetensors"), {}
    for key, weight in weights.items():
        name = key.removesuffix(".weight")
        if name.split(".")[-1] not in LINEARS or name.endswith(tuple(skip)):
            written[key] = weight
            continue
        g_idx = order(name, weight.shape[1], group_size) if desc_act else None
        u, s, z, weights[key] = quantise(weight, bits, group_size, symmetric, g_idx, dtype)
        tensors = WRITERS[method](u, s, z, bits, g_idx, symmetric=symmetric, v2=v2)
        if bias and f"{name}.bias" not in weights:
            tensors["bias"] = torch.zeros(len(weight), dtype=dtype)
        written |= {f"{name}.{part}": tensor.contiguous() for part, tensor in tensors.items()}
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    settings = settings_of(method, bits, group_size, symmetric, desc_act, v2)
    if beside:
        (folder / "quantize_config.json").write_text(json.dumps(settings))
    else:
        with edited_json(folder / "config.json") as config:
            config["quantization_config"] = settings
    return transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager")
