"""
Text to token ids and back: tokenizer.json (`tokenizers`) or tokenizer.model (`sentencepiece`) behind one class, chat
templates, and a decoder for streams.

    tok = Tokenizer.from_pretrained("checkpoints/SmolLM2-135M-Instruct")     # a folder, or a hub id
    ids = tok.apply_chat_template([{"role": "user", "content": "Who was Ada Lovelace?"}])
    stream = tok.stream()
    for new_ids in ...:
        print(stream.push(new_ids), end="", flush=True)
    print(stream.flush())

Everything about a checkpoint comes from files in its folder: tokenizer.json, tokenizer.model, tokenizer_config.json,
special_tokens_map.json, added_tokens.json, chat_template.jinja, config.json, generation_config.json.
"""
import datetime
import json
import re
from pathlib import Path
from typing import Iterable

Messages = list[dict[str, str]]  # [{"role": "system" | "user" | "assistant", "content": text}, ...]


class Tokenizer:
    """Attributes: bos_id (None if there is none), stop_ids, special_ids, vocab_size, and adds_bos: whether plain text
    begins with bos in this model (LLaMA: yes, Qwen and SmolLM2: no)."""

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path, *, chat_template: str | None = None) -> "Tokenizer":
        """checkpoint: folder or hub id; chat_template: see __init__. Raises FileNotFoundError, ValueError."""
        if not Path(checkpoint).is_dir():
            from model import resolve_checkpoint

            checkpoint = resolve_checkpoint(checkpoint)
        return cls(Path(checkpoint), chat_template=chat_template)

    def __init__(self, folder: Path, *, chat_template: str | None = None):
        """chat_template: "vicuna", "llama2", "mixtral", a jinja file or jinja text, instead of the checkpoint's own."""
        settings = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
        config = read_json(folder / "config.json")
        if (folder / "tokenizer.json").is_file():
            self._backend = HuggingFaceBackend(folder, settings)
        elif (folder / "tokenizer.model").is_file():
            self._backend = SentencePieceBackend(folder, settings)
        else:
            raise FileNotFoundError(f"{folder} has no tokenizer: expected tokenizer.json or tokenizer.model")
        self.vocab_size: int = self._backend.vocab_size
        self.special_ids: frozenset[int] = self._backend.special_ids

        self._special_text = special_text(settings)
        self.bos_id = self._id(self._special_text.get("bos_token"))
        if self.bos_id is None and "bos_token" not in settings:  # null, as Qwen2 has it, means that there is none
            self.bos_id = config.get("bos_token_id", self._backend.bos_id)
        self.adds_bos: bool = self.bos_id is not None and settings.get("add_bos_token", self._backend.adds_bos)

        self._chat_template, self._is_builtin = find_chat_template(folder, settings, config, chat_template)
        self.stop_ids: frozenset[int] = self._find_stop_ids(config, read_json(folder / "generation_config.json"))

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Special tokens written out in `text`, such as "</s>", become their ids; none is added but bos on request."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text is not valid UTF-8: {error.reason} at character {error.start}") from error
        ids = self._backend.encode(text)
        return [self.bos_id, *ids] if bos and self.bos_id is not None else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens, and ids beyond the vocabulary (a padded output layer has some), leave no text."""
        return self._backend.decode([i for i in ids if self._has_text(i)])

    def stream(self) -> "StreamDecoder":
        return StreamDecoder(self)

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = True) -> list[int]:
        """As in transformers: a special token inside a message counts as special, and bos is where the template puts
        it. The built-in templates leave it out in front, so that the first word keeps its SentencePiece space."""
        text = self.render_chat(messages, add_generation_prompt)
        return self.encode(text, bos=self._is_builtin and self.adds_bos)

    def render_chat(self, messages: Messages, add_generation_prompt: bool = True) -> str:
        if self._chat_template is None:
            names = "|".join(BUILTIN_TEMPLATES)
            raise ValueError(f"this checkpoint has no chat template: use --raw, or --chat-template {names}")
        if not messages:
            raise ValueError("a chat needs at least one message")
        return render(
            self._chat_template,
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **self._special_text,
        )

    def _has_text(self, i: int) -> bool:
        return 0 <= i < self.vocab_size and i not in self.special_ids

    def _id(self, token: str | None) -> int | None:
        return None if token is None else self._backend.token_to_id(token)

    def _find_stop_ids(self, config: dict, generation_config: dict) -> frozenset[int]:
        stops = set()
        for source in (generation_config, config):
            ids = source.get("eos_token_id")
            stops.update(ids if isinstance(ids, list) else [ids])
        eos = self._special_text.get("eos_token")
        stops.add(self._backend.eos_id if eos is None else self._id(eos))
        # A chat model may end its turn with a token that its config does not list.
        stops.update(self._id(token) for token in END_OF_TURN if token in (self._chat_template or ""))
        return frozenset(stops - {None})


class StreamDecoder:
    """Decodes a stream of ids: whatever the pieces it comes in, the text of all push() and flush() is what decode()
    gives for all ids at once.

    Decoding one id by itself loses leading spaces (SentencePiece) and breaks characters that span ids (byte-level BPE).
    So each id is decoded behind the few that precede it, and only what it adds comes out: constant work per id.
    """

    CONTEXT = 4  # ids; a character that has begun lies in the last 3, for it lacks at least one of its 4 bytes

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters of decode(_ids) that are out

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

    def flush(self) -> str:
        """The rest; the stream is then as new."""
        text = self._tokenizer._backend.decode(self._ids)[self._shown :]
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
    """tokenizer.json."""

    def __init__(self, folder: Path, settings: dict):
        import tokenizers

        path = folder / "tokenizer.json"
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is not a tokenizer the tokenizers library can read: {error}") from error
        self._tokenizer.no_truncation()  # a saved training setting, which would cut long prompts
        self._tokenizer.no_padding()
        self.token_to_id = self._tokenizer.token_to_id
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        named = (self.token_to_id(token) for token in special_text(settings).values())
        added = (i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special)
        self.special_ids = frozenset({*named, *added} - {None})
        self.byte_ids = frozenset()
        if "ByteFallback" in str(self._tokenizer.decoder):
            self.byte_ids = frozenset(map(self.token_to_id, BYTE_TOKENS)) - {None}
        self.bos_id = self.eos_id = None
        first = self._tokenizer.encode("a", add_special_tokens=True).ids[:1]
        self.adds_bos = bool(first) and first[0] in self.special_ids

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


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
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            proto = self._model.serialized_model_proto() + self.NO_PREFIX
            self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a sentencepiece model: {error}") from error
        size = self._model.get_piece_size()
        self.special_ids = frozenset(i for i in range(size) if self._model.is_control(i) or self._model.is_unknown(i))
        self.byte_ids = frozenset(i for i in range(size) if self._model.is_byte(i))
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self._model.bos_id(), self._model.eos_id()))
        self.adds_bos = True

        self._pieces = dict(enumerate(self._model.id_to_piece(list(range(size)))))
        self._added = {self._pieces[i]: i for i in self.special_ids} | read_json(folder / "added_tokens.json")
        special = set(special_text(settings).values())
        for i, token in settings.get("added_tokens_decoder", {}).items():
            self._added[token["content"]] = int(i)
            special |= {token["content"]} if token.get("special") else set()
        self._added |= {token: i for token in special if (i := self.token_to_id(token)) is not None}
        self.special_ids |= {self._added[token] for token in special if token in self._added}
        self._pieces |= {i: token for token, i in self._added.items()}
        self.vocab_size = max(self._pieces) + 1
        # Longest first, as one added token may begin another.
        added = "|".join(re.escape(token) for token in sorted(self._added, key=len, reverse=True))
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

    def encode(self, text: str) -> list[int]:
        ids = []
        for n, part in enumerate(self._split.split(text)):  # text, added token, text, ..., text
            if n % 2:
                ids.append(self._added[part])
            elif part:
                ids += (self._model if n == 0 or self._legacy else self._bare).encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._decoder.decode([self._pieces[i] for i in ids if i in self._pieces])


BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]  # how SentencePiece writes what has no piece of its own


def read_json(path: Path) -> dict:
    """An absent file is an empty one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not {type(content).__name__}")
    return content


