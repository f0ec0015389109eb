"""Let the target write its own training data: python scripts/generate_data.py --out data.jsonl --dialogues 10000

    python scripts/generate_data.py --checkpoint lmsys/vicuna-7b-v1.3 --prompts prompts.jsonl --out data.jsonl

A head learns best from answers its target wrote (EAGLE, arXiv 2401.15077, table 6: 2.88x instead of 2.78x). The user's
turns come from --prompts: dialogues in any format of train_data.py, question sets ("turns"), or lines of text. Every
turn of the user is answered behind the target's own earlier answers; system messages and tools stay. Without --prompts
the target writes the questions too, from the opening of its chat template (as Magpie does, arXiv 2406.08464), under a
system message about one of many topics and after an opening word or two, which keeps it from asking the same few things;
the answer is then given without that system message. Repeated questions and answers that loop are dropped: they would
flatter acceptance. Under torchrun the target is split over the processes, and the first one writes.

Each line written is a dialogue, {"messages": [...]}, with "tools" where there are some, and
    tokens          for each answer the ids that the target generated, from which train_head.py learns
    finish_reason   of the last answer: "stop", or "length" where it met --max-new-tokens
    question        names what was asked, so that it is not asked again
    round           of asking: with the seed it gives the draws
and the settings that made it: the target and its chat template as digests, the date that the template was told, the
options. Killed and started again, it goes on where it was, if all of these are the same; on which device and in what
batches may differ.
"""
import argparse
import datetime
import hashlib
import json
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import root  # noqa: F401
import generate as cli
import tp
from console import Parser, add_chat_options, command, number, parse_json, read_records, read_text, say
from checkpoint import resolve_checkpoint
from model import Transformer
from sampling import Sampling
from scripts.report import loops
from tokenizer import Tokenizer
from train_data import LeftOut, Unusable, answer_text, chat_of, holds_records
from train_features import DIFFERS, check_same, target_stamp

OPENINGS = """A|Act as|An|Analyze|Answer|Are|Arrange|As a|Assume|Brainstorm|Calculate|Can you|Can you explain|Classify|
Come up with|Compare|Compose|Complete|Consider|Construct|Convert|Could you|Create|Debug|Define|Describe|Design|Determine|
Develop|Did|Discuss|Do|Does|Draft|Edit|Evaluate|Explain|Extract|Find|For|From|Generate|Give|Give me|Given|Help me|Hey|Hi,|
How|How can|How do|How does|How many|How would|I|I am|I have|I need|I want|I'm|Identify|If|Imagine|Implement|In|In the|Is|
Let|List|Look at|Make|Make a list|My|Name|On|Outline|Please|Play the role|Predict|Pretend|Prove|Provide|Rank|Read|Recommend|
Rewrite|Say|Should|Show|Simplify|Solve|Some|Suggest|Summarize|Suppose|Take|Tell me|The|The following|There are|Think of|
Translate|Two|Use|Using|We|What|What are|What does|What if|What is|What makes|What would|When|Where|Which|Who|Why|Why do|
Will|Write|Write a|Write a function|Write a program|Write a short|Write an|You|You are""".replace("\n", "").split("|")

TOPICS = """creative writing|poetry|short stories|role play|fictional characters|travel|blog posts|emails and letters|
business|marketing|management|finance and the stock market|economics|law|politics|world history|ancient history|geography|
philosophy|ethics|psychology|religion|languages|grammar and editing|translation|literature|book and film reviews|music|
art|photography|architecture|cooking|nutrition|fitness|medicine|mental health|relationships|parenting|education|career|
job interviews|gardening|home repair|cars|sports|games and puzzles|riddles|logic|word problems|arithmetic|algebra|geometry|
probability and statistics|calculus|number theory|physics|astronomy|chemistry|biology|genetics|evolution|ecology|
climate and the environment|geology|energy|engineering|electronics|robotics|space travel|computers|the internet|security|
Python programming|C++ programming|JavaScript and HTML|algorithms and data structures|SQL and databases|regular expressions|
code review|operating systems|machine learning|artificial intelligence|data science|tables, JSON and CSV|
extracting facts from a text|summarizing articles|classifying reviews|common sense|everyday life|time management|shopping|
animals and pets|food and drink|festivals and culture|myths and legends|humour and jokes|speeches|debates|advice|
famous people|inventions|money|weather|transport|fashion|etiquette""".replace("\n", "").split("|")

MARK = "\u241f"  # stands where the user's text goes in a template
IDLE_ROUNDS = 100       # of the target asking itself without one dialogue to keep, after which it is hopeless


class Question(NamedTuple):
    """What one dialogue asks."""
    turns: list[dict]           # the user's and the system's messages
    tools: list[dict] | None = None

    @property
    def key(self) -> str:
        return digest(self)


