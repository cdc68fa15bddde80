# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Start
# Images from the small model in the package, and what they depend on. Nothing is downloaded.

# %%
import reglue

model = reglue.load("starter")
model

# %% [markdown]
# One image of each class. Image i is a function of the seed and of i, whatever the batch is.

# %%
from PIL import Image


def row(images):
    """Images beside each other, three times as large."""
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        sheet.paste(image, (i * width, 0))
    return sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST)


classes = model.record.class_names[:5]
images = model.generate(classes=classes, seed=0)
row(images)

# %%
again = model.generate(classes=classes, seed=0, batch_size=2)
[max(abs(a - b) for a, b in zip(x.tobytes(), y.tobytes(), strict=True)) for x, y in zip(images, again, strict=True)]

# %% [markdown]
# Guidance trades variety for likeness: the same noise without it, as by default, and with more.

# %%
for scale in (1.0, model.default_sampling.guidance_scale, 4.0):
    print(scale)
    row(model.generate(classes=classes, seed=0, guidance_scale=scale)).save(f"guidance-{scale:g}.png")
row(model.generate(classes=classes, seed=0, guidance_scale=4.0))

# %% [markdown]
# What the model knows of an image beside its pixels: the local map that it has learned with them, as colours.

# %%
model.see(images[1])
