"""What the benchmarks compute on any device: methods, checks, formulas, tables. Times are measured on GPUs only."""

import functools
import json
from dataclasses import replace

import pytest
import torch

from tsa_compile import Floor
from tsa_compile.kernels import reference

LENGTH = 1500


@pytest.fixture
def methods(load):
    return load("attention_methods")


@pytest.fixture
def inputs(methods):
    torch.manual_seed(0)
    return methods.make_inputs(small(methods), LENGTH, "cpu")


def small(methods, **changes):
    return methods.Shape(**{"heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": torch.float32, **changes})


def test_the_plain_pipeline_equals_the_reference(methods):
    torch.manual_seed(0)
    query, key, value = methods.make_inputs(small(methods), 200, "cpu").tensors
    settings = dict(coverage=0.2, window=8, pool=5, min_tokens=10)
    out, indices = methods.paper_pipeline(query, key, value, 0.3, **settings)
    wanted = reference.token_sparse_attention(query, key, value, scale=0.3, **settings)
    assert 18 < indices.shape[2] < 200
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("keep", [100, 1250, 1371, 1372])
def test_a_coverage_is_found_for_a_number_of_tokens(methods, inputs, keep):
    scores = methods.tsa.score(inputs.query, inputs.key, None, inputs.scale, 128, 7)
    coverage = methods.coverage_for(scores[..., :-128], keep)
    assert abs(int(methods.tsa.budget(scores, coverage, None, 0)) - 128 - keep) <= 1


def names_of_sparse_methods():
    forms = ["ours, published", "ours", "ours, padding mask of ones", "ours, Coverage"]
    return ["paper's pipeline, plain torch", *forms]


@pytest.mark.parametrize("name", names_of_sparse_methods())
def test_sparse_methods_pass_their_checks(load, methods, inputs, monkeypatch, name):
    attention = load("attention")
    monkeypatch.setattr(attention, "peak_of", lambda call: (call(), 0.0))
    row = {"method": name}
    attention.prepare(functools.partial(methods.SPARSE[name], keep=0.3), [inputs], row)
    # Operators in torch's own form attend to as many rows as there are tokens where there is padding.
    assert row["error"] < 1e-4 and row.get("twin_difference", 0.0) < 1e-6
    assert row["kept"] == pytest.approx(0.3, abs=2e-3)


def test_items_of_an_uneven_batch_keep_different_numbers(load, methods):
    torch.manual_seed(0)
    inputs = methods.make_inputs(small(methods, batch=3, uneven=True), LENGTH, "cpu")
    runner = methods.ours_coverage(inputs, 0.3)
    kept = runner.selected.sum(2)
    assert len(set(kept[:, 0].tolist())) == 3 and (kept == kept[:, :1]).all()
    assert float(kept.double().mean()) == pytest.approx(methods.kept(LENGTH, 0.3), abs=2)
    checks = load("attention_checks")
    checks.check_output(*inputs.tensors, runner.call(), inputs.scale, "uneven", runner.selected, runner.floor)


def test_what_is_compared(methods):
    def names(length, keep):
        return [name for name, share, _ in methods.compared(length, [keep]) if share is not None]

    assert names(8192, 0.08) == ["ours, published", "ours", "ours, CUDA graph"]
    assert names(8192, 0.3) == [name for name in methods.SPARSE if "Coverage" not in name]
    assert names(32768, 0.3) == [*methods.SPARSE]
    assert [name for name, share, _ in methods.compared(16384, [0.3]) if share is None] == ["dense cuDNN"]


def test_every_method_without_a_capture_is_tried_above(methods):
    assert {name for name in methods.SPARSE if "CUDA graph" not in name} == set(names_of_sparse_methods())


def spoilt_row(out):
    out[0, 0, -1] += 0.1


def shifted_rows(out):
    out.copy_(out.roll(1, dims=2))


def not_a_number(out):
    out[0, 0, 0] = torch.nan


