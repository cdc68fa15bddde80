"""Nodes for ComfyUI with the run in this folder: put the folder into `custom_nodes`."""

from pathlib import Path


def comfy_entrypoint():
    """What ComfyUI asks for the nodes."""
    try:
        from reglue.portable.comfyui import extension
    except ModuleNotFoundError as error:
        raise ImportError(f"these nodes need the package reglue (pip install reglue): {error}") from None
    return extension(Path(__file__).parent)
