"""Let the target write its own training data: python scripts/generate_data.py --out data.jsonl --dialogues 10000

    python scripts/generate_data.py --checkpoint lmsys/vicuna-7b-v1.3 --prompts prompts.jsonl --out data.jsonl

A head learns best from answers its target wrote (EAGLE, arXiv 2401.15077, table 6: 2.88x instead of 2.78x). The user's
turns come from --prompts: dialogues, question sets ("turns") or lines of text. Without it the target writes them too,
from the opening of its chat template (as Magpie does, arXiv 2406.08464), under a system message about one of many
topics and after an opening word or two, which keeps it from asking the same few things; the answer is then given
without that system message. Each line written has the messages and the settings that made them. Repeated questions
and answers that loop are dropped: they would flatter acceptance. Killed and started again, it goes on where it was.
"""
import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate as cli
from console import Parser, command, number, say, write_atomically
from model import Sampling
from scripts.report import loops
from tokenizer import Tokenizer

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


@command(stopped="stopped; the same command goes on from here")
def main(args: argparse.Namespace) -> None:
    settings = {"seed": args.seed, "temperature": args.temperature, "top_p": args.top_p,
                "max_new_tokens": args.max_new_tokens, "self_prompted": args.prompts is None}
    seen, n_round = resume(args.out, settings)
    n_before, dropped, waiting = len(seen), Counter(), {}     # waiting: question -> its prompt's ids
    todo = None
    if args.prompts is not None:
        todo = [text for text in dict.fromkeys(read_questions(args.prompts)) if text not in seen]
    model, _, tokenizer, _ = cli.load(args)
    n_slot = cli.slots_for(args.max_prompt_tokens + max(args.max_new_tokens, args.max_user_tokens), model)
    cli.setup_caches(model, None, args.batch_size, n_slot)
    asker = cli.Decoder(model, args.batch_size, Sampling(1.0, None, 0.95), compile=args.compile)
    answerer = cli.Decoder(model, args.batch_size, Sampling(args.temperature, None, args.top_p), compile=args.compile)

    total = args.dialogues if todo is None else n_before + len(todo)
    with open(args.out, "a", encoding="utf-8") as out, tqdm(total=total, initial=n_before, unit=" dialogues") as bar:
        while len(seen) < total if todo is None else todo or waiting:
            seed = args.seed * 1_000_003 + n_round
            if todo is None:
                texts = ask(asker, tokenizer, random.Random(seed), seed, args)
            else:
                texts, todo = todo[:args.batch_size], todo[args.batch_size:]
            n_round += 1
            for text in texts:
                ids = tokenizer.apply_chat_template([{"role": "user", "content": text}])
                if text in seen or text in waiting:
                    dropped["repeated questions"] += 1
                elif len(ids) > min(args.max_prompt_tokens, n_slot - 1):
                    dropped["long questions"] += 1
                else:
                    waiting[text] = ids
            if len(waiting) < args.batch_size and (todo is None or todo):
                continue
            batch = dict(list(waiting.items())[:args.batch_size])
            waiting = {text: ids for text, ids in waiting.items() if text not in batch}
            n_before = len(seen)
            for text, ids in zip(batch, answer(answerer, list(batch.values()), seed, tokenizer, args)):
                reply = tokenizer.decode(ids).strip()
                if loops(ids) or not reply:
                    dropped["looping answers" if reply else "empty answers"] += 1
                    continue
                messages = [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
                finish = "stop" if ids[-1] in tokenizer.stop_ids else "length"
                entry = {"messages": messages, "finish_reason": finish, "round": n_round, **settings}
                out.write(json.dumps(entry, ensure_ascii=False) + "\n")
                seen.add(text)
            out.flush()
            bar.update(len(seen) - n_before)
            bar.set_postfix_str(", ".join(f"{n} {what} dropped" for what, n in dropped.items()), refresh=False)
    say(f"{len(seen)} dialogues in {args.out}" + "".join(f"; {n} {what} dropped" for what, n in dropped.items()))


def resume(out: Path, settings: dict) -> tuple[set[str], int]:
    """The questions answered so far, and how many rounds of asking they took. A line cut by a kill is taken off."""
    if not out.exists():
        return set(), 0
    lines = out.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        write_atomically(out, "".join(lines := lines[:-1]))
    seen, n_round = set(), 0
    for n, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            seen.add(entry["messages"][0]["content"])
            n_round = entry["round"]
        except (ValueError, KeyError, TypeError, IndexError):
            raise ValueError(f"{out}, line {n}: not written by this script; give another --out") from None
        for key, value in settings.items():
            if entry.get(key) != value:
                raise ValueError(f"{out} was made with {key} {entry.get(key)!r}, not {value!r}; give another --out")
    return seen, n_round


def read_questions(file: Path) -> Iterator[str]:
    """First user turns of a JSON-lines file of dialogues or questions, or the lines of a text file."""
    with open(file, encoding="utf-8") as lines:
        for n, line in enumerate(lines, start=1):
            try:
                if file.suffix != ".jsonl":
                    text = line
                elif not line.strip():
                    continue
                else:
                    entry = json.loads(line)
                    text = entry["turns"][0] if "turns" in entry else next(
                        turn.get("content", turn.get("value")) for turn in entry.get("messages", entry.get("conversations"))
                        if turn.get("role", turn.get("from")) in ("user", "human"))
            except UnicodeDecodeError:
                raise
            except (ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration):
                raise ValueError(f"{file}, line {n}: no question: give JSON lines with \"messages\", "
                                 "\"conversations\" or \"turns\", or a text file with one a line") from None
            if isinstance(text, str) and text.strip():
                yield text.strip()


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
    parser.add_argument("--chat-template", help="vicuna, llama2, mixtral or a jinja file, instead of the checkpoint's")
    parser.set_defaults(eagle=None, tree=None, top_k=None)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
