"""What a head learns from: dialogues as token ids with a mask of what the assistant says, and the target's features.

A data file is UTF-8, JSON lines or one JSON array. Each entry is a dialogue:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}       # ShareGPT

Both ways to write a turn do under "messages", "conversations" and "conversation"; the speakers' names are in SPEAKERS,
and a content may be a list of text parts. An entry may also hold "system" or "system_prompt" (the first message),
"tools" (a list, or JSON of one), "finish_reason" ("length": the last answer was cut) and "tokens" (for each assistant
turn the ids that the target generated, as scripts/generate_data.py keeps them: those very ids are then learnt). Other
keys of a turn, such as "reasoning_content" and "tool_calls", go to the chat template. What cannot be learnt is left
out and counted.

The mask comes from the chat template by construction: what rendering a dialogue with an answer adds to the prompt that
the target would get for it, never from a search in the text.

Shapes: B dialogues, T tokens.
"""
import contextlib
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from console import read_records, say, write_atomically
from checkpoint import read_json
from model import Transformer
from tokenizer import Tokenizer, common_prefix


class Dialogue(NamedTuple):
    line: int           # in the data file, from 1; several have the same where one line gives several examples
    tokens: Tensor      # [T] int32
    learnt: Tensor      # [T] bool: tokens that the assistant says, the one that ends its turn among them


class Chat(NamedTuple):
    """What a line of a data file says."""
    messages: list[dict]                # {"role", "content"}; other keys are for the chat template
    tools: list[dict] | None            # that the template is told of
    said: list[list[int] | None]        # for each message: the ids that the target generated, where the line has them
    is_cut: bool                        # the last answer met the length limit
    n_opening: int                      # answers before the first question, which are left off


class Unusable(ValueError):
    """Of a line that is left out: the name under which it is counted, and what is wrong with this one."""

    def __init__(self, name: str, why: str = ""):
        super().__init__(name, why)
        self.name, self.why = name, why


class LeftOut:
    """Counts what of a file is not used, by name, and remembers where that was seen first."""
    SHOWN = 3           # places of each name

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self.places: dict[str, list[str]] = {}

    def add(self, name: str, line: int, why: str = "") -> None:
        self.counts[name] += 1
        if self.counts[name] <= self.SHOWN:
            self.places.setdefault(name, []).append(f"line {line}" + (f": {why}" if why else ""))

    def add_broken(self, line: int, why: str) -> None:
        """For console.read_records."""
        is_text = not why.startswith(("not UTF-8", "half a character"))
        self.add("broken lines" if is_text else "not valid text", line, why)

    def __str__(self) -> str:
        more = {name: ", ..." if count > self.SHOWN else "" for name, count in self.counts.items()}
        return ", ".join(f"{count} {name} ({'; '.join(self.places[name])}{more[name]})" for name, count in self.counts.items())


def read_dialogues(file: Path, tokenizer: Tokenizer, vocab_size: int, max_length: int,
                   log: Callable[[str], None] = say) -> list[Dialogue]:
    """Tokenised dialogues of a data file, the bad ones counted, reported in one line and left out.

    A dialogue gives one example, or several where the chat template words earlier turns anew (`examples_of`). Raises
    ValueError when none is left, or when the tokenizer cannot be the target's.
    """
    dialogues, left_out, noted = [], LeftOut(), Counter()
    for line, entry in tqdm(read_records(file, left_out.add_broken), desc="tokenising", unit=" dialogues", disable=None):
        try:
            chat = chat_of(entry)
            examples = examples_of(tokenizer, without_foreign_ids(tokenizer, chat, noted), max_length)
        except Unusable as error:
            left_out.add(error.name, line, error.why)
            continue
        except ValueError as error:
            left_out.add("refused by the chat template", line, str(error))
            continue
        for tokens, _ in examples:
            if max(tokens) >= vocab_size:
                raise ValueError(f"{file}, line {line}: token {max(tokens)}, but the target's vocabulary has {vocab_size}: "
                                 "this tokenizer is not the target's")
        noted[f"cut at {max_length} tokens"] += sum(len(tokens) > max_length for tokens, _ in examples)
        examples = [(tokens, learnt) for tokens, learnt in examples if any(learnt[2:max_length])]
        if not examples:
            left_out.add("with no answer within the length", line)
            continue
        noted["answers before the first question left off"] += chat.n_opening
        noted["empty answers not learnt"] += sum(is_empty(message) for message in chat.messages)
        dialogues += [Dialogue(line, torch.tensor(tokens[:max_length], dtype=torch.int32), torch.tensor(learnt[:max_length]))
                      for tokens, learnt in examples]
    if not dialogues:
        raise ValueError(f"{file} holds no dialogue to learn from" + (f": {left_out}" if left_out.counts else ""))
    n_line = len({dialogue.line for dialogue in dialogues})
    log(f"{file}: {n_line} dialogues" + (f" ({len(dialogues)} examples)" if len(dialogues) > n_line else "")
        + f", {sum(len(d.tokens) for d in dialogues)} tokens, {sum(int(d.learnt.sum()) for d in dialogues)} of them learnt"
        + (f"; left out: {left_out}" if left_out.counts else "") + "".join(f"; {n} {what}" for what, n in noted.items() if n))
    return dialogues


