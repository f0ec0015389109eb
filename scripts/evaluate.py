"""Answer a set of questions plainly and with EAGLE, in turn, and report speed, accepted length and agreement.

    python scripts/evaluate.py --questions mt_bench --checkpoint lmsys/vicuna-7b-v1.3 --eagle yuhuili/EAGLE-Vicuna-7B-v1.3
    python scripts/evaluate.py --questions questions.jsonl --limit 10 --out results/demo     # the demo model, its own head
    python scripts/evaluate.py ... --tree chain:4 static dynamic     # an arm for each tree
    python scripts/evaluate.py ... --also FOLDER-int8 FOLDER-int4    # the same model quantised, in turn with the rest
    python scripts/evaluate.py ... --temperature 1 --seed 0
    python scripts/evaluate.py ... --peers --gguf model.gguf         # transformers, its prompt lookup, llama.cpp as arms too

As the papers measure (EAGLE, arXiv 2401.15077, section 4): batch 1, chat template, every turn. All arms run in one process
and take turns at every question, so that a drifting clock or a busy neighbour hits all alike. The turns after the first
continue plain decoding's answer, whatever the arm: all arms then meet the same prompts.

--out gets answers/ARM.jsonl, FastChat's answer lines with what was measured beside each turn, run.json, and from them
scripts/report.py's report.json, report.md and report.png. The same command goes on after an interruption.
"""
import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate as cli
from console import Parser, command, number, say, write_atomically
from eagle_head import load_tree
from model import Transformer, bucket, causal_mask, prefill, read_json, resolve_checkpoint
from scripts import report
from scripts.peers import Answer, find_peers
from scripts.timing import environment

# name -> hub repository, file, and what makes the first turn of a row
HUB_SETS = {
    "mt_bench": ("HuggingFaceH4/mt_bench_prompts", "raw/question.jsonl", None),
    "humaneval": ("openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet",
                  lambda row: f"Complete the following Python function.\n\n{row['prompt']}"),
    "gsm8k": ("openai/gsm8k", "main/test-00000-of-00001.parquet", lambda row: row["question"]),
    "alpaca": ("tatsu-lab/alpaca", "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
               lambda row: "\n\n".join(filter(None, (row["instruction"], row["input"])))),
}
ROUNDING_ANSWERS = 3        # plain answers on which the rounding of logits is measured, of the TOP_LOGITS largest
TOP_LOGITS = 10
Arm = Callable[[list[int], int], Answer]    # (prompt ids, seed)


@command(stopped="stopped; the same command goes on from here")
@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    questions = read_questions(args.questions)[:args.limit]
    if args.peers and args.temperature > 0:
        raise ValueError("--peers decode greedily: they need --temperature 0")
    trees, args.tree = args.tree, None
    model, head, tokenizer, run = cli.load(args)
    n_slot = min(args.max_seq_length, model.config.block_size)
    args.out = args.out or Path("results") / f"{Path(args.checkpoint).name}-{Path(args.questions).stem}-T{args.temperature:g}"
    arms, targets = our_arms(args, model, head, tokenizer, trees, n_slot), {"plain": model}
    also = {Path(folder).name.removeprefix(f"{Path(args.checkpoint).name}-"): folder for folder in args.also}
    for label, folder in also.items():
        its_args = argparse.Namespace(**vars(args) | {"checkpoint": folder, "tree": None})
        twin, its_head, *_ = cli.load(its_args)
        arms |= {f"{label}-{name}": arm for name, arm in our_arms(its_args, twin, its_head, tokenizer, trees, n_slot).items()}
        targets[f"{label}-plain"] = twin
    peers, absent = find_peers(resolve_checkpoint(args.checkpoint), model.inv_freq.device, getattr(torch, args.dtype), n_slot,
                               args.gguf) if args.peers else ({}, [])
    for line in absent:
        say(line)
    for peer in peers.values():
        peer([1, 2, 3, 4], 4)   # warm up
    run |= {"question_set": Path(args.questions).stem, "max_new_tokens": args.max_new_tokens, "max_seq_length": n_slot,
            "tree": trees, "also": list(also) or None, "arms": [*arms, *peers], "absent": absent}
    done = resume(args.out, run)
    run |= environment(model.inv_freq.device, args.command) | {"rounding": None, "label": args.out.name}
    if done and (before := read_json(args.out / "run.json")["commit"]) != run["commit"]:
        run["commit"] = f"{before}, then {run['commit']}"
    todo = [q for q in questions if q["question_id"] not in done]
    if todo:    # else what was measured, and when, stands
        if args.temperature == 0:
            run["rounding"] = {plain: measure_rounding(target, arms[plain], tokenizer, questions)
                               for plain, target in targets.items()}
        write_atomically(args.out / "run.json", json.dumps(run, indent=1) + "\n")

    totals = {name: [0, 0.0] for name in run["arms"]}
    with tqdm(todo, unit=" questions", initial=len(done), total=len(questions), disable=None) as bar:
        for n, question in enumerate(bar):
            answers = ask(question, n, args, targets, tokenizer, arms, peers, n_slot)
            for name, lines in answers.items():
                with open(report.answers_file(args.out, name), "a", encoding="utf-8") as file:
                    file.write(json.dumps(answer_line(question, f"{run['label']}-{name}", lines), ensure_ascii=False) + "\n")
                totals[name][0] += sum(lines["timed_tokens"])
                totals[name][1] += sum(lines["decode_seconds"])
            bar.set_postfix_str(progress(totals, answers))
    made = report.write_report(args.out)
    print((args.out / "report.md").read_text())
    say(f"wrote {made['questions']} questions' answers and the report to {args.out}")


