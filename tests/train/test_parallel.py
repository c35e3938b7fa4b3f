"""One run spread over processes is the same run: losses, gradient norms, weights, checkpoints."""

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
from train.cli import make_parser
from train.lit import GPTModule
from train.parallel import Parallel, SequenceShard
from train.parity import train_arm
from train.ranks import in_ranks
from train.verdict import ArmRun, Rule, judge

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


@dataclass(frozen=True)
class Arm:
    """How one GPT is trained: spread so, with these options, with this fault."""

    layout: Parallel = field(default_factory=Parallel)
    options: dict[str, Any] = field(default_factory=dict)
    fault: Fault | None = None


DDP, FSDP, CONTEXT = Parallel(data=2), Parallel(data=2, shard=True), Parallel(context=2)
RECOMPUTED = {"model.checkpoint_activations": True}
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
    return runs | train_arms(config, SOUND[1])


@pytest.fixture(scope="module")
def on_two(config: Namespace) -> dict[str, ArmRun]:
    again = {f"{name}, again": arm for name, arm in AGAIN.items()}
    return in_ranks(2, train_arms, config, SOUND[2] | FAULTY | again)


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
