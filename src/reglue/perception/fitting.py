"""Heads, fitted to a store's features by the probes that suit their task."""

from __future__ import annotations

from dataclasses import replace

import torch

from reglue.encoders.vision import VisionFeatures
from reglue.errors import UserError
from reglue.perception.agreement import IGNORE, ClassAgreement, DepthAgreement, Estimate
from reglue.perception.heads import Head, HeadSpec, Task
from reglue.perception.labelled import LabelledImages, Parts, StoreInput
from reglue.perception.probes import (
    Fitted,
    LinearProbe,
    MapProbe,
    ProbeTraining,
    fit_depth,
    fit_linear,
    fit_map,
    measure_probe,
)

AT_ONCE = 64
"""Images measured at once."""


def head_spec(
    images: LabelledImages, task: Task, *, all_layers: bool, hidden: int, class_names: tuple[str, ...]
) -> HeadSpec:
    """What a head for these images will be.

    Classes are named by the store, or for masks by `class_names`, otherwise by their numbers. Raises UserError for
    masks without a class, or with more classes than names.
    """
    source, encoder, targets = images.store.manifest.source, images.store.manifest.encoder, images.targets
    assert encoder is not None
    spec = HeadSpec(
        task=task,
        architecture=encoder.architecture,
        width=encoder.width,
        layers=encoder.layers if all_layers else encoder.layers[-1:],
        outputs=1,
        encoder_sha256=encoder.weights_sha256,
        encoder=encoder.name,
        final_norm=encoder.final_norm,
        hidden=hidden,
    )
    if task == "depth":
        known = targets[targets.isfinite()]
        return replace(spec, depth_range=(float(known.min()), float(known.max())))
    names = source.class_names
    if targets.ndim > 1:
        counted = targets[targets != IGNORE]
        if not len(counted):
            raise UserError("every pixel of the masks is to be ignored (255); give other masks")
        highest = int(counted.max())
        if class_names and highest >= len(class_names):
            raise UserError(f"there are names for {len(class_names)} classes, but a mask has class {highest}; name all")
        names = class_names or tuple(map(str, range(highest + 1)))
    return replace(spec, outputs=len(names), class_names=names)


def fit_head(spec: HeadSpec, read: StoreInput, parts: Parts, training: ProbeTraining) -> tuple[Head, Fitted]:
    """The head that does to raw features what a fitted probe does to standardised ones, and that probe."""
    fitting, selection = read.examples(parts.fitting), read.examples(parts.selection)
    if spec.task == "depth":
        fitted = fit_depth(fitting, selection)
    elif fitting.targets.ndim == 1:
        fitted = fit_linear(fitting, selection, spec.outputs, flat=False)
    else:
        fitted = fit_map(fitting, selection, spec.outputs, training)
    head = Head(spec, mean=read.mean, std=read.std)
    if isinstance(fitted.probe, MapProbe):
        head.layers.load_state_dict(fitted.probe.layers.state_dict())
    else:
        assert isinstance(fitted.probe, LinearProbe)
        weight = fitted.probe.weight.T[:, :, None, None].float()
        head.layers.load_state_dict({"0.weight": weight, "0.bias": fitted.probe.bias.float()})
    return head.eval(), fitted


def score_head(
    head: Head, fitted: Fitted, read: StoreInput, measured: LabelledImages, seed: int
) -> dict[str, Estimate]:
    """How well a head does on images that it was not trained on. A head of classes is measured as a classifier."""
    examples = read.examples(measured)
    if measured.targets.ndim == 1:
        score = measure_probe(fitted.probe, examples, head.spec.outputs, seed)
        return {"accuracy": Estimate(score.value, score.standard_error, None)}
    agreement = DepthAgreement() if head.spec.task == "depth" else ClassAgreement(head.spec.outputs)
    size = (measured.targets.shape[1], measured.targets.shape[2])
    for inputs, targets in examples.batches("measure", AT_ONCE):
        seen = VisionFeatures(torch.empty(len(inputs), 0), read.raw(inputs))
        agreement.update(head.predict(seen, head.spec.layers, size), targets)
    return agreement.estimates(seed)
