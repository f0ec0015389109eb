"""Text in and out: prompts as tokens, texts that end an answer, streaming, and conversations.

    stop = StopTexts(tokenizer, ["Question:"])
    printer = Printer(stop, [prompt])
    generate(model, [prompt], 100, stop=stop, on_tokens=printer)
    printer.close()
"""
import argparse
import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from console import check_writable, say, write_atomically
from decoder import Decoder, Generation, check_prompts
from tokenizer import StreamDecoder, Tokenizer, common_prefix


def encode(text: str, tokenizer: Tokenizer, raw: bool, system: str | None = None,
           plain_text: bool = False) -> list[int]:
    """A prompt as token ids: the text itself if `raw`, else in the chat template, after a system message if given."""
    if raw:
        return tokenizer.encode(text, bos=tokenizer.adds_bos)
    return tokenizer.apply_chat_template([*opening(system), {"role": "user", "content": text}], plain_text=plain_text)


def opening(system: str | None) -> list[dict]:
    """The messages that begin a chat."""
    return [] if system is None else [{"role": "system", "content": system}]


class StopTexts:
    """Texts that end an answer. Decoding ends with the token that completes one; the text is cut before the first one.

        stop = StopTexts(tokenizer, ["Question:"])
        ids = generate(model, [prompt], 100, stop=stop).tokens[0]       # the last token completed "Question:"
        text = stop.decode(ids, prompt)                                 # without "Question:" and what follows it

    A special token may be named by its text. goes_on: the answer continues the prompt's text, so its first word keeps
    its space. Raises ValueError for an empty text.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Iterable[str] = (), goes_on: bool = False):
        self.tokenizer, self.texts, self.goes_on = tokenizer, list(texts), goes_on
        if "" in self.texts:
            raise ValueError("a stop text is empty")
        self.longest = max(map(len, self.texts), default=0)
        named = [ids[0] for ids in map(tokenizer.encode, self.texts) if len(ids) == 1]
        self.ids = tokenizer.special_ids.intersection(named)     # found by id: decoding leaves special tokens out

    def __call__(self, prompt: list[int]) -> Callable[[int], bool]:
        """The Stop of `generate`."""
        stream, tail = self.stream(prompt), ""

        def ends(token: int) -> bool:
            nonlocal tail
            if not self.texts:
                return False
            tail += stream.push([token])
            text = tail + stream.peek()
            tail = tail[max(0, len(tail) - self.longest + 1):]     # may hold the beginning of a stop text
            return token in self.ids or any(stop in text for stop in self.texts)
        return ends

    def stream(self, prompt: list[int]) -> StreamDecoder:
        return self.tokenizer.stream(after=prompt if self.goes_on else ())

    def decode(self, ids: list[int], prompt: list[int]) -> str:
        """The text of an answer to this prompt."""
        return self.cut(self.tokenizer.decode(ids, after=prompt if self.goes_on else ()))

    def cut(self, text: str) -> str:
        """The text before the first stop text."""
        return text[:min((text.find(stop) for stop in self.texts if stop in text), default=len(text))]

    def n_certain(self, text: str) -> int:
        """Number of characters before the place where a stop text begins, or may begin with what is still to come."""
        return next((n for n in range(len(text))
                     if any(text.startswith(stop, n) or stop.startswith(text[n:]) for stop in self.texts)), len(text))


class Printer:
    """Prints one answer as it is generated. Several answers are printed one after the other when all are complete.

    Text that may be the beginning of a stop text is held back until that is known. With `color_of`, a decoder, text
    from the head's drafts is green, from copied ones cyan, and the target's own tokens are plain.
    """

    def __init__(self, stop: StopTexts, prompts: list[list[int]], color_of: Decoder | None = None):
        self.stop, self.color_of = stop, color_of
        self.streams = [stop.stream(prompt) for prompt in prompts]
        self.held = [""] * len(prompts)
        self.texts = [""] * len(prompts)

    def __call__(self, row: int, ids: list[int], n_draft: int) -> None:
        drafted = self._certain(row, ids[:n_draft])
        if drafted and self.color_of is not None:
            drafted = f"\033[{36 if self.color_of.n_copied[row] else 32}m{drafted}\033[0m"
        self._put(row, drafted)
        self._put(row, self._certain(row, ids[n_draft:]))

    def close(self) -> None:
        for row, stream in enumerate(self.streams):
            self._put(row, self.stop.cut(self.held[row] + stream.flush()))
        if len(self.texts) == 1:
            print(flush=True)
        else:
            for row, text in enumerate(self.texts):
                print(f"[{row + 1}] {text}", flush=True)

    def _certain(self, row: int, ids: list[int]) -> str:
        text = self.held[row] + self.streams[row].push(ids)
        n = self.stop.n_certain(text)
        self.held[row] = text[n:]
        return text[:n]

    def _put(self, row: int, text: str) -> None:
        self.texts[row] += text
        if len(self.texts) == 1:
            print(text, end="", flush=True)


class Conversation:
    """The messages of a chat, and which of their tokens are in the decoder's cache: only new ones are prefilled.

    keys_serve: see rope.py. A prompt that passes the length up to which they do is prefilled whole.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer, n_slot: int, vocab_size: int,
                 keys_serve: Callable[[int], bool] = lambda length: True):
        self.args, self.tokenizer, self.n_slot, self.vocab_size = args, tokenizer, n_slot, vocab_size
        self.keys_serve = keys_serve
        self.system: str | None = args.system
        self.messages = opening(self.system)
        self.dropped: list[dict] = []       # the turns that the context had no room for, oldest first
        self.saves: set[Path] = set()       # files that are ours to write over
        self.cached: list[int] = []
        self.seed = args.seed               # for the first answer; the next ones use the generator as it is then
        self.stop = StopTexts(tokenizer, args.stop)

    def restart(self, system: str | None) -> None:
        """Forget what was said, and begin with this system message. What the cache holds of its tokens is not computed
        again. Raises ValueError, and forgets nothing, for a message that the template refuses or that is too long.
        """
        messages = opening(system)
        check_prompts([self._render(messages, "Hi")[1]], self.n_slot, self.vocab_size)
        self.system, self.messages, self.dropped = system, messages, []

    def save(self, file: Path) -> int:
        """Write all messages as JSON, the dropped ones too: [{"role": "user", "content": "Hi"}, ...]. Returns how many.

        Raises ValueError or OSError if that cannot be done, and for a file that is there and was not written by this
        conversation.
        """
        check_writable("file", file)
        if os.path.lexists(file) and file.absolute() not in self.saves:
            raise ValueError(f"{file} is there already, and is left as it is: name a new file")
        first = opening(self.system)
        messages = [*first, *self.dropped, *self.messages[len(first):]]
        write_atomically(file, json.dumps(messages, ensure_ascii=False, indent=1) + "\n")
        self.saves.add(file.absolute())
        return len(messages)

    def render(self, text: str) -> tuple[list[dict], list[int]]:
        """The messages and this new one, and their ids. As many of the oldest turns, a question and its answer each,
        are left out as it takes to leave room for an answer: max_new_tokens, or a quarter of the context.

        Raises ValueError for a message that the template refuses, that is too long, or whose tokens the model lacks.
        """
        first = opening(self.system)
        turns, room = self.messages[len(first):], min(self.args.max_new_tokens, self.n_slot // 4)
        messages, prompt = self._render(self.messages, text)
        while turns and len(prompt) + room > self.n_slot:
            turns = turns[2:]
            messages, prompt = self._render([*first, *turns], text)
        check_prompts([prompt], self.n_slot, self.vocab_size)
        return messages, prompt

    def _render(self, messages: list[dict], text: str) -> tuple[list[dict], list[int]]:
        messages = [*messages, {"role": "user", "content": text}]
        return messages, self.tokenizer.apply_chat_template(messages, plain_text=self.args.plain_text)

    def answer(self, decoder: Decoder, text: str) -> str:
        """Print the answer to a message. Returns a line about it, see `figures`, or "" if the message is left out."""
        try:
            messages, prompt = self.render(text)
        except ValueError as error:
            say(f"That message is left out: {error}")
            return ""
        n_dropped, n_turn = (len(self.messages) + 1 - len(messages)) // 2, len(self.messages) // 2
        if n_dropped:
            say(f"The conversation has outgrown its {self.n_slot} tokens: the oldest {n_dropped} of its {n_turn} turns "
                f"{'is' if n_dropped == 1 else 'are'} dropped.")
        n_cached = common_prefix(prompt[:-1], self.cached)
        if not self.keys_serve(max(len(prompt), len(self.cached))):
            n_cached = 0
        printer = Printer(self.stop, [prompt], decoder if self.args.color else None)
        self.cached, new_ids, result = prompt[:n_cached], [], None

        def on_tokens(row: int, ids: list[int], n_draft: int) -> None:
            new_ids.extend(ids)
            printer(row, ids, n_draft)

        with contextlib.suppress(KeyboardInterrupt):    # what was said so far stays part of the conversation
            result = decoder.generate([prompt], self.args.max_new_tokens, seed=self.seed,
                                      stop_ids=self.tokenizer.stop_ids, stop=self.stop, on_tokens=on_tokens,
                                      n_cached=n_cached)
        if new_ids:  # else the prefill was interrupted, and only the old part of the cache is valid
            self.cached = prompt + new_ids[:-1]  # the last token was produced but never was an input
            self.seed = None
        n_first = len(opening(self.system))
        self.dropped = self.dropped + self.messages[n_first:n_first + 2 * n_dropped]
        self.messages = [*messages, {"role": "assistant", "content": self.stop.decode(new_ids, prompt)}]
        printer.close()
        return self.figures(len(new_ids), len(prompt) + len(new_ids), result, decoder.eagle is not None)

    def figures(self, n_new: int, n_used: int, result: Generation | None, drafts: bool) -> str:
        """A line about an answer of n_new tokens, with which n_used slots of the context are taken:

        [N tokens, N tokens/s, N a pass, context N of N_SLOT]

        See Generation for the rates. Without a result the answer was stopped by Ctrl-C, and nothing timed it.
        """
        parts = [f"{n_new} token{'' if n_new == 1 else 's'}"]
        if result is None:
            parts.append("stopped")
        elif result.finish_reason == ["length"]:
            parts.append(f"cut off by {'the context' if n_used == self.n_slot else '--max-new-tokens'}")
        if result is not None and result.target_passes:
            parts.append(f"{result.tokens_per_second:.1f} tokens/s")
            if drafts:
                parts.append(f"{result.mean_accept_length:.2f} a pass")
        return f"[{', '.join(parts)}, context {n_used} of {self.n_slot}]"
