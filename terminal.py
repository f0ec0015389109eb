"""The chat on the terminal: the lines that are typed, the commands among them, and a line of figures after each answer.

    python generate.py --interactive

stdout gets the answers only. All else goes to stderr, except the prompt where stdin and stdout are both a terminal:
there readline writes it, as it must know the prompt to place the cursor. docs/chat.md describes it for users.
"""
import contextlib
import io
import os
import sys
from pathlib import Path

from chat import Conversation
from console import is_text, say, whole_or_nothing
from decoder import Decoder

PROMPT = "> "
HELP = """\
/reset         forget the conversation; the system message stays
/system TEXT   begin anew with this system message
/system off    begin anew without one
/system        say which one is set
/save FILE     write the conversation to a new FILE: [{"role": ..., "content": ...}, ...]
/help          list the commands
Ctrl-C ends an answer, Ctrl-D leaves. With a space in front, a line that begins with / is a message."""


def chat(talk: Conversation, decoder: Decoder) -> None:
    """Answer the lines of standard input until it ends, and obey those that are commands. Ctrl-C ends an answer."""
    history = open_history() if is_edited() else None
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")     # a byte that is not text spoils only its own line
    say("Ctrl-C ends an answer, Ctrl-D leaves, /help lists the commands.")
    while (text := read_message()) is not None:
        try:
            if history is not None:
                history.add(text)
            if name := command_of(text):
                say(obey(talk, name, text.removeprefix(name).strip()))
            elif figures := talk.answer(decoder, text[1:] if text.startswith(" /") else text):
                say(dim(figures) if talk.args.color else figures)
        except KeyboardInterrupt:       # before the answer began, or just after it
            say("\nStopped.")
        if sys.stdin.isatty():
            say("")     # between this answer and the next prompt


def read_message() -> str | None:
    """The next line that is not empty; None at the end of the input."""
    while True:
        try:
            text = ask().removeprefix("\ufeff")
        except EOFError:
            if sys.stdin.isatty():
                say("")
            return None
        except KeyboardInterrupt:
            say("\nCtrl-D leaves.")
            continue
        if not is_text(text):
            say(f"That line is not {getattr(sys.stdin, 'encoding', 'UTF-8').upper()} text: it is left out.")
        elif text.strip():
            return text


def ask() -> str:
    """A line of standard input, after a prompt if somebody types it."""
    if is_edited():
        return input(PROMPT)
    if sys.stdin.isatty():
        say(PROMPT, end="")     # input() would write it to stdout, among the answers
    return input()


def is_edited() -> bool:
    """Whether input() lets readline edit the line: where it is typed, and shown, on a terminal."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def dim(text: str) -> str:
    """The text in a fainter colour if stderr is a terminal."""
    return f"\033[2m{text}\033[0m" if sys.stderr is not None and sys.stderr.isatty() else text


# Commands


def command_of(text: str) -> str:
    """The command, such as "/save", that a line begins with. "" for a message: a path such as /etc/hosts begins one."""
    word = text.split(maxsplit=1)[0]
    return word if text.startswith("/") and "/" not in word[1:] else ""


def obey(talk: Conversation, name: str, text: str) -> str:
    """Carry out a command, of which `text` is the rest of the line. Returns what to say. What fails changes nothing."""
    try:
        match name:
            case "/help":
                return HELP
            case "/reset" if not text:
                talk.restart(talk.system)
                return "The conversation is forgotten" + ("." if talk.system is None else "; the system message stays.")
            case "/reset":
                return "/reset stands alone: nothing is forgotten."
            case "/system" if not text:
                return ("There is no system message but one that the chat template may bring." if talk.system is None
                        else f"The system message: {talk.system}")
            case "/system":
                talk.restart(None if text == "off" else text)
                return f"The system message is {'gone' if text == 'off' else 'set'}. The conversation begins anew."
            case "/save" if not text:
                return "/save needs a file: /save FILE"
            case "/save":
                file = Path(os.path.expanduser(text))
                return f"wrote {file} ({talk.save(file)} messages)"
    except (ValueError, OSError) as error:
        return f"{name} failed: {' '.join(str(error).split())}"
    return f"There is no command {name}: /help lists them. With a space in front it is a message."


# History


class History:
    """What was typed, from one chat to the next: the last lines, in one file that only its owner may read.

    The file is plain text, as readline and the libedit of macOS keep theirs in different forms. Several chats may share
    it. Where it cannot be read or written there is no history, and nothing is said. One that is a link to /dev/null
    stays so.
    """
    N_LINE = 1000

    def __init__(self, file: Path):
        self.file = Path(os.path.realpath(file))

    def read(self) -> list[str]:
        """The lines, oldest first. Raises OSError."""
        if not self.file.exists():
            return []
        if not self.file.is_file():
            raise OSError(f"{self.file} is not a file")
        text = self.file.read_text(encoding="utf-8", errors="replace")
        return text.removesuffix("\n").split("\n")[-self.N_LINE:] if text else []

    def add(self, text: str) -> None:
        """Append what was typed, as one line even if it was pasted as several."""
        line = " ".join(text.splitlines())
        with contextlib.suppress(OSError):
            lines = self.read()
            if lines[-1:] == [line]:
                return
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with whole_or_nothing(self.file, ".part") as part:
                part.touch(mode=0o600)
                part.write_text("\n".join([*lines, line][-self.N_LINE:]) + "\n", encoding="utf-8")


def open_history() -> History | None:
    """The history of this user's chats, its lines under the arrow keys. None without readline (on Windows) or a home.

    It is $XDG_STATE_HOME/eagle-fast/history, by default under ~/.local/state.
    """
    try:
        import readline
        state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    except (ImportError, RuntimeError):
        return None
    history = History(state / "eagle-fast" / "history")
    with contextlib.suppress(OSError, ValueError):      # ValueError: what is no text of this terminal's encoding
        for line in history.read():
            readline.add_history(line)
    return history
