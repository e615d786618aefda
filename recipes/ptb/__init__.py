"""Language models of words or characters, with one or two recurrent layers.

Data: the Penn Treebank, or an embedded excerpt of a novel where it is missing.
"""
