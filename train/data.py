"""Text to packed fixed-length blocks; blocks to batches keyed by step and seed alone."""

import codecs
import glob
import hashlib
import itertools
import json
import os
import random
import sys
import sysconfig
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from io import RawIOBase
from pathlib import Path
from typing import Any, cast

import datasets.config
import huggingface_hub
import lightning as L
import numpy as np
import pyarrow
from datasets import Dataset, Features, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Sampler

from train import UsageError

END_OF_DOCUMENT = "<|endofdocument|>"
BYTES_VOCAB = 257  # every byte, and the end of a document
# Part of the key of the cached text: datasets keys a generator by its name and arguments, not by
# its code. To be raised whenever the same files are read as another text.
READER = 2
# GPT-2's pre-tokenizer with at most 64 characters a piece, a space and 63. A merge rescans every
# piece that it occurs in, so that training on one unbroken run of n characters would take n^2.
PIECE_CHARACTERS = 64
PIECES = Regex(
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}{1,#}| ?\p{N}{1,#}| ?[^\s\p{L}\p{N}]{1,#}"
    r"|\s{1,#}(?!\S)|\s{1,#}".replace("#", str(PIECE_CHARACTERS - 1))
)
DOCUMENTS_AT_ONCE = 64  # encoded together; an encoding takes some hundred bytes a token

Fingerprints = tuple[tuple[str, int, int], ...]


