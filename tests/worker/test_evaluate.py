"""What is found of a model while it trains, against computations of one's own and for every layout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hptool.base_config import BaseConfig
from hptool.errors import InputError
from hptool.worker import hellaswag
from hptool.worker.text import ByteTokenizer
from tests.worker.runs import on_ranks, tiny_config, tiny_family
from tests.worker.test_train_text import BYTES
from tests.worker.trainings import TEXT

DP2: dict[str, Any] = {"trainer__devices": 2}
PP2 = {**DP2, "model__pipeline_model_parallel_size": 2}
LAYOUTS = {
    "dp2": DP2,
    "tp2": {**DP2, "model__tensor_model_parallel_size": 2},
    "pp2-vpp2": {**PP2, "model__virtual_pipeline_model_parallel_size": 2},
    "cp2": {**DP2, "model__context_parallel_size": 2},
}
DATA = {
    **BYTES,
    "model__override_vocab_size": 512,
    "model__data__data_prefix": str(TEXT),
    "model__init_method_std": 0.1,
}

QUESTIONS = [
    {"ctx": "You may convey verbatim copies", "endings": ["of the work.", "a", "to x and y and z", "no"], "label": 0},
    {"ctx_a": "This License", "ctx_b": "explicitly affirms", "endings": ["one", "two", "three", "four"], "label": "2"},
    # Longer than a sample of 32: what counts is its end.
    {"ctx": "the program " * 9, "endings": ["as you " * 8, "received it", "is", "and was"], "label": 3, "ind": 7},
]


def questions(directory: Path) -> list[hellaswag.Question]:
    """The questions, read from a file."""
    path = directory / "questions.jsonl"
    path.write_text("".join(f"{json.dumps(question)}\n" for question in QUESTIONS))
    return hellaswag.read_questions(path)


def found(config: BaseConfig, asked: list[hellaswag.Question]) -> dict[str, Any]:
    """On a rank: all that is evaluated."""
    import torch  # noqa: PLC0415 (heavy)

    from hptool.worker import data, evaluate  # noqa: PLC0415 (imports megatron)
    from hptool.worker.training import Training  # noqa: PLC0415

    device = torch.device("cpu")
    training = Training(config, device, beat=lambda: None)
    samples, _ = data.validation_samples_of(config)
    tokenizer = ByteTokenizer()
    given = hellaswag.choices(asked, tokenizer, config.shape.seq_length)

    def written(temperature: float) -> str:
        return evaluate.write(config, training, tokenizer, "You may ", device, length=8, temperature=temperature)

    return {
        "many": evaluate.validation_loss(config, training, samples, 19, device),  # two batches of 8, and 3 too few
        "few": evaluate.validation_loss(config, training, samples, 3, device),
        "scores": evaluate.score(config, training, given, device),
        "text": written(0.0),
        "drawn": [written(1.0), written(1.0)],
    }


def plain(config: BaseConfig, asked: list[hellaswag.Question]) -> dict[str, Any]:
    """On the only rank: the same from the model's logits, sample by sample and token by token."""
    import torch  # noqa: PLC0415 (heavy)
    from megatron.core.utils import unwrap_model  # noqa: PLC0415

    from hptool.worker import data  # noqa: PLC0415 (imports megatron)
    from hptool.worker.training import Training  # noqa: PLC0415

    model = unwrap_model(Training(config, torch.device("cpu"), beat=lambda: None).chunks[0]).eval()

    @torch.no_grad()
    def likelihoods(tokens: list[int]) -> Any:
        """[tokens - 1]: of each token but the first, given those before it."""
        row = torch.tensor([tokens])
        logits = model(row[:, :-1], torch.arange(len(tokens) - 1)[None], None)[0]
        return torch.log_softmax(logits.double(), -1).gather(1, row[0, 1:, None])[:, 0]

    @torch.no_grad()
    def next_token(tokens: list[int]) -> int:
        return int(model(torch.tensor([tokens]), torch.arange(len(tokens))[None], None)[0, -1, :257].argmax())

    samples, _ = data.validation_samples_of(config)
    losses = [-float(likelihoods(samples.sample(i).tolist()).mean()) for i in range(16)]
    scores = []
    for question in asked:
        for ending in question.endings:
            behind = list(f" {ending.strip()}".encode())
            tokens = (list(question.context.encode()) + behind)[-33:]
            scores.append(float(likelihoods(tokens)[-len(behind) :].mean()))
    text = list(b"You may ")
    for _ in range(8):
        text.append(next_token(text))
    return {
        "many": sum(losses) / 16,
        "few": sum(losses[:3]) / 3,
        "scores": scores,
        "text": ByteTokenizer().decode(text),
    }


