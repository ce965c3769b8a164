"""`python -m duomoe.chat`: talk with a model in the terminal.

What the model says goes to stdout as it is decoded; everything else goes to stderr.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from duomoe.chat_options import add_chat_options, template_kwargs
from duomoe.command import Parser, add_running_options, engine_config, progress_is_visible, run_command, say, write
from duomoe.errors import InputError
from duomoe.generate import add_sampling_options, sampling_params
from duomoe.startup import Startup

if TYPE_CHECKING:
    from duomoe.chat_output import Delta
    from duomoe.llm import LLM
    from duomoe.sampling import SamplingParams

HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def parser() -> argparse.ArgumentParser:
    """Return the command line's grammar."""
    p = Parser(prog="python -m duomoe.chat", description="Talk with a Mixture-of-Experts model.")
    add_running_options(p)
    add_chat_options(p)
    add_sampling_options(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    return run_command(lambda: _run(parser().parse_args(argv)))


def _run(args: argparse.Namespace) -> None:
    more = template_kwargs(args)
    startup = Startup(quiet=not progress_is_visible())
    with startup.part("importing"):
        from duomoe.llm import LLM

    llm = LLM(args.model, engine_config(args), startup=startup)
    params = llm.chat_params(sampling_params(args))
    conversation = Conversation(llm, params, args.system, more)
    say(HELP)
    for line in _lines():
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
        elif line.startswith("/"):
            say(HELP)
        elif line.strip():
            try:
                conversation.say(line)
            except InputError as error:
                say(f"error: {error}")
            except KeyboardInterrupt:
                write("\n")


def _lines() -> Iterator[str]:
    """Read what the user says, line by line; an interrupt between two answers is no end."""
    if sys.stdin is None:
        return
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (lets lines be edited)
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            write("\n")
            say(HELP)


class Conversation:
    """Turns of a user and a model.

    Args:
        llm: the model.
        params: how it answers.
        system: a message before all others, if there is one.
        template_kwargs: more variables for the chat template.

    Attributes:
        messages: what was said, as chat templates take it.
    """

    def __init__(
        self, llm: "LLM", params: "SamplingParams", system: str | None, template_kwargs: dict[str, Any]
    ) -> None:
        self._llm = llm
        self._params = params
        self._first = [] if system is None else [{"role": "system", "content": system}]
        self._template_kwargs = template_kwargs
        self.messages = list(self._first)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = list(self._first)

    def say(self, text: str) -> None:
        """Say something to the model, and write its answer as it comes; an interrupt ends the answer.

        Raises:
            InputError: when the conversation has become too long, or cannot be rendered; nothing was said then.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = self._llm.chat_tokens(messages, template_kwargs=self._template_kwargs)
        answer = {"content": "", "reasoning": ""}
        for delta in self._answer(prompt):
            if delta.kind == "content" and answer["reasoning"] and not answer["content"]:
                write("\n\n")
            answer[delta.kind] += delta.text
            write(delta.text)
        write("\n")
        thought = {"reasoning_content": answer["reasoning"]} if answer["reasoning"] else {}
        self.messages = [*messages, {"role": "assistant", "content": answer["content"], **thought}]

    def _answer(self, prompt: list[int]) -> "Iterator[Delta]":
        """Return the answer's pieces; an interrupt is its end."""
        parser = self._llm.output_parser(prompt)
        stream = self._llm.stream(prompt, self._params, shown=parser.markers)
        with stream, contextlib.suppress(KeyboardInterrupt):
            for chunk in stream:
                yield from parser.push(chunk.text)
        yield from parser.finish()


if __name__ == "__main__":
    sys.exit(main())
