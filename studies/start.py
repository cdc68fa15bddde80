"""How every study starts: it is planned, finds out what it needs of real images, or makes what is missing and runs."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

from measures import Measures
from plan import plan
from reglue.commands.compress import Compress, compress
from reglue.data.manifest import MANIFEST, codes_column
from reglue.data.store import Store
from reglue.encoders.compressors import CompressorKind
from reglue.errors import Stopped, UserError
from study import Arm, StudyOptions, kinds_of, run_study

KL_WEIGHT = 1e-6
"""Of a compressor whose name ends with -kl: REGLUE's (arXiv 2512.16636)."""


def start(
    options: StudyOptions, arms: Sequence[Arm], make_stores: Callable[[], None] = lambda: None
) -> dict[str, Any] | None:
    """Run a study, or do what the options ask for instead. Returns the results; None if it was not run.

    Codes that arms learn and --store lacks are made first, then the other stores by `make_stores`. Raises UserError as
    `run_study` does, and for codes that are missing and whose name does not tell how they are made.
    """
    if options.references_only:
        measures = Measures(options)
        measures.open(kinds_of(options))
        measures.know(kinds_of(options))
        return None
    jobs = missing_codes(options, arms)
    if options.plan:
        plan(options, arms, jobs)
        return None
    for job in jobs:
        compress(job)
    make_stores()
    return run_study(options, arms, options.out.name)


def stop(request: Stopped) -> NoReturn:
    """End a study whose training was asked to stop, as the command line ends a job."""
    print(request, file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


def missing_codes(options: StudyOptions, arms: Sequence[Arm]) -> list[Compress]:
    """What makes the codes that arms learn and their stores lack: of --store first, whose compressors others take.

    Stores that are not there yet get theirs when they are made.
    """
    jobs = {}
    for arm in arms:
        local = arm.recipe.local
        for store in dict.fromkeys((options.store, arm.store)) if local.present else ():
            lacks = (store / MANIFEST).is_file() and codes_column(local.compressor, "features") not in columns_of(store)
            if lacks and store == options.store:
                jobs[store, local.compressor] = job_of(options, local.compressor)
            elif lacks:
                fitted = options.store / "compressors" / local.compressor
                jobs[store, local.compressor] = Compress(
                    store, fitted=fitted, name=local.compressor, device=options.device
                )
    return sorted(jobs.values(), key=lambda job: job.store != options.store)


def columns_of(store: Path) -> set[str]:
    """The columns of a store."""
    return set(Store.open(store).manifest.columns)


def job_of(options: StudyOptions, name: str) -> Compress:
    """What makes the codes of a name, KIND-CHANNELS[-last][-kl]. Raises UserError for another one."""
    kind, _, rest = name.partition("-")
    channels, *others = rest.split("-")
    known: dict[str, dict[str, Any]] = {"last": {"layers": "last"}, "kl": {"kl_weight": KL_WEIGHT}}
    if kind not in get_args(CompressorKind) or not channels.isdecimal() or any(other not in known for other in others):
        raise UserError(
            f"{options.store} has no codes {name}, and the name does not tell how they are made, as conv-16, "
            "pca-8-last or conv-16-kl do; make them with `reglue compress`"
        )
    details: dict[str, Any] = {}
    for other in others:
        details |= known[other]
    if kind != "pca":
        details |= {"epochs": options.compressor_epochs, "hidden": options.compressor_hidden}
    typed: Literal["conv", "pca", "mlp"] = kind  # type: ignore[assignment]
    return Compress(options.store, typed, channels=int(channels), name=name, device=options.device, **details)
