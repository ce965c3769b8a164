"""`duo`: prefill streams; decode sends ahead what a predictor expects, and keeps what will be needed soonest."""

from duomoe.experts.policies.cached import CachedPolicy


class Duo(CachedPolicy):
    """A cache of experts over all layers, out is the one whose next use is expected last; and a predictor."""

    predicted = True
