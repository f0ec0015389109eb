"""Generate text: python generate.py --prompt "Why is the sky blue?"

    python generate.py                                                     # the demo model, fetched on first use
    python generate.py --checkpoint lmsys/vicuna-7b-v1.3 --prompt "Hi" "Name three birds."           # a batch of two
    python generate.py --checkpoint FOLDER --prompt-file question.txt --temperature 0.7 --top-p 0.9 --seed 1
    python generate.py --interactive                                       # chat; Ctrl-C ends an answer, Ctrl-D leaves
    python generate.py --eagle --page steps.html                           # what each step did, to look at
    python generate.py --checkpoint lmsys/vicuna-7b-v1.3 --eagle yuhuili/EAGLE-Vicuna-7B-v1.3 --tree dynamic

The answer goes to stdout as it is generated, everything else to stderr. On a GPU each decode step is one captured CUDA
graph of compiled layers. On a CPU it is a trace over weights packed for oneDNN, made in a fraction of a second.
"""
import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

import tp
from chat import Conversation, Printer, StopTexts, encode
from checkpoint import demo_checkpoint, quantize_settings, read_ids, read_json, resolve_checkpoint
from console import (Parser, add_chat_options, check_writable, command, device_name, is_text, launched, number,
                     pick_device, read_text, say, whole_or_nothing, write_atomically)
from decoder import Decoder, check_prompts, setup_caches, slots_for
from decoder import Generation as Generation    # `from generate import generate, Generation`
from decoder import generate as generate
from decoder import tree_of
from draft_tree import load_tree, named_tree
from eagle_head import Eagle3Head, EagleHead
from exact import make_exact
from grid import Format
from linears import quantize_in_place
from model import Transformer
from page import TEMPLATE, page_answer, write_page
from rope import keys_serve
from runtime import is_faster_in_float32, pack_for_cpu, tune
from sampling import Sampling
from terminal import chat
from tokenizer import Tokenizer

DEFAULT_PROMPT = "Why is the sky blue?"
N_COPY = 8      # length of the copied branch beside a tree that no file describes


@command(in_ranks=True)
def main(args: argparse.Namespace) -> None:
    check_options(args)
    args.texts = None if args.interactive else read_prompts(args)
    args.record = args.page is not None    # in all processes, though one of them writes the page
    model, head, tokenizer, report = load(args)
    args.copy = copy_length_of(args.tree) if args.copy is None else args.copy
    (converse if args.interactive else answer)(args, model, head, tokenizer, report)


def check_options(args: argparse.Namespace) -> None:
    """Refuse at the start options that would have no effect, or would fail only after the work is done."""
    for name, value in (("--tree", args.tree), ("--draft-vocab", args.draft_vocab), ("--draft-mode", args.draft_mode),
                        ("--draw-drafts", args.draw_drafts), ("--draft-window", args.draft_window),
                        ("--aux-layers", args.aux_layers), ("--draft-rope-theta", args.draft_rope_theta)):
        if value is not None and args.eagle is None:
            raise ValueError(f"{name} needs --eagle")
    if args.draw_drafts and args.temperature == 0:
        raise ValueError("--draw-drafts needs a --temperature above 0")
    for name, value in (("--system", args.system), ("--template-args", args.template_args),
                        ("--plain-text", args.plain_text or None)):
        if value is not None and args.raw:
            raise ValueError(f"{name} needs a chat template: it does not go with --raw")
    for name, value in (("--prompt", args.prompt), ("--system", args.system), ("--stop", args.stop)):
        if not is_text(value):
            raise ValueError(f"{name} is not UTF-8 text")
    if "" in args.stop:
        raise ValueError("--stop '': a stop text is empty")
    option_of = {}
    for name, file in (("--json", args.json), ("--profile", args.profile), ("--page", args.page)):
        if file is None:
            continue
        if args.interactive:
            raise ValueError(f"{name} does not go with --interactive")
        check_writable(name, file)
        if file in option_of:
            raise ValueError(f"{option_of[file]} and {name} name the same file")
        option_of[file] = name
    if args.page is not None and args.page.resolve() == TEMPLATE:
        raise ValueError(f"--page {args.page}: that is the page's own template, name another file")
    if args.interactive and (args.prompt or args.prompt_file or args.raw):
        raise ValueError("--interactive reads chat turns from the terminal: no --prompt, --prompt-file or --raw")
    if args.interactive and sys.stdin is None:
        raise ValueError("--interactive reads chat turns from standard input, which is closed")
    if args.interactive and launched():
        raise ValueError("--interactive runs in one process: under torchrun give --prompt or --prompt-file")


