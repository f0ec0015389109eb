"""
Chat templates: jinja programs that write a list of messages as one text.

    templates = ChatTemplates({"default": "{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}"})
    templates.render([{"role": "user", "content": "Hi"}])       # "user: Hi\\n"

A checkpoint has its template in chat_template.jinja, additional_chat_templates/ or tokenizer_config.json; which of them
counts is as in transformers 5. Vicuna, LLaMA-2-chat and the first Mistral models are older than chat templates: theirs
are built in. `Tokenizer.apply_chat_template` (tokenizer.py) turns the text into token ids.
"""
import datetime
import functools
import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console import read_text
from checkpoint import read_json, refuse_lfs_pointer

if TYPE_CHECKING:
    import jinja2.nodes
    import jinja2.parser

# [{"role": "system" | "user" | "assistant", "content": text}, ...]; a template may read more keys, such as tool_calls.
Messages = list[dict]

# The built-in templates begin by taking off the system message and checking that user and assistant take turns.
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
    # Mistral- and Mixtral-Instruct v0.1: they know no system message, so it is put before the first turn
    "mixtral": TURNS + "{% for m in turns %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system + '\\n\\n' if loop.first and system else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}",
}
# What tokenizer_config.json calls special tokens; a template may use these names too.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Tokens that end a turn. A chat model may use one that its config does not list as eos.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_turn|>", "<end_of_turn>", "<|end|>")


# --- the special tokens of tokenizer_config.json ----------------------------------------------------------------------


def tokenizer_settings(folder: Path) -> dict:
    """tokenizer_config.json and special_tokens_map.json. A special token "" is left out, as it says nothing."""
    settings = read_json(folder / "tokenizer_config.json", absent={})
    mapped = read_json(folder / "special_tokens_map.json", absent={})
    # The map counts for more, unless tokenizer_config.json itself declares tokens with their ids.
    settings = {**mapped, **settings} if "added_tokens_decoder" in settings else {**settings, **mapped}
    return {name: value for name, value in settings.items() if value != "" and text_of(value) != ""}


def text_of(token: object) -> str | None:
    """The text of a special token: a string, or {"content": string}, as older files have it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def special_text(settings: dict) -> dict[str, str]:
    """{"eos_token": "</s>", ...}, for templates."""
    return {name: text for name in NAMED_TOKENS if (text := text_of(settings.get(name))) is not None}


def special_tokens(settings: dict) -> list[str]:
    """The texts of all special tokens that tokenizer_config.json names."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    more = more.values() if isinstance(more, dict) else more
    of_model = [value for name, value in settings.items() if name.endswith("_token") and name not in NAMED_TOKENS]
    texts = [*special_text(settings).values(), *map(text_of, more), *map(text_of, of_model)]
    return [text for text in dict.fromkeys(texts) if text]


# --- which template ---------------------------------------------------------------------------------------------------


def find_chat_templates(folder: Path, settings: dict, config: dict, token_to_id: Callable[[str], int | None],
                        choice: str | None = None) -> tuple[dict[str, str], bool]:
    """({"default": jinja text, ...}, whether it is a built-in template). Raises ValueError.

    settings: tokenizer_config.json. choice: the name of a built-in template or of one of the checkpoint's, jinja text,
    or a file; None means the checkpoint's own.
    """

    def fits_vocabulary(name: str) -> bool:
        """The built-in templates write [INST] as text. Where it is a token, other spaces belong around it."""
        return "[INST]" not in BUILTIN_TEMPLATES[name] or token_to_id("[INST]") is None

    if choice in BUILTIN_TEMPLATES:
        if not fits_vocabulary(choice):
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
    name = builtin_name(config)
    if templates or name is None or not fits_vocabulary(name):
        return templates, False
    return {"default": BUILTIN_TEMPLATES[name]}, True


def checkpoint_templates(folder: Path, settings: dict) -> dict[str, str]:
    """{"default": jinja text, "tool_use": ...} from chat_template.jinja and additional_chat_templates/NAME.jinja. Where
    there are none, tokenizer_config.json's chat_template: one text, or several by name. Raises ValueError."""
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


def builtin_name(config: dict) -> str | None:
    """The built-in template for a checkpoint without one, as far as config.json tells."""
    kind, named = config.get("model_type"), str(config.get("_name_or_path")).lower()
    if config.get("vocab_size", 32000) != 32000:
        return None
    if kind in ("mixtral", "mistral"):
        return "mixtral"
    if kind == "llama" and "vicuna" in named:
        return "vicuna"
    if kind == "llama" and "llama-2" in named and "chat" in named:
        return "llama2"
    return None


# --- rendering --------------------------------------------------------------------------------------------------------


