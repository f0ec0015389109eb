"""The dialogues of a training: token ids, a mask of what the assistant says, and batches of like length.

    dialogues = read_dialogues(Path("data.jsonl"), tokenizer, vocab_size=32000, max_length=2048)

A data file is UTF-8: JSON lines, or one JSON array. Each entry is a dialogue; docs/training.md tells its other keys.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}       # ShareGPT

The mask comes from rendering, not from a search in the text. A dialogue is rendered up to an answer, which gives the
prompt that the target would get, and then with the answer. What is added is the answer.

Shapes: T tokens of a dialogue.
"""
import contextlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from console import read_records, say
from tokenizer import Tokenizer, common_prefix


class Dialogue(NamedTuple):
    """An example to train on. A line of the data file gives one or, with some chat templates, several."""
    line: int           # of the data file, from 1
    tokens: Tensor      # [T] int32
    loss_mask: Tensor   # [T] bool: tokens that the assistant says, with the one that ends its turn


Example = tuple[list[int], list[bool]]      # tokens and loss_mask of such a dialogue, as lists


class Chat(NamedTuple):
    """An entry of a data file."""
    messages: list[dict]                # {"role", "content"}; other keys are for the chat template
    tools: list[dict] | None            # for the chat template
    tokens: object                      # what the entry has under "tokens"
    is_cut: bool                        # the last answer met the length limit
    n_opening: int                      # answers before the first question; not among the messages


class Unusable(ValueError):
    """An entry that is left out: the name under which it is counted and, if there is more to say, what is wrong."""


class LeftOut:
    """Entries of a file that are not used: by name, where they stand."""
    SHOWN = 3           # places of each name

    def __init__(self):
        self.places: defaultdict[str, list[str]] = defaultdict(list)

    def add(self, line: int, name: str, why: str = "") -> None:
        self.places[name].append(f"line {line}" + (f": {why}" if why else ""))

    def add_broken(self, line: int, why: str) -> None:
        """For console.read_records."""
        is_text = not why.startswith(("not UTF-8", "half a character"))
        self.add(line, "broken lines" if is_text else "not valid text", why)

    def __str__(self) -> str:
        more = {name: ", ..." if len(places) > self.SHOWN else "" for name, places in self.places.items()}
        return ", ".join(f"{len(places)} {name} ({'; '.join(places[:self.SHOWN])}{more[name]})"
                         for name, places in self.places.items())


def read_dialogues(file: Path, tokenizer: Tokenizer, vocab_size: int, max_length: int,
                   log: Callable[[str], None] = say) -> list[Dialogue]:
    """The dialogues of a data file as tokens, cut at max_length. What is left out is told to `log` in one line.

    Raises ValueError when no dialogue is left, or when the tokenizer is not the target's.
    """
    dialogues: list[Dialogue] = []
    left_out, notes = LeftOut(), Counter()
    records = read_records(file, left_out.add_broken)
    for line, entry in tqdm(records, desc="tokenising", unit=" dialogues", disable=None):
        try:
            chat = chat_of(entry)
            examples = examples_of(tokenizer, chat, max_length, generated_ids(tokenizer, chat, notes))
        except Unusable as error:
            left_out.add(line, *error.args)
            continue
        except ValueError as error:
            left_out.add(line, "refused by the chat template", str(error))
            continue
        if (largest := max((max(tokens) for tokens, _ in examples), default=0)) >= vocab_size:
            raise ValueError(f"{file}, line {line}: token {largest}, but the target's vocabulary has {vocab_size}: "
                             "this tokenizer is not the target's")
        notes[f"cut at {max_length} tokens"] += sum(len(tokens) > max_length for tokens, _ in examples)
        examples = [(tokens, loss_mask) for tokens, loss_mask in examples if any(loss_mask[2:max_length])]
        if not examples:
            left_out.add(line, "with no answer within the length")
            continue
        notes["answers before the first question left off"] += chat.n_opening
        notes["empty answers not learnt"] += sum(is_empty(message) for message in chat.messages)
        dialogues += [Dialogue(line, torch.tensor(tokens[:max_length], dtype=torch.int32),
                               torch.tensor(loss_mask[:max_length])) for tokens, loss_mask in examples]
    missing = f": {left_out}" if left_out.places else ""
    if not dialogues:
        raise ValueError(f"{file} holds no dialogue to learn from{missing}")
    n_line = len({dialogue.line for dialogue in dialogues})
    n_example = f" ({len(dialogues)} examples)" if len(dialogues) > n_line else ""
    n_token, n_learnt = sum(len(d.tokens) for d in dialogues), sum(int(d.loss_mask.sum()) for d in dialogues)
    log(f"{file}: {n_line} dialogues{n_example}, {n_token} tokens, {n_learnt} of them learnt"
        + (f"; left out{missing}" if missing else "") + "".join(f"; {n} {what}" for what, n in notes.items() if n))
    return dialogues


