"""`Rewrite`: computing new values of experts while a model is written, so that none are kept.

A method that needs more than the plan says (GPTQ, AWQ, Fisher fusing, a least squares refit, a
factorisation) gives an object of this kind to `convert` or `apply_live`. It is asked for one expert
at a time, in the order of writing, and must give the same answer whenever it is asked again: an
interrupted run asks anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from moekit.core.expert_weights import ExpertWeights
from moekit.core.packed import CodecChoice, ExpertParts

# An expert as a codec stores it: the codec, its matrices encoded, its biases plain.
EncodedExpert = ExpertParts

Read = Callable[[int], ExpertWeights]


class Rewrite(Protocol):
    """New values for the experts of a plan's result.

    `identity` is plain JSON that tells one rewrite from another (method, options, hash of the
    stats); it goes into the journal, so that only the same rewrite resumes an interrupted run.
    `codec` is that of encoded results, None where they are dense. Inherit from this class to get
    the defaults.
    """

    identity: Mapping[str, Any]
    codec: CodecChoice | None = None

    def expert(
        self, layer: int, expert: int, members: Mapping[int, float], read: Read
    ) -> ExpertWeights | EncodedExpert:
        """The values of one resulting expert.

        `layer` is the decoder layer, `expert` the original id (of a group the lowest), `members`
        the experts folded into it with their weights ({expert: 1.0} if it is alone). `read(e)`
        gives an original expert: gate and up [F, D], down [D, F], biases, in the stored dtype, its
        neurons selected and ordered as the plan says. The result has the plan's width, and is dense
        or encoded; where a dense one is written, an encoded one is decoded.
        """
        ...

    def other(self, name: str, tensor: Tensor) -> Tensor:
        """A parameter outside the experts that changes along, by its name in the model.

        Asked for every parameter of the decoder layers that have experts (norms, router,
        attention, shared experts), after the router edit of the plan; shape and dtype must stay.
        """
        return tensor


def changes_others(rewrite: Rewrite | None) -> bool:
    """Whether `other` is more than the default."""
    own = getattr(type(rewrite), "other", None)
    return own is not None and own is not Rewrite.other
