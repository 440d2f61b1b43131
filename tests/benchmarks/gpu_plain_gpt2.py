"""A GPT-2 in plain PyTorch as the public reproductions train it, timed: what hptool's worker is compared with.

    python -m tests.benchmarks.gpu_plain_gpt2 OUTPUT.json '{"mbs": [64, 32, 16], "gbs": 256, ...}'

Pre-norm blocks, causal `scaled_dot_product_attention`, tied embeddings, the vocabulary padded to a multiple of 128;
fp32 weights under bf16 autocast, TF32 for what is left in fp32, torch.compile, fused AdamW, gradients clipped at 1:
as in github.com/karpathy/build-nanogpt. The tokens are those that hptool's worker trains on. One line of the output
file, a JSON object, for each micro batch, as soon as it is known.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional

from hptool import files, timing

#: Betas, decay and clipping of the public reproduction; hptool's preset has the same.
_BETAS, _DECAY, _CLIP, _RATE = (0.9, 0.95), 0.1, 1.0, 6e-4

#: Of weights before training; residual projections have it less by the root of twice the layers (Radford et al. 2019).
_STD = 0.02

#: The vocabulary is padded to a multiple of this: 50257 to 50304.
_VOCABULARY_DIVISOR = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is trained: sizes, the batch, for so many steps, with these micro batches one after the other."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    seq: int
    vocab: int
    gbs: int
    steps: int
    seed: int
    mbs: tuple[int, ...]
    device: str
    compiled: bool = True

    @property
    def padded_vocab(self) -> int:
        """Rows of the table of embeddings."""
        return -(-self.vocab // _VOCABULARY_DIVISOR) * _VOCABULARY_DIVISOR


class Block(torch.nn.Module):
    """Attention and MLP, each behind its norm and beside a residual."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self._heads = work.heads
        self.attention_norm = torch.nn.LayerNorm(work.hidden)
        self.qkv = torch.nn.Linear(work.hidden, 3 * work.hidden)
        self.attention_out = torch.nn.Linear(work.hidden, work.hidden)
        self.mlp_norm = torch.nn.LayerNorm(work.hidden)
        self.mlp_in = torch.nn.Linear(work.hidden, work.ffn)
        self.mlp_out = torch.nn.Linear(work.ffn, work.hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[b, s, hidden] to the same."""
        batch, length, hidden = x.shape
        parts = self.qkv(self.attention_norm(x)).split(hidden, dim=2)
        query, key, value = (part.view(batch, length, self._heads, -1).transpose(1, 2) for part in parts)
        context = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(context.transpose(1, 2).reshape(batch, length, hidden))
        inner = functional.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return x + torch.as_tensor(self.mlp_out(inner))


class PlainGpt2(torch.nn.Module):
    """The whole model; its forward pass is the mean loss."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(work.padded_vocab, work.hidden)
        self.positions = torch.nn.Embedding(work.seq, work.hidden)
        self.blocks = torch.nn.ModuleList(Block(work) for _ in range(work.layers))
        self.norm = torch.nn.LayerNorm(work.hidden)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                torch.nn.init.normal_(parameter, std=_STD / (2 * work.layers) ** 0.5 if residual else _STD)
            elif "norm" not in name:
                torch.nn.init.zeros_(parameter)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Two [b, s] to the mean over all tokens."""
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)  # tied
        return functional.cross_entropy(logits.view(-1, logits.size(-1)).float(), labels.reshape(-1))


def timed(work: Work, mbs: int) -> dict[str, Any]:
    """The times of all steps with this micro batch, and what they come to as hptool counts it."""
    from hptool.worker.data import SyntheticSamples  # noqa: PLC0415 (imports megatron)

    device = torch.device(work.device)
    torch.manual_seed(work.seed)
    model = PlainGpt2(work).to(device)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": _DECAY},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=_RATE, betas=_BETAS, eps=1e-8, fused=device.type == "cuda")
    network: Any = torch.compile(model) if work.compiled else model
    samples = SyntheticSamples(seed=work.seed, vocab_size=work.vocab, seq_length=work.seq)
    times_s, losses = [], []
    for step in range(work.steps):
        rows = [torch.from_numpy(samples.sample(step * work.gbs + i)) for i in range(work.gbs)]
        batch = [torch.stack(rows[i : i + mbs]).to(device) for i in range(0, work.gbs, mbs)]
        _synchronise(device)
        begin = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for part in batch:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = network(part[:, :-1], part[:, 1:]) / len(batch)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        _synchronise(device)
        times_s.append(time.perf_counter() - begin)
        losses.append(float(total))
    warmup = timing.warmup_steps(times_s)
    step_time_s = median(times_s[warmup:])
    low_s, high_s = timing.median_interval(times_s[warmup:])
    return {
        "mbs": mbs,
        "outcome": "ok",
        "step_time_s": step_time_s,
        "step_time_low_s": low_s,
        "step_time_high_s": high_s,
        "timed_steps": len(times_s) - warmup,
        "tokens_per_s": work.gbs * work.seq / step_time_s,
        "losses": [losses[0], losses[-1]],
        "max_allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
    }


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(output: Path, work: Work) -> int:
    """Times each micro batch; 1 where one went wrong in another way than out of memory."""
    torch.set_float32_matmul_precision("high")
    if work.device == "cpu":
        torch.set_num_threads(1)  # as a rank of the worker's
    code = 0
    for mbs in work.mbs:
        try:
            found = timed(work, mbs)
        except torch.OutOfMemoryError as error:
            found = {"mbs": mbs, "outcome": "oom", "message": str(error)[:200]}
        except Exception as error:  # noqa: BLE001 (the other micro batches may do)
            found, code = {"mbs": mbs, "outcome": "crash", "message": f"{type(error).__name__}: {error}"[:300]}, 1
        files.append_line(output, json.dumps(found))
        if work.compiled:
            torch.compiler.reset()
        if work.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), files.parse_json(sys.argv[2], Work, "work")))