def holds_records(file: Path) -> bool:
    """Whether a file holds JSON lines or a JSON array, not lines of text. Its name tells, or how it begins."""
    text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").lstrip()
    if text and file.suffix in (".jsonl", ".ndjson", ".json"):
        return True
    with contextlib.suppress(ValueError, RecursionError):
        return isinstance(json.loads(text if text.startswith(b"[") else text.partition(b"\n")[0]), dict | list)
    return False


# An entry of the file as messages


SPEAKERS = {role: role for role in ("user", "assistant", "system", "developer", "tool")}
SPEAKERS |= dict.fromkeys(("human", "prompter"), "user")
SPEAKERS |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "claude", "gemini", "model", "bot", "ai"), "assistant")
# What an answer may hold beside its text, and under which keys
BESIDE_TEXT = {"reasoning": ("reasoning_content", "reasoning", "thinking"),
               "tool calls": ("tool_calls", "function_call")}


def chat_of(entry: object) -> Chat:
    """The dialogue of an entry in any of the formats above. Raises Unusable."""
    if not isinstance(entry, dict):
        entry = {}
    lists = (entry.get(key) for key in ("messages", "conversations", "conversation"))
    turns = next((turns for turns in lists if isinstance(turns, list)), None)
    if turns is None:
        raise Unusable("broken lines", 'no list of "messages" or "conversations"')
    messages = [message_of(turn) for turn in turns]
    system = entry.get("system") or entry.get("system_prompt")
    if system and not isinstance(system, str):
        raise Unusable("broken lines", "a system message that is not text")
    if system and messages[:1] != [{"role": "system", "content": system}]:
        messages.insert(0, {"role": "system", "content": system})
    roles = [message["role"] for message in messages]
    n_system = next((n for n, role in enumerate(roles) if role not in ("system", "developer")), len(roles))
    begin = next((n for n in range(n_system, len(roles)) if roles[n] != "assistant"), len(roles))
    return Chat(messages[:n_system] + messages[begin:], tools_of(entry.get("tools")), entry.get("tokens"),
                entry.get("finish_reason") == "length", begin - n_system)


def message_of(turn: object) -> dict:
    """{"role", "content", ...} of a turn with "role" and "content" or "from" and "value"."""
    if not isinstance(turn, dict):
        raise Unusable("broken lines", "a turn that is no JSON object")
    speaker = turn.get("role", turn.get("from"))
    role = SPEAKERS.get(str(speaker).lower())
    if role is None:
        raise Unusable("with an unknown speaker", repr(speaker))
    more = {key: value for key, value in turn.items()
            if key not in ("role", "from", "content", "value") and value not in (None, "", [], {})}
    content = turn.get("content", turn.get("value"))
    if content is None and has_more(more):
        content = ""
    if isinstance(content, list):
        content = "".join(map(text_of, content))
    if not isinstance(content, str):
        raise Unusable("broken lines", "a turn that is not text")
    return {"role": role, "content": content, **more}


def text_of(part: object) -> str:
    """The text of a part of a content: a string, or {"type": "text", "text": ...}."""
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        raise Unusable("with parts that are not text", str(part.get("type")) if isinstance(part, dict) else "")
    return text


