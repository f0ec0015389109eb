"""Make a head's draft vocabulary: python scripts/draft_vocab.py --data dialogues.jsonl --size 8192 --eagle HEAD

The LM head is most of what drafting costs when the vocabulary is large. Drafting only the tokens that are common in
the data (FR-Spec, arXiv 2502.14856) cuts that to a few percent, and verification over the whole vocabulary keeps the
output what it was. The ids are written beside the head as draft_vocab.json, the commonest first, so that
`generate.py --draft-vocab N` can take fewer. --data is a text file, or JSON lines of strings nested in any way.
"""
import argparse
import collections
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate as cli
from console import Parser, command, number, say, write_atomically
from tokenizer import Tokenizer


@command()
def main(args: argparse.Namespace) -> None:
    if args.checkpoint is None:
        from scripts.download import download_demo
        args.checkpoint = str(download_demo(log=say))
    tokenizer = Tokenizer.from_pretrained(args.checkpoint)
    out = args.out or Path(args.eagle or cli.shipped_head(args.checkpoint)) / "draft_vocab.json"
    counts = collections.Counter()
    for text in tqdm(texts_of(args.data), desc="counting", unit=" texts"):
        counts.update(tokenizer.encode(text))
    # A chat ends its turns with tokens that the text itself does not hold.
    ids = list(dict.fromkeys([*tokenizer.stop_ids, *(i for i, _ in counts.most_common())]))[:args.size]
    if not counts:
        raise ValueError(f"{args.data} holds no text")
    covered = sum(counts[i] for i in ids) / counts.total()
    write_atomically(out, json.dumps({"ids": ids, "covered": covered, "tokens_counted": counts.total()}) + "\n")
    say(f"{len(ids)} tokens cover {covered:.1%} of {counts.total()}; wrote {out}")


def texts_of(file: Path) -> Iterator[str]:
    """The strings of a JSON-lines file, or the lines of any other."""
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if file.suffix != ".jsonl":
                    yield line
                elif line.strip():
                    try:
                        yield from strings_in(json.loads(line))
                    except json.JSONDecodeError:
                        raise ValueError(f"{file}, line {number}: not JSON") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text") from None


def strings_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Count tokens and write the commonest as a draft vocabulary.")
    parser.add_argument("--checkpoint", help="whose tokenizer (default: the demo model)")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="text, or JSON lines (.jsonl)")
    parser.add_argument("--size", type=number(int, 1), default=8192, metavar="N")
    parser.add_argument("--eagle", metavar="HEAD", help="the head's folder (default: the one that ships)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: draft_vocab.json beside the head")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
