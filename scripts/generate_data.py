"""Let the target write its own training data: python scripts/generate_data.py --out data.jsonl --dialogues 10000

    python scripts/generate_data.py --checkpoint lmsys/vicuna-7b-v1.3 --prompts prompts.jsonl --out data.jsonl
    python scripts/generate_data.py --out data.jsonl --temperature 0.8 --temperature-share 0.3 --second-turns 0.3
    python scripts/generate_data.py --out data.jsonl --features features     # for train_head.py --cache-features

A head learns best from answers that its target wrote (EAGLE, arXiv 2401.15077, table 6: 2.88x instead of 2.78x).
--prompts gives the user's turns: dialogues in a format of train_data.py, question sets ("turns"), or lines of text.
Each turn is answered after the target's own earlier answers; system messages and tools stay. Without --prompts the
target writes the questions too (dialogues.py). Questions are dropped that come again, or that benchmarks/ measures
with. An answer that begins to loop, which would flatter acceptance, is cut where it does, and the dialogue ends there.

Rows of one cache answer side by side; one that ends begins the next question at once (batching.py). Under torchrun the
target is split over the processes, and the first one writes. Each line written is a dialogue, {"messages": [...]}, with
"tools" where there are some, and

    tokens          for each answer the ids that the target generated, which train_head.py trains on
    finish_reason   of the last answer: "stop", or "length" where it was cut, by --max-new-tokens or at a loop
    drawn           whether the answers were drawn at --temperature
    question        identifies what was asked, so that it is not asked again
    number          of the question; with the seed it determines what the target asks
    settled         all questions with lower numbers are in the file or were dropped

and the settings: the target and its chat template as digests, the date that the template was told, the options. A run
that was killed goes on when it is started again with the same settings. Device and batch size may differ.
"""
import argparse
import datetime
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import root  # noqa: F401
import tp
from checkpoint import demo_checkpoint, resolve_checkpoint
from console import (Parser, add_chat_options, check_writable, command, launched, number, parse_json, read_records,
                     read_text, say, whole_or_nothing)
from decoder import slots_for
from generate import load
from model import Transformer
from scripts.batching import Request, Rows
from scripts.dialogues import OF_A_LINE, Desk, Job, Talk, digest, is_measured, question_of, text_of
from tokenizer import Tokenizer
from train_data import Dialogue, LeftOut, Unusable, holds_records, read_dialogues
from train_features import DIFFERS, Features, check_cache, check_same, target_stamp, write_features

GROUPS = 16             # prompts of a sixteenth of the rows are prefilled together
# Options that change what is written
OPTIONS = ("seed", "temperature", "temperature_share", "top_k", "top_p", "second_turns", "max_new_tokens",
           "max_user_tokens", "max_prompt_tokens", "dtype", "system")


