"""Run by `check` in a process of its own: a Hugging Face folder in transformers. regrow's packages cannot be imported.

python fresh_transformers.py FOLDER REQUEST.json ANSWER.safetensors
request: {"ids": [int], "remote": bool, "adapter": folder or null, "threads": int, "generate": int}
answer: `logits` float32 [length, vocabulary], `generated` int64 [tokens]; metadata: class, parameters, tool
"""

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

for package in ("pipeline", "pruning", "recovery", "evaluation"):
    sys.modules[package] = None  # type: ignore[assignment]


def main() -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder, request, answer = sys.argv[1:]
    asked = json.loads(Path(request).read_text(encoding="utf-8"))
    torch.set_num_threads(asked["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=asked["remote"], dtype="auto")
    tool = f"transformers {metadata.version('transformers')}"
    said = {"class": type(model).__name__, "parameters": str(model.num_parameters())}
    if asked["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, asked["adapter"])
        tool += f", peft {metadata.version('peft')}"
    model.eval()
    ids = torch.tensor([asked["ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        count = asked["generate"]
        generated = model.generate(input_ids=ids[:, :8], max_new_tokens=count, min_new_tokens=count, do_sample=False)
    tensors = {"logits": logits.contiguous(), "generated": generated[0].contiguous()}
    save_file(tensors, answer, metadata={**said, "tool": tool})


if __name__ == "__main__":
    main()
