"""What each kind of model is fed: spectra, places, patches, or the tiles of an image."""
import mmap

import numpy as np
import torch

from hsi_mamba_nb.errors import InputError
from hsi_mamba_nb.scene.patch import PatchDataset
from hsi_mamba_nb.scene.scene import missing_pixels

__all__ = ["CoordsData", "PixelData", "TileData", "chunks", "feed", "release"]

TILE, OVERLAP = 128, 32  # side of a tile in pixels, and how far neighbours overlap


class PixelData:
    "Scaled spectra (b,c). Only the chosen pixels are read."
    def __init__(self, cube, index, labels=None, scale=None, nodata=None):
        self.rows, self.cols = np.divmod(np.asarray(index, dtype=np.int64), cube.shape[1])
        x = np.array(cube[self.rows, self.cols], dtype=np.float32)
        self.missing = missing_pixels(x, nodata)
        x = x if scale is None else scale(x)
        x[self.missing] = 0
        self.x, self.y = torch.from_numpy(_finite(x)), _truth(labels, self.rows, self.cols)

    def __len__(self):
        return len(self.rows)

    def batch(self, i):
        i = torch.as_tensor(np.asarray(i))
        return self.x[i], None if self.y is None else self.y[i]


def _finite(x):
    "`x` (...,c), or the bands that hold what is no number."
    if not (ok := np.isfinite(x)).all():
        bands = ",".join(str(b + 1) for b in np.flatnonzero(~ok.reshape(-1, x.shape[-1]).all(0)))
        raise InputError(f"the cube holds nan or inf in bands {bands}; leave them out with drop_bands= (--drop-bands {bands})")
    return x


def _truth(labels, rows, cols):
    return None if labels is None else torch.from_numpy(labels[rows, cols].astype(np.int64))


class CoordsData:
    "Rows and columns (b,2) in pixels, float32; no spectrum is read but to find pixels without data."
    def __init__(self, cube, index, labels=None, nodata=None):
        self.rows, self.cols = np.divmod(np.asarray(index, dtype=np.int64), cube.shape[1])
        self.missing = missing_pixels(np.asarray(cube[self.rows, self.cols]), nodata)
        self.y = _truth(labels, self.rows, self.cols)

    def __len__(self):
        return len(self.rows)

    def batch(self, i):
        x = torch.from_numpy(np.stack([self.rows[i], self.cols[i]], 1).astype(np.float32))
        return x, None if self.y is None else self.y[torch.as_tensor(np.asarray(i))]