def read_prompts(args: argparse.Namespace) -> list[str]:
    if args.prompt and args.prompt_file:
        raise ValueError("give --prompt or --prompt-file, not both")
    texts = args.prompt or [DEFAULT_PROMPT]
    if args.prompt_file:
        text = read_text(args.prompt_file)
        texts = [text if args.raw else text.rstrip("\n")]    # a file's last line end is not part of a question
    for text in texts:
        if not text.strip():
            raise ValueError("the prompt is empty")
    return texts


def load(args: argparse.Namespace) -> tuple[Transformer, EagleHead | None, Tokenizer, dict]:
    """Model, head, tokenizer, and the first fields of the JSON report. Sets options whose defaults depend on them."""
    start = time.perf_counter()
    device = pick_device(args.device)
    if args.checkpoint is None:
        args.checkpoint = str(demo_checkpoint())
    tokenizer = Tokenizer.from_pretrained(args.checkpoint, chat_template=args.chat_template,
                                          template_args=args.template_args)
    say_not_applied(read_json(resolve_checkpoint(args.checkpoint, weights=False) / "generation_config.json", absent={}))
    shard = tp.Shard.world() if launched() else None
    if shard is not None and device.type == "cuda":
        tp.check_memory(args.checkpoint, shard.size, torch.cuda.get_device_properties(device).total_memory)
    model = Transformer.from_pretrained(args.checkpoint, device, getattr(torch, args.dtype), shard,
                                        choose_kernels=device.type == "cuda" or args.exact is False)
    head, args.tree = load_head(args, model, shard) if args.eagle is not None else (None, None)
    args.compile = model.inv_freq.is_cuda if args.compile is None else args.compile
    if not args.compile:  # the compiler brings kernels of its own
        pack_for_cpu(model)
        if head is not None:
            pack_for_cpu(head)
    args.exact = settle_exact(args, model)
    if args.seed is None and args.temperature > 0:
        args.seed = torch.seed() % 2 ** 31
    if shard is not None:
        args.seed = tp.on_rank_0(lambda: args.seed)
        if shard.rank > 0:  # rank 0 writes these files
            args.json = args.profile = args.page = None
    seconds = time.perf_counter() - start
    return model, head, tokenizer, {
        "checkpoint": args.checkpoint, "eagle": args.eagle, "device": str(device), "device_name": device_name(device),
        "dtype": args.dtype, "torch": torch.__version__, "compiled": args.compile, "tree": args.tree,
        "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "seed": args.seed,
        "load_seconds": seconds, "exact": args.exact,
    } | ({} if head is None else {"draft_mode": args.draft_mode})


def settle_exact(args: argparse.Namespace, model: Transformer) -> bool:
    """Whether plain decoding and EAGLE compute the same bits: by default wherever that is known to hold."""
    if args.exact is False:
        return False
    is_cuda = model.inv_freq.is_cuda
    try:
        if args.compile and not is_cuda:
            raise ValueError("--exact does not go with --compile")
        make_exact(model)
        return True
    except ValueError:
        if args.exact:
            raise
    if not is_cuda:     # there the kernels are chosen already
        tune(model)
    return False


# Keys of generation_config.json that change which tokens are chosen, and their values without effect.
NEUTRAL = dict(repetition_penalty=1, no_repeat_ngram_size=0, bad_words_ids=[], suppress_tokens=[],
               begin_suppress_tokens=[], sequence_bias={}, exponential_decay_length_penalty=[], min_length=0,
               min_new_tokens=0, guidance_scale=1, penalty_alpha=0, num_beams=1, typical_p=1, min_p=0)


def say_not_applied(generation_config: dict) -> None:
    """Name on stderr what generation_config.json asks for but this decoder does not do."""
    asked = [f"{key} {value}" if isinstance(value, (int, float)) else key for key, neutral in NEUTRAL.items()
             if (value := generation_config.get(key)) not in (None, neutral, [])]
    if asked:
        say(f"generation_config.json asks for {', '.join(asked)}: not applied")


