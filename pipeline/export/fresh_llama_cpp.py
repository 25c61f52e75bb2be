"""Run by `check` in a process of its own: llama.cpp on a GGUF file, one token after another. Knows nothing of regrow.

python fresh_llama_cpp.py FILE.gguf REQUEST.json ANSWER.json
request: {"text": str, "ids": [int], "top": int, "threads": int, "context": int}
answer: {"tool", "tokens": ids of the text, "top": per position [[id, log-probability], ..] after ids[: position + 1]}
"""

import importlib
import json
import sys
import urllib.request
from importlib import metadata
from pathlib import Path
from typing import Any


def tokenize(server: Any, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True}).encode()
    post = urllib.request.Request(
        f"{server.listening_address}/tokenize", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(post) as response:
        return json.load(response)["tokens"]


def main() -> None:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    file, request, answer = sys.argv[1:]
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = asked["context"]
    params.n_parallel = 1
    params.warmup = False
    params.ui = False
    params.verbosity = 1  # errors
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked["threads"]
    # Keys and values as they are computed: by default they are rounded to float16.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)

    tokens = tokenize(server, asked["text"])
    # The sampled token is forced to be plain text: llama.cpp reports nothing for an end or half a character. The
    # probabilities are those of the model all the same.
    forced = [[tokenize(server, "a")[-1], 1e6]]
    top: list[list[list[float]]] = []
    for position in range(len(asked["ids"])):
        prompt = {"prompt": asked["ids"][: position + 1], "n_predict": 1, "cache_prompt": True, "logit_bias": forced}
        said = server.handle_completions({**prompt, "n_probs": asked["top"], "logprobs": asked["top"]})
        if "choices" not in said:
            sys.exit(f"llama.cpp: {said}")
        found = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        top.append([[entry["id"], entry["logprob"]] for entry in found])
    result = {"tool": f"llama.cpp (xllamacpp {metadata.version('xllamacpp')})", "tokens": tokens, "top": top}
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
