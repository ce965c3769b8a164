"""Own implementations of Mixture-of-Experts language models, in plain PyTorch over the kernels.

A model is an embedding, blocks and a head. A block is two functions with the experts between them; who runs the
experts, and when, is the schedule's business (duomoe.experts).
"""

from duomoe.models.architecture import Architecture
from duomoe.models.batch import Batch, LayerKV, Routing
from duomoe.models.config import ModelConfig
from duomoe.models.model import Model
from duomoe.models.registry import ARCHITECTURES, architecture_of

__all__ = ["ARCHITECTURES", "Architecture", "Batch", "LayerKV", "Model", "ModelConfig", "Routing", "architecture_of"]