@pytest.mark.parametrize("spoil", [spoilt_row, shifted_rows, not_a_number])
def test_a_wrong_output_is_found(load, methods, inputs, spoil):
    checks = load("attention_checks")
    attention = torch.nn.functional.scaled_dot_product_attention
    out = attention(*inputs.tensors, is_causal=True, scale=inputs.scale, enable_gqa=True)
    assert checks.check_output(*inputs.tensors, out, inputs.scale, "dense") < 1e-5
    spoil(out)
    with pytest.raises(checks.WrongOutputError, match="dense"):
        checks.check_output(*inputs.tensors, out, inputs.scale, "dense")


@pytest.mark.parametrize("name", ["SDPA under a mask", "ours"])
def test_methods_over_a_window_pass_their_check(load, inputs, name):
    wrong, windows = load("attention_checks").WrongOutputError, load("windows")
    out = dict(windows.window_methods(inputs, 100))[name]()()
    assert windows.checked_window(inputs, 100, name, out) < 1e-5
    with pytest.raises(wrong, match=name):
        windows.checked_window(inputs, 99, name, out)


def test_the_table_of_windows_says_what_failed(load):
    row = {"shape": "small", "method": "ours", "length": 1024, "ms": 1.5, "memory_gib": 0.25}
    text = load("windows").table([row, {**row, "length": 2048, "failed": "RuntimeError: no"}], "shape", "method")
    assert text.splitlines()[-1] == "| small | ours | 1.5, 0.25 | failed: RuntimeError: no |"


def test_a_row_that_was_not_selected_must_be_zero_without_a_floor(load, methods, inputs):
    checks = load("attention_checks")
    runner = methods.ours_published(inputs, 0.8)
    out = runner.call()
    checks.check_output(*inputs.tensors, out, inputs.scale, "ours", runner.selected)
    dropped = int((~runner.selected[0, 1]).nonzero()[0])
    out[0, 1, dropped, 3] = 1e-30
    with pytest.raises(checks.WrongOutputError, match="1 rows"):
        checks.check_output(*inputs.tensors, out, inputs.scale, "ours", runner.selected)


@pytest.mark.parametrize("computed, assumed", [(None, (256, 16)), ((256, 16), (255, 16)), ((256, 16), (256, 17))])
def test_a_floor_that_is_missing_or_off_by_one_is_found(load, methods, inputs, computed, assumed):
    checks = load("attention_checks")
    runner = methods.ours(inputs, 0.3, computed and Floor(*computed))
    with pytest.raises(checks.WrongOutputError, match="ours"):
        checks.check_output(*inputs.tensors, runner.call(), inputs.scale, "ours", runner.selected, Floor(*assumed))


def test_the_check_equals_attention_under_the_mask_of_the_definition(load, methods):
    """A(i), written out from its definition, as a mask for SDPA."""
    torch.manual_seed(0)
    inputs = methods.make_inputs(small(methods, batch=2), 90, "cpu")
    selected = torch.rand(2, 4, 90) < 0.3
    rows, keys = torch.arange(90)[:, None], torch.arange(90)
    near = (rows - keys < 7) | (keys < 3)
    mask = (near | (selected[..., None] & selected[:, :, None])) & (keys <= rows)
    out = torch.nn.functional.scaled_dot_product_attention(
        *inputs.tensors, mask, scale=inputs.scale, enable_gqa=True
    )  # fmt: skip
    given = (*inputs.tensors, out, inputs.scale, selected)
    assert load("attention_checks").sampled_error(*given, Floor(7, 3), heads=8, rows=80) < 1e-5


def test_every_stage_passes_its_check(load, inputs):
    stages = load("attention_stages").stages(inputs, 0.3)
    assert [stage.name.split(",")[0] for stage in stages] == [
        "score", "budget", "select", "compress", "attend", "floor", "decompress",
    ]  # fmt: skip
    for stage in stages:
        assert stage.check() < 1e-3
        assert stage.work.least_ms > 0
        stage.call()


