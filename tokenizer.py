"""Text to token ids and back, from the files of a Hugging Face folder; chats and streams too.

    tok = Tokenizer.from_pretrained("checkpoints/SmolLM2-135M-Instruct")     # a folder, or a hub id
    ids = tok.apply_chat_template([{"role": "user", "content": "Who was Ada Lovelace?"}])
    stream = tok.stream()
    for new_ids in ...:
        print(stream.push(new_ids), end="", flush=True)
    print(stream.flush())

The vocabulary is read from tokenizer.json, from vocab.json with merges.txt, or from tokenizer.model. The rest comes
from tokenizer_config.json, special_tokens_map.json, added_tokens.json, config.json, generation_config.json and the chat
template's files. Where these differ, the same one counts as in transformers 5.
"""
import datetime
import functools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from chat_template import (ChatTemplates, Messages, find_chat_templates, hide_special_tokens, reveal, special_text,
                           special_tokens, tokenizer_settings)
from checkpoint import read_json, refuse_lfs_pointer, resolve_checkpoint

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """Attributes:
    vocab_size, special_ids
    bos_id           None if there is none
    adds_bos         whether plain text begins with bos in this model (LLaMA: yes, Qwen and SmolLM2: no)
    stop_ids         tokens that end an answer
    uses_date        whether the chat template asks for the date
    date             what the template is told then; None means the time of each rendering
    template_digest  sha256 of the chat template and its arguments, without the date
    """

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, *, chat_template: str | None = None,
                        template_args: dict | None = None, date: datetime.datetime | None = None) -> "Tokenizer":
        """checkpoint: folder or hub id.
        chat_template: "vicuna", "llama2", "mixtral", a jinja file or jinja text, instead of the checkpoint's own.
        template_args: more variables for the template, such as {"enable_thinking": False}.
        Raises FileNotFoundError, ValueError.
        """
        return cls(resolve_checkpoint(checkpoint, weights=False), chat_template, template_args, date)

    def __init__(self, folder: Path, chat_template: str | None, template_args: dict | None,
                 date: datetime.datetime | None):
        settings = tokenizer_settings(folder)
        config = read_json(folder / "config.json", absent={})
        if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
            self._backend = HuggingFaceBackend(folder, settings, config)
        else:
            self._backend = SentencePieceBackend(folder, settings)
        self.vocab_size: int = self._backend.vocab_size
        self.special_ids: frozenset[int] = self._backend.special_ids

        defaults = self._backend.default_text
        special = {name: text for name, text in defaults.items() if name not in settings} | special_text(settings)
        self.bos_id = self._id(special.get("bos_token"))
        if self.bos_id is None and "bos_token" not in settings:  # null, as in Qwen2's, means that there is none
            self.bos_id = self._backend.bos_id
            if self.bos_id is None and config.get("bos_token_id") in range(self.vocab_size):
                self.bos_id = int(config["bos_token_id"])
        self.adds_bos: bool = self.bos_id is not None and self._backend.adds_bos
        self._unknown_id = self._id(special.get("unk_token"))

        texts, is_builtin = find_chat_templates(folder, settings, config, self._backend.token_to_id, chat_template)
        self._templates = ChatTemplates(texts, is_builtin, special, template_args)
        self.uses_date, self.date = self._templates.uses_date, date
        self.stop_ids = self._find_stop_ids(special.get("eos_token", defaults.get("eos_token")), folder, config)

    def encode(self, text: str, bos: bool = False, *, stand_ins: dict[str, str] | None = None) -> list[int]:
        """Special tokens written out in `text`, such as "</s>", become their ids. None is added, but bos on request,
        unless the text begins with it.

        stand_ins: {character: the special token it stands for, to be encoded as plain text}
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid UTF-8: {error.reason} at character {error.start}") from error
        ids = self._backend.encode(text, stand_ins or {})
        return [self.bos_id, *ids] if bos and self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def decode(self, ids: Iterable[int], after: Iterable[int] = ()) -> str:
        """The text that `ids` add to that of the ids `after`. SentencePiece drops the space of a text's first word; a
        word that continues a text keeps it. Special tokens leave no text, nor do ids beyond the vocabulary, which an
        output layer of padded size can give."""
        before = self._with_text(after)
        shown = certain_length(self._backend.decode(before))
        return self._backend.decode(before + self._with_text(ids))[shown:]

    def piece(self, i: int) -> str:
        """The text of one id behind others. Special tokens have theirs too."""
        return self._backend.decode([i]) if i in self.special_ids else self.decode([i], after=self.encode("a"))

    def stream(self, after: Iterable[int] = ()) -> "StreamDecoder":
        """decode(..., after), piece by piece."""
        return StreamDecoder(self, after)

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = True, *,
                            tools: list[dict] | None = None, plain_text: bool = False) -> list[int]:
        """As in transformers: a special token inside a message counts as special, and bos is where the template puts
        it. The built-in templates leave it out in front, so that the first word keeps its SentencePiece space.

        plain_text: special tokens that a message spells out are plain text, so that nobody can end a turn or open
        another by writing "<|im_end|>". Those that the template itself writes stay special. Raises ValueError where a
        template changes the messages in such a way that the two cannot be told apart.
        """
        text = self.render_chat(messages, add_generation_prompt, tools=tools)
        to_hide = self._backend.special_tokens if plain_text else []
        messages, stand_ins = hide_special_tokens(messages, to_hide, self._templates)
        if not stand_ins:
            return self.encode_chat(text)
        hidden = self.render_chat(messages, add_generation_prompt, tools=tools)
        ids = self.encode_chat(hidden, stand_ins=stand_ins)
        harmless = self.encode_chat(reveal(hidden, dict.fromkeys(stand_ins, ".")))
        if reveal(hidden, stand_ins) != text or self._special(ids) != self._special(harmless):
            tokens = ", ".join(map(repr, stand_ins.values()))
            raise ValueError(f"with this chat template and tokenizer {tokens} in a message cannot pass as text")
        return ids

    def render_chat(self, messages: Messages, add_generation_prompt: bool = True, *,
                    tools: list[dict] | None = None) -> str:
        return self._templates.render(messages, add_generation_prompt, tools=tools, date=self.date)

    def encode_chat(self, text: str, *, stand_ins: dict[str, str] | None = None) -> list[int]:
        """The ids of what render_chat gives."""
        return self.encode(text, bos=self._templates.is_builtin and self.adds_bos, stand_ins=stand_ins)

    @property
    def template_digest(self) -> str:
        return self._templates.digest

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def _with_text(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if 0 <= i < self.vocab_size and i not in self.special_ids]

    def _special(self, ids: list[int]) -> list[int]:
        return [i for i in ids if i in self.special_ids and i != self._unknown_id]

    def _find_stop_ids(self, eos: str | None, folder: Path, config: dict) -> frozenset[int]:
        stops = {self._id(token) for token in (eos, *self._templates.end_of_turn)}
        for source in (read_json(folder / "generation_config.json", absent={}), config):
            ids = source.get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            if source.get("bos_token_id") not in (None, self.bos_id):
                # Early LLaMA folders count one token less: what they call eos is the vocabulary's bos.
                ids = [i for i in ids if i != self.bos_id]
            stops.update(int(i) for i in ids if isinstance(i, (int, float)))
        return frozenset(i for i in stops if i is not None)


class StreamDecoder:
    """Decodes a stream of ids. However it is cut into pieces, the text of all push() and flush() together is what
    decode() gives for all ids at once.

    Decoding one id by itself loses leading spaces (SentencePiece) and breaks characters that span ids (byte-level BPE).
    So each id is decoded behind the few that precede it, and only what it adds comes out: constant work per id.
    """

    CONTEXT = 4  # ids. A character has at most 4 bytes, so one that is not complete yet began in the last 3 ids.

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()):
        self._tokenizer, self._backend = tokenizer, tokenizer._backend
        self._ids = tokenizer._with_text(after)
        self._shown = certain_length(self._backend.decode(self._ids))  # so many characters of decode(_ids) are out

    def push(self, ids: Iterable[int]) -> str:
        """The text that has become certain."""
        text = ""
        for i in self._tokenizer._with_text(ids):
            self._ids.append(i)
            # A run of bytes is decoded as a whole: one wrong byte spoils the characters before it.
            if i not in self._backend.byte_ids:
                text += self._advance()
        return text

    def peek(self) -> str:
        """The rest, as flush() would give it now. A character that lacks bytes is U+FFFD."""
        return self._backend.decode(self._ids)[self._shown :]

    def flush(self) -> str:
        """The rest. The stream is then as new."""
        text = self.peek()
        self._ids, self._shown = [], 0
        return text

    def _advance(self) -> str:
        text = self._backend.decode(self._ids)
        new = text[self._shown : certain_length(text)]
        self._ids = self._ids[-self.CONTEXT :]
        self._shown = certain_length(self._backend.decode(self._ids))
        return new


def certain_length(text: str) -> int:
    return len(text) - text.endswith("\ufffd")  # a character that lacks bytes decodes as one U+FFFD


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


# --- the two libraries ------------------------------------------------------------------------------------------------
#
# Both backends have vocab_size, special_ids and their texts special_tokens, byte_ids (tokens such as <0x0A>), bos_id
# and adds_bos as the vocabulary's file has them, and default_text: special tokens where no JSON file names any.


class HuggingFaceBackend:
    """tokenizer.json, or vocab.json with merges.txt, and the tokens that only other JSON files declare."""

    def __init__(self, folder: Path, settings: dict, config: dict):
        self._tokenizer = load_tokenizer(folder, settings, config)
        self._tokenizer.no_truncation()  # a saved training setting, which would cut long prompts
        self._tokenizer.no_padding()
        self.token_to_id = self._tokenizer.token_to_id
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = {i: token for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(added)
        self.special_tokens = [token.content for token in added.values()]
        self.byte_ids = frozenset()
        if "ByteFallback" in str(self._tokenizer.decoder):
            self.byte_ids = frozenset(self.token_to_id(f"<0x{byte:02X}>") for byte in range(256)) - {None}
        first = self._tokenizer.encode("a", add_special_tokens=True).ids[:1]
        self.bos_id = first[0] if first and first[0] in self.special_ids else None
        self.adds_bos = self.bos_id is not None
        self.default_text = {}
        if str(settings.get("tokenizer_class")).startswith("LlamaTokenizer"):
            defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            self.default_text = {name: text for name, text in defaults.items() if self.token_to_id(text) is not None}

    def encode(self, text: str, stand_ins: dict[str, str]) -> list[int]:
        if not stand_ins:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        from tokenizers import normalizers

        # Special tokens are found before the text is normalised, so a token that normalising writes is plain text.
        twin, normalizer = self._twin
        steps = [normalizers.Replace(character, token) for character, token in stand_ins.items()]
        twin.normalizer = normalizers.Sequence(steps + ([] if normalizer is None else [normalizer]))
        return twin.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _twin(self) -> "tuple[tokenizers.Tokenizer, tokenizers.normalizers.Normalizer | None]":
        """A copy that looks for all special tokens before it normalises, and the normalizer it came with."""
        import tokenizers

        content = json.loads(self._tokenizer.to_str())
        for token in content["added_tokens"]:
            token["normalized"] &= not token["special"]
        twin = tokenizers.Tokenizer.from_str(json.dumps(content))
        return twin, twin.normalizer

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def load_tokenizer(folder: Path, settings: dict, config: dict) -> "tokenizers.Tokenizer":
    """The library's tokenizer, with all tokens that the JSON files declare. Raises FileNotFoundError, ValueError."""
    import tokenizers

    path, declared = folder / "tokenizer.json", declared_tokens(folder, settings)
    if path.is_file():
        refuse_lfs_pointer(path)
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer the tokenizers library can read: {error}") from error
        if any(tokenizer.token_to_id(token.content) != i for i, token in declared.items()):
            tokenizer = insert_tokens(path, declared)
    else:
        tokenizer = build_tokenizer(folder, settings, config)

    tokenizer.add_tokens([declared[i] for i in sorted(declared)])  # one that is there already takes the new flags
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    # The library would give a token without an id one beyond the model's embedding.
    named = [text for text in special_tokens(settings) if text not in known and tokenizer.token_to_id(text) is not None]
    tokenizer.add_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in sorted(named)])
    return tokenizer


