"""What a head is trained on, and how well it drafts: the losses of EAGLE, n-alpha and the accepted length of a chain.

    losses = Learner(head, autocast=True)(batch, input_noise(...))      # EAGLE-1: sums over the tokens of the answers
    figures = evaluate(learner, features, held_out)                     # on dialogues not trained on
    ranks = draft_ranks(head, tokens, features, max_depth=5)            # of the true tokens among the guesses

[1] is EAGLE, arXiv 2401.15077. Of a text t_0 t_1 ... the target's feature at t_i is f_i, from which its LM head guesses
t_{i+1}. The head is given the pair (f_i, t_{i+1}) and predicts f_{i+1}, from which the same LM head guesses t_{i+2}.
It counts where t_{i+2} is the assistant's. What EAGLE-3 learns is in train_eagle3.py; how well a head of any kind
drafts is measured here.

Shapes: B dialogues, T tokens, M positions that count, L levels, V vocabulary or draft vocabulary.
"""
import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from draft_tree import PAPER_TREE
from eagle_head import EagleHead
from train_features import Batch, Features

# Elements in a block of logits, whatever the vocabulary. On a CPU 16 MiB in fp32, which stay in its cache.
LOGITS_AT_ONCE = {"cpu": 2 ** 22, "cuda": 2 ** 27, "mps": 2 ** 25}
MASK_AT_ONCE = 2 ** 20      # elements of an evaluation's mask, where that of a training step is smaller
N_ALPHA = 5                 # n-alpha is reported for n = 0 .. 4
PAPER_PATHS = {tuple(map(int, path)) for path in PAPER_TREE}