# Questions


def read_questions(name: str) -> list[dict]:
    """{"question_id", "category", "turns"} of a file in MT-bench's form, or of a set by its name.

    Raises FileNotFoundError or ValueError in one line.
    """
    if name not in HUB_SETS:
        file, first_turn = Path(name), None
        if not file.is_file():
            raise FileNotFoundError(f"--questions {name}: neither a file nor one of {', '.join(HUB_SETS)}")
    else:
        repository, path, first_turn = HUB_SETS[name]
        file = fetch(name, repository, path)
    questions = []
    for n, row in enumerate(rows_of(file), start=1):
        try:
            turns = row.get("turns") or row.get("prompt") if first_turn is None else [first_turn(row)]
            if not (isinstance(turns, list) and turns and all(isinstance(turn, str) and turn.strip() for turn in turns)):
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ValueError(f"{file}, line {n}: no question: MT-bench's form is {{\"question_id\", \"category\", \"turns\": [...]}}") \
                from None
        questions.append({"question_id": row.get("question_id", n), "category": row.get("category", name), "turns": turns})
    if len({q["question_id"] for q in questions}) != len(questions) or not questions:
        raise ValueError(f"{file}: {'two questions have the same question_id' if questions else 'it holds no question'}")
    return questions


def fetch(name: str, repository: str, path: str) -> Path:
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(repository, path, repo_type="dataset"))
    except (OSError, ValueError):   # whatever the network does, huggingface-hub raises as one of these
        raise FileNotFoundError(f"--questions {name}: {repository} cannot be fetched from the hub; give a file of JSON lines "
                                "{\"question_id\", \"category\", \"turns\": [...]} instead") from None


def rows_of(file: Path) -> Iterator[dict]:
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError("this set is a parquet file: pip install pyarrow, or give --questions a file") from None
        yield from pyarrow.parquet.read_table(file).to_pylist()
        return
    with open(file, encoding="utf-8") as lines:
        n = 0
        try:
            for n, line in enumerate(lines, start=1):
                if line.strip():
                    yield json.loads(line)
        except ValueError:      # of json, or of the encoding
            raise ValueError(f"{file} is not JSON lines: line {max(n, 1)}") from None


# Arms