def test_every_layout_finds_what_the_model_says(tmp_path: Path) -> None:
    asked = questions(tmp_path)
    one = tiny_config(**DATA)
    (expected,) = on_ranks(tmp_path / "plain", one, lambda: plain(one, asked))
    (alone,) = on_ranks(tmp_path / "one", one, lambda: found(one, asked))
    answers = {"one": [alone]}
    for name, layout in LAYOUTS.items():
        config = tiny_config(**DATA, **layout)
        answers[name] = on_ranks(tmp_path / name, config, lambda config=config: found(config, asked))  # type: ignore[misc]
    for name, ranks in answers.items():
        for rank in ranks:
            for key in ("many", "few", "scores"):
                assert rank[key] == pytest.approx(expected[key], rel=1e-5), (name, key)
            assert rank["text"] == expected["text"], name
            assert rank["drawn"] == alone["drawn"], name
    assert alone["drawn"][0] == alone["drawn"][1] != alone["text"]


def rigged(config: BaseConfig, labels: list[int]) -> float:
    """On a rank: the accuracy of a model that always says `a`, on questions with an ending of nothing else."""
    import torch  # noqa: PLC0415 (heavy)
    from megatron.core.utils import unwrap_model  # noqa: PLC0415

    from hptool.worker import evaluate  # noqa: PLC0415 (imports megatron)
    from hptool.worker.training import Training  # noqa: PLC0415

    device = torch.device("cpu")
    training = Training(config, device, beat=lambda: None)
    stage = unwrap_model(training.chunks[-1])
    with torch.no_grad():
        if stage.post_process:
            stage.decoder.final_layernorm.weight.zero_()
            stage.decoder.final_layernorm.bias.fill_(1.0)
            output = stage.output_layer.weight
            output.zero_()
            first = output.size(0) * torch.distributed.get_rank() if config.layout.tp > 1 else 0
            if 0 <= ord("a") - first < output.size(0):
                output[ord("a") - first] = 1.0
    endings = ["one", "aaaa", "bbb", "an aa"]
    asked = [hellaswag.Question(context="Say", endings=endings, label=label) for label in labels]
    given = hellaswag.choices(asked, ByteTokenizer(), config.shape.seq_length)
    return hellaswag.accuracy(asked, evaluate.score(config, training, given, device))


@pytest.mark.parametrize(("labels", "part"), [([1, 1, 1], 1.0), ([0, 2, 3], 0.0), ([1, 0, 1, 1], 0.75)])
def test_model_that_says_one_thing_only(labels: list[int], part: float, tmp_path: Path) -> None:
    config = tiny_config(**DATA, **LAYOUTS["tp2"], model__share_embeddings_and_output_weights=False)
    assert on_ranks(tmp_path, config, lambda: rigged(config, labels)) == [part, part]


def test_a_long_ending_is_no_worse_for_its_length() -> None:
    asked = [hellaswag.Question(context="x", endings=["short", "a much longer ending"], label=1)]
    assert hellaswag.accuracy(asked, [-2.0, -1.5]) == 1.0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not valid JSON"),
        ("[1]", "line 2: list given, allowed is an object"),
        ('{"endings": ["a", "b"], "label": 0}', "line 2: ctx: required key is missing"),
        ('{"ctx": " ", "endings": ["a", "b"], "label": 0}', "line 2: ctx: ' ' given"),
        ('{"ctx": "x", "endings": ["a"], "label": 0}', "line 2: endings: "),
        ('{"ctx": "x", "endings": ["a", ""], "label": 0}', "line 2: endings: "),
        ('{"ctx": "x", "endings": ["a", "b"], "label": 2}', "line 2: label: 2 given, allowed is 0 to 1"),
        ('{"ctx": "x", "endings": ["a", "b"]}', "line 2: label: None given"),
    ],
)
def test_bad_line_is_named(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(f"{json.dumps(QUESTIONS[0])}\n{line}\n")
    with pytest.raises(InputError, match=f"^{path}: {said}".replace("[1]", "")):
        hellaswag.read_questions(path)


def test_all_bad_lines_are_named_at_once_and_an_empty_file_too(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text("1\n\n2\n")
    with pytest.raises(InputError) as caught:
        hellaswag.read_questions(path)
    assert len(caught.value.problems) == 2
    path.write_text("\n")
    with pytest.raises(InputError, match="empty"):
        hellaswag.read_questions(path)


@pytest.mark.parametrize("family", ["llama", "moe", "bert", "t5"])
def test_every_family_validates_alike_on_two_ranks(family: str, tmp_path: Path) -> None:
    def loss(config: BaseConfig) -> Callable[[], float]:
        def work() -> float:
            import torch  # noqa: PLC0415 (heavy)

            from hptool.worker import data, evaluate  # noqa: PLC0415 (imports megatron)
            from hptool.worker.training import Training  # noqa: PLC0415

            training = Training(config, torch.device("cpu"), beat=lambda: None)
            samples, count = data.validation_samples_of(config)
            return evaluate.validation_loss(config, training, samples, min(count, 16), torch.device("cpu"))

        return work

    one, two = (tiny_config(**tiny_family(family, **layout)) for layout in ({}, PP2))
    (alone,) = on_ranks(tmp_path / "one", one, loss(one))
    assert on_ranks(tmp_path / "two", two, loss(two)) == pytest.approx([alone, alone], rel=1e-5)
    assert alone > 5
