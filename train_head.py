"""Train an EAGLE head: python train_head.py --checkpoint C --data dialogues.jsonl --out heads/NAME

    python train_head.py --data data.jsonl --out heads/mine --draft-vocab 8192 --lr 3e-3        # a small target
    python train_head.py ... --cache-features features/       # the target's features on disk: it then runs once only
    python train_head.py ... --resume                         # go on after a kill or Ctrl-C, to the same bits
    python train_head.py ... --accumulate 8                   # the step of eight processes in the memory of one
    python train_head.py ... --kind eagle3 --draft-vocab 32000      # EAGLE-3, by its training-time test
    torchrun --nproc-per-node 8 train_head.py ...             # data parallel
    torchrun --nproc-per-node 8 train_head.py ... --shard-target    # for 70B: each process keeps a part of the target

The recipe is that of EAGLE, arXiv 2401.15077, section 4.2, with the settings of its code. The target is frozen. The
head sees the target's features with uniform noise added and predicts the next ones: L = SmoothL1 + 0.1 CE over the
answers (train_loss.py), by AdamW at 3e-5 with gradients clipped at norm 0.5. With --kind eagle3 the recipe is that of
EAGLE-3, arXiv 2503.01840 (train_eagle3.py). docs/training.md tells the rest.
"""
import argparse
import hashlib
import json
import os
import random
import signal
import sys
import time
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import tp
from checkpoint import demo_checkpoint, read_json, resolve_checkpoint
from config import ModelArgs
from console import Parser, add_chat_options, check_writable, command, number, pick_device, say, write_atomically
from eagle_head import Eagle3Head
from tokenizer import Tokenizer
from train_data import Dialogue, make_batches, parts_of, read_dialogues, split
from train_eagle3 import Eagle3Learner
from train_features import (DIFFERS, Features, cache_origin, check_cache, check_same, load_target, states_stamp,
                            target_stamp, tokens_digest, write_features)
from train_init import begin, capture_of
from train_loss import Learner, evaluate, input_noise
from train_run import Run, draw_curves, load_state


