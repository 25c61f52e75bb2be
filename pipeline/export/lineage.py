"""What a model was made from and how, read from the manifests of the store it lies in.

{"source": {...}, "dtype": "bfloat16", "licence": "apache-2.0", "parameters": [before, after],
 "pruning": {"config": {...}, "calibration": ..}, "recovery": {"config": {...}, "data": [..]} or {"read": {...}},
 "keys": {"prune": .., "recover": .., "merge": ..}, "results": [[heading ..], [row ..], ..]}
"""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

LINEAGE = "regrow.json"


def of_folder(folder: Path) -> dict[str, Any]:
    """The lineage of a model folder: of an export (its regrow.json), or of a stage's artifact (the manifests of its
    store). A folder that regrow did not make, or that was copied out of its store, has only its licence, if its README
    says one."""
    if (folder / LINEAGE).is_file():
        return json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
    manifest = folder.parent / "manifest.json"
    found: dict[str, Any] = {}
    if folder.name == "model" and manifest.is_file():
        with suppress(FileNotFoundError):
            found = of_artifact(json.loads(manifest.read_text(encoding="utf-8")), folder.resolve().parents[2])
    licence = licence_of(folder)
    return {**found, **({"licence": licence} if licence else {})}


def of_artifact(manifest: dict[str, Any], store: Path) -> dict[str, Any]:
    """The lineage of an artifact of the stage `prune` or `merge`, from its manifest and those it names."""
    material, stage = manifest["material"], manifest["stage"]
    found: dict[str, Any] = {"keys": {stage: manifest["key"]}}
    if stage == "merge":
        adapter, base = material["adapter"], material["base"]
        found["merge"] = manifest.get("report")
        found["recovery"] = of_adapter(adapter, (found["merge"] or {}).get("adapter", {}).get("folder"), store)
        earlier = of_artifact(_manifest(store, "prune", base), store) if isinstance(base, str) else {"source": base}
        trained = {"recover": _manifest(store, "recover", adapter)["key"]} if isinstance(adapter, str) else {}
        return {**earlier, **found, "keys": {**earlier.get("keys", {}), **trained, **found["keys"]}}
    if stage == "prune":
        report = manifest["report"]
        found["source"] = material["model"]
        found["pruning"] = {
            "config": material["config"],
            "calibration": _calibration(material, store),
            "ratio_reached": report["ratio_reached"],
        }
        found["parameters"] = [report["parameters_before"], report["parameters_after"]]
    return found


def of_adapter(adapter: Any, folder: str | None, store: Path) -> dict[str, Any]:
    """What is known of an adapter from its key in another stage's material: how it was trained, or which was read."""
    if not isinstance(adapter, str):
        return {"read": {**adapter, "folder": folder}}
    recover = _manifest(store, "recover", adapter)
    trained = {key: recover["material"][key] for key in ("config", "data")}
    return {**trained, "tokens": (recover.get("report") or {}).get("tokens")}


def licence_of(folder: Path) -> str | None:
    """The licence that a folder's README states in its front matter."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    head = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    line = re.search(r"^license:\s*(\S+)\s*$", head.group(1), re.MULTILINE) if head else None
    return line.group(1) if line else None


def _calibration(material: dict[str, Any], store: Path) -> Any:
    if material.get("calibration") or not material.get("statistics"):
        return material.get("calibration")
    try:
        return _manifest(store, "statistics", material["statistics"][0])["material"]["calibration"]
    except FileNotFoundError:  # swept away; the model is the same
        return None


def _manifest(store: Path, stage: str, key: str) -> dict[str, Any]:
    from pipeline.keys import KEY_LENGTH

    return json.loads((store / stage / key[:KEY_LENGTH] / "manifest.json").read_text(encoding="utf-8"))
