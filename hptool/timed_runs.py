"""The timed runs that stand for the full training: on fewer nodes, each replica with its real share of the batch."""

from dataclasses import replace
from datetime import timedelta

import numpy as np

from hptool.base_config import BaseConfig
from hptool.candidates import IntColumn, Layout, Layouts
from hptool.facts import Cluster, Framework
from hptool.predict import Predictions, predict, stack
from hptool.predict.parts import join, take
from hptool.presets import lightning_time
from hptool.strategy import Landscape

#: A run on few nodes splits the optimizer's state over fewer ranks. Its probability of fitting may be lower than the
#: full training's by this much; else the search would call layouts out of memory that are not.
_LESS_LIKELY = 0.05


def timed_run(config: BaseConfig, layout: Layout, *, nodes: int, steps: int, max_minutes: float) -> BaseConfig:
    """The run that times a layout on so many nodes, which must hold whole replicas.

    A replica works through the same microbatches as on the full cluster, so its step is the real one up to the
    data-parallel communication; the global batch shrinks with the replicas.
    """
    full = config.with_layout(layout)
    replicas = nodes * config.trainer.devices // layout.gpus_per_replica
    return replace(
        full,
        trainer=replace(
            full.trainer,
            num_nodes=nodes,
            max_steps=steps,
            max_time=lightning_time(timedelta(minutes=max_minutes)),
        ),
        model=replace(full.model, global_batch_size=layout.mbs * replicas * full.num_microbatches),
    )


def fewest_nodes(layouts: Layouts, gpus_per_node: int) -> IntColumn:
    """Nodes that hold whole replicas of each layout, and all its experts, which may be spread over several of them."""
    experts = layouts.tp * layouts.ep * layouts.pp
    gpus = np.lcm(np.lcm(layouts.gpus_per_replica, experts), gpus_per_node)
    return np.asarray(gpus // gpus_per_node, dtype=np.int64)


def landscape(
    config: BaseConfig, target: Predictions, cluster: Cluster, framework: Framework
) -> tuple[Landscape, IntColumn]:
    """What is known before the first run, and the nodes on which each layout is timed.

    These are the fewest on which the layout fits about as surely as on all nodes of `config`; `target` are the
    predictions for those.
    """
    layouts, per_node, all_nodes = target.layouts, config.trainer.devices, config.trainer.num_nodes
    work = config.workload
    nodes = fewest_nodes(layouts, per_node)
    # The batch of a replica is the same on any number of nodes.
    replica_batch = work.gbs * layouts.gpus_per_replica // work.gpus
    pieces, places = [], []
    left = np.arange(len(layouts))
    while len(left):
        gbs = replica_batch[left] * (nodes[left] * per_node // layouts.gpus_per_replica[left])
        too_few = np.zeros(len(left), dtype=np.bool_)
        for count, batch in np.unique(np.column_stack([nodes[left], gbs]), axis=0).tolist():
            group = np.flatnonzero((nodes[left] == count) & (gbs == batch))
            at = left[group]
            found = predict(
                take(layouts, at), stack([(replace(work, gpus=count * per_node, gbs=batch), cluster, framework)])
            )
            fits = (found.p_fit >= target.p_fit[at] - _LESS_LIKELY) | (count == all_nodes)
            too_few[group] = ~fits
            pieces.append(found.select(np.flatnonzero(fits)))
            places.append(at[fits])
        left = left[too_few]
        nodes[left] = np.minimum(2 * nodes[left], all_nodes)
    run = join(pieces, len(layouts)).select(np.argsort(np.concatenate(places)))
    return Landscape(target=target, run=run, memory_gib=cluster.gpu.memory_gib), nodes
