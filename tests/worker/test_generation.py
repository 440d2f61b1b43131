"""Tokens that are made from a cache, against those of whole forward passes: every family, every cut."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from hptool.base_config import BaseConfig
from hptool.errors import InputError
from tests.worker.runs import FAMILIES, on_ranks, tiny_config
from tests.worker.trainings import train

#: So large that the likeliest token is not a matter of rounding.
STD = 0.2
BATCH, INPUT, OUTPUT = 3, 6, 7

DEVICES: dict[str, Any] = {"trainer__devices": 2}
TP2 = {**DEVICES, "model__tensor_model_parallel_size": 2}
PP2 = {**DEVICES, "model__pipeline_model_parallel_size": 2}
LAYOUTS: Mapping[str, dict[str, Any]] = {
    "tp2": TP2,
    "pp2": PP2,
    "tp2-pp2": {**TP2, **PP2, "trainer__devices": 4},
}

_DECODER = FAMILIES["t5"]["model__decoder"]
MODELS: Mapping[str, dict[str, Any]] = {
    "gpt": {},
    "llama": FAMILIES["llama"],
    "qkv-bias": {**FAMILIES["llama"], "model__qkv_bias": True, "model__rotary_percentage": 0.5},
    "gemma": FAMILIES["gemma"],
    "alibi": FAMILIES["alibi"],
    "moe": FAMILIES["moe"],
    "t5": {
        **FAMILIES["t5"],
        "model__encoder": {**_DECODER, "init_method_std": STD},
        "model__decoder": {**_DECODER, "init_method_std": STD},
    },
}


def config_of(family: str, **changes: Any) -> BaseConfig:
    """A model of this family whose weights are the same in every cut."""
    std = {} if family == "t5" else {"model__init_method_std": STD}
    return tiny_config(**{**std, **MODELS[family], **changes})


def prompts(config: BaseConfig) -> Any:
    """The same tokens on every rank."""
    import torch  # noqa: PLC0415 (heavy)

    drawn = torch.Generator().manual_seed(3)
    return torch.randint(0, config.shape.vocab_size, (BATCH, INPUT), generator=drawn)


def answered(config: BaseConfig, output: int = OUTPUT, *, recorded: bool = False) -> Callable[[], list[list[int]]]:
    """On a rank: the tokens, twice over; with `recorded` decoding is repeated as a graph does."""

    def work() -> list[list[int]]:
        import torch  # noqa: PLC0415 (heavy)

        from hptool.worker.generation import Generator  # noqa: PLC0415 (imports megatron)

        generator = Generator(config, torch.device("cpu"), beat=lambda: None)
        generator.open(BATCH, INPUT, output)
        first = generator.answer(prompts(config), output).tokens.tolist()
        if recorded:
            generator.record()
        again = generator.answer(prompts(config), output)
        assert again.tokens.tolist() == first
        assert again.all_s >= again.first_s > 0
        found: list[list[int]] = first
        return found

    return work


def uncached(config: BaseConfig) -> Callable[[], list[list[int]]]:
    """On the only rank: the same from the model as it trains, by a whole forward pass for each token."""

    def work() -> list[list[int]]:
        import torch  # noqa: PLC0415 (heavy)

        from hptool.worker import initialise, model  # noqa: PLC0415 (imports megatron)

        (chunk,) = model.build_chunks(config, model.transformer_config(config))
        initialise.fill(chunk, STD)
        chunk.eval()
        seen: list[torch.Tensor] = []
        chunk.output_layer.register_forward_hook(lambda _, __, output: seen.append(output[0]))
        asked = prompts(config)
        tokens = torch.zeros(BATCH, 1, dtype=torch.int64) if config.is_encoder_decoder else asked
        start = tokens.size(1)
        with torch.no_grad():
            for _ in range(OUTPUT):
                positions = torch.arange(tokens.size(1)).expand_as(tokens)
                given = (asked, tokens, tokens) if config.is_encoder_decoder else (tokens, positions, None)
                chunk(*given)
                likeliest = seen.pop()[-1, :, : config.shape.vocab_size].argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, likeliest], 1)
        found: list[list[int]] = tokens[:, start:].tolist()
        return found

    return work


@pytest.mark.parametrize("family", MODELS)
def test_cached_tokens_are_those_of_whole_passes_for_every_cut(family: str, tmp_path: Path) -> None:
    alone = config_of(family)
    (expected,) = on_ranks(tmp_path / "whole", alone, uncached(alone))
    assert len({tuple(row) for row in expected}) > 1
    assert on_ranks(tmp_path / "alone", alone, answered(alone)) == [expected]
    for name, layout in LAYOUTS.items():
        cut = config_of(family, **layout)
        assert on_ranks(tmp_path / name, cut, answered(cut)) == [expected] * cut.gpus, name


def shortfalls(config: BaseConfig, tokens: list[list[int]]) -> Callable[[], list[float]]:
    """On the only rank, of a model in fp32: by how much each of these tokens misses the likeliest one's logit there.

    As a part of the range of the logits, in whole forward passes over the tokens before it.
    """

    def work() -> list[float]:
        import torch  # noqa: PLC0415 (heavy)

        from hptool.worker import initialise, model  # noqa: PLC0415 (imports megatron)

        (chunk,) = model.build_chunks(config, model.transformer_config(config))
        initialise.fill(chunk, STD)
        chunk.eval()
        seen: list[torch.Tensor] = []
        chunk.output_layer.register_forward_hook(lambda _, __, output: seen.append(output[0]))
        made, asked = torch.tensor(tokens), prompts(config)
        before = torch.zeros(BATCH, 1, dtype=torch.int64) if config.is_encoder_decoder else asked
        read = torch.cat([before, made[:, :-1]], 1)
        positions = torch.arange(read.size(1)).expand_as(read)
        with torch.no_grad():
            chunk(*((asked, read, read) if config.is_encoder_decoder else (read, positions, None)))
        logits = seen.pop()[-OUTPUT:, :, : config.shape.vocab_size].transpose(0, 1)
        missed = logits.amax(-1) - logits.gather(-1, made[..., None])[..., 0]
        found: list[float] = (missed / (logits.amax(-1) - logits.amin(-1))).flatten().tolist()
        return found

    return work


@pytest.mark.parametrize("precision", ["bf16", 16])
@pytest.mark.parametrize("family", MODELS)
def test_tokens_of_16_bits_are_likely_ones_in_32(family: str, precision: str | int, tmp_path: Path) -> None:
    narrow = config_of(family, trainer__precision=precision)
    (tokens,) = on_ranks(tmp_path / "narrow", narrow, answered(narrow))
    assert len({tuple(row) for row in tokens}) > 1
    whole = config_of(family)
    (missed,) = on_ranks(tmp_path / "whole", whole, shortfalls(whole, tokens))
    assert max(missed) < 0.05
    if family == "gpt":
        cut = config_of(family, **LAYOUTS["tp2-pp2"], trainer__precision=precision)
        found = on_ranks(tmp_path / "cut", cut, answered(cut))
        assert found == [found[0]] * cut.gpus
        (missed,) = on_ranks(tmp_path / "again", whole, shortfalls(whole, found[0]))
        assert max(missed) < 0.05


def test_one_token_needs_no_decoding(tmp_path: Path) -> None:
    alone = config_of("llama")
    (expected,) = on_ranks(tmp_path / "whole", alone, uncached(alone))
    assert on_ranks(tmp_path / "one", alone, answered(alone, 1)) == [[row[:1] for row in expected]]


@pytest.mark.parametrize(
    ("family", "layout"), [("gpt", {}), ("llama", TP2), ("alibi", PP2), ("t5", PP2), ("gemma", {})]
)
def test_what_a_graph_repeats_gives_the_same_tokens(
    family: str, layout: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hptool.worker import decoding_graphs  # noqa: PLC0415 (imports torch)

    class Repeated:
        """What a CUDA graph does, done by the CPU: the same pass in the same memory."""

        def __init__(self, run: Callable[[], Any]) -> None:
            self._run = run
            self.found = run()

        def pool(self) -> None:
            return None

        def replay(self) -> None:
            self.found.copy_(self._run())

    def record(run: Callable[[], Any], pool: object) -> tuple[Repeated, Any]:
        del pool
        graph = Repeated(run)
        return graph, graph.found

    monkeypatch.setattr(decoding_graphs, "_record", record)
    monkeypatch.setattr(decoding_graphs, "_BLOCK", 4)  # so that there are graphs to choose between
    config = config_of(family, **layout)
    tokens = on_ranks(tmp_path, config, answered(config, recorded=True))
    assert tokens[0] == tokens[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a training."""
    directory = tmp_path_factory.mktemp("trained")
    train(directory, **MODELS["llama"], trainer__max_steps=2)
    return directory


