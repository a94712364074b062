"""What every classifier of the package has in common."""
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["HSIModel"]


class HSIModel(nn.Module):
    """A classifier that says what it `takes` and returns one logits tensor, in training and evaluation alike.

    takes: "pixel", scaled spectra (b,c) -> (b,k); "coords", row and column in pixels (b,2) -> (b,k);
    "patch", (b,c,p,p) -> (b,k) with the odd side `patch`; "image", (b,c,h,w) -> (b,k,h,w).
    A model that is not trained by gradients has `learn(x, y, x_val, y_val, seed) -> dict` on arrays.
    """
    takes: str = "patch"
    patch: int = 1
    name: str = ""
    config: dict

    def loss(self,
             x: Tensor,  # what the model takes
             y: Tensor,  # (b,), or (b,h,w) for an image: int64, 0 = unlabelled, 1..k = classes
             ) -> tuple[Tensor, dict]:
        "Mean cross-entropy over labelled samples or pixels, 0 where there are none, and its terms by name (detached)."
        ce = F.cross_entropy(self(x), y - 1, ignore_index=-1, reduction="sum")/(y > 0).sum().clamp(min=1)
        return ce, {"ce": ce.detach()}
