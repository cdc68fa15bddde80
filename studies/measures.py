"""The figures of a folder of samples, all from one set: by the vision encoder, by FID's Inception, and by a judge."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from judge import Judge, load_judge
from reglue.data.images import ImageFolder
from reglue.data.store import Store
from reglue.errors import UserError
from reglue.files import replacing
from reglue.jobs.evaluate import Described, Evaluate, describe, measure
from reglue.jobs.image_sets import ImageSet, Share, open_images
from reglue.jobs.sample import PROTOCOL
from reglue.metrics.distances import GaussianStatistics, nearest
from reglue.metrics.features import FeatureNetwork, FeatureSet, describe_images, load_encoder_features
from reglue.metrics.inception import INCEPTION, load_inception
from reglue.runs.ranks import resolve_device

if TYPE_CHECKING:
    from study import StudyOptions

CLOSE = 0.01
"""A sample is suspiciously close to a training image if it is closer than all but this share of held-out images."""
REFERENCES = "references"
"""Folder of features of real images, in a study's and in a packed store."""
KERNEL_SUBSETS = 20
"""Fewer than usual, since each has all of the samples: only the real images are drawn anew."""


class Measures:
    """Measures folders of samples against the same real images, whose features are computed once and kept on disk."""

    def __init__(self, options: StudyOptions):
        self.options = options
        self.device = resolve_device(options.device)
        self.store = Store.open(options.store)
        self.resolution = self.store.manifest.source.resolution
        self.folder = options.out / REFERENCES

    @property
    def references(self) -> dict[str, Any]:
        """What is known of the real images."""
        found = {file.stem: json.loads(file.read_text()) for file in sorted(self.folder.glob("*.json"))}
        return {"training": {"path": str(self.options.store), "images": len(self.store.originals)}, **found}

    def open(self, kinds: Sequence[str]) -> None:
        """Load the networks of some kinds of figures. Raises UserError if one is missing or does not fit."""
        for kind in kinds:
            getattr(self, f"_{kind}")
        if "judge" in kinds:
            self._judge.places_of(self.store.manifest.source.class_names)

    def know(self, kinds: Sequence[str]) -> None:
        """Find out all that some kinds of figures need of real images, and keep it on disk."""
        if "encoder" in kinds:
            _ = self._held_out_distances
        if "inception" in kinds:
            self._features(self._inception, self.options.reference, "held-out")
        if "judge" in kinds:
            self._real_verdict()

    def of(self, kind: str, samples: Path) -> dict[str, Any]:
        """The figures of one kind: encoder, inception or judge."""
        return {"encoder": self._by_encoder, "inception": self._by_inception, "judge": self._by_judge}[kind](samples)

    def seconds(self, samples: Path) -> tuple[float, float]:
        """How long the networks look at samples: those of every checkpoint, and the Inception."""
        batches = list(self._batches(open_images(samples, None, 1, "cpu")))
        networks = [self._encoder, *([self._inception] if self.options.inception else [])]
        took = []
        for network in networks:
            describe_images(network, batches[:1])  # The first time is slower.
            began = time.perf_counter()
            describe_images(network, batches)
            took.append(time.perf_counter() - began)
        if self.options.judge:
            self._judge.scores(batches[0])
            began = time.perf_counter()
            for batch in batches:
                self._judge.scores(batch).cpu()
            took[0] += time.perf_counter() - began
        return took[0], sum(took[1:])

    def _by_encoder(self, samples: Path) -> dict[str, Any]:
        network, training = self._encoder, self._features(self._encoder, self.options.store, "training")
        figures, features = self._distances(network, samples)
        held_out = self._held_out_distances
        distances = nearest(features, training)[0][:, 0]
        return {
            **figures,
            "nearest_training_image": float(distances.median()),
            "nearest_training_image_of_held_out": float(held_out.median()),
            "suspiciously_close": float((distances < held_out.quantile(CLOSE)).double().mean()),
        }

    def _by_inception(self, samples: Path) -> dict[str, Any]:
        return self._distances(self._inception, samples)[0]

    def _by_judge(self, samples: Path) -> dict[str, Any]:
        labels = json.loads((samples / PROTOCOL).read_text())["labels"]
        verdict = self._judge.verdict(
            self._batches(open_images(samples, None, 1, "cpu")), labels, self.store.manifest.source.class_names
        )
        return {**asdict(verdict), "real": self._real_verdict(), "judge": self._judge.name}

    def _distances(self, network: FeatureNetwork, samples: Path) -> tuple[dict[str, Any], Tensor]:
        """The figures of `reglue evaluate`, and the samples' features (N, D)."""
        options = Evaluate(
            samples,
            resolution=self.resolution,
            resamples=self.options.resamples,
            batch_size=self.options.sampling_batch,
            kernel_subsets=KERNEL_SUBSETS,
            kernel_subset_size=self.options.count,
        )
        drawn = describe(network, open_images(samples, None, 1, "cpu"), "samples", options, [])
        assert drawn.images is not None
        real = _described(self._features(network, self.options.reference, "held-out"))
        metrics, _ = measure(network, drawn, real, options, self.device)
        figures = {name: figure for name, figure in asdict(metrics).items() if figure is not None}
        described = {
            "distance_name": network.distance_name,
            "network_sha256": network.sha256,
            "images": drawn.count,
            "held_out_images": real.count,
        }
        return {**figures, **described}, drawn.images.features

    def _features(self, network: FeatureNetwork, path: Path, name: str) -> Tensor:
        """The features (N, D) of real images: a store's, or computed once and kept, by a hash of what they are of."""
        side = open_images(path, None, 1, "cpu")
        said = [network.sha256, network.features_name, network.input_rule]
        file = self._kept(name, side, said, ".safetensors")
        if not file.is_file():
            # Kept even where the store has them: reading them again costs more than their few megabytes.
            options = Evaluate(path, resolution=self.resolution, batch_size=self.options.sampling_batch)
            found = describe(network, side, f"{name} images", options, skipped := [])
            assert found.images is not None
            if skipped:
                print(f"{len(skipped)} {name} images cannot be read, such as {skipped[0]}", file=sys.stderr)
            with replacing(file) as beside:
                save_file({"features": found.images.features}, beside)
        return load_file(file)["features"]

    @cached_property
    def _held_out_distances(self) -> Tensor:
        sides = [(self.options.reference, "held-out"), (self.options.store, "training")]
        held_out, training = (self._features(self._encoder, path, name) for path, name in sides)
        return nearest(held_out, training)[0][:, 0]

    def _real_verdict(self) -> dict[str, float] | None:
        """How well the judge knows as many held-out images, at the same size; None where they are not at hand."""
        side = open_images(self.options.reference, None, 1, "cpu")
        file = self._kept("judge", side, [self._judge.sha256, self.options.count], ".json")
        if not file.is_file():
            try:
                source = side.store.manifest.source.open() if side.store else _folder_of(side)
            except UserError as error:
                print(f"the judge is not tried on real images: {error}", file=sys.stderr)
                return None
            spread = torch.linspace(0, len(source) - 1, min(self.options.count, len(source))).long().tolist()
            loaded = {index: source.load(index, self.resolution) for index in spread}
            images = {index: image for index, image in loaded.items() if isinstance(image, Tensor)}
            batches = torch.stack(list(images.values())).split(self.options.sampling_batch)
            labels = [source.labels[index] for index in images]
            verdict = self._judge.verdict(batches, labels, source.class_names)
            with replacing(file) as beside:
                beside.write_text(json.dumps({"images": len(images), **asdict(verdict)}))
        return json.loads(file.read_text())

    def _kept(self, name: str, side: ImageSet, said: list[Any], suffix: str) -> Path:
        """The file for what is found out about real images, by a hash of the images and of who says it."""
        digest = hashlib.sha256(json.dumps([*said, self.resolution, fingerprint(side)]).encode()).hexdigest()
        file = f"{name}-{digest[:16]}{suffix}"
        # A packed store, whose images were left behind, brings along what was found out about them.
        packed = side.path / REFERENCES / file
        if packed.is_file():
            return packed
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / file

    def _batches(self, side: ImageSet) -> Iterator[Tensor]:
        assert side.images is not None
        for batch in side.images.batches(self.resolution, Share(self.options.sampling_batch)):
            yield torch.stack([image for image in batch if isinstance(image, Tensor)])

    @cached_property
    def _encoder(self) -> FeatureNetwork:
        spec = self.store.manifest.encoder
        name = self.options.encoder or (spec and spec.name)
        if name is None:
            raise UserError(f"{self.options.store} was prepared without a vision encoder; name one with --encoder")
        return load_encoder_features(name, self.resolution, "class-token", self.device)

    @cached_property
    def _inception(self) -> FeatureNetwork:
        assert self.options.inception is not None
        file = None if self.options.inception == INCEPTION else Path(self.options.inception)
        return load_inception(file, self.device)

    @cached_property
    def _judge(self) -> Judge:
        assert self.options.judge is not None
        return load_judge(self.options.judge, self.device)


def fingerprint(side: ImageSet) -> str:
    """Which real images they are."""
    return side.store.manifest.source.fingerprint if side.store else _folder_of(side).fingerprint()


def _described(features: Tensor) -> Described:
    gaussian = GaussianStatistics(features.shape[1]).update(features).gaussian
    return Described(gaussian, None, FeatureSet(features, None, None), None, "", False)


def _folder_of(side: ImageSet) -> ImageFolder:
    folder = getattr(side.images, "folder", None)
    if folder is None:
        raise UserError(f"--reference {side.path}: give a store or a folder of images")
    return folder
