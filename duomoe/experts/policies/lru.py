"""`lru`: prefill streams; decode keeps what was used last, and fetches what it lacks when the router asks for it."""

from duomoe.experts.policies.cached import CachedPolicy


class Lru(CachedPolicy):
    """A cache of experts over all layers, least recently used out."""

    predicted = False
