"""What `DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)` takes the class of this pipeline from."""

try:
    from reglue.portable.diffusers import RegluePipeline as RegluePipeline
except ModuleNotFoundError as error:
    raise ImportError(f"this pipeline needs the package reglue (pip install reglue): {error}") from None
