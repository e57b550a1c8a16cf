"""Examples at the end of each command's help. `tests/cli/test_help.py` runs them.

Each is the command line without `litgpt_kv`, and what it does. The help of the program shows the first ones of some.
"""

from __future__ import annotations

EXAMPLES: dict[str, list[tuple[str, str]]] = {
    "generate": [
        ('generate demo --prompt "def fib("', "the shipped model, every token kept"),
        (
            'generate demo --kv-cache h2o --kv-cache.budget 128 --prompt "def " --max-new-tokens 200',
            "a cache of 128 tokens",
        ),
        ('generate demo --prompt "import os" --prompt "class A:"', "two prompts in one batch"),
        (
            "generate demo --prompts config_hub/prompts.jsonl --out answers.jsonl",
            "a file of prompts; --resume continues it",
        ),
        ('generate demo --prompt "def f(x):" --json', "text and statistics as one JSON object"),
        ("generate demo --config config_hub/generate/sink.yaml", "options from a file"),
    ],
    "chat": [
        ("chat demo --kv-cache sink --kv-cache.budget 512", "a conversation of any length in a small cache"),
        ("chat demo --kv-cache h2o --kv-cache.budget 100 --max-new-tokens 40", "short replies"),
    ],
    "serve": [
        ("serve demo --kv-cache h2o --kv-cache.budget 25% --port 8000", "an OpenAI-compatible server"),
        ('serve demo --caches "{small: {strategy: h2o, budget: 64}}"', "a second cache, which requests may name"),
    ],
    "strategies": [
        ("strategies", "all strategies"),
        ("strategies h2o", "all about one of them"),
    ],
    "plan": [
        ("plan Llama-3.1-8B --devices 2 --memory 24", "memory on one and two devices, computed"),
        ("plan demo --kv-cache sink --kv-cache.budget 64", "a checkpoint, another cache"),
    ],
    "evaluate": [
        ('evaluate demo --text prose --tasks "[]" --out results', "a text, token by token, beside a full cache"),
        (
            'evaluate demo --strategies "[h2o, sink]" --budgets "[25%]" --examples 4 --lengths "[200]"',
            "questions about short texts",
        ),
    ],
    "inspect": [
        (
            'inspect demo --kv-cache h2o --kv-cache.budget 25% --prompt "def fib(n):" --out fib.html',
            "a page that shows which tokens stay",
        ),
    ],
    "recommend": [
        ("recommend demo --context 1k --batch-size 8 --memory 1GB --text prose", "three caches to choose from"),
    ],
    "benchmark": [
        (
            'benchmark --contexts "[1024]" --strategies "[dense, h2o]" --budget 25%',
            "speed of two caches and of litgpt's",
        ),
        (
            "benchmark --peers litgpt,transformers,llama.cpp,openvino --plot costs.png",
            "other libraries in the same run, and a picture",
        ),
    ],
    "benchmark_batches": [("benchmark_batches --rows 8", "batches against rows that take the next prompt")],
    "benchmark_weights": [("benchmark_weights --steps 16", "speed and divergence of int8 weights")],
    "benchmark_serve": [("benchmark_serve --clients 8", "a server under load")],
    "calibrate": [("calibrate demo --text README.md --out demo.safetensors", "a file for the strategy triattention")],
    "download": [("download EleutherAI/pythia-160m", "weights from the Hugging Face Hub")],
    "convert_gguf": [("convert_gguf model.gguf --out checkpoints/model", "a GGUF file that is on this machine")],
    "convert_to_litgpt": [("convert_to_litgpt checkpoints/EleutherAI/pythia-160m", "a Hugging Face folder")],
    "convert_from_litgpt": [("convert_from_litgpt checkpoints/model out", "weights with Hugging Face's names")],
    "merge_lora": [("merge_lora out/finetuned", "LoRA weights into the model's")],
}
