"""A page that shows what each decode step of an answer did: python generate.py --eagle --prompt "Hi" --page steps.html

    result = decoder.generate([prompt], 256)                    # of Decoder(..., record=True)
    answers = [page_answer("1", "Hi", result, 0, tokenizer)]
    write_page(Path("steps.html"), "SmolLM2, step by step", {"checkpoint": "SmolLM2"}, answers)

The page is one file that asks for nothing else: page.html of this folder with the answers in it as JSON. docs/page.md
says how to read it.
"""
import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from chat import StopTexts
from console import write_atomically
from decoder import Generation
from recorder import Step
from tokenizer import Tokenizer

TEMPLATE = Path(__file__).resolve().with_name("page.html")
PROBABILITY = 10_000    # probabilities are stored as whole numbers of ten thousandths: half as long


def page_answer(name: str, prompt_text: str, result: Generation, row: int, tokenizer: Tokenizer, *,
                stop: StopTexts | None = None, prompt: Iterable[int] = ()) -> dict[str, Any]:
    """What the page holds of row `row` of a recorded generation, as values for JSON.

    name    of the answer, where the page has several
    stop    the stop texts that generation was given; the text is cut before the first of them
    prompt  the prompt's ids, which count where `stop` goes on with the prompt's text

    "pieces" are the texts of the answer's tokens, which make the answer together. A token that gives no text, as a
    special one or a part of a character, has an empty piece. "texts" has the text of every id of the answer and its
    trees. "parts" are the parts of a step that were timed, in order, and "ms" of a step their milliseconds, or null.
    Raises ValueError if the steps of this row were not recorded.
    """
    ids, steps = result.tokens[row], result.steps[row] if result.steps else []
    if len(ids) > 1 and not steps:
        raise ValueError(f"the steps of row {row} were not recorded: Decoder(..., record=True)")
    stop = stop or StopTexts(tokenizer)
    prompt = list(prompt)
    parts = list(dict.fromkeys(part for step in steps for part in step.seconds))
    used = set(ids).union(*(ids_of(step) for step in steps))
    return {"name": name, "prompt": prompt_text, "tokens": ids, "pieces": text_pieces(ids, stop, prompt),
            "parts": parts, "steps": [page_step(step, parts) for step in steps],
            "texts": {i: tokenizer.piece(i) for i in sorted(used)}}


def ids_of(step: Step) -> set[int]:
    return {*step.tokens, *step.nodes, *step.said}


def page_step(step: Step, parts: list[str]) -> dict[str, Any]:
    """A step as the page has it; see recorder.Step for the meaning of each entry."""
    ms = [None if part not in step.seconds else round(1000 * step.seconds[part], 3) for part in parts]
    return {"kind": step.kind, "tokens": step.tokens, "copied": step.n_copied, "ms": ms, "nodes": step.nodes,
            "parents": step.parents, "probs": [None if p is None else round(PROBABILITY * p) for p in step.probs],
            "said": step.said, "accepted": step.accepted, "tree": step.n_tree}


def text_pieces(ids: list[int], stop: StopTexts, prompt: list[int]) -> list[str]:
    """The text that each token adds to the answer. Together they are the answer's text, without a stop text."""
    stream, room = stop.stream(prompt), len(stop.decode(ids, prompt))
    pieces = [stream.push([i]) for i in ids]
    pieces[-1] += stream.flush()
    shown = []
    for piece in pieces:
        shown.append(piece[:room])
        room -= len(shown[-1])
    return shown


def write_page(file: Path, title: str, facts: Mapping[str, str | int | float | None], answers: list[dict]) -> None:
    """Write the page. facts: {label: value} of the run, shown above the answers; None is left out.

    Raises OSError that names the file.
    """
    shown = [[label, value] for label, value in facts.items() if value is not None]
    write_atomically(file, fill(TEMPLATE.read_text(encoding="utf-8"), title, {"facts": shown, "answers": answers}))


def fill(template: str, title: str, data: dict[str, Any]) -> str:
    """The template with its {{title}}, {{data}} and {{policy}}: nothing is fetched, no other script or style counts."""
    style, script = (re.search(rf"<{tag}>(.*?)</{tag}>", template, re.S) for tag in ("style", "script"))
    assert style is not None and script is not None, "page.html has no <style> or no <script>"
    policy = (f"default-src 'none'; style-src '{digest(style[1])}'; script-src '{digest(script[1])}'; "
              "base-uri 'none'; form-action 'none'")
    values = {"title": html.escape(title), "policy": policy, "data": script_json(data)}
    return re.sub(r"\{\{(title|policy|data)\}\}", lambda name: values[name[1]], template)


def digest(text: str) -> str:
    """How a content security policy names an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def script_json(value: object) -> str:
    """Compact JSON that may stand inside <script>: no text in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029]", lambda character: f"\\u{ord(character[0]):04x}", text)
