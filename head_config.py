"""What a head's folder says: the kind of head, its dialect, and every flag. Knows no modules.

    kind = head_kind(config, stored_shapes(folder))                 # "eagle1" (EAGLE-1 and 2) or "eagle3"
    args = head_args(config, target_args)                           # EAGLE-1 and 2
    spec = eagle3_spec(config, stored_shapes(folder), target_args)  # EAGLE-3

EAGLE-3 heads (arXiv 2503.01840) are published in several dialects: the authors', SpecForge's (which SGLang reads),
AngelSlim's, and that of speculators and vLLM. They differ in names of keys, in how captured layers are counted and in
norms. A key or flag that is not known here is refused by name: one that is dropped costs acceptance without an error.

Shapes: h head width, t target width, n captured hidden states, V vocabulary, Vd draft vocabulary.
"""
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from checkpoint import iterate_weights, list_shapes
from config import ModelArgs

SAID = "the head's config.json"
LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"


def head_kind(config: dict, keys: Iterable[str] = ()) -> str:
    """"eagle1" for EAGLE-1 and 2, or "eagle3", by config.json and the official keys of the weights."""
    config = official_config(config)
    is_eagle3 = config.get("eagle_version") == 3 or "Eagle3" in str(config.get("architectures"))
    is_eagle3 = is_eagle3 or "draft_vocab_size" in config or LAYERS_KEY in config
    return "eagle3" if is_eagle3 or "layers.0.hidden_norm.weight" in keys else "eagle1"


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Official key -> shape of every tensor in the folder. 4-bit weights count as unpacked. Reads no values."""
    shapes = {official_key(key): tuple(shape) for key, shape in list_shapes(folder).items()}
    for key in [key for key in shapes if key.removesuffix("weight") + "zeros" in shapes]:   # only int4 has zero points
        shapes[key] = (*shapes[key][:-1], 2 * shapes[key][-1])
    return shapes


def official_config(config: dict) -> dict:
    """A head's config.json with the keys of the official format. Three other formats nest or rename them:

    vLLM's converters   {"model_type": "eagle", "model": {...}, "eagle_fc_bias": bool, "truncated_vocab_size": int}
    speculators         {"speculators_model_type": "eagle", "transformer_layer_config": {...}, "fusion_bias": bool}
    SpecForge           {"eagle_config": {...}}, beside the official keys

    Raises ValueError, naming key and value, for a head of another kind and for two values of one key.
    """
    outer = dict(config)
    places = [outer.pop(key, None) for key in ("model", "transformer_layer_config")]
    nested = next((place for place in places if isinstance(place, dict)), {})
    flat = {**outer, **nested, "architectures": [outer.get("architectures"), nested.get("architectures")]}
    eagle = flat.pop("eagle_config", None) or {}
    if not isinstance(eagle, dict):
        raise ValueError(f"{SAID}: eagle_config {eagle!r} is not an object")
    for key, value in eagle.items():
        if value is not None and flat.get(key) not in (None, value):
            raise ValueError(f"{SAID}: {key} is {flat[key]!r}, and {value!r} in eagle_config: take the wrong one out")
    flat |= {key: value for key, value in eagle.items() if value is not None}
    if flat.get("speculators_model_type", "eagle") not in ("eagle", "eagle3"):
        raise ValueError(f"{SAID}: speculators_model_type {flat['speculators_model_type']!r} is not "
                         "supported (eagle and eagle3 are)")
    if flat.get("speculators_model_type") == "eagle3":
        flat["eagle_version"] = 3
    for key in ("layernorms", "add_para_norm"):
        if flat.get(key):
            raise ValueError(f"{SAID}: {key} {flat[key]!r}, more norms than EAGLE has: not supported")
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
    if config.get("truncated_vocab_size") not in (None, config.get("vocab_size")):
        raise ValueError(f"{SAID}: truncated_vocab_size {config['truncated_vocab_size']} is not supported: "
                         "its LM head is not the target's")
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
    if config.get("quantization_config"):
        raise ValueError(f"{SAID}: quantization_config {config['quantization_config']!r} is not supported: "
                         "quantize.py quantises heads")
    try:
        return ModelArgs.from_config(config)
    except ValueError as error:
        raise ValueError(f"the head's {error}") from None


# EAGLE-3


FLAGS = ("fc_norm", "norm_before_fc", "norm_before_residual", "norm_output")
FLAG_WEIGHTS = {"fc_norm": "fc_norm.0.weight", "norm_before_fc": "input_norm.weight"}     # weights that show a flag


@dataclass(frozen=True)
class Eagle3Spec:
    """An EAGLE-3 head as its file was understood."""
    args: ModelArgs                     # of its layers; dim is h, vocab_size the target's V
    target_dim: int                     # t
    capture: tuple[int, ...]            # the hidden states it reads, as Transformer.forward and transformers count
    draft_vocab_size: int
    own_embedding: bool                 # an embedding table of its own: h is not t, or it was trained
    has_d2t: bool = False               # d2t says which tokens they are, though they are as many as the target's
    fc_norm: bool = False               # a norm on each captured hidden state
    norm_before_fc: bool = False        # one norm over all of them, joined
    norm_before_residual: bool = False  # the residual is the normed hidden state
    norm_output: bool = False           # it feeds its output back normed
    says_norm_output: bool = False      # config.json says norm_output in SpecForge's sense: before lm_head only
    rope_source: str = ""               # where the RoPE base came from
    capture_source: str = ""            # where the list of captured states came from

    @property
    def has_table(self) -> bool:
        """Whether draft ids differ from the target's ids, so that a table is needed."""
        return self.has_d2t or self.draft_vocab_size != self.args.vocab_size

    def describe(self) -> str:
        """One line that says what the file was taken to mean."""
        norms = [flag for flag in FLAGS if getattr(self, flag)]
        norms += ["norm_output before lm_head only"] if self.says_norm_output else []
        vocab = (f"draft vocabulary {self.draft_vocab_size:,} of {self.args.vocab_size:,}"
                 if self.draft_vocab_size != self.args.vocab_size else "whole vocabulary")
        scaling = f", scaled as {self.args.rope_scaling['rope_type']}" if self.args.rope_scaling else ""
        layers = f", {self.args.n_layer} layers" if self.args.n_layer > 1 else ""
        return (f"EAGLE-3 head{layers}: hidden states {', '.join(map(str, self.capture))} ({self.capture_source}), "
                f"norms {', '.join(norms) or 'as in the paper'}, RoPE base {self.args.rope_theta:g} "
                f"({self.rope_source}){scaling}, {vocab}" + (", its own embedding" if self.own_embedding else ""))


