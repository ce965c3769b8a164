"""Causal attention over paged keys and values, for prefill (with any existing prefix) and for decode.

Pages hold `page_size` tokens; a sequence's page table says which (Kwon et al., arXiv 2309.06180). Queries of several
sequences stand one after the other in one tensor.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from duomoe.kernels.configuration import TRITON_TYPE, Configuration
from duomoe.kernels.configuration import capability as capability_of
from duomoe.kernels.operator import operator
from duomoe.kernels.threads import ROWS_PER_READ, Threads

# How many queries are scored at once on a CPU; bounds a mask to QUERY_CHUNK * context, and the reference's workspace to
# as many floats per head.
QUERY_CHUNK = 256
# Scores are scaled by it, so that the softmax can use exp2, which the GPU has an instruction for.
LOG2_E = 1.4426950408889634


def paged_attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    max_query_len: int,
    scale: float,
    window: int,
) -> Tensor:
    """Compute `paged_attention` in float32 with plain PyTorch, one sequence after the other."""
    out = torch.zeros_like(q)
    page_size, kv_heads, head_dim = k_pages.shape[1:]
    group = q.shape[1] // kv_heads
    starts, contexts = query_start.tolist(), context_len.tolist()  # host-sync ok: the reference runs on the CPU
    for sequence, context in enumerate(contexts):
        begin, end = starts[sequence], starts[sequence + 1]
        if begin == end:
            continue
        pages = page_table[sequence, : -(-context // page_size)].long()
        k = k_pages[pages].reshape(-1, kv_heads, head_dim)[:context].float().permute(1, 2, 0)
        v = v_pages[pages].reshape(-1, kv_heads, head_dim)[:context].float().transpose(0, 1)
        key_position = torch.arange(context, device=q.device)
        for low in range(begin, end, QUERY_CHUNK):
            high = min(low + QUERY_CHUNK, end)
            position = context - end + torch.arange(low, high, device=q.device)
            visible = key_position <= position[:, None]
            if window > 0:
                visible &= key_position > position[:, None] - window
            # [kv_heads, group, queries, head_dim]: the query heads of a group share one key head.
            heads = q[low:high].float().view(high - low, kv_heads, group, head_dim).permute(1, 2, 0, 3)
            scores = (heads @ k[:, None]) * scale
            scores = scores.masked_fill(~visible, float("-inf"))
            mixed = scores.softmax(-1) @ v[:, None]
            out[low:high] = mixed.permute(2, 0, 1, 3).reshape(high - low, -1, head_dim).to(q.dtype)
    return out


@operator()
def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    max_query_len: int,
    scale: float,
    window: int,
) -> Tensor:
    """Let each query attend to its own sequence's keys up to its own position.

    The last query of a sequence stands at position `context_len - 1`, and its others before it; the keys and values
    of all of them are in the pages already.

    Args:
        q: [tokens, q_heads, head_dim]; `q_heads` is a multiple of `kv_heads`.
        k_pages: [pages, page_size, kv_heads, head_dim].
        v_pages: as `k_pages`.
        page_table: [sequences, max_pages] int32, the pages of each sequence in order; unused entries are not read.
        query_start: [sequences + 1] int32, where each sequence's queries begin in `q`.
        context_len: [sequences] int32, keys of each sequence, its queries' own included.
        max_query_len: the longest sequence's number of queries; 1 selects the decode kernel.
        scale: factor on the scores, usually `head_dim ** -0.5`.
        window: attend to the last `window` positions only, one's own included; 0 means to all.

    Returns:
        [tokens, q_heads, head_dim] in the dtype of `q`. Rows that belong to no sequence are undefined.
    """
    page_size, head_dim = k_pages.shape[1], k_pages.shape[3]
    starts, contexts = query_start.tolist(), context_len.tolist()  # host-sync ok: runs on the CPU
    mixed = []
    for sequence, context in enumerate(contexts):
        begin, end = starts[sequence], starts[sequence + 1]
        if begin == end or context == 0:
            mixed.append(torch.zeros_like(q[begin:end], memory_format=torch.contiguous_format))
            continue
        # Pages that lie before the first query's window are not needed.
        skipped = max(context - (end - begin) - window + 1, 0) // page_size if window > 0 else 0
        pages = page_table[sequence, skipped : -(-context // page_size)].tolist()  # host-sync ok: runs on the CPU
        keys = context - skipped * page_size
        k, v = _in_order(k_pages, pages, keys), _in_order(v_pages, pages, keys)
        with Threads(q.shape[1] * head_dim * keys * (end - begin) // ROWS_PER_READ):
            mixed.append(_attend_on_cpu(q[begin:end], k, v, scale, window))
    if starts[-1] < len(q):
        mixed.append(torch.zeros_like(q[starts[-1] :], memory_format=torch.contiguous_format))
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)


def _in_order(pool: Tensor, pages: list[int], tokens: int) -> Tensor:
    """Return the first tokens of some pages as [kv_heads, tokens, head_dim]; of neighbours in order without a copy."""
    first, (kv_heads, head_dim) = pages[0], pool.shape[2:]
    if pages != list(range(first, first + len(pages))):
        pool, first = pool.index_select(0, torch.tensor(pages)), 0
    start = pool.storage_offset() + first * pool.stride(0)
    return pool.as_strided((kv_heads, tokens, head_dim), (head_dim, kv_heads * head_dim, 1), start)


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """Return the attention of one sequence by torch's own kernel, in the shape of `q`.

    Args:
        q: [queries, q_heads, head_dim], the last one at the last key's position.
        k: [kv_heads, keys, head_dim].
        v: as `k`.
        scale: as in `paged_attention`, and so is `window`.
        window: see above.
    """
    queries, (kv_heads, keys, head_dim) = len(q), k.shape
    if queries == 1:
        # The query heads of a group share their keys, as several queries of one head do.
        grouped = q.view(1, kv_heads, -1, head_dim)
        if 0 < window < keys:
            k, v = k[:, -window:], v[:, -window:]
        return F.scaled_dot_product_attention(grouped, k[None], v[None], scale=scale).view(q.shape)
    heads = q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    k, v = (item[:, None].expand(-1, heads.shape[1], -1, -1) for item in (k, v))
    if queries == keys and not 0 < window < keys:
        mixed = F.scaled_dot_product_attention(heads, k, v, is_causal=True, scale=scale)
        return mixed.permute(2, 0, 1, 3).flatten(1, 2)
    parts = []
    for low in range(0, queries, QUERY_CHUNK):
        high = min(low + QUERY_CHUNK, queries)
        position = torch.arange(low, high) + keys - queries
        first = max(keys - queries + low - window + 1, 0) if window > 0 else 0
        last = keys - queries + high
        behind = position[:, None] - torch.arange(first, last)
        visible = (behind >= 0) & (behind < window) if window > 0 else behind >= 0
        seen = k[:, :, first:last], v[:, :, first:last]
        parts.append(F.scaled_dot_product_attention(heads[:, :, low:high], *seen, attn_mask=visible, scale=scale))
    return torch.cat(parts, 2).permute(2, 0, 1, 3).flatten(1, 2)


@paged_attention.register_fake
def _(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    max_query_len: int,
    scale: float,
    window: int,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@triton.jit
def _attend(
    q: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    position: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    pages: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    kv_head: tl.tensor,
    kv_heads: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Let the rows of `q`, standing at `position`, attend to keys `start : min(start + BLOCK_N, end)`.

    One step of the online softmax (Milakov & Gimelshein, arXiv 1805.02867): `peak` is the largest score so far,
    `total` the sum of `2 ** (score - peak)`, and `mixed` the values weighted by the same. `scale` contains `log2(e)`.
    """
    key = start + tl.arange(0, BLOCK_N)
    element = tl.arange(0, BLOCK_D)
    page = tl.load(pages + key // PAGE_SIZE, mask=key < end, other=0).to(tl.int64)
    row = (page * PAGE_SIZE + key % PAGE_SIZE) * kv_heads + kv_head
    at = row[:, None] * HEAD_DIM + element[None, :]
    inside = (key < end)[:, None] & (element < HEAD_DIM)[None, :]
    k = tl.load(k_pages + at, mask=inside, other=0.0)
    v = tl.load(v_pages + at, mask=inside, other=0.0)

    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    # Most tiles of a long prompt lie before its first row and inside its last row's window: they need no mask.
    if (start + BLOCK_N - 1 > tl.min(position, 0)) | (start <= tl.where(window > 0, tl.max(position, 0) - window, -1)):
        visible = (key[None, :] <= position[:, None]) & (key < end)[None, :]
        visible &= (window <= 0) | (key[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen no key yet still has its peak at -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weight = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(peak - shift)
    mixed = tl.dot(weight.to(v.dtype), v, mixed * decay[:, None], input_precision="ieee")
    return new_peak, total * decay + tl.sum(weight, 1), mixed


@triton.jit(do_not_specialize=("max_pages",))
def _prefill_kernel(
    q: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    page_table: tl.tensor,
    query_start: tl.tensor,
    context_len: tl.tensor,
    out: tl.tensor,
    max_pages: tl.tensor,
    q_heads: tl.tensor,
    kv_heads: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Each program takes one query head and BLOCK_M neighbouring queries of one sequence, over all keys they see."""
    # The last queries see the most keys: they go first, so that no long program starts when the others are done.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence = tl.program_id(2)
    begin = tl.load(query_start + sequence)
    queries = tl.load(query_start + sequence + 1) - begin
    if block * BLOCK_M >= queries:
        return
    context = tl.load(context_len + sequence)
    query = block * BLOCK_M + tl.arange(0, BLOCK_M)
    element = tl.arange(0, BLOCK_D)
    at = ((begin + query).to(tl.int64) * q_heads + head)[:, None] * HEAD_DIM + element[None, :]
    inside = (query < queries)[:, None] & (element < HEAD_DIM)[None, :]
    rows = tl.load(q + at, mask=inside, other=0.0)
    # Rows behind the sequence's last query repeat its position: they see keys, so nothing divides by zero.
    position = context - queries + tl.minimum(query, queries - 1)

    # Tiles of keys start at multiples of BLOCK_N; those before the first query's window are skipped.
    end = tl.minimum(context, context - queries + (block + 1) * BLOCK_M)
    first = tl.where(window > 0, tl.maximum(context - queries + block * BLOCK_M - window + 1, 0), 0)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    pages = page_table + sequence.to(tl.int64) * max_pages
    for start in range(first // BLOCK_N * BLOCK_N, end, BLOCK_N):
        peak, total, mixed = _attend(
            rows, peak, total, mixed, position, start, end, pages, k_pages, v_pages, head // (q_heads // kv_heads),
            kv_heads, scale, window, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    tl.store(out + at, (mixed / total[:, None]).to(out.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=(
        "max_pages",
        "chunks",
    )
)
def _decode_kernel(
    q: tl.tensor,
    k_pages: tl.tensor,
    v_pages: tl.tensor,
    page_table: tl.tensor,
    query_start: tl.tensor,
    context_len: tl.tensor,
    peaks: tl.tensor,
    totals: tl.tensor,
    mixtures: tl.tensor,
    max_pages: tl.tensor,
    q_heads: tl.tensor,
    kv_heads: tl.tensor,
    chunks: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    PAGE_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Each program takes one sequence, one key head with all its query heads, and CHUNK of the keys.

    It leaves the state of its online softmax for `_reduce_kernel`. A chunk is a fixed range of positions, so the
    numbers that a sequence's result is made of do not depend on its page table's width or on other sequences.
    """
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1)
    chunk = tl.program_id(2)
    query = tl.load(query_start + sequence)
    context = tl.load(context_len + sequence)
    end = tl.minimum(context, (chunk + 1) * CHUNK)
    first = tl.where(window > 0, tl.maximum(context - window, 0), 0)
    first = tl.maximum(first // BLOCK_N * BLOCK_N, chunk * CHUNK)
    if (query == tl.load(query_start + sequence + 1)) | (first >= end):
        return
    group = q_heads // kv_heads
    member = tl.arange(0, BLOCK_M)
    head = kv_head * group + member
    element = tl.arange(0, BLOCK_D)
    inside = (member < group)[:, None] & (element < HEAD_DIM)[None, :]
    at = (query.to(tl.int64) * q_heads + head)[:, None] * HEAD_DIM + element[None, :]
    rows = tl.load(q + at, mask=inside, other=0.0)
    position = tl.zeros((BLOCK_M,), tl.int32) + context - 1

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    pages = page_table + sequence.to(tl.int64) * max_pages
    for start in range(first, end, BLOCK_N):
        peak, total, mixed = _attend(
            rows, peak, total, mixed, position, start, end, pages, k_pages, v_pages, kv_head,
            kv_heads, scale, window, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    state = (sequence.to(tl.int64) * q_heads + head) * chunks + chunk
    tl.store(peaks + state, peak, mask=member < group)
    tl.store(totals + state, total, mask=member < group)
    tl.store(mixtures + state[:, None] * HEAD_DIM + element[None, :], mixed, mask=inside)


@triton.jit(do_not_specialize=("chunks",))
def _reduce_kernel(
    peaks: tl.tensor,
    totals: tl.tensor,
    mixtures: tl.tensor,
    query_start: tl.tensor,
    context_len: tl.tensor,
    out: tl.tensor,
    q_heads: tl.tensor,
    chunks: tl.tensor,
    window: tl.tensor,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Each program joins the chunks of one sequence and query head, BLOCK_C at a time and in order."""
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    query = tl.load(query_start + sequence)
    if query == tl.load(query_start + sequence + 1):
        return
    context = tl.load(context_len + sequence)
    first = tl.where(window > 0, tl.maximum(context - window, 0), 0) // CHUNK
    last = tl.cdiv(context, CHUNK)
    element = tl.arange(0, BLOCK_D)
    peak = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    mixed = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first // BLOCK_C * BLOCK_C, last, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        written = (chunk >= first) & (chunk < last)
        state = (sequence.to(tl.int64) * q_heads + head) * chunks + chunk
        chunk_peak = tl.load(peaks + state, mask=written, other=float("-inf"))
        chunk_total = tl.load(totals + state, mask=written, other=0.0)
        inside = written[:, None] & (element < HEAD_DIM)[None, :]
        chunk_mixed = tl.load(mixtures + state[:, None] * HEAD_DIM + element[None, :], mask=inside, other=0.0)
        new_peak = tl.maximum(peak, tl.max(chunk_peak, 0))
        decay, weight = tl.exp2(peak - new_peak), tl.exp2(chunk_peak - new_peak)
        total = total * decay + tl.sum(chunk_total * weight, 0)
        mixed = mixed * decay + tl.sum(chunk_mixed * weight[:, None], 0)
        peak = new_peak
    # A padding sequence has no keys at all; its row is 0.
    mixed = mixed / tl.where(total > 0, total, 1.0)
    at = (query.to(tl.int64) * q_heads + head) * HEAD_DIM + element
    tl.store(out + at, mixed.to(out.dtype.element_ty), mask=element < HEAD_DIM)


# Keys per decode program.
CHUNK = 128


def _block_d(head_dim: int) -> int:
    """Return the width of a tile of heads; tensor cores multiply no fewer than 16 values."""
    width: int = max(16, triton.next_power_of_2(head_dim))
    return width


def _prefill_options(max_query_len: int, head_dim: int, dtype: torch.dtype, capability: int) -> dict[str, int]:
    """Choose how many queries and keys a program multiplies at once."""
    block_d = _block_d(head_dim)
    # Only Hopper's tensor cores take their operands from shared memory; elsewhere larger tiles spill registers.
    hopper = capability == 90 and block_d <= 128
    largest = 128 if hopper else 64
    if dtype == torch.float32:
        largest = 32
    block_m = min(triton.next_power_of_2(max(max_query_len, 16)), largest)
    roomy = hopper or (block_d <= 64 and capability // 10 != 10)
    block_n = 64 if roomy and dtype != torch.float32 else 32
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 2}
    return options | {"BLOCK_N": 128, "num_warps": 8, "num_stages": 3} if block_m == 128 else options


def _decode_options(group: int, head_dim: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the tiles of a decode program; 16 is the fewest rows that tensor cores multiply."""
    return {
        "CHUNK": CHUNK,
        "BLOCK_M": max(16, triton.next_power_of_2(group)),
        "BLOCK_N": 64 if dtype != torch.float32 and head_dim <= 128 else 32,
        "BLOCK_D": _block_d(head_dim),
        "num_warps": 4,
        "num_stages": 2,
    }


def _reduce_options(head_dim: int) -> dict[str, int]:
    """Choose how many chunks are joined at once."""
    return {"CHUNK": CHUNK, "BLOCK_C": 64, "BLOCK_D": triton.next_power_of_2(head_dim), "num_warps": 8}


@paged_attention.register_cuda
def paged_attention_triton(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    query_start: Tensor,
    context_len: Tensor,
    max_query_len: int,
    scale: float,
    window: int,
) -> Tensor:
    """Launch the kernels of `paged_attention`."""
    tokens, q_heads, head_dim = q.shape
    _, page_size, kv_heads, _ = k_pages.shape
    sequences, max_pages = page_table.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if tokens == 0 or sequences == 0:
        return out
    q = q.contiguous()
    scale *= LOG2_E
    if max_query_len > 1:
        options = _prefill_options(max_query_len, head_dim, q.dtype, capability_of(q.device))
        _prefill_kernel[(triton.cdiv(max_query_len, options["BLOCK_M"]), q_heads, sequences)](
            q, k_pages, v_pages, page_table, query_start, context_len, out, max_pages, q_heads, kv_heads,
            scale, window, PAGE_SIZE=page_size, HEAD_DIM=head_dim, **options,
        )  # fmt: skip
        return out
    chunks = triton.cdiv(max_pages * page_size, CHUNK)
    peaks, totals = torch.empty(2, sequences, q_heads, chunks, dtype=torch.float32, device=q.device)
    mixtures = torch.empty(sequences, q_heads, chunks, head_dim, dtype=torch.float32, device=q.device)
    _decode_kernel[(sequences, kv_heads, chunks)](
        q, k_pages, v_pages, page_table, query_start, context_len, peaks, totals, mixtures, max_pages, q_heads,
        kv_heads, chunks, scale, window, PAGE_SIZE=page_size, HEAD_DIM=head_dim,
        **_decode_options(q_heads // kv_heads, head_dim, q.dtype),
    )  # fmt: skip
    _reduce_kernel[(sequences, q_heads)](
        peaks, totals, mixtures, query_start, context_len, out, q_heads, chunks, window, HEAD_DIM=head_dim,
        **_reduce_options(head_dim),
    )  # fmt: skip
    return out


def configurations(dtype: torch.dtype, capability: int) -> list[Configuration]:
    """List what the launcher chooses for common heads: long and short prompts, and decode."""
    pointer = f"*{TRITON_TYPE[dtype]}:16"
    common = {"query_start": "*i32:16", "context_len": "*i32:16", "q_heads": "i32:16", "window": "i32"}
    states = dict.fromkeys(("peaks", "totals", "mixtures"), "*fp32:16") | {"chunks": "i32"}
    types = common | dict.fromkeys(("q", "k_pages", "v_pages"), pointer)
    types |= {"page_table": "*i32:16", "max_pages": "i32", "kv_heads": "i32", "scale": "fp32"}
    prefill, decode, reduce = types | {"out": pointer}, types | states, common | states | {"out": pointer}
    found = []
    for head_dim in (64, 128):
        fixed = {"PAGE_SIZE": 16, "HEAD_DIM": head_dim}
        for queries in (16, 64, 4096) if capability == 90 else (16, 4096):
            options = fixed | _prefill_options(queries, head_dim, dtype, capability)
            found.append(Configuration(_prefill_kernel, prefill, options, tensor_cores=True))
        options = fixed | _decode_options(8, head_dim, dtype)
        found.append(Configuration(_decode_kernel, decode, options, tensor_cores=True))
        found.append(Configuration(_reduce_kernel, reduce, {"HEAD_DIM": head_dim} | _reduce_options(head_dim)))
    return found
