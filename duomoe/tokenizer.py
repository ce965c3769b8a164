"""Text to token ids and back: a checkpoint's tokenizer.json, its chat template, and text that streams."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from tokenizers import Tokenizer as Encoder

from duomoe.checkpoint import Checkpoint
from duomoe.errors import InputError
from duomoe.text_file import read_text

# So many of a prompt's last tokens are decoded together with the first new ones.
CONTEXT = 8


class Tokenizer:
    """A checkpoint's tokenizer.

    Raises:
        InputError: when tokenizer.json is not a tokenizer.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        file = checkpoint.path / "tokenizer.json"
        try:
            self.encoder = Encoder.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a malformed file
            raise InputError(f"{file}: not a tokenizer: {error}") from None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Return the token ids of `text`; `special` adds what the model expects around it, such as a BOS token.

        Raises:
            InputError: when the tokenizer has no tokens for it.
        """
        try:
            ids: list[int] = self.encoder.encode(text, add_special_tokens=special).ids
        except Exception as error:  # the library raises bare Exception, and TypeError for lone surrogates
            raise InputError(f"the prompt cannot be turned into tokens: {error}") from None
        return ids

    def decode(self, tokens: list[int]) -> str:
        """Return the text of some tokens, without special ones."""
        text: str = self.encoder.decode(tokens, skip_special_tokens=True)
        return text

    def encode_chat(self, message: str) -> list[int]:
        """Return the token ids of a conversation that consists of one user message, by the chat template.

        Raises:
            InputError: when there is no template, or it cannot be rendered.
        """
        return self.encode(self._render([{"role": "user", "content": message}]), special=False)

    def _render(self, messages: list[dict[str, str]]) -> str:
        config = self._checkpoint.read_json("tokenizer_config.json") or {}
        template = self._template(config)
        try:
            import jinja2
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise InputError("--chat needs jinja2; install it with: pip install 'duomoe[chat]'") from None

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        def as_json(value: object, **options: Any) -> str:
            # Jinja's own filter escapes for HTML, which a prompt is not.
            return json.dumps(value, **({"ensure_ascii": False} | options))

        # What transformers gives to templates, apart from its tag `generation`, which marks text for training.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = as_json
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        special = {name: _token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            return environment.from_string(template).render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **special
            )
        except Exception as error:  # a template is a program of the checkpoint's: it can fail in any way
            reason = str(error) or type(error).__name__
            raise InputError(f"{self._checkpoint.path}: the chat template failed: {reason}") from None

    def _template(self, config: dict[str, Any]) -> str:
        file = self._checkpoint.path / "chat_template.jinja"
        if file.is_file():
            return read_text(file)
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            entries = [item for item in template if isinstance(item, dict) and isinstance(item.get("name"), str)]
            named = {item["name"]: item.get("template") for item in entries}
            template = named.get("default")
        if not isinstance(template, str):
            raise InputError(f"{self._checkpoint.path}: the checkpoint has no chat template; leave out --chat")
        return template


def _token_text(token: Any) -> str:
    """Return a special token's text; configs write it plain or as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


class TextStream:
    """Turns one sequence's tokens into text as they come, and ends it at a stop string.

    Text is held back while it may be half a character, or the beginning of a stop string. It is decoded as the
    continuation of the prompt, so that a word's leading space is not taken for the beginning of a text.

    Args:
        tokenizer: None where the checkpoint has none; the text stays empty then.
        stop: strings that end the text.
        prompt: what the sequence begins with.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str], prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        # Decoding looks back to where the last certain text began: how a token reads may depend on the one before it.
        self._tokens = list(prompt[-CONTEXT:])
        self._begin, self._end = 0, len(self._tokens)  # the tokens of the last certain text
        self._held = ""  # decoded, not yet given out
        self.stopped = False
        self.text = ""  # all that was given out

    def push(self, token: int) -> str:
        """Take the next token; return the text that is now certain."""
        if self._tokenizer is not None and not self.stopped:
            self._tokens.append(token)
            self._decode(final=False)
        return self._give_out(final=False)

    def finish(self) -> str:
        """Return what was held back, once no more tokens come; half a character becomes U+FFFD."""
        if self._tokenizer is not None and not self.stopped:
            self._decode(final=True)
        return self._give_out(final=True)

    def _decode(self, final: bool) -> None:
        assert self._tokenizer is not None
        known = self._tokenizer.decode(self._tokens[self._begin : self._end])
        text = self._tokenizer.decode(self._tokens[self._begin :])
        if len(text) > len(known) and (final or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            self._held += text[len(known) :]
            self._begin, self._end = self._end, len(self._tokens)

    def _give_out(self, final: bool) -> str:
        found = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
        else:
            keep = 0 if final else max((_overlap(self._held, text) for text in self._stop), default=0)
            cut = len(self._held) - keep
            certain, self._held = self._held[:cut], self._held[cut:]
        self.text += certain
        return certain


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
