"""What the tests compare with: tiny random transformers models, and the slow obvious decoder.

    folder, hf = tiny("qwen3", tmp_path)          # a checkpoint like the published ones, and the oracle in fp32
    naive_decode(model, prompt, 32)               # greedy decoding without cache or compilation

The random weights are large (std 0.25) and norms and biases are random too, so that a dropped bias, a wrong eps or a
missing rope scaling moves the logits by far more than the tolerance of the tests.
"""
import json
from pathlib import Path

import torch
from safetensors import safe_open

VOCAB = 96

# kind -> model_type, and the keys of config.json in which it differs from BASE. No two kinds share rope_theta and eps.
BASE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-3)
KINDS = {
    "llama2": ("llama", dict(num_key_value_heads=4, rms_norm_eps=1e-2)),
    "llama2_tied": ("llama", dict(num_hidden_layers=3, tie_word_embeddings=True, rope_theta=1e5)),
    # head_dim 16: wavelengths 6, 32, 167, ...; kept below 64/4, blended up to 64/1, divided by the factor above
    "llama3.1": ("llama", dict(hidden_size=64, rope_theta=5e5, rope=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64))),
    "llama_linear": ("llama", dict(num_key_value_heads=4, rope=dict(rope_type="linear", factor=4.0))),
    "llama_dynamic": ("llama", dict(num_key_value_heads=4, rope=dict(rope_type="dynamic", factor=2.0))),
    "gqa": ("llama", dict(hidden_size=64, num_attention_heads=8, num_key_value_heads=2)),
    "head_dim": ("llama", dict(head_dim=16)),
    "mistral": ("mistral", dict(head_dim=16, sliding_window=4096, rope_theta=1e6)),
    "mixtral": ("mixtral", dict(num_local_experts=8, num_experts_per_tok=2, rope_theta=1e6)),
    "qwen2": ("qwen2", dict(rope_theta=1e6)),
    "qwen2_tied": ("qwen2", dict(rope_theta=1e6, tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=16, rope_theta=1e6, tie_word_embeddings=True)),
    "qwen3_moe": ("qwen3_moe", dict(head_dim=16, rope_theta=1e7, num_experts=8, num_experts_per_tok=3,
                                    moe_intermediate_size=160, norm_topk_prob=True)),
    # Layer 3 has experts, and their weights do not add up to 1.
    "qwen3_moe_mixed": ("qwen3_moe", dict(rope_theta=1e5, num_hidden_layers=4, num_experts=4, num_experts_per_tok=2,
                                          moe_intermediate_size=160, norm_topk_prob=False, decoder_sparse_step=2,
                                          mlp_only_layers=[1])),
}

# of write_checkpoint
SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")
CORPUS = ["The quick brown fox jumps over the lazy dog, and then the other dogs sleep for the rest of the day."] * 4
CONTEXT = 512


def tiny(kind, folder, *, sharded=False, binary=False, old_style=True, seed=0, **overrides):
    """Write a random checkpoint of this kind to folder; return (folder, transformers model in fp32 eval mode).

    sharded     about five files and an index instead of one
    binary      pytorch_model.bin instead of model.safetensors
    old_style   config.json with rope_theta and rope_scaling, as published; else as transformers 5 writes it
    overrides   keys of config.json, and `rope`, the entries of rope_parameters beside rope_theta
    """
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model_type, keys = KINDS[kind]
    keys = BASE | keys | overrides
    rope = {"rope_type": "default", **(keys.pop("rope", None) or {}), "rope_theta": keys.pop("rope_theta", 1e4)}
    config = transformers.AutoConfig.for_model(model_type, rope_parameters=rope, **keys)
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    randomize(hf, seed)

    folder = Path(folder)
    hf.save_pretrained(folder, max_shard_size="30KB" if sharded else "1GB")
    if binary:
        to_bin(folder)
    if old_style:
        to_old_style(folder)
    return folder, hf


@torch.no_grad()
def randomize(hf, seed):
    generator = torch.Generator().manual_seed(seed)
    for name, weight in hf.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("norm.weight"):
            weight.copy_(1 + 0.3 * noise)
        else:
            weight.copy_((0.5 if name.endswith("bias") else 0.25) * noise)


