"""The figures, tables and pictures of an evaluation, from its answers: python scripts/report.py FOLDER

    python scripts/report.py results/demo                                     # report.json, .md and .png again
    python scripts/report.py results/a results/b --waterfall waterfall.png    # all their arms in one picture
    python scripts/report.py benchmarks/results/* --doc docs/evaluation.md README.md     # the tables of documents

A folder holds run.json, how it was measured, and answers/ARM.jsonl, one line a question in FastChat's form with what
was measured beside each turn. Everything here is computed from these. docs/evaluation.md says what the figures mean. An
arm is a way to decode: plain, EAGLE with some tree, a peer. Metrics are totals over totals, never means of ratios.
"""
import argparse
import itertools
import json
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import root  # noqa: F401
from console import Parser, command, say, whole_or_nothing, write_atomically
from checkpoint import read_json

DRAWS = 2000    # of the bootstrap
MARK = re.compile(r"(?P<begin><!-- (?P<folder>\S+?)(, arms: (?P<arms>[^>]+?))? -->\n)"
                  r"(?P<content>((?!<!--).)*)<!-- end -->", re.S)

Answers = dict[str, list[dict]]     # arm -> its lines, the same questions in the same order in each


@command()
def main(args: argparse.Namespace) -> None:
    reports = {str(folder): write_report(folder) for folder in args.folders}
    if args.waterfall:
        draw_waterfall([*reports.values()], args.waterfall)
    if args.doc:
        write_documents(args.doc, reports)


def write_report(folder: Path) -> dict:
    """Write report.json, report.md and, where matplotlib is installed, report.png; return what report.json holds."""
    run = read_json(folder / "run.json")
    if "arms" not in run:
        raise ValueError(f"{folder / 'run.json'} names no arms: it is not of scripts/evaluate.py")
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
    return out | {"tokens_by_origin_and_depth": origin}


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


# Tables


def markdown(report: dict) -> str:
    """report.md: the summary, each category, and acceptance by depth."""
    overall = report["overall"]
    others = [arm for arm in overall if arm != "plain"]
    drafting = [arm for arm in others if "acceptance_by_depth" in overall[arm]]
    header = ["category", "plain, tokens/s", *others, *(f"accepted length, {arm}" for arm in drafting)]
    rows = [[name, f"{f['plain']['tokens_per_second']:.1f}", *(speedup_text(f[arm]) for arm in others),
             *(number_text(f[arm].get("mean_accept_length")) for arm in drafting)]
            for name, f in report["categories"].items()]
    parts = [summary(report).rstrip(), table(header, rows)]
    deep = [[f"{x:.2f}" for x in overall[arm]["acceptance_by_depth"]] for arm in drafting]
    if deep:
        columns = itertools.zip_longest(*deep, fillvalue="")
        rows = [[arm, *cells] for arm, *cells in zip(drafting, *columns)]
        parts.append(table(["acceptance at depth", *map(str, range(1, len(rows[0])))], rows))
    for arm in drafting:
        if origin := overall[arm].get("tokens_by_origin_and_depth"):
            n_token = sum(map(sum, origin.values()))
            rows = [[of, f"{sum(counts) / n_token:.0%}", *map(str, counts)] for of, counts in origin.items()]
            parts.append(table([f"tokens of {arm} by depth", "all", *map(str, range(1, len(rows[0]) - 1))], rows))
    return "\n\n".join(parts) + "\n"


