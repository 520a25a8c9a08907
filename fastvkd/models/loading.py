"""Loads models and processors from a folder (or a hub id): whole, or only the LLM layers that the sites need.

A truncated model is read through a folder of links to the shards that it needs, with an index that lists only its
own tensors. So transformers' loader does the work (old and new tensor names, quantisation, ZeRO-3). The layers above,
the final norm and lm_head are neither read from disk nor allocated.
"""

import copy
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)

from fastvkd.devices import usable_bytes
from fastvkd.errors import ModelError, gpu_memory_is_full, one_line
from fastvkd.models import families
from fastvkd.models.families import Family, check_sites, family_of, family_of_type, parse_site
from fastvkd.models.foreign import check_json, read_config
from fastvkd.models.patch_sequences import batch_pieces
from fastvkd.models.processing import complete
from fastvkd.models.shards import WEIGHT_FILES, check_shards, header_of, weight_map_of, write_index

Quantize = Literal["nf4", "int8"]
ModelPath = str | os.PathLike[str]
VISUAL_KEY = re.compile(r"(^|\.)(vision_tower|vision_model|visual|multi_modal_projector|connector|mlp1)\.")
_LAYER_KEY = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_FINAL_NORM_KEY = re.compile(r"(?:^|\.)norm\.(?:weight|bias)$")
_HEAD_KEY = re.compile(r"(?:^|\.)lm_head\.")
_EMBEDDING_KEY = re.compile(r"(?:^|\.)embed_tokens\.weight$")
# what transformers and safetensors raise for a folder, a file or a config that cannot be used
_LOADING_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ImportError, RuntimeError, ArithmeticError),
    *(SafetensorError, StrictDataclassError),
)


def load_config(path: ModelPath) -> PreTrainedConfig:
    """The config of a supported model folder.

    Raises:
        ModelError: no such folder, no config.json in it, or a family that is unknown or refused.
    """
    if not Path(path).is_dir():
        _require_folder(path, "config.json", "a model folder as save_pretrained writes it")
    found = _resolve(path, "config.json")
    raw = read_config(Path(path) if found is None else Path(found).parent)
    family_of_type(str(raw.get("model_type")), f"{path}")
    try:
        config = AutoConfig.from_pretrained(str(path))
    except _LOADING_ERRORS as error:
        raise ModelError(f"{path}: its config cannot be read: {one_line(error)}") from error
    layers = getattr(config, "vision_feature_layer", None)
    states = families.tower_depth(config) + 1  # of the tower, its input included
    for layer in layers if isinstance(layers, list) else [layers]:
        if isinstance(layer, int) and not -states <= layer < states:
            raise ModelError(
                f"{path}: config.json: vision_feature_layer is {layer}, but the tower has {states} hidden states: "
                f"allowed are {-states} to {states - 1}"
            )
    return config


def load_model(
    path: ModelPath,
    *,
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    llm_layers: int | None = None,
    device: torch.device | str | None = None,
    quantize_llm: Quantize | None = None,
    spread: int | None = None,
) -> PreTrainedModel:
    """A vision-language model in evaluation mode.

    Args:
        dtype: of all weights that are not quantised.
        llm_layers: None for the whole model. L >= 0 builds and reads only the first L decoder layers; the final norm
            becomes the identity and there is no lm_head. This is right also where image tokens attend both ways:
            layers above never influence those below.
        device: where the weights shall be. Under ZeRO-3 DeepSpeed puts its parts of them on this rank's device instead.
        quantize_llm: "nf4" or "int8" (bitsandbytes) for the linear layers of the LLM; the visual part is left alone.
        spread: over all GPUs from the first on, and then host memory, by accelerate, instead of on `device`; so many
            bytes of each GPU stay free. A whole model only. Weights in host memory come to the GPU for each pass. On a
            machine without a GPU it does nothing.

    Raises:
        ModelError: the folder, family, number of layers or an option cannot be used, or tensors are missing.
    """
    config = load_config(path)
    if llm_layers is None and Path(path).is_dir():
        check_shards(Path(path))
    family = family_of(config)
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    if quantize_llm is not None:
        if getattr(config, "quantization_config", None):
            raise ModelError(f"{path}: its weights are quantised already; load it as it is (quantize: none)")
        options["quantization_config"] = _quantization(quantize_llm, family, dtype)
    partitioned = is_deepspeed_zero3_enabled()
    if spread is not None and llm_layers is None:
        options |= _spread(spread)
    elif device is not None and torch.device(device).type != "cpu" and not partitioned:
        options["device_map"] = {"": device}  # which transformers refuses where it is to partition
    if llm_layers is None:
        model = _read(AutoModelForImageTextToText, str(path), path, config, options, may_lack=())
    else:
        model = _load_truncated(path, config, family, llm_layers, options)
    if quantize_llm == "nf4":
        from fastvkd.models.nf4 import same_on_every_cpu

        same_on_every_cpu(model)
    if device is not None and partitioned:
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)  # DeepSpeed may leave it where it was made
    batch_pieces(model)
    model.eval()
    return model


