"""Which reading of a head's file is right, in numbers: python scripts/check_head.py TARGET HEAD

    python scripts/check_head.py meta-llama/Llama-3.1-8B-Instruct yuhuili/EAGLE3-LLaMA3.1-Instruct-8B
    python scripts/check_head.py TARGET HEAD --questions mt_bench --minutes 10 --json check.json
    torchrun --nproc-per-node 4 scripts/check_head.py TARGET HEAD       # a target of several GPUs

A head's file can be misread without an error: captured layers that are counted in another way, another RoPE base, a
norm that is there or not. Such a mistake only costs acceptance. So the target answers some questions greedily, and the
head drafts along the answers: as its file was read, and in each other way that the file could mean, one change at a
time. The right reading is the one that accepts most.

Each answer is run through the target once more, for all hidden states that any reading needs. So a reading costs only
passes of the head.

Shapes: T tokens of a text.
"""
import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

import root  # noqa: F401
import generate as cli
import tp
from benchmarks.timing import print_table
from checkpoint import read_json, resolve_checkpoint
from config import ModelArgs
from console import Parser, add_chat_options, check_writable, command, launched, number, say, write_atomically
from decoder import Decoder, setup_caches
from eagle_head import Eagle3Head, EagleHead
from head_config import FLAG_WEIGHTS, Eagle3Spec, eagle3_spec, official_config, stored_shapes
from model import Transformer
from rope import rope_inv_freq
from scripts.figures import acceptance
from scripts.questions import HUB_SETS, read_questions
from scripts.tree_search import accept_lengths
from scripts.tune_tree import QUESTIONS, encode_all, features_of
from train_loss import draft_ranks

DEPTH = 5           # of the chain
BATCH = 8           # questions answered at a time
DRAWS = 2000        # of the bootstrap
POOR = 1.2          # tokens a step, below which a head is of no use
CHAIN = {(0,) * depth for depth in range(1, DEPTH + 1)}
PAPER_BASE = 1e4


@dataclass
class Reading:
    """One way to understand the file, and how it drafted."""
    name: str
    args: ModelArgs             # of the head's layers
    spec: Eagle3Spec | None     # None for EAGLE-1 and 2
    remedy: str = ""            # what the user does to have it read in this way
    options: list[str] = field(default_factory=list)
    lengths: list[list[int]] = field(default_factory=list)  # of each answer the tokens of each step: accept_lengths

    @property
    def capture(self) -> tuple[int, ...]:
        return () if self.spec is None else self.spec.capture

    @property
    def accept_length(self) -> float:
        return sum(map(sum, self.lengths)) / sum(map(len, self.lengths))

    @property
    def by_depth(self) -> list[float]:
        """How often the draft at each depth was right where the one above it was."""
        rates = acceptance([n for of_answer in self.lengths for n in of_answer])["acceptance_by_depth"]
        return rates + [0.0] * (DEPTH - len(rates))


@command(in_ranks=True)
def main(args: argparse.Namespace) -> None:
    if tp.writes() and args.json is not None:
        check_writable("--json", args.json)
    questions = tp.on_rank_0(lambda: read_questions(args.questions))
    model, head, tokenizer, report = cli.load(args)
    assert head is not None
    resolution = describe(head, read_json(resolve_checkpoint(args.eagle) / "config.json"))
    readings = all_readings(head, file_spec(args, model.config) if isinstance(head, Eagle3Head) else None)
    room = model.config.block_size - args.max_new_tokens
    prompts = encode_all([question["turns"][0] for question in questions], tokenizer, room, args.raw)
    say(resolution)
    seconds, interrupted = 60 * args.minutes, False
    try:
        for prompt, answer in answers(model, prompts, args.max_new_tokens, tokenizer.stop_ids, seconds):
            draft_along(model, head, readings, prompt, answer)
    except KeyboardInterrupt:
        interrupted = True
    if readings[0].lengths:
        show(args, resolution, readings, report | {"complete": not interrupted})
    elif not interrupted:
        raise ValueError(f"the answers are too short to draft {DEPTH} tokens along them: see --questions")
    if interrupted:
        raise KeyboardInterrupt


