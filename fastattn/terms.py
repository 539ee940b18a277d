"""What score terms and masks of one's own are made of; see "Score terms and masks of your own".

    class DistancePenalty(ScoreTerm):
        @classmethod
        def triton_functions(cls):
            return ScoreFunctions(penalized, passed_on)

What these functions are given and return is said in `fastattn.kernels.attention.functions`.
"""

from .kernels.attention.functions import MaskFunctions, Place, ScoreFunctions
from .ops import MaskTerm, ScoreTerm

__all__ = ["MaskFunctions", "MaskTerm", "Place", "ScoreFunctions", "ScoreTerm"]
