"""What a step needs to know of each running sequence, in rows on the device that change by increments.

A sequence has a row while it runs. The host sends what has changed since the last step, in one copy: a page that was
added, a sequence that came, which rows a step is of. Its last token and its length the device keeps up by itself. So
what a step sends does not grow with how long sequences are or may get.
"""

import struct
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from duomoe.memory.pages import pages_for
from duomoe.sampling import SamplingParams

# Words of a row, of 64 bits each: whole numbers, float64 numbers, and then the pages in order.
TOKEN, LENGTH, SEED, TOP_K = range(4)
TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(4, 10)
PAGES = 10


class Sequences:
    """The rows of up to `max_batch` sequences, and behind them one for padding: a sequence without tokens.

    Args:
        device: where they are.
        max_batch: the most sequences at a time.
        max_pages: the most pages of a sequence.
        vocab: tokens that logits are of.

    Attributes:
        table: [max_batch + 1, words] int64. What lies behind a sequence's last page means nothing.
        numbers: the same memory as float64.
        step_rows: [max_batch] int64, the rows of the step under way, in its order.
        bias: [max_batch + 1, vocab] float32, what is added to logits.
        seen: [max_batch + 1, vocab] int32, of each token twice the times it is in the output, and one more if it is in
            the prompt; only of sequences whose parameters ask for it.
        allowed: [max_batch + 1, ceil(vocab / 32)] int32, a bit for each token that may come next.
    """

    def __init__(self, device: torch.device, max_batch: int, max_pages: int, vocab: int) -> None:
        rows, self._width = max_batch + 1, PAGES + max_pages
        self._device, self._max_batch = device, max_batch
        self._words = torch.zeros(_words(max_batch, max_pages), dtype=torch.int64, device=device)
        self.table = self._words[: rows * self._width].view(rows, self._width)
        self.numbers = self.table.view(torch.float64)
        self.step_rows = self._words[rows * self._width :]
        self.bias = torch.zeros(rows, vocab, dtype=torch.float32, device=device)
        self.seen = torch.zeros(rows, vocab, dtype=torch.int32, device=device)
        self.allowed = torch.full((rows, _mask_words(vocab)), -1, dtype=torch.int32, device=device)
        self._rows: dict[Hashable, int] = {}  # by whose they are
        self._pages: dict[int, int] = {}  # how many of its pages a row has
        self._changed_logits: set[int] = set()  # rows of which bias, seen or allowed say anything
        self._step = [0] * max_batch  # what `step_rows` is to be
        self._changes: dict[int, int] = {}  # words to be sent, by their place
        self._write(max_batch * self._width, _fields(0, 0, SamplingParams()))

    @property
    def num_bytes(self) -> int:
        """Bytes of everything on the device."""
        return sum(tensor.nbytes for tensor in (self._words, self.bias, self.seen, self.allowed))

    def join(
        self,
        owner: Hashable,
        tokens: Sequence[int],
        prompt_length: int,
        pages: Sequence[int],
        seed: int,
        params: SamplingParams,
    ) -> None:
        """Give a sequence a row, or write its row anew.

        Args:
            owner: whose row it is, from here on.
            tokens: its tokens, all with keys.
            prompt_length: so many of them are the prompt's.
            pages: where its keys are.
            seed: of its draws.
            params: how its tokens are chosen.
        """
        if owner not in self._rows:
            taken = set(self._rows.values())
            self._rows[owner] = next(row for row in range(self._max_batch) if row not in taken)
        row = self._rows[owner]
        self._pages[row] = 0
        self._write(row * self._width, _fields(len(tokens), seed, params))
        self.extend(owner, pages)
        # Steps count the tokens of all their sequences, so what others have left is cleared for who asks for it.
        if row in self._changed_logits or params.changes_logits:
            self._changed_logits.discard(row)
            self.bias[row].zero_()
            self.seen[row].zero_()
            self.allowed[row].fill_(-1)
        if params.changes_logits:
            self._changed_logits.add(row)
            self._fill(self.bias[row], params.logit_bias or {})
            if params.counts_tokens:
                output = Counter(tokens[prompt_length:])
                twice = Counter({token: 2 * count for token, count in output.items()})
                twice.update(set(tokens[:prompt_length]))
                self._fill(self.seen[row], twice)

    def leave(self, owner: Hashable) -> None:
        """Take back the row of a sequence, if it has one."""
        self._rows.pop(owner, None)

    def extend(self, owner: Hashable, pages: Sequence[int]) -> None:
        """Give a sequence the pages that it has more than it had."""
        row = self._rows[owner]
        there = self._pages[row]
        if len(pages) > there:
            self._write(row * self._width + PAGES + there, pages[there:])
            self._pages[row] = len(pages)

    def choose(self, owners: Sequence[Hashable], size: int) -> None:
        """Say whose sequences the next step is of; up to `size`, padding follows."""
        rows = [self._rows[owner] for owner in owners] + [self._max_batch] * (size - len(owners))
        begin = len(self.table) * self._width
        for place, row in enumerate(rows):
            if self._step[place] != row:
                self._step[place] = row
                self._changes[begin + place] = row

    def send(self) -> None:
        """Send what has changed."""
        if self._changes:
            places, words = _sent([[*self._changes], [*self._changes.values()]], torch.int64, self._device)
            self._words.scatter_(0, places, words)
            self._changes.clear()

    def allow(self, masks: Mapping[Hashable, bytes | None]) -> None:
        """Say which tokens may come next in some sequences.

        Args:
            masks: by whose sequence it is, a bit for each token in little-endian order; None allows all.
        """
        if not masks:
            return
        size = 4 * self.allowed.shape[1]
        every = b"\xff" * size
        bits = b"".join((mask or every)[:size].ljust(size, b"\0") for mask in masks.values())
        rows = _sent([self._rows[owner] for owner in masks], torch.int64, self._device)
        words = _sent(torch.frombuffer(bytearray(bits), dtype=torch.int32), torch.int32, self._device)
        self.allowed.index_copy_(0, rows, words.view(len(masks), -1))

    def advance(self, rows: Tensor, tokens: Tensor, count: bool) -> None:
        """Add a token to each sequence of a step; padding stays what it is.

        Args:
            rows: [sequences] int64, of the step.
            tokens: [sequences] int64.
            count: enter them in `seen`.
        """
        lengths = self.table[:, LENGTH].index_select(0, rows)
        real = (lengths > 0).to(torch.int64)
        self.table[:, TOKEN : LENGTH + 1].index_copy_(0, rows, torch.stack([tokens * real, lengths + real], 1))
        if count:
            self.seen.view(-1).scatter_add_(0, rows * self.seen.shape[1] + tokens, (2 * real).to(torch.int32))

    def _write(self, place: int, words: Sequence[int]) -> None:
        self._changes.update(enumerate(words, place))

    def _fill(self, row: Tensor, values: Mapping[int, float]) -> None:
        """Put values [by token] into a row of a table that is 0."""
        if values:
            tokens = _sent([*values], torch.int64, self._device)
            row.scatter_(0, tokens, _sent([*values.values()], row.dtype, self._device))


def row_pages(max_tokens: int) -> int:
    """Return how many pages a row has room for, where sequences have up to so many tokens."""
    return max(2, pages_for(max_tokens))


def sequences_bytes(max_batch: int, max_pages: int, vocab: int) -> int:
    """Return what `Sequences.num_bytes` is."""
    return 8 * _words(max_batch, max_pages) + 4 * (max_batch + 1) * (2 * vocab + _mask_words(vocab))


def _words(max_batch: int, max_pages: int) -> int:
    return (max_batch + 1) * (PAGES + max_pages) + max_batch


def _mask_words(vocab: int) -> int:
    return -(-vocab // 32)


def _fields(length: int, seed: int, params: SamplingParams) -> list[int]:
    """Return the words of a row in front of its pages."""
    penalties = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
    numbers = struct.pack("=6d", params.temperature, params.top_p, params.min_p, *penalties)
    return [0, length, seed, params.top_k, *struct.unpack("=6q", numbers)]


def _sent(values: object, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return values on a device, on their way there from pinned memory if it is a GPU."""
    there = torch.as_tensor(values, dtype=dtype)
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there
