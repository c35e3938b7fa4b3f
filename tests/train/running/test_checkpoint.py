"""Only good checkpoints are gone on from, and nothing in a bad one is run."""

import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from train.cli import main
from train.lit import GPTModule
from train.running.checkpoint import BadCheckpoint, last_good, read_checkpoint
from train.running.disk import held

FOLDER = Path("runs/tiny/checkpoints")
NEWEST, BEFORE = FOLDER / "step-00000012.ckpt", FOLDER / "step-00000010.ckpt"


@pytest.fixture
def arguments(fit_arguments: list[str]) -> list[str]:
    return [*fit_arguments, "--checkpoint.every_n_steps", "5", "--trainer.val_check_interval", "6"]


@pytest.fixture
def trained(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """A run of 12 steps with checkpoints at 10 and 12; its arguments."""
    assert main(arguments) == 0
    capsys.readouterr()
    return arguments


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    """One byte of one weight, which torch.load does not notice."""
    data = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["state_dict"]["model.norm.weight"]
    data[data.index(weight.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)


def zeros(path: Path) -> None:
    """What a disk that lost power may hold."""
    path.write_bytes(bytes(path.stat().st_size))


def text(path: Path) -> None:
    path.write_text("a text")


def another_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")


def other_tensors(path: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(3)}}, path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / ".metadata").write_bytes(malicious())


class Malice:
    """Unpickled, it writes a file."""

    def __reduce__(self) -> tuple:
        return exec, ("open('executed', 'w').close()",)


def malicious() -> bytes:
    return pickle.dumps({"state_dict": Malice()})


def malicious_zip(path: Path) -> None:
    """A whole checkpoint but for one object in it."""
    torch.save(torch.load(path, weights_only=True) | {"extra": Malice()}, path)


def malicious_legacy(path: Path) -> None:
    """As torch.save wrote before it wrote zip files."""
    torch.save({"state_dict": Malice()}, path, _use_new_zipfile_serialization=False)


def malicious_pickle(path: Path) -> None:
    path.write_bytes(malicious())


DAMAGE: dict[Callable[[Path], None], str] = {
    cut: "is not a checkpoint, or not a whole one",
    empty: "is empty",
    flip: "is damaged: the checksum of archive/data/",
    zeros: "is not a checkpoint, or not a whole one",
    text: "is not a checkpoint, or not a whole one",
    another_zip: "is not a checkpoint of PyTorch",
    other_tensors: "is not a checkpoint of python -m train fit",
    folder: "is a folder",
    malicious_zip: "is refused: it holds more than tensors and options; nothing in it was run",
    malicious_legacy: "is not a checkpoint, or not a whole one",
    malicious_pickle: "is not a checkpoint, or not a whole one",
}


