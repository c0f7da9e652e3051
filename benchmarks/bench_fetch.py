"""Does downloading with hashing keep up with curl? 1 GiB over loopback, both in turns.

`python benchmarks/bench_fetch.py [--mebibytes 1024] [--runs 5]` prints the median and the spread of
each, their ratio, and the peak memory of a fresh process that downloads. The server is the same
for both: sendfile from the page cache, in a process of its own.
"""

from __future__ import annotations

import argparse
import http.server
import multiprocessing
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import IO, BinaryIO

DOWNLOAD = """
import resource, sys, time
from pathlib import Path
from demotools import cli
from demotools.fetch.plan import FetchOptions
from demotools.fetch.places import place_named
from demotools.fetch.part_file import download
from demotools.fetch.plan import Expected
began = time.perf_counter()
download(place_named(sys.argv[1]), Path(sys.argv[2]), Expected(), FetchOptions(quiet=True))
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    if shutil.which("curl") is None:
        print("skipped: there is no curl to compare with")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_file(folder / "demos.pkl", options.mebibytes)
        port = _free_port()
        server = multiprocessing.Process(target=_serve, args=(folder, port), daemon=True)
        server.start()
        time.sleep(0.5)
        url, target = f"http://127.0.0.1:{port}/demos.pkl", folder / "copy.pkl"
        curl: list[float] = []
        ours: list[float] = []
        peaks: list[float] = []
        for run in range(options.runs):
            # each goes first in turn: the second finds the disk busy with what the first wrote
            for turn in (run, run + 1):
                if turn % 2:
                    curl.append(_seconds_of_curl(url, target))
                else:
                    seconds, peak = _seconds_of_ours(url, target)
                    ours.append(seconds)
                    peaks.append(peak)
                target.unlink()
        server.terminate()
    size = options.mebibytes / 1024
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for what, seconds_of in (("curl", curl), ("demotools, sha256 on the way", ours)):
        median = statistics.median(seconds_of)
        spread = f"{min(seconds_of):.2f} to {max(seconds_of):.2f} s"
        print(f"{what:30} {median:.2f} s ({spread}), {size / median:.2f} GiB/s")
    print(f"speed of ours / curl           {statistics.median(curl) / statistics.median(ours):.2f}")
    print(f"peak memory of our process     {max(peaks):.0f} MiB, imports included")


def _write_file(path: Path, mebibytes: int) -> None:
    block = os.urandom(1 << 20)
    with path.open("wb") as stream:
        stream.write(b"\x80\x04")
        for _ in range(mebibytes):
            stream.write(block)
        stream.write(b".")


def _serve(folder: Path, port: int) -> None:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

        def copyfile(self, source: BinaryIO, outputfile: IO[bytes]) -> None:  # type: ignore[override]
            outputfile.flush()
            self.connection.sendfile(source)

    handler = partial(Quiet, directory=str(folder))
    http.server.ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _seconds_of_curl(url: str, target: Path) -> float:
    began = time.perf_counter()
    subprocess.run(["curl", "--silent", "--output", str(target), url], check=True)
    return time.perf_counter() - began


def _seconds_of_ours(url: str, target: Path) -> tuple[float, float]:
    command = [sys.executable, "-c", DOWNLOAD, url, str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


if __name__ == "__main__":
    main()
