"""Whether looking ahead pays, by the times that decode steps take with it and without it."""

from collections import deque
from statistics import median

# How many steps with a setting are compared with as many without, by their medians: no single step decides.
WINDOW = 8

# How many steps do not count after a change: what is cached is still what came before it.
SETTLE = 4

# By so much the other setting must be faster to replace the one in force.
MARGIN = 0.05

# How many steps pass between two trials: after a change, and at most. Every trial that changes nothing doubles them.
INTERVAL, LONGEST = 64, 1024


class Payoff:
    """Says for each decode step whether to look ahead. Steps of different batch sizes are judged apart.

    It begins with looking ahead, and tries without after `WINDOW` steps that count. A trial takes `SETTLE + WINDOW` of
    its batch size's steps: after the first at most a sixth, and in the long run a hundredth where nothing changes.

    Attributes:
        pays: whether the next step is to look ahead.
    """

    def __init__(self) -> None:
        self.pays = True
        self._of_size: dict[int, _Comparison] = {}
        self._sequences, self._kept = 0, True  # of the latest step, and the setting in force for as many
        self._unsettled = 0

    def settle(self) -> None:
        """Say that something else, such as a prefill, has changed what is cached: the next steps do not count."""
        self._unsettled = SETTLE

    def note(self, sequences: int, seconds: float) -> None:
        """Take in a step that did as `pays` says, and decide about the next one.

        Args:
            sequences: how many sequences the step advanced.
            seconds: how long it took.
        """
        if sequences != self._sequences:
            self._sequences = sequences
            self.settle()  # the step did as the size before; and on a GPU, the first ones of a size compile and capture
        comparison = self._of_size.setdefault(sequences, _Comparison(self._kept))
        if self._unsettled > 0:
            self._unsettled -= 1
        else:
            comparison.note(seconds)
        self._kept = comparison.kept
        if comparison.setting != self.pays:
            self.pays = comparison.setting
            self.settle()


class _Comparison:
    """Compares the two settings for one batch size.

    Attributes:
        kept: the setting in force between trials.
        setting: what the next step is to do.
    """

    def __init__(self, kept: bool) -> None:
        self.kept = self.setting = kept
        self._seconds: dict[bool, deque[float]] = {setting: deque(maxlen=WINDOW) for setting in (False, True)}
        self._interval = INTERVAL
        self._until_trial = WINDOW

    def note(self, seconds: float) -> None:
        """Take in a step that was done with `setting`."""
        self._seconds[self.setting].append(seconds)
        if self.setting == self.kept:
            self._until_trial -= 1
            if self._until_trial == 0:
                self.setting = not self.kept
                self._seconds[self.setting].clear()
        elif len(self._seconds[self.setting]) == WINDOW:
            self._end_trial()

    def _end_trial(self) -> None:
        if median(self._seconds[self.setting]) < (1 - MARGIN) * median(self._seconds[self.kept]):
            self.kept = self.setting
            self._interval = INTERVAL
        else:
            self.setting = self.kept
            self._interval = min(2 * self._interval, LONGEST)
        self._until_trial = self._interval
