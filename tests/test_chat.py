"""The chat of generate.py --interactive: conversations, commands, what is said after an answer, and the terminal.

    python -m pytest tests/test_chat.py -q

In this process where that shows the law, as a child process where pipes and terminals matter.
"""
import contextlib
import json
import os
import pty
import re
import select
import stat
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from chat import Conversation, Printer
from decoder import Decoder
from model import Transformer
from reference import CONTEXT, write_checkpoint
from terminal import HELP, History, ask, open_history
from test_cli import LONG, chat_ids, command, environment, heed_ctrl_c, tokens_and_text
from tokenizer import Tokenizer, common_prefix

# --- in this process --------------------------------------------------------------------------------------------------

class Chat:
    """Feeds lines to the chat. Records what the decoder is asked, what it answers and which positions it computes."""

    def __init__(self, monkeypatch, run, folder):
        self.run, self.folder, self.monkeypatch = run, folder, monkeypatch
        self.watch()

    def watch(self):
        self.turns = []         # {"prompt": ids, "said": ids, "computed": positions, "result": Generation}
        self.interrupt_at = {}  # turn -> the pass of the model that Ctrl-C comes in
        decode, run = Decoder.generate, Transformer.hidden_states

        def watched_decode(decoder, prompts, *args, on_tokens, **options):
            turn = {"prompt": prompts[0], "said": [], "computed": [], "passes": 0}
            self.turns.append(turn)

            def watched_on_tokens(row, ids, *rest):
                turn["said"] += ids
                on_tokens(row, ids, *rest)

            turn["result"] = decode(decoder, prompts, *args, on_tokens=watched_on_tokens, **options)
            return turn["result"]

        def watched_pass(model, tokens, input_pos, *args, **options):
            turn = self.turns[-1]
            if turn["passes"] == self.interrupt_at.get(len(self.turns) - 1):
                raise KeyboardInterrupt
            turn["passes"] += 1
            turn["computed"] += input_pos.expand(tokens.shape)[0].tolist()
            return run(model, tokens, input_pos, *args, **options)

        self.monkeypatch.setattr(Decoder, "generate", watched_decode)
        self.monkeypatch.setattr(Transformer, "hidden_states", watched_pass)

    def __call__(self, *lines, argv=()):
        """Each line is a message, or an exception that input() raises; then Ctrl-D. Returns (stdout, stderr)."""
        pending = iter([*lines, EOFError])

        def read(prompt=""):
            line = next(pending)
            if isinstance(line, type):
                raise line
            return line

        self.monkeypatch.setattr("builtins.input", read)
        status, out, err = self.run("--checkpoint", self.folder, "--dtype", "float32", "--interactive",
                                    "--max-new-tokens", 10, *argv)
        self.monkeypatch.undo()
        assert status == 0, err
        return out, err

    def assert_each_answer_is_that_of_a_fresh_model(self):
        for turn in self.turns:
            fresh, _ = tokens_and_text(self.folder, [turn["prompt"]], 10)
            assert turn["said"] == fresh[0][:len(turn["said"])]


@pytest.fixture
def chat(monkeypatch, run, talker):
    return Chat(monkeypatch, run, talker)


def test_a_chat_carries_the_conversation_on_and_prefills_only_what_is_new(chat, talker):
    out, _ = chat("Hello, who are you?", "I see. Tell me more!", "ok")
    decode = Tokenizer.from_pretrained(talker).decode
    said = [decode(turn["said"]) for turn in chat.turns]
    assert out == "".join(text + "\n" for text in said) and [len(text) for text in said] == [10, 10, 10]
    assert chat.turns[0]["prompt"] == chat_ids(talker, "Hello, who are you?")
    assert chat.turns[2]["prompt"] == chat_ids(talker, "Hello, who are you?", said[0], "I see. Tell me more!", said[1],
                                               "ok")
    chat.assert_each_answer_is_that_of_a_fresh_model()
    known = 0
    for turn in chat.turns:
        end = len(turn["prompt"]) + 10 - 1  # the last token said has not been an input yet
        assert sorted(set(turn["computed"])) == list(range(known, end))
        known = end


