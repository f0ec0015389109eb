"""
Text to token ids and back: tokenizer.json or vocab.json with merges.txt (`tokenizers`) or tokenizer.model
(`sentencepiece`) behind one class, chat templates, and a decoder for streams.

    tok = Tokenizer.from_pretrained("checkpoints/SmolLM2-135M-Instruct")     # a folder, or a hub id
    ids = tok.apply_chat_template([{"role": "user", "content": "Who was Ada Lovelace?"}])
    stream = tok.stream()
    for new_ids in ...:
        print(stream.push(new_ids), end="", flush=True)
    print(stream.flush())

Everything about a checkpoint comes from files in its folder: tokenizer.json, tokenizer.model, vocab.json, merges.txt,
tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.jinja, additional_chat_templates/,
config.json, generation_config.json. Which of them counts where they differ is as in transformers 5.
"""
import datetime
import functools
import hashlib
import json
import re
from pathlib import Path
from typing import Iterable

from console import read_text
from checkpoint import read_json, refuse_lfs_pointer, resolve_checkpoint

Messages = list[dict]  # [{"role": "system" | "user" | "assistant", "content": text}, ...] and what else a template reads


class Tokenizer:
    """Attributes: bos_id (None if there is none), stop_ids, special_ids, vocab_size, adds_bos: whether plain text
    begins with bos in this model (LLaMA: yes, Qwen and SmolLM2: no), and date: what the chat template is told when it
    asks for the time (None: the time of each rendering)."""

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        chat_template: str | None = None,
        template_args: dict | None = None,
        date: datetime.datetime | None = None,
    ) -> "Tokenizer":
        """checkpoint: folder or hub id; the rest: see __init__. Raises FileNotFoundError, ValueError."""
        folder = resolve_checkpoint(checkpoint, weights=False)
        return cls(folder, chat_template=chat_template, template_args=template_args, date=date)

    def __init__(
        self,
        folder: Path,
        *,
        chat_template: str | None = None,
        template_args: dict | None = None,
        date: datetime.datetime | None = None,
    ):
        """chat_template: "vicuna", "llama2", "mixtral", a jinja file or jinja text, instead of the checkpoint's own.
        template_args: more variables for the template, such as {"enable_thinking": False}."""
        settings = tokenizer_settings(folder)
        config = read_json(folder / "config.json", absent={})
        if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
            self._backend = HuggingFaceBackend(folder, settings, config)
        else:
            self._backend = SentencePieceBackend(folder, settings)
        self.vocab_size: int = self._backend.vocab_size
        self.special_ids: frozenset[int] = self._backend.special_ids

        unsaid = {name: text for name, text in self._backend.default_text.items() if name not in settings}
        self._special_text = unsaid | special_text(settings)
        self.bos_id = self._id(self._special_text.get("bos_token"))
        if self.bos_id is None and "bos_token" not in settings:  # null, as Qwen2 has it, means that there is none
            self.bos_id = self._backend.bos_id
            if self.bos_id is None and config.get("bos_token_id") in range(self.vocab_size):
                self.bos_id = int(config["bos_token_id"])
        self.adds_bos: bool = self.bos_id is not None and self._backend.adds_bos

        templates, self._is_builtin = find_chat_templates(folder, settings, config, self._backend, chat_template)
        self._chat_templates = {name: ChatTemplate(text) for name, text in templates.items()}
        self._template_args = check_template_args(template_args or {})
        self.date = date
        generation_config = read_json(folder / "generation_config.json", absent={})
        self.stop_ids: frozenset[int] = self._find_stop_ids(config, generation_config)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Special tokens written out in `text`, such as "</s>", become their ids; none is added but bos on request,
        unless the text begins with it."""
        return self._encode(text, bos, {})

    def _encode(self, text: str, bos: bool, stand_ins: dict[str, str]) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid UTF-8: {error.reason} at character {error.start}") from error
        ids = self._backend.encode(text, stand_ins)
        return [self.bos_id, *ids] if bos and self.bos_id not in (None, *ids[:1]) else ids

    def encode_chat(self, text: str) -> list[int]:
        """The ids of what render_chat gives."""
        return self.encode(text, bos=self._is_builtin and self.adds_bos)

    def decode(self, ids: Iterable[int], after: Iterable[int] = ()) -> str:
        """The text that `ids` add behind the ids `after`: where text goes on, the first word keeps its space, which
        SentencePiece drops at the beginning of a text. Special tokens, and ids beyond the vocabulary (a padded output
        layer has some), leave no text."""
        before = self._with_text(after)
        shown = certain_length(self._backend.decode(before)) if before else 0
        return self._backend.decode(before + self._with_text(ids))[shown:]

    def stream(self, after: Iterable[int] = ()) -> "StreamDecoder":
        """decode(..., after), piece by piece."""
        return StreamDecoder(self, after)

    def apply_chat_template(
        self,
        messages: Messages,
        add_generation_prompt: bool = True,
        *,
        tools: list[dict] | None = None,
        plain_text: bool = False,
    ) -> list[int]:
        """As in transformers: a special token inside a message counts as special, and bos is where the template puts
        it. The built-in templates leave it out in front, so that the first word keeps its SentencePiece space.

        plain_text: special tokens in what the messages say are text, so that nobody can end a turn or open another by
        writing "<|im_end|>"; those that the template itself writes stay special. Raises ValueError where a template
        changes the messages in such a way that the two cannot be told apart.
        """
        text, bos = self.render_chat(messages, add_generation_prompt, tools=tools), self._is_builtin and self.adds_bos
        stand_ins = self._find_stand_ins(messages) if plain_text else {}
        if not stand_ins:
            return self._encode(text, bos, {})
        hidden = [hide(message, stand_ins) for message in messages]
        hidden = self.render_chat(hidden, add_generation_prompt, tools=tools)
        ids = self._encode(hidden, bos, stand_ins)
        harmless = self.encode(reveal(hidden, dict.fromkeys(stand_ins, ".")), bos)
        if reveal(hidden, stand_ins) != text or self._marks(ids) != self._marks(harmless):
            tokens = ", ".join(map(repr, stand_ins.values()))
            raise ValueError(f"with this chat template and tokenizer {tokens} in a message cannot pass as text")
        return ids

    def _marks(self, ids: list[int]) -> list[int]:
        """The special tokens among them, but for that of unknown characters."""
        unknown = self._id(self._special_text.get("unk_token"))
        return [i for i in ids if i in self.special_ids and i != unknown]

    @property
    def uses_date(self) -> bool:
        """Whether the chat template asks for the date."""
        return any(template.uses_date for template in self._chat_templates.values())

    @property
    def template_digest(self) -> str:
        """sha256 over the chat template and its arguments, but not the date: what a chat's tokens come from."""
        texts = {name: template.text for name, template in self._chat_templates.items()}
        return hashlib.sha256(json.dumps([texts, self._template_args], sort_keys=True).encode()).hexdigest()

    def render_chat(
        self, messages: Messages, add_generation_prompt: bool = True, *, tools: list[dict] | None = None
    ) -> str:
        template = (tools is not None and self._chat_templates.get("tool_use")) or self._chat_templates.get("default")
        if template is None:
            names = "|".join([*self._chat_templates, *BUILTIN_TEMPLATES])
            raise ValueError(f"this checkpoint has no chat template: use --raw, or --chat-template {names}")
        if not messages:
            raise ValueError("a chat needs at least one message")
        variables = {"tools": None, "documents": None, **self._special_text, **self._template_args}
        if tools is not None:
            variables["tools"] = tools
        messages = [said_keys(message) for message in messages]
        return template.render(self.date, messages=messages, add_generation_prompt=add_generation_prompt, **variables)

    def _find_stand_ins(self, messages: Messages) -> dict[str, str]:
        """{a character that nobody uses: a special token written in a message}"""
        said = "\n".join(strings(messages))
        special = [token for token in self._backend.special_tokens if token in said]
        used = said + "".join(template.text for template in self._chat_templates.values())
        private = (chr(i) for i in range(0xF0000, 0xFFFFE) if chr(i) not in used)  # private use: means nothing
        # Longest first, as one token may begin another.
        return dict(zip(private, sorted(special, key=len, reverse=True)))

    def _has_text(self, i: int) -> bool:
        return 0 <= i < self.vocab_size and i not in self.special_ids

    def _with_text(self, ids: Iterable[int]) -> list[int]:
        return [i for i in ids if self._has_text(i)]

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def _find_stop_ids(self, config: dict, generation_config: dict) -> frozenset[int]:
        eos = self._special_text.get("eos_token", self._backend.default_text.get("eos_token"))
        stops = {self._id(eos)}
        for source in (generation_config, config):
            ids = source.get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            if source.get("bos_token_id") not in (None, self.bos_id):
                # Early LLaMA folders count one token less: what they call eos is the vocabulary's bos.
                ids = [i for i in ids if i != self.bos_id]
            stops.update(int(i) for i in ids if isinstance(i, (int, float)))
        # A chat model may end its turn with a token that its config does not list.
        written = "".join(template.text for template in self._chat_templates.values())
        stops.update(self._id(token) for token in END_OF_TURN if token in written)
        return frozenset(stops - {None})