def summary(report: dict) -> str:
    """How it was measured, a line for each arm, and how answers differ from plain decoding's."""
    overall = report["overall"]
    columns = {     # the arms' cells; a column that says nothing is left out
        "tokens/s": [f"{f['tokens_per_second']:.1f}" for f in overall.values()],
        "speedup": [speedup_text(f) for f in overall.values()],
        "over its own plain": [number_text(f.get("own_speedup"), "x") for f in overall.values()],
        "accepted length": [number_text(f.get("mean_accept_length")) for f in overall.values()],
        "answers as plain": [f"{f['identical']} of {f['answers']}" if "identical" in f else ""
                             for f in overall.values()],
        "looping": [f"{f['looping']} of {f['answers']}" if any(g["looping"] for g in overall.values()) else ""
                    for f in overall.values()],
        "without looping: tokens/s, speedup, length": [rest_text(f.get("without_flaws")) for f in overall.values()],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells) or name in ("speedup", "accepted length")}
    parts = [f"{conditions(report)}\n\n`{report['command']}`",
             table(["", *columns], [[arm, *cells] for arm, *cells in zip(overall, *columns.values())])]
    if "looping" in columns:
        parts.append("Looping: some 8 tokens come three times. Without looping: only the turns where neither this "
                     "arm's answer nor plain's loops or is empty.")
    parts += [f"{arm}: {f['empty']} of {f['answers']} answers are empty." for arm, f in overall.items() if f["empty"]]
    return "\n\n".join([*parts, *differences(overall, report.get("rounding") or {})]) + "\n"


def differences(overall: dict[str, dict], rounding: dict[str, dict]) -> Iterator[str]:
    """How answers differ from plain decoding's: a table, and what its columns mean. rounding: see `agreement`."""
    rows, bounded = [], False
    for arm, f in overall.items():
        if not f.get("divergences"):
            continue
        gaps, errors = ([d[key] for d in f["divergences"] if d.get(key) is not None] for key in ("gap", "error"))
        bound = None if errors else rounding.get(plain_of(arm, overall))
        bounded = bounded or bound is not None
        rows.append([arm, f"{len(f['divergences'])} of {f['answers']}", spread_text(gaps),
                     f"up to {bound['logit_error']:.3g}" if bound else spread_text(errors), str(f["unexplained"])])
    if rows:
        header = ["", "answers that differ", "gap: median, largest", "logits differ by: median, largest", "unexplained"]
        yield table(header, rows)
        yield ("Compared with the plain arm of the same format, where an answer first differs. Gap: how far the chosen "
               "token lies below the largest logit. Logits: those of the two arms' passes. Unexplained: gaps of more "
               "than twice that difference, which rounding cannot cause.")
    if bounded:
        yield "\"Up to\": not measured where these answers differ; the largest difference on other answers."


def short_table(report: dict, arms: list[str]) -> str:
    """These arms with their commands, and how they were measured."""
    header = ["", "tokens/s", "speedup", "accepted length", "command"]
    return (f"{table(header, [short_row(arm, report) for arm in arms])}\n\n"
            f"{conditions(report)} All in one run: `{report['command']}`\n")


def short_row(arm: str, report: dict) -> list[str]:
    """An arm's name in words, its figures and its command: generate.py, or evaluate.py --peers for a peer."""
    f, label = report["overall"][arm], plain_of(arm, report["arms"]).removesuffix("plain").removesuffix("-")
    kind = arm.removeprefix(f"{label}-")
    name = {"plain": "plain decoding", "eagle-tuned": "EAGLE", "copy": "prompt lookup"}.get(
        kind.partition("+")[0], kind.replace("eagle-", "EAGLE, ", 1))
    command = f"python generate.py --checkpoint {'-'.join(filter(None, (report['checkpoint'], label)))} --prompt TEXT"
    if kind in (arms := {arm_of_tree(spec): spec for spec in report["tree"]}):
        tree, _, copy = arms[kind].partition("+")
        if tree != "none":
            command += f" --eagle {report['eagle']}" + f" --tree {tree}" * (tree != "tuned")
        command += f" --copy {copy}" * bool(copy)
        name += f", --copy {copy}" * bool(copy)
    elif kind != "plain":
        command = "python scripts/evaluate.py --questions FILE --peers" + " --gguf FILE" * kind.startswith("llama.cpp")
    if not kind.startswith("llama.cpp"):    # whose weights its name says
        name += f" in {label or report['dtype']}"
    length = number_text(f.get("mean_accept_length"))
    return [name, f"{f['tokens_per_second']:.1f}", speedup_text(f), length, f"`{command}`"]


