"""How fast is the target here, and how near the memory's speed? A table on stdout, one JSON object in a file.

    python scripts/bench.py --checkpoint checkpoints/SmolLM2-135M-Instruct --json benchmarks/smollm2.json
    python scripts/bench.py --shape llama-2-7b --json benchmarks/llama-2-7b.json     # random weights: nothing to fetch
    python scripts/bench.py --shape smollm2-135m --slots 128 --variants eager packed block whole
    python scripts/bench.py --shape llama-2-7b --trees static dynamic --accept-length 3.62 4.70  # EAGLE, by parts
    python scripts/bench.py --checkpoint checkpoints/SmolLM2-135M-Instruct --peer    # against transformers

Decoding is bound by memory, so a step is set against the time that only reading what it must read would take. Times
are medians of runs that alternate between all that is compared, so that a drifting clock or a neighbour on the machine
hits all alike. With --variants, compilation starts from an empty cache; with --compile-cache FOLDER too, the second
run shows how long it takes from a filled one. Run it alone on the machine.

Shapes: T new tokens (rows), S cache slots.
"""
import argparse
import copy
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from tqdm import tqdm

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))
from eagle_head import EagleHead, EagleStep, load_tree  # noqa: E402
from generate import (Decoder, Parser, capture, common_prefix, compile_layers, device_name,  # noqa: E402
                      number, pick_device, say, write_atomically)
from model import (ModelArgs, PackedLinear, Sampling, Transformer, bucket, causal_mask, next_tokens,  # noqa: E402
                   pack_for_cpu, prefill, read_json, resolve_checkpoint)

SLOTS = [128, 1024, 4096]
PROMPT, NEW = 32, 128       # tokens of the decoding runs
LONG_PROMPT = 2048          # tokens of the prefill run
BUFFER = {"cuda": 1 << 30, "cpu": 1 << 28}  # bytes copied and summed to measure bandwidth: far beyond any cache
ROUNDS = 5                  # runs of what takes long: prefill, decoding
STEPS = 16                  # EAGLE steps in each of them, all within the same bucket of cache slots


def shape(dim: int, n_layer: int, n_head: int, n_kv_head: int, intermediate_size: int, vocab_size: int,
          block_size: int, **others) -> ModelArgs:
    facts = {"model_type": "llama", "norm_eps": 1e-5, "rope_theta": 1e4} | others
    return ModelArgs(dim=dim, n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, head_dim=dim // n_head,
                     intermediate_size=intermediate_size, vocab_size=vocab_size, block_size=block_size, **facts)


SHAPES = {  # from the published config.json files
    "llama-2-7b": shape(4096, 32, 32, 32, 11008, 32000, 4096),
    "llama-2-13b": shape(5120, 40, 40, 40, 13824, 32000, 4096),
    "llama-2-70b": shape(8192, 80, 64, 8, 28672, 32000, 4096),
    "llama-3-8b": shape(4096, 32, 32, 8, 14336, 128256, 8192, rope_theta=5e5),
    "llama-3-70b": shape(8192, 80, 64, 8, 28672, 128256, 8192, rope_theta=5e5),
    "vicuna-33b": shape(6656, 60, 52, 52, 17920, 32000, 2048, norm_eps=1e-6),
    "mixtral-8x7b": shape(4096, 32, 32, 8, 14336, 32000, 32768, rope_theta=1e6, model_type="mixtral", n_expert=8,
                          n_expert_active=2),
    "smollm2-135m": shape(576, 30, 9, 3, 1536, 49152, 8192, rope_theta=1e5, tie_word_embeddings=True),
}


