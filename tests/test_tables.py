"""Tables of runs: what empty cells stand for, which rows have a layout, and what is said of the others."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hptool import tables
from hptool.candidates import Layouts, Recompute
from hptool.errors import InputError
from hptool.predict.setting import Setting
from hptool.tables import DEFAULTS, REQUIRED, csv_text, read_table, resolve

#: A run that leaves nothing open, on one node of 8 A100.
RUN: dict[str, Any] = {
    "family": "gpt3", "model": "gpt", "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 32, "ffn": 16384,
    "gated_mlp": 0, "vocab": 50257, "seq": 2048, "gpu": "a100-80", "interconnect": "", "nodes": 1, "gpus": 8,
    "tp": 2, "pp": 2, "vpp": 1, "cp": 1, "ep": 1, "dp": 2, "mbs": 1, "gbs": 64, "sequence_parallel": 1,
    "recompute": "none", "precision": "bf16", "zero_stage_or_dist_opt": "distributed", "flash_attention": 1,
    "framework": "Megatron-LM", "notes": "",
}  # fmt: skip


def run(**cells: object) -> pd.DataFrame:
    """One row: `RUN` with other cells, None for an empty one."""
    return pd.DataFrame([{**RUN, **cells}])


def only_required(**cells: object) -> pd.DataFrame:
    return pd.DataFrame([{name: RUN[name] for name in REQUIRED} | cells])


def reason(frame: pd.DataFrame) -> str:
    (rejection,) = resolve(frame).rejection
    return rejection


def known(frame: pd.DataFrame) -> tuple[Layouts, dict[str, float]]:
    """The layouts and the setting of the one row of a table, which has some."""
    rows = resolve(frame)
    assert rows.rejection == [""]
    assert set(rows.scenario.tolist()) == {0}
    return rows.layouts, {f.name: float(getattr(rows.setting, f.name)[0]) for f in dataclasses.fields(Setting)}


def layout(frame: pd.DataFrame) -> tuple[int, ...]:
    (only,) = known(frame)[0].rows()
    return only.tp, only.pp, only.vpp, only.cp, only.ep, only.mbs


# ---------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    ("default", "cells", "meaning"),
    [
        ("family", {"family": None}, {"family": "gpt3"}),
        ("heads", {"heads": None, "kv_heads": None}, {"heads": 4096 // 128, "kv_heads": None}),
        ("kv_heads", {"kv_heads": None}, {"kv_heads": 32}),
        ("ffn", {"ffn": None}, {"ffn": 4 * 4096}),
        ("ffn", {"ffn": None, "gated_mlp": 1}, {"ffn": 43 * 256, "gated_mlp": 1}),  # 8/3·4096 is 42.7·256
        ("gated_mlp", {"gated_mlp": None}, {"gated_mlp": 0}),
        ("gated_mlp", {"family": "llama", "gated_mlp": None}, {"family": "llama", "gated_mlp": 1}),
        ("vocab", {"vocab": None}, {"vocab": 50257}),
        ("gpus", {"gpus": None, "nodes": 3}, {"gpus": 24, "nodes": 3}),
        ("gpus", {"gpus": None, "nodes": None, "dp": None}, {"gpus": 8, "nodes": 1}),
        ("gpus", {"gpus": None, "nodes": None, "pp": 8, "dp": None}, {"gpus": 16, "nodes": 2, "pp": 8}),
        ("gpus", {"gpus": None, "nodes": None, "dp": 16}, {"gpus": 64, "nodes": 8}),
        ("nodes", {"gpus": 32, "nodes": None}, {"gpus": 32, "nodes": 4}),
        ("nodes", {"gpus": 4, "nodes": None}, {"gpus": 4, "nodes": 1}),
        ("cp, ep", {"cp": None, "ep": None}, {"cp": 1, "ep": 1}),
        ("precision", {"precision": None}, {"precision": "bf16"}),
        ("precision", {"gpu": "v100-32", "precision": None}, {"gpu": "v100-32", "precision": "fp16"}),
        ("precision", {"precision": "unknown"}, {"precision": "bf16"}),
        ("precision", {"precision": None, "precision_norm": "fp16"}, {"precision": "fp16"}),
        ("framework", {"framework": None}, {"framework": "megatron-core"}),
        ("interconnect", {"interconnect": None}, {"interconnect": "whatever came with it"}),
    ],
)  # fmt: skip
def test_an_empty_cell_stands_for_its_default(default: str, cells: dict[str, Any], meaning: dict[str, Any]) -> None:
    assert default in DEFAULTS
    (empty, its), (said, theirs) = known(run(**cells)), known(run(**meaning))
    assert empty.rows() == said.rows()
    doubts = {"step_time_error", "memory_error", "fitted"}  # what is known of a framework that is not known
    assert {k: v for k, v in its.items() if k not in doubts} == {k: v for k, v in theirs.items() if k not in doubts}


@pytest.mark.parametrize("framework", ["Megatron-LM", "Megatron-DeepSpeed", "nanotron", "NeMo 24.05"])
def test_switches_are_as_the_framework(framework: str) -> None:
    used = tables._framework(f"{framework}; ")
    _, setting = known(
        run(framework=framework, sequence_parallel=None, flash_attention="", zero_stage_or_dist_opt=None)
    )
    assert setting["sequence_parallel"] == used.sequence_parallel
    assert setting["zero_stage"] == used.zero_stage
    assert setting["flash"] == used.flash_attention


def test_every_default_is_tested() -> None:
    elsewhere = {"tp, pp, vpp, mbs, recompute", "sequence_parallel, flash_attention, zero_stage_or_dist_opt"}
    marks = test_an_empty_cell_stands_for_its_default.pytestmark
    assert {case[0] for case in marks[0].args[1]} | elsewhere == set(DEFAULTS)


def test_columns_that_are_not_there_are_empty_cells() -> None:
    every = only_required(gpus=8, tp=2, pp=1, mbs=1, recompute="none")
    cells = {name: every[name].iloc[0] if name in every else None for name in RUN}
    (few, its), (all_, theirs) = known(every), known(pd.DataFrame([cells]))
    assert (few.rows(), its) == (all_.rows(), theirs)


def test_a_required_column_alone_is_enough() -> None:
    rows = resolve(only_required())
    assert rows.rejection == [""]
    assert len(rows.layouts) > 20


@pytest.mark.parametrize(
    ("word", "stage"),
    [
        ("none", 0),
        ("None", 0),
        ("zero1", 1),
        ("zero3", 3),
        ("distributed-optimizer", 1),
        ("fsdp full_shard", 3),
        ("fsdp shard_grad_op", 2),
    ],
)
def test_words_for_sharding(word: str, stage: int) -> None:
    assert known(run(zero_stage_or_dist_opt=word))[1]["zero_stage"] == stage


def test_the_gpus_of_a_node_are_those_of_the_row() -> None:
    assert known(run(gpus=16, nodes=4))[1]["gpus_per_node"] == 4
    assert known(run(gpus=4, nodes=None))[1]["gpus_per_node"] == 4
    assert known(run(gpus=64, nodes=None))[1]["gpus_per_node"] == 8


def test_experts_from_the_notes_and_from_the_models_name() -> None:
    _, setting = known(run(family="moe", notes="num_experts=8, topk=2"))
    assert (setting["experts"], setting["experts_per_token"], setting["expert_ffn"]) == (8, 2, 16384)
    _, setting = known(run(family="mixtral", model="Mixtral-8x7B"))
    assert (setting["experts"], setting["expert_ffn"]) == (8, 14336)


def test_an_encoder_from_the_notes() -> None:
    _, setting = known(run(family="t5", notes="encoder layers 24, decoder layers 12, decoder seq 114"))
    assert (setting["encoder_layers"], setting["num_layers"], setting["seq_length"]) == (24, 12, 114)
    assert setting["encoder_seq_length"] == setting["tokens_per_sequence"] == 2048


# ---------------------------------------------------------------- layouts


def test_a_row_that_gives_its_layout_has_that_one() -> None:
    assert layout(run()) == (2, 2, 1, 1, 1, 1)
    assert layout(run(pp=4, dp=None, vpp=8, mbs=4)) == (2, 4, 8, 1, 1, 4)


@pytest.mark.parametrize(
    ("word", "modes"),
    [
        ("none", [(Recompute.NONE, 0)]),
        ("None", [(Recompute.NONE, 0)]),
        ("full", [(Recompute.UNIFORM, 1)]),
        ("Selective(per op)", [(Recompute.SELECTIVE, 0)]),
        # As hptool itself writes them, of the 16 layers of a stage.
        ("uniform-4", [(Recompute.UNIFORM, 4)]),
        ("block-4", [(Recompute.BLOCK, 4)]),
        ("block4", [(Recompute.BLOCK, 4)]),
        ("block-16", [(Recompute.UNIFORM, 1)]),
        ("unknown", [(Recompute.NONE, 0), (Recompute.UNIFORM, 1), (Recompute.BLOCK, 4), (Recompute.BLOCK, 8)]),
        (None, [(Recompute.NONE, 0), (Recompute.UNIFORM, 1), (Recompute.BLOCK, 4), (Recompute.BLOCK, 8)]),
    ],
)
def test_words_for_recomputation(word: str | None, modes: list[tuple[Recompute, int]]) -> None:
    layouts, _ = known(run(recompute=word))
    assert [(row.recompute, row.recompute_num_layers) for row in layouts.rows()] == modes


def test_selective_recomputation_is_tried_without_a_flash_kernel() -> None:
    assert Recompute.SELECTIVE in known(run(recompute=None, flash_attention=0))[0].recompute
    assert Recompute.SELECTIVE not in known(run(recompute=None, flash_attention=1))[0].recompute


SIZES = st.sampled_from([1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 96, 128])


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.fixed_dictionaries(dict.fromkeys(("gpus", "heads", "layers", "gbs"), SIZES)),
    cp=st.sampled_from([1, 2]),
    left=st.sets(st.sampled_from(["tp", "pp", "mbs"])),
)
def test_what_a_row_leaves_open_makes_up_its_gpus(sizes: dict[str, int], cp: int, left: set[str]) -> None:
    gpus, heads, layers = sizes["gpus"], sizes["heads"], sizes["layers"]
    given_sizes = {axis: None if axis in left else 1 for axis in ("tp", "pp", "mbs")}
    frame = run(**sizes, nodes=None, kv_heads=None, cp=cp, dp=None, vpp=None)
    rows = resolve(frame.assign(**given_sizes))
    t = rows.layouts
    assert bool(rows.rejection[0]) == (len(t) == 0)
    assert (gpus % t.gpus_per_replica == 0).all()
    assert (heads % t.tp == 0).all()
    assert (layers % t.pp == 0).all()
    assert ((t.vpp == 1) | (layers % (t.pp * t.vpp) == 0)).all()
    for axis, size in given_sizes.items():
        assert size is None or (getattr(t, axis) == size).all()
    assert len({row.name for row in t.rows()}) == len(t)
    if left == {"tp", "pp", "mbs"} and gpus % cp == 0:
        assert len(t)  # pure data parallelism, if nothing else


def test_dp_narrows_what_is_open() -> None:
    cells = {"gpus": 64, "nodes": None, "tp": None, "pp": None}
    sizes = known(run(**cells, dp=16))[0].gpus_per_replica
    assert set(sizes.tolist()) == {4}
    assert set(known(run(**cells, dp=None))[0].gpus_per_replica.tolist()) > {1, 4, 64}
    assert reason(run(**cells, dp=5)) == "no tp, pp and dp make up the GPUs as the row gives them"


# ---------------------------------------------------------------- rows without a layout


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ({"gpu": "a100-8O"}, "gpu: unknown GPU 'a100-8O'; did you mean a100-80?"),
        ({"gpu": None}, "gpu: unknown GPU ''; allowed are a100-40gb, a100-80gb,"),
        ({"hidden": None}, "hidden: nothing given, allowed is a whole number of 1 or more"),
        ({"layers": 0}, "layers: 0 given, allowed is a whole number of 1 or more"),
        ({"seq": -2048}, "seq: -2048 given, allowed is a whole number of 1 or more"),
        ({"gbs": 1.5}, "gbs: 1.5 given, allowed is a whole number of 1 or more"),
        ({"heads": "many"}, "heads: 'many' given, allowed is a number"),
        ({"vocab": float("inf")}, "vocab: inf given, allowed is a finite number"),
        ({"ffn": "1e400"}, "ffn: '1e400' given, allowed is a finite number"),
        ({"hidden": 1e300}, "hidden: 1e+300 given, allowed is at most 16777216"),
        ({"hidden": "9" * 5000}, "… given, allowed is a finite number"),
        ({"gpus": True}, "gpus: True given, allowed is a number"),
        ({"gpus": "eight"}, "gpus: 'eight' given, allowed is a number"),
        ({"nodes": 16}, "nodes: 16 given, allowed is at most the 8 GPUs"),
        ({"heads": 8192}, "heads: 8192 given, allowed is at most hidden, 4096"),
        ({"kv_heads": 64}, "kv_heads: 64 given, allowed is at most the 32 heads"),
        ({"tp": 0}, "tp: 0 given, allowed is a whole number of 1 or more"),
        ({"tp": 1e18}, "tp: 1e+18 given, allowed is at most 16777216"),
        ({"tp": 64, "gpus": 64}, "tp: 64 given, allowed is a divisor of the 32 heads"),
        ({"pp": "two"}, "pp: 'two' given, allowed is a number"),
        ({"pp": 8}, "tp·pp·cp: 2·8·1 given, allowed is a divisor of the 8 GPUs"),
        ({"pp": 3}, "tp·pp·cp: 2·3·1 given, allowed is a divisor of the 8 GPUs"),
        ({"vpp": 33}, "vpp: 33 given, allowed is at most the 32 layers"),
        ({"cp": 4, "gpus": 16, "seq": 2}, "cp: 4 given, allowed is at most the sequence of 2"),
        ({"ep": 2}, "ep: 2 given, allowed is a divisor of the number of experts, 1"),
        ({"mbs": 64}, "mbs·dp: 64·2 given, allowed is at most the global batch of 64"),
        (
            {"recompute": "some"},
            "recompute: 'some' given, allowed is none, selective, full, uniform-N, block-N or unknown",
        ),
        (
            {"recompute": "block-0"},
            "recompute: 'block-0' given, allowed is none, selective, full, uniform-N, block-N or",
        ),
        ({"precision": "fp8"}, "precision: 'fp8' given, allowed on a100-80gb is bf16 or fp16 or fp32 or tf32"),
        ({"flash_attention": "v2"}, "flash_attention: 'v2' given, allowed is 0, 1 or unknown"),
        ({"gated_mlp": 2}, "gated_mlp: '2' given, allowed is 0, 1 or unknown"),
        ({"family": "mamba"}, "family: 'mamba' cannot be predicted; allowed are bert, gpt3, llama,"),
        ({"family": "llama", "model": "deepseek-v3"}, "multi-latent attention cannot be predicted yet"),
        ({"family": "moe"}, "model: the experts of 'gpt' are not known; num_experts=N, topk=K in notes gives them"),
        ({"notes": "num_experts=2, topk=4"}, "notes: topk=4 given, allowed is at most num_experts=2"),
        ({"notes": "num_experts=0, topk=4"}, "notes: '0' given, allowed is a whole number of 1 or more"),
        (
            {"family": "t5", "notes": "encoder layers 9, decoder layers 0, decoder seq 8"},
            "notes: '0' given, allowed is a whole number of 1 or more",
        ),
    ],
)
def test_a_row_without_a_layout_says_why(cells: dict[str, Any], said: str) -> None:
    rows = resolve(run(**cells))
    assert len(rows.layouts) == len(rows.row) == 0
    assert said in rows.rejection[0]
    assert "\n" not in rows.rejection[0]
    assert len(rows.rejection[0]) < 250


def test_the_first_cause_is_told() -> None:
    assert "hidden" in reason(run(hidden=0, tp="x", recompute="some"))
    assert "tp" in reason(run(tp="x", recompute="some"))


def test_what_trainers_do_although_it_is_uneven_has_a_layout() -> None:
    assert layout(run(layers=30, pp=4, dp=1, vpp=1))[1] == 4  # a last stage of fewer layers
    assert layout(run(gpus=64, nodes=None, layers=8, pp=16, dp=2))[1] == 16
    assert layout(run(gbs=9, mbs=2))[5] == 2


def test_rows_keep_their_order_and_their_number() -> None:
    frames = [run(), run(tp=3), run(gpu="abacus"), run(), run(mbs=2), run(tp=3)]
    frame = pd.concat(frames)  # all of index 0
    rows = resolve(frame)
    assert [bool(r) for r in rows.rejection] == [False, True, True, False, False, True]
    assert rows.row.tolist() == [0, 3, 4]
    assert rows.layouts.mbs.tolist() == [1, 1, 2]
    assert len(rows.setting) == len(rows.stack) == 1


def test_rows_that_say_the_same_are_alike() -> None:
    frame = pd.concat([run(mine=1), run(tp=3), run(mine=2), run(notes="x"), run(mem_kind="x"), run(tp=3, iter_s=5)])
    number, first = tables.alike(frame)
    assert number.tolist() == [0, 1, 0, 2, 3, 1]
    assert first.tolist() == [0, 1, 3, 4]


def test_rows_of_unlike_models_have_settings_of_their_own() -> None:
    rows = resolve(pd.concat([run(), run(gpu="abacus"), run(hidden=8192), run(tp=1)]))
    assert rows.setting.hidden[rows.scenario].tolist() == [4096, 8192, 4096]


# ---------------------------------------------------------------- files

HEADER = "hidden,layers,heads,seq,gpu,gbs,gpus,tp,recompute"
LINE = "4096,32,32,2048,a100-80,64,8,2,none"


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "runs.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        ("\n \n", "the file is empty"),
        (HEADER, "no rows"),
        (HEADER + "\n\n", "no rows"),
        (f"{HEADER}\n{LINE}\n{LINE},1,2\n", "not a CSV table: Expected 9 fields in line 3, saw 11"),
        (f"{HEADER}\n0,{LINE}\n1,{LINE}\n", "not a CSV table: the rows have more cells than the first line has names"),
        (f'{HEADER}\n{LINE}\n"{LINE}\n', "not a CSV table: EOF inside string starting at row 2"),
        (f"{HEADER}\n{LINE}\n".replace(",", ";"), "not a CSV table: allowed between two cells is a comma"),
        (f"{HEADER}\n{LINE}\n".replace(",", "\t"), "not a CSV table: allowed between two cells is a comma"),
        (f"{HEADER},tp\n{LINE},4\n", "columns tp given twice"),
        (f"{HEADER}\n{LINE}\n".encode("utf-16"), "not a CSV table: not text in UTF-8"),
        (bytes(range(256)) * 50, "not a CSV table: not text in UTF-8"),
        (f"{HEADER},notes\n{LINE},café\n".encode("latin-1"), "not a CSV table: 'utf-8' codec can't decode byte 0xe9"),
        ("hidden,layer\n1,2\n", "columns layers, heads, seq, gpu, gbs missing (layers: did you mean layer?)"),
        ("x\n1\n", "columns hidden, layers, heads, seq, gpu, gbs missing"),
    ],
)
def test_a_file_that_is_no_table_of_runs(content: str | bytes, said: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(InputError) as raised:
        read_table(path)
    (line,) = raised.value.problems
    assert line.startswith(f"{path}: {said}")
    assert "\n" not in line


@pytest.mark.parametrize(("name", "said"), [("nothing.csv", "No such file"), (".", "Is a directory")])
def test_a_path_that_cannot_be_read(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"cannot be read: {said}"):
        read_table(tmp_path / name)


def test_a_compressed_file_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "runs.csv.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(InputError, match="not a CSV table"):
        read_table(tmp_path / "runs.csv.gz")


@pytest.mark.parametrize(
    "content",
    [
        f"\ufeff{HEADER}\n{LINE}\n",
        f"{HEADER}\r\n{LINE}\r\n",
        f"{HEADER}\n{LINE}",
        f"{HEADER}\n{LINE}\n\n\n",
        f"{HEADER}\n{LINE}\n".replace(",", ", "),
        f"{HEADER}\n{LINE},\n",
        f",{HEADER}\n0,{LINE}\n",
        f'{HEADER},notes\n{LINE},"two\nlines, and ""quotes"""\n',
    ],
)
def test_a_table_as_editors_and_programs_write_it(content: str, tmp_path: Path) -> None:
    frame = read_table(written(tmp_path, content))
    assert len(frame) == 1
    rows = resolve(frame)
    assert rows.rejection == [""]
    assert set(rows.layouts.tp.tolist()) == {2}


