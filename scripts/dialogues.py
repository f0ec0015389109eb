"""The dialogues that scripts/generate_data.py has under way: what is asked, what comes next, what is kept.

    desk = Desk(args, tokenizer, job, max_length, told)
    for request in rows.run(desk.next):
        line, n_token = desk.take(request)

The target asks from the opening of its chat template (as in Magpie, arXiv 2406.08464). A system message about one of
many topics and an opening word or two keep it from asking the same things; the answer is then given without that system
message. A second question is asked from the opening of the next turn, after the answer.
"""
import argparse
import functools
import hashlib
import json
import random
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from console import read_records, read_text
from scripts.batching import Request
from scripts.figures import loop_begin
from tokenizer import Tokenizer
from train_data import Unusable, answer_text, chat_of

OPENINGS = """A|Act as|An|Analyze|Answer|Are|Arrange|As a|Assume|Brainstorm|Calculate|Can you|Can you explain|Classify|
Come up with|Compare|Compose|Complete|Consider|Construct|Convert|Could you|Create|Debug|Define|Describe|Design|
Determine|Develop|Did|Discuss|Do|Does|Draft|Edit|Evaluate|Explain|Extract|Find|For|From|Generate|Give|Give me|Given|
Help me|Hey|Hi,|How|How can|How do|How does|How many|How would|I|I am|I have|I need|I want|I'm|Identify|If|Imagine|
Implement|In|In the|Is|Let|List|Look at|Make|Make a list|My|Name|On|Outline|Please|Play the role|Predict|Pretend|Prove|
Provide|Rank|Read|Recommend|Rewrite|Say|Should|Show|Simplify|Solve|Some|Suggest|Summarize|Suppose|Take|Tell me|The|
The following|There are|Think of|Translate|Two|Use|Using|We|What|What are|What does|What if|What is|What makes|
What would|When|Where|Which|Who|Why|Why do|Will|Write|Write a|Write a function|Write a program|Write a short|Write an|
You|You are""".replace("\n", "").split("|")

TOPICS = """creative writing|poetry|short stories|role play|fictional characters|travel|blog posts|emails and letters|
business|marketing|management|finance and the stock market|economics|law|politics|world history|ancient history|
geography|philosophy|ethics|psychology|religion|languages|grammar and editing|translation|literature|
book and film reviews|music|art|photography|architecture|cooking|nutrition|fitness|medicine|mental health|relationships|
parenting|education|career|job interviews|gardening|home repair|cars|sports|games and puzzles|riddles|logic|
word problems|arithmetic|algebra|geometry|probability and statistics|calculus|number theory|physics|astronomy|chemistry|
biology|genetics|evolution|ecology|climate and the environment|geology|energy|engineering|electronics|robotics|
space travel|computers|the internet|security|Python programming|C++ programming|JavaScript and HTML|
algorithms and data structures|SQL and databases|regular expressions|code review|operating systems|machine learning|
artificial intelligence|data science|tables, JSON and CSV|extracting facts from a text|summarizing articles|
classifying reviews|common sense|everyday life|time management|shopping|animals and pets|food and drink|
festivals and culture|myths and legends|humour and jokes|speeches|debates|advice|famous people|inventions|money|weather|
transport|fashion|etiquette""".replace("\n", "").split("|")

MARK = "\u241f"         # stands where the user's text goes in a template
MIN_WORDS = 3           # of a question that the target asks itself
IDLE = 5000             # questions that the target asks itself without one dialogue to keep, before giving up
# Other keys of a line are settings
OF_A_LINE = ("messages", "tools", "tokens", "finish_reason", "drawn", "question", "number", "settled")
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}     # some programs end a line there
MEASURED = Path(__file__).resolve().parent.parent / "benchmarks"


@dataclass
class Talk:
    """A dialogue under way."""
    turns: list[dict]                                       # the user's and the system's messages
    tools: list[dict] | None = None
    number: int = -1                                        # of its question: in --prompts, or as the target asks
    question: str = ""                                      # identifies it, however many turns follow
    frame: tuple[str, str] | None = None                    # while the target asks: how it begins, and what ends it
    messages: list[dict] = field(default_factory=list)      # answered so far
    tokens: list[list[int]] = field(default_factory=list)   # of each answer
    asked: list[dict] = field(default_factory=list)         # up to the user's next turn
    prompt: list[int] = field(default_factory=list)         # for the answer to that

    def ask(self, tokenizer: Tokenizer, max_length: int) -> str | None:
        """Prepare the next prompt. Returns "asked", None when all is answered, or why the dialogue ends here."""
        rest = self.turns[len(self.messages) - len(self.tokens):]
        n_user = next((n for n, turn in enumerate(rest) if turn["role"] == "user"), None)
        if n_user is None:
            return None
        self.asked = rest[:n_user + 1]
        try:
            self.prompt = tokenizer.apply_chat_template(self.messages + self.asked, tools=self.tools)
        except ValueError:
            return "questions refused by the chat template dropped"
        return "long questions dropped" if len(self.prompt) > max_length else "asked"

    def answer(self, tokenizer: Tokenizer, ids: list[int]) -> str | None:
        """Take an answer. Returns None, or why it is dropped."""
        text = answer_text(tokenizer, ids) if ids else ""
        if not text:
            return "empty answers dropped"
        self.messages += [*self.asked, {"role": "assistant", "content": text}]
        self.tokens.append(ids)
        return None