class ChatTemplates:
    """The templates of one checkpoint by name: "default", and "tool_use" for chats with tools where there is one.

    is_builtin: the text comes without bos, which the tokenizer adds. special_text: the special tokens that a template
    may name, {"bos_token": "<s>", ...}. args: the user's variables, which may replace those.
    """

    def __init__(self, texts: dict[str, str], is_builtin: bool = False, special_text: dict[str, str] | None = None,
                 args: dict | None = None):
        args = args or {}
        if not isinstance(args, dict) or not all(isinstance(name, str) for name in args):
            raise ValueError(f"template arguments are an object of names and values, not {args!r}")
        if taken := {"messages", "add_generation_prompt", "strftime_now"} & set(args):
            raise ValueError(f"template argument {min(taken)!r} is not free: every chat has its own")
        self.texts, self.is_builtin, self._args = texts, is_builtin, args
        self._variables = {"tools": None, "documents": None, **(special_text or {}), **args}
        self.uses_date = any("strftime_now" in text for text in texts.values())
        self.end_of_turn = [token for token in END_OF_TURN if any(token in text for text in texts.values())]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([self.texts, self._args], sort_keys=True).encode()).hexdigest()

    def render(self, messages: Messages, add_generation_prompt: bool = True, *, tools: list[dict] | None = None,
               date: datetime.datetime | None = None) -> str:
        """date: what strftime_now tells; None means now. Raises ValueError."""
        template = self.texts.get("default")
        if tools is not None:
            template = self.texts.get("tool_use", template)
        if template is None:
            names = "|".join([*self.texts, *BUILTIN_TEMPLATES])
            raise ValueError(f"this checkpoint has no chat template: use --raw, or --chat-template {names}")
        if not messages:
            raise ValueError("a chat needs at least one message")

        def strftime_now(pattern: str) -> str:
            return (date or datetime.datetime.now()).strftime(pattern)

        variables = self._variables if tools is None else self._variables | {"tools": tools}
        messages = [without_nulls(message) for message in messages]
        try:
            return compiled(template).render(messages=messages, add_generation_prompt=add_generation_prompt,
                                             strftime_now=strftime_now, **variables)
        except Exception as error:  # a stranger's program may fail in any way
            reason = " ".join(str(error).split())
            raise ValueError(f"the chat template cannot render these messages: {reason}") from error


def without_nulls(message: dict) -> dict:
    """Without keys whose value is null, which templates would write as "None"; reasoning under its usual name too."""
    message = {key: value for key, value in message.items() if value is not None}
    for name in ("thinking", "reasoning"):
        if name in message:
            message.setdefault("reasoning_content", message[name])
    return message


@functools.lru_cache
def compiled(template: str) -> "jinja2.Template":
    """Templates come from strangers: they run in jinja's sandbox. They may use what transformers gives them."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        # jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    class Generation(jinja2.ext.Extension):
        """{% generation %} ... {% endgeneration %} marks an assistant's words for training. The text stays the same."""

        tags = {"generation"}

        def parse(self, parser: "jinja2.parser.Parser") -> "list[jinja2.nodes.Node]":
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols", Generation])
    environment.globals["raise_exception"] = raise_exception
    environment.filters["tojson"] = tojson
    return environment.from_string(template)


# --- special tokens as plain text -------------------------------------------------------------------------------------
#
# A user who writes "<|im_end|>" must not end the turn. So before rendering, each special token in a message is replaced
# by a character that means nothing, its stand-in. Once the tokenizer has found the special tokens of the rendered text,
# it puts the words back for the stand-ins and encodes them as text.


def hide_special_tokens(messages: Messages, special_tokens: Iterable[str],
                        templates: ChatTemplates) -> tuple[Messages, dict[str, str]]:
    """(a copy of the messages with stand-ins, {stand-in: special token})"""
    strings: list[str] = []
    map_strings(messages, strings.append)
    said, used = "\n".join(strings), "".join([*strings, *templates.texts.values()])
    unused = (chr(i) for i in range(0xF0000, 0xFFFFE) if chr(i) not in used)  # of Unicode's private use area
    # Longest first, as one token may begin another.
    stand_ins = dict(zip(unused, sorted((token for token in special_tokens if token in said), key=len, reverse=True)))

    def hide(text: str) -> str:
        for character, token in stand_ins.items():
            text = text.replace(token, character)
        return text

    return map_strings(messages, hide), stand_ins


def map_strings(value: Any, change: Callable[[str], object]) -> Any:
    """A copy of messages in which each string but the roles is changed: content, reasoning, tool calls."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: inner if key == "role" else map_strings(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [map_strings(inner, change) for inner in value]
    return value


def reveal(text: str, stand_ins: dict[str, str]) -> str:
    """The text with what the stand-ins stand for."""
    return text.translate(str.maketrans(stand_ins))
