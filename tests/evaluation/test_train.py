"""Training the study's model: the ladder's rules, what a step computes, cuts and resumption, the command."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tsa_compile.evaluation import tasks

FOLDER = Path(__file__).parents[2] / "benchmarks" / "accuracy"
MODULES = {"checkpoint", "ladder", "modeling_recall", "starts", "train", "trainer", "training_report"}
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
TWO = ("mqar", "niah_single")


@pytest.fixture(scope="module")
def load():
    """Imports a file of benchmarks/accuracy as its neighbours do: by name, from the folder."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in MODULES & set(sys.modules):
        del sys.modules[name]


@pytest.fixture(scope="module")
def ladder(load):
    return load("ladder")


@pytest.fixture(scope="module")
def trainer(load):
    return load("trainer")


@pytest.fixture
def small_vocabulary(monkeypatch):
    """8 keys, 8 values, 8 kinds of noise: with 1,024 of each, learning them takes most of the time."""
    monkeypatch.setattr(tasks, "KEYS", range(16, 24))
    monkeypatch.setattr(tasks, "VALUES", range(24, 32))
    monkeypatch.setattr(tasks, "NOISE", range(32, 40))


@pytest.fixture
def make(trainer, ladder, tmp_path):
    """A tiny trainer in a folder."""

    def made(folder="run", rules=(), **settings):
        defaults = dict(tokens=512, sizes=SIZES, tasks=TWO, held_out=2, evaluate_every=3)
        chosen = dict(lengths=(128, 256), floor=3, cap=6, warmup=2, decay=4, steps=20) | dict(rules)
        return trainer.Trainer(trainer.Settings(**(defaults | settings)), ladder.Rules(**chosen), tmp_path / folder)

    return made


# The ladder


def test_a_rung_is_left_when_the_worst_task_reaches_the_target(ladder):
    climb = ladder.Ladder(ladder.Rules(lengths=(128, 512, 2048), floor=10, cap=1000))
    assert climb.observe(9, 1.0, {"a": 1.0, "b": 1.0}) is None  # the floor
    assert climb.observe(10, 1.0, {"a": 1.0, "b": 0.98}) is None  # the worst
    assert climb.observe(20, 1.0, {"a": 0.99, "b": 0.99}) == "target"
    assert (climb.rung, climb.top, climb.phase) == (1, 512, "climb")
    assert climb.observe(29, 1.0, {"a": 1.0, "b": 1.0}) is None  # the floor counts anew
    assert climb.observe(30, 2.0, {"a": 1.0, "b": 1.0}) == "target"
    assert climb.observe(40, 3.5, {"a": 1.0, "b": 1.0}) == "target"
    assert (climb.top, climb.phase, climb.decay_start) == (2048, "decay", 40)
    assert climb.observe(50, 4.0, {"a": 1.0, "b": 1.0}) is None  # nothing left to leave
    assert [(rung["length"], rung["steps"], rung["took_s"]) for rung in climb.rungs] == [
        (128, 20, 1.0),
        (512, 10, 1.0),
        (2048, 10, 1.5),
    ]


def test_a_task_that_is_never_learnt_cannot_hold_the_ladder(ladder):
    climb = ladder.Ladder(ladder.Rules(lengths=(128, 512), floor=10, cap=50, decay=20))
    reasons = [climb.observe(step, 0.0, {"a": 0.0}) for step in range(10, 101, 10)]
    assert reasons == [None] * 4 + ["cap"] + [None] * 4 + ["cap"]
    climb.tick(119, 0.0, 0.0)
    assert climb.phase == "decay"
    climb.tick(120, 0.0, 0.0)
    assert climb.phase == "done"


def test_a_rung_takes_its_share_of_the_minutes_left_at_most(ladder):
    climb = ladder.Ladder(ladder.Rules(lengths=(128, 512, 2048), minutes=10, share=0.4))
    assert climb.observe(100, 239.0, {"a": 0.5}) is None
    assert climb.observe(200, 240.0, {"a": 0.5}) == "share"  # of 600 s
    assert climb.observe(300, 383.0, {"a": 0.5}) is None
    assert climb.observe(400, 384.0, {"a": 0.5}) == "share"  # of 360 s
    assert climb.observe(500, 509.0, {"a": 0.5}) is None  # the last may take what is left


