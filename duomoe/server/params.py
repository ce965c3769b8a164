"""From what a client asks for to `SamplingParams`; the one place where the two meet."""

import re
from collections.abc import Mapping
from typing import Any

from duomoe.errors import InputError
from duomoe.grammar import Grammar
from duomoe.sampling import SamplingParams
from duomoe.server.protocol import INT64, GrammarSource, Sampling

# What generation_config.json may say about sampling, for requests that do not say it.
_FROM_CHECKPOINT = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def default_options(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how choices are drawn where a request does not say: as the checkpoint does, else at temperature 1.

    Values that `SamplingParams` refuses are left out.
    """
    defaults: dict[str, Any] = {"temperature": 1.0}
    if generation_config.get("do_sample") is False:
        return {"temperature": 0.0}
    for name in _FROM_CHECKPOINT:
        value = generation_config.get(name)
        if value is not None:
            try:
                SamplingParams(**{name: value})
            except InputError:
                continue
            defaults[name] = value
    return defaults


def sampling_params(sampling: Sampling, defaults: Mapping[str, Any], longest: int) -> list[SamplingParams]:
    """Return the parameters of each of a prompt's choices, which differ in their seeds.

    Args:
        sampling: what the client asks for.
        defaults: see `default_options`.
        longest: tokens that a sequence may have.

    Raises:
        InputError: when a value is out of range, or a grammar cannot be used.
    """
    options = {**defaults, **sampling.options}
    options["max_new_tokens"] = min(options["max_new_tokens"], longest)
    if sampling.grammar is not None:
        options["grammar"] = _grammar(sampling.grammar)
    try:
        first = SamplingParams(**options)
        if sampling.seed is None:
            return [first] * sampling.n
        return [SamplingParams(**options, seed=(sampling.seed + number) % INT64) for number in range(sampling.n)]
    except InputError as error:
        raise InputError(_in_fields(str(error))) from None


def _grammar(wanted: GrammarSource) -> Grammar:
    """Return what an answer has to follow, as the engine takes it."""
    if wanted.kind == "json_object":
        return Grammar.json_object()
    make = {"json_schema": Grammar.json_schema, "regex": Grammar.regex, "lark": Grammar.lark}[wanted.kind]
    return make(wanted.source)


def _in_fields(message: str) -> str:
    """Return a message about flags of the command line as one about a request's fields."""
    return re.sub(r"--([a-z]+(?:-[a-z]+)*)", lambda found: found[1].replace("-", "_"), message).replace(
        "max_new_tokens", "max_tokens"
    )
