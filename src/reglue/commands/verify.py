"""`reglue verify`: whether the files of whatever the other commands write are still the ones that were written."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from reglue.data.store import Store
from reglue.errors import UserError
from reglue.options.verify import Verify
from reglue.progress import Bar
from reglue.run import RunRecord, find_run
from reglue.training import checkpoints
from reglue.watching.checks import Check
from reglue.watching.kinds import RUN, STORE, kind_of


def verify(options: Verify) -> Path:
    """Read everything. Returns the folder.

    Every damaged file is named on stderr as it is found. Raises UserError if there is one, and for what is none of the
    kinds of `watching.kinds`.
    """
    folder = find_run(options.folder)
    kind = kind_of(folder)
    count, size = run_checks(folder, kind.checks(folder))
    if kind is RUN:
        verify_training_store(folder)
    else:
        print(f"{folder}: {count} parts of {size:,} bytes in all are as they were written")
    return folder


def run_checks(folder: Path, checks: Iterable[Check]) -> tuple[int, int]:
    """Make all checks. Returns how many there were, and of how many bytes.

    Raises UserError if one has failed, once all are made.
    """
    checks = list(checks)
    damaged: list[UserError] = []
    total = sum(check.size for check in checks)
    with Bar(total=total, unit="B", unit_scale=True, desc=f"verify {folder}") as progress:
        for check in checks:
            size = check.size
            try:
                check.read()
            except UserError as error:
                damaged.append(error)
                Bar.write(str(error), file=sys.stderr)
            progress.update(size)
    if damaged:
        raise UserError(f"{folder}: {len(damaged)} of {len(checks)} parts are missing or damaged, first: {damaged[0]}")
    return len(checks), total


def verify_training_store(folder: Path) -> None:
    """Say what can be read of a run, and verify its store. Raises UserError if that is damaged, or another one."""
    record = RunRecord.read(folder)
    print(
        f"{folder}: checkpoints {', '.join(map(str, checkpoints.steps(folder))) or '(none)'} are as they were written"
    )
    if record.store is None or record.store_hash is None:
        return
    place = Path(record.store)
    if not place.is_absolute():  # Of a run that was shared: a name that meant something elsewhere.
        return
    if not place.is_dir():
        print(f"Its training store {place} is not there (any more), and was not verified.")
        return
    run_checks(place, STORE.checks(place))
    if not record.trained_on(Store.open(place)):
        raise UserError(f"{place} is whole, but not the store that {folder} was trained on; put that one back")
