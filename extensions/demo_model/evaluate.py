"""What a checkpoint reaches on the held-out modules, and how often it recalls what stood hundreds of tokens before.

All by litgpt's own loader and tokenizer and whole forward passes: no cache has a part in these figures.
"""

import argparse
import math
import random
from pathlib import Path

import torch
from corpus import digest, read_modules, split
from data import IGNORED, WINDOW, held_out_windows, inputs_and_targets
from recall import make_document
from torch import Tensor
from torch.nn.functional import cross_entropy

from litgpt import GPT, Config, Tokenizer

FAR = 300  # tokens between a definition and its use
PROMPTS = (
    "def ",
    "class Stack:",
    "import os\nimport sys\n\n\ndef main():",
    '    def __init__(self, name, value=None):\n        """',
)


def load(folder: Path) -> GPT:
    model = GPT(Config.from_file(folder / "model_config.yaml"))
    model.load_state_dict(torch.load(folder / "lit_model.pth", weights_only=True, mmap=True))
    return model.float().eval()


@torch.inference_mode()
def held_out_loss(model: GPT, tokenizer: Tokenizer, texts: list[str]) -> tuple[float, float, int]:
    """(nats per token, bits per byte, tokens)"""
    total, count = 0.0, 0
    for windows in held_out_windows(texts, tokenizer.processor).split(4):
        inputs, targets = inputs_and_targets(windows)
        total += cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum").item()
        count += int((targets != IGNORED).sum())
    return total / count, total / math.log(2) / sum(len(text.encode()) for text in texts), count


@torch.inference_mode()
def recall(model: GPT, tokenizer: Tokenizer, texts: list[str], documents: int, kept: int | None) -> tuple[float, int]:
    """Share of the far values whose every token is the likeliest one, and their number.

    With `kept`, the text between the start token and the `kept` last tokens before a value is left out.
    """
    rng = random.Random("held out")
    right, asked = 0, 0
    for _ in range(documents):
        document = make_document(rng, texts, tokenizer.processor, WINDOW + 1)
        ids = torch.tensor(document.ids)
        best = model(ids[None, :-1])[0].argmax(-1) if kept is None else None
        for first, end, distance in document.answers:
            if distance <= FAR:
                continue
            if best is not None:
                guess = best[first - 1 : end - 1]
            else:
                cut = torch.cat((ids[:1], ids[first - kept : end - 1]))
                guess = model(cut[None])[0, -(end - first) :].argmax(-1)
            right += int(torch.equal(guess, ids[first:end]))
            asked += 1
    return right / asked, asked


@torch.inference_mode()
def sample(model: GPT, prompt: Tensor, count: int, temperature: float, top_k: int, seed: int) -> Tensor:
    """Greedy where the temperature is 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = prompt.long()
    for _ in range(count):
        logits = model(ids[None, -WINDOW:])[0, -1]
        if temperature:
            values, indices = logits.topk(top_k)
            choice = torch.multinomial(torch.softmax(values / temperature, -1), 1, generator=generator)
            ids = torch.cat((ids, indices[choice]))
        else:
            ids = torch.cat((ids, logits.argmax(-1, keepdim=True)))
    return ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--documents", type=int, default=40, help="long-range documents made from held-out modules")
    parser.add_argument("--samples", type=int, default=0, help="tokens to print after each prompt")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model, tokenizer = load(args.checkpoint), Tokenizer(args.checkpoint)
    modules = read_modules()
    texts = [module.text for module in split(modules)[1]]
    size = sum(file.stat().st_size for file in args.checkpoint.iterdir() if file.is_file())
    weights = sum(p.numel() for p in model.parameters())
    print(f"{weights:,} weights, {size:,} bytes in all; corpus {digest(modules)}")
    loss, bits, count = held_out_loss(model, tokenizer, texts)
    print(f"held-out modules: {loss:.4f} nats per token, {bits:.4f} bits per byte, {count:,} tokens")
    for kept in (None, 256):
        share, asked = recall(model, tokenizer, texts, args.documents, kept)
        seen = "all text" if kept is None else f"the start token and the last {kept} tokens"
        print(f"values defined more than {FAR} tokens before, seeing {seen}: {share:.1%} of {asked} recalled")
    for prompt in PROMPTS if args.samples else ():
        for temperature in (0.0, 0.8):
            ids = sample(model, tokenizer.encode(prompt), args.samples, temperature, 50, args.seed)
            print(f"\n--- {'greedy' if not temperature else 'temperature 0.8, top-k 50'}\n{tokenizer.decode(ids)}")


if __name__ == "__main__":
    main()