def test_work_at_128k(load):
    """Against the figures in the kernels' docstrings."""
    stages = load("attention_stages")
    rows, distinct = 65536, 8 * 131072
    sizes = stages.Sizes(1, 32, 8, 131072, rows, 128, 2, distinct)
    assert stages.score_work(sizes).flops == pytest.approx(0.27e12, rel=0.02)
    assert stages.select_work(sizes).bytes == pytest.approx((16 + 8) * 2**20, rel=1e-3)
    assert 2.2 < stages.compress_work(sizes).bytes / 2**30 < 3.0
    assert stages.decompress_work(sizes).bytes / 2**30 == pytest.approx(1.5, rel=0.01)
    floor = stages.floor_work(sizes)
    assert floor.flops == 4 * 32 * 131072 * (256 + 16) * 128
    assert floor.bytes / 2**30 == pytest.approx(2 + 0.5 + 0.5, rel=0.01)
    assert stages.attend_work(sizes).flops == 2 * rows**2 * 32 * 128
    assert stages.attend_work(sizes).rate(57.7) == pytest.approx(610, rel=0.01)


def test_distinct_rows(load):
    indices = torch.tensor([[[0, 1], [1, 2], [5, 6], [5, 6]]], dtype=torch.int32)
    assert load("attention_stages").distinct_rows(indices, 2, 8) == 5


def test_methods_take_turns(load):
    timing = load("attention_timing")
    order = []

    def burst(calls, first, count):
        order.append((calls[0], first, count))
        return calls[0]

    times = timing.take_turns({"fast": [0.5], "slow": [30.0]}, seconds=0.1, burst=burst)
    assert {name: found.ms for name, found in times.items()} == {"fast": 0.5, "slow": 30.0}
    rounds = [order[place : place + 2] for place in range(2, len(order), 2)]
    assert [sorted(found) for found in rounds] == [[(0.5, turn, 20), (30.0, turn, 1)] for turn in range(5)]
    assert len({found[0][0] for found in rounds}) == 2  # not always the same one first
    assert times["slow"].rounds == 5
    order.clear()
    assert timing.take_turns({"slow": [30.0]}, seconds=0.1, settle_ms=100, burst=burst)["slow"].rounds == 5
    assert order[1:4] == [(30.0, 0, 4), (30.0, 0, 1), (30.0, 1, 4)]  # it settles before each of its turns
    assert timing.take_turns({"fast": [0.5]}, seconds=10, burst=burst)["fast"].rounds == 30


@pytest.mark.slow
@pytest.mark.parametrize("count", [200, 129, 128, 50])
def test_block_lists_end_at_the_count(load, methods, count, vectors):
    kernels, checks = load("attention_kernels"), load("attention_checks")
    rows = kernels.make_rows(small(methods, kv_heads=4), count, 512, "cpu")
    with torch.no_grad():
        out = kernels.flex_cut(rows, torch.tensor([count], dtype=torch.int32))()
    valid = (tensor[:, :, :count] for tensor in rows.tensors)
    checks.check_output(*valid, out[:, :, :count], rows.scale, "cut")
    assert (out[:, :, 256:] == 0).all()


def example_run(attention):
    """A run with rows of every kind, one of them failed."""
    run = attention.Run(0.1)
    for length in (4096, 8192):
        rows = [
            {"length": length, "keep": None, "method": "dense cuDNN", "ms": 1.0, "memory_gib": 0.01},
            {"length": length, "keep": None, "method": "FlexAttention", "failed": "RuntimeError: no"},
            {"length": length, "keep": 0.5, "method": "ours", "ms": 0.5, "memory_gib": 0.2, "kept": 0.5},
            {"length": length, "keep": 0.5, "method": "ours, published", "ms": 0.4, "memory_gib": 0.2, "kept": 0.5},
            {"length": length, "keep": 0.15, "method": "ours", "ms": 0.36, "memory_gib": None, "kept": 0.15},
        ]
        attention.set_ratios(rows, ("dense cuDNN",))
        run.parts.setdefault("main", []).extend(rows)
    work = {"gb": 1.0, "gflop": 0.0, "unit": "TB/s", "rate": 2.12, "ceiling": 4.24, "least_ms": 0.25}
    run.parts["stages"] = [
        {"length": 4096, "stage": "score", "ms": 0.6, "gpu_ms": 0.5, "work": work},
        {"length": 4096, "stage": "attend", "ms": 0.6, "gpu_ms": None, "work": work},
        {"length": 4096, "stage": "select", "failed": "wrong output: select"},
        {"length": 4096, "stage": "all, as one op", "ms": 0.6, "gpu_ms": 0.5},
    ]
    run.parts["shapes"] = [
        {"shape": "D=64", "length": 16384, "method": "dense cuDNN", "failed": "RuntimeError: no"},
        {"shape": "D=64", "length": 16384, "method": "dense FlashAttention-2", "ms": 2.0},
        {"shape": "D=64", "length": 16384, "method": "ours", "ms": 1.0, "memory_gib": 0.5},
    ]
    attention.set_ratios(run.parts["shapes"], attention.SDPA)
    run.parts["attend"] = [
        {"count": 16384, "kernel": "cuDNN", "ms": 1.0, "tflops": 600.0},
        {"count": 16384, "kernel": "flex", "failed": "RuntimeError: no"},
    ]
    run.failures = ["FlexAttention: RuntimeError: no"]
    return run