class StreamDecoder:
    """Decodes a stream of ids: whatever the pieces it comes in, the text of all push() and flush() is what decode()
    gives for all ids at once.

    Decoding one id by itself loses leading spaces (SentencePiece) and breaks characters that span ids (byte-level BPE).
    So each id is decoded behind the few that precede it, and only what it adds comes out: constant work per id.
    """

    CONTEXT = 4  # ids; a character that has begun lies in the last 3, for it lacks at least one of its 4 bytes

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()):
        self._tokenizer = tokenizer
        self._ids = tokenizer._with_text(after)
        self._shown = 0  # characters of decode(_ids) that are out
        if self._ids:
            self._shown = certain_length(tokenizer._backend.decode(self._ids))

    def push(self, ids: Iterable[int]) -> str:
        """The text that has become certain."""
        backend = self._tokenizer._backend
        text = ""
        for i in ids:
            if not self._tokenizer._has_text(i):
                continue
            self._ids.append(i)
            # A run of bytes is decoded as a whole: one wrong byte spoils the characters before it.
            if i not in backend.byte_ids:
                text += self._advance(backend)
        return text

    def peek(self) -> str:
        """The rest, as flush() would give it now: a character that lacks bytes is U+FFFD."""
        return self._tokenizer._backend.decode(self._ids)[self._shown :]

    def flush(self) -> str:
        """The rest; the stream is then as new."""
        text = self.peek()
        self._ids, self._shown = [], 0
        return text

    def _advance(self, backend) -> str:
        text = backend.decode(self._ids)
        new = text[self._shown : certain_length(text)]
        self._ids = self._ids[-self.CONTEXT :]
        self._shown = certain_length(backend.decode(self._ids))
        return new