class Job(NamedTuple):
    """What is there to do, as the first process finds it."""
    settings: dict                      # what makes the answers: the same for all lines of a file
    questions: list[Question] | None    # still to be asked; None: the target asks
    seen: set[str]                      # keys of the questions that the file answers
    n_round: int                        # rounds that those took


@command(stopped="stopped; the same command goes on from here", in_ranks=True)
def main(args: argparse.Namespace) -> None:
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: not a file in an existing folder")
    if args.checkpoint is None:
        from scripts.download import download_demo
        args.checkpoint = str(download_demo(log=say))
    tokenizer = Tokenizer.from_pretrained(args.checkpoint, chat_template=args.chat_template, template_args=args.template_args)
    tokenizer.apply_chat_template(asked_by("Hi", args).turns)   # what cannot be rendered at all shows now
    job = tp.on_rank_0(lambda: prepare(args, tokenizer))
    if job.settings["date"] is not None:
        tokenizer.date = datetime.datetime.fromisoformat(job.settings["date"])

    model, *_ = cli.load(args)
    rounds = Rounds(args, model, tokenizer, job)
    with tqdm(total=rounds.total, initial=len(job.seen), unit=" dialogues") as bar:
        while not rounds.done:
            lines = rounds.next()
            if tp.writes():
                append(args.out, lines)
            bar.update(len(lines))
            bar.set_postfix_str(rounds.dropped_text(", "), refresh=False)
    if not job.seen:
        raise ValueError(f"no dialogue was written{rounds.dropped_text('; ')}")
    say(f"{len(job.seen)} dialogues in {args.out}{rounds.dropped_text('; ')}")


def prepare(args: argparse.Namespace, tokenizer: Tokenizer) -> Job:
    """Read the questions and what has been answered. Raises ValueError where --out was made in another way."""
    questions = None if args.prompts is None else read_questions(args.prompts, args)
    seen, n_round, kept = read_answered(args.out)
    date = None
    if tokenizer.uses_date:     # one for the whole file
        date = kept.get("date") or datetime.datetime.now().isoformat(timespec="seconds")
    settings = {"checkpoint": args.checkpoint, "target": target_stamp(resolve_checkpoint(args.checkpoint))[:16],
                "template": tokenizer.template_digest[:16], "prompts": questions and digest([q.key for q in questions])}
    settings |= {"date": date, "self_prompted": questions is None} | {key: getattr(args, key) for key in OPTIONS}
    check_same(kept, settings, str(args.out), "; give another --out", OUT_DIFFERS)
    drop_cut_line(args.out)
    if questions is not None:
        questions = [question for question in questions if question.key not in seen]
    return Job(settings, questions, seen, n_round)


# Options that change what is written
OPTIONS = ("seed", "temperature", "top_p", "max_new_tokens", "max_user_tokens", "max_prompt_tokens", "dtype", "system")
OUT_DIFFERS = DIFFERS | {"prompts": "{where} answers other questions than --prompts asks"}


def read_answered(out: Path) -> tuple[set[str], int, dict]:
    """Keys of the questions that a file answers, how many rounds of asking they took, and the settings that made it."""
    seen, n_round, settings = set(), 0, {}
    for n, line in enumerate(out.read_bytes().split(b"\n")[:-1] if out.exists() else (), start=1):
        reasons = []
        entry = parse_json(line, reasons.append)
        if reasons or not isinstance(entry, dict) or "messages" not in entry or not isinstance(entry.get("round"), int):
            raise ValueError(f"{out}, line {n}: not written by this script; give another --out")
        own = {key: value for key, value in entry.items() if key not in OF_A_LINE}
        if n > 1 and own != settings:
            raise ValueError(f"{out}, line {n}: not made with the settings of line 1; give another --out")
        seen.add(entry.get("question"))
        n_round, settings = entry["round"], own
    return seen, n_round, settings


def drop_cut_line(out: Path) -> None:
    """Take off the line in which a kill came."""
    content = out.read_bytes() if out.exists() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(out, content.rfind(b"\n") + 1)


def append(out: Path, lines: list[str]) -> None:
    if lines:
        with open(out, "a", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)


def read_questions(file: Path, args: argparse.Namespace) -> list[Question]:
    """Questions of a file of dialogues or question sets, or of one with a question a line; what asks nothing is counted."""
    left_out, questions = LeftOut(), {}
    if not holds_records(file):
        records = [(n, {"turns": [line]}) for n, line in enumerate(read_text(file).split("\n"), start=1) if line.strip()]
    else:
        records = read_records(file, left_out.add_broken)
    for line, entry in records:
        try:
            question = question_of(entry, args)
        except Unusable as error:
            left_out.add(error.name, line, error.why)
            continue
        if question.key in questions:
            left_out.add("repeated", line)
        questions[question.key] = question
    if "broken lines" in left_out.places:
        raise ValueError(f"{file}: {left_out}: give JSON with \"messages\", \"conversations\" or \"turns\", or one question a line")
    if not questions:
        raise ValueError(f"{file} asks nothing" + (f": {left_out}" if left_out.places else ""))
    if left_out.places:
        say(f"{file}: {len(questions)} questions; left out: {left_out}")
    return list(questions.values())


