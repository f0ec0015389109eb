"""What a head learns from: dialogues as token ids with a mask of what the assistant says, and the target's features.

Data are JSON lines of dialogues, `messages` or ShareGPT's `conversations`. The mask comes from the chat template by
construction: what rendering a dialogue with an answer adds to rendering it without, never from offsets in a string.

Shapes: B dialogues, T tokens.
"""
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

from console import say, write_atomically
from model import Transformer, read_json
from tokenizer import Tokenizer


class Dialogue(NamedTuple):
    line: int           # in the data file, from 1
    tokens: Tensor      # [T] int32
    learnt: Tensor      # [T] bool: tokens that the assistant says, the one that ends its turn among them


def read_dialogues(file: Path, tokenizer: Tokenizer, vocab_size: int, max_length: int,
                   log: Callable[[str], None] = say) -> list[Dialogue]:
    """Tokenised dialogues of a JSON-lines file, the bad ones counted, reported in one line and left out.

    Raises ValueError when none is left, or when the tokenizer cannot be the target's.
    """
    dialogues, bad, n_cut = [], Counter(), 0
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line, text in enumerate(tqdm(lines, desc="tokenising", unit=" dialogues", disable=None), start=1):
            if not text.strip():
                continue
            try:
                entry = json.loads(text)
                messages = messages_of(entry)
            except (ValueError, KeyError, TypeError, AttributeError):
                bad["broken lines"] += 1
                continue
            if not any(message["role"] == "assistant" for message in messages):
                bad["without an assistant turn"] += 1
                continue
            try:
                tokens, learnt = encode_dialogue(tokenizer, messages, entry.get("finish_reason") == "length")
            except ValueError:
                bad["refused by the chat template"] += 1
                continue
            if max(tokens) >= vocab_size:
                raise ValueError(f"{file}, line {line}: token {max(tokens)}, but the target's vocabulary has {vocab_size}: "
                                 "this tokenizer is not the target's")
            n_cut += len(tokens) > max_length
            if not any(learnt[2:max_length]):
                bad["with no answer within the length"] += 1
                continue
            dialogues.append(Dialogue(line, torch.tensor(tokens[:max_length], dtype=torch.int32),
                                      torch.tensor(learnt[:max_length])))
    left_out = ", ".join(f"{n} {what}" for what, n in bad.items())
    if not dialogues:
        raise ValueError(f"{file} holds no dialogue to learn from" + (f": {left_out}" if bad else ""))
    log(f"{file}: {len(dialogues)} dialogues, {sum(len(d.tokens) for d in dialogues)} tokens, "
        f"{sum(int(d.learnt.sum()) for d in dialogues)} of them learnt"
        + (f"; left out: {left_out}" if bad else "") + (f"; {n_cut} cut at {max_length} tokens" if n_cut else ""))
    return dialogues


def messages_of(entry: dict) -> list[dict[str, str]]:
    """{"role", "content"} messages of either format."""
    if "messages" in entry:
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in entry["messages"]]
    else:
        roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in entry["conversations"]]
    if not all(isinstance(message["content"], str) for message in messages):
        raise TypeError("a turn is not text")
    return messages


def encode_dialogue(tokenizer: Tokenizer, messages: list[dict[str, str]], cut: bool) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them the assistant says: those that rendering the dialogue with an answer adds to
    rendering it without, up to the token that ends the turn. `cut` tells that the last answer was not ended."""
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    tokens = tokenizer.apply_chat_template(messages[:last + 1], add_generation_prompt=False)
    learnt = [False] * len(tokens)
    for n, message in enumerate(messages[:last + 1]):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:n])
        after = tokenizer.apply_chat_template(messages[:n + 1], add_generation_prompt=False)
        begin = common_prefix(before, after)    # the last token of `before` may have grown together with the answer
        if common_prefix(after, tokens) < len(after) - 1:
            raise ValueError("the template changes what was said before")
        end = next((i + 1 for i in range(begin, len(after)) if after[i] in tokenizer.stop_ids), len(after))
        if cut and n == last and end > begin and after[end - 1] in tokenizer.stop_ids:
            end -= 1
        learnt[begin:end] = [True] * len(learnt[begin:end])
    return tokens, learnt


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


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
