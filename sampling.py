"""From logits to tokens: temperature, top-k, top-p, and the draw.

    tokens = next_tokens(logits, Sampling(temperature=0.7, top_p=0.9))      # [..., V] -> [...]

One `logits_to_probs` serves plain decoding, drafting and verification. Greedy decoding is its limit at temperature 0.

Shapes: V vocabulary.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NOT_FINITE = -2      # returned in place of a token when its logits hold NaN or infinity


class Sampling(NamedTuple):
    """Options of sampling; temperature 0 is greedy decoding."""
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def check(self) -> None:
        """Raises ValueError, naming the option and its value, for one that is out of range."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature {self.temperature} is not a number of 0 or more")
        if self.top_k is not None and not self.top_k >= 1:
            raise ValueError(f"top_k {self.top_k} is not a number of 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not a number above 0, up to 1")


def logits_to_probs(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                    top_p: float | None = None) -> Tensor:
    """The distribution that is sampled from, [..., V] -> [..., V] fp32, for decoding, drafting and verification alike.

    Temperature, then the top_k largest logits, then the smallest set of tokens whose probability reaches top_p, as
    transformers orders them. Temperature 0 is the limit: all mass on the largest logit.
    """
    if not isinstance(logits, Tensor):
        logits = logits.full()  # tp.ShardedLogits
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # shifted first: no overflow however cold it is
    if top_k is not None and top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        # A CUDA graph or a compiled graph cannot branch on values. On a GPU a sort is quick.
        may_branch = probs.is_cpu and not torch.compiler.is_compiling()
        probs = (nucleus_from_likeliest if may_branch else nucleus)(probs, top_p)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens that holds top_p, and set all other probabilities to 0: [..., V]."""
    ordered, tokens = torch.sort(probs, dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # mass of the likelier tokens: 0 for the first, which always stays
    return torch.zeros_like(probs).scatter(-1, tokens, ordered.masked_fill(before >= top_p, 0))


@torch.jit.script_if_tracing
def nucleus_from_likeliest(probs: Tensor, top_p: float) -> Tensor:
    """`nucleus`, bit for bit, from the 256 likeliest tokens of a row, or from more if these hold less than top_p.

    A sort of the whole vocabulary takes a CPU 20 times as long. Scripted, so that a trace keeps the branches.
    """
    V, n = probs.shape[-1], 256
    if V <= n:
        return nucleus(probs, top_p)
    rows = probs.reshape(-1, V)
    out, waiting = torch.zeros_like(rows), torch.arange(rows.shape[0])
    # Of equal probabilities the lower token comes first, as in a stable sort. In fp64 these factors tell them apart by
    # less than 2^-24, the least relative difference between two fp32 numbers.
    order = 1 - torch.arange(V, dtype=torch.double) * 2.0 ** -44
    while n < V and len(waiting) > 0:
        some = rows[waiting]
        tokens = (some.double() * order).topk(n, dim=-1).indices
        ordered = some.gather(-1, tokens)
        before = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(some).scatter(-1, tokens, ordered.masked_fill(before >= top_p, 0))
        holds = before[:, -1] >= top_p + 1e-5       # sums in another order differ by less than 1e-5
        out[waiting[holds]] = kept[holds]
        waiting = waiting[~holds]
        n = n * 16
    if len(waiting) > 0:
        out[waiting] = nucleus(rows[waiting], top_p)
    return out.view_as(probs)


def race(probs: Tensor) -> Tensor:
    """[..., V] over exponential clocks -> [..., V]: the R largest, in order, are R draws without replacement."""
    return probs / torch.empty_like(probs).exponential_().clamp_min_(1e-30)


def draw_children(logits: Tensor, n_child: int, sampling: Sampling | None) -> tuple[Tensor, Tensor | None]:
    """[..., Vd] -> draft ids [..., R] in order, and the distribution that they were drawn from, [..., Vd].

    Without `sampling` the likeliest tokens, and no distribution. With it draws without replacement, as multi-round
    speculative sampling needs them.
    """
    if sampling is None:
        return logits.topk(n_child, dim=-1).indices, None
    probs = logits_to_probs(logits, *sampling)
    return race(probs).topk(n_child, dim=-1).indices, probs


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """[..., V] -> [..., R] fp32: the log probabilities of tokens ids [..., R]."""
    if not isinstance(logits, Tensor):
        logits = logits.full()  # tp.ShardedLogits
    return logits.float().log_softmax(-1).gather(-1, ids)


def sample(probs: Tensor) -> Tensor:
    """Draw one token a row, [..., V] -> [...], without a host synchronisation. NOT_FINITE for a row with NaN."""
    return tokens_of_finite(race(probs).max(-1))


def next_tokens(logits: Tensor, sampling: Sampling) -> Tensor:
    """[..., V] -> [...]: the largest logit at temperature 0, else a draw from torch's own generator.

    NOT_FINITE for a row that holds NaN or +inf, or nothing but -inf. Single tokens at -inf are never drawn.
    """
    if sampling.temperature == 0:
        return tokens_of_finite(logits.max(-1))  # argmax takes four times as long on a CPU in bf16
    return sample(logits_to_probs(logits, *sampling))


def tokens_of_finite(largest: "torch.return_types.max") -> Tensor:
    """Its indices, NOT_FINITE where the maximum is infinite or NaN. torch's max is NaN if any value is."""
    return largest.indices.masked_fill(largest.values - largest.values != 0, NOT_FINITE)
