"""The figures of an evaluation, from its answers.

    run = read_json(folder / "run.json")
    made = figures(read_answers(folder, run["arms"]), run)
    made["overall"]["eagle-tuned"]["by_position"]["64-127"]["mean_accept_length"]

answers/ARM.jsonl has one line a question, in FastChat's form, with what was measured beside each turn. An arm is a way
to decode: plain, EAGLE with some tree, a peer. Metrics are totals over totals, never means of ratios.
docs/evaluation.md says what they mean.
"""
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

DRAWS = 2000            # of the bootstrap
FIRST_POSITIONS = 64    # tokens of an answer in the first group of positions; each later group ends twice as far
PEERS = ("transformers", "llama.cpp")   # names of peers begin so

Answers = dict[str, list[dict]]     # arm -> its lines, the same questions in the same order in each


def read_answers(folder: Path, arms: list[str]) -> Answers:
    """The lines of each arm, for the questions that all arms have answered."""
    lines = {}
    for arm in arms:
        file = answers_file(folder, arm)
        lines[arm] = {}
        # A kill may have left a piece of a last line.
        for text in file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []:
            try:
                line = json.loads(text)
                lines[arm][line["question_id"]] = line
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{file} is not a file of answers: {text[:60]!r}") from None
    everywhere = [i for i in lines[arms[0]] if all(i in lines[arm] for arm in arms)]
    return {arm: [lines[arm][i] for i in everywhere] for arm in arms}


def answers_file(folder: Path, arm: str) -> Path:
    return folder / "answers" / f"{arm}.jsonl"


def figures(answers: Answers, run: dict) -> dict:
    """All that the report says, of the whole set and of each category."""
    if not answers["plain"]:
        raise ValueError("no question has been answered by every arm yet")
    categories = sorted({line["category"] for line in answers["plain"]})
    overall = figures_of_arms(answers, run)
    for arm, f in overall.items():
        if "acceptance_by_depth" in f:
            f["by_position"] = by_position(answers[arm], is_peer=arm.startswith(PEERS))
    return {"questions": len(answers["plain"]), "turns": len(all_of(answers["plain"], "new_tokens")),
            "turns_not_asked": sum(line.get("turns_not_asked", 0) for line in answers["plain"]),
            "overall": overall,
            "categories": {name: figures_of_arms({arm: [line for line in lines if line["category"] == name]
                                                  for arm, lines in answers.items()}, run) for name in categories}}


def figures_of_arms(answers: Answers, run: dict) -> dict[str, dict]:
    out, flaws = {}, {arm: [flaw_of(*answer) for answer in zip(all_of(lines, "turns"), all_of(lines, "tokens"))]
                      for arm, lines in answers.items()}
    for arm, lines in answers.items():
        plain = plain_of(arm, answers)
        out[arm] = {"new_tokens": sum(all_of(lines, "new_tokens")),
                    "decode_seconds": sum(all_of(lines, "decode_seconds")), "tokens_per_second": rate(lines)}
        if arm != "plain":
            out[arm] |= speedup(answers["plain"], lines)
        if plain not in ("plain", arm):
            out[arm] |= {f"own_{key}": value for key, value in speedup(answers[plain], lines).items()}
        lengths = all_lengths(lines)
        # Earlier runs do not say which arms draft.
        drafts = bool(lengths) and (arm in run["drafting"] if "drafting" in run else max(lengths) > 1)
        if drafts:
            copied = [n for line in lines for steps in turns(line).get("copied", []) for n in steps]
            out[arm] |= acceptance(lengths, copied or None)     # none of peers and of earlier runs
        if arm != plain and run["temperature"] == 0:
            out[arm] |= agreement(answers[plain], lines, (run.get("rounding") or {}).get(plain))
        out[arm] |= {"answers": len(flaws[arm])} | {flaw: flaws[arm].count(flaw) for flaw in ("looping", "empty")}
        good = [not (mine or plains) for mine, plains in zip(flaws[arm], flaws["plain"])]
        if any(good) and not all(good) and rate(answers["plain"], good):
            lengths = all_lengths(lines, good)
            out[arm]["without_flaws"] = {
                "answers": sum(good), "tokens_per_second": rate(lines, good),
                "speedup": rate(lines, good) / rate(answers["plain"], good),
                **({"mean_accept_length": sum(lengths) / len(lengths)} if drafts else {})}
    return out