def question_of(entry: object, args: argparse.Namespace) -> Question:
    """Raises Unusable for what is no dialogue, or asks nothing that can be asked again."""
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
    return Question(with_system(turns, args), chat.tools)


def asked_by(text: str, args: argparse.Namespace) -> Question:
    return Question(with_system([{"role": "user", "content": text}], args))


def with_system(turns: list[dict], args: argparse.Namespace) -> list[dict]:
    """The same under --system, where they have no system message of their own."""
    own = turns[0]["role"] in ("system", "developer")
    return turns if own or not args.system else [{"role": "system", "content": args.system}, *turns]


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@dataclass
class Talk:
    """A dialogue under way."""
    question: Question
    messages: list[dict] = field(default_factory=list)      # answered so far
    tokens: list[list[int]] = field(default_factory=list)   # of each answer
    asked: list[dict] = field(default_factory=list)         # up to the user's next turn
    prompt: list[int] = field(default_factory=list)         # for the answer to that

    def ask(self, tokenizer: Tokenizer, max_length: int) -> str | None:
        """Prepare the next prompt. Returns "asked", None when all is answered, or the name under which it is dropped."""
        rest = self.question.turns[len(self.messages) - len(self.tokens):]
        n_user = next((n for n, turn in enumerate(rest) if turn["role"] == "user"), None)
        if n_user is None:
            return None
        self.asked = rest[:n_user + 1]
        try:
            self.prompt = tokenizer.apply_chat_template(self.messages + self.asked, tools=self.question.tools)
        except ValueError:
            return "questions refused by the chat template"
        return "long questions" if len(self.prompt) > max_length else "asked"

    def answer(self, tokenizer: Tokenizer, ids: list[int]) -> str | None:
        """Take an answer. Returns None, or the name under which it is dropped."""
        text = answer_text(tokenizer, ids)
        if loops(ids) or not text:
            return "looping answers" if text else "empty answers"
        self.messages += [*self.asked, {"role": "assistant", "content": text}]
        self.tokens.append(ids)


class Rounds:
    """Batches of questions, asked and answered; a dialogue of several turns takes several rounds."""

    def __init__(self, args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, job: Job):
        self.args, self.tokenizer, self.job = args, tokenizer, job
        n_slot = cli.slots_for(args.max_prompt_tokens + max(args.max_new_tokens, args.max_user_tokens), model)
        cli.setup_caches(model, None, args.batch_size, n_slot)
        self.asker = cli.Decoder(model, args.batch_size, Sampling(1.0, None, 0.95), compile=args.compile)
        self.answerer = cli.Decoder(model, args.batch_size, Sampling(args.temperature, None, args.top_p), compile=args.compile)
        self.max_length = min(args.max_prompt_tokens, n_slot - 1)
        self.questions, self.seen, self.n_round = job.questions, job.seen, job.n_round
        self.total = args.dialogues if self.questions is None else len(self.seen) + len(self.questions)
        self.waiting: list[Talk] = []       # for an answer to their prompt
        self.dropped, self.n_idle = Counter(), 0

    @property
    def done(self) -> bool:
        return len(self.seen) >= self.total if self.questions is None else not (self.questions or self.waiting)

    def next(self) -> list[str]:
        """One round: the lines of the dialogues that end in it."""
        seed = (self.args.seed * 1_000_003 + self.n_round) % 2 ** 63
        self.n_round += 1
        batch_size, lines = self.args.batch_size, []
        if len(self.waiting) < batch_size:
            self._admit(seed)
        if len(self.waiting) >= batch_size or self.questions == []:
            batch, self.waiting = self.waiting[:batch_size], self.waiting[batch_size:]
            lines = self._answer(batch, seed)
        self.n_idle = 0 if lines else self.n_idle + 1
        if self.questions is None and self.n_idle == IDLE_ROUNDS:
            raise ValueError(f"{IDLE_ROUNDS} rounds of asking gave nothing to keep{self.dropped_text('; ')}")
        return lines

    def _admit(self, seed: int) -> None:
        """Take up new questions, written by the target where none are given."""
        if self.questions is None:
            texts = ask(self.asker, self.tokenizer, random.Random(seed), seed, self.args)
            new = [asked_by(text, self.args) for text in texts]
        else:
            n = self.args.batch_size
            new, self.questions = self.questions[:n], self.questions[n:]
        known = self.seen | {talk.question.key for talk in self.waiting}
        for talk in map(Talk, new):
            why = "repeated questions" if talk.question.key in known else talk.ask(self.tokenizer, self.max_length)
            known.add(talk.question.key)
            if why == "asked":
                self.waiting.append(talk)
            else:
                self.dropped[why] += 1

    def _answer(self, batch: list[Talk], seed: int) -> list[str]:
        prompts, going_on, lines = [talk.prompt for talk in batch], [], []
        for talk, ids in zip(batch, answer(self.answerer, prompts, seed, self.tokenizer, self.args)):
            why = talk.answer(self.tokenizer, ids) or talk.ask(self.tokenizer, self.max_length)
            if why == "asked":
                going_on.append(talk)
                continue
            if why is not None:
                self.dropped[why] += 1
            if talk.tokens:
                self.seen.add(talk.question.key)
                lines.append(self._line(talk))
        self.waiting = going_on + self.waiting
        return lines

    def _line(self, talk: Talk) -> str:
        finish = "stop" if talk.tokens[-1][-1] in self.tokenizer.stop_ids else "length"
        tools = {"tools": talk.question.tools} if talk.question.tools else {}
        entry = {"messages": talk.messages, **tools, "tokens": talk.tokens, "finish_reason": finish,
                 "question": talk.question.key, "round": self.n_round, **self.job.settings}
        return json.dumps(entry, ensure_ascii=False).translate(LINE_ENDS) + "\n"

    def dropped_text(self, separator: str) -> str:
        return "".join(f"{separator}{n} {what} dropped" for what, n in self.dropped.items())