@torch.inference_mode()
def main(args: argparse.Namespace) -> int:
    """Exit status: 0; 2 with one line for what the user can mend; 130 on Ctrl-C."""
    try:
        check(args)
        report = environment(args)
        say(f"{report['device_name']}, torch {report['torch']}, commit {report['commit']}")
        measure = compare_variants if args.variants else compare_peer if args.peer else measure_target
        report |= measure(args)
        if args.json:
            write_atomically(args.json, json.dumps(report, indent=1) + "\n")
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        say(f"error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:
        say("")
        return 130
    return 0


def check(args: argparse.Namespace) -> None:
    """Refuse at the start what would fail after the work is done; settle what the options leave open."""
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise ValueError(f"--json {args.json}: not a file in an existing folder")
    if args.peer and not args.checkpoint:
        raise ValueError("--peer needs a real --checkpoint: transformers loads it too")
    args.device, args.dtype = pick_device(args.device), getattr(torch, args.dtype)
    if args.device.type not in BUFFER:
        raise ValueError(f"--device {args.device}: only cpu and cuda are measured")
    args.compile = args.device.type == "cuda" if args.compile is None else args.compile
    args.config = SHAPES[args.shape] if args.shape else ModelArgs.from_config(
        read_json(resolve_checkpoint(args.checkpoint) / "config.json"))
    longest = context(args.config)
    args.slots = args.slots or [n for n in SLOTS if n <= longest] or [longest]
    if max(args.slots) > longest:
        raise ValueError(f"--slots {max(args.slots)} is beyond the model's context of {longest} tokens")
    if max(args.rows) > min(args.slots):
        raise ValueError(f"{max(args.rows)} rows do not fit in {min(args.slots)} used slots: see --rows and --slots")
    for tree in args.trees:
        if load_tree(tree).n_room + 2 > min(args.slots):
            raise ValueError(f"--trees {tree} does not fit in {min(args.slots)} used slots: see --slots")
    check_memory(args)


def check_memory(args: argparse.Namespace) -> None:
    """A clear line instead of a process killed by the system."""
    needed = sum(p.numel() for p in meta_model(args.config, args.dtype).parameters()) * args.dtype.itemsize
    if args.device.type == "cuda":
        there = torch.cuda.get_device_properties(args.device).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(f"the weights take {needed / 1e9:.0f} GB; {args.device} has {there / 1e9:.0f} GB")


def environment(args: argparse.Namespace) -> dict:
    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", REPO, *command], capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a clone, or no git
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "command": args.command, "commit": commit,
        "device": str(args.device), "device_name": device_name(args.device), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(), "model": args.checkpoint or args.shape,
        "random_weights": args.checkpoint is None, "dtype": str(args.dtype).removeprefix("torch."),
        "compiled": args.compile, "repeats": args.repeats,
    }


# The target on its own


def measure_target(args: argparse.Namespace) -> dict:
    device = args.device
    bandwidth = measure_bandwidth(device)
    begin = clock(device)
    model = load(args, args.dtype)
    if args.compile:
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than time eager code without a word
        compile_layers(model.layers)
    else:
        pack_for_cpu(model)
    load_seconds = clock(device) - begin
    setup_caches(model, max(*args.slots, LONG_PROMPT, PROMPT + NEW))

    twin = meta_model(model.config, args.dtype)
    parts = list(target_parts(model, twin, args))
    if args.trees:
        head = random_head(model, args)
        for tree, n_used in itertools.product(args.trees, args.slots):
            parts += eagle_parts(model, head, twin, tree, n_used)
    steps = time_parts(parts, args, bandwidth)
    report = {
        "parameters": sum(p.numel() for p in twin.parameters()), "bandwidth": bandwidth, "load_seconds": load_seconds,
        "first_step_seconds": steps[0]["warmup_seconds"],
        "compile_seconds": sum(step["warmup_seconds"] for step in steps), "steps": steps,
        "prefill": measure_prefill(model), "decode": measure_decode(model, args),
        "eagle": [measure_eagle(model, head, twin, name, args, steps) for name in args.trees],
    }
    print_target(report)
    return report


def measure_bandwidth(device: torch.device) -> dict:
    """Bytes a second of a large copy (read and written) and of a large sum (read only).

    A step mostly reads. The yardstick is the copy on a GPU, as is customary, and the sum on a CPU, where the traffic
    behind a written byte differs from processor to processor.
    """
    n = BUFFER[device.type] // 4
    source = torch.rand(n, device=device)  # written, for memory that was only reserved reads as one shared page
    target = source.clone()
    runs = {"copy": lambda: target.copy_(source), "read": lambda: source.sum()}
    seconds = {name: statistics.median(times) for name, times in interleave(runs, 10, device).items()}
    copied, read = 8 * n / seconds["copy"], 4 * n / seconds["read"]
    yardstick = "copy" if device.type == "cuda" else "read"
    return {"copy_bytes_per_second": copied, "read_bytes_per_second": read, "yardstick": yardstick,
            "bytes_per_second": copied if yardstick == "copy" else read}


