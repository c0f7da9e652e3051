"""Record, or convert, on a Dask cluster: parts are its tasks, the store is the same bit for bit.

How parts get from the workers into the store is in `errand`.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from demotools.decoding import decode_part
from demotools.demofile import DemoFile, OnError
from demotools.errand import (
    Delivered,
    Errand,
    adopting,
    delivered,
    opened_errand,
    refusal,
    refused,
)
from demotools.errors import DemotoolsError
from demotools.generate import Play, Recording, play_part
from demotools.layouts import PicklePart
from demotools.writer import StoreBuilder

_PARTS_A_SLOT = 3
_PROTOCOLS = ("tcp", "tls")
_CONNECT_SECONDS = 10

Submit = Callable[..., Future[Delivered]]
"""Begins a task on a worker, given the errand and its further arguments."""


def play_errand(errand: Errand, recording: Recording, part: int) -> Delivered:
    """Play one part; runs on a worker.

    DemotoolsError  see `refusal`: workers may join after the others were asked
    """
    return delivered(errand, part, lambda folder: play_part(recording, part, folder))


def decode_errand(
    errand: Errand, number: int, file: DemoFile, part: PicklePart, on_error: OnError
) -> Delivered:
    """Decode one part of a file; runs on a worker.

    DemotoolsError  see `refusal`; or the worker does not see the file
    """

    def decode(folder: Path) -> int:
        if not file.content.is_file() or file.content.stat().st_size != file.content_bytes:
            raise refused({socket.gethostname(): f"it does not see the file {file.content}"})
        decode_part(folder, number, file, part, on_error)
        return len(part.number)

    return delivered(errand, number, decode)


def cluster_players(
    address: str, *, return_parts: bool = False
) -> Callable[[StoreBuilder], AbstractContextManager[Play]]:
    """What `generate` takes as its players: the workers of the scheduler at `address`.

    return_parts    workers send the parts back: for workers that do not share the store's folder

    DemotoolsError  dask is not installed; no scheduler answers; no worker is there; a worker has
                    other versions, or does not see the folder; the cluster goes away
    """

    @contextmanager
    def players(builder: StoreBuilder) -> Iterator[Play]:
        with _workers(address, builder, return_parts) as (submit, _slots):

            def play(recording: Recording, part: int, parts: Path) -> Future[int]:
                return adopting(submit(play_errand, recording, part), parts)

            yield play

    return players


def cluster_decoders(
    address: str, *, return_parts: bool = False
) -> Callable[[StoreBuilder], AbstractContextManager[ClusterDecoders]]:
    """What `convert_files` takes as its decoders: as `cluster_players`.

    The files themselves must lie where every worker sees them under the same name.
    """

    @contextmanager
    def decoders(builder: StoreBuilder) -> Iterator[ClusterDecoders]:
        with _workers(address, builder, return_parts) as (submit, slots):
            yield ClusterDecoders(submit, builder.parts, slots)

    return decoders


class ClusterDecoders:
    """Workers that decode the parts of files; a few parts wait for each of them."""

    def __init__(self, submit: Submit, parts: Path, slots: int) -> None:
        self._submit = submit
        self._parts = parts
        self._room = _PARTS_A_SLOT * slots
        self._under_way: set[Future[int]] = set()

    def decode(self, number: int, file: DemoFile, part: PicklePart, on_error: OnError) -> None:
        """Have a part decoded, once there is room for it."""
        while len(self._under_way) >= self._room:
            self._collect(FIRST_COMPLETED)
        absolute = replace(file, content=file.content.absolute())
        task = self._submit(decode_errand, number, absolute, part, on_error)
        self._under_way.add(adopting(task, self._parts))

    def finish(self) -> None:
        """Wait for all parts."""
        self._collect(ALL_COMPLETED)

    def _collect(self, when: str) -> None:
        done, self._under_way = wait(self._under_way, return_when=when)
        for future in done:
            future.result()


@contextmanager
def _workers(
    address: str, builder: StoreBuilder, return_parts: bool
) -> Iterator[tuple[Submit, int]]:
    """What begins a task on a worker, and how many the workers do at the same time."""
    with _client(address) as client, opened_errand(builder, return_parts) as errand:
        _refuse_unfit_workers(client, address, errand)
        executor = client.get_executor(pure=False)
        slots = sum(client.nthreads().values())
        try:
            yield lambda task, *arguments: executor.submit(task, errand, *arguments), slots
        finally:
            executor.shutdown(wait=False)


def _refuse_unreachable(address: str) -> None:
    """Dask's own client leaves threads behind, which may hang, where it finds no scheduler."""
    fix = (
        "start one: `dask scheduler --port 8786`, then on every machine "
        "`dask worker tcp://HOST:8786 --nworkers auto --nthreads 1`"
    )
    try:
        place = urlsplit(address)
        if place.scheme not in _PROTOCOLS or not place.hostname or not place.port:
            raise ValueError("no tcp://HOST:PORT")
    except ValueError as error:
        what = f"this is not the address of a Dask scheduler: {error}"
        raise DemotoolsError(what, path=address, fix="spell it tcp://HOST:8786") from error
    try:
        socket.create_connection((place.hostname, place.port), _CONNECT_SECONDS).close()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        what = f"no Dask scheduler answers: {reason}"
        raise DemotoolsError(what, path=address, fix=fix) from error


@contextmanager
def _client(address: str) -> Iterator[Any]:
    try:
        from distributed import Client
        from distributed.comm.core import CommClosedError
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise DemotoolsError(
            "Dask is not installed", path="distributed", fix="pip install 'demotools[cluster]'"
        ) from error
    _refuse_unreachable(address)
    try:
        client: Any = Client(  # type: ignore[no-untyped-call]
            address, timeout=_CONNECT_SECONDS, set_as_default=False
        )
    except OSError as error:
        raise DemotoolsError(
            "something answers, but it is no Dask scheduler of this version",
            path=address,
            fix="check host and port; install the same version of Dask on every machine",
        ) from error
    log = logging.getLogger("distributed.client")
    level = log.level
    # it tells of a lost scheduler at length, and so does the error below
    log.setLevel(logging.CRITICAL)
    try:
        with client:
            yield client
    except KilledWorker as error:
        raise DemotoolsError(
            f"the same part ended several workers: {error}",
            path=address,
            fix="look at the workers' own output; out of memory, start fewer on each machine",
        ) from error
    except (CancelledError, CommClosedError) as error:
        raise DemotoolsError(
            "the Dask scheduler went away",
            path=address,
            fix="start it again and run the command again, it goes on where it was",
        ) from error
    finally:
        log.setLevel(level)


def _refuse_unfit_workers(client: Any, address: str, errand: Errand) -> None:
    answers = client.run(refusal, errand, on_error="return")
    if not answers:
        raise DemotoolsError(
            "the Dask scheduler has no workers",
            path=address,
            fix=f"start some: `dask worker {address} --nworkers auto --nthreads 1`",
        )
    unfit = {
        worker: f"it cannot run demotools: {answer}" if isinstance(answer, Exception) else answer
        for worker, answer in answers.items()
        if answer
    }
    if unfit:
        raise refused(unfit)
