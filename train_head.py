"""Train an EAGLE head: python train_head.py --checkpoint C --data dialogues.jsonl --out heads/NAME

    python train_head.py --data data.jsonl --out heads/mine --draft-vocab 8192 --lr 1e-3        # a small target
    python train_head.py ... --cache-features features/       # the target's features on disk: it then runs once only
    python train_head.py ... --resume                         # go on after a kill or Ctrl-C, to the same bits
    python train_head.py ... --accumulate 8                   # the step of eight processes in the memory of one
    torchrun --nproc-per-node 8 train_head.py ...             # data parallel
    torchrun --nproc-per-node 8 train_head.py --shard-target  # for 70B: each process keeps a part of the target

The recipe of EAGLE, arXiv 2401.15077, section 4.2 and its code's settings, called [1] below: the target is frozen, the
head sees its features with uniform noise added and learns the next ones, L = SmoothL1 + 0.1 CE, by AdamW at 3e-5 with
gradients clipped at norm 0.5. Only what the assistant says is learnt. Answers written by the target itself
(scripts/generate_data.py) teach most.

Shapes: B dialogues, T tokens, M positions that are learnt, V vocabulary or draft vocabulary.
"""
import argparse
import contextlib
import hashlib
import json
import os
import pickle
import random
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

import tp
from console import Parser, add_chat_options, command, number, pick_device, say, write_atomically
from eagle_head import EagleHead, head_args
from model import Transformer, pack_for_cpu, read_json, resolve_checkpoint
from tokenizer import Tokenizer
from train_data import (FEATURES_DIFFER, Batch, Dialogue, Features, check_same, common_tokens, features_origin, make_batches,
                        read_dialogues, target_stamp, tokens_digest)

# Elements of a block of logits, whatever the vocabulary: on a CPU 16 MiB in fp32, which stay in its cache.
LOGITS_AT_ONCE = {"cpu": 2 ** 22, "cuda": 2 ** 27, "mps": 2 ** 25}
MASK_AT_ONCE = 2 ** 20      # elements of an evaluation's mask, where a training step's is smaller
SAVING = 300.0              # seconds that the others wait in a step while rank 0 saves a checkpoint
N_ALPHA = 5                 # n-alpha is reported for n = 0 .. 4


# Loss