def load_head(args: argparse.Namespace, model: Transformer, shard: tp.Shard | None = None) -> tuple[EagleHead, str]:
    """The head, and its tree as `load_tree` takes it. Defaults are draft_vocab.json and tree.json in the head's folder.

    Without tree.json it is the paper's static tree, or on a GPU with an EAGLE-3 head 8 levels and 60 nodes.
    `--eagle` without a value means the head that ships for this target: its config.json names the `target`.
    """
    if args.eagle == "":
        args.eagle = shipped_head(args.checkpoint)
    folder = resolve_checkpoint(args.eagle)
    head = EagleHead.from_pretrained(folder, target=model, shard=shard, aux_layers=args.aux_layers,
                                     rope_theta=args.draft_rope_theta)
    head.window = args.draft_window
    vocab = args.draft_vocab or str(folder / "draft_vocab.json")
    if args.draft_vocab not in (None, "off") or (args.draft_vocab is None and Path(vocab).exists()):
        head.set_draft_vocab(load_draft_vocab(vocab, folder))
    quantize_head(args, head, is_stored=bool(quantize_settings(folder)), is_sharded=shard is not None)
    default = "dynamic:8,10,60" if head.kind == "eagle3" and head.inv_freq.is_cuda else "static"
    tree = next(filter(Path.exists, (folder / tree_name(args.checkpoint), folder / "tree.json")), default)
    return head, args.tree or str(tree)


def shipped_head(checkpoint: str) -> str:
    """The folder under heads/ whose config.json names this checkpoint, or the one it was quantised from, as `target`.

    Only the last parts of the names are compared. Raises FileNotFoundError if there is none.
    """
    folder = resolve_checkpoint(checkpoint, weights=False)
    source = quantize_settings(folder).get("source", "")
    names = {Path(checkpoint).name, folder.resolve().name, Path(str(source)).name} - {""}
    for file in sorted((Path(__file__).resolve().parent / "heads").glob("*/config.json")):
        if str(read_json(file).get("target", "")).split("/")[-1] in names:
            return str(file.parent)
    raise FileNotFoundError(f"no head ships for {checkpoint}: name one, --eagle HEAD")


def load_draft_vocab(spec: str, folder: Path) -> list[int]:
    """Token ids, likeliest first. spec is a file (see read_ids), or N: the first N of the head's draft_vocab.json."""
    count = int(spec) if spec.isdigit() else None
    file = folder / "draft_vocab.json" if count is not None else Path(spec)
    ids = read_ids(file)
    if count == 0:
        raise ValueError("a draft vocabulary of 0 tokens drafts nothing")
    return ids[:count]


def quantize_head(args: argparse.Namespace, head: EagleHead, is_stored: bool, is_sharded: bool) -> None:
    """Round the head's weights as --draft-mode says. Drafts change a little, the output does not.

    The default, int4 on a CPU in bf16, costs 0.5% of the accepted length and gains 2 to 6% of the speed (dev/log.md).
    """
    if args.draft_mode is None:
        weight = head.target.norm.weight
        pays = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not args.compile
        fits = all(linear.in_features % 32 == 0 for linear in head.modules() if isinstance(linear, torch.nn.Linear))
        args.draft_mode = "int4" if pays and fits and not (is_stored or is_sharded) else "off"
    if args.draft_mode != "off":
        if is_stored or is_sharded:
            why = "this head is quantised already" if is_stored else "under torchrun a head is quantised by quantize.py"
            raise ValueError(f"--draft-mode {args.draft_mode}: {why}")
        quantize_in_place(head, Format(args.draft_mode, 32 if args.draft_mode == "int4" else None))
        tune(head)


def tree_name(checkpoint: str) -> str:
    """The tree's file in a head's folder. A quantised target has its own, as a block of rows costs it more time."""
    mode = quantize_settings(resolve_checkpoint(checkpoint, weights=False)).get("mode")
    return f"tree-{mode}.json" if mode else "tree.json"


def say_head(head: EagleHead | None) -> None:
    """What an EAGLE-3 head's file was taken to mean. Called after all that may be wrong with the options."""
    if isinstance(head, Eagle3Head):
        say(head.spec.describe())


def say_loaded(report: dict, head: EagleHead | None) -> None:
    say_head(head)
    if head is not None and not report["compiled"] and is_faster_in_float32(head):
        say("this CPU has no bf16 instructions: EAGLE is faster here with --dtype float32, for twice the memory")
    say("loaded {checkpoint} in {load_seconds:.1f} s ({device}, {dtype})".format(**report))


def converse(args: argparse.Namespace, model: Transformer, head: EagleHead | None, tokenizer: Tokenizer,
             report: dict) -> None:
    """Chat on the terminal."""
    n_slot = args.max_seq_length or min(model.config.block_size, 8192)
    talk = Conversation(args, tokenizer, n_slot, model.config.vocab_size, functools.partial(keys_serve, model.config))
    talk.render("Hi")       # fails now for a chat template that is missing or broken, or a --system that is too long
    decoder = make_decoder(args, model, head, 1, n_slot)
    say_loaded(report, head)
    chat(talk, decoder)