def our_arms(args: argparse.Namespace, model: Transformer, head, tokenizer, trees: list[str], n_slot: int) -> dict[str, Arm]:
    """Plain decoding, and EAGLE with each tree, over the same weights and caches. "tuned" is the tree beside the head."""
    cli.setup_caches(model, head, 1, n_slot)
    sampling = cli.Sampling(args.temperature, args.top_k, args.top_p)
    decoders = {"plain": cli.Decoder(model, 1, sampling, compile=args.compile)}
    for spec in trees:
        label, spec = Path(spec).stem.replace(":", "-"), args.tree if spec == "tuned" else spec
        decoders["eagle-" + label] = cli.Decoder(model, 1, sampling, compile=args.compile, head=head, tree=load_tree(spec))

    def arm(decoder: cli.Decoder) -> Arm:
        def run(prompt: list[int], seed: int) -> Answer:
            result = decoder.generate([prompt], args.max_new_tokens, seed=seed, stop_ids=tokenizer.stop_ids)
            times = result.timings
            return Answer(result.tokens[0], len(result.tokens[0]), times["prefill_seconds"], times["decode_seconds"],
                          result.accept_lengths[0])
        return run

    return {name: arm(decoder) for name, decoder in decoders.items()}


def ask(question: dict, n: int, args: argparse.Namespace, targets: dict[str, Transformer], tokenizer, arms: dict[str, Arm],
        peers: dict, n_slot: int) -> dict[str, dict]:
    """What each arm answers: {"turns", "new_tokens", "tokens", ...}, each a list with an entry for every turn.

    targets: the plain arm of each format of the model -> the model
    """
    answers, messages = {}, []
    for turn, text in enumerate(question["turns"]):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(messages)
        if len(prompt) >= n_slot:
            if turn == 0:
                raise ValueError(f"question {question['question_id']} has {len(prompt)} tokens, which leaves no room in a context of "
                                 f"{n_slot}: see --max-seq-length")
            break
        order = list(arms)[n % len(arms):] + list(arms)[:n % len(arms)]     # nobody is always first
        given = {name: arms[name](prompt, args.seed + 1000 * n + turn if args.seed is not None else 0) for name in order}
        given |= {name: peer(prompt, max(2, len(given["plain"].tokens))) for name, peer in peers.items()}
        for name in (*arms, *peers):
            entry = turn_entry(given[name], prompt, tokenizer)
            if name in arms and name not in targets and args.temperature == 0:
                plain = report.plain_of(name, targets)
                entry["divergence"] = divergence(targets[plain], prompt, given[plain].tokens, given[name].tokens)
            for key, value in entry.items():
                answers.setdefault(name, {}).setdefault(key, []).append(value)
        messages.append({"role": "assistant", "content": tokenizer.decode(given["plain"].tokens)})
    return answers


def turn_entry(answer: Answer, prompt: list[int], tokenizer) -> dict:
    return {"turns": tokenizer.decode(answer.tokens).strip(), "new_tokens": len(answer.tokens),
            "wall_time": answer.prefill_seconds + answer.decode_seconds, "prompt_tokens": len(prompt), "tokens": answer.tokens,
            "timed_tokens": answer.timed_tokens, "prefill_seconds": answer.prefill_seconds,
            "decode_seconds": answer.decode_seconds, "accept_lengths": answer.accept_lengths}


def answer_line(question: dict, model_id: str, choice: dict) -> dict:
    return {"question_id": question["question_id"], "category": question["category"], "model_id": model_id,
            "answer_id": f"{model_id}-{question['question_id']}", "choices": [{"index": 0, **choice}], "tstamp": time.time()}


def progress(totals: dict[str, list], answers: dict[str, dict]) -> str:
    texts = []
    for name, (tokens, seconds) in totals.items():
        lengths = [n for steps in answers[name]["accept_lengths"] for n in steps]
        texts.append(f"{name} {tokens / seconds:.1f}" + (f" (accepts {sum(lengths) / len(lengths):.2f})"
                                                         if lengths and max(lengths) > 1 else ""))
    return "tokens/s: " + ", ".join(texts)


# Agreement


def divergence(model: Transformer, prompt: list[int], plain: list[int], other: list[int]) -> dict | None:
    """Where two answers part, and how far below the largest logit the lower of the two tokens lies there."""
    n = cli.common_prefix(plain, other)
    if n == min(len(plain), len(other)):
        return None if len(plain) == len(other) else {"position": n, "tokens": [], "gap": None}     # rounding cannot do that
    logits = last_logits(model, prompt + plain[:n])
    ids = [plain[n], other[n]]
    return {"position": n, "tokens": ids, "gap": (logits.max() - logits[ids].min()).item()}