@pytest.mark.parametrize("at", [0, 1, 2, 6])
def test_ctrl_c_ends_the_answer_only_and_spoils_no_later_one(chat, talker, at):
    chat.interrupt_at = {0: at, 2: at}
    out, err = chat("Hello, who are you?", "I see.", "What?", "Go on.")
    assert "Traceback" not in err and len(chat.turns) == 4
    lengths = [len(turn["said"]) for turn in chat.turns]
    assert lengths[0] == max(0, at - 1)  # the passes are warm-up, prefill with the first token, steps
    assert lengths[1] == lengths[3] == 10 and lengths[2] <= at
    chat.assert_each_answer_is_that_of_a_fresh_model()
    said = Tokenizer.from_pretrained(talker).decode(chat.turns[0]["said"])
    assert chat.turns[1]["prompt"] == chat_ids(talker, "Hello, who are you?", said, "I see.")


def test_ctrl_c_while_an_answer_is_printed_keeps_the_conversation_right(chat, monkeypatch):
    put, calls = Printer._put, []

    def interrupted(printer, row, text):
        put(printer, row, text)
        calls.append(text)
        if len(calls) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(Printer, "_put", interrupted)
    chat("Hello, who are you?", "Go on.")
    assert 0 < len(chat.turns[0]["said"]) < 10 and len(chat.turns[1]["said"]) == 10
    chat.assert_each_answer_is_that_of_a_fresh_model()


def test_ctrl_c_at_the_prompt_neither_leaves_nor_forgets(chat):
    chat("Hello, who are you?", KeyboardInterrupt, KeyboardInterrupt, "", "  ", "ok")
    assert len(chat.turns) == 2 and len(chat.turns[1]["prompt"]) > len(chat.turns[0]["prompt"]) + 10


def test_ctrl_c_before_an_answer_begins_leaves_the_message_out_and_says_so(chat, monkeypatch, talker):
    render = Conversation.render

    def interrupted(talk, text):
        if text == "I see.":
            raise KeyboardInterrupt
        return render(talk, text)

    monkeypatch.setattr(Conversation, "render", interrupted)
    _, err = chat("Hello", "I see.", "Go on.")
    said = Tokenizer.from_pretrained(talker).decode(chat.turns[0]["said"])
    assert err.count("Stopped.") == 1 and len(chat.turns) == 2
    assert chat.turns[1]["prompt"] == chat_ids(talker, "Hello", said, "Go on.")


