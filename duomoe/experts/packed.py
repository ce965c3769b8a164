"""A layer of plain bfloat16 rows packed into 12 bits a value (kernels/packed_bf16.py), where it packs."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from duomoe.checkpoint import READERS
from duomoe.kernels.packed_bf16 import pack_bf16, packed_layout


def pack_layer(rows: Tensor) -> Tensor | None:
    """Pack the experts of a layer, several at a time.

    Args:
        rows: uint8 [experts, row_bytes] on the host, in the plain format of bfloat16.

    Returns:
        uint8 [experts, packed row bytes], or None when one of them does not pack: the layer then stays plain.
    """
    values = rows.view(torch.bfloat16)
    packed = torch.empty(len(rows), packed_layout(values.shape[1]).row_bytes, dtype=torch.uint8)
    with ThreadPoolExecutor(READERS, thread_name_prefix="duomoe-pack") as pool:
        fits = all(pool.map(pack_bf16, values, packed))
    return packed if fits else None