def arm_of_tree(spec: str) -> str:
    """The name of the arm that drafts what evaluate.py's --tree names: "eagle-static", "eagle-tuned+off", "copy+5"."""
    tree, plus, copy = spec.partition("+")
    return ("copy" if tree == "none" else f"eagle-{Path(tree).stem.replace(':', '-')}") + plus + copy


def write_documents(files: list[Path], reports: dict[str, dict]) -> None:
    """Write the tables of the reports, folder -> report, between the marks of these documents."""
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    for folder in reports:
        if not any(mark["folder"] == folder for text in texts.values() for mark in MARK.finditer(text)):
            raise ValueError(f"{', '.join(map(str, files))}: no <!-- {folder} --> ... <!-- end --> to fill in")
    for file, text in texts.items():
        write_atomically(file, fill_in(text, reports))


def fill_in(text: str, reports: dict[str, dict]) -> str:
    """A document with its tables written anew, from reports: folder -> report. A whole summary stands between
    <!-- FOLDER --> and <!-- end -->, a short table of some arms with their commands between
    <!-- FOLDER, arms: plain eagle-tuned --> and <!-- end -->."""
    def filled(mark: re.Match) -> str:
        report, arms = reports.get(mark["folder"]), mark["arms"]
        if report is None:
            return mark[0]
        if unknown := set(arms.split() if arms else []) - report["overall"].keys():
            raise ValueError(f"<!-- {mark['folder']} -->: no arm {', '.join(sorted(unknown))} there")
        made = short_table(report, arms.split()) if arms else summary(report)
        return mark["begin"] + made + "<!-- end -->"
    return MARK.sub(filled, text)


def conditions(r: dict) -> str:
    cores = f", {r['threads']} threads" if r["device"] == "cpu" else ""
    also = f"also in {' and '.join(r['also'])}, " if r.get("also") else ""
    also += "with a system message, " if r.get("system") else ""
    draft_mode = f", head in {r['draft_mode']}" if r.get("draft_mode", "off") != "off" else ""
    notes = "".join(f" {line}." for line in r.get("absent", []))
    if r.get("left_out"):
        named = ", ".join(f"{q['question_id']} ({q['prompt_tokens']} tokens)" for q in r["left_out"])
        notes += f" Left out, as they leave no room in a context of {r['max_seq_length']}: questions {named}."
    if r["turns_not_asked"]:
        notes += (f" Turns not asked, as their conversation had filled the context of {r['max_seq_length']}: "
                  f"{r['turns_not_asked']}.")
    return (f"{r['device_name']}{cores}, torch {r['torch']}, commit {r['commit']}, {r['date'][:10]}; "
            f"{Path(r['checkpoint']).name} in {r['dtype']}{draft_mode}, temperature {r['temperature']:g}; "
            f"{r['questions']} questions of {r['question_set']}, {r['turns']} turns of up to {r['max_new_tokens']} new "
            f"tokens, batch 1, {also}arms in turn question by question; speedups with 95% intervals.{notes}")


def spread_text(values: list[float]) -> str:
    return f"{sorted(values)[len(values) // 2]:.3g}, {max(values):.3g}" if values else ""


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


