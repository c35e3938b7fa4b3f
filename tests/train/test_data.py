import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from train import UsageError
from train.data import END_OF_DOCUMENT, StepSampler, TextData, load_documents, load_tokenizer, pack


def make(**options: object) -> TextData:
    data = TextData(**options)
    data.prepare_data()
    data.setup()
    return data


@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_packing_loses_and_repeats_no_token(tmp_path: Path, name: str) -> None:
    texts = ["first document\n", "the second: naïve ✓ 漢字\n" * 5, "third"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text, encoding="utf-8")
    documents = load_documents(f"files:{tmp_path}/*.txt", max_bytes=10_000)
    assert sorted(documents["text"]) == sorted(texts)
    texts = documents["text"]
    tokenizer = load_tokenizer(name, documents)
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    row = list(itertools.chain(*([*tokenizer.encode(text).ids, end] for text in texts)))

    blocks = pack({"text": texts}, tokenizer.to_str(), block=7)["tokens"]

    assert blocks.shape == (len(row) // 7, 7)
    assert blocks.flatten().tolist() == row[: len(row) // 7 * 7]
    assert tokenizer.decode(row) == "".join(texts)


def test_a_byte_is_a_token(text: Path) -> None:
    tokenizer = load_tokenizer("bytes", load_documents(f"files:{text}", max_bytes=1_000_000))
    assert tokenizer.get_vocab_size() == 257
    for sample in ("plain", "naïve ✓ 漢字", "\0\n\t\x7f"):
        assert len(tokenizer.encode(sample).ids) == len(sample.encode())
        assert tokenizer.decode(tokenizer.encode(sample).ids) == sample


def test_bpe_merges_and_is_trained_once(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = load_documents(f"files:{text}", max_bytes=1_000_000)
    trained = load_tokenizer("bpe:400", documents)
    assert trained.get_vocab_size() == 400
    assert len(trained.encode(text.read_text()).ids) < 0.7 * text.stat().st_size
    monkeypatch.delattr("train.data.trainers.BpeTrainer")
    assert load_tokenizer("bpe:400", documents).to_str() == trained.to_str()


def test_held_out_blocks_are_the_tail_and_in_no_training_block(text: Path) -> None:
    data = make(corpus=f"files:{text}", context=32, val_fraction=0.2)
    train = data.train_blocks[:]["tokens"].flatten().tolist()
    val = data.val_blocks[:]["tokens"].flatten().tolist()
    ids = data.tokenizer.encode(text.read_text()).ids
    tail = ids[len(train) : len(train) + len(val)]
    assert train == ids[: len(train)]
    assert sorted(zip(*[iter(val)] * 33, strict=True)) == sorted(
        zip(*[iter(tail)] * 33, strict=True)
    )
    assert len(ids) - len(train) - len(val) < 33
    assert len(val) / (len(train) + len(val)) == pytest.approx(0.2, abs=0.01)
    assert data.train_blocks[0]["tokens"].dtype == torch.int64


def test_batches_are_keyed_by_step_and_seed() -> None:
    def batches(seed: int, first: int, count: int) -> list[list[int]]:
        return list(itertools.islice(StepSampler(10, 4, seed, first), count))

    whole = batches(seed=3, first=0, count=20)
    assert batches(seed=3, first=7, count=13) == whole[7:]
    assert batches(seed=4, first=0, count=20) != whole
    # Two passes of 10 blocks in 5 batches of 4: every block exactly twice, in two different orders.
    passes = np.array(whole[:5]).reshape(2, 10)
    assert (np.sort(passes) == np.arange(10)).all()
    assert (passes[0] != passes[1]).any()


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("before")
    assert load_documents(f"files:{path}", 100)["text"] == ["before"]
    path.write_text("and after")
    assert load_documents(f"files:{path}", 100)["text"] == ["and after"]


def test_max_bytes_cuts_the_text_and_no_character(tmp_path: Path) -> None:
    for name, text in (("a", "ää"), ("b", ""), ("c", "öö"), ("d", "üü")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    first, cut = load_documents(f"files:{tmp_path}/*", max_bytes=7)["text"]
    assert len({first[0], cut} & set("äöü")) == 2
    assert first == 2 * first[0]


def test_the_standard_library_is_a_corpus() -> None:
    data = make(max_bytes=50_000, context=64)
    assert len(data.train_blocks) + len(data.val_blocks) == pytest.approx(50_000 / 65, abs=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"corpus": "files:missing-*.txt"}, "no file matches the corpus 'files:missing-*.txt'"),
        ({"corpus": "files:empty"}, "there is no text in empty"),
        ({"corpus": "files:binary"}, "binary is not UTF-8 text"),
        ({"corpus": "files:short"}, "makes 0 blocks of context + 1 = 257 tokens and 2 are needed"),
        ({"corpus": "wikipedia"}, "unknown corpus 'wikipedia': use stdlib, files:<glob> or hub:"),
        ({"tokenizer": "words"}, "unknown tokenizer 'words': use bytes, or bpe:<size>"),
        ({"tokenizer": "bpe:99"}, "unknown tokenizer 'bpe:99'"),
        ({"batch_size": 0}, "data.batch_size must be at least 1, not 0"),
        ({"val_fraction": 1.0}, "data.val_fraction must lie between 0 and 1, not 1.0"),
    ],
)
def test_unusable_data_is_refused(options: dict, words: str) -> None:
    Path("empty").touch()
    Path("binary").write_bytes(b"\xff\xfe\x00")
    Path("short").write_text("short")
    with pytest.raises(UsageError) as error:
        make(**options)
    assert words in str(error.value)


def test_the_hub_offline_fails_at_once_and_names_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match="stdlib and files:<glob> need no network"):
        make(corpus="hub:nobody/nothing")
