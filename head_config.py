"""What a head's folder says: the kind of head, its dialect, and every flag. Knows no modules.

    kind = head_kind(read_json(folder / "config.json"))             # "eagle1" (EAGLE-1 and 2) or "eagle3"
    args = head_args(config, target_args)                           # EAGLE-1 and 2
    spec = eagle3_spec(config, stored_shapes(folder), target_args)  # EAGLE-3

EAGLE-3 heads (arXiv 2503.01840) are published in several dialects: the authors', SpecForge's (which SGLang reads),
AngelSlim's, and that of speculators and vLLM. They differ in names of keys, in how captured layers are counted and in
norms. A key or flag that is not known here is refused by name: one that is dropped costs acceptance without an error.

Shapes: h head width, t target width, n captured hidden states, V vocabulary, Vd draft vocabulary.
"""
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint import iterate_weights
from config import ModelArgs

SAID = "the head's config.json"


def head_kind(config: dict) -> str:
    """"eagle1" for EAGLE-1 and 2, "eagle3"."""
    config = official_config(config)
    is_eagle3 = config.get("eagle_version") == 3 or "Eagle3" in str(config.get("architectures"))
    is_eagle3 = is_eagle3 or "draft_vocab_size" in config or "eagle_aux_hidden_state_layer_ids" in config
    return "eagle3" if is_eagle3 else "eagle1"


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Official key -> shape of every tensor in the folder, read from headers. 4-bit weights count as unpacked."""
    shapes: dict[str, tuple[int, ...]] = {}

    def no_value(key: str, shape: list[int]) -> tuple[slice, ...]:
        shapes[official_key(key)] = tuple(shape)
        return (slice(0, 0),) if shape else ()

    for _ in iterate_weights(folder, part=no_value):
        pass
    for key in [key for key in shapes if key.removesuffix("weight") + "zeros" in shapes]:   # only int4 has zero points
        shapes[key] = (*shapes[key][:-1], 2 * shapes[key][-1])
    return shapes


def official_config(config: dict) -> dict:
    """A head's config.json with the keys of the official format. Two other formats nest and rename them:

    vLLM's converters   {"model_type": "eagle", "model": {...}, "eagle_fc_bias": bool, "truncated_vocab_size": int}
    speculators         {"speculators_model_type": "eagle", "transformer_layer_config": {...}, "fusion_bias": bool}

    Raises ValueError, naming key and value, for a head of another kind.
    """
    outer = dict(config)
    places = [outer.pop(key, None) for key in ("model", "transformer_layer_config")]
    nested = next((place for place in places if isinstance(place, dict)), {})
    flat = {**outer, **nested, "architectures": [outer.get("architectures"), nested.get("architectures")]}
    if flat.get("speculators_model_type", "eagle") not in ("eagle", "eagle3"):
        raise ValueError(f"{SAID}: speculators_model_type {flat['speculators_model_type']!r} is not "
                         "supported (eagle and eagle3 are)")
    if flat.get("speculators_model_type") == "eagle3":
        flat["eagle_version"] = 3
    for key in ("layernorms", "add_para_norm"):
        if flat.get(key):
            raise ValueError(f"{SAID}: {key} {flat[key]!r}, more norms than EAGLE has: not supported")
    if flat.get("truncated_vocab_size") not in (None, flat.get("vocab_size")):
        raise ValueError(f"{SAID}: truncated_vocab_size {flat['truncated_vocab_size']} is not supported: "
                         "its LM head is not the target's")
    for key in ("eagle_fc_bias", "fusion_bias"):
        if key in flat:
            flat.setdefault("bias", bool(flat[key]))
    if nested:
        flat.setdefault("bias", False)
    return flat


def official_key(key: str) -> str:
    """The official name of a head's weight, with `layers.0.` for EAGLE-3's `midlayer.`.

    vLLM's loader puts "model." before it, speculators renames two modules of EAGLE-1.
    """
    while key.startswith("model."):
        key = key.removeprefix("model.")
    for theirs, ours in (("fusion_fc.", "fc."), ("transformer.", "layers.0."), ("midlayer.", "layers.0.")):
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
    return key


def refuse_output_bias(folder: Path) -> None:
    """Raise ValueError for a bias of o_proj that is not zero: SGLang's format has one of zeros beside q, k and v's."""
    for key, tensor, file in iterate_weights(folder, wanted=lambda key: key.endswith("o_proj.bias")):
        if tensor.any():
            raise ValueError(f"{file}: {key} is not zero: a head has no bias there")


def head_args(config: dict, target: ModelArgs) -> ModelArgs:
    """ModelArgs of an EAGLE-1 or 2 head from its config.json, compared with its target's."""
    config = official_config(config)
    for key, ours in (("hidden_size", target.dim), ("vocab_size", target.vocab_size)):
        if key not in config:
            raise ValueError(f"{SAID} has no key {key!r}")
        if config[key] != ours:
            raise ValueError(f"this head does not fit its target: {key} is {config[key]} in the head, "
                             f"{ours} in the target")
    # A head is a dense LLaMA layer whatever its target is, at most with Qwen2's biases.
    args = layer_args(config | {"model_type": "llama", "num_hidden_layers": 1, "attention_bias": False})
    return replace(args, qkv_bias=bool(config.get("qkv_bias") or config.get("attention_bias")))


