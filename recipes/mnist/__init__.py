"""Classifiers of handwritten digits: MNIST, or scikit-learn's small digits where it is missing."""
