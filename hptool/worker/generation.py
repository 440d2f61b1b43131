"""Tokens from a model that is cut over ranks: a batch of prompts through all stages, then token by token.

Greedy, so that the same prompts give the same tokens with every layout. All ranks must call everything together, and
all of them know the tokens in the end.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.common.language_module.language_module import LanguageModule

from hptool.base_config import BaseConfig
from hptool.worker import initialise, model
from hptool.worker.cached_attention import Cache, serve_from_cache
from hptool.worker.decoding_graphs import DecodingGraphs
from hptool.worker.served import serving_config

#: What T5's decoder begins with (`masking`).
_T5_START = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a batch was answered, [b, output_len], and when on this rank: the first tokens, and all of them."""

    tokens: torch.Tensor
    first_s: float
    all_s: float


class Generator:
    """A rank's stage of the model, whose weights are random until `chunk` is given others."""

    def __init__(self, config: BaseConfig, device: torch.device, beat: Callable[[], None]) -> None:
        self._config = serving_config(config)
        self._device = device
        self._beat = beat
        megatron = model.transformer_config(self._config)
        (chunk,) = model.build_chunks(self._config, megatron)
        if initialise.is_wanted():
            initialise.fill(chunk, self._config.stack.init_method_std)
        # Of what Megatron makes in fp32 whatever the precision (norms, positions) too, as its Float16Module does.
        self.chunk: LanguageModule = chunk.to(device, megatron.params_dtype).eval()
        serve_from_cache(self.chunk)
        self._pipe = _Pipe()
        self._dtype: torch.dtype = megatron.params_dtype
        self._cache: Cache | None = None
        self._graphs: DecodingGraphs | None = None
        self._encoded: torch.Tensor | None = None
        self._table: torch.Tensor | None = None

    @torch.inference_mode()
    def open(self, batch: int, input_len: int, output_len: int) -> None:
        """Takes the memory for so many requests of such lengths, all of it."""
        self.close()
        pairs = self._config.is_encoder_decoder
        # The last token is not read again.
        cache = Cache(batch, output_len if pairs else input_len + output_len - 1)
        cache.allocate(self.chunk, input_len if pairs else 0, self._device)
        self._cache = cache
        if self._config.stack.position_embedding_type == "rope":
            self._table = self.chunk.rotary_pos_emb(cache.max_sequence_length)

    def close(self) -> None:
        """Gives the memory back."""
        self._cache = self._graphs = self._encoded = self._table = None

    @torch.inference_mode()
    def record(self) -> None:
        """From now on decoding is by CUDA graphs; to be called when the batch has been answered once."""
        cache = self._open_cache()
        cache.enable_decode_mode()
        reach = cache.max_sequence_length
        self._graphs = DecodingGraphs(self._stage_of_graph, self._inputs(cache), cache, first=1, last=reach - 1)

    def forget_records(self) -> None:
        """From now on decoding is without CUDA graphs."""
        self._graphs = None

    @torch.inference_mode()
    def answer(self, prompts: torch.Tensor, output_len: int) -> Answers:
        """The likeliest continuation of prompts [b, input_len], which are on the device, by `output_len` tokens."""
        cache = self._open_cache()
        cache.reset()
        tokens = torch.empty(prompts.size(0), output_len, dtype=torch.int64, device=self._device)
        torch.distributed.barrier()
        self._synchronise()
        begin = time.perf_counter()
        last = self._prefill(prompts, cache)
        tokens[:, :1] = last
        self._synchronise()
        first_s = time.perf_counter() - begin
        cache.enable_decode_mode()
        for i in range(1, output_len):
            last = self._decode(last, cache)
            tokens[:, i : i + 1] = last
            self._beat()
        self._synchronise()
        return Answers(tokens=tokens, first_s=first_s, all_s=time.perf_counter() - begin)

    def _prefill(self, prompts: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Reads the prompts, or has T5's encoder read them; the first tokens."""
        read = prompts
        if self._config.is_encoder_decoder:
            self._encoded = self._encode(prompts)
            read = torch.full_like(prompts[:, :1], _T5_START)
        count = read.size(1)
        positions = torch.arange(count, device=self._device).expand_as(read)
        received = None if self._pipe.is_first else self._pipe.receive(self._states(count, cache))
        found = self._stage(read, positions, received, cache)
        cache.increment_sequence_len_offset(count)
        self._beat()
        return self._hand_on(found, cache)

    def _decode(self, last: torch.Tensor, cache: Cache) -> torch.Tensor:
        """The next token of each request, [b, 1], behind its last one."""
        received = None if self._pipe.is_first else self._pipe.receive(self._states(1, cache))
        place: int = cache.sequence_len_offset
        if self._graphs is not None:
            found = self._graphs.replay(place, last if received is None else received)
        else:
            found = self._stage(last, torch.full_like(last, place), received, cache)
        cache.increment_sequence_len_offset(1)
        return self._hand_on(found, cache)

    def _stage_of_graph(self, place: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """A decoding pass through this stage, at a place that is a number on the device."""
        cache = self._open_cache()
        tokens, received = (given, None) if self._pipe.is_first else (given.new_empty(0), given)
        return self._stage(tokens, place.expand(cache.max_batch_size, 1), received, cache)

    def _inputs(self, cache: Cache) -> torch.Tensor:
        """What a decoding pass through this stage is given: tokens, or states."""
        if self._pipe.is_first:
            return torch.zeros(cache.max_batch_size, 1, dtype=torch.int64, device=self._device)
        return self._states(1, cache).zero_()

    def _stage(
        self, tokens: torch.Tensor, positions: torch.Tensor, received: torch.Tensor | None, cache: Cache
    ) -> torch.Tensor:
        """Through this stage: states [s, b, h] for the next one, or on the last one the next tokens [b, 1]."""
        chunk = self.chunk
        states = received if received is not None else chunk.embedding(input_ids=tokens, position_ids=positions)
        options: dict[str, Any] = {"attention_mask": None, "inference_context": cache}
        if self._config.is_encoder_decoder:
            if chunk.decoder is not None:
                states = chunk.decoder(hidden_states=states, context=self._encoded, **options)
        else:
            chunk.set_input_tensor(states)  # which stages behind the first take instead of what they are given
            states = chunk.decoder(hidden_states=states, rotary_pos_emb=self._table, **options)
        return self._likeliest(states[-1:]) if self._pipe.is_last else states

    def _encode(self, prompts: torch.Tensor) -> torch.Tensor:
        """T5's encoder over the prompts, on all stages: some of the first ones hold its layers."""
        pipe, shape = self._pipe, self._config.shape
        last = (shape.encoder_num_layers - 1) // (shape.pipeline_layers // pipe.size)
        size = (prompts.size(1), prompts.size(0), shape.hidden_size)
        states = torch.empty(size, dtype=self._dtype, device=self._device)
        if pipe.rank <= last:
            if pipe.is_first:
                positions = torch.arange(prompts.size(1), device=self._device).expand_as(prompts)
                states = self.chunk.embedding(input_ids=prompts, position_ids=positions)
            else:
                pipe.receive(states)
            states = self.chunk.encoder(hidden_states=states, attention_mask=None)
            if pipe.rank < last:
                pipe.send(states)
        return pipe.share(states.contiguous(), last)

    def _likeliest(self, states: torch.Tensor) -> torch.Tensor:
        """Of the last states [1, b, h] the next tokens [b, 1]; ranks exchange two numbers a request, and no logits."""
        chunk, shape = self.chunk, self._config.shape
        shared = chunk.shared_embedding_or_output_weight() if chunk.share_embeddings_and_output_weights else None
        logits, _ = chunk.output_layer(states, weight=shared)
        logits = logits[0].float()
        first = parallel_state.get_tensor_model_parallel_rank() * logits.size(-1)
        # Behind the vocabulary are rows that only make it divisible.
        logits[:, max(0, shape.vocab_size - first) :] = -torch.inf
        best, where = logits.max(-1)
        tokens: torch.Tensor = where + first
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() == 1:
            return tokens[:, None]
        own = torch.stack([best.double(), tokens.double()])
        found = own.new_empty(group.size(), *own.shape)
        torch.distributed.all_gather_into_tensor(found.flatten(0, 1), own, group=group)
        winner = found[:, 0].argmax(0, keepdim=True)
        return found[:, 1].gather(0, winner).long().T

    def _hand_on(self, found: torch.Tensor, cache: Cache) -> torch.Tensor:
        """States to the next stage; the tokens, once the last one has them, to all."""
        pipe = self._pipe
        if pipe.size == 1:
            return found
        if not pipe.is_last:
            pipe.send(found)
            found = torch.empty(cache.max_batch_size, 1, dtype=torch.int64, device=self._device)
        return pipe.share(found.contiguous(), pipe.size - 1)

    def _states(self, count: int, cache: Cache) -> torch.Tensor:
        shape = (count, cache.max_batch_size, self._config.shape.hidden_size)
        return torch.empty(shape, dtype=self._dtype, device=self._device)

    def _open_cache(self) -> Cache:
        assert self._cache is not None  # noqa: S101 (`open` was called)
        return self._cache

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Pipe:
    """The stages of the pipeline that this rank is one of."""

    def __init__(self) -> None:
        self._group = parallel_state.get_pipeline_model_parallel_group()
        self.rank: int = parallel_state.get_pipeline_model_parallel_rank()
        self.size: int = parallel_state.get_pipeline_model_parallel_world_size()
        self.is_first, self.is_last = self.rank == 0, self.rank == self.size - 1

    def send(self, states: torch.Tensor) -> None:
        """To the next stage."""
        torch.distributed.send(states.contiguous(), group=self._group, group_dst=self.rank + 1)

    def receive(self, states: torch.Tensor) -> torch.Tensor:
        """From the stage before, into this tensor."""
        torch.distributed.recv(states, group=self._group, group_src=self.rank - 1)
        return states

    def share(self, tensor: torch.Tensor, stage: int) -> torch.Tensor:
        """What this stage has, on all stages."""
        if self.size > 1:
            torch.distributed.broadcast(tensor, group=self._group, group_src=stage)
        return tensor