def load_processor(path: ModelPath, *, max_pixels: int | None = None) -> Any:
    """The processor (tokenizer, image processor, chat template) of a model folder.

    Images are resized by Pillow also where torchvision is installed: the two round differently, and features would
    depend on which machine made them. The video part is left out: nothing here reads videos, it needs torchvision, and
    a folder may lack its settings. `max_pixels` is how many a photo has at the most, for models whose visual tokens
    grow with it (Qwen-VL).

    Raises:
        ModelError: the folder has no (complete) processor, a package is missing for it, or `max_pixels` means nothing
            to it.
    """
    config = load_config(path)
    if Path(path).is_dir():
        check_json(Path(path))
    try:
        processor_class: Any = PROCESSOR_MAPPING[type(config)]
        if "video_processor" in processor_class.get_attributes():
            processor = image_only(processor_class).from_pretrained(str(path))
        else:
            processor = AutoProcessor.from_pretrained(str(path))
        if not isinstance(processor.image_processor, PilBackend):
            processor.image_processor = AutoImageProcessor.from_pretrained(str(path), backend="pil")
    except _LOADING_ERRORS as error:
        raise ModelError(
            f"{path}: its processor cannot be read ({one_line(error)}); copy the processor and tokenizer files of the "
            "original model there"
        ) from error
    except Exception as error:
        if type(error) is not Exception:  # which is what the library tokenizers raises for a damaged tokenizer.json
            raise
        raise ModelError(f"{path}: its tokenizer.json cannot be read ({one_line(error, 120)}); copy it anew") from error
    complete(processor, config, path)
    if max_pixels is not None:
        _limit_pixels(processor.image_processor, max_pixels, path)
    return processor


def _limit_pixels(image_processor: Any, max_pixels: int, path: ModelPath) -> None:
    size = image_processor.size
    if not hasattr(image_processor, "merge_size") or not size["longest_edge"]:
        raise ModelError(f"{path}: max_pixels={max_pixels} is for Qwen-VL, whose photos keep their size; leave it out")
    least = (image_processor.patch_size * image_processor.merge_size) ** 2
    if max_pixels < least:
        raise ModelError(f"max_pixels={max_pixels}: one visual token shows {least} pixels; allow as many at least")
    # both are numbers of pixels, in spite of their names
    image_processor.size = SizeDict(shortest_edge=min(size["shortest_edge"], max_pixels), longest_edge=max_pixels)


def image_only(processor_class: Any) -> Any:
    """A processor class that takes no video processor, for images and text alone."""

    class ImageOnly(processor_class):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if name != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            return super().from_args_and_dict(args, processor_dict | {"video_processor": None}, **kwargs)

    ImageOnly.__name__ = ImageOnly.__qualname__ = processor_class.__name__  # the name that save_pretrained writes
    return ImageOnly


def llm_layers_needed(sites: Iterable[str], config: Any) -> int:
    """The number of decoder layers that must run: the largest k of `llm:<k>`, or 0 with other sites only.

    Raises:
        ModelError: a site is misspelt or deeper than the model.
    """
    sites = list(sites)
    check_sites(sites, config)
    return max((k for kind, k in map(parse_site, sites) if kind == "llm"), default=0)


def checkpoint_layers(model: Any) -> None:
    """Recompute tower blocks and decoder layers in the backward pass instead of keeping what is inside them.

    transformers checkpoints a layer only where its `training` flag is set; the flag of the layer alone is, not of what
    is in it, so dropout stays off.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True


@contextmanager
def layers_checkpointed(model: Any) -> Iterator[None]:
    """`checkpoint_layers` for a while; then the model is in evaluation mode as it was loaded."""
    checkpoint_layers(model)
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def _load_truncated(
    path: ModelPath, config: PreTrainedConfig, family: Family, llm_layers: int, options: dict[str, Any]
) -> PreTrainedModel:
    depth = families.llm_depth(config)
    if not 0 <= llm_layers <= depth:
        raise ModelError(
            f"llm_layers is {llm_layers}, but the LLM of {path} has {depth} layers: allowed are 0 to {depth}"
        )
    config = truncated_config(config, llm_layers)
    with tempfile.TemporaryDirectory(prefix="fastvkd-") as folder:
        _link_needed_shards(path, Path(folder), llm_layers)
        # the base model: its class has no lm_head to allocate
        base = _read(AutoModel, folder, path, config, options, may_lack=(f"{family.language_model}.norm.weight",))
    families.language_model(base, family).norm = nn.Identity()
    return _with_full_names(base, config)


def truncated_config(config: PreTrainedConfig, llm_layers: int) -> PreTrainedConfig:
    """A copy of `config` whose LLM has only `llm_layers` decoder layers."""
    config = copy.deepcopy(config)
    text: Any = config.text_config
    text.num_hidden_layers = llm_layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:llm_layers]
    return config


def _with_full_names(base: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Puts the base model into its `...ForConditionalGeneration`, so that weights have the names of the whole model.

    The class's __init__ is not called: it would allocate an lm_head.
    """
    full_class: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    full = full_class.__new__(full_class)
    nn.Module.__init__(full)
    for name, value in vars(base).items():
        if name not in vars(full):
            object.__setattr__(full, name, value)
    full.model = base
    return full


