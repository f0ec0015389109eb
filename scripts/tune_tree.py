"""Choose the static draft tree and the copied branch that are fastest here: python scripts/tune_tree.py --eagle HEAD

    python scripts/tune_tree.py --checkpoint lmsys/vicuna-7b-v1.3 --eagle heads/vicuna-7b --questions calibration.jsonl
    torchrun --nproc-per-node 4 scripts/tune_tree.py ...        # a target of several GPUs; what rank 0 measures decides

Two measurements and a search, as in Sequoia (arXiv 2402.12374):
 1. The target answers some questions greedily. Along each answer, with the head fed its own features as in drafting,
    count how often the next token is the head's rank-r guess at depth d: a[d][r]. How many tokens the copied branch
    (copy_branch.py) would have right at a place depends on the text alone, not on the steps that led there.
 2. Time a target pass over 1, 2, 4, ... rows, a draft level and the rest of a step, on this device.
 3. A node is worth the product of a[d][r] along its path. No child is worth more than its parent, so the N most
    valuable nodes are connected: the best tree of N nodes. Try every depth and N with every length of the branch, each
    by the steps it would have taken through these answers. Where nothing matches, a step is the tree alone.
 4. Answer the questions with the most promising pairs of tree and branch in turn, and keep the fastest. The best trees
    without a branch take part, so that what copying gains is measured. It gains most in answers that loop: all figures
    are also given for those and for the others apart.
The tree is written beside the head as tree.json, or tree-int4.json for a target in int4, where generate.py finds it.
"""
import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import root  # noqa: F401
import generate as cli
import tp
from benchmarks.timing import interleave, restoring, traced
from chat import encode
from console import Parser, add_chat_options, check_writable, command, device_name, number, say, write_atomically
from decoder import Decoder, setup_caches, slots_for
from draft_tree import StaticTree
from eagle_head import EagleHead
from eagle_step import EagleStep
from masks import bucket, causal_mask
from model import Transformer
from runtime import can_trace
from scripts.figures import loops
from scripts.questions import HUB_SETS, read_questions
from scripts.tree_search import COPY_LENGTHS, Answer, Candidate, choose_finalists, foretell, right_copies, search
from tokenizer import Tokenizer
from train_loss import draft_ranks

QUESTIONS = Path(__file__).with_name("calibration.jsonl")
ROWS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)      # of the target passes that are timed


@command(in_ranks=True)
def main(args: argparse.Namespace) -> None:
    args.tree = "static"
    if tp.writes() and args.out is not None:
        check_writable("--out", args.out)
    questions = tp.on_rank_0(lambda: read_questions(args.questions))
    model, head, tokenizer, _ = cli.load(args)
    assert head is not None     # --eagle has a default
    texts = [question["turns"][0] for question in questions]
    prompts = encode_all(texts, tokenizer, model.config.block_size - args.max_new_tokens)
    cli.say_head(head)
    with torch.inference_mode():
        tokens = answer_all(model, prompts, args.max_new_tokens, tokenizer.stop_ids)
        guesses = measure_ranks(model, head, prompts, tokens, args.max_depth)
        accept = rank_frequencies(torch.cat(guesses, dim=1), args.max_rank)
        costs = measure_costs(model, head, args.max_nodes, args.used_slots, args.repeats)
        costs = tp.on_rank_0(lambda: costs)      # each has its own clock, and all must choose the same trees
        answers = [Answer(list(zip(*ranks.tolist())), right_copies(prompt, answer), loops(answer))
                   for ranks, prompt, answer in zip(guesses, prompts, tokens)]
        finalists = choose_finalists(search(accept, answers, costs, args.max_nodes))
        decoded = measure_decoding(model, head, finalists, prompts, args, tokenizer.stop_ids)
    if tp.writes():
        write_tree(args, finalists, decoded, answers, {
            "device": device_name(model.inv_freq.device), "torch": torch.__version__, "dtype": args.dtype,
            "draft_mode": args.draft_mode, "costs_ms": costs, "accept_by_depth_and_rank": accept})


