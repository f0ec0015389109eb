"""The command line of generate.py: what it writes where, its exit status, and every input it must refuse.

    python -m pytest tests/test_cli.py -q

In this process where that shows the law, as a child process where signals, pipes and terminals matter. The
checkpoints are tiny random models with a byte-level tokenizer.
"""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint as checkpoint_file
import generate as cli
from chat import Printer, StopTexts
from generate import generate
from model import Transformer
from reference import CONTEXT, edited_json, read_safetensors, write_checkpoint
from tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
FIELDS = """checkpoint eagle device device_name dtype torch compiled tree temperature top_k top_p seed exact
            prompt_tokens new_tokens tokens text finish_reason target_passes accept_lengths mean_accept_length
            load_seconds compile_seconds prefill_seconds decode_seconds tokens_per_second peak_memory_bytes""".split()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Not to be written into."""
    return write_checkpoint(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


@pytest.fixture
def answer(run, checkpoint, tmp_path):
    """answer(*argv) -> (the JSON report, stdout) of a run that succeeds."""

    def answer(*argv, model=checkpoint):
        file = tmp_path / "report.json"
        status, out, err = run("--checkpoint", model, "--dtype", "float32", "--json", file, "--max-new-tokens", 12,
                               *argv)
        assert status == 0, err

        def refuse(constant):
            raise AssertionError(f"{constant} is not JSON")

        return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse), out

    return answer


@pytest.fixture
def refused(run, tmp_path):
    """refused(*argv, names=[...]): status 2, one line that names the culprit, nothing on stdout, no file touched."""

    def refused(*argv, names=()):
        before = tree(tmp_path)
        report = [] if "--json" in argv or "--interactive" in argv else ["--json", tmp_path / "report.json"]
        status, out, err = run(*argv, *report)
        assert_one_error_line(status, out, err, names)
        assert tree(tmp_path) == before

    return refused


def assert_one_error_line(status, out, err, names):
    assert (status, out) == (2, ""), err
    assert err.endswith("\n") and len(err.splitlines()) == 1, err
    assert err.startswith("error: ") and "Traceback" not in err
    for name in [names] if isinstance(names, str) else names:
        assert str(name) in err, err


def tree(folder):
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def tokens_and_text(folder, prompts, n=12, **options):
    """What the library says that the command line should answer."""
    tokenizer, model = Tokenizer.from_pretrained(folder), Transformer.from_pretrained(folder, dtype=torch.float32)
    ids = generate(model, prompts, n, stop_ids=tokenizer.stop_ids, **options).tokens
    return ids, [tokenizer.decode(row) for row in ids]


def chat_ids(folder, *texts):
    """Prompt ids of a conversation: user, assistant, user, ..."""
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    return Tokenizer.from_pretrained(folder).apply_chat_template(messages)


# --- a run that succeeds ----------------------------------------------------------------------------------------------

def test_the_report_holds_the_fields_of_the_contract_and_they_agree(answer, checkpoint):
    report, _ = answer("--prompt", "hello there", "and you?", "--max-seq-length", 200)
    assert sorted(report) == sorted(FIELDS)
    prompts = [chat_ids(checkpoint, "hello there"), chat_ids(checkpoint, "and you?")]
    ids, texts = tokens_and_text(checkpoint, prompts)
    assert (report["tokens"], report["text"]) == (ids, texts)
    assert report["prompt_tokens"] == list(map(len, prompts))
    assert report["new_tokens"] == [12, 12] == [1 + sum(lengths) for lengths in report["accept_lengths"]]
    assert report["finish_reason"] == ["length", "length"]
    assert report["target_passes"] == 11 and report["mean_accept_length"] == 1
    assert report["tokens_per_second"] == pytest.approx(24 / report["decode_seconds"])
    assert all(report[f"{phase}_seconds"] >= 0 for phase in ("load", "compile", "prefill", "decode"))
    assert report["peak_memory_bytes"] > 1 << 20
    facts = dict(checkpoint=str(checkpoint), eagle=None, device="cpu", dtype="float32", torch=torch.__version__,
                 compiled=False, tree=None, temperature=0, top_k=None, top_p=None, seed=None)
    assert {key: report[key] for key in facts} == facts and report["device_name"]


def test_the_report_repeats_the_sampling_options_and_the_seed(answer):
    options = dict(temperature=0.7, top_k=20, top_p=0.9, seed=3)
    argv = ["--temperature", 0.7, "--top-k", 20, "--top-p", 0.9, "--prompt", "hi"]
    report, _ = answer(*argv, "--seed", 3)
    assert {key: report[key] for key in options} == options
    assert answer(*argv, "--seed", 3)[0]["tokens"] == report["tokens"] != answer(*argv, "--seed", 4)[0]["tokens"]


def test_without_a_seed_each_run_draws_a_text_of_its_own_and_reports_what_repeats_it(answer):
    argv = ["--temperature", 2, "--prompt", "hi"]
    reports = []
    for _ in range(2):
        torch.manual_seed(0)  # as every process begins: torch's default is a constant
        reports.append(answer(*argv)[0])
    assert reports[0]["tokens"] != reports[1]["tokens"]
    assert answer(*argv, "--seed", reports[0]["seed"])[0]["tokens"] == reports[0]["tokens"]


def test_stdout_is_the_text_of_the_report_and_one_newline(answer):
    for prompt in ("hello", "The quick brown", "héllo wörld 你好"):
        report, out = answer("--prompt", prompt, "--max-new-tokens", 80)
        assert out == report["text"][0] + "\n" and len(report["text"][0]) > 20


def test_the_text_streams_token_by_token(run, talker, monkeypatch):
    pieces = []
    monkeypatch.setattr(Printer, "_put", lambda self, row, text: pieces.append(text))
    run("--checkpoint", talker, "--prompt", "hi", "--max-new-tokens", 12)
    assert [len(text) for text in pieces if text] == [1] * 12


def test_several_prompts_are_answered_in_one_batch_each_as_it_would_be_alone(answer):
    texts = ["hello", "The quick brown fox jumps", "a"]
    report, out = answer("--prompt", texts[0], texts[1], "--prompt", texts[2])
    assert out == "".join(f"[{n + 1}] {text}\n" for n, text in enumerate(report["text"]))
    assert report["text"] == [answer("--prompt", text)[0]["text"][0] for text in texts]


def test_copying_needs_no_head_and_changes_no_token(answer):
    texts = ["--raw", "--prompt", "abc abc abc", "the quick", "--max-new-tokens", 90]
    plain, copied = answer(*texts)[0], answer(*texts, "--copy", 6)[0]
    assert copied["tokens"] == plain["tokens"] and "copy" not in plain and copied["copy"] == 6
    assert [*map(len, copied["copied"])] == [*map(len, copied["accept_lengths"])]
    assert copied["eagle"] is None and copied["tree"] is None


def test_in_bfloat16_answers_are_the_same_with_a_copied_branch_unless_no_exact_is_asked_for(answer):
    texts = ["--raw", "--prompt", "abc abc abc", "--max-new-tokens", 40, "--dtype", "bfloat16"]
    plain, copied = answer(*texts)[0], answer(*texts, "--copy", 6)[0]
    assert copied["tokens"] == plain["tokens"] and plain["exact"] and copied["exact"]
    assert not answer(*texts, "--no-exact")[0]["exact"]


def test_the_answer_ends_with_a_stop_token_that_leaves_no_text(answer, broken):
    ids = answer("--prompt", "hi", model=broken)[0]["tokens"][0]
    stop = ids[6]
    for config in ("config.json", "generation_config.json"):
        with edited_json(broken / config) as content:
            content["eos_token_id"] = [stop]
    report, out = answer("--prompt", "hi", model=broken)
    assert report["tokens"] == [ids[:ids.index(stop) + 1]] and report["finish_reason"] == ["stop"]
    assert out == report["text"][0] + "\n"


def test_raw_continues_the_text_without_a_chat_template(answer, checkpoint):
    prompt = Tokenizer.from_pretrained(checkpoint).encode("The quick")
    report, _ = answer("--prompt", "The quick", "--raw")
    assert report["prompt_tokens"] == [len(prompt)]
    assert report["tokens"] == tokens_and_text(checkpoint, [prompt])[0]


def test_raw_needs_no_chat_template(answer, broken):
    with edited_json(broken / "tokenizer_config.json") as content:
        del content["chat_template"]
    assert answer("--prompt", "hi", "--raw", model=broken)[0]["new_tokens"] == [12]


def test_a_chat_template_may_be_named_instead_of_that_of_the_checkpoint(answer, checkpoint, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")
    prompt = Tokenizer.from_pretrained(checkpoint).encode("hi!")
    assert answer("--prompt", "hi", "--chat-template", tmp_path / "own.jinja")[0]["prompt_tokens"] == [len(prompt)]


def test_a_prompt_file_is_one_prompt(answer, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("first line\n\nsecond line: ümlaut\n", encoding="utf-8")
    assert (answer("--prompt-file", file)[0]["tokens"]
            == answer("--prompt", "first line\n\nsecond line: ümlaut")[0]["tokens"])


def test_a_raw_prompt_is_the_text_of_its_file_and_a_question_ends_before_the_last_line_feed(answer, checkpoint,
                                                                                            tmp_path):
    file, text = tmp_path / "prompt.txt", "def f(x):\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    raw = Tokenizer.from_pretrained(checkpoint).encode(text)
    assert answer("--prompt-file", file, "--raw")[0]["prompt_tokens"] == [len(raw)]
    assert answer("--prompt", text, "--raw")[0]["prompt_tokens"] == [len(raw)]
    assert answer("--prompt-file", file)[0]["prompt_tokens"] == [len(chat_ids(checkpoint, text.strip()))]


def test_raw_text_joins_on_to_the_prompt_and_brings_one_bos(answer, tmp_path, checkpoint):
    """With a decoder that drops a first space, as SentencePiece's do."""
    folder = shutil.copytree(checkpoint, tmp_path / "spaces")
    with edited_json(folder / "tokenizer.json") as content:
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        content["decoder"] = {"type": "Sequence", "decoders": [content["decoder"], {"type": "Fuse"}, strip]}
        first, text = {"SpecialToken": {"id": "<|user|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing", "single": [first, text], "pair": [first, text],
            "special_tokens": {"<|user|>": {"id": "<|user|>", "ids": [0], "tokens": ["<|user|>"]}}}
    with edited_json(folder / "tokenizer_config.json") as content:
        content["bos_token"] = "<|user|>"
    tok = Tokenizer.from_pretrained(folder)
    space = tok.encode(" ")[0]
    prompt = tok.encode("once", bos=True)
    stop = StopTexts(tok, ["b"], goes_on=True)
    new = [space, *tok.encode("ab")]
    assert tok.decode(prompt) + stop.decode(new, prompt) == "once a" == tok.decode(prompt + new)[:-1]
    printer, seen = Printer(stop, [prompt]), []
    printer._put = lambda row, text: seen.append(text)
    printer(0, new, 1)
    assert "".join(seen) == " a"
    report, out = answer("--raw", "--prompt", "once", model=folder)
    assert "once" + report["text"][0] == tok.decode(prompt + report["tokens"][0]) and out == report["text"][0] + "\n"
    once = answer("--raw", "--prompt", "<|user|>once", model=folder)[0]
    assert once["prompt_tokens"] == report["prompt_tokens"] == [len(prompt)] and once["tokens"] == report["tokens"]


def test_a_system_message_template_arguments_and_plain_text_reach_the_template(answer, checkpoint, tmp_path):
    tok = Tokenizer.from_pretrained(checkpoint)
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ mood }}")
    report, _ = answer("--prompt", "hi", "ho", "--system", "Be brief.", "--chat-template", tmp_path / "own.jinja",
                       "--template-args", '{"mood": "calm"}')
    assert report["prompt_tokens"] == [len(tok.encode("system: Be brief.\nuser: hi\ncalm"))] * 2
    marked = [{"role": "user", "content": "a<|end|>b"}]
    special, plain = tok.apply_chat_template(marked), tok.apply_chat_template(marked, plain_text=True)
    assert len(special) < len(plain)
    assert answer("--prompt", "a<|end|>b")[0]["prompt_tokens"] == [len(special)]
    assert answer("--prompt", "a<|end|>b", "--plain-text")[0]["prompt_tokens"] == [len(plain)]


