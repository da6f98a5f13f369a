"""WeSpeaker's models: a folder of config.yaml and avg_model.pt through its package, or an ONNX file without it.

The vectors are those of the package itself, from `wespeaker.load_model(folder).extract_embedding(file)`, and like those
not normalised. docs/wespeaker.md has the models, the options and the figures.
"""

from embstore.models.wespeaker.recipe import WespeakerRecipe, recipe

__all__ = ["WespeakerRecipe", "recipe"]
