"""Training with Lightning: the module, the optimizer, checkpoints, metrics and loggers."""

from fiddlehead.training.callbacks.checkpoint import Checkpoint
from fiddlehead.training.distributed.parallel import Parallel
from fiddlehead.training.language_model import LanguageModel
from fiddlehead.training.loggers import Log
from fiddlehead.training.non_finite import NonFiniteError
from fiddlehead.training.optim import AdamW, CosineAnnealing, Muon, WarmupStableDecay
from fiddlehead.training.preference import PreferenceModel

__all__ = [
    "AdamW",
    "Checkpoint",
    "CosineAnnealing",
    "LanguageModel",
    "Log",
    "Muon",
    "NonFiniteError",
    "Parallel",
    "PreferenceModel",
    "WarmupStableDecay",
]
