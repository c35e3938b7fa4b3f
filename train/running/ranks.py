"""The processes of a run: started and ended together, the first failure raised in the parent."""

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_only

from train import RunError

Result = TypeVar("Result")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Exit status of a rank that was asked to stop; the other ranks stop at the same step.
STOPPED = 130
# Once a rank has failed, the others, which may wait for it forever, have this long to end.
GRACE_SECONDS = 10.0


class NoAnswer(RunError):
    """A rank lost its connection to another, or timed out waiting for it."""


def in_ranks(ranks: int, function: Callable[..., Result], *args: Any) -> Result:
    """``function(*args)`` in ``ranks`` new processes that Lightning makes a process group of.

    Lightning's own launcher would run the command line again, whatever ``function`` is, and ends a
    run that lost a rank by killing this process too, which then can't say why.

    Args:
        ranks: number of processes, all on this machine; 1 is this process itself.
        function: at the top of a module; it and ``args`` travel as pickles.
        *args: passed on.

    Returns:
        What rank 0 returned.

    Raises:
        RunError: a process was killed, crashed or no longer answers; the others have been ended.
        BaseException: what the first rank to fail raised, its traceback added as a note.
    """
    if ranks == 1:
        return function(*args)
    # This process holds the rendezvous store, bound to port 0: no race for a free port.
    store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, threads // ranks)
    work = pickle.dumps((function, args))
    resource_tracker.ensure_running()  # starting it later would unblock the signals
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(
                target=_run_rank,
                args=(rank, ranks, store.port, threads, folder, work),
                name=f"rank {rank}",
                daemon=True,
            )
            for rank in range(ranks)
        ]
        try:
            with _signals_forwarded(processes) as received:
                # A new process inherits the blocked mask: signals wait until its handlers are set.
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
                for process in processes:
                    process.start()
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                failures = _wait(processes)
            silent = [process.name for process in processes if process.is_alive()]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
        error = None
        if (folder / "error").exists():
            error = pickle.loads((folder / "error").read_bytes())
        # A rank that lost its connection is only a consequence, but may end before the rank that
        # was killed is reported: then a later kill is the cause, too.
        causes = failures if isinstance(error, NoAnswer) else failures[:1]
        for rank, status in causes:
            if status >= 0:
                continue
            if received:  # and no rank handled it
                signal.raise_signal(received[-1])
            raise RunError(
                f"{rank} of {ranks} was ended by {signal.Signals(-status).name}, "
                "so the others were stopped"
            )
        if error is not None:
            if isinstance(error, NoAnswer) and silent:
                raise RunError(
                    f"{' and '.join(silent)} of {ranks} no longer answered, so the run was stopped"
                ) from error
            raise error
        return pickle.loads((folder / "result").read_bytes())


def _wait(processes: Sequence[BaseProcess]) -> list[tuple[str, int]]:
    """Wait for all to end; after a failure at most ``GRACE_SECONDS``.

    Returns:
        Name and exit status of those that failed, in the order of their end; of those seen at the
        same time the killed ones (a negative status) first.
    """
    running: dict[Any, BaseProcess] = {process.sentinel: process for process in processes}
    failures: list[tuple[str, int]] = []
    deadline = math.inf
    while running:
        left = max(0.0, deadline - time.monotonic()) if failures else None
        ended = [running.pop(sentinel) for sentinel in wait(list(running), left)]
        if not ended:
            break
        for process in ended:
            process.join()
        statuses = [(process.name, process.exitcode or 0) for process in ended]
        failed = [(name, status) for name, status in statuses if status not in (0, STOPPED)]
        if failed and not failures:
            deadline = time.monotonic() + GRACE_SECONDS
        failures += sorted(failed, key=lambda failure: failure[1])
    return failures


@contextlib.contextmanager
def _signals_forwarded(processes: Sequence[BaseProcess]) -> Iterator[list[int]]:
    """Pass Ctrl-C and SIGTERM on to the ranks, once each."""
    received: list[int] = []

    def forward(signum: int, _: Any) -> None:
        received.append(signum)
        for process in processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signum)

    before = {signum: signal.signal(signum, forward) for signum in SIGNALS}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _run_rank(
    rank: int,
    ranks: int,
    port: int,
    threads: int,
    folder: Path,
    work: bytes,
) -> None:
    """The main function of a rank."""
    # A new session: a terminal's Ctrl-C reaches only the parent, which passes it on.
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    torch.set_num_threads(threads)
    rank_zero_only.rank = rank
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    # What torchrun tells its processes, which Lightning and torch.distributed read.
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "train",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    status = 0
    try:
        function, args = pickle.loads(work)
        result = function(*args)
        if rank == 0:
            (folder / "result").write_bytes(pickle.dumps(result))
    except BaseException as error:
        if _lost_a_peer(error):
            error = NoAnswer(f"rank {rank} of {ranks} lost the others: {error}")
        status = 1 if isinstance(error, Exception) else STOPPED
        # One rank's failure makes the others fail too: the first one is the cause.
        with contextlib.suppress(FileExistsError), (folder / "error").open("xb") as file:
            file.write(_pickled(error, rank))
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads can abort the interpreter's own end after all work is done.
    os._exit(status)


def _lost_a_peer(error: BaseException) -> bool:
    """Whether the cause is another rank; gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    )


def _pickled(error: BaseException, rank: int) -> bytes:
    error.add_note(f"On rank {rank}:\n\n{''.join(traceback.format_exception(error))}")
    try:
        pickled = pickle.dumps(error)
        pickle.loads(pickled)
    except Exception:
        notes = error.__notes__
        error = RuntimeError(f"{type(error).__name__}: {error}")
        error.__notes__ = notes
        pickled = pickle.dumps(error)
    return pickled


def _end_with_the_parent() -> None:
    """Exit when the parent is gone: a killed parent can't end its ranks."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
