"""`litgpt_kv`, or `python -m litgpt_kv`."""

from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.scripts.download import download_from_hub
from litgpt.scripts.merge_lora import merge_lora
from litgpt_kv.benchmark.batches import benchmark_batches
from litgpt_kv.benchmark.decode import benchmark
from litgpt_kv.benchmark.serve import benchmark_serve
from litgpt_kv.benchmark.weights import benchmark_weights
from litgpt_kv.cli.calibrate import calibrate
from litgpt_kv.cli.chat import chat
from litgpt_kv.cli.convert_gguf import convert_gguf
from litgpt_kv.cli.evaluate import evaluate
from litgpt_kv.cli.generate import generate
from litgpt_kv.cli.parser import one_line_errors, parse
from litgpt_kv.cli.plan import plan
from litgpt_kv.cli.serve import serve
from litgpt_kv.cli.strategies import strategies

COMMANDS = {
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "strategies": strategies,
    "plan": plan,
    "evaluate": evaluate,
    "benchmark": benchmark,
    "benchmark_batches": benchmark_batches,
    "calibrate": calibrate,
    "convert_gguf": convert_gguf,
    "benchmark_serve": benchmark_serve,
    "benchmark_weights": benchmark_weights,
}
COMMANDS |= {  # litgpt's own commands, unchanged
    "download": download_from_hub,
    "convert_to_litgpt": convert_hf_checkpoint,
    "convert_from_litgpt": convert_lit_checkpoint,
    "merge_lora": merge_lora,
}
DESCRIPTION = """Key/value caches for litgpt's models.

  litgpt_kv generate demo --prompt "def fib("                                  the shipped model, every token kept
  litgpt_kv generate demo --kv-cache h2o --kv-cache.budget 128 --prompt "def " another cache
  litgpt_kv generate demo --prompt "import os" --prompt "class A:"             a batch
  litgpt_kv generate demo --prompts questions.jsonl --out answers.jsonl        a file of prompts
  litgpt_kv chat demo --kv-cache sink --kv-cache.budget 512                    a conversation, as long as you like
  litgpt_kv serve demo --kv-cache h2o --kv-cache.budget 25% --port 8000        an OpenAI-compatible server
  litgpt_kv generate demo --config config_hub/generate/sink.yaml               options from a file
  litgpt_kv generate demo --devices 2 --accelerator cpu --generate-strategy tensor_parallel
  litgpt_kv evaluate demo --text prose --tasks "[]" --out results              what caches cost in quality
  litgpt_kv plan Llama-3.1-70B --devices 8                                     memory a device, computed
  litgpt_kv strategies                                                         the strategies for --kv-cache
  litgpt_kv generate --kv-cache.help h2o                                       all about one of them
  litgpt_kv generate --help                                                    a command's options
  litgpt_kv download EleutherAI/pythia-160m                                    weights from the Hugging Face Hub
  litgpt_kv convert_gguf model.gguf --out checkpoints/model                    a GGUF file that is on this machine
  litgpt_kv convert_to_litgpt FOLDER --model_name pythia-160m                  weights that are on this machine
"""


def main(args: list[str] | None = None) -> None:
    """Run a command."""
    with one_line_errors():
        command, arguments = parse(COMMANDS, DESCRIPTION, args)
        command(**arguments)


if __name__ == "__main__":
    main()