class TextData(L.LightningDataModule):
    """Blocks of ``context + 1`` tokens: the model reads all but the last and predicts the next.

    Tokenised and packed once, then read from the cache of ``datasets``. The last ``val_fraction``
    of the blocks is held out; blocks do not overlap, so no token is in both parts.
    """

    def __init__(
        self,
        context: int = 256,
        seed: int = 0,
        corpus: str = "stdlib",
        tokenizer: str = "bytes",
        batch_size: int = 16,
        max_bytes: int = 4_000_000,
        val_fraction: float = 0.1,
    ) -> None:
        """Keep the options; nothing is read yet.

        Args:
            context: tokens the model reads at once.
            seed: of the order of the training blocks.
            corpus: ``stdlib`` (the sources of Python's own library), ``files:<glob>`` (your UTF-8
                text, trained on byte for byte: line ends, a byte order mark and the text of special
                tokens stay as they are) or ``hub:<name>`` (a dataset of the Hugging Face hub with a
                "text" column and a "train" split).
            tokenizer: ``bytes``, or ``bpe:<vocabulary size>`` trained on the corpus.
            batch_size: blocks per batch.
            max_bytes: read no more bytes of text than this.
            val_fraction: part of the blocks held out for validation.
        """
        super().__init__()
        self.save_hyperparameters()
        for name in ("context", "batch_size", "max_bytes"):
            if self.hparams[name] < 1:
                raise UsageError(f"data.{name} must be at least 1, not {self.hparams[name]}")
        if not 0 < val_fraction < 1:
            raise UsageError(f"data.val_fraction must lie between 0 and 1, not {val_fraction}")
        vocab_size(tokenizer)

    def prepare_data(self) -> None:
        """Fill the cache, so that every later process only reads it."""
        load_blocks(**self._corpus_options)

    def setup(self, stage: str | None = None) -> None:
        """Split the blocks into training part and held-out tail."""
        blocks, self.tokenizer = load_blocks(**self._corpus_options)
        if len(blocks) < 2:
            raise UsageError(
                f"the corpus {self.hparams['corpus']!r} makes {len(blocks)} blocks of "
                f"context + 1 = {self.hparams['context'] + 1} tokens and 2 are needed: "
                "lower model.gpt.context or give more text"
            )
        held_out = min(max(1, round(len(blocks) * self.hparams["val_fraction"])), len(blocks) - 1)
        blocks = blocks.with_format("torch")
        # DataLoader needs only __getitems__ of a list of row numbers.
        self.train_blocks = cast(Any, blocks.select(range(len(blocks) - held_out)))
        # Shuffled once, so that the first few, which are all that a quick validation reads, come
        # from the whole tail.
        self.val_blocks = cast(
            Any, blocks.select(len(self.train_blocks) + _shuffled(held_out, 0, 0))
        )

    def train_dataloader(self) -> DataLoader:
        """Endless batches ``{"tokens": (batch_size, context + 1)}``, from the trainer's step on."""
        assert self.trainer is not None
        done = self.trainer.global_step * self.trainer.accumulate_grad_batches
        sampler = StepSampler(
            len(self.train_blocks), self.hparams["batch_size"], self.hparams["seed"], done
        )
        return DataLoader(self.train_blocks, batch_sampler=sampler)

    def val_dataloader(self) -> DataLoader:
        """The held-out blocks, in the same order every time."""
        return DataLoader(self.val_blocks, batch_size=self.hparams["batch_size"])

    def state_dict(self) -> dict[str, Any]:
        """Store the tokenizer in every checkpoint: sampling needs no other file."""
        return {"tokenizer": self.tokenizer.to_str()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to go on with other tokens than the checkpoint's.

        Raises:
            UsageError: the tokenizer has been trained again, on other text or by other rules.
        """
        # Compare vocabulary and merges only: the pre-tokenizer doesn't change what a token means.
        saved, now = (
            json.loads(text)["model"] for text in (state_dict["tokenizer"], self.tokenizer.to_str())
        )
        if saved != now:
            raise UsageError(
                "the checkpoint was made with another tokenizer than the corpus "
                f"{self.hparams['corpus']!r} gives now: choose another --name, or delete it to "
                "start anew"
            )

    @property
    def _corpus_options(self) -> dict[str, Any]:
        return {
            name: self.hparams[name] for name in ("corpus", "tokenizer", "context", "max_bytes")
        }


class StepSampler(Sampler[list[int]]):
    """Endless batches of block numbers; what is in batch ``n`` depends on ``n`` and the seed alone.

    So every arm sees the same batches, and a resumed run goes on with the ones it would have seen.
    """

    def __init__(self, blocks: int, batch_size: int, seed: int, first_batch: int = 0) -> None:
        """Start at batch number ``first_batch`` of shuffled passes over ``blocks`` blocks."""
        self.blocks, self.batch_size, self.seed, self.first_batch = (
            blocks,
            batch_size,
            seed,
            first_batch,
        )

    def __iter__(self) -> Iterator[list[int]]:
        """Pass after pass, each block once per pass; a batch may span two passes."""
        start = self.first_batch * self.batch_size
        positions = (divmod(position, self.blocks) for position in itertools.count(start))
        while True:
            batch = itertools.islice(positions, self.batch_size)
            yield [int(_shuffled(self.blocks, self.seed, epoch)[i]) for epoch, i in batch]


@lru_cache(maxsize=2)
def _shuffled(blocks: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(blocks)


def vocab_size(tokenizer: str) -> int:
    """How many tokens the tokenizer called ``bytes`` or ``bpe:<size>`` knows."""
    if tokenizer == "bytes":
        return BYTES_VOCAB
    kind, _, size = tokenizer.partition(":")
    if kind != "bpe" or not size.isdecimal() or int(size) < BYTES_VOCAB:
        raise UsageError(
            f"unknown tokenizer {tokenizer!r}: use bytes, or bpe:<size> with a size of at least "
            f"{BYTES_VOCAB}"
        )
    return int(size)


def load_blocks(
    corpus: str, tokenizer: str, context: int, max_bytes: int
) -> tuple[Dataset, Tokenizer]:
    """A dataset with one column ``tokens``, of ``context + 1`` ids, and its tokenizer."""
    with _readable_cache():
        documents = load_documents(corpus, max_bytes)
        trained = load_tokenizer(tokenizer, documents)
        block = context + 1
        blocks = documents.map(
            pack,
            batched=True,
            batch_size=len(
                documents
            ),  # one batch: blocks run on across documents, and only the very end is cut off
            fn_kwargs={"tokenizer": trained.to_str(), "block": block},
            remove_columns="text",
            features=Features({"tokens": List(Value("int32"), length=block)}),
        )
    return blocks, trained


@contextmanager
def _readable_cache() -> Iterator[None]:
    """Say in one sentence where the cache is that can't be read or written.

    Raises:
        UsageError: a file in it is damaged or out of reach, or the disk is full.
    """
    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "generator"
        raise UsageError(
            f"the cache of prepared text in {folder} can't be used ({error}): make room or delete "
            "the folder, it is filled again from the corpus"
        ) from error


def pack(texts: dict[str, list[str]], tokenizer: str, block: int) -> dict[str, np.ndarray]:
    """Tokenise the documents, end each with its token, join them, cut the row into blocks.

    Every token lands in exactly one block, in order; fewer than ``block`` tokens at the very end
    are left out.
    """
    encoder = literal(Tokenizer.from_str(tokenizer))
    end = [encoder.token_to_id(END_OF_DOCUMENT)]
    documents = texts["text"]
    row = [
        np.array(encoding.ids + end, np.int32)
        for first in range(0, len(documents), DOCUMENTS_AT_ONCE)
        for encoding in encoder.encode_batch_fast(documents[first : first + DOCUMENTS_AT_ONCE])
    ]
    tokens = np.concatenate(row)
    whole = len(tokens) // block * block
    return {"tokens": tokens[:whole].reshape(-1, block)}


def literal(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer, set to read ``<|endofdocument|>`` in a text as the characters it is made of.

    Only :func:`pack` and an empty prompt use the token. The setting is not part of a tokenizer's
    JSON: it has to be made wherever one is loaded.
    """
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(tokenizer: str, documents: Dataset) -> Tokenizer:
    """A byte-level BPE trained on the documents and cached beside them.

    ``bytes`` is the smallest of them: with its vocabulary there is no room for a merge.
    """
    size = vocab_size(tokenizer)
    cache = Path(documents.cache_files[0]["filename"]).with_name(f"bpe-{size}.json")
    if cache.exists():
        cached = _cached_tokenizer(cache, size)
        if cached is not None:
            return literal(cached)
        print(
            f"warning: {cache} is damaged or of other options: the tokenizer is trained again",
            file=sys.stderr,
        )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = _pre_tokenizer()
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(documents["text"], trainer)
    text = trained.to_str()
    unfinished = cache.with_suffix(f".{os.getpid()}")
    unfinished.write_text(
        json.dumps({"digest": _tokenizer_digest(size, text), "tokenizer": text}), encoding="utf-8"
    )
    unfinished.replace(cache)
    return literal(trained)


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Cuts a text into bounded pieces and spells each in the alphabet of bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(PIECES, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _cached_tokenizer(cache: Path, size: int) -> Tokenizer | None:
    """The tokenizer in the file, or None if it is not what :func:`load_tokenizer` wrote there."""
    try:
        saved = json.loads(cache.read_bytes())
        whole = saved["digest"] == _tokenizer_digest(size, saved["tokenizer"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # not a file, not JSON, or JSON of something else
    return Tokenizer.from_str(saved["tokenizer"]) if whole else None


def _tokenizer_digest(size: int, tokenizer: str) -> str:
    """Fingerprint of a trained tokenizer and of the options that it was trained with."""
    options = (size, PIECE_CHARACTERS, END_OF_DOCUMENT)
    return hashlib.blake2b(repr((options, tokenizer)).encode(), digest_size=16).hexdigest()


def load_documents(corpus: str, max_bytes: int) -> Dataset:
    """A dataset with one column ``text``, a document a row, cached by what it is read from."""
    kind, _, where = (part.strip() for part in corpus.partition(":"))
    if corpus == "stdlib":
        found = Path(sysconfig.get_path("stdlib")).glob("*.py")
        read, source = read_files, {"files": _fingerprints(found)}
    elif kind == "files" and where:
        # A file's name may contain glob characters.
        names = [where] if os.path.isfile(where) else glob.iglob(where, recursive=True)
        read, source = read_files, {"files": _fingerprints(map(Path, names))}
    elif kind == "hub" and where:
        read, source = read_hub, {"name": where}
    else:
        raise UsageError(f"unknown corpus {corpus!r}: use stdlib, files:<glob> or hub:<name>")
    if source.get("files") == ():
        hint = f": it is a folder, its files are files:{where}/**" if os.path.isdir(where) else ""
        raise UsageError(f"no file matches the corpus {corpus!r}{hint}")
    try:
        return Dataset.from_generator(
            read,
            features=Features({"text": Value("large_string")}),
            gen_kwargs={**source, "max_bytes": max_bytes, "reader": READER},
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UsageError | OSError):
            raise error.__cause__ from error
        raise


def _fingerprints(paths: Iterable[Path]) -> Fingerprints:
    """Every file's path, time and size: keyed by them, a cache serves no old text.

    A file that is reached by several names (links, a pattern with ``**`` twice) counts once: a
    second copy would put training text into the held-out part.

    The order is shuffled, the same everywhere: the files at the end, which are held out, and those
    that ``max_bytes`` leaves out are then like the others.
    """
    files: dict[tuple[int, int], tuple[str, int, int]] = {}
    for path in sorted(path for path in paths if path.is_file()):
        stat = path.stat()
        files.setdefault((stat.st_dev, stat.st_ino), (str(path), stat.st_mtime_ns, stat.st_size))
    shuffled = list(files.values())
    random.Random(0).shuffle(shuffled)
    # A tuple: datasets treats the items of a list as shards and would read each separately.
    return tuple(shuffled)


def read_files(files: Fingerprints, max_bytes: int, reader: int) -> Iterator[dict[str, str]]:
    """The text of the files, byte for byte and in order, a non-empty file a row.

    No byte past ``max_bytes`` is read. A character that the limit falls into is left out whole.

    Args:
        files: what :func:`_fingerprints` found.
        max_bytes: of all files together.
        reader: ``READER``; here for the cache's key alone.

    Raises:
        UsageError: there is no text, or a file can't be read or is not UTF-8.
    """
    if not any(size for _, _, size in files):
        raise UsageError(f"the corpus is empty: there is no text in {files[0][0]}")
    left = max_bytes
    for path, _, _ in files:
        try:
            # Unbuffered: a buffer would read on past the limit.
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                data = _read(file, min(left, size))
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(data, final=left >= size)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
            ) from error
        left -= len(data)
        if text:
            yield {"text": text}
        if not left:
            return


def _read(file: RawIOBase, count: int) -> bytes:
    """``count`` bytes, or those up to the end of the file; one system call may return fewer."""
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_hub(name: str, max_bytes: int, reader: int) -> Iterator[dict[str, str]]:
    """The "text" column of a dataset of the Hugging Face hub, in order, as far as ``max_bytes``.

    Args:
        name: of the dataset.
        max_bytes: of all rows together; a row without text is none.
        reader: ``READER``; here for the cache's key alone.

    Raises:
        UsageError: the hub can't be reached, or the dataset has no column of texts.
    """
    try:
        # Offline, the hub's client retries for half a minute; this request is made once.
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=5).close()
        rows = load_dataset(name, split="train", streaming=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read {name!r} from the Hugging Face hub ({error}): "
            "the corpora stdlib and files:<glob> need no network"
        ) from error
    if "text" not in (rows.column_names or []):
        raise UsageError(f'the dataset {name!r} has no "text" column')
    left = max_bytes
    for number, row in enumerate(rows):
        text = row["text"]
        if not isinstance(text, str | None):
            raise UsageError(
                f'the "text" column of {name!r} must hold strings, not {type(text).__name__} '
                f"(row {number})"
            )
        data = (text or "").encode()[:left]
        left -= len(data)
        if text := data.decode(errors="ignore"):
            yield {"text": text}
        if not left:
            return
