"""A run as a pipeline of diffusers: its networks as parts, and this package's way from noise to images."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import safetensors.torch  # noqa: F401, diffusers 0.32 reads weights by it without importing it
import torch

# diffusers reads the annotations here, and looks for the base of a class among the names of its module.
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from reglue.diffusion.denoiser import Denoiser
from reglue.diffusion.modalities import LATENT, concatenate_states
from reglue.encoders.autoencoders import DIFFUSERS_KINDS
from reglue.errors import UserError
from reglue.files import plain, seal
from reglue.generation import evaluations
from reglue.pipeline import ImageModel
from reglue.portable import CODE, CONFIG, INDEX, record_of, template
from reglue.published.sharing import without_places
from reglue.run import RunRecord

LARGEST = 2**63 - 1
"""Of seeds that are drawn."""


class ReglueTransformer(ModelMixin, ConfigMixin):
    """A run's denoiser, with its record as configuration."""

    @register_to_config
    def __init__(self, record: dict[str, Any], step: int) -> None:
        """`record` is a `RunRecord` as JSON has it. Raises ValueError for anything else."""
        super().__init__()
        self.denoiser = Denoiser(self.record.denoiser)

    @cached_property
    def record(self) -> RunRecord:
        """What the configuration says."""
        return record_of(dict(self.config))


class RegluePipeline(DiffusionPipeline):
    """Images of classes, or of none: with the same seed and way to sample, the same pixels as `reglue sample`."""

    def __init__(self, transformer: ReglueTransformer, vae: ModelMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae)

    @classmethod
    def of(cls, model: ImageModel) -> Self:
        """The pipeline of a model, which keeps its networks. Raises UserError if diffusers lacks its autoencoder."""
        network = getattr(model.autoencoder, "network", None)
        if network is None:
            raise UserError(
                f"diffusers has no class for the autoencoder {model.autoencoder.spec.kind}, with which this run decodes"
            )
        transformer = ReglueTransformer(plain(without_places(model.record)), model.step)
        transformer.denoiser = model.denoiser
        return cls(transformer, network)

    @property
    def model(self) -> ImageModel:
        """The run with the pipeline's networks, brought to float32: products are in the precision of its sampling."""
        record, autoencoder = self.transformer.record, DIFFUSERS_KINDS[type(self.vae).__name__].autoencoder
        decodes = autoencoder(self.vae.float(), record.autoencoder)
        return ImageModel(record, self.transformer.denoiser.float(), decodes, step=self.transformer.config["step"])

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        seed: int | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        **changes: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images: one of each class by number or name, or `batch_size` of one class or of none.

        Image i is a function of the seed and i, as for `reglue sample`. A generator that has drawn nothing yet stands
        for its own seed, one that has for the next that it draws; of several, each draws the first image of its seed.
        Without either, PyTorch's draws it. Steps, guidance and the other fields of `Sampling` are the recipe's if not
        given. `output_type`: PIL images, arrays (N, H, W, 3) or tensors (N, 3, H, W) in [0, 1], or raw latents for
        `vae.decode`. Raises UserError for an unknown class, and for what the model lacks.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type {output_type}: choose pil, np, pt or latent")
        model = self.model
        labels = model.labels_of(class_labels, batch_size if batch_size else count_of(class_labels))
        changes = {"steps": num_inference_steps, "guidance_scale": guidance_scale} | changes
        sampling = model.default_sampling.changed(**changes)
        if isinstance(generator, Sequence):
            if len(generator) != len(labels):
                raise UserError(f"{len(generator)} generators for {len(labels)} images; give one, or one for each")
            parts = [([label], seed_of(one)) for label, one in zip(labels, generator, strict=True)]
        else:
            parts = [(labels, seed_of(generator) if seed is None else seed)]
        total = evaluations(sampling, len(parts))
        with self.progress_bar(total=total or 0) as bar:  # type: ignore[reportCallIssue]
            drawn = [model.drawn(part, seed, sampling, len(part), bar.update) for part, seed in parts]
            state = concatenate_states([state for part in drawn for state in part])
        images: Any = model.raw(state, LATENT)
        if output_type != "latent":
            images = model.pixels(state, sampling.rounding)
        if output_type == "pil":
            images = [Image.fromarray(image) for image in images.cpu().numpy()]
        elif output_type == "np":
            images = images.cpu().float().numpy() / 255
        elif output_type == "pt":
            images = images.permute(0, 3, 1, 2).float() / 255
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_config(self, save_directory: str | Path, *arguments: Any, **others: Any) -> None:
        """What `save_pretrained` ends with: also the code that loads the folder, and hashes in its tensor files.

        No configuration names a folder of this machine.
        """
        super().save_config(save_directory, *arguments, **others)
        folder = Path(save_directory)
        (folder / CODE).write_text(template(CODE), encoding="utf-8")
        for file in [folder / INDEX, *folder.glob(f"*/{CONFIG}")]:
            content = json.loads(file.read_text())
            content.pop("_name_or_path", None)
            if file.name == INDEX:
                content["_class_name"] = [Path(CODE).stem, type(self).__name__]
            file.write_text(json.dumps(content, indent=2) + "\n")
        for file in folder.glob("*/*.safetensors"):
            seal(file)


def count_of(classes: int | str | Sequence[int | str] | None) -> int:
    """How many images there are of what is given as classes."""
    return 1 if classes is None or isinstance(classes, int | str) else len(classes)


def seed_of(generator: torch.Generator | None) -> int:
    """The seed that a generator stands for, which has drawn one number then; None is PyTorch's own, which draws it."""
    if generator is None:
        return int(torch.randint(LARGEST, ()))
    seed = generator.initial_seed()
    fresh = torch.equal(torch.Generator(generator.device).manual_seed(seed).get_state(), generator.get_state())
    drawn = torch.randint(LARGEST, (), generator=generator, device=generator.device)
    return seed if fresh else int(drawn)
