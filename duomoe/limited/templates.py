"""What renders chat templates, in a process of its own: `python -P -m duomoe.limited.templates`.

A template is a program that came with a checkpoint. Jinja's sandbox keeps it from Python's objects, but not from using
all time and memory; so it runs here, where it can be ended, and where no file or socket can be opened.

A request is [template, variables]; the reply is what it rendered to. The first message is null.
"""

import contextlib
import datetime
import functools
import json
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.debug  # jinja imports it only when a template fails, when nothing can be opened any more
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

from duomoe.limited.worker import serve

MEMORY_BYTES = 512 << 20

WARM_UP = "{{ strftime_now('%c %Z') }}{{ lipsum() | random | wordwrap | tojson(indent=2) }}{{ raise_exception('') }}"


class Generation(jinja2.ext.Extension):
    """The tag around what an assistant wrote, by which training finds it; here it renders what is inside."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Return the tag's node."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def raise_exception(message: str) -> None:
    """Let a template refuse a conversation."""
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    """Return the time, in the local zone."""
    return datetime.datetime.now().strftime(form)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Return JSON; jinja's own filter escapes for HTML, which a prompt is not."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """Return a template as transformers compiles it."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(template)


def render(request: Any) -> str:
    """Return what a template renders to."""
    template, variables = request
    return compiled(template).render(variables)


def begin(_: None) -> Callable[[Any], str]:
    """Return what answers requests, when it has read from files what it ever does."""
    with contextlib.suppress(jinja2.TemplateError):
        render([WARM_UP, {}])
    return render


if __name__ == "__main__":
    serve(begin, MEMORY_BYTES)
