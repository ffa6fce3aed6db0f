"""Reference code of a course on dense and sparse (Mixture-of-Experts) language models.

Dimension legend, used in every shape annotation of the package:

    T  tokens                     B  batch (sequences)        S  slots: (token, expert) pairs that are computed
    D  model width                V  vocabulary               L  layers
    F  hidden width of one FFN    E  experts                  K  experts per token
    C  capacity of an expert      R  ranks                    H  attention heads

Importing this module is cheap and imports no torch: import what you need from its subpackages.
"""

__version__ = "0.1.0"
