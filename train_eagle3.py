"""What an EAGLE-3 head is trained on: the training-time test of arXiv 2503.01840, section 3.2.

    losses = Eagle3Learner(head, autocast=True, n_level=7)(batch)       # sums over the tokens of the answers

Of a text t_0 t_1 ... row i of the head begins a draft behind position i. Step 0 sees the target's hidden states of i
and the token t_{i+1}, and predicts t_{i+2}. Step s sees what step s - 1 of the same row put out and the token
t_{i+1+s}, at RoPE position i + s, and predicts t_{i+2+s}. It attends to what decoding then has in the head's cache:
step 0 of all rows up to i, which are verified positions, and the row's own steps. Gradients go through the whole chain.

The loss of a step is the cross-entropy with the target's distribution over the draft vocabulary, where the token to
predict is the assistant's and the target's likeliest token can be drafted. Step s weighs DECAY ** s. The mean is over
the tokens of the answers. There is no loss of features, and no noise.

Shapes: B dialogues, T tokens, R = T - 2 rows, S steps, M positions that count, H heads, K key/value heads, D head dim,
h head width, t target width, V vocabulary, Vd draft vocabulary.
"""
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eagle_head import Eagle3Head
from masks import attention_bias
from model import Attention
from rope import apply_rope, rope_cos_sin
from train_features import Batch
from train_loss import LOGITS_AT_ONCE, draft_rows

DECAY = 0.8     # of the weight, from one step to the next
BLOCK = 64      # rows that attend at a time, at least: what they cannot see is not computed


class Eagle3Losses(NamedTuple):
    """Sums over the positions that count. All but the first are of step 0."""
    loss: Tensor            # of all steps, weighted: what is minimised
    cross_entropy: Tensor   # where the target's likeliest token is in the draft vocabulary
    agreement: Tensor       # positions where head and target find the same token likeliest
    top1: Tensor            # positions where the head finds the text's token likeliest


class Eagle3Learner(nn.Module):
    """The head with its losses: what DistributedDataParallel wraps. n_level is the number of steps."""
    losses = Eagle3Losses

    def __init__(self, head: Eagle3Head, autocast: bool, n_level: int = 1):
        super().__init__()
        self.head, self.autocast, self.n_level = head, autocast, n_level

    def forward(self, batch: Batch, noise: Tensor | None = None) -> Eagle3Losses:
        tokens, features, loss_mask, final = batch
        head, learnt = self.head, loss_mask[:, 2:]                                  # [B, R]: of the tokens predicted
        outputs = torch.stack([out[learnt] for out in self.outputs(tokens, features)], dim=1)          # [M, S, h]
        steps = torch.arange(outputs.shape[1], device=tokens.device)
        begins = learnt.nonzero()[:, 1:] >= steps   # [M, S]: the step that predicts this token has a row in the text
        output: Any = head.target.output
        return Eagle3Losses(*DraftCrossEntropy.apply(
            outputs, head.output.weight, final[:, 1:-1][learnt], output.weight, head.draft_ids,
            begins * DECAY ** steps, draft_rows(head, tokens[:, 2:][learnt]),
            torch.bfloat16 if self.autocast else torch.float32))

    def outputs(self, tokens: Tensor, features: Tensor) -> list[Tensor]:
        """What the LM head takes, of each step: [B, R, h]. Row r of step s began at r - s: all steps of a row here
        predict the same token. The first s rows of step s are zeros."""
        head, n_row = self.head, tokens.shape[1] - 2
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in head.layers]
        outputs, pos = [], torch.arange(n_row, device=tokens.device)[None]
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            g = head.fuse(features[:, :-2])
            for step in range(min(self.n_level, n_row)):
                n = n_row - step    # rows whose token to predict lies in the text
                rope = rope_cos_sin(pos[:, step:], head.inv_freq, g.dtype, head.config.rope_scaling)
                g = run_step(head, tokens[:, 1 + step:-1], g[:, :n], rope, seen)
                outputs.append(F.pad(g if head.spec.norm_output else head.norm(g), (0, 0, step, 0)))
        return outputs


def step_mask(begin: int, end: int, step: int, device: torch.device | str = "cpu") -> Tensor:
    """[1, end - begin, end + step * (end - begin)] bool: what the rows begin .. end - 1 of a step see. Of step 0 the
    rows up to their own, out of the rows before `end`; then of each later step, out of these rows, their own alone."""
    own = torch.eye(end - begin, dtype=torch.bool, device=device)
    causal = torch.ones(end - begin, end, dtype=torch.bool, device=device).tril(begin)
    return torch.cat((causal, *[own] * step), dim=1)[None]


