"""Generate text: python generate.py --prompt "Why is the sky blue?"

    python generate.py                                                     # the demo model, fetched on first use
    python generate.py --checkpoint lmsys/vicuna-7b-v1.3 --prompt "Hi" "Name three birds."           # a batch of two
    python generate.py --checkpoint FOLDER --prompt-file question.txt --temperature 0.7 --top-p 0.9 --seed 1
    python generate.py --interactive                                       # chat; Ctrl-C ends an answer, Ctrl-D leaves
    python generate.py --checkpoint lmsys/vicuna-7b-v1.3 --eagle yuhuili/EAGLE-Vicuna-7B-v1.3 --tree dynamic

The answer streams to stdout, everything else goes to stderr. On a GPU each decode step is one captured CUDA graph
over compiled layers; on a CPU a trace over weights packed for oneDNN (replay.py), which is made in a fraction of a second.

Shapes: B batch, T new tokens, S cache slots, V vocabulary.
"""
import argparse
import contextlib
import functools
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import tp
from console import (Parser, add_chat_options, command, device_name, is_text, launched, number, pick_device, read_text, say,
                     whole_or_nothing, write_atomically)
from eagle_head import EagleHead, EagleStep, Tree, load_tree
from model import (NOT_FINITE, Sampling, Transformer, bucket, causal_mask, next_tokens, pack_for_cpu, prefill, quantize_settings,
                   read_ids, read_json, resolve_checkpoint)
from replay import can_trace, capture, trace
from tokenizer import common_prefix

DEFAULT_PROMPT = "Why is the sky blue?"


# Decoding


# stop(prompt) gives a function that is told each new token of the answer, one by one, and says whether the answer ends with it.
Stop = Callable[[list[int]], Callable[[int], bool]]


@dataclass
class Generation:
    """What `generate` returns. Row i of each list belongs to prompt i."""
    tokens: list[list[int]]             # new tokens only, the stop token among them
    accept_lengths: list[list[int]]     # tokens produced by each decode step of a row, before a stop cut any
    finish_reason: list[str]            # "stop" or "length"
    target_passes: int = 0              # decode steps
    timings: dict[str, float] = field(default_factory=dict)  # compile_seconds, prefill_seconds, decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over decode seconds: warm, prefill and compilation outside."""
        return sum(map(len, self.tokens)) / self.timings["decode_seconds"]

    @property
    def mean_accept_length(self) -> float:
        """Tokens per target pass, bonus token included, as totals over totals."""
        lengths = [n for row in self.accept_lengths for n in row]
        return sum(lengths) / len(lengths)


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, *, head: EagleHead | None = None,
             tree: Tree | str = "static", draw_drafts: bool | None = None, temperature: float = 0.0, top_k: int | None = None,
             top_p: float | None = None, seed: int | None = None, stop_ids: Iterable[int] = (), stop: Stop | None = None,
             compile: bool = False, max_seq_length: int | None = None,
             on_tokens: Callable[[int, list[int], int], None] | None = None) -> Generation:
    """Continue a batch of prompts, given as token ids, by at most max_new_tokens each; with a head, by EAGLE.

    At temperature 0 every row gets what it would get alone, and the same with a head as without (exactly in fp32).
    With a seed the draws are repeatable; None goes on with torch's generator as it is. `on_tokens(row, ids, n_draft)`
    is called with new tokens as they come, the first n_draft of them drafts that were accepted. A row ends with the first
    of its tokens that is among stop_ids, or of which `stop` (see Stop; StopTexts is one) says so. The caches are made for
    this call: those that model and head had before are theirs again afterwards. To answer many prompts, make one
    Decoder and call its `generate`: what is compiled or traced is then kept.

    Raises ValueError for options out of range, for a prompt that is empty, leaves no room in the context or holds a
    token beyond the vocabulary, and for logits that are not finite (fp16 overflows in some models).
    """
    tree = load_tree(tree) if isinstance(tree, str) else tree
    check_limit(max_new_tokens)
    if max_seq_length is None:
        room = tree.n_room if head is not None else 0
        max_seq_length = slots_for(max(map(len, prompts), default=0) + max_new_tokens + room, model)
    check_prompts(prompts, max_seq_length, model.config.vocab_size)
    with restored_caches(model, head):
        setup_caches(model, head, len(prompts), max_seq_length)
        decoder = Decoder(model, len(prompts), Sampling(temperature, top_k, top_p), compile=compile, head=head,
                          tree=tree, draw_drafts=draw_drafts)
        decoder.can_trace = False   # it hardly pays for one call, and torch keeps every trace for good
        return decoder.generate(prompts, max_new_tokens, seed=seed, stop_ids=stop_ids, stop=stop, on_tokens=on_tokens)


def check_prompts(prompts: list[list[int]], n_slot: int, vocab_size: int) -> None:
    """Raises ValueError for what cannot be continued in a cache of n_slot slots."""
    if not prompts:
        raise ValueError("there is no prompt")
    for prompt in prompts:
        if not prompt:
            raise ValueError("the prompt is empty")
        if len(prompt) >= n_slot:
            raise ValueError(f"the prompt has {len(prompt)} tokens, which leaves no room in a context of {n_slot}")
        for token in prompt:
            if not 0 <= token < vocab_size:
                raise ValueError(f"the prompt holds token {token}, the model's vocabulary has {vocab_size}: "
                                 "the tokenizer is not this model's")