class Part(NamedTuple):
    """Something to time: a step over static inputs, and the bytes that it has to read."""
    name: str
    n_row: int
    n_used: int
    n_byte: int
    step: Callable[[], None]


def target_parts(model: Transformer, twin: Transformer, args: argparse.Namespace) -> Iterator[Part]:
    allocated = model.kv_cache.shape[4]
    for n_used, n_row in itertools.product(args.slots, args.rows):
        yield Part("target pass", n_row, n_used, step_bytes(twin, n_row, bucket(n_used, allocated)),
                   target_pass(model, n_row, n_used))


def target_pass(model: Transformer, n_row: int, n_used: int) -> Callable[[], None]:
    """The target over the last n_row of n_used slots: a plain step at one row, the verification of a draft at more."""
    device = model.inv_freq.device
    tokens = torch.randint(model.config.vocab_size, (1, n_row), device=device)
    pos = torch.arange(n_used - n_row, n_used, device=device)[None]
    produced = torch.zeros_like(tokens)
    n_slot = bucket(n_used, model.kv_cache.shape[4])

    def step() -> None:
        logits, _ = model(tokens, pos, mask=causal_mask(pos, n_slot))
        produced.copy_(next_tokens(logits, Sampling()))
    return step


def random_head(model: Transformer, args: argparse.Namespace) -> EagleHead:
    """A head of the target's shape, as the published ones are, drafting --draft-vocab tokens."""
    torch.set_default_dtype(args.dtype)
    try:
        with args.device:
            head = EagleHead(replace(model.config, n_layer=1, n_expert=0, qk_norm=False, rope_scaling=None), model)
    finally:
        torch.set_default_dtype(torch.float32)
    if args.draft_vocab:
        head.set_draft_vocab(list(range(args.draft_vocab)))
    compile_layers([head.layer]) if args.compile else pack_for_cpu(head)
    head.setup_caches(1, model.kv_cache.shape[4])
    return head.eval()


def eagle_parts(model: Transformer, head: EagleHead, twin: Transformer, name: str, n_used: int) -> Iterator[Part]:
    """The stages of one EAGLE step and the whole of it, over a context of n_used slots, the tree's among them."""
    tree, size = load_tree(name), model.norm.weight.element_size()
    step = EagleStep(model, head, tree, 1)
    n_slot = bucket(n_used, model.kv_cache.shape[4])
    step.prefill([random_tokens(model, n_used - tree.n_room + 1)])
    root = step.ingest(n_slot)
    draft = step.grow(root, n_slot)
    logits, features = step.verify(draft, n_slot)
    state = [tensor.clone() for tensor in step.state]

    def restoring(run: Callable[[], object]) -> Callable[[], None]:
        def restored() -> None:
            run()
            for tensor, value in zip(step.state, state):
                tensor.copy_(value)
        return restored

    # twin counts the target; a packed head has no parameters left to count
    c = head.config
    layer = c.dim * (2 * c.dim + c.head_dim * (2 * c.n_head + 2 * c.n_kv_head) + 3 * c.intermediate_size)
    lm_head = c.dim * (c.vocab_size if head.draft_ids is None else len(head.draft_ids))
    cache = 2 * c.n_kv_head * c.head_dim * n_slot
    ingest, level = size * (layer + cache), size * (layer + lm_head + cache)
    target = step_bytes(twin, tree.n_node, n_slot)
    grow = size * lm_head + (tree.depth - 1) * level
    for part, n_row, n_byte, run in (
            ("ingest", tree.depth + 1, ingest, lambda: step.ingest(n_slot)),
            ("grow", tree.n_node - 1, grow, lambda: step.grow(root, n_slot)),
            ("verify", tree.n_node, target, lambda: step.verify(draft, n_slot)),
            ("accept + commit", tree.depth + 1, 0,
             restoring(lambda: step.commit(draft, features, step.accept(logits, draft)))),
            ("one draft level", tree.n_child, level, draft_level(head, tree.n_child, n_used)),
            ("whole step", tree.n_node, ingest + grow + target, restoring(lambda: step(n_slot)))):
        yield Part(f"{name}: {part}", n_row, n_used, n_byte, run)