# The readings


def describe(head: EagleHead, config: dict) -> str:
    """One line that says what the head's file was taken to mean."""
    if isinstance(head, Eagle3Head):
        return head.spec.describe()
    biases = ["fc"] * official_config(config).get("bias", True) + ["q, k, v"] * head.config.qkv_bias
    source = "config.json" if "rope_theta" in json.dumps(config) else "the default: config.json has none"
    vocab = ("whole vocabulary" if head.draft_ids is None else
             f"draft vocabulary {len(head.draft_ids):,} of {head.config.vocab_size:,}")
    return (f"EAGLE-1 or 2 head: the final hidden state, biases of {' and of '.join(biases) or 'nothing'}, RoPE base "
            f"{head.config.rope_theta:g} ({source}), {vocab}")


def file_spec(args: argparse.Namespace, target: ModelArgs) -> Eagle3Spec:
    """What an EAGLE-3 head's file says without the options. Its list of layers may need --aux-layers to be read."""
    folder = resolve_checkpoint(args.eagle)
    config, shapes = read_json(folder / "config.json"), stored_shapes(folder)
    try:
        return eagle3_spec(config, shapes, target)
    except ValueError:
        return eagle3_spec(config, shapes, target, aux_layers=args.aux_layers)


def all_readings(head: EagleHead, file: Eagle3Spec | None) -> list[Reading]:
    """The reading taken, then every other plausible one. file: what an EAGLE-3 head's file says without the options."""
    target, spec = head.target.config, head.spec if isinstance(head, Eagle3Head) else None
    args = head.config
    readings = [Reading("as read", args, spec)]
    if spec is not None and file is not None:
        captures = {tuple(j - 1 for j in spec.capture): "one down", tuple(j + 1 for j in spec.capture): "one up"}
        captures[file.capture] = "the file's"
        for capture, source in captures.items():
            if capture != spec.capture and all(0 <= j <= target.n_layer for j in capture):
                options = ["--aux-layers", *map(str, capture)]
                readings.append(Reading(f"hidden states {', '.join(map(str, capture))} ({source})", args,
                                        replace(spec, capture=capture), f"Give {' '.join(options)}", options))
    bases = {} if file is None else {file.args.rope_theta: "the file's"}
    bases |= {PAPER_BASE: "the default", target.rope_theta: "the target's"}
    for base, source in bases.items():
        if base != args.rope_theta:
            options = ["--draft-rope-theta", f"{base:.15g}"] if spec else []
            readings.append(Reading(f"RoPE base {base:.15g} ({source})", replace(args, rope_theta=base), spec,
                                    f"Give {' '.join(options)}" if spec else
                                    f"rope_theta in the head's config.json is wrong: set it to {base:.15g}", options))
    if args.rope_scaling is not None:
        readings.append(Reading("no RoPE scaling", replace(args, rope_scaling=None), spec,
                                "rope_scaling in the head's config.json is wrong: set it to null"))
    if target.rope_scaling not in (None, args.rope_scaling):
        whole = replace(args, rope_theta=target.rope_theta, rope_scaling=target.rope_scaling)
        readings.append(Reading("the target's RoPE, with its scaling", whole, spec, "RoPE in the head's config.json is "
                                "wrong: copy rope_theta and rope_scaling from the target's"))
    return readings + ([] if spec is None else norm_readings(spec))