def holds_records(file: Path) -> bool:
    """Whether a file holds JSON, lines or an array, rather than lines of text: by its name, else by how it begins."""
    with open(file, "rb") as content:
        begin = next((line for line in content if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")
        begin = begin.removeprefix(b"\xef\xbb\xbf")
        if begin and file.suffix in (".jsonl", ".ndjson", ".json"):
            return True
        with contextlib.suppress(ValueError, RecursionError):
            whole = begin + content.read() if begin.lstrip().startswith(b"[") else begin
            return isinstance(json.loads(whole), dict | list)
    return False


# What a line says


SPEAKERS = {role: role for role in ("user", "assistant", "system", "developer", "tool")}
SPEAKERS |= dict.fromkeys(("human", "prompter"), "user")
SPEAKERS |= dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "claude", "gemini", "model", "bot", "ai"), "assistant")
# What an answer may hold too, and under which keys
BESIDE_TEXT = {"reasoning": ("reasoning_content", "reasoning", "thinking"), "tool calls": ("tool_calls", "function_call")}


def chat_of(entry: object) -> Chat:
    """The dialogue of a line, in any of the formats above. Raises Unusable."""
    lists = [entry.get(key) for key in ("messages", "conversations", "conversation")] if isinstance(entry, dict) else []
    turns = next((turns for turns in lists if isinstance(turns, list)), None)
    if turns is None:
        raise Unusable("broken lines", 'no list of "messages" or "conversations"')
    messages = [message_of(turn) for turn in turns]
    said = ids_of(entry.get("tokens"), messages)
    system = entry.get("system") or entry.get("system_prompt")
    if system and not isinstance(system, str):
        raise Unusable("broken lines", "a system message that is not text")
    if system and messages[:1] != [{"role": "system", "content": system}]:
        messages, said = [{"role": "system", "content": system}, *messages], [None, *said]
    n_system = next((n for n, message in enumerate(messages) if message["role"] not in ("system", "developer")), len(messages))
    begin = next((n for n in range(n_system, len(messages)) if messages[n]["role"] != "assistant"), len(messages))
    return Chat(messages[:n_system] + messages[begin:], tools_of(entry.get("tools")), said[:n_system] + said[begin:],
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
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        raise Unusable("with parts that are not text", str(part.get("type")) if isinstance(part, dict) else "")
    return text


def tools_of(tools: object) -> list[dict] | None:
    """Some files keep them as a text that is JSON."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise Unusable("with tools that are not JSON", str(error)) from None
    if tools and not isinstance(tools, list):
        raise Unusable("with tools that are not a list")
    return tools or None


def ids_of(tokens: object, messages: list[dict]) -> list[list[int] | None]:
    """For each message the ids that its line keeps under "tokens", a list for each answer; None where there are none."""
    answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    said: list[list[int] | None] = [None] * len(messages)
    is_ours = isinstance(tokens, list) and len(tokens) == len(answers) and all(
        isinstance(ids, list) and ids and all(isinstance(i, int) for i in ids) for ids in tokens)
    for n, ids in zip(answers, tokens if is_ours else ()):
        said[n] = ids
    return said


def without_foreign_ids(tokenizer: Tokenizer, chat: Chat, noted: Counter) -> Chat:
    """Ids that do not say the answer's text are another tokenizer's, or the text has been edited: then the text counts."""
    said = [ids if ids and answer_text(tokenizer, ids) == message["content"].strip() else None
            for message, ids in zip(chat.messages, chat.said)]
    noted["answers encoded anew: their ids do not say their text"] += sum(a != b for a, b in zip(said, chat.said))
    return chat._replace(said=said)


def answer_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """What generated ids say. Half a character at the length limit is left off."""
    text = tokenizer.decode(ids)
    return (text if ids[-1] in tokenizer.stop_ids else text.rstrip("\ufffd")).strip()


def is_empty(message: dict) -> bool:
    """Whether this is an answer that says nothing."""
    return message["role"] == "assistant" and not message["content"].strip() and not has_more(message)


def has_more(message: dict) -> bool:
    """Whether it says something beside its text."""
    return any(key in message for keys in BESIDE_TEXT.values() for key in keys)


# What of it is learnt


def examples_of(tokenizer: Tokenizer, chat: Chat, max_length: int) -> list[tuple[list[int], list[bool]]]:
    """Token ids, and which of them the assistant says; answers that begin beyond max_length are left off.

    Each answer is learnt behind the prompt that the target would get for it. Where that prompt prolongs the example
    before, the two are one, so that most templates give one example a dialogue; a template that words earlier turns
    anew, as those of reasoning models do, gives one for each answer. Raises Unusable, or ValueError for what the
    template refuses.
    """
    answers = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if not answers:
        raise Unusable("without an assistant turn")
    chat = chat._replace(is_cut=chat.is_cut and not is_empty(chat.messages[answers[-1]]))
    answers = [n for n in answers if not is_empty(chat.messages[n])]
    if not answers:
        raise Unusable("with empty answers only")
    examples = encode_answers(tokenizer, chat, answers, max_length, piecewise=len(answers) > 1)
    if examples is None:
        examples = encode_answers(tokenizer, chat, answers, max_length, piecewise=False)
    joined: list[tuple[list[int], list[bool]]] = []
    for tokens, learnt in examples:
        before, learnt_before = joined[-1] if joined else ([], [])
        if joined and tokens[:len(before)] == before:
            joined[-1] = tokens, learnt_before + learnt[len(before):]
        else:
            joined.append((tokens, learnt))
    return joined


def encode_answers(tokenizer: Tokenizer, chat: Chat, answers: list[int], max_length: int,
                   piecewise: bool) -> list[tuple[list[int], list[bool]]] | None:
    """One example for each of the answers, given by their numbers among the messages.

    `piecewise` encodes only what each turn adds, which takes time in proportion to the dialogue's length instead of its
    square. That is right if the pieces are, together, what the whole is: None where they are not.
    """
    examples, text, known = [], "", []      # known: the ids of text, the rendering up to the end of an answer
    prompt = before = None

    def encode(longer: str) -> list[int]:
        return known + tokenizer.encode(longer[len(text):]) if text else tokenizer.encode_chat(longer)

    for n in answers:
        before = tokenizer.render_chat(chat.messages[:n], tools=chat.tools)
        after = tokenizer.render_chat(chat.messages[:n + 1], add_generation_prompt=False, tools=chat.tools)
        check_is_heard(tokenizer, chat, n, before, after)
        if not before.startswith(text):
            return None
        prompt = encode(before)
        if len(prompt) >= max_length:
            break
        is_cut = chat.is_cut and n == answers[-1]
        examples.append(encode_answer(tokenizer, chat.messages[n], chat.said[n], prompt, before, after, encode, is_cut))
        if piecewise:
            text, known = after, encode(after)
    if text and prompt != tokenizer.encode_chat(before):
        return None
    return examples


def encode_answer(tokenizer: Tokenizer, message: dict, said: list[int] | None, prompt: list[int], before: str, after: str,
                  encode: Callable[[str], list[int]], is_cut: bool) -> tuple[list[int], list[bool]]:
    """One example: the prompt, whose text is `before`, and what the target says to it; `after` is the rendering with it.

    What it says are its own ids where they are known. Else they are what the template makes of the message, up to the
    token that ends the turn; or the mere text, where the template does not put the answer behind the prompt (which may
    open a reasoning block) or has closed the reasoning of an answer that was cut inside.
    """
    if said is not None:
        return prompt + said, [False] * len(prompt) + [True] * len(said)
    text, more = message["content"], has_more(message)
    added = after[len(before):] if after.startswith(before) else ""
    if is_cut and not more:
        text = text.rstrip("\ufffd")        # half a character
        rest = added.lstrip()
        space = added[:len(added) - len(rest)]
        is_there = rest.startswith(text.lstrip())
        whole = encode(before + space + text.lstrip()) if is_there else prompt + tokenizer.encode(text)
        begin, end = common_prefix(prompt, whole), len(whole)
    else:
        whole = encode(after) if added else tokenizer.encode_chat(after)
        begin = common_prefix(prompt, whole)    # the last token of the prompt may have grown together with the answer
        end = next((i + 1 for i in range(begin, len(whole)) if whole[i] in tokenizer.stop_ids), len(whole))
        ended = whole[end - 1] in tokenizer.stop_ids
        if not added and more or is_cut and not text.strip():
            raise Unusable("with reasoning or tool calls that cannot be told from the template's own words")
        if not added:
            whole = prompt + tokenizer.encode(text) + whole[end - ended:end]
            begin, end = len(prompt), len(whole)
        if is_cut:
            end -= ended
    return whole[:end], [False] * begin + [True] * (end - begin)


def check_is_heard(tokenizer: Tokenizer, chat: Chat, n: int, before: str, after: str) -> None:
    """Raises Unusable where the template leaves out the tools, or what stands beside the text of answer n: then it is not
    what the target would be told, or would say. `before` and `after` are the renderings without and with the answer."""
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
    """The tokens that the assistant says most, and those that end its turn."""
    counts = Counter()
    for dialogue in dialogues:
        counts.update(dialogue.tokens[dialogue.learnt].tolist())
    return list(dict.fromkeys([*sorted(stop_ids), *(i for i, _ in counts.most_common())]))[:n]


def make_batches(lengths: list[int], n_token: int, rng: random.Random, n_part: int = 1) -> list[list[int]]:
    """Indices in batches of like length, in random order. Each of the n_part parts that a batch is dealt out in has at
    most n_token tokens, padding included."""
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


class Batch(NamedTuple):
    tokens: Tensor      # [B, T] int64, padded on the right
    features: Tensor    # [B, T, dim] of the target
    learnt: Tensor      # [B, T] bool


class Features:
    """The frozen target's features of dialogues, computed when asked for, or kept in safetensors shards on disk."""
    SHARD = 256         # dialogues

    def __init__(self, model: Transformer, dialogues: list[Dialogue], folder: Path | None, n_token: int,
                 origin: dict[str, str] = {}, alive: Callable[[], None] = lambda: None):
        """folder   where features are kept: what is missing there is computed now, n_token tokens at a time
        origin   what the features come from beside the tokens and the dtype: they are taken from the folder for this only
        alive    is called after each pass of the target
        """
        self.model, self.dialogues, self.folder = model, dialogues, folder
        self.device = model.inv_freq.device
        self.shards: dict[int, safe_open] = {}
        order = sorted(range(len(dialogues)), key=lambda i: len(dialogues[i].tokens))
        self.shard_of = {i: place // self.SHARD for place, i in enumerate(order)}
        if folder is not None:
            self._stamp(origin)
            self._fill(order, n_token, alive)

    def batch(self, indices: list[int]) -> Batch:
        tokens = self._padded([self.dialogues[i].tokens.long() for i in indices])
        learnt = self._padded([self.dialogues[i].learnt for i in indices])
        if self.folder is None:
            return Batch(tokens, self._compute(tokens), learnt)
        kept = [self._shard(self.shard_of[i]).get_tensor(str(i)) for i in indices]
        return Batch(tokens, self._padded(kept), learnt)

    def _padded(self, rows: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)

    def _compute(self, tokens: Tensor) -> Tensor:
        """[B, T] -> [B, T, dim]"""
        with torch.inference_mode():
            features = self.model.features(tokens, torch.arange(tokens.shape[1], device=self.device))
        return features.clone()     # outside, so that a backward pass may keep it

    def _shard(self, n: int) -> "safe_open":
        if n not in self.shards:
            self.shards[n] = safe_open(self.folder / f"{n:05}.safetensors", framework="pt")
        return self.shards[n]

    def _stamp(self, origin: dict[str, str]) -> None:
        """Write down what the features come from, or compare it with what is written there."""
        dtype = str(self.model.norm.weight.dtype).removeprefix("torch.")
        stamp = {**origin, "dtype": dtype, "tokens": tokens_digest(self.dialogues)}
        check_same(features_origin(self.folder), stamp, FEATURES_DIFFER, self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "features.json").exists():
            write_atomically(self.folder / "features.json", json.dumps(stamp, indent=1) + "\n")

    def _fill(self, order: list[int], n_token: int, alive: Callable[[], None]) -> None:
        """Write the shards that are not there yet."""
        total, config = sum(len(d.tokens) for d in self.dialogues), self.model.config
        size = total * config.dim * self.model.norm.weight.element_size() / 1e9
        say(f"features: {total} tokens, {size:.2f} GB in {self.folder}")
        with tqdm(total=total, desc="features", unit=" tokens", disable=None) as bar:
            for n, begin in enumerate(range(0, len(order), self.SHARD)):
                shard, part = order[begin:begin + self.SHARD], self.folder / f"{n:05}.part"
                if not (self.folder / f"{n:05}.safetensors").exists():
                    kept, lengths = {}, [len(self.dialogues[i].tokens) for i in shard]
                    for batch in make_batches(lengths, n_token, random.Random(0)):
                        kept |= self._rows([shard[j] for j in batch])
                        alive()
                    save_file(kept, part)
                    part.replace(part.with_suffix(".safetensors"))
                bar.update(sum(len(self.dialogues[i].tokens) for i in shard))

    def _rows(self, indices: list[int]) -> dict[str, Tensor]:
        """The features of each dialogue by its number, [T, dim] on the CPU. Raises ValueError for NaN and infinity."""
        rows = self._compute(self._padded([self.dialogues[i].tokens.long() for i in indices])).cpu()
        kept = {str(i): row[:len(self.dialogues[i].tokens)].clone() for i, row in zip(indices, rows)}
        for i in indices:
            if not kept[str(i)].isfinite().all():
                raise ValueError(f"the target's features of the dialogue in line {self.dialogues[i].line} are not finite")
        return kept


# What a cache or a resumed training comes from

FEATURES_DIFFER = {
    "target": "{where} holds the features of another target than {mine[checkpoint]}: weights, config.json or quantize.json "
              "are not those of {kept[checkpoint]}; give --cache-features another folder",
    "template": "{where} holds the features of dialogues in another chat template; give --cache-features another folder",
    "date": "{where} holds the features of dialogues whose chat template was told {was!r} for the date, now it is {now!r}; "
            "give --cache-features another folder",
    "dtype": "{where} holds features in {was}, not {now}: give that --dtype, or --cache-features another folder",
    "tokens": "{where} holds the features of other tokens: the data, --max-length or the tokenizer differ; "
              "give --cache-features another folder",
}


def features_origin(folder: Path) -> dict[str, str]:
    """What the features in a folder come from; empty where there are none."""
    file = folder / "features.json"
    return read_json(file) if file.exists() else {}


def check_same(kept: dict[str, str], mine: dict[str, str], words: dict[str, str], where: Path) -> None:
    """Raise ValueError, one line, for the first key of `mine` that has another value in `kept`, unless that is empty.

    words   what to say for a key, with {where}, {was}, {now}, {kept} and {mine} to fill in
    "checkpoint", what the user calls the target, is there to be named, not to be compared.
    """
    for key, now in mine.items() if kept else ():
        if key not in kept:
            raise ValueError(f"{where} does not say its {key}: an earlier version of this program wrote it")
        if kept[key] != now and key != "checkpoint":
            text = words.get(key, "{where}: {key} was {was}, now it is {now}")
            raise ValueError(text.format(where=where, key=key, was=kept[key], now=now, kept=kept, mine=mine))


def tokens_digest(dialogues: list[Dialogue], masks: bool = False) -> str:
    """sha256 of the token ids, and of which of them are learnt."""
    digest = hashlib.sha256()
    for dialogue in dialogues:
        digest.update(len(dialogue.tokens).to_bytes(8) + dialogue.tokens.numpy().tobytes())
        if masks:
            digest.update(dialogue.learnt.numpy().tobytes())
    return digest.hexdigest()


def target_stamp(folder: Path) -> str:
    """A digest of what makes a target: config.json, quantize.json where there is one, and its weight files, byte by byte.

    A merged LoRA keeps names and sizes, new rows for a few tokens keep nearly every byte, and a copy has other times:
    nothing less than the content tells targets apart. Files are read at 2 GB/s or so each, eight at a time.
    """
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    digest = hashlib.sha256()
    for file in (folder / "config.json", folder / "quantize.json"):
        if file.exists():
            digest.update(json.dumps(read_json(file), sort_keys=True).encode())
    with ThreadPoolExecutor(8) as pool:     # hashing releases the interpreter
        for file, content in zip(files, pool.map(file_digest, files)):
            digest.update(f"{file.name} {content}".encode())
    return digest.hexdigest()


def file_digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