def make_decoder(args: argparse.Namespace, model: Transformer, head: EagleHead | None, batch_size: int,
                 n_slot: int, record: bool = False) -> Decoder:
    setup_caches(model, head, batch_size, n_slot)
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    return Decoder(model, batch_size, sampling, compile=args.compile, head=head,
                   tree=tree_of(args.tree, args.copy, head), draw_drafts=args.draw_drafts, record=record)


def answer(args: argparse.Namespace, model: Transformer, head: EagleHead | None, tokenizer: Tokenizer,
           report: dict) -> None:
    """Answer the prompts of the command line, all in one batch."""
    prompts = [encode(text, tokenizer, args.raw, args.system, args.plain_text) for text in args.texts]
    longest = max(map(len, prompts)) + args.max_new_tokens
    tree = tree_of(args.tree, args.copy, head)
    n_slot = args.max_seq_length or slots_for(longest + (0 if tree is None else tree.n_room), model)
    check_prompts(prompts, n_slot, model.config.vocab_size)
    decoder = make_decoder(args, model, head, len(prompts), n_slot, args.record)
    say_loaded(report, head)

    stop = StopTexts(tokenizer, args.stop, goes_on=args.raw)
    printer = Printer(stop, prompts, decoder if args.color else None)
    with profiler(args.profile):
        result = decoder.generate(prompts, args.max_new_tokens, seed=args.seed, stop_ids=tokenizer.stop_ids, stop=stop,
                                  on_tokens=printer)
    printer.close()

    times, n_new = result.timings, sum(map(len, result.tokens))
    say(f"{n_new} tokens in {times['decode_seconds']:.2f} s: {result.tokens_per_second:.1f} tokens/s"
        + ("" if head is None else f", {result.mean_accept_length:.2f} tokens per target pass") +
        f" (prompt {sum(map(len, prompts))} tokens in {times['prefill_seconds']:.2f} s, "
        f"warm-up {times['compile_seconds']:.2f} s)")
    if args.json:
        write_atomically(args.json, json.dumps(report | {
            "prompt_tokens": [len(prompt) for prompt in prompts], "new_tokens": [len(ids) for ids in result.tokens],
            "tokens": result.tokens, "text": list(map(stop.decode, result.tokens, prompts)),
            "finish_reason": result.finish_reason, "target_passes": result.target_passes,
            "accept_lengths": result.accept_lengths, "mean_accept_length": result.mean_accept_length,
            **({} if tree is None else {"copy": tree.n_copy, "copied": result.copied}), **times,
            "tokens_per_second": result.tokens_per_second, "peak_memory_bytes": peak_memory(model),
        }, indent=1) + "\n")
    if args.page:
        names = [f"{row}. " + " ".join(text.split())[:60] for row, text in enumerate(args.texts, start=1)]
        answers = [page_answer(names[row], text, result, row, tokenizer, stop=stop, prompt=prompts[row])
                   for row, text in enumerate(args.texts)]
        facts = page_facts(report | {"copy": args.copy}, result)
        write_page(args.page, f"{short_name(args.checkpoint)}, step by step", facts, answers)
        say(f"wrote {args.page}")


def page_facts(report: dict, result: Generation) -> dict[str, str | float | None]:
    """What the page says of the whole run."""
    return {"checkpoint": short_name(report["checkpoint"]), "head": short_name(report["eagle"]),
            "tree": short_name(report["tree"]), "copied branch": report["copy"] or None,
            "device": report["device_name"], "dtype": report["dtype"], "temperature": report["temperature"],
            "tokens/s": round(result.tokens_per_second, 1)}


def short_name(spec: str | None) -> str | None:
    """A file or folder without its place; a hub id or a named tree as it is."""
    return Path(spec).name if spec is not None and Path(spec).exists() else spec


@contextlib.contextmanager
def profiler(file: Path | None) -> Iterator[None]:
    """Write a torch profiler trace of the block inside, for chrome://tracing or Perfetto. Without a file do nothing."""
    if file is None:
        yield
        return
    with torch.profiler.profile() as profile:
        yield
    with whole_or_nothing(file, ".part.json") as part:
        profile.export_chrome_trace(str(part))
    say(f"wrote {file}")


def peak_memory(model: Transformer) -> int:
    """Bytes: the GPU allocator's peak, or the process's peak resident memory on a CPU."""
    if model.inv_freq.is_cuda:
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def copy_length(text: str) -> int:
    """An argparse type: N, or off for 0."""
    return 0 if text == "off" else int(number(int, 1)(text))


