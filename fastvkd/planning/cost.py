"""FLOPs per image and bytes per GPU of a training run, in closed formulas. No model is built and no weight read.

Legend: T tokens of the LLM input, S tokens of the tower, H and I hidden and intermediate widths, s bytes of a working
value.
"""

import math
import re
from dataclasses import dataclass, replace
from functools import cached_property

from fastvkd.devices import QUANTIZED_BYTES, questions_at_once, usable_bytes
from fastvkd.engines.optimizers import MOMENT_BYTES, MOMENT_BYTES_32BIT, check_optimizer
from fastvkd.errors import ModelError
from fastvkd.planning.architecture import Architecture, Tower
from fastvkd.planning.cards import GPU_LINK_GB_PER_S, GPU_PEAK_TFLOPS
from fastvkd.settings import NEW_VIEWS

# What a time estimate assumes (and prints). Shares are of the datasheet's figures.
ASSUMED = {
    "mfu": 0.45,  # of the peak of dense 16-bit matrix products
    "link_efficiency": 0.7,  # of the link's bandwidth, in collectives and copies
    "gpus_per_node": 8,
    "network_gb_per_s": 25.0,  # a GPU's share between nodes: 200 Gbit/s
    "pcie_gb_per_s": 32.0,  # PCIe 4.0 x16, to host memory
}
PREFIX_TOKENS = 5  # BOS and "USER: " or the like before the image; the text after it is cut
ASKED_TOKENS = 40  # of a question about a photo: prefix, question and answer
ASKED_ANSWER_TOKENS = 8
_MAPPED, _LOGITS = 18, 8  # copies of a photo's features and of an answer's logits in a step of the search
_CACHE_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}
_DS_BUCKET = 50_000_000  # elements, as the presets in ds_configs set it


@dataclass(frozen=True)
class Recipe:
    """The settings of a run that decide its cost."""

    sites: tuple[str, ...]
    trainable: str = "vision+projector"
    optim: str = "adamw_8bit"
    bf16: bool = True
    quantize_llm: str = "none"
    gradient_checkpointing: bool = False
    eager_attention: bool = False
    micro_batch: int = 16
    gradient_accumulation_steps: int = 1
    online_teacher: bool = False
    cache_dtype: str = "float32"
    zero_stage: int = 0  # 0 also stands for the local engine
    offload_optimizer: bool = False
    offload_parameters: bool = False
    world_size: int = 1
    search_steps: int = 0  # of the search for a stranger's map, for each person and site; 0: there is none
    search_views: int = 6  # of a photo in each of them
    search_quantize: str = "auto"  # of the model that is searched through; auto: as `quantize_llm`
    search_spread: bool = False  # that model lies on all cards and in host memory
    scrub_photos: int = 0  # in a step of the scrub; 0: the LLM is left alone
    scrub_rank: int = 32


