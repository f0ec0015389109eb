"""scripts/figures.py and report_page.py: each figure by hand on tiny answers, and a page that is whole and escaped.

    python -m pytest tests/test_report.py -q
"""
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from scripts import charts, report, report_page
from scripts.figures import by_position, by_question, figures, read_answers
from scripts.tables import markdown

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = sorted(file.parent for file in ROOT.glob("benchmarks/results/*/run.json"))
VOID = {"meta"}
RUN = {"arms": ["plain", "eagle-x", "copy+3"], "drafting": ["eagle-x", "copy+3"], "temperature": 0.0, "device": "cpu",
       "device_name": "A & <b>B", "threads": 2, "torch": "2", "commit": "abc", "date": "2026-11-27T00:00:00",
       "checkpoint": "c/tiny", "dtype": "float32", "question_set": "tiny_set", "max_new_tokens": 80, "also": None,
       "command": "python scripts/evaluate.py --questions <set>"}
ASKED = {1: ["Is <script>alert('1')</script> & \"2\" safe?", "And <i>now</i>?"], "a/b #2": ["Write"]}
# For each arm, tokens of each step and how many of the drafts were copied: of question 1, both turns, and of "a/b #2".
STEPS = {"plain": [([1] * 66, [0] * 66), ([1] * 3, [0] * 3), ([1] * 3, [0] * 3)],
         "eagle-x": [([3] * 21 + [1, 2], [0] * 20 + [2, 0, 1]), ([2, 1], [0, 0]), ([1, 2], [0, 0])],
         "copy+3": [([4] * 16 + [2], [3] * 16 + [1]), ([3], [2]), ([1, 1, 1], [0, 0, 0])]}
