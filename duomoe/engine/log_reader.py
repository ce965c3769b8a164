"""An engine's log as it is read (log.py says what is in it): checked line by line, so that what is left can be trusted.

A log may come from anywhere. What it says bounds how long a simulation takes and how much memory that needs, so nothing
is believed that the lines before do not bear out.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from duomoe.engine.log import KEY_BYTES
from duomoe.engine.scheduler import Limits
from duomoe.errors import InputError
from duomoe.memory.pages import PAGE_SIZE, pages_for
from duomoe.text_file import read_text

# More pages than any device has: with 4 KiB a token, which is less than models need, they take 256 GiB. In a simulation
# they take some hundred MiB.
MOST_PAGES = 1 << 22

# Of all sequences of a log together: a simulation takes 8 bytes for each, so half a GiB.
MOST_TOKENS = 1 << 26

# Three hundred years. Sums of longer times could leave what a float can say, and a clock that is no number never comes
# to the next arrival.
LATEST = 1e10  # seconds

LARGEST_INT = 2**63 - 1


@dataclass
class LoggedRequest:
    """What a log says of a request.

    Attributes:
        number: its id in the log.
        arrived: when it came, in seconds on the engine's clock.
        prompt: tokens that it came with.
        keys: of its prompt's full pages; None where they serve no other request.
        given: how often it was part of a pass or a step; each gives it one token at most.
        first_token: when it got its first one; None where it got none.
        ended: when it did; None where it had not at the log's end.
        length: its tokens by then.
        failed: it ended with an error, or was cancelled.
    """

    number: int
    arrived: float
    prompt: int
    keys: list[bytes] | None
    given: int = 0
    first_token: float | None = None
    ended: float | None = None
    length: int = 0
    failed: bool = False


@dataclass(frozen=True)
class Work:
    """A pass or a step: how many tokens it computed, and how many seconds that took."""

    prefill: bool
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Log:
    """What a log says.

    Attributes:
        pages: of the KV cache.
        limits: of decisions.
        requests: all that arrived, in the order of the log, which may not be quite that of `arrived`.
        work: in order.
    """

    pages: int
    limits: Limits
    requests: list[LoggedRequest]
    work: list[Work]


def read_log(path: Path) -> Log:
    """Read an engine's log.

    Raises:
        InputError: when it is none: a field is missing or out of range, or a line does not go with those before it.
    """
    reader: _Reader | None = None
    for number, text in enumerate(read_text(path).splitlines(), start=1):
        line = _Line(f"{path}: line {number}", text)
        if (line.event == "begin") != (number == 1):
            line.refuse("`begin` is the first event, and no other")
        if reader is None:
            limits = Limits(line.whole("max_batch", 1), line.whole("pass_tokens", 1), line.yes("interruptible"))
            reader = _Reader(Log(line.whole("pages", 1, MOST_PAGES), limits, [], []))
        else:
            reader.take(line)
    if reader is None:
        raise InputError(f"{path}: an engine's log is not empty")
    return reader.log


class _Line:
    """One line of a log; `where` is how complaints begin."""

    def __init__(self, where: str, text: str) -> None:
        self._where = where
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            self.refuse("it is no JSON object")
        self._fields: dict[str, Any] = fields
        self.event = self._fields.get("event")

    def refuse(self, what: str) -> NoReturn:
        raise InputError(f"{self._where} is not that of an engine's log: {what}")

    def field(self, name: str) -> Any:
        if name not in self._fields:
            self.refuse(f"{name} is missing")
        return self._fields[name]

    def whole(self, name: str, least: int, most: int = LARGEST_INT) -> int:
        value = self.field(name)
        if type(value) is not int or not least <= value <= most:  # type, because True is an int
            self.refuse(f"{name} is not a whole number from {least} to {most}")
        return value

    def seconds(self, name: str) -> float:
        value = self.field(name)
        if type(value) not in (int, float) or not 0 <= value <= LATEST:
            self.refuse(f"{name} is not a number of seconds from 0 to {LATEST:.0e}")
        return float(value)

    def yes(self, name: str) -> bool:
        value = self.field(name)
        if not isinstance(value, bool):
            self.refuse(f"{name} is not true or false")
        return value

    def keys(self, name: str, count: int) -> list[bytes] | None:
        value = self.field(name)
        if value is None:
            return None
        try:
            found = [bytes.fromhex(key) for key in value]
        except (TypeError, ValueError):
            found = []
        if {len(key) for key in found} - {KEY_BYTES} or len(set(found)) != len(found) or len(found) != count:
            self.refuse(f"{name} are not the {count} different ones of its full pages, {KEY_BYTES} bytes each")
        return found


class _Reader:
    """Takes line by line; `log` is what they come to."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self._under_way: dict[int, LoggedRequest] = {}
        self._known: set[int] = set()
        self._tokens = 0
        self._worked = self._ended = 0.0  # when the latest pass or step did, and the latest request

    def take(self, line: _Line) -> None:
        match line.event:
            case "arrive":
                self._arrive(line)
            case "prefill" | "decode":
                self._advance(line)
            case "end":
                self._end(line)
            case _:
                line.refuse("no event has such a name")

    def _arrive(self, line: _Line) -> None:
        number = line.whole("id", 0)
        if number in self._known:
            line.refuse(f"id {number} has arrived before")
        prompt = line.whole("tokens", 1, MOST_TOKENS)
        self._count(line, prompt, prompt + 1)
        keys = line.keys("keys", prompt // PAGE_SIZE)
        self._known.add(number)
        self._under_way[number] = LoggedRequest(number, line.seconds("at"), prompt, keys)
        self.log.requests.append(self._under_way[number])

    def _count(self, line: _Line, new: int, longest: int) -> None:
        """Count tokens, of a request that may have `longest`; the last one's key is never made."""
        if pages_for(longest - 1) > self.log.pages:
            line.refuse(f"so many tokens do not fit in {self.log.pages} pages of {PAGE_SIZE}")
        self._tokens += new
        if self._tokens > MOST_TOKENS:
            line.refuse(f"with it, there are more than {MOST_TOKENS} tokens; cut the log there")

    def _advance(self, line: _Line) -> None:
        at, seconds, prefill = line.seconds("at"), line.seconds("seconds"), line.event == "prefill"
        if at < self._worked:
            line.refuse("it ends before the pass or step before it")
        self._worked = at
        numbers = line.field("ids")
        if not isinstance(numbers, list) or not all(type(number) is int for number in numbers):
            line.refuse("ids is not a list of whole numbers")
        seen: set[int] = set()
        for number in numbers:
            request = self._request(line, number)
            if number in seen:
                line.refuse(f"id {number} is there twice")
            seen.add(number)
            if at < request.arrived:
                line.refuse(f"it ends before id {number} has arrived")
            request.given += 1
            if prefill and request.first_token is None:
                request.first_token = at
        self.log.work.append(Work(prefill, line.whole("tokens", 1, MOST_TOKENS), seconds))

    def _end(self, line: _Line) -> None:
        number = line.whole("id", 0)
        request = self._request(line, number)
        at, length = line.seconds("at"), line.whole("tokens", 1, MOST_TOKENS)
        if at < max(request.arrived, self._ended):
            line.refuse(f"it is before id {number} has arrived, or before another end")
        self._ended = at
        if not request.prompt <= length <= request.prompt + request.given:
            line.refuse(f"id {number} has {request.prompt} to {request.prompt + request.given} tokens by then")
        self._count(line, length - request.prompt, length)
        request.ended, request.length, request.failed = at, length, line.yes("failed")
        del self._under_way[number]

    def _request(self, line: _Line, number: int) -> LoggedRequest:
        if number not in self._under_way:
            line.refuse(f"id {number} is not under way")
        return self._under_way[number]
