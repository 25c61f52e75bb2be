"""The Hugging Face hub: the commit behind a revision, a model's folder, one file of a data set."""

import re
from pathlib import Path

from pipeline.errors import SourceError

# No pickles, no code; the last three for the licence that the model card carries on.
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
DATA_FILES = (".json", ".jsonl", ".parquet")


def commit(spec: str, name: str, revision: str, kind: str) -> str:
    """The 40-digit commit of a repository's revision (default branch if empty); asks the hub unless it is one."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = HfApi().repo_info(name, revision=revision or None, repo_type=kind, timeout=10).sha
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        raise SourceError(f"{spec}: the hub refused the {kind} {name}: {reason}") from error
    except Exception as error:  # the HTTP library's own classes differ between versions of huggingface_hub
        remedy = "connect, or pin a commit that is in the local cache with @<40 hex digits>"
        raise SourceError(f"{spec}: the hub is not in reach ({error}); {remedy}") from error
    if not found:
        raise SourceError(f"{spec}: the hub gave no commit for {name}")
    return found


def data_file(spec: str, name: str, revision: str, member: str) -> Path:
    """One file of a data set repository, in the hub library's own cache; `*` means its only data file."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        if member == "*":
            files = HfApi().list_repo_files(name, revision=revision, repo_type="dataset")
            data = [file for file in files if file.endswith(DATA_FILES)]
            if len(data) != 1:
                raise SourceError(f"{spec}: {name} has {len(data)} data files, name one after '#': {', '.join(data)}")
            member = data[0]
        return Path(hf_hub_download(name, member, revision=revision, repo_type="dataset"))
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"{spec}: {member} could not be fetched: {_first_line(error)}") from error


def model_folder(spec: str, name: str, revision: str) -> Path:
    """A model repository's weights (safetensors), config and tokenizer, in the hub library's own cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES))
    except Exception as error:
        raise SourceError(f"{spec}: {name} could not be fetched: {_first_line(error)}") from error


def model_config(spec: str, name: str, revision: str) -> Path:
    """A model repository's config.json alone, in the hub library's own cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except Exception as error:
        raise SourceError(f"{spec}: config.json of {name} could not be fetched: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
