"""The device that the suite runs on: what it is, and the profile of a cluster of one of it.

    python -m tests.gpu.device OUTPUT.json cuda|cpu

A process of its own, because a driver that hangs must not take the suite along.
"""

import dataclasses
import importlib.metadata
import json
import platform
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hptool import files
from hptool.facts import Cluster, GpuSpec
from hptool.units import GIB

Kind = Literal["cuda", "cpu"]

#: What results depend on, beside the device and its driver.
_PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "numpy", "nvidia-cudnn-cu13", "nvidia-cublas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The device as torch and the driver describe it. `gpu` is its name in `cluster/gpus/`."""

    kind: Kind
    name: str
    gpu: str
    memory_gib: float
    driver: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def accelerator(self) -> Literal["gpu", "cpu"]:
        """As `trainer.accelerator` calls it."""
        return "gpu" if self.kind == "cuda" else "cpu"

    @property
    def slug(self) -> str:
        """For file names."""
        return self.gpu if self.kind == "cuda" else "cpu"


def detect(kind: Kind) -> Device:
    """The first device of this kind; LookupError where torch sees none, or no file of `cluster/gpus/` describes it."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if kind == "cpu":
        spec = files.read_gpu("cpu", "tests.gpu")
        return Device(kind="cpu", name=platform.machine(), gpu="cpu", memory_gib=spec.memory_gib, versions=versions)
    import torch  # noqa: PLC0415 (heavy)

    if not torch.cuda.is_available():
        msg = "torch sees no CUDA device; --device cpu --tiny rehearses without one"
        raise LookupError(msg)
    versions |= {"torch": torch.__version__, "cuda": str(torch.version.cuda), "cudnn": str(_cudnn(torch))}
    properties = torch.cuda.get_device_properties(0)
    spec = _fact(properties.name)
    return Device(
        kind="cuda",
        name=properties.name,
        gpu=spec.name,
        # Rounded, so that what a driver keeps for itself does not make another cluster of the next machine.
        memory_gib=round(properties.total_memory / GIB, 1),
        driver=_driver(),
        versions=versions,
    )


def one_gpu(device: Device) -> Cluster:
    """A cluster of this one device, on this machine."""
    gpu = replace(files.read_gpu(device.gpu, "tests.gpu"), memory_gib=device.memory_gib)
    return Cluster(
        name=f"one-{gpu.name}",
        source=f"One device of this machine: {device.name}.",
        gpu=gpu,
        nodes=1,
        gpus_per_node=1,
        intra_node=gpu.intra_node,
        inter_node=gpu.inter_node,
        scheduler="local",
    )


def profile_text(cluster: Cluster) -> str:
    """The profile of such a cluster as a file that `--cluster` takes."""
    document: dict[str, Any] = {
        name: value for name, value in dataclasses.asdict(cluster).items() if name not in ("slurm", "environment")
    }
    return files.yaml_text({name: _plain(value) for name, value in document.items() if value is not None})


def read(path: Path) -> Device:
    """What `main` wrote."""
    found: Device = files.parse_json(path.read_text(encoding="utf-8"), Device, str(path))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if inner is not None}
    return list(value) if isinstance(value, tuple) else value


def _fact(name: str) -> GpuSpec:
    known = files.read_gpus()
    if name.lower() in known:
        return known[name.lower()]
    # "NVIDIA H100 80GB HBM3" of one driver is "NVIDIA H100 SXM5" of another: the longest alias within it.
    within = [alias for alias in known if alias in name.lower() and known[alias].device == "cuda"]
    if not within:
        msg = f"{name}: no file of cluster/gpus/ describes it"
        raise LookupError(msg)
    return known[max(within, key=len)]


def _cudnn(torch: Any) -> object:
    try:
        return torch.backends.cudnn.version()
    except (AttributeError, RuntimeError):
        return None


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0]


def main(path: Path, kind: Kind) -> int:
    """Writes the device; 1 where there is none, with the reason on stderr."""
    try:
        device = detect(kind)
    except LookupError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    files.write_text(path, json.dumps(dataclasses.asdict(device), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), "cuda" if sys.argv[2] == "cuda" else "cpu"))