def test_a_conversation_that_outgrows_the_context_drops_its_oldest_turns_and_says_so(chat, talker):
    out, err = chat("Hello, who are you?", "I see.", "Tell me more.", "Go on.",
                    argv=["--max-seq-length", 90, "--system", "Sir"])
    tok = Tokenizer.from_pretrained(talker)
    said, turns = [tok.decode(turn["said"]) for turn in chat.turns], [turn["prompt"] for turn in chat.turns]
    render = lambda *texts: tok.apply_chat_template([
        {"role": "system", "content": "Sir"},
        *({"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts))])
    assert turns[1] == render("Hello, who are you?", said[0], "I see.")
    assert turns[2] == render("I see.", said[1], "Tell me more.")       # one turn less
    assert turns[3] == render("I see.", said[1], "Tell me more.", said[2], "Go on.")
    assert len(render("Hello, who are you?", said[0], "I see.", said[1], "Tell me more.")) + 10 > 90
    assert [line.lstrip("> ") for line in err.splitlines() if "outgrown" in line] == [
        "The conversation has outgrown its 90 tokens: the oldest 1 of its 2 turns is dropped."]
    chat.assert_each_answer_is_that_of_a_fresh_model()


def test_a_chat_past_the_original_context_of_dynamic_rope_says_what_a_fresh_model_says(monkeypatch, run, tmp_path):
    folder = write_checkpoint(tmp_path / "dynamic", ascii_only=True, context=48,
                              rope=dict(rope_type="dynamic", factor=8.0))
    chat = Chat(monkeypatch, run, folder)
    chat("Hello", "I see.", "Tell me more.", "Go on.")
    assert len(chat.turns[0]["prompt"]) + 10 < 48 < len(chat.turns[2]["prompt"])
    chat.assert_each_answer_is_that_of_a_fresh_model()
    assert min(chat.turns[1]["computed"]) > 0 == min(chat.turns[3]["computed"])


def test_where_no_turn_fits_beside_a_message_all_are_dropped(chat, talker):
    out, err = chat("Hello", "I see.", "x" * 30, argv=["--max-seq-length", 50])
    assert chat.turns[2]["prompt"] == chat_ids(talker, "x" * 30)
    assert "outgrown its 50 tokens: the oldest 2 of its 2 turns are dropped." in err
    chat.assert_each_answer_is_that_of_a_fresh_model()


def test_a_message_longer_than_the_context_is_not_the_end_of_the_chat(chat, talker):
    out, err = chat("Hello", "x" * 80, "Again", argv=["--max-seq-length", 50])
    assert "80" in err or str(len(chat_ids(talker, "x" * 80))) in err
    assert len(chat.turns) == 2 and len(chat.turns[1]["said"]) == 10
    chat.assert_each_answer_is_that_of_a_fresh_model()


def test_a_line_that_cannot_be_said_is_left_out_and_the_conversation_goes_on(chat, talker, tmp_path):
    (tmp_path / "picky.jinja").write_text("{% for m in messages %}"
                                          "{% if m.content == 'bad' %}{{ raise_exception('not this') }}{% endif %}"
                                          "{{ m.content }}<|end|>{% endfor %}")
    out, err = chat("\ufeffHello", "Caf\udce9", "bad", "x" * 90, "Again",
                    argv=["--chat-template", tmp_path / "picky.jinja", "--max-seq-length", 60, "--system", "Sir"])
    tok = Tokenizer.from_pretrained(talker)
    said = tok.decode(chat.turns[0]["said"])
    assert [turn["prompt"] for turn in chat.turns] == [
        tok.encode("Sir<|end|>Hello<|end|>"), tok.encode(f"Sir<|end|>Hello<|end|>{said}<|end|>Again<|end|>")]
    assert "UTF-8" in err and "not this" in err and err.count("left out") == 3
    chat.assert_each_answer_is_that_of_a_fresh_model()


def test_one_seed_begins_a_chat_and_its_draws_go_on(chat, tmp_path):
    (tmp_path / "last.jinja").write_text("{{ messages[-1].content }}")      # the same prompt each time
    argv = ["--chat-template", tmp_path / "last.jinja", "--temperature", 1.5]

    def said(seed):
        chat.watch()
        chat("Hi", "Hi", "Hi", argv=[*argv, "--seed", seed])
        return [tuple(turn["said"]) for turn in chat.turns]
    assert len({*said(3)}) == 3 and said(3) == said(3) != said(4)


def test_a_stop_text_ends_a_turn_of_a_chat(chat, talker):
    chat("Hello")
    text = Tokenizer.from_pretrained(talker).decode(chat.turns[0]["said"])
    chat.watch()
    out, _ = chat("Hello", "Go on", argv=["--stop", text[4:6]])
    assert out.splitlines()[0] == text[:text.index(text[4:6])]
    assert chat.turns[1]["prompt"] == chat_ids(talker, "Hello", text[:text.index(text[4:6])], "Go on")


# --- the line after an answer ---

def figures(err):
    return re.findall(r"^\[\d+ token.*\]$", err, re.M)


@pytest.mark.parametrize("drafts", [[], ["--copy", 4]], ids=["plain", "copy"])
def test_a_line_after_each_answer_says_its_speed_its_accepted_length_and_the_context_used(chat, drafts):
    out, err = chat("Hello, who are you?", "Go on.", argv=drafts)
    lines = []
    for turn in chat.turns:
        result, used = turn["result"], len(turn["prompt"]) + 10
        accepted = f"{result.mean_accept_length:.2f} a pass, " if drafts else ""
        lines.append(f"[10 tokens, cut off by --max-new-tokens, {result.tokens_per_second:.1f} tokens/s, {accepted}"
                     f"context {used} of {CONTEXT}]")
    assert figures(err) == lines and len(lines) == 2
    assert "\033" not in out + err and "[10 tokens" not in out


def test_the_line_says_what_cut_an_answer_off_and_nothing_of_one_that_ended(chat, talker):
    n_slot = len(chat_ids(talker, "Hello")) + 5
    (line,) = figures(chat("Hello", argv=["--max-seq-length", n_slot])[1])
    assert line.startswith("[5 tokens, cut off by the context, ") and line.endswith(f"context {n_slot} of {n_slot}]")
    text = Tokenizer.from_pretrained(talker).decode(chat.turns[0]["said"])
    chat.watch()
    (line,) = figures(chat("Hello", argv=["--stop", text[0]])[1])
    assert line == f"[1 token, context {n_slot - 4} of {CONTEXT}]"      # the prefill's token: no pass to time
    chat.watch()
    (line,) = figures(chat("Hello", argv=["--stop", text[:3]])[1])
    assert re.fullmatch(r"\[3 tokens, [\d.]+ tokens/s, context \d+ of \d+\]", line)


def test_the_line_after_an_answer_that_ctrl_c_ended_gives_no_speed(chat):
    chat.interrupt_at = {0: 0, 1: 4}
    _, err = chat("Hello", "Go on.", "Again")
    lengths = [len(turn["said"]) for turn in chat.turns]
    assert lengths[0] == 0 < lengths[1] < 10 == lengths[2]
    assert figures(err)[:2] == [f"[{n} tokens, stopped, context {len(turn['prompt']) + n} of {CONTEXT}]"
                                for n, turn in zip(lengths[:2], chat.turns)]


# --- commands ---

def test_reset_forgets_all_but_the_system_message_whose_tokens_stay_in_the_cache(chat, talker):
    out, err = chat("Hello, who are you?", "I see.", "/reset", "Hello again", argv=["--system", "Answer briefly."])
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "Hello again"}]
    turn = chat.turns[2]
    assert turn["prompt"] == Tokenizer.from_pretrained(talker).apply_chat_template(messages)
    assert min(turn["computed"]) == common_prefix(turn["prompt"], chat.turns[1]["prompt"]) > len("Answer briefly.")
    chat.assert_each_answer_is_that_of_a_fresh_model()
    assert len(out.splitlines()) == 3 and "system message stays" in err


def test_system_begins_anew_and_a_message_that_cannot_be_set_changes_nothing(chat, talker, tmp_path):
    (tmp_path / "picky.jinja").write_text("{% for m in messages %}"
                                          "{% if m.content == 'bad' %}{{ raise_exception('not\nthis') }}{% endif %}"
                                          "{{ m.content }}<|end|>{% endfor %}")
    out, err = chat("Hello", "/system", "/system  Dear Sir", "Hi", "/system bad", "/system " + "x" * 90, "/system",
                    "Go on", "/system off", "Hi", argv=["--chat-template", tmp_path / "picky.jinja",
                                                        "--max-seq-length", 60])
    tok = Tokenizer.from_pretrained(talker)
    said = tok.decode(chat.turns[1]["said"])
    assert [turn["prompt"] for turn in chat.turns] == [tok.encode(text) for text in (
        "Hello<|end|>", "Dear Sir<|end|>Hi<|end|>", f"Dear Sir<|end|>Hi<|end|>{said}<|end|>Go on<|end|>",
        "Hi<|end|>")]
    remarks = [line for line in err.splitlines() if "system" in line]
    assert [line.split(": ")[0] for line in remarks] == [
        "There is no system message but one that the chat template may bring.",
        "The system message is set. The conversation begins anew.", "/system failed", "/system failed",
        "The system message", "The system message is gone. The conversation begins anew."]
    assert "not this" in remarks[2] and "60" in remarks[3] and remarks[4] == "The system message: Dear Sir"
    chat.assert_each_answer_is_that_of_a_fresh_model()


def test_save_writes_all_messages_also_the_dropped_ones_and_may_write_its_own_file_again(chat, talker, tmp_path):
    file, questions = tmp_path / "my talk.json", ["Hello, who are you?", "I see.", "Tell me more."]
    out, err = chat(f"/save {file}", questions[0], questions[1], f"/save {file}", questions[2], f"/save {file}",
                    argv=["--max-seq-length", 90, "--system", "Sir"])
    assert "the oldest 1 of its 2 turns is dropped" in err
    assert [line for line in err.splitlines() if "wrote" in line] == [
        f"wrote {file} ({n} messages)" for n in (1, 5, 7)]
    said = list(map(Tokenizer.from_pretrained(talker).decode, (turn["said"] for turn in chat.turns)))
    messages = [{"role": "system", "content": "Sir"}]
    for question, text in zip(questions, said):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    assert json.loads(file.read_text(encoding="utf-8")) == messages
    assert out == "".join(text + "\n" for text in said) and list(tmp_path.iterdir()) == [file]


def test_after_a_reset_a_save_holds_the_new_conversation_only(chat, talker, tmp_path):
    _, err = chat("Hello, who are you?", "I see.", "Tell me more.", "/reset", "Hi", f"/save {tmp_path / 'talk.json'}",
                  argv=["--max-seq-length", 60])
    assert "dropped" in err
    said = Tokenizer.from_pretrained(talker).decode(chat.turns[3]["said"])
    assert json.loads((tmp_path / "talk.json").read_text(encoding="utf-8")) == [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": said}]


def test_a_save_that_cannot_be_is_one_line_touches_no_file_and_the_chat_goes_on(chat, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "file")
    before = sorted(tmp_path.rglob("*"))
    places = ["missing/talk.json", "folder", "mine.txt", "mine.txt/talk.json", "link", "n" * 300, "\0"]
    commands = ["/save", *(f"/save {tmp_path / place}" for place in places)]
    _, err = chat("Hello", *commands, "Go on")
    assert len([line for line in err.splitlines() if line.startswith("/save")]) == len(commands)
    assert err.count("/save") == len(commands) + 1, err     # /save needs a file: /save FILE
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "mine.txt").read_text() == "mine"
    assert len(chat.turns) == 2
    chat.assert_each_answer_is_that_of_a_fresh_model()


def test_help_and_the_page_list_every_command_and_an_unknown_one_is_one_line_that_names_help(chat):
    listed = set(re.findall(r"^(/\w+)", HELP, re.M))
    page = (Path(__file__).parent.parent / "docs/chat.md").read_text()
    assert listed == set(re.findall(r"`(/\w+)[^`/]*`", page)) == {"/reset", "/system", "/save", "/help"}
    out, err = chat("/help", *sorted(listed), "/exit", "/Reset", "/reset this")
    assert HELP in err and out == "" and not chat.turns
    assert re.findall(r"There is no command (\S+): .*/help.*\n", err) == ["/exit", "/Reset"]
    assert "nothing is forgotten" in err


def test_a_path_and_a_line_with_a_space_in_front_are_messages(chat, talker):
    chat("/etc/hosts is what?", " /reset", "// a comment")
    decode = Tokenizer.from_pretrained(talker).decode
    said = [decode(turn["said"]) for turn in chat.turns]
    assert chat.turns[2]["prompt"] == chat_ids(talker, "/etc/hosts is what?", said[0], "/reset", said[1],
                                               "// a comment")


# --- history ---

def test_a_history_keeps_the_last_lines_of_all_chats_for_its_owner_only(tmp_path):
    file = tmp_path / "state" / "eagle-fast" / "history"
    one, other = History(file), History(file)
    one.add("a")
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700 and one.read() == ["a"]
    old = [f"line {n}\u2028é" for n in range(1200)]
    file.write_text("\n".join(old) + "\n", encoding="utf-8")
    file.chmod(0o644)
    assert one.read() == old[-1000:]
    for history, text in ((one, "b"), (other, "c\nd"), (other, "c\nd")):
        history.add(text)
    assert one.read() == [*old[-998:], "b", "c d"] and len(file.read_text(encoding="utf-8").split("\n")) == 1001
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and list(file.parent.iterdir()) == [file]


def test_a_history_that_cannot_be_kept_is_silent_and_replaces_nothing(tmp_path, capfd):
    (tmp_path / "file").write_text("text")
    os.mkfifo(tmp_path / "pipe")        # as /dev/null, which is no file either
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for place in (tmp_path, tmp_path / "file" / "history", tmp_path / "link", tmp_path / "pipe"):
        History(place).add("hello")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    (tmp_path / "bytes").write_bytes(b"caf\xe9\n\0\n")
    History(tmp_path / "bytes").add("hello")
    assert History(tmp_path / "bytes").read()[-1] == "hello"
    assert capfd.readouterr() == ("", "")


def test_the_history_lies_in_the_folder_for_state(monkeypatch, tmp_path):
    pytest.importorskip("readline")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    history = open_history()
    assert history is not None and history.file == tmp_path / "home/.local/state/eagle-fast/history"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    history = open_history()
    assert history is not None and history.file == tmp_path / "state/eagle-fast/history"
    monkeypatch.setitem(sys.modules, "readline", None)      # Windows
    assert open_history() is None


@pytest.mark.parametrize("typed,shown", [(True, True), (True, False), (False, True), (False, False)])
def test_readline_writes_the_prompt_only_to_a_terminal_and_never_among_the_answers(monkeypatch, capsys, typed, shown):
    prompts = []
    monkeypatch.setattr("builtins.input", lambda prompt="": prompts.append(prompt) or "hi")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: typed)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: shown)
    assert ask() == "hi" and prompts == ["> " if typed and shown else ""]
    assert capsys.readouterr() == ("", "> " if typed and not shown else "")