class SoftCrossEntropy(torch.autograd.Function):
    """Sum over positions of CE(softmax(true W^T), softmax(predicted W^T)), LOGITS_AT_ONCE logits at a time; and the
    part of it that the `top_k` likeliest tokens of each softmax(true W^T) make, which HASS adds (arXiv 2408.15766).

    The gradient of a block, (softmax(predicted) - softmax(true)) W, is computed while its logits are there. So nothing
    of their size is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, true: Tensor, weight: Tensor,
                labels: Tensor | None = None, top_k: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """predicted, true [M, dim], weight [V, dim], labels [M, 1]: the weight's row of the text's token, -1 for none
        -> loss [], its part [], and with labels: positions where predicted and true have the same likeliest token [],
        and where it is the label [].
        """
        loss, part, same, right = torch.zeros(4, device=weight.device)
        grad = torch.empty_like(predicted)
        grad_part = torch.empty_like(predicted) if top_k else None
        n = max(1, LOGITS_AT_ONCE[weight.device.type] // weight.shape[0])
        for begin in range(0, predicted.shape[0], n):
            logits = predicted[begin:begin + n].to(weight.dtype) @ weight.T             # [n, V]
            probs = (true[begin:begin + n].to(weight.dtype) @ weight.T).softmax(-1, dtype=torch.float)
            log_q = logits.log_softmax(-1, dtype=torch.float)
            best = log_q.amax(-1, keepdim=True)
            if labels is not None:
                same += (log_q.gather(-1, probs.argmax(-1, keepdim=True)) == best).sum()
                row = labels[begin:begin + n]
                right += ((log_q.gather(-1, row.clamp_min(0)) == best) & (row >= 0)).sum()
            loss -= torch.dot(probs.flatten(), log_q.flatten())
            if grad_part is not None:
                few, index = probs.topk(min(top_k, probs.shape[-1]))                    # [n, K]
                part -= torch.dot(few.flatten(), log_q.gather(-1, index).flatten())
                error = log_q.exp().mul_(few.sum(-1, keepdim=True)).scatter_add_(-1, index, -few)
                grad_part[begin:begin + n] = error.to(weight.dtype) @ weight
            grad[begin:begin + n] = log_q.exp_().sub_(probs).to(weight.dtype) @ weight
        ctx.save_for_backward(grad, grad_part)
        ctx.mark_non_differentiable(same, right)
        return loss, part, same, right

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_of_part: Tensor, *_) -> tuple[Tensor | None, ...]:
        grad, grad_part = ctx.saved_tensors
        grad = grad * grad_loss if grad_part is None else grad * grad_loss + grad_part * grad_of_part
        return grad, None, None, None, None


class Losses(NamedTuple):
    """Sums over the positions that count. The first three are averaged over the levels, the others are of the first."""
    loss: Tensor            # what is minimised
    smooth_l1: Tensor       # averaged over the width
    cross_entropy: Tensor
    agreement: Tensor       # positions where head and target find the same token likeliest
    top1: Tensor            # positions where the head finds the text's token likeliest


class Learner(nn.Module):
    """The head with its losses: what DistributedDataParallel wraps.

    The loss is SmoothL1 + cls_weight * CE; with top_k, also the part of CE of the target's top_k likeliest tokens.

    n_level > 1 also trains on what the head meets while drafting. Level d continues each position along the true tokens
    from features that are d steps the head's own, as in HASS (arXiv 2408.15766) and EAGLE-3's training-time test. The
    features of each level but the last come from a pass without gradient; then one pass with it takes all levels.
    """
    losses = Losses

    def __init__(self, head: EagleHead, autocast: bool, n_level: int = 1, cls_weight: float = 0.1, top_k: int = 0):
        super().__init__()
        self.head, self.autocast, self.n_level, self.cls_weight, self.top_k = head, autocast, n_level, cls_weight, top_k

    @property
    def weight(self) -> Tensor:
        """[V, dim] of the target's LM head, frozen: the rows of the draft vocabulary where there is one."""
        output: Any = self.head.draft_output or self.head.target.output
        return output.weight

    def forward(self, batch: Batch, noise: Tensor | None) -> Losses:
        tokens, features, loss_mask, _ = batch
        n_pair, n_level = tokens.shape[1] - 2, self.n_level
        inputs = features[:, :-2].float()
        if noise is not None:
            inputs = inputs + noise
        for level in range(1, n_level):
            with torch.no_grad():
                own = self.predict(tokens, inputs, level)[:, -n_pair:].float()      # of the last level so far
            inputs = torch.cat((inputs, features[:, :1].float(), own[:, :-1]), dim=1)
        predicted = self.predict(tokens, inputs, n_level).unflatten(1, (n_level, n_pair))   # [B, L, n_pair, dim]
        sums, counts = torch.zeros(3, device=tokens.device), []
        for level in range(n_level):
            mask = loss_mask[:, 2 + level:]     # level d of a position needs d pairs before it
            true = features[:, 1 + level:-1][mask].float()                          # [M, dim]
            ours = predicted[:, level, level:][mask].float()
            smooth_l1 = F.smooth_l1_loss(ours, true, reduction="sum") / ours.shape[-1]
            labels = draft_rows(self.head, tokens[:, 2:][mask]) if level == 0 else None
            cross_entropy, part, *of_level = SoftCrossEntropy.apply(ours, true, self.weight, labels, self.top_k)
            counts = counts or of_level
            loss = smooth_l1 + self.cls_weight * cross_entropy + part
            sums = sums + torch.stack((loss, smooth_l1, cross_entropy)) / n_level
        return Losses(*sums, *counts)

    def predict(self, tokens: Tensor, inputs: Tensor, n_level: int) -> Tensor:
        """The head over the pairs of n_level levels, one level after the other: [B, n_level * n_pair, dim]."""
        n_pair = tokens.shape[1] - 2
        pos = torch.arange(n_pair, device=tokens.device)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            return self.head(tokens[:, 1:-1].repeat(1, n_level), inputs, pos.repeat(n_level),
                             mask=level_mask(n_pair, n_level, tokens.device))


def draft_rows(head: EagleHead, tokens: Tensor) -> Tensor:
    """tokens [M] -> [M, 1]: the row of the head's LM head that each has, -1 outside the draft vocabulary."""
    if head.draft_ids is None:
        return tokens[:, None]
    rows = tokens.new_full((head.config.vocab_size,), -1)
    rows[head.draft_ids] = torch.arange(len(head.draft_ids), device=rows.device)
    return rows[tokens, None]


