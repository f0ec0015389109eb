"""The head that a training begins with, its config.json, and its weights as files have them.

    config = head_config(read_json(folder / "config.json"), "my-target")            # EAGLE-1, as for EAGLE-2
    head = new_head(config, model, init=None, seed=0)
    config = eagle3_config(read_json(folder / "config.json"), "my-target", n_draft=32000)
    head = new_eagle3(config, model, ids, lm_head="random", seed=0)

Shapes: V vocabulary, Vd draft vocabulary, h head width, t target width, n captured hidden states.
"""
import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import read_json, resolve_checkpoint
from config import ModelArgs
from eagle_head import Eagle3Head, EagleHead
from head_config import LAYERS_KEY, captured_states, eagle3_spec, head_args, head_kind, stored_shapes
from model import Transformer
from train_data import Dialogue, common_tokens


def head_config(target: dict, name: str, bias: bool = True) -> dict:
    """config.json of a head in the official format, from its target's config.json and name."""
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
            "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    theta = target.get("rope_theta") or (target.get("rope_parameters") or {}).get("rope_theta") or 10000.0
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 1,
            **{key: target[key] for key in keys if target.get(key) is not None}, "rope_theta": theta, "bias": bias,
            "qkv_bias": target.get("model_type") == "qwen2", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "eagle_version": 1, "target": name}


def new_head(config: dict, model: Transformer, init: str | None, seed: int) -> EagleHead:
    """A head of EAGLE-1 in fp32, its weights random, or those of another head."""
    head = EagleHead(head_args(config, model.config), model, bias=config["bias"])
    if init is None:
        randomise(head, seed)
    else:
        other = read_init(init, model, "eagle1")
        if (other.fc.bias is None) == config["bias"]:
            raise ValueError(f"--init {init}: its fc has {'no' if config['bias'] else 'a'} bias: train with "
                             f"{'--no-bias' if config['bias'] else '--bias'}")
        head.load_state_dict(other.state_dict())
    return head.to(model.inv_freq.device).requires_grad_(True)


def randomise(head: EagleHead, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in head.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.02, generator=generator)
        elif name.endswith("bias"):
            parameter.zero_()


def read_init(init: str | Path, model: Transformer, kind: str) -> EagleHead:
    """The head of --init in fp32. Raises ValueError where a training of this kind cannot begin with it."""
    other = EagleHead.from_pretrained(init, model)
    check_kind(init, other.kind, kind)
    if not all(type(linear) is nn.Linear for linear in (other.fc, other.layer.feed_forward.w2)):
        raise ValueError(f"--init {init} is a quantised head: give the one it was made from")
    for key, weight in other.weights().items():
        if not weight.isfinite().all():
            raise ValueError(f"--init {init}: {key} holds values that are not finite")
    return other.float()


def check_kind(init: str | Path, kind: str, wanted: str) -> None:
    if kind != wanted:
        name = "EAGLE-3" if kind == "eagle3" else "EAGLE-1 or 2"
        raise ValueError(f"--init {init} is an {name} head: train it with --kind {kind}")


def begin(args: argparse.Namespace, folder: Path, model: Transformer, said: list[Dialogue], stop_ids: frozenset[int],
          capture: tuple[int, ...], resumes: bool) -> tuple[EagleHead, dict]:
    """The head with which a training by these options of train_head.py begins, or goes on, and its config.json.

    said     the dialogues from whose answers a draft vocabulary is counted
    resumes  the weights are those of a checkpoint: only what else makes the head is wanted
    """
    target, name, n_vocab = read_json(folder / "config.json"), Path(args.checkpoint).name, model.config.vocab_size
    if args.kind == "eagle1":
        config = head_config(target, name, args.bias)
        head = new_head(config, model, None if resumes else args.init, args.seed)
        if args.draft_vocab:
            head.set_draft_vocab(common_tokens(said, stop_ids, args.draft_vocab))
        return head, config
    if args.init is not None:
        return eagle3_from(args.out if resumes else args.init, model)
    ids = draft_ids(said, stop_ids, args.draft_vocab or n_vocab, n_vocab)
    config = eagle3_config(target, name, len(ids), args.aux_layers)
    return new_eagle3(config, model, len(capture), ids, args.lm_head, args.seed), config


# EAGLE-3


