"""Choose the static draft tree that is fastest on this device: python scripts/tune_tree.py --eagle HEAD

    python scripts/tune_tree.py --checkpoint lmsys/vicuna-7b-v1.3 --eagle heads/vicuna-7b --questions calibration.jsonl
    torchrun --nproc-per-node 4 scripts/tune_tree.py ...        # a target of several GPUs; what rank 0 measures decides

Two measurements and a search, as in Sequoia (arXiv 2402.12374):
 1. The target answers some questions greedily. Along each answer, with the head fed its own features as in drafting,
    count how often the next token is the head's rank-r guess at depth d: a[d][r].
 2. Time a target pass over 1, 2, 4, ... rows and a draft level, on this device.
 3. A node is worth the product of a[d][r] along its path. No child is worth more than its parent, so the N most
    valuable nodes are connected: the best tree of N nodes. Try every depth and N, each by the steps it would have taken
    through these answers.
 4. Answer the questions with the most promising trees in turn, and keep the fastest.
The tree is written beside the head as tree.json, or tree-int4.json for a target in int4, where generate.py finds it.
"""
import argparse
import heapq
import json
import statistics
import sys
from collections.abc import Callable
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
from model import Transformer, bucket, causal_mask
from runtime import can_trace
from scripts.questions import HUB_SETS, read_questions
from tokenizer import Tokenizer
from train_loss import draft_ranks

QUESTIONS = Path(__file__).with_name("calibration.jsonl")
FINALISTS = 5   # trees that answer the questions


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
        guesses = measure_ranks(model, head, prompts, args.max_new_tokens, tokenizer.stop_ids, args.max_depth)
        accept = rank_frequencies(torch.cat(guesses, dim=1), args.max_rank)
        costs = measure_costs(model, head, args.max_nodes, args.used_slots, args.repeats)
        costs = tp.on_rank_0(lambda: costs)      # each has its own clock, and all must choose the same trees
        answers = [list(zip(*answer.tolist())) for answer in guesses]
        finalists = search(accept, answers, costs, args.max_nodes)[:FINALISTS]
        trees = [finalist.paths for finalist in finalists]
        rates = measure_decoding(model, head, trees, prompts, args, tokenizer.stop_ids)
    if tp.writes():
        write_tree(args, finalists, rates, {"device": device_name(model.inv_freq.device), "torch": torch.__version__,
                                            "dtype": args.dtype, "draft_mode": args.draft_mode, "costs_ms": costs,
                                            "accept_by_depth_and_rank": accept})


def write_tree(args: argparse.Namespace, finalists: list["Candidate"], rates: list[float], measured: dict) -> None:
    """The fastest of the finalists. rates: tokens a second, plain decoding's and theirs."""
    plain, *rates = rates
    rate, best = max(zip(rates, finalists), key=lambda pair: pair[0])
    out = args.out or Path(args.eagle) / cli.tree_name(args.checkpoint)
    write_atomically(out, json.dumps({
        "expected_accept_length": best.accept_length, "expected_speedup": rate / plain, "paths": best.paths,
        "finalists": [{"paths": tree.paths, "tokens_per_second": rate} for tree, rate in zip(finalists, rates)],
        "plain_tokens_per_second": plain, **measured}) + "\n")
    say(f"{len(best.paths)} nodes below the root, depth {max(map(len, best.paths))}: {best.accept_length:.2f} tokens a "
        f"step, {rate / plain:.2f}x plain decoding on these questions and this device; wrote {out}")


def encode_all(texts: list[str], tokenizer: Tokenizer, room: int, raw: bool = False) -> list[list[int]]:
    """Prompts of at most `room` tokens; longer ones are left out by name."""
    prompts = [encode(text, tokenizer, raw) for text in texts]
    for n, prompt in enumerate(prompts, start=1):
        if len(prompt) > room:
            say(f"question {n} has {len(prompt)} tokens, more than the {room} that leave room for an answer: left out")
    if not (prompts := [prompt for prompt in prompts if len(prompt) <= room]):
        raise ValueError("no question leaves room for an answer: see --max-new-tokens")
    return prompts


def measure_ranks(model: Transformer, head: EagleHead, prompts: list[list[int]], max_new_tokens: int,
                  stop_ids: frozenset[int], max_depth: int) -> list[Tensor]:
    """Rank of the target's next token among the head's guesses at each depth: of each answer [max_depth, positions]."""
    setup_caches(model, None, len(prompts), max(map(len, prompts)) + max_new_tokens)
    answers = Decoder(model, len(prompts)).generate(prompts, max_new_tokens, stop_ids=stop_ids).tokens
    columns = []
    for prompt, answer in tqdm(list(zip(prompts, answers)), desc="acceptance", unit="answer"):
        ids, features = features_of(model, prompt + answer, head.capture)
        columns.append(draft_ranks(head, ids, features, max_depth, begin=len(prompt) - 2))
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
    """Milliseconds, medians of alternating runs: a target pass by rows, one draft level, the rest of a step."""
    rows = [n for n in (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64) if n <= max_nodes + 1]
    deep, flat = (EagleStep(model, head, StaticTree.chain(depth), 1) for depth in (5, 1))
    n_slot = used + max(*rows, deep.tree.n_room)
    setup_caches(model, head, 1, n_slot)
    prompt = list(range(1, used + 1))
    for step in (deep, flat):
        step.prefill([prompt])
    view = bucket(n_slot, n_slot)

    def target(n: int) -> Callable[[], object]:
        tokens = torch.ones(1, n, dtype=torch.long, device=model.inv_freq.device)
        pos = torch.arange(used, used + n, device=tokens.device)[None]
        mask = causal_mask(pos, view)
        return lambda: model(tokens, pos, mask=mask, capture=head.capture)

    draft = flat.grow(view)
    logits, features = flat.verify(draft, view)

    def rest() -> None:
        flat.commit(draft, features, flat.accept(logits, draft), view)

    jobs = {("target", n): target(n) for n in rows}
    jobs |= {("deep", 5): lambda: deep.grow(view), ("flat", 1): lambda: flat.grow(view),
             ("rest", 0): restoring(flat, rest)}
    if can_trace(model):    # as decoding runs them
        jobs = {key: traced(job, [model, head]) for key, job in jobs.items()}
    times = interleave(jobs, repeats, model.inv_freq.device)
    ms = {key: statistics.median(seconds) * 1e3 for key, seconds in times.items()}
    return {"target_by_rows": {n: ms["target", n] for n in rows}, "draft_level": (ms["deep", 5] - ms["flat", 1]) / 4,
            "first_level": ms["flat", 1], "rest": ms["rest", 0]}


