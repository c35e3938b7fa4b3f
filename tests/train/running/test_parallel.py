"""One run spread over processes is the same run: losses, gradient norms, weights, checkpoints."""

import csv
import shutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tests.train.conftest import PARITY, TINY
from train.cli import main, make_parser
from train.lit import GPTModule
from train.proof.parity import train_arm
from train.proof.verdict import ArmRun, Rule, gap, judge
from train.running.parallel import Parallel, SequenceShard
from train.running.ranks import in_ranks

Fault = Callable[[pytest.MonkeyPatch], None]


def summed_gradients(patch: pytest.MonkeyPatch) -> None:
    """What comes of a mean over 2 ranks that is none."""
    patch.setattr(GPTModule, "backward", lambda self, loss: (2 * loss).backward())


def local_positions(patch: pytest.MonkeyPatch) -> None:
    """Every rank takes its part for the beginning of the sequence."""

    def positions(self: SequenceShard, length: int, device: torch.device) -> Tensor:
        return torch.arange(length, device=device)

    patch.setattr(SequenceShard, "positions", positions)


def wrong_placement(patch: pytest.MonkeyPatch) -> None:
    """Tokens are placed in zigzag, and attention thinks they are not."""
    attend = SequenceShard.attend

    def misplaced(self: SequenceShard, *qkv: Tensor, **options: Any) -> Tensor:
        return attend(SequenceShard(self.group, "ring", "contiguous"), *qkv, **options)

    patch.setattr(SequenceShard, "attend", misplaced)


def same_rows(patch: pytest.MonkeyPatch) -> None:
    """Both ranks train on the first half of the batch."""

    def first_rows(batch: Tensor, grid: DeviceMesh) -> Tensor:
        return batch[: len(batch) // 2]

    patch.setattr("train.lit.own_rows", first_rows)


def traced(patch: pytest.MonkeyPatch) -> None:
    """No fault: compiled, but without the minute that a C++ compiler takes."""
    compile_ = torch.nn.Module.compile
    patch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="aot_eager"))


@dataclass(frozen=True)
class Arm:
    """How one GPT is trained: spread so, with these options, with this fault."""

    layout: Parallel = field(default_factory=Parallel)
    options: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None


DDP, FSDP, CONTEXT = Parallel(data=2), Parallel(data=2, shard=True), Parallel(context=2)
RECOMPUTED = {"model.checkpoint_activations": True}
COMPILED = {"model.compile": True}
BF16 = {"trainer.precision": "bf16-mixed"}

# By number of ranks: what must agree with one process.
SOUND: dict[int, dict[str, Arm]] = {
    1: {"flash": Arm(), "recomputed": Arm(options=RECOMPUTED)},
    2: {
        "ddp": Arm(DDP),
        "fsdp": Arm(FSDP),
        "context": Arm(CONTEXT),
        "contiguous": Arm(Parallel(context=2, placement="contiguous")),
        "ulysses": Arm(Parallel(context=2, attention="ulysses")),
        "fsdp context recomputed": Arm(Parallel(context=2, shard=True), RECOMPUTED),
        "context compiled": Arm(CONTEXT, COMPILED, traced),
        "fsdp compiled recomputed": Arm(FSDP, COMPILED | RECOMPUTED, traced),
    },
    4: {
        "data x context": Arm(Parallel(data=2, context=2)),
        "data x context fsdp": Arm(Parallel(data=2, context=2, shard=True)),
    },
}
FAULTY = {
    "ddp, gradients summed": Arm(DDP, fault=summed_gradients),
    "fsdp, gradients summed": Arm(FSDP, fault=summed_gradients),
    "ddp, the same rows": Arm(DDP, fault=same_rows),
    "context, local positions": Arm(CONTEXT, fault=local_positions),
    "context, wrong placement": Arm(CONTEXT, fault=wrong_placement),
}
# Held against one process in bf16.
HALF = {"ddp": Arm(DDP, BF16), "fsdp": Arm(FSDP, BF16), "context": Arm(CONTEXT, BF16)}
AGAIN = {name: SOUND[2][name] for name in ("ddp", "fsdp", "context")}


