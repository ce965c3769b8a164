"""The policies, one file each; they share all else, so that comparing them compares schedules."""

from duomoe.experts.policies.on_demand import OnDemand
from duomoe.experts.policies.policy import Policy
from duomoe.experts.policies.resident import Resident

POLICY_NAMES = ("resident", "on_demand")

__all__ = ["POLICY_NAMES", "OnDemand", "Policy", "Resident"]
