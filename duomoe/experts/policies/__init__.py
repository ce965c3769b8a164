"""The policies, one file each; they share all else, so that comparing them compares schedules."""

from duomoe.experts.policies.bounded import BoundedPolicy
from duomoe.experts.policies.cached import CachedPolicy
from duomoe.experts.policies.duo import Duo
from duomoe.experts.policies.layer_prefetch import LayerPrefetch
from duomoe.experts.policies.lru import Lru
from duomoe.experts.policies.moe_infinity import MoeInfinity
from duomoe.experts.policies.on_demand import OnDemand
from duomoe.experts.policies.policy import Pass, Policy, finished
from duomoe.experts.policies.resident import Resident

# Those that run with fewer slots than experts.
BOUNDED: dict[str, type[BoundedPolicy]] = {
    "on_demand": OnDemand,
    "layer_prefetch": LayerPrefetch,
    "moe_infinity": MoeInfinity,
    "lru": Lru,
    "duo": Duo,
}
# Of these, those whose prefill streams through a ring of slots.
STREAMING = {name: policy for name, policy in BOUNDED.items() if issubclass(policy, CachedPolicy)}
# Of these, those that have use for a predictor.
PREDICTED = [name for name, policy in STREAMING.items() if policy.predicted]

__all__ = ["BOUNDED", "PREDICTED", "STREAMING", "Pass", "Policy", "Resident", "finished"]