def last_logits(model: Transformer, tokens: list[int]) -> torch.Tensor:
    """[V] fp32, what the target says after these tokens."""
    for _ in prefill(model, [tokens]):
        pass
    return logits_of(model, tokens, len(tokens) - 1)[0, -1].float()


def logits_of(model: Transformer, tokens: list[int], begin: int, end: int | None = None) -> torch.Tensor:
    """[1, T, V] of tokens[begin:end] in one pass, those before them being in the cache."""
    device = model.inv_freq.device
    pos = torch.arange(begin, end or len(tokens), device=device)[None]
    mask = causal_mask(pos, bucket(end or len(tokens), model.kv_cache.shape[4]))
    return model(torch.tensor([tokens[begin:end]], device=device), pos, mask=mask)[0]


def measure_rounding(model: Transformer, plain: Arm, tokenizer, questions: list[dict]) -> dict:
    """How much the largest logits of one and the same position differ between one-row passes and a pass over a block.

    Each of two logits may be off by logit_error, so rounding alone can turn their order up to a gap of twice that.
    """
    worst, n_position = 0.0, 0
    for question in questions[:ROUNDING_ANSWERS]:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": question["turns"][0]}])
        tokens = prompt + plain(prompt, 0).tokens[:-1]
        begin = len(prompt) - 1
        for _ in prefill(model, [prompt]):
            pass
        rows = torch.cat([logits_of(model, tokens, n, n + 1) for n in range(begin, len(tokens))], dim=1)
        block = logits_of(model, tokens, begin)
        top = block.topk(TOP_LOGITS).indices
        worst = max(worst, (rows.gather(-1, top).float() - block.gather(-1, top).float()).abs().max().item())
        n_position += len(tokens) - begin
    return {"logit_error": worst, "gap_bound": 2 * worst, "positions": n_position}


# Resuming


def resume(out: Path, run: dict) -> set:
    """Questions that every arm has answered; lines of others are taken out of the files.

    Raises ValueError when the folder holds answers of another model or of other settings.
    """
    (out / "answers").mkdir(parents=True, exist_ok=True)
    if not (out / "run.json").exists():
        return set()
    before = read_json(out / "run.json")
    for key in ("checkpoint", "eagle", "dtype", "device_name", "tree", "draft_mode", "also", "temperature", "top_k", "top_p", "question_set",
                "max_new_tokens", "arms", "torch"):
        if before.get(key) != run[key]:
            raise ValueError(f"{out} holds answers with {key} {before.get(key)!r}, now it is {run[key]!r}: give another --out")
    answers = report.read_answers(out, run["arms"])
    for arm, lines in answers.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(report.answers_file(out, arm), text)
    return {line["question_id"] for line in answers["plain"]}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description="Evaluate EAGLE beside plain decoding on a set of questions.")
    parser.add_argument("--questions", required=True, metavar="SET", help=f"{', '.join(HUB_SETS)}, or a file in MT-bench's form")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="answers and report (default: below results/)")
    parser.add_argument("--checkpoint", help="Hugging Face folder or hub id (default: the demo model)")
    parser.add_argument("--eagle", default="", metavar="HEAD", help="default: the head that ships for the checkpoint")
    parser.add_argument("--tree", nargs="+", default=["tuned"], metavar="TREE",
                        help="an arm for each; tuned, the default, is the one beside the head, or static")
    cli.add_draft_options(parser)
    parser.add_argument("--also", nargs="+", default=[], metavar="CHECKPOINT", help="the same model in other formats, such as int4: arms too")
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="the first N questions only")
    parser.add_argument("--max-new-tokens", type=number(int, 2), default=1024, metavar="N", help="of a turn")
    parser.add_argument("--max-seq-length", type=number(int, 2), default=4096, metavar="N", help="cache slots, within the context")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, metavar="X")
    parser.add_argument("--top-k", type=number(int, 1), metavar="N")
    parser.add_argument("--top-p", type=number(float, 0, 1, open_low=True), metavar="X")
    parser.add_argument("--seed", type=number(int, 0), default=0, metavar="N")
    parser.add_argument("--peers", action="store_true", help="transformers and llama.cpp on the same prompts and token counts")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama.cpp")
    cli.add_chat_options(parser)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    parser.set_defaults(command=shlex.join(["python", "scripts/evaluate.py", *argv]))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
