"""How sizes, shares and times are written."""

import re
from fractions import Fraction

from duomoe.errors import InputError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(text: str | int, name: str, example: str = "500MB or 2GiB") -> int:
    """Return a size in bytes: a number, or a number with B, KB, MB, GB (powers of 1000) or KiB, MiB, GiB (of 1024).

    Raises:
        InputError: when it is not a size greater than zero; `name` says what was given.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text), re.ASCII)
    if not found or found[2].upper() not in UNITS:
        raise InputError(f"{name}: {text!r} is not a size; write it as {example}")
    size = int(min(float(found[1]), 1e30) * UNITS[found[2].upper()])
    if size < 1:
        raise InputError(f"{name}: must be greater than zero, got {text!r}")
    return size


def parse_size_or_share(text: str | int, name: str) -> int | Fraction:
    """Return a size in bytes as an int (`parse_size`), or what is written as a percentage, 15%, as a Fraction up to 1.

    Raises:
        InputError: when it is neither, or not greater than zero; `name` says what was given.
    """
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*%\s*", str(text), re.ASCII)
    if not found:
        return parse_size(text, name, "500MB, 2GiB or 15%")
    share = Fraction(found[1]) / 100
    if not 0 < share <= 1:
        raise InputError(f"{name}: a share must be more than 0% and at most 100%, got {text!r}")
    return share


def parse_time(text: str | float, name: str) -> float:
    """Return a time in seconds: a number, or a number with s, ms or us.

    Raises:
        InputError: when it is not a time of at least zero; `name` says what was given.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|ms|us)?\s*", str(text), re.ASCII)
    if not found:
        raise InputError(f"{name}: {text!r} is not a time; write it as 10us or 0.5ms")
    return float(found[1]) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[found[2] or "s"]


def format_size(size: int) -> str:
    """Return a size for people, in binary units."""
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.2f} {unit}"
