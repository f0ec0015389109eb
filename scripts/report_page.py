"""An evaluation as one page, report.html: tables, charts and answers, in a file that needs no other and no network.

    text = report_page(report, answers, questions, pages)

report_page.html beside this file is its frame: the style, and what each part means. All texts are escaped: names,
questions and answers are strangers' words.
"""
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template
from urllib.parse import quote

from scripts import charts
from scripts.figures import Answers, by_question, turns
from scripts.tables import (arm_columns, arm_notes, conditions, differences, number_text, position_groups, speedup_text,
                            title)

FRAME = Path(__file__).with_suffix(".html")
BEGINNING = 90      # characters of a question in its row
ORIGINS = ("head", "copy", "target")


def report_page(report: dict, answers: Answers, questions: dict, pages: Iterable[str]) -> str:
    """The page. report: what report.json holds; questions: {question_id: texts of its turns}, as far as they are known;
    pages: names of the files below pages/."""
    overall = report["overall"]
    drafting = [arm for arm in overall if "acceptance_by_depth" in overall[arm]]
    parts = {"title": escape(title(report)), "conditions": escape(conditions(report)),
             "command": escape(report["command"]), "arms": arms_part(report),
             "categories": categories_part(report["categories"]), "depths": depths_part(report, drafting),
             "origins": origins_part(overall, drafting), "positions": positions_part(overall, drafting),
             "questions": questions_part(answers, questions, set(pages), drafting)}
    return Template(FRAME.read_text(encoding="utf-8")).substitute(parts)


def page_name(question_id: object) -> str:
    """The file of a question below pages/. Whatever its id is, the name has no slash in it."""
    return f"{quote(str(question_id), safe='')}.html"


# Parts


def arms_part(report: dict) -> str:
    """A line for each arm, their speedups as a chart, and how answers differ."""
    overall = report["overall"]
    columns, (header, rows, notes) = arm_columns(overall), differences(overall, report.get("rounding") or {})
    chart = charts.intervals([(arm, f["speedup"], *f["speedup_interval"]) for arm, f in overall.items()
                              if "speedup" in f])
    return (figures_row([("Speedup over plain decoding, with 95% intervals", "", chart)])
            + table(["", *columns], [[arm, *cells] for arm, *cells in zip(overall, *columns.values())])
            + (table(header, rows) if rows else "")
            + "".join(f"<p class=note>{escape(note)}</p>" for note in (*arm_notes(overall), *notes)))


def categories_part(categories: dict[str, dict]) -> str:
    """Speedup and accepted length of each arm in each category."""
    arms = [arm for arm in next(iter(categories.values())) if arm != "plain"]
    rows = [[escape(name), f"{f['plain']['tokens_per_second']:.1f}",
             *(figure_cell(speedup_text(f[arm]), f[arm].get("mean_accept_length")) for arm in arms)]
            for name, f in categories.items()]
    return raw_table(["", "plain, tokens/s", *arms], rows)


def depths_part(report: dict, drafting: list[str]) -> str:
    """How often the draft at each depth was right where the one above was: of each arm, and by category."""
    overall = report["overall"]
    by_arm = {arm: overall[arm]["acceptance_by_depth"] for arm in drafting}
    if not by_arm:
        return NO_DRAFTS
    ticks = [str(n + 1) for n in range(max(map(len, by_arm.values())))]
    chart = charts.lines({**by_arm}, ticks, 0, 1, "acceptance by depth")
    parts = [figures_row([("Acceptance at depth 1, 2, ...", charts.legend(drafting), chart)])]
    for arm in drafting:
        groups = {"all": overall[arm], **{name: f[arm] for name, f in report["categories"].items()}}
        rows = [[escape(name), f"{f['target_passes']:,}", number_text(f["mean_accept_length"]),
                 *(heat_cell(value) for value in f["acceptance_by_depth"])] for name, f in groups.items()
                if "acceptance_by_depth" in f]
        parts.append(f"<details{' open' * (arm == drafting[0])}><summary>{escape(arm)} by category</summary>"
                     + raw_table(["", "passes", "accepted length",
                                  *(f"depth {n}" for n in ticks[:len(by_arm[arm])])], rows)
                     + "</details>")
    return "".join(parts)


def origins_part(overall: dict[str, dict], drafting: list[str]) -> str:
    """Where each arm's tokens came from, in all and by depth."""
    known = [arm for arm in drafting if "tokens_by_origin" in overall[arm]]
    if not known:
        return "<p>These answers do not say where their tokens came from.</p>" if drafting else NO_DRAFTS
    chart = charts.stacks([(arm, overall[arm]["tokens_by_origin"]) for arm in known])
    rows = [[arm, *(f"{n:,} ({n / sum(counts.values()):.0%})" for n in counts.values())]
            for arm in known for counts in [overall[arm]["tokens_by_origin"]]]
    parts = [figures_row([("Share of the tokens", origin_legend(), chart)]), table(["", *ORIGINS], rows)]
    for arm in known:
        counts = overall[arm]["tokens_by_origin_and_depth"]
        rows = [[of, *(f"{n:,}" for n in values)] for of, values in counts.items()]
        parts.append(f"<details><summary>{escape(arm)} by depth</summary>"
                     + table(["", *(f"depth {n + 1}" for n in range(len(counts["head"])))], rows) + "</details>")
    return "".join(parts)


