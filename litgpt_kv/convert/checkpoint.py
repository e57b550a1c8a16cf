"""From a GGUF file to a checkpoint folder in litgpt's layout."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer

from litgpt.config import Config
from litgpt.prompts import Default, PromptStyle
from litgpt.utils import save_config
from litgpt_kv.convert.configs import architecture, config_of
from litgpt_kv.convert.gguf_file import GGUFFile
from litgpt_kv.convert.templates import style_of
from litgpt_kv.convert.tokenizer import Vocabulary, tokenizer_of
from litgpt_kv.convert.weights import Source, choose_dtype, plan_weights, write_weights
from litgpt_kv.llm.chat import later_turn
from litgpt_kv.llm.safe_load import one_line
from litgpt_kv.llm.turns import Turns


@dataclass(frozen=True)
class Converted:
    """What was made. style: the name of the prompt style; note: what the user should know of it, None if nothing."""

    folder: Path
    config: Config
    dtype: torch.dtype
    weight_bytes: int
    style: str
    note: str | None


def convert(path: str | Path, out: str | Path, dtype: str | None = None) -> Converted:
    """Write the checkpoint of a GGUF file, whole or not at all.

    Args:
        path: The file.
        out: The folder to make; it must not exist, or be empty.
        dtype: Of the weights: "float32", "bfloat16" or "float16". None: the file's own 16 bits if all its matrices are
            of one such type, else float32, which holds every quantised number exactly.

    Raises:
        ValueError: If the file is damaged, or not one that litgpt's models can be made of; the message names it. If
            `out` cannot be written.
    """
    file = GGUFFile(path)
    kind = choose_dtype(file, dtype)
    target = check_folder(out)
    read = _read(file)
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir()
        _write_tokenizer(temporary, file, read)
        save_config(read.config, temporary)
        try:
            size = write_weights(file, read.arch, read.config, read.plan, temporary / "lit_model.pth", kind)
        except ValueError as error:
            raise _refused(file, error) from error
        if target.is_dir():
            target.rmdir()  # it is empty
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch's file writer raises RuntimeError for a full disk
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"{out} cannot be written: {reason}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Converted(target, read.config, kind, size, type(read.style).__name__, read.note)


def check_folder(out: str | Path) -> Path:
    """The folder to write, with symbolic links followed.

    Raises:
        ValueError: If it has something in it, or cannot be made.
    """
    try:
        target = Path(os.path.realpath(out))
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{out} is there already: remove it, or choose another folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{str(out)!r:.300} cannot be written: {error.strerror}.") from error
    return target


def _refused(file: GGUFFile, error: Exception) -> ValueError:
    return ValueError(f"{file} cannot be converted: {one_line(error, 400).rstrip('.')}.")


@dataclass(frozen=True)
class _Read:
    """What a file's metadata make."""

    arch: str
    config: Config
    plan: dict[str, list[Source]]
    vocabulary: Vocabulary
    tokenizer: Tokenizer
    style: PromptStyle
    note: str | None


def _read(file: GGUFFile) -> _Read:
    try:
        arch, config = architecture(file), config_of(file)
        plan, vocabulary = plan_weights(file, arch, config), Vocabulary.of(file)
        return _Read(arch, config, plan, vocabulary, tokenizer_of(file, vocabulary), *_style(file, vocabulary))
    except (ValueError, OverflowError) as error:
        raise _refused(file, error) from error


def _style(file: GGUFFile, vocabulary: Vocabulary) -> tuple[PromptStyle, str | None]:
    template = file.get("tokenizer.chat_template", str)
    if not template:
        return Default(), "It has no chat template: prompts are continued as they are."
    try:
        style, exact = style_of(template, vocabulary.text(vocabulary.begin), vocabulary.text(vocabulary.end))
    except ValueError as error:
        return Default(), f"Prompts are continued as they are: {one_line(error)}."
    note = "The chat template does more than to put texts around messages; some conversations will differ from it."
    return style, None if exact else note


def turn_end(vocabulary: Vocabulary, tokenizer: Tokenizer, style: PromptStyle) -> int | None:
    """The token that ends a reply: the file's, else the one that the style has after a reply, else the end of text."""
    if vocabulary.turn_end is not None:
        return vocabulary.turn_end
    if not isinstance(style, Default):
        after = tokenizer.encode(later_turn(style, "?").strip(), add_special_tokens=False).ids[:1]
        special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        if after and after[0] in special and after[0] != vocabulary.begin:
            return after[0]
    return vocabulary.end


def _write_tokenizer(folder: Path, file: GGUFFile, read: _Read) -> None:
    vocabulary, style = read.vocabulary, read.style
    read.tokenizer.save(str(folder / "tokenizer.json"))
    end = turn_end(vocabulary, read.tokenizer, style)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": vocabulary.text(vocabulary.begin) or None,
        "eos_token": vocabulary.text(end) or None,
        "unk_token": vocabulary.text(vocabulary.unknown) or None,
        "add_bos_token": vocabulary.add_begin,
        "clean_up_tokenization_spaces": False,
        "model_max_length": read.config.block_size,
    }
    if template := file.get("tokenizer.chat_template", str):
        settings["chat_template"] = template
    _write_json(folder / "tokenizer_config.json", settings)
    ends = list(dict.fromkeys(id for id in (end, vocabulary.end) if id is not None))
    generation = {"bos_token_id": vocabulary.begin, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    _write_json(folder / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
    named = {"class_path": f"{type(style).__module__}.{type(style).__name__}"}
    if isinstance(style, Turns):
        named["turns"] = style.data()
    (folder / "prompt_style.yaml").write_text(yaml.safe_dump(named, allow_unicode=True), encoding="utf-8")


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
