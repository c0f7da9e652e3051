"""The demo store: its format, and everything that reads or writes it (docs/format.md).

`reading` opens a store and maps its arrays; `building` writes one from parts; `verify` checks
every byte of it; `reshape` and `shrink` make new stores from existing ones; `duplicates` finds
identical episodes; `remove` removes stores and nothing else.
"""

from demotools.store.reading import Episodes, Store, open_store, store_path

__all__ = ["Episodes", "Store", "open_store", "store_path"]
