"""Images to `pixel_values`: one square size, one number of channels, whatever comes in.

Unusual here:
- transparency is laid over white, 16-bit grey is scaled and not clipped, EXIF rotation is applied;
- float arrays in 0..1 and in 0..255 both come out right; a range or layout with two readings is an error instead of a
  dark picture (the table is in docs/guides/fine_tuning.md);
- files pass the limits of `processing_limits` before they are decoded, and nothing is fetched.
"""

from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ImageInput, PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .processing_limits import (
    IMAGE,
    MediaError,
    MediaLimits,
    MediaPlace,
    check_image_size,
    check_settings,
    is_channels_first,
    load_image,
)
from .processing_placement import flatten_media

# Resizing goes beyond the ends of a range by this share at most.
OVERSHOOT = 0.125
# A float picture in 0..255 that is darker than this can also be one in 0..1 that is too bright.
MIN_PEAK = 8


class ChorusImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Settings beyond the usual ones.

    Attributes:
        num_channels: 3 (RGB) or 1 (grey).
        do_pad_to_square: centre the image on a black square before resizing, instead of stretching it.
    """

    num_channels: int
    do_pad_to_square: bool


class ChorusImageProcessor(TorchvisionBackend):
    """Resize to `size`, rescale to 0..1, normalise.

    Output `pixel_values` (images, num_channels, height, width) in float32, flat in the order of the images.

    Raises:
        MediaError: an image over a limit, broken, or with values that are no picture; the message names it.
    """

    valid_kwargs = ChorusImageProcessorKwargs
    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BICUBIC
    size = {"height": 224, "width": 224}
    image_mean = 0.5
    image_std = 0.5
    do_resize = True
    do_rescale = True
    do_normalize = True
    num_channels = 3
    do_pad_to_square = False
    limits = MediaLimits()

    def __init__(self, **kwargs: Any):
        check_settings(kwargs, self.valid_kwargs.__annotations__)
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings to save; never the limits, which a downloaded repository must not lift."""
        return {name: value for name, value in super().to_dict().items() if name != "limits"}

    def load(
        self, image: object, place: MediaPlace, do_rescale: bool | None = None, input_data_format: str | None = None
    ) -> ImageInput:
        """Decode one image within the limits (see `load_image`) and check that its values are a picture's."""
        loaded = load_image(image, self.limits, place, input_data_format)
        if isinstance(loaded, (np.ndarray, torch.Tensor)) or loaded.mode[0] in "FI":
            try:
                # Values outside 0..255 are fine where the caller has rescaled already.
                in_bytes = self.do_rescale if do_rescale is None else do_rescale
                match_channels(image_to_tensor(loaded, bool(in_bytes), input_data_format), 3, bool(in_bytes))
            except MediaError as cause:
                raise place.error(str(cause)) from cause
        return loaded

    def fetch_images(self, image_url_or_urls: object) -> object:
        """Decode the paths and bytes in a (nested) list; transformers' own callers use this name."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return self.load(image_url_or_urls, MediaPlace("image", 0))

    def _prepare_image_like_inputs(
        self, images: ImageInput, *args: Any, expected_ndims: int = 3, **kwargs: Any
    ) -> list[torch.Tensor]:
        """All images of a flat or nested list, decoded and converted; errors name the image's place in it."""
        checks = {name: kwargs.get(name) for name in ("do_rescale", "input_data_format")}
        return [
            self.process_image(self.load(image, MediaPlace("image", index), **checks), **kwargs)
            for index, image in enumerate(flatten_media(images, "image"))
        ]

    def process_image(self, image: ImageInput, device: torch.device | None = None, **kwargs: Any) -> torch.Tensor:
        """One decoded image as (num_channels, H, W): uint8, or float32 in 0..255 (any range without `do_rescale`)."""
        num_channels = kwargs.get("num_channels") or self.num_channels
        if num_channels not in (1, 3):
            raise IMAGE.error(f"num_channels must be 1 or 3, found {num_channels}")
        tensor = image_to_tensor(image, bool(kwargs.get("do_rescale")), kwargs.get("input_data_format"))
        tensor = match_channels(tensor, num_channels, in_bytes=bool(kwargs.get("do_rescale")))
        edge = getattr(kwargs.get("size"), "shortest_edge", None)
        if edge and (pixels := edge**2 * max(tensor.shape[1:]) // min(tensor.shape[1:])) > self.limits.image_pixels:
            raise IMAGE.error(f"an image is resized to {pixels} pixels, the limit is {self.limits.image_pixels}")
        if kwargs.get("do_pad_to_square"):
            # Before resizing, so a long picture must not become a huge square.
            check_image_size(max(tensor.shape[1:]), max(tensor.shape[1:]), self.limits, MediaPlace("padded image", 0))
            tensor = pad_to_square(tensor)
        return tensor.contiguous().to(device) if device is not None else tensor.contiguous()


def image_to_tensor(image: ImageInput, in_bytes: bool, layout: str | None = None) -> torch.Tensor:
    """A PIL image as uint8 (1, 3 or 4, H, W); an array, and modes F and I, as `array_to_tensor` converts them."""
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return array_to_tensor(image, in_bytes, layout)
    if image.mode[0] in "FI":
        values = np.array(image)
        # Pillow reads some 16-bit files as mode I, which has 32 bits.
        is_16_bit = image.mode == "I" and 255 < values.max() <= 65535 and values.min() >= 0
        return array_to_tensor(values.astype(np.uint16) if is_16_bit else values, in_bytes)
    # `convert("RGB")` would drop the transparency; `match_channels` lays it over white.
    image = image.convert("LA") if image.mode == "La" else image
    if image.mode in ("LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)


def array_to_tensor(image: np.ndarray | torch.Tensor, in_bytes: bool, layout: str | None = None) -> torch.Tensor:
    """An array (H, W), (H, W, C) or (C, H, W) as (C, H, W): uint8, or floats, which are in 0..255 when `in_bytes`.

    Raises:
        MediaError: NaN, infinity, values that are no picture's or have two readings, a layout with two readings.
    """
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "biuf":
            raise IMAGE.error(f"image values of type {image.dtype} are no numbers of a picture")
        # torch takes no other byte order than the machine's, and no longer floats than 64 bits.
        kind = np.float64 if image.dtype.itemsize > 8 else image.dtype.newbyteorder("=")
        image = torch.from_numpy(np.ascontiguousarray(image, dtype=kind))
    tensor = image.detach().cpu()
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif not is_channels_first(tuple(tensor.shape), layout):
        tensor = tensor.permute(2, 0, 1)
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8) * 255
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        return _integers_to_bytes(tensor)
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise IMAGE.error("the image holds NaN or infinite values")
    if not in_bytes:
        return tensor
    return (tensor * (255 / white_of(tensor))).clamp(0, 255)


def _integers_to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Integers in 0..255, or unsigned 16-bit ones in 0..65535, as uint8."""
    is_16_bit = tensor.dtype == torch.uint16
    tensor = tensor.to(torch.int64)
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high > (65535 if is_16_bit else 255):
        raise IMAGE.error(f"image values lie in {low}..{high}, expected 0..255, or 0..65535 in an array of uint16")
    # A black picture is black in both.
    if is_16_bit and 0 < high <= 255:
        cure = "0..255, or nearly black in 0..65535? Pass uint8, or values times 257"
        raise IMAGE.error(f"16-bit image values lie in {low}..{high}: {cure}")
    return (tensor // 257 if is_16_bit else tensor).to(torch.uint8)


def white_of(tensor: torch.Tensor) -> float:
    """What white is in floats: 1 or 255, with room for the overshoot of resizing.

    Raises:
        MediaError: neither, or either.
    """
    low, high = tensor.min().item(), tensor.max().item()
    if low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        return 1.0
    if low < (-255 * OVERSHOOT if high >= MIN_PEAK else 0) or high > 255 * (1 + OVERSHOOT):
        raise IMAGE.error(f"values lie in {low:g}..{high:g}, expected 0..1 or 0..255; pass do_rescale=False for others")
    if high < MIN_PEAK and bool((tensor != tensor.round()).any()):
        cure = "too bright for 0..1 or nearly black in 0..255? Clip or scale it"
        raise IMAGE.error(f"image values lie in {low:g}..{high:g}: {cure}")
    return 255.0


def match_channels(tensor: torch.Tensor, num_channels: int, in_bytes: bool = True) -> torch.Tensor:
    """(1, 3 or 4, H, W) to (num_channels, H, W); alpha is laid over white, which floats not `in_bytes` must show."""
    if tensor.shape[0] == 4:
        white = 255.0 if in_bytes or tensor.dtype == torch.uint8 else white_of(tensor)
        alpha = tensor[3:].float() / white
        opaque = tensor[:3].float() * alpha + white * (1 - alpha)
        tensor = opaque.round().to(tensor.dtype) if tensor.dtype == torch.uint8 else opaque
    if tensor.shape[0] == 3 and num_channels == 1:
        return tvF.rgb_to_grayscale(tensor)
    if tensor.shape[0] == 1 and num_channels == 3:
        # A view: nothing is copied.
        return tensor.expand(3, -1, -1)
    return tensor


def pad_to_square(tensor: torch.Tensor) -> torch.Tensor:
    """Centre (C, H, W) on a black square of its longer side."""
    height, width = tensor.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return tvF.pad(tensor, [left, top, side - width - left, side - height - top])