class SoftCrossEntropy(torch.autograd.Function):
    """Sum over positions of CE(softmax(true W^T), softmax(predicted W^T)), the logits LOGITS_AT_ONCE elements at a time.

    The gradient of a block, (softmax(predicted) - softmax(true)) W, is taken while its logits are there, so that
    neither they nor anything of their size is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, predicted: Tensor, true: Tensor, weight: Tensor, said: Tensor | None = None) -> tuple[Tensor, ...]:
        """predicted, true [M, dim], weight [V, dim], said [M, 1], the row of the token that the text has or -1 where there
        is none -> loss [], positions where predicted and true have the same likeliest token [], and where it is `said` [].
        """
        loss, same, right = torch.zeros(3, device=weight.device)
        grad = torch.empty_like(predicted)
        n = max(1, LOGITS_AT_ONCE[weight.device.type] // weight.shape[0])
        for begin in range(0, predicted.shape[0], n):
            ours = predicted[begin:begin + n].to(weight.dtype) @ weight.T               # [n, V]
            probs = (true[begin:begin + n].to(weight.dtype) @ weight.T).softmax(-1, dtype=torch.float)
            log_q = ours.log_softmax(-1, dtype=torch.float)
            best = log_q.amax(-1, keepdim=True)
            same += (log_q.gather(-1, probs.argmax(-1, keepdim=True)) == best).sum()
            if said is not None:
                row = said[begin:begin + n]
                right += ((log_q.gather(-1, row.clamp_min(0)) == best) & (row >= 0)).sum()
            loss -= torch.dot(probs.flatten(), log_q.flatten())
            grad[begin:begin + n] = log_q.exp_().sub_(probs).to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(same, right)
        return loss, same, right

    @staticmethod
    def backward(ctx, grad_loss: Tensor, *_) -> tuple[Tensor, None, None, None]:
        return ctx.saved_tensors[0] * grad_loss, None, None, None


class Losses(NamedTuple):
    """Sums over the learnt positions, of the first level and, averaged, of all levels."""
    smooth_l1: Tensor   # averaged over the width
    cross_entropy: Tensor
    same: Tensor        # positions of the first level where head and target find the same token likeliest
    right: Tensor       # positions of the first level where the head finds the token likeliest that the text has


class Learner(nn.Module):
    """The head with its losses: what DistributedDataParallel wraps.

    n_level > 1 also trains on what the head meets while drafting: level d continues each position along the true
    tokens from features that are d steps the head's own, as HASS (arXiv 2408.15766) and EAGLE-3's training-time test
    do. One pass without gradient makes the features of each level but the last, then one with it takes all levels.
    """

    def __init__(self, head: EagleHead, autocast: bool, n_level: int = 1):
        super().__init__()
        self.head, self.autocast, self.n_level = head, autocast, n_level

    @property
    def weight(self) -> Tensor:
        """[V, dim] of the target's LM head, frozen; the rows of the draft vocabulary where there is one."""
        return (self.head.draft_output or self.head.target.output).weight

    def forward(self, batch: Batch, noise: Tensor | None) -> Losses:
        """Pairs (f_i, t_{i+1}) predict f_{i+1}, whose logits guess t_{i+2}: learnt where the assistant says t_{i+2}."""
        tokens, features, learnt = batch
        n_pair, L = tokens.shape[1] - 2, self.n_level
        inputs = features[:, :-2].float()
        if noise is not None:
            inputs = inputs + noise
        for level in range(1, L):
            with torch.no_grad():
                own = self.predict(tokens, inputs, level)[:, -n_pair:].float()      # of the last level so far
            inputs = torch.cat((inputs, features[:, :1].float(), own[:, :-1]), dim=1)
        predicted = self.predict(tokens, inputs, L).unflatten(1, (L, n_pair))       # [B, L, n_pair, dim]
        sums = torch.zeros(2, device=tokens.device)
        for level in range(L):
            at = learnt[:, 2 + level:]          # level d of a position needs d pairs before it
            true = features[:, 1 + level:-1][at].float()                            # [M, dim]
            ours = predicted[:, level, level:][at].float()
            l1 = F.smooth_l1_loss(ours, true, reduction="sum") / ours.shape[-1]
            said = self.rows_of(tokens[:, 2 + level:][at]) if level == 0 else None
            ce, *counts = SoftCrossEntropy.apply(ours, true, self.weight, said)
            same, right = counts if level == 0 else (same, right)
            sums = sums + torch.stack((l1, ce)) / L
        return Losses(*sums, same, right)

    def rows_of(self, tokens: Tensor) -> Tensor:
        """tokens [M] -> [M, 1]: the row of `weight` that each has, -1 outside the draft vocabulary."""
        if self.head.draft_ids is None:
            return tokens[:, None]
        rows = tokens.new_full((self.head.config.vocab_size,), -1)
        rows[self.head.draft_ids] = torch.arange(len(self.head.draft_ids), device=rows.device)
        return rows[tokens, None]

    def predict(self, tokens: Tensor, inputs: Tensor, n_level: int) -> Tensor:
        """The head over the pairs of n_level levels, one level after the other: [B, n_level * n_pair, dim]."""
        n_pair = tokens.shape[1] - 2
        pos = torch.arange(n_pair, device=tokens.device)
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            return self.head(tokens[:, 1:-1].repeat(1, n_level), inputs, pos.repeat(n_level),
                             mask=level_mask(n_pair, n_level, tokens.device))


