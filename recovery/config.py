"""What the trainer is told. Data sources, and who teaches, are the caller's.

All but `checkpoint_every`, `gradient_checkpointing` and `distillation.cache` is part of a result's key;
`quantized_base` where it is set.
"""

import difflib
from typing import Any, Literal

from pydantic import BaseModel, Field, SerializeAsAny, field_validator, model_validator

from recovery import adapters
from recovery.base import AdapterConfig

# What decides which rows are fed, and in which order, beside the data themselves (`recovery.feed`).
ROWS: dict[str, Any] = {"tokens": True, "loss": True, "max_length": True, "seed": True, "validation": {"fraction"}}


class Validation(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """How often the held-out loss is measured, and on how much. `fraction` 0 turns it off."""

    fraction: float = Field(default=0.02, ge=0, lt=0.5, description="share of every source that is held out")
    tokens: int = Field(default=2048, ge=1, description="held-out tokens scored each time, about")
    times: int = Field(default=4, ge=1, description="how often during the run, at even distances, the last at the end")
    patience: int | None = Field(default=None, ge=1, description="measurements without a better one that end the run")

    @model_validator(mode="after")
    def _held_out(self) -> "Validation":
        if self.patience and not self.fraction:
            raise ValueError("patience: with fraction 0 nothing is held out to measure; leave it out, or set fraction")
        return self


class Distillation(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """What is learned from a teacher, and how (`recovery.distill` has the formula)."""

    weight: float = Field(default=0.5, ge=0, le=1, description="the teacher's share; the rest is the data's own tokens")
    temperature: float = Field(default=1.0, gt=0, description="flattens teacher and student alike")
    positions: Literal["labelled", "all"] = Field(default="labelled", description="where the teacher is followed")
    top_k: int = Field(default=64, ge=1, description="teacher's likeliest tokens; the others are one class")
    hidden: float = Field(default=0.0, ge=0, description="weight of matching hidden states layer by layer")
    cache: bool = Field(default=True, exclude=True, description="keep what the teacher says, for other recoveries")

    @model_validator(mode="after")
    def _possible(self) -> "Distillation":
        if self.hidden and self.cache:
            raise ValueError("hidden: hidden states are too large to keep: set cache to false")
        if not (self.weight or self.hidden):
            raise ValueError("weight and hidden are both 0: nothing would be distilled; leave the section out")
        return self


class RecoveryConfig(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """An adapter, a budget of training tokens, and how they are spent.

    `tokens` counts every token fed, prompts too. A row holds up to `max_length` tokens of whole examples; rows are
    collected to `batch_tokens` for one optimizer step. `learning_rate` is reached after `warmup` (a fraction of the
    tokens) and falls to `final_rate` of itself along a cosine.
    """

    adapter: SerializeAsAny[AdapterConfig]
    quantized_base: Literal["nf4", "int8"] | None = Field(
        default=None,
        exclude_if=lambda value: value is None,  # what was trained before it could be asked for keeps its key
        description="keep the base's weights in 4 or 8 bits while training; null: in the model's dtype",
    )
    tokens: int = Field(ge=1, description="training tokens, prompts included; never exceeded")
    loss: Literal["response", "full"] = Field(default="response", description="which tokens are learned")
    learning_rate: float = Field(
        default_factory=lambda said: said["adapter"].default_rate(),
        gt=0,
        lt=1,
        description="the highest, reached after the warm-up; by default the method's",
    )
    warmup: float = Field(default=0.1, ge=0, lt=1, description="share of the tokens over which the rate rises")
    final_rate: float = Field(default=0.1, ge=0, le=1, description="what the rate falls to, as a share of the highest")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's")
    clip: float = Field(default=1.0, gt=0, description="largest norm of a step's gradient")
    max_length: int = Field(default=512, ge=8, description="tokens of one packed row, and of one example, at most")
    batch_tokens: int = Field(
        default_factory=lambda said: max(512, said["max_length"]),
        ge=1,
        description="tokens of one optimizer step, at most; by default 512, or one row where that is more",
    )
    distillation: Distillation | None = None
    validation: Validation = Validation()
    seed: int = Field(default=0, description="of adapters, held-out part, order and dropout")
    gradient_checkpointing: bool = Field(
        default=False, exclude=True, description="compute each layer's inside again in the backward pass: less memory"
    )
    checkpoint_every: float = Field(
        default=60.0, ge=0, exclude=True, allow_inf_nan=True, description="seconds between checkpoints; .inf: never"
    )

    @field_validator("adapter", mode="before")
    @classmethod
    def _by_method(cls, value: Any) -> Any:
        """Check a mapping by the `Config` of the method it names."""
        if not isinstance(value, dict):
            return value
        name, known = value.get("method"), adapters.names()
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"method: no adapter is called {name!r}{hint}; there are {', '.join(known)}")
        return adapters.load(name).Config.model_validate(value)

    @model_validator(mode="after")
    def _served(self) -> "RecoveryConfig":
        if self.quantized_base and (reason := self.adapter.few_bits_refusal()):
            raise ValueError(f"quantized_base: {reason}")
        return self

    @model_validator(mode="after")
    def _whole_rows(self) -> "RecoveryConfig":
        if self.batch_tokens < self.max_length:
            raise ValueError(f"batch_tokens: {self.batch_tokens} is less than one row of max_length {self.max_length}")
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens: {self.tokens} is less than one step of batch_tokens {self.batch_tokens}")
        return self
