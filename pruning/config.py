"""What every pruning method is told: how much, which structures, which shape, and what makes up for the loss."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Decoder-only models whose layers are LLaMA's: RMSNorm, rotary attention with grouped heads, gated FFN.
# OWN: with layers of different widths (`modeling_regrow.py`).
OWN = ("RegrowForCausalLM", "RegrowMistralForCausalLM", "RegrowQwen2ForCausalLM", "RegrowQwen3ForCausalLM")
SERVED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", *OWN)

HELD_OUT = 4  # one calibration window of so many judges the ridge of `least_squares`
GGUF_BLOCK = 32  # weights of a row that llama.cpp quantizes together
Kind = Literal["ffn", "attention", "heads", "hidden", "layers"]
DepthMethod = Literal["block_influence", "shortened"]


@dataclass(frozen=True)
class Statistic:
    """Something measured on calibration text that a method asks for; the name is a function of `pruning.statistics`.

    Its options and the calibration text are its identity: methods that ask for the same share one measurement.
    """

    name: Literal["activations", "gradients", "ablation"]
    options: tuple[tuple[str, bool], ...] = ()


class Section(BaseModel):
    """Values never change; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Protect(Section):
    """Layers that keep their width and their place: the first and the last so many."""

    first: int = Field(default=0, ge=0)
    last: int = Field(default=0, ge=0)


class Depth(Section):
    """Whole layers that go before the widths are cut: how many, and the criterion that ranks them."""

    layers: int = Field(ge=1)
    method: DepthMethod = "block_influence"


class Compensation(Section):
    """What the kept weights of o_proj and down_proj do about the removed ones.

    `bias` adds the removed channels' mean contribution as a bias (FLAP). `least_squares` refits the kept weights so
    that each projection's output on calibration text stays; `ridge` times the mean of the Gram matrix' diagonal pulls
    the solution towards the original weights (`auto`: each projection's own, judged by a quarter of the windows).
    `drift` is the share of the residual stream's deviation, piled up so far, that each projection also takes back.
    `samples` and `length` of calibration text, where it should see other windows than the criterion does.
    """

    method: Literal["none", "bias", "least_squares"] = "none"
    ridge: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    drift: float = Field(default=0.5, ge=0, le=1)
    samples: int | None = Field(default=None, ge=1)
    length: int | None = Field(default=None, ge=2)


def _named(value: object) -> object:
    return {"method": value} if isinstance(value, str) else value


CompensationOrName = Annotated[Compensation, BeforeValidator(_named)]


class PruningConfig(Section):
    """Base of every criterion's `Config`.

    `ratio` is the fraction of all the model's parameters to remove, embeddings counted (tied ones once).
    `structures`: `ffn` channels, `attention` groups (a key-value head with its query heads), query `heads` (the same
    number from every group), `hidden` channels (one width for the whole model) or whole `layers`.
    `shape: uniform` gives every layer the same widths, so that stock transformers load the result; `free` lets layers
    differ (where they do already, nothing else will do), and needs the modeling file that is saved beside the weights;
    `vllm` lets FFN widths differ and keeps attention alike, as vLLM's block_configs want it (of Llama, and Mistral
    without a window); `gguf` is free, with widths that are a multiple of 32, the block of llama.cpp's 4- and 8-bit
    types, unless `round_to` says otherwise (256 is the block of its K-quants).
    `allocation: uniform` takes the same fraction from every layer, `global` ranks the structures of all layers
    together, a list gives each layer's relative share.
    """

    method: str
    ratio: float = Field(gt=0, lt=1, description="fraction of the model's parameters to remove")
    shape: Literal["uniform", "free", "vllm", "gguf"] = "uniform"
    structures: tuple[Kind, ...] = Field(default=("ffn", "attention"), min_length=1)
    allocation: Literal["uniform", "global"] | tuple[Annotated[float, Field(ge=0)], ...] = "uniform"
    protect: Protect = Protect()
    depth: Depth | None = None
    steps: int = Field(default=1, ge=1, description="prune in so many equal steps, measuring anew before each")
    round_to: int = Field(
        default=1, ge=1, description="FFN and hidden channels left where any are cut: a multiple of this"
    )
    compensation: CompensationOrName = Compensation()
    seed: int = 0

    @property
    def runs_on_text(self) -> bool:
        """Whether pruning itself, beyond the first statistics, needs calibration text."""
        from pruning import criteria  # its modules need this one

        measured_again = self.steps > 1 and bool(criteria.statistics(self))
        return measured_again or self.compensation.method == "least_squares"

    @model_validator(mode="before")
    @classmethod
    def _blocks(cls, data: Any) -> Any:
        """llama.cpp's block, where nothing else was asked for."""
        if isinstance(data, dict) and cast("dict[str, Any]", data).get("shape") == "gguf":
            return {"round_to": GGUF_BLOCK, **data}
        return data

    @model_validator(mode="after")
    def _possible(self) -> "PruningConfig":
        width = [kind for kind in self.structures if kind != "layers"]
        if len(set(self.structures)) != len(self.structures):
            raise ValueError(f"structures: each kind once, not {', '.join(self.structures)}")
        if "layers" in self.structures and width:
            raise ValueError("structures: layers cannot stand beside widths; set depth: {layers: N} to cut both")
        protected = self.protect.first or self.protect.last
        listed = not isinstance(self.allocation, str)
        if width == ["hidden"] and (listed or (protected and not self.depth)):
            raise ValueError(
                f"{'allocation' if listed else 'protect'}: hidden channels go from all layers alike, so it has no "
                "effect; leave it out, or add ffn to structures"
            )
        if self.shape == "uniform" and width:
            if protected:
                raise ValueError(
                    "protect: protected layers keep their width, which makes the model non-uniform; "
                    "set shape: free, or protect to nothing"
                )
            if self.allocation != "uniform":
                raise ValueError("allocation: layers of different widths make the model non-uniform; set shape: free")
        differing = self.allocation != "uniform" or protected
        if self.shape == "vllm" and differing:
            if set(self.structures) & {"attention", "heads"}:
                raise ValueError(
                    "shape: vllm has one number of query heads for all layers, so only FFN widths may differ; set "
                    "structures: [ffn], or an allocation: uniform without protect"
                )
            if self.compensation.method == "bias":
                raise ValueError(
                    "shape: vllm: layers that differ have no biases there; set compensation: least_squares"
                )
        if self.allocation == "global" and (other := set(self.structures) - {"ffn", "attention"}):
            raise ValueError(f"allocation: global ranks ffn and attention structures, not {', '.join(sorted(other))}")
        if self.depth and listed:
            raise ValueError(
                "allocation: a list of shares cannot stand beside depth: which layers stay is not known yet"
            )
        if "layers" in self.structures and self.compensation.method == "bias":
            raise ValueError("compensation: bias replaces removed channels, and whole layers remove none")
        if "layers" in self.structures and self.steps > 1:
            raise ValueError("steps: whole layers go in one step")
        if "layers" in self.structures and (self.depth or self.allocation != "uniform"):
            raise ValueError("structures: [layers] needs neither depth nor allocation; ratio says how many go")
        return self