def run_step(head: Eagle3Head, tokens: Tensor, g: Tensor, rope: tuple[Tensor, Tensor],
             seen: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    """`Eagle3Head.run_layers` for fused or own features g [B, n, h], with what was `seen` in the place of a cache: of
    each layer the keys and values of the steps so far. A cache is written in place, which no gradient survives."""
    normed = head.hidden_norm(g)
    x = torch.cat((head.input_norm(head.target.tok_embeddings(tokens)), normed), dim=-1)
    residual = normed if head.spec.norm_before_residual else g
    for layer, of_layer in zip(head.layers, seen):
        x = residual + attend(layer.attention, layer.attention_norm(x), rope, of_layer)
        x = residual = x + layer.feed_forward(layer.ffn_norm(x))
    return head.norm(x) if head.spec.norm_output else x


def attend(attention: Attention, x: Tensor, rope: tuple[Tensor, Tensor], seen: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`Attention.forward` of the rows x [B, n, .] of a step, to all of `seen`, to which they are added."""
    H, K, D = attention.n_head, attention.n_kv_head, attention.head_dim
    q, k, v = attention.wqkv(x).unflatten(2, (H + 2 * K, D)).split((H, K, K), dim=2)
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    seen.append((apply_rope(k, rope), v))
    q, attended, n_row = apply_rope(q, rope).unflatten(2, (K, H // K)), [], x.shape[1]      # [B, n, K, G, D]
    size = max(BLOCK, -(-n_row // 8))   # few blocks, as each keeps a copy of what it sees
    for begin in range(0, n_row, size):
        end = min(begin + size, n_row)
        (k, v), *later = seen
        keys, values = (torch.cat(parts, dim=1).transpose(1, 2) for parts in (              # [B, K, S, D]
            [k[:, :end], *(k[:, begin:end] for k, _ in later)], [v[:, :end], *(v[:, begin:end] for _, v in later)]))
        bias = attention_bias(step_mask(begin, end, len(later), x.device), H // K, q.dtype)
        rows = q[:, begin:end].permute(0, 2, 3, 1, 4).flatten(2, 3)
        y = F.scaled_dot_product_attention(rows, keys, values, attn_mask=bias)              # [B, K, G * rows, D]
        attended.append(y.unflatten(2, (H // K, -1)).permute(0, 3, 1, 2, 4).flatten(2))
    return attention.wo(torch.cat(attended, dim=1))


class DraftCrossEntropy(torch.autograd.Function):
    """The losses of all steps, LOGITS_AT_ONCE logits at a time.

    As in train_loss.SoftCrossEntropy the gradient of a block is computed while its logits are there. The target's
    distribution of a position is computed once for all steps that predict the token behind it.
    """

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weight: Tensor, final: Tensor, target_weight: Tensor, ids: Tensor | None,
                factors: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """outputs        [M, S, h], normed
        weight         [Vd, h] of the head's LM head
        final          [M, t] the target's final states, from which its LM head, target_weight [V, t], guesses
        ids            [Vd] the draft vocabulary, None for all tokens
        factors        [M, S] of the steps' losses; 0 where there is no step
        labels         [M, 1] the row of `weight` of the text's token, -1 outside the draft vocabulary

        -> the Eagle3Losses. The products are in `dtype`.
        """
        loss, first, same, right = torch.zeros(4, device=weight.device)
        n_step, (n_draft, h) = outputs.shape[1], weight.shape
        row_of = None       # [V] of `weight`, -1 outside the draft vocabulary
        if ids is not None:
            row_of = torch.full((len(target_weight),), -1, device=weight.device)
            row_of[ids] = torch.arange(n_draft, device=weight.device)
        w, grad = weight.to(dtype), torch.empty_like(outputs)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        n = max(1, LOGITS_AT_ONCE[weight.device.type] // max(len(target_weight), n_step * n_draft))
        for begin in range(0, len(outputs), n):
            block = slice(begin, begin + n)
            goal = final[block].to(target_weight.dtype) @ target_weight.T           # [n, V]
            best = goal.argmax(-1, keepdim=True)
            if row_of is not None:
                best, goal = row_of[best], goal[:, ids]
            probs = goal.softmax(-1, dtype=torch.float)                             # [n, Vd]
            factor = factors[block] * (best >= 0)                                   # [n, S]
            x = outputs[block].to(dtype).flatten(0, 1)
            log_q = (x @ w.T).log_softmax(-1, dtype=torch.float).view(-1, n_step, n_draft)
            entropy = -(log_q @ probs[:, :, None])[:, :, 0]                         # [n, S]
            loss += (entropy * factor).sum()
            first += entropy[:, 0] @ (best[:, 0] >= 0).float()
            likeliest, row = log_q[:, 0].amax(-1, keepdim=True), labels[block]      # argmax is slow on a CPU
            same += ((log_q[:, 0].gather(-1, best[:, :1].clamp_min(0)) == likeliest) & (best[:, :1] >= 0)).sum()
            right += ((log_q[:, 0].gather(-1, row.clamp_min(0)) == likeliest) & (row >= 0)).sum()
            error = log_q.exp_().sub_(probs[:, None]).mul_(factor[:, :, None]).flatten(0, 1).to(dtype)
            grad[block] = (error @ w).view(-1, n_step, h)
            if grad_weight is not None:
                grad_weight += error.T @ x
        ctx.save_for_backward(grad, grad_weight)
        ctx.mark_non_differentiable(first, same, right)
        return loss, first, same, right

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_) -> tuple[Tensor | None, ...]:
        grad, grad_weight = ctx.saved_tensors
        return grad * grad_loss, None if grad_weight is None else grad_weight * grad_loss, *[None] * 6
