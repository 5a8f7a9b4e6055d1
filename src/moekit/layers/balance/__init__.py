"""Balance: losses on routings, biases moved without one, and over which tokens loads count."""

from .bias import BIAS_STEPS, dual_value, move_bias
from .coupling import coupling_loss
from .load import at_balance, probabilities
from .scope import SCOPES, Balance, Schedule

__all__ = [
    "BIAS_STEPS",
    "SCOPES",
    "Balance",
    "Schedule",
    "at_balance",
    "coupling_loss",
    "dual_value",
    "move_bias",
    "probabilities",
]
