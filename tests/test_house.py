"""The plan of the house, and that its documents tell the truth: imports, lines, commands, examples, files to copy."""
import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import quantize
from benchmarks import record
from chat import encode
from decoder import generate
from eagle_head import EagleHead
from model import Transformer
from reference import tokens_of, write_checkpoint
from test_scripts import write_head
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCUMENTS = [README, CONTRIBUTING, *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("heads/*/README.md"))]
SOURCES = [file for folder in (".", "benchmarks", "scripts") for file in sorted((ROOT / folder).glob("*.py"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)


def blocks(text, language):
    """The fenced blocks of a Markdown text that are in this language."""
    return [content for name, content in BLOCK.findall(text) if name == language]


# Imports


def read_order(text):
    """The list of files under "The order of imports"."""
    return blocks(text.partition("## The order of imports")[2], "")[0].split()


def imports(file, folder):
    """(line, file imported, relative to folder) wherever the file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: a relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = name.replace(".", "/") + ".py"
            for place in (folder, file.parent):     # a script finds what lies beside it
                if (place / path).is_file():
                    yield node.lineno, str((place / path).relative_to(folder))
                    break


def forbidden(folder, order):
    """What is wrong with the imports of a tree of files, one line each."""
    files = {str(file.relative_to(folder)) for place in (".", "benchmarks", "scripts")
             for file in (folder / place).glob("*.py")}
    wrong = [f"{name} is not in the list" for name in sorted(files - set(order))]
    wrong += [f"{name} is in the list, and is no file" for name in order if name not in files]
    wrong += [f"{name} is in the list twice" for name in sorted(set(order)) if order.count(name) > 1]
    for name in order:
        if name in files:
            wrong += [f"{name}, line {line} imports {other}, which is not above it" for line, other in
                      imports(folder / name, folder) if other not in order[:order.index(name)]]
    return wrong


def test_imports_point_upwards_in_the_list_of_contributing():
    assert not forbidden(ROOT, read_order(CONTRIBUTING.read_text()))


@pytest.mark.parametrize("file,text,wrong", [
    ("b.py", "import os\nimport a\nfrom torch import nn", []),
    ("b.py", "def f(x: 'c.C'):\n    from a import A", []),                      # a string annotation imports nothing
    ("benchmarks/m.py", "import root\nfrom b import B", []),
    ("scripts/s.py", "import root\nfrom benchmarks.m import M\nfrom benchmarks import root as r", []),
    ("a.py", "from b import B", ["a.py, line 1 imports b.py, which is not above it"]),      # b imports a: a circle
    ("b.py", "def f():\n    import c", ["b.py, line 2 imports c.py, which is not above it"]),
    ("b.py", "if TYPE_CHECKING:\n    from c import C", ["b.py, line 2 imports c.py, which is not above it"]),
    ("c.py", "from scripts import s", ["c.py, line 1 imports scripts/s.py, which is not above it"]),
    ("benchmarks/m.py", "import scripts.s", ["benchmarks/m.py, line 1 imports scripts/s.py, which is not above it"]),
    ("d.py", "", ["d.py is not in the list"]),
    ("c.py", None, ["c.py is in the list, and is no file"]),
])
def test_the_import_check_finds_what_is_forbidden_in_a_made_up_tree(file, text, wrong, tmp_path):
    order = read_order("## The order of imports\n```\na.py  b.py\nc.py\n"
                       "benchmarks/root.py benchmarks/m.py scripts/root.py scripts/s.py\n```\n")
    for name in order:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("from a import A" if name == "b.py" else "")
    if text is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(text)
    assert forbidden(tmp_path, order) == wrong


# Lines and style


def test_files_of_the_core_are_short_and_lines_are_narrow():
    lines = {str(file.relative_to(ROOT)): file.read_text().splitlines()
             for file in (*SOURCES, *sorted((ROOT / "tests").glob("*.py")))}
    print("\n" + "\n".join(f"{len(text):6} {name}" for name, text in lines.items()))
    print(f"{sum(len(text) for name, text in lines.items() if not name.startswith('tests/')):6} without tests")
    assert not [f"{name}: {len(text)} lines" for name, text in lines.items() if "/" not in name and len(text) > 450]
    assert not [f"{name}, line {n}: {len(line)} columns" for name, text in lines.items()
                for n, line in enumerate(text, start=1) if len(line) > 120]
    assert len(README.read_text().splitlines()) <= 150


def test_ruff_finds_nothing():
    pytest.importorskip("ruff", reason="ruff is not installed")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# What the documents say


def commands(text):
    """The commands of a shell text, as lists of words: without comments and assignments, variables replaced."""
    variables = {}
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and (assignment := re.fullmatch(r"(\w+)=(.*)", words[0])):
            variables[f"${assignment[1]}"] = shlex.split(assignment[2])
            words.pop(0)
        if words:
            yield [part for word in words for part in variables.get(word, [word])]


def written_commands():
    """(where, words) of the documents' commands, and of those in the docstrings that open the sources."""
    for file in (*DOCUMENTS, *SOURCES):
        if file in DOCUMENTS:
            text = "".join(blocks(file.read_text(), "bash"))
        else:
            doc = ast.get_docstring(ast.parse(file.read_text())) or ""
            text = "\n".join(re.findall(r"^    ((?:[A-Z_]+=\S+ )*(?:python|torchrun|bash) (?:.*\\\n)*.*)", doc, re.M))
        options = {}    # "..." stands for those of the first command of the same script
        for words in commands(text):
            start = next((n for n, word in enumerate(words, start=1) if word.endswith((".py", ".sh"))), len(words))
            first = options.setdefault(words[start - 1], words[start:])
            yield file.name, words[:start] + [w for word in words[start:] for w in (first if word == "..." else [word])]


def parse(words):
    """Give a command's options to its own parser. Raises, or ends with SystemExit, where they do not fit."""
    program, *rest = words
    if program == "torchrun":
        start = next(n for n, word in enumerate(rest) if word.endswith(".py"))
        assert set(rest[:start:2]) <= {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port"}
        rest = rest[start:]
    elif program == "bash":
        script, = re.findall(r"^exec .*?(\S+\.py|pytest) .*\"\$@\"$", (ROOT / rest[0]).read_text(), re.M)
        rest[0] = script
    elif program == "python" and rest[0] == "-m":
        rest = rest[1:]
    elif program != "python":
        assert program in ("source", "cat", "ruff", "pyright", "vllm"), f"what is {program}?"
        return
    script, *options = rest
    if script in ("pytest", "sglang.launch_server"):
        return
    assert (ROOT / script).is_file(), f"{script} is no file"
    importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_args(options)


def test_every_command_of_the_documents_is_one_that_its_script_takes(capsys):
    wrong, count = [], 0
    for where, words in written_commands():
        count += 1
        try:
            parse(words)
        except (Exception, SystemExit) as error:
            wrong.append(f"{where}: {shlex.join(words)}: {capsys.readouterr().err or error!r}")
    assert not wrong, "\n".join(wrong)
    assert count > 60


@pytest.mark.parametrize("command", [
    "python generate.py --no-such-option", "python no_such_script.py", "pythn generate.py",
    "torchrun --nproc-per-node 2 generate.py --temperature hot", "torchrun --nproc 2 generate.py",
    "bash scripts/demo.sh --no-such-option", "bash scripts/no_such_script.sh"])
def test_a_command_that_its_script_does_not_take_is_found(command, capsys):
    (words,) = commands(f"CUDA_VISIBLE_DEVICES=0 {command}  # a comment")
    with pytest.raises((Exception, SystemExit)):
        parse(words)


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_the_python_blocks_of_documents_run(file, request, monkeypatch, capsys):
    found = blocks(file.read_text(), "python")
    assert found or file != README
    if found:
        request.getfixturevalue("demo_folder")
    monkeypatch.chdir(ROOT)
    for block in found:
        names = {}
        exec(compile(block, str(file), "exec"), names)
        assert capsys.readouterr().out


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_files_that_a_document_links_to_or_names_exist(file):
    text = file.read_text()
    links = {link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text) for link in link}
    missing = [link for link in links if link and "://" not in link and not (file.parent / link).exists()]
    named = re.findall(r"`(\w+\.py|(?:benchmarks|scripts|docs|tests|heads|dev)/[\w./-]+)`", text)
    places = [ROOT, ROOT / "scripts", ROOT / "benchmarks", ROOT / "tests"]
    assert not missing + [name for name in named if not any((place / name).exists() for place in places)]


def test_the_map_of_the_readme_names_what_is_there_and_every_file_of_the_root():
    (block,) = blocks(README.read_text().partition("## Files")[2], "")
    entries = [name for line in block.splitlines() if not line.startswith(" ") for name in
               re.split(r"\s{2,}", line)[0].split()]
    assert not [name for name in entries if not (ROOT / name).exists()]
    assert {file.name for file in ROOT.glob("*.py")} <= set(entries)
    assert {"scripts/", "benchmarks/", "docs/", "tests/", "heads/"} <= set(entries)


def test_the_first_figure_of_the_readme_is_that_of_its_report():
    file = ROOT / "benchmarks/results/cpu-2core-smollm2-mtbench-head-3/report.json"
    arms = json.loads(file.read_text())["overall"]
    plain, eagle = arms["plain"], arms["eagle-tuned"]
    low, high = eagle["speedup_interval"]
    assert (f"**plain decoding {plain['tokens_per_second']:.1f} tokens/s, EAGLE with copied drafts "
            f"{eagle['tokens_per_second']:.1f}, "
            f"{eagle['speedup']:.2f}x** (95% interval {low:.2f}-{high:.2f})") in README.read_text()
    assert [arms[arm]["divergences"] for arm in arms if "eagle" in arm] == [[], []]
    assert "**80 of 80 answers equal**" in README.read_text() and {arm["answers"] for arm in arms.values()} == {80}


def test_a_recording_shows_both_answers_whole_and_accepted_drafts_in_green(tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "target", ascii_only=True)
    tok, model = Tokenizer.from_pretrained(checkpoint), Transformer.from_pretrained(checkpoint, dtype=torch.float32)
    folder = write_head(EagleHead(replace(model.config, n_layer=1), model), tmp_path / "head")
    result = generate(model, [encode("the fox", tok, raw=False)], 60)
    (folder / "draft_vocab.json").write_text(json.dumps(sorted(set(result.tokens[0]))))
    args = record.parse_args(["--checkpoint", str(checkpoint), "--eagle", str(folder), "--dtype", "float32", "--prompt",
                              "the fox", "--max-new-tokens", "60", "--out", str(tmp_path / "demo.svg")])
    assert record.main(args) == 0, capsys.readouterr().err
    for file in (tmp_path / "demo.svg", ROOT / "docs/demo.svg"):
        lines = [line for line in ElementTree.parse(file).getroot() if line.get("x") and not line.get("class")]
        plain, eagle = ([span for line in lines if line.get("x") == x for span in line] for x in ("16", "456"))
        assert "".join(span.text or "" for span in plain) == "".join(span.text or "" for span in eagle)
        assert {span.get("class") for span in plain} == {""} and {span.get("class") for span in eagle} == {"", "draft"}
        assert file.stat().st_size < 200_000 and "<script" not in file.read_text()
        if file.parent == tmp_path:
            assert "".join(span.text or "" for span in plain) == tok.decode(result.tokens[0])


# Files to copy


def files_to_copy():
    """The rows of the README's table of files to copy."""
    table = README.read_text().partition("| for | copy |\n| --- | --- |\n")[2].partition("\n\n")[0]
    return [re.findall(r"`(\w+\.py)`", line) for line in table.splitlines()]


def absent_packages(*more):
    """The modules of requirements.txt that the README does not ask for beside the copied files, nor `more`."""
    sentence, = re.findall(r"^They need each other, ([^.]*)\.", README.read_text(), re.M)
    needed = {*re.findall(r"\w+", sentence), *more}
    names = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    return [name.replace("-", "_") for name in names if name not in needed]


def run_beside_copies(folder, files, absent, program, *arguments):
    """What a program prints, as JSON, in a folder with copies of these files, nothing else of the repository, and
    without the `absent` packages."""
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes((ROOT / name).read_bytes())
    (folder / "program.py").write_text(f"import json, sys\nsys.modules.update(dict.fromkeys({absent}))\nimport torch\n"
                                       + program)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "program.py", *map(str, arguments)], cwd=folder, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PLAIN = """
from model import Transformer, prefill
model = Transformer.from_pretrained(sys.argv[1], dtype=torch.float32)
tokens = json.loads(sys.argv[2])
model.setup_caches(1, len(tokens) + 40)
with torch.inference_mode():
    list(prefill(model, [tokens]))      # all but the last token
    for position in range(len(tokens) - 1, len(tokens) + 39):
        logits, _ = model(torch.tensor([tokens[-1:]]), torch.tensor([position]))
        tokens.append(int(logits[0, -1].argmax()))
print(json.dumps(tokens[-40:]))
"""

EAGLE = """
from decoder import generate
from eagle_head import EagleHead
from model import Transformer
model = Transformer.from_pretrained(sys.argv[1], dtype=torch.float32)
head = EagleHead.from_pretrained(sys.argv[3], target=model)
head.set_draft_vocab(json.loads(sys.argv[4]))
result = generate(model, [json.loads(sys.argv[2])], 40, head=head)
print(json.dumps([result.tokens[0], result.accept_lengths[0]]))
"""

TEXT = """
from tokenizer import Tokenizer
tok = Tokenizer.from_pretrained(sys.argv[1])
ids = tok.apply_chat_template([{"role": "user", "content": "the lazy dog"}])
print(json.dumps([ids, tok.decode(ids)]))
"""


def test_the_files_that_the_readme_says_to_copy_decode_by_themselves(tmp_path):
    model_files, decoding, text, *_ = files_to_copy()
    checkpoint = write_checkpoint(tmp_path / "target")
    model = Transformer.from_pretrained(checkpoint, dtype=torch.float32)
    folder = write_head(EagleHead(replace(model.config, n_layer=1), model), tmp_path / "head")
    prompt = tokens_of(12)
    plain = generate(model, [prompt], 40)
    head, vocab = EagleHead.from_pretrained(folder, target=model), sorted(set(plain.tokens[0]))[:8]
    head.set_draft_vocab(vocab)     # of few tokens, so that a random head finds some of them
    eagle = generate(model, [prompt], 40, head=head)
    assert plain.tokens == eagle.tokens and max(eagle.accept_lengths[0]) > 1
    absent = absent_packages()
    assert {"tokenizers", "jinja2", "huggingface_hub"} <= set(absent)
    assert run_beside_copies(tmp_path / "plain", model_files, absent, PLAIN, checkpoint, prompt) == plain.tokens[0]
    assert (run_beside_copies(tmp_path / "eagle", model_files + decoding, absent, EAGLE, checkpoint, prompt, folder,
                              vocab) == [eagle.tokens[0], eagle.accept_lengths[0]])
    int8 = tmp_path / "int8"
    args = quantize.parse_args(["--checkpoint", str(checkpoint), "--mode", "int8", "--out", str(int8)])
    assert quantize.main(args) == 0
    rounded = generate(Transformer.from_pretrained(int8, dtype=torch.float32), [prompt], 40)
    assert run_beside_copies(tmp_path / "eagle8", model_files + decoding, absent, EAGLE, int8, prompt, folder,
                             vocab)[0] == rounded.tokens[0]
    tok = Tokenizer.from_pretrained(checkpoint)
    ids = tok.apply_chat_template([{"role": "user", "content": "the lazy dog"}])
    absent = absent_packages("tokenizers", "jinja2")
    assert run_beside_copies(tmp_path / "text", text, absent, TEXT, checkpoint) == [ids, tok.decode(ids)]
