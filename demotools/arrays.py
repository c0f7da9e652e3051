"""Begin the arrays of a new store: their zarr.json as zarr spells it, and their chunk files.

zarr itself would do it: but its import costs as much processor time as a tenth of a second of
work, of every conversion, and what it writes would follow its version. tests/test_arrays.py
compares with zarr, byte for byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.vlen import VLenUTF8
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from demotools.chunks import ChunkFiles
from demotools.errors import StoreError
from demotools.metadata import CRC_BYTES, TEXT_BYTES_AT_MOST, TEXTS
from demotools.store import chunk_files

TEXTS_A_CHUNK = 1 << 17
_ZSTD_LEVEL = 3


def group_json(attributes: Mapping[str, Any]) -> bytes:
    """The zarr.json of a group."""
    return _json({"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"})


def raw_array(
    folder: Path, name: str, dtype: str, shape: Sequence[int], chunk_rows: int
) -> ChunkFiles:
    """A new array of the group `folder`, codecs `[bytes, crc32c]`, whose rows are to be appended.

    dtype        uint8, or a longer integer: then little-endian
    chunk_rows   rows in a chunk; only the first axis is cut
    """
    size = np.dtype(dtype).itemsize
    order = {"configuration": {"endian": "little"}} if size > 1 else {}
    chunk = [chunk_rows, *shape[1:]]
    codecs: list[dict[str, Any]] = [{"name": "bytes", **order}, {"name": "crc32c"}]
    _write_array(folder, name, dtype, (list(shape), chunk), codecs, fill_value=0)
    return ChunkFiles(chunk_files(folder, name), int(np.prod(chunk)) * size)


def write_rows(files: ChunkFiles, rows: NDArray[Any]) -> None:
    """Append rows of integers of any byte order."""
    files.append(rows.astype(rows.dtype.newbyteorder("<")).view(np.uint8))


def write_texts(folder: Path, blocks: Iterable[list[str]], count: int) -> None:
    """Write `mission_text` of the group `folder`.

    blocks   the texts, TEXTS_A_CHUNK at a time
    count    of texts
    """
    length = min(count, TEXTS_A_CHUNK)
    zstd = {"name": "zstd", "configuration": {"level": _ZSTD_LEVEL, "checksum": False}}
    codecs: list[dict[str, Any]] = [
        {"name": "vlen-utf8", "configuration": {}},
        zstd,
        {"name": "crc32c"},
    ]
    _write_array(folder, TEXTS, "string", ([count], [length]), codecs, fill_value="")
    texts, packed = VLenUTF8(), Zstd(level=_ZSTD_LEVEL, checksum=False)
    for file, block in zip(chunk_files(folder, TEXTS), blocks, strict=True):
        # the last chunk is as long as the others
        whole = block + [""] * (length - len(block))
        unpacked = texts.encode(np.array(whole, dtype=object))
        if len(unpacked) > TEXT_BYTES_AT_MOST:
            raise StoreError(
                "the missions are too long for a store",
                path=folder,
                fix=f"keep {TEXTS_A_CHUNK:,} missions under {TEXT_BYTES_AT_MOST:,} bytes",
            )
        content = bytes(packed.encode(unpacked))
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content + google_crc32c.value(content).to_bytes(CRC_BYTES, "little"))


def _write_array(
    folder: Path,
    name: str,
    data_type: str,
    shapes: tuple[list[int], list[int]],
    codecs: list[dict[str, Any]],
    *,
    fill_value: int | str,
) -> None:
    shape, chunk = shapes
    metadata = {
        "shape": shape,
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": fill_value,
        "codecs": codecs,
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    (folder / name).mkdir()
    (folder / name / "zarr.json").write_bytes(_json(metadata))


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode()
