"""Loading: a checkpoint's weights into a model and the store of its experts, converted on their way where need be.

What is plain and stays plain is read straight into its place. All else is read matrix by matrix, converted and put
there, several at a time; so nothing is ever held twice.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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
    converted = store.format.name != "plain" or any(stored.is_quantised(*tensor) for tensor in experts)
    if not converted:
        direct += _places_of_experts(folder, store)
    folder.checkpoint.load(direct, quiet)
    _dequantise(stored, quantised)
    errors = [0.0] * len(config.moe_layers)
    if converted:
        layers = list(zip(config.moe_layers, store.layers, strict=True))
        for index, (layer, rows) in enumerate(tqdm(layers, "experts", disable=quiet, leave=False, unit="layer")):
            sources = [architecture.expert_sources(config, layer, expert) for expert in range(config.num_experts)]
            errors[index] = fill_layer(stored, store.format, sources, rows).relative
    return errors


def _places_of_experts(folder: ModelFolder, store: ExpertStore) -> Iterator[Place]:
    """Yield each expert tensor's name in the checkpoint and its place in a store of plain rows."""
    for layer, rows in zip(folder.config.moe_layers, store.layers, strict=True):
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