def draft_level(head: EagleHead, n_row: int, n_used: int) -> Callable[[], None]:
    """The head over n_row nodes, and the draft logits of each."""
    weight = head.fc.weight if isinstance(head.fc, torch.nn.Linear) else head.target.norm.weight
    tokens = torch.zeros(1, n_row, dtype=torch.long, device=head.inv_freq.device)
    features = torch.randn(1, n_row, head.config.dim, device=tokens.device, dtype=weight.dtype)
    pos = torch.arange(n_used - n_row, n_used, device=tokens.device)[None]
    mask = causal_mask(pos, bucket(n_used, head.kv_cache.shape[3]))
    return lambda: head.draft_logits(head(tokens, features, pos, mask=mask)).argmax(-1)


def step_bytes(model: Transformer, n_row: int, n_slot: int) -> int:
    """Bytes that a pass over n_row tokens of one sequence has to read, looking at n_slot cache slots.

    All weights once, the LM head among them, of the embedding table n_row rows, of a layer's experts as many as can
    be routed to, and the cache. `model` may be on the meta device.
    """
    c, size = model.config, model.norm.weight.element_size()
    weights = sum(p.numel() for part in (model.layers, model.norm, model.output) for p in part.parameters())
    expert = sum(p[0].numel() for p in model.layers.parameters() if p.dim() == 3)  # one of each layer: w13, w2
    unread = expert * (c.n_expert - min(c.n_expert, n_row * c.n_expert_active))
    cache = c.n_layer * 2 * c.n_kv_head * n_slot * c.head_dim
    return size * (weights - unread + n_row * c.dim + cache)


def time_parts(parts: list[Part], args: argparse.Namespace, bandwidth: dict) -> list[dict]:
    """One row of the report for each part; parts take turns."""
    runs, warmup = {}, []
    for i, part in enumerate(tqdm(parts, "compile, warm up", leave=False, disable=None)):
        begin = clock(args.device)
        runs[i] = ready(part.step, args)
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


def ready(step: Callable[[], None], args: argparse.Namespace) -> Callable[[], None]:
    """Compile `step` by calling it; on a GPU return the replay of its captured graph, as Decoder runs its steps."""
    if args.compile and args.device.type == "cuda":
        return capture(step).replay
    step()
    return step


def measure_prefill(model: Transformer) -> dict:
    device = model.inv_freq.device
    n = min(LONG_PROMPT, model.kv_cache.shape[4])
    prompt = random_tokens(model, n + 1)
    seconds = []
    for _ in tqdm(range(ROUNDS + 1), "prefill", leave=False, disable=None):
        begin = clock(device)
        for _ in prefill(model, [prompt]):
            pass
        seconds.append(clock(device) - begin)
    return {"tokens": n, "tokens_per_second": n / statistics.median(seconds[1:]), **milliseconds(seconds[1:]),
            "warmup_seconds": seconds[0]}


def measure_decode(model: Transformer, args: argparse.Namespace) -> dict:
    """Plain greedy decoding end to end: the host's part of each step is in it."""
    prompt = random_tokens(model, PROMPT)
    n_new = min(NEW, model.kv_cache.shape[4] - PROMPT)
    decoder = Decoder(model, 1, compile=args.compile)
    results = [decoder.generate([prompt], n_new)
               for _ in tqdm(range(ROUNDS + 1), "decode", leave=False, disable=None)]
    speeds = [result.tokens_per_second for result in results[1:]]
    return {"prompt_tokens": PROMPT, "new_tokens": n_new, "tokens_per_second": statistics.median(speeds),
            "tokens_per_second_min": min(speeds), "tokens_per_second_max": max(speeds),
            "warmup_seconds": results[0].timings["compile_seconds"]}


