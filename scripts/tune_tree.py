"""Choose the static draft tree that is fastest on this device: python scripts/tune_tree.py --eagle HEAD

    python scripts/tune_tree.py --checkpoint lmsys/vicuna-7b-v1.3 --eagle heads/vicuna-7b --questions calibration.jsonl

Two measurements and a search, as in Sequoia (arXiv 2402.12374):
 1. the target answers some questions greedily; along its own words, with the head fed its own features as it would be
    while drafting, count how often the next word is the head's rank-r guess at depth d: a[d][r];
 2. time a target pass over 1, 2, 4, ... rows and a draft level, on this device;
 3. a node is worth the product of a[d][r] along its path, so the best N nodes are the N most valuable ones, and they
    are connected because no child is worth more than its parent. Try every depth and N, keep the most tokens a second.
The tree is written beside the head as tree.json, or tree-int4.json for a target in int4; generate.py picks it up.
"""
import argparse
import heapq
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate as cli
from console import Parser, command, device_name, number, say, write_atomically
from eagle_head import EagleHead, EagleStep, StaticTree
from model import Transformer, bucket, causal_mask
from replay import can_trace
from scripts.timing import traced
from train_head import draft_ranks

QUESTIONS = [
    "Why do leaves change colour in autumn?", "Write a short story about a lighthouse keeper.",
    "How do I cook rice?", "Explain the difference between a list and a tuple in Python.",
    "What were the causes of the French Revolution?", "Give me three tips for sleeping better.",
    "Write a polite email asking for a day off.", "What is 15% of 240? Show your steps.",
]


@command()
def main(args: argparse.Namespace) -> None:
    args.tree = "static"
    model, head, tokenizer, _ = cli.load(args)
    texts = QUESTIONS if args.questions is None else read_questions(args.questions)
    prompts = [cli.encode(text, tokenizer, raw=False) for text in texts]
    with torch.inference_mode():
        ranks = measure_ranks(model, head, prompts, args.max_new_tokens, tokenizer.stop_ids, args.max_depth)
        costs = measure_costs(model, head, args.max_nodes, args.used_slots, args.repeats)
    accept = rank_frequencies(ranks, args.max_rank)
    tree, report = search(accept, costs, args.max_nodes)
    out = args.out or Path(args.eagle) / cli.tree_name(args.checkpoint)
    report |= {"paths": tree, "device": device_name(model.inv_freq.device), "torch": torch.__version__,
               "dtype": args.dtype, "costs_ms": costs, "accept_by_depth_and_rank": accept}
    write_atomically(out, json.dumps(report) + "\n")
    say(f"{len(tree)} nodes below the root, depth {max(map(len, tree))}: expected {report['expected_accept_length']:.2f} "
            f"tokens a step, {report['expected_speedup']:.2f}x plain decoding on this device; wrote {out}")


