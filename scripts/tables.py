"""The tables of an evaluation in Markdown: report.md, and those of documents.

    text = markdown(report)                                 # report: what report.json holds
    text = short_table(report, ["plain", "eagle-tuned"])    # these arms with their commands
"""
import itertools
from pathlib import Path

from scripts.figures import plain_of


def markdown(report: dict) -> str:
    """report.md: the summary, each category, acceptance by depth and by position, and where tokens came from."""
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
        groups = position_groups(overall)
        lengths = {arm: {group: f["mean_accept_length"] for group, f in overall[arm]["by_position"].items()}
                   for arm in drafting}
        rows = [[arm, *(number_text(lengths[arm].get(group)) for group in groups)] for arm in drafting]
        parts.append(table(["accepted length at position", *groups], rows))
    for arm in drafting:
        if origin := overall[arm].get("tokens_by_origin_and_depth"):
            n_token = sum(map(sum, origin.values()))
            rows = [[of, f"{sum(counts) / n_token:.0%}", *map(str, counts)] for of, counts in origin.items()]
            parts.append(table([f"tokens of {arm} by depth", "all", *map(str, range(1, len(rows[0]) - 1))], rows))
    return "\n\n".join(parts) + "\n"


def position_groups(overall: dict[str, dict]) -> list[str]:
    """The groups of positions, such as "0-63", in which steps of some arm begin."""
    return sorted({group for f in overall.values() for group in f.get("by_position", {})},
                  key=lambda group: int(group.partition("-")[0]))


def arm_columns(overall: dict[str, dict]) -> dict[str, list[str]]:
    """The cells of each column of the summary, one for each arm. A column that says nothing is left out."""
    columns = {
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
    return {name: cells for name, cells in columns.items() if any(cells) or name in ("speedup", "accepted length")}


def summary(report: dict) -> str:
    """How it was measured, a line for each arm, and how answers differ from plain decoding's."""
    overall = report["overall"]
    columns, (header, rows, notes) = arm_columns(overall), differences(overall, report.get("rounding") or {})
    parts = [f"{conditions(report)}\n\n`{report['command']}`",
             table(["", *columns], [[arm, *cells] for arm, *cells in zip(overall, *columns.values())])]
    return "\n\n".join([*parts, *arm_notes(overall), *([table(header, rows)] if rows else []), *notes]) + "\n"


def arm_notes(overall: dict[str, dict]) -> list[str]:
    """What is to be said below the summary's table."""
    notes = [f"{arm}: {f['empty']} of {f['answers']} answers are empty." for arm, f in overall.items() if f["empty"]]
    if any(f["looping"] for f in overall.values()):
        notes.insert(0, "Looping: some 8 tokens come three times. Without looping: only the turns where neither this "
                        "arm's answer nor plain's loops or is empty.")
    return notes


def differences(overall: dict[str, dict],
                rounding: dict[str, dict]) -> tuple[list[str], list[list[str]], list[str]]:
    """How answers differ from plain decoding's: a table's header and rows, and what is to be said below it.

    rounding    see `agreement`
    """
    rows, notes, bounded = [], [], False
    for arm, f in overall.items():
        if not f.get("divergences"):
            continue
        gaps, errors = ([d[key] for d in f["divergences"] if d.get(key) is not None] for key in ("gap", "error"))
        bound = None if errors else rounding.get(plain_of(arm, overall))
        bounded = bounded or bound is not None
        rows.append([arm, f"{len(f['divergences'])} of {f['answers']}", spread_text(gaps),
                     f"up to {bound['logit_error']:.3g}" if bound else spread_text(errors), str(f["unexplained"])])
    if rows:
        notes = ["Compared with the plain arm of the same format, where an answer first differs. Gap: how far the "
                 "chosen token lies below the largest logit. Logits: those of the two arms' passes. Unexplained: gaps "
                 "of more than twice that difference, which rounding cannot cause."]
    if bounded:
        notes.append("\"Up to\": not measured where these answers differ; the largest difference on other answers.")
    header = ["", "answers that differ", "gap: median, largest", "logits differ by: median, largest", "unexplained"]
    return header, rows, notes


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


def conditions(r: dict) -> str:
    cores = f", {r['threads']} threads" if r["device"] == "cpu" else ""
    also = f"also in {' and '.join(r['also'])}, " if r.get("also") else ""
    also += "with a system message, " if r.get("system") else ""
    also += "steps recorded, " if r.get("page") else ""
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


def title(report: dict) -> str:
    return f"{Path(report['checkpoint']).name}, {report['question_set']}"


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
