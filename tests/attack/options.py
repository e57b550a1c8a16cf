"""Command lines with random options: any value for any option, alone and together."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.attack.harness import Case, command

COUNT = 600
ODD = [
    *("", " ", "0", "-0", "-1", "1", "2", "3", "7.5", "1e3", "1e400", "-1e400", "nan", "inf", "null", "none", "None"),
    *("true", "false", "[]", "[1]", "[[1]]", "{}", "{a: 1}", '{"a": [1]}', "[h2o, sink]", "0x10", "1_000", "٣", "½"),
    *("é🙂", "\udcff", "\x1b[31mred", "a\nb", "'", '"', "*", "&a [*a]", "!!int 3", "!!python/name:os.abort", "#"),
    *("---", "-", "--", "=", "~", "/", "/dev/null", "/dev/zero", ".", "1000000", "1000000000", "[" * 2000),
    *("9" * 20, "-" + "9" * 20, "9" * 400, "-" + "9" * 400, "9" * 5000, "x" * 100_000),
    *(str(2**31), str(2**63 - 1), str(2**63), str(2**64)),
]
CACHE = {
    "--kv-cache": ["dense", "window", "sink", "h2o", "none", "nope"],
    "--kv-cache.budget": ["1", "4", "64", "20%", "100%", "0%", "[16, 16, 16, 16, 16, 16]", "1025", "%", "1e1%"],
    "--kv-cache.sinks": ["0", "1", "4", "63"],
    "--kv-cache.recent": ["0", "1", "4", "63"],
    "--kv-cache.storage": ["plain", "[plain]"],
    "--kv-cache.positions": ["absolute", "cache"],
    "--kv-cache.options": ["{}", "{a: 1}"],
    "--kv-cache.window": ["1"],
}
SAMPLING = {
    "--temperature": ["0", "0.7", "1", "100"],
    "--top-k": ["1", "50", "null", "100000"],
    "--top-p": ["0", "0.5", "1"],
    "--repetition-penalty": ["0.01", "1", "100"],
    "--seed": ["0", "1"],
    "--stop": ["x", "return"],
}
DEVICE = {
    "--precision": ["32-true", "bf16-true", "16-true", "64-true", "bf16-mixed"],
    "--accelerator": ["cpu", "auto", "cuda", "tpu"],
    "--threads": ["1", "2"],
    "--quantize": ["int8", "bnb.nf4", "bnb.int8"],
}
GENERATE = {
    **CACHE,
    **SAMPLING,
    **DEVICE,
    "--prompt": ["def ", "import os", "x" * 3000],
    "--prompts": ["{}/q.jsonl", "{}/q.txt", "{}", "{}/none"],
    "--out": ["{}/a.jsonl", "{}", "{}/none/a"],
    "--resume": ["true", "false"],
    "--batch-size": ["1", "2", "64"],
    "--sys-prompt": ["be kind"],
    "--num-samples": ["1", "2"],
    "--min-new-tokens": ["0", "1", "2"],
    "--logprobs": ["true"],
    "--prefill": ["min-length", "full"],
    "--prefill-chunk": ["1", "3", "128"],
    "--ignore-eos": ["true"],
    "--devices": ["1", "auto"],
    "--num-nodes": ["1"],
    "--generate-strategy": ["sequential", "nope"],
    "--config": ["{}/config.yaml", "config_hub/generate/h2o.yaml"],
}
CHAT = {**CACHE, **SAMPLING, **DEVICE, "--max-tokens": ["1", "100", "2000"], "--multiline": ["true"]}
PLAN = {
    **CACHE,
    "--devices": ["1", "8"],
    "--memory": ["1", "80"],
    "--context": ["1", "4096"],
    "--batch-size": ["1", "64"],
    "--precision": ["bf16-true", "32-true"],
}
COMMANDS: Sequence[tuple[int, list[str], dict[str, list[str]]]] = [  # how often, what it begins with, its options
    (14, ["generate", "demo", "--max-new-tokens", "2", "--accelerator", "cpu"], GENERATE),
    (2, ["chat", "demo", "--max-new-tokens", "2", "--accelerator", "cpu"], CHAT),
    (3, ["plan", "pythia-14m"], PLAN),
    (1, ["strategies"], PLAN),
]


def words(rng: random.Random) -> list[str]:
    """A random command line: most options with values of their own, some with any value, some without one."""
    _, begin, options = rng.choices(COMMANDS, [weight for weight, _, _ in COMMANDS])[0]
    out = list(begin)
    for name in rng.sample(list(options), rng.randrange(1, 7)):
        value = rng.choice(ODD if rng.random() < 0.15 else options[name])
        form = rng.random()
        out += [name] if form < 0.04 else [f"{name}={value}"] if form < 0.5 else [name, value]
    if rng.random() < 0.04:
        out.insert(rng.randrange(len(out)), rng.choice(ODD))
    return out


def case(line: list[str]) -> Case:
    def act(folder: Path) -> None:
        (folder / "q.jsonl").write_text('{"prompt": "def a"}\n{"prompt": "def b", "seed": 3}\n')
        (folder / "q.txt").write_text("def a\ndef b\n")
        (folder / "config.yaml").write_text("kv_cache: {strategy: sink, budget: 32}\n")
        command(*line)(folder)

    return Case(" ".join(line).encode("unicode_escape").decode()[:300], act)


def cases(seed: int) -> Iterator[Case]:
    rng = random.Random(seed)
    for _ in range(COUNT):
        yield case(words(rng))
