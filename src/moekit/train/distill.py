"""Learning from a teacher: its distribution by token, staged, or its preference by answer.

Shapes: V vocabulary of the student, W of the teacher; [...] any, the same for both.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.core.errors import UserError

from .recipe import DistillRecipe, TrainRecipe


def distillation_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """Mean KL(teacher || student) of logits [..., V] and [..., W], in nats, times temperature^2.

    Over the first min(V, W) entries: tokenizers of a family share their beginning (LLaVA-MoD, arXiv
    2408.15881). `mask` [...] is False where nothing counts, as in a prompt. Its gradient is that of
    the cross-entropy with the teacher; 0 where both agree.
    """
    common = min(student.shape[-1], teacher.shape[-1])
    ours = F.log_softmax(student[..., :common].float() / temperature, -1)
    theirs = F.log_softmax(teacher[..., :common].float() / temperature, -1)
    by_token = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    if mask is not None:
        by_token = by_token[mask]
    return temperature**2 * by_token.sum() / max(1, by_token.numel())


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    teacher_chosen: Tensor,
    teacher_rejected: Tensor,
    *,
    beta: float = 0.1,
    pairs: str = "dpo",
) -> Tensor:
    """Preference distillation of LLaVA-MoD (arXiv 2408.15881): the teacher is the reference.

    Log-probabilities of answers [N] under student and teacher. "dpo" is -log sigmoid(beta * (gain
    of the chosen - gain of the rejected)), log 2 where both agree; "kto" is the form of the
    paper's scripts, which sets each gain against the mean gain of the other kind, at least 0.
    """
    gain, loss = chosen - teacher_chosen, rejected - teacher_rejected
    if pairs == "dpo":
        return -F.logsigmoid(beta * (gain - loss)).mean()
    if pairs != "kto":
        raise UserError(f"pairs {pairs!r} is unknown: it is dpo or kto")
    over_chosen = gain.mean().clamp_min(0).detach()
    over_rejected = loss.mean().clamp_min(0).detach()
    better = 1 - torch.sigmoid(beta * (gain - over_rejected))
    worse = 1 - torch.sigmoid(beta * (over_chosen - loss))
    return torch.cat([better, worse]).mean()


@dataclass
class Teacher:
    """A frozen model and the weight its distribution has until a fraction `end` of the run.

    Staged as MoS is (DeepSpeed-MoE, arXiv 2201.05596): to the end of training, a teacher holds a
    smaller student back.
    """

    model: Any
    weight: float
    temperature: float
    end: float
    precision: str

    def loss(self, ids: Tensor, logits: Tensor, progress: float) -> Tensor:
        """The weighted loss on the student's `logits` [B, S, V] of `ids` [B, S]; 0 once over."""
        if progress >= self.end:
            return logits.new_zeros(())
        bf16 = self.precision == "bf16"
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
            taught = self.model(input_ids=ids, use_cache=False).logits
        return self.weight * distillation_loss(logits, taught, temperature=self.temperature)


def load_teacher(
    recipe: DistillRecipe, train: TrainRecipe, vocab_size: int, device: torch.device
) -> Teacher | None:
    """The recipe's teacher; None without one. UserError for one of another, smaller vocabulary."""
    if recipe.teacher is None:
        return None
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(recipe.teacher, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"distill.teacher {recipe.teacher} cannot be loaded: {error}") from error
    embedding: Any = model.get_input_embeddings()
    entries = embedding.num_embeddings
    if entries < vocab_size:
        raise UserError(
            f"distill.teacher {recipe.teacher} has {entries} entries in its vocabulary and the "
            f"tokenizer {vocab_size}; set tokenizer.path to the teacher's."
        )
    model.requires_grad_(False).eval().to(device)
    return Teacher(model, recipe.weight, recipe.temperature, recipe.end, train.precision)
