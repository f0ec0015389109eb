"""The figures, tables and pictures of an evaluation, from its answers: python scripts/report.py FOLDER

    python scripts/report.py results/demo                                     # report.json, report.md and report.png again
    python scripts/report.py results/a results/b --waterfall waterfall.png    # the speeds of all their arms in one picture
    python scripts/report.py benchmarks/results/* --readme README.md          # between <!-- FOLDER --> and <!-- end -->

A folder holds run.json, how it was measured, and answers/ARM.jsonl, one line a question in FastChat's form with what
was measured beside each turn. Everything here is computed from these. An arm is a way to decode: plain, EAGLE with
some tree, a peer. Metrics are totals over totals, never means of ratios.

 - tokens/s: new tokens over decode seconds; loading, compilation and prefill outside. A peer's clock runs from its
   first token to its last.
 - speedup: tokens/s of an arm over those of the plain arm, with the 95% interval of a bootstrap over the questions.
 - accepted length: tokens produced per target pass, the bonus token included.
 - answers as plain: those equal to plain decoding's by the same target, of a peer to our plain arm's.
 - acceptance at depth d: how often the draft at depth d was right where the one above it was; n-alpha for a chain.
"""
import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
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
    if run.get("temperature") == 0 and "plain" not in (run.get("rounding") or {}):
        raise ValueError(f"{folder} was written by an earlier evaluate.py: evaluate again")
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
    return {"questions": len(answers["plain"]), "turns": sum(len(turns(line)["new_tokens"]) for line in answers["plain"]),
            "overall": figures_of_arms(answers, run),
            "categories": {name: figures_of_arms({arm: [line for line in lines if line["category"] == name]
                                                  for arm, lines in answers.items()}, run) for name in categories}}


def figures_of_arms(answers: Answers, run: dict) -> dict[str, dict]:
    out = {}
    for arm, lines in answers.items():
        out[arm] = speed(lines)
        if arm != "plain":
            out[arm] |= speedup(answers["plain"], lines)
        lengths = [n for steps in all_of(lines, "accept_lengths") for n in steps]
        if max(lengths, default=0) > 1:
            out[arm] |= acceptance(lengths)
        plain = plain_of(arm, answers)
        if arm != plain and run["temperature"] == 0:
            out[arm] |= agreement(answers[plain], lines, run["rounding"][plain])
    return out


def plain_of(arm: str, arms: Iterable[str]) -> str:
    """The plain arm of the same target: "int4-plain" of "int4-eagle-static", and of itself."""
    of_formats = [plain for plain in arms if plain.endswith("-plain") and arm.startswith(plain.removesuffix("plain"))]
    return max(of_formats, key=len, default="plain")


def turns(line: dict) -> dict:
    """The lists of a line that have an entry for each turn."""
    return line["choices"][0]


def all_of(lines: list[dict], key: str) -> list:
    return [value for line in lines for value in turns(line)[key]]


def speed(lines: list[dict]) -> dict:
    tokens, seconds = sum(all_of(lines, "timed_tokens")), sum(all_of(lines, "decode_seconds"))
    return {"new_tokens": sum(all_of(lines, "new_tokens")), "decode_seconds": seconds, "tokens_per_second": tokens / seconds}


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
            "acceptance_by_depth": [deep / above for above, deep in zip(at_least, at_least[1:]) if deep],
            "tokens_per_step": {str(n): count for n, count in sorted(Counter(lengths).items())}}


def agreement(plain: list[dict], lines: list[dict], rounding: dict) -> dict:
    """How many answers are plain decoding's, and how near the two tokens were where the others first part."""
    same = [a == b for base, line in zip(plain, lines) for a, b in zip(turns(base)["tokens"], turns(line)["tokens"])]
    out = {"answers": len(same), "identical": sum(same)}
    if "divergence" in turns(lines[0]):
        parted = [{"question_id": line["question_id"], "turn": n} | divergence for line in lines
                  for n, divergence in enumerate(turns(line)["divergence"]) if divergence is not None]
        out |= {"divergences": parted, "unexplained": sum(d["gap"] is None or d["gap"] > rounding["gap_bound"] for d in parted)}
    return out


# Tables


def summary(report: dict) -> str:
    """How it was measured, a line for each arm, and why answers differ."""
    overall, greedy = report["overall"], report["temperature"] == 0
    header = ["", "tokens/s", "speedup", "accepted length"] + ["answers as plain"] * greedy
    rows = [[arm, f"{f['tokens_per_second']:.1f}", speedup_text(f), number_text(f.get("mean_accept_length"))]
            + [f"{f['identical']} of {f['answers']}" if "identical" in f else ""] * greedy for arm, f in overall.items()]
    return "\n\n".join([conditions(report), table(header, rows), *(
        explanation(arm, plain_of(arm, overall), f, report["rounding"]) for arm, f in overall.items() if f.get("divergences"))]) + "\n"


def markdown(report: dict) -> str:
    """report.md: the summary, each category, and acceptance by depth."""
    overall = report["overall"]
    others = [arm for arm in overall if arm != "plain"]
    drafting = [arm for arm in others if "acceptance_by_depth" in overall[arm]]
    header = ["category", "plain, tokens/s", *others, *(f"accepted length, {arm}" for arm in drafting)]
    rows = [[name, f"{f['plain']['tokens_per_second']:.1f}", *(speedup_text(f[arm]) for arm in others),
             *(number_text(f[arm].get("mean_accept_length", 1)) for arm in drafting)] for name, f in report["categories"].items()]
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
    absent = "".join(f" {line}." for line in r.get("absent", []))
    return (f"{r['device_name']}{cores}, torch {r['torch']}, commit {r['commit']}, {r['date'][:10]}; {Path(r['checkpoint']).name} in "
            f"{r['dtype']}{draft_mode}, temperature {r['temperature']:g}; {r['questions']} questions of {r['question_set']}, {r['turns']} turns of "
            f"up to {r['max_new_tokens']} new tokens, batch 1, {also}arms in turn question by question; speedups with 95% intervals.{absent}\n\n"
            f"`{r['command']}`")


def explanation(arm: str, plain: str, figures: dict, rounding: dict) -> str:
    gaps, rounding = [d["gap"] for d in figures["divergences"] if d["gap"] is not None] or [0.0], rounding[plain]
    plain_name = "plain" if plain == "plain" else f"{plain.removesuffix('-plain')} plain"
    return (f"{arm}: {len(figures['divergences'])} answers part from {plain_name} decoding; where they do, the token chosen lies at most {max(gaps):.3g} below the "
            f"largest logit (median {sorted(gaps)[len(gaps) // 2]:.3g}). A block of rows and a single row give logits that differ by up "
            f"to {rounding['logit_error']:.3g} here, so gaps up to {rounding['gap_bound']:.3g} are rounding; "
            f"{figures['unexplained']} are larger.")


def speedup_text(f: dict) -> str:
    if "speedup" not in f:
        return ""
    low, high = f["speedup_interval"]
    return f"{f['speedup']:.2f}x" + (f" ({low:.2f}-{high:.2f})" if low < high else "")     # one question has no spread


def number_text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


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
