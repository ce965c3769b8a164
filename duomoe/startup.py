"""How long each part of starting takes, and one line of progress while it goes on."""

import contextlib
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

# The names of the parts, in their order. `reading`, `converting` and `pinning` lie within `loading`. The first two are
# averages over the threads that read; the thread that has a GPU convert adds its own seconds to `converting`. `pinning`
# is how long loading has waited for memory. `compiling` lies within other parts.
PARTS = ("importing", "opening", "loading", "reading", "converting", "pinning", "capturing", "compiling")


class Startup:
    """Counts seconds by part, and shows the part that goes on.

    Args:
        quiet: show nothing.

    Attributes:
        seconds: of each part so far, by its name in PARTS.
        loaded_bytes: that were read of the weights.
        compiled_kernels: how many kernels were compiled within `counting_kernels`, not found in the cache.
    """

    def __init__(self, quiet: bool = True) -> None:
        self.quiet = quiet
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.loaded_bytes = 0
        self.compiled_kernels = 0
        self._lock = threading.Lock()
        self._bar: tqdm[None] | None = None

    @contextlib.contextmanager
    def part(self, name: str, total_bytes: int | None = None) -> Iterator[None]:
        """Time and show what is done within; with `total_bytes`, how far it is and its rate."""
        begin = time.perf_counter()
        layout = None if total_bytes else "{desc} …"
        bar = tqdm(
            desc=name, total=total_bytes, unit="B", unit_scale=True, bar_format=layout, disable=self.quiet, leave=False
        )
        self._bar = bar
        try:
            yield
        finally:
            self._bar = None
            bar.close()
            self.spend(name, time.perf_counter() - begin)

    def spend(self, name: str, seconds: float) -> None:
        """Add seconds to a part, from any thread."""
        with self._lock:
            self.seconds[name] += seconds

    def load(self, size: int) -> None:
        """Count and show bytes of weights that are in their places, from any thread."""
        with self._lock:
            self.loaded_bytes += size
            if self._bar is not None:
                self._bar.update(size)

    def as_dict(self) -> dict[str, float]:
        """Return the counts for machines."""
        parts = {f"{name}_s": seconds for name, seconds in self.seconds.items()}
        return parts | {"loaded_bytes": self.loaded_bytes, "compiled_kernels": self.compiled_kernels}

    def line(self) -> str:
        """Return the counts for people."""
        s = self.seconds
        rate = self.loaded_bytes / s["loading"] / 1e9 if s["loading"] else 0.0
        return (
            f"start: importing {s['importing']:.1f} s, opening {s['opening']:.1f} s, loading {s['loading']:.1f} s "
            f"({self.loaded_bytes / 1e9:.2f} GB, {rate:.1f} GB/s: reading {s['reading']:.1f} s, converting "
            f"{s['converting']:.1f} s, pinning {s['pinning']:.1f} s), capturing {s['capturing']:.1f} s; of these, "
            f"compiling {self.compiled_kernels} kernels {s['compiling']:.1f} s"
        )

    @contextlib.contextmanager
    def counting_kernels(self) -> Iterator[None]:
        """Count the kernels that Triton compiles meanwhile, for whomever."""
        from triton import knobs

        before = knobs.compilation.listener

        def listen(**event: object) -> None:
            if before is not None:
                before(**event)
            if not event["cache_hit"]:
                self.spend("compiling", event["times"].total / 1e6)  # type: ignore[attr-defined]
                with self._lock:
                    self.compiled_kernels += 1

        knobs.compilation.listener = listen
        try:
            yield
        finally:
            knobs.compilation.listener = before
