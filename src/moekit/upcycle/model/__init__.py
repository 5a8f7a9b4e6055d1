"""The model class of what upcycling makes and no stock class holds; importing it registers it."""

from moekit.upcycle.model.causal_lm import UpcycledForCausalLM as UpcycledForCausalLM
from moekit.upcycle.model.config import UpcycledConfig as UpcycledConfig
