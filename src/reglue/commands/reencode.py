"""`reglue reencode`: the same images in another autoencoder's latent space, with the semantics that a store has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from reglue.commands.prepare import prepare
from reglue.data.manifest import MANIFEST, Manifest, read_manifest, refuse_others
from reglue.data.store import Store
from reglue.data.store_writer import add_semantics, replace_lost_files
from reglue.encoders.autoencoders import load_autoencoder
from reglue.errors import UserError
from reglue.locks import writes
from reglue.names import NO_ENCODER
from reglue.options.prepare import Prepare
from reglue.options.reencode import Reencode
from reglue.sampling import Precision
from reglue.training import distributed

PRECISION: Precision = "float32"
"""Of the second autoencoder's matrix products, whatever the first store's networks had."""


@writes()
def reencode(options: Reencode) -> Store:
    """Make the second store, continue it, or make again what it has lost.

    Raises UserError as `prepare` does; if the images have changed since the first store was made; and if one that could
    be read then cannot now, since rows would no longer belong together.
    """
    rank, _ = distributed.join(options.device)
    first = Store.open(options.store)
    manifest = first.manifest
    second = _with_semantics(options, first)
    if second is not None and distributed.broadcast_object(all(map(second.has_whole, second.manifest.columns))):
        if rank == 0:
            print(f"{options.out} is complete already: {len(first)} images")
        return Store.open(options.out)
    manifest.source.open()  # Refuses images that have changed, before anything is made of them.
    if second is not None and rank == 0:
        replace_lost_files(second, first)
    distributed.barrier()
    latents = prepare(_of_latents(options, manifest), semantics_of=None if second is None else second.manifest)
    if latents.manifest.skipped != manifest.skipped:
        raise UserError(
            f"{options.out} lacks other images than {options.store}: some can no longer be read; prepare both again"
        )
    if rank == 0 and second is None:
        add_semantics(latents, first)
    distributed.barrier()
    return Store.open(options.out)


def _of_latents(options: Reencode, manifest: Manifest) -> Prepare:
    """How the second store's own columns are made."""
    subset = manifest.source.subset
    return Prepare(
        Path(manifest.source.path),
        options.out,
        manifest.source.resolution,
        options.autoencoder,
        NO_ENCODER,
        statistics_images=manifest.statistics_images,
        flips=manifest.source.flips,
        share=subset.share if subset else 1.0,
        per_class=subset.per_class if subset else None,
        seed=manifest.statistics_seed,
        batch_size=options.batch_size,
        shard_size=manifest.shard_rows,
        dtype=options.dtype,
        precision=PRECISION,
        workers=options.workers,
        device=options.device,
        reading=manifest.source.reading,
    )


def _with_semantics(options: Reencode, first: Store) -> Store | None:
    """The second store if it has its semantics already, of which files may be missing. Raises UserError for another."""
    if first.manifest.encoder is None or not (options.out / MANIFEST).is_file():
        return None
    second = Store(options.out, read_manifest(options.out))
    if second.manifest.encoder is None:
        return None
    asked = replace(
        first.manifest,
        autoencoder=load_autoencoder(options.autoencoder).spec,
        latent_dtype=options.dtype,
        precision=PRECISION,
    )
    refuse_others(options.out, second.manifest, asked)
    return second
