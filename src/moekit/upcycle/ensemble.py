"""Branch-Train-Merge's ensemble: several language models mixed by a posterior over their domains.

p(x_t | x_<t) = sum over j of a_j(t) p_j(x_t | x_<t), where a_j(t) is proportional to the prior of
expert j times how likely it found what precedes: the whole prefix, as Bayes' rule has it, or the
last token alone, as the published scorer has it. (BTM, arXiv 2208.03306.)

Shapes: B sequences, S positions, N experts, V vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast

from moekit.core.architecture import architecture_of

MODEL_TYPE = "moekit_ensemble"
POSTERIORS = ("prefix", "last_token")


class EnsembleConfig(PreTrainedConfig):
    """Config of `EnsembleForCausalLM`.

    `text_config` is that of the first expert and `others` those of the rest; `names` and `prior`
    have one entry an expert. An expert whose prior is 0 is not run.
    """

    model_type = MODEL_TYPE
    sub_configs_defaults: ClassVar = {
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    others: list[dict[str, Any]] | None = None
    names: list[str] | None = None
    prior: list[float] | None = None
    posterior: str = "prefix"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings  # type: ignore[union-attr]

    @property
    def expert_configs(self) -> list[Any]:
        """The experts' own configs, in order."""
        rest = [CONFIG_MAPPING[c["model_type"]].from_dict(dict(c)) for c in self.others or ()]
        return [self.text_config, *rest]


class PosteriorLayer(DynamicLayer):
    """What the ensemble keeps between tokens: the evidence [B, 1, 1, N] for each expert so far, and
    what each said of the next token, [B, N, 1, V], as logarithms."""

    is_croppable = False

    def put(self, evidence: Tensor, next_token: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(evidence, next_token)
        self.keys, self.values = evidence[:, None, None], next_token[:, :, None]

    @property
    def evidence(self) -> Tensor:
        assert self.keys is not None
        return self.keys[:, 0, 0]

    @property
    def next_token(self) -> Tensor:
        assert self.values is not None
        return self.values[:, :, 0]


class EnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """The experts of an `EnsembleConfig`; logits are the logarithms of the mixture."""

    config: EnsembleConfig
    config_class = EnsembleConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: EnsembleConfig) -> None:
        super().__init__(config)
        configs = config.expert_configs
        for one in configs:
            one._attn_implementation = config._attn_implementation
        self.experts = nn.ModuleList(architecture_of(one)(one) for one in configs)
        self.post_init()
        # post_init asks its own children alone, of which the experts are none.
        for j, expert in enumerate(self.experts):
            tied: dict[str, str] = expert.all_tied_weights_keys  # type: ignore[assignment]
            self.all_tied_weights_keys.update(
                {f"experts.{j}.{one}": f"experts.{j}.{other}" for one, other in tied.items()}
            )

    def get_input_embeddings(self) -> Any:
        first: Any = self.experts[0]
        return first.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        first: Any = self.experts[0]
        return first.get_output_embeddings()

    @property
    def running(self) -> list[int]:
        """The experts that have a prior above 0."""
        return [j for j, share in enumerate(self.config.prior or ()) if share > 0]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Log-probabilities [B, S, V] of the mixture, in float32."""
        text: Any = self.config.text_config
        if use_cache is None:
            use_cache = bool(text.use_cache)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=text)
        caches = self._caches(past_key_values)
        said = torch.stack(
            [
                self.experts[j](
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    past_key_values=cache,
                    use_cache=use_cache,
                )
                .logits.float()
                .log_softmax(-1)
                for j, cache in zip(self.running, caches, strict=True)
            ],
            dim=1,
        )
        kept: Any = None if past_key_values is None else past_key_values.layers[-1]
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        evidence = self._evidence(said, input_ids, mask, kept)
        if kept is not None:
            kept.put(evidence[:, -1], said[:, :, -1])
        posterior = self._posterior(evidence)
        logits = (said + posterior.movedim(-1, 1)[..., None]).logsumexp(1)
        loss = None
        if labels is not None:
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if isinstance(logits_to_keep, int):
            logits = logits[:, -logits_to_keep:] if logits_to_keep else logits
        else:
            logits = logits[:, logits_to_keep]
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def posterior_of(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The posterior [B, S, N] behind every token, of the experts that run."""
        said = torch.stack(
            [
                self.experts[j](input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
                .logits.float()
                .log_softmax(-1)
                for j in self.running
            ],
            dim=1,
        )
        return self._posterior(self._evidence(said, input_ids, attention_mask, None)).exp()

    def _evidence(self, said: Tensor, ids: Tensor, mask: Tensor | None, kept: Any) -> Tensor:
        """The logarithm of how likely each expert found what it has read, [B, S, N].

        `said` [B, N, S, V] is what each said of the next token. The first token was foretold by
        none of them.
        """
        after = said[:, :, :-1].gather(-1, ids[:, None, 1:, None].expand(-1, said.shape[1], -1, 1))
        first = said.new_zeros(*said.shape[:2], 1)
        seen = kept is not None and kept.is_initialized
        if seen:
            first = kept.next_token.gather(-1, ids[:, None, :1].expand(-1, said.shape[1], 1))
        likely = torch.cat([first, after[..., 0]], -1).movedim(1, -1)
        if mask is not None:
            # A token behind padding was foretold from padding.
            known = mask.bool() & torch.cat(
                [mask.new_zeros(len(mask), 1).bool(), mask[:, :-1].bool()], 1
            )
            if seen:
                known[:, 0] = mask[:, 0].bool()
            likely = likely * known[..., None]
        if self.config.posterior == "last_token":
            return likely
        total = likely.cumsum(1)
        return total + kept.evidence[:, None] if seen else total

    def _posterior(self, evidence: Tensor) -> Tensor:
        prior = [self.config.prior[j] for j in self.running]  # type: ignore[index]
        return (evidence + evidence.new_tensor(prior).log()).log_softmax(-1)

    def _caches(self, cache: Any) -> list[DynamicCache | None]:
        """Each running expert's part of one cache; what they keep lies in it one after another."""
        configs = self.config.expert_configs
        if cache is None:
            return [None] * len(self.running)
        if not isinstance(cache.layers[-1] if cache.layers else None, PosteriorLayer):
            cache.layers = [
                layer for j in self.running for layer in DynamicCache(config=configs[j]).layers
            ] + [PosteriorLayer()]
        parts: list[DynamicCache | None] = []
        start = 0
        for j in self.running:
            part = DynamicCache(config=configs[j])
            stop = start + len(part.layers)
            part.layers = cache.layers[start:stop]
            parts.append(part)
            start = stop
        return parts


AutoConfig.register(MODEL_TYPE, EnsembleConfig, exist_ok=True)
AutoModelForCausalLM.register(EnsembleConfig, EnsembleForCausalLM, exist_ok=True)
