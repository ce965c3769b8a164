"""The special tokens that a model folder names outside tokenizer.json, read as transformers reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from duomoe.checkpoint import Checkpoint
from duomoe.errors import InputError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Tokens that transformers' class for Qwen has where tokenizer_config.json does not mention the name. That class is used
# for Qwen's families, if the folder asks for it or for none. Mixtral gets a class that takes nothing for granted.
QWEN_FAMILIES = ("qwen2_moe", "qwen3_moe")
QWEN_DEFAULTS = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")

Token = str | AddedToken


@dataclass(frozen=True)
class SpecialTokens:
    """What a folder says of special tokens.

    Attributes:
        variables: the text of each named token, as chat templates see it; a name that has no token is absent.
        added: tokens that the vocabulary must have, in the order in which missing ones get their ids.
    """

    variables: dict[str, str]
    added: list[AddedToken]


def read_special_tokens(checkpoint: Checkpoint, known: set[str]) -> SpecialTokens:
    """Read tokenizer_config.json, special_tokens_map.json and added_tokens.json of a folder.

    The latter two count only where the first has no `added_tokens_decoder`.

    Args:
        checkpoint: the folder.
        known: texts of the added tokens that tokenizer.json has.

    Raises:
        InputError: when a file is no JSON object, or a token in it is not one.
    """
    try:
        return _read(checkpoint, known)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{checkpoint.path}: its special tokens cannot be read: {error}") from None


def _read(checkpoint: Checkpoint, known: set[str]) -> SpecialTokens:
    config = checkpoint.read_json("tokenizer_config.json") or {}
    asked = config.get("tokenizer_class") or checkpoint.config.get("tokenizer_class") or "Qwen2Tokenizer"
    is_qwen = checkpoint.config.get("model_type") in QWEN_FAMILIES and asked in ("Qwen2Tokenizer", "Qwen2TokenizerFast")
    values: dict[str, Any] = (QWEN_DEFAULTS if is_qwen else {}) | config
    if not values.get("extra_special_tokens"):  # the older name
        values["extra_special_tokens"] = values.pop("additional_special_tokens", None)
    # Names that only this model has: what tokenizer_config.json says as plain text counts most.
    own = {name: values.pop(name) for name in _own_names(values) if isinstance(values[name], str)}
    own |= _named_extra(values)
    if "added_tokens_decoder" in values:
        numbered = {int(index): _token(token) for index, token in values["added_tokens_decoder"].items()}
    else:
        more = checkpoint.read_json("special_tokens_map.json") or {}
        listed = _listed(values.get("extra_special_tokens"))
        values |= more
        own |= _named_extra(values)
        values["extra_special_tokens"] = listed + [
            token for token in _listed(more.get("extra_special_tokens")) if token not in listed
        ]
        numbered = _added_tokens_file(checkpoint, values)
    named = {name: _token(values[name]) for name in NAMED if values.get(name) is not None}
    named |= {name: _token(values[name]) for name in _own_names(values)}
    named |= {name: _token(token) for name, token in own.items()}
    extra = _listed(values.get("extra_special_tokens") or values.get("additional_special_tokens"))

    texts = {name: str(token) for name, token in named.items()}
    added = [token for _, token in sorted(numbered.items())]
    known = known | {str(token) for token in added}
    for token in [*named.values(), *extra]:
        if str(token) not in known:
            known.add(str(token))
            added.append(token if isinstance(token, AddedToken) else AddedToken(token, special=True))
    for token in added:
        token.special = token.special or str(token) in texts.values()
    return SpecialTokens(texts, added)


def _added_tokens_file(checkpoint: Checkpoint, values: dict[str, Any]) -> dict[int, AddedToken]:
    """Return what the file of older tokenizers says: a token's id, by its text."""
    named = [_token(values[name]) for name in NAMED if values.get(name)]
    special = {str(token) for token in (*named, *values["extra_special_tokens"])}
    file = checkpoint.read_json("added_tokens.json") or {}
    return {
        int(index): AddedToken(text, normalized=text not in special, special=text in special)
        for text, index in file.items()
    }


def _own_names(values: dict[str, Any]) -> list[str]:
    """Return the names of tokens that only this model has."""
    return [
        name for name, value in values.items() if name.endswith("_token") and name not in NAMED and _is_token(value)
    ]


def _named_extra(values: dict[str, Any]) -> dict[str, Any]:
    """Return the extra tokens where they have names."""
    found = values.get("extra_special_tokens")
    return dict(found) if isinstance(found, Mapping) else {}


def _listed(found: Any) -> list[Token]:
    """Return the extra tokens where they have no names; they are special if they do not say otherwise."""
    if not found or isinstance(found, Mapping):
        return []
    return [_token({"special": True, **token} if isinstance(token, Mapping) else token) for token in found]


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Mapping) and isinstance(value.get("content"), str))


def _token(value: Any) -> Any:
    """Return a token; files write it plain or as an object."""
    if isinstance(value, str | AddedToken):
        return value
    if not _is_token(value):
        raise ValueError(f"{value!r} is not a token")
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(value["content"], **{flag: bool(value[flag]) for flag in flags if value.get(flag) is not None})
