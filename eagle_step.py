"""One EAGLE step: draft a tree, verify it in one pass of the target, accept a path, commit it.

    step = EagleStep(model, head, load_tree("static"), batch_size=1)
    step.prefill([prompt_ids])      # step.produced [B, D + 1]: the first token, then -1
    step(n_slot=256)                # step.produced: the new tokens, -1 where there are fewer

Acceptance is lossless: greedy tokens are the target's own, sampled ones are drawn from its own distribution (EAGLE-1,
arXiv 2401.15077, called [1]).

Shapes: B batch, N tree nodes including the root, E nodes expanded by the head (the root not counted), D tree depth,
R children of a node, K key/value heads, S cache slots, V vocabulary, F width of the features that the head reads.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attention import MAX_TOKENS, Seen, path_slots, rows_seen
from copy_branch import CopyBranch
from draft_tree import (Draft, DynamicPlan, DynamicTree, StaticPlan, StaticTree, Tree, block_bias, draft_dynamic,
                        draft_nothing, draft_static, lineage, plan_dynamic, plan_static, shown_columns)
from eagle_head import EagleHead
from masks import attention_bias, causal_mask, outside
from model import Transformer, prefill
from recorder import Recorder
from sampling import NOT_FINITE, Sampling, logits_to_probs, next_tokens, sample


class Accepted(NamedTuple):
    path: Tensor        # [B, D + 1] nodes: the root and the accepted ones; after them each entry is its own index
    n_accepted: Tensor  # [B, 1] drafts accepted
    bonus: Tensor       # [B, 1] the target's own token after the last accepted one
    said: Tensor | None = None  # [B, N] the target's likeliest token after each node, where all of them are known


def accept_greedy(logits: Tensor, draft: Draft, plan: StaticPlan | DynamicPlan, all_said: bool = False) -> Accepted:
    """A node is accepted if its token is the likeliest after its parent. logits [B, N, V].

    all_said: what the target said after the leaves counts too."""
    copied = draft.copied
    if isinstance(plan, DynamicPlan) or copied is not None or all_said:
        token = next_tokens(logits, Sampling())
        is_wrong = draft.tokens != token.gather(1, draft.parents)
        # Of the head's branch and a copied one that are both right, the deeper one is taken.
        path, n_accepted, last = walk(draft, is_wrong if copied is None else is_wrong | copied.found_nothing, plan)
        return Accepted(path, n_accepted, token.gather(1, last), token)
    # Only nodes with children need a token: 11 of the paper's 26. All 26 would take a CPU 1% of a step more.
    token = next_tokens(logits[:, plan.expanded], Sampling())
    is_wrong = draft.tokens != token.gather(1, plan.expanded_row[draft.parents])
    path, n_accepted, last = walk(draft, is_wrong, plan)
    return Accepted(path, n_accepted, next_tokens(logits[plan.row, last], Sampling()))


def accept_likeliest(logits: Tensor, draft: Draft, plan: StaticPlan | DynamicPlan, sampling: Sampling) -> Accepted:
    """Draw the target's token at every node and step into the child that carries it. logits [B, N, V].

    Every token of the result is a draw from the target's own distribution, so the output is lossless. One uniform
    number a node decides which child is drawn, if any. The token itself is drawn at the last node only, from the tokens
    that none of its children has.
    """
    tokens, parents, copied = draft.tokens, draft.parents, draft.copied
    probs = logits_to_probs(logits, *sampling)                                          # [B, N, V]
    mass = probs[plan.row, parents, tokens]                                             # [B, N] of each node's token
    if copied is not None:
        mass = mass.masked_fill(copied.is_idle, 0)
    # The masses of siblings lie side by side in the unit interval. The rest of it belongs to all other tokens.
    N = tokens.shape[1]     # without the copied branch in a step that has nothing to copy
    is_no_older_sibling = (parents[:, :, None] != parents[:, None]) | plan.is_later[:, :N, :N]
    begin = mass[:, None].masked_fill(is_no_older_sibling, 0).sum(-1)
    draw = torch.rand_like(mass).gather(1, parents)
    is_wrong = ~((begin <= draw) & (draw < begin + mass))
    path, n_accepted, last = walk(draft, is_wrong if copied is None else copied.decide(is_wrong), plan)
    p = probs[plan.row, last][:, 0]                                                     # [B, V]
    x = tokens[:, 1:]
    of_children = mass[:, 1:].masked_fill(parents[:, 1:] != last, 0)
    return Accepted(path, n_accepted, draw_rest(p.scatter_add(1, x, -of_children), p))


def accept_sampled(logits: Tensor, draft: Draft, plan: StaticPlan, sampling: Sampling, head: EagleHead) -> Accepted:
    """Multi-round speculative sampling [1, algorithm 1] over children drawn without replacement from draft.probs.

    Child x is accepted with probability min(1, p(x) / q(x)). If it is rejected, p becomes norm(max(0, p - q)), and q
    loses x and is normalised. The bonus token is drawn from the last p. logits [B, N, V].

    All rounds are computed from the first distributions P and Q: after k rejections, p is norm(max(0, P - c Q)) for
    some number c, because a token that q has lost has no mass left in p either. Each round adds m / s to c: m is the
    sum of max(0, P - c Q), s the mass left of Q.

    A copied child is one more proposal, after all drawn ones, with q = 1 at its token: accepted with probability p(x).
    """
    assert draft.probs is not None
    copied = draft.copied
    P = logits_to_probs(logits[:, plan.expanded], *sampling)                            # [B, E + 1, V]
    Q = head.to_target_probs(draft.probs.nan_to_num(0.0))
    x = draft.tokens[:, plan.children]                                                  # [B, E + 1, R]
    P_x, Q_x = P.gather(2, x), Q.gather(2, x) * plan.is_child
    # Q(x) = 0: not a draw. The draft's distribution had fewer tokens than the node has children.
    is_drawn = Q_x > 0
    s = Q.scatter(2, x, 0.0).sum(-1, keepdim=True) + Q_x.flip(-1).cumsum(-1).flip(-1)   # before each round
    weight = is_drawn / s.clamp_min(1e-30)
    c, m = [torch.zeros_like(s[:, :, :1])], [torch.ones_like(s[:, :, :1])]
    for r in range(x.shape[2]):
        c.append(torch.addcmul(c[-1], m[-1], weight[:, :, r:r + 1]))
        if r + 1 < x.shape[2]:
            m.append(torch.addcmul(P, c[-1], Q, value=-1).clamp_min_(0).sum(-1, keepdim=True))
    c_all = torch.cat(c, dim=2)                                                         # [B, E + 1, R + 1]
    odds = torch.addcmul(P_x, c_all[:, :, :-1], Q_x, value=-1) * s
    accepted = (torch.rand_like(Q_x) * Q_x * torch.cat(m, dim=2) < odds) & is_drawn     # [B, E + 1, R]
    is_wrong = accepted.cumsum(2) * accepted != 1                                       # all but the first accepted
    is_wrong = is_wrong.flatten(1)[:, plan.child_slot]                                  # [B, N]
    if copied is not None:
        N = plan.tree.n_node
        x_copy = draft.tokens[:, N:]                                                    # [B, C]
        p_copy = logits_to_probs(logits[:, N:-1], *sampling).gather(2, x_copy[:, 1:, None])[:, :, 0]
        rest = torch.addcmul(P[:, 0], c_all[:, 0, -1:], Q[:, 0], value=-1).clamp_min(0)     # [B, V] of the root
        p_first = rest.gather(1, x_copy[:, :1]) / rest.sum(1, keepdim=True).clamp_min(1e-30)
        p_first = p_first.masked_fill(accepted[:, :1].any(-1), 0)                       # a drawn child was accepted
        drawn = torch.rand_like(p_copy.new_empty(x_copy.shape)) < torch.cat((p_first, p_copy), 1)
        is_wrong = copied.decide(torch.cat((is_wrong, ~drawn), 1))
    path, n_accepted, last = walk(draft, is_wrong, plan)
    in_tree = last if copied is None else last.where(last < plan.tree.n_node, 0)
    expanded = plan.expanded_row[in_tree]
    c_last = c_all[plan.row, expanded][:, 0, -1:].masked_fill(plan.is_leaf[in_tree] | (in_tree != last), 0)
    p = logits_to_probs(logits[plan.row, last], *sampling)[:, 0]
    rest = torch.addcmul(p, c_last, Q[plan.row, expanded][:, 0], value=-1)
    if copied is not None:      # the copied child was rejected
        is_child = (draft.parents[:, N:] == last) & ~copied.is_idle[:, N:]
        rest = rest.masked_fill(torch.zeros_like(rest).scatter_add(1, x_copy, is_child.to(rest.dtype)) > 0, 0)
    return Accepted(path, n_accepted, draw_rest(rest, p))


def draw_rest(rest: Tensor, p: Tensor) -> Tensor:
    """Draw one token a row, [B, 1], from the positive part of rest [B, V]. If rounding left nothing, from p [B, V]."""
    return sample(torch.maximum(rest, p * 1e-20))[:, None]


def walk(draft: Draft, is_wrong: Tensor, plan: StaticPlan | DynamicPlan) -> tuple[Tensor, Tensor, Tensor]:
    """From the root, step into the child that is not wrong until there is none.

    is_wrong [B, N] judges each node as a child of its parent; the root's entry is ignored. At most one of several
    siblings is right, but for a copied one with the same token as another (greedy decoding). Returns path [B, D + 1]
    and n_accepted [B, 1] (see Accepted), and the last node [B, 1].
    """
    N = is_wrong.shape[1]
    n_copy = N - plan.tree.n_node
    end = max(plan.tree.depth, n_copy) + 1
    above = draft.ancestors                                                             # [B, N, N]
    is_cut_off = (above[:, :, 1:] & is_wrong[:, None, 1:]).any(-1)
    if n_copy:
        # The tree and the copied branch may both be right: the deepest node wins, of equals the tree's.
        depth_first = draft.depths * N + (N - 1 - plan.order[:, :N])
        last = N - 1 - depth_first.masked_fill(is_cut_off, 0).amax(1, keepdim=True) % N
    else:
        # At most one node of each depth is reached, and deeper nodes have higher numbers.
        last = plan.order[:, :N].masked_fill(is_cut_off, 0).amax(1, keepdim=True)
    # Nodes off the path are written past the end.
    depths = torch.where(above[plan.row, last][:, 0], draft.depths, plan.order[:, end:end + 1])
    path = plan.order[:, :end + 1].expand(len(last), -1).scatter(1, depths, plan.order[:, :N].expand_as(depths))
    return path[:, :end], draft.depths.gather(1, last), last


# One step


class EagleStep:
    """Draft, verify, accept and commit over static tensors without a host synchronisation: one CUDA graph or trace.

    State between steps: the root `tokens` [B, 1], the last token decided, at position `pos` [B, 1]; the head's output
    for it, `root_hidden` [B, 1, dim], which drafts the root's children; and what a copied branch holds. Without a head
    there is only the branch: prompt lookup decoding. The host reads one tensor after a step, `report` [B, D + 3]: the
    tokens produced, how many drafts were copied (all or none), and 1 where the next step has something to copy.
    """

    def __init__(self, model: Transformer, head: EagleHead | None, tree: Tree, batch_size: int,
                 sampling: Sampling = Sampling(), draw_drafts: bool | None = None):
        """tree: StaticTree.root() without a head.

        draw_drafts: draw children from the draft's distribution and verify them by multi-round speculative sampling.
        Without it they are the likeliest tokens. Default: draw where that is possible (static trees at a temperature),
        because more drafts are accepted (dev/log.md)."""
        sampling.check()
        if not isinstance(tree, StaticTree | DynamicTree):
            raise ValueError(f"tree {tree!r} is no tree: load_tree makes one of a name or a file")
        if (head is None) != (tree.depth == 0):
            raise ValueError("a tree needs a head that drafts it" if head is None else "a head needs a tree to draft")
        can_draw = isinstance(tree, StaticTree) and sampling.temperature > 0 and head is not None
        if draw_drafts and not can_draw:
            raise ValueError("drafts can be drawn for static trees and chains, at a temperature above 0")
        draw_drafts = can_draw if draw_drafts is None else draw_drafts
        if head is not None:
            check_children(tree, head)
        if model.is_exact and tree.n_node + tree.n_copy > MAX_TOKENS:
            raise ValueError(f"exact decoding verifies up to {MAX_TOKENS} tokens a step, this tree has {tree.n_node} "
                             f"nodes and {tree.n_copy} copied ones: --no-exact takes it")
        self.model, self.head, self.sampling, self.draw_drafts = model, head, sampling, draw_drafts
        device, dtype, n_copy = model.inv_freq.device, model.norm.weight.dtype, tree.n_copy
        self.plan: StaticPlan | DynamicPlan
        if isinstance(tree, StaticTree):
            self.plan = plan_static(tree.without_gaps() if draw_drafts else tree, batch_size, device, dtype)
        else:
            self.plan = plan_dynamic(tree, batch_size, device, dtype)
        self.tree: Tree = self.plan.tree
        self.n_room = self.tree.n_room
        self.n_end = model.kv_cache.shape[4]    # of the slots that a step reads, so many at the end may hold drafts
        self.recorder: Recorder | None = None   # Decoder(record=True) sets it
        self.branch = None
        if n_copy:
            self.branch = CopyBranch(n_copy, tree.n_node, batch_size, model.kv_cache.shape[4], device, dtype)
        self.tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.pos = torch.zeros_like(self.tokens)
        width = (model if head is None else head).config.dim     # an EAGLE-3 head may have its own
        self.root_hidden = torch.zeros(batch_size, 1, width, dtype=dtype, device=device)
        self.report = torch.zeros(batch_size, max(tree.depth, n_copy) + 3, dtype=torch.long, device=device)

    @property
    def state(self) -> list[Tensor]:
        return [self.tokens, self.pos, self.root_hidden, *([] if self.branch is None else self.branch.state)]

    @property
    def produced(self) -> Tensor:
        """[B, D + 1] the tokens of the last step, D the longest path; -1 where there are fewer."""
        return self.report[:, :-2]

    def prefill(self, prompts: list[list[int]], n_cached: int = 0) -> None:
        """Fill both caches with the prompts, whose first n_cached tokens are in both caches, and produce a token each.

        The feature of the last cached token is in no cache: that token is computed again.
        """
        length = torch.tensor([[len(prompt)] for prompt in prompts], device=self.pos.device)
        capture = () if self.head is None else self.head.capture
        hidden, feature = None, None
        for chunk in prefill(self.model, prompts, max(n_cached - (self.head is not None), 0), capture=capture):
            hidden = chunk.at(length - 1, chunk.hidden, hidden)
            feature = chunk.at(length - 1, chunk.features, feature)
            if self.head is not None:   # the pair of a row's last token gets its true token below
                window = self.head.window
                mask = chunk.mask if window is None else causal_mask(chunk.pos, chunk.mask.shape[2], window)
                self.head(chunk.following, chunk.features, chunk.pos, mask=mask, rope_length=length)
        assert feature is not None      # a prompt has a token that is not cached
        token = next_tokens(self.model.output(hidden), self.sampling)
        self.pos.copy_(length - 1)
        if self.branch is not None:
            self.branch.begin(prompts)
        self.finish(token, torch.zeros_like(token), token, feature, torch.zeros_like(token), max(map(len, prompts)) + 1)

    def __call__(self, n_slot: int, copies: bool = False) -> None:
        """One target pass, with the copied branch or without it.

        It reads n_slot slots of the caches: at least pos + n_room of every row.
        """
        # A finished row may be at the end of the cache. It goes on where the tree still fits.
        self.pos.clamp_(max=self.model.kv_cache.shape[4] - self.n_room)
        mark = (lambda part: None) if self.recorder is None else self.recorder.mark
        mark(0)
        draft = self.grow(n_slot)
        if copies and self.branch is not None:
            draft = self.branch.graft(draft)
        mark(1)
        logits, features = self.verify(draft, n_slot)
        mark(2)
        accepted = self.accept(logits, draft)
        mark(3)
        if self.recorder is not None:
            said = next_tokens(logits, Sampling()) if accepted.said is None else accepted.said
            self.recorder.note(draft, accepted.path, accepted.n_accepted, said)
        mark(4)
        self.commit(draft, features, accepted, n_slot)
        mark(5)

    def grow(self, n_slot: int) -> Draft:
        """The head's tree; without a head the root alone."""
        if self.head is None:
            return draft_nothing(self.tokens, self.root_hidden.dtype)
        scored = self.recorder is not None
        if isinstance(self.plan, DynamicPlan):
            return draft_dynamic(self.head, self.plan, self.tokens, self.root_hidden, n_slot, self.pos, scored)
        return draft_static(self.head, self.plan, self.tokens, self.root_hidden, n_slot, self.pos,
                            self.sampling if self.draw_drafts else None, scored)

    def verify(self, draft: Draft, n_slot: int) -> tuple[Tensor, Tensor]:
        """The target over all nodes: logits [B, N, V], features [B, N, F]."""
        if self.model.is_exact:
            mask = self.seen_by_position(draft, n_slot)
        else:
            mask = block_bias(draft.seen, shown_columns(self.pos, n_slot, draft.seen), self.model.config)
        capture = () if self.head is None else self.head.capture
        slots = self.pos + self.plan.order[:, :draft.tokens.shape[1]]
        return self.model(draft.tokens, self.pos + draft.depths, slots, mask, capture)

    def seen_by_position(self, draft: Draft, n_slot: int) -> Seen:
        """What the nodes see where bits count."""
        config = self.model.config
        depth = max(self.tree.depth, 0 if draft.copied is None else self.tree.n_copy, 1)
        above = lineage(draft.parents, depth, self.plan.order)
        slots, seen = path_slots(draft.depths, above, self.pos, torch.arange(n_slot)[-self.n_end:])
        group, cache, n_token = config.n_head // config.n_kv_head, self.model.kv_cache, draft.tokens.shape[1]

        def rows(seen: Tensor, begin: Tensor | None = None) -> Seen:
            return rows_seen(attention_bias(seen, group, torch.float), cache, n_token, n_slot, slots, self.n_end,
                             self.model.by_group, begin)

        window = config.sliding_window
        if window is None or cache.shape[4] <= window:
            return rows(seen)
        positions = torch.arange(n_slot)
        # A finished row may be past the slots that are read. It sees the last of them: no row may see none.
        is_near = ~outside(positions, (self.pos + draft.depths).minimum(positions[-1:]), window)
        before = is_near | (positions >= n_slot - slots.shape[2])   # of the last ones `seen` says what is hidden
        near = rows(seen & is_near[..., -slots.shape[2]:], attention_bias(before, group, torch.float))
        return rows(seen)._replace(in_window=near)

    def accept(self, logits: Tensor, draft: Draft) -> Accepted:
        if draft.tokens.shape[1] == 1:      # nothing was drafted
            none = torch.zeros_like(self.tokens)
            return Accepted(none, none, next_tokens(logits, self.sampling))
        if self.draw_drafts and self.head is not None and isinstance(self.plan, StaticPlan):
            return accept_sampled(logits, draft, self.plan, self.sampling, self.head)
        if self.sampling.temperature > 0:
            return accept_likeliest(logits, draft, self.plan, self.sampling)
        return accept_greedy(logits, draft, self.plan, all_said=self.recorder is not None)

    def commit(self, draft: Draft, features: Tensor, accepted: Accepted, n_slot: int) -> None:
        """Move the accepted path's keys and values to the front, and set the state for the next step."""
        path, n_accepted, bonus, _ = accepted
        if draft.copied is not None or not self.tree.is_chain:
            target = self.plan.order[:, :path.shape[1]]
            move_slots(self.model.kv_cache, self.pos + path, self.pos + target, self.plan.row)
        following = draft.tokens.gather(1, path.roll(-1, 1))       # the next node's token; unused past the end
        is_copy = path.gather(1, n_accepted) >= self.tree.n_node
        self.finish(following, n_accepted, bonus, features[self.plan.row, path], n_accepted * is_copy, n_slot)

    def ingest(self, tokens: Tensor, features: Tensor, n_slot: int) -> Tensor:
        """The head's outputs [B, T, dim] for features [B, T, F] from the root's on, each beside the token after it."""
        assert self.head is not None
        at = self.pos + self.plan.order[:, :tokens.shape[1]]
        return self.head(tokens, features, at, mask=causal_mask(at, n_slot, self.head.window))

    def finish(self, drafts: Tensor, n_accepted: Tensor, bonus: Tensor, features: Tensor, n_copied: Tensor,
               n_slot: int) -> None:
        """The root moves on by n_accepted [B, 1] drafts [B, D + 1] and the bonus token [B, 1].

        features [B, D + 1, F] are those of the root and the accepted drafts: the head takes them in.
        """
        order = self.plan.order[:, :drafts.shape[1]]
        token = bonus.clamp(min=0)                                  # not NOT_FINITE, which has no embedding
        tokens = torch.where(order < n_accepted, drafts, token)
        if self.head is not None:
            self.root_hidden.copy_(self.ingest(tokens, features, n_slot)[self.plan.row, n_accepted])
        if self.branch is not None:
            self.branch.extend(self.pos, tokens)
        # The root of a row that fills the cache would be past its end. That row has finished: any slot will do.
        self.pos.add_(n_accepted + 1).clamp_(max=self.model.kv_cache.shape[4] - 1)
        self.tokens.copy_(token)
        produced = tokens.masked_fill(order > n_accepted, -1)
        can_copy = torch.zeros_like(n_copied)
        if self.branch is not None:
            self.branch.look_up(self.pos, n_slot)
            can_copy = self.branch.found.long()
        first = produced[:, :1].where(bonus >= 0, NOT_FINITE)
        rest = nn.functional.pad(produced[:, 1:], (0, self.produced.shape[1] - produced.shape[1]), value=-1)
        self.report.copy_(torch.cat((first, rest, n_copied, can_copy), dim=1))


def check_children(tree: Tree, head: EagleHead) -> None:
    """Raise ValueError for a tree that takes more children of a node than the head has tokens."""
    vocab = head.config.vocab_size if head.draft_ids is None else len(head.draft_ids)
    if tree.n_child > vocab:
        raise ValueError(f"the tree takes {tree.n_child} children of a node, the draft vocabulary has {vocab} tokens")


def move_slots(kv_cache: Tensor, source: Tensor, target: Tensor, row: Tensor) -> None:
    """Copy slots source [B, D + 1] of kv_cache [n_layer, 2, B, K, S, head_dim] to slots target [B, D + 1].

    All layers in one gather. Source and target may overlap: the gather makes a copy first.
    """
    if len(source) == 1:
        cache = kv_cache[:, :, :1]
        cache.index_copy_(4, target[0], cache.index_select(4, source[0]))
    else:
        kv_cache[:, :, row, :, target] = kv_cache[:, :, row, :, source]
