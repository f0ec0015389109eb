"""The page of an answer's steps: what is in the file, and what a browser makes of it.

    python -m pytest tests/test_page.py -q

The browser is a headless Chromium; without one its tests are skipped.
"""
import json
import random
import re
import shutil
import time

import pytest

import generate as cli
from chat import StopTexts
from decoder import Generation
from page import TEMPLATE, page_answer, script_json, write_page
from recorder import Step
from reference import CORPUS, write_checkpoint
from tokenizer import Tokenizer

HTML = '<img src=x onerror="window.hacked=1">'
ESCAPE = "</script><script>window.hacked=1</script><!--<script>&amp;\u2028\u2029"
MS = dict(draft=0.0031234, verify=0.009, accept=0.0004, commit=0.0008, host=0.0001)
SOURCES = ("head", "copy", "own")


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    from tokenizers import AddedToken, Tokenizer as Library, decoders, models, pre_tokenizers, trainers

    folder, bpe = tmp_path_factory.mktemp("page"), Library(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
        special_tokens=[AddedToken("<|end|>", special=True)]))
    bpe.add_tokens([AddedToken(HTML, normalized=False)])
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return Tokenizer.from_pretrained(folder)


def recorded(tokens, steps, *more):
    """A generation of one row, or more: (tokens, steps) each."""
    rows = [(tokens, steps), *more]
    return Generation([row[0] for row in rows], [], [], steps=[row[1] for row in rows])


def three_steps(tok):
    """One step of each kind, by hand: the fox jumps.

    A tree whose second child is right, and one child of that; a copied branch that goes deeper than the head's tree,
    which is right too as far as it goes; a plain step.
    """
    the, fox, dog, quick, jumps, over, lazy, end = [tok.encode(text)[0] for text in (
        "the", " fox", " dog", " quick", " jumps", " over", " lazy", "<|end|>")]
    assert len({the, fox, dog, quick, jumps, over, lazy, end}) == 8
    steps = [
        Step("tree", [quick, fox, jumps], 0, MS, [the, dog, quick, lazy, fox], [0, 0, 0, 1, 2],
             [None, 0.62345, 0.2, 0.00004, 1.0], [quick, over, fox, dog, jumps], [2, 4], 5),
        Step("copy", [over, the, lazy], 2, MS | {"host": 0.0002}, [jumps, over, dog, over, the, fox],
             [0, 0, 0, 0, 3, 4], [None, 0.5, 0.25, None, None, None], [over, the, fox, the, lazy, end], [3, 4], 3),
        Step("plain", [dog], 0, {"verify": 0.005, "host": 0.0001}, [], [], [], [], [], 0),
        Step("tree", [end, fox], 0, MS, [dog, end], [0, 0], [None, 0.9], [end, fox], [1], 2),
    ]
    return recorded([the, quick, fox, jumps, over, the, lazy, dog, end], steps)     # the last step was cut