OF_A_LINE = ("messages", "tools", "tokens", "finish_reason", "question", "round")   # the rest of it are settings
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}     # for other programs, which may end a line there


def ask(decoder: cli.Decoder, tokenizer: Tokenizer, rng: random.Random, seed: int, args: argparse.Namespace) -> list[str]:
    """A batch of user turns written by the target; fewer come back, as those that do not end in time are dropped."""
    openings = [rng.choice(OPENINGS) for _ in range(args.batch_size)]
    frames = [user_frame(tokenizer, rng.choice(TOPICS)) for _ in openings]
    prompts = [tokenizer.encode(before + opening) for (before, _), opening in zip(frames, openings)]
    result = decoder.generate(prompts, args.max_user_tokens, seed=seed, stop_ids=tokenizer.stop_ids)
    texts = []
    for opening, (_, after), ids, reason in zip(openings, frames, result.tokens, result.finish_reason):
        text, ended, _ = (opening + tokenizer.decode(ids)).partition(after)
        if (reason == "stop" or ended) and len(text.split()) > 2:
            texts.append(text.strip())
    return texts


def user_frame(tokenizer: Tokenizer, topic: str) -> tuple[str, str]:
    """What a chat template puts before the user's text, and the first thing it puts after, which ends that text."""
    system = {"role": "system", "content": f"You are a helpful assistant. The user asks about {topic}."}
    user = {"role": "user", "content": MARK}
    try:
        text = tokenizer.render_chat([system, user])
    except ValueError:  # some templates know no system message
        text = tokenizer.render_chat([user])
    before, _, after = text.partition(MARK)
    return before, after.split()[0] if after.split() else "\n\n"


def answer(decoder: cli.Decoder, prompts: list[list[int]], seed: int, tokenizer: Tokenizer,
           args: argparse.Namespace) -> list[list[int]]:
    """Answers as token ids. The batch is filled up with repetitions: what is compiled has one size."""
    if not prompts:
        return []
    padded = prompts + prompts[:1] * (args.batch_size - len(prompts))
    return decoder.generate(padded, args.max_new_tokens, seed=seed, stop_ids=tokenizer.stop_ids).tokens[:len(prompts)]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Let the target write dialogues to train a head on.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines; appended to when it exists")
    parser.add_argument("--checkpoint", help="Hugging Face folder or hub id (default: the demo model)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="questions to answer (default: the target asks itself)")
    parser.add_argument("--dialogues", type=number(int, 1), default=10000, metavar="N", help="without --prompts")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=256, metavar="N", help="of an answer")
    parser.add_argument("--max-user-tokens", type=number(int, 1), default=64, metavar="N", help="of a question")
    parser.add_argument("--max-prompt-tokens", type=number(int, 1), default=512, metavar="N", help="longer is dropped")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, metavar="X", help="of answers; 0 is greedy")
    parser.add_argument("--top-p", type=number(float, 0, 1, open_low=True), metavar="X")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    parser.add_argument("--batch-size", type=number(int, 1), default=64, metavar="N")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    add_chat_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message of dialogues that have none")
    parser.set_defaults(eagle=None, tree=None, top_k=None)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(tp.run(main, parse_args()))