@command(in_ranks=True)
def main(args: argparse.Namespace) -> int:
    """Returns the exit status: 130 when stopped, with everything saved."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device, cache, state_file = pick_device(args.device), args.cache_features, args.out / "checkpoint.pt"
    resumes = state_file.exists()
    if resumes and not args.resume:
        raise ValueError(f"{args.out} holds a training: go on with --resume, or give another --out")
    if args.shard_target and (world == 1 or cache is not None):
        raise ValueError("--shard-target needs torchrun with several processes, and no --cache-features")
    check_writable("--out", args.out, is_folder=True)
    if args.init is not None and not resumes:
        resolve_checkpoint(args.init)
    args.checkpoint = args.checkpoint or str(demo_checkpoint())
    folder = resolve_checkpoint(args.checkpoint)

    # A resume or a cache that does not fit is refused before anything is loaded or written.
    before = load_state(state_file)["settings"] if resumes else {}
    tokenizer, origin = origin_of(args, folder, before.get("date"))
    target_args, capture = ModelArgs.from_config(read_json(folder / "config.json")), ()
    if args.kind == "eagle3":
        capture = capture_of(args.aux_layers, args.out if resumes and args.init else args.init, target_args)
    if args.draft_vocab is not None and args.draft_vocab > target_args.vocab_size:
        raise ValueError(f"--draft-vocab {args.draft_vocab} is more than the target's vocabulary, "
                         f"{target_args.vocab_size} tokens")
    origin["states"] = states_stamp(capture)
    settings = origin | {"data": hashlib.sha256(args.data.read_bytes()).hexdigest()} | settings_of(args, device, world)
    check_same(before, settings, f"--resume: {state_file}", differs=RESUME_DIFFERS)
    if cache is not None:
        check_cache(cache, origin)
    model = load_target(folder, device, getattr(torch, args.dtype), rank, world if args.shard_target else 1)
    max_length = min(args.max_length, model.config.block_size)
    dialogues = read_dialogues(args.data, tokenizer, model.config.vocab_size, max_length)
    settings["tokens"] = tokens_digest(dialogues, masks=True)
    check_same(before, settings, f"--resume: {state_file}", differs=RESUME_DIFFERS)

    n_token = args.batch_size * args.max_length
    if cache is not None:
        tp.on_rank_0(lambda: write_features(model, dialogues, cache, n_token, origin, capture))
        if world > 1:       # the others find it full, unless their machine has a disk of its own
            write_features(model, dialogues, cache, n_token, origin, capture)
    features = Features(model, dialogues, cache, capture)

    held_out, train_set = split([dialogue.line for dialogue in dialogues], args.eval_dialogues, args.seed)
    if args.keep == "best" and not held_out:
        raise ValueError(f"--keep best: of {len(train_set)} dialogues none can be held out, which takes ten of them")
    head, config = begin(args, folder, model, [dialogues[i] for i in train_set], tokenizer.stop_ids, capture, resumes)
    args.out.mkdir(parents=True, exist_ok=True)
    if isinstance(head, Eagle3Head):
        say(head.spec.describe())
        learner = Eagle3Learner(head, args.dtype == "bfloat16", args.levels)
    else:
        learner = Learner(head, args.dtype == "bfloat16", args.levels, args.cls_weight, args.top_k_loss or 0)
        if head.draft_ids is not None and tp.writes():
            write_atomically(args.out / "draft_vocab.json", json.dumps({"ids": head.draft_ids.tolist()}) + "\n")
    wrapped = DistributedDataParallel(learner) if world > 1 else learner
    run = Run(args.out, head, config, settings, lr=args.lr, ema=args.ema, keeps_best=args.keep == "best")
    if resumes:
        run.load(device)

    lengths = [len(dialogue.tokens) for dialogue in dialogues]
    plan = []       # (epoch, dialogues) of every step
    for epoch in range(args.epochs):
        rng = random.Random(f"{args.seed} {epoch}")
        batches = make_batches([lengths[i] for i in train_set], n_token, rng, n_part=world * args.accumulate)
        plan += [(epoch, [train_set[j] for j in batch]) for batch in batches]
    n_step = len(plan)
    n_padded = sum(len(indices) * max(lengths[i] for i in indices) for _, indices in plan)
    padding = 1 - args.epochs * sum(lengths[i] for i in train_set) / n_padded
    warmup = min(2000, n_step // 10) if args.warmup is None else args.warmup
    eval_every = max(1, n_step // args.epochs) if args.eval_every is None else args.eval_every
    say(f"{sum(weight.numel() for weight in run.weights.values())} parameters, {n_step} steps of up to "
        f"{n_token * world * args.accumulate} tokens, padding {padding:.1%}, "
        f"{len({dialogues[i].line for i in held_out})} dialogues held out"
        + (f"; going on at step {run.step}" if run.step else ""))

    def is_due() -> bool:
        """Whether to evaluate now. The training is saved before: an evaluation may not fit into memory."""
        return bool(run.step and held_out and eval_every and (run.step % eval_every == 0 or run.step == n_step)
                    and not any(entry["step"] == run.step and "eval_top1" in entry for entry in run.log))

    stop = Stop()
    names = learner.losses._fields
    sums, started, n_seen = torch.zeros(len(names) + 1, device=device), time.monotonic(), 0
    with tqdm(total=n_step, initial=run.step, desc="training", unit=" steps", disable=None) as bar:
        while run.step < n_step or is_due():
            if is_due():
                with run.averaged():
                    figures = evaluate(learner, features, held_out, rank, world)
                run.log.append({"step": run.step, "epoch": plan[run.step - 1][0], **figures})
                run.keep_best()
                bar.write("step {step}: top-1 {eval_top1:.3f}, a chain of 5 accepts {eval_chain_length:.2f}, the "
                          "paper's tree {eval_tree_length:.2f}, n-alpha {eval_n_alpha}".format(**run.log[-1]),
                          file=sys.stderr)
                started, n_seen = time.monotonic(), 0
                continue
            epoch, indices = plan[run.step]
            rate = learning_rate(run.step, n_step, warmup, args.lr)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            run.optimizer.zero_grad()
            parts = parts_of(indices, rank, world, args.accumulate)
            losses = add_gradients(wrapped, features, indices, parts, args, args.seed * 1_000_003 + epoch, world)
            norm = nn.utils.clip_grad_norm_(run.weights.values(), args.clip)
            refuse_not_finite(losses, norm, parts, indices, dialogues, run.step)
            run.update()
            sums[:-1] += sum(losses, torch.zeros(len(names), device=device))
            sums[-1] += count_tokens(dialogues, indices) / world
            n_seen += sum(lengths[i] for i in indices)
            bar.update()
            if run.step % args.log_every == 0 or run.step == n_step:
                if world > 1:
                    dist.all_reduce(sums)
                *totals, n_counted = sums.tolist()
                figures = {name: total / n_counted for name, total in zip(names, totals)}
                speed = n_seen / (time.monotonic() - started)
                run.log.append({"step": run.step, "epoch": epoch, **figures, "lr": rate,
                                "grad_norm": float(norm), "tokens_per_second": round(speed)})
                bar.set_postfix_str("loss {loss:.3f}, top-1 {top1:.3f}, ".format(**figures) + f"{speed:.0f} tokens/s")
                sums.zero_()
                started, n_seen = time.monotonic(), 0
            if stop.asked(world, device) or is_due() or time.monotonic() - run.saved_at >= 60 * args.save_minutes:
                run.save()
                if stop.seen and (run.step < n_step or is_due()):
                    if world > 1:
                        dist.barrier()      # the first process has saved
                    say(f"stopped at step {run.step}; the same command with --resume goes on from there")
                    return 130
    run.save()
    if tp.writes():
        draw_curves(run.log, args.out / "curves.png")
    best = run.best()
    say(f"wrote {args.out}" + (", the head of step {step}: a chain of 5 accepts {eval_chain_length:.2f}".format(**best)
                               if run.keeps_best and best else ""))
    return 0


def origin_of(args: argparse.Namespace, folder: Path, date: str | None) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer, and what the target's features come from beside dtype and tokens.

    A chat template that asks for the date is told one for the whole training: `date`, the cache's, or now.
    """
    if args.cache_features is not None:
        date = date or cache_origin(args.cache_features).get("date")
    stamp, now = tp.on_rank_0(lambda: (target_stamp(folder), datetime.now().isoformat(timespec="seconds")))
    tokenizer = Tokenizer.from_pretrained(folder, chat_template=args.chat_template, template_args=args.template_args,
                                          date=datetime.fromisoformat(date or now))
    if tokenizer.uses_date:
        say(f"the chat template is told the date {date or now}" + (", that of the training so far" if date else ""))
    return tokenizer, {"checkpoint": args.checkpoint, "target": stamp, "template": tokenizer.template_digest,
                       "date": (date or now) if tokenizer.uses_date else ""}


