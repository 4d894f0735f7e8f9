"""How the blocks of a GPT in training run over a mesh: see Layout.

Shapes: B batch, T tokens, C n_embd.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.sharding import AbstractMesh, Mesh

from config import GPTConfig
from mesh import MICRO_BATCHES_PER_STAGE, ROWS, constrain, gather, largest_divisor
from ops import save_activations
from training.pipeline import pipeline, run_layers


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a GPT in training, of config `model`, is spread over `mesh`.

    It is what model.OneDevice is for one device."""

    mesh: Mesh | AbstractMesh
    model: GPTConfig

    @property
    def batch_shards(self) -> tuple[int, int]:
        """Into how many parts the rows and the positions of a batch are cut."""
        rows = math.prod(self.mesh.shape[axis] for axis in ROWS)
        return rows, self.mesh.shape["context"]

    @property
    def width_shards(self) -> int:
        """Into how many parts heads, the MLP and the vocabulary are cut."""
        return self.mesh.shape["tensor"]

    def stages(self, rows: int) -> tuple[int, int]:
        """Return the pipeline's stages, and the micro-batches that `rows` rows go through it in.

        (1, 1) means that there is no pipeline."""
        stages = self.mesh.shape["layers"]
        if stages == 1:
            return 1, 1
        rows_per_shard = rows // self.batch_shards[0]
        return stages, stages * largest_divisor(rows_per_shard, MICRO_BATCHES_PER_STAGE)

    def scan(
        self, f: Callable, carry: tuple, layers: tuple, *, unroll: int = 1
    ) -> tuple[tuple, None]:
        """Run the blocks as jax.lax.scan(f, carry, layers) does; along "layers" as a pipeline.

        carry is (x, None, keys) as GPT.blocks makes it, layers its stacked (weights, index)."""
        x, cache, keys = carry
        assert cache is None, "there is no cache in training"
        layer = self.layer_on_mesh(f)
        stages, micro_batches = self.stages(len(x))
        if stages == 1:
            x = run_layers(layer, x, keys, layers, unroll)
        else:
            x = pipeline(
                layer,
                x,
                keys,
                layers,
                mesh=self.mesh,
                axis="layers",
                micro_batches=micro_batches,
                unroll=unroll,
            )
        return (x, cache, keys), None

    def layer_on_mesh(self, f: Callable) -> Callable:
        """Return layer(x, keys, (weights, index)) -> x, which runs f where the mesh wants it.

        It tells XLA to gather the weights and to leave the rows where they are: without these hints
        XLA lets the activations follow the weights and sends those through the network instead."""

        qkv_parts = self.model.qkv_parts

        def layer(x: jax.Array, keys: jax.Array | None, weights_and_index: tuple) -> jax.Array:
            weights, index = weights_and_index
            (x, _, _), _ = f((x, None, keys), (gather(self.mesh, weights, qkv_parts), index))
            return constrain(self.mesh, x, ("data", "fsdp"), "context", None)  # (B, T, C)

        if self.mesh.shape["fsdp"] == 1:
            return layer
        # The backward pass gathers the weights again: saved, all layers' would be whole everywhere.
        policy = None if self.model.remat else save_activations
        return jax.checkpoint(layer, prevent_cse=False, policy=policy)
