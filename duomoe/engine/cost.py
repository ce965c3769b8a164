"""What passes and steps take, as estimated from those before."""

from dataclasses import dataclass, field

# An observation counts half as much as one this many later.
HALF_LIFE = 64


@dataclass
class Line:
    """A straight line through what was observed, the latest counting most: seconds = base + rate * size.

    Attributes:
        count: how much was observed.
        total: how many seconds that took.
        expected: how many it was expected to take, by what was observed before.
    """

    count: int = 0
    total: float = 0.0
    expected: float = 0.0
    weight: float = 0.0  # this and the next four are sums in which the latest counts most
    sizes: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def note(self, size: float, seconds: float) -> None:
        """Take in that something of this size has taken so long."""
        self.expected += self.at(size) if self.count else seconds
        self.count += 1
        self.total += seconds
        fade = 0.5 ** (1 / HALF_LIFE)
        self.weight = self.weight * fade + 1
        self.sizes = self.sizes * fade + size
        self.seconds = self.seconds * fade + seconds
        self.squares = self.squares * fade + size * size
        self.products = self.products * fade + size * seconds

    def at(self, size: float) -> float:
        """Return what something of this size takes; 0 before anything was observed.

        Where sizes were all alike, or larger ones took less, it is the mean.
        """
        if self.weight == 0:
            return 0.0
        spread = self.weight * self.squares - self.sizes**2
        slope = 0.0
        if spread > 1e-9 * self.sizes**2:
            slope = max(0.0, (self.weight * self.products - self.sizes * self.seconds) / spread)
        return max(0.0, (self.seconds + slope * (self.weight * size - self.sizes)) / self.weight)


@dataclass
class Costs:
    """Estimates, in seconds.

    Attributes:
        prefill: of a pass, by its tokens.
        decode: of a step, by its sequences.
    """

    prefill: Line = field(default_factory=Line)
    decode: Line = field(default_factory=Line)
