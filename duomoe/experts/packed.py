"""A layer of plain bfloat16 rows packed into 12 bits a value (kernels/packed_bf16.py), where it packs."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from duomoe.checkpoint import READERS
from duomoe.kernels.packed_bf16 import count_patches, most_patches, pack_bf16, packed_bytes

# Of weights as they usually are, one value in so many is a patch.
USUALLY_PATCHED = 4096


def usual_packed_bytes(row_bytes: int) -> int:
    """Return about how many bytes a packed row has of a plain one of so many bytes."""
    values = row_bytes // 2
    return min(packed_bytes(values, values // USUALLY_PATCHED), row_bytes)


def pack_layer(rows: Tensor) -> Tensor | None:
    """Pack the experts of a layer, several at a time.

    Args:
        rows: uint8 [experts, row_bytes] on the host, in the plain format of bfloat16.

    Returns:
        uint8 [experts, packed row bytes], fewer than plain; or None when one of them does not pack: then the layer
        stays plain.
    """
    values = rows.view(torch.bfloat16)
    with ThreadPoolExecutor(READERS, thread_name_prefix="duomoe-pack") as pool:
        patches = max(pool.map(count_patches, values))
        size = packed_bytes(values.shape[1], patches)
        if patches > most_patches(values.shape[1]) or size >= rows.shape[1]:
            return None
        packed = torch.empty(len(rows), size, dtype=torch.uint8)
        list(pool.map(pack_bf16, values, packed))
    return packed
