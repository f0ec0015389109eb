"""What recording the steps costs: the same answers by a decoder that records and by one that does not, in turn.

    python benchmarks/recording.py --eagle heads/SmolLM2-135M-Instruct --json recording.json
    python benchmarks/recording.py --checkpoint C --eagle HEAD --tree dynamic --repeats 3

The texts are those of scripts/calibration.jsonl. Each pair of runs of one text gives a ratio; which of the two comes
first changes from round to round. Printed: the median of the ratios, and its 95% interval by a bootstrap over texts.
"""
import argparse
import json
import random
import shlex
import statistics
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import root  # noqa: F401
import generate as cli
from benchmarks.timing import environment
from chat import encode
from console import Parser, add_chat_options, check_writable, command, number, say, write_atomically
from decoder import Decoder, setup_caches, slots_for, tree_of
from scripts.questions import read_questions


@command()
@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    if args.json is not None:
        check_writable("--json", args.json)
    questions = read_questions(str(Path(cli.__file__).parent / "scripts" / "calibration.jsonl"))[:args.limit]
    model, head, tokenizer, run = cli.load(args)
    prompts = [encode(question["turns"][0], tokenizer, raw=False) for question in questions]
    tree = tree_of(args.tree, cli.copy_length_of(args.tree), head)
    assert tree is not None     # --eagle has a default
    setup_caches(model, head, 1, slots_for(max(map(len, prompts)) + args.max_new_tokens + tree.n_room, model))
    decoders = [Decoder(model, 1, head=head, tree=tree, compile=args.compile, record=record)
                for record in (False, True)]

    def seconds(record: bool, prompt: list[int]) -> float:
        return decoders[record].generate([prompt], args.max_new_tokens, stop_ids=tokenizer.stop_ids
                                         ).timings["decode_seconds"]

    for record in (False, True):    # compiles, traces or captures
        seconds(record, prompts[0])
    ratios: list[list[float]] = [[] for _ in prompts]
    for n in tqdm(range(args.repeats * len(prompts)), "answers", disable=None):
        order = (False, True) if n // len(prompts) % 2 == n % 2 else (True, False)
        took = {record: seconds(record, prompts[n % len(prompts)]) for record in order}
        ratios[n % len(prompts)].append(took[True] / took[False])
    means = [statistics.median(of_one) for of_one in ratios]
    random.seed(0)
    medians = sorted(statistics.median(random.choices(means, k=len(means))) for _ in range(2000))
    report = run | environment(model.inv_freq.device, args.command) | {
        "ratio": statistics.median(means), "interval": [medians[50], medians[1949]], "ratios": ratios,
        "max_new_tokens": args.max_new_tokens}
    say(f"seconds when recorded, of those when not: {report['ratio']:.4f} "
        f"({medians[50]:.4f} to {medians[1949]:.4f}), {len(prompts)} texts, {args.repeats} pairs each")
    if args.json is not None:
        write_atomically(args.json, json.dumps(report, indent=1) + "\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Measure what recording the steps of EAGLE costs.")
    parser.add_argument("--checkpoint", help="Hugging Face folder, GGUF file or hub id (default: the demo model)")
    parser.add_argument("--eagle", nargs="?", default="", const="", metavar="HEAD", help="default: the one that ships")
    parser.add_argument("--tree", metavar="TREE", help="as in generate.py (default: the one beside the head)")
    parser.add_argument("--limit", type=number(int, 1), default=24, metavar="N", help="texts; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=128, metavar="N")
    parser.add_argument("--repeats", type=number(int, 1), default=4, metavar="N", help="pairs of a text")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    cli.add_draft_options(parser)
    cli.add_exact_option(parser)
    add_chat_options(parser)
    argv = sys.argv[1:] if argv is None else argv
    parser.set_defaults(temperature=0.0, top_k=None, top_p=None, seed=None,
                        command=shlex.join(["python", "benchmarks/recording.py", *argv]))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