RESUME_DIFFERS = DIFFERS | {
    "data": "{where} was trained on another --data file",
    "threads": "{where} was trained with {was} threads, now there are {now}: OMP_NUM_THREADS={was} gives the same bits",
    "device": "{where} was trained on the device {was!r}, now it is {now!r}: give --device {was}",
    "torch": "{where} was trained with torch {was}, this is {now}: install that one, or use --init and another --out",
    "world": "{where} was trained by {was} processes, now there are {now}",
    "cached": "{where}: --cache-features was given: {was}, now: {now}; cached features are rounded otherwise",
}
FREE_ON_RESUME = {"resume", "save_minutes", "eval_every", "out", "cache_features", "device",    # change no weight
                  "checkpoint", "data", "chat_template", "template_args"}                       # compared by content


def settings_of(args: argparse.Namespace, device: torch.device, world: int) -> dict[str, str]:
    """What changes the bits of a training beside the target and the tokens."""
    return {"world": str(world), "device": device.type, "torch": str(torch.__version__),
            "cached": str(args.cache_features is not None),
            "threads": str(torch.get_num_threads()) if device.type == "cpu" else "any",
            **{key: str(value) for key, value in vars(args).items() if key not in FREE_ON_RESUME}}


def learning_rate(step: int, n_step: int, warmup: int, peak: float) -> float:
    """Linear from 0 to the peak over `warmup` steps, then linear to 0 at n_step."""
    return peak * min((step + 1) / warmup if warmup else 1.0, (n_step - step) / max(1, n_step - warmup))


