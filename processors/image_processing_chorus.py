"""Images to `pixel_values`: one square size, one number of channels, whatever comes in.

Unusual here:
- transparency is laid over white, 16-bit grey is scaled and not clipped, EXIF rotation is applied;
- float arrays in 0..1 and in 0..255 are both accepted; any other range is an error instead of a dark picture;
- files pass the limits of `processing_limits` before they are decoded, and nothing is fetched.
"""

from typing import Any

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tvF
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import ImageInput, PILImageResampling
from transformers.processing_utils import ImagesKwargs

from .processing_limits import MediaError, MediaLimits, MediaPlace, load_image
from .processing_placement import flatten_media


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

    def to_dict(self) -> dict[str, Any]:
        """The settings to save; limits are never among them."""
        output = super().to_dict()
        # A downloaded repository must not lift the limits.
        output.pop("limits", None)
        return output

    def load(self, image: Any, place: MediaPlace, do_rescale: bool | None = None) -> ImageInput:
        """Decode one image within the limits (see `load_image`) and check that its values are a picture's."""
        image = load_image(image, self.limits, place)
        is_array = isinstance(image, (np.ndarray, torch.Tensor))
        if is_array or image.mode == "F":
            try:
                # Values outside 0..255 are fine where the caller has rescaled already.
                in_bytes = self.do_rescale if do_rescale is None else do_rescale
                tensor = array_to_tensor(image if is_array else np.array(image), in_bytes)
                check_channels(tensor)
            except MediaError as cause:
                raise place.error(str(cause)) from cause
        return image

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Decode the paths and bytes in a (nested) list; transformers' own callers use this name."""
        if isinstance(image_url_or_urls, (list, tuple)):
            return [self.fetch_images(image) for image in image_url_or_urls]
        return self.load(image_url_or_urls, MediaPlace("image", 0))

    def _prepare_image_like_inputs(
        self, images: ImageInput, *args: Any, expected_ndims: int = 3, **kwargs: Any
    ) -> list[torch.Tensor]:
        """All images of a flat or nested list, decoded and converted; errors name the image's place in it."""
        return [
            self.process_image(self.load(image, MediaPlace("image", index), kwargs.get("do_rescale")), **kwargs)
            for index, image in enumerate(flatten_media(images, "image"))
        ]

    def process_image(self, image: ImageInput, device: torch.device | None = None, **kwargs: Any) -> torch.Tensor:
        """One decoded image as (num_channels, H, W): uint8, or float32 in 0..255 (any range without `do_rescale`)."""
        num_channels = kwargs.get("num_channels") or self.num_channels
        if num_channels not in (1, 3):
            raise MediaError(f"num_channels must be 1 or 3, found {num_channels}", modality="image")
        if isinstance(image, (np.ndarray, torch.Tensor)):
            tensor = array_to_tensor(
                image, in_bytes=bool(kwargs.get("do_rescale")), layout=kwargs.get("input_data_format")
            )
        else:
            tensor = pil_to_tensor(image)
        tensor = match_channels(tensor, num_channels)
        if kwargs.get("do_pad_to_square"):
            tensor = pad_to_square(tensor)
        return tensor.contiguous().to(device) if device is not None else tensor.contiguous()


def pil_to_tensor(image: Any) -> torch.Tensor:
    """A PIL image of any mode as uint8 (1, 3 or 4, H, W)."""
    if image.mode.startswith("I;16") or image.mode == "I":
        # 65535 // 257 = 255. Pillow's `convert("L")` would clip everything above 255.
        return torch.from_numpy((np.array(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))[None]
    if image.mode == "F":
        return array_to_tensor(np.array(image), in_bytes=True)
    # `convert("RGB")` would drop the transparency; `match_channels` lays it over white.
    if image.mode in ("LA", "La", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGB")
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1)


def array_to_tensor(image: np.ndarray | torch.Tensor, in_bytes: bool, layout: Any = None) -> torch.Tensor:
    """An array (H, W), (H, W, C) or (C, H, W) as (C, H, W), values in 0..255 when `in_bytes`.

    Floats up to 1 count as 0..1, larger ones as 0..255.

    Raises:
        MediaError: NaN, infinity, or values outside 0..255.
    """
    tensor = torch.as_tensor(np.ascontiguousarray(image)) if isinstance(image, np.ndarray) else image.detach().cpu()
    if tensor.ndim == 2:
        tensor = tensor[None]
    # Without a layout the first axis counts as channels if it has 1, 3 or 4 entries.
    elif getattr(layout, "value", layout) == "channels_last" or (layout is None and tensor.shape[0] not in (1, 3, 4)):
        tensor = tensor.permute(2, 0, 1)
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8) * 255
    if tensor.dtype == torch.uint16:
        return (tensor.to(torch.int32) // 257).to(torch.uint8)
    if tensor.dtype == torch.uint8:
        return tensor
    tensor = tensor.float()
    if not torch.isfinite(tensor).all():
        raise MediaError("the image holds NaN or infinite values", modality="image")
    if not in_bytes:
        return tensor
    low, high = tensor.min().item(), tensor.max().item()
    if low < 0 or high > 255:
        raise MediaError(
            f"image values lie in {low:g}..{high:g}, expected 0..1 or 0..255; pass do_rescale=False for others",
            modality="image",
        )
    # Integers up to 1 are dark pictures in 0..255, floats up to 1 are a unit range.
    is_unit_range = high <= 1.0 and (
        image.dtype.is_floating_point if isinstance(image, torch.Tensor) else image.dtype.kind == "f"
    )
    return tensor * 255 if is_unit_range else tensor


def check_channels(tensor: torch.Tensor) -> None:
    """Raise unless (C, H, W) is grey, RGB or RGBA."""
    if tensor.shape[0] not in (1, 3, 4):
        raise MediaError(f"an image has 1, 3 or 4 channels, found {tensor.shape[0]}", modality="image")


def match_channels(tensor: torch.Tensor, num_channels: int) -> torch.Tensor:
    """(1, 3 or 4, H, W) to (num_channels, H, W); alpha is laid over white."""
    check_channels(tensor)
    if tensor.shape[0] == 4:
        alpha = tensor[3:].float() / 255
        opaque = tensor[:3].float() * alpha + 255 * (1 - alpha)
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