def test_tables(load):
    attention, report = load("attention"), load("attention_report")
    run = example_run(attention)
    text = report.report({"device": "none"}, run.parts, run.failures)
    assert "| ours | 0.5 (0.500) | 0.5 (0.500) |" in text
    assert "| ours / dense cuDNN | keep 0.15 | keep 0.5 |" in text
    assert "| 4K | 0.360 | 0.500 |\n| 8K | 0.360 (goal 0.38) | 0.500 (goal 0.63) |" in text
    assert "0.400 (goal 0.38, missed)" in report.ratio_table(
        [{"length": 8192, "keep": 0.15, "method": "ours", "ms": 0.4, "ratio": 0.4}], "ours"
    )
    assert "| FlexAttention | failed: RuntimeError: no | failed: RuntimeError: no |" in text
    assert "| 4K | score | 0.5000 | 0.6000 | 1.000 |  | 2.12 TB/s | 4.24 TB/s | 0.2500 | 50% |" in text
    assert "| D=64 | 16K | failed: RuntimeError: no | 2 | 1 | 0.500 | 0.50 |" in text
    assert "| cuDNN | 1 ms, 600 TFLOP/s |" in text
    assert "- FlexAttention: RuntimeError: no" in text
    widths = {len(line.split(" | ")) for line in report.stage_table(run.parts["stages"]).splitlines()}
    assert len(widths) == 1


def test_parts_are_measured_and_reported(load, methods, monkeypatch):
    """On a CPU with a clock that shows 1 ms; cuDNN and CUDA graphs are not there, and their cells say so."""
    attention = load("attention")
    clock = functools.partial(
        load("attention_timing").take_turns, at_most=1, burst=lambda calls, first, count: (calls[0](), 1.0)[1]
    )
    monkeypatch.setattr(attention, "take_turns", clock)
    monkeypatch.setattr(attention, "burst_ms", lambda calls, first, count: 1.0)
    monkeypatch.setattr(attention, "graph_ms", lambda calls, once: once)
    monkeypatch.setattr(attention, "peak_of", lambda call: (call(), 0.0))
    shape = small(methods, batch=2, uneven=True)
    monkeypatch.setattr(attention, "input_sets", lambda _, length: [methods.make_inputs(shape, length, "cpu")])
    run, arguments = attention.Run(0.1), attention.parse(["--keep", "0.15", "0.3"])
    run.parts = {"main": [], "stages": [], "shapes": []}
    attention.main_part(run, arguments, 600)
    attention.stages_part(run, arguments, 600)
    attention.shapes_part(run, arguments, (shape, 600))
    assert run.wrong == []
    failed = {row["method"] for part in ("main", "shapes") for row in run.parts[part] if "failed" in row}
    assert failed <= {"dense cuDNN", "dense FlashAttention-2", "ours, CUDA graph", "paper's pipeline, plain torch"}
    text = load("attention_report").report({}, run.parts, [])
    assert "| keep 0.15: ms (ratio to dense cuDNN) | 600 |" in text and "| 600 | floor |" in text
    assert not any("failed" in row for row in run.parts["stages"]) and len(run.parts["stages"]) == 8