def _link_needed_shards(path: ModelPath, folder: Path, llm_layers: int) -> None:
    """Fills `folder` with an index of the tensors that are needed and links to the files that hold them."""
    weight_map = _weight_map(path)
    has_embedding = any(_EMBEDDING_KEY.search(key) for key in weight_map)
    needed = {key: file for key, file in weight_map.items() if _is_needed(key, llm_layers, has_embedding)}
    for file in sorted(set(needed.values())):
        source = _resolve(path, file)
        if source is None:
            raise ModelError(f"{path}: shard {file}, which its index names, is missing; copy it there")
        header_of(Path(source))  # names it if it is damaged
        (folder / file).symlink_to(Path(source).resolve())
    write_index(folder, needed)


def _weight_map(path: ModelPath) -> dict[str, str]:
    """Tensor name -> file of a model folder or hub id."""
    for index_name, single in WEIGHT_FILES:
        if (index := _resolve(path, index_name)) is not None:
            return weight_map_of(Path(index))
        if (whole := _resolve(path, single)) is not None:
            return dict.fromkeys(header_of(Path(whole)), single)
    raise ModelError(
        f"{path}: has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}, which llm_layers needs; download the "
        "folder whole, or write the model once with save_pretrained"
    )


def _is_needed(key: str, llm_layers: int, has_embedding: bool) -> bool:
    """Whether a checkpoint tensor, under its old or new name, belongs to the truncated model."""
    if VISUAL_KEY.search(key):
        return True
    if _HEAD_KEY.search(key):
        return not has_embedding  # tied weights may be stored under lm_head alone
    layer = _LAYER_KEY.search(key)
    return int(layer[1]) < llm_layers if layer else not _FINAL_NORM_KEY.search(key)


def _read(
    auto_class: Any,
    folder: str,
    path: ModelPath,
    config: PreTrainedConfig,
    options: dict[str, Any],
    may_lack: tuple[str, ...],
) -> PreTrainedModel:
    """from_pretrained with one-line errors. A missing tensor is an error and never a random weight."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # its report of missing and unused tensors: both are checked or meant here
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        model, info = auto_class.from_pretrained(folder, config=config, output_loading_info=True, **options)
    except _LOADING_ERRORS as error:
        if gpu_memory_is_full(error):
            raise
        raise ModelError(f"{path}: the model cannot be loaded: {one_line(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
    missing = sorted(set(info["missing_keys"]) - set(may_lack))
    if missing:
        raise ModelError(
            f"{path}: {len(missing)} tensors are missing, first {missing[0]!r}; they do not fit its config.json"
        )
    return model


def _spread(room: int) -> dict[str, Any]:
    """What has accelerate fill the cards, but for `room` bytes each and what lies there already, and then the host."""
    if not torch.cuda.is_available():
        return {}
    cards = [torch.cuda.mem_get_info(i) for i in range(torch.cuda.device_count())]  # bytes that are free, and all
    most: dict[int | str, int] = {
        i: max(0, min(free, usable_bytes(card)) - room) for i, (free, card) in enumerate(cards)
    }
    return {"device_map": "auto", "max_memory": most | {"cpu": psutil.virtual_memory().available}}


def _quantization(kind: str, family: Family, dtype: torch.dtype) -> BitsAndBytesConfig:
    # Patterns from the start of a name, which in a whole model begins with `model.`.
    skip = [rf"(?:model\.)?{re.escape(path)}" for path in (family.tower, *family.projector)] + ["lm_head"]
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=skip
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    raise ModelError(f"quantize_llm is {kind!r}: allowed are 'nf4', 'int8' or none")


def _require_folder(path: ModelPath, file: str, what: str) -> None:
    if _resolve(path, file) is None:
        state = f"has no {file}" if Path(path).is_dir() else "is no folder and no reachable hub id"
        raise ModelError(f"{path}: {state}; give the path of {what}")


def _resolve(path: ModelPath, file: str) -> str | None:
    """The local file of a model folder or (downloaded) hub id; None when there is none."""
    if Path(path).is_dir():
        local = Path(path) / file
        return str(local) if local.is_file() else None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return None
    try:
        return cached_file(str(path), file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