class Job(NamedTuple):
    """What there is to do."""
    settings: dict              # the same for all lines of a file
    origin: dict[str, str]      # of --features
    talks: list[Talk] | None    # to be asked; None: the target asks
    seen: set[str]              # questions that the file answers
    done: set[int]              # their numbers, from `settled` on
    settled: int                # questions of lower numbers are in the file, or were dropped


def question_of(entry: object, args: argparse.Namespace) -> Talk:
    """Raises Unusable for an entry that is no dialogue, or has no question to ask."""
    if isinstance(entry, dict) and isinstance(entry.get("turns"), list):
        entry = {**entry, "messages": [{"role": "user", "content": text} for text in entry["turns"]]}
    chat = chat_of(entry)
    turns = [message for message in chat.messages if message["role"] != "assistant"]
    if any(turn["role"] == "tool" for turn in turns):
        raise Unusable("with turns of a tool, which answer what the target may not ask")
    while turns and turns[-1]["role"] != "user":
        turns.pop()
    if not turns or not all(turn["content"].strip() for turn in turns):
        raise Unusable("with an empty question" if turns else "without a question")
    turns = [{**turn, "content": turn["content"].strip()} for turn in turns]
    if args.system and turns[0]["role"] not in ("system", "developer"):
        turns = [{"role": "system", "content": args.system}, *turns]
    return Talk(turns, chat.tools, question=digest([turns, chat.tools]))


def read_written(files: Iterable[Path]) -> Iterator[dict]:
    """The dialogues in files of scripts/generate_data.py. Raises ValueError for a line of something else."""
    for file in files:
        for line, entry in read_records(file):
            if not isinstance(entry, dict) or not isinstance(entry.get("tokens"), list) or not entry.get("messages"):
                raise ValueError(f"{file}, line {line}: not written by scripts/generate_data.py")
            yield entry


def is_measured(turns: list[dict]) -> bool:
    """Whether a question is among those that benchmarks/ measures with."""
    return any(measured_digest(turn["content"]) in measured() for turn in turns if turn["role"] == "user")


def measured_digest(text: str) -> str:
    return hashlib.sha256(" ".join(text.split()).casefold().encode()).hexdigest()[:16]


@functools.cache
def measured() -> frozenset[str]:
    """Digests of all turns of MT-bench, which are listed, and of benchmarks/copying.jsonl."""
    listed = [line for line in read_text(MEASURED / "mt_bench.sha256").split("\n") if line and not line.startswith("#")]
    copying: Iterator[tuple[int, Any]] = read_records(MEASURED / "copying.jsonl")
    return frozenset(listed + [measured_digest(text) for _, row in copying for text in row["turns"]])


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def text_of(told: Counter, separator: str) -> str:
    return "".join(f"{separator}{n} {what}" for what, n in told.items())


