"""Asks the whole frozen original about photos, with the features of their visual tokens changed on the way.

The change acts inside the model's own forward pass, so positions, masks and whatever else a family does stay its own.
Legend: B questions, N visual tokens, H width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.utils import ModelOutput

from fastvkd.devices import questions_at_once
from fastvkd.models import families
from fastvkd.models.answers import AnswerBatch, Query, collate_answers, processor_inputs
from fastvkd.models.families import family_of, parse_site
from fastvkd.models.packing import PackedBatch, pack, packs
from fastvkd.models.prompts import chat_prompt
from fastvkd.unlearning.answers import Answers, read_answers
from fastvkd.unlearning.vkd.images import ImageSet, Views

Change = Callable[[Tensor, Tensor], Tensor]  # (rows (N, H) float32, visual tokens of each image (B,)) -> rows
_ANSWER_TOKENS = 16  # of a greedy answer, at most
_PACKED = 2  # the tokens of a row of several questions, as a multiple of one question's
_OF_THE_TOWER = ("last_hidden_state", "hidden_states", "attentions")  # which the LLM does not read


@dataclass
class Seen:
    """Some views, prepared and seen by the tower once: `pixels` at a fixed resolution, and `features` as the model's
    own `get_image_features` returns them; None till they are first asked for."""

    pixels: Tensor | None = None
    features: Any = None

    def to(self, device: torch.device | str) -> "Seen":
        """The same, its features on `device`."""
        return Seen(self.pixels, tree_map_only(Tensor, lambda tensor: tensor.to(device), self.features))

    @property
    def nbytes(self) -> int:
        tensors = (part for part in tree_leaves((self.pixels, self.features)) if isinstance(part, Tensor))
        return sum(tensor.nbytes for tensor in tensors)


class Asker:
    """Questions about the photos of an `ImageSet`, by their positions there, to one whole model."""

    def __init__(self, model: Any, processor: Any, images: ImageSet):
        self.model, self.images, self._processor = model, images, processor
        self._family = family_of(model)
        self._base: Any = families.base_model(model)
        self.image_token = families.image_token_id(self._base.config)
        self._device = next(model.parameters()).device
        self._words = lru_cache(maxsize=8192)(self._words_uncached)
        config: Any = self._base.config
        text = config.text_config
        kv = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        tokens = _collated(processor, [(images.image(0), ("What is it?", "It is."))]).predicts.shape[1] + _ANSWER_TOKENS
        self._at_once = questions_at_once(tokens, text.num_hidden_layers, kv * head, model.dtype.itemsize)
        self._tokens = tokens
        self.packs = packs(config) and self._family.fixed_resolution
        self._seen: Seen | None = None  # within `same_images`

    def batch(self, photos: Sequence[int], asked: Sequence[tuple[str, str]], views: Views | None = None) -> AnswerBatch:
        """(question, answer) number i about photo number i, each seen anew with `views`; on the model's device."""
        if self._family.fixed_resolution:
            batch = _stacked([self._words(*pair) for pair in asked], self._processor.tokenizer.pad_token_id or 0)
            batch.inputs["pixel_values"] = self._pixels(photos, views)
        else:
            pictures = self.images.pictures(photos, views)
            batch = _collated(self._processor, list(zip(pictures, asked, strict=True)))
            batch.inputs["pixel_values"] = batch.inputs["pixel_values"].to(self.model.dtype)
        return batch.to(self._device)

    def _pixels(self, photos: Sequence[int], views: Views | None) -> Tensor:
        """Those of a fixed resolution, in the model's type, on the host."""
        if self._seen is not None and self._seen.pixels is not None:
            return self._seen.pixels
        pixels: Tensor = self.images.batch(photos, views).inputs["pixel_values"].to(self.model.dtype)
        if self._seen is not None:
            self._seen.pixels = pixels
        return pixels

    def read(self, batch: AnswerBatch, site: str = "", change: Change | None = None) -> Answers:
        """What the model makes of a batch, the visual tokens that enter `site` being `change`d."""
        if change is None:
            return read_answers(self.model, batch)
        with self._changed(batch.inputs["input_ids"] == self.image_token, site, change):
            return read_answers(self.model, batch)

    def read_each(
        self,
        photos: Sequence[int],
        asked: Sequence[Sequence[tuple[str, str]]],
        views: Views | None,
        site: str,
        change: Change,
    ) -> list[Answers]:
        """What the model makes of each list of `asked`, question number i of all being about photo number i, seen with
        `views` and changed as in `read`. Where the family allows, the photos go through the LLM once for all lists."""
        if not self.packs:
            return [self.read(self.batch(photos, one, views), site, change) for one in asked]
        answers = self.read(self._packed(photos, list(zip(*asked, strict=True)), views), site, change)
        return [answers.only(slice(k, None, len(asked))) for k in range(len(asked))]

    def _packed(
        self, photos: Sequence[int], asked: Sequence[Sequence[tuple[str, str]]], views: Views | None = None
    ) -> PackedBatch:
        """The questions number i about photo number i in one row; on the model's device."""
        pad = self._processor.tokenizer.pad_token_id or 0
        rows = [[self._words(*pair) for pair in pairs] for pairs in asked]
        batch = pack(rows, self.image_token, pad, self.model.dtype)
        batch.inputs["pixel_values"] = self._pixels(photos, views)
        return batch.to(self._device)

    @torch.no_grad()
    def logits(self, photos: Sequence[int], asked: Sequence[tuple[str, str]], views: Views | None = None) -> Tensor:
        """(answer tokens, V) of all questions, as many as fit at once; `views` as in `batch`."""
        found = []
        for part in self._parts(len(asked)):
            seen = None if views is None else Views(views.seed, views.positions[part], views.total)
            logits = self.read(self.batch(photos[part], asked[part], seen)).logits
            assert logits is not None
            found.append(logits)
        return torch.cat(found)

    @torch.no_grad()
    def say(self, photos: Sequence[int], questions: Sequence[str]) -> list[str]:
        """The greedy answer to question number i about photo number i, cut after 16 tokens."""
        said: list[str] = []
        prompts = {q: chat_prompt(self._processor, q, image=True) for q in dict.fromkeys(questions)}
        queries = [Query(prompts[q], (self.images.photo(i),)) for i, q in zip(photos, questions, strict=True)]
        for part in self._parts(len(queries)):
            inputs = processor_inputs(self._processor, queries[part], None, self._device)
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            found = self.model.generate(**inputs, do_sample=False, max_new_tokens=_ANSWER_TOKENS)
            new = found[:, inputs["input_ids"].shape[1] :]
            said += [text.strip() for text in self._processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return said

    @torch.no_grad()
    def scores(
        self,
        photos: Sequence[int],
        asked: Sequence[tuple[str, str]],
        site: str = "",
        change: Change | None = None,
    ) -> Tensor:
        """(B,) mean log-probability of the tokens of each answer, float32 on the CPU; `change` as in `read`."""
        return torch.cat(
            [
                (answers.log_probabilities() / torch.bincount(answers.row, minlength=count)).cpu()
                for answers, count in self._answers(photos, asked, site, change)
            ]
        )

    @torch.no_grad()
    def gives(
        self,
        photos: Sequence[int],
        asked: Sequence[tuple[str, str]],
        site: str = "",
        change: Change | None = None,
    ) -> Tensor:
        """(B,) bool on the CPU: whether each answer, its end included, is the greedy one; `change` as in `read`."""
        found = []
        for answers, count in self._answers(photos, asked, site, change):
            assert answers.logits is not None
            wrong = answers.row[answers.logits.argmax(1) != answers.tokens]
            found.append((torch.bincount(wrong, minlength=count) == 0).cpu())
        return torch.cat(found)

    def _answers(
        self, photos: Sequence[int], asked: Sequence[tuple[str, str]], site: str, change: Change | None
    ) -> Iterator[tuple[Answers, int]]:
        """What the model makes of all questions, as many as fit at once, and how many these were."""
        if not self.packs:
            for part in self._parts(len(asked)):
                yield self.read(self.batch(photos[part], asked[part]), site, change), len(asked[part])
            return
        rows = self._rows(photos, asked)
        for part in self._parts(len(rows), _PACKED):
            here = rows[part]
            packed = self._packed([photos[row.start] for row in here], [asked[row] for row in here])
            yield self.read(packed, site, change), here[-1].stop - here[0].start

    def _rows(self, photos: Sequence[int], asked: Sequence[tuple[str, str]]) -> list[slice]:
        """Questions that follow each other about one photo, as long as a row has no more than `_PACKED` times the
        tokens of one question's."""
        rows: list[slice] = []
        tokens = 0
        for i, (photo, pair) in enumerate(zip(photos, asked, strict=True)):
            words = self._words(*pair)
            own = len(words.inputs["input_ids"][0])
            more = own - int((words.inputs["input_ids"] == self.image_token).sum())
            if rows and photos[i - 1] == photo and tokens + more <= _PACKED * self._tokens:
                rows[-1] = slice(rows[-1].start, i + 1)
                tokens += more
            else:
                rows.append(slice(i, i + 1))
                tokens = own
        return rows

    def _parts(self, rows: int, longer: int = 1) -> list[slice]:
        """As many rows at once as fit, each `longer` than one question's."""
        size = max(1, self._at_once // longer)
        return [slice(start, start + size) for start in range(0, rows, size)]

    @contextmanager
    def same_images(self, seen: Seen | None = None) -> Iterator[None]:
        """All batches read within are of the same views: they are prepared, and the tower sees them, with the first
        one and no other. With `seen` that is kept there for later; its batches have the same number of photos."""
        see = self._base.get_image_features
        here = self._seen = seen if seen is not None else Seen()

        def once(*args: Any, **kwargs: Any) -> Any:
            if here.features is None:
                here.features = _read_by_llm(see(*args, **kwargs))
            return here.features

        self._base.get_image_features = once
        try:
            yield
        finally:
            del self._base.get_image_features
            self._seen = None

    @contextmanager
    def _changed(self, is_image: Tensor, site: str, change: Change) -> Iterator[None]:
        """Changes the visual tokens that enter the LLM (`projector`) or its layer k (`llm:<k>`)."""
        rows, counts = is_image.flatten().nonzero()[:, 0], is_image.sum(1)
        decoder: Any = families.language_model(self.model, self._family)
        kind, k = parse_site(site)
        entered: nn.Module = decoder
        if kind == "llm":
            entered = decoder.layers[k] if k < len(decoder.layers) else decoder.norm

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            key = "inputs_embeds" if "inputs_embeds" in kwargs else "hidden_states"
            hidden = args[0] if args else kwargs[key]
            flat = hidden.flatten(0, 1)
            here = rows.to(flat.device)  # where the model is spread, not that of the batch
            changed = change(flat[here].float().to(rows.device), counts).to(flat)
            hidden = flat.index_copy(0, here, changed).view_as(hidden)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, key: hidden})

        handle = entered.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _words_uncached(self, question: str, answer: str) -> AnswerBatch:
        """One row; at a fixed resolution any image takes the place of the real one."""
        return _collated(self._processor, [(Image.new("RGB", (64, 64)), (question, answer))])


