"""What a model folder says about its model before any weight is read."""

import os
from dataclasses import replace
from pathlib import Path

from duomoe.checkpoint import Checkpoint
from duomoe.models import architecture_of
from duomoe.models.model import expected_tensors

EMBEDDED_MODEL = Path(__file__).parent / "assets"


class ModelFolder:
    """A folder in Hugging Face layout, of which config.json and the safetensors headers have been read and checked.

    Args:
        path: of the folder; None is the model that comes with this package.

    Attributes:
        checkpoint: its files.
        architecture: the model's family.
        config: the model's shape.

    Raises:
        InputError: when the folder cannot be used.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.checkpoint = Checkpoint(EMBEDDED_MODEL if path is None else path)
        self.architecture = architecture_of(self.checkpoint.config)
        self.config = self.architecture.parse(self.checkpoint.config)
        if "lm_head.weight" in self.checkpoint.tensors:
            # What is stored counts, also where the config says that the head is the embedding.
            self.config = replace(self.config, tie_word_embeddings=False)
        self.checkpoint.check(expected_tensors(self.architecture, self.config))
