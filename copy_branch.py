"""A branch of drafts copied from the text itself: prompt lookup beside the head's tree, inside the same step.

    branch = CopyBranch(length=5, n_node=26, batch_size=1, n_slot=2048, device=device, dtype=dtype)
    branch.begin([prompt_ids])
    branch.look_up(pos, n_slot)         # branch.found [B, 1]: whether there is something to copy
    draft = branch.graft(draft)         # the tree and one chain more, below the root
    branch.extend(pos, tokens)          # tokens that follow the one at pos

The last three or two tokens are looked up in everything said so far, prompt and answer. The tokens that followed them
the last time become a chain of drafts (Saxena, prompt lookup decoding, 2023; SAM-Decoding, arXiv 2411.10666, joins it
with EAGLE-2). Everything is on the device and of static shape. A branch without a match can never be accepted.

Shapes: B batch, N tree nodes including the root, C length of the branch, S cache slots.
"""
import torch
from torch import Tensor
from torch.nn import functional as F

from draft_tree import Copied, Draft, visible

N_GRAM = 3      # tokens that are looked up; where they do not occur, one less


class CopyBranch:
    """The tokens of each row by position, and the chain that they give.

    `history` [B, N_GRAM + S + C] holds the token of position p in column N_GRAM - 1 + p, and -1 where there is none.
    `tokens` [B, C] are the chain below the root, `found` [B, 1] says whether there is one.
    """

    def __init__(self, length: int, n_node: int, batch_size: int, n_slot: int, device: torch.device,
                 dtype: torch.dtype):
        self.length, self.n_node = length, n_node
        self.history = torch.full((batch_size, N_GRAM + n_slot + length), -1, device=device)
        self.tokens = torch.zeros(batch_size, length, dtype=torch.long, device=device)
        self.found = torch.zeros(batch_size, 1, dtype=torch.bool, device=device)
        self.ahead = torch.arange(length, device=device)[None]
        self.parents = torch.tensor([[0, *range(n_node, n_node + length - 1)]], device=device)
        chain = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        root = F.pad(torch.ones(length, 1, dtype=torch.bool, device=device), (0, n_node - 1))
        self.seen = visible(torch.cat((root, chain), dim=1)[None], dtype)       # [1, C, N + C + 2]

    @property
    def state(self) -> list[Tensor]:
        return [self.history, self.tokens, self.found]

    def begin(self, prompts: list[list[int]]) -> None:
        """Forget everything and take in whole prompts, those tokens too that are in the caches already."""
        self.history.fill_(-1)
        for row, prompt in enumerate(prompts):
            self.history[row, N_GRAM - 1:N_GRAM - 1 + len(prompt)] = torch.tensor(prompt, device=self.history.device)

    def extend(self, pos: Tensor, tokens: Tensor) -> None:
        """tokens [B, n] follow the token at pos [B, 1]. What is beyond the real ones will be overwritten."""
        place = pos + N_GRAM + torch.arange(tokens.shape[1], device=pos.device)
        self.history.scatter_(1, place.clamp(max=self.history.shape[1] - 1), tokens)

    def look_up(self, pos: Tensor, n_slot: int) -> None:
        """What followed the tokens up to pos [B, 1] the last time, within the first n_slot positions.

        The longest match wins, then the latest. If the copy reaches pos, it goes on in itself, as a loop would.
        """
        place = torch.arange(n_slot, device=pos.device)[None]
        matches, score = place < pos, torch.full_like(place, -1)
        for k in range(N_GRAM):     # the token k places before
            begin = N_GRAM - 1 - k
            last = self.history.gather(1, pos + begin)
            matches = matches & (self.history[:, begin:begin + n_slot] == last)
            if k > 0:
                score = torch.where(matches, place + k * n_slot, score)
        best = score.amax(1, keepdim=True)
        self.found.copy_(best >= 0)
        start = torch.where(self.found, best % n_slot, 0)
        index = start + 1 + self.ahead % (pos - start).clamp(min=1)
        self.tokens.copy_(self.history.gather(1, index + N_GRAM - 1).clamp(min=0))

    def graft(self, draft: Draft) -> Draft:
        """The draft with the branch behind its nodes."""
        B, N, C = len(self.tokens), self.n_node, self.length
        blind = draft.seen.new_full((B, N, C), -torch.inf)
        seen = torch.cat((draft.seen[:, :, :-1], blind, draft.seen[:, :, -1:]), dim=2)
        tokens = torch.cat((draft.tokens, self.tokens), 1)
        nothing = F.pad((~self.found).expand(-1, C), (N, 0), value=False)
        is_child = F.pad(draft.parents[:, 1:] == 0, (1, C), value=False)
        twin = is_child & (tokens == self.tokens[:, :1]) & self.found
        twin = twin & (twin.cumsum(1) == 1)
        first = F.pad(twin.any(1, keepdim=True), (N, C - 1), value=False)
        return Draft(tokens, torch.cat((draft.parents, self.parents.expand(B, -1)), 1),
                     torch.cat((draft.depths, (self.ahead + 1).expand(B, -1)), 1),
                     torch.cat((seen, self.seen.expand(B, -1, -1)), 1), draft.probs,
                     Copied(nothing, nothing | first, twin), draft.log_q)
