"""Answers the same prompts with plain decoding and with EAGLE, in turn, and compares speed and text.

    python scripts/demo.py
    python scripts/demo.py --prompt "Why is the sky blue?" --max-new-tokens 64
    python scripts/demo.py --checkpoint lmsys/vicuna-7b-v1.3 --eagle yuhuili/EAGLE-Vicuna-7B-v1.3

Both decode greedily with the same weights. Speed is new tokens over decode seconds, without prefill and warm-up.
"""
import argparse
import sys

import torch

import root  # noqa: F401
from chat import Printer, StopTexts, encode
from console import Parser, add_chat_options, command, number, say
from decoder import Decoder, Generation, check_prompts, setup_caches, slots_for
from draft_tree import load_tree
from generate import add_draft_options, add_exact_option, copy_length_of, load, say_head

PROMPTS = [
    "Why is the sky blue?", "Write a short story about a lighthouse keeper.", "How do I make a good cup of tea?",
    "What is the difference between a list and a tuple in Python?", "Give me three tips for sleeping better.",
]


@command()
def main(args: argparse.Namespace) -> None:
    model, head, tokenizer, report = load(args)
    prompts = [encode(text, tokenizer, raw=False) for text in args.prompt]
    tree = load_tree(args.tree, copy_length_of(args.tree))
    n_slot = slots_for(max(map(len, prompts)) + args.max_new_tokens + tree.n_room, model)
    check_prompts(prompts, n_slot, model.config.vocab_size)
    setup_caches(model, head, 1, n_slot)
    plain = Decoder(model, 1, compile=args.compile)
    eagle = Decoder(model, 1, compile=args.compile, head=head, tree=tree)
    say_head(head)
    copied = f" and {tree.n_copy} copied ones" if tree.n_copy else ""
    say(f"{report['checkpoint']} with {report['eagle']}, a tree of {tree.n_node - 1} drafts{copied}, "
        f"{report['dtype']} on {report['device_name']}")
    for decoder in (plain, eagle):  # warm up
        decoder.TRACE_FROM = 1      # one trace for all the answers
        decoder.generate(prompts[:1], min(8, args.max_new_tokens))
    plain_runs, eagle_runs = [], []
    for text, prompt in zip(args.prompt, prompts):
        print(f"\n> {text}\n")
        printer = Printer(StopTexts(tokenizer), [prompt])
        plain_runs += [plain.generate([prompt], args.max_new_tokens, stop_ids=tokenizer.stop_ids, on_tokens=printer)]
        printer.close()
        eagle_runs += [eagle.generate([prompt], args.max_new_tokens, stop_ids=tokenizer.stop_ids)]
        print(f"\n  {compared(plain_runs[-1:], eagle_runs[-1:])}", flush=True)
    print(f"\nall {len(prompts)}: {compared(plain_runs, eagle_runs)}")
    if any(a.tokens != b.tokens for a, b in zip(plain_runs, eagle_runs)) and args.dtype != "float32":
        print("(Two tokens can be so close in probability that 16-bit rounding decides between them: "
              "docs/losslessness.md. With --dtype float32 the texts are equal.)")


def compared(plain_runs: list[Generation], eagle_runs: list[Generation]) -> str:
    plain, eagle = total(plain_runs), total(eagle_runs)
    same, n = sum(a == b for a, b in zip(plain.tokens, eagle.tokens)), len(plain.tokens)
    texts = f"{same} of {n} texts equal" if n > 1 else f"texts {'equal' if same else 'differ'}"
    # Without a step, where the first token is the last one, there is no speed.
    speedup = f" ({eagle.tokens_per_second / plain.tokens_per_second:.2f}x)" if plain.target_passes else ""
    return (f"plain {plain.tokens_per_second:.1f} tokens/s, EAGLE {eagle.tokens_per_second:.1f} tokens/s{speedup}, "
            f"accepted length {eagle.mean_accept_length:.2f}, {texts}")


def total(runs: list[Generation]) -> Generation:
    """All runs of one decoder as the rows of a single run."""
    return Generation(
        tokens=[row for run in runs for row in run.tokens],
        accept_lengths=[row for run in runs for row in run.accept_lengths],
        finish_reason=[row for run in runs for row in run.finish_reason],
        kinds=[kind for run in runs for kind in run.kinds],
        timings={"decode_seconds": sum(run.timings["decode_seconds"] for run in runs)})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Compare plain and EAGLE decoding.")
    parser.add_argument("--prompt", nargs="+", default=PROMPTS)
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=128, metavar="N")
    parser.add_argument("--checkpoint", help="Hugging Face folder, GGUF file or hub id (default: the demo model)")
    parser.add_argument("--eagle", default="", metavar="HEAD", help="default: the head that ships for the checkpoint")
    parser.add_argument("--tree", help="default: the one beside the head, or static")
    add_draft_options(parser)
    add_exact_option(parser)
    add_chat_options(parser)
    parser.add_argument("--device")
    has_bf16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                        default="bfloat16" if has_bf16 else "float32",
                        help="default: bfloat16, float32 on a CPU without instructions for it")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on a GPU only")
    parser.set_defaults(temperature=0.0, top_k=None, top_p=None, seed=None)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
