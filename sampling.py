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

NOT_FINITE = -2      # in the place of a token: its logits hold NaN or infinity


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
        # A CUDA graph or a compiled graph must not branch on values; on a GPU a sort is quick.
        by_values = probs.is_cpu and not torch.compiler.is_compiling()
        probs = (nucleus_by_the_likeliest if by_values else nucleus)(probs, top_p)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens that holds top_p, and set all other probabilities to 0: [..., V]."""
    ordered, tokens = torch.sort(probs, dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered  # mass of the likelier tokens: 0 for the first, which always stays
    return torch.zeros_like(probs).scatter(-1, tokens, ordered.masked_fill(before >= top_p, 0))


@torch.jit.script_if_tracing
def nucleus_by_the_likeliest(probs: Tensor, top_p: float) -> Tensor:
    """`nucleus` to the bit, from the 256 likeliest tokens of each row, more where they do not hold top_p.

    On a CPU a sort of the whole vocabulary takes 20 times as long. Scripted, so that a trace keeps the branches.
    """
    V, n = probs.shape[-1], 256
    if V <= n:
        return nucleus(probs, top_p)
    rows = probs.reshape(-1, V)
    out, waiting = torch.zeros_like(rows), torch.arange(rows.shape[0])
    # Equal probabilities: the lower token comes first. fp64 has room to tell them apart by less than 2^-24, the least
    # difference between two fp32 numbers.
    order = 1 - torch.arange(V, dtype=torch.double) * 2.0 ** -44
    while n < V and len(waiting) > 0:
        some = rows[waiting]
        tokens = (some.double() * order).topk(n, dim=-1).indices
        ordered = some.gather(-1, tokens)
        before = ordered.cumsum(-1) - ordered
        kept = torch.zeros_like(some).scatter(-1, tokens, ordered.masked_fill(before >= top_p, 0))
        holds = before[:, -1] >= top_p + 1e-5       # more than sums in another order may differ by
        out[waiting[holds]] = kept[holds]
        waiting = waiting[~holds]
        n = n * 16
    if len(waiting) > 0:
        out[waiting] = nucleus(rows[waiting], top_p)
    return out.view_as(probs)


def sample(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one token a row, [..., V] -> [...], by a race of exponential clocks: no host synchronisation.

    NOT_FINITE where a row holds NaN.
    """
    clocks = torch.empty_like(probs).exponential_(generator=generator).clamp_min_(1e-30)
    return tokens_of_finite((probs / clocks).max(-1))


def next_tokens(logits: Tensor, sampling: Sampling) -> Tensor:
    """[..., V] -> [...]: the largest logit at temperature 0, else a draw from torch's own generator.

    NOT_FINITE for a row that holds NaN or +inf, or nothing but -inf; single tokens at -inf are merely impossible.
    """
    if sampling.temperature == 0:
        return tokens_of_finite(logits.max(-1))  # argmax takes four times as long on a CPU in bf16
    return sample(logits_to_probs(logits, *sampling))


def tokens_of_finite(largest: "torch.return_types.max") -> Tensor:
    """The indices of `largest`; NOT_FINITE where the value is infinite or NaN (torch's max is NaN if any value is)."""
    return largest.indices.masked_fill(largest.values - largest.values != 0, NOT_FINITE)