class Desk:
    """Says what a row does next, and takes what comes of it. Counts in `told` what is dropped or cut.

    Questions have numbers. The target's own ones are begun only while those under way could all be needed, so that the
    same ones are kept in whatever order they end.
    """

    def __init__(self, args: argparse.Namespace, tokenizer: Tokenizer, job: Job, max_length: int, told: Counter):
        self.args, self.tokenizer, self.job, self.max_length, self.told = args, tokenizer, job, max_length, told
        self.waiting: deque[Request] = deque()
        self.open: dict[int, str] = {}      # the questions under way, by number; empty until they are asked
        self.next_number, self.n_idle = job.settled, 0

    @property
    def total(self) -> int:
        return self.args.dialogues if self.job.talks is None else len(self.job.talks)

    @property
    def n_closed(self) -> int:
        """Dialogues written, and with --prompts those dropped too."""
        if self.job.talks is None:
            return len(self.job.seen)
        return self.next_number - len(self.open) + sum(number >= self.next_number for number in self.job.done)

    def next(self) -> Request | None:
        while not self.waiting and (number := self._new_number()) is not None:
            self.open[number] = ""
            if self.job.talks is None:
                self._let_ask(Talk([], number=number))
            else:
                talk = self.job.talks[number]
                talk.number, self.open[number] = number, talk.question
                self._go_on(talk)
        return self.waiting.popleft() if self.waiting else None

    def _new_number(self) -> int | None:
        while self.next_number in self.job.done:
            self.next_number += 1
        begun = self.next_number if self.job.talks is not None else len(self.job.seen) + len(self.open)
        if begun >= self.total:
            return None
        self.n_idle += 1
        if self.job.talks is None and self.n_idle > IDLE:
            raise ValueError(f"{IDLE} questions gave nothing to keep{text_of(self.told, '; ')}")
        self.next_number += 1
        return self.next_number - 1

    def take(self, request: Request) -> tuple[str | None, int]:
        """The line of a dialogue that this request ends, and the number of its answer tokens."""
        talk: Talk = request.owner
        if talk.frame is not None:
            is_over = self._asked(talk, request)
        else:
            why = talk.answer(self.tokenizer, request.tokens)
            is_cut = request.finish == "cut"
            self._tell("looping answers cut" if why is None and is_cut else why)
            if why is not None or is_cut:
                is_over = True
            elif len(talk.tokens) == 1 and self._is_chosen(talk, "second turn", self.args.second_turns):
                is_over = self._let_ask(talk)
            else:
                is_over = self._go_on(talk)
        if not is_over:
            return None, 0
        del self.open[talk.number]
        if not talk.tokens:
            return None, 0
        self.n_idle = 0
        self.job.seen.add(talk.question)
        return self._line(talk), sum(map(len, talk.tokens))

    def _tell(self, what: str | None) -> None:
        if what is not None:
            self.told[what] += 1

    def _is_chosen(self, talk: Talk, what: str, share: float) -> bool:
        """Whether a dialogue belongs to a share of all. Question and seed decide."""
        return int(digest([self.args.seed, what, talk.question]), 16) < share * 2 ** 64

    def _go_on(self, talk: Talk) -> bool:
        """Ask for the next answer. Returns whether the dialogue is over."""
        why = talk.ask(self.tokenizer, self.max_length)
        if why != "asked":
            self._tell(why)
            return True
        temperature = self.args.temperature
        if temperature > 0 and not self._is_chosen(talk, "drawn", self.args.temperature_share):
            temperature = 0.0
        self.waiting.appendleft(Request(        # before new questions: rows still hold the dialogue so far
            talk.prompt, self.args.max_new_tokens, temperature, self.args.top_p or 1.0,
            f"{self.args.seed} answer {talk.question} {len(talk.tokens)}", loop_begin, talk))
        return False

    def _let_ask(self, talk: Talk) -> bool:
        """Let the target write the user's next turn. Returns whether the dialogue is over."""
        opening, messages = "", talk.messages
        if not messages:
            rng = random.Random(f"{self.args.seed} {talk.number}")
            opening, topic = rng.choice(OPENINGS), rng.choice(TOPICS)
            messages = [{"role": "system", "content": f"You are a helpful assistant. The user asks about {topic}."}]
        before, after = user_frame(self.tokenizer, messages)
        prompt = self.tokenizer.encode_chat(before + opening)
        if len(prompt) > self.max_length:
            self._tell("long questions dropped")
            return True
        talk.frame = opening, after
        self.waiting.appendleft(Request(
            prompt, self.args.max_user_tokens, 1.0, 0.95, f"{self.args.seed} asks {talk.question or talk.number}",
            lambda ids: len(ids) if after in self.tokenizer.decode(ids) else None, talk))
        return False

    def _asked(self, talk: Talk, request: Request) -> bool:
        """Take the user's turn that the target wrote. Returns whether the dialogue is over."""
        assert talk.frame is not None
        (opening, after), talk.frame = talk.frame, None
        text = (opening + self.tokenizer.decode(request.tokens)).partition(after)[0].strip()
        turn = {"role": "user", "content": text}
        if request.finish == "length" or len(text.split()) < MIN_WORDS:
            self._tell("unfinished questions dropped")
            return True
        if is_measured([turn]):
            self._tell("questions used for measuring dropped")
            return True
        if talk.tokens:
            talk.turns.append(turn)
            return self._go_on(talk)
        new = question_of({"turns": [text]}, self.args)
        if new.question in self.job.seen or new.question in self.open.values():
            self._tell("repeated questions dropped")
            return True
        talk.turns, talk.question, self.open[talk.number] = new.turns, new.question, new.question
        return self._go_on(talk)

    def _line(self, talk: Talk) -> str:
        finish = "stop" if talk.tokens[-1][-1] in self.tokenizer.stop_ids else "length"
        is_drawn = self.args.temperature > 0 and self._is_chosen(talk, "drawn", self.args.temperature_share)
        entry = {"messages": talk.messages, **({"tools": talk.tools} if talk.tools else {}), "tokens": talk.tokens,
                 "finish_reason": finish, "drawn": is_drawn, "question": talk.question, "number": talk.number,
                 "settled": min(self.open, default=self.next_number), **self.job.settings}
        return json.dumps(entry, ensure_ascii=False).translate(LINE_ENDS) + "\n"


def user_frame(tokenizer: Tokenizer, messages: list[dict]) -> tuple[str, str]:
    """What a chat template puts before the user's text that follows the messages, and the first thing it puts after,
    which ends that text."""
    user = {"role": "user", "content": MARK}
    try:
        text = tokenizer.render_chat([*messages, user])
    except ValueError:  # some templates know no system message
        text = tokenizer.render_chat([message for message in messages if message["role"] != "system"] + [user])
    before, _, after = text.partition(MARK)
    return before, after.split()[0] if after.split() else "\n\n"