@pytest.mark.parametrize("asked, said", [
    ({"repetition_penalty": 1.1, "do_sample": True}, "repetition_penalty 1.1: not applied"),
    ({"no_repeat_ngram_size": 3, "suppress_tokens": [1]}, "no_repeat_ngram_size 3, suppress_tokens: not applied"),
    ({"repetition_penalty": 1.0, "num_beams": 1, "suppress_tokens": None, "temperature": 0.6}, None)])
def test_what_generation_config_asks_for_and_is_not_applied_is_said(asked, said, capsys):
    cli.say_not_applied(asked)
    err = capsys.readouterr().err
    assert err.count("\n") == (said is not None) and (said or "") in err


# --- texts that end an answer -----------------------------------------------------------------------------------------

def first_end(tok, ids, stops):
    """The slow and obvious way: how many tokens there are when a stop text is first in the text; None if never."""
    return next((n for n in range(1, len(ids) + 1) if any(stop in tok.decode(ids[:n]) for stop in stops)), None)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stop_text_cuts_where_plain_decoding_stops_with_any_tree_in_each_row(talker, temperature):
    from draft_tree import DynamicTree, StaticTree
    from test_eagle_lossless import head_of

    tok, model = Tokenizer.from_pretrained(talker), Transformer.from_pretrained(talker, dtype=torch.float32)
    prompts = [chat_ids(talker, text) for text in ("hello", "The quick brown fox", "a")]
    options = dict(temperature=temperature, seed=2)
    with torch.no_grad():
        head = head_of(model)
        for tree in (None, StaticTree.paper(), StaticTree.chain(3), DynamicTree(3, 3, 8)):
            drafting = {} if tree is None else dict(head=head, tree=tree)
            if tree is None or temperature:
                head.tell([])
                whole = generate(model, prompts, 30, **options, **drafting).tokens     # its draws are the tree's own
            if temperature == 0:
                head.tell([prompt + row for prompt, row in zip(prompts, whole)])    # blocks of several accepted drafts
            stops = [tok.decode(whole[0][8:10]), tok.decode(whole[1][3:6]), tok.decode(whole[0][9:13])]
            ends = [first_end(tok, row, stops) for row in whole]
            stopped = generate(model, prompts, 30, stop=StopTexts(tok, stops), **options, **drafting)
            rows = [row[:end] for row, end in zip(whole, ends)]
            if temperature == 0:
                assert stopped.tokens == rows
            else:   # rows share the draws: those of the others go on as long as all rows run
                assert stopped.tokens[min(range(3), key=lambda row: ends[row] or 99)] == min(rows, key=len)
            assert stopped.finish_reason[0] == "stop"
            if tree is not None and temperature == 0:
                assert max(map(max, stopped.accept_lengths)) > 2


