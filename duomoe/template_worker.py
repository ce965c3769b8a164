"""The process that renders chat templates: `python -P template_worker.py`, with requests on stdin.

A template is a program that came with a checkpoint. Jinja's sandbox keeps it from Python's objects, but not from using
all time and memory; so it runs here, where it can be ended, and where no file or socket can be opened. This file
imports nothing of the project, since torch would make each start take seconds.

A message is its length in 8 bytes, little endian, and so many bytes of JSON. A request is [template, variables]; the
reply is ["text", what it rendered to] or ["error", why not].
"""

import contextlib
import datetime
import functools
import json
import resource
import sys
import time
from typing import Any, BinaryIO

import jinja2
import jinja2.debug  # jinja imports it only when a template fails, when nothing can be opened any more
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

MEMORY_BYTES = 512 << 20  # of address space
CPU_SECONDS = 20  # for one request, in case nobody is left to end this process

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


def answer(request: bytes) -> list[str]:
    """Return the reply to a request."""
    template, variables = json.loads(request)
    try:
        return ["text", compiled(template).render(variables)]
    except MemoryError:
        return ["error", f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"]
    except Exception as error:  # a template can fail in any way
        return ["error", str(error)[:1000] or type(error).__name__]


def limit(kind: int, value: int) -> None:
    """Lower a limit of this process, where the system has it."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until there are no more."""
    # What Python and the C library read from files when it is first used.
    answer(json.dumps([WARM_UP, {}]).encode())
    limit(resource.RLIMIT_AS, MEMORY_BYTES)
    limit(resource.RLIMIT_NOFILE, 0)
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_NPROC, 0)
    replies.write(b"ready")
    replies.flush()
    while header := requests.read(8):
        limit(resource.RLIMIT_CPU, int(time.process_time()) + CPU_SECONDS)
        reply = json.dumps(answer(requests.read(int.from_bytes(header, "little")))).encode()
        replies.write(len(reply).to_bytes(8, "little") + reply)
        replies.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
