"""How well a head drafts along answers that are there, without decoding them again.

    python benchmarks/head_alone.py --questions results/mt_bench.jsonl --eagle heads/SmolLM2-135M-Instruct \\
        --answers benchmarks/results/cpu-2core-smollm2-mtbench-exact/answers/plain.jsonl --out head.json

--answers is what scripts/evaluate.py keeps of plain decoding. Along each answer the head drafts from every position,
fed its own features, and the paper's tree takes the steps that decoding would take (train_loss.py), as long as no draft
goes past the end. Nothing is copied or timed; the head runs in the target's dtype, over the whole vocabulary unless
--draft-vocab names one.

Answers whose text is long lie in few categories. So what the tree accepts beyond position --far is set beside what it
accepts up to there in the same categories, each with as many steps as it has beyond.
"""
import argparse
import json
import shlex
import sys
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import root  # noqa: F401
from benchmarks.timing import environment
from checkpoint import demo_checkpoint
from console import Parser, check_writable, command, number, read_records, say, write_atomically
from eagle_head import EagleHead
from generate import load_draft_vocab
from model import Transformer
from runtime import pack_for_cpu
from scripts.figures import loops
from scripts.questions import read_questions
from scripts.tune_tree import features_of
from tokenizer import Tokenizer
from train_loss import PAPER_PATHS, draft_ranks, right_depths, tokens_and_steps

DEPTH = max(map(len, PAPER_PATHS))


@command()
@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    if args.out is not None:
        check_writable("--out", args.out)
    args.checkpoint = args.checkpoint or str(demo_checkpoint())
    turns_of = {question["question_id"]: question["turns"] for question in read_questions(args.questions)}
    model = Transformer.from_pretrained(args.checkpoint, "cpu", getattr(torch, args.dtype))
    pack_for_cpu(model.layers)
    head = EagleHead.from_pretrained(args.eagle, target=model)
    if args.draft_vocab is not None:
        head.set_draft_vocab(load_draft_vocab(args.draft_vocab, Path(args.eagle)))
    tokenizer = Tokenizer.from_pretrained(args.checkpoint)
    tokens, steps = Counter(), Counter()    # of a group of answers by its name, of a place by (is it far, category)
    right = total = 0
    for line, row in tqdm(list(read_records(args.answers)), unit=" questions", disable=None):
        if not isinstance(row, dict) or row.get("question_id") not in turns_of or not row.get("choices"):
            raise ValueError(f"{args.answers}, line {line}: no answer of scripts/evaluate.py to {args.questions}")
        messages, category = [], row["category"]
        for turn, (text, answer) in enumerate(zip(row["choices"][0]["turns"], row["choices"][0]["tokens"])):
            messages.append({"role": "user", "content": turns_of[row["question_id"]][turn]})
            prompt = tokenizer.apply_chat_template(messages)
            messages.append({"role": "assistant", "content": text})
            ids, features = features_of(model, prompt + answer, head.capture)
            ranks = list(zip(*draft_ranks(head, ids, features, DEPTH, begin=len(prompt) - 1).tolist()))
            first = {"first turns, 128 tokens": ranks[:127], f"first turns, {category}": ranks} if turn == 0 else {}
            groups = first | {"all": ranks, "looping" if loops(answer) else "not looping": ranks}
            for name, part in groups.items():
                n_token, n_step = tokens_and_steps(PAPER_PATHS, part)
                tokens[name] += n_token
                steps[name] += n_step
            depths, i = right_depths(PAPER_PATHS, ranks), 0
            while i < len(depths):
                place = len(prompt) + i >= args.far, category
                tokens[place] += depths[i] + 1
                steps[place] += 1
                i += depths[i] + 1
            right += sum(row[0] == 0 for row in ranks)
            total += len(ranks)
    figures = {name: tokens[name] / n for name, n in steps.items() if isinstance(name, str)}
    near, far = ({place[1]: n for place, n in steps.items() if place[0] is is_far} for is_far in (False, True))
    if far.keys() <= near.keys() and far:
        figures |= {f"up to position {args.far}": sum(tokens[False, c] for c in near) / sum(near.values()),
                    f"beyond position {args.far}": sum(tokens[True, c] for c in far) / sum(far.values()),
                    f"up to position {args.far}, in the categories beyond":
                        sum(n * tokens[False, c] / near[c] for c, n in far.items()) / sum(far.values())}
    figures["top-1"] = right / max(1, total)
    for name, figure in figures.items():
        print(f"{name:50}{figure:.3f}")
    if args.out is not None:
        facts = environment(model.inv_freq.device, shlex.join(["python", *sys.argv]))
        write_atomically(args.out, json.dumps({**facts, "figures": figures}, indent=1) + "\n")
        say(f"wrote {args.out}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Measure a head along answers that are there.")
    parser.add_argument("--answers", type=Path, required=True, metavar="FILE", help="of plain decoding, by evaluate.py")
    parser.add_argument("--questions", required=True, metavar="SET", help="that they answer, as evaluate.py takes them")
    parser.add_argument("--eagle", required=True, metavar="HEAD")
    parser.add_argument("--checkpoint", help="Hugging Face folder or hub id (default: the demo model)")
    parser.add_argument("--draft-vocab", metavar="N", help="as generate.py takes it (default: the whole vocabulary)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--far", type=number(int, 1), default=600, metavar="N", help="a position in the text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of the figures and what they were measured with")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