# Other names for LAYERS_KEY in use. How they count is not known.
OTHER_LAYERS_KEYS = ("target_layer_ids", "aux_hidden_state_layer_ids", "aux_hidden_states_layer_ids")
# Keys of config.json that decide nothing here, or are read.
NEUTRAL = {
    "architectures", "auto_map", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
    "torch_dtype", "head_dim", "hidden_act", "hidden_size", "initializer_range", "intermediate_size", "layer_types",
    "max_position_embeddings", "max_window_layers", "mlp_bias", "model_type", "num_attention_heads",
    "num_hidden_layers", "num_key_value_heads", "pretraining_tp", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "sliding_window", "tie_word_embeddings", "transformers_version", "use_cache", "use_sliding_window",
    "vocab_size", "draft_vocab_size", "target_hidden_size", "eagle_version", "target",
    "speculators_config", "speculators_model_type", "speculators_version", "has_no_defaults_at_init", "bias",
    "attention_bias", "target_model_type", "target_vocab_size", "original_max_position_embeddings",
    "truncated_vocab_size", "layernorms", "add_para_norm", "use_aux_hidden_state", "num_aux_hidden_states",
    "embed_requires_grad", "enable_sp_ulysses", "parallel_draft_heads_num_layers", "return_dict",
    "output_hidden_states", "output_attentions", LAYERS_KEY, *OTHER_LAYERS_KEYS, *FLAGS,
}
# Keys that say, with this value, what is so in every EAGLE-3 head. NVIDIA's Model Optimizer writes most of them.
GIVEN = {"use_input_layernorm_in_first_layer": True, "use_last_layernorm": True, "use_mtp_layernorm": False,
         "next_layer_regular": True, "has_lm_head": True, "parallel_draft_step": 1, "eagle_decoder_type": "llama",
         "position_embedding_type": "rope", "is_causal": True, "logit_scale": 1.0,
         "transformer_layer_architecture": "LlamaDecoderLayer"}
# Words in the name of an unknown key that make it a flag of the head.
TELLING = re.compile("norm|residual|fc|aux|hidden|eagle|draft|layer|rope|mask|window|bias|scale|multiplier|softcap")
# The kinds of layers that a head may have: they differ from LLaMA's in q/k norms and biases, which the weights show.
LAYER_TYPES = (None, "llama", "mistral", "qwen2", "qwen3", "eagle", "eagle3", "speculator_model")


