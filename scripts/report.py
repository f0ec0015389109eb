"""The report of an evaluation, from its answers: python scripts/report.py FOLDER

    python scripts/report.py results/demo                   # report.json, .md, .html and .png again
    python scripts/report.py results/a results/b --waterfall waterfall.png    # all their arms in one picture
    python scripts/report.py benchmarks/results/*/ --doc docs/evaluation.md README.md     # the tables of documents

A folder holds run.json, how it was measured, and answers/ARM.jsonl, what scripts/figures.py reads. Where it holds
questions.jsonl, the page shows the questions; where it holds pages/, it links them.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import root  # noqa: F401
from console import Parser, command, write_atomically
from checkpoint import read_json
from scripts.figures import figures, read_answers
from scripts.pictures import draw_report, draw_waterfall
from scripts.questions import read_questions
from scripts.report_page import report_page
from scripts.tables import markdown, short_table, summary

MARK = re.compile(r"(?P<begin><!-- (?P<folder>\S+?)(, arms: (?P<arms>[^>]+?))? -->\n)"
                  r"(?P<content>((?!<!--).)*)<!-- end -->", re.S)


@command()
def main(args: argparse.Namespace) -> None:
    reports = {str(folder): write_report(folder) for folder in args.folders}
    if args.waterfall:
        draw_waterfall([*reports.values()], args.waterfall)
    if args.doc:
        write_documents(args.doc, reports)


def write_report(folder: Path) -> dict:
    """Write report.json, report.md, report.html and, where matplotlib is installed, report.png.

    Returns what report.json holds.
    """
    run = read_json(folder / "run.json")
    if "arms" not in run:
        raise ValueError(f"{folder / 'run.json'} names no arms: it is not of scripts/evaluate.py")
    answers = read_answers(folder, run["arms"])
    report = run | figures(answers, run)
    asked = folder / "questions.jsonl"
    questions = {q["question_id"]: q["turns"] for q in read_questions(str(asked))} if asked.exists() else {}
    page = report_page(report, answers, questions, {file.name for file in folder.glob("pages/*.html")})
    write_atomically(folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_atomically(folder / "report.md", markdown(report))
    write_atomically(folder / "report.html", page)
    draw_report(report, folder / "report.png")
    return report


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