# --- as a child process -----------------------------------------------------------------------------------------------

def test_a_chat_from_a_pipe_answers_each_line_and_ends_with_it(talker):
    argv = command("--checkpoint", talker, "--interactive", "--max-new-tokens", 8, "--dtype", "float32")
    child = subprocess.run(argv, input=b"Hello\nCaf\xe9?\nGo on", capture_output=True, timeout=60,
                           env=environment(PYTHONIOENCODING="utf-8:strict"))
    child.stdout, child.stderr = child.stdout.decode(), child.stderr.decode()
    first = tokens_and_text(talker, [chat_ids(talker, "Hello")], 8)[1][0]
    second = tokens_and_text(talker, [chat_ids(talker, "Hello", first, "Go on")], 8)[1][0]
    assert (child.returncode, child.stdout) == (0, f"{first}\n{second}\n"), child.stderr
    assert child.stderr.count("not UTF-8") == 1
    assert "Traceback" not in child.stderr


class Terminal:
    """A child process on a terminal of its own, with its history under the folder `state`."""

    def __init__(self, argv, state):
        self.end, inner = pty.openpty()
        settings = termios.tcgetattr(inner)
        settings[3] &= ~termios.ECHO
        termios.tcsetattr(inner, termios.TCSANOW, settings)
        own = ("import os, sys, fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
               "os.execv(sys.argv[1], sys.argv[1:])")
        self.child = subprocess.Popen([sys.executable, "-c", own, *argv], stdin=inner, stdout=inner, stderr=inner,
                                      start_new_session=True, preexec_fn=heed_ctrl_c,
                                      env=environment(TERM="dumb", XDG_STATE_HOME=str(state)))
        os.close(inner)
        self.text = ""

    def type(self, text):
        os.write(self.end, text.encode())

    def wait_for(self, pattern, typing="", seconds=60):
        """Read until the text since the last match matches, and return that text.

        `typing` is typed at once and again in each silent second: a key pressed between the prompt and the moment
        when readline takes over the terminal is lost.
        """
        deadline = time.monotonic() + seconds
        self.type(typing)
        while not (match := re.search(pattern, self.text)):
            if not self.read():
                self.type(typing)
            assert self.child.poll() is None and time.monotonic() < deadline, f"no {pattern!r} in {self.text[-2000:]!r}"
        seen, self.text = self.text[:match.end()], self.text[match.end():]
        return seen

    def read(self):
        """Take what there is, or comes within a second. False when there is nothing."""
        with contextlib.suppress(OSError):  # EIO: the child has left
            if select.select([self.end], [], [], 1)[0]:
                self.text += os.read(self.end, 65536).decode(errors="replace")
                return True
        return False

    def leave(self, seconds=30):
        """Type Ctrl-D until the child leaves. Returns its exit status."""
        deadline = time.monotonic() + seconds
        while self.child.poll() is None and time.monotonic() < deadline:
            self.type("\x04")
            while self.read():
                pass
        return self.child.poll()

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            self.child.kill()
        self.child.wait()
        os.close(self.end)


