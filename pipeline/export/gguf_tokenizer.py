"""The tokenizer block of a GGUF file, from a fast tokenizer.

Byte-level BPE (Llama 3, SmolLM, Qwen) is llama.cpp's model `gpt2`, whose pre-tokenizer goes by a name; the name is
found by comparing the tokenizer's own splitting rules. SentencePiece BPE (Llama 1 and 2, Mistral, TinyLlama) is its
model `llama`, which merges by score: a token's score is minus the rank of its first merge, which gives the same order.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.export.model_folder import ModelFolder

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS: dict[tuple[str, ...], str] = {
    ("bytes by words",): "gpt-2",
    ("digits", "bytes by words"): "smollm",
    (_LETTERS + r"\p{N}{1,3}" + _REST, "bytes"): "llama-bpe",
    (_LETTERS + r"\p{N}" + _REST, "bytes"): "qwen2",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's token types


def refusal(model: ModelFolder) -> str | None:
    """Why llama.cpp cannot tokenize as this folder's tokenizer does, or None."""
    try:
        tokenizer, _ = _read(model.path)
    except ValueError as error:
        return str(error)
    if (highest := max(tokenizer.get_vocab().values())) >= model.shape.vocabulary:
        return (
            f"the tokenizer has a token {highest}, and the embedding {model.shape.vocabulary} rows; put the model's "
            "own tokenizer into the folder, or take the tokens without a row out of it"
        )
    return None


def describe(writer: Any, model: ModelFolder) -> None:
    """Add the tokenizer's keys to a GGUFWriter."""
    tokenizer, said = _read(model.path)
    size = model.shape.vocabulary
    tokens, types = _tokens(said, tokenizer.all_special_ids, size)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in said["model"]["merges"]]
    if _sentencepiece(said):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(merges, tokens))
        writer.add_add_space_prefix(_space_prefix(said))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(PRE_TOKENIZERS[_steps(said)])
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
    writer.add_token_types(types)
    ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id}
    for name, number in {**ids, "pad": tokenizer.pad_token_id}.items():
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(encoded) and encoded[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(encoded) > 1 and encoded[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


@cache
def _read(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The tokenizer and the entries of its tokenizer.json. Raises ValueError saying what llama.cpp has no name for."""
    from pruning.checkpoint import load_tokenizer

    try:
        tokenizer: Any = load_tokenizer(folder)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError("there is no tokenizer in the folder, and llama.cpp needs one") from error
    if not tokenizer.is_fast:
        raise ValueError("the tokenizer has no tokenizer.json, from which the file is written")
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    if said["model"]["type"] != "BPE":
        raise ValueError(f"the tokenizer is a {said['model']['type']} model; BPE is what can be written")
    if not _sentencepiece(said) and _steps(said) not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS.values())
        raise ValueError(f"its pre-tokenizer {_steps(said)} is none of those llama.cpp is known to have ({known})")
    return tokenizer, said


def _sentencepiece(said: dict[str, Any]) -> bool:
    return bool(said["model"].get("byte_fallback"))


def _flat(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _steps(said: dict[str, Any]) -> tuple[str, ...]:
    """The pre-tokenizer, step by step, as PRE_TOKENIZERS spells it."""
    steps: list[str] = []
    for step in _flat(said["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel":
            steps.append("bytes by words" if step["use_regex"] else "bytes")
        elif step["type"] == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step["type"] == "Split" and "Regex" in step["pattern"]:
            steps.append(step["pattern"]["Regex"])
        else:
            steps.append(step["type"])
    return tuple(steps)


def _space_prefix(said: dict[str, Any]) -> bool:
    before = [*_flat(said["normalizer"], "normalizers"), *_flat(said["pre_tokenizer"], "pretokenizers")]
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("always", "first") for step in before)


def _tokens(said: dict[str, Any], special: list[int], size: int) -> tuple[list[str], list[int]]:
    """Text and type of every token; rows of the embedding that no token has are unused."""
    tokens, types = [f"[PAD{index}]" for index in range(size)], [UNUSED] * size
    for token, index in said["model"]["vocab"].items():
        of_byte = _sentencepiece(said) and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[index], types[index] = token, BYTE if of_byte else NORMAL
    for added in said["added_tokens"]:
        control = added["special"] or added["id"] in special
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL if control else USER_DEFINED
    unknown = said["model"].get("unk_token")
    if _sentencepiece(said) and unknown in said["model"]["vocab"]:
        types[said["model"]["vocab"][unknown]] = UNKNOWN
    return tokens, types


def _scores(merges: list[str], tokens: list[str]) -> list[float]:
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        first.setdefault(merge.replace(" ", "", 1), rank)
    return [-float(first.get(token, len(merges))) for token in tokens]