@pytest.fixture(scope="module")
def config(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Namespace:
    """The tiny proof."""
    path = tmp_path_factory.mktemp("parallel") / "parity.yaml"
    path.write_text(textwrap.dedent(TINY + PARITY))
    arguments = ["parity", "--config", str(path), "--data.corpus", f"files:{text}"]
    return make_parser().parse_args(arguments).parity


@pytest.fixture(scope="module", autouse=True)
def ranks_find_the_cache(datasets_cache: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(datasets_cache))
        yield


def train_arms(config: Namespace, arms: dict[str, Arm]) -> dict[str, ArmRun]:
    """On every rank: train arm after arm."""
    runs = {}
    for name, arm in arms.items():
        changed = config.clone()
        changed.parallel = Namespace(asdict(arm.layout))
        changed.update(Namespace(arm.options))
        with pytest.MonkeyPatch.context() as patch:
            if arm.fault is not None:
                arm.fault(patch)
            runs[name] = train_arm(changed, "flash")
    return runs


@pytest.fixture(scope="module")
def alone(config: Namespace) -> dict[str, ArmRun]:
    """On this process: what the others are held against."""
    runs = {arm: train_arm(config, arm) for arm in ("standard", "control")}
    return runs | train_arms(config, SOUND[1] | {"flash in bf16": Arm(options=BF16)})


@pytest.fixture(scope="module")
def on_two(config: Namespace) -> dict[str, ArmRun]:
    again = {f"{name}, again": arm for name, arm in AGAIN.items()}
    half = {f"{name} in bf16": arm for name, arm in HALF.items()}
    return in_ranks(2, train_arms, config, SOUND[2] | FAULTY | half | again)


@pytest.fixture(scope="module")
def on_four(config: Namespace) -> dict[str, ArmRun]:
    return in_ranks(4, train_arms, config, SOUND[4])


def failures(name: str, runs: dict[str, ArmRun], alone: dict[str, ArmRun]) -> list[str]:
    """The checks that the arm fails, judged as flash is in the proof."""
    judged = {"standard": alone["standard"], "control": alone["control"], "flash": runs[name]}
    checks = judge(judged, Rule(min_fall=0.05))
    return [check["check"] for check in checks if not check["passed"]]


@pytest.mark.parametrize("name", SOUND[1])
def test_the_judge_passes_one_process(name: str, alone: dict[str, ArmRun]) -> None:
    assert failures(name, alone, alone) == []


@pytest.mark.parametrize("name", SOUND[2])
def test_two_processes_train_as_one(
    name: str, on_two: dict[str, ArmRun], alone: dict[str, ArmRun]
) -> None:
    assert failures(name, on_two, alone) == []


@pytest.mark.parametrize("name", SOUND[4])
def test_four_processes_train_as_one(
    name: str, on_four: dict[str, ArmRun], alone: dict[str, ArmRun]
) -> None:
    assert failures(name, on_four, alone) == []


@pytest.mark.parametrize("name", HALF)
def test_in_bf16_they_differ_as_two_roundings_do(
    name: str, on_two: dict[str, ArmRun], alone: dict[str, ArmRun]
) -> None:
    judged = {
        "standard": alone["flash in bf16"],
        "flash": on_two[f"{name} in bf16"],
        "control": alone["flash"],
    }
    # Each is as far from fp32 as bf16 makes it, so they are at most twice as far from each other.
    checks = judge(judged, Rule(control_factor=2.0, max_loss_gap=None, min_fall=0.05))
    assert [check for check in checks if not check["passed"]] == []
    assert gap(judged["flash"], alone["flash"])["max"] > 1e-4


@pytest.mark.parametrize("name", FAULTY)
def test_planted_faults_fail(
    name: str, on_two: dict[str, ArmRun], alone: dict[str, ArmRun]
) -> None:
    failed = failures(name, on_two, alone)
    # A gap, and nothing else: weights and batches are the same, and it trains.
    assert failed
    assert all("gap" in words for words in failed)


@pytest.mark.parametrize("name", AGAIN)
def test_twice_is_the_same_to_the_bit(name: str, on_two: dict[str, ArmRun]) -> None:
    def numbers(run: ArmRun) -> list[tuple]:
        return [(row["train_loss"], row["val_loss"], row["grad_norm"]) for row in run.rows]

    assert numbers(on_two[f"{name}, again"]) == numbers(on_two[name])


def curve(name: str) -> dict[int, dict[str, float]]:
    """What the run has logged, by step."""
    found: dict[int, dict[str, float]] = {}
    with Path(f"runs/{name}/metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            numbers = {column: float(value) for column, value in row.items() if value}
            found.setdefault(int(row["step"]), {}).update(numbers)
    return found


def weights(name: str) -> Tensor:
    saved = torch.load(f"runs/{name}/checkpoints/last.ckpt", weights_only=True)
    return torch.cat([weight.flatten() for weight in saved["state_dict"].values()])


def test_a_run_goes_on_under_another_layout(
    fit_arguments: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """With gradient accumulation, and a look at the attention."""
    arguments = [
        *fit_arguments,
        "--trainer.accumulate_grad_batches=2",
        "--trainer.log_every_n_steps=1",
        "--checkpoint.every_n_steps=4",
        "--checkpoint.keep=9",
        "--insight.attention=true",
        "--insight.every=2",
    ]
    assert main(arguments) == 0
    assert main([*arguments, "--name=control", "--model.gpt.attention=control"]) == 0
    shutil.copytree("runs/tiny", "runs/moved")
    for step, options in (
        (4, ["--parallel.data=2", "--parallel.shard=true"]),
        (8, ["--parallel.context=2"]),
    ):
        for path in Path("runs/moved/checkpoints").glob("step-*.ckpt"):
            if int(path.stem[-8:]) > step:
                path.unlink()
        capfd.readouterr()
        assert main([*arguments, "--name=moved", *options]) == 0
        assert f"from step {step} on" in capfd.readouterr().out

    alone, moved, control = (curve(name) for name in ("tiny", "moved", "control"))
    logged = ("train_loss", "val_loss", "grad_norm", "attention_entropy/layer_1")
    for name in logged:
        steps = [step for step in alone if name in alone[step]]
        assert steps == [step for step in moved if name in moved[step]]
        gaps = [
            max(abs(run[step][name] - alone[step][name]) for step in steps)
            for run in (moved, control)
        ]
        assert gaps[0] <= 10 * gaps[1] + 5e-6, name
    drift, rounding = (
        (weights(name) - weights("tiny")).abs().max() for name in ("moved", "control")
    )
    assert drift <= 10 * rounding

    sample = ["sample", "--checkpoint=runs/moved/checkpoints/last.ckpt", "--count=5"]
    assert main([*sample, "--prompt=def "]) == 0
    assert capfd.readouterr().out.startswith("def ")
