"""A model is walked layer by layer: each layer runs on all micro-batches of a rank before the next layer does.

Of the model a rank then holds the states of its tokens before the present layer, and no others.

Shape suffixes: S sequence, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from compactlm_nemo.importance.leave_one_out import only_layers
from compactlm_nemo.models.build import HiddenStateModel, ModelChunks
from compactlm_nemo.models.dims import Dims
from compactlm_nemo.models.forward import DataParallelSamples, context_share, forward_each, positions_of
from compactlm_nemo.models.taps import Taps, on_every_stage


class SingleLayer(torch.nn.Module):
    """A model's chunk that runs one layer on stored inputs, in place of the chunk in a pipeline schedule."""

    def __init__(self, chunk: HiddenStateModel) -> None:
        super().__init__()
        self.module = chunk  # the name under which Megatron looks through wrappers
        self.layers: list[Any] = list(chunk.decoder.layers)
        self.numbers = [layer.layer_number - 1 for layer in self.layers]
        self.layer = self.batch = 0
        self.inputs: dict[int, Tensor] = {}
        self.outputs: dict[int, Tensor] = {}

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor, mask: None) -> Tensor:
        chunk = self.module
        if self.layer > self.numbers[-1]:
            return self.outputs[self.batch]
        if self.layer < self.numbers[0]:  # what comes from the stage before will be this chunk's input
            self.inputs[self.batch] = chunk.decoder.input_tensor
            with only_layers(chunk, []):
                return chunk(tokens_BS, positions_BS, mask)
        layer = self.layers[self.layer - self.numbers[0]]
        start = self.inputs.get(self.batch)  # None: the embedding
        if start is not None and not chunk.pre_process:
            chunk.set_input_tensor(start)
        handle = layer.register_forward_hook(self._store)
        with only_layers(chunk, [layer]):
            hidden = chunk(tokens_BS, positions_BS, mask, decoder_input=start)
        handle.remove()
        # A chunk with further layers passes on what nobody reads; the output of its last layer is read.
        return hidden if chunk.post_process else self.outputs[self.batch]

    def _store(self, layer: Any, args: Any, output: Any) -> None:
        self.outputs[self.batch] = output[0] if isinstance(output, tuple) else output

    def advance(self) -> None:
        """Make the outputs of the finished layer the inputs of the next."""
        if self.layer in self.numbers:
            self.inputs = dict(self.outputs) if self.layer < self.numbers[-1] else {}


class LayerWalk:
    """The micro-batches of a data-parallel rank on their way through the layers of a model.

    Args:
        model: Its modules stay in the mode, training or evaluation, in which they are.
        samples: The micro-batches.
    """

    def __init__(self, model: ModelChunks, samples: DataParallelSamples) -> None:
        self.model, self.samples, self.mesh = model, samples, model.mesh
        self.chunks = model.wrapped(SingleLayer(chunk) for chunk in model)

    def chunk(self, layer: int) -> SingleLayer | None:
        """Return the chunk with a layer where this rank has the layer, else None."""
        return next((chunk for chunk in self.chunks if layer in chunk.numbers), None)

    def module(self, layer: int) -> Any:
        """Return the module of a layer where this rank has the layer, else None."""
        chunk = self.chunk(layer)
        return None if chunk is None else chunk.layers[layer - chunk.numbers[0]]

    def run(self, layer: int, visit: Callable[[int], None] = lambda batch: None) -> None:
        """Run one layer on every micro-batch and call `visit` with the number of each, on every rank. Collective."""
        for batch, tokens_BS in enumerate(self.samples.batches):
            for chunk in self.chunks:
                chunk.layer, chunk.batch = layer, batch
            forward_each(self.chunks, [tokens_BS], lambda *_: None)
            visit(batch)

    def output(self, layer: int, batch: int) -> Tensor:
        """Run one layer on one micro-batch, on a rank with the layer, with gradient where that is enabled.

        `[S, B, E]`, S this rank's part of the sequences; the output also stays for `advance`.
        """
        chunk = self.chunk(layer)
        assert chunk is not None
        chunk.layer, chunk.batch = layer, batch
        tokens_BS = context_share(self.samples.batches[batch], self.mesh)
        chunk(tokens_BS, positions_of(tokens_BS), None)
        return chunk.outputs[batch]

    def advance(self, layer: int) -> None:
        """Go on from a layer to the next."""
        for chunk in self.chunks:
            chunk.layer = layer
            chunk.advance()

    def step(self, layer: int, visit: Callable[[int], None] = lambda batch: None) -> None:
        """Run one layer on every micro-batch and go on to the next. Collective."""
        self.run(layer, visit)
        self.advance(layer)

    def stream_after(self, layer: int, keep: Callable[[int, Tensor], None] | None) -> None:
        """Run one layer, go on to the next, and give `keep` its output on every micro-batch. Collective.

        Args:
            keep: Called with the number of a micro-batch and `[S / cp, B, H]` float32, on every rank of the pipeline
                and whole over tensor-parallel ranks; None on a rank that only takes part.
        """
        taps, width = Taps(), self.model.dims.hidden_size
        if (module := self.module(layer)) is not None:
            taps.output(module, "stream")

        def visit(batch: int) -> None:
            tokens_BS = self.samples.batches[batch]
            stream_SBH = on_every_stage(taps.pop("stream"), self.mesh, tokens_BS=tokens_BS, width=width)
            if keep is not None:
                keep(batch, stream_SBH)

        self.step(layer, visit)
        taps.remove()


def spans(layers: list[int], teacher: Dims) -> Iterator[tuple[int, int]]:
    """Yield for each kept layer its number in the teacher and that of the next kept one, or of layers at the end."""
    yield from zip(layers, [*layers[1:], teacher.num_layers], strict=True)
