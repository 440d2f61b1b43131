"""Published points of serving, and points, models and clusters to predict them on."""

from typing import Any

import numpy as np

from hptool import files
from hptool.facts import Cluster, GpuSpec, ModelShape
from hptool.serving import Lengths, ServingLayout, ServingPoint, ServingPoints
from tests.conftest import ROOT

_WHOLE = ROOT.parent / "shared" / "truth" / "inference.csv"

#: The whole table where it is at hand, else the committed part of it.
IS_WHOLE = _WHOLE.is_file()
PUBLISHED = _WHOLE if IS_WHOLE else ROOT / "tests" / "data" / "served.csv"

#: GPT-20B of FasterTransformer's tables.
GPT_20B = ModelShape(
    num_layers=44,
    hidden_size=6144,
    ffn_hidden_size=24576,
    num_attention_heads=48,
    num_query_groups=48,
    kv_channels=128,
    seq_length=2048,
    max_position_embeddings=2048,
    vocab_size=51200,
    tied_embeddings=True,
    has_bias=True,
    learned_positions=False,
)


def cluster(gpu: GpuSpec | None = None) -> Cluster:
    """A DGX A100, or one node of another GPU."""
    if gpu is None:
        return files.read_cluster("dgx-a100")
    return Cluster(
        name=gpu.name,
        source="a test",
        gpu=gpu,
        nodes=4,
        gpus_per_node=gpu.gpus_per_node,
        intra_node=gpu.intra_node,
        inter_node=gpu.inter_node,
        scheduler="local" if gpu.device == "cpu" else "slurm",
    )


def points(*several: dict[str, Any]) -> ServingPoints:
    """Points that differ from one request of 128 tokens, answered with 64 by one GPU, in what is given."""
    rows = []
    for given in several:
        one: dict[str, Any] = {
            "tp": 1,
            "pp": 1,
            "batch": 1,
            "input_len": 128,
            "output_len": 64,
            "precision": "bf16",
        } | given
        layout = ServingLayout(
            tp=one["tp"], pp=one["pp"], precision=one["precision"], cuda_graphs=one.get("cuda_graphs", False)
        )
        lengths = Lengths(input_len=one["input_len"], output_len=one["output_len"])
        rows.append(ServingPoint(layout=layout, lengths=lengths, batch=one["batch"]))
    return ServingPoints.of(rows)


def column(*values: float) -> Any:
    """A column of numbers."""
    return np.array(values, dtype=np.float64)