def level_mask(n_pair: int, n_level: int, device: torch.device, rows: Tensor | None = None,
               window: int | None = None) -> Tensor:
    """[1, n_level * n_pair, n_level * n_pair] bool, or [1, R, n_level * n_pair] for the given `rows` [R] only.

    The pair at position j on level d is a draft, d steps after position j - d. It sees the true pairs (level 0) up to
    there, the last `window` of them if given, then the drafts between, one a level, and itself.
    """
    index = torch.arange(n_level * n_pair, device=device)
    rows = (index if rows is None else rows)[:, None]
    start_of = lambda index: index % n_pair - index // n_pair
    true_pairs = index <= start_of(rows)                    # of level 0, as a start lies below n_pair
    if window is not None:
        true_pairs &= index > start_of(rows) - window
    own_drafts = (index >= n_pair) & (index // n_pair <= rows // n_pair) & (start_of(index) == start_of(rows))
    # A start before the text has nothing to see. Its rows never count, but a row of a softmax may not be empty.
    return (true_pairs | own_drafts | (index == rows))[None]


def input_noise(batch: Batch, indices: list[int], lengths: list[int], scale: float, seed: int) -> Tensor:
    """U(-scale, scale) [B, T - 2, dim], drawn for each dialogue by itself: so it does not depend on how many processes
    share a batch, and to resume no generator's state is needed."""
    noise = torch.zeros(*batch.features[:, 2:].shape, device=batch.tokens.device)
    for row, i in enumerate(indices):
        generator = torch.Generator(noise.device).manual_seed((seed * 1_000_003 + i) % 2 ** 63)     # its largest seed
        noise[row, :lengths[i] - 2].uniform_(-scale, scale, generator=generator)
    return noise


# Evaluation


@torch.no_grad()
def evaluate(learner: Any, features: Features, held_out: list[int], rank: int = 0, world: int = 1) -> dict:
    """Losses, top-1/2/3 accuracy, n-alpha, and the accepted length of a chain and of the paper's tree, on dialogues not
    trained on.

    n-alpha [1, section 5.2]: how often a chain's draft is right when the last n features before it are the head's own.
    Losses and agreement are those of one level, whatever was trained. Accuracies count the positions that have N_ALPHA
    tokens behind them, losses and agreement all that count in training.
    """
    learner = copy.copy(learner)    # a Learner, or an Eagle3Learner
    learner.n_level = 1
    names = learner.losses._fields[1:-1]
    sums = torch.zeros(len(names) + 6 + 2 * N_ALPHA, dtype=torch.float64)
    device = learner.head.inv_freq.device
    for begin in range(0, len(held_out), world):
        mine = held_out[begin + rank:begin + rank + 1]
        batch = features.batch(mine or held_out[:1])    # as often on each process: a sharded target needs them all
        if not mine:
            continue
        losses = torch.stack(learner(batch, None)).double().cpu()
        if not losses.isfinite().all():
            line = features.dialogues[mine[0]].line
            raise ValueError(f"the loss of the held-out dialogue in line {line} is not finite")
        with torch.autocast(device.type, torch.bfloat16, enabled=learner.autocast):
            ranks = draft_ranks(learner.head, batch.tokens[0], batch.features[0], N_ALPHA)
        ranks = ranks[:, batch.loss_mask[0, 2:2 + ranks.shape[1]]].cpu()
        right = (ranks == 0).double()
        sums += torch.cat((losses[1:-1], torch.tensor([batch.loss_mask[:, 2:].sum().item(), ranks.shape[1]]),
                           torch.tensor(tokens_and_steps(PAPER_PATHS, list(zip(*ranks.tolist())))),
                           torch.stack([(ranks[0] < k).double().sum() for k in (2, 3)]),
                           right.sum(1), right.cumprod(0).sum(1)))
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    n_counted, n_rank, n_token, n_step, top2, top3, *alpha = sums[len(names):].tolist()
    n_counted, n_rank = max(1.0, n_counted), max(1.0, n_rank)   # dialogues of a few tokens have nothing to draft along
    return {**{f"eval_{name}": total / n_counted for name, total in zip(names, sums.tolist())},
            "eval_positions": int(n_counted),
            "eval_top1": alpha[0] / n_rank, "eval_top2": top2 / n_rank, "eval_top3": top3 / n_rank,
            "eval_n_alpha": [round(right / n_rank, 4) for right in alpha[:N_ALPHA]],
            "eval_chain_length": 1 + sum(alpha[N_ALPHA:]) / n_rank, "eval_tree_length": n_token / max(1.0, n_step)}


def tokens_and_steps(tree: set[tuple[int, ...]], ranks: list[tuple[int, ...]]) -> tuple[int, int]:
    """What decoding an answer with this tree would take: see right_depths."""
    i = n_step = 0
    depths = right_depths(tree, ranks)
    while i < len(depths):
        i, n_step = i + 1 + depths[i], n_step + 1
    return i, n_step


def right_depths(tree: set[tuple[int, ...]], ranks: list[tuple[int, ...]]) -> list[int]:
    """How many drafts of the tree, a set of paths of child ranks, are right at each position. ranks[i]: ranks of the
    tokens after position i, each among the guesses at its depth."""
    return [next((d for d in range(len(row)) if row[:d + 1] not in tree), len(row)) for row in ranks]


@torch.inference_mode()
def draft_ranks(head: EagleHead, tokens: Tensor, features: Tensor, max_depth: int, begin: int = 0) -> Tensor:
    """For every position i >= begin at once: draft from pair (f_i, t_{i+1}) along the tokens that really follow, and
    rank t_{i+2}, t_{i+3}, ... among the guesses.

    tokens [T], features [T, ...] as the head takes them -> [max_depth, positions], 0 the likeliest.

    The head's cache holds one level (`level_mask`) after the other. All depths of a column lie inside the text. Masks
    are made for a block of positions at a time, so that none is larger than that of a training step on this text.
    """
    ids, hidden = tokens[None].long(), features[None, :-1]
    n_pair = ids.shape[1] - 1
    head.setup_caches(1, n_pair * max_depth)
    pos = torch.arange(n_pair, device=ids.device)
    ranks = []
    for level in range(min(max_depth, n_pair - begin - 1)):
        # Drafts that began at j - level: tokens t_{j+1}, features of the level before. Level 0 fills the cache.
        j = pos[begin + level:] if level else pos
        n_slot = (level + 1) * n_pair
        before = hidden[:, :-1] if level else hidden
        n = max(n_pair ** 2, MASK_AT_ONCE) // n_slot
        hidden = torch.cat([head(ids[:, at + 1], inputs, at, level * n_pair + at,
                                 level_mask(n_pair, level + 1, ids.device, level * n_pair + at, head.window),
                                 is_draft=level > 0)
                            for at, inputs in zip(j.split(n), before.split(n, dim=1))], dim=1)
        hidden = hidden if level else hidden[:, begin:]
        ranks.append(rank_of(head, hidden[0, :-1], ids[0, begin + level + 2:]))
    head.register_buffer("kv_cache", None, persistent=False)    # freed
    width = max(n_pair - begin - max_depth, 0)
    return torch.stack([rank[:width] for rank in ranks]) if width else ids.new_zeros(max_depth, 0)


def rank_of(head: EagleHead, hidden: Tensor, tokens: Tensor) -> Tensor:
    """hidden [M, dim], tokens [M] -> [M], the place of each token among the draft's guesses: 0 for the first, the size
    of the vocabulary for a token that is never drafted. Takes LOGITS_AT_ONCE logits at a time."""
    def of_block(hidden: Tensor, tokens: Tensor) -> Tensor:
        logits = head.draft_logits(hidden.to(head.target.norm.weight.dtype)).float()
        if not torch.is_tensor(logits):     # each rank has a part of the vocabulary
            logits = logits.full()
        rows = draft_rows(head, tokens)
        n_better = (logits > logits.gather(-1, rows.clamp_min(0))).sum(-1)
        return torch.where(rows[:, 0] >= 0, n_better, head.config.vocab_size)

    n_vocab = head.config.vocab_size if head.draft_ids is None else len(head.draft_ids)
    n = max(1, LOGITS_AT_ONCE[hidden.device.type] // n_vocab)
    return torch.cat([of_block(*block) for block in zip(hidden.split(n), tokens.split(n))])
