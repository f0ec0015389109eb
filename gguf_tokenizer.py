"""The tokenizer of a GGUF file, as the files of a Hugging Face folder: tokenizer.json or tokenizer.model.

    write_tokenizer(facts, folder)      # facts: the key-value pairs of the file's header
    tokenizer_config(facts)             # special tokens and chat template

A file has the vocabulary and the kind of each token. How text is split into words before byte-level BPE it only names
(tokenizer.ggml.pre): the splits of the published tokenizers are known here by that name, and others are refused.
"""
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_header import fact

if TYPE_CHECKING:
    import tokenizers

SPECIAL_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)      # tokenizer.ggml.token_type

# Splits text into words as the published tokenizer.json files do.
QWEN2_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
               r"\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_WORDS = QWEN2_WORDS.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
# llama.cpp's own, for files that name none: one split after the other.
DEFAULT_WORDS = (r"[\p{P}\$\+<=>\^~\|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
                 r"\p{N}+", r"[0-9][0-9][0-9]")
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")    # here a word that is a token is not merged from parts
# tokenizer.ggml.pre -> the words; None is GPT-2's split, which is ByteLevel's own.
WORDS = {
    "gpt-2": None,
    "smollm": None,
    "default": DEFAULT_WORDS,
    **dict.fromkeys(LLAMA3, (LLAMA3_WORDS,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (QWEN2_WORDS,)),
}


def write_tokenizer(facts: dict, folder: Path) -> None:
    """Write tokenizer.json (byte-level BPE) or tokenizer.model (SentencePiece). Raises ValueError for other kinds."""
    kind = fact(facts, "tokenizer.ggml.model", str)
    if kind == "gpt2":
        byte_level_bpe(facts).save(str(folder / "tokenizer.json"))
    elif kind == "llama":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(facts))
    else:
        raise ValueError(f"tokenizer.ggml.model {kind!r} is not supported (gpt2 and llama are)")


def tokens_of(facts: dict) -> tuple[list[str], list[int]]:
    """The texts and kinds of all tokens, in the order of their ids."""
    tokens = fact(facts, "tokenizer.ggml.tokens", list)
    kinds = facts.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if not tokens or not isinstance(tokens[0], str) or not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise ValueError(f"tokenizer.ggml.tokens and token_type do not make a vocabulary of {len(tokens)} tokens")
    return tokens, kinds


def byte_level_bpe(facts: dict) -> "tokenizers.Tokenizer":
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokens, kinds = tokens_of(facts)
    pre = fact(facts, "tokenizer.ggml.pre", str, "default")
    if pre not in WORDS:
        raise ValueError(f"tokenizer.ggml.pre {pre!r} is not supported ({', '.join(WORDS)} are)")
    merges = [tuple(merge.split(" ")) for merge in fact(facts, "tokenizer.ggml.merges", list)]
    # Unused tokens fill the vocabulary up to the size of the embedding.
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind != UNUSED}
    try:
        tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre in LLAMA3))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"tokenizer.ggml.merges do not fit the vocabulary: {error}") from None
    steps = [pre_tokenizers.Split(Regex(words), "isolated") for words in WORDS[pre] or ()]
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    if "qwen" in pre:
        tokenizer.normalizer = normalizers.NFC()
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=WORDS[pre] is None)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence([*steps, level]), decoders.ByteLevel()
    for kind, add in ((CONTROL, tokenizer.add_special_tokens), (USER_DEFINED, tokenizer.add_tokens)):
        add([AddedToken(token, special=kind == CONTROL, normalized=False)
             for token, its_kind in zip(tokens, kinds) if its_kind == kind])
    if facts.get("tokenizer.ggml.add_bos_token", pre in LLAMA3) and "tokenizer.ggml.bos_token_id" in facts:
        bos = special_token(facts, "bos")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, vocab[bos])])
    return tokenizer


def sentencepiece_model(facts: dict) -> bytes:
    """SentencePiece's file, a protocol buffer: pieces with scores and kinds, of which GGUF has taken over the numbers.

    https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
    """
    tokens, kinds = tokens_of(facts)
    scores = fact(facts, "tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise ValueError(f"tokenizer.ggml.scores has {len(scores)} numbers for {len(tokens)} tokens")
    if kinds.count(UNKNOWN) != 1:
        raise ValueError(f"tokenizer.ggml.token_type marks {kinds.count(UNKNOWN)} tokens as unknown, not one")
    pieces = [field(1, field(1, token.encode()) + field(2, float(score)) + field(3, kind))
              for token, score, kind in zip(tokens, scores, kinds)]
    bpe, trainer = 2, {35: int(BYTE in kinds), 40: kinds.index(UNKNOWN), 45: tokens[kinds.index(UNKNOWN)].encode()}
    for number, name in ((46, "bos"), (47, "eos")):
        if f"tokenizer.ggml.{name}_token_id" in facts:
            trainer[number] = special_token(facts, name).encode()
    normalizer = {1: b"identity", 3: int(facts.get("tokenizer.ggml.add_space_prefix", True)), 4: 0, 5: 1}
    return b"".join(pieces) + field(2, message({3: bpe} | trainer)) + field(3, message(normalizer))


def message(fields: dict[int, int | bytes]) -> bytes:
    return b"".join(field(number, value) for number, value in fields.items())


def field(number: int, value: int | float | bytes) -> bytes:
    """One field of a protocol buffer."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    low = value & 127
    return bytes([low]) if value < 128 else bytes([low | 128]) + varint(value >> 7)


def special_token(facts: dict, name: str) -> str:
    """The text of the token that the header gives as bos, eos, padding or unknown."""
    tokens, i = fact(facts, "tokenizer.ggml.tokens", list), fact(facts, f"tokenizer.ggml.{name}_token_id", int)
    if not 0 <= i < len(tokens):
        raise ValueError(f"tokenizer.ggml.{name}_token_id {i} is beyond the vocabulary of {len(tokens)} tokens")
    return tokens[i]


def tokenizer_config(facts: dict) -> dict:
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    is_bpe = facts["tokenizer.ggml.model"] == "gpt2"
    config = {key: special_token(facts, name) for key, name in names.items()
              if f"tokenizer.ggml.{name}_token_id" in facts}
    config |= {
        "add_prefix_space": not is_bpe and bool(facts.get("tokenizer.ggml.add_space_prefix", True)),
        "clean_up_tokenization_spaces": False,
        "model_max_length": facts[f"{facts['general.architecture']}.context_length"],
        # Not GPT2Tokenizer: with it, transformers 5 would replace tokenizer.json's pre-tokenizer by plain byte level.
        "tokenizer_class": "PreTrainedTokenizerFast" if is_bpe else "LlamaTokenizer",
    }
    if not is_bpe:
        config["add_bos_token"] = bool(facts.get("tokenizer.ggml.add_bos_token", True))
    # Beside the default template there may be others by name, such as tool_use.
    templates = {name.removeprefix("tokenizer.chat_template."): text for name, text in facts.items()
                 if name.startswith("tokenizer.chat_template.")}
    if "tokenizer.chat_template" in facts:
        config["chat_template"] = fact(facts, "tokenizer.chat_template", str)
        if templates:
            templates["default"] = config["chat_template"]
            config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
    return dict(sorted(config.items()))
