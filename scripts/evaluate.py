"""Answer a set of questions plainly and with EAGLE, in turn, and report speed, accepted length and agreement.

    python scripts/evaluate.py --questions mt_bench --checkpoint lmsys/vicuna-7b-v1.3 --eagle FOLDER
    python scripts/evaluate.py --questions mt_bench --limit 10 --tree chain:4 static --peers    # the demo model
    torchrun --nproc-per-node 4 scripts/evaluate.py ...     # a target of several GPUs; rank 0 writes

docs/evaluation.md has more commands and says what the figures mean.

As the papers measure (EAGLE, arXiv 2401.15077, section 4): batch 1, chat template, every turn. An arm is a way to
decode. All arms take turns at every question, so that a drifting clock or a busy neighbour hits all alike. The turns
after the first continue plain decoding's answer, whatever the arm, so that all arms meet the same prompts.

--out gets answers/ARM.jsonl, FastChat's answer lines with what was measured beside each turn, questions.jsonl,
run.json, and from them scripts/report.py's report.json, report.md, report.html and report.png; with --page also
pages/QUESTION.html, what each step of the drafting arms did. The same command goes on after an interruption, and
gives the answers that an undisturbed run gives.

Shapes: V vocabulary.
"""
import argparse
import contextlib
import datetime
import hashlib
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import root  # noqa: F401
import generate as cli
import tp
from benchmarks.timing import environment
from chat import encode, opening
from checkpoint import read_json, resolve_checkpoint
from console import Parser, add_chat_options, check_writable, command, is_text, launched, number, say, write_atomically
from decoder import Decoder, not_finite, setup_caches, tree_of
from draft_tree import Tree
from eagle_head import EagleHead
from masks import causal_mask
from model import Transformer, prefill
from page import page_answer, write_page
from sampling import Sampling
from scripts.figures import answers_file, plain_of, read_answers
from scripts.peers import DRAFTING_PEERS, Answer, Peer, find_peers
from scripts.questions import HUB_SETS, choose, read_questions
from scripts.report import write_report
from scripts.report_page import page_name
from scripts.tables import arm_of_tree
from tokenizer import Tokenizer, common_prefix
from train_features import target_stamp

TOP_LOGITS = 10     # the largest, on which rounding is measured


@command(stopped="stopped; the same command goes on from here", in_ranks=True)
@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    check_options(args)
    every = tp.on_rank_0(lambda: read_questions(args.questions))
    trees, args.tree = args.tree, None
    model, head, tokenizer, run = cli.load(args)
    assert head is not None     # --eagle has a default
    n_slot = min(args.max_seq_length, model.config.block_size)
    target, name = Path(args.checkpoint).name, Path(args.questions).stem
    args.out = args.out or Path("results") / f"{target}-{name}-T{args.temperature:g}"
    arms = our_arms(args, model, head, tokenizer, trees, n_slot)
    stamps = {"target": stamp_of(args.checkpoint), "head": stamp_of(args.eagle), "trees": tree_digest(arms),
              "draft_vocab": None if head.draft_ids is None else digest(head.draft_ids.tolist()),
              "questions": digest(every), "template": tokenizer.template_digest}
    also = {Path(folder).name.removeprefix(f"{target}-"): folder for folder in args.also}
    for label, folder in also.items():
        its_args = argparse.Namespace(**vars(args) | {"checkpoint": folder, "tree": None})
        its_arms = our_arms(its_args, *cli.load(its_args)[:2], tokenizer, trees, n_slot)
        arms |= {f"{label}-{arm}": its_arms[arm] for arm in its_arms}
        stamps |= {f"target {label}": stamp_of(folder), f"trees {label}": tree_digest(its_arms)}
    peers, absent = find_peers(resolve_checkpoint(args.checkpoint), model.inv_freq.device, getattr(torch, args.dtype),
                               n_slot, args.gguf) if args.peers else ({}, [])
    drafting = [arm for arm in arms if arms[arm].tree is not None] + [peer for peer in peers if peer in DRAFTING_PEERS]
    run |= environment(model.inv_freq.device, args.command) | {
        "question_set": name, "max_new_tokens": args.max_new_tokens, "max_seq_length": n_slot, "tree": trees,
        "also": list(also) or None, "system": args.system, "arms": [*arms, *peers], "absent": absent,
        "label": args.out.name, "drafting": drafting, "stamps": stamps, "template_date": None,
        "page": args.page or None, **{name: getattr(args, name) for name in DRAFTING}}
    done, run = tp.on_rank_0(lambda: resume(args.out, run, tokenizer))
    if run["template_date"] is not None:
        tokenizer.date = datetime.datetime.fromisoformat(run["template_date"])
    questions, run["left_out"] = leave_out(choose(every, args.limit), args.system, tokenizer, n_slot)
    if not questions:
        raise ValueError(f"no question of {args.questions} leaves room for an answer in a context of {n_slot}: "
                         "see --max-seq-length")
    cli.say_head(head)
    answer_all(questions, done, run, args, lambda question: ask(question, args, tokenizer, arms, peers, n_slot))
    if tp.writes():
        made = write_report(args.out)
        print((args.out / "report.md").read_text())
        say(f"wrote {made['questions']} questions' answers and the report to {args.out}")
        if args.exact:
            check_exact(made["overall"])


