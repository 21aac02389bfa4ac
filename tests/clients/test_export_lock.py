"""Who exports into a folder keeps others out, and can be kept out by nobody else."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

import pytest
from tally.export_folder import ExportFolderError, _held, _released


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def test_the_lock_is_its_owners_only_whatever_the_umask(lock):
    umask = os.umask(0)
    try:
        held = _held(lock)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    _released(lock, held)


def test_another_user_who_holds_the_folder_itself_keeps_nobody_out(lock):
    theirs = os.open(lock.parent, os.O_RDONLY)  # what others can open, they can lock
    fcntl.flock(theirs, fcntl.LOCK_EX)
    _released(lock, _held(lock))
    os.close(theirs)


def test_one_at_a_time_holds_it_and_it_is_gone_afterwards(lock):
    held = _held(lock)
    with pytest.raises(ExportFolderError, match="somebody else"):
        _held(lock)
    _released(lock, held)
    assert not lock.exists()
    _released(lock, _held(lock))


def test_what_one_that_was_killed_has_left_is_taken_over(lock):
    os.close(_held(lock))
    assert lock.exists()
    _released(lock, _held(lock))
