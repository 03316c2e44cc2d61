"""The device that tests run on, as --device says, and how far its results may be from the CPU's.

Knows tolerances. Does not know models.
"""

import torch

name = "cpu"  # conftest.py sets it
# The largest difference of a logit or a feature in float32, of the tiny models. Another order of summation is all that
# the first allows for; on a GPU cuBLAS may split a sum, and exp, sin and cos are others.
TOLERANCE = {"cpu": 1e-4, "cuda": 1e-3}


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[torch.device(name).type]
    torch.testing.assert_close(found.cpu(), expected.cpu(), atol=tolerance, rtol=0)