def empty_figure(width: float, height: float) -> Any:
    """A figure of matplotlib, or None where it is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        say("no picture: matplotlib is not installed (pip install matplotlib)")
        return None
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    return Figure(figsize=(width, height))


def draw_report(report: dict, file: Path) -> None:
    """Four pictures: tokens/s and speedups by category, acceptance by depth, tokens of a step."""
    if (figure := empty_figure(13, 8)) is None:
        return
    from matplotlib import colormaps
    overall, groups = report["overall"], {"all": report["overall"], **report["categories"]}
    drafting = [arm for arm in overall if "acceptance_by_depth" in overall[arm]]
    palette = colormaps["tab10" if len(overall) <= 10 else "tab20"]
    (speeds, ratios), (depths, steps) = figure.subplots(2, 2)
    for n, (arm, f) in enumerate(overall.items()):
        style, width = {"label": arm, "color": palette(n % palette.N)}, 0.8 / len(overall)
        at = [x + middle([*overall], arm) * width for x in range(len(groups))]
        speeds.bar(at, [g[arm]["tokens_per_second"] for g in groups.values()], width, **style)
        if arm != "plain":
            values = [g[arm]["speedup"] for g in groups.values()]
            errors = [[abs(g[arm]["speedup_interval"][i] - g[arm]["speedup"]) for g in groups.values()] for i in (0, 1)]
            ratios.errorbar(at, values, errors, fmt="o", capsize=2, **style)
        if arm in drafting:
            values, width = f["acceptance_by_depth"], 0.8 / len(drafting)
            depths.plot(range(1, len(values) + 1), values, "o-", **style)
            steps.bar([int(n) + middle(drafting, arm) * width for n in f["tokens_per_step"]],
                      [count / f["target_passes"] for count in f["tokens_per_step"].values()], width, **style)
    ratios.axhline(1, color="grey", linewidth=0.8)
    for axes, ylabel in ((speeds, "tokens/s"), (ratios, "speedup over plain decoding")):
        axes.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right")
        axes.set_ylabel(ylabel)
    for axes, xlabel, ylabel in ((depths, "depth in the tree", "acceptance, given the draft above"),
                                 (steps, "tokens produced by a step", "share of the steps")):
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
    depths.set_ylim(0, 1)
    # One legend for all four: inside the axes it would lie over what is shown.
    figure.legend(*speeds.get_legend_handles_labels(), loc="lower center", ncols=min(len(overall), 6), frameon=False)
    figure.suptitle(f"{title(report)}, {report['questions']} questions, temperature {report['temperature']:g}, "
                    f"{report['dtype']}, {report['device_name']}")
    save(figure, file, bottom=0.07)


def title(report: dict) -> str:
    return f"{Path(report['checkpoint']).name}, {report['question_set']}"


def middle(names: list[str], name: str) -> float:
    """Where a bar stands among those of its group: in widths of a bar, from the group's middle."""
    return names.index(name) - (len(names) - 1) / 2


def draw_waterfall(reports: list[dict], file: Path) -> None:
    """Tokens/s of every arm of the reports, from the slowest to the fastest."""
    several = len({r["checkpoint"] for r in reports}) > 1
    arms = [(arm + f", {Path(r['checkpoint']).name}" * several, f) for r in reports for arm, f in r["overall"].items()]
    bars = sorted(((f["tokens_per_second"], f.get("mean_accept_length"), name) for name, f in arms), key=lambda b: b[0])
    if (figure := empty_figure(9, 1 + 0.4 * len(bars))) is None:
        return
    axes = figure.subplots()
    for n, (speed, length, _) in enumerate(bars):
        text = f" {speed:.1f}" if length is None else f" {speed:.1f}, accepted length {length:.2f}"
        axes.barh(n, speed, color="C0" if length is None else "C1")
        axes.text(speed, n, text, va="center")
    axes.set_yticks(range(len(bars)), [name for *_, name in bars])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.5 * bars[-1][0]), xlabel="tokens/s, batch 1 (orange: with drafts)")
    axes.set_title(f"{title(reports[0])}, {reports[0]['device_name']}", fontsize=9)
    save(figure, file)


def save(figure: Any, file: Path, bottom: float = 0.0) -> None:
    """bottom: share of the height that is left free for a legend."""
    figure.tight_layout(rect=(0, bottom, 1, 1))
    with whole_or_nothing(file, ".part.png") as part:
        figure.savefig(part, dpi=110)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description="Make the report of an evaluation again from its answers.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="--out of scripts/evaluate.py")
    parser.add_argument("--waterfall", type=Path, metavar="PNG", help="one bar for each arm of all the folders")
    parser.add_argument("--doc", type=Path, nargs="+", metavar="FILE",
                        help="write the tables between <!-- FOLDER --> and <!-- end --> there, or between "
                        "<!-- FOLDER, arms: A B --> and <!-- end --> a short one of these arms")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(parse_args()))
