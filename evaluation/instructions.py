"""Protocol B's prompts: a suite's row as an instruction that names its options, and the answer's fixed sentence.

The wording is that of the LLM-Adapters data sets (commonsense_170k), set in the same plain Alpaca frame that training
rows of format `instruction` get; the published scripts indent that frame by 16 blanks. No torch here.
"""

import re
from dataclasses import dataclass
from typing import Any

ALPACA = (
    "Below is an instruction that describes a task{also}. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
QUESTION = "Please choose the correct answer to the question: "
Row = dict[str, Any]


@dataclass(frozen=True)
class Instruction:
    """What is asked, the names of the options, and which name is right."""

    text: str
    names: tuple[str, ...]
    gold: str

    @property
    def prompt(self) -> str:
        return alpaca(self.text)

    @property
    def response(self) -> str:
        return f"the correct answer is {self.gold}"

    def parse(self, generated: str) -> str | None:
        """The first option named in a generated text; None where there is none."""
        found = re.search("|".join(self.names), generated)
        return found[0] if found else None


def alpaca(instruction: str, given: str = "") -> str:
    """The prompt of an instruction, with the input it is given, if any."""
    also = ", paired with an input that provides further context" if given else ""
    return ALPACA.format(also=also, instruction=instruction, input=f"### Input:\n{given}\n\n" if given else "")


def instruction(suite: str, row: Row) -> Instruction:
    """A row of one of the eight suites, in lm-eval's schema. Raises ValueError for another suite."""
    if suite == "boolq":
        asked = f"Please answer the following question with true or false, question: {row['question'].rstrip('?')}?"
        return Instruction(
            f"{asked}\n\nAnswer format: true/false", ("true", "false"), "true" if row["label"] else "false"
        )
    if suite == "piqa":
        asked = f"Please choose the correct solution to the question: {row['goal']}"
        return _options(asked, "solution", [row["sol1"], row["sol2"]], int(row["label"]), between="\n\n")
    if suite == "social_iqa":
        answers = [row[f"answer{letter}"] for letter in "ABC"]
        return _options(f"{QUESTION}{row['context']} {row['question']}", "answer", answers, int(row["label"]) - 1)
    if suite == "hellaswag":
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}".rstrip()
        asked = f"Please choose the correct ending to complete the given sentence: {context}"
        return _options(asked, "ending", row["endings"], int(row["label"]))
    if suite == "winogrande":
        asked = "Please choose the correct answer to fill in the blank to complete the given sentence: "
        options = [row["option1"], row["option2"]]
        return _options(asked + row["sentence"], "option", options, int(row["answer"]) - 1, last=" ")
    if suite in ("arc_easy", "arc_challenge", "openbookqa"):
        asked = row["question_stem"] if suite == "openbookqa" else row["question"]
        choices: dict[str, list[str]] = row["choices"]
        return _options(QUESTION + asked, "answer", choices["text"], choices["label"].index(row["answerKey"]))
    raise ValueError(f"protocol B has no instruction for suite {suite!r}")


def _options(
    asked: str, kind: str, options: list[str], gold: int, between: str = " ", last: str = "\n\n"
) -> Instruction:
    names = tuple(f"{kind}{number}" for number in range(1, len(options) + 1))
    listed = between.join(f"{name.capitalize()}: {option}" for name, option in zip(names, options, strict=True))
    return Instruction(f"{asked}\n\n{listed}{last}Answer format: {'/'.join(names)}", names, names[gold])
