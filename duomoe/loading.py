"""Loading: a checkpoint's weights into a model and the store of its experts, converted on their way where need be.

What is plain and stays plain is read straight into its place. Quantised matrices are read one by one, converted and
put there, several at a time; experts that are packed are read layer by layer. Nothing else is ever held twice.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

from duomoe.checkpoint import READERS
from duomoe.experts.store import ExpertStore
from duomoe.experts.stored import StoredMatrices, fill_layer
from duomoe.model_folder import ModelFolder
from duomoe.models import Model
from duomoe.models.model import expected_tensors, expert_tensors, stacked

Place = tuple[str, Tensor]


def load_weights(folder: ModelFolder, model: Model, store: ExpertStore, quiet: bool) -> list[float]:
    """Fill a model and the store of its experts.

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
    packed = store.format.packed
    converted = not packed and (store.format.name != "plain" or any(stored.is_quantised(*tensor) for tensor in experts))
    if not converted and not packed:
        for layer, rows in zip(config.moe_layers, store.layers, strict=True):
            direct += _places_of_experts(folder, store, layer, rows)
    folder.checkpoint.load(direct, quiet)
    _dequantise(stored, quantised)
    errors = [0.0] * len(config.moe_layers)
    if packed:
        # Zeros between a row's tensors, where nothing is read, are packed like any others.
        rows = torch.zeros(config.num_experts, store.format.row_bytes, dtype=torch.uint8)
        for layer in tqdm(config.moe_layers, "packing experts", disable=quiet, leave=False, unit="layer"):
            folder.checkpoint.load(_places_of_experts(folder, store, layer, rows), quiet=True)
            store.add(rows)
    if converted:
        layers = list(zip(config.moe_layers, store.layers, strict=True))
        for index, (layer, rows) in enumerate(tqdm(layers, "experts", disable=quiet, leave=False, unit="layer")):
            sources = [architecture.expert_sources(config, layer, expert) for expert in range(config.num_experts)]
            errors[index] = fill_layer(stored, store.format, sources, rows).relative
    return errors


def _places_of_experts(folder: ModelFolder, store: ExpertStore, layer: int, rows: Tensor) -> Iterator[Place]:
    """Yield each tensor of a layer's experts by its name in the checkpoint, and its place in the layer's plain rows."""
    views = store.format.views(rows)
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