def tools_of(tools: Any) -> list[dict] | None:
    """A list of tools, or the JSON text of one."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise Unusable("with tools that are not JSON", str(error)) from None
    if tools and not isinstance(tools, list):
        raise Unusable("with tools that are not a list")
    return tools or None


def generated_ids(tokenizer: Tokenizer, chat: Chat, notes: Counter) -> dict[int, list[int]]:
    """The ids that the target generated, by the places of their answers. The entry's "tokens" has a list an answer.

    Ids that do not decode to the answer's text are not taken: another tokenizer made them, or the text was edited.
    """
    answers = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
    lists = chat.tokens
    if not isinstance(lists, list) or len(lists) != chat.n_opening + len(answers) or not all(
            isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids) for ids in lists):
        return {}
    given = dict(zip(answers, lists[chat.n_opening:]))
    fitting = {n: ids for n, ids in given.items() if answer_text(tokenizer, ids) == chat.messages[n]["content"].strip()}
    notes["answers encoded anew: their ids do not say their text"] += len(given) - len(fitting)
    return fitting


def answer_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of generated ids. Half a character at the length limit is left off."""
    text = tokenizer.decode(ids)
    return (text if ids[-1] in tokenizer.stop_ids else text.rstrip("\ufffd")).strip()


def is_empty(message: dict) -> bool:
    """Whether this is an answer with nothing in it."""
    return message["role"] == "assistant" and not message["content"].strip() and not has_more(message)


def has_more(message: dict) -> bool:
    """Whether it holds something beside its text."""
    return any(key in message for keys in BESIDE_TEXT.values() for key in keys)


# Messages as tokens, with the mask


def examples_of(tokenizer: Tokenizer, chat: Chat, max_length: int,
                generated: dict[int, list[int]] | None = None) -> list[Example]:
    """The answers of a dialogue, each behind the prompt that the target would get for it.

    Where that prompt continues the example before, the two are joined. So most templates give one example a dialogue.
    A template that renders earlier turns differently, as those of reasoning models do, gives one for each answer.
    Answers that begin beyond max_length are left off. Raises Unusable, or ValueError for what the template refuses.
    """
    answers = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if not answers:
        raise Unusable("without an assistant turn")
    chat = chat._replace(is_cut=chat.is_cut and not is_empty(chat.messages[answers[-1]]))
    answers = [n for n in answers if not is_empty(chat.messages[n])]
    if not answers:
        raise Unusable("with empty answers only")
    joined: list[Example] = []
    for tokens, loss_mask in encode_answers(tokenizer, chat, answers, max_length, len(answers) > 1, generated or {}):
        before, mask_before = joined[-1] if joined else ([], [])
        if joined and tokens[:len(before)] == before:
            joined[-1] = tokens, mask_before + loss_mask[len(before):]
        else:
            joined.append((tokens, loss_mask))
    return joined


def encode_answers(tokenizer: Tokenizer, chat: Chat, answers: list[int], max_length: int, piecewise: bool,
                   generated: dict[int, list[int]]) -> list[Example]:
    """One example for each of the answers, given by their places among the messages.

    `piecewise` encodes only what each turn adds: the time then grows with the dialogue's length, not with its square.
    Where the pieces joined are not the tokens of the whole, everything is encoded anew.
    """
    examples: list[Example] = []
    text, known = "", []            # a rendering up to the end of an answer, and its ids
    before, prompt = "", []

    def encode(longer: str) -> list[int]:
        return known + tokenizer.encode(longer[len(text):]) if text else tokenizer.encode_chat(longer)

    for n in answers:
        before = tokenizer.render_chat(chat.messages[:n], tools=chat.tools)
        after = tokenizer.render_chat(chat.messages[:n + 1], add_generation_prompt=False, tools=chat.tools)
        check_nothing_is_lost(tokenizer, chat, n, before, after)
        if not before.startswith(text):
            return encode_answers(tokenizer, chat, answers, max_length, False, generated)
        prompt = encode(before)
        if len(prompt) >= max_length:
            break
        if n in generated:
            examples.append(masked(prompt + generated[n], len(prompt)))
        else:
            is_cut = chat.is_cut and n == answers[-1]
            examples.append(encode_answer(tokenizer, chat.messages[n], prompt, before, after, encode, is_cut))
        if piecewise:
            text, known = after, encode(after)
    if text and prompt != tokenizer.encode_chat(before):
        return encode_answers(tokenizer, chat, answers, max_length, False, generated)
    return examples


