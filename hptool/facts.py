"""What is given: GPUs, clusters and model shapes. No I/O; `files.py` reads these types from YAML."""

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hptool.secrets import is_secret

#: What GEMMs compute in. The worker trains in fp32 and bf16; published runs used the others too.
Precision = Literal["fp32", "tf32", "fp16", "bf16", "fp8", "mxfp8", "nvfp4"]

#: Megatron pads the vocabulary to a multiple of this times TP (`make_vocab_size_divisible_by`).
VOCAB_DIVISOR = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """What real kernels reach of the data-sheet peaks: curves of few numbers, measured or fitted per GPU.

    `gemm`, `attention` and `memory` are the fractions that large kernels approach (0 < each <= 1). A GEMM of M·N
    results over a depth of K reaches half of it at `gemm_half_waves` waves of 128·128 tiles over the
    multiprocessors, or at a depth of `gemm_half_depth`; attention at a sequence of `attention_half_length`.
    """

    gemm: float
    attention: float
    memory: float
    gemm_half_waves: float = 0.0
    gemm_half_depth: float = 0.0
    attention_half_length: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gemm", "attention", "memory"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                msg = f"efficiency.{name}: {value} given, allowed is 0 < x <= 1"
                raise ValueError(msg)
        for name in ("gemm_half_waves", "gemm_half_depth", "attention_half_length"):
            if getattr(self, name) < 0:
                msg = f"efficiency.{name}: {getattr(self, name)} given, allowed is 0 or more"
                raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A way between two GPUs: bandwidth for one GPU in one direction, what collectives reach of it, an empty message.

    `efficiency` is bus bandwidth over nominal bandwidth of large collectives.
    """

    bandwidth_gb_per_s: float
    latency_us: float
    efficiency: float = 0.8

    def __post_init__(self) -> None:
        if self.bandwidth_gb_per_s <= 0:
            msg = f"bandwidth_gb_per_s: {self.bandwidth_gb_per_s} given, allowed is more than 0"
            raise ValueError(msg)
        if not 0 < self.efficiency <= 1:
            msg = f"efficiency: {self.efficiency} given, allowed is 0 < x <= 1"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """One timed operation: its kind, its sizes by name, the median over repetitions and ranks.

    `spread` is half the range between the quartiles of the repetitions, over their median.
    """

    kind: str
    sizes: Mapping[str, int]
    time_us: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.time_us < math.inf:
            msg = f"time_us: {self.time_us} given, allowed is more than 0"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How `hptool calibrate` came to the figures of a GPU.

    `cluster` is the profile in whose jobs it was measured: there the links of the GPU, those that `links` names, hold
    in the place of the profile's own. `fit_errors` are by kind the relative errors (root mean square, logarithms) of
    the curves at the points.
    """

    device: str
    date: str
    versions: Mapping[str, str]
    took_s: float
    nodes: int
    gpus_per_node: int
    precision: Precision
    fit_errors: Mapping[str, float]
    cluster: str | None = None
    links: tuple[Literal["intra_node", "inter_node"], ...] = ()
    points: tuple[MeasuredPoint, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One accelerator (or one CPU core of a rank), with the source of its figures.

    `peak_tflops` is dense (no sparsity), by precision. `memory_gib` is what a rank may use in all;
    `reserved_gib` of it never reaches the tensors (device context, communication library, imports). `measured` says
    how its figures were taken, where `hptool calibrate` has done it.
    """

    name: str
    source: str
    device: Literal["cuda", "cpu"]
    memory_gib: float
    reserved_gib: float
    peak_tflops: Mapping[Precision, float]
    default_precision: Precision
    memory_gb_per_s: float
    launch_overhead_us: float
    efficiency: Efficiency
    multiprocessors: int
    gpus_per_node: int
    intra_node: Link
    inter_node: Link
    gpus_per_nvlink_domain: int | None = None
    aliases: tuple[str, ...] = ()
    measured: Measured | None = None

    def __post_init__(self) -> None:
        if self.default_precision not in self.peak_tflops:
            msg = f"default_precision: {self.default_precision} given, allowed is one of {sorted(self.peak_tflops)}"
            raise ValueError(msg)
        if not 0 <= self.reserved_gib < self.memory_gib:
            msg = f"reserved_gib: {self.reserved_gib} given, allowed is 0 <= x < memory_gib ({self.memory_gib})"
            raise ValueError(msg)


#: Options of sbatch that decide how hptool finds its jobs and their output again, and how many tasks they have.
_NOT_EXTRA = frozenset(
    "array error nodes ntasks ntasks-per-node open-mode output parsable test-only time wait".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmOptions:
    """What this site's `sbatch` and `srun` want. Every field is optional; none is guessed.

    `partition`, `account`, `qos`, `constraint` and `exclusive` are the options of these names. `gpu_request` is how
    the GPUs of a node are asked for, with `gpu_type` where the site wants the type: `gpus-per-node: h100:8`,
    `gres: gpu:h100:8`, or not at all (`none`), where whole nodes come with their GPUs or `extra_options` holds a `gres`
    of its own. `cpus_per_gpu` are asked for beside them, and `mem_gib_per_node`, where 0 is all memory of the node;
    without it the site's default holds. `array_parallelism` is how many jobs of an array run at once. `extra_options`
    are further options of sbatch, by their long names without dashes: `reservation`, `nodelist`, `exclude`, `nice`;
    true is one without a value.

    `container_image`, `container_mounts` (`SOURCE:TARGET` or `SOURCE:TARGET:FLAGS`) and `container_workdir` go to srun
    as pyxis' options. The results directory must be mounted under its own name. `python` is the command that runs
    Python on a node or in the container, hptool installed; without it, the Python that runs hptool here.

    The batch script runs the shell lines of `setup`, loads `modules`, sets the profile's environment, and runs the
    lines of `prolog`; then comes srun, and then `epilog`, unless the job was killed. `signal` is when Slurm signals
    what (`TERM@60`: the ranks, 60 s before the time limit). With `requeue` Slurm may run a job again by itself, after
    a node failed or a more urgent job took its place.

    `job_overhead_s` is what a job costs before its first step: the site's node preparation (checks of health take
    tens of seconds on GPU nodes), starting a container, and importing torch and Megatron-core from a shared file
    system (20 s and more); it decides whether runs share a job. Slurm is asked for the state of the jobs every
    `poll_s` seconds at most, whatever their number, for its controller serves the whole site.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclusive: bool = False
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    gpu_type: str | None = None
    mem_gib_per_node: int | None = None
    cpus_per_gpu: int = 1
    array_parallelism: int = 8
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()
    container_workdir: str | None = None
    python: str | None = None
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    prolog: tuple[str, ...] = ()
    epilog: tuple[str, ...] = ()
    signal: str | None = None
    requeue: bool = False
    extra_options: Mapping[str, str | int | bool] = field(default_factory=dict)
    job_overhead_s: float = 60.0
    poll_s: float = 10.0

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_words()
        for name in self.extra_options:
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                msg = f"extra_options: {name!r} given, allowed are sbatch's long options without their dashes"
                raise ValueError(msg)
            if name in _NOT_EXTRA:
                msg = f"extra_options: {name!r} given, allowed is any option but {', '.join(sorted(_NOT_EXTRA))}"
                raise ValueError(msg)
        if self.container_image is None and (self.container_mounts or self.container_workdir):
            msg = "container_mounts, container_workdir: given, allowed with a container_image"
            raise ValueError(msg)

    def _check_numbers(self) -> None:
        fewest = {"mem_gib_per_node": 0, "cpus_per_gpu": 1, "array_parallelism": 1, "job_overhead_s": 0}
        for name, least in fewest.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                msg = f"{name}: {value} given, allowed is {least} or more"
                raise ValueError(msg)
        if not 0 < self.poll_s < math.inf:
            msg = f"poll_s: {self.poll_s} given, allowed is more than 0"
            raise ValueError(msg)

    def _check_words(self) -> None:
        # A line break would end the #SBATCH comment, and the rest would be run as a command.
        names = ("partition", "account", "qos", "constraint", "container_image", "container_workdir", "python")
        words = [(name, getattr(self, name)) for name in names]
        words += [("modules", word) for word in self.modules]
        words += [("container_mounts", word) for word in self.container_mounts]
        for name, value in [*words, *self.extra_options.items()]:
            if isinstance(value, str) and not (value and value.isprintable()):
                msg = f"{name}: {value!r} given, allowed is one line of printable text"
                raise ValueError(msg)
        patterns = {
            "gpu_type": (self.gpu_type, r"[A-Za-z0-9_.-]+", "letters, digits and _.-"),
            "signal": (self.signal, r"([BR]+:)?[A-Z0-9]+(@[0-9]+)?", "as sbatch reads it: TERM@60, B:USR1@120"),
        }
        for name, (value, pattern, allowed) in patterns.items():
            if value is not None and not re.fullmatch(pattern, value):
                msg = f"{name}: {value!r} given, allowed is {allowed}"
                raise ValueError(msg)
        for mount in self.container_mounts:
            if not re.fullmatch(r"[^:,]+(:[^:,]+){1,2}", mount):
                msg = f"container_mounts: {mount!r} given, allowed is SOURCE:TARGET or SOURCE:TARGET:FLAGS"
                raise ValueError(msg)
        try:
            shlex.split(self.python or "")
        except ValueError as error:
            msg = f"python: {self.python!r} given, allowed is a command as typed in a shell ({error})"
            raise ValueError(msg) from error


