"""Train an EAGLE head: python train_head.py --checkpoint C --data dialogues.jsonl --out heads/NAME

    python train_head.py --data data.jsonl --out heads/mine --draft-vocab 8192 --lr 1e-3        # a small target
    python train_head.py ... --cache-features features/       # the target's features on disk: it then runs once only
    python train_head.py ... --resume                         # go on after a kill or Ctrl-C, to the same bits
    torchrun --nproc-per-node 8 train_head.py ...             # data parallel

The recipe of EAGLE, arXiv 2401.15077, section 4.2 and its code's settings, called [1] below: the target is frozen, the
head sees its features with uniform noise added and learns the next ones, L = SmoothL1 + 0.1 CE, by AdamW at 3e-5 with
gradients clipped at norm 0.5. Only what the assistant says is learnt. Data are JSON lines of dialogues, `messages` or
ShareGPT's `conversations`; answers written by the target itself (scripts/generate_data.py) teach most.

Shapes: B dialogues, T tokens, M positions that are learnt, V vocabulary or draft vocabulary.
"""
import argparse
import hashlib
import json
import math
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from eagle_head import EagleHead
from generate import Parser, number, pick_device, say, write_atomically
from model import Transformer, pack_for_cpu, read_json, resolve_checkpoint
from tokenizer import Tokenizer

LOGITS_AT_ONCE = 2 ** 25    # elements of a block of logits: 128 MiB in fp32, whatever the vocabulary
N_ALPHA = 5                 # n-alpha is reported for n = 0 .. 4


# Data


class Dialogue(NamedTuple):
    line: int           # in the data file, from 1
    tokens: Tensor      # [T] int32
    learnt: Tensor      # [T] bool: tokens that the assistant says, the one that ends its turn among them


def read_dialogues(file: Path, tokenizer: Tokenizer, vocab_size: int, max_length: int) -> list[Dialogue]:
    """Tokenised dialogues of a JSON-lines file, the bad ones counted, reported in one line and left out."""
    dialogues, bad, n_cut = [], Counter(), 0
    with open(file, encoding="utf-8", errors="replace") as lines:
        for line, text in enumerate(tqdm(lines, desc="tokenising", unit=" dialogues", disable=None), start=1):
            if not text.strip():
                continue
            try:
                entry = json.loads(text)
                messages = messages_of(entry)
            except (ValueError, KeyError, TypeError, AttributeError):
                bad["broken lines"] += 1
                continue
            if not any(message["role"] == "assistant" for message in messages):
                bad["without an assistant turn"] += 1
                continue
            try:
                tokens, learnt = encode_dialogue(tokenizer, messages, entry.get("finish_reason") == "length")
            except ValueError:
                bad["refused by the chat template"] += 1
                continue
            if max(tokens) >= vocab_size:
                raise ValueError(f"{file}, line {line}: token {max(tokens)}, but the target's vocabulary has {vocab_size}: "
                                 "this tokenizer is not the target's")
            n_cut += len(tokens) > max_length
            if not any(learnt[2:max_length]):
                bad["with no answer within the length"] += 1
                continue
            dialogues.append(Dialogue(line, torch.tensor(tokens[:max_length], dtype=torch.int32),
                                      torch.tensor(learnt[:max_length])))
    left_out = ", ".join(f"{n} {what}" for what, n in bad.items())
    if not dialogues:
        raise ValueError(f"{file} holds no dialogue to learn from" + (f": {left_out}" if bad else ""))
    say(f"{file}: {len(dialogues)} dialogues, {sum(len(d.tokens) for d in dialogues)} tokens, "
        f"{sum(int(d.learnt.sum()) for d in dialogues)} of them learnt"
        + (f"; left out: {left_out}" if bad else "") + (f"; {n_cut} cut at {max_length} tokens" if n_cut else ""))
    return dialogues


def messages_of(entry: dict) -> list[dict[str, str]]:
    """{"role", "content"} messages of either format."""
    if "messages" in entry:
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in entry["messages"]]
    else:
        roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
        messages = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in entry["conversations"]]
    if not all(isinstance(message["content"], str) for message in messages):
        raise TypeError("a turn is not text")
    return messages