def check_exact(overall: dict[str, dict]) -> None:
    """Raise ValueError if an answer differs from plain decoding's: the bits were not equal."""
    for arm, figures in overall.items():
        if parted := figures.get("divergences"):
            first = parted[0]
            raise ValueError(f"--exact: {len(parted)} answers of {arm} differ from plain decoding's. The first: "
                             f"question {first['question_id']}, turn {first['turn'] + 1}, token "
                             f"{first['position'] + 1}, tokens "
                             f"{first['tokens']} with logits {first['logits']} in the plain pass")


def check_options(args: argparse.Namespace) -> None:
    if args.peers and args.temperature > 0:
        raise ValueError("--peers decode greedily: they need --temperature 0")
    if args.peers and launched():
        raise ValueError("--peers run in one process: leave them out under torchrun")
    if args.gguf is not None and not args.peers:
        raise ValueError("--gguf needs --peers")
    if args.gguf is not None and not args.gguf.is_file():
        raise ValueError(f"--gguf {args.gguf}: no such file")
    if not is_text(args.system):
        raise ValueError("--system is not UTF-8 text")


def stamp_of(checkpoint: str) -> str:
    return tp.on_rank_0(lambda: target_stamp(resolve_checkpoint(checkpoint)))


def tree_digest(arms: "dict[str, Arm]") -> str:
    return digest([str(arm.tree) for arm in arms.values()])


def digest(value: object) -> str:
    """sha256 of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def leave_out(questions: list[dict], system: str | None, tokenizer: Tokenizer,
              n_slot: int) -> tuple[list[dict], list[dict]]:
    """The questions whose first turn leaves room for an answer, and {"question_id", "prompt_tokens"} of the others."""
    kept, left_out = [], []
    for question in questions:
        n = len(encode(question["turns"][0], tokenizer, raw=False, system=system))
        if n < n_slot:
            kept.append(question)
        else:
            left_out.append({"question_id": question["question_id"], "prompt_tokens": n})
            say(f"question {question['question_id']} has {n} tokens, which leaves no room in a context of {n_slot}: "
                "left out")
    return kept, left_out


def answer_all(questions: list[dict], done: set, run: dict, args: argparse.Namespace,
               ask: Callable[[dict], tuple[dict[str, dict], list[dict]]]) -> None:
    """Ask what has not been answered yet; write each question's answers as they come."""
    todo = [question for question in questions if question["question_id"] not in done]
    totals = {name: [0, 0.0] for name in run["arms"]}
    with tqdm(todo, unit=" questions", initial=len(done), total=len(questions), disable=None) as bar:
        for question in bar:
            answers, shown = ask(question)
            if question is todo[0] and tp.writes():  # not before: a run that fails at once leaves nothing
                (args.out / "answers").mkdir(parents=True, exist_ok=True)
                write_atomically(args.out / "run.json", json.dumps(run, indent=1) + "\n")
                write_atomically(args.out / "questions.jsonl", json_lines(questions))
            if shown and tp.writes():   # before its answers: a question that is done has its page
                show_question(args.out, question, run, shown)
            for name, lines in answers.items():
                if tp.writes():
                    append_answer(args.out, name, question, f"{run['label']}-{name}", lines)
                totals[name][0] += sum(lines["timed_tokens"])
                totals[name][1] += sum(lines["decode_seconds"])
            bar.set_postfix_str(progress(totals, answers, run["drafting"]))


