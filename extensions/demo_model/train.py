"""Trains the demo model. `--steps` and `--decay-from` end the run; both may be chosen while it is under way.

SIGTERM saves the state and stops; the same command (with another end, if wanted) goes on where it stopped.
"""

import argparse
import math
import os
import signal
import time
from pathlib import Path

import torch
from corpus import digest, read_modules, split
from data import IGNORED, Batches, held_out_windows, inputs_and_targets
from export import export
from torch.nn.functional import cross_entropy
from vocabulary import VOCABULARY, train_tokenizer

from litgpt import Config
from litgpt_kv import GPT

CONFIG = Config(
    name="litgpt-kv-demo",
    block_size=1024,
    n_layer=6,
    n_embd=192,
    n_head=6,
    n_query_groups=3,
    head_size=32,
    intermediate_size=512,
    vocab_size=VOCABULARY,
    padded_vocab_size=VOCABULARY,
    rotary_percentage=1.0,
    parallel_residual=False,
    bias=False,
    norm_class_name="RMSNorm",
    norm_eps=1e-5,
    mlp_class_name="LLaMAMLP",
    rope_base=10000,
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--decay-from", type=int, help="step from which the learning rates fall (default: 75%%)")
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4, help="windows of 1,024 tokens per step")
    parser.add_argument("--matrix-lr", type=float, default=4e-3, help="Muon, for the layers' matrices")
    parser.add_argument("--lr", type=float, default=5e-3, help="AdamW, for everything else")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--recall-weight", type=float, default=8.0, help="what a recalled value weighs in the loss")
    parser.add_argument("--recall-from", type=int, default=0, help="step from which it weighs that")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--work-dir", type=Path, default=Path("build/demo_model"))
    parser.add_argument("--out", type=Path, help="checkpoint folder to write at the end")
    return parser.parse_args()


def new_model(seed: int) -> GPT:
    torch.manual_seed(seed)
    model = GPT(CONFIG)
    model.apply(model._init_weights)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight") and "fc" not in name:  # what writes into the residual stream starts small
            torch.nn.init.normal_(weight, std=0.02 / math.sqrt(2 * CONFIG.n_layer))
    return model


def optimizers(model: GPT, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "transformer.h." in n]
    outer = [p for n, p in model.named_parameters() if p.ndim == 2 and "transformer.h." not in n]
    groups = [
        {"params": outer, "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if args.optimizer == "adamw":
        groups[0]["params"] = outer + inner
    adamw = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))
    muon = torch.optim.Muon(inner, lr=args.matrix_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    result = [adamw] if args.optimizer == "adamw" else [adamw, muon]
    for group in (group for optimizer in result for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    return result


def rate(step: int, warmup: int, decay_from: int, steps: int) -> float:
    """Warm-up, plateau, linear fall to zero: only the fall depends on where the run ends."""
    return min((step + 1) / warmup, 1.0, (steps - step) / max(steps - decay_from, 1))


def loss_of(model: GPT, windows: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    inputs, targets = inputs_and_targets(windows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs).float().flatten(0, 1)
    if weights is None:
        return cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
    losses = cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="none")
    return (losses * weights.flatten()).sum() / (targets != IGNORED).sum()


def save(state: dict, path: Path) -> None:
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    (args.work_dir / "train.pid").write_text(f"{os.getpid()}\n")
    decay_from = args.decay_from if args.decay_from is not None else args.steps * 3 // 4

    modules = read_modules()
    training, held_out = split(modules)
    tokenizer = train_tokenizer(module.text for module in training)
    batches = Batches([module.text for module in training], tokenizer, args.seed, args.batch_size)
    validation = held_out_windows([module.text for module in held_out], tokenizer)[:16]
    model = new_model(args.seed)
    optims = optimizers(model, args)
    print(f"corpus {digest(modules)}, {batches.tokens:,} tokens, {batches.steps_per_epoch} steps a pass,", end=" ")
    print(f"{sum(p.numel() for p in model.parameters()):,} weights", flush=True)

    state_path, first, spent = args.work_dir / "state.pth", 0, 0.0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        first, spent = state["step"], state["seconds"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optims, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        print(f"going on at step {first}", flush=True)

    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    begun, losses = time.monotonic(), []
    for step in range(first, args.steps):
        scale = rate(step, args.warmup, decay_from, args.steps)
        for optimizer in optims:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * scale
        windows, recalled = batches.at(step)
        weights = 1 + (args.recall_weight - 1) * recalled if step >= args.recall_from else None
        loss = loss_of(model, windows, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optims:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        losses.append(loss.item())
        done = step + 1
        if done % 25 == 0:
            speed = (done - first) * args.batch_size * 1024 / (time.monotonic() - begun)
            mean = sum(losses) / len(losses)
            print(f"step {done} loss {mean:.4f} rate {scale:.3f} {speed:,.0f} tokens/s", flush=True)
            losses = []
        if stopped or done == args.steps or done % args.save_every == 0:
            with torch.no_grad():
                print(f"step {done} held-out loss {loss_of(model, validation):.4f}", flush=True)
            seconds = spent + time.monotonic() - begun
            saved = [optimizer.state_dict() for optimizer in optims]
            save({"step": done, "seconds": seconds, "model": model.state_dict(), "optimizers": saved}, state_path)
            if stopped:
                return
    if args.out:
        export(model.state_dict(), CONFIG, tokenizer, args.out)
    print(f"done: {(spent + time.monotonic() - begun) / 3600:.2f} hours")


if __name__ == "__main__":
    main()
