"""torch.compile where it pays: the convolutions, whose shapes recur, not the loop over runs.

The number and the sizes of a batch's runs are new in every batch, so a network that is compiled
whole is compiled again for each. docs/networks.md has what the parts gain.
"""

from __future__ import annotations

import os
import shutil
import sys

from torch import nn

from demotools.errors import SettingsError

_COMPILER = "clang++" if sys.platform == "darwin" else "g++"


def compile_network(network: nn.Module, name: str) -> None:
    """Compile a network in place: its `compiled_parts` if it names any, else the whole of it.

    name   by which the settings name the network

    SettingsError  it names none, or there is no C++ compiler
    """
    parts = getattr(network, "compiled_parts", lambda: [network])()
    if not parts:
        raise SettingsError(
            f"no part of the network `{name}` gets faster by torch.compile on this device",
            path="run.compile",
            fix='remove it; on a CPU run.precision = "bfloat16" may help (docs/networks.md)',
        )
    compiler = os.environ.get("CXX") or _COMPILER
    if shutil.which(compiler) is None:
        raise SettingsError(
            f"torch.compile needs a C++ compiler, and there is no `{compiler}`",
            path="run.compile",
            fix="install it, name another in the variable CXX, or set run.compile = false",
        )
    for part in parts:
        part.compile()
