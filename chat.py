"""The chat: a conversation on stdin and stdout.

Knows the commands of a chat and what a conversation holds. Does not know how an answer is made (generate.py).
"""

import argparse
import contextlib
import sys

import torch

from cli import log, one_line, write
from generate import Engine, answer, answer_options, reply_message, report
from tokenizer import Tokenizer
from tp import OneProcess
from vision import load_image


def read_line(ranks: OneProcess) -> str:
    """The user's next line, on every rank; empty at the end of the input."""
    if ranks.rank == 0:
        print("> ", end="", file=sys.stderr, flush=True)
    return ranks.share(sys.stdin.readline() if ranks.rank == 0 else None)


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
        torch.manual_seed(self.args.seed)
        line = self.args.prompt or read_line(self.engine.ranks)
        while line and line.strip() != "/quit":
            try:
                self.obey(line)
            except (ValueError, OSError) as error:
                log(one_line(error))
            line = read_line(self.engine.ranks)
        return 0

    def obey(self, line: str) -> None:
        command, _, rest = line.strip().partition(" ")
        if command == "/reset":
            self.reset()
            self.images = []
            self.engine.forget()
        elif command == "/image":
            self.images.append(read_image_part(rest.strip()))
        elif command:
            self.answer(line.rstrip("\n"))

    def answer(self, text: str) -> None:
        content = self.tokenizer.place_images(text, self.images)
        messages, ids = [*self.messages, {"role": "user", "content": content}], []

        def show(text: str, new: list[int]) -> None:
            write(text)
            ids.extend(new)

        options = {"show": show, "draft": self.engine.draft, **answer_options(self.args)}
        with contextlib.suppress(KeyboardInterrupt):
            result = answer(self.engine, self.tokenizer, {"messages": messages}, **options)
            report(result, self.engine, self.engine.draft)
        write("\n")
        self.messages, self.images = [*messages, reply_message(self.tokenizer, ids)], []


def read_image_part(path: str) -> dict:
    return {"type": "image", "path": path, "image": load_image(path)}
