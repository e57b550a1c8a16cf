"""Ask kvpress, with the same weights, the questions that `make results` asked: do its methods find the same numbers?

    python results/beside_kvpress.py checkpoints/SmolLM2-135M-Instruct

It needs `pip install kvpress` in an environment that has litgpt_kv and transformers, and reads smollm2-135m.json beside
this file. kvpress keeps a share of all that it compresses, `make results` one of the text: with the question seen,
kvpress keeps some tokens more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import KeyDiffPress, KVzipPress, SnapKVPress, StreamingLLMPress, TOVAPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from litgpt_kv import LLM
from litgpt_kv.benchmark.peers.llama import renamed, settings
from litgpt_kv.evaluate.answering import Encoded, Questions
from litgpt_kv.evaluate.tasks import examples

PRESSES: dict[str, Callable[[float], Any]] = {  # the cell of `make results`: kvpress' method, from the share removed
    "keydiff": KeyDiffPress,
    "tova": TOVAPress,
    "snapkv": SnapKVPress,
    "sink": StreamingLLMPress,
    "kvzip:pool floor=0": lambda removed: KVzipPress(removed, layerwise=True),
    "kvzip:model floor=0": KVzipPress,
}
TOKENS, EXAMPLES = 700, 30  # as in make.py


def transformers_model(llm: LLM, checkpoint: str) -> LlamaForCausalLM:
    """The same weights in transformers' model."""
    model = LlamaForCausalLM(LlamaConfig(**settings(llm.config))).eval()
    model.load_state_dict(renamed(llm.config, llm.model.state_dict()))
    model.config.name_or_path = checkpoint  # KVzipPress takes the tokenizer from there
    return model


@torch.inference_mode()
def answer(model: LlamaForCausalLM, press: Any, encoded: Encoded, new_tokens: int, seen: bool) -> torch.Tensor:
    """Compress a text, with its question or before it, and go on greedily at the true positions."""
    context, question = encoded.context.view(1, -1), encoded.question.view(1, -1)
    if seen:
        context, question = torch.cat((context, question[:, :-1]), dim=1), question[:, -1:]
    cache = DynamicCache()
    with press(model):
        model(context, past_key_values=cache)
    position, tokens, found = context.size(1), question, []
    for _ in range(new_tokens):
        positions = torch.arange(position, position + tokens.size(1)).view(1, -1)
        logits = model(tokens, past_key_values=cache, position_ids=positions).logits[0, -1]
        position += tokens.size(1)
        tokens = logits.argmax().view(1, 1)
        found.append(int(tokens))
    return torch.tensor(found)


def ours(cells: Sequence[dict], cache: str, budget: str, question: str) -> list[float] | None:
    key = {"task": "needle", "tokens": TOKENS, "cache": cache, "budget": budget, "question": question}
    return next((c["scores"] for c in cells if all(c.get(k) == v for k, v in key.items())), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--every", type=int, default=3, help="ask every so manieth of the 30 questions")
    options = parser.parse_args()
    cells = json.loads((Path(__file__).parent / "smollm2-135m.json").read_text())["cells"]
    llm = LLM.load(options.checkpoint, accelerator="cpu")
    model = transformers_model(llm, options.checkpoint)

    def count(text: str) -> int:
        return len(llm.tokenizer.encode(text, bos=False))

    asked = examples("needle", EXAMPLES, TOKENS, count, 1, "prose")[:: options.every]
    encoded = Questions(llm, asked, 1).encoded
    print(f"kvpress {version('kvpress')}, {len(asked)} questions")
    print("| cache | kept | question | kvpress | litgpt_kv | the same answer is right |\n|---|---|---|---|---|---|")
    for name, make in PRESSES.items():
        for budget in ("50%", "25%"):
            for question in ("unseen", "seen"):
                scores = ours(cells, name, budget, question)
                if scores is None:  # kvzip does not look at the question
                    continue
                press = make(1 - float(budget.rstrip("%")) / 100)
                found = [
                    example.score(llm.decode(answer(model, press, e, example.new_tokens, question == "seen")))
                    for e, example in zip(encoded, asked)
                ]
                scores = scores[:: options.every]
                same = sum(a == b for a, b in zip(found, scores))
                print(
                    f"| {name} | {budget} | {question} | {sum(found) / len(found):.0%} | "
                    f"{sum(scores) / len(scores):.0%} | {same} of {len(found)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
