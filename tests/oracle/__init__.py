"""The oracle: mmMamba in slow, obvious float64 numpy, written from a description of the architecture alone.

It imports numpy and the standard library only, never the product, so that agreement with the product is evidence.
"""

from oracle.compare import relative_error, relative_l2
from oracle.model import OracleModel, OracleResult, OracleState

__all__ = ["OracleModel", "OracleResult", "OracleState", "relative_error", "relative_l2"]
