"""Published files to stores: decide, then transfer, then convert.

job.py is the file to read first: for each file it decides from facts (plan.py), asks one address
after the other (places.py) or takes the file out of the published archive (tarball.py), converts
it and keeps a record. transfer.py gets bytes from a server, whatever the network does; part_file.py
puts them on disk, where a later run finds them, and judges whether they are the file.
"""

from demotools.fetch.job import fetch_levels, fetch_plans, read_records
from demotools.fetch.places import place_named
from demotools.fetch.plan import DOWNLOADS, FetchedRecord, FetchOptions

__all__ = [
    "DOWNLOADS",
    "FetchOptions",
    "FetchedRecord",
    "fetch_levels",
    "fetch_plans",
    "place_named",
    "read_records",
]