def show_question(out: Path, question: dict, run: dict, shown: list[dict]) -> None:
    """Write pages/QUESTION.html, the recorded answers of a question."""
    (out / "pages").mkdir(exist_ok=True)
    facts = {"category": question["category"], "checkpoint": cli.short_name(run["checkpoint"]),
             "head": cli.short_name(run["eagle"]), "also in": ", ".join(run["also"] or []) or None,
             "dtype": run["dtype"], "temperature": run["temperature"], "device": run["device_name"],
             "commit": run["commit"]}
    title = f"Question {question['question_id']} of {run['question_set']}"
    write_page(out / "pages" / page_name(question["question_id"]), title, facts, shown)


def json_lines(questions: list[dict]) -> str:
    """Questions in MT-bench's form, as --questions takes them."""
    return "".join(json.dumps({key: q[key] for key in ("question_id", "category", "turns")}, ensure_ascii=False) + "\n"
                   for q in questions)


# Arms


class Arm:
    """A way to decode: plainly, or by EAGLE with a tree."""

    def __init__(self, decoder: Decoder, max_new_tokens: int, stop_ids: frozenset[int]):
        self.decoder, self.max_new_tokens, self.stop_ids = decoder, max_new_tokens, stop_ids
        self.tree: Tree | None = decoder.eagle and decoder.eagle.tree

    def __call__(self, prompt: list[int], seed: int) -> Answer:
        result = self.decoder.generate([prompt], self.max_new_tokens, seed=seed, stop_ids=self.stop_ids)
        times = result.timings
        return Answer(result.tokens[0], len(result.tokens[0]) - 1, times["prefill_seconds"], times["decode_seconds"],
                      result.accept_lengths[0], result.copied[0], list(result.kinds),
                      result if self.decoder.recorder else None)

    def logits_before(self, prompt: list[int], answer: Answer, n: int) -> Tensor:
        """[V] fp32, what the target says at the answer's token n, in passes over as many rows as this arm made.

        These are the target's own passes, by position: nothing of how a step drafts, verifies or moves keys has a
        part in them. Each pass leaves its cache to the next, as in decoding. Rows past the place repeat the last token,
        and a tree's accepted path stands in front; no row sees a later one.
        """
        model, decoder, step = self.decoder.model, self.decoder, self.decoder.eagle
        text, begin = prompt + answer.tokens[:n], len(prompt) + 1
        with torch.compiler.set_stance("force_eager") if decoder.compile else contextlib.nullcontext():
            *_, last = prefill(model, [prompt])
            logits = model.output(last.hidden[:, -1:])
        place = 0           # of the wanted logits in the pass
        for kind, length in zip(answer.kinds, answer.accept_lengths):
            if n == 0:
                break
            n_row = 1 if step is None or kind == "plain" else step.tree.n_node + (kind == "copy") * step.tree.n_copy
            rows = text[begin - 1:begin - 1 + n_row]
            ids = torch.tensor([rows + rows[-1:] * (n_row - len(rows))], device=model.inv_freq.device)
            pos = torch.arange(begin - 1, begin - 1 + n_row, device=ids.device)[None]
            logits, _ = model(ids, pos, mask=causal_mask(pos, decoder._n_slot(kind, begin)))
            place = len(text) - begin
            if begin + length > len(text):
                break
            begin += length
        whole = logits if torch.is_tensor(logits) else logits.full()   # each rank has a part of the vocabulary
        return whole[0, place].float()


def our_arms(args: argparse.Namespace, model: Transformer, head: EagleHead | None, tokenizer: Tokenizer,
             trees: list[str], n_slot: int) -> dict[str, Arm]:
    """Plain decoding, and each spec of --tree, over the same weights and caches."""
    setup_caches(model, head, 1, n_slot)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    decoders = {"plain": Decoder(model, 1, sampling, compile=args.compile)}
    for spec in trees:
        name, _, copy = spec.partition("+")
        own_head, name = None if name == "none" else head, args.tree if name == "tuned" else name
        n_copy = cli.copy_length(copy) if copy else cli.copy_length_of(name) if args.copy is None else args.copy
        tree = tree_of(name, n_copy, own_head)
        decoders[arm_of_tree(spec)] = Decoder(model, 1, sampling, compile=args.compile, head=own_head, tree=tree,
                                              record=args.page and tree is not None)
    return {name: Arm(decoder, args.max_new_tokens, tokenizer.stop_ids) for name, decoder in decoders.items()}


