"""What an export is asked for. In a config's `export` list, and after `--format`, a short text will do:

hf   hf:pad   gguf (f16)   gguf:f32|f16|bf16|q8_0|q4_1   vllm   peft   quantized (nf4)   quantized:nf4|int8|torchao_int8
"""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

SHORT = {"gguf": "type", "quantized": "scheme"}  # the key that the word after the colon is the value of


class Section(BaseModel):
    """Values never change; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @property
    def label(self) -> str:
        """The export's name: of its step, its folder and its file."""
        return str(getattr(self, "format"))  # noqa: B009 - the subclasses define it

    @property
    def package(self) -> str | None:
        """The package that writes or checks it and that regrow does without otherwise."""
        return None


class HfConfig(Section):
    """A Hugging Face folder. `pad`: layers of different widths are padded with zeros to the widest, so that a stock
    class loads them, at the size and speed of the widest layer."""

    format: Literal["hf"]
    pad: bool = False

    @property
    def label(self) -> str:
        return "hf-pad" if self.pad else "hf"


class GgufConfig(Section):
    """One file for llama.cpp, and the type its matrices are stored in."""

    format: Literal["gguf"]
    type: Literal["f32", "f16", "bf16", "q8_0", "q4_1"] = "f16"

    @property
    def label(self) -> str:
        return f"gguf-{self.type}"

    @property
    def package(self) -> str:
        return "xllamacpp"


class VllmConfig(Section):
    """A folder that vLLM's stock classes load: as it is where layers are equal, DeciLM's block_configs otherwise."""

    format: Literal["vllm"]


class PeftConfig(Section):
    """The adapter alone, in PEFT's files, for the pruned base."""

    format: Literal["peft"]

    @property
    def package(self) -> str:
        return "peft"


class QuantizedConfig(Section):
    """Weights of 8 or 4 bits in a Hugging Face folder: bitsandbytes' nf4 or int8, torchao's weight-only int8."""

    format: Literal["quantized"]
    scheme: Literal["nf4", "int8", "torchao_int8"] = "nf4"

    @property
    def label(self) -> str:
        return f"quantized-{self.scheme}"

    @property
    def package(self) -> str:
        return "torchao" if self.scheme == "torchao_int8" else "bitsandbytes"


def _spelled(value: object) -> object:
    if not isinstance(value, str):
        return value
    name, colon, word = value.partition(":")
    if not colon:
        return {"format": name}
    if name == "hf" and word == "pad":
        return {"format": "hf", "pad": True}
    if name not in SHORT:
        raise ValueError(f"{value!r}: {name} takes nothing after a colon" + (" but pad" if name == "hf" else ""))
    return {"format": name, SHORT[name]: word}


ExportConfig = HfConfig | GgufConfig | VllmConfig | PeftConfig | QuantizedConfig
ExportOrName = Annotated[
    Annotated[ExportConfig, Field(discriminator="format")],
    BeforeValidator(_spelled),
]
