"""Ask about texts that the target wrote: python scripts/ask_about.py 1.jsonl 2.jsonl --out questions.jsonl

    python scripts/generate_data.py --prompts questions.jsonl --out about.jsonl

The questions that a target asks itself are short, and few of them bring a text to work on. A head trained on them
drafts worst where an answer takes its words from a long question. Here an answer of the given dialogues, from
scripts/generate_data.py, becomes the text of a new question: to sum up, to rewrite, to extract from, to reply to.
One line, {"turns": [question]}, for each text taken.
"""
import argparse
import json
import random
import sys
from pathlib import Path

import root  # noqa: F401
from console import Parser, check_writable, command, number, say, whole_or_nothing
from scripts.dialogues import read_written

TASKS = """Summarize the following text in one sentence.|Summarize the text below in three bullet points.|
What are the main points of this text?|Give the text below a title, and say why it fits.|
Which people, places and dates does the following text mention?|Extract all names from this text as a JSON list.|
Extract the facts of the text below as a JSON object.|Make a table of what the following text says.|
List every number in the following text and what it stands for.|Extract the five most important words of this text.|
Rewrite the following text so that a child understands it.|Rewrite this text in a formal tone.|
Rewrite the text below as an email to a friend.|Make the following text half as long.|Rewrite this text as a poem.|
Correct the mistakes in the following text and explain each of them.|Improve the style of the text below.|
Turn the following text into a list of steps.|Translate the following text into French.|
Translate the text below into Spanish.|Is the mood of this text positive, negative or neutral? Explain.|
Rate the following text from 1 to 5, and give your reasons in JSON.|What does the author of the text below believe?|
Write three questions about the following text, with their answers.|Write a short reply to this message.|
Continue the following text.|What is missing from the text below?|Argue against what the following text says.|
Explain the following text step by step.|Which sentence of this text matters most, and why?|
Write a headline and a first paragraph for a newspaper from this text.|Name the topic and the audience of this text.|
Write a Python function that has to do with the following text.|Find a claim in this text that can be checked.|
Classify each sentence of the following text as a fact or an opinion.|Quote the sentence that answers why.""".replace(
    "\n", "").split("|")


@command()
def main(args: argparse.Namespace) -> None:
    check_writable("--out", args.out)
    texts = {}      # each once, in the order of the files
    for entry in read_written(args.data):
        said = [message["content"] for message in entry["messages"] if message["role"] == "assistant"]
        texts |= {text: None for text, ids in zip(said, entry["tokens"])
                  if args.min_tokens <= len(ids) <= args.max_tokens}
    rng = random.Random(args.seed)
    chosen = [text for text in texts if rng.random() < args.share]
    if not chosen:
        raise ValueError(f"no answer of {args.min_tokens} to {args.max_tokens} tokens was taken: see --share")
    with whole_or_nothing(args.out, ".part") as part:
        part.write_text("".join(json.dumps({"turns": [ask(text, rng)]}) + "\n" for text in chosen), encoding="utf-8")
    say(f"{len(chosen)} questions about {len(texts)} texts in {args.out}")


def ask(text: str, rng: random.Random) -> str:
    """A question about the text, which stands behind the task or before it."""
    parts = [rng.choice(TASKS), f'"{text}"' if rng.random() < 0.3 else text]
    return "\n\n".join(parts if rng.random() < 0.8 else parts[::-1])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Make questions about texts that the target wrote.")
    parser.add_argument("data", type=Path, nargs="+", help="files of scripts/generate_data.py")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--share", type=number(float, 0, 1), default=0.3, metavar="P", help="of the texts to take")
    parser.add_argument("--min-tokens", type=number(int, 1), default=60, metavar="N", help="of a text")
    parser.add_argument("--max-tokens", type=number(int, 1), default=320, metavar="N", help="of a text")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