def special_text(settings: dict) -> dict[str, str]:
    """{"eos_token": "</s>", ...}; older files wrap the text in {"content": ...}."""
    tokens = {name: settings.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    for n, token in enumerate(settings.get("additional_special_tokens") or []):
        tokens[f"additional_special_token_{n}"] = token
    tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    return {name: token for name, token in tokens.items() if token}


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


def find_chat_template(folder: Path, settings: dict, config: dict, choice: str | None) -> tuple[str | None, bool]:
    """(jinja text or None, whether it is a built-in one)"""
    if choice in BUILTIN_TEMPLATES:
        return BUILTIN_TEMPLATES[choice], True
    if choice is not None:
        if "{{" in choice or "{%" in choice:
            return choice, False
        if not Path(choice).is_file():
            names = "|".join(BUILTIN_TEMPLATES)
            raise ValueError(f"chat template {choice!r} is no file, no jinja text and none of {names}")
        return Path(choice).read_text(encoding="utf-8"), False
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8"), False
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name: "default", "tool_use", ...
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if template is not None:
        return template, False
    name = builtin_name(config)
    return BUILTIN_TEMPLATES.get(name), name is not None


def builtin_name(config: dict) -> str | None:
    name = str(config.get("_name_or_path")).lower()
    if config.get("model_type") in ("mixtral", "mistral"):
        return "mixtral"
    if config.get("model_type") == "llama" and config.get("vocab_size") == 32000:
        if "vicuna" in name:
            return "vicuna"
        if "llama-2" in name and "chat" in name:
            return "llama2"
    return None


def render(template: str, **variables) -> str:
    """Templates come from strangers: they run in jinja's sandbox. What they may use is what transformers gives them."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        return datetime.datetime.now().strftime(pattern)

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks what an assistant said, for training; here it says nothing."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    environment.filters["tojson"] = tojson
    try:
        return environment.from_string(template).render(**variables)
    except Exception as error:  # a stranger's program may fail in any way
        reason = " ".join(str(error).split())
        raise ValueError(f"the chat template cannot render these messages: {reason}") from error
