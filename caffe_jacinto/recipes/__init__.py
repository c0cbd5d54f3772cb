"""What to train: data set, network, stages and their solver settings, as validated TOML files."""

from caffe_jacinto.recipes.load import built_in_recipes, load_recipe

__all__ = ["built_in_recipes", "load_recipe"]
