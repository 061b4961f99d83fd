"""Which adapter each token runs, gathered like the tokens: for both of vLLM's kinds of kernels."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm")

from vllm_adaspark.models.token_mapping import TokenMapping

MAPPING = [0, 0, 0, -1, -1, 1, 1, 1, 1, 0]  # adapters of a step's tokens


class Wrapper:
    """The state of vLLM's PunicaWrapper that its PyTorch kernels read."""

    def __init__(self, mapping: list[int]) -> None:
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        made = PunicaWrapperCPU(64, 4, "cpu")
        number = len(mapping)
        made._token_lora_indices[:number] = torch.tensor(mapping)
        made._token_lora_indices[number:] = 7  # nobody's
        made.indices_len[0] = number
        made._update_prefill_metadata(made.token_lora_indices)
        self.made = made

    def per_token(self) -> list[int]:
        """What the kernels make of it."""
        _, lengths, adapters, *_ = self.made.prefill_metadata
        return torch.repeat_interleave(adapters, lengths).tolist()


def test_gathered_and_put_back() -> None:
    wrapper = Wrapper(MAPPING)
    mapping = TokenMapping(wrapper.made)
    with mapping.gathered(torch.tensor([9, 3, 5, 0, 12])):  # 12 pads a CUDA graph
        assert wrapper.per_token() == [0, -1, 1, 0, -1]
        assert wrapper.made.token_lora_indices.tolist() == [0, -1, 1, 0, -1]
    with mapping.gathered(slice(2, 6)):
        assert wrapper.per_token() == [0, -1, -1, 1]
    with pytest.raises(KeyError), mapping.gathered(torch.tensor([1])):
        raise KeyError
    assert wrapper.per_token() == MAPPING


def test_narrowed_step_by_step_until_reset() -> None:
    """As tokens are dropped between layers; more sequences than the wrapper has room for."""
    wrapper = Wrapper(MAPPING)
    mapping = TokenMapping(wrapper.made)
    mapping.narrow(torch.tensor([0, 5, 1, 6, 2, 3]))
    assert wrapper.per_token() == [0, 1, 0, 1, 0, -1]
    mapping.narrow(torch.tensor([0, 3, 5]))
    with mapping.gathered(torch.tensor([2, 1])):
        assert wrapper.per_token() == [-1, 1]
    assert wrapper.per_token() == [0, 1, -1]
    mapping.reset()
    mapping.reset()
    assert wrapper.per_token() == MAPPING
    wrapper.made._update_prefill_metadata(wrapper.made.token_lora_indices)  # the next step's


def test_without_adapters_in_the_step_nothing_is_done() -> None:
    wrapper = Wrapper([-1] * 5)
    mapping = TokenMapping(wrapper.made)
    assert mapping.idle and not TokenMapping(Wrapper(MAPPING).made).idle
    before = dict(vars(wrapper.made))
    mapping.narrow(torch.tensor([0]))
    with mapping.gathered(torch.tensor([0])):
        assert vars(wrapper.made) == before


def test_what_the_triton_kernels_read() -> None:
    meta = pytest.importorskip("vllm.lora.ops.triton_ops.lora_kernel_metadata").LoRAKernelMeta
    made = Wrapper(MAPPING).made
    made.max_loras = 3
    made.token_mapping_meta = meta.make(3, 64, "cpu", [])
    made.token_mapping_meta.prepare_tensors(made.token_lora_indices)
    mapping, stock = TokenMapping(made), made.token_mapping_meta
    with mapping.gathered(torch.tensor([9, 3, 5, 0])):
        told = made.token_mapping_meta
        assert told.token_lora_mapping[:4].tolist() == [0, -1, 1, 0]
        assert told.token_indices_sorted_by_lora_ids[:4].tolist() == [1, 0, 3, 2]
        assert told.active_lora_ids[:3].tolist() == [-1, 0, 1]
        assert told.num_tokens_per_lora[:3].tolist() == [1, 2, 1]
    assert made.token_mapping_meta is stock
