"""Recipes: data, an ordinary LightningModule and YAML. Run them from the root of a checkout."""