def encode_dialogue(tokenizer: Tokenizer, messages: list[dict[str, str]], cut: bool) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them the assistant says: those that rendering the dialogue with an answer adds to
    rendering it without, up to the token that ends the turn. `cut` tells that the last answer was not ended."""
    last = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    tokens = tokenizer.apply_chat_template(messages[:last + 1], add_generation_prompt=False)
    learnt = [False] * len(tokens)
    for n, message in enumerate(messages[:last + 1]):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:n])
        after = tokenizer.apply_chat_template(messages[:n + 1], add_generation_prompt=False)
        begin = common_prefix(before, after)    # the last token of `before` may have grown together with the answer
        if common_prefix(after, tokens) < len(after) - 1:
            raise ValueError("the template changes what was said before")
        end = next((i + 1 for i in range(begin, len(after)) if after[i] in tokenizer.stop_ids), len(after))
        if cut and n == last and end > begin and after[end - 1] in tokenizer.stop_ids:
            end -= 1
        learnt[begin:end] = [True] * len(learnt[begin:end])
    return tokens, learnt


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def make_batches(lengths: list[int], n_token: int, rng: random.Random) -> list[list[int]]:
    """Indices in batches of at most n_token tokens, padding included, of like length, in random order."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], rng.random()))
    batches, batch = [], []
    for i in order:
        if batch and (len(batch) + 1) * lengths[i] > n_token:
            batches.append(batch)
            batch = []
        batch.append(i)
    batches.append(batch)
    rng.shuffle(batches)
    return batches


class Batch(NamedTuple):
    tokens: Tensor      # [B, T] int64, padded on the right
    features: Tensor    # [B, T, dim] of the target
    learnt: Tensor      # [B, T] bool