def norm_readings(spec: Eagle3Spec) -> list[Reading]:
    """Each flag switched, where the head has the weights that the other value needs."""
    remedies = {name: f"{name} in the head's config.json is wrong: set it to {json.dumps(not getattr(spec, name))}"
                for name in ("norm_before_residual", "norm_output")}
    if not spec.norm_output:    # in other files than speculators' it means something else
        remedies["norm_output"] = ('Set norm_output to true and speculators_model_type to "eagle3" in the head\'s '
                                   "config.json")
    for name, weight in FLAG_WEIGHTS.items():
        if getattr(spec, name):
            remedies[name] = (f"{name} in the head's config.json is wrong: set it to false, and take "
                              f"{weight.split('.')[0]} out of the weights")
    return [Reading(f"{name} {'off' if getattr(spec, name) else 'on'}", spec.args,
                    replace(spec, **{name: not getattr(spec, name)}), remedy) for name, remedy in remedies.items()]


@contextlib.contextmanager
def read_as(head: EagleHead, reading: Reading) -> Iterator[None]:
    """Inside, the head computes as this reading of its file has it."""
    kept = {"inv_freq": head.inv_freq, "config": head.config}
    head.inv_freq, head.config = rope_inv_freq(reading.args, head.inv_freq.device), reading.args
    if isinstance(head, Eagle3Head) and reading.spec is not None:
        spec = reading.spec
        kept |= {name: getattr(head, name) for name in ("spec", "capture", "fc_norm", "fc_input_norm")}
        head.spec, head.capture = spec, spec.capture
        head.fc_norm = head.fc_norm if spec.fc_norm else None
        head.fc_input_norm = head.fc_input_norm if spec.norm_before_fc else None
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(head, name, value)


# Drafting


def answers(model: Transformer, prompts: list[list[int]], max_new_tokens: int, stop_ids: frozenset[int],
            seconds: float) -> Iterator[tuple[list[int], list[int]]]:
    """Prompts and the target's greedy answers, until the time is over. What the caller does between two of them counts.

    Of a group of prompts that are answered together, decoding takes at most half of the time that is left.
    """
    n_row = min(BATCH, len(prompts))
    setup_caches(model, None, n_row, max(map(len, prompts)) + max_new_tokens)
    decoder, start, n_answer = Decoder(model, n_row), time.monotonic(), 0
    passed = lambda: time.monotonic() - start
    with tqdm(total=max(1, round(seconds)), desc="checking",
              bar_format="{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} s{postfix}") as bar:

        def progress(*_) -> None:
            bar.set_postfix_str(f"{n_answer} answers", refresh=False)
            bar.update(min(passed(), bar.total) - bar.n)

        for begin in range(0, len(prompts), n_row):
            group = prompts[begin:begin + n_row]
            end = (passed() + seconds) / 2
            # The clocks of ranks differ, and all of them must stop at the same token.
            stop = None if launched() else lambda prompt: lambda token: passed() > end
            made = decoder.generate(group + group[-1:] * (n_row - len(group)), max_new_tokens, stop_ids=stop_ids,
                                    stop=stop, on_tokens=progress).tokens
            for prompt, answer in zip(group, made):
                yield prompt, answer
                n_answer += 1
                progress()
                if tp.on_rank_0(lambda: passed() >= seconds):
                    return


@torch.inference_mode()
def draft_along(model: Transformer, head: EagleHead, readings: list[Reading], prompt: list[int],
                answer: list[int]) -> None:
    """Draft along an answer of the target in every reading, and note the tokens of each step."""
    states = sorted({j for reading in readings for j in reading.capture})
    ids, features = features_of(model, prompt + answer, tuple(states))      # [T, all states side by side]
    parts = features.split(model.config.dim, dim=-1)
    lengths = []
    for reading in readings:
        with read_as(head, reading):
            own = torch.cat([parts[states.index(j)] for j in reading.capture], dim=-1) if states else features
            ranks = draft_ranks(head, ids, own, DEPTH, begin=len(prompt) - 1)
        lengths.append(accept_lengths(CHAIN, list(zip(*ranks.tolist()))))
    for reading, of_answer in zip(readings, lengths):
        if of_answer:   # else the answer is too short
            reading.lengths.append(of_answer)


# The result


