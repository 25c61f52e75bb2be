"""What the trainer is told. Data sources are the caller's; everything here is part of a result's key."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

from recovery import adapters
from recovery.base import AdapterConfig


class Validation(BaseModel):
    """How often the held-out loss is measured, and on how much. `fraction` 0 turns it off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fraction: float = Field(default=0.02, ge=0, lt=0.5, description="share of every source that is held out")
    tokens: int = Field(default=2048, ge=1, description="held-out tokens scored each time, at most")
    times: int = Field(default=4, ge=1, description="how often during the run, at even distances, the last at the end")


class RecoveryConfig(BaseModel):
    """An adapter, a budget of training tokens, and how they are spent.

    `tokens` counts every token fed, prompts too. A row holds up to `max_length` tokens of whole examples; rows are
    collected to `batch_tokens` for one optimizer step. `learning_rate` is reached after `warmup` (a fraction of the
    steps) and falls to `final_rate` of itself along a cosine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: SerializeAsAny[AdapterConfig]
    tokens: int = Field(ge=1)
    loss: Literal["response", "full"] = "response"
    learning_rate: float = Field(default=5e-4, gt=0, lt=1)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    final_rate: float = Field(default=0.1, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    batch_tokens: int = Field(default=2048, ge=1)
    max_length: int = Field(default=512, ge=8)
    validation: Validation = Validation()
    seed: int = 0

    @field_validator("adapter", mode="before")
    @classmethod
    def _by_method(cls, value: object) -> object:
        """Check a mapping by the `Config` of the method it names."""
        if isinstance(value, dict):
            name = value.get("method")
            if name not in adapters.names():
                raise ValueError(f"no adapter is called {name!r}; there are {', '.join(adapters.names())}")
            return adapters.load(name).Config.model_validate(value)
        return value

    @model_validator(mode="after")
    def _whole_rows(self) -> "RecoveryConfig":
        if self.batch_tokens < self.max_length:
            raise ValueError(f"batch_tokens: {self.batch_tokens} is less than one row of max_length {self.max_length}")
        if self.tokens < self.batch_tokens:
            raise ValueError(f"tokens: {self.tokens} is less than one step of batch_tokens {self.batch_tokens}")
        return self
