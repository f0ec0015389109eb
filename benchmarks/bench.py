"""How fast is the target here, and how near the memory's speed? A table on stdout, one JSON object in a file.

    python benchmarks/bench.py --checkpoint checkpoints/SmolLM2-135M-Instruct --json smollm2.json
    python benchmarks/bench.py --shape llama-2-7b                       # random weights: nothing to fetch
    python benchmarks/bench.py --shape llama-2-7b --trees static dynamic                # EAGLE's step too, by parts
    python benchmarks/bench.py --shape smollm2-135m --rows 1 --trees static --copy 8    # what a copied branch costs
    python benchmarks/bench.py --shape llama-3.1-8b --trees dynamic:8,10,60 --head eagle3
    python benchmarks/bench.py --shape llama-2-7b --trees static dynamic --simulate-accept 3.62 4.70   # and generations

Decoding is bound by memory, so each step is compared with the time that reading its bytes takes. A random head is
never right: --simulate-accept replays accepted lengths, a mean or those of a real run, and what it reports is labelled
as simulated. Run it alone on the machine.

Shapes: T new tokens (rows), S cache slots, H query heads, K key/value heads, G = H / K, D head dim.
"""
import argparse
import contextlib
import itertools
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import root  # noqa: F401
from benchmarks.shapes import SHAPES, TINY, meta_model, random_head, random_model
from benchmarks.simulate import accept_lengths, simulated_decoder
from benchmarks.timing import (add_run_options, clock, elapsed, environment, interleave, measure_bandwidth,
                               milliseconds, print_table, restoring, settle_run_options, spread, traced)
from checkpoint import quantize_settings, read_json, resolve_checkpoint
from config import ModelArgs
from console import Parser, command, number, say, write_atomically
from copy_branch import CopyBranch
from decoder import Decoder, Generation
from draft_tree import Tree, load_tree
from eagle_head import EagleHead
from eagle_step import EagleStep
from generate import add_exact_option, copy_length, settle_exact
from grid import Format
from linears import quantize_in_place, stored
from masks import attention_bias, bucket, causal_mask
from model import Transformer, prefill
from runtime import can_trace, capture, compile_layers, pack_for_cpu, tune
from sampling import Sampling, next_tokens

SLOTS = [128, 1024, 4096]
LONG_PROMPT = 2048          # tokens of the prefill run
ROUNDS = 5                  # runs of what takes long: prefill, decoding
LONG_HISTORY = 4096         # tokens among which a copied branch is looked up, beside --slots
STEPS = 16                  # EAGLE steps in each of them, all within the same bucket of cache slots


@command()
@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    check(args)
    report = environment(args.device, args.command) | {
        "model": args.checkpoint or args.shape, "random_weights": args.checkpoint is None,
        "dtype": str(args.dtype).removeprefix("torch."), "compiled": args.compile, "repeats": args.repeats}
    say(f"{report['device_name']}, torch {report['torch']}, commit {report['commit']}")
    report |= measure_target(args)
    if args.json:
        write_atomically(args.json, json.dumps(report, indent=1) + "\n")


