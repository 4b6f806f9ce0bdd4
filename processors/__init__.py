"""Raw text, images and sound to tensors."""

if __name__ == "processors":
    raise ImportError("import chorus_moe.processors, not processors: the bare name would load every class twice")

from .feature_extraction_chorus import ChorusFeatureExtractor
from .image_processing_chorus import ChorusImageProcessor
from .processing_chorus import ChorusProcessor
from .processing_limits import MediaError, MediaLimits

__all__ = [
    "ChorusFeatureExtractor",
    "ChorusImageProcessor",
    "ChorusProcessor",
    "MediaError",
    "MediaLimits",
]
