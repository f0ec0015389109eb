"""What a config.json says of a model: LLaMA 1/2/3.x, Vicuna, Mistral, Mixtral, Qwen2, Qwen3 and Qwen3-MoE.

    args = ModelArgs.from_config(json.loads(Path("config.json").read_text()))

Values that the model does not implement raise ValueError and name the key. Configs of transformers 4 and 5 are read.
"""
from dataclasses import dataclass, replace

MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True)
class ModelArgs:
    """The model's sizes and options. `from_config` makes it, and refuses what model.py does not implement."""
    model_type: str
    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    block_size: int                     # tokens of context the model was made for
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None = None    # config.json's own dictionary; None means plain RoPE
    tie_word_embeddings: bool = False
    qkv_bias: bool = False              # Qwen2
    qk_norm: bool = False               # Qwen3
    sliding_window: int | None = None
    n_expert: int = 0                   # Mixtral, Qwen3-MoE; 0 means a dense feed-forward
    n_expert_active: int = 0
    moe_intermediate_size: int = 0      # of an expert, if it is not intermediate_size
    norm_topk_prob: bool = True         # the weights of the chosen experts add up to 1
    dense_layers: tuple[int, ...] = ()  # the layers without experts

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def feed_forward_sizes(self) -> list[int]:
        """The widths, ascending, of the dense feed-forwards and experts that the layers have."""
        layers = map(self.layer, range(self.n_layer))
        return sorted({layer.expert_size if layer.n_expert else layer.intermediate_size for layer in layers})

    def layer(self, i: int) -> "ModelArgs":
        """What holds in layer i: no experts where it is dense."""
        return replace(self, n_expert=0) if i in self.dense_layers else self

    @classmethod
    def from_config(cls, config: dict) -> "ModelArgs":
        """Read the dictionary of a config.json, of transformers 4 or 5.

        Raises ValueError that names the key and the value of what model.py does not implement.
        """
        model_type = config.get("model_type")
        if model_type not in MODEL_TYPES:
            raise ValueError(f"config.json: model_type {model_type!r} is not supported "
                             f"({', '.join(MODEL_TYPES[:-1])} and {MODEL_TYPES[-1]} are)")
        for key in ("attention_bias", "mlp_bias", "transformers_weights"):
            if config.get(key):
                raise ValueError(f"config.json: {key} {config[key]!r} is not supported")
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"config.json: hidden_act {config['hidden_act']!r} is not supported (silu is)")
        config = config | _whole_numbers(config)
        rope = _rope_parameters(config)
        try:
            n_head = config["num_attention_heads"]
            args = cls(
                model_type=model_type,
                dim=config["hidden_size"],
                n_layer=config["num_hidden_layers"],
                n_head=n_head,
                n_kv_head=config.get("num_key_value_heads") or n_head,
                head_dim=config.get("head_dim") or (128 if model_type == "qwen3" else config["hidden_size"] // n_head),
                intermediate_size=config["intermediate_size"],
                vocab_size=config["vocab_size"],
                block_size=_context(config),
                norm_eps=config.get("rms_norm_eps", 1e-5 if model_type == "mixtral" else 1e-6),
                rope_theta=rope.pop("rope_theta"),
                rope_scaling=rope or None,
                tie_word_embeddings=config.get("tie_word_embeddings", False),
                qkv_bias=model_type == "qwen2",
                qk_norm=model_type in ("qwen3", "qwen3_moe"),
                sliding_window=_sliding_window(config),
                **_experts(config),
            )
        except KeyError as missing:
            raise ValueError(f"config.json has no key {missing}") from None
        except (TypeError, ZeroDivisionError) as error:
            raise ValueError(f"config.json holds a value of the wrong type: {error}") from None
        for name in ("dim", "n_layer", "n_head", "n_kv_head", "head_dim", "intermediate_size", "vocab_size",
                     "block_size", "norm_eps", "rope_theta"):
            value = getattr(args, name)
            if not isinstance(value, (int, float)) or value <= 0:
                raise ValueError(f"config.json: the value for {name} is {value!r}, not a positive number")
        if args.n_head % args.n_kv_head:
            raise ValueError(f"config.json: {args.n_head} heads cannot share {args.n_kv_head} key/value heads")
        return args


def _experts(config: dict) -> dict:
    """The fields of ModelArgs for experts. Raises ValueError that names a value out of range."""
    if config["model_type"] not in ("mixtral", "qwen3_moe"):
        return {}
    # Published Qwen3-MoE folders have num_experts; transformers 5 writes num_local_experts, as Mixtral has it.
    key = "num_local_experts" if "num_local_experts" in config or config["model_type"] == "mixtral" else "num_experts"
    n_expert, n_active = config[key], config["num_experts_per_tok"]
    if config.get("num_experts", n_expert) != n_expert:
        raise ValueError(f"config.json: num_experts {config['num_experts']!r} is not num_local_experts {n_expert!r}")
    if not 1 <= n_active <= n_expert:
        raise ValueError(f"config.json: num_experts_per_tok {n_active!r} does not lie within 1 and {key} {n_expert!r}")
    experts = {"n_expert": n_expert, "n_expert_active": n_active}
    if config["model_type"] == "mixtral":
        return experts
    size, every = config["moe_intermediate_size"], config.get("decoder_sparse_step", 1)
    dense, normed = config.get("mlp_only_layers") or [], config.get("norm_topk_prob", False)
    for key, value in (("moe_intermediate_size", size), ("decoder_sparse_step", every)):
        if not value or value < 1:
            raise ValueError(f"config.json: {key} {value!r} is not a positive number")
    if not isinstance(dense, list) or not all(type(i) is int for i in dense):
        raise ValueError(f"config.json: mlp_only_layers {dense!r} is no list of layers")
    if not isinstance(normed, bool):
        raise ValueError(f"config.json: norm_topk_prob {normed!r} is neither true nor false")
    dense_layers = tuple(i for i in range(config["num_hidden_layers"]) if i in dense or (i + 1) % every != 0)
    return experts | {"moe_intermediate_size": size, "norm_topk_prob": normed, "dense_layers": dense_layers}


def _whole_numbers(config: dict) -> dict:
    """The sizes that config.json holds as floats (some converters write 32000.0), as integers."""
    whole = {}
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
                "vocab_size", "intermediate_size", "max_position_embeddings", "max_sequence_length", "sliding_window",
                "max_window_layers", "num_local_experts", "num_experts", "num_experts_per_tok",
                "moe_intermediate_size", "decoder_sparse_step"):
        value = config.get(key)
        if value is not None and type(value) is not int:
            if not isinstance(value, float) or not value.is_integer():
                raise ValueError(f"config.json: {key} {value!r} is not a whole number")
            whole[key] = int(value)
    return whole