class Cost:
    """FLOPs per image and bytes per GPU of a recipe on an architecture."""

    def __init__(self, architecture: Architecture, recipe: Recipe, *, prefix_tokens: int = PREFIX_TOKENS) -> None:
        check_optimizer(recipe.optim)
        self.architecture = architecture
        self.recipe = recipe
        self.tokens = prefix_tokens + architecture.visual_tokens
        sites = [_parse_site(site, architecture) for site in recipe.sites]
        self._llm_layers = max((k for kind, k in sites if kind == "llm"), default=0)
        self._to_projector = any(kind != "vision" for kind, _ in sites)
        deepest = max((k for kind, k in sites if kind == "vision"), default=0)
        tower = architecture.tower
        self._run_blocks = tower.blocks if self._to_projector else deepest
        used = max(tower.used_blocks, deepest) if self._to_projector else deepest
        self._trained_blocks = used if "vision" in recipe.trainable else 0
        self._train_projector = self._to_projector and ("projector" in recipe.trainable or recipe.trainable == "sine")
        if not self._trained_blocks and not self._train_projector:
            raise ModelError(f"trainable={recipe.trainable!r} reaches nothing at the sites {', '.join(recipe.sites)}")

    @property
    def llm_layers(self) -> int:
        """LLM layers that are loaded and run."""
        return self._llm_layers

    @cached_property
    def trainable(self) -> int:
        tower = self.architecture.tower
        count = self.architecture.projector.parameters if self._train_projector else 0
        if self._trained_blocks:
            count += tower.embedding_parameters + self._trained_blocks * tower.block_parameters
        return count

    @cached_property
    def visual(self) -> int:
        """All parameters of tower and projector."""
        tower = self.architecture.tower
        fixed = tower.embedding_parameters + tower.unused_parameters + self.architecture.projector.parameters
        return fixed + tower.blocks * tower.block_parameters

    @cached_property
    def frozen(self) -> int:
        llm = self.architecture.llm
        return self.visual - self.trainable + llm.vocabulary * llm.hidden + self._llm_layers * llm.layer_parameters

    def flops(self) -> dict[str, int]:
        """FLOPs of one image in one training step: forward, and backward without frozen weights' gradients.

        These are model FLOPs. Fused attention recomputes its scores, half its forward again: that is not counted. What
        `gradient_checkpointing` recomputes is counted.
        """
        a = self.architecture
        tower_forward = a.tower.embedding_flops()
        tower_forward += sum(a.tower.linear_flops() + a.tower.attention_flops(b) for b in range(self._run_blocks))
        tower_backward = 0
        if self._trained_blocks:
            tower_backward += a.tower.embedding_flops()  # its weights only: pixels need no gradient
            for block in range(self._trained_blocks):
                tower_backward += 2 * (a.tower.linear_flops() + a.tower.attention_flops(block))
        if self._to_projector:
            forward = a.projector.flops()
            tower_forward += forward
            first_layer = 2 * a.projector.rows * math.prod(a.projector.layers[0])
            if self._train_projector:
                tower_backward += forward
            # Gradients of the inputs: of the first layer only if something lies below it.
            tower_backward += forward - (0 if self._trained_blocks else first_layer)
        linear, scores = a.llm.linear_flops(self.tokens), a.llm.attention_flops(self.tokens)
        llm_forward = self._llm_layers * (linear + scores)
        llm_backward = self._llm_layers * (linear + 2 * scores)
        if self.recipe.gradient_checkpointing:
            tower_backward += self._trained_blocks * a.tower.linear_flops()
            tower_backward += sum(a.tower.attention_flops(b) for b in range(self._trained_blocks))
            llm_backward += llm_forward
        if self.recipe.online_teacher:  # a second forward pass, no backward
            tower_forward *= 2
            llm_forward *= 2
        parts = {
            "tower_forward": tower_forward,
            "tower_backward": tower_backward,
            "llm_forward": llm_forward,
            "llm_backward": llm_backward,
        }
        return parts | {"total": sum(parts.values())}

    def activation_bytes_per_image(self) -> float:
        """What the backward pass of one image keeps, plus the inputs and targets of the loss."""
        a, r = self.architecture, self.recipe
        s = 2 if r.bf16 else 4
        tower, llm, block = a.tower, a.llm, self._block_bytes()
        layer = self._layer_bytes(self.tokens)
        if r.gradient_checkpointing:  # block inputs, and one block at a time recomputed
            tower_bytes = self._trained_blocks * tower.crops * tower.tokens * tower.hidden * s
            tower_bytes += block if self._trained_blocks else 0
            llm_bytes = self._llm_layers * self.tokens * llm.hidden * s + (layer if self._llm_layers else 0)
        else:
            tower_bytes = self._trained_blocks * block
            llm_bytes = self._llm_layers * layer
        # A block above the feature layer is run by transformers all the same; its graph is dropped with the output.
        with_unused = tower_bytes + (self._run_blocks - self._trained_blocks) * block if self._trained_blocks else 0
        projector_bytes = 0
        if self._to_projector:
            (first, middle), (_, last) = a.projector.layers
            projector_bytes = a.projector.rows * (first + middle * 2 + last) * s
        loss = sum(self._site_values(site) for site in r.sites) * (
            2 * s + 4
        )  # features, their gradient, float32 target
        return max(with_unused, tower_bytes + projector_bytes + llm_bytes + self.tokens * llm.hidden * s + loss)

    def unused_block_bytes(self) -> int:
        """What one image's pass keeps of tower blocks behind the one whose output is taken, until it ends."""
        return (self._run_blocks - self._trained_blocks) * self._block_bytes() if self._trained_blocks else 0

    def _block_bytes(self) -> int:
        """What the backward pass of one trained tower block keeps of an image."""
        tower, s = self.architecture.tower, 2 if self.recipe.bf16 else 4
        # Norms' inputs and outputs, q, k, v, attention output, MLP: (8 H + m I) values; RMSNorm also a float32 copy.
        block = (8 * tower.hidden + tower.mlp_saved * tower.intermediate) * s
        if tower.mlp_matrices == 3:
            block += 8 * tower.hidden
        if self.recipe.eager_attention:
            block += tower.heads * tower.tokens * _score_bytes(s)
        return block * tower.crops * tower.tokens

    def _layer_bytes(self, tokens: int) -> int:
        """What the backward pass of one frozen decoder layer keeps of a sequence."""
        llm, s = self.architecture.llm, 2 if self.recipe.bf16 else 4
        # Linear layers keep nothing, RMSNorm its float32 input, SDPA q, k, v and out, the MLP 3 I.
        kv = llm.kv_heads * llm.head_dim
        layer = 8 * llm.hidden + (2 * llm.attention_width + 2 * kv + 3 * llm.intermediate) * s
        if self.recipe.eager_attention:
            layer += llm.heads * tokens * _score_bytes(s)
        return layer * tokens

    def _site_values(self, site: str) -> int:
        kind, _ = _parse_site(site, self.architecture)
        if kind == "vision":
            tower = self.architecture.tower
            return tower.crops * (tower.tokens - int(tower.has_cls)) * tower.hidden
        return self.architecture.visual_tokens * self.architecture.llm.hidden

    def cache_bytes_per_image(self) -> int:
        """Bytes on disk of the teacher's features of one image at all sites; 0 with an online teacher."""
        if self.recipe.online_teacher:
            return 0
        return sum(self._site_values(site) for site in self.recipe.sites) * _CACHE_BYTES[self.recipe.cache_dtype]

    def memory(self, micro_batch: int) -> dict[str, int]:
        """Bytes on each GPU at the peak of a step.

        Without gradient accumulation `total` is below the sum. A gradient appears as its activations go, so the peak
        holds the larger of the two.
        """
        a, r = self.architecture, self.recipe
        s = 2 if r.bf16 else 4
        shards = r.world_size
        quantized = self._llm_layers * a.llm.matrices
        frozen = (self.frozen - quantized) * s + quantized * QUANTIZED_BYTES.get(r.quantize_llm, s)
        if r.online_teacher:
            frozen += self.visual * s  # a frozen copy of the tower and projector; the LLM is shared
        weights = frozen + self.trainable * s
        if r.zero_stage == 3:
            largest = max(a.llm.layer_parameters if self._llm_layers else 0, a.llm.vocabulary * a.llm.hidden)
            live = min(self.frozen + self.trainable, 2 * largest) * s  # the layer in use and the next one
            weights = live + (0 if r.offload_parameters else weights / shards)
        masters = self.trainable * 4.0 if r.bf16 else 0.0
        vectors = self.trainable * _vector_share(a.tower)
        moments = (self.trainable - vectors) * MOMENT_BYTES[r.optim] + vectors * MOMENT_BYTES_32BIT[r.optim]
        gradients = self.trainable * 4.0
        if r.zero_stage:
            masters, moments = masters / shards, moments / shards
            bucket = min(_DS_BUCKET, self.trainable) * s
            gradients = gradients / shards + bucket if r.zero_stage >= 2 else gradients + bucket
        if r.offload_optimizer:
            masters = moments = 0.0
            gradients = min(_DS_BUCKET, self.trainable) * s * 2.0
        activations = micro_batch * self.activation_bytes_per_image()
        accumulating = r.gradient_accumulation_steps > 1
        peak = activations + gradients if accumulating else max(activations, gradients)
        parts = {
            "weights": int(weights),
            "masters": int(masters),
            "moments": int(moments),
            "gradients": int(gradients),
            "activations": int(activations),
        }
        return parts | {"total": int(weights + masters + moments + peak)}

    def search_flops(self, *, asked_tokens: int = ASKED_TOKENS) -> int:
        """FLOPs of the search for the maps of one person, at all sites, if it is not repeated: in each step the whole
        LLM reads two questions about each of `search_views` views with the gradient of the map, and in the first ones,
        whose views are seen again later, one before that."""
        a, r = self.architecture, self.recipe

        def passed(tokens: int, *, back: bool) -> int:
            linear, scores = a.llm.linear_flops(tokens), a.llm.attention_flops(tokens)
            once = linear + scores
            again = once if r.gradient_checkpointing else 0
            return a.llm.layers * (once + (linear + 2 * scores + again if back else 0))

        tower = a.tower.embedding_flops() + a.projector.flops()
        tower += sum(a.tower.linear_flops() + a.tower.attention_flops(block) for block in range(a.tower.blocks))
        rows, tokens = self._searched_rows(asked_tokens)
        seen = tower + passed(a.visual_tokens + asked_tokens, back=False)
        each = min(r.search_steps, NEW_VIEWS) * seen + r.search_steps * rows * passed(tokens, back=True)
        return len(r.sites) * r.search_views * each

    def _searched_rows(self, asked_tokens: int) -> tuple[int, int]:
        """In how many rows of how many tokens a step of the search asks two questions about a view: in one where all
        photos have as many tokens, which then go through the LLM once."""
        visual = self.architecture.visual_tokens
        return (1, visual + 2 * asked_tokens) if self.architecture.fixed_tokens else (2, visual + asked_tokens)

    def scrub_memory(self) -> dict[str, int]:
        """Bytes on the GPU at the peak of the scrub, beside which the trained part and its optimiser stay.

        A step keeps two passes over `scrub_photos` questions, each by itself.
        """
        a, r = self.architecture, self.recipe
        alone = replace(a, fixed_tokens=False)
        asked = Cost(alone, replace(r, search_views=r.scrub_photos)).search_memory()
        llm, s = a.llm, 2 if r.bf16 else 4
        kv = llm.kv_heads * llm.head_dim
        # Inputs and outputs of all its matrices.
        sides = llm.layers * (7 * llm.hidden + 2 * llm.attention_width + 2 * kv + 3 * llm.intermediate)
        trained = self.memory(r.micro_batch)
        parts = {
            "trained": sum(trained[name] for name in ("weights", "masters", "moments")),
            "weights": asked["weights"],
            "adapters": 4 * s * r.scrub_rank * sides,  # themselves, their gradients and two moments
            "activations": asked["activations"],
        }
        return parts | {"total": sum(parts.values())}

    def search_memory(
        self, *, asked_tokens: int = ASKED_TOKENS, varied: int = 400, questions: int = 64
    ) -> dict[str, int]:
        """Bytes on the GPU of the rank that searches, at the peak of the search for a stranger's maps.

        The whole model lies there by itself, frozen; where it is spread, `weights` are what a pass has there at the
        least. `statistics` is how strangers' features vary, of `varied` photos; `activations` are the larger of a
        step's and of the keys and values of up to `questions` asked at once.
        """
        a, r = self.architecture, self.recipe
        llm, s = a.llm, 2 if r.bf16 else 4
        quantize = r.quantize_llm if r.search_quantize == "auto" else r.search_quantize
        weights = self.least_bytes(quantize) if r.search_spread else self.whole_bytes(quantize)

        tokens, views = a.visual_tokens + asked_tokens, r.search_views
        at_site = a.visual_tokens * llm.hidden * 4  # a photo's features in float32
        # A photo is a sample where all have as many tokens, else a token is.
        sample = a.visual_tokens * llm.hidden if a.fixed_tokens else llm.hidden
        rank = max(1, min(200, 2 * varied // 3 if a.fixed_tokens else 200, sample // 2))
        statistics = (rank + 1) * sample * 4 + llm.hidden**2 * 4

        rows, long = self._searched_rows(asked_tokens)
        layer = self._layer_bytes(long)
        kept = rows * llm.layers * layer
        if r.gradient_checkpointing:  # layers' inputs, and one layer at a time recomputed
            kept = rows * llm.layers * long * llm.hidden * s + layer
        logits = ASKED_ANSWER_TOKENS * llm.vocabulary * 4
        step = views * (kept + _MAPPED * at_site + _LOGITS * logits)
        kv = llm.kv_heads * llm.head_dim
        at_once = min(questions, questions_at_once(tokens, llm.layers, kv, s))
        asking = at_once * 2 * tokens * llm.layers * kv * s
        activations = max(step, asking)
        parts = {"weights": int(weights), "statistics": int(statistics), "activations": int(activations)}
        return parts | {"total": sum(parts.values())}

    def whole_bytes(self, quantize: str = "none") -> float:
        """The weights of the whole model, the matrices of the LLM's layers quantised."""
        llm, s = self.architecture.llm, 2 if self.recipe.bf16 else 4
        ends = llm.vocabulary * llm.hidden * (1 if llm.tied else 2) + llm.hidden
        vectors = llm.layers * (llm.layer_parameters - llm.matrices)
        rounded = llm.layers * llm.matrices * QUANTIZED_BYTES.get(quantize, s)
        return (self.visual + ends + vectors) * s + rounded

    def least_bytes(self, quantize: str = "none") -> float:
        """Of these, what a card holds at the least while the others come from host memory: all but the LLM's layers,
        and two of them."""
        return self.whole_bytes(quantize) - max(0, self.architecture.llm.layers - 2) * self.layer_bytes(quantize)

    def coming_bytes(self) -> float:
        """What accelerate keeps free on a card for weights that come from host memory: the largest module that it does
        not split, a layer or the output head."""
        llm, s = self.architecture.llm, 2 if self.recipe.bf16 else 4
        return max(self.layer_bytes(), llm.vocabulary * llm.hidden * s)

    def layer_bytes(self, quantize: str = "none") -> float:
        """One layer of the LLM, its matrices quantised."""
        llm, s = self.architecture.llm, 2 if self.recipe.bf16 else 4
        return (llm.layer_parameters - llm.matrices) * s + llm.matrices * QUANTIZED_BYTES.get(quantize, s)

    def peak(self, micro_batch: int) -> int:
        """Bytes on a GPU: the largest of the search's, if there is one, the training's, and the scrub's."""
        searched = self.search_memory()["total"] if self.recipe.search_steps else 0
        scrubbed = self.scrub_memory()["total"] if self.recipe.scrub_photos else 0
        return max(self.memory(micro_batch)["total"], searched, scrubbed)

    def traffic(self) -> dict[str, float]:
        """Bytes that each GPU sends over the links (`gather`) and to or from host memory (`pcie`), by occasion.

        `*_micro` at every micro-batch, `*_update` at every optimiser update. Ring collectives: an all-gather or a
        reduce-scatter of V bytes sends V (n - 1) / n from each of n ranks.
        """
        r = self.recipe
        s = 2 if r.bf16 else 4
        ring = (r.world_size - 1) / r.world_size
        everything, trained = (self.frozen + self.trainable) * s, self.trainable * s
        gather_micro = gather_update = pcie_micro = pcie_update = 0.0
        if r.zero_stage == 3:
            gather_micro = ring * (2 * everything + trained)  # weights before forward and backward, then gradients
        else:
            gather_update = ring * 2 * trained  # gradients reduced, then (or as part of it) weights or sums gathered
        if r.offload_parameters:
            pcie_micro = 2 * everything / r.world_size
        if r.offload_optimizer:
            pcie_update = 2 * trained / r.world_size  # gradients down, new weights up
        return {
            "gather_micro": gather_micro,
            "gather_update": gather_update,
            "pcie_micro": pcie_micro,
            "pcie_update": pcie_update,
        }

    def step_seconds(self, card: str) -> dict[str, float]:
        """Seconds of one optimiser update on cards of the kind `card`, under `ASSUMED`: an estimate, not a measurement.

        Keys: `compute`, `gather`, `pcie`. `overlapped` is the longest of the three, as if the others hid behind it;
        `serial` is their sum. The truth lies between. `images_per_second_*` count the images of all ranks.
        """
        r, parts = self.recipe, self.recipe.gradient_accumulation_steps
        link = GPU_LINK_GB_PER_S[card]
        if r.world_size > ASSUMED["gpus_per_node"]:
            link = min(link, ASSUMED["network_gb_per_s"])
        moved = self.traffic()

        def seconds(kind: str, gb_per_s: float) -> float:
            total = parts * moved[f"{kind}_micro"] + moved[f"{kind}_update"]
            return total / (gb_per_s * 1e9 * ASSUMED["link_efficiency"])

        flops = parts * r.micro_batch * self.flops()["total"]
        compute = flops / (GPU_PEAK_TFLOPS[card] * 1e12 * ASSUMED["mfu"])
        gather, pcie = seconds("gather", link), seconds("pcie", ASSUMED["pcie_gb_per_s"])
        overlapped, serial = max(compute, gather, pcie), compute + gather + pcie
        images = parts * r.micro_batch * r.world_size
        return {
            "compute": compute,
            "gather": gather,
            "pcie": pcie,
            "overlapped": overlapped,
            "serial": serial,
            "images_per_second_serial": images / serial,
            "images_per_second_overlapped": images / overlapped,
        }

    def largest_micro_batch(self, memory_bytes: int) -> int:
        """The largest micro-batch that fits, 0 when not even one image does, or the search does not."""
        budget = usable_bytes(memory_bytes)
        if self.peak(1) > budget:
            return 0
        low, high = 1, 2
        while high < 65536 and self.memory(high)["total"] <= budget:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.memory(middle)["total"] <= budget else (low, middle)
        return low


def _score_bytes(s: int) -> int:
    """Eager attention's softmax in float32 and its copy in the working dtype."""
    return 4 if s == 4 else 4 + s


def _vector_share(tower: Tower) -> float:
    """Share of a block's parameters in norms and biases, whose moments stay in 32 bit."""
    matrices = 4 * tower.hidden**2 + tower.mlp_matrices * tower.hidden * tower.intermediate
    return 1 - matrices / tower.block_parameters


def _parse_site(site: str, architecture: Architecture) -> tuple[str, int]:
    match = re.fullmatch(r"projector|(vision|llm):(\d+)", site)
    if match is None:
        raise ModelError(f"site {site!r}: write vision:<k>, projector or llm:<k> with a number k >= 0")
    if site == "projector":
        return "projector", 0
    kind, k = match[1], int(match[2])
    depth = architecture.tower.blocks if kind == "vision" else architecture.llm.layers
    if k > depth:
        raise ModelError(f"site {site!r}: {architecture.name} has only {depth} layers there; choose 0 to {depth}")
    return kind, k
