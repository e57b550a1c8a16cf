"""Writes a training state as a litgpt checkpoint folder. Run it during training to look at what there is so far."""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from vocabulary import save_tokenizer

from litgpt import Config
from litgpt.utils import save_config

NOTE = Path(__file__).with_name("checkpoint_note.md")


def export(weights: dict[str, Tensor], config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    """Each file appears whole or not at all, the weights last; other files of the folder stay."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as name:
        new = Path(name)
        save_tokenizer(tokenizer, new)
        save_config(config, new)
        shutil.copyfile(NOTE, new / "README.md")
        contiguous = {key: value.detach().to(torch.bfloat16).contiguous().clone() for key, value in weights.items()}
        torch.save(contiguous, new / "lit_model.pth")
        for file in sorted(new.iterdir(), key=lambda file: file.suffix == ".pth"):
            file.replace(folder / file.name)


def main() -> None:
    from corpus import read_modules, split
    from train import CONFIG
    from vocabulary import train_tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--work-dir", type=Path, default=Path("build/demo_model"))
    args = parser.parse_args()
    state = torch.load(args.work_dir / "state.pth", weights_only=True)
    training, _ = split(read_modules())
    export(state["model"], CONFIG, train_tokenizer(module.text for module in training), args.out)
    print(f"step {state['step']} written to {args.out}")


if __name__ == "__main__":
    main()