def _read_by_llm(features: Any) -> Any:
    """The same without the tower's own states. Setting them to None would not do: they would stay as items."""
    if not isinstance(features, ModelOutput):
        return features
    return type(features)(**{name: part for name, part in features.items() if name not in _OF_THE_TOWER})


def _collated(processor: Any, asked: Sequence[tuple[Image.Image, tuple[str, str]]]) -> AnswerBatch:
    pairs = [(image, question, answer) for image, (question, answer) in asked]
    return collate_answers(processor, pairs, range(len(pairs)), [True] * len(pairs))


def _stacked(rows: Sequence[AnswerBatch], pad: int) -> AnswerBatch:
    """Rows of one question each as a batch without pixels, padded on the right."""
    length = max(row.predicts.shape[1] for row in rows)

    def stack(parts: list[Tensor], value: int) -> Tensor:
        return torch.cat([F.pad(part, (0, length - part.shape[1]), value=value) for part in parts])

    names = [name for name in rows[0].inputs if name != "pixel_values"]
    inputs = {name: stack([r.inputs[name] for r in rows], pad if name == "input_ids" else 0) for name in names}
    predicts = stack([row.predicts for row in rows], -100)
    return AnswerBatch(inputs, predicts, torch.ones(len(rows), dtype=torch.bool), torch.arange(len(rows)))