def test_a_short_line_has_empty_cells(tmp_path: Path) -> None:
    frame = read_table(written(tmp_path, f"{HEADER}\n4096,32\n{LINE}\n"))
    assert [bool(r) for r in resolve(frame).rejection] == [True, False]


@pytest.mark.parametrize("word", ["", "NA", "nan", "NULL", "None", "N/A"])
def test_words_for_an_empty_cell(word: str, tmp_path: Path) -> None:
    frame = read_table(written(tmp_path, f"{HEADER},ffn\n{LINE},{word}\n"))
    assert known(frame)[1]["ffn"] == 16384


def test_none_is_no_empty_cell_where_it_says_something(tmp_path: Path) -> None:
    line = LINE.replace("none", "None")
    frame = read_table(written(tmp_path, f"{HEADER},zero_stage_or_dist_opt\n{line},None\n"))
    layouts, setting = known(frame)
    assert {row.recompute for row in layouts.rows()} == {Recompute.NONE}
    assert setting["zero_stage"] == 0


def test_one_cell_that_is_no_number_spoils_its_own_row_alone(tmp_path: Path) -> None:
    lines = [LINE, LINE.replace(",8,", ",eight,"), LINE.replace("4096", "x"), LINE]
    frame = read_table(written(tmp_path, "\n".join([HEADER, *lines])))
    assert [r.partition(":")[0] for r in resolve(frame).rejection] == ["", "gpus", "hidden", ""]


