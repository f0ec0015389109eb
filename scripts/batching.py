"""Continuous batching: many requests side by side over one cache. A row that ends begins the next request at once.

    rows = Rows(model, n_row=32, n_slot=768, stop_ids=tokenizer.stop_ids)
    for request in rows.run(next_request):      # next_request() -> Request, or None where there is none just now
        print(request.tokens, request.finish)

A prompt is prefilled up to its last token but one, a few prompts in a pass; the next step reads the last. What a row
holds already, such as the opening of the chat template or the dialogue so far, is copied and not computed. At
temperature 0 a request gets what it would get alone, exactly in fp32. Draws depend on the request's seed alone.

Shapes: B rows, S cache slots, V vocabulary, k likeliest tokens.
"""
import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tp
from decoder import Decoder, PlainStep, check_prompts, not_finite, restored_caches
from masks import bucket, causal_mask
from model import PREFILL_CHUNK, Transformer
from rope import keys_serve
from scripts.pages import Pages
from sampling import NOT_FINITE, Sampling, next_tokens
from tokenizer import common_prefix

CUT_EVERY = 16      # tokens after which a request is asked whether it ends here


@dataclass(eq=False)
class Request:
    """A prompt to continue, and in the end what came of it."""
    prompt: list[int]
    limit: int                                  # new tokens
    temperature: float = 0.0
    top_p: float = 1.0
    seed: str = ""                              # of the draws
    cut: Callable[[list[int]], int | None] = lambda ids: None   # to end here: how many of the new tokens to keep
    owner: Any = None                           # for the caller
    tokens: list[int] = field(default_factory=list)             # new tokens, the stop token among them
    finish: str = "length"                      # "stop", "length" or "cut"
    features: Tensor | None = None              # [tokens of prompt and answer, dim], where `Rows` keeps them


def draw(logits: Any, uniform: Tensor, temperature: Tensor, top_p: Tensor, k: int) -> Tensor:
    """Draw a token a row, [..., V] -> [...]: from the k likeliest, at the row's temperature and top_p, by its number
    `uniform` from 0 to 1. The distribution is that of sampling.logits_to_probs."""
    top = logits.topk(min(k, logits.shape[-1]), dim=-1)
    values, tokens = top[0].float(), top[1]
    probs = ((values - values[..., :1]) / temperature[..., None].clamp_min(1e-30)).softmax(-1)
    kept = probs.cumsum(-1) - probs < top_p[..., None]                  # the likelier ones hold less than top_p
    mass = probs.masked_fill(~kept, 0).cumsum(-1)
    index = (mass <= uniform[..., None] * mass[..., -1:]).sum(-1).minimum(kept.sum(-1) - 1)
    return tokens.gather(-1, index[..., None])[..., 0]


class RowsStep(PlainStep):
    """A step of rows that each have a temperature, a top_p and draws of their own.

    uniform     [B, S] by the position of the token that is read
    running     [B, 1]: 0 for a row without a request. It stays where it is, and nobody reads what it writes there
    features    [B, S, dim] of every token read, where they are kept
    """

    def __init__(self, model: Transformer, pages: Pages, n_row: int, n_slot: int, top_k: int | None,
                 keep_features: bool):
        device, dim = model.inv_freq.device, model.config.dim
        tokens = torch.zeros(n_row, 1, dtype=torch.long, device=device)
        super().__init__(model, tokens, torch.zeros_like(tokens), Sampling())
        self.pages, self.top_k, self.running = pages, top_k, torch.zeros_like(tokens)
        self.temperature, self.top_p = torch.ones(2, n_row, 1, device=device)
        self.uniform = torch.zeros(n_row, n_slot, device=device)
        self.features = model.kv_cache.new_zeros(n_row, n_slot, dim) if keep_features else None

    @property
    def state(self) -> list[Tensor]:
        more = [self.running, self.temperature, self.top_p, self.uniform]
        return [*super().state, *self.pages.state, *more, *([] if self.features is None else [self.features])]

    def __call__(self, n_page: int) -> None:
        """One step that reads the first n_page pages."""
        hidden = self.model.features(self.tokens, self.pos, mask=self.pages.seen(self.pos, n_page))
        if self.features is not None:
            self.features.scatter_(1, self.pos[..., None].expand(-1, -1, hidden.shape[-1]), hidden)
        logits = self.model.output(hidden)
        tokens = next_tokens(logits, self.sampling)
        if self.top_k is not None:
            # topk is slow on a CPU: only for the rows that draw. A CUDA graph has no such choice.
            draws = self.temperature[:, 0] > 0
            rows = slice(None) if self.pos.is_cuda else draws.nonzero()[:, 0]
            drawn = draw(logits[rows], self.uniform.gather(1, self.pos)[rows], self.temperature[rows], self.top_p[rows],
                         self.top_k)
            tokens[rows] = torch.where(draws[rows, None] & (tokens[rows] != NOT_FINITE), drawn, tokens[rows])
        self.produced.copy_(tokens)
        self.tokens.copy_(tokens.clamp(min=0))
        self.pos.add_(self.running).clamp_(max=self.uniform.shape[1] - 1)   # a full row stays at its last slot


