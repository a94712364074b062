"""What every classifier of the package has in common."""
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HSIModel"]


class HSIModel(nn.Module):
    """A classifier that says what it `takes` and returns one logits tensor, in training and evaluation alike.

    takes: "patch", (b,c,p,p) -> (b,k), with the side `patch`.
    """
    takes: str = "patch"
    patch: int = 1
    name: str = ""
    config: dict

    def loss(self,
             x: Tensor,  # (b,c,p,p)
             y: Tensor,  # (b,) int64, 0 = unlabelled, 1..k = classes
             ) -> tuple[Tensor, dict]:
        "Mean cross-entropy over labelled samples, and its terms by name (detached)."
        ce = F.cross_entropy(self(x), y - 1, ignore_index=-1)
        return ce, {"ce": ce.detach()}