def write_tree(args: argparse.Namespace, finalists: list[Candidate], decoded: "Decoded", answers: list[Answer],
               measured: dict) -> None:
    """The fastest of the finalists, with figures of all answers, of the looping ones and of the others."""
    everything = list(range(len(answers)))
    rates, lengths = decoded.of(everything)
    pairs = range(len(finalists))       # pair i is arm i + 1; arm 0 is plain decoding
    first = max(pairs, key=lambda i: rates[i + 1])
    alone = max((i for i in pairs if not finalists[i].n_copy), key=lambda i: rates[i + 1])
    best, costs = finalists[first], measured["costs_ms"]

    def figures_of(group: list[int]) -> dict:
        foretold, without = foretell(best.paths, [answers[i] for i in group], costs, (best.n_copy, 0))
        rates, lengths = decoded.of(group)
        return {"answers": len(group), "expected_accept_length": foretold.accept_length,
                "expected_accept_length_without_copying": without.accept_length,    # of the same tree
                "foretold_speedup": foretold.rate * costs["target_by_rows"][1],
                "accept_length": lengths[first + 1], "speedup": rates[first + 1] / rates[0],
                "best_without_copying": {"accept_length": lengths[alone + 1], "speedup": rates[alone + 1] / rates[0]}}

    groups = {"all": everything, "looping": [i for i in everything if answers[i].is_looping],
              "others": [i for i in everything if not answers[i].is_looping]}
    figures = {name: figures_of(group) for name, group in groups.items() if group}
    out = args.out or Path(args.eagle) / cli.tree_name(args.checkpoint)
    write_atomically(out, json.dumps({
        "paths": best.paths, "copy": best.n_copy, "expected_accept_length": best.accept_length,
        "expected_speedup": figures["all"]["speedup"], "figures": figures,
        "finalists": [{"paths": pair.paths, "copy": pair.n_copy, "tokens_per_second": rate, "accept_length": length,
                       "foretold_tokens_per_second": 1e3 * pair.rate, "expected_accept_length": pair.accept_length}
                      for pair, rate, length in zip(finalists, rates[1:], lengths[1:])],
        "plain_tokens_per_second": rates[0], **measured}) + "\n")
    say(f"{describe(best, figures)}; wrote {out}")


def describe(best: Candidate, figures: dict[str, dict]) -> str:
    """The result in one line, from what was measured."""
    def text(f: dict) -> str:
        alone = f["best_without_copying"]
        return (f"{f['accept_length']:.2f} tokens a step, {f['speedup']:.2f}x plain decoding"
                + f" (without copying {alone['accept_length']:.2f}, {alone['speedup']:.2f}x)" * bool(best.n_copy))

    gain, alone = (f["speedup"] - 1 for f in (figures["all"], figures["all"]["best_without_copying"]))
    parts = [f"{len(best.paths)} nodes below the root, depth {max(map(len, best.paths))}, "
             + (f"a copied branch of {best.n_copy}" if best.n_copy else "no copied branch")
             + f": {text(figures['all'])} on these questions and this device"]
    if best.n_copy and gain > 0:
        parts.append(f"copying is {(gain - alone) / gain:.0%} of the gain")
    parts += [f"{figures[name]['answers']} {kind}: {text(figures[name])}"
              for name, kind in (("looping", "looping answers"), ("others", "others")) if name in figures]
    return "; ".join(parts)


def encode_all(texts: list[str], tokenizer: Tokenizer, room: int, raw: bool = False) -> list[list[int]]:
    """Prompts of at most `room` tokens; longer ones are left out by name."""
    prompts = [encode(text, tokenizer, raw) for text in texts]
    for n, prompt in enumerate(prompts, start=1):
        if len(prompt) > room:
            say(f"question {n} has {len(prompt)} tokens, more than the {room} that leave room for an answer: left out")
    if not (prompts := [prompt for prompt in prompts if len(prompt) <= room]):
        raise ValueError("no question leaves room for an answer: see --max-new-tokens")
    return prompts