def to_old_style(folder):
    """Rewrite config.json with the keys that published checkpoints have, from before transformers 5."""
    with edited_json(folder / "config.json") as config:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        if rope["rope_type"] in ("linear", "dynamic"):
            rope["type"] = rope.pop("rope_type")        # Vicuna and LongChat; LLaMA-3.1 says rope_type
        config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
        if config["model_type"] == "qwen3_moe":
            config["num_experts"] = config.pop("num_local_experts")
        config["torch_dtype"] = config.pop("dtype")
        config["transformers_version"] = "4.31.0"


def to_bin(folder):
    """Replace the safetensors files by pickles of the same tensors, which transformers 5 no longer writes."""
    rename = lambda name: name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
    for file in sorted(folder.glob("*.safetensors")):
        torch.save(read_safetensors(file), folder / rename(file.name))
        file.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        with edited_json(index) as content:
            content["weight_map"] = {key: rename(name) for key, name in content["weight_map"].items()}
        index.rename(folder / rename(index.name))


def read_safetensors(file):
    with safe_open(file, "pt") as tensors:
        return {key: tensors.get_tensor(key).clone() for key in tensors.keys()}


class edited_json:
    """`with edited_json(file) as content:` writes back what the block makes of the content."""

    def __init__(self, file):
        self.file = Path(file)

    def __enter__(self):
        self.content = json.loads(self.file.read_text())
        return self.content

    def __exit__(self, *error):
        self.file.write_text(json.dumps(self.content, indent=2))


def write_checkpoint(folder, *, merges=40, ascii_only=False, context=CONTEXT, **overrides):
    """A tiny model with a byte-level tokenizer and a chat template, in `folder`. overrides: keys of config.json.

    It never says a special token, unless drawn; with ascii_only it says nothing but printable ASCII.
    """
    from safetensors.torch import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    vocab = 256 + len(SPECIAL) + merges
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=vocab, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL]))
    assert bpe.get_vocab_size() == vocab
    end = bpe.token_to_id("<|end|>")
    tiny("gqa", folder, vocab_size=vocab, max_position_embeddings=context, eos_token_id=end, bos_token_id=None,
         pad_token_id=None, **overrides)
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": None, "eos_token": "<|end|>", "chat_template": TEMPLATE}))
    weights = read_safetensors(folder / "model.safetensors")
    sayable = {i for token, i in bpe.get_vocab().items() if token not in SPECIAL
               and (not ascii_only or (len(token) == 1 and " " < token < "\x7f"))}
    weights["lm_head.weight"][sorted(set(range(vocab)) - sayable)] = 0  # a logit of 0 among many is not the largest
    save_file(weights, folder / "model.safetensors")
    return folder


def tokens_of(length, seed=0, vocab=VOCAB):
    """A random prompt, as a list of token ids."""
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def expected(hf, tokens):
    """Logits [T, V] and final-norm features [T, dim] of one sequence, from transformers without a cache."""
    features = hf.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0]
    return hf.lm_head(features), features


@torch.no_grad()
def naive_decode(model, prompt, n):
    """Greedy decoding, the slow and obvious way: the whole sequence again for each of the n new tokens.

    Every pass starts at position 0 and overwrites all the slots it reads, so nothing is carried from pass to pass.
    """
    model.setup_caches(max_batch_size=1, max_seq_length=len(prompt) + n)
    tokens = list(prompt)
    for _ in range(n):
        logits, _ = model(torch.tensor([tokens]), torch.arange(len(tokens)))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt):]


def assert_near_greedy(model, prompt, tokens, share=0.03):
    """Each token's logit is the largest, but for this share of it: what rounding to 16 bits may change."""
    ids = torch.tensor([prompt + tokens], device=model.inv_freq.device)
    cache, model.kv_cache = model.kv_cache, None
    logits = model(ids[:, :-1], torch.arange(ids.shape[1] - 1, device=ids.device))[0][0, len(prompt) - 1:].float()
    model.kv_cache = cache
    gap = logits.amax(-1) - logits.gather(-1, ids[0, len(prompt):, None])[:, 0]
    worst = (gap / logits.abs().amax(-1)).max()
    assert worst <= share, f"a token is {worst:.3f} of the largest logit behind it"


def assert_close(ours, theirs, tolerance=1e-4):
    """Max abs error within tolerance times the range of the expected values; NaN fails."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    error = (ours.float() - theirs.float()).abs().max().item()
    bound = tolerance * (theirs.max() - theirs.min()).item()
    assert error <= bound, f"max abs error {error:.3g} > {bound:.3g}"
