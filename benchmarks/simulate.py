"""EAGLE's whole decoding timed without a trained head: the accepted lengths are given.

    lengths = accept_lengths("3.62", most=6)        # a mean, or a file of generate.py --json or evaluate.py
    decoder = simulated_decoder(model, head, tree, lengths)

The step runs in full: it drafts, verifies, accepts and commits. Only the number of accepted drafts is taken from a list
on the device. The tokens mean nothing; the time is that of a head with these accepted lengths. A report of such times
has to say that they are simulated.
"""
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoder import Decoder, PlainStep
from draft_tree import Draft, Tree
from eagle_head import EagleHead
from eagle_step import Accepted, EagleStep
from model import Transformer
from sampling import Sampling

GOLDEN = (math.sqrt(5) - 1) / 2


def accept_lengths(spec: str, most: int) -> list[int]:
    """Tokens produced by each step, the bonus included: those of a file, or 1000 with the mean that `spec` says.

    most: what the tree's step can produce, its depth + 1. Raises ValueError where that is too little.
    """
    try:
        mean = float(spec)
    except ValueError:
        lengths = read_lengths(Path(spec))
    else:
        if not 1 <= mean <= most:
            raise ValueError(f"an accepted length of {spec} is not within 1 and {most}, what a step of this tree can "
                             "produce")
        low = min(int(mean), most - 1)
        n_high = round(1000 * (mean - low))
        lengths = [low] * (1000 - n_high) + [low + 1] * n_high
    if max(lengths) > most:
        raise ValueError(f"{spec} has steps of {max(lengths)} tokens; a step of this tree produces {most} at most")
    # In steps of the golden ratio through the sorted list: any stretch then has nearly the distribution of the whole.
    order = sorted(range(len(lengths)), key=lambda i: i * GOLDEN % 1)
    return [length for _, length in sorted(zip(order, sorted(lengths)))]


def read_lengths(file: Path) -> list[int]:
    """All "accept_lengths" of a file of JSON or of JSON lines."""
    if not file.is_file():
        raise FileNotFoundError(f"--simulate-accept {file}: neither a number nor a file")
    try:
        text = file.read_text(encoding="utf-8")
        try:
            content = json.loads(text)
        except json.JSONDecodeError:
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError:
        raise ValueError(f"{file} is neither JSON nor JSON lines") from None
    lengths = list(find_lengths(content))
    if not lengths or not all(type(n) is int and n >= 1 for n in lengths):
        raise ValueError(f'{file}: no lists of positive integers under "accept_lengths"')
    if max(lengths) == 1:
        raise ValueError(f"{file}: every accepted length is 1: this was decoded plainly")
    return lengths


def find_lengths(content: Any, inside: bool = False) -> Iterator[Any]:
    """All values under a key "accept_lengths", however deep."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from find_lengths(value, inside or key == "accept_lengths")
    elif isinstance(content, list):
        for value in content:
            yield from find_lengths(value, inside)
    elif inside:
        yield content


class SimulatedStep(EagleStep):
    """EAGLE's step with the number of accepted drafts replayed from `lengths`, tokens of each step, over and over."""

    def __init__(self, model: Transformer, head: EagleHead, tree: Tree, batch_size: int, lengths: list[int]):
        super().__init__(model, head, tree, batch_size)
        self.lengths = torch.tensor(lengths, device=self.pos.device)
        self.turn = torch.zeros_like(self.pos)      # [B, 1] of the next step, in `lengths`

    @property
    def state(self) -> list[Tensor]:
        return [*super().state, self.turn]

    def accept(self, logits: Tensor, draft: Draft) -> Accepted:
        accepted = super().accept(logits, draft)    # called for the time it takes
        n_accepted = self.lengths[self.turn] - 1
        self.turn.add_(1).remainder_(len(self.lengths))
        return accepted._replace(n_accepted=n_accepted)


def simulated_decoder(model: Transformer, head: EagleHead, tree: Tree, lengths: list[int],
                      compile: bool = False) -> Decoder:
    """A Decoder for one row whose EAGLE steps produce `lengths` tokens, in turn."""
    decoder = Decoder(model, 1, compile=compile, head=head, tree=tree)
    decoder.eagle = SimulatedStep(model, head, tree, 1, lengths)
    decoder.plain = PlainStep(model, decoder.eagle.tokens, decoder.eagle.pos, Sampling())
    return decoder