@pytest.mark.parametrize(
    ("damage", "words"), DAMAGE.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_a_bad_checkpoint_is_skipped_and_named(
    damage: Callable[[Path], None],
    words: str,
    trained: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A careless environment must not open the door.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    whole = torch.load(NEWEST, weights_only=True)
    damage(NEWEST)
    with pytest.raises(BadCheckpoint):
        read_checkpoint(NEWEST)
    assert main(["sample", "--checkpoint", str(NEWEST)]) == 2
    assert f"error: {NEWEST} {words}" in capsys.readouterr().err

    if damage is folder:
        found = last_good(FOLDER)
        assert found is not None
        assert found[0] == BEFORE
    else:
        assert main(trained) == 0
        printed = capsys.readouterr()
        assert f"from step 10 on: {BEFORE}" in printed.out
        assert read_checkpoint(NEWEST)["state_dict"].keys() == whole["state_dict"].keys()
        for name, weight in read_checkpoint(NEWEST)["state_dict"].items():
            assert torch.equal(weight, whole["state_dict"][name])
        assert printed.err.startswith(f"warning: {NEWEST} {words}")
        assert printed.err.count("\n") == 1
    assert not Path("executed").exists()


def test_malice_would_have_been_run() -> None:
    """The pickles above are no duds."""
    pickle.loads(malicious())
    assert Path("executed").exists()


def test_no_flipped_byte_goes_unnoticed(trained: list[str]) -> None:
    """Wherever it is: what is read is what was written, or nothing."""
    draw, data = random.Random(0), NEWEST.read_bytes()
    whole = torch.load(NEWEST, weights_only=True)
    # Anywhere, and where the archive says what it holds.
    places = [draw.randrange(len(data)) for _ in range(40)]
    places += [draw.randrange(len(data) - 3000, len(data)) for _ in range(60)]
    noticed = 0
    for place in places:
        damaged = bytearray(data)
        damaged[place] ^= 1 << draw.randrange(8)
        NEWEST.write_bytes(damaged)
        try:
            found = read_checkpoint(NEWEST)
        except BadCheckpoint:
            noticed += 1
        else:  # between the parts, or a date
            assert repr(found) == repr(whole)
            for part in ("state_dict", "optimizer_states"):
                torch.testing.assert_close(found[part], whole[part], rtol=0, atol=0)
    assert noticed > 40


def test_without_a_good_one_the_run_begins_anew(
    trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in FOLDER.glob("step-*"):
        cut(path)
    assert main(trained) == 0
    printed = capsys.readouterr()
    assert "from step" not in printed.out
    assert printed.err.count("warning: ") == 2


def test_the_newest_stay_and_the_best(
    fit_arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = {0: 9.0, 2: 5.0, 4: 3.0, 6: 4.0, 8: 3.0, 10: 6.0, 12: 7.0}
    monkeypatch.setattr(
        GPTModule,
        "validation_step",
        lambda self, batch: self.log("val_loss", losses[self.global_step], batch_size=1),
    )
    FOLDER.mkdir(parents=True)
    (FOLDER / "step-00000005.ckpt.part").write_text("begun")
    arguments = [*fit_arguments, "--trainer.val_check_interval=2", "--checkpoint.every_n_steps=5"]

    def names() -> list[str]:
        return sorted(path.name for path in FOLDER.iterdir())

    assert main([*arguments, "--trainer.max_steps=11"]) == 0
    steps = [f"step-{step:08d}.ckpt" for step in (4, 10, 11)]
    assert names() == ["best.ckpt", "last.ckpt", *steps]
    # Resumed, it remembers what the best was.
    assert main([*arguments, "--checkpoint.keep=1"]) == 0
    assert names() == ["best.ckpt", "last.ckpt", "step-00000004.ckpt", "step-00000012.ckpt"]
    assert os.readlink(FOLDER / "best.ckpt") == "step-00000004.ckpt"
    assert os.readlink(FOLDER / "last.ckpt") == "step-00000012.ckpt"
    capsys.readouterr()
    assert main([*arguments, "--checkpoint.keep=0"]) == 2
    assert "checkpoint.keep must be at least 1, not 0" in capsys.readouterr().err


def test_one_put_there_by_hand_is_gone_on_from(
    trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = BEFORE.rename("kept.ckpt")
    shutil.rmtree(FOLDER)
    FOLDER.mkdir()
    shutil.copy(kept, FOLDER / "last.ckpt")
    assert main(trained) == 0
    assert f"from step 10 on: {FOLDER / 'last.ckpt'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved["TextData"].update(tokenizer="{"),
        lambda saved: saved["TextData"].update(tokenizer=malicious().hex()),
        lambda saved: saved["TextData"].update(tokenizer=7),
        lambda saved: saved["hyper_parameters"].update(gpt="large"),
        lambda saved: saved["state_dict"].popitem(),
    ],
)
def test_a_checkpoint_that_does_not_fit_together_is_told(
    change: Callable[[dict], None], trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    saved = torch.load(NEWEST, weights_only=True)
    change(saved)
    torch.save(saved, NEWEST)
    assert main(["sample", "--checkpoint", str(NEWEST)]) == 2
    assert f"error: {NEWEST} does not hold what a GPT needs: " in capsys.readouterr().err


def test_data_from_a_stranger_is_text(
    fit_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("data.pkl", "data.pt", "data.txt"):
        Path(name).write_bytes(malicious())
        assert main([*fit_arguments, "--data.corpus", f"files:{name}"]) == 2
        assert f"{name} is not UTF-8 text" in capsys.readouterr().err
    assert not Path("executed").exists()


def test_one_run_is_trained_by_one_process(
    fit_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with held(FOLDER.parent):
        assert main(fit_arguments) == 2
        assert "runs/tiny is in use: another process trains this run" in capsys.readouterr().err
    assert main(fit_arguments) == 0


def test_a_checkpoint_of_other_tokens_is_not_continued(
    fit_arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*fit_arguments, "--data.tokenizer", "bpe:300", "--data.corpus", "files:corpus.txt"]
    Path("corpus.txt").write_text("the cat and the hat and the bat " * 60)
    assert main([*line, "--trainer.max_steps", "2"]) == 0
    Path("corpus.txt").write_text("one or another of several other words " * 60)
    capsys.readouterr()
    assert main([*line, "--trainer.max_steps", "3"]) == 2
    told = capsys.readouterr().err
    assert "made with another tokenizer than the corpus 'files:corpus.txt' gives now" in told
