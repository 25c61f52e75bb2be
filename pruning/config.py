"""What every pruning method is told: how much, which structures, and the shape the result may have."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# Decoder-only models whose layers are LLaMA's: RMSNorm, rotary attention with grouped heads, gated FFN.
SERVED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "RegrowForCausalLM")

Kind = Literal["ffn", "attention"]


class Protect(BaseModel):
    """Layers that keep their width: the first and the last so many."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    first: int = Field(default=0, ge=0)
    last: int = Field(default=0, ge=0)


class PruningConfig(BaseModel):
    """Base of every criterion's `Config`.

    `ratio` is the fraction of all the model's parameters to remove, embeddings counted (tied ones once).
    `shape: uniform` gives every layer the same widths, so that stock transformers load the result; `free` lets
    protected layers keep theirs, and needs the modeling file that is saved beside the weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    ratio: float = Field(gt=0, lt=1, description="fraction of the model's parameters to remove")
    shape: Literal["uniform", "free"] = "uniform"
    structures: tuple[Kind, ...] = Field(default=("ffn", "attention"), min_length=1)
    protect: Protect = Protect()
    round_to: int = Field(default=1, ge=1, description="kept FFN channels are a multiple of this")
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self) -> "PruningConfig":
        if self.shape == "uniform" and (self.protect.first or self.protect.last):
            raise ValueError(
                "protect: protected layers keep their width, which makes the model non-uniform; "
                "set shape: free, or protect to nothing"
            )
        if len(set(self.structures)) != len(self.structures):
            raise ValueError(f"structures: each kind once, not {', '.join(self.structures)}")
        return self