def show(args: argparse.Namespace, resolution: str, readings: list[Reading], report: dict) -> None:
    """The table and the verdict to stdout, and the same to --json."""
    best, line = verdict(readings)
    n_answer, n_step = len(readings[0].lengths), sum(map(len, readings[0].lengths))
    if tp.writes() and args.json is not None:
        write_atomically(args.json, json.dumps({key: report[key] for key in (
            "checkpoint", "eagle", "device", "device_name", "dtype", "torch", "draft_mode", "complete")} | {
            "resolution": resolution, "answers": n_answer, "depth": DEPTH, "verdict": line, "readings": [{
                "name": reading.name, "accept_length": reading.accept_length, "acceptance_by_depth": reading.by_depth,
                "taken": reading is readings[0], "best": reading is best, "remedy": reading.remedy,
                "options": reading.options} for reading in readings]}, indent=1) + "\n")
    print(f"{resolution}\n")
    print_table(["reading", "", "accepted length", *(f"depth {depth}" for depth in range(1, DEPTH + 1))],
                [[reading.name, "*" if reading is best else "", reading.accept_length, *reading.by_depth]
                 for reading in readings])
    print(f"\nA greedy chain of {DEPTH} along {n_answer} answers of the target, {n_step} steps as read: tokens of a "
          "step, the bonus included,\nand how often the draft at each depth was right where the one above it was.")
    print(line)


def verdict(readings: list[Reading]) -> tuple[Reading, str]:
    """The best reading, and what to do about it."""
    taken, best = readings[0], max(readings, key=lambda reading: reading.accept_length)
    lead = best.accept_length - taken.accept_length
    if best is taken:
        line = "The reading taken is the best."
    elif is_noise(taken, best):
        line = (f"The reading taken is as good as any: {best.name} is ahead by {lead:.3f}, which {len(taken.lengths)} "
                "answers cannot tell from chance.")
    else:
        line = (f"Better: {best.name}, {best.accept_length:.2f} tokens a step against {taken.accept_length:.2f}. "
                f"{best.remedy}; then check again.")
    if best.accept_length < POOR:
        line += " No reading drafts well: the head may be for another target."
    return best, line


def is_noise(taken: Reading, best: Reading) -> bool:
    """Whether `best` is not ahead in at least 97.5% of resampled sets of answers (a bootstrap)."""
    totals = [(sum(a), len(a), sum(b), len(b)) for a, b in zip(taken.lengths, best.lengths)]
    rng = random.Random(0)

    def is_ahead(rows: list[tuple[int, ...]]) -> bool:
        tokens, steps, best_tokens, best_steps = map(sum, zip(*rows))
        return best_tokens / best_steps > tokens / steps

    return sum(is_ahead(rng.choices(totals, k=len(totals))) for _ in range(DRAWS)) < 0.975 * DRAWS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Draft in every plausible reading of a head's file, and say which is right.")
    parser.add_argument("checkpoint", metavar="TARGET", help="Hugging Face folder, GGUF file or hub id")
    parser.add_argument("eagle", metavar="HEAD", help="the head's folder or hub id")
    parser.add_argument("--minutes", type=number(float, 0, open_low=True), default=2.0, metavar="X",
                        help="measure for so long (default: 2), or until all questions are answered")
    parser.add_argument("--questions", default=str(QUESTIONS), metavar="SET",
                        help=f"to answer: {', '.join(HUB_SETS)}, or a file in MT-bench's form")
    parser.add_argument("--max-new-tokens", type=number(int, 16), default=256, metavar="N", help="of an answer")
    parser.add_argument("--raw", action="store_true", help="continue the questions as they are: no chat template")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured as one JSON object")
    cli.add_draft_options(parser)
    add_chat_options(parser)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.set_defaults(compile=False, tree="chain", temperature=0.0, top_k=None, top_p=None, seed=None, profile=None,
                        exact=False)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(tp.run(main, parse_args()))