def positions_part(overall: dict[str, dict], drafting: list[str]) -> str:
    """Accepted length, and where tokens came from, by where in the answer a step begins."""
    if not drafting:
        return NO_DRAFTS
    groups, found = position_groups(overall), {arm: overall[arm]["by_position"] for arm in drafting}
    lengths = {arm: [found[arm][group]["mean_accept_length"] if group in found[arm] else None for group in groups]
               for arm in drafting}
    high = max(2.0, *(value for values in lengths.values() for value in values if value is not None))
    charted = [("Accepted length, by position", charts.legend(drafting),
                charts.lines(lengths, groups, 1, high * 1.05, "accepted length by position"))]
    charted += [(f"{arm}: share of the tokens, by position", origin_legend(), charts.stacks(
        [(group, f["tokens_by_origin"]) for group, f in found[arm].items()], f"{arm}: where tokens came from"))
        for arm in drafting if all("tokens_by_origin" in f for f in found[arm].values())]
    rows = [[group, *(position_cell(found[arm].get(group)) for arm in drafting)] for group in groups]
    return figures_row(charted) + raw_table(["tokens", *drafting], rows)


def questions_part(answers: Answers, questions: dict, pages: set[str], drafting: list[str]) -> str:
    """A row a question: what was asked, accepted length and speedup of each arm, and the way to its answers."""
    arms, rows = [arm for arm in answers if arm != "plain"], []
    for n, row in enumerate(by_question(answers, drafting)):
        of, asked = {arm: lines[n] for arm, lines in answers.items()}, questions.get(row["question_id"], [])
        shown = escape(beginning(asked[0] if asked else turns(of["plain"])["turns"][0]))
        if (file := page_name(row["question_id"])) in pages:
            text = f'<a href="pages/{quote(file)}">{shown}</a>'
        else:
            text = f"<details><summary>{shown}</summary>{answer_texts(of, asked)}</details>"
        looping = f"<small>loops: {row['looping']} of {row['turns']}</small>" * bool(row["looping"])
        cells = [(arm, row["arms"][arm]["speedup"], row["arms"][arm]["mean_accept_length"]) for arm in arms]
        rows.append(f"<tr><th>{escape(str(row['question_id']))}</th><td class=kind>{escape(row['category'])}{looping}"
                    f"</td><td class=text>{text}</td>" + "".join(
                        f'<td data-arm="{escape(arm)}">{figure_cell(number_text(speedup, "x"), length)}</td>'
                        for arm, speedup, length in cells) + "</tr>")
    header = ["", "category", "question" if questions else "answer", *arms]
    return (f'<div class="scroll"><table class="questions"><thead><tr>{cells_of(header)}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>")


def answer_texts(of: dict[str, dict], asked: list[str]) -> str:
    """What was asked and answered at each turn of a question. of: its line of each arm. An answer that several arms
    gave is shown once."""
    parts = []
    for turn in range(len(turns(of["plain"])["turns"])):
        if turn < len(asked):
            parts.append(f'<p class="asked">{escape(asked[turn])}</p>')
        by_text: dict[str, list[str]] = {}
        for arm, line in of.items():
            by_text.setdefault(turns(line)["turns"][turn], []).append(arm)
        parts += [f"<p class=note>{escape(f'Turn {turn + 1}: ' + ', '.join(arms))}</p>"
                  f'<p class="answer">{escape(text) or "(empty)"}</p>' for text, arms in by_text.items()]
    return "".join(parts)


# Pieces


NO_DRAFTS = "<p>No arm of this run makes drafts.</p>"


def beginning(text: str) -> str:
    """The first words of a text, in one line."""
    line = " ".join(text.split())
    if len(line) > BEGINNING:
        line = (line[:BEGINNING].rpartition(" ")[0] or line[:BEGINNING]) + " ..."
    return line or "(empty)"


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    return raw_table(header, [[escape(cell) for cell in row] for row in rows])


def raw_table(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table whose cells are HTML; the first of each row is its name. Rows may be short."""
    body = "".join(f"<tr><th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in cells)
                   + "<td></td>" * (len(header) - 1 - len(cells)) + "</tr>" for name, *cells in rows)
    return (f'<div class="scroll"><table><thead><tr>{cells_of(header)}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def cells_of(header: list[str]) -> str:
    return "".join(f"<th>{escape(cell)}</th>" for cell in header)


def figure_cell(speedup: str, length: float | None) -> str:
    """A speedup, and below it the accepted length."""
    ratio, _, interval = speedup.partition(" ")
    return (f"<b>{ratio}</b>" + f" {interval}" * bool(interval)
            + ("" if length is None else f"<small>accepts {length:.2f}</small>"))


def position_cell(f: dict | None) -> str:
    if f is None:
        return ""
    return (f"<b>{f['mean_accept_length']:.2f}</b>"
            f"<small>passes: {f['target_passes']:,}, answers: {f['answers']}</small>")


def heat_cell(value: float) -> str:
    """A share, the stronger the fuller."""
    return f'<span class="heat" style="--share: {value:.3f}">{value:.2f}</span>'


def origin_legend() -> str:
    return charts.legend([*ORIGINS], [f"var(--{of})" for of in ORIGINS])


def figures_row(charted: list[tuple[str, str, str]]) -> str:
    """Charts side by side where there is room: (caption, legend, SVG) each."""
    return '<div class="charts">' + "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{key}{chart}</figure>" for caption, key, chart in charted
    ) + "</div>"