def layer_args(config: dict) -> ModelArgs:
    try:
        return ModelArgs.from_config(config)
    except ValueError as error:
        raise ValueError(f"the head's {error}") from None


# EAGLE-3


@dataclass(frozen=True)
class Eagle3Spec:
    """An EAGLE-3 head as its file was understood."""
    args: ModelArgs                     # of its layers; dim is h, vocab_size the target's V
    target_dim: int                     # t
    capture: tuple[int, ...]            # the hidden states it reads, as Transformer.forward and transformers count
    draft_vocab_size: int
    own_embedding: bool                 # an embedding table of its own, because h is not t
    fc_norm: bool = False               # a norm on each captured hidden state
    norm_before_fc: bool = False        # one norm over all of them, joined
    norm_before_residual: bool = False  # the residual is the normed hidden state
    norm_output: bool = False           # it feeds its output back normed
    rope_source: str = ""               # where the RoPE base came from
    capture_source: str = ""            # where the list of captured states came from

    def describe(self) -> str:
        """One line that says what the file was taken to mean."""
        norms = [name for name in ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")
                 if getattr(self, name)]
        vocab = (f"draft vocabulary {self.draft_vocab_size:,} of {self.args.vocab_size:,}"
                 if self.draft_vocab_size != self.args.vocab_size else "whole vocabulary")
        layers = f", {self.args.n_layer} layers" if self.args.n_layer > 1 else ""
        return (f"EAGLE-3 head{layers}: hidden states {', '.join(map(str, self.capture))} ({self.capture_source}), "
                f"norms {', '.join(norms) or 'as in the paper'}, RoPE base {self.args.rope_theta:g} "
                f"({self.rope_source}), {vocab}")


FLAGS = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")
LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"
# Keys of config.json that decide nothing here, or are read by ModelArgs.
NEUTRAL = {
    "architectures", "auto_map", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
    "torch_dtype", "head_dim", "hidden_act", "hidden_size", "initializer_range", "intermediate_size", "layer_types",
    "max_position_embeddings", "max_window_layers", "mlp_bias", "model_type", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "pretraining_tp", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "sliding_window", "tie_word_embeddings", "transformers_version", "use_cache", "use_sliding_window",
    "vocab_size", "draft_vocab_size", "target_hidden_size", "eagle_config", "eagle_version", "target",
    "speculators_config", "speculators_model_type", "speculators_version", "has_no_defaults_at_init", "bias",
    "attention_bias", "target_model_type", "target_vocab_size", "original_max_position_embeddings",
    "truncated_vocab_size", "layernorms", "add_para_norm", "use_aux_hidden_state", LAYERS_KEY, *FLAGS,
}
# Words in the name of an unknown key that make it a flag of the head.
TELLING = re.compile("norm|residual|fc|aux|hidden|eagle|draft|layer|rope|mask|window|bias")


