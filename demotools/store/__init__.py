"""The demo store: its format, and everything that reads or makes it (docs/format.md).

`reading` opens a store and maps its arrays; `building` writes one from parts; `verify` checks
every byte of it; `reshape` and `shrink` make stores out of stores, and `duplicates` knows which
episodes are the same; `remove` removes stores and nothing else.
"""

from demotools.store.reading import Episodes, Store, open_store, store_path

__all__ = ["Episodes", "Store", "open_store", "store_path"]
