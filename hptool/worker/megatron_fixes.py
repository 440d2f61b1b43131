"""Cures for defects of Megatron-core 0.16.1 that show on any device. To be applied before a model is built."""

import functools

from megatron.core.models.bert import bert_lm_head
from megatron.core.transformer.moe import moe_utils

from hptool.worker.attention import LocalNorm


@functools.cache
def cure_megatron() -> None:
    """Once in a process, on every rank alike."""
    # Without Transformer Engine the router asks `te_general_gemm is not None`, a name that only Transformer Engine's
    # import binds: a NameError in every layer with experts. 0.19 binds it.
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    # BERT's head makes its own norm, without Apex one that refuses sequence parallelism (also in 0.19.2).
    bert_lm_head.LNImpl = LocalNorm