def eagle3_spec(config: dict, shapes: dict[str, tuple[int, ...]], target: ModelArgs, *,
                aux_layers: Sequence[int] | None = None, rope_theta: float | None = None) -> Eagle3Spec:
    """Read an EAGLE-3 head's config.json and the shapes of its tensors (`stored_shapes`), beside its target's sizes.

    aux_layers  captured hidden states, counted as transformers' hidden_states: overrides the file
    rope_theta  overrides the file's RoPE base

    Raises ValueError in one line that names the key, its value and the remedy.
    """
    config = official_config(config)
    refuse_flags(config, shapes)
    for key, shape in (("fc.weight", "[h, n * t]"), ("lm_head.weight", "[draft vocabulary, h]")):
        if len(shapes.get(key, ())) != 2:
            raise ValueError(f"this EAGLE-3 head has no weight {key} {shape}: it is not whole, or of a dialect that is "
                             "not known here")
    h, n_in = shapes["fc.weight"]
    t = config.get("target_hidden_size") or target.dim
    for key, theirs, ours in (("hidden_size", config.get("hidden_size", h), h), ("target_hidden_size", t, target.dim),
                              ("vocab_size", config.get("vocab_size", target.vocab_size), target.vocab_size)):
        if theirs != ours:
            where = "by its weights" if key == "hidden_size" else "in the target"
            raise ValueError(f"this head does not fit its target: {key} is {theirs!r} in the head, {ours} {where}")
    if n_in % t:
        raise ValueError(f"this head does not fit its target: fc.weight takes {n_in} columns, which is no multiple "
                         f"of the target's width {t}")
    args, rope_source = eagle3_args(config, shapes, target, h, rope_theta)
    capture, capture_source = captured_states(config, n_in // t, target.n_layer, aux_layers)
    n_draft = shapes["lm_head.weight"][0]
    # vLLM's converters write truncated_vocab_size, and the target's size where they leave the LM head as it is.
    for key, known in (("draft_vocab_size", (None, n_draft)),
                       ("truncated_vocab_size", (None, n_draft, target.vocab_size))):
        if config.get(key) not in known:
            raise ValueError(f"{SAID}: {key} {config[key]!r} is not the {n_draft} rows of lm_head.weight: "
                             "one of the two is of another head")
    if n_draft != target.vocab_size and "d2t" not in shapes:
        raise ValueError(f"lm_head.weight has {n_draft} rows, the target {target.vocab_size} tokens, and the head has "
                         "no table d2t that says which tokens they are")
    if h != t and "embed_tokens.weight" not in shapes:
        raise ValueError(f"the head is {h} wide, its target {t}, and it has no embed_tokens.weight of its own")
    flags = {flag: bool(config.get(flag)) or FLAG_WEIGHTS.get(flag) in shapes for flag in FLAGS}
    if "speculators_model_type" not in config:  # SpecForge means the norm before lm_head, which is always there
        flags |= {"norm_output": False, "says_norm_output": flags["norm_output"]}
    return Eagle3Spec(args, t, capture, n_draft, own_embedding=h != t, has_d2t="d2t" in shapes,
                      rope_source=rope_source, capture_source=capture_source, **flags)


def refuse_flags(config: dict, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise ValueError for a key that is unknown, or whose value a head here does not have."""
    for key, value in config.items():
        if key in FLAGS and not isinstance(value, bool | None):
            raise ValueError(f"{SAID}: {key} {value!r} is neither true nor false")
        if key in GIVEN and value not in (None, GIVEN[key]):
            raise ValueError(f"{SAID}: {key} {value!r} is not supported: it is {GIVEN[key]!r} in an EAGLE-3 head")
        if key in NEUTRAL or key in GIVEN or key.startswith("_"):
            continue
        if value and (value is True or TELLING.search(key)):
            raise ValueError(f"{SAID}: {key} {value!r} is not known here, so neither is what it changes; if it changes "
                             "nothing, take it out of the file")
    for key in ("attention_bias", "bias", "mlp_bias"):
        if config.get(key):
            raise ValueError(f"{SAID}: {key} {config[key]!r}: an EAGLE-3 head has no biases")
    for flag, weight in FLAG_WEIGHTS.items():
        if config.get(flag) is False and weight in shapes:
            raise ValueError(f"{SAID}: {flag} is false, and the weights hold {weight}: one of the two is wrong")
    if config.get("model_type") not in LAYER_TYPES:
        raise ValueError(f"{SAID}: model_type {config['model_type']!r} is not supported: the layers of an EAGLE-3 head "
                         "are LLaMA's, Qwen2's, Qwen3's or Mistral's")
    is_windowed = config.get("use_sliding_window") or "sliding_attention" in str(config.get("layer_types"))
    if is_windowed or config.get("model_type") == "mistral" and config.get("sliding_window"):
        raise ValueError(f"{SAID}: sliding_window {config.get('sliding_window')!r} of the head's own attention is not "
                         "read: take it out of the file and give --draft-window N")


def eagle3_args(config: dict, shapes: dict[str, tuple[int, ...]], target: ModelArgs, h: int,
                rope_theta: float | None) -> tuple[ModelArgs, str]:
    """Sizes of the head's layers, and where its RoPE base came from."""
    n_head = config.get("num_attention_heads")
    rows = shapes.get("layers.0.self_attn.q_proj.weight", (0,))[0]
    if not isinstance(n_head, int) or n_head < 1 or rows % n_head:
        raise ValueError(f"{SAID}: num_attention_heads {n_head!r} does not divide the {rows} rows of q_proj")
    n_layer = 1 + max((int(key.split(".")[1]) for key in shapes if re.match(r"layers\.\d+\.", key)), default=0)
    has_qk_norm = "layers.0.self_attn.q_norm.weight" in shapes
    rope, theta, source = rope_settings(config, rope_theta)
    args = layer_args(config | {
        "model_type": "llama", "num_hidden_layers": n_layer, "hidden_size": h, "vocab_size": target.vocab_size,
        "head_dim": config.get("head_dim") or rows // n_head, "tie_word_embeddings": False, "rope_parameters": None,
        "rope_scaling": rope, "rope_theta": theta})
    return replace(args, qk_norm=has_qk_norm), source


def rope_settings(config: dict, rope_theta: float | None) -> tuple[dict, float | None, str]:
    """Scaling of RoPE, its base, and where the base came from. Files have it in three places; none means 10000."""
    rope, bases = {}, {"rope_theta": config.get("rope_theta")}
    for key in ("rope_parameters", "rope_scaling"):
        place = config.get(key) or {}
        if not isinstance(place, dict):
            raise ValueError(f"{SAID}: {key} {place!r} is not an object")
        rope |= place
        bases[f"{key}.rope_theta"] = place.get("rope_theta")
    bases = {key: value for key, value in bases.items() if value is not None}
    for key, value in bases.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{SAID}: {key} {value!r} is not a positive number")
    rope.pop("rope_theta", None)
    if rope_theta is not None:
        return rope, rope_theta, "--draft-rope-theta"
    if len(set(bases.values())) > 1:
        told = ", ".join(f"{key} {value!r}" for key, value in bases.items())
        raise ValueError(f"{SAID} names several RoPE bases: {told}. Take the wrong ones out of the file, "
                         "or give --draft-rope-theta")
    return rope, next(iter(bases.values()), None), "config.json" if bases else "the default: config.json has none"


def captured_states(config: dict, n: int, n_layer: int,
                    aux_layers: Sequence[int] | None) -> tuple[tuple[int, ...], str]:
    """The n captured hidden states, as indices into transformers' hidden_states, and where they came from.

    Files count in two ways: "before layer j" (a list that begins with 2), and "the output of layer j" (one that begins
    with 1), which is hidden state j + 1.
    """
    listed, source = config.get(LAYERS_KEY), LAYERS_KEY
    remedy = f"Name the {n} hidden states that it reads: --aux-layers{' J' * n}"
    if aux_layers is not None:
        capture, source, remedy = tuple(aux_layers), "--aux-layers", f"Name {n} between 0 and {n_layer}"
    elif other := next((key for key in OTHER_LAYERS_KEYS if config.get(key)), None):
        raise ValueError(f"{SAID}: whether {other} {config[other]!r} counts inputs or outputs of layers is not known. "
                         f"{remedy}")
    elif listed is None and n == 1:
        capture, source = (n_layer,), "the default for one state: the final one"
    elif listed is None:
        capture, source = (2, n_layer // 2, n_layer - 3), "the default"
    elif not isinstance(listed, list) or not listed or not all(type(j) is int for j in listed):
        raise ValueError(f"{SAID}: {LAYERS_KEY} {listed!r} is no list of layers. {remedy}")
    elif listed[0] == 2:
        capture = tuple(listed)
    elif listed[0] == 1:
        capture, source = tuple(j + 1 for j in listed), f"{LAYERS_KEY} {listed}, which counts outputs"
    else:
        raise ValueError(f"{SAID}: {LAYERS_KEY} {listed!r} begins with neither 1 nor 2: whether it counts inputs or "
                         f"outputs of layers is not known. {remedy}")
    if len(capture) != n:
        raise ValueError(f"fc.weight takes {n} hidden states, and {source} names {len(capture)}: {list(capture)}. "
                         f"{remedy}")
    for key, right in (("use_aux_hidden_state", (None, True, n > 1)), ("num_aux_hidden_states", (None, n))):
        if aux_layers is None and config.get(key) not in right:
            raise ValueError(f"{SAID}: {key} {config[key]!r}, and fc.weight takes {n} hidden states. {remedy}")
    if not all(0 <= j <= n_layer for j in capture):
        raise ValueError(f"hidden states {list(capture)} ({source}) do not lie within the target's {n_layer} layers. "
                         f"{remedy}")
    return capture, source
