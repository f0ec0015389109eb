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

Run = tuple[float, list[tuple[float, bool, str]]]   # tokens/s; (seconds since the start, is an accepted draft, text)
PROMPT = "Describe a forest in autumn."
PANE, LINE, PAUSE = 440, 19, 3      # pixels, pixels, seconds until it begins again
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<style>text {{ font: 13px ui-monospace, Menlo, "DejaVu Sans Mono", monospace; fill: #e6edf3; white-space: pre }}
.title {{ font-weight: bold }} .draft {{ fill: #3fb950 }} .note {{ font-size: 11px; fill: #9198a1 }}</style>
<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>
{texts}
</svg>
"""


@command()
def main(args: argparse.Namespace) -> None:
    model, head, tokenizer, report = generate.load(args)
    prompt = encode(args.prompt[-1], tokenizer, raw=False)
    n_slot = slots_for(len(prompt) + args.max_new_tokens + load_tree(args.tree).n_room, model)
    decoders = [generate.make_decoder(args, model, part, 1, n_slot) for part in (None, head)]
    runs = [record(decoder, prompt, args.max_new_tokens, tokenizer) for _ in range(6) for decoder in decoders][2:]
    medians = [sorted(runs[i::2])[2] for i in range(2)]
    note = (f"Real time; green: accepted drafts. {Path(args.checkpoint).name}, {args.dtype}, {report['device_name']}. "
            "Made by python benchmarks/record.py")
    write_atomically(args.out, draw(medians, args.prompt[-1], note))


def record(decoder: Decoder, prompt: list[int], n_token: int, tokenizer: Tokenizer) -> Run:
    steps, stream = [], tokenizer.stream()
    result = decoder.generate([prompt], n_token, stop_ids=tokenizer.stop_ids,
                              on_tokens=lambda row, ids, n_draft: steps.append((time.perf_counter(), ids, n_draft)))
    begin = steps[-1][0] - result.timings["decode_seconds"]
    return result.tokens_per_second, [(at - begin, is_draft, stream.push(ids)) for at, new, n_draft in steps
                                      for is_draft, ids in ((True, new[:n_draft]), (False, new[n_draft:]))]


def draw(runs: list[Run], prompt: str, note: str) -> str:
    seconds = max(pieces[-1][0] for _, pieces in runs) + PAUSE
    texts, bottom = [f'<text x="16" y="28" class="note">&gt; {escape(prompt)}</text>'], 0
    for x, name, (speed, pieces) in zip((16, 16 + PANE), ("plain decoding", "EAGLE"), runs):
        label = span(f"   {speed:.0f} tokens/s", pieces[-1][0], seconds, "title")
        texts.append(f'<text x="{x}" y="56" class="title">{name}{label}</text>')
        marks = iter([(at, is_draft) for at, is_draft, text in pieces for _ in text])      # of each character
        for y, line in enumerate(re.findall(r"[^\n]{0,52}[ \n]|.{52}", "".join(text for _, _, text in pieces) + "\n")):
            spans = [span("".join(char for char, _ in group if char != "\n"), at, seconds, "draft" if is_draft else "")
                     for (at, is_draft), group in itertools.groupby(zip(line, marks), key=lambda pair: pair[1])]
            texts.append(f'<text x="{x}" y="{84 + LINE * y}">{"".join(spans)}</text>')
        bottom = max(bottom, 84 + LINE * (y + 1) + 8)
    texts.append(f'<text x="16" y="{bottom}" class="note">{escape(note)}</text>')
    return SVG.format(width=2 * PANE + 16, height=bottom + 14, texts="\n".join(texts))


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
    args.out = own.out
    return args


if __name__ == "__main__":
    sys.exit(main(parse_args()))