def check(args: argparse.Namespace) -> None:
    """Refuse at the start what would fail after the work is done; settle what the options leave open."""
    settle_run_options(args)
    args.dtype = getattr(torch, args.dtype)
    if args.device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device}: only cpu and cuda are measured")
    if args.mode and args.checkpoint:
        raise ValueError("--mode quantises random weights: give --shape, or a --checkpoint that quantize.py wrote")
    if args.mode == "int4":
        args.group_size = args.group_size or 128
    args.config = SHAPES.get(args.shape, TINY) if args.shape else ModelArgs.from_config(
        read_json(resolve_checkpoint(args.checkpoint) / "config.json"))
    longest = args.config.block_size
    args.slots = args.slots or [n for n in SLOTS if n <= longest] or [longest]
    if max(args.slots) > longest:
        raise ValueError(f"--slots {max(args.slots)} is beyond the model's context of {longest} tokens")
    if args.prompt_tokens + args.new_tokens > longest:
        raise ValueError(f"--prompt-tokens {args.prompt_tokens} and --new-tokens {args.new_tokens} are beyond the "
                         f"model's context of {longest} tokens")
    if max(args.rows) > min(args.slots):
        raise ValueError(f"{max(args.rows)} rows do not fit in {min(args.slots)} used slots: see --rows and --slots")
    if args.copy is not None and not args.trees:
        raise ValueError("--copy needs --trees")
    for tree in args.trees:
        if load_tree(tree, args.copy).n_room + 2 > min(args.slots):
            raise ValueError(f"--trees {tree} does not fit in {min(args.slots)} used slots: see --slots")
    if args.simulate_accept and not args.trees:
        raise ValueError("--simulate-accept needs --trees")
    if args.simulate_accept and len(args.simulate_accept) not in (1, len(args.trees)):
        raise ValueError("--simulate-accept takes one value for all --trees, or one for each of them")
    if len(args.simulate_accept) == 1:
        args.simulate_accept *= len(args.trees)
    args.lengths = [accept_lengths(spec, load_tree(tree).depth + 1)
                    for spec, tree in zip(args.simulate_accept, args.trees)]
    check_memory(args)