def measure_eagle(model: Transformer, head: EagleHead, twin: Transformer, name: str, args: argparse.Namespace,
                  steps: list[dict]) -> dict:
    """EAGLE's decoding end to end, in turn with its step alone over as many slots: what it takes more is the host's."""
    tree, n_used = load_tree(name), args.slots[0]
    n_new = min(STEPS, n_used - tree.n_room - 1)
    prompt = random_tokens(model, n_used - tree.n_room - n_new)
    decoder = Decoder(model, 1, compile=args.compile, head=head, tree=tree)
    *_, part = eagle_parts(model, head, twin, name, n_used)
    step = ready(part.step, args)
    alone, wall = [], []
    for _ in tqdm(range(ROUNDS + 1), name, leave=False, disable=None):
        result = decoder.generate([prompt], n_new)
        wall.append(result.timings["decode_seconds"] / result.target_passes)
        alone.append(statistics.median(elapsed(step, args.device) for _ in range(n_new)))
    seconds, whole = statistics.median(wall[1:]), statistics.median(alone[1:])
    plain = [row["ms_median"] for row in steps
             if (row["part"], row["rows"], row["used_slots"]) == ("target pass", 1, n_used)]
    ratio = 1e3 * whole / plain[0] if plain else None
    return {"tree": name, "used_slots": n_used, "ms_whole_step": 1e3 * whole, "ms_wall_per_step": 1e3 * seconds,
            "ms_host_gap": 1e3 * (seconds - whole), "relative_to_plain_step": ratio,
            "projected_speedup": {str(tau): tau / ratio for tau in args.accept_length} if ratio else {}}


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
          f"decode {decoded['tokens_per_second']:.1f} tokens/s ({decoded['new_tokens']} tokens after "
          f"{decoded['prompt_tokens']}; {1e3 / decoded['tokens_per_second']:.3f} ms each)")
    for row in report["eagle"]:
        print(f"{row['tree']} tree at {row['used_slots']} slots: step {row['ms_whole_step']:.2f} ms on the device, "
              f"{row['ms_wall_per_step']:.2f} ms with the host, {row['relative_to_plain_step'] or 0:.2f}x a plain step"
              + "".join(f"; projection at an accepted length of {tau}: {speedup:.2f}x plain decoding"
                        for tau, speedup in row["projected_speedup"].items()))


# Ways to run the same model


def compare_variants(args: argparse.Namespace) -> dict:
    """The variants of both dtypes take turns at every row count, all over the first of --slots."""
    models = dict(variants(args))
    runs, compiling = {}, {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        cache = str(args.compile_cache or empty)
        with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=cache, TRITON_CACHE_DIR=f"{cache}/triton"):
            start_seconds = start_compiler(args) if {"block", "whole"} & set(args.variants) else 0
            for key, n_row in tqdm(list(itertools.product(models, args.rows)), "compile", leave=False, disable=None):
                args.compile = key[0] in ("block", "whole")
                begin = clock(args.device)
                runs[*key, n_row] = ready(target_pass(models[key], n_row, args.slots[0]), args)
                compiling[*key, n_row] = clock(args.device) - begin
            times = interleave(runs, args.repeats, args.device)
    rows = [{"variant": key[0], "dtype": key[1], "rows": key[2], "used_slots": args.slots[0],
             "first_call_seconds": compiling[key], **milliseconds(times[key])} for key in runs]
    print_table(["variant", "dtype", "first calls s", *(f"ms at {n_row}" for n_row in args.rows)],
                [[*key, sum(compiling[*key, n_row] for n_row in args.rows),
                  *(statistics.median(times[*key, n_row]) * 1e3 for n_row in args.rows)] for key in models])
    print(f"\nfirst calls: sum over the row counts, from {args.compile_cache or 'an empty cache'}, after "
          f"{start_seconds:.1f} s to start the compiler; {args.slots[0]} used slots")
    return {"compiled": None, "dtype": None, "compile_cache": args.compile_cache and str(args.compile_cache),
            "compiler_start_seconds": start_seconds, "variants": rows}


