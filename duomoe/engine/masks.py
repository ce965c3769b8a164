"""Which tokens may come next in each sequence, made on the host: by its grammar, and before its least number of tokens."""

from collections.abc import Iterable, Sequence

from duomoe.engine.request import Request


def changed_masks(
    requests: Sequence[Request], eos: frozenset[int], vocab: int, begun: bool
) -> tuple[dict[int, bytes | None], dict[int, Exception]]:
    """Return the masks that are others than in the step before.

    Args:
        requests: with all tokens that their sequences have.
        eos: token ids that end a sequence.
        vocab: tokens that there are.
        begun: they have no masks so far.

    Returns:
        By the request's number a bit for each token, or None where all may come; and what has failed, by the number of
        the request that it ends.
    """
    masks: dict[int, bytes | None] = {}
    failures: dict[int, Exception] = {}
    for request in requests:
        missing = request.params.min_tokens - len(request.generated)
        try:
            if request.matcher is not None:
                request.matcher.follow(request.generated)
                mask = request.matcher.allowed()
                masks[request.number] = _without(mask, request.ends(eos)) if missing > 0 else mask
            elif missing > 0 and begun:
                masks[request.number] = _without(b"\xff" * -(-vocab // 8), request.ends(eos))
            elif missing == 0 and not begun:
                masks[request.number] = None
        except Exception as error:  # whatever a grammar does, it is its own request's
            failures[request.number] = error
    return masks, failures


def _without(mask: bytes, tokens: Iterable[int]) -> bytes:
    """Return a mask that forbids some tokens, too; but the same where it would forbid all."""
    fewer = bytearray(mask)
    for token in tokens:
        if token < 8 * len(fewer):
            fewer[token >> 3] &= ~(1 << (token & 7))
    return bytes(fewer) if any(fewer) else mask
