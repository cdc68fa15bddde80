import pytest
import torch

from reglue.metrics import classifier as module
from reglue.metrics.classifier import train_classifier


def bars(count: int, height: int = 12, width: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with a bright bar: across (0), down (1), or none (2)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 3
    images[labels == 0, :, height // 2 - 1 : height // 2 + 2] = 255
    images[labels == 1, :, :, width // 2 - 1 : width // 2 + 2] = 255
    return images, labels


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(module, "EPOCHS", 4)
    monkeypatch.setattr(module, "BATCH_SIZE", 16)


@pytest.mark.trains
def test_it_learns_what_can_be_seen_in_images_of_any_shape(quick):
    classifier = train_classifier(*bars(240), classes=3, seed=0, progress=False)
    images, labels = bars(90, seed=1)
    assert classifier.accuracy(images, labels) > 0.95
    assert classifier.accuracy(images, (labels + 1) % 3) < 0.05
    assert classifier.predict(images).shape == (90,)
    # What is asked of it later does not change it.
    assert classifier.predict(images[:1]) == classifier.predict(images)[:1]


@pytest.mark.trains
def test_the_seed_decides_and_the_global_state_does_not(quick):
    state = torch.get_rng_state()
    first = train_classifier(*bars(32), classes=4, seed=5, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = train_classifier(*bars(32), classes=4, seed=5, progress=False)
    other = train_classifier(*bars(32), classes=4, seed=6, progress=False)
    images = bars(8, seed=2)[0]
    assert first(images).shape == (8, 4)
    torch.testing.assert_close(first(images), again(images))
    assert not torch.allclose(first(images), other(images), atol=1e-2)


def test_a_batch_of_one_left_over_does_not_break_training(quick):
    train_classifier(*bars(17), classes=3, seed=0, progress=False)


def test_labels_outside_the_classes_are_refused():
    images, labels = bars(9)
    with pytest.raises(ValueError, match="0 to 2, outside 2 classes"):
        train_classifier(images, labels, classes=2, seed=0)
    with pytest.raises(ValueError, match="9 images and 8 labels"):
        train_classifier(images, labels[:8], classes=3, seed=0)
