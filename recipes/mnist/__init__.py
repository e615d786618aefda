"""Classifiers of images that know what they do not know: posteriors, and what they are for.

Data: MNIST, or the small digits of scikit-learn where it is missing.
"""
