"""The page about reliability says what the last campaign found; the campaign can be started."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.attack.campaign import PAGE, page_with_figures


def test_the_page_has_the_figures_of_the_last_campaign() -> None:
    page = PAGE.read_text("utf-8")
    assert page_with_figures(page) == page


def test_every_attack_can_be_named_and_counts_what_it_tries() -> None:
    pytest.importorskip("torch")  # many attacks are on the trainer
    command = [sys.executable, "-m", "tests.attack", "--dry-run"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert {"kill convert", "metadata bits", "full disk", "odd servers"} <= {
        line[:24].strip() for line in listed.splitlines()
    }