def random_steps(n_token, n_node, mean_length=1.6, n_copy=0, vocab=300, seed=0):
    """An answer of n_token tokens in steps of n_node nodes, all of it random but possible."""
    rng = random.Random(seed)
    tokens, steps = [rng.randrange(vocab)], []
    parents = [0, *((n - 1) // 3 for n in range(1, n_node))]
    while len(tokens) < n_token:
        nodes, said = ([rng.randrange(vocab) for _ in range(n_node + n_copy)] for _ in range(2))
        above = parents + ([0, *range(n_node, n_node + n_copy - 1)] if n_copy else [])
        accepted, last = [], 0
        while rng.random() < 1 - 1 / mean_length and (children := [n for n in range(1, n_node) if above[n] == last]):
            last = rng.choice(children)
            said[above[last]] = nodes[last]
            accepted.append(last)
        probs = [None, *(rng.random() ** 4 for _ in range(n_node - 1)), *[None] * n_copy]
        made = [nodes[n] for n in accepted] + [said[last]]
        steps.append(Step("copy" if n_copy else "tree", made, 0, MS, nodes, above, probs, said, accepted, n_node))
        tokens += made
    return recorded(tokens[:n_token], steps)


# The file


def test_the_pieces_of_an_answer_are_its_text_whatever_characters_its_tokens_break(tok):
    ids = tok.encode("der Füchsin 🦊 \u2028 the end\n<|end|>")
    for n in range(1, len(ids) + 1):    # some end within a character
        answer = page_answer("1", "", recorded(ids[:n], random_steps(40, 3).steps[0]), 0, tok)
        assert "".join(answer["pieces"]) == tok.decode(ids[:n]) and len(answer["pieces"]) == n
    assert "" in answer["pieces"] and answer["texts"][tok.encode("<|end|>")[0]] == "<|end|>"


def test_a_text_ends_before_a_stop_text(tok):
    ids = tok.encode("the fox. Question: what?")
    result = recorded(ids, random_steps(40, 3).steps[0])
    answer = page_answer("1", "", result, 0, tok, stop=StopTexts(tok, ["Question"]))
    assert "".join(answer["pieces"]) == "the fox. " and len(answer["pieces"]) == len(ids)


def test_a_step_is_written_as_it_was_recorded_probabilities_and_times_rounded(tok):
    result = three_steps(tok)
    answer = page_answer("name", "prompt", result, 0, tok)
    assert answer["parts"] == ["draft", "verify", "accept", "commit", "host"]
    for written, step in zip(answer["steps"], result.steps[0]):
        keys = "kind", "tokens", "copied", "nodes", "parents", "said", "accepted", "tree"
        assert [written[key] for key in keys] == [
            step.kind, step.tokens, step.n_copied, step.nodes, step.parents, step.said, step.accepted, step.n_tree]
    assert answer["steps"][0]["probs"] == [None, 6234, 2000, 0, 10000]
    assert answer["steps"][0]["ms"] == [3.123, 9.0, 0.4, 0.8, 0.1]
    assert answer["steps"][2]["ms"] == [None, 5.0, None, None, 0.1]
    assert set(answer["texts"]) == {i for step in result.steps[0] for i in (*step.tokens, *step.nodes, *step.said)}


def test_an_answer_that_was_not_recorded_is_refused_and_one_of_the_prefill_alone_is_none(tok):
    with pytest.raises(ValueError, match="record=True"):
        page_answer("1", "", Generation([[1, 2]], [], []), 0, tok)
    answer = page_answer("1", "", recorded([40], []), 0, tok)
    assert answer["steps"] == [] and answer["pieces"] == [tok.decode([40])]


def test_json_for_a_script_element_holds_no_character_that_ends_it():
    text = script_json({"a": [ESCAPE, HTML]})
    assert not re.search("[<>&\u2028\u2029]", text) and json.loads(text) == {"a": [ESCAPE, HTML]}


# The browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -r requirements-dev.txt")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as library:
        try:
            browser = library.chromium.launch(executable_path=program, args=[
                "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
                "--disable-sync", "--no-first-run"])
        except playwright.Error:
            pytest.skip("no browser: apt-get install chromium, or playwright install chromium")
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """opened(answers, **options of the browser's context) -> the page. What it logs or asks for fails the test."""
    contexts, wrong = [], []

    def opened(*answers, title="Steps", facts=None, edit=None, width=1280, height=900, **options):
        file = tmp_path / "steps.html"
        write_page(file, title, facts or {}, list(answers))
        if edit is not None:
            file.write_text(edit(file.read_text()))
        contexts.append(browser.new_context(viewport=dict(width=width, height=height), **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda request: wrong.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri())
        return page

    opened.wrong = wrong
    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def tokens_shown(page):
    """[text, source, step] of each token of the answer."""
    return page.evaluate("""[...document.querySelectorAll('#answer .token')].map(token => [
        token.textContent, ['head', 'copy', 'own'].find(name => token.classList.contains(name)),
        +token.dataset.step])""")


def nodes_shown(page):
    """The nodes of the tree by place: [text, probability or words, what the target said, classes, title, left, top]."""
    found = page.evaluate("""[...document.querySelectorAll('.node')].map(node => {
        const texts = [...node.querySelectorAll('bdi')].map(text => text.textContent);
        return [texts[0], node.querySelector('small').textContent, texts[1], [...node.classList].slice(1), node.title,
                node.offsetLeft, node.offsetTop]})""")
    return sorted(found, key=lambda node: (node[6], node[5]))


def color(page, selector, name, pseudo=""):
    return page.eval_on_selector(selector, f"element => getComputedStyle(element, '{pseudo}')['{name}']")


def title(page):
    return page.text_content("#step-title")


def test_every_token_shows_where_it_came_from(opened, tok):
    result = three_steps(tok)
    page = opened(page_answer("1", "What does the fox do?", result, 0, tok))
    texts = [tok.piece(i) for i in result.tokens[0][:-1]]
    sources = ["own", "head", "head", "own", "copy", "copy", "own", "own", "head"]
    assert tokens_shown(page) == [list(token) for token in zip([*texts, ""], sources, [0, 1, 1, 1, 2, 2, 2, 3, 4])]
    assert page.text_content("#answer") == tok.decode(result.tokens[0])
    assert page.text_content("#prompt") == "What does the fox do?"
    assert page.eval_on_selector("#answer [data-name]", "token => token.dataset.name") == "<|end|>"
    page.mouse.move(5, 5)
    colors = {source: color(page, f"#answer .{source}:not(.here) > .mark", "backgroundColor") for source in SOURCES}
    lines = {source: color(page, f"#answer .{source}:not(.here) > .mark", "borderBottomStyle") for source in SOURCES}
    widths = {source: color(page, f"#answer .{source}:not(.here) > .mark", "borderBottomWidth") for source in SOURCES}
    assert len(set(colors.values())) == 3
    assert [(lines[name], widths[name]) for name in SOURCES] == [("solid", "2px"), ("dashed", "2px"), ("solid", "0px")]
    keys = page.eval_on_selector_all("#sources li", "keys => keys.map(key => key.textContent.split(' ').join(' '))")
    assert [re.findall(r"\d+%?", key) for key in keys] == [["3", "33%"], ["2", "22%"], ["4", "44%"]]
    assert page.text_content("#length") == "2.25"       # 9 tokens in 4 steps, before the cut
    assert page.text_content("#wasted") == "50%" and page.text_content("#wasted-note") == "5 of 10"
    parts = page.eval_on_selector_all("#parts li b", "keys => keys.map(key => key.textContent)")
    assert parts == ["2.3 ms", "8.0 ms", "0.30 ms", "0.60 ms", "0.13 ms"]   # of four steps; the plain one drafts 0 ms


def test_the_step_under_the_pointer_shows_its_tree(opened, tok):
    page = opened(page_answer("1", "", three_steps(tok), 0, tok))
    page.hover("#answer [data-step='1']")
    assert title(page) == "Step 1 of 4"
    assert page.text_content("#said") == ("3 tokens: 2 drafted by the head, 1 the target's own. "
                                          "2 of 4 drafted nodes wasted. 13.4 ms.")
    nodes = nodes_shown(page)
    assert [node[:4] for node in nodes] == [
        ["the", "", "·quick", ["own", "kept"]], ["·quick", "20%", "·fox", ["head", "kept"]],
        ["·fox", "100%", "·jumps", ["head", "kept"]], ["·jumps", "", None, ["own", "kept"]],
        ["·dog", "62%", "·over", ["head"]], ["·lazy", "0.00%", "·dog", ["head"]]]
    assert [node[5] for node in nodes[:4]] == sorted({node[5] for node in nodes[:4]})       # a path from left to right
    assert [node[5] for node in nodes[4:]] == [node[5] for node in nodes[1:3]]              # in columns of depth
    assert nodes[1][4] == "·quick: depth 1, drafted, probability 20%, accepted; the target then says ·fox"
    assert nodes[4][4] == "·dog: depth 1, drafted, probability 62%, wasted; the target then says ·over"
    bars = page.eval_on_selector_all(".node hr", "bars => bars.map(bar => parseFloat(bar.style.width))")
    assert sorted(bars) == pytest.approx([20, 62.34, 100])
    kept, wasted = (color(page, f".node.head{kind}", "borderTopColor") for kind in (".kept", ":not(.kept)"))
    assert kept != wasted
    page.hover("#answer [data-step='2']")
    assert [node[:4] for node in nodes_shown(page)] == [
        ["·jumps", "", "·over", ["own", "kept"]], ["·over", "", "the", ["copy", "kept"]],
        ["the", "", "·lazy", ["copy", "kept"]], ["·lazy", "", None, ["own", "kept"]],
        ["·fox", "", "<|end|>", ["copy"]],
        ["·over", "50%", "the", ["head", "right"]], ["·dog", "25%", "·fox", ["head"]]]
    assert color(page, ".node.copy", "borderTopStyle") == "dashed"
    page.hover("#answer [data-step='3']")
    assert not nodes_shown(page) and "nothing was drafted" in page.text_content("#tree")
    assert page.eval_on_selector_all("#step-parts b", "keys => keys.map(key => key.textContent)") == [
        "–", "5.0 ms", "–", "–", "0.10 ms"]
    page.hover("#answer [data-step='0']")
    assert title(page) == "Prefill" and "prefill drafts nothing" in page.text_content("#tree")
    page.hover("#answer [data-step='4']")
    assert "The answer ends here: 1 token cut off." in page.text_content("#said")


def test_a_copied_branch_that_is_wasted_stands_apart_below_the_tree(opened, tok):
    result = random_steps(12, 6, n_copy=3)
    page = opened(page_answer("1", "", result, 0, tok))
    page.hover("#answer [data-step='1']")
    nodes = nodes_shown(page)
    copies, others = ([node[6] for node in nodes if ("copy" in node[3]) is copied] for copied in (True, False))
    assert len(copies) == 3 and len(set(copies)) == 1 and min(copies) - max(others) > 60
    label, = page.eval_on_selector_all(".branch", "found => found.map(label => [label.textContent, label.offsetTop])")
    assert label[0] == "copied from the text" and max(others) + 38 < label[1] < min(copies)


def test_text_that_looks_like_html_is_shown_and_not_run(opened, tok):
    bad, end = tok.encode(HTML), tok.encode("<|end|>")[0]
    assert len(bad) == 1 and tok.piece(bad[0]) == HTML
    ids = [*bad, *tok.encode(ESCAPE), *bad]
    steps = [Step("tree", [i, end], 0, MS, [bad[0], i, bad[0]], [0, 0, 1], [None, 0.5, 0.5], [i, bad[0], end], [1], 3)
             for i in ids[1:]]
    tokens = [ids[0], *(i for step in steps for i in step.tokens)]
    answer = page_answer(ESCAPE + HTML, ESCAPE + HTML, recorded(tokens, steps), 0, tok)
    page = opened(answer, answer, title=ESCAPE + "{{data}}", facts={ESCAPE: HTML, "number": 1234.5, "none": None})
    page.hover("#answer [data-step='1']")
    assert page.text_content("#answer") == HTML + ESCAPE + HTML
    assert page.text_content("#prompt") == ESCAPE + HTML
    assert nodes_shown(page)[0][0] == HTML.replace(" ", "·")
    assert page.title() == page.text_content("h1") == ESCAPE + "{{data}}"
    assert page.text_content("#facts") == ESCAPE + HTML + "number1,234.5"
    assert page.text_content("#select option") == ESCAPE + HTML
    assert page.evaluate("window.hacked === undefined && !document.querySelector('img')")
    assert page.evaluate("document.scripts.length") == 2


def test_the_policy_of_the_page_lets_no_other_script_run(opened, tok):
    answer = page_answer("1", "", three_steps(tok), 0, tok)

    def edit(text):
        return text.replace("</body>", "<script>window.hacked=1</script><b onclick='window.hacked=1'>b</b></body>")

    page = opened(answer, edit=edit)
    page.evaluate("document.querySelector('b').click()")
    assert page.evaluate("window.hacked === undefined") and title(page) == "Step 1 of 4"
    assert len(opened.wrong) == 2 and all("Content Security Policy" in line for line in opened.wrong)
    opened.wrong.clear()


def test_keys_go_from_step_to_step_and_focus_is_visible(opened, tok):
    page = opened(page_answer("1", "", three_steps(tok), 0, tok), page_answer("2", "", random_steps(50, 5), 0, tok))
    assert title(page) == "Step 1 of 4"     # the first that accepted something
    for key, shown in (("ArrowRight", "Step 2 of 4"), ("ArrowRight", "Step 3 of 4"), ("ArrowLeft", "Step 2 of 4"),
                       ("End", "Step 4 of 4"), ("ArrowRight", "Step 4 of 4"), ("Home", "Prefill"),
                       ("ArrowLeft", "Prefill"), ("ArrowRight", "Step 1 of 4")):
        page.keyboard.press(key)
        assert title(page) == shown
    assert page.eval_on_selector_all("#answer .here", "found => found.map(token => token.dataset.step)") == ["1"] * 3
    page.focus("#select")
    page.keyboard.press("End")      # the select's own key
    assert page.input_value("#select") == "1" and "of 4" not in title(page)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    stops = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        stop = page.evaluate("""(at => [at.id, getComputedStyle(at).outlineStyle,
                                        at.getAttribute('aria-label') || at.textContent])(document.activeElement)""")
        if stop[0]:
            assert stop[1] != "none" and stop[2] is not None, stop
            stops.add(stop[0])
    assert {"plot", "answer", "tree", "back", "next", "pin"} <= stops
    assert page.get_attribute("#plot", "role") == "slider"
    page.keyboard.press("End")
    n = len(page.evaluate("steps")) - 1
    assert page.get_attribute("#plot", "aria-valuenow") == page.get_attribute("#plot", "aria-valuemax") == str(n)


def test_a_click_keeps_a_step_and_escape_lets_go(opened, tok):
    page = opened(page_answer("1", "", three_steps(tok), 0, tok))
    page.click("#answer [data-step='2']")
    page.hover("#answer [data-step='1']")
    assert title(page) == "Step 2 of 4" and page.get_attribute("#pin", "aria-pressed") == "true"
    page.keyboard.press("Escape")
    page.hover("#answer [data-step='3']")
    assert title(page) == "Step 3 of 4" and page.get_attribute("#pin", "aria-pressed") == "false"
    page.click("#next")
    page.hover("#answer [data-step='1']")
    assert title(page) == "Step 4 of 4"
    box = page.locator("#plot").bounding_box()
    page.mouse.click(box["x"] + 0.3 * box["width"], box["y"] + 10)      # the second of four bars
    assert title(page) == "Step 2 of 4"


def test_a_second_answer_is_chosen_from_a_list_that_one_answer_does_not_need(opened, tok):
    first, second = (page_answer(name, name, result, 0, tok)
                     for name, result in (("one", three_steps(tok)), ("two", random_steps(30, 4))))
    assert opened(first).is_hidden("#select")
    page = opened(first, second)
    page.select_option("#select", label="two")
    assert page.text_content("#prompt") == "two" and len(tokens_shown(page)) == 30
    page.select_option("#select", label="one")
    assert page.text_content("#prompt") == "one" and len(tokens_shown(page)) == 9 and title(page) == "Step 1 of 4"


def test_answers_without_trees_or_steps_are_shown_too(opened, tok):
    plain = [Step("plain", [i], 0, {"step": 0.02}, [], [], [], [], [], 0) for i in (40, 41)]
    page = opened(page_answer("plain", "", recorded([39, 40, 41], plain), 0, tok),
                  page_answer("none", "", recorded([39], []), 0, tok))
    assert title(page) == "Step 1 of 2" and page.text_content("#wasted-note") == "nothing was drafted"
    page.select_option("#select", label="none")
    assert title(page) == "Prefill" and page.is_hidden("#chart")


def test_a_page_of_2000_tokens_and_trees_of_60_nodes_is_small_and_quick(opened, tok, tmp_path):
    answer = page_answer("1", "", random_steps(2000, 60, mean_length=1.6), 0, tok)
    assert len(answer["steps"]) > 1100
    start = time.perf_counter()
    page = opened(answer)
    assert (tmp_path / "steps.html").stat().st_size < 3_000_000
    assert len(tokens_shown(page)) == 2000
    seconds = time.perf_counter() - start
    assert seconds < 8, seconds
    took = page.evaluate("(() => { const start = performance.now(); for (let s = 1; s <= 50; s++) keep(s); "
                         "document.body.offsetHeight; return (performance.now() - start) / 50 })()")
    assert took < 100, took
    assert len(nodes_shown(page)) == 61


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_step_of_a_tap_without_scrolling_sideways(opened, tok, scheme):
    facts = {"checkpoint": "a-checkpoint-with-a-very-long-name-" * 3, "tokens/s": 123.4}
    result = random_steps(300, 60, mean_length=3, n_copy=8)
    answers = [page_answer(name, "word " * 60 + "x" * 200, result, 0, tok) for name in ("name " * 40, "two")]
    page = opened(*answers, facts=facts, title="long" * 40, width=390, height=844,
                  has_touch=True, is_mobile=True, device_scale_factor=2, color_scheme=scheme)
    token = page.locator("#answer [data-step='9']").first
    token.tap()
    assert title(page).startswith("Step 9 ")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.eval_on_selector("#tree", "tree => tree.scrollWidth > tree.clientWidth")    # scrolls in its own box
    box, sheet = token.bounding_box(), page.locator(".step").bounding_box()
    assert box["y"] + box["height"] <= sheet["y"] + 1 and sheet["y"] + sheet["height"] <= 845    # nothing is covered
    page.locator("#next").tap()
    assert title(page).startswith("Step 10 ")
    light = sum(map(int, re.findall(r"\d+", color(page, "body", "backgroundColor"))[:3])) > 3 * 128
    assert light == (scheme == "light")


# The command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("page") / "tiny", ascii_only=True)


def run(capsys, *argv):
    capsys.readouterr()
    status = cli.main(cli.parse_args(list(map(str, argv))))
    return status, *capsys.readouterr()


def test_generate_writes_a_page_of_what_it_answered(opened, checkpoint, tmp_path, capsys):
    file, report = tmp_path / "out.html", tmp_path / "out.json"
    status, _, err = run(capsys, "--checkpoint", checkpoint, "--dtype", "float32", "--max-new-tokens", 30, "--copy", 4,
                         "--prompt", "the fox, the fox", "the dog", "--page", file, "--json", report)
    assert status == 0 and err.splitlines()[-1] == f"wrote {file}"
    told = json.loads(report.read_text())
    data = json.loads(re.search(r'id="data">(.*?)</script>', file.read_text(), re.S)[1])
    assert [answer["tokens"] for answer in data["answers"]] == told["tokens"]
    assert ["".join(answer["pieces"]) for answer in data["answers"]] == told["text"]
    assert [[len(step["tokens"]) for step in answer["steps"]] for answer in data["answers"]] == told["accept_lengths"]
    assert [[step["copied"] for step in answer["steps"]] for answer in data["answers"]] == told["copied"]
    assert [answer["prompt"] for answer in data["answers"]] == ["the fox, the fox", "the dog"]
    facts = dict(data["facts"])
    assert [facts.get(name) for name in ("checkpoint", "dtype", "copied branch")] == ["tiny", "float32", 4]
    assert "head" not in facts
    page = opened(*data["answers"])
    assert page.text_content("#answer") == told["text"][0]


def test_pages_that_cannot_be_written_are_refused_before_the_work(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "load", lambda args: pytest.fail("loaded"))
    file = tmp_path / "out"
    for argv, words in ((["--page", tmp_path / "missing" / "x.html"], "--page"), (["--page", tmp_path], "--page"),
                        (["--interactive", "--page", file], "--page does not go with --interactive"),
                        (["--json", file, "--page", file], "--json and --page name the same file"),
                        (["--profile", file, "--page", file], "--profile and --page name the same file"),
                        (["--page", TEMPLATE], "template")):
        status, out, err = run(capsys, "--checkpoint", checkpoint, *argv)
        assert (status, out) == (2, "") and words in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())
