"""What training images are changed by, beside Caffe's crops and mirrors: resized crops, brightness, colours.

Each image's numbers come from counted random numbers of its batch (`batches.random_numbers`), so that they
are the same on every rank and after a resume.

- Resized crops (Szegedy et al. 2015, arXiv:1409.4842, section 6): a window of a random share of the image's
  area, with a random ratio of its sides, resized to the crop.
- Brightness, contrast and saturation (Howard 2013, arXiv:1312.5402, section 2.1): the pixels times a random
  factor; the same about the mean grey of the image; the same about each pixel's own grey.
- Mixup (Zhang et al. 2018, arXiv:1710.09412, equation 1): the images of a batch, each times a share that is
  drawn from Beta(alpha, alpha), and those of the batch in another order times the rest. The loss is that of
  the labels times the share, and that of the others' labels times the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from caffe_jacinto.common.errors import UserError
from caffe_jacinto.prototxt.render import number
from caffe_jacinto.recipes.model import AUGMENTATIONS
from caffe_jacinto.recipes.rules import CROP_MAX_ASPECT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[Any]

TRIES = 10
"""Windows that are drawn until one lies within the image, as torchvision's RandomResizedCrop does it."""

CHANCES = 2 * TRIES + 2 + 3
"""Random numbers of one image: area and ratio of each try, place, and three factors."""

GREY = (0.114, 0.587, 0.299)
"""Parts of blue, green and red in grey (ITU-R BT.601)."""


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Augmentation:
    """The fields of a ``transform_param`` that Caffe does not have, `AUGMENTATIONS`; 0: not done."""

    crop_min_area: float = 0.0
    """The least share of the image's area that a resized crop shows; 0: crops are not resized."""

    crop_max_aspect: float = CROP_MAX_ASPECT
    """The largest ratio of the longer side to the shorter one."""

    random_brightness: float = 0.0
    """Factors are from 1 - this to 1 + this."""

    random_contrast: float = 0.0
    random_saturation: float = 0.0
    mixup_alpha: float = 0.0
    """Of the distribution of the shares; 0: images are not mixed."""

    @property
    def changes_pixels(self) -> bool:
        """Whether single images change."""
        return bool(self.crop_min_area or self.jitters)

    @property
    def jitters(self) -> bool:
        """Whether brightness or colours change."""
        return any((self.random_brightness, self.random_contrast, self.random_saturation))

    def box(self, height: int, width: int, chances: Sequence[float]) -> Box:
        """The window of an image of this size; ``chances`` are `CHANCES` numbers from 0 to below 1.

        The area's share is uniform from ``crop_min_area`` to 1, the ratio of the sides uniform in its
        logarithm. If no try fits, it is the largest window in the middle whose ratio is allowed.
        """
        down, across = chances[2 * TRIES : 2 * TRIES + 2]
        limit = log(self.crop_max_aspect)
        for at in range(TRIES):
            area = (self.crop_min_area + (1 - self.crop_min_area) * chances[2 * at]) * height * width
            aspect = exp(limit * (2 * chances[2 * at + 1] - 1))
            wide, tall = round(sqrt(area * aspect)), round(sqrt(area / aspect))
            if 0 < wide <= width and 0 < tall <= height:
                return Box(int(down * (height - tall + 1)), int(across * (width - wide + 1)), tall, wide)
        wide = min(width, round(height * self.crop_max_aspect))
        tall = min(height, round(width * self.crop_max_aspect))
        return Box((height - tall) // 2, (width - wide) // 2, tall, wide)

    def resized(self, image: Pixels, chances: Sequence[float], side: int) -> Pixels:
        """The image (height x width x channels) cut to its window, ``side`` x ``side`` pixels, bilinear."""
        import cv2
        import numpy as np

        top, left, height, width = self.box(image.shape[0], image.shape[1], chances)
        part = np.ascontiguousarray(image[top : top + height, left : left + width])
        found: Pixels = cv2.resize(part, (side, side), interpolation=cv2.INTER_LINEAR)
        return found.reshape(side, side, image.shape[2])

    def jittered(self, image: Pixels, chances: Sequence[float]) -> Pixels:
        """The 8-bit image (height x width x channels, blue first) in other brightness and colours."""
        import numpy as np

        strengths = (self.random_brightness, self.random_contrast, self.random_saturation)
        pairs = zip(strengths, chances[-3:], strict=True)
        brightness, contrast, saturation = (1 + most * (2 * chance - 1) for most, chance in pairs)
        pixels = image.astype(np.float32) * np.float32(brightness)
        grey = pixels @ np.asarray(GREY, np.float32) if pixels.shape[2] == 3 else pixels[:, :, 0]
        pixels = pixels * np.float32(contrast) + np.float32((1 - contrast) * grey.mean())
        if self.random_saturation and pixels.shape[2] == 3:
            grey = pixels @ np.asarray(GREY, np.float32)
            pixels = pixels * np.float32(saturation) + np.float32(1 - saturation) * grey[:, :, None]
        found: NDArray[np.uint8] = np.rint(pixels).clip(0, 255).astype(np.uint8)
        return found


def mixing(alpha: float, batch: int, random: np.random.Generator) -> tuple[float, NDArray[np.int64]]:
    """The share of each image of a batch in what it is mixed to, and the number of the other image."""
    return float(random.beta(alpha, alpha)), random.permutation(batch)


def read_augmentation(settings: Any, where: str) -> Augmentation:
    """The augmentation that a ``transform_param`` message describes.

    Raises:
        UserError: a value is out of its range, or fields contradict each other.
    """
    given = {
        name: float(number(getattr(settings, name))) for name in AUGMENTATIONS if settings.HasField(name)
    }
    found = Augmentation(**given)
    for name, value in given.items():
        least, most = {"crop_max_aspect": (1, 100), "mixup_alpha": (0, 100)}.get(name, (0, 1))
        if not least <= value <= most:
            raise UserError(
                f"{where}: transform_param.{name} is {number(value)}; it has to be from {least} to {most}"
            )
    if found.crop_min_area and not settings.crop_size:
        raise UserError(f"{where}: transform_param.crop_min_area needs crop_size, to which crops are resized")
    if found.crop_min_area and settings.mean_file:
        raise UserError(
            f"{where}: transform_param.crop_min_area resizes crops, which the image of mean_file does not "
            "fit; give mean_value instead"
        )
    return found