def test_on_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(endless, tmp_path):
    terminal = Terminal(command("--checkpoint", endless, "--interactive", "--max-seq-length", 100_000, *LONG), tmp_path)
    try:
        seen = terminal.wait_for(r"> $")
        for message in ("hello\n", "again\n"):
            terminal.type(message)
            seen += terminal.wait_for(r"[!-~]{40}")     # it answers, and would for long
            terminal.type("\x03")
            seen += terminal.wait_for(r"\r\n> $")
        seen += terminal.wait_for(r"Ctrl-D leaves\.\r\n> $", typing="\x03")
        assert terminal.leave() == 0
        assert "Traceback" not in seen + terminal.text
    finally:
        terminal.close()


def test_on_a_terminal_the_arrow_keys_bring_back_what_an_earlier_chat_was_asked(talker, tmp_path):
    pytest.importorskip("readline")
    history = History(tmp_path / "eagle-fast" / "history")
    for line in ("first", "second"):
        history.add(line)
    terminal = Terminal(command("--checkpoint", talker, "--interactive", "--max-new-tokens", 8), tmp_path)
    try:
        terminal.wait_for(r"> $")
        for keys in ("\x1b[A\x1b[A\n", "\x1b[A again\x7f!\n"):
            terminal.type(keys)
            seen = terminal.wait_for(r"\r\n\r\n> $")
            assert re.search(r"\r\n\033\[2m\[8 tokens, .*\]\033\[0m\r\n\r\n> $", seen), seen    # fainter, then a gap
        assert terminal.leave() == 0
    finally:
        terminal.close()
    assert history.read() == ["first", "second", "first", "first agai!"]
