"""`reglue head`: a head, trained on a store's features, that predicts classes, segmentation or depth of every pixel."""

from __future__ import annotations

from reglue.commands.probe import labelled_images, parts_of, training_of
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.files import new_folder, read_json, refuse_filled, to_json, write_text
from reglue.locks import writes
from reglue.options.train_head import TrainHead
from reglue.perception.fitting import fit_head, head_spec, score_head
from reglue.perception.heads import TRAINING, Head, load_head
from reglue.perception.labelled import LAST_LAYER, StoreInput, open_input, with_depths
from reglue.perception.records import HeadRecord
from reglue.run import versions
from reglue.training import distributed


@writes()
def train_head(options: TrainHead) -> Head:
    """Train and measure a head and write it. Raises UserError for anything that the user can fix."""
    asked = {name: str(value) for name, value in vars(options).items()}
    if (options.out / TRAINING).is_file() and read_json(
        options.out / TRAINING, HeadRecord, "delete its folder"
    ).options == asked:
        print(f"{options.out} is complete already")
        return load_head(options.out)
    refuse_filled(options.out)  # Before the training rather than after it.
    device = distributed.alone("head", options.device)
    store = Store.open(options.store)
    read = features_of(options, store)
    images = labelled_images(options, store) if options.depth is None else with_depths(store, options.depth)
    parts = parts_of(options, images)
    spec = head_spec(
        images,
        task="depth" if options.depth else "segmentation",
        all_layers=options.layers == "all",
        hidden=options.hidden,
        class_names=options.class_names,
    )
    head, fitted = fit_head(spec, read, parts, training_of(options, options.hidden, device))
    record = HeadRecord(
        options=asked,
        images_sha256=store.manifest.source.fingerprint,
        fitted=len(parts.fitting),
        selected=len(parts.selection),
        measured=len(parts.measured),
        chosen=fitted.chosen,
        scores=score_head(head, fitted, read, parts.measured, options.seed),
        versions=versions(),
    )
    with new_folder(options.out) as folder:
        head.save(folder)
        write_text(folder / TRAINING, to_json(record))
    scores = ", ".join(f"{name.replace('_', ' ')} {score.value or 0:.3f}" for name, score in record.scores.items())
    print(f"{options.out}: {scores}, on {record.measured} images that the head was not trained on")
    return head


def features_of(options: TrainHead, store: Store) -> StoreInput:
    """The layers of the store's features that the head reads. Raises UserError if it has none, or not the last."""
    encoder = store.manifest.encoder
    if "features" not in store.manifest.columns or encoder is None:
        raise UserError(f"{store.folder} has no features; prepare it with --features")
    if options.layers == "last" and encoder.layers[-1] != encoder.depth - 1:
        raise UserError(
            f"{store.folder} holds layers {list(encoder.layers)}, not the last one ({encoder.depth - 1}); use "
            "--layers all, or prepare with it among --layers"
        )
    return open_input(store, LAST_LAYER if options.layers == "last" else "features")