def start_compiler(args: argparse.Namespace) -> float:
    """Seconds to load the compiler and start its workers, which the first graph would pay for."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than time eager code without a word
    torch._dynamo.config.recompile_limit = 256  # every row count of every variant compiles the same code
    begin = clock(args.device)
    torch.compile(lambda x: x + 1)(torch.zeros(1, device=args.device))
    return clock(args.device) - begin


def variants(args: argparse.Namespace) -> Iterator[tuple[tuple[str, str], Transformer]]:
    """((variant, dtype), model) pairs; those of a dtype share their weights and cache."""
    for dtype in (torch.bfloat16, torch.float32):
        model = load(args, dtype)
        setup_caches(model, args.slots[0])
        for name in args.variants:
            # A deep copy in which the tensors are the same ones.
            twin = copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})
            if name == "block":
                compile_layers(twin.layers)
            elif name == "whole":
                options = {"coordinate_descent_tuning": True} if twin.inv_freq.is_cuda else None  # as compile_layers
                twin.compile(dynamic=False, options=options)
            elif name == "packed" and not any(isinstance(m, PackedLinear) for m in pack_for_cpu(twin).modules()):
                continue  # nothing to pack: another device, dtype or processor
            yield (name, str(dtype).removeprefix("torch.")), twin


# Against transformers


def compare_peer(args: argparse.Namespace) -> dict:
    """Greedy decoding by transformers and by us, with a short and a long cache, taking turns in one run."""
    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = load(args, args.dtype)
    if not args.compile:
        pack_for_cpu(model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(resolve_checkpoint(args.checkpoint), dtype=args.dtype)
    prompt = random_tokens(model, PROMPT)
    lengths = [min(n_slot, context(model.config)) for n_slot in (512, 8192)]
    arms = [peer_arm(theirs.to(args.device).eval(), prompt), *(our_arm(model, prompt, n, args) for n in lengths)]
    seconds = [[] for _ in arms]
    for _ in tqdm(range(args.repeats + 1), "rounds", leave=False, disable=None):
        outputs = []
        for arm, times in zip(arms, seconds):
            begin = clock(args.device)
            outputs.append(arm())
            times.append(clock(args.device) - begin)
    speeds = [[NEW / second for second in times[1:]] for times in seconds]  # the first round warms up
    ratios = [[a / b for a, b in zip(speeds[i], speeds[j])] for i, j in ((1, 0), (2, 1))]
    names = ["transformers", *(f"ours, {n_slot} slots" for n_slot in lengths)]
    print_table(["", "tokens/s median", "min", "max"],
                [[name, statistics.median(s), min(s), max(s)] for name, s in zip(names, speeds)])
    for name, pairs in zip(("\nours / transformers", "long / short cache"), ratios):
        print(f"{name}: {statistics.median(pairs):.2f} (pairs {', '.join(f'{ratio:.2f}' for ratio in pairs)})")
    return {"transformers": transformers.__version__, "prompt_tokens": PROMPT, "new_tokens": NEW,
            "peer": [{"arm": name, "tokens_per_second": statistics.median(s), "runs": s}
                     for name, s in zip(names, speeds)],
            "ratio_to_transformers": statistics.median(ratios[0]), "ratio_pairs": ratios[0],
            "long_to_short_cache": statistics.median(ratios[1]), "long_to_short_pairs": ratios[1],
            "same_tokens": common_prefix(outputs[0], outputs[1])}


def peer_arm(theirs: torch.nn.Module, prompt: list[int]) -> Callable[[], list[int]]:
    ids = torch.tensor([prompt], device=theirs.device)

    def run() -> list[int]:
        output = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                                 min_new_tokens=NEW, max_new_tokens=NEW)
        return output[0, PROMPT:].tolist()
    return run


def our_arm(model: Transformer, prompt: list[int], n_slot: int, args: argparse.Namespace) -> Callable[[], list[int]]:
    model.setup_caches(1, n_slot)
    cache = model.kv_cache
    decoder = Decoder(model, 1, compile=args.compile)

    def run() -> list[int]:
        model.kv_cache = cache  # each arm's own: captured graphs hold its address
        return decoder.generate([prompt], NEW).tokens[0]
    return run


# Models


def load(args: argparse.Namespace, dtype: torch.dtype) -> Transformer:
    if args.checkpoint:
        return Transformer.from_pretrained(args.checkpoint, args.device, dtype)
    return random_model(args.config, args.device, dtype)


def meta_model(config: ModelArgs, dtype: torch.dtype) -> Transformer:
    """Shapes without memory, to count on."""
    with torch.device("meta"):
        return Transformer(config).to(dtype)


def random_model(config: ModelArgs, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Random weights made where they stay: no copy on the host, none in another dtype."""
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Transformer(config)
    finally:
        torch.set_default_dtype(torch.float32)
    for weight in model.parameters():
        if weight.dim() == 3:  # experts, which have no initialisation of their own
            weight.normal_(std=0.02)
    return model.eval()