class Rows:
    """The rows, and the requests in them.

    top_k           draws are among so many likeliest tokens; None: all requests are greedy
    keep_features   requests get the target's features of all their tokens. A row then reads its last token too
    group           prompts in a prefill; rows that have ended wait until there are so many

    Memory: up to n_row + group rows of n_slot slots in the cache, and with features dim numbers a slot (`nbytes`).
    Of the rows, a CPU touches only the pages that are in use (pages.py).
    """

    def __init__(self, model: Transformer, n_row: int, n_slot: int, *, top_k: int | None = None,
                 stop_ids: Iterable[int] = (), keep_features: bool = False, compile: bool = False, group: int = 1):
        self.model, self.n_slot, self.group = model, n_slot, min(group, n_row)
        self.stop_ids = frozenset(stop_ids)
        with restored_caches(model, None):
            model.setup_caches(self.group, n_slot)
            self.scratch = model.kv_cache               # prompts are prefilled here
            self.pages = Pages(model, n_row, n_slot)
            self.decoder = Decoder(model, n_row, compile=compile)
            self.decoder.n_slot = len(self.pages.owner)     # a step reads pages, where the decoder speaks of slots
            self.decoder.can_trace = False                  # a trace would fix the number of pages
            self.step = self.decoder.plain = RowsStep(model, self.pages, n_row, n_slot, top_k, keep_features)
        self.requests: list[Request | None] = [None] * n_row
        self.texts: list[list[int]] = [[] for _ in range(n_row)]    # the cache has all but the last token of each
        self.closing: set[int] = set()      # rows that have ended and read their last token, for its feature
        self.n_generated = self.n_prefilled = self.n_copied = 0     # tokens so far

    @property
    def nbytes(self) -> int:
        features = self.step.features
        return self.pages.cache.nbytes + self.scratch.nbytes + (0 if features is None else features.nbytes)

    @torch.inference_mode()
    def run(self, next_request: Callable[[], Request | None]) -> Iterator[Request]:
        """Yields the requests as they end. next_request is called whenever rows are free.

        Raises ValueError for a prompt that does not fit, and for logits that are not finite.
        """
        with restored_caches(self.model, None):
            self.model.kv_cache = self.pages.cache
            self.decoder.warm_up([1], self.decoder.n_slot)
            while True:
                self._admit(next_request)
                running = [row for row, request in enumerate(self.requests) if request is not None]
                if not running:
                    return
                for row in running:
                    self.pages.grow(row, len(self.texts[row]))
                report = self.decoder.run("plain", self.pages.n_used)
                tp.check_ranks(report)
                for row, (token, *_) in enumerate(report.tolist()):     # sync: one a step, to stop and begin rows
                    if (request := self._take(row, token)) is not None:
                        yield request

    def _take(self, row: int, token: int) -> Request | None:
        """Append a token to a row. Returns its request when it is done."""
        request, text = self.requests[row], self.texts[row]
        if request is None:
            return None
        if row not in self.closing:
            n_prompt = len(request.prompt)
            if token == NOT_FINITE:
                raise ValueError(not_finite(self.pages.cache.dtype, row, len(text) - n_prompt))
            text.append(token)
            self.n_generated += 1
            is_stop, is_full = token in self.stop_ids, len(text) == min(n_prompt + request.limit, self.n_slot)
            kept = None
            if is_stop or is_full or (len(text) - n_prompt) % CUT_EVERY == 0:
                request.tokens = text[n_prompt:]
                kept = request.cut(request.tokens)
            if kept is None and not is_stop and not is_full:
                return None
            request.tokens = request.tokens[:kept]
            request.finish = "cut" if kept is not None else "stop" if is_stop else "length"
            if self.step.features is not None and n_prompt + len(request.tokens) == len(text):
                self.closing.add(row)
                return None
        if self.step.features is not None:
            features = self.step.features[row, :len(request.prompt) + len(request.tokens)]
            request.features = features.to("cpu", copy=True)
        self.closing.discard(row)
        self.requests[row] = None
        self.step.running[row] = 0
        return request

    def _admit(self, next_request: Callable[[], Request | None]) -> None:
        """Give requests to the rows that are free, if enough of them are."""
        free = [row for row, request in enumerate(self.requests) if request is None]
        new = []
        while len(free) >= self.group and len(new) < len(free) and (request := next_request()) is not None:
            check_prompts([request.prompt], self.n_slot, self.model.config.vocab_size)
            new.append((free[len(new)], request))
        while new:      # the very first alone: the others copy what they share with it
            n = self.group if any(self.texts) else 1
            self._prefill(new[:n])
            new = new[n:]

    def _prefill(self, new: list[tuple[int, Request]]) -> None:
        """Begin requests in their rows, in one pass. What any row has of a prompt's beginning is copied."""
        prompts, features = [request.prompt[:-1] for _, request in new], self.step.features
        known, parts = [], []
        for n, (_, request) in enumerate(new):
            length, source = max((self._shared(request.prompt, text), row) for row, text in enumerate(self.texts))
            self.scratch[:, :, n, :, :length] = self.pages.read(source, length)
            parts.append([] if features is None else [features[source, :length].clone()])
            known.append(length)
        longest, device = max(map(len, prompts)), self.scratch.device
        padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=device)
        lengths = padded.new_tensor([[len(prompt) + 1] for prompt in prompts])     # with the token that a step reads
        begin, n_new = padded.new_tensor(known)[:, None], max(len(p) - n for p, n in zip(prompts, known))
        self.model.kv_cache = self.scratch
        with torch.compiler.set_stance("force_eager") if self.decoder.compile else contextlib.nullcontext():
            for i in range(0, n_new, PREFILL_CHUNK):    # rows are padded on the right: see model.prefill
                size = min(PREFILL_CHUNK, n_new - i)
                pos = (begin + torch.arange(i, i + size, device=device)).clamp(max=self.n_slot - 1)
                mask = causal_mask(pos, bucket(max(known) + i + size, self.n_slot))
                hidden = self.model.features(padded.gather(1, pos.clamp(max=longest - 1)), pos, mask=mask,
                                             rope_length=lengths)
                for part, rows in zip(parts, hidden if features is not None else ()):
                    part.append(rows)
        self.model.kv_cache = self.pages.cache
        for n, (row, request) in enumerate(new):
            self.pages.free(row)    # until now others could copy what it had
            self.pages.write(row, self.scratch[:, :, n, :, :len(prompts[n])])
            if features is not None:
                features[row, :len(prompts[n])] = torch.cat(parts[n])[:len(prompts[n])]
            self._begin(row, request)
        self.n_prefilled += sum(map(len, prompts)) - sum(known)
        self.n_copied += sum(known)

    def _shared(self, prompt: list[int], text: list[int]) -> int:
        """How many tokens of a prompt a row with this text has in its cache. The last token of each is in none."""
        can_share = keys_serve(self.model.config, max(len(prompt), len(text)))
        return common_prefix(prompt[:-1], text[:-1]) if can_share else 0

    def _begin(self, row: int, request: Request) -> None:
        """Set a row to a request whose prompt is in the cache, but for its last token."""
        step, end = self.step, len(request.prompt) - 1
        self.requests[row], self.texts[row] = request, list(request.prompt)
        step.tokens[row], step.pos[row], step.running[row] = request.prompt[-1], end, 1
        if step.top_k is None and request.temperature > 0:
            raise ValueError("draws need a top_k")
        step.temperature[row], step.top_p[row] = request.temperature, request.top_p
        if request.temperature > 0:
            seed = int.from_bytes(hashlib.sha256(request.seed.encode()).digest()[:7])
            length = min(request.limit, self.n_slot - 1 - end)
            uniform = torch.rand(length, generator=torch.Generator().manual_seed(seed))
            step.uniform[row, end:end + length] = uniform.to(step.uniform.device)
