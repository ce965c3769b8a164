"""The fields of a JSON object that a client has sent: read by name and type, and nothing left unread."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from duomoe.server.errors import ApiError, invalid


def parse_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object that a body is.

    Raises:
        ApiError: when it is not UTF-8, not JSON (NaN is not), nested too deeply, or not an object.
    """
    try:
        parsed = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8 text") from None
    except RecursionError:
        raise invalid("the body is nested too deeply") from None
    except ValueError as error:  # JSON's own errors, and whole numbers of thousands of digits
        raise invalid(f"the body is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise invalid("the body is not a JSON object")
    return parsed


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number that JSON has")


class Fields:
    """An object's fields. Each is taken once; null counts as absent; `finish` refuses what nobody took.

    Args:
        given: the object.
        where: its name within the request, for messages; empty for the request itself.
    """

    def __init__(self, given: Mapping[str, Any], where: str = "") -> None:
        self._left = {name: value for name, value in given.items() if value is not None}
        self._prefix = f"{where}." if where else ""

    def take(self, name: str) -> Any:
        """Return a field of any type, or None."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        """Return a text, or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            raise self._wrong(name, "must be a text", value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(name, "must be true or false", value)
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """Return a whole number within bounds (8.0 is one), or None."""
        value = self.take(name)
        if value is None:
            return None
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not low <= value <= high:
            raise self._wrong(name, f"must be a whole number from {low} to {high}", value)
        return int(value)

    def number(self, name: str, low: float, high: float) -> float | None:
        """Return a number within bounds, or None."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self._wrong(name, f"must be a number from {low:g} to {high:g}", value)
        return float(value)

    def texts(self, name: str, most: int, longest: int) -> list[str]:
        """Return a list of texts that are not empty; a text alone is a list of one."""
        value = self.take(name)
        texts = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(texts, list) or len(texts) > most:
            raise self._wrong(name, f"must be a text or a list of at most {most} texts", value)
        if not all(isinstance(text, str) and 0 < len(text) <= longest for text in texts):
            raise self._wrong(name, f"must hold texts of 1 to {longest} characters", value)
        return texts

    def object(self, name: str) -> "Fields | None":
        """Return the fields of an object within, or None."""
        value = self.mapping(name)
        return None if value is None else Fields(value, self.name_of(name))

    def mapping(self, name: str) -> dict[str, Any] | None:
        """Return an object as it is, or None."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, "must be an object", value)
        return value

    def name_of(self, name: str) -> str:
        """Return a field's name within the request."""
        return self._prefix + name

    def finish(self, accepted: Collection[str], neutral: Mapping[str, Any]) -> None:
        """Refuse what is left, by name.

        Args:
            accepted: fields that may say anything, because they do not change an answer.
            neutral: fields that may only say what holds anyway.
        """
        for name, value in self._left.items():
            if name in accepted or (name in neutral and _same(value, neutral[name])) or value in ([], {}):
                continue
            hint = f"; leave it out, or say {json.dumps(neutral[name])}" if name in neutral else ""
            raise invalid(f"{self.name_of(name)} is not supported here{hint}", self.name_of(name), "unsupported")

    def _wrong(self, name: str, must: str, value: Any) -> ApiError:
        return invalid(f"{self.name_of(name)} {must}, got {shown(value)}", self.name_of(name))


def _same(value: Any, neutral: Any) -> bool:
    return bool(value == neutral and isinstance(value, bool) == isinstance(neutral, bool))


def shown(value: Any) -> str:
    """Return a value for a message; a long one shortened."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a number beyond all bounds"
    if isinstance(value, int) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
