"""Word- or character-level language models on the Penn Treebank (or on an embedded excerpt)."""
