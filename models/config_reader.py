"""Typed access to the JSON objects that describe a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

from duomoe.errors import InputError

# No size in a config is larger: beyond it, products of two no longer fit 64 bits.
MAX_SIZE = 2**31 - 1


class ConfigReader:
    """Typed access to a JSON object of a checkpoint; every complaint names the key.

    A key that is absent has the family's default. One that is null has no value: that is None where it may have none,
    and refused elsewhere.

    Args:
        raw: the object.
        defaults: what keys have that are absent; there is none for others.
        where: what complaints begin with.

    Raises:
        InputError: from any method, when a value is missing, of the wrong type or out of range.
    """

    def __init__(self, raw: Mapping[str, Any], defaults: Mapping[str, Any], where: str = "config.json") -> None:
        self.raw, self.defaults, self.where = raw, defaults, where

    def value(self, *keys: str) -> Any:
        """Return what stands under the first of `keys`, spellings of one thing, that is there."""
        key = self._spelling(keys)
        if key not in self.raw and key not in self.defaults:
            raise InputError(f"{self.where}: {key} is missing")
        return self.raw[key] if key in self.raw else self.defaults[key]

    def _spelling(self, keys: Sequence[str]) -> str:
        return next((key for key in keys if key in self.raw), keys[0])

    def count(self, *keys: str, low: int = 1, high: int = MAX_SIZE) -> int:
        """Return an integer from `low` to `high`."""
        value = self.value(*keys)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.unusable(self._spelling(keys), value, f"a whole number from {low} to {high}")
        return value

    def optional_count(self, key: str) -> int | None:
        """Return an integer of at least 1, or None for null."""
        return None if self.value(key) is None else self.count(key)

    def number(self, key: str, low: float = 1e-30, high: float = 1e30) -> float:
        """Return a number from `low` to `high`."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.unusable(key, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        """Return a number from `low` to `high`, or None for null and zero."""
        value = self.value(key)
        return None if value is None or value == 0 else self.number(key, low, high)

    def flag(self, key: str) -> bool:
        """Return a boolean."""
        value = self.value(key)
        if not isinstance(value, bool):
            raise self.unusable(key, value, "true or false")
        return value

    def choice(self, *keys: str, of: Sequence[str]) -> str:
        """Return one of some strings."""
        value = self.value(*keys)
        if not isinstance(value, str) or value not in of:
            raise self.unusable(self._spelling(keys), value, f"one of {', '.join(of)}")
        return value

    def unusable(self, key: str, value: object, expected: str) -> InputError:
        """Return a complaint about a value."""
        return InputError(f"{self.where}: {key} must be {expected}, found {short(value)}")


def short(value: object) -> str:
    """Return a value for a message of one line, as JSON spells what Python spells otherwise."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "an absurdly large one"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str | list | dict) and len(value) > 60:
        value = value[:60] if not isinstance(value, dict) else dict(list(value.items())[:10])
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