def count_tokens(dialogues: list[Dialogue], indices: list[int]) -> int:
    """Positions that count in the loss."""
    return sum(int(dialogues[i].loss_mask[2:].sum()) for i in indices)


def add_gradients(learner: Learner | Eagle3Learner | DistributedDataParallel, features: Features, indices: list[int],
                  parts: list[list[int]], args: argparse.Namespace, noise_seed: int, world: int) -> list[Tensor]:
    """The loss of a step is the mean over the tokens of all its parts and processes: its gradient is that of one large
    batch. Returns the losses of this process's parts, one tensor each."""
    dialogues, losses = features.dialogues, []
    lengths = [len(dialogue.tokens) for dialogue in dialogues]
    n_counted = count_tokens(dialogues, indices)
    for part in parts:
        batch = features.batch(part or indices[:1])
        if not part:    # fewer dialogues than processes: take part with nothing that counts
            batch = batch._replace(loss_mask=torch.zeros_like(batch.loss_mask))
        is_last = len(losses) == len(parts) - 1     # then the processes exchange gradients
        noise = input_noise(batch, part, lengths, args.noise, noise_seed) if args.kind == "eagle1" else None
        with learner.no_sync() if isinstance(learner, DistributedDataParallel) and not is_last else nullcontext():
            sums = learner(batch, noise)
            loss = sums.loss / n_counted
            (loss * world).backward()   # DistributedDataParallel averages gradients, the loss is a sum of parts
        losses.append(torch.stack(sums).detach())
    return losses


def refuse_not_finite(losses: list[Tensor], norm: Tensor, parts: list[list[int]], indices: list[int],
                      dialogues: list[Dialogue], step: int) -> None:
    """Raise ValueError with the lines at fault, before a NaN enters the weights."""
    finite = torch.stack([*(loss.isfinite().all() for loss in losses), norm.isfinite()]).tolist()  # sync: once a step
    if all(finite):
        return
    at_fault = next((part for part, fine in zip(parts, finite) if not fine), indices)
    lines = ", ".join(str(dialogues[i].line) for i in at_fault[:20]) + (", ..." if len(at_fault) > 20 else "")
    what = "loss" if not all(finite[:-1]) else "norm of the gradient"
    raise ValueError(f"the {what} is not finite at step {step}, dialogues of lines {lines}; "
                     "nothing of it is learnt or saved: --resume goes on from the last checkpoint")


class Stop:
    """Ctrl-C or SIGTERM asks for a stop after the step that runs, the same step on all processes."""

    def __init__(self):
        self.seen = False
        for interruption in (signal.SIGINT, signal.SIGTERM):
            signal.signal(interruption, self._note)

    def _note(self, *_: object) -> None:
        self.seen = True

    def asked(self, world: int, device: torch.device) -> bool:
        """Whether any process was asked."""
        if world > 1:
            flag = torch.tensor(float(self.seen), device=device)
            dist.all_reduce(flag)
            self.seen = flag.item() > 0
        return self.seen