def insert_tokens(path: Path, declared: "dict[int, tokenizers.AddedToken]") -> "tokenizers.Tokenizer":
    """tokenizer.json with the declared tokens that it lacks, each under its id. The library numbers added tokens from
    the end of the vocabulary on, without a gap: one that is missing in the middle would move all those behind it."""
    import tokenizers

    content = read_json(path)
    added = {token["id"]: token for token in content["added_tokens"]}
    vocab = content["model"].get("vocab", {})
    taken = {*added, *(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))}
    texts = {token["content"] for token in added.values()}
    new = {i: token for i, token in declared.items() if i not in taken and token.content not in texts}
    added |= {i: {"id": i, **token.__getstate__()} for i, token in new.items()}
    content["added_tokens"] = [added[i] for i in sorted(added)]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    for i, token in added.items():
        if tokenizer.token_to_id(token["content"]) != i:
            raise ValueError(f"{path}: the ids of its added tokens have a gap before {i}, {token['content']!r}, and no "
                             "file beside it declares what is missing")
    return tokenizer


def build_tokenizer(folder: Path, settings: dict, config: dict) -> "tokenizers.Tokenizer":
    """Byte-level BPE from vocab.json and merges.txt. How to split text into words is in neither file, so it is known
    here for Qwen2 and GPT-2 only."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    files = [folder / "vocab.json", folder / "merges.txt"]
    if not all(file.is_file() for file in files):
        raise FileNotFoundError(f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model, "
                                "or vocab.json with merges.txt")
    by_model = "Qwen2Tokenizer" if config.get("model_type") in ("qwen2", "qwen3", "qwen3_moe") else None
    kind = str(settings.get("tokenizer_class") or by_model).removesuffix("Fast")
    if kind not in ("Qwen2Tokenizer", "GPT2Tokenizer"):
        raise ValueError(f"{folder} has vocab.json and merges.txt only, which are read for tokenizer_class "
                         f"Qwen2Tokenizer and GPT2Tokenizer, not {kind}: tokenizer.json is needed")
    for file in files:
        refuse_lfs_pointer(file)
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE.from_file(*map(str, files)))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{folder}: vocab.json and merges.txt cannot be read: {error}") from error
    prefix = bool(settings.get("add_prefix_space"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if kind == "Qwen2Tokenizer":
        from gguf_tokenizer import QWEN2_WORDS
        words = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), "isolated")
        parts = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Sequence([words, parts])
    return tokenizer


class SentencePieceBackend:
    """tokenizer.model, with the added tokens that transformers keeps in JSON files beside it.

    sentencepiece encodes the text between special tokens, and puts a space in front of it. With transformers' `legacy`
    it does so after every special token; Vicuna's `</s>USER:` was trained so, as legacy was the default up to
    transformers 4. With `"legacy": false` it does so at the very beginning only.
    """

    # Appended to a serialised ModelProto, this overrides normalizer_spec {add_dummy_prefix, remove_extra_whitespaces}.
    NO_PREFIX = bytes([3 << 3 | 2, 4, 3 << 3, 0, 4 << 3, 0])

    def __init__(self, folder: Path, settings: dict):
        import sentencepiece
        from tokenizers import decoders

        path = folder / "tokenizer.model"
        refuse_lfs_pointer(path)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            proto = self._model.serialized_model_proto() + self.NO_PREFIX
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
        size = self._model.get_piece_size()
        self._pieces = dict(enumerate(self._model.id_to_piece(list(range(size)))))
        control = {i for i in self._pieces if self._model.is_control(i) or self._model.is_unknown(i)}
        self.byte_ids = frozenset(i for i in self._pieces if self._model.is_byte(i))
        ids = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id(), "unk_token": self._model.unk_id()}
        self.default_text = {name: self._pieces[i] for name, i in ids.items() if i >= 0}
        self.bos_id = ids["bos_token"] if ids["bos_token"] >= 0 else None
        self.adds_bos = bool(settings.get("add_bos_token", True))

        declared = declared_tokens(folder, settings)
        self._added = {self._pieces[i]: i for i in control} | {token.content: i for i, token in declared.items()}
        special = {*special_tokens(settings), *(token.content for token in declared.values() if token.special)}
        self._added |= {token: i for token in special if (i := self.token_to_id(token)) is not None}
        self.special_ids = frozenset(control | {self._added[token] for token in special if token in self._added})
        self.special_tokens = [token for token, i in self._added.items() if i in self.special_ids]
        self._pieces |= {i: token for token, i in self._added.items()}
        self.vocab_size = max(self._pieces) + 1

        self._takes_left = {token.content for token in declared.values() if token.lstrip}
        self._takes_right = {token.content for token in declared.values() if token.rstrip}
        words = {token.content for token in declared.values() if token.single_word}
        # Longest first, as one added token may begin another.
        patterns = {token: re.escape(token) for token in sorted(self._added, key=len, reverse=True)}
        added = "|".join(rf"(?<!\w){text}(?!\w)" if token in words else text for token, text in patterns.items())
        self._split = re.compile(f"({added})" if added else "(?!)()")

        self._legacy = settings.get("legacy") is not False
        prefixes = settings.get("add_prefix_space") is not False and self._model.encode("a") != self._bare.encode("a")
        if not prefixes:
            self._model = self._bare
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        self._decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] if prefixes else steps)

    def token_to_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        i = self._model.piece_to_id(token)  # that of <unk>, when there is no such piece
        return i if self._pieces[i] == token else None

    def encode(self, text: str, stand_ins: dict[str, str]) -> list[int]:
        ids, parts = [], self._split.split(text)  # text, added token, text, ..., text
        for n in range(1, len(parts), 2):
            if parts[n] in self._takes_left:
                parts[n - 1] = parts[n - 1].rstrip()
            if parts[n] in self._takes_right:
                parts[n + 1] = parts[n + 1].lstrip()
        for n, part in enumerate(parts):
            if n % 2:
                ids.append(self._added[part])
            elif part:
                # transformers 5 puts no space before text that begins with one.
                prefixed = n == 0 or (self._legacy and part[0] not in " ▁")
                ids += (self._model if prefixed else self._bare).encode(reveal(part, stand_ins))
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._decoder.decode([self._pieces[i] for i in ids if i in self._pieces])


def declared_tokens(folder: Path, settings: dict) -> "dict[int, tokenizers.AddedToken]":
    """{id: token}, as JSON files add them to the vocabulary: tokenizer_config.json's added_tokens_decoder or, where
    there is none, added_tokens.json {text: id}."""
    from tokenizers import AddedToken

    decoder = settings.get("added_tokens_decoder")
    if decoder is None:
        special = special_tokens(settings)
        added = read_json(folder / "added_tokens.json", absent={})
        decoder = {i: {"content": text, "special": text in special} for text, i in added.items()}
    declared = {}
    try:
        for i, token in decoder.items():
            flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
            flags = {name: bool(token[name]) for name in flags if name in token}
            declared[int(i)] = AddedToken(str(token["content"]), **flags)
        if not all(0 <= i < 1 << 31 for i in declared):
            raise ValueError("an id is no id")
    except (AttributeError, KeyError, TypeError, ValueError):
        files = "tokenizer_config.json or added_tokens.json"
        raise ValueError(f"{folder}: the added tokens in {files} are not ids and texts") from None
    return {i: token for i, token in declared.items() if token.content}