def read_questions(file: Path) -> list[str]:
    """First turns of a JSON-lines question set."""
    try:
        return [json.loads(line)["turns"][0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f'{file} is not JSON lines with "turns": {error!r}') from None


def measure_ranks(model: Transformer, head: EagleHead, prompts: list[list[int]], max_new_tokens: int,
                  stop_ids: frozenset[int], max_depth: int) -> Tensor:
    """Rank of the target's next token among the head's guesses at each depth: [max_depth, positions] int64."""
    cli.setup_caches(model, None, len(prompts), max(map(len, prompts)) + max_new_tokens)
    answers = cli.Decoder(model, len(prompts)).generate(prompts, max_new_tokens, stop_ids=stop_ids).tokens
    columns = []
    for prompt, answer in tqdm(list(zip(prompts, answers)), desc="acceptance", unit="answer"):
        ids = torch.tensor(prompt + answer, device=model.inv_freq.device)
        model.setup_caches(1, len(ids))
        features = model.features(ids[None], torch.arange(len(ids), device=ids.device))[0]
        columns.append(draft_ranks(head, ids, features, max_depth)[:, len(prompt) - 2:])
    return torch.cat(columns, dim=1)


def rank_frequencies(ranks: Tensor, max_rank: int) -> list[list[float]]:
    """a[d][r]: how often rank r was right at depth d + 1, given that all before it were."""
    if ranks.shape[1] == 0:
        raise ValueError("the calibration answers are too short for this depth")
    return [[(row == r).float().mean().item() for r in range(max_rank)] for row in ranks]


def measure_costs(model: Transformer, head: EagleHead, max_nodes: int, used: int, repeats: int) -> dict:
    """Milliseconds, medians of alternating runs: a target pass by rows, one draft level, the rest of a step."""
    rows = [n for n in (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64) if n <= max_nodes + 1]
    n_slot = used + max(rows)
    cli.setup_caches(model, head, 1, n_slot)
    deep, flat = (EagleStep(model, head, StaticTree.chain(depth), 1) for depth in (5, 1))
    prompt = list(range(1, used + 1))
    deep.prefill([prompt]), flat.prefill([prompt])
    view = bucket(n_slot, n_slot)

    def target(n: int) -> Callable[[], object]:
        tokens = torch.ones(1, n, dtype=torch.long, device=model.inv_freq.device)
        pos = torch.arange(used, used + n, device=tokens.device)[None]
        mask = causal_mask(pos, view)
        return lambda: model(tokens, pos, mask=mask)

    deep_root, flat_root = deep.ingest(view), flat.ingest(view)
    draft = flat.grow(flat_root, view)
    logits, features = flat.verify(draft, view)

    def rest() -> list[Tensor]:
        hidden = flat.ingest(view)
        accepted = flat.accept(logits, draft)
        state = [tensor.clone() for tensor in flat.state]
        flat.commit(draft, features, accepted)
        return [hidden, *(tensor.copy_(value) for tensor, value in zip(flat.state, state))]

    jobs = {("target", n): target(n) for n in rows}
    jobs |= {("deep", 5): lambda: deep.grow(deep_root, view), ("flat", 1): lambda: flat.grow(flat_root, view),
             ("rest", 0): rest}
    if can_trace(model):    # as decoding runs them
        jobs = {key: traced(job, [model, head]) for key, job in jobs.items()}
    seconds = {key: [] for key in jobs}
    for _ in tqdm(range(repeats + 2), desc="timing", unit="round"):
        for key, job in jobs.items():
            start = synchronized_clock(model)
            job()
            seconds[key].append(synchronized_clock(model) - start)
    ms = {key: statistics.median(times[2:]) * 1e3 for key, times in seconds.items()}
    return {"target_by_rows": {n: ms["target", n] for n in rows}, "draft_level": (ms["deep", 5] - ms["flat", 1]) / 4,
            "first_level": ms["flat", 1], "rest": ms["rest", 0]}


def synchronized_clock(model: Transformer) -> float:
    if model.inv_freq.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def search(accept: list[list[float]], costs: dict, max_nodes: int) -> tuple[list[list[int]], dict]:
    """The paths of the best tree, and what it promises."""
    plain = costs["target_by_rows"][1]
    best = (0.0, [], 0.0)
    for depth in range(1, len(accept) + 1):
        values = best_nodes(accept[:depth], max_nodes)
        total = 1.0                                                     # the bonus token
        for n, (value, path) in enumerate(values, start=1):
            total += value
            if max(len(p) for _, p in values[:n]) < depth:
                continue                                                # a smaller depth has tried this tree
            ms = (costs["first_level"] + (depth - 1) * costs["draft_level"] + costs["rest"]
                  + interpolate(costs["target_by_rows"], n + 1))
            if total / ms > best[0]:
                best = total / ms, sorted((p for _, p in values[:n]), key=lambda p: (len(p), p)), total
    rate, paths, total = best
    return paths, {"expected_accept_length": total, "expected_speedup": rate * plain}


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


def interpolate(table: dict[int, float], x: int) -> float:
    """Linear between the measured points, flat past the last."""
    points = sorted(table.items())
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Choose the draft tree that is fastest here, and save it beside the head.")
    parser.add_argument("--checkpoint", help="Hugging Face folder or hub id (default: the demo model)")
    parser.add_argument("--eagle", nargs="?", const="", default="", metavar="HEAD", help="default: the one that ships")
    parser.add_argument("--questions", type=Path, metavar="FILE", help='JSON lines with "turns" to calibrate on')
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: tree.json or tree-MODE.json beside the head")
    parser.add_argument("--max-new-tokens", type=number(int, 16), default=128, metavar="N")
    parser.add_argument("--max-depth", type=number(int, 1), default=7, metavar="N")
    parser.add_argument("--max-rank", type=number(int, 1), default=8, metavar="N", help="children of a node")
    parser.add_argument("--max-nodes", type=number(int, 1), default=40, metavar="N", help="below the root")
    parser.add_argument("--used-slots", type=number(int, 16), default=192, metavar="N", help="context to time at")
    parser.add_argument("--repeats", type=number(int, 3), default=15, metavar="N")
    cli.add_draft_options(parser)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.set_defaults(compile=None, temperature=0.0, top_k=None, top_p=None, seed=None, chat_template=None)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
