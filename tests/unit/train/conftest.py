"""A world of one process."""

from tests.unit.model.small import mesh

__all__ = ["mesh"]