def certain_length(text: str) -> int:
    return len(text) - text.endswith("\ufffd")  # a character that lacks bytes decodes as one U+FFFD


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
            self.byte_ids = frozenset(map(self.token_to_id, BYTE_TOKENS)) - {None}
        first = self._tokenizer.encode("a", add_special_tokens=True).ids[:1]
        self.bos_id = first[0] if first and first[0] in self.special_ids else None
        self.adds_bos = self.bos_id is not None
        self.default_text = {}
        if str(settings.get("tokenizer_class")).startswith("LlamaTokenizer"):
            defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
            self.default_text = {name: text for name, text in defaults.items() if self.token_to_id(text) is not None}

    def encode(self, text: str, stand_ins: dict[str, str] = {}) -> list[int]:
        """stand_ins: {character: the special token it stands for, which is to be encoded as text}"""
        if not stand_ins:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        from tokenizers import normalizers

        # Special tokens are found before the text is normalised, so what normalising brings in is text.
        twin, normalizer = self._twin
        steps = [normalizers.Replace(character, token) for character, token in stand_ins.items()]
        twin.normalizer = normalizers.Sequence(steps + ([] if normalizer is None else [normalizer]))
        return twin.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def _twin(self) -> tuple["tokenizers.Tokenizer", "tokenizers.normalizers.Normalizer | None"]:
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
    """With every token that is declared beside it. Raises FileNotFoundError, ValueError."""
    import tokenizers

    path = folder / "tokenizer.json"
    if path.is_file():
        refuse_lfs_pointer(path)
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer the tokenizers library can read: {error}") from error
    else:
        tokenizer = build_tokenizer(folder, settings, config)

    declared = declared_tokens(folder, settings)
    if path.is_file() and any(tokenizer.token_to_id(token["content"]) != i for i, token in declared.items()):
        tokenizer = insert_tokens(path, declared)
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokens = [tokenizers.AddedToken(**declared[i]) for i in sorted(declared)]
    named = set(special_tokens(settings)) - known - {token.content for token in tokens}
    tokens += [tokenizers.AddedToken(token, special=True, normalized=False) for token in sorted(named)
               if tokenizer.token_to_id(token) is not None]  # what has no id would get one that no model has
    tokenizer.add_tokens(tokens)  # one that is known takes the flags that it has here
    return tokenizer


