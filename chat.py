"""The chat: a conversation on stdin and stdout.

Knows the commands of a chat, what a conversation holds, and how people type. Does not know how an answer is made
(generate.py).
"""

import argparse
import contextlib
import shlex
import sys
from pathlib import Path

from cli import log, one_line, write

import torch

from generate import Engine, answer, answer_options, reply_message, report
from images import load_image
from tokenizer import Tokenizer


def is_typed() -> bool:
    """Whether a person sits before it: input() edits lines only where all of it is a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def edit_lines() -> None:
    """Let input() edit lines, remember them, and take a paste of several lines as one, which Python turns off."""
    with contextlib.suppress(ImportError):  # Windows
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")


def type_line(prompt: str) -> str:
    """The line that a person types, or the lines that he pastes; empty at the end (Ctrl-D). Ctrl-C discards it."""
    while True:
        try:
            return input(prompt) + "\n"
        except EOFError:
            write("\n")
            return ""
        except KeyboardInterrupt:
            log("\n(Ctrl-D or /quit leaves)")


def read_line(prompt: str) -> str:
    """The next line of the input, with its end; empty at the end of the input."""
    if is_typed():
        return type_line(prompt)
    print(prompt, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline()


class Chat:
    """A conversation on stdin and stdout. Of an answer that Ctrl-C stopped, what was generated stays in it."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, args: argparse.Namespace):
        self.engine, self.tokenizer, self.args = engine, tokenizer, args
        self.images = [read_image_part(path) for path in args.image]  # of the next message
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.args.system}] if self.args.system else []

    def run(self) -> int:
        log("/image PATH adds an image to the next message, /reset forgets, /quit leaves, Ctrl-C stops an answer")
        log("the prompt shows how many tokens the conversation has, and how many it may have")
        if is_typed():
            edit_lines()
        torch.manual_seed(self.args.seed)
        line = self.args.prompt or self.next_line()
        while line and line.strip() != "/quit":
            try:
                self.obey(line)
            except (ValueError, OSError) as error:
                log(one_line(error))
            line = self.next_line()
        return 0

    def next_line(self) -> str:
        """The user's next line, on every rank."""
        context, ranks = self.engine.model.args.max_seq_len, self.engine.ranks
        limit = min(self.engine.max_cache_size or context, context)
        prompt = f"[{self.engine.cached.position}/{limit}] > "
        return ranks.share(read_line(prompt) if ranks.rank == 0 else None)

    def obey(self, line: str) -> None:
        command, _, rest = line.strip().partition(" ")
        if command == "/reset":
            self.reset()
            self.images = []
            self.engine.forget()
        elif command == "/image":
            self.add_image(rest.strip())
        elif command:
            self.answer(line.rstrip("\n"))

    def add_image(self, path: str) -> None:
        if not path:
            raise ValueError("/image needs the path of a picture: /image photo.jpg")
        self.images.append(read_image_part(unquote(path)))
        width, height = self.images[-1]["image"].size
        log(f"{path}, {width} x {height} pixels, goes with the next message")

    def answer(self, text: str) -> None:
        content = self.tokenizer.place_images(text, self.images)
        messages, ids, result = [*self.messages, {"role": "user", "content": content}], [], None

        def show(text: str, new: list[int]) -> None:
            write(text)
            ids.extend(new)

        options = {"show": show, "draft": self.engine.draft, **answer_options(self.args)}
        alone = self.engine.ranks.n_ranks == 1  # ranks would stop at different tokens: Ctrl-C ends all of them
        with contextlib.suppress(KeyboardInterrupt) if alone else contextlib.nullcontext():
            result = answer(self.engine, self.tokenizer, {"messages": messages}, **options)
        write("\n")
        if result:
            report(result, self.engine, self.engine.draft)
        self.messages, self.images = [*messages, reply_message(self.tokenizer, ids)], []


def unquote(path: str) -> str:
    """The path that a shell would make of it: a file dragged into a terminal comes with quotes or backslashes."""
    try:
        (found,) = shlex.split(path) if not Path(path).exists() else [path]
    except ValueError:
        return path
    return str(Path(found).expanduser())


def read_image_part(path: str) -> dict:
    return {"type": "image", "path": path, "image": load_image(path)}
