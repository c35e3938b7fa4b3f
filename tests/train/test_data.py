import io
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from train import UsageError
from train.data import (
    END_OF_DOCUMENT,
    PIECE_CHARACTERS,
    StepSampler,
    TextData,
    load_blocks,
    load_documents,
    load_tokenizer,
    pack,
)


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


ODD_TEXTS = {
    "separator": b"one<|endofdocument|>two<|endofdocument|>",
    "separator alone": b"<|endofdocument|>",
    "separators": b"<|endofdocument|>" * 50,
    "other special tokens": b"<|endoftext|><s></s>[CLS][PAD]<unk><0x0A>\n",
    "windows lines": b"a\r\nb\r\n\r\n",
    "old mac lines": b"a\rb\r\r",
    "mixed lines": b"\n\r\n\r\r\n\n",
    "byte order mark": b"\xef\xbb\xbfBOM, and inside: \xef\xbb\xbf.",
    "nul": b"\0a\0\0b\0",
    "control characters": bytes(range(32)) + b"\x7f\x1a",
    "separators of lines": "a\u2028b\u2029c\x85d\x0be\x0cf".encode(),
    "white space outside": b" \t\n  text \t \n\n  ",
    "white space alone": b" " * 300 + b"\t" * 300 + b"\n" * 300,
    "no-break and ideographic space": "\u00a0a\u3000b\u00a0\u00a0 \u200b".encode(),
    "not normalised": "e\u0301 \u00e9 \ufb01 \u212b \u1100\u1161".encode(),
    "byte alphabet": "\u0120\u010a\u2581 \u0122".encode(),
    "replacement character": "\ufffd\ufffe\uffff".encode(),
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈 \U0010ffff".encode(),
    "long line": b"x" * 5_000 + b" " + b"=" * 5_000,
    "long word": "漢" * 2_000 + "é" * 2_001,
    "digits": b"0123456789" * 500,
    "contractions": b"it's I'll 'S ''ve 'x",
}


@pytest.mark.parametrize("name", ["bytes", "bpe:600"])
def test_bytes_in_are_the_bytes_trained_on(tmp_path: Path, name: str) -> None:
    contents = [
        text if isinstance(text, bytes) else text.encode() for text in ODD_TEXTS.values()
    ] + [b""]
    for number, content in enumerate(contents):
        (tmp_path / f"{number:02}").write_bytes(content)

    blocks, tokenizer = load_blocks(f"files:{tmp_path}/*", name, context=1, max_bytes=10**6)

    row = list(itertools.chain(*blocks["tokens"]))
    end = tokenizer.token_to_id(END_OF_DOCUMENT)
    documents = [[]]
    for token in row:
        if token == end:
            documents.append([])
        else:
            documents[-1].append(token)
    # The last end may have fallen out with an incomplete block.
    documents = documents if documents[-1] else documents[:-1]
    trained_on = [tokenizer.decode(ids, skip_special_tokens=False) for ids in documents]
    # An empty file is no document, nor does it end one.
    assert sorted(text.encode() for text in trained_on) == sorted(filter(None, contents))
    if name == "bytes":
        assert [len(ids) for ids in documents] == [len(text.encode()) for text in trained_on]


@pytest.mark.parametrize("name", ["bytes", "bpe:400"])
def test_every_character_comes_back(tmp_path: Path, name: str) -> None:
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    random.Random(0).shuffle(points)
    text = "".join(map(chr, points[:40_000])) + "".join(map(chr, range(0x3000)))
    (tmp_path / "characters").write_bytes(text.encode())
    documents = load_documents(f"files:{tmp_path}/characters", 10**6)
    assert documents["text"] == [text]
    tokenizer = load_tokenizer(name, documents)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("name", ["bytes", "bpe:300"])