def eagle3_spec(config: dict, shapes: dict[str, tuple[int, ...]], target: ModelArgs, *,
                aux_layers: Sequence[int] | None = None, rope_theta: float | None = None) -> Eagle3Spec:
    """Read an EAGLE-3 head's config.json and the shapes of its tensors (`stored_shapes`), beside its target's sizes.

    aux_layers  captured hidden states, counted as transformers' hidden_states: overrides the file
    rope_theta  overrides the file's RoPE base

    Raises ValueError in one line that names the key, its value and the remedy.
    """
    config = official_config(config)
    is_speculators = "speculators_model_type" in config
    nested = config.get("eagle_config") or {}
    if not isinstance(nested, dict):
        raise ValueError(f"{SAID}: eagle_config {nested!r} is not an object")
    config = config | {key: value for key, value in nested.items() if key not in config or config[key] is None}
    refuse_unknown_flags(config)
    if "fc.weight" not in shapes or len(shapes["fc.weight"]) != 2:
        raise ValueError("this EAGLE-3 head has no weight fc.weight [h, n * t]: it is not whole, or of a dialect "
                         "that is not known here")
    h, n_in = shapes["fc.weight"]
    t = config.get("target_hidden_size") or target.dim
    for key, theirs, ours in (("hidden_size", config.get("hidden_size", h), h), ("target_hidden_size", t, target.dim),
                              ("vocab_size", config.get("vocab_size", target.vocab_size), target.vocab_size)):
        if theirs != ours:
            where = "by its weights" if key == "hidden_size" else "in the target"
            raise ValueError(f"this head does not fit its target: {key} is {theirs} in the head, {ours} {where}")
    if n_in % t:
        raise ValueError(f"this head does not fit its target: fc.weight takes {n_in} columns, which is no multiple "
                         f"of the target's width {t}")
    args, rope_source = eagle3_args(config, shapes, target, h)
    if rope_theta is not None:
        args, rope_source = replace(args, rope_theta=rope_theta), "--draft-rope-theta"
    capture, capture_source = captured_states(config, n_in // t, target.n_layer, aux_layers)
    n_draft = shapes.get("lm_head.weight", (0,))[0]
    if config.get("draft_vocab_size") not in (None, n_draft):
        raise ValueError(f"{SAID}: draft_vocab_size {config['draft_vocab_size']!r} is not the {n_draft} rows of "
                         "lm_head.weight")
    if n_draft != target.vocab_size and "d2t" not in shapes:
        raise ValueError(f"lm_head.weight has {n_draft} rows, the target {target.vocab_size} tokens, and the head has "
                         "no table d2t that says which tokens they are")
    if h != t and "embed_tokens.weight" not in shapes:
        raise ValueError(f"the head is {h} wide, its target {t}, and it has no embed_tokens.weight of its own")
    return Eagle3Spec(
        args, t, capture, n_draft, own_embedding=h != t,
        fc_norm=bool(config.get("fc_norm")) or "fc_norm.0.weight" in shapes,
        norm_before_fc=bool(config.get("norm_before_fc")) or "input_norm.weight" in shapes,
        norm_before_residual=bool(config.get("norm_before_residual")),
        # SpecForge means the norm before lm_head, which is always there.
        norm_output=bool(config.get("norm_output")) and is_speculators,
        rope_source=rope_source, capture_source=capture_source)


def refuse_unknown_flags(config: dict) -> None:
    for key, value in config.items():
        if key not in NEUTRAL and value and (value is True or TELLING.search(key)):
            raise ValueError(f"{SAID}: {key} {value!r} is not known here: what the head would lack is not known either")
        if key in FLAGS and not isinstance(value, bool | None):
            raise ValueError(f"{SAID}: {key} {value!r} is neither true nor false")
    for key in ("attention_bias", "bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{SAID}: {key} {config[key]!r}: an EAGLE-3 head has no biases")


def eagle3_args(config: dict, shapes: dict[str, tuple[int, ...]], target: ModelArgs, h: int) -> tuple[ModelArgs, str]:
    """Sizes of the head's layers, and where its RoPE base came from."""
    n_head = config.get("num_attention_heads")
    rows = shapes.get("layers.0.self_attn.q_proj.weight", (0,))[0]
    if not isinstance(n_head, int) or n_head < 1 or rows % n_head:
        raise ValueError(f"{SAID}: num_attention_heads {n_head!r} does not divide the {rows} rows of q_proj")
    n_layer = 1 + max((int(key.split(".")[1]) for key in shapes if re.match(r"layers\.\d+\.", key)), default=0)
    has_qk_norm = "layers.0.self_attn.q_norm.weight" in shapes
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    args = layer_args(config | {
        "model_type": "llama", "num_hidden_layers": n_layer, "hidden_size": h, "vocab_size": target.vocab_size,
        "head_dim": config.get("head_dim") or rows // n_head, "tie_word_embeddings": False})
    has_theta = "rope_theta" in config or isinstance(settings, dict) and "rope_theta" in settings
    return replace(args, qk_norm=has_qk_norm), "config.json" if has_theta else "the default: config.json has none"


def captured_states(config: dict, n: int, n_layer: int,
                    aux_layers: Sequence[int] | None) -> tuple[tuple[int, ...], str]:
    """The n captured hidden states, as indices into transformers' hidden_states, and where they came from.

    Files count in two ways: "before layer j" (a list that begins with 2), and "the output of layer j" (one that begins
    with 1), which is hidden state j + 1.
    """
    listed, source = config.get(LAYERS_KEY), LAYERS_KEY
    if aux_layers is not None:
        capture, source = tuple(aux_layers), "--aux-layers"
    elif listed is None and n == 1:
        capture, source = (n_layer,), "the default for one state: the final one"
    elif listed is None:
        capture, source = (2, n_layer // 2, n_layer - 3), "the default"
    elif not isinstance(listed, list) or not listed or not all(type(j) is int for j in listed):
        raise ValueError(f"{SAID}: {LAYERS_KEY} {listed!r} is no list of layers")
    elif listed[0] == 2:
        capture = tuple(listed)
    elif listed[0] == 1:
        capture, source = tuple(j + 1 for j in listed), f"{LAYERS_KEY} {listed}, which counts outputs"
    else:
        raise ValueError(f"{SAID}: {LAYERS_KEY} {listed!r} begins with neither 1 nor 2: whether it counts inputs or "
                         "outputs of layers is not known. Name the hidden states: --aux-layers J J J")
    if len(capture) != n:
        raise ValueError(f"fc.weight takes {n} hidden states, and {source} names {len(capture)}: {list(capture)}")
    if not all(0 <= j <= n_layer for j in capture):
        raise ValueError(f"hidden states {list(capture)} ({source}) do not lie within the target's {n_layer} layers")
    return capture, source
