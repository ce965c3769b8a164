"""What a request asks of its tokens: how they are chosen, when they end, and what is told about them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from duomoe.errors import InputError
from duomoe.grammar import Grammar

# The most alternatives whose log-probabilities can be asked for, as at OpenAI.
MOST_LOGPROBS = 20

# The most that a logit can be moved by `logit_bias`, either way, as at OpenAI.
LARGEST_BIAS = 100.0

_LARGEST_INT = 2**63 - 1


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for; fields are named as the command line's flags.

    Logits are changed in this order: `logit_bias` is added, the three penalties are taken off, what `grammar` or
    `min_tokens` forbid is ruled out, and they are divided by `temperature`. `top_k`, `top_p` and `min_p` then each look
    at the whole distribution; a token must pass all three.

    Attributes:
        max_new_tokens: the most tokens that are generated.
        temperature: 0 takes the most likely token.
        top_k: so many of the most likely tokens are kept; 0 keeps all.
        top_p: the smallest set of the most likely tokens whose probability reaches it is kept.
        min_p: tokens are kept that have at least this share of the most likely token's probability.
        seed: makes draws repeatable; None draws one.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in prompt or output.
        presence_penalty: is subtracted from the logits of tokens in the output.
        frequency_penalty: is subtracted as often as a token is in the output.
        logit_bias: by token id, what is added to its logit, from -100 to 100.
        stop: strings that end the text; they are not part of it.
        stop_token_ids: tokens that end the text, as an end-of-sequence token does.
        min_tokens: before so many tokens, none is generated that ends the text. (Stop strings end it all the same.)
        ignore_eos: go on after an end-of-sequence token; with a grammar, its end is the end all the same.
        logprobs: tell each token's log-probability, and those of so many of the likeliest, up to 20; None tells none.
            They are of the model's own distribution, before anything above has changed it.
        prompt_logprobs: the same for the prompt's tokens.
        grammar: what the text has to be.

    Raises:
        InputError: when a value is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise InputError("--stop must be text that is not empty, or a list of such texts")
        object.__setattr__(self, "stop", tuple(stop))
        if not isinstance(self.stop_token_ids, list | tuple) or not all(map(_is_token, self.stop_token_ids)):
            raise InputError(f"--stop-token-id must be token ids, got {self.stop_token_ids!r}")
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        self._check_bias()
        if self.min_tokens > self.max_new_tokens:
            raise InputError(f"--min-tokens {self.min_tokens} is more than --max-new-tokens {self.max_new_tokens}")
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise InputError(f"grammar must be a Grammar, got {type(self.grammar).__name__}")

    @property
    def counts_tokens(self) -> bool:
        """Whether logits depend on which tokens a sequence has, and how often."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed before a token is chosen by them."""
        return bool(self.counts_tokens or self.logit_bias or self.min_tokens or self.grammar is not None)

    def _check_numbers(self) -> None:
        self._whole("max_new_tokens", 1, _LARGEST_INT)
        self._whole("top_k", 0, 2**31 - 1)
        self._whole("min_tokens", 0, _LARGEST_INT)
        for name, most in (("seed", _LARGEST_INT), ("logprobs", MOST_LOGPROBS), ("prompt_logprobs", MOST_LOGPROBS)):
            if getattr(self, name) is not None:
                self._whole(name, 0, most)
        self._number("temperature", 0, 1e6)
        self._number("top_p", 0, 1, above=True)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0, 1e6, above=True)
        self._number("presence_penalty", -2, 2)
        self._number("frequency_penalty", -2, 2)

    def _check_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping) or not all(map(_is_token, self.logit_bias)):
            raise InputError("--logit-bias must give numbers to token ids")
        for token, bias in self.logit_bias.items():
            if not _is_number(bias) or not abs(bias) <= LARGEST_BIAS:
                raise InputError(f"--logit-bias must be a number from -100 to 100, got {bias!r} for token {token}")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))

    def _whole(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if not _is_int(value) or not least <= value <= most:
            raise InputError(f"{_flag(name)} must be a whole number from {least} to {most}, got {value!r}")

    def _number(self, name: str, least: float, most: float, above: bool = False) -> None:
        """Check that a field is a number from `least` (or only above it) to `most`."""
        value = getattr(self, name)
        if not _is_number(value) or not least <= value <= most or (above and value == least):
            bounds = f"above {least} and at most {most:g}" if above else f"from {least} to {most:g}"
            raise InputError(f"{_flag(name)} must be a number {bounds}, got {value!r}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
