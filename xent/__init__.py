"""PyTorch's cross-entropy, done properly: exact, fast, one gradient-sized buffer. See `xent.cross_entropy`."""

from .functional import TokenStats, cross_entropy, token_stats
from .linear import linear_cross_entropy, linear_token_stats
from .modules import CrossEntropyLoss, LinearCrossEntropyLoss

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "TokenStats",
    "__version__",
    "cross_entropy",
    "linear_cross_entropy",
    "linear_token_stats",
    "token_stats",
]
__version__ = "0.1.0"
