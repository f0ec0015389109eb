"""Makes a draft vocabulary: the most frequent tokens of some data.

    python scripts/draft_vocab.py --data dialogues.jsonl --size 8192 --eagle HEAD

With a large vocabulary, most of the time of drafting goes into the LM head. Drafting only frequent tokens (FR-Spec,
arXiv 2502.14856) cuts that to a few percent. The output stays the same, as the target verifies with its whole
vocabulary. The ids are written to draft_vocab.json beside the head, the most frequent first, so that
`generate.py --draft-vocab N` can take fewer. --data is a file of dialogues in one of train_data.py's formats, of which
the assistant's words count, or a text file, of which every word counts.
"""
import argparse
import json
import sys
from pathlib import Path

import torch

import root  # noqa: F401
from checkpoint import demo_checkpoint
from console import Parser, add_chat_options, command, number, read_text, say, write_atomically
from generate import shipped_head
from tokenizer import Tokenizer
from train_data import Dialogue, common_tokens, holds_records, read_dialogues


@command()
def main(args: argparse.Namespace) -> None:
    if args.checkpoint is None:
        args.checkpoint = str(demo_checkpoint())
    tokenizer = Tokenizer.from_pretrained(args.checkpoint, chat_template=args.chat_template,
                                          template_args=args.template_args)
    out = args.out or Path(args.eagle or shipped_head(args.checkpoint)) / "draft_vocab.json"
    if holds_records(args.data):
        dialogues = read_dialogues(args.data, tokenizer, tokenizer.vocab_size, max_length=sys.maxsize)
    else:
        texts = [tokenizer.encode(line) for line in read_text(args.data).splitlines(keepends=True)]
        dialogues = [Dialogue(n, torch.tensor(ids), torch.ones(len(ids)).bool()) for n, ids in enumerate(texts)]
    ids = common_tokens(dialogues, tokenizer.stop_ids, args.size)
    said = torch.cat([dialogue.tokens[dialogue.loss_mask] for dialogue in dialogues] or [torch.empty(0)])
    if not len(said):
        raise ValueError(f"{args.data} holds no text")
    covered = torch.isin(said, torch.tensor(ids)).float().mean().item()
    write_atomically(out, json.dumps({"ids": ids, "covered": covered, "tokens_counted": len(said)}) + "\n")
    say(f"{len(ids)} tokens cover {covered:.1%} of {len(said)}; wrote {out}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Count tokens and write the most frequent as a draft vocabulary.")
    parser.add_argument("--checkpoint", help="whose tokenizer (default: the demo model)")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="dialogues, or text")
    add_chat_options(parser)
    parser.add_argument("--size", type=number(int, 1), default=8192, metavar="N")
    parser.add_argument("--eagle", metavar="HEAD", help="the head's folder (default: the one that ships)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: draft_vocab.json beside the head")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