@pytest.mark.parametrize(
    "rules, step, seconds, each, expected",
    [
        (dict(minutes=10, decay=300), 1000, 509.0, 0.1, None),
        (dict(minutes=10, decay=300), 1000, 510.0, 0.1, 300),  # 15% of the time, and as many steps as were asked for
        (dict(minutes=10, decay=300), 1000, 510.0, 0.9, 90),  # or as many as fit, with a reserve
        (dict(minutes=10, decay=300), 0, 599.9, 5.0, 1),
        (dict(steps=1000, decay=300), 699, 1e9, 1.0, None),
        (dict(steps=1000, decay=300), 700, 1e9, 1.0, 300),
        (dict(), 10**9, 1e9, 1.0, None),
    ],
)
def test_the_rate_falls_before_the_end(ladder, rules, step, seconds, each, expected):
    climb = ladder.Ladder(ladder.Rules(warmup=100, **rules))
    climb.tick(step, seconds, each)
    assert climb.phase == ("climb" if expected is None else "decay")
    if expected is None:
        assert climb.rate(step) == 1.0
        return
    assert climb.decay_steps == expected
    rates = [climb.rate(step + index) for index in range(expected)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == min(1.0, (step + 1) / 100)
    assert rates[-1] <= math.sin(math.pi / 2 / expected) ** 2 + 1e-12
    climb.tick(step + expected, seconds, each)
    assert climb.phase == "done"


def test_lengths_depend_on_rung_and_step_alone_and_shorter_ones_stay(ladder):
    rules = ladder.Rules(own=0.7)
    assert {ladder.Ladder(rules).length(step) for step in range(200)} == {128}
    climb = ladder.Ladder(rules, rung=2)
    drawn = [climb.length(step) for step in range(2000)]
    assert drawn == [ladder.Ladder(rules, rung=2, entered_step=7).length(step) for step in range(2000)]
    shares = {length: drawn.count(length) / 2000 for length in sorted(set(drawn))}
    assert shares == pytest.approx({128: 0.15, 512: 0.15, 2048: 0.7}, abs=0.03)


@pytest.mark.parametrize("wrong", [dict(lengths=()), dict(lengths=(512, 128)), dict(lengths=(8, 8)), dict(steps=300)])
def test_rules_that_cannot_be_kept_are_refused(ladder, wrong):
    with pytest.raises(ValueError, match="is not allowed"):
        ladder.Rules(**wrong)


# A step


def test_tasks_share_the_samples_evenly_and_what_is_left_goes_round(make):
    run = make(tasks=tasks.TASKS, tokens=1024)  # 8 samples of 128 for 6 tasks
    counts = torch.stack([torch.bincount(run.batch(step, 128)[2], minlength=6) for step in range(3)])
    assert counts.sum(1).tolist() == [8] * 3
    assert counts.sum(0).tolist() == [4] * 6
    tokens, labels, _ = run.batch(1, 128)
    again = run.batch(1, 128)
    assert torch.equal(tokens, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(tokens, run.batch(2, 128)[0])
    assert run.batch(0, 1024)[0].shape == (1, 1024)  # fewer samples than tasks


@pytest.mark.parametrize("shift", [True, False])
def test_the_loss_is_that_of_the_whole_model_at_the_labels(make, shift):
    run = make(tasks=("mqar", "niah_single", "variable_tracking"), token_shift=shift)
    tokens, labels, task = run.batch(0, 128)  # 4 samples
    logits = run.model(input_ids=tokens, use_cache=False).logits
    means = []
    for kind in range(3):
        chosen = labels[task == kind], logits[task == kind]
        means.append(torch.nn.functional.cross_entropy(chosen[1].flatten(0, 1), chosen[0].flatten(), ignore_index=-100))
    torch.testing.assert_close(run.loss(tokens, labels, task), torch.stack(means).mean())


def test_a_sample_is_right_when_all_its_labels_are(make, monkeypatch):
    run = make(held_out=4)
    answers = run.answers

    def oracle(tokens, labels):
        _, targets, samples = answers(tokens, labels)
        logits = torch.nn.functional.one_hot(targets, 4096).float()
        if tokens[0, -3] == tasks.QUERY and (labels[0] >= 0).sum() == 16:  # mqar: the first of its labels is missed
            logits[0] = 0
        return logits, targets, samples

    monkeypatch.setattr(run, "answers", oracle)
    assert run.evaluate(128) == {
        "labels": {"mqar": round(63 / 64, 4), "niah_single": 1.0}, "samples": {"mqar": 0.75, "niah_single": 1.0},
    }  # fmt: skip


def test_held_out_samples_are_no_training_samples(make, trainer, monkeypatch):
    run = make()
    seeds = []
    generate = run._generate
    monkeypatch.setattr(run, "_generate", lambda counts, length, seed: seeds.append(seed) or generate(counts, length, seed))
    run.evaluate(128)
    run.batch(5, 128)
    assert seeds[-1] == trainer.TRAINING + 5
    assert min(seeds) >= trainer.HELD_OUT and max(seeds[:-1]) < trainer.TRAINING  # and a study's are below both


def test_masters_keep_what_bfloat16_would_lose(trainer):
    """The same updates as AdamW's on a float32 model, though each is below the resolution of the weights."""
    settings = trainer.Settings(weight_decay=0.1, clip=1e9)
    torch.manual_seed(0)
    narrow, wide = torch.nn.Linear(4, 4, dtype=torch.bfloat16), torch.nn.Linear(4, 4)
    wide.load_state_dict(narrow.state_dict())
    groups = [{"params": [wide.weight]}, {"params": [wide.bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-4, betas=settings.betas, weight_decay=0.1)
    optimizer = trainer.MasterAdamW(narrow, settings)
    gradients = [[torch.randn_like(parameter).sign() for parameter in narrow.parameters()] for _ in range(20)]
    for gradient in gradients:
        for parameter, other, value in zip(narrow.parameters(), wide.parameters(), gradient, strict=True):
            parameter.grad, other.grad = value.clone(), value.float()
        optimizer.step(1e-4)
        reference.step()
        assert all(parameter.grad is None for parameter in narrow.parameters())
    for parameter, master, wanted in zip(narrow.parameters(), optimizer.masters, wide.parameters(), strict=True):
        torch.testing.assert_close(master, wanted.detach())
        assert torch.equal(parameter, master.to(torch.bfloat16))


def test_gradients_are_clipped_together(make):
    run = make(clip=1e-3)
    run.loss(*run.batch(0, 128)).backward()
    norm = run.optimizer.step(0.0)
    assert norm > 1e-2
    clipped = torch.stack([master.grad.norm() for master in run.optimizer.masters]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)


# The run


def weights(run):
    return [
        *run.optimizer.masters,
        *(value for state in run.optimizer.adamw.state_dict()["state"].values() for value in state.values()),
    ]


def log(run):
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    clock = ("seconds", "tokens_per_s", "took_s")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def test_a_run_that_was_cut_twice_equals_one_that_was_not(make, monkeypatch):
    """Bit for bit: weights, moments, ladder and log. Once it is cut within a step, once while it saves."""
    whole = make("whole")
    assert whole.run()
    assert [line["kind"] for line in log(whole)].count("rung") == 2  # both rungs were left, both lengths trained on
    assert whole.ladder.phase == "done"

    first = make("cut")
    step = first.train_step

    def cut_within():
        if first.step == 8:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(first, "train_step", cut_within)
    with pytest.raises(KeyboardInterrupt):
        first.run(save_every=0.0 if first.step < 5 else 1e9)
    with (first.folder / "log.jsonl").open("a") as file:
        file.write('{"step": 9, "kind": "st')

    second = make("cut")
    assert second.step == 8
    save = torch.save

    def cut_while_saving(state, file):
        if state["step"] == 13:
            file.write(b"half of it")
            raise KeyboardInterrupt
        save(state, file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch, "save", cut_while_saving)
        second.run(save_every=0.0)

    third = make("cut")
    assert third.step == 12
    assert third.run()
    assert all(torch.equal(found, wanted) for found, wanted in zip(weights(third), weights(whole), strict=True))
    assert all(map(torch.equal, third.model.parameters(), whole.model.parameters()))
    assert log(third) == log(whole)


def test_a_pause_saves_and_a_finished_run_stays_as_it_is(make):
    run = make()
    assert not run.run(pause_after=0.0)
    assert (run.folder / "state.pt").exists()
    again = make()
    assert again.run() and again.step > 0
    before, steps = weights(again), again.step
    more = make()
    assert more.run() and more.step == steps
    assert all(map(torch.equal, weights(more), before))


def test_training_starts_from_a_checkpoint(make, load, tmp_path):
    first = make("first")
    folder = load("checkpoint").save_checkpoint(first.model, tmp_path / "checkpoint")
    rounded = [parameter.to(torch.bfloat16).float() for parameter in first.model.parameters()]
    assert all(map(torch.equal, make("second", start=str(folder), seed=1).model.parameters(), rounded))
    with pytest.raises(RuntimeError, match="shift"):  # not into a model of another kind
        make("third", start=str(folder), token_shift=False)


def test_other_settings_are_not_gone_on_with(make):
    make().run(pause_after=0.0)
    with pytest.raises(ValueError, match="other settings"):
        make(learning_rate=1.0)
    make(rules=dict(steps=30))  # a limit may change


def test_a_loss_that_is_not_finite_ends_the_run(make):
    run = make()
    with torch.no_grad():
        run.model.model.norm.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss at step 1 is nan; lower the learning rate"):
        run.run()


def test_minutes_end_a_run(make):
    run = make(rules=dict(minutes=1e-6, steps=None))
    assert run.run()
    assert run.step <= 1


@pytest.mark.usefixtures("small_vocabulary")
def test_the_model_learns_to_use_its_context(make):
    """With 8 values, log 8 = 2.1 is the loss of a model that knows them all but not which was planted."""
    run = make(
        tasks=("niah_single",), tokens=2048, learning_rate=1e-2, held_out=64, evaluate_every=1000,
        rules=dict(lengths=(128,), steps=80, decay=10, cap=1000, warmup=10),
        sizes=SIZES | dict(vocab_size=40, hidden_size=64, num_hidden_layers=1, head_dim=32),
    )  # fmt: skip
    run.run()
    losses = [line["loss"] for line in log(run) if line["kind"] == "step"]
    assert losses[0] > 3.5
    assert losses[-1] < 1.5
    assert run.last_evaluation["labels"]["niah_single"] > 0.5  # a guess is right once in 8


# The command and what it writes


def test_the_command_trains_writes_and_exports(load, tmp_path, capsys):
    options = (
        "--device cpu --tokens 256 --lengths 128 256 --tasks mqar --steps 6 --decay 2 --floor 1 --cap 2 --evaluate-every 2"
    )
    sizes = [f"{name}={number}" for name, number in SIZES.items()]
    command = ["--out", str(tmp_path), *options.split(), "--size", *sizes]
    load("train").main([*command, "--pause", "0"])
    assert "paused at step 0" in capsys.readouterr().out
    load("train").main(command)
    facts = json.loads((tmp_path / "training.json").read_text())
    assert facts == json.loads((tmp_path / "checkpoint" / "training.json").read_text())
    assert facts["phase"] == "done" and facts["steps"] == 6
    assert [rung["reason"] for rung in facts["rungs"]] == ["cap", "cap"]
    assert [column["length"] for column in facts["final"]] == [128, 256]
    assert (tmp_path / "training.png").stat().st_size > 0
    assert (tmp_path / "training.md").read_text() in capsys.readouterr().out
    assert load("checkpoint").load_checkpoint(tmp_path / "checkpoint").config.hidden_size == 32


@pytest.mark.parametrize(
    "options, message",
    [
        pytest.param([], "no CUDA device was found", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has one")),
        (["--device", "cpu", "--tokens", "8192"], "less than one sample of the longest length, 16384"),
        (["--device", "cpu", "--size", "depth=3"], "expected NAME=N with a name of vocab_size, hidden_size"),
        (["--device", "cpu", "--size", "hidden_size=wide"], "expected NAME=N"),
        (["--device", "cpu", "--lengths", "512", "128"], "they must ascend"),
    ],
)
def test_a_wrong_command_ends_in_one_line(load, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        load("train").main(["--out", str(tmp_path / "run"), *options])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_the_estimate_counts_what_a_step_computes(load, make):
    """Against torch's own counter, on plain attention: whole rows, not causal halves, no recomputation backward."""
    run = make(tokens=512)
    batch = run.batch(0, 256)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run.loss(*batch).backward()
    rows = int((batch[1] >= 0).sum())
    head_and_shift = 6 * 32 * (rows * 4096 + 512 * 32)
    sizes = load("checkpoint").SIZES | SIZES
    plain = load("training_report").step_flops(sizes, 512, 2 * 256 * 3 / 3.5)
    assert counter.get_total_flops() - head_and_shift == pytest.approx(plain, rel=1e-4)


def test_the_documented_costs_are_those_of_the_formula(load):
    report, sizes = load("training_report"), load("checkpoint").SIZES
    lengths = load("ladder").Rules().lengths
    flops = [report.step_flops(sizes, load("trainer").Settings().tokens, length) for length in lengths]
    cells = {
        line.split("|")[1].strip(): line.split("|")[2:-1]
        for line in load("train").__doc__.splitlines()
        if line.startswith("|")
    }
    assert [cell.strip() for cell in cells["length"]] == [report.size_of(length) for length in lengths]
    assert [int(cell) for cell in cells["TFLOP a step"]] == [round(count / 1e12) for count in flops]
    assert [int(cell) for cell in cells["ms a step"]] == [round(1e3 * count / report.FLOPS) for count in flops]
