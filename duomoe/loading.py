"""Loading: a checkpoint's weights into a model and the store of its experts, converted on their way where need be.

What is plain and stays plain is read straight into its place. Other matrices are read one by one, converted and put
there, several at a time. Nothing else is ever held twice.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

from duomoe.checkpoint import READERS
from duomoe.experts.format import plain_format
from duomoe.experts.matrix import DoesNotPack
from duomoe.experts.store import ExpertStore
from duomoe.experts.stored import StoredMatrices, fill_layer
from duomoe.model_folder import ModelFolder
from duomoe.models import Model
from duomoe.models.model import expected_tensors, expert_tensors, stacked

Place = tuple[str, Tensor]


def load_weights(folder: ModelFolder, model: Model, store: ExpertStore, quiet: bool) -> list[float]:
    """Fill a model and the empty store of its experts.

    Args:
        folder: where the weights are.
        model: of that folder's architecture and config.
        store: of the experts, in any format.
        quiet: show no progress bar.

    Returns:
        For each MoE layer what its experts have lost by being quantised while they were loaded, as
        ‖quantised − stored‖ / ‖stored‖; all 0 where they are as stored.

    Raises:
        InputError: when reading fails, or a tensor's values are none that can be used.

    Warns:
        RuntimeWarning: for plain tensors with values that are not finite, and for tensors without a use.
    """
    stored, config, architecture = folder.stored, folder.config, folder.architecture
    every = expected_tensors(architecture, config)
    folder.checkpoint.warn_of_unused(part for tensor in every for part in stored.tensors(*tensor))

    direct: list[Place] = []
    quantised: list[Place] = []
    for name, view in model.destinations():
        (quantised if stored.is_quantised(name, tuple(view.shape)) else direct).append((name, view))
    experts = expert_tensors(architecture, config)
    converted = store.format.name != "plain" or any(stored.is_quantised(*tensor) for tensor in experts)
    if not converted:
        for layer in config.moe_layers:
            store.add(store.rows(store.format), store.format)
            direct += _places_of_experts(folder, store, layer)
    folder.checkpoint.load(direct, quiet)
    _dequantise(stored, quantised)
    if not converted:
        return [0.0] * len(config.moe_layers)
    layers = tqdm(config.moe_layers, "experts", disable=quiet, leave=False, unit="layer")
    return [_convert_experts(folder, store, layer) for layer in layers]


def _convert_experts(folder: ModelFolder, store: ExpertStore, layer: int) -> float:
    """Add a layer's experts to the store, converted to its format; plain ones where that is packed and one does not.

    Returns:
        What they have lost by it.
    """
    config, rows = folder.config, store.rows(store.format)
    sources = [folder.architecture.expert_sources(config, layer, expert) for expert in range(config.num_experts)]
    try:
        error = fill_layer(folder.stored, store.format, sources, rows)
        store.add(rows, store.format)
    except DoesNotPack:
        del rows
        plain = plain_format(config.hidden_size, config.moe_intermediate_size, torch.bfloat16)
        store.add(rows := store.rows(plain), plain)
        error = fill_layer(folder.stored, plain, sources, rows)
    return error.relative


def _places_of_experts(folder: ModelFolder, store: ExpertStore, layer: int) -> Iterator[Place]:
    """Yield each tensor of the experts that were added last by its name in the checkpoint, and its place in its row."""
    views = store.formats[-1].views(store.layers[-1])
    for expert in range(store.num_experts):
        for name, sources in folder.architecture.expert_sources(folder.config, layer, expert).items():
            yield from stacked(sources, views[name][expert])


def _dequantise(stored: StoredMatrices, places: list[Place]) -> None:
    """Fill places with the values of matrices that are stored quantised."""

    def fill(place: Place) -> None:
        name, view = place
        view.copy_(stored.read(name, tuple(view.shape)).values())

    with ThreadPoolExecutor(READERS, thread_name_prefix="duomoe-load") as pool:
        for _ in pool.map(fill, places):
            pass