def _starts(size: int, tile: int, overlap: int) -> np.ndarray:
    "Where tiles begin along one side: evenly spread, the last one ends with the image."
    if size <= tile:
        return np.zeros(1, int)
    return np.round(np.linspace(0, size - tile, -(-(size - overlap)//(tile - overlap)))).astype(int)


class TileData:
    """An image in overlapping tiles of one size. As training samples: tiles (b,c,h,w) that hold chosen pixels, with the labels of
    chosen pixels alone (b,h,w). For prediction: each chosen pixel is read from the tile in which it lies farthest from a cut."""
    def __init__(self, cube, index, labels=None, scale=None, nodata=None, tile=TILE, overlap=OVERLAP):
        if not 0 <= overlap < tile:
            raise InputError(f"overlap must be 0 or more and less than the tile, got {overlap} for a tile of {tile}")
        self.cube, self.scale, self.nodata = cube, scale, nodata
        h, w = cube.shape[:2]
        self.shape = min(tile, h), min(tile, w)
        self.rows, self.cols = np.divmod(np.asarray(index, dtype=np.int64), w)
        self.tops, self.lefts = _starts(h, tile, overlap), _starts(w, tile, overlap)
        own = [self._owner(at, starts, side, size) for at, starts, side, size in ((self.rows, self.tops, self.shape[0], h), (self.cols, self.lefts, self.shape[1], w))]
        self.owner = own[0]*len(self.lefts) + own[1]
        self.y = _truth(labels, self.rows, self.cols)
        self.used = np.unique(self.owner)  # tiles that own a chosen pixel

    @staticmethod
    def _owner(at, starts, side, size):
        "Of the tiles along one side that hold a place, the one with the most room to its nearest cut; the image's own border is none."
        room = np.full((len(starts), size), -1.)
        for k, s in enumerate(starts):
            before = np.inf if s == 0 else 1
            after = np.inf if s + side == size else 1
            room[k, s:s + side] = np.minimum(before*(np.arange(side) + 1), after*(side - np.arange(side)))
        return room.argmax(0)[at]

    def __len__(self):
        return len(self.used)

    def _corner(self, t):
        return self.tops[t//len(self.lefts)], self.lefts[t % len(self.lefts)]

    def image(self, t) -> torch.Tensor:  # (c,h,w)
        "One tile, scaled; pixels without data take the training mean."
        (top, left), (h, w) = self._corner(t), self.shape
        x = np.array(self.cube[top:top + h, left:left + w], dtype=np.float32)
        gone = missing_pixels(x, self.nodata)
        x = x if self.scale is None else self.scale(x)
        x[gone] = 0
        return torch.from_numpy(np.ascontiguousarray(_finite(x).transpose(2, 0, 1)))

    def batch(self, i):
        y = None if self.y is None else torch.zeros(len(i), *self.shape, dtype=torch.int64)
        for k, t in enumerate(self.used[i]):
            (top, left), (h, w) = self._corner(t), self.shape
            if y is not None:  # a pixel in two tiles trains in both
                here = (self.rows >= top) & (self.rows < top + h) & (self.cols >= left) & (self.cols < left + w)
                y[k, self.rows[here] - top, self.cols[here] - left] = self.y[torch.from_numpy(here)]
        return torch.stack([self.image(t) for t in self.used[i]]), y

    def chunks(self, batch_size):
        "Tile by tile: x (1,c,h,w), positions among the chosen pixels, how to pick their logits (m,k)."
        order = np.argsort(self.owner, kind="stable")
        for t, mine in zip(self.used, np.split(order, np.searchsorted(self.owner[order], self.used[1:]))):
            top, left = self._corner(t)
            r, c = self.rows[mine] - top, self.cols[mine] - left
            yield self.image(t)[None], mine, lambda logits, r=r, c=c: logits[0, :, torch.from_numpy(r), torch.from_numpy(c)].T


def chunks(data, batch_size: int):
    "Everything in `data`, piece by piece: x, positions, how to pick their logits."
    if isinstance(data, TileData):
        yield from data.chunks(batch_size)
    elif len(data):
        for i in np.array_split(np.arange(len(data)), -(-len(data)//batch_size)):
            yield data.batch(i)[0], i, lambda logits: logits


def feed(model, cube, index, labels=None, scale=None, nodata=None, rows=None, tile=TILE, overlap=OVERLAP):
    "The data of chosen pixels in the form that `model.takes`; `rows` bounds what is read of a large cube."
    if model.takes == "pixel":
        return PixelData(cube, index, labels, scale, nodata)
    if model.takes == "coords":
        return CoordsData(cube, index, labels, nodata)
    if model.takes == "patch":
        return PatchDataset(cube, index, labels, model.patch, scale, rows, nodata)
    if model.takes == "image":
        return TileData(cube, index, labels, scale, nodata, tile, overlap)
    raise InputError(f"{model.name}: takes {model.takes!r}; known are pixel, coords, patch and image")


def release(cube) -> None:
    "Hand back the pages of a memory-mapped file that have been read; they come again when they are needed."
    while cube is not None and not isinstance(cube, mmap.mmap):
        if isinstance(cube, np.memmap) and cube.mode not in ("r", "r+"):  # what was changed in a private copy would be lost
            return
        cube = getattr(cube, "base", None)
    if cube is not None and hasattr(cube, "madvise"):
        cube.madvise(mmap.MADV_DONTNEED)