class Features:
    """The frozen target's features of dialogues, computed when asked for, or kept in safetensors shards on disk."""
    SHARD = 256         # dialogues

    def __init__(self, model: Transformer, dialogues: list[Dialogue], folder: Path | None, n_token: int):
        self.model, self.dialogues, self.folder = model, dialogues, folder
        self.device = model.inv_freq.device
        self.shards: dict[int, safe_open] = {}
        order = sorted(range(len(dialogues)), key=lambda i: len(dialogues[i].tokens))
        self.shard_of = {i: place // self.SHARD for place, i in enumerate(order)}
        if folder is not None:
            self._fill(order, n_token)

    def batch(self, indices: list[int]) -> Batch:
        rows = [self.dialogues[i] for i in indices]
        tokens = nn.utils.rnn.pad_sequence([row.tokens.long() for row in rows], batch_first=True).to(self.device)
        learnt = nn.utils.rnn.pad_sequence([row.learnt for row in rows], batch_first=True).to(self.device)
        if self.folder is None:
            with torch.inference_mode():
                features = self.model.features(tokens, torch.arange(tokens.shape[1], device=self.device))
            return Batch(tokens, features.clone(), learnt)
        kept = [self._shard(self.shard_of[i]).get_tensor(str(i)) for i in indices]
        return Batch(tokens, nn.utils.rnn.pad_sequence(kept, batch_first=True).to(self.device), learnt)

    def _shard(self, n: int) -> "safe_open":
        if n not in self.shards:
            self.shards[n] = safe_open(self.folder / f"{n:05}.safetensors", framework="pt")
        return self.shards[n]

    def _fill(self, order: list[int], n_token: int) -> None:
        """Write the shards that are not there yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        weight = self.model.norm.weight
        digest = hashlib.sha256(repr((self.model.config, weight.dtype)).encode())
        digest.update(weight.float().cpu().numpy().tobytes())
        for dialogue in self.dialogues:
            digest.update(dialogue.tokens.numpy().tobytes())
        stamp, file = {"sha256": digest.hexdigest()}, self.folder / "features.json"
        if file.exists() and read_json(file) != stamp:
            raise ValueError(f"{self.folder} holds the features of other data or of another target: "
                             "give --cache-features another folder")
        if not file.exists():
            write_atomically(file, json.dumps(stamp) + "\n")
        total = sum(len(d.tokens) for d in self.dialogues)
        say(f"features: {total} tokens, {total * self.model.config.dim * weight.element_size() / 1e9:.2f} GB in {self.folder}")
        with tqdm(total=total, desc="features", unit=" tokens", disable=None) as bar:
            for n, begin in enumerate(range(0, len(order), self.SHARD)):
                shard, part = order[begin:begin + self.SHARD], self.folder / f"{n:05}.part"
                if not (self.folder / f"{n:05}.safetensors").exists():
                    kept, self.folder = {}, None  # as computed, while this shard is filled
                    lengths = [len(self.dialogues[i].tokens) for i in shard]
                    for batch in make_batches(lengths, n_token, random.Random(0)):
                        features = self.batch([shard[j] for j in batch]).features
                        kept |= {str(shard[j]): row[:lengths[j]].cpu().clone() for j, row in zip(batch, features)}
                    self.folder = part.parent
                    save_file(kept, part)
                    part.replace(part.with_suffix(".safetensors"))
                bar.update(sum(len(self.dialogues[i].tokens) for i in shard))


# Loss


class SoftCrossEntropy(torch.autograd.Function):
    """Sum over positions of CE(softmax(true W^T), softmax(predicted W^T)), the logits LOGITS_AT_ONCE elements at a time.

    The gradient of a block, (softmax(predicted) - softmax(true)) W, is taken while its logits are there, so that
    neither they nor anything of their size is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, predicted: Tensor, true: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """predicted, true [M, dim], weight [V, dim] -> loss [], positions where both have the same likeliest token []."""
        loss, same = torch.zeros((), device=weight.device), torch.zeros((), device=weight.device)
        grad = torch.empty_like(predicted)
        n = max(1, LOGITS_AT_ONCE // weight.shape[0])
        for begin in range(0, predicted.shape[0], n):
            ours = predicted[begin:begin + n].to(weight.dtype) @ weight.T               # [n, V]
            probs = true[begin:begin + n].to(weight.dtype) @ weight.T
            same += (ours.max(-1).indices == probs.max(-1).indices).sum()
            probs, log_q = probs.float().softmax(-1), ours.float().log_softmax(-1)
            loss -= (probs * log_q).sum()
            grad[begin:begin + n] = (log_q.exp_() - probs).to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(same)
        return loss, same

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0] * grad_loss, None, None


class Losses(NamedTuple):
    """Sums over the M learnt positions."""
    smooth_l1: Tensor   # averaged over the width
    cross_entropy: Tensor
    same: Tensor        # positions where head and target find the same token likeliest


class Learner(nn.Module):
    """The head with its losses: what DistributedDataParallel wraps."""

    def __init__(self, head: EagleHead, weight: Tensor, autocast: bool):
        super().__init__()
        self.head, self.autocast = head, autocast
        self.__dict__["weight"] = weight    # [V, dim] the target's LM head, frozen, over the draft vocabulary if there is one

    def forward(self, batch: Batch, noise: Tensor | None) -> Losses:
        """Pairs (f_i, t_{i+1}) predict f_{i+1}, whose logits guess t_{i+2}: learnt where the assistant says t_{i+2}."""
        tokens, features, learnt = batch
        inputs = features[:, :-2].float()
        if noise is not None:
            inputs = inputs + noise
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            predicted = self.head(tokens[:, 1:-1], inputs, torch.arange(tokens.shape[1] - 2, device=tokens.device))
        predicted, true = predicted[learnt[:, 2:]].float(), features[:, 1:-1][learnt[:, 2:]].float()   # [M, dim]
        l1 = F.smooth_l1_loss(predicted, true, reduction="sum") / predicted.shape[-1]
        return Losses(l1, *SoftCrossEntropy.apply(predicted, true, self.weight))


def input_noise(batch: Batch, indices: list[int], lengths: list[int], scale: float, seed: int) -> Tensor:
    """U(-scale, scale) [B, T - 2, dim], drawn for each dialogue by itself: it does not depend on how many processes
    share a batch, and resuming needs no generator's state."""
    noise = torch.zeros(*batch.features[:, 2:].shape, device=batch.tokens.device)
    for row, i in enumerate(indices):
        generator = torch.Generator(noise.device).manual_seed(seed * 1_000_003 + i)
        noise[row, :lengths[i] - 2].uniform_(-scale, scale, generator=generator)
    return noise


# Evaluation


@torch.inference_mode()
def draft_ranks(head: EagleHead, tokens: Tensor, features: Tensor, max_depth: int) -> Tensor:
    """For every position i at once: draft from pair (f_i, t_{i+1}) along the tokens that really follow, and rank
    t_{i+2}, t_{i+3}, ... among the guesses. tokens [T], features [T, dim] -> [max_depth, positions], 0 the likeliest.

    Depth d of position i attends to true pairs up to i, then to its own drafts at i+1 .. i+d: level d of the head's
    cache holds the pairs whose features are d steps from the target's. All depths of a column lie inside the text.
    """
    ids, hidden = tokens[None].long(), features[None, :-1]
    n_pair = ids.shape[1] - 1
    head.setup_caches(1, n_pair * max_depth)
    pos = torch.arange(n_pair, device=ids.device)
    slot = torch.arange(n_pair * max_depth, device=ids.device)
    slot, level = slot % n_pair, slot // n_pair
    ranks = []
    for d in range(min(max_depth, n_pair - 1)):
        # Row j of this pass continues position i = j - d: its token is t_{j+1}, its feature d steps old.
        j = pos[d:]
        true_pairs = (level == 0) & (slot <= (j - d)[:, None])
        own_drafts = (level > 0) & (level <= d) & (slot - level == (j - d)[:, None])
        hidden = head(ids[:, j + 1], hidden if d == 0 else hidden[:, :-1], j, d * n_pair + j,
                      (true_pairs | own_drafts)[None])
        ranks.append(rank_of(head, hidden[:, :-1], ids[:, j[:-1] + 2])[0])
    head.kv_cache = None
    width = max(n_pair - max_depth, 0)
    return torch.stack([rank[:width] for rank in ranks]) if width else ids.new_zeros(max_depth, 0)


def rank_of(head: EagleHead, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Place of each token among the draft's guesses, 0 the first; the size of the vocabulary when it is not drafted."""
    logits = head.draft_logits(hidden.to(head.target.norm.weight.dtype)).float()
    if head.draft_ids is None:
        return (logits > logits.gather(-1, tokens[..., None])).sum(-1)
    match = head.draft_ids == tokens[..., None]
    own = logits.masked_fill(~match, -torch.inf).amax(-1, keepdim=True)
    return torch.where(match.any(-1), (logits > own).sum(-1), head.config.vocab_size)


@torch.no_grad()
def evaluate(learner: Learner, features: Features, held_out: list[int]) -> dict:
    """Losses, top-1/2/3 accuracy, n-alpha and the accepted length expected of a chain, on dialogues not learnt from.

    n-alpha [1, section 5.2]: how often a chain's draft is right when the last n features before it are the head's own.
    """
    sums, count, columns = torch.zeros(3), 0, []
    for i in held_out:
        batch = features.batch([i])
        sums += torch.stack(learner(batch, None)).cpu()
        count += int(batch.learnt[:, 2:].sum())
        with torch.autocast(batch.tokens.device.type, torch.bfloat16, enabled=learner.autocast):
            ranks = draft_ranks(learner.head, batch.tokens[0], batch.features[0], N_ALPHA)
        columns.append(ranks[:, batch.learnt[0, 2:2 + ranks.shape[1]]].cpu())
    ranks = torch.cat(columns, dim=1)
    right = (ranks == 0).double()
    return {"eval_smooth_l1": sums[0].item() / count, "eval_cross_entropy": sums[1].item() / count,
            "eval_positions": count, **{f"eval_top{k}": (ranks[0] < k).double().mean().item() for k in (1, 2, 3)},
            "eval_n_alpha": [round(a, 4) for a in right.mean(1).tolist()],
            "eval_chain_length": 1 + right.cumprod(0).sum(0).mean().item()}


# Training


def head_config(target: dict, args: argparse.Namespace) -> dict:
    """config.json of a head for this target, in the official format."""
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size",
            "rms_norm_eps", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    rope = target.get("rope_parameters") or {}
    theta = target.get("rope_theta") or rope.get("rope_theta") or 10000.0
    name = Path(args.checkpoint or "SmolLM2-135M-Instruct").name
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 1,
            **{key: target[key] for key in keys if target.get(key) is not None}, "rope_theta": theta, "bias": True,
            "qkv_bias": target.get("model_type") == "qwen2", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "eagle_version": 1, "target": name}


def new_head(config: dict, model: Transformer, init: str | None, seed: int) -> EagleHead:
    """A head in fp32, its weights random, or those of another head."""
    from eagle_head import head_args
    head = EagleHead(head_args(config, model.config), model, bias=config["bias"])
    if init is not None:
        other = EagleHead.from_pretrained(init, model)
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


def common_tokens(dialogues: list[Dialogue], stop_ids: frozenset[int], n: int) -> list[int]:
    """The tokens that the assistant says most, and those that end its turn."""
    counts = Counter()
    for dialogue in dialogues:
        counts.update(dialogue.tokens[dialogue.learnt].tolist())
    return list(dict.fromkeys([*sorted(stop_ids), *(i for i, _ in counts.most_common())]))[:n]


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


def train(args: argparse.Namespace) -> int:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else None))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    first = rank == 0
    state_file, log_file = args.out / "checkpoint.pt", args.out / "log.jsonl"
    if state_file.exists() and not args.resume:
        raise ValueError(f"{args.out} holds a training: go on with --resume, or give another --out")

    if args.checkpoint is None:
        from scripts.download import download_demo
        args.checkpoint = str(download_demo(log=say))
    folder = resolve_checkpoint(args.checkpoint)
    tokenizer = Tokenizer.from_pretrained(folder, chat_template=args.chat_template)
    model = Transformer.from_pretrained(folder, device, getattr(torch, args.dtype))
    dialogues = read_dialogues(args.data, tokenizer, model.config.vocab_size, min(args.max_length, model.config.block_size))
    args.out.mkdir(parents=True, exist_ok=True)

    # The held-out dialogues depend on the seed alone, so that runs can be compared.
    shuffled = random.Random(args.seed).sample(range(len(dialogues)), len(dialogues))
    n_held = min(args.eval_dialogues, len(dialogues) // 10)
    held_out, learnt = sorted(shuffled[:n_held]), sorted(shuffled[n_held:])
    config = head_config(read_json(folder / "config.json"), args)
    head = new_head(config, model, args.init, args.seed)
    weight = model.output.weight
    if args.draft_vocab:
        ids = common_tokens([dialogues[i] for i in learnt], tokenizer.stop_ids, args.draft_vocab)
        head.set_draft_vocab(ids)
        weight, config = head.draft_output.weight, config | {"draft_vocab_size": len(ids)}
        if first:
            write_atomically(args.out / "draft_vocab.json", json.dumps({"ids": ids}) + "\n")
    pack_for_cpu(model)
    n_token = args.batch_size * args.max_length
    if args.cache_features is not None and not first:
        dist.barrier()      # the first process fills the cache, the others find it full
    features = Features(model, dialogues, args.cache_features, n_token)
    if args.cache_features is not None and first and world > 1:
        dist.barrier()
    learner = Learner(head, weight, autocast=args.dtype == "bfloat16")
    wrapped = nn.parallel.DistributedDataParallel(learner) if world > 1 else learner
    optimizer = torch.optim.AdamW(head.parameters(), lr=args.lr, betas=(0.9, 0.95))

    lengths = [len(dialogue.tokens) for dialogue in dialogues]
    plan = [make_batches([lengths[i] for i in learnt], n_token * world, random.Random(f"{args.seed} {epoch}"))
            for epoch in range(args.epochs)]
    batches = [(epoch, [learnt[j] for j in batch]) for epoch, part in enumerate(plan) for batch in part]
    n_step = len(batches)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for _, batch in batches)
    padding = 1 - args.epochs * sum(lengths[i] for i in learnt) / padded
    warmup = min(2000, n_step // 10) if args.warmup is None else args.warmup

    settings = {key: str(value) for key, value in vars(args).items()
                if key not in ("resume", "save_minutes", "device", "out", "checkpoint", "data", "cache_features", "eval_every")}
    settings |= {"world": world, "data_sha256": hashlib.sha256(args.data.read_bytes()).hexdigest()}
    step, log = 0, []
    if args.resume and state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        for key, value in settings.items():
            if state["settings"].get(key) != value:
                raise ValueError(f"--resume: {key} was {state['settings'].get(key)!r} in {state_file}, now it is {value!r}")
        head.load_state_dict(state["head"])
        optimizer.load_state_dict(state["optimizer"])
        step, log = state["step"], state["log"]
    say_once = say if first else (lambda line: None)
    say_once(f"{sum(p.numel() for p in head.parameters())} parameters, {n_step} steps of up to {n_token * world} tokens, "
             f"padding {padding:.1%}, {len(held_out)} dialogues held out" + (f"; going on at step {step}" if step else ""))

    def save() -> None:
        if first:
            save_head(head, config, args.out)
            write_atomically(log_file, "".join(json.dumps(entry) + "\n" for entry in log))
            save_state(state_file, {"settings": settings, "step": step, "log": log, "head": head.state_dict(),
                                    "optimizer": optimizer.state_dict()})

    stop = Stop()
    last_save = time.monotonic()
    eval_every = args.eval_every or max(1, n_step // args.epochs)
    sums, started, n_seen = torch.zeros(4, device=device), time.monotonic(), 0
    with tqdm(total=n_step, initial=step, desc="training", unit=" steps", disable=None if first else True) as bar:
        while step < n_step:
            epoch, indices = batches[step]
            mine = indices[rank::world]
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, n_step, warmup, args.lr)
            n_learnt = sum(int(dialogues[i].learnt[2:].sum()) for i in indices)
            if mine:
                batch = features.batch(mine)
                noise = input_noise(batch, mine, lengths, args.noise, args.seed * 1_000_003 + epoch) if args.noise else None
            else:   # fewer dialogues than processes: take part with nothing to learn
                batch, noise = features.batch(indices[:1]), None
                batch = batch._replace(learnt=torch.zeros_like(batch.learnt))
            losses = wrapped(batch, noise)
            loss = (losses.smooth_l1 + args.cls_weight * losses.cross_entropy) / n_learnt
            if not math.isfinite(loss.item()):
                lines = ", ".join(str(dialogues[i].line) for i in mine)
                raise ValueError(f"the loss is {loss.item()} at step {step} (epoch {epoch}), dialogues of lines {lines}; "
                                 "the last checkpoint stands: --resume goes on from there")
            optimizer.zero_grad()
            (loss * world).backward()   # DistributedDataParallel averages gradients, the loss is a sum of parts
            norm = nn.utils.clip_grad_norm_(head.parameters(), args.clip)
            optimizer.step()
            step += 1
            sums += torch.stack((*(x.detach() for x in losses), torch.tensor(float(n_learnt), device=device)))
            n_seen += sum(lengths[i] for i in indices)
            bar.update()
            if step % args.log_every == 0 or step == n_step:
                if world > 1:
                    sums[3] /= world
                    dist.all_reduce(sums)
                l1, ce, same, count = sums.tolist()
                rate = n_seen / (time.monotonic() - started)
                log.append({"step": step, "epoch": epoch, "smooth_l1": l1 / count, "cross_entropy": ce / count,
                            "top1": same / count, "lr": optimizer.param_groups[0]["lr"], "grad_norm": float(norm),
                            "tokens_per_second": round(rate)})
                bar.set_postfix_str(f"loss {(l1 + args.cls_weight * ce) / count:.3f}, alpha {same / count:.3f}, {rate:.0f} tokens/s")
                sums.zero_()
                started, n_seen = time.monotonic(), 0
            if held_out and (step % eval_every == 0 or step == n_step):
                if first:
                    log.append({"step": step, "epoch": epoch, **evaluate(learner, features, held_out)})
                    bar.write("step {step}: top-1 {eval_top1:.3f}, chain of 5 accepts {eval_chain_length:.2f}, "
                              "n-alpha {eval_n_alpha}".format(**log[-1]), file=sys.stderr)
                if world > 1:
                    dist.barrier()
                started, n_seen = time.monotonic(), 0
            if stop.asked(world, device) or step == n_step or time.monotonic() - last_save >= 60 * args.save_minutes:
                save()
                last_save = time.monotonic()
                if stop.seen and step < n_step:
                    say_once(f"stopped at step {step}; the same command with --resume goes on from there")
                    return 130
    if first:
        draw_curves(log, args.out / "curves.png")
    say_once(f"wrote {args.out}")
    return 0


class Stop:
    """Ctrl-C or SIGTERM ask for a stop after the step that runs, on all processes at the same one."""

    def __init__(self):
        self.seen = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

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
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5))
    for axis, keys in zip(axes, (("smooth_l1", "eval_smooth_l1"), ("cross_entropy", "eval_cross_entropy"), ("top1", "eval_top1"))):
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axis.plot(*zip(*points), label=key) if points else None
        axis.set_xlabel("step")
        axis.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main(args: argparse.Namespace) -> int:
    """Exit status: 0; 2 with one line for what the user can mend; 130 when stopped, with everything saved."""
    try:
        return train(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        say(f"error: {' '.join(str(error).split())}")
        return 2
    except KeyboardInterrupt:   # before the first step
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Train an EAGLE head for a target.")
    parser.add_argument("--checkpoint", help="the target: Hugging Face folder or hub id (default: the demo model)")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines of dialogues")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the head, its log and its checkpoint")
    parser.add_argument("--init", metavar="HEAD", help="begin with this head's weights instead of random ones")
    parser.add_argument("--draft-vocab", type=number(int, 1), metavar="N", help="classify among the N commonest tokens of "
                        "the answers only, and write them as draft_vocab.json (default: the whole vocabulary)")
    parser.add_argument("--epochs", type=number(int, 1), default=20, metavar="N")
    parser.add_argument("--batch-size", type=number(int, 1), default=4, metavar="N", help="a step of one process has at most "
                        "N * max-length tokens: more dialogues where they are short")
    parser.add_argument("--max-length", type=number(int, 3), default=2048, metavar="N", help="longer dialogues are cut")
    parser.add_argument("--lr", type=number(float, 0, open_low=True), default=3e-5, metavar="X", help="at its peak")
    parser.add_argument("--warmup", type=number(int, 0), metavar="N", help="steps (default: 2000, at most a tenth of all)")
    parser.add_argument("--cls-weight", type=number(float, 0), default=0.1, metavar="X", help="of the cross-entropy")
    parser.add_argument("--noise", type=number(float, 0), default=0.1, metavar="X", help="U(-X, X) on input features")
    parser.add_argument("--clip", type=number(float, 0, open_low=True), default=0.5, metavar="X", help="norm of the gradient")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    parser.add_argument("--cache-features", type=Path, metavar="FOLDER", help="keep the target's features on disk")
    parser.add_argument("--eval-dialogues", type=number(int, 0), default=100, metavar="N", help="held out, at most a tenth")
    parser.add_argument("--eval-every", type=number(int, 1), metavar="N", help="steps (default: an epoch)")
    parser.add_argument("--log-every", type=number(int, 1), default=10, metavar="N", help="steps")
    parser.add_argument("--save-minutes", type=number(float, 0), default=10.0, metavar="X", help="between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of the target; the head's weights are fp32, run under autocast with bfloat16")
    parser.add_argument("--chat-template", help="vicuna, llama2, mixtral or a jinja file, instead of the checkpoint's")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