#: Ways to bring runs to a cluster: a job each, one array of all of a shape, orders of long-lived jobs, or side by side
#: on this machine.
Submit = Literal["separate", "array", "packed", "hyperqueue"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Nodes of equal GPUs, how they are wired and how a job gets onto them."""

    name: str
    source: str
    gpu: GpuSpec
    nodes: int
    gpus_per_node: int
    intra_node: Link
    inter_node: Link
    scheduler: Literal["slurm", "local"]
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node"):
            if getattr(self, name) < 1:
                msg = f"{name}: {getattr(self, name)} given, allowed is 1 or more"
                raise ValueError(msg)
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                msg = f"environment: {name!r} given, allowed are names of letters, digits and _"
                raise ValueError(msg)
        secrets = [name for name in self.environment if is_secret(name)]
        export = str(self.slurm.extra_options.get("export", "ALL"))
        if secrets and export.partition(",")[0] != "ALL":
            msg = (
                f"slurm.extra_options.export: {export!r} given, allowed is ALL: {', '.join(secrets)} would not reach "
                "the jobs, for no secret of the environment is written into a script"
            )
            raise ValueError(msg)
        if self.scheduler == "local" and self.nodes != 1:
            msg = f"nodes: {self.nodes} given, allowed is 1 with scheduler: local"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Links that published tables name in free text; any of `words` in it (whatever the case) means this one."""

    name: str
    source: str
    words: tuple[str, ...]
    inter_node: Link
    intra_node: Link | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Networks:
    """Networks in the order in which they are tried."""

    networks: tuple[Network, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Framework:
    """What a training framework makes of a layout: its kernels, buffers and habits, with the source of each figure.

    Time. `forward_operations` and `backward_operations` are launched by the host for each layer; `*_passes` count how
    often kernels that are no GEMM read or write a token's hidden size, the MLP's width, the attention scores (where no
    flash kernel keeps them on the chip) or the fp32 logits; `attention_speed` is its flash attention over that of
    the GPU's facts; `collective_us`, `pipeline_sync_us` and `step_overhead_ms` are spent on each doubling of a tensor
    parallel group in a collective, on each pipeline send, and once a step; `sync_passes` is what it sends over data
    parallelism, over what it had to.

    Memory. `saved_hidden` and `saved_ffn` count what a layer saves: elements of the hidden size, and of the MLP's
    width beyond its projections; `gathered_share` of the former is not split by sequence parallelism. Without a flash
    kernel an attention score is saved in the model's precision, with `softmax_in_fp32` in fp32 too, and in
    `score_bytes` more. Context parallelism by gathering keys and values (`cp_gathers`) saves what it gathered. Logits
    of 16 bits take `logit_bytes` each, and where a framework gathers the whole vocabulary (`gathers_logits`)
    `gathered_logit_bytes` more. Selective recomputation computes flash attention, which keeps no scores, again or not
    (`recomputes_flash`). Recomputation of layers rebuilds `rebuilt_layers` at once, of which `rebuilt_beside_logits`
    lie beside the logits of the last stage. `weight_gradient_buffers` are one more gradient of each weight of a layer,
    `table_gradient_buffer` one more of the embedding table (where no kernel adds it to the main gradient);
    `allocated_mib` are buffers whatever the model.

    The switches below stand for what a published table leaves out. The errors are relative standard deviations of
    what was not fitted away: how far to trust a prediction that was not calibrated. Where nothing was `fitted`, most
    of the error is one that calibration can take away.
    """

    name: str
    source: str
    forward_operations: float
    backward_operations: float
    hidden_passes: float
    ffn_passes: float
    score_passes: float
    logit_passes: float
    attention_speed: float
    collective_us: float
    pipeline_sync_us: float
    step_overhead_ms: float
    sync_passes: float
    gradient_bytes: int
    saved_hidden: float
    saved_ffn: float
    gathered_share: float
    softmax_in_fp32: bool
    score_bytes: float
    cp_gathers: bool
    logit_bytes: float
    gathers_logits: bool
    gathered_logit_bytes: float
    rebuilt_layers: float
    rebuilt_beside_logits: float
    weight_gradient_buffers: bool
    table_gradient_buffer: bool
    allocated_mib: float
    recomputes: bool
    recomputes_flash: bool
    zero_stage: int
    sequence_parallel: bool
    flash_attention: bool
    dropout: bool
    overlap_grad_sync: bool
    overlap_param_sync: bool
    step_time_error: float
    memory_error: float
    fitted: bool = True
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What an inference engine makes of a point: its kernels, its scheduler and its buffers, with their source.

    Speeds are over what the GPU's facts say: `gemm_speed` of large GEMMs, `expert_speed` of those of experts over that,
    `attention_speed` of a prompt's attention and `query_speed` of a token's (whose kernels may not use tensor cores),
    `weight_speed` and `kv_speed` at which weights, and keys and values, are read, `link_speed` of all-reduces. Where so
    many queries share a key as `query_groups` says, tensor cores do attend to it, and `query_speed` is no bound.
    `hidden_passes` count how often kernels that are no GEMM read or write a token's hidden size in a layer.

    `layer_us` is what the small kernels of a layer take, whatever they work on; `host_layer_us` what the host needs to
    launch them, where they are not launched as a graph; `step_us` is spent once a pass (scheduling, sampling),
    `request_us` on each request of it, `request_ms` once a request (before its first token). An all-reduce takes
    `collective_hops` latencies of its link for each doubling of the group and once more, a pipeline's send
    `pipeline_hops`. `pipelining` is the share of its stages that a pipeline keeps busy by cutting batches apart: 0 is
    none. `burst` is how much of the other requests' prompts comes before a request's first token (the rest comes
    between its tokens).

    With `in_flight` a batch is the number of clients that ask again once they are answered (continuous batching);
    without, requests start and end together (static). `paged_kv` takes keys and values in blocks of `kv_block_tokens`
    from what weights leave of `memory_share` of the device, so that they limit how many requests run at once, of which
    each holds its prompt and `reserved_output` of its output. Otherwise they have to fit. Requests of one prompt pass
    have at most `prefill_tokens` (0: any number); `decode_rows` is for how many requests weights are read at once (0:
    for all).

    A token of a prompt takes `activation_widths` times the hidden size beside keys and values, and `layer_widths` times
    what a layer projects to (queries, keys, values, and the MLP's width), which TP splits. `kv_bytes` are those of a
    key's element where GEMMs take 8 bits; `buffer_gib` is what the engine allocates beside all that.

    The errors are relative standard deviations of what was not fitted away. Where nothing was `fitted`, most of the
    error is one that calibration can take away.
    """

    name: str
    source: str
    gemm_speed: float
    expert_speed: float
    attention_speed: float
    query_speed: float
    weight_speed: float
    kv_speed: float
    link_speed: float
    hidden_passes: float
    layer_us: float
    host_layer_us: float
    step_us: float
    request_us: float
    request_ms: float
    collective_hops: float
    pipeline_hops: float
    pipelining: float
    burst: float
    in_flight: bool
    paged_kv: bool
    kv_block_tokens: int
    kv_bytes: int
    memory_share: float
    reserved_output: float
    prefill_tokens: int
    decode_rows: int
    cuda_graphs: bool
    query_groups: tuple[int, ...]
    activation_widths: float
    layer_widths: float
    buffer_gib: float
    latency_error: float
    memory_error: float
    fitted: bool = True
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        rates = (
            "gemm_speed",
            "expert_speed",
            "attention_speed",
            "query_speed",
            "weight_speed",
            "kv_speed",
            "link_speed",
            "latency_error",
            "memory_error",
        )
        for name in rates:
            if not 0 < getattr(self, name) < math.inf:
                msg = f"{name}: {getattr(self, name)} given, allowed is more than 0"
                raise ValueError(msg)
        for name in ("pipelining", "burst", "memory_share", "reserved_output"):
            if not 0 <= getattr(self, name) <= 1:
                msg = f"{name}: {getattr(self, name)} given, allowed is 0 to 1"
                raise ValueError(msg)
        if self.kv_block_tokens < 1:
            msg = f"kv_block_tokens: {self.kv_block_tokens} given, allowed is 1 or more"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The dimensions of a transformer, in Megatron-core's words.

    `num_layers`, `seq_length` and `vocab_size` are the decoder's; an encoder beside it (T5) has its own layers and
    sequence. Of the layers, the first `num_dense_layers` have a plain MLP where the others have experts. Queries, keys
    and values may have biases where nothing else has. BERT ends in a head for masked tokens, and with a binary head
    in one that tells whether its two segments follow each other.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    seq_length: int
    max_position_embeddings: int
    vocab_size: int
    tied_embeddings: bool
    has_bias: bool
    gated_mlp: bool = False
    rms_norm: bool = False
    causal: bool = True
    learned_positions: bool = True
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_hidden_size: int = 0
    shared_ffn_hidden_size: int = 0
    num_dense_layers: int = 0
    encoder_num_layers: int = 0
    encoder_seq_length: int = 0
    has_qkv_bias: bool = False
    has_mlm_head: bool = False
    has_binary_head: bool = False

    @property
    def attention_width(self) -> int:
        """Width of the queries of all heads; equals hidden_size for most models."""
        return self.num_attention_heads * self.kv_channels

    @property
    def kv_width(self) -> int:
        """Width of the keys (or the values) of all query groups."""
        return self.num_query_groups * self.kv_channels

    @property
    def attention_parameters(self) -> int:
        """Weights of one attention that take part in GEMMs: queries, keys, values and output."""
        return self.hidden_size * (2 * self.attention_width + 2 * self.kv_width)

    @property
    def mlp_inputs(self) -> int:
        """How many times its width an MLP projects its input to: a gated one computes a gate beside the values."""
        return 2 if self.gated_mlp else 1

    def mlp_parameters(self, width: int) -> int:
        """Weights of one MLP of this width that take part in GEMMs."""
        return self.hidden_size * width * (self.mlp_inputs + 1)

    @property
    def num_expert_layers(self) -> int:
        """Layers with experts in the place of their MLP."""
        return self.num_layers - self.num_dense_layers if self.num_experts else 0

    @property
    def norm_parameters(self) -> int:
        """Weights of one norm, and LayerNorm's biases."""
        return self.hidden_size if self.rms_norm else 2 * self.hidden_size

    @property
    def attention_layer_parameters(self) -> int:
        """All parameters of one attention: weights and biases."""
        inputs = self.attention_width + 2 * self.kv_width
        biases = (self.has_bias or self.has_qkv_bias) * inputs + self.has_bias * self.hidden_size
        return self.attention_parameters + biases

    @property
    def layer_matmul_parameters(self) -> int:
        """Weights of one layer without experts that take part in a GEMM."""
        return self.attention_parameters + self.mlp_parameters(self.ffn_hidden_size)

    @property
    def layer_parameters(self) -> int:
        """All parameters of one layer without experts: weights, biases and two norms."""
        biases = self.mlp_inputs * self.ffn_hidden_size + self.hidden_size
        mlp = self.mlp_parameters(self.ffn_hidden_size) + self.has_bias * biases
        return self.attention_layer_parameters + mlp + 2 * self.norm_parameters

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, without padding of the vocabulary."""
        hidden = self.hidden_size
        total = (self.num_layers + self.encoder_num_layers) * self.layer_parameters
        if self.encoder_num_layers:
            # Cross-attention and its norm in each layer of the decoder; the encoder ends in a norm of its own, and
            # the decoder in a bias for each word (Megatron-core's T5).
            cross = self.attention_layer_parameters + self.norm_parameters
            total += self.num_layers * cross + self.norm_parameters + self.vocab_size
        if self.num_experts:
            # In the place of an MLP: a router, the experts, and an expert that sees every token.
            width = self.expert_ffn_hidden_size
            expert = self.mlp_parameters(width) + self.has_bias * (self.mlp_inputs * width + hidden)
            router = hidden + self.has_bias
            routed = self.num_experts * (router + expert) + self.mlp_parameters(self.shared_ffn_hidden_size)
            mlp = self.layer_parameters - self.attention_layer_parameters - 2 * self.norm_parameters
            total += self.num_expert_layers * (routed - mlp)
        embeddings = self.vocab_size * hidden * (1 if self.tied_embeddings else 2)
        positions = self.max_position_embeddings * hidden if self.learned_positions else 0
        return total + embeddings + positions + self.norm_parameters + self.head_parameters

    @property
    def tokens_per_sequence(self) -> int:
        """Tokens of a sequence that rates count: trackers of encoder-decoders count the encoder's."""
        return self.encoder_seq_length or self.seq_length

    @property
    def is_causal_alone(self) -> bool:
        """Each token attends to those before it and to nothing else."""
        return self.causal and not self.encoder_num_layers

    @property
    def pipeline_layers(self) -> int:
        """Layers that a pipeline is cut from, the encoder's first."""
        return self.encoder_num_layers + self.num_layers

    @property
    def head_parameters(self) -> int:
        """BERT's heads: a projection, a norm and a bias for each word; a pooler, two segments and their embeddings."""
        hidden = self.hidden_size
        mlm = hidden * hidden + hidden + self.norm_parameters + self.vocab_size
        binary = hidden * hidden + hidden + 2 * hidden + 2 + 2 * hidden
        return self.has_mlm_head * mlm + self.has_binary_head * binary

    def padded_vocab_size(self, tp: int, divisor: int = VOCAB_DIVISOR) -> int:
        """The vocabulary that a model with this TP really holds (Megatron pads to divisor·TP)."""
        multiple = divisor * tp
        return math.ceil(self.vocab_size / multiple) * multiple
