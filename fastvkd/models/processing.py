"""A processor made to fit its model, and the one way to ask it: what it refuses is named with the photo it refused."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from PIL import Image

from fastvkd.errors import DataError, ModelError, one_line
from fastvkd.models.families import family_of, image_token_id
from fastvkd.models.prompts import image_placeholder

# What processors, their image processors and tokenizers raise for inputs that they do not take.
_REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, ZeroDivisionError, OverflowError)
# Patch features of a tower that the processor counts beside the grid: the class token, where there is one.
_CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "siglip2_vision_model": 0, "dinov2": 1}


def processed(call: Callable[..., Any], **inputs: Any) -> Any:
    """`call(**inputs)`, where `call` is a processor or its image processor.

    Raises DataError naming the photo that is refused (`decode_image` notes where an image came from), ModelError where
    it is none of them.
    """
    try:
        return call(**inputs)
    except _REFUSALS as error:
        images = list(_images_in(inputs.get("images", ())))
        alone = getattr(call, "image_processor", call)
        for image in images:
            try:
                alone(images=[image], return_tensors="pt")
            except _REFUSALS as refusal:
                place = image.info.get("source", f"an image of {image.width} x {image.height}")
                raise DataError(
                    f"{place}: the model's processor refuses the photo ({one_line(refusal)}); replace it, crop it or "
                    "drop the row"
                ) from refusal
        raise ModelError(
            f"{type(call).__name__} refuses its inputs ({one_line(error)}); does it belong to this model?"
        ) from error


def _images_in(images: Any) -> Iterator[Image.Image]:
    for one in [images] if isinstance(images, Image.Image) else images or ():
        if isinstance(one, Image.Image):
            yield one
        else:
            yield from _images_in(one)


@contextmanager
def tokens_and_features() -> Iterator[None]:
    """Says in one line where a model finds another number of visual tokens in a prompt than it has features."""
    try:
        yield
    except ValueError as error:
        if "features" not in str(error) or "tokens" not in str(error):
            raise
        raise ModelError(
            f"model and processor disagree on the visual tokens of a photo ({one_line(error, 120)}); copy "
            "processor_config.json and preprocessor_config.json of this very model to its folder"
        ) from error


def special_tokens(processor: Any) -> list[str]:
    """The texts that a processor's tokenizer never takes for text: its special tokens, and the image placeholder."""
    tokenizer = processor.tokenizer
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*map(str, tokenizer.all_special_tokens), *added, image_placeholder(processor)} - {""})


def complete(processor: Any, config: Any, path: Any) -> None:
    """What older folders leave out is taken from `config`: a token to pad with, and how visual tokens are counted.

    Raises ModelError, naming file and key, where processor and model cannot belong together.
    """
    _complete_tokenizer(processor.tokenizer, path)
    if hasattr(processor, "vision_feature_select_strategy") and hasattr(config, "vision_feature_select_strategy"):
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        processor.patch_size = config.vision_config.patch_size
        known = _CLASS_TOKENS.get(config.vision_config.model_type)
        if known is not None and hasattr(processor, "num_additional_image_tokens"):
            processor.num_additional_image_tokens = known
    for problem in chain(_wrong_tokens(processor, config), _wrong_scale(processor), _wrong_pixels(processor, config)):
        raise ModelError(f"{path}: {problem}")


def _complete_tokenizer(tokenizer: Any, path: Any) -> None:
    if tokenizer.eos_token is None:
        raise ModelError(
            f"{path}: tokenizer_config.json names no eos_token, with which every answer ends; add the one that the "
            "model was trained with (generation_config.json has its id)"
        )
    if tokenizer.pad_token is None:  # padding is masked: any token does
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def _wrong_tokens(processor: Any, config: Any) -> Iterable[str]:
    tokenizer, wanted = processor.tokenizer, image_token_id(config)
    # Gemma 3's processor calls the token that begins an image so, its tokenizer the one that stands for its features.
    tokens = {getattr(part, "image_token", None) for part in (processor, tokenizer)} - {None}
    found = sorted(tokenizer.convert_tokens_to_ids(str(token)) for token in tokens)
    if found and wanted not in found:
        yield (
            f"tokenizer and config.json disagree on the image token (ids {found[0]} and {wanted}); copy "
            "the tokenizer's files of this very model there"
        )
    largest, rows = max(tokenizer.get_vocab().values(), default=0), config.text_config.vocab_size
    if largest >= rows:
        yield (
            f"its tokenizer has token ids up to {largest}, but the model's vocabulary (vocab_size) has {rows}; copy "
            "the tokenizer's files of this very model there"
        )


def _wrong_scale(processor: Any) -> Iterable[str]:
    """Photos are multiplied and shifted by these numbers: one that is none would make every feature NaN."""
    for key in ("rescale_factor", "image_mean", "image_std"):
        value = getattr(processor.image_processor, key, None)
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        divides = key == "image_std"
        if not all(isinstance(one, int | float) and abs(one) < 1e6 and (one or not divides) for one in values):
            yield f"its image processor's {key} is {str(value)[:60]}; copy preprocessor_config.json of this model there"


def _wrong_pixels(processor: Any, config: Any) -> Iterable[str]:
    """For families whose photos all have one size: it must be the tower's."""
    if not family_of(config).fixed_resolution:
        return
    vision = config.vision_config
    side = getattr(vision, "image_size", None)
    if side is None or vision.model_type not in _CLASS_TOKENS:
        return
    blank = Image.new("RGB", (8, 8))
    pixels = processed(processor.image_processor, images=[blank], return_tensors="pt")["pixel_values"]
    if tuple(pixels.shape[-2:]) != (side, side):
        yield (
            f"its image processor makes photos of {pixels.shape[-1]} x {pixels.shape[-2]} pixels, the vision tower "
            f"takes {side} x {side} (vision_config.image_size); copy preprocessor_config.json of this very model there"
        )
