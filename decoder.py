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
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from attention import LEAST_SLOTS
from draft_tree import StaticTree, Tree, load_tree
from eagle_head import EagleHead
from eagle_step import EagleStep
from masks import bucket, causal_mask
from model import Transformer, prefill
from recorder import Recorder, Step
from runtime import can_trace, capture, compile_layers, trace
from sampling import NOT_FINITE, Sampling, next_tokens

Kind = Literal["plain", "tree", "copy"]     # of a step: one token a row, a tree of drafts, a copied branch beside it

# stop(prompt) returns a function that is given the new tokens one by one and says whether the answer ends here.
Stop = Callable[[list[int]], Callable[[int], bool]]


@dataclass
class Generation:
    """What `generate` returns. Row i of each list belongs to prompt i."""
    tokens: list[list[int]]             # new tokens only, the stop token among them
    accept_lengths: list[list[int]]     # tokens produced by each decode step of a row, before any cut by a stop
    finish_reason: list[str]            # "stop" or "length"
    timings: dict[str, float] = field(default_factory=dict)  # compile_seconds, prefill_seconds, decode_seconds
    copied: list[list[int]] = field(default_factory=list)   # drafts of each step that were copied: all or none
    kinds: list["Kind"] = field(default_factory=list)       # of each decode step
    steps: list[list[Step]] = field(default_factory=list)   # of a row, where they were recorded

    @property
    def target_passes(self) -> int:
        """Decode steps. The first token comes from the prefill."""
        return len(self.kinds)

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows over decode seconds, which leave out prefill, compilation and warm-up.

        0 if the prefill's token was the only one.
        """
        return sum(map(len, self.tokens)) / self.timings["decode_seconds"] if self.target_passes else 0.0

    @property
    def mean_accept_length(self) -> float:
        """Tokens per target pass and row, bonus token included: all tokens over all passes. 0 without a pass."""
        lengths = [n for row in self.accept_lengths for n in row]
        return sum(lengths) / max(len(lengths), 1)


def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int, *, head: EagleHead | None = None,
             tree: Tree | str = "static", copy: int | None = None, draw_drafts: bool | None = None,
             temperature: float = 0.0, top_k: int | None = None, top_p: float | None = None, seed: int | None = None,
             stop_ids: Iterable[int] = (), stop: Stop | None = None, compile: bool = False,
             max_seq_length: int | None = None,
             on_tokens: Callable[[int, list[int], int], None] | None = None) -> Generation:
    """Continue a batch of prompts, given as token ids, by at most max_new_tokens each. With a head, EAGLE is used.

    With `copy` and no head, it is prompt lookup decoding.

    At temperature 0 every row gets what it would get alone, and the same with a head as without (exactly in fp32).

    copy       length of a branch of drafts copied from the text so far; 0 is none (default: the tree's n_copy, else 0)
    seed       makes the draws repeatable; without it torch's generator is used as it is
    stop_ids   a row ends with its first token that is among these
    stop       another way to end a row (see Stop; chat.StopTexts is one)
    on_tokens  on_tokens(row, ids, n_draft) is called for the new tokens of each step; the first n_draft were drafts

    The caches are made for this call. Afterwards model and head have the caches that they had before. To answer many
    prompts, make one Decoder: it keeps what it has compiled or traced.

    Raises ValueError for options out of range, for a prompt that is empty, leaves no room in the context or holds a
    token beyond the vocabulary, and for logits that are not finite (fp16 overflows in some models).
    """
    drafted = tree_of(tree, copy, head)
    check_limit(max_new_tokens)
    if max_seq_length is None:
        room = 0 if drafted is None else drafted.n_room
        max_seq_length = slots_for(max(map(len, prompts), default=0) + max_new_tokens + room, model)
    check_prompts(prompts, max_seq_length, model.config.vocab_size)
    with restored_caches(model, head):
        setup_caches(model, head, len(prompts), max_seq_length)
        decoder = Decoder(model, len(prompts), Sampling(temperature, top_k, top_p), compile=compile, head=head,
                          tree=drafted, draw_drafts=draw_drafts)
        decoder.can_trace = False   # a trace hardly pays in one call, and torch never frees it
        return decoder.generate(prompts, max_new_tokens, seed=seed, stop_ids=stop_ids, stop=stop, on_tokens=on_tokens)


def tree_of(tree: Tree | str, copy: int | None, head: EagleHead | None) -> Tree | None:
    """What a step drafts: the tree with a copied branch of `copy` nodes, without a head the branch alone, or None."""
    if head is None:
        return replace(StaticTree.root(), n_copy=copy) if copy else None
    if isinstance(tree, str):
        return load_tree(tree, copy)
    return tree if copy is None else replace(tree, n_copy=copy)


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
    memory, where a replayed graph finds them. The host reads `report` [B, 3]: the new token, as EagleStep's with no
    copies.
    """

    def __init__(self, model: Transformer, tokens: Tensor, pos: Tensor, sampling: Sampling):
        self.model, self.tokens, self.pos, self.sampling = model, tokens, pos, sampling
        self.report = torch.zeros_like(tokens).repeat(1, 3)

    @property
    def produced(self) -> Tensor:
        return self.report[:, :1]

    @property
    def state(self) -> list[Tensor]:
        return [self.tokens, self.pos]

    def prefill(self, prompts: list[list[int]], n_cached: int = 0) -> None:
        """Fill the cache with the prompts, whose first n_cached tokens are in it already, and produce a token each."""
        length = torch.tensor([[len(prompt)] for prompt in prompts], device=self.pos.device)
        hidden = None
        # Where bits count, the prefill begins where EAGLE's does.
        for chunk in prefill(self.model, prompts, max(n_cached - self.model.is_exact, 0)):
            hidden = chunk.at(length - 1, chunk.hidden, hidden)
        self.pos.copy_(length - 1)
        self.finish(self.model.output(hidden))

    def __call__(self, n_slot: int) -> None:
        """One step that reads the first n_slot cache slots."""
        self.finish(self.model(self.tokens, self.pos, mask=causal_mask(self.pos, n_slot))[0])

    def finish(self, logits: Tensor) -> None:
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
    STRIDE = 16             # a step that is not compiled reads a multiple of so many slots

    def __init__(self, model: Transformer, batch_size: int, sampling: Sampling = Sampling(), *, compile: bool = False,
                 head: EagleHead | None = None, tree: Tree | None = None, draw_drafts: bool | None = None,
                 record: bool = False):
        """tree: what EAGLE steps draft, see `tree_of`. Default: with a head the paper's static tree, else nothing.

        record: `generate` returns what each step did (recorder.py)."""
        sampling.check()
        check_caches(model, head, batch_size)
        if compile and model.is_exact:
            raise ValueError("exact decoding does not go with compiled layers")
        self.model, self.head, self.compile = model, head, compile
        self.caches = {module: module.kv_cache for module in (model, head) if module is not None}
        self.eagle, device = None, model.inv_freq.device
        if head is not None or tree is not None:
            self.eagle = EagleStep(model, head, tree or load_tree("static"), batch_size, sampling, draw_drafts)
            if batch_size == 1 and not compile:
                self.eagle.n_end = max(self.eagle.n_room + self.STRIDE - 1, LEAST_SLOTS)    # see _n_slot
            tokens, pos = self.eagle.tokens, self.eagle.pos     # shared: plain steps go on where EAGLE's end
        else:
            tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
            pos = torch.zeros_like(tokens)
        self.plain = PlainStep(model, tokens, pos, sampling)
        self.recorder: Recorder | None = None
        if record:
            drafted = self.eagle.tree if self.eagle else StaticTree.root()
            self.recorder = Recorder(batch_size, drafted.n_node, drafted.n_copy, device)
            if self.eagle:
                self.eagle.recorder = self.recorder
        self.n_slot = model.kv_cache.shape[4]
        self.graphs: dict[tuple[Kind, int], torch.cuda.CUDAGraph | None] = {}   # by kind of step and slots read
        self.traces: dict[Kind, Callable[[int], None]] = {}                     # each takes any number of slots
        self.can_trace = not compile and can_trace(model)
        is_cuda = device.type == "cuda"
        self.pool = torch.cuda.graph_pool_handle() if is_cuda else None     # shared: graphs never run side by side
        self.stream = torch.cuda.Stream() if is_cuda else None              # to capture on
        self.n_copied = [0] * batch_size    # of each row's drafts in the last step
        self.n_ingested = 0     # pairs of row 0 in the head's cache, for the next turn of a chat
        if compile:
            compile_layers(model.layers)
            compile_layers([] if head is None else head.layers)

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_new_tokens: int, *, seed: int | None = None,
                 stop_ids: Iterable[int] = (), stop: Stop | None = None,
                 on_tokens: Callable[[int, list[int], int], None] | None = None, n_cached: int = 0) -> Generation:
        """The function `generate` for as many prompts as the decoder has rows.

        The first token comes from the prefill. The first n_cached tokens of every prompt are in the caches already,
        from the last call. No other decoder of the same caches may have run since.
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
        result = Generation([[] for _ in prompts], [[] for _ in prompts], ["length"] * len(prompts),
                            copied=[[] for _ in prompts], steps=[[] for _ in prompts])
        running = set(range(len(prompts)))

        def take(produced: Tensor, is_step: bool = True) -> bool:
            """Append what a step produced. Returns whether a row that goes on has something to copy."""
            if torch.distributed.is_initialized():
                import tp   # not needed by one process alone
                tp.check_ranks(produced)
            copies, rows = False, produced.tolist()     # sync: one a step, to stream and stop
            steps = self.recorder.steps(result.kinds[-1], rows) if self.recorder and is_step else None
            for row, (*ids, n_copied, can_copy) in enumerate(rows):
                if row not in running:
                    continue
                if ids[0] == NOT_FINITE:
                    # A masked slot has weight 0, but 0 times NaN is NaN: slots with NaN would spoil later prompts.
                    for cache in self.caches.values():
                        cache.zero_()
                    raise ValueError(not_finite(self.model.norm.weight.dtype, row, len(result.tokens[row])))
                ids = [i for i in ids if i >= 0]
                if is_step:
                    result.accept_lengths[row].append(len(ids))
                    result.copied[row].append(n_copied)
                if steps is not None:
                    result.steps[row].append(steps[row])
                self.n_copied[row] = n_copied
                kept = ids[:limits[row] - len(result.tokens[row])]
                end = next((n for n, i in enumerate(kept, start=1) if i in stop_ids or ends[row](i)), None)
                if end is not None:
                    kept, result.finish_reason[row] = kept[:end], "stop"
                result.tokens[row] += kept
                if end is not None or len(result.tokens[row]) == limits[row]:
                    running.discard(row)
                copies |= row in running and can_copy > 0
                if on_tokens is not None:
                    on_tokens(row, kept, len(ids) - 1)
            return copies

        start = self._clock()
        self.warm_up(list(map(len, prompts)), max_new_tokens)
        if seed is not None:
            torch.manual_seed(seed)
        warm = self._clock()
        step = self.plain if self.eagle is None else self.eagle
        with torch.compiler.set_stance("force_eager") if self.compile else contextlib.nullcontext():
            # Not compiled: prompts have many lengths, and each would be one more compilation.
            step.prefill(prompts, min(n_cached, self.n_ingested + 1) if self.eagle else n_cached)
        self.n_ingested = len(prompts[0])
        copies = take(step.report, is_step=False)
        prefilled = self._clock()
        if self.recorder is not None:
            self.recorder.begin()

        drafts = self.eagle is not None
        while running:
            longest = max(len(prompts[row]) + len(result.tokens[row]) for row in running)
            drafts = drafts and self._tree_fits(longest)    # once the tree no longer fits, plain steps to the end
            result.kinds.append("plain" if not drafts else "copy" if copies else "tree")
            copies = take(self.run(result.kinds[-1], longest))
            if drafts:
                self.n_ingested = len(prompts[0]) + len(result.tokens[0]) - 1
        result.timings = {"prefill_seconds": prefilled - warm, "compile_seconds": warm - start,
                          "decode_seconds": self._clock() - prefilled}
        return result

    def run(self, kind: Kind, length: int) -> Tensor:
        """One step for rows of up to `length` tokens, root included: replayed if it was recorded, else called."""
        n_slot = self._n_slot(kind, length)
        graph = self.graphs.get((kind, n_slot))
        if graph is not None:
            graph.replay()
        elif kind in self.traces:
            self.traces[kind](n_slot)
        else:
            self._call(kind, n_slot)
        return self._step(kind).report

    def warm_up(self, lengths: list[int], max_new_tokens: int) -> None:
        """Compile and record the steps that prompts of these lengths will need.

        These calls write only slots that the prefill, or the steps after it, will write again.
        """
        for step in (self.plain, self.eagle):
            if step is not None:
                step.pos.copy_(torch.tensor(lengths)[:, None])
        for kind, n_slot in self.steps_ahead(lengths, max_new_tokens):
            key = kind, n_slot if self.compile else 0       # without graphs one call prepares all sizes
            tracing = self.can_trace and max_new_tokens >= self.TRACE_FROM and kind not in self.traces
            if tracing or key not in self.graphs:
                self.graphs[key] = self._record(kind, n_slot, tracing)

    def steps_ahead(self, lengths: list[int], max_new_tokens: int) -> list[tuple[Kind, int]]:
        """(kind, slots read) of all steps that may come, at whatever step rows stop."""
        shortest, longest = min(lengths) + 1, max(lengths) + 1      # with the prefill's token
        end = min(longest + max_new_tokens - 1, self.n_slot)
        # Without graphs one step prepares all sizes.
        ahead = range(shortest if self.compile else longest, end if self.compile else min(longest + 1, end))
        can_copy = self.eagle is not None and self.eagle.branch is not None
        drafting: list[Kind] = ["tree", "copy"] if can_copy else ["tree"]
        steps: list[tuple[Kind, int]] = [
            (kind, self._n_slot(kind, length)) for length in ahead if self._tree_fits(length) for kind in drafting]
        if not self._tree_fits(longest):
            steps = []      # a trial step would overwrite tokens of the prompt in the last slots
        if len(ahead) and not self._tree_fits(ahead[-1]):
            plain: list[tuple[Kind, int]] = [("plain", self._n_slot("plain", length)) for length in ahead]
            steps += plain
        return list(dict.fromkeys(steps))

    def _record(self, kind: Kind, n_slot: int, tracing: bool) -> "torch.cuda.CUDAGraph | None":
        """Capture, trace or just call the step. Its state stays as it was. Returns the CUDA graph, if there is one."""
        step = self._step(kind)
        before, graph = [tensor.clone() for tensor in step.state], None
        if self.compile and step.pos.is_cuda:
            graph = capture(lambda: self._call(kind, n_slot), self.pool, self.stream)
        elif tracing:
            tensors = [*step.state, step.report, *(self.recorder.tensors if self.recorder else [])]
            self.traces[kind] = trace(lambda n_slot: self._call(kind, n_slot), self.caches, tensors, n_slot)
            self.traces[kind](n_slot)   # the first call prepares it
        else:
            self._call(kind, n_slot)
        for tensor, value in zip(step.state, before):
            tensor.copy_(value)
        return graph

    def _call(self, kind: Kind, n_slot: int) -> None:
        if kind == "plain" or self.eagle is None:
            self.plain(n_slot)
        else:
            self.eagle(n_slot, copies=kind == "copy")

    def _step(self, kind: Kind) -> PlainStep | EagleStep:
        return self.plain if kind == "plain" or self.eagle is None else self.eagle

    def _tree_fits(self, length: int) -> bool:
        return self.eagle is not None and length - 1 + self.eagle.n_room <= self.n_slot

    def _n_slot(self, kind: Kind, length: int) -> int:
        """Cache slots to read: one of few sizes if each is captured, else close to the length."""
        used = length - 1 + (1 if kind == "plain" or self.eagle is None else self.eagle.n_room)
        size = max(-(-used // self.STRIDE) * self.STRIDE, LEAST_SLOTS)
        return bucket(used, self.n_slot) if self.compile else min(size, self.n_slot)

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
