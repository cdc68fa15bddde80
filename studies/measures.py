"""The figures of a folder of samples, all from one set: by the vision encoder, by FID's Inception, and by a judge."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from circumstances import circumstances
from judge import Judge, load_judge
from reglue.commands.evaluate import DENSITY_NEIGHBOURS, Described, Evaluate, describe, measure
from reglue.commands.sample import PROTOCOL
from reglue.data.images import ImageFolder
from reglue.data.pictures import image_grid
from reglue.data.store import Store
from reglue.encoders.autoencoders import Autoencoder, AutoencoderSpec, load_autoencoder
from reglue.errors import UserError
from reglue.files import replacing
from reglue.image_sets import ImageSet, Share, open_images
from reglue.metrics.distances import GaussianStatistics, nearest
from reglue.metrics.features import FeatureNetwork, FeatureSet, describe_images, load_encoder_features
from reglue.metrics.inception import INCEPTION, load_inception
from reglue.metrics.resampling import CONFIDENCE
from reglue.reals.samples import to_images, to_pixels
from reglue.seeds import permutation
from reglue.training.distributed import resolve_device
from summary import MEASURED_BY

if TYPE_CHECKING:
    from study import StudyOptions

CLOSE = 0.01
"""A sample is close to an image if it stands out by more than all but this share of held-out images do."""
NEIGHBOURHOOD = 50
"""Images next to the nearest that say how close is usual there, as in Carlini et al. (2023, arXiv 2301.13188); a tenth
of the smaller set, if that is less."""
PAIRS = 10
"""Samples in the picture of the closest pairs."""
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
        self._last: tuple[Path, FeatureSet] | None = None
        self._last_autoencoder: Autoencoder | None = None
        self._without_controls: set[Path] = set()

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
            _ = self._held_out_closeness
        if "inception" in kinds:
            self._features(self._inception, self.options.reference, "held-out")
        if "judge" in kinds:
            self._real_verdict()

    def of(self, kind: str, samples: Path) -> dict[str, Any]:
        """The figures of one kind: encoder, inception or judge.

        Raises UserError if the study has figures of this kind by another network, before any is computed.
        """
        network = {"encoder": "_encoder", "inception": "_inception", "judge": "_judge"}[kind]
        self._refuse_another(kind, getattr(self, network).sha256)
        by = {"encoder": self._by_encoder, "inception": self._by_inception, "judge": self._by_judge}[kind]
        return {**by(samples), "circumstances": circumstances(self.device)}

    def controls(self, path: Path) -> dict[str, Any]:
        """The figures of what the autoencoder of a store makes of real images: training images, and held-out ones.

        The former are copies, as good as this space allows; the latter are new images, compared with the other held-out
        ones. Measured once and kept. Empty where images or autoencoder are not at hand, or images are too few.
        """
        training, held_out = Store.open(path), open_images(self.options.reference, None, 1, "cpu")
        side = ImageSet(path, None, training)
        digest = training.manifest.autoencoder.weights_sha256
        said = [self._encoder.sha256, digest, self.options.count, fingerprint(held_out)]
        file = self._kept("controls", side, said, ".json")
        if file in self._without_controls:
            return {}
        if not file.is_file():
            try:
                figures = self._of_reconstructions(training, held_out)
            except UserError as error:
                print(f"reconstructions are not measured: {error}", file=sys.stderr)
                self._without_controls.add(file)
                return {}
            with replacing(file) as beside:
                beside.write_text(json.dumps(figures))
        return json.loads(file.read_text())

    def draw_closest(self, samples: Path, path: Path) -> None:
        """A picture of the samples that stand closest to a training image, each above that image out of the store.

        `path` is the picture's. Nothing is drawn where the autoencoder is not at hand.
        """
        features = self._described(samples).features
        real = self._features(self._encoder, self.options.store, "training")
        training = closeness(features, real, self._neighbours)
        rows = training.ratio.argsort()[:PAIRS]
        try:
            originals = self._decoded(self.store, self.store.originals[training.nearest[rows]])
        except UserError as error:
            print(f"the closest pairs are not drawn: {error}", file=sys.stderr)
            return
        drawn = torch.cat(list(self._batches(open_images(samples, None, 1, "cpu"))))[rows]
        pictures = torch.cat([drawn, originals]).permute(0, 2, 3, 1).numpy()
        with replacing(path) as beside:
            Image.fromarray(image_grid(pictures, columns=len(rows))).save(beside, format="png")

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

    def operations(self) -> tuple[int, int]:
        """Of one image: those of the networks that look at every checkpoint, and the Inception's."""
        pixels = torch.zeros(1, 3, *self.resolution, dtype=torch.uint8)
        counted = []
        for networks in ([self._encoder], [self._inception] if self.options.inception else []):
            with FlopCounterMode(display=False) as counter:
                for network in networks:
                    network.describe(pixels.to(self.device))
            counted.append(counter.get_total_flops())
        if self.options.judge:
            with FlopCounterMode(display=False) as counter:
                self._judge.scores(pixels)
            counted[0] += counter.get_total_flops()
        return counted[0], counted[1]

    def _by_encoder(self, samples: Path) -> dict[str, Any]:
        drawn, held_out = self._described(samples), self._features(self._encoder, self.options.reference, "held-out")
        return {**self._distances(self._encoder, drawn, held_out), **self._copying(drawn.features, held_out)}

    def _by_inception(self, samples: Path) -> dict[str, Any]:
        held_out = self._features(self._inception, self.options.reference, "held-out")
        images = self._batches(open_images(samples, None, 1, "cpu"))
        return self._distances(self._inception, describe_images(self._inception, images), held_out)

    def _by_judge(self, samples: Path) -> dict[str, Any]:
        labels = json.loads((samples / PROTOCOL).read_text())["labels"]
        verdict = self._judge.verdict(
            self._batches(open_images(samples, None, 1, "cpu")), labels, self.store.manifest.source.class_names
        )
        shares = {name: share_of(value, len(labels)) for name, value in asdict(verdict).items()}
        described = {"judge": self._judge.name, "judge_sha256": self._judge.sha256, "images": len(labels)}
        return {**shares, "real": self._real_verdict(), **described}

    def _of_reconstructions(self, training: Store, held_out: ImageSet) -> dict[str, Any]:
        """Figures of reconstructions of training images and of held-out images."""
        features = self._features(self._encoder, self.options.reference, "held-out")
        count = min(self.options.count, len(training.originals), len(features) // 2)
        if count <= DENSITY_NEIGHBOURS:
            raise UserError(
                f"--reference {self.options.reference} has {len(features)} images, too few to leave out any"
            )
        of_training = permutation(0, "reconstructed training images", 0, len(training.originals))[:count].sort().values
        of_held_out = permutation(0, "reconstructed held-out images", 0, len(features))[:count].sort().values
        rest = torch.ones(len(features), dtype=torch.bool)
        rest[of_held_out] = False
        others = self._reconstructed(held_out, of_held_out, training.manifest.autoencoder)  # Fails first, if one does.
        copies = self._decoded(training, training.originals[of_training])
        figures = {}
        for name, images, compared in (("training", copies, features), ("held-out", others, features[rest])):
            described = describe_images(self._encoder, images.split(self.options.sampling_batch))
            copying = self._copying(described.features, compared)
            figures[name] = {**self._distances(self._encoder, described, compared), **copying}
        return figures

    @torch.inference_mode()
    def _decoded(self, store: Store, rows: Tensor) -> Tensor:
        """Rows (N,) of a store as its autoencoder shows them: uint8 (N, 3, H, W)."""
        autoencoder = self._autoencoder(store.manifest.autoencoder)
        latents = (store.read("latent", part)["mean"].float() for part in rows.split(self.options.sampling_batch))
        return torch.cat([to_pixels(autoencoder.decode(part.to(self.device))).cpu() for part in latents])

    @torch.inference_mode()
    def _reconstructed(self, side: ImageSet, rows: Tensor, spec: AutoencoderSpec) -> Tensor:
        """Some readable images of a side as an autoencoder shows them, from the side's own latents if it has them."""
        if side.store is not None and side.store.manifest.autoencoder == spec:
            return self._decoded(side.store, side.store.originals[rows])
        autoencoder, wanted, reconstructed, before = self._autoencoder(spec), set(rows.tolist()), [], 0
        for batch in self._batches(side):
            chosen = [i for i in range(len(batch)) if before + i in wanted]
            before += len(batch)
            if chosen:
                latents = autoencoder.encode(to_images(batch[chosen].to(self.device))).mean
                reconstructed.append(to_pixels(autoencoder.decode(latents)).cpu())
        return torch.cat(reconstructed)

    def _autoencoder(self, spec: AutoencoderSpec) -> Autoencoder:
        """A store's autoencoder; the last one stays at hand. Raises UserError if it is not where it was."""
        if self._last_autoencoder is None or self._last_autoencoder.spec != spec:
            found = load_autoencoder(self.options.autoencoder or spec.name, self.device)
            if found.spec != spec:
                raise UserError(f"autoencoder {found.spec.name} is not that of the store; set --autoencoder to it")
            self._last_autoencoder = found
        return self._last_autoencoder

    def _copying(self, features: Tensor, held_out: Tensor) -> dict[str, Any]:
        """Whether samples with features (N, D) are copies of training images, or merely near many images.

        A sample is close to an image of a set if it stands out: if the ratio of its distance to the nearest image and
        its mean distance to the next `NEIGHBOURHOOD` is below that of all but `CLOSE` of held-out images to training
        images. A sample without features is about as far from the nearest image as from the next. `copied` is the
        share that is close to a training image less the share that is close to a held-out image: 0 where nothing is
        learned by heart, 1 where all samples are. The ratio does not fall with the size of a set as distances do, so
        sets of different sizes compare.
        """
        training = self._features(self._encoder, self.options.store, "training")
        to_training, to_held_out = (closeness(features, real, self._neighbours) for real in (training, held_out))
        threshold = self._held_out_closeness.ratio.quantile(CLOSE)
        close, innocent = (side.ratio < threshold for side in (to_training, to_held_out))
        copies, others = (float(which.double().mean()) for which in (close & ~innocent, innocent & ~close))
        return {
            "nearest_training_image": float(to_training.distance.median()),
            "nearest_training_image_of_held_out": float(self._held_out_closeness.distance.median()),
            "copied": difference_of(copies, others, len(features)),
            "close_to_training_images": float(close.double().mean()),
            "close_to_held_out_images": float(innocent.double().mean()),
            "distinct_nearest_training_images": len(to_training.nearest.unique()),
        }

    def _distances(self, network: FeatureNetwork, drawn: FeatureSet, held_out: Tensor) -> dict[str, Any]:
        """The figures of `reglue evaluate`, of samples against held-out images' features (M, D)."""
        options = Evaluate(
            self.options.out,
            resamples=self.options.resamples,
            kernel_subsets=KERNEL_SUBSETS,
            kernel_subset_size=self.options.count,
        )
        sides = (_with_gaussian(drawn), _with_gaussian(FeatureSet(held_out, None, None)))
        metrics, _ = measure(network, *sides, options, self.device)
        figures = {name: figure for name, figure in asdict(metrics).items() if figure is not None}
        described = {
            "distance_name": network.distance_name,
            "network_sha256": network.sha256,
            "images": len(drawn.features),
            "held_out_images": len(held_out),
        }
        return {**figures, **described}

    def _described(self, samples: Path) -> FeatureSet:
        """What the encoder says of samples; the last ones stay at hand."""
        if self._last is None or self._last[0] != samples:
            images = self._batches(open_images(samples, None, 1, "cpu"))
            self._last = samples, describe_images(self._encoder, images)
        return self._last[1]

    def _refuse_another(self, kind: str, sha256: str) -> None:
        """Raise UserError if a file of the study has figures of a kind by another network."""
        for file in sorted(self.options.out.glob(f"*/*.{kind}.json")):
            found = json.loads(file.read_text()).get(MEASURED_BY[kind], sha256)
            if found != sha256:
                raise UserError(
                    f"--{kind} is another network than {file} is by; give the same one, or choose another --out"
                )

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
    def _held_out_closeness(self) -> Closeness:
        held_out = self._features(self._encoder, self.options.reference, "held-out")
        training = self._features(self._encoder, self.options.store, "training")
        return closeness(held_out, training, self._neighbours)

    @cached_property
    def _neighbours(self) -> int:
        """How many images are the neighbourhood of one: as many in both sets, and a small part of either."""
        sides = [(self.options.reference, "held-out"), (self.options.store, "training")]
        fewest = min(len(self._features(self._encoder, path, name)) for path, name in sides)
        return max(1, min(NEIGHBOURHOOD, fewest // 10))

    def _real_verdict(self) -> dict[str, Any] | None:
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
        known = json.loads(file.read_text())
        return {name: v if name == "images" else share_of(v, known["images"]) for name, v in known.items()}

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


class Closeness(NamedTuple):
    """How close samples are to a set of real images."""

    ratio: Tensor
    """(N,): the distance to the nearest image over the mean distance to the next ones; small where one stands out."""
    distance: Tensor
    """(N,): to the nearest image."""
    nearest: Tensor
    """(N,) int64: which it is."""


def closeness(features: Tensor, real: Tensor, neighbours: int) -> Closeness:
    """How close samples with features (N, D) are to real images with features (M, D), by so many next ones."""
    distances, places = nearest(features, real, neighbours + 1)
    usual = distances[:, 1:].mean(1).clamp(min=torch.finfo(distances.dtype).tiny)
    return Closeness(distances[:, 0] / usual, distances[:, 0], places[:, 0])


def share_of(share: float, count: int) -> dict[str, float]:
    """A share of so many images with Wilson's interval, as figures are written."""
    found = binomtest(round(share * count), count).proportion_ci(CONFIDENCE, method="wilson")
    return {"value": share, "low": float(found.low), "high": float(found.high)}


def difference_of(first: float, second: float, count: int) -> dict[str, float]:
    """The difference of two shares of so many images, with the interval of Newcombe (1998, method 10).

    Unlike resampling it has a width where no image was found.
    """
    one, other = share_of(first, count), share_of(second, count)
    below = math.hypot(one["value"] - one["low"], other["high"] - other["value"])
    above = math.hypot(one["high"] - one["value"], other["value"] - other["low"])
    return {"value": first - second, "low": max(-1.0, first - second - below), "high": min(1.0, first - second + above)}


def _with_gaussian(drawn: FeatureSet) -> Described:
    gaussian = GaussianStatistics(drawn.features.shape[1]).update(drawn.features).gaussian
    return Described(gaussian, None, drawn, None, "", False)


def _folder_of(side: ImageSet) -> ImageFolder:
    folder = getattr(side.images, "folder", None)
    if folder is None:
        raise UserError(f"--reference {side.path}: give a store or a folder of images")
    return folder