def served_from(config: BaseConfig, checkpoint: Path) -> Callable[[], Any]:
    """On a rank: the tokens that a checkpoint's model makes, or what is wrong with it."""

    def work() -> Any:
        import torch  # noqa: PLC0415 (heavy)

        from hptool.worker import weights  # noqa: PLC0415 (imports megatron)
        from hptool.worker.generation import Generator  # noqa: PLC0415

        generator = Generator(config, torch.device("cpu"), beat=lambda: None)
        try:
            weights.load(checkpoint, generator.chunk)
        except InputError as error:
            return str(error)
        generator.open(BATCH, INPUT, OUTPUT)
        return generator.answer(prompts(config), OUTPUT).tokens.tolist()

    return work


def test_a_trained_model_serves_in_every_cut(trained: Path, tmp_path: Path) -> None:
    alone = tiny_config(**MODELS["llama"])
    (expected,) = on_ranks(tmp_path / "alone", alone, served_from(alone, trained))
    assert on_ranks(tmp_path / "random", alone, answered(alone)) != [expected]
    for name, layout in LAYOUTS.items():
        cut = tiny_config(**{**MODELS["llama"], **layout})
        (checkpoint,) = (trained / "checkpoints").iterdir()
        assert on_ranks(tmp_path / name, cut, served_from(cut, checkpoint)) == [expected] * cut.gpus, name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__ffn_hidden_size": 88}, "decoder.layers.mlp.linear_fc2.weight is 4×64×176 there, and 4×64×88"),
        (
            {"model__num_layers": 2},
            "decoder.layers.self_attention.linear_proj.weight is 4×64×64 there, and 2×64×64 in this config",
        ),
        ({"model__bias": True}, "decoder.layers.mlp.linear_fc2.bias is not there"),
    ],
)
def test_another_models_checkpoint_is_refused_by_what_differs(
    changes: dict[str, Any], said: str, trained: Path, tmp_path: Path
) -> None:
    config = tiny_config(**{**MODELS["llama"], **TP2, **changes})
    answers = on_ranks(tmp_path, config, served_from(config, trained))
    assert answers[0] == answers[1]
    assert "is a checkpoint of another model: " in answers[0]
    assert said in answers[0]


def test_a_directory_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    config = tiny_config()
    (said,) = on_ranks(tmp_path / "run", config, served_from(config, tmp_path / "none"))
    assert f"checkpoint: {tmp_path / 'none'} given, allowed is a directory of hptool train" in said