def test_the_text_of_the_end_token_is_text_in_every_door(tmp_path: Path, name: str) -> None:
    (tmp_path / "text").write_bytes(b"a<|endofdocument|>b " * 40)
    documents = load_documents(f"files:{tmp_path}/text", 10_000)
    end = load_tokenizer(name, documents).token_to_id(END_OF_DOCUMENT)
    for tokenizer in (load_tokenizer(name, documents), load_tokenizer(name, documents)):
        assert end not in tokenizer.encode(documents["text"][0]).ids
    packed = pack({"text": documents["text"][:]}, tokenizer.to_str(), block=1)["tokens"].flatten()
    assert (packed == end).nonzero()[0].tolist() == [len(packed) - 1]


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


def cached_tokenizer(documents: Dataset, size: int) -> Path:
    return Path(documents.cache_files[0]["filename"]).with_name(f"bpe-{size}.json")


@pytest.mark.parametrize(
    "damage",
    ["empty", "cut", "a byte", "not JSON", "not UTF-8", "a list", "plain", "of another size"],
)
def test_a_damaged_cached_tokenizer_is_trained_again(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text(f"{damage}: the cat and the hat and the bat\n" * 20)
    documents = load_documents(f"files:{tmp_path}/text", 10_000)
    trained = load_tokenizer("bpe:280", documents)
    load_tokenizer("bpe:270", documents)
    path, other = cached_tokenizer(documents, 280), cached_tokenizer(documents, 270)
    good = path.read_bytes()
    capsys.readouterr()
    load_tokenizer("bpe:280", documents)
    assert not capsys.readouterr().err
    path.write_bytes(
        {
            "empty": b"",
            "cut": good[: len(good) // 2],
            "a byte": good.replace(b"the", b"thx", 1),
            "not JSON": b"tokenizer",
            "not UTF-8": b"\xff\xfe\0",
            "a list": b"[1, 2]",
            "plain": trained.to_str().encode(),  # as it was written before
            "of another size": other.read_bytes(),
        }[damage]
    )
    assert path.read_bytes() != good

    assert load_tokenizer("bpe:280", documents).to_str() == trained.to_str()

    warning = capsys.readouterr().err
    assert warning.startswith("warning: ")
    assert warning.count("\n") == 1
    assert str(path) in warning
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    "run",
    ["ACGT", "=", " ", "\n", "漢字", "é\u0301", "0", " \n", "👩‍👧", "\0", "_a1"],
)
def test_no_unbroken_run_is_longer_than_a_piece(tmp_path: Path, run: str) -> None:
    """Training is linear in the text then: a merge scans the pieces it occurs in."""
    text = run * 3_000
    (tmp_path / "run").write_bytes(text.encode())
    documents = load_documents(f"files:{tmp_path}/run", 10**6)
    tokenizer = load_tokenizer("bpe:320", documents)
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert max(stop - start for _, (start, stop) in pieces) <= PIECE_CHARACTERS
    assert sum(stop - start for _, (start, stop) in pieces) == len(text)
    # Trained with the same: no token is longer than a piece of 4-byte characters.
    assert max(map(len, set(tokenizer.get_vocab()) - {END_OF_DOCUMENT})) <= 4 * PIECE_CHARACTERS
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


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


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes each read of a corpus file returned."""
    counts: list[int] = []

    class Counting(io.FileIO):
        def read(self, count: int) -> bytes:
            data = super().read(count)
            counts.append(len(data))
            return data

    monkeypatch.setattr(
        "train.data.open", lambda path, mode, buffering: Counting(path), raising=False
    )
    return counts


def test_reading_stops_at_max_bytes(tmp_path: Path, bytes_read: list[int]) -> None:
    for name in ("a", "b", "c"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(300 * 2**20)  # sparse: zeros that are on no disk
    (text,) = load_documents(f"files:{tmp_path}/*", max_bytes=1000)["text"]
    assert text == "\0" * 1000
    assert sum(bytes_read) == 1000


def test_max_bytes_may_be_larger_than_memory(tmp_path: Path, bytes_read: list[int]) -> None:
    (tmp_path / "a").write_bytes(b"short")
    assert load_documents(f"files:{tmp_path}/a", max_bytes=2**60)["text"] == ["short"]
    assert sum(bytes_read) == 5


def test_a_limit_within_the_first_character_leaves_no_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("漢字", encoding="utf-8")
    (tmp_path / "b").write_text("漢字", encoding="utf-8")
    assert load_documents(f"files:{tmp_path}/*", max_bytes=8)["text"] == ["漢字"]
    assert load_documents(f"files:{tmp_path}/*", max_bytes=5)["text"] == ["漢"]


def test_bytes_past_the_limit_may_be_anything(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text\xff")
    assert load_documents(f"files:{tmp_path}/a", max_bytes=4)["text"] == ["text"]
    with pytest.raises(UsageError, match="a is not UTF-8 text: invalid start byte at byte 4"):
        load_documents(f"files:{tmp_path}/a", max_bytes=5)


@pytest.mark.parametrize(
    "content",
    [b"\xed\xa0\x80", b"\xc0\x80", b"ab\xe6\xbc", b"\xf4\x90\x80\x80", b"\x80", b"a\0\xff"],
)
def test_what_is_no_utf8_is_refused_and_never_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "odd").write_bytes(content)
    with pytest.raises(UsageError, match=r"odd is not UTF-8 text: .* at byte"):
        load_documents(f"files:{tmp_path}/odd", 1000)


def test_a_file_of_several_names_is_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("once")
    (folder / "symbolic.txt").symlink_to("a.txt")
    (folder / "hard.txt").hardlink_to(folder / "a.txt")
    (folder / "gone.txt").symlink_to("nothing")
    (folder / "loop").symlink_to(folder)
    (folder / "a folder.txt").mkdir()
    (folder / "copy.txt").write_text("another")
    for pattern in ("*.txt", "**/*.txt", "**/**/*.txt", "**"):
        texts = load_documents(f"files:{folder}/{pattern}", 1000)["text"][:]
        assert sorted(texts) == ["another", "once"]


def test_a_name_may_look_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "data[1].txt").write_text("brackets")
    (tmp_path / "data1.txt").write_text("none")
    assert load_documents(f"files:{tmp_path}/data[1].txt", 100)["text"] == ["brackets"]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(UsageError, match=r"it is a folder, its files are files:.*texts/\*\*"):
        load_documents(f"files:{tmp_path}/texts", 100)


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "secret").write_text("text")
    monkeypatch.setattr("train.data.open", refuse, raising=False)
    with pytest.raises(UsageError, match=r"cannot read .*secret: Permission denied"):
        load_documents(f"files:{tmp_path}/secret", 100)


def test_a_damaged_cache_of_text_is_told_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("some text, long enough for two blocks " * 9)
    options = {"corpus": f"files:{tmp_path}/text", "context": 8}
    blocks = make(**options).train_blocks
    path = Path(blocks.cache_files[0]["filename"])
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UsageError, match=r"the cache of prepared text in .* can't be used"):
        make(**options)


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[object]) -> list[int]:
    """A hub that streams these rows; which of them were asked for."""
    asked: list[int] = []

    class Stream:
        column_names = ("text",)

        def __iter__(self) -> Iterator[dict[str, object]]:
            for number, row in enumerate(rows):
                asked.append(number)
                yield {"text": row}

    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: io.BytesIO())
    monkeypatch.setattr("train.data.load_dataset", lambda *_, **__: Stream())
    return asked


def test_a_dataset_of_the_hub_is_read_as_it_is_and_as_far_as_max_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = hub(monkeypatch, ["a\r\n<|endofdocument|>", None, "", "ab漢", "never read"])
    assert load_documents("hub:a/b", max_bytes=24)["text"] == ["a\r\n<|endofdocument|>", "ab"]
    assert asked == [0, 1, 2, 3]


def test_a_hub_column_of_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, ["text", ["a", "b"]])
    with pytest.raises(UsageError, match=r"must hold strings, not list \(row 1\)"):
        load_documents("hub:a/lists", max_bytes=24)


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