def insert_tokens(path: Path, declared: dict[int, dict]) -> "tokenizers.Tokenizer":
    """tokenizer.json with the declared tokens that it lacks, each under its id. The library counts added tokens on
    from the vocabulary without a gap, so one that is missing in the middle would move all behind it."""
    import tokenizers

    content = read_json(path)
    added = {token["id"]: token for token in content["added_tokens"]}
    vocab = content["model"].get("vocab", {})
    taken = {*added, *(vocab.values() if isinstance(vocab, dict) else range(len(vocab)))}
    texts = {token["content"] for token in added.values()}
    new = {i: token for i, token in declared.items() if i not in taken and token["content"] not in texts}
    added |= {i: {"id": i, **token} for i, token in new.items()}
    content["added_tokens"] = [added[i] for i in sorted(added)]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    for i, token in added.items():
        if tokenizer.token_to_id(token["content"]) != i:
            raise ValueError(f"{path}: the ids of its added tokens have a gap before {i}, {token['content']!r}, and no "
                             "file beside it declares what is missing")
    return tokenizer


# Splits text as Qwen2's published tokenizer.json does.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(folder: Path, settings: dict, config: dict) -> "tokenizers.Tokenizer":
    """Byte-level BPE from vocab.json and merges.txt, of the kinds whose rules these two files leave out."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    files = [folder / "vocab.json", folder / "merges.txt"]
    if not all(file.is_file() for file in files):
        raise FileNotFoundError(
            f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model, or vocab.json with merges.txt"
        )
    by_model = "Qwen2Tokenizer" if config.get("model_type") in ("qwen2", "qwen3") else None
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
        words = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), "isolated")
        parts = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False)
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.Sequence([words, parts])
    return tokenizer


class SentencePieceBackend:
    """tokenizer.model, with the added tokens that transformers keeps in JSON files beside it.

    Text between special tokens goes through sentencepiece, which puts a space in front of it. transformers' `legacy`
    (the default up to its version 4, so what Vicuna's `</s>USER:` was trained with) does so after every special token;
    `"legacy": false` does so at the very beginning only.
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
        self.special_ids = frozenset(i for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i))
        self.byte_ids = frozenset(i for i in range(size) if self._model.is_byte(i))
        ids = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id(), "unk_token": self._model.unk_id()}
        self.default_text = {name: self._model.id_to_piece(i) for name, i in ids.items() if i >= 0}
        self.bos_id = ids["bos_token"] if ids["bos_token"] >= 0 else None
        self.adds_bos = bool(settings.get("add_bos_token", True))

        self._pieces = dict(enumerate(self._model.id_to_piece(list(range(size)))))
        self._added = {self._pieces[i]: i for i in self.special_ids}
        special = set(special_tokens(settings))
        declared = declared_tokens(folder, settings)
        for i, token in declared.items():
            self._added[token["content"]] = i
            special |= {token["content"]} if token["special"] else set()
        self._takes_left = {token["content"] for token in declared.values() if token["lstrip"]}
        self._takes_right = {token["content"] for token in declared.values() if token["rstrip"]}
        self._added |= {token: i for token in special if (i := self.token_to_id(token)) is not None}
        self.special_ids |= {self._added[token] for token in special if token in self._added}
        self.special_tokens = [token for token, i in self._added.items() if i in self.special_ids]
        self._pieces |= {i: token for token, i in self._added.items()}
        self.vocab_size = max(self._pieces) + 1
        # Longest first, as one added token may begin another.
        words = {token["content"] for token in declared.values() if token["single_word"]}
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

    def encode(self, text: str, stand_ins: dict[str, str] = {}) -> list[int]:
        """stand_ins: {character: the special token it stands for, which is to be encoded as text}"""
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
                # Text behind a token that brings a space of its own gets no other in transformers 5.
                prefixed = n == 0 or (self._legacy and part[0] not in " ▁")
                ids += (self._model if prefixed else self._bare).encode(reveal(part, stand_ins))
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._decoder.decode([self._pieces[i] for i in ids if i in self._pieces])


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]  # how SentencePiece writes what has no piece of its own


def tokenizer_settings(folder: Path) -> dict:
    """tokenizer_config.json and special_tokens_map.json, without what is empty: a special token "" is no statement."""
    settings = read_json(folder / "tokenizer_config.json", absent={})
    mapped = read_json(folder / "special_tokens_map.json", absent={})
    # The map counts for more until tokenizer_config.json declares tokens with their ids itself.
    settings = {**mapped, **settings} if "added_tokens_decoder" in settings else {**settings, **mapped}
    return {name: value for name, value in settings.items() if value != "" and text_of(value) != ""}


