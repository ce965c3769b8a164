"""Text to token ids and back, by a checkpoint's tokenizer."""

from collections.abc import Sequence
from functools import cached_property

from tokenizers import Tokenizer as Encoder

from duomoe.checkpoint import Checkpoint
from duomoe.detokenizer import Decoding, Detokenizer
from duomoe.errors import PromptTooLong, naming_failures
from duomoe.special_tokens import read_special_tokens
from duomoe.token_bound import TokenBound

# A text of up to so many characters for each token that it may have is turned into tokens at once. Beyond, it is first
# asked whether it can possibly be that few.
CHARACTERS_PER_TOKEN = 8


class Tokenizer:
    """A checkpoint's tokenizer.

    Attributes:
        encoder: the tokenizers library's.
        variables: the texts of its named special tokens (`bos_token` and so on), as chat templates see them.

    Raises:
        InputError: when tokenizer.json is not a tokenizer, or the folder's special tokens cannot be read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        file = checkpoint.path / "tokenizer.json"
        with naming_failures(f"{file}: not a tokenizer"):
            self.encoder = Encoder.from_file(str(file))
            self.encoder.no_truncation()
            self.encoder.no_padding()
        known = self.encoder.get_added_tokens_decoder()
        found = read_special_tokens(checkpoint, {token.content for token in known.values()})
        with naming_failures(f"{checkpoint.path}: its special tokens cannot be added to the vocabulary"):
            self.encoder.add_tokens(found.added)
        self.variables = found.variables
        added = self.encoder.get_added_tokens_decoder()
        # A token that has once been special stays so for the library, whatever it is declared to be later.
        self._special = frozenset(id for tokens in (known, added) for id, token in tokens.items() if token.special)
        self._detokenizers: dict[tuple[str, ...], Detokenizer] = {}

    def encode(self, text: str, special: bool = True, limit: int | None = None) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: of any length.
            special: add what the model expects around it, such as a BOS token.
            limit: how many tokens it may have; a text that certainly has more is refused before it is turned into them.
                The caller still compares the length.

        Raises:
            PromptTooLong: when the text certainly has more tokens than the limit.
            InputError: when the tokenizer has no tokens for it.
        """
        if limit is not None and len(text) > CHARACTERS_PER_TOKEN * limit:
            least = self._bound.least_tokens(text)
            if least > limit:
                raise PromptTooLong(
                    f"the prompt has at least {least} tokens; prompt and answer may have {limit} tokens"
                )
        with naming_failures("the prompt cannot be turned into tokens"):
            ids: list[int] = self.encoder.encode(text, add_special_tokens=special).ids
        return ids

    def detokenizer(self, shown: Sequence[str] = ()) -> Detokenizer:
        """Return what tokens add to a text: special ones nothing, but for those that are to be shown."""
        shown = tuple(shown)
        if shown not in self._detokenizers:
            ids = {self.encoder.token_to_id(text) for text in shown}
            self._detokenizers[shown] = Detokenizer(self.encoder, self._special - ids)
        return self._detokenizers[shown]

    def decode(self, tokens: Sequence[int], shown: Sequence[str] = ()) -> str:
        """Return the text of some tokens, without special ones, but for those that are to be shown."""
        decoding = Decoding(self.detokenizer(shown))
        return "".join([decoding.push(token) for token in tokens]) + decoding.finish()

    @cached_property
    def _bound(self) -> TokenBound:
        return TokenBound(self.encoder)
