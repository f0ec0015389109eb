"""Let the target write its own training data: python scripts/generate_data.py --out data.jsonl --dialogues 10000

    python scripts/generate_data.py --checkpoint lmsys/vicuna-7b-v1.3 --prompts prompts.jsonl --out data.jsonl

A head learns best from answers that its target wrote (EAGLE, arXiv 2401.15077, table 6: 2.88x instead of 2.78x).
--prompts gives the user's turns: dialogues in a format of train_data.py, question sets ("turns"), or lines of text.
Each turn is answered after the target's own earlier answers; system messages and tools stay.

Without --prompts the target writes the questions too, from the opening of its chat template (as in Magpie, arXiv
2406.08464). A system message about one of many topics and an opening word or two keep it from asking the same things;
the answer is then given without that system message. Repeated questions are dropped, and so are answers that loop,
which would flatter acceptance. Under torchrun the target is split over the processes, and the first one writes.

Each line written is a dialogue, {"messages": [...]}, with "tools" where there are some, and
    tokens          for each answer the ids that the target generated, which train_head.py trains on
    finish_reason   of the last answer: "stop", or "length" where it met --max-new-tokens
    question        identifies what was asked, so that it is not asked again
    round           of asking, which with the seed determines the random draws
and the settings: the target and its chat template as digests, the date that the template was told, the options. A run
that was killed goes on when it is started again with the same settings. Device and batch size may differ.
"""
import argparse
import datetime
import hashlib
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import root  # noqa: F401
import tp
from checkpoint import demo_checkpoint, resolve_checkpoint
from console import Parser, add_chat_options, command, number, parse_json, read_records, read_text, say
from decoder import Decoder, setup_caches, slots_for
from generate import load
from model import Transformer
from sampling import Sampling
from scripts.report import loops
from tokenizer import Tokenizer
from train_data import LeftOut, Unusable, answer_text, chat_of, holds_records
from train_features import DIFFERS, check_same, target_stamp

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
IDLE_ROUNDS = 100       # of the target asking itself without one dialogue to keep, before giving up
# Options that change what is written
OPTIONS = ("seed", "temperature", "top_p", "max_new_tokens", "max_user_tokens", "max_prompt_tokens", "dtype", "system")
OF_A_LINE = ("messages", "tools", "tokens", "finish_reason", "question", "round")   # other keys of a line are settings
LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}     # some programs end a line there


@dataclass
class Talk:
    """A dialogue under way."""
    turns: list[dict]                                       # the user's and the system's messages
    tools: list[dict] | None = None
    messages: list[dict] = field(default_factory=list)      # answered so far
    tokens: list[list[int]] = field(default_factory=list)   # of each answer
    asked: list[dict] = field(default_factory=list)         # up to the user's next turn
    prompt: list[int] = field(default_factory=list)         # for the answer to that

    @property
    def question(self) -> str:
        return digest([self.turns, self.tools])

    def ask(self, tokenizer: Tokenizer, max_length: int) -> str | None:
        """Prepare the next prompt. Returns "asked", None when all is answered, or why the dialogue is dropped."""
        rest = self.turns[len(self.messages) - len(self.tokens):]
        n_user = next((n for n, turn in enumerate(rest) if turn["role"] == "user"), None)
        if n_user is None:
            return None
        self.asked = rest[:n_user + 1]
        try:
            self.prompt = tokenizer.apply_chat_template(self.messages + self.asked, tools=self.tools)
        except ValueError:
            return "questions refused by the chat template"
        return "long questions" if len(self.prompt) > max_length else "asked"

    def answer(self, tokenizer: Tokenizer, ids: list[int]) -> str | None:
        """Take an answer. Returns None, or why it is dropped."""
        text = answer_text(tokenizer, ids)
        if loops(ids) or not text:
            return "looping answers" if text else "empty answers"
        self.messages += [*self.asked, {"role": "assistant", "content": text}]
        self.tokens.append(ids)
        return None


class Job(NamedTuple):
    """What there is to do."""
    settings: dict              # the same for all lines of a file
    talks: list[Talk] | None    # still to be asked; None: the target asks
    seen: set[str]              # questions that the file answers
    n_round: int                # rounds of asking that those took