def text_of(token: object) -> str | None:
    """The text of a special token: a string, or {"content": string}, as older files have it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def special_text(settings: dict) -> dict[str, str]:
    """{"eos_token": "</s>", ...}"""
    named = {name: text_of(settings.get(name)) for name in NAMED_TOKENS}
    return {name: text for name, text in named.items() if text is not None}


def special_tokens(settings: dict) -> list[str]:
    """The texts of all special tokens that tokenizer_config.json names."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    more = more.values() if isinstance(more, dict) else more
    of_model = [value for name, value in settings.items() if name.endswith("_token") and name not in NAMED_TOKENS]
    texts = [*special_text(settings).values(), *map(text_of, more), *map(text_of, of_model)]
    return [text for text in dict.fromkeys(texts) if text]


def declared_tokens(folder: Path, settings: dict) -> dict[int, dict]:
    """{id: {"content", "special", "lstrip", "rstrip", "single_word", "normalized"}} of the tokens that JSON files add:
    tokenizer_config.json's added_tokens_decoder or, where there is none, added_tokens.json {text: id}."""
    decoder = settings.get("added_tokens_decoder")
    if decoder is None:
        special = special_tokens(settings)
        added = read_json(folder / "added_tokens.json", absent={})
        decoder = {i: {"content": text, "special": text in special} for text, i in added.items()}
    try:
        declared = {int(i): token_flags(token) for i, token in decoder.items()}
        if not all(0 <= i < 1 << 31 for i in declared):
            raise ValueError("an id is no id")
    except (AttributeError, KeyError, TypeError, ValueError):
        files = "tokenizer_config.json or added_tokens.json"
        raise ValueError(f"{folder}: the added tokens in {files} are not ids and texts") from None
    return {i: token for i, token in declared.items() if token["content"]}


def token_flags(token: dict) -> dict:
    special = bool(token.get("special"))
    flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word")}
    normalized = bool(token.get("normalized", not special))
    return {"content": str(token["content"]), "special": special, "normalized": normalized, **flags}


# --- chat templates ---------------------------------------------------------------------------------------------------

END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_turn|>", "<end_of_turn>", "<|end|>")

# For checkpoints older than chat templates. Each begins by taking the system message off and checking the turns.
TURNS = (
    "{% if messages[0].role == 'system' %}{% set system, turns = messages[0].content, messages[1:] %}"
    "{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role != ('user' if loop.index0 is even else 'assistant') %}"
    "{{ raise_exception('user and assistant must take turns, user first') }}{% endif %}{% endfor %}"
)
BUILTIN_TEMPLATES = {
    # Vicuna v1.1 and later (FastChat's "vicuna_v1.1"), which EAGLE's evaluation uses too
    "vicuna": "{% set system = 'A chat between a curious user and an artificial intelligence assistant. The assistant "
    "gives helpful, detailed, and polite answers to the user\\'s questions.' %}" + TURNS + "{{ system + ' ' }}"
    "{% for m in turns %}"
    "{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + '</s>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    # LLaMA-2-chat: each pair of turns between bos and eos, the system message inside the first
    "llama2": TURNS + "{% for m in turns %}{% if m.role == 'user' %}"
    "{{ ('' if loop.first else '<s>') + '[INST] ' }}"
    "{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' </s>' }}{% endif %}{% endfor %}",
    # Mistral- and Mixtral-Instruct v0.1: no system message of their own, so it heads the first turn
    "mixtral": TURNS + "{% for m in turns %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system + '\\n\\n' if loop.first and system else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}",
}


def find_chat_templates(
    folder: Path, settings: dict, config: dict, backend: "HuggingFaceBackend | SentencePieceBackend", choice: str | None
) -> tuple[dict[str, str], bool]:
    """({"default": jinja text, ...}, whether it is a built-in one); "tool_use" is taken where a chat has tools."""
    if choice in BUILTIN_TEMPLATES:
        if not fits_template(choice, backend):
            raise ValueError(f"chat template {choice!r} writes [INST] as text, which is one token of this vocabulary")
        return {"default": BUILTIN_TEMPLATES[choice]}, True
    if choice is not None and ("{{" in choice or "{%" in choice):
        return {"default": choice}, False
    templates = checkpoint_templates(folder, settings)
    if choice in templates:
        return {"default": templates[choice]}, False
    if choice is not None:
        if not Path(choice).is_file():
            names = "|".join([*templates, *BUILTIN_TEMPLATES])
            raise ValueError(f"chat template {choice!r} is no file, no jinja text and none of {names}")
        return {"default": read_text(Path(choice))}, False
    if templates:
        return templates, False
    name = builtin_name(config, backend)
    return {} if name is None else {"default": BUILTIN_TEMPLATES[name]}, name is not None