@command(stopped="stopped; the same command goes on from here", in_ranks=True)
def main(args: argparse.Namespace) -> None:
    check_options(args)
    args.checkpoint = args.checkpoint or str(demo_checkpoint())
    tokenizer = Tokenizer.from_pretrained(args.checkpoint, chat_template=args.chat_template,
                                          template_args=args.template_args)
    tokenizer.apply_chat_template(question_of({"turns": ["Hi"]}, args).turns)   # refuses now what always fails
    job = tp.on_rank_0(lambda: prepare(args, tokenizer))
    if job.settings["date"] is not None:
        tokenizer.date = datetime.datetime.fromisoformat(job.settings["date"])
    model, *_ = load(args)
    n_slot = slots_for(args.max_prompt_tokens + max(args.max_new_tokens, args.max_user_tokens), model)
    told = Counter()
    desk = Desk(args, tokenizer, job, min(args.max_prompt_tokens, n_slot - 1), told)
    rows = Rows(model, args.batch_size, n_slot, stop_ids=tokenizer.stop_ids, compile=args.compile,
                top_k=args.top_k if args.prompts is None or args.temperature > 0 else None,
                keep_features=args.features is not None, group=max(1, args.batch_size // GROUPS))
    say(f"{args.batch_size} rows of up to {n_slot} cache slots: at most {rows.nbytes / 1e9:.2f} GB beside the weights")
    n_token, start = 0, time.monotonic()
    with tqdm(total=desk.total, initial=desk.n_closed, unit=" dialogues") as bar:
        for request in rows.run(desk.next):
            if args.features is not None and request.owner.frame is None:
                keep_features(args.features, request, job.origin)       # before the line that needs them
            line, n_new = desk.take(request)
            if line is not None and tp.writes():
                with open(args.out, "a", encoding="utf-8", newline="\n") as file:
                    file.write(line)
            n_token += n_new
            bar.set_postfix_str(f"{n_token / (time.monotonic() - start):.0f} tokens/s{text_of(told, ', ')}",
                                refresh=False)
            bar.update(desk.n_closed - bar.n)
    if not job.seen:
        raise ValueError(f"no dialogue was written{text_of(told, '; ')}")
    seconds = time.monotonic() - start
    say(f"{len(job.seen)} dialogues in {args.out}; {n_token} answer tokens in {seconds:.0f} s, "
        f"{n_token / seconds:.0f} a second{text_of(told, '; ')}")
    if args.features is not None:
        join_features(args, model, tokenizer, job.origin)


def check_options(args: argparse.Namespace) -> None:
    check_writable("--out", args.out)
    if args.temperature_share < 1 and args.temperature == 0:
        raise ValueError("--temperature-share needs a --temperature above 0")
    if args.second_turns and args.prompts is not None:
        raise ValueError("--second-turns does not go with --prompts, which has the user's turns")
    if args.features is not None:
        check_writable("--features", args.features, is_folder=True)
        if launched():
            raise ValueError("--features runs in one process: start it without torchrun, or leave the option out")


def prepare(args: argparse.Namespace, tokenizer: Tokenizer) -> Job:
    """Read the questions and what has been answered. Raises ValueError where --out was made with other settings."""
    talks = None if args.prompts is None else read_questions(args.prompts, args)
    numbers, settled, seen, kept = read_answered(args.out)
    date = None
    if tokenizer.uses_date:     # one for the whole file
        date = kept.get("date") or datetime.datetime.now().isoformat(timespec="seconds")
    stamp, template = target_stamp(resolve_checkpoint(args.checkpoint)), tokenizer.template_digest
    settings = {"checkpoint": args.checkpoint, "target": stamp[:16], "template": template[:16],
                "prompts": talks and digest([talk.question for talk in talks]),
                "date": date, "self_prompted": talks is None, **{key: getattr(args, key) for key in OPTIONS}}
    check_same(kept, settings, str(args.out), "; give another --out",
               DIFFERS | {"prompts": "{where} answers other questions than --prompts asks"})
    origin = {"checkpoint": args.checkpoint, "target": stamp, "template": template, "date": date or "",
              "dtype": args.dtype}
    if args.features is not None:
        check_cache(args.features, origin)
    if args.out.exists():       # take off the line in which a kill came
        os.truncate(args.out, args.out.read_bytes().rfind(b"\n") + 1)
    return Job(settings, origin, talks, seen, {n for n in numbers if n >= settled}, settled)


def read_answered(out: Path) -> tuple[set[int], int, set[str], dict]:
    """Of the questions that a file answers: their numbers, below which all are settled, and what identifies them. And
    the settings that made it."""
    numbers, settled, seen, settings = set(), 0, set(), {}
    for n, line in enumerate(out.read_bytes().split(b"\n")[:-1] if out.exists() else (), start=1):
        reasons = []
        entry = parse_json(line, reasons.append)
        if reasons or not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in (
                ("messages", list), ("question", str), ("number", int), ("settled", int))):
            raise ValueError(f"{out}, line {n}: not written by this version of this script; give another --out")
        own = {key: value for key, value in entry.items() if key not in OF_A_LINE}
        if n > 1 and own != settings:
            raise ValueError(f"{out}, line {n}: not made with the settings of line 1; give another --out")
        numbers.add(entry["number"])
        seen.add(entry["question"])
        settled, settings = max(settled, entry["settled"]), own
    return numbers, settled, seen, settings


def read_questions(file: Path, args: argparse.Namespace) -> list[Talk]:
    """The questions of a file: dialogues, question sets, or a question a line. Entries without one are counted."""
    left_out, talks = LeftOut(), {}
    if holds_records(file):
        records = read_records(file, left_out.add_broken)
    else:
        lines = enumerate(read_text(file).split("\n"), start=1)
        records = ((n, {"turns": [line]}) for n, line in lines if line.strip())
    for line, entry in records:
        try:
            talk = question_of(entry, args)
        except Unusable as error:
            left_out.add(line, *error.args)
            continue
        if is_measured(talk.turns):
            left_out.add(line, "used for measuring")
            continue
        if talk.question in talks:
            left_out.add(line, "repeated")
        talks[talk.question] = talk
    if "broken lines" in left_out.places:
        raise ValueError(f'{file}: {left_out}: give JSON with "messages", "conversations" or "turns", '
                         "or one question a line")
    if not talks:
        raise ValueError(f"{file} asks nothing" + (f": {left_out}" if left_out.places else ""))
    if left_out.places:
        say(f"{file}: {len(talks)} questions; left out: {left_out}")
    return list(talks.values())


# The target's features on the way, for train_head.py --cache-features


def features_file(folder: Path, ids: list[int], origin: dict[str, str]) -> Path:
    """Where the features of these tokens wait until all dialogues are written."""
    return folder / "written" / f"{digest([ids, origin['target'], origin['dtype']])}.safetensors"


def keep_features(folder: Path, request: Request, origin: dict[str, str]) -> None:
    assert request.features is not None
    file = features_file(folder, request.prompt + request.tokens, origin)
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_nothing(file, ".part") as part:
        save_file({"features": request.features}, part)


class Written(Features):
    """Features kept on the way; those that were not are computed."""

    def __init__(self, model: Transformer, dialogues: list[Dialogue], folder: Path, origin: dict[str, str]):
        super().__init__(model, dialogues)
        self.files = [features_file(folder, dialogue.tokens.tolist(), origin) for dialogue in dialogues]

    def states(self, indices: list[int]) -> Tensor:
        if not all(self.files[i].exists() for i in indices):
            return super().states(indices)
        return self._padded([load_file(self.files[i])["features"] for i in indices])


def join_features(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer, origin: dict[str, str]) -> None:
    """Make the cache that train_head.py reads of the features that were kept."""
    dialogues = read_dialogues(args.out, tokenizer, model.config.vocab_size, model.config.block_size)
    write_features(model, dialogues, args.features, 1, origin,
                   computed=Written(model, dialogues, args.features, origin))
    shutil.rmtree(args.features / "written", ignore_errors=True)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Let the target write dialogues to train a head on.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines; added to when it exists")
    parser.add_argument("--checkpoint", help="Hugging Face folder, GGUF file or hub id (default: the demo model)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="questions (default: the target asks itself)")
    parser.add_argument("--dialogues", type=number(int, 1), default=10000, metavar="N", help="without --prompts")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=256, metavar="N", help="of an answer")
    parser.add_argument("--max-user-tokens", type=number(int, 1), default=64, metavar="N", help="of a question")
    parser.add_argument("--max-prompt-tokens", type=number(int, 1), default=512, metavar="N", help="longer is dropped")
    parser.add_argument("--second-turns", type=number(float, 0, 1), default=0.0, metavar="P",
                        help="share of dialogues in which the target asks a second question")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, metavar="X", help="of answers; 0: greedy")
    parser.add_argument("--temperature-share", type=number(float, 0, 1), default=1.0, metavar="P",
                        help="share of dialogues answered at --temperature; the others are greedy")
    parser.add_argument("--top-k", type=number(int, 1), default=64, metavar="N", help="draws are among the N likeliest")
    parser.add_argument("--top-p", type=number(float, 0, 1, open_low=True), metavar="X")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    parser.add_argument("--batch-size", type=number(int, 1), default=64, metavar="N")
    parser.add_argument("--features", type=Path, metavar="FOLDER",
                        help="write the target's features too, for train_head.py --cache-features FOLDER")
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    add_chat_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message of dialogues that have none")
    parser.set_defaults(eagle=None, tree=None, exact=False)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(tp.run(main, parse_args()))