@pytest.mark.parametrize("pieces, stops, shown", [
    (["one", "\n", "\nUs", "er: x"], ["\n\nUser:"], ["one", "", "", ""]),
    (["one", "\n", "two\n", "\n"], ["\n\n"], ["one", "", "\ntwo", ""]),
    (["ab", "ac", "ad"], ["abad"], ["", "abac", "ad"]),                 # what looked like a beginning, and was none
    (["xab"], ["b", "abc"], ["xa"]),                                    # the longer one is not there
    (["xabc"], ["b", "abc"], ["xa"]),                                   # nor here, where the first to be whole ends it
    (["caf", "\u00e9", " noir"], ["\u00e9 n"], ["caf", "", ""])])
def test_no_part_of_a_stop_text_is_printed_and_all_else_is(checkpoint, pieces, stops, shown):
    tok = Tokenizer.from_pretrained(checkpoint)
    stop, seen = StopTexts(tok, stops), []
    printer, ends = Printer(stop, [[1]]), stop([1])
    printer._put = lambda row, text: seen.append(text)
    told, ended = [], False
    assert StopTexts(tok, ["b", "abc"]).cut("xabc") == "x"      # one token may bring both
    for n, (piece, part) in enumerate(zip(pieces, shown), start=1):
        seen.clear()
        ids = []
        for token in tok.encode(piece):
            ids.append(token)
            if ended := ends(token):
                break
        told += ids
        printer(0, ids, len(ids) // 2)
        if ended or n == len(pieces):
            printer.close()
        assert "".join(seen) == part, (piece, seen)
        if ended:
            break
    assert ended == any(text in "".join(pieces) for text in stops)
    assert stop.decode(told, []) == "".join(shown)


def test_a_stop_text_ends_answer_report_and_stream_alike(answer):
    text = answer("--prompt", "hello", "--max-new-tokens", 40)[0]["text"][0]
    stop = text[9:12]
    report, out = answer("--prompt", "hello", "--max-new-tokens", 40, "--stop", "never said", "--stop", stop)
    assert report["text"] == [text[:text.index(stop)]] and out == report["text"][0] + "\n"
    assert report["finish_reason"] == ["stop"] and report["new_tokens"][0] < 40


def test_a_special_token_may_be_named_as_a_stop_text(checkpoint):
    tok = Tokenizer.from_pretrained(checkpoint)
    ends = StopTexts(tok, ["<|end|>"])([1])
    assert [ends(i) for i in [*tok.encode("a"), *tok.encode("<|end|>")]] == [False, True]


def test_max_seq_length_bounds_prompt_and_answer_together(answer, checkpoint):
    report, _ = answer("--prompt", "hi", "--max-seq-length", 9, "--max-new-tokens", 100)
    assert report["new_tokens"] == [9 - len(chat_ids(checkpoint, "hi"))]


def test_the_context_of_the_model_bounds_the_answer(answer, broken):
    configure(max_position_embeddings=40)(broken)
    report, _ = answer("--prompt", "hi", "--max-new-tokens", 10 ** 9, model=broken)
    assert report["new_tokens"] == [40 - len(chat_ids(broken, "hi"))]


@pytest.mark.parametrize("status", [0, 2])
def test_no_checkpoint_means_the_demo_model_which_a_child_fetches(run, checkpoint, monkeypatch, tmp_path, status):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/download.py").write_text(f"""
import os, sys
print("fetching", file=sys.stderr)
assert sys.argv[1:] == ["--demo"]
if {status}:
    sys.exit(print("error: no network", file=sys.stderr) or {status})
os.symlink({str(checkpoint)!r}, {str(tmp_path / "demo")!r})
print({str(tmp_path / "demo")!r})
""")
    monkeypatch.setattr(checkpoint_file, "REPOSITORY", tmp_path)
    monkeypatch.setattr(checkpoint_file, "DEMO_FOLDER", tmp_path / "demo")
    code, out, err = run("--max-new-tokens", 4)
    assert code == status and "fetching" in err and "fetching" not in out and str(tmp_path) not in out
    assert err.count("error") == status // 2 and ("error: no network" in err) == (status == 2)


def test_without_the_repository_a_checkpoint_must_be_named(run, monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint_file, "REPOSITORY", tmp_path)
    monkeypatch.setattr(checkpoint_file, "DEMO_FOLDER", tmp_path / "demo")
    code, out, err = run("--max-new-tokens", 4)
    assert code == 2 and out == "" and err.count("\n") == 1 and "--checkpoint" in err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_answers_too(answer, dtype):
    report, _ = answer("--prompt", "hi", "--dtype", dtype)
    assert report["dtype"] == dtype and report["new_tokens"] == [12]


def test_profile_writes_a_trace_and_nothing_beside_it(answer, tmp_path):
    answer("--prompt", "hi", "--profile", tmp_path / "trace.json")
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert any("scaled_dot_product" in event.get("name", "") for event in trace["traceEvents"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.json", "trace.json"]


def test_ctrl_c_leaves_no_report_and_no_trace(run, checkpoint, tmp_path, monkeypatch):
    def interrupted(printer, row, ids, n_draft):
        raise KeyboardInterrupt

    monkeypatch.setattr(Printer, "__call__", interrupted)
    status, _, err = run("--checkpoint", checkpoint, "--prompt", "hi", "--json", tmp_path / "report.json",
                         "--profile", tmp_path / "trace.json")
    assert status == 130 and not list(tmp_path.iterdir()) and "Traceback" not in err


def test_json_replaces_an_older_report_and_leaves_nothing_beside_it(answer, tmp_path):
    (tmp_path / "report.json").write_text("old")
    answer("--prompt", "hi")
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


# --- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("argv, names", [
    (["--temperature", "-1"], ["--temperature", "'-1'"]),
    (["--temperature", "abc"], ["--temperature", "'abc'"]),
    (["--temperature", "nan"], ["--temperature", "'nan'"]),
    (["--temperature", "inf"], ["--temperature", "'inf'"]),
    (["--top-p", "0"], ["--top-p", "'0'"]),
    (["--top-p", "1.5"], ["--top-p", "'1.5'"]),
    (["--top-p", "half"], ["--top-p", "'half'"]),
    (["--top-k", "0"], ["--top-k", "'0'"]),
    (["--top-k", "2.5"], ["--top-k", "'2.5'"]),
    (["--max-new-tokens", "0"], ["--max-new-tokens", "'0'"]),
    (["--max-new-tokens", "many"], ["--max-new-tokens", "'many'"]),
    (["--max-seq-length", "-5"], ["--max-seq-length", "'-5'"]),
    (["--seed", "-1"], ["--seed", "'-1'"]),
    (["--seed", "99999999999999999999999"], ["--seed", "99999999999999999999999"]),
    (["--dtype", "int3"], ["--dtype", "int3"]),
    (["--device", "nonsense"], ["--device", "nonsense"]),
    (["--device", "cpu:x"], ["--device", "cpu:x"]),
    (["--device", "meta"], ["--device", "meta"]),
    (["--copy", "0"], ["--copy", "'0'"]),
    (["--copy", "some"], ["--copy", "'some'"]),
    (["--exact", "--dtype", "float32"], ["exact", "float32"]),
    (["--exact", "--compile"], ["--exact", "--compile"]),
    (["--frobnicate"], ["--frobnicate"]),
    (["--prompt"], ["--prompt"]),
    (["--chat-template", "no-such"], ["no-such"]),
    (["--template-args", "[1]"], ["--template-args", "[1]"]),
    (["--template-args", "{"], ["--template-args"]),
    (["--template-args", '{"messages": 1}'], ["messages"]),
    (["--stop", ""], ["--stop"]),
    (["--stop", "\udce9"], ["--stop", "UTF-8"]),
    (["--prompt", "\udce9"], ["--prompt", "UTF-8"]),
    (["--system", "\udce9"], ["--system", "UTF-8"]),
    (["--raw", "--system", "x"], ["--system", "--raw"]),
    (["--raw", "--template-args", "{}"], ["--template-args", "--raw"]),
    (["--raw", "--plain-text"], ["--plain-text", "--raw"]),
], ids=" ".join)
def test_a_bad_option_value_is_refused_by_name(refused, checkpoint, argv, names):
    prompt = [] if argv == ["--prompt"] else ["--prompt", "hi"]
    refused("--checkpoint", checkpoint, *prompt, *argv, names=names)


def test_a_stray_argument_is_refused_by_name(refused, checkpoint):
    refused("stray", "--checkpoint", checkpoint, "--prompt", "hi", names="stray")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_is_refused_where_there_is_none(refused, checkpoint, device):
    refused("--checkpoint", checkpoint, "--prompt", "hi", "--device", device, names=["--device", device])


def test_a_missing_checkpoint_folder_is_refused_by_name(refused, tmp_path):
    refused("--checkpoint", tmp_path / "nowhere", "--prompt", "hi", names="nowhere")
    refused("--checkpoint", "", "--prompt", "hi")


def test_a_hub_id_without_network_is_refused_by_name(refused, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refused("--checkpoint", "nobody/no-such-model", "--prompt", "hi", names=["nobody/no-such-model", "network"])


def test_a_head_that_is_missing_or_no_head_is_refused_by_name(refused, checkpoint, tmp_path):
    refused("--checkpoint", checkpoint, "--prompt", "hi", "--eagle", tmp_path / "nowhere", names="nowhere")
    refused("--checkpoint", checkpoint, "--prompt", "hi", "--eagle", names=str(checkpoint))  # none ships for this model


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(name, part):
    def edit(folder):
        os.truncate(folder / name, int(part * (folder / name).stat().st_size))
    return edit


def rewrite(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def configure(file="config.json", **keys):
    def edit(folder):
        with edited_json(folder / file) as content:
            content.update(keys)
    return edit


DAMAGES = {
    "no weights": (remove("model.safetensors"), "model.safetensors"),
    "empty weights": (truncate("model.safetensors", 0), "model.safetensors"),
    "weights cut in the header": (truncate("model.safetensors", 0.01), "model.safetensors"),
    "weights cut in the middle": (truncate("model.safetensors", 0.5), "model.safetensors"),
    "weights cut near the end": (truncate("model.safetensors", 0.999), "model.safetensors"),
    "weights of another shape": (configure(intermediate_size=64), ["mlp.", "56", "64"]),
    "another vocabulary": (configure(vocab_size=298), ["299", "298"]),
    "a layer too many": (configure(num_hidden_layers=3), "model.layers.2."),
    "a layer too few": (configure(num_hidden_layers=1), "model.layers.1."),
    "unknown architecture": (configure(model_type="mamba"), ["model_type", "mamba"]),
    "no architecture": (rewrite("config.json", b"{}"), "model_type"),
    "unknown rope type": (configure(rope_scaling={"rope_type": "mrope", "factor": 4.0}), ["rope", "mrope"]),
    "unknown activation": (configure(hidden_act="gelu"), ["hidden_act", "gelu"]),
    "no config.json": (remove("config.json"), "config.json"),
    "half a config.json": (truncate("config.json", 0.5), "config.json"),
    "config.json of bytes": (rewrite("config.json", b"\xff\xfe\x00"), "config.json"),
    "config.json of a list": (rewrite("config.json", b"[1]"), "config.json"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer"),
    "half a tokenizer.json": (truncate("tokenizer.json", 0.5), "tokenizer.json"),
    "empty tokenizer.json": (truncate("tokenizer.json", 0), "tokenizer.json"),
    "half a tokenizer_config.json": (truncate("tokenizer_config.json", 0.5), "tokenizer_config.json"),
    "half a generation_config.json": (truncate("generation_config.json", 0.5), "generation_config.json"),
    "no chat template": (configure("tokenizer_config.json", chat_template=None), ["chat template", "--raw"]),
    "half a chat template": (configure("tokenizer_config.json", chat_template="{% for"), "chat template"),
    "a chat template that refuses": (
        configure("tokenizer_config.json", chat_template="{{ raise_exception('not\nthis') }}"), "not this"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_file_and_value(refused, broken, name):
    damage, names = DAMAGES[name]
    damage(broken)
    refused("--checkpoint", broken, "--prompt", "hi", names=names)


def test_a_tokenizer_with_more_ids_than_the_model_has_is_refused_where_it_matters(refused, answer, broken):
    from safetensors.torch import save_file

    with edited_json(broken / "config.json") as config:
        config["vocab_size"] = 250
    weights = read_safetensors(broken / "model.safetensors")
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[key] = weights[key][:250].clone()
    save_file(weights, broken / "model.safetensors")
    assert answer("--prompt", "abc", model=broken)[0]["new_tokens"] == [12]  # ids below 250 only
    refused("--checkpoint", broken, "--prompt", "the other dog", names=["250"])  # merged tokens have higher ones


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_an_empty_prompt_is_refused(refused, checkpoint, tmp_path, text):
    refused("--checkpoint", checkpoint, "--prompt", text, names="prompt is empty")
    refused("--checkpoint", checkpoint, "--prompt", "hi", text, names="prompt is empty")
    (tmp_path / "blank.txt").write_text(text)
    refused("--checkpoint", checkpoint, "--prompt-file", tmp_path / "blank.txt", names="empty")


def test_a_prompt_file_that_cannot_be_read_is_refused_by_name(refused, checkpoint, tmp_path):
    (tmp_path / "latin1.txt").write_bytes("Gr\xfc\xdfe".encode("latin-1"))
    for name in ("missing.txt", "latin1.txt", "."):
        refused("--checkpoint", checkpoint, "--prompt-file", tmp_path / name, names=str(tmp_path / name))


def test_a_prompt_and_a_prompt_file_together_are_refused(refused, checkpoint, tmp_path):
    (tmp_path / "prompt.txt").write_text("hi")
    refused("--checkpoint", checkpoint, "--prompt", "hi", "--prompt-file", tmp_path / "prompt.txt",
            names=["--prompt", "--prompt-file"])


def test_a_prompt_longer_than_the_context_is_refused_with_both_lengths(refused, checkpoint):
    long = "x" * 600
    length = len(chat_ids(checkpoint, long))
    refused("--checkpoint", checkpoint, "--prompt", long, names=[length, CONTEXT])
    refused("--checkpoint", checkpoint, "--prompt", "hi", long, names=[length, CONTEXT])
    refused("--checkpoint", checkpoint, "--prompt", "x" * 60, "--max-seq-length", 20, names=[20])
    refused("--checkpoint", checkpoint, "--prompt", "x" * 60, "--max-seq-length", 2, names=[2])


def test_more_slots_than_the_context_has_are_refused_with_both_lengths(refused, checkpoint):
    refused("--checkpoint", checkpoint, "--prompt", "hi", "--max-seq-length", 513, names=[513, CONTEXT])
    refused("--checkpoint", checkpoint, "--prompt", "hi", "--max-seq-length", 10 ** 30, names=[10 ** 30, CONTEXT])
    refused("--checkpoint", checkpoint, "--interactive", "--max-seq-length", 513, names=[513, CONTEXT])


def test_a_cache_that_does_not_fit_in_memory_is_refused(refused, broken):
    configure(max_position_embeddings=10 ** 13)(broken)
    refused("--checkpoint", broken, "--prompt", "hi", "--max-seq-length", 10 ** 13, names="memory")


@pytest.mark.parametrize("option", ["--json", "--profile"])
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(refused, tmp_path, monkeypatch, option):
    monkeypatch.setattr(cli, "load", lambda args: pytest.fail("loaded"))
    for target in (tmp_path / "missing" / "out.json", tmp_path):
        refused("--prompt", "hi", option, target, names=[option, target])
    refused("--interactive", option, tmp_path / "out.json", names=[option, "--interactive"])


def test_a_pipe_or_device_is_never_replaced_by_a_report(run, checkpoint, tmp_path):
    """--json /dev/null must not turn the device into a file: write into it, or refuse."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    run("--checkpoint", checkpoint, "--prompt", "hi", "--max-new-tokens", 2, "--json", tmp_path / "pipe")
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_a_prompt_that_cannot_be_right_is_refused_before_the_model_is_loaded(refused, checkpoint, tmp_path,
                                                                             monkeypatch):
    monkeypatch.setattr(Transformer, "from_pretrained", lambda *args, **options: pytest.fail("loaded"))
    for argv in (["--prompt", ""], ["--prompt-file", tmp_path / "missing.txt"]):
        refused("--checkpoint", checkpoint, *argv)


@pytest.mark.parametrize("option", [["--prompt", "hi"], ["--prompt-file", "x.txt"], ["--raw"]], ids=" ".join)
def test_interactive_is_refused_with_what_makes_no_sense_beside_it(refused, checkpoint, option):
    refused("--checkpoint", checkpoint, "--interactive", *option, names=["--interactive", option[0]])


def test_interactive_without_a_chat_template_is_refused_before_the_first_question(refused, broken, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    configure("tokenizer_config.json", chat_template=None)(broken)
    refused("--checkpoint", broken, "--interactive", names="chat template")


# --- as a child process -----------------------------------------------------------------------------------------------

def command(*argv):
    return [sys.executable, str(ROOT / "generate.py"), *map(str, argv)]


def environment(**variables):
    return os.environ | {"HF_HUB_OFFLINE": "1"} | variables


def heed_ctrl_c():
    """In the child. Shells start background jobs, and these tests may be in one, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


LONG = ["--max-new-tokens", 50_000]  # longer than any test waits, and yet the end of a process that none waits for


def test_the_child_processes_of_bad_input_leave_status_2_and_one_line(checkpoint, tmp_path):
    """The cases in which this process might differ: the interpreter's own output at its end, and raw bytes."""
    cases = [
        (["--checkpoint", "nobody/no-such-model", "--prompt", "hi"], "nobody/no-such-model"),
        (["--checkpoint", checkpoint, "--prompt", os.fsdecode(b"Gr\xfc\xdfe")], "UTF-8"),
        (["--checkpoint", checkpoint, "--temperature", "-1"], "--temperature"),
    ]
    environ = environment(HF_HOME=str(tmp_path / "hub"), HF_HUB_CACHE=str(tmp_path / "hub"))
    children = [subprocess.Popen(command(*argv, "--json", tmp_path / "out.json"), stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, env=environ) for argv, _ in cases]
    for child, (_, names) in zip(children, cases):
        out, err = child.communicate(timeout=60)
        assert_one_error_line(child.returncode, out.decode(), err.decode(), names)
    assert not (tmp_path / "out.json").exists()


def test_a_full_disk_is_one_line_and_status_2(checkpoint):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        child = subprocess.run(command("--checkpoint", checkpoint, "--prompt", "hi", "--max-new-tokens", 3),
                               stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), timeout=60)
    assert child.returncode == 2, child.stderr
    assert child.stderr.splitlines()[-1].startswith("error: ") and "Exception" not in child.stderr


def test_ctrl_c_leaves_status_130_no_traceback_and_no_half_written_file(endless, tmp_path):
    child = subprocess.Popen(command("--checkpoint", endless, "--prompt", "hi", "--json", tmp_path / "out.json", *LONG),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), preexec_fn=heed_ctrl_c)
    try:
        assert len(os.read(child.stdout.fileno(), 1)) == 1  # it streams
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130
    assert b"Traceback" not in err and b"Error" not in err
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_early_is_no_error(endless):
    argv = shlex.join(command("--checkpoint", endless, "--prompt", "hi", *LONG))
    child = subprocess.run(["bash", "-c", f"{argv} | head -c1; exit ${{PIPESTATUS[0]}}"], capture_output=True,
                           env=environment(), timeout=60)
    assert len(child.stdout) == 1 and child.returncode == 141  # as a program that SIGPIPE ends
    assert len(child.stderr.splitlines()) <= 1 and b"Traceback" not in child.stderr and b"Exception" not in child.stderr