def flaw_of(text: str, tokens: list[int]) -> str | None:
    return "empty" if not text else "looping" if loops(tokens) else None


def loops(ids: list[int], n: int = 8, times: int = 3) -> bool:
    """Whether some n-gram comes `times` times."""
    return loop_begin(ids, n, times) is not None


def loop_begin(ids: list[int], n: int = 8, times: int = 3) -> int | None:
    """Where the n-gram that is the first to come `times` times comes for the second time. None if there is none."""
    places = defaultdict(list)
    for place, gram in enumerate(zip(*(ids[i:] for i in range(n)))):
        places[gram].append(place)
        if len(places[gram]) == times:
            return places[gram][1]
    return None


def plain_of(arm: str, arms: Iterable[str]) -> str:
    """The plain arm of the same target: "int4-plain" of "int4-eagle-static", and of itself."""
    of_formats = [plain for plain in arms if plain.endswith("-plain") and arm.startswith(plain.removesuffix("plain"))]
    return max(of_formats, key=len, default="plain")


def turns(line: dict) -> dict:
    """What a line says of its turns: lists with an entry for each turn."""
    return line["choices"][0]


def all_of(lines: list[dict], key: str, wanted: list[bool] | None = None) -> list:
    """The entries of all turns, or of the `wanted` ones among them."""
    values = [value for line in lines for value in turns(line)[key]]
    return values if wanted is None else [*itertools.compress(values, wanted)]


def all_lengths(lines: list[dict], wanted: list[bool] | None = None) -> list[int]:
    return [n for steps in all_of(lines, "accept_lengths", wanted) for n in steps]


def rate(lines: list[dict], wanted: list[bool] | None = None) -> float:
    return sum(all_of(lines, "timed_tokens", wanted)) / sum(all_of(lines, "decode_seconds", wanted))


