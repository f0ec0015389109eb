"""The figures, tables and pictures of an evaluation, from its answers: python scripts/report.py FOLDER

    python scripts/report.py results/demo                                     # report.json, report.md and report.png again
    python scripts/report.py results/a results/b --waterfall waterfall.png    # the speeds of all their arms in one picture
    python scripts/report.py benchmarks/results/* --readme README.md          # between <!-- FOLDER --> and <!-- end -->

A folder holds run.json, how it was measured, and answers/ARM.jsonl, one line a question in FastChat's form with what
was measured beside each turn. Everything here is computed from these. An arm is a way to decode: plain, EAGLE with
some tree, a peer. Metrics are totals over totals, never means of ratios.

 - tokens/s: new tokens over decode seconds; loading, compilation and prefill outside. A peer's clock runs from its
   first token to its last.
 - speedup: tokens/s of an arm over those of the plain arm, with the 95% interval of a bootstrap over the questions; of an
   arm in another format also over the plain arm of that format.
 - accepted length: tokens produced per target pass, the bonus token included.
 - answers as plain: those equal to plain decoding's by the same target, of a peer to our plain arm's.
 - looping: answers in which some 8 tokens come three times. An answer that repeats itself is easy to draft, so the figures
   are also given for the rest: the turns where neither the arm's answer nor plain's loops or is empty.
 - acceptance at depth d: how often the draft at depth d was right where the one above it was; n-alpha for a chain.
"""
import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import root  # noqa: F401
from console import Parser, command, say, write_atomically
from model import read_json

DRAWS = 2000    # of the bootstrap

Answers = dict[str, list[dict]]     # arm -> its lines, the same questions in the same order in each


@command()
def main(args: argparse.Namespace) -> None:
    reports = [write_report(folder) for folder in args.folders]
    if args.waterfall:
        draw_waterfall(reports, args.waterfall)
    if args.readme:
        text = args.readme.read_text(encoding="utf-8")
        for folder, report in zip(args.folders, reports):
            text = fill_in(text, folder, summary(report))
        write_atomically(args.readme, text)