def check_limit(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 1 is needed")


class PlainStep:
    """One token a row and target pass: the ground that EAGLE's step stands on.

    Reads `tokens` [B, 1], the last token of each row, at position `pos` [B, 1], and writes the next ones into the same
    memory, so that a captured graph can be replayed as it is. `produced` [B, tokens a step can produce] is what the
    host reads.
    """

    def __init__(self, model: Transformer, tokens: Tensor, pos: Tensor, sampling: Sampling):
        self.model, self.tokens, self.pos, self.sampling = model, tokens, pos, sampling
        self.produced = torch.zeros_like(tokens)

    @property
    def state(self) -> list[Tensor]:
        return [self.tokens, self.pos]

    def prefill(self, prompts: list[list[int]], n_cached: int = 0) -> None:
        self.tokens.copy_(torch.tensor([[prompt[-1]] for prompt in prompts]))
        self.pos.copy_(torch.tensor([[len(prompt) - 1] for prompt in prompts]))
        for _ in prefill(self.model, prompts, n_cached):
            pass

    def __call__(self, n_slot: int) -> None:
        """Looks at the first n_slot cache slots."""
        logits, _ = self.model(self.tokens, self.pos, mask=causal_mask(self.pos, n_slot))
        self.produced.copy_(next_tokens(logits, self.sampling))
        self.tokens.copy_(self.produced.clamp(min=0))   # NOT_FINITE is no token: the decoder ends with this step
        self.pos.add_(1).clamp_(max=self.model.kv_cache.shape[4] - 1)  # a finished row may idle at its end


class Decoder:
    """Runs steps, captured where that is faster, until every row has stopped: plain ones, or EAGLE's with a head.

    Keeps what is compiled and captured from one `generate` to the next, and with it the caches that model and head have
    when it is made (`setup_caches` below makes both): whatever caches others set up later, it goes on with its own.
    Raises ValueError for caches that are missing, too small or not alike, and for options out of range.
    """
    TRACE_FROM = 64     # new tokens: for fewer a trace, a quarter of a second, does not pay

    def __init__(self, model: Transformer, batch_size: int, sampling: Sampling = Sampling(), *, compile: bool = False,
                 head: EagleHead | None = None, tree: Tree | None = None, draw_drafts: bool | None = None):
        sampling.check()
        check_caches(model, head, batch_size)
        self.model, self.head, self.compile = model, head, compile
        self.caches = model.kv_cache, None if head is None else head.kv_cache
        self.eagle, device = None, model.inv_freq.device
        if head is not None:
            self.eagle = EagleStep(model, head, tree or load_tree("static"), batch_size, sampling, draw_drafts)
            tokens, pos = self.eagle.tokens, self.eagle.pos  # shared: the last slots of a cache are filled by plain steps
        else:
            tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
            pos = torch.zeros_like(tokens)
        self.plain = PlainStep(model, tokens, pos, sampling)
        self.n_slot = model.kv_cache.shape[4]
        self.graphs: dict[tuple[bool, int], torch.cuda.CUDAGraph | None] = {}  # (is EAGLE's, cache slots looked at)
        self.traces: dict[bool, Callable[[int], None]] = {}     # is EAGLE's; for any number of slots
        self.can_trace = not compile and can_trace(model)
        is_cuda = device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if is_cuda else None     # graphs never run side by side
        self.stream = torch.cuda.Stream() if is_cuda else None              # to capture on
        self.n_ingested = 0     # of row 0: pairs that the head's cache holds, for the next turn of a chat
        if compile:
            compile_layers(model.layers)
            compile_layers([] if head is None else [head.layer])

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, seed: int | None = None,
                 stop_ids: Iterable[int] = (), stop: Stop | None = None,
                 on_tokens: Callable[[int, list[int], int], None] | None = None, n_cached: int = 0) -> Generation:
        """As the function `generate`, for as many prompts as the decoder has rows.

        The first n_cached tokens of every prompt are in the caches already: prompt and answer of the last call, if no
        other decoder of the same caches has run since.
        """
        check_limit(max_new_tokens)
        check_prompts(prompts, self.n_slot, self.model.config.vocab_size)
        if len(prompts) != len(self.plain.tokens):
            raise ValueError(f"{len(prompts)} prompts for a decoder of {len(self.plain.tokens)} rows")
        if not 0 <= n_cached < min(map(len, prompts)):
            raise ValueError(f"n_cached is {n_cached}: the last token of a prompt, and what follows it, is never cached")
        if seed is not None and not 0 <= seed < 2 ** 63:
            raise ValueError(f"seed {seed} is not a number from 0 to 2^63 - 1")
        with restored_caches(self.model, self.head):
            self.model.kv_cache = self.caches[0]
            if self.head is not None:
                self.head.kv_cache = self.caches[1]
            return self._generate(prompts, max_new_tokens, seed, frozenset(stop_ids), stop, on_tokens, n_cached)

    def _generate(self, prompts: list[list[int]], max_new_tokens: int, seed: int | None, stop_ids: frozenset[int],
                  stop: Stop | None, on_tokens: Callable[[int, list[int], int], None] | None, n_cached: int) -> Generation:
        ends = [stop(prompt) if stop is not None else lambda token: False for prompt in prompts]
        limits = [min(max_new_tokens, self.n_slot - len(prompt)) for prompt in prompts]
        result = Generation([[] for _ in prompts], [[] for _ in prompts], ["length"] * len(prompts))
        running = {row for row, limit in enumerate(limits) if limit > 0}

        start = self._clock()
        with torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext():
            # Prompts come in all lengths: compiling for each would take longer than the layers themselves.
            (self.eagle or self.plain).prefill(prompts, min(n_cached, self.n_ingested) if self.eagle else n_cached)
        self.n_ingested = len(prompts[0]) - 1
        prefilled = self._clock()
        self.warm_up(list(map(len, prompts)), max_new_tokens)
        if seed is not None:
            torch.manual_seed(seed)
        warm = self._clock()

        eagle = self.eagle is not None
        while running:
            longest = max(len(prompts[row]) + len(result.tokens[row]) for row in running)
            eagle = eagle and self._tree_fits(longest)  # once a tree no longer fits, plain to the end
            n_ingested = len(prompts[0]) + len(result.tokens[0]) - 1
            produced = self.run(eagle, longest)
            tp.check_ranks(produced)
            if eagle and 0 in running:
                self.n_ingested = n_ingested
            result.target_passes += 1
            for row, ids in enumerate(produced.tolist()):  # sync: the step's one, to stream and to stop
                if row not in running:
                    continue
                if ids[0] == NOT_FINITE:
                    for cache in filter(torch.is_tensor, self.caches):
                        cache.zero_()   # a masked slot weighs 0, and 0 times NaN is NaN: no later prompt may meet one
                    raise ValueError(not_finite(self.model.norm.weight.dtype, row, len(result.tokens[row])))
                ids = [i for i in ids if i >= 0]
                result.accept_lengths[row].append(len(ids))
                kept = ids[:limits[row] - len(result.tokens[row])]
                end = next((n for n, i in enumerate(kept, start=1) if i in stop_ids or ends[row](i)), None)
                if end is not None:
                    kept, result.finish_reason[row] = kept[:end], "stop"
                result.tokens[row] += kept
                if end is not None or len(result.tokens[row]) == limits[row]:
                    running.discard(row)
                if on_tokens is not None:
                    on_tokens(row, kept, len(ids) - 1)
        result.timings = {"prefill_seconds": prefilled - start, "compile_seconds": warm - prefilled,
                          "decode_seconds": self._clock() - warm}
        return result

    def run(self, eagle: bool, length: int) -> Tensor:
        """One step for rows of up to `length` tokens, the root among them: replayed where recorded, else called."""
        step = self.eagle if eagle else self.plain
        n_slot = self._n_slot(eagle, length)
        graph = self.graphs.get((eagle, n_slot))
        if graph is not None:
            graph.replay()
        else:
            self.traces.get(eagle, step)(n_slot)
        return step.produced

    def warm_up(self, lengths: list[int], max_new_tokens: int) -> None:
        """Compile and record what the coming steps need, for prompts of these lengths. Nothing is left of the calls:
        their slots will be written again."""
        for eagle, n_slot in self.steps_ahead(lengths, max_new_tokens):
            key = eagle, n_slot if self.compile else 0      # without a graph one call readies all sizes
            tracing = self.can_trace and max_new_tokens >= self.TRACE_FROM and eagle not in self.traces
            if tracing or key not in self.graphs:
                self.graphs[key] = self._record(eagle, n_slot, tracing)

    def steps_ahead(self, lengths: list[int], max_new_tokens: int) -> list[tuple[bool, int]]:
        """(is EAGLE's, cache slots looked at) of the steps that may come, whichever rows stop early."""
        first = last = longest = max(lengths)
        if self.compile:    # else what one step readies serves them all
            first, last = min(lengths), min(longest + max_new_tokens, self.n_slot) - 1
        ahead = range(first, last + 1)
        steps = [(True, self._n_slot(True, length)) for length in ahead if self._tree_fits(length)]
        if not self._tree_fits(longest):
            steps = []      # the step would write over what a row has in its last slots
        if not self._tree_fits(last):
            steps += [(False, self._n_slot(False, length)) for length in ahead]
        return list(dict.fromkeys(steps))

    def _record(self, eagle: bool, n_slot: int, tracing: bool) -> "torch.cuda.CUDAGraph | None":
        """Call the step, capture or trace it; its state stays as it was. Returns the graph that a GPU replays."""
        step = self.eagle if eagle else self.plain
        before = [tensor.clone() for tensor in step.state]
        graph = None
        if self.compile and step.pos.is_cuda:
            graph = capture(lambda: step(n_slot), self.pool, self.stream)
        elif tracing:
            modules = [self.model] if self.eagle is None else [self.model, self.eagle.head]
            self.traces[eagle] = trace(step, modules, [*step.state, step.produced], n_slot)
            self.traces[eagle](n_slot)  # what it has to prepare, it does at the first call
        else:
            step(n_slot)
        for tensor, value in zip(step.state, before):
            tensor.copy_(value)
        return graph

    def _tree_fits(self, length: int) -> bool:
        return self.eagle is not None and length - 1 + self.eagle.tree.n_room <= self.n_slot

    def _n_slot(self, eagle: bool, length: int) -> int:
        """Cache slots to look at: few different numbers where each is compiled and captured, else near the length."""
        used = length - 1 + (self.eagle.tree.n_room if eagle else 1)
        return bucket(used, self.n_slot) if self.compile else min(-(-used // 16) * 16, self.n_slot)

    def _clock(self) -> float:
        if self.plain.pos.is_cuda:
            torch.cuda.synchronize()  # sync: between phases, to time them
        return time.perf_counter()


def not_finite(dtype: torch.dtype, row: int, n_token: int) -> str:
    """What to say of logits that are NaN or infinite."""
    name = str(dtype).removeprefix("torch.")
    wider = " or ".join(other for other in ("bfloat16", "float32") if other != name)
    why = "its weights may hold NaN" if name == "float32" else f"the model may be too large for it: try {wider}"
    return f"the logits are not finite in {name} at new token {n_token + 1} of prompt {row + 1}: {why}"


def compile_layers(layers: Iterable[torch.nn.Module]) -> None:
    """Compile one layer; all share its code. Cold it takes seconds, where the whole graph takes a minute.

    One row and a block of rows, of the target's layers and of the head's, make four graphs: numbers of rows and of cache
    slots are marked as varying before the first call, or the first ones met would get graphs of their own.
    """
    torch._dynamo.config.recompile_limit = 32
    for layer in layers:
        # Coordinate descent lets inductor write one-row products as fused reductions, which reach full bandwidth.
        options = {"coordinate_descent_tuning": True} if layer.ffn_norm.weight.is_cuda else None
        layer.compile(options=options)
        layer._compiled_call_impl = functools.partial(call_with_varying_sizes, layer._compiled_call_impl)


def call_with_varying_sizes(compiled: Callable[..., Tensor], x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor,
                            cache_pos: Tensor, kv_cache: Tensor | None) -> Tensor:
    """A compiled TransformerBlock, told which sizes vary from call to call."""
    # Slices get the strides of tensors of their own, or dynamo makes a graph for each kind: a view where there is one row.
    *rope, cache_pos = (part[0][None] if len(part) == 1 else part.contiguous() for part in (*rope, cache_pos))
    for tensor in (x, *rope, cache_pos):
        torch._dynamo.maybe_mark_dynamic(tensor, 1)         # new tokens
    torch._dynamo.maybe_mark_dynamic(bias, (2, 3))          # their rows, and cache slots
    return compiled(x, tuple(rope), bias, cache_pos, kv_cache)


def setup_caches(model: Transformer, head: EagleHead | None, batch_size: int, n_slot: int) -> None:
    model.setup_caches(batch_size, n_slot)
    if head is not None:
        head.setup_caches(batch_size, n_slot)


def check_caches(model: Transformer, head: EagleHead | None, batch_size: int) -> None:
    """Raises ValueError unless both have caches of as many slots, with batch_size rows."""
    if model.kv_cache is None or head is not None and head.kv_cache is None:
        raise ValueError(f"{'model' if model.kv_cache is None else 'head'} without caches: call setup_caches first")
    if head is not None and head.target is not model:
        raise ValueError("this head was loaded for another target: EagleHead.from_pretrained(..., target=model)")
    rows, slots = model.kv_cache.shape[2], model.kv_cache.shape[4]
    if not 1 <= batch_size <= rows:
        raise ValueError(f"a decoder of {batch_size} rows needs caches with as many: these have {rows}")
    if head is not None and (head.kv_cache.shape[1] < batch_size or head.kv_cache.shape[3] != slots):
        raise ValueError(f"the head's caches have {head.kv_cache.shape[1]} rows of {head.kv_cache.shape[3]} slots, "
                         f"the model's {rows} of {slots}")


@contextlib.contextmanager
def restored_caches(model: Transformer, head: EagleHead | None) -> Iterator[None]:
    """Afterwards model and head have the caches that they have now."""
    modules = [model] if head is None else [model, head]
    before = [module.kv_cache for module in modules]
    try:
        yield
    finally:
        for module, cache in zip(modules, before):
            module.kv_cache = cache


def slots_for(length: int, model: Transformer) -> int:
    """Cache slots for `length` tokens, within the context: a multiple of 8, because a GPU's attention wants a mask whose rows
    begin at multiples of 16 bytes, and else pads the mask in every layer."""
    return min(-(-length // 8) * 8, model.config.block_size)


# Command line


@command(in_ranks=True)
def main(args: argparse.Namespace) -> None:
    check_options(args)
    args.texts = None if args.interactive else read_prompts(args)
    model, head, tokenizer, report = load(args)
    (chat if args.interactive else answer)(args, model, head, tokenizer, report)


def check_options(args: argparse.Namespace) -> None:
    """Refuse at the start what would be without effect, or fail after the work is done."""
    for name, value in (("--tree", args.tree), ("--draft-vocab", args.draft_vocab), ("--draft-mode", args.draft_mode),
                        ("--draw-drafts", args.draw_drafts)):
        if value is not None and args.eagle is None:
            raise ValueError(f"{name} needs --eagle")
    if args.draw_drafts and args.temperature == 0:
        raise ValueError("--draw-drafts needs a --temperature above 0")
    for name, value in (("--system", args.system), ("--template-args", args.template_args),
                        ("--plain-text", args.plain_text or None)):
        if value is not None and args.raw:
            raise ValueError(f"{name} needs a chat template: it does not go with --raw")
    for name, value in (("--prompt", args.prompt), ("--system", args.system), ("--stop", args.stop)):
        if not is_text(value):
            raise ValueError(f"{name} is not UTF-8 text")
    if "" in args.stop:
        raise ValueError("--stop '': a stop text is empty")
    for name, file in (("--json", args.json), ("--profile", args.profile)):
        if file is None:
            continue
        if args.interactive:
            raise ValueError(f"{name} does not go with --interactive")
        folder = file.absolute().parent
        if file.exists() and not file.is_file() or not folder.is_dir():
            raise ValueError(f"{name} {file}: not a file in an existing folder")
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{name} {file}: nothing can be written into this folder")
    if args.json is not None and args.json == args.profile:
        raise ValueError("--json and --profile name the same file")
    if args.interactive and (args.prompt or args.prompt_file or args.raw):
        raise ValueError("--interactive reads chat turns from the terminal: no --prompt, --prompt-file or --raw")
    if args.interactive and sys.stdin is None:
        raise ValueError("--interactive reads chat turns from standard input, which is closed")
    if args.interactive and launched():
        raise ValueError("--interactive runs in one process: under torchrun give --prompt or --prompt-file")


def load(args: argparse.Namespace) -> tuple[Transformer, EagleHead | None, "Tokenizer", dict]:
    """Model, head, tokenizer, and the first fields of the JSON report. Fills in the options left to the checkpoint."""
    from tokenizer import Tokenizer
    start = time.perf_counter()
    device = pick_device(args.device)
    if args.checkpoint is None:
        from scripts.download import download_demo
        args.checkpoint = str(download_demo(log=say))
    tokenizer = Tokenizer.from_pretrained(args.checkpoint, chat_template=args.chat_template,
                                          template_args=args.template_args)
    say_not_applied(read_json(resolve_checkpoint(args.checkpoint, weights=False) / "generation_config.json", absent={}))
    shard = tp.Shard.world() if launched() else None
    if shard is not None and device.type == "cuda":
        tp.check_memory(args.checkpoint, shard.size, torch.cuda.get_device_properties(device).total_memory)
    model = Transformer.from_pretrained(args.checkpoint, device, getattr(torch, args.dtype), shard)
    head, args.tree = load_head(args, model, shard) if args.eagle is not None else (None, None)
    args.compile = model.inv_freq.is_cuda if args.compile is None else args.compile
    if not args.compile:  # the compiler brings kernels of its own
        pack_for_cpu(model)
        if head is not None:
            pack_for_cpu(head)
    if args.seed is None and args.temperature > 0:
        args.seed = torch.seed() % 2 ** 31
    if shard is not None:
        args.seed = tp.on_rank_0(lambda: args.seed)
        if shard.rank > 0:  # what it would write, rank 0 writes
            args.json = args.profile = None
    seconds = time.perf_counter() - start
    return model, head, tokenizer, {
        "checkpoint": args.checkpoint, "eagle": args.eagle, "device": str(device), "device_name": device_name(device),
        "dtype": args.dtype, "torch": torch.__version__, "compiled": args.compile, "tree": args.tree,
        "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed,
        "load_seconds": seconds,
    } | ({} if head is None else {"draft_mode": args.draft_mode})


# What generation_config.json may ask for that changes which tokens are chosen, and the values that change nothing.
NEUTRAL = dict(repetition_penalty=1, no_repeat_ngram_size=0, bad_words_ids=[], suppress_tokens=[], begin_suppress_tokens=[],
               sequence_bias={}, exponential_decay_length_penalty=[], min_length=0, min_new_tokens=0, guidance_scale=1,
               penalty_alpha=0, num_beams=1, typical_p=1, min_p=0)


def say_not_applied(generation_config: dict) -> None:
    asked = [f"{key} {value}" if isinstance(value, (int, float)) else key for key, neutral in NEUTRAL.items()
             if (value := generation_config.get(key)) not in (None, neutral, [])]
    if asked:
        say(f"generation_config.json asks for {', '.join(asked)}: not applied")


def load_head(args: argparse.Namespace, model: Transformer, shard: tp.Shard | None = None) -> tuple[EagleHead, str]:
    """The head with its draft vocabulary, and which tree to use: what lies beside the head, unless an option says else.

    `--eagle` alone is the head that ships for this target, found by the `target` of its config.json.
    """
    if args.eagle == "":
        args.eagle = shipped_head(args.checkpoint)
    folder = resolve_checkpoint(args.eagle)
    head = EagleHead.from_pretrained(folder, target=model, shard=shard)
    vocab = args.draft_vocab or str(folder / "draft_vocab.json")
    if args.draft_vocab not in (None, "off") or (args.draft_vocab is None and Path(vocab).exists()):
        head.set_draft_vocab(load_draft_vocab(vocab, folder))
    quantize_head(args, head, is_stored=bool(quantize_settings(folder)), is_sharded=shard is not None)
    tree = next(filter(Path.exists, (folder / tree_name(args.checkpoint), folder / "tree.json")), "static")
    return head, args.tree or str(tree)


def quantize_head(args: argparse.Namespace, head: EagleHead, is_stored: bool, is_sharded: bool) -> None:
    """Round the head's weights as --draft-mode says: the output stays the target's, and a level reads fewer bytes.

    The default, int4 on a CPU in bf16, costs 0.5% of the accepted length and gains 2 to 6% of the speed (dev/log.md).
    """
    from quantized import Format, quantize_in_place, tune
    if args.draft_mode is None:
        weight = head.target.norm.weight
        pays = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not args.compile
        fits = all(linear.in_features % 32 == 0 for linear in head.modules() if isinstance(linear, torch.nn.Linear))
        args.draft_mode = "int4" if pays and fits and not (is_stored or is_sharded) else "off"
    if args.draft_mode != "off":
        if is_stored or is_sharded:
            why = "this head is quantised already" if is_stored else "under torchrun a head is quantised by quantize.py"
            raise ValueError(f"--draft-mode {args.draft_mode}: {why}")
        quantize_in_place(head, Format(args.draft_mode, 32 if args.draft_mode == "int4" else None))
        tune(head)


def tree_name(checkpoint: str) -> str:
    """Of the file beside a head: a quantised target has a tree of its own, for it makes a block of rows dearer than one."""
    mode = quantize_settings(resolve_checkpoint(checkpoint, weights=False)).get("mode")
    return f"tree-{mode}.json" if mode else "tree.json"


def shipped_head(checkpoint: str) -> str:
    """The folder under heads/ that was trained for this checkpoint, or for the one it was quantised from, by the last
    part of its name."""
    folder = resolve_checkpoint(checkpoint, weights=False)
    source = quantize_settings(folder).get("source", "")
    names = {Path(checkpoint).name, folder.resolve().name, Path(str(source)).name} - {""}
    for file in sorted((Path(__file__).resolve().parent / "heads").glob("*/config.json")):
        if str(read_json(file).get("target", "")).split("/")[-1] in names:
            return str(file.parent)
    raise FileNotFoundError(f"no head ships for {checkpoint}: name one, --eagle HEAD")


def load_draft_vocab(spec: str, folder: Path) -> list[int]:
    """Token ids, likeliest first, of a file: JSON, a list or {"ids": list}, or a list or tensor saved by torch, as SGLang's
    token maps are; or the first N of the file beside the head."""
    count = int(spec) if spec.isdigit() else None
    file = folder / "draft_vocab.json" if count is not None else Path(spec)
    ids = read_ids(file)
    if count == 0:
        raise ValueError("a draft vocabulary of 0 tokens drafts nothing")
    return ids[:count]


def say_loaded(report: dict) -> None:
    say("loaded {checkpoint} in {load_seconds:.1f} s ({device}, {dtype})".format(**report))


def make_decoder(args: argparse.Namespace, model: Transformer, head: EagleHead | None, batch_size: int,
                 n_slot: int) -> Decoder:
    setup_caches(model, head, batch_size, n_slot)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    tree = load_tree(args.tree) if head is not None else None
    return Decoder(model, batch_size, sampling, compile=args.compile, head=head, tree=tree, draw_drafts=args.draw_drafts)


def answer(args: argparse.Namespace, model: Transformer, head: EagleHead | None, tokenizer: "Tokenizer",
           report: dict) -> None:
    """Answer the prompts of the command line, all in one batch."""
    prompts = [encode(text, tokenizer, args.raw, args.system, args.plain_text) for text in args.texts]
    longest = max(map(len, prompts)) + args.max_new_tokens
    room = 0 if head is None else load_tree(args.tree).n_room
    n_slot = args.max_seq_length or slots_for(longest + room, model)
    check_prompts(prompts, n_slot, model.config.vocab_size)
    decoder = make_decoder(args, model, head, len(prompts), n_slot)
    say_loaded(report)

    stop = StopTexts(tokenizer, args.stop, goes_on=args.raw)
    printer = Printer(stop, prompts, args.color and head is not None)
    with profiler(args.profile):
        result = decoder.generate(prompts, args.max_new_tokens, seed=args.seed, stop_ids=tokenizer.stop_ids, stop=stop,
                                  on_tokens=printer)
    printer.close()

    times, n_new = result.timings, sum(map(len, result.tokens))
    say(f"{n_new} tokens in {times['decode_seconds']:.2f} s: {result.tokens_per_second:.1f} tokens/s"
        + ("" if head is None else f", {result.mean_accept_length:.2f} tokens per target pass") +
        f" (prompt {sum(map(len, prompts))} tokens in {times['prefill_seconds']:.2f} s, "
        f"warm-up {times['compile_seconds']:.2f} s)")
    if args.json:
        write_atomically(args.json, json.dumps(report | {
            "prompt_tokens": [len(prompt) for prompt in prompts], "new_tokens": [len(ids) for ids in result.tokens],
            "tokens": result.tokens, "text": list(map(stop.decode, result.tokens, prompts)),
            "finish_reason": result.finish_reason, "target_passes": result.target_passes,
            "accept_lengths": result.accept_lengths, "mean_accept_length": result.mean_accept_length,
            **times, "tokens_per_second": result.tokens_per_second, "peak_memory_bytes": peak_memory(model),
        }, indent=1) + "\n")


def read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt and args.prompt_file:
        raise ValueError("give --prompt or --prompt-file, not both")
    texts = args.prompt or [DEFAULT_PROMPT]
    if args.prompt_file:
        text = read_text(args.prompt_file)
        texts = [text if args.raw else text.rstrip("\n")]    # what ends a file is no part of a question
    for text in texts:
        if not text.strip():
            raise ValueError("the prompt is empty")
    return texts


def encode(text: str, tokenizer: "Tokenizer", raw: bool, system: str | None = None, plain_text: bool = False) -> list[int]:
    if raw:
        return tokenizer.encode(text, bos=tokenizer.adds_bos)
    return tokenizer.apply_chat_template([*opening(system), {"role": "user", "content": text}], plain_text=plain_text)


def opening(system: str | None) -> list[dict]:
    return [] if system is None else [{"role": "system", "content": system}]


class StopTexts:
    """Texts that end an answer: with the first token after which one of them is in it, and cut before the first of them.

        stop = StopTexts(tokenizer, ["\n\n"])
        ids = generate(model, [prompt], 100, stop=stop).tokens[0]       # the token that completed the text is the last one
        text = stop.decode(ids, prompt)                                 # without "\n\n" and what came with it

    A special token may be named by its text. goes_on: the answer goes on with the prompt's text, so that a first word keeps
    its space. Raises ValueError for an empty text.
    """

    def __init__(self, tokenizer: "Tokenizer", texts: Iterable[str] = (), goes_on: bool = False):
        self.tokenizer, self.texts, self.goes_on = tokenizer, list(texts), goes_on
        if "" in self.texts:
            raise ValueError("a stop text is empty")
        self.longest = max(map(len, self.texts), default=0)
        named = [ids[0] for ids in map(tokenizer.encode, self.texts) if len(ids) == 1]
        self.ids = tokenizer.special_ids.intersection(named)     # they leave no text to be found

    def __call__(self, prompt: list[int]) -> Callable[[int], bool]:
        """The Stop of `generate`."""
        stream, tail = self.stream(prompt), ""

        def ends(token: int) -> bool:
            nonlocal tail
            if not self.texts:
                return False
            tail += stream.push([token])
            text = tail + stream.peek()
            tail = tail[max(0, len(tail) - self.longest + 1):]     # where one may have begun
            return token in self.ids or any(stop in text for stop in self.texts)
        return ends

    def stream(self, prompt: list[int]) -> "StreamDecoder":
        return self.tokenizer.stream(after=prompt if self.goes_on else ())

    def decode(self, ids: list[int], prompt: list[int]) -> str:
        """The text of an answer to this prompt."""
        return self.cut(self.tokenizer.decode(ids, after=prompt if self.goes_on else ()))

    def cut(self, text: str) -> str:
        return text[:min((text.find(stop) for stop in self.texts if stop in text), default=len(text))]

    def n_certain(self, text: str) -> int:
        """Characters before the place where a stop text begins, or may turn out to have begun."""
        return next((n for n in range(len(text))
                     if any(text.startswith(stop, n) or stop.startswith(text[n:]) for stop in self.texts)), len(text))


class Printer:
    """Streams one answer as it comes; of several, each is printed whole once all are there.

    What may be the beginning of a stop text waits until it is certain. With `color`, text that came from accepted drafts
    is green and the target's own tokens are plain.
    """

    def __init__(self, stop: StopTexts, prompts: list[list[int]], color: bool = False):
        self.stop, self.color = stop, color
        self.streams = [stop.stream(prompt) for prompt in prompts]
        self.held = [""] * len(prompts)
        self.texts = [""] * len(prompts)

    def __call__(self, row: int, ids: list[int], n_draft: int) -> None:
        drafted = self._certain(row, ids[:n_draft])
        self._put(row, f"\033[32m{drafted}\033[0m" if drafted and self.color else drafted)
        self._put(row, self._certain(row, ids[n_draft:]))

    def close(self) -> None:
        for row, stream in enumerate(self.streams):
            self._put(row, self.stop.cut(self.held[row] + stream.flush()))
        if len(self.texts) == 1:
            print(flush=True)
        else:
            for row, text in enumerate(self.texts):
                print(f"[{row + 1}] {text}", flush=True)

    def _certain(self, row: int, ids: list[int]) -> str:
        text = self.held[row] + self.streams[row].push(ids)
        n = self.stop.n_certain(text)
        self.held[row] = text[n:]
        return text[:n]

    def _put(self, row: int, text: str) -> None:
        self.texts[row] += text
        if len(self.texts) == 1:
            print(text, end="", flush=True)


def chat(args: argparse.Namespace, model: Transformer, head: EagleHead | None, tokenizer: "Tokenizer",
         report: dict) -> None:
    """Chat on the terminal. The cache is kept between turns: only what is new in the conversation is prefilled."""
    n_slot = args.max_seq_length or min(model.config.block_size, model.config.sliding_window or 1 << 30, 8192)
    talk = Conversation(args, tokenizer, n_slot, model.config.vocab_size)
    talk.render("Hi")       # a template that is missing or broken, or an opening that is too long, shows now
    decoder = make_decoder(args, model, head, 1, n_slot)
    say_loaded(report)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (line editing in input())
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")     # a byte that does not fit spoils its own line only
    say("Ctrl-C ends an answer, Ctrl-D leaves.")
    while (text := read_message()) is not None:
        with contextlib.suppress(KeyboardInterrupt):
            talk.answer(decoder, text)


def read_message() -> str | None:
    """The next line that says something; None at the end of them."""
    while True:
        try:
            print("> ", end="", file=sys.stderr, flush=True)
            text = input().removeprefix("\ufeff")
        except EOFError:
            say("")
            return None
        except KeyboardInterrupt:
            say("\nCtrl-D leaves.")
            continue
        if not is_text(text):
            say(f"That line is not {getattr(sys.stdin, 'encoding', 'UTF-8').upper()} text: it is left out.")
        elif text.strip():
            return text


class Conversation:
    """The messages of a chat, and what of them is in the decoder's cache."""

    def __init__(self, args: argparse.Namespace, tokenizer: "Tokenizer", n_slot: int, vocab_size: int):
        self.args, self.tokenizer, self.n_slot, self.vocab_size = args, tokenizer, n_slot, vocab_size
        self.messages = opening(args.system)
        self.cached: list[int] = []
        self.seed = args.seed               # until the first draw: one seed begins the conversation
        self.stop = StopTexts(tokenizer, args.stop)

    def render(self, text: str) -> tuple[list[dict], list[int]]:
        """The messages with this one, and their ids. A conversation that leaves no room for it begins anew.

        Raises ValueError for what the template refuses, is too long by itself or has no token in the model."""
        messages, prompt = self._render(self.messages, text)
        if len(prompt) >= self.n_slot:
            messages, prompt = self._render(opening(self.args.system), text)
        check_prompts([prompt], self.n_slot, self.vocab_size)
        return messages, prompt

    def _render(self, messages: list[dict], text: str) -> tuple[list[dict], list[int]]:
        messages = [*messages, {"role": "user", "content": text}]
        return messages, self.tokenizer.apply_chat_template(messages, plain_text=self.args.plain_text)

    def answer(self, decoder: Decoder, text: str) -> None:
        try:
            messages, prompt = self.render(text)
        except ValueError as error:
            say(f"That message is left out: {error}")
            return
        if len(messages) <= len(self.messages):
            say(f"The conversation has filled its {self.n_slot} tokens; this begins a new one.")
        n_cached = common_prefix(prompt[:-1], self.cached)
        self.cached, new_ids, printer = prompt[:n_cached], [], Printer(self.stop, [prompt], self.args.color)

        def on_tokens(row: int, ids: list[int], n_draft: int) -> None:
            new_ids.extend(ids)
            printer(row, ids, n_draft)

        with contextlib.suppress(KeyboardInterrupt):    # what was said so far stays part of the conversation
            decoder.generate([prompt], self.args.max_new_tokens, seed=self.seed, stop_ids=self.tokenizer.stop_ids,
                             stop=self.stop, on_tokens=on_tokens, n_cached=n_cached)
        if new_ids:  # else interrupted in the prefill: of the cache only the old part is known to be written
            self.cached = prompt + new_ids[:-1]  # the last token was produced, but has not been an input
            self.seed = None
        self.messages = [*messages, {"role": "assistant", "content": self.stop.decode(new_ids, prompt)}]
        printer.close()


@contextlib.contextmanager
def profiler(file: Path | None):
    """A torch profiler trace of what runs inside, for chrome://tracing or Perfetto."""
    if file is None:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    with whole_or_nothing(file, ".part.json") as part:
        profile.export_chrome_trace(str(part))
    say(f"wrote {file}")


def peak_memory(model: Transformer) -> int:
    """Bytes: the GPU allocator's peak, or the process's peak resident memory on a CPU."""
    if model.inv_freq.is_cuda:
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft-vocab", metavar="N|FILE|off", help="draft only these tokens: the first N of "
                        "draft_vocab.json beside the head, or a file (default: all of draft_vocab.json if it is there)")
    parser.add_argument("--draft-mode", choices=("int8", "int4", "off"), help="round the weights of a 16-bit head "
                        "(default: int4 on a CPU in bfloat16, not compiled and in one process, where groups of 32 fit)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Generate text with a LLaMA, Vicuna, Mistral, Mixtral or Qwen checkpoint.")
    parser.add_argument("--checkpoint", help="Hugging Face folder or hub id (default: the demo model)")
    parser.add_argument("--eagle", nargs="?", const="", metavar="HEAD",
                        help="decode with this EAGLE head, a folder or hub id (no value: the one that ships)")
    parser.add_argument("--tree", metavar="TREE", help="static, chain[:DEPTH], dynamic[:DEPTH,CHILDREN,NODES] or a JSON "
                        "file of paths (default: tree.json or tree-int4.json beside the head, else static)")
    add_draft_options(parser)
    parser.add_argument("--draw-drafts", action=argparse.BooleanOptionalAction,
                        help="at a temperature, draw drafts from the head instead of taking its likeliest tokens "
                        "(default: where the tree is not dynamic)")
    parser.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="several make a batch")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file that is one prompt")
    parser.add_argument("--interactive", action="store_true", help="chat on the terminal")
    parser.add_argument("--raw", action="store_true", help="continue the text as it is: no chat template")
    add_chat_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message in front of the chat")
    parser.add_argument("--plain-text", action="store_true",
                        help="a special token written in a message, such as <|im_end|>, is text (default: it is the token)")
    parser.add_argument("--stop", nargs="+", action="extend", default=[], metavar="TEXT",
                        help="end the answer before the first of these texts")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=256, metavar="N")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, metavar="X", help="0 is greedy")
    parser.add_argument("--top-k", type=number(int, 1), metavar="N")
    parser.add_argument("--top-p", type=number(float, 0, 1, open_low=True), metavar="X")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), metavar="N", help="same seed, same text (default: a new one)")
    parser.add_argument("--max-seq-length", type=number(int, 2), metavar="N", help="cache slots a sequence")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    parser.add_argument("--color", action=argparse.BooleanOptionalAction, default=sys.stdout is not None and sys.stdout.isatty(),
                        help="show accepted drafts in green (default: on a terminal)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what happened as one JSON object")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a torch profiler trace")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(tp.run(main, parse_args()))