SECONDS = {"plain": [6.0, 0.5, 1.0], "eagle-x": [2.0, 0.25, 2.0], "copy+3": [3.0, 0.25, 1.0]}
TEXTS = ["</p><img src=x> one", "two", "three & four"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of two questions, as evaluate.py leaves it. Pictures are not drawn."""
    monkeypatch.setattr(report, "draw_report", lambda *args: None)
    (tmp_path / "answers").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "questions.jsonl").write_text("".join(
        json.dumps({"question_id": i, "category": "c", "turns": turns}) + "\n" for i, turns in ASKED.items()))
    for arm, steps in STEPS.items():
        lines = [line(1, "math", steps[:2], SECONDS[arm][:2], TEXTS[:2]),
                 line("a/b #2", "<b>writing", steps[2:], SECONDS[arm][2:], TEXTS[2:])]
        (tmp_path / f"answers/{arm}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def line(question_id, category, steps, seconds, texts):
    """A line of answers whose tokens are 0, 1, 2, ...: the prefill's, and those of the steps."""
    n_token = [1 + sum(lengths) for lengths, _ in steps]
    return {"question_id": question_id, "category": category, "choices": [{
        "turns": texts, "tokens": [[*range(n)] for n in n_token], "new_tokens": n_token,
        "timed_tokens": [n - 1 for n in n_token], "decode_seconds": seconds,
        "accept_lengths": [lengths for lengths, _ in steps], "copied": [copied for _, copied in steps],
        "divergence": [None] * len(steps)}]}


class Page(HTMLParser):
    """Reads a page: `tables`, rows of the cells' texts; `links`; `text`. AssertionError where tags do not fit."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.links, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.links += [value for key, value in attrs if key == "href"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    def table(self, *beginning):
        """The first table whose header begins so."""
        return next(table for table in self.tables if table[0][:len(beginning)] == [*beginning])


def made_of(folder):
    answers = read_answers(folder, RUN["arms"])
    return RUN | figures(answers, RUN), answers


def test_a_step_counts_at_the_position_of_its_first_token_and_the_prefills_token_is_the_first(folder):
    made, answers = made_of(folder)
    assert "by_position" not in made["overall"]["plain"]
    found = made["overall"]["eagle-x"]["by_position"]
    assert [*found] == ["0-63", "64-127"]       # 1 token of the prefill and 63 of 21 steps: the next begins at 64
    first, second = found.values()
    assert (first["answers"], first["target_passes"], first["mean_accept_length"]) == (3, 21 + 2 + 2, (63 + 3 + 3) / 25)
    assert first["tokens_by_origin"] == {"head": 40 + 1 + 1, "copy": 2, "target": 25}
    assert first["acceptance_by_depth"] == [(21 + 1 + 1) / 25, 21 / 23]
    assert (second["answers"], second["target_passes"], second["mean_accept_length"]) == (1, 2, 1.5)
    assert second["tokens_by_origin"] == {"head": 0, "copy": 1, "target": 2}
    for f in (made["overall"][arm] for arm in RUN["drafting"]):
        assert sum(group["target_passes"] for group in f["by_position"].values()) == f["target_passes"]
        assert {of: sum(group["tokens_by_origin"][of] for group in f["by_position"].values())
                for of in ("head", "copy", "target")} == f["tokens_by_origin"]
    as_peer = by_position(answers["eagle-x"], is_peer=True)     # the first pass is the prefill: the 22nd begins at 63
    assert [f["target_passes"] for f in as_peer.values()] == [26, 1]


def test_groups_of_positions_double_and_answers_that_do_not_name_copies_have_no_origins():
    long = line(1, "c", [([191, 128, 256, 1], [0] * 4)], [1.0], ["a"])
    found = by_position([long])
    assert {group: f["mean_accept_length"] for group, f in found.items()} == {
        "0-63": 191, "128-255": 128, "256-511": 256, "512-1023": 1}
    del long["choices"][0]["copied"]
    found = by_position([long])
    assert len(found) == 4 and not any("tokens_by_origin" in f for f in found.values())


def test_tokens_of_each_arm_and_category_are_counted_by_source_and_depth(folder):
    made, _ = made_of(folder)
    overall, categories = made["overall"], made["categories"]
    assert overall["eagle-x"]["tokens_by_origin"] == {"head": 42, "copy": 3, "target": 27}
    assert overall["copy+3"]["tokens_by_origin"] == {"head": 0, "copy": 16 * 3 + 1 + 2, "target": 21}
    assert categories["math"]["eagle-x"]["acceptance_by_depth"] == [(21 + 1 + 1) / 25, 21 / 23]
    assert categories["<b>writing"]["eagle-x"]["acceptance_by_depth"] == [1 / 2]
    assert categories["<b>writing"]["eagle-x"]["tokens_by_origin"] == {"head": 1, "copy": 0, "target": 2}


def test_a_row_of_a_question_has_each_arms_speedup_and_accepted_length(folder):
    _, answers = made_of(folder)
    one, two = by_question(answers, RUN["drafting"])
    assert (one["question_id"], one["category"], one["turns"], one["looping"]) == (1, "math", 2, 0)
    plain = (66 + 3) / 6.5
    assert one["arms"]["eagle-x"] == {"speedup": (66 + 3) / 2.25 / plain, "mean_accept_length": 69 / 25}
    assert one["arms"]["copy+3"] == {"speedup": (66 + 3) / 3.25 / plain, "mean_accept_length": 69 / 18}
    assert one["arms"]["plain"] == {"speedup": 1.0, "mean_accept_length": None}
    assert two["arms"]["eagle-x"]["speedup"] == 0.5 and two["arms"]["copy+3"]["mean_accept_length"] == 1
    of_one_token = {arm: [line(1, "c", [([], [])], [0.0], ["a"])] for arm in ("plain", "eagle-x")}
    assert by_question(of_one_token, ["eagle-x"])[0]["arms"]["eagle-x"] == {"speedup": None, "mean_accept_length": None}


def test_report_md_says_the_accepted_length_by_position(folder):
    text = markdown(made_of(folder)[0])
    assert ("| accepted length at position | 0-63 | 64-127 |\n| --- | --- | --- |\n| eagle-x | 2.76 | 1.50 |\n"
            "| copy+3 | 3.50 | 2.00 |\n") in text     # (64 + 3 + 3) / (16 + 1 + 3), and the step of two at 65


def test_the_page_has_the_figures_by_category_depth_source_and_position(folder):
    made, answers = made_of(folder)
    page = Page(report_page.report_page(made, answers, ASKED, []))
    assert page.table("", "passes")[1:] == [["all", "27", "2.67", "0.89", "0.88"],
                                            ["<b>writing", "2", "1.50", "0.50", ""],
                                            ["math", "25", "2.76", "0.92", "0.91"]]
    assert page.table("", "head", "copy", "target")[1:] == [["eagle-x", "42 (58%)", "3 (4%)", "27 (38%)"],
                                                            ["copy+3", "0 (0%)", "51 (71%)", "21 (29%)"]]
    assert page.table("tokens", "eagle-x")[1:] == [
        ["0-63", "2.76passes: 25, answers: 3", "3.50passes: 20, answers: 3"],
        ["64-127", "1.50passes: 2, answers: 1", "2.00passes: 1, answers: 1"]]
    rows = page.table("", "plain, tokens/s")[1:]
    assert [row[0] for row in rows] == ["<b>writing", "math"] and rows[1][2].startswith("2.89x")
    assert rows[1][2].endswith("accepts 2.76")
    asked = page.table("", "category", "question")
    assert [row[:2] for row in asked[1:]] == [["1", "math"], ["a/b #2", "<b>writing"]]
    assert asked[1][3:] == ["2.89xaccepts 2.76", "2.00xaccepts 3.83"]


def test_texts_of_others_are_escaped_and_the_page_asks_for_nothing(folder):
    made = report.write_report(folder)
    text = (folder / "report.html").read_text()
    page = Page(text)
    for shown in (ASKED[1][0], ASKED[1][1], TEXTS[0], TEXTS[2], "<b>writing", RUN["command"], RUN["device_name"]):
        assert shown in page.text
    assert not re.search(r"<(script|img|i>|b>w|link|iframe)|@import|url\(|https?:", text)
    assert "default-src 'none'" in text and all(link.startswith("#") for link in page.links)
    assert all(f'id="{link[1:]}"' in text for link in page.links) and len(page.links) == 6
    assert made["overall"].keys() == STEPS.keys()


def test_a_question_with_a_page_is_a_link_to_it_and_others_show_their_answers(folder):
    (folder / "pages").mkdir()
    (folder / "pages" / report_page.page_name("a/b #2")).write_text("its page")
    report.write_report(folder)
    page = Page((folder / "report.html").read_text())
    file, = (folder / unquote(link) for link in page.links if not link.startswith("#"))
    assert file.read_text() == "its page"
    assert TEXTS[0] in page.text and TEXTS[2] not in page.text
    names = [report_page.page_name(i) for i in ("../x", "..", "a%2Fb", "a/b", "a_b", "ä")]
    assert len(set(names)) == 6 and not any("/" in name for name in names)


def test_an_answer_of_several_arms_is_shown_once_and_without_questions_the_answer_names_the_row(folder):
    (folder / "questions.jsonl").unlink()
    file = folder / "answers/copy+3.jsonl"
    file.write_text(file.read_text().replace('"two"', '"another two"'))
    report.write_report(folder)
    page = Page((folder / "report.html").read_text())
    row = page.table("", "category", "answer")[1][2]
    assert row == (f"{TEXTS[0]}Turn 1: plain, eagle-x, copy+3{TEXTS[0]}Turn 2: plain, eagle-xtwo"
                   "Turn 2: copy+3another two")


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_the_page_of_every_committed_report_is_whole(folder):
    made = json.loads((folder / "report.json").read_text())
    answers = read_answers(folder, made["arms"])
    page = Page(report_page.report_page(made, answers, {}, []))
    rows = page.table("", "category", "answer")[1:]
    assert [row[0] for row in rows] == [str(line["question_id"]) for line in answers["plain"]]
    assert all(f"{f['tokens_per_second']:.1f}" in page.text for f in made["overall"].values())
    assert page.open == [] and "No arm of this run makes drafts" not in page.text


def test_charts_hold_their_values_within_their_frame():
    drawn = charts.lines({"a": [0.0, 1.0], "b": [0.5, None]}, ["1", "2"], 0, 1, "label")
    circles = [tuple(map(float, at)) for at in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert circles == [(102.5, 158), (251.5, 8), (106.5, 83)]      # two series, 2 to the left and 2 to the right
    bars = re.findall(r'x="([\d.]+)" y="20" width="([\d.]+)"', charts.stacks([("a", {"head": 1, "copy": 3})]))
    assert [(float(x), float(width)) for x, width in bars] == [(0, 84), (85, 254)]
    spread = charts.intervals([("a", 2.0, 1.5, 2.5)])
    dot, = re.findall(r'cx="([\d.]+)"', spread)
    assert float(dot) == pytest.approx(6 + 2.0 * (charts.WIDTH - 12) / 2.5, abs=0.05) and "2.00x (1.50-2.50)" in spread
    assert charts.marks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1]) and charts.marks(1, 4.2) == [1, 2, 3, 4]