@command(stopped="stopped; the same command goes on from here", in_ranks=True)
def main(args: argparse.Namespace) -> None:
    if args.out.is_dir() or not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: not a file in an existing folder")
    args.checkpoint = args.checkpoint or str(demo_checkpoint())
    tokenizer = Tokenizer.from_pretrained(args.checkpoint, chat_template=args.chat_template,
                                          template_args=args.template_args)
    tokenizer.apply_chat_template(question_of({"turns": ["Hi"]}, args).turns)   # refuses now what always fails
    job = tp.on_rank_0(lambda: prepare(args, tokenizer))
    if job.settings["date"] is not None:
        tokenizer.date = datetime.datetime.fromisoformat(job.settings["date"])
    model, *_ = load(args)
    total = args.dialogues if job.talks is None else len(job.seen) + len(job.talks)
    dropped = Counter()
    with tqdm(total=total, initial=len(job.seen), unit=" dialogues") as bar:
        for lines in rounds(args, model, tokenizer, job, dropped):
            if lines and tp.writes():
                with open(args.out, "a", encoding="utf-8", newline="\n") as file:
                    file.writelines(lines)
            bar.update(len(lines))
            bar.set_postfix_str(text_of(dropped, ", "), refresh=False)
    if not job.seen:
        raise ValueError(f"no dialogue was written{text_of(dropped, '; ')}")
    say(f"{len(job.seen)} dialogues in {args.out}{text_of(dropped, '; ')}")


def prepare(args: argparse.Namespace, tokenizer: Tokenizer) -> Job:
    """Read the questions and what has been answered. Raises ValueError where --out was made with other settings."""
    talks = None if args.prompts is None else read_questions(args.prompts, args)
    seen, n_round, kept = read_answered(args.out)
    date = None
    if tokenizer.uses_date:     # one for the whole file
        date = kept.get("date") or datetime.datetime.now().isoformat(timespec="seconds")
    settings = {"checkpoint": args.checkpoint, "target": target_stamp(resolve_checkpoint(args.checkpoint))[:16],
                "template": tokenizer.template_digest[:16],
                "prompts": talks and digest([talk.question for talk in talks]),
                "date": date, "self_prompted": talks is None, **{key: getattr(args, key) for key in OPTIONS}}
    check_same(kept, settings, str(args.out), "; give another --out",
               DIFFERS | {"prompts": "{where} answers other questions than --prompts asks"})
    if args.out.exists():       # take off the line in which a kill came
        os.truncate(args.out, args.out.read_bytes().rfind(b"\n") + 1)
    return Job(settings, talks and [talk for talk in talks if talk.question not in seen], seen, n_round)


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


def read_questions(file: Path, args: argparse.Namespace) -> list[Talk]:
    """The questions of a file: dialogues, question sets, or a question a line. Entries without one are counted."""
    left_out, talks = LeftOut(), {}
    if holds_records(file):
        records = read_records(file, left_out.add_broken)
    else:
        lines = enumerate(read_text(file).split("\n"), start=1)
        records = ((n, {"turns": [line]}) for n, line in lines if line.strip())
    for line, entry in records:
        try:
            talk = question_of(entry, args)
        except Unusable as error:
            left_out.add(line, *error.args)
            continue
        if talk.question in talks:
            left_out.add(line, "repeated")
        talks[talk.question] = talk
    if "broken lines" in left_out.places:
        raise ValueError(f'{file}: {left_out}: give JSON with "messages", "conversations" or "turns", '
                         "or one question a line")
    if not talks:
        raise ValueError(f"{file} asks nothing" + (f": {left_out}" if left_out.places else ""))
    if left_out.places:
        say(f"{file}: {len(talks)} questions; left out: {left_out}")
    return list(talks.values())


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
    return Talk(turns, chat.tools)


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def text_of(dropped: Counter, separator: str) -> str:
    return "".join(f"{separator}{n} {what} dropped" for what, n in dropped.items())