def check_memory(args: argparse.Namespace) -> None:
    """Refuse weights that do not fit in memory, for which the system would kill the process."""
    needed = sum(p.numel() for p in meta_model(args.config, args.dtype).parameters()) * args.dtype.itemsize
    if args.device.type == "cuda":
        there = torch.cuda.get_device_properties(args.device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(f"the weights take {needed / 1e9:.0f} GB; {args.device} has {there / 1e9:.0f} GB")


# The target, and EAGLE over it


def measure_target(args: argparse.Namespace) -> dict:
    device = args.device
    bandwidth = measure_bandwidth(device)
    begin = clock(device)
    model = load(args)
    make_fast(model, model.layers, args)
    args.exact = settle_exact(args, model)
    load_seconds = clock(device) - begin
    room = max((load_tree(name, args.copy).n_room for name in args.trees), default=0)
    setup_caches(model, max(*args.slots, LONG_PROMPT, args.prompt_tokens + args.new_tokens + room))
    twin = meta_model(model.config, args.dtype, quantised(args))
    parts = list(target_parts(model, twin, args))
    head = load_head(args, model) if args.trees else None
    if head is not None:
        for tree, n_used in itertools.product(args.trees, args.slots):
            parts += eagle_parts(model, head, twin, tree, n_used, args)
            parts += copying_parts(model, head, twin, tree, n_used, args)
        parts += lookup_parts(args)
    steps = time_parts(parts, [model, *([head] if head else [])], args, bandwidth)
    n_used = args.slots[0]
    plain_step = Part("target pass", 1, n_used, 0, target_pass(model, 1, n_used))
    plain = measure_host_gap(Decoder(model, 1, compile=args.compile), plain_step, args)
    sweep = step_bytes(twin, 1, 0) / bandwidth["bytes_per_second"]
    decode, simulated = measure_generations(model, head, sweep, args)
    report = {
        "parameters": sum(p.numel() for p in meta_model(model.config, args.dtype).parameters()),
        "mode": args.mode, "group_size": args.group_size, "exact": args.exact, "head": head and head.kind,
        "head_parameters": head and sum(p.numel() for p in random_head(twin, args.shape, args.head).parameters()),
        "bandwidth": bandwidth, "load_seconds": load_seconds, "first_step_seconds": steps[0]["warmup_seconds"],
        "compile_seconds": sum(step["warmup_seconds"] for step in steps), "steps": steps,
        "prefill": measure_prefill(model, args), "decode": decode, "plain": plain,
        "eagle": [measure_eagle(model, head, twin, name, args, steps, plain) for name in args.trees if head],
        "simulated": simulated, "copying": copying_costs(steps, args),
    }
    print_target(report)
    return report


def make_fast(model: torch.nn.Module, layers: Iterable[torch.nn.Module], args: argparse.Namespace) -> None:
    """Compile or pack as generate.py does on this device."""
    if args.compile:
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # else eager code would be timed silently
        compile_layers(layers)
    else:
        pack_for_cpu(model)


NO_MATCH, COPYING = "whole step, nothing found", "whole step, copying"   # parts of a tree with a copied branch


class Part(NamedTuple):
    """Something to time: a step over static inputs, and the bytes that it has to read."""
    name: str
    n_row: int
    n_used: int | None          # cache slots; None where it reads no cache
    n_byte: int
    step: Callable[[], object]  # returns what it computes


def target_parts(model: Transformer, twin: Transformer, args: argparse.Namespace) -> Iterator[Part]:
    allocated = model.kv_cache.shape[4]
    for n_used, n_row in itertools.product(args.slots, args.rows):
        yield Part("target pass", n_row, n_used, step_bytes(twin, n_row, bucket(n_used, allocated)),
                   target_pass(model, n_row, n_used))
        cache = step_bytes(twin, 0, bucket(n_used, allocated)) - step_bytes(twin, 0, 0)
        yield Part("attention alone", n_row, n_used, cache, attention(model, n_row, n_used))
    for n_row in args.rows:
        features = torch.randn(1, n_row, model.config.dim, device=args.device, dtype=args.dtype)
        yield Part("LM head", n_row, None, lm_head_bytes(twin), lambda features=features: model.output(features))


def lm_head_bytes(twin: Transformer) -> int:
    """Bytes of the LM head as it is stored, quantised or not."""
    return sum(tensor.nbytes for tensor in stored(twin.output).values())


def target_pass(model: Transformer, n_row: int, n_used: int) -> Callable[[], torch.Tensor]:
    """The target over the last n_row of n_used slots: a plain step at one row, the verification of a draft at more."""
    device = model.inv_freq.device
    tokens = torch.randint(model.config.vocab_size, (1, n_row), device=device)
    pos = torch.arange(n_used - n_row, n_used, device=device)[None]
    produced = torch.zeros_like(tokens)
    n_slot = bucket(n_used, model.kv_cache.shape[4])

    def step() -> torch.Tensor:
        logits, _ = model(tokens, pos, mask=causal_mask(pos, n_slot))
        return produced.copy_(next_tokens(logits, Sampling()))
    return step


def attention(model: Transformer, n_row: int, n_used: int) -> Callable[[], list[torch.Tensor]]:
    """The attention of all layers over the cache, laid out as in model.Attention, without products with weights."""
    c, cache = model.config, model.kv_cache
    n_slot, group = bucket(n_used, cache.shape[4]), c.n_head // c.n_kv_head
    pos = torch.arange(n_used - n_row, n_used, device=cache.device)[None]
    q = torch.randn(1, c.n_kv_head, group * n_row, c.head_dim, device=cache.device, dtype=cache.dtype)  # [1, K, G*T, D]
    bias = attention_bias(causal_mask(pos, n_slot), group, q.dtype)
    return lambda: [F.scaled_dot_product_attention(q, k, v, attn_mask=bias) for k, v in cache[:, :, :, :, :n_slot]]


def load_head(args: argparse.Namespace, model: Transformer) -> EagleHead:
    """The head published for this shape, or one of the checkpoint's own, drafting --draft-vocab tokens."""
    head = random_head(model, args.shape, args.head)
    if args.draft_vocab:
        head.set_draft_vocab(list(range(args.draft_vocab)))
    make_fast(head, head.layers, args)
    head.setup_caches(1, model.kv_cache.shape[4])
    return head


def eagle_parts(model: Transformer, head: EagleHead, twin: Transformer, name: str, n_used: int,
                args: argparse.Namespace) -> Iterator[Part]:
    """The stages of one EAGLE step, and the whole step, over a context of n_used slots with the tree's among them.

    Without a copied branch.
    """
    tree = load_tree(name, 0)
    step, n_slot = step_at(model, head, tree, n_used, args)
    hidden, draft = step.root_hidden, step.grow(n_slot)
    logits, features = step.verify(draft, n_slot)
    ingest, level, lm_head = head_bytes(head, twin, n_slot, args.shape)
    target = step_bytes(twin, tree.n_node, n_slot)
    grow = lm_head + (tree.depth - 1) * level
    for part, n_row, n_byte, run in (
            ("grow", tree.n_node - 1, grow, lambda: step.grow(n_slot)),
            ("verify", tree.n_node, target, lambda: step.verify(draft, n_slot)),
            ("ingest", tree.depth + 1, ingest,
             lambda: step.ingest(draft.tokens[:, :tree.depth + 1], features[:, :tree.depth + 1], n_slot)),
            ("accept + commit + ingest", tree.depth + 1, ingest,
             restoring(step, lambda: step.commit(draft, features, step.accept(logits, draft), n_slot))),
            ("draft LM head", 1, lm_head, lambda: head.draft_logits(hidden)),
            ("one draft level", tree.n_child, level, draft_level(head, tree.n_child, n_used)),
            ("whole step", tree.n_node, ingest + grow + target, restoring(step, lambda: step(n_slot)))):
        yield Part(f"{name}: {part}", n_row, n_used, n_byte, run)


def step_at(model: Transformer, head: EagleHead, tree: Tree, n_used: int,
            args: argparse.Namespace) -> tuple[EagleStep, int]:
    """A step of this tree over a context of n_used slots, its own among them, and the slots that it reads."""
    step = EagleStep(model, head, tree, 1)
    with eagerly(args):
        step.prefill([random_tokens(model, n_used - tree.n_room)])
    return step, bucket(n_used, model.kv_cache.shape[4])


def copying_parts(model: Transformer, head: EagleHead, twin: Transformer, name: str, n_used: int,
                  args: argparse.Namespace) -> Iterator[Part]:
    """The whole step of a tree with a copied branch: where nothing matches, and with the branch in the pass.

    What the branch holds makes no difference to the time.
    """
    tree = load_tree(name, args.copy)
    if not tree.n_copy:
        return
    step, n_slot = step_at(model, head, tree, n_used, args)
    ingest, level, lm_head = head_bytes(head, twin, n_slot, args.shape)
    for part, copies in (NO_MATCH, False), (COPYING, True):
        n_row = tree.n_node + tree.n_copy * copies
        n_byte = ingest + lm_head + (tree.depth - 1) * level + step_bytes(twin, n_row, n_slot)
        yield Part(f"{name}: {part}", n_row, n_used, n_byte,
                   restoring(step, lambda copies=copies: step(n_slot, copies=copies)))


def lookup_parts(args: argparse.Namespace) -> Iterator[Part]:
    """What every step of a tree with a copied branch does for it: take in the new tokens, look up the last ones."""
    n_copy = max(load_tree(name, args.copy).n_copy for name in args.trees)
    for n_used in sorted({*args.slots, LONG_HISTORY}) if n_copy else ():
        n_slot = bucket(n_used, 2 * n_used)
        branch = CopyBranch(n_copy, 1, 1, n_slot, args.device, args.dtype)
        branch.begin([torch.randint(args.config.vocab_size, (n_used,)).tolist()])
        pos, new = torch.full((1, 1), n_used - n_copy - 2, device=args.device), torch.ones_like(branch.tokens)

        def run(branch: CopyBranch = branch, pos: torch.Tensor = pos, new: torch.Tensor = new,
                n_slot: int = n_slot) -> list[torch.Tensor]:
            branch.extend(pos, new)
            branch.look_up(pos + n_copy, n_slot)
            return [tensor.clone() for tensor in (branch.tokens, branch.found)]     # for a trace to keep them
        yield Part("lookup", n_copy, n_used, branch.history[:, :n_slot].nbytes, run)


def copying_costs(steps: list[dict], args: argparse.Namespace) -> list[dict]:
    """For each tree with a copied branch and number of slots: the step's times, and the lookup's share of the step.

    Where no step over LONG_HISTORY was timed, its lookup is set against a shorter one: the share is too high.
    """
    ms = {(row["part"], row["used_slots"]): row["ms_median"] for row in steps}
    found = []
    for name in args.trees:
        for lookup, n_used in (key for key in ms if key[0] == "lookup"):
            n_step = max((n for n in args.slots if n <= n_used), default=0)
            if (f"{name}: {COPYING}", n_step) in ms:
                no_match = ms[f"{name}: {NO_MATCH}", n_step]
                found.append({"tree": name, "n_copy": load_tree(name, args.copy).n_copy, "used_slots": n_used,
                              "step_used_slots": n_step, "ms_lookup": ms[lookup, n_used],
                              "ms_whole_step": ms[f"{name}: whole step", n_step], "ms_no_match": no_match,
                              "ms_copying": ms[f"{name}: {COPYING}", n_step],
                              "lookup_share": ms[lookup, n_used] / no_match})
    return found


def head_bytes(head: EagleHead, twin: Transformer, n_slot: int, shape: str | None) -> tuple[int, int, int]:
    """Bytes that the head reads to ingest accepted pairs, on each further level, and of its LM head alone.

    They are counted on models on the meta device, as a packed head has no parameters to count.
    EAGLE-3 reads fc only where it ingests, and has an LM head of its own.
    """
    c, size, empty = head.config, twin.norm.weight.element_size(), random_head(twin, shape, head.kind)
    n_draft = c.vocab_size if head.draft_ids is None else len(head.draft_ids)
    weights = sum(p.numel() for name, p in empty.named_parameters() if name not in ("fc.bias", "output.weight"))
    cache = c.n_layer * 2 * c.n_kv_head * c.head_dim * n_slot
    if head.kind == "eagle1":
        fc, lm_head = 0, lm_head_bytes(twin) * n_draft // c.vocab_size
    else:
        fc, lm_head = sum(p.numel() for p in empty.fc.parameters()), size * n_draft * c.dim
    return size * (weights + cache), size * (weights - fc + cache) + lm_head, lm_head


def draft_level(head: EagleHead, n_row: int, n_used: int) -> Callable[[], torch.Tensor]:
    """The head over n_row nodes, and the draft logits of each."""
    weight = head.fc.weight if isinstance(head.fc, torch.nn.Linear) else head.target.norm.weight
    tokens = torch.zeros(1, n_row, dtype=torch.long, device=head.inv_freq.device)
    features = torch.randn(1, n_row, head.config.dim, device=tokens.device, dtype=weight.dtype)
    pos = torch.arange(n_used - n_row, n_used, device=tokens.device)[None]
    mask = causal_mask(pos, bucket(n_used, head.kv_cache.shape[4]))
    return lambda: head.draft_logits(head(tokens, features, pos, mask=mask, is_draft=True)).argmax(-1)


def step_bytes(model: Transformer, n_row: int, n_slot: int) -> int:
    """Bytes that a pass over n_row tokens of one sequence has to read, looking at n_slot cache slots.

    These are the cache and all weights once, the LM head among them, but only n_row rows of the embedding table and
    as many experts as n_row tokens can be routed to. `model` may be on the meta device.
    """
    c, size = model.config, model.norm.weight.element_size()
    weights = sum(t.nbytes for part in (model.layers, model.norm, model.output) for t in part.state_dict().values())
    expert = sum(t[0].nbytes for t in model.layers.state_dict().values() if t.dim() == 3)  # one of each layer: w13, w2
    unread = expert * (c.n_expert - min(c.n_expert, n_row * c.n_expert_active))
    cache = c.n_layer * 2 * c.n_kv_head * n_slot * c.head_dim
    return weights - unread + size * (n_row * c.dim + cache)


def time_parts(parts: list[Part], modules: list[torch.nn.Module], args: argparse.Namespace,
               bandwidth: dict) -> list[dict]:
    """One row of the report for each part; parts take turns."""
    runs, warmup = {}, []
    for i, part in enumerate(tqdm(parts, "compile, warm up", leave=False, disable=None)):
        begin = clock(args.device)
        runs[i] = ready(part.step, args, modules)
        warmup.append(clock(args.device) - begin)
    rows, one_row = [], {}
    for part, seconds, times in zip(parts, warmup, interleave(runs, args.repeats, args.device).values()):
        median = statistics.median(times)
        if part.n_row == 1:
            one_row[part.name, part.n_used] = median
        alone = one_row.get(("target pass", part.n_used))
        rows.append({
            "part": part.name, "rows": part.n_row, "used_slots": part.n_used, **milliseconds(times),
            "relative_to_one_row": alone and median / alone, "bytes": part.n_byte,
            "bytes_per_second": part.n_byte / median,
            "bandwidth_share": part.n_byte / median / bandwidth["bytes_per_second"], "warmup_seconds": seconds,
        })
    return rows


def ready(step: Callable[[], object], args: argparse.Namespace, modules: list[torch.nn.Module]) -> Callable[[], object]:
    """`step` as Decoder runs it: its captured graph on a GPU, its trace on a CPU, compiled by calling it."""
    if args.compile and args.device.type == "cuda":
        return capture(step).replay
    step()
    if args.compile or not can_trace(modules[0]):
        return step
    return traced(step, modules)


def eagerly(args: argparse.Namespace) -> contextlib.AbstractContextManager:
    """For prefill, which Decoder does not compile either: prompts come in all lengths."""
    return torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()


def measure_prefill(model: Transformer, args: argparse.Namespace) -> dict:
    n = min(LONG_PROMPT, model.kv_cache.shape[4])
    prompt = random_tokens(model, n)
    seconds = []
    for _ in tqdm(range(ROUNDS + 1), "prefill", leave=False, disable=None):
        begin = clock(args.device)
        with eagerly(args):
            for _ in prefill(model, [prompt]):
                pass
        seconds.append(clock(args.device) - begin)
    return {"tokens": n, "tokens_per_second": n / statistics.median(seconds[1:]), **milliseconds(seconds[1:]),
            "warmup_seconds": seconds[0]}


def measure_generations(model: Transformer, head: EagleHead | None, sweep: float,
                        args: argparse.Namespace) -> tuple[dict, list[dict]]:
    """Greedy decoding end to end, plainly and by each tree with accepted lengths replayed: the host's part is included.
    ROUNDS generations of each over the same prompt take turns, after one that warms up.

    sweep: seconds to read all weights once. Returns the report's "decode" and "simulated".
    """
    prompt = random_tokens(model, args.prompt_tokens)
    decoders = {"plain": Decoder(model, 1, compile=args.compile)}
    for name, lengths in zip(args.trees, args.lengths):
        assert head is not None
        decoders[name] = simulated_decoder(model, head, load_tree(name, 0), lengths, args.compile)
    results = {name: [] for name in decoders}
    for _ in tqdm(range(ROUNDS + 1), "decode", leave=False, disable=None):
        for name, decoder in decoders.items():
            results[name].append(decoder.generate([prompt], args.new_tokens))
    first, *plain = results.pop("plain")
    decode = {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, **speeds(plain, sweep),
              "warmup_seconds": first.timings["compile_seconds"]}
    rows = [{"arm": "plain", "simulated": False, **speeds(plain, sweep)}] if results else []
    for (name, (_, *runs)), spec in zip(results.items(), args.simulate_accept):
        steps = [n for run in runs for n in run.accept_lengths[0]]
        pairs = [rate(ours) / rate(theirs) for ours, theirs in zip(runs, plain)]
        rows.append({"arm": name, "simulated": True, "simulate_accept": spec,
                     "mean_accept_length": statistics.mean(steps), **speeds(runs, sweep), **spread(pairs, "speedup")})
    return decode, rows


def rate(result: Generation) -> float:
    """Tokens a second of the decode steps. The first token comes from the prefill."""
    return (len(result.tokens[0]) - 1) / result.timings["decode_seconds"]


def speeds(results: list[Generation], sweep: float) -> dict:
    """Tokens a second, and tokens in the time that reading the target's weights once takes: plainly at most 1."""
    speed = spread([*map(rate, results)], "tokens_per_second")
    return speed | {"tokens_per_sweep": sweep * speed["tokens_per_second_median"]}


def measure_host_gap(decoder: Decoder, part: Part, args: argparse.Namespace) -> dict:
    """Decoding end to end, in turn with its step alone over as many slots: the difference is the host's time."""
    n_used, tree = args.slots[0], decoder.eagle and decoder.eagle.tree
    room = tree.n_room if tree else 1
    n_new = 1 + min(STEPS, n_used - room - 2)      # the first token comes from the prefill
    prompt = random_tokens(decoder.model, n_used - room - n_new)
    decoder.TRACE_FROM = 1      # as in a longer answer
    step = ready(part.step, args, [decoder.model, *([decoder.head] if decoder.head else [])])
    alone, wall = [], []
    for _ in tqdm(range(ROUNDS + 1), part.name, leave=False, disable=None):
        result = decoder.generate([prompt], n_new)
        wall.append(result.timings["decode_seconds"] / result.target_passes)
        alone.append(statistics.median(elapsed(step, args.device) for _ in range(n_new)))
    whole, seen = 1e3 * statistics.median(alone[1:]), 1e3 * statistics.median(wall[1:])
    return {"used_slots": n_used, "ms_whole_step": whole, "ms_wall_per_step": seen, "ms_host_gap": seen - whole}


def measure_eagle(model: Transformer, head: EagleHead, twin: Transformer, name: str, args: argparse.Namespace,
                  steps: list[dict], plain: dict) -> dict:
    """EAGLE's step as the host sees it, the share of it outside target and head, and its time over a plain step's."""
    tree = load_tree(name, 0)
    decoder = Decoder(model, 1, compile=args.compile, head=head, tree=tree)
    *_, whole = eagle_parts(model, head, twin, name, args.slots[0], args)
    row = {"tree": name} | measure_host_gap(decoder, whole, args)
    ms = {part["part"].removeprefix(f"{name}: "): part["ms_median"] for part in steps
          if part["part"].startswith(f"{name}: ") and part["used_slots"] == row["used_slots"]}
    models = ms["ingest"] + ms["draft LM head"] + (tree.depth - 1) * ms["one draft level"] + ms["verify"]
    return row | {"level_bytes": head_bytes(head, twin, bucket(args.slots[0], model.kv_cache.shape[4]), args.shape)[1],
                  "outside_models_share": 1 - models / row["ms_wall_per_step"],
                  "relative_to_plain_step": row["ms_whole_step"] / plain["ms_whole_step"]}


def print_target(report: dict) -> None:
    bandwidth, prefilled, decoded = report["bandwidth"], report["prefill"], report["decode"]
    print(f"{report['parameters'] / 1e9:.3f} B parameters, loaded in {report['load_seconds']:.1f} s, "
          f"first step after {report['first_step_seconds']:.1f} s, all shapes warm after "
          f"{report['compile_seconds']:.1f} s")
    print(f"memory: copy {bandwidth['copy_bytes_per_second'] / 1e9:.1f} GB/s (read + written), "
          f"sum {bandwidth['read_bytes_per_second'] / 1e9:.1f} GB/s (read)\n")
    print_table(["part", "rows", "used slots", "ms median", "min", "max", "x one row", "GB", "GB/s",
                 f"% of {bandwidth['yardstick']}", "warm-up s"],
                [[row["part"], row["rows"], row["used_slots"], row["ms_median"], row["ms_min"], row["ms_max"],
                  row["relative_to_one_row"], row["bytes"] / 1e9, row["bytes_per_second"] / 1e9,
                  100 * row["bandwidth_share"], row["warmup_seconds"]] for row in report["steps"]])
    print(f"\nprefill {prefilled['tokens_per_second']:.1f} tokens/s ({prefilled['tokens']} tokens), "
          f"decode {decoded['tokens_per_second_median']:.1f} tokens/s ({decoded['new_tokens']} tokens after "
          f"{decoded['prompt_tokens']}; {1e3 / decoded['tokens_per_second_median']:.3f} ms each; "
          f"{decoded['tokens_per_sweep']:.2f} in the time of reading the weights once)\n")
    print_table([f"step at {report['plain']['used_slots']} slots", "ms on the device", "ms with the host",
                 "host gap ms", "x plain", "% outside the models"],
                [[row.get("tree", "plain"), row["ms_whole_step"], row["ms_wall_per_step"], row["ms_host_gap"],
                  row.get("relative_to_plain_step"), row["outside_models_share"] * 100 if "tree" in row else None]
                 for row in [report["plain"], *report["eagle"]]])
    if report["copying"]:
        print()
        print_table(["copied branch", "nodes", "tokens of history", "lookup ms", "step's slots", "ms without a branch",
                     "nothing found", "copying", "lookup, % of a step"],
                    [[row["tree"], row["n_copy"], row["used_slots"], row["ms_lookup"], row["step_used_slots"],
                      row["ms_whole_step"], row["ms_no_match"], row["ms_copying"], 100 * row["lookup_share"]]
                     for row in report["copying"]])
    if report["simulated"]:
        print()
        print_table(["whole generations", "tokens per pass", "per sweep", "tokens/s median", "min", "max",
                     "speedup", "min", "max"],
                    [[f"{row['arm']}, accepted lengths SIMULATED" if row["simulated"] else row["arm"],
                      row.get("mean_accept_length"), row["tokens_per_sweep"],
                      *(row[f"{name}_{which}"] if f"{name}_{which}" in row else None
                        for name in ("tokens_per_second", "speedup") for which in ("median", "min", "max"))]
                     for row in report["simulated"]])


# Models


def load(args: argparse.Namespace) -> Transformer:
    if args.checkpoint:
        return Transformer.from_pretrained(args.checkpoint, args.device, args.dtype)
    model = random_model(args.config, args.device, args.dtype)
    if args.mode:
        quantize_in_place(model, Format.from_settings(quantised(args) or {}, "--mode"))
        tune(model)
    return model


def quantised(args: argparse.Namespace) -> dict | None:
    """What quantize.json says of the target: that of the checkpoint, or of --mode."""
    if args.checkpoint:
        settings = quantize_settings(resolve_checkpoint(args.checkpoint))
        return settings if "mode" in settings else None
    return {"mode": args.mode, "group_size": args.group_size} if args.mode else None


def setup_caches(model: Transformer, n_slot: int) -> None:
    """Caches full of numbers: untouched memory reads as one shared page, which stays in the processor's cache."""
    model.setup_caches(1, min(n_slot, model.config.block_size))
    model.kv_cache.normal_()


def random_tokens(model: Transformer, n: int) -> list[int]:
    return torch.randint(model.config.vocab_size, (n,), generator=torch.Generator().manual_seed(0)).tolist()


# Command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description="How fast is the target here, and how near the memory's speed?")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", help="Hugging Face folder, GGUF file or hub id")
    model.add_argument("--shape", choices=[*SHAPES, "tiny"], help="random weights of a published shape")
    parser.add_argument("--rows", type=number(int, 1), nargs="+", default=[1, 4, 8, 16, 26, 32, 60], metavar="T")
    parser.add_argument("--slots", type=number(int, 1), nargs="+", metavar="S",
                        help=f"used cache slots, the new rows among them (default: {SLOTS}, within the context)")
    parser.add_argument("--repeats", type=number(int, 1), default=20, metavar="N", help="timed runs of each step")
    parser.add_argument("--trees", nargs="+", default=[], metavar="TREE",
                        help="time EAGLE's step too, with a head of random weights: static, chain:4, dynamic, ...")
    parser.add_argument("--copy", type=copy_length, metavar="N|off",
                        help="time the step of --trees with a copied branch of N tokens too, and the lookup alone "
                        "(default: what a tree's file says)")
    parser.add_argument("--simulate-accept", nargs="+", default=[], metavar="FILE|TAU",
                        help="time whole generations with these accepted lengths: their mean, or the JSON of a real "
                        "run; one for all --trees or one for each")
    parser.add_argument("--mode", choices=("int8", "int4"), help="with --shape: round the target's weights to nearest")
    parser.add_argument("--group-size", type=number(int, 1), metavar="N", help="columns of an int4 scale (128)")
    parser.add_argument("--head", choices=("eagle1", "eagle3"), default="eagle1", help="kind of --trees' random head")
    parser.add_argument("--draft-vocab", type=number(int, 1), metavar="N",
                        help="tokens the head drafts (default: all of its vocabulary)")
    parser.add_argument("--prompt-tokens", type=number(int, 1), default=32, metavar="N", help="of the generations")
    parser.add_argument("--new-tokens", type=number(int, 1), default=128, metavar="N", help="of the generations")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add_exact_option(parser)
    add_run_options(parser)
    parser.set_defaults(command=shlex.join(["python", "benchmarks/bench.py", *argv]))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