# transformers' defaults of max_position_embeddings, for a config.json without that key.
POSITIONS = {"llama": 2048, "mistral": 131072, "mixtral": 131072, "qwen2": 32768, "qwen3": 32768, "qwen3_moe": 32768}


def _context(config: dict) -> int:
    """Tokens of context. Under linear scaling max_position_embeddings counts positions before they are stretched."""
    rope = _rope_parameters(config)
    positions = config.get("max_position_embeddings", POSITIONS[config["model_type"]])
    if rope_type(config) == "dynamic":
        # Beyond these positions dynamic scaling changes RoPE's base with the length, and the keys already in a cache
        # would be wrong.
        return positions
    # Vicuna-16k has the length that it was trained for here.
    stated = config.get("max_sequence_length") or 0
    if rope.get("rope_type") != "linear":
        return max(positions, stated)
    return max(positions, stated, int(rope.get("original_max_position_embeddings", positions) * rope["factor"]))


def _sliding_window(config: dict) -> int | None:
    """The attention window, or None if all layers have full attention."""
    model_type = config["model_type"]
    window = config.get("sliding_window", None if model_type == "mixtral" else 4096)
    if model_type in ("mistral", "mixtral"):
        return window
    if model_type not in ("qwen2", "qwen3", "qwen3_moe") or not config.get("use_sliding_window"):
        return None
    if model_type == "qwen3_moe":
        return window   # in all layers
    full = config.get("max_window_layers", 28)  # the number of first layers with full attention
    kinds = config.get("layer_types")
    windowed = "sliding_attention" in kinds if kinds else full < config["num_hidden_layers"]
    return window if windowed else None


def _rope_settings(config: dict) -> dict:
    """config.json's own dictionary: rope_scaling of transformers 4, rope_parameters of transformers 5."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"config.json: rope_scaling {rope!r} is not an object")
    return rope


def rope_type(config: dict) -> str:
    """The kind of RoPE scaling, "default" for none."""
    rope = _rope_settings(config)
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_parameters(config: dict) -> dict:
    """RoPE's settings in one form, checked: {"rope_theta"} alone, or with "rope_type" and the keys of that type."""
    kind = rope_type(config)
    rope = {key: value for key, value in _rope_settings(config).items() if key not in ("type", "rope_type")}
    rope.setdefault("rope_theta", config.get("rope_theta") or (1e6 if config["model_type"] == "mixtral" else 1e4))
    if kind == "llama3":
        key = "original_max_position_embeddings"
        rope[key] = config.get(key) or rope.get(key) or config.get("max_position_embeddings")
    if kind not in ("default", "linear", "dynamic", "llama3"):
        raise ValueError(f"config.json: rope_type {kind!r} is not supported (linear, dynamic and llama3 are)")
    needed = {"linear": ["factor"], "llama3": ["factor", "low_freq_factor", "high_freq_factor",
                                               "original_max_position_embeddings"]}
    for key in needed.get(kind, []):
        if not isinstance(rope.get(key), (int, float)) or not 0 < rope[key] < 1e9:
            raise ValueError(f"config.json: rope_type {kind!r} needs a number under the key {key!r}")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ValueError("config.json: partial_rotary_factor other than 1 is not supported")
    if kind in ("default", "dynamic"):  # dynamic scaling begins where _context ends
        return {"rope_theta": rope["rope_theta"]}
    return {"rope_type": kind, **rope}