def rounds(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, job: Job,
           dropped: Counter) -> Iterator[list[str]]:
    """The lines of the dialogues that end in each round. A round takes up new questions where few are left, and answers
    a batch of them; a dialogue of several turns takes several rounds. Adds to job.seen, and to `dropped`."""
    n_slot = slots_for(args.max_prompt_tokens + max(args.max_new_tokens, args.max_user_tokens), model)
    setup_caches(model, None, args.batch_size, n_slot)
    asker = Decoder(model, args.batch_size, Sampling(1.0, None, 0.95), compile=args.compile)
    answerer = Decoder(model, args.batch_size, Sampling(args.temperature, None, args.top_p), compile=args.compile)
    max_length = min(args.max_prompt_tokens, n_slot - 1)
    new, waiting = job.talks, []        # waiting: for an answer to their prompt
    n_round, n_idle = job.n_round, 0
    while (new or waiting) if new is not None else len(job.seen) < args.dialogues:
        seed, lines = (args.seed * 1_000_003 + n_round) % 2 ** 63, []
        n_round += 1
        if len(waiting) < args.batch_size:
            if new is None:
                texts = ask(asker, tokenizer, random.Random(seed), seed, args)
                talks = [question_of({"turns": [text]}, args) for text in texts]
            else:
                talks, new = new[:args.batch_size], new[args.batch_size:]
            known = job.seen | {talk.question for talk in waiting}
            for talk in talks:
                why = "repeated questions" if talk.question in known else talk.ask(tokenizer, max_length)
                known.add(talk.question)
                if why == "asked":
                    waiting.append(talk)
                else:
                    dropped[why] += 1
        if waiting and (len(waiting) >= args.batch_size or new == []):
            batch, waiting, going_on = waiting[:args.batch_size], waiting[args.batch_size:], []
            # The batch is filled up with repetitions: what is compiled has one size.
            prompts = [talk.prompt for talk in batch + batch[:1] * (args.batch_size - len(batch))]
            result = answerer.generate(prompts, args.max_new_tokens, seed=seed, stop_ids=tokenizer.stop_ids)
            for talk, ids in zip(batch, result.tokens):
                why = talk.answer(tokenizer, ids) or talk.ask(tokenizer, max_length)
                if why == "asked":
                    going_on.append(talk)
                    continue
                if why is not None:
                    dropped[why] += 1
                if talk.tokens:
                    job.seen.add(talk.question)
                    lines.append(line_of(talk, tokenizer, n_round, job.settings))
            waiting = going_on + waiting
        n_idle = 0 if lines else n_idle + 1
        if new is None and n_idle == IDLE_ROUNDS:
            raise ValueError(f"{IDLE_ROUNDS} rounds of asking gave nothing to keep{text_of(dropped, '; ')}")
        yield lines


def line_of(talk: Talk, tokenizer: Tokenizer, n_round: int, settings: dict) -> str:
    finish = "stop" if talk.tokens[-1][-1] in tokenizer.stop_ids else "length"
    tools = {"tools": talk.tools} if talk.tools else {}
    entry = {"messages": talk.messages, **tools, "tokens": talk.tokens, "finish_reason": finish,
             "question": talk.question, "round": n_round, **settings}
    return json.dumps(entry, ensure_ascii=False).translate(LINE_ENDS) + "\n"


def ask(decoder: Decoder, tokenizer: Tokenizer, rng: random.Random, seed: int,
        args: argparse.Namespace) -> list[str]:
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Let the target write dialogues to train a head on.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines; added to when it exists")
    parser.add_argument("--checkpoint", help="Hugging Face folder or hub id (default: the demo model)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="questions (default: the target asks itself)")
    parser.add_argument("--dialogues", type=number(int, 1), default=10000, metavar="N", help="without --prompts")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=256, metavar="N", help="of an answer")
    parser.add_argument("--max-user-tokens", type=number(int, 1), default=64, metavar="N", help="of a question")
    parser.add_argument("--max-prompt-tokens", type=number(int, 1), default=512, metavar="N", help="longer is dropped")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, metavar="X", help="of answers; 0: greedy")
    parser.add_argument("--top-p", type=number(float, 0, 1, open_low=True), metavar="X")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    parser.add_argument("--batch-size", type=number(int, 1), default=64, metavar="N")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    add_chat_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message of dialogues that have none")
    parser.set_defaults(eagle=None, tree=None, top_k=None, exact=False)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(tp.run(main, parse_args()))