def checkpoint_templates(folder: Path, settings: dict) -> dict[str, str]:
    """{"default": ..., "tool_use": ...}: chat_template.jinja and additional_chat_templates/NAME.jinja, else
    tokenizer_config.json's chat_template: one text, or several by name. Raises ValueError."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if found := {name: read_template(file) for name, file in files.items() if file.is_file()}:
        return found
    template = settings.get("chat_template") or {}
    if isinstance(template, str):
        return {"default": template}
    try:
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}
        if all(isinstance(text, str) for text in template.values()):
            return template
    except (AttributeError, KeyError, TypeError):
        pass
    raise ValueError(f"{folder / 'tokenizer_config.json'}: chat_template is neither a text nor texts by name")


def read_template(file: Path) -> str:
    refuse_lfs_pointer(file)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: byte {error.start} does not fit") from None


def builtin_name(config: dict, backend: "HuggingFaceBackend | SentencePieceBackend") -> str | None:
    kind, named = config.get("model_type"), str(config.get("_name_or_path")).lower()
    if config.get("vocab_size", 32000) != 32000:
        return None
    if kind in ("mixtral", "mistral"):  # their later vocabularies have other spaces around [INST]
        return "mixtral" if fits_template("mixtral", backend) else None
    if kind == "llama" and "vicuna" in named:
        return "vicuna"
    if kind == "llama" and "llama-2" in named and "chat" in named:
        return "llama2"
    return None


def fits_template(name: str, backend: "HuggingFaceBackend | SentencePieceBackend") -> bool:
    """Whether this vocabulary writes as text what the built-in template does."""
    return "[INST]" not in BUILTIN_TEMPLATES[name] or backend.token_to_id("[INST]") is None


def said_keys(message: dict) -> dict:
    """Without keys whose value is null, which templates would write as "None"; reasoning under its usual name too."""
    message = {key: value for key, value in message.items() if value is not None}
    for name in ("thinking", "reasoning"):
        if name in message:
            message.setdefault("reasoning_content", message[name])
    return message


class ChatTemplate:
    """Jinja text, compiled once, at the first rendering.

    Templates come from strangers: they run in jinja's sandbox. What they may use is what transformers gives them.
    """

    def __init__(self, text: str):
        self.text = text
        self.uses_date = "strftime_now" in text

    @functools.cached_property
    def _compiled(self) -> "jinja2.Template":
        return template_environment().from_string(self.text)

    def render(self, date: datetime.datetime | None = None, **variables) -> str:
        """date: what strftime_now tells, None for now. Raises ValueError."""

        def strftime_now(pattern: str) -> str:
            return (date or datetime.datetime.now()).strftime(pattern)

        try:
            return self._compiled.render(strftime_now=strftime_now, **variables)
        except Exception as error:  # a stranger's program may fail in any way
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template cannot render these messages: {reason}") from error


def template_environment() -> "jinja2.Environment":
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks what an assistant said, for training; here it says nothing."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment


def check_template_args(args: dict) -> dict:
    """Raises ValueError for what cannot be handed to a template."""
    if not isinstance(args, dict) or not all(isinstance(name, str) for name in args):
        raise ValueError(f"template arguments are an object of names and values, not {args!r}")
    if taken := {"messages", "add_generation_prompt", "strftime_now"} & set(args):
        raise ValueError(f"template argument {min(taken)!r} is not free: every chat has its own")
    return args


# Special tokens in a message pass through the template under characters that mean nothing.


def strings(value: object) -> Iterable[str]:
    """All strings in what messages say: contents, reasoning, tool calls."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from strings(inner) if key != "role" else ()
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)


def hide(value: object, stand_ins: dict[str, str]) -> object:
    """The same with each special token in `strings(value)` replaced by the character that stands for it."""
    if isinstance(value, str):
        for character, token in stand_ins.items():
            value = value.replace(token, character)
        return value
    if isinstance(value, dict):
        return {key: inner if key == "role" else hide(inner, stand_ins) for key, inner in value.items()}
    if isinstance(value, list):
        return [hide(inner, stand_ins) for inner in value]
    return value


def reveal(text: str, stand_ins: dict[str, str]) -> str:
    return text.translate(str.maketrans(stand_ins)) if stand_ins else text