def ask(question: dict, args: argparse.Namespace, tokenizer: Tokenizer, arms: dict[str, Arm], peers: dict[str, Peer],
        n_slot: int) -> tuple[dict[str, dict], list[dict]]:
    """What each arm answers: {"turns", "new_tokens", "tokens", ...}, each a list with an entry for every turn. And what
    the page shows of the answers that were recorded. The last turns are missing where the conversation has filled its
    context."""
    answers, shown, messages, place = {}, [], opening(args.system), question["place"]
    for turn, text in enumerate(question["turns"]):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer.apply_chat_template(messages)
        if len(prompt) >= n_slot:
            say(f"question {question['question_id']}: turn {turn + 1} comes to {len(prompt)} tokens, which leaves no "
                f"room in a context of {n_slot}: not asked")
            break
        given = {}
        for name in order_of([*arms], [*peers], place):
            if name in arms:
                given[name] = arms[name](prompt, (args.seed + 1000 * place + turn) % 2 ** 63)
            else:
                given[name] = peers[name](prompt, max(2, len(given["plain"].tokens)))
        for name in (*arms, *peers):
            entry = turn_entry(given[name], prompt, tokenizer)
            if (recorded := given[name].recorded) is not None:
                shown.append(page_answer(f"{name}, turn {turn + 1}", text, recorded, 0, tokenizer))
            plain = plain_of(name, arms)
            if name in arms and name != plain and args.temperature == 0:
                entry["divergence"] = divergence(arms[plain], arms[name], prompt, given[plain], given[name])
            for key, value in entry.items():
                answers.setdefault(name, {}).setdefault(key, []).append(value)
        messages.append({"role": "assistant", "content": tokenizer.decode(given["plain"].tokens)})
    return answers, shown


def order_of(arms: list[str], peers: list[str], place: int) -> list[str]:
    """Who decodes when: another begins at each question. Peers come after plain, whose answer tells them how long."""
    names = arms + peers
    order = names[place % len(names):] + names[:place % len(names)]
    first_peer = next((order.index(name) for name in order if name in peers), len(order))
    if order.index("plain") > first_peer:
        order.remove("plain")
        order.insert(first_peer, "plain")
    return order


def turn_entry(answer: Answer, prompt: list[int], tokenizer: Tokenizer) -> dict:
    entry = {"turns": tokenizer.decode(answer.tokens).strip(), "new_tokens": len(answer.tokens),
             "wall_time": answer.prefill_seconds + answer.decode_seconds, "prompt_tokens": len(prompt)}
    return entry | {key: value for key, value in answer._asdict().items() if key not in ("kinds", "recorded")}


