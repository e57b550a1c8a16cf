"""A model of Llama's architecture as a stateful OpenVINO model, from a plain form of it in PyTorch.

B rows · T new tokens · N tokens in all · H query heads · G key/value heads · D head size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer as TextTokenizer
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor, nn

from litgpt.config import Config
from litgpt_kv.benchmark.peers import llama

EXAMPLE = (2, 3)  # of the example that is traced: B and T


class PlainLlama(nn.Module):
    """Llama with the cache as arguments and results, in the operations that OpenVINO's converter knows.

    Args:
        config: Of the model. state: Its parameters, by litgpt's names.
    """

    def __init__(self, config: Config, state: dict[str, Tensor]) -> None:
        super().__init__()
        llama.check_llama(config)
        self.config = config
        self.weights = {name: weight.detach() for name, weight in state.items()}
        steps = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
        self.register_buffer("frequencies", 1.0 / config.rope_base**steps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> list[Tensor]:
        """Return the logits (B, 1, V) after the last token, and keys and values (B, G, N, D) of each layer.

        Args:
            input_ids: (B, T) int64. attention_mask: (B, N) int64, 0 for padding. position_ids: (B, T) int64.
            past: Keys and values (B, G, N - T, D) of each layer.
        """
        angles = position_ids.unsqueeze(-1).float() * self.frequencies  # (B, T, D / 2)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
        rotary = angles.cos(), angles.sin()
        T, N = input_ids.shape[1], attention_mask.shape[1]
        seen = torch.arange(N).unsqueeze(0) <= torch.arange(N - T, N).unsqueeze(1)  # (T, N)
        mask = seen.unsqueeze(0).unsqueeze(0) & (attention_mask != 0).unsqueeze(1).unsqueeze(1)
        x = F.embedding(input_ids, self.weights["transformer.wte.weight"])
        present: list[Tensor] = []
        for layer in range(self.config.n_layer):
            name = f"transformer.h.{layer}."
            attended, key, value = self._attend(name, x, rotary, mask, past[2 * layer], past[2 * layer + 1])
            present += [key, value]
            x = x + attended
            h = self._norm(f"{name}norm_2", x)
            gate, up = (F.linear(h, self.weights[f"{name}mlp.fc_{i}.weight"]) for i in (1, 2))
            x = x + F.linear(F.silu(gate) * up, self.weights[f"{name}mlp.proj.weight"])
        logits = F.linear(self._norm("transformer.ln_f", x[:, -1:]), self.weights["lm_head.weight"])
        return [logits, *present]

    def _attend(
        self, name: str, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        H, G, D = config.n_head, config.n_query_groups, config.head_size
        h = self._norm(f"{name}norm_1", x)
        parts = self.weights[f"{name}attn.qkv.weight"].split((H * D, G * D, G * D))
        q, k, v = (
            F.linear(h, part).reshape(h.shape[0], -1, heads, D).transpose(1, 2) for part, heads in zip(parts, (H, G, G))
        )
        q, k = _rotate(q, *rotary), _rotate(k, *rotary)
        keys, values = torch.cat((keys, k), dim=2), torch.cat((values, v), dim=2)
        y = F.scaled_dot_product_attention(q, _repeat(keys, H // G), _repeat(values, H // G), attn_mask=mask)
        y = y.transpose(1, 2).reshape(h.shape[0], -1, H * D)
        return F.linear(y, self.weights[f"{name}attn.proj.weight"]), keys, values

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.config.norm_eps)
        return self.weights[f"{name}.weight"] * (x * scale)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


def _repeat(x: Tensor, times: int) -> Tensor:
    """(B, G, N, D) to (B, G * times, N, D), each head `times` times side by side."""
    if times == 1:
        return x
    B, G, N, D = x.shape
    return x.unsqueeze(2).expand(B, G, times, N, D).reshape(B, G * times, N, D)


def stateful_model(config: Config, state: dict[str, Tensor]) -> Any:
    """Convert a model; it keeps its cache itself, and an input `beam_idx` (B,) int32 says which row goes on with which.

    Args:
        config: Of the model. state: Its parameters in float32, by litgpt's names.

    Returns:
        An `openvino.Model` with the inputs input_ids, attention_mask, position_ids, beam_idx, and the output logits.
    """
    import openvino
    from openvino import opset13
    from openvino._offline_transformations import apply_make_stateful_transformation

    B, T = EXAMPLE
    cache = (B, config.n_query_groups, T, config.head_size)
    past = [torch.zeros(cache) for _ in range(2 * config.n_layer)]
    ids = torch.zeros(B, T, dtype=torch.int64)
    example = (ids, torch.ones(B, 2 * T, dtype=torch.int64), ids, *past)
    with torch.no_grad():
        model = openvino.convert_model(PlainLlama(config, state).eval(), example_input=example)
    names = [f"{part}.{layer}.{kind}" for part in ("past", "present") for layer in range(config.n_layer)
             for kind in ("key", "value")]  # fmt: skip
    inputs = ["input_ids", "attention_mask", "position_ids", *names[: len(past)]]
    for port, name in zip(model.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
    for port, name in zip(model.outputs, ["logits", *names[len(past) :]], strict=True):
        port.get_tensor().set_names({name})
    for parameter, name in zip(model.get_parameters(), inputs):
        shape = [-1, -1] if not name.startswith("past") else [-1, config.n_query_groups, -1, config.head_size]
        parameter.set_partial_shape(openvino.PartialShape(shape))
    rows = opset13.parameter(openvino.PartialShape([-1]), openvino.Type.i32, name="beam_idx")
    rows.output(0).get_tensor().set_names({"beam_idx"})
    model.add_parameters([rows])
    for parameter in list(model.get_parameters()):
        if parameter.output(0).get_any_name().startswith("past"):
            readers = parameter.output(0).get_target_inputs()
            gathered = opset13.gather(parameter, rows, opset13.constant(0, dtype="int64"))
            for reader in readers:
                reader.replace_source_output(gathered.output(0))
    model.validate_nodes_and_infer_types()
    half = len(past)
    apply_make_stateful_transformation(model, dict(zip(names[:half], names[half:])))
    first = opset13.shape_of(model.input("input_ids"), output_type="i64")
    batch = opset13.gather(first, opset13.constant([0]), opset13.constant(0))
    rest = opset13.constant([config.n_query_groups, 0, config.head_size])
    empty = opset13.broadcast(opset13.constant(0.0, dtype="float32"), opset13.concat([batch, rest], 0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            node.set_arguments([empty])  # what a new text begins with; without it the CPU plugin cannot compile
    model.validate_nodes_and_infer_types()
    return model


def save_folder(config: Config, state: dict[str, Tensor], folder: Path) -> None:
    """Write a model and a tokenizer, which GenAI wants to have although tokens are passed as numbers.

    Args:
        config: Of the model. state: Its parameters in float32, by litgpt's names. folder: An empty folder.
    """
    import openvino
    import openvino_tokenizers
    from transformers import PreTrainedTokenizerFast

    openvino.save_model(stateful_model(config, state), folder / "openvino_model.xml", compress_to_fp16=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = TextTokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0])
    both = openvino_tokenizers.convert_tokenizer(fast, with_detokenizer=True)
    for made, name in zip(both, ("tokenizer", "detokenizer"), strict=True):
        openvino.save_model(made, folder / f"openvino_{name}.xml")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 0}))
