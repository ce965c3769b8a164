"""Which tokens may come next in each sequence, made on the host: by its grammar, and until it has its least tokens."""

from collections.abc import Hashable, Iterable, Sequence

from duomoe.engine.request import Request


def changed_masks(
    requests: Sequence[Request], eos: frozenset[int], vocab: int, begun: bool
) -> tuple[dict[Hashable, bytes | None], dict[Hashable, Exception]]:
    """Return the masks that are others than in the step before.

    Args:
        requests: with all tokens that their sequences have.
        eos: token ids that end a sequence.
        vocab: tokens that there are.
        begun: they have no masks so far.

    Returns:
        For requests a bit for each token, or None where all may come; and what has failed, for the requests that it
        ends.
    """
    masks: dict[Hashable, bytes | None] = {}
    failures: dict[Hashable, Exception] = {}
    for request in requests:
        missing = request.params.min_tokens - request.answered
        try:
            if request.matcher is not None:
                request.matcher.follow(request.tokens[request.prompt_length + request.matcher.taken :])
                mask = request.matcher.allowed()
                masks[request] = _without(mask, request.ends(eos)) if missing > 0 else mask
            elif missing > 0 and begun:
                masks[request] = _without(b"\xff" * -(-vocab // 8), request.ends(eos))
            elif missing == 0 and not begun:
                masks[request] = None
        except Exception as error:  # whatever a grammar does, it is its own request's
            failures[request] = error
    return masks, failures


def _without(mask: bytes, tokens: Iterable[int]) -> bytes:
    """Return a mask that forbids some tokens, too; but the same where it would forbid all."""
    fewer = bytearray(mask)
    for token in tokens:
        if token < 8 * len(fewer):
            fewer[token >> 3] &= ~(1 << (token & 7))
    return bytes(fewer) if any(fewer) else mask
