"""Carry out the downloads of a fetch: each file from the first source that gives it.

Files with addresses of their own come first, several at once where asked for; what none of these
gave is taken out of the archives that hold it, all wanted members of one archive in one pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from demotools.content import Expected
from demotools.download import Downloaded, download_file, taken_copy
from demotools.errors import DemotoolsError, FetchError, from_os_error
from demotools.fetch_plan import Plan, Wishes
from demotools.manifest import read_archive, read_manifest
from demotools.members import extract_members
from demotools.outage import UnreachableError
from demotools.sources import Place, RefusedError, place_of, url_place
from demotools.transfer import Terms

Result = TypeVar("Result")
# who refused, and why
Refusal = tuple[str, RefusedError]
Refusals = dict[str, list[Refusal]]
Outcome = tuple[Plan, Downloaded | DemotoolsError]


def downloads(
    plans: Sequence[Plan], folder: Path, wishes: Wishes, terms: Terms, jobs: int
) -> Iterator[Outcome]:
    """Each plan with its file, or with the reason why no source gave it.

    With one job a file is handed out before the next is asked for; with more, all files with
    addresses of their own are there before the first is handed out, so that no thread is alive
    when the caller starts processes.
    """
    refused: Refusals = {plan.store: [] for plan in plans}

    def attempt(plan: Plan) -> tuple[Plan, Downloaded | DemotoolsError | None]:
        try:
            return plan, _from_places(plan, folder, wishes, terms, refused[plan.store])
        except DemotoolsError as error:
            return plan, error
        except OSError as error:
            return plan, from_os_error(error, folder / plan.name)

    rest = []
    attempts = map(attempt, plans) if jobs == 1 else _in_threads(attempt, plans, jobs, terms.stop)
    for plan, outcome in attempts:
        if outcome is None:
            rest.append(plan)
        else:
            yield plan, outcome
    for name in dict.fromkeys(name for plan in rest for name in _archives(plan)):
        wanted = [plan for plan in rest if name in _archives(plan)]
        for plan, outcome in _from_archive(name, wanted, folder, wishes, terms, refused):
            rest.remove(plan)
            yield plan, outcome
    for plan in rest:
        yield plan, _nobody_gave(plan, folder, refused[plan.store])


def _archives(plan: Plan) -> list[str]:
    return [source.archive for source in plan.sources if source.archive is not None]


def _from_places(
    plan: Plan, folder: Path, wishes: Wishes, terms: Terms, reasons: list[Refusal]
) -> Downloaded | None:
    final = folder / plan.name
    origin = wishes.origin
    if origin is not None and "://" not in origin and not origin.startswith("hf:"):
        try:
            return taken_copy(Path(origin), plan.expected)
        except RefusedError as error:
            reasons.append((f"file {origin}", error))
            return None
    if origin is not None:
        places = [url_place(origin)]
    else:
        places = [place_of(source) for source in plan.sources if source.archive is None]
    return _first_given(places, final, plan.expected, terms, reasons)


def _first_given(
    places: Sequence[Place], final: Path, expected: Expected, terms: Terms, reasons: list[Refusal]
) -> Downloaded | None:
    for place in places:
        try:
            return download_file(place, final, expected, terms)
        except RefusedError as error:
            reasons.append((place.source, error))
    return None


def _from_archive(
    name: str,
    plans: Sequence[Plan],
    folder: Path,
    wishes: Wishes,
    terms: Terms,
    refused: Refusals,
) -> Iterator[Outcome]:
    """The plans whose files the archive has; of the others, why not goes into `refused`."""
    try:
        archive = read_archive(name)
    except DemotoolsError as error:
        yield from ((plan, error) for plan in plans)
        return
    missing = {_member(plan, name): plan for plan in plans}
    reasons: list[Refusal] = []
    expected = Expected(archive.size_bytes, archive.sha256, archive.md5)
    for source in archive.sources:
        if not missing:
            break
        place = place_of(source)
        wanted = {pattern: folder / plan.name for pattern, plan in missing.items()}
        try:
            for pattern, file in extract_members(
                place, wanted, expected, terms, whole=wishes.check
            ):
                yield missing.pop(pattern), file
            reasons.append((place.source, RefusedError("the archive has no such member")))
        except RefusedError as error:
            reasons.append((place.source, error))
        except OSError as error:
            yield from ((plan, from_os_error(error, folder)) for plan in missing.values())
            return
        except DemotoolsError as error:
            yield from ((plan, error) for plan in missing.values())
            return
    for plan in missing.values():
        refused[plan.store] += [(f"archive {name}, {who}", error) for who, error in reasons]


def _member(plan: Plan, archive: str) -> str:
    source = next(source for source in plan.sources if source.archive == archive)
    return source.member or plan.name


def _nobody_gave(plan: Plan, folder: Path, refusals: Sequence[Refusal]) -> FetchError:
    lost = [str(error) for _, error in refusals if isinstance(error, UnreachableError)]
    others = [f"{who}: {e}" for who, e in refusals if not isinstance(e, UnreachableError)]
    ways = ["wait a day for the quota"] if any("quota" in text.lower() for text in others) else []
    ways.append("pass `--from FILE` with a copy you have")
    if others:
        ways.append("name another server with `--mirror URL`")
    if read_manifest(plan.level).environment_id is not None:
        ways.append(f"record the bot: `demotools generate {plan.level} --episodes 100000`")
    what = "; ".join(dict.fromkeys([*lost, *others]))
    return FetchError(
        f"no source gave {plan.name}: {what}" if others else what,
        path=folder / plan.name,
        fix=", or ".join(ways) if len(ways) < 3 else f"{', '.join(ways[:-1])}, or {ways[-1]}",
    )


def _in_threads(
    work: Callable[[Plan], Result], plans: Sequence[Plan], jobs: int, stop: threading.Event
) -> list[Result]:
    """The results of all plans, `jobs` at a time; Ctrl-C stops the threads at their next block."""
    with ThreadPoolExecutor(jobs) as executor:
        try:
            return list(executor.map(work, plans))
        except BaseException:
            stop.set()
            executor.shutdown(wait=False, cancel_futures=True)
            raise