def write_report(folder: Path) -> dict:
    """Write report.json, report.md and, where matplotlib is installed, report.png; return what report.json holds."""
    run = read_json(folder / "run.json")
    report = run | figures(read_answers(folder, run["arms"]), run)
    write_atomically(folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_atomically(folder / "report.md", markdown(report))
    draw_report(report, folder / "report.png")
    return report


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


# Figures


def figures(answers: Answers, run: dict) -> dict:
    """All that the report says, of the whole set and of each category."""
    if not answers["plain"]:
        raise ValueError("no question has been answered by every arm yet")
    categories = sorted({line["category"] for line in answers["plain"]})
    return {"questions": len(answers["plain"]), "turns": len(all_of(answers["plain"], "new_tokens")),
            "turns_not_asked": sum(line.get("turns_not_asked", 0) for line in answers["plain"]),
            "overall": figures_of_arms(answers, run),
            "categories": {name: figures_of_arms({arm: [line for line in lines if line["category"] == name]
                                                  for arm, lines in answers.items()}, run) for name in categories}}


def figures_of_arms(answers: Answers, run: dict) -> dict[str, dict]:
    out, flaws = {}, {arm: [flaw_of(*answer) for answer in zip(all_of(lines, "turns"), all_of(lines, "tokens"))]
                      for arm, lines in answers.items()}
    for arm, lines in answers.items():
        plain = plain_of(arm, answers)
        out[arm] = speed(lines)
        if arm != "plain":
            out[arm] |= speedup(answers["plain"], lines)
        if plain not in ("plain", arm):
            out[arm] |= {f"own_{key}": value for key, value in speedup(answers[plain], lines).items()}
        lengths = all_lengths(lines)
        drafts = arm in run["drafting"] if "drafting" in run else max(lengths, default=0) > 1   # earlier runs do not say
        if drafts:
            out[arm] |= acceptance(lengths)
        if arm != plain and run["temperature"] == 0:
            out[arm] |= agreement(answers[plain], lines, (run.get("rounding") or {}).get(plain))
        out[arm] |= {"answers": len(flaws[arm]), "looping": flaws[arm].count("looping"), "empty": flaws[arm].count("empty")}
        good = [not (mine or plains) for mine, plains in zip(flaws[arm], flaws["plain"])]
        if any(good) and not all(good):
            out[arm]["without_flaws"] = without_flaws(only(answers["plain"], good), only(lines, good), drafts)
    return out


def flaw_of(text: str, tokens: list[int]) -> str | None:
    return "empty" if not text else "looping" if loops(tokens) else None


def loops(ids: list[int], n: int = 8, times: int = 3) -> bool:
    """Whether some n-gram comes `times` times."""
    return max(Counter(zip(*(ids[i:] for i in range(n)))).values(), default=0) >= times


def only(lines: list[dict], wanted: list[bool]) -> list[dict]:
    """The lines with the wanted turns only; `wanted` has an entry for each turn of all lines."""
    wanted = iter(wanted)
    flags = [[next(wanted) for _ in turns(line)["turns"]] for line in lines]
    keep = lambda value, row: [x for x, flag in zip(value, row) if flag] if isinstance(value, list) else value
    return [line | {"choices": [{key: keep(value, row) for key, value in turns(line).items()}]} for line, row in zip(lines, flags)]


def without_flaws(plain: list[dict], lines: list[dict], drafts: bool) -> dict:
    lengths = all_lengths(lines)
    return {"answers": len(all_of(lines, "turns")), "tokens_per_second": rate(lines), "speedup": rate(lines) / rate(plain)} | (
        {"mean_accept_length": sum(lengths) / len(lengths)} if drafts else {})


def rate(lines: list[dict]) -> float:
    return sum(all_of(lines, "timed_tokens")) / sum(all_of(lines, "decode_seconds"))


def plain_of(arm: str, arms: Iterable[str]) -> str:
    """The plain arm of the same target: "int4-plain" of "int4-eagle-static", and of itself."""
    of_formats = [plain for plain in arms if plain.endswith("-plain") and arm.startswith(plain.removesuffix("plain"))]
    return max(of_formats, key=len, default="plain")


def turns(line: dict) -> dict:
    """The lists of a line that have an entry for each turn."""
    return line["choices"][0]


def all_of(lines: list[dict], key: str) -> list:
    return [value for line in lines for value in turns(line)[key]]


def all_lengths(lines: list[dict]) -> list[int]:
    return [n for steps in all_of(lines, "accept_lengths") for n in steps]


def speed(lines: list[dict]) -> dict:
    return {"new_tokens": sum(all_of(lines, "new_tokens")), "decode_seconds": sum(all_of(lines, "decode_seconds")),
            "tokens_per_second": rate(lines)}


def speedup(plain: list[dict], lines: list[dict]) -> dict:
    """Ratio of tokens/s, and the 2.5th and 97.5th percentile of the same ratio over resampled questions."""
    totals = [(sum(turns(line)["timed_tokens"]), sum(turns(line)["decode_seconds"]),
               sum(turns(base)["timed_tokens"]), sum(turns(base)["decode_seconds"])) for base, line in zip(plain, lines)]

    def ratio(rows: list[tuple]) -> float:
        tokens, seconds, base_tokens, base_seconds = map(sum, zip(*rows))
        return tokens / seconds / (base_tokens / base_seconds)

    rng = random.Random(0)
    draws = sorted(ratio(rng.choices(totals, k=len(totals))) for _ in range(DRAWS))
    return {"speedup": ratio(totals), "speedup_interval": [draws[DRAWS // 40], draws[-DRAWS // 40 - 1]]}


def acceptance(lengths: list[int]) -> dict:
    """lengths: tokens produced by each step, bonus included."""
    at_least = [sum(n > depth for n in lengths) for depth in range(max(lengths) + 1)]
    return {"target_passes": len(lengths), "mean_accept_length": sum(lengths) / len(lengths),
            "acceptance_by_depth": [deep / above for above, deep in zip(at_least, at_least[1:]) if deep] or [0.0],
            "tokens_per_step": {str(n): count for n, count in sorted(Counter(lengths).items())}}


def agreement(plain: list[dict], lines: list[dict], rounding: dict | None) -> dict:
    """How many answers are plain decoding's, and how near the two tokens were where the others first part.

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
    """Whether rounding can have turned the order of the two tokens: each logit may be off by the error, one up, one down."""
    if divergence["gap"] is None:
        return False
    if "error" in divergence:
        return divergence["gap"] <= 2 * divergence["error"]
    return rounding is not None and divergence["gap"] <= rounding["gap_bound"]


# Tables


def summary(report: dict) -> str:
    """How it was measured, a line for each arm, and why answers differ."""
    overall = report["overall"]
    columns = {     # the arms' cells; a column that says nothing is left out
        "tokens/s": [f"{f['tokens_per_second']:.1f}" for f in overall.values()],
        "speedup": [speedup_text(f) for f in overall.values()],
        "over its own plain": [number_text(f.get("own_speedup"), "x") for f in overall.values()],
        "accepted length": [number_text(f.get("mean_accept_length")) for f in overall.values()],
        "answers as plain": [f"{f['identical']} of {f['answers']}" if "identical" in f else "" for f in overall.values()],
        "looping": [f"{f['looping']} of {f['answers']}" if any(g["looping"] for g in overall.values()) else ""
                    for f in overall.values()],
        "the rest: tokens/s, speedup, length": [rest_text(f.get("without_flaws")) for f in overall.values()],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells) or name in ("speedup", "accepted length")}
    rows = [[arm, *cells] for arm, *cells in zip(overall, *columns.values())]
    empty = [f"{arm}: {f['empty']} of {f['answers']} answers are empty." for arm, f in overall.items() if f["empty"]]
    note = ["Looping: some 8 tokens come three times. The rest: turns in which neither the arm's answer nor plain's loops or is empty."]
    rounding = report.get("rounding") or {}
    return "\n\n".join([conditions(report), table(["", *columns], rows), *(note if "looping" in columns else []), *empty, *(
        explanation(arm, plain_of(arm, overall), f, rounding.get(plain_of(arm, overall)))
        for arm, f in overall.items() if f.get("divergences"))]) + "\n"


def markdown(report: dict) -> str:
    """report.md: the summary, each category, and acceptance by depth."""
    overall = report["overall"]
    others = [arm for arm in overall if arm != "plain"]
    drafting = [arm for arm in others if "acceptance_by_depth" in overall[arm]]
    header = ["category", "plain, tokens/s", *others, *(f"accepted length, {arm}" for arm in drafting)]
    rows = [[name, f"{f['plain']['tokens_per_second']:.1f}", *(speedup_text(f[arm]) for arm in others),
             *(number_text(f[arm].get("mean_accept_length")) for arm in drafting)] for name, f in report["categories"].items()]
    parts = [summary(report).rstrip(), table(header, rows)]
    deep = [[arm, *(f"{x:.2f}" for x in overall[arm]["acceptance_by_depth"])] for arm in drafting]
    if deep:
        width = max(map(len, deep)) - 1
        parts.append(table(["acceptance at depth", *map(str, range(1, width + 1))],
                           [row + [""] * (width + 1 - len(row)) for row in deep]))
    return "\n\n".join(parts) + "\n"


def fill_in(text: str, folder: Path, content: str) -> str:
    """Put content between the marks of a folder. Raises ValueError where they are missing."""
    begin, found, rest = text.partition(f"<!-- {folder} -->\n")
    _, closed, after = rest.partition("<!-- end -->")
    if not (found and closed):
        raise ValueError(f"the readme has no <!-- {folder} --> ... <!-- end --> to fill in")
    return begin + found + content + closed + after


def conditions(r: dict) -> str:
    cores = f", {r['threads']} threads" if r["device"] == "cpu" else ""
    also = f"also in {' and '.join(r['also'])}, " if r.get("also") else ""
    draft_mode = f", head in {r['draft_mode']}" if r.get("draft_mode", "off") != "off" else ""
    notes = "".join(f" {line}." for line in r.get("absent", []))
    if r.get("left_out"):
        named = ", ".join(f"{q['question_id']} ({q['prompt_tokens']} tokens)" for q in r["left_out"])
        notes += f" Left out, as they leave no room in a context of {r['max_seq_length']}: questions {named}."
    if r["turns_not_asked"]:
        notes += f" Turns not asked, as their conversation had filled the context of {r['max_seq_length']}: {r['turns_not_asked']}."
    return (f"{r['device_name']}{cores}, torch {r['torch']}, commit {r['commit']}, {r['date'][:10]}; {Path(r['checkpoint']).name} in "
            f"{r['dtype']}{draft_mode}, temperature {r['temperature']:g}; {r['questions']} questions of {r['question_set']}, {r['turns']} turns of "
            f"up to {r['max_new_tokens']} new tokens, batch 1, {also}arms in turn question by question; speedups with 95% intervals.{notes}\n\n"
            f"`{r['command']}`")


def explanation(arm: str, plain: str, figures: dict, rounding: dict | None) -> str:
    """rounding: of an earlier run, see `agreement`."""
    parted = [d for d in figures["divergences"] if d["gap"] is not None]
    plain_name = "plain" if plain == "plain" else f"{plain.removesuffix('-plain')} plain"
    text = f"{arm}: {len(figures['divergences'])} answers part from {plain_name} decoding; "
    if parted:
        text += (f"where they do, the token chosen lies at most {max(d['gap'] for d in parted):.3g} below the largest logit "
                 f"(median {median(d['gap'] for d in parted):.3g})")
    if parted and "error" in parted[0]:
        text += (f", and the two arms' passes give logits that differ by up to {max(d['error'] for d in parted):.3g} "
                 f"(median {median(d['error'] for d in parted):.3g}); {figures['unexplained']} lie lower than twice the "
                 "difference at their place, which rounding does not explain.")
    elif parted and rounding:
        text += (f". A block of rows and a single row give logits that differ by up to {rounding['logit_error']:.3g} on other "
                 f"answers (not measured where these part), so gaps up to {rounding['gap_bound']:.3g} may be rounding; "
                 f"{figures['unexplained']} are larger.")
    else:
        text += f"{figures['unexplained']} are not explained by rounding."
    return text


def median(values: Iterable[float]) -> float:
    values = sorted(values)
    return values[len(values) // 2]


def rest_text(f: dict | None) -> str:
    if f is None:
        return ""
    length = f", {f['mean_accept_length']:.2f}" if "mean_accept_length" in f else ""
    return f"{f['tokens_per_second']:.1f}, {f['speedup']:.2f}x{length}"


def speedup_text(f: dict) -> str:
    if "speedup" not in f:
        return ""
    low, high = f["speedup_interval"]
    return f"{f['speedup']:.2f}x" + (f" ({low:.2f}-{high:.2f})" if low < high else "")     # one question has no spread


def number_text(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{value:.2f}{unit}"


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows))


# Pictures


def pyplot():
    """matplotlib's pyplot without a screen, or None where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        say("no picture: matplotlib is not installed (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    return plt


def draw_report(report: dict, file: Path) -> None:
    plt = pyplot()
    if plt is None:
        return
    overall, groups = report["overall"], {"all": report["overall"], **report["categories"]}
    arms = list(overall)
    colours = plt.get_cmap("tab10" if len(arms) <= 10 else "tab20").colors
    drafting = [arm for arm in arms if "acceptance_by_depth" in overall[arm]]
    figure, ((speeds, ratios), (depths, steps)) = plt.subplots(2, 2, figsize=(13, 8))
    for n, arm in enumerate(arms):
        at = [x + (n - (len(arms) - 1) / 2) * 0.8 / len(arms) for x in range(len(groups))]
        speeds.bar(at, [f[arm]["tokens_per_second"] for f in groups.values()], 0.8 / len(arms), label=arm, color=colours[n % len(colours)])
        if arm != "plain":
            middle = [f[arm]["speedup"] for f in groups.values()]
            low, high = ([abs(f[arm]["speedup_interval"][i] - f[arm]["speedup"]) for f in groups.values()] for i in (0, 1))
            ratios.errorbar(at, middle, (low, high), fmt="o", capsize=2, label=arm, color=colours[n % len(colours)])
        if arm in drafting:
            values = overall[arm]["acceptance_by_depth"]
            depths.plot(range(1, len(values) + 1), values, "o-", label=arm, color=colours[n % len(colours)])
            counts = overall[arm]["tokens_per_step"]
            shift = (drafting.index(arm) - (len(drafting) - 1) / 2) * 0.8 / len(drafting)
            steps.bar([int(k) + shift for k in counts], [v / sum(counts.values()) for v in counts.values()], 0.8 / len(drafting),
                      label=arm, color=colours[n % len(colours)])
    ratios.axhline(1, color="grey", linewidth=0.8)
    for axes, ylabel in ((speeds, "tokens/s"), (ratios, "speedup over plain decoding")):
        axes.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
        axes.set_ylabel(ylabel)
    for axes, xlabel, ylabel in ((depths, "depth in the tree", "acceptance, given the draft above"),
                                 (steps, "tokens produced by a step", "share of the steps")):
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
    depths.set_ylim(0, 1)
    # One legend for all four: inside the axes it would lie over what is shown.
    figure.legend(*speeds.get_legend_handles_labels(), loc="lower center", ncols=min(len(arms), 6), frameon=False)
    figure.suptitle(f"{Path(report['checkpoint']).name}, {report['question_set']}, {report['questions']} questions, temperature "
                    f"{report['temperature']:g}, {report['dtype']}, {report['device_name']}")
    save(plt, figure, file, bottom=0.07)


def draw_waterfall(reports: list[dict], file: Path) -> None:
    """Tokens/s of every arm of the reports, from the slowest to the fastest."""
    plt = pyplot()
    if plt is None:
        return
    several = len({r["checkpoint"] for r in reports}) > 1
    bars = [(f"{arm}, {Path(r['checkpoint']).name}" if several else arm, f) for r in reports for arm, f in r["overall"].items()]
    bars.sort(key=lambda bar: bar[1]["tokens_per_second"])
    figure, axes = plt.subplots(figsize=(9, 1 + 0.4 * len(bars)))
    for n, (name, f) in enumerate(bars):
        axes.barh(n, f["tokens_per_second"], color="C1" if "mean_accept_length" in f else "C0")
        length = f", accepted length {f['mean_accept_length']:.2f}" if "mean_accept_length" in f else ""
        axes.text(f["tokens_per_second"], n, f" {f['tokens_per_second']:.1f}{length}", va="center")
    axes.set_yticks(range(len(bars)), [name for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(f["tokens_per_second"] for _, f in bars))
    axes.set_xlabel("tokens/s, batch 1 (orange: with drafts)")
    axes.set_title(f"{Path(reports[0]['checkpoint']).name}, {reports[0]['question_set']}, {reports[0]['device_name']}", fontsize=9)
    save(plt, figure, file)


def save(plt, figure, file: Path, bottom: float = 0.0) -> None:
    """bottom: share of the height that is left free for a legend."""
    part = file.with_name(f"{file.stem}.part.png")
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.savefig(part, dpi=110)
    plt.close(figure)
    part.replace(file)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Make the report of an evaluation again from its answers.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="--out of scripts/evaluate.py")
    parser.add_argument("--waterfall", type=Path, metavar="PNG", help="one bar for each arm of all the folders")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put each folder's summary between its marks there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
