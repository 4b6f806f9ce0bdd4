"""`chorus-moe chat MODEL`: a conversation in the terminal."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from chorus_moe.serving.conversation import Answer, Conversation
from chorus_moe.serving.trace import Trace, shares, trace_answer

HELP = """\
/image PATH    show a picture with the next question; may be repeated
/audio PATH    play a sound with the next question; may be repeated
/routing       which experts the last answer used
/reset         forget the conversation
/help          these lines
/quit          end, as Ctrl-D does; Ctrl-C stops an answer"""


class Chat:
    """Reads lines, writes answers.

    Args:
        write: takes text; line ends are in it.
    """

    def __init__(self, conversation: Conversation, write: Callable[[str], object]):
        self.conversation, self.write = conversation, write
        self.images: list[str] = []
        self.audio: list[str] = []
        self.last: Answer | None = None

    def run(self, lines: Iterable[str]) -> None:
        """Answer line by line until `/quit` or the end."""
        for line in lines:
            word, _, rest = line.strip().partition(" ")
            if word == "/quit":
                break
            if word:
                self.answer(word, rest.strip(), line.strip())

    def answer(self, word: str, rest: str, line: str) -> None:
        """One line; what is wrong with it is said in one line, too."""
        try:
            if not word.startswith("/"):
                self.ask(line)
            elif word in ("/image", "/audio"):
                self.attach(word, rest)
            elif word == "/reset":
                self.conversation.reset()
                self.images, self.audio, self.last = [], [], None
                self.write("forgotten\n")
            elif word == "/routing":
                self.routing()
            else:
                self.write(HELP + "\n" if word == "/help" else f"{word}: unknown, /help lists what there is\n")
        except (ValueError, OSError) as error:
            self.images, self.audio = [], []
            self.write(f"{' '.join(str(error).split())}\n")

    def attach(self, word: str, path: str) -> None:
        """Raises: FileNotFoundError: nothing lies there."""
        file = Path(path).expanduser()
        if not path or not file.is_file():
            raise FileNotFoundError(f"{word}: no such file: {path!r}")
        (self.images if word == "/image" else self.audio).append(str(file))
        self.write(f"{file.name} goes with the next question\n")

    def ask(self, text: str) -> None:
        answer, pieces = self.conversation.ask(text, self.images, self.audio)
        self.images, self.audio, self.last = [], [], answer
        try:
            for piece in pieces:
                self.write(piece)
        except KeyboardInterrupt:
            pieces.close()  # type: ignore[attr-defined]  # a generator
            self.write(" (stopped)")
        self.write("\n")

    def routing(self) -> None:
        if self.last is None:
            self.write("nothing is answered yet\n")
            return
        trace = trace_answer(self.conversation.voice, self.conversation.processor, self.last)
        self.write(routing_table(trace) + f"\n{self.last.tokens_per_second:.1f} tokens a second\n")


def routing_table(trace: Trace) -> str:
    """What the experts did for a conversation: visits by layer, bank and expert in percent, and what was spent."""
    lines = []
    for layer, experts in trace.experts.items():
        found = shares(experts).items()
        banks = "   ".join(f"{name} " + " ".join(f"{100 * s:3.0f}" for s in share) for name, share in found)
        lines.append(f"layer {layer:>2}   {banks}")
    if not lines:
        lines.append("the model has no sparse layer")
    answer = len(trace.words) - trace.prompt_length
    spent = f"{trace.layers} layers, {trace.visits:,} visits to experts"
    lines.append(f"{trace.prompt_length} tokens read, {answer} written; {spent}")
    return "\n".join(lines)


def terminal_lines() -> Iterable[str]:
    """What a person types, with a prompt where there is a terminal."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        # Arrow keys and the history of what was typed.
        import readline  # noqa: F401
    while True:
        try:
            yield input("> " if is_terminal else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print()


def write_now(text: str) -> None:
    print(text, end="", flush=True)