# Of each kind: the options that the other does not have, and the defaults that differ.
RECIPES: dict[str, dict[str, Any]] = {
    "eagle1": {"lr": 3e-5, "levels": 1, "noise": 0.1, "cls_weight": 0.1, "bias": True, "top_k_loss": None},
    "eagle3": {"lr": 5e-5, "levels": 7, "lm_head": "random", "aux_layers": None}}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Train an EAGLE head for a target.")
    parser.add_argument("--checkpoint", help="the target: folder, GGUF file or hub id (default: the demo model)")
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSON lines of dialogues")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="the head, its log, its checkpoint")
    parser.add_argument("--kind", choices=sorted(RECIPES), default="eagle1", help="eagle1 serves EAGLE-2 too")
    parser.add_argument("--init", metavar="HEAD", help="begin with this head's weights instead of random ones")
    parser.add_argument("--draft-vocab", type=number(int, 1), metavar="N", help="draft the N commonest tokens of the "
                        "answers only (default: the whole vocabulary); eagle1 writes them as draft_vocab.json")
    parser.add_argument("--epochs", type=number(int, 1), default=20, metavar="N")
    parser.add_argument("--batch-size", type=number(int, 1), default=4, metavar="N",
                        help="a process has at most N * max-length tokens a step: more dialogues where they are short")
    parser.add_argument("--accumulate", type=number(int, 1), default=1, metavar="N",
                        help="batches a step: the gradient of N times the batch size in the memory of one")
    parser.add_argument("--max-length", type=number(int, 3), default=2048, metavar="N", help="longer dialogues are cut")
    parser.add_argument("--lr", type=number(float, 0, open_low=True), metavar="X",
                        help="at its peak (default: 3e-5, of eagle3 5e-5)")
    parser.add_argument("--warmup", type=number(int, 0), metavar="N", help="steps (default: 2000, at most a tenth)")
    parser.add_argument("--levels", type=number(int, 1), metavar="N", help="train also on features up to N - 1 steps "
                        "the head's own (default: 1; of eagle3 7, the steps of its training-time test)")
    parser.add_argument("--cls-weight", type=number(float, 0), metavar="X",
                        help="eagle1: of the cross-entropy (default: 0.1)")
    parser.add_argument("--top-k-loss", type=number(int, 1), metavar="K", help="eagle1: add the cross-entropy of the "
                        "target's K likeliest tokens, as HASS does with 10")
    parser.add_argument("--noise", type=number(float, 0), metavar="X",
                        help="eagle1: U(-X, X) on input features (default: 0.1)")
    parser.add_argument("--bias", action=argparse.BooleanOptionalAction,
                        help="eagle1: of fc (default); vLLM allows none")
    parser.add_argument("--aux-layers", type=number(int, 0), nargs="+", metavar="J", help="eagle3: the hidden states "
                        "that the head reads, as transformers counts them (default: 2 L/2 L-3)")
    parser.add_argument("--lm-head", choices=("random", "target", "frozen"), help="eagle3: begin with random rows "
                        "(default), with the target's, or keep the target's")
    parser.add_argument("--clip", type=number(float, 0, open_low=True), default=0.5, metavar="X", help="gradient norm")
    parser.add_argument("--ema", type=number(float, 0, 1), metavar="DECAY",
                        help="write and evaluate an exponential moving average of the weights")
    parser.add_argument("--keep", choices=("last", "best"), default="last",
                        help="the head that is written: the last, or the one that drafts best for held-out dialogues")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, metavar="N")
    parser.add_argument("--cache-features", type=Path, metavar="FOLDER", help="keep the target's features on disk")
    parser.add_argument("--shard-target", action="store_true", help="spread the target's layers over the processes")
    parser.add_argument("--eval-dialogues", type=number(int, 0), default=100, metavar="N", help="held out: up to 10%%")
    parser.add_argument("--eval-every", type=number(int, 0), metavar="N", help="steps (default: an epoch; 0: never)")
    parser.add_argument("--log-every", type=number(int, 1), default=10, metavar="N", help="steps")
    parser.add_argument("--save-minutes", type=number(float, 0), default=10.0, metavar="X", help="between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16",
                        help="of the target; the head's weights are fp32, run under autocast with bfloat16")
    add_chat_options(parser)
    args = parser.parse_args(argv)
    recipe = RECIPES[args.kind]
    for key in {key for other in RECIPES.values() for key in other} - recipe.keys():
        if getattr(args, key) is not None:
            parser.error(f"--{key.replace('_', '-')} is not an option of --kind {args.kind}")
    if args.kind == "eagle3" and args.init is not None:
        for key in ("draft_vocab", "aux_layers", "lm_head"):
            if getattr(args, key) is not None:
                parser.error(f"--{key.replace('_', '-')}: an EAGLE-3 head of --init brings its own")
    if args.keep == "best" and 0 in (args.eval_dialogues, args.eval_every):
        parser.error("--keep best needs evaluations: --eval-dialogues and --eval-every above 0")
    vars(args).update({key: value for key, value in recipe.items() if getattr(args, key) is None})
    return args


if __name__ == "__main__":
    sys.exit(tp.run(main, parse_args(), timeout=300))     # the others wait for rank 0 to save