def test_a_table_is_written_as_it_was_read(tmp_path: Path) -> None:
    content = (
        'id,hidden,note,rate,huge,none\n1,,"a, ""b""\nc",0.1234567891234,1e+300,None\n'
        "2,4096,None,12345678.25,9007199254740993,\n"
    )
    frame = read_table(written(tmp_path, content), required=("id",))
    text = csv_text(frame, pd.DataFrame({"predicted_s": [1.23456789, np.nan], "rejection": ["", "why, so"]}))
    again = pd.read_csv(io.StringIO(text), dtype=str, keep_default_na=False)
    assert again.to_dict("list") == {
        "id": ["1", "2"],
        "hidden": ["", "4096"],
        "note": ['a, "b"\nc', ""],
        "rate": ["0.1234567891234", "12345678.25"],
        "huge": ["1e+300", "9007199254740992.0"],
        "none": ["", ""],
        "predicted_s": ["1.23457", ""],
        "rejection": ["", "why, so"],
    }


def test_a_column_of_the_same_name_is_replaced() -> None:
    text = csv_text(pd.DataFrame({"a": [1], "p": [2]}), pd.DataFrame({"p": [3.0]}))
    assert text.splitlines() == ["a,p", "1,3"]


def test_a_long_table_is_written_in_pieces_with_one_header(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pd.DataFrame({"a": [1.0, None, 3.0, 4.0, 5.0], "b": ["x", None, "y", "z", ""]})
    predicted = pd.DataFrame({"p": np.arange(5) / 7})
    whole = csv_text(frame, predicted)
    monkeypatch.setattr(tables, "_WRITTEN_AT_ONCE", 2)
    assert csv_text(frame, predicted) == whole
    assert whole.splitlines()[:3] == ["a,b,p", "1,x,0", ",,0.142857"]


ODD = st.sampled_from([0, 1, 2, 8, 64, "none", "", "num_experts=4, topk=2", "llama", "t5"])
CELLS = st.one_of(st.none(), st.text(max_size=8), st.integers(), st.floats(), st.booleans(), ODD)


@settings(deadline=None, max_examples=150)
@given(rows=st.lists(st.dictionaries(st.sampled_from(sorted(RUN)), CELLS, max_size=4), min_size=1, max_size=6))
def test_whatever_the_cells_each_row_has_layouts_or_one_line_of_reason(rows: list[dict[str, Any]]) -> None:
    found = resolve(pd.DataFrame([{**RUN, **row} for row in rows]))
    assert len(found.rejection) == len(rows)
    assert [not r for r in found.rejection] == np.isin(np.arange(len(rows)), found.row).tolist()
    assert all("\n" not in r for r in found.rejection)
    assert (found.layouts.gpus_per_replica >= 1).all()
    for name in ("hidden", "model_flops_per_sequence", "gbs", "gpus", "seq_length", "num_layers", "heads"):
        column = getattr(found.setting, name)
        assert (np.isfinite(column) & (column > 0)).all()
