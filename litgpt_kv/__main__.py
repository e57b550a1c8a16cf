"""`litgpt_kv`, or `python -m litgpt_kv`."""

from litgpt_kv.cli.interrupts import QuietInterrupts

with QuietInterrupts():
    from litgpt_kv.cli.commands import Commands, Entry

RUN, MEASURE, CONVERT = "Generate text", "Choose and measure caches", "Get and convert checkpoints"
COMMANDS = Commands(
    {
        "generate": Entry("litgpt_kv.cli.generate:generate", "Continue a prompt, a batch, or a file of prompts", RUN),
        "chat": Entry("litgpt_kv.cli.chat:chat", "Chat with a model; the cache stays between turns", RUN),
        "serve": Entry("litgpt_kv.cli.serve:serve", "Answer HTTP requests in OpenAI's form", RUN),
        "strategies": Entry("litgpt_kv.cli.strategies:strategies", "List the strategies for --kv-cache", MEASURE),
        "plan": Entry("litgpt_kv.cli.plan:plan", "Compute the memory of a model and its cache", MEASURE),
        "evaluate": Entry("litgpt_kv.cli.evaluate:evaluate", "Measure what caches cost in quality", MEASURE),
        "inspect": Entry("litgpt_kv.cli.inspect:inspect", "Show which tokens caches keep, as an HTML page", MEASURE),
        "recommend": Entry("litgpt_kv.cli.recommend:recommend", "Choose a cache that fits into memory", MEASURE),
        "benchmark": Entry("litgpt_kv.benchmark.decode:benchmark", "Measure speed and memory of caches", MEASURE),
        "benchmark_batches": Entry(
            "litgpt_kv.benchmark.batches:benchmark_batches", "Measure the speed of many prompts", MEASURE
        ),
        "benchmark_serve": Entry("litgpt_kv.benchmark.serve:benchmark_serve", "Measure a server", MEASURE),
        "benchmark_weights": Entry(
            "litgpt_kv.benchmark.weights:benchmark_weights", "Measure weights of fewer bits", MEASURE
        ),
        "calibrate": Entry("litgpt_kv.cli.calibrate:calibrate", "Compute the calibration file of a strategy", MEASURE),
        # litgpt's own, but for the check of what is converted
        "download": Entry(
            "litgpt.scripts.download:download_from_hub", "Fetch a checkpoint from the Hugging Face Hub", CONVERT
        ),
        "convert_to_litgpt": Entry(
            "litgpt_kv.cli.convert_to_litgpt:convert_to_litgpt", "Convert a Hugging Face folder", CONVERT
        ),
        "convert_from_litgpt": Entry(
            "litgpt.scripts.convert_lit_checkpoint:convert_lit_checkpoint", "Convert back to Hugging Face", CONVERT
        ),
        "convert_gguf": Entry("litgpt_kv.cli.convert_gguf:convert_gguf", "Convert a GGUF file", CONVERT),
        "merge_lora": Entry("litgpt.scripts.merge_lora:merge_lora", "Merge LoRA weights into a checkpoint", CONVERT),
    }
)
DESCRIPTION = "Key/value caches for litgpt's models. litgpt_kv COMMAND --help shows the options of a command."


def main(args: list[str] | None = None) -> None:
    """Run a command."""
    with QuietInterrupts():
        from litgpt_kv.cli.parser import one_line_errors, parse
    with one_line_errors():
        command, arguments = parse(COMMANDS, DESCRIPTION, args)
        command(**arguments)


if __name__ == "__main__":
    main()