def encode_answer(tokenizer: Tokenizer, message: dict, prompt: list[int], before: str, after: str,
                  encode: Callable[[str], list[int]], is_cut: bool) -> Example:
    """One example: a prompt and its answer. `before` and `after` are the renderings without and with the answer.

    The answer is what the template makes of the message, up to the token that ends the turn. It is the message's bare
    text where the template does not put the answer behind the prompt (the prompt may open a reasoning block), or where
    the answer was cut inside its reasoning, which the template would close.
    """
    text, more = message["content"], has_more(message)
    added = after[len(before):] if after.startswith(before) else ""
    if is_cut and not more:
        text = text.rstrip("\ufffd")        # half a character
        rest = added.lstrip()
        space = added[:len(added) - len(rest)]
        is_there = rest.startswith(text.lstrip())
        whole = encode(before + space + text.lstrip()) if is_there else prompt + tokenizer.encode(text)
        return masked(whole, common_prefix(prompt, whole))
    whole = encode(after) if added else tokenizer.encode_chat(after)
    begin = common_prefix(prompt, whole)    # the prompt's last token may have merged with the answer's first
    end = next((i + 1 for i in range(begin, len(whole)) if whole[i] in tokenizer.stop_ids), len(whole))
    has_end = whole[end - 1] in tokenizer.stop_ids
    if not added and more or is_cut and not text.strip():
        raise Unusable("with reasoning or tool calls that cannot be told from the template's own words")
    if not added:
        whole = prompt + tokenizer.encode(text) + whole[end - has_end:end]
        begin, end = len(prompt), len(whole)
    return masked(whole[:end - (is_cut and has_end)], begin)


def masked(tokens: list[int], n_prompt: int) -> Example:
    return tokens, [False] * n_prompt + [True] * (len(tokens) - n_prompt)


def check_nothing_is_lost(tokenizer: Tokenizer, chat: Chat, n: int, before: str, after: str) -> None:
    """Raise Unusable where the template leaves out the tools, or what answer n has beside its text.

    The example would then differ from what the target is told or generates. `before` and `after` are the renderings
    without and with the answer.
    """
    def is_same(rendered: str, messages: list[dict], **options) -> bool:
        try:
            return tokenizer.render_chat(messages, **options) == rendered
        except ValueError:
            return False

    if chat.tools and is_same(before, chat.messages[:n]):
        raise Unusable("with tools that the chat template leaves out")
    for name, keys in BESIDE_TEXT.items():
        less = {key: value for key, value in chat.messages[n].items() if key not in keys}
        if less != chat.messages[n] and is_same(after, [*chat.messages[:n], less], add_generation_prompt=False,
                                                tools=chat.tools):
            raise Unusable(f"with {name} that the chat template leaves out")


def common_tokens(dialogues: list[Dialogue], stop_ids: frozenset[int], n: int) -> list[int]:
    """A draft vocabulary: the tokens that end a turn, then the commonest of the assistant's."""
    counts = Counter()
    for dialogue in dialogues:
        counts.update(dialogue.tokens[dialogue.loss_mask].tolist())
    return list(dict.fromkeys([*sorted(stop_ids), *(i for i, _ in counts.most_common())]))[:n]


def split(lines: list[int], n: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the examples held out, and of those to train on. lines[i] is the line that example i is from.

    n lines are held out, at most a tenth. Examples of one line share their history, so they stay together. The choice
    depends on the seed alone, so that runs can be compared.
    """
    order = sorted(set(lines))
    held = set(random.Random(seed).sample(order, len(order))[:min(n, len(order) // 10)])
    return [i for i, line in enumerate(lines) if line in held], [i for i, line in enumerate(lines) if line not in held]


def make_batches(lengths: list[int], n_token: int, rng: random.Random, n_part: int = 1) -> list[list[int]]:
    """Indices in batches of like length, in random order.

    A batch is dealt out in n_part parts; each has at most n_token tokens, padding included.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], rng.random()))
    batches, batch = [], []
    for i in order:
        if batch and -(-(len(batch) + 1) // n_part) * lengths[i] > n_token:
            batches.append(batch)
            batch = []
        batch.append(i)
    batches.append(batch)
    rng.shuffle(batches)
    return batches


def parts_of(indices: list[int], rank: int, world: int, accumulate: int) -> list[list[int]]:
    """One rank's share of a batch, in at most `accumulate` parts: as many on every rank, so some may be empty."""
    n = min(accumulate, -(-len(indices) // world))
    return [indices[rank::world][k::n] for k in range(n)]