def measure_decoding(model: Transformer, head: EagleHead, trees: list[list[list[int]]], prompts: list[list[int]],
                     args: argparse.Namespace, stop_ids: frozenset[int]) -> list[float]:
    """Tokens a second of plain decoding, and of EAGLE with each tree; all answer each prompt in turn."""
    shapes = [None, *map(StaticTree.from_paths, trees)]
    room = max(tree.n_room for tree in shapes[1:])
    setup_caches(model, head, 1, slots_for(max(map(len, prompts)) + args.max_new_tokens + room, model))
    decoders = [Decoder(model, 1, compile=args.compile, head=tree and head, tree=tree) for tree in shapes]
    for decoder in decoders:
        decoder.TRACE_FROM = 1      # one trace for all the answers
        decoder.generate(prompts[:1], args.max_new_tokens)      # warm up
    tokens, seconds = [0] * len(decoders), [0.0] * len(decoders)
    for prompt in tqdm(prompts, desc="decoding", unit="answer"):
        for i, decoder in enumerate(decoders):
            result = decoder.generate([prompt], args.max_new_tokens, stop_ids=stop_ids)
            tokens[i] += len(result.tokens[0])
            seconds[i] += result.timings["decode_seconds"]
    return [n / s for n, s in zip(tokens, seconds)]


class Candidate(NamedTuple):
    rate: float                 # tokens a millisecond, by the parts' costs
    accept_length: float
    paths: list[list[int]]


def search(accept: list[list[float]], answers: list[list[tuple[int, ...]]], costs: dict,
           max_nodes: int) -> list[Candidate]:
    """For each number of nodes the tree that promises most, the most promising first.

    accept   a[d][r], by which nodes are ordered
    answers  for each position the ranks of the tokens that follow: see `accept_lengths`
    """
    best: dict[int, Candidate] = {}
    rows = sorted(costs["target_by_rows"])
    pass_ms = [costs["target_by_rows"][n] for n in rows]
    for depth in range(1, len(accept) + 1):
        paths = [path for _, path in best_nodes(accept[:depth], max_nodes)]
        for n in range(1, len(paths) + 1):
            if max(map(len, paths[:n])) < depth:
                continue                                                # a smaller depth has tried this tree
            tree = set(map(tuple, paths[:n]))
            lengths = [length for answer in answers for length in accept_lengths(tree, answer)]
            ms = (costs["first_level"] + (depth - 1) * costs["draft_level"] + costs["rest"]
                  + float(np.interp(n + 1, rows, pass_ms)))     # linear between the measured numbers of rows
            mean = sum(lengths) / len(lengths)
            if n not in best or mean / ms > best[n].rate:
                best[n] = Candidate(mean / ms, mean, sorted(paths[:n], key=lambda p: (len(p), p)))
    return sorted(best.values(), reverse=True)


def accept_lengths(tree: set[tuple[int, ...]], ranks: list[tuple[int, ...]]) -> list[int]:
    """Tokens of each step, the bonus among them, if an answer were decoded with this tree.

    ranks[i]: ranks of the tokens after position i, each among the guesses at its depth. A mean over all positions would
    promise too much: stretches that are easy to draft hold most positions, and take few steps.
    """
    lengths, i = [], 0
    while i < len(ranks):
        depth = next((d for d in range(len(ranks[i])) if ranks[i][:d + 1] not in tree), len(ranks[i]))
        lengths.append(depth + 1)
        i += depth + 1
    return lengths


def best_nodes(accept: list[list[float]], count: int) -> list[tuple[float, list[int]]]:
    """The `count` most valuable nodes, best first, from a frontier of the nodes whose parent is taken."""
    frontier = [(-value, [rank]) for rank, value in enumerate(accept[0])]
    heapq.heapify(frontier)
    taken = []
    while frontier and len(taken) < count:
        value, path = heapq.heappop(frontier)
        taken.append((-value, path))
        if len(path) < len(accept):
            for rank, factor in enumerate(accept[len(path)]):
                heapq.heappush(frontier, (value * factor, [*path, rank]))
    return taken


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Choose the draft tree that is fastest here, and save it beside the head.")
    parser.add_argument("--checkpoint", help="Hugging Face folder or hub id (default: the demo model)")
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
    parser.set_defaults(compile=None, temperature=0.0, top_k=None, top_p=None, seed=None)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(tp.run(main, parse_args()))
