# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Edit
# A model that learns images together with their semantics can be told what to keep of an image in its own terms.

# %%
import reglue

model = reglue.load("starter")
shoe, shirt = model.generate(classes=["ankle boot", "T-shirt"], seed=0)
shoe

# %% [markdown]
# **Variations.** The local map is kept, everything else is drawn anew: the same thing in another hand.

# %%
variations = model.edit(shoe, keep=("local",), count=4, seed=0)
variations[0]

# %% [markdown]
# **Something else of it.** The map is let go at t = 0.7, for the class to have its way.

# %%
(dress,) = model.edit(shirt, keep=("local",), until=0.7, classes="dress")
dress

# %% [markdown]
# **A part of it.** White is drawn anew, black stays.

# %%
from PIL import Image

mask = Image.new("L", shoe.size)
mask.paste(255, (shoe.width // 2, 0, shoe.width, shoe.height))
halves = model.edit(shoe, mask=mask, classes="ankle boot", count=2)
halves[0]

# %% [markdown]
# **From one to the other**, semantics in between, out of the same noise.

# %%
frames = model.interpolate(shoe, shirt, steps=5)
frames[2]
