"""Hand-written Triton kernels, each with its PyTorch reference beside it.

Every operation is a `torch.library` custom op in the namespace `duomoe`: on a CUDA tensor it launches the Triton
kernel, on a CPU tensor it calls torch, which comes near to the float32 reference. Experts are addressed by slot, never
by expert number alone.
"""

from duomoe.kernels.activations import quantise_activations
from duomoe.kernels.admit import admit, admit_ahead
from duomoe.kernels.attention import paged_attention
from duomoe.kernels.combine import combine
from duomoe.kernels.expand import expand
from duomoe.kernels.expert_gemv import experts_down_gemv, experts_gate_up_gemv, gemv_splits, use_gemv
from duomoe.kernels.fetch import LANES, fetch, fetch_ahead
from duomoe.kernels.grouped_gemm import experts_down, experts_gate_up
from duomoe.kernels.permute import group_by_expert
from duomoe.kernels.rms_norm import add_rms_norm, rms_norm
from duomoe.kernels.rope import rope_and_cache
from duomoe.kernels.router import route

__all__ = [
    "LANES",
    "add_rms_norm",
    "admit",
    "admit_ahead",
    "combine",
    "expand",
    "experts_down",
    "experts_down_gemv",
    "experts_gate_up",
    "experts_gate_up_gemv",
    "fetch",
    "fetch_ahead",
    "gemv_splits",
    "group_by_expert",
    "paged_attention",
    "quantise_activations",
    "rms_norm",
    "rope_and_cache",
    "route",
    "use_gemv",
]
