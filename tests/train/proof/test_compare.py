"""Runs laid over each other: what is shared, what is missing, and mistakes told in a sentence."""

from pathlib import Path

import pytest

from tests.train.test_cli import told_by
from train.cli import main
from train.proof.compare import largest_gap, read_runs


def write(path: Path, columns: str, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([columns, *rows]) + "\n")


@pytest.fixture
def runs(working_directory: Path) -> None:
    """Two runs of fit that log at other steps, and a proof of two arms."""
    write(
        Path("runs/a/metrics.csv"),
        "grad_norm,mfu,peak_memory_bytes,step,tokens_per_second,train_loss,val_loss",
        "1.5,0.2,1048576,1,100,4.0,",
        "1.0,0.4,2097152,3,300,3.0,",
        ",,,3,,,2.5",
        "0.5,0.3,2097152,5,200,2.0,",
        ",,,5,,,2.75",
    )
    write(Path("runs/b/metrics.csv"), "step,train_loss", "2,9", "3,3.5", "5,1.875", "7,1")
    write(
        Path("runs/proof/metrics.csv"),
        "arm,step,train_loss,val_loss,grad_norm,tokens_per_second,peak_memory_bytes",
        "standard,4,3.25,,1,10,1048576",
        "flash,4,3.5,2.25,1,20,1048576",
    )


@pytest.mark.usefixtures("runs")
def test_the_table_holds_what_was_logged(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "runs/a", "runs/b", "runs/proof", "--out", "here"]) == 0
    printed = capsys.readouterr().out
    page = Path("here/compare.md").read_text()
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in page.splitlines() if "|" in line]
    a, b, standard, flash = rows[2:]
    assert a[:7] == ["a", "6", "2.0000", "2.7500", "2.5000", "200", "30.0%"]
    assert a[7:] == ["2 MiB", "-", "-"]
    # Steps 3 and 5 as Lightning counts are after 4 and 6 updates; only there both have a loss.
    assert b == ["b", "8", "1.0000", *"-----", "0.5 (step 4)", "-"]
    # Which is what the proof counts.
    assert standard[0] == "proof/standard"
    assert standard[-2:] == ["0.25 (step 4)", "-"]
    assert flash[-2:] == ["0.5 (step 4)", "0.25 (step 4)"]
    assert all(line in printed for line in page.splitlines() if "|" in line)
    for name in ("loss", "training"):
        assert Path(f"here/{name}.png").stat().st_size > 10_000


@pytest.mark.usefixtures("runs")
def test_a_loss_that_is_no_number_is_the_largest_gap() -> None:
    write(Path("runs/c/metrics.csv"), "step,train_loss", "1,4", "3,nan", "5,0")
    runs = read_runs([Path("runs/a"), Path("runs/c")])
    gap = largest_gap(runs["a"], runs["c"], "train_loss")
    assert gap == (float("inf"), -4)


@pytest.mark.usefixtures("runs")
def test_folders_of_one_name_are_told_apart() -> None:
    write(Path("old/a/metrics.csv"), "step,train_loss", "1,4")
    assert list(read_runs([Path("runs/a"), Path("old/a")])) == ["runs/a", "old/a"]


def test_a_run_of_fit_can_be_compared(fit_arguments: list[str]) -> None:
    options = ["--trainer.max_steps", "2", "--trainer.log_every_n_steps", "1"]
    for name in ("x", "y"):
        assert main([*fit_arguments, *options, "--name", name]) == 0
    assert main(["compare", "runs/x", "runs/y"]) == 0
    row = Path("runs/compare/compare.md").read_text().splitlines()[5]
    values = [value.strip() for value in row.split("|")[1:-1]]
    assert values[:2] == ["y", "2"]
    assert values[-2] == "0 (step 1)"
    assert "-" not in values[5:8]  # speed, MFU and memory


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (["runs/a"], "there is one run in runs/a"),
        (["runs/a", "runs/a"], "runs/a is named twice"),
        (["runs/a", "runs/none"], "there is no folder runs/none"),
        (["runs/a", "runs"], "there are no metrics in runs"),
        (["runs/a", "other"], "other/metrics.csv has no column step"),
        (["runs/a", "broken"], "broken/metrics.csv, line 3: could not convert"),
        (["runs/a", "silent"], "there are no metrics in silent"),
        (["runs/a", "apart"], "a and apart have no step in common"),
        ([], "required"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_mistakes(folders: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    write(Path("other/metrics.csv"), "time,loss", "1,2")
    write(Path("broken/metrics.csv"), "step,train_loss", "1,2", "2,two")
    write(Path("silent/metrics.csv"), "step,train_loss")
    write(Path("apart/metrics.csv"), "step,train_loss", "0,2", "100,2")
    assert words in told_by(["compare", *folders, "--out", "out"], capsys)
    assert not Path("out").exists()