def setup_caches(model: Transformer, n_slot: int) -> None:
    """Filled, not zero: untouched memory reads as one shared page, which stays in the processor's cache."""
    model.setup_caches(1, min(n_slot, context(model.config)))
    model.kv_cache.normal_()


def context(config: ModelArgs) -> int:
    return min(config.block_size, config.sliding_window or config.block_size)


def random_tokens(model: Transformer, n: int) -> list[int]:
    return torch.randint(model.config.vocab_size, (n,), generator=torch.Generator().manual_seed(0)).tolist()


# Time


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def interleave(runs: dict, repeats: int, device: torch.device) -> dict:
    """Seconds of each run, `repeats` of them, taking turns; a first round warms up and is not kept."""
    times = {name: [] for name in runs}
    for _ in tqdm(range(repeats + 1), "measure", leave=False, disable=None):
        for name, run in runs.items():
            times[name].append(elapsed(run, device))
    return {name: values[1:] for name, values in times.items()}


def elapsed(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()  # keeps the device at work while the host launches what is timed: device time alone, without launch gaps
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def milliseconds(times: list[float]) -> dict:
    return {"ms_median": statistics.median(times) * 1e3, "ms_min": min(times) * 1e3, "ms_max": max(times) * 1e3}


def print_table(header: list[str], rows: list[list]) -> None:
    """Text to the left, numbers to the right, three decimals below ten."""
    def text(value) -> str:
        if isinstance(value, float):
            return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
        return "-" if value is None else str(value)

    cells = [header, *([text(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = [isinstance(value, str) for value in rows[0]]
    for row in cells:
        print("  ".join(cell.ljust(w) if l else cell.rjust(w) for cell, w, l in zip(row, widths, left)).rstrip())


# Command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description=__doc__.split("\n")[0])
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", help="Hugging Face folder or hub id")
    model.add_argument("--shape", choices=SHAPES, help="random weights of a published shape")
    parser.add_argument("--compile-cache", type=Path, metavar="FOLDER",
                        help="with --variants: where compiled code is kept")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--variants", nargs="+", choices=("eager", "packed", "block", "whole"),
                      help="compare ways to run the model instead, in bfloat16 and float32")
    what.add_argument("--peer", action="store_true", help="compare plain decoding with transformers instead")
    parser.add_argument("--rows", type=number(int, 1), nargs="+", default=[1, 4, 8, 16, 26, 32, 60], metavar="T")
    parser.add_argument("--slots", type=number(int, 1), nargs="+", metavar="S",
                        help=f"used cache slots, the new rows among them (default: {SLOTS}, within the context)")
    parser.add_argument("--trees", nargs="+", default=[], metavar="TREE",
                        help="time EAGLE's step too, with a head of random weights: static, chain:4, dynamic, ...")
    parser.add_argument("--draft-vocab", type=number(int, 1), metavar="N", help="tokens that head drafts (default: all)")
    parser.add_argument("--accept-length", type=number(float, 1), nargs="+", default=[], metavar="X",
                        help="project the speedup at these accepted lengths")
    parser.add_argument("--repeats", type=number(int, 1), default=20, metavar="N", help="timed runs of each step or peer")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured as one JSON object")
    parser.set_defaults(command=shlex.join(["python", "scripts/bench.py", *argv]))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
