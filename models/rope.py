"""The angles of rotary position embedding, with the context-stretching schemes in use.

Sources: linear (position interpolation, arXiv 2306.15595), dynamic (NTK-aware, base grown with the sequence), yarn
(arXiv 2309.00071), llama3 (the Llama 3.1 model card); all as transformers computes them.
"""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from duomoe.kernels.threads import Threads
from duomoe.models.config import RopeConfig

# What the cosine and sine of an angle take a CPU, in weights that are read once (kernels/threads.py).
TURN_WORK = 32


class Rotary:
    """Gives the cosine and sine of each token's rotation angles."""

    def __init__(self, config: RopeConfig, device: torch.device) -> None:
        self.config = config
        # Half the head's elements, paired with the other half, turn at these rates (radians per token).
        self.exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        self.rates, self.amplitude = _rates(config, self.exponents)

    def cos_sin(self, positions: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each [tokens, head_dim / 2] float32.

        Args:
            positions: [tokens], where each token stands in its sequence.
            lengths: [tokens], how long its sequence is by now; only the dynamic scheme looks at it.
        """
        rates = self._dynamic_rates(lengths) if self.config.depends_on_length else self.rates
        with Threads(TURN_WORK * len(positions) * len(self.exponents)) if positions.is_cpu else nullcontext():
            angles = positions[:, None].float() * rates
            return angles.cos() * self.amplitude, angles.sin() * self.amplitude

    def _dynamic_rates(self, lengths: Tensor) -> Tensor:
        """Return [tokens, head_dim / 2]: the base grows once a sequence is longer than the training context."""
        config = self.config
        stretch = config.factor * lengths.clamp(min=config.max_position).float() / config.max_position
        base = config.theta * (stretch - (config.factor - 1)) ** (config.head_dim / (config.head_dim - 2))
        return 1.0 / base[:, None] ** self.exponents


def _rates(config: RopeConfig, exponents: Tensor) -> tuple[Tensor, float]:
    """Return the rates that do not depend on a sequence's length, and the factor on cosines and sines."""
    rates = 1.0 / config.theta**exponents
    match config.kind:
        case "linear":
            return rates / config.factor, 1.0
        case "yarn":
            return _yarn(config, rates)
        case "llama3":
            return _llama3(config, rates), 1.0
        case _:
            return rates, 1.0


def _yarn(config: RopeConfig, rates: Tensor) -> tuple[Tensor, float]:
    """Slow rates are interpolated, fast ones kept, those between blended along a ramp."""

    def dimension_of(rotations: float) -> float:
        """Return which pair turns `rotations` times over the training context."""
        turns = config.original_max_position / (rotations * 2 * math.pi)
        return config.head_dim * math.log(turns) / (2 * math.log(config.theta))

    low, high = dimension_of(config.beta_fast), dimension_of(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    if low == high:
        high += 0.001  # the ramp must not divide by zero
    pairs = torch.arange(rates.shape[0], dtype=torch.float32, device=rates.device)
    kept = 1 - ((pairs - low) / (high - low)).clamp(0, 1)
    blended = rates / config.factor * (1 - kept) + rates * kept

    def mscale(weight: float) -> float:
        return 1.0 if config.factor <= 1 else 0.1 * weight * math.log(config.factor) + 1.0

    amplitude = config.attention_factor
    if amplitude is None:
        both = config.mscale and config.mscale_all_dim
        amplitude = mscale(config.mscale) / mscale(config.mscale_all_dim) if both else mscale(1.0)
    return blended, amplitude


def _llama3(config: RopeConfig, rates: Tensor) -> Tensor:
    """Long wavelengths are interpolated, short ones kept, those between blended smoothly."""
    wavelength = 2 * math.pi / rates
    turns = config.original_max_position / wavelength
    smooth = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blended = (1 - smooth) * rates / config.factor + smooth * rates
    stretched = torch.where(turns < config.low_freq_factor, rates / config.factor, blended)
    return torch.where(turns > config.high_freq_factor, rates, stretched)
