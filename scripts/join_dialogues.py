"""Join short dialogues into long chats: python scripts/join_dialogues.py 1.jsonl 2.jsonl --out data.jsonl --share 0.5

A head that has learnt from short dialogues drafts worse far from the beginning of a chat. Long ones need not be
written: here some dialogues of the files become one chat, one after the other, until it is about --tokens long. All but
the last end by themselves ("finish_reason": "stop"): no answer inside a chat is cut. The others are kept as they are.
Answers then do not stand after the text that they were written after, but the loss is about what the target says there.
"""
import argparse
import json
import random
import sys
from pathlib import Path

import root  # noqa: F401
from console import Parser, check_writable, command, number, say, whole_or_nothing
from scripts.dialogues import read_written

FRAME = 40      # tokens beside an answer, about: the question and what the chat template puts between


@command()
def main(args: argparse.Namespace) -> None:
    check_writable("--out", args.out)
    rng, alone, begins, ends = random.Random(args.seed), [], [], []
    for entry in read_written(args.data):
        if entry["messages"][0]["role"] != "user" or entry.get("tools") or rng.random() >= args.share:
            alone.append(entry)
        else:
            (begins if entry["finish_reason"] == "stop" else ends).append(entry)
    rng.shuffle(begins)
    rng.shuffle(ends)
    chats = []
    while begins:
        chat, length = [], 0
        while begins and length < args.tokens:
            chat.append(begins.pop())
            length += sum(FRAME + len(answer) for answer in chat[-1]["tokens"])
        chats.append(chat + [ends.pop()] if ends else chat)
    with whole_or_nothing(args.out, ".part") as part:
        part.write_text("".join(map(line_of, [*([entry] for entry in alone + ends), *chats])), encoding="utf-8")
    say(f"{len(alone) + len(ends)} dialogues as they were, {sum(map(len, chats))} joined to {len(chats)} in {args.out}")


def line_of(chat: list[dict]) -> str:
    """Several dialogues as one."""
    joined = {"messages": [message for entry in chat for message in entry["messages"]],
              "tokens": [answer for entry in chat for answer in entry["tokens"]],
              "finish_reason": chat[-1]["finish_reason"], **({"tools": chat[0]["tools"]} if "tools" in chat[0] else {})}
    return json.dumps(joined, ensure_ascii=True) + "\n"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Join short dialogues into long chats.")
    parser.add_argument("data", type=Path, nargs="+", help="files of scripts/generate_data.py")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--share", type=number(float, 0, 1), default=0.5, metavar="P", help="of the dialogues to join")
    parser.add_argument("--tokens", type=number(int, 1), default=650, metavar="N", help="of a chat, about")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