@pytest.mark.slow
def test_results_are_written(load, tmp_path):
    pytest.importorskip("matplotlib").use("agg")
    attention = load("attention")
    run = example_run(attention)
    attention.write(tmp_path / "attention", run, {"device": "none"}, "text")
    assert run.failures == ["FlexAttention: RuntimeError: no"]
    assert json.loads((tmp_path / "attention.json").read_text())["main"] == run.parts["main"]
    assert (tmp_path / "attention.png").stat().st_size > 1000


def test_a_failure_is_a_cell_and_a_wrong_output_is_counted(load):
    attention, checks = load("attention"), load("attention_checks")
    run = attention.Run(0.1)
    run.parts["stages"] = []

    def wrong(_):
        raise checks.WrongOutputError("off by one")

    run.add("stages", "score", {"stage": "score"}, wrong, None)
    run.add("stages", "select", {"stage": "select"}, lambda given: given["missing"], {})
    run.add("stages", "attend", {"stage": "attend"}, lambda given: {"ms": given}, 1.0)
    assert [row.get("failed") for row in run.parts["stages"]] == ["wrong output: off by one", "KeyError: 'missing'", None]
    assert len(run.wrong) == len(run.failures) == 1


def test_command_line(load):
    attention = load("attention")
    arguments = attention.parse(["--parts", "shapes", "--lengths", "4096"])
    assert set(attention.parts(arguments)) == {"main", "stages", "shapes", "attend", "behind"}
    assert attention.parts(attention.parse([]))["behind"][1] == [16384, 32768, 65536, 131072]
    assert arguments.keep == [0.08, 0.15, 0.3, 0.5]
    goals = load("attention_report").GOALS
    assert all([*found] == arguments.keep for found in goals.values())
    with pytest.raises(SystemExit):
        attention.parse(["--parts", "nothing"])


# The interpreter computes with numpy, which warns of log2(0) and 0 / 0 in lanes that are masked later.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_chunk_is_measured_beside_the_whole_prompt(load, methods, monkeypatch):
    pytest.importorskip("triton")
    attention, chunks, report = load("attention"), load("attention_behind"), load("attention_report")
    torch.manual_seed(0)
    inputs = methods.make_inputs(small(methods), 700, "cpu")
    found = {method.name: method for method in chunks.behind_methods(inputs, 0.3, rows=300)}
    assert max(method.check() for method in found.values()) < 1e-5
    width, heads = 16 + 16, 4
    assert found[chunks.WHOLE].flops == width * heads * 700**2
    assert found['chunk, kernel="triton"'].flops == width * heads * (700**2 - 400**2)
    whole, chunk = (found[name].flops for name in ("kept rows, cuDNN", chunks.KEPT))
    assert 0.2 * whole < chunk < whole  # of the kept rows those of the chunk, with its whole window

    timing = load("attention_timing").Timing(2.0, 1.0, 3.0, 5)
    monkeypatch.setattr(attention, "take_turns", lambda calls, seconds: dict.fromkeys(calls, timing))
    monkeypatch.setattr(attention, "behind_methods", lambda *_: [*found.values()])
    monkeypatch.setattr(attention, "make_inputs", lambda *_: inputs)
    run = attention.Run(0.1)
    run.parts["behind"] = []
    attention.behind_part(run, attention.parse([]), 16384)
    rows = {row["method"]: row for row in run.parts["behind"]}
    assert rows[chunks.KEPT]["model_rate"] == round(found[chunks.KEPT].model_ms / 2.0, 3) > 0
    table = report.behind_table(run.parts["behind"])
    assert f"BEHIND_RATE of costs/calls.py by these: {rows[chunks.KEPT]['model_rate']:.2f}" in table and "| 16K |" in table