def capture_of(aux_layers: list[int] | None, init: str | Path | None, target: ModelArgs) -> tuple[int, ...]:
    """The hidden states that an EAGLE-3 head reads: those named, those of the head in `init`, or the default.

    Raises ValueError for states that a head's config.json cannot name so that they are read in one way only.
    """
    if init is not None:
        folder = resolve_checkpoint(init)
        config, shapes = read_json(folder / "config.json"), stored_shapes(folder)
        check_kind(init, head_kind(config, shapes), "eagle3")
        return eagle3_spec(config, shapes, target).capture
    if aux_layers is not None and aux_layers[0] != 2 and aux_layers != [target.n_layer]:
        raise ValueError(f"--aux-layers {' '.join(map(str, aux_layers))} is not a list that a head's config.json can "
                         f"name in one way only: it begins with 2, or is {target.n_layer}, the final state, alone")
    n = 3 if aux_layers is None else len(aux_layers)
    return captured_states(layers_key(aux_layers, target.n_layer), n, target.n_layer, None)[0]


def layers_key(aux_layers: list[int] | None, n_layer: int) -> dict:
    """What config.json says of them. Of the default it says nothing: so every engine reads it alike."""
    return {} if aux_layers in (None, [n_layer]) else {LAYERS_KEY: aux_layers}


def draft_ids(dialogues: list[Dialogue], stop_ids: frozenset[int], n: int, n_vocab: int) -> list[int]:
    """A draft vocabulary of exactly n tokens, in order: the commonest of the answers and, where those are too few, the
    first of the tokenizer, which it learnt first."""
    common = common_tokens(dialogues, stop_ids, n)
    return sorted(list(dict.fromkeys([*common, *range(n_vocab)]))[:n])


def eagle3_config(target: dict, name: str, n_draft: int, aux_layers: list[int] | None = None) -> dict:
    """config.json of an EAGLE-3 head in the authors' format, from its target's config.json and name."""
    config = head_config(target, name)
    del config["bias"], config["qkv_bias"]
    return config | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": n_draft, "eagle_version": 3,
                     "target_hidden_size": target["hidden_size"],
                     **layers_key(aux_layers, target["num_hidden_layers"])}


def new_eagle3(config: dict, model: Transformer, n_state: int, ids: list[int], lm_head: str, seed: int) -> Eagle3Head:
    """An EAGLE-3 head in fp32 with random weights.

    ids      the draft vocabulary
    lm_head  "random", or the target's rows: "target" as a start, "frozen" for good. They read what is normed by the
             target's final norm, so the head's norm begins as that.
    """
    t, n_head = config["hidden_size"], config["num_attention_heads"]
    rows = n_head * config.get("head_dim", t // n_head)
    shapes = {"fc.weight": (t, n_state * t), "lm_head.weight": (len(ids), t),
              "layers.0.self_attn.q_proj.weight": (rows, 2 * t)}
    if len(ids) < model.config.vocab_size:
        shapes["d2t"] = (len(ids),)
    head = Eagle3Head(eagle3_spec(config, shapes, model.config), model)
    randomise(head, seed)
    head.to(model.inv_freq.device).requires_grad_(True)
    head.own_ids = torch.tensor(ids, device=model.inv_freq.device)
    head.set_draft_vocab(None)
    if lm_head != "random":
        with torch.no_grad():
            head.output.weight.copy_(model.output.weight[head.own_ids])
            head.norm.weight.copy_(model.norm.weight)
        head.output.requires_grad_(lm_head == "target")
    return head


def eagle3_from(init: str | Path, model: Transformer) -> tuple[Eagle3Head, dict]:
    """A head in fp32 that begins as another EAGLE-3 head, with its draft vocabulary and norms, and its config.json."""
    other = read_init(init, model, "eagle3")
    assert isinstance(other, Eagle3Head)
    if other.spec.own_embedding:
        raise ValueError(f"--init {init} has an embedding of its own, which is not trained here")
    head = Eagle3Head(other.spec, model)
    head.load_state_dict(other.state_dict())
    head.to(model.inv_freq.device).requires_grad_(True)
    head.own_ids = other.own_ids
    head.set_draft_vocab(None)
    return head, read_json(resolve_checkpoint(init) / "config.json")


def file_weights(head: EagleHead) -> dict[str, Tensor]:
    """A head's tensors under the authors' keys, in 16 bits."""
    weights = {key: weight.detach().to(torch.bfloat16, copy=True).cpu().contiguous()
               for key, weight in head.weights().items()}
    if not isinstance(head, Eagle3Head):
        return weights
    weights = {key.replace("layers.0.", "midlayer."): weight for key, weight in weights.items()}
    if head.spec.has_table:
        ids = head.own_ids.cpu()
        weights["d2t"] = ids - torch.arange(len(ids))
        weights["t2d"] = torch.zeros(head.config.vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
    return weights