def level_mask(n_pair: int, n_level: int, device: torch.device, rows: Tensor | None = None) -> Tensor:
    """[1, n_level * n_pair, n_level * n_pair] bool: the pair at position j on level d is a draft made d steps after
    position j - d; it sees the true pairs (level 0) up to there, then its own forerunners, one a level, and itself.
    `rows` [R] are those wanted, where not all: [1, R, n_level * n_pair]."""
    index = torch.arange(n_level * n_pair, device=device)
    rows = (index if rows is None else rows)[:, None]
    start_of = lambda index: index % n_pair - index // n_pair
    true_pairs = index <= start_of(rows)                    # of level 0, as a start lies below n_pair
    own_drafts = (index >= n_pair) & (index // n_pair <= rows // n_pair) & (start_of(index) == start_of(rows))
    # A start before the text has nothing to see; its rows are not learnt, but a row of a softmax may not be empty.
    return (true_pairs | own_drafts | (index == rows))[None]


def input_noise(batch: Batch, indices: list[int], lengths: list[int], scale: float, seed: int) -> Tensor:
    """U(-scale, scale) [B, T - 2, dim], drawn for each dialogue by itself: it does not depend on how many processes
    share a batch, and resuming needs no generator's state."""
    noise = torch.zeros(*batch.features[:, 2:].shape, device=batch.tokens.device)
    for row, i in enumerate(indices):
        generator = torch.Generator(noise.device).manual_seed((seed * 1_000_003 + i) % 2 ** 63)     # what it can take
        noise[row, :lengths[i] - 2].uniform_(-scale, scale, generator=generator)
    return noise


# Evaluation


@torch.inference_mode()
def draft_ranks(head: EagleHead, tokens: Tensor, features: Tensor, max_depth: int) -> Tensor:
    """For every position i at once: draft from pair (f_i, t_{i+1}) along the tokens that really follow, and rank
    t_{i+2}, t_{i+3}, ... among the guesses. tokens [T], features [T, dim] -> [max_depth, positions], 0 the likeliest.

    The head's cache holds one level (`level_mask`) after the other. All depths of a column lie inside the text. Masks
    are made for a block of positions at a time, so that none is larger than that of a training step on this text.
    """
    ids, hidden = tokens[None].long(), features[None, :-1]
    n_pair = ids.shape[1] - 1
    head.setup_caches(1, n_pair * max_depth)
    pos = torch.arange(n_pair, device=ids.device)
    ranks = []
    for level in range(min(max_depth, n_pair - 1)):
        j = pos[level:]     # drafts that began at j - level: tokens t_{j+1}, features of the level before
        n_slot = (level + 1) * n_pair
        before = hidden if level == 0 else hidden[:, :-1]
        n = max(n_pair ** 2, MASK_AT_ONCE) // n_slot
        hidden = torch.cat([head(ids[:, at + 1], inputs, at, level * n_pair + at,
                                 level_mask(n_pair, level + 1, ids.device, level * n_pair + at))
                            for at, inputs in zip(j.split(n), before.split(n, dim=1))], dim=1)
        ranks.append(rank_of(head, hidden[0, :-1], ids[0, j[:-1] + 2]))
    head.kv_cache = None
    width = max(n_pair - max_depth, 0)
    return torch.stack([rank[:width] for rank in ranks]) if width else ids.new_zeros(max_depth, 0)


def rank_of(head: EagleHead, hidden: Tensor, tokens: Tensor) -> Tensor:
    """hidden [M, dim], tokens [M] -> [M], the place of each token among the draft's guesses: 0 the first, the size of the
    vocabulary when it is not drafted. The logits are there LOGITS_AT_ONCE elements at a time."""
    def of_block(hidden: Tensor, tokens: Tensor) -> Tensor:
        logits = head.draft_logits(hidden.to(head.target.norm.weight.dtype)).float()
        if not torch.is_tensor(logits):     # each rank has a part of the vocabulary
            logits = logits.full()
        if head.draft_ids is None:
            return (logits > logits.gather(-1, tokens[..., None])).sum(-1)
        match = head.draft_ids == tokens[..., None]
        own = logits.masked_fill(~match, -torch.inf).amax(-1, keepdim=True)
        return torch.where(match.any(-1), (logits > own).sum(-1), head.config.vocab_size)

    n_vocab = head.config.vocab_size if head.draft_ids is None else len(head.draft_ids)
    n = max(1, LOGITS_AT_ONCE[hidden.device.type] // n_vocab)
    return torch.cat([of_block(*block) for block in zip(hidden.split(n), tokens.split(n))])


def split(lines: list[int], n: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the examples held out and of those learnt; lines[i] is the line of the data that example i is from.

    The examples of one line share their history: all are held out, or none. n lines are, at most a tenth; which ones
    depends on the seed alone, so that runs can be compared.
    """
    order = sorted(set(lines))
    held = set(random.Random(seed).sample(order, len(order))[:min(n, len(order) // 10)])
    return [i for i, line in enumerate(lines) if line in held], [i for i, line in enumerate(lines) if line not in held]


@torch.no_grad()
def evaluate(learner: Learner, features: Features, held_out: list[int], rank: int = 0, world: int = 1) -> dict:
    """Losses, top-1/2/3 accuracy, n-alpha and the accepted length expected of a chain, on dialogues not learnt from.

    n-alpha [1, section 5.2]: how often a chain's draft is right when the last n features before it are the head's own.
    Losses and agreement are those of one level, whatever was trained. Accuracies count the positions that have N_ALPHA
    tokens behind them, losses and agreement all that are learnt.
    """
    sums = torch.zeros(7 + 2 * N_ALPHA, dtype=torch.float64)
    learner = Learner(learner.head, learner.autocast)
    device = learner.weight.device
    for begin in range(0, len(held_out), world):    # as many for each process: a sharded target needs them all
        i = held_out[begin + rank] if begin + rank < len(held_out) else held_out[0]
        batch = features.batch([i])
        if begin + rank >= len(held_out):
            continue
        losses = torch.stack(learner(batch, None)).double().cpu()
        if not losses.isfinite().all():
            raise ValueError(f"the loss of the held-out dialogue in line {features.dialogues[i].line} is not finite")
        with torch.autocast(device.type, torch.bfloat16, enabled=learner.autocast):
            ranks = draft_ranks(learner.head, batch.tokens[0], batch.features[0], N_ALPHA)
        ranks = ranks[:, batch.learnt[0, 2:2 + ranks.shape[1]]].cpu()
        right = (ranks == 0).double()
        sums += torch.cat((losses[:3], torch.tensor([batch.learnt[:, 2:].sum().item(), ranks.shape[1]]),
                           torch.stack([(ranks[0] < k).double().sum() for k in (2, 3)]),
                           right.sum(1), right.cumprod(0).sum(1)))
    if world > 1:
        sums = sums.to(device)
        dist.all_reduce(sums)
    l1, ce, same, n_learnt, n_rank, top2, top3, *alpha = sums.tolist()
    n_learnt, n_rank = max(1.0, n_learnt), max(1.0, n_rank)     # dialogues of a few tokens have nothing to draft along
    return {"eval_smooth_l1": l1 / n_learnt, "eval_cross_entropy": ce / n_learnt, "eval_positions": int(n_learnt),
            "eval_agreement": same / n_learnt, "eval_top1": alpha[0] / n_rank, "eval_top2": top2 / n_rank, "eval_top3": top3 / n_rank,
            "eval_n_alpha": [round(right / n_rank, 4) for right in alpha[:N_ALPHA]],
            "eval_chain_length": 1 + sum(alpha[N_ALPHA:]) / n_rank}


# Training


def head_config(target: dict, name: str, bias: bool = True) -> dict:
    """config.json of a head in the official format, from its target's config.json and name."""
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
            "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    rope = target.get("rope_parameters") or {}
    theta = target.get("rope_theta") or rope.get("rope_theta") or 10000.0
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 1,
            **{key: target[key] for key in keys if target.get(key) is not None}, "rope_theta": theta, "bias": bias,
            "qkv_bias": target.get("model_type") == "qwen2", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "eagle_version": 1, "target": name}


def new_head(config: dict, model: Transformer, init: str | None, seed: int) -> EagleHead:
    """A head in fp32, its weights random, or those of another head."""
    head = EagleHead(head_args(config, model.config), model, bias=config["bias"])
    if init is not None:
        other = EagleHead.from_pretrained(init, model)
        if not all(type(linear) is nn.Linear for linear in (other.fc, other.layer.feed_forward.w2)):
            raise ValueError(f"--init {init} is a quantised head: give the one it was made from")
        for key, weight in other.weights().items():
            if not weight.isfinite().all():
                raise ValueError(f"--init {init}: {key} holds values that are not finite")
        if (other.fc.bias is None) == config["bias"]:
            raise ValueError(f"--init {init}: its fc has {'no' if config['bias'] else 'a'} bias: train with "
                             f"{'--no-bias' if config['bias'] else '--bias'}")
        head.load_state_dict(other.float().state_dict())
    else:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in head.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            elif name.endswith("bias"):
                parameter.zero_()
    return head.to(model.inv_freq.device).requires_grad_(True)


def learning_rate(step: int, n_step: int, warmup: int, peak: float) -> float:
    """Linear from 0 to the peak over `warmup` steps, then linear to 0 at n_step."""
    return peak * min((step + 1) / warmup if warmup else 1.0, (n_step - step) / max(1, n_step - warmup))


def save_head(head: EagleHead, config: dict, folder: Path) -> None:
    tensors = {key: value.detach().to(torch.bfloat16, copy=True).cpu().contiguous() for key, value in head.weights().items()}
    part = folder / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(folder / "model.safetensors")
    write_atomically(folder / "config.json", json.dumps(config, indent=1) + "\n")


def save_state(file: Path, state: dict) -> None:
    part = file.with_name(file.name + ".part")
    torch.save(state, part)
    part.replace(file)


def load_state(file: Path, device: torch.device | None = None) -> dict:
    """What `save_state` wrote; without a device its tensors are mapped, not read."""
    try:
        return torch.load(file, map_location=device or "cpu", mmap=device is None, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is corrupt or truncated: {str(error).splitlines()[0]}") from None


def load_target(folder: Path, device: torch.device, dtype: torch.dtype, shard: bool, rank: int, world: int) -> Transformer:
    if not shard:
        model = Transformer.from_pretrained(folder, device, dtype)
        pack_for_cpu(model.layers)
        return model

    def load() -> Transformer:
        model = Transformer.from_pretrained(folder, "cpu", dtype, choose_kernels=False)
        shard_layers(model, device, rank, world)
        return model.to(device)

    turns = [tp.in_turn(turn == rank, load) for turn in range(world)]  # the host holds one whole target at a time
    return turns[rank]


class Pieces:
    """1/world of the tensors of a layer, a quantised one's among them; `gather` makes them whole, `drop` lets them go."""

    def __init__(self, layer: nn.Module, device: torch.device, rank: int, world: int):
        from quantized import QuantLinear
        self.tensors = [*layer.parameters(), *layer.buffers()]
        self.shapes = [tensor.shape for tensor in self.tensors]
        self.linears = [module for module in layer.modules() if isinstance(module, QuantLinear)]
        # As bytes, so that dtypes mix; a view in any dtype begins at a multiple of its size.
        flat = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in self.tensors]
        self.sizes = [len(part) for part in flat]
        self.room = [size + -size % 16 for size in self.sizes]
        flat = torch.cat([F.pad(part, (0, room - len(part))) for part, room in zip(flat, self.room)])
        self.mine = F.pad(flat, (0, -len(flat) % world)).view(world, -1)[rank].to(device, copy=True)     # [bytes]
        self.world = world
        self.drop()

    def gather(self, *_) -> None:
        whole = self.mine.new_empty(self.world * len(self.mine))
        dist.all_gather_into_tensor(whole, self.mine)
        for tensor, shape, size, part in zip(self.tensors, self.shapes, self.sizes, whole[:sum(self.room)].split(self.room)):
            tensor.data = part[:size].view(tensor.dtype).view(shape)

    def drop(self, *_) -> None:
        for tensor in self.tensors:
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=self.mine.device)
        for linear in self.linears:
            linear.lay_out(set())   # what a CPU kernel made of the weight is as large as the weight


def shard_layers(model: Transformer, device: torch.device, rank: int, world: int) -> list[Pieces]:
    """Keep 1/world of every layer here; the processes gather a layer for the time it runs, as ZeRO-3 does
    (arXiv 1910.02054). All of them must run the target equally often."""
    kept = []
    for layer in model.layers:
        pieces = Pieces(layer, device, rank, world)
        layer.register_forward_pre_hook(pieces.gather)
        layer.register_forward_hook(pieces.drop)
        kept.append(pieces)
    return kept


RESUME_DIFFERS = {     # what --resume says when something that changes the result is not as it was
    "target": "--resume: {where} is a training for another target than {mine[checkpoint]}: weights, config.json or "
              "quantize.json are not those of {kept[checkpoint]}",
    "template": "--resume: {where} was trained on dialogues in another chat template",
    "data": "--resume: {where} was trained on another --data file",
    "tokens": "--resume: {where} was trained on other tokens: the tokenizer, or how this program reads dialogues, has changed",
    "threads": "--resume: {where} was trained with {was} threads, now there are {now}: OMP_NUM_THREADS={was} gives the same bits",
    "device": "--resume: {where} was trained on the device {was!r}, now it is {now!r}: give --device {was}",
    "torch": "--resume: {where} was trained with torch {was}, this is {now}: install that one, or begin anew from the head "
             "with --init and another --out",
    "world": "--resume: {where} was trained by {was} processes, now there are {now}",
    "cached": "--resume: {where}: --cache-features was given: {was}, now: {now}; "
              "cached features are rounded otherwise",
}
FREE_ON_RESUME = {"resume", "save_minutes", "eval_every", "out", "cache_features", "device",     # change nothing that is learnt
                  "checkpoint", "data", "chat_template", "template_args"}                        # compared by their content


def settings_of(args: argparse.Namespace, device: torch.device, world: int) -> dict[str, str]:
    """What changes the bits of a training, beside the target and the tokens."""
    return {"world": str(world), "device": device.type, "torch": str(torch.__version__), "cached": str(args.cache_features is not None),
            "threads": str(torch.get_num_threads()) if device.type == "cpu" else "any",
            **{key: str(value) for key, value in vars(args).items() if key not in FREE_ON_RESUME}}


def origin_of(args: argparse.Namespace, folder: Path, kept: dict[str, str]) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and what the target's features come from beside the tokens.

    A chat template that asks for the date is told one for the whole training: the checkpoint's, the cache's, or today's.
    """
    cached = {} if args.cache_features is None else features_origin(args.cache_features)
    date = kept.get("date") or cached.get("date")
    stamp, now = tp.on_rank_0(lambda: (target_stamp(folder), datetime.now().isoformat(timespec="seconds")))
    tokenizer = Tokenizer.from_pretrained(folder, chat_template=args.chat_template, template_args=args.template_args,
                                          date=datetime.fromisoformat(date or now))
    if tokenizer.uses_date:
        say(f"the chat template is told the date {date or now}" + (", that of the training so far" if date else ""))
    return tokenizer, {"checkpoint": args.checkpoint, "target": stamp, "template": tokenizer.template_digest,
                       "date": tokenizer.date.isoformat() if tokenizer.uses_date else ""}


def parts_of(indices: list[int], rank: int, world: int, accumulate: int) -> list[list[int]]:
    """A step's dialogues that this process takes, in the parts it takes them in: as many on every process, some empty."""
    n = min(accumulate, -(-len(indices) // world))
    return [indices[rank::world][k::n] for k in range(n)]


def add_gradients(wrapped: nn.Module, features: Features, indices: list[int], parts: list[list[int]], args: argparse.Namespace,
                  noise_seed: int, world: int) -> list[Tensor]:
    """Of a step's loss, the mean over the tokens learnt in all its parts and processes: the gradient is that of one
    large batch. Returns the Losses [4] of this process's parts."""
    dialogues, losses = features.dialogues, []
    lengths = [len(dialogue.tokens) for dialogue in dialogues]
    n_learnt = sum(int(dialogues[i].learnt[2:].sum()) for i in indices)
    for part in parts:
        batch = features.batch(part or indices[:1])
        if not part:    # fewer dialogues than processes: take part with nothing to learn
            batch = batch._replace(learnt=torch.zeros_like(batch.learnt))
        waits = world > 1 and len(losses) < len(parts) - 1
        with wrapped.no_sync() if waits else contextlib.nullcontext():
            sums = wrapped(batch, input_noise(batch, part, lengths, args.noise, noise_seed))
            loss = (sums.smooth_l1 + args.cls_weight * sums.cross_entropy) / n_learnt
            (loss * world).backward()   # DistributedDataParallel averages gradients, the loss is a sum of parts
        losses.append(torch.stack(sums).detach())
    return losses


def refuse_not_finite(losses: list[Tensor], norm: Tensor, parts: list[list[int]], indices: list[int],
                      dialogues: list[Dialogue], step: int) -> None:
    """Raise ValueError with the lines at fault, before a NaN enters the weights."""
    finite = torch.stack([*(loss.isfinite().all() for loss in losses), norm.isfinite()]).tolist()     # sync: once a step
    if all(finite):
        return
    at_fault = next((part for part, fine in zip(parts, finite) if not fine), indices)
    lines = ", ".join(str(dialogues[i].line) for i in at_fault[:20]) + (", ..." if len(at_fault) > 20 else "")
    what = "loss" if not all(finite[:-1]) else "norm of the gradient"
    raise ValueError(f"the {what} is not finite at step {step}, dialogues of lines {lines}; "
                     "nothing of it is learnt or saved: --resume goes on from the last checkpoint")


def train(args: argparse.Namespace) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, first = pick_device(args.device), rank == 0
    state_file, log_file = args.out / "checkpoint.pt", args.out / "log.jsonl"
    if state_file.exists() and not args.resume:
        raise ValueError(f"{args.out} holds a training: go on with --resume, or give another --out")
    if args.shard_target and (world == 1 or args.cache_features is not None):
        raise ValueError("--shard-target needs torchrun with several processes, and no --cache-features")

    if args.checkpoint is None:
        from scripts.download import download_demo
        args.checkpoint = str(download_demo(log=say))
    folder = resolve_checkpoint(args.checkpoint)
    resumes = state_file.exists()
    kept = load_state(state_file)["settings"] if resumes else {}
    tokenizer, origin = origin_of(args, folder, kept)
    settings = origin | {"data": hashlib.sha256(args.data.read_bytes()).hexdigest()} | settings_of(args, device, world)
    check_same(kept, settings, RESUME_DIFFERS, state_file)      # before anything is loaded or written
    if args.cache_features is not None:
        check_same(features_origin(args.cache_features), origin, FEATURES_DIFFER, args.cache_features)
    target = read_json(folder / "config.json")
    model = load_target(folder, device, getattr(torch, args.dtype), args.shard_target, rank, world)
    dialogues = read_dialogues(args.data, tokenizer, model.config.vocab_size, min(args.max_length, model.config.block_size))
    settings["tokens"] = tokens_digest(dialogues, masks=True)
    check_same(kept, settings, RESUME_DIFFERS, state_file)

    n_token = args.batch_size * args.max_length
    if args.cache_features is not None and world > 1:   # the first process fills the cache, the others find it full
        tp.in_turn(first, lambda: Features(model, dialogues, args.cache_features, n_token, origin))
    features = Features(model, dialogues, args.cache_features, n_token, origin)

    held_out, learnt = split([dialogue.line for dialogue in dialogues], args.eval_dialogues, args.seed)
    config = head_config(target, Path(args.checkpoint).name, args.bias)
    head = new_head(config, model, None if resumes else args.init, args.seed)
    trained = dict(head.named_parameters())
    args.out.mkdir(parents=True, exist_ok=True)
    if args.draft_vocab:
        ids = common_tokens([dialogues[i] for i in learnt], tokenizer.stop_ids, args.draft_vocab)
        head.set_draft_vocab(ids)
        if first:
            write_atomically(args.out / "draft_vocab.json", json.dumps({"ids": ids}) + "\n")
    learner = Learner(head, args.dtype == "bfloat16", args.levels)
    wrapped = nn.parallel.DistributedDataParallel(learner) if world > 1 else learner
    optimizer = torch.optim.AdamW(trained.values(), lr=args.lr, betas=(0.9, 0.95))

    lengths = [len(dialogue.tokens) for dialogue in dialogues]
    n_part = world * args.accumulate
    plan = [make_batches([lengths[i] for i in learnt], n_token, random.Random(f"{args.seed} {epoch}"), n_part)
            for epoch in range(args.epochs)]
    batches = [(epoch, [learnt[j] for j in batch]) for epoch, part in enumerate(plan) for batch in part]
    n_step = len(batches)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for _, batch in batches)
    padding = 1 - args.epochs * sum(lengths[i] for i in learnt) / padded
    warmup = min(2000, n_step // 10) if args.warmup is None else args.warmup
    eval_every = max(1, n_step // args.epochs) if args.eval_every is None else args.eval_every

    step, log = 0, []
    if resumes:
        state = load_state(state_file, device)
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state["head"][name])
        optimizer.load_state_dict(state["optimizer"])
        step, log = state["step"], state["log"]
        del state
    say(f"{sum(p.numel() for p in trained.values())} parameters, {n_step} steps of up to {n_token * n_part} tokens, "
        f"padding {padding:.1%}, {len({dialogues[i].line for i in held_out})} dialogues held out" + (f"; going on at step {step}" if step else ""))
    saved, last_save = (step, len(log)), time.monotonic()

    def save() -> None:
        # Nothing random needs saving: batches and noise follow from the seed, the rate from the step.
        nonlocal saved, last_save
        if first and saved != (step, len(log)):
            if not all(parameter.isfinite().all() for parameter in trained.values()):
                raise ValueError(f"weights are not finite after step {step}: the last checkpoint stands; a lower --lr may help")
            save_head(head, config, args.out)
            write_atomically(log_file, "".join(json.dumps(entry) + "\n" for entry in log))
            save_state(state_file, {"settings": settings, "step": step, "log": log, "head": {name: p.detach() for name, p in trained.items()},
                                    "optimizer": optimizer.state_dict()})
        saved, last_save = (step, len(log)), time.monotonic()

    def is_due() -> bool:
        """Whether an evaluation is to be made at this step. What was learnt is saved before: it may not fit into memory."""
        return bool(step and held_out and eval_every and (step % eval_every == 0 or step == n_step)
                    and not any(entry["step"] == step and "eval_top1" in entry for entry in log))

    stop = Stop()
    sums, started, n_seen = torch.zeros(5, device=device), time.monotonic(), 0
    with tqdm(total=n_step, initial=step, desc="training", unit=" steps", disable=None) as bar:
        while step < n_step or is_due():
            if is_due():
                log.append({"step": step, "epoch": batches[step - 1][0], **evaluate(learner, features, held_out, rank, world)})
                bar.write("step {step}: top-1 {eval_top1:.3f}, a chain of 5 accepts {eval_chain_length:.2f}, "
                          "n-alpha {eval_n_alpha}".format(**log[-1]), file=sys.stderr)
                started, n_seen = time.monotonic(), 0
                continue
            epoch, indices = batches[step]
            rate = learning_rate(step, n_step, warmup, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            parts = parts_of(indices, rank, world, args.accumulate)
            losses = add_gradients(wrapped, features, indices, parts, args, args.seed * 1_000_003 + epoch, world)
            norm = nn.utils.clip_grad_norm_(trained.values(), args.clip)
            refuse_not_finite(losses, norm, parts, indices, dialogues, step)
            optimizer.step()
            step += 1
            n_learnt = sum(int(dialogues[i].learnt[2:].sum()) for i in indices)
            sums += torch.cat((sum(losses), torch.tensor([n_learnt / world], device=device)))
            n_seen += sum(lengths[i] for i in indices)
            bar.update()
            if step % args.log_every == 0 or step == n_step:
                if world > 1:
                    dist.all_reduce(sums)
                l1, ce, same, right, count = sums.tolist()
                speed = n_seen / (time.monotonic() - started)
                log.append({"step": step, "epoch": epoch, "smooth_l1": l1 / count, "cross_entropy": ce / count,
                            "agreement": same / count, "top1": right / count, "lr": rate, "grad_norm": float(norm),
                            "tokens_per_second": round(speed)})
                bar.set_postfix_str(f"loss {(l1 + args.cls_weight * ce) / count:.3f}, top-1 {right / count:.3f}, "
                                    f"{speed:.0f} tokens/s")
                sums.zero_()
                started, n_seen = time.monotonic(), 0
            if stop.asked(world, device) or is_due() or time.monotonic() - last_save >= 60 * args.save_minutes:
                save()
                if stop.seen and (step < n_step or is_due()):
                    if world > 1:
                        dist.barrier()      # the first process has saved
                    say(f"stopped at step {step}; the same command with --resume goes on from there")
                    return 130
    save()
    if first:
        draw_curves(log, args.out / "curves.png")
    say(f"wrote {args.out}")
    return 0


class Stop:
    """Ctrl-C or SIGTERM ask for a stop after the step that runs, on all processes at the same one."""

    def __init__(self):
        self.seen = False
        for interruption in (signal.SIGINT, signal.SIGTERM):
            signal.signal(interruption, self._note)

    def _note(self, *_) -> None:
        self.seen = True

    def asked(self, world: int, device: torch.device) -> bool:
        if world > 1:
            flag = torch.tensor(float(self.seen), device=device)
            dist.all_reduce(flag)
            self.seen = flag.item() > 0
        return self.seen


def draw_curves(log: list[dict], file: Path) -> None:
    """Losses and accuracies as a picture, where matplotlib is installed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.5))
    for axis, kind in zip(axes, ("smooth_l1", "cross_entropy", "agreement", "top1")):
        for key in (kind, f"eval_{kind}"):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axis.plot(*zip(*points), label=key) if points else None
        axis.set_xlabel("step")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


@command(in_ranks=True)
def main(args: argparse.Namespace) -> int:
    """Exit status 130 when stopped, with everything saved."""
    return train(args)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Train an EAGLE head for a target.")
    parser.add_argument("--checkpoint", help="the target: Hugging Face folder or hub id (default: the demo model)")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines of dialogues")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the head, its log and its checkpoint")
    parser.add_argument("--init", metavar="HEAD", help="begin with this head's weights instead of random ones")
    parser.add_argument("--bias", action=argparse.BooleanOptionalAction, default=True, help="of fc; vLLM loads heads without")
    parser.add_argument("--draft-vocab", type=number(int, 1), metavar="N", help="classify among the N commonest tokens of "
                        "the answers only, and write them as draft_vocab.json (default: the whole vocabulary)")
    parser.add_argument("--epochs", type=number(int, 1), default=20, metavar="N")
    parser.add_argument("--batch-size", type=number(int, 1), default=4, metavar="N", help="a step of one process has at most "
                        "N * max-length tokens: more dialogues where they are short")
    parser.add_argument("--accumulate", type=number(int, 1), default=1, metavar="N", help="batches a step: the gradient of N "
                        "times the batch size in the memory of one")
    parser.add_argument("--max-length", type=number(int, 3), default=2048, metavar="N", help="longer dialogues are cut")
    parser.add_argument("--lr", type=number(float, 0, open_low=True), default=3e-5, metavar="X", help="at its peak")
    parser.add_argument("--warmup", type=number(int, 0), metavar="N", help="steps (default: 2000, at most a tenth of all)")
    parser.add_argument("--cls-weight", type=number(float, 0), default=0.1, metavar="X", help="of the cross-entropy")
    parser.add_argument("--levels", type=number(int, 1), default=1, metavar="N", help="train on features up to N - 1 steps "
                        "the head's own: more accepted in depth, N to N^2 times the work (default: 1, the paper's)")
    parser.add_argument("--noise", type=number(float, 0), default=0.1, metavar="X", help="U(-X, X) on input features")
    parser.add_argument("--clip", type=number(float, 0, open_low=True), default=0.5, metavar="X", help="norm of the gradient")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, metavar="N")
    parser.add_argument("--cache-features", type=Path, metavar="FOLDER", help="keep the target's features on disk")
    parser.add_argument("--shard-target", action="store_true", help="spread the target's layers over the processes")
    parser.add_argument("--eval-dialogues", type=number(int, 0), default=100, metavar="N", help="held out, at most a tenth")
    parser.add_argument("--eval-every", type=number(int, 0), metavar="N", help="steps (default: an epoch; 0: never)")
    parser.add_argument("--log-every", type=number(int, 1), default=10, metavar="N", help="steps")
    parser.add_argument("--save-minutes", type=number(float, 0), default=10.0, metavar="X", help="between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of the target; the head's weights are fp32, run under autocast with bfloat16")
    add_chat_options(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(tp.run(main, parse_args(), timeout=SAVING))
