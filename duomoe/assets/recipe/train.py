"""Train the embedded model inside a fixed amount of wall time and export it.

    python train.py --corpus ./corpus --out ./model --minutes 10

The box covers everything: reading and tokenising the corpus, compiling, training, the checkpoint and
a short evaluation.  The learning rate follows the clock rather than a step count, so it reaches zero
just as the time for training ends.  Runs on CUDA when there is a GPU, otherwise on the CPU.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from evaluate import bits_per_byte
from moe import MoeConfig, MoeModel, export
from tokenizers import Tokenizer
from torch import Tensor
from vocab import END_OF_TEXT, Tokens, encode, read_corpus, save_tokenizer, train_tokenizer

SEED = 1
DOMAIN_EXPONENT = 0.6  # a domain is sampled in proportion to its tokens to this power
LONG_CONTEXT_FROM = 0.85  # share of the training time after which windows are the full context long
WARM_UP = 0.01
DECAY_FROM = 0.35


class Windows:
    """Random windows of the training text, domain by domain, drawn on the device."""

    def __init__(self, domains: dict[str, Tokens], device: torch.device, seed: int) -> None:
        lengths = torch.tensor([len(tokens) for tokens in domains.values()], dtype=torch.float64)
        self.names = list(domains)
        self.tokens = torch.cat([torch.from_numpy(tokens.astype("int32")) for tokens in domains.values()]).to(device)
        self.lengths = lengths.to(device)
        self.starts = (lengths.cumsum(0) - lengths).to(device)
        weights = lengths**DOMAIN_EXPONENT
        self.weights = (weights / weights.sum()).to(device)
        self.generator = torch.Generator(device=device).manual_seed(seed)

    def draw(self, rows: int, length: int) -> Tensor:
        """``rows`` windows of ``length`` + 1 tokens."""
        device = self.tokens.device
        domain = torch.multinomial(self.weights, rows, replacement=True, generator=self.generator)
        uniform = torch.rand(rows, generator=self.generator, device=device, dtype=torch.float64)
        first = self.starts[domain] + (uniform * (self.lengths[domain] - length - 1).clamp(min=0)).floor()
        return self.tokens[first.long()[:, None] + torch.arange(length + 1, device=device)].long()


def orthogonalise(matrices: Tensor) -> Tensor:
    """Newton-Schulz iteration: push all singular values of each matrix (rows <= columns) towards 1."""
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    result: Tensor = x.float()
    return result


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, matrix by matrix; stacked experts are separate matrices.

    Matrices of equal shape are orthogonalised in one batch.  The update is scaled so that its typical
    element has the size that AdamW would give it, hence learning rates carry over.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], lr: float, momentum: float, decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": decay})
        self.orthogonalise: Callable[[Tensor], Tensor] = orthogonalise
        if parameters[0].is_cuda:
            self.orthogonalise = torch.compile(orthogonalise, dynamic=False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[torch.nn.Parameter, Tensor, bool]]] = {}
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                buffer: Tensor = state["momentum"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])  # Nesterov
                tall = update.shape[-2] > update.shape[-1]
                update = update.mT if tall else update
                update = update.reshape(-1, *update.shape[-2:])
                shapes.setdefault((update.shape[-2], update.shape[-1]), []).append((parameter, update, tall))
            for (rows, columns), members in shapes.items():
                updates = self.orthogonalise(torch.cat([update for _, update, _ in members]))
                sizes = [update.shape[0] for _, update, _ in members]
                scale = 0.2 * math.sqrt(max(rows, columns)) * group["lr"]
                for (parameter, _, tall), update in zip(members, torch.split(updates, sizes), strict=True):
                    update = (update.mT if tall else update).reshape(parameter.shape)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def make_optimisers(model: MoeModel, lr: float, muon: bool, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon for the attention and expert matrices, AdamW for embeddings, routers and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    vectors: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            vectors.append(parameter)
        elif "embed" in name or "router" in name or not muon:
            others.append(parameter)
        else:
            matrices.append(parameter)
    groups = [{"params": others, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.6 * lr, betas=(0.9, 0.95), eps=1e-10, fused=device.type == "cuda")
    optimisers: list[torch.optim.Optimizer] = [adam]
    if matrices:
        optimisers.append(Muon(matrices, lr=lr, momentum=0.95, decay=0.05))
    return optimisers


def rate(progress: float) -> float:
    """Share of the peak learning rate: short warm-up, plateau, linear decay to zero."""
    if progress < WARM_UP:
        return max(progress / WARM_UP, 0.02)
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - DECAY_FROM)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train and export the embedded model.")
    parser.add_argument("--corpus", type=Path, default=Path("corpus"))
    parser.add_argument("--out", type=Path, default=Path("model"))
    parser.add_argument("--minutes", type=float, default=10.0, help="wall time for everything")
    parser.add_argument("--reserve", type=float, default=25.0, help="seconds kept for checkpoint and evaluation")
    parser.add_argument("--batch-tokens", type=int, default=98_304)
    parser.add_argument("--length", type=int, default=1024, help="window length before the last, full-context phase")
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--optimiser", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--slice", type=int, default=0, help="use only this many characters a domain (for tests)")
    arguments = parser.parse_args()

    began = time.perf_counter()
    deadline = began + 60 * arguments.minutes
    log_lines: list[str] = []

    def log(line: str) -> None:
        log_lines.append(f"{time.perf_counter() - began:7.1f}s {line}")
        print(log_lines[-1], flush=True)

    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    texts = read_corpus(arguments.corpus, "train")
    heldout = read_corpus(arguments.corpus, "heldout")
    if arguments.slice:
        texts = {domain: text[: arguments.slice] for domain, text in texts.items()}
        heldout = {domain: text[: arguments.slice // 10] for domain, text in heldout.items()}
    log(f"corpus read: {sum(map(len, texts.values())):,} characters")
    if (out / "tokenizer.json").exists():
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(texts)
        save_tokenizer(tokenizer, out)
    windows = Windows({domain: encode(tokenizer, text) for domain, text in texts.items()}, device, SEED)
    log(f"tokenised: {len(windows.tokens):,} tokens")

    config = MoeConfig()
    model = MoeModel(config).to(device)
    optimisers = make_optimisers(model, arguments.lr, arguments.optimiser == "muon", device)
    peaks = [[group["lr"] for group in optimiser.param_groups] for optimiser in optimisers]
    loss_of: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] = model.loss
    if device.type == "cuda":
        loss_of = torch.compile(model.loss, dynamic=False)
    log(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters on {device.type}")

    def gradients(length: int) -> tuple[Tensor, Tensor]:
        batch = windows.draw(max(1, arguments.batch_tokens // length), length)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            total, entropy, loads = loss_of(batch)
        torch.autograd.backward(total)
        return entropy, loads

    for length in (arguments.length, config.context):
        gradients(length)
        for optimiser in optimisers:  # with a learning rate of zero: compiles, changes no weight
            for group in optimiser.param_groups:
                group["lr"] = 0.0
            optimiser.step()
        model.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        log(f"ready for windows of {length} tokens")

    started = logged = time.perf_counter()
    end = deadline - arguments.reserve
    step = tokens = tokens_logged = 0
    while (now := time.perf_counter()) < end:
        progress = (now - started) / (end - started)
        length = config.context if progress >= LONG_CONTEXT_FROM else arguments.length
        for optimiser, group_peaks in zip(optimisers, peaks, strict=True):
            for group, peak in zip(optimiser.param_groups, group_peaks, strict=True):
                group["lr"] = peak * rate(progress)
        entropy, loads = gradients(length)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
        model.zero_grad()
        step += 1
        tokens += max(1, arguments.batch_tokens // length) * length
        if step % 10 == 0 or device.type == "cpu":
            value = entropy.item()  # waits for the device, so that the clock stays honest
            now = time.perf_counter()
            if now - logged > 10 or now >= end:
                speed = (tokens - tokens_logged) / (now - logged)
                spread = f"expert share {loads.min().item():.4f}..{loads.max().item():.4f}"
                log(f"step {step} length {length} tokens {tokens:,} loss {value:.4f} {speed:,.0f} tokens/s {spread}")
                logged, tokens_logged = now, tokens
    seconds = time.perf_counter() - started
    export(model, out)
    log(f"trained {step} steps, {tokens:,} tokens in {seconds:.1f} s; exported")

    shares = dict(zip(windows.names, windows.weights.tolist(), strict=True))
    lengths = dict(zip(windows.names, windows.lengths.tolist(), strict=True))
    report = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "optimiser": arguments.optimiser,
        "peak_lr": arguments.lr,
        "batch_tokens": arguments.batch_tokens,
        "steps": step,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "corpus_tokens": {domain: int(length) for domain, length in lengths.items()},
        "epochs": {domain: round(shares[domain] * tokens / lengths[domain], 2) for domain in shares},
    }
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "training.log").write_text("\n".join(log_lines) + "\n")
    model.eval()
    scores: dict[str, float] = {}
    for domain, text in heldout.items():
        size = len(text.replace(END_OF_TEXT, "").encode())
        scores[domain], _ = bits_per_byte(model, encode(tokenizer, text), size, device)
        log(f"held-out {domain}: {scores[domain]:.4f} bits per byte")
    report["heldout_bits_per_byte"] = scores
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "training.log").write_text("\n".join(log_lines) + "\n")


if __name__ == "__main__":
    main()