def test_a_chunk_that_is_computed_wrongly_is_found(load, methods, monkeypatch):
    pytest.importorskip("triton")
    checks, chunks = load("attention_checks"), load("attention_behind")
    inputs = methods.make_inputs(small(methods), 400, "cpu")
    right = chunks.merged
    monkeypatch.setattr(chunks, "merged", lambda *parts: (right(*parts)[0].roll(1, 2), right(*parts)[1]))
    (merge,) = (method for method in chunks.behind_methods(inputs, 0.3, rows=150) if "merge of" in method.name)
    with pytest.raises(checks.WrongOutputError, match="merge of two results"):
        merge.check()


# The interpreter computes with numpy, which warns of log2(0) and 0 / 0 in lanes that are masked later.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.exhaustive
def test_memcheck_launches_every_kernel(load, monkeypatch):
    pytest.importorskip("triton")
    memcheck = load("memcheck")
    launches = memcheck.record(monkeypatch.setattr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Tiles by TMA need a number of rows that the stride divides.
    case = replace(memcheck.CASES[3], length=140, capacity=136, window=5, dim=32, value_dim=32)
    memcheck.run(case, device)
    memcheck.run_chunk(case, device)
    assert [name for name, count in launches.items() if count == 0] == []


@pytest.mark.exhaustive
def test_architectures_are_examined(load, tmp_path, capsys):
    models = load("models")
    assert models.main(["--models", "llama", "bert", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "models.json").read_text())
    counts = {"architectures": 2, "ran": 2, "wrong": 0, "exact gain": 1, "can be sparse": 1, "in chunks": 1}
    counts |= {"ran uncompiled": 2, "sparse uncompiled": 1}
    assert {name: value for name, value in found["conditions"].items() if name in counts or "image" in name} == counts
    text = (tmp_path / "models.md").read_text()
    assert "| llama | sdpa | 2 dense (padding) | 2 sparse | sparse | 2 sparse |  |" in text
    assert "| bert | sdpa | 2 unchanged | 2 unchanged | - | 2 unchanged | NOT_CAUSAL |" in capsys.readouterr().out
    row = found["rows"][0]
    assert models.is_wrong(row | {"exact": row["exact"] | {"difference": 0.1}}) and models.is_wrong(
        {"failed": "exact: KeyError"}
    )
    torchs_own = row | {"exact": row["exact"] | {"difference": 0.1, models.PLAIN: 0.0}}
    assert not models.is_wrong(torchs_own) and "1e-01 (plain torch.compile too)" in models.table([torchs_own])
    assert models.is_wrong(row | {models.UNCOMPILED: row[models.UNCOMPILED] | {"difference": float("nan")}})
    with pytest.raises(SystemExit):
        models.main(["--models", "no-such-model"])


@pytest.mark.exhaustive
def test_architectures_with_images_are_examined(load, tmp_path):
    """PaliGemma's images are seen from both sides; its prompt without a mask means something else once it is compiled."""
    assert load("models").main(["--images", "--models", "paligemma", "--out", str(tmp_path)]) == 0
    row = next(line for line in (tmp_path / "image_models.md").read_text().splitlines() if line.startswith("| paligemma"))
    assert "| 2 dense (padding) | 2 sparse | sparse | 5 unchanged | 4 unchanged | MASK_OPAQUE, NOT_CAUSAL" in row
    assert row.endswith("(plain torch.compile too) |")


def test_engines_of_vllm_are_compared_by_their_settings(load):
    """Rows of the same settings are replaced; only lengths that both kinds of attention have are in the table."""
    serve = load("vllm_serve")
    row = dict(
        device="GPU", vllm="0", shape="8b", layers=None, tensor_parallel=1, batch=8192, eager=False, length=32768,
        attention="dense", first_token_s=3.0, decode_tokens_per_s=90.0,
    )  # fmt: skip
    sparse, slower = {**row, "attention": "sparse", "first_token_s": 1.5}, {**row, "first_token_s": 6.0}
    longer = {**row, "length": 131072}
    rows = serve.merged(serve.merged([row, longer], [sparse]), [slower])
    assert rows == [longer, sparse, slower]
    assert "| 32,768 | 1 GPU | 8,192 | 6.00 | 1.50 | 4.00x | 90.0 | 90.0 |" in serve.table(rows)
    assert "131,072" not in serve.table(rows)
