"""Recipes: data, an ordinary LightningModule and YAML. Run them from the folder of `recipes/`."""
