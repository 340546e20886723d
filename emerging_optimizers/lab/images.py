"""Images and their labels, in a fixed random order, of which the last third is held out.

A batch is a pure function of (seed, step), as one of text is (`data`).
"""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from emerging_optimizers.cli import UsageError
from emerging_optimizers.lab.data import seeded

if TYPE_CHECKING:
    import numpy as np

SIDE = 32  # pixels of a side, of the pictures of a folder
FEWEST = 60  # images
KINDS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


@dataclass(frozen=True)
class Images:
    """Images in [0, 1] and the numbers of their classes."""

    source: str
    images_BCHW: Tensor
    labels_B: Tensor | None

    @classmethod
    def of(cls, source: str, images: Any, labels: Any | None) -> "Images":
        """Arrays, (images, height, width) or with channels last, and a label for each; in a fixed random order."""
        import numpy as np

        images = torch.as_tensor(images).float()
        images_BCHW = images[:, None] if images.ndim == 3 else images.movedim(-1, 1)
        order = torch.randperm(len(images), generator=seeded(0, 0))
        if labels is None:
            return cls(source, images_BCHW[order], None)
        _, classes_B = np.unique(np.asarray(labels), return_inverse=True)
        return cls(source, images_BCHW[order], torch.as_tensor(classes_B)[order])

    @property
    def classes(self) -> int:
        """How many classes there are; 0 where nobody has said."""
        return 0 if self.labels_B is None else int(self.labels_B.max()) + 1

    def batch(self, seed: int, step: int, batch: int) -> tuple[Tensor, ...]:
        """Random training images, and their labels where there are some."""
        some = torch.randint(self._split, (batch,), generator=seeded(seed, step))
        return tuple(x[some] for x in self._tensors)

    def held_out(self) -> tuple[Tensor, ...]:
        """The last third."""
        return tuple(x[self._split :] for x in self._tensors)

    @property
    def _split(self) -> int:
        return len(self.images_BCHW) * 2 // 3

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return (self.images_BCHW,) if self.labels_B is None else (self.images_BCHW, self.labels_B)


def load_images(path: str) -> Images:
    """Reads images from a folder or from an array file.

    Args:
        path: A folder of pictures, in a folder for each class where there are classes; they are cut to squares and
            scaled to 32 x 32 pixels. Or an ``.npz`` file of NumPy's with ``images``, (images, height, width) or with
            channels last, and perhaps ``labels``. Values are scaled to [0, 1].

    Raises:
        UsageError: It cannot be read, or does not hold at least 60 images of one size.
    """
    try:
        images, labels = _of_folder(Path(path)) if Path(path).is_dir() else _of_arrays(Path(path))
    except UsageError as error:
        raise UsageError(f"--images {path}: {error}") from None
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"--images {path} cannot be read ({error}); give a folder of pictures or a .npz file"
        ) from error
    if len(images) < FEWEST:
        raise UsageError(f"--images {path} holds {len(images)} images; give at least {FEWEST}")
    return Images.of(path, images, labels)


def _of_arrays(path: Path) -> "tuple[np.ndarray, np.ndarray | None]":
    import numpy as np

    if not path.exists():
        raise UsageError("there is no such file or folder")
    if not zipfile.is_zipfile(path):  # NumPy would advise to unpickle it
        raise UsageError(
            "it cannot be read as a .npz file; give one that numpy.savez has written, or a folder of pictures"
        )
    with np.load(path, allow_pickle=False) as file:
        if "images" not in file.files:
            raise UsageError(f"it holds {', '.join(file.files) or 'no array'}; name the array `images`")
        images = file["images"]
        labels = file["labels"] if "labels" in file.files else None
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)):
        raise UsageError(
            f"`images` has the shape {images.shape}; it must be (images, height, width), or that with 1 or 3 channels "
            "behind it"
        )
    if labels is not None and labels.shape != images.shape[:1]:
        raise UsageError(f"`labels` has the shape {labels.shape}; it must have one for each of {len(images)} images")
    values = images.astype("float32")
    if not np.isfinite(values).all() or (values.size and values.max() == values.min()):
        raise UsageError("`images` holds values that are not finite, or one value only; give pixels")
    return (values - values.min()) / (values.max() - values.min()), labels


def _of_folder(folder: Path) -> "tuple[np.ndarray, np.ndarray | None]":
    import numpy as np

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in KINDS)
    if not files:
        raise UsageError(f"there is no picture under it; give one with {', '.join(KINDS)}")
    names = [path.relative_to(folder).parts[0] if path.parent != folder else "" for path in files]
    images = np.stack([_picture(path) for path in files])
    return images.astype("float32") / 255, None if "" in names else np.asarray(names)


def _picture(path: Path) -> "np.ndarray":
    """In RGB, cut to a square and scaled."""
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            # Pillow's RGB has 8 bits, and cuts off what is above 255.
            whole = Image.fromarray((np.asarray(picture) // 257).astype("uint8")) if picture.mode[0] == "I" else picture
            return np.asarray(ImageOps.fit(whole.convert("RGB"), (SIDE, SIDE)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} cannot be read as a picture ({error}); save it anew, or take it out") from error
