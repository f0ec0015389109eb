"""Record plain decoding and EAGLE side by side as an animated SVG: python benchmarks/record.py

    python benchmarks/record.py --out docs/demo.svg --prompt "Why is the sky blue?" --max-new-tokens 128

Both answer the prompt five times, in turn, after a warm-up. The run of median speed is drawn: a piece of text appears
when `on_tokens` got it. --out is this script's own option, the others are those of generate.py.
"""
import argparse
import itertools
import re
import sys
import time
from html import escape
from pathlib import Path

import root  # noqa: F401
import generate
from chat import encode
from console import Parser, command, write_atomically
from decoder import Decoder, slots_for
from draft_tree import load_tree
from tokenizer import Tokenizer

Run = tuple[float, list[tuple[str, float, bool]]]   # tokens/s; (character, seconds since the start, is it of a draft)
PROMPT, PAUSE = "Describe a forest in autumn.", 3   # seconds until it begins again
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 896 {height}" width="896" height="{height}">
<style>text {{ font: 13px ui-monospace, Menlo, "DejaVu Sans Mono", monospace; fill: #e6edf3; white-space: pre }}
.title {{ font-weight: bold }} .draft {{ fill: #3fb950 }} .note {{ font-size: 11px; fill: #9198a1 }}</style>
<rect width="896" height="{height}" rx="8" fill="#0d1117"/>
{texts}
</svg>
"""


@command()
def main(args: argparse.Namespace) -> None:
    model, head, tokenizer, report = generate.load(args)
    prompt = encode(args.prompt[-1], tokenizer, raw=False)
    n_slot = slots_for(len(prompt) + args.max_new_tokens + load_tree(args.tree).n_room, model)
    decoders = [generate.make_decoder(args, model, part, 1, n_slot) for part in (None, head)]
    generate.say_head(head)
    runs = [record(decoder, prompt, args.max_new_tokens, tokenizer) for _ in range(6) for decoder in decoders][2:]
    note = (f"Real time; green: accepted drafts. {Path(args.checkpoint).name}, {args.dtype}, {report['device_name']}. "
            "Made by python benchmarks/record.py")
    write_atomically(args.out, draw([sorted(runs[i::2])[2] for i in range(2)], args.prompt[-1], note))


def record(decoder: Decoder, prompt: list[int], n_token: int, tokenizer: Tokenizer) -> Run:
    steps, stream = [], tokenizer.stream()
    result = decoder.generate([prompt], n_token, stop_ids=tokenizer.stop_ids,
                              on_tokens=lambda row, ids, n_draft: steps.append((time.perf_counter(), ids, n_draft)))
    begin, chars = steps[-1][0] - result.timings["decode_seconds"], []
    for at, ids, n_draft in steps:
        chars += [(char, at - begin, True) for char in stream.push(ids[:n_draft])]
        chars += [(char, at - begin, False) for char in stream.push(ids[n_draft:])]
    return result.tokens_per_second, chars


def draw(runs: list[Run], prompt: str, note: str) -> str:
    seconds = max(chars[-1][1] for _, chars in runs) + PAUSE
    texts, bottom = [f'<text x="16" y="28" class="note">&gt; {escape(prompt)}</text>'], 0
    for x, name, (speed, chars) in zip((16, 456), ("plain decoding", "EAGLE"), runs):
        label = span(f"   {speed:.0f} tokens/s", chars[-1][1], seconds, "title")
        texts.append(f'<text x="{x}" y="56" class="title">{name}{label}</text>')
        text = "".join(char for char, *_ in chars) + "\n"
        for y, line in enumerate(re.finditer(r"[^\n]{0,52}[ \n]|.{52}", text)):
            pieces = itertools.groupby(chars[line.start():line.end()], key=lambda char: char[1:])
            spans = [span("".join(char for char, *_ in piece).strip("\n"), at, seconds, "draft" if is_draft else "")
                     for (at, is_draft), piece in pieces]
            texts.append(f'<text x="{x}" y="{84 + 19 * y}">{"".join(spans)}</text>')
            bottom = max(bottom, 84 + 19 * y)
    texts.append(f'<text x="16" y="{bottom + 27}" class="note">{escape(note)}</text>')
    return SVG.format(height=bottom + 41, texts="\n".join(texts))


def span(text: str, at: float, seconds: float, kind: str) -> str:
    """A piece of text that appears `at` seconds after the beginning, every time anew."""
    appear = (f'<animate attributeName="visibility" calcMode="discrete" values="hidden;visible" '
              f'keyTimes="0;{at / seconds:.4f}" dur="{seconds:.2f}s" repeatCount="indefinite"/>')
    return f'<tspan class="{kind}">{escape(text)}{appear}</tspan>'


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Record plain decoding and EAGLE.", epilog="Other options: generate.py.")
    parser.add_argument("--out", type=Path, default=Path("docs/demo.svg"), metavar="FILE")
    own, others = parser.parse_known_args(argv)
    args = generate.parse_args(["--eagle", "--prompt", PROMPT, "--max-new-tokens", "136", *others])
    return argparse.Namespace(**vars(own), **vars(args))


if __name__ == "__main__":
    sys.exit(main(parse_args()))
