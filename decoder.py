"""The decode loop: plain steps or EAGLE steps, captured where that is faster, until every row has stopped.

    result = generate(model, [prompt_ids], max_new_tokens=64, head=head, tree="static", stop_ids=tok.stop_ids)
    result.tokens[0], result.mean_accept_length, result.tokens_per_second

    setup_caches(model, head, batch_size=1, n_slot=2048)
    decoder = Decoder(model, 1, Sampling(temperature=0.7), head=head, tree=load_tree("static"))
    decoder.generate([prompt_ids], max_new_tokens=64)       # for many prompts: keeps what is compiled or traced

Shapes: B batch, S cache slots.
"""
import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from draft_tree import Tree, load_tree, room_of
from eagle_head import EagleHead
from eagle_step import EagleStep
from model import Transformer, bucket, causal_mask, prefill
from runtime import can_trace, capture, compile_layers, trace
from sampling import NOT_FINITE, Sampling, next_tokens

# stop(prompt) returns a function that is given the new tokens one by one and says whether the answer ends here.
Stop = Callable[[list[int]], Callable[[int], bool]]


@dataclass
class Generation:
    """What `generate` returns. Row i of each list belongs to prompt i."""
    tokens: list[list[int]]             # new tokens only, the stop token among them
    accept_lengths: list[list[int]]     # tokens produced by each decode step of a row, before any cut by a stop
    finish_reason: list[str]            # "stop" or "length"
    target_passes: int = 0              # decode steps
    timings: dict[str, float] = field(default_factory=dict)  # compile_seconds, prefill_seconds, decode_seconds

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over decode seconds, which leave out prefill, compilation and warm-up."""
        return sum(map(len, self.tokens)) / self.timings["decode_seconds"]

    @property
    def mean_accept_length(self) -> float:
        """Tokens per target pass and row, bonus token included: all tokens over all passes."""
        lengths = [n for row in self.accept_lengths for n in row]
        return sum(lengths) / len(lengths)


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, *, head: EagleHead | None = None,
             tree: Tree | str = "static", copy: int = 0, draw_drafts: bool | None = None, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, seed: int | None = None,
             stop_ids: Iterable[int] = (), stop: Stop | None = None, compile: bool = False,
             max_seq_length: int | None = None,
             on_tokens: Callable[[int, list[int], int], None] | None = None) -> Generation:
    """Continue a batch of prompts, given as token ids, by at most max_new_tokens each. With a head, EAGLE is used.

    At temperature 0 every row gets what it would get alone, and the same with a head as without (exactly in fp32).

    copy       length of a branch of drafts copied from the text so far, beside the tree; 0 is none
    seed       makes the draws repeatable; without it torch's generator is used as it is
    stop_ids   a row ends with its first token that is among these
    stop       another way to end a row (see Stop; chat.StopTexts is one)
    on_tokens  on_tokens(row, ids, n_draft) is called for the new tokens of each step; the first n_draft were drafts

    The caches are made for this call. Afterwards model and head have the caches that they had before. To answer many
    prompts, make one Decoder: it keeps what it has compiled or traced.

    Raises ValueError for options out of range, for a prompt that is empty, leaves no room in the context or holds a
    token beyond the vocabulary, and for logits that are not finite (fp16 overflows in some models).
    """
    tree = load_tree(tree) if isinstance(tree, str) else tree
    check_limit(max_new_tokens)
    if max_seq_length is None:
        room = room_of(tree, copy) if head is not None else 0
        max_seq_length = slots_for(max(map(len, prompts), default=0) + max_new_tokens + room, model)
    check_prompts(prompts, max_seq_length, model.config.vocab_size)
    with restored_caches(model, head):
        setup_caches(model, head, len(prompts), max_seq_length)
        decoder = Decoder(model, len(prompts), Sampling(temperature, top_k, top_p), compile=compile, head=head,
                          tree=tree, draw_drafts=draw_drafts, copy=copy)
        decoder.can_trace = False   # a trace hardly pays in one call, and torch never frees it
        return decoder.generate(prompts, max_new_tokens, seed=seed, stop_ids=stop_ids, stop=stop, on_tokens=on_tokens)


def check_limit(max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: at least 1 is needed")


def slots_for(length: int, model: Transformer) -> int:
    """Cache slots for `length` tokens, within the context. A multiple of 8: rows of the mask then begin at multiples of
    16 bytes. Otherwise a GPU's attention pads the mask in every layer."""
    return min(-(-length // 8) * 8, model.config.block_size)


def check_prompts(prompts: list[list[int]], n_slot: int, vocab_size: int) -> None:
    """Raise ValueError for prompts that cannot be continued in a cache of n_slot slots."""
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


@contextlib.contextmanager
def restored_caches(model: Transformer, head: EagleHead | None) -> Iterator[None]:
    """On leaving, model and head get back the caches that they had on entering."""
    modules = [model] if head is None else [model, head]
    before = [module.kv_cache for module in modules]
    try:
        yield
    finally:
        for module, cache in zip(modules, before):
            module.kv_cache = cache


def setup_caches(model: Transformer, head: EagleHead | None, batch_size: int, n_slot: int) -> None:
    """Allocate the caches of both, with n_slot slots a row."""
    model.setup_caches(batch_size, n_slot)
    if head is not None:
        head.setup_caches(batch_size, n_slot)


class PlainStep:
    """One target pass, one token a row.

    Reads `tokens` [B, 1], the last token of each row, at position `pos` [B, 1]. Writes the next ones into the same
    memory, where a replayed graph finds them. The host reads `produced` [B, 1].
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
        """One step that reads the first n_slot cache slots."""
        logits, _ = self.model(self.tokens, self.pos, mask=causal_mask(self.pos, n_slot))
        self.produced.copy_(next_tokens(logits, self.sampling))
        self.tokens.copy_(self.produced.clamp(min=0))   # NOT_FINITE has no embedding; decoding ends with this step
        self.pos.add_(1).clamp_(max=self.model.kv_cache.shape[4] - 1)  # a finished row stays at the last slot


class Decoder:
    """Runs plain steps, or with a head EAGLE steps, until every row has stopped.

    What is compiled, captured or traced is kept from one `generate` to the next. The decoder uses the caches that model
    and head have when it is made (`setup_caches` makes both), even if they are given other caches later.
    Raises ValueError for caches that are missing, too small or not alike, and for options out of range.
    """
    TRACE_FROM: int = 64    # new tokens from which a trace, which takes a quarter of a second, pays

    def __init__(self, model: Transformer, batch_size: int, sampling: Sampling = Sampling(), *, compile: bool = False,
                 head: EagleHead | None = None, tree: Tree | None = None, draw_drafts: bool | None = None,
                 copy: int = 0):
        sampling.check()
        check_caches(model, head, batch_size)
        self.model, self.head, self.compile = model, head, compile
        self.caches = {module: module.kv_cache for module in (model, head) if module is not None}
        self.eagle, device = None, model.inv_freq.device
        if head is not None:
            self.eagle = EagleStep(model, head, tree or load_tree("static"), batch_size, sampling, draw_drafts,
                                   copy)
            tokens, pos = self.eagle.tokens, self.eagle.pos     # shared: plain steps go on where EAGLE's end
        else:
            tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
            pos = torch.zeros_like(tokens)
        self.plain = PlainStep(model, tokens, pos, sampling)
        self.n_slot = model.kv_cache.shape[4]
        self.graphs: dict[tuple[bool, int], torch.cuda.CUDAGraph | None] = {}   # by (is EAGLE, slots read)
        self.traces: dict[bool, Callable[[int], None]] = {}                     # by is EAGLE: take any number of slots
        self.can_trace = not compile and can_trace(model)
        is_cuda = device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if is_cuda else None     # shared: graphs never run side by side
        self.stream = torch.cuda.Stream() if is_cuda else None              # to capture on
        self.n_ingested = 0     # pairs of row 0 in the head's cache, for the next turn of a chat
        if compile:
            compile_layers(model.layers)
            compile_layers([] if head is None else head.layers)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, seed: int | None = None,
                 stop_ids: Iterable[int] = (), stop: Stop | None = None,
                 on_tokens: Callable[[int, list[int], int], None] | None = None, n_cached: int = 0) -> Generation:
        """The function `generate` for as many prompts as the decoder has rows.

        The first n_cached tokens of every prompt are in the caches already, from the last call. No other decoder of
        the same caches may have run since.
        """
        check_limit(max_new_tokens)
        check_prompts(prompts, self.n_slot, self.model.config.vocab_size)
        if len(prompts) != len(self.plain.tokens):
            raise ValueError(f"{len(prompts)} prompts for a decoder of {len(self.plain.tokens)} rows")
        if not 0 <= n_cached < min(map(len, prompts)):
            raise ValueError(f"n_cached is {n_cached}: the last token of a prompt, and what follows it, "
                             "is never cached")
        if seed is not None and not 0 <= seed < 2 ** 63:
            raise ValueError(f"seed {seed} is not a number from 0 to 2^63 - 1")
        with restored_caches(self.model, self.head):
            for module, cache in self.caches.items():
                module.kv_cache = cache
            return self._generate(prompts, max_new_tokens, seed, frozenset(stop_ids), stop, on_tokens, n_cached)

    def _generate(self, prompts: list[list[int]], max_new_tokens: int, seed: int | None, stop_ids: frozenset[int],
                  stop: Stop | None, on_tokens: Callable[[int, list[int], int], None] | None,
                  n_cached: int) -> Generation:
        ends = [stop(prompt) if stop is not None else lambda token: False for prompt in prompts]
        limits = [min(max_new_tokens, self.n_slot - len(prompt)) for prompt in prompts]
        result = Generation([[] for _ in prompts], [[] for _ in prompts], ["length"] * len(prompts))
        running = {row for row, limit in enumerate(limits) if limit > 0}

        start = self._clock()
        with torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext():
            # Not compiled: prompts have many lengths, and each would be one more compilation.
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
            eagle = eagle and self._tree_fits(longest)  # once the tree no longer fits, plain steps to the end
            n_ingested = len(prompts[0]) + len(result.tokens[0]) - 1
            produced = self.run(eagle, longest)
            if torch.distributed.is_initialized():
                import tp   # not needed by one process alone
                tp.check_ranks(produced)
            if eagle and 0 in running:
                self.n_ingested = n_ingested
            result.target_passes += 1
            for row, ids in enumerate(produced.tolist()):  # sync: one a step, to stream and to stop
                if row not in running:
                    continue
                if ids[0] == NOT_FINITE:
                    # A masked slot has weight 0, but 0 times NaN is NaN: slots with NaN would spoil later prompts.
                    for cache in self.caches.values():
                        cache.zero_()
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
        """One step for rows of up to `length` tokens, root included: replayed if it was recorded, else called."""
        step = self._step(eagle)
        n_slot = self._n_slot(eagle, length)
        graph = self.graphs.get((eagle, n_slot))
        if graph is not None:
            graph.replay()
        else:
            self.traces.get(eagle, step)(n_slot)
        return step.produced

    def warm_up(self, lengths: list[int], max_new_tokens: int) -> None:
        """Compile and record the steps that prompts of these lengths will need. These calls change no result: the
        slots that they write are written again."""
        for eagle, n_slot in self.steps_ahead(lengths, max_new_tokens):
            key = eagle, n_slot if self.compile else 0      # without graphs one call prepares all sizes
            tracing = self.can_trace and max_new_tokens >= self.TRACE_FROM and eagle not in self.traces
            if tracing or key not in self.graphs:
                self.graphs[key] = self._record(eagle, n_slot, tracing)

    def steps_ahead(self, lengths: list[int], max_new_tokens: int) -> list[tuple[bool, int]]:
        """(is EAGLE, slots read) of all steps that may come, at whatever step rows stop."""
        first = last = longest = max(lengths)
        if self.compile:    # without graphs one step prepares all
            first, last = min(lengths), min(longest + max_new_tokens, self.n_slot) - 1
        ahead = range(first, last + 1)
        steps = [(True, self._n_slot(True, length)) for length in ahead if self._tree_fits(length)]
        if not self._tree_fits(longest):
            steps = []      # a trial step would overwrite tokens of the prompt in the last slots
        if not self._tree_fits(last):
            steps += [(False, self._n_slot(False, length)) for length in ahead]
        return list(dict.fromkeys(steps))

    def _record(self, eagle: bool, n_slot: int, tracing: bool) -> "torch.cuda.CUDAGraph | None":
        """Capture, trace or just call the step. Its state stays as it was. Returns the CUDA graph, if there is one."""
        step = self._step(eagle)
        before = [tensor.clone() for tensor in step.state]
        graph = None
        if self.compile and step.pos.is_cuda:
            graph = capture(lambda: step(n_slot), self.pool, self.stream)
        elif tracing:
            self.traces[eagle] = trace(step, self.caches, [*step.state, step.produced], n_slot)
            self.traces[eagle](n_slot)  # the first call prepares it
        else:
            step(n_slot)
        for tensor, value in zip(step.state, before):
            tensor.copy_(value)
        return graph

    def _step(self, eagle: bool) -> PlainStep | EagleStep:
        return self.eagle if eagle and self.eagle is not None else self.plain

    def _tree_fits(self, length: int) -> bool:
        return self.eagle is not None and length - 1 + self.eagle.n_room <= self.n_slot

    def _n_slot(self, eagle: bool, length: int) -> int:
        """Cache slots to read: one of few sizes if each is captured, else close to the length."""
        used = length - 1 + (self.eagle.n_room if eagle and self.eagle is not None else 1)
        return bucket(used, self.n_slot) if self.compile else min(-(-used // 16) * 16, self.n_slot)

    def _clock(self) -> float:
        if self.plain.pos.is_cuda:
            torch.cuda.synchronize()    # sync: between phases, to time them
        return time.perf_counter()


def check_caches(model: Transformer, head: EagleHead | None, batch_size: int) -> None:
    """Raise ValueError unless model and head have caches of the same length, with batch_size rows or more."""
    if model.kv_cache is None or head is not None and head.kv_cache is None:
        raise ValueError(f"{'model' if model.kv_cache is None else 'head'} without caches: call setup_caches first")
    if head is not None and head.target is not model:
        raise ValueError("this head was loaded for another target: EagleHead.from_pretrained(..., target=model)")
    rows, slots = model.kv_cache.shape[2], model.kv_cache.shape[4]
    if not 1 <= batch_size <= rows:
        raise ValueError(f"a decoder of {batch_size} rows needs caches with as many: these have {rows}")
    if head is not None and (head.kv_cache.shape[2] < batch_size or head.kv_cache.shape[4] != slots):
        raise ValueError(f"the head's caches have {head.kv_cache.shape[2]} rows of {head.kv_cache.shape[4]} slots, "
                         f"the model's {rows} of {slots}")


def not_finite(dtype: torch.dtype, row: int, n_token: int) -> str:
    """The error message for logits that are NaN or infinite, at the n_token-th token of this row, both from 0."""
    name = str(dtype).removeprefix("torch.")
    wider = " or ".join(other for other in ("bfloat16", "float32") if other != name)
    why = "its weights may hold NaN" if name == "float32" else f"the model may be too large for it: try {wider}"
    return f"the logits are not finite in {name} at new token {n_token + 1} of prompt {row + 1}: {why}"
