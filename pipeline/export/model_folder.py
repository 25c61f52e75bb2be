"""A Hugging Face folder as the exporters read it: its config's entries, its shape, its tensors one by one."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.sources import described
from pruning.architecture import Architecture
from pruning.config import OWN, SERVED


@dataclass(frozen=True)
class ModelFolder:
    """Nothing is loaded before it is asked for; nothing in the folder is executed. `adapter`: the folder of an adapter
    that was trained on this model."""

    path: Path
    adapter: Path | None = None

    @classmethod
    def planned(cls, path: Path, said: dict[str, Any]) -> "ModelFolder":
        """A model that is not there yet: these config entries, the tokenizer of `path`."""
        model = cls(path)
        model.__dict__["said"] = said  # where cached_property keeps it
        return model

    @cached_property
    def said(self) -> dict[str, Any]:
        """The entries of config.json. Raises ConfigError where that is not a LLaMA-like model's."""
        file = self.path / "config.json"
        if not file.is_file():
            raise ConfigError(f"{self.path}: not a model folder (it has no config.json)")
        said = described(file, str(self.path))
        if not set(said.get("architectures") or []) & set(SERVED):
            found = ", ".join(said.get("architectures") or []) or "an unnamed architecture"
            raise ConfigError(f"{self.path}: {found} is not LLaMA-like; regrow serves {', '.join(SERVED)}")
        return said

    @property
    def name(self) -> str:
        """The model's class."""
        return self.said["architectures"][0]

    @property
    def own(self) -> bool:
        """Whether that is a class of `modeling_regrow.py`, which transformers does not have."""
        return self.name in OWN

    @cached_property
    def shape(self) -> Architecture:
        """Raises ConfigError where config.json lacks an entry, or contradicts itself."""
        try:
            return Architecture.read(self.said)
        except ValueError as error:
            raise ConfigError(f"{self.path}: {error}") from error

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same widths."""
        return len(set(self.shape.layers)) == 1

    @cached_property
    def files(self) -> dict[str, Path]:
        """Which safetensors file holds each tensor. Raises ConfigError where there is none, or one that is broken."""
        from safetensors import SafetensorError, safe_open

        found: dict[str, Path] = {}
        for file in sorted(self.path.glob("*.safetensors")):
            try:
                with safe_open(file, "pt") as tensors:
                    found |= dict.fromkeys(tensors.keys(), file)
            except SafetensorError as error:
                raise ConfigError(f"{file}: not a whole safetensors file: {error}") from error
        if not found:
            raise ConfigError(f"{self.path}: no .safetensors weights; regrow unpickles nothing")
        return found

    def tensor(self, name: str) -> Any:
        """A torch tensor, as saved. Raises ConfigError where the folder has none of that name."""
        from safetensors import safe_open

        if name not in self.files:
            raise ConfigError(f"{self.path}: its safetensors files have no {name}, which config.json asks for")
        with safe_open(self.files[name], "pt") as tensors:
            return tensors.get_tensor(name)

    def shards(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each safetensors file's name and tensors, one file at a time."""
        from safetensors.torch import load_file

        for file in sorted(set(self.files.values())):
            yield file.name, load_file(file)
