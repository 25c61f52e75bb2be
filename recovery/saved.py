"""Adapters that lie in a folder, regrow's own (`adapter.json`) or PEFT's (`adapter_config.json`): told, and attached.

Importing this, and telling what a folder holds, costs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from recovery import adapters, peft_format, peft_read

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS, DESCRIPTION, FORMAT = "adapter.safetensors", "adapter.json", 1  # of regrow's own files


@dataclass(frozen=True)
class Saved:
    """An adapter's folder, whose files it holds (`regrow` or `peft`), and the method that reads it."""

    folder: Path
    form: str
    method: str

    @property
    def version(self) -> int:
        """The VERSION of the method."""
        return adapters.load(self.method).VERSION

    def refusal(self) -> str | None:
        """Why PEFT has no form of this adapter, or None."""
        if self.form == "peft":
            return None
        options = described(self.folder)["config"]
        return peft_format.refusal(adapters.load(self.method).Config.model_validate(options))


def read(folder: Path) -> Saved:
    """What a folder holds. Raises ValueError where that is no adapter that is served, from its JSON file alone."""
    if (folder / DESCRIPTION).is_file():
        return Saved(folder, "regrow", described(folder)["config"]["method"])
    if (folder / peft_format.DESCRIPTION).is_file():
        return Saved(folder, "peft", peft_format.method_of(peft_format.described(folder)))
    inner = [name for name in ("adapter", "peft") if (folder / name).is_dir()]
    hint = f"; did you mean {folder / inner[0]}?" if inner else ""
    raise ValueError(f"{folder}: holds no adapter: neither {DESCRIPTION} nor {peft_format.DESCRIPTION}{hint}")


def check(saved: Saved) -> None:
    """Read the weights too. Raises ValueError for what shows to be unusable without the model."""
    if saved.form == "peft":
        peft_read.read(saved.folder)
    else:
        with peft_format.opened(saved.folder / WEIGHTS):
            pass


def attach(model: PreTrainedModel, saved: Saved) -> list[str]:
    """Attach the adapter; returns the layers' names. Raises ValueError, leaving the model as it was, for another's."""
    from recovery import inject

    if saved.form == "peft":
        return peft_read.attach(model, saved.folder)
    inject.attach_saved(model, saved.folder)
    return list(inject.adapted(model))


def described(folder: Path) -> dict[str, Any]:
    """The folder's adapter.json. Raises ValueError where this version of regrow cannot read it."""
    file = folder / DESCRIPTION
    said = peft_format.json_of(file)
    if said.get("format") != FORMAT:
        raise ValueError(f"{folder}: adapter format {said.get('format')!r}; this version of regrow reads {FORMAT}")
    wanted = ("method_version", "config", "seed", "bases_sha256", "base_sample_sha256")
    if absent := [key for key in wanted if key not in said]:
        raise ValueError(f"{file}: it does not say {', '.join(absent)}: it is damaged")
    if not isinstance(said["seed"], int):
        raise ValueError(f"{file}: seed {said['seed']!r} is not a whole number: it is damaged")
    config: Any = said["config"]
    name = cast("dict[str, Any]", config).get("method") if isinstance(config, dict) else None
    if name not in adapters.names():
        raise ValueError(f"{file}: no adapter is called {name!r}; there are {', '.join(adapters.names())}")
    method = adapters.load(name)
    oldest = getattr(method, "READS", method.VERSION)
    if said["method_version"] not in range(oldest, method.VERSION + 1):
        here = f"versions {oldest} to {method.VERSION} are" if oldest < method.VERSION else f"{method.VERSION} is"
        raise ValueError(f"{folder}: made with version {said['method_version']} of {name}; {here} read: train it again")
    try:
        method.Config.model_validate(config)
    except ValueError as error:
        raise ValueError(f"{file}: its config is not one of {name}'s: {error}") from error
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder}: it has no {WEIGHTS}")
    return said
