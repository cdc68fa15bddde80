# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
# ---

# %% [markdown]
# # Compare two methods
# SiT and REGLUE on the same images, from the same noise and the same initial weights, and what can be said of so few.
# Clothes that the starter model draws stand for your photographs: put a folder with a sub-folder per class in their
# place, and more steps.

# %%
from dataclasses import replace
from pathlib import Path

import reglue

IMAGES, STEPS = 200, 400
starter = reglue.load("starter")
for name in starter.record.class_names[:2]:
    folder = Path("photos") / name
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(starter.generate(classes=name, count=IMAGES // 2, seed=1)):
        image.save(folder / f"{i:03d}.png")

# %%
store = reglue.prepare(reglue.Prepare("photos", "store", 32, "starter", "starter", features=True, workers=0))
reglue.compress(reglue.Compress("store", channels=4, hidden=16, epochs=1, cosine_epochs=1))
store

# %% [markdown]
# Two recipes that differ in what is learned beside the latents, and in nothing else.

# %%
short = {"steps": STEPS, "batch_size": 16, "learning_rate": 1e-3, "warmup": 10, "ema_warmup": "yes", "compile": "no"}
runs = {}
for name in ("sit", "reglue"):
    recipe = reglue.recipes[name]
    local = replace(recipe.local, compressor="conv-4") if name == "reglue" else recipe.local
    optimisation = replace(recipe.optimisation, **short)
    recipe = replace(recipe, model="2x64x2/2", local=local, optimisation=optimisation)
    runs[name] = reglue.train(reglue.Train(recipe, "store", f"runs/{name}", preview_every=0, log_every=STEPS // 4))

# %% [markdown]
# A figure never stands alone: it comes with its interval and with how it was measured. Where intervals overlap, as they
# do here, nothing is decided: that takes more images, more steps, and more seeds.

# %%
reports = {}
for name, run in runs.items():
    drawn = reglue.sample(reglue.Sample(run, f"samples/{name}", count=IMAGES // 5, sampler="euler", steps=10))
    reports[name] = reglue.evaluate(reglue.Evaluate(drawn, "store", feature_network="store", kernel_subsets=2))
reports["reglue"]

# %%
{name: report.metrics.frechet_distance for name, report in reports.items()}

# %% [markdown]
# A page with both runs beside each other: samples of the same seeds, losses, and the options that differ.

# %%
reglue.report(reglue.Report(tuple(runs.values()), out="compared.html", samples_per_class=2, steps=4))