def copy_length_of(tree: str | None) -> int:
    """The default of --copy: what the tree's file says; with a tree that is only a name N_COPY; without a head none."""
    if tree is None:
        return 0
    return N_COPY if named_tree(tree) else load_tree(tree).n_copy


def add_copy_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--copy", type=copy_length, metavar="N|off", help="draft one branch more, of N tokens copied "
                        "from what followed the last three or two tokens before; it needs no head (default: what the "
                        f"tree's file says, {N_COPY} with a tree that is only a name, off without a head)")


def add_exact_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--exact", action=argparse.BooleanOptionalAction, help="plain decoding and greedy EAGLE "
                        "compute the same bits, and so give the same tokens (default: where that is known to hold, on "
                        "a CPU in bfloat16, int8 and int4; --exact fails where it is not)")


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draft-vocab", metavar="N|FILE|off", help="draft only these tokens: the first N of "
                        "draft_vocab.json beside the head, or a file (default: all of draft_vocab.json if it is there)")
    parser.add_argument("--draft-mode", choices=("int8", "int4", "off"), help="round the weights of a 16-bit head "
                        "(default: int4 on a CPU in bfloat16, not compiled and in one process, where groups of 32 fit)")
    parser.add_argument("--draft-window", type=number(int, 1), metavar="N",
                        help="the head attends to the last N tokens when it drafts (default: to all)")
    parser.add_argument("--aux-layers", type=number(int, 0), nargs="+", metavar="J", help="EAGLE-3: the hidden states "
                        "that the head reads, counted as transformers' hidden_states (default: the head's file)")
    parser.add_argument("--draft-rope-theta", type=number(float, 0, open_low=True), metavar="X",
                        help="EAGLE-3: the head's RoPE base (default: the head's file, else 10000)")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Generate text with a LLaMA, Vicuna, Mistral, Mixtral or Qwen checkpoint.")
    parser.add_argument("--checkpoint", help="Hugging Face folder, GGUF file or hub id (default: the demo model)")
    parser.add_argument("--eagle", nargs="?", const="", metavar="HEAD",
                        help="decode with this EAGLE head, a folder or hub id (no value: the one that ships)")
    parser.add_argument("--tree", metavar="TREE", help="static, chain[:DEPTH], dynamic[:DEPTH,CHILDREN,NODES] or a "
                        "JSON file of paths (default: tree.json or tree-int4.json beside the head, else static)")
    add_draft_options(parser)
    add_copy_option(parser)
    add_exact_option(parser)
    parser.add_argument("--draw-drafts", action=argparse.BooleanOptionalAction,
                        help="at a temperature, draw drafts from the head instead of taking its likeliest tokens "
                        "(default: where the tree is not dynamic)")
    parser.add_argument("--prompt", nargs="+", action="extend", metavar="TEXT", help="a question; several make a batch")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="a text file that is one prompt")
    parser.add_argument("--interactive", action="store_true", help="chat on the terminal: /help lists the commands")
    parser.add_argument("--raw", action="store_true", help="continue the text itself, without a chat template")
    add_chat_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message before the first question")
    parser.add_argument("--plain-text", action="store_true",
                        help="a special token written in a message, such as <|im_end|>, is text, not the token")
    parser.add_argument("--stop", nargs="+", action="extend", default=[], metavar="TEXT",
                        help="end the answer before the first of these texts")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=number(float, 0), default=0.0, metavar="X", help="0 is greedy")
    parser.add_argument("--top-k", type=number(int, 1), metavar="N", help="draw from the N likeliest tokens only")
    parser.add_argument("--top-p", type=number(float, 0, 1, open_low=True), metavar="X",
                        help="draw from the likeliest tokens only, as many as hold this probability")
    parser.add_argument("--seed", type=number(int, 0, 2 ** 63 - 1), metavar="N",
                        help="same seed, same text (default: a new one)")
    parser.add_argument("--max-seq-length", type=number(int, 2), metavar="N",
                        help="cache slots a sequence (default: what is needed; in a chat the context, up to 8192)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16",
                        help="default: %(default)s")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction,
                        help="compile the layers, and on a GPU capture the steps (default: on a GPU only)")
    parser.add_argument("--color", action=argparse.BooleanOptionalAction,
                        default=sys.stdout is not None and sys.stdout.isatty(),
                        help="show accepted drafts in green, copied ones in cyan (default: on a terminal)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write tokens, text and times as one JSON object")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="write a torch profiler trace")
    parser.add_argument("--page", type=Path, metavar="FILE.html", help="write a page that shows what each step did: "
                        "drafts, what the target said, times (docs/page.md). Recording makes steps about 1%% slower")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(tp.run(main, parse_args()))
