"""Facts: parameter counts against published ones, and every shipped file."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml

from hptool import files
from hptool.errors import InputError
from hptool.facts import Cluster, GpuSpec, ModelShape, SlurmOptions

GPUS = sorted(p.stem for p in (files.data_directory("cluster") / "gpus").glob("*.yaml"))
PROFILES = sorted(p.stem for p in files.data_directory("cluster").glob("*.yaml"))


def shape(**changes: int | bool) -> ModelShape:
    """GPT-3 175B (Brown et al. 2020, table 2.1), with changes."""
    values: dict[str, int | bool] = {
        "num_layers": 96,
        "hidden_size": 12288,
        "ffn_hidden_size": 49152,
        "num_attention_heads": 96,
        "num_query_groups": 96,
        "kv_channels": 128,
        "seq_length": 2048,
        "max_position_embeddings": 2048,
        "vocab_size": 51200,
        "tied_embeddings": True,
        "has_bias": True,
    }
    return ModelShape(**(values | changes))  # type: ignore[arg-type]


def test_gpt3_has_its_published_number_of_parameters() -> None:
    # Narayanan et al. 2021 (arXiv:2104.04473), equation 2, gives 174.6 billion for this shape.
    assert shape().num_parameters / 1e9 == pytest.approx(174.6, abs=0.05)


def test_gpt2_has_its_published_number_of_parameters() -> None:
    gpt2 = shape(
        num_layers=12,
        hidden_size=768,
        ffn_hidden_size=3072,
        num_attention_heads=12,
        num_query_groups=12,
        kv_channels=64,
        seq_length=1024,
        max_position_embeddings=1024,
        vocab_size=50257,
    )
    assert gpt2.num_parameters == 124_439_808  # the released checkpoint


def test_untied_embeddings_cost_one_vocabulary_more() -> None:
    assert shape(tied_embeddings=False).num_parameters - shape().num_parameters == 51200 * 12288


@pytest.mark.parametrize(("tp", "padded"), [(1, 50304), (2, 50432), (8, 51200)])
def test_vocabulary_is_padded_as_megatron_pads_it(tp: int, padded: int) -> None:
    assert shape(vocab_size=50257).padded_vocab_size(tp) == padded


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_file_is_sound_and_says_its_source(name: str) -> None:
    spec = files.read_gpu(name, "test")
    assert spec.name == name
    assert len(spec.source) > 40
    for alias in spec.aliases:
        assert files.read_gpu(alias, "test") == spec


def test_no_name_means_two_gpus() -> None:
    specs = [files.read(p, GpuSpec) for p in (files.data_directory("cluster") / "gpus").glob("*.yaml")]
    names = [name for spec in specs for name in (spec.name, *spec.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_reads_under_its_own_name(name: str) -> None:
    assert files.read_cluster(name).name == name


def test_every_option_of_slurm_is_documented() -> None:
    text = SlurmOptions.__doc__ or ""
    assert [option.name for option in fields(SlurmOptions) if f"`{option.name}`" not in text] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "a\n#SBATCH --uid=0"}, "partition: .* allowed is one line of printable text"),
        ({"modules": ("cuda\n",)}, "modules: .* allowed is one line"),
        ({"python": ""}, "python: '' given, allowed is one line"),
        ({"python": "'python"}, "python: .* allowed is a command as typed in a shell"),
        ({"gpu_type": "a100:8"}, "gpu_type: 'a100:8' given, allowed is letters, digits"),
        ({"signal": "TERM 60"}, "signal: 'TERM 60' given, allowed is as sbatch reads it"),
        ({"mem_gib_per_node": -1}, "mem_gib_per_node: -1 given, allowed is 0 or more"),
        ({"cpus_per_gpu": 0}, "cpus_per_gpu: 0 given, allowed is 1 or more"),
        ({"array_parallelism": 0}, "array_parallelism: 0 given, allowed is 1 or more"),
        ({"job_overhead_s": float("nan")}, "job_overhead_s: nan given, allowed is 0 or more"),
        ({"poll_s": 0.0}, "poll_s: 0.0 given, allowed is more than 0"),
        ({"container_mounts": ("/a:/a",)}, "container_mounts, .* allowed with a container_image"),
        (
            {"container_image": "x", "container_mounts": ("/a",)},
            "container_mounts: '/a' given, allowed is SOURCE:TARGET",
        ),
        (
            {"container_image": "x", "container_mounts": ("/a:/a,/b:/b",)},
            "container_mounts: .* allowed is SOURCE:TARGET",
        ),
        ({"extra_options": {"Nice": 1}}, "extra_options: 'Nice' given, allowed are sbatch's long options"),
        ({"extra_options": {"output": "x"}}, "extra_options: 'output' given, allowed is any option but array, error"),
        ({"extra_options": {"comment": "a\nb"}}, "comment: .* allowed is one line of printable text"),
    ],
)
def test_an_option_that_cannot_be_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SlurmOptions(**options)  # type: ignore[arg-type]


def test_a_secret_needs_a_way_to_the_job(dgx_a100: Cluster) -> None:
    closed = replace(dgx_a100, slurm=SlurmOptions(extra_options={"export": "NONE"}), environment={"NCCL_DEBUG": "INFO"})
    with pytest.raises(ValueError, match="export: 'NONE' given, allowed is ALL: HF_TOKEN would not reach the jobs"):
        replace(closed, environment={"HF_TOKEN": "hush-hush"})


def test_a_profile_says_what_a_site_wants(tmp_path: Path) -> None:
    profile = yaml.safe_load((files.data_directory("cluster") / "dgx-h100.yaml").read_text())
    profile["slurm"] = {
        "gpu_request": "gres",
        "gpu_type": "h100",
        "container_image": "/images/nemo.sqsh",
        "container_mounts": ["/shared:/shared"],
        "modules": ["nccl"],
        "epilog": ["true"],
        "requeue": True,
        "job_overhead_s": 120,
        "poll_s": 30,
    }
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(profile))
    assert files.read_cluster(str(path)).slurm.container_mounts == ("/shared:/shared",)
    path.write_text(yaml.safe_dump(profile | {"slurm": {"gpu_request": "maybe", "poll_s": 0}}))
    with pytest.raises(InputError, match=r"gpu_request: .*'maybe' given"):
        files.read_cluster(str(path))


@pytest.mark.parametrize(
    "name",
    [
        "v100-16",
        "v100-32",
        "a100",
        "a100-40",
        "a100-80",
        "a800",
        "h100-80",
        "h100-96",
        "h200-141",
        "b200",
        "b300",
        "gb200",
        "gb300",
        "t4",
        "l40s",
        "cpu",
    ],
)
def test_names_of_published_tables_are_known(name: str) -> None:
    assert files.read_gpu(name.upper(), "test") == files.read_gpu(name, "test")


def test_peaks_are_dense() -> None:
    # Data sheets print the double, with sparsity, in the same column: NVIDIA A100, H100 and L40S data sheets.
    peaks = {name: files.read_gpu(name, "test").peak_tflops["bf16"] for name in ("a100-80gb", "h100-80gb", "l40s")}
    assert peaks == pytest.approx({"a100-80gb": 312, "h100-80gb": 989, "l40s": 362}, rel=0.01)


@pytest.mark.parametrize("name", sorted(files.read_frameworks()))
def test_every_framework_says_its_source(name: str) -> None:
    framework = files.read_framework(name)
    assert framework.name == name
    assert len(framework.source) > 30


def test_a_framework_like_another_has_names_of_its_own() -> None:
    frameworks = files.read_frameworks()
    aliases = [alias for framework in frameworks.values() for alias in framework.aliases]
    assert len(aliases) == len(set(aliases))
    assert frameworks["nemo"].hidden_passes == frameworks["megatron-core"].hidden_passes
    assert frameworks["nemo"].gradient_bytes != frameworks["megatron-core"].gradient_bytes


def test_networks_are_found_by_what_tables_say() -> None:
    networks = files.read_networks()
    assert len({network.name for network in networks}) == len(networks)

    def found(text: str) -> float | None:
        for network in networks:
            if any(word.lower() in text.lower() for word in network.words):
                return network.inter_node.bandwidth_gb_per_s
        return None

    assert found("NVLink + AWS EFA") == 50
    assert found("Selene: NVLink + HDR InfiniBand") == 25
    assert found("8-GPU nodes; inter-node 800 Gb/s per simulator config") == 12.5
    assert found("NVLink") is None  # says nothing of the network: the GPU's usual machine