def answer_all(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
               stop_ids: frozenset[int]) -> list[list[int]]:
    """The target's own answers, greedily."""
    setup_caches(model, None, len(prompts), max(map(len, prompts)) + max_new_tokens)
    return Decoder(model, len(prompts)).generate(prompts, max_new_tokens, stop_ids=stop_ids).tokens


def measure_ranks(model: Transformer, head: EagleHead, prompts: list[list[int]], answers: list[list[int]],
                  max_depth: int) -> list[Tensor]:
    """Rank of the target's next token among the head's guesses at each depth: of each answer [max_depth, positions].

    The first position is that of the answer's first token, which the prefill makes: the root of the first step.
    """
    columns = []
    for prompt, answer in tqdm(list(zip(prompts, answers)), desc="acceptance", unit="answer"):
        ids, features = features_of(model, prompt + answer, head.capture)
        columns.append(draft_ranks(head, ids, features, max_depth, begin=len(prompt) - 1))
    return columns


def features_of(model: Transformer, tokens: list[int], capture: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A text's ids [T] and what a head with this `capture` reads of it, [T, ...], in one pass of the target."""
    ids = torch.tensor(tokens, device=model.inv_freq.device)
    model.setup_caches(1, len(ids))
    return ids, model.features(ids[None], torch.arange(len(ids), device=ids.device), capture=capture)[0]


def rank_frequencies(ranks: Tensor, max_rank: int) -> list[list[float]]:
    """a[d][r]: how often rank r was right at depth d + 1, given that all before it were."""
    if ranks.shape[1] == 0:
        raise ValueError("the calibration answers are too short for this depth")
    return [[(row == r).float().mean().item() for r in range(max_rank)] for row in ranks]


def measure_costs(model: Transformer, head: EagleHead, max_nodes: int, used: int, repeats: int) -> dict:
    """Milliseconds, medians of alternating runs: a target pass by rows, one draft level, the rest of a step.

    The rest is to accept, to move keys, to take the tokens into the head and to look up what to copy: without a branch,
    with one where nothing matches, and with one that is verified, by its length.
    """
    most = max_nodes + 1 + max(COPY_LENGTHS)
    rows = [n for n in ROWS if n < most] + [most]
    n_slot = used + most
    setup_caches(model, head, 1, n_slot)
    deep = EagleStep(model, head, StaticTree.chain(5), 1)
    steps = {n: EagleStep(model, head, replace(StaticTree.chain(1), n_copy=n), 1) for n in COPY_LENGTHS}
    flat = steps[0]
    prompt = list(range(1, used + 1))
    for step in (deep, *steps.values()):
        step.prefill([prompt])
    view = bucket(n_slot, n_slot)

    def target(n: int) -> Callable[[], object]:
        tokens = torch.ones(1, n, dtype=torch.long, device=model.inv_freq.device)
        pos = torch.arange(used, used + n, device=tokens.device)[None]
        mask = causal_mask(pos, view)
        return lambda: model(tokens, pos, mask=mask, capture=head.capture)

    draft = flat.grow(view)

    def rest(step: EagleStep, copies: bool) -> Callable[[], object]:
        whole = lambda: step.branch.graft(draft) if copies and step.branch is not None else draft
        logits, features = step.verify(whole(), view)

        def run() -> None:
            verified = whole()
            step.commit(verified, features, step.accept(logits, verified), view)
        return restoring(step, run)

    jobs = {("target", n): target(n) for n in rows}
    jobs |= {("deep", 5): lambda: deep.grow(view), ("flat", 1): lambda: flat.grow(view)}
    jobs |= {("rest", n): rest(step, copies=True) for n, step in steps.items()}
    jobs["no match", 0] = rest(steps[max(COPY_LENGTHS)], copies=False)
    if can_trace(model):    # as decoding runs them
        jobs = {key: traced(job, [model, head]) for key, job in jobs.items()}
    times = interleave(jobs, repeats, model.inv_freq.device)
    ms = {key: statistics.median(seconds) * 1e3 for key, seconds in times.items()}
    return {"target_by_rows": {n: ms["target", n] for n in rows}, "draft_level": (ms["deep", 5] - ms["flat", 1]) / 4,
            "first_level": ms["flat", 1], "rest": ms["rest", 0], "rest_without_match": ms["no match", 0],
            "rest_by_copy": {n: ms["rest", n] for n in COPY_LENGTHS if n}}


class Decoded(NamedTuple):
    """What was measured, [arms, answers]: plain decoding in arm 0, then the finalists."""
    tokens: np.ndarray
    seconds: np.ndarray
    steps: np.ndarray
    produced: np.ndarray        # tokens of these steps, before any cut

    def of(self, wanted: list[int]) -> tuple[list[float], list[float]]:
        """Tokens a second and tokens a step of each arm, over the wanted answers."""
        tokens, seconds, steps, produced = (part[:, wanted].sum(1) for part in self)
        return (tokens / seconds).tolist(), (produced / steps.clip(1)).tolist()


def measure_decoding(model: Transformer, head: EagleHead, finalists: list[Candidate], prompts: list[list[int]],
                     args: argparse.Namespace, stop_ids: frozenset[int]) -> Decoded:
    """Plain decoding, and EAGLE with each pair of tree and branch; all answer each prompt in turn."""
    shapes = [None, *(replace(StaticTree.from_paths(pair.paths), n_copy=pair.n_copy) for pair in finalists)]
    room = max(tree.n_room for tree in shapes[1:])
    setup_caches(model, head, 1, slots_for(max(map(len, prompts)) + args.max_new_tokens + room, model))
    decoders = [Decoder(model, 1, compile=args.compile, head=tree and head, tree=tree) for tree in shapes]
    for decoder in decoders:
        decoder.TRACE_FROM = 1      # one trace for all the answers
        decoder.generate(prompts[:1], args.max_new_tokens)      # warm up
    measured = []
    for prompt in tqdm(prompts, desc="decoding", unit="answer"):
        results = [decoder.generate([prompt], args.max_new_tokens, stop_ids=stop_ids) for decoder in decoders]
        measured.append([(len(result.tokens[0]), result.timings["decode_seconds"], result.target_passes,
                          sum(result.accept_lengths[0])) for result in results])
    return Decoded(*np.array(measured).transpose(2, 1, 0))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Choose the draft tree that is fastest here, and save it beside the head.")
    parser.add_argument("--checkpoint", help="Hugging Face folder, GGUF file or hub id (default: the demo model)")
    parser.add_argument("--eagle", nargs="?", const="", default="", metavar="HEAD", help="default: the one that ships")
    parser.add_argument("--questions", default=str(QUESTIONS), metavar="SET",
                        help=f"to calibrate on: {', '.join(HUB_SETS)}, or a file in MT-bench's form")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: tree.json or tree-MODE.json beside the head")
    parser.add_argument("--max-new-tokens", type=number(int, 16), default=128, metavar="N")
    parser.add_argument("--max-depth", type=number(int, 1), default=7, metavar="N")
    parser.add_argument("--max-rank", type=number(int, 1), default=8, metavar="N", help="children of a node")
    parser.add_argument("--max-nodes", type=number(int, 1), default=40, metavar="N", help="below the root")
    parser.add_argument("--used-slots", type=number(int, 16), default=192, metavar="N", help="context to time at")
    parser.add_argument("--repeats", type=number(int, 3), default=15, metavar="N")
    cli.add_draft_options(parser)
    add_chat_options(parser)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.set_defaults(compile=None, temperature=0.0, top_k=None, top_p=None, seed=None, exact=None)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(tp.run(main, parse_args()))