def speedup(plain: list[dict], lines: list[dict]) -> dict:
    """Ratio of tokens/s, and the 2.5th and 97.5th percentile of the same ratio over resampled questions."""
    totals = [tuple(sum(turns(of)[key]) for of in (line, base) for key in ("timed_tokens", "decode_seconds"))
              for base, line in zip(plain, lines)]

    def ratio(rows: list[tuple]) -> float:
        tokens, seconds, base_tokens, base_seconds = map(sum, zip(*rows))
        # Answers of one token, which the prefill makes, are not timed.
        return tokens / seconds / (base_tokens / base_seconds) if tokens and base_tokens else 1.0

    rng = random.Random(0)
    draws = sorted(ratio(rng.choices(totals, k=len(totals))) for _ in range(DRAWS))
    return {"speedup": ratio(totals), "speedup_interval": [draws[DRAWS // 40], draws[-DRAWS // 40 - 1]]}


def acceptance(lengths: list[int], copied: list[int] | None = None) -> dict:
    """lengths: tokens produced by each step, bonus included. Acceptance at depth d: how often the draft at depth d was
    right where the one above it was; n-alpha for a chain.

    copied: how many of each step's drafts were copied, all or none.
    """
    at_least = [sum(n > depth for n in lengths) for depth in range(max(lengths) + 1)]
    out = {"target_passes": len(lengths), "mean_accept_length": sum(lengths) / len(lengths),
           "acceptance_by_depth": [deep / above for above, deep in zip(at_least, at_least[1:]) if deep] or [0.0],
           "tokens_per_step": {str(n): count for n, count in sorted(Counter(lengths).items())}}
    if copied is None:
        return out
    origin = {"head": [0] * max(lengths), "copy": [0] * max(lengths), "target": [0] * max(lengths)}
    for n, n_copied in zip(lengths, copied):
        for depth in range(n - 1):
            origin["copy" if n_copied else "head"][depth] += 1
        origin["target"][n - 1] += 1
    return out | {"tokens_by_origin": {of: sum(counts) for of, counts in origin.items()},
                  "tokens_by_origin_and_depth": origin}


def by_position(lines: list[dict], is_peer: bool = False) -> dict[str, dict]:
    """What `acceptance` says of the steps that begin at positions "0-63", "64-127", "128-255", ... of an answer, and
    how many `answers` have such a step.

    The first token, at position 0, is the prefill's. Only a peer counts the prefill among its passes.
    """
    groups = defaultdict(lambda: ([], [], set()))
    for line in lines:
        choice = turns(line)
        all_copied = choice.get("copied") or [[]] * len(choice["accept_lengths"])  # peers and earlier runs do not say
        for turn, (lengths, copied) in enumerate(zip(choice["accept_lengths"], all_copied)):
            place = 0 if is_peer else 1
            for n, n_copied in itertools.zip_longest(lengths, copied):
                begin = 0 if place < FIRST_POSITIONS else 1 << place.bit_length() - 1
                for values, value in zip(groups[begin][:2], (n, n_copied)):
                    values.append(value)
                groups[begin][2].add((line["question_id"], turn))
                place += n
    return {f"{begin}-{max(FIRST_POSITIONS, 2 * begin) - 1}":
            {"answers": len(of)} | acceptance(lengths, None if None in copied else copied)
            for begin, (lengths, copied, of) in sorted(groups.items())}


def by_question(answers: Answers, drafting: list[str]) -> list[dict]:
    """A row a question: {"question_id", "category", "looping", "turns", "arms"}.

    looping     of plain decoding's answers to its `turns`, how many loop
    arms        {"speedup", "mean_accept_length"} of each; None where nothing was timed, and where no drafts were made
    """
    rows = []
    for lines in zip(*answers.values()):
        arms, of = {}, dict(zip(answers, lines))
        for arm, line in of.items():
            lengths = all_lengths([line]) if arm in drafting else []
            timed = [sum(turns(of[name])["timed_tokens"]) for name in (arm, "plain")]
            arms[arm] = {"speedup": rate([line]) / rate([of["plain"]]) if all(timed) else None,
                         "mean_accept_length": sum(lengths) / len(lengths) if lengths else None}
        rows.append({"question_id": of["plain"]["question_id"], "category": of["plain"]["category"],
                     "looping": sum(map(loops, turns(of["plain"])["tokens"])),
                     "turns": len(turns(of["plain"])["turns"]), "arms": arms})
    return rows


def agreement(plain: list[dict], lines: list[dict], rounding: dict | None) -> dict:
    """How many answers are plain decoding's, and how near the two tokens were where the others first differ.

    rounding    of an earlier run, which measured one bound for all answers
    """
    same = [a == b for base, line in zip(plain, lines) for a, b in zip(turns(base)["tokens"], turns(line)["tokens"])]
    out = {"identical": sum(same)}
    if "divergence" in turns(lines[0]):
        parted = [{"question_id": line["question_id"], "turn": n} | divergence for line in lines
                  for n, divergence in enumerate(turns(line)["divergence"]) if divergence is not None]
        out |= {"divergences": parted, "unexplained": sum(not is_rounding(d, rounding) for d in parted)}
    return out


def is_rounding(divergence: dict, rounding: dict | None) -> bool:
    """Whether rounding can have swapped the two tokens: each logit may be off by the error, one up and one down."""
    if divergence["gap"] is None:
        return False
    if "error" in divergence:
        return divergence["gap"] <= 2 * divergence["error"]
    return rounding is not None and divergence["gap"] <= rounding["gap_bound"]
