"""Presets."""

from dataclasses import dataclass
from datetime import timedelta

import jinja2

from hptool.facts import Cluster


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """What tells one size of a family from the next; the family's template holds the rest."""

    family: str
    name: str
    source: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    ffn_hidden_size: int
    seq_length: int
    vocab_size: int
    global_batch_size: int
    lr: float
    tokens: int
    time_limit_days: float


#: Parts of the steps spent warming up and at the final rate; `formulas.yaml` of the predecessor, base_config.py:596.
_WARMUP_FRACTION = 0.0015
_CONSTANT_FRACTION = 0.166

#: How long before the job's end the trainer stops, to leave by itself.
_MARGIN = timedelta(minutes=30)


def render(template: str, preset: Preset, cluster: Cluster, num_nodes: int) -> str:
    """The preset's config for `num_nodes` nodes of `cluster` as commented YAML, with the layout still to be chosen."""
    limit = timedelta(days=preset.time_limit_days)
    max_steps = max(1, preset.tokens // (preset.seq_length * preset.global_batch_size))
    environment = jinja2.Environment(  # noqa: S701 (YAML of our own numbers, no HTML)
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True
    )
    return environment.from_string(template).render(
        preset=preset,
        cluster=cluster,
        num_nodes=num_nodes,
        max_steps=max_steps,
        time_limit=_slurm_time(limit),
        max_time=lightning_time(max(limit - _MARGIN, limit / 2)),
        init_method_std=round(0.64 / preset.hidden_size**0.5, 6),
        warmup_steps=int(_WARMUP_FRACTION * max_steps),
        constant_steps=int(_CONSTANT_FRACTION * max_steps),
        min_lr=round(0.1 * preset.lr, 8),
    )


def _clock(span: timedelta) -> tuple[int, int, int, int]:
    minutes, seconds = divmod(int(span.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return days, hours, minutes, seconds


def _slurm_time(span: timedelta) -> str:
    """As sbatch reads it: D-HH:MM:SS."""
    return "{}-{:02}:{:02}:{:02}".format(*_clock(span))


def lightning_time(span: timedelta) -> str:
    """As Lightning's trainer reads it: DD:HH:MM:SS."""
    return "{:02}:{:02}:{:02}:{:02}".format(*_clock(span))