def append_answer(out: Path, arm: str, question: dict, model_id: str, choice: dict) -> None:
    line = {"question_id": question["question_id"], "category": question["category"], "model_id": model_id,
            "answer_id": f"{model_id}-{question['question_id']}", "choices": [{"index": 0, **choice}],
            "tstamp": time.time(), "turns_not_asked": len(question["turns"]) - len(choice["turns"])}
    with open(answers_file(out, arm), "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def progress(totals: dict[str, list], answers: dict[str, dict], drafting: list[str]) -> str:
    texts = []
    for name, (tokens, seconds) in totals.items():
        lengths = [n for steps in answers[name]["accept_lengths"] for n in steps]
        accepts = f" (accepts {sum(lengths) / len(lengths):.2f})" if name in drafting and lengths else ""
        texts.append(f"{name} {tokens / seconds:.1f}{accepts}")
    return "tokens/s: " + ", ".join(texts)


# Agreement


def divergence(plain_arm: Arm, arm: Arm, prompt: list[int], plain: Answer, other: Answer) -> dict | None:
    """Where two answers first differ, and whether rounding can have done it.

    gap     how far below the largest logit of the plain arm's pass the lower of the two tokens lies there
    error   how much the largest logits, and those of the two tokens, differ there between the passes of the two arms.
            Each logit may be off by as much, so rounding can swap two tokens up to a gap of twice the error
    """
    n = common_prefix(plain.tokens, other.tokens)
    if n == min(len(plain.tokens), len(other.tokens)):  # rounding cannot do that
        same = len(plain.tokens) == len(other.tokens)
        return None if same else {"position": n, "tokens": [], "logits": [], "gap": None, "error": None}
    ids = [plain.tokens[n], other.tokens[n]]
    one, block = plain_arm.logits_before(prompt, plain, n), arm.logits_before(prompt, other, n)
    if not (one.isfinite().all() and block.isfinite().all()):
        raise ValueError(not_finite(plain_arm.decoder.model.norm.weight.dtype, 0, n))
    shown = [*one.topk(TOP_LOGITS).indices.tolist(), *ids]
    return {"position": n, "tokens": ids, "logits": one[ids].tolist(), "gap": (one.max() - one[ids].min()).item(),
            "error": (one[shown] - block[shown]).abs().max().item()}


# Resuming


DRAFTING = ("copy", "exact", "draft_window", "aux_layers", "draft_rope_theta")     # a run is bound to these too
SETTINGS = ("checkpoint", "eagle", "dtype", "device_name", "threads", "torch", "compiled", "tree", "draft_mode",
            *DRAFTING, "also", "system", "temperature", "top_k", "top_p", "seed", "question_set", "max_new_tokens",
            "max_seq_length", "arms", "page")


def resume(out: Path, run: dict, tokenizer: Tokenizer) -> tuple[set, dict]:
    """The questions that every arm has answered, and the run that goes on, with the first run's date for the template.

    Lines of other questions are taken out of the files. Raises ValueError when the folder holds answers of another
    model or of other settings.
    """
    def refuse(what: str) -> None:
        raise ValueError(f"{out} holds answers {what}: give another --out")

    check_writable("--out", out, is_folder=True)
    if tokenizer.uses_date:
        run = run | {"template_date": (tokenizer.date or datetime.datetime.now()).isoformat()}
    if not (out / "run.json").exists():
        return set(), run
    before = read_json(out / "run.json")
    for key in SETTINGS:
        if before.get(key) != run[key]:
            refuse(f"with {key} {before.get(key)!r}, now it is {run[key]!r}")
    stamps = before.get("stamps", {})
    for key in sorted(run["stamps"] | stamps):
        if stamps.get(key) != run["stamps"].get(key):
            refuse(f"of another {key.replace('_', ' ')}, which has changed")
    if tokenizer.date is not None and before["template_date"] != run["template_date"]:
        refuse(f"with the date {before['template_date']}, not {run['template_date']}")
    answers = read_answers(out, run["arms"])
    for arm, lines in answers.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(answers_file(out, arm), text)
    commit = before["commit"]
    if str(commit).split(", then ")[-1] != str(run["commit"]):
        commit = f"{commit}, then {run['commit']}"
    done = {line["question_id"] for line in answers["plain"]}
    return done, run | {"template_date": before["template_date"], "commit": commit}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(description="Evaluate EAGLE beside plain decoding on a set of questions.")
    parser.add_argument("--questions", required=True, metavar="SET",
                        help=f"{', '.join(HUB_SETS)}, or a file in MT-bench's form")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="answers and report (default: below results/)")
    parser.add_argument("--checkpoint", help="Hugging Face folder, GGUF file or hub id (default: the demo model)")
    parser.add_argument("--eagle", default="", metavar="HEAD", help="default: the head that ships for the checkpoint")
    parser.add_argument("--tree", nargs="+", default=["tuned"], metavar="TREE",
                        help="an arm for each; tuned, the default, is the one beside the head, or static; none is no "
                        "head. TREE+N and TREE+off: with a copied branch of this length, without")
    cli.add_draft_options(parser)
    cli.add_copy_option(parser)
    cli.add_exact_option(parser)
    parser.add_argument("--also", nargs="+", default=[], metavar="CHECKPOINT",
                        help="the same model in other formats, such as int4: arms too")
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="N questions, evenly over the categories")
    parser.add_argument("--max-new-tokens", type=number(int, 2), default=1024, metavar="N", help="of a turn")
    parser.add_argument("--max-seq-length", type=number(int, 2), default=4096, metavar="N",
                        help="cache slots, within the context")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, metavar="X")
    parser.add_argument("--top-k", type=number(int, 1), metavar="N")
    parser.add_argument("--top-p", type=number(float, 0, 1, open_low=True), metavar="X")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), default=0, metavar="N")
    parser.add_argument("--peers", action="store_true", help="transformers and llama.cpp on the same prompts")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same model for llama.cpp")
    parser.add_argument("--system", metavar="TEXT", help="a system message in front of each question")
    parser.add_argument("--page", action="store_true", help="write pages/QUESTION.html: what each step of our drafting "
                        "arms did. Recording takes a little of their time; run.json says so")
    add_chat_options(parser)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    parser.set_defaults(command=shlex.join(["python", "scripts/evaluate.py", *argv]))
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(tp.run(main, parse_args()))
